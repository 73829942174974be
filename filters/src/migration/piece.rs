//! The piece of a stream that runs now, and what it has to tell again before there is news in it.

use super::{cause::Cause, event::Facts};
use bytes::Bytes;
use std::borrow::Cow;

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
    /// Or the text that it must tell again, where no ids were told.
    pub(super) again_text: Option<Again>,
    /// Tokens that were told before it, all that a stream that tells no ids had.
    pub(super) reached: usize,
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
}

impl Piece {
    /// Tokens told before it that it has not come to yet. Where nothing of them was shown, others will do.
    pub(super) fn told_ahead(&self) -> usize {
        self.again_tokens * usize::from(self.bound)
    }
}

/// Text that was told, and that another engine is telling again.
#[derive(Debug, Default)]
pub(super) struct Again {
    text: String,
    /// So many bytes of it came.
    at: usize,
}

impl Again {
    /// What was told, as it stands within strings of JSON; `None` if that is no text.
    pub(super) fn of(escaped: &[u8]) -> Option<Self> {
        let text = read(&[b"\"", escaped, b"\""].concat())?.into_owned();
        Some(Self { text, at: 0 })
    }

    /// What it holds.
    pub(super) fn bytes(&self) -> usize {
        self.text.len()
    }

    /// Takes in one more event: it tells what was told, as far as something was. What a parser made of the text says nothing
    /// of it, and an end before that of the text is another text.
    pub(super) fn admit(&mut self, raw: &[u8], facts: &Facts) -> Result<(), Cause> {
        if self.is_over() {
            return Ok(());
        }
        let parsed = facts.tools || facts.reasoning || facts.logprobs;
        let text = facts.text.clone().filter(|_| facts.has_text());
        let same = !parsed && text.is_none_or(|text| self.goes_on(&raw[text]));
        let ends = facts.finish.is_some() && !self.is_over();
        (same && !ends).then_some(()).ok_or(Cause::Diverged)
    }

    fn is_over(&self) -> bool {
        self.at == self.text.len()
    }

    /// Whether the text of an event, given with its quotes, goes on from where it is.
    fn goes_on(&mut self, quoted: &[u8]) -> bool {
        let Some(text) = read(quoted) else {
            return false;
        };
        let left = &self.text.as_bytes()[self.at..];
        let length = left.len().min(text.len());
        self.at += length;
        left[..length] == text.as_bytes()[..length]
    }
}

/// A string of JSON, with its quotes.
pub(super) fn read(quoted: &[u8]) -> Option<Cow<'_, str>> {
    let inner = quoted.get(1..quoted.len() - 1)?;
    match memchr::memchr(b'\\', inner) {
        None => std::str::from_utf8(inner).ok().map(Cow::Borrowed),
        Some(_) => serde_json::from_slice(quoted).ok().map(Cow::Owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(again: &mut Again, event: &str) -> bool {
        let raw = format!("data: {event}\n\n");
        again
            .admit(raw.as_bytes(), &Facts::of(raw.as_bytes(), 0))
            .is_ok()
    }

    fn text(text: &str, finish: &str) -> String {
        format!(r#"{{"choices":[{{"text":{text},"finish_reason":{finish}}}]}}"#)
    }

    #[test]
    fn text_is_compared_whatever_its_events() {
        // As other engines may write the same.
        let mut again = Again::of(r#"a \"\u00e9\ud83c\udfa8 b"#.as_bytes()).unwrap();
        for piece in [
            r#""a \"""#,
            r#""""#,
            "\"é🎨 \"",
            r#""b and more""#,
            r#""whatever""#,
        ] {
            assert!(admit(&mut again, &text(piece, "null")), "{piece}");
        }
        assert!(admit(&mut again, &text(r#""""#, r#""stop""#)));
    }

    #[test]
    fn another_text_is_no_text_of_ours() {
        for (piece, finish) in [
            (r#""ax""#, "null"),
            (r#""a""#, r#""stop""#),
            (r#""a\ud83c""#, "null"),
        ] {
            let mut again = Again::of(b"ab").unwrap();
            assert!(!admit(&mut again, &text(piece, finish)), "{piece}");
        }
        let mut again = Again::of(b"ab").unwrap();
        let reasoning = r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#;
        assert!(!admit(&mut again, reasoning));
        assert!(Again::of(b"\\ud83c").is_none(), "half a character");
    }
}
