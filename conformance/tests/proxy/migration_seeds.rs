//! Seeds that the proxy gives: who gets one, what was drawn by one is drawn again and told once, and engines that take none
//! cost their clients nothing.

use super::{
    migration::migration,
    support::{Story, arm, disarm, story},
};
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, TestProxy, Version},
    sim::{Config, FaultKind, Seeds, SimEngine},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const REFUSED: &str = "outrigger_migration_seeds_refused_total";

fn engines(count: u64, edit: impl Fn(&mut Config)) -> Vec<SimEngine> {
    let start = |number: u64| {
        let mut config = Config {
            decode_itl_ms: 1.0,
            // Nothing that two of them draw without a seed is the same.
            seed: (number + 1) << 32,
            ..Config::default()
        };
        edit(&mut config);
        SimEngine::start(config).unwrap()
    };
    (0..count).map(start).collect()
}

async fn proxy(engines: &[SimEngine], fields: Value) -> TestProxy {
    let builder = ProxyBuilder::new().edit(migration(fields));
    let add = |builder: ProxyBuilder, engine: &SimEngine| builder.engine(engine.http_addr);
    let proxy = engines.iter().fold(builder, add).start();
    proxy.wait_alive(engines.len()).await;
    proxy
}

fn body(more: &Value) -> String {
    let mut body = json!({"model": "sim", "stream": true, "temperature": 1, "max_tokens": 90,
        "stream_options": {"include_usage": true}, "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string()
}

async fn ask(mut client: Client, more: &Value) -> Story {
    let reply = client.post(CHAT, body(more)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    story(&reply.text())
}

/// What an engine draws by the seed that the last stream was given.
async fn drawn_again(engines: &[SimEngine], more: &Value) -> Story {
    let mut more = more.clone();
    let seed = engines.iter().find_map(SimEngine::last_seed);
    more["seed"] = seed.unwrap().into();
    ask(
        Client::connect(engines[0].http_addr, Version::H1).await,
        &more,
    )
    .await
}

fn break_after(engines: &[SimEngine], after_tokens: u64) {
    arm(engines, FaultKind::Reset, after_tokens);
}

fn object() -> Value {
    json!({"type": "object", "required": ["a", "b"],
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}}})
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "f", "parameters": object()}}])
}

fn call() -> Value {
    json!({"tools": tools(), "tool_choice": "required"})
}

#[tokio::test]
async fn what_was_drawn_by_our_seed_is_drawn_again_and_told_once() {
    let engines = engines(2, |_| {});
    let proxy = proxy(&engines, json!({})).await;
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": object()}});
    for more in [
        call(),
        json!({"tools": tools(), "tool_choice": "required", "logprobs": true}),
        json!({"response_format": format}),
        json!({"response_format": format, "return_token_ids": true, "seed": null}),
        json!({"presence_penalty": 0.5, "ignore_eos": true}),
    ] {
        for cut in [1, 9, 20] {
            break_after(&engines, cut);
            let got = ask(proxy.client(Version::H1).await, &more).await;
            disarm(&engines);
            assert_eq!(got.problem(), None, "{cut}: {more}");
            assert_eq!(got, drawn_again(&engines, &more).await, "{cut}: {more}");
        }
    }
    let again = proxy
        .metric("outrigger_migrations_total", "outcome=\"restart\"")
        .await;
    assert!(again >= 15.0, "{again}");
}

#[tokio::test]
async fn what_can_go_on_as_another_draw_does() {
    let engines = engines(2, |_| {});
    let proxy = proxy(&engines, json!({})).await;
    for more in [
        json!({"tools": tools()}),
        json!({"logprobs": true}),
        json!({"return_token_ids": true}),
        json!({"stop": "never to be seen"}),
    ] {
        for cut in 1..24 {
            // Whoever goes on draws without a seed, and is not to break.
            let one = cut as usize % 2;
            break_after(&engines[one..=one], cut);
            let mut flat = more.clone();
            flat["ignore_eos"] = true.into();
            flat["max_tokens"] = 40.into();
            let got = ask(proxy.client(Version::H1).await, &flat).await;
            disarm(&engines);
            assert_eq!(got.problem(), None, "{cut}: {flat}");
            assert_eq!(got.usage["completion_tokens"], 40, "{cut}: {flat}");
        }
    }
    let mut cheaply = 0.0;
    for outcome in ["outcome=\"completions\"", "outcome=\"entrance\""] {
        cheaply += proxy.metric("outrigger_migrations_total", outcome).await;
    }
    assert!(cheaply >= 5.0, "{cheaply}");
}

#[tokio::test]
async fn engines_that_ignore_seeds_are_found_out() {
    let engines = engines(2, |config| config.seeds = Seeds::Ignored);
    let proxy = proxy(&engines, json!({})).await;
    // Behind what all calls begin with.
    break_after(&engines, 45);
    let got = ask(proxy.client(Version::H1).await, &call()).await;
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(told.contains("another text"), "{told}");
}

#[tokio::test]
async fn engines_that_refuse_seeds_cost_their_clients_nothing() {
    for seeds in [Seeds::Refused, Seeds::RefusedInStream] {
        let engines = engines(1, |config| config.seeds = seeds);
        let proxy = proxy(&engines, json!({})).await;
        for _ in 0..2 {
            let got = ask(proxy.client(Version::H1).await, &call()).await;
            assert_eq!(got.problem(), None, "{seeds:?}");
            assert!(!got.calls.is_empty());
            assert_eq!(engines[0].last_seed(), None);
            assert_eq!(engines[0].seeds_refused(), 1, "{seeds:?}: remembered");
        }
        // A seed of the client's own is its own affair.
        let mut client = proxy.client(Version::H1).await;
        let own = json!({"seed": 4, "tools": tools(), "tool_choice": "required"});
        let refused = client.post(CHAT, body(&own)).await;
        assert!(
            refused.text().contains("per-request seed"),
            "{}",
            refused.text()
        );
        assert_eq!(engines[0].seeds_refused(), 2);
        assert!(proxy.metric(REFUSED, "").await >= 1.0);
    }
}

#[tokio::test]
async fn a_stream_that_moves_to_engines_that_refuse_seeds_ends_with_a_reason() {
    let mut engines = engines(1, |_| {});
    engines.extend(self::engines(1, |config| config.seeds = Seeds::Refused));
    let proxy = proxy(&engines, json!({"attempts_max": 2})).await;
    let mut ended = 0;
    for _ in 0..6 {
        break_after(&engines[..1], 20);
        let got = ask(proxy.client(Version::H1).await, &call()).await;
        disarm(&engines);
        // Who began without a seed, since that was refused, was not cut.
        ended += usize::from(got.error.is_some());
        if let Some(error) = &got.error {
            let told = error["message"].as_str().unwrap();
            assert!(told.contains("could not go on elsewhere"), "{told}");
        }
    }
    assert!((1..6).contains(&ended), "{ended}");
    assert!(proxy.metric(REFUSED, "").await >= 1.0);
}

#[tokio::test]
async fn a_refusal_for_another_reason_passes_as_it_came() {
    let engines = engines(1, |_| {});
    let proxy = proxy(&engines, json!({})).await;
    let wrong = json!({"temperature": -1, "tools": tools()});
    let mut own = Client::connect(engines[0].http_addr, Version::H1).await;
    let expected = own.post(CHAT, body(&wrong)).await;
    let got = proxy
        .client(Version::H1)
        .await
        .post(CHAT, body(&wrong))
        .await;
    assert_eq!((got.status, got.text()), (expected.status, expected.text()));
    assert_eq!(got.status, 400);
}

#[tokio::test]
async fn who_needs_no_seed_gets_none() {
    let plain = json!({});
    let greedy = json!({"temperature": 0, "tools": tools()});
    let own = json!({"seed": 7, "tools": tools()});
    let two = json!({"n": 2, "tools": tools()});
    for (policy, more, given) in [
        ("WHERE_NEEDED", &plain, Some(false)),
        ("WHERE_NEEDED", &greedy, Some(false)),
        ("WHERE_NEEDED", &two, Some(false)),
        ("WHERE_NEEDED", &call(), Some(true)),
        ("WHERE_NEEDED", &own, None),
        ("NEVER", &call(), Some(false)),
        ("ALWAYS", &plain, Some(true)),
        ("ALWAYS", &greedy, Some(false)),
    ] {
        let engines = engines(1, |_| {});
        let proxy = proxy(&engines, json!({"seeds": policy})).await;
        drop(ask(proxy.client(Version::H1).await, more).await);
        let seed = engines[0].last_seed();
        match given {
            Some(given) => assert_eq!(seed.is_some(), given, "{policy}: {more}"),
            None => assert_eq!(seed, Some(7)),
        }
    }
}

#[tokio::test]
async fn where_engines_take_no_tokens_a_drawn_stream_is_compared() {
    let engines = engines(2, |config| config.chat_token_prompts = false);
    let proxy = proxy(&engines, json!({})).await;
    let more = json!({"tools": tools(), "ignore_eos": true});
    break_after(&engines, 12);
    let got = ask(proxy.client(Version::H1).await, &more).await;
    disarm(&engines);
    assert_eq!(got.problem(), None);
    assert_eq!(got, drawn_again(&engines, &more).await);
}

#[tokio::test]
async fn a_drawn_stream_goes_on_at_the_end_of_its_reasoning() {
    let engines = engines(2, |config| config.reasoning_tokens = 30);
    let proxy = proxy(&engines, json!({})).await;
    for cut in 26..34 {
        for more in [
            json!({"tools": tools(), "ignore_eos": true}),
            json!({"tools": tools(), "ignore_eos": true, "logprobs": true}),
        ] {
            // Whoever goes on may draw without a seed, and is not to break; one of the two begins.
            for one in [&engines[..1], &engines[1..]] {
                break_after(one, cut);
                let got = ask(proxy.client(Version::H1).await, &more).await;
                disarm(&engines);
                assert_eq!(got.problem(), None, "{cut}: {more}");
                assert!(!got.reasoning.is_empty());
            }
        }
    }
    let mut moves = 0.0;
    for outcome in ["outcome=\"restart\"", "outcome=\"entrance\""] {
        moves += proxy.metric("outrigger_migrations_total", outcome).await;
    }
    assert!(moves >= 8.0, "{moves}");
}
