//! One rank's KV events over ZeroMQ, made whole: which batches did the engine publish, in order, none missing?
//!
//! A PUB socket drops silently, so every batch has a sequence number, and a ROUTER beside it replays a ring of recent
//! ones. This file subscribes (connecting, or bound where the engine connects), repairs gaps through the replay,
//! notices restarts and lost connections, and begins anew when the history cannot be continued. What the batches mean
//! is `lineage`'s business; when an engine is to be watched is `engine`'s.

use crate::event::{EventBatch, decode};
use crate::zmtp::{SocketType, ZmtpError, ZmtpStream};
use bytes::Bytes;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// Between tries to connect or bind.
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// Longest wait for the next reply of a replay. The engine answers between two publishes.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a quiet peer is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Silence after which a peer that used to answer is given up.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Live batches kept while a replay runs. What does not fit is a gap afterwards and replayed then.
const LIVE_BATCHES_MAX: usize = 10_000;
/// Bytes of them.
const LIVE_BYTES_MAX: usize = 64 << 20;
/// How many fingerprints of delivered batches are kept, to tell a repeated batch from a restarted engine.
const FINGERPRINTS_MAX: usize = 1024;
/// The sequence number that ends a replay.
const END_OF_REPLAY: u64 = u64::MAX;

/// Where one rank's events come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventSource {
    /// Data-parallel rank.
    pub rank: u32,
    /// `host:port` of the PUB socket, or the address it connects to.
    pub address: String,
    /// Whether the address may be ours to bind: the engine named a concrete host, which is how engines say that their
    /// socket connects. Tried when connecting is refused.
    pub may_bind: bool,
    /// `host:port` of the ROUTER socket that replays.
    pub replay: Option<String>,
    /// Topic prefix.
    pub topic: String,
}

impl EventSource {
    /// From the endpoints as engines configure them (`tcp://HOST:PORT`); `engine_host` stands in for wildcards.
    ///
    /// An engine binds when its endpoint is a wildcard; a concrete host means that it connects, or that it was resolved
    /// from a wildcard: both are tried. `None` for transports other than TCP, which end at the machine's border.
    #[must_use]
    pub fn from_endpoint(
        rank: u32,
        endpoint: &str,
        replay: Option<&str>,
        topic: &str,
        engine_host: &str,
    ) -> Option<Self> {
        let (address, wildcard) = tcp_address(endpoint, engine_host)?;
        let replay = replay
            .and_then(|replay| tcp_address(replay, engine_host))
            .map(|(address, _)| address);
        Some(Self {
            rank,
            address,
            may_bind: !wildcard,
            replay,
            topic: topic.to_owned(),
        })
    }
}

/// `host:port` of `tcp://host:port`, and whether the host was a wildcard.
fn tcp_address(endpoint: &str, engine_host: &str) -> Option<(String, bool)> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0)?;
    match host {
        "*" | "0.0.0.0" | "::" | "[::]" => Some((format!("{engine_host}:{port}"), true)),
        host => Some((format!("{host}:{port}"), false)),
    }
}

/// What a subscription tells its engine.
#[derive(Debug)]
pub(crate) enum RankEvent {
    /// The connection stands.
    Connected,
    /// The connection is lost or cannot be made; why.
    Lost(String),
    /// What was known of the rank is void; a history begins. Ended by `Settled`.
    Begin(BeginReason),
    /// The replay since `Begin` is over; `complete` if it went back to the engine's first batch.
    Settled { complete: bool },
    /// The next batch.
    Batch(EventBatch),
}

/// Why a history begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BeginReason {
    /// First contact.
    Start,
    /// Another process publishes now.
    Restart,
    /// Batches are missing that can't be had any more.
    GapTooOld,
    /// A batch says what nobody can read, and it may have been that blocks are gone.
    Unreadable,
    /// An answer with events was lost on the way.
    Unanswered,
    /// What was indexed so far was of caches that do not keep all of a prompt.
    WiderWindow,
}

impl BeginReason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Restart => "restart",
            Self::GapTooOld => "gap_too_old",
            Self::Unreadable => "unreadable",
            Self::Unanswered => "unanswered",
            Self::WiderWindow => "wider_window",
        }
    }
}

/// Where in the engine's history we are. No IO inside.
#[derive(Debug, Default)]
struct Position {
    /// Sequence number of the batch to come; `None` before any is known.
    next: Option<u64>,
    /// The first batch of this history that we got.
    first: Option<u64>,
    /// Highest sequence number this connection brought.
    connection_last: Option<u64>,
    /// Of the last delivered batches: number and fingerprint.
    delivered: VecDeque<(u64, u64)>,
}

/// What a live batch is.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Next,
    Duplicate,
    Gap,
    Restart,
}

impl Position {
    /// Judges a live batch by its number; `fingerprint` is of its payload.
    fn judge(&self, seq: u64, fingerprint: u64) -> Verdict {
        let Some(next) = self.next else {
            return Verdict::Next;
        };
        if seq == next {
            return Verdict::Next;
        }
        if seq > next {
            return Verdict::Gap;
        }
        // A replay may have been ahead of this connection, so a number below `next` is no fall by itself.
        match self.fingerprint(seq) {
            Some(known) if known == fingerprint => Verdict::Duplicate,
            Some(_) => Verdict::Restart,
            None if self.connection_last.is_some_and(|last| seq > last) => Verdict::Duplicate,
            None => Verdict::Restart,
        }
    }

    fn fingerprint(&self, seq: u64) -> Option<u64> {
        self.delivered
            .iter()
            .rev()
            .find(|(known, _)| *known == seq)
            .map(|(_, fingerprint)| *fingerprint)
    }

    fn advance(&mut self, seq: u64, fingerprint: u64) {
        self.next = Some(seq.saturating_add(1));
        self.first.get_or_insert(seq);
        if self.delivered.len() == FINGERPRINTS_MAX {
            self.delivered.pop_front();
        }
        self.delivered.push_back((seq, fingerprint));
    }

    fn forget(&mut self) {
        self.next = None;
        self.first = None;
        self.delivered.clear();
    }
}

/// A message as it came.
#[derive(Debug, Clone)]
struct Numbered {
    seq: u64,
    payload: Bytes,
}

/// How a replay went.
enum Replayed {
    /// It continues what we have; everything up to its end was delivered.
    Continued,
    /// What the engine has does not continue what we have.
    Broken(BeginReason),
    /// There is no replay, or it failed.
    Unavailable,
}

/// Why serving a connection ended.
enum Ended {
    /// The connection.
    Connection(ZmtpError),
    /// Nobody listens any more.
    Receiver,
}

impl From<ZmtpError> for Ended {
    fn from(error: ZmtpError) -> Self {
        Self::Connection(error)
    }
}

/// Follows one source until the receiver is dropped.
pub(crate) async fn follow(
    source: EventSource,
    engine: String,
    events: mpsc::Sender<(u32, RankEvent)>,
) {
    let mut follower = Follower {
        source,
        engine,
        events,
        position: Position::default(),
        waiting: VecDeque::new(),
        waiting_bytes: 0,
        begun: false,
        settled: false,
        hasher: ahash::RandomState::new(),
    };
    while let Err(Ended::Connection(error)) = follower.attempt().await {
        if follower
            .tell(RankEvent::Lost(error.to_string()))
            .await
            .is_err()
        {
            return;
        }
        sleep(RETRY_DELAY).await;
    }
}

struct Follower {
    source: EventSource,
    engine: String,
    events: mpsc::Sender<(u32, RankEvent)>,
    position: Position,
    /// Live messages that came during a replay.
    waiting: VecDeque<Numbered>,
    waiting_bytes: usize,
    /// Whether `Begin` was told for the history `position` is in.
    begun: bool,
    settled: bool,
    hasher: ahash::RandomState,
}

impl Follower {
    /// Connects (or binds) and serves until that ends.
    async fn attempt(&mut self) -> Result<(), Ended> {
        match ZmtpStream::connect(&self.source.address, SocketType::Sub).await {
            Ok(stream) => self.serve(stream).await,
            Err(ZmtpError::Io(error))
                if self.source.may_bind
                    && error.kind() == std::io::ErrorKind::ConnectionRefused =>
            {
                self.serve_bound().await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The engine connects to us: serves whoever came last (an engine that came back is not kept waiting by its
    /// former self).
    async fn serve_bound(&mut self) -> Result<(), Ended> {
        let listener = TcpListener::bind(&self.source.address)
            .await
            .map_err(ZmtpError::from)?;
        let mut arrived = None;
        loop {
            let stream = match arrived.take() {
                Some(stream) => stream,
                None => listener.accept().await.map_err(ZmtpError::from)?.0,
            };
            let ended = match ZmtpStream::handshake(stream, SocketType::Sub).await {
                Ok(stream) => tokio::select! {
                    ended = self.serve(stream) => ended,
                    accepted = listener.accept() => {
                        arrived = Some(accepted.map_err(ZmtpError::from)?.0);
                        continue;
                    }
                },
                Err(error) => Err(error.into()),
            };
            match ended {
                Err(Ended::Connection(error)) => {
                    self.tell(RankEvent::Lost(error.to_string())).await?
                }
                other => return other,
            }
        }
    }

    async fn serve(&mut self, mut stream: ZmtpStream) -> Result<(), Ended> {
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.position.connection_last = None;
        stream.subscribe(self.source.topic.as_bytes());
        self.tell(RankEvent::Connected).await?;
        self.sync(&mut stream, BeginReason::Start).await?;
        let mut pings = interval(PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = match self.waiting.pop_front() {
                Some(message) => {
                    self.waiting_bytes -= message.payload.len();
                    message
                }
                None => tokio::select! {
                    frames = stream.receive() => match self.numbered(frames?) {
                        Some(message) => message,
                        None => continue,
                    },
                    _ = pings.tick() => {
                        if stream.silence() > SILENCE_MAX {
                            return Err(ZmtpError::Timeout(SILENCE_MAX).into());
                        }
                        stream.ping();
                        continue;
                    }
                },
            };
            self.on_live(&mut stream, message).await?;
        }
    }

    async fn on_live(&mut self, stream: &mut ZmtpStream, message: Numbered) -> Result<(), Ended> {
        if message.seq == END_OF_REPLAY {
            // No engine lives to count so far; nothing could follow it.
            self.count("outrigger_kv_event_garbage_total");
            return Ok(());
        }
        let mut verdict = self.judge(&message);
        match verdict {
            Verdict::Gap => {
                self.count("outrigger_kv_event_gaps_total");
                tracing::info!(
                    engine = self.engine,
                    rank = self.source.rank,
                    next = self.position.next,
                    got = message.seq,
                    "KV events missing"
                );
                self.sync(stream, BeginReason::GapTooOld).await?;
                verdict = self.judge(&message);
            }
            Verdict::Restart => {
                self.begin(BeginReason::Restart).await?;
                self.sync(stream, BeginReason::Restart).await?;
                verdict = self.judge(&message);
            }
            Verdict::Next | Verdict::Duplicate => {}
        }
        if matches!(verdict, Verdict::Gap | Verdict::Restart) {
            // Not even the replay leads up to this message: what we have is worth nothing.
            self.begin(BeginReason::GapTooOld).await?;
            verdict = Verdict::Next;
        }
        self.position.connection_last = Some(message.seq);
        match verdict {
            Verdict::Next => {
                self.deliver(message).await?;
                self.settle().await
            }
            Verdict::Duplicate | Verdict::Gap | Verdict::Restart => {
                self.count("outrigger_kv_event_duplicates_total");
                Ok(())
            }
        }
    }

    fn judge(&self, message: &Numbered) -> Verdict {
        self.position
            .judge(message.seq, self.hasher.hash_one(&message.payload))
    }

    /// Catches up with the engine through its replay socket, beginning anew where what we have cannot be continued.
    async fn sync(
        &mut self,
        stream: &mut ZmtpStream,
        mut reason: BeginReason,
    ) -> Result<(), Ended> {
        loop {
            if !self.begun {
                self.begin(reason).await?;
            }
            match self.replay(stream).await? {
                Replayed::Continued => {
                    return self.settle().await;
                }
                Replayed::Broken(why) => {
                    reason = why;
                    self.begin(reason).await?;
                }
                // The first live batch will say what we have.
                Replayed::Unavailable => return Ok(()),
            }
        }
    }

    /// Asks for everything from the last batch we have on: that one must come first and be the same.
    async fn replay(&mut self, stream: &mut ZmtpStream) -> Result<Replayed, Ended> {
        let Some(address) = self.source.replay.clone() else {
            return Ok(Replayed::Unavailable);
        };
        self.count("outrigger_kv_event_replays_total");
        let mut replay = match ZmtpStream::connect(&address, SocketType::Dealer).await {
            Ok(replay) => replay,
            Err(error) => return Ok(self.replay_failed(&error)),
        };
        let known = self.position.next.and_then(|next| next.checked_sub(1));
        replay.queue(&[b"", &known.unwrap_or(0).to_be_bytes()]);
        let mut expected = known;
        loop {
            let frames = tokio::select! {
                reply = timeout(REPLAY_TIMEOUT, replay.receive()) => match reply {
                    Ok(Ok(frames)) => frames,
                    Ok(Err(error)) => return Ok(self.replay_failed(&error)),
                    Err(_) => return Ok(self.replay_failed(&ZmtpError::Timeout(REPLAY_TIMEOUT))),
                },
                live = stream.receive() => {
                    let frames = live?;
                    self.keep(frames);
                    continue;
                }
            };
            let Some(reply) = self.numbered(frames) else {
                continue;
            };
            if let Some(seq) = expected.take() {
                match self.position.fingerprint(seq) {
                    Some(known)
                        if reply.seq == seq && known == self.hasher.hash_one(&reply.payload) =>
                    {
                        continue;
                    }
                    _ if reply.seq != END_OF_REPLAY && reply.seq > seq => {
                        return Ok(Replayed::Broken(BeginReason::GapTooOld));
                    }
                    _ => return Ok(Replayed::Broken(BeginReason::Restart)),
                }
            }
            if reply.seq == END_OF_REPLAY {
                // An engine that has published nothing yet will begin with 0.
                self.position.next.get_or_insert(0);
                return Ok(Replayed::Continued);
            }
            match self.position.next {
                Some(next) if reply.seq < next => self.count("outrigger_kv_event_duplicates_total"),
                Some(next) if reply.seq > next => {
                    return Ok(Replayed::Broken(BeginReason::GapTooOld));
                }
                _ => self.deliver(reply).await?,
            }
        }
    }

    fn replay_failed(&self, error: &ZmtpError) -> Replayed {
        self.count("outrigger_kv_event_replay_failures_total");
        tracing::warn!(engine = self.engine, rank = self.source.rank, %error, "KV events cannot be replayed");
        Replayed::Unavailable
    }

    /// Keeps a live message for after the replay.
    fn keep(&mut self, frames: Vec<Bytes>) {
        let Some(message) = self.numbered(frames) else {
            return;
        };
        if self.waiting.len() >= LIVE_BATCHES_MAX
            || self.waiting_bytes + message.payload.len() > LIVE_BYTES_MAX
        {
            self.count("outrigger_kv_event_waiting_overflows_total");
            return;
        }
        self.waiting_bytes += message.payload.len();
        self.waiting.push_back(message);
    }

    /// Reads `[topic, seq, payload]`; a reply has an empty frame before it, and old engines leave out its topic.
    fn numbered(&self, mut frames: Vec<Bytes>) -> Option<Numbered> {
        let payload = frames.pop();
        let seq = frames
            .pop()
            .and_then(|seq| <[u8; 8]>::try_from(seq.as_ref()).ok());
        match (seq, payload) {
            (Some(seq), Some(payload)) if frames.len() <= 2 => Some(Numbered {
                seq: u64::from_be_bytes(seq),
                payload,
            }),
            _ => {
                self.count("outrigger_kv_event_garbage_total");
                None
            }
        }
    }

    async fn begin(&mut self, reason: BeginReason) -> Result<(), Ended> {
        if reason != BeginReason::Start {
            tracing::warn!(
                engine = self.engine,
                rank = self.source.rank,
                reason = reason.as_str(),
                "KV events begin anew"
            );
        }
        metrics::counter!("outrigger_kv_event_histories_total", "engine" => self.engine.clone(), "reason" => reason.as_str()).increment(1);
        // This may be cancelled while it tells: then the next sync begins once more.
        self.position.forget();
        self.begun = false;
        self.tell(RankEvent::Begin(reason)).await?;
        self.begun = true;
        self.settled = false;
        Ok(())
    }

    /// Says that the history is caught up with, once.
    async fn settle(&mut self) -> Result<(), Ended> {
        if !self.settled {
            let complete = self.position.first.is_none_or(|first| first == 0);
            self.tell(RankEvent::Settled { complete }).await?;
            self.settled = true;
        }
        Ok(())
    }

    async fn deliver(&mut self, message: Numbered) -> Result<(), Ended> {
        let fingerprint = self.hasher.hash_one(&message.payload);
        match decode(&message.payload) {
            Ok(batch) => self.tell(RankEvent::Batch(batch)).await?,
            // What it said is lost, and asking again would bring the same: what is known starts after it.
            Err(error) => {
                self.count("outrigger_kv_event_garbage_total");
                tracing::warn!(engine = self.engine, rank = self.source.rank, seq = message.seq, %error, "unreadable KV events");
                self.begin(BeginReason::Unreadable).await?;
                self.position.first = Some(message.seq.saturating_add(1));
            }
        }
        self.position.advance(message.seq, fingerprint);
        Ok(())
    }

    async fn tell(&self, event: RankEvent) -> Result<(), Ended> {
        self.events
            .send((self.source.rank, event))
            .await
            .map_err(|_| Ended::Receiver)
    }

    fn count(&self, name: &'static str) {
        metrics::counter!(name, "engine" => self.engine.clone()).increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(next: u64, connection_last: Option<u64>, delivered: &[(u64, u64)]) -> Position {
        Position {
            next: Some(next),
            first: Some(0),
            connection_last,
            delivered: delivered.iter().copied().collect(),
        }
    }

    #[test]
    fn a_live_batch_is_judged_by_number_and_content() {
        assert_eq!(
            Position::default().judge(7, 0),
            Verdict::Next,
            "anything may come first"
        );
        let position = at(5, Some(4), &[(3, 30), (4, 40)]);
        for (seq, fingerprint, expected) in [
            (5, 0, Verdict::Next),
            (6, 0, Verdict::Gap),
            (4, 40, Verdict::Duplicate),
            (4, 41, Verdict::Restart),
            (0, 0, Verdict::Restart),
        ] {
            assert_eq!(
                position.judge(seq, fingerprint),
                expected,
                "{seq} {fingerprint}"
            );
        }
        let replay_ahead = at(5000, Some(2), &[(4999, 1)]);
        assert_eq!(
            replay_ahead.judge(3, 9),
            Verdict::Duplicate,
            "the replay was ahead of this connection"
        );
        assert_eq!(
            replay_ahead.judge(2, 9),
            Verdict::Restart,
            "numbers on one connection rise"
        );
        assert_eq!(at(5, None, &[]).judge(0, 0), Verdict::Restart);
    }

    #[test]
    fn fingerprints_are_bounded() {
        let mut position = Position::default();
        for seq in 0..3000 {
            position.advance(seq, seq);
        }
        assert_eq!(position.delivered.len(), FINGERPRINTS_MAX);
        assert_eq!(position.next, Some(3000));
        assert_eq!(
            (position.fingerprint(2999), position.fingerprint(0)),
            (Some(2999), None)
        );
    }
}
