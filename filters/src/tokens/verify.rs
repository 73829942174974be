//! Whether a local tokenizer may be trusted: it must give an engine's own ids for a probe of each kind.
//!
//! A served template may differ from the file (`--chat-template`), files may be newer than the engine, and engines
//! prepare tool calls in their own ways. On a mismatch the engine is asked from then on.

use super::{
    Source, Unavailable,
    engine::Asker,
    local::{Kind, LocalModel},
};
use crate::{
    endpoints::clock_ms,
    openai::{Api, OpenAiRequest, StreamLimits},
};
use bytes::Bytes;
use serde_json::json;
use std::{
    sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What is known of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// Not asked yet, or the engine did not answer.
    Unknown = 0,
    /// Another request is asking.
    Asking = 1,
    /// Equal to the engine's.
    Trusted = 2,
    /// Different.
    Distrusted = 3,
    /// The engine has no way to tell: good enough to route by, and no proof.
    Assumed = 4,
}

/// A local tokenizer and how far it is trusted.
pub(super) struct Verified {
    pub(super) local: LocalModel,
    trust: [AtomicU8; Kind::COUNT],
    not_before_ms: AtomicU64,
}

impl Verified {
    pub(super) fn new(local: LocalModel) -> Self {
        Self {
            local,
            trust: Default::default(),
            not_before_ms: AtomicU64::new(0),
        }
    }

    pub(super) fn trust(&self, kind: Kind) -> Trust {
        match self.trust[kind as usize].load(Relaxed) {
            0 => Trust::Unknown,
            1 => Trust::Asking,
            2 => Trust::Trusted,
            4 => Trust::Assumed,
            _ => Trust::Distrusted,
        }
    }

    /// Asks the engine about the probe of this kind, if nobody else does. If that says nothing, it is asked again after
    /// `again_after`.
    pub(super) async fn verify(
        &self,
        kind: Kind,
        request: &OpenAiRequest,
        source: Source<'_>,
        asker: &Asker,
        again_after: Duration,
    ) {
        let cell = &self.trust[kind as usize];
        let mine = clock_ms() >= self.not_before_ms.load(Relaxed)
            && cell
                .compare_exchange(Trust::Unknown as u8, Trust::Asking as u8, Relaxed, Relaxed)
                .is_ok();
        if !mine {
            return;
        }
        let mut asking = Asking {
            cell,
            outcome: Trust::Unknown,
        };
        let Some(probe) = probe(kind, request.model.as_deref()) else {
            return;
        };
        let ours = self.local.encode(&probe, kind);
        let theirs = asker
            .ask(
                &probe,
                source.endpoint,
                source.headers,
                source.services.upstream.as_ref(),
            )
            .await;
        let (outcome, result) = judge(ours.as_deref(), theirs.map(|(ids, _)| ids).as_deref());
        asking.outcome = outcome;
        if outcome == Trust::Unknown {
            let not_before = clock_ms() + again_after.as_millis() as u64;
            self.not_before_ms.store(not_before, Relaxed);
        }
        metrics::counter!("outrigger_tokens_local_verifications_total", "kind" => kind.as_str(), "result" => result)
            .increment(1);
        let model = request.model.as_deref().unwrap_or_default();
        if matches!(outcome, Trust::Trusted | Trust::Assumed) {
            tracing::info!(
                model,
                kind = kind.as_str(),
                result,
                "local tokenizer is used"
            );
        } else {
            tracing::warn!(model, kind = kind.as_str(), result, ours = ?ours.err(), "local tokenizer is not used");
        }
    }
}

/// What a comparison says.
fn judge(
    ours: Result<&[u32], &String>,
    theirs: Result<&[u32], &Unavailable>,
) -> (Trust, &'static str) {
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) if ours == theirs => (Trust::Trusted, "equal"),
        (Ok(_), Ok(_)) => (Trust::Distrusted, "different"),
        (Err(_), _) => (Trust::Distrusted, "local_error"),
        // Without anything to compare with, the model's own files are still the best guess.
        (Ok(_), Err(Unavailable::EngineRefused)) => (Trust::Assumed, "unverifiable"),
        (Ok(_), Err(Unavailable::EngineFailed)) => (Trust::Unknown, "engine_failed"),
        // The client that happened to be first has no key, or a wrong one: the next one may.
        (Ok(_), Err(Unavailable::EngineDenied)) => (Trust::Unknown, "engine_denied"),
        (Ok(_), Err(_)) => (Trust::Distrusted, "engine_rejected"),
    }
}

/// Settles the state also when the client goes away in between.
struct Asking<'a> {
    cell: &'a AtomicU8,
    outcome: Trust,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.cell.store(self.outcome as u8, Relaxed);
    }
}

const PROBE_TEXT: &str = "The outrigger steadies the hull.\n\n  def f(x):\n    return x + 1  # naïve, 数字 1234567 <|x|>";

/// A conversation that shows how a kind is prepared. No system message: some templates refuse one, others add theirs.
fn probe(kind: Kind, model: Option<&str>) -> Option<OpenAiRequest> {
    let (api, body) = match kind {
        Kind::Text => (
            Api::Completions,
            json!({"model": model, "prompt": PROBE_TEXT, "max_tokens": 1}),
        ),
        Kind::Chat => {
            let messages = json!([
                {"role": "user", "content": PROBE_TEXT},
                {"role": "assistant", "content": " It does. "},
                {"role": "user", "content": "Why?\n"},
            ]);
            (
                Api::Chat,
                json!({"model": model, "messages": messages, "max_tokens": 1}),
            )
        }
        Kind::Tools => {
            let parameters = json!({
                "type": "object",
                "properties": {"place": {"type": "string", "description": "Where <é>"}, "days": {"type": "integer"}},
                "required": ["place"],
            });
            let call =
                json!({"name": "get_tide", "arguments": "{\"place\": \"Hilo\", \"days\": 2}"});
            let messages = json!([
                {"role": "user", "content": "When is high water in Hilo?"},
                {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "{\"high\": \"06:12\"}"},
            ]);
            let function = json!({"name": "get_tide", "description": "Tides \"now\"", "parameters": parameters});
            let tools = json!([{"type": "function", "function": function}]);
            (
                Api::Chat,
                json!({"model": model, "messages": messages, "tools": tools, "max_tokens": 1}),
            )
        }
    };
    OpenAiRequest::parse(api, &Bytes::from(body.to_string()), StreamLimits::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_of_their_own_kind() {
        for kind in [Kind::Text, Kind::Chat, Kind::Tools] {
            assert_eq!(Kind::of(&probe(kind, Some("m")).unwrap()), Some(kind));
        }
    }

    #[test]
    fn only_a_different_answer_condemns() {
        let error = String::from("x");
        let cases = [
            (Ok(&[1u32, 2][..]), Ok(&[1u32, 2][..]), Trust::Trusted),
            (Ok(&[1, 2][..]), Ok(&[1, 3][..]), Trust::Distrusted),
            (
                Ok(&[1, 2][..]),
                Err(&Unavailable::EngineRefused),
                Trust::Assumed,
            ),
            (
                Ok(&[1, 2][..]),
                Err(&Unavailable::EngineFailed),
                Trust::Unknown,
            ),
            (
                Ok(&[1, 2][..]),
                Err(&Unavailable::EngineRejected),
                Trust::Distrusted,
            ),
            (
                Ok(&[1, 2][..]),
                Err(&Unavailable::EngineDenied),
                Trust::Unknown,
            ),
            (Err(&error), Ok(&[1][..]), Trust::Distrusted),
        ];
        for (ours, theirs, expected) in cases {
            assert_eq!(judge(ours, theirs).0, expected, "{ours:?} {theirs:?}");
        }
    }
}
