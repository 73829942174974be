//! What the demo's clients say: conversations that grow turn by turn, in groups that share a system prompt, as users of
//! one application do. Deterministic by seed; sends nothing.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

/// The model that the demo's engines serve.
pub(super) const MODEL: &str = "sim";
/// Different system prompts.
const GROUPS: usize = 4;
/// Length of a system prompt, and of what a user says, in words.
const SYSTEM_WORDS: usize = 90;
const USER_WORDS: usize = 35;
const WORDS: &[&str] = &[
    "the", "of", "and", "request", "that", "system", "user", "answer", "please", "summary",
    "river", "mountain", "with", "for", "each", "token", "cache", "section", "history", "result",
    "number", "light", "paper", "engine", "garden", "about", "which", "there", "morning",
    "station", "letter", "window", "bridge", "winter", "harbour", "lantern", "sail", "island",
];

/// `count` words.
pub(super) fn prose(rng: &mut StdRng, count: usize) -> String {
    let word = |_| WORDS.choose(rng).copied().unwrap_or_default();
    (0..count).map(word).collect::<Vec<_>>().join(" ")
}

/// One generation to be asked for.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) path: &'static str,
    pub(super) body: Value,
}

/// How a client speaks.
enum Form {
    /// Chat: the messages so far.
    Chat(Vec<Value>),
    /// Completions: the text so far.
    Text(String),
}

/// A client's conversation.
pub(super) struct Conversation {
    form: Form,
    rng: StdRng,
    max_tokens: u32,
}

impl Conversation {
    /// The `number`th conversation of a mix. Every fourth speaks completions.
    pub(super) fn new(seed: u64, number: usize, max_tokens: u32) -> Self {
        let group = number % GROUPS;
        let mut of_group = StdRng::seed_from_u64(seed ^ ((group as u64 + 1) << 32));
        let system = format!(
            "You answer in few words. Topic {group}: {}.",
            prose(&mut of_group, SYSTEM_WORDS)
        );
        let form = if number % 4 == 3 {
            Form::Text(system)
        } else {
            Form::Chat(vec![json!({"role": "system", "content": system})])
        };
        Self {
            form,
            rng: StdRng::seed_from_u64(seed.wrapping_add(number as u64)),
            max_tokens,
        }
    }

    /// The client's next turn, streamed or not as it likes, unless it is told to.
    pub(super) fn next(&mut self, always_stream: bool) -> Ask {
        let line = prose(&mut self.rng, USER_WORDS);
        let stream = self.rng.random_bool(0.5) || always_stream;
        let mut body = json!({
            "model": MODEL, "temperature": 0, "max_tokens": self.max_tokens, "stream": stream, "return_token_ids": true,
        });
        if stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        let path = match &mut self.form {
            Form::Chat(messages) => {
                messages.push(json!({"role": "user", "content": line}));
                body["messages"] = Value::from(messages.clone());
                "/v1/chat/completions"
            }
            Form::Text(text) => {
                text.push_str(&format!("\nQ: {line}\nA:"));
                body["prompt"] = Value::from(text.clone());
                "/v1/completions"
            }
        };
        Ask { path, body }
    }

    /// What was answered becomes part of the conversation.
    pub(super) fn answered(&mut self, answer: &str) {
        match &mut self.form {
            Form::Chat(messages) => messages.push(json!({"role": "assistant", "content": answer})),
            Form::Text(text) => text.push_str(answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_begins_with_all_that_was_said() {
        for number in [0, 3] {
            let mut conversation = Conversation::new(1, number, 8);
            let said = |ask: &Ask| match &ask.body["prompt"] {
                Value::String(text) => text.clone(),
                _ => ask.body["messages"]
                    .to_string()
                    .trim_end_matches(']')
                    .to_owned(),
            };
            let first = said(&conversation.next(false));
            conversation.answered("certainly");
            let second = said(&conversation.next(false));
            assert!(
                second.starts_with(&first) && second[first.len()..].contains("certainly"),
                "{second}"
            );
        }
    }

    #[test]
    fn a_seed_says_everything_and_groups_share_their_system_prompt() {
        let ask = |seed, number| Conversation::new(seed, number, 8).next(true).body;
        assert_eq!(ask(1, 2), ask(1, 2));
        assert_ne!(ask(1, 2)["messages"], ask(2, 2)["messages"]);
        assert_eq!(ask(1, 0)["messages"][0], ask(1, 4)["messages"][0]);
        assert_ne!(ask(1, 0)["messages"][1], ask(1, 4)["messages"][1]);
        assert_ne!(ask(1, 0)["messages"][0], ask(1, 1)["messages"][0]);
    }
}
