//! Prefill at one engine, tokens from another: the client reads what one engine would have told, and whatever goes wrong
//! costs it time and nothing else.

use super::support::story;
use http::Method;
use outrigger_conformance::{
    harness::{Client, OneChain, ProxyBuilder, TestProxy, Version, eventually, hosts, request},
    sim::{Config, Fault, FaultKind, Nixl, SimEngine},
};
use outrigger_proxy::bootstrap::{FLEET, OUTBOUND};
use outrigger_xds::resource::bootstrap::Bootstrap;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// Sets fields of the filter.
pub(crate) fn disaggregation(fields: Value) -> impl FnOnce(&mut Bootstrap) {
    move |bootstrap| {
        let outbound = bootstrap.listeners.iter_mut();
        let outbound = outbound.filter(|listener| listener.name == OUTBOUND);
        for filter in outbound.flat_map(|listener| listener.http().http_filters.iter_mut()) {
            if filter.name == "disaggregation" {
                filter.config.value = fields.clone();
            }
        }
    }
}

pub(crate) fn config() -> Config {
    Config {
        decode_itl_ms: 1.0,
        prompt_tokens_details: true,
        dev_mode: true,
        nixl: Some(Nixl::default()),
        ..Config::default()
    }
}

pub(crate) fn engine(config: Config) -> SimEngine {
    SimEngine::start(config).unwrap()
}

pub(crate) fn with_role(builder: ProxyBuilder, engine: &SimEngine, role: &str) -> ProxyBuilder {
    builder.flag("--engine", &format!("{};role={role}", engine.url()))
}

pub(crate) fn always(mut more: Value) -> Value {
    more["mode"] = "always".into();
    more["decision_header"] = true.into();
    more
}

/// Engines for prefill and for decode beside one proxy.
pub(crate) struct Fleet {
    pub(crate) prefill: Vec<SimEngine>,
    pub(crate) decode: Vec<SimEngine>,
    pub(crate) proxy: TestProxy,
}

impl Fleet {
    pub(crate) async fn of(prefill: usize, decode: usize, fields: Value) -> Self {
        let make = |count| (0..count).map(|_| engine(config())).collect::<Vec<_>>();
        Self::start(make(prefill), make(decode), |builder| {
            builder.edit(disaggregation(fields))
        })
        .await
    }

    pub(crate) async fn start(
        prefill: Vec<SimEngine>,
        decode: Vec<SimEngine>,
        build: impl FnOnce(ProxyBuilder) -> ProxyBuilder,
    ) -> Self {
        let mut builder = ProxyBuilder::new().flag("--policy", "kv");
        for engine in &prefill {
            builder = with_role(builder, engine, "prefill");
        }
        for engine in &decode {
            builder = with_role(builder, engine, "decode");
        }
        let proxy = build(builder).start();
        proxy.wait_alive(prefill.len() + decode.len()).await;
        Self {
            prefill,
            decode,
            proxy,
        }
    }

    /// Requests whose blocks went from engine to engine.
    pub(crate) fn pulled(&self) -> usize {
        self.prefill.iter().map(|engine| engine.transfers().1).sum()
    }

    /// Nothing runs, waits or is kept anywhere.
    pub(crate) async fn idle(&self) {
        let look = || async {
            let mut all = self.prefill.iter().chain(&self.decode);
            let quiet =
                |engine: &SimEngine| engine.load() == (0, 0, 0.0) && engine.transfers().0 == 0;
            all.all(quiet).then_some(())
        };
        eventually("all engines are idle", look).await;
        let look = || async {
            let active = hosts(self.proxy.admin(), FLEET).await;
            active
                .iter()
                .all(|host| active_requests(host) == 0)
                .then_some(())
        };
        eventually("no request is counted any more", look).await;
    }

    /// What a client is told, what one engine tells that was asked directly, and the record of the former.
    pub(crate) async fn both(&self, version: Version, path: &str, body: &Value) -> Told {
        let mut client = self.proxy.client(version).await;
        let mut ask = request(Method::POST, path, body.to_string());
        let on = http::HeaderValue::from_static("1");
        ask.headers_mut().insert("x-outrigger-debug", on);
        let reply = client.send(ask).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let record = reply.header("x-outrigger-disaggregation");
        let record = serde_json::from_str(record).unwrap();
        let alone = engine(config());
        let mut client = Client::connect(alone.http_addr, Version::H1).await;
        let expected = client.post(path, body.to_string()).await.text();
        Told {
            got: reply.text(),
            expected,
            record,
        }
    }
}

/// Requests that are counted at a host of the admin's list.
fn active_requests(host: &Value) -> u64 {
    let stats = host["stats"].as_array().unwrap();
    let active = stats.iter().find(|stat| stat["name"] == "rq_active");
    active.map_or(0, |active| {
        active["value"].as_str().unwrap_or("0").parse().unwrap()
    })
}

/// See [`Fleet::both`].
pub(crate) struct Told {
    pub(crate) got: String,
    expected: String,
    pub(crate) record: Value,
}

impl Told {
    /// Text, ids, figures and order are those of one engine.
    pub(crate) fn assert_same(&self) {
        if self.got.starts_with("data: ") {
            let (got, expected) = (story(&self.got), story(&self.expected));
            assert_eq!(got.problem(), None);
            assert_eq!(got, expected, "{}", self.record);
            return;
        }
        let same = |text: &str| {
            let mut body: Value = serde_json::from_str(text).unwrap();
            for name in ["id", "created"] {
                body[name].take();
            }
            body["usage"]["prompt_tokens_details"].take();
            body
        };
        assert_eq!(same(&self.got), same(&self.expected), "{}", self.record);
    }
}

pub(crate) fn with(mut body: Value, more: &Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// A prompt of some hundred tokens that begins like no other.
pub(crate) fn text(seed: usize) -> String {
    let more = "One day a robot painted the sky and the sea. ".repeat(30);
    format!("{seed} {seed} stories. {more}")
}

pub(crate) fn chat(seed: usize, more: &Value) -> Value {
    let body = json!({"model": "sim", "temperature": 0, "max_tokens": 24, "ignore_eos": true,
        "messages": [{"role": "user", "content": text(seed)}]});
    with(body, more)
}

pub(crate) fn completion(seed: usize, more: &Value) -> Value {
    let body = json!({"model": "sim", "temperature": 0, "max_tokens": 24, "ignore_eos": true, "prompt": text(seed)});
    with(body, more)
}

#[tokio::test]
async fn the_client_reads_what_one_engine_would_have_told() {
    let fleet = Fleet::of(1, 1, always(json!({}))).await;
    let stream = json!({"stream": true});
    let told = json!({"stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true});
    let cases = [
        (CHAT, chat(1, &json!({}))),
        (CHAT, chat(2, &stream)),
        (CHAT, chat(3, &told)),
        (
            CHAT,
            chat(
                4,
                &json!({"logprobs": true, "top_logprobs": 2, "max_completion_tokens": 9}),
            ),
        ),
        (
            CHAT,
            chat(
                5,
                &with(stream.clone(), &json!({"logprobs": true, "min_tokens": 20})),
            ),
        ),
        (
            CHAT,
            chat(6, &json!({"n": 1, "stop": ["robot"], "ignore_eos": false})),
        ),
        (
            CHAT,
            chat(
                7,
                &json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
            ),
        ),
        (COMPLETIONS, completion(8, &json!({}))),
        (COMPLETIONS, completion(9, &stream)),
        (COMPLETIONS, completion(10, &told)),
        (COMPLETIONS, completion(11, &json!({"logprobs": 1}))),
        (
            COMPLETIONS,
            completion(12, &with(stream, &json!({"prompt": vec![300; 200]}))),
        ),
    ];
    let count = cases.len();
    for (at, (path, body)) in cases.into_iter().enumerate() {
        let told = fleet.both(Version::BOTH[at % 2], path, &body).await;
        told.assert_same();
        assert_eq!(told.record["decision"], "split", "{}", told.record);
        assert_eq!(told.record["fallback"], Value::Null, "{}", told.record);
    }
    assert_eq!(
        fleet.pulled(),
        count,
        "each prompt went from one engine to the other"
    );
    assert_eq!(fleet.prefill[0].transfers(), (0, count, 0));
    fleet.idle().await;
    let line = fleet.proxy.log(count).await.remove(0);
    assert_eq!(line["disaggregation"]["reason"], "always", "{line}");
    let decode = fleet.decode[0].http_addr.to_string();
    assert!(
        line["upstream_host"].as_str().unwrap().ends_with(&decode),
        "{line}"
    );
}

#[tokio::test]
async fn many_at_once_get_their_own_text_each() {
    let fleet = Fleet::of(2, 2, always(json!({}))).await;
    let bodies: Vec<Value> = (0..24)
        .map(|seed| chat(seed, &json!({"stream": true})))
        .collect();
    let all = bodies
        .iter()
        .map(|body| fleet.both(Version::H2, CHAT, body));
    for told in futures_util::future::join_all(all).await {
        told.assert_same();
    }
    assert_eq!(fleet.pulled(), 24);
    fleet.idle().await;
}

#[tokio::test]
async fn legs_cross_proxies() {
    let (prefill, decode) = (engine(config()), engine(config()));
    let a = with_role(ProxyBuilder::new(), &prefill, "prefill").start();
    let b = with_role(ProxyBuilder::new(), &decode, "decode").start();
    let entry = ProxyBuilder::new().peer(a.inbound()).peer(b.inbound());
    let entry = entry.edit(disaggregation(always(json!({})))).start();
    entry.wait_alive(2).await;
    let fleet = Fleet {
        prefill: vec![prefill],
        decode: vec![decode],
        proxy: entry,
    };
    for (seed, more) in [json!({}), json!({"stream": true})].iter().enumerate() {
        let told = fleet.both(Version::H1, CHAT, &chat(seed, more)).await;
        told.assert_same();
        assert_eq!(told.record["decision"], "split");
    }
    assert_eq!(fleet.pulled(), 2);
    fleet.idle().await;
}

#[tokio::test]
async fn cached_tokens_are_those_of_the_engine_that_computed_the_prompt() {
    let fleet = Fleet::of(1, 1, always(json!({}))).await;
    let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
    fleet.both(Version::H1, CHAT, &chat(1, &usage)).await;
    for more in [json!({}), usage] {
        fleet.idle().await;
        let mut client = Client::connect(fleet.decode[0].http_addr, Version::H1).await;
        client.post("/reset_prefix_cache", "").await;
        let told = fleet.both(Version::H1, CHAT, &chat(1, &more)).await;
        told.assert_same();
        let figure = told.got.split("\"cached_tokens\":").nth(1).unwrap();
        let figure = figure.split(|c: char| !c.is_ascii_digit()).next().unwrap();
        assert!(figure.parse::<u64>().unwrap() >= 96, "{}", told.got);
    }
}

#[tokio::test]
async fn short_prompts_and_cached_ones_stay_whole() {
    let fleet = Fleet::of(1, 1, json!({"decision_header": true})).await;
    let short = json!({"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4});
    let told = fleet.both(Version::H1, CHAT, &chat(1, &short)).await;
    assert_eq!(told.record["reason"], "short", "{}", told.record);
    let told = fleet.both(Version::H1, CHAT, &chat(2, &json!({}))).await;
    assert_eq!(told.record["reason"], "uncached_tokens", "{}", told.record);
    let cached = || async {
        let told = fleet.both(Version::H1, CHAT, &chat(2, &json!({}))).await;
        told.assert_same();
        (told.record["reason"] == "short").then_some(told.record)
    };
    // The decode engine tells of blocks that it pulled.
    let record = eventually("the prompt is known to be cached", cached).await;
    assert!(record["uncached_tokens"].as_u64().unwrap() < 64, "{record}");
    let prefills = fleet.prefill[0].transfers().1;
    fleet.both(Version::H1, CHAT, &chat(2, &json!({}))).await;
    assert_eq!(fleet.prefill[0].transfers().1, prefills);
    let split = r#"decision="split",reason="uncached_tokens""#;
    assert!(
        fleet
            .proxy
            .metric("outrigger_disaggregation_total", split)
            .await
            >= 1.0
    );
}

#[tokio::test]
async fn predicted_time_counts_as_well() {
    let fields = json!({"decision_header": true, "uncached_tokens_min": 100_000, "uncached_ms_min": 50, "prefill_tokens_per_s": 1000});
    let fleet = Fleet::of(1, 1, fields).await;
    let told = fleet.both(Version::H1, CHAT, &chat(1, &json!({}))).await;
    assert_eq!(told.record["reason"], "uncached_ms", "{}", told.record);
    assert!(told.record["predicted_ms"].as_u64().unwrap() >= 50);
    let short = json!({"messages": [{"role": "user", "content": "Hi."}]});
    let told = fleet.both(Version::H1, CHAT, &chat(2, &short)).await;
    assert_eq!(told.record["reason"], "short", "{}", told.record);
}

#[tokio::test]
async fn what_two_engines_cannot_give_is_served_by_one() {
    let fleet = Fleet::of(1, 1, always(json!({}))).await;
    for (path, body, reason) in [
        (CHAT, chat(1, &json!({"n": 2})), "n"),
        (
            COMPLETIONS,
            completion(2, &json!({"echo": true})),
            "one_engine",
        ),
        (
            COMPLETIONS,
            completion(3, &json!({"prompt": [text(1), text(2)]})),
            "batch",
        ),
    ] {
        let told = fleet.both(Version::H1, path, &body).await;
        told.assert_same();
        assert_eq!(
            (&told.record["decision"], &told.record["reason"]),
            (&json!("whole"), &json!(reason))
        );
    }
    assert_eq!(fleet.pulled(), 0);
    let never = Fleet::of(1, 1, json!({"mode": "never", "decision_header": true})).await;
    let told = never.both(Version::H1, CHAT, &chat(1, &json!({}))).await;
    assert_eq!(told.record["reason"], "never");
    let decode = never.decode[0].http_addr.to_string();
    let line = never.proxy.only_log().await;
    assert!(
        line["upstream_host"].as_str().unwrap().ends_with(&decode),
        "{line}"
    );
    let alone = Fleet::of(0, 1, always(json!({}))).await;
    let told = alone.both(Version::H1, CHAT, &chat(1, &json!({}))).await;
    assert_eq!(told.record["reason"], "no_prefill");
    let alone = Fleet::of(1, 0, always(json!({}))).await;
    let told = alone.both(Version::H1, CHAT, &chat(1, &json!({}))).await;
    assert_eq!(told.record["reason"], "no_decode");
    told.assert_same();
}

#[tokio::test]
async fn a_place_at_the_decode_engine_is_held_while_the_prompt_is_computed() {
    let slow = Config {
        prefill_tokens_per_s: 800.0,
        ..config()
    };
    let fields = always(json!({}));
    let fleet = Fleet::start(vec![engine(slow)], vec![engine(config())], |builder| {
        builder.edit(disaggregation(fields))
    })
    .await;
    let decode = fleet.decode[0].http_addr.to_string();
    let held = || async {
        let all = hosts(fleet.proxy.admin(), FLEET).await;
        let host = all.iter().find(|host| host.to_string().contains(&decode))?;
        (active_requests(host) == 1).then_some(())
    };
    let begun = Instant::now();
    let body = chat(1, &json!({}));
    let ((), told) = tokio::join!(
        async {
            eventually("a place is held", held).await;
            assert_eq!(
                fleet.decode[0].load(),
                (0, 0, 0.0),
                "nothing was sent there yet"
            );
        },
        fleet.both(Version::H1, CHAT, &body),
    );
    assert!(begun.elapsed() > Duration::from_millis(200));
    told.assert_same();
    fleet.idle().await;
}

#[tokio::test]
async fn a_stream_whose_decode_engine_breaks_goes_on_elsewhere() {
    let fleet = Fleet::of(1, 2, always(json!({}))).await;
    for (at, kind) in [
        FaultKind::Reset,
        FaultKind::InBandError,
        FaultKind::Truncate,
    ]
    .into_iter()
    .enumerate()
    {
        for engine in &fleet.decode {
            engine.fault(Fault {
                after_tokens: 9,
                ..Fault::new(kind)
            });
        }
        let told = fleet
            .both(
                Version::H1,
                CHAT,
                &chat(at, &json!({"stream": true, "max_tokens": 60})),
            )
            .await;
        for engine in &fleet.decode {
            engine.disarm();
        }
        told.assert_same();
    }
    assert!(fleet.proxy.metric("outrigger_migrations_total", "").await >= 3.0);
    fleet.idle().await;
}
