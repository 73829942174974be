//! HTTP/1 from clients, however it comes: what the codec takes, in which pieces, and what it does when a client leaves.

use outrigger_conformance::harness::{
    OneChain, PATIENCE, ProxyBuilder, TestProxy, Upstream, eventually,
};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// A connection that reads answer by answer.
struct Socket {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Socket {
    async fn to(proxy: &TestProxy) -> Self {
        let stream = TcpStream::connect(proxy.outbound()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            read: Vec::new(),
        }
    }

    async fn say(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).await.unwrap();
    }

    /// All up to and with this mark.
    async fn until(&mut self, mark: &str) -> String {
        loop {
            let found = memchr::memmem::find(&self.read, mark.as_bytes());
            if let Some(at) = found {
                let text = self.read.drain(..at + mark.len()).collect();
                return String::from_utf8(text).unwrap();
            }
            let mut piece = [0; 4096];
            let count = timeout(PATIENCE, self.stream.read(&mut piece)).await;
            let count = count.expect("it comes in time").unwrap();
            let so_far = String::from_utf8_lossy(&self.read);
            assert!(count > 0, "it ended without {mark:?}: {so_far:?}");
            self.read.extend_from_slice(&piece[..count]);
        }
    }

    /// Everything that comes before the connection ends; it is to end in order.
    async fn rest(mut self) -> String {
        let rest = timeout(PATIENCE, self.stream.read_to_end(&mut self.read));
        rest.await
            .expect("it ends in time")
            .expect("it is not reset");
        String::from_utf8(self.read).unwrap()
    }
}

/// Says what it was sent: `<PATH:BODY>`.
async fn echo() -> Upstream {
    Upstream::start(|mut conn, got| async move {
        let body = String::from_utf8_lossy(&got.body).into_owned();
        let text = format!("<{}:{body}>", got.path());
        conn.answer("200 OK", "text/plain", &text)
            .await
            .then_some(conn)
    })
    .await
}

async fn before(server: &Upstream) -> TestProxy {
    ProxyBuilder::new().server(server.address).start()
}

/// Three requests in a row, of every framing.
const THREE: &str = "POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\none\
    \r\nPOST /b HTTP/1.1\r\nHost:h\r\nTransfer-Encoding: Chunked\r\n\r\n2;x=y\r\ntw\r\n01\r\no\r\n0\r\nx-sum: 1\r\n\r\n\
    GET http://h/c HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn requests_may_be_cut_anywhere() {
    let server = echo().await;
    let proxy = before(&server).await;
    for at in 0..THREE.len() {
        let mut socket = Socket::to(&proxy).await;
        socket.say(&THREE[..at]).await;
        // An answer shows that so much was read, and that the rest is not needed for it.
        for (path, next) in [("/a:one", "\r\nPOST /b"), ("/b:two", "GET http")] {
            if at >= THREE.find(next).unwrap() {
                socket.until(&format!("<{path}>")).await;
            }
        }
        socket.say(&THREE[at..]).await;
        let answers = socket.rest().await;
        assert!(answers.ends_with("</c:>"), "cut at {at}: {answers}");
    }
}

#[tokio::test]
async fn requests_may_come_a_byte_at_a_time() {
    let server = echo().await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    for byte in THREE.bytes() {
        socket.say([byte]).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let answers = socket.rest().await;
    let order: Vec<_> = ["</a:one>", "</b:two>", "</c:>"]
        .iter()
        .map(|mark| answers.find(mark))
        .collect();
    assert!(
        order.iter().all(Option::is_some) && order.is_sorted(),
        "{answers}"
    );
    assert!(answers.to_lowercase().contains("connection: close\r\n"));
    assert_eq!(server.exchanges().len(), 3);
}

#[tokio::test]
async fn a_client_that_waits_for_a_word_gets_it_when_its_body_is_wanted() {
    let server = echo().await;
    let proxy = before(&server).await;
    let head = "POST /x HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\n";
    for framing in ["content-length: 3", "transfer-encoding: chunked"] {
        let body = if framing.starts_with('c') {
            "abc"
        } else {
            "3\r\nabc\r\n0\r\n\r\n"
        };
        // Whether it waits for the word or not.
        for waits in [true, false] {
            let mut socket = Socket::to(&proxy).await;
            for _ in 0..2 {
                socket.say(format!("{head}{framing}\r\n\r\n")).await;
                if !waits {
                    socket.say(body).await;
                }
                let word = socket.until("\r\n\r\n").await;
                assert_eq!(word, "HTTP/1.1 100 Continue\r\n\r\n");
                if waits {
                    socket.say(body).await;
                }
                let answer = socket.until("</x:abc>").await;
                assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            }
        }
    }
}

#[tokio::test]
async fn a_client_whose_body_nobody_wants_gets_no_word() {
    let server = echo().await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    let ask = "POST /x HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n";
    socket.say(ask).await;
    let answer = socket.rest().await;
    assert!(
        answer.starts_with("HTTP/1.1 400 "),
        "it names no host: {answer}"
    );
    assert!(server.exchanges().is_empty());
}

#[tokio::test]
async fn a_large_upload_is_read_as_it_is_wanted_and_arrives_whole() {
    let server = Upstream::start(|mut conn, got| async move {
        let sum: usize = got.body.iter().map(|&byte| usize::from(byte)).sum();
        let text = format!("{}:{sum}", got.body.len());
        conn.answer("200 OK", "text/plain", &text)
            .await
            .then_some(conn)
    })
    .await;
    let proxy = before(&server).await;
    let body: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let sum: usize = body.iter().map(|&byte| usize::from(byte)).sum();
    let mut socket = Socket::to(&proxy).await;
    for chunked in [false, true, false] {
        let framing = match chunked {
            true => "transfer-encoding: chunked".to_owned(),
            false => format!("content-length: {}", body.len()),
        };
        let mut wire = format!("POST /up HTTP/1.1\r\nhost: h\r\n{framing}\r\n\r\n").into_bytes();
        if chunked {
            for piece in body.chunks(70_001) {
                wire.extend_from_slice(format!("{:X}\r\n", piece.len()).as_bytes());
                wire.extend_from_slice(piece);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
        } else {
            wire.extend_from_slice(&body);
        }
        socket.say(wire).await;
        socket.until(&format!("3000000:{sum}")).await;
    }
    assert_eq!(server.exchanges().len(), 3);
}

#[tokio::test]
async fn an_answer_that_comes_before_its_upload_says_that_the_connection_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (mut early, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"abc\r\n") {
            early.read_buf(&mut head).await.unwrap();
        }
        let answer = "HTTP/1.1 413 Payload Too Large\r\ncontent-length: 2\r\n\r\nno";
        early.write_all(answer.as_bytes()).await.unwrap();
        early
    });
    let proxy = ProxyBuilder::new().server(address).start();
    let mut socket = Socket::to(&proxy).await;
    let begun =
        "POST /v1/files HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
    socket.say(begun).await;
    let answer = socket.rest().await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    drop(server.await.unwrap());
}

#[tokio::test]
async fn a_blank_line_after_a_request_hides_no_client_that_leaves() {
    let server = Upstream::start(|mut conn, _| async move {
        conn.begin_events().await;
        conn.event("{}").await;
        conn.gone().await;
        None
    })
    .await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    socket
        .say("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}\r\n")
        .await;
    socket.until("{}").await;
    drop(socket);
    let lines = proxy.log(1).await;
    assert_eq!(lines[0]["response_flags"], "DC");
}

#[tokio::test]
async fn the_last_request_of_a_connection_is_the_last_however_many_are_sent_ahead() {
    let server = echo().await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            for listener in &mut bootstrap.listeners {
                for manager in listener.http_managers_mut() {
                    manager.max_requests_per_connection = 2;
                }
            }
        })
        .start();
    let mut socket = Socket::to(&proxy).await;
    // Answered by the proxy, at once.
    let ask = "GET /v1/models HTTP/1.1\r\nhost: h\r\ncontent-length: x\r\n\r\n";
    let ask = ask.replace(
        "content-length: x\r\n",
        "x-outrigger-via: 1,2,3,4,5,6,7,8,9\r\n",
    );
    socket.say(ask.repeat(20)).await;
    let answers = socket.rest().await;
    assert_eq!(answers.matches("HTTP/1.1 508").count(), 2, "{answers}");
    let last = answers.rsplit("HTTP/1.1 508").next().unwrap();
    assert!(last.contains("connection: close"), "{answers}");
}

#[tokio::test]
async fn who_refuses_an_upload_unread_says_so_and_is_not_taken_for_a_reset() {
    let server = echo().await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    // Refused by its head; what follows would be taken for the next request.
    let head = "POST /x HTTP/1.1\r\nhost: a\r\nhost: b\r\ncontent-length: 40000\r\n\r\n";
    socket.say(head).await;
    socket
        .say("GET /smuggled HTTP/1.1\r\nhost: h\r\n\r\n".repeat(100))
        .await;
    let answer = socket.rest().await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    assert!(server.exchanges().is_empty());
}

#[tokio::test]
async fn what_is_sent_ahead_waits_for_the_stream_before_it() {
    let server = Upstream::start(|mut conn, got| async move {
        if got.path() == "/after" {
            return conn.json("200 OK", "{}").await.then_some(conn);
        }
        conn.begin_events().await;
        for _ in 0..20 {
            conn.event("more").await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        conn.end().await.then_some(conn)
    })
    .await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    socket.say("GET /stream HTTP/1.1\r\nhost: h\r\n\r\n").await;
    socket.until("data: more").await;
    socket
        .say("GET /after HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        .await;
    let stream = socket.until("\r\n0\r\n\r\n").await;
    assert_eq!(stream.matches("data: more").count(), 19, "{stream}");
    let answer = socket.rest().await;
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("{}"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_client_that_ends_its_side_is_one_that_left() {
    for half in [true, false] {
        let server = Upstream::start(|mut conn, _| async move {
            conn.gone().await;
            None
        })
        .await;
        let proxy = before(&server).await;
        let mut socket = Socket::to(&proxy).await;
        socket.say("GET /slow HTTP/1.1\r\nhost: h\r\n\r\n").await;
        eventually("it is with the server", || async {
            (server.exchanges().len() == 1).then_some(())
        })
        .await;
        if half {
            socket.stream.shutdown().await.unwrap();
        } else {
            drop(socket);
        }
        let line = proxy.only_log().await;
        assert_eq!(line["response_flags"], "DC", "half: {half}, {line}");
    }
}

#[tokio::test]
async fn a_client_that_ends_its_side_with_its_request_gets_a_quick_answer() {
    let server = Upstream::start(|mut conn, _| async move {
        // Later than the end of the client's side, which is read before.
        tokio::time::sleep(Duration::from_millis(10)).await;
        conn.json("200 OK", "{}").await.then_some(conn)
    })
    .await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    socket.say("GET /a HTTP/1.1\r\nhost: h\r\n\r\n").await;
    socket.stream.shutdown().await.unwrap();
    let answer = socket.rest().await;
    assert!(answer.ends_with("\r\n\r\n{}"), "{answer}");
    assert_eq!(proxy.only_log().await["response_flags"], "-");
}

#[tokio::test]
async fn half_a_head_is_logged_and_blank_lines_are_not() {
    let server = echo().await;
    let proxy = before(&server).await;
    for bytes in [
        "\r\n",
        "\r\n\r\nGET /x HT",
        "GET /last HTTP/1.1\r\nhost: h\r\n\r\n",
    ] {
        let mut socket = Socket::to(&proxy).await;
        socket.say(bytes).await;
        if bytes.starts_with("GET") {
            socket.until("</last:>").await;
        } else {
            socket.stream.shutdown().await.unwrap();
            assert_eq!(socket.rest().await, "");
        }
    }
    let log = proxy.log(2).await;
    assert_eq!(log[0]["response_flags"], "DC", "{log:?}");
    assert_eq!(log[1]["path"], "/last", "{log:?}");
}

#[tokio::test]
async fn an_answer_is_the_same_for_whoever_reads_slowly() {
    let server = Upstream::start(|mut conn, _| async move {
        let body = "0123456789".repeat(200_000);
        conn.answer("200 OK", "text/plain", &body)
            .await
            .then_some(conn)
    })
    .await;
    let proxy = before(&server).await;
    let mut socket = Socket::to(&proxy).await;
    socket
        .say("GET /big HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        .await;
    socket.until("\r\n\r\n").await;
    let mut body = std::mem::take(&mut socket.read);
    let mut piece = vec![0; 30_000];
    loop {
        tokio::time::sleep(Duration::from_millis(1)).await;
        match timeout(PATIENCE, socket.stream.read(&mut piece))
            .await
            .unwrap()
            .unwrap()
        {
            0 => break,
            count => body.extend_from_slice(&piece[..count]),
        }
    }
    assert!(
        body == "0123456789".repeat(200_000).into_bytes(),
        "{}",
        body.len()
    );
}

#[tokio::test]
async fn a_head_that_does_not_come_in_time_is_answered_for() {
    let server = echo().await;
    let proxy = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            for listener in &mut bootstrap.listeners {
                listener.http().request_headers_timeout = Duration::from_millis(200);
            }
        })
        .start();
    let mut socket = Socket::to(&proxy).await;
    // Nothing is late before it begins, and what is whole is not: the upstream may take its time.
    tokio::time::sleep(Duration::from_millis(300)).await;
    socket.say("POST /a HTTP/1.1\r\nhost: h\r\n").await;
    socket.say("content-length: 1\r\n\r\n").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    socket.say("b").await;
    socket.until("</a:b>").await;
    socket.say("GET /c HTTP/1.1\r\nhost: h\r\n").await;
    let answer = socket.rest().await;
    assert!(
        answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"),
        "{answer}"
    );
    assert!(
        answer.ends_with("connection: close\r\n\r\nrequest header timeout"),
        "{answer}"
    );
    let log = proxy.log(2).await;
    assert_eq!(log[1]["response_flags"], "-", "{log:?}");
    assert_eq!(
        log[1]["response_code_details"], "request_header_timeout",
        "{log:?}"
    );
    let late = "envoy_http_downstream_rq_header_timeout";
    assert_eq!(proxy.metric(late, "").await, 1.0);
    // It may be the first byte of HTTP/2, too.
    let mut socket = Socket::to(&proxy).await;
    socket.say("P").await;
    let answer = socket.rest().await;
    assert!(
        answer.ends_with("connection: close\r\n\r\nrequest header timeout"),
        "{answer}"
    );
    assert_eq!(proxy.metric(late, "").await, 2.0);
}
