//! How long a change of a file takes until so many clients have it, and what a client costs the control plane.
//!
//! `cargo run -p outrigger-control-plane --example propagation -- PROGRAM [CLIENTS…]` starts `PROGRAM serve` on a directory of its own, with clients that take everything over ADS
//! (what changed) and no proxy behind them. It changes one endpoint again and again, and prints a line of JSON for each number of clients.

use anyhow::{Context, bail};
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
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const CLUSTERS: usize = 100;
const ENDPOINTS: usize = 10;
const CHANGES: u32 = 20;
/// Of the clock in `/proc/PID/stat`.
const TICKS_PER_SECOND: f64 = 100.0;
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory and the process that serves it.
struct Served {
    directory: PathBuf,
    process: Child,
    address: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Served {
    fn start(program: &str) -> anyhow::Result<Self> {
        let directory = std::env::temp_dir().join(format!("propagation-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        for cluster in 0..CLUSTERS {
            write(&directory, cluster, 1)?;
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let address = format!("127.0.0.1:{port}");
        let process = Command::new(program)
            .args(["serve", "--listen", &address, "--admin", "127.0.0.1:0"])
            .arg("--config")
            .arg(&directory)
            .stderr(Stdio::null())
            .spawn()
            .context("the control plane starts")?;
        Ok(Self {
            directory,
            process,
            address,
        })
    }

    /// Seconds of CPU so far, and MiB of memory.
    fn costs(&self) -> anyhow::Result<(f64, f64)> {
        let file = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", self.process.id()));
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

/// A cluster with its endpoints; the version is a port of one of them.
fn write(directory: &Path, cluster: usize, version: u32) -> anyhow::Result<()> {
    let name = format!("cluster-{cluster}");
    let endpoint = |port: usize| json!({ "endpoint": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } } } });
    let mut endpoints: Vec<_> = (0..ENDPOINTS)
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
    let new = directory.join(".new");
    fs::write(&new, resources.to_string())?;
    fs::rename(new, directory.join(format!("{name}.json")))?;
    Ok(())
}

/// Takes everything, and tells when endpoints came.
async fn client(
    id: usize,
    address: String,
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
    let names = (0..CLUSTERS)
        .map(|index| format!("cluster-{index}"))
        .collect();
    sender.send(ask(Kind::Endpoints, names)).await?;
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

async fn measure(program: &str, clients: usize) -> anyhow::Result<()> {
    let served = Served::start(program)?;
    let (sender, mut came) = mpsc::unbounded_channel();
    for id in 0..clients {
        let (address, sender) = (served.address.clone(), sender.clone());
        tokio::spawn(async move {
            if let Err(error) = client(id, address, sender).await {
                eprintln!("client {id}: {error:#}");
            }
        });
    }
    all(&mut came, clients).await.context("the first time")?;
    // What was sent twice in the beginning is not counted for a change.
    tokio::time::sleep(Duration::from_secs(2)).await;
    while came.try_recv().is_ok() {}
    let (cpu_before, _) = served.costs()?;
    let mut millis = Vec::new();
    for change in 0..CHANGES {
        let begun = Instant::now();
        write(&served.directory, change as usize % CLUSTERS, 2 + change)?;
        let times = all(&mut came, clients).await?;
        millis.extend(
            times
                .iter()
                .map(|time| time.duration_since(begun).as_secs_f64() * 1e3),
        );
    }
    let (cpu, memory) = served.costs()?;
    millis.sort_by(f64::total_cmp);
    let at = |share: f64| millis[((millis.len() - 1) as f64 * share) as usize].round();
    let line = json!({
        "clients": clients,
        "clusters": CLUSTERS,
        "endpoints_of_each": ENDPOINTS,
        "p50_ms": at(0.5),
        "p99_ms": at(0.99),
        "cpu_ms_per_change": ((cpu - cpu_before) * 1e3 / f64::from(CHANGES)).round(),
        "memory_mib": memory.round(),
    });
    println!("{line}");
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let program = arguments.next().context("which program?")?;
    let counts: Vec<usize> = arguments
        .map(|count| count.parse())
        .collect::<Result<_, _>>()?;
    for clients in counts {
        measure(&program, clients).await?;
    }
    Ok(())
}
