//! Where the body of an HTTP/1 message is in the bytes that come, and where it ends (RFC 9112, 6 and 7.1). No IO.
//!
//! Strict: what is not exactly the grammar ends the connection. A lenient reader next to another one is how responses
//! are smuggled.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

/// Most bytes of a chunk's extensions and of one trailer section.
pub(crate) const CHUNK_EXTRA_BYTES_MAX: usize = 16 * 1024;
/// Most fields of a trailer section.
const TRAILERS_MAX: usize = 100;

/// What is left of a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decoder {
    /// Nothing.
    Done,
    /// So many bytes.
    Length(u64),
    /// All until the connection ends.
    UntilClose,
    /// Chunks.
    Chunked(Chunked),
    /// What came last breaks the grammar, or a limit.
    Broken,
}

/// Where in a chunked body we are.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunked {
    state: State,
    /// Of the size that is being read, or what is left of the chunk.
    size: u64,
    /// Hexadecimal digits of the size so far.
    digits: u8,
    /// Bytes of extensions and trailers so far.
    extra: usize,
    /// The trailer section as it comes.
    trailers: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Size,
    /// After the size: blanks, then the end of the line or an extension.
    AfterSize,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailers,
}

/// The bytes are no body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Garbage;

/// What [`Decoder::decode`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// Bytes of payload, now at the front.
    pub(crate) payload: usize,
    /// Bytes that belong to this body. Less than were given only at its end.
    pub(crate) used: usize,
    /// Come last.
    pub(crate) trailers: Option<Box<HeaderMap>>,
}

impl Decoder {
    /// A chunked body from its beginning.
    pub(crate) fn chunked() -> Self {
        Self::Chunked(Chunked::default())
    }

    /// Whether all of it has come.
    pub(crate) fn is_done(&self) -> bool {
        *self == Self::Done
    }

    /// Whether the end of the connection is a proper end.
    pub(crate) fn may_close(&self) -> bool {
        matches!(self, Self::Done | Self::UntilClose)
    }

    /// Bytes that are still to come, if that is known.
    pub(crate) fn left(&self) -> Option<u64> {
        match self {
            Self::Done => Some(0),
            Self::Length(left) => Some(*left),
            Self::UntilClose | Self::Chunked(_) | Self::Broken => None,
        }
    }

    /// Moves the payload among `bytes` to their front: all there is, or what stands before a break.
    pub(crate) fn decode(&mut self, bytes: &mut [u8]) -> Decoded {
        let mut decoded = Decoded::default();
        if self.try_decode(bytes, &mut decoded).is_err() {
            *self = Self::Broken;
        }
        decoded
    }

    fn try_decode(&mut self, bytes: &mut [u8], decoded: &mut Decoded) -> Result<(), Garbage> {
        match self {
            Self::Done | Self::Broken => {}
            Self::UntilClose => {
                decoded.payload = bytes.len();
                decoded.used = bytes.len();
            }
            Self::Length(left) => {
                let count =
                    usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= count as u64;
                decoded.payload = count;
                decoded.used = count;
                if *left == 0 {
                    *self = Self::Done;
                }
            }
            Self::Chunked(chunked) => {
                if chunked.decode(bytes, decoded)? {
                    decoded.trailers = parse_trailers(&chunked.trailers)?;
                    *self = Self::Done;
                }
            }
        }
        Ok(())
    }
}

impl Chunked {
    /// True at the end of the body.
    fn decode(&mut self, bytes: &mut [u8], decoded: &mut Decoded) -> Result<bool, Garbage> {
        while decoded.used < bytes.len() {
            if self.state == State::Data {
                self.take(bytes, decoded);
                continue;
            }
            let byte = bytes[decoded.used];
            decoded.used += 1;
            if self.step(byte)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Payload.
    fn take(&mut self, bytes: &mut [u8], decoded: &mut Decoded) {
        let here = bytes.len() - decoded.used;
        let count = usize::try_from(self.size).map_or(here, |left| left.min(here));
        bytes.copy_within(decoded.used..decoded.used + count, decoded.payload);
        decoded.payload += count;
        decoded.used += count;
        self.size -= count as u64;
        if self.size == 0 {
            self.state = State::DataCr;
        }
    }

    /// One byte between payloads. True if it was the last one.
    fn step(&mut self, byte: u8) -> Result<bool, Garbage> {
        self.state = match (self.state, byte) {
            (State::Size, _) if byte.is_ascii_hexdigit() => self.digit(byte)?,
            (State::Size | State::AfterSize, b'\r') if self.digits > 0 => State::SizeLf,
            (State::Size | State::AfterSize, b';') if self.digits > 0 => State::Extension,
            (State::Size | State::AfterSize, b' ' | b'\t') if self.digits > 0 => {
                self.count_extra()?;
                State::AfterSize
            }
            (State::Extension, b'\r') => State::SizeLf,
            (State::Extension, byte) if byte != b'\n' => {
                self.count_extra()?;
                State::Extension
            }
            (State::SizeLf, b'\n') => {
                self.digits = 0;
                if self.size == 0 {
                    State::Trailers
                } else {
                    State::Data
                }
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size,
            // httparse takes a line that ends with LF alone; whoever reads after us may not.
            (State::Trailers, b'\n') if self.trailers.last() != Some(&b'\r') => {
                return Err(Garbage);
            }
            (State::Trailers, byte) => {
                self.count_extra()?;
                self.trailers.push(byte);
                return Ok(self.trailers == b"\r\n" || self.trailers.ends_with(b"\r\n\r\n"));
            }
            _ => return Err(Garbage),
        };
        Ok(false)
    }

    fn digit(&mut self, byte: u8) -> Result<State, Garbage> {
        let value = char::from(byte).to_digit(16).ok_or(Garbage)?;
        if self.digits == 0 {
            self.size = 0;
        }
        self.digits = self.digits.saturating_add(1);
        self.size = self
            .size
            .checked_mul(16)
            .and_then(|size| size.checked_add(u64::from(value)))
            .ok_or(Garbage)?;
        if self.digits > 32 {
            return Err(Garbage); // Zeros without end.
        }
        Ok(State::Size)
    }

    fn count_extra(&mut self) -> Result<(), Garbage> {
        self.extra += 1;
        if self.extra > CHUNK_EXTRA_BYTES_MAX {
            return Err(Garbage);
        }
        Ok(())
    }
}

fn parse_trailers(section: &[u8]) -> Result<Option<Box<HeaderMap>>, Garbage> {
    if section == b"\r\n" {
        return Ok(None);
    }
    let mut fields = [httparse::EMPTY_HEADER; TRAILERS_MAX];
    let parsed = httparse::parse_headers(section, &mut fields).map_err(|_| Garbage)?;
    let httparse::Status::Complete((used, fields)) = parsed else {
        return Err(Garbage);
    };
    if used != section.len() {
        return Err(Garbage);
    }
    let mut trailers = Box::new(HeaderMap::with_capacity(fields.len()));
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Garbage)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| Garbage)?;
        trailers.append(name, value);
    }
    Ok(Some(trailers))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `wire` in pieces of `step` bytes; the payload, the trailers' number, and what is left over.
    fn run(
        mut decoder: Decoder,
        wire: &[u8],
        step: usize,
    ) -> Result<(Vec<u8>, usize, usize), Garbage> {
        let (mut payload, mut trailers, mut at) = (Vec::new(), 0, 0);
        while at < wire.len() && !decoder.is_done() {
            let mut piece = wire[at..wire.len().min(at + step)].to_vec();
            let decoded = decoder.decode(&mut piece);
            if decoder == Decoder::Broken {
                return Err(Garbage);
            }
            payload.extend_from_slice(&piece[..decoded.payload]);
            trailers += decoded.trailers.map_or(0, |trailers| trailers.len());
            assert!(decoded.used == piece.len() || decoder.is_done());
            at += decoded.used;
        }
        Ok((payload, trailers, wire.len() - at))
    }

    #[test]
    fn chunks_are_taken_apart_wherever_they_are_cut() {
        let cases: [(&[u8], &[u8], usize, usize); 6] = [
            (b"3\r\none\r\n0\r\n\r\n", b"one", 0, 0),
            (b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\nHTTP", b"onetwo", 0, 4),
            (
                b"0A;x=\"y\"\r\n0123456789\r\n0\r\n\r\n",
                b"0123456789",
                0,
                0,
            ),
            (b"3 \t\r\none\r\n000\r\n\r\n", b"one", 0, 0),
            (b"3\r\none\r\n0\r\nx-sum: 1\r\ny: 2\r\n\r\nZ", b"one", 2, 1),
            (b"0\r\n\r\n", b"", 0, 0),
        ];
        for (wire, payload, trailers, left) in cases {
            for step in 1..=wire.len() {
                let text = String::from_utf8_lossy(wire);
                let found = run(Decoder::chunked(), wire, step);
                assert_eq!(
                    found,
                    Ok((payload.to_vec(), trailers, left)),
                    "{text} by {step}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_chunk_is_garbage() {
        let cases: [&[u8]; 18] = [
            b"\r\n",
            b"x\r\n",
            b";a\r\n",
            b" 3\r\none\r\n",
            b"3\none\r\n",
            b"3\r\none\n",
            b"3\r\nonetwo\r\n",
            b"3 3\r\none",
            b"3;a\n",
            b"-3\r\n",
            b"+3\r\n",
            b"0x3\r\n",
            b"11111111111111111\r\n",
            b"0\r\n: x\r\n\r\n",
            b"0\r\nx: 1\ny: 2\r\n\r\n",
            b"0\r\nx: 1\n\r\n\r\n",
            b"0\r\nx: 1\r\n\n",
            b"0\r\n\n",
        ];
        for wire in cases {
            for step in [1, wire.len()] {
                let text = String::from_utf8_lossy(wire);
                assert_eq!(run(Decoder::chunked(), wire, step), Err(Garbage), "{text}");
            }
        }
    }

    #[test]
    fn what_stands_before_a_break_is_not_lost() {
        let mut decoder = Decoder::chunked();
        let mut wire = *b"3\r\none\r\nzz";
        let decoded = decoder.decode(&mut wire);
        assert_eq!(
            (&wire[..decoded.payload], decoder),
            (&b"one"[..], Decoder::Broken)
        );
    }

    #[test]
    fn extensions_and_trailers_have_an_end() {
        for begin in ["1;", "0\r\nx: "] {
            let mut wire = begin.as_bytes().to_vec();
            wire.resize(CHUNK_EXTRA_BYTES_MAX + 100, b'a');
            assert_eq!(run(Decoder::chunked(), &wire, 4096), Err(Garbage));
        }
    }

    #[test]
    fn a_length_ends_where_it_says() {
        assert_eq!(
            run(Decoder::Length(3), b"oneX", 2),
            Ok((b"one".to_vec(), 0, 1))
        );
        let mut decoder = Decoder::Length(3);
        decoder.decode(&mut [b'o']);
        assert_eq!((decoder.left(), decoder.may_close()), (Some(2), false));
        let mut decoder = Decoder::UntilClose;
        decoder.decode(&mut [b'o']);
        assert_eq!((decoder.left(), decoder.may_close()), (None, true));
    }

    #[test]
    fn any_bytes_end_in_a_payload_or_in_garbage() {
        // The same bytes mean the same, however they are cut.
        let mut seed = 7_u32;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            seed
        };
        let alphabet = b"0123\r\n\r\n\r\n;ax: ";
        for _ in 0..20_000 {
            let length = next() as usize % 40;
            let wire: Vec<u8> = (0..length)
                .map(|_| alphabet[next() as usize % alphabet.len()])
                .collect();
            let whole = run(Decoder::chunked(), &wire, wire.len().max(1));
            assert_eq!(whole.is_err(), run(Decoder::chunked(), &wire, 1).is_err());
            if whole.is_ok() {
                assert_eq!(
                    whole,
                    run(Decoder::chunked(), &wire, 1 + next() as usize % 7)
                );
            }
        }
    }
}
