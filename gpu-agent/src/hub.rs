//! Everything known of the engines watched here, as one feed.
//!
//! A `Hub` watches engines (`engine` does the watching) and answers subscribers: state, load and a snapshot of every
//! engine, then what changes. A subscriber too slow for the changes gets snapshots instead of a gap. It judges nothing
//! and routes nothing.

use crate::engine::{self, EngineConfig};
use crate::event::EventBatch;
use crate::lineage::{Lineage, LineageCounts};
use crate::load::Figures;
use futures_util::stream::unfold;
use outrigger_xds::feed::{FeedBody, FeedMessage, FeedSource, FeedStream};
use outrigger_xds::report::{EngineId, EngineState, Health, KvChange, KvSnapshot, Load};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Messages a subscriber may be behind before it gets snapshots instead.
const FEED_MESSAGES_MAX: usize = 4096;

/// Watches engines and tells of them.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    engines: Mutex<BTreeMap<EngineId, Watched>>,
    told: broadcast::Sender<Told>,
    /// Orders everything told; see `Told::order`.
    clock: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Watched {
    cell: Arc<Cell>,
    task: AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One thing told to all subscribers.
#[derive(Debug, Clone)]
struct Told {
    engine: EngineId,
    /// Rises with every telling of one engine: a subscriber skips what its last snapshot had already.
    order: u64,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Message(Arc<FeedMessage>),
    /// Each subscriber takes its own snapshot.
    Resync,
}

impl Hub {
    /// A hub without engines.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let shared = Shared {
            engines: Mutex::new(BTreeMap::new()),
            told: broadcast::Sender::new(FEED_MESSAGES_MAX),
            clock: Arc::new(AtomicU64::new(0)),
        };
        Arc::new(Self {
            shared: Arc::new(shared),
        })
    }

    /// Watches an engine until `unwatch` or until the hub is dropped. One of the same id is replaced.
    ///
    /// Spawns on the current tokio runtime.
    pub fn watch(self: &Arc<Self>, config: EngineConfig) {
        self.unwatch(&config.id);
        let cell = Arc::new(Cell {
            id: config.id.clone(),
            known: Mutex::new(Known::new(&config)),
            told: self.shared.told.clone(),
            clock: Arc::clone(&self.shared.clock),
        });
        let id = config.id.clone();
        let task = tokio::spawn(engine::run(Arc::clone(&cell), config)).abort_handle();
        cell.resync();
        lock(&self.shared.engines).insert(id, Watched { cell, task });
    }

    /// Stops watching an engine; subscribers are told that it is gone.
    pub fn unwatch(&self, id: &EngineId) {
        if let Some(watched) = lock(&self.shared.engines).remove(id) {
            watched.cell.retire();
        }
    }
}

impl FeedSource for Hub {
    fn subscribe(&self) -> FeedStream {
        let mut subscription = Subscription {
            told: self.shared.told.subscribe(),
            shared: Arc::downgrade(&self.shared),
            heard: HashMap::new(),
            pending: VecDeque::new(),
        };
        subscription.resync_all();
        Box::pin(unfold(subscription, |mut subscription| async move {
            let message = subscription.next().await?;
            Some((message, subscription))
        }))
    }
}

struct Subscription {
    told: broadcast::Receiver<Told>,
    /// Weak: a subscription does not keep the hub alive.
    shared: Weak<Shared>,
    /// Per engine the order up to which it was heard.
    heard: HashMap<EngineId, u64>,
    pending: VecDeque<FeedMessage>,
}

impl Subscription {
    async fn next(&mut self) -> Option<FeedMessage> {
        loop {
            if let Some(message) = self.pending.pop_front() {
                return Some(message);
            }
            match self.told.recv().await {
                Ok(told) => self.hear(told),
                Err(RecvError::Lagged(missed)) => {
                    metrics::counter!("outrigger_feed_lagged_total").increment(1);
                    tracing::warn!(missed, "a feed subscriber is slow and gets snapshots");
                    // What still waits is older than the snapshots, and reading on from there would lag at once.
                    self.told = self.told.resubscribe();
                    self.resync_all();
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn hear(&mut self, told: Told) {
        if self
            .heard
            .get(&told.engine)
            .is_some_and(|heard| *heard >= told.order)
        {
            return;
        }
        match told.what {
            What::Resync => self.resync(&told.engine),
            What::Message(message) => {
                if message.body == FeedBody::Gone {
                    self.heard.remove(&told.engine);
                } else {
                    self.heard.insert(told.engine, told.order);
                }
                self.pending.push_back(Arc::unwrap_or_clone(message));
            }
        }
    }

    fn resync(&mut self, engine: &EngineId) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let Some(cell) = lock(&shared.engines)
            .get(engine)
            .map(|watched| Arc::clone(&watched.cell))
        else {
            return;
        };
        let order = cell.tell_all(&mut self.pending);
        self.heard.insert(engine.clone(), order);
    }

    fn resync_all(&mut self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let cells: Vec<Arc<Cell>> = lock(&shared.engines)
            .values()
            .map(|watched| Arc::clone(&watched.cell))
            .collect();
        let gone: Vec<EngineId> = self
            .heard
            .keys()
            .filter(|id| cells.iter().all(|cell| cell.id != **id))
            .cloned()
            .collect();
        for engine in gone {
            self.heard.remove(&engine);
            self.pending.push_back(FeedMessage {
                engine,
                epoch: 0,
                seq: 0,
                body: FeedBody::Gone,
            });
        }
        for cell in cells {
            let order = cell.tell_all(&mut self.pending);
            self.heard.insert(cell.id.clone(), order);
        }
    }
}

/// One engine's place in the hub: what is known, and the way to tell it.
#[derive(Debug)]
pub(crate) struct Cell {
    id: EngineId,
    known: Mutex<Known>,
    told: broadcast::Sender<Told>,
    clock: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Known {
    epoch: u64,
    seq: u64,
    /// Order of the last telling.
    order: u64,
    state: EngineState,
    load: Load,
    /// When the engine gave the figures in `load`.
    load_at: Option<Instant>,
    lineage: Lineage,
    complete: bool,
    /// Not watched any more: nothing is told.
    retired: bool,
}

impl Known {
    fn new(config: &EngineConfig) -> Self {
        Self {
            epoch: rand::random(),
            seq: 0,
            order: 0,
            state: EngineState {
                role: config.role,
                dp_size: 1,
                ..EngineState::default()
            },
            load: Load::default(),
            load_at: None,
            lineage: Lineage::new("", config.block_tokens, config.blocks_max),
            complete: false,
            retired: false,
        }
    }

    fn message(&self, engine: &EngineId, body: FeedBody) -> FeedMessage {
        FeedMessage {
            engine: engine.clone(),
            epoch: self.epoch,
            seq: self.seq,
            body,
        }
    }

    /// The load with its age as of now.
    fn load_now(&self) -> Load {
        Load {
            engine_age: self.load_at.map(|at| at.elapsed()),
            ..self.load.clone()
        }
    }
}

impl Cell {
    /// The engine's name.
    pub(crate) fn id(&self) -> &EngineId {
        &self.id
    }

    /// Begins a history: a new epoch with nothing in it.
    pub(crate) fn begin(&self, state: EngineState, lineage: Lineage) {
        let mut known = lock(&self.known);
        known.epoch = rand::random();
        known.seq = 0;
        known.state = state;
        known.lineage = lineage;
        known.complete = false;
        self.tell(&mut known, What::Resync);
    }

    /// The engine is dead: its blocks are gone, and it says why.
    pub(crate) fn end(&self, reason: String) {
        let mut known = lock(&self.known);
        let mut changes = Vec::new();
        for rank in 0..known.state.dp_size {
            known.lineage.clear(rank, &mut changes);
        }
        if known.state.health != Health::Dead {
            self.tell_changes(&mut known, changes);
        }
        known.load_at = None;
        known.load = Load::default();
        let state = EngineState {
            health: Health::Dead,
            reason,
            kv_events: false,
            ..known.state.clone()
        };
        self.tell_state(&mut known, state);
    }

    /// Tells of a changed state; an equal one is not repeated.
    pub(crate) fn set_state(&self, change: impl FnOnce(&mut EngineState)) {
        let mut known = lock(&self.known);
        let mut state = known.state.clone();
        change(&mut state);
        self.tell_state(&mut known, state);
    }

    /// Tells the engine's own figures; the rest of the load is the proxy's.
    pub(crate) fn set_load(&self, (running, waiting): (u64, u64), figures: &Figures) {
        let mut known = lock(&self.known);
        known.load = Load {
            running,
            waiting,
            kv_usage: figures.kv_usage.unwrap_or(0.0),
            engine_tokens: figures.tokens,
            ..Load::default()
        };
        known.load_at = Some(Instant::now());
        let message = known.message(&self.id, FeedBody::Load(known.load_now()));
        self.tell(&mut known, What::Message(Arc::new(message)));
    }

    /// Applies a batch of `rank`; tells what it changed unless `silent` (then a `resync` has to follow).
    pub(crate) fn apply(&self, rank: u32, batch: &EventBatch, silent: bool) {
        let mut known = lock(&self.known);
        let before = known.lineage.counts();
        let mut changes = Vec::new();
        for event in &batch.events {
            known.lineage.apply(rank, event, &mut changes);
        }
        self.count(before, &known.lineage);
        self.count_ignored("unknown_field", batch.unknown_fields);
        // Silent changes have no number: the snapshot that follows them says what they said, and another rank's
        // changes told in between must not seem to leave a gap.
        if !silent {
            self.tell_changes(&mut known, changes);
        }
    }

    /// What was known of `rank` is void. Listeners learn of it by a new epoch, unless it is the rank's first history.
    pub(crate) fn void(&self, rank: u32, first: bool) {
        let mut known = lock(&self.known);
        known.lineage.clear(rank, &mut Vec::new());
        known.complete = false;
        if !first {
            known.epoch = rand::random();
            known.seq = 0;
            self.tell(&mut known, What::Resync);
        }
    }

    /// Every rank's history is caught up with as far as can be.
    pub(crate) fn settle(&self, complete: bool) {
        let mut known = lock(&self.known);
        known.complete = complete;
        // The snapshot says more than the one that began the history: where it is lost, its number shows that.
        known.seq += 1;
        self.tell(&mut known, What::Resync);
    }

    /// Engine block sizes that cannot be indexed, for people; empty if all can.
    pub(crate) fn unfit_sizes(&self) -> Vec<usize> {
        lock(&self.known)
            .lineage
            .unfit_sizes()
            .iter()
            .copied()
            .collect()
    }

    /// Makes every subscriber take a snapshot.
    fn resync(&self) {
        self.tell(&mut lock(&self.known), What::Resync);
    }

    /// Appends state, load and snapshot; returns the order they are as of.
    fn tell_all(&self, pending: &mut VecDeque<FeedMessage>) -> u64 {
        let known = lock(&self.known);
        let snapshot = KvSnapshot {
            block_tokens: u32::try_from(known.lineage.block_tokens()).unwrap_or(u32::MAX),
            shelves: known.lineage.snapshot(),
            complete: known.complete,
        };
        pending.push_back(known.message(&self.id, FeedBody::State(known.state.clone())));
        pending.push_back(known.message(&self.id, FeedBody::Load(known.load_now())));
        pending.push_back(known.message(&self.id, FeedBody::Snapshot(snapshot)));
        known.order
    }

    fn tell_state(&self, known: &mut Known, state: EngineState) {
        if known.state != state {
            tracing::info!(engine = %self.id, kind = state.kind.as_str(), health = state.health.as_str(), kv_events = state.kv_events, reason = state.reason, "engine");
            known.state = state;
            let message = known.message(&self.id, FeedBody::State(known.state.clone()));
            self.tell(known, What::Message(Arc::new(message)));
        }
    }

    fn tell_changes(&self, known: &mut Known, changes: Vec<KvChange>) {
        if !changes.is_empty() {
            known.seq += 1;
            let message = known.message(&self.id, FeedBody::Changes(changes));
            self.tell(known, What::Message(Arc::new(message)));
        }
    }

    fn retire(&self) {
        let mut known = lock(&self.known);
        let message = known.message(&self.id, FeedBody::Gone);
        self.tell(&mut known, What::Message(Arc::new(message)));
        known.retired = true;
    }

    /// Must be called with the lock held, so that tellings and their order agree.
    fn tell(&self, known: &mut Known, what: What) {
        if known.retired {
            return;
        }
        known.order = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        // Fails when nobody is subscribed.
        let _ = self.told.send(Told {
            engine: self.id.clone(),
            order: known.order,
            what,
        });
    }

    fn count_ignored(&self, reason: &'static str, count: u64) {
        if count > 0 {
            metrics::counter!("outrigger_kv_blocks_ignored_total", "engine" => self.id.to_string(), "reason" => reason)
                .increment(count);
        }
    }

    fn count(&self, before: LineageCounts, lineage: &Lineage) {
        let after = lineage.counts();
        for (reason, before, after) in [
            (
                "unknown_parent",
                before.unknown_parent,
                after.unknown_parent,
            ),
            (
                "unknown_removed",
                before.unknown_removed,
                after.unknown_removed,
            ),
            ("placeholder", before.placeholder, after.placeholder),
            (
                "other_attention",
                before.other_attention,
                after.other_attention,
            ),
            ("unfit_size", before.unfit_size, after.unfit_size),
            ("over_limit", before.over_limit, after.over_limit),
            ("malformed", before.malformed, after.malformed),
            ("unknown_type", before.unknown_type, after.unknown_type),
        ] {
            self.count_ignored(reason, after - before);
        }
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("outrigger_kv_blocks_tracked", "engine" => self.id.to_string())
            .set(lineage.tracked() as f64);
    }
}

/// The data stays sound if a holder panicked: every change under these locks is whole or harmless.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    /// A hub with an engine whose task never runs: on a current-thread runtime it first polls at an await, and its
    /// address refuses.
    async fn hub() -> (Arc<Hub>, Arc<Cell>) {
        let hub = Hub::new();
        hub.watch(EngineConfig::new(EngineId::from("e"), "http://127.0.0.1:1"));
        let watched = lock(&hub.shared.engines)
            .get(&EngineId::from("e"))
            .map(|watched| {
                watched.task.abort();
                Arc::clone(&watched.cell)
            });
        (hub, watched.unwrap())
    }

    async fn next(stream: &mut FeedStream) -> FeedMessage {
        tokio::time::timeout(std::time::Duration::from_secs(5), stream.next())
            .await
            .expect("a message")
            .expect("no end")
    }

    #[tokio::test]
    async fn a_slow_subscriber_gets_a_snapshot_never_a_gap() {
        let (hub, cell) = hub().await;
        let mut stream = hub.subscribe();
        for expected in ["state", "load", "snapshot"] {
            let body = next(&mut stream).await.body;
            assert!(matches!(
                (expected, &body),
                ("state", FeedBody::State(_))
                    | ("load", FeedBody::Load(_))
                    | ("snapshot", FeedBody::Snapshot(_))
            ));
        }
        let changes = |n: u64| {
            vec![KvChange::Stored {
                shelf: Default::default(),
                hashes: vec![n],
            }]
        };
        for n in 0..FEED_MESSAGES_MAX as u64 + 10 {
            cell.tell_changes(&mut lock(&cell.known), changes(n));
        }
        let bodies = [
            next(&mut stream).await,
            next(&mut stream).await,
            next(&mut stream).await,
        ];
        let last = &bodies[2];
        assert!(matches!(last.body, FeedBody::Snapshot(_)), "{last:?}");
        assert_eq!(last.seq, FEED_MESSAGES_MAX as u64 + 10);
        cell.tell_changes(&mut lock(&cell.known), changes(1));
        let after = next(&mut stream).await;
        assert_eq!(
            (after.seq, after.body),
            (last.seq + 1, FeedBody::Changes(changes(1))),
            "nothing old comes after it"
        );
    }

    #[tokio::test]
    async fn a_snapshot_after_silent_changes_has_a_number_of_its_own() {
        let (hub, cell) = hub().await;
        let mut stream = hub.subscribe();
        let empty = [
            next(&mut stream).await,
            next(&mut stream).await,
            next(&mut stream).await,
        ];
        cell.settle(true);
        let settled = [
            next(&mut stream).await,
            next(&mut stream).await,
            next(&mut stream).await,
        ];
        assert!(matches!(settled[2].body, FeedBody::Snapshot(_)));
        assert_eq!(settled[2].epoch, empty[2].epoch);
        assert!(settled[2].seq > empty[2].seq, "or its loss is never seen");
    }

    #[tokio::test]
    async fn an_unwatched_engine_is_gone_and_the_hub_ends_its_streams() {
        let (hub, cell) = hub().await;
        let mut stream = hub.subscribe();
        for _ in 0..3 {
            next(&mut stream).await;
        }
        hub.unwatch(&EngineId::from("e"));
        assert_eq!(next(&mut stream).await.body, FeedBody::Gone);
        cell.resync();
        drop(cell);
        drop(hub);
        assert!(stream.next().await.is_none());
    }
}
