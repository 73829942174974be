//! What we tell peers of the engines beside us: what the adapters say, with our own account of load put in, and which
//! of them is to be left.

use crate::{
    canary::Verdict,
    ledger::{Ledger, Ledgers},
};
use ahash::{AHashMap, AHashSet};
use futures_util::{StreamExt, stream};
use outrigger_xds::{
    feed::{FeedBody, FeedMessage, FeedSource, FeedStream},
    report::{EngineId, EngineState, Health, Load},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, Interval},
};

/// How often a changed load is told.
const LOAD_INTERVAL: Duration = Duration::from_millis(25);
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

    /// See [`Self::leave`].
    #[must_use]
    pub fn is_left(&self, engine: &EngineId) -> bool {
        self.ledgers.open(engine).is_left()
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
    /// What was told of its canary.
    verdict: Arc<Verdict>,
    load: Load,
    /// When `load` was told.
    at: Instant,
    epoch: u64,
    seq: u64,
}

impl Told {
    /// An engine that is to be left drains, as far as others are told, and its canary is believed.
    fn color(&self, state: &mut EngineState) {
        self.verdict.color(state);
        if self.left && matches!(state.health, Health::Healthy | Health::Unhealthy) {
            state.health = Health::Draining;
        }
    }

    /// Whether what is to be told of its state is another now.
    fn has_news(&mut self) -> bool {
        let (left, verdict) = (self.ledger.is_left(), self.ledger.verdict());
        let is_news = self.left != left || !Arc::ptr_eq(&self.verdict, &verdict);
        (self.left, self.verdict) = (left, verdict);
        is_news
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
                verdict: Arc::default(),
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
            told.has_news();
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
            if told.has_news()
                && let Some(mut state) = told.state.clone()
            {
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
    async fn a_verdict_is_told_with_its_evidence_until_it_is_another() {
        let (local, ledgers, senders) = feed(1);
        local.configure(beside(&["e"]));
        let mut heard = local.subscribe();
        let well = EngineState {
            health: Health::Healthy,
            reason: "no events".into(),
            ..EngineState::default()
        };
        let well = message("e", FeedBody::State(well));
        senders[0].send(well.clone()).unwrap();
        assert_eq!(next(&mut heard).await, Some(well.clone()));
        let ledger = ledgers.open(&"e".into());
        ledger.tell(Verdict {
            unhealthy: Some("no token".into()),
            ..Verdict::default()
        });
        let FeedBody::State(told) = next(&mut heard).await.unwrap().body else {
            panic!("a state")
        };
        assert_eq!(told.health, Health::Unhealthy);
        assert_eq!(told.reason, "no events; no token");
        ledger.tell(ledger.verdict().as_ref().clone());
        assert_eq!(next(&mut heard).await, None, "nothing new");
        ledger.tell(Verdict::default());
        assert_eq!(next(&mut heard).await, Some(well));
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
