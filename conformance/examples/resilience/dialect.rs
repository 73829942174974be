//! What the engines are, and which streams of theirs are promised to go on: a row per kind.

use crate::{Args, client::Ask};
use clap::ValueEnum;
use outrigger_conformance::sim::{Bootstrap, Config, Nixl, Profile, Side, SimEngine};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Room for all streams at the engines that are left.
const BATCH_SLOTS: usize = 4096;
const KV_BLOCKS: usize = 65_536;
/// Prompts that move are computed anew, hundreds at once.
const PREFILL_TOKENS_PER_S: f64 = 200_000.0;
/// Makes a prompt worth to be split by the thresholds that are shipped.
const LONG: &str =
    " It was told before, in another harbour, and nobody there believed a word of it.";
const LONG_TIMES: usize = 24;

/// What the engines imitate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum EnginesOf {
    /// vLLM 0.32.
    #[default]
    Vllm,
    /// SGLang 0.5.23.
    Sglang,
    /// TensorRT-LLM 1.2.
    Trtllm,
    /// vLLM and SGLang, which serve one model.
    Mixed,
}

/// One kind of fleet.
struct Row {
    /// In turn.
    profiles: &'static [Profile],
    /// The paths whose streams go on after their first token (docs/src/engines.md, "Streams that move"), in turn.
    paths: &'static [&'static str],
    /// Whether prefill and decode can be at two of them.
    splits: bool,
}

impl EnginesOf {
    const fn row(self) -> Row {
        match self {
            Self::Vllm => Row {
                profiles: &[Profile::Vllm],
                paths: &[CHAT, COMPLETIONS],
                splits: true,
            },
            Self::Sglang => Row {
                profiles: &[Profile::Sglang],
                paths: &[COMPLETIONS],
                splits: true,
            },
            Self::Trtllm => Row {
                profiles: &[Profile::Trtllm],
                paths: &[CHAT, COMPLETIONS],
                splits: true,
            },
            Self::Mixed => Row {
                profiles: &[Profile::Vllm, Profile::Sglang],
                paths: &[COMPLETIONS],
                splits: false,
            },
        }
    }

    /// # Errors
    /// Nothing can be shown of such a fleet; this is why.
    pub(crate) fn check(self, split: bool) -> Result<(), &'static str> {
        if split && !self.row().splits {
            return Err("prefill and decode are at engines of one kind");
        }
        Ok(())
    }

    /// One engine of each kind that nothing happens to, and that does all by itself.
    pub(crate) fn alone(self) -> Vec<SimEngine> {
        let start = |profile: &Profile| {
            let config = Config {
                profile: *profile,
                decode_itl_ms: 0.0,
                ..Config::default()
            };
            SimEngine::start(config).expect("invariant: a free port")
        };
        self.row().profiles.iter().map(start).collect()
    }

    /// The engine of a pod.
    pub(crate) fn config(self, at: usize, args: &Args) -> Config {
        let profiles = self.row().profiles;
        let profile = profiles[at % profiles.len()];
        let side = side(at, args);
        let halves = profile == Profile::Sglang;
        Config {
            profile,
            decode_itl_ms: args.itl_ms,
            batch_slots: BATCH_SLOTS,
            kv_blocks: KV_BLOCKS,
            prefill_tokens_per_s: PREFILL_TOKENS_PER_S,
            nixl: side.filter(|_| !halves).map(|_| Nixl::default()),
            bootstrap: side.filter(|_| halves).map(Bootstrap::new),
            ..Config::default()
        }
    }

    /// What a stream asks for.
    pub(crate) fn request(self, prompt: usize, args: &Args, id: &str) -> Ask {
        let mut text = format!("Tell story number {prompt} of the outrigger.");
        let mut body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": args.tokens,
            "ignore_eos": true, "stream_options": {"include_usage": true}});
        let paths = self.row().paths;
        let path = paths[prompt % paths.len()];
        if args.split {
            text.push_str(&LONG.repeat(LONG_TIMES));
            // What is cached is not worth to be split. Completions of TensorRT-LLM know no salt.
            if self == Self::Vllm || self == Self::Trtllm && path == CHAT {
                body["cache_salt"] = id.into();
            }
        }
        if path == CHAT {
            body["messages"] = json!([{"role": "user", "content": text}]);
        } else {
            body["prompt"] = text.into();
        }
        Ask {
            path,
            body: body.to_string(),
            id: id.to_owned(),
        }
    }
}

/// What the engine of a pod is for, if not for all.
pub(crate) fn side(at: usize, args: &Args) -> Option<Side> {
    let prefill = at < args.engines / 2;
    args.split.then_some(match prefill {
        true => Side::Prefill,
        false => Side::Decode,
    })
}
