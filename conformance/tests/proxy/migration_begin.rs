//! Streams whose response engines fail to begin while others break: what is called again, how long, and what not.

use super::support::story;
use outrigger_conformance::{
    harness::{Conn, OneChain, ProxyBuilder, Reply, TestProxy, Upstream, Version},
    sim::{Config, SimEngine},
};
use outrigger_proxy::bootstrap::OUTBOUND;
use serde_json::json;
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const CHAT: &str = "/v1/chat/completions";
const OPENING: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
const LAST: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}"#;
/// Limit of the whole exchange, in the case that has one.
const TOTAL_MS: u64 = 1000;

/// One engine, whose chats are answered by the case. Another one, of another model, dies: there is a storm.
struct Case {
    proxy: TestProxy,
    asked: Arc<AtomicUsize>,
    /// Until it died.
    other: Option<SimEngine>,
    _server: Upstream,
}

impl Case {
    /// In a storm.
    async fn of<F>(
        total_ms: u64,
        chat: impl Fn(Conn, usize) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Option<Conn>> + Send + 'static,
    {
        let mut case = Self::calm(total_ms, chat).await;
        case.other = None;
        case.proxy.wait_alive(1).await;
        case
    }

    /// Before it.
    async fn calm<F>(
        total_ms: u64,
        chat: impl Fn(Conn, usize) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Option<Conn>> + Send + 'static,
    {
        let asked = Arc::<AtomicUsize>::default();
        let count = asked.clone();
        let server = Upstream::engine(move |mut conn, got| {
            let (chat, count) = (chat.clone(), count.clone());
            async move {
                if got.path() != CHAT {
                    return conn.json("200 OK", "{}").await.then_some(conn);
                }
                chat(conn, count.fetch_add(1, SeqCst)).await
            }
        })
        .await;
        let config = Config {
            model: "another".into(),
            ..Config::default()
        };
        let dies = SimEngine::start(config).unwrap();
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .engine(dies.http_addr)
            .edit(move |bootstrap| {
                let outbound = bootstrap.listeners.iter_mut();
                let outbound = outbound.filter(|listener| listener.name == OUTBOUND);
                for filter in outbound.flat_map(|listener| listener.http().http_filters.iter_mut())
                {
                    if filter.name == "openai" {
                        filter.config.value["total_timeout_ms"] = total_ms.into();
                    }
                }
            })
            .start();
        proxy.wait_alive(2).await;
        Self {
            proxy,
            asked,
            other: Some(dies),
            _server: server,
        }
    }

    async fn ask(&self) -> Reply {
        let messages = json!([{"role": "user", "content": "Hi."}]);
        let body = json!({"model": "sim", "stream": true, "messages": messages});
        let mut client = self.proxy.client(Version::H1).await;
        client.post(CHAT, body.to_string()).await
    }

    fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }
}

/// What it refused holds none of its connections while it is asked again.
#[tokio::test]
async fn a_refused_answer_is_let_go_before_the_next_call() {
    let (open, most) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let seen = most.clone();
    let case = Case::of(0, move |mut conn, before| {
        let (open, most) = (open.clone(), most.clone());
        async move {
            most.fetch_max(open.fetch_add(1, SeqCst) + 1, SeqCst);
            if before < 2 {
                let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 100\r\n\r\nbusy";
                conn.write(head).await;
                conn.gone().await;
                open.fetch_sub(1, SeqCst);
                return None;
            }
            conn.begin_events().await;
            conn.event(OPENING).await;
            conn.event(LAST).await;
            conn.event("[DONE]").await;
            conn.end().await.then_some(conn)
        }
    })
    .await;
    let got = story(&case.ask().await.text());
    assert_eq!((got.problem(), got.text.as_str()), (None, "b"));
    assert_eq!((case.asked(), seen.load(SeqCst)), (3, 1));
}

/// Whether an engine that dies closes its connections in order, or the system cuts them, says nothing of the request.
#[tokio::test]
async fn an_orderly_end_behind_the_head_is_a_break() {
    let case = Case::of(0, |mut conn, before| async move {
        conn.begin_events().await;
        if before < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            return None;
        }
        conn.event(OPENING).await;
        conn.event(LAST).await;
        conn.event("[DONE]").await;
        conn.end().await.then_some(conn)
    })
    .await;
    let got = story(&case.ask().await.text());
    assert_eq!((got.problem(), got.text.as_str()), (None, "b"));
    assert_eq!(case.asked(), 3);
}

/// The first engine that breaks is this stream's; that it was the first of many shows a little later.
#[tokio::test]
async fn a_storm_that_begins_with_a_request_is_waited_for() {
    let chat = |mut conn: Conn, before| async move {
        if before == 0 {
            return None;
        }
        conn.begin_events().await;
        conn.event(OPENING).await;
        conn.event(LAST).await;
        conn.event("[DONE]").await;
        conn.end().await.then_some(conn)
    };
    let mut case = Case::calm(0, chat).await;
    let other = case.other.take();
    let dies = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(other);
    };
    let (reply, ()) = tokio::join!(case.ask(), dies);
    let got = story(&reply.text());
    assert_eq!((got.problem(), got.text.as_str()), (None, "b"));
    assert_eq!(case.asked(), 2);
}

/// Where nothing else breaks the client is told, a little later.
#[tokio::test]
async fn a_calm_that_lasts_ends_a_request_that_an_engine_died_of() {
    let case = Case::calm(0, |_, _| async { None }).await;
    let begun = Instant::now();
    let reply = case.ask().await;
    assert_eq!((reply.status.as_u16(), case.asked()), (503, 1));
    assert!(begun.elapsed() >= Duration::from_secs(3));
}

#[tokio::test]
async fn who_is_overloaded_is_not_asked_again() {
    let case = Case::of(0, |mut conn, _| async move {
        let head = "HTTP/1.1 503 Service Unavailable\r\nx-envoy-overloaded: true\r\ncontent-length: 0\r\n\r\n";
        conn.write(head).await.then_some(conn)
    })
    .await;
    let reply = case.ask().await;
    assert_eq!((reply.status.as_u16(), case.asked()), (503, 1));
}

#[tokio::test]
async fn the_limit_of_the_whole_exchange_ends_the_calls() {
    let case = Case::of(TOTAL_MS, |_, _| async { None }).await;
    let begun = Instant::now();
    let reply = case.ask().await;
    let took = begun.elapsed();
    assert_eq!(reply.status, 504, "{}", reply.text());
    assert!(case.asked() > 2, "{}", case.asked());
    let limit = Duration::from_millis(TOTAL_MS);
    assert!((limit..3 * limit).contains(&took), "{took:?}");
}
