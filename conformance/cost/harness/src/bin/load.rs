//! What does a client get? A closed loop of OpenAI-shaped requests that verifies every reply; prints one JSON line.
//!
//! Checks status, length, each event's number in order and `[DONE]`. Measures no CPU: the caller does, of the proxy.
//! usage: `load PORT --conns C (--seconds S | --requests R) [--stream EVENTS] [--delay-us D] [--bytes B]
//! [--once | --h2 STREAMS] [--tls] [--hold]`
//! `--bytes` is the size of the prompt, `--once` closes each connection after a request, `--h2` speaks HTTP/2 with prior
//! knowledge and as many requests at once on each connection, `--tls` shakes hands anew for each connection and trusts
//! everybody. `--hold` prints `ALL_OPEN` on stderr once every connection has had an event of its stream.
//! Events tell when the upstream wrote them (CLOCK_MONOTONIC): `transit` is the time from there to here.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{self, ClientConfig, DigitallySignedStruct, SignatureScheme};

const PROMPT_BYTES: usize = 1500;
const ERRORS_MAX: u64 = 1000;
const NUMBER: &[u8] = b"token number ";
const WRITTEN: &[u8] = b" written at ";
const WRITTEN_DIGITS: usize = 16;
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
    prompt_bytes: usize,
    once: bool,
    h2_streams: Option<usize>,
    tls: bool,
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
            prompt_bytes: PROMPT_BYTES,
            once: false,
            h2_streams: None,
            tls: false,
            hold: false,
        };
        while let Some(name) = arguments.next() {
            let switch = match name.as_str() {
                "--hold" => Some(&mut options.hold),
                "--once" => Some(&mut options.once),
                "--tls" => Some(&mut options.tls),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = true;
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
                "--bytes" => options.prompt_bytes = value.parse()?,
                "--h2" => options.h2_streams = Some(value.parse()?),
                _ => return Err(format!("unknown option {name}").into()),
            }
        }
        Ok(options)
    }

    /// A chat request with a prompt of about that size.
    fn body(&self) -> Bytes {
        let text: Vec<&str> = (0..self.prompt_bytes / 7)
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
    transit_us: Vec<u64>,
}

struct Load {
    options: Options,
    body: Bytes,
    tls: TlsConnector,
    end: Instant,
    tally: RefCell<Tally>,
}

/// One connection of either version.
enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }
}

/// Runs what hyper spawns on this thread.
#[derive(Clone)]
struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move { drop(future.await) });
    }
}

/// The certificate is not what is measured.
#[derive(Debug)]
struct TrustsAll;

impl ServerCertVerifier for TrustsAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Full handshakes only, TLS 1.3.
fn tls() -> Result<TlsConnector, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustsAll))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

impl Load {
    async fn connect(&self) -> Result<Sender, Box<dyn Error>> {
        let socket = TcpStream::connect(("127.0.0.1", self.options.port)).await?;
        socket.set_nodelay(true)?;
        if self.options.tls {
            let name = ServerName::try_from("localhost")?;
            return self.handshake(self.tls.connect(name, socket).await?).await;
        }
        self.handshake(socket).await
    }

    async fn handshake(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    ) -> Result<Sender, Box<dyn Error>> {
        let stream = TokioIo::new(stream);
        if self.options.h2_streams.is_none() {
            let (sender, connection) = http1::handshake(stream).await?;
            tokio::task::spawn_local(async move { connection.await.ok() });
            return Ok(Sender::Http1(sender));
        }
        let (sender, connection) = http2::handshake(LocalExecutor, stream).await?;
        tokio::task::spawn_local(async move { connection.await.ok() });
        Ok(Sender::Http2(sender))
    }

    fn request(&self) -> Result<Request<Full<Bytes>>, http::Error> {
        let request = match self.options.h2_streams {
            Some(_) => Request::post("http://localhost/v1/chat/completions"),
            None => Request::post("/v1/chat/completions").header("host", "localhost"),
        };
        request
            .header("content-type", "application/json")
            .header("user-agent", "OpenAI/Python 2.8.0")
            .header("accept", "application/json")
            .header("authorization", "Bearer sk-bench-0123456789")
            .body(Full::new(self.body.clone()))
    }

    /// One exchange, verified.
    async fn exchange(&self, sender: &mut Sender) -> Result<(), Box<dyn Error>> {
        let begun = Instant::now();
        let response = sender.send(self.request()?).await?;
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
                let mut tally = self.tally.borrow_mut();
                tally.events += 1;
                if let Some(written) = written_at(event) {
                    tally
                        .transit_us
                        .push(monotonic_ns().saturating_sub(written) / 1000);
                }
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
        let streams = self.options.h2_streams.unwrap_or(1) * self.options.connections;
        if self.options.hold && tally.opened == streams {
            eprintln!("ALL_OPEN");
        }
    }

    /// Request after request until the end, with a new connection after an error; `open` is its share of one to start with.
    async fn client(self: Rc<Self>, mut open: Option<Sender>) {
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
                open = Some(sender).filter(|_| !self.options.once);
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
    digits_after(event, NUMBER, 6)
}

fn written_at(event: &[u8]) -> Option<u64> {
    digits_after(event, WRITTEN, WRITTEN_DIGITS)
}

fn digits_after(event: &[u8], key: &[u8], digits: usize) -> Option<u64> {
    let start = memmem::find(event, key)? + key.len();
    let text = std::str::from_utf8(event.get(start..start + digits)?).ok()?;
    text.parse().ok()
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
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
        tls: tls()?,
        options,
        end,
        tally: RefCell::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut clients = Vec::new();
        for _ in 0..load.options.connections {
            let shared = match load.options.h2_streams {
                Some(_) => Some(load.connect().await?),
                None => None,
            };
            for _ in 0..load.options.h2_streams.unwrap_or(1) {
                let share = match &shared {
                    Some(Sender::Http2(sender)) => Some(Sender::Http2(sender.clone())),
                    _ => None,
                };
                clients.push(tokio::task::spawn_local(Rc::clone(&load).client(share)));
            }
        }
        for client in clients {
            client.await?;
        }
        Ok::<_, Box<dyn Error>>(())
    })?;
    let tally = load.tally.borrow();
    let (latencies, transit) = (sorted(&tally.latencies_us), sorted(&tally.transit_us));
    println!(
        r#"{{"ok":{},"body_bytes":{},"events":{},"seconds":{:.3},"p50_us":{},"p99_us":{},"transit_p50_us":{},"transit_p99_us":{},"errors":{},"error_kinds":{:?}}}"#,
        tally.ok,
        load.body.len(),
        tally.events,
        begun.elapsed().as_secs_f64(),
        quantile(&latencies, 0.5),
        quantile(&latencies, 0.99),
        quantile(&transit, 0.5),
        quantile(&transit, 0.99),
        tally.errors.values().sum::<u64>(),
        tally.errors
    );
    Ok(())
}

fn sorted(values: &[u64]) -> Vec<u64> {
    let mut values = values.to_vec();
    values.sort_unstable();
    values
}

fn quantile(sorted: &[u64], share: f64) -> u64 {
    let last = sorted.len().saturating_sub(1);
    let value = sorted.get((last as f64 * share) as usize);
    value.copied().unwrap_or_default()
}
