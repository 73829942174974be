//! SGLang's profile: what was recorded has the recorded form, and two halves meet in rooms.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use outrigger_conformance::sim::{Bootstrap, Config, Profile, Side, SimEngine};
use serde_json::{Value, json};

use super::client::{Answer, ask, metric, post};
use super::json::Json;

const CHAT: &str = "/v1/chat/completions";
/// What depends on the model, or on the moment.
const MASKED: &[&str] = &[
    "output_ids",
    "response_token_ids",
    "forward_entry_time",
    "prefill_finished_time",
    "queue_time",
    "e2e_latency",
    "request_received_ts",
    "first_token_latency",
    "api_server_dispatch_finish_ts",
    "request_finished_ts",
    "decode_throughput",
    "response_sent_to_client_ts",
    "device",
    "completion_tokens",
];

fn read(name: &str) -> String {
    let dir = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fixtures/http-sglang-0.5.23"
    ));
    std::fs::read_to_string(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn request(name: &str) -> Value {
    let mut body: Value =
        serde_json::from_str(&read(&format!("{name}.request.json"))).expect("json");
    for field in ["prompt", "input_ids"] {
        let ids = body.get_mut(field).and_then(Value::as_array_mut);
        for id in ids.into_iter().flatten() {
            *id = (id.as_u64().expect("id") % 1000 + 100).into();
        }
    }
    body
}

fn path(name: &str) -> &'static str {
    match name {
        _ if name.starts_with("generate") => "/generate",
        _ if name.starts_with("cmpl") => "/v1/completions",
        _ => CHAT,
    }
}

fn recorded_engine() -> SimEngine {
    let config = Config {
        decode_itl_ms: 0.5,
        ..Config::recorded_sglang()
    };
    SimEngine::start(config).expect("start")
}

fn assert_same_head(name: &str, ours: &Answer) {
    let head = read(&format!("{name}.headers"));
    let mut lines = head.trim_end().split("\r\n");
    assert_eq!(Some(&*ours.status_line), lines.next(), "{name}");
    let theirs: Vec<_> = lines.filter_map(|line| line.split_once(": ")).collect();
    assert_eq!(ours.headers.len(), theirs.len(), "{name}: {ours:?}");
    for ((name_a, value_a), (name_b, value_b)) in ours.headers.iter().zip(theirs) {
        assert_eq!(name_a, name_b, "{name}");
        if !["date", "content-length"].contains(&name_b) {
            assert_eq!(value_a, value_b, "{name}: {name_a}");
        }
    }
}

fn shapes(body: &str) -> Vec<String> {
    let events = body.trim_end().split("\n\n");
    let shape = |event: &str| match event.strip_prefix("data: ").expect("data") {
        "[DONE]" => "[DONE]".to_owned(),
        data => Json::parse(data).shape(MASKED),
    };
    let mut shapes: Vec<_> = events.map(shape).collect();
    shapes.dedup();
    shapes
}

#[test]
fn answers_have_the_recorded_form() {
    let engine = recorded_engine();
    for name in ["chat", "err_unknown_model", "generate"] {
        let ours = post(engine.http_addr, path(name), &request(name));
        assert_same_head(name, &ours);
        assert_eq!(
            Json::parse(&ours.body()).shape(MASKED),
            Json::parse(&read(&format!("{name}.body"))).shape(MASKED),
            "{name}"
        );
    }
    let mut body = request("chat");
    body["return_token_ids"] = true.into();
    body["return_prompt_token_ids"] = true.into();
    body["max_tokens"] = 4.into();
    let ours = post(engine.http_addr, CHAT, &body).body();
    assert_eq!(
        Json::parse(&ours).shape(&[MASKED, &["end"]].concat()),
        Json::parse(&read("chat_token_ids.body")).shape(&[MASKED, &["end"]].concat())
    );
    for name in ["err_bad_temp", "chat_stream_token_ids"] {
        let ours = post(engine.http_addr, path(name), &request(name));
        assert_same_head(name, &ours);
        assert_eq!(ours.body(), read(&format!("{name}.body")), "{name}");
    }
    let ours = post(engine.http_addr, CHAT, &request("err_too_long"));
    assert_same_head("err_too_long", &ours);
    let message = ours.json()["message"].as_str().expect("message").to_owned();
    assert!(message.ends_with("is longer than the model's context length (2048 tokens)."));
}

#[test]
fn streams_have_the_recorded_events() {
    let engine = recorded_engine();
    for name in [
        "chat_stream",
        "chat_stream_usage",
        "cmpl_prompt_ids_stream",
        "generate_stream",
    ] {
        let ours = post(engine.http_addr, path(name), &request(name));
        assert_same_head(name, &ours);
        assert!(ours.complete, "{name}");
        let theirs = read(&format!("{name}.body"));
        assert_eq!(shapes(&ours.body()), shapes(&theirs), "{name}");
        if !name.starts_with("chat") {
            let events = theirs.matches("data: ").count();
            assert_eq!(ours.body().matches("data: ").count(), events, "{name}");
        }
    }
}

#[test]
fn the_native_stream_tells_all_so_far() {
    let engine = recorded_engine();
    let mut body = request("generate");
    let whole = post(engine.http_addr, "/generate", &body).json();
    body["stream"] = true.into();
    let events = post(engine.http_addr, "/generate", &body).events();
    let last = events.last().expect("an event");
    assert_eq!(
        (&last["text"], &last["output_ids"]),
        (&whole["text"], &whole["output_ids"])
    );
    assert_eq!(events[2]["output_ids"].as_array().expect("ids").len(), 3);
}

#[test]
fn small_endpoints_answer_as_recorded() {
    let engine = recorded_engine();
    for (name, path) in [
        ("get_health", "/health"),
        ("get_health_generate", "/health_generate"),
        ("get_get_load", "/get_load"),
        ("get_version", "/version"),
        ("get_get_model_info", "/get_model_info"),
        ("get_v1_models", "/v1/models"),
        ("get_v1_loads", "/v1/loads"),
        ("flush_cache", "/flush_cache"),
    ] {
        let ours = ask(engine.http_addr, "GET", path, b"");
        assert_same_head(name, &ours);
        let theirs = read(&format!("{name}.body"));
        if theirs.starts_with('{') {
            let (ours, theirs) = (Json::parse(&ours.body()), Json::parse(&theirs));
            assert_eq!(ours.shape(&[]), theirs.shape(&[]), "{name}");
        } else {
            assert_eq!(ours.body(), theirs, "{name}");
        }
    }
    let ours = ask(engine.http_addr, "GET", "/server_info", b"");
    assert_same_head("get_server_info", &ours);
    let mut told = [
        ours.json(),
        serde_json::from_str(&read("get_server_info.body")).expect("json"),
    ];
    for info in &mut told {
        for port in ["endpoint_port_base", "replay_endpoint_port_base"] {
            info["kv_events"][port].take();
        }
    }
    let [ours, theirs] = told;
    assert_eq!(ours, theirs);
}

#[test]
fn the_metrics_page_has_the_recorded_samples() {
    let engine = recorded_engine();
    post(engine.http_addr, CHAT, &request("chat"));
    let ours = ask(engine.http_addr, "GET", "/metrics", b"");
    assert_same_head("get_metrics", &ours);
    let samples = |page: &str| {
        let name = |line: &str| match line.starts_with('#') {
            true => line.to_owned(),
            false => line.rsplit_once(' ').expect("a value").0.to_owned(),
        };
        page.lines().map(name).collect::<Vec<_>>()
    };
    assert_eq!(samples(&ours.body()), samples(&read("get_metrics.body")));
    assert_eq!(
        metric(engine.http_addr, "sglang:generation_tokens_total"),
        10.0
    );
    assert_eq!(
        metric(engine.http_addr, "sglang:max_total_num_tokens"),
        8192.0
    );
}

fn half(side: Side, wait: Duration) -> SimEngine {
    let config = Config {
        profile: Profile::Sglang,
        bootstrap: Some(Bootstrap {
            wait,
            ..Bootstrap::new(side)
        }),
        decode_itl_ms: 0.5,
        ..Config::default()
    };
    SimEngine::start(config).expect("start")
}

/// The request with a room at the prefill engine.
fn with_room(prefill: &SimEngine, body: &Value, room: u64) -> Value {
    let info = ask(prefill.http_addr, "GET", "/server_info", b"").json();
    assert_eq!(info["disaggregation_mode"], "prefill");
    let mut body = body.clone();
    body["bootstrap_host"] = "127.0.0.1".into();
    body["bootstrap_port"] = info["disaggregation_bootstrap_port"].clone();
    body["bootstrap_room"] = room.into();
    body
}

fn prompt(text: &str) -> Value {
    json!({"prompt": text, "temperature": 0, "max_tokens": 9, "ignore_eos": true})
}

const LONG: Duration = Duration::from_secs(10);

#[test]
fn two_halves_tell_what_one_engine_tells() {
    let (prefill, decode) = (half(Side::Prefill, LONG), half(Side::Decode, LONG));
    let alone = SimEngine::start(Config {
        profile: Profile::Sglang,
        ..Config::default()
    });
    let alone = alone.expect("start");
    for (room, decode_first) in [(1, true), (u64::MAX >> 1, false)] {
        for stream in [false, true] {
            let mut body = prompt("The capital of France is");
            body["stream"] = stream.into();
            let asked = with_room(&prefill, &body, room);
            let (first, second) = match decode_first {
                true => (decode.http_addr, prefill.http_addr),
                false => (prefill.http_addr, decode.http_addr),
            };
            let copy = asked.clone();
            let leg = std::thread::spawn(move || post(first, "/v1/completions", &copy));
            let other = post(second, "/v1/completions", &asked);
            let leg = leg.join().expect("an answer");
            let (told, drained) = match decode_first {
                true => (leg, other),
                false => (other, leg),
            };
            let expected = post(alone.http_addr, "/v1/completions", &body);
            if stream {
                assert_eq!(shapes(&told.body()), shapes(&expected.body()));
                continue;
            }
            assert_eq!(told.json()["choices"], expected.json()["choices"]);
            assert_eq!(drained.json()["usage"]["completion_tokens"], 1);
        }
    }
    assert_eq!(prefill.rooms(), (0, 4));
}

#[test]
fn a_leg_without_a_room_is_refused() {
    for side in [Side::Prefill, Side::Decode] {
        let engine = half(side, LONG);
        let answer = post(engine.http_addr, "/v1/completions", &prompt("a"));
        assert_eq!(answer.status_line, "HTTP/1.1 400 Bad Request");
        assert_eq!(answer.json()["object"], "error");
    }
}

#[test]
fn who_waits_for_nobody_is_aborted_in_time() {
    let wait = Duration::from_millis(100);
    let (prefill, decode) = (half(Side::Prefill, wait), half(Side::Decode, wait));
    let mut body = with_room(&prefill, &prompt("a"), 7);
    for engine in [&prefill, &decode] {
        let begun = Instant::now();
        let answer = post(engine.http_addr, "/v1/completions", &body);
        assert_eq!(answer.status_line, "HTTP/1.1 500 Internal Server Error");
        assert!(begun.elapsed() >= wait);
    }
    body["stream"] = true.into();
    let answer = post(decode.http_addr, "/v1/completions", &body);
    assert_eq!(answer.status_line, "HTTP/1.1 200 OK");
    assert_eq!(answer.events()[0]["error"]["code"], 500);
    assert!(answer.body().ends_with("data: [DONE]\n\n"));
}

#[test]
fn a_room_is_not_asked_for_which_prompt_it_was_opened() {
    let wait = Duration::from_millis(200);
    let (prefill, decode) = (half(Side::Prefill, wait), half(Side::Decode, wait));
    let right = with_room(&prefill, &prompt("The sky is"), 7);
    let wrong = with_room(&prefill, &prompt("Once upon a time"), 7);
    let (address, body) = (prefill.http_addr, right.clone());
    let leg = std::thread::spawn(move || post(address, "/v1/completions", &body));
    while prefill.rooms().0 == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // A second leg for prefill finds the room in use.
    let answer = post(prefill.http_addr, "/v1/completions", &wrong);
    assert_eq!(answer.json()["code"], 500);
    let told = post(decode.http_addr, "/v1/completions", &wrong).json();
    leg.join().expect("an answer");
    let alone = SimEngine::start(Config {
        profile: Profile::Sglang,
        ..Config::default()
    });
    let expected = post(alone.expect("start").http_addr, "/v1/completions", &right).json();
    assert_eq!(told["choices"][0]["text"], expected["choices"][0]["text"]);
}
