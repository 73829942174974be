//! `ORIGINAL_DST`: requests and connections go where they were meant to.

use super::listeners::{at, carries, named_tcp, read, says, start, tell};
use http::Method;
use outrigger_conformance::harness::{
    Client, TestProxy, Upstream, Version, eventually, hosts, raw, request,
};
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Duration};
use tokio::{io::AsyncWriteExt, net::TcpStream};

const CLUSTER: &str = "original";

fn original(config: &Value) -> Value {
    json!({
        "name": CLUSTER, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "1s",
        "cleanup_interval": "0.05s", "original_dst_lb_config": config,
    })
}

fn listener(filter: &Value) -> Value {
    json!({
        "name": "caught",
        "listener_filters": [{"name": "proxy_protocol", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
            "allow_requests_without_proxy_protocol": true,
        }}],
        "filter_chains": [{"filters": [filter]}],
    })
}

fn routed() -> Value {
    let mut filter = says("");
    filter["typed_config"]["route_config"]["virtual_hosts"][0]["routes"][0] =
        json!({"match": {"prefix": "/"}, "route": {"cluster": CLUSTER}});
    filter
}

/// What says that a connection was meant for an address.
fn meant_for(address: SocketAddr) -> String {
    format!(
        "PROXY TCP4 192.0.2.7 {} 4000 {}\r\n",
        address.ip(),
        address.port()
    )
}

async fn ask(proxy: &TestProxy, before: &str, headers: &str) -> String {
    let text = format!("{before}GET /x HTTP/1.1\r\nhost: h\r\n{headers}connection: close\r\n\r\n");
    raw(at(proxy, "caught"), text.as_bytes()).await
}

fn to(address: &str) -> String {
    format!("x-envoy-original-dst-host: {address}\r\n")
}

fn is_from(answer: &str, name: &str) {
    let served = format!("\"served_by\":\"{name}\"");
    assert!(answer.replace(' ', "").contains(&served), "{answer}");
}

fn is_unhealthy(answer: &str) {
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nno healthy upstream"), "{answer}");
}

#[tokio::test]
async fn a_request_goes_where_its_connection_was_sent() {
    let (a, b) = (Upstream::named("a").await, Upstream::named("b").await);
    let proxy = start(&[listener(&routed())], &[original(&json!({}))]);
    is_from(&ask(&proxy, &meant_for(a.address), "").await, "a");
    is_from(&ask(&proxy, &meant_for(b.address), "").await, "b");
    is_unhealthy(&ask(&proxy, "", "").await);
    // Nobody may say so in a header, unless that is configured.
    is_unhealthy(&ask(&proxy, "", &to(&a.address.to_string())).await);
    let header = to(&b.address.to_string());
    is_from(&ask(&proxy, &meant_for(a.address), &header).await, "a");
}

#[tokio::test]
async fn a_header_says_where_to_if_configured() {
    let (a, b) = (Upstream::named("a").await, Upstream::named("b").await);
    let config = json!({"use_http_header": true});
    let proxy = start(&[listener(&routed())], &[original(&config)]);
    let header = to(&b.address.to_string());
    is_from(&ask(&proxy, "", &header).await, "b");
    is_from(&ask(&proxy, &meant_for(a.address), &header).await, "b");
    for wrong in ["a.example:80", "127.0.0.1", "127.0.0.1:0x50", ""] {
        is_unhealthy(&ask(&proxy, "", &to(wrong)).await);
    }
    let invalid = "envoy_cluster_original_dst_host_invalid";
    assert_eq!(proxy.metric(invalid, CLUSTER).await, 4.0);
    is_from(&ask(&proxy, &meant_for(a.address), &to("?")).await, "a");
    let (nobody, _held) = super::tcp::refused();
    let answer = ask(&proxy, "", &to(&nobody.to_string())).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("remote connection failure"), "{answer}");
}

#[tokio::test]
async fn the_header_and_the_port_are_as_configured() {
    let a = Upstream::named("a").await;
    let config = json!({
        "use_http_header": true, "http_header_name": "X-To", "upstream_port_override": a.address.port(),
    });
    let proxy = start(&[listener(&routed())], &[original(&config)]);
    is_from(&ask(&proxy, "", "x-to: 127.0.0.1:1\r\n").await, "a");
    is_unhealthy(&ask(&proxy, "", &to(&a.address.to_string())).await);
    let meant = meant_for("127.0.0.1:2".parse().unwrap());
    is_from(&ask(&proxy, &meant, "").await, "a");
}

#[tokio::test]
async fn endpoints_are_there_while_they_are_used() {
    let a = Upstream::named("a").await;
    let config = json!({"use_http_header": true});
    let proxy = start(&[listener(&routed())], &[original(&config)]);
    assert!(hosts(proxy.admin(), CLUSTER).await.is_empty());
    // Its upstream closes no connection: while one is open, the endpoint is used.
    let header = to(&a.address.to_string());
    is_from(&ask(&proxy, "", &header).await, "a");
    let known = hosts(proxy.admin(), CLUSTER).await;
    assert_eq!(
        known[0]["address"]["socket_address"]["port_value"],
        a.address.port()
    );
    drop(a);
    nobody_is_known(&proxy).await;
}

#[tokio::test]
async fn connections_to_those_that_are_gone_are_counted() {
    let config = json!({"use_http_header": true});
    let proxy = start(&[listener(&routed())], &[original(&config)]);
    for (count, name) in [(1.0, "a"), (2.0, "b")] {
        let upstream = Upstream::named(name).await;
        is_from(
            &ask(&proxy, "", &to(&upstream.address.to_string())).await,
            name,
        );
        eventually("it is counted", || async {
            let opened = proxy
                .metric("envoy_cluster_upstream_cx_total", CLUSTER)
                .await;
            (opened >= count).then_some(())
        })
        .await;
        drop(upstream);
        nobody_is_known(&proxy).await;
    }
}

async fn nobody_is_known(proxy: &TestProxy) {
    eventually("nobody is known any more", || async {
        hosts(proxy.admin(), CLUSTER).await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn connections_of_http2_end_when_nobody_uses_them() {
    let mut cluster = original(&json!({"use_http_header": true}));
    cluster["typed_extension_protocol_options"] = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": super::dynamic::typed(
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            json!({"explicit_http_config": {"http2_protocol_options": {}}}),
        ),
    });
    let target = json!({"name": "target", "filter_chains": [{"filters": [says("there")]}]});
    let upstream = start(&[target], &[]);
    let proxy = start(&[listener(&routed())], &[cluster]);
    let header = to(&at(&upstream, "target").to_string());
    for _ in 0..2 {
        let answer = ask(&proxy, "", &header).await;
        assert!(answer.ends_with("there"), "{answer}");
        nobody_is_known(&proxy).await;
    }
    eventually("all are counted", || async {
        let opened = "envoy_cluster_upstream_cx_http2_total";
        (proxy.metric(opened, CLUSTER).await == 2.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn nothing_goes_to_one_that_is_drained() {
    let server = named_tcp("server").await;
    let filter = carries(json!({"cluster": CLUSTER}));
    let proxy = start(&[listener(&filter)], &[original(&json!({}))]);
    let text = format!("{}hello", meant_for(server));
    // It is known for as long as its connection is open.
    let mut held = TcpStream::connect(at(&proxy, "caught")).await.unwrap();
    held.write_all(meant_for(server).as_bytes()).await.unwrap();
    eventually("it is known", || async {
        (!hosts(proxy.admin(), CLUSTER).await.is_empty()).then_some(())
    })
    .await;
    let drained = request(Method::POST, &format!("/drain?endpoint={server}"), "");
    let mut admin = Client::connect(proxy.admin(), Version::H1).await;
    let reply = admin.send(drained).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    drop(held);
    assert_eq!(tell(at(&proxy, "caught"), text.as_bytes()).await, "");
    // Longer than it would stay if nobody had drained it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(tell(at(&proxy, "caught"), text.as_bytes()).await, "");
}

#[tokio::test]
async fn bytes_go_where_their_connection_was_sent() {
    let server = named_tcp("server").await;
    let filter = carries(json!({"cluster": CLUSTER}));
    let proxy = start(&[listener(&filter)], &[original(&json!({}))]);
    let text = format!("{}hello", meant_for(server));
    let answer = tell(at(&proxy, "caught"), text.as_bytes()).await;
    assert_eq!(answer, "server:hello");
    assert_eq!(tell(at(&proxy, "caught"), b"hello").await, "");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let with = |fields: Value| {
        let mut all = original(&json!({}));
        for (name, value) in fields.as_object().unwrap() {
            all[name] = value.clone();
        }
        all
    };
    for (fields, words) in [
        (
            json!({"lb_policy": "ROUND_ROBIN"}),
            "lb_policy: LB policy ROUND_ROBIN",
        ),
        (
            json!({"load_assignment": {"cluster_name": "x"}}),
            "no load assignment",
        ),
        (
            json!({"cleanup_interval": "0s"}),
            "cleanup_interval: must be",
        ),
        (json!({"type": "STRICT_DNS"}), "lb_policy: CLUSTER_PROVIDED"),
        (
            json!({"original_dst_lb_config": {"metadata_key": {"key": "k"}}}),
            "not supported yet: metadata_key",
        ),
        (
            json!({"original_dst_lb_config": {"upstream_port_override": 65536}}),
            "at most 65535",
        ),
        (
            json!({"original_dst_lb_config": {"http_header_name": "a b"}}),
            "no header name",
        ),
        (
            json!({"health_checks": [{
                "timeout": "1s", "interval": "1s", "healthy_threshold": 1, "unhealthy_threshold": 1,
                "tcp_health_check": {},
            }]}),
            "health_checks: not supported yet",
        ),
    ] {
        let refused = read(&[], &[with(fields)]).unwrap_err();
        assert!(refused.contains(words), "{words}: {refused}");
    }
    assert!(read(&[], &[original(&json!({}))]).is_ok());
}
