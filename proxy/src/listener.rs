//! Sockets that accept: one per worker with SO_REUSEPORT, bound before anything runs.

mod behaviour;
mod chains;
mod http_inspector;
mod look;
mod proxy_header;
mod tls_inspector;

pub use behaviour::Prepared;

use behaviour::Behaviour;

use crate::{drain::Drain, http::Owner, metrics::ListenerStats, socket::Socket};
use arc_swap::ArcSwap;
use look::Seen;
use outrigger_xds::resource::listener::Listener;
use socket2::{Domain, Protocol, Socket as RawSocket, Type};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Connections of one listener over all workers; further ones are closed at once and counted.
pub const CONNECTIONS_MAX: usize = 65_536;
/// Pause after the system refuses to accept (out of file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// A bound listener.
pub struct Bound {
    /// Listener name.
    pub name: String,
    /// Where it really listens.
    pub address: SocketAddr,
    /// One socket a worker; none if it has no port.
    pub sockets: Vec<std::net::TcpListener>,
}

/// Binds `workers` sockets to one address. With port 0 the first choice of the system holds for all.
///
/// # Errors
/// The address does not resolve or cannot be bound; the text names listener and address.
pub fn bind(listener: &Listener, workers: usize) -> Result<Bound, String> {
    let wanted = &listener.address;
    let explain = |error: io::Error| {
        format!(
            "listener '{}': cannot bind {wanted}: {error}",
            listener.name
        )
    };
    let mut address = (wanted.host.as_str(), wanted.port)
        .to_socket_addrs()
        .map_err(explain)?
        .next()
        .ok_or_else(|| explain(io::ErrorKind::AddrNotAvailable.into()))?;
    if !listener.bind_to_port {
        return Ok(Bound {
            name: listener.name.clone(),
            address,
            sockets: Vec::new(),
        });
    }
    if address.port() != 0 {
        // SO_REUSEPORT would let two proxies share a port unnoticed; a plain bind tells.
        bind_one(address, 1, false).map_err(explain)?;
    }
    let mut sockets = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = bind_one(address, listener.tcp_backlog_size, true).map_err(explain)?;
        address = socket.local_addr().map_err(explain)?;
        sockets.push(socket);
    }
    Ok(Bound {
        name: listener.name.clone(),
        address,
        sockets,
    })
}

fn bind_one(address: SocketAddr, backlog: u32, listen: bool) -> io::Result<std::net::TcpListener> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if listen {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    if listen {
        socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
        socket.set_nonblocking(true)?;
    }
    Ok(socket.into())
}

/// A listener at work, on all workers.
pub struct Active {
    /// Swapped whole by a push of configuration.
    behaviour: ArcSwap<Behaviour>,
    stats: Arc<ListenerStats>,
    open: AtomicUsize,
    owner: Owner,
    /// Where others are that it hands connections over to.
    others: Arc<Directory>,
}

/// Listeners by address.
pub type Directory = ArcSwap<HashMap<SocketAddr, Arc<Active>>>;

impl Active {
    /// A listener at `address`.
    #[must_use]
    pub fn new(
        address: SocketAddr,
        prepared: Prepared,
        owner: Owner,
        others: Arc<Directory>,
    ) -> Arc<Self> {
        Arc::new(Self {
            behaviour: ArcSwap::from_pointee(prepared.commit(None, &owner)),
            owner,
            stats: ListenerStats::new(&address.to_string()),
            open: AtomicUsize::new(0),
            others,
        })
    }

    /// Does something else from now on.
    pub fn replace(&self, prepared: Prepared) {
        let before = self.behaviour.load_full();
        let behaviour = prepared.commit(Some(&before), &self.owner);
        self.behaviour.store(Arc::new(behaviour));
    }

    /// The listener that a redirected connection was meant for: that of its very address, else that of its port.
    fn meant(&self, address: SocketAddr) -> Option<Arc<Self>> {
        let others = self.others.load();
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

/// Accepts on one worker until draining begins.
pub(crate) async fn accept(
    socket: std::net::TcpListener,
    active: Arc<Active>,
    drain: Drain,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(socket)?;
    let local = listener.local_addr()?;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.begun() => return Ok(()),
        };
        match accepted {
            Ok((socket, remote)) => {
                if active.open.load(Relaxed) >= CONNECTIONS_MAX {
                    active.stats.downstream_cx_overflow.increment(1);
                    continue;
                }
                let _ = socket.set_nodelay(true);
                // Where it listens on all addresses, only the connection knows which it is.
                let local = match local.ip().is_unspecified() {
                    true => socket.local_addr().unwrap_or(local),
                    false => local,
                };
                let counted = Counted::new(active.clone());
                let seen = Seen::new(local, remote);
                tokio::spawn(serve(socket.into(), seen, counted, drain.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, %local, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves a connection where it arrived, or where it was meant to.
async fn serve(mut socket: Socket, mut seen: Seen, counted: Counted, drain: Drain) {
    let _running = drain.enter();
    let id = NEXT_CONNECTION.fetch_add(1, Relaxed);
    let mut counted = counted;
    let mut behaviour = counted.0.behaviour.load_full();
    if !behaviour.look.is_empty() {
        if !Box::pin(look(&behaviour, &mut socket, &mut seen, &counted, &drain)).await {
            return;
        }
        let meant = (behaviour.hands_over && seen.redirected)
            .then(|| counted.0.meant(seen.local))
            .flatten()
            .filter(|meant| !Arc::ptr_eq(meant, &counted.0));
        if let Some(meant) = meant {
            counted = Counted::new(meant);
            behaviour = counted.0.behaviour.load_full();
            if !Box::pin(look(&behaviour, &mut socket, &mut seen, &counted, &drain)).await {
                return;
            }
        }
    }
    behaviour
        .serve(socket, seen, id, &counted.0.stats, &drain)
        .await;
}

async fn look(
    behaviour: &Behaviour,
    socket: &mut Socket,
    seen: &mut Seen,
    counted: &Counted,
    drain: &Drain,
) -> bool {
    behaviour.look.is_empty()
        || behaviour
            .look
            .at(socket, seen, &counted.0.stats, drain)
            .await
}

/// Counts an open connection until dropped.
struct Counted(Arc<Active>, Instant);

impl Counted {
    fn new(active: Arc<Active>) -> Self {
        active.open.fetch_add(1, Relaxed);
        active.stats.downstream_cx_total.increment(1);
        active.stats.downstream_cx_active.increment(1.0);
        Self(active, Instant::now())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.stats.closed(self.1.elapsed());
    }
}
