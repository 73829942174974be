//! Answers `/v1/responses`: one answer of text, whole or streamed, as the two recordings show it.
//!
//! What becomes of a response that is stored is in [`super::stored`]. Items other than messages, tools,
//! reasoning and text formats are refused with 501.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::api::{self, ApiError, Fields, Flight, Tally, to_json};
use super::engine::{Engine, unix_s};
use super::feed::{Events, Feed, Writer};
use super::http::{Piece, Request, Response};
use super::scheduler::{Finish, Output, Sampling};
use super::stored::{self, Running, Stored};
use super::template::{Ending, Message, render};

/// Fields whose effect on an answer is not recorded.
const REFUSED: &[&str] = &[
    "include",
    "max_tool_calls",
    "previous_input_messages",
    "prompt",
    "reasoning",
    "text",
    "top_logprobs",
];

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    created_at: u64,
    incomplete_details: Option<Incomplete>,
    instructions: Option<&'a str>,
    metadata: Option<&'a Value>,
    model: &'a str,
    object: &'static str,
    output: Vec<Item<'a>>,
    parallel_tool_calls: bool,
    temperature: f64,
    tool_choice: &'static str,
    tools: [(); 0],
    top_p: f64,
    background: bool,
    max_output_tokens: usize,
    max_tool_calls: Option<()>,
    previous_response_id: Option<&'a str>,
    prompt: Option<()>,
    reasoning: Option<()>,
    service_tier: &'a str,
    status: &'static str,
    text: Option<()>,
    top_logprobs: Option<()>,
    truncation: &'a str,
    usage: Option<ResponseUsage>,
    user: Option<&'a str>,
    presence_penalty: f64,
    frequency_penalty: f64,
    kv_transfer_params: Option<()>,
    ec_transfer_params: Option<()>,
    input_messages: Option<()>,
    output_messages: Option<()>,
}

#[derive(Serialize)]
struct Incomplete {
    reason: &'static str,
}

#[derive(Serialize)]
struct Item<'a> {
    id: &'a str,
    content: Vec<Part<'a>>,
    role: &'static str,
    status: &'static str,
    r#type: &'static str,
    phase: Option<()>,
}

#[derive(Serialize)]
struct Part<'a> {
    annotations: [(); 0],
    text: &'a str,
    r#type: &'static str,
    /// `[]` while the part is written, `null` afterwards.
    logprobs: Option<[(); 0]>,
}

#[derive(Serialize)]
struct ResponseUsage {
    input_tokens: usize,
    input_tokens_details: InputDetails,
    output_tokens: usize,
    output_tokens_details: OutputDetails,
    total_tokens: usize,
}

#[derive(Serialize)]
struct InputDetails {
    cached_tokens: usize,
    cache_write_tokens: usize,
    input_tokens_per_turn: [(); 0],
    cached_tokens_per_turn: [(); 0],
}

#[derive(Serialize)]
struct OutputDetails {
    reasoning_tokens: usize,
    tool_output_tokens: usize,
    output_tokens_per_turn: [(); 0],
    tool_output_tokens_per_turn: [(); 0],
}

/// Any event: its fields stand in the order of their names, and `type` is the last.
#[derive(Default, Serialize)]
struct Event<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    item: Option<Item<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    item_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<[(); 0]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<Part<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<Whole<'a>>,
    sequence_number: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    r#type: &'static str,
}

/// How far a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    Begun,
    Cancelled,
    Failed,
    Done,
}

/// A request, read and checked, and what became of it so far.
struct Answer {
    engine: Arc<Engine>,
    fields: Fields,
    /// What it answers.
    conversation: Vec<Message>,
    /// Whether it is kept.
    stored: bool,
    sampling: Sampling,
    id: String,
    message_id: String,
    created_at: u64,
    tally: Tally,
    text: String,
    finish: Option<Finish>,
}

fn read_input(engine: &Engine, fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let mut messages = Vec::new();
    if let Some(instructions) = api::text(fields, "instructions") {
        messages.push(message("system", instructions));
    }
    if let Some(previous) = api::text(fields, "previous_response_id") {
        let conversation = engine.responses.conversation(previous)?;
        let instructed = |message: &Message| message.role == "system";
        messages.extend(conversation.into_iter().filter(|old| !instructed(old)));
    }
    match fields.get("input") {
        None => return Err(ApiError::missing("input", fields)),
        Some(Value::String(text)) => messages.push(message("user", text)),
        Some(Value::Array(items)) => {
            for item in items {
                let content = read_item(item)
                    .ok_or_else(|| ApiError::not_implemented("input other than text messages"))?;
                let role = item["role"].as_str().unwrap_or("user");
                messages.push(message(role, &content));
            }
        }
        Some(_) => return Err(ApiError::wrong_type("input", "string")),
    }
    Ok(messages)
}

/// The text of a message; `None` if the item is none, or holds more than text.
fn read_item(item: &Value) -> Option<String> {
    if item.get("type").is_some_and(|kind| kind != "message") {
        return None;
    }
    match &item["content"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let part = |part: &Value| match part["type"].as_str() {
                Some("input_text" | "output_text") => part["text"].as_str().map(str::to_owned),
                _ => None,
            };
            let parts: Vec<String> = parts.iter().map(part).collect::<Option<_>>()?;
            Some(parts.join("\n"))
        }
        _ => None,
    }
}

/// The tokens of the prompt, and how to go on.
fn read(engine: &Engine, fields: &Fields) -> Result<(Vec<Message>, Vec<u32>, Sampling), ApiError> {
    if !fields.contains_key("input") {
        return Err(ApiError::missing("input", fields));
    }
    api::check_model(engine, fields)?;
    check_store(engine, fields)?;
    let messages = read_input(engine, fields)?;
    api::check_simulated(fields, &[])?;
    for name in REFUSED {
        let given = fields.get(*name).unwrap_or(&Value::Null);
        let says_nothing = [Value::Null, Value::Bool(false), Value::Array(Vec::new())];
        if !says_nothing.contains(given) {
            return Err(ApiError::not_implemented(&format!(
                "{name} of /v1/responses"
            )));
        }
    }
    let prompt = render(&messages, Ending::GenerationPrompt);
    let prompt = engine.tokenizer.encode(&prompt);
    let wanted = api::integer(fields, "max_output_tokens")?;
    let sampling = api::read_sampling(engine, fields, wanted, prompt.len())?;
    Ok((messages, prompt, sampling))
}

fn check_store(engine: &Engine, fields: &Fields) -> Result<(), ApiError> {
    if !api::flag(fields, "background") {
        return Ok(());
    }
    if !api::flag_or(fields, "store", true) {
        let message = "background can only be used when `store` is true";
        return Err(ApiError::value(message, "background", true));
    }
    if !engine.config.responses_store {
        let message = "This vLLM engine does not support `store=True` and therefore does not support the background mode. To enable these features, set the environment variable `VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server.";
        return Err(stored::refusal(400, message, "background"));
    }
    Ok(())
}

/// `POST /v1/responses`.
pub(crate) async fn responses(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, Response> {
    let fields = api::read_fields(request)?;
    let (conversation, prompt, sampling) = read(engine, &fields)?;
    let flight = Flight::begin(engine, request, &fields, "resp")?;
    let id = api::text(&fields, "request_id");
    let mut answer = Answer {
        engine: Arc::clone(engine),
        conversation,
        stored: engine.config.responses_store && api::flag_or(&fields, "store", true),
        sampling: sampling.clone(),
        id: id.map_or_else(|| format!("resp_{}", engine.made_up_id()), str::to_owned),
        message_id: format!("msg_{}", engine.made_up_id()),
        created_at: unix_s() as u64,
        tally: Tally {
            prompt_tokens: prompt.len(),
            ..Tally::default()
        },
        text: String::new(),
        finish: None,
        fields,
    };
    let salt = api::text(&answer.fields, "cache_salt");
    let generation = engine.generate(vec![(prompt, sampling)], salt);
    let mut feed = Feed::new(engine, generation, flight);
    if api::flag(&answer.fields, "background") {
        return Ok(in_background(answer, feed));
    }
    if api::flag(&answer.fields, "stream") {
        return Ok(Response::events(
            feed.into_stream(ResponseWriter::new(answer)),
        ));
    }
    for output in feed.collect(1).await?.remove(0) {
        answer.take(output);
    }
    answer.keep(Stage::Done);
    Ok(Response::json(200, to_json(&answer.whole(Stage::Done))))
}

/// Goes on without its client, who gets the stream of it, or that it is queued.
fn in_background(answer: Answer, feed: Feed) -> Response {
    let engine = Arc::clone(&answer.engine);
    let id = answer.id.clone();
    engine.responses.begin(&id, || {
        let json = to_json(&answer.whole(Stage::Queued));
        let cancelled = to_json(&answer.whole(Stage::Cancelled));
        let conversation = answer.conversation.clone();
        let (task, log, response) = if api::flag(&answer.fields, "stream") {
            let (task, log) = stored::record(feed.into_stream(ResponseWriter::new(answer)));
            let response = Response::events(stored::told_again(log.clone(), 0));
            (task, Some(log), response)
        } else {
            let task = tokio::spawn(finish(answer, feed)).abort_handle();
            (task, None, Response::json(200, json.clone()))
        };
        let running = Some(Running { cancelled, task });
        let stored = Stored {
            json,
            conversation,
            running,
            log,
        };
        (stored, response)
    })
}

/// Generates all of it, and keeps it.
async fn finish(mut answer: Answer, mut feed: Feed) {
    let stage = match feed.collect(1).await {
        Ok(mut outputs) => {
            for output in outputs.remove(0) {
                answer.take(output);
            }
            Stage::Done
        }
        Err(_) => Stage::Failed,
    };
    answer.keep(stage);
}

impl Answer {
    /// Takes one more token and gives its text.
    fn take(&mut self, output: Output) -> String {
        self.tally.cached_tokens.get_or_insert(output.cached_tokens);
        self.tally.completion_tokens += 1;
        self.text.push_str(&output.text);
        self.finish = output.finish;
        output.text
    }

    /// Keeps it, if it is to be kept.
    fn keep(&self, stage: Stage) {
        if !self.stored {
            return;
        }
        let mut conversation = self.conversation.clone();
        conversation.push(Message {
            role: "assistant".to_owned(),
            content: self.text.clone(),
        });
        let json = to_json(&self.whole(stage));
        self.engine.responses.finish(&self.id, json, conversation);
    }

    fn part(&self) -> Part<'_> {
        Part {
            annotations: [],
            text: &self.text,
            r#type: "output_text",
            logprobs: None,
        }
    }

    fn item(&self, done: bool) -> Item<'_> {
        Item {
            id: &self.message_id,
            content: done.then(|| self.part()).into_iter().collect(),
            role: "assistant",
            status: if done { "completed" } else { "in_progress" },
            r#type: "message",
            phase: None,
        }
    }

    fn usage(&self) -> ResponseUsage {
        let (_, cache_write_tokens, cached_tokens) = self.tally.split(&self.engine);
        ResponseUsage {
            input_tokens: self.tally.prompt_tokens,
            input_tokens_details: InputDetails {
                cached_tokens,
                cache_write_tokens,
                input_tokens_per_turn: [],
                cached_tokens_per_turn: [],
            },
            output_tokens: self.tally.completion_tokens,
            output_tokens_details: OutputDetails {
                reasoning_tokens: 0,
                tool_output_tokens: 0,
                output_tokens_per_turn: [],
                tool_output_tokens_per_turn: [],
            },
            total_tokens: self.tally.prompt_tokens + self.tally.completion_tokens,
        }
    }

    fn whole(&self, stage: Stage) -> Whole<'_> {
        let fields = &self.fields;
        let done = stage == Stage::Done;
        let number = |name: &str, or: f64| fields.get(name).and_then(Value::as_f64).unwrap_or(or);
        let cut = done && self.finish == Some(Finish::Length);
        Whole {
            id: &self.id,
            created_at: self.created_at,
            incomplete_details: cut.then_some(Incomplete {
                reason: "max_output_tokens",
            }),
            instructions: api::text(fields, "instructions"),
            metadata: fields.get("metadata").filter(|value| !value.is_null()),
            model: &self.engine.config.model,
            object: "response",
            output: done.then(|| self.item(true)).into_iter().collect(),
            parallel_tool_calls: api::flag_or(fields, "parallel_tool_calls", true),
            temperature: self.sampling.temperature,
            tool_choice: "none",
            tools: [],
            top_p: number("top_p", 1.0),
            background: api::flag(fields, "background"),
            max_output_tokens: self.sampling.max_tokens,
            max_tool_calls: None,
            previous_response_id: api::text(fields, "previous_response_id"),
            prompt: None,
            reasoning: None,
            service_tier: api::text(fields, "service_tier").unwrap_or("auto"),
            status: match stage {
                Stage::Queued => "queued",
                Stage::Begun => "in_progress",
                Stage::Cancelled => "cancelled",
                Stage::Failed => "failed",
                Stage::Done if cut => "incomplete",
                Stage::Done => "completed",
            },
            text: None,
            top_logprobs: None,
            truncation: api::text(fields, "truncation").unwrap_or("disabled"),
            usage: done.then(|| self.usage()),
            user: api::text(fields, "user"),
            presence_penalty: number("presence_penalty", 0.0),
            frequency_penalty: number("frequency_penalty", 0.0),
            kv_transfer_params: None,
            ec_transfer_params: None,
            input_messages: None,
            output_messages: None,
        }
    }
}

struct ResponseWriter {
    answer: Answer,
    /// Of the next event.
    number: usize,
    /// Whether the message was announced.
    item: bool,
}

impl ResponseWriter {
    fn new(answer: Answer) -> Self {
        Self {
            answer,
            number: 0,
            item: false,
        }
    }

    fn push<'a>(
        &'a self,
        number: usize,
        r#type: &'static str,
        event: Event<'a>,
        events: &mut Events,
    ) -> usize {
        let event = Event {
            sequence_number: number,
            r#type,
            ..event
        };
        let data = to_json(&event);
        events.push_back(Piece::Data(format!("event: {type}\ndata: {data}\n\n")));
        number + 1
    }

    /// An event about the text of the message.
    fn of_text(&self) -> Event<'_> {
        Event {
            content_index: Some(0),
            item_id: Some(&self.answer.message_id),
            output_index: Some(0),
            ..Event::default()
        }
    }

    fn of_item(&self, done: bool) -> Event<'_> {
        Event {
            item: Some(self.answer.item(done)),
            output_index: Some(0),
            ..Event::default()
        }
    }

    fn of_response(&self, stage: Stage) -> Event<'_> {
        Event {
            response: Some(self.answer.whole(stage)),
            ..Event::default()
        }
    }

    fn announce(&self, events: &mut Events) -> usize {
        let number = self.number;
        let item = self.of_item(false);
        let number = self.push(number, "response.output_item.added", item, events);
        let part = Part {
            text: "",
            logprobs: Some([]),
            ..self.answer.part()
        };
        let part = Event {
            part: Some(part),
            ..self.of_text()
        };
        self.push(number, "response.content_part.added", part, events)
    }
}

impl Writer for ResponseWriter {
    fn begin(&mut self, events: &mut Events) {
        for name in ["response.created", "response.in_progress"] {
            self.number = self.push(self.number, name, self.of_response(Stage::Begun), events);
        }
    }

    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        let delta = self.answer.take(output);
        if !std::mem::replace(&mut self.item, true) {
            self.number = self.announce(events);
        }
        if !delta.is_empty() {
            let event = Event {
                delta: Some(&delta),
                logprobs: Some([]),
                ..self.of_text()
            };
            self.number = self.push(self.number, "response.output_text.delta", event, events);
        }
        self.answer.finish.is_some()
    }

    fn end(&mut self, events: &mut Events) {
        let text = Event {
            logprobs: Some([]),
            text: Some(&self.answer.text),
            ..self.of_text()
        };
        let number = self.push(self.number, "response.output_text.done", text, events);
        let part = Event {
            part: Some(self.answer.part()),
            ..self.of_text()
        };
        let number = self.push(number, "response.content_part.done", part, events);
        let item = self.of_item(true);
        let number = self.push(number, "response.output_item.done", item, events);
        let response = self.of_response(Stage::Done);
        self.number = self.push(number, "response.completed", response, events);
        self.answer.keep(Stage::Done);
    }
}
