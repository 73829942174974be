//! HTTP/1 from upstreams, however it comes: what the codec takes, what it refuses, and which connections it trusts again.

use http::Method;
use outrigger_conformance::harness::{Client, ProxyBuilder, Upstream, Version, request};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A server that says `answer` to every request, in pieces of `step` bytes.
async fn says(answer: &'static str, step: usize) -> Upstream {
    Upstream::start(move |mut conn, _| async move {
        for piece in answer.as_bytes().chunks(step) {
            conn.write(piece).await;
            if step < 100 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        Some(conn)
    })
    .await
}

#[tokio::test]
async fn an_answer_may_come_a_byte_at_a_time() {
    let answer = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\
                  x-Case: Kept\r\n\r\n3;ext=1\r\none\r\n4\r\n two\r\n0\r\nx-sum: 1\r\n\r\n";
    for step in [1, 7, 1000] {
        let server = says(answer, step).await;
        let proxy = ProxyBuilder::new().server(server.address).start();
        let mut client = proxy.client(Version::H1).await;
        for _ in 0..2 {
            let reply = client.send(request(Method::GET, "/x", "")).await;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "one two")
            );
            assert_eq!(reply.header("x-case"), "Kept");
        }
        assert_eq!(
            server.connections(),
            1,
            "it was whole, so it was used again"
        );
    }
}

#[tokio::test]
async fn an_answer_of_http_1_0_ends_with_its_connection() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.write("HTTP/1.0 200 OK\r\n\r\nall there is").await;
        None
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    for call in 1..=2 {
        let reply = Client::get(proxy.outbound(), "/x").await;
        assert_eq!(
            (reply.text().as_str(), reply.broken),
            ("all there is", false)
        );
        assert_eq!(server.connections(), call);
    }
}

#[tokio::test]
async fn an_answer_of_http_1_0_reaches_the_client_in_http_1_1() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.write("HTTP/1.0 200 OK\r\ncontent-length: 2, 2\r\n\r\nok")
            .await;
        None
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
    // Twice: its end is the upstream's connection's, not the client's.
    for _ in 0..2 {
        let ask = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n";
        socket.write_all(ask).await.unwrap();
        let head = read_head(&mut socket).await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("\r\ncontent-length: 2\r\n"), "{head}");
        let mut body = [0; 2];
        socket.read_exact(&mut body).await.unwrap();
        assert_eq!(&body, b"ok");
    }
}

#[tokio::test]
async fn a_connection_with_more_to_say_than_its_answer_is_not_used_again() {
    let spoiled = [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 404 No\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
    ];
    for answer in spoiled {
        let server = says(answer, 1000).await;
        let proxy = ProxyBuilder::new().server(server.address).start();
        let mut client = proxy.client(Version::H1).await;
        for call in 1..=3 {
            let reply = client.send(request(Method::GET, "/x", "")).await;
            assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "ok"));
            assert_eq!(server.connections(), call, "{answer:?}");
        }
    }
}

#[tokio::test]
async fn an_answer_said_to_nobody_is_not_taken_for_the_next_one() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.json("200 OK", "1").await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        conn.json("200 OK", "evil").await;
        Some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut client = proxy.client(Version::H1).await;
    for call in 1..=3 {
        assert_eq!(
            client.send(request(Method::GET, "/x", "")).await.text(),
            "1"
        );
        tokio::time::sleep(Duration::from_millis(80)).await;
        assert_eq!(server.connections(), call);
    }
}

#[tokio::test]
async fn a_broken_chunk_ends_the_answer_as_a_break() {
    let server = says(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\nzz\r\n",
        60,
    )
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let reply = Client::get(proxy.outbound(), "/x").await;
    assert_eq!(reply.status, 200);
    assert!(reply.broken, "{}", reply.text());
    let line = proxy.only_log().await;
    assert_eq!(line["response_flags"], "UPE", "{line}");
}

/// Reads what comes up to the end of a head.
async fn read_head(socket: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(socket.read(&mut byte).await.unwrap(), 1, "a whole head");
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn an_answer_that_comes_before_the_upload_is_over_goes_on_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let mut heads = Vec::new();
        let mut open = Vec::new();
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().await.unwrap();
            heads.push(read_head(&mut socket).await);
            let answer = "HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno!";
            socket.write_all(answer.as_bytes()).await.unwrap();
            open.push(socket);
        }
        heads
    });
    let proxy = ProxyBuilder::new().server(address).start();
    for _ in 0..2 {
        let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
        let head =
            "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
        socket.write_all(head.as_bytes()).await.unwrap();
        let answer = read_head(&mut socket).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
    let heads = tokio::time::timeout(Duration::from_secs(5), server).await;
    for head in heads.expect("each on a connection of its own").unwrap() {
        assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
        assert!(!head.contains("content-length"), "{head}");
    }
}

#[tokio::test]
async fn an_upload_of_unknown_length_goes_on_in_chunks_and_whole() {
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut socket = TcpStream::connect(proxy.outbound()).await.unwrap();
    let head =
        "PUT /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut sent = String::new();
    for number in 0..200 {
        let piece = format!("piece {number};").repeat(1 + number % 50);
        let chunk = format!("{:x}\r\n{piece}\r\n", piece.len());
        socket.write_all(chunk.as_bytes()).await.unwrap();
        sent += &piece;
    }
    socket.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let got = server.only();
    assert_eq!(String::from_utf8(got.body.clone()).unwrap(), sent);
    assert_eq!(got.header("transfer-encoding"), "chunked");
}
