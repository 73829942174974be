//! What a listener does with a connection before HTTP: filter chains, listener filters, connections handed over.

use super::tls::{Ca, Pair, TlsClient};
use outrigger_conformance::harness::{ProxyBuilder, TestProxy, Upstream, eventually, raw};
use outrigger_xds::{
    load::{Syntax, bootstrap_from_value},
    resource::bootstrap::Bootstrap,
};
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// A network filter that answers every request with `text`.
pub(super) fn says(text: &str) -> Value {
    json!({"name": "http", "typed_config": {
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "says",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{
            "match": {"prefix": "/"},
            "direct_response": {"status": 200, "body": {"inline_string": text}},
        }]}]},
        "http_filters": [{"name": "router", "typed_config": {
            "@type": format!("{TYPES}.filters.http.router.v3.Router"),
        }}],
    }})
}

/// Adds the fields of an object.
fn extend(config: &mut Value, fields: Value) {
    let Value::Object(fields) = fields else {
        panic!("{fields} has no fields");
    };
    config.as_object_mut().unwrap().extend(fields);
}

/// A network filter that carries bytes to a cluster.
pub(super) fn carries(fields: Value) -> Value {
    let mut config = json!({
        "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": "carries",
    });
    extend(&mut config, fields);
    json!({"name": "tcp", "typed_config": config})
}

/// A listener filter of this name.
fn looks(name: &str, message: &str, fields: Value) -> Value {
    let mut config = json!({"@type": format!("{TYPES}.filters.listener.{name}.v3.{message}")});
    extend(&mut config, fields);
    json!({"name": name, "typed_config": config})
}

fn tls_inspector() -> Value {
    looks("tls_inspector", "TlsInspector", json!({}))
}

fn chain(matches: Value, filter: Value) -> Value {
    let mut chain = json!({});
    chain["filter_chain_match"] = matches;
    chain["filters"] = Value::from(vec![filter]);
    chain
}

fn secured(chain: &Value, pair: &Pair) -> Value {
    let mut chain = chain.clone();
    chain["transport_socket"] = json!({"name": "tls", "typed_config": {
        "@type": format!("{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext"),
        "common_tls_context": {"tls_certificates": [{
            "certificate_chain": {"inline_string": pair.chain},
            "private_key": {"inline_string": pair.key},
        }]},
    }});
    chain
}

/// A cluster of one endpoint.
pub(super) fn cluster(name: &str, address: SocketAddr) -> Value {
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {
            "address": {"socket_address": {
                "address": address.ip().to_string(), "port_value": address.port(),
            }},
        }}]}]},
    })
}

/// Resources as a file would bring them.
pub(super) fn read(listeners: &[Value], clusters: &[Value]) -> Result<Bootstrap, String> {
    let listeners: Vec<Value> = listeners
        .iter()
        .map(|listener| {
            let mut listener = listener.clone();
            if listener.get("address").is_none() {
                listener["address"] =
                    json!({"socket_address": {"address": "127.0.0.1", "port_value": 0}});
            }
            listener
        })
        .collect();
    let all = json!({"static_resources": {"listeners": listeners, "clusters": clusters}});
    // As text, so that it passes every check that a file passes.
    let text = serde_json::to_string(&all).unwrap();
    outrigger_xds::load::bootstrap(&text, Syntax::Json).map_err(|errors| errors.to_string())
}

/// A stand-alone proxy with listeners beside its own.
pub(super) fn start(listeners: &[Value], clusters: &[Value]) -> TestProxy {
    let read = read(listeners, clusters).unwrap();
    let shown = outrigger_xds::load::bootstrap_to_json(&read);
    // Private keys are not shown.
    if !shown.to_string().contains("private_key") {
        assert_eq!(bootstrap_from_value(shown).unwrap(), read);
    }
    ProxyBuilder::new()
        .edit(|bootstrap| {
            bootstrap.listeners.extend(read.listeners);
            bootstrap.clusters.extend(read.clusters);
        })
        .start()
}

pub(super) fn at(proxy: &TestProxy, listener: &str) -> SocketAddr {
    proxy.proxy.address(listener).unwrap()
}

async fn get(address: SocketAddr) -> String {
    raw(
        address,
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await
}

/// What a server says that answers every connection with its name and what it read.
pub(super) async fn named_tcp(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                socket.read_to_end(&mut all).await?;
                socket.write_all(name.as_bytes()).await?;
                socket.write_all(b":").await?;
                socket.write_all(&all).await?;
                socket.shutdown().await
            });
        }
    });
    address
}

/// Says everything, ends, and hears everything.
pub(super) async fn tell(address: SocketAddr, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut all = Vec::new();
    let _ = socket.read_to_end(&mut all).await;
    String::from_utf8_lossy(&all).into_owned()
}

async fn counted(proxy: &TestProxy, metric: &str, at_least: f64) {
    eventually(&format!("{metric} at least {at_least}"), || async {
        (proxy.metric(metric, "").await >= at_least).then_some(())
    })
    .await;
}

#[tokio::test]
async fn names_choose_chains_and_each_has_its_own_certificate() {
    let ca = Ca::new();
    let (a, wild) = (ca.pair(&["a.test"]), ca.pair(&["x.b.test"]));
    let listener = json!({
        "name": "many",
        "filter_chains": [
            secured(&chain(json!({"server_names": ["a.test"]}), says("a")), &a),
            secured(&chain(json!({"server_names": ["*.b.test"]}), says("b")), &wild),
        ],
        "default_filter_chain": {"filters": [says("plain")]},
    });
    // Nobody asked for tls_inspector: a chain that needs it brings it along, as in Envoy.
    let proxy = start(&[listener], &[]);
    let address = at(&proxy, "many");
    for (name, want) in [("a.test", "a"), ("x.b.test", "b")] {
        let client = TlsClient::new(&ca, None).asks_for(name);
        let mut stream = client.shake(address).await.unwrap();
        let ask = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(ask).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.ends_with(&format!("\r\n\r\n{want}")), "{answer}");
    }
    assert!(get(address).await.ends_with("\r\n\r\nplain"));
    counted(&proxy, "envoy_tls_inspector_sni_found", 2.0).await;
    counted(&proxy, "envoy_tls_inspector_tls_not_found", 1.0).await;
}

#[tokio::test]
async fn a_connection_that_no_chain_is_for_is_closed() {
    let listener = json!({
        "name": "strict",
        "filter_chains": [chain(json!({"source_prefix_ranges": [
            {"address_prefix": "10.0.0.0", "prefix_len": 8},
        ]}), says("never"))],
    });
    let proxy = start(&[listener], &[]);
    assert_eq!(get(at(&proxy, "strict")).await, "");
    counted(&proxy, "envoy_listener_no_filter_chain_match", 1.0).await;
}

#[test]
fn chains_for_the_same_connections_are_refused() {
    let of = |chains: &[Value]| read(&[json!({"name": "l", "filter_chains": chains})], &[]);
    let port = |port: u16| json!({"destination_port": port});
    let same = of(&[chain(port(1), says("a")), chain(port(1), says("b"))]).unwrap_err();
    assert!(
        same.contains(
            "filter_chains[1].filter_chain_match: has the same matching rules as filter_chains[0]"
        ),
        "{same}"
    );
    let names = |names: &[&str]| json!({"server_names": names});
    let overlapping = [names(&["a", "b"]), names(&["b", "c"])];
    let overlapping = overlapping.map(|matches| chain(matches, says("x")));
    let refused = of(&overlapping).unwrap_err();
    assert!(
        refused.contains("overlap with filter_chains[0]"),
        "{refused}"
    );
    for (matches, word) in [
        (json!({"server_names": ["*w.a.test"]}), "partial wildcards"),
        (json!({"destination_port": 0}), "between 1 and 65535"),
        (
            json!({"prefix_ranges": [{"address_prefix": "a"}]}),
            "no IP address",
        ),
        (
            json!({"prefix_ranges": [{"address_prefix": "::", "prefix_len": 129}]}),
            "at most 128",
        ),
        (
            json!({"address_suffix": "1"}),
            "not supported yet: address_suffix",
        ),
    ] {
        let refused = of(&[chain(matches, says("x"))]).unwrap_err();
        assert!(refused.contains(word), "{refused}");
    }
    assert!(of(&[]).unwrap_err().contains("required: a filter chain"));
    of(&[chain(port(1), says("a")), chain(port(2), says("b"))]).unwrap();
}

#[tokio::test]
async fn http_and_what_is_none_go_different_ways_and_no_byte_is_lost() {
    let server = named_tcp("raw").await;
    let listener = json!({
        "name": "sniffed",
        "listener_filters": [
            tls_inspector(), looks("http_inspector", "HttpInspector", json!({})),
        ],
        "filter_chains": [
            chain(json!({"application_protocols": ["http/1.1", "h2c"]}), says("http")),
            chain(json!({}), carries(json!({"cluster": "server"}))),
        ],
    });
    let proxy = start(&[listener], &[cluster("server", server)]);
    let address = at(&proxy, "sniffed");
    assert!(get(address).await.ends_with("\r\n\r\nhttp"));
    assert_eq!(tell(address, b"\x01\x02hello").await, "raw:\u{1}\u{2}hello");
    assert_eq!(tell(address, b"HELO there\r\n").await, "raw:HELO there\r\n");
    // In pieces: the first ones say nothing yet.
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    for piece in [
        "G",
        "ET / HT",
        "TP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    ] {
        socket.write_all(piece.as_bytes()).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("\r\n\r\nhttp"), "{answer}");
    counted(&proxy, "envoy_http_inspector_http11_found", 2.0).await;
    counted(&proxy, "envoy_http_inspector_http_not_found", 2.0).await;
}

#[tokio::test]
async fn tls_passes_through_to_whom_its_name_says() {
    let ca = Ca::new();
    let (a, b) = (ca.pair(&["a.test"]), ca.pair(&["b.test"]));
    let inner = |name: &str, pair| json!({"name": name, "filter_chains": [secured(&json!({"filters": [says(name)]}), pair)]});
    let servers = start(&[inner("a", &a), inner("b", &b)], &[]);
    let clusters = ["a", "b"].map(|name| cluster(name, at(&servers, name)));
    let log = outrigger_conformance::harness::scratch("tcp.log");
    let passes = |name: &str| {
        let access_log = json!([{"name": "file", "typed_config": {
            "@type": format!("{TYPES}.access_loggers.file.v3.FileAccessLog"),
            "path": log, "log_format": {"text_format_source": {"inline_string":
                "%REQUESTED_SERVER_NAME% %UPSTREAM_CLUSTER% %PROTOCOL% %RESPONSE_FLAGS%\n"}},
        }}]);
        let filter = carries(json!({"cluster": name, "access_log": access_log}));
        chain(json!({"server_names": [format!("{name}.test")]}), filter)
    };
    let listener = json!({"name": "front", "filter_chains": [passes("a"), passes("b")]});
    let proxy = start(&[listener], &clusters);
    for (name, want) in [("a.test", "a"), ("b.test", "b")] {
        let client = TlsClient::new(&ca, None).asks_for(name);
        let mut stream = client.shake(at(&proxy, "front")).await.unwrap();
        let ask = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(ask).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.ends_with(&format!("\r\n\r\n{want}")), "{answer}");
    }
    let lines = eventually("two lines", || async {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        (text.lines().count() == 2).then_some(text)
    })
    .await;
    std::fs::remove_file(&log).unwrap();
    assert!(lines.contains("a.test a - -"), "{lines}");
    assert!(lines.contains("b.test b - -"), "{lines}");
}

#[tokio::test]
async fn a_first_message_that_is_too_long_ends_the_connection() {
    let inspector = looks(
        "tls_inspector",
        "TlsInspector",
        json!({"max_client_hello_size": 256}),
    );
    let listener = json!({
        "name": "short", "listener_filters": [inspector],
        "filter_chains": [chain(json!({}), says("never"))],
    });
    let proxy = start(&[listener], &[]);
    let mut begin = vec![22, 3, 1, 0x10, 0, 1, 0, 0x0f, 0xfc];
    begin.resize(512, 0);
    assert_eq!(tell(at(&proxy, "short"), &begin).await, "");
    counted(&proxy, "envoy_tls_inspector_client_hello_too_big", 1.0).await;
}

#[tokio::test]
async fn who_says_nothing_is_closed_or_goes_on_after_the_timeout() {
    let server = named_tcp("late").await;
    let listener = |name: &str, go_on: bool| {
        json!({
            "name": name, "listener_filters": [tls_inspector()],
            "listener_filters_timeout": "0.2s",
            "continue_on_listener_filters_timeout": go_on,
            "filter_chains": [chain(json!({}), carries(json!({"cluster": "server"})))],
        })
    };
    let listeners = [listener("closes", false), listener("goes_on", true)];
    let proxy = start(&listeners, &[cluster("server", server)]);
    let mut silent = TcpStream::connect(at(&proxy, "closes")).await.unwrap();
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0);
    let mut late = TcpStream::connect(at(&proxy, "goes_on")).await.unwrap();
    counted(&proxy, "envoy_listener_downstream_pre_cx_timeout", 2.0).await;
    late.write_all(b"x").await.unwrap();
    late.shutdown().await.unwrap();
    let mut answer = String::new();
    late.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "late:x");
}

fn proxy_protocol(fields: Value) -> Value {
    looks("proxy_protocol", "ProxyProtocol", fields)
}

#[tokio::test]
async fn a_proxy_before_us_says_who_the_client_is() {
    let server = Upstream::named("server").await;
    let to_server = |fields: Value| {
        let mut filter = says("");
        let config = &mut filter["typed_config"];
        config["use_remote_address"] = json!(true);
        config["route_config"]["virtual_hosts"][0]["routes"][0] =
            json!({"match": {"prefix": "/"}, "route": {"cluster": "server"}});
        json!({
            "name": fields["stat_prefix"], "listener_filters": [proxy_protocol(fields)],
            "filter_chains": [chain(json!({}), filter)],
        })
    };
    let listeners = [
        to_server(json!({"stat_prefix": "must"})),
        to_server(json!({"stat_prefix": "may", "allow_requests_without_proxy_protocol": true})),
        to_server(json!({"stat_prefix": "only_v2", "disallowed_versions": ["V1"]})),
    ];
    let proxy = start(&listeners, &[cluster("server", server.address)]);
    let ask = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let v1 = format!("PROXY TCP4 192.0.2.7 192.0.2.8 4000 80\r\n{ask}");
    let mut v2 =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0f\xc0\0\x02\x09\xc0\0\x02\x08\x0f\xa0\0\x50\x04\0\0"
            .to_vec();
    v2.extend(ask.as_bytes());
    assert!(
        raw(at(&proxy, "must"), v1.as_bytes())
            .await
            .contains(" 200 ")
    );
    assert!(raw(at(&proxy, "must"), &v2).await.contains(" 200 "));
    assert!(raw(at(&proxy, "only_v2"), &v2).await.contains(" 200 "));
    assert!(
        raw(at(&proxy, "may"), ask.as_bytes())
            .await
            .contains(" 200 ")
    );
    let told: Vec<String> = server
        .exchanges()
        .iter()
        .map(|exchange| exchange.header("x-forwarded-for").to_owned())
        .collect();
    assert_eq!(told, ["192.0.2.7", "192.0.2.9", "192.0.2.9", "127.0.0.1"]);
    // Without a header, with a broken one, and with one of the wrong version.
    for (listener, bytes) in [
        ("must", ask.as_bytes()),
        ("must", b"PROXY TCP4 nobody\r\n"),
        ("only_v2", v1.as_bytes()),
    ] {
        assert_eq!(raw(at(&proxy, listener), bytes).await, "", "{listener}");
    }
    for (metric, label) in [
        ("envoy_proxy_proto_not_found_disallowed", "must"),
        ("envoy_proxy_proto_error", "must"),
        ("envoy_proxy_proto_disallowed", "only_v2"),
        ("envoy_proxy_proto_not_found_allowed", "may"),
    ] {
        assert!(proxy.metric(metric, label).await >= 1.0, "{metric}");
    }
    assert_eq!(server.exchanges().len(), 4);
}

#[tokio::test]
async fn a_redirected_connection_goes_to_the_listener_it_was_meant_for() {
    let listener = |name: &str, address: &str, port: u16| {
        json!({
            "name": name, "bind_to_port": false,
            "address": {"socket_address": {"address": address, "port_value": port}},
            "filter_chains": [chain(json!({}), says(name))],
        })
    };
    let capturing = json!({
        "name": "capturing", "use_original_dst": true,
        "listener_filters": [proxy_protocol(json!({}))],
        "filter_chains": [
            chain(json!({"destination_port": 7}), says("seven")),
            chain(json!({}), says("caught")),
        ],
    });
    let listeners = [
        capturing,
        listener("exact", "192.0.2.8", 80),
        listener("any", "0.0.0.0", 80),
    ];
    let proxy = start(&listeners, &[]);
    for (destination, port, want) in [
        ("192.0.2.8", 80, "exact"),
        ("192.0.2.9", 80, "any"),
        ("192.0.2.9", 7, "seven"),
        ("192.0.2.9", 81, "caught"),
    ] {
        let ask = format!(
            "PROXY TCP4 192.0.2.7 {destination} 4000 {port}\r\n\
             GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        );
        let answer = raw(at(&proxy, "capturing"), ask.as_bytes()).await;
        assert!(
            answer.ends_with(&format!("\r\n\r\n{want}")),
            "{want}: {answer}"
        );
    }
}

#[tokio::test]
async fn a_filter_looks_only_where_it_is_not_disabled() {
    let server = named_tcp("server").await;
    let mut inspector = tls_inspector();
    inspector["filter_disabled"] = json!({"or_match": {"rules": [
        {"not_match": {"any_match": true}},
        {"destination_port_range": {"start": 1, "end": 65536}},
    ]}});
    let listener = json!({
        "name": "blind", "listener_filters": [inspector],
        "filter_chains": [chain(json!({}), carries(json!({"cluster": "server"})))],
    });
    let proxy = start(&[listener], &[cluster("server", server)]);
    // Without a word: with the inspector it would wait.
    assert_eq!(tell(at(&proxy, "blind"), b"").await, "server:");
}

#[tokio::test]
async fn a_push_changes_chains_and_open_connections_go_on() {
    let listener = |chains: &[Value]| json!({"name": "many", "filter_chains": chains});
    let local = json!({"source_type": "SAME_IP_OR_LOOPBACK"});
    let proxy = start(&[listener(&[chain(local.clone(), says("old"))])], &[]);
    let address = at(&proxy, "many");
    let mut open = TcpStream::connect(address).await.unwrap();
    let ask = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut answer = [0; 1024];
    open.write_all(ask).await.unwrap();
    let count = open.read(&mut answer).await.unwrap();
    assert!(answer[..count].ends_with(b"old"));
    let mut next = proxy.bootstrap.clone();
    let read = read(
        &[listener(&[
            chain(local, says("new")),
            chain(json!({"source_type": "EXTERNAL"}), says("other")),
        ])],
        &[],
    );
    next.listeners.retain(|listener| listener.name != "many");
    next.listeners.extend(read.unwrap().listeners);
    proxy.proxy.apply(next).unwrap();
    open.write_all(ask).await.unwrap();
    let count = tokio::time::timeout(Duration::from_secs(5), open.read(&mut answer)).await;
    let count = count.unwrap().unwrap();
    assert!(answer[..count].ends_with(b"new"));
    assert!(get(address).await.ends_with("new"));
}

#[tokio::test]
async fn a_connection_that_was_looked_at_during_a_push_was_closed() {
    let listener = |prefix: &str| {
        let mut says = says(prefix);
        says["typed_config"]["stat_prefix"] = json!(prefix);
        json!({
            "name": "looks",
            "listener_filters": [looks("http_inspector", "HttpInspector", json!({}))],
            "filter_chains": [{"filters": [says]}],
        })
    };
    let proxy = start(&[listener("before")], &[]);
    let mut early = TcpStream::connect(at(&proxy, "looks")).await.unwrap();
    early.write_all(b"GET").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut next = proxy.bootstrap.clone();
    next.listeners.retain(|listener| listener.name != "looks");
    next.listeners
        .extend(read(&[listener("after")], &[]).unwrap().listeners);
    proxy.proxy.apply(next).unwrap();
    early
        .write_all(b" / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    early.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("after"), "{answer:?}");
}

#[tokio::test]
async fn a_silent_client_of_a_tls_chain_with_a_tcp_proxy_was_never_closed() {
    let ca = Ca::new();
    let server = named_tcp("server").await;
    let carries = carries(json!({"cluster": "server", "idle_timeout": "0.3s"}));
    let listener = json!({
        "name": "silent",
        "filter_chains": [secured(&json!({"filters": [carries]}), &ca.pair(&["a.test"]))],
    });
    let proxy = start(&[listener], &[cluster("server", server)]);
    let mut socket = TcpStream::connect(at(&proxy, "silent")).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(5), socket.read(&mut [0; 8])).await;
    assert_eq!(read.expect("it is closed").unwrap_or(0), 0);
}

/// As a mesh's sidecar has it: nobody names an endpoint, and there are no engines.
#[tokio::test]
async fn an_inbound_listener_chooses_among_ordinary_servers_and_never_among_engines() {
    let (server, engine) = (
        Upstream::named("server").await,
        Upstream::named("engine").await,
    );
    let cluster = |name: &str, at: SocketAddr, metadata: Value| {
        json!({
            "name": name, "type": "STATIC", "connect_timeout": "1s",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{
                "endpoint": {"address": {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}}},
                "metadata": {"filter_metadata": metadata},
            }]}]},
        })
    };
    let inbound = |name: &str| {
        let mut manager = says("");
        manager["typed_config"]["route_config"]["virtual_hosts"][0]["routes"][0] =
            json!({"match": {"prefix": "/"}, "route": {"cluster": name}});
        json!({"name": name, "traffic_direction": "INBOUND", "filter_chains": [{"filters": [manager]}]})
    };
    let clusters = [
        cluster("servers", server.address, json!({})),
        cluster(
            "engines",
            engine.address,
            json!({"outrigger": {"duty": "engine"}}),
        ),
    ];
    let proxy = start(&[inbound("servers"), inbound("engines")], &clusters);
    let answer = get(at(&proxy, "servers")).await;
    assert!(
        answer.contains("200 OK") && answer.contains("\"server\""),
        "{answer}"
    );
    let refused = get(at(&proxy, "engines")).await;
    assert!(
        refused.contains("503") && refused.contains("no endpoint named"),
        "{refused}"
    );
}
