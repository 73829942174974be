//! Answers "what does this engine's HTTP look like on the wire": HTTP/1.1 as uvicorn serves it.
//!
//! Header names, their order, one chunk per SSE event, keep-alive of 5 s, and what a broken server would send instead.
//! Knows nothing of routes. Limits: `HEAD_BYTES_MAX`, `BODY_BYTES_MAX`.

use std::pin::Pin;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const HEAD_BYTES_MAX: usize = 64 * 1024;
const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;
/// uvicorn's `timeout_keep_alive`: how long an idle connection stays open after a response.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A request, read whole.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path without its query.
    pub(crate) path: String,
    pub(crate) query: String,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    keep_alive: bool,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }
}

/// A piece of a streamed body, or how the stream ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// One chunk.
    Data(String),
    /// The connection closes without the last chunk.
    Truncate,
    /// The connection is reset.
    Reset,
    /// Bytes that are no chunk, then the connection closes.
    Garbage,
}

/// The body of a response.
pub(crate) enum Body {
    Full(Vec<u8>),
    /// Chunks, each sent as it comes; the head leaves before the first. Dropped when the client leaves.
    Stream(Pin<Box<dyn Stream<Item = Piece> + Send>>),
    /// No answer at all.
    Broken(Piece),
}

/// A response as a handler gives it.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) content_type: Option<&'static str>,
    /// Value of `allow`, on 405.
    pub(crate) allow: Option<&'static str>,
    /// Whether the CORS layer saw it.
    pub(crate) vary: bool,
    pub(crate) body: Body,
}

impl Response {
    pub(crate) fn json(status: u16, body: String) -> Self {
        Self {
            status,
            content_type: Some("application/json"),
            allow: None,
            vary: true,
            body: Body::Full(body.into_bytes()),
        }
    }

    pub(crate) fn empty() -> Self {
        Self {
            content_type: None,
            ..Self::json(200, String::new())
        }
    }

    pub(crate) fn broken(how: Piece) -> Self {
        Self {
            body: Body::Broken(how),
            ..Self::empty()
        }
    }

    pub(crate) fn events(stream: impl Stream<Item = Piece> + Send + 'static) -> Self {
        Self {
            status: 200,
            content_type: Some("text/event-stream; charset=utf-8"),
            allow: None,
            vary: true,
            body: Body::Stream(Box::pin(stream)),
        }
    }
}

/// How a connection goes on.
enum Next {
    KeepAlive,
    Close,
}

struct Connection {
    socket: TcpStream,
    /// Bytes read and not yet used.
    buffer: Vec<u8>,
}

/// What stands in the head of a request.
struct Head {
    request: Request,
    length: Length,
    expects_continue: bool,
}

enum Length {
    Fixed(usize),
    Chunked,
}

/// Serves one connection until either side ends it.
pub(crate) async fn serve<H, F>(socket: TcpStream, handler: H)
where
    H: Fn(Request) -> F,
    F: Future<Output = Response>,
{
    // A socket that cannot be set up is gone; reading will say so.
    let _ = socket.set_nodelay(true);
    let mut connection = Connection {
        socket,
        buffer: Vec::new(),
    };
    let mut idle_limit = Duration::MAX;
    loop {
        let request = match connection.read_request(idle_limit).await {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(Refused) => {
                let _ = connection.socket.write_all(&invalid_request()).await;
                return;
            }
        };
        let (head_only, keep_alive) = (request.method == "HEAD", request.keep_alive);
        let response = tokio::select! {
            response = handler(request) => response,
            () = gone(&mut connection.socket, &mut connection.buffer) => return,
        };
        match connection
            .write_response(response, head_only, keep_alive)
            .await
        {
            Ok(Next::KeepAlive) => idle_limit = KEEP_ALIVE,
            Ok(Next::Close) | Err(_) => return,
        }
    }
}

/// The request is no HTTP this server takes.
struct Refused;

/// Resolves when the client closes its side. What it sends meanwhile is kept, up to a limit.
async fn gone(socket: &mut TcpStream, buffer: &mut Vec<u8>) {
    loop {
        if buffer.len() > HEAD_BYTES_MAX {
            std::future::pending::<()>().await;
        }
        match socket.read_buf(buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

impl Connection {
    /// Reads on; false at the end of the stream.
    async fn fill(&mut self) -> bool {
        matches!(self.socket.read_buf(&mut self.buffer).await, Ok(1..))
    }

    async fn read_request(&mut self, idle_limit: Duration) -> Result<Option<Request>, Refused> {
        if self.buffer.is_empty() {
            match tokio::time::timeout(idle_limit, self.fill()).await {
                Ok(true) => {}
                Ok(false) | Err(_) => return Ok(None),
            }
        }
        let end = loop {
            if let Some(at) = memchr::memmem::find(&self.buffer, b"\r\n\r\n") {
                break at + 4;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(Refused);
            }
            if !self.fill().await {
                return Ok(None);
            }
        };
        let head: Vec<u8> = self.buffer.drain(..end).collect();
        let mut head = parse_head(&head).ok_or(Refused)?;
        if head.expects_continue
            && self
                .socket
                .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                .await
                .is_err()
        {
            return Ok(None);
        }
        let body = match head.length {
            Length::Fixed(length) if length > BODY_BYTES_MAX => return Err(Refused),
            Length::Fixed(length) => self.take(length).await,
            Length::Chunked => self.read_chunks().await?,
        };
        let Some(body) = body else { return Ok(None) };
        head.request.body = body;
        Ok(Some(head.request))
    }

    /// The next `count` bytes; `None` if the client leaves before.
    async fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.buffer.len() < count {
            if !self.fill().await {
                return None;
            }
        }
        Some(self.buffer.drain(..count).collect())
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(at) = memchr::memmem::find(&self.buffer, b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..at + 2).collect();
                return Some(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            if !self.fill().await {
                return None;
            }
        }
    }

    async fn read_chunks(&mut self) -> Result<Option<Vec<u8>>, Refused> {
        let mut body = Vec::new();
        loop {
            let Some(line) = self.line().await else {
                return Ok(None);
            };
            let size = line.split(';').next().unwrap_or("").trim();
            let size = usize::from_str_radix(size, 16).map_err(|_| Refused)?;
            if size > BODY_BYTES_MAX - body.len() {
                return Err(Refused);
            }
            if size == 0 {
                break;
            }
            let Some(chunk) = self.take(size + 2).await else {
                return Ok(None);
            };
            body.extend_from_slice(&chunk[..size]);
        }
        // Trailers, which nobody here reads, up to an empty line.
        while let Some(line) = self.line().await {
            if line.is_empty() {
                return Ok(Some(body));
            }
        }
        Ok(None)
    }

    async fn write_response(
        &mut self,
        response: Response,
        head_only: bool,
        keep_alive: bool,
    ) -> std::io::Result<Next> {
        let mut out = head_of(&response, keep_alive).into_bytes();
        match response.body {
            Body::Full(body) => {
                if !head_only {
                    out.extend(body);
                }
                self.socket.write_all(&out).await?;
            }
            Body::Stream(mut pieces) => {
                loop {
                    if !out.is_empty() {
                        self.socket.write_all(&out).await?;
                        out.clear();
                    }
                    let piece = tokio::select! {
                        piece = pieces.next() => piece,
                        () = gone(&mut self.socket, &mut self.buffer) => return Ok(Next::Close),
                    };
                    match piece {
                        Some(Piece::Data(data)) => {
                            out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                            out.extend_from_slice(data.as_bytes());
                            out.extend_from_slice(b"\r\n");
                        }
                        Some(broken) => return self.break_off(&broken).await,
                        None => break,
                    }
                }
                out.extend_from_slice(b"0\r\n\r\n");
                self.socket.write_all(&out).await?;
            }
            Body::Broken(how) => return self.break_off(&how).await,
        }
        Ok(if keep_alive {
            Next::KeepAlive
        } else {
            Next::Close
        })
    }

    async fn break_off(&mut self, how: &Piece) -> std::io::Result<Next> {
        match how {
            Piece::Garbage => {
                self.socket
                    .write_all(b"\x16\x03\x01zz not a chunk\r\n\r\n\0\0")
                    .await?
            }
            Piece::Reset => self.socket.set_zero_linger()?,
            Piece::Truncate | Piece::Data(_) => {}
        }
        Ok(Next::Close)
    }
}

fn head_of(response: &Response, keep_alive: bool) -> String {
    let date = httpdate::fmt_http_date(SystemTime::now());
    let mut head = format!(
        "HTTP/1.1 {} {}\r\ndate: {date}\r\nserver: uvicorn\r\n",
        response.status,
        reason(response.status)
    );
    let mut header = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
    if let Some(allow) = response.allow {
        header("allow", allow);
    }
    if let Body::Full(body) = &response.body {
        header("content-length", &body.len().to_string());
    }
    if let Some(content_type) = response.content_type {
        header("content-type", content_type);
    }
    if response.vary {
        header("vary", "Origin");
    }
    if matches!(response.body, Body::Stream(_)) {
        header("transfer-encoding", "chunked");
    }
    if !keep_alive {
        header("connection", "close");
    }
    head.push_str("\r\n");
    head
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "",
    }
}

/// uvicorn's answer to what its parser refuses.
fn invalid_request() -> Vec<u8> {
    let body = "Invalid HTTP request received.";
    let head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n\r\n";
    format!("{head}{body}").into_bytes()
}

fn parse_head(head: &[u8]) -> Option<Head> {
    let text = std::str::from_utf8(head).ok()?;
    let mut lines = text.trim_end_matches("\r\n").split("\r\n");
    let mut start = lines.next()?.split(' ');
    let (method, target, version) = (start.next()?, start.next()?, start.next()?);
    if start.next().is_some() || !matches!(version, "HTTP/1.1" | "HTTP/1.0") || method.is_empty() {
        return None;
    }
    let mut headers = Vec::new();
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.is_empty() || name.contains([' ', '\t']) {
            return None;
        }
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let find = |wanted: &str| {
        headers
            .iter()
            .find(|(name, _)| name == wanted)
            .map(|(_, value)| value.as_str())
    };
    let says = |wanted: &str, token: &str| {
        find(wanted).is_some_and(|value| value.to_ascii_lowercase().contains(token))
    };
    let length = if says("transfer-encoding", "chunked") {
        Length::Chunked
    } else {
        Length::Fixed(find("content-length").map_or(Ok(0), str::parse).ok()?)
    };
    let expects_continue = says("expect", "100-continue");
    let keep_alive = version == "HTTP/1.1" && !says("connection", "close");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        body: Vec::new(),
        keep_alive,
    };
    Some(Head {
        request,
        length,
        expects_continue,
    })
}
