//! What would an engine answer, at next to no cost? A fake OpenAI server on bare tokio and httparse, one thread.
//!
//! Looks like a vLLM without KV events to whoever probes it; generates nothing and checks nothing.
//! The request body steers it: `"max_tokens":N` content events, `"stream":true`, `delay_us=D` (anywhere) pauses
//! before each event. One chunk and one write per event, which holds its number, so that the load generator can
//! verify the order, and when it was written (CLOCK_MONOTONIC, ns). Who asks for `return_token_ids` gets ids as from
//! vLLM: those of the prompt with the first event, one with each other.  usage: `upstream PORT…`

use memchr::memmem;
use std::error::Error;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;

const ACCEPT_BACKLOG: u32 = 16384;
const HEADERS_MAX: usize = 96;
const READ_BYTES: usize = 16384;
const EVENTS_DEFAULT: u64 = 16;
const INDEX_DIGITS: usize = 6;
const TIME_DIGITS: usize = 16;

const REPLY: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1763800000,"model":"bench-model","choices":[{"index":0,"message":{"role":"assistant","content":"The quick brown fox jumps over the lazy dog, and the reply goes on for a few dozen tokens so that it looks like a small answer.","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":32,"total_tokens":64,"completion_tokens":32,"prompt_tokens_details":null}}"#;
const ROLE: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1763800000,"model":"bench-model","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}"#;
const CONTENT: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1763800000,"model":"bench-model","choices":[{"index":0,"delta":{"content":" token number NNNNNN written at TTTTTTTTTTTTTTTT"},"logprobs":null,"finish_reason":null,"token_ids":null}]}"#;
const LAST: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1763800000,"model":"bench-model","choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}"#;
/// Stands for the ids that were not asked for.
const NO_ID: &str = "\"token_ids\":null";
/// In its place: five digits, as most ids have.
const ONE_ID: &str = "\"token_ids\":[12345]";
const NO_PROMPT_IDS: &str = "\"prompt_token_ids\":null";
const MODELS: &str = r#"{"object":"list","data":[{"id":"bench-model","object":"model","created":1763800000,"owned_by":"vllm","root":"bench-model","parent":null,"max_model_len":131072}]}"#;
const METRICS: &str = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine=\"0\",model_name=\"bench-model\"} 0.0\n\
# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{engine=\"0\",model_name=\"bench-model\"} 0.0\n\
# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{engine=\"0\",model_name=\"bench-model\"} 0.0\n";

/// One SSE event as one HTTP chunk.
fn chunk(payload: &str) -> Vec<u8> {
    let event = format!("data: {payload}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len()).into_bytes()
}

/// The content event, and where its number and its time stand.
struct Content {
    bytes: Vec<u8>,
    number_at: usize,
    time_at: usize,
}

impl Content {
    fn new(ids: bool) -> Self {
        let bytes = match ids {
            true => chunk(&CONTENT.replace(NO_ID, ONE_ID)),
            false => chunk(CONTENT),
        };
        let place = |digits: &[u8]| memmem::find(&bytes, digits).unwrap_or_default();
        let (number_at, time_at) = (place(b"NNNNNN"), place(b"TTTTTTTTTTTTTTTT"));
        Self {
            bytes,
            number_at,
            time_at,
        }
    }

    fn numbered(&mut self, number: u64) -> &[u8] {
        write_digits(&mut self.bytes[self.number_at..][..INDEX_DIGITS], number);
        write_digits(
            &mut self.bytes[self.time_at..][..TIME_DIGITS],
            monotonic_ns(),
        );
        &self.bytes
    }
}

fn write_digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The number that follows `key` in a body.
fn number_after(body: &[u8], key: &[u8]) -> Option<u64> {
    let start = memmem::find(body, key)? + key.len();
    let digits = body[start..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    std::str::from_utf8(&body[start..start + digits])
        .ok()?
        .parse()
        .ok()
}

struct Request {
    is_post: bool,
    path: String,
    body: Vec<u8>,
    close: bool,
}

/// Reads one request off the connection; `None` at its end.
async fn read_request(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let (head_bytes, mut request, length, chunked) = loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(bytes) =
            head.parse(buffer).map_err(|_| invalid("request head"))?
        {
            let value = |name: &str| {
                head.headers
                    .iter()
                    .find(|h| h.name.eq_ignore_ascii_case(name))
                    .map(|h| h.value)
            };
            let length =
                value("content-length").and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
            let request = Request {
                is_post: head.method == Some("POST"),
                path: head.path.unwrap_or("/").to_owned(),
                body: Vec::new(),
                close: value("connection").is_some_and(|v| v.eq_ignore_ascii_case(b"close")),
            };
            break (
                bytes,
                request,
                length.unwrap_or(0),
                value("transfer-encoding").is_some(),
            );
        }
        if socket.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    buffer.drain(..head_bytes);
    if chunked {
        request.body = read_chunks(socket, buffer).await?;
    } else {
        fill(socket, buffer, length).await?;
        request.body = buffer.drain(..length).collect();
    }
    Ok(Some(request))
}

/// Reads until the buffer holds `bytes`.
async fn fill(socket: &mut TcpStream, buffer: &mut Vec<u8>, bytes: usize) -> io::Result<()> {
    while buffer.len() < bytes {
        if socket.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

async fn read_chunks(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = loop {
            if let Some(end) = memmem::find(buffer, b"\r\n") {
                break end;
            }
            let more = buffer.len() + 1;
            fill(socket, buffer, more).await?;
        };
        let size = std::str::from_utf8(&buffer[..line])
            .ok()
            .and_then(|text| usize::from_str_radix(text, 16).ok());
        let size = size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "chunk size"))?;
        fill(socket, buffer, line + 2 + size + 2).await?;
        body.extend_from_slice(&buffer[line + 2..line + 2 + size]);
        buffer.drain(..line + 2 + size + 2);
        if size == 0 {
            return Ok(body);
        }
    }
}

async fn reply(socket: &mut TcpStream, status: &str, kind: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    );
    socket
        .write_all(&[head.as_bytes(), body.as_bytes()].concat())
        .await
}

/// What a proxy asks to find out whom it has before it.
async fn answer_probe(socket: &mut TcpStream, path: &str) -> io::Result<()> {
    let json = "application/json";
    match path {
        "/v1/models" => reply(socket, "200 OK", json, MODELS).await,
        "/version" => reply(socket, "200 OK", json, r#"{"version":"0.32.0"}"#).await,
        "/metrics" => reply(socket, "200 OK", "text/plain; version=0.0.4", METRICS).await,
        "/load" => reply(socket, "200 OK", json, r#"{"server_load":0}"#).await,
        "/health" | "/ping" => reply(socket, "200 OK", json, "").await,
        _ => reply(socket, "404 Not Found", json, r#"{"detail":"Not Found"}"#).await,
    }
}

/// The token ids of a prompt: one for every four bytes, of a kind that depends on nothing else.
fn ids_of(body: &[u8]) -> String {
    let ids: Vec<String> = body
        .chunks(4)
        .map(|bytes| (bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>() * 31).to_string())
        .collect();
    ids.join(",")
}

/// As vLLM tells them of a prompt that is not generated from.
fn rendered(body: &[u8]) -> String {
    let ids = ids_of(body);
    format!(
        r#"{{"request_id":"chatcmpl-0123456789abcdef","token_ids":[{ids}],"model":"bench-model"}}"#
    )
}

/// The first event of a stream.
fn opening(body: &[u8], ids: bool) -> Vec<u8> {
    match ids {
        true => {
            let told = format!("\"prompt_token_ids\":[{}]", ids_of(body));
            chunk(&ROLE.replace(NO_PROMPT_IDS, &told))
        }
        false => chunk(ROLE),
    }
}

async fn answer_stream(socket: &mut TcpStream, body: &[u8]) -> io::Result<()> {
    let ids = memmem::find(body, b"\"return_token_ids\":true").is_some();
    let mut content = Content::new(ids);
    let delay = Duration::from_micros(number_after(body, b"delay_us=").unwrap_or(0));
    let events = number_after(body, b"\"max_tokens\":").unwrap_or(EVENTS_DEFAULT);
    socket
        .write_all(b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
        .await?;
    socket.write_all(&opening(body, ids)).await?;
    let mut next = Instant::now();
    for number in 0..events {
        if delay.is_zero() {
            tokio::task::yield_now().await;
        } else {
            next += delay;
            tokio::time::sleep_until(next).await;
        }
        socket.write_all(content.numbered(number)).await?;
    }
    let mut end = chunk(LAST);
    end.extend(chunk("[DONE]"));
    end.extend(b"0\r\n\r\n");
    socket.write_all(&end).await
}

async fn serve(mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(READ_BYTES);
    while let Some(request) = read_request(&mut socket, &mut buffer).await? {
        if !request.is_post {
            answer_probe(
                &mut socket,
                request.path.split('?').next().unwrap_or_default(),
            )
            .await?;
        } else if !request.path.starts_with("/v1/") {
            reply(
                &mut socket,
                "404 Not Found",
                "application/json",
                r#"{"detail":"Not Found"}"#,
            )
            .await?;
        } else if request.path.ends_with("/render") {
            reply(
                &mut socket,
                "200 OK",
                "application/json",
                &rendered(&request.body),
            )
            .await?;
        } else if memmem::find(&request.body, b"\"stream\":true").is_some() {
            answer_stream(&mut socket, &request.body).await?;
        } else {
            reply(&mut socket, "200 OK", "application/json", REPLY).await?;
        }
        if request.close {
            break;
        }
    }
    Ok(())
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], port).into())?;
    socket.listen(ACCEPT_BACKLOG)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut listeners = tokio::task::JoinSet::new();
    for port in std::env::args().skip(1) {
        let listener = listen(port.parse()?)?;
        listeners.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                // A peer that leaves in mid-exchange is the load generator's to count.
                tokio::spawn(async move { serve(socket).await.ok() });
            }
        });
    }
    while listeners.join_next().await.is_some() {}
    Ok(())
}
