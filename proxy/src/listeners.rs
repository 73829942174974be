//! The listeners that run: added, changed, moved and removed while requests go on.
//!
//! A *port* is a bound address with its sockets, one a worker; it hands each connection to whoever has the address now.
//! A listener that is replaced at its address leaves the port to its successor, so no connection is lost in between.
//! What only concerns requests is changed in place; of what concerns connections, the chains that are another now drain
//! theirs.

use crate::{
    drain::Drain,
    http::{FeedService, Owner},
    listener::{
        self, Active, Directory, Planned, Port,
        bind::{self, Listening},
    },
    metrics::ListenerManagerStats,
};
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::resource::{
    endpoint::Address,
    listener::{Listener, TrafficDirection},
};
use std::{
    collections::{BTreeMap, BTreeSet},
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
    pub socket: Listening,
    port: Arc<Port>,
}

impl Share {
    /// Accepts for as long as somebody has the address.
    pub async fn serve(self) {
        if let Err(error) = listener::accept(self.socket, self.port).await {
            tracing::error!(%error, "a listener stopped accepting");
        }
    }
}

/// What a port is known by: where it is to be, whose it is if the system is to choose, and whether it has sockets.
type Place = (Address, Option<String>, bool);

fn place(listener: &Listener) -> Place {
    let chosen = listener.address.port == 0 && !listener.address.is_pipe();
    let whose = chosen.then(|| listener.name.clone());
    (listener.address.clone(), whose, listener.bind_to_port)
}

struct Running {
    planned: Planned,
    active: Arc<Active>,
    place: Place,
}

/// Whether a listener is not what it was. A route table or a filter's configuration that came anew does not make it another.
fn is_another(before: &Arc<Listener>, now: &Arc<Listener>) -> bool {
    if Arc::ptr_eq(before, now) {
        return false;
    }
    let mut known = Listener::clone(before);
    for (before, now) in known.http_managers_mut().zip(now.http_managers()) {
        if now.rds.is_some() {
            before.route_config = now.route_config.clone();
        }
        for (before, now) in before.http_filters.iter_mut().zip(&now.http_filters) {
            if now.discovery.is_some() {
                before.config = now.config.clone();
            }
        }
    }
    known != **now
}

/// What became of a listener in a push.
struct Change {
    active: Arc<Active>,
    /// Of connections that are to end.
    gone: Vec<Drain>,
    /// Some connections that it had may go on.
    in_place: bool,
}

/// What all listeners have in common.
pub struct Common {
    /// Whose their connection managers are.
    pub owner: Owner,
    /// The feed, on inbound listeners.
    pub feed: FeedService,
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
    /// The ports that are there.
    directory: Arc<Directory>,
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
            directory: Arc::default(),
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
            let change = if taken.contains(&place) {
                Err(format!("duplicate address {}", planned.listener.address))
            } else {
                self.change(&mut state, before.as_ref(), planned, &place)
            };
            match change {
                Ok(change) => {
                    self.count(before.as_ref(), planned, change.in_place);
                    self.retire(&name, change.gone);
                    taken.insert(place.clone());
                    let planned = planned.clone();
                    let active = change.active;
                    next.insert(
                        name,
                        Running {
                            planned,
                            active,
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
            self.retire(&name, gone.active.drains());
        }
        self.close_ports(&mut state);
        self.stats.active.set(state.running.len() as f64);
        self.changed.send_modify(|count| *count += 1);
        errors
    }

    /// Changes a listener in place, or puts a new one at its address.
    fn change(
        &self,
        state: &mut State,
        before: Option<&Running>,
        planned: &Planned,
        place: &Place,
    ) -> Result<Change, String> {
        let direction = planned.listener.traffic_direction;
        if let Some(before) = before
            && before.planned.listener.traffic_direction == direction
            && before.place == *place
        {
            let (gone, in_place) = before.active.replace(planned);
            return Ok(Change {
                active: before.active.clone(),
                gone,
                in_place,
            });
        }
        let inbound = direction == TrafficDirection::Inbound;
        let owner = Owner {
            feed: inbound.then(|| self.common.feed.clone()),
            leases: self.common.owner.leases.clone().filter(|_| inbound),
            ..self.common.owner.clone()
        };
        let active = Active::new(planned, owner, &self.directory);
        self.occupy(state, place, planned, &active)?;
        Ok(Change {
            active,
            gone: before.map_or_else(Vec::new, |before| before.active.drains()),
            in_place: false,
        })
    }

    /// Puts a listener at an address: at the port that is there, or at a new one.
    fn occupy(
        &self,
        state: &mut State,
        place: &Place,
        planned: &Planned,
        active: &Arc<Active>,
    ) -> Result<(), String> {
        if let Some(port) = state.ports.get(place) {
            port.give_to(active.clone());
            return Ok(());
        }
        state.closing.retain(|(_, port)| port.strong_count() > 0);
        let known = state.closing.iter().any(|(closing, _)| closing == place);
        let bound = bind::bind(&planned.listener, self.workers.len(), known)?;
        let ends = self.common.owner.drain.part();
        let port = Arc::new(Port::new(bound.address, active.clone(), ends));
        state.ports.insert(place.clone(), port.clone());
        self.list(state);
        for (socket, worker) in bound.sockets.into_iter().zip(&self.workers) {
            let port = port.clone();
            // A worker that is gone has taken the process's end with it.
            let _ = worker.send(Share { socket, port });
        }
        Ok(())
    }

    /// Makes the ports known to listeners that hand connections over.
    fn list(&self, state: &State) {
        let ports = state.ports.values();
        let listed = ports.filter_map(|port| match port.address {
            EndAddress::Ip(address) => Some((address, port.clone())),
            // Nothing is redirected to a pipe.
            EndAddress::Pipe(_) => None,
        });
        let listed = listed.collect();
        self.directory.store(Arc::new(listed));
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
        self.list(state);
    }

    fn count(&self, before: Option<&Running>, planned: &Planned, in_place: bool) {
        let Some(before) = before else {
            tracing::info!(listener = planned.listener.name, "listener added");
            self.stats.listener_added.increment(1);
            return;
        };
        if is_another(&before.planned.listener, &planned.listener) {
            self.stats.listener_modified.increment(1);
            if in_place {
                self.stats.listener_in_place_updated.increment(1);
            }
        }
    }

    /// Lets connections end, and ends them when the drain time is over.
    fn retire(&self, name: &str, gone: Vec<Drain>) {
        if gone.is_empty() {
            return;
        }
        let name = name.to_owned();
        gone.iter().for_each(Drain::retire);
        let running = move |gone: &[Drain]| gone.iter().map(Drain::own_running).sum::<usize>();
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
            while running(&gone) > 0 && Instant::now() < deadline {
                tokio::time::sleep(DRAIN_POLL).await;
            }
            if running(&gone) > 0 {
                tracing::warn!(
                    listener = name,
                    connections = running(&gone),
                    "drain time is over"
                );
            }
            gone.iter().for_each(Drain::cut);
            count(-1);
        });
    }

    /// How many wait for what they need.
    pub fn warming(&self, count: usize) {
        self.stats.warming.set(count as f64);
    }

    /// Where they really listen, by name.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<String, EndAddress> {
        let state = self.state();
        let running = state.running.iter();
        running
            .filter_map(|(name, running)| {
                let port = state.ports.get(&running.place)?;
                Some((name.clone(), port.address.clone()))
            })
            .collect()
    }
}
