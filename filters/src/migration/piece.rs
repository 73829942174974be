//! Places in a stream, and the piece of it that runs now.

use bytes::Bytes;

/// A place behind an event that brought text, and one token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// Bytes of ids.
    pub(super) ids: usize,
    pub(super) tokens: usize,
    /// Characters that the engine had told.
    pub(super) told: usize,
}

/// Where a stream will be cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) mark: Mark,
    /// Tokens that are kept.
    pub(super) tokens: usize,
    /// Tokens that the client has had, in part, and that will be generated again.
    pub(super) again_tokens: usize,
    /// Characters of their text that were delivered.
    pub(super) again_chars: usize,
}

/// The piece that runs now.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) first: bool,
    /// It is written as the client wants it.
    pub(super) same_form: bool,
    /// Tokens before it, which its prompt holds.
    pub(super) before: usize,
    /// Characters before it.
    pub(super) offset: usize,
    /// Ids that it must generate again, as text, and how many.
    pub(super) again: Bytes,
    pub(super) again_tokens: usize,
    /// Something of these was shown, so that others would not do.
    pub(super) bound: bool,
    /// Opening chunks that the client has had.
    pub(super) openings: usize,
    /// All of it was told before, and is compared with that.
    pub(super) compared: bool,
    /// Its prompt is still to be compared with what was asked.
    pub(super) unproven: bool,
    /// It goes on within reasoning, and is still to show that its parser knows.
    pub(super) reasons: bool,
    /// How it stood when it began.
    pub(super) start: Start,
}

/// What is as before if nothing of a piece counts.
#[derive(Debug, Default)]
pub(super) struct Start {
    /// Bytes of ids.
    pub(super) ids: usize,
    pub(super) tokens: usize,
    pub(super) again: Bytes,
    pub(super) again_tokens: usize,
}

impl Piece {
    /// Tokens told before it that it has not come to yet. Where nothing of them was shown, others will do.
    pub(super) fn told_ahead(&self) -> usize {
        self.again_tokens * usize::from(self.bound)
    }
}
