//! Prefill and decode at two halves of an SGLang, which get the request at once: the client reads what one engine would
//! have told, and no leg outlives the other.

use super::disaggregation::{CHAT, COMPLETIONS, always, chat, completion, disaggregation, with};
use super::support::story;
use http::Method;
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, TestProxy, Version, eventually, request},
    sim::{Bootstrap, Config, Fault, FaultKind, Profile, Side, SimEngine},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The other leg has to be over after this. A little more than promised: the machine may be busy.
const OVER: Duration = Duration::from_millis(300);

pub(crate) fn config() -> Config {
    Config {
        profile: Profile::Sglang,
        decode_itl_ms: 1.0,
        prompt_tokens_details: true,
        ..Config::default()
    }
}

pub(crate) fn half(side: Side) -> Config {
    Config {
        bootstrap: Some(Bootstrap::new(side)),
        ..config()
    }
}

/// A prompt takes it seconds.
fn slow() -> Config {
    Config {
        prefill_tokens_per_s: 200.0,
        ..half(Side::Prefill)
    }
}

pub(crate) fn start(config: Config) -> SimEngine {
    SimEngine::start(config).unwrap()
}

/// Engines beside one proxy; what each is for they say themselves.
pub(crate) struct Fleet {
    pub(crate) prefill: Vec<SimEngine>,
    pub(crate) decode: Vec<SimEngine>,
    pub(crate) whole: Vec<SimEngine>,
    pub(crate) proxy: TestProxy,
}

impl Fleet {
    async fn of(prefill: usize, decode: usize, whole: usize) -> Self {
        let prefill = vec![half(Side::Prefill); prefill];
        let decode = vec![half(Side::Decode); decode];
        Self::start(prefill, decode, vec![config(); whole], always(json!({}))).await
    }

    pub(crate) async fn start(
        prefill: Vec<Config>,
        decode: Vec<Config>,
        whole: Vec<Config>,
        fields: Value,
    ) -> Self {
        let build = |builder: ProxyBuilder| builder.edit(disaggregation(fields));
        Self::build(prefill, decode, whole, build).await
    }

    pub(crate) async fn build(
        prefill: Vec<Config>,
        decode: Vec<Config>,
        whole: Vec<Config>,
        build: impl FnOnce(ProxyBuilder) -> ProxyBuilder,
    ) -> Self {
        let make = |configs: Vec<Config>| configs.into_iter().map(start).collect::<Vec<_>>();
        let (prefill, decode, whole) = (make(prefill), make(decode), make(whole));
        let mut builder = ProxyBuilder::new().flag("--policy", "kv");
        for engine in prefill.iter().chain(&decode).chain(&whole) {
            builder = builder.flag("--engine", &engine.url());
        }
        let proxy = build(builder).start();
        proxy
            .wait_alive(prefill.len() + decode.len() + whole.len())
            .await;
        Self {
            prefill,
            decode,
            whole,
            proxy,
        }
    }

    fn of_side(&self, side: Side) -> &[SimEngine] {
        match side {
            Side::Prefill => &self.prefill,
            Side::Decode => &self.decode,
        }
    }

    /// Nothing runs or waits anywhere.
    pub(crate) async fn idle(&self) {
        let look = || async {
            let mut all = self.prefill.iter().chain(&self.decode).chain(&self.whole);
            all.all(|engine| engine.is_dead() || is_over(engine))
                .then_some(())
        };
        eventually("all engines are idle", look).await;
    }

    /// Pairs that met.
    pub(crate) fn met(&self) -> usize {
        self.prefill.iter().map(|engine| engine.rooms().1).sum()
    }

    /// What a client is told, and the record of it.
    pub(crate) async fn ask(
        &self,
        version: Version,
        path: &str,
        body: &Value,
    ) -> (u16, String, Value) {
        let mut client = self.proxy.client(version).await;
        let mut ask = request(Method::POST, path, body.to_string());
        let on = http::HeaderValue::from_static("1");
        ask.headers_mut().insert("x-outrigger-debug", on);
        let reply = client.send(ask).await;
        let record = reply.header("x-outrigger-disaggregation").to_owned();
        let record = serde_json::from_str(&record).unwrap_or_default();
        (reply.status.as_u16(), reply.text(), record)
    }

    /// It is what one engine tells; gives the record.
    pub(crate) async fn same(&self, version: Version, path: &str, body: &Value) -> Value {
        let (status, got, record) = self.ask(version, path, body).await;
        assert_eq!(status, 200, "{got}");
        let alone = start(config());
        let mut client = Client::connect(alone.http_addr, Version::H1).await;
        let expected = client.post(path, body.to_string()).await.text();
        if got.starts_with("data: ") {
            let (got, expected) = (story(&got), story(&expected));
            assert_eq!(got.problem(), None);
            assert_eq!(got, expected, "{record}");
            return record;
        }
        let facts = |text: &str| {
            let mut body: Value = serde_json::from_str(text).unwrap();
            for name in ["id", "created"] {
                body[name].take();
            }
            body["usage"]["prompt_tokens_details"].take();
            body
        };
        assert_eq!(facts(&got), facts(&expected), "{record}");
        record
    }

    async fn clear_faults(&self) {
        for engine in self.prefill.iter().chain(&self.decode) {
            engine.disarm();
        }
        // Whoever failed is passed over for a second.
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
}

/// Nobody asks it for anything, and nothing of what was asked goes on.
fn is_over(engine: &SimEngine) -> bool {
    engine.requests() == 0 && engine.load() == (0, 0, 0.0) && engine.rooms().0 == 0
}

#[tokio::test]
async fn the_client_reads_what_one_sglang_would_have_told() {
    let fleet = Fleet::of(1, 1, 0).await;
    let stream = json!({"stream": true});
    let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
    let ids = with(usage.clone(), &json!({"return_token_ids": true}));
    let of_ids = with(stream.clone(), &json!({"prompt": vec![300; 200]}));
    let least = with(stream.clone(), &json!({"min_tokens": 20}));
    let stop = json!({"stop": ["robot"], "ignore_eos": false});
    let cases = [
        (CHAT, chat(1, &json!({}))),
        (CHAT, chat(2, &stream)),
        (CHAT, chat(3, &usage)),
        (CHAT, chat(4, &json!({"max_completion_tokens": 9}))),
        (CHAT, chat(5, &stop)),
        (CHAT, chat(6, &least)),
        (COMPLETIONS, completion(7, &json!({}))),
        (COMPLETIONS, completion(8, &stream)),
        (COMPLETIONS, completion(9, &ids)),
        (COMPLETIONS, completion(10, &of_ids)),
    ];
    let count = cases.len();
    for (at, (path, body)) in cases.into_iter().enumerate() {
        let record = fleet.same(Version::BOTH[at % 2], path, &body).await;
        assert_eq!(record["decision"], "split", "{record}");
        assert_eq!(record["fallback"], Value::Null, "{record}");
        let prefill = record["prefill"].as_str().unwrap();
        assert!(prefill.ends_with(&fleet.prefill[0].http_addr.to_string()));
    }
    assert_eq!(fleet.met(), count, "each pair met once");
    fleet.idle().await;
}

#[tokio::test]
async fn many_pairs_at_once_do_not_mix() {
    let fleet = Fleet::of(2, 2, 0).await;
    let bodies: Vec<Value> = (0..24)
        .map(|seed| chat(seed, &json!({"stream": true})))
        .collect();
    let all = bodies
        .iter()
        .map(|body| fleet.same(Version::H2, CHAT, body));
    futures_util::future::join_all(all).await;
    assert_eq!(fleet.met(), 24);
    fleet.idle().await;
}

/// Half of an SGLang cannot serve a request whole: without an engine for that everything is split, whatever is wanted.
#[tokio::test]
async fn what_is_not_worth_it_is_split_only_where_nobody_can_serve_it_whole() {
    let short = json!({"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4});
    let body = chat(1, &short);
    for (whole, decision, reason) in [(0, "split", "no_whole"), (1, "whole", "short")] {
        let fleet = Fleet::start(
            vec![half(Side::Prefill)],
            vec![half(Side::Decode)],
            vec![config(); whole],
            json!({"decision_header": true}),
        )
        .await;
        let record = fleet.same(Version::H1, CHAT, &body).await;
        assert_eq!(record["decision"], decision, "{record}");
        assert_eq!(record["reason"], reason, "{record}");
        assert_eq!(fleet.met(), 1 - whole);
    }
}

#[tokio::test]
async fn what_the_engines_refuse_is_the_clients_answer() {
    let fleet = Fleet::of(1, 1, 0).await;
    for stream in [false, true] {
        let more = json!({"temperature": -1, "stream": stream});
        let (status, text, record) = fleet.ask(Version::H1, CHAT, &chat(1, &more)).await;
        assert_eq!(status, 400, "{text}");
        let told: Value = serde_json::from_str(&text).unwrap();
        let message = "temperature must be a non-negative finite number, got -1.0.";
        assert_eq!(told["message"], message);
        assert_eq!(record["fallback"][1], "refused", "{record}");
    }
    fleet.idle().await;
}

#[tokio::test]
async fn a_half_that_fails_ends_the_other_and_the_request_is_served_whole() {
    let fleet = Fleet::of(1, 1, 1).await;
    let stream = json!({"stream": true});
    let cases = [
        (FaultKind::Http500, json!({})),
        (FaultKind::Http500, stream.clone()),
        (FaultKind::Reset, json!({})),
        (FaultKind::Truncate, stream.clone()),
        (FaultKind::Garbage, json!({})),
        (FaultKind::InBandError, stream),
        (FaultKind::InBandError, json!({})),
    ];
    for (seed, (kind, more)) in cases.into_iter().enumerate() {
        for (side, leg) in [(Side::Prefill, "prefill"), (Side::Decode, "decode")] {
            fleet.of_side(side)[0].fault(Fault {
                count: 2,
                ..Fault::new(kind)
            });
            let record = fleet.same(Version::H1, CHAT, &chat(seed, &more)).await;
            assert_eq!(record["fallback"][0], leg, "{kind:?}: {record}");
            fleet.idle().await;
            fleet.clear_faults().await;
        }
    }
}

#[tokio::test]
async fn without_an_engine_for_all_of_it_another_pair_serves_it() {
    for side in [Side::Prefill, Side::Decode] {
        let fleet = Fleet::of(2, 2, 0).await;
        // More than it will be asked: it refuses all, the other one none.
        fleet.of_side(side)[0].fault(Fault {
            count: 100,
            ..Fault::new(FaultKind::Http500)
        });
        let mut failed = Value::Null;
        for seed in 0..20 {
            let body = chat(seed, &json!({"stream": true}));
            let record = fleet.same(Version::H1, CHAT, &body).await;
            failed = record["fallback"].clone();
            if !failed.is_null() {
                break;
            }
        }
        assert_eq!(failed[1], "refused", "{side:?}");
        fleet.idle().await;
    }
}

#[tokio::test]
async fn three_other_pairs_are_tried_and_no_more() {
    let fleet = Fleet::of(1, 1, 0).await;
    for (refusals, status) in [(3, 200), (4, 500)] {
        fleet.decode[0].fault(Fault {
            count: refusals,
            ..Fault::new(FaultKind::Http500)
        });
        let body = chat(1, &json!({"stream": true}));
        let (got, text, record) = fleet.ask(Version::H1, CHAT, &body).await;
        assert_eq!(got, status, "{text}");
        assert_eq!(record["fallback"], json!(["decode", "refused"]));
        fleet.idle().await;
    }
}

#[tokio::test]
async fn a_half_that_dies_while_the_other_waits_for_it_is_done_without() {
    for (side, other) in [(Side::Prefill, Side::Decode), (Side::Decode, Side::Prefill)] {
        let decode = vec![half(Side::Decode)];
        let fields = always(json!({}));
        let fleet = Fleet::start(vec![slow()], decode, vec![config()], fields).await;
        let kill = async {
            let look = || async { (fleet.prefill[0].load().1 == 1).then_some(()) };
            eventually("prefill runs", look).await;
            fleet.of_side(side)[0].fault(Fault::new(FaultKind::Die));
            let killed = Instant::now();
            // Nothing tells the other half: it would wait for minutes.
            let quiet = || async { is_over(&fleet.of_side(other)[0]).then_some(()) };
            eventually("the other leg is over", quiet).await;
            killed.elapsed()
        };
        let body = chat(1, &json!({"stream": true}));
        let (record, took) = tokio::join!(fleet.same(Version::H1, CHAT, &body), kill);
        println!("{side:?} died: the other leg was over after {took:?}");
        assert!(took < OVER, "{took:?}");
        assert_eq!(record["fallback"][1], "failed", "{record}");
        fleet.idle().await;
    }
}

/// Nobody fails, and nobody comes: what decode waits for is on its way for ever.
#[tokio::test]
async fn halves_that_do_not_come_together_in_time_are_given_up() {
    let decode = Config {
        bootstrap: Some(Bootstrap {
            transfer: Duration::from_secs(600),
            ..Bootstrap::new(Side::Decode)
        }),
        ..half(Side::Decode)
    };
    let fields = always(json!({"prefill_timeout_ms": 300}));
    let prefill = vec![half(Side::Prefill)];
    let fleet = Fleet::start(prefill, vec![decode], vec![config()], fields).await;
    for (seed, more) in [json!({}), json!({"stream": true})].iter().enumerate() {
        let begun = Instant::now();
        let record = fleet.same(Version::H1, CHAT, &chat(seed, more)).await;
        assert_eq!(record["fallback"], json!(["prefill", "timeout"]));
        assert!(begun.elapsed() >= Duration::from_millis(300));
        fleet.idle().await;
    }
    assert_eq!(fleet.met(), 0);
}

#[tokio::test]
async fn a_client_that_leaves_ends_both_legs() {
    let decode = vec![half(Side::Decode)];
    let fleet = Fleet::start(vec![slow()], decode, Vec::new(), always(json!({}))).await;
    for version in Version::BOTH {
        let mut client = fleet.proxy.client(version).await;
        let body = chat(1, &json!({"stream": true})).to_string();
        let task =
            tokio::spawn(async move { client.try_send(request(Method::POST, CHAT, body)).await });
        let runs = || async { (fleet.prefill[0].load().1 == 1).then_some(()) };
        eventually("prefill runs", runs).await;
        assert_eq!(fleet.decode[0].requests(), 1, "decode waits meanwhile");
        task.abort();
        let left = Instant::now();
        fleet.idle().await;
        let took = left.elapsed();
        println!("{version:?}: both legs were over after {took:?}");
        assert!(took < OVER, "{took:?}");
    }
    let fleet = Fleet::of(1, 1, 0).await;
    let body = chat(2, &json!({"stream": true, "max_tokens": 5000})).to_string();
    let mut client = fleet.proxy.client(Version::H2).await;
    let mut stream = client.begin(request(Method::POST, CHAT, body)).await;
    stream.until("\"content\":\"").await;
    drop(stream);
    client.abandon();
    fleet.idle().await;
}

#[tokio::test]
async fn a_stream_of_tokens_goes_on_at_another_pair() {
    let fleet = Fleet::of(1, 2, 0).await;
    let kinds = [FaultKind::Reset, FaultKind::InBandError];
    for (seed, kind) in kinds.into_iter().enumerate() {
        for engine in &fleet.decode {
            engine.fault(Fault {
                after_tokens: 9,
                ..Fault::new(kind)
            });
        }
        let more = json!({"stream": true, "max_tokens": 60});
        let body = completion(seed, &more);
        fleet.same(Version::H1, COMPLETIONS, &body).await;
        fleet.clear_faults().await;
    }
    assert!(fleet.proxy.metric("outrigger_migrations_total", "").await >= 2.0);
    fleet.idle().await;
}
