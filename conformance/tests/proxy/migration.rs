//! Streams that outlive their engines: whatever breaks, wherever, the client reads one whole stream, or is told why not.

use super::support::{Story, arm, disarm, story};
use http::Method;
use outrigger_conformance::{
    harness::{Client, OneChain, ProxyBuilder, TestProxy, Version, eventually, hosts, request},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use outrigger_proxy::bootstrap::{FLEET, OUTBOUND};
use outrigger_xds::resource::bootstrap::Bootstrap;
use rand::Rng;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Sets fields of the `migration` filter.
pub(crate) fn migration(fields: Value) -> impl FnOnce(&mut Bootstrap) {
    move |bootstrap| {
        let outbound = bootstrap.listeners.iter_mut();
        let outbound = outbound.filter(|listener| listener.name == OUTBOUND);
        for filter in outbound.flat_map(|listener| listener.http().http_filters.iter_mut()) {
            if filter.name == "migration" {
                filter.config.value = fields.clone();
            }
        }
    }
}

fn engine() -> SimEngine {
    SimEngine::start(Config {
        decode_itl_ms: 1.0,
        ..Config::default()
    })
    .unwrap()
}

/// A proxy with its engines.
struct Fleet {
    engines: Vec<SimEngine>,
    proxy: TestProxy,
}

impl Fleet {
    async fn of(count: usize, build: impl FnOnce(ProxyBuilder) -> ProxyBuilder) -> Self {
        let engines: Vec<_> = (0..count).map(|_| engine()).collect();
        let builder = engines.iter().fold(ProxyBuilder::new(), |builder, engine| {
            builder.engine(engine.http_addr)
        });
        let proxy = build(builder).start();
        proxy.wait_alive(count).await;
        Self { engines, proxy }
    }

    fn arm(&self, kind: FaultKind, after_tokens: u64) {
        arm(&self.engines, kind, after_tokens);
    }

    fn disarm(&self) {
        disarm(&self.engines);
    }

    async fn ask(&self, version: Version, path: &str, body: &Value) -> Story {
        let mut client = self.proxy.client(version).await;
        let reply = client.post(path, body.to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        story(&reply.text())
    }
}

fn with(mut body: Value, more: Value) -> Value {
    let (body_fields, more) = (body.as_object_mut().unwrap(), more);
    for (name, value) in more.as_object().unwrap() {
        body_fields.insert(name.clone(), value.clone());
    }
    body
}

fn chat(more: Value) -> Value {
    let body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": 80, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Paint the sky with words."}]});
    with(body, more)
}

fn completions(more: Value) -> Value {
    let body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": 80, "ignore_eos": true,
        "prompt": "One day a robot painted"});
    with(body, more)
}

const BREAKS: [FaultKind; 4] = [
    FaultKind::Reset,
    FaultKind::Truncate,
    FaultKind::Garbage,
    FaultKind::InBandError,
];

/// Asks once undisturbed, then with breaks at many places, on every engine on the way.
async fn survives(fleet: &Fleet, path: &str, body: &Value, tries: usize) {
    let undisturbed = fleet.ask(Version::H1, path, body).await;
    assert_eq!(undisturbed.problem(), None, "{path} {body}");
    let mut random = rand::rng();
    for at in 0..tries {
        let kind = BREAKS[at % BREAKS.len()];
        let cut = random.random_range(1..undisturbed.tokens.max(2) as u64);
        fleet.arm(kind, cut);
        let version = Version::BOTH[at % 2];
        let got = fleet.ask(version, path, body).await;
        fleet.disarm();
        assert_eq!(got.problem(), None, "{kind:?} after {cut}: {body}");
        assert_eq!(got, undisturbed, "{kind:?} after {cut}: {body}");
    }
}

#[tokio::test]
async fn greedy_text_is_the_same_whatever_breaks_and_wherever() {
    let fleet = Fleet::of(2, |builder| builder).await;
    let text = fleet.ask(Version::H1, CHAT, &chat(json!({}))).await.text;
    assert!(
        text.contains('🎨'),
        "pieces of characters are cut, too: {text}"
    );
    for more in [
        json!({}),
        json!({"stream_options": {"include_usage": true}}),
        json!({"return_token_ids": true}),
        json!({"logprobs": true, "top_logprobs": 2}),
        json!({"max_completion_tokens": 60, "max_tokens": null, "min_tokens": 50}),
        json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
        json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}}),
    ] {
        survives(&fleet, CHAT, &chat(more), 8).await;
    }
    for more in [
        json!({"stream_options": {"include_usage": true}}),
        json!({"return_token_ids": true, "logprobs": 1}),
    ] {
        survives(&fleet, COMPLETIONS, &completions(more), 8).await;
    }
    let moved = fleet.proxy.metric("outrigger_migrations_total", "").await;
    assert!(moved >= 60.0, "{moved}");
}

#[tokio::test]
async fn a_stop_string_is_found_across_the_cut() {
    let fleet = Fleet::of(2, |builder| builder).await;
    for (path, body) in [
        (CHAT, chat(json!({}))),
        (COMPLETIONS, completions(json!({}))),
    ] {
        let text = fleet.ask(Version::H1, path, &body).await.text;
        let letters: Vec<char> = text.chars().collect();
        let from = letters.len() * 2 / 3;
        let stop: String = letters[from..from + 12].iter().collect();
        for more in [
            json!({"stop": stop}),
            json!({"stop": ["never to be seen", stop], "include_stop_str_in_output": true}),
            json!({"stop": [stop], "return_token_ids": true, "stream_options": {"include_usage": true}}),
        ] {
            let body = with(body.clone(), more);
            let undisturbed = fleet.ask(Version::H1, path, &body).await;
            assert_eq!(undisturbed.finish, "stop", "{body}");
            survives(&fleet, path, &body, 12).await;
        }
    }
}

#[tokio::test]
async fn an_engine_killed_in_mid_stream_is_not_missed() {
    let mut undisturbed = None;
    for cut in [0, 1, 7, 40] {
        let fleet = Fleet::of(3, |builder| builder).await;
        let body = chat(json!({"stream_options": {"include_usage": true}}));
        let whole = fleet.ask(Version::H1, CHAT, &body).await;
        assert_eq!(*undisturbed.get_or_insert(whole.clone()), whole);
        // Whoever serves it dies, and so does the next one; the third has no fault.
        for engine in &fleet.engines[..2] {
            engine.fault(Fault {
                after_tokens: cut,
                ..Fault::new(FaultKind::Die)
            });
        }
        for _ in 0..3 {
            assert_eq!(fleet.ask(Version::H2, CHAT, &body).await, whole, "{cut}");
        }
        assert!(
            fleet
                .engines
                .iter()
                .filter(|engine| engine.is_dead())
                .count()
                == 2
        );
    }
}

#[tokio::test]
async fn an_undisturbed_stream_is_what_the_engine_sends() {
    let fleet = Fleet::of(1, |builder| builder).await;
    for (path, body) in [
        (CHAT, chat(json!({"stop": "zzz"}))),
        (CHAT, chat(json!({"n": 2, "logprobs": true}))),
        (CHAT, chat(json!({"return_token_ids": true}))),
        (
            CHAT,
            chat(json!({"return_token_ids": false, "stream_options": {"include_usage": true}})),
        ),
        (COMPLETIONS, completions(json!({}))),
        (COMPLETIONS, completions(json!({"logprobs": 1}))),
    ] {
        let mut pages = Vec::new();
        for address in [fleet.engines[0].http_addr, fleet.proxy.outbound()] {
            let mut post = request(Method::POST, path, body.to_string());
            post.headers_mut()
                .insert("x-request-id", "one".parse().unwrap());
            let mut client = Client::connect(address, Version::H1).await;
            let text = client.send(post).await.text();
            pages.push(without_time(&text));
        }
        assert_eq!(pages[1], pages[0], "{body}");
    }
}

/// Seconds pass between two answers.
fn without_time(text: &str) -> String {
    let mut parts = text.split("\"created\":");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |done, part| {
        done + "T" + part.trim_start_matches(|c: char| c.is_ascii_digit())
    })
}

#[tokio::test]
async fn a_stalled_stream_costs_no_more_than_the_limit_and_a_prefill() {
    let fleet = Fleet::of(2, |builder| {
        builder.edit(migration(json!({"stall_ms": 300})))
    })
    .await;
    let body = chat(json!({}));
    let undisturbed = fleet.ask(Version::H1, CHAT, &body).await;
    for (at, engine) in fleet.engines.iter().enumerate() {
        engine.fault(Fault {
            after_tokens: 20,
            ..Fault::new(FaultKind::Stall)
        });
        let begun = Instant::now();
        // Of two requests one meets it.
        for _ in 0..2 {
            assert_eq!(fleet.ask(Version::H1, CHAT, &body).await, undisturbed);
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(4), "{took:?}");
        let stalled = fleet
            .proxy
            .metric("outrigger_migrations_total", "stall")
            .await;
        assert!(stalled >= (at + 1) as f64, "{stalled}");
    }
    for engine in &fleet.engines {
        let idle = || async { (engine.load().1 == 0).then_some(()) };
        eventually("the engine that was left generates nothing", idle).await;
    }
}

#[tokio::test]
async fn a_stream_that_cannot_move_waits_for_its_engine() {
    let fleet = Fleet::of(2, |builder| {
        builder.edit(migration(json!({"stall_ms": 200, "seeds": "NEVER"})))
    })
    .await;
    let body = chat(json!({"presence_penalty": 1, "temperature": 1}));
    fleet.arm_for(FaultKind::Stall, 5, 900);
    let got = fleet.ask(Version::H1, CHAT, &body).await;
    assert_eq!(got.problem(), None);
    let penalties = fleet
        .proxy
        .metric("outrigger_migration_refusals_total", "reason=\"penalties\"")
        .await;
    assert!(penalties >= 1.0, "{penalties}");
}

impl Fleet {
    fn arm_for(&self, kind: FaultKind, after_tokens: u64, for_ms: u64) {
        for engine in &self.engines {
            engine.fault(Fault {
                after_tokens,
                for_ms,
                ..Fault::new(kind)
            });
        }
    }
}

#[tokio::test]
async fn a_drained_engine_loses_its_streams_at_once() {
    let engines: Vec<_> = (0..2)
        .map(|_| {
            SimEngine::start(Config {
                decode_itl_ms: 30.0,
                ..Config::default()
            })
            .unwrap()
        })
        .collect();
    let beside = ProxyBuilder::new().engine(engines[0].http_addr).start();
    let entry = ProxyBuilder::new()
        .engine(engines[1].http_addr)
        .peer(beside.inbound())
        .start();
    entry.wait_alive(2).await;
    let far = hosts(beside.admin(), FLEET).await[0]["outrigger"]["engine_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let body = chat(json!({"max_tokens": 150}));
    let ask = || async {
        let mut client = entry.client(Version::H1).await;
        let reply = client.post(CHAT, body.to_string()).await;
        story(&reply.text())
    };
    let streams = async { tokio::join!(ask(), ask(), ask(), ask()) };
    let drain = async {
        let busy = || async { (engines[0].load().1 == 2).then_some(()) };
        eventually("both engines have streams", busy).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        let mut admin = Client::connect(beside.admin(), Version::H1).await;
        let path = format!("/drain?endpoint={far}");
        let told = admin.send(request(Method::POST, &path, "")).await.json();
        assert_eq!(told["draining"], true, "{told}");
        let idle = || async { (engines[0].load().1 == 0).then_some(()) };
        eventually("the drained engine is idle", idle).await;
        begun.elapsed()
    };
    let (stories, took) = tokio::join!(streams, drain);
    assert!(took < Duration::from_millis(2500), "{took:?}");
    let (one, two, three, four) = stories;
    assert_eq!(one.problem(), None);
    for other in [two, three, four] {
        assert_eq!(other, one);
    }
    let left = entry.metric("outrigger_migrations_total", "leaving").await;
    assert!(left >= 2.0, "{left}");
    let line = &entry.log(4).await;
    let moved = line.iter().filter(|line| line["migrations"] == 1).count();
    assert_eq!(moved, 2, "{line:?}");
}

#[tokio::test]
async fn a_stream_moves_between_proxies_while_the_one_beside_the_engine_passes_the_break_on() {
    let engines = [engine(), engine()];
    let besides: Vec<_> = engines
        .iter()
        .map(|engine| ProxyBuilder::new().engine(engine.http_addr).start())
        .collect();
    let entry = besides
        .iter()
        .fold(ProxyBuilder::new(), |builder, beside| {
            builder.peer(beside.inbound())
        })
        .start();
    entry.wait_alive(2).await;
    let body = chat(json!({"stream_options": {"include_usage": true}}));
    let ask = || async {
        let mut client = entry.client(Version::H2).await;
        story(&client.post(CHAT, body.to_string()).await.text())
    };
    let undisturbed = ask().await;
    assert_eq!(undisturbed.problem(), None);
    for kind in BREAKS {
        for engine in &engines {
            engine.fault(Fault {
                after_tokens: 11,
                ..Fault::new(kind)
            });
        }
        assert_eq!(ask().await, undisturbed, "{kind:?}");
        for engine in &engines {
            engine.disarm();
        }
    }
}
