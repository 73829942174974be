//! The codec's readers and writers beside hyper's, which were here before them, and with every cut of what comes.

use super::{
    h1,
    h1_request::{self, Head, Odd},
    h1_response::{Asked, Outgoing},
};
use crate::h1::decoder::Decoder;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use outrigger_filters::body::{BodyError, ResponseBody};
use std::{
    convert::Infallible,
    future::poll_fn,
    sync::{Arc, Mutex},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Pseudo-random numbers, always the same.
struct Dice(u32);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0 as usize % limit
    }

    fn of<'a>(&mut self, some: &[&'a str]) -> &'a str {
        some[self.below(some.len())]
    }

    /// Mostly one of the first.
    fn early<'a>(&mut self, some: &[&'a str]) -> &'a str {
        let limit = 1 + self.below(some.len());
        some[self.below(limit)]
    }
}

/// What matters of a head: request line, fields, how the body is framed.
fn words(head: &Head) -> String {
    let parts = &head.parts;
    let length = match head.body {
        Decoder::Done => Some(0),
        Decoder::Length(length) => Some(length),
        _ => None,
    };
    format!(
        "{} {} {:?} {:?} {length:?}",
        parts.method, parts.uri, parts.version, parts.headers
    )
}

/// The same of hyper's server; `None` if it refuses or waits for more.
async fn hypers(wire: &[u8]) -> Option<String> {
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let found = Arc::new(Mutex::new(None));
    let seen = found.clone();
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (parts, body) = request.into_parts();
        let length = body.size_hint().exact();
        let text = format!(
            "{} {} {:?} {:?} {length:?}",
            parts.method, parts.uri, parts.version, parts.headers
        );
        seen.lock().unwrap().get_or_insert(text);
        async { Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())) }
    });
    near.write_all(wire).await.unwrap();
    near.shutdown().await.unwrap();
    let _ = http1::Builder::new()
        .serve_connection(TokioIo::new(far), service)
        .await;
    found.lock().unwrap().take()
}

/// A head put together of what is usual, odd and wrong.
fn any_head(dice: &mut Dice) -> String {
    let methods = [
        "GET", "POST", "HEAD", "OPTIONS", "CONNECT", "get", "G:T", "", "PRI",
    ];
    let targets = [
        "/",
        "/a?b#c",
        "*",
        "h:80",
        "http://h/x",
        "/\u{e4}",
        "",
        "/a b",
        "/\x01",
        "//",
    ];
    let versions = [
        "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "http/1.1", "",
    ];
    let names = [
        "content-length",
        "Transfer-Encoding",
        "host",
        "x",
        "x ",
        "",
        "connection",
        "te",
        "a/b",
    ];
    let values = [
        "3",
        "0",
        "+3",
        "3, 3",
        "chunked",
        "gzip, chunked",
        "chunked, x",
        "close",
        "",
        " a\tb ",
        "\x01",
    ];
    let ends = ["\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r", "\r\n "];
    let mut head = String::new();
    if dice.below(8) == 0 {
        head += dice.of(&["\r\n", "\n", "\r", " "]);
    }
    let target = dice.early(&targets);
    let version = dice.early(&versions);
    let method = dice.early(&methods);
    head += &format!("{method} {target} {version}{}", dice.of(&ends));
    for _ in 0..dice.below(5) {
        let colon = dice.of(&[":", ": ", ":", ": ", " "]);
        head += &format!(
            "{}{colon}{}{}",
            dice.of(&names),
            dice.of(&values),
            dice.of(&ends)
        );
    }
    head += dice.of(&["\r\n", "\r\n", "\r\n", "\n", ""]);
    head
}

#[tokio::test]
async fn heads_are_read_as_hyper_reads_them() {
    let mut dice = Dice(11);
    let mut taken = 0;
    for _ in 0..20_000 {
        let wire = any_head(&mut dice);
        let ours = h1_request::read(wire.as_bytes());
        let ours = ours.ok().flatten().map(|head| words(&head));
        assert_eq!(ours, hypers(wire.as_bytes()).await, "{wire:?}");
        taken += usize::from(ours.is_some());
    }
    assert!(taken > 1_000, "{taken} of them are heads");
}

#[test]
fn what_comes_in_pieces_is_what_came_at_once() {
    let run = |wire: &[u8], step: usize| {
        let mut ahead = BytesMut::new();
        let mut found = Ok(None);
        for piece in wire.chunks(step.max(1)) {
            match &mut found {
                Ok(None) => found = h1::take(&mut ahead, &mut piece.to_vec()),
                // What follows a whole head is not looked at.
                _ => ahead.extend_from_slice(piece),
            }
        }
        found.map(|came| came.map(|came| words(&came.head)))
    };
    let mut dice = Dice(5);
    for _ in 0..3_000 {
        let wire = any_head(&mut dice);
        let whole = run(wire.as_bytes(), wire.len());
        for step in 1..wire.len() {
            let cut = run(wire.as_bytes(), step);
            // What is malformed is seen in the first piece or at the end: later, or not before more has come.
            let same = match (&whole, &cut) {
                (Err(_), Ok(None)) => !h1_request::may_be_whole(wire.as_bytes(), 0),
                _ => whole == cut,
            };
            assert!(same, "{wire:?} by {step}: {cut:?}, not {whole:?}");
        }
    }
}

#[test]
fn any_bytes_are_a_head_or_none() {
    let mut dice = Dice(3);
    let alphabet = b"GET /HTTP1.0:\r\n\r\n a\x00\xff;,";
    for _ in 0..100_000 {
        let length = dice.below(60);
        let wire: Vec<u8> = (0..length)
            .map(|_| alphabet[dice.below(alphabet.len())])
            .collect();
        let _ = h1_request::read(&wire);
        let _ = h1::take(&mut BytesMut::from("GET / HTTP/1.1\r\n"), &mut wire.clone());
    }
}

#[test]
fn heads_tell_what_their_fields_do_not() {
    let read = |fields: &str| {
        let wire = format!("POST /a HTTP/1.1\r\nhost: h\r\n{fields}\r\n\r\n");
        h1_request::read(wire.as_bytes()).unwrap().unwrap()
    };
    for (fields, keep_alive, expects, takes_trailers) in [
        ("x: y", true, false, false),
        (
            "connection: x\r\nConnection: te, Close",
            false,
            false,
            false,
        ),
        ("connection: keep-alive", true, false, false),
        ("expect: 100-Continue", true, false, false),
        (
            "expect: 100-continue\r\ncontent-length: 1",
            true,
            true,
            false,
        ),
        ("te: gzip, trailers", true, false, true),
        (
            "content-length: 1\r\ntransfer-encoding: chunked",
            false,
            false,
            false,
        ),
    ] {
        let head = read(fields);
        assert_eq!(
            (head.keep_alive, head.expects, head.takes_trailers),
            (keep_alive, expects, takes_trailers),
            "{fields}"
        );
    }
    let odd = |head: &Head| {
        head.parts
            .extensions
            .get::<Odd>()
            .copied()
            .unwrap_or_default()
    };
    assert_eq!(odd(&read("content-length: 2")), Odd::default());
    assert!(odd(&read("content-length: 2\r\ncontent-length: 2")).two_lengths);
    assert!(odd(&read("transfer-encoding: chunked\r\ncontent-length: 2")).framed_twice);
    let target = h1_request::read(b"GET /a#b HTTP/1.1\r\n\r\n")
        .unwrap()
        .unwrap();
    assert!(odd(&target).fragment);
    let old = h1_request::read(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
    assert!(!old.unwrap().unwrap().keep_alive);
}

/// An answer: status, fields, pieces of its body (none: none), whether its length is known, trailers.
#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    fields: Vec<(&'static str, &'static str)>,
    pieces: Vec<&'static str>,
    sized: bool,
    trailers: Vec<(&'static str, &'static str)>,
}

impl Answer {
    fn any(dice: &mut Dice) -> Self {
        let all = [
            ("x-a", "1"),
            ("x-a", "2"),
            ("connection", "x"),
            ("connection", "close"),
            ("trailer", "x-sum, content-length"),
            ("trailer", "x-b"),
            ("date", "then"),
            ("server", "s"),
        ];
        let count = dice.below(6);
        let fields = (0..count).map(|_| all[dice.below(all.len())]).collect();
        let mut answer = Self {
            status: [200, 200, 200, 204, 304, 404, 299][dice.below(7)],
            fields,
            pieces: ["one", "two", "", "0123456789abcdefgh"][..dice.below(5)].to_vec(),
            sized: dice.below(2) == 0,
            trailers: [("x-sum", "1"), ("x-no", "2"), ("x-b", "3")][..dice.below(4)].to_vec(),
        };
        if answer.sized && dice.below(2) == 0 {
            let length = answer.pieces.iter().map(|piece| piece.len()).sum::<usize>();
            let at = dice.below(answer.fields.len() + 1);
            let known = ["0", "3", "6", "24"].into_iter();
            let known = known.filter(|text| text.parse() == Ok(length));
            let said = known.map(|text| ("content-length", text));
            answer.fields.splice(at..at, said);
        }
        answer
    }

    fn response(&self) -> Response<ResponseBody> {
        let data = self
            .pieces
            .iter()
            .map(|piece| Frame::data(Bytes::from(*piece)));
        let mut trailers = HeaderMap::new();
        for (name, value) in &self.trailers {
            trailers.append(*name, value.parse().unwrap());
        }
        let told = (!trailers.is_empty()).then(|| Frame::trailers(trailers));
        let frames: Vec<Result<_, BodyError>> = data.chain(told).map(Ok).collect();
        let open = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let body = if self.sized {
            outrigger_filters::body::full(self.pieces.concat())
        } else {
            open
        };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap();
        for (name, value) in &self.fields {
            response.headers_mut().append(*name, value.parse().unwrap());
        }
        response
    }
}

/// What hyper writes.
async fn written_by_hyper(answer: &Answer, ask: &str) -> String {
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let service = service_fn(|_: Request<hyper::body::Incoming>| async {
        Ok::<_, Infallible>(answer.response())
    });
    near.write_all(ask.as_bytes()).await.unwrap();
    let serving = http1::Builder::new().serve_connection(TokioIo::new(far), service);
    let mut wire = Vec::new();
    let reading = async {
        let mut piece = [0; 4096];
        let reads = async {
            loop {
                match near.read(&mut piece).await.unwrap() {
                    0 => break,
                    count => wire.extend_from_slice(&piece[..count]),
                }
            }
        };
        // A connection that goes on says nothing more.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(1), reads).await;
    };
    tokio::select! {
        biased;
        () = reading => {}
        _ = async { let _ = serving.await; std::future::pending::<()>().await } => {}
    }
    String::from_utf8(wire).unwrap()
}

fn without_date(wire: &str) -> String {
    let kept = wire
        .split("\r\n")
        .map(|line| match line.strip_prefix("date: ") {
            Some(date) if date.ends_with(" GMT") => "date: now",
            _ => line,
        });
    kept.collect::<Vec<_>>().join("\r\n")
}

#[tokio::test(start_paused = true)]
async fn answers_are_written_as_hyper_writes_them() {
    let mut dice = Dice(17);
    for _ in 0..5_000 {
        let answer = Answer::any(&mut dice);
        let method = dice.of(&["GET", "GET", "HEAD"]);
        let te = dice.of(&["", "te: trailers\r\n"]);
        let close = dice.of(&["", "connection: close\r\n"]);
        let ask = format!("{method} / HTTP/1.1\r\n{te}{close}\r\n");
        let asked = Asked {
            version: Version::HTTP_11,
            head_only: method == "HEAD",
            takes_trailers: !te.is_empty(),
            keep_alive: close.is_empty(),
        };
        let mut outgoing = Outgoing::new(answer.response(), asked);
        let mut ours = Vec::new();
        let sent = poll_fn(|cx| outgoing.poll_send(cx, &mut ours)).await;
        sent.unwrap();
        let ours = without_date(&String::from_utf8(ours).unwrap());
        let theirs = without_date(&written_by_hyper(&answer, &ask).await);
        assert_eq!(ours, theirs, "{answer:?} to {ask:?}");
    }
}
