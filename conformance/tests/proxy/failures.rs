//! Engines that fail in every way they know, and what the client gets.

use http::Method;
use outrigger_conformance::harness::{
    Conn, OneChain, ProxyBuilder, TestProxy, Upstream, Version, metric, request,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::bootstrap::Bootstrap;
use serde_json::Value;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::net::TcpSocket;

const CHAT: &str = "/v1/chat/completions";
const STREAM: &str = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
const WHOLE: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;

/// A way to fail before anything reached the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Early {
    Refuses,
    ResetsAtOnce,
    ClosesAtOnce,
    Garbage,
    HalfAHead,
    DiesBeforeFirstEvent,
    ErrorFirst,
    ErrorFirstInTwoPieces,
    Answers500,
    Answers503,
}

const EARLY: &[Early] = &[
    Early::Refuses,
    Early::ResetsAtOnce,
    Early::ClosesAtOnce,
    Early::Garbage,
    Early::HalfAHead,
    Early::DiesBeforeFirstEvent,
    Early::ErrorFirst,
    Early::ErrorFirstInTwoPieces,
    Early::Answers500,
    Early::Answers503,
];

async fn failing(how: Early) -> (SocketAddr, Result<Upstream, TcpSocket>) {
    if how == Early::Refuses {
        let (address, held) = refused();
        return (address, Err(held));
    }
    let server = Upstream::start(move |conn, _| fail(how, conn)).await;
    (server.address, Ok(server))
}

/// An address where nobody listens, kept from others by a socket that is only bound.
fn refused() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

async fn fail(how: Early, mut conn: Conn) -> Option<Conn> {
    match how {
        Early::Refuses | Early::ClosesAtOnce => {}
        Early::ResetsAtOnce => conn.reset(),
        Early::Garbage => drop(conn.write("\x16\x03\x01 this is no HTTP\r\n\r\n").await),
        Early::HalfAHead => drop(conn.write("HTTP/1.1 200 OK\r\ncontent-ty").await),
        Early::DiesBeforeFirstEvent => drop(conn.begin_events().await),
        Early::ErrorFirst => {
            conn.begin_events().await;
            conn.event(r#"{"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}"#).await;
            conn.event("[DONE]").await;
            conn.end().await;
        }
        Early::ErrorFirstInTwoPieces => {
            conn.begin_events().await;
            conn.chunk("data: {\"err").await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            conn.chunk("or\": {\"message\": \"EngineCore died\"}}\n\n")
                .await;
            conn.event("[DONE]").await;
            conn.end().await;
        }
        Early::Answers500 => drop(
            conn.json(
                "500 Internal Server Error",
                r#"{"error":{"message":"from the engine"}}"#,
            )
            .await,
        ),
        Early::Answers503 => drop(
            conn.json(
                "503 Service Unavailable",
                r#"{"error":{"message":"from the engine"}}"#,
            )
            .await,
        ),
    }
    None
}

/// An engine that streams two events, or answers a whole body.
async fn healthy() -> Upstream {
    Upstream::start(|mut conn, got| async move {
        if String::from_utf8_lossy(&got.body).contains("\"stream\":true") {
            conn.begin_events().await;
            conn.event("{\"id\":1}").await;
            conn.event("[DONE]").await;
            return conn.end().await.then_some(conn);
        }
        conn.json("200 OK", r#"{"id":1}"#).await.then_some(conn)
    })
    .await
}

const SERVED: &str = "data: {\"id\":1}\n\ndata: [DONE]\n\n";

#[tokio::test]
async fn a_generation_that_fails_before_its_first_event_goes_to_another_engine() {
    for version in Version::BOTH {
        for &how in EARLY {
            let (address, _failing) = failing(how).await;
            let good = healthy().await;
            let proxy = ProxyBuilder::new()
                .server(address)
                .server(good.address)
                .start();
            let mut client = proxy.client(version).await;
            let mut attempts = Vec::new();
            for call in 0..2 {
                let reply = client.post(CHAT, STREAM).await;
                assert_eq!(
                    (reply.status.as_u16(), reply.text().as_str()),
                    (200, SERVED),
                    "{how:?} {version:?} call {call}"
                );
                assert!(!reply.broken);
            }
            for line in proxy.log(2).await {
                attempts.push(
                    line["attempts"]
                        .as_u64()
                        .unwrap_or_else(|| panic!("{line}")),
                );
            }
            // Of two in turn, one met the failing engine first.
            assert_eq!(
                attempts.iter().max(),
                Some(&2),
                "{how:?} {version:?}: {attempts:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_generation_that_fails_early_behind_a_peer_goes_to_another_one() {
    for &how in EARLY.iter().filter(|&&how| how != Early::Refuses) {
        let bad = Upstream::engine(move |conn, _| fail(how, conn)).await;
        let good = Upstream::engine(|mut conn, _| async move {
            conn.begin_events().await;
            conn.event("{\"id\":1}").await;
            conn.event("[DONE]").await;
            conn.end().await.then_some(conn)
        })
        .await;
        let beside = [&bad, &good].map(|server| ProxyBuilder::new().engine(server.address).start());
        let gateway = ProxyBuilder::new()
            .peer(beside[0].inbound())
            .peer(beside[1].inbound())
            .start();
        gateway.wait_alive(2).await;
        for call in 0..2 {
            let reply = gateway.client(Version::H1).await.post(CHAT, STREAM).await;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, SERVED),
                "{how:?} call {call}"
            );
        }
        assert!(!bad.exchanges().is_empty(), "{how:?}: it was asked");
    }
}

#[tokio::test]
async fn an_error_in_anthropics_form_is_one_too() {
    let bad = Upstream::start(|mut conn, _| async move {
        conn.begin_events().await;
        conn.chunk("event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"internal_error\",\"message\":\"EngineCore died\"}}\n\n").await;
        conn.end().await.then_some(conn)
    })
    .await;
    let good = healthy().await;
    let proxy = ProxyBuilder::new()
        .server(bad.address)
        .server(good.address)
        .start();
    let mut client = proxy.client(Version::H1).await;
    for _ in 0..2 {
        assert_eq!(client.post("/v1/messages", STREAM).await.text(), SERVED);
    }
    assert_eq!(bad.exchanges().len(), 1);
}

#[tokio::test]
async fn a_whole_answer_that_fails_at_its_head_goes_to_another_engine() {
    for &how in EARLY.iter().filter(|how| {
        !matches!(
            how,
            Early::ErrorFirst | Early::ErrorFirstInTwoPieces | Early::DiesBeforeFirstEvent
        )
    }) {
        let (address, _failing) = failing(how).await;
        let good = healthy().await;
        let proxy = ProxyBuilder::new()
            .server(address)
            .server(good.address)
            .start();
        let mut client = proxy.client(Version::H1).await;
        for _ in 0..2 {
            let reply = client.post(CHAT, WHOLE).await;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, r#"{"id":1}"#),
                "{how:?}"
            );
        }
    }
}

#[tokio::test]
async fn what_is_no_generation_keeps_the_engines_answer_and_is_not_sent_twice() {
    for how in [
        Early::Answers500,
        Early::Answers503,
        Early::ResetsAtOnce,
        Early::ClosesAtOnce,
        Early::Garbage,
    ] {
        let (first, one) = failing(how).await;
        let (second, two) = failing(how).await;
        let proxy = ProxyBuilder::new().server(first).server(second).start();
        for path in ["/v1/embeddings", "/other"] {
            let reply = proxy.client(Version::H1).await.post(path, WHOLE).await;
            match how {
                Early::Answers500 => assert_eq!(reply.status, 500),
                _ => assert!(
                    matches!(reply.status.as_u16(), 502 | 503),
                    "{how:?}: {}",
                    reply.status
                ),
            }
            let engines_own = matches!(how, Early::Answers500 | Early::Answers503);
            assert_eq!(
                reply.text().contains("from the engine"),
                engines_own,
                "{how:?}: {}",
                reply.text()
            );
        }
        let sent = one.map_or(0, |server| server.exchanges().len())
            + two.map_or(0, |server| server.exchanges().len());
        assert_eq!(sent, 2, "{how:?}: two calls, each sent once");
    }
}

#[tokio::test]
async fn a_call_that_could_not_be_sent_goes_to_another_engine_whatever_it_is() {
    let ((dead, _held), good) = (refused(), healthy().await);
    let proxy = ProxyBuilder::new()
        .server(dead)
        .server(good.address)
        .start();
    for path in ["/v1/embeddings", CHAT] {
        for _ in 0..2 {
            assert_eq!(
                proxy
                    .client(Version::H1)
                    .await
                    .post(path, WHOLE)
                    .await
                    .status,
                200,
                "{path}"
            );
        }
    }
}

fn local_reply(reply: &outrigger_conformance::harness::Reply) -> (u16, String) {
    (
        reply.status.as_u16(),
        reply.header("x-outrigger-error").to_owned(),
    )
}

#[tokio::test]
async fn when_all_fail_the_answer_says_which_way() {
    for (how, flag) in [
        (Early::Refuses, "UF"),
        (Early::ResetsAtOnce, "UC"),
        (Early::ClosesAtOnce, "UC"),
        (Early::Garbage, "UPE"),
        (Early::HalfAHead, "UC"),
    ] {
        let (address, _failing) = failing(how).await;
        let proxy = ProxyBuilder::new().server(address).start();
        let reply = proxy.client(Version::H1).await.post(CHAT, STREAM).await;
        let (status, got) = local_reply(&reply);
        assert!(status == 503 || status == 502, "{how:?}: {status}");
        assert!(
            got == flag || how == Early::ResetsAtOnce && got == "UR",
            "{how:?}: {got}"
        );
        let error = &reply.json()["error"];
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|text| text.starts_with("upstream connect error")),
            "{error}"
        );
        assert_eq!(error["code"], status);
        let line = proxy.only_log().await;
        assert!(
            line["response_flags"]
                .as_str()
                .is_some_and(|flags| flags.contains(&got)),
            "{line}"
        );
        assert_eq!(line["response_code"], status, "{line}");
    }
}

/// Sets a field of the `openai` filter.
pub(super) fn openai(field: &'static str, value: u64) -> impl FnOnce(&mut Bootstrap) {
    move |bootstrap| {
        for listener in bootstrap
            .listeners
            .iter_mut()
            .filter(|listener| listener.name == OUTBOUND)
        {
            for filter in listener
                .http()
                .http_filters
                .iter_mut()
                .filter(|filter| filter.name == "openai")
            {
                filter.config.value[field] = value.into();
            }
        }
    }
}

async fn silent(after: &'static [&'static str]) -> Upstream {
    Upstream::start(move |mut conn, _| async move {
        if !after.is_empty() {
            conn.begin_events().await;
        }
        for event in after.iter().filter(|event| !event.is_empty()) {
            conn.event(event).await;
        }
        conn.gone().await;
        None
    })
    .await
}

#[tokio::test]
async fn an_engine_that_is_silent_is_given_up_in_time() {
    for version in Version::BOTH {
        for (field, after) in [
            ("headers_timeout_ms", [].as_slice()),
            ("first_token_timeout_ms", &[""]),
        ] {
            let server = silent(after).await;
            let proxy = ProxyBuilder::new()
                .server(server.address)
                .edit(openai(field, 100))
                .start();
            let begun = Instant::now();
            let reply = proxy.client(version).await.post(CHAT, STREAM).await;
            assert_eq!(
                local_reply(&reply),
                (504, "UT".to_owned()),
                "{field} {version:?}"
            );
            assert!(
                begun.elapsed() >= Duration::from_millis(100)
                    && begun.elapsed() < Duration::from_secs(3)
            );
            assert_eq!(reply.json()["error"]["type"], "TimeoutError");
            assert_eq!(proxy.only_log().await["response_flags"], "UT");
        }
        let server = silent(&["{\"id\":1}"]).await;
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(openai("inter_token_timeout_ms", 100))
            .start();
        let reply = proxy.client(version).await.post(CHAT, STREAM).await;
        assert_eq!(reply.status, 200);
        assert_told_of_the_break(&reply.text(), "data: {\"id\":1}\n\n");
        assert_eq!(proxy.only_log().await["response_flags"], "SI");
    }
}

/// What a client of an OpenAI stream reads when it breaks: all whole events, an error event, `[DONE]`.
fn assert_told_of_the_break(text: &str, events: &str) {
    let rest = text
        .strip_prefix(events)
        .unwrap_or_else(|| panic!("{text}"));
    let error = rest
        .strip_prefix("data: ")
        .and_then(|rest| rest.strip_suffix("\n\ndata: [DONE]\n\n"));
    let error: Value = serde_json::from_str(error.unwrap_or_else(|| panic!("{text}"))).unwrap();
    assert!(error["error"]["message"].is_string(), "{text}");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    Closes,
    Resets,
    Garbage,
}

async fn breaking(how: Late) -> Upstream {
    Upstream::engine(move |mut conn, got| async move {
        let text = String::from_utf8_lossy(&got.body).into_owned();
        if !text.contains("\"stream\":true") {
            conn.write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n").await;
            conn.chunk(r#"{"choices":["#).await;
        } else {
            conn.begin_events().await;
            conn.event("one").await;
            conn.chunk("data: tw").await;
        }
        // The bytes before the break must have been taken.
        tokio::time::sleep(Duration::from_millis(50)).await;
        match how {
            Late::Closes => {}
            Late::Resets => conn.reset(),
            Late::Garbage => drop(conn.write("not a chunk\r\n").await),
        }
        None
    })
    .await
}

#[tokio::test]
async fn a_stream_that_breaks_is_told_of_and_an_answer_that_is_not_held_is_cut() {
    for how in [Late::Closes, Late::Resets, Late::Garbage] {
        for version in Version::BOTH {
            let (server, other) = (breaking(how).await, breaking(how).await);
            let proxy = ProxyBuilder::new()
                .server(server.address)
                .server(other.address)
                .start();
            let mut client = proxy.client(version).await;
            let reply = client.post(CHAT, STREAM).await;
            assert_eq!(reply.status, 200);
            assert_told_of_the_break(&reply.text(), "data: one\n\n");
            assert!(
                !reply.broken,
                "{how:?} {version:?}: told of, not cut as well"
            );
            let reply = client.post("/v1/messages", STREAM).await;
            assert!(
                reply
                    .text()
                    .starts_with("data: one\n\nevent: error\ndata: {\"error\"")
                    || reply
                        .text()
                        .starts_with("data: one\n\nevent: error\ndata: {\"type\":\"error\""),
                "{}",
                reply.text()
            );
            let mut client = proxy.client(version).await;
            let reply = client.post("/v1/messages", WHOLE).await;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, r#"{"choices":["#),
                "{how:?} {version:?}"
            );
            assert!(
                reply.broken,
                "{how:?} {version:?}: the client must see that it is cut"
            );
            let sent = server.exchanges().len() + other.exchanges().len();
            assert_eq!(sent, 3, "after a delivered byte nothing is sent again");
            let reply = proxy.client(version).await.post(CHAT, WHOLE).await;
            assert!(
                reply.status.is_server_error() && !reply.broken,
                "{how:?} {version:?}: nothing of it was delivered, and nobody can: {}",
                reply.text()
            );
            for line in proxy.log(4).await {
                let flags = line["response_flags"].as_str().unwrap_or_default();
                let broke = |flag| ["UC", "UR", "UPE"].contains(&flag);
                assert!(flags.split(',').any(broke), "{how:?}: {line}");
            }
        }
    }
}

#[tokio::test]
async fn a_body_shorter_than_its_length_is_seen_to_be_cut() {
    for version in Version::BOTH {
        for through_peer in [false, true] {
            let server = Upstream::engine(|mut conn, _| async move {
                conn.write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"half\":").await;
                tokio::time::sleep(Duration::from_millis(30)).await;
                None
            })
            .await;
            let beside = ProxyBuilder::new().engine(server.address).start();
            beside.wait_alive(1).await;
            let entry = ProxyBuilder::new().peer(beside.inbound()).start();
            entry.wait_alive(1).await;
            let proxy = if through_peer { &entry } else { &beside };
            // Of chat it would be held.
            let mut client = proxy.client(version).await;
            let reply = client.post("/v1/messages", WHOLE).await;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "{\"half\":"),
                "{version:?}"
            );
            assert!(reply.broken, "{version:?} through a peer: {through_peer}");
            let flags = proxy.only_log().await["response_flags"].clone();
            assert!(
                ["UC", "UR", "UPE"].contains(&flags.as_str().unwrap_or_default()),
                "{version:?} {through_peer}: {flags}"
            );
        }
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_breaks_off_upstream_and_is_not_sent_again() {
    use tokio::io::AsyncWriteExt;
    for path in [CHAT, "/other"] {
        let (one, two) = (healthy().await, healthy().await);
        let proxy = ProxyBuilder::new()
            .server(one.address)
            .server(two.address)
            .start();
        let mut socket = tokio::net::TcpStream::connect(proxy.outbound())
            .await
            .unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{\"a\":"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(socket);
        let line = proxy.only_log().await;
        assert!(
            line["response_flags"]
                .as_str()
                .is_some_and(|flags| flags.contains("DC")),
            "{path}: {line}"
        );
        assert!(
            one.exchanges().is_empty() && two.exchanges().is_empty(),
            "{path}: no whole request arrived"
        );
        for server in [&one, &two] {
            // A failed upload is the client's fault: the engine stays in use.
            assert!(server.connections() <= 1, "{path}");
        }
        assert_eq!(
            proxy
                .client(Version::H1)
                .await
                .post(CHAT, WHOLE)
                .await
                .status,
            200
        );
    }
}

#[tokio::test]
async fn an_answer_before_the_end_of_an_upload_arrives() {
    use tokio::io::AsyncWriteExt;
    for keep_reading in [true, false] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let engine = tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut buffer = vec![0; 65536];
                let _ = tokio::io::AsyncReadExt::read(&mut socket, &mut buffer).await;
                let _ = socket
                    .write_all(b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 4\r\n\r\nmuch")
                    .await;
                while keep_reading
                    && tokio::io::AsyncReadExt::read(&mut socket, &mut buffer)
                        .await
                        .is_ok_and(|read| read > 0)
                {}
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let proxy = ProxyBuilder::new().server(address).start();
        let mut post = request(Method::POST, "/upload", vec![b'x'; 8 << 20]);
        post.headers_mut()
            .insert("content-type", "application/octet-stream".parse().unwrap());
        let reply = proxy.client(Version::H2).await.send(post).await;
        assert_eq!(
            (reply.status.as_u16(), reply.text().as_str()),
            (413, "much"),
            "keeps reading: {keep_reading}"
        );
        engine.abort();
    }
}

#[tokio::test]
async fn a_stream_that_breaks_behind_a_peer_is_told_of_too() {
    for how in [Late::Closes, Late::Resets, Late::Garbage] {
        let server = breaking(how).await;
        let beside = ProxyBuilder::new().engine(server.address).start();
        let entry = ProxyBuilder::new().peer(beside.inbound()).start();
        entry.wait_alive(1).await;
        let reply = entry.client(Version::H1).await.post(CHAT, STREAM).await;
        assert_eq!(reply.status, 200);
        assert_told_of_the_break(&reply.text(), "data: one\n\n");
    }
}

#[tokio::test]
async fn an_error_after_the_first_event_passes_as_the_engine_said_it() {
    let engine = Upstream::start(|mut conn, _| async move {
        conn.begin_events().await;
        conn.event("{\"id\":1}").await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        conn.event(r#"{"error": {"message": "EngineCore died", "code": 500}}"#)
            .await;
        conn.event("[DONE]").await;
        conn.end().await.then_some(conn)
    })
    .await;
    let good = healthy().await;
    for version in Version::BOTH {
        let proxy = ProxyBuilder::new().server(engine.address).start();
        let reply = proxy.client(version).await.post(CHAT, STREAM).await;
        let said = "data: {\"id\":1}\n\ndata: {\"error\": {\"message\": \"EngineCore died\", \"code\": 500}}\n\ndata: [DONE]\n\n";
        assert_eq!(reply.text(), said);
    }
    assert!(good.exchanges().is_empty());
}

async fn nobody() -> TestProxy {
    let (dead, held) = refused();
    let proxy = ProxyBuilder::new().engine(dead).start();
    // As long as the test's process: its proxy tries again and again.
    std::mem::forget(held);
    proxy
}

#[tokio::test]
async fn local_replies_take_the_form_of_whoever_asked() {
    for version in Version::BOTH {
        let proxy = nobody().await;
        let mut client = proxy.client(version).await;
        let openai = client.post(CHAT, STREAM).await;
        assert_eq!(local_reply(&openai), (503, "UH".to_owned()));
        assert_eq!(openai.header("retry-after"), "1");
        assert_eq!(openai.header("content-type"), "application/json");
        let error = &openai.json()["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&"ServiceUnavailableError".into(), &503.into())
        );
        let anthropic = client.post("/v1/messages", STREAM).await;
        assert_eq!(anthropic.status, 503);
        assert_eq!(anthropic.json()["type"], "error");
        assert_eq!(anthropic.json()["error"]["type"], "overloaded_error");
        let mut call = request(Method::POST, "/inference.Engine/Generate", "");
        call.headers_mut()
            .insert("content-type", "application/grpc+proto".parse().unwrap());
        let grpc = client.send(call).await;
        assert_eq!(
            (grpc.status.as_u16(), grpc.header("grpc-status")),
            (200, "14")
        );
        assert_eq!(grpc.header("content-type"), "application/grpc");
        assert!(!grpc.header("grpc-message").is_empty());
        for line in proxy.log(3).await {
            assert_eq!(line["response_flags"], "UH", "{line}");
            assert_eq!(
                line["response_code_details"], "no_healthy_upstream",
                "{line}"
            );
        }
    }
}

/// Four engines that give this answer to everything, slowly, so that many requests are in flight together; and how
/// often they were asked when `calls` came at once.
async fn asked_when_all_answer(status: &'static str, calls: usize) -> usize {
    let mut servers = Vec::new();
    for _ in 0..4 {
        let server = Upstream::start(move |mut conn, _| async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            conn.json(status, "{}").await.then_some(conn)
        });
        servers.push(server.await);
    }
    let proxy = servers
        .iter()
        .fold(ProxyBuilder::new(), |proxy, server| {
            proxy.server(server.address)
        })
        .start();
    let overflow = "envoy_cluster_upstream_rq_retry_overflow";
    let before = metric(proxy.admin(), overflow, "fleet").await;
    let mut clients = Vec::new();
    for _ in 0..calls {
        clients.push(proxy.client(Version::H1).await);
    }
    let mut running = tokio::task::JoinSet::new();
    for mut client in clients {
        running.spawn(async move { client.post(CHAT, STREAM).await.status.as_u16() });
    }
    while let Some(answer) = running.join_next().await {
        assert!(
            status.starts_with(&answer.unwrap().to_string()),
            "the engine's own answer"
        );
    }
    assert!(
        metric(proxy.admin(), overflow, "fleet").await > before,
        "what was not retried is counted"
    );
    servers.iter().map(|server| server.exchanges().len()).sum()
}

#[tokio::test]
async fn the_retry_budget_holds_when_everything_fails() {
    let calls = 40;
    // 20 % of those active, at least 3 at a time: without a budget it were four for each call.
    let sent = asked_when_all_answer("503 Service Unavailable", calls).await;
    assert!(sent > calls && sent <= calls + calls / 2, "{sent}");
    // Engines that break: each call goes on to one other, and the budget is for what comes after.
    let sent = asked_when_all_answer("500 Internal Server Error", calls).await;
    assert!(sent > 2 * calls && sent <= 2 * calls + calls / 2, "{sent}");
}

#[tokio::test]
async fn all_that_wait_for_a_dying_engine_go_on_to_another() {
    // Dies with everything it was asked, well before any answer.
    let dying = Upstream::start(|conn, _| async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        conn.reset();
        None
    })
    .await;
    let good = healthy().await;
    let proxy = ProxyBuilder::new()
        .server(dying.address)
        .server(good.address)
        .start();
    let mut running = tokio::task::JoinSet::new();
    for call in 0..40 {
        let mut client = proxy.client(Version::H1).await;
        let body = if call % 2 == 0 { STREAM } else { WHOLE };
        running.spawn(async move { client.post(CHAT, body).await.status.as_u16() });
    }
    while let Some(status) = running.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    assert!(dying.exchanges().len() > 10, "many waited for it");
}

#[tokio::test]
async fn a_limit_on_requests_is_told_and_logged() {
    let server = silent(&["{\"id\":1}"]).await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            bootstrap
                .clusters
                .iter_mut()
                .for_each(|cluster| cluster.circuit_breakers.default.max_requests = 1)
        })
        .start();
    let mut first = proxy.client(Version::H1).await;
    let mut running = first.begin(request(Method::POST, CHAT, STREAM)).await;
    running.until("{\"id\":1}").await;
    let reply = proxy.client(Version::H1).await.post(CHAT, STREAM).await;
    assert_eq!(local_reply(&reply), (503, "UO".to_owned()));
    assert_eq!(proxy.only_log().await["response_flags"], "UO");
}
