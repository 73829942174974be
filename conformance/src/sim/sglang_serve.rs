//! Answers "how does a generation of SGLang run": whole or as one leg of two, told in one piece or as a stream.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt, stream};

use super::api::{self, ApiError, Fields, Flight};
use super::bootstrap::{self, Leg};
use super::engine::Engine;
use super::feed::{Events, Feed, Writer};
use super::http::{Body, Piece, Response};
use super::nixl::Transfer;
use super::scheduler::{Output, Sampling};
use super::sglang;

type Pieces = Pin<Box<dyn Stream<Item = Piece> + Send>>;

/// A generation request, read and checked.
pub(crate) struct Asked {
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) sampling: Sampling,
    pub(crate) n: usize,
    pub(crate) cache_salt: Option<String>,
    pub(crate) stream: bool,
    pub(crate) leg: Leg,
    pub(crate) flight: Flight,
}

/// How an endpoint tells it.
pub(crate) trait Form: Writer + 'static {
    /// In one piece.
    fn whole(&self, outputs: &[Vec<Output>]) -> String;
}

impl Asked {
    /// Reads what all endpoints have; `params` has the sampling fields.
    pub(crate) fn read(
        engine: &Arc<Engine>,
        fields: &Fields,
        params: &Fields,
        prompts: Vec<Vec<u32>>,
        max_tokens: Option<usize>,
    ) -> Result<Self, ApiError> {
        check_priority(engine, fields)?;
        for prompt in &prompts {
            check_length(engine, prompt.len())?;
        }
        let sampling = read_sampling(engine, params, &prompts, max_tokens)?;
        let n = api::read_n(params)?;
        let leg = bootstrap::leg(engine, fields)?;
        if leg != Leg::Whole && n * prompts.len() > 1 {
            return Err(ApiError::not_implemented("rooms for several sequences"));
        }
        let id = api::text(fields, "rid").map_or_else(
            || format!("{}{}", engine.made_up_id(), engine.made_up_id()),
            str::to_owned,
        );
        Ok(Self {
            prompts,
            sampling,
            n,
            cache_salt: api::text(fields, "cache_salt").map(str::to_owned),
            stream: api::flag(fields, "stream"),
            leg,
            flight: Flight::named(engine, id)?,
        })
    }

    pub(crate) fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    fn begin(self, engine: &Arc<Engine>) -> Feed {
        let one = |prompt: &Vec<u32>| vec![(prompt.clone(), self.sampling.clone()); self.n];
        let sequences = self.prompts.iter().flat_map(one).collect();
        let generation = engine.generate(sequences, self.cache_salt.as_deref());
        Feed::new(engine, generation, self.flight)
    }
}

fn check_priority(engine: &Engine, fields: &Fields) -> Result<(), ApiError> {
    let given = fields.get("priority").is_some_and(|value| !value.is_null());
    if !given || !engine.config.abort_on_priority {
        return Ok(());
    }
    let message =
        "Using priority is disabled for this server. Please send a new request without a priority.";
    Err(ApiError::new(503, "ServiceUnavailable", message, None))
}

fn check_length(engine: &Engine, tokens: usize) -> Result<(), ApiError> {
    let longest = engine.config.max_model_len;
    if tokens < longest {
        return Ok(());
    }
    let message = format!(
        "The input ({tokens} tokens) is longer than the model's context length ({longest} tokens)."
    );
    Err(ApiError::new(400, "BadRequestError", message, None))
}

fn read_sampling(
    engine: &Engine,
    params: &Fields,
    prompts: &[Vec<u32>],
    max_tokens: Option<usize>,
) -> Result<Sampling, ApiError> {
    let temperature = params
        .get("temperature")
        .and_then(serde_json::Value::as_f64);
    if let Some(temperature) = temperature.filter(|temperature| *temperature < 0.0) {
        let message =
            format!("temperature must be a non-negative finite number, got {temperature:?}.");
        return Err(ApiError::new(400, "BadRequestError", message, None));
    }
    for (name, what) in [
        ("logprobs", "logprobs"),
        ("return_logprob", "logprobs"),
        ("top_logprobs", "logprobs"),
        ("regex", "structured output"),
        ("ebnf", "structured output"),
        ("json_schema", "structured output"),
        ("image_data", "media"),
        ("lora_path", "LoRA"),
    ] {
        let given = params
            .get(name)
            .is_some_and(|value| !value.is_null() && *value != serde_json::Value::Bool(false));
        if given {
            return Err(ApiError::not_implemented(what));
        }
    }
    api::check_simulated(params, &[])?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let left = engine.config.max_model_len - longest;
    // It generates what there is room for.
    let max_tokens = max_tokens.map(|wanted| wanted.min(left));
    api::read_sampling(engine, params, max_tokens, longest)
}

/// Generates and tells.
pub(crate) async fn respond(
    engine: &Arc<Engine>,
    asked: Asked,
    form: impl Form,
) -> Result<Response, ApiError> {
    if !asked.stream {
        let outputs = match run(engine, asked).await? {
            Begun::Feed(mut feed, choices) => match feed.collect(choices).await {
                Ok(outputs) => outputs,
                Err(broken) => return Ok(broken),
            },
            Begun::All(outputs) => outputs,
            Begun::Broken(how) => return Ok(how),
        };
        return Ok(Response::json(200, form.whole(&outputs)));
    }
    let engine = Arc::clone(engine);
    let pieces = async move {
        let pieces: Pieces = match run(&engine, asked).await {
            Ok(Begun::Feed(feed, _)) => Box::pin(feed.into_stream(form)),
            Ok(Begun::All(outputs)) => Box::pin(stream::iter(all(form, outputs))),
            Ok(Begun::Broken(how)) => match how.body {
                Body::Broken(piece) => Box::pin(stream::iter([piece])),
                Body::Full(_) | Body::Stream(_) => Box::pin(stream::iter([Piece::Truncate])),
            },
            Err(error) => {
                let events = sglang::error_events(&error);
                Box::pin(stream::iter(events.map(Piece::Data)))
            }
        };
        pieces
    };
    Ok(Response::events(stream::once(pieces).flatten()))
}

fn all(mut form: impl Form, outputs: Vec<Vec<Output>>) -> Events {
    let mut events = Events::new();
    form.begin(&mut events);
    let mut over = false;
    for output in outputs.into_iter().flatten() {
        over = form.token(output, &mut events);
    }
    if over {
        form.end(&mut events);
    }
    events
}

/// A generation that runs, or that was one leg and is over.
enum Begun {
    Feed(Feed, usize),
    All(Vec<Vec<Output>>),
    Broken(Response),
}

async fn run(engine: &Arc<Engine>, mut asked: Asked) -> Result<Begun, ApiError> {
    let choices = asked.choices();
    match asked.leg.clone() {
        Leg::Whole => {}
        Leg::Decode { address, room } => {
            let tokens = bootstrap::fetch(engine, address, room).await?;
            asked.sampling.transfer = Transfer::Pulled(tokens);
        }
        Leg::Prefill { room } => {
            let socket = bootstrap::meet(engine, room).await?;
            asked.sampling.max_tokens = 1;
            asked.sampling.min_tokens = 0;
            let prompt = asked.prompts[0].clone();
            let mut feed = asked.begin(engine);
            let outputs = match feed.collect(1).await {
                Ok(outputs) => outputs,
                Err(broken) => return Ok(Begun::Broken(broken)),
            };
            bootstrap::hand_over(engine, socket, &prompt).await?;
            return Ok(Begun::All(outputs));
        }
    }
    Ok(Begun::Feed(asked.begin(engine), choices))
}
