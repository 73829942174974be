//! What a listener does with a connection once it has it: look, find its chain, shake hands, serve.
//!
//! A push of configuration makes it anew, whole. A chain that stays what it was to its connections keeps its connection
//! manager, so that these get the new routes, too; those of a chain that is gone drain.

use super::{
    chains,
    look::{Look, Seen},
};
use crate::{
    access_log::AccessLogs,
    codec,
    drain::{Drain, Running},
    http::{ConnectionInfo, Manager, Owner},
    metrics::{HttpStats, ListenerStats},
    snapshot::HttpConfig,
    socket::Socket,
    tcp_proxy::TcpProxy,
    tls::{Stream, TlsFacts, server::Server},
};
use arc_swap::ArcSwap;
use outrigger_xds::resource::{filter_chain::FilterChainMatch, listener::Listener};
use std::{sync::Arc, time::Duration};

/// A listener as it is to run: built and checked, and nothing changes yet.
#[derive(Clone)]
pub struct Planned {
    /// The resource; its route tables are those that are in effect.
    pub listener: Arc<Listener>,
    /// Its chains, in order.
    pub(crate) chains: Vec<PlannedChain>,
    /// What happens to the connections that none of them is for.
    pub(crate) default: Option<PlannedChain>,
}

/// One filter chain of it.
#[derive(Clone)]
pub(crate) struct PlannedChain {
    pub(crate) matches: FilterChainMatch,
    /// How its connections begin.
    pub(crate) tls: Option<Arc<Server>>,
    pub(crate) serves: PlannedServes,
}

/// What its network filter needs.
#[derive(Clone)]
pub(crate) enum PlannedServes {
    Http(Arc<HttpConfig>, Arc<AccessLogs>),
    Tcp(Arc<TcpProxy>),
}

impl Planned {
    /// All chains, the default one last.
    pub(crate) fn all_chains(&self) -> impl Iterator<Item = &PlannedChain> {
        self.chains.iter().chain(&self.default)
    }

    /// The HTTP sides of all chains.
    pub(crate) fn http(&self) -> impl Iterator<Item = &Arc<HttpConfig>> {
        self.all_chains().filter_map(|chain| match &chain.serves {
            PlannedServes::Http(config, _) => Some(config),
            PlannedServes::Tcp(_) => None,
        })
    }

    /// The TLS contexts of all chains.
    pub(crate) fn servers(&self) -> impl Iterator<Item = &Arc<Server>> {
        self.all_chains().filter_map(|chain| chain.tls.as_ref())
    }
}

/// Everything of a listener but its sockets.
pub(super) struct Behaviour {
    pub(super) look: Look,
    /// Whether a redirected connection goes on to the listener of its address.
    pub(super) hands_over: bool,
    chains: Vec<Chain>,
    default: Option<Chain>,
}

struct Chain {
    matches: FilterChainMatch,
    tls: Option<Arc<Server>>,
    serves: Serves,
    /// Of its connections.
    drain: Drain,
}

enum Serves {
    Http(Arc<Manager>),
    Tcp(Arc<TcpProxy>),
}

impl Behaviour {
    /// What is planned; of `before`, which is what happened so far, chains stay whose connections may go on.
    pub(super) fn new(planned: &Planned, before: Option<&Self>, owner: &Owner) -> Self {
        let known = |chain: &PlannedChain| {
            let mut chains = before?.chains.iter();
            chains.find(|known| known.suits(chain))
        };
        let chains = planned.chains.iter();
        let default = planned.default.as_ref().map(|chain| {
            let known = before.and_then(|before| before.default.as_ref());
            Chain::new(chain, known.filter(|known| known.suits(chain)), owner)
        });
        Self {
            look: Look::new(&planned.listener),
            hands_over: planned.listener.use_original_dst,
            chains: chains
                .map(|chain| Chain::new(chain, known(chain), owner))
                .collect(),
            default,
        }
    }

    fn all_chains(&self) -> impl Iterator<Item = &Chain> {
        self.chains.iter().chain(&self.default)
    }

    /// One of each chain.
    pub(super) fn drains(&self) -> impl Iterator<Item = &Drain> {
        self.all_chains().map(|chain| &chain.drain)
    }
}

impl Chain {
    fn new(planned: &PlannedChain, known: Option<&Self>, owner: &Owner) -> Self {
        let drain = known.map_or_else(|| owner.drain.part(), |known| known.drain.clone());
        let manager = known.and_then(Self::manager);
        let serves = match (&planned.serves, manager) {
            (PlannedServes::Tcp(proxy), _) => Serves::Tcp(proxy.clone()),
            (PlannedServes::Http(config, logs), Some(manager)) => {
                manager.config.store(config.clone());
                manager.logs.store(logs.clone());
                Serves::Http(manager.clone())
            }
            (PlannedServes::Http(config, logs), None) => Serves::Http(Arc::new(Manager {
                stats: HttpStats::new(&config.manager.stat_prefix),
                config: ArcSwap::new(config.clone()),
                logs: ArcSwap::new(logs.clone()),
                owner: Owner {
                    drain: drain.clone(),
                    ..owner.clone()
                },
            })),
        };
        Self {
            matches: planned.matches.clone(),
            tls: planned.tls.clone(),
            serves,
            drain,
        }
    }

    /// Whether connections that it took may go on under this.
    fn suits(&self, planned: &PlannedChain) -> bool {
        let same_tls = match (&self.tls, &planned.tls) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => ours.says_the_same(theirs),
            _ => false,
        };
        let same_service = match (&self.serves, &planned.serves) {
            (Serves::Http(manager), PlannedServes::Http(config, _)) => {
                let (ours, theirs) = (&manager.config.load().manager, &config.manager);
                ours.codec == theirs.codec && ours.stat_prefix == theirs.stat_prefix
            }
            (Serves::Tcp(ours), PlannedServes::Tcp(theirs)) => ours.says_the_same(theirs),
            _ => false,
        };
        same_tls && same_service && self.matches == planned.matches
    }

    fn manager(&self) -> Option<&Arc<Manager>> {
        match &self.serves {
            Serves::Http(manager) => Some(manager),
            Serves::Tcp(_) => None,
        }
    }

    /// Most that a handshake may take, if it may not take for ever.
    fn handshake_limit(&self, server: &Server) -> Option<Duration> {
        let idle = match &self.serves {
            Serves::Http(manager) => manager.config.load().manager.idle_timeout,
            Serves::Tcp(proxy) => proxy.idle_timeout(),
        };
        let limits = [server.handshake_timeout(), idle];
        limits.into_iter().find(|limit| !limit.is_zero())
    }

    /// Serves a connection that is for it, to its end.
    async fn serve(&self, socket: Socket, seen: Seen, id: u64, stats: &ListenerStats) {
        let drain = &self.drain;
        let (stream, tls) = match &self.tls {
            None => (Stream::Plain(socket), None),
            Some(server) => {
                let limit = self.handshake_limit(server);
                match Box::pin(handshake(socket, server, limit, stats, drain)).await {
                    Some((stream, tls)) => (stream, Some(tls)),
                    None => return,
                }
            }
        };
        let mut info = ConnectionInfo::new(seen.remote, seen.local, id, tls.map(Arc::new));
        info.direct_remote = seen.direct_remote;
        info.redirected = seen.redirected;
        match &self.serves {
            Serves::Http(manager) => {
                codec::serve(stream, manager.clone(), Arc::new(info), drain.clone()).await;
            }
            Serves::Tcp(proxy) => {
                if info.tls.is_none() && seen.is_tls {
                    // It passes through; what the client asked for is known all the same.
                    info.tls = Some(Arc::new(TlsFacts {
                        server_name: seen.server_name,
                        ..TlsFacts::default()
                    }));
                }
                proxy.serve(stream, &info, drain.over()).await;
            }
        }
    }
}

impl Behaviour {
    /// Serves a connection that has been looked at, to its end.
    pub(super) async fn serve(
        &self,
        socket: Socket,
        (seen, looking): (Seen, Running),
        id: u64,
        stats: &ListenerStats,
    ) {
        let chain = chains::find(&self.chains, |chain| &chain.matches, &seen);
        let Some(chain) = chain.or(self.default.as_ref()) else {
            stats.no_filter_chain_match.increment(1);
            return;
        };
        let _running = chain.drain.enter();
        drop(looking);
        chain.serve(socket, seen, id, stats).await;
    }
}

/// A TLS handshake, which must not outlast its limit, nor hold up a drain.
async fn handshake(
    socket: Socket,
    server: &Server,
    limit: Option<Duration>,
    stats: &ListenerStats,
    drain: &Drain,
) -> Option<(Stream, TlsFacts)> {
    let expired = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        shaken = server.accept(socket, stats) => shaken.ok(),
        () = expired => {
            stats.downstream_cx_transport_socket_connect_timeout.increment(1);
            None
        }
        () = drain.ends() => None,
    }
}
