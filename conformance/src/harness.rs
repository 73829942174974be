//! Real proxies, real sockets, servers that misbehave and clients that look closely: what black-box cases stand on.
//!
//! A case says which [`ProxyBuilder`] it wants, starts it, and speaks to it as a client would. Proxies run inside the
//! test's process (their metrics are then shared), or as a process of their own where one has to be killed.

mod client;
mod echo;
mod process;
mod upstream;

pub use client::{AnyBody, Client, Reply, Streaming, Version, raw, raw_within, request};
pub use echo::EchoH2;
pub use process::{Agent, ControlPlane, Process, driven_bootstrap, send_signal};
pub use upstream::{Conn, Exchange, Upstream};

use outrigger_filters::end_address::EndAddress;
use outrigger_proxy::{
    Proxy,
    bootstrap::{FLEET, INBOUND, OUTBOUND, from_options},
    engines::Watcher,
    options::Options,
    run::Settings,
};
use outrigger_xds::{
    feed::FeedSource,
    resource::{
        bootstrap::Bootstrap,
        endpoint::{Address, HealthStatus, LbEndpoint},
        filter_chain::FilterChain,
        listener::{HttpConnectionManager, Listener},
    },
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How long a case waits for what must come; generous, since the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// An address that nobody is at, for what is told of it before it is bound, or binds it again. The system gives its port
/// to nobody who asks for any.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_address() -> SocketAddr {
    // Systems hand out ports from 32768 on, if not further up.
    const PORTS: std::ops::Range<u16> = 10_000..32_000;
    static FIRST: OnceLock<u16> = OnceLock::new();
    static GIVEN: AtomicUsize = AtomicUsize::new(0);
    let first = *FIRST.get_or_init(|| rand::random_range(PORTS));
    let mut asked = PORTS.map(|_| {
        let place = usize::from(first - PORTS.start) + GIVEN.fetch_add(1, Relaxed);
        let port = PORTS.start + (place % PORTS.len()) as u16;
        SocketAddr::from(([127, 0, 0, 1], port))
    });
    asked
        .find(|address| std::net::TcpListener::bind(address).is_ok())
        .expect("invariant: some port is free")
}

/// Waits until `look` gives something.
///
/// # Panics
/// If it gives nothing for [`PATIENCE`]; `what` says what was waited for.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {PATIENCE:?} in vain: {what}"
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// A file name of this test run that nothing else uses.
#[must_use]
pub fn scratch(name: &str) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Relaxed);
    std::env::temp_dir().join(format!("outrigger-{}-{number}-{name}", std::process::id()))
}

/// A listener with one filter chain, of HTTP, such as those of a stand-alone proxy.
pub trait OneChain {
    /// The chain.
    fn chain(&mut self) -> &mut FilterChain;
    /// Its connection manager.
    fn http(&mut self) -> &mut HttpConnectionManager;
}

impl OneChain for Listener {
    fn chain(&mut self) -> &mut FilterChain {
        &mut self.filter_chains[0]
    }

    fn http(&mut self) -> &mut HttpConnectionManager {
        let mut managers = self.http_managers_mut();
        managers.next().expect("invariant: a chain of HTTP")
    }
}

/// A change to the resources of a proxy.
type EditResources = Box<dyn FnOnce(&mut Bootstrap)>;

/// What a proxy is to be.
#[derive(Default)]
pub struct ProxyBuilder {
    arguments: Vec<String>,
    servers: Vec<SocketAddr>,
    edits: Vec<EditResources>,
    concurrency: usize,
    told_by: Option<Arc<dyn FeedSource>>,
}

impl ProxyBuilder {
    /// A proxy with free ports, one worker, `round_robin`, and an access log that the case can read.
    #[must_use]
    pub fn new() -> Self {
        Self {
            concurrency: 1,
            ..Self::default()
        }
        .flag("--policy", "round_robin")
        // Cases count what reaches an engine.
        .flag("--canary", "off")
    }

    /// A command-line flag. One given twice counts as given last.
    #[must_use]
    pub fn flag(mut self, name: &str, value: &str) -> Self {
        self.arguments.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// `--engine`.
    #[must_use]
    pub fn engine(self, address: SocketAddr) -> Self {
        let url = format!("http://{address}");
        self.flag("--engine", &url)
    }

    /// `--peer`.
    #[must_use]
    pub fn peer(self, inbound: SocketAddr) -> Self {
        let url = format!("http://{inbound}");
        self.flag("--peer", &url)
    }

    /// An ordinary HTTP server in the fleet's cluster: nothing is detected, it counts as alive until it fails.
    #[must_use]
    pub fn server(mut self, address: SocketAddr) -> Self {
        self.servers.push(address);
        self
    }

    /// Worker threads.
    #[must_use]
    pub fn concurrency(mut self, workers: usize) -> Self {
        self.concurrency = workers;
        self
    }

    /// Who tells of the engines beside it, instead of the adapters.
    #[must_use]
    pub fn told_by(mut self, source: impl FeedSource) -> Self {
        self.told_by = Some(Arc::new(source));
        self
    }

    /// A change to the resources that the flags became.
    #[must_use]
    pub fn edit(mut self, edit: impl FnOnce(&mut Bootstrap) + 'static) -> Self {
        self.edits.push(Box::new(edit));
        self
    }

    /// Starts it in this process.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(self) -> TestProxy {
        static NEXT_NODE: AtomicUsize = AtomicUsize::new(0);
        let log = scratch("access.log");
        let node = format!("node-{}", NEXT_NODE.fetch_add(1, Relaxed));
        let mut arguments = vec!["outrigger-proxy".to_owned()];
        for (name, value) in [
            ("--listen", "127.0.0.1:0"),
            ("--inbound", "127.0.0.1:0"),
            ("--admin", "127.0.0.1:0"),
            (
                "--access-log",
                log.to_str().expect("invariant: made of ASCII"),
            ),
            ("--node-id", &node),
        ] {
            if !self.arguments.iter().any(|given| given == name) {
                arguments.extend([name.to_owned(), value.to_owned()]);
            }
        }
        arguments.extend(last_of_each(&self.arguments));
        let options = <Options as clap::Parser>::try_parse_from(&arguments)
            .expect("invariant: flags of a test are right");
        let mut bootstrap = from_options(&options).expect("invariant: flags of a test are right");
        for address in &self.servers {
            add_server(&mut bootstrap, *address);
        }
        for edit in self.edits {
            edit(&mut bootstrap);
        }
        let watcher = match self.told_by {
            Some(source) => Watcher::elsewhere(source),
            None => Watcher::embedded(None, options.block_tokens)
                .expect("invariant: built with the adapters"),
        };
        let settings = Settings {
            concurrency: self.concurrency,
            watcher,
            block_tokens: options.block_tokens,
            drain_time: options.drain_time(),
            stream_gather: Duration::from_micros(options.stream_gather_us),
            config_cache: None,
            register: None,
            command_line: Value::Null,
            log: None,
        };
        let proxy = Proxy::start(bootstrap.clone(), settings).expect("invariant: the proxy starts");
        TestProxy {
            proxy,
            log,
            bootstrap,
        }
    }
}

/// Flags that may be given once keep the last value; `--engine` and `--peer` add up.
fn last_of_each(arguments: &[String]) -> Vec<String> {
    let pairs: Vec<_> = arguments.chunks(2).map(<[String]>::to_vec).collect();
    let adds_up = |name: &str| matches!(name, "--engine" | "--peer");
    let is_last = |at: usize| {
        adds_up(&pairs[at][0]) || !pairs[at + 1..].iter().any(|later| later[0] == pairs[at][0])
    };
    (0..pairs.len())
        .filter(|&at| is_last(at))
        .flat_map(|at| pairs[at].clone())
        .collect()
}

/// Puts an ordinary HTTP server into the fleet's cluster.
pub fn add_server(bootstrap: &mut Bootstrap, address: SocketAddr) {
    let endpoint = LbEndpoint {
        address: Address {
            host: address.ip().to_string(),
            port: address.port(),
        },
        hostname: String::new(),
        health_status: HealthStatus::Healthy,
        load_balancing_weight: 1,
        locality: 0,
        metadata: BTreeMap::new(),
    };
    for cluster in bootstrap
        .clusters
        .iter_mut()
        .filter(|cluster| cluster.name == FLEET)
    {
        cluster.load_assignment.endpoints.push(endpoint.clone());
    }
}

/// A proxy that runs in this process.
pub struct TestProxy {
    /// The proxy itself.
    pub proxy: Proxy,
    /// What it was started with.
    pub bootstrap: Bootstrap,
    log: PathBuf,
}

impl TestProxy {
    /// Where clients arrive.
    #[must_use]
    pub fn outbound(&self) -> SocketAddr {
        self.proxy
            .address(OUTBOUND)
            .expect("invariant: every stand-alone proxy has it")
    }

    /// Where peers arrive.
    #[must_use]
    pub fn inbound(&self) -> SocketAddr {
        self.proxy
            .address(INBOUND)
            .expect("invariant: every stand-alone proxy has it")
    }

    /// Where the admin listens.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        match self.proxy.admin_address() {
            Some(EndAddress::Ip(address)) => *address,
            _ => unreachable!("invariant: every stand-alone proxy has it, at a port"),
        }
    }

    /// A client connection to the outbound listener.
    pub async fn client(&self, version: Version) -> Client {
        Client::connect(self.outbound(), version).await
    }

    /// Waits until `count` endpoints of the fleet may get requests.
    pub async fn wait_alive(&self, count: usize) {
        wait_alive(self.admin(), count).await;
    }

    /// A counter or gauge as `/stats/prometheus` shows it, summed over its labels that contain `label`.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        metric(self.admin(), name, label).await
    }

    /// The access log, once it has `count` lines.
    pub async fn log(&self, count: usize) -> Vec<Value> {
        let lines = || async {
            let text = std::fs::read_to_string(&self.log).unwrap_or_default();
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            let lines: Vec<Value> = whole
                .lines()
                .map(|line| {
                    serde_json::from_str(line).expect("invariant: an access log line is JSON")
                })
                .collect();
            (lines.len() >= count).then_some(lines)
        };
        eventually(&format!("{count} lines of access log"), lines).await
    }

    /// The only line of the access log.
    pub async fn only_log(&self) -> Value {
        let mut lines = self.log(1).await;
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.remove(0)
    }
}

impl Drop for TestProxy {
    fn drop(&mut self) {
        // Best effort: a scratch file.
        let _ = std::fs::remove_file(&self.log);
    }
}

/// The hosts of a cluster as the admin shows them.
pub async fn hosts(admin: SocketAddr, cluster: &str) -> Vec<Value> {
    let reply = Client::get(admin, "/clusters?format=json").await;
    let all = reply.json();
    let statuses = all["cluster_statuses"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let found = statuses
        .into_iter()
        .find(|status| status["name"] == cluster);
    found
        .and_then(|status| status["host_statuses"].as_array().cloned())
        .unwrap_or_default()
}

/// How many endpoints of the fleet may get requests.
pub async fn alive(admin: SocketAddr) -> usize {
    let is_alive = |host: &&Value| {
        let ours = &host["outrigger"];
        ours["via"] == "plain" || ours["heard"] == true && ours["health"] == "healthy"
    };
    hosts(admin, FLEET).await.iter().filter(is_alive).count()
}

/// Waits until exactly `count` endpoints of the fleet may get requests.
pub async fn wait_alive(admin: SocketAddr, count: usize) {
    eventually(&format!("{count} endpoints alive"), || async {
        (alive(admin).await == count).then_some(())
    })
    .await;
}

/// See [`TestProxy::metric`].
pub async fn metric(admin: SocketAddr, name: &str, label: &str) -> f64 {
    let reply = Client::get(admin, "/stats/prometheus").await;
    let page = reply.text();
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        let ours = (labels.is_empty() || labels.starts_with('{')) && labels.contains(label);
        ours.then(|| value.parse::<f64>().ok()).flatten()
    });
    values.sum()
}
