//! Requests that break engines of split fleets, and those of which a leg comes to nothing after its head.

use super::disaggregation::{CHAT, always, chat, disaggregation};
use super::{disaggregation as vllm, disaggregation_sglang as sglang, support::story};
use outrigger_conformance::{
    harness::{Client, Conn, Exchange, ProxyBuilder, Reply, TestProxy, Upstream, Version},
    sim::{Side, SimEngine},
};
use serde_json::json;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

const OPENING: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
const LAST: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}"#;

/// What the engine behind it says to all but chats.
async fn relayed(mut conn: Conn, got: &Exchange, engine: SocketAddr) -> Option<Conn> {
    let reply = match got.line.starts_with("GET ") {
        true => Client::get(engine, got.path()).await,
        false => {
            let mut client = Client::connect(engine, Version::H1).await;
            client.post(got.path(), got.body.clone()).await
        }
    };
    let (status, kind) = (reply.status.to_string(), reply.header("content-type"));
    let answered = conn.answer(&status, kind, &reply.text()).await;
    answered.then_some(conn)
}

/// An engine that any chat breaks, for good, once the head of its answer is out.
async fn frail(engine: &SimEngine, broken: Arc<AtomicUsize>) -> Upstream {
    let (address, dead) = (engine.http_addr, Arc::<AtomicBool>::default());
    Upstream::start(move |mut conn, got| {
        let (broken, dead) = (broken.clone(), dead.clone());
        async move {
            if dead.load(SeqCst) {
                return None;
            }
            if got.path() != CHAT {
                return relayed(conn, &got, address).await;
            }
            conn.begin_events().await;
            conn.event(OPENING).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            broken.fetch_add(1, SeqCst);
            dead.store(true, SeqCst);
            None
        }
    })
    .await
}

/// What a chat is told that breaks these, with `others` beside them: three of them, and no more.
async fn three_break(engines: &[SimEngine], others: &[SimEngine], roles: [&str; 2]) -> Reply {
    let broken = Arc::<AtomicUsize>::default();
    let mut builder = ProxyBuilder::new().flag("--policy", "kv");
    let mut servers = Vec::new();
    for engine in engines {
        let server = frail(engine, broken.clone()).await;
        let url = format!("http://{}{}", server.address, roles[0]);
        builder = builder.flag("--engine", &url);
        servers.push(server);
    }
    for engine in others {
        builder = builder.flag("--engine", &format!("{}{}", engine.url(), roles[1]));
    }
    let proxy = builder.edit(disaggregation(always(json!({})))).start();
    proxy.wait_alive(engines.len() + others.len()).await;
    let mut client = proxy.client(Version::H1).await;
    let body = chat(1, &json!({"stream": true})).to_string();
    let reply = client.post(CHAT, body).await;
    assert_eq!(broken.load(SeqCst), 3, "{}", reply.text());
    reply
}

#[tokio::test]
async fn a_poison_breaks_three_halves_of_sglang() {
    for (side, other) in [(Side::Prefill, Side::Decode), (Side::Decode, Side::Prefill)] {
        let engines: Vec<_> = (0..5).map(|_| sglang::start(sglang::half(side))).collect();
        let others: Vec<_> = (0..2).map(|_| sglang::start(sglang::half(other))).collect();
        let reply = three_break(&engines, &others, ["", ""]).await;
        assert_eq!(reply.status, 422, "{}", reply.text());
        let message = &reply.json()["error"]["message"];
        let message = message.as_str().unwrap();
        assert!(message.starts_with("poison: 3 engines died"), "{message}");
    }
}

#[tokio::test]
async fn a_poison_breaks_three_engines_that_decode() {
    let start = |count| (0..count).map(|_| vllm::engine(vllm::config()));
    let (decode, prefill): (Vec<_>, Vec<_>) = (start(5).collect(), start(2).collect());
    let reply = three_break(&decode, &prefill, [";role=decode", ";role=prefill"]).await;
    // The second of them was to serve it whole, and its head went out.
    let error = story(&reply.text()).error.unwrap();
    let message = error["message"].as_str().unwrap();
    assert!(message.ends_with("elsewhere: poison"), "{message}");
}

/// A half for decode that breaks once and says nothing a few times, each time after the head of its answer.
async fn mute(engine: &SimEngine, empty: usize, asked: Arc<AtomicUsize>) -> Upstream {
    let address = engine.http_addr;
    Upstream::start(move |mut conn, got| {
        let asked = asked.clone();
        async move {
            if got.path() != CHAT {
                return relayed(conn, &got, address).await;
            }
            let before = asked.fetch_add(1, SeqCst);
            conn.begin_events().await;
            conn.event(OPENING).await;
            if before == 0 {
                return None;
            }
            if before > empty {
                conn.event(LAST).await;
            }
            conn.event("[DONE]").await;
            conn.end().await.then_some(conn)
        }
    })
    .await
}

#[tokio::test]
async fn halves_that_fail_after_their_head_are_done_without_as_those_before_it() {
    for (empty, status) in [(2, 200), (3, 503)] {
        let prefill = sglang::start(sglang::half(Side::Prefill));
        let decode = sglang::start(sglang::half(Side::Decode));
        let asked = Arc::<AtomicUsize>::default();
        let server = mute(&decode, empty, asked.clone()).await;
        let proxy: TestProxy = ProxyBuilder::new()
            .flag("--policy", "kv")
            .flag("--engine", &format!("http://{}", server.address))
            .flag("--engine", &prefill.url())
            .edit(disaggregation(always(json!({}))))
            .start();
        proxy.wait_alive(2).await;
        let mut client = proxy.client(Version::H1).await;
        let body = chat(1, &json!({"stream": true})).to_string();
        let reply = client.post(CHAT, body).await;
        assert_eq!(reply.status, status, "{}", reply.text());
        assert_eq!(asked.load(SeqCst), 4, "one pair, and three others");
        if status == 200 {
            let got = story(&reply.text());
            assert_eq!((got.problem(), got.text.as_str()), (None, "b"));
        }
    }
}
