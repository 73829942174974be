//! What is to be written next: text of ours (heads, what frames chunks) and between it payload that nobody copies.

use super::HEAD_BYTES;
use bytes::{Buf, Bytes};
use outrigger_filters::spare::Shelf;
use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::AsyncWrite;

/// Most pieces of payload that wait, to leave in one write.
const PIECES_MAX: usize = 16;
/// No further piece is taken while so much waits.
const WAITING_BYTES_MAX: usize = 64 * 1024;
/// Larger texts are not kept for the next message.
const TEXT_BYTES_KEPT_MAX: usize = 4 * 1024;

thread_local! {
    /// For the next messages of this thread.
    static SPARE: Shelf<Outbox> = const { Shelf::new() };
}

/// See the module. One that has nothing to send owns nothing, if it was released.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    text: Vec<u8>,
    /// Of the text.
    sent: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of all pieces.
    payload: usize,
    /// The socket took bytes that it has not seen on their way: TLS keeps them where the system takes no more.
    unflushed: bool,
}

#[derive(Debug)]
struct Piece {
    /// Where it stands in the text.
    at: usize,
    data: Bytes,
}

impl Outbox {
    /// Gives its buffers to whoever writes next on this thread; what was not sent is forgotten.
    pub(crate) fn release(&mut self) {
        let mut spare = std::mem::take(self);
        if (1..=TEXT_BYTES_KEPT_MAX).contains(&spare.text.capacity()) {
            spare.text.clear();
            spare.pieces.clear();
            (spare.sent, spare.payload, spare.unflushed) = (0, 0, false);
            SPARE.with(|kept| kept.keep(spare));
        }
    }

    /// Text is appended here.
    pub(crate) fn text(&mut self) -> &mut Vec<u8> {
        if self.text.capacity() == 0 && self.is_empty() {
            *self = SPARE.with(Shelf::take).unwrap_or_default();
            self.text.reserve(HEAD_BYTES);
        }
        &mut self.text
    }

    /// Appends payload.
    pub(crate) fn push(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.payload += data.len();
            let at = self.text.len();
            self.pieces.push_back(Piece { at, data });
        }
    }

    /// Whether more may be appended before some has left.
    pub(crate) fn has_room(&self) -> bool {
        self.pieces.len() < PIECES_MAX && self.payload < WAITING_BYTES_MAX
    }

    /// Whether all has left.
    pub(crate) fn is_empty(&self) -> bool {
        self.is_written() && !self.unflushed
    }

    fn is_written(&self) -> bool {
        self.pieces.is_empty() && self.sent == self.text.len()
    }

    /// Writes all there is, and sees it on its way.
    pub(crate) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut S,
    ) -> Poll<io::Result<()>> {
        while !self.is_written() {
            let sent = ready!(self.poll_write(cx, socket))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(sent);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(socket).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write<S: AsyncWrite + Unpin>(
        &self,
        cx: &mut Context<'_>,
        socket: &mut S,
    ) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); 2 * PIECES_MAX + 1];
        let (mut count, mut from) = (0, self.sent);
        for piece in &self.pieces {
            if piece.at > from {
                slices[count] = IoSlice::new(&self.text[from..piece.at]);
                count += 1;
            }
            slices[count] = IoSlice::new(&piece.data);
            count += 1;
            from = piece.at;
        }
        if self.text.len() > from {
            slices[count] = IoSlice::new(&self.text[from..]);
            count += 1;
        }
        Pin::new(socket).poll_write_vectored(cx, &slices[..count])
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(piece) = self.pieces.front_mut() {
            let before = count.min(piece.at - self.sent);
            self.sent += before;
            count -= before;
            let of_it = count.min(piece.data.len());
            piece.data.advance(of_it);
            self.payload -= of_it;
            count -= of_it;
            if piece.data.has_remaining() {
                return self.forget_sent();
            }
            self.pieces.pop_front();
        }
        self.sent += count;
        if self.sent == self.text.len() {
            self.text.clear();
            self.sent = 0;
        }
    }

    /// A reader who is always behind never lets it run empty: what has left does not stay for that.
    fn forget_sent(&mut self) {
        if self.sent >= TEXT_BYTES_KEPT_MAX {
            self.text.drain(..self.sent);
            for piece in &mut self.pieces {
                piece.at -= self.sent;
            }
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    /// Takes so many bytes at a time.
    struct Narrow(Vec<u8>, usize);

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let count = bytes.len().min(self.1);
            self.0.extend_from_slice(&bytes[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
            self.poll_write(cx, &all)
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn text_and_payload_leave_in_their_order_however_little_is_taken() {
        for step in 1..30 {
            let mut outbox = Outbox::default();
            for (text, data) in [("head", "one"), ("", "two"), ("|", ""), ("-", "three")] {
                outbox.text().extend_from_slice(text.as_bytes());
                outbox.push(data.into());
            }
            outbox.text().extend_from_slice(b"tail");
            let mut socket = Narrow(Vec::new(), step);
            poll_fn(|cx| outbox.poll_send(cx, &mut socket))
                .await
                .unwrap();
            assert_eq!(socket.0, b"headonetwo|-threetail", "by {step}");
            assert!(outbox.is_empty() && outbox.has_room() && outbox.payload == 0);
            outbox.release();
            assert_eq!(outbox.text.capacity(), 0);
        }
    }

    /// Takes all, and sees it on its way the second time it is asked to.
    #[derive(Default)]
    struct Late {
        asked: bool,
        flushed: bool,
    }

    impl AsyncWrite for Late {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.flushed = std::mem::replace(&mut self.asked, true);
            if self.flushed {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            }
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn what_a_socket_keeps_for_itself_was_taken_for_sent() {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let (mut outbox, mut socket) = (Outbox::default(), Late::default());
        outbox.push("event".into());
        // Whoever sees it empty does not come back before there is more.
        while !outbox.is_empty() {
            let _ = outbox.poll_send(&mut cx, &mut socket);
        }
        assert!(socket.flushed);
    }

    #[test]
    fn a_reader_who_is_always_behind_does_not_let_it_grow() {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let (mut outbox, mut socket) = (Outbox::default(), Narrow(Vec::new(), 9));
        for _ in 0..10 * TEXT_BYTES_KEPT_MAX {
            outbox.text().extend_from_slice(b"1\r\n");
            outbox.push("x".into());
            outbox.text().extend_from_slice(b"\r\n");
            while !outbox.has_room() {
                let Poll::Ready(Ok(sent)) = outbox.poll_write(&mut cx, &mut socket) else {
                    panic!("it takes some");
                };
                outbox.advance(sent);
            }
        }
        assert!(outbox.text.len() < 2 * TEXT_BYTES_KEPT_MAX);
        let _ = outbox.poll_send(&mut cx, &mut socket);
        assert_eq!(socket.0, b"1\r\nx\r\n".repeat(10 * TEXT_BYTES_KEPT_MAX));
    }

    #[tokio::test]
    async fn a_socket_that_takes_nothing_is_broken() {
        let mut outbox = Outbox::default();
        outbox.push("x".into());
        let mut socket = Narrow(Vec::new(), 0);
        let sent = poll_fn(|cx| outbox.poll_send(cx, &mut socket)).await;
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn much_payload_waits_for_room() {
        let mut outbox = Outbox::default();
        outbox.push(vec![0; WAITING_BYTES_MAX].into());
        assert!(!outbox.has_room());
        let mut outbox = Outbox::default();
        for _ in 0..PIECES_MAX {
            assert!(outbox.has_room());
            outbox.push("x".into());
        }
        assert!(!outbox.has_room());
    }
}
