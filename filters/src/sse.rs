//! The one splitter of a stream: whole events go on, observers see them, a break is told to the client.
//!
//! Events are forwarded as the bytes that came; only the incomplete tail of a read is kept back (an event cut in two
//! by a dying engine must not reach the client). Bodies that are no SSE stream pass through chunk by chunk.

use crate::{
    body::{BodyError, ResponseBody, is_over},
    error::Flag,
    filter::{Edit, End, LogFields, StreamObserver},
};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};
use serde::Deserialize;
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

/// Longest incomplete event kept back; a longer one streams on in pieces, unobserved.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

/// One server-sent event.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// All its bytes with the blank line.
    pub raw: &'a [u8],
}

impl<'a> Event<'a> {
    /// The payload of its first `data:` line; empty for comments.
    #[must_use]
    pub fn data(&self) -> &'a [u8] {
        let mut rest = self.raw;
        loop {
            if let Some(data) = rest.strip_prefix(b"data:") {
                let end = memchr::memchr2(b'\n', b'\r', data).unwrap_or(data.len());
                return data[..end].trim_ascii_start();
            }
            match memchr::memchr(b'\n', rest) {
                Some(newline) => rest = &rest[newline + 1..],
                None => return &[],
            }
        }
    }

    /// The engine failed while the HTTP status already said 200: OpenAI's form of it, and Anthropic's.
    #[must_use]
    pub fn is_error(&self) -> bool {
        let data = self.data();
        data.starts_with(b"{\"error\"") || data.starts_with(b"{\"type\":\"error\"")
    }

    /// Whether an error blames the request: another engine would say the same. That an engine is busy does not.
    #[must_use]
    pub fn blames_request(&self) -> bool {
        let code = self.error_code().map(u64::from);
        code.is_some_and(|code| (400..500).contains(&code) && !is_of_the_moment(code))
    }

    /// The status that an error names.
    #[must_use]
    pub fn error_code(&self) -> Option<u16> {
        #[derive(Deserialize)]
        struct Body {
            error: Code,
        }
        #[derive(Deserialize)]
        struct Code {
            #[serde(default)]
            code: serde_json::Value,
        }
        serde_json::from_slice::<Body>(self.data())
            .ok()
            .and_then(|body| body.error.code.as_u64())
            .and_then(|code| u16::try_from(code).ok())
    }

    /// `data: [DONE]`.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.data().starts_with(b"[DONE]")
    }
}

/// Statuses of the 4xx that say "not now" or "not here" rather than that the request is wrong.
#[must_use]
pub fn is_of_the_moment(status: u64) -> bool {
    matches!(status, 408 | 425 | 429)
}

/// Whether these headers announce an SSE stream.
#[must_use]
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .get(..17)
            .is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
    })
}

/// Length of the first whole event in `bytes`, blank line included.
#[must_use]
pub fn event_length(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(found) = memchr::memchr(b'\n', &bytes[from..]) {
        let after = from + found + 1;
        match bytes.get(after) {
            Some(b'\n') => return Some(after + 1),
            Some(b'\r') if bytes.get(after + 1) == Some(&b'\n') => return Some(after + 2),
            Some(_) => from = after,
            None => return None,
        }
    }
    None
}

/// Where the whole events of `bytes` end: what follows is an incomplete tail.
fn whole_events_length(bytes: &[u8]) -> usize {
    if bytes.ends_with(b"\n\n") || bytes.ends_with(b"\n\r\n") {
        return bytes.len();
    }
    let lf = memchr::memmem::rfind(bytes, b"\n\n").map_or(0, |at| at + 2);
    let crlf = memchr::memmem::rfind(bytes, b"\n\r\n").map_or(0, |at| at + 3);
    lf.max(crlf)
}

/// How a broken stream is told to a client that already got its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// Abort, so that truncation shows.
    Abort,
    /// An OpenAI error event and `[DONE]`.
    OpenAi,
    /// An Anthropic error event.
    Anthropic,
}

/// A response body under observation.
pub struct Observed {
    inner: ResponseBody,
    events: bool,
    tail: BytesMut,
    /// Came with an unfinished event before them.
    trailers: Option<Frame<Bytes>>,
    observers: Vec<Box<dyn StreamObserver>>,
    farewell: Farewell,
    /// Set at the end; the connection manager's closing act.
    on_end: Option<Closing>,
    log: LogFields,
    bytes: u64,
    pace: Pace,
    ended: Option<End>,
    /// Told one poll after it was met, so that what came before it has left.
    broke: Option<BodyError>,
}

/// What is known when a body is over.
#[derive(Debug)]
pub struct Summary {
    /// How it ended.
    pub end: End,
    /// Bytes that went on to the client.
    pub bytes: u64,
    /// When the first of them came.
    pub first_byte: Option<Instant>,
    /// 99th percentile of the time between reads that brought something; streams only.
    pub gap_p99: Option<Duration>,
    /// For the access log.
    pub log: LogFields,
}

/// What is done when the body is over.
pub type Closing = Box<dyn FnOnce(Summary) + Send>;

/// When bytes came, as a histogram of the gaps between reads: four buckets per doubling from 1 µs, within 19 %.
#[derive(Debug, Default)]
struct Pace {
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: Option<Box<[u32; 128]>>,
}

impl Pace {
    fn tick(&mut self, at: Instant) {
        if self.first.is_none() {
            self.first = Some(at);
        }
        if let Some(last) = self.last.replace(at) {
            let gaps = self.gaps.get_or_insert_with(|| Box::new([0; 128]));
            gaps[Self::bucket(at.duration_since(last))] += 1;
        }
    }

    fn bucket(gap: Duration) -> usize {
        let us = (gap.as_micros() as u64).max(1);
        let doubling = us.ilog2() as usize;
        let quarter = if doubling >= 2 {
            (us >> (doubling - 2)) & 3
        } else {
            0
        } as usize;
        (doubling * 4 + quarter).min(127)
    }

    fn gap_p99(&self) -> Option<Duration> {
        let gaps = self.gaps.as_ref()?;
        let total: u64 = gaps.iter().map(|&count| u64::from(count)).sum();
        let mut left = total - total * 99 / 100;
        let bucket = (0..128).rev().find(|&bucket| {
            left = left.saturating_sub(u64::from(gaps[bucket]));
            left == 0
        })?;
        let (doubling, quarter) = (bucket / 4, (bucket % 4) as u64);
        Some(Duration::from_micros(
            (1 << doubling) + (quarter << doubling) / 4,
        ))
    }
}

impl Observed {
    /// Wraps `inner`; `headers` are the response's. `on_end` runs exactly once, also when the client goes away.
    #[must_use]
    pub fn new(
        inner: ResponseBody,
        headers: &HeaderMap,
        observers: Vec<Box<dyn StreamObserver>>,
        farewell: Farewell,
        log: LogFields,
        on_end: Closing,
    ) -> Self {
        let events = is_event_stream(headers);
        // Last words need a body of open length.
        let open = events && !headers.contains_key(header::CONTENT_LENGTH);
        let farewell = if open { farewell } else { Farewell::Abort };
        Self {
            inner,
            events,
            tail: BytesMut::new(),
            trailers: None,
            observers,
            farewell,
            on_end: Some(on_end),
            log,
            bytes: 0,
            pace: Pace::default(),
            ended: None,
            broke: None,
        }
    }

    fn close(&mut self, end: End) {
        let Some(on_end) = self.on_end.take() else {
            return;
        };
        for observer in &mut self.observers {
            observer.on_end(end, &mut self.log);
        }
        on_end(Summary {
            end,
            bytes: self.bytes,
            first_byte: self.pace.first,
            gap_p99: self.events.then(|| self.pace.gap_p99()).flatten(),
            log: std::mem::take(&mut self.log),
        });
    }

    /// The bytes that may go on now, observed; `None` if only part of an event has come.
    fn admit(&mut self, chunk: Bytes) -> Option<Bytes> {
        let at = Instant::now();
        self.pace.tick(at);
        if !self.events {
            for observer in &mut self.observers {
                observer.on_chunk(&chunk, at);
            }
            return Some(chunk);
        }
        let whole = if self.tail.is_empty() {
            self.split_off_tail(chunk)
        } else {
            self.join_tail(&chunk)
        }?;
        Some(self.show(whole, at))
    }

    fn split_off_tail(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        let whole = whole_events_length(&chunk);
        if whole < chunk.len() {
            if chunk.len() - whole > EVENT_BYTES_MAX {
                metrics::counter!("outrigger_sse_event_too_long_total").increment(1);
                return Some(chunk);
            }
            self.tail.extend_from_slice(&chunk.split_off(whole));
        }
        (!chunk.is_empty()).then_some(chunk)
    }

    fn join_tail(&mut self, chunk: &[u8]) -> Option<Bytes> {
        self.tail.extend_from_slice(chunk);
        let mut whole = whole_events_length(&self.tail);
        if whole == 0 && self.tail.len() > EVENT_BYTES_MAX {
            metrics::counter!("outrigger_sse_event_too_long_total").increment(1);
            whole = self.tail.len();
        }
        (whole > 0).then(|| self.tail.split_to(whole).freeze())
    }

    /// Shows every event to every observer. Without edits the bytes go on untouched.
    fn show(&mut self, whole: Bytes, at: Instant) -> Bytes {
        if self.observers.is_empty() {
            return whole;
        }
        let mut edited: Option<BytesMut> = None;
        let mut start = 0;
        while start < whole.len() {
            let length = event_length(&whole[start..]).unwrap_or(whole.len() - start);
            let raw = &whole[start..start + length];
            let edit = observe(&mut self.observers, raw, at);
            if edit != Edit::Keep && edited.is_none() {
                edited = Some(BytesMut::from(&whole[..start]));
            }
            if let Some(edited) = &mut edited {
                match edit {
                    Edit::Keep => edited.extend_from_slice(raw),
                    Edit::Drop => {}
                    Edit::Replace(bytes) => edited.extend_from_slice(&bytes),
                }
            }
            start += length;
        }
        edited.map_or(whole, BytesMut::freeze)
    }

    fn farewell(&mut self, error: &BodyError) -> Option<Bytes> {
        let text = crate::local_reply::farewell_event(self.farewell, error)?;
        self.tail.clear();
        self.bytes += text.len() as u64;
        Some(text)
    }
}

/// Envoy's `%RESPONSE_CODE_DETAILS%` of a response that broke.
fn details(flag: Flag) -> &'static str {
    match flag {
        Flag::StreamIdleTimeout => "stream_idle_timeout",
        Flag::UpstreamRequestTimeout => "response_timeout",
        Flag::DurationTimeout => "max_duration_timeout",
        Flag::UpstreamProtocolError => "upstream_reset_after_response_started{protocol_error}",
        Flag::UpstreamConnectionTermination => {
            "upstream_reset_after_response_started{connection_termination}"
        }
        _ => "upstream_reset_after_response_started{remote_reset}",
    }
}

/// The first observer that edits decides; the others still see the event as it came.
fn observe(observers: &mut [Box<dyn StreamObserver>], raw: &[u8], at: Instant) -> Edit {
    let event = Event { raw };
    let mut decided = Edit::Keep;
    for observer in observers {
        let edit = observer.on_event(&event, at);
        if decided == Edit::Keep {
            decided = edit;
        }
    }
    decided
}

impl Body for Observed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(error) = this.broke.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if this.ended.is_some() {
            return Poll::Ready(None);
        }
        if let Some(trailers) = this.trailers.take() {
            this.ended = Some(End::Complete);
            this.close(End::Complete);
            return Poll::Ready(Some(Ok(trailers)));
        }
        loop {
            match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(chunk) => {
                        if let Some(bytes) = this.admit(chunk) {
                            this.bytes += bytes.len() as u64;
                            return Poll::Ready(Some(Ok(Frame::data(bytes))));
                        }
                    }
                    // The last frame there is; nobody polls for more.
                    Err(trailers) if this.tail.is_empty() => {
                        this.ended = Some(End::Complete);
                        this.close(End::Complete);
                        return Poll::Ready(Some(Ok(trailers)));
                    }
                    Err(trailers) => {
                        let rest = this.tail.split().freeze();
                        this.bytes += rest.len() as u64;
                        this.trailers = Some(trailers);
                        return Poll::Ready(Some(Ok(Frame::data(rest))));
                    }
                },
                Some(Err(error)) => {
                    this.ended = Some(End::UpstreamBroke);
                    this.log.flags.push(error.flag);
                    this.log.details = details(error.flag).into();
                    let farewell = this.farewell(&error);
                    this.close(End::UpstreamBroke);
                    if let Some(bytes) = farewell {
                        return Poll::Ready(Some(Ok(Frame::data(bytes))));
                    }
                    this.broke = Some(error);
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                None => {
                    this.ended = Some(End::Complete);
                    let rest = std::mem::take(&mut this.tail).freeze();
                    this.bytes += rest.len() as u64;
                    this.close(End::Complete);
                    return Poll::Ready((!rest.is_empty()).then_some(Ok(Frame::data(rest))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // A body that is over before it began goes out as such: HTTP/2 then says so in the headers' frame.
        self.broke.is_none()
            && (self.ended.is_some()
                || self.tail.is_empty() && self.trailers.is_none() && self.inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        if self.events {
            SizeHint::default()
        } else {
            self.inner.size_hint()
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        // hyper drops a body of known length without polling for its end.
        let complete = is_over(&self.inner) && self.tail.is_empty() && self.trailers.is_none();
        self.close(if complete {
            End::Complete
        } else {
            End::ClientGone
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, StreamBody};
    use std::sync::{Arc, Mutex};

    struct Collect(Arc<Mutex<Vec<String>>>);

    impl StreamObserver for Collect {
        fn on_event(&mut self, event: &Event<'_>, _: Instant) -> Edit {
            let data = String::from_utf8(event.data().to_vec()).unwrap();
            let edit = match data.as_str() {
                "drop" => Edit::Drop,
                "replace" => Edit::Replace(Bytes::from_static(b"data: other\n\n")),
                _ => Edit::Keep,
            };
            self.0.lock().unwrap().push(data);
            edit
        }
    }

    async fn run(chunks: Vec<Result<&'static str, BodyError>>) -> (String, Vec<String>, End, bool) {
        let frames = chunks
            .into_iter()
            .map(|chunk| chunk.map(|text| Frame::data(Bytes::from_static(text.as_bytes()))));
        let inner = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let mut headers = HeaderMap::new();
        headers.insert(
            header::CONTENT_TYPE,
            "text/event-stream; charset=utf-8".parse().unwrap(),
        );
        let (seen, end) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None)));
        let observers: Vec<Box<dyn StreamObserver>> = vec![Box::new(Collect(seen.clone()))];
        let ended = end.clone();
        let on_end: Closing = Box::new(move |summary| *ended.lock().unwrap() = Some(summary.end));
        let body = Observed::new(
            inner,
            &headers,
            observers,
            Farewell::OpenAi,
            LogFields::default(),
            on_end,
        );
        let collected = body.collect().await;
        let failed = collected.is_err();
        let text = collected
            .map(|all| String::from_utf8(all.to_bytes().to_vec()).unwrap())
            .unwrap_or_default();
        let seen = seen.lock().unwrap().clone();
        let end = end.lock().unwrap().unwrap();
        (text, seen, end, failed)
    }

    #[tokio::test]
    async fn events_cut_by_reads_arrive_whole_and_in_order() {
        let (text, seen, end, _) = run(vec![
            Ok("data: a\n\nda"),
            Ok("ta: b\r\n\r"),
            Ok("\n: note\n\ndata: c\n"),
            Ok("\n"),
        ])
        .await;
        assert_eq!(text, "data: a\n\ndata: b\r\n\r\n: note\n\ndata: c\n\n");
        assert_eq!(seen, ["a", "b", "", "c"]);
        assert_eq!(end, End::Complete);
    }

    #[tokio::test]
    async fn edits_touch_only_their_event() {
        let (text, ..) = run(vec![Ok(
            "data: a\n\ndata: drop\n\ndata: replace\n\ndata: z\n\n",
        )])
        .await;
        assert_eq!(text, "data: a\n\ndata: other\n\ndata: z\n\n");
    }

    #[tokio::test]
    async fn a_break_in_mid_event_is_told_after_the_last_whole_one() {
        let error = BodyError::new(Flag::UpstreamConnectionTermination, "cut");
        let (text, seen, end, failed) = run(vec![Ok("data: a\n\ndata: {\"hal"), Err(error)]).await;
        assert!(text.starts_with("data: a\n\ndata: {\"error\""), "{text}");
        assert!(text.ends_with("data: [DONE]\n\n") && !text.contains("hal"));
        assert_eq!((seen.len(), end, failed), (1, End::UpstreamBroke, false));
    }

    #[test]
    fn percentiles_are_within_their_buckets() {
        let mut pace = Pace::default();
        let mut at = Instant::now();
        for step in 0..1000 {
            at += Duration::from_millis(if step % 20 == 0 { 100 } else { 10 });
            pace.tick(at);
        }
        let p99 = pace.gap_p99().unwrap();
        assert!(
            p99 >= Duration::from_millis(80) && p99 <= Duration::from_millis(100),
            "{p99:?}"
        );
        assert_eq!(Pace::bucket(Duration::from_micros(1)), 0);
        assert!(Pace::bucket(Duration::from_secs(3600)) < 128);
    }
}
