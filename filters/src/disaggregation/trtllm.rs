//! TensorRT-LLM's words for the two legs, context first: decode is told where what was computed is, and takes it from there.
//!
//! Read from TensorRT-LLM 1.2, nothing was recorded. What the context leg says of its state is passed on as it came, but for
//! the kind of request; the prompt goes on in tokens. Fields that it does not know are errors to that engine, so nothing
//! else is added.

use super::{
    Head,
    dialect::{Answer, Dialect},
    head::Pieces,
};
use crate::openai::members;
use bytes::Bytes;
use rand::Rng;
use serde::Deserialize;
use serde_json::value::RawValue;

/// Its legs one after the other.
pub(super) const DIALECT: Dialect = Dialect {
    prefill,
    answer,
    token_bytes: TOKEN_BYTES,
    decode,
    release,
};

/// Numbers below are given out by the engines' own generators.
const REQUEST_ID_MIN: u64 = 1 << 42;
const PARAMS: &str = "\"disaggregated_params\":";
/// What a token of the prompt takes in an answer, at most.
const TOKEN_BYTES: usize = 16;
/// One token, for nobody.
const ONE_TOKEN: &str =
    "\"max_tokens\":1,\"min_tokens\":0,\"stream\":false,\"stream_options\":null,";
/// These would ask for more than that, but not all paths know them: each where the client named it.
const MORE_THAN_ONE_TOKEN: [(&str, &str); 3] = [
    ("max_completion_tokens", "\"max_completion_tokens\":1,"),
    ("logprobs", "\"logprobs\":null,"),
    ("top_logprobs", "\"top_logprobs\":null,"),
];

#[derive(Deserialize)]
struct Choice<'a> {
    finish_reason: Option<String>,
    #[serde(borrow)]
    disaggregated_params: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Params {
    request_type: Option<String>,
}

#[derive(Deserialize)]
struct FirstToken<'a> {
    #[serde(borrow)]
    first_gen_log_probs: Option<&'a RawValue>,
}

fn prefill(head: &Head) -> Option<Pieces> {
    let id = rand::rng().random_range(REQUEST_ID_MIN..i64::MAX.cast_unsigned());
    let params = format!(
        "\"stream\":false,\"stream_options\":null,{PARAMS}{{\"request_type\":\"context_only\",\"disagg_request_id\":{id}}}"
    );
    head.extended(&[&params])
}

/// `None` if there is nothing to go on with; also if the first token was the last, which one engine can say as well.
fn answer(body: &Bytes) -> Option<Answer> {
    let text = std::str::from_utf8(body).ok()?;
    let (mut choices, mut prompt) = (None, None);
    members(text, |key, value| match key {
        "choices" => choices = Some(value),
        "prompt_token_ids" => prompt = Some(value),
        _ => {}
    })?;
    let choices: Vec<Choice<'_>> = serde_json::from_str(choices?).ok()?;
    let [choice] = &choices[..] else {
        return None;
    };
    let goes_on = matches!(
        choice.finish_reason.as_deref(),
        Some("length" | "not_finished")
    );
    let raw = choice.disaggregated_params.filter(|_| goes_on)?.get();
    let params: Params = serde_json::from_str(raw).ok()?;
    params.request_type?;
    let prompt = prompt.filter(|ids| ids.starts_with('['))?;
    Some(Answer {
        params: body.slice_ref(raw.as_bytes()),
        prompt: body.slice_ref(prompt.as_bytes()),
        cached: 0,
    })
}

fn decode(head: &Head, answer: &Answer) -> Result<Pieces, &'static str> {
    if asks(head, "logprobs") && !tells_logprobs(answer) {
        // The first token was made here, and its figures would be missing there.
        return Err("logprobs");
    }
    generation(head, answer, &[]).ok_or("body")
}

fn release(head: &Head, answer: &Answer) -> Option<Pieces> {
    let mut edits = vec![ONE_TOKEN];
    let named = |(name, _): &&(&str, &str)| asks(head, name);
    let more = MORE_THAN_ONE_TOKEN.iter().filter(named);
    edits.extend(more.map(|(_, edit)| edit));
    generation(head, answer, &edits)
}

/// Whether the client named a field, and neither as null nor as false.
fn asks(head: &Head, name: &str) -> bool {
    let (first, more) = &head.body;
    let body = match more.is_empty() {
        true => first.clone(),
        false => [&first[..], more].concat().into(),
    };
    let mut last = None;
    let text = std::str::from_utf8(&body).unwrap_or_default();
    // A body that cannot be read is refused by whoever gets it.
    let _ = members(text, |key, value| {
        if key == name {
            last = Some(value);
        }
    });
    last.is_some_and(|value| !matches!(value, "null" | "false"))
}

fn tells_logprobs(answer: &Answer) -> bool {
    let params: Result<FirstToken<'_>, _> = serde_json::from_slice(&answer.params);
    params.is_ok_and(|params| params.first_gen_log_probs.is_some())
}

fn generation(head: &Head, answer: &Answer, more: &[&str]) -> Option<Pieces> {
    let params = std::str::from_utf8(&answer.params).ok()?;
    let ids = std::str::from_utf8(&answer.prompt).ok()?;
    let open = params.trim_end().strip_suffix('}')?;
    let prompt = match head.is_chat() {
        true => "\"prompt_token_ids\":",
        false => "\"prompt\":",
    };
    let pair = [
        prompt,
        ids,
        ",",
        PARAMS,
        open,
        ",\"request_type\":\"generation_only\"}",
    ];
    // Of a key that comes twice it takes the last.
    head.extended(&[more, &pair].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn head(path: &'static str, body: &Value) -> Head {
        Head {
            method: http::Method::POST,
            uri: path.parse().unwrap(),
            version: http::Version::HTTP_11,
            headers: http::HeaderMap::new(),
            body: (body.to_string().into(), Bytes::new()),
        }
    }

    fn read((first, more): (Bytes, Bytes)) -> Value {
        serde_json::from_slice(&[first, more].concat()).unwrap()
    }

    fn told(finish: &str) -> Bytes {
        let params = json!({"request_type": "context_only", "first_gen_tokens": [7], "ctx_request_id": 9,
            "encoded_opaque_state": "c3RhdGU=", "draft_tokens": null, "disagg_request_id": 5,
            "first_gen_log_probs": null});
        let choice = json!({"index": 0, "finish_reason": finish, "disaggregated_params": params});
        json!({"choices": [choice], "prompt_token_ids": [1, 2, 3]})
            .to_string()
            .into()
    }

    #[test]
    fn both_legs_say_what_the_engine_wants() {
        for (path, prompt) in [
            ("/v1/completions", "prompt"),
            ("/v1/chat/completions", "prompt_token_ids"),
        ] {
            let asked = json!({"prompt": "a", "stream": true, "max_tokens": 9});
            let head = head(path, &asked);
            let first = read(prefill(&head).unwrap());
            assert_eq!(
                first["disaggregated_params"]["request_type"],
                "context_only"
            );
            assert!(
                first["disaggregated_params"]["disagg_request_id"]
                    .as_u64()
                    .unwrap()
                    >= 1 << 42
            );
            assert_eq!(
                (&first["stream"], &first["max_tokens"]),
                (&json!(false), &json!(9))
            );
            let answer = answer(&told("length")).unwrap();
            let second = read(decode(&head, &answer).unwrap());
            assert_eq!(second[prompt], json!([1, 2, 3]));
            assert_eq!(
                (&second["stream"], &second["max_tokens"]),
                (&json!(true), &json!(9))
            );
            let params = &second["disaggregated_params"];
            assert_eq!(params["request_type"], "generation_only");
            assert_eq!(params["encoded_opaque_state"], "c3RhdGU=");
            let last = read(release(&head, &answer).unwrap());
            assert_eq!(
                (&last["max_tokens"], &last["disaggregated_params"]),
                (&json!(1), params)
            );
        }
    }

    #[test]
    fn giving_back_asks_for_one_token_whatever_the_client_named() {
        let asked = json!({"prompt": "a", "max_completion_tokens": 90, "min_tokens": 20, "logprobs": true,
            "top_logprobs": 3, "stream": true});
        let head = head("/v1/chat/completions", &asked);
        let last = read(release(&head, &answer(&told("length")).unwrap()).unwrap());
        for (name, expected) in [
            ("max_tokens", json!(1)),
            ("max_completion_tokens", json!(1)),
            ("min_tokens", json!(0)),
            ("logprobs", Value::Null),
            ("top_logprobs", Value::Null),
            ("stream", json!(false)),
        ] {
            assert_eq!(last[name], expected, "{name}");
        }
        // It is an error where the path does not know the field.
        let head = self::head("/v1/completions", &json!({"prompt": "a"}));
        let last = read(release(&head, &answer(&told("length")).unwrap()).unwrap());
        for (name, _) in MORE_THAN_ONE_TOKEN {
            assert!(last.get(name).is_none(), "{name}");
        }
    }

    #[test]
    fn logprobs_are_split_only_if_those_of_the_first_token_are_told() {
        let without = answer(&told("length")).unwrap();
        let text = String::from_utf8(told("length").to_vec()).unwrap();
        let with = text.replace("log_probs\":null", "log_probs\":[[-0.1]]");
        assert_ne!(text, with);
        let with = answer(&with.into()).unwrap();
        for (asked, splits) in [
            (json!({"logprobs": true}), false),
            (json!({"logprobs": 1}), false),
            (json!({"logprobs": 0}), false),
            (json!({"logprobs": false}), true),
            (json!({"logprobs": null}), true),
            (json!({}), true),
        ] {
            let head = head("/v1/chat/completions", &asked);
            assert_eq!(decode(&head, &without).is_ok(), splits, "{asked}");
            assert!(decode(&head, &with).is_ok(), "{asked}");
        }
    }

    #[test]
    fn what_ended_with_its_first_token_is_not_gone_on_with() {
        assert!(answer(&told("stop")).is_none());
        for body in [
            "",
            "{}",
            "{\"choices\":[]}",
            "{\"choices\":[{\"finish_reason\":\"length\"}],\"prompt_token_ids\":[1]}",
        ] {
            assert!(answer(&body.to_owned().into()).is_none(), "{body}");
        }
        assert!(answer(&told("not_finished")).is_some());
    }
}
