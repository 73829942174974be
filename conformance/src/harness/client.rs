//! Clients of a case: one HTTP connection of a chosen version, and bytes on a bare socket.

use super::{PATIENCE, upstream::SMALL_BUFFER_BYTES};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use std::{convert::Infallible, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
    time::timeout,
};

/// A request body of any kind.
pub type AnyBody = UnsyncBoxBody<Bytes, Infallible>;

/// HTTP/1.1, or HTTP/2 by prior knowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 1.1.
    H1,
    /// 2.
    H2,
}

impl Version {
    /// Both, for cases that hold for both.
    pub const BOTH: [Self; 2] = [Self::H1, Self::H2];
}

enum Sender {
    H1(http1::SendRequest<AnyBody>),
    H2(http2::SendRequest<AnyBody>),
}

/// One connection.
pub struct Client {
    sender: Sender,
    address: SocketAddr,
    driver: JoinHandle<()>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// What came after it.
    pub trailers: Option<HeaderMap>,
    /// The body ended with an error after these bytes.
    pub broken: bool,
}

impl Reply {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    /// A header as text; empty if there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

/// A request with a JSON body.
#[must_use]
pub fn request(method: Method, path: &str, body: impl Into<Bytes>) -> Request<AnyBody> {
    let body = Full::new(body.into()).boxed_unsync();
    let mut request = Request::new(body);
    let json = "application/json"
        .parse()
        .expect("invariant: a header value");
    request
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, json);
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().expect("invariant: paths of a test are paths");
    request
}

impl Client {
    /// Opens a connection.
    ///
    /// # Panics
    /// If that fails.
    pub async fn connect(address: SocketAddr, version: Version) -> Self {
        let socket = TcpStream::connect(address)
            .await
            .expect("invariant: the proxy accepts");
        Self::over(
            socket,
            address,
            version,
            &http2::Builder::new(TokioExecutor::new()),
        )
        .await
    }

    /// As [`Self::connect`], but its kernel and its HTTP/2 windows take little of what it does not read.
    ///
    /// # Panics
    /// If that fails.
    pub async fn connect_small(address: SocketAddr, version: Version) -> Self {
        let socket = TcpSocket::new_v4().expect("invariant: a socket");
        socket
            .set_recv_buffer_size(SMALL_BUFFER_BYTES as u32)
            .expect("invariant: a socket option");
        let socket = socket
            .connect(address)
            .await
            .expect("invariant: the proxy accepts");
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(SMALL_BUFFER_BYTES as u32)
            .initial_connection_window_size(SMALL_BUFFER_BYTES as u32);
        Self::over(socket, address, version, &builder).await
    }

    async fn over(
        socket: TcpStream,
        address: SocketAddr,
        version: Version,
        builder: &http2::Builder<TokioExecutor>,
    ) -> Self {
        socket
            .set_nodelay(true)
            .expect("invariant: a socket option");
        let io = TokioIo::new(socket);
        let (sender, driver) = match version {
            Version::H1 => {
                let (sender, driver) = http1::handshake(io).await.expect("invariant: a handshake");
                (
                    Sender::H1(sender),
                    tokio::spawn(async move { drop(driver.await) }),
                )
            }
            Version::H2 => {
                let (sender, driver) = builder.handshake(io).await.expect("invariant: a handshake");
                (
                    Sender::H2(sender),
                    tokio::spawn(async move { drop(driver.await) }),
                )
            }
        };
        Self {
            sender,
            address,
            driver,
        }
    }

    /// Sends a request; `None` if the connection ended without an answer.
    pub async fn try_send(&mut self, mut request: Request<AnyBody>) -> Option<Response<Incoming>> {
        let answer = match &mut self.sender {
            Sender::H1(sender) => {
                let host = self
                    .address
                    .to_string()
                    .parse()
                    .expect("invariant: a header value");
                request
                    .headers_mut()
                    .entry(http::header::HOST)
                    .or_insert(host);
                sender.ready().await.ok()?;
                timeout(PATIENCE, sender.send_request(request)).await
            }
            Sender::H2(sender) => {
                let path = request
                    .uri()
                    .path_and_query()
                    .map_or("/", |path| path.as_str());
                let uri = format!("http://{}{path}", self.address);
                *request.uri_mut() = uri.parse().expect("invariant: paths of a test are paths");
                sender.ready().await.ok()?;
                timeout(PATIENCE, sender.send_request(request)).await
            }
        };
        answer.expect("invariant: an answer in time").ok()
    }

    /// Sends a request and gives its answer as soon as it begins.
    ///
    /// # Panics
    /// If none comes.
    pub async fn begin(&mut self, request: Request<AnyBody>) -> Streaming {
        let response = self.try_send(request).await.expect("invariant: an answer");
        let (parts, body) = response.into_parts();
        Streaming {
            status: parts.status,
            headers: parts.headers,
            body,
            trailers: None,
            broken: false,
        }
    }

    /// Sends a request and reads its whole answer.
    pub async fn send(&mut self, request: Request<AnyBody>) -> Reply {
        self.begin(request).await.whole().await
    }

    /// Posts JSON.
    pub async fn post(&mut self, path: &str, body: impl Into<Bytes>) -> Reply {
        self.send(request(Method::POST, path, body)).await
    }

    /// A GET on a connection of its own.
    pub async fn get(address: SocketAddr, path: &str) -> Reply {
        let mut client = Self::connect(address, Version::H1).await;
        let mut get = request(Method::GET, path, Bytes::new());
        get.headers_mut().remove(http::header::CONTENT_TYPE);
        client.send(get).await
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.driver.is_finished()
    }

    /// Closes the connection at once.
    pub fn abandon(self) {
        self.driver.abort();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// An answer that is still coming.
pub struct Streaming {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    body: Incoming,
    trailers: Option<HeaderMap>,
    broken: bool,
}

impl Streaming {
    /// The next bytes; `None` at the end, however it came about.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            match timeout(PATIENCE, self.body.frame())
                .await
                .expect("invariant: the next bytes in time")?
            {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(data),
                    Err(frame) => self.trailers = frame.into_trailers().ok(),
                },
                Err(_) => {
                    self.broken = true;
                    return None;
                }
            }
        }
    }

    /// Reads until `text` was seen.
    ///
    /// # Panics
    /// If the answer ends before.
    pub async fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            let more = self
                .next()
                .await
                .unwrap_or_else(|| panic!("ended without {text:?} after {seen:?}"));
            seen.push_str(&String::from_utf8_lossy(&more));
        }
        seen
    }

    /// Reads the rest.
    pub async fn whole(mut self) -> Reply {
        let mut body = Vec::new();
        while let Some(data) = self.next().await {
            body.extend_from_slice(&data);
        }
        let Self {
            status,
            headers,
            trailers,
            broken,
            ..
        } = self;
        Reply {
            status,
            headers,
            body: body.into(),
            trailers,
            broken,
        }
    }
}

/// Sends bytes and gives everything that comes back until the other side closes.
pub async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    raw_within(address, bytes, PATIENCE).await
}

/// As [`raw`], but for `limit` at most.
pub async fn raw_within(address: SocketAddr, bytes: &[u8], limit: Duration) -> String {
    let mut socket = TcpStream::connect(address)
        .await
        .expect("invariant: the proxy accepts");
    // A server that refuses may close before it has read everything.
    let _ = socket.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(limit, socket.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}
