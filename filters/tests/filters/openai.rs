//! The `openai` filter: what it reads, what it leaves alone, what it sees in real responses.

use crate::fleet::{Fleet, OPENAI, post, recording, run, vllm};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use outrigger_filters::{
    body::RequestBody,
    endpoints::Via,
    filter::{Edit, End, LogFields},
    openai::{Api, Prompt},
    sse::{self, Event},
};
use serde_json::json;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

fn fleet() -> Fleet {
    Fleet::new(
        &[Via::Local],
        &vllm(""),
        Arc::new(|_, _| (StatusCode::NOT_FOUND, String::new())),
    )
}

#[tokio::test]
async fn a_recorded_request_is_read_and_forwarded_byte_for_byte() {
    let (chain, last) = fleet().chain(&[(OPENAI, json!({}))]);
    let body = recording("chat_stream_usage.request.json");
    let outcome = post(&chain, "/v1/chat/completions", body.clone()).await;
    let openai = outcome.context.openai.unwrap();
    assert_eq!(openai.api, Api::Chat);
    assert_eq!(openai.model.as_deref(), Some("smollm2"));
    assert!(openai.stream && openai.include_usage && openai.is_generation());
    assert_eq!(openai.max_tokens, Some(24));
    assert_eq!(outcome.context.log.model.as_deref(), Some("smollm2"));
    assert_eq!(outcome.context.observers.len(), 1);
    assert_eq!(last.body.lock().unwrap().as_deref(), Some(body.as_bytes()));
}

#[tokio::test]
async fn every_recorded_request_names_its_model() {
    let (chain, last) = fleet().chain(&[(OPENAI, json!({"inline_parse_bytes_max": 100}))]);
    let cases = [
        ("chat_tools_forced", "/v1/chat/completions"),
        ("chat_json_schema", "/v1/chat/completions"),
        ("cmpl_batch_stream", "/v1/completions"),
        ("cmpl_prompt_ids_stream", "/v1/completions"),
        ("anthropic_messages_stream", "/v1/messages"),
        ("responses", "/v1/responses"),
        ("inference_generate", "/inference/v1/generate"),
        ("tokenize_chat", "/tokenize"),
        ("chat_render", "/v1/chat/completions/render"),
    ];
    for (name, path) in cases {
        let body = recording(&format!("{name}.request.json"));
        let outcome = post(&chain, path, body.clone()).await;
        let openai = outcome.context.openai.unwrap();
        assert_eq!(openai.model.as_deref(), Some("smollm2"), "{name}");
        assert_ne!(openai.prompt, Prompt::None, "{name}");
        assert_eq!(
            last.body.lock().unwrap().as_deref(),
            Some(body.as_bytes()),
            "{name}"
        );
    }
}

#[tokio::test]
async fn what_is_not_ours_to_read_is_forwarded_unread() {
    let (chain, last) = fleet().chain(&[(OPENAI, json!({"body_bytes_max": 40}))]);
    let long = format!("{{\"model\":\"m\",\"prompt\":\"{}\"}}", "x".repeat(60));
    let cases: [(&str, &str, &str, &str); 5] = [
        (
            "/v1/completions",
            "application/json",
            "",
            "{\"model\": broken",
        ),
        (
            "/v1/completions",
            "application/json",
            "gzip",
            "{\"model\":\"m\"}",
        ),
        (
            "/v1/audio/transcriptions",
            "multipart/form-data; boundary=x",
            "",
            "--x--",
        ),
        ("/v1/completions", "text/plain", "", "{\"model\":\"m\"}"),
        ("/v1/completions", "application/json", "", &long),
    ];
    for (path, kind, encoding, body) in cases {
        let mut request = Request::post(path).header("content-type", kind);
        if !encoding.is_empty() {
            request = request.header("content-encoding", encoding);
        }
        let body = Bytes::copy_from_slice(body.as_bytes());
        let outcome = run(
            &chain,
            request.body(RequestBody::full(body.clone())).unwrap(),
        )
        .await;
        assert_eq!(
            outcome.context.openai.unwrap().model,
            None,
            "{path} {kind} {encoding}"
        );
        assert_eq!(
            last.body.lock().unwrap().as_ref(),
            Some(&body),
            "{path} {kind} {encoding}"
        );
    }
}

#[tokio::test]
async fn a_body_past_the_limit_streams_on_whole() {
    let (chain, last) = fleet().chain(&[(OPENAI, json!({"body_bytes_max": 40}))]);
    let pieces: Vec<Bytes> = (0..20u8).map(|i| Bytes::from(vec![b'a' + i; 7])).collect();
    let frames = pieces
        .clone()
        .into_iter()
        .map(|piece| Ok(http_body::Frame::data(piece)));
    let body =
        RequestBody::boxed(StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync());
    let request = Request::post("/v1/chat/completions")
        .header("content-type", "application/json; charset=utf-8");
    let outcome = run(&chain, request.body(body).unwrap()).await;
    let openai = outcome.context.openai.unwrap();
    assert!(openai.model.is_none() && openai.body.is_none() && openai.is_generation());
    assert_eq!(
        last.body.lock().unwrap().as_deref(),
        Some(&pieces.concat()[..])
    );
}

#[tokio::test]
async fn limits_come_from_the_configuration_and_never_cut_a_live_stream_by_default() {
    let (chain, _) = fleet().chain(&[(
        OPENAI,
        json!({"inter_token_timeout_ms": 0, "total_timeout_ms": 1500}),
    )]);
    let limits = post(&chain, "/v1/models", "")
        .await
        .context
        .openai
        .unwrap()
        .limits;
    assert_eq!(limits.headers_timeout, Some(Duration::from_secs(600)));
    assert_eq!(limits.first_token_timeout, Some(Duration::from_secs(600)));
    assert_eq!(limits.inter_token_timeout, None);
    assert_eq!(limits.total_timeout, Some(Duration::from_millis(1500)));
    let wrong = outrigger_filters::openai::factory(&json!({"body_bytes": 1}), &fleet().services)
        .err()
        .unwrap();
    assert!(wrong.contains("body_bytes"), "{wrong}");
}

/// What the access log says after a recorded response went by.
async fn log_after(name: &str, path: &str, stream: bool) -> LogFields {
    let (chain, _) = fleet().chain(&[(OPENAI, json!({}))]);
    let mut outcome = post(&chain, path, "{\"model\":\"m\"}").await;
    let mut observer = outcome.observer();
    let body = recording(&format!("{name}.body"));
    let mut rest = body.as_bytes();
    while stream && !rest.is_empty() {
        let length = sse::event_length(rest).unwrap();
        assert_eq!(
            observer.on_event(
                &Event {
                    raw: &rest[..length]
                },
                Instant::now()
            ),
            Edit::Keep
        );
        rest = &rest[length..];
    }
    for chunk in rest.chunks(100) {
        observer.on_chunk(chunk, Instant::now());
    }
    let mut log = LogFields {
        hit_tokens_predicted: Some(32),
        ..LogFields::default()
    };
    observer.on_end(End::Complete, &mut log);
    log
}

#[tokio::test]
async fn usage_of_recorded_responses_reaches_the_log() {
    let cases = [
        (
            "chat_token_ids",
            "/v1/chat/completions",
            false,
            (34, 24, Some(32)),
        ),
        ("cmpl", "/v1/completions", false, (5, 8, Some(0))),
        (
            "inference_generate",
            "/inference/v1/generate",
            false,
            (5, 8, Some(0)),
        ),
        ("responses", "/v1/responses", false, (34, 8, Some(0))),
        (
            "chat_stream_continuous_usage",
            "/v1/chat/completions",
            true,
            (34, 24, None),
        ),
        (
            "cmpl_stream_usage",
            "/v1/completions",
            true,
            (5, 8, Some(0)),
        ),
        (
            "anthropic_messages_stream",
            "/v1/messages",
            true,
            (34, 8, Some(32)),
        ),
        ("responses_stream", "/v1/responses", true, (34, 8, Some(32))),
    ];
    for (name, path, stream, (prompt, completion, cached)) in cases {
        let log = log_after(name, path, stream).await;
        assert_eq!(
            (log.prompt_tokens, log.completion_tokens),
            (Some(prompt), Some(completion)),
            "{name}"
        );
        if let Some(cached) = cached {
            assert_eq!(log.hit_tokens_confirmed, Some(cached), "{name}");
        }
    }
    let log = log_after("chat_stream", "/v1/chat/completions", true).await;
    assert_eq!(
        (log.prompt_tokens, log.completion_tokens),
        (None, None),
        "nothing is guessed"
    );
}
