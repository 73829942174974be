//! Clients: each reads one stream after the other, notes every silence in it, and compares its text.

use crate::{
    Args,
    pod::{Entry, Pod},
};
use futures_util::future::join_all;
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use outrigger_conformance::harness::request;
use rand::{Rng, seq::IteratorRandom};
use serde_json::Value;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// Different prompts.
pub(crate) const PROMPTS: usize = 16;
/// For a stream to end, however often it moves.
const STREAM_MAX: Duration = Duration::from_secs(240);
/// Between two tries of a client whose entry is down.
const PAUSE: Duration = Duration::from_millis(50);

/// What a stream asks for.
pub(crate) struct Ask {
    pub(crate) path: &'static str,
    pub(crate) body: String,
    /// Of the request: by it the access log tells what became of the stream.
    pub(crate) id: String,
}

/// Text and token count of a stream.
pub(crate) type Story = (String, Value);

/// How a stream ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Whole,
    /// Another text, or another count of tokens.
    Wrong,
    /// With the proxy at which it had entered.
    LostWithEntry,
    /// Its last words.
    Failed(String),
}

/// A stream that is over.
pub(crate) struct Ended {
    pub(crate) id: String,
    pub(crate) outcome: Outcome,
    /// Milliseconds between two reads that brought something.
    pub(crate) gaps: Vec<f32>,
}

/// All clients.
pub(crate) struct Clients {
    entries: Vec<Arc<Entry>>,
    expected: Vec<Story>,
    args: Args,
    until: Instant,
    begun: AtomicU64,
    open: AtomicUsize,
    /// Clients that have not ended.
    left: AtomicUsize,
}

impl Clients {
    pub(crate) fn new(pods: &[Pod], args: Args, expected: Vec<Story>, until: Instant) -> Self {
        Self {
            entries: pods.iter().map(|pod| pod.entry.clone()).collect(),
            expected,
            until,
            begun: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            left: AtomicUsize::new(args.streams),
            args,
        }
    }

    /// Streams that run now, while new ones begin.
    pub(crate) fn open(&self) -> Option<usize> {
        (Instant::now() < self.until).then(|| self.open.load(Relaxed))
    }

    /// Whether the last stream is over.
    pub(crate) fn are_over(&self) -> bool {
        self.left.load(Relaxed) == 0
    }

    /// Runs them to their end.
    pub(crate) async fn run(self: Arc<Self>) -> Vec<Ended> {
        let all = (0..self.args.streams).map(|_| tokio::spawn(self.clone().one()));
        let all = join_all(all.collect::<Vec<_>>()).await;
        let all = all.into_iter().map(|ended| {
            // A client that panics has a stream that ended in no way it knows.
            ended.unwrap_or_else(|error| {
                vec![Ended {
                    id: String::new(),
                    outcome: Outcome::Failed(error.to_string()),
                    gaps: Vec::new(),
                }]
            })
        });
        all.flatten().collect()
    }

    async fn one(self: Arc<Self>) -> Vec<Ended> {
        let _left = Left(&self.left);
        let mut ended = Vec::new();
        while Instant::now() < self.until {
            let (prompt, entry) = {
                let mut random = rand::rng();
                let up = self
                    .entries
                    .iter()
                    .filter(|entry| entry.is_up.load(Relaxed));
                (random.random_range(0..PROMPTS), up.choose(&mut random))
            };
            match entry {
                Some(entry) => ended.push(self.stream(prompt, entry).await),
                None => tokio::time::sleep(PAUSE).await,
            }
        }
        ended
    }

    async fn stream(&self, prompt: usize, entry: &Entry) -> Ended {
        let id = format!("stream-{}", self.begun.fetch_add(1, Relaxed));
        let ask = self.args.engines_of.request(prompt, &self.args, &id);
        let deaths = entry.deaths.load(Relaxed);
        let mut gaps = Vec::with_capacity(self.args.tokens);
        self.open.fetch_add(1, Relaxed);
        let got = read(entry.address, ask, Some(&mut gaps)).await;
        self.open.fetch_sub(1, Relaxed);
        let outcome = match got {
            Err(_) if entry.deaths.load(Relaxed) > deaths => Outcome::LostWithEntry,
            Err(words) => Outcome::Failed(words),
            Ok(got) if got != self.expected[prompt] => Outcome::Wrong,
            Ok(_) => Outcome::Whole,
        };
        Ended { id, outcome, gaps }
    }
}

/// Counts down when dropped: after a panic, too.
struct Left<'a>(&'a AtomicUsize);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Reads a stream.
///
/// # Errors
/// It did not end as one; these are its last words.
pub(crate) async fn read(
    address: SocketAddr,
    ask: Ask,
    gaps: Option<&mut Vec<f32>>,
) -> Result<Story, String> {
    match tokio::time::timeout(STREAM_MAX, fetch(address, ask, gaps)).await {
        Ok(Ok((status, body))) => story(status, &String::from_utf8_lossy(&body)),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err(format!("no end within {STREAM_MAX:?}")),
    }
}

async fn fetch(
    address: SocketAddr,
    ask: Ask,
    mut gaps: Option<&mut Vec<f32>>,
) -> anyhow::Result<(StatusCode, Vec<u8>)> {
    let socket = TcpStream::connect(address).await?;
    let (mut sender, driver) = http1::handshake(TokioIo::new(socket)).await?;
    tokio::spawn(driver);
    let mut post = request(Method::POST, ask.path, ask.body);
    let host = HeaderValue::from_str(&address.to_string())?;
    let headers = post.headers_mut();
    headers.insert(header::HOST, host);
    headers.insert("x-request-id", HeaderValue::from_str(&ask.id)?);
    let answer = sender.send_request(post).await?;
    let (status, mut body) = (answer.status(), answer.into_body());
    let mut whole = Vec::new();
    let mut before: Option<Instant> = None;
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame?.data_ref() {
            let now = Instant::now();
            if let (Some(before), Some(gaps)) = (before.replace(now), &mut gaps) {
                gaps.push((now - before).as_secs_f32() * 1e3);
            }
            whole.extend_from_slice(data);
        }
    }
    Ok((status, whole))
}

fn story(status: StatusCode, text: &str) -> Result<Story, String> {
    let mut story = String::new();
    let mut usage = Value::Null;
    let mut done = false;
    for event in text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
    {
        if event == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value =
            serde_json::from_str(event).map_err(|error| format!("{error}: {event}"))?;
        if chunk.get("error").is_some() {
            return Err(event.to_owned());
        }
        let choice = &chunk["choices"][0];
        let piece = choice["delta"]["content"]
            .as_str()
            .or(choice["text"].as_str());
        story.push_str(piece.unwrap_or_default());
        if chunk["usage"].is_object() {
            usage = chunk["usage"]["completion_tokens"].clone();
        }
    }
    if done && status == StatusCode::OK {
        return Ok((story, usage));
    }
    let end = text.lines().rfind(|line| !line.is_empty());
    Err(format!("{status}: {}", end.unwrap_or_default()))
}
