//! Ending, and what workers owe to each other: SIGTERM, drain, both workers serving, a reader of the admin that stalls.

use http::Method;
use outrigger_conformance::harness::{
    Client, Process, ProxyBuilder, Upstream, Version, eventually, request,
};
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const CHAT: &str = "/v1/chat/completions";
const STREAM: &str = r#"{"model":"m","stream":true}"#;

/// Streams an event each 20 ms until it has sent `count`.
async fn streaming(count: usize) -> Upstream {
    Upstream::engine(move |mut conn, _| async move {
        conn.begin_events().await;
        for number in 0..count {
            if !conn.event(&format!("number {number}.")).await {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        conn.event("[DONE]").await;
        conn.end().await.then_some(conn)
    })
    .await
}

async fn started(server: &Upstream, flags: &[&str]) -> (Process, std::net::SocketAddr) {
    let engine = format!("http://{}", server.address);
    let flags = [&["--engine", engine.as_str()], flags].concat();
    let process = Process::proxy(PROGRAM, &flags).await;
    outrigger_conformance::harness::wait_alive(process.admin, 1).await;
    let outbound = process.listener("outbound").await;
    (process, outbound)
}

#[tokio::test]
async fn sigterm_lets_streams_finish_and_takes_nothing_new() {
    for version in Version::BOTH {
        let server = streaming(50).await;
        let (mut process, outbound) = started(&server, &[]).await;
        let mut idle = Client::connect(outbound, version).await;
        // An idle connection that has served, as pools of clients hold them.
        assert_eq!(idle.post("/v1/models/none", "").await.status, 200);
        let mut client = Client::connect(outbound, version).await;
        let mut stream = client.begin(request(Method::POST, CHAT, STREAM)).await;
        stream.until("number 2.").await;
        process.signal("TERM");
        let ready = eventually("/ready turns", || async {
            let reply = Client::get(process.admin, "/ready").await;
            (reply.status == 503).then(|| reply.text())
        })
        .await;
        assert_eq!(ready, "DRAINING\n");
        eventually("nothing new is accepted", || async {
            TcpStream::connect(outbound).await.is_err().then_some(())
        })
        .await;
        eventually("the idle connection is closed", || async {
            idle.is_closed().then_some(())
        })
        .await;
        assert!(
            process.ended(Duration::ZERO).await.is_none(),
            "a stream still runs"
        );
        let rest = stream.whole().await;
        assert!(
            rest.text().contains("number 49.")
                && rest.text().ends_with("data: [DONE]\n\n")
                && !rest.broken,
            "{version:?}"
        );
        let status = process
            .ended(Duration::from_secs(5))
            .await
            .expect("it ends with its last stream");
        assert_eq!(status.code(), Some(0), "{version:?}: {}", process.errors());
    }
}

#[tokio::test]
async fn the_drain_time_cuts_what_does_not_end() {
    let server = streaming(100_000).await;
    let (mut process, outbound) = started(&server, &["--drain-time-s", "1"]).await;
    let mut client = Client::connect(outbound, Version::H1).await;
    let mut stream = client.begin(request(Method::POST, CHAT, STREAM)).await;
    stream.until("number 2.").await;
    let told = Instant::now();
    process.signal("TERM");
    let status = process
        .ended(Duration::from_secs(8))
        .await
        .expect("it ends");
    assert!(
        told.elapsed() >= Duration::from_millis(900),
        "not before its time: {:?}",
        told.elapsed()
    );
    assert_eq!(status.code(), Some(0));
    assert!(
        stream.whole().await.broken,
        "the client sees that it was cut"
    );
}

/// What a client may hold open without asking for anything.
#[derive(Debug, Clone, Copy)]
enum Idle {
    Served(Version),
    Silent,
    HalfAHead,
}

#[tokio::test]
async fn a_proxy_that_does_nothing_ends_at_once() {
    for idle in [
        Idle::Served(Version::H1),
        Idle::Served(Version::H2),
        Idle::Silent,
        Idle::HalfAHead,
    ] {
        let server = streaming(1).await;
        let (mut process, outbound) = started(&server, &[]).await;
        let (mut socket, mut client) = (None, None);
        match idle {
            Idle::Served(version) => {
                let mut served = Client::connect(outbound, version).await;
                assert_eq!(served.post(CHAT, STREAM).await.status, 200);
                client = Some(served);
            }
            Idle::Silent => socket = Some(TcpStream::connect(outbound).await.unwrap()),
            Idle::HalfAHead => {
                let mut half = TcpStream::connect(outbound).await.unwrap();
                half.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
                socket = Some(half);
            }
        }
        process.signal("TERM");
        let status = process.ended(Duration::from_secs(4)).await;
        let status =
            status.unwrap_or_else(|| panic!("{idle:?}: nothing runs, so nothing is waited for"));
        assert_eq!(status.code(), Some(0));
        drop((socket, client));
    }
}

#[tokio::test]
async fn quitquitquit_ends_it_too() {
    let server = streaming(1).await;
    let (mut process, _) = started(&server, &[]).await;
    let mut admin = Client::connect(process.admin, Version::H1).await;
    assert_eq!(admin.post("/quitquitquit", "").await.text(), "OK\n");
    let status = process
        .ended(Duration::from_secs(4))
        .await
        .expect("it ends");
    assert_eq!(status.code(), Some(0), "{}", process.errors());
}

#[tokio::test]
async fn quitquitquit_does_not_cut_running_streams() {
    let server = streaming(50).await;
    let (mut process, outbound) = started(&server, &[]).await;
    let mut client = Client::connect(outbound, Version::H1).await;
    let mut stream = client.begin(request(Method::POST, CHAT, STREAM)).await;
    stream.until("number 2.").await;
    let mut admin = Client::connect(process.admin, Version::H1).await;
    assert_eq!(admin.post("/quitquitquit", "").await.text(), "OK\n");
    let rest = stream.whole().await;
    assert!(
        rest.text().contains("number 49.") && !rest.broken,
        "{}",
        rest.text()
    );
    let status = process
        .ended(Duration::from_secs(5))
        .await
        .expect("it ends with its last stream");
    assert_eq!(status.code(), Some(0), "{}", process.errors());
}

#[tokio::test]
async fn sigterm_at_a_peer_lets_what_streams_through_it_finish() {
    for version in Version::BOTH {
        let server = streaming(50).await;
        let (mut beside, _) = started(&server, &[]).await;
        let inbound = beside.listener("inbound").await;
        let entry = ProxyBuilder::new().peer(inbound).start();
        entry.wait_alive(1).await;
        let mut client = entry.client(version).await;
        let mut stream = client.begin(request(Method::POST, CHAT, STREAM)).await;
        stream.until("number 2.").await;
        beside.signal("TERM");
        let rest = stream.whole().await;
        assert!(
            rest.text().contains("number 49.")
                && rest.text().ends_with("data: [DONE]\n\n")
                && !rest.broken,
            "{version:?}: {}",
            rest.text()
        );
        let status = beside
            .ended(Duration::from_secs(5))
            .await
            .expect("it ends with its last stream");
        assert_eq!(status.code(), Some(0), "{version:?}: {}", beside.errors());
    }
}

#[tokio::test]
async fn a_peer_that_is_killed_in_mid_stream_ends_it_with_an_error_event() {
    for version in Version::BOTH {
        let server = streaming(100_000).await;
        let (beside, _) = started(&server, &[]).await;
        let inbound = beside.listener("inbound").await;
        let entry = ProxyBuilder::new().peer(inbound).start();
        entry.wait_alive(1).await;
        let mut client = entry.client(version).await;
        let mut stream = client.begin(request(Method::POST, CHAT, STREAM)).await;
        stream.until("number 2.").await;
        beside.signal("KILL");
        let rest = stream.whole().await;
        let text = rest.text();
        let mut events = text.trim_end().rsplit("\n\n");
        assert_eq!(events.next(), Some("data: [DONE]"), "{version:?}: {text}");
        let error = events.next().unwrap_or_default();
        assert!(
            error.starts_with("data: {\"error\"") && !rest.broken,
            "{version:?}: {text}"
        );
        assert_eq!(
            entry.only_log().await["response_flags"],
            "UR",
            "{version:?}"
        );
    }
}

#[tokio::test]
async fn both_workers_serve() {
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .concurrency(2)
        .start();
    // Each worker has an upstream pool of its own, so connections upstream tell workers apart: with all clients idle
    // in between, one worker alone would use one connection.
    for _ in 0..64 {
        assert_eq!(
            proxy
                .client(Version::H1)
                .await
                .post(CHAT, "{}")
                .await
                .status,
            200
        );
        if server.connections() > 1 {
            break;
        }
    }
    let used: HashSet<_> = server
        .exchanges()
        .iter()
        .map(|exchange| exchange.connection)
        .collect();
    assert_eq!(
        used.len(),
        2,
        "{} requests went over {used:?}",
        server.exchanges().len()
    );
}

#[tokio::test]
async fn a_stalled_reader_of_the_admin_delays_no_request() {
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let mut socket = TcpStream::connect(proxy.admin()).await.unwrap();
        // Asks for a lot and reads nothing.
        let ask = "GET /stats/prometheus HTTP/1.1\r\nhost: h\r\n\r\n".repeat(500);
        let _ = tokio::time::timeout(Duration::from_millis(100), socket.write_all(ask.as_bytes()))
            .await;
        stalled.push(socket);
    }
    let mut client = proxy.client(Version::H1).await;
    let mut times = Vec::new();
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(client.post(CHAT, "{}").await.status, 200);
        times.push(begun.elapsed());
    }
    times.sort();
    assert!(
        times[25] < Duration::from_millis(20),
        "the median of {times:?}"
    );
}
