//! Feeds both ways: what we tell peers of the engines beside us, and what we hear of all others.
//!
//! We tell what the adapters know, with our own account of load put in. We hear from the adapters (embedded), from an
//! agent (gRPC or NATS), and from peers (gRPC), all as the same messages.

mod local;

use crate::{
    drain::Drain,
    engines,
    fleet::{Fleet, Source},
    http::FeedService,
    upstream::connect::dialer,
};
use ahash::{AHashMap, AHashSet};
use futures_util::{StreamExt, stream};
use http::{Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
pub use local::LocalFeed;
use outrigger_filters::{
    body::{BodyError, ResponseBody},
    endpoints::Secured,
    error::Flag,
};
use outrigger_xds::{
    feed::{
        self, FeedBody, FeedError, FeedMessage, FeedSource, FeedStream, FeedSubscription,
        FeedTimeouts,
    },
    report::{EngineId, KvSnapshot},
    resource::{cluster::ConnectionOptions, endpoint::Address},
};
use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{task::JoinHandle, time::Instant};
use tower::ServiceExt;

/// First pause before a peer is called again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause before a peer is called again.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A new subscription has told all it has when it named nobody new for so long.
const SETTLE_TIME: Duration = Duration::from_secs(3);

/// Who a subscription has named, until it has told all it has.
struct RollCall {
    named: AHashSet<EngineId>,
    /// `None` once it is over.
    until: Option<Instant>,
}

impl RollCall {
    fn begin() -> Self {
        Self {
            named: AHashSet::new(),
            until: Some(Instant::now() + SETTLE_TIME),
        }
    }

    fn hear(&mut self, engine: &EngineId) {
        if self.until.is_some() && !self.named.contains(engine) {
            self.named.insert(engine.clone());
            self.until = Some(Instant::now() + SETTLE_TIME);
        }
    }

    /// Everybody named; completes once, when nobody new was named for a while.
    async fn over(&mut self) -> AHashSet<EngineId> {
        match self.until {
            Some(until) => tokio::time::sleep_until(until).await,
            None => std::future::pending().await,
        }
        self.until = None;
        std::mem::take(&mut self.named)
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

/// Takes in what the adapters (or the agent) say of the engines beside us. `hidden`: engines elsewhere do not find them by
/// a loopback address, which is said once.
pub async fn follow_local(fleet: Arc<Fleet>, source: Arc<dyn FeedSource>, mut hidden: bool) {
    loop {
        let mut messages = source.subscribe();
        while let Some(message) = messages.next().await {
            if hidden && engines::meets_on_loopback(&message) {
                hidden = false;
                tracing::warn!(engine = %message.engine, "engines for decode elsewhere do not reach this engine: it says a \
                    loopback address, and --inbound is no address of this machine; give --engine URL;bootstrap=HOST:PORT");
            }
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
    tasks: AHashMap<Address, (Option<Secured>, JoinHandle<()>)>,
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
    pub fn configure(&mut self, peers: &[(Address, Option<Secured>)]) {
        let fleet = &self.fleet;
        self.tasks.retain(|address, (tls, task)| {
            let named = peers.iter().find(|(peer, _)| peer == address);
            if named.is_none() {
                fleet.dismiss(address);
            }
            // Secured in another way, it is the same peer: only the connection is another.
            let stays = named.is_some_and(|(_, now)| now == tls);
            if !stays {
                task.abort();
            }
            stays
        });
        for (address, tls) in peers {
            self.tasks.entry(address.clone()).or_insert_with(|| {
                let follow = follow_peer(fleet.clone(), address.clone(), tls.clone());
                (tls.clone(), tokio::spawn(follow))
            });
        }
    }
}

async fn follow_peer(fleet: Arc<Fleet>, address: Address, tls: Option<Secured>) {
    let source = Source::Peer(address.clone());
    let mut pause = RETRY_MIN;
    let gauge = metrics::gauge!("outrigger_feed_connected", "peer" => address.to_string());
    loop {
        match hear(&fleet, &source, (&address, tls.as_ref()), &gauge).await {
            // It is there and will tell all again; until then what it told is the best there is.
            Ok(Ended::Gap) => {
                tokio::time::sleep(RETRY_MIN).await;
                continue;
            }
            Ok(Ended::Broke) => {
                tracing::warn!(peer = %address, "the feed of a peer broke: nothing goes to its engines until it is heard again");
                pause = RETRY_MIN;
            }
            Err(error) => {
                tracing::debug!(peer = %address, %error, "the feed of a peer cannot be opened");
            }
        }
        metrics::counter!("outrigger_feed_failures_total", "peer" => address.to_string())
            .increment(1);
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
    (address, tls): (&Address, Option<&Secured>),
    gauge: &metrics::Gauge,
) -> Result<Ended, String> {
    let uri = format!("http://{address}")
        .parse::<http::Uri>()
        .map_err(|error| error.to_string())?;
    let dialer = tls.map(|tls| {
        let options = ConnectionOptions::default();
        dialer(address.clone(), Some(tls.clone()), options)
    });
    let mut messages = feed::connect_by(uri, FeedTimeouts::default(), dialer)
        .await
        .map_err(|error| error.to_string())?;
    tracing::info!(peer = %address, "listening to a peer's feed");
    gauge.set(1.0);
    let mut told = false;
    let mut roll = RollCall::begin();
    loop {
        let message = tokio::select! {
            biased;
            message = messages.next() => message,
            named = roll.over() => {
                fleet.retain_named(source, &named);
                continue;
            }
        };
        let Some(message) = message else { break };
        match message {
            Ok(message) => {
                told = true;
                roll.hear(&message.engine);
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
/// as unknown; their health is then what requests find. Engines it no longer tells of when it is back are gone.
pub struct AgentSource(pub http::Uri);

impl FeedSource for AgentSource {
    fn subscribe(&self) -> FeedStream {
        let hearing = Hearing {
            uri: self.0.clone(),
            messages: None,
            known: AHashMap::new(),
            roll: RollCall::begin(),
            told: false,
            pause: Duration::ZERO,
            queue: VecDeque::new(),
        };
        Box::pin(stream::unfold(hearing, Hearing::next))
    }
}

struct Hearing {
    uri: http::Uri,
    messages: Option<FeedSubscription>,
    /// Its engines, and the epoch of each.
    known: AHashMap<EngineId, u64>,
    roll: RollCall,
    /// Whether the current subscription told anything.
    told: bool,
    /// Before it is called.
    pause: Duration,
    queue: VecDeque<FeedMessage>,
}

impl Hearing {
    async fn next(mut self) -> Option<(FeedMessage, Self)> {
        loop {
            if let Some(message) = self.queue.pop_front() {
                return Some((message, self));
            }
            let Some(messages) = &mut self.messages else {
                self.call().await;
                continue;
            };
            let message = tokio::select! {
                biased;
                message = messages.next() => message,
                named = self.roll.over() => {
                    self.dismiss(&named);
                    continue;
                }
            };
            match message {
                Some(Ok(message)) => {
                    self.told = true;
                    self.roll.hear(&message.engine);
                    if message.body == FeedBody::Gone {
                        self.known.remove(&message.engine);
                    } else {
                        self.known.insert(message.engine.clone(), message.epoch);
                    }
                    return Some((message, self));
                }
                broken => {
                    tracing::warn!(agent = %self.uri, reason = ?broken, "agent's feed broke");
                    self.broke();
                }
            }
        }
    }

    async fn call(&mut self) {
        tokio::time::sleep(self.pause).await;
        match feed::connect(self.uri.clone(), FeedTimeouts::default()).await {
            Ok(messages) => {
                self.messages = Some(messages);
                self.roll = RollCall::begin();
                self.told = false;
            }
            Err(error) => {
                tracing::debug!(agent = %self.uri, %error, "agent cannot be heard");
                self.pause = RETRY_MAX / 2;
            }
        }
    }

    fn broke(&mut self) {
        self.messages = None;
        // One that accepts and breaks off is not called without a pause.
        self.pause = if self.told {
            RETRY_MIN
        } else {
            (self.pause * 2).clamp(RETRY_MIN, RETRY_MAX)
        };
        for (engine, epoch) in &self.known {
            let body = FeedBody::Snapshot(KvSnapshot::default());
            self.queue.push_back(FeedMessage {
                engine: engine.clone(),
                epoch: epoch ^ 1,
                seq: 0,
                body,
            });
        }
    }

    /// Those that were not named are gone.
    fn dismiss(&mut self, named: &AHashSet<EngineId>) {
        let queue = &mut self.queue;
        self.known.retain(|engine, epoch| {
            let stays = named.contains(engine);
            if !stays {
                queue.push_back(FeedMessage {
                    engine: engine.clone(),
                    epoch: *epoch,
                    seq: 0,
                    body: FeedBody::Gone,
                });
            }
            stays
        });
    }
}
