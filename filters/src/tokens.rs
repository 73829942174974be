//! Prompt to token ids: exactly as the engine will see them, or not at all.
//!
//! What it answers: the ids of a request's prompt, from the cheapest source that gives exactly the engine's own:
//! ids in the request, a local tokenizer verified against the engine, the engine's `render`, its `tokenize`. What it
//! does not do: guess. Where no source is exact it says why, and the caller routes by something else.

use std::time::Duration;

/// Limits and switches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizersConfig {
    /// Use tokenizers found on this machine. Default on.
    pub local: bool,
    /// Ask engines. Default on.
    pub engines: bool,
    /// Most bytes of text and ids that one local tokenizer keeps of earlier segments. Default 64 MiB.
    pub segment_cache_bytes_max: usize,
    /// Most bytes of ids kept of engines' answers. Default 32 MiB.
    pub answer_cache_bytes_max: usize,
    /// Prompts of at most so many bytes are tokenised on the request's thread. Default 4 KiB.
    pub inline_bytes_max: usize,
    /// Longest wait for an engine's answer. Default 2 s.
    pub engine_timeout: Duration,
    /// How long an engine that refused (403, 404) is not asked again. Default 60 s.
    pub reprobe_after: Duration,
}

impl Default for TokenizersConfig {
    fn default() -> Self {
        Self {
            local: true,
            engines: true,
            segment_cache_bytes_max: 64 << 20,
            answer_cache_bytes_max: 32 << 20,
            inline_bytes_max: 4 << 10,
            engine_timeout: Duration::from_secs(2),
            reprobe_after: Duration::from_secs(60),
        }
    }
}

/// Every tokenizer this proxy has come to know.
pub struct Tokenizers {
    config: TokenizersConfig,
}

impl Tokenizers {
    /// None yet; they are found by the engines' models.
    #[must_use]
    pub fn new(config: TokenizersConfig) -> Self {
        Self { config }
    }

    /// The limits in force.
    #[must_use]
    pub fn config(&self) -> &TokenizersConfig {
        &self.config
    }
}
