//! How a request has its tokens chosen, as far as that decides whether they can be chosen again.

use super::parse::{Text, is_set, lenient};
use serde::Deserialize;

/// Output bound to a grammar, whose state no engine tells.
pub(crate) const GUIDED: [&str; 9] = [
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
];
/// Other states that no engine tells, and what they are called in metrics.
pub(crate) const STATES: [(&str, &str); 6] = [
    ("logits_processors", "logit_state"),
    ("vllm_xargs", "logit_state"),
    ("custom_logit_processor", "logit_state"),
    // Words of several tokens are looked for in the output alone.
    ("bad_words", "logit_state"),
    // How much text it holds back is not known.
    ("stop_regex", "stop"),
    ("thinking_token_budget", "thinking_budget"),
];
/// Penalties that count the output alone. (Repetition penalties count the prompt, too, and lose nothing.)
pub(crate) const PENALTIES: [&str; 2] = ["presence_penalty", "frequency_penalty"];

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sampling {
    /// Always the likeliest: `temperature` is 0.
    pub greedy: bool,
    /// By a state that only the engine knows: guided output, a forced tool, logits processors and the like.
    pub stateful: bool,
    /// With presence or frequency penalties.
    pub penalties: bool,
    /// They may make a tool call.
    pub may_call: bool,
    /// Their figures are shown.
    pub logprobs: bool,
}

impl Sampling {
    /// Takes in one field of a request.
    pub(super) fn set(&mut self, key: &str, raw: &str) {
        let number = || lenient::<f64>(raw);
        match key {
            "temperature" => self.greedy = number() == Some(0.0),
            "logprobs" => self.logprobs = is_set(raw),
            "response_format" => self.stateful |= is_format(raw),
            _ if PENALTIES.contains(&key) => {
                self.penalties |= number().is_some_and(|number| number != 0.0);
            }
            _ if GUIDED.contains(&key) || STATES.iter().any(|(name, _)| *name == key) => {
                self.stateful |= is_set(raw);
            }
            _ => {}
        }
    }

    /// Takes in what is known once all fields are.
    pub(super) fn complete(&mut self, tools: Option<&str>, choice: Option<&str>) {
        let choice = choice.unwrap_or("null");
        self.may_call = tools.is_some_and(is_set) && choice != "\"none\"";
        self.stateful |= !matches!(choice, "null" | "\"none\"" | "\"auto\"");
    }
}

/// Whether a `response_format` asks for more than text.
fn is_format(raw: &str) -> bool {
    #[derive(Deserialize)]
    struct Format<'a> {
        #[serde(borrow)]
        r#type: Text<'a>,
    }
    lenient::<Format<'_>>(raw).is_some_and(|format| format.r#type.0 != "text")
}
