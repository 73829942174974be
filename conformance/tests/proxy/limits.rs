//! Time limits that are reached, and that what happens upstream is counted under Envoy's names.

use http::Method;
use outrigger_conformance::harness::{
    OneChain, PATIENCE, ProxyBuilder, TestProxy, Upstream, Version, eventually, request,
};
use outrigger_proxy::bootstrap::{FLEET, OUTBOUND};
use outrigger_xds::resource::{
    bootstrap::Bootstrap, listener::HttpConnectionManager, route::Action,
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const CHAT: &str = "/v1/chat/completions";
const STREAM: &str = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
const SHORT: Duration = Duration::from_millis(150);

fn outbound(edit: impl Fn(&mut HttpConnectionManager)) -> impl FnOnce(&mut Bootstrap) {
    move |bootstrap| {
        for listener in &mut bootstrap.listeners {
            if listener.name == OUTBOUND {
                edit(listener.http());
            }
        }
    }
}

/// Gives the fleet's cluster a name of its own, so that nobody else counts into it, and little time to connect.
fn named(name: &'static str) -> impl FnOnce(&mut Bootstrap) {
    move |bootstrap| {
        for cluster in &mut bootstrap.clusters {
            if cluster.name == FLEET {
                cluster.name = name.into();
                cluster.load_assignment.cluster_name = name.into();
                cluster.connect_timeout = SHORT;
            }
        }
        outbound(|http| {
            for route in &mut http.route_config.virtual_hosts[0].routes {
                if let Action::Route(action) = &mut route.action {
                    action.cluster = name.into();
                }
            }
        })(bootstrap);
    }
}

/// A field of the `openai` filter, in milliseconds.
fn openai(field: &'static str) -> impl FnOnce(&mut Bootstrap) {
    outbound(move |http| {
        for filter in &mut http.http_filters {
            if filter.name == "openai" {
                filter.config.value[field] = (SHORT.as_millis() as u64).into();
            }
        }
    })
}

/// Cases share their metrics: what others count meanwhile only adds.
async fn counted(proxy: &TestProxy, name: &str, before: f64) {
    eventually(name, || async {
        (proxy.metric(name, "").await > before).then_some(())
    })
    .await;
}

/// A socket that listens, whose queue is full and is never emptied: the kernel answers nobody who connects.
async fn deaf() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(opened) =
        tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
    {
        waiting.push(opened.unwrap());
        assert!(waiting.len() < 64, "a queue of one is full at some time");
    }
    (address, listener, waiting)
}

#[tokio::test]
async fn a_connection_that_nobody_answers_is_given_up_in_time() {
    const TIMEOUTS: &str = "envoy_cluster_upstream_cx_connect_timeout";
    let (address, _listener, _waiting) = deaf().await;
    for version in Version::BOTH {
        let proxy = ProxyBuilder::new()
            .server(address)
            .edit(named("deaf"))
            .start();
        let begun = Instant::now();
        let reply = proxy.client(version).await.post(CHAT, STREAM).await;
        assert_eq!(reply.status, 503, "{version:?}");
        assert_eq!(reply.header("x-outrigger-error"), "UF");
        assert!(
            reply.text().contains("connection timeout"),
            "{}",
            reply.text()
        );
        assert!(begun.elapsed() >= SHORT && begun.elapsed() < PATIENCE);
        eventually(TIMEOUTS, || async {
            (proxy.metric(TIMEOUTS, "\"deaf\"").await >= 1.0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn connections_upstream_are_counted_by_protocol_and_when_they_close() {
    let closing = Upstream::start(|mut conn, _| async move {
        conn.json("200 OK", "{}").await;
        None
    })
    .await;
    let proxy = ProxyBuilder::new()
        .server(closing.address)
        .edit(named("closing"))
        .start();
    let mut client = proxy.client(Version::H1).await;
    for _ in 0..3 {
        assert_eq!(client.post(CHAT, "{}").await.status, 200);
        // The proxy sees the end of a pooled connection when it looks at it next.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for (name, least) in [
        ("envoy_cluster_upstream_cx_total", 3.0),
        ("envoy_cluster_upstream_cx_http1_total", 3.0),
        ("envoy_cluster_upstream_cx_destroy", 2.0),
    ] {
        eventually(name, || async {
            (proxy.metric(name, "\"closing\"").await >= least).then_some(())
        })
        .await;
    }
    let http2 = "envoy_cluster_upstream_cx_http2_total";
    assert_eq!(proxy.metric(http2, "\"closing\"").await, 0.0);
}

#[tokio::test]
async fn a_stream_that_goes_on_for_too_long_is_ended_and_told_so() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.begin_events().await;
        while conn.event("more").await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    })
    .await;
    for version in Version::BOTH {
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(openai("total_timeout_ms"))
            .start();
        let begun = Instant::now();
        let reply = proxy.client(version).await.post(CHAT, STREAM).await;
        assert!(begun.elapsed() >= SHORT, "{:?}", begun.elapsed());
        assert!(!reply.broken && reply.status == 200, "{version:?}");
        let text = reply.text();
        let error = text
            .split_once("data: {\"error\"")
            .unwrap_or_else(|| panic!("{text}"));
        assert!(
            error.0.ends_with("data: more\n\n") && error.1.ends_with("\n\ndata: [DONE]\n\n"),
            "{text}"
        );
        assert_eq!(proxy.only_log().await["response_flags"], "DT");
    }
}

#[tokio::test]
async fn an_answer_that_stalls_on_a_plain_route_is_cut() {
    const TIMEOUTS: &str = "envoy_http_downstream_rq_idle_timeout";
    let server = Upstream::start(|mut conn, _| async move {
        conn.write(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await;
        conn.chunk("half").await;
        conn.gone().await;
        None
    })
    .await;
    for version in Version::BOTH {
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(outbound(|http| http.stream_idle_timeout = SHORT))
            .start();
        let before = proxy.metric(TIMEOUTS, "").await;
        let mut client = proxy.client(version).await;
        let reply = client.send(request(Method::GET, "/plain", "")).await;
        assert!(reply.broken && reply.text() == "half", "{version:?}");
        assert_eq!(proxy.only_log().await["response_flags"], "SI");
        counted(&proxy, TIMEOUTS, before).await;
    }
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_asked_is_closed_and_counted() {
    const TIMEOUTS: &str = "envoy_http_downstream_cx_idle_timeout";
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(outbound(|http| http.idle_timeout = SHORT))
        .start();
    let before = proxy.metric(TIMEOUTS, "").await;
    let mut client = proxy.client(Version::H1).await;
    assert_eq!(client.post(CHAT, "{}").await.status, 200);
    eventually("the idle connection is closed", || async {
        client.is_closed().then_some(())
    })
    .await;
    counted(&proxy, TIMEOUTS, before).await;
}

#[tokio::test]
async fn what_goes_wrong_upstream_is_counted() {
    let silent = Upstream::start(|mut conn, _| async move {
        conn.gone().await;
        None
    })
    .await;
    let erring = Upstream::start(|mut conn, _| async move {
        conn.begin_events().await;
        conn.event(r#"{"error": {"message": "died", "code": 500}}"#)
            .await;
        conn.end().await.then_some(conn)
    })
    .await;
    let serving = Upstream::named("a").await;
    for (name, servers) in [
        ("envoy_cluster_upstream_rq_timeout", vec![&silent]),
        ("envoy_cluster_upstream_rq_rx_reset", vec![&erring]),
        (
            "envoy_cluster_upstream_rq_retry_limit_exceeded",
            vec![&erring, &erring],
        ),
        (
            "envoy_cluster_upstream_rq_retry_success",
            vec![&erring, &serving],
        ),
    ] {
        let mut builder = ProxyBuilder::new().edit(openai("headers_timeout_ms"));
        // The same one twice would be one endpoint.
        let again = Upstream::start(|mut conn, _| async move {
            conn.json("500 Internal Server Error", "{}").await;
            None
        })
        .await;
        for (at, server) in servers.iter().enumerate() {
            let twin = at > 0 && std::ptr::eq(servers[0], *server);
            builder = builder.server(if twin { again.address } else { server.address });
        }
        let proxy = builder.start();
        let before = proxy.metric(name, "").await;
        let mut client = proxy.client(Version::H1).await;
        // In turn: one of them meets the one that fails first.
        for _ in 0..2 {
            client.post(CHAT, STREAM).await;
        }
        counted(&proxy, name, before).await;
    }
}
