//! Sockets that accept: one per worker with SO_REUSEPORT, bound before anything runs.

use crate::{
    codec,
    drain::Drain,
    http::{ConnectionInfo, Manager},
    metrics::ListenerStats,
    tls::{Stream, TlsFacts, server::Server},
};
use arc_swap::ArcSwap;
use futures_util::FutureExt;
use outrigger_xds::resource::listener::Listener;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    pin::pin,
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
    /// One socket a worker.
    pub sockets: Vec<std::net::TcpListener>,
}

/// Binds `workers` sockets to one address. With port 0 the first choice of the system holds for all. With `known` it
/// is an address that this process has just given up, and may still be bound.
///
/// # Errors
/// The address does not resolve or cannot be bound; the text names listener and address.
pub fn bind(listener: &Listener, workers: usize, known: bool) -> Result<Bound, String> {
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
    if address.port() != 0 && !known {
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
    let socket = Socket::new(
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

/// Accepts on one worker, for whoever has the address now, until the process drains or nobody has it any more.
pub(crate) async fn accept(
    socket: std::net::TcpListener,
    owner: Arc<ArcSwap<Manager>>,
    stats: Arc<ListenerStats>,
    open: Arc<AtomicUsize>,
    ends: Drain,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(socket)?;
    let local = listener.local_addr()?;
    let mut ending = pin!(ends.begun());
    let mut ended = false;
    loop {
        let accepted = if ended {
            // Who is in the queue when the address is given up is still served.
            match listener.accept().now_or_never() {
                Some(accepted) if !ends.has_begun() => accepted,
                _ => return Ok(()),
            }
        } else {
            tokio::select! {
                accepted = listener.accept() => accepted,
                () = &mut ending => {
                    ended = true;
                    continue;
                }
            }
        };
        let manager = owner.load_full();
        let drain = manager.drain.clone();
        match accepted {
            Ok((socket, remote)) => {
                if open.load(Relaxed) >= CONNECTIONS_MAX {
                    stats.downstream_cx_overflow.increment(1);
                    continue;
                }
                let _ = socket.set_nodelay(true);
                let id = NEXT_CONNECTION.fetch_add(1, Relaxed);
                let counted = Counted::new(open.clone(), stats.clone());
                let info = move |tls| Arc::new(ConnectionInfo::new(remote, local, id, tls));
                match manager.tls.load_full() {
                    None => {
                        let info = info(None);
                        tokio::spawn(async move {
                            let _counted = counted;
                            let _running = drain.enter();
                            codec::serve(Stream::Plain(socket), manager, info, drain.clone()).await;
                        });
                    }
                    Some(server) => {
                        tokio::spawn(async move {
                            let _running = drain.enter();
                            let shaken = handshake(socket, &server, &manager, &counted.1, &drain);
                            if let Some((stream, tls)) = shaken.await {
                                let info = info(Some(Arc::new(tls)));
                                codec::serve(stream, manager, info, drain.clone()).await;
                            }
                            drop(counted);
                        });
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, %local, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A TLS handshake, which must not outlast its limit, nor hold up a drain.
async fn handshake(
    socket: tokio::net::TcpStream,
    server: &Server,
    manager: &Manager,
    stats: &ListenerStats,
    drain: &Drain,
) -> Option<(Stream, TlsFacts)> {
    let limit = server.handshake_timeout();
    let idle = manager.config.load().manager.idle_timeout;
    let wait = [limit, idle].into_iter().find(|limit| !limit.is_zero());
    let expired = async {
        match wait {
            Some(wait) => tokio::time::sleep(wait).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        shaken = server.accept(socket, stats) => shaken.ok(),
        () = expired => {
            stats.downstream_cx_transport_socket_connect_timeout.increment(1);
            None
        }
        () = drain.begun() => None,
    }
}

/// Counts an open connection until dropped.
struct Counted(Arc<AtomicUsize>, Arc<ListenerStats>, Instant);

impl Counted {
    fn new(open: Arc<AtomicUsize>, stats: Arc<ListenerStats>) -> Self {
        open.fetch_add(1, Relaxed);
        stats.downstream_cx_total.increment(1);
        stats.downstream_cx_active.increment(1.0);
        Self(open, stats, Instant::now())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
        self.1.closed(self.2.elapsed());
    }
}
