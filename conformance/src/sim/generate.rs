//! Answers `/inference/v1/generate`: token ids in, token ids out, no text at all.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::api::{
    self, ApiError, Fields, Flight, StopReason, StreamOptions, StreamUsage, Tally, Usage, reasons,
    to_json,
};
use super::completions::check_vocabulary;
use super::engine::{Engine, unix_s};
use super::feed::{DONE, Events, Feed, Writer};
use super::http::{Piece, Request, Response};
use super::scheduler::{Output, Sampling};

/// `max_tokens` of a request that names none.
const MAX_TOKENS_DEFAULT: usize = 16;

#[derive(Serialize)]
struct Whole<'a> {
    request_id: &'a str,
    model: &'a str,
    created: u64,
    usage: Usage,
    prompt_logprobs: Option<()>,
    prompt_token_id_logprobs: Option<()>,
    prompt_token_ids: Option<&'a [u32]>,
    mm_placeholders: Option<()>,
    metrics: Option<()>,
    kv_transfer_params: Option<()>,
    ec_transfer_params: Option<()>,
    output_mode: &'static str,
    choices: Vec<GenerateChoice>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    request_id: &'a str,
    usage: Option<StreamUsage>,
    output_mode: &'static str,
    choices: Vec<GenerateChoice>,
}

#[derive(Serialize)]
struct GenerateChoice {
    index: usize,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    token_ids: Vec<u32>,
    routed_experts: Option<()>,
    sampling_mask: Option<()>,
    weight_versions: Option<[WeightVersion; 1]>,
    logprobs: Option<()>,
}

#[derive(Serialize)]
struct WeightVersion {
    version: &'static str,
    start: usize,
    end: usize,
}

/// A choice with `tokens`; `made` counts all tokens of the choice, and is told with the last of them.
fn choice(last: &Output, tokens: Vec<u32>, made: usize) -> GenerateChoice {
    let finish = last.finish.as_ref().map(reasons);
    let weight_versions = finish.is_some().then_some([WeightVersion {
        version: "default",
        start: 0,
        end: made,
    }]);
    let (finish_reason, stop_reason) =
        finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
    GenerateChoice {
        index: last.index,
        finish_reason,
        stop_reason,
        token_ids: tokens,
        routed_experts: None,
        sampling_mask: None,
        weight_versions,
        logprobs: None,
    }
}

/// A request, read and checked.
struct Asked {
    prompt: Vec<u32>,
    sampling: Sampling,
    n: usize,
    return_token_ids: bool,
}

fn read(engine: &Engine, fields: &Fields) -> Result<Asked, ApiError> {
    let ids = fields.get("token_ids");
    let ids = ids.ok_or_else(|| ApiError::missing("token_ids", fields))?;
    let prompt = api::token_ids(ids).ok_or_else(|| ApiError::wrong_type("token_ids", "list"))?;
    api::check_model(engine, fields)?;
    api::check_simulated(fields, &[])?;
    check_vocabulary(engine, prompt.iter().copied())?;
    let none = Fields::new();
    let params = fields.get("sampling_params").and_then(Value::as_object);
    let params = params.unwrap_or(&none);
    if params.get("logprobs").is_some_and(|asked| !asked.is_null()) {
        return Err(ApiError::not_implemented(
            "logprobs of /inference/v1/generate",
        ));
    }
    let max_tokens = api::integer(params, "max_tokens")?.or(Some(MAX_TOKENS_DEFAULT));
    Ok(Asked {
        sampling: api::read_sampling(engine, params, max_tokens, prompt.len())?,
        n: api::read_n(params)?,
        prompt,
        return_token_ids: api::flag(fields, "return_token_ids"),
    })
}

/// `POST /inference/v1/generate`.
pub(crate) async fn generate(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, Response> {
    if !engine.config.scale_out {
        return Err(ApiError::scale_out_disabled().into());
    }
    let fields = api::read_fields(request)?;
    let asked = read(engine, &fields)?;
    let flight = Flight::begin(engine, request, &fields, "generate-tokens")?;
    let sequences = vec![(asked.prompt.clone(), asked.sampling.clone()); asked.n];
    let generation = engine.generate(sequences, api::text(&fields, "cache_salt"));
    let mut feed = Feed::new(engine, generation, flight);
    if api::flag(&fields, "stream") {
        let writer = GenerateWriter {
            id: feed.id().to_owned(),
            engine: Arc::clone(engine),
            prompt_tokens: asked.prompt.len(),
            options: StreamOptions::read(&fields),
            made: vec![0; asked.n],
            open: asked.n,
            cached_tokens: None,
        };
        return Ok(Response::events(feed.into_stream(writer)));
    }
    let created = unix_s() as u64;
    let outputs = feed.collect(asked.n).await?;
    let body = whole(engine, &asked, feed.id(), created, &outputs);
    Ok(Response::json(200, body))
}

fn whole(
    engine: &Engine,
    asked: &Asked,
    id: &str,
    created: u64,
    outputs: &[Vec<Output>],
) -> String {
    let first = outputs.first().and_then(|choice| choice.first());
    let tally = Tally {
        prompt_tokens: asked.prompt.len(),
        completion_tokens: outputs.iter().map(Vec::len).sum(),
        cached_tokens: first.map(|output| output.cached_tokens),
    };
    let choices = outputs.iter().filter_map(|outputs| {
        let tokens = outputs.iter().map(|output| output.choice.token).collect();
        let last = outputs.last()?;
        Some(choice(last, tokens, outputs.len()))
    });
    to_json(&Whole {
        request_id: id,
        model: &engine.config.model,
        created,
        usage: tally.usage(engine, false),
        prompt_logprobs: None,
        prompt_token_id_logprobs: None,
        prompt_token_ids: asked.return_token_ids.then_some(&asked.prompt[..]),
        mm_placeholders: None,
        metrics: None,
        kv_transfer_params: None,
        ec_transfer_params: None,
        output_mode: "tokens",
        choices: choices.collect(),
    })
}

struct GenerateWriter {
    id: String,
    engine: Arc<Engine>,
    prompt_tokens: usize,
    options: StreamOptions,
    made: Vec<usize>,
    open: usize,
    cached_tokens: Option<usize>,
}

impl GenerateWriter {
    fn tally(&self, completion_tokens: usize) -> Tally {
        Tally {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            cached_tokens: self.cached_tokens,
        }
    }

    fn push(&self, events: &mut Events, choices: Vec<GenerateChoice>, usage: Option<StreamUsage>) {
        let chunk = Chunk {
            request_id: &self.id,
            usage,
            output_mode: "tokens",
            choices,
        };
        events.push_back(Piece::Data(format!("data: {}\n\n", to_json(&chunk))));
    }
}

impl Writer for GenerateWriter {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        self.cached_tokens.get_or_insert(output.cached_tokens);
        self.made[output.index] += 1;
        self.open -= usize::from(output.finish.is_some());
        let made = self.made[output.index];
        let usage = self
            .options
            .continuous
            .then(|| self.tally(made).continuous());
        self.push(
            events,
            vec![choice(&output, vec![output.choice.token], made)],
            usage,
        );
        self.open == 0
    }

    fn end(&mut self, events: &mut Events) {
        if self.options.include_usage {
            let usage = self.tally(self.made.iter().sum()).last(&self.engine, false);
            self.push(events, Vec::new(), Some(usage));
        }
        events.push_back(Piece::Data(DONE.to_owned()));
    }
}
