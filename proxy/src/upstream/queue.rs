//! Circuit breakers of connections: whether one more may be opened, and who waits until one is free.
//!
//! As in Envoy limits are of the cluster, and pools are of a worker: a worker that has no connection to an endpoint may
//! open one whatever the limit says, since nobody else's would come free for it. Who waits does so in its own task.

use ahash::AHashMap;
use outrigger_filters::{
    breakers::{Held, Kind},
    endpoints::{Endpoint, SendOptions},
    error::Error,
};
use outrigger_xds::resource::{endpoint::Address, route_action::Priority};
use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};
use tokio::{sync::Notify, time::Instant};

/// Which pool: address, and how it is secured (0 is not at all).
type Key = (Address, u64);

/// What this worker has to one endpoint.
#[derive(Default)]
struct Pool {
    open: usize,
    freed: Arc<Notify>,
}

thread_local! {
    static POOLS: RefCell<AHashMap<Key, Pool>> = RefCell::default();
    /// How many wait on this worker, so that a connection that comes free need not look for them.
    static WAITING: Cell<usize> = const { Cell::new(0) };
}

fn key(endpoint: &Endpoint) -> Key {
    let secured = endpoint.tls.as_ref().map_or(0, |tls| tls.id);
    (endpoint.address.clone(), secured)
}

/// A connection that is open or about to be, until dropped.
#[derive(Debug)]
pub(super) struct Slot {
    key: Key,
    _held: Held,
}

impl Slot {
    /// `None` if there may be no more.
    fn take(endpoint: &Endpoint, priority: Priority) -> Option<Self> {
        let key = key(endpoint);
        let none_here =
            || POOLS.with_borrow(|pools| pools.get(&key).is_none_or(|pool| pool.open == 0));
        let breakers = &endpoint.breakers;
        let held = breakers
            .try_hold(priority, Kind::Connection)
            .or_else(|| none_here().then(|| breakers.hold(priority, Kind::Connection)))?;
        POOLS.with_borrow_mut(|pools| pools.entry(key.clone()).or_default().open += 1);
        Some(Self { key, _held: held })
    }
}

/// Room for a connection of its own, which no request after it will use. It does not wait: what comes free in pools is
/// of no use to it.
///
/// # Errors
/// There may be no more.
pub(super) fn room(endpoint: &Endpoint, priority: Priority) -> Result<Slot, Error> {
    Slot::take(endpoint, priority).ok_or_else(|| {
        count_overflow(endpoint);
        Error::overflow()
    })
}

fn count_overflow(endpoint: &Endpoint) {
    metrics::counter!("envoy_cluster_upstream_cx_overflow", "envoy_cluster_name" => endpoint.cluster.to_string())
        .increment(1);
}

impl Drop for Slot {
    fn drop(&mut self) {
        // A worker that ends drops its connections when its pools may be gone already.
        let _ = POOLS.try_with(|pools| {
            let mut pools = pools.borrow_mut();
            if let Some(pool) = pools.get_mut(&self.key) {
                pool.open = pool.open.saturating_sub(1);
                pool.freed.notify_one();
                if pool.open == 0 && Arc::strong_count(&pool.freed) == 1 {
                    pools.remove(&self.key);
                }
            }
        });
    }
}

/// A connection to this endpoint, or a stream of one, came free on this worker.
pub(super) fn freed(endpoint: &Endpoint) {
    tell(endpoint, Notify::notify_one);
}

/// A connection to this endpoint was opened that takes many streams.
pub(super) fn opened(endpoint: &Endpoint) {
    tell(endpoint, Notify::notify_waiters);
}

fn tell(endpoint: &Endpoint, how: fn(&Notify)) {
    if WAITING.get() > 0 {
        let _ = POOLS.try_with(|pools| {
            if let Some(pool) = pools.borrow().get(&key(endpoint)) {
                how(&pool.freed);
            }
        });
    }
}

/// Counts one that waits.
struct Waiting;

impl Waiting {
    fn new() -> Self {
        WAITING.set(WAITING.get() + 1);
        Self
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        WAITING.set(WAITING.get().saturating_sub(1));
    }
}

/// A request that found no idle connection.
pub(super) struct Queue<'a> {
    endpoint: &'a Endpoint,
    priority: Priority,
    /// No limit where nobody said one.
    until: Option<Instant>,
    waiting: Option<Waiting>,
    _pending: Held,
}

impl<'a> Queue<'a> {
    /// At its end.
    ///
    /// # Errors
    /// Too many wait.
    pub(super) fn enter(endpoint: &'a Endpoint, options: &SendOptions) -> Result<Self, Error> {
        let priority = options.priority;
        let Some(pending) = endpoint.breakers.try_hold(priority, Kind::Pending) else {
            return Err(overflow(endpoint));
        };
        metrics::counter!("envoy_cluster_upstream_rq_pending_total", "envoy_cluster_name" => endpoint.cluster.to_string())
            .increment(1);
        Ok(Self {
            endpoint,
            priority,
            until: options.headers_timeout.map(|limit| Instant::now() + limit),
            waiting: None,
            _pending: pending,
        })
    }

    /// Room for a new connection; or `None`, after a wait, when one may have come free.
    ///
    /// # Errors
    /// It took too long.
    pub(super) async fn turn(&mut self) -> Result<Option<Slot>, Error> {
        if let Some(slot) = Slot::take(self.endpoint, self.priority) {
            return Ok(Some(slot));
        }
        if self.waiting.is_none() {
            self.waiting = Some(Waiting::new());
            count_overflow(self.endpoint);
        }
        let freed = POOLS
            .with_borrow_mut(|pools| pools.entry(key(self.endpoint)).or_default().freed.clone());
        match self.until {
            None => freed.notified().await,
            Some(until) => tokio::time::timeout_at(until, freed.notified())
                .await
                .map_err(|_| Error::upstream_timeout())?,
        }
        Ok(None)
    }
}

fn overflow(endpoint: &Endpoint) -> Error {
    metrics::counter!("envoy_cluster_upstream_rq_pending_overflow", "envoy_cluster_name" => endpoint.cluster.to_string())
        .increment(1);
    Error::overflow()
}
