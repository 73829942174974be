//! Answers in one piece: how long they may take, and what ends them, is a cut, or is told where there is none.

use super::{
    migration::migration,
    migration_whole::{
        Break, CHAT, CHUNKED, WHOLE, answer, body, break_off, openai, proxy, servers, tried,
    },
};
use outrigger_conformance::harness::{Conn, Exchange, ProxyBuilder, Upstream, Version};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

#[tokio::test]
async fn engines_that_die_before_a_byte_make_it_no_suspect() {
    // Each request loses its first two engines; were it then to run alone, they would wait for one another.
    let lost = Arc::new(Mutex::new(HashMap::<String, u32>::new()));
    let mut servers = Vec::new();
    for _ in 0..8 {
        let lost = lost.clone();
        let serve = move |conn: Conn, got: Exchange| {
            let asked: Value = serde_json::from_slice(&got.body).unwrap();
            let user = asked["user"].as_str().unwrap().to_owned();
            let before = {
                let mut lost = lost.lock().unwrap();
                let count = lost.entry(user).or_default();
                *count += 1;
                *count - 1
            };
            async move {
                if before < 2 {
                    return break_off(conn, Break::NoByte).await;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
                answer(conn, false).await
            }
        };
        servers.push(Upstream::engine(serve).await);
    }
    let proxy = proxy(&servers, json!({}));
    let begun = Instant::now();
    let ask = async |user: usize| {
        let mut client = proxy.client(Version::H1).await;
        let more = json!({"user": user.to_string()});
        client.post(CHAT, body(CHAT, &more)).await
    };
    let replies = tokio::join!(ask(0), ask(1), ask(2), ask(3), ask(4), ask(5));
    let took = begun.elapsed();
    for reply in [
        replies.0, replies.1, replies.2, replies.3, replies.4, replies.5,
    ] {
        assert_eq!(
            (reply.status.as_u16(), reply.text()),
            (200, WHOLE.to_owned())
        );
    }
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test]
async fn an_engine_may_be_silent_behind_its_head_while_it_generates() {
    let mut servers = Vec::new();
    for _ in 0..2 {
        let serve = |mut conn: Conn, _: Exchange| async move {
            conn.write(CHUNKED).await;
            tokio::time::sleep(Duration::from_millis(700)).await;
            conn.chunk(WHOLE).await;
            conn.end().await.then_some(conn)
        };
        servers.push(Upstream::engine(serve).await);
    }
    let proxy = proxy(&servers, json!({"stall_ms": 100}));
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
    assert_eq!(reply.text(), WHOLE);
    assert_eq!(tried(&servers), 1, "nobody else was asked");
}

#[tokio::test]
async fn the_limit_of_first_tokens_holds_behind_the_head() {
    let servers = silent_servers().await;
    let builder = ProxyBuilder::new()
        .edit(migration(json!({"stall_ms": 60_000, "attempts_max": 1})))
        .edit(openai(json!({"first_token_timeout_ms": 300})));
    let add = |builder: ProxyBuilder, server: &Upstream| builder.server(server.address);
    let proxy = servers.iter().fold(builder, add).start();
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
    assert_eq!(reply.status, 504, "{}", reply.text());
    assert_eq!(tried(&servers), 2);
}

/// They send a head, and then nothing.
async fn silent_servers() -> Vec<Upstream> {
    let mut servers = Vec::new();
    for _ in 0..2 {
        let serve = |mut conn: Conn, _: Exchange| async move {
            conn.write(CHUNKED).await;
            conn.gone().await;
            None
        };
        servers.push(Upstream::engine(serve).await);
    }
    servers
}

#[tokio::test]
async fn the_limit_of_the_whole_exchange_holds_while_engines_are_looked_for() {
    let servers = servers(2, usize::MAX, Break::Length).await;
    let builder = ProxyBuilder::new()
        .edit(migration(json!({"attempts_max": 99, "stall_ms": 60_000})))
        .edit(openai(json!({"total_timeout_ms": 500})));
    let add = |builder: ProxyBuilder, server: &Upstream| builder.server(server.address);
    let proxy = servers.iter().fold(builder, add).start();
    let mut client = proxy.client(Version::H1).await;
    let begun = Instant::now();
    let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
    let took = begun.elapsed();
    assert_eq!(reply.status, 504, "{}", reply.text());
    assert!(
        took >= Duration::from_millis(500) && took < Duration::from_secs(5),
        "{took:?}"
    );
    let line = proxy.only_log().await;
    assert!(line["response_flags"] == "DT", "{line}");
}

#[tokio::test]
async fn only_whole_json_passes_where_nothing_else_tells_the_end() {
    let inner = &WHOLE[..WHOLE.find('}').unwrap() + 1];
    for (sent, whole) in [("", false), (inner, false), (WHOLE, true)] {
        let serve = move |mut conn: Conn, _: Exchange| async move {
            conn.write(format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{sent}"
            ))
            .await;
            None
        };
        let server = Upstream::engine(serve).await;
        let proxy = proxy(std::slice::from_ref(&server), json!({}));
        let mut client = proxy.client(Version::H1).await;
        let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
        let expected = if whole { 200 } else { 502 };
        assert_eq!(reply.status, expected, "{sent:?}: {}", reply.text());
        assert!(!whole || reply.text() == WHOLE, "{}", reply.text());
    }
}

#[tokio::test]
async fn what_the_last_engine_said_is_told_and_its_connection_is_not_kept() {
    const BUSY: &str = r#"{"error":{"message":"busy"}}"#;
    for ends in [true, false] {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut servers = Vec::new();
        for _ in 0..2 {
            let asked = asked.clone();
            let serve = move |mut conn: Conn, _: Exchange| {
                let first = asked.fetch_add(1, SeqCst) == 0;
                async move {
                    if first {
                        return break_off(conn, Break::Length).await;
                    }
                    if ends {
                        return conn
                            .json("500 Internal Server Error", BUSY)
                            .await
                            .then_some(conn);
                    }
                    conn.write(
                        "HTTP/1.1 500 Internal Server Error\r\ntransfer-encoding: chunked\r\n\r\n",
                    )
                    .await;
                    conn.chunk(BUSY).await;
                    conn.gone().await;
                    None
                }
            };
            servers.push(Upstream::engine(serve).await);
        }
        let proxy = proxy(&servers, json!({}));
        let mut client = proxy.client(Version::H1).await;
        let reply = client.post(CHAT, body(CHAT, &json!({}))).await;
        let text = if ends { BUSY } else { "" };
        let got = (reply.status.as_u16(), reply.text(), reply.broken);
        assert_eq!(got, (500, text.to_owned(), false));
    }
}
