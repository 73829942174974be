//! vLLM's words for the two legs, with NIXL as the way of blocks: decode pulls them from where they were computed.
//!
//! Recorded of vLLM 0.32 in `conformance/fixtures/nixl-pd`. What goes from one leg to the other is passed on as it came:
//! its fields change between versions. Of a key that comes twice engines take the last, so that edits are appended.

use super::{
    Head,
    dialect::{Answer, Dialect},
    head::Pieces,
};
use crate::openai::members;
use bytes::Bytes;
use serde::Deserialize;

/// One token, which nobody will see: the engine that decodes makes its own. `min_tokens` above `max_tokens` is an error.
const ONE_TOKEN: &str = "\"max_tokens\":1,\"min_tokens\":1,\"stream\":false,\"stream_options\":null,\"return_token_ids\":false";
/// Chat only.
const ONE_COMPLETION_TOKEN: &str = "\"max_completion_tokens\":1,";
const REMOTE_DECODE: &str = ",\"kv_transfer_params\":{\"do_remote_decode\":true,\"do_remote_prefill\":false,\
    \"remote_engine_id\":null,\"remote_block_ids\":null,\"remote_host\":null,\"remote_port\":null}";
const PARAMS: &str = "kv_transfer_params";

/// Its legs one after the other.
pub(super) const DIALECT: Dialect = Dialect {
    prefill,
    answer,
    token_bytes: 0,
    decode,
    release,
};

#[derive(Deserialize)]
struct Params {
    #[serde(default)]
    do_remote_prefill: bool,
    remote_prefill_cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

fn prefill(head: &Head) -> Option<Pieces> {
    head.extended(&[for_chat(head), ONE_TOKEN, REMOTE_DECODE])
}

fn decode(head: &Head, answer: &Answer) -> Result<Pieces, &'static str> {
    let params = std::str::from_utf8(&answer.params).map_err(|_| "no_params")?;
    let body = head.extended(&["\"kv_transfer_params\":", params]);
    body.ok_or("body")
}

fn release(head: &Head, answer: &Answer) -> Option<Pieces> {
    let params = std::str::from_utf8(&answer.params).ok()?;
    let edits = [
        for_chat(head),
        ONE_TOKEN,
        ",\"kv_transfer_params\":",
        params,
    ];
    head.extended(&edits)
}

fn for_chat(head: &Head) -> &'static str {
    match head.is_chat() {
        true => ONE_COMPLETION_TOKEN,
        false => "",
    }
}

fn answer(body: &Bytes) -> Option<Answer> {
    let text = std::str::from_utf8(body).ok()?;
    let (mut raw, mut usage) = (None, None);
    members(text, |key, value| match key {
        PARAMS => raw = Some(value),
        "usage" => usage = Some(value),
        _ => {}
    })?;
    let raw = raw?;
    let params: Params = serde_json::from_str(raw).ok()?;
    if !params.do_remote_prefill {
        return None;
    }
    let told = || {
        let usage: Usage = serde_json::from_str(usage?).ok()?;
        usage.prompt_tokens_details?.cached_tokens
    };
    let cached = params.remote_prefill_cached_tokens.or_else(told);
    Some(Answer {
        params: body.slice_ref(raw.as_bytes()),
        prompt: Bytes::new(),
        cached: cached.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, Method, Version};
    use serde_json::{Value, json};

    fn recorded(name: &str) -> Value {
        let dir = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../conformance/fixtures/nixl-pd/"
        );
        let text = std::fs::read_to_string(format!("{dir}{name}.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn head(path: &'static str, body: (Bytes, Bytes)) -> Head {
        Head {
            method: Method::POST,
            uri: path.parse().unwrap(),
            version: Version::HTTP_11,
            headers: HeaderMap::new(),
            body,
        }
    }

    fn read((first, more): (Bytes, Bytes)) -> Value {
        serde_json::from_slice(&[first, more].concat()).unwrap()
    }

    #[test]
    fn both_legs_say_what_was_recorded() {
        for (path, prefix) in [("/v1/completions", ""), ("/v1/chat/completions", "chat_")] {
            let mut asked = recorded(&format!("{prefix}3_decode_request"));
            asked.as_object_mut().unwrap().remove(PARAMS);
            let text = asked.to_string();
            for pieces in [
                (text.clone(), String::new()),
                // As `migration` leaves it.
                (
                    text.trim_end_matches('}').to_owned(),
                    ",\"return_token_ids\":true}".to_owned(),
                ),
            ] {
                let head = head(path, (pieces.0.into(), pieces.1.into()));
                let mut first = read(prefill(&head).unwrap());
                let mut expected = recorded(&format!("{prefix}1_prefill_request"));
                // Nobody reads its ids, and a field that is null says nothing.
                assert_eq!(first["stream_options"], Value::Null);
                assert_eq!(first["return_token_ids"], false);
                for body in [&mut first, &mut expected] {
                    let fields = body.as_object_mut().unwrap();
                    fields.remove("stream_options");
                    fields.remove("return_token_ids");
                }
                assert_eq!(first, expected);
                let told = recorded(&format!("{prefix}2_prefill_response"));
                let told = answer(&told.to_string().into()).unwrap();
                let second = read(decode(&head, &told).unwrap());
                assert_eq!(second, recorded(&format!("{prefix}3_decode_request")));
                let last = read(release(&head, &told).unwrap());
                assert_eq!(
                    (&last["max_tokens"], &last[PARAMS]),
                    (&json!(1), &second[PARAMS])
                );
            }
        }
    }

    #[test]
    fn answers_without_params_are_none() {
        for body in [
            "",
            "[]",
            "{}",
            "{\"kv_transfer_params\":null}",
            "{\"kv_transfer_params\":{}}",
            "{\"kv_transfer_params\":{\"do_remote_prefill\":false}}",
            "{\"choices\":[{\"kv_transfer_params\":{\"do_remote_prefill\":true}}]}",
        ] {
            assert!(answer(&body.to_owned().into()).is_none(), "{body}");
        }
        let body = "{\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":64}},\"kv_transfer_params\":{\"do_remote_prefill\":true}}";
        assert_eq!(answer(&body.to_owned().into()).unwrap().cached, 64);
    }
}
