//! The messages of `grpc.health.v1.Health/Check`, and what an answer means. No IO.

use super::Found;
use crate::upstream::own;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header, response::Parts};

pub(super) const PATH: &str = "/grpc.health.v1.Health/Check";
pub(super) const CONTENT_TYPE: &str = "application/grpc";

/// `ServingStatus.SERVING`.
const SERVING: u64 = 1;

/// A `HealthCheckRequest` in its frame: field 1 is the service's name.
pub(super) fn question(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(1 << 3 | 2);
        put_varint(&mut message, service.len() as u64);
        message.put_slice(service.as_bytes());
    }
    own::grpc_frame(&message)
}

/// Well is only who says so in so many words: as in Envoy, any other answer is a refusal.
pub(super) fn found(head: &Parts, trailers: Option<&HeaderMap>, body: &[u8]) -> Found {
    let kind = head.headers.get(header::CONTENT_TYPE);
    let is_grpc = kind.is_some_and(|kind| {
        let rest = kind.as_bytes().strip_prefix(CONTENT_TYPE.as_bytes());
        rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    });
    let status = own::grpc_status(&head.headers, trailers);
    let is_ok = status.is_some_and(|status| status.as_bytes() == b"0");
    if head.status == StatusCode::OK && is_grpc && is_ok && serving_status(body) == Some(SERVING) {
        Found::Well { degraded: false }
    } else {
        Found::Refused
    }
}

/// Field 1 of the one `HealthCheckResponse` that a body is; `None` if it is anything else.
fn serving_status(body: &[u8]) -> Option<u64> {
    let mut message = own::grpc_message(body)?;
    let mut status = 0;
    while !message.is_empty() {
        let tag = take_varint(&mut message)?;
        match tag & 7 {
            0 => {
                let value = take_varint(&mut message)?;
                if tag >> 3 == 1 {
                    status = value;
                }
            }
            // Fields of later versions.
            1 => message = message.get(8..)?,
            2 => {
                let length = usize::try_from(take_varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            5 => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(status: u16, fields: &[(&'static str, &'static str)]) -> Parts {
        let mut response = http::Response::builder().status(status);
        for (name, value) in fields {
            response = response.header(*name, *value);
        }
        response.body(()).unwrap().into_parts().0
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut body = vec![0, 0, 0, 0, message.len() as u8];
        body.extend_from_slice(message);
        body
    }

    #[test]
    fn a_question_names_its_service_if_it_has_one() {
        assert_eq!(&question("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&question("ab")[..], b"\0\0\0\0\x04\x0a\x02ab");
        let long = question(&"x".repeat(200));
        assert_eq!(&long[..8], b"\0\0\0\0\xcb\x0a\xc8\x01");
    }

    #[test]
    fn only_a_whole_answer_that_says_serving_is_well() {
        let well = Found::Well { degraded: false };
        let grpc = ("content-type", "application/grpc");
        let ok = head(200, &[("grpc-status", "0")]).headers;
        let bad = head(200, &[("grpc-status", "12")]).headers;
        let serving = framed(&[8, 1]);
        let answered = head(200, &[grpc]);
        assert_eq!(found(&answered, Some(&ok), &serving), well);
        let later = framed(&[0x12, 2, 7, 7, 0x1d, 1, 2, 3, 4, 8, 1]);
        assert_eq!(found(&answered, Some(&ok), &later), well);
        let proto = head(200, &[("content-type", "application/grpc+proto")]);
        assert_eq!(found(&proto, Some(&ok), &serving), well);
        for (head, trailers, body) in [
            (&answered, Some(&ok), framed(&[8, 2])),
            (&answered, Some(&ok), framed(&[])),
            (&answered, Some(&ok), vec![]),
            (&answered, Some(&ok), [&serving[..], &serving[..]].concat()),
            (&answered, Some(&ok), framed(&[8])),
            (&answered, Some(&bad), serving.clone()),
            (&answered, None, serving.clone()),
            (&head(200, &[grpc, ("grpc-status", "12")]), None, vec![]),
            (&head(503, &[grpc]), Some(&ok), serving.clone()),
            (
                &head(200, &[("content-type", "application/grpcx")]),
                Some(&ok),
                serving.clone(),
            ),
        ] {
            assert_eq!(found(head, trailers, &body), Found::Refused, "{body:?}");
        }
    }
}
