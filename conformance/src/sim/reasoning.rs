//! Answers "is this still reasoning": a parser that takes the beginning of an answer for it.
//!
//! Nothing was recorded. As the parsers of vLLM that look for a closing mark alone, it knows from the prompt how far the answer
//! is; here the place of the mark is given, and its token is told as nothing. Whole answers are not parsed.

use super::engine::Engine;

/// What a token is of its answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Reasoning,
    Mark,
    Content,
}

/// How far the answer is in its prompt, and how far it is reasoning.
pub(crate) struct Reasoning {
    tokens: usize,
    before: usize,
}

impl Reasoning {
    pub(crate) fn of(engine: &Engine, prompt: &[u32]) -> Self {
        let header = engine.tokenizer.encode("<|im_start|>assistant\n");
        let begins = prompt
            .windows(header.len())
            .rposition(|tokens| tokens == header);
        Self {
            tokens: engine.config.reasoning_tokens,
            before: begins.map_or(0, |at| prompt.len() - at - header.len()),
        }
    }

    /// What the token is that was made as such.
    pub(crate) fn part(&self, number: usize) -> Part {
        match (self.before + number).cmp(&(self.tokens + 1)) {
            _ if self.tokens == 0 => Part::Content,
            std::cmp::Ordering::Less => Part::Reasoning,
            std::cmp::Ordering::Equal => Part::Mark,
            std::cmp::Ordering::Greater => Part::Content,
        }
    }
}
