//! From a configuration to a running proxy, and to its end.
//!
//! N worker threads with a single-threaded runtime each carry traffic; one more runtime carries admin, feeds and
//! adapters. Everything that can fail to start fails before the first connection is accepted.

use crate::{
    access_log::Sinks,
    admin::{self, logging::LogHandle},
    cluster::{Clusters, Contexts},
    drain::Drain,
    engines::{self, Watcher},
    feed::{self, LocalFeed, Peers},
    fleet::Fleet,
    http::Owner,
    ledger::Ledgers,
    listener::{self, Active, Bound, Directory, Prepared},
    snapshot::{self, HttpConfig},
    upstream::{self, Pools},
};
use arc_swap::ArcSwap;
use http::HeaderValue;
use outrigger_filters::{
    endpoints::Secured,
    kv_index::{self, KvIndex},
    services::Services,
    tokens::{Tokenizers, TokenizersConfig},
};
use outrigger_xds::{
    load,
    resource::{
        bootstrap::Bootstrap,
        endpoint::{Address, Duty},
        listener::{Listener, TrafficDirection},
    },
};
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tokio::{runtime, sync::watch};

/// Threads for work that would hold a worker up: tokenising, parsing of large bodies.
const COMPUTE_THREADS_MAX: usize = 4;
/// How often pools are swept and gauges brought up to date.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// How long the end waits for the admin's last answers.
const ADMIN_FAREWELL: Duration = Duration::from_secs(1);
/// How often a drain looks whether anything still runs.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// What a proxy is started with, beside its resources.
pub struct Settings {
    /// Worker threads, at least 1.
    pub concurrency: usize,
    /// Who tells of the engines beside us.
    pub watcher: Watcher,
    /// Tokens in a canonical KV block.
    pub block_tokens: usize,
    /// Shown by the admin.
    pub command_line: serde_json::Value,
    /// For `/logging`; none where somebody else owns the process's log.
    pub log: Option<LogHandle>,
}

/// A running proxy.
pub struct Proxy {
    /// Begins to end it.
    pub drain: Drain,
    shared: Arc<Shared>,
    pub(crate) addresses: HashMap<String, SocketAddr>,
    admin: Option<SocketAddr>,
    /// Ends (without ever saying anything) when the admin's last answer is out.
    admin_ended: std::sync::mpsc::Receiver<()>,
    stop: watch::Sender<bool>,
    workers: Vec<thread::JoinHandle<()>>,
    main: Option<runtime::Runtime>,
}

/// What pushes of configuration and the admin reach.
struct Shared {
    services: Services,
    clusters: Arc<Clusters>,
    watcher: Watcher,
    local: Arc<LocalFeed>,
    peers: Mutex<Peers>,
    listeners: HashMap<String, Arc<Active>>,
    sinks: Sinks,
    bootstrap: ArcSwap<Bootstrap>,
    runtime: runtime::Handle,
    drain: Drain,
    /// Set by the admin's `/quitquitquit`. Not the switch that ends workers: what runs is drained before that.
    quit: watch::Sender<bool>,
    started: Instant,
}

impl Proxy {
    /// Starts a proxy: all sockets are bound when this returns.
    ///
    /// # Errors
    /// Everything that kept it from starting.
    pub fn start(bootstrap: Bootstrap, settings: Settings) -> Result<Self, Vec<String>> {
        crate::metrics::install();
        let main =
            main_runtime().map_err(|error| vec![format!("cannot start a runtime: {error}")])?;
        let guard = main.enter();
        let drain = Drain::default();
        let concurrency = settings.concurrency.max(1);
        let Settings {
            watcher,
            block_tokens,
            command_line,
            log,
            ..
        } = settings;
        let watched = (watcher, block_tokens);
        let assembled = assemble(bootstrap, watched, concurrency, main.handle(), &drain);
        let (shared, bound) = match assembled {
            Ok(assembled) => assembled,
            Err(errors) => {
                drop(guard);
                // Whoever starts it may be within a runtime of its own, where this one may not be waited for.
                main.shutdown_background();
                return Err(errors);
            }
        };
        let addresses: HashMap<_, _> = bound
            .iter()
            .map(|bound| (bound.name.clone(), bound.address))
            .collect();
        let (stop, stopped) = watch::channel(false);
        let (ended, admin_ended) = std::sync::mpsc::channel();
        let state = admin_state(&shared, (command_line, log), &addresses);
        let admin = start_admin(&shared, state, (&stop, ended)).map_err(|error| vec![error])?;
        start_tasks(&shared);
        let workers = start_workers(bound, concurrency, &shared, &stopped)
            .map_err(|error| vec![format!("cannot start a worker thread: {error}")])?;
        drop(guard);
        Ok(Self {
            drain,
            shared,
            addresses,
            admin,
            admin_ended,
            stop,
            workers,
            main: Some(main),
        })
    }

    /// Where a listener really listens.
    #[must_use]
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        self.addresses.get(listener).copied()
    }

    /// Where the admin listens.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// What filters share; outlives every configuration.
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.shared.services
    }

    /// Pushes a new configuration: routes, filters and clusters. Index, load and health stay. Listeners cannot come
    /// or go yet.
    ///
    /// # Errors
    /// Everything that is wrong; then nothing was changed.
    pub fn apply(&self, bootstrap: Bootstrap) -> Result<(), Vec<String>> {
        self.shared.apply(bootstrap)
    }

    /// Drains: no new connections, what runs may end, at most for `limit`. True if everything ended by itself.
    pub fn drain(&self, limit: Duration) -> bool {
        self.drain.begin();
        let deadline = Instant::now() + limit;
        while self.drain.running() > 0 {
            if Instant::now() >= deadline {
                tracing::warn!(
                    connections = self.drain.running(),
                    "drain time is over, closing what still runs"
                );
                return false;
            }
            thread::sleep(DRAIN_POLL);
        }
        true
    }

    /// Waits for SIGTERM, SIGINT or the admin's `/quitquitquit`.
    pub(crate) fn wait_for_end(&self) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut quit = self.shared.quit.subscribe();
        self.shared.runtime.block_on(async {
            let (mut terminate, mut interrupt) = (
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
            );
            let why = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = quit.wait_for(|quit| *quit) => "quitquitquit",
            };
            tracing::info!(why, "draining");
            Ok(())
        })
    }

    /// Ends it at once.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.drain.begin();
        self.stop.send_replace(true);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        self.shared.sinks.flush(Duration::from_secs(1));
        // Whoever asked for the end by the admin is to get its answer.
        let _ = self.admin_ended.recv_timeout(ADMIN_FAREWELL);
        if let Some(main) = self.main.take() {
            main.shutdown_background();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end();
    }
}

pub(crate) fn main_runtime() -> std::io::Result<runtime::Runtime> {
    runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(COMPUTE_THREADS_MAX)
        .thread_name("outrigger-main")
        .enable_all()
        .build()
}

fn assemble(
    bootstrap: Bootstrap,
    (watcher, block_tokens): (Watcher, usize),
    concurrency: usize,
    runtime: &runtime::Handle,
    drain: &Drain,
) -> Result<(Arc<Shared>, Vec<Bound>), Vec<String>> {
    let index = Arc::new(KvIndex::new(kv_index::Limits::default()));
    let fleet = Fleet::new(index.clone(), block_tokens);
    let ledgers = Arc::new(Ledgers::default());
    let clusters = Clusters::new(fleet.clone(), ledgers.clone());
    let services = Services {
        endpoints: clusters.clone(),
        upstream: Arc::new(Pools),
        kv_index: index,
        tokenizers: Arc::new(Tokenizers::new(TokenizersConfig::default())),
        compute: runtime.clone(),
        token_limits: Arc::default(),
        serving: drain.serving.clone(),
        node_cluster: bootstrap.node.cluster.as_str().into(),
        stat_prefix: Arc::default(),
    };
    let contexts = clusters.contexts(&bootstrap.clusters)?;
    let built = snapshot::build(&bootstrap, &services)?;
    let local = LocalFeed::new(watcher.source.clone(), ledgers);
    let service = feed::service(local.clone(), runtime.clone(), drain.clone());
    let sinks = Sinks::default();
    let prepared = prepare(&bootstrap, &built, &sinks, &services)?;
    let owner = owner(&bootstrap, drain)?;
    let directory = Arc::new(Directory::default());
    let mut listeners = HashMap::new();
    let mut bound = Vec::new();
    for (listener, prepared) in bootstrap.listeners.iter().zip(prepared) {
        let inbound = listener.traffic_direction == TrafficDirection::Inbound;
        let owner = Owner {
            feed: inbound.then(|| service.clone()),
            ..owner.clone()
        };
        let at = listener::bind(listener, concurrency).map_err(|error| vec![error])?;
        let active = Active::new(at.address, prepared, owner, directory.clone());
        directory.rcu(|known| {
            let mut known = HashMap::clone(known);
            known.insert(at.address, active.clone());
            known
        });
        listeners.insert(listener.name.clone(), active);
        bound.push(at);
    }
    let shared = Arc::new(Shared {
        services,
        clusters,
        watcher,
        local: local.clone(),
        peers: Mutex::new(Peers::new(fleet.clone())),
        listeners,
        sinks,
        bootstrap: ArcSwap::from_pointee(Bootstrap::default()),
        runtime: runtime.clone(),
        drain: drain.clone(),
        quit: watch::Sender::new(false),
        started: Instant::now(),
    });
    runtime.spawn(feed::follow_local(fleet.clone(), local));
    runtime.spawn(refresh_views(fleet, shared.clone()));
    shared.configure(bootstrap, &contexts);
    Ok((shared, bound))
}

/// All listeners' behaviours, in their order.
pub(crate) fn prepare(
    bootstrap: &Bootstrap,
    built: &HashMap<String, Vec<Arc<HttpConfig>>>,
    sinks: &Sinks,
    services: &Services,
) -> Result<Vec<Prepared>, Vec<String>> {
    let each = bootstrap.listeners.iter().map(|listener| {
        let http = built.get(&listener.name).map_or(&[][..], Vec::as_slice);
        Prepared::new(listener, http, sinks, &services.endpoints).map_err(|error| vec![error])
    });
    each.collect()
}

/// What all connection managers share; those of peers have the feed beside.
fn owner(bootstrap: &Bootstrap, drain: &Drain) -> Result<Owner, Vec<String>> {
    let id = bootstrap.node.id.as_str();
    let via = HeaderValue::from_str(id).map_err(|_| {
        let id = id.escape_debug();
        vec![format!("node id '{id}' cannot be a header value")]
    })?;
    Ok(Owner {
        node: id.into(),
        via,
        drain: drain.clone(),
        feed: None,
    })
}

/// Each peer with the way it is secured in the cluster that names it.
fn with_contexts(
    bootstrap: &Bootstrap,
    peers: Vec<Address>,
    contexts: &Contexts,
) -> Vec<(Address, Option<Secured>)> {
    let of = |peer: &Address| {
        let mut naming = bootstrap.clusters.iter().filter(|cluster| {
            let mut endpoints = cluster.load_assignment.endpoints.iter();
            endpoints.any(|endpoint| endpoint.address == *peer && endpoint.duty() == Duty::Peer)
        });
        naming.find_map(|cluster| contexts.get(&cluster.name).cloned())
    };
    peers
        .into_iter()
        .map(|peer| {
            let tls = of(&peer);
            (peer, tls)
        })
        .collect()
}

impl Shared {
    fn configure(&self, bootstrap: Bootstrap, contexts: &Contexts) {
        let (engines, peers) = engines::configured(&bootstrap);
        let peers = with_contexts(&bootstrap, peers, contexts);
        self.clusters.configure(&bootstrap.clusters, contexts);
        // The fleet knows them by now, so nothing told of them is lost.
        self.local.configure(engines.keys().cloned().collect());
        self.watcher.configure(&engines);
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .configure(&peers);
        self.bootstrap.store(Arc::new(bootstrap));
    }

    fn apply(&self, bootstrap: Bootstrap) -> Result<(), Vec<String>> {
        let _guard = self.runtime.enter();
        let known = self.bootstrap.load_full();
        let place = |listeners: &[Listener]| -> Vec<_> {
            listeners
                .iter()
                .map(|listener| (listener.name.clone(), listener.address.clone()))
                .collect()
        };
        if place(&known.listeners) != place(&bootstrap.listeners) {
            return Err(vec![
                "listeners cannot be added, removed or moved while running (not supported yet)"
                    .into(),
            ]);
        }
        let contexts = self.clusters.contexts(&bootstrap.clusters)?;
        let built = snapshot::build(&bootstrap, &self.services)?;
        let prepared = prepare(&bootstrap, &built, &self.sinks, &self.services)?;
        let names: Vec<String> = bootstrap
            .listeners
            .iter()
            .map(|one| one.name.clone())
            .collect();
        // Clusters first: a route must never name one that is not there yet.
        self.configure(bootstrap, &contexts);
        for (name, prepared) in names.iter().zip(prepared) {
            if let Some(active) = self.listeners.get(name) {
                active.replace(prepared);
            }
        }
        metrics::counter!("outrigger_config_updates_total").increment(1);
        Ok(())
    }

    fn state(&self) -> admin::ServerState {
        if self.drain.has_begun() {
            admin::ServerState::Draining
        } else {
            admin::ServerState::Live
        }
    }
}

async fn refresh_views(fleet: Arc<Fleet>, shared: Arc<Shared>) {
    let mut changed = fleet.watch();
    while changed.changed().await.is_ok() {
        shared.clusters.refresh();
    }
}

fn start_tasks(shared: &Arc<Shared>) {
    let shared = shared.clone();
    let runtime = shared.runtime.clone();
    runtime.spawn(crate::metrics::upkeep());
    runtime.spawn(async move {
        let mut tick = tokio::time::interval(HOUSEKEEPING);
        loop {
            tick.tick().await;
            shared.clusters.count_members();
        }
    });
}

fn start_admin(
    shared: &Arc<Shared>,
    state: admin::AdminState,
    (stop, ended): (&watch::Sender<bool>, std::sync::mpsc::Sender<()>),
) -> Result<Option<SocketAddr>, String> {
    let bootstrap = shared.bootstrap.load();
    let Some(configured) = &bootstrap.admin else {
        return Ok(None);
    };
    let explain =
        |error: std::io::Error| format!("admin: cannot bind {}: {error}", configured.address);
    let socket =
        std::net::TcpListener::bind((configured.address.host.as_str(), configured.address.port))
            .map_err(explain)?;
    socket.set_nonblocking(true).map_err(explain)?;
    let address = socket.local_addr().map_err(explain)?;
    let socket = tokio::net::TcpListener::from_std(socket).map_err(explain)?;
    let mut stopped = stop.subscribe();
    shared.runtime.spawn(async move {
        admin::serve(socket, Arc::new(state), async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        })
        .await;
        drop(ended);
    });
    Ok(Some(address))
}

fn admin_state(
    shared: &Arc<Shared>,
    (options, log): (serde_json::Value, Option<LogHandle>),
    addresses: &HashMap<String, SocketAddr>,
) -> admin::AdminState {
    let (for_state, for_dump, for_clusters, for_drain, for_logs, for_quit) = (
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
    );
    let mut listeners: Vec<_> = addresses
        .iter()
        .map(|(name, address)| (name.clone(), *address))
        .collect();
    listeners.sort();
    let node = shared.bootstrap.load().node.clone();
    admin::AdminState {
        started: shared.started,
        server_state: Arc::new(move || for_state.state()),
        config_dump: Arc::new(move || {
            let version = "static";
            load::config_dump(&for_dump.bootstrap.load(), version, "")
        }),
        clusters: Arc::new(move || for_clusters.clusters.views()),
        listeners: Arc::new(move || listeners.clone()),
        options,
        node: (node.id, node.cluster),
        serving: shared.drain.serving.clone(),
        on_drain: Arc::new(move || for_drain.drain.begin()),
        set_log_level: match log {
            Some(log) => Arc::new(move |directives: &str| log.set(directives)),
            None => Arc::new(|_: &str| Err("this process's log is not ours".into())),
        },
        reopen_logs: Arc::new(move || for_logs.sinks.reopen()),
        quit: Arc::new(move || {
            for_quit.drain.begin();
            for_quit.quit.send_replace(true);
        }),
    }
}

fn start_workers(
    bound: Vec<Bound>,
    count: usize,
    shared: &Arc<Shared>,
    stopped: &watch::Receiver<bool>,
) -> std::io::Result<Vec<thread::JoinHandle<()>>> {
    let mut shares: Vec<Vec<Share>> = (0..count).map(|_| Vec::new()).collect();
    for bound in bound {
        let active = &shared.listeners[&bound.name];
        for (socket, share) in bound.sockets.into_iter().zip(&mut shares) {
            share.push(Share {
                socket,
                active: active.clone(),
            });
        }
    }
    let spawn = |(index, shares): (usize, Vec<Share>)| {
        let (drain, stopped) = (shared.drain.clone(), stopped.clone());
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        thread::Builder::new()
            .name(format!("outrigger-w{index}"))
            .spawn(move || {
                runtime.block_on(work(shares, drain, stopped));
            })
    };
    shares.into_iter().enumerate().map(spawn).collect()
}

/// One worker's part of a listener.
struct Share {
    socket: std::net::TcpListener,
    active: Arc<Active>,
}

async fn work(shares: Vec<Share>, drain: Drain, mut stopped: watch::Receiver<bool>) {
    for share in shares {
        let drain = drain.clone();
        tokio::spawn(async move {
            if let Err(error) = listener::accept(share.socket, share.active, drain).await {
                tracing::error!(%error, "a listener stopped accepting");
            }
        });
    }
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            _ = tick.tick() => upstream::h1::close_idle(),
        }
    }
}
