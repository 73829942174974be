//! Answers `/v1/completions` and its `/render`: text, token ids and batches of either.

use std::sync::Arc;

use serde::Serialize;
use serde::ser::SerializeMap;
use serde_json::Value;

use super::api::{
    self, ApiError, Fields, Flight, StopReason, StreamOptions, StreamUsage, Tally, Usage, reasons,
    to_json,
};
use super::echo::{Place, prompt_places};
use super::engine::{Engine, unix_s};
use super::feed::{DONE, Events, Feed, Writer};
use super::http::{Piece, Request, Response};
use super::nixl::{self, Params};
use super::rendered::{render_id, rendered};
use super::scheduler::{Output, Sampling};
use super::tokenizer::Tokenizer;

/// Where a chat request may carry its prompt in tokens.
pub(crate) const ENTRANCE: &str = "kv_transfer_params";
/// `max_tokens` of a request that names none.
const MAX_TOKENS_DEFAULT: usize = 16;

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<FullChoice<'a>>,
    service_tier: Option<()>,
    system_fingerprint: &'static str,
    usage: Usage,
    kv_transfer_params: Option<Params>,
    ec_transfer_params: Option<()>,
    metrics: Option<()>,
}

#[derive(Serialize)]
struct FullChoice<'a> {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<Vec<Option<Place>>>,
    prompt_token_ids: Option<&'a [u32]>,
    routed_experts: Option<()>,
}

#[derive(Default, Serialize)]
struct Logprobs {
    text_offset: Vec<usize>,
    /// `null` for the first token of an echoed prompt.
    token_logprobs: Vec<Option<f64>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
}

/// A map in the order of likelihood.
struct TopLogprobs(Vec<(String, f64)>);

impl Serialize for TopLogprobs {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChunkChoice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<StreamUsage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'static str>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    prompt_token_ids: Option<&'a [u32]>,
    token_ids: Option<Vec<u32>>,
}

/// The prompts of `prompt`: a string, ids, or a list of either.
fn read_prompts(engine: &Engine, fields: &Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let prompt = fields.get("prompt").filter(|prompt| !prompt.is_null());
    let one = |prompt: &Value| match prompt {
        Value::String(text) => Some(engine.tokenizer.encode(text)),
        other => api::token_ids(other),
    };
    let prompts = match prompt {
        None => return Err(ApiError::missing("prompt", fields)),
        Some(Value::Array(list)) if !list.is_empty() && !list[0].is_number() => {
            list.iter().map(one).collect()
        }
        Some(prompt) => one(prompt).map(|prompt| vec![prompt]),
    };
    let prompts: Vec<Vec<u32>> = prompts.ok_or_else(|| ApiError::wrong_type("prompt", "string"))?;
    check_vocabulary(engine, prompts.iter().flatten().copied())?;
    Ok(prompts)
}

/// The prompt of a chat in tokens, where it is given beside the messages. Not recorded: what vLLM does with it is read from its
/// source, and an engine may be told not to know it.
pub(crate) fn given_prompt(engine: &Engine, fields: &Fields) -> Result<Option<Vec<u32>>, ApiError> {
    let given = fields.get(ENTRANCE);
    let ids = given.and_then(|given| api::token_ids(given.get("prompt_token_ids")?));
    let other = given.is_some_and(|given| !given.is_null()) && ids.is_none();
    if other && engine.config.nixl.is_none() {
        return Err(ApiError::not_implemented("KV transfer"));
    }
    let ids = ids.filter(|_| engine.config.chat_token_prompts);
    check_vocabulary(engine, ids.iter().flatten().copied())?;
    Ok(ids)
}

/// Refuses ids outside the vocabulary.
pub(crate) fn check_vocabulary(
    engine: &Engine,
    ids: impl Iterator<Item = u32>,
) -> Result<(), ApiError> {
    match ids
        .max()
        .filter(|id| *id as usize >= engine.tokenizer.vocab_size())
    {
        Some(id) => Err(ApiError::new(
            400,
            "BadRequestError",
            format!("Token id {id} is out of vocabulary"),
            None,
        )),
        None => Ok(()),
    }
}

/// A completions request, read and checked.
struct Asked {
    prompts: Vec<Vec<u32>>,
    sampling: Vec<Sampling>,
    n: usize,
    return_token_ids: bool,
    /// The prompt stands before the text.
    echo: bool,
}

fn read(engine: &Engine, fields: &Fields) -> Result<Asked, ApiError> {
    let prompts = read_prompts(engine, fields)?;
    api::check_model(engine, fields)?;
    let takes = match engine.config.nixl {
        Some(_) => &["echo", ENTRANCE][..],
        None => &["echo"],
    };
    api::check_simulated(fields, takes)?;
    let echo = read_echo(fields)?;
    let wanted = api::integer(fields, "max_tokens")?.unwrap_or(MAX_TOKENS_DEFAULT);
    let logprobs = api::integer(fields, "logprobs")?;
    let sampling = |prompt: &Vec<u32>| {
        Ok(Sampling {
            logprobs,
            skip_cache: echo && logprobs.is_some(),
            ..api::read_sampling(engine, fields, Some(wanted), prompt.len())?
        })
    };
    Ok(Asked {
        sampling: prompts
            .iter()
            .map(sampling)
            .collect::<Result<_, ApiError>>()?,
        prompts,
        n: api::read_n(fields)?,
        return_token_ids: api::flag(fields, "return_token_ids"),
        echo,
    })
}

/// Whether the prompt is asked for. The stream of one and a prompt without an answer are not recorded.
fn read_echo(fields: &Fields) -> Result<bool, ApiError> {
    let echo = api::flag(fields, "echo");
    if echo && api::flag(fields, "stream") {
        return Err(ApiError::not_implemented("echo in a stream"));
    }
    if echo && api::integer(fields, "max_tokens")? == Some(0) {
        return Err(ApiError::not_implemented("echo without an answer"));
    }
    Ok(echo)
}

impl Asked {
    fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    fn prompt_ids(&self, choice: usize) -> Option<&[u32]> {
        self.return_token_ids
            .then(|| &self.prompts[choice / self.n][..])
    }

    fn tally(&self, completion_tokens: usize, cached_tokens: Option<usize>) -> Tally {
        Tally {
            prompt_tokens: self.prompts.iter().map(Vec::len).sum(),
            completion_tokens,
            cached_tokens,
        }
    }
}

/// `POST /v1/completions`.
pub(crate) async fn completions(
    engine: &Arc<Engine>,
    request: &Request,
) -> Result<Response, Response> {
    let fields = api::read_fields(request)?;
    let mut asked = read(engine, &fields)?;
    let flight = Flight::begin(engine, request, &fields, "cmpl")?;
    let transfer = nixl::transfer(engine, &fields).await?;
    for sampling in &mut asked.sampling {
        sampling.transfer = transfer.clone();
    }
    let each = asked.prompts.iter().zip(&asked.sampling);
    let sequences = each
        .flat_map(|(prompt, sampling)| vec![(prompt.clone(), sampling.clone()); asked.n])
        .collect();
    let generation = engine.generate(sequences, api::text(&fields, "cache_salt"));
    let mut feed = Feed::new(engine, generation, flight);
    let created = unix_s() as u64;
    if api::flag(&fields, "stream") {
        let writer = CompletionWriter {
            id: feed.id().to_owned(),
            created,
            options: StreamOptions::read(&fields),
            made: vec![0; asked.choices()],
            told: vec![0; asked.choices()],
            open: asked.choices(),
            cached_tokens: None,
            engine: Arc::clone(engine),
            asked,
        };
        return Ok(Response::events(feed.into_stream(writer)));
    }
    let outputs = feed.collect(asked.choices()).await?;
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
    let made = outputs.iter().map(Vec::len).sum();
    let cached_tokens = outputs
        .first()
        .and_then(|choice| choice.first())
        .map(|output| output.cached_tokens);
    to_json(&Completion {
        id,
        object: "text_completion",
        created,
        model: &engine.config.model,
        choices: outputs
            .iter()
            .map(|outputs| full_choice(engine, asked, outputs))
            .collect(),
        service_tier: None,
        system_fingerprint: api::fingerprint(engine),
        usage: asked.tally(made, cached_tokens).usage(engine, false),
        kv_transfer_params: held(engine, &format!("{id}-0"), outputs, asked.prompts[0].len()),
        ec_transfer_params: None,
        metrics: None,
    })
}

/// What is told of blocks that were kept for another engine.
pub(crate) fn held(
    engine: &Engine,
    id: &str,
    outputs: &[Vec<Output>],
    prompt_tokens: usize,
) -> Option<Params> {
    let last = outputs.first()?.last()?;
    let held = last.held.as_ref()?;
    Some(Params::of(
        engine,
        id,
        held,
        prompt_tokens,
        last.cached_tokens,
    ))
}

fn full_choice<'a>(engine: &Engine, asked: &'a Asked, outputs: &[Output]) -> FullChoice<'a> {
    let index = outputs.first().map_or(0, |output| output.index);
    let finish = outputs
        .last()
        .and_then(|output| output.finish.as_ref())
        .map(reasons);
    let (finish_reason, stop_reason) =
        finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
    let mut text = String::new();
    let mut places = None;
    let prompt = &asked.prompts[index / asked.n];
    if asked.echo {
        text = engine.tokenizer.decode(prompt);
        let top = asked.sampling[0].logprobs;
        places = top.map(|top| prompt_places(engine, prompt, top));
    }
    let mut told = Logprobs::default();
    if let Some(places) = &places {
        tell_prompt(&engine.tokenizer, prompt, places, &mut told);
    }
    text.extend(outputs.iter().map(|output| output.text.as_str()));
    FullChoice {
        index,
        text,
        logprobs: logprobs(&engine.tokenizer, asked, outputs, (told, 0)),
        finish_reason,
        stop_reason,
        token_ids: asked
            .return_token_ids
            .then(|| outputs.iter().map(|output| output.choice.token).collect()),
        prompt_logprobs: places,
        prompt_token_ids: asked.prompt_ids(index),
        routed_experts: None,
    }
}

impl Logprobs {
    /// One more token; `told` characters went before the first.
    fn push(&mut self, told: usize, token: String, logprob: Option<f64>, top: Option<TopLogprobs>) {
        let behind = |(offset, last): (&usize, &String)| offset + last.chars().count();
        let offset = self.text_offset.last().zip(self.tokens.last()).map(behind);
        self.text_offset.push(offset.unwrap_or(told));
        self.token_logprobs.push(logprob);
        self.tokens.push(token);
        self.top_logprobs.push(top);
    }
}

/// The tokens of an echoed prompt come first.
fn tell_prompt(
    tokenizer: &Tokenizer,
    prompt: &[u32],
    places: &[Option<Place>],
    out: &mut Logprobs,
) {
    for (&token, place) in prompt.iter().zip(places) {
        let logprob = place.as_ref().and_then(Place::logprob);
        let top = place.as_ref().map(|place| TopLogprobs(place.by_text()));
        out.push(0, tokenizer.decode(&[token]), logprob, top);
    }
}

/// The figures of `outputs` behind those in `out`, before which `told` characters went.
fn logprobs(
    tokenizer: &Tokenizer,
    asked: &Asked,
    outputs: &[Output],
    (mut out, told): (Logprobs, usize),
) -> Option<Logprobs> {
    let top = asked.sampling[0].logprobs?;
    for output in outputs {
        let choice = &output.choice;
        let token = tokenizer.decode(&[choice.token]);
        let others = choice
            .runners_up
            .iter()
            .map(|(id, logprob)| (tokenizer.decode(&[*id]), *logprob));
        let all = std::iter::once((token.clone(), choice.logprob)).chain(others);
        let all = TopLogprobs(all.take(top.max(1)).collect());
        out.push(told, token.clone(), Some(choice.logprob), Some(all));
    }
    Some(out)
}

struct CompletionWriter {
    engine: Arc<Engine>,
    asked: Asked,
    id: String,
    created: u64,
    options: StreamOptions,
    /// Tokens, and characters of text, of each choice so far.
    made: Vec<usize>,
    told: Vec<usize>,
    open: usize,
    cached_tokens: Option<usize>,
}

impl CompletionWriter {
    fn push(
        &self,
        events: &mut Events,
        choices: Vec<ChunkChoice<'_>>,
        usage: Option<StreamUsage>,
        fingerprint: bool,
    ) {
        let chunk = Chunk {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.engine.config.model,
            choices,
            usage,
            system_fingerprint: fingerprint.then(|| api::fingerprint(&self.engine)),
        };
        events.push_back(Piece::Data(format!("data: {}\n\n", to_json(&chunk))));
    }
}

impl Writer for CompletionWriter {
    fn token(&mut self, output: Output, events: &mut Events) -> bool {
        let index = output.index;
        if index == 0 {
            self.cached_tokens = Some(output.cached_tokens);
        }
        let first = self.made[index] == 0;
        self.made[index] += 1;
        let finish = output.finish.as_ref().map(reasons);
        self.open -= usize::from(finish.is_some());
        let (finish_reason, stop_reason) =
            finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
        let logprobs = logprobs(
            &self.engine.tokenizer,
            &self.asked,
            std::slice::from_ref(&output),
            (Logprobs::default(), self.told[index]),
        );
        self.told[index] += output.text.chars().count();
        let usage = self.options.continuous.then(|| {
            Tally {
                prompt_tokens: self.asked.prompts[index / self.asked.n].len(),
                completion_tokens: self.made[index],
                cached_tokens: None,
            }
            .continuous()
        });
        let choice = ChunkChoice {
            index,
            text: output.text,
            logprobs,
            finish_reason,
            stop_reason,
            prompt_token_ids: self.asked.prompt_ids(index).filter(|_| first),
            token_ids: self
                .asked
                .return_token_ids
                .then(|| vec![output.choice.token]),
        };
        self.push(
            events,
            vec![choice],
            usage,
            self.open == 0 && !self.options.include_usage,
        );
        self.open == 0
    }

    fn end(&mut self, events: &mut Events) {
        if self.options.include_usage {
            let tally = self.asked.tally(self.made.iter().sum(), self.cached_tokens);
            self.push(
                events,
                Vec::new(),
                Some(tally.last(&self.engine, false)),
                true,
            );
        }
        events.push_back(Piece::Data(DONE.to_owned()));
    }
}

/// `POST /v1/completions/render`: a list, one element per prompt.
pub(crate) fn render_endpoint(engine: &Engine, request: &Request) -> Result<Response, Response> {
    if !engine.config.scale_out {
        return Err(ApiError::scale_out_disabled().into());
    }
    let fields = api::read_fields(request)?;
    // What render makes of an echo is not recorded.
    api::check_simulated(&fields, &[])?;
    let asked = read(engine, &fields)?;
    let id = render_id(engine, request, &fields, "cmpl");
    let each = asked.prompts.iter().zip(&asked.sampling).enumerate();
    let list: Vec<_> = each
        .map(|(at, (prompt, sampling))| {
            rendered(engine, &fields, format!("{id}-{at}"), prompt, sampling)
        })
        .collect();
    Ok(Response::json(200, to_json(&list)))
}
