//! Unix domain sockets: endpoints that are reached by one.

use super::listeners::{at, carries, cluster, read, says, start};
use outrigger_conformance::harness::{Client, hosts, raw, scratch};
use serde_json::{Value, json};
use std::{
    os::{linux::net::SocketAddrExt, unix},
    path::Path,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
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
    let listener = json!({
        "name": "l", "address": {"pipe": {"path": "/tmp/l"}},
        "filter_chains": [{"filters": [says("x")]}],
    });
    let refused = read(&[listener], &[]).unwrap_err();
    assert!(
        refused.contains("address.pipe: not supported yet"),
        "{refused}"
    );
    assert!(!Path::new("/tmp/l").exists());
}
