//! The control plane as a process: from the command line to its end.

use crate::{
    admin::{self, Admin},
    ads::{Discovery, Ending, REQUEST_BYTES_MAX, Shared},
    catalog::Catalog,
    figures,
    lrs::{LoadReporting, Loads},
    registry::{self, REGISTRATION_BYTES_MAX, Registry, table},
    rollout::{Plan, seen::Observed},
    source::{
        Source,
        files::Directory,
        leases::{self, Leases},
    },
    status::ClientStatus,
    store::{Store, VERSIONS_MAX_DEFAULT},
    tls::{self, Access},
    versions::Versions,
};
use anyhow::{Context, ensure};
use clap::Args;
use outrigger_xds::wire::{
    envoy::service::{
        cluster::v3::cluster_discovery_service_server::ClusterDiscoveryServiceServer,
        discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
        endpoint::v3::endpoint_discovery_service_server::EndpointDiscoveryServiceServer,
        extension::v3::extension_config_discovery_service_server::ExtensionConfigDiscoveryServiceServer,
        listener::v3::listener_discovery_service_server::ListenerDiscoveryServiceServer,
        load_stats::v3::load_reporting_service_server::LoadReportingServiceServer,
        route::v3::route_discovery_service_server::RouteDiscoveryServiceServer,
        runtime::v3::runtime_discovery_service_server::RuntimeDiscoveryServiceServer,
        secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer,
        status::v3::client_status_discovery_service_server::ClientStatusDiscoveryServiceServer,
    },
    outrigger::registry::v1::registry_server::RegistryServer,
};
use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Server, server::Router};

/// Between two HTTP/2 pings of a connection on which nothing happens.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// A connection is dead that does not answer one for so long.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// After the last stream was told to end, its connection may take so long to do so.
const FAREWELL: Duration = Duration::from_secs(2);
/// Between two attempts to keep what could not be kept.
const KEEP_RETRY: Duration = Duration::from_secs(2);

/// How a control plane runs.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Directory with resources: YAML, or JSON if a name ends in .json.
    #[arg(long, value_name = "DIR")]
    pub config: PathBuf,
    /// Where proxies come for their resources: xDS over gRPC.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:18000")]
    pub listen: SocketAddr,
    /// Where people and Prometheus look.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:18001")]
    pub admin: SocketAddr,
    /// File in which leases of engines that register are kept over a restart; without it nobody may register.
    #[arg(long, value_name = "FILE")]
    pub leases: Option<PathBuf>,
    /// For so many seconds a registration counts, unless it is renewed; 1 to 3600.
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(table::LEASE_MIN.as_secs()..=table::LEASE_MAX.as_secs()))]
    pub lease_s: u64,
    /// Directory where versions are kept; without it they are until the process ends.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Versions that are kept at most.
    #[arg(long, value_name = "N", default_value_t = VERSIONS_MAX_DEFAULT)]
    pub versions_max: usize,
    /// A new version goes to so many per cent of the nodes, step by step, such as 10,50,100.
    #[arg(
        long,
        value_name = "PERCENT,…",
        value_delimiter = ',',
        default_value = "100"
    )]
    pub rollout: Vec<u8>,
    /// How long each step is watched before the next.
    #[arg(long, value_name = "S", default_value_t = 60)]
    pub rollout_step_s: u64,
    /// Who may come for them.
    #[command(flatten)]
    pub tls: tls::Options,
    /// After SIGTERM, streams end over so many seconds, so that not all proxies go elsewhere at once.
    #[arg(long, value_name = "S", default_value_t = 5)]
    pub drain_time_s: u64,
    /// Level, or directives such as info,outrigger_control_plane=debug; goes to standard error.
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

/// A control plane that serves.
#[derive(Debug)]
pub struct Running {
    /// Where it serves xDS.
    pub address: SocketAddr,
    /// Where its admin is.
    pub admin: SocketAddr,
    ending: watch::Sender<Option<Ending>>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    /// Ends leases that are over.
    expiry: Option<JoinHandle<()>>,
    tasks: Vec<JoinHandle<()>>,
}

/// Reads the directory and begins to serve. What is wrong there is no error: nothing is served until it is mended.
///
/// # Errors
/// The directory does not exist, or an address is taken.
pub async fn start(options: &Options) -> anyhow::Result<Running> {
    let directory = &options.config;
    ensure!(
        directory.is_dir(),
        "{}: not a directory",
        directory.display()
    );
    figures::install();
    let access = Access::new(&options.tls)?;
    warn_of_who_may_come(options, access.as_deref());
    let bound = |address: SocketAddr| async move {
        let listener = TcpListener::bind(address).await;
        listener.with_context(|| format!("cannot listen on {address}"))
    };
    let (listener, admin) = (bound(options.listen).await?, bound(options.admin).await?);
    let (address, admin_address) = (listener.local_addr()?, admin.local_addr()?);
    let (mut sources, registry) = sources(options)?;
    let observed = Observed::default();
    let (clients, loads) = (observed.clients.clone(), observed.loads.clone());
    let issues = access
        .as_ref()
        .is_some_and(|access| access.authority().is_some());
    let plan = plan(options)?;
    let look_interval = plan.look_interval();
    let versions = Versions::new(store(options).await?, plan).issuing(issues);
    let names = sources.iter().map(|source| source.name());
    let catalog = Catalog::with(names, versions, observed);
    let catalog = Arc::new(match &registry {
        Some(_) => catalog.with_passing(leases::NAME),
        None => catalog,
    });
    // So that who comes first finds something.
    beside(&catalog, Catalog::restore).await;
    for source in &mut sources {
        take(source.as_mut(), &catalog).await;
    }
    let (ending, ended) = watch::channel(None);
    let shared = Shared {
        catalog: catalog.clone(),
        clients: clients.clone(),
        ending: ended,
    };
    let incoming = tls::incoming(listener, access.clone());
    let beside = (loads.clone(), registry.clone());
    let serving = tokio::spawn(serve(incoming, shared, beside));
    let mut tasks: Vec<JoinHandle<()>> = Vec::new();
    for source in sources {
        tasks.push(tokio::spawn(follow(source, catalog.clone())));
    }
    tasks.push(tokio::spawn(watch_versions(catalog.clone(), look_interval)));
    let expiry = registry.clone().map(|it| tokio::spawn(it.look()));
    tasks.extend(access.map(|access| tokio::spawn(access.follow())));
    let shown = Admin {
        catalog,
        clients,
        loads,
        registry,
    };
    tasks.push(tokio::spawn(admin::serve(admin, Arc::new(shown))));
    tracing::info!(%address, admin = %admin_address, directory = %directory.display(), "serving xDS");
    Ok(Running {
        address,
        admin: admin_address,
        ending,
        serving,
        expiry,
        tasks,
    })
}

/// All sources of a process.
type Sources = Vec<Box<dyn Source>>;

/// Where resources come from, and where engines register, if they may.
fn sources(options: &Options) -> anyhow::Result<(Sources, Option<Arc<Registry>>)> {
    let mut sources: Sources = Vec::new();
    let mut registry = None;
    if let Some(path) = &options.leases {
        let length = Duration::from_secs(options.lease_s);
        let leases = Registry::new(leases::load(path, length)?);
        // First: versions that are kept are served when it is known who registered, and what the directory says comes after.
        sources.push(Box::new(Leases::new(leases.clone(), path.clone())));
        registry = Some(leases);
    }
    sources.push(Box::new(Directory::new(options.config.clone())));
    Ok((sources, registry))
}

/// All that a source has, again and again.
async fn follow(mut source: Box<dyn Source>, catalog: Arc<Catalog>) {
    loop {
        take(source.as_mut(), &catalog).await;
    }
}

/// Said once: on a loopback address, or behind TLS of somebody else's, it may be what is wanted.
fn warn_of_who_may_come(options: &Options, access: Option<&Access>) {
    let listen = options.listen;
    if access.is_none() && !listen.ip().is_loopback() {
        tracing::warn!(%listen, "xDS without TLS: everybody who reaches this address is the node that they say, is sent its secrets, and may register engines if --leases is given");
    }
    if access.is_some() && options.leases.is_some() {
        tracing::warn!(
            "--leases with TLS: outrigger-proxy does not register over TLS yet, so its engines will be missing"
        );
    }
}

fn plan(options: &Options) -> anyhow::Result<Plan> {
    let step = Duration::from_secs(options.rollout_step_s);
    let plan = Plan::new(&options.rollout, step);
    plan.map_err(|error| anyhow::anyhow!("--rollout, --rollout-step-s: {error}"))
}

/// Versions that are kept. To open it takes time, and is done beside the runtime.
async fn store(options: &Options) -> anyhow::Result<Store> {
    let versions_max = options.versions_max;
    let Some(directory) = options.state.clone() else {
        return Ok(Store::in_memory(versions_max));
    };
    let opening = tokio::task::spawn_blocking(move || Store::open(&directory, versions_max));
    Ok(opening.await??)
}

/// Follows what is tried, and tries again what could not be kept.
async fn watch_versions(catalog: Arc<Catalog>, interval: Duration) {
    let mut tried = Instant::now();
    loop {
        tokio::time::sleep(interval).await;
        if catalog.rollout().is_some() {
            beside(&catalog, Catalog::look).await;
        }
        if tried.elapsed() >= KEEP_RETRY {
            tried = Instant::now();
            beside(&catalog, Catalog::retry).await;
        }
    }
}

/// What takes time is done beside the runtime.
async fn beside(catalog: &Arc<Catalog>, what: fn(&Catalog)) {
    let catalog = catalog.clone();
    if let Err(error) = tokio::task::spawn_blocking(move || what(&catalog)).await {
        tracing::error!(%error, "a step of the configuration failed");
    }
}

/// What a source has next. Judging it takes time, and is done beside the runtime.
async fn take(source: &mut dyn Source, catalog: &Arc<Catalog>) {
    let news = source.next().await;
    let (name, catalog) = (source.name().to_owned(), catalog.clone());
    let taking = tokio::task::spawn_blocking(move || catalog.take(&name, news));
    if let Err(error) = taking.await {
        tracing::error!(%error, "judging the configuration failed");
    }
}

/// Until streams are to end and all have.
async fn serve(
    incoming: ReceiverStream<std::io::Result<tls::Connection>>,
    shared: Shared,
    beside: (Arc<Loads>, Option<Arc<Registry>>),
) -> Result<(), tonic::transport::Error> {
    let mut ending = shared.ending.clone();
    let ended = async move {
        // If nobody can tell, nobody waits either.
        let _ = ending.wait_for(Option::is_some).await;
    };
    router(&shared, beside)
        .serve_with_incoming_shutdown(incoming, ended)
        .await
}

fn router(shared: &Shared, (loads, registry): (Arc<Loads>, Option<Arc<Registry>>)) -> Router {
    let discovery = Arc::new(Discovery(shared.clone()));
    let status = ClientStatus::new(shared.clients.clone());
    let load_reporting = LoadReportingServiceServer::new(LoadReporting(loads))
        .max_decoding_message_size(REQUEST_BYTES_MAX);
    let registry = registry::Service {
        ending: shared.ending.clone(),
        registry,
    };
    let registry = RegistryServer::new(registry).max_decoding_message_size(REGISTRATION_BYTES_MAX);
    macro_rules! service {
        ($server:ident) => {
            $server::from_arc(discovery.clone())
                .max_decoding_message_size(REQUEST_BYTES_MAX)
                .max_encoding_message_size(usize::MAX)
        };
    }
    Server::builder()
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .add_service(service!(AggregatedDiscoveryServiceServer))
        .add_service(service!(ClusterDiscoveryServiceServer))
        .add_service(service!(EndpointDiscoveryServiceServer))
        .add_service(service!(ListenerDiscoveryServiceServer))
        .add_service(service!(RouteDiscoveryServiceServer))
        .add_service(service!(SecretDiscoveryServiceServer))
        .add_service(service!(RuntimeDiscoveryServiceServer))
        .add_service(service!(ExtensionConfigDiscoveryServiceServer))
        .add_service(ClientStatusDiscoveryServiceServer::new(status))
        .add_service(load_reporting)
        .add_service(registry)
}

impl Running {
    /// Ends: no connection is accepted any more, and streams end over this time.
    ///
    /// # Errors
    /// Serving failed before.
    pub async fn end(self, over: Duration) -> anyhow::Result<()> {
        self.ending.send_replace(Some(Ending {
            since: Instant::now(),
            over,
        }));
        // Nobody can renew a lease any more.
        if let Some(expiry) = self.expiry {
            expiry.abort();
        }
        let served = timeout(over + FAREWELL, self.serving).await;
        for task in self.tasks {
            task.abort();
        }
        match served {
            Ok(served) => Ok(served??),
            // Who does not take leave is left.
            Err(_) => Ok(()),
        }
    }

    /// Serves until SIGTERM or SIGINT, or until it cannot any more. A second one ends it at once.
    async fn until_told(mut self, over: Duration) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            served = &mut self.serving => return Ok(served??),
        }
        tracing::info!(?over, "streams end");
        tokio::select! {
            ended = self.end(over) => return ended,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("told twice to end: what goes on is left");
        Ok(())
    }
}

/// Serves until it is told to end.
///
/// # Errors
/// It could not start, or not go on.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&options.log_level)
        .with_context(|| format!("--log-level {}", options.log_level))?;
    // Best effort: a program that runs this as a part of itself may have its own subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    let served = runtime.block_on(async {
        let running = start(options).await?;
        let over = Duration::from_secs(options.drain_time_s);
        running.until_told(over).await
    });
    // What reads or judges files right now cannot be cut: without a limit, it would be waited for.
    runtime.shutdown_timeout(FAREWELL);
    served
}
