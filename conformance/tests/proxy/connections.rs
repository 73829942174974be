//! What a cluster says of connections to its endpoints.

use bytes::Bytes;
use http::Method;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use outrigger_conformance::harness::{
    Client, EchoH2, ProxyBuilder, TestProxy, Upstream, Version, eventually, request,
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::cluster::{Cluster, TcpKeepalive, UpstreamProtocol};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

fn proxy(server: SocketAddr, edit: impl Fn(&mut Cluster) + 'static) -> TestProxy {
    ProxyBuilder::new()
        .server(server)
        .edit(move |bootstrap| {
            for cluster in &mut bootstrap.clusters {
                if cluster.name == FLEET {
                    edit(cluster);
                }
            }
        })
        .start()
}

#[tokio::test]
async fn a_connection_serves_so_many_requests_and_no_more() {
    let server = Upstream::named("a").await;
    let proxy = proxy(server.address, |cluster| {
        cluster.connection.max_requests = Some(2)
    });
    for _ in 0..5 {
        assert_eq!(Client::get(proxy.outbound(), "/").await.status, 200);
    }
    assert_eq!(server.connections(), 3, "two, two and one");
    let closed = "envoy_cluster_upstream_cx_max_requests";
    assert!(proxy.metric(closed, FLEET).await >= 2.0);
}

#[tokio::test]
async fn the_same_holds_over_http2() {
    let server = EchoH2::start().await;
    let proxy = proxy(server.address, |cluster| {
        cluster.protocol = UpstreamProtocol::Http2;
        cluster.connection.max_requests = Some(1);
    });
    for _ in 0..3 {
        assert_eq!(Client::get(proxy.outbound(), "/").await.status, 200);
    }
    let opened = "envoy_cluster_upstream_cx_http2_total";
    eventually("each request has a connection of its own", || async {
        (proxy.metric(opened, FLEET).await >= 3.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_the_client_speaks_goes_on() {
    let downstream = |cluster: &mut Cluster| cluster.protocol = UpstreamProtocol::Downstream;
    let (http1, http2) = (Upstream::named("a").await, EchoH2::start().await);
    for (server, version) in [(http1.address, Version::H1), (http2.address, Version::H2)] {
        let proxy = proxy(server, downstream);
        let mut client = proxy.client(version).await;
        for _ in 0..2 {
            assert_eq!(client.post("/x", "{}").await.status, 200, "{version:?}");
        }
    }
    assert_eq!((http1.connections(), http2.connections()), (1, 1));
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed_in_time() {
    let server = Upstream::named("a").await;
    let proxy = proxy(server.address, |cluster| {
        cluster.connection.idle_timeout = Some(Duration::from_millis(200));
    });
    for _ in 0..2 {
        assert_eq!(Client::get(proxy.outbound(), "/").await.status, 200);
    }
    assert_eq!(server.connections(), 1, "used again at once");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(Client::get(proxy.outbound(), "/").await.status, 200);
    assert_eq!(server.connections(), 2);
    let closed = "envoy_cluster_upstream_cx_idle_timeout";
    assert!(proxy.metric(closed, FLEET).await >= 1.0);
}

#[tokio::test]
async fn over_http2_it_is_closed_once_its_last_stream_is_over() {
    let server = EchoH2::start().await;
    let proxy = proxy(server.address, |cluster| {
        cluster.protocol = UpstreamProtocol::Http2;
        cluster.connection.idle_timeout = Some(Duration::from_millis(100));
    });
    let slow = futures_util::stream::unfold(0, |told| async move {
        tokio::time::sleep(Duration::from_millis(500)).await;
        (told < 5).then(|| (Ok(Frame::data(Bytes::from_static(b"more"))), told + 1))
    });
    let mut post = request(Method::POST, "/echo", "");
    *post.body_mut() = StreamBody::new(slow).boxed_unsync();
    let reply = proxy.client(Version::H2).await.send(post).await;
    assert_eq!(reply.text(), "more".repeat(5), "a stream is no rest");
    eventually("it is closed then", || async {
        let active = proxy
            .metric("envoy_cluster_upstream_cx_active", FLEET)
            .await;
        (active == 0.0).then_some(())
    })
    .await;
    assert_eq!(server.connections(), 1);
    let reply = proxy.client(Version::H2).await.post("/echo", "again").await;
    assert_eq!((reply.text().as_str(), server.connections()), ("again", 2));
}

/// The timer of the connection from `from` to `to`, as Linux tells it: 02 is a keepalive.
fn timer(from: SocketAddr, to: SocketAddr) -> Option<String> {
    let told = |address: SocketAddr| format!("0100007F:{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let ends = (fields.next()?, fields.next()?);
        let timer = fields.nth(2)?;
        (ends == (&told(from), &told(to))).then(|| timer[..2].to_owned())
    })
}

#[tokio::test]
async fn a_connection_comes_from_where_it_is_told_and_is_kept_alive() {
    for (source, keepalive, wanted) in [
        (Some("127.0.0.2:0"), false, None),
        (None, true, Some("02")),
        (None, false, Some("00")),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap();
        let proxy = proxy(here, move |cluster| {
            cluster.connection.source = source.map(|source| source.parse().unwrap());
            cluster.connection.keepalive = keepalive.then_some(TcpKeepalive {
                probes: Some(3),
                time: Some(Duration::from_secs(30)),
                interval: Some(Duration::from_secs(5)),
            });
        });
        let asked = tokio::spawn(Client::get(proxy.outbound(), "/"));
        let (mut socket, peer) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        assert!(socket.read(&mut buffer).await.unwrap() > 0);
        socket
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await
            .unwrap();
        assert_eq!(asked.await.unwrap().status, 200);
        match (source, wanted) {
            (Some(_), _) => assert_eq!(peer.ip().to_string(), "127.0.0.2"),
            (None, wanted) => {
                // Until what was sent is acknowledged, another timer may run.
                eventually("the connection's timer", || async {
                    (timer(peer, here).as_deref() == wanted).then_some(())
                })
                .await;
            }
        }
    }
}
