//! Answers `/v1/chat/completions`: bodies and events field by field as vLLM 0.32 writes them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::api::{
    self, ApiError, Fields, Flight, StopReason, StreamOptions, StreamUsage, Tally, Usage, reasons,
    to_json,
};
use super::completions::{ENTRANCE, given_prompt, held};
use super::engine::{Engine, unix_s};
use super::feed::{self, DONE, Events, Feed, Writer};
use super::forms::{self, Call, Form, ToolCall, ToolDelta};
use super::http::{Piece, Request, Response};
use super::model::Choice;
use super::nixl::{self, Params};
use super::reasoning::{Part, Reasoning};
use super::rendered::{render_id, rendered};
use super::scheduler::{Output, Sampling};
use super::template::{Ending, Message, render};
use super::tokenizer::Tokenizer;

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<FullChoice>,
    service_tier: Option<()>,
    system_fingerprint: &'static str,
    usage: Usage,
    prompt_logprobs: Option<()>,
    prompt_token_ids: Option<&'a [u32]>,
    prompt_text: Option<()>,
    kv_transfer_params: Option<Params>,
    ec_transfer_params: Option<()>,
    metrics: Option<()>,
}

#[derive(Serialize)]
struct FullChoice {
    index: usize,
    message: FullMessage,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    token_ids: Option<Vec<u32>>,
    routed_experts: Option<()>,
}

#[derive(Serialize)]
struct FullMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    annotations: Option<()>,
    audio: Option<()>,
    function_call: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCall; 1]>,
    reasoning: Option<()>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
}

#[derive(Serialize)]
struct TokenLogprob {
    #[serde(flatten)]
    token: OneLogprob,
    top_logprobs: Vec<OneLogprob>,
}

#[derive(Serialize)]
struct OneLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<StreamUsage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'static str>,
    #[serde(flatten)]
    prompt: Option<ChunkPrompt<'a>>,
}

#[derive(Serialize)]
struct ChunkPrompt<'a> {
    prompt_token_ids: Option<&'a [u32]>,
    prompt_text: Option<()>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<StopReason>>,
    /// Absent on the chunk that opens a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Option<Vec<u32>>>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// `null` beside a tool call.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolDelta; 1]>,
}

/// The messages of a request with their content as text.
pub(crate) fn read_messages(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let list = match fields.get("messages") {
        None => return Err(ApiError::missing("messages", fields)),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(ApiError::wrong_type("messages", "list")),
    };
    list.iter()
        .enumerate()
        .map(|(at, message)| read_message(at, message))
        .collect()
}

fn read_message(at: usize, message: &Value) -> Result<Message, ApiError> {
    let role = message["role"]
        .as_str()
        .ok_or_else(|| ApiError::wrong_type(&format!("messages.{at}.role"), "string"))?;
    if message
        .get("tool_calls")
        .is_some_and(|calls| calls.as_array().is_some_and(|calls| !calls.is_empty()))
    {
        return Err(ApiError::not_implemented("tool calls"));
    }
    let content = read_content(&message["content"])
        .ok_or_else(|| ApiError::not_implemented("message content other than text"))?;
    Ok(Message {
        role: role.to_owned(),
        content,
    })
}

/// Content as text: a string, nothing, or text parts, which vLLM joins by line ends.
pub(crate) fn read_content(content: &Value) -> Option<String> {
    match content {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let part = |part: &Value| match part["type"].as_str() {
                Some("text") => part["text"].as_str().map(str::to_owned),
                _ => part.as_str().map(str::to_owned),
            };
            parts
                .iter()
                .map(part)
                .collect::<Option<Vec<String>>>()
                .map(|parts| parts.join("\n"))
        }
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => None,
    }
}

/// How the prompt of a chat request ends.
pub(crate) fn read_ending(fields: &Fields) -> Result<Ending, ApiError> {
    let generation = api::flag_or(fields, "add_generation_prompt", true);
    match (api::flag(fields, "continue_final_message"), generation) {
        (true, true) => {
            let message =
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
            Err(ApiError::new(400, "BadRequestError", message, None))
        }
        (true, false) => Ok(Ending::ContinueFinal),
        (false, true) => Ok(Ending::GenerationPrompt),
        (false, false) => Ok(Ending::Closed),
    }
}

/// A chat request, read and checked.
struct Asked {
    prompt: Vec<u32>,
    sampling: Sampling,
    n: usize,
    return_token_ids: bool,
    /// The tool call of each choice, where one is forced.
    calls: Vec<Option<Call>>,
}

fn read(engine: &Engine, fields: &Fields) -> Result<Asked, ApiError> {
    let messages = read_messages(fields)?;
    api::check_model(engine, fields)?;
    api::check_simulated(fields, &["tools", "response_format", ENTRANCE])?;
    let prompt = match given_prompt(engine, fields)? {
        Some(prompt) => prompt,
        None => engine
            .tokenizer
            .encode(&render(&messages, read_ending(fields)?)),
    };
    let wanted = match api::integer(fields, "max_completion_tokens")? {
        Some(wanted) => Some(wanted),
        None => api::integer(fields, "max_tokens")?,
    };
    let mut sampling = api::read_sampling(engine, fields, wanted, prompt.len())?;
    if api::flag(fields, "logprobs") {
        sampling.logprobs = Some(api::integer(fields, "top_logprobs")?.unwrap_or(0));
    }
    Ok(Asked {
        prompt,
        sampling,
        n: api::read_n(fields)?,
        return_token_ids: api::flag(fields, "return_token_ids"),
        calls: Vec::new(),
    })
}

/// What each choice is to generate, its form filled in.
fn sequences(
    engine: &Engine,
    asked: &mut Asked,
    form: &Form,
) -> Result<Vec<(Vec<u32>, Sampling)>, ApiError> {
    let mut sequences = Vec::with_capacity(asked.n);
    for index in 0..asked.n {
        let filled = form.fill(engine, &asked.prompt, &asked.sampling, index)?;
        let sampling = Sampling {
            given: filled.tokens,
            ..asked.sampling.clone()
        };
        asked.calls.push(filled.call);
        sequences.push((asked.prompt.clone(), sampling));
    }
    Ok(sequences)
}

/// `POST /v1/chat/completions`.
pub(crate) async fn completions(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, Response> {
    let fields = api::read_fields(request)?;
    let mut asked = read(engine, &fields)?;
    let form = forms::read(request)?;
    let flight = Flight::begin(engine, request, &fields, "chatcmpl")?;
    asked.sampling.transfer = nixl::transfer(engine, &fields).await?;
    let sequences = sequences(engine, &mut asked, &form)?;
    let generation = engine.generate(sequences, api::text(&fields, "cache_salt"));
    let mut feed = Feed::new(engine, generation, flight);
    let created = unix_s() as u64;
    if api::flag(&fields, "stream") {
        if let Some(refusal) = feed::late_refusal(engine, &asked.sampling) {
            return Ok(refusal);
        }
        let writer = ChatWriter {
            id: feed.id().to_owned(),
            created,
            options: StreamOptions::read(&fields),
            made: vec![0; asked.n],
            told: vec![0; asked.n],
            open: asked.n,
            cached_tokens: None,
            reasoning: Reasoning::of(engine, &asked.prompt),
            engine: Arc::clone(engine),
            asked,
        };
        return Ok(Response::events(feed.into_stream(writer)));
    }
    let outputs = feed.collect(asked.n).await?;
    Ok(Response::json(
        200,
        whole(engine, &asked, feed.id(), created, &outputs),
    ))
}

fn whole(
    engine: &Engine,
    asked: &Asked,
    id: &str,
    created: u64,
    outputs: &[Vec<Output>],
) -> String {
    let tally = Tally {
        prompt_tokens: asked.prompt.len(),
        completion_tokens: outputs.iter().map(Vec::len).sum(),
        cached_tokens: outputs
            .first()
            .and_then(|choice| choice.first())
            .map(|output| output.cached_tokens),
    };
    to_json(&Completion {
        id,
        object: "chat.completion",
        created,
        model: &engine.config.model,
        choices: outputs
            .iter()
            .map(|outputs| full_choice(engine, asked, outputs))
            .collect(),
        service_tier: None,
        system_fingerprint: api::fingerprint(engine),
        usage: tally.usage(engine, true),
        prompt_logprobs: None,
        prompt_token_ids: asked.return_token_ids.then_some(&asked.prompt[..]),
        prompt_text: None,
        kv_transfer_params: held(engine, id, outputs, asked.prompt.len()),
        ec_transfer_params: None,
        metrics: None,
    })
}

fn full_choice(engine: &Engine, asked: &Asked, outputs: &[Output]) -> FullChoice {
    let index = outputs.first().map_or(0, |output| output.index);
    let finish = outputs
        .last()
        .and_then(|output| output.finish.as_ref())
        .map(reasons);
    let (mut finish_reason, stop_reason) =
        finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
    let token_ids = asked
        .return_token_ids
        .then(|| outputs.iter().map(|output| output.choice.token).collect());
    let content: String = outputs.iter().map(|output| output.text.as_str()).collect();
    let call = asked.calls[index].as_ref();
    let tool_calls = call
        .and_then(|call| call.whole(&content))
        .map(|call| [call]);
    if tool_calls.is_some() {
        finish_reason = Some("tool_calls");
    }
    let logprobs = asked.sampling.logprobs.map(|top| Logprobs {
        content: outputs
            .iter()
            .map(|output| token_logprob(&engine.tokenizer, &output.choice, top))
            .collect(),
    });
    let message = FullMessage {
        role: "assistant",
        content: tool_calls.is_none().then_some(content),
        refusal: None,
        annotations: None,
        audio: None,
        function_call: None,
        tool_calls,
        reasoning: None,
    };
    FullChoice {
        index,
        message,
        logprobs,
        finish_reason,
        stop_reason,
        token_ids,
        routed_experts: None,
    }
}

fn token_logprob(tokenizer: &Tokenizer, choice: &Choice, top: usize) -> TokenLogprob {
    let one = |token: u32, logprob: f64| OneLogprob {
        token: tokenizer.decode(&[token]),
        logprob,
        bytes: tokenizer.bytes(token).to_vec(),
    };
    let all =
        std::iter::once((choice.token, choice.logprob)).chain(choice.runners_up.iter().copied());
    TokenLogprob {
        token: one(choice.token, choice.logprob),
        top_logprobs: all
            .take(top)
            .map(|(token, logprob)| one(token, logprob))
            .collect(),
    }
}

struct ChatWriter {
    engine: Arc<Engine>,
    asked: Asked,
    id: String,
    created: u64,
    options: StreamOptions,
    /// Tokens, and bytes of text, of each choice so far.
    made: Vec<usize>,
    told: Vec<usize>,
    open: usize,
    cached_tokens: Option<usize>,
    reasoning: Reasoning,
}

impl ChatWriter {
    fn tally(&self, completion_tokens: usize) -> Tally {
        Tally {
            prompt_tokens: self.asked.prompt.len(),
            completion_tokens,
            cached_tokens: self.cached_tokens,
        }
    }

    fn push(
        &self,
        events: &mut Events,
        choices: Vec<ChunkChoice>,
        usage: Option<StreamUsage>,
        parts: Parts,
    ) {
        let prompt = parts.opening.then(|| ChunkPrompt {
            prompt_token_ids: self
                .asked
                .return_token_ids
                .then_some(&self.asked.prompt[..]),
            prompt_text: None,
        });
        let chunk = Chunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.engine.config.model,
            choices,
            usage,
            system_fingerprint: parts.fingerprint.then(|| api::fingerprint(&self.engine)),
            prompt,
        };
        events.push_back(Piece::Data(format!("data: {}\n\n", to_json(&chunk))));
    }

    /// One chunk per choice that says who speaks, as soon as the first token of any is there.
    fn open_choices(&self, events: &mut Events) {
        for index in 0..self.asked.n {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(Some(String::new())),
                ..Delta::default()
            };
            let choice = ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let usage = self.options.continuous.then(|| self.tally(0).continuous());
            self.push(
                events,
                vec![choice],
                usage,
                Parts {
                    opening: true,
                    fingerprint: false,
                },
            );
        }
    }
}

impl ChatWriter {
    /// What `text` tells of its choice; `None` if nothing.
    fn delta(&mut self, index: usize, text: String) -> Option<Delta> {
        let told = self.told[index];
        self.told[index] += text.len();
        match &self.asked.calls[index] {
            Some(call) => call.delta(told, &text).map(|call| Delta {
                content: Some(None),
                tool_calls: Some([call]),
                ..Delta::default()
            }),
            None if text.is_empty() => None,
            None => match self.reasoning.part(self.made[index]) {
                Part::Mark => None,
                Part::Reasoning => Some(Delta {
                    reasoning: Some(text),
                    ..Delta::default()
                }),
                Part::Content => Some(Delta {
                    content: Some(Some(text)),
                    ..Delta::default()
                }),
            },
        }
    }
}

/// Which optional parts a chunk has.
#[derive(Clone, Copy)]
struct Parts {
    opening: bool,
    fingerprint: bool,
}

impl Writer for ChatWriter {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        if self.cached_tokens.is_none() {
            self.cached_tokens = Some(output.cached_tokens);
            self.open_choices(events);
        }
        let index = output.index;
        self.made[index] += 1;
        let finish = output.finish.as_ref().map(reasons);
        self.open -= usize::from(finish.is_some());
        let delta = self.delta(index, output.text);
        // A vLLM with a parser, as it was recorded, sends no chunk for a token of which that made nothing yet, unless ids or
        // figures were asked for: then an empty delta.
        let figures = self.asked.return_token_ids || self.asked.sampling.logprobs.is_some();
        if delta.is_none() && finish.is_none() && !figures {
            return false;
        }
        let logprobs = self.asked.sampling.logprobs.map(|top| Logprobs {
            content: vec![token_logprob(&self.engine.tokenizer, &output.choice, top)],
        });
        let (mut finish_reason, stop_reason) =
            finish.map_or((None, None), |(reason, stop)| (Some(reason), Some(stop)));
        let called = self.asked.calls[index].as_ref();
        if finish_reason.is_some() && called.is_some_and(|call| call.is_complete(self.told[index]))
        {
            finish_reason = Some("tool_calls");
        }
        let choice = ChunkChoice {
            index,
            delta: delta.unwrap_or_default(),
            logprobs,
            finish_reason,
            stop_reason,
            token_ids: Some(
                self.asked
                    .return_token_ids
                    .then(|| vec![output.choice.token]),
            ),
        };
        let usage = self
            .options
            .continuous
            .then(|| self.tally(self.made[index]).continuous());
        let fingerprint = self.open == 0 && !self.options.include_usage;
        self.push(
            events,
            vec![choice],
            usage,
            Parts {
                opening: false,
                fingerprint,
            },
        );
        self.open == 0
    }

    fn end(&mut self, events: &mut Events) {
        if self.options.include_usage {
            let usage = self.tally(self.made.iter().sum()).last(&self.engine, true);
            self.push(
                events,
                Vec::new(),
                Some(usage),
                Parts {
                    opening: false,
                    fingerprint: true,
                },
            );
        }
        events.push_back(Piece::Data(DONE.to_owned()));
    }
}

/// `POST /v1/chat/completions/render`.
pub(crate) fn render_endpoint(engine: &Engine, request: &Request) -> Result<Response, Response> {
    if !engine.config.scale_out {
        return Err(ApiError::scale_out_disabled().into());
    }
    let fields = api::read_fields(request)?;
    // What render makes of a form is not recorded.
    api::check_simulated(&fields, &[])?;
    let asked = read(engine, &fields)?;
    let id = render_id(engine, request, &fields, "chatcmpl");
    Ok(Response::json(
        200,
        to_json(&rendered(
            engine,
            &fields,
            id,
            &asked.prompt,
            &asked.sampling,
        )),
    ))
}
