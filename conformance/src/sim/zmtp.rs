//! Answers "how do KV events reach subscribers": the two ZeroMQ sockets of an engine, PUB and a ROUTER for replay.
//!
//! Speaks ZMTP 3.0 (rfc.zeromq.org/spec/23) with the NULL mechanism, server side, as much as these two sockets need.
//! Limits: `frame_bytes_max` for what a peer may send, `BUFFER_BATCHES` kept for replay, `SUBSCRIBER_BATCHES` queued
//! for a slow subscriber (more are dropped for it, as ZeroMQ's high-water mark does).

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Batches kept for replay (`buffer_steps` of vLLM's configuration).
pub(crate) const BUFFER_BATCHES: usize = 10_000;
/// Batches queued for one subscriber.
const SUBSCRIBER_BATCHES: usize = 100_000;
const FRAME_BYTES_MAX: u64 = 64 * 1024;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Numbers batches, keeps them for replay and hands them to the subscribers.
pub(crate) struct Publisher {
    topic: Vec<u8>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ring: VecDeque<(u64, Vec<u8>)>,
    next: u64,
    subscribers: Vec<mpsc::Sender<Vec<u8>>>,
    /// Batches still to be withheld from subscribers (a fault on command).
    lose: u64,
}

impl Publisher {
    pub(crate) fn new(topic: &str) -> Self {
        Self {
            topic: topic.as_bytes().to_vec(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next `count` batches reach the replay buffer but no subscriber.
    pub(crate) fn lose(&self, count: u64) {
        self.state().lose += count;
    }

    /// Sends one batch to whoever listens.
    pub(crate) fn publish(&self, payload: Vec<u8>) {
        let mut state = self.state();
        let seq = state.next;
        state.next += 1;
        if state.lose > 0 {
            state.lose -= 1;
        } else {
            let message = encode(&[&self.topic, &seq.to_be_bytes(), &payload]);
            state
                .subscribers
                .retain(|to| match to.try_send(message.clone()) {
                    Ok(()) => true,
                    Err(mpsc::error::TrySendError::Closed(_)) => false,
                    Err(mpsc::error::TrySendError::Full(_)) => {
                        tracing::warn!(seq, "a subscriber is too slow and loses a batch");
                        true
                    }
                });
        }
        state.ring.push_back((seq, payload));
        if state.ring.len() > BUFFER_BATCHES {
            state.ring.pop_front();
        }
    }

    fn subscribe(&self) -> mpsc::Receiver<Vec<u8>> {
        let (to, from) = mpsc::channel(SUBSCRIBER_BATCHES);
        self.state().subscribers.push(to);
        from
    }

    /// The answer to a replay request: every batch kept from `start` on, then the end marker.
    fn replay(&self, start: u64) -> Vec<u8> {
        let state = self.state();
        let mut out = Vec::new();
        for (seq, payload) in state.ring.iter().filter(|(seq, _)| *seq >= start) {
            out.extend(encode(&[b"", &self.topic, &seq.to_be_bytes(), payload]));
        }
        out.extend(encode(&[b"", b"", &(-1i64).to_be_bytes(), b""]));
        out
    }

    /// Serves one peer of the PUB socket until it leaves.
    pub(crate) async fn serve_subscriber(&self, mut peer: TcpStream) -> Result<()> {
        greet(&mut peer, "PUB").await?;
        let (read, mut write) = peer.into_split();
        let (frames_to, mut frames) = mpsc::channel(16);
        let reader = async move {
            let mut read = tokio::io::BufReader::new(read);
            loop {
                let frame = read_frame(&mut read).await?;
                if frames_to.send(frame).await.is_err() {
                    return Ok(());
                }
            }
        };
        let writer = async {
            let mut batches = self.subscribe();
            let mut wanted: Vec<Vec<u8>> = Vec::new();
            loop {
                tokio::select! {
                    biased;
                    frame = frames.recv() => match frame {
                        Some(frame) => note_subscription(&frame, &mut wanted),
                        None => return Ok(()),
                    },
                    batch = batches.recv() => {
                        let Some(batch) = batch else { return Ok(()) };
                        if wanted.iter().any(|prefix| self.topic.starts_with(prefix)) {
                            write.write_all(&batch).await?;
                        }
                    }
                }
            }
        };
        tokio::select! {
            ended = reader => ended,
            ended = writer => ended,
        }
    }

    /// Serves one peer of the replay socket until it leaves.
    pub(crate) async fn serve_replay(&self, mut peer: TcpStream) -> Result<()> {
        greet(&mut peer, "ROUTER").await?;
        let mut request: Vec<Vec<u8>> = Vec::new();
        loop {
            let frame = read_frame(&mut peer).await?;
            if frame.flags & COMMAND != 0 {
                continue;
            }
            request.push(frame.body);
            if frame.flags & MORE != 0 {
                continue;
            }
            // A DEALER sends an empty frame and the sequence number; anything else is not answered, as in vLLM.
            if let [_, start] = &request[..]
                && let Ok(start) = <[u8; 8]>::try_from(&start[..])
            {
                peer.write_all(&self.replay(u64::from_be_bytes(start)))
                    .await?;
            }
            request.clear();
        }
    }
}

/// Subscriptions come as messages (3.0: 1 or 0, then the prefix) or as commands (3.1).
fn note_subscription(frame: &Frame, wanted: &mut Vec<Vec<u8>>) {
    let body = &frame.body[..];
    let change = if frame.flags & COMMAND != 0 {
        let subscribe = body
            .strip_prefix(b"\x09SUBSCRIBE")
            .map(|prefix| (true, prefix));
        subscribe.or_else(|| {
            body.strip_prefix(b"\x06CANCEL")
                .map(|prefix| (false, prefix))
        })
    } else {
        body.split_first()
            .map(|(&first, prefix)| (first == 1, prefix))
    };
    match change {
        Some((true, prefix)) => wanted.push(prefix.to_vec()),
        Some((false, prefix)) => {
            if let Some(at) = wanted.iter().position(|known| known == prefix) {
                wanted.swap_remove(at);
            }
        }
        None => {}
    }
}

struct Frame {
    flags: u8,
    body: Vec<u8>,
}

async fn greet(peer: &mut TcpStream, socket_type: &str) -> Result<()> {
    let mut greeting = [0u8; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    peer.write_all(&greeting).await?;
    let mut theirs = [0u8; 64];
    peer.read_exact(&mut theirs).await?;
    if theirs[0] != 0xff || theirs[10] < 3 || !theirs[12..].starts_with(b"NULL\0") {
        return Err(Error::new(
            ErrorKind::InvalidData,
            "the peer speaks no ZMTP 3 with NULL security",
        ));
    }
    let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
    ready.extend_from_slice(&(socket_type.len() as u32).to_be_bytes());
    ready.extend_from_slice(socket_type.as_bytes());
    let mut frame = vec![COMMAND, ready.len() as u8];
    frame.extend(ready);
    peer.write_all(&frame).await?;
    let theirs = read_frame(peer).await?;
    if theirs.flags & COMMAND == 0 || !theirs.body.starts_with(b"\x05READY") {
        return Err(Error::new(
            ErrorKind::InvalidData,
            "the peer did not say READY",
        ));
    }
    Ok(())
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> Result<Frame> {
    let flags = from.read_u8().await?;
    let len = if flags & LONG != 0 {
        from.read_u64().await?
    } else {
        u64::from(from.read_u8().await?)
    };
    if len > FRAME_BYTES_MAX {
        return Err(Error::new(
            ErrorKind::InvalidData,
            "a frame longer than a subscriber has reason to send",
        ));
    }
    let mut body = vec![0; len as usize];
    from.read_exact(&mut body).await?;
    Ok(Frame { flags, body })
}

/// One multipart message as it goes over the wire.
fn encode(frames: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::with_capacity(frames.iter().map(|frame| frame.len() + 9).sum());
    for (at, frame) in frames.iter().enumerate() {
        let more = if at + 1 < frames.len() { MORE } else { 0 };
        match u8::try_from(frame.len()) {
            Ok(len) => out.extend_from_slice(&[more, len]),
            Err(_) => {
                out.push(more | LONG);
                out.extend_from_slice(&(frame.len() as u64).to_be_bytes());
            }
        }
        out.extend_from_slice(frame);
    }
    out
}
