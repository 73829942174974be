//! What once went wrong, by name.

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, StreamBody};
use outrigger_conformance::harness::{
    Client, Conn, OneChain, ProxyBuilder, TestProxy, Upstream, Version, eventually, raw, request,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{
    bootstrap::Bootstrap,
    listener::Codec,
    route::{Action, RetryPolicy, RouteAction},
};
use std::{
    convert::Infallible,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

const CHAT: &str = "/v1/chat/completions";
const WHOLE: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
const NAMELESS: &str = r#"{"messages":[{"role":"user","content":"hi"}]}"#;

/// An address where nobody listens, as long as the socket lives.
fn refused() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// Changes the one route of the outbound listener.
fn route(bootstrap: &mut Bootstrap, change: impl Fn(&mut RouteAction)) {
    for listener in bootstrap
        .listeners
        .iter_mut()
        .filter(|listener| listener.name == OUTBOUND)
    {
        for host in &mut listener.http().route_config.virtual_hosts {
            for route in &mut host.routes {
                if let Action::Route(action) = &mut route.action {
                    change(action);
                }
            }
        }
    }
}

/// An engine of unknown kind that answers everything that is asked of it.
async fn answering() -> Upstream {
    Upstream::engine(|mut conn, _| async move {
        conn.json("200 OK", r#"{"id":1}"#).await.then_some(conn)
    })
    .await
}

async fn post(proxy: &TestProxy, path: &str, body: &'static str) -> u16 {
    let mut client = proxy.client(Version::H1).await;
    client.post(path, body).await.status.as_u16()
}

#[tokio::test]
async fn what_names_no_model_stays_on_its_node_even_if_the_engine_there_is_dead() {
    let ((dead, _held), server) = (refused(), answering().await);
    let beside = ProxyBuilder::new().engine(server.address).start();
    let entry = ProxyBuilder::new()
        .engine(dead)
        .peer(beside.inbound())
        .start();
    entry.wait_alive(1).await;
    assert_eq!(post(&entry, CHAT, WHOLE).await, 200, "it names a model");
    assert_eq!(post(&entry, CHAT, NAMELESS).await, 503);
    assert_eq!(Client::get(entry.outbound(), "/health").await.status, 503);
    let gateway = ProxyBuilder::new().peer(beside.inbound()).start();
    gateway.wait_alive(1).await;
    assert_eq!(
        post(&gateway, CHAT, NAMELESS).await,
        200,
        "a gateway has no node"
    );
}

#[tokio::test]
async fn a_peers_overflow_is_reported_as_overflow_and_inhibits_nobody() {
    let slow = Upstream::engine(|mut conn, _| async move {
        tokio::time::sleep(Duration::from_millis(500)).await;
        conn.json("200 OK", "{}").await.then_some(conn)
    })
    .await;
    let beside = ProxyBuilder::new()
        .engine(slow.address)
        .edit(|bootstrap| {
            for cluster in &mut bootstrap.clusters {
                cluster.circuit_breakers.default.max_requests = 1;
            }
        })
        .start();
    let entry = ProxyBuilder::new().peer(beside.inbound()).start();
    entry.wait_alive(1).await;
    let mut client = entry.client(Version::H1).await;
    let running = tokio::spawn(async move { client.post(CHAT, WHOLE).await.status });
    eventually("the first runs", || async {
        let asked = slow.exchanges();
        asked.iter().any(|asked| asked.path() == CHAT).then_some(())
    })
    .await;
    let mut refused = entry.client(Version::H2).await;
    let reply = refused.post(CHAT, WHOLE).await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.header("x-outrigger-error"), "UO", "{}", reply.text());
    assert_eq!(running.await.unwrap(), 200);
}

#[tokio::test]
async fn an_upload_that_nobody_read_goes_to_another_engine_if_none_of_it_was_sent() {
    let ((dead, _held), good) = (refused(), answering().await);
    let proxy = ProxyBuilder::new()
        .server(dead)
        .server(good.address)
        .start();
    for _ in 0..4 {
        let mut upload = request(
            Method::POST,
            "/v1/audio/transcriptions",
            "--b\r\nsound\r\n--b--",
        );
        let form = "multipart/form-data; boundary=b".parse().unwrap();
        upload
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, form);
        let mut client = proxy.client(Version::H1).await;
        assert_eq!(client.send(upload).await.status, 200);
    }
    assert!(
        good.exchanges()
            .iter()
            .all(|got| got.body.starts_with(b"--b\r\nsound"))
    );
}

/// Answers 500 always.
async fn failing() -> Upstream {
    Upstream::start(|mut conn, _| async move {
        conn.json("500 Internal Server Error", "{}")
            .await
            .then_some(conn)
    })
    .await
}

fn policy(retries: u32, per_try: Duration) -> RetryPolicy {
    RetryPolicy {
        retry_on: vec!["5xx".into()],
        num_retries: retries,
        per_try_timeout: per_try,
        ..RetryPolicy::default()
    }
}

async fn asked_under(retries: u32, count: usize) -> usize {
    let mut servers = Vec::new();
    for _ in 0..count {
        servers.push(failing().await);
    }
    let proxy = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    let proxy = proxy
        .edit(move |bootstrap| {
            route(bootstrap, |action| {
                action.retry_policy = Some(policy(retries, Duration::ZERO))
            })
        })
        .start();
    assert_eq!(post(&proxy, CHAT, WHOLE).await, 500);
    servers.iter().map(|server| server.exchanges().len()).sum()
}

#[tokio::test]
async fn an_explicit_number_of_retries_is_neither_raised_nor_cut_to_the_number_of_endpoints() {
    assert_eq!(asked_under(0, 2).await, 1);
    assert_eq!(asked_under(2, 1).await, 3);
    assert_eq!(asked_under(2, 2).await, 3);
}

#[tokio::test]
async fn a_try_that_took_too_long_is_tried_elsewhere() {
    let silent = Upstream::start(|mut conn: Conn, _| async move {
        conn.gone().await;
        None
    })
    .await;
    let good = answering().await;
    let proxy = ProxyBuilder::new()
        .server(silent.address)
        .server(good.address)
        .edit(|bootstrap| {
            route(bootstrap, |action| {
                action.retry_policy = Some(policy(1, Duration::from_millis(200)))
            })
        })
        .start();
    for _ in 0..2 {
        assert_eq!(post(&proxy, CHAT, WHOLE).await, 200);
    }
    assert_eq!(silent.exchanges().len(), 1, "one of them began there");
}

#[tokio::test]
async fn a_route_timeout_is_for_the_whole_exchange_and_begins_when_the_upload_ends() {
    let server = Upstream::start(|mut conn, got| async move {
        if got.path() == "/upload" {
            return conn.json("200 OK", "{}").await.then_some(conn);
        }
        tokio::time::sleep(Duration::from_millis(700)).await;
        conn.write("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
            .await;
        conn.gone().await;
        None
    })
    .await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            route(bootstrap, |action| {
                action.timeout = Some(Duration::from_secs(1))
            })
        })
        .start();
    let begun = Instant::now();
    let reply = Client::get(proxy.outbound(), "/slow").await;
    assert!(reply.status == 200 && reply.broken);
    let took = begun.elapsed();
    assert!(
        took < Duration::from_millis(1600),
        "headers took 0.7 s of its 1 s: {took:?}"
    );

    // Three pieces, 1.2 s in all.
    let pieces = stream::unfold(0, |sent| async move {
        tokio::time::sleep(Duration::from_millis(400)).await;
        (sent < 3).then(|| {
            (
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"piece"))),
                sent + 1,
            )
        })
    });
    let mut upload = request(Method::POST, "/upload", "");
    *upload.body_mut() = StreamBody::new(pieces).boxed_unsync();
    upload.headers_mut().remove(http::header::CONTENT_TYPE);
    let mut client = proxy.client(Version::H1).await;
    assert_eq!(client.send(upload).await.status, 200);
}

#[tokio::test]
async fn an_upload_that_breaks_off_behind_a_peer_is_the_clients_fault() {
    let server = answering().await;
    let beside = ProxyBuilder::new().engine(server.address).start();
    let entry = ProxyBuilder::new().peer(beside.inbound()).start();
    entry.wait_alive(1).await;
    let mut socket = tokio::net::TcpStream::connect(entry.outbound())
        .await
        .unwrap();
    let head =
        "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\nsome";
    socket.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(socket);
    let line = entry.only_log().await;
    assert_eq!(line["response_flags"], "DC", "{line}");
    // The engine is not passed over for it.
    assert_eq!(post(&entry, CHAT, WHOLE).await, 200);
}

#[tokio::test]
async fn an_empty_http2_answer_ends_with_its_headers() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.write("HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .then_some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut client = proxy.client(Version::H2).await;
    let ask: Request<_> = request(Method::GET, "/nothing", "");
    let response = client.try_send(ask).await.unwrap();
    assert_eq!(response.status(), 204);
    assert!(response.body().is_end_stream());
    assert!(
        !response
            .headers()
            .contains_key(http::header::CONTENT_LENGTH)
    );
}

#[tokio::test]
async fn trailers_of_an_http1_engine_are_a_whole_answer_and_keep_its_connection() {
    let server = Upstream::start(|mut conn, _| async move {
        let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n4\r\nbody\r\n0\r\nx-sum: 1\r\n\r\n";
        conn.write(answer).await.then_some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut client = proxy.client(Version::H2).await;
    for _ in 0..2 {
        let mut ask = request(Method::GET, "/", "");
        ask.headers_mut().insert("te", "trailers".parse().unwrap());
        let reply = client.send(ask).await;
        assert_eq!(reply.text(), "body");
        assert_eq!(reply.trailers.expect("they come along")["x-sum"], "1");
    }
    for line in proxy.log(2).await {
        assert!(
            line["response_flags"].is_null() || line["response_flags"] == "-",
            "{line}"
        );
    }
    assert_eq!(server.connections(), 1, "it was used again");
}

#[tokio::test]
async fn all_lines_of_x_forwarded_for_are_kept_and_host_is_what_was_routed_by() {
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let ask = "GET http://routed.example/path HTTP/1.1\r\nhost: other.example\r\nx-forwarded-for: 1.1.1.1\r\n\
               x-forwarded-for: 2.2.2.2\r\nconnection: close\r\n\r\n";
    let answer = raw(proxy.outbound(), ask.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let got = server.only();
    assert_eq!(got.line, "GET /path HTTP/1.1");
    assert_eq!(got.header("host"), "routed.example");
    assert_eq!(got.header("x-forwarded-for"), "1.1.1.1,2.2.2.2,127.0.0.1");
}

#[tokio::test]
async fn a_chunked_answer_that_came_at_once_lost_its_trailers() {
    let server = Upstream::start(|mut conn, _| async move {
        let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n4\r\nbody\r\n0\r\nx-sum: 1\r\n\r\n";
        conn.write(answer).await.then_some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let ask = "GET /x HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: close, te\r\n\r\n";
    let answer = raw(proxy.outbound(), ask.as_bytes()).await;
    assert!(!answer.contains("content-length"), "{answer}");
    assert!(answer.ends_with("x-sum: 1\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn a_listener_for_one_http_version_spoke_the_other_too() {
    let server = Upstream::named("a").await;
    for (codec, spoken, other) in [
        (
            Codec::Http1,
            Version::H1,
            &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..],
        ),
        (
            Codec::Http2,
            Version::H2,
            b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        ),
    ] {
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(move |bootstrap| {
                for listener in &mut bootstrap.listeners {
                    listener.http().codec = codec;
                }
            })
            .start();
        let mut client = proxy.client(spoken).await;
        assert_eq!(
            client.send(request(Method::GET, "/x", "")).await.status,
            200
        );
        for step in [1, other.len()] {
            let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
            socket.set_nodelay(true).unwrap();
            for piece in other.chunks(step) {
                // The rest of it may meet a closed door.
                let _ = socket.write_all(piece).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let mut answer = Vec::new();
            let read =
                tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer));
            let _ = read.await.expect("it is closed");
            assert!(
                answer.is_empty(),
                "{codec:?} in pieces of {step}: {answer:?}"
            );
        }
    }
}

#[tokio::test]
async fn the_idle_timeout_cut_feeds_of_peers() {
    let server =
        Upstream::engine(
            |mut conn, _| async move { conn.json("200 OK", "{}").await.then_some(conn) },
        )
        .await;
    let near = ProxyBuilder::new()
        .engine(server.address)
        .edit(|bootstrap| {
            for listener in &mut bootstrap.listeners {
                listener.http().idle_timeout = Duration::from_millis(200);
            }
        })
        .start();
    let entry = ProxyBuilder::new().peer(near.inbound()).start();
    entry.wait_alive(1).await;
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let peer = near.inbound().to_string();
    assert!(entry.metric("outrigger_feed_connected", &peer).await >= 1.0);
    assert_eq!(
        entry.metric("outrigger_feed_failures_total", &peer).await,
        0.0
    );
}
