//! The cells of the book's table of engines that tell no ids: streams begin anew while nothing was delivered; later they do if
//! they are determined, and are compared by their text; else they end and say how far they got.

use super::support::{Story, story};
use outrigger_conformance::{
    harness::{Client, Conn, Exchange, ProxyBuilder, TestProxy, Upstream, Version, request},
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

/// Of a stream that is the same from the beginning, or is drawn.
fn body(path: &str, model: &str, temperature: u8) -> String {
    let mut body = json!({"model": model, "stream": true, "temperature": temperature, "max_tokens": 40, "ignore_eos": true,
        "stream_options": {"include_usage": true}});
    match path {
        CHAT => body["messages"] = json!([{"role": "user", "content": "Paint the sky."}]),
        _ => body["prompt"] = json!("One day a robot"),
    }
    body.to_string()
}

async fn ask(proxy: &TestProxy, path: &str, model: &str) -> Story {
    ask_at(proxy, path, model, 0).await
}

async fn ask_at(proxy: &TestProxy, path: &str, model: &str, temperature: u8) -> Story {
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(path, body(path, model, temperature)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(
        reply.text().ends_with("data: [DONE]\n\n"),
        "{}",
        reply.text()
    );
    story(&reply.text())
}

/// Tokens by the engine's count.
fn made(story: &Story) -> &Value {
    &story.usage["completion_tokens"]
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

/// The next stream at each of them breaks behind nine tokens.
async fn break_all(engines: &[SimEngine]) {
    for engine in engines {
        let mut client = Client::connect(engine.http_addr, Version::H1).await;
        client
            .send(request(http::Method::DELETE, "/sim/fault", ""))
            .await;
        engine.fault(Fault {
            after_tokens: 9,
            ..Fault::new(FaultKind::Reset)
        });
    }
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
        break_all(&engines).await;
        let got = ask(&proxy, path, "sim").await;
        assert_eq!(got.problem(), None, "{cell}");
        assert_eq!(
            (&got.text, made(&got)),
            (&whole.text, made(&whole)),
            "{cell}"
        );
        break_all(&engines).await;
        let got = ask_at(&proxy, path, "sim", 1).await;
        assert!(!got.text.is_empty(), "{cell}");
        // Pieces of a character have no event of their own.
        check_end(got, 5..=9, &cell);
    }
}

#[tokio::test]
async fn streams_of_tensorrt_llm_begin_anew_and_are_compared() {
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
    // As engines do, the id first.
    format!(r#"{{"id":"c","object":"o","created":1,"model":"m","choices":[{choice}]}}"#)
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
        assert_eq!((got.problem(), got.text.as_str()), (None, "ab"), "{path}");
        let (_servers, proxy) = unknown(path, 2).await;
        let got = ask_at(&proxy, path, "m", 1).await;
        assert_eq!(got.text, "a", "{path}");
        check_end(got, 1..=1, path);
    }
}
