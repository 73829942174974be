//! A tiny engine for tests: HTTP endpoints and ZeroMQ PUB and ROUTER sockets with frames of its own, and every way to
//! fail on command. Shares no codec with the product.

use outrigger_xds::block_hash::{Namespace, chain};
use rmpv::Value;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;

pub(crate) const MODEL: &str = "tiny";
/// Stands for an answer that never comes.
const NO_ANSWER: u16 = 0;
const TOPIC: &str = "kv-events";

/// What the engine's tasks share.
#[derive(Debug)]
pub(crate) struct Inner {
    /// Every batch of this process: number and payload.
    pub(crate) batches: Vec<(u64, Vec<u8>)>,
    pub(crate) next: u64,
    /// The replay has only the batches from this number on.
    pub(crate) buffered_from: u64,
    pub(crate) process_start: f64,
    pub(crate) key: Option<String>,
    pub(crate) requests: HashMap<String, u32>,
    pub(crate) running: u32,
    pub(crate) block_tokens: usize,
    pub(crate) replay_topic: bool,
    pub(crate) replays: u32,
    pub(crate) connect_mode: bool,
    pub(crate) no_replay: bool,
    /// Whose events these are.
    pub(crate) rank: u32,
    /// PUB and ROUTER sockets of further ranks, told beside those of rank 0.
    pub(crate) further_ranks: Vec<(SocketAddr, SocketAddr)>,
    /// Answers by path, of an engine that has no others.
    pub(crate) bodies: Option<HashMap<&'static str, String>>,
    /// A path that is never answered.
    pub(crate) silent: Option<&'static str>,
    /// The next answers of `POST /kv_cache_events`; without a status it never answers. After the last there are no events.
    pub(crate) drained: VecDeque<(Option<u16>, String)>,
}

pub(crate) struct FakeEngine {
    pub(crate) http: SocketAddr,
    pub(crate) publisher: SocketAddr,
    pub(crate) replay: SocketAddr,
    pub(crate) inner: Arc<Mutex<Inner>>,
    wire: broadcast::Sender<Vec<Vec<u8>>>,
    cut: broadcast::Sender<()>,
    tasks: Vec<JoinHandle<()>>,
}

/// Listens again on the same port at once.
fn listen(address: SocketAddr) -> TcpListener {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket.listen(64).unwrap()
}

impl FakeEngine {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Inner)) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let addresses: Vec<SocketAddr> = {
            let listeners = [listen(any), listen(any), listen(any)];
            listeners
                .iter()
                .map(|listener| listener.local_addr().unwrap())
                .collect()
        };
        let mut inner = Inner {
            batches: Vec::new(),
            next: 0,
            buffered_from: 0,
            process_start: 1000.0,
            key: None,
            requests: HashMap::new(),
            running: 0,
            block_tokens: 32,
            replay_topic: true,
            replays: 0,
            connect_mode: false,
            no_replay: false,
            rank: 0,
            further_ranks: Vec::new(),
            bodies: None,
            silent: None,
            drained: VecDeque::new(),
        };
        change(&mut inner);
        let mut engine = Self {
            http: addresses[0],
            publisher: addresses[1],
            replay: addresses[2],
            inner: Arc::new(Mutex::new(inner)),
            wire: broadcast::Sender::new(100_000),
            cut: broadcast::Sender::new(16),
            tasks: Vec::new(),
        };
        engine.rise();
        engine
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.http)
    }

    /// Opens the sockets.
    pub(crate) fn rise(&mut self) {
        let (http, publisher, replay) = (self.http, self.publisher, self.replay);
        let inner = Arc::clone(&self.inner);
        let ports = (publisher, replay);
        self.serve(listen(http), move |stream| {
            serve_http(stream, Arc::clone(&inner), ports)
        });
        if self.inner.lock().unwrap().connect_mode {
            let (wire, cut) = (self.wire.clone(), self.cut.clone());
            self.tasks.push(tokio::spawn(async move {
                // As libzmq does: dial until somebody listens, and again when the connection is lost.
                loop {
                    if let Ok(stream) = TcpStream::connect(publisher).await {
                        publish_to(stream, wire.subscribe(), cut.subscribe()).await;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }));
        } else {
            let wire = self.wire.clone();
            let cut = self.cut.clone();
            self.serve(listen(publisher), move |stream| {
                publish_to(stream, wire.subscribe(), cut.subscribe())
            });
        }
        let inner = Arc::clone(&self.inner);
        self.serve(listen(replay), move |stream| {
            serve_replay(stream, Arc::clone(&inner))
        });
    }

    fn serve<F>(&mut self, listener: TcpListener, serve: impl Fn(TcpStream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.push(tokio::spawn(async move {
            let mut served = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                served.spawn(serve(stream));
            }
        }));
    }

    /// Dies: sockets closed, connections too.
    pub(crate) async fn die(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
    }

    /// A new process on the same ports, with an empty cache.
    pub(crate) fn forget(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.batches.clear();
        inner.next = 0;
        inner.buffered_from = 0;
        inner.process_start += 1.0;
    }

    /// Cuts the PUB connections; the process lives on.
    pub(crate) fn cut(&self) {
        let _ = self.cut.send(());
    }

    fn record(&self, events: Vec<Value>) -> (u64, Vec<u8>) {
        let mut inner = self.inner.lock().unwrap();
        let seq = inner.next;
        inner.next += 1;
        // The time stamp makes each process's batches differ, as it does in life.
        let stamp = inner.process_start + seq as f64 / 1000.0;
        let batch = Value::Array(vec![stamp.into(), Value::Array(events), inner.rank.into()]);
        let mut payload = Vec::new();
        rmpv::encode::write_value(&mut payload, &batch).unwrap();
        inner.batches.push((seq, payload.clone()));
        (seq, payload)
    }

    /// Publishes a batch.
    pub(crate) fn publish(&self, events: Vec<Value>) {
        let (seq, payload) = self.record(events);
        self.send(vec![TOPIC.into(), seq.to_be_bytes().to_vec(), payload]);
    }

    /// Publishes a batch that the PUB socket drops.
    pub(crate) fn lose(&self, events: Vec<Value>) {
        self.record(events);
    }

    /// Sends frames as they are.
    pub(crate) fn send(&self, frames: Vec<Vec<u8>>) {
        let _ = self.wire.send(frames);
    }

    /// Sends a batch of the ring once more.
    pub(crate) fn repeat(&self, index: usize) {
        let (seq, payload) = self.inner.lock().unwrap().batches[index].clone();
        self.send(vec![TOPIC.into(), seq.to_be_bytes().to_vec(), payload]);
    }

    pub(crate) fn subscribers(&self) -> usize {
        self.wire.receiver_count()
    }

    pub(crate) fn requests(&self, path: &str) -> u32 {
        self.inner
            .lock()
            .unwrap()
            .requests
            .get(path)
            .copied()
            .unwrap_or(0)
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn answer(path: &str, inner: &Inner, ports: (SocketAddr, SocketAddr)) -> (u16, String) {
    let not_found = || (404, r#"{"detail":"Not Found"}"#.into());
    if let Some(bodies) = &inner.bodies {
        let body = bodies.get(path).cloned();
        return body.map_or_else(not_found, |body| (200, body));
    }
    match path {
        "/version" => (200, r#"{"version":"0.32.0"}"#.into()),
        "/health" => (200, String::new()),
        "/v1/models" => (
            200,
            format!(
                r#"{{"object":"list","data":[{{"id":"{MODEL}","root":"/models/tiny","parent":null,"max_model_len":2048}}]}}"#
            ),
        ),
        "/metrics" => (
            200,
            format!(
                "process_start_time_seconds {}\nvllm:num_requests_running{{engine=\"0\"}} {}.0\nvllm:num_requests_waiting{{engine=\"0\"}} 0.0\nvllm:kv_cache_usage_perc{{engine=\"0\"}} 0.25\nvllm:cache_config_info{{block_size=\"{}\",engine=\"0\",num_gpu_blocks=\"100\"}} 1.0\n",
                inner.process_start, inner.running, inner.block_tokens
            ),
        ),
        "/kv_event_sources" => {
            let host = if inner.connect_mode { "127.0.0.1" } else { "*" };
            let source = |(rank, (publisher, replay)): (usize, &(SocketAddr, SocketAddr))| {
                let replay = if inner.no_replay {
                    "null".into()
                } else {
                    format!("\"tcp://*:{}\"", replay.port())
                };
                format!(
                    r#""{rank}":{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://{host}:{}","replay_endpoint":{replay},"topic":"{TOPIC}"}}"#,
                    publisher.port()
                )
            };
            let ranks = std::iter::once(&ports).chain(&inner.further_ranks);
            let sources: Vec<String> = ranks.enumerate().map(source).collect();
            (200, format!("{{{}}}", sources.join(",")))
        }
        _ => not_found(),
    }
}

async fn serve_http(
    mut stream: TcpStream,
    inner: Arc<Mutex<Inner>>,
    ports: (SocketAddr, SocketAddr),
) {
    let mut input = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = input.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            if matches!(stream.read_buf(&mut input).await, Ok(0) | Err(_)) {
                return;
            }
        };
        let head = String::from_utf8(input.drain(..end).collect()).unwrap();
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let (status, body) = {
            let mut inner = inner.lock().unwrap();
            *inner.requests.entry(path.clone()).or_default() += 1;
            let bearer = head
                .lines()
                .find_map(|line| line.strip_prefix("authorization: Bearer "));
            match &inner.key {
                Some(key) if path.starts_with("/v1") && bearer != Some(key) => {
                    (401, r#"{"error":"Unauthorized"}"#.to_owned())
                }
                _ if head.starts_with("POST /kv_cache_events ") && inner.bodies.is_some() => {
                    let next = inner.drained.pop_front();
                    let (status, body) = next.unwrap_or((Some(200), "[]".to_owned()));
                    (status.unwrap_or(NO_ANSWER), body)
                }
                _ if inner.silent == Some(path.as_str()) => (NO_ANSWER, String::new()),
                _ => answer(&path, &inner, ports),
            }
        };
        if status == NO_ANSWER {
            std::future::pending::<()>().await;
        }
        let answer = format!(
            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// The greeting and READY of a socket of `kind`; reads the peer's.
async fn shake_hands(stream: &mut TcpStream, kind: &str) -> Option<()> {
    let mut greeting = [0u8; 64];
    greeting[..10].copy_from_slice(&[0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f]);
    greeting[10..16].copy_from_slice(&[3, 1, b'N', b'U', b'L', b'L']);
    stream.write_all(&greeting).await.ok()?;
    let mut theirs = [0u8; 64];
    stream.read_exact(&mut theirs).await.ok()?;
    let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
    ready.extend_from_slice(&u32::try_from(kind.len()).unwrap().to_be_bytes());
    ready.extend_from_slice(kind.as_bytes());
    stream
        .write_all(&[&[4, u8::try_from(ready.len()).unwrap()], ready.as_slice()].concat())
        .await
        .ok()?;
    let (flags, _) = read_frame(stream).await?;
    assert_eq!(flags & 4, 4, "READY is a command");
    Some(())
}

async fn read_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<(u8, Vec<u8>)> {
    let flags = stream.read_u8().await.ok()?;
    let length = if flags & 2 == 2 {
        stream.read_u64().await.ok()?
    } else {
        u64::from(stream.read_u8().await.ok()?)
    };
    let mut body = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut body).await.ok()?;
    Some((flags, body))
}

fn message(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        let more = u8::from(index + 1 < frames.len());
        // Long form always: legal, and the short one is what the handshake has.
        bytes.push(more | 2);
        bytes.extend_from_slice(&(frame.len() as u64).to_be_bytes());
        bytes.extend_from_slice(frame);
    }
    bytes
}

async fn publish_to(
    mut stream: TcpStream,
    mut wire: broadcast::Receiver<Vec<Vec<u8>>>,
    mut cut: broadcast::Receiver<()>,
) {
    if shake_hands(&mut stream, "PUB").await.is_none() {
        return;
    }
    let Some((_, subscription)) = read_frame(&mut stream).await else {
        return;
    };
    assert!(
        subscription.starts_with(b"\x09SUBSCRIBE"),
        "{subscription:?}"
    );
    // What was published before the subscription is lost to it.
    while wire.try_recv().is_ok() {}
    let (mut reader, mut writer) = stream.into_split();
    loop {
        tokio::select! {
            frames = wire.recv() => {
                let Ok(frames) = frames else { return };
                if writer.write_all(&message(&frames)).await.is_err() { return }
            }
            frame = read_frame(&mut reader) => {
                let Some((_, body)) = frame else { return };
                if body.starts_with(b"\x04PING") {
                    let pong = [&[4u8, 5][..], b"\x04PONG"].concat();
                    if writer.write_all(&pong).await.is_err() { return }
                }
            }
            _ = cut.recv() => return,
        }
    }
}

async fn serve_replay(mut stream: TcpStream, inner: Arc<Mutex<Inner>>) {
    if shake_hands(&mut stream, "ROUTER").await.is_none() {
        return;
    }
    loop {
        let Some((_, empty)) = read_frame(&mut stream).await else {
            return;
        };
        assert!(empty.is_empty(), "a DEALER sends the empty frame itself");
        let Some((_, start)) = read_frame(&mut stream).await else {
            return;
        };
        let start = u64::from_be_bytes(start.try_into().unwrap());
        let (batches, topic) = {
            let mut inner = inner.lock().unwrap();
            inner.replays += 1;
            let from = start.max(inner.buffered_from);
            let batches: Vec<_> = inner
                .batches
                .iter()
                .filter(|(seq, _)| *seq >= from)
                .cloned()
                .collect();
            (batches, inner.replay_topic)
        };
        let head = |name: &str| {
            if topic {
                vec![vec![], name.into()]
            } else {
                vec![vec![]]
            }
        };
        for (seq, payload) in batches {
            let mut frames = head(TOPIC);
            frames.extend([seq.to_be_bytes().to_vec(), payload]);
            if stream.write_all(&message(&frames)).await.is_err() {
                return;
            }
        }
        let mut end = head("");
        end.extend([vec![0xff; 8], vec![]]);
        if stream.write_all(&message(&end)).await.is_err() {
            return;
        }
    }
}

/// The engine's own name of the block ending `prefix`.
fn engine_hash(prefix: &[u32]) -> Value {
    let mut hasher = DefaultHasher::new();
    // Enough for prompts made by `prompt`; hashing all of a long one for each of its blocks takes minutes.
    (prefix.first(), prefix.last(), prefix.len()).hash(&mut hasher);
    hasher.finish().into()
}

fn map(pairs: Vec<(&str, Value)>) -> Value {
    Value::Map(
        pairs
            .into_iter()
            .map(|(key, value)| (key.into(), value))
            .collect(),
    )
}

/// `BlockStored` of the blocks of `prompt` from block `from` on.
pub(crate) fn stored(prompt: &[u32], block: usize, from: usize) -> Value {
    let hashes = (from + 1..=prompt.len() / block)
        .map(|end| engine_hash(&prompt[..end * block]))
        .collect();
    map(vec![
        ("type", "BlockStored".into()),
        ("block_hashes", Value::Array(hashes)),
        (
            "parent_block_hash",
            if from > 0 {
                engine_hash(&prompt[..from * block])
            } else {
                Value::Nil
            },
        ),
        (
            "token_ids",
            Value::Array(
                prompt[from * block..]
                    .iter()
                    .map(|token| (*token).into())
                    .collect(),
            ),
        ),
        ("block_size", block.into()),
        ("medium", "GPU".into()),
        ("field_of_tomorrow", 7.into()),
    ])
}

/// `BlockRemoved` of the last block of `prompt`.
pub(crate) fn removed(prompt: &[u32]) -> Value {
    map(vec![
        ("type", "BlockRemoved".into()),
        ("block_hashes", Value::Array(vec![engine_hash(prompt)])),
        ("medium", "GPU".into()),
    ])
}

/// A prompt of `blocks` canonical blocks.
pub(crate) fn prompt(id: u32, blocks: u32) -> Vec<u32> {
    (0..blocks * 32)
        .map(|token| id * 1_000_000 + token)
        .collect()
}

/// The canonical blocks of prompts.
pub(crate) fn canonical(prompts: &[&[u32]]) -> HashSet<u64> {
    let seed = Namespace {
        model: MODEL.into(),
        ..Namespace::default()
    }
    .seed();
    prompts
        .iter()
        .flat_map(|prompt| chain(seed, prompt, 32))
        .collect()
}
