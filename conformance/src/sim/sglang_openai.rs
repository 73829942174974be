//! Answers `/v1/chat/completions` and `/v1/completions` as SGLang 0.5.23 writes them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::api::{self, ApiError, Fields, StreamOptions, to_json};
use super::completions::check_vocabulary;
use super::engine::{Engine, unix_s};
use super::feed::{DONE, Events, Writer};
use super::http::{Piece, Request, Response};
use super::scheduler::{Finish, Output};
use super::sglang;
use super::sglang_serve::{Asked, Form, respond};
use super::tokenizer::EOS;

/// `max_tokens` of completions that name none.
const MAX_TOKENS_DEFAULT: usize = 16;

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
    metadata: Metadata,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    /// Completions say it in every chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
    matched_stop: Option<Matched>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    reasoning_content: Option<()>,
}

#[derive(Serialize)]
struct Delta {
    reasoning_content: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: Option<Details>,
    reasoning_tokens: usize,
    completion_tokens_details: Option<()>,
}

#[derive(Serialize)]
struct Details {
    cached_tokens: usize,
}

#[derive(Serialize)]
pub(crate) struct Metadata {
    weight_version: &'static str,
    weight_versions: [WeightVersion; 1],
}

#[derive(Serialize)]
pub(crate) struct WeightVersion {
    version: &'static str,
    start: usize,
    end: usize,
}

impl WeightVersion {
    pub(crate) fn of(tokens: usize) -> Self {
        Self {
            version: "default",
            start: 0,
            end: tokens,
        }
    }
}

/// What of `stop` or `stop_token_ids` ended a generation; the end of a turn is a token, too.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Matched {
    Token(u32),
    Text(String),
}

/// `finish_reason` and `matched_stop`.
pub(crate) fn reasons(finish: &Finish) -> (&'static str, Option<Matched>) {
    match finish {
        Finish::Length => ("length", None),
        Finish::Eos => ("stop", Some(Matched::Token(EOS))),
        Finish::StopToken(token) => ("stop", Some(Matched::Token(*token))),
        Finish::StopString(text) => ("stop", Some(Matched::Text(text.clone()))),
    }
}

/// One request's way to be told.
struct OpenAi {
    engine: Arc<Engine>,
    chat: bool,
    id: String,
    created: u64,
    model: String,
    prompts: Vec<Vec<u32>>,
    n: usize,
    options: StreamOptions,
    token_ids: bool,
    prompt_ids: bool,
    made: Vec<usize>,
    open: usize,
    cached_tokens: usize,
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(engine: &Arc<Engine>, request: &Request) -> Result<Response, ApiError> {
    let fields = sglang::read_fields(request)?;
    for (name, told) in [
        ("return_prompt_token_ids", "return_prompt_token_ids"),
        ("return_token_ids", "return_token_ids"),
    ] {
        if api::flag(&fields, "stream") && api::flag(&fields, name) {
            let message = format!(
                "{told} is not supported with streaming. Please set stream=false when using {told}=true."
            );
            return Err(ApiError::new(400, "BadRequest", message, None));
        }
    }
    let prompt = match fields.get("input_ids").and_then(api::token_ids) {
        Some(ids) => ids,
        None => sglang::chat_prompt(engine, &fields)?,
    };
    let wanted = match api::integer(&fields, "max_completion_tokens")? {
        Some(wanted) => Some(wanted),
        None => api::integer(&fields, "max_tokens")?,
    };
    begin(engine, &fields, vec![prompt], wanted, true).await
}

/// `POST /v1/completions`.
pub(crate) async fn completions(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, ApiError> {
    let fields = sglang::read_fields(request)?;
    let one = |prompt: &Value| match prompt {
        Value::String(text) => Some(engine.tokenizer.encode(text)),
        other => api::token_ids(other),
    };
    let prompts: Option<Vec<_>> = match fields.get("prompt") {
        Some(Value::Array(list)) if list.first().is_some_and(|first| !first.is_number()) => {
            list.iter().map(one).collect()
        }
        Some(prompt) => one(prompt).map(|prompt| vec![prompt]),
        None => None,
    };
    let prompts = prompts.ok_or_else(|| ApiError::not_implemented("requests without a prompt"))?;
    let wanted = api::integer(&fields, "max_tokens")?.unwrap_or(MAX_TOKENS_DEFAULT);
    begin(engine, &fields, prompts, Some(wanted), false).await
}

async fn begin(
    engine: &Arc<Engine>,
    fields: &Fields,
    prompts: Vec<Vec<u32>>,
    wanted: Option<usize>,
    chat: bool,
) -> Result<Response, ApiError> {
    check_vocabulary(engine, prompts.iter().flatten().copied())?;
    let asked = Asked::read(engine, fields, fields, prompts, wanted)?;
    let model = api::text(fields, "model").unwrap_or(&engine.config.model);
    let form = OpenAi {
        engine: Arc::clone(engine),
        chat,
        id: asked.flight.id.clone(),
        created: unix_s() as u64,
        model: model.to_owned(),
        prompts: asked.prompts.clone(),
        n: asked.n,
        options: StreamOptions::read(fields),
        token_ids: api::flag(fields, "return_token_ids"),
        prompt_ids: api::flag(fields, "return_prompt_token_ids")
            || !chat && api::flag(fields, "return_token_ids"),
        made: vec![0; asked.choices()],
        open: asked.choices(),
        cached_tokens: 0,
    };
    respond(engine, asked, form).await
}

impl OpenAi {
    fn usage(&self, made: usize, cached: usize) -> Usage {
        let prompt_tokens = self.prompts.iter().map(Vec::len).sum();
        let details = self.engine.config.prompt_tokens_details;
        Usage {
            prompt_tokens,
            total_tokens: prompt_tokens + made,
            completion_tokens: made,
            prompt_tokens_details: details.then_some(Details {
                cached_tokens: cached,
            }),
            reasoning_tokens: 0,
            completion_tokens_details: None,
        }
    }

    fn push(&self, events: &mut Events, choices: Vec<Choice<'_>>, usage: Option<Usage>) {
        let chunk = Chunk {
            id: &self.id,
            object: match self.chat {
                true => "chat.completion.chunk",
                false => "text_completion",
            },
            created: self.created,
            model: &self.model,
            choices,
            usage: match (self.chat, usage) {
                (true, None) => None,
                (_, usage) => Some(usage),
            },
        };
        events.push_back(Piece::Data(format!("data: {}\n\n", to_json(&chunk))));
    }

    fn delta(&self, events: &mut Events, index: usize, delta: Delta, finish: Option<&Finish>) {
        let finish = finish.map(reasons);
        let (finish_reason, matched_stop) =
            finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
        let choice = Choice {
            delta: Some(delta),
            finish_reason,
            matched_stop,
            ..self.choice(index)
        };
        self.push(events, vec![choice], None);
    }

    fn choice(&self, index: usize) -> Choice<'_> {
        Choice {
            index,
            message: None,
            delta: None,
            text: None,
            logprobs: None,
            finish_reason: None,
            matched_stop: None,
            token_ids: None,
            prompt_token_ids: None,
            response_token_ids: None,
        }
    }

    fn full(&self, index: usize, outputs: &[Output]) -> Choice<'_> {
        let text: String = outputs.iter().map(|output| output.text.as_str()).collect();
        let ids = || outputs.iter().map(|output| output.choice.token).collect();
        let finish = outputs.last().and_then(|output| output.finish.as_ref());
        let finish = finish.map(reasons);
        let (finish_reason, matched_stop) =
            finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
        let prompt = &self.prompts[index / self.n];
        let choice = Choice {
            finish_reason,
            matched_stop,
            prompt_token_ids: self.prompt_ids.then_some(&prompt[..]),
            ..self.choice(index)
        };
        match self.chat {
            true => Choice {
                message: Some(Message {
                    role: "assistant",
                    content: text,
                    reasoning_content: None,
                }),
                response_token_ids: self.token_ids.then(ids),
                ..choice
            },
            false => Choice {
                text: Some(text),
                token_ids: self.token_ids.then(ids),
                ..choice
            },
        }
    }
}

impl Writer for OpenAi {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        let index = output.index;
        let first = self.made[index] == 0;
        self.made[index] += 1;
        self.cached_tokens = output.cached_tokens;
        self.open -= usize::from(output.finish.is_some());
        let finish = output.finish.as_ref();
        if self.chat {
            let delta = |role, content| Delta {
                reasoning_content: None,
                role,
                content,
            };
            if first {
                let opening = delta(Some("assistant"), Some(String::new()));
                self.delta(events, index, opening, None);
            }
            if !output.text.is_empty() {
                self.delta(events, index, delta(None, Some(output.text.clone())), None);
            }
            if finish.is_some() {
                self.delta(events, index, delta(None, None), finish);
            }
            return self.open == 0;
        }
        let finish = finish.map(reasons);
        let (finish_reason, matched_stop) =
            finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
        let prompt = &self.prompts[index / self.n];
        let choice = Choice {
            text: Some(output.text.clone()),
            finish_reason,
            matched_stop,
            token_ids: self.token_ids.then(|| vec![output.choice.token]),
            prompt_token_ids: (self.prompt_ids && first).then_some(&prompt[..]),
            ..self.choice(index)
        };
        self.push(events, vec![choice], None);
        self.open == 0
    }

    fn end(&mut self, events: &mut Events) {
        if self.options.include_usage {
            let usage = self.usage(self.made.iter().sum(), self.cached_tokens);
            self.push(events, Vec::new(), Some(usage));
        }
        events.push_back(Piece::Data(DONE.to_owned()));
    }
}

impl Form for OpenAi {
    fn whole(&self, outputs: &[Vec<Output>]) -> String {
        let made = outputs.iter().map(Vec::len).sum();
        let first = outputs.first().and_then(|choice| choice.first());
        let cached = first.map_or(0, |output| output.cached_tokens);
        let choices = outputs.iter().enumerate();
        to_json(&Whole {
            id: &self.id,
            object: match self.chat {
                true => "chat.completion",
                false => "text_completion",
            },
            created: self.created,
            model: &self.model,
            choices: choices
                .map(|(index, outputs)| self.full(index, outputs))
                .collect(),
            usage: self.usage(made, cached),
            metadata: Metadata {
                weight_version: "default",
                weight_versions: [WeightVersion::of(made)],
            },
        })
    }
}
