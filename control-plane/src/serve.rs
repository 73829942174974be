//! The control plane as a process: from the command line to its end.

use crate::{
    admin::{self, Admin},
    ads::{Discovery, Ending, REQUEST_BYTES_MAX, Shared},
    catalog::Catalog,
    clients::Clients,
    figures,
    lrs::{LoadReporting, Loads},
    registry::{self, REGISTRATION_BYTES_MAX, Registry, table},
    source::{
        Source,
        files::Directory,
        leases::{self, Leases},
    },
    status::ClientStatus,
};
use anyhow::{Context, ensure};
use clap::Args;
use outrigger_xds::wire::{
    envoy::service::{
        cluster::v3::cluster_discovery_service_server::ClusterDiscoveryServiceServer,
        discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
        endpoint::v3::endpoint_discovery_service_server::EndpointDiscoveryServiceServer,
        listener::v3::listener_discovery_service_server::ListenerDiscoveryServiceServer,
        load_stats::v3::load_reporting_service_server::LoadReportingServiceServer,
        route::v3::route_discovery_service_server::RouteDiscoveryServiceServer,
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
use tonic::transport::{
    Server,
    server::{Router, TcpIncoming},
};

/// Between two HTTP/2 pings of a connection on which nothing happens.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// A connection is dead that does not answer one for so long.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// After the last stream was told to end, its connection may take so long to do so.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a control plane runs.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Directory with resources: YAML, or JSON if a name ends in .json.
    #[arg(long, value_name = "DIR")]
    pub config: PathBuf,
    /// Where proxies come for their resources: xDS over gRPC, without TLS.
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
    let bound = |address: SocketAddr| async move {
        let listener = TcpListener::bind(address).await;
        listener.with_context(|| format!("cannot listen on {address}"))
    };
    let (listener, admin) = (bound(options.listen).await?, bound(options.admin).await?);
    let (address, admin_address) = (listener.local_addr()?, admin.local_addr()?);
    let (mut sources, registry) = sources(options)?;
    let catalog = Arc::new(Catalog::new(sources.iter().map(|source| source.name())));
    let clients = Arc::new(Clients::default());
    // So that who comes first finds something.
    for source in &mut sources {
        take(source.as_mut(), &catalog).await;
    }
    let (ending, ended) = watch::channel(None);
    let shared = Shared {
        catalog: catalog.clone(),
        clients: clients.clone(),
        ending: ended,
    };
    let loads = Arc::new(Loads::default());
    let serving = tokio::spawn(serve(listener, shared, (loads.clone(), registry.clone())));
    let mut tasks: Vec<JoinHandle<()>> = Vec::new();
    for source in sources {
        tasks.push(tokio::spawn(follow(source, catalog.clone())));
    }
    tasks.extend(registry.clone().map(|it| tokio::spawn(it.look())));
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
        tasks,
    })
}

/// All sources of a process.
type Sources = Vec<Box<dyn Source>>;

/// Where resources come from, and where engines register, if they may.
fn sources(options: &Options) -> anyhow::Result<(Sources, Option<Arc<Registry>>)> {
    let mut sources: Sources = vec![Box::new(Directory::new(options.config.clone()))];
    let Some(path) = &options.leases else {
        return Ok((sources, None));
    };
    let length = Duration::from_secs(options.lease_s);
    let registry = Registry::new(leases::load(path, length)?);
    sources.push(Box::new(Leases::new(registry.clone(), path.clone())));
    Ok((sources, Some(registry)))
}

/// All that a source has, again and again.
async fn follow(mut source: Box<dyn Source>, catalog: Arc<Catalog>) {
    loop {
        take(source.as_mut(), &catalog).await;
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
    listener: TcpListener,
    shared: Shared,
    beside: (Arc<Loads>, Option<Arc<Registry>>),
) -> Result<(), tonic::transport::Error> {
    let mut ending = shared.ending.clone();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
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
