//! Circuit breakers of connections: whether one more may be opened, and who waits until one is free.
//!
//! As in Envoy limits are of the cluster, and pools are of a worker: a worker that has no connection to an endpoint may
//! open one whatever the limit says, since nobody else's would come free for it. Who waits does so in its own task, and
//! is woken by what comes free on its worker; what comes free elsewhere it finds by looking now and then.

use ahash::AHashMap;
use outrigger_filters::{
    breakers::{Held, Kind},
    endpoints::{Endpoint, Host, SendOptions},
    error::Error,
};
use outrigger_xds::resource::{endpoint::Address, route_action::Priority};
use std::{
    cell::{Cell, RefCell},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Longest wait before one that waits looks whether another worker, or another endpoint, has made room.
const LOOK_AGAIN_MS_MAX: u64 = 50;

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
    /// It is of this worker's pool, so that it may come free for the next request.
    pooled: bool,
    _held: Held,
    _at_host: AtHost,
}

/// A connection counted against its endpoint until dropped.
#[derive(Debug)]
struct AtHost(Arc<Host>);

impl AtHost {
    /// Also whether it is within the endpoint's limit.
    fn count(endpoint: &Endpoint, priority: Priority) -> (Self, bool) {
        let max = endpoint.breakers.of(priority).connections_per_host_max();
        let before = endpoint.host.connections.fetch_add(1, Relaxed);
        (Self(endpoint.host.clone()), before < max)
    }
}

impl Drop for AtHost {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

impl Slot {
    /// `None` if there may be no more.
    fn take(endpoint: &Endpoint, priority: Priority) -> Option<Self> {
        let key = key(endpoint);
        let none_here =
            || POOLS.with_borrow(|pools| pools.get(&key).is_none_or(|pool| pool.open == 0));
        let breakers = &endpoint.breakers;
        let (at_host, within) = AtHost::count(endpoint, priority);
        let held = within
            .then(|| breakers.try_hold(priority, Kind::Connection))
            .flatten()
            .or_else(|| none_here().then(|| breakers.hold(priority, Kind::Connection)))?;
        POOLS.with_borrow_mut(|pools| pools.entry(key.clone()).or_default().open += 1);
        Some(Self {
            key,
            pooled: true,
            _held: held,
            _at_host: at_host,
        })
    }
}

/// Room for a connection of its own, which no request after it will use. It does not wait: what comes free in pools is
/// of no use to it, nor does it count as one of a pool, since nobody who waits would get it.
///
/// # Errors
/// There may be no more.
pub(super) fn room(endpoint: &Endpoint, priority: Priority) -> Result<Slot, Error> {
    let (at_host, within) = AtHost::count(endpoint, priority);
    let held = within
        .then(|| endpoint.breakers.try_hold(priority, Kind::Connection))
        .flatten();
    match held {
        Some(held) => Ok(Slot {
            key: key(endpoint),
            pooled: false,
            _held: held,
            _at_host: at_host,
        }),
        None => {
            count_overflow(endpoint);
            Err(Error::overflow())
        }
    }
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
                // Either way there is room for a new one.
                pool.open = pool.open.saturating_sub(usize::from(self.pooled));
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
        loop {
            if let Some(slot) = Slot::take(self.endpoint, self.priority) {
                return Ok(Some(slot));
            }
            if self.waiting.is_none() {
                self.waiting = Some(Waiting::new());
                count_overflow(self.endpoint);
            }
            let freed = POOLS.with_borrow_mut(|pools| {
                pools.entry(key(self.endpoint)).or_default().freed.clone()
            });
            let look_again = Instant::now() + Duration::from_millis(LOOK_AGAIN_MS_MAX);
            let until = self.until.map_or(look_again, |until| until.min(look_again));
            if tokio::time::timeout_at(until, freed.notified())
                .await
                .is_ok()
            {
                return Ok(None);
            }
            if self.until.is_some_and(|until| until <= Instant::now()) {
                return Err(Error::upstream_timeout());
            }
        }
    }
}

fn overflow(endpoint: &Endpoint) -> Error {
    metrics::counter!("envoy_cluster_upstream_rq_pending_overflow", "envoy_cluster_name" => endpoint.cluster.to_string())
        .increment(1);
    Error::overflow()
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_filters::breakers::Breakers;
    use outrigger_xds::resource::cluster::CircuitBreakers;

    fn endpoint(connections_max: u32) -> Arc<Endpoint> {
        let mut limits = CircuitBreakers::default();
        limits.default.max_connections = connections_max;
        Arc::new(Endpoint {
            breakers: Arc::new(Breakers::new("c".into(), &limits)),
            ..Endpoint::default()
        })
    }

    fn options() -> SendOptions {
        SendOptions {
            connect_timeout: Duration::from_secs(1),
            headers_timeout: Some(Duration::from_secs(10)),
            replace_stale: true,
            upgrade: false,
            priority: Priority::Default,
        }
    }

    #[test]
    fn a_connection_of_its_own_is_nobodys_pool() {
        let endpoint = endpoint(1);
        let own = room(&endpoint, Priority::Default).unwrap();
        assert!(room(&endpoint, Priority::Default).is_err(), "the limit");
        let first = Slot::take(&endpoint, Priority::Default);
        assert!(first.is_some(), "nothing here would come free for it");
        assert!(Slot::take(&endpoint, Priority::Default).is_none());
        drop(own);
        assert!(Slot::take(&endpoint, Priority::Default).is_none());
        drop(first);
        assert!(
            POOLS.with_borrow(|pools| pools.is_empty()),
            "nothing is left"
        );
    }

    #[test]
    fn a_pool_of_none_gives_no_room_beyond_the_limit_to_one_of_its_own() {
        let endpoint = endpoint(0);
        assert!(room(&endpoint, Priority::Default).is_err());
        assert!(Slot::take(&endpoint, Priority::Default).is_some());
    }

    #[test]
    fn an_endpoint_has_a_limit_of_its_own() {
        let mut limits = CircuitBreakers::default();
        limits.default.max_connections_per_host = Some(1);
        let breakers = Arc::new(Breakers::new("c".into(), &limits));
        let endpoint = |port| Endpoint {
            address: Address {
                host: "127.0.0.1".into(),
                port,
            },
            breakers: breakers.clone(),
            ..Endpoint::default()
        };
        let (a, b) = (endpoint(1), endpoint(2));
        let first = Slot::take(&a, Priority::Default).unwrap();
        assert!(Slot::take(&a, Priority::Default).is_none());
        assert!(room(&a, Priority::Default).is_err());
        assert!(room(&a, Priority::High).is_ok(), "it has no such limit");
        let other = room(&b, Priority::Default).unwrap();
        assert!(room(&b, Priority::Default).is_err());
        drop((first, other));
        assert!(room(&a, Priority::Default).is_ok(), "given back");
        assert!(room(&b, Priority::Default).is_ok(), "given back");
    }

    #[tokio::test]
    async fn room_that_another_worker_makes_is_found() {
        let endpoint = endpoint(2);
        let _ours = Slot::take(&endpoint, Priority::Default).unwrap();
        let there = endpoint.clone();
        let theirs = std::thread::spawn(move || Slot::take(&there, Priority::Default));
        let theirs = theirs.join().unwrap().unwrap();
        let mut queue = Queue::enter(&endpoint, &options()).unwrap();
        let turn = tokio::time::timeout(Duration::from_secs(5), queue.turn());
        let free = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            std::thread::spawn(move || drop(theirs)).join().unwrap();
        };
        let (turn, ()) = tokio::join!(turn, free);
        let slot = turn.expect("nobody wakes it, so it looks").unwrap();
        assert!(slot.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_is_told_when_it_is_too_long() {
        let endpoint = endpoint(1);
        let _ours = Slot::take(&endpoint, Priority::Default).unwrap();
        let mut queue = Queue::enter(&endpoint, &options()).unwrap();
        let began = Instant::now();
        assert!(queue.turn().await.is_err());
        let waited = began.elapsed().as_millis();
        assert!((10_000..10_100).contains(&waited), "{waited} ms");
    }
}
