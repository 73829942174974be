//! What requests are taken for at the edge: paths, hosts, clients; and how long a connection takes them.

use outrigger_conformance::harness::{
    Client, OneChain, ProxyBuilder, TestProxy, Upstream, Version, eventually, raw, request,
};
use outrigger_xds::resource::{
    edge::{Edge, EscapedSlashes, StripPort},
    listener::HttpConnectionManager,
};
use std::time::Duration;

fn proxy(server: &Upstream, edit: impl Fn(&mut HttpConnectionManager) + 'static) -> TestProxy {
    ProxyBuilder::new()
        .server(server.address)
        .edit(move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                edit(listener.http());
            }
        })
        .start()
}

fn with(server: &Upstream, edge: Edge) -> TestProxy {
    proxy(server, move |http| http.edge = edge.clone())
}

async fn get(proxy: &TestProxy, path: &str, fields: &str) -> String {
    let ask = format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{fields}\r\n");
    raw(proxy.outbound(), ask.as_bytes()).await
}

#[tokio::test]
async fn paths_are_normalised_before_they_are_routed() {
    let server = Upstream::named("server").await;
    let edge = Edge {
        normalize_path: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::Unescape,
        ..Edge::default()
    };
    let proxy = with(&server, edge);
    for (path, want) in [
        ("/a/./b/../c?d=../e", "/a/c?d=../e"),
        ("//x%2Fy", "/x/y"),
        ("/plain", "/plain"),
    ] {
        let answer = get(&proxy, path, "").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let last = server.exchanges().pop().unwrap();
        assert_eq!(last.path(), want);
    }
    // What the list of administrative paths would refuse is refused, however it is written.
    let answer = get(&proxy, "/a/../pause", "").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

#[tokio::test]
async fn escaped_slashes_may_be_refused() {
    let server = Upstream::named("server").await;
    let edge = Edge {
        escaped_slashes: EscapedSlashes::Reject,
        ..Edge::default()
    };
    let proxy = with(&server, edge);
    let answer = get(&proxy, "/a%2fb", "").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let line = proxy.only_log().await;
    assert_eq!(line["response_code_details"], "path_normalization_failed");
    assert!(
        get(&proxy, "/a?b=%2f", "")
            .await
            .starts_with("HTTP/1.1 200 ")
    );
}

#[tokio::test]
async fn hosts_lose_their_port_and_their_dot() {
    let server = Upstream::named("server").await;
    let edge = Edge {
        strip_port: StripPort::Any,
        strip_trailing_host_dot: true,
        ..Edge::default()
    };
    let proxy = with(&server, edge);
    let ask = "GET / HTTP/1.1\r\nhost: a.test.:99\r\nconnection: close\r\n\r\n";
    assert!(
        raw(proxy.outbound(), ask.as_bytes())
            .await
            .contains(" 200 ")
    );
    assert_eq!(server.only().header("host"), "a.test");
}

#[tokio::test]
async fn the_client_is_whom_trusted_proxies_tell() {
    let server = Upstream::named("server").await;
    let edge = Edge {
        trusted_hops: 2,
        append_x_forwarded_port: true,
        always_set_request_id: true,
        ..Edge::default()
    };
    let proxy = with(&server, edge);
    let told = "x-forwarded-for: 9.9.9.9, 1.2.3.4, 5.6.7.8\r\nx-forwarded-proto: https\r\n";
    let answer = get(&proxy, "/", told).await;
    assert!(answer.contains("\r\nx-request-id: "), "{answer}");
    let exchange = server.only();
    assert_eq!(exchange.header("x-envoy-external-address"), "1.2.3.4");
    assert_eq!(
        exchange.header("x-forwarded-for"),
        "9.9.9.9, 1.2.3.4, 5.6.7.8,127.0.0.1"
    );
    assert_eq!(exchange.header("x-forwarded-proto"), "https");
    let port = proxy.outbound().port().to_string();
    assert_eq!(exchange.header("x-forwarded-port"), port);
    // Too few of them: nobody is believed.
    get(&proxy, "/", "x-forwarded-for: 1.1.1.1\r\n").await;
    let last = server.exchanges().pop().unwrap();
    assert_eq!(last.header("x-envoy-external-address"), "127.0.0.1");
}

#[tokio::test]
async fn x_forwarded_for_may_stay_as_it_is() {
    let server = Upstream::named("server").await;
    let edge = Edge {
        skip_xff_append: true,
        ..Edge::default()
    };
    let proxy = with(&server, edge);
    get(&proxy, "/", "x-forwarded-for: 1.1.1.1\r\n").await;
    assert_eq!(server.only().header("x-forwarded-for"), "1.1.1.1");
}

#[tokio::test]
async fn a_connection_takes_so_many_requests() {
    for version in Version::BOTH {
        let server = Upstream::named("server").await;
        let proxy = proxy(&server, |http| http.max_requests_per_connection = 2);
        let mut client = proxy.client(version).await;
        for _ in 0..2 {
            let reply = client.send(request(http::Method::GET, "/", "")).await;
            assert_eq!(reply.status, 200);
        }
        eventually("the connection ends", || async {
            client.is_closed().then_some(())
        })
        .await;
        let metric = "envoy_http_downstream_cx_max_requests_reached";
        assert!(proxy.metric(metric, "outbound").await >= 1.0);
    }
}

#[tokio::test]
async fn a_connection_lasts_so_long_and_its_last_request_is_answered() {
    for version in Version::BOTH {
        let server = Upstream::start(|mut conn, _| async move {
            // Longer than the connection may last.
            tokio::time::sleep(Duration::from_millis(600)).await;
            conn.json("200 OK", "{}").await.then_some(conn)
        })
        .await;
        let limit = Duration::from_millis(300);
        let proxy = proxy(&server, move |http| http.max_connection_duration = limit);
        let mut client: Client = proxy.client(version).await;
        let reply = client.send(request(http::Method::GET, "/", "")).await;
        assert_eq!(reply.status, 200);
        eventually("the connection ends", || async {
            client.is_closed().then_some(())
        })
        .await;
        let metric = "envoy_http_downstream_cx_max_duration_reached";
        assert!(proxy.metric(metric, "outbound").await >= 1.0);
    }
}
