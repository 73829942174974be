//! Bytes both ways between a client and an upstream until both have ended: for `tcp_proxy` and for upgrades.
//!
//! Who has nothing more to send says so to the other side, which may go on sending. At most [`BUFFER_BYTES`] of each
//! direction are held.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes},
    time::Instant,
};

/// Bytes of one direction that are read and not yet written.
pub(crate) const BUFFER_BYTES: usize = 16 * 1024;

/// How long it may go on; `None` is off.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limits {
    /// Without a byte either way.
    pub(crate) idle: Option<Duration>,
    /// Whatever happens.
    pub(crate) until: Option<Instant>,
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides had nothing more to send.
    Complete,
    /// One of them broke.
    Broken,
    /// Nobody said anything for too long.
    Idle,
    /// Its time was over.
    Expired,
}

/// What has passed so far.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// Bytes from the client.
    pub(crate) received: AtomicU64,
    /// Bytes to the client.
    pub(crate) sent: AtomicU64,
}

impl Passed {
    fn total(&self) -> u64 {
        self.received.load(Relaxed) + self.sent.load(Relaxed)
    }
}

/// Carries bytes until an end comes.
pub(crate) async fn run<C, U>(client: C, upstream: U, limits: Limits, passed: &Passed) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let mut client = Counted {
        stream: client,
        passed,
    };
    let mut upstream = upstream;
    let copied =
        copy_bidirectional_with_sizes(&mut client, &mut upstream, BUFFER_BYTES, BUFFER_BYTES);
    let over = async {
        match limits.until {
            Some(until) => tokio::time::sleep_until(until).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        copied = copied => match copied {
            Ok(_) => End::Complete,
            Err(error) => {
                tracing::debug!(%error, "a connection broke");
                End::Broken
            }
        },
        () = silence(limits.idle, passed) => End::Idle,
        () = over => End::Expired,
    }
}

/// Completes when nothing has passed for so long.
async fn silence(limit: Option<Duration>, passed: &Passed) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    // A look every quarter finds a silence at most that much late, and costs a busy stream next to nothing.
    let step = (limit / 4).max(Duration::from_millis(1));
    let (mut before, mut since) = (passed.total(), Instant::now());
    loop {
        tokio::time::sleep_until((since + limit).min(Instant::now() + step)).await;
        let now = passed.total();
        if now != before {
            (before, since) = (now, Instant::now());
        } else if since.elapsed() >= limit {
            return;
        }
    }
}

/// The client's side, with what passes it counted.
struct Counted<'a, S> {
    stream: S,
    passed: &'a Passed,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        self.passed.received.fetch_add(read as u64, Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<'_, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buffer))?;
        self.passed.sent.fetch_add(written as u64, Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
