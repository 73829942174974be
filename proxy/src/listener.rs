//! Sockets that accept, each on its worker; and what happens to a connection from there on.

mod behaviour;
pub mod bind;
mod chains;
mod http_inspector;
mod look;
mod proxy_header;
mod tls_inspector;

pub use behaviour::Planned;
pub(crate) use behaviour::{PlannedChain, PlannedServes};

use crate::{
    drain::{Drain, Running},
    http::Owner,
    metrics::ListenerStats,
    socket::Socket,
};
use arc_swap::ArcSwap;
use behaviour::Behaviour;
use bind::{Accepted, Acceptor, Listening};
use look::Seen;
use outrigger_filters::end_address::EndAddress;
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Connections of one listener over all workers; further ones are closed at once and counted.
pub const CONNECTIONS_MAX: usize = 65_536;
/// Pause after the system refuses to accept (out of file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// A bound address: it hands each connection to whoever has the address now.
pub(crate) struct Port {
    /// Where it really is.
    pub(crate) address: EndAddress,
    owner: ArcSwap<Active>,
    load: Arc<Load>,
    /// Retired when nobody has the address any more.
    pub(crate) ends: Drain,
}

/// What a port carries.
struct Load {
    stats: Arc<ListenerStats>,
    open: AtomicUsize,
}

/// Ports by address.
pub(crate) type Directory = ArcSwap<HashMap<SocketAddr, Arc<Port>>>;

impl Port {
    pub(crate) fn new(address: EndAddress, owner: Arc<Active>, ends: Drain) -> Self {
        let load = Load {
            stats: ListenerStats::new(&address.to_string()),
            open: AtomicUsize::new(0),
        };
        Self {
            address,
            owner: ArcSwap::new(owner),
            load: Arc::new(load),
            ends,
        }
    }

    /// Connections that come from now on are this one's.
    pub(crate) fn give_to(&self, owner: Arc<Active>) {
        self.owner.store(owner);
    }
}

/// A listener at work, wherever it listens.
pub(crate) struct Active {
    /// Swapped whole by a push of configuration.
    behaviour: ArcSwap<Behaviour>,
    owner: Owner,
    /// Of connections that no chain has yet.
    looking: Drain,
    /// Where others are that it hands connections over to.
    others: Weak<Directory>,
}

impl Active {
    pub(crate) fn new(planned: &Planned, owner: Owner, others: &Arc<Directory>) -> Arc<Self> {
        Arc::new(Self {
            behaviour: ArcSwap::from_pointee(Behaviour::new(planned, None, &owner)),
            looking: owner.drain.part(),
            owner,
            others: Arc::downgrade(others),
        })
    }

    /// Does something else from now on. Gives the drains of the chains that are gone, and whether one stays.
    pub(crate) fn replace(&self, planned: &Planned) -> (Vec<Drain>, bool) {
        let before = self.behaviour.load_full();
        let behaviour = Behaviour::new(planned, Some(&before), &self.owner);
        let stays = |drain: &&Drain| behaviour.drains().any(|kept| kept.is_same(drain));
        let (kept, gone): (Vec<&Drain>, Vec<&Drain>) = before.drains().partition(stays);
        let gone = (gone.into_iter().cloned().collect(), !kept.is_empty());
        self.behaviour.store(Arc::new(behaviour));
        gone
    }

    /// Of all its connections.
    pub(crate) fn drains(&self) -> Vec<Drain> {
        let behaviour = self.behaviour.load();
        let chains = behaviour.drains().cloned();
        chains.chain([self.looking.clone()]).collect()
    }

    /// The port that a redirected connection was meant for: that of its very address, else that of its port.
    fn meant(&self, address: SocketAddr) -> Option<Arc<Port>> {
        let others = self.others.upgrade()?.load_full();
        let any: IpAddr = if address.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let found = others.get(&address);
        let found = found.or_else(|| others.get(&SocketAddr::new(any, address.port())));
        found.cloned()
    }
}

/// Accepts on one worker, for whoever has the address now, until the process drains or nobody has it any more.
pub(crate) async fn accept(socket: Listening, port: Arc<Port>) -> io::Result<()> {
    let listener = Acceptor::new(socket)?;
    let mut ending = pin!(port.ends.begun());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut ending => break,
        };
        match accepted {
            Ok(accepted) => begin(accepted, &port),
            Err(error) => {
                tracing::warn!(%error, local = %port.address, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // Who is in the queue when the address is given up is still served. Asked of the system: what the runtime has noticed
    // of the queue is not all of it.
    let queue = listener.into_std()?;
    while !port.ends.has_begun() {
        match queue.accept() {
            Ok(accepted) => begin(accepted, &port),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    Ok(())
}

/// Takes a connection, if there may be one more.
fn begin((socket, ends): Accepted, port: &Arc<Port>) {
    if port.load.open.load(Relaxed) >= CONNECTIONS_MAX {
        port.load.stats.downstream_cx_overflow.increment(1);
        return;
    }
    let seen = match ends {
        Some((local, remote)) => Seen::new(local.into(), remote.into()),
        None => Seen::new(port.address.clone(), port.address.clone()),
    };
    let arrived = Arrived::at(port);
    tokio::spawn(serve(socket, seen, arrived));
}

/// A connection that has come to a port.
struct Arrived {
    counted: Counted,
    active: Arc<Active>,
    /// Until a chain has it.
    looking: Running,
}

impl Arrived {
    fn at(port: &Port) -> Self {
        let active = port.owner.load_full();
        Self {
            counted: Counted::new(port.load.clone()),
            looking: active.looking.enter(),
            active,
        }
    }

    /// Whether it may go on after what listener filters saw.
    async fn look(&self, behaviour: &Behaviour, socket: &mut Socket, seen: &mut Seen) -> bool {
        let (stats, drain) = (&self.counted.0.stats, &self.active.looking);
        behaviour.look.is_empty() || behaviour.look.at(socket, seen, stats, drain).await
    }
}

/// Serves a connection where it arrived, or where it was meant to.
async fn serve(mut socket: Socket, mut seen: Seen, mut arrived: Arrived) {
    let id = NEXT_CONNECTION.fetch_add(1, Relaxed);
    let mut behaviour = arrived.active.behaviour.load_full();
    if !behaviour.look.is_empty() {
        if !Box::pin(arrived.look(&behaviour, &mut socket, &mut seen)).await {
            return;
        }
        let sent_to = match seen.local {
            EndAddress::Ip(address) if behaviour.hands_over && seen.redirected => Some(address),
            _ => None,
        };
        let meant = sent_to
            .and_then(|address| arrived.active.meant(address))
            .map(|port| Arrived::at(&port))
            .filter(|meant| !Arc::ptr_eq(&meant.active, &arrived.active));
        if let Some(meant) = meant {
            arrived = meant;
            behaviour = arrived.active.behaviour.load_full();
            if !Box::pin(arrived.look(&behaviour, &mut socket, &mut seen)).await {
                return;
            }
        }
        // Looking takes its time, and a push may have come meanwhile: its chains are those that count.
        behaviour = arrived.active.behaviour.load_full();
    }
    let Arrived {
        counted, looking, ..
    } = arrived;
    let stats = &counted.0.stats;
    behaviour.serve(socket, (seen, looking), id, stats).await;
}

/// Counts an open connection until dropped.
struct Counted(Arc<Load>, Instant);

impl Counted {
    fn new(load: Arc<Load>) -> Self {
        load.open.fetch_add(1, Relaxed);
        load.stats.downstream_cx_total.increment(1);
        load.stats.downstream_cx_active.increment(1.0);
        Self(load, Instant::now())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.stats.closed(self.1.elapsed());
    }
}
