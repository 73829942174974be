//! Answers "which prompt is this conversation": ChatML, written out in plain Rust.
//!
//! `assets/chat_template.jinja` says the same for those who render templates; a test holds both together. It
//! leaves tools out, as the template behind the recordings does; media are refused before they get here.

/// The chat template as it is written into a model directory.
pub const CHAT_TEMPLATE: &str = include_str!("../../assets/chat_template.jinja");
/// `tokenizer_config.json` of a model directory.
pub(crate) const TOKENIZER_CONFIG: &str = include_str!("../../assets/tokenizer_config.json");
/// `config.json` of a model directory.
pub(crate) const MODEL_CONFIG: &str = include_str!("../../assets/config.json");

const DEFAULT_SYSTEM: &str =
    "You are a helpful assistant made of tokens, and every answer is simulated.";

/// One message of a conversation, its content flattened to text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or whatever the client wrote.
    pub role: String,
    /// The text.
    pub content: String,
}

/// How a conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Opens the assistant's turn (`add_generation_prompt`).
    GenerationPrompt,
    /// Leaves the last message open, to be continued (`continue_final_message`).
    ContinueFinal,
    /// Ends behind the last message.
    Closed,
}

/// The prompt's text.
pub fn render(messages: &[Message], ending: Ending) -> String {
    let mut out = String::new();
    if messages.first().is_some_and(|first| first.role != "system") {
        push_message(&mut out, "system", DEFAULT_SYSTEM);
    }
    for message in messages {
        push_message(&mut out, &message.role, &message.content);
    }
    match ending {
        Ending::GenerationPrompt => out.push_str("<|im_start|>assistant\n"),
        Ending::ContinueFinal => out.truncate(out.len() - "<|im_end|>\n".len()),
        Ending::Closed => {}
    }
    out
}

fn push_message(out: &mut String, role: &str, content: &str) {
    for part in ["<|im_start|>", role, "\n", content, "<|im_end|>\n"] {
        out.push_str(part);
    }
}
