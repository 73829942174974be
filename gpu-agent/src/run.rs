//! The agent process: its flags, and what it starts and stops.

use crate::engine::{EngineConfig, KvEndpoints};
use crate::http::{ApiKey, authority};
use crate::hub::Hub;
use crate::publish::nats_publish;
use crate::registration::registering;
use crate::server::serve;
use anyhow::{Context, bail};
use clap::Parser;
use metrics_exporter_prometheus::PrometheusBuilder;
use outrigger_xds::block_hash::BLOCK_TOKENS_DEFAULT;
use outrigger_xds::feed::FeedSource;
use outrigger_xds::registry::{
    Registrant,
    holder::{FAREWELL, hold},
};
use outrigger_xds::report::{EngineId, Role};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Between two tries to tell the feed over NATS.
const NATS_RETRY: Duration = Duration::from_secs(1);

/// Watches the engines of a node and tells of them.
#[derive(Debug, Parser)]
#[command(name = "outrigger-agent", version)]
pub struct Args {
    /// An engine: `http://HOST:PORT[;role=both|prefill|decode][;bootstrap=H:P][;cohort=L][;events=tcp://H:P][;replay=tcp://H:P][;topic=T]`.
    #[arg(long = "engine", value_name = "URL", required = true)]
    pub engines: Vec<String>,
    /// Where to serve the feed over gRPC, and /metrics.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15021")]
    pub listen: SocketAddr,
    /// NATS server to publish the feed at, `nats://HOST:PORT`.
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
    /// Name of this node, the first part of its engines' names. Default: the host's name.
    #[arg(long, value_name = "ID")]
    pub node: Option<String>,
    /// File with the API key of the engines.
    #[arg(long, value_name = "FILE")]
    pub engine_api_key_file: Option<PathBuf>,
    /// Tokens in a canonical KV block; the same on all proxies and agents of a fleet.
    #[arg(long, value_name = "N", default_value_t = BLOCK_TOKENS_DEFAULT)]
    pub block_tokens: usize,
    /// A control plane where these engines are registered, `http://HOST:PORT`, or `https://HOST:PORT` by mutual TLS.
    #[arg(long, visible_alias = "control-plane", value_name = "URL")]
    pub register: Option<String>,
    /// Where others hear the feed, as it is registered: HOST:PORT; default is where it is served.
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<String>,
    /// What its engines are registered with, to be chosen by; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// The group of nodes that it is registered in.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub cluster: String,
    /// Where it is registered to be.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub region: String,
    /// The same, closer.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub zone: String,
    /// With --register: certificate of this node, PEM, leaf first.
    #[arg(long, value_name = "FILE")]
    pub peer_tls_cert: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE")]
    pub peer_tls_key: Option<PathBuf>,
    /// CAs of the control plane.
    #[arg(long, value_name = "FILE")]
    pub peer_tls_ca: Option<PathBuf>,
}

/// Reads one `--engine`; `node` begins its name.
///
/// # Errors
/// If the URL or an option is wrong.
pub fn parse_engine(text: &str, node: &str) -> anyhow::Result<EngineConfig> {
    let mut parts = text.split(';');
    let url = parts.next().unwrap_or_default();
    let authority = authority(url)?;
    let mut config = EngineConfig::new(EngineId::from(format!("{node}/{authority}").as_str()), url);
    let mut endpoints = KvEndpoints::default();
    for part in parts {
        match part.split_once('=') {
            Some(("role", "both")) => config.role = Role::Both,
            Some(("role", "prefill")) => config.role = Role::Prefill,
            Some(("role", "decode")) => config.role = Role::Decode,
            Some(("bootstrap", address)) => config.bootstrap = Some(address.to_owned()),
            Some(("cohort", label)) if !label.is_empty() => config.cohort = Some(label.to_owned()),
            Some(("events", endpoint)) => endpoint.clone_into(&mut endpoints.endpoint),
            Some(("replay", endpoint)) => endpoints.replay_endpoint = Some(endpoint.to_owned()),
            Some(("topic", topic)) => topic.clone_into(&mut endpoints.topic),
            _ => bail!("--engine {text}: {part:?} is no option"),
        }
    }
    if endpoints.endpoint.is_empty() && endpoints != KvEndpoints::default() {
        bail!("--engine {text}: replay and topic need events");
    }
    if !endpoints.endpoint.is_empty() {
        config.kv_endpoints = Some(endpoints);
    }
    Ok(config)
}

/// The engines of the command line.
fn watched(args: &Args, node: &str) -> anyhow::Result<Vec<EngineConfig>> {
    let key = args
        .engine_api_key_file
        .as_deref()
        .map(std::fs::read_to_string)
        .transpose()
        .context("--engine-api-key-file")?;
    let mut configs = Vec::new();
    for engine in &args.engines {
        let config = parse_engine(engine, node)?;
        configs.push(EngineConfig {
            api_key: key.as_deref().map(ApiKey::new),
            block_tokens: args.block_tokens,
            ..config
        });
    }
    Ok(configs)
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// If a flag is wrong or the address cannot be bound.
pub async fn run(args: Args) -> anyhow::Result<()> {
    if args.block_tokens == 0 {
        bail!("--block-tokens 0: must be at least 1");
    }
    let metrics = PrometheusBuilder::new()
        .install_recorder()
        .context("metrics")?;
    let node = args.node.clone().unwrap_or_else(host_name);
    let configs = watched(&args, &node)?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("--listen {}", args.listen))?;
    let listening = listener.local_addr()?;
    let registering = registering(&args, &node, &configs, listening)?;
    tracing::info!(address = %listening, node, "serving the feed");
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );

    let hub = Hub::new();
    for config in configs {
        hub.watch(config);
    }
    let source: Arc<dyn FeedSource> = hub;
    if let Some(url) = args.nats.clone() {
        let source = Arc::clone(&source);
        tokio::spawn(async move {
            while let Err(error) = nats_publish(&url, Arc::clone(&source)).await {
                tracing::warn!(%error, "the feed is not told over NATS");
                tokio::time::sleep(NATS_RETRY).await;
            }
        });
    }
    let (end, ended) = oneshot::channel::<()>();
    let holding = registering.map(|registering| {
        let node = registering.node.clone();
        let over = Box::pin(async move {
            // Dropped or told, it is over.
            let _ = ended.await;
        });
        let who = (node, Registrant::Agent);
        tokio::spawn(hold(Arc::new(registering), who, Arc::clone(&source), over))
    });
    // Subscribers see their connection end, and the engines live on: nothing has to be drained.
    let ending = async {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM"),
            _ = interrupt.recv() => tracing::info!("SIGINT"),
        }
        drop(end);
        if let Some(holding) = holding {
            // The feed is told until nobody is sent there any more.
            let _ = timeout(FAREWELL, holding).await;
        }
    };
    tokio::select! {
        () = serve(listener, Arc::clone(&source), Some(metrics)) => {}
        () = ending => {}
    }
    Ok(())
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() {
        "localhost".to_owned()
    } else {
        name.trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_on_the_command_line() {
        let config = parse_engine(
            "http://h:8000;role=decode;events=tcp://*:5557;replay=tcp://*:5558;topic=kv",
            "n",
        )
        .unwrap();
        assert_eq!(
            (
                config.id.to_string().as_str(),
                config.url.as_str(),
                config.role
            ),
            ("n/h:8000", "http://h:8000", Role::Decode)
        );
        let endpoints = config.kv_endpoints.unwrap();
        assert_eq!(
            (
                endpoints.endpoint.as_str(),
                endpoints.replay_endpoint.as_deref(),
                endpoints.topic.as_str()
            ),
            ("tcp://*:5557", Some("tcp://*:5558"), "kv")
        );
        assert!(
            parse_engine("http://h:1", "n")
                .unwrap()
                .kv_endpoints
                .is_none()
        );
        for wrong in [
            "h:1",
            "http://h:1;role=worker",
            "http://h:1;what",
            "http://h:1;topic=x",
        ] {
            assert!(parse_engine(wrong, "n").is_err(), "{wrong}");
        }
    }
}
