//! Prefill and decode at two TensorRT-LLMs, context first. That engine is simulated from its source alone, so these cases
//! show what goes from leg to leg and what becomes of failures, and no more.

use super::disaggregation::{
    CHAT, COMPLETIONS, Fleet, always, chat, completion, disaggregation, engine, with,
};
use super::support::story;
use http::Method;
use outrigger_conformance::{
    harness::{Client, Version, eventually, request},
    sim::{Config, Fault, FaultKind, Nixl, Profile, SimEngine},
};
use serde_json::{Value, json};
use std::time::Duration;

fn config() -> Config {
    Config {
        profile: Profile::Trtllm,
        decode_itl_ms: 1.0,
        nixl: Some(Nixl::default()),
        ..Config::default()
    }
}

async fn fleet(prefill: Config, fields: Value) -> Fleet {
    let (prefill, decode) = (engine(prefill), engine(config()));
    Fleet::start(vec![prefill], vec![decode], |builder| {
        builder.edit(disaggregation(always(fields)))
    })
    .await
}

/// The client is told what one engine tells; gives the record.
async fn same(fleet: &Fleet, version: Version, path: &str, body: &Value) -> Value {
    let mut client = fleet.proxy.client(version).await;
    let mut ask = request(Method::POST, path, body.to_string());
    let on = http::HeaderValue::from_static("1");
    ask.headers_mut().insert("x-outrigger-debug", on);
    let reply = client.send(ask).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let record: Value = serde_json::from_str(reply.header("x-outrigger-disaggregation")).unwrap();
    let alone = engine(config());
    let mut client = Client::connect(alone.http_addr, Version::H1).await;
    let expected = client.post(path, body.to_string()).await.text();
    let got = reply.text();
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
        body
    };
    assert_eq!(facts(&got), facts(&expected), "{record}");
    record
}

#[tokio::test]
async fn the_client_reads_what_one_trtllm_would_have_told() {
    let fleet = fleet(config(), json!({})).await;
    let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
    let of_ids = with(usage.clone(), &json!({"prompt": vec![300; 200]}));
    let cases = [
        (CHAT, chat(1, &json!({}))),
        (CHAT, chat(2, &json!({"stream": true}))),
        (CHAT, chat(3, &usage)),
        (COMPLETIONS, completion(4, &json!({}))),
        (COMPLETIONS, completion(5, &usage)),
        (COMPLETIONS, completion(6, &of_ids)),
    ];
    let count = cases.len();
    for (at, (path, body)) in cases.into_iter().enumerate() {
        let record = same(&fleet, Version::BOTH[at % 2], path, &body).await;
        assert_eq!(record["decision"], "split", "{record}");
        assert_eq!(record["fallback"], Value::Null, "{record}");
    }
    assert_eq!(fleet.prefill[0].transfers(), (0, count, 0));
    fleet.idle().await;
}

#[tokio::test]
async fn an_answer_of_one_token_is_given_by_one_engine() {
    let fleet = fleet(config(), json!({})).await;
    // Whatever the first token is, it ends there.
    let all: Vec<u32> = (0..2000).collect();
    let body = chat(1, &json!({"stop_token_ids": all}));
    let record = same(&fleet, Version::H1, CHAT, &body).await;
    assert_eq!(record["fallback"], json!(["prefill", "no_params"]));
}

#[tokio::test]
async fn a_leg_that_fails_costs_time_and_nothing_else() {
    let fleet = fleet(config(), json!({})).await;
    let stream = json!({"stream": true});
    let cases = [
        (FaultKind::Http500, json!({})),
        (FaultKind::Truncate, stream.clone()),
        (FaultKind::Reset, stream),
    ];
    for (seed, (kind, more)) in cases.into_iter().enumerate() {
        for (leg, engine) in [("prefill", &fleet.prefill[0]), ("decode", &fleet.decode[0])] {
            let count = if leg == "prefill" { 2 } else { 1 };
            engine.fault(Fault {
                count,
                ..Fault::new(kind)
            });
            let record = same(&fleet, Version::H1, CHAT, &chat(seed, &more)).await;
            assert_eq!(record["fallback"][0], leg, "{kind:?}: {record}");
            engine.disarm();
            // Whoever failed is passed over for a second.
            tokio::time::sleep(Duration::from_millis(1050)).await;
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_during_prefill_stops_it_there_too() {
    let slow = Config {
        prefill_tokens_per_s: 200.0,
        ..config()
    };
    let fleet = fleet(slow, json!({})).await;
    let mut client = fleet.proxy.client(Version::H1).await;
    let body = chat(1, &json!({"stream": true})).to_string();
    let task =
        tokio::spawn(async move { client.try_send(request(Method::POST, CHAT, body)).await });
    let runs = || async { (fleet.prefill[0].load().1 == 1).then_some(()) };
    eventually("prefill runs", runs).await;
    task.abort();
    let over = |engine: &SimEngine| engine.requests() == 0 && engine.load() == (0, 0, 0.0);
    let quiet = || async { over(&fleet.prefill[0]).then_some(()) };
    eventually("prefill stops", quiet).await;
    assert_eq!(fleet.prefill[0].transfers(), (0, 0, 0), "nothing was kept");
}
