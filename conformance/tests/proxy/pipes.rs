//! Unix domain sockets: endpoints that are reached by one, listeners that clients reach by one.

use super::listeners::{at, carries, cluster, read, says, start};
use outrigger_conformance::harness::{Client, ProxyBuilder, Upstream, hosts, raw, scratch};
use serde_json::{Value, json};
use std::{
    os::{
        linux::net::SocketAddrExt,
        unix::{self, fs::PermissionsExt},
    },
    path::Path,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

/// Answers every request on a connection, which it then closes.
fn answering(listener: UnixListener) {
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    socket.read_exact(&mut byte).await?;
                    head.push(byte[0]);
                }
                let answer =
                    b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\npipe";
                socket.write_all(answer).await
            });
        }
    });
}

fn at_pipe(path: &str) -> Value {
    let mut all = cluster("pipe", "127.0.0.1:1".parse().unwrap());
    let endpoint = &mut all["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"];
    endpoint["address"] = json!({"pipe": {"path": path}});
    all
}

fn to_pipe() -> Value {
    let mut filter = says("");
    filter["typed_config"]["route_config"]["virtual_hosts"][0]["routes"][0] =
        json!({"match": {"prefix": "/"}, "route": {"cluster": "pipe"}});
    filter
}

const ASK: &[u8] = b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";

async fn both_ways(path: &str) {
    let listener =
        |name: &str, filter: Value| json!({"name": name, "filter_chains": [{"filters": [filter]}]});
    let listeners = [
        listener("http", to_pipe()),
        listener("tcp", carries(json!({"cluster": "pipe"}))),
    ];
    let proxy = start(&listeners, &[at_pipe(path)]);
    for name in ["http", "tcp"] {
        let answer = raw(at(&proxy, name), ASK).await;
        assert!(answer.ends_with("\r\n\r\npipe"), "{name}: {answer}");
    }
    let host = hosts(proxy.admin(), "pipe").await.remove(0);
    assert_eq!(host["address"], json!({"pipe": {"path": path}}));
    let page = Client::get(proxy.admin(), "/clusters").await.text();
    assert!(
        page.contains(&format!("pipe::{path}::cx_total::2")),
        "{page}"
    );
}

#[tokio::test]
async fn an_endpoint_is_reached_by_its_path() {
    let path = scratch("endpoint.sock");
    answering(UnixListener::bind(&path).unwrap());
    both_ways(path.to_str().unwrap()).await;
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn an_endpoint_is_reached_by_an_abstract_name() {
    let name = format!("outrigger-test-{}", std::process::id());
    let address = unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let listener = unix::net::UnixListener::bind_addr(&address).unwrap();
    listener.set_nonblocking(true).unwrap();
    answering(UnixListener::from_std(listener).unwrap());
    both_ways(&format!("@{name}")).await;
}

#[tokio::test]
async fn a_socket_that_is_not_there_is_a_failed_connection() {
    let path = scratch("nobody.sock");
    let listener = json!({"name": "http", "filter_chains": [{"filters": [to_pipe()]}]});
    let proxy = start(&[listener], &[at_pipe(path.to_str().unwrap())]);
    let answer = raw(at(&proxy, "http"), ASK).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("remote connection failure"), "{answer}");
}

#[test]
fn paths_that_cannot_be_are_refused() {
    for (path, word) in [
        ("", "a path with a '/'"),
        ("nothing", "a path with a '/'"),
        (&format!("/{}", "x".repeat(107)), "at most 107 bytes"),
    ] {
        let refused = read(&[], &[at_pipe(path)]).unwrap_err();
        assert!(refused.contains(word), "{refused}");
    }
    let mut listener = at_its_pipe("l", Path::new("/l"), &json!([{"filters": [says("")]}]));
    listener["address"]["pipe"]["mode"] = json!(0o1000);
    let refused = read(&[listener], &[]).unwrap_err();
    assert!(
        refused.contains("address.pipe.mode: must be at most 511"),
        "{refused}"
    );
}

/// Asks over a pipe, and gives all that comes back.
async fn ask(path: &Path) -> String {
    let mut socket = UnixStream::connect(path).await.unwrap();
    socket.write_all(ASK).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Tells in headers of its answers what it knows of their connections.
fn says_ends(text: &str) -> Value {
    let mut filter = says(text);
    let header = |key: &str, value: &str| json!({"header": {"key": key, "value": value}});
    filter["typed_config"]["route_config"]["response_headers_to_add"] = json!([
        header("x-remote", "%DOWNSTREAM_REMOTE_ADDRESS%"),
        header("x-local", "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%"),
        header("x-port", "%DOWNSTREAM_DIRECT_REMOTE_PORT%"),
    ]);
    filter
}

fn at_its_pipe(name: &str, path: &Path, chains: &Value) -> Value {
    let pipe = json!({"path": path.to_str().unwrap(), "mode": 0o600});
    json!({"name": name, "address": {"pipe": pipe}, "filter_chains": chains})
}

#[tokio::test]
async fn clients_come_over_a_pipe() {
    let path = scratch("listener.sock");
    // Those at a pipe are of this machine.
    let chains = json!([
        {"filter_chain_match": {"source_type": "EXTERNAL"}, "filters": [says("from far away")]},
        {"filter_chain_match": {"source_type": "SAME_IP_OR_LOOPBACK"}, "filters": [says_ends("pipe")]},
    ]);
    let proxy = start(&[at_its_pipe("l", &path, &chains)], &[]);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for _ in 0..8 {
        let answer = ask(&path).await;
        assert!(answer.ends_with("\r\n\r\npipe"), "{answer}");
        let own = path.to_str().unwrap();
        assert!(answer.contains(&format!("x-remote: {own}\r\n")), "{answer}");
        assert!(answer.contains(&format!("x-local: {own}\r\n")), "{answer}");
        assert!(!answer.contains("x-port: "), "{answer}");
    }
    let page = Client::get(proxy.admin(), "/listeners").await.text();
    assert!(page.contains(&format!("l::{}\n", path.display())), "{page}");
    let page = Client::get(proxy.admin(), "/listeners?format=json").await;
    let statuses = page.json()["listener_statuses"].clone();
    let is_there = |status: &Value| {
        *status == json!({"name": "l", "local_address": {"pipe": {"path": path.to_str().unwrap()}}})
    };
    assert!(
        statuses.as_array().unwrap().iter().any(is_there),
        "{statuses}"
    );
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn nobody_is_told_an_address_of_a_client_at_a_pipe() {
    let server = Upstream::named("server").await;
    let path = scratch("forwards.sock");
    let mut filter = to_pipe();
    filter["typed_config"]["use_remote_address"] = json!(true);
    filter["typed_config"]["append_x_forwarded_port"] = json!(true);
    let chains = json!([{"filters": [filter]}]);
    let mut listener = at_its_pipe("l", &path, &chains);
    let proxy = start(
        std::slice::from_ref(&listener),
        &[cluster("pipe", server.address)],
    );
    let answer = ask(&path).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let seen = server.exchanges().pop().unwrap();
    for name in [
        "x-forwarded-for",
        "x-forwarded-port",
        "x-envoy-external-address",
        "x-envoy-internal",
    ] {
        assert_eq!(seen.header(name), "", "{name}");
    }
    drop(proxy);
    let config = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
    config["internal_address_config"] = json!({"unix_sockets": true});
    let proxy = start(&[listener], &[cluster("pipe", server.address)]);
    ask(&path).await;
    let seen = server.exchanges().pop().unwrap();
    assert_eq!(seen.header("x-envoy-internal"), "true");
    drop(proxy);
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn the_admin_listens_at_a_pipe() {
    let path = scratch("admin.sock");
    let place = path.to_str().unwrap().to_owned();
    let proxy = ProxyBuilder::new()
        .edit(move |bootstrap| bootstrap.admin.as_mut().unwrap().address.host = place)
        .start();
    let answer = ask(&path).await;
    assert!(answer.contains("/config_dump"), "{answer}");
    let address = proxy.proxy.admin_address().unwrap().to_string();
    assert_eq!(address, path.to_str().unwrap());
    drop(proxy);
    std::fs::remove_file(path).unwrap();
}
