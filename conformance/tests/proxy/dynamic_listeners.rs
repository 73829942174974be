//! Listeners that come, are replaced and go while connections and streams are open on them.

use super::dynamic::{Files, answers, any_port, at, everything, listener, served_by, start};
use http::{Method, Request};
use outrigger_conformance::harness::{AnyBody, Client, Upstream, Version, eventually, request};
use serde_json::json;
use std::{net::SocketAddr, process::Command, time::Duration};
use tokio::net::TcpSocket;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");

/// An address where nobody listens, kept from others; see `config::held`.
pub(super) fn held() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(any_port()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

fn get() -> Request<AnyBody> {
    request(Method::GET, "/x", "")
}

#[tokio::test]
async fn a_listener_that_is_replaced_lets_its_connections_end() {
    for version in Version::BOTH {
        let (files, (place, _held)) = (Files::new(), held());
        files.respond("cds.yaml", "c1", &[]);
        files.respond(
            "lds.yaml",
            "1",
            &[listener("first", place, answers("first"))],
        );
        let proxy = start(&files);
        let mut open = Client::connect(place, version).await;
        assert_eq!(open.send(get()).await.text(), "first");
        // Another listener has the address now.
        files.respond(
            "lds.yaml",
            "2",
            &[listener("second", place, answers("second"))],
        );
        served_by(place, "second").await;
        if version == Version::H1 {
            let last = open.send(get()).await;
            assert_eq!(
                (last.text().as_str(), last.header("connection")),
                ("first", "close")
            );
        }
        eventually("the old connection ended", || async {
            open.is_closed().then_some(())
        })
        .await;
        // In place: an open connection sees it, and stays.
        let mut open = Client::connect(place, version).await;
        assert_eq!(open.send(get()).await.text(), "second");
        files.respond(
            "lds.yaml",
            "3",
            &[listener("second", place, answers("third"))],
        );
        served_by(place, "third").await;
        let reply = open.send(get()).await;
        assert_eq!(
            (reply.text().as_str(), reply.header("connection")),
            ("third", "")
        );
        drop(proxy);
    }
}

#[tokio::test]
async fn a_stream_outlives_the_listener_it_came_on() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.begin_events().await;
        conn.event("first").await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        conn.event("last").await;
        conn.end().await.then_some(conn)
    })
    .await;
    let files = Files::new();
    let proxy = everything(&files, server.address).await;
    let mut client = Client::connect(at(&proxy, "edge").await, Version::H1).await;
    let mut stream = client.begin(get()).await;
    stream.until("first").await;
    files.respond("lds.yaml", "l2", &[]);
    files.respond("cds.yaml", "c2", &[]);
    eventually("the listener is gone", || async {
        proxy.proxy.address("edge").is_none().then_some(())
    })
    .await;
    let rest = stream.whole().await;
    assert!(
        rest.text().contains("last") && !rest.broken,
        "{}",
        rest.text()
    );
}

#[test]
fn validation_reads_what_is_referred_to() {
    let files = Files::new();
    let validate = || {
        let output = Command::new(PROGRAM)
            .args([
                "proxy",
                "--mode",
                "validate",
                "-c",
                &files.path("bootstrap.yaml"),
            ])
            .output()
            .unwrap();
        // Beside the log.
        let told = String::from_utf8(output.stderr).unwrap();
        let told = told
            .lines()
            .skip_while(|line| !line.starts_with("outrigger-proxy:"));
        (output.status.success(), told.collect::<Vec<_>>().join("\n"))
    };
    let lds = files.config_source("lds.yaml");
    files.put(
        "bootstrap.yaml",
        &format!("node: {{id: n}}\ndynamic_resources: {{lds_config: {lds}}}\n"),
    );
    let (valid, errors) = validate();
    assert!(!valid && errors.contains("does not exist"), "{errors}");
    files.respond("lds.yaml", "1", &[listener("a", any_port(), answers("a"))]);
    assert_eq!(validate(), (true, String::new()));
    let mut bad = listener("a", any_port(), answers("a"));
    bad["tcp_backlog_size"] = json!("much");
    files.respond("lds.yaml", "2", &[bad]);
    let (valid, errors) = validate();
    assert!(
        !valid && errors.contains("resources[0].tcp_backlog_size"),
        "{errors}"
    );
}
