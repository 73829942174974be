//! What a listener does with a connection once it has it: look, find its chain, shake hands, serve.
//!
//! A push of configuration makes it anew, whole. What has connections and stays keeps its connection manager, so that
//! these get the new routes, too.

use super::{
    chains,
    look::{Look, Seen},
};
use crate::{
    access_log::{AccessLogs, Sinks},
    codec,
    drain::Drain,
    http::{ConnectionInfo, Manager, Owner},
    metrics::{HttpStats, ListenerStats},
    snapshot::HttpConfig,
    socket::Socket,
    tcp_proxy::TcpProxy,
    tls::{Stream, TlsFacts, server::Server},
};
use arc_swap::ArcSwap;
use outrigger_filters::endpoints::Endpoints;
use outrigger_xds::resource::{
    filter_chain::{FilterChain, FilterChainMatch, Network},
    listener::Listener,
};
use std::{sync::Arc, time::Duration};

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
    tls: Option<Server>,
    serves: Serves,
}

enum Serves {
    Http(Arc<Manager>),
    Tcp(Arc<TcpProxy>),
}

/// What has been built and checked of a listener, and changes nothing yet.
pub struct Prepared {
    look: Look,
    hands_over: bool,
    chains: Vec<PreparedChain>,
    default: Option<PreparedChain>,
}

struct PreparedChain {
    matches: FilterChainMatch,
    tls: Option<Server>,
    serves: PreparedServes,
}

enum PreparedServes {
    Http(Arc<HttpConfig>, Box<AccessLogs>),
    Tcp(Arc<TcpProxy>),
}

impl Prepared {
    /// Reads certificates and opens logs; `http` are the connection managers' configurations, in the order of the
    /// listener's chains.
    ///
    /// # Errors
    /// What is wrong, with its place.
    pub(crate) fn new(
        listener: &Listener,
        http: &[Arc<HttpConfig>],
        sinks: &Sinks,
        endpoints: &Arc<dyn Endpoints>,
    ) -> Result<Self, String> {
        let mut http = http.iter();
        let mut prepare = |chain: &FilterChain| -> Result<PreparedChain, String> {
            let tls = chain.tls.as_ref();
            let tls = tls.map(|tls| Server::new(tls, chain.connect_timeout));
            let tls = tls
                .transpose()
                .map_err(|error| format!("transport_socket: {error}"))?;
            let serves = match &chain.network {
                Network::Http(manager) => {
                    let logs = AccessLogs::new(&manager.access_log, sinks)?;
                    let config = http.next().ok_or("no configuration was built")?;
                    PreparedServes::Http(config.clone(), Box::new(logs))
                }
                Network::Tcp(proxy) => {
                    let logs = AccessLogs::new(&proxy.access_log, sinks)?;
                    let proxy = TcpProxy::new(proxy.clone(), logs, endpoints.clone());
                    PreparedServes::Tcp(Arc::new(proxy))
                }
            };
            Ok(PreparedChain {
                matches: chain.matches.clone(),
                tls,
                serves,
            })
        };
        let explain = |error: String| format!("listener '{}': {error}", listener.name);
        let chains = listener.filter_chains.iter().map(&mut prepare);
        let chains = chains.collect::<Result<_, _>>().map_err(explain)?;
        let default = listener.default_filter_chain.as_ref().map(prepare);
        Ok(Self {
            look: Look::new(listener),
            hands_over: listener.use_original_dst,
            chains,
            default: default.transpose().map_err(explain)?,
        })
    }

    /// Makes it what happens; `before` is what did.
    pub(super) fn commit(self, before: Option<&Behaviour>, owner: &Owner) -> Behaviour {
        let known = |matches: &FilterChainMatch| {
            let mut same = before?.chains.iter();
            same.find(|chain| chain.matches == *matches)?.manager()
        };
        let chains = self.chains.into_iter().map(|chain| {
            let manager = known(&chain.matches);
            chain.commit(manager, owner)
        });
        let default = before.and_then(|before| before.default.as_ref()?.manager());
        Behaviour {
            look: self.look,
            hands_over: self.hands_over,
            chains: chains.collect(),
            default: self.default.map(|chain| chain.commit(default, owner)),
        }
    }
}

impl PreparedChain {
    fn commit(self, known: Option<&Arc<Manager>>, owner: &Owner) -> Chain {
        let serves = match self.serves {
            PreparedServes::Tcp(proxy) => Serves::Tcp(proxy),
            PreparedServes::Http(config, logs) => Serves::Http(match known {
                Some(manager) => {
                    manager.config.store(config);
                    manager.logs.store(logs.into());
                    manager.clone()
                }
                None => Arc::new(Manager {
                    stats: HttpStats::new(&config.manager.stat_prefix),
                    config: ArcSwap::new(config),
                    logs: ArcSwap::new(logs.into()),
                    owner: owner.clone(),
                }),
            }),
        };
        Chain {
            matches: self.matches,
            tls: self.tls,
            serves,
        }
    }
}

impl Chain {
    fn manager(&self) -> Option<&Arc<Manager>> {
        match &self.serves {
            Serves::Http(manager) => Some(manager),
            Serves::Tcp(_) => None,
        }
    }

    /// Most that a handshake may take, if it may not take for ever.
    fn handshake_limit(&self, server: &Server) -> Option<Duration> {
        let idle = self
            .manager()
            .map(|manager| manager.config.load().manager.idle_timeout);
        let limits = [Some(server.handshake_timeout()), idle];
        limits.into_iter().flatten().find(|limit| !limit.is_zero())
    }
}

impl Behaviour {
    /// Serves a connection that has been looked at, to its end.
    pub(super) async fn serve(
        &self,
        socket: Socket,
        seen: Seen,
        id: u64,
        stats: &ListenerStats,
        drain: &Drain,
    ) {
        let chain = chains::find(&self.chains, |chain| &chain.matches, &seen);
        let Some(chain) = chain.or(self.default.as_ref()) else {
            stats.no_filter_chain_match.increment(1);
            return;
        };
        let (stream, tls) = match &chain.tls {
            None => (Stream::Plain(socket), None),
            Some(server) => {
                let limit = chain.handshake_limit(server);
                match Box::pin(handshake(socket, server, limit, stats, drain)).await {
                    Some((stream, tls)) => (stream, Some(tls)),
                    None => return,
                }
            }
        };
        let direct_remote = seen.direct_remote;
        let mut info = ConnectionInfo::new(seen.remote, seen.local, id, tls.map(Arc::new));
        info.direct_remote = direct_remote;
        match &chain.serves {
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
                proxy.clone().serve(stream, &info).await;
            }
        }
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
        () = drain.begun() => None,
    }
}
