//! The two seams: a filter around the rest of the chain, and observers of whole stream events.

use crate::{
    body::{RequestBody, ResponseBody, Upload, UploadState},
    end_address::EndAddress,
    endpoints::{Endpoint, Part, Place, clock_ms},
    error::{Error, GivenUp},
    openai::OpenAiRequest,
    router::{attempt::ATTEMPT_COUNT_HEADER, hash::Hashes, mirror::Mirror, retry::Policy},
    sse::Event,
    trace::Trace,
};
use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, StatusCode};
use outrigger_xds::{block_hash::BlockHash, report::EngineId, resource::route_action::Priority};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// What a filter gives: a response, or whatever kept it from beginning.
pub type Handled<'a> = BoxFuture<'a, Result<Response<ResponseBody>, Error>>;

/// Seam (a): a function around the rest of the chain.
///
/// It may answer itself, call `next` never, once or more often (each further call with a [`RequestBody::replay`] and
/// a [`Context::fork`]), and wrap the response. Filters above it run once per request, those below once per call.
///
/// An implementation is `Box::pin(async move { … })`, or hands the rest of the chain's future on if it has nothing to
/// add: one allocation a filter at most.
pub trait HttpFilter: Send + Sync {
    /// Handles one request.
    ///
    /// # Errors
    /// Whatever kept the response from beginning; the connection manager turns it into a local reply.
    fn handle<'a>(
        &'a self,
        request: Request<RequestBody>,
        context: &'a mut Context,
        next: Next<'a>,
    ) -> Handled<'a>;
}

/// A chain, ready to run; shared by all requests of a route.
pub type Chain = Arc<[Arc<dyn HttpFilter>]>;

/// The rest of the chain.
#[derive(Clone, Copy)]
pub struct Next<'a> {
    rest: &'a [Arc<dyn HttpFilter>],
}

impl<'a> Next<'a> {
    /// A chain of its own, for who calls it again when `handle` is long over.
    #[must_use]
    pub fn keep(self) -> Chain {
        Arc::from(self.rest)
    }

    /// The whole chain.
    #[must_use]
    pub fn new(chain: &'a [Arc<dyn HttpFilter>]) -> Self {
        Self { rest: chain }
    }

    /// Runs it.
    ///
    /// # Errors
    /// As [`HttpFilter::handle`]; also if the chain has no terminal filter, which configuration checks rule out.
    pub fn run(self, request: Request<RequestBody>, context: &'a mut Context) -> Handled<'a> {
        match self.rest.split_first() {
            Some((filter, rest)) => filter.handle(request, context, Next { rest }),
            None => Box::pin(std::future::ready(Err(Error::no_healthy_upstream()))),
        }
    }
}

/// Facts of the matched route, pinned for the request.
#[derive(Debug, Clone, Default)]
pub struct RouteFacts {
    /// Route name; may be empty.
    pub name: Arc<str>,
    /// Virtual host name.
    pub virtual_host: Arc<str>,
    /// Cluster; resolved by name at each use, in the state of that moment.
    pub cluster: Arc<str>,
    /// From the whole request to the whole response; `None` is off.
    pub timeout: Option<Duration>,
    /// `max_grpc_timeout`: what [`timeout`](Self::timeout) is for gRPC; zero is what its client says.
    pub max_grpc_timeout: Option<Duration>,
    /// Between two reads, instead of the listener's; zero is off.
    pub idle_timeout: Option<Duration>,
    /// From the request's first byte to the response's last.
    pub max_stream_duration: Option<Duration>,
    /// Explicit `retry_policy`; without one our defaults hold.
    pub retry_policy: Option<Arc<Policy>>,
    /// Which circuit breakers count.
    pub priority: Priority,
    /// What is hashed, for policies that choose by hash.
    pub hashes: Option<Arc<Hashes>>,
    /// On the inbound side the chain never chooses: the peer named the endpoint.
    pub inbound: bool,
    /// Status where the cluster does not exist; 503 unless said.
    pub cluster_not_found: Option<StatusCode>,
    /// The host becomes the endpoint's name, if it has one.
    pub auto_host_rewrite: Option<AutoHost>,
    /// Who gets a copy.
    pub mirrors: Arc<[Mirror]>,
    /// Requests carry `x-envoy-attempt-count`.
    pub attempts_to_upstream: bool,
    /// Responses carry `x-envoy-attempt-count`.
    pub attempts_to_client: bool,
    /// Requests carry `x-envoy-expected-rq-timeout-ms`, if the route has a timeout.
    pub tell_timeout: bool,
}

/// How `auto_host_rewrite` is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AutoHost {
    /// The host that was replaced is appended to `x-forwarded-host`.
    pub append_forwarded: bool,
    /// …and told in `x-envoy-original-host`.
    pub tell_original: bool,
}

/// What a route does to the heads of one request and of its response, at the place where Envoy does it: in the router.
pub trait Heads: Send + Sync {
    /// Changes the request before it goes upstream.
    fn request(&self, request: &mut Request<RequestBody>, log: &LogFields);

    /// Changes the response as it comes from upstream, or is made here.
    fn response(&self, response: &mut Response<ResponseBody>, log: &LogFields);
}

/// One candidate, best first in [`Context::ranked`].
#[derive(Debug, Clone)]
pub struct Ranked {
    /// Which endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Data-parallel rank, where the engine has several.
    pub rank: Option<u32>,
    /// Its cost; lower is better.
    pub cost: f64,
    /// Prompt tokens predicted to be cached there; `None` where nothing can be predicted.
    pub hit_tokens: Option<u64>,
}

/// What a filter knows of the prompt; told along to the proxy beside the engine.
#[derive(Debug, Clone, Default)]
pub struct PromptFacts {
    /// Prompt tokens, exact or estimated; 0 if unknown.
    pub tokens: u64,
    /// Chain hashes of its full blocks.
    pub blocks: Arc<[BlockHash]>,
    /// Its token ids, where they are exact and somebody keeps them. They stay at this proxy.
    pub ids: Option<Arc<[u32]>>,
}

/// What a request carries along the chain.
#[derive(Default)]
pub struct Context {
    /// The matched route.
    pub route: Arc<RouteFacts>,
    /// Our id of the request (`x-request-id`).
    pub request_id: Arc<str>,
    /// The connection it came on: the client's address, and ours.
    pub connection: Option<(EndAddress, EndAddress)>,
    /// Where that connection was sent before it was redirected to us.
    pub original_dst: Option<SocketAddr>,
    /// When its head came.
    pub received: Option<Instant>,
    /// Tells how far its body is, if it was not all here with the head.
    pub upload: Option<Upload>,
    /// What `openai` parsed.
    pub openai: Option<Arc<OpenAiRequest>>,
    /// Candidates left by a routing filter, best first; empty means the cluster's own policy.
    pub ranked: Vec<Ranked>,
    /// What is known of the prompt.
    pub prompt: PromptFacts,
    /// Somebody will need its token ids, should routing find them.
    pub keeps_prompt_ids: bool,
    /// Endpoint named by the peer (inbound only).
    pub named: Option<EngineId>,
    /// Hit tokens the peer predicted, if it did (inbound only).
    pub told_hit_tokens: Option<u64>,
    /// Whether the client may see and asked for debug headers.
    pub debug: bool,
    /// It asks for another protocol on its connection.
    pub upgrade: bool,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// What of the request is asked for.
    pub part: Part,
    /// Held for the coming attempt, which takes it if it goes there.
    pub place: Option<Place>,
    /// Nobody else can answer it: what it is about is there alone.
    pub only: Option<Arc<Endpoint>>,
    /// The response that it creates is to tell its engine by its id.
    pub tells_owner: bool,
    /// The same request was sent before, to be answered by another: mirrors and counts of requests have it already.
    pub again: bool,
    /// The engine to pass over while there is another.
    pub avoid: Option<EngineId>,
    /// Engines that had this request and failed it before its response began.
    pub losses: Vec<Loss>,
    /// So many are enough: it is not tried on another engine. 0: no limit but that of retries.
    pub deaths_max: usize,
    /// Told why we give up what runs; shared by all attempts and legs.
    pub given_up: GivenUp,
    /// A filter watches the time between events itself.
    pub watches_gaps: bool,
    /// Seam (b), in the order of registration.
    pub observers: Vec<Box<dyn StreamObserver>>,
    /// What the access log will say.
    pub log: LogFields,
    /// What the route does to heads, if anything.
    pub heads: Option<Arc<dyn Heads>>,
    /// The response's head is as the route wants it.
    pub response_edited: bool,
    /// If it is traced.
    pub trace: Option<Arc<Trace>>,
    /// For filters outside this crate.
    pub extensions: http::Extensions,
}

impl Context {
    /// A context for one more attempt: same request, no observers, no ranking, an empty log.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            route: self.route.clone(),
            request_id: self.request_id.clone(),
            connection: self.connection.clone(),
            original_dst: self.original_dst,
            received: self.received,
            upload: self.upload.clone(),
            openai: self.openai.clone(),
            ranked: Vec::new(),
            prompt: self.prompt.clone(),
            keeps_prompt_ids: self.keeps_prompt_ids,
            named: self.named.clone(),
            told_hit_tokens: self.told_hit_tokens,
            debug: self.debug,
            upgrade: self.upgrade,
            attempt: self.attempt + 1,
            part: self.part,
            place: None,
            only: self.only.clone(),
            tells_owner: self.tells_owner,
            again: self.again,
            avoid: self.avoid.clone(),
            losses: self.losses.clone(),
            deaths_max: self.deaths_max,
            given_up: self.given_up.clone(),
            watches_gaps: false,
            observers: Vec::new(),
            log: LogFields::default(),
            heads: self.heads.clone(),
            response_edited: false,
            trace: self.trace.clone(),
            extensions: self.extensions.clone(),
        }
    }

    /// Limit of the whole exchange: `openai`'s for generations, else the route's.
    #[must_use]
    pub fn total_timeout(&self) -> Option<Duration> {
        match &self.openai {
            Some(openai) if openai.may_stream_tokens() => openai.limits.total_timeout,
            _ => self.route.timeout,
        }
    }

    /// When the whole request was here: from then on limits of its response count. Now, while it is still coming.
    #[must_use]
    pub fn complete_since(&self) -> Instant {
        let now = Instant::now();
        match self.upload.as_ref().map(Upload::state) {
            None => self.received.unwrap_or(now),
            Some(UploadState::Ended(at_ms)) => {
                let passed = Duration::from_millis(clock_ms().saturating_sub(at_ms));
                now.checked_sub(passed).unwrap_or(now)
            }
            Some(UploadState::Runs(_) | UploadState::Broke | UploadState::Malformed) => now,
        }
    }

    /// Whether so many engines broke that it is not tried on another one.
    #[must_use]
    pub fn is_deadly(&self) -> bool {
        let deaths = self.losses.iter().filter(|loss| loss.died);
        self.deaths_max > 0 && deaths.count() >= self.deaths_max
    }

    /// An engine that had this request failed it before its response began.
    pub fn note_loss(&mut self, engine: EngineId, died: bool) {
        let at = Instant::now();
        self.losses.push(Loss { engine, at, died });
    }

    /// Takes over what the attempt that counted left behind.
    pub fn adopt(&mut self, attempt: Self) {
        self.attempt = attempt.attempt;
        self.losses = attempt.losses;
        self.ranked = attempt.ranked;
        self.prompt = attempt.prompt;
        self.observers.extend(attempt.observers);
        // What was known before any attempt.
        let model = self.log.model.take();
        self.log = attempt.log;
        self.log.model = self.log.model.take().or(model);
        self.response_edited = attempt.response_edited;
    }

    /// Does to the response what the route wants, once.
    pub fn edit_response(&mut self, response: &mut Response<ResponseBody>) {
        if self.response_edited {
            return;
        }
        self.response_edited = true;
        if let Some(heads) = &self.heads {
            heads.response(response, &self.log);
        }
        if self.route.attempts_to_client && self.log.attempts > 0 {
            let count = HeaderValue::from(self.log.attempts);
            response.headers_mut().insert(ATTEMPT_COUNT_HEADER, count);
        }
    }
}

/// An engine that failed a request.
#[derive(Debug, Clone)]
pub struct Loss {
    /// Which.
    pub engine: EngineId,
    /// When.
    pub at: Instant,
    /// It broke, which may be due to the request. Else it said so itself, or was too slow, and may yet turn out to be dead.
    pub died: bool,
}

/// What a request leaves for the access log and metrics, beside what the connection manager sees itself.
#[derive(Debug, Clone, Default)]
pub struct LogFields {
    /// `%RESPONSE_FLAGS%`.
    pub flags: Vec<crate::error::Flag>,
    /// `%RESPONSE_CODE_DETAILS%`; empty means `via_upstream`.
    pub details: String,
    /// `%UPSTREAM_HOST%`: the endpoint that served it.
    pub upstream_host: Option<EngineId>,
    /// `%UPSTREAM_CLUSTER%`.
    pub upstream_cluster: Arc<str>,
    /// `%UPSTREAM_REQUEST_ATTEMPT_COUNT%`.
    pub attempts: u32,
    /// Model the client asked for.
    pub model: Option<Arc<str>>,
    /// `%ROUTING_DECISION%`: policy, inputs, the winner and the runner-up, as one JSON object.
    pub routing_decision: Option<Arc<str>>,
    /// `%DISAGGREGATION%`: whether it was split into prefill and decode, why, and where, as one JSON object.
    pub disaggregation: Option<Arc<str>>,
    /// `%PREFIX_HIT_TOKENS%`: predicted for the endpoint that served it.
    pub hit_tokens_predicted: Option<u64>,
    /// What the engine itself said (`cached_tokens`).
    pub hit_tokens_confirmed: Option<u64>,
    /// From the engine's `usage`, else as known to a filter.
    pub prompt_tokens: Option<u64>,
    /// From the engine's `usage`.
    pub completion_tokens: Option<u64>,
    /// Events of a stream that brought tokens: an estimate of the completion where no `usage` was told.
    pub tokens_seen: Option<u64>,
    /// How often it moved to another engine after its response had begun.
    pub migrations: u32,
    /// Request sent upstream to response headers.
    pub upstream_service_time: Option<Duration>,
}

/// What an observer wants done with an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// Goes on as it came.
    Keep,
    /// Is left out.
    Drop,
    /// These bytes go on instead (a whole event with its blank line).
    Replace(bytes::Bytes),
}

/// How a response body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Whole.
    Complete,
    /// The upstream broke it.
    UpstreamBroke,
    /// The client went away.
    ClientGone,
}

/// Seam (b): sees whole stream events, synchronously. Fed by one splitter per stream.
pub trait StreamObserver: Send + Sync {
    /// One event of an SSE stream. `at` is when its bytes came.
    fn on_event(&mut self, event: &Event<'_>, at: Instant) -> Edit {
        let _ = (event, at);
        Edit::Keep
    }

    /// Bytes of a body that is no SSE stream.
    fn on_chunk(&mut self, chunk: &[u8], at: Instant) {
        let _ = (chunk, at);
    }

    /// The end; the last chance to write to the access log.
    fn on_end(&mut self, end: End, log: &mut LogFields) {
        let _ = (end, log);
    }
}
