//! One stream made of several: what came so far, where it may be cut, and how the next piece goes on. No IO.
//!
//! Token ids are kept as the engine wrote them, since they go back into a request as text. A stream may be cut behind
//! an event that brought text and one token, for only then was the text of all its tokens told (a token may be a piece
//! of a character, and of several the last may be one). With stop strings the text lags behind the tokens by as much as
//! the engine holds back; the cut is then behind an earlier event, and what is generated again and was delivered already
//! is left out.

use super::{
    budget::Held,
    cause::Cause,
    event::{Facts, characters, list_length},
    piece::{Again, Piece},
    recipe::{Asked, Way},
    rewrite::{self, Skip},
    told::{self, Kept, Told},
};
use crate::sse::Event;
use bytes::{Buf, Bytes, BytesMut};
use std::{collections::VecDeque, ops::Range};

/// What the text of a stream is at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Parsed {
    /// Plain content.
    #[default]
    Plain,
    /// Within reasoning.
    Reasoning,
    /// There were tool calls.
    Tools,
}

/// A place behind an event that brought text, and one token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Mark {
    /// Bytes of ids.
    ids: usize,
    tokens: usize,
    /// Characters that the engine had told.
    told: usize,
}

/// Where a stream will be cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cut {
    mark: Mark,
    /// Tokens that are kept.
    pub(super) tokens: usize,
    /// Tokens that the client has had, in part, and that will be generated again.
    pub(super) again_tokens: usize,
    /// Characters of their text that were delivered.
    pub(super) again_chars: usize,
    /// By these it is judged whether it is the same text: no ids were told.
    by_text: bool,
}

/// The state of one stream.
#[derive(Debug)]
pub(super) struct Splice {
    pub(super) asked: Asked,
    held: Held,
    /// Of a stream that tells no ids.
    pub(super) kept: Option<Kept>,
    /// Its ids are of a tokenizer of our own.
    pub(super) is_retold: bool,
    /// JSON of the first chunk up to its choices: id, model and the like.
    head: Vec<u8>,
    /// What stands between the brackets.
    pub(super) prompt_ids: Vec<u8>,
    /// Each with a comma behind it.
    ids: Vec<u8>,
    pub(super) tokens: usize,
    /// Why the ids are not complete.
    pub(super) untold: Option<&'static str>,
    /// The first one that may be cut at, if any, and those behind it.
    marks: VecDeque<Mark>,
    /// Reasoning was told behind the last of them.
    pub(super) reasoned_since: bool,
    /// Characters that the engines told, and that were delivered.
    told: usize,
    delivered: usize,
    pub(super) parsed: Parsed,
    /// Text, reasoning, a call or figures of a token were delivered.
    pub(super) began: bool,
    /// Figures of tokens were delivered.
    logprobs: bool,
    openings: usize,
    /// Choices whose reason was delivered.
    finishes: usize,
    usage_told: bool,
    pub(super) done: bool,
    /// Something was delivered that is no chunk of a known form.
    strange: bool,
    /// Nobody will take over: errors go on as they come.
    pub(super) settled: bool,
    piece: Piece,
}

impl Splice {
    pub(super) fn new(asked: Asked, held: Held) -> Self {
        Self {
            asked,
            held,
            kept: None,
            is_retold: false,
            head: Vec::new(),
            prompt_ids: Vec::new(),
            ids: Vec::new(),
            tokens: 0,
            untold: None,
            marks: VecDeque::new(),
            reasoned_since: false,
            told: 0,
            delivered: 0,
            parsed: Parsed::Plain,
            began: false,
            logprobs: false,
            openings: 0,
            finishes: 0,
            usage_told: false,
            done: false,
            strange: false,
            settled: false,
            piece: Piece {
                first: true,
                ..Piece::default()
            },
        }
    }

    /// Takes one event in and writes what the client gets of it. A cause: the event is not for the client, and the
    /// stream cannot go on here.
    pub(super) fn admit(&mut self, raw: &[u8], out: &mut BytesMut) -> Result<(), Cause> {
        let event = Event { raw };
        if event.is_done() {
            self.done = true;
            out.extend_from_slice(raw);
            return Ok(());
        }
        if !self.settled && !self.is_finished() && is_failure(&event) {
            return Err(Cause::Error(Bytes::copy_from_slice(raw)));
        }
        let facts = Facts::of(raw, self.known(raw));
        let Some(choices) = facts.choices else {
            self.strange |= !event.data().is_empty();
            out.extend_from_slice(raw);
            return Ok(());
        };
        let aborted = facts
            .finish
            .clone()
            .is_some_and(|at| raw[at] == *b"\"abort\"");
        if aborted && !self.settled {
            return Err(Cause::Aborted(Bytes::copy_from_slice(raw)));
        }
        if self.head.is_empty() {
            let start = memchr::memchr(b'{', raw).unwrap_or(choices);
            self.head = raw[start.min(choices)..choices].to_vec();
        }
        if self.piece.first {
            self.book(raw, &facts);
            if !self.is_silent(&facts) {
                self.copy(raw, &facts, out);
            }
            return Ok(());
        }
        self.admit_later(raw, &facts, out)
    }

    /// How much of an event is what every event of its piece begins with.
    fn known(&self, raw: &[u8]) -> usize {
        const FIELD: &[u8] = b"data: ";
        let rest = raw.strip_prefix(FIELD).unwrap_or_default();
        if !self.head.is_empty() && rest.starts_with(&self.head) {
            FIELD.len() + self.head.len()
        } else {
            0
        }
    }

    fn admit_later(&mut self, raw: &[u8], facts: &Facts, out: &mut BytesMut) -> Result<(), Cause> {
        if std::mem::take(&mut self.piece.unproven) && !self.is_our_prompt(raw, facts) {
            return Err(Cause::Unproven);
        }
        if facts.role && !facts.has_text() && self.piece.openings > 0 {
            self.piece.openings -= 1;
            return Ok(());
        }
        if self.piece.reasons {
            self.piece.reasons = !facts.reasoning;
            let told = facts.has_text() || facts.tools || facts.finish.is_some();
            if told && self.piece.reasons {
                return Err(Cause::Unproven);
            }
        }
        let skip = self.skip(raw, facts)?;
        self.book(raw, facts);
        if self.piece.compared && skip.tokens > 0 && (facts.tools || facts.reasoning) {
            // A parser made it of tokens that were told: all of it, or nobody knows what.
            let ids = facts.ids.clone().map_or(0, |ids| list_length(&raw[ids]));
            return if skip.tokens == ids {
                Ok(())
            } else {
                Err(Cause::Diverged)
            };
        }
        let usage = facts.usage && self.piece.before > 0;
        if self.piece.same_form && skip.is_nothing() && !usage {
            if !self.is_silent(facts) {
                self.copy(raw, facts, out);
            }
            return Ok(());
        }
        let form = rewrite::Form {
            head: &self.head,
            chat: self.asked.chat,
            ids: self.asked.ids,
        };
        // An event that cannot be read brings no token that could be told.
        rewrite::event(Event { raw }.data(), &form, &skip, out).ok_or(Cause::Diverged)
    }

    /// What of an event the client has had already.
    fn skip(&mut self, raw: &[u8], facts: &Facts) -> Result<Skip, Cause> {
        let piece = &mut self.piece;
        let mut tokens = 0;
        if piece.again_tokens > 0
            && let Some(ids) = &facts.ids
        {
            let ids = &raw[ids.clone()];
            tokens = list_length(ids).min(piece.again_tokens);
            let inner = &ids[1..ids.len() - 1];
            let bound = tokens * usize::from(piece.bound);
            for id in inner.split(|byte| *byte == b',').take(bound) {
                let told = next_id(&mut piece.again).ok_or(Cause::Diverged)?;
                if told.trim_ascii() != id.trim_ascii() {
                    return Err(Cause::Diverged);
                }
            }
            piece.again_tokens -= tokens;
        }
        if let Some(again) = &mut piece.again_text {
            again.admit(raw, facts)?;
        }
        Ok(Skip {
            tokens,
            chars: self.delivered - self.told.min(self.delivered),
            before: piece.before,
            offset: piece.offset,
        })
    }

    /// Whether the engine took the tokens that it was given.
    fn is_our_prompt(&self, raw: &[u8], facts: &Facts) -> bool {
        let Some(at) = &facts.prompt_ids else {
            return false;
        };
        let told = raw[at.start + 1..at.end - 1].split(|byte| *byte == b',');
        let kept = &self.ids[..self.ids.len().saturating_sub(1)];
        let ours = self.prompt_ids.split(|byte| *byte == b',');
        let ours = ours.chain(kept.split(|byte| *byte == b','));
        told.map(<[u8]>::trim_ascii)
            .eq(ours.map(<[u8]>::trim_ascii))
    }

    fn book(&mut self, raw: &[u8], facts: &Facts) {
        if let Some(at) = &facts.prompt_ids
            && self.prompt_ids.is_empty()
        {
            self.prompt_ids = raw[at.start + 1..at.end - 1].to_vec();
        }
        if let Some(at) = &facts.ids
            && facts.has_ids()
            && self.untold.is_none()
        {
            self.ids.extend_from_slice(&raw[at.start + 1..at.end - 1]);
            self.ids.push(b',');
            self.tokens += list_length(&raw[at.clone()]);
        }
        self.openings += usize::from(facts.role);
        self.logprobs |= facts.logprobs;
        let shown = facts.logprobs || self.asked.ids && facts.has_ids();
        self.began |= facts.tools || facts.reasoning || facts.finish.is_some() || shown;
        // What comes with each chunk is no account of the whole.
        self.usage_told |= facts.usage && facts.no_choices;
        self.finishes += usize::from(facts.finish.is_some());
        if facts.tools {
            self.parsed = Parsed::Tools;
        } else if facts.reasoning && self.parsed == Parsed::Plain {
            self.parsed = Parsed::Reasoning;
        }
        let ids = facts.ids.clone().map(|ids| list_length(&raw[ids]));
        if let Some(text) = facts.text.clone().filter(|_| facts.has_text()) {
            self.text(&raw[text], ids);
        } else if facts.reasoning && ids == Some(1) && self.untold.is_none() {
            self.mark();
        } else {
            self.reasoned_since |= facts.reasoning;
        }
        if self.kept.is_some() && (facts.tools || facts.reasoning) {
            // There were tokens whose text is not in the content.
            self.forget("no_token_ids");
        }
        if self.untold.is_none() && !self.held.grow(self.bytes()) {
            self.forget("memory");
        }
    }

    fn bytes(&self) -> usize {
        let kept = self.kept.as_ref().map_or(0, Kept::bytes);
        let again = self.piece.again_text.as_ref().map_or(0, Again::bytes);
        self.prompt_ids.len() + self.ids.len() + self.piece.again.len() + kept + again
    }

    /// Takes in the text of an event, which brought so many ids, if it told any.
    fn text(&mut self, quoted: &[u8], ids: Option<usize>) {
        self.began = true;
        // Also when no ids are held: a piece that runs may still have to leave out what was delivered.
        // Of a piece that tells again what was delivered, so many characters are no news.
        let known = self.delivered - self.told.min(self.delivered);
        self.told += characters(quoted);
        let news = self.told > self.delivered;
        self.delivered = self.delivered.max(self.told);
        if self.parsed == Parsed::Reasoning {
            self.parsed = Parsed::Plain;
        }
        if self.untold.is_some() {
            // Nothing is made of it but the last words of a stream that cannot go on.
            self.tokens += ids.unwrap_or(1);
            return;
        }
        if let (Some(kept), None) = (&mut self.kept, ids) {
            kept.take_in(quoted, known);
            // As good a guess as any.
            let reached = self.piece.reached;
            self.tokens = match news {
                true => self.tokens.max(reached) + 1,
                false => reached.min(self.tokens + 1),
            };
            return;
        }
        if ids.is_none() || self.prompt_ids.is_empty() {
            self.tokens += usize::from(ids.is_none());
            self.forget("no_token_ids");
            return;
        }
        if ids == Some(1) {
            self.mark();
        }
    }

    /// The stream may be cut here, now or soon.
    fn mark(&mut self) {
        self.reasoned_since = false;
        self.marks.push_back(Mark {
            ids: self.ids.len(),
            tokens: self.tokens,
            told: self.told,
        });
        while self.marks.len() > 1 && self.may_cut(&self.marks[1]) {
            self.marks.pop_front();
        }
    }

    /// Gives up what is held: the stream can only begin anew.
    pub(super) fn forget(&mut self, why: &'static str) {
        self.untold = Some(why);
        self.kept = None;
        self.ids = Vec::new();
        self.prompt_ids = Vec::new();
        self.marks.clear();
        self.held.clear();
    }

    /// Its engine tells no ids: its text is kept instead. Ids are made of it only if engines hold none of it back.
    pub(super) fn keep_text(&mut self, mut kept: Kept) {
        kept.retells &= self.asked.margin == 0;
        self.kept = Some(kept).filter(|kept| kept.retells || kept.compares);
    }

    /// Takes in the ids of prompt and text, as if the engine had told them. Gives what was kept instead.
    pub(super) fn retell(&mut self, told: &Told) -> Option<Kept> {
        let kept = self.kept.take();
        self.is_retold = true;
        self.prompt_ids = told::list(&told.prompt);
        self.prompt_ids.pop();
        self.ids = told::list(&told.ids);
        self.tokens = told.ids.len();
        self.marks = VecDeque::from([Mark {
            ids: self.ids.len(),
            tokens: self.tokens,
            told: self.told,
        }]);
        if !self.held.grow(self.bytes()) {
            self.forget("memory");
        }
        kept.map(|kept| kept.with(told.prompt.clone()))
    }

    /// It stays, and its engine tells no ids: what was kept is kept on.
    pub(super) fn untell(&mut self, kept: Kept) {
        self.is_retold = false;
        self.prompt_ids = Vec::new();
        self.ids = Vec::new();
        self.marks.clear();
        if self.untold.is_none() {
            self.kept = Some(kept);
        }
    }

    fn may_cut(&self, mark: &Mark) -> bool {
        mark.told + self.asked.margin <= self.delivered
    }

    /// Where the stream would be cut now.
    pub(super) fn cut(&self) -> Cut {
        let mark = self.marks.front().filter(|mark| self.may_cut(mark));
        let (mark, lag) = mark.map_or((Mark::default(), 0), |mark| (*mark, self.asked.lag));
        Cut {
            mark,
            tokens: mark.tokens,
            again_tokens: self.tokens - mark.tokens + self.piece.told_ahead(),
            again_chars: self.delivered.saturating_sub(mark.told + lag),
            by_text: false,
        }
    }

    /// Nothing is kept: all is generated again, and left out as far as it was delivered.
    pub(super) fn all_again(&self) -> Cut {
        Cut {
            again_tokens: self.tokens_told(),
            again_chars: self.delivered,
            ..Cut::default()
        }
    }

    /// The same by its text alone, if that is all there is of it; with `retold` only if no ids are to be made of that.
    pub(super) fn text_again(&self, retold: bool) -> Option<Cut> {
        let kept = self.kept.as_ref().filter(|kept| kept.compares)?;
        let shown = self.logprobs || retold && kept.retells;
        // What stands behind the choices is not rewritten.
        let named = memchr::memmem::find(&self.head, b"\"id\"").is_some();
        (!shown && named && kept.again().is_some()).then(|| Cut {
            again_chars: self.delivered,
            by_text: true,
            ..Cut::default()
        })
    }

    /// Whether the engine that runs now has told a token.
    pub(super) fn has_progressed(&self) -> bool {
        self.tokens > self.piece.before
    }

    /// Tokens that the client has had, whether or not the engine that runs now has got as far.
    pub(super) fn tokens_told(&self) -> usize {
        self.tokens + self.piece.told_ahead()
    }

    /// Prompt and kept tokens as the inside of a list.
    pub(super) fn sequence(&self, cut: &Cut) -> Vec<u8> {
        let mut all = self.prompt_ids.clone();
        let kept = &self.ids[..cut.mark.ids.saturating_sub(1)];
        if !kept.is_empty() {
            all.push(b',');
            all.extend_from_slice(kept);
        }
        all
    }

    /// The rest comes from a new piece.
    pub(super) fn go_on(&mut self, cut: &Cut, way: Way) {
        let reached = self.piece.reached.max(self.tokens);
        let mut again = self.ids.split_off(cut.mark.ids.min(self.ids.len()));
        if self.piece.told_ahead() > 0 {
            again.extend_from_slice(&self.piece.again);
        }
        self.tokens = cut.tokens;
        self.marks.truncate(usize::from(cut.tokens > 0));
        let text_before = self.delivered - cut.again_chars;
        let by_text = self.kept.as_ref().filter(|_| cut.by_text);
        self.told = text_before;
        self.piece = Piece {
            first: false,
            same_form: way != Way::Completions || !self.asked.chat,
            before: if way == Way::Restart { 0 } else { cut.tokens },
            offset: text_before,
            again: again.into(),
            again_tokens: cut.again_tokens,
            again_text: by_text.and_then(Kept::again),
            reached,
            bound: self.asked.ids
                || self.logprobs
                || cut.again_chars > 0
                || way == Way::Restart && self.began,
            compared: way == Way::Restart && self.began,
            reasons: way == Way::Entrance && self.parsed == Parsed::Reasoning,
            openings: self.openings,
            unproven: way == Way::Entrance,
        };
    }

    /// The client has had everything but the last words.
    pub(super) fn is_finished(&self) -> bool {
        self.finishes >= self.asked.choices.max(1)
    }

    /// Whether a clean end is the end, as far as can be told.
    pub(super) fn may_end(&self) -> bool {
        self.done || self.settled || self.strange
    }

    /// Whether what was delivered is not understood.
    pub(super) fn is_strange(&self) -> bool {
        self.strange
    }

    /// What comes can no longer be looked at.
    pub(super) fn pass_through(&mut self) {
        self.strange = true;
        self.forget("event_too_long");
    }

    /// A chunk that vLLM only sends to those who ask for ids: its parser made nothing of a token. Without a parser it
    /// sends `"content":""` to everybody, and figures of tokens whatever the parser says.
    fn is_silent(&self, facts: &Facts) -> bool {
        let tells = facts.text.is_some()
            || facts.logprobs
            || facts.role
            || facts.tools
            || facts.reasoning
            || facts.finish.is_some();
        self.asked.chat && !self.asked.ids && facts.ids.is_some() && !tells
    }

    /// Writes a chunk as it came, but for its head and the ids that nobody asked for.
    fn copy(&self, raw: &[u8], facts: &Facts, out: &mut BytesMut) {
        let mut from = 0;
        if let (false, Some(choices)) = (self.piece.first, facts.choices) {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(&self.head);
            from = choices;
        }
        let hide = |at: &Option<Range<usize>>, hidden: bool| at.clone().filter(|_| hidden);
        let (one, two) = (
            hide(&facts.ids, !self.asked.ids),
            hide(&facts.prompt_ids, !self.asked.ids || !self.piece.first),
        );
        let swapped = matches!((&one, &two), (Some(one), Some(two)) if one.start > two.start);
        let pair = if swapped { [two, one] } else { [one, two] };
        for at in pair.into_iter().flatten() {
            if at.start < from {
                continue;
            }
            out.extend_from_slice(&raw[from..at.start]);
            out.extend_from_slice(b"null");
            from = at.end;
        }
        out.extend_from_slice(&raw[from..]);
    }

    /// The last events of a stream whose text was whole when it broke; false if they cannot be known.
    pub(super) fn complete(&mut self, out: &mut BytesMut) -> bool {
        if self.asked.usage && !self.usage_told {
            if self.untold.is_some() || self.prompt_ids.is_empty() {
                return false;
            }
            let prompt = 1 + memchr::memchr_iter(b',', &self.prompt_ids).count();
            let (made, all) = (self.tokens, self.tokens + prompt);
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(&self.head);
            let usage = format!(
                "\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{all},\"completion_tokens\":{made}}}}}\n\n"
            );
            out.extend_from_slice(usage.as_bytes());
        }
        if !self.done {
            out.extend_from_slice(b"data: [DONE]\n\n");
        }
        self.done = true;
        true
    }
}

/// Takes the first of ids that each have a comma behind them.
fn next_id(ids: &mut Bytes) -> Option<Bytes> {
    let comma = memchr::memchr(b',', ids)?;
    let id = ids.split_to(comma);
    ids.advance(1);
    Some(id)
}

/// Whether an event says that the engine failed, rather than that the request is wrong.
fn is_failure(event: &Event<'_>) -> bool {
    event.is_error() && !event.blames_request()
}
