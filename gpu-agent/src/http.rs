//! A small HTTP/1.1 client for an engine's own endpoints: GET, and POST of nothing, with a time limit and a size limit.
//!
//! One kept connection per client. No redirects, no TLS (the engine is beside us), no retries but one on a kept
//! connection that was closed before an answer began: what an answer had told may be told once only.

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use std::fmt;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

/// A key that is sent and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Wraps a key; space around it (the end of a file's line) is not part of it.
    #[must_use]
    pub fn new(key: impl Into<String>) -> Self {
        let key: String = key.into();
        Self(key.trim().to_owned())
    }

    /// The value of an `Authorization` header; `None` if the key can't stand in one.
    #[must_use]
    pub fn bearer(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(redacted)")
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The connection was refused: nobody listens.
    #[error("connection refused")]
    Refused,
    /// Not in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The body is longer than allowed.
    #[error("answer longer than {0} bytes")]
    TooLong(usize),
    /// The URL is not `http://host:port`.
    #[error("not a http://host:port URL: {0}")]
    Url(String),
    /// Any other failure on the way.
    #[error("{0}")]
    Transport(String),
}

/// A client for one engine.
#[derive(Debug)]
pub struct HttpClient {
    /// `host:port`.
    authority: String,
    key: Option<ApiKey>,
    timeout: Duration,
    body_bytes_max: usize,
    kept: Mutex<Option<SendRequest<Empty<Bytes>>>>,
}

/// Host and port of `http://host[:port][/]`.
///
/// # Errors
/// If the URL is anything else.
pub fn authority(url: &str) -> Result<String, HttpError> {
    let wrong = || HttpError::Url(url.to_owned());
    let parsed: http::Uri = url.parse().map_err(|_| wrong())?;
    let host = parsed.host().ok_or_else(wrong)?;
    if parsed.scheme_str() != Some("http") || !matches!(parsed.path(), "" | "/") {
        return Err(wrong());
    }
    Ok(format!("{host}:{}", parsed.port_u16().unwrap_or(80)))
}

impl HttpClient {
    /// A client for `http://host:port`.
    ///
    /// # Errors
    /// If the URL is anything else.
    pub fn new(
        url: &str,
        key: Option<ApiKey>,
        timeout: Duration,
        body_bytes_max: usize,
    ) -> Result<Self, HttpError> {
        Ok(Self {
            authority: authority(url)?,
            key,
            timeout,
            body_bytes_max,
            kept: Mutex::new(None),
        })
    }

    /// `host:port`.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// GETs `path`: status and body, whatever the status.
    ///
    /// # Errors
    /// If there is no complete answer within the limits.
    pub async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), HttpError> {
        self.ask(Method::GET, path, self.timeout).await
    }

    /// GETs `path` with a time limit of its own.
    ///
    /// # Errors
    /// If there is no complete answer within the limits.
    pub async fn get_within(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        self.ask(Method::GET, path, limit).await
    }

    /// POSTs nothing to `path`: status and body, whatever the status.
    ///
    /// # Errors
    /// If there is no complete answer within the limits.
    pub async fn post(&self, path: &str) -> Result<(StatusCode, Bytes), HttpError> {
        self.ask(Method::POST, path, self.timeout).await
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        timeout(limit, self.ask_unlimited(method, path))
            .await
            .map_err(|_| HttpError::Timeout(limit))?
    }

    /// Whether the engine accepts connections, without a request.
    ///
    /// # Errors
    /// If it does not.
    pub async fn probe(&self) -> Result<(), HttpError> {
        timeout(self.timeout, TcpStream::connect(&self.authority))
            .await
            .map_err(|_| HttpError::Timeout(self.timeout))?
            .map(drop)
            .map_err(|error| connect_error(&error))
    }

    async fn ask_unlimited(
        &self,
        method: Method,
        path: &str,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        // Cancelled while it holds the connection: the connection is gone with it, and the next call opens another.
        let kept = self.kept.lock().await.take();
        if let Some(mut sender) = kept
            && sender.ready().await.is_ok()
        {
            match sender.send_request(self.request(&method, path)?).await {
                Ok(response) => return self.read(sender, response).await,
                Err(error) if error.is_parse() => return Err(transport(&error)),
                // It was closed meanwhile.
                Err(_) => {}
            }
        }
        let stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|error| connect_error(&error))?;
        stream
            .set_nodelay(true)
            .map_err(|error| HttpError::Transport(error.to_string()))?;
        let (mut sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| transport(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to an engine ended");
            }
        });
        match sender.send_request(self.request(&method, path)?).await {
            Ok(response) => self.read(sender, response).await,
            Err(error) => Err(transport(&error)),
        }
    }

    fn request(&self, method: &Method, path: &str) -> Result<Request<Empty<Bytes>>, HttpError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.authority)
            .body(Empty::new())
            .map_err(|error| HttpError::Transport(error.to_string()))?;
        if let Some(value) = self.key.as_ref().and_then(ApiKey::bearer) {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(request)
    }

    async fn read(
        &self,
        sender: SendRequest<Empty<Bytes>>,
        response: Response<Incoming>,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), self.body_bytes_max)
            .collect()
            .await
            .map_err(|error| match error.downcast::<hyper::Error>() {
                Ok(error) => transport(&error),
                Err(_) => HttpError::TooLong(self.body_bytes_max),
            })?;
        *self.kept.lock().await = Some(sender);
        Ok((status, body.to_bytes()))
    }
}

fn connect_error(error: &std::io::Error) -> HttpError {
    if error.kind() == std::io::ErrorKind::ConnectionRefused {
        HttpError::Refused
    } else {
        HttpError::Transport(error.to_string())
    }
}

fn transport(error: &hyper::Error) -> HttpError {
    HttpError::Transport(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn urls() {
        assert_eq!(authority("http://h:81").unwrap(), "h:81");
        assert_eq!(authority("http://h/").unwrap(), "h:80");
        assert_eq!(authority("http://[::1]:9").unwrap(), "[::1]:9");
        for wrong in ["https://h", "h:80", "http://h/v1", ""] {
            assert!(authority(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_key_is_never_shown() {
        let key = ApiKey::new("secret\n");
        assert_eq!(format!("{key:?}"), "ApiKey(redacted)");
        let header = key.bearer().unwrap();
        assert_eq!(header.as_bytes(), b"Bearer secret");
        assert!(!format!("{header:?}").contains("secret"));
    }

    /// Answers each connection's requests with these texts, and closes it after the last.
    async fn serve(
        connections: Vec<Vec<&'static str>>,
    ) -> (HttpClient, tokio::task::JoinHandle<()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let client = HttpClient::new(&url, None, Duration::from_secs(10), 1000).unwrap();
        let served = tokio::spawn(async move {
            for answers in connections {
                let (mut stream, _) = listener.accept().await.unwrap();
                for answer in answers {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0);
                    }
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        (client, served)
    }

    const WHOLE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]";

    #[tokio::test]
    async fn a_kept_connection_that_was_closed_is_tried_once_more() {
        let (client, served) = serve(vec![vec![WHOLE, ""], vec![WHOLE]]).await;
        for _ in 0..2 {
            assert_eq!(client.post("/").await.unwrap().1, "[]");
        }
        served.await.unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_had_begun_is_not_asked_for_again() {
        let cut = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n[";
        let (client, served) = serve(vec![vec![WHOLE, cut], vec![WHOLE]]).await;
        client.post("/").await.unwrap();
        let error = client.post("/").await.unwrap_err();
        assert!(matches!(error, HttpError::Transport(_)), "{error}");
        assert!(!served.is_finished(), "nobody asked again");
        served.abort();
    }
}
