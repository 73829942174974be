//! How long a change of a file takes until so many clients have it, and what a client costs the control plane; and what
//! a large configuration costs one proxy. Prints a line of JSON for each; `conformance/propagation/run` starts it.
//!
//! Clients take everything over ADS (what changed), and have no proxy behind them.

use anyhow::{Context, bail};
use clap::Parser;
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
};
use serde_json::{Value, json};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const CHANGES: u32 = 20;
/// What the one proxy is sent.
const LARGE: Envoys = Envoys {
    clusters: 1_000,
    endpoints: 100,
};
const SMALL: Envoys = Envoys {
    clusters: 100,
    endpoints: 10,
};
/// Of the clock in `/proc/PID/stat`.
const TICKS_PER_SECOND: f64 = 100.0;
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at what is awaited.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Args {
    /// The outrigger-control-plane to start.
    #[arg(long)]
    control_plane: String,
    /// The outrigger-proxy to start.
    #[arg(long)]
    proxy: String,
    /// Clients that share Envoy's resources: so many at once, one number after the other.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100,300,1000")]
    clients: Vec<usize>,
    /// Nodes of one Fleet, each of which is sent what is for it.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100,300")]
    nodes: Vec<usize>,
}

/// What the control plane serves, and what of it is changed.
trait Served {
    /// Writes the files for the first time.
    fn write(&self, directory: &Path) -> anyhow::Result<()>;
    /// Changes one endpoint. No two versions are the same.
    fn change(&self, directory: &Path, version: u32) -> anyhow::Result<()>;
    /// Clusters whose endpoints a client asks for.
    fn clusters(&self) -> Vec<String>;
}

/// Resources of Envoy's that are in every view.
#[derive(Clone, Copy)]
struct Envoys {
    clusters: usize,
    endpoints: usize,
}

impl Envoys {
    /// A cluster with its endpoints; the version is a port of one of them.
    fn write_cluster(self, directory: &Path, cluster: usize, version: u32) -> anyhow::Result<()> {
        let name = format!("cluster-{cluster}");
        let endpoint = |port: usize| json!({ "endpoint": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } } } });
        let mut endpoints: Vec<_> = (0..self.endpoints)
            .map(|index| endpoint(10_000 + index))
            .collect();
        endpoints[0] = endpoint(version as usize);
        let resources = json!({ "resources": [
            {
                "@type": Kind::Clusters.type_url(),
                "name": name,
                "type": "EDS",
                "eds_cluster_config": { "eds_config": { "ads": {}, "resource_api_version": "V3" } },
            },
            {
                "@type": Kind::Endpoints.type_url(),
                "cluster_name": name,
                "endpoints": [{ "lb_endpoints": endpoints }],
            },
        ] });
        replace(directory, &format!("{name}.json"), &resources.to_string())
    }
}

impl Served for Envoys {
    fn write(&self, directory: &Path) -> anyhow::Result<()> {
        (0..self.clusters).try_for_each(|cluster| self.write_cluster(directory, cluster, 1))
    }

    fn change(&self, directory: &Path, version: u32) -> anyhow::Result<()> {
        self.write_cluster(directory, version as usize % self.clusters, version)
    }

    fn clusters(&self) -> Vec<String> {
        (0..self.clusters)
            .map(|index| format!("cluster-{index}"))
            .collect()
    }
}

/// A fleet with an engine beside each of its nodes.
struct Nodes(usize);

impl Served for Nodes {
    fn write(&self, directory: &Path) -> anyhow::Result<()> {
        self.change(directory, 1)
    }

    /// Of the first node: to itself its engine is elsewhere, and to all others itself.
    fn change(&self, directory: &Path, version: u32) -> anyhow::Result<()> {
        let port = |node, port: u32| if node == 0 { port + version } else { port };
        let engine = |node| json!({ "node": format!("client-{node}"), "address": format!("127.0.0.1:{}", port(node, 8_000)) });
        let address = |node| {
            let (high, low, port) = (node / 250, node % 250 + 1, port(node, 9_000));
            let address = format!("10.0.{high}.{low}:{port}");
            (format!("client-{node}"), json!(address))
        };
        let engines: Vec<_> = (0..self.0).map(engine).collect();
        let nodes: serde_json::Map<_, _> = (0..self.0).map(address).collect();
        let fleet = json!({
            "apiVersion": "outrigger.dev/v1", "kind": "Fleet", "metadata": { "name": "fleet" },
            "spec": { "pools": [{ "name": "all", "engines": engines }], "nodes": nodes },
        });
        replace(directory, "fleet.json", &fleet.to_string())
    }

    fn clusters(&self) -> Vec<String> {
        vec!["fleet".to_owned()]
    }
}

/// In one step, so that nobody reads half of it.
fn replace(directory: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let new = directory.join(".new");
    fs::write(&new, text)?;
    fs::rename(new, directory.join(name))?;
    Ok(())
}

/// A directory of our own.
struct Directory(PathBuf);

impl Directory {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("propagation-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Best effort.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that ends with its value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(program: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).stderr(Stdio::null());
        let child = command.spawn().with_context(|| program.to_owned())?;
        Ok(Self(child))
    }

    fn control_plane(args: &Args, directory: &Directory, xds: SocketAddr) -> anyhow::Result<Self> {
        let (directory, xds) = (directory.0.display().to_string(), xds.to_string());
        let serve = ["serve", "--admin", "127.0.0.1:0", "--listen", &xds];
        Self::start(
            &args.control_plane,
            &[&serve[..], &["--config", &directory]].concat(),
        )
    }

    /// Seconds of CPU so far, and MiB of memory.
    fn costs(&self) -> anyhow::Result<(f64, f64)> {
        let file = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", self.0.id()));
        let stat = file("stat")?;
        let (_, fields) = stat.rsplit_once(") ").context("stat")?;
        let ticks = fields.split(' ').skip(11).take(2);
        let ticks: f64 = ticks.map(|field| field.parse::<f64>().unwrap_or(0.0)).sum();
        let status = file("status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
        Ok((ticks / TICKS_PER_SECOND, kib.unwrap_or(0.0) / 1024.0))
    }
}

/// An address that was free a moment ago.
fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Takes everything, and tells when endpoints came.
async fn client(
    id: usize,
    address: SocketAddr,
    clusters: Vec<String>,
    came: mpsc::UnboundedSender<Instant>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut client = loop {
        match Channel::from_shared(format!("http://{address}"))?
            .connect()
            .await
        {
            Ok(channel) => break AggregatedDiscoveryServiceClient::new(channel),
            Err(error) if begun.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let (sender, receiver) = mpsc::channel(8);
    let ask = |kind: Kind, names: Vec<String>| DeltaDiscoveryRequest {
        type_url: kind.type_url().to_owned(),
        resource_names_subscribe: names,
        ..DeltaDiscoveryRequest::default()
    };
    let node = Node {
        id: format!("client-{id}"),
        user_agent_name: "outrigger".to_owned(),
        ..Node::default()
    };
    let first = DeltaDiscoveryRequest {
        node: Some(node),
        ..ask(Kind::Clusters, Vec::new())
    };
    sender.send(first).await?;
    sender.send(ask(Kind::Endpoints, clusters)).await?;
    let answers = client.delta_aggregated_resources(ReceiverStream::new(receiver));
    let mut answers = answers.await?.into_inner();
    while let Some(answer) = answers.message().await? {
        if answer.type_url == Kind::Endpoints.type_url() {
            came.send(Instant::now())?;
        }
        let taken = DeltaDiscoveryRequest {
            response_nonce: answer.nonce,
            type_url: answer.type_url,
            ..DeltaDiscoveryRequest::default()
        };
        sender.send(taken).await?;
    }
    bail!("the stream ended")
}

/// Waits until so many have it.
async fn all(
    came: &mut mpsc::UnboundedReceiver<Instant>,
    count: usize,
) -> anyhow::Result<Vec<Instant>> {
    let mut times = Vec::new();
    while times.len() < count {
        let next = tokio::time::timeout(PATIENCE, came.recv()).await;
        times.push(
            next.context("it does not come")?
                .context("all clients ended")?,
        );
    }
    Ok(times)
}

async fn clients(args: &Args, served: &impl Served, clients: usize) -> anyhow::Result<Value> {
    let directory = Directory::new()?;
    served.write(&directory.0)?;
    let address = free_address()?;
    let process = Process::control_plane(args, &directory, address)?;
    let (sender, mut came) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    for id in 0..clients {
        let (clusters, sender) = (served.clusters(), sender.clone());
        tasks.spawn(async move {
            if let Err(error) = client(id, address, clusters, sender).await {
                eprintln!("client {id}: {error:#}");
            }
        });
    }
    all(&mut came, clients).await.context("the first time")?;
    // What was sent twice in the beginning is not counted for a change.
    tokio::time::sleep(Duration::from_secs(2)).await;
    while came.try_recv().is_ok() {}
    let (cpu_before, _) = process.costs()?;
    let mut millis = Vec::new();
    for change in 0..CHANGES {
        let begun = Instant::now();
        served.change(&directory.0, 2 + change)?;
        let times = all(&mut came, clients).await?;
        let taken = times.iter().map(|time| time.duration_since(begun));
        millis.extend(taken.map(|took| took.as_secs_f64() * 1e3));
    }
    let (cpu, memory) = process.costs()?;
    tasks.shutdown().await;
    Ok(json!({
        "clients": clients,
        "p50_ms": quantile(&mut millis, 0.5),
        "p99_ms": quantile(&mut millis, 0.99),
        "control_plane_cpu_ms_per_change": ((cpu - cpu_before) * 1e3 / f64::from(CHANGES)).round(),
        "control_plane_mib": memory.round(),
    }))
}

fn quantile(millis: &mut [f64], share: f64) -> f64 {
    millis.sort_by(f64::total_cmp);
    millis[((millis.len() - 1) as f64 * share) as usize].round()
}

/// A large configuration for one proxy, and changes of one endpoint of it.
async fn one_proxy(args: &Args) -> anyhow::Result<Value> {
    let directory = Directory::new()?;
    LARGE.write(&directory.0)?;
    let (xds, admin) = (free_address()?, free_address()?);
    let control_plane = Process::control_plane(args, &directory, xds)?;
    // Until it has read the directory, there is nothing to be had there.
    while tokio::net::TcpStream::connect(xds).await.is_err() {
        tokio::time::sleep(LOOK).await;
    }
    let bootstrap = directory.0.join(".bootstrap.json");
    fs::write(&bootstrap, bootstrap_of(xds, admin).to_string())?;
    let begun = Instant::now();
    let proxy = Process::start(&args.proxy, &["-c", &bootstrap.display().to_string()])?;
    until(admin, "envoy_cluster_update_success", LARGE.clusters as f64).await?;
    let live = begun.elapsed();
    let (cpu_live, memory) = proxy.costs()?;
    let mut millis = Vec::new();
    for change in 0..CHANGES {
        let begun = Instant::now();
        LARGE.change(&directory.0, 2 + change)?;
        let updates = LARGE.clusters as f64 + f64::from(change) + 1.0;
        until(admin, "envoy_cluster_update_success", updates).await?;
        millis.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    let ((cpu, _), (_, memory_of_control_plane)) = (proxy.costs()?, control_plane.costs()?);
    Ok(json!({
        "clusters": LARGE.clusters,
        "endpoints_of_each": LARGE.endpoints,
        "live_s": (live.as_secs_f64() * 100.0).round() / 100.0,
        "proxy_cpu_s": cpu_live,
        "proxy_mib": memory.round(),
        "control_plane_mib": memory_of_control_plane.round(),
        "change_p50_ms": quantile(&mut millis, 0.5),
        "change_max_ms": quantile(&mut millis, 1.0),
        "proxy_cpu_ms_per_change_and_looking": ((cpu - cpu_live) * 1e3 / f64::from(CHANGES)).round(),
    }))
}

fn bootstrap_of(xds: SocketAddr, admin: SocketAddr) -> Value {
    let address = |at: SocketAddr| json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } });
    let ads = json!({ "ads": {}, "resource_api_version": "V3" });
    json!({
        "node": { "id": "client-0", "cluster": "propagation" },
        "admin": { "address": address(admin) },
        "dynamic_resources": {
            "ads_config": { "api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds" } }] },
            "lds_config": ads, "cds_config": ads,
        },
        "static_resources": { "clusters": [{
            "name": "xds",
            "http2_protocol_options": {},
            "load_assignment": { "cluster_name": "xds", "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(xds) } }] }] },
        }] },
    })
}

/// Waits until the samples of a metric sum up to so much.
async fn until(admin: SocketAddr, metric: &str, sum: f64) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let found = match page(admin, metric).await {
            Ok(page) => page
                .lines()
                .filter(|line| line.starts_with(metric))
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
                .sum(),
            // It does not listen yet.
            Err(_) => 0.0,
        };
        if found >= sum {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            bail!("{metric} is {found}, and not {sum}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What the admin says of one metric.
async fn page(admin: SocketAddr, metric: &str) -> anyhow::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(admin).await?;
    let request = format!(
        "GET /stats/prometheus?filter=^{metric}$ HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut page = String::new();
    stream.read_to_string(&mut page).await?;
    Ok(page)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (mut shared, mut own) = (Vec::new(), Vec::new());
    for count in &args.clients {
        shared.push(clients(&args, &SMALL, *count).await?);
        eprintln!("{}", shared[shared.len() - 1]);
    }
    for count in &args.nodes {
        own.push(clients(&args, &Nodes(*count), *count).await?);
        eprintln!("{}", own[own.len() - 1]);
    }
    let one = one_proxy(&args).await?;
    let shared = json!({ "clusters": SMALL.clusters, "endpoints_of_each": SMALL.endpoints, "curve": shared });
    println!(
        "{}",
        json!({ "envoys_resources": shared, "fleet_of_so_many_nodes": own, "one_proxy": one })
    );
    Ok(())
}
