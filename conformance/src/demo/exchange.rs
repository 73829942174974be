//! One HTTP request of the demo's clients, and what its answer says. Every exchange has a time limit; nothing here
//! judges an answer.

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::{
    net::SocketAddr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// Says which engine answered; its value ends with the engine's address.
const ENDPOINT: &str = "x-outrigger-endpoint";
/// Says why, to those who ask for debugging.
const DECISION: &str = "x-outrigger-decision";

/// What others may see of a request while it is under way.
#[derive(Default)]
pub(super) struct Flight {
    /// The engine that answers, once headers came.
    pub(super) engine: OnceLock<String>,
    /// Bytes of the body have come.
    pub(super) delivered: AtomicBool,
}

/// An answer, as far as it came.
pub(super) struct Reply {
    /// 0 if none came.
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// Why it did not come to its end.
    pub(super) fault: Option<String>,
    /// It did not come to its end within the limit.
    pub(super) hung: bool,
    /// When the first byte of the body came, after the request was begun.
    pub(super) first: Option<Duration>,
}

impl Reply {
    /// A header as text; empty if there is none.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The engine that answered; empty if nobody says.
    pub(super) fn engine(&self) -> &str {
        self.header(ENDPOINT)
    }

    /// The body as text.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The proxy's prediction for the engine that served: cached prompt tokens, and whether the prompt was known
    /// exactly.
    pub(super) fn predicted(&self) -> Option<(u64, bool)> {
        let decision: Value = serde_json::from_str(self.header(DECISION)).ok()?;
        let entry = [&decision["winner"], &decision["runner_up"]]
            .into_iter()
            .find(|entry| entry["endpoint"].as_str() == Some(self.engine()))?;
        Some((entry["hit_tokens"].as_u64()?, decision["exact"].as_bool()?))
    }
}

/// GETs a path.
pub(super) async fn get(address: SocketAddr, path: &str, limit: Duration) -> Reply {
    exchange(
        address,
        Method::GET,
        path,
        Bytes::new(),
        &Flight::default(),
        limit,
    )
    .await
}

/// POSTs JSON, asking for debugging.
pub(super) async fn post(
    address: SocketAddr,
    path: &str,
    body: &Value,
    flight: &Flight,
    limit: Duration,
) -> Reply {
    exchange(
        address,
        Method::POST,
        path,
        body.to_string().into(),
        flight,
        limit,
    )
    .await
}

async fn exchange(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: Bytes,
    flight: &Flight,
    limit: Duration,
) -> Reply {
    let mut reply = Reply {
        status: 0,
        headers: HeaderMap::new(),
        body: Vec::new(),
        fault: None,
        hung: false,
        first: None,
    };
    match tokio::time::timeout(
        limit,
        try_exchange(address, method, path, body, flight, &mut reply),
    )
    .await
    {
        Ok(Ok(())) => {}
        Ok(Err(error)) => reply.fault = Some(format!("{error:#}")),
        Err(_) => {
            reply.fault = Some(format!("no end within {limit:?}"));
            reply.hung = true;
        }
    }
    reply
}

async fn try_exchange(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: Bytes,
    flight: &Flight,
    reply: &mut Reply,
) -> anyhow::Result<()> {
    let sent = Instant::now();
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    // Its error comes out of the request too.
    let connection = tokio::spawn(async move { drop(connection.await) });
    let _ends = AbortOnDrop(connection);
    let mut request = Request::builder()
        .method(&method)
        .uri(path)
        .header("host", address.to_string())
        .header("x-outrigger-debug", "1");
    if method == Method::POST {
        request = request.header("content-type", "application/json");
    }
    let response = sender.send_request(request.body(Full::new(body))?).await?;
    let (parts, mut body) = response.into_parts();
    reply.status = parts.status.as_u16();
    reply.headers = parts.headers;
    // Set once: a flight is one request.
    let _ = flight.engine.set(reply.engine().to_owned());
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            reply.first.get_or_insert_with(|| sent.elapsed());
            flight.delivered.store(true, Relaxed);
            reply.body.extend_from_slice(&data);
        }
    }
    Ok(())
}

/// Ends a connection with the request it was opened for.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a generation's answer holds, of chat and of completions, streamed or not.
#[derive(Default, Debug, Clone, PartialEq, Eq)]
pub(super) struct Generation {
    /// Token ids of the prompt.
    pub(super) prompt: Vec<u32>,
    /// Token ids that were generated.
    pub(super) generated: Vec<u32>,
    /// The text.
    pub(super) text: String,
    /// Prompt tokens that the engine took from its cache.
    pub(super) cached: Option<u64>,
    /// The answer came to its proper end.
    pub(super) ended: bool,
    /// It holds an error.
    pub(super) error: bool,
    /// Some event or part could not be read.
    pub(super) garbage: bool,
}

impl Generation {
    /// Reads an answer.
    pub(super) fn of(reply: &Reply) -> Self {
        let mut generation = Self::default();
        let text = reply.text();
        if reply
            .header("content-type")
            .starts_with("text/event-stream")
        {
            for event in text.split("\n\n").filter(|event| !event.is_empty()) {
                match event.strip_prefix("data: ") {
                    Some("[DONE]") => generation.ended = true,
                    Some(data) => generation.part(data),
                    // Comments are allowed.
                    None => generation.garbage |= !event.starts_with(':'),
                }
            }
        } else {
            generation.part(&text);
            generation.ended = reply.fault.is_none();
        }
        generation
    }

    /// Whether it is a whole answer.
    pub(super) fn is_whole(&self) -> bool {
        self.ended
            && !self.error
            && !self.garbage
            && !self.prompt.is_empty()
            && self.cached.is_some()
    }

    fn part(&mut self, data: &str) {
        let Ok(value) = serde_json::from_str::<Value>(data) else {
            self.garbage = true;
            return;
        };
        self.error |= value.get("error").is_some();
        let ids = |value: &Value| -> Vec<u32> {
            let all = value.as_array().into_iter().flatten();
            all.filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
                .collect()
        };
        let choice = &value["choices"][0];
        for told in [&value["prompt_token_ids"], &choice["prompt_token_ids"]] {
            if told.is_array() {
                self.prompt = ids(told);
            }
        }
        self.generated.extend(ids(&choice["token_ids"]));
        for text in [
            &choice["delta"]["content"],
            &choice["message"]["content"],
            &choice["text"],
        ] {
            self.text.push_str(text.as_str().unwrap_or_default());
        }
        if value["usage"].is_object() {
            // vLLM says null where nothing was cached.
            self.cached = Some(
                value["usage"]["prompt_tokens_details"]["cached_tokens"]
                    .as_u64()
                    .unwrap_or(0),
            );
        }
    }
}
