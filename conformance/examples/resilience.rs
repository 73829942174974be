//! Streams under fire: engines die, stall and break every half second, some together with the proxy beside them, and
//! clients compare every text with an undisturbed one. The last line is JSON; the exit code says whether all went as
//! promised.

use clap::Parser;
use futures_util::future::{join_all, try_join_all};
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use outrigger_conformance::{
    harness::{Client, OneChain, ProxyBuilder, Version, free_address, metric, request, wait_alive},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{bootstrap::Bootstrap, listener::Listener};
use rand::{Rng, seq::IteratorRandom};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    process::{ExitCode, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
};

/// What breaks, in turn.
const FAULTS: [FaultKind; 6] = [
    FaultKind::Die,
    FaultKind::InBandError,
    FaultKind::Reset,
    FaultKind::Truncate,
    FaultKind::Garbage,
    FaultKind::Stall,
];
/// Of so many faults one takes the proxy along.
const POD_EVERY: usize = 3;
/// How long an engine is broken.
const BROKEN: Duration = Duration::from_secs(1);
/// Failures whose words are reported.
const WORDS_MAX: usize = 8;
/// Different prompts.
const PROMPTS: usize = 16;
/// For a stream to end, however often it moves.
const STREAM_MAX: Duration = Duration::from_secs(120);
/// Between two tries of a client whose entry is down.
const PAUSE: Duration = Duration::from_millis(50);

/// Streams on a fleet whose engines break.
#[derive(Parser, Clone)]
struct Args {
    /// Engines, each with a proxy beside it.
    #[arg(long, default_value_t = 8)]
    engines: usize,
    /// Streams at once.
    #[arg(long, default_value_t = 100)]
    streams: usize,
    /// How long new streams begin.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Tokens of a stream.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Milliseconds between two faults.
    #[arg(long, default_value_t = 500)]
    every_ms: u64,
    /// Silence before a stream moves, and its wait for a place in the budget; as shipped.
    #[arg(long, default_value_t = 30_000)]
    stall_ms: u64,
    /// Leave the filter out, for contrast.
    #[arg(long)]
    without: bool,
    /// Be the proxy of this pod.
    #[arg(long, hide = true)]
    proxy_of: Option<usize>,
    /// The pods: four addresses each.
    #[arg(long, hide = true, value_delimiter = ',')]
    addresses: Vec<SocketAddr>,
}

/// Where the parts of a pod listen.
#[derive(Clone, Copy)]
struct Addresses {
    outbound: SocketAddr,
    inbound: SocketAddr,
    admin: SocketAddr,
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

/// Runs the proxy of a pod until whoever started it ends.
fn run_proxy(at: usize, args: &Args) -> ExitCode {
    let pods: Vec<_> = args.addresses.chunks(4).map(Addresses::of).collect();
    let (stall_ms, without) = (args.stall_ms, args.without);
    let builder = ProxyBuilder::new()
        .engine(pods[at].engine)
        .flag("--listen", &pods[at].outbound.to_string())
        .flag("--inbound", &pods[at].inbound.to_string())
        .flag("--admin", &pods[at].admin.to_string())
        .flag("--policy", "least_request")
        .flag("--access-log", "none");
    let others = (0..pods.len()).filter(|other| *other != at);
    let builder = others.fold(builder, |builder, other| builder.peer(pods[other].inbound));
    let edit = move |bootstrap: &mut Bootstrap| {
        let outbound = |listener: &&mut Listener| listener.name == OUTBOUND;
        for listener in bootstrap.listeners.iter_mut().filter(outbound) {
            let filters = &mut listener.http().http_filters;
            filters.retain(|filter| !without || filter.name != "migration");
            let ours = |name: &str| name == "migration";
            for filter in filters.iter_mut().filter(|filter| ours(&filter.name)) {
                filter.config.value = json!({ "stall_ms": stall_ms });
            }
        }
    };
    let _proxy = builder.edit(edit).start();
    // Whatever comes is of no interest, and an error is an end too.
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    ExitCode::SUCCESS
}

/// An engine and the proxy beside it.
struct Pod {
    addresses: Addresses,
    engine: Option<SimEngine>,
    /// Killed when dropped.
    proxy: Option<Child>,
    entry: Arc<Entry>,
}

/// A pod as its clients see it.
struct Entry {
    address: SocketAddr,
    is_up: AtomicBool,
    deaths: AtomicU64,
}

impl Pod {
    fn new(addresses: Addresses) -> Self {
        let entry = Arc::new(Entry {
            address: addresses.outbound,
            is_up: AtomicBool::new(true),
            deaths: AtomicU64::new(0),
        });
        Self {
            addresses,
            engine: None,
            proxy: None,
            entry,
        }
    }

    /// Starts what does not run.
    fn start(&mut self, at: usize, args: &Args) {
        if self.engine.is_none() {
            let config = Config {
                port: self.addresses.engine.port(),
                decode_itl_ms: 20.0,
                batch_slots: 512,
                ..Config::default()
            };
            self.engine = SimEngine::start(config).ok();
        }
        if self.proxy.is_none() {
            self.proxy = start_proxy(at, args).ok();
        }
    }

    fn break_down(&mut self, kind: FaultKind, with_proxy: bool) {
        if with_proxy {
            self.entry.is_up.store(false, Relaxed);
            self.entry.deaths.fetch_add(1, Relaxed);
            self.proxy = None;
            self.engine = None;
        }
        // All streams that have had a few tokens take the fault, and those that will.
        if let Some(engine) = &self.engine {
            engine.fault(Fault {
                after_tokens: rand::rng().random_range(1..100),
                count: u64::MAX,
                ..Fault::new(kind)
            });
        }
    }

    async fn mend(&mut self, kind: FaultKind, at: usize, args: &Args) {
        if kind == FaultKind::Die {
            self.engine = None;
        }
        if self.engine.is_some() {
            let mut client = Client::connect(self.addresses.engine, Version::H1).await;
            client.send(request(Method::DELETE, "/sim/fault", "")).await;
        }
        self.start(at, args);
    }

    /// Whether clients may come.
    async fn look(&self) {
        if !self.entry.is_up.load(Relaxed) && self.proxy.is_some() {
            let up = TcpStream::connect(self.addresses.outbound).await;
            self.entry.is_up.store(up.is_ok(), Relaxed);
        }
    }
}

/// This program again.
fn start_proxy(at: usize, args: &Args) -> std::io::Result<Child> {
    let addresses: Vec<_> = args.addresses.iter().map(ToString::to_string).collect();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--proxy-of", &at.to_string()])
        .args(["--addresses", &addresses.join(",")])
        .args(["--stall-ms", &args.stall_ms.to_string()])
        .stdin(Stdio::piped())
        .kill_on_drop(true);
    if args.without {
        command.arg("--without");
    }
    command.spawn()
}

#[derive(Default)]
struct Counts {
    streams: AtomicU64,
    /// Those that ended with the proxy at which they had entered.
    entry_died: AtomicU64,
    failed: AtomicU64,
    wrong: AtomicU64,
    faults: AtomicU64,
    pods: AtomicU64,
    /// How the first that failed ended.
    words: Mutex<Vec<String>>,
}

impl Counts {
    fn fail(&self, words: String) {
        self.failed.fetch_add(1, Relaxed);
        let mut all = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < WORDS_MAX {
            all.push(words);
        }
    }
}

fn body(prompt: usize, tokens: usize) -> (&'static str, String) {
    let mut body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": tokens,
        "ignore_eos": true, "stream_options": {"include_usage": true}});
    let text = format!("Tell story number {prompt} of the outrigger.");
    if prompt.is_multiple_of(2) {
        body["messages"] = json!([{"role": "user", "content": text}]);
        ("/v1/chat/completions", body.to_string())
    } else {
        body["prompt"] = text.into();
        ("/v1/completions", body.to_string())
    }
}

/// Text and token count of a stream.
type Story = (String, Value);

/// Reads a stream.
///
/// # Errors
/// It did not end as one; these are its last words.
async fn read(address: SocketAddr, prompt: usize, tokens: usize) -> Result<Story, String> {
    let (path, body) = body(prompt, tokens);
    let whole = async {
        let socket = TcpStream::connect(address).await?;
        let (mut sender, driver) = http1::handshake(TokioIo::new(socket)).await?;
        tokio::spawn(driver);
        let mut post = request(Method::POST, path, body);
        let host = HeaderValue::from_str(&address.to_string())?;
        post.headers_mut().insert(header::HOST, host);
        let answer = sender.send_request(post).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        Ok::<_, anyhow::Error>((status, body))
    };
    match tokio::time::timeout(STREAM_MAX, whole).await {
        Ok(Ok((status, body))) => story(status, &String::from_utf8_lossy(&body)),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err(format!("no end within {STREAM_MAX:?}")),
    }
}

fn story(status: StatusCode, text: &str) -> Result<Story, String> {
    let mut story = String::new();
    let mut usage = Value::Null;
    let mut done = false;
    for event in text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
    {
        if event == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value =
            serde_json::from_str(event).map_err(|error| format!("{error}: {event}"))?;
        if chunk.get("error").is_some() {
            return Err(event.to_owned());
        }
        let choice = &chunk["choices"][0];
        let piece = choice["delta"]["content"]
            .as_str()
            .or(choice["text"].as_str());
        story.push_str(piece.unwrap_or_default());
        if chunk["usage"].is_object() {
            usage = chunk["usage"]["completion_tokens"].clone();
        }
    }
    if done && status == StatusCode::OK {
        return Ok((story, usage));
    }
    let end = text.lines().rfind(|line| !line.is_empty());
    Err(format!("{status}: {}", end.unwrap_or_default()))
}

/// Breaks a pod at a time, whole, as long as new streams begin.
async fn break_pods(
    pods: &mut [Pod],
    args: &Args,
    counts: &Counts,
    figures: &mut Figures,
    until: Instant,
) {
    let mut broken: VecDeque<(usize, FaultKind, Instant)> = VecDeque::new();
    for (number, kind) in FAULTS.into_iter().cycle().enumerate() {
        tokio::time::sleep(Duration::from_millis(args.every_ms)).await;
        if Instant::now() >= until {
            break;
        }
        while let Some((at, kind, _)) = broken.pop_front_if(|(.., since)| since.elapsed() >= BROKEN)
        {
            pods[at].mend(kind, at, args).await;
        }
        join_all(pods.iter().map(Pod::look)).await;
        let well = (0..pods.len()).filter(|at| broken.iter().all(|(other, ..)| other != at));
        let well = well.filter(|at| pods[*at].entry.is_up.load(Relaxed));
        let Some(at) = well.choose(&mut rand::rng()) else {
            continue;
        };
        // Each kind has its turn with the proxy and without it.
        let with_proxy = (number / FAULTS.len() + number).is_multiple_of(POD_EVERY);
        if with_proxy {
            figures.add(&pods[at]).await;
        }
        pods[at].break_down(kind, with_proxy);
        counts.faults.fetch_add(1, Relaxed);
        counts.pods.fetch_add(with_proxy.into(), Relaxed);
        broken.push_back((at, kind, Instant::now()));
    }
    for (at, kind, _) in broken {
        pods[at].mend(kind, at, args).await;
    }
}

async fn client(
    entries: Arc<Vec<Arc<Entry>>>,
    expected: Arc<Vec<Story>>,
    counts: Arc<Counts>,
    tokens: usize,
    until: Instant,
) {
    while Instant::now() < until {
        let (prompt, entry) = {
            let mut random = rand::rng();
            let up = entries.iter().filter(|entry| entry.is_up.load(Relaxed));
            (random.random_range(0..PROMPTS), up.choose(&mut random))
        };
        let Some(entry) = entry else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let deaths = entry.deaths.load(Relaxed);
        let got = read(entry.address, prompt, tokens).await;
        counts.streams.fetch_add(1, Relaxed);
        match got {
            Err(_) if entry.deaths.load(Relaxed) > deaths => {
                counts.entry_died.fetch_add(1, Relaxed);
            }
            Err(words) => counts.fail(words),
            Ok(got) if got != expected[prompt] => {
                counts.wrong.fetch_add(1, Relaxed);
            }
            Ok(_) => {}
        }
    }
}

/// Sums of metrics over all proxies, those that were killed included.
#[derive(Default)]
struct Figures {
    moves: f64,
    refused: f64,
    /// Moves by how long they took, at most.
    seconds: BTreeMap<u64, f64>,
}

impl Figures {
    /// Adds what the proxy of a pod counted since it was started.
    async fn add(&mut self, pod: &Pod) {
        if pod.entry.is_up.load(Relaxed) {
            let admin = pod.addresses.admin;
            let name = "outrigger_migrations_total";
            self.moves += metric(admin, name, "").await - metric(admin, name, "failed").await;
            self.refused += metric(admin, "outrigger_migration_refusals_total", "").await;
            self.add_seconds(admin).await;
        }
    }

    async fn add_seconds(&mut self, admin: SocketAddr) {
        let page = Client::get(admin, "/stats/prometheus").await.text();
        for line in page.lines() {
            let bucket = line
                .strip_prefix("outrigger_migration_seconds_bucket{le=\"")
                .and_then(|line| line.split_once("\"} "))
                .and_then(|(bound, count)| Some((bound.parse::<f64>().ok()?, count.parse().ok()?)));
            if let Some((bound, count)) = bucket {
                let count: f64 = count;
                // Bounds are positive, whose bits are in their order.
                *self.seconds.entry(bound.to_bits()).or_default() += count;
            }
        }
    }

    /// The bound under which `share` of the moves lie.
    fn quantile(&self, share: f64) -> Option<f64> {
        let all = self.seconds.values().last()?;
        let mut buckets = self.seconds.iter();
        let (bound, _) = buckets.find(|(_, count)| **count >= all * share)?;
        Some(f64::from_bits(*bound)).filter(|bound| bound.is_finite())
    }
}

/// Starts all pods and waits until every proxy knows every engine.
async fn start(args: &mut Args) -> Vec<Pod> {
    let addresses: Vec<_> = (0..args.engines).map(|_| Addresses::free()).collect();
    args.addresses = addresses.iter().flat_map(|pod| pod.four()).collect();
    let mut pods: Vec<_> = addresses.into_iter().map(Pod::new).collect();
    for (at, pod) in pods.iter_mut().enumerate() {
        pod.start(at, args);
    }
    for pod in &pods {
        while TcpStream::connect(pod.addresses.admin).await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
        wait_alive(pod.addresses.admin, args.engines).await;
    }
    pods
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = Args::parse();
    if let Some(at) = args.proxy_of {
        return run_proxy(at, &args);
    }
    let mut pods = start(&mut args).await;
    let entries = Arc::new(pods.iter().map(|pod| pod.entry.clone()).collect());
    let calm = (0..PROMPTS).map(|prompt| read(pods[0].addresses.engine, prompt, args.tokens));
    let expected = try_join_all(calm).await;
    let expected = Arc::new(expected.expect("invariant: nothing is broken yet"));
    let counts = Arc::<Counts>::default();
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let one = |_| {
        let (entries, expected) = (Arc::clone(&entries), expected.clone());
        tokio::spawn(client(
            entries,
            expected,
            counts.clone(),
            args.tokens,
            until,
        ))
    };
    let clients: Vec<_> = (0..args.streams).map(one).collect();
    let mut figures = Figures::default();
    break_pods(&mut pods, &args, &counts, &mut figures, until).await;
    for client in clients {
        // A client that panics has a stream that ended in no way it knows.
        if let Err(error) = client.await {
            counts.fail(error.to_string());
        }
    }
    for pod in &pods {
        pod.look().await;
        figures.add(pod).await;
    }
    let count = |count: &AtomicU64| count.load(Relaxed);
    let report = json!({
        "migration": !args.without, "stall_ms": args.stall_ms, "engines": args.engines, "concurrent_streams": args.streams,
        "seconds": args.seconds, "streams": count(&counts.streams), "faults": count(&counts.faults), "pods_killed": count(&counts.pods),
        "moves": figures.moves, "failed": count(&counts.failed), "wrong_text": count(&counts.wrong),
        "lost_with_their_entry": count(&counts.entry_died), "refused": figures.refused,
        "move_seconds_p50": figures.quantile(0.5), "move_seconds_p99": figures.quantile(0.99),
    });
    let words = counts.words.lock();
    for words in words.unwrap_or_else(PoisonError::into_inner).iter() {
        eprintln!("failed: {words}");
    }
    println!("{report}");
    let kept = count(&counts.failed) == 0 && count(&counts.wrong) == 0 && figures.moves > 0.0;
    ExitCode::from(u8::from(!kept && !args.without))
}
