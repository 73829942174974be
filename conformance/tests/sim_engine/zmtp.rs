//! A subscriber and a replay client over plain sockets, and a reader of what they receive.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::client::PATIENCE;

/// One end of a ZMTP 3.0 connection.
pub(crate) struct Peer(TcpStream);

impl Peer {
    /// Connects as `socket_type` and shakes hands.
    pub(crate) fn connect(addr: SocketAddr, socket_type: &str) -> Self {
        Self::over(
            TcpStream::connect(addr).expect("the engine listens"),
            socket_type,
        )
    }

    pub(crate) fn over(socket: TcpStream, socket_type: &str) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut peer = Self(socket);
        let mut greeting = [0; 64];
        greeting[0] = 0xff;
        greeting[9..11].copy_from_slice(&[0x7f, 3]);
        greeting[12..16].copy_from_slice(b"NULL");
        peer.0.write_all(&greeting).expect("greet");
        let mut theirs = [0; 64];
        peer.0.read_exact(&mut theirs).expect("greeting");
        assert_eq!(
            (theirs[0], theirs[9], theirs[10], &theirs[12..17]),
            (0xff, 0x7f, 3, &b"NULL\0"[..])
        );
        let mut ready = b"\x05READY\x0bSocket-Type\0\0\0".to_vec();
        ready.push(socket_type.len() as u8);
        ready.extend_from_slice(socket_type.as_bytes());
        peer.0
            .write_all(&[&[4, ready.len() as u8][..], &ready].concat())
            .expect("ready");
        let (flags, body) = peer.frame();
        assert_eq!((flags, &body[..6]), (4, &b"\x05READY"[..]));
        peer
    }

    /// A subscriber of every topic that begins with `topic`, known to the engine when this returns.
    pub(crate) fn subscribe(addr: SocketAddr, topic: &str) -> Self {
        let mut peer = Self::connect(addr, "SUB");
        peer.send(&[&[&[1], topic.as_bytes()].concat()]);
        // Nothing answers a subscription: only time says that it was read.
        std::thread::sleep(std::time::Duration::from_millis(50));
        peer
    }

    pub(crate) fn send(&mut self, frames: &[&[u8]]) {
        for (at, frame) in frames.iter().enumerate() {
            let more = u8::from(at + 1 < frames.len());
            self.0
                .write_all(&[&[more, frame.len() as u8], *frame].concat())
                .expect("send");
        }
    }

    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut exactly = |count: usize| {
            let mut bytes = vec![0; count];
            self.0.read_exact(&mut bytes).expect("a frame comes");
            bytes
        };
        let flags = exactly(1)[0];
        let size = if flags & 2 == 0 {
            usize::from(exactly(1)[0])
        } else {
            u64::from_be_bytes(exactly(8).try_into().expect("eight bytes")) as usize
        };
        (flags, exactly(size))
    }

    /// The next message, frame by frame.
    pub(crate) fn message(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        loop {
            let (flags, body) = self.frame();
            frames.push(body);
            if flags & 1 == 0 {
                return frames;
            }
        }
    }

    /// Whether nothing comes for a while.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.0
            .set_read_timeout(Some(std::time::Duration::from_millis(200)))
            .expect("timeout");
        let silent = self.0.read_exact(&mut [0]).is_err();
        self.0.set_read_timeout(Some(PATIENCE)).expect("timeout");
        silent
    }

    /// The batches a replay from `start` gives, after its end marker was seen.
    pub(crate) fn replay(&mut self, start: u64) -> Vec<Vec<Vec<u8>>> {
        self.send(&[b"", &start.to_be_bytes()]);
        let mut batches = Vec::new();
        loop {
            let message = self.message();
            assert_eq!((message.len(), message[0].len()), (4, 0));
            if message[2] == (-1i64).to_be_bytes() {
                assert!(message[1].is_empty() && message[3].is_empty());
                return batches;
            }
            batches.push(message[1..].to_vec());
        }
    }
}

/// A value of the few msgpack kinds that events use, with how its head was written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Pack {
    Nil,
    Uint(u64),
    Float(f64),
    Text(String),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

impl Pack {
    pub(crate) fn read(mut bytes: &[u8]) -> Self {
        let value = Self::value(&mut bytes);
        assert!(bytes.is_empty(), "bytes behind the value");
        value
    }

    fn value(bytes: &mut &[u8]) -> Self {
        fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
            let (head, tail) = bytes.split_at(count);
            *bytes = tail;
            head
        }
        let number = |bytes: &mut &[u8], size: usize| {
            take(bytes, size)
                .iter()
                .fold(0, |n, &b| n << 8 | u64::from(b))
        };
        let text = |bytes: &mut &[u8], size: usize| {
            String::from_utf8(take(bytes, size).to_vec()).expect("text")
        };
        let list = |bytes: &mut &[u8], len: u64| {
            Self::List((0..len).map(|_| Self::value(bytes)).collect())
        };
        match take(bytes, 1)[0] {
            0xc0 => Self::Nil,
            0xcb => Self::Float(f64::from_bits(number(bytes, 8))),
            small @ 0..0x80 => Self::Uint(small.into()),
            head @ 0xcc..=0xcf => Self::Uint(number(bytes, 1 << (head - 0xcc))),
            head @ 0xa0..0xc0 => Self::Text(text(bytes, usize::from(head & 31))),
            head @ 0x90..0xa0 => list(bytes, u64::from(head & 15)),
            0xdc => {
                let len = number(bytes, 2);
                list(bytes, len)
            }
            head @ 0x80..0x90 => Self::Map(
                (0..head & 15)
                    .map(|_| match Self::value(bytes) {
                        Self::Text(key) => (key, Self::value(bytes)),
                        other => panic!("{other:?} as a key"),
                    })
                    .collect(),
            ),
            other => panic!("kind {other:#x} is not expected in events"),
        }
    }

    pub(crate) fn get(&self, name: &str) -> &Self {
        match self {
            Self::Map(entries) => &entries.iter().find(|(key, _)| key == name).expect(name).1,
            other => panic!("{other:?} has no keys"),
        }
    }

    pub(crate) fn list(&self) -> &[Self] {
        match self {
            Self::List(list) => list,
            other => panic!("{other:?} is no list"),
        }
    }

    pub(crate) fn numbers(&self) -> Vec<u64> {
        let number = |value: &Self| match value {
            Self::Uint(number) => *number,
            other => panic!("{other:?} is no number"),
        };
        self.list().iter().map(number).collect()
    }

    /// The same value with figures that depend on model and time left out.
    pub(crate) fn masked(&self) -> Self {
        match self {
            Self::Float(_) => Self::Float(0.0),
            Self::List(list) => Self::List(list.iter().map(Self::masked).collect()),
            Self::Map(entries) => Self::Map(
                entries
                    .iter()
                    .map(|(key, value)| {
                        let masked = match (key.as_str(), value) {
                            ("block_hashes" | "token_ids", value) => {
                                Self::List(vec![Self::Uint(0); value.list().len()])
                            }
                            ("parent_block_hash", Self::Uint(_)) => Self::Uint(0),
                            (_, value) => value.masked(),
                        };
                        (key.clone(), masked)
                    })
                    .collect(),
            ),
            other => other.clone(),
        }
    }
}

/// The events of a batch as `(topic, seq, events)`.
pub(crate) fn batch(frames: &[Vec<u8>]) -> (String, u64, Vec<Pack>) {
    let [topic, seq, payload] = frames else {
        panic!("{} frames", frames.len())
    };
    let payload = Pack::read(payload);
    let [Pack::Float(_), Pack::List(events), Pack::Uint(0)] = payload.list() else {
        panic!("{payload:?}")
    };
    let seq = u64::from_be_bytes(seq[..].try_into().expect("eight bytes"));
    (
        String::from_utf8_lossy(topic).into_owned(),
        seq,
        events.clone(),
    )
}
