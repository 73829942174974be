//! Answers `/generate`, SGLang's own endpoint: text or ids in, both out, and each event of a stream tells all so far.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

use super::api::{self, ApiError, Fields, to_json};
use super::completions::check_vocabulary;
use super::engine::{Engine, unix_s};
use super::feed::{DONE, Events, Writer};
use super::http::{Piece, Request, Response};
use super::scheduler::{Finish, Output};
use super::sglang;
use super::sglang_openai::{Matched, WeightVersion, reasons};
use super::sglang_serve::{Asked, Form, respond};

/// `max_new_tokens` of a request that names none.
const MAX_TOKENS_DEFAULT: usize = 128;

#[derive(Serialize)]
struct Told<'a> {
    text: &'a str,
    output_ids: &'a [u32],
    meta_info: Meta<'a>,
}

#[derive(Serialize)]
struct Meta<'a> {
    id: &'a str,
    finish_reason: Option<Reason>,
    prompt_tokens: usize,
    weight_version: &'static str,
    num_retractions: usize,
    storage_prefetch_wait: f64,
    storage_staging_wait: f64,
    forward_entry_time: f64,
    prefill_finished_time: f64,
    queue_time: f64,
    reasoning_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_versions: Option<[WeightVersion; 1]>,
    cached_tokens_details: Cached,
    dp_rank: Option<()>,
    #[serde(flatten)]
    last: Option<Last>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_sent_to_client_ts: Option<f64>,
}

#[derive(Serialize)]
struct Cached {
    device: usize,
    host: usize,
}

/// With the last token only.
#[derive(Serialize)]
struct Last {
    e2e_latency: f64,
    request_received_ts: f64,
    first_token_latency: f64,
    api_server_dispatch_finish_ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_sent_to_client_ts: Option<f64>,
    request_finished_ts: f64,
    decode_throughput: f64,
}

#[derive(Serialize)]
struct Reason {
    r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    matched: Option<Matched>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<usize>,
}

impl Reason {
    fn of(finish: &Finish, made: usize) -> Self {
        let (kind, matched) = reasons(finish);
        Self {
            r#type: kind,
            matched,
            length: (*finish == Finish::Length).then_some(made),
        }
    }
}

/// `POST /generate`, one sequence.
pub(crate) async fn generate(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, ApiError> {
    let fields = sglang::read_fields(request)?;
    let prompt = match (fields.get("text"), fields.get("input_ids")) {
        (Some(Value::String(text)), _) => Some(engine.tokenizer.encode(text)),
        (_, Some(ids)) => api::token_ids(ids),
        _ => None,
    };
    let prompt = prompt.ok_or_else(|| ApiError::not_implemented("batches, or no prompt"))?;
    check_vocabulary(engine, prompt.iter().copied())?;
    let none = Fields::new();
    let params = fields.get("sampling_params").and_then(Value::as_object);
    let params = params.unwrap_or(&none);
    if api::read_n(params)? > 1 {
        return Err(ApiError::not_implemented("n of /generate"));
    }
    if api::flag(&fields, "return_logprob") {
        return Err(ApiError::not_implemented("logprobs"));
    }
    let wanted = api::integer(params, "max_new_tokens")?.unwrap_or(MAX_TOKENS_DEFAULT);
    let prompt_tokens = prompt.len();
    let asked = Asked::read(engine, &fields, params, vec![prompt], Some(wanted))?;
    let form = Native {
        id: asked.flight.id.clone(),
        prompt_tokens,
        began: Instant::now(),
        received_s: unix_s(),
        first_s: None,
        text: String::new(),
        ids: Vec::new(),
    };
    respond(engine, asked, form).await
}

struct Native {
    id: String,
    prompt_tokens: usize,
    began: Instant,
    received_s: f64,
    /// When the first token was there, after `began`.
    first_s: Option<f64>,
    text: String,
    ids: Vec<u32>,
}

/// Where it stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Alone,
    First,
    Later,
}

impl Native {
    fn told(&self, text: &str, ids: &[u32], last: &Output, place: Place) -> String {
        let now = self.began.elapsed().as_secs_f64();
        let first = self.first_s.unwrap_or(now);
        let made = ids.len();
        let over = last.finish.is_some();
        let end = Last {
            e2e_latency: now,
            request_received_ts: self.received_s,
            first_token_latency: first,
            api_server_dispatch_finish_ts: self.received_s,
            response_sent_to_client_ts: (place != Place::Alone).then(unix_s),
            request_finished_ts: self.received_s + now,
            decode_throughput: made as f64 / (now - first).max(1e-3),
        };
        to_json(&Told {
            text,
            output_ids: ids,
            meta_info: Meta {
                id: &self.id,
                finish_reason: last.finish.as_ref().map(|finish| Reason::of(finish, made)),
                prompt_tokens: self.prompt_tokens,
                weight_version: "default",
                num_retractions: 0,
                storage_prefetch_wait: 0.0,
                storage_staging_wait: 0.0,
                forward_entry_time: self.received_s,
                prefill_finished_time: self.received_s + first,
                queue_time: 0.0,
                reasoning_tokens: 0,
                completion_tokens: made,
                cached_tokens: last.cached_tokens,
                weight_versions: over.then(|| [WeightVersion::of(made)]),
                cached_tokens_details: Cached {
                    device: last.cached_tokens,
                    host: 0,
                },
                dp_rank: None,
                last: over.then_some(end),
                response_sent_to_client_ts: match place {
                    Place::Alone => Some(unix_s()),
                    Place::First if !over => Some(unix_s()),
                    Place::First | Place::Later => None,
                },
            },
        })
    }
}

impl Writer for Native {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        let place = match self.first_s {
            None => Place::First,
            Some(_) => Place::Later,
        };
        let now = self.began.elapsed().as_secs_f64();
        self.first_s.get_or_insert(now);
        self.text.push_str(&output.text);
        self.ids.push(output.choice.token);
        let told = self.told(&self.text, &self.ids, &output, place);
        events.push_back(Piece::Data(format!("data: {told}\n\n")));
        output.finish.is_some()
    }

    fn end(&mut self, events: &mut Events) {
        events.push_back(Piece::Data(DONE.to_owned()));
    }
}

impl Form for Native {
    fn whole(&self, outputs: &[Vec<Output>]) -> String {
        let outputs = outputs.first().map(Vec::as_slice).unwrap_or_default();
        let text: String = outputs.iter().map(|output| output.text.as_str()).collect();
        let ids: Vec<u32> = outputs.iter().map(|output| output.choice.token).collect();
        outputs
            .last()
            .map(|last| self.told(&text, &ids, last, Place::Alone))
            .unwrap_or_default()
    }
}
