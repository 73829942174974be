//! Answers "what can be set on a simulated engine": the library's `Config` and the command line of the binary.

use std::path::PathBuf;

use clap::Parser;

use super::bootstrap::{Bootstrap, Side};
use super::fault::Fault;
use super::nixl::Nixl;

/// Which engine is imitated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// vLLM 0.32.
    #[default]
    #[value(name = "vllm-0.32")]
    Vllm,
    /// SGLang 0.5.23.
    #[value(name = "sglang-0.5.23")]
    Sglang,
    /// TensorRT-LLM 1.2.
    #[value(name = "trtllm-1.2")]
    Trtllm,
}

impl Profile {
    /// Tokens that events tell of while a sequence runs, of those computed.
    pub(crate) fn told(self, computed: usize, prompt: usize) -> usize {
        match self {
            Self::Vllm | Self::Trtllm => computed,
            // What is generated is told of at the end.
            Self::Sglang => computed.min(prompt),
        }
    }
}

/// Where KV events go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Events {
    /// No publisher; `/kv_event_sources` says so.
    Off,
    /// The engine binds a PUB socket on loopback; 0 picks a free port. The address a caller sees is `tcp://*:PORT`.
    Bind(u16),
    /// The engine connects to a subscriber that binds `HOST:PORT`, as vLLM does unless the endpoint holds `*`.
    Connect(String),
}

/// What an engine makes of a request's `seed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seeds {
    /// It draws by it.
    #[default]
    Kept,
    /// It draws as if there were none.
    Ignored,
    /// It refuses those that are drawn by one, as vLLM on TPUs does.
    Refused,
    /// The same, when the head of the stream has gone.
    RefusedInStream,
}

/// Settings of one simulated engine. `Config::default()` is a fast engine on free ports.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which engine is imitated.
    pub profile: Profile,
    /// HTTP port on 127.0.0.1; 0 picks a free one.
    pub port: u16,
    /// Served model name.
    pub model: String,
    /// What `/v1/models` gives as `root`; the model's files are written there when they are missing.
    pub model_path: Option<PathBuf>,
    /// KV event publisher.
    pub events: Events,
    /// Port of the replay socket; 0 picks a free one. Not opened when events are off.
    pub replay_port: u16,
    /// TensorRT-LLM's events kept for whoever reads them; 0: none.
    pub event_buffer_max_size: usize,
    /// TensorRT-LLM tells its events when nothing happened for this long; 2,000 as 1.2 does, 0 as the newest source.
    pub event_quiet_ms: u64,
    /// Topic of the events.
    pub topic: String,
    /// Seeds ids and sampling without a seed of its own. Greedy text does not depend on it.
    pub seed: u64,
    /// Tokens in a KV block.
    pub block_size: usize,
    /// Physical KV blocks, one of which is never used (as in vLLM).
    pub kv_blocks: usize,
    /// Longest prompt and generation together, in tokens.
    pub max_model_len: usize,
    /// Requests in one step; others wait.
    pub batch_slots: usize,
    /// Tokens in one step, prompts and generation together.
    pub batch_tokens: usize,
    /// Speed of prefill, in tokens per second.
    pub prefill_tokens_per_s: f64,
    /// Duration of a step that generates, in milliseconds.
    pub decode_itl_ms: f64,
    /// Bearer token asked for on `/v1` and `/inference`.
    pub api_key: Option<String>,
    /// `--enable-prompt-tokens-details`: `usage` tells cached tokens.
    pub prompt_tokens_details: bool,
    /// `--enable-scale-out`: render and `/inference/v1` answer instead of 403.
    pub scale_out: bool,
    /// `VLLM_SERVER_DEV_MODE=1`: `/reset_prefix_cache`, `/server_info` and the like exist.
    pub dev_mode: bool,
    /// `--enable-server-load-tracking`: `/load` counts.
    pub server_load_tracking: bool,
    /// `VLLM_ENABLE_RESPONSES_API_STORE=1`: responses are kept.
    pub responses_store: bool,
    /// Chat takes prompts of tokens (`kv_transfer_params.prompt_token_ids`), as newer engines do.
    pub chat_token_prompts: bool,
    /// Tokens of a streamed chat that a reasoning parser takes for reasoning; 0: there is no parser.
    pub reasoning_tokens: usize,
    /// What becomes of seeds.
    pub seeds: Seeds,
    /// `--kv-transfer-config` with the NIXL connector: blocks go from engine to engine.
    pub nixl: Option<Nixl>,
    /// SGLang's `--disaggregation-mode`: half of a pair that meets in rooms.
    pub bootstrap: Option<Bootstrap>,
    /// SGLang's `--abort-on-priority-when-disabled`: a request with a priority is answered 503.
    pub abort_on_priority: bool,
    /// Faults armed from the start.
    pub faults: Vec<Fault>,
    /// Whether a `die` fault ends the process (exit code 137) or this engine alone.
    pub die_exits_process: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            profile: Profile::Vllm,
            port: 0,
            model: "sim".to_owned(),
            model_path: None,
            events: Events::Bind(0),
            replay_port: 0,
            event_buffer_max_size: 4096,
            event_quiet_ms: 2000,
            topic: "kv-events".to_owned(),
            seed: 0,
            block_size: 32,
            kv_blocks: 1456,
            max_model_len: 8192,
            batch_slots: 64,
            batch_tokens: 8192,
            prefill_tokens_per_s: 20_000.0,
            decode_itl_ms: 5.0,
            api_key: None,
            prompt_tokens_details: false,
            scale_out: false,
            dev_mode: false,
            server_load_tracking: false,
            responses_store: false,
            chat_token_prompts: true,
            reasoning_tokens: 0,
            seeds: Seeds::default(),
            nixl: None,
            bootstrap: None,
            abort_on_priority: false,
            faults: Vec::new(),
            die_exits_process: false,
        }
    }
}

impl Config {
    /// The settings of the server behind the recordings: its model name, limits and every optional endpoint.
    pub fn recorded() -> Self {
        Self {
            model: "smollm2".to_owned(),
            max_model_len: 2048,
            prompt_tokens_details: true,
            scale_out: true,
            dev_mode: true,
            ..Self::default()
        }
    }

    /// The settings of the recorded SGLang: pages of one token.
    pub fn recorded_sglang() -> Self {
        Self {
            profile: Profile::Sglang,
            model: "smollm2".to_owned(),
            max_model_len: 2048,
            block_size: 1,
            kv_blocks: 8193,
            ..Self::default()
        }
    }
}

const FAULTS_HELP: &str = "\
Faults, by --fault or POST /sim/fault (GET lists, DELETE disarms):
  {\"kind\": K, \"after_tokens\": 0, \"count\": 1, \"for_ms\": 0}
  die            the process ends with 137, as after kill -9
  core_dies      every stream ends with the error event, /health is 503 for for_ms, then as die
  reset          the connection is reset
  truncate       the connection closes without the last chunk
  garbage        bytes that are no HTTP, then the connection closes
  in_band_error  the error event of a dead engine, [DONE], a clean end
  stall          this stream falls silent for for_ms (0: for ever)
  slow           each further token of this stream is for_ms late
  freeze         the whole engine makes no step for for_ms; HTTP still answers
  wrong_answer   greedy answers are those of another model
  http_500       generation requests are answered 500
  refuse         no connection is accepted for for_ms
  lose_events    count batches of KV events reach the replay buffer only (TensorRT-LLM: nobody)
A fault strikes the first stream that has delivered after_tokens tokens, running ones included, and is spent
after count of them.";

/// `outrigger-sim-engine`: an HTTP server that behaves as an inference engine does, without a model.
#[derive(Parser, Debug)]
#[command(name = "outrigger-sim-engine", version, after_help = FAULTS_HELP)]
pub(crate) struct Flags {
    /// HTTP port on 127.0.0.1 (0: a free one, printed)
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Engine to imitate
    #[arg(long, value_enum, default_value_t)]
    profile: Profile,
    /// Served model name
    #[arg(long, default_value = "sim")]
    model: String,
    /// Directory that /v1/models names as root; tokenizer.json and chat template are written there if missing
    #[arg(long, alias = "model-dir")]
    model_path: Option<PathBuf>,
    /// Port of the KV event PUB socket (0: a free one; default: no events)
    #[arg(long)]
    events_port: Option<u16>,
    /// Connect the KV event PUB socket to HOST:PORT instead of binding it
    #[arg(long, conflicts_with = "events_port")]
    events_connect: Option<String>,
    /// Port of the replay socket (0: a free one)
    #[arg(long, default_value_t = 0)]
    replay_port: u16,
    /// TensorRT-LLM's KV events kept for whoever reads them (0: none)
    #[arg(long, default_value_t = 0)]
    event_buffer_max_size: usize,
    /// TensorRT-LLM tells its KV events when nothing happened for this long
    #[arg(long, default_value_t = 2000)]
    event_quiet_ms: u64,
    /// Topic of the KV events
    #[arg(long, default_value = "kv-events")]
    topic: String,
    /// Seeds ids and unseeded sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens in a KV block
    #[arg(long, default_value_t = 32)]
    block_size: usize,
    /// KV blocks
    #[arg(long, default_value_t = 1456)]
    kv_blocks: usize,
    /// Longest prompt and generation together, in tokens
    #[arg(long, default_value_t = 8192)]
    max_model_len: usize,
    /// Requests in one step
    #[arg(long, default_value_t = 64)]
    batch_slots: usize,
    /// Tokens in one step
    #[arg(long, default_value_t = 8192)]
    batch_tokens: usize,
    /// Speed of prefill
    #[arg(long, default_value_t = 20_000.0)]
    prefill_tokens_per_s: f64,
    /// Duration of a step that generates
    #[arg(long, default_value_t = 5.0)]
    decode_itl_ms: f64,
    /// Bearer token asked for on /v1 and /inference
    #[arg(long)]
    api_key: Option<String>,
    /// Tell cached tokens in usage
    #[arg(long)]
    enable_prompt_tokens_details: bool,
    /// Serve render and /inference/v1
    #[arg(long)]
    enable_scale_out: bool,
    /// Serve the development endpoints
    #[arg(long)]
    dev_mode: bool,
    /// Hand KV blocks over to other engines, and fetch theirs
    #[arg(long)]
    nixl: bool,
    /// Half of a split SGLang
    #[arg(long, value_enum)]
    disaggregation_mode: Option<Side>,
    /// Port where a prefill engine meets decode engines (0: a free one, told by /server_info)
    #[arg(long, default_value_t = 0)]
    disaggregation_bootstrap_port: u16,
    /// Answer requests that have a priority by 503, as SGLang may
    #[arg(long)]
    abort_on_priority_when_disabled: bool,
    /// Count running requests in /load
    #[arg(long)]
    enable_server_load_tracking: bool,
    /// Keep responses, as VLLM_ENABLE_RESPONSES_API_STORE=1 does
    #[arg(long)]
    enable_responses_store: bool,
    /// A fault armed from the start, as JSON: {"kind":"die","after_tokens":8}
    #[arg(long, value_parser = |text: &str| serde_json::from_str::<Fault>(text).map_err(|error| error.to_string()))]
    fault: Vec<Fault>,
}

impl From<Flags> for Config {
    fn from(flags: Flags) -> Self {
        let events = match (flags.events_port, flags.events_connect) {
            (Some(port), _) => Events::Bind(port),
            (None, Some(address)) => Events::Connect(address),
            (None, None) => Events::Off,
        };
        let bootstrap = flags.disaggregation_mode.map(|side| Bootstrap {
            port: flags.disaggregation_bootstrap_port,
            ..Bootstrap::new(side)
        });
        Self {
            profile: flags.profile,
            port: flags.port,
            model: flags.model,
            model_path: flags.model_path,
            events,
            replay_port: flags.replay_port,
            event_buffer_max_size: flags.event_buffer_max_size,
            event_quiet_ms: flags.event_quiet_ms,
            topic: flags.topic,
            seed: flags.seed,
            block_size: flags.block_size,
            kv_blocks: flags.kv_blocks,
            max_model_len: flags.max_model_len,
            batch_slots: flags.batch_slots,
            batch_tokens: flags.batch_tokens,
            prefill_tokens_per_s: flags.prefill_tokens_per_s,
            decode_itl_ms: flags.decode_itl_ms,
            api_key: flags.api_key,
            prompt_tokens_details: flags.enable_prompt_tokens_details,
            scale_out: flags.enable_scale_out,
            dev_mode: flags.dev_mode,
            server_load_tracking: flags.enable_server_load_tracking,
            responses_store: flags.enable_responses_store,
            chat_token_prompts: true,
            reasoning_tokens: 0,
            seeds: Seeds::default(),
            nixl: flags.nixl.then(Nixl::default),
            bootstrap,
            abort_on_priority: flags.abort_on_priority_when_disabled,
            faults: flags.fault,
            die_exits_process: true,
        }
    }
}
