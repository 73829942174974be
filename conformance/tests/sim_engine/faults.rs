//! What goes wrong on command goes wrong on the wire; and the connection's own rules: keep-alive, disconnect, ids, keys.

use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_conformance::harness::send_signal;
use outrigger_conformance::sim::{Config, Fault, FaultKind, SimEngine};
use serde_json::{Value, json};

use super::cache::wait_for;
use super::client::{Answer, Client, ask, metric, post};
use super::zmtp::{Peer, batch};

fn engine() -> SimEngine {
    SimEngine::start(Config {
        decode_itl_ms: 1.0,
        ..Config::recorded()
    })
    .expect("start")
}

fn body(stream: bool, max_tokens: u32) -> Value {
    json!({"prompt": "One two", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "stream": stream})
}

/// A stream of up to ten tokens while `fault` is armed.
fn stream_with(engine: &SimEngine, fault: Fault) -> (Client, Option<Answer>) {
    let armed = post(engine.http_addr, "/sim/fault", &json!(fault));
    assert_eq!(armed.status_line, "HTTP/1.1 200 OK", "{armed:?}");
    let mut client = Client::connect(engine.http_addr);
    client.send(
        "POST",
        "/v1/completions",
        &[],
        body(true, 10).to_string().as_bytes(),
    );
    let answer = client.answer().ok();
    (client, answer)
}

fn after(kind: FaultKind, after_tokens: u64) -> Fault {
    Fault {
        after_tokens,
        ..Fault::new(kind)
    }
}

#[test]
fn a_truncated_stream_ends_without_its_last_chunk_and_the_next_is_whole() {
    let engine = engine();
    let (mut client, answer) = stream_with(&engine, after(FaultKind::Truncate, 4));
    let answer = answer.expect("a head");
    assert_eq!((answer.chunks.len(), answer.complete), (4, false));
    assert_eq!(client.end().expect("a clean close"), 0);
    let next = post(engine.http_addr, "/v1/completions", &body(true, 10));
    assert!(next.complete && next.body().ends_with("data: [DONE]\n\n"));
}

#[test]
fn a_reset_stream_is_reset() {
    let engine = engine();
    engine.fault(after(FaultKind::Reset, 2));
    let mut client = Client::connect(engine.http_addr);
    client.send(
        "POST",
        "/v1/completions",
        &[],
        body(true, 10).to_string().as_bytes(),
    );
    client.head().expect("head");
    (0..2).for_each(|_| assert!(client.chunk().expect("a chunk").is_some()));
    let error = client.chunk().expect_err("the connection was reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn garbage_is_no_chunk() {
    let engine = engine();
    post(
        engine.http_addr,
        "/sim/fault",
        &json!({"kind": "garbage", "after_tokens": 3}),
    );
    let mut client = Client::connect(engine.http_addr);
    client.send(
        "POST",
        "/v1/completions",
        &[],
        body(true, 10).to_string().as_bytes(),
    );
    client.head().expect("head");
    (0..3).for_each(|_| assert!(client.chunk().expect("a chunk").is_some()));
    assert_eq!(
        client.chunk().expect_err("garbage").kind(),
        std::io::ErrorKind::InvalidData
    );
}

#[test]
fn an_in_band_error_is_the_recorded_one_and_the_stream_ends_cleanly() {
    let engine = engine();
    let answer = stream_with(&engine, after(FaultKind::InBandError, 3))
        .1
        .expect("an answer");
    assert!(answer.complete);
    let recorded = include_str!("../../fixtures/failures/worker_sigkill_midstream.body");
    let tail: Vec<&str> = recorded.trim_end().rsplit("\n\n").take(2).collect();
    let ours = answer.body();
    assert_eq!(
        ours.trim_end().rsplit("\n\n").take(2).collect::<Vec<_>>(),
        tail
    );
    assert_eq!(answer.chunks.len(), 3 + 2);
}

#[test]
fn a_stalled_stream_falls_silent_while_others_go_on() {
    let engine = engine();
    let stall = Fault {
        for_ms: 300,
        ..after(FaultKind::Stall, 2)
    };
    let began = Instant::now();
    let answer = stream_with(&engine, stall).1.expect("an answer");
    assert!(answer.complete && began.elapsed() >= Duration::from_millis(300));
    engine.fault(after(FaultKind::Stall, 2));
    let mut silent = Client::connect(engine.http_addr);
    silent.send(
        "POST",
        "/v1/completions",
        &[],
        body(true, 10).to_string().as_bytes(),
    );
    silent.head().expect("head");
    (0..2).for_each(|_| assert!(silent.chunk().expect("a chunk").is_some()));
    wait_for(|| ask(engine.http_addr, "GET", "/sim/fault", b"").json() == json!([]));
    assert!(post(engine.http_addr, "/v1/completions", &body(true, 10)).complete);
}

#[test]
fn slow_and_freeze_take_their_time() {
    let engine = engine();
    let began = Instant::now();
    stream_with(
        &engine,
        Fault {
            for_ms: 20,
            ..after(FaultKind::Slow, 0)
        },
    )
    .1
    .expect("an answer");
    assert!(
        began.elapsed() >= Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
    let began = Instant::now();
    engine.fault(Fault {
        for_ms: 1500,
        ..Fault::new(FaultKind::Freeze)
    });
    assert_eq!(
        ask(engine.http_addr, "GET", "/health", b"").status_line,
        "HTTP/1.1 200 OK"
    );
    assert!(
        began.elapsed() < Duration::from_millis(1000),
        "a frozen engine still answers HTTP"
    );
    post(engine.http_addr, "/v1/completions", &body(false, 2));
    assert!(began.elapsed() >= Duration::from_millis(1500));
}

#[test]
fn http_500_strikes_as_often_as_told() {
    let engine = engine();
    engine.fault(Fault {
        count: 2,
        ..Fault::new(FaultKind::Http500)
    });
    let statuses: Vec<String> = (0..3)
        .map(|_| post(engine.http_addr, "/v1/completions", &body(false, 2)).status_line)
        .collect();
    assert_eq!(
        statuses,
        [
            "HTTP/1.1 500 Internal Server Error",
            "HTTP/1.1 500 Internal Server Error",
            "HTTP/1.1 200 OK"
        ]
    );
}

#[test]
fn refused_connections_are_accepted_again_later() {
    let engine = engine();
    engine.fault(Fault {
        for_ms: 300,
        ..Fault::new(FaultKind::Refuse)
    });
    wait_for(|| TcpStream::connect(engine.http_addr).is_err());
    wait_for(|| TcpStream::connect(engine.http_addr).is_ok());
    assert_eq!(
        ask(engine.http_addr, "GET", "/health", b"").status_line,
        "HTTP/1.1 200 OK"
    );
}

#[test]
fn lost_events_are_found_by_replay() {
    let engine = engine();
    let mut subscriber = Peer::subscribe(engine.events_addr.expect("bound"), "");
    let store = |from: u32| {
        let prompt: Vec<u32> = (0..40).map(|at| from + at).collect();
        post(
            engine.http_addr,
            "/v1/completions",
            &json!({"prompt": prompt, "max_tokens": 1}),
        );
    };
    store(300);
    engine.fault(Fault {
        count: 2,
        ..Fault::new(FaultKind::LoseEvents)
    });
    (0..3).for_each(|at| store(400 + at * 100));
    let seqs = [
        batch(&subscriber.message()).1,
        batch(&subscriber.message()).1,
    ];
    assert_eq!(seqs, [0, 3]);
    let replayed = Peer::connect(engine.replay_addr.expect("bound"), "DEALER").replay(1);
    assert_eq!(
        replayed
            .iter()
            .map(|frames| batch(frames).1)
            .collect::<Vec<_>>(),
        [1, 2, 3]
    );
}

#[test]
fn an_engine_in_a_library_dies_alone_and_its_port_is_free() {
    let mut engine = engine();
    let (_, answer) = stream_with(&engine, after(FaultKind::Die, 3));
    let answer = answer.expect("a head");
    assert!(!answer.complete && answer.chunks.len() <= 3);
    assert!(engine.is_dead());
    wait_for(|| TcpStream::connect(engine.http_addr).is_err());
    engine.stop();
    let again = SimEngine::start(Config {
        port: engine.http_addr.port(),
        ..Config::recorded()
    })
    .expect("start again");
    assert_eq!(
        ask(again.http_addr, "GET", "/ping", b"").status_line,
        "HTTP/1.1 200 OK"
    );
}

/// The binary, and where it serves HTTP.
fn spawn() -> (Child, SocketAddr) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_outrigger-sim-engine"))
        .args([
            "--port",
            "0",
            "--events-port",
            "0",
            "--profile",
            "vllm-0.32",
        ])
        .args(["--model", "m"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("spawn");
    let mut line = String::new();
    let out = child.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a line");
    let told: Value = serde_json::from_str(&line).expect("json");
    let addr = told["http"].as_str().expect("address");
    (child, addr.parse().expect("address"))
}

#[test]
fn the_binary_dies_with_137() {
    let (mut child, addr) = spawn();
    let models = ask(addr, "GET", "/v1/models", b"").json();
    assert_eq!(models["data"][0]["id"], "m");
    let mut client = Client::connect(addr);
    client.send("POST", "/sim/fault", &[], br#"{"kind":"die"}"#);
    assert!(client.answer().is_err(), "a dead process answered");
    assert_eq!(child.wait().expect("status").code(), Some(137));
}

/// The last two events of a body.
fn tail(body: &str) -> Vec<&str> {
    body.trim_end().rsplit("\n\n").take(2).collect()
}

#[test]
fn on_sigterm_streams_end_as_recorded_and_the_binary_exits_with_0() {
    let (mut child, addr) = spawn();
    let mut client = Client::connect(addr);
    let request = body(true, 5000).to_string();
    client.send("POST", "/v1/completions", &[], request.as_bytes());
    let mut answer = client.head().expect("head");
    answer
        .chunks
        .push(client.chunk().expect("a chunk").expect("a token"));
    send_signal(child.id(), "TERM");
    while let Some(chunk) = client.chunk().expect("a clean end") {
        answer.chunks.push(chunk);
    }
    let recorded = include_str!("../../fixtures/failures/api_sigterm_midstream.body");
    assert_eq!(tail(&answer.body()), tail(recorded));
    assert_eq!(child.wait().expect("status").code(), Some(0));
}

#[test]
fn when_its_core_dies_every_stream_ends_in_band_and_health_says_so_until_the_end() {
    let engine = engine();
    let mut clients: Vec<Client> = (0..3)
        .map(|_| {
            let mut client = Client::connect(engine.http_addr);
            let request = body(true, 1000).to_string();
            client.send("POST", "/v1/completions", &[], request.as_bytes());
            client
        })
        .collect();
    wait_for(|| engine.load().1 == 3);
    let fault = Fault::new(FaultKind::CoreDies);
    engine.fault(Fault {
        for_ms: 700,
        ..fault
    });
    let health = ask(engine.http_addr, "GET", "/health", b"");
    assert_eq!(health.status_line, "HTTP/1.1 503 Service Unavailable");
    let refused = post(engine.http_addr, "/v1/completions", &body(false, 2));
    assert_eq!(refused.status_line, "HTTP/1.1 500 Internal Server Error");
    let recorded = include_str!("../../fixtures/failures/worker_sigkill_midstream.body");
    for client in &mut clients {
        let answer = client.answer().expect("an answer");
        assert!(answer.complete);
        assert_eq!(tail(&answer.body()), tail(recorded));
    }
    wait_for(|| TcpStream::connect(engine.http_addr).is_err());
}

#[test]
fn a_client_that_leaves_aborts_its_request_and_is_not_counted_as_a_success() {
    let engine = engine();
    for stream in [true, false] {
        let mut client = Client::connect(engine.http_addr);
        client.send(
            "POST",
            "/v1/completions",
            &[],
            body(stream, 1000).to_string().as_bytes(),
        );
        wait_for(|| engine.load().1 == 1);
        let left = Instant::now();
        drop(client);
        wait_for(|| engine.load().1 == 0);
        assert!(
            left.elapsed() < Duration::from_secs(2),
            "{:?}",
            left.elapsed()
        );
    }
    assert_eq!(
        metric(
            engine.http_addr,
            "vllm:request_success_total{engine=\"0\",finished_reason=\"length\""
        ),
        0.0
    );
}

#[test]
fn ids_come_from_the_client_and_are_refused_while_in_use() {
    let engine = engine();
    let ask_as = |id: &str, path: &str, body: &Value| {
        let mut client = Client::connect(engine.http_addr);
        client.send(
            "POST",
            path,
            &[("X-Request-Id", id)],
            body.to_string().as_bytes(),
        );
        client
    };
    let mut first = ask_as("abc", "/v1/completions", &body(true, 1000));
    first.head().expect("head");
    let refused = ask_as("abc", "/v1/completions", &body(false, 1))
        .answer()
        .expect("an answer");
    assert_eq!(refused.status_line, "HTTP/1.1 400 Bad Request");
    assert_eq!(refused.json()["error"]["type"], "BadRequestError");
    drop(first);
    wait_for(|| engine.load().1 == 0);
    let again = ask_as("abc", "/v1/completions", &body(false, 1))
        .answer()
        .expect("an answer");
    assert_eq!(again.json()["id"], "cmpl-abc");
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    let chat = ask_as("abc", "/v1/chat/completions", &chat)
        .answer()
        .expect("an answer");
    assert_eq!(chat.json()["id"], "chatcmpl-abc");
}

#[test]
fn connections_are_kept_and_an_idle_one_is_closed_after_five_seconds() {
    let engine = engine();
    let mut client = Client::connect(engine.http_addr);
    for path in ["/health", "/version", "/nope"] {
        client.send("GET", path, &[], b"");
        assert!(client.answer().expect("an answer").complete);
    }
    let idle = Instant::now();
    assert_eq!(client.end().expect("a clean close"), 0);
    let idle = idle.elapsed();
    assert!(
        idle >= Duration::from_millis(4900) && idle < Duration::from_secs(7),
        "{idle:?}"
    );
    let mut client = Client::connect(engine.http_addr);
    client.send("GET", "/health", &[("connection", "close")], b"");
    let answer = client.answer().expect("an answer");
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(client.end().expect("a clean close"), 0);
}

#[test]
fn request_bodies_may_be_chunked_and_continued_and_nonsense_is_refused() {
    let engine = engine();
    let mut client = Client::connect(engine.http_addr);
    client.raw(b"POST /detokenize HTTP/1.1\r\nHost: e\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(
        client.head().expect("an interim answer").status_line,
        "HTTP/1.1 100 Continue"
    );
    client.raw(b"b\r\n{\"tokens\": \r\n5;x=y\r\n[300]\r\n1\r\n}\r\n0\r\ntrailer: x\r\n\r\n");
    assert!(client.answer().expect("an answer").json()["prompt"].is_string());
    let mut client = Client::connect(engine.http_addr);
    client.raw(b"\x16\x03\x01\x02\x00\x01\x00 nonsense\r\n\r\n");
    let refused = client.head().expect("an answer");
    assert_eq!(refused.status_line, "HTTP/1.1 400 Bad Request");
}

#[test]
fn a_key_guards_the_api_and_nothing_else() {
    let config = Config {
        api_key: Some("secret".to_owned()),
        ..Config::recorded()
    };
    let engine = SimEngine::start(config).expect("start");
    let refused = ask(engine.http_addr, "GET", "/v1/models", b"");
    assert_eq!(
        (refused.status_line.as_str(), refused.body().as_str()),
        ("HTTP/1.1 401 Unauthorized", r#"{"error":"Unauthorized"}"#)
    );
    assert_eq!(
        ask(engine.http_addr, "GET", "/metrics", b"").status_line,
        "HTTP/1.1 200 OK"
    );
    let mut client = Client::connect(engine.http_addr);
    client.send(
        "GET",
        "/v1/models",
        &[("authorization", "Bearer secret")],
        b"",
    );
    assert_eq!(
        client.answer().expect("an answer").status_line,
        "HTTP/1.1 200 OK"
    );
}

#[test]
fn stop_strings_and_token_limits_end_a_generation() {
    let engine = engine();
    let whole = post(engine.http_addr, "/v1/completions", &body(false, 40)).json();
    let text = whole["choices"][0]["text"].as_str().expect("text");
    let word = text.split(' ').nth(10).expect("a word");
    let until = text.find(word).expect("found");
    for stream in [false, true] {
        let mut body = body(stream, 40);
        body["stop"] = json!([word]);
        let answer = post(engine.http_addr, "/v1/completions", &body);
        let (told, last) = if stream {
            let events = answer.events();
            let text: String = events
                .iter()
                .filter_map(|event| event["choices"][0]["text"].as_str())
                .collect();
            (text, events.last().expect("an event")["choices"][0].clone())
        } else {
            let choice = answer.json()["choices"][0].clone();
            (choice["text"].as_str().expect("text").to_owned(), choice)
        };
        assert_eq!(told, text[..until]);
        assert_eq!(
            (&last["finish_reason"], &last["stop_reason"]),
            (&json!("stop"), &json!(word))
        );
    }
}

#[test]
fn load_counts_streams_when_it_is_told_to() {
    let config = Config {
        server_load_tracking: true,
        ..Config::recorded()
    };
    let engine = SimEngine::start(config).expect("start");
    let mut client = Client::connect(engine.http_addr);
    client.send(
        "POST",
        "/v1/completions",
        &[],
        body(true, 1000).to_string().as_bytes(),
    );
    client.head().expect("head");
    let load = || ask(engine.http_addr, "GET", "/load", b"").json()["server_load"].clone();
    assert_eq!(load(), 1);
    drop(client);
    wait_for(|| load() == 0);
}
