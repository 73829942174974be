//! The listeners that run: added, changed, moved and removed while requests go on.
//!
//! A *port* is a bound address with its sockets, one a worker; it hands each connection to whoever has the address now.
//! A listener that is replaced at its address leaves the port to its successor, so no connection is lost in between.
//! What only concerns requests is changed in place; what concerns connections makes a new manager, and the old one's
//! connections drain.

use crate::{
    access_log::AccessLogs,
    drain::Drain,
    http::{FeedService, Manager},
    listener,
    metrics::{HttpStats, ListenerManagerStats, ListenerStats},
    snapshot::HttpConfig,
    tls::server::Server,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use http::HeaderValue;
use outrigger_xds::resource::{
    endpoint::Address,
    listener::{Listener, TrafficDirection},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicUsize},
    time::Duration,
};
use tokio::{
    runtime,
    sync::{mpsc, watch},
    time::Instant,
};

/// How often a draining listener is looked at.
const DRAIN_POLL: Duration = Duration::from_millis(100);

/// One worker's socket of a port.
pub struct Share {
    /// Listens already.
    pub socket: std::net::TcpListener,
    port: Arc<Port>,
}

impl Share {
    /// Accepts for as long as somebody has the address.
    pub async fn serve(self) {
        let port = self.port;
        let (owner, ends) = (port.owner.clone(), port.ends.clone());
        let (stats, open) = (port.stats.clone(), port.open.clone());
        if let Err(error) = listener::accept(self.socket, owner, stats, open, ends).await {
            tracing::error!(%error, "a listener stopped accepting");
        }
    }
}

/// A bound address.
struct Port {
    address: SocketAddr,
    owner: Arc<ArcSwap<Manager>>,
    stats: Arc<ListenerStats>,
    open: Arc<AtomicUsize>,
    /// Retired when nobody has the address any more.
    ends: Drain,
}

/// What a port is known by: where it is to be, and whose it is if the system is to choose.
type Place = (Address, Option<String>);

fn place(listener: &Listener) -> Place {
    let chosen = listener.address.port == 0;
    let whose = chosen.then(|| listener.name.clone());
    (listener.address.clone(), whose)
}

/// A listener as it is to run.
#[derive(Clone)]
pub struct Planned {
    /// The resource; its route table is the one that is in effect.
    pub listener: Arc<Listener>,
    /// Its HTTP side.
    pub http: Arc<HttpConfig>,
    /// Where it logs.
    pub logs: Arc<AccessLogs>,
    /// How its connections begin.
    pub tls: Option<Arc<Server>>,
}

impl Planned {
    /// Whether connections that `other` took may go on under this.
    fn suits_connections_of(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.listener, &other.listener);
        let same_tls = match (&self.tls, &other.tls) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        };
        same_tls
            && ours.traffic_direction == theirs.traffic_direction
            && ours.http.codec == theirs.http.codec
            && ours.http.stat_prefix == theirs.http.stat_prefix
    }

    fn is(&self, other: &Self) -> bool {
        self.suits_connections_of(other)
            && Arc::ptr_eq(&self.http, &other.http)
            && Arc::ptr_eq(&self.logs, &other.logs)
    }
}

struct Running {
    planned: Planned,
    manager: Arc<Manager>,
    place: Place,
}

/// What all managers have in common.
pub struct Common {
    /// This proxy's id.
    pub node: Arc<str>,
    /// The same as a header.
    pub via: HeaderValue,
    /// The feed, on inbound listeners.
    pub feed: FeedService,
    /// Of the process.
    pub drain: Drain,
    /// How long connections of a listener that is replaced or removed may go on.
    pub drain_time: Duration,
    /// Where drains are watched from.
    pub runtime: runtime::Handle,
}

/// All listeners.
pub struct Listeners {
    common: Common,
    workers: Vec<mpsc::UnboundedSender<Share>>,
    state: Mutex<State>,
    draining: Arc<AtomicUsize>,
    stats: ListenerManagerStats,
    /// Moves when an address changes.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    running: BTreeMap<String, Running>,
    ports: BTreeMap<Place, Arc<Port>>,
    /// Given up, and perhaps still bound.
    closing: Vec<(Place, Weak<Port>)>,
}

impl Listeners {
    /// None yet; each worker gets its sockets through its channel.
    #[must_use]
    pub fn new(common: Common, workers: Vec<mpsc::UnboundedSender<Share>>) -> Self {
        Self {
            common,
            workers,
            state: Mutex::default(),
            draining: Arc::default(),
            stats: ListenerManagerStats::new(),
            changed: watch::Sender::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes exactly these run. Gives the names of those that could not, with the reason; they stay as they were.
    pub fn apply(&self, wanted: &[Planned]) -> Vec<(String, String)> {
        let mut state = self.state();
        let mut errors = Vec::new();
        let mut next = BTreeMap::new();
        let mut taken: BTreeSet<Place> = BTreeSet::new();
        for planned in wanted {
            let name = planned.listener.name.clone();
            let before = state.running.remove(&name);
            let place = place(&planned.listener);
            let port = if taken.contains(&place) {
                Err(format!("duplicate address {}", planned.listener.address))
            } else {
                self.manager(before.as_ref(), planned)
                    .and_then(|manager| self.occupy(&mut state, &place, planned, &manager))
            };
            match port {
                Ok(manager) => {
                    self.count(before.as_ref(), planned, &place);
                    if let Some(before) = before.filter(|old| !Arc::ptr_eq(&old.manager, &manager))
                    {
                        self.retire(&before);
                    }
                    taken.insert(place.clone());
                    let planned = planned.clone();
                    next.insert(
                        name,
                        Running {
                            planned,
                            manager,
                            place,
                        },
                    );
                }
                Err(error) => {
                    self.stats.listener_create_failure.increment(1);
                    errors.push((name.clone(), error));
                    if let Some(before) = before {
                        taken.insert(before.place.clone());
                        next.insert(name, before);
                    }
                }
            }
        }
        for (name, gone) in std::mem::replace(&mut state.running, next) {
            tracing::info!(listener = name, "listener removed");
            self.stats.listener_removed.increment(1);
            self.retire(&gone);
        }
        self.close_ports(&mut state);
        self.stats.active.set(state.running.len() as f64);
        self.changed.send_modify(|count| *count += 1);
        errors
    }

    /// The manager that goes on, changed in place, or a new one.
    fn manager(&self, before: Option<&Running>, planned: &Planned) -> Result<Arc<Manager>, String> {
        if let Some(before) = before
            && planned.suits_connections_of(&before.planned)
            && before.place == place(&planned.listener)
        {
            before.manager.config.store(planned.http.clone());
            before.manager.logs.store(planned.logs.clone());
            return Ok(before.manager.clone());
        }
        let inbound = planned.listener.traffic_direction == TrafficDirection::Inbound;
        Ok(Arc::new(Manager {
            config: ArcSwap::new(planned.http.clone()),
            logs: ArcSwap::new(planned.logs.clone()),
            stats: HttpStats::new(&planned.listener.http.stat_prefix),
            node: self.common.node.clone(),
            via: self.common.via.clone(),
            drain: self.common.drain.part(),
            feed: inbound.then(|| self.common.feed.clone()),
            tls: ArcSwapOption::new(planned.tls.clone()),
        }))
    }

    /// Puts a manager at an address: at the port that is there, or at a new one.
    fn occupy(
        &self,
        state: &mut State,
        place: &Place,
        planned: &Planned,
        manager: &Arc<Manager>,
    ) -> Result<Arc<Manager>, String> {
        if let Some(port) = state.ports.get(place) {
            port.owner.store(manager.clone());
            return Ok(manager.clone());
        }
        state.closing.retain(|(_, port)| port.strong_count() > 0);
        let known = state.closing.iter().any(|(closing, _)| closing == place);
        let bound = listener::bind(&planned.listener, self.workers.len(), known)?;
        let port = Arc::new(Port {
            address: bound.address,
            owner: Arc::new(ArcSwap::new(manager.clone())),
            stats: ListenerStats::new(&bound.address.to_string()),
            open: Arc::default(),
            ends: self.common.drain.part(),
        });
        for (socket, worker) in bound.sockets.into_iter().zip(&self.workers) {
            let port = port.clone();
            // A worker that is gone has taken the process's end with it.
            let _ = worker.send(Share { socket, port });
        }
        state.ports.insert(place.clone(), port);
        Ok(manager.clone())
    }

    fn close_ports(&self, state: &mut State) {
        let used: BTreeSet<&Place> = state
            .running
            .values()
            .map(|running| &running.place)
            .collect();
        let unused: Vec<Place> = state
            .ports
            .keys()
            .filter(|place| !used.contains(place))
            .cloned()
            .collect();
        for place in unused {
            if let Some(port) = state.ports.remove(&place) {
                port.ends.retire();
                state.closing.push((place, Arc::downgrade(&port)));
            }
        }
    }

    fn count(&self, before: Option<&Running>, planned: &Planned, place: &Place) {
        match before {
            None => {
                tracing::info!(listener = planned.listener.name, "listener added");
                self.stats.listener_added.increment(1);
            }
            Some(before) if before.planned.is(planned) && before.place == *place => {}
            Some(before) => {
                // A new route table alone is not a new listener.
                let mut known = (*before.planned.listener).clone();
                known.http.route_config = planned.listener.http.route_config.clone();
                if planned.listener.http.rds.is_none() || known != *planned.listener {
                    self.stats.listener_modified.increment(1);
                    if planned.suits_connections_of(&before.planned) && before.place == *place {
                        self.stats.listener_in_place_updated.increment(1);
                    }
                }
            }
        }
    }

    /// Lets the connections of a manager end, and ends them when the drain time is over.
    fn retire(&self, gone: &Running) {
        let drain = gone.manager.drain.clone();
        let name = gone.planned.listener.name.clone();
        drain.retire();
        let deadline = Instant::now() + self.common.drain_time;
        let (draining, gauge) = (self.draining.clone(), self.stats.draining.clone());
        let count = move |by: isize| {
            use std::sync::atomic::Ordering::SeqCst;
            let before = if by > 0 {
                draining.fetch_add(1, SeqCst) + 1
            } else {
                draining.fetch_sub(1, SeqCst) - 1
            };
            gauge.set(before as f64);
        };
        count(1);
        self.common.runtime.spawn(async move {
            while drain.own_running() > 0 && Instant::now() < deadline {
                tokio::time::sleep(DRAIN_POLL).await;
            }
            if drain.own_running() > 0 {
                tracing::warn!(
                    listener = name,
                    connections = drain.own_running(),
                    "drain time is over"
                );
            }
            drain.cut();
            count(-1);
        });
    }

    /// How many wait for what they need.
    pub fn warming(&self, count: usize) {
        self.stats.warming.set(count as f64);
    }

    /// Where they really listen, by name.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<String, SocketAddr> {
        let state = self.state();
        let running = state.running.iter();
        running
            .filter_map(|(name, running)| {
                let port = state.ports.get(&running.place)?;
                Some((name.clone(), port.address))
            })
            .collect()
    }
}
