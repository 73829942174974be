//! Two simulated engines with a proxy beside each, and a control plane that tells the proxies what to do: starting,
//! killing, stopping, and what the proxies know of the engines.
//! Sends no generation.

use super::{
    control_plane::{ControlPlane, Directory},
    conversation::MODEL,
    exchange::{self, Reply},
    process::Process,
    reuse::BLOCK_TOKENS,
    samples::Page,
};
use crate::harness::driven_bootstrap;
use anyhow::{Context, Result, bail};
use futures_util::future::try_join_all;
use outrigger_proxy::bootstrap::{FLEET, INBOUND, OUTBOUND};
use serde_json::Value;
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// For a process to bind its sockets.
pub(super) const START_LIMIT: Duration = Duration::from_secs(20);
/// For both proxies to know both engines.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// For an answer of an admin listener or of `/metrics`.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at something awaited.
pub(super) const LOOK: Duration = Duration::from_millis(10);
/// With a proxy beside each.
const ENGINES: usize = 2;
/// Tries to start the proxies, whose inbound ports are chosen before they are bound and may be taken meanwhile.
const PROXY_STARTS_MAX: usize = 3;

/// How fast the engines are.
#[derive(Clone, Copy)]
pub(super) struct Speed {
    pub(super) prefill_tokens_per_s: u32,
    pub(super) decode_itl_ms: f64,
}

/// A simulated engine.
pub(super) struct Engine {
    process: Process,
    arguments: Vec<String>,
    log: PathBuf,
    pub(super) http: SocketAddr,
}

impl Engine {
    async fn start(number: usize, speed: Speed, dir: &Path) -> Result<Self> {
        let arguments = [
            ("--model", MODEL.to_owned()),
            ("--model-path", dir.join("model").display().to_string()),
            ("--block-size", BLOCK_TOKENS.to_string()),
            ("--seed", number.to_string()),
            (
                "--prefill-tokens-per-s",
                speed.prefill_tokens_per_s.to_string(),
            ),
            ("--decode-itl-ms", speed.decode_itl_ms.to_string()),
        ];
        let mut arguments: Vec<String> = arguments
            .into_iter()
            .flat_map(|(name, value)| [name.into(), value])
            .collect();
        arguments.extend([
            "--enable-prompt-tokens-details".into(),
            "--enable-scale-out".into(),
        ]);
        let log = dir.join(format!("engine-{number}.log"));
        let free = ["--port", "0", "--events-port", "0", "--replay-port", "0"].map(String::from);
        let (process, bound) = Self::launch(&[&arguments[..], &free[..]].concat(), &log).await?;
        let port = |name: &str| -> Result<SocketAddr> {
            Ok(bound[name]
                .as_str()
                .with_context(|| format!("an engine without {name}"))?
                .parse()?)
        };
        let http = port("http")?;
        for (flag, name) in [
            ("--port", "http"),
            ("--events-port", "events"),
            ("--replay-port", "replay"),
        ] {
            arguments.extend([flag.into(), port(name)?.port().to_string()]);
        }
        Ok(Self {
            process,
            arguments,
            log,
            http,
        })
    }

    /// Starts the process and gives what it says of its addresses.
    async fn launch(arguments: &[String], log: &Path) -> Result<(Process, Value)> {
        let mut process = Process::start("engine", arguments, log)?;
        let line = process
            .line(START_LIMIT)
            .await
            .context("an engine does not start")?;
        Ok((
            process,
            serde_json::from_str(&line).context("the first line of an engine")?,
        ))
    }

    /// `kill -9`.
    pub(super) fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it anew on its old ports, with an empty cache; what may be left of it is ended first.
    pub(super) async fn restart(&mut self) -> Result<()> {
        self.process.stop().await;
        self.process = Self::launch(&self.arguments, &self.log).await?.0;
        Ok(())
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid
    }

    pub(super) fn has_ended(&self) -> bool {
        self.process.has_ended()
    }

    /// Whether `id`, as proxies name engines, is this one.
    pub(super) fn is(&self, id: &str) -> bool {
        id.ends_with(&format!("/{}", self.http))
    }

    /// Its own `/metrics`; empty if it does not answer.
    pub(super) async fn metrics(&self) -> Page {
        Page::parse(&exchange::get(self.http, "/metrics", ASK_LIMIT).await.text())
    }
}

/// A proxy beside an engine.
pub(super) struct Proxy {
    process: Process,
    pub(super) admin: SocketAddr,
    /// Where clients arrive.
    pub(super) outbound: SocketAddr,
}

/// What a proxy knows of an engine.
pub(super) struct Known {
    pub(super) engine_id: String,
    pub(super) health: String,
    pub(super) running: u64,
    pub(super) waiting: u64,
    /// It is healthy, heard, and tells its KV events.
    pub(super) is_ready: bool,
    /// How long ago this proxy last heard of its load.
    pub(super) load_age: Duration,
    /// By then it had no request.
    pub(super) is_idle: bool,
}

impl Proxy {
    /// Starts one that comes to a control plane at `xds` for what it does, and waits until it has its listeners.
    async fn start(number: usize, xds: SocketAddr, dir: &Path) -> Result<Self> {
        let file = |kind: &str| dir.join(format!("proxy-{number}.{kind}"));
        let (bootstrap, admin_file) = (file("yaml"), file("admin"));
        let config = driven_bootstrap(xds, &format!("proxy-{number}"));
        std::fs::write(&bootstrap, config.to_string())?;
        // What an earlier try left there would be taken for this one's.
        let _ = std::fs::remove_file(&admin_file);
        let arguments = [
            ("-c", bootstrap.display().to_string()),
            ("--admin-address-path", admin_file.display().to_string()),
            ("--concurrency", "1".into()),
        ];
        let arguments: Vec<String> = arguments
            .into_iter()
            .flat_map(|(name, value)| [name.into(), value])
            .collect();
        let process = Process::start("proxy", &arguments, &file("log"))?;
        let listening = async || {
            let text = std::fs::read_to_string(&admin_file).ok()?;
            let admin = text.trim().parse().ok()?;
            listener(admin, INBOUND).await.ok()?;
            Some((admin, listener(admin, OUTBOUND).await.ok()?))
        };
        let (admin, outbound) = process
            .until(START_LIMIT, listening)
            .await
            .with_context(|| format!("proxy {number} does not start"))?;
        Ok(Self {
            process,
            admin,
            outbound,
        })
    }

    /// Its `/stats/prometheus`; empty if it does not answer.
    pub(super) async fn stats(&self) -> Page {
        Page::parse(
            &exchange::get(self.admin, "/stats/prometheus", ASK_LIMIT)
                .await
                .text(),
        )
    }

    /// What its `/clusters` says of the fleet.
    pub(super) async fn known(&self) -> Vec<Known> {
        let reply = exchange::get(self.admin, "/clusters?format=json", ASK_LIMIT).await;
        let all: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
        let fleet = all["cluster_statuses"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|status| status["name"] == FLEET);
        let hosts = fleet.and_then(|fleet| fleet["host_statuses"].as_array());
        hosts.into_iter().flatten().map(Known::of).collect()
    }

    /// What it knows of one engine.
    pub(super) async fn knows(&self, engine: &Engine) -> Option<Known> {
        self.known()
            .await
            .into_iter()
            .find(|known| engine.is(&known.engine_id))
    }
}

/// The address of a listener of the proxy with this admin.
async fn listener(admin: SocketAddr, name: &str) -> Result<SocketAddr> {
    let reply = exchange::get(admin, "/listeners?format=json", ASK_LIMIT).await;
    let all: Value = serde_json::from_slice(&reply.body).context("/listeners of a proxy")?;
    let found = all["listener_statuses"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|status| status["name"] == name);
    let socket = &found.with_context(|| format!("a proxy without listener {name}"))?["local_address"]
        ["socket_address"];
    let address = socket["address"].as_str().unwrap_or_default();
    format!("{address}:{}", socket["port_value"])
        .parse()
        .context("the address of a listener")
}

impl Known {
    fn of(host: &Value) -> Self {
        let own = &host["outrigger"];
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let health = own["health"].as_str().unwrap_or("unknown").to_owned();
        Self {
            engine_id: own["engine_id"].as_str().unwrap_or_default().to_owned(),
            running: number(&own["load"]["running"]),
            waiting: number(&own["load"]["waiting"]),
            load_age: Duration::from_millis(number(&own["load"]["told_ms_ago"])),
            is_idle: own["load"]["active_requests"] == 0 && own["load"]["active_blocks"] == 0,
            is_ready: health == "healthy" && own["heard"] == true && own["kv_events"] == true,
            health,
        }
    }
}

/// KV blocks that a proxy's index holds of an engine.
pub(super) fn index_blocks(stats: &Page, engine: &Engine) -> u64 {
    stats.sum_ending(
        "outrigger_kv_index_blocks",
        "engine",
        &format!("/{}", engine.http),
    ) as u64
}

/// All of the demo's processes.
pub(super) struct Fleet {
    pub(super) engines: Vec<Engine>,
    pub(super) proxies: Vec<Proxy>,
    pub(super) control_plane: ControlPlane,
    /// What the control plane serves.
    pub(super) directory: Directory,
    /// Removed when the processes have ended.
    _scratch: Scratch,
}

/// Files of our own.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("outrigger-demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Fleet {
    /// Starts everything and waits until each proxy is ready for both engines.
    pub(super) async fn start(speed: Speed) -> Result<Self> {
        let scratch = Scratch::new()?;
        let dir = &scratch.0;
        let mut engines = Vec::new();
        for number in 0..ENGINES {
            engines.push(Engine::start(number, speed, dir).await?);
        }
        let directory = Directory::new(dir)?;
        let http: Vec<_> = engines.iter().map(|engine| engine.http).collect();
        directory.write(&http, &free_ports()?)?;
        let control_plane = ControlPlane::start(&directory, &dir.join("control-plane.log")).await?;
        let proxies = start_proxies(&directory, &http, control_plane.address, dir).await?;
        let fleet = Self {
            engines,
            proxies,
            control_plane,
            directory,
            _scratch: scratch,
        };
        for engine in 0..fleet.engines.len() {
            fleet.wait_known(engine, READY_LIMIT).await?;
        }
        Ok(fleet)
    }

    /// Waits until each proxy finds an engine healthy and hears its KV events.
    pub(super) async fn wait_known(&self, engine: usize, limit: Duration) -> Result<Duration> {
        let engine = &self.engines[engine];
        let all_know = || async {
            for proxy in &self.proxies {
                if !proxy
                    .knows(engine)
                    .await
                    .is_some_and(|known| known.is_ready)
                {
                    return false;
                }
            }
            true
        };
        let logs = || {
            self.proxies
                .iter()
                .map(|proxy| proxy.process.log_tail())
                .collect::<Vec<_>>()
                .join("\n")
        };
        let waited = wait_until(limit, all_know).await;
        waited.with_context(|| {
            format!(
                "engine {} is not ready for both proxies: {}",
                engine.http,
                logs()
            )
        })
    }

    /// The number of the engine that answered; `None` if it is none of ours.
    pub(super) fn served_by(&self, reply: &Reply) -> Option<usize> {
        self.engines
            .iter()
            .position(|engine| engine.is(reply.engine()))
    }

    /// Blocks in each proxy's index, of each engine.
    pub(super) async fn indexes(&self) -> Vec<Vec<u64>> {
        let mut indexes = Vec::new();
        for proxy in &self.proxies {
            let stats = proxy.stats().await;
            indexes.push(
                self.engines
                    .iter()
                    .map(|engine| index_blocks(&stats, engine))
                    .collect(),
            );
        }
        indexes
    }

    /// Whether each proxy has heard since `moment` that an engine has no request.
    pub(super) async fn is_told_idle(&self, engine: usize, moment: Instant) -> bool {
        for proxy in &self.proxies {
            let known = proxy.knows(&self.engines[engine]).await;
            if !known.is_some_and(|known| known.is_idle && known.load_age < moment.elapsed()) {
                return false;
            }
        }
        true
    }

    /// A counter or gauge summed over both proxies.
    pub(super) async fn stat(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let mut sum = 0.0;
        for proxy in &self.proxies {
            sum += proxy.stats().await.sum(name, labels);
        }
        sum
    }

    /// Ends all processes and removes their files.
    pub(super) async fn stop(mut self) {
        for proxy in &mut self.proxies {
            proxy.process.stop().await;
        }
        for engine in &mut self.engines {
            engine.process.stop().await;
        }
        self.control_plane.process.stop().await;
    }
}

/// Starts a proxy beside each engine.
async fn start_proxies(
    directory: &Directory,
    engines: &[SocketAddr],
    xds: SocketAddr,
    dir: &Path,
) -> Result<Vec<Proxy>> {
    for left in (0..PROXY_STARTS_MAX).rev() {
        match try_join_all((0..ENGINES).map(|number| Proxy::start(number, xds, dir))).await {
            Ok(proxies) => return Ok(proxies),
            Err(error) if left == 0 => return Err(error),
            Err(error) => tracing::warn!("{error:#}; trying other ports"),
        }
        directory.write(engines, &free_ports()?)?;
    }
    bail!("no try is left")
}

/// Ports that were free a moment ago.
fn free_ports() -> Result<[u16; ENGINES]> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port");
    let (first, second) = (bind()?, bind()?);
    Ok([first.local_addr()?.port(), second.local_addr()?.port()])
}

/// Time until `holds`, or `None` if it does not within `limit`.
pub(super) async fn wait_until<F: Future<Output = bool>>(
    limit: Duration,
    mut holds: impl FnMut() -> F,
) -> Option<Duration> {
    let begun = Instant::now();
    loop {
        if holds().await {
            return Some(begun.elapsed());
        }
        if begun.elapsed() > limit {
            return None;
        }
        tokio::time::sleep(LOOK).await;
    }
}
