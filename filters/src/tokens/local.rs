//! A model's own tokenizer and chat template, run here.
//!
//! What it does not do: decide whether its answer is to be trusted (see [`super::verify`]).

use super::template::{ChatTemplate, SpecialTokens};
use crate::openai::{Api, OpenAiRequest, Prompt};
use fastokens::Tokenizer;
use minijinja::Value;
use serde::Deserialize;
use std::{borrow::Cow, collections::HashMap, path::Path};

/// How a request is tokenised here. Each kind is verified on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string.
    Text,
    /// Messages of text.
    Chat,
    /// Messages with tools, their calls or results.
    Tools,
}

impl Kind {
    pub(super) const COUNT: usize = 3;

    /// The kind of a request; `None` for what only an engine can do.
    pub(super) fn of(request: &OpenAiRequest) -> Option<Self> {
        let spans = &request.spans;
        let flags = &request.flags;
        let templated = spans.chat_template.is_some()
            || spans.documents.is_some()
            || spans.reasoning_effort.is_some();
        if flags.opaque || templated || flags.continue_final_message == Some(true) {
            return None;
        }
        match (request.api, request.prompt) {
            (Api::Completions | Api::Generate, Prompt::Text) => Some(Self::Text),
            (Api::Chat, Prompt::Messages) if flags.add_special_tokens == Some(true) => None,
            (Api::Chat, Prompt::Messages) => {
                let messages = request.raw(spans.prompt.as_ref())?;
                let tools = spans.tools.is_some()
                    || [
                        &b"\"tool_calls\""[..],
                        b"\"tool_call_id\"",
                        b"\"function_call\"",
                    ]
                    .iter()
                    .any(|key| memchr::memmem::find(messages.as_bytes(), key).is_some());
                let choice = request.raw(spans.tool_choice.as_ref());
                match (tools, choice) {
                    (false, _) => Some(Self::Chat),
                    (true, None | Some("\"auto\"")) => Some(Self::Tools),
                    // Engines differ in what a forced or forbidden tool does to the prompt.
                    (true, Some(_)) => None,
                }
            }
            (Api::Messages, Prompt::Messages) if spans.tools.is_none() => Some(Self::Chat),
            _ => None,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Chat => "chat",
            Self::Tools => "tools",
        }
    }
}

/// A model's files, read.
pub(super) struct LocalModel {
    pub(super) tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

/// The part of `tokenizer_config.json` that matters.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    pad_token: Option<Token>,
    unk_token: Option<Token>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

impl LocalModel {
    /// Reads `tokenizer.json` and the chat template (`chat_template.jinja`, else the one in `tokenizer_config.json`).
    pub(super) fn load(directory: &Path, segment_cache_bytes_max: usize) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_file(&directory.join("tokenizer.json"))
            .map_err(|error| error.to_string())?;
        // An engine pads and truncates by its own rules, not by what was left in the file.
        tokenizer.set_padding(None);
        tokenizer.set_truncation(None);
        tokenizer.enable_segment_cache(segment_cache_bytes_max);
        let template = read_template(directory)?;
        // The first call builds tables, which takes some ms.
        tokenizer
            .encode("warm up")
            .map_err(|error| error.to_string())?;
        Ok(Self {
            tokenizer,
            template,
        })
    }

    /// The ids of a request's prompt. An error means "not here": the engine may still know.
    pub(super) fn encode(&self, request: &OpenAiRequest, kind: Kind) -> Result<Vec<u32>, String> {
        let raw = request
            .raw(request.spans.prompt.as_ref())
            .ok_or("no prompt")?;
        if kind == Kind::Text {
            let text = text(raw)?;
            let special = request.flags.add_special_tokens.unwrap_or(true);
            return self
                .tokenizer
                .encode_with_special_tokens(&text, special)
                .map_err(|error| error.to_string());
        }
        let rendered = self.render(request, raw)?;
        self.tokenizer
            .encode_with_special_tokens(&rendered, false)
            .map_err(|error| error.to_string())
    }

    fn render(&self, request: &OpenAiRequest, messages: &str) -> Result<String, String> {
        let template = self
            .template
            .as_ref()
            .ok_or("the model has no chat template")?;
        let mut messages: Vec<Message<'_>> =
            serde_json::from_str(messages).map_err(|error| error.to_string())?;
        if let Some(system) = request.raw(request.spans.system.as_ref()) {
            messages.insert(0, Message::system(system)?);
        }
        let anthropic = request.api == Api::Messages;
        let messages: Result<Vec<Value>, String> = messages
            .into_iter()
            .map(|message| message.value(anthropic))
            .collect();
        let parse = |raw: Option<&str>| match raw {
            Some(raw) => serde_json::from_str::<Value>(raw).map_err(|error| error.to_string()),
            None => Ok(Value::from(())),
        };
        let tools = parse(request.raw(request.spans.tools.as_ref()))?;
        let more: HashMap<String, Value> =
            match request.raw(request.spans.chat_template_kwargs.as_ref()) {
                Some(raw) => serde_json::from_str(raw).map_err(|error| error.to_string())?,
                None => HashMap::new(),
            };
        let more: Vec<(String, Value)> = more.into_iter().collect();
        let prompt = request.flags.add_generation_prompt.unwrap_or(true);
        template
            .render(&Value::from(messages?), &tools, prompt, &more)
            .map_err(|error| error.to_string())
    }
}

/// A string, or a list of one string.
fn text(raw: &str) -> Result<String, String> {
    let one = serde_json::from_str::<String>(raw);
    one.or_else(|_| serde_json::from_str::<[String; 1]>(raw).map(|[text]| text))
        .map_err(|error| error.to_string())
}

fn read_template(directory: &Path) -> Result<Option<ChatTemplate>, String> {
    let config = match std::fs::read(directory.join("tokenizer_config.json")) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| format!("tokenizer_config.json: {error}"))?,
        Err(_) => TokenizerConfig::default(),
    };
    let source = std::fs::read_to_string(directory.join("chat_template.jinja"))
        .ok()
        .or(match config.chat_template {
            Some(Templates::One(source)) => Some(source),
            Some(Templates::Named(all)) => all
                .into_iter()
                .find(|one| one.name == "default")
                .map(|one| one.template),
            None => None,
        });
    let Some(source) = source else {
        return Ok(None);
    };
    let token = |token: Option<Token>| token.map(Token::text);
    let tokens = SpecialTokens {
        bos: token(config.bos_token),
        eos: token(config.eos_token),
        pad: token(config.pad_token),
        unk: token(config.unk_token),
    };
    ChatTemplate::new(source, tokens)
        .map(Some)
        .map_err(|error| format!("chat template: {error}"))
}

/// A message as far as we know how the engines prepare it; anything else fails and goes to the engine.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow, default)]
    content: Content<'a>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tool_call_id: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
}

#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Content<'a> {
    #[default]
    Null,
    Text(#[serde(borrow)] Cow<'a, str>),
    Parts(#[serde(borrow)] [Part<'a>; 1]),
}

/// One part of text is the same as a string, under either of the formats that templates come in. Of several parts the
/// engine decides how they are joined.
#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    text: Cow<'a, str>,
}

#[derive(Deserialize)]
struct ToolCall {
    #[serde(default)]
    id: Option<String>,
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    arguments: Option<String>,
}

impl<'a> Message<'a> {
    /// Anthropic's `system`.
    fn system(raw: &'a str) -> Result<Self, String> {
        let content: Content<'a> = serde_json::from_str(raw).map_err(|error| error.to_string())?;
        if matches!(&content, Content::Text(text) if text.starts_with("x-anthropic")) {
            return Err("the engine strips client attribution from the system prompt".into());
        }
        Ok(Self {
            role: "system".into(),
            content,
            name: None,
            tool_call_id: None,
            tool_calls: None,
        })
    }

    fn value(self, anthropic: bool) -> Result<Value, String> {
        let known = if anthropic {
            &["system", "user", "assistant"][..]
        } else {
            &["system", "user", "assistant", "tool"]
        };
        if !known.contains(&&*self.role) || self.name.is_some() {
            return Err(format!("role {} or a name", self.role));
        }
        let content = match self.content {
            Content::Null => Value::from(()),
            Content::Text(text) => Value::from(text.as_ref()),
            Content::Parts([part]) if part.r#type == "text" => Value::from(part.text.as_ref()),
            Content::Parts(_) => return Err("content that is no text".into()),
        };
        let mut pairs = vec![
            ("role", Value::from(self.role.as_ref())),
            ("content", content),
        ];
        if let Some(calls) = self.tool_calls {
            let calls: Result<Vec<Value>, String> =
                calls.into_iter().map(ToolCall::value).collect();
            pairs.push(("tool_calls", Value::from(calls?)));
        }
        if let Some(id) = self.tool_call_id {
            pairs.push(("tool_call_id", Value::from(id)));
        }
        Ok(pairs.into_iter().collect())
    }
}

impl ToolCall {
    /// Engines hand templates the arguments as an object, though clients send them as a string.
    fn value(self) -> Result<Value, String> {
        let arguments: Value = match self.function.arguments.as_deref() {
            None | Some("") => Value::from_iter::<[(String, Value); 0]>([]),
            Some(text) => serde_json::from_str(text).map_err(|error| error.to_string())?,
        };
        let function: Value = [
            ("name", Value::from(self.function.name)),
            ("arguments", arguments),
        ]
        .into_iter()
        .collect();
        let mut pairs = vec![("type", Value::from("function")), ("function", function)];
        if let Some(id) = self.id {
            pairs.insert(0, ("id", Value::from(id)));
        }
        Ok(pairs.into_iter().collect())
    }
}
