//! A thousand streams while engines are killed, configuration is pushed, clients leave and read slowly: is memory flat,
//! is every text whole, does each request end as an answer or as a failure with a name, and do the counters say so?
//! The last line is JSON; the exit code says whether all held.

use clap::Parser;
use http::{Method, StatusCode};
use outrigger_conformance::{
    harness::{
        Client, ProxyBuilder, TestProxy, Version, free_address, metric, request, send_signal,
    },
    sim::{Config, SimEngine},
};
use outrigger_proxy::bootstrap::OUTBOUND;
use rand::Rng;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Different prompts.
const PROMPTS: usize = 16;
/// A killed engine comes back after that long.
const DEAD: Duration = Duration::from_secs(1);
const PUSH_EVERY: Duration = Duration::from_secs(1);
const SAMPLE_EVERY: Duration = Duration::from_secs(2);
/// What the resident set may grow by from the second third of the run to the last, as a share.
const GROWTH_MAX: f64 = 0.05;

#[derive(Parser)]
struct Args {
    /// Streams at once.
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// How long new streams begin.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Tokens of a stream.
    #[arg(long, default_value_t = 60)]
    tokens: usize,
    /// Milliseconds between two tokens.
    #[arg(long, default_value_t = 200.0)]
    itl_ms: f64,
    /// Seconds between two kills.
    #[arg(long, default_value_t = 3.0)]
    kill_every_s: f64,
    /// Be an engine at this port, for the parent to kill.
    #[arg(long, hide = true)]
    engine: Option<u16>,
}

/// How a client treats its stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Reads,
    ReadsSlowly,
    Leaves,
}

/// How a stream ended.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Whole,
    /// Not the text of an undisturbed stream: something was lost or came twice.
    Wrong,
    Left,
    /// With the name that the client was told.
    Failed(String),
    /// It neither went on nor ended, or broke off without a word.
    Unexplained,
}

type Tally = Mutex<BTreeMap<String, u64>>;

/// An engine as a process, at a place where it comes back.
struct Engine {
    address: SocketAddr,
    child: Child,
}

impl Engine {
    fn start(address: SocketAddr, itl_ms: f64) -> Self {
        let program = std::env::current_exe().expect("invariant: we run");
        let (port, itl) = (address.port().to_string(), itl_ms.to_string());
        let child = Command::new(program)
            .args(["--engine", &port, "--itl-ms", &itl])
            .stdout(Stdio::null())
            .spawn();
        Self {
            address,
            child: child.expect("invariant: a process"),
        }
    }

    fn kill(&mut self) {
        send_signal(self.child.id(), "KILL");
        // It has been told in a way that it cannot refuse.
        let _ = self.child.wait();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn be_engine(port: u16, itl_ms: f64) -> ExitCode {
    let config = Config {
        port,
        decode_itl_ms: itl_ms,
        batch_slots: 2048,
        kv_blocks: 65_536,
        ..Config::default()
    };
    let Ok(_engine) = SimEngine::start(config) else {
        return ExitCode::FAILURE;
    };
    std::future::pending().await
}

/// Two proxies, peers of each other, with half of the engines each.
fn proxies(engines: &[Engine]) -> [TestProxy; 2] {
    let inbound = [free_address(), free_address()];
    [0, 1].map(|at: usize| {
        let beside = engines.iter().skip(at).step_by(2);
        let builder = ProxyBuilder::new()
            .concurrency(2)
            .flag("--inbound", &inbound[at].to_string())
            .flag("--policy", "least_request")
            .flag("--access-log", "none")
            .peer(inbound[1 - at]);
        beside
            .fold(builder, |builder, engine| builder.engine(engine.address))
            .start()
    })
}

fn body(prompt: usize, tokens: usize) -> String {
    let text = format!("Tell story number {prompt} of the outrigger.");
    json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": tokens, "ignore_eos": true,
        "messages": [{"role": "user", "content": text}]})
    .to_string()
}

/// What came of a stream so far.
#[derive(Default)]
struct Story {
    text: String,
    rest: String,
    done: bool,
    failure: Option<String>,
}

impl Story {
    fn take(&mut self, piece: &[u8]) {
        self.rest.push_str(&String::from_utf8_lossy(piece));
        while let Some(end) = self.rest.find("\n\n") {
            let event: String = self.rest.drain(..end + 2).collect();
            let Some(data) = event.trim_end().strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                self.done = true;
                continue;
            }
            let chunk: Value = serde_json::from_str(data).unwrap_or_default();
            if let Some(kind) = chunk["error"]["type"].as_str() {
                self.failure = Some(format!("in band: {kind}"));
            }
            let piece = &chunk["choices"][0]["delta"]["content"];
            self.text.push_str(piece.as_str().unwrap_or_default());
        }
    }

    fn outcome(self, status: StatusCode, expected: &str) -> Outcome {
        if let Some(failure) = self.failure {
            return Outcome::Failed(failure);
        }
        if status != StatusCode::OK {
            // Refused before it began: the body is OpenAI's error.
            let error: Value = serde_json::from_str(&self.rest).unwrap_or_default();
            return match error["error"]["type"].as_str() {
                Some(kind) => Outcome::Failed(format!("{}: {kind}", status.as_u16())),
                None => Outcome::Unexplained,
            };
        }
        match (self.done, self.text == expected) {
            (true, true) => Outcome::Whole,
            (true, false) => Outcome::Wrong,
            (false, _) => Outcome::Unexplained,
        }
    }
}

async fn stream(
    address: SocketAddr,
    manner: Manner,
    prompt: usize,
    tokens: usize,
    expected: Arc<Vec<String>>,
) -> Outcome {
    let mut client = match manner {
        Manner::ReadsSlowly => Client::connect_small(address, Version::H1).await,
        _ => Client::connect(address, Version::H1).await,
    };
    let ask = request(Method::POST, "/v1/chat/completions", body(prompt, tokens));
    let mut answer = client.begin(ask).await;
    let leaves_after = rand::rng().random_range(0..tokens);
    let (status, mut story, mut pieces) = (answer.status, Story::default(), 0);
    while let Some(piece) = answer.next().await {
        story.take(&piece);
        pieces += 1;
        if manner == Manner::Leaves && pieces > leaves_after {
            client.abandon();
            return Outcome::Left;
        }
        if manner == Manner::ReadsSlowly {
            tokio::time::sleep(Duration::from_millis(pieces as u64 % 7 * 100)).await;
        }
    }
    story.outcome(status, &expected[prompt])
}

struct Load {
    entries: Vec<SocketAddr>,
    expected: Arc<Vec<String>>,
    tokens: usize,
    until: Instant,
    begun: AtomicU64,
    tally: Tally,
}

impl Load {
    async fn client(self: Arc<Self>) {
        while Instant::now() < self.until {
            let (prompt, entry, manner) = {
                let mut random = rand::rng();
                let manner = match random.random_range(0..10) {
                    0 => Manner::Leaves,
                    1 => Manner::ReadsSlowly,
                    _ => Manner::Reads,
                };
                let entry = random.random_range(0..self.entries.len());
                (random.random_range(0..PROMPTS), entry, manner)
            };
            self.begun.fetch_add(1, Relaxed);
            let (address, expected) = (self.entries[entry], self.expected.clone());
            // The harness panics where nothing comes for too long.
            let ended = tokio::spawn(stream(address, manner, prompt, self.tokens, expected)).await;
            let outcome = ended.unwrap_or(Outcome::Unexplained);
            let mut tally = self.tally.lock().expect("invariant: no holder panics");
            *tally.entry(format!("{outcome:?}")).or_default() += 1;
        }
    }

    fn ended(&self, how: &Outcome) -> u64 {
        let tally = self.tally.lock().expect("invariant: no holder panics");
        tally.get(&format!("{how:?}")).copied().unwrap_or_default()
    }
}

/// Kills one engine after the other, at random.
async fn kill(engines: &mut [Engine], args: &Args, over: &AtomicBool) -> u64 {
    let mut kills = 0;
    while !over.load(Relaxed) {
        tokio::time::sleep(Duration::from_secs_f64(args.kill_every_s)).await;
        let engine = rand::rng().random_range(0..engines.len());
        engines[engine].kill();
        kills += 1;
        tokio::time::sleep(DEAD).await;
        engines[engine] = Engine::start(engines[engine].address, args.itl_ms);
    }
    kills
}

/// Pushes configuration that differs from what is in effect: filters are built anew, streams go on with the old ones.
async fn push(proxies: &[TestProxy; 2], over: &AtomicBool) -> u64 {
    let mut pushes = 0;
    while !over.load(Relaxed) {
        tokio::time::sleep(PUSH_EVERY).await;
        let mut next = proxies[pushes as usize % 2].bootstrap.clone();
        for listener in next.listeners.iter_mut().filter(|one| one.name == OUTBOUND) {
            for manager in listener.http_managers_mut() {
                manager.server_name = format!("soak-{pushes}");
            }
        }
        let taken = proxies[pushes as usize % 2].proxy.apply(next);
        taken.expect("invariant: what was taken before is taken again");
        pushes += 1;
    }
    pushes
}

fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|kb| kb.parse().ok()).unwrap_or_default()
}

async fn sample(over: &AtomicBool) -> Vec<u64> {
    let mut samples = Vec::new();
    while !over.load(Relaxed) {
        tokio::time::sleep(SAMPLE_EVERY).await;
        samples.push(resident_kb());
    }
    samples
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// What the entry listeners counted; what one proxy relays to the other is not among it. Proxies of one process share
/// their metrics.
async fn counted(admin: SocketAddr, name: &str) -> u64 {
    metric(admin, name, OUTBOUND).await as u64
}

async fn undisturbed(engine: SocketAddr, tokens: usize) -> Vec<String> {
    let mut texts = Vec::new();
    for prompt in 0..PROMPTS {
        let mut client = Client::connect(engine, Version::H1).await;
        let reply = client.post("/v1/chat/completions", body(prompt, tokens));
        let mut story = Story::default();
        story.take(reply.await.text().as_bytes());
        texts.push(story.text);
    }
    texts
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(port) = args.engine {
        return be_engine(port, args.itl_ms).await;
    }
    let mut engines: Vec<_> = (0..4)
        .map(|_| Engine::start(free_address(), args.itl_ms))
        .collect();
    let quick = SimEngine::start(Config::default()).expect("invariant: an engine starts");
    let proxies = proxies(&engines);
    for proxy in &proxies {
        proxy.wait_alive(engines.len()).await;
    }
    let load = Arc::new(Load {
        entries: proxies.iter().map(TestProxy::outbound).collect(),
        expected: Arc::new(undisturbed(quick.http_addr, args.tokens).await),
        tokens: args.tokens,
        until: Instant::now() + Duration::from_secs(args.seconds),
        begun: AtomicU64::new(0),
        tally: Tally::default(),
    });
    drop(quick);
    let clients: Vec<_> = (0..args.streams)
        .map(|_| tokio::spawn(load.clone().client()))
        .collect();
    let over = AtomicBool::new(false);
    let ends = async {
        for client in clients {
            client.await.expect("invariant: panics end within a stream");
        }
        over.store(true, Relaxed);
    };
    let ((), kills, pushes, samples) = tokio::join!(
        ends,
        kill(&mut engines, &args, &over),
        push(&proxies, &over),
        sample(&over)
    );
    let held = report(&args, &load, proxies[0].admin(), (kills, pushes), &samples).await;
    ExitCode::from(u8::from(!held))
}

async fn report(
    args: &Args,
    load: &Load,
    admin: SocketAddr,
    (kills, pushes): (u64, u64),
    samples: &[u64],
) -> bool {
    let third = samples.len() / 3;
    let (before, after) = (
        median(&samples[third..2 * third]),
        median(&samples[2 * third..]),
    );
    let growth = after as f64 / before.max(1) as f64 - 1.0;
    let begun = load.begun.load(Relaxed);
    let total = counted(admin, "envoy_http_downstream_rq_total").await;
    let completed = counted(admin, "envoy_http_downstream_rq_completed").await;
    let active = counted(admin, "envoy_http_downstream_rq_active").await;
    let lost = load.ended(&Outcome::Wrong);
    let unexplained = load.ended(&Outcome::Unexplained);
    let adds_up = begun == total && total == completed && active == 0;
    let passed = growth <= GROWTH_MAX && lost == 0 && unexplained == 0 && adds_up;
    let tally = load
        .tally
        .lock()
        .expect("invariant: no holder panics")
        .clone();
    println!(
        "{}",
        json!({
            "stage": "soak", "seconds": args.seconds, "concurrent_streams": args.streams, "kills": kills, "pushes": pushes,
            "streams": begun, "ended": tally, "resident_kb": {"second_third": before, "last_third": after}, "growth": growth,
            "counted": {"begun": total, "completed": completed, "active": active}, "adds_up": adds_up, "passed": passed,
        })
    );
    passed
}
