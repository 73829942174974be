//! Stored responses of the simulated engine, as vLLM 0.32's own source has them.

use outrigger_conformance::sim::{Config, SimEngine};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

use super::client::{ask, post};

const RESPONSES: &str = "/v1/responses";

fn engine(responses_store: bool) -> SimEngine {
    SimEngine::start(Config {
        responses_store,
        ..Config::default()
    })
    .expect("an engine")
}

fn body(extra: &Value) -> Value {
    let mut body = json!({"input": "hello", "max_output_tokens": 3, "temperature": 0});
    let fields = body.as_object_mut().expect("an object");
    fields.extend(extra.as_object().expect("an object").clone());
    body
}

#[test]
fn a_response_is_kept_where_the_store_is_on_and_the_client_does_not_mind() {
    for (store, extra, status) in [
        (true, json!({"request_id": "resp_a"}), "200 OK"),
        (
            true,
            json!({"request_id": "resp_a", "store": false}),
            "404 Not Found",
        ),
        (false, json!({"request_id": "resp_a"}), "404 Not Found"),
    ] {
        let engine = engine(store);
        let created = post(engine.http_addr, RESPONSES, &body(&extra)).json();
        assert_eq!(created["id"], "resp_a");
        let told = ask(engine.http_addr, "GET", "/v1/responses/resp_a", b"");
        assert_eq!(told.status_line, format!("HTTP/1.1 {status}"), "{extra}");
        if status == "200 OK" {
            assert_eq!(told.json(), created);
        } else {
            let error = &told.json()["error"];
            assert_eq!(error["message"], "Response with id 'resp_a' not found.");
            assert_eq!(error["type"], "invalid_request_error");
        }
    }
}

#[test]
fn what_runs_in_the_background_ends_or_is_cancelled() {
    let engine = engine(true);
    let short = json!({"request_id": "resp_short", "background": true});
    let queued = post(engine.http_addr, RESPONSES, &body(&short)).json();
    assert_eq!(queued["status"], "queued");
    let until = Instant::now() + Duration::from_secs(10);
    let ended = loop {
        let told = ask(engine.http_addr, "GET", "/v1/responses/resp_short", b"").json();
        if told["status"] != "queued" {
            break told;
        }
        assert!(Instant::now() < until, "{told}");
    };
    assert_eq!(ended["status"], "incomplete");
    assert_eq!(ended["usage"]["output_tokens"], 3);
    let long = json!({"request_id": "resp_long", "background": true, "max_output_tokens": 4_000, "ignore_eos": true});
    post(engine.http_addr, RESPONSES, &body(&long));
    let path = "/v1/responses/resp_long/cancel";
    let cancelled = ask(engine.http_addr, "POST", path, b"");
    assert_eq!(cancelled.json()["status"], "cancelled");
    let twice = ask(engine.http_addr, "POST", path, b"");
    assert_eq!(twice.status_line, "HTTP/1.1 400 Bad Request");
    let told = ask(engine.http_addr, "GET", "/v1/responses/resp_long", b"");
    assert_eq!(told.json()["status"], "cancelled");
}

#[test]
fn the_background_needs_a_store() {
    let engine = engine(false);
    let refused = post(
        engine.http_addr,
        RESPONSES,
        &body(&json!({"background": true})),
    );
    assert_eq!(refused.status_line, "HTTP/1.1 400 Bad Request");
    assert_eq!(refused.json()["error"]["param"], "background");
}
