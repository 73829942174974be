//! HTTP as it stands on the wire: what passes, what is changed, what is refused.

use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use outrigger_conformance::harness::{
    AnyBody, Client, EchoH2, ProxyBuilder, TestProxy, Upstream, Version, raw, request,
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::cluster::UpstreamProtocol;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const CHAT: &str = "/v1/chat/completions";

async fn before(server: &Upstream) -> TestProxy {
    ProxyBuilder::new().server(server.address).start()
}

#[tokio::test]
async fn method_path_headers_and_body_pass_both_ways() {
    for version in Version::BOTH {
        let server = Upstream::start(|mut conn, _| async move {
            let answer = "HTTP/1.1 201 Created\r\nserver: uvicorn\r\nx-two: a\r\nx-two: b\r\ncontent-length: 5\r\n\r\nhello";
            conn.write(answer).await.then_some(conn)
        })
        .await;
        let proxy = before(&server).await;
        let mut put = request(Method::PUT, "/some/path?a=1&b=%20x", "body");
        put.headers_mut().insert("x-mine", "yes".parse().unwrap());
        put.headers_mut()
            .insert("authorization", "Bearer key".parse().unwrap());
        let reply = proxy.client(version).await.send(put).await;
        assert_eq!(reply.status, 201, "{version:?}");
        assert_eq!(reply.text(), "hello");
        assert_eq!(
            reply.header("server"),
            "uvicorn",
            "the engine's own name passes"
        );
        assert_eq!(reply.headers.get_all("x-two").iter().count(), 2);
        let got = server.only();
        assert_eq!(got.line, "PUT /some/path?a=1&b=%20x HTTP/1.1");
        assert_eq!(got.body, b"body");
        assert_eq!(
            (got.header("x-mine"), got.header("authorization")),
            ("yes", "Bearer key")
        );
        assert_eq!(
            got.header("host"),
            proxy.outbound().to_string(),
            "as the client said it"
        );
    }
}

#[tokio::test]
async fn connections_are_kept_on_both_sides() {
    for version in Version::BOTH {
        let server = Upstream::named("a").await;
        let proxy = before(&server).await;
        let mut client = proxy.client(version).await;
        for _ in 0..6 {
            assert_eq!(client.post(CHAT, "{}").await.status, 200);
        }
        assert_eq!(
            server.connections(),
            1,
            "{version:?}: one connection upstream for six requests"
        );
        assert_eq!(server.exchanges().len(), 6);
    }
}

#[tokio::test]
async fn an_engine_connection_that_said_close_is_not_used_again() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.write("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
            .await;
        None
    })
    .await;
    let proxy = before(&server).await;
    let mut client = proxy.client(Version::H1).await;
    for _ in 0..3 {
        let reply = client.post("/x", "").await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("connection")),
            (200, "")
        );
    }
    assert_eq!(server.connections(), 3);
}

#[tokio::test]
async fn http2_upstream_shares_one_connection_and_passes_trailers_both_ways() {
    for version in Version::BOTH {
        let server = EchoH2::start().await;
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .edit(|bootstrap| {
                for cluster in bootstrap
                    .clusters
                    .iter_mut()
                    .filter(|cluster| cluster.name == FLEET)
                {
                    cluster.protocol = UpstreamProtocol::Http2;
                }
            })
            .start();
        let mut client = proxy.client(version).await;
        for _ in 0..2 {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-checksum", "abc".parse().unwrap());
            let frames = [
                Ok(Frame::data(Bytes::from_static(b"data"))),
                Ok(Frame::trailers(trailers)),
            ];
            let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
            let mut post = request(Method::POST, "/echo", "");
            *post.body_mut() = body;
            post.headers_mut().insert("te", "trailers".parse().unwrap());
            post.headers_mut()
                .insert("trailer", "x-checksum".parse().unwrap());
            let reply = client.send(post).await;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "data"),
                "{version:?}"
            );
            assert_eq!(
                reply.header("x-got-te"),
                "trailers",
                "{version:?}: gRPC needs it"
            );
            if version == Version::H2 {
                let trailers = reply.trailers.expect("trailers come back");
                assert_eq!(trailers["x-checksum"], "abc");
            }
        }
        assert_eq!(server.connections(), 1, "{version:?}");
    }
}

#[tokio::test]
async fn hop_by_hop_headers_go_no_further() {
    let server = Upstream::start(|mut conn, _| async move {
        let answer = "HTTP/1.1 200 OK\r\nconnection: keep-alive, x-private\r\nkeep-alive: timeout=5\r\n\
                      x-private: 1\r\nproxy-connection: x\r\nx-public: 1\r\ncontent-length: 0\r\n\r\n";
        conn.write(answer).await.then_some(conn)
    })
    .await;
    let proxy = before(&server).await;
    let address = proxy.outbound();
    let head = "GET /x HTTP/1.1\r\nhost: h\r\nconnection: close, X-Secret\r\nx-secret: 1\r\nkeep-alive: 1\r\n\
                proxy-connection: keep-alive\r\nte: trailers, deflate\r\nx-keep: 1\r\n\r\n";
    let answer = raw(address, head.as_bytes()).await.to_lowercase();
    let got = server.only();
    for name in [
        "connection",
        "x-secret",
        "keep-alive",
        "proxy-connection",
        "upgrade",
    ] {
        assert_eq!(got.count(name), 0, "{name} reached the engine: {got:?}");
    }
    assert_eq!(
        got.header("te"),
        "trailers",
        "that much passes, as in Envoy"
    );
    assert_eq!(got.header("x-keep"), "1");
    for name in ["keep-alive:", "x-private:", "proxy-connection:"] {
        assert!(
            !answer.contains(name),
            "{name} reached the client: {answer}"
        );
    }
    assert!(answer.contains("x-public: 1"), "{answer}");
}

#[tokio::test]
async fn ids_are_made_or_kept_and_the_client_is_named() {
    for version in Version::BOTH {
        let server = Upstream::named("a").await;
        let proxy = before(&server).await;
        let mut client = proxy.client(version).await;
        client.post(CHAT, "{}").await;
        client.post(CHAT, "{}").await;
        let mut given = request(Method::POST, CHAT, "{}");
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for (name, value) in [
            ("x-request-id", "mine"),
            ("traceparent", trace),
            ("x-forwarded-for", "10.1.2.3"),
        ] {
            given.headers_mut().insert(name, value.parse().unwrap());
        }
        client.send(given).await;
        let got = server.exchanges();
        assert_eq!(got[0].header("x-request-id").len(), 36, "{version:?}");
        assert_ne!(got[0].header("x-request-id"), got[1].header("x-request-id"));
        assert_eq!(got[0].header("traceparent").len(), 55);
        assert_eq!(got[0].header("x-forwarded-for"), "127.0.0.1");
        assert_eq!(got[2].header("x-request-id"), "mine");
        assert_eq!(got[2].header("traceparent"), trace);
        assert_eq!(
            got[2].header("x-forwarded-for").replace(' ', ""),
            "10.1.2.3,127.0.0.1"
        );
        let log = proxy.log(3).await;
        assert_eq!(log[2]["request_id"], "mine");
    }
}

#[tokio::test]
async fn each_attempt_has_an_id_of_its_own_upstream() {
    let refuses = || {
        Upstream::start(|mut conn, _| async move {
            conn.json("503 Service Unavailable", "{}")
                .await
                .then_some(conn)
        })
    };
    let (first, second) = (refuses().await, refuses().await);
    let proxy = ProxyBuilder::new()
        .server(first.address)
        .server(second.address)
        .start();
    let mut post = request(Method::POST, CHAT, r#"{"model":"m"}"#);
    post.headers_mut()
        .insert("x-request-id", "one".parse().unwrap());
    let reply = proxy.client(Version::H1).await.send(post).await;
    assert_eq!(reply.status, 503);
    let mut ids = [first.only(), second.only()].map(|got| got.header("x-request-id").to_owned());
    ids.sort();
    assert_eq!(ids[0], "one");
    assert_ne!(ids[0], ids[1], "vLLM refuses an id that is in use");
}

#[tokio::test]
async fn expect_continue_is_answered_here() {
    for path in [CHAT, "/other"] {
        let server = Upstream::named("a").await;
        let proxy = before(&server).await;
        let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut buffer = vec![0; 4096];
        let read = tokio::time::timeout(Duration::from_secs(5), socket.read(&mut buffer)).await;
        let read = read.expect("100 Continue before the body is sent").unwrap();
        let first = String::from_utf8_lossy(&buffer[..read]).into_owned();
        assert!(first.starts_with("HTTP/1.1 100 "), "{path}: {first}");
        socket.write_all(b"{}").await.unwrap();
        let read = socket.read(&mut buffer).await.unwrap();
        let then = String::from_utf8_lossy(&buffer[..read]).into_owned();
        assert!(then.starts_with("HTTP/1.1 200 "), "{path}: {then}");
        let got = server.only();
        assert_eq!(
            (got.count("expect"), got.body.as_slice()),
            (0, b"{}".as_slice()),
            "{path}"
        );
    }
}

#[tokio::test]
async fn upgrades_are_refused_and_h2c_offers_ignored() {
    let server = Upstream::named("a").await;
    let proxy = before(&server).await;
    let websocket = "GET /ws HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: chat\r\n\
                     sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n";
    let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
    socket.write_all(websocket.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 4096];
    let read = socket.read(&mut buffer).await.unwrap();
    let answer = String::from_utf8_lossy(&buffer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(
        answer.contains("\"error\""),
        "an OpenAI client reads JSON: {answer}"
    );
    assert!(server.exchanges().is_empty());
    let connect = raw_connect(proxy.outbound()).await;
    assert!(
        connect.starts_with("HTTP/1.1 40"),
        "CONNECT is refused: {connect}"
    );
    let h2c = "GET /x HTTP/1.1\r\nhost: h\r\nconnection: close, upgrade, http2-settings\r\nupgrade: h2c\r\n\
               http2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n";
    let answer = raw(proxy.outbound(), h2c.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let got = server.only();
    assert_eq!((got.count("upgrade"), got.count("http2-settings")), (0, 0));
}

async fn raw_connect(address: std::net::SocketAddr) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket
        .write_all(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n")
        .await
        .unwrap();
    let mut buffer = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(5), socket.read(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    String::from_utf8_lossy(&buffer[..read]).into_owned()
}

#[tokio::test]
async fn requests_sent_ahead_on_one_connection_are_answered_in_order() {
    let server = Upstream::start(|mut conn, got| async move {
        if got.path() == "/slow" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let path = got.path().to_owned();
        conn.answer("200 OK", "text/plain", &format!("<{path}>"))
            .await
            .then_some(conn)
    })
    .await;
    let proxy = before(&server).await;
    let text = "POST /slow HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\nabcGET /fast HTTP/1.1\r\nhost: h\r\n\r\n\
                GET /last HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    let answer = raw(proxy.outbound(), text.as_bytes()).await;
    let order: Vec<_> = ["</slow>", "</fast>", "</last>"]
        .iter()
        .map(|mark| answer.find(mark))
        .collect();
    assert!(
        order.iter().all(Option::is_some) && order.is_sorted(),
        "{order:?}: {answer}"
    );
    assert_eq!(server.exchanges()[0].body, b"abc");
}

#[tokio::test]
async fn http_1_0_must_upgrade() {
    let server = Upstream::named("a").await;
    let proxy = before(&server).await;
    let answer = raw(proxy.outbound(), b"GET / HTTP/1.0\r\nhost: h\r\n\r\n").await;
    assert!(answer.contains(" 426 "), "{answer}");
    assert!(server.exchanges().is_empty());
}

/// Requests whose end two parties could see in different places, or that no party should pass on.
const AMBIGUOUS: &[(&str, &str)] = &[
    (
        "two lengths",
        "content-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
    ),
    ("a list of lengths", "content-length: 4, 5\r\n\r\nabcde"),
    ("a signed length", "content-length: +4\r\n\r\nabcd"),
    ("a negative length", "content-length: -1\r\n\r\n"),
    ("a hexadecimal length", "content-length: 0x4\r\n\r\nabcd"),
    (
        "chunked is not last",
        "transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ),
    (
        "an unknown coding",
        "transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunked twice",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunked within a list",
        "transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "a vertical tab",
        "transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    ),
    ("a space before the colon", "content-length : 4\r\n\r\nabcd"),
    (
        "a folded header",
        "x-a: b\r\n content-length: 4\r\n\r\nabcd",
    ),
    ("a NUL in a value", "x-a: b\0c\r\n\r\n"),
    ("a bare CR in a value", "x-a: b\rc: d\r\n\r\n"),
    ("a name that is none", "x a: b\r\n\r\n"),
    ("two hosts", "host: other\r\n\r\n"),
];

#[tokio::test]
async fn ambiguous_requests_are_refused_and_go_no_further() {
    let server = Upstream::named("a").await;
    let proxy = before(&server).await;
    let mut wrong = Vec::new();
    for path in [CHAT, "/other"] {
        for (what, rest) in AMBIGUOUS {
            let text = format!(
                "POST {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-type: application/json\r\n{rest}"
            );
            let seen = server.exchanges().len();
            let answer = outrigger_conformance::harness::raw_within(
                proxy.outbound(),
                text.as_bytes(),
                Duration::from_millis(500),
            )
            .await;
            let first = answer.lines().next().unwrap_or_default().to_owned();
            let refused = ["400", "501"].contains(&first.get(9..12).unwrap_or_default());
            if !refused || server.exchanges().len() != seen {
                wrong.push(format!(
                    "{what} to {path}: {first:?}, {} upstream",
                    server.exchanges().len() - seen
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// RFC 9112, 6.3: nobody behind us sees two lengths.
#[tokio::test]
async fn a_length_beside_chunks_is_not_passed_on() {
    for framing in [
        "content-length: 4\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 400\r\n",
    ] {
        for path in [CHAT, "/other"] {
            let server = Upstream::named("a").await;
            let proxy = before(&server).await;
            let text = format!(
                "POST {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-type: application/json\r\n{framing}\r\n\
                 2\r\n{{}}\r\n0\r\n\r\n"
            );
            let answer = raw(proxy.outbound(), text.as_bytes()).await;
            if answer.starts_with("HTTP/1.1 400 ") {
                assert!(server.exchanges().is_empty());
                continue;
            }
            let got = server.only();
            assert_eq!(got.body, b"{}", "{framing:?}");
            assert_eq!(
                got.count("content-length") + got.count("transfer-encoding"),
                1,
                "{got:?}"
            );
            if got.count("content-length") == 1 {
                assert_eq!(got.header("content-length"), "2");
            }
        }
    }
}

#[tokio::test]
async fn a_request_line_or_chunk_that_is_none_is_refused() {
    let server = Upstream::named("a").await;
    let proxy = before(&server).await;
    for text in [
        "GARBAGE\r\n\r\n",
        "GET  /two-spaces HTTP/1.1\r\nhost: h\r\n\r\n",
        "GET /x HTTP/1.1\r\nconnection: close\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    ] {
        let answer = raw(proxy.outbound(), text.as_bytes()).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            "{text:?}: {answer}"
        );
    }
    assert!(server.exchanges().is_empty(), "{:?}", server.exchanges());
    assert_eq!(
        Client::get(proxy.outbound(), "/x").await.status,
        200,
        "and others are served on"
    );
}

#[tokio::test]
async fn heads_that_are_too_large_are_refused() {
    for version in Version::BOTH {
        let server = Upstream::named("a").await;
        let proxy = before(&server).await;
        let mut client = proxy.client(version).await;
        let mut large = request(Method::GET, "/x", "");
        large
            .headers_mut()
            .insert("x-large", "a".repeat(70 * 1024).parse().unwrap());
        if let Some(answer) = client.try_send(large).await {
            assert_eq!(answer.status(), 431, "{version:?}");
        }
        assert!(server.exchanges().is_empty());
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_engine_closes_costs_no_request() {
    for (closes_at_once, body) in [(true, "{}"), (false, "{}"), (true, ""), (false, "")] {
        let server = Upstream::start(move |mut conn, got| async move {
            // The second request on a connection meets its end.
            let first = got.header("x-turn") == "1";
            if !first && got.connection == 1 {
                return None;
            }
            conn.json("200 OK", "{}").await;
            if closes_at_once { None } else { Some(conn) }
        })
        .await;
        let proxy = before(&server).await;
        let mut client = proxy.client(Version::H1).await;
        for turn in ["1", "2"] {
            let mut call = if body.is_empty() {
                request(Method::GET, "/v1/anything", "")
            } else {
                request(Method::POST, "/v1/embeddings", body)
            };
            call.headers_mut().insert("x-turn", turn.parse().unwrap());
            let reply = client.send(call).await;
            assert_eq!(
                reply.status, 200,
                "turn {turn}, closes at once: {closes_at_once}, body {body:?}"
            );
        }
        assert_eq!(server.connections(), 2);
    }
}

#[tokio::test]
async fn bodies_go_on_as_the_bytes_that_came() {
    let odd = [
        "{ \"model\" :\t\"m\",\r\n\n \"messages\":[ ] , \"model\":\"m\" ,\"x\":1e400,\"y\":\"\\u0000\\ud83d\\ude00\" }  ",
        "{\"model\":\"m\",\"prompt\":\"unfinished",
        "not json at all \u{0}\u{1}",
        "",
    ];
    for version in Version::BOTH {
        for path in [CHAT, "/v1/completions", "/v1/embeddings", "/other"] {
            let server = Upstream::named("a").await;
            let proxy = before(&server).await;
            let mut client = proxy.client(version).await;
            for (at, text) in odd.iter().enumerate() {
                let reply = client.post(path, *text).await;
                assert_eq!(reply.status, 200);
                let got = server.exchanges();
                assert_eq!(got[at].body, text.as_bytes(), "{version:?} {path}");
                assert!(
                    got[at].count("content-length") + got[at].count("transfer-encoding") <= 1,
                    "{:?}",
                    got[at]
                );
            }
        }
    }
}

#[tokio::test]
async fn chunked_requests_arrive_whole() {
    for version in Version::BOTH {
        for path in [CHAT, "/other"] {
            let server = Upstream::named("a").await;
            let proxy = before(&server).await;
            let pieces = [r#"{"model":"#, r#""m","prompt""#, r#":"x"}"#];
            let frames = pieces.map(|piece| Ok(Frame::data(Bytes::from_static(piece.as_bytes()))));
            let mut post = request(Method::POST, path, "");
            *post.body_mut() = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
            let reply = proxy.client(version).await.send(post).await;
            assert_eq!(reply.status, 200, "{version:?} {path}");
            assert_eq!(server.only().body, pieces.concat().as_bytes());
        }
    }
}

#[tokio::test]
async fn a_body_over_the_limit_streams_on_and_is_counted() {
    for version in Version::BOTH {
        let server = Upstream::start(|mut conn, got| async move {
            let hash = got.body.iter().fold(7u64, |hash, byte| {
                hash.wrapping_mul(31).wrapping_add(u64::from(*byte))
            });
            conn.json(
                "200 OK",
                &format!("{{\"bytes\":{},\"hash\":{hash}}}", got.body.len()),
            )
            .await
            .then_some(conn)
        })
        .await;
        let proxy = ProxyBuilder::new()
            .server(server.address)
            .flag("--body-bytes-max", "100000")
            .start();
        let text = format!(
            "{{\"model\":\"m\",\"prompt\":\"{}\"}}",
            "word ".repeat(60_000)
        );
        let hash = text.bytes().fold(7u64, |hash, byte| {
            hash.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        let name = "outrigger_openai_body_too_large_total";
        let counted = proxy.metric(name, "completions").await;
        for chunked in [false, true] {
            let mut post = request(Method::POST, "/v1/completions", text.clone());
            if chunked {
                let pieces: Vec<_> = text
                    .as_bytes()
                    .chunks(30_000)
                    .map(Bytes::copy_from_slice)
                    .collect();
                let frames = pieces.into_iter().map(|piece| Ok(Frame::data(piece)));
                let body: AnyBody =
                    StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
                *post.body_mut() = body;
            }
            let reply = proxy.client(version).await.send(post).await;
            assert_eq!(reply.status, 200);
            assert_eq!(
                reply.json()["bytes"],
                text.len(),
                "{version:?} chunked {chunked}"
            );
            assert_eq!(reply.json()["hash"], hash);
        }
        assert!(proxy.metric(name, "completions").await >= counted + 2.0);
    }
}

#[tokio::test]
async fn answers_without_a_body_end_where_they_end() {
    let server = Upstream::start(|mut conn, got| async move {
        let answer = match got.path() {
            "/204" => "HTTP/1.1 204 No Content\r\n\r\n",
            "/304" => "HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n",
            _ => "HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n",
        };
        conn.write(answer).await.then_some(conn)
    })
    .await;
    for version in Version::BOTH {
        let proxy = before(&server).await;
        let mut client = proxy.client(version).await;
        for (method, path, status) in [
            (Method::GET, "/204", 204),
            (Method::GET, "/304", 304),
            (Method::HEAD, "/head", 200),
        ] {
            let reply = client.send(request(method, path, "")).await;
            assert_eq!(
                (reply.status.as_u16(), reply.body.len()),
                (status, 0),
                "{version:?} {path}"
            );
            if path == "/head" {
                assert_eq!(reply.header("content-length"), "1234", "{version:?}");
            }
        }
        let flags: Vec<_> = proxy
            .log(3)
            .await
            .iter()
            .map(|line| line["response_flags"].clone())
            .collect();
        assert!(
            flags.iter().all(|flag| flag == "-" || flag.is_null()),
            "{version:?}: {flags:?}"
        );
    }
}
