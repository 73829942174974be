//! The one figure that the engine of the decode leg cannot know: how much of the prompt was cached where it was computed.
//!
//! `"cached_tokens":N` is found in the bytes of streams and of whole bodies alike. It cannot stand in a text: there its
//! quotes would be escaped. Of a piece that ends within it so much is kept back, and no more.

use crate::body::{BodyError, ResponseBody};
use bytes::{Bytes, BytesMut};
use http::{Response, header};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use memchr::memmem;
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

const NAME: &[u8] = b"\"cached_tokens\":";
/// A longer number is none.
const DIGITS_MAX: usize = 20;

/// Tells `cached` where the engine told less.
pub(super) fn usage(response: Response<ResponseBody>, cached: u64) -> Response<ResponseBody> {
    if cached == 0 {
        return response;
    }
    let (mut parts, inner) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    let body = Repaired {
        inner,
        cached,
        kept: Bytes::new(),
        after: None,
        over: false,
    };
    Response::from_parts(parts, body.boxed_unsync())
}

struct Repaired {
    inner: ResponseBody,
    cached: u64,
    /// The end of the last piece, which may go on.
    kept: Bytes,
    /// Trailers, which come after `kept`.
    after: Option<Frame<Bytes>>,
    over: bool,
}

impl Repaired {
    /// What may go on of `data`, and what is kept back.
    fn repair(&mut self, data: Bytes) -> Bytes {
        let data = match self.kept.is_empty() {
            true => data,
            false => [&std::mem::take(&mut self.kept)[..], &data].concat().into(),
        };
        let mut out = BytesMut::new();
        let mut from = 0;
        while let Some(found) = memmem::find(&data[from..], NAME) {
            let start = from + found + NAME.len();
            let blanks = data[start..]
                .iter()
                .take_while(|byte| **byte == b' ')
                .count();
            let number = start + blanks;
            let digits = data[number..].iter().take(DIGITS_MAX + 1);
            let end = number + digits.take_while(|byte| byte.is_ascii_digit()).count();
            if end == data.len() && end - number <= DIGITS_MAX {
                out.extend_from_slice(&data[from..start - NAME.len()]);
                self.kept = data.slice(start - NAME.len()..);
                return out.freeze();
            }
            let told = std::str::from_utf8(&data[number..end]).ok();
            let told = told.and_then(|digits| digits.parse::<u64>().ok());
            match told.filter(|told| *told < self.cached) {
                Some(_) => {
                    out.extend_from_slice(&data[from..number]);
                    out.extend_from_slice(self.cached.to_string().as_bytes());
                }
                None => out.extend_from_slice(&data[from..end]),
            }
            from = end;
        }
        let rest = data.slice(from..);
        let keep = (1..NAME.len())
            .rev()
            .find(|length| rest.ends_with(&NAME[..*length]));
        let keep = rest.len() - keep.unwrap_or(0);
        self.kept = rest.slice(keep..);
        if out.is_empty() {
            return rest.slice(..keep);
        }
        out.extend_from_slice(&rest[..keep]);
        out.freeze()
    }
}

impl Body for Repaired {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if self.over {
                let kept = std::mem::take(&mut self.kept);
                if !kept.is_empty() {
                    return Poll::Ready(Some(Ok(Frame::data(kept))));
                }
                return Poll::Ready(self.after.take().map(Ok));
            }
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                None => self.over = true,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let data = self.repair(data);
                        if !data.is_empty() {
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                    }
                    Err(trailers) => {
                        self.after = Some(trailers);
                        self.over = true;
                    }
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.kept.is_empty() && self.after.is_none() && (self.over || self.inner.is_end_stream())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;

    async fn repaired(pieces: &[&str], cached: u64) -> String {
        let frames: Vec<Result<_, BodyError>> = pieces
            .iter()
            .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece.as_bytes()))))
            .collect();
        let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let body = usage(Response::new(body), cached).into_body();
        let all = body.collect().await.unwrap().to_bytes();
        String::from_utf8(all.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn the_figure_is_told_wherever_the_body_is_cut() {
        let text = r#"{"a":"\"cached_tokens\":0","usage":{"cached_tokens":0,"b":{"cached_tokens": 12}},"c":{"cached_tokens":99}}"#;
        let expected = r#"{"a":"\"cached_tokens\":0","usage":{"cached_tokens":64,"b":{"cached_tokens": 64}},"c":{"cached_tokens":99}}"#;
        for first in 0..text.len() {
            for second in [first, (first + 1).min(text.len()), text.len()] {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                assert_eq!(repaired(&pieces, 64).await, expected, "{first} {second}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_number_stays() {
        for text in [
            "\"cached_tokens\":null",
            "\"cached_tokens\":",
            "\"cached_tok",
            "\"cached_tokens\":123456789012345678901234567890",
        ] {
            assert_eq!(repaired(&[text], 64).await, text);
        }
        assert_eq!(
            repaired(&["\"cached_tokens\":3"], 0).await,
            "\"cached_tokens\":3"
        );
    }
}
