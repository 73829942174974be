//! The cells of the book's table of engines whose streams begin anew while nothing was delivered, and else end and say how far they got.

use super::support::{Story, story};
use outrigger_conformance::{
    harness::{Conn, Exchange, ProxyBuilder, TestProxy, Upstream, Version},
    sim::{Config, Fault, FaultKind, Profile, SimEngine},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn body(path: &str, model: &str) -> String {
    let mut body = json!({"model": model, "stream": true, "temperature": 0, "max_tokens": 40, "ignore_eos": true,
        "stream_options": {"include_usage": true}});
    match path {
        CHAT => body["messages"] = json!([{"role": "user", "content": "Paint the sky."}]),
        _ => body["prompt"] = json!("One day a robot"),
    }
    body.to_string()
}

async fn ask(proxy: &TestProxy, path: &str, model: &str) -> Story {
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(path, body(path, model)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(
        reply.text().ends_with("data: [DONE]\n\n"),
        "{}",
        reply.text()
    );
    story(&reply.text())
}

/// What the error event of a stream says that got so far.
fn check_end(got: Story, tokens: std::ops::RangeInclusive<u64>, cell: &str) {
    let error = got.error.unwrap_or_else(|| panic!("{cell}: it is whole"));
    let told = error["message"].as_str().unwrap();
    assert!(
        told.ends_with("go on elsewhere: no_token_ids"),
        "{cell}: {told}"
    );
    let (_, rest) = told.split_once("broke after ").unwrap();
    let far: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!(tokens.contains(&far), "{cell}: {told}");
}

/// Streams break at every engine before their first token, and behind some.
async fn check(profiles: &[Profile]) {
    for path in [CHAT, COMPLETIONS] {
        let cell = format!("{profiles:?} {path}");
        let start = |profile: &Profile| {
            let config = Config {
                profile: *profile,
                decode_itl_ms: 1.0,
                ..Config::default()
            };
            SimEngine::start(config).unwrap()
        };
        let engines: Vec<_> = profiles.iter().map(start).collect();
        let add =
            |builder: ProxyBuilder, engine: &SimEngine| builder.flag("--engine", &engine.url());
        let proxy = engines.iter().fold(ProxyBuilder::new(), add).start();
        proxy.wait_alive(engines.len()).await;
        let whole = ask(&proxy, path, "sim").await;
        assert_eq!(whole.problem(), None, "{cell}");
        // A third death would be poison.
        for engine in &engines[..2] {
            engine.fault(Fault::new(FaultKind::Reset));
        }
        let anew = ask(&proxy, path, "sim").await;
        assert_eq!(anew.problem(), None, "{cell}");
        assert_eq!(
            (&anew.text, &anew.finish),
            (&whole.text, &whole.finish),
            "{cell}"
        );
        for engine in &engines {
            engine.disarm();
            engine.fault(Fault {
                after_tokens: 9,
                ..Fault::new(FaultKind::Reset)
            });
        }
        let got = ask(&proxy, path, "sim").await;
        assert!(
            whole.text.starts_with(&got.text) && !got.text.is_empty(),
            "{cell}"
        );
        // Pieces of a character have no event of their own.
        check_end(got, 5..=9, &cell);
    }
}

#[tokio::test]
async fn streams_of_tensorrt_llm_begin_anew_or_end() {
    check(&[Profile::Trtllm, Profile::Trtllm, Profile::Trtllm]).await;
}

#[tokio::test]
async fn a_fleet_with_tensorrt_llm_among_them_does_as_that() {
    check(&[Profile::Vllm, Profile::Trtllm]).await;
    check(&[Profile::Sglang, Profile::Trtllm]).await;
}

fn chunk(path: &str, text: &str, finish: &Value) -> String {
    let mut choice = json!({"index": 0, "finish_reason": finish});
    match path {
        CHAT => choice["delta"] = json!({"content": text}),
        _ => choice["text"] = json!(text),
    }
    json!({"id": "c", "object": "o", "created": 1, "model": "m", "choices": [choice]}).to_string()
}

/// Servers of a kind that nobody knows. The first to be asked breaks off behind so many events.
async fn unknown(path: &'static str, events: usize) -> (Vec<Upstream>, TestProxy) {
    let asked = Arc::new(AtomicUsize::new(0));
    let mut servers = Vec::new();
    for _ in 0..2 {
        let asked = asked.clone();
        let serve = move |mut conn: Conn, _: Exchange| {
            let first = asked.fetch_add(1, SeqCst) == 0;
            async move {
                conn.begin_events().await;
                let told = [("", Value::Null), ("a", Value::Null), ("b", json!("stop"))];
                for (at, (text, finish)) in told.into_iter().enumerate() {
                    if first && at == events {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        return None;
                    }
                    conn.event(&chunk(path, text, &finish)).await;
                }
                conn.event("[DONE]").await;
                conn.end().await.then_some(conn)
            }
        };
        servers.push(Upstream::engine(serve).await);
    }
    let add = |builder: ProxyBuilder, server: &Upstream| builder.server(server.address);
    let proxy = servers.iter().fold(ProxyBuilder::new(), add).start();
    (servers, proxy)
}

#[tokio::test]
async fn streams_of_unknown_engines_begin_anew_or_end() {
    for path in [CHAT, COMPLETIONS] {
        let (servers, proxy) = unknown(path, 1).await;
        let got = ask(&proxy, path, "m").await;
        assert_eq!((got.problem(), got.text.as_str()), (None, "ab"), "{path}");
        let tried: usize = servers.iter().map(|server| server.exchanges().len()).sum();
        assert_eq!(tried, 2, "{path}");
        let (_servers, proxy) = unknown(path, 2).await;
        let got = ask(&proxy, path, "m").await;
        assert_eq!(got.text, "a", "{path}");
        check_end(got, 1..=1, path);
    }
}
