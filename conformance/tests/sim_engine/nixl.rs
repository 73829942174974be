//! Two engines as recorded of two vLLM servers with NIXL: every body's form, who makes which token, and what goes wrong.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use outrigger_conformance::sim::{Config, Nixl, SimEngine};
use serde_json::{Value, json};

use super::client::{Answer, metric, post};
use super::json::Json;

fn read(name: &str) -> String {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/nixl-pd"));
    std::fs::read_to_string(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A recorded request; token ids of the recorded model are folded into this one's vocabulary.
fn request(name: &str) -> Value {
    let mut body: Value = serde_json::from_str(&read(name)).expect("json");
    let ids = body.get_mut("prompt").and_then(Value::as_array_mut);
    for id in ids.into_iter().flatten() {
        *id = (id.as_u64().expect("id") % 1000 + 100).into();
    }
    body
}

fn engine() -> SimEngine {
    let config = Config {
        decode_itl_ms: 0.5,
        nixl: Some(Nixl::default()),
        ..Config::recorded()
    };
    SimEngine::start(config).expect("start")
}

fn assert_form(name: &str, ours: &Answer) {
    assert_eq!(ours.status_line, "HTTP/1.1 200 OK");
    assert_eq!(form(&ours.body()), form(&read(name)), "{name}");
}

/// The form of a body; ids and places of blocks are those of the moment.
fn form(body: &str) -> String {
    let told: Value = serde_json::from_str(body).expect("json");
    let params = &told["kv_transfer_params"];
    let mut shape = Json::parse(body).shape(&[]);
    for name in [
        "remote_engine_id",
        "remote_request_id",
        "remote_port",
        "remote_block_ids",
        "remote_num_tokens",
    ] {
        let value = format!("{name}:{}", params[name]);
        shape = shape.replacen(&value, name, 1);
    }
    shape
}

#[test]
fn both_legs_have_the_recorded_form_and_the_text_of_one_engine() {
    let (prefill, decode, alone) = (engine(), engine(), engine());
    for (path, prefix) in [("/v1/completions", ""), ("/v1/chat/completions", "chat_")] {
        let first = request(&format!("{prefix}1_prefill_request.json"));
        let answer = post(prefill.http_addr, path, &first);
        assert_form(&format!("{prefix}2_prefill_response.json"), &answer);
        let told = answer.json();
        assert_eq!(
            told["kv_transfer_params"]["remote_num_tokens"],
            told["usage"]["prompt_tokens"]
        );
        assert_eq!(prefill.transfers().0, 1, "its blocks wait");
        let mut second = request(&format!("{prefix}3_decode_request.json"));
        second["kv_transfer_params"] = answer.json()["kv_transfer_params"].clone();
        let answer = post(decode.http_addr, path, &second);
        assert_form(&format!("{prefix}4_decode_response.json"), &answer);
        assert_eq!(prefill.transfers().0, 0, "its blocks were fetched");
        second
            .as_object_mut()
            .expect("an object")
            .remove("kv_transfer_params");
        let whole = post(alone.http_addr, path, &second);
        assert_eq!(answer.json()["choices"], whole.json()["choices"]);
    }
    let source = r#"vllm:prompt_tokens_by_source_total{engine="0",model_name="smollm2",source="external_kv_transfer"}"#;
    assert!(metric(decode.http_addr, source) > 200.0);
}

#[test]
fn params_of_another_prompt_give_its_text_with_status_200() {
    let (prefill, decode) = (engine(), engine());
    let first = request("1_prefill_request.json");
    let params =
        post(prefill.http_addr, "/v1/completions", &first).json()["kv_transfer_params"].clone();
    let ask = |name: &str| {
        let mut body = request(name);
        body["kv_transfer_params"] = params.clone();
        post(decode.http_addr, "/v1/completions", &body)
    };
    let right = ask("3_decode_request.json");
    let wrong = ask("err_stale_blocks.request.json");
    assert_form("err_stale_blocks.body", &wrong);
    let ids = |answer: &Answer| answer.json()["choices"][0]["token_ids"].clone();
    assert_eq!(ids(&right), ids(&wrong));
    let mut body = request("err_stale_blocks.request.json");
    body.as_object_mut()
        .expect("an object")
        .remove("kv_transfer_params");
    assert_ne!(
        ids(&post(engine().http_addr, "/v1/completions", &body)),
        ids(&wrong)
    );
}

#[test]
fn nobody_at_the_other_end_is_a_500() {
    let answer = post(
        engine().http_addr,
        "/v1/completions",
        &request("err_dead_prefill.request.json"),
    );
    assert_eq!(answer.body(), read("err_dead_prefill.body"));
    assert_eq!(answer.status_line, "HTTP/1.1 500 Internal Server Error");
}

#[test]
fn blocks_wait_as_long_as_their_lease() {
    let config = Config {
        nixl: Some(Nixl {
            lease: Duration::from_millis(50),
            ..Nixl::default()
        }),
        ..Config::recorded()
    };
    let engine = SimEngine::start(config).expect("start");
    let begun = Instant::now();
    post(
        engine.http_addr,
        "/v1/completions",
        &request("1_prefill_request.json"),
    );
    while engine.transfers() != (0, 0, 1) {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(begun.elapsed() >= Duration::from_millis(50));
    assert_eq!(engine.load(), (0, 0, 0.0));
    let refused = post(
        SimEngine::start(Config::recorded())
            .expect("start")
            .http_addr,
        "/v1/completions",
        &json!({"model": "smollm2", "prompt": "x", "kv_transfer_params": {"do_remote_decode": true}}),
    );
    assert!(refused.status_line.contains("501"));
}
