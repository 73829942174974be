//! What differs between engines whose legs run one after the other: the bodies, and how an answer is read.

use super::{Head, head::Pieces};
use bytes::Bytes;

/// An engine's words.
pub(super) struct Dialect {
    /// The body of the prefill leg.
    pub(super) prefill: fn(&Head) -> Option<Pieces>,
    /// Reads the prefill leg's answer; `None` if it has nothing for the decode leg.
    pub(super) answer: fn(&Bytes) -> Option<Answer>,
    /// For each token of the prompt an answer may have so many bytes more.
    pub(super) token_bytes: usize,
    /// The body of the decode leg, or why there is none.
    pub(super) decode: fn(&Head, &Answer) -> Result<Pieces, &'static str>,
    /// The body of a decode leg that nobody waits for: it takes the blocks, and ends.
    pub(super) release: fn(&Head, &Answer) -> Option<Pieces>,
}

/// What the prefill leg answered, as far as it matters.
pub(super) struct Answer {
    /// What the decode leg is to be told, as it came: an object.
    pub(super) params: Bytes,
    /// The prompt as a list of tokens, where the decode leg needs it so; else empty.
    pub(super) prompt: Bytes,
    /// Prompt tokens that needed no computing.
    pub(super) cached: u64,
}
