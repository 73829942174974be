//! Streams whose engine had a state that nobody can give to another: they are generated from the beginning, compared token
//! by token with what the client has had, and told from there on.

use super::{
    migration::migration,
    support::{Story, arm, disarm, story},
};
use outrigger_conformance::{
    harness::{ProxyBuilder, TestProxy, Version},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn engines(reasoning_tokens: usize, takes_tokens: bool) -> Vec<SimEngine> {
    let start = |_| {
        let config = Config {
            decode_itl_ms: 1.0,
            reasoning_tokens,
            chat_token_prompts: takes_tokens,
            ..Config::default()
        };
        SimEngine::start(config).unwrap()
    };
    (0..2).map(start).collect()
}

async fn proxy(engines: &[SimEngine], fields: Value) -> TestProxy {
    let builder = ProxyBuilder::new().edit(migration(fields));
    let add = |builder: ProxyBuilder, engine: &SimEngine| builder.engine(engine.http_addr);
    let proxy = engines.iter().fold(builder, add).start();
    proxy.wait_alive(engines.len()).await;
    proxy
}

async fn ask(proxy: &TestProxy, more: &Value) -> Story {
    let mut body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": 90,
        "stream_options": {"include_usage": true}, "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    story(&reply.text())
}

fn object() -> Value {
    json!({"type": "object", "required": ["a", "b"],
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}}})
}

#[tokio::test]
async fn calls_json_seeds_and_penalties_are_told_once_and_whole() {
    let engines = engines(0, true);
    let proxy = proxy(&engines, json!({})).await;
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": object()}}]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": object()}});
    for more in [
        json!({"tools": tools, "tool_choice": "required"}),
        json!({"tools": tools, "tool_choice": "required", "temperature": 1, "seed": 4, "logprobs": true}),
        json!({"response_format": format}),
        json!({"response_format": format, "return_token_ids": true}),
        json!({"temperature": 1, "seed": 3}),
        json!({"temperature": 1, "seed": 3, "stop": "never to be seen"}),
        json!({"presence_penalty": 0.5}),
    ] {
        let whole = ask(&proxy, &more).await;
        assert_eq!(whole.problem(), None, "{more}");
        for (cut, kind) in [
            (3, FaultKind::Reset),
            (17, FaultKind::Truncate),
            (29, FaultKind::InBandError),
        ] {
            // Whoever begins hands it to the other, and gets it back.
            arm(&engines, kind, cut);
            let got = ask(&proxy, &more).await;
            disarm(&engines);
            assert_eq!(
                (got.problem(), &got),
                (None, &whole),
                "{kind:?} after {cut}: {more}"
            );
        }
    }
}

#[tokio::test]
async fn a_second_engine_may_break_before_it_has_repeated_all() {
    let engines = engines(0, true);
    let proxy = proxy(&engines, json!({})).await;
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": object()}}]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": object()}});
    let mut moves = 0;
    for more in [
        json!({"tools": tools, "tool_choice": "required", "logprobs": true}),
        json!({"response_format": format, "return_token_ids": true}),
        json!({"temperature": 1, "seed": 3}),
        json!({"presence_penalty": 0.5}),
    ] {
        let whole = ask(&proxy, &more).await;
        assert_eq!(whole.problem(), None, "{more}");
        moves += 1;
        // Whoever begins: in one of two orders the other one breaks sooner.
        for (one, other) in [(27, 6), (6, 27), (27, 1), (1, 27), (27, 0), (0, 27)] {
            arm(&engines[..1], FaultKind::Reset, one);
            arm(&engines[1..], FaultKind::Reset, other);
            let got = ask(&proxy, &more).await;
            disarm(&engines);
            let cuts = format!("{one}, {other}: {more}");
            assert_eq!((got.problem(), &got), (None, &whole), "{cuts}");
            moves += 1;
        }
    }
    let twice = proxy.log(moves).await;
    let twice = twice.iter().filter(|line| line["migrations"] == 2).count();
    assert!(twice >= 8, "{twice}");
}

#[tokio::test]
async fn an_engine_that_generates_another_text_is_found_out() {
    let engines = engines(0, true);
    let proxy = proxy(&engines, json!({})).await;
    let more = json!({"presence_penalty": 0.5});
    arm(&engines, FaultKind::Reset, 20);
    // Whoever begins, the other one answers as another model.
    engines[1].fault(Fault::new(FaultKind::WrongAnswer));
    let first = ask(&proxy, &more).await;
    let error = first
        .error
        .map(|error| error["message"].as_str().unwrap().to_owned());
    let told = error.unwrap();
    assert!(told.contains("another text"), "{told}");
}

#[tokio::test]
async fn a_stream_goes_on_within_its_reasoning_and_behind_it() {
    let engines = engines(40, true);
    let proxy = proxy(&engines, json!({})).await;
    for more in [
        json!({"temperature": 0}),
        json!({"temperature": 0, "tools": [{"type": "function", "function": {"name": "f"}}]}),
        json!({"temperature": 1, "seed": 5, "return_token_ids": true}),
    ] {
        let whole = ask(&proxy, &more).await;
        assert_eq!(whole.problem(), None);
        assert!(
            !whole.reasoning.is_empty() && !whole.text.is_empty(),
            "{whole:?}"
        );
        for cut in [3, 25, 38, 39, 40, 41, 42, 60] {
            arm(&engines, FaultKind::Reset, cut);
            let got = ask(&proxy, &more).await;
            disarm(&engines);
            assert_eq!((got.problem(), &got), (None, &whole), "{cut}: {more}");
        }
    }
    // Drawn by chance it is another text, told as the same: reasoning, and then content.
    for cut in [3, 25, 60] {
        arm(&engines, FaultKind::Reset, cut);
        let got = ask(&proxy, &json!({"temperature": 1, "ignore_eos": true})).await;
        disarm(&engines);
        assert_eq!(got.problem(), None, "{cut}");
        let usage = got.usage["completion_tokens"].as_u64();
        assert_eq!((usage, got.finish.as_str()), (Some(90), "length"));
        assert!(!got.reasoning.is_empty() && !got.text.is_empty(), "{got:?}");
    }
    let entrance = proxy
        .metric("outrigger_migrations_total", "outcome=\"entrance\"")
        .await;
    assert!(entrance >= 2.0, "{entrance}");
}

#[tokio::test]
async fn an_engine_whose_parser_does_not_know_that_it_reasons_is_found_out() {
    let engines = engines(40, false);
    let proxy = proxy(&engines, json!({})).await;
    arm(&engines, FaultKind::Reset, 20);
    let got = ask(&proxy, &json!({"temperature": 1})).await;
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(told.ends_with("elsewhere: entrance"), "{told}");
    assert!(got.text.is_empty(), "{}", got.text);
}
