//! Which engine holds a response: told in the response's own id, which the engine is given with the request that creates it.
//!
//! An id is `resp_OWNER_RANDOM`: 16 digits that stand for the engine's name in the fleet, and 32 that nobody can guess. So
//! any proxy reads the owner from the id alone, whichever proxy created it and however often either was restarted
//! ([ADR 17](../../../docs/src/adr/0017-owner-in-the-id.md)). What engines answer is never rewritten.

use crate::{body::RequestBody, endpoints::Endpoint, openai::OpenAiRequest};
use bytes::Bytes;
use http::{HeaderValue, Request, header};
use outrigger_xds::report::{EngineId, EngineKind};
use xxhash_rust::xxh3::xxh3_64;

/// What an id says of its owner, if it says anything.
#[must_use]
pub fn told(id: &str) -> Option<u64> {
    let (owner, random) = id.strip_prefix("resp_")?.split_once('_')?;
    let is_hex = |text: &str, digits: usize| {
        text.len() == digits
            && text
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    if !is_hex(owner, 16) || !is_hex(random, 32) {
        return None;
    }
    u64::from_str_radix(owner, 16).ok()
}

/// What ids say of this engine.
#[must_use]
pub fn mark(engine: &EngineId) -> u64 {
    xxh3_64(engine.0.as_bytes())
}

/// An id for a response that `engine` is about to create.
fn new_id(engine: &EngineId) -> String {
    format!("resp_{:016x}_{:032x}", mark(engine), rand::random::<u128>())
}

/// Whether engines of this kind take the id of their response from the request.
fn takes_ids(kind: EngineKind) -> bool {
    match kind {
        EngineKind::Vllm | EngineKind::Sglang => true,
        EngineKind::TrtLlm | EngineKind::Unknown => false,
    }
}

/// Makes the body that this endpoint gets: with the id that tells it as the owner, if it takes one; else the client's own.
/// The client's bytes stay where they are.
pub(crate) fn tell(
    request: &mut Request<RequestBody>,
    openai: &OpenAiRequest,
    endpoint: &Endpoint,
) {
    let Some(whole) = openai
        .body
        .as_ref()
        .filter(|_| !request.body().has_trailers())
    else {
        return;
    };
    let takes = takes_ids(endpoint.live.load().state.kind);
    let brace = memchr::memchr(b'{', whole).filter(|_| takes);
    let (body, length) = match brace {
        Some(brace) => {
            let first = format!(r#"{{"request_id":"{}","#, new_id(&endpoint.id));
            let rest = whole.slice(brace + 1..);
            let length = first.len() + rest.len();
            (RequestBody::joined(Bytes::from(first), rest), length)
        }
        None => (RequestBody::full(whole.clone()), whole.len()),
    };
    *request.body_mut() = body;
    if let Some(told) = request.headers_mut().get_mut(header::CONTENT_LENGTH) {
        *told = HeaderValue::from(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_tells_its_owner_and_nothing_else_does() {
        let engine = EngineId::from("node-1/10.0.0.1:8000");
        let id = new_id(&engine);
        assert_eq!(told(&id), Some(mark(&engine)));
        assert_ne!(id, new_id(&engine));
        assert_ne!(
            told(&id),
            Some(mark(&EngineId::from("node-2/10.0.0.1:8000")))
        );
        let upper = id.to_uppercase().replace("RESP", "resp");
        for foreign in [
            "resp_8eb7edc987fd1251",
            "resp_",
            "",
            "resp_0123456789abcdef_",
            &id[1..],
            &id[..id.len() - 1],
            &format!("{id}0"),
            &upper,
        ] {
            assert_eq!(told(foreign), None, "{foreign}");
        }
    }
}
