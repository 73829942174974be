//! Connections that become WebSockets: who may, what passes, and how they end.

use super::listeners::{at, carries, cluster, start};
use outrigger_conformance::harness::{
    Client, OneChain, ProxyBuilder, TestProxy, Upstream, add_server, eventually, raw,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{bootstrap::Bootstrap, route::Action, upgrade::Upgrade};
use serde_json::json;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const ASK: &str = "GET /v1/realtime?model=m HTTP/1.1\r\nhost: h\r\nConnection: Upgrade\r\n\
    Upgrade: WebSocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n\r\n";

/// Agrees to every upgrade and echoes in capitals until its client ends; GETs without one get 404. What it was asked.
async fn echoing() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = heads.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(serve(socket, noted.clone()));
        }
    });
    (address, heads)
}

async fn serve(mut socket: TcpStream, heads: Arc<Mutex<Vec<String>>>) -> Option<()> {
    loop {
        let head = head(&mut socket).await?.to_lowercase();
        if !head.contains("\r\nupgrade: websocket\r\n") {
            let nothing = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
            socket.write_all(nothing).await.ok()?;
            continue;
        }
        heads.lock().unwrap().push(head);
        let agreed = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
            upgrade: websocket\r\nsec-websocket-accept: y\r\n\r\nhello ";
        socket.write_all(agreed.as_bytes()).await.ok()?;
        let mut piece = [0; 1024];
        loop {
            let count = socket.read(&mut piece).await.ok()?;
            if count == 0 || piece[..count].ends_with(b"leave") {
                return Some(());
            }
            let answer = piece[..count].to_ascii_uppercase();
            socket.write_all(&answer).await.ok()?;
        }
    }
}

async fn head(socket: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).await.ok()?;
        head.push(byte[0]);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

async fn exactly(socket: &mut TcpStream, text: &str) {
    let mut got = vec![0; text.len()];
    let read = tokio::time::timeout(Duration::from_secs(10), socket.read_exact(&mut got));
    read.await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&got), text);
}

/// A connection that has become a WebSocket.
async fn opened(address: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // What follows at once must not be lost either.
    socket
        .write_all(format!("{ASK}a").as_bytes())
        .await
        .unwrap();
    let head = head(&mut socket).await.unwrap().to_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    for field in [
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-accept: y",
    ] {
        assert!(
            head.contains(&format!("\r\n{field}\r\n")),
            "{field} in {head}"
        );
    }
    exactly(&mut socket, "hello A").await;
    socket
}

async fn closed(socket: &mut TcpStream) {
    let read = tokio::time::timeout(Duration::from_secs(10), socket.read(&mut [0; 16])).await;
    assert_eq!(read.unwrap().unwrap_or(0), 0);
}

fn proxy(server: SocketAddr, edit: impl FnOnce(&mut Bootstrap) + 'static) -> TestProxy {
    ProxyBuilder::new().server(server).edit(edit).start()
}

#[tokio::test]
async fn a_websocket_passes_until_its_client_ends() {
    let (server, heads) = echoing().await;
    let proxy = proxy(server, |_| {});
    let mut socket = opened(proxy.outbound()).await;
    let gauge = "envoy_http_downstream_cx_upgrades_active";
    assert!(proxy.metric(gauge, OUTBOUND).await >= 1.0);
    socket.write_all(b"bcd").await.unwrap();
    exactly(&mut socket, "BCD").await;
    socket.shutdown().await.unwrap();
    closed(&mut socket).await;
    let line = proxy.only_log().await;
    assert_eq!(line["response_code"], 101);
    assert_eq!(line["response_flags"], "-");
    assert_eq!(
        (&line["bytes_received"], &line["bytes_sent"]),
        (&json!(4), &json!(10))
    );
    let heads = heads.lock().unwrap();
    let head = &heads[0];
    assert_eq!(heads.len(), 1);
    for field in [
        "connection: upgrade",
        "sec-websocket-key: x",
        "x-forwarded-for: 127.0.0.1",
    ] {
        assert!(
            head.contains(&format!("\r\n{field}\r\n")),
            "{field} in {head}"
        );
    }
    assert!(
        head.starts_with("get /v1/realtime?model=m http/1.1\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn a_server_that_ends_ends_its_client() {
    let (server, _) = echoing().await;
    let proxy = proxy(server, |_| {});
    let mut socket = opened(proxy.outbound()).await;
    socket.write_all(b"leave").await.unwrap();
    closed(&mut socket).await;
}

#[tokio::test]
async fn silence_ends_a_websocket() {
    let (server, _) = echoing().await;
    let proxy = proxy(server, |bootstrap| {
        for listener in &mut bootstrap.listeners {
            listener.http().stream_idle_timeout = Duration::from_millis(300);
        }
    });
    let mut socket = opened(proxy.outbound()).await;
    closed(&mut socket).await;
    let line = proxy.only_log().await;
    assert_eq!(
        (&line["response_code"], &line["response_flags"]),
        (&json!(101), &json!("SI"))
    );
}

#[tokio::test]
async fn a_websocket_reaches_an_engine_behind_a_peer() {
    let (engine, heads) = echoing().await;
    let far = ProxyBuilder::new().engine(engine).start();
    far.wait_alive(1).await;
    let near = ProxyBuilder::new().peer(far.inbound()).start();
    near.wait_alive(1).await;
    let mut socket = opened(near.outbound()).await;
    socket.write_all(b"far").await.unwrap();
    exactly(&mut socket, "FAR").await;
    drop(socket);
    assert_eq!(near.only_log().await["response_code"], 101);
    assert_eq!(heads.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_that_refuses_is_heard_and_the_connection_stays() {
    let server = Upstream::start(|mut conn, _| async move {
        let answered = conn
            .answer("426 Upgrade Required", "text/plain", "not so")
            .await;
        answered.then_some(conn)
    })
    .await;
    let proxy = proxy(server.address, |_| {});
    let twice = format!("{ASK}GET /a HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
    let answers = raw(proxy.outbound(), twice.as_bytes()).await;
    assert_eq!(answers.matches("HTTP/1.1 426 ").count(), 2, "{answers}");
    assert_eq!(answers.matches("not so").count(), 2, "{answers}");
    assert_eq!(server.exchanges().len(), 2);
}

#[tokio::test]
async fn who_may_is_said_by_the_route_then_by_the_connection_manager() {
    let (server, heads) = echoing().await;
    let says = |enabled| Upgrade {
        name: "websocket".into(),
        enabled,
    };
    for (manager, route, allowed) in [
        (None, None, false),
        (Some(false), None, false),
        (Some(true), None, true),
        (Some(true), Some(false), false),
        (None, Some(true), true),
    ] {
        let proxy = proxy(server, move |bootstrap| {
            for listener in &mut bootstrap.listeners {
                let http = listener.http();
                http.upgrades = manager.map(says).into_iter().collect();
                for host in &mut http.route_config.virtual_hosts {
                    for one in &mut host.routes {
                        if let Action::Route(action) = &mut one.action {
                            action.upgrades = route.map(says).into_iter().collect();
                        }
                    }
                }
            }
        });
        if allowed {
            drop(opened(proxy.outbound()).await);
            continue;
        }
        let before = heads.lock().unwrap().len();
        let ask = ASK.replace("Connection: Upgrade", "Connection: Upgrade, close");
        let answer = raw(proxy.outbound(), ask.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 403 "),
            "{manager:?} {route:?}: {answer}"
        );
        let line = proxy.only_log().await;
        assert_eq!(line["response_code_details"], "upgrade_failed");
        assert_eq!(heads.lock().unwrap().len(), before);
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_as_for_any_request() {
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let proxy = proxy(held.local_addr().unwrap(), |_| {});
    let ask = ASK.replace("Connection: Upgrade", "Connection: Upgrade, close");
    let answer = raw(proxy.outbound(), ask.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert_eq!(proxy.only_log().await["response_flags"], "UF");
}

#[tokio::test]
async fn another_endpoint_takes_over_before_anything_was_said() {
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let dead = held.local_addr().unwrap();
    let (server, _) = echoing().await;
    let proxy = proxy(dead, move |bootstrap| add_server(bootstrap, server));
    for _ in 0..2 {
        drop(opened(proxy.outbound()).await);
    }
}

#[tokio::test]
async fn what_an_upgrade_says_may_go_through_a_tcp_proxy() {
    let (server, _) = echoing().await;
    let behind = proxy(server, |_| {});
    let listener = json!({"name": "tcp", "filter_chains": [
        {"filters": [carries(json!({"cluster": "behind"}))]},
    ]});
    let front = start(&[listener], &[cluster("behind", behind.outbound())]);
    let mut socket = opened(at(&front, "tcp")).await;
    socket.write_all(b"x").await.unwrap();
    exactly(&mut socket, "X").await;
}

#[tokio::test]
async fn a_client_that_went_before_its_101_held_the_engines_connection_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = proxy(address, |_| {});
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let head = head(&mut socket).await.unwrap();
        assert!(head.to_lowercase().contains("upgrade: websocket"), "{head}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let agreed = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        socket.write_all(agreed).await.unwrap();
        closed(&mut socket).await;
    });
    let mut client = TcpStream::connect(proxy.outbound()).await.unwrap();
    // With a byte behind the head nobody looks for the client's end before the 101 is written.
    client
        .write_all(format!("{ASK}a").as_bytes())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.set_zero_linger().unwrap();
    drop(client);
    server.await.unwrap();
}

#[tokio::test]
async fn an_open_websocket_counts_as_a_connection() {
    let (server, _) = echoing().await;
    let proxy = proxy(server, |_| {});
    let active = || async {
        let told = Client::get(proxy.admin(), "/clusters").await.text();
        let line = told
            .lines()
            .find(|line| line.starts_with("fleet::") && line.contains("::cx_active::"));
        line.unwrap_or_else(|| panic!("{told}"))
            .rsplit(':')
            .next()
            .unwrap()
            .to_owned()
    };
    let mut socket = opened(proxy.outbound()).await;
    assert_eq!(active().await, "1");
    socket.shutdown().await.unwrap();
    closed(&mut socket).await;
    eventually("its connection to be counted as closed", || async {
        (active().await == "0").then_some(())
    })
    .await;
}
