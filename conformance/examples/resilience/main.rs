//! Streams under fire: an engine dies, falls silent or breaks every half second, a third of them together with the proxy
//! beside it, and clients compare every text with an undisturbed one. The last line is JSON; the exit code says whether
//! all went as promised.

mod client;
mod dialect;
mod fire;
mod pod;
mod report;

use clap::Parser;
use client::{Clients, PROMPTS, Story, read};
use dialect::EnginesOf;
use report::Report;
use std::{
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

/// For the last lines of access logs to be written.
const LOG_LAG: Duration = Duration::from_millis(500);

/// Streams on a fleet whose engines break.
#[derive(Parser, Clone)]
// `run` gives defaults of its own before what it is told.
#[command(args_override_self = true)]
struct Args {
    /// What the engines imitate.
    #[arg(long, value_enum, default_value_t)]
    engines_of: EnginesOf,
    /// One half of the engines is for prefill, the other for decode.
    #[arg(long)]
    split: bool,
    /// Engines, each with a proxy beside it.
    #[arg(long, default_value_t = 8)]
    engines: usize,
    /// Streams at once.
    #[arg(long, default_value_t = 2000)]
    streams: usize,
    /// How long new streams begin; faults go on until the last one is over.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Tokens of a stream.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Milliseconds between two tokens of an engine.
    #[arg(long, default_value_t = 100.0)]
    itl_ms: f64,
    /// Milliseconds between two faults; 0 is no faults.
    #[arg(long, default_value_t = 500)]
    every_ms: u64,
    /// Of the streams that come to their end, so many per cent must have moved.
    #[arg(long, default_value_t = 90.0)]
    moved_min: f64,
    /// Leave the filter out, for contrast: then nothing is promised.
    #[arg(long, conflicts_with = "proxy")]
    without: bool,
    /// Take this `outrigger-proxy`; the default is one that is built in.
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// Keep there what the proxies log: `N.log` is the access log of pod N, `N.err` its messages (`RUST_LOG` says which).
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Be the proxy of this pod.
    #[arg(long, hide = true)]
    proxy_of: Option<usize>,
    /// The pods: four addresses each.
    #[arg(long, hide = true, value_delimiter = ',')]
    addresses: Vec<SocketAddr>,
}

/// What the engines tell while nothing is broken. One that stands apart is asked: half of an engine tells nothing.
async fn undisturbed(args: &Args) -> Vec<Story> {
    let mut told: Vec<Vec<Story>> = Vec::new();
    for engine in args.engines_of.alone() {
        let mut stories = Vec::new();
        for prompt in 0..PROMPTS {
            let calm = args
                .engines_of
                .request(prompt, args, &format!("calm-{prompt}"));
            let story = read(engine.http_addr, calm, None).await;
            stories.push(story.expect("invariant: nothing is broken yet"));
        }
        told.push(stories);
    }
    let same = told.iter().all(|stories| *stories == told[0]);
    assert!(same, "invariant: a model is one at all engines");
    told.swap_remove(0)
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = Args::parse();
    if let Some(at) = args.proxy_of {
        return pod::run_proxy(at, &args);
    }
    if let Err(why) = args.engines_of.check(args.split) {
        eprintln!("{why}");
        return ExitCode::from(2);
    }
    let scratch = std::env::temp_dir().join(format!("outrigger-resilience-{}", std::process::id()));
    let logs = args.logs.clone().unwrap_or_else(|| scratch.clone());
    std::fs::create_dir_all(&logs).expect("invariant: there is room for logs");
    let keeps = args.logs.replace(logs.clone()).is_some();
    let mut pods = pod::start(&mut args).await;
    let expected = undisturbed(&args).await;
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let clients = Arc::new(Clients::new(&pods, args.clone(), expected, until));
    let mut fire = fire::Fire::default();
    let ended = {
        let running = clients.clone().run();
        let burning = fire.burn(&mut pods, &args, &clients);
        let (ended, ()) = tokio::join!(running, burning);
        ended
    };
    for pod in &pods {
        fire.figures.add(pod).await;
    }
    tokio::time::sleep(LOG_LAG).await;
    drop(pods);
    let report = Report::of(&ended, &args, &fire, &report::logged(&logs));
    if !keeps {
        // Best effort: scratch files.
        let _ = std::fs::remove_dir_all(&logs);
    }
    report.print();
    ExitCode::from(u8::from(!report.is_kept()))
}
