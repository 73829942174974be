//! Feeds both ways: what we tell peers of the engines beside us, and what we hear of all others.
//!
//! We tell what the adapters know, with our own account of load put in. We hear from the adapters (embedded), from an
//! agent (gRPC or NATS), and from peers (gRPC), all as the same messages.

use crate::{
    drain::Drain,
    fleet::{Fleet, Source},
    http::FeedService,
    ledger::{Ledger, Ledgers},
};
use ahash::AHashMap;
use futures_util::{StreamExt, stream};
use http::{Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use outrigger_filters::{
    body::{BodyError, ResponseBody},
    error::Flag,
};
use outrigger_xds::{
    feed::{
        self, FeedBody, FeedError, FeedMessage, FeedSource, FeedStream, FeedSubscription,
        FeedTimeouts,
    },
    report::{EngineId, KvSnapshot, Load},
    resource::endpoint::Address,
};
use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{task::JoinHandle, time::Interval};
use tower::ServiceExt;

/// How often a changed load is told.
const LOAD_INTERVAL: Duration = Duration::from_millis(25);
/// First pause before a peer is called again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause before a peer is called again.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// What this proxy tells: the adapters' messages with our account of load in them.
pub struct LocalFeed {
    source: Arc<dyn FeedSource>,
    ledgers: Arc<Ledgers>,
}

impl LocalFeed {
    /// Tells what `source` knows.
    #[must_use]
    pub fn new(source: Arc<dyn FeedSource>, ledgers: Arc<Ledgers>) -> Arc<Self> {
        Arc::new(Self { source, ledgers })
    }
}

impl FeedSource for LocalFeed {
    fn subscribe(&self) -> FeedStream {
        let mut tick = tokio::time::interval(LOAD_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let telling = Telling {
            inner: self.source.subscribe(),
            ledgers: self.ledgers.clone(),
            told: AHashMap::new(),
            queue: VecDeque::new(),
            tick,
        };
        Box::pin(stream::unfold(telling, Telling::next))
    }
}

/// One subscription to [`LocalFeed`].
struct Telling {
    inner: FeedStream,
    ledgers: Arc<Ledgers>,
    told: AHashMap<EngineId, Told>,
    queue: VecDeque<FeedMessage>,
    tick: Interval,
}

struct Told {
    ledger: Arc<Ledger>,
    load: Load,
    epoch: u64,
    seq: u64,
}

impl Telling {
    async fn next(mut self) -> Option<(FeedMessage, Self)> {
        loop {
            if let Some(message) = self.queue.pop_front() {
                return Some((message, self));
            }
            tokio::select! {
                message = self.inner.next() => {
                    let message = self.fill(message?);
                    return Some((message, self));
                }
                _ = self.tick.tick() => self.collect(),
            }
        }
    }

    fn fill(&mut self, mut message: FeedMessage) -> FeedMessage {
        let ledgers = &self.ledgers;
        let told = self
            .told
            .entry(message.engine.clone())
            .or_insert_with(|| Told {
                ledger: ledgers.open(&message.engine),
                load: Load::default(),
                epoch: message.epoch,
                seq: message.seq,
            });
        (told.epoch, told.seq) = (message.epoch, message.seq);
        if let FeedBody::Load(load) = &mut message.body {
            told.ledger.fill(load);
            told.load = load.clone();
        }
        message
    }

    /// Queues a load message for every engine whose account changed since it was last told.
    fn collect(&mut self) {
        for (engine, told) in &mut self.told {
            let mut load = told.load.clone();
            told.ledger.fill(&mut load);
            if load != told.load {
                told.load = load.clone();
                self.queue.push_back(FeedMessage {
                    engine: engine.clone(),
                    epoch: told.epoch,
                    seq: told.seq,
                    body: FeedBody::Load(load),
                });
            }
        }
    }
}

/// The feed as a service of an inbound listener.
#[must_use]
pub fn service(
    source: Arc<dyn FeedSource>,
    runtime: tokio::runtime::Handle,
    drain: Drain,
) -> FeedService {
    let service = feed::service(source);
    Arc::new(move |request| {
        let service = service.clone();
        let runtime = runtime.clone();
        let drain = drain.clone();
        Box::pin(async move {
            // Subscriptions live on the main runtime, not on a request thread.
            let Ok(Ok(response)) = runtime.spawn(service.oneshot(request)).await else {
                let mut gone = Response::new(outrigger_filters::body::empty());
                *gone.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                return gone;
            };
            response.map(|body| {
                let body = body.map_err(|status| {
                    BodyError::new(Flag::LocalReset, format_args!("feed: {status}"))
                });
                let drained = Box::pin(async move { drain.begun().await });
                UntilDrain {
                    body: body.boxed_unsync(),
                    drained,
                }
                .boxed_unsync()
            })
        })
    })
}

/// A subscription ends when draining begins: peers then send us nothing new, and nothing keeps us from ending.
struct UntilDrain {
    body: ResponseBody,
    drained: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Body for UntilDrain {
    type Data = bytes::Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, BodyError>>> {
        if self.drained.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }
}

/// Takes in what the adapters (or the agent) say of the engines beside us.
pub async fn follow_local(fleet: Arc<Fleet>, source: Arc<dyn FeedSource>) {
    loop {
        let mut messages = source.subscribe();
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                // What was told of it before was told to nobody; a new subscription begins with all of it.
                () = fleet.wanted() => None,
            };
            let Some(message) = message else { break };
            if !fleet.apply(&Source::Local, message) {
                break;
            }
        }
        tokio::time::sleep(RETRY_MIN).await;
    }
}

/// The peers we listen to, each by a task of its own.
pub struct Peers {
    fleet: Arc<Fleet>,
    tasks: AHashMap<Address, JoinHandle<()>>,
}

impl Peers {
    /// Nobody yet.
    #[must_use]
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self {
            fleet,
            tasks: AHashMap::new(),
        }
    }

    /// Listens to exactly these; a peer that stays is not disturbed.
    pub fn configure(&mut self, peers: &[Address]) {
        let fleet = &self.fleet;
        self.tasks.retain(|address, task| {
            let stays = peers.contains(address);
            if !stays {
                task.abort();
                fleet.dismiss(address);
            }
            stays
        });
        for address in peers {
            self.tasks
                .entry(address.clone())
                .or_insert_with(|| tokio::spawn(follow_peer(fleet.clone(), address.clone())));
        }
    }
}

async fn follow_peer(fleet: Arc<Fleet>, address: Address) {
    let source = Source::Peer(address.clone());
    let mut pause = RETRY_MIN;
    let gauge = metrics::gauge!("outrigger_feed_connected", "peer" => address.to_string());
    loop {
        match hear(&fleet, &source, &address, &gauge).await {
            // It is there and will tell all again; until then what it told is the best there is.
            Ok(Ended::Gap) => {
                tokio::time::sleep(RETRY_MIN).await;
                continue;
            }
            Ok(Ended::Broke) => pause = RETRY_MIN,
            Err(error) => {
                tracing::debug!(peer = %address, %error, "feed of a peer ended");
                metrics::counter!("outrigger_feed_failures_total", "peer" => address.to_string())
                    .increment(1);
            }
        }
        gauge.set(0.0);
        fleet.lost(&source);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// How a feed ended that had begun.
enum Ended {
    /// Something of it was missed: it must begin anew.
    Gap,
    /// The peer ended it, or cannot be heard any more.
    Broke,
}

/// One connection to a peer's feed; an error if it ended before it told anything.
async fn hear(
    fleet: &Fleet,
    source: &Source,
    address: &Address,
    gauge: &metrics::Gauge,
) -> Result<Ended, String> {
    let uri = format!("http://{address}")
        .parse::<http::Uri>()
        .map_err(|error| error.to_string())?;
    let mut messages = feed::connect(uri, FeedTimeouts::default())
        .await
        .map_err(|error| error.to_string())?;
    tracing::info!(peer = %address, "listening to a peer's feed");
    gauge.set(1.0);
    let mut told = false;
    while let Some(message) = messages.next().await {
        match message {
            Ok(message) => {
                told = true;
                if !fleet.apply(source, message) {
                    return Ok(Ended::Gap);
                }
            }
            Err(error @ FeedError::Gap { .. }) => {
                tracing::warn!(peer = %address, %error, "a feed must begin anew");
                metrics::counter!("outrigger_feed_gaps_total").increment(1);
                return Ok(Ended::Gap);
            }
            Err(error) if told => {
                tracing::info!(peer = %address, %error, "feed of a peer broke");
                return Ok(Ended::Broke);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    if told {
        Ok(Ended::Broke)
    } else {
        Err("it ended before it told anything".into())
    }
}

/// An agent's gRPC feed as a source: reconnects by itself. While the agent cannot be heard its engines' caches count
/// as unknown; their health is then what requests find.
pub struct AgentSource(pub http::Uri);

impl FeedSource for AgentSource {
    fn subscribe(&self) -> FeedStream {
        let hearing = Hearing {
            uri: self.0.clone(),
            messages: None,
            known: AHashMap::new(),
            queue: VecDeque::new(),
        };
        Box::pin(stream::unfold(hearing, Hearing::next))
    }
}

struct Hearing {
    uri: http::Uri,
    messages: Option<FeedSubscription>,
    known: AHashMap<EngineId, u64>,
    queue: VecDeque<FeedMessage>,
}

impl Hearing {
    async fn next(mut self) -> Option<(FeedMessage, Self)> {
        loop {
            if let Some(message) = self.queue.pop_front() {
                return Some((message, self));
            }
            let Some(messages) = &mut self.messages else {
                match feed::connect(self.uri.clone(), FeedTimeouts::default()).await {
                    Ok(messages) => self.messages = Some(messages),
                    Err(error) => {
                        tracing::debug!(agent = %self.uri, %error, "agent cannot be heard");
                        tokio::time::sleep(RETRY_MAX / 2).await;
                    }
                }
                continue;
            };
            match messages.next().await {
                Some(Ok(message)) => {
                    self.known.insert(message.engine.clone(), message.epoch);
                    return Some((message, self));
                }
                broken => {
                    tracing::warn!(agent = %self.uri, reason = ?broken, "agent's feed broke");
                    self.messages = None;
                    self.forget();
                }
            }
        }
    }

    fn forget(&mut self) {
        for (engine, epoch) in self.known.drain() {
            let body = FeedBody::Snapshot(KvSnapshot::default());
            self.queue.push_back(FeedMessage {
                engine,
                epoch: epoch ^ 1,
                seq: 0,
                body,
            });
        }
    }
}
