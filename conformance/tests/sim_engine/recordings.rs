//! Every recorded exchange that is simulated, compared: status line, header names and values, keys and their order,
//! fixed values, and the framing of streams.

use std::path::PathBuf;

use outrigger_conformance::sim::{Config, SimEngine};
use serde_json::{Value, json};

use super::client::{Answer, ask, post};
use super::json::Json;

fn dir() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fixtures/http-vllm-0.32.0"
    ))
}

fn read(name: &str) -> String {
    std::fs::read_to_string(dir().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn recorded(name: &str) -> Answer {
    let head = read(&format!("{name}.headers"));
    let mut lines = head.trim_end().split("\r\n");
    let status_line = lines.next().expect("a status line").to_owned();
    let header = |line: &str| {
        line.split_once(": ")
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    let headers = lines.filter_map(header).collect();
    Answer {
        status_line,
        headers,
        chunks: vec![read(&format!("{name}.body"))],
        complete: true,
    }
}

fn target(name: &str) -> (&'static str, String) {
    if let Some(path) = name.strip_prefix("get_") {
        let path = path
            .strip_prefix("v1_")
            .map_or_else(|| path.to_owned(), |path| format!("v1/{path}"));
        return ("GET", format!("/{path}"));
    }
    let path = match name {
        "chat_render" => "/v1/chat/completions/render",
        "err_method" => return ("GET", "/v1/chat/completions".to_owned()),
        _ if name.starts_with("anthropic") => "/v1/messages",
        _ if name.starts_with("tokenize") => "/tokenize",
        _ if name.starts_with("detokenize") => "/detokenize",
        _ if name.starts_with("cmpl") => "/v1/completions",
        _ if name.starts_with("inference") => "/inference/v1/generate",
        _ if name.starts_with("responses") => "/v1/responses",
        _ => "/v1/chat/completions",
    };
    ("POST", path.to_owned())
}

/// The recorded request; token ids of the recorded model are folded into this one's vocabulary.
fn request(name: &str) -> Vec<u8> {
    let Ok(body) = std::fs::read_to_string(dir().join(format!("{name}.request.json"))) else {
        return Vec::new();
    };
    let Ok(mut json) = serde_json::from_str::<Value>(&body) else {
        return body.into_bytes();
    };
    for field in ["prompt", "tokens", "token_ids"] {
        let ids = json
            .get_mut(field)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten();
        ids.filter(|id| id.is_number())
            .for_each(|id| *id = (id.as_u64().expect("id") % 1000 + 100).into());
    }
    // Nothing to fold: the bytes as they were recorded.
    if serde_json::from_str::<Value>(&body).expect("json") == json {
        body.into_bytes()
    } else {
        json.to_string().into()
    }
}

fn replay(engine: &SimEngine, name: &str) -> Answer {
    let (method, path) = target(name);
    ask(engine.http_addr, method, &path, &request(name))
}

fn assert_same_head(name: &str, ours: &Answer, theirs: &Answer) {
    assert_eq!(ours.status_line, theirs.status_line, "{name}");
    let names = |answer: &Answer| {
        answer
            .headers
            .iter()
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(ours), names(theirs), "{name}");
    for ((header, ours), (_, theirs)) in ours.headers.iter().zip(&theirs.headers) {
        match header.as_str() {
            "content-length" => {}
            "date" => assert_eq!(
                (ours.len(), &ours[25..]),
                (theirs.len(), &theirs[25..]),
                "{name}: {ours}"
            ),
            _ => assert_eq!(ours, theirs, "{name}: {header}"),
        }
    }
}

/// Shapes of the events of a stream, equal neighbours counted once: how many tokens give no text of their own
/// depends on the text.
fn event_shapes(body: &str, also: &[&str]) -> Vec<String> {
    let events = body
        .strip_suffix("\n\n")
        .expect("a stream ends with an event")
        .split("\n\n");
    let mut shapes: Vec<String> = events
        .map(|event| {
            let (lead, data) = event.split_once("data: ").expect("an event has data");
            if data == "[DONE]" {
                data.to_owned()
            } else {
                format!("{lead}{}", Json::parse(data).shape(also))
            }
        })
        .collect();
    shapes.dedup();
    shapes
}

fn assert_one_chunk_per_event(name: &str, answer: &Answer) {
    assert!(answer.complete, "{name} did not end");
    for chunk in &answer.chunks {
        assert!(
            chunk.ends_with("\n\n") && chunk.matches("\n\n").count() == 1,
            "{name}: {chunk:?}"
        );
    }
}

fn engine() -> SimEngine {
    SimEngine::start(Config {
        decode_itl_ms: 0.5,
        ..Config::recorded()
    })
    .expect("start")
}

#[test]
fn json_answers_have_the_recorded_form() {
    let engine = engine();
    let names = [
        "chat",
        "chat_token_ids",
        "chat_logprobs",
        "chat_n2",
        "chat_json_schema",
        "chat_render",
        "chat_tools_forced",
        "cmpl",
        "cmpl_echo_logprobs",
        "cmpl_token_ids",
        "tokenize_chat",
        "tokenize_prompt",
        "detokenize",
        "inference_generate",
        "responses",
        "err_bad_json",
        "err_bad_temp",
        "err_method",
        "err_no_messages",
        "err_stream_too_long_prompt",
        "err_too_long",
        "err_too_long_prompt",
        "err_unknown_model",
        "get_is_paused",
        "get_is_sleeping",
        "get_kv_event_sources",
        "get_load",
        "get_nonexistent",
        "get_server_info",
        "get_v1_models",
        "get_version",
    ];
    for name in names {
        let (ours, theirs) = (replay(&engine, name), recorded(name));
        assert_same_head(name, &ours, &theirs);
        assert_eq!(
            Json::parse(&ours.body()).shape(&[]),
            Json::parse(&theirs.body()).shape(&[]),
            "{name}"
        );
    }
    for name in ["get_health", "get_ping"] {
        let (ours, theirs) = (replay(&engine, name), recorded(name));
        assert_same_head(name, &ours, &theirs);
        assert_eq!(ours.body(), theirs.body(), "{name}");
    }
    for name in [
        "err_bad_temp",
        "err_method",
        "err_unknown_model",
        "err_too_long",
        "err_bad_json",
        "get_server_info",
    ] {
        assert_eq!(
            replay(&engine, name).body(),
            recorded(name).body(),
            "{name}"
        );
    }
}

#[test]
fn streams_have_the_recorded_events() {
    let engine = engine();
    for name in [
        "chat_stream",
        "chat_stop",
        "chat_stream_continuous_usage",
        "chat_stream_logprobs",
        "chat_stream_token_ids",
        "chat_stream_tools_auto",
        "chat_stream_tools_forced",
        "chat_stream_tools_required",
        "chat_stream_usage",
        "cmpl_prompt_ids_stream",
        "cmpl_stream",
        "cmpl_stream_token_ids",
        "cmpl_stream_usage",
        "inference_generate_stream",
        "anthropic_messages_stream",
        "responses_stream",
    ] {
        let (ours, theirs) = (replay(&engine, name), recorded(name));
        assert_same_head(name, &ours, &theirs);
        assert_one_chunk_per_event(name, &ours);
        // Counts grow from event to event; the last ones are compared through `usage` of the JSON answers.
        let also = match name {
            "chat_stream_continuous_usage" => &["completion_tokens"][..],
            "responses_stream" => &["sequence_number"],
            _ => &[],
        };
        assert_eq!(
            event_shapes(&ours.body(), also),
            event_shapes(&theirs.body(), also),
            "{name}"
        );
        if name.starts_with("cmpl") || name.starts_with("inference") || name.contains("token_ids") {
            assert_eq!(ours.events().len(), theirs.events().len(), "{name}");
        }
    }
}

#[test]
fn choices_of_one_stream_interleave_by_index() {
    let engine = engine();
    for name in ["chat_stream_n2", "cmpl_batch_stream"] {
        let (ours, theirs) = (replay(&engine, name), recorded(name));
        assert_same_head(name, &ours, &theirs);
        assert_one_chunk_per_event(name, &ours);
        assert_eq!(
            event_shapes(&ours.body(), &["index"]),
            event_shapes(&theirs.body(), &["index"]),
            "{name}"
        );
        let indexes = |answer: &Answer| {
            let choices = answer
                .events()
                .into_iter()
                .filter_map(|event| event["choices"][0]["index"].as_u64());
            choices.take(4).collect::<Vec<_>>()
        };
        assert_eq!(indexes(&ours), [0, 1, 0, 1], "{name}");
    }
}

#[test]
fn the_metrics_page_has_the_recorded_families_and_samples() {
    let engine = engine();
    for name in [
        "chat",
        "cmpl",
        "get_v1_models",
        "chat_render",
        "tokenize_prompt",
        "detokenize",
        "inference_generate",
    ] {
        replay(&engine, name);
    }
    let (ours, theirs) = (replay(&engine, "get_metrics"), recorded("get_metrics"));
    assert_same_head("get_metrics", &ours, &theirs);
    let families = |body: &str| {
        body.lines()
            .filter(|line| line.starts_with('#'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(families(&ours.body()), families(&theirs.body()));
    let samples = |body: &str, http: bool| {
        let lines = body
            .lines()
            .filter(|line| !line.starts_with('#') && line.starts_with("http_") == http);
        lines
            .filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(samples(&ours.body(), false), samples(&theirs.body(), false));
    let known = samples(&theirs.body(), true);
    let unknown: Vec<_> = samples(&ours.body(), true)
        .into_iter()
        .filter(|sample| !known.contains(sample))
        .collect();
    assert_eq!(unknown, Vec::<String>::new());
}

/// Requests whose answers no recording shows.
#[test]
fn what_is_not_simulated_is_refused_and_never_made_up() {
    let engine = engine();
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let messages = json!([{"role": "user", "content": "Hi"}]);
    for (path, body) in [
        (
            "/v1/completions",
            json!({"prompt": "Hi", "echo": true, "stream": true}),
        ),
        (
            "/v1/completions",
            json!({"prompt": "Hi", "echo": true, "max_tokens": 0}),
        ),
        (
            "/v1/completions",
            json!({"prompt": "Hi", "prompt_logprobs": 1}),
        ),
        (
            "/v1/completions",
            json!({"prompt": "Hi", "response_format": {"type": "json_object"}}),
        ),
        (
            "/v1/completions/render",
            json!({"prompt": "Hi", "echo": true}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": messages, "structured_outputs": {"regex": "a"}}),
        ),
        (
            "/v1/chat/completions/render",
            json!({"messages": messages, "tools": [tool]}),
        ),
        (
            "/v1/messages",
            json!({"messages": messages, "max_tokens": 1, "tools": [tool]}),
        ),
        ("/v1/responses", json!({"input": "Hi", "tools": [tool]})),
        (
            "/v1/responses",
            json!({"input": "Hi", "text": {"format": {"type": "json_object"}}}),
        ),
        (
            "/v1/responses",
            json!({"input": [{"type": "function_call_output", "output": "1"}]}),
        ),
    ] {
        let answer = post(engine.http_addr, path, &body);
        assert_eq!(
            answer.status_line, "HTTP/1.1 501 Not Implemented",
            "{path} {body}"
        );
        let error = &answer.json()["error"];
        assert_eq!(error["type"], "NotImplementedError", "{path} {body}");
    }
}

/// Every recorded exchange is compared by one of the tests of this file.
#[test]
fn no_recorded_exchange_is_left_out() {
    let source = include_str!("recordings.rs");
    let names = std::fs::read_dir(dir())
        .expect("recordings")
        .filter_map(|entry| {
            let name = entry.expect("an entry").file_name();
            Some(name.to_str()?.strip_suffix(".body")?.to_owned())
        });
    let left_out: Vec<_> = names
        .filter(|name| {
            !source.contains(&format!("\"{name}\""))
                && !source.contains(&format!("\"{name}.body\""))
        })
        .collect();
    assert_eq!(left_out, Vec::<String>::new());
}

#[test]
fn without_their_flags_endpoints_answer_as_recorded_without_them() {
    let engine = SimEngine::start(Config {
        model: "smollm2".to_owned(),
        ..Config::default()
    })
    .expect("start");
    for name in ["inference_generate", "chat_render"] {
        let answer = replay(&engine, name);
        assert_eq!(answer.status_line, "HTTP/1.1 403 Forbidden", "{name}");
        assert_eq!(
            answer.body(),
            read("inference_generate_disabled_403.body"),
            "{name}"
        );
    }
    for name in ["get_server_info", "get_is_sleeping"] {
        assert_eq!(
            replay(&engine, name).status_line,
            "HTTP/1.1 404 Not Found",
            "{name}"
        );
    }
    let usage = &replay(&engine, "chat").json()["usage"];
    assert_eq!(usage["prompt_tokens_details"], Value::Null);
}

#[test]
fn a_whole_message_tells_what_its_stream_tells() {
    let engine = engine();
    let mut body = json!({"max_tokens": 12, "temperature": 0, "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}]});
    let whole = post(engine.http_addr, "/v1/messages", &body).json();
    body["stream"] = true.into();
    let events = post(engine.http_addr, "/v1/messages", &body).events();
    let told = events
        .iter()
        .filter_map(|event| event["delta"]["text"].as_str());
    assert_eq!(whole["content"][0]["text"], told.collect::<String>());
    assert_eq!(whole["stop_reason"], "max_tokens");
    assert_eq!(whole["usage"]["output_tokens"], 12);
}

#[test]
fn text_that_may_begin_a_stop_string_is_held_back_and_no_chunk_is_empty() {
    let engine = engine();
    let answer = replay(&engine, "chat_stop");
    let contents: Vec<String> = answer.events()[1..]
        .iter()
        .map(|event| event["choices"][0]["delta"]["content"].as_str())
        .map(|content| content.expect("content").to_owned())
        .collect();
    assert!(!contents.contains(&String::new()), "{contents:?}");
    // "Green" could still begin in the last four characters until the end is known.
    let last = contents.last().expect("a chunk").chars().count();
    assert!(last > 4, "{contents:?}");
    let unstopped = replay(&engine, "chat").json();
    let whole = &unstopped["choices"][0]["message"]["content"];
    assert_eq!(*whole, contents.concat());
}
