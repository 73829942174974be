//! Whether the engine of the decode leg got the blocks, as far as its stream tells.
//!
//! Engines say status 200 before they have them. If vLLM cannot get them, a stream is an opening chunk and `[DONE]`, as if the
//! model had had nothing to say; SGLang says an error. So events are kept back until one has something of a token. By then all is well, and the rest
//! goes by unseen.

use crate::{
    body::{BodyError, ResponseBody},
    sse::{self, EVENT_BYTES_MAX, Event},
};
use bytes::{Bytes, BytesMut};
use http::{Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use serde_json::Value;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

/// Events of vLLM are kept back for so long; then they go on, whatever they say.
pub(super) const PULL_SECONDS_MAX: u64 = 10;

/// What an event says of the stream.
#[derive(Debug, PartialEq, Eq)]
enum Sign {
    /// Nothing yet.
    Nothing,
    /// There is something of a token, or it is not for us to say.
    Begun,
    /// There will be nothing.
    Over,
}

/// The response, once its stream has begun or `limit` is over; or why it will not begin.
pub(super) async fn begun(
    response: Response<ResponseBody>,
    limit: Duration,
) -> Result<Response<ResponseBody>, &'static str> {
    let headers = response.headers();
    if !sse::is_event_stream(headers) || headers.contains_key(header::CONTENT_ENCODING) {
        return Ok(response);
    }
    let (parts, mut inner) = response.into_parts();
    let mut seen = BytesMut::new();
    if let Ok(found) = tokio::time::timeout(limit, look(&mut inner, &mut seen)).await {
        found?;
    }
    let body = Seen {
        seen: seen.freeze(),
        inner,
    };
    Ok(Response::from_parts(parts, body.boxed_unsync()))
}

/// Reads until something of a token is seen.
async fn look(body: &mut ResponseBody, seen: &mut BytesMut) -> Result<(), &'static str> {
    let mut from = 0;
    loop {
        while let Some(length) = sse::event_length(&seen[from..]) {
            let raw = &seen[from..from + length];
            match sign(&Event { raw }) {
                Sign::Nothing => from += length,
                Sign::Begun => return Ok(()),
                Sign::Over => return Err("empty"),
            }
        }
        if seen.len() > EVENT_BYTES_MAX {
            return Ok(());
        }
        let frame = body.frame().await.ok_or("empty")?;
        let frame = frame.map_err(|_| "failed")?;
        // Trailers are the end.
        let data = frame.into_data().map_err(|_| "empty")?;
        seen.extend_from_slice(&data);
    }
}

fn sign(event: &Event<'_>) -> Sign {
    if event.is_done() || event.is_error() && !event.blames_request() {
        return Sign::Over;
    }
    if event.data().is_empty() {
        return Sign::Nothing;
    }
    let chunk: Value = serde_json::from_slice(event.data()).unwrap_or_default();
    match chunk.get("choices").and_then(Value::as_array) {
        Some(choices) if !choices.iter().any(says) => Sign::Nothing,
        _ => Sign::Begun,
    }
}

/// Whether a choice, or its delta, has anything but what stands there before the first token.
fn says(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => fields.iter().any(|(key, value)| match &**key {
            "index" | "role" | "prompt_token_ids" | "prompt_logprobs" => false,
            _ => says(value),
        }),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// A body whose beginning was read.
struct Seen {
    seen: Bytes,
    inner: ResponseBody,
}

impl Body for Seen {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.seen.is_empty() {
            let seen = std::mem::take(&mut self.seen);
            return Poll::Ready(Some(Ok(Frame::data(seen))));
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.seen.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.inner.size_hint();
        let more = self.seen.len() as u64;
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + more);
        }
        hint.set_lower(hint.lower() + more);
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;

    const OPENING: &str = "data: {\"prompt_token_ids\":[1],\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn choice(fields: &str) -> String {
        format!("data: {{\"choices\":[{{\"index\":0,{fields}}}]}}\n\n")
    }

    async fn passed(pieces: &[&str]) -> Result<String, &'static str> {
        let frames: Vec<Result<_, BodyError>> = pieces
            .iter()
            .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece.as_bytes()))))
            .collect();
        let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let response = Response::builder().header("content-type", "text/event-stream");
        let response = begun(response.body(body).unwrap(), Duration::from_secs(1)).await?;
        let all = response.into_body().collect().await.unwrap().to_bytes();
        Ok(String::from_utf8(all.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn streams_that_say_nothing_are_failures() {
        let error = "data: {\"error\":{\"message\":\"m\",\"code\":500}}\n\n";
        for pieces in [
            &[OPENING, DONE][..],
            &[OPENING, USAGE, DONE],
            &[OPENING, error, DONE],
            &[": ping\n\n", OPENING],
            &[DONE],
            &[],
        ] {
            assert_eq!(passed(pieces).await, Err("empty"), "{pieces:?}");
        }
    }

    #[tokio::test]
    async fn streams_with_tokens_go_on_as_they_came() {
        for fields in [
            "\"delta\":{\"content\":\"a\"}",
            "\"delta\":{\"reasoning\":\"a\"}",
            "\"delta\":{\"tool_calls\":[{\"index\":0}]}",
            "\"delta\":{},\"finish_reason\":\"stop\"",
            "\"text\":\"a\"",
            "\"text\":\"\",\"token_ids\":[1]",
        ] {
            let all = [OPENING, &choice(fields), DONE].concat();
            for cut in 0..all.len() {
                let (first, second) = all.split_at(cut);
                assert_eq!(passed(&[first, second]).await.unwrap(), all);
            }
        }
        let strange = "data: {\"error\":{\"message\":\"m\",\"code\":400}}\n\n";
        assert_eq!(
            passed(&[OPENING, strange]).await.unwrap(),
            [OPENING, strange].concat()
        );
    }
}
