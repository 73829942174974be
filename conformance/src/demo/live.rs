//! The demo for people: what to try, light traffic so that there is something to see, and a summary that stays on one
//! screen. It judges nothing.

use super::{
    conversation::{Conversation, MODEL},
    exchange::{self, Flight, Generation},
    fleet::{Fleet, Known, Speed, index_blocks},
    samples::Page,
};
use anyhow::Result;
use futures_util::future::join_all;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    cell::Cell,
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// About as fast as a small model on a GPU.
const SPEED: Speed = Speed {
    prefill_tokens_per_s: 10_000,
    decode_itl_ms: 8.0,
};
/// Between two pictures on a terminal.
const REDRAW: Duration = Duration::from_millis(500);
/// Where there is no terminal, a line is printed instead of so many pictures.
const PICTURES_PER_LINE: u32 = 10;
/// Clients of the background traffic, how long they think, and how long their conversations are.
const CLIENTS: usize = 3;
const THINK_MS: std::ops::Range<u64> = 200..900;
const TURNS: std::ops::Range<usize> = 3..9;
const ANSWER_TOKENS: u32 = 48;
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long an engine that somebody killed stays dead.
const DEAD_FOR: Duration = Duration::from_secs(8);

/// Runs until `told` to end.
pub(super) async fn run(traffic: bool, seed: u64, told: impl Future<Output = ()>) -> Result<()> {
    let mut told = std::pin::pin!(told);
    println!("Starting two simulated engines, a proxy beside each, and a control plane ...");
    let mut fleet = tokio::select! {
        started = Fleet::start(SPEED) => started?,
        () = &mut told => return Ok(()),
    };
    print!("{}", to_try(&fleet));
    let entries: Vec<SocketAddr> = fleet.proxies.iter().map(|proxy| proxy.outbound).collect();
    let refused = Cell::new(0);
    let clients = join_all(
        (0..if traffic { CLIENTS } else { 0 })
            .map(|number| client(&entries, seed, number, &refused)),
    );
    let show = show(&mut fleet, &refused);
    let result = tokio::select! {
        result = show => result,
        () = told => Ok(()),
        // Without traffic there are no clients, and all of them are done.
        () = async { clients.await; std::future::pending().await } => Ok(()),
    };
    println!("\nStopping.");
    fleet.stop().await;
    result
}

fn to_try(fleet: &Fleet) -> String {
    let (a, b) = (fleet.proxies[0].outbound, fleet.proxies[1].outbound);
    let (admin_a, admin_b) = (fleet.proxies[0].admin, fleet.proxies[1].admin);
    let (control, file) = (fleet.control_plane.admin, fleet.directory.file());
    let file = file.display();
    let chat = format!(
        r#"{{"model":"{MODEL}","messages":[{{"role":"user","content":"Tell me about the sea."}}],"max_tokens":40"#
    );
    let mut out = String::new();
    for (what, line) in [
        (
            "Ask one proxy",
            format!(
                "curl -s http://{a}/v1/chat/completions -H 'content-type: application/json' -d '{chat}}}'"
            ),
        ),
        (
            "Stream from the other",
            format!(
                "curl -sN http://{b}/v1/chat/completions -H 'content-type: application/json' -d '{chat},\"stream\":true}}'"
            ),
        ),
        (
            "See who answered, and why (x-outrigger-endpoint, x-outrigger-decision)",
            format!(
                "curl -si http://{b}/v1/chat/completions -H 'x-outrigger-debug: 1' -H 'content-type: application/json' -d '{chat}}}'"
            ),
        ),
        (
            "Models of the whole fleet",
            format!("curl -s http://{a}/v1/models"),
        ),
        (
            "What a proxy knows of the engines",
            format!("curl -s http://{admin_a}/clusters"),
        ),
        (
            "Its metrics",
            format!("curl -s http://{admin_b}/stats/prometheus"),
        ),
        (
            "Choose engines in another way (kv, round_robin, least_request, random), while all goes on",
            format!("sed -i 's/policy: [a-z_]*/policy: round_robin/' {file}"),
        ),
        (
            "What the control plane knows of its proxies, and its versions",
            format!("curl -s http://{control}/clients; curl -s http://{control}/versions"),
        ),
        (
            "Kill the control plane: the proxies go on as they are",
            format!("kill -9 {}", fleet.control_plane.process.pid),
        ),
        (
            "Kill an engine (it comes back by itself)",
            format!("kill -9 {}", fleet.engines[0].pid()),
        ),
    ] {
        // A String takes everything.
        let _ = write!(out, "\n# {what}\n{line}\n");
    }
    out.push_str("\nCtrl-C stops everything.\n\n");
    out
}

/// Has conversations for ever, each turn at any proxy.
async fn client(entries: &[SocketAddr], seed: u64, number: usize, refused: &Cell<u64>) {
    let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
    for conversation in (number..).step_by(CLIENTS) {
        let mut talk = Conversation::new(seed, conversation, ANSWER_TOKENS);
        for _ in 0..rng.random_range(TURNS) {
            let ask = talk.next(true);
            let entry = entries[rng.random_range(0..entries.len())];
            let reply = exchange::post(
                entry,
                ask.path,
                &ask.body,
                &Flight::default(),
                REQUEST_LIMIT,
            )
            .await;
            let answer = Generation::of(&reply);
            refused.set(refused.get() + u64::from(!answer.is_whole()));
            talk.answered(&answer.text);
            tokio::time::sleep(Duration::from_millis(rng.random_range(THINK_MS))).await;
        }
    }
}

/// Draws for ever, and starts engines again that somebody killed.
async fn show(fleet: &mut Fleet, refused: &Cell<u64>) -> Result<()> {
    let is_terminal = std::io::stdout().is_terminal();
    let mut tick = tokio::time::interval(REDRAW);
    let (mut looks, mut drawn) = (0_u32, 0);
    let mut dead_since: Vec<Option<Instant>> = vec![None; fleet.engines.len()];
    loop {
        tick.tick().await;
        for (engine, dead_since) in fleet.engines.iter_mut().zip(&mut dead_since) {
            if !engine.has_ended() {
                *dead_since = None;
            } else if dead_since.get_or_insert_with(Instant::now).elapsed() > DEAD_FOR {
                engine.restart().await?;
            }
        }
        looks = looks.wrapping_add(1);
        if !is_terminal && looks % PICTURES_PER_LINE != 0 {
            continue;
        }
        let seen = Seen::look(fleet).await;
        let mut out = std::io::stdout().lock();
        if is_terminal {
            let picture = seen.picture(fleet, refused.get());
            if drawn > 0 {
                // Back to where the last picture began; clears what is below.
                write!(out, "\x1b[{drawn}A\r\x1b[J")?;
            }
            out.write_all(picture.as_bytes())?;
            drawn = picture.lines().count();
        } else {
            writeln!(out, "{}", seen.line(refused.get()))?;
        }
        out.flush()?;
    }
}

/// What proxies and engines say at one moment.
struct Seen {
    /// Of what the control plane serves; `None` if it is dead.
    version: Option<u64>,
    proxies: Vec<(Page, Vec<Known>)>,
    engines: Vec<Page>,
}

impl Seen {
    async fn look(fleet: &Fleet) -> Self {
        let mut seen = Self {
            version: fleet.control_plane.version().await,
            proxies: Vec::new(),
            engines: Vec::new(),
        };
        for proxy in &fleet.proxies {
            seen.proxies
                .push((proxy.stats().await, proxy.known().await));
        }
        for engine in &fleet.engines {
            seen.engines.push(engine.metrics().await);
        }
        seen
    }

    fn picture(&self, fleet: &Fleet, refused: u64) -> String {
        let mut lines = vec![format!(
            "{:<18}{:>9}{:>7}{:>10}{:>10}{:>11}{:>11}",
            "proxy", "requests", "errors", "TTFT p50", "TTFT p99", "predicted", "confirmed"
        )];
        for (proxy, (stats, _)) in fleet.proxies.iter().zip(&self.proxies) {
            let hits = |kind| stats.sum("outrigger_prefix_hit_tokens_total", &[("kind", kind)]);
            lines.push(format!(
                "{:<18}{:>9}{:>7}{:>10}{:>10}{:>11}{:>11}",
                proxy.outbound.to_string(),
                requests(stats),
                errors(stats),
                millis(stats, 0.5),
                millis(stats, 0.99),
                hits("predicted"),
                hits("confirmed"),
            ));
        }
        lines.push(String::new());
        lines.push(format!(
            "{:<18}{:>7}{:>10}{:>9}{:>8}{:>9}{:>15}",
            "engine", "pid", "health", "served", "running", "hit rate", "blocks known"
        ));
        for (engine, own) in fleet.engines.iter().zip(&self.engines) {
            let known = || {
                self.proxies
                    .iter()
                    .filter_map(|(_, known)| known.iter().find(|known| engine.is(&known.engine_id)))
            };
            let health = known()
                .map(|known| known.health.as_str())
                .next()
                .unwrap_or("unknown");
            let load = known()
                .map(|known| known.running + known.waiting)
                .max()
                .unwrap_or_default();
            let blocks: Vec<String> = self
                .proxies
                .iter()
                .map(|(stats, _)| index_blocks(stats, engine).to_string())
                .collect();
            lines.push(format!(
                "{:<18}{:>7}{:>10}{:>9}{:>8}{:>9}{:>15}",
                engine.http.to_string(),
                engine.pid(),
                health,
                own.sum("vllm:request_success_total", &[]),
                load,
                hit_rate(own),
                blocks.join(" / "),
            ));
        }
        lines.push(String::new());
        lines.push(match self.version {
            Some(version) => format!("control plane: version {version} of fleet.yaml"),
            None => "control plane: does not answer".into(),
        });
        lines.push(format!("background requests not answered whole: {refused}"));
        lines.join("\n") + "\n"
    }

    fn line(&self, refused: u64) -> String {
        let mut line = String::new();
        for (number, (stats, known)) in self.proxies.iter().enumerate() {
            let healthy = known.iter().filter(|known| known.is_ready).count();
            let name = ["A", "B"].get(number).copied().unwrap_or("?");
            let (p50, p99) = (millis(stats, 0.5), millis(stats, 0.99));
            // A String takes everything.
            let _ = write!(
                line,
                "proxy {name}: {} requests, TTFT p50 {p50} p99 {p99}, {healthy} engines; ",
                requests(stats)
            );
        }
        let rates: Vec<String> = self.engines.iter().map(hit_rate).collect();
        let _ = write!(
            line,
            "hit rates {}; {refused} not answered whole",
            rates.join(" and ")
        );
        line
    }
}

/// Requests of clients; those of peers come in by another listener.
fn requests(stats: &Page) -> f64 {
    stats.sum(
        "envoy_http_downstream_rq_total",
        &[("envoy_http_conn_manager_prefix", "outbound")],
    )
}

/// Those answered 5xx, and streams that ended with an error.
fn errors(stats: &Page) -> f64 {
    let labels = [
        ("envoy_http_conn_manager_prefix", "outbound"),
        ("envoy_response_code_class", "5"),
    ];
    stats.sum("envoy_http_downstream_rq_xx", &labels)
        + stats.sum("outrigger_stream_errors_total", &[])
}

fn millis(stats: &Page, quantile: f64) -> String {
    let seconds = stats.quantile("outrigger_time_to_first_token_seconds", quantile);
    seconds.map_or("-".into(), |seconds| format!("{:.0} ms", seconds * 1000.0))
}

/// By the engine's own counters: prompt tokens from its cache, of all it was asked.
fn hit_rate(own: &Page) -> String {
    let (hits, asked) = (
        own.sum("vllm:prefix_cache_hits_total", &[]),
        own.sum("vllm:prefix_cache_queries_total", &[]),
    );
    if asked > 0.0 {
        format!("{:.0} %", 100.0 * hits / asked)
    } else {
        "-".into()
    }
}
