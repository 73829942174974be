//! Feeds both ways: what we tell peers of the engines beside us, and what we hear of all others.
//!
//! We tell what the adapters know, with our own account of load put in. We hear from the adapters (embedded), from an
//! agent (gRPC or NATS), and from peers (gRPC), all as the same messages.

use crate::{
    drain::Drain,
    fleet::{Fleet, Source},
    http::FeedService,
    ledger::{Ledger, Ledgers},
    upstream::connect::dialer,
};
use ahash::{AHashMap, AHashSet};
use futures_util::{StreamExt, stream};
use http::{Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
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
    report::{EngineId, EngineState, Health, KvSnapshot, Load},
    resource::endpoint::Address,
};
use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, Interval},
};
use tower::ServiceExt;

/// How often a changed load is told.
const LOAD_INTERVAL: Duration = Duration::from_millis(25);
/// First pause before a peer is called again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause before a peer is called again.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A new subscription has told all it has when it named nobody new for so long.
const SETTLE_TIME: Duration = Duration::from_secs(3);
/// Engines that are not ours whose names are remembered.
const OVERHEARD_MAX: usize = 65_536;

/// What this proxy tells of the engines beside it: the adapters' messages with our account of load in them.
pub struct LocalFeed {
    source: Arc<dyn FeedSource>,
    ledgers: Arc<Ledgers>,
    /// The engines that configuration puts beside us. An agent or broker may tell of others: those are not ours to
    /// tell, since a peer that hears of them from us would send us their requests.
    beside: watch::Sender<Arc<AHashSet<EngineId>>>,
    /// Those others, so that each is logged once.
    logged: Arc<Mutex<AHashSet<EngineId>>>,
}

impl LocalFeed {
    /// Tells what `source` knows, of nobody yet.
    #[must_use]
    pub fn new(source: Arc<dyn FeedSource>, ledgers: Arc<Ledgers>) -> Arc<Self> {
        Arc::new(Self {
            source,
            ledgers,
            beside: watch::Sender::default(),
            logged: Arc::default(),
        })
    }

    /// Tells that an engine is to be left, or no longer.
    pub fn leave(&self, engine: &EngineId, leaving: bool) {
        self.ledgers.open(engine).leave(leaving);
    }

    /// Tells of exactly these engines.
    pub fn configure(&self, beside: AHashSet<EngineId>) {
        self.beside.send_if_modified(|known| {
            let changes = **known != beside;
            if changes {
                *known = Arc::new(beside);
            }
            changes
        });
    }
}

impl FeedSource for LocalFeed {
    fn subscribe(&self) -> FeedStream {
        let mut tick = tokio::time::interval(LOAD_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changes = self.beside.subscribe();
        let beside = changes.borrow_and_update().clone();
        let telling = Telling {
            source: self.source.clone(),
            inner: self.source.subscribe(),
            ledgers: self.ledgers.clone(),
            beside,
            changes,
            told: AHashMap::new(),
            overheard: AHashSet::new(),
            logged: self.logged.clone(),
            queue: VecDeque::new(),
            tick,
        };
        Box::pin(stream::unfold(telling, Telling::next))
    }
}

/// One subscription to [`LocalFeed`].
struct Telling {
    source: Arc<dyn FeedSource>,
    inner: FeedStream,
    ledgers: Arc<Ledgers>,
    beside: Arc<AHashSet<EngineId>>,
    changes: watch::Receiver<Arc<AHashSet<EngineId>>>,
    told: AHashMap<EngineId, Told>,
    /// Whom `inner` tells of who is not beside us.
    overheard: AHashSet<EngineId>,
    logged: Arc<Mutex<AHashSet<EngineId>>>,
    queue: VecDeque<FeedMessage>,
    tick: Interval,
}

struct Told {
    ledger: Arc<Ledger>,
    /// As its engine is, and whether it was told that it is to be left.
    state: Option<EngineState>,
    left: bool,
    load: Load,
    /// When `load` was told.
    at: Instant,
    epoch: u64,
    seq: u64,
}

impl Told {
    /// An engine that is to be left drains, as far as others are told.
    fn color(&self, state: &mut EngineState) {
        if self.left && state.health == Health::Healthy {
            state.health = Health::Draining;
        }
    }
}

impl Telling {
    async fn next(mut self) -> Option<(FeedMessage, Self)> {
        loop {
            if let Some(message) = self.queue.pop_front() {
                return Some((message, self));
            }
            tokio::select! {
                message = self.inner.next() => {
                    let message = message?;
                    if self.beside.contains(&message.engine) {
                        let message = self.fill(message);
                        return Some((message, self));
                    }
                    self.overhear(message);
                }
                _ = self.tick.tick() => self.collect(),
                Ok(()) = self.changes.changed() => self.reconfigure(),
            }
        }
    }

    fn fill(&mut self, mut message: FeedMessage) -> FeedMessage {
        if message.body == FeedBody::Gone {
            self.told.remove(&message.engine);
            return message;
        }
        let ledgers = &self.ledgers;
        let told = self
            .told
            .entry(message.engine.clone())
            .or_insert_with(|| Told {
                ledger: ledgers.open(&message.engine),
                state: None,
                left: false,
                load: Load::default(),
                at: Instant::now(),
                epoch: message.epoch,
                seq: message.seq,
            });
        (told.epoch, told.seq) = (message.epoch, message.seq);
        if let FeedBody::Load(load) = &mut message.body {
            told.ledger.fill(load);
            told.load = load.clone();
            told.at = Instant::now();
        }
        if let FeedBody::State(state) = &mut message.body {
            told.state = Some(state.clone());
            told.left = told.ledger.is_left();
            told.color(state);
        }
        message
    }

    fn overhear(&mut self, message: FeedMessage) {
        if message.body == FeedBody::Gone {
            self.overheard.remove(&message.engine);
            return;
        }
        if self.overheard.contains(&message.engine) || self.overheard.len() >= OVERHEARD_MAX {
            return;
        }
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() < OVERHEARD_MAX && logged.insert(message.engine.clone()) {
            tracing::info!(engine = %message.engine, "told of an engine that is not configured beside this proxy");
        }
        self.overheard.insert(message.engine);
    }

    fn reconfigure(&mut self) {
        self.beside = self.changes.borrow_and_update().clone();
        let (beside, queue) = (&self.beside, &mut self.queue);
        self.told.retain(|engine, told| {
            let stays = beside.contains(engine);
            if !stays {
                queue.push_back(FeedMessage {
                    engine: engine.clone(),
                    epoch: told.epoch,
                    seq: told.seq,
                    body: FeedBody::Gone,
                });
            }
            stays
        });
        // What was told of it before is dropped; a new subscription begins with all of it.
        if self.overheard.len() >= OVERHEARD_MAX
            || self.overheard.iter().any(|engine| beside.contains(engine))
        {
            self.overheard.clear();
            self.inner = self.source.subscribe();
        }
    }

    /// Queues a load message for every engine whose account changed since it was last told.
    fn collect(&mut self) {
        for (engine, told) in &mut self.told {
            if told.left != told.ledger.is_left()
                && let Some(mut state) = told.state.clone()
            {
                told.left = !told.left;
                told.color(&mut state);
                self.queue.push_back(FeedMessage {
                    engine: engine.clone(),
                    epoch: told.epoch,
                    seq: told.seq,
                    body: FeedBody::State(state),
                });
            }
            let mut load = told.load.clone();
            told.ledger.fill(&mut load);
            if load != told.load {
                told.load = load.clone();
                // The engine's own figures are no younger for being told again.
                load.engine_age = load.engine_age.map(|age| age + told.at.elapsed());
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

/// Takes in what the adapters (or the agent) say of the engines beside us.
pub async fn follow_local(fleet: Arc<Fleet>, source: Arc<dyn FeedSource>) {
    loop {
        let mut messages = source.subscribe();
        while let Some(message) = messages.next().await {
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
    (address, tls): (&Address, Option<&Secured>),
    gauge: &metrics::Gauge,
) -> Result<Ended, String> {
    let uri = format!("http://{address}")
        .parse::<http::Uri>()
        .map_err(|error| error.to_string())?;
    let dialer = tls.map(|tls| dialer(address.clone(), tls.clone()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_filters::endpoints::Want;
    use outrigger_xds::report::EngineState;
    use tokio::sync::mpsc;

    /// Tells what it is given; each subscription takes the queue over.
    struct Queue(Mutex<Vec<mpsc::UnboundedReceiver<FeedMessage>>>);

    impl FeedSource for Queue {
        fn subscribe(&self) -> FeedStream {
            let mut queue = self.0.lock().unwrap().remove(0);
            Box::pin(stream::poll_fn(move |context| queue.poll_recv(context)))
        }
    }

    /// A feed of `subscriptions` subscriptions, and what each is told by.
    fn feed(
        subscriptions: usize,
    ) -> (
        Arc<LocalFeed>,
        Arc<Ledgers>,
        Vec<mpsc::UnboundedSender<FeedMessage>>,
    ) {
        let (senders, receivers) = (0..subscriptions)
            .map(|_| mpsc::unbounded_channel())
            .unzip();
        let ledgers = Arc::new(Ledgers::default());
        let source = Arc::new(Queue(Mutex::new(receivers)));
        (LocalFeed::new(source, ledgers.clone()), ledgers, senders)
    }

    fn beside(names: &[&str]) -> AHashSet<EngineId> {
        names.iter().map(|name| EngineId::from(*name)).collect()
    }

    fn message(engine: &str, body: FeedBody) -> FeedMessage {
        FeedMessage {
            engine: engine.into(),
            epoch: 1,
            seq: 1,
            body,
        }
    }

    fn state(engine: &str) -> FeedMessage {
        message(engine, FeedBody::State(EngineState::default()))
    }

    /// The next message; `None` if none comes for a good while.
    async fn next(stream: &mut FeedStream) -> Option<FeedMessage> {
        let patience = LOAD_INTERVAL * 8;
        tokio::time::timeout(patience, stream.next())
            .await
            .ok()
            .flatten()
    }

    #[tokio::test(start_paused = true)]
    async fn a_load_told_again_is_no_younger() {
        let (local, ledgers, senders) = feed(1);
        local.configure(beside(&["e"]));
        let mut heard = local.subscribe();
        let load = Load {
            engine_age: Some(Duration::from_secs(1)),
            ..Load::default()
        };
        senders[0].send(message("e", FeedBody::Load(load))).unwrap();
        assert!(next(&mut heard).await.is_some());
        tokio::time::advance(Duration::from_secs(2)).await;
        let _entered = ledgers.open(&"e".into()).enter(&Want::default());
        let FeedBody::Load(told) = next(&mut heard).await.unwrap().body else {
            panic!("a load")
        };
        assert_eq!(told.active_requests, 1);
        assert!(
            told.engine_age.unwrap() >= Duration::from_secs(3),
            "{told:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_gone_engine_is_not_told_of_again_when_its_account_changes() {
        let (local, ledgers, senders) = feed(1);
        local.configure(beside(&["e"]));
        let mut heard = local.subscribe();
        let entered = ledgers.open(&"e".into()).enter(&Want::default());
        senders[0].send(state("e")).unwrap();
        assert_eq!(next(&mut heard).await, Some(state("e")));
        let counted = next(&mut heard).await.unwrap().body;
        assert!(matches!(counted, FeedBody::Load(load) if load.active_requests == 1));
        let gone = message("e", FeedBody::Gone);
        senders[0].send(gone.clone()).unwrap();
        assert_eq!(next(&mut heard).await, Some(gone));
        drop(entered);
        assert_eq!(next(&mut heard).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_is_to_be_left_is_told_as_draining_until_it_is_not() {
        let (local, _ledgers, senders) = feed(1);
        local.configure(beside(&["e"]));
        let mut heard = local.subscribe();
        let well = EngineState {
            health: Health::Healthy,
            ..EngineState::default()
        };
        let well = message("e", FeedBody::State(well));
        senders[0].send(well.clone()).unwrap();
        assert_eq!(next(&mut heard).await, Some(well.clone()));
        for leaving in [true, false] {
            local.leave(&"e".into(), leaving);
            let FeedBody::State(told) = next(&mut heard).await.unwrap().body else {
                panic!("a state")
            };
            assert_eq!(told.health == Health::Draining, leaving);
        }
        local.leave(&"e".into(), true);
        assert!(next(&mut heard).await.is_some());
        senders[0].send(well).unwrap();
        let FeedBody::State(told) = next(&mut heard).await.unwrap().body else {
            panic!("a state")
        };
        assert_eq!(told.health, Health::Draining, "whatever its adapter says");
    }

    #[tokio::test(start_paused = true)]
    async fn only_engines_beside_us_are_told_from_when_to_when_they_are() {
        let (local, _ledgers, senders) = feed(2);
        local.configure(beside(&["ours"]));
        let mut heard = local.subscribe();
        senders[0].send(state("later")).unwrap();
        senders[0].send(state("ours")).unwrap();
        assert_eq!(next(&mut heard).await, Some(state("ours")));
        // Configured now: all of it is asked for, and what is no longer ours is gone.
        local.configure(beside(&["later"]));
        senders[1].send(state("ours")).unwrap();
        senders[1].send(state("later")).unwrap();
        assert_eq!(
            next(&mut heard).await,
            Some(message("ours", FeedBody::Gone))
        );
        assert_eq!(next(&mut heard).await, Some(state("later")));
        assert_eq!(next(&mut heard).await, None);
    }
}
