//! A client's connection, and the bytes of it that have been read and not used.

use crate::{h1, tls::Stream};
use bytes::{Buf, BytesMut};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Unread bytes that are thrown away when a connection is closed.
pub(super) const LEFTOVER_BYTES_MAX: usize = 64 * 1024;

/// See the module. Who reads from it gets what was read ahead first.
#[derive(Debug)]
pub(crate) struct Client {
    pub(super) stream: Stream,
    /// Empty nearly always, and then it owns no buffer.
    pub(super) ahead: BytesMut,
}

impl Client {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            ahead: BytesMut::new(),
        }
    }

    /// Reads once and keeps what came; how much.
    pub(super) fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let ahead = &mut self.ahead;
        h1::poll_read(&mut self.stream, cx, |bytes| {
            ahead.extend_from_slice(bytes);
            bytes.len()
        })
    }
}

/// Takes bytes off the front; when nothing is left, the buffer goes too.
pub(super) fn consume(ahead: &mut BytesMut, count: usize) {
    if count == ahead.len() {
        *ahead = BytesMut::new();
    } else {
        ahead.advance(count);
    }
}

/// Takes what has arrived, so that the close is one: the system resets a connection that it closes with bytes unread, and
/// the client might lose our last words.
impl Drop for Client {
    fn drop(&mut self) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut left = LEFTOVER_BYTES_MAX;
        while left > 0 {
            match h1::poll_read(&mut self.stream, &mut cx, |bytes| bytes.len()) {
                Poll::Ready(Ok(count)) if count > 0 => left = left.saturating_sub(count),
                _ => return,
            }
        }
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..count]);
        consume(&mut self.ahead, count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
