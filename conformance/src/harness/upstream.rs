//! Servers as a case needs them: bytes on a socket, written by the case itself, with every request kept as it came.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// What a kernel is to hold of a connection whose reader is slow.
pub(super) const SMALL_BUFFER_BYTES: usize = 64 << 10;

/// A request as it stood on the wire.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// `POST /path HTTP/1.1`.
    pub line: String,
    /// Names in lower case, in the order they came.
    pub headers: Vec<(String, String)>,
    /// With the chunks of a chunked one joined.
    pub body: Vec<u8>,
    /// Which connection, counted from 1.
    pub connection: usize,
}

impl Exchange {
    /// A header; empty if there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map_or("", |(_, value)| value.as_str())
    }

    /// Whether a header came, and how often.
    #[must_use]
    pub fn count(&self, name: &str) -> usize {
        self.headers
            .iter()
            .filter(|(known, _)| known == name)
            .count()
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }
}

/// A connection, in the hands of the case.
pub struct Conn {
    socket: TcpStream,
    read: Vec<u8>,
    number: usize,
}

impl Conn {
    /// Writes; false if the other side is gone.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.socket.write_all(bytes.as_ref()).await.is_ok()
    }

    /// A whole answer with a length.
    pub async fn answer(&mut self, status: &str, content_type: &str, body: &str) -> bool {
        let length = body.len();
        self.write(format!(
            "HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await
    }

    /// A JSON answer.
    pub async fn json(&mut self, status: &str, body: &str) -> bool {
        self.answer(status, "application/json", body).await
    }

    /// The head of an event stream.
    pub async fn begin_events(&mut self) -> bool {
        self.write(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await
    }

    /// One chunk.
    pub async fn chunk(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        let bytes = bytes.as_ref();
        let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
        framed.extend_from_slice(bytes);
        framed.extend_from_slice(b"\r\n");
        self.write(framed).await
    }

    /// One event in a chunk of its own.
    pub async fn event(&mut self, data: &str) -> bool {
        self.chunk(format!("data: {data}\n\n")).await
    }

    /// The end of a chunked body.
    pub async fn end(&mut self) -> bool {
        self.write("0\r\n\r\n").await
    }

    /// Closes with a RST.
    pub fn reset(self) {
        // With a linger of zero, closing is a reset.
        let _ = self.socket.set_zero_linger();
    }

    /// Waits until the other side closes, and says when it did.
    pub async fn gone(&mut self) -> Instant {
        let mut buffer = [0; 4096];
        while matches!(self.socket.read(&mut buffer).await, Ok(read) if read > 0) {}
        Instant::now()
    }

    /// How many bytes can be written before the other side has taken nothing for `pause`, or `most` are reached. What
    /// this side's kernel would hold is kept small, so that it hides nothing.
    pub async fn push(&mut self, piece: &[u8], most: usize, pause: Duration) -> usize {
        // Best effort: a larger buffer makes the figure larger.
        let _ = socket2::SockRef::from(&self.socket).set_send_buffer_size(SMALL_BUFFER_BYTES);
        let mut pushed = 0;
        while pushed < most {
            match tokio::time::timeout(pause, self.socket.write(piece)).await {
                Ok(Ok(written)) if written > 0 => pushed += written,
                _ => break,
            }
        }
        pushed
    }

    /// The next request, or `None` at the end.
    async fn next(&mut self) -> Option<Exchange> {
        let end = self.fill_until(b"\r\n\r\n").await?;
        let head = String::from_utf8_lossy(&self.read[..end]).into_owned();
        self.read.drain(..end);
        let mut lines = head.split("\r\n");
        let line = lines.next()?.to_owned();
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let mut exchange = Exchange {
            line,
            headers,
            body: Vec::new(),
            connection: self.number,
        };
        if exchange
            .header("expect")
            .eq_ignore_ascii_case("100-continue")
        {
            self.write("HTTP/1.1 100 Continue\r\n\r\n").await;
        }
        if exchange.header("transfer-encoding").contains("chunked") {
            self.chunks(&mut exchange.body).await?;
        } else if let Ok(length) = exchange.header("content-length").parse::<usize>() {
            self.fill(length).await?;
            exchange.body = self.read.drain(..length).collect();
        }
        Some(exchange)
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> Option<()> {
        loop {
            let end = self.fill_until(b"\r\n").await?;
            let size = std::str::from_utf8(&self.read[..end - 2])
                .ok()?
                .split(';')
                .next()?
                .trim()
                .to_owned();
            let size = usize::from_str_radix(&size, 16).ok()?;
            self.read.drain(..end);
            if size == 0 {
                // Trailers, up to the blank line.
                loop {
                    let end = self.fill_until(b"\r\n").await?;
                    self.read.drain(..end);
                    if end == 2 {
                        return Some(());
                    }
                }
            }
            self.fill(size + 2).await?;
            body.extend_from_slice(&self.read[..size]);
            self.read.drain(..size + 2);
        }
    }

    async fn fill_until(&mut self, mark: &[u8]) -> Option<usize> {
        loop {
            if let Some(at) = memchr::memmem::find(&self.read, mark) {
                return Some(at + mark.len());
            }
            self.more().await?;
        }
    }

    async fn fill(&mut self, length: usize) -> Option<()> {
        while self.read.len() < length {
            self.more().await?;
        }
        Some(())
    }

    async fn more(&mut self) -> Option<()> {
        let mut buffer = vec![0; 64 * 1024];
        let read = self
            .socket
            .read(&mut buffer)
            .await
            .ok()
            .filter(|&read| read > 0)?;
        self.read.extend_from_slice(&buffer[..read]);
        Some(())
    }
}

#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    exchanges: Mutex<Vec<Exchange>>,
}

/// A server whose answers the case writes itself.
pub struct Upstream {
    /// Where it listens.
    pub address: SocketAddr,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

impl Upstream {
    /// Serves each request with `serve`, which gives the connection back to keep it open.
    ///
    /// # Panics
    /// If no port is free.
    pub async fn start<S, F>(serve: S) -> Self
    where
        S: Fn(Conn, Exchange) -> F + Send + Sync + 'static,
        F: Future<Output = Option<Conn>> + Send + 'static,
    {
        Self::begin(serve, false).await
    }

    /// As [`Self::start`], but GETs get a 404, as detection asks them: an engine of unknown kind.
    pub async fn engine<S, F>(serve: S) -> Self
    where
        S: Fn(Conn, Exchange) -> F + Send + Sync + 'static,
        F: Future<Output = Option<Conn>> + Send + 'static,
    {
        Self::begin(serve, true).await
    }

    /// Answers every request with a small JSON object that names it.
    pub async fn named(name: &'static str) -> Self {
        Self::start(move |mut conn, _| async move {
            conn.json("200 OK", &format!("{{\"served_by\":\"{name}\"}}"))
                .await
                .then_some(conn)
        })
        .await
    }

    async fn begin<S, F>(serve: S, detected: bool) -> Self
    where
        S: Fn(Conn, Exchange) -> F + Send + Sync + 'static,
        F: Future<Output = Option<Conn>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("invariant: a free port");
        let address = listener.local_addr().expect("invariant: a bound socket");
        let seen = Arc::new(Seen::default());
        let task = tokio::spawn(accept(listener, seen.clone(), Arc::new(serve), detected));
        Self {
            address,
            seen,
            task,
        }
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.seen.connections.load(SeqCst)
    }

    /// Requests so far.
    #[must_use]
    pub fn exchanges(&self) -> Vec<Exchange> {
        self.seen
            .exchanges
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The only request so far.
    ///
    /// # Panics
    /// If there were more or none.
    #[must_use]
    pub fn only(&self) -> Exchange {
        let mut all = self.exchanges();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<S, F>(listener: TcpListener, seen: Arc<Seen>, serve: Arc<S>, detected: bool)
where
    S: Fn(Conn, Exchange) -> F + Send + Sync + 'static,
    F: Future<Output = Option<Conn>> + Send + 'static,
{
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let _ = socket.set_nodelay(true);
        let number = seen.connections.fetch_add(1, SeqCst) + 1;
        let (seen, serve) = (seen.clone(), serve.clone());
        connections.spawn(async move {
            let mut conn = Conn {
                socket,
                read: Vec::new(),
                number,
            };
            while let Some(exchange) = conn.next().await {
                if detected && exchange.line.starts_with("GET ") {
                    conn.json("404 Not Found", "{}").await;
                    continue;
                }
                seen.exchanges
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(exchange.clone());
                match serve(conn, exchange).await {
                    Some(back) => conn = back,
                    None => return,
                }
            }
        });
    }
}
