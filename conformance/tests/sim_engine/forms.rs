//! Forced forms beyond what was recorded: what a whole tool call, JSON or response looks like to a client.

use std::net::SocketAddr;

use outrigger_conformance::sim::{Config, SimEngine};
use serde_json::{Value, json};

use super::client::post;

fn engine() -> SimEngine {
    SimEngine::start(Config {
        decode_itl_ms: 0.1,
        ..Config::recorded()
    })
    .expect("start")
}

const CHAT: &str = "/v1/chat/completions";

fn call(choice: &Value) -> Value {
    json!({
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "temperature": 0,
        "max_tokens": 400,
        "tool_choice": choice,
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 7}, "city": {"type": "string"}},
            "required": ["days", "city"],
        }}}],
    })
}

fn named() -> Value {
    json!({"type": "function", "function": {"name": "get_weather"}})
}

/// The name and arguments of a streamed call, and how it ended.
fn streamed_call(addr: SocketAddr, body: &Value) -> (String, String, Value) {
    let mut body = body.clone();
    body["stream"] = true.into();
    let (mut name, mut arguments, mut finish) = (String::new(), String::new(), Value::Null);
    for event in post(addr, CHAT, &body).events() {
        let choice = &event["choices"][0];
        let function = &choice["delta"]["tool_calls"][0]["function"];
        name.push_str(function["name"].as_str().unwrap_or_default());
        arguments.push_str(function["arguments"].as_str().unwrap_or_default());
        assert!(
            choice["delta"]["content"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        );
        finish = choice["finish_reason"].clone();
    }
    (name, arguments, finish)
}

#[test]
fn a_forced_call_has_arguments_that_fit_streamed_or_whole() {
    let engine = engine();
    for choice in [named(), json!("required")] {
        let body = call(&choice);
        let whole = &post(engine.http_addr, CHAT, &body).json()["choices"][0];
        assert_eq!(whole["finish_reason"], "tool_calls");
        assert_eq!(whole["message"]["content"], Value::Null);
        let told = &whole["message"]["tool_calls"][0];
        assert!(
            told["id"]
                .as_str()
                .is_some_and(|id| id.starts_with("chatcmpl-tool-"))
        );
        let text = told["function"]["arguments"].as_str().expect("arguments");
        let arguments: Value = serde_json::from_str(text).expect("JSON");
        assert!(matches!(arguments["days"].as_i64(), Some(1..=7)), "{text}");
        assert!(arguments["city"].is_string(), "{text}");
        let (name, streamed, finish) = streamed_call(engine.http_addr, &body);
        assert_eq!((name.as_str(), streamed.as_str()), ("get_weather", text));
        assert_eq!(finish, "tool_calls");
    }
}

#[test]
fn every_token_of_the_prompt_matters_to_a_forced_form() {
    let engine = engine();
    let mut body = call(&named());
    let (_, first, _) = streamed_call(engine.http_addr, &body);
    let (_, again, _) = streamed_call(engine.http_addr, &body);
    body["messages"][0]["content"] = "Weather in Paris".into();
    let (_, other, _) = streamed_call(engine.http_addr, &body);
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn choices_of_a_sampled_call_differ_and_a_seed_repeats_them() {
    let engine = engine();
    let mut body = call(&json!("required"));
    body["n"] = 2.into();
    body["temperature"] = 1.into();
    body["seed"] = 7.into();
    let arguments = || {
        let choices = post(engine.http_addr, CHAT, &body).json()["choices"].clone();
        [0, 1].map(|at: usize| {
            let call = &choices[at]["message"]["tool_calls"][0];
            call["function"]["arguments"]
                .as_str()
                .expect("arguments")
                .to_owned()
        })
    };
    let [first, second] = arguments();
    assert_ne!(first, second);
    assert_eq!(arguments(), [first, second]);
}

#[test]
fn json_fits_its_schema_and_its_tokens_are_those_of_its_text() {
    let engine = engine();
    let mut body = json!({
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0, "max_tokens": 600, "logprobs": true, "return_token_ids": true,
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": {
            "type": "object", "required": ["colours"], "properties": {
                "colours": {"type": "array", "minItems": 3, "maxItems": 3, "items": {"enum": ["red", "green"]}}}}}},
    });
    let choice = &post(engine.http_addr, CHAT, &body).json()["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    let text = choice["message"]["content"].as_str().expect("content");
    let value: Value = serde_json::from_str(text).expect("JSON");
    assert_eq!(value["colours"].as_array().map(Vec::len), Some(3), "{text}");
    let tokens = json!({"tokens": choice["token_ids"]});
    let decoded = post(engine.http_addr, "/detokenize", &tokens).json();
    assert_eq!(decoded["prompt"], format!("{text}<|im_end|>"));
    body["response_format"] = json!({"type": "json_object"});
    let choice = &post(engine.http_addr, CHAT, &body).json()["choices"][0];
    let text = choice["message"]["content"].as_str().expect("content");
    assert!(
        serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object()),
        "{text}"
    );
}

#[test]
fn a_form_that_cannot_be_followed_is_the_clients_error() {
    let engine = engine();
    let pattern =
        json!({"type": "json_schema", "json_schema": {"name": "c", "schema": {"pattern": "a"}}});
    let mut no_such = call(&json!({"type": "function", "function": {"name": "other"}}));
    for (name, value) in [
        ("response_format", pattern),
        ("tool_choice", json!("required")),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        body[name] = value;
        let answer = post(engine.http_addr, CHAT, &body);
        assert_eq!(answer.status_line, "HTTP/1.1 400 Bad Request");
        assert_eq!(answer.json()["error"]["param"], name);
        assert_eq!(answer.json()["error"]["type"], "BadRequestError");
    }
    no_such["stream"] = true.into();
    let answer = post(engine.http_addr, CHAT, &no_such);
    assert_eq!(answer.status_line, "HTTP/1.1 400 Bad Request");
}

#[test]
fn a_tool_that_may_be_called_changes_neither_prompt_nor_text() {
    let engine = engine();
    let with = call(&json!("auto"));
    let mut without = with.clone();
    for name in ["tools", "tool_choice"] {
        without.as_object_mut().expect("an object").remove(name);
    }
    let answers = [with, without].map(|body| post(engine.http_addr, CHAT, &body).json());
    assert_eq!(answers[0]["choices"], answers[1]["choices"]);
    assert_eq!(
        answers[0]["usage"]["prompt_tokens"],
        answers[1]["usage"]["prompt_tokens"]
    );
}

#[test]
fn an_echo_tells_the_prompt_and_its_figures_are_computed_each_time() {
    let engine = engine();
    let prompt =
        "The capital of France is Paris and every boat was tied to its own post. ".repeat(5);
    let mut body =
        json!({"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 2});
    let ask = |body: &Value| post(engine.http_addr, "/v1/completions", body).json();
    ask(&body);
    let again = ask(&body);
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let choice = &again["choices"][0];
    let text = choice["text"].as_str().expect("text");
    assert!(text.starts_with(&prompt) && text.len() > prompt.len());
    let count = again["usage"]["total_tokens"].as_u64().expect("a count") as usize;
    for list in ["tokens", "text_offset", "token_logprobs", "top_logprobs"] {
        assert_eq!(
            choice["logprobs"][list].as_array().map(Vec::len),
            Some(count),
            "{list}"
        );
    }
    let tokens = choice["logprobs"]["tokens"].as_array().expect("tokens");
    let offsets = choice["logprobs"]["text_offset"]
        .as_array()
        .expect("offsets");
    for (token, offset) in tokens.iter().zip(offsets) {
        let from = offset.as_u64().expect("an offset") as usize;
        assert!(text[from..].starts_with(token.as_str().expect("a token")));
    }
    assert_eq!(
        choice["prompt_logprobs"].as_array().map(Vec::len),
        Some(count - 3)
    );
    body["logprobs"] = Value::Null;
    let plain = ask(&body);
    assert_eq!(plain["choices"][0]["text"], text);
    assert_eq!(plain["choices"][0]["prompt_logprobs"], Value::Null);
    assert_ne!(plain["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[test]
fn a_prompt_that_the_model_would_have_written_has_rank_1_throughout() {
    let engine = engine();
    let mut body = json!({"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0, "return_token_ids": true});
    let ask =
        |body: &Value| post(engine.http_addr, "/v1/completions", body).json()["choices"][0].clone();
    let first = ask(&body);
    let ids = |name: &str| first[name].as_array().expect("ids").clone();
    let (prompt, made) = (ids("prompt_token_ids"), ids("token_ids"));
    body["prompt"] = [&prompt[..], &made[..]].concat().into();
    body["echo"] = true.into();
    body["logprobs"] = 1.into();
    let places = ask(&body)["prompt_logprobs"].clone();
    for (at, id) in made.iter().enumerate() {
        assert_eq!(
            places[prompt.len() + at][id.to_string()]["rank"],
            1,
            "{places}"
        );
    }
}

#[test]
fn a_response_tells_the_same_streamed_or_whole_and_numbers_its_events() {
    let engine = engine();
    for max_tokens in [12, 1000] {
        let mut body = json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]}],
            "instructions": "Be brief.", "temperature": 0, "max_output_tokens": max_tokens});
        let whole = post(engine.http_addr, "/v1/responses", &body).json();
        body["stream"] = true.into();
        let events = post(engine.http_addr, "/v1/responses", &body).events();
        let numbers: Vec<_> = events
            .iter()
            .map(|event| event["sequence_number"].as_u64())
            .collect();
        assert_eq!(
            numbers,
            (0..events.len() as u64).map(Some).collect::<Vec<_>>()
        );
        let told = events.iter().filter_map(|event| event["delta"].as_str());
        let text = &whole["output"][0]["content"][0]["text"];
        assert_eq!(*text, told.collect::<String>());
        let last = &events.last().expect("an event")["response"];
        assert_eq!(last["output"][0]["content"][0]["text"], *text);
        assert_eq!(
            last["usage"]["output_tokens"],
            whole["usage"]["output_tokens"]
        );
        let ended = if whole["usage"]["output_tokens"] == max_tokens {
            "incomplete"
        } else {
            "completed"
        };
        assert_eq!(
            (&whole["status"], &last["status"]),
            (&json!(ended), &json!(ended))
        );
        assert_eq!(whole["incomplete_details"].is_null(), ended == "completed");
    }
}
