//! Answers "what goes wrong now": faults armed by `POST /sim/fault` or by flag, and who takes them.
//!
//! Only the simulator has these; nothing of it exists in a real engine. A fault of a stream is taken by the first
//! stream that has delivered `after_tokens` tokens, running ones included, and is spent after `count` of them.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The engine ends without a word, as after kill -9.
    Die,
    /// The engine's process dies behind its HTTP server: every stream ends with the error event, `/health` says 503
    /// for `for_ms`, then the engine ends as with `die`.
    CoreDies,
    /// The connection is reset (RST).
    Reset,
    /// The stream falls silent for `for_ms` (0: for ever); others go on.
    Stall,
    /// Each further token of the stream is `for_ms` late.
    Slow,
    /// The whole engine makes no step for `for_ms`; HTTP still answers.
    Freeze,
    /// Bytes that are no HTTP, then the connection closes.
    Garbage,
    /// The error event of an engine whose process died, `[DONE]`, and a clean end.
    InBandError,
    /// The connection closes without the last chunk.
    Truncate,
    /// `count` batches of KV events reach no subscriber, only the replay buffer.
    LoseEvents,
    /// No connection is accepted for `for_ms`.
    Refuse,
    /// Greedy answers are those of another model.
    WrongAnswer,
    /// Generation requests are answered 500 at once.
    #[serde(rename = "http_500")]
    Http500,
}

/// A fault on command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What goes wrong.
    pub kind: FaultKind,
    /// Tokens a stream must have delivered before it takes the fault.
    #[serde(default)]
    pub after_tokens: u64,
    /// How many requests (or batches) take it.
    #[serde(default = "one")]
    pub count: u64,
    /// Duration, in milliseconds, of the kinds that have one.
    #[serde(default)]
    pub for_ms: u64,
}

fn one() -> u64 {
    1
}

impl Fault {
    /// A fault that one request takes at its start.
    pub fn new(kind: FaultKind) -> Self {
        Self {
            kind,
            after_tokens: 0,
            count: 1,
            for_ms: 0,
        }
    }

    pub(crate) fn duration(&self) -> Duration {
        Duration::from_millis(self.for_ms)
    }
}

/// The faults still armed.
#[derive(Default)]
pub(crate) struct Faults(Mutex<Vec<Fault>>);

impl Faults {
    fn armed(&self) -> std::sync::MutexGuard<'_, Vec<Fault>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn arm(&self, fault: Fault) {
        self.armed().push(fault);
    }

    pub(crate) fn list(&self) -> Vec<Fault> {
        self.armed().clone()
    }

    pub(crate) fn clear(&self) {
        self.armed().clear();
    }

    /// The fault that strikes a generation request before it starts.
    pub(crate) fn take_http_500(&self) -> bool {
        self.take(|fault| fault.kind == FaultKind::Http500)
            .is_some()
    }

    /// Whether this request is answered by another model.
    pub(crate) fn take_wrong_answer(&self) -> bool {
        self.take(|fault| fault.kind == FaultKind::WrongAnswer)
            .is_some()
    }

    /// The fault that strikes a stream which has delivered `tokens`; each stream takes a kind once.
    pub(crate) fn take_for_stream(&self, tokens: u64, taken: &[FaultKind]) -> Option<Fault> {
        let of_requests = [FaultKind::Http500, FaultKind::WrongAnswer];
        let strikes =
            |fault: &Fault| !of_requests.contains(&fault.kind) && fault.after_tokens <= tokens;
        self.take(|fault| strikes(fault) && !taken.contains(&fault.kind))
    }

    fn take(&self, which: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let mut armed = self.armed();
        let at = armed.iter().position(which)?;
        let fault = armed[at];
        armed[at].count -= 1;
        if armed[at].count == 0 {
            armed.remove(at);
        }
        Some(fault)
    }
}
