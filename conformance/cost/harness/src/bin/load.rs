//! What does a client get? A closed loop of OpenAI-shaped requests that verifies every reply; prints one JSON line.
//!
//! Checks status, length, each event's number in order and `[DONE]`. Measures no CPU: the caller does, of the proxy.
//! usage: `load PORT --conns C (--seconds S | --requests R) [--stream EVENTS] [--delay-us D] [--hold]`
//! `--hold` prints `ALL_OPEN` on stderr once every connection has had an event of its stream.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

const PROMPT_BYTES: usize = 1500;
const ERRORS_MAX: u64 = 1000;
const NUMBER: &[u8] = b"token number ";
const WORDS: [&str; 12] = [
    "the", "request", "answer", "context", "river", "with", "each", "token", "cache", "section",
    "history", "market",
];

struct Options {
    port: u16,
    connections: usize,
    requests: u64,
    seconds: f64,
    events: Option<u64>,
    delay_us: u64,
    hold: bool,
}

impl Options {
    fn parse() -> Result<Self, Box<dyn Error>> {
        let mut arguments = std::env::args().skip(1);
        let port = arguments
            .next()
            .ok_or("usage: load PORT --conns C …")?
            .parse()?;
        let mut options = Self {
            port,
            connections: 1,
            requests: u64::MAX,
            seconds: 3600.0,
            events: None,
            delay_us: 0,
            hold: false,
        };
        while let Some(name) = arguments.next() {
            if name == "--hold" {
                options.hold = true;
                continue;
            }
            let value = arguments
                .next()
                .ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--conns" => options.connections = value.parse()?,
                "--requests" => options.requests = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--stream" => options.events = Some(value.parse()?),
                "--delay-us" => options.delay_us = value.parse()?,
                _ => return Err(format!("unknown option {name}").into()),
            }
        }
        Ok(options)
    }

    /// A chat request of some 1.5 KB.
    fn body(&self) -> Bytes {
        let text: Vec<&str> = (0..PROMPT_BYTES / 7)
            .map(|n| WORDS[(n * n + 3 * n) % WORDS.len()])
            .collect();
        format!(
            r#"{{"model":"bench-model","stream":{},"max_tokens":{},"stop":["delay_us={}"],"messages":[{{"role":"user","content":"{}"}}]}}"#,
            self.events.is_some(),
            self.events.unwrap_or(32),
            self.delay_us,
            text.join(" ")
        )
        .into()
    }
}

/// What all connections found.
#[derive(Default)]
struct Tally {
    started: u64,
    ok: u64,
    events: u64,
    opened: usize,
    errors: BTreeMap<String, u64>,
    latencies_us: Vec<u64>,
}

struct Load {
    options: Options,
    body: Bytes,
    end: Instant,
    tally: RefCell<Tally>,
}

impl Load {
    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Box<dyn Error>> {
        let socket = TcpStream::connect(("127.0.0.1", self.options.port)).await?;
        socket.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        tokio::task::spawn_local(async move { connection.await.ok() });
        Ok(sender)
    }

    fn request(&self) -> Result<Request<Full<Bytes>>, http::Error> {
        Request::post("/v1/chat/completions")
            .header("host", "localhost")
            .header("content-type", "application/json")
            .header("user-agent", "OpenAI/Python 2.8.0")
            .header("accept", "application/json")
            .header("authorization", "Bearer sk-bench-0123456789")
            .body(Full::new(self.body.clone()))
    }

    /// One exchange, verified.
    async fn exchange(&self, sender: &mut SendRequest<Full<Bytes>>) -> Result<(), Box<dyn Error>> {
        let begun = Instant::now();
        sender.ready().await?;
        let response = sender.send_request(self.request()?).await?;
        if response.status() != 200 {
            return Err(format!("status {}", response.status()).into());
        }
        match self.options.events {
            Some(events) => self.read_stream(response, events).await?,
            None => read_reply(response).await?,
        }
        let mut tally = self.tally.borrow_mut();
        tally.ok += 1;
        tally.latencies_us.push(begun.elapsed().as_micros() as u64);
        Ok(())
    }

    async fn read_stream(
        &self,
        response: Response<Incoming>,
        events: u64,
    ) -> Result<(), Box<dyn Error>> {
        let mut body = response.into_body();
        let (mut rest, mut next, mut done, mut opened) = (Vec::new(), 0, false, false);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            rest.extend_from_slice(&data);
            let mut read = 0;
            while let Some(length) = memmem::find(&rest[read..], b"\n\n") {
                let event = &rest[read..read + length];
                read += length + 2;
                done = event == b"data: [DONE]";
                if let Some(number) = number_of(event) {
                    if number != next {
                        return Err(format!("event {number} where {next} was due").into());
                    }
                    next += 1;
                }
                self.tally.borrow_mut().events += 1;
            }
            rest.drain(..read);
            if !std::mem::replace(&mut opened, true) {
                self.count_open();
            }
        }
        if !done || next != events || !rest.is_empty() {
            return Err(format!("{next} of {events} events, [DONE] {done}").into());
        }
        Ok(())
    }

    fn count_open(&self) {
        let mut tally = self.tally.borrow_mut();
        tally.opened += 1;
        if self.options.hold && tally.opened == self.options.connections {
            eprintln!("ALL_OPEN");
        }
    }

    /// One connection: request after request until the end, with a new connection after an error.
    async fn client(self: Rc<Self>) {
        let mut open = None;
        loop {
            {
                let mut tally = self.tally.borrow_mut();
                let errors: u64 = tally.errors.values().sum();
                if Instant::now() >= self.end
                    || tally.started >= self.options.requests
                    || errors > ERRORS_MAX
                {
                    return;
                }
                tally.started += 1;
            }
            let result = async {
                let mut sender = match open.take() {
                    Some(sender) => sender,
                    None => self.connect().await?,
                };
                self.exchange(&mut sender).await?;
                open = Some(sender);
                Ok::<_, Box<dyn Error>>(())
            };
            if let Err(error) = result.await {
                *self
                    .tally
                    .borrow_mut()
                    .errors
                    .entry(error.to_string())
                    .or_default() += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
}

fn number_of(event: &[u8]) -> Option<u64> {
    let start = memmem::find(event, NUMBER)? + NUMBER.len();
    std::str::from_utf8(event.get(start..start + 6)?)
        .ok()?
        .parse()
        .ok()
}

async fn read_reply(response: Response<Incoming>) -> Result<(), Box<dyn Error>> {
    let length: Option<usize> = match response.headers().get("content-length") {
        Some(value) => Some(value.to_str()?.parse()?),
        None => None,
    };
    let body = response.into_body().collect().await?.to_bytes();
    let whole = length.is_none_or(|length| length == body.len()) && body.ends_with(b"}");
    if !whole || memmem::find(&body, b"the reply goes on for a few dozen tokens").is_none() {
        return Err("wrong body".into());
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse()?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(options.seconds);
    let load = Rc::new(Load {
        body: options.body(),
        options,
        end,
        tally: RefCell::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let clients = (0..load.options.connections)
            .map(|_| tokio::task::spawn_local(Rc::clone(&load).client()));
        for client in clients.collect::<Vec<_>>() {
            client.await?;
        }
        Ok::<_, tokio::task::JoinError>(())
    })?;
    let mut tally = load.tally.borrow_mut();
    tally.latencies_us.sort_unstable();
    let at = |share: f64| {
        let last = tally.latencies_us.len().saturating_sub(1);
        tally
            .latencies_us
            .get((last as f64 * share) as usize)
            .copied()
            .unwrap_or_default()
    };
    println!(
        r#"{{"ok":{},"events":{},"seconds":{:.3},"p50_us":{},"p99_us":{},"errors":{},"error_kinds":{:?}}}"#,
        tally.ok,
        tally.events,
        begun.elapsed().as_secs_f64(),
        at(0.5),
        at(0.99),
        tally.errors.values().sum::<u64>(),
        tally.errors
    );
    Ok(())
}
