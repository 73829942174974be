//! `tcp_proxy`: bytes both ways, who ends when, what is tried again and what is told of it.

use super::{
    listeners::{at, carries, cluster, named_tcp, read, start, tell},
    tls::Ca,
    upstream_tls::terminating,
};
use outrigger_conformance::harness::{Client, TestProxy, eventually, scratch};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

fn listener(fields: Value, log: &Path) -> Value {
    let mut filter = carries(fields);
    filter["typed_config"]["access_log"] = json!([{"name": "file", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        "path": log,
        "log_format": {"text_format_source": {"inline_string":
            "%UPSTREAM_CLUSTER% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% \
             %UPSTREAM_REQUEST_ATTEMPT_COUNT% %RESPONSE_CODE% %UPSTREAM_HOST%\n"}},
    }}]);
    json!({"name": "tcp", "filter_chains": [{"filters": [filter]}]})
}

struct Case {
    proxy: TestProxy,
    address: SocketAddr,
    log: PathBuf,
}

impl Case {
    fn new(fields: Value, clusters: &[Value]) -> Self {
        let log = scratch("tcp.log");
        let proxy = start(&[listener(fields, &log)], clusters);
        Self {
            address: at(&proxy, "tcp"),
            proxy,
            log,
        }
    }

    async fn line(&self) -> String {
        eventually("a line of the log", || async {
            let text = std::fs::read_to_string(&self.log).unwrap_or_default();
            text.lines().next().map(str::to_owned)
        })
        .await
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.log);
    }
}

/// An address where nobody listens, kept from others by a socket that is only bound.
pub(super) fn refused() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// A cluster of several endpoints.
fn several(name: &str, addresses: &[SocketAddr]) -> Value {
    let mut all = cluster(name, addresses[0]);
    let endpoints = &mut all["load_assignment"]["endpoints"][0]["lb_endpoints"];
    for address in &addresses[1..] {
        let more = cluster(name, *address);
        let one = more["load_assignment"]["endpoints"][0]["lb_endpoints"][0].clone();
        endpoints.as_array_mut().unwrap().push(one);
    }
    all
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_side_ends_for_itself() {
    let server = named_tcp("server").await;
    let case = Case::new(json!({"cluster": "server"}), &[cluster("server", server)]);
    // The server answers when the client has ended, and not before.
    assert_eq!(tell(case.address, b"hello").await, "server:hello");
    let line = case.line().await;
    assert_eq!(line, format!("server - 5 12 1 0 {server}"));
    for (metric, value) in [
        ("envoy_tcp_downstream_cx_total", 1.0),
        ("envoy_tcp_downstream_cx_rx_bytes_total", 5.0),
        ("envoy_tcp_downstream_cx_tx_bytes_total", 12.0),
    ] {
        assert!(
            case.proxy.metric(metric, "carries").await >= value,
            "{metric}"
        );
    }
}

#[tokio::test]
async fn a_server_that_ends_first_still_hears_its_client() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let heard = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"bye").await.unwrap();
        socket.shutdown().await.unwrap();
        let mut all = String::new();
        socket.read_to_string(&mut all).await.unwrap();
        all
    });
    let case = Case::new(json!({"cluster": "server"}), &[cluster("server", server)]);
    let mut client = TcpStream::connect(case.address).await.unwrap();
    let mut all = String::new();
    client.read_to_string(&mut all).await.unwrap();
    assert_eq!(all, "bye");
    client.write_all(b"still here").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(heard.await.unwrap(), "still here");
}

#[tokio::test]
async fn much_goes_through_a_slow_reader_whole() {
    const MANY: usize = 8 << 20;
    let server = named_tcp("server").await;
    let case = Case::new(json!({"cluster": "server"}), &[cluster("server", server)]);
    let bytes: Vec<u8> = (0..MANY).map(|at| b'a' + (at % 23) as u8).collect();
    let answer = tell(case.address, &bytes).await;
    assert_eq!(answer.len(), MANY + 7);
    assert!(answer.as_bytes().ends_with(&bytes));
}

#[tokio::test]
async fn another_endpoint_is_tried_as_often_as_configured() {
    let (dead, _held) = refused();
    let server = named_tcp("server").await;
    let both = several("both", &[dead, server]);
    let case = Case::new(
        json!({"cluster": "both", "max_connect_attempts": 2}),
        &[both],
    );
    for _ in 0..4 {
        assert_eq!(tell(case.address, b"x").await, "server:x");
    }
}

#[tokio::test]
async fn what_fails_is_told_by_flags() {
    let (dead, _held) = refused();
    let dead = || cluster("dead", dead);
    let mut empty = dead();
    empty["name"] = json!("empty");
    empty["load_assignment"] = json!({"cluster_name": "empty", "endpoints": []});
    for (fields, want) in [
        (json!({"cluster": "dead"}), "dead UF 0 0 1 0 "),
        (
            json!({"cluster": "dead", "max_connect_attempts": 3}),
            "dead UF,URX 0 0 3 0 ",
        ),
        (json!({"cluster": "empty"}), "empty UH 0 0 0 0 -"),
        (json!({"cluster": "nowhere"}), "nowhere NC 0 0 0 0 -"),
    ] {
        let case = Case::new(fields, &[dead(), empty.clone()]);
        let mut client = TcpStream::connect(case.address).await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap_or(0), 0);
        let line = case.line().await;
        assert!(line.starts_with(want), "{line}");
    }
}

#[tokio::test]
async fn weights_share_connections_out() {
    let (a, b) = (named_tcp("a").await, named_tcp("b").await);
    let weighted = json!({"weighted_clusters": {"clusters": [
        {"name": "a", "weight": 1}, {"name": "b", "weight": 3},
    ]}});
    let case = Case::new(weighted, &[cluster("a", a), cluster("b", b)]);
    let mut of_b = 0;
    for _ in 0..100 {
        of_b += usize::from(tell(case.address, b"").await == "b:");
    }
    assert!((55..=95).contains(&of_b), "{of_b}");
}

#[tokio::test]
async fn silence_and_age_end_a_connection() {
    for (field, metric) in [
        ("idle_timeout", "envoy_tcp_idle_timeout"),
        (
            "max_downstream_connection_duration",
            "envoy_tcp_max_downstream_connection_duration",
        ),
    ] {
        let server = named_tcp("server").await;
        let case = Case::new(
            json!({"cluster": "server", field: "0.3s"}),
            &[cluster("server", server)],
        );
        let before = case.proxy.metric(metric, "carries").await;
        let began = Instant::now();
        let mut client = TcpStream::connect(case.address).await.unwrap();
        client.write_all(b"x").await.unwrap();
        let read = tokio::time::timeout(Duration::from_secs(10), client.read(&mut [0; 1])).await;
        assert_eq!(read.unwrap().unwrap_or(0), 0);
        assert!(began.elapsed() >= Duration::from_millis(290), "{field}");
        eventually(metric, || async {
            (case.proxy.metric(metric, "carries").await > before).then_some(())
        })
        .await;
        // The endpoint was reached: whose limit it was is not its fault.
        for stat in ["rq_success::1", "rq_error::0", "rq_active::0"] {
            eventually(stat, || async {
                let hosts = Client::get(case.proxy.admin(), "/clusters?filter=server").await;
                hosts.text().contains(stat).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_server_behind_tls_is_spoken_to_so() {
    let ca = Ca::new();
    let pair = ca.pair(&["server.test"]);
    let (server, seen) = terminating(&pair, None, named_tcp("behind").await).await;
    let mut secure = cluster("secure", server);
    secure["transport_socket"] = json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "server.test",
        "common_tls_context": {"validation_context": {"trusted_ca": {"inline_string": ca.pem}}},
    }});
    let case = Case::new(json!({"cluster": "secure"}), &[secure]);
    assert_eq!(tell(case.address, b"hello").await, "behind:hello");
    // What is no HTTP offers no protocol of HTTP.
    assert_eq!(seen.lock().unwrap()[0].alpn, None);
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (fields, word) in [
        (json!({}), "required: cluster or weighted_clusters"),
        (
            json!({"cluster": "a", "max_connect_attempts": 0}),
            "at least 1",
        ),
        (
            json!({"weighted_clusters": {"clusters": []}}),
            "must not be empty",
        ),
        (
            json!({"weighted_clusters": {"clusters": [{"name": "a", "weight": 0}]}}),
            "at least 1",
        ),
        (
            json!({"cluster": "a", "max_downstream_connection_duration": "0s"}),
            "0.001s",
        ),
        (
            json!({"cluster": "a", "tunneling_config": {}}),
            "not supported yet: tunneling_config",
        ),
    ] {
        let refused = read(&[listener(fields, Path::new("/dev/null"))], &[]).unwrap_err();
        assert!(refused.contains(word), "{refused}");
    }
}
