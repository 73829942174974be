//! What becomes of a request whose reused connection ends before an answer?

use futures_util::future::join_all;
use outrigger_conformance::harness::{
    Client, Conn, OneChain, ProxyBuilder, TestProxy, Upstream, Version,
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const CHAT: &str = "/v1/chat/completions";
const WHOLE: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
/// Well past the moment in which a connection may turn out to be closed.
const AT_WORK: Duration = Duration::from_millis(500);

/// Answers the first request of each connection and hangs up on the second, `after` it came.
async fn hangs_up_on_the_second(after: Duration) -> Upstream {
    let known: Arc<Mutex<HashSet<usize>>> = Arc::default();
    Upstream::start(move |mut conn: Conn, got| {
        let first = known.lock().unwrap().insert(got.connection);
        async move {
            if !first {
                tokio::time::sleep(after).await;
                return None;
            }
            // Long enough for several to run at once, each on a connection of its own.
            tokio::time::sleep(Duration::from_millis(30)).await;
            conn.json("200 OK", r#"{"id":1}"#).await.then_some(conn)
        }
    })
    .await
}

/// A generation, or a call without a body.
async fn ask(proxy: &TestProxy, path: &str) -> u16 {
    let reply = match path {
        CHAT => proxy.client(Version::H1).await.post(path, WHOLE).await,
        _ => Client::get(proxy.outbound(), path).await,
    };
    reply.status.as_u16()
}

/// A proxy of one worker, with `count` connections open to the servers.
async fn warmed(servers: &[&Upstream], count: usize) -> TestProxy {
    let proxy = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    let proxy = proxy.concurrency(1).start();
    let asked = join_all((0..count).map(|_| ask(&proxy, "/other"))).await;
    assert_eq!(asked, vec![200; count]);
    proxy
}

#[tokio::test]
async fn a_closed_idle_connection_is_replaced_by_a_new_one_unnoticed() {
    for path in ["/other", CHAT] {
        let server = hangs_up_on_the_second(Duration::ZERO).await;
        // Of three idle connections none is any good.
        let proxy = warmed(&[&server], 3).await;
        assert_eq!(ask(&proxy, path).await, 200, "{path}");
        let stale = "outrigger_upstream_stale_connections_total";
        assert!(proxy.metric(stale, "").await >= 1.0, "{path}");
        let ids: HashSet<_> = server
            .exchanges()
            .iter()
            .map(|got| got.header("x-request-id").to_owned())
            .collect();
        assert_eq!(
            ids.len() == server.exchanges().len(),
            path == CHAT,
            "each attempt of a generation has its own id, and only of one"
        );
    }
}

#[tokio::test]
async fn a_request_under_work_on_a_reused_connection_is_not_sent_twice() {
    let server = hangs_up_on_the_second(AT_WORK).await;
    let proxy = warmed(&[&server], 1).await;
    assert_eq!(ask(&proxy, "/other").await, 503);
    assert_eq!(
        server.exchanges().len(),
        2,
        "one to warm up, one that failed"
    );
    let line = proxy.log(2).await.pop().unwrap();
    assert_eq!(line["response_flags"], "UC", "{line}");
}

#[tokio::test]
async fn a_request_that_was_answered_in_part_on_a_reused_connection_is_not_sent_twice() {
    for part in [
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-le",
    ] {
        let known: Arc<Mutex<HashSet<usize>>> = Arc::default();
        let server = Upstream::start(move |mut conn: Conn, got| {
            let first = known.lock().unwrap().insert(got.connection);
            async move {
                if first {
                    return conn.json("200 OK", "{}").await.then_some(conn);
                }
                conn.write(part).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
                None
            }
        })
        .await;
        let proxy = warmed(&[&server], 1).await;
        assert_eq!(ask(&proxy, "/other").await, 503, "{part}");
        assert_eq!(
            server.exchanges().len(),
            2,
            "one to warm up, one that the upstream had begun to answer: {part}"
        );
        let line = proxy.log(2).await.pop().unwrap();
        assert_eq!(line["response_flags"], "UC", "{line}");
    }
}

#[tokio::test]
async fn a_generation_lost_on_a_reused_connection_is_counted_as_a_retry() {
    let one = hangs_up_on_the_second(AT_WORK).await;
    let two = Upstream::named("b").await;
    let proxy = warmed(&[&one, &two], 2).await;
    for _ in 0..2 {
        assert_eq!(ask(&proxy, CHAT).await, 200);
    }
    assert!(proxy.metric("outrigger_retries_total", "UC").await >= 1.0);
    assert_eq!(
        one.exchanges().len(),
        2,
        "one to warm up, one that was lost"
    );
}

#[tokio::test]
async fn a_client_that_was_served_and_asks_no_more_is_closed_and_a_long_answer_is_not() {
    let server = Upstream::start(|mut conn, _| async move {
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n";
        conn.write(head).await;
        for byte in ["l", "o", "n", "g"] {
            tokio::time::sleep(Duration::from_millis(150)).await;
            conn.write(byte).await;
        }
        Some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            for listener in &mut bootstrap.listeners {
                listener.http().idle_timeout = Duration::from_millis(300);
            }
        })
        .start();
    let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
    for _ in 0..2 {
        // The next request is half sent for a while: that is no rest either.
        socket.write_all(b"GET /x HTTP/1.1\r\nho").await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        socket.write_all(b"st: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nlong") {
            let count = socket.read_buf(&mut answer).await.unwrap();
            assert!(count > 0, "cut: {}", String::from_utf8_lossy(&answer));
        }
    }
    let began = Instant::now();
    let read = tokio::time::timeout(Duration::from_secs(10), socket.read(&mut [0; 8])).await;
    assert_eq!(read.expect("it is closed").unwrap_or_default(), 0);
    assert!(
        began.elapsed() >= Duration::from_millis(250),
        "{:?}",
        began.elapsed()
    );
    let closed = proxy
        .metric("envoy_http_downstream_cx_idle_timeout", "")
        .await;
    // Of all proxies in this process.
    assert!(closed >= 1.0, "{closed}");
}
