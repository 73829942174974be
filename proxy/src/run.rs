//! From a configuration to a running proxy, and to its end.
//!
//! N worker threads with a single-threaded runtime each carry traffic; one more runtime carries admin, feeds and
//! adapters. Everything that can fail to start fails before the first connection is accepted.

mod control_plane;
mod load_reports;
mod registration;
mod watching;

pub use registration::{Registrar, Registry};

use crate::{
    access_log::Sinks,
    admin::{self, logging::LogHandle},
    cluster::{Clusters, Contexts},
    discovery::{Discovery, kept},
    drain::Drain,
    engines::{self, Watcher},
    feed::{self, LocalFeed, Peers},
    fleet::Fleet,
    http::Owner,
    ledger::Ledgers,
    listener::bind::{Acceptor, bind_alone},
    listeners::{Common, Listeners, Share},
    trace::Exporters,
    upstream::Pools,
    worker,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use http::HeaderValue;
use outrigger_filters::{
    end_address::EndAddress,
    kv_index::{self, KvIndex},
    services::Services,
    tokens::{Tokenizers, TokenizersConfig},
};
use outrigger_xds::{
    registry::holder::FAREWELL,
    resource::{bootstrap::Bootstrap, cluster::Cluster},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::{
    runtime,
    sync::{mpsc, watch},
};

/// Rounds of bringing into effect what the last round made possible.
const ADVANCES_MAX: usize = 4;
/// Threads for work that would hold a worker up: tokenising, parsing of large bodies.
const COMPUTE_THREADS_MAX: usize = 4;
/// How often gauges are brought up to date.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// How long the end waits for the admin's last answers.
const ADMIN_FAREWELL: Duration = Duration::from_secs(1);
/// How long the end waits for a collector to take the last spans.
const SPANS_FAREWELL: Duration = Duration::from_secs(2);
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
    /// How long connections of a listener that is replaced or removed may go on.
    pub drain_time: Duration,
    /// How long events of streams gather on a busy worker before it looks for more; zero is not at all.
    pub stream_gather: Duration,
    /// Directory where the control plane's last configuration is kept; none keeps nothing.
    pub config_cache: Option<PathBuf>,
    /// Where the engines beside us are registered, if anywhere.
    pub register: Option<Registrar>,
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
    admin: Option<EndAddress>,
    /// Ends (without ever saying anything) when the admin's last answer is out.
    admin_ended: std::sync::mpsc::Receiver<()>,
    /// Ends when the control plane knows that we go, or nobody is to be told.
    left: std::sync::mpsc::Receiver<()>,
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
    listeners: Listeners,
    discovery: Mutex<Discovery>,
    /// Counts how often there was something new to say to control planes, or another one.
    ask: watch::Sender<u64>,
    /// Where what came by ADS is kept.
    cache: control_plane::Cache,
    /// What the clusters were last configured with.
    carried: ArcSwapOption<(Vec<Cluster>, Contexts)>,
    /// Whether the first configuration was complete once.
    initialized: AtomicBool,
    sinks: Arc<Sinks>,
    exporters: Arc<Exporters>,
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
        let Settings {
            concurrency,
            watcher,
            block_tokens,
            drain_time,
            stream_gather,
            config_cache,
            register,
            command_line,
            log,
        } = settings;
        let workers = 0..concurrency.max(1);
        let (senders, receivers) = workers.map(|_| mpsc::unbounded_channel()).unzip();
        let watched = (watcher, block_tokens, config_cache);
        let drains = (&drain, drain_time);
        let shared = match assemble(bootstrap, watched, senders, drains, main.handle()) {
            Ok(shared) => shared,
            Err(errors) => {
                drop(guard);
                // Whoever starts it may be within a runtime of its own, where this one may not be waited for.
                main.shutdown_background();
                return Err(errors);
            }
        };
        let (stop, stopped) = watch::channel(false);
        let (ended, admin_ended) = std::sync::mpsc::channel();
        let state = admin_state(&shared, (command_line, log));
        let admin = start_admin(&shared, state, (&stop, ended)).map_err(|error| vec![error])?;
        start_tasks(&shared);
        let (leaving, left) = std::sync::mpsc::channel();
        registration::start(&shared, register, leaving).map_err(|error| vec![error])?;
        let workers = worker::start(receivers, &stopped, stream_gather)
            .map_err(|error| vec![format!("cannot start a worker thread: {error}")])?;
        drop(guard);
        Ok(Self {
            drain,
            shared,
            admin,
            admin_ended,
            left,
            stop,
            workers,
            main: Some(main),
        })
    }

    /// Where a listener really listens, if it is no pipe.
    #[must_use]
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        match self.addresses().get(listener)? {
            EndAddress::Ip(address) => Some(*address),
            EndAddress::Pipe(_) => None,
        }
    }

    /// Where all listeners really listen, by name.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<String, EndAddress> {
        self.shared.listeners.addresses()
    }

    /// Where the admin listens.
    #[must_use]
    pub fn admin_address(&self) -> Option<&EndAddress> {
        self.admin.as_ref()
    }

    /// What filters share; outlives every configuration.
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.shared.services
    }

    /// Pushes what is written anew: listeners, routes, filters and clusters. Index, load and health stay.
    ///
    /// # Errors
    /// Everything that is wrong; then nothing was changed. Or listeners that cannot be bound; then all others were.
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
        self.shared.store();
        self.shared.sinks.flush(Duration::from_secs(1));
        self.shared.exporters.flush(SPANS_FAREWELL);
        let _ = self.left.recv_timeout(FAREWELL);
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
    (watcher, block_tokens, cache): (Watcher, usize, Option<PathBuf>),
    workers: Vec<mpsc::UnboundedSender<Share>>,
    (drain, drain_time): (&Drain, Duration),
    runtime: &runtime::Handle,
) -> Result<Arc<Shared>, Vec<String>> {
    let node = bootstrap.node.clone();
    let far = engines::has_far_peers(&bootstrap.clusters);
    let index = Arc::new(KvIndex::new(kv_index::Limits::default()));
    let fleet = Fleet::new(index.clone(), block_tokens);
    let ledgers = Arc::new(Ledgers::default());
    let clusters = Clusters::new(fleet.clone(), ledgers.clone());
    clusters.authorize(watcher.bearer());
    let services = Services {
        endpoints: clusters.clone(),
        upstream: Arc::new(Pools),
        kv_index: index,
        tokenizers: Arc::new(Tokenizers::new(TokenizersConfig::default())),
        compute: runtime.clone(),
        migration: Arc::default(),
        token_limits: Arc::default(),
        serving: drain.serving.clone(),
        node_cluster: node.cluster.as_str().into(),
        own_host: engines::own_host(&bootstrap.listeners),
        runtime: Arc::default(),
        stat_prefix: Arc::default(),
    };
    let sinks = Arc::new(Sinks::default());
    let exporters = Arc::new(Exporters::default());
    let mut discovery = Discovery::new(services.clone(), sinks.clone(), exporters.clone());
    discovery.write(bootstrap)?;
    if let Some(kept) = cache.as_ref().and_then(|cache| kept::load(cache, &node.id)) {
        discovery.restore(kept);
    }
    let local = LocalFeed::new(watcher.source.clone(), ledgers);
    let common = Common {
        owner: owner(&node.id, drain, clusters.clone())?,
        feed: feed::service(local.clone(), runtime.clone(), drain.clone()),
        drain_time,
        runtime: runtime.clone(),
    };
    let shared = Arc::new(Shared {
        services,
        clusters,
        watcher,
        local: local.clone(),
        peers: Mutex::new(Peers::new(fleet.clone())),
        listeners: Listeners::new(common, workers),
        discovery: Mutex::new(discovery),
        ask: watch::Sender::new(0),
        cache: control_plane::Cache::new(cache),
        carried: ArcSwapOption::empty(),
        initialized: AtomicBool::new(false),
        sinks,
        exporters,
        bootstrap: ArcSwap::from_pointee(Bootstrap::default()),
        runtime: runtime.clone(),
        drain: drain.clone(),
        quit: watch::Sender::new(false),
        started: Instant::now(),
    });
    // From before anybody is listened to: what is told meanwhile is not to be missed.
    let changed = (fleet.watch(), shared.clusters.watch_names());
    shared.begin()?;
    let hidden = far && shared.services.own_host.is_none();
    runtime.spawn(feed::follow_local(fleet, local, hidden));
    runtime.spawn(watching::refresh_views(changed, shared.clone()));
    Ok(shared)
}

/// What all connection managers share; those of peers have the feed beside, and only they have leases.
fn owner(id: &str, drain: &Drain, clusters: Arc<Clusters>) -> Result<Owner, Vec<String>> {
    let via = HeaderValue::from_str(id).map_err(|_| {
        let id = id.escape_debug();
        vec![format!("node id '{id}' cannot be a header value")]
    })?;
    Ok(Owner {
        node: id.into(),
        via,
        drain: drain.clone(),
        feed: None,
        leases: Some(crate::leases::Leases::new(clusters)),
    })
}

impl Shared {
    fn discovery(&self) -> MutexGuard<'_, Discovery> {
        self.discovery
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the first configuration into effect.
    fn begin(&self) -> Result<(), Vec<String>> {
        let mut discovery = self.discovery();
        let now = Instant::now();
        discovery.look(now);
        let errors = self.settle(&mut discovery, now);
        self.bootstrap.store(discovery.written());
        none(&discovery, errors)
    }

    fn apply(&self, bootstrap: Bootstrap) -> Result<(), Vec<String>> {
        let _guard = self.runtime.enter();
        let mut discovery = self.discovery();
        discovery.write(bootstrap)?;
        let now = Instant::now();
        discovery.look(now);
        let errors = self.settle(&mut discovery, now);
        self.bootstrap.store(discovery.written());
        metrics::counter!("outrigger_config_updates_total").increment(1);
        self.wake_streams(&mut discovery);
        none(&discovery, errors)
    }

    /// Takes in what is new in watched files.
    fn look(&self) {
        let mut discovery = self.discovery();
        self.advance(&mut discovery, false, Instant::now());
        self.wake_streams(&mut discovery);
    }

    /// Takes in what there is, brings it into effect, and so on with what that made possible.
    fn advance(&self, discovery: &mut Discovery, mut is_news: bool, now: Instant) {
        for _ in 0..ADVANCES_MAX {
            is_news |= discovery.look(now);
            if !is_news {
                return;
            }
            self.settle(discovery, now);
            metrics::counter!("outrigger_config_updates_total").increment(1);
            is_news = discovery.is_stale();
        }
    }

    /// Brings into effect what is complete. Clusters first: a route must never name one that is not there yet.
    fn settle(&self, discovery: &mut Discovery, now: Instant) -> Vec<(String, String)> {
        let plan = discovery.plan(now);
        self.configure(plan.clusters, plan.contexts);
        self.listeners.warming(plan.warming);
        let errors = self.listeners.apply(&plan.listeners);
        discovery.failed(errors.clone());
        self.cache.is_stale.store(true, Relaxed);
        self.initialized.store(discovery.is_initialized(), Relaxed);
        errors
    }

    fn configure(&self, clusters: Vec<Cluster>, contexts: Contexts) {
        let wanted = (clusters, contexts);
        if self.carried.load().as_deref() == Some(&wanted) {
            return;
        }
        let (clusters, contexts) = &wanted;
        let (engines, peers) = engines::configured(clusters);
        let peers = engines::with_contexts(clusters, peers, contexts);
        self.clusters.configure(clusters, contexts);
        // The fleet knows them by now, so nothing told of them is lost.
        self.local.configure(engines.keys().cloned().collect());
        self.watcher.configure(&engines);
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .configure(&peers);
        self.carried.store(Some(Arc::new(wanted)));
    }

    fn state(&self) -> admin::ServerState {
        if self.drain.has_begun() {
            admin::ServerState::Draining
        } else if self.initialized.load(Relaxed) {
            admin::ServerState::Live
        } else {
            admin::ServerState::Initializing
        }
    }
}

/// Listeners that are written must run.
fn none(discovery: &Discovery, errors: Vec<(String, String)>) -> Result<(), Vec<String>> {
    let written = discovery.written();
    let is_written = |name: &String| written.listeners.iter().any(|known| known.name == *name);
    let errors: Vec<String> = errors
        .into_iter()
        .filter(|(name, _)| is_written(name))
        .map(|(_, error)| error)
        .collect();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors)
    }
}

fn start_tasks(shared: &Arc<Shared>) {
    let (shared, for_files) = (shared.clone(), shared.clone());
    let runtime = shared.runtime.clone();
    runtime.spawn(crate::metrics::upkeep());
    runtime.spawn(async move {
        let mut tick = tokio::time::interval(HOUSEKEEPING);
        loop {
            tick.tick().await;
            shared.clusters.count_members();
        }
    });
    runtime.spawn(control_plane::follow(for_files.clone()));
    runtime.spawn(control_plane::keep(for_files.clone()));
    runtime.spawn(load_reports::follow(for_files.clone()));
    runtime.spawn(watching::watch_files(for_files));
}

fn start_admin(
    shared: &Arc<Shared>,
    state: admin::AdminState,
    (stop, ended): (&watch::Sender<bool>, std::sync::mpsc::Sender<()>),
) -> Result<Option<EndAddress>, String> {
    let bootstrap = shared.bootstrap.load();
    let Some(configured) = &bootstrap.admin else {
        return Ok(None);
    };
    let explain =
        |error: std::io::Error| format!("admin: cannot bind {}: {error}", configured.address);
    let socket = bind_alone(&configured.address, configured.pipe_mode).map_err(explain)?;
    let address = socket.address(&configured.address).map_err(explain)?;
    let socket = Acceptor::new(socket).map_err(explain)?;
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
) -> admin::AdminState {
    let (for_state, for_dump, for_clusters, for_leave, for_drain, for_logs, for_quit) = (
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
        shared.clone(),
    );
    let (for_listeners, for_certs, for_status) = (shared.clone(), shared.clone(), shared.clone());
    let node = shared.bootstrap.load().node.clone();
    admin::AdminState {
        started: shared.started,
        server_state: Arc::new(move || for_state.state()),
        config_dump: Arc::new(move |with_endpoints| for_dump.discovery().dump(with_endpoints)),
        client_status: Arc::new(move |with_contents| {
            for_status.discovery().client_status(with_contents)
        }),
        certs: Arc::new(move || for_certs.discovery().certs()),
        clusters: Arc::new(move || for_clusters.clusters.views()),
        listeners: Arc::new(move || for_listeners.listeners.addresses().into_iter().collect()),
        options,
        node: (node.id, node.cluster),
        serving: shared.drain.serving.clone(),
        runtime: shared.services.runtime.clone(),
        leave: Arc::new(move |engine, leaving| for_leave.local.leave(engine, leaving)),
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
