//! A small HTTP/1.1 client for an engine's own endpoints: GET, and POST of nothing, with a time limit and a size limit.
//!
//! One kept connection per client. No redirects, no TLS (the engine is beside us), no retries but one on a kept
//! connection that turns out to be closed.

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, HeaderValue};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
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
        self.ask(Method::GET, path).await
    }

    /// POSTs nothing to `path`: status and body, whatever the status.
    ///
    /// # Errors
    /// If there is no complete answer within the limits.
    pub async fn post(&self, path: &str) -> Result<(StatusCode, Bytes), HttpError> {
        self.ask(Method::POST, path).await
    }

    async fn ask(&self, method: Method, path: &str) -> Result<(StatusCode, Bytes), HttpError> {
        timeout(self.timeout, self.ask_unlimited(method, path))
            .await
            .map_err(|_| HttpError::Timeout(self.timeout))?
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
            && let Ok(answer) = self.exchange(sender, &method, path).await
        {
            return Ok(answer);
        }
        let stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|error| connect_error(&error))?;
        stream
            .set_nodelay(true)
            .map_err(|error| HttpError::Transport(error.to_string()))?;
        let (sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| transport(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to an engine ended");
            }
        });
        self.exchange(sender, &method, path).await
    }

    async fn exchange(
        &self,
        mut sender: SendRequest<Empty<Bytes>>,
        method: &Method,
        path: &str,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.authority)
            .body(Empty::new())
            .map_err(|error| HttpError::Transport(error.to_string()))?;
        if let Some(value) = self.key.as_ref().and_then(ApiKey::bearer) {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| transport(&error))?;
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
}
