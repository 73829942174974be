//! TensorRT-LLM's KV events as the reference has them: a bounded queue that reading empties.

use http::Method;
use outrigger_conformance::{
    harness::{Client, Version, request},
    sim::{Config, Profile, SimEngine},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn engine(event_buffer_max_size: usize, event_quiet_ms: u64) -> SimEngine {
    let config = Config {
        profile: Profile::Trtllm,
        decode_itl_ms: 1.0,
        event_buffer_max_size,
        event_quiet_ms,
        ..Config::default()
    };
    SimEngine::start(config).expect("an engine")
}

async fn post(engine: &SimEngine, path: &str, body: String) -> Value {
    let mut client = Client::connect(engine.http_addr, Version::H1).await;
    let reply = client.send(request(Method::POST, path, body)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

async fn compute(engine: &SimEngine, token: u32) {
    let body = json!({"model": "sim", "prompt": vec![token; 70], "max_tokens": 1});
    post(engine, "/v1/completions", body.to_string()).await;
}

async fn drain(engine: &SimEngine) -> Vec<Value> {
    let told = post(engine, "/kv_cache_events", String::new()).await;
    told.as_array().expect("a list").clone()
}

fn ids(events: &[Value]) -> Vec<u64> {
    let id = |event: &Value| event["event_id"].as_u64().expect("a number");
    events.iter().map(id).collect()
}

#[tokio::test]
async fn events_are_told_once() {
    let engine = engine(16, 2000);
    compute(&engine, 300).await;
    let events = drain(&engine).await;
    assert_eq!(ids(&events), [0, 1]);
    assert_eq!(events[0]["data"]["type"], "created");
    let stored = &events[1]["data"];
    assert_eq!(
        (&stored["type"], &stored["parent_hash"]),
        (&json!("stored"), &Value::Null)
    );
    let blocks = stored["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 2, "the third is not full");
    let tokens = blocks[1]["tokens"].as_array().unwrap();
    let token = json!({"type": "unique_token", "token_id": 300, "token_extra_id": 0});
    assert_eq!((tokens.len(), &tokens[31]), (32, &token));
    let asked = Instant::now();
    assert!(drain(&engine).await.is_empty(), "read is gone");
    assert!(
        asked.elapsed() >= Duration::from_secs(1),
        "it waits for one"
    );
}

#[tokio::test]
async fn what_does_not_fit_is_gone_and_so_is_its_number() {
    let engine = engine(2, 0);
    for token in 300..304 {
        compute(&engine, token).await;
    }
    assert_eq!(ids(&drain(&engine).await), [3, 4]);
}

#[tokio::test]
async fn an_engine_that_keeps_none_says_so_at_once() {
    let engine = engine(0, 2000);
    compute(&engine, 300).await;
    let asked = Instant::now();
    assert!(drain(&engine).await.is_empty());
    assert!(asked.elapsed() < Duration::from_millis(1500));
}

#[tokio::test]
async fn an_answer_comes_when_nothing_happened_for_a_while() {
    let engine = engine(64, 2000);
    let load = async {
        for token in 300..310 {
            compute(&engine, token).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        Instant::now()
    };
    let answer = async { (drain(&engine).await, Instant::now()) };
    let (last, (events, answered)) = tokio::join!(load, answer);
    assert_eq!(ids(&events), (0..=10).collect::<Vec<_>>());
    assert!(
        answered >= last + Duration::from_secs(1),
        "it waits for more"
    );
}

#[tokio::test]
async fn the_newest_source_does_not_wait() {
    let engine = engine(16, 0);
    compute(&engine, 300).await;
    let asked = Instant::now();
    assert_eq!(ids(&drain(&engine).await), [0, 1]);
    assert!(drain(&engine).await.is_empty());
    assert!(asked.elapsed() < Duration::from_millis(1500));
}
