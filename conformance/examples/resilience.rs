//! Streams under fire: engines die, stall and break every half second, and clients compare every text with an
//! undisturbed one. The last line is JSON; the exit code says whether all went as promised.

use clap::Parser;
use futures_util::future::try_join_all;
use http::Method;
use outrigger_conformance::{
    harness::{Client, OneChain, ProxyBuilder, TestProxy, Version, metric, request},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{bootstrap::Bootstrap, listener::Listener};
use rand::{Rng, seq::IteratorRandom};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
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
/// How long an engine is broken.
const BROKEN: Duration = Duration::from_secs(1);
/// Failures whose words are reported.
const WORDS_MAX: usize = 8;
/// Different prompts.
const PROMPTS: usize = 16;

/// Streams on a fleet whose engines break.
#[derive(Parser)]
struct Args {
    /// Engines, each with a proxy beside it.
    #[arg(long, default_value_t = 8)]
    engines: usize,
    /// Streams at once.
    #[arg(long, default_value_t = 200)]
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
    /// Silence before a stream moves; shipped are 30,000, which is longer than these clients wait.
    #[arg(long, default_value_t = 5_000)]
    stall_ms: u64,
    /// Leave the filter out, for contrast.
    #[arg(long)]
    without: bool,
}

#[derive(Default)]
struct Counts {
    streams: AtomicU64,
    failed: AtomicU64,
    wrong: AtomicU64,
    faults: AtomicU64,
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

/// A place where an engine runs, or comes back.
struct Place {
    address: SocketAddr,
    engine: Option<SimEngine>,
}

impl Place {
    fn start(address: SocketAddr) -> Self {
        let config = Config {
            port: address.port(),
            decode_itl_ms: 20.0,
            batch_slots: 512,
            ..Config::default()
        };
        Self {
            address,
            engine: SimEngine::start(config).ok(),
        }
    }

    /// All streams that have had a few tokens take the fault, and those that will.
    fn break_down(&self, kind: FaultKind) {
        if let Some(engine) = &self.engine {
            engine.fault(Fault {
                after_tokens: rand::rng().random_range(1..100),
                count: u64::MAX,
                ..Fault::new(kind)
            });
        }
    }

    async fn mend(&mut self, kind: FaultKind) {
        if kind == FaultKind::Die {
            self.engine = None;
            *self = Self::start(self.address);
        } else {
            let mut client = Client::connect(self.address, Version::H1).await;
            client.send(request(Method::DELETE, "/sim/fault", "")).await;
        }
    }
}

fn free() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("invariant: a free port");
    listener.local_addr().expect("invariant: a bound socket")
}

fn proxies(engines: &[Place], stall_ms: u64, without: bool) -> Vec<TestProxy> {
    let inbound: Vec<_> = engines.iter().map(|_| free()).collect();
    let build = |at: usize| {
        let builder = ProxyBuilder::new()
            .engine(engines[at].address)
            .flag("--inbound", &inbound[at].to_string())
            .flag("--policy", "least_request")
            .flag("--access-log", "none");
        let others = (0..inbound.len()).filter(|other| *other != at);
        let builder = others.fold(builder, |builder, other| builder.peer(inbound[other]));
        let edit = move |bootstrap: &mut Bootstrap| {
            let outbound = |listener: &&mut Listener| listener.name == OUTBOUND;
            for listener in bootstrap.listeners.iter_mut().filter(outbound) {
                let filters = &mut listener.http().http_filters;
                filters.retain(|filter| !without || filter.name != "migration");
                for filter in filters
                    .iter_mut()
                    .filter(|filter| filter.name == "migration")
                {
                    filter.config.value = json!({ "stall_ms": stall_ms });
                }
            }
        };
        builder.edit(edit).start()
    };
    (0..engines.len()).map(build).collect()
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
    let mut client = Client::connect(address, Version::H1).await;
    let reply = client.send(request(Method::POST, path, body)).await;
    let text = reply.text();
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
    if done && reply.status == 200 {
        return Ok((story, usage));
    }
    let end = text.lines().rfind(|line| !line.is_empty());
    Err(format!("{}: {}", reply.status, end.unwrap_or_default()))
}

/// Breaks an engine at a time, whole, until each was whole again for a moment.
async fn break_engines(engines: &mut [Place], counts: &Counts, every: Duration, stop: &AtomicBool) {
    let mut broken: VecDeque<(usize, FaultKind, Instant)> = VecDeque::new();
    for kind in FAULTS.into_iter().cycle() {
        if stop.load(Relaxed) {
            return;
        }
        tokio::time::sleep(every).await;
        while let Some((at, kind, _)) = broken.pop_front_if(|(.., since)| since.elapsed() >= BROKEN)
        {
            engines[at].mend(kind).await;
        }
        let well = (0..engines.len()).filter(|at| broken.iter().all(|(place, ..)| place != at));
        let Some(at) = well.choose(&mut rand::rng()) else {
            continue;
        };
        engines[at].break_down(kind);
        counts.faults.fetch_add(1, Relaxed);
        broken.push_back((at, kind, Instant::now()));
    }
}

async fn client(
    addresses: Arc<Vec<SocketAddr>>,
    expected: Arc<Vec<Story>>,
    counts: Arc<Counts>,
    tokens: usize,
    until: Instant,
) {
    while Instant::now() < until {
        let (prompt, entry) = {
            let mut random = rand::rng();
            (
                random.random_range(0..PROMPTS),
                random.random_range(0..addresses.len()),
            )
        };
        let got = read(addresses[entry], prompt, tokens).await;
        counts.streams.fetch_add(1, Relaxed);
        match got {
            Err(words) => counts.fail(words),
            Ok(got) if got != expected[prompt] => {
                counts.wrong.fetch_add(1, Relaxed);
            }
            Ok(_) => {}
        }
    }
}

/// The bound under which `share` of a histogram's samples lie.
async fn quantile(admin: SocketAddr, name: &str, share: f64) -> Option<f64> {
    let page = Client::get(admin, "/stats/prometheus").await.text();
    let prefix = format!("{name}_bucket{{le=\"");
    let buckets = page.lines().filter_map(|line| {
        let (bound, count) = line.strip_prefix(&prefix)?.split_once("\"} ")?;
        Some((bound.parse::<f64>().ok()?, count.parse::<f64>().ok()?))
    });
    let buckets: Vec<_> = buckets.collect();
    let all = buckets.last()?.1;
    let found = buckets.iter().find(|(_, count)| *count >= all * share);
    found
        .map(|(bound, _)| *bound)
        .filter(|bound| bound.is_finite())
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let mut engines: Vec<_> = (0..args.engines).map(|_| Place::start(free())).collect();
    let proxies = proxies(&engines, args.stall_ms, args.without);
    for proxy in &proxies {
        proxy.wait_alive(args.engines).await;
    }
    let addresses: Arc<Vec<_>> = Arc::new(proxies.iter().map(TestProxy::outbound).collect());
    let calm = (0..PROMPTS).map(|prompt| read(engines[0].address, prompt, args.tokens));
    let expected = try_join_all(calm).await;
    let expected = Arc::new(expected.expect("invariant: nothing is broken yet"));
    let counts = Arc::<Counts>::default();
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let clients: Vec<_> = (0..args.streams)
        .map(|_| {
            let (addresses, expected) = (addresses.clone(), expected.clone());
            tokio::spawn(client(
                addresses,
                expected,
                counts.clone(),
                args.tokens,
                until,
            ))
        })
        .collect();
    let stop = AtomicBool::new(false);
    let ends = async {
        for client in clients {
            // A client that panics has a stream that ended in no way it knows.
            if let Err(error) = client.await {
                counts.fail(error.to_string());
            }
        }
        stop.store(true, Relaxed);
    };
    let every = Duration::from_millis(args.every_ms);
    tokio::join!(ends, break_engines(&mut engines, &counts, every, &stop));
    let admin = proxies[0].admin();
    let name = "outrigger_migrations_total";
    let moved = metric(admin, name, "").await - metric(admin, name, "failed").await;
    let (failed, wrong) = (counts.failed.load(Relaxed), counts.wrong.load(Relaxed));
    let report = json!({
        "migration": !args.without, "stall_ms": args.stall_ms, "engines": args.engines, "concurrent_streams": args.streams, "seconds": args.seconds,
        "streams": counts.streams.load(Relaxed), "faults": counts.faults.load(Relaxed), "moves": moved,
        "failed": failed, "wrong_text": wrong,
        "refused": metric(admin, "outrigger_migration_refusals_total", "").await,
        "move_seconds_p50": quantile(admin, "outrigger_migration_seconds", 0.5).await,
        "move_seconds_p99": quantile(admin, "outrigger_migration_seconds", 0.99).await,
    });
    let words = counts.words.lock();
    for words in words.unwrap_or_else(PoisonError::into_inner).iter() {
        eprintln!("failed: {words}");
    }
    println!("{report}");
    let kept = failed == 0 && wrong == 0 && moved > 0.0;
    ExitCode::from(u8::from(!kept && !args.without))
}
