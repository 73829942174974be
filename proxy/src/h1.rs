//! What both sides of HTTP/1 have in common: how bytes come in, how heads and chunks are written.

pub(crate) mod decoder;
pub(crate) mod outbox;

use http::{HeaderMap, header};
use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, ReadBuf};

/// Most bytes that are read, and handed on, at once. One buffer of this size per thread.
const READ_BYTES_MAX: usize = 64 * 1024;
/// Room that a head finds at once: most need no more, and an allocator gives away no more as cheaply.
pub(crate) const HEAD_BYTES: usize = 1000;

thread_local! {
    /// What was just read, before it is handed on.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES_MAX]);
}

/// Reads once, and hands over what came (nothing is the end) while it is still in the thread's buffer.
pub(crate) fn poll_read<S: AsyncRead + Unpin, T>(
    socket: &mut S,
    cx: &mut Context<'_>,
    take: impl FnOnce(&mut [u8]) -> T,
) -> Poll<io::Result<T>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut read = ReadBuf::new(scratch);
        ready!(Pin::new(socket).poll_read(cx, &mut read))?;
        Poll::Ready(Ok(take(read.filled_mut())))
    })
}

/// Whether any `connection` line has this word.
pub(crate) fn connection_says(headers: &HeaderMap, word: &[u8]) -> bool {
    let values = headers.get_all(header::CONNECTION);
    values.iter().any(|value| has_word(value.as_bytes(), word))
}

/// Whether a list, separated by commas, has this word.
pub(crate) fn has_word(list: &[u8], word: &[u8]) -> bool {
    let mut words = list.split(|&byte| byte == b',');
    words.any(|told| told.trim_ascii().eq_ignore_ascii_case(word))
}

/// A number as `content-length` has it: no sign, no list.
pub(crate) fn digits(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Appends a line of a head or of trailers.
pub(crate) fn write_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends the line before a chunk.
pub(crate) fn write_chunk_size(out: &mut Vec<u8>, size: usize) {
    let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        out.push(b"0123456789abcdef"[size >> (4 * digit) & 0xf]);
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_chunks_are_hexadecimal() {
        for size in [0, 1, 9, 10, 15, 16, 255, 256, 65_536, usize::MAX] {
            let mut line = Vec::new();
            write_chunk_size(&mut line, size);
            assert_eq!(String::from_utf8(line).unwrap(), format!("{size:x}\r\n"));
        }
    }

    #[test]
    fn words_of_a_list_are_whole_words() {
        for (list, has) in [
            (&b"close"[..], true),
            (b"te, Close ", true),
            (b"closed", false),
            (b"", false),
            (b"a,,close", true),
        ] {
            assert_eq!(has_word(list, b"close"), has, "{list:?}");
        }
    }
}
