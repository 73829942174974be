//! Answers `/v1/messages`: Anthropic's API as vLLM 0.32 offers it. The stream is recorded; the whole answer is not, and
//! follows Anthropic's own documentation.

use std::sync::Arc;

use serde::Serialize;

use super::api::{self, ApiError, Fields, Flight, Tally, to_json};
use super::chat::{read_content, read_messages};
use super::engine::Engine;
use super::feed::{Events, Feed, Writer};
use super::http::{Piece, Request, Response};
use super::scheduler::{Finish, Output, Sampling};
use super::template::{Ending, Message, render};

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    r#type: &'static str,
    role: &'static str,
    content: Vec<Content>,
    model: &'a str,
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
    usage: MessageUsage,
}

#[derive(Serialize)]
struct Content {
    r#type: &'static str,
    text: String,
}

#[derive(Serialize)]
struct MessageUsage {
    input_tokens: usize,
    output_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_creation_input_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_read_input_tokens: Option<usize>,
}

/// The events of a stream; `type` is written first in each.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart {
        message: Whole<'a>,
    },
    ContentBlockStart {
        content_block: Content,
        index: usize,
    },
    ContentBlockDelta {
        delta: TextDelta,
        index: usize,
    },
    ContentBlockStop {
        index: usize,
    },
    MessageDelta {
        delta: StopDelta<'a>,
        usage: MessageUsage,
    },
    MessageStop,
}

#[derive(Serialize)]
struct TextDelta {
    r#type: &'static str,
    text: String,
}

#[derive(Serialize)]
struct StopDelta<'a> {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
}

fn stop_reason(finish: &Finish) -> (&'static str, Option<&str>) {
    match finish {
        Finish::Length => ("max_tokens", None),
        Finish::Eos | Finish::StopToken(_) => ("end_turn", None),
        Finish::StopString(text) => ("stop_sequence", Some(text)),
    }
}

fn usage(engine: &Engine, tally: &Tally) -> MessageUsage {
    let (input_tokens, created, read) = tally.split(engine);
    let told = engine.config.prompt_tokens_details;
    MessageUsage {
        input_tokens: if told {
            input_tokens
        } else {
            tally.prompt_tokens
        },
        output_tokens: tally.completion_tokens,
        cache_creation_input_tokens: told.then_some(created),
        cache_read_input_tokens: told.then_some(read),
    }
}

/// The prompt's tokens and how to go on, read and checked.
fn read(engine: &Engine, fields: &mut Fields) -> Result<(Vec<u32>, Sampling), ApiError> {
    let mut messages = read_messages(fields)?;
    let max_tokens = api::integer(fields, "max_tokens")?;
    let max_tokens = max_tokens.ok_or_else(|| ApiError::missing("max_tokens", fields))?;
    api::check_model(engine, fields)?;
    api::check_simulated(fields, &[])?;
    if let Some(system) = fields.get("system").filter(|system| !system.is_null()) {
        let content = read_content(system)
            .ok_or_else(|| ApiError::not_implemented("system content other than text"))?;
        let role = "system".to_owned();
        messages.insert(0, Message { role, content });
    }
    if let Some(stop) = fields.remove("stop_sequences") {
        fields.insert("stop".to_owned(), stop);
    }
    let prompt = render(&messages, Ending::GenerationPrompt);
    let prompt = engine.tokenizer.encode(&prompt);
    let sampling = api::read_sampling(engine, fields, Some(max_tokens), prompt.len())?;
    Ok((prompt, sampling))
}

/// `POST /v1/messages`.
pub(crate) async fn messages(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, Response> {
    let mut fields = api::read_fields(request)?;
    let (prompt, sampling) = read(engine, &mut fields)?;
    let flight = Flight::begin(engine, request, &fields, "chatcmpl")?;
    let mut tally = Tally {
        prompt_tokens: prompt.len(),
        ..Tally::default()
    };
    let generation = engine.generate(vec![(prompt, sampling)], api::text(&fields, "cache_salt"));
    let mut feed = Feed::new(engine, generation, flight);
    if api::flag(&fields, "stream") {
        let writer = MessageWriter {
            id: feed.id().to_owned(),
            engine: Arc::clone(engine),
            tally,
            finish: None,
        };
        return Ok(Response::events(feed.into_stream(writer)));
    }
    let outputs = feed.collect(1).await?.remove(0);
    tally.completion_tokens = outputs.len();
    tally.cached_tokens = outputs.first().map(|output| output.cached_tokens);
    let last = outputs.last().and_then(|output| output.finish.as_ref());
    let finish = last.map(stop_reason);
    let text = outputs.iter().map(|output| output.text.as_str()).collect();
    let r#type = "text";
    let body = to_json(&Whole {
        id: feed.id(),
        r#type: "message",
        role: "assistant",
        content: vec![Content { r#type, text }],
        model: &engine.config.model,
        stop_reason: finish.map(|(reason, _)| reason),
        stop_sequence: finish.and_then(|(_, text)| text),
        usage: usage(engine, &tally),
    });
    Ok(Response::json(200, body))
}

struct MessageWriter {
    id: String,
    engine: Arc<Engine>,
    tally: Tally,
    finish: Option<Finish>,
}

impl MessageWriter {
    fn push(events: &mut Events, name: &str, event: &Event<'_>) {
        events.push_back(Piece::Data(format!(
            "event: {name}\ndata: {}\n\n",
            to_json(event)
        )));
    }

    fn start(&self, events: &mut Events) {
        let message = Whole {
            id: &self.id,
            r#type: "message",
            role: "assistant",
            content: Vec::new(),
            model: &self.engine.config.model,
            stop_reason: None,
            stop_sequence: None,
            usage: MessageUsage {
                input_tokens: self.tally.prompt_tokens,
                output_tokens: 0,
                cache_creation_input_tokens: None,
                cache_read_input_tokens: None,
            },
        };
        Self::push(events, "message_start", &Event::MessageStart { message });
        let content_block = Content {
            r#type: "text",
            text: String::new(),
        };
        Self::push(
            events,
            "content_block_start",
            &Event::ContentBlockStart {
                content_block,
                index: 0,
            },
        );
    }
}

impl Writer for MessageWriter {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        if self.tally.cached_tokens.is_none() {
            self.tally.cached_tokens = Some(output.cached_tokens);
            self.start(events);
        }
        self.tally.completion_tokens += 1;
        if !output.text.is_empty() {
            let delta = TextDelta {
                r#type: "text_delta",
                text: output.text,
            };
            Self::push(
                events,
                "content_block_delta",
                &Event::ContentBlockDelta { delta, index: 0 },
            );
        }
        self.finish = output.finish;
        self.finish.is_some()
    }

    fn end(&mut self, events: &mut Events) {
        Self::push(
            events,
            "content_block_stop",
            &Event::ContentBlockStop { index: 0 },
        );
        let finish = self.finish.as_ref().map(stop_reason);
        let delta = StopDelta {
            stop_reason: finish.map(|(reason, _)| reason),
            stop_sequence: finish.and_then(|(_, text)| text),
        };
        let usage = usage(&self.engine, &self.tally);
        Self::push(
            events,
            "message_delta",
            &Event::MessageDelta { delta, usage },
        );
        Self::push(events, "message_stop", &Event::MessageStop);
    }
}
