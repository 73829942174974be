//! ZMTP 3 over TCP: the frames that ZeroMQ sockets speak, as much as a SUB and a DEALER need.
//!
//! Answers: what multipart messages does the peer send, and is it still there? NULL mechanism only (engines use no
//! other). Every wait may be cancelled without losing bytes. Wire format: RFC 23/ZMTP 3.0 and RFC 37/ZMTP 3.1. It does
//! not reconnect and knows nothing of what messages mean.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::{io, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// Bytes of one message, all frames: more is a broken peer.
pub(crate) const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Frames of one message.
const FRAMES_MAX: usize = 16;
/// How long connecting and the handshake may take, each.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

const GREETING_BYTES: usize = 64;
const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZmtpError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("closed by the peer")]
    Closed,
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("not ZMTP 3: {0}")]
    Protocol(&'static str),
    #[error("peer's socket is {0}")]
    WrongPeer(String),
    #[error("peer says: {0}")]
    Refused(String),
    #[error("message of more than {MESSAGE_BYTES_MAX} bytes or {FRAMES_MAX} frames")]
    TooLarge,
}

/// What we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketType {
    Sub,
    Dealer,
}

impl SocketType {
    fn name(self) -> &'static str {
        match self {
            Self::Sub => "SUB",
            Self::Dealer => "DEALER",
        }
    }

    fn may_meet(self, peer: &str) -> bool {
        match self {
            Self::Sub => matches!(peer, "PUB" | "XPUB"),
            Self::Dealer => matches!(peer, "ROUTER" | "REP" | "DEALER"),
        }
    }
}

/// A connection after the handshake.
#[derive(Debug)]
pub(crate) struct ZmtpStream {
    stream: TcpStream,
    input: BytesMut,
    /// Written by the next wait; commands are answered here so that no wait needs to finish a write.
    output: BytesMut,
    /// Frames of a message whose last has not come.
    frames: Vec<Bytes>,
    frames_bytes: usize,
    /// Minor version of ZMTP 3 both speak.
    minor: u8,
    last_received: Instant,
    answers_pings: bool,
}

impl ZmtpStream {
    /// Connects and shakes hands.
    pub(crate) async fn connect(address: &str, socket: SocketType) -> Result<Self, ZmtpError> {
        let stream = timeout(HANDSHAKE_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| ZmtpError::Timeout(HANDSHAKE_TIMEOUT))??;
        Self::handshake(stream, socket).await
    }

    /// Shakes hands on a connection that either side opened.
    pub(crate) async fn handshake(
        stream: TcpStream,
        socket: SocketType,
    ) -> Result<Self, ZmtpError> {
        stream.set_nodelay(true)?;
        keep_alive(&stream)?;
        let mut this = Self {
            stream,
            input: BytesMut::new(),
            output: BytesMut::new(),
            frames: Vec::new(),
            frames_bytes: 0,
            minor: 0,
            last_received: Instant::now(),
            answers_pings: false,
        };
        timeout(HANDSHAKE_TIMEOUT, this.greet(socket))
            .await
            .map_err(|_| ZmtpError::Timeout(HANDSHAKE_TIMEOUT))??;
        Ok(this)
    }

    async fn greet(&mut self, socket: SocketType) -> Result<(), ZmtpError> {
        let mut greeting = [0u8; GREETING_BYTES];
        greeting[0] = 0xff;
        greeting[9] = 0x7f;
        greeting[10] = 3;
        greeting[11] = 1;
        greeting[12..16].copy_from_slice(b"NULL");
        self.output.extend_from_slice(&greeting);
        while self.input.len() < GREETING_BYTES {
            self.fill().await?;
        }
        let theirs = self.input.split_to(GREETING_BYTES);
        if theirs[0] != 0xff || theirs[9] != 0x7f || theirs[10] < 3 {
            return Err(ZmtpError::Protocol("bad greeting"));
        }
        if !theirs[12..32].starts_with(b"NULL\0") {
            return Err(ZmtpError::Protocol("a security mechanism other than NULL"));
        }
        self.minor = if theirs[10] == 3 {
            theirs[11].min(1)
        } else {
            1
        };

        let mut ready = BytesMut::from(&b"\x05READY"[..]);
        for (name, value) in [("Socket-Type", socket.name()), ("Identity", "")] {
            ready.put_u8(u8::try_from(name.len()).expect("invariant: short names"));
            ready.put_slice(name.as_bytes());
            ready.put_u32(u32::try_from(value.len()).expect("invariant: short values"));
            ready.put_slice(value.as_bytes());
        }
        self.put_frame(FLAG_COMMAND, &ready);
        loop {
            match self.next_frame()? {
                Some((flags, body)) if flags & FLAG_COMMAND != 0 => {
                    return check_ready(&body, socket);
                }
                Some(_) => return Err(ZmtpError::Protocol("a message before READY")),
                None => self.fill().await?,
            }
        }
    }

    /// Queues a subscription to all topics that begin with `topic`.
    pub(crate) fn subscribe(&mut self, topic: &[u8]) {
        if self.minor >= 1 {
            let command = [b"\x09SUBSCRIBE", topic].concat();
            self.put_frame(FLAG_COMMAND, &command);
        } else {
            let message = [b"\x01", topic].concat();
            self.put_frame(0, &message);
        }
    }

    /// Queues a message.
    pub(crate) fn queue(&mut self, frames: &[&[u8]]) {
        for (index, frame) in frames.iter().enumerate() {
            let more = if index + 1 < frames.len() {
                FLAG_MORE
            } else {
                0
            };
            self.put_frame(more, frame);
        }
    }

    /// Queues a PING, if the peer's version has them.
    pub(crate) fn ping(&mut self) {
        if self.minor >= 1 {
            // Time to live 0: the peer need not watch us.
            self.put_frame(FLAG_COMMAND, b"\x04PING\0\0");
        }
    }

    /// How long the peer has been silent although it answers PINGs; zero if it never answered one (then TCP
    /// keep-alive has to do).
    pub(crate) fn silence(&self) -> Duration {
        if self.answers_pings {
            self.last_received.elapsed()
        } else {
            Duration::ZERO
        }
    }

    /// Waits for a message. Queued frames are written on the way. Safe to cancel.
    pub(crate) async fn receive(&mut self) -> Result<Vec<Bytes>, ZmtpError> {
        loop {
            while let Some((flags, body)) = self.next_frame()? {
                if flags & FLAG_COMMAND != 0 {
                    self.on_command(&body)?;
                    continue;
                }
                self.frames_bytes += body.len();
                self.frames.push(body);
                if self.frames_bytes > MESSAGE_BYTES_MAX || self.frames.len() > FRAMES_MAX {
                    return Err(ZmtpError::TooLarge);
                }
                if flags & FLAG_MORE == 0 {
                    self.frames_bytes = 0;
                    return Ok(std::mem::take(&mut self.frames));
                }
            }
            self.fill().await?;
        }
    }

    fn on_command(&mut self, body: &Bytes) -> Result<(), ZmtpError> {
        self.last_received = Instant::now();
        if let Some(rest) = body.strip_prefix(b"\x04PING") {
            let context = rest.get(2..).unwrap_or_default();
            let pong = [b"\x04PONG", &context[..context.len().min(16)]].concat();
            self.put_frame(FLAG_COMMAND, &pong);
        } else if body.starts_with(b"\x04PONG") {
            self.answers_pings = true;
        } else if let Some(reason) = body.strip_prefix(b"\x05ERROR") {
            return Err(ZmtpError::Refused(
                String::from_utf8_lossy(reason.get(1..).unwrap_or_default()).into_owned(),
            ));
        }
        Ok(())
    }

    /// Takes one frame out of what has been read.
    fn next_frame(&mut self) -> Result<Option<(u8, Bytes)>, ZmtpError> {
        let Some(flags) = self.input.first().copied() else {
            return Ok(None);
        };
        if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 {
            return Err(ZmtpError::Protocol("reserved flags set"));
        }
        let (head, length) = if flags & FLAG_LONG == 0 {
            let Some(length) = self.input.get(1) else {
                return Ok(None);
            };
            (2, u64::from(*length))
        } else {
            let Some(length) = self.input.get(1..9) else {
                return Ok(None);
            };
            (
                9,
                u64::from_be_bytes(length.try_into().expect("invariant: eight bytes")),
            )
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MESSAGE_BYTES_MAX)
            .ok_or(ZmtpError::TooLarge)?;
        if self.input.len() < head + length {
            self.input.reserve(head + length - self.input.len());
            return Ok(None);
        }
        self.input.advance(head);
        Ok(Some((flags, self.input.split_to(length).freeze())))
    }

    fn put_frame(&mut self, flags: u8, body: &[u8]) {
        match u8::try_from(body.len()) {
            Ok(length) => {
                self.output.put_u8(flags);
                self.output.put_u8(length);
            }
            Err(_) => {
                self.output.put_u8(flags | FLAG_LONG);
                self.output.put_u64(body.len() as u64);
            }
        }
        self.output.put_slice(body);
    }

    /// Writes what is queued, then reads at least one byte.
    async fn fill(&mut self) -> Result<(), ZmtpError> {
        while self.output.has_remaining() {
            self.stream.write_buf(&mut self.output).await?;
        }
        self.input.reserve(16 << 10);
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(ZmtpError::Closed);
        }
        self.last_received = Instant::now();
        Ok(())
    }
}

fn check_ready(body: &[u8], socket: SocketType) -> Result<(), ZmtpError> {
    if let Some(reason) = body.strip_prefix(b"\x05ERROR") {
        return Err(ZmtpError::Refused(
            String::from_utf8_lossy(reason.get(1..).unwrap_or_default()).into_owned(),
        ));
    }
    let mut rest = body
        .strip_prefix(b"\x05READY")
        .ok_or(ZmtpError::Protocol("no READY"))?;
    while rest.remaining() > 0 {
        let name = take(&mut rest, 1)?;
        let value = take(&mut rest, 4)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            let peer = String::from_utf8_lossy(value).into_owned();
            return if socket.may_meet(&peer) {
                Ok(())
            } else {
                Err(ZmtpError::WrongPeer(peer))
            };
        }
    }
    Err(ZmtpError::Protocol("READY without a socket type"))
}

/// Takes a byte string whose length stands before it in `width` bytes.
fn take<'a>(rest: &mut &'a [u8], width: usize) -> Result<&'a [u8], ZmtpError> {
    const SHORT: ZmtpError = ZmtpError::Protocol("short READY");
    if rest.len() < width {
        return Err(SHORT);
    }
    let length = usize::try_from(rest.get_uint(width)).map_err(|_| SHORT)?;
    if rest.len() < length {
        return Err(SHORT);
    }
    let (value, after) = rest.split_at(length);
    *rest = after;
    Ok(value)
}

/// A peer whose machine vanished must be noticed although we never write.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let settings = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    socket2::SockRef::from(stream).set_tcp_keepalive(&settings)
}
