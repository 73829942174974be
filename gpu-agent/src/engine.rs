//! Watches one engine: detects it, polls its health and load, follows its KV events, and begins again when it died.
//!
//! What is learnt goes into the engine's `Cell` of the hub. What endpoints mean is `detect`'s and the dialects' below;
//! the order of events is `zmq_events`'.

pub(crate) mod sglang;
pub(crate) mod vllm;

use crate::detect::{Detected, detect, read_models};
use crate::http::{ApiKey, HttpClient, HttpError};
use crate::hub::Cell;
use crate::lineage::Lineage;
use crate::load::{Figures, parse};
use crate::trtllm_events;
use crate::zmq_events::{BeginReason, EventSource, RankEvent, follow};
use http::StatusCode;
use outrigger_xds::block_hash::BLOCK_TOKENS_DEFAULT;
use outrigger_xds::report::{EngineId, EngineKind, EngineState, Health, Model, Role};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

/// Longest wait between two tries of a dead engine.
const DEAD_RETRY_MAX: Duration = Duration::from_secs(1);
/// Wait before asking again where the key was refused, or `/server_info` did not come.
const UNAUTHORIZED_RETRY: Duration = Duration::from_secs(30);
/// How often the list of models is read again (adapters come and go at run time).
const MODELS_INTERVAL: Duration = Duration::from_secs(5);
/// Polls that may fail in a row, otherwise than by a refused connection, before an engine counts as dead.
const MISSES_MAX: u32 = 3;
/// Batches waiting between the subscriptions and the index; a full queue slows the reading down.
const EVENTS_MAX: usize = 256;

/// How to reach an engine and how to look at it.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Its name in the fleet.
    pub id: EngineId,
    /// `http://host:port`.
    pub url: String,
    /// What it is used for.
    pub role: Role,
    /// Where it meets engines that decode, `host:port`, if not where it says itself.
    pub bootstrap: Option<String>,
    /// Sets it apart from engines with which its answers are not to be compared, where they do not show that themselves.
    pub cohort: Option<String>,
    /// Sent as `Authorization: Bearer`.
    pub api_key: Option<ApiKey>,
    /// Between two polls of health and load. Default 500 ms; a dead engine is tried at most a second apart.
    pub poll_interval: Duration,
    /// Tokens in a canonical block. Default 32.
    pub block_tokens: usize,
    /// Where KV events come from, for engines that do not say (vLLM before 0.31).
    pub kv_endpoints: Option<KvEndpoints>,
    /// Longest wait for an answer of the engine's own endpoints. Default 2 s.
    pub request_timeout: Duration,
    /// Longest wait for TensorRT-LLM's KV events: it answers when nothing happened for 2 s, so on a busy engine not at
    /// all. Default 8 s.
    pub kv_events_timeout: Duration,
    /// Longest answer read. Default 16 MiB.
    pub response_bytes_max: usize,
    /// Engine blocks tracked at most. Default 2,000,000 (some 200 bytes each).
    pub blocks_max: usize,
}

impl EngineConfig {
    /// The defaults for an engine at `url`.
    #[must_use]
    pub fn new(id: EngineId, url: impl Into<String>) -> Self {
        Self {
            id,
            url: url.into(),
            role: Role::Both,
            bootstrap: None,
            cohort: None,
            api_key: None,
            poll_interval: Duration::from_millis(500),
            block_tokens: BLOCK_TOKENS_DEFAULT,
            kv_endpoints: None,
            request_timeout: Duration::from_secs(2),
            kv_events_timeout: Duration::from_secs(8),
            response_bytes_max: 16 << 20,
            blocks_max: 2_000_000,
        }
    }
}

/// KV event endpoints as they stand in an engine's configuration; both ports grow by one a data-parallel rank.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KvEndpoints {
    /// `tcp://HOST:PORT` of rank 0.
    pub endpoint: String,
    /// The same of the replay socket.
    pub replay_endpoint: Option<String>,
    /// Topic prefix.
    pub topic: String,
}

impl KvEndpoints {
    pub(crate) fn sources(&self, host: &str, ranks: u32) -> Vec<EventSource> {
        let of_rank = |endpoint: &str, rank: u32| {
            let (host, port) = endpoint.rsplit_once(':')?;
            Some(format!(
                "{host}:{}",
                port.parse::<u32>().ok()?.checked_add(rank)?
            ))
        };
        (0..ranks)
            .filter_map(|rank| {
                let replay = self
                    .replay_endpoint
                    .as_deref()
                    .and_then(|replay| of_rank(replay, rank));
                EventSource::from_endpoint(
                    rank,
                    &of_rank(&self.endpoint, rank)?,
                    replay.as_deref(),
                    &self.topic,
                    host,
                )
            })
            .collect()
    }
}

/// Watches until it is aborted.
pub(crate) async fn run(cell: Arc<Cell>, config: EngineConfig) {
    let client = HttpClient::new(
        &config.url,
        config.api_key.clone(),
        config.request_timeout,
        config.response_bytes_max,
    );
    let client = match client {
        Ok(client) => Arc::new(client),
        Err(error) => return cell.end(error.to_string()),
    };
    loop {
        let reason = match detect(&client, &config).await {
            Ok(detected) => watch(&cell, &client, &config, detected).await,
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = reason {
            cell.end(reason);
            sleep(config.poll_interval.min(DEAD_RETRY_MAX)).await;
        }
    }
}

/// What the poller saw.
enum Seen {
    Figures(Figures),
    Models(Vec<Model>),
    Unauthorized(String),
    /// It does not answer; why.
    Dead(String),
    /// It is another process, serves another model, or lets us in now.
    Changed,
}

/// Watches a detected engine; returns why it is dead, or `None` if it has to be detected again at once.
async fn watch(
    cell: &Cell,
    client: &Arc<HttpClient>,
    config: &EngineConfig,
    detected: Detected,
) -> Option<String> {
    let model = base_model(&detected.state.models).to_owned();
    let (events_sender, mut events) = mpsc::channel(EVENTS_MAX);
    let (seen_sender, mut seen) = mpsc::channel(1);
    let mut reasons = Reasons {
        denied: detected.state.reason.clone(),
        is_asleep: detected.state.health == Health::Draining,
        ..Reasons::default()
    };
    let mut ranks = Ranks::new(&detected);
    // Dropping a set ends its tasks.
    let mut poller = JoinSet::new();
    let mut followers = follow_all(config, &detected, &events_sender);
    cell.begin(
        detected.state.clone(),
        Lineage::new(model, config.block_tokens, config.blocks_max),
    );
    poller.spawn(
        Poller::new(Arc::clone(client), config, detected, cell.id().to_string()).run(seen_sender),
    );
    loop {
        tokio::select! {
            seen = seen.recv() => match seen {
                None => return Some("the poller ended".to_owned()),
                Some(Seen::Dead(reason)) => return Some(reason),
                Some(Seen::Changed) => return None,
                Some(Seen::Models(models)) => cell.set_state(|state| state.models = models),
                Some(Seen::Unauthorized(what)) => reasons.denied = format!("{what}: the API key is missing or wrong"),
                Some(Seen::Figures(figures)) => {
                    reasons.is_asleep = figures.is_asleep;
                    if let (Some(running), Some(waiting)) = (figures.running, figures.waiting) {
                        cell.set_load((running, waiting), &figures);
                    }
                    // The engine allots its blocks after it has begun to answer.
                    if let Some(blocks) = figures.kv_blocks {
                        cell.set_state(|state| state.kv_blocks = blocks);
                    }
                }
            },
            Some((rank, event)) = events.recv() => ranks.on_event(cell, rank, event),
            how = ended(&mut followers) => {
                metrics::counter!("outrigger_kv_event_followers_lost_total", "engine" => cell.id().to_string()).increment(1);
                tracing::error!(engine = %cell.id(), how, "nobody follows its KV events any more: detecting anew");
                // Not at once: what ended it may be the first thing the engine sends.
                sleep(config.poll_interval).await;
                return None;
            }
        }
        reasons.sizes = sizes_reason(&cell.unfit_sizes(), config.block_tokens);
        reasons.events = ranks.reason();
        cell.set_state(|state| {
            state.kv_events = ranks.all_connected();
            ranks.fill_in_learnt(state);
            state.health = health(reasons.is_asleep);
            state.reason = reasons.text();
        });
    }
}

/// Follows the events of all ranks.
fn follow_all(
    config: &EngineConfig,
    detected: &Detected,
    events: &mpsc::Sender<(u32, RankEvent)>,
) -> JoinSet<()> {
    let mut followers = JoinSet::new();
    for source in &detected.sources {
        followers.spawn(follow(
            source.clone(),
            config.id.to_string(),
            events.clone(),
        ));
    }
    if detected.drains_events {
        let polling = trtllm_events::Polling::new(config, events.clone());
        followers.spawn(polling.run());
    }
    followers
}

/// Completes when following a rank's events ended, which it never should while the engine is watched; says how.
async fn ended(followers: &mut JoinSet<()>) -> String {
    match followers.join_next().await {
        Some(Ok(())) => "it ended".to_owned(),
        Some(Err(error)) => error.to_string(),
        // An engine without KV events.
        None => std::future::pending().await,
    }
}

/// Why things are not as they could be, by cause.
#[derive(Default)]
struct Reasons {
    is_asleep: bool,
    denied: String,
    events: String,
    sizes: String,
}

impl Reasons {
    fn text(&self) -> String {
        let asleep = if self.is_asleep { "asleep" } else { "" };
        let parts = [asleep, &self.denied, &self.events, &self.sizes];
        let said = parts.into_iter().filter(|part| !part.is_empty());
        said.collect::<Vec<_>>().join("; ")
    }
}

/// One that sleeps answers, and must get no requests until it is woken.
pub(crate) fn health(is_asleep: bool) -> Health {
    if is_asleep {
        Health::Draining
    } else {
        Health::Healthy
    }
}

fn sizes_reason(unfit: &[usize], block_tokens: usize) -> String {
    if unfit.is_empty() {
        return String::new();
    }
    format!(
        "KV blocks of {unfit:?} tokens do not fit canonical blocks of {block_tokens} and are not indexed"
    )
}

/// The subscriptions of an engine's ranks.
struct Ranks {
    states: BTreeMap<u32, RankState>,
    /// Tokens in an engine block, as its events have it; `None` where the engine says it itself.
    block_tokens: Option<u32>,
}

struct RankState {
    /// `Err` says why not.
    connected: Result<(), String>,
    /// Between `Begin` and `Settled` changes are not told one by one.
    silent: bool,
    /// How often its history began.
    histories: u32,
    complete: bool,
}

impl RankState {
    fn new() -> Self {
        Self {
            connected: Err(String::new()),
            silent: true,
            histories: 0,
            complete: false,
        }
    }
}

impl Ranks {
    fn new(detected: &Detected) -> Self {
        // Further ones show with their events.
        let asked = detected.drains_events.then_some(0);
        let told = detected.sources.iter().map(|source| source.rank);
        Self {
            states: told
                .chain(asked)
                .map(|rank| (rank, RankState::new()))
                .collect(),
            block_tokens: (detected.state.block_tokens == 0).then_some(0),
        }
    }

    fn on_event(&mut self, cell: &Cell, rank: u32, event: RankEvent) {
        let state = self.states.entry(rank).or_insert_with(RankState::new);
        match event {
            RankEvent::Connected => state.connected = Ok(()),
            RankEvent::Lost(reason) => state.connected = Err(reason),
            RankEvent::Begin(reason) => {
                state.silent = true;
                state.complete = false;
                cell.void(rank, state.histories == 0 && reason == BeginReason::Start);
                state.histories += 1;
            }
            RankEvent::Batch(batch) => {
                let size = batch.block_tokens();
                self.block_tokens = self.block_tokens.map(|known| known.max(size));
                cell.apply(rank, &batch, state.silent);
            }
            RankEvent::Settled { complete } => {
                state.silent = false;
                state.complete = complete;
                cell.settle(self.states.values().all(|state| state.complete));
            }
        }
    }

    /// Fills in what only events say of an engine that tells it nowhere else.
    fn fill_in_learnt(&self, state: &mut EngineState) {
        let ranks = self.states.keys().last().map_or(0, |last| last + 1);
        state.dp_size = state.dp_size.max(ranks);
        if let Some(learnt) = self.block_tokens {
            state.block_tokens = learnt;
        }
    }

    fn all_connected(&self) -> bool {
        !self.states.is_empty() && self.states.values().all(|state| state.connected.is_ok())
    }

    fn reason(&self) -> String {
        let lost = |(rank, state): (&u32, &RankState)| match &state.connected {
            Err(reason) if !reason.is_empty() => {
                Some(format!("KV events of rank {rank}: {reason}"))
            }
            _ => None,
        };
        self.states
            .iter()
            .filter_map(lost)
            .collect::<Vec<_>>()
            .join("; ")
    }
}

/// The name that KV blocks are hashed under.
fn base_model(models: &[Model]) -> &str {
    models.first().map_or("", |model| model.id.as_str())
}

/// Asks the engine at intervals.
struct Poller {
    client: Arc<HttpClient>,
    engine: String,
    poll_interval: Duration,
    kind: EngineKind,
    process_start: Option<f64>,
    models: Vec<Model>,
    has_metrics: bool,
    has_health: bool,
    /// Was refused at detection, or not told all: an answer now means detecting again.
    detect_again: bool,
    misses: u32,
    metrics_after: Instant,
    models_after: Instant,
}

impl Poller {
    fn new(
        client: Arc<HttpClient>,
        config: &EngineConfig,
        detected: Detected,
        engine: String,
    ) -> Self {
        let shut_out = detected.unauthorized.is_some();
        if shut_out {
            metrics::counter!("outrigger_engine_unauthorized_total", "engine" => engine.clone())
                .increment(1);
        }
        let detect_again = shut_out || detected.lacks_server_info;
        Self {
            client,
            engine,
            poll_interval: config.poll_interval,
            kind: detected.state.kind,
            process_start: detected.process_start,
            models: detected.state.models,
            has_metrics: detected.has_metrics,
            has_health: detected.has_health,
            detect_again,
            misses: 0,
            metrics_after: Instant::now(),
            models_after: Instant::now()
                + if detect_again {
                    UNAUTHORIZED_RETRY
                } else {
                    MODELS_INTERVAL
                },
        }
    }

    async fn run(mut self, seen: mpsc::Sender<Seen>) {
        let mut ticks = interval(self.poll_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let outcome = match self.poll(&seen).await {
                Ok(None) => {
                    self.misses = 0;
                    continue;
                }
                Ok(Some(last)) => last,
                Err(HttpError::Refused) => Seen::Dead(HttpError::Refused.to_string()),
                Err(error) => {
                    self.misses += 1;
                    if self.misses < MISSES_MAX {
                        continue;
                    }
                    Seen::Dead(error.to_string())
                }
            };
            // The watcher ends with this, and we with it.
            let _ = seen.send(outcome).await;
            return;
        }
    }

    /// One round; `Some` ends the watching.
    async fn poll(&mut self, seen: &mpsc::Sender<Seen>) -> Result<Option<Seen>, HttpError> {
        let now = Instant::now();
        let with_metrics =
            now >= self.metrics_after && (self.has_metrics || self.kind == EngineKind::Sglang);
        if self.has_health {
            if let (StatusCode::SERVICE_UNAVAILABLE, _) = self.client.get("/health").await? {
                return Ok(Some(Seen::Dead("GET /health answered 503".to_owned())));
            }
        } else if !with_metrics {
            self.client.probe().await?;
        }
        if with_metrics && let Some(last) = self.poll_load(seen).await? {
            return Ok(Some(last));
        }
        if now >= self.models_after {
            return self.poll_models(seen).await;
        }
        Ok(None)
    }

    async fn poll_load(&mut self, seen: &mpsc::Sender<Seen>) -> Result<Option<Seen>, HttpError> {
        let path = if self.has_metrics {
            "/metrics"
        } else {
            "/v1/loads"
        };
        let (status, body) = self.client.get(path).await?;
        if self.denied(status, path, seen).await {
            self.metrics_after = Instant::now() + UNAUTHORIZED_RETRY;
        }
        if status != StatusCode::OK {
            return Ok(None);
        }
        let figures = if self.has_metrics {
            Some(parse(&String::from_utf8_lossy(&body)))
        } else {
            sglang::read_loads(&body)
        };
        let Some(figures) = figures else {
            return Ok(None);
        };
        if self.process_start.is_some()
            && figures.process_start.is_some()
            && figures.process_start != self.process_start
        {
            tracing::info!(
                engine = self.engine,
                "another process answers: detecting anew"
            );
            return Ok(Some(Seen::Changed));
        }
        let _ = seen.send(Seen::Figures(figures)).await;
        Ok(None)
    }

    async fn poll_models(&mut self, seen: &mpsc::Sender<Seen>) -> Result<Option<Seen>, HttpError> {
        self.models_after = Instant::now() + MODELS_INTERVAL;
        let (status, body) = self.client.get("/v1/models").await?;
        if self.denied(status, "/v1/models", seen).await {
            self.models_after = Instant::now() + UNAUTHORIZED_RETRY;
        }
        if status != StatusCode::OK {
            return Ok(None);
        }
        let models = read_models(&body);
        if self.detect_again || base_model(&models) != base_model(&self.models) {
            return Ok(Some(Seen::Changed));
        }
        // Some engines date each entry anew in every answer: that is no change.
        let same = |(new, old): (&Model, &Model)| {
            (&new.id, &new.parent, &new.root) == (&old.id, &old.parent, &old.root)
        };
        if models.len() != self.models.len() || !models.iter().zip(&self.models).all(same) {
            self.models.clone_from(&models);
            let _ = seen.send(Seen::Models(models)).await;
        }
        Ok(None)
    }

    async fn denied(&self, status: StatusCode, path: &str, seen: &mpsc::Sender<Seen>) -> bool {
        let denied = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        if denied {
            metrics::counter!("outrigger_engine_unauthorized_total", "engine" => self.engine.clone()).increment(1);
            let _ = seen
                .send(Seen::Unauthorized(format!("GET {path} answered {status}")))
                .await;
        }
        denied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_follower_that_died_is_noticed_and_an_engine_without_any_is_not_disturbed() {
        let mut followers = JoinSet::new();
        let none = tokio::time::timeout(Duration::from_millis(20), ended(&mut followers)).await;
        assert!(none.is_err(), "{none:?}");
        followers.spawn(std::future::pending());
        followers.spawn(async { panic!("a bug") });
        let how = ended(&mut followers).await;
        assert!(how.contains("a bug"), "{how}");
    }
}
