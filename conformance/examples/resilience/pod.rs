//! An engine and the proxy beside it, which die and come back.

use crate::{Args, dialect::side};
use clap::ValueEnum;
use outrigger_conformance::{
    harness::{OneChain, ProxyBuilder, free_address, wait_alive},
    sim::{Fault, FaultKind, Side, SimEngine},
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{bootstrap::Bootstrap, listener::Listener};
use rand::Rng;
use std::{
    fs::OpenOptions,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
};
use tracing_subscriber::EnvFilter;

/// Between two looks at a proxy that starts.
const PAUSE: Duration = Duration::from_millis(50);
/// Streams that have fewer tokens take a fault when they have so many; all others at once.
const FAULT_TOKENS_MAX: u64 = 100;

/// Where the parts of a pod listen.
#[derive(Clone, Copy)]
pub(crate) struct Addresses {
    outbound: SocketAddr,
    inbound: SocketAddr,
    pub(crate) admin: SocketAddr,
    engine: SocketAddr,
}

impl Addresses {
    fn free() -> Self {
        let four: [_; 4] = std::array::from_fn(|_| free_address());
        Self::of(&four)
    }

    fn of(four: &[SocketAddr]) -> Self {
        Self {
            outbound: four[0],
            inbound: four[1],
            admin: four[2],
            engine: four[3],
        }
    }

    fn four(self) -> [SocketAddr; 4] {
        [self.outbound, self.inbound, self.admin, self.engine]
    }
}

/// A file of what the proxy of a pod logs.
fn log(at: usize, kind: &str, args: &Args) -> PathBuf {
    let logs = args.logs.as_deref().unwrap_or(Path::new("."));
    logs.join(format!("{at}.{kind}"))
}

/// Flags of the proxy of a pod: who is where. All else is as shipped, but for the threads: one, since pods share cores.
fn flags(at: usize, args: &Args) -> Vec<(&'static str, String)> {
    let pods: Vec<_> = args.addresses.chunks(4).map(Addresses::of).collect();
    let role = side(at, args).map_or("both", |side| match side {
        Side::Prefill => "prefill",
        Side::Decode => "decode",
    });
    let log = log(at, "log", args);
    let mut flags = vec![
        (
            "--engine",
            format!("http://{};role={role}", pods[at].engine),
        ),
        ("--listen", pods[at].outbound.to_string()),
        ("--inbound", pods[at].inbound.to_string()),
        ("--admin", pods[at].admin.to_string()),
        ("--node-id", format!("pod-{at}")),
        ("--access-log", log.to_string_lossy().into_owned()),
        ("--policy", "kv".to_owned()),
    ];
    let others = (0..pods.len()).filter(|other| *other != at);
    flags.extend(others.map(|other| ("--peer", format!("http://{}", pods[other].inbound))));
    flags
}

/// Runs the proxy of a pod until whoever started it ends.
pub(crate) fn run_proxy(at: usize, args: &Args) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let flags = flags(at, args).into_iter();
    let builder = flags.fold(ProxyBuilder::new(), |builder, (name, value)| {
        builder.flag(name, &value)
    });
    let without = args.without;
    let edit = move |bootstrap: &mut Bootstrap| {
        let outbound = |listener: &&mut Listener| listener.name == OUTBOUND;
        for listener in bootstrap.listeners.iter_mut().filter(outbound) {
            let filters = &mut listener.http().http_filters;
            filters.retain(|filter| !without || filter.name != "migration");
        }
    };
    let _proxy = builder.edit(edit).start();
    // Whatever comes is of no interest, and an error is an end too.
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    ExitCode::SUCCESS
}

/// An engine and the proxy beside it.
pub(crate) struct Pod {
    pub(crate) at: usize,
    pub(crate) addresses: Addresses,
    engine: Option<SimEngine>,
    /// Killed when dropped.
    proxy: Option<Child>,
    pub(crate) entry: Arc<Entry>,
}

/// A pod as its clients see it.
pub(crate) struct Entry {
    pub(crate) address: SocketAddr,
    pub(crate) is_up: AtomicBool,
    pub(crate) deaths: AtomicU64,
}

impl Pod {
    fn new(at: usize, addresses: Addresses) -> Self {
        let entry = Arc::new(Entry {
            address: addresses.outbound,
            is_up: AtomicBool::new(true),
            deaths: AtomicU64::new(0),
        });
        Self {
            at,
            addresses,
            engine: None,
            proxy: None,
            entry,
        }
    }

    /// Starts what does not run.
    fn start(&mut self, args: &Args) {
        if self.engine.is_none() {
            let mut config = args.engines_of.config(self.at, args);
            config.port = self.addresses.engine.port();
            self.engine = SimEngine::start(config).ok();
        }
        if self.proxy.is_none() {
            self.proxy = start_proxy(self.at, args).ok();
        }
    }

    pub(crate) fn break_down(&mut self, kind: FaultKind, with_proxy: bool) {
        if with_proxy {
            self.entry.is_up.store(false, Relaxed);
            self.entry.deaths.fetch_add(1, Relaxed);
            self.proxy = None;
            self.engine = None;
        }
        if let Some(engine) = &self.engine {
            engine.fault(Fault {
                after_tokens: rand::rng().random_range(1..FAULT_TOKENS_MAX),
                count: u64::MAX,
                ..Fault::new(kind)
            });
        }
    }

    /// The engine is killed, whatever is left of it, and all starts anew.
    pub(crate) fn restart(&mut self, args: &Args) {
        self.engine = None;
        self.start(args);
    }

    /// Whether clients may come; and once more for what did not start.
    pub(crate) async fn look(&mut self, args: &Args) {
        if self.engine.is_none() || self.proxy.is_none() {
            self.start(args);
        }
        if !self.entry.is_up.load(Relaxed) && self.proxy.is_some() {
            let up = TcpStream::connect(self.addresses.outbound).await;
            self.entry.is_up.store(up.is_ok(), Relaxed);
        }
    }
}

fn start_proxy(at: usize, args: &Args) -> std::io::Result<Child> {
    let mut command = match &args.proxy {
        Some(program) => {
            let mut command = Command::new(program);
            command.args(["--concurrency", "1", "--log-level", "error"]);
            for (name, value) in flags(at, args) {
                command.args([name, &value]);
            }
            command
        }
        None => this_again(at, args)?,
    };
    let mut messages = OpenOptions::new();
    let messages = messages.create(true).append(true);
    let messages = messages.open(log(at, "err", args))?;
    command.stdin(Stdio::piped()).stderr(messages);
    command.kill_on_drop(true);
    command.spawn()
}

/// This program, as the proxy of a pod.
fn this_again(at: usize, args: &Args) -> std::io::Result<Command> {
    let addresses: Vec<_> = args.addresses.iter().map(ToString::to_string).collect();
    let engines_of = args.engines_of.to_possible_value();
    let engines_of = engines_of.expect("invariant: no value is skipped");
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--proxy-of", &at.to_string()])
        .args(["--addresses", &addresses.join(",")])
        .args(["--engines-of", engines_of.get_name()])
        .args(["--engines", &args.engines.to_string()])
        .arg("--logs")
        .args(&args.logs);
    for (flag, on) in [("--without", args.without), ("--split", args.split)] {
        if on {
            command.arg(flag);
        }
    }
    Ok(command)
}

/// Starts all pods and waits until every proxy knows every engine.
pub(crate) async fn start(args: &mut Args) -> Vec<Pod> {
    let addresses: Vec<_> = (0..args.engines).map(|_| Addresses::free()).collect();
    args.addresses = addresses.iter().flat_map(|pod| pod.four()).collect();
    let pods = addresses.into_iter().enumerate();
    let mut pods: Vec<_> = pods
        .map(|(at, addresses)| Pod::new(at, addresses))
        .collect();
    for pod in &mut pods {
        pod.start(args);
    }
    for pod in &pods {
        while TcpStream::connect(pod.addresses.admin).await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
        wait_alive(pod.addresses.admin, args.engines).await;
    }
    pods
}
