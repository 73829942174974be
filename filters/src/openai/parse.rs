//! One pass over a request body: what other filters need to know, as values or as the places where they lie.
//!
//! Contents are skipped, not unescaped; nothing is copied but the few small strings. A body that is no JSON object of
//! the expected kind gives `None`: it is forwarded as it is, and the engine answers with its own error.

use super::{Api, OpenAiRequest, Prompt, PromptFlags, Spans, StreamLimits, scan};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, SeqAccess, Visitor},
};
use std::{borrow::Cow, fmt, ops::Range};

/// Which API a path belongs to, the query string left out.
pub(super) fn api(path: &str) -> Api {
    let path = path.strip_suffix('/').unwrap_or(path);
    match path {
        "/v1/chat/completions" => Api::Chat,
        "/v1/completions" => Api::Completions,
        "/v1/messages" => Api::Messages,
        "/v1/responses" => Api::Responses,
        "/inference/v1/generate" | "/generate" => Api::Generate,
        "/tokenize"
        | "/detokenize"
        | "/v1/tokenize"
        | "/v1/detokenize"
        | "/v1/messages/count_tokens" => Api::Tokenize,
        "/v1/embeddings" | "/v2/embed" | "/embeddings" | "/pooling" | "/classify"
        | "/v1/classify" | "/score" | "/v1/score" | "/rerank" | "/v1/rerank" | "/v2/rerank"
        | "/encode" => Api::Embeddings,
        _ if path == "/v1/models" || path.starts_with("/v1/models/") => Api::Models,
        _ if stored_response(path).is_some() => Api::StoredResponse,
        _ if path.starts_with("/v1/")
            && (path.ends_with("/render") || path.ends_with("/derender")) =>
        {
            Api::Render
        }
        _ => Api::Other,
    }
}

/// The id of the response that a path is about: `/v1/responses/ID`, with `/cancel` or the like behind it.
pub(super) fn stored_response(path: &str) -> Option<&str> {
    let below = path.strip_prefix("/v1/responses/")?;
    let id = below.split('/').next().unwrap_or_default();
    // Questions about a response that is yet to be made.
    (!matches!(id, "" | "render" | "input_tokens" | "compact")).then_some(id)
}

/// Whether a body of this API is worth reading: it may name a model.
pub(super) fn names_a_model(api: Api) -> bool {
    !matches!(api, Api::Models | Api::StoredResponse | Api::Other)
}

/// Reads a body; `None` if it is not what the API expects.
pub(super) fn request(api: Api, body: &Bytes, limits: StreamLimits) -> Option<OpenAiRequest> {
    let text = std::str::from_utf8(body).ok()?;
    let mut fields = Fields::default();
    scan::members(text, |key, raw| fields.set(key, raw))?;
    let span = |raw: Option<&str>| raw.filter(|raw| *raw != "null").map(|raw| place(text, raw));
    let raw_prompt = fields.raw_prompt(api);
    let options = fields.stream_options.as_ref();
    let prompt = raw_prompt.map_or(Prompt::None, kind);
    Some(OpenAiRequest {
        api,
        tenant: None,
        model: fields
            .model
            .as_deref()
            .filter(|model| !model.is_empty())
            .map(Into::into),
        stream: fields.stream.unwrap_or(false),
        include_usage: options
            .and_then(|options| options.include_usage)
            .unwrap_or(false),
        return_token_ids: fields.return_token_ids,
        include_stop: fields.include_stop,
        has_seed: fields.has_seed,
        greedy: fields.greedy,
        n: fields.n.unwrap_or(1).max(1),
        max_tokens: fields.max_tokens(),
        cache_salt: fields.cache_salt.as_ref().map(|salt| salt.as_ref().into()),
        previous_response_id: fields.previous.as_ref().map(|id| id.as_ref().into()),
        names_itself: fields.request_id,
        too_large: false,
        body: Some(body.clone()),
        prompt: if fields.media(api) {
            Prompt::Media
        } else {
            prompt
        },
        spans: Spans {
            prompt: span(raw_prompt),
            system: span(fields.system),
            tools: span(fields.tools),
            tool_choice: span(fields.tool_choice),
            documents: span(fields.documents),
            stop: span(fields.stop),
            chat_template: span(fields.chat_template),
            chat_template_kwargs: span(fields.chat_template_kwargs),
            reasoning_effort: span(fields.reasoning_effort),
        },
        flags: PromptFlags {
            add_generation_prompt: fields.add_generation_prompt,
            continue_final_message: fields.continue_final_message,
            add_special_tokens: fields.add_special_tokens,
            opaque: fields.opaque(),
        },
        one_engine: fields.one_engine,
        limits,
    })
}

/// Where a borrowed value lies in the text it was read from.
fn place(text: &str, raw: &str) -> Range<usize> {
    let start = raw.as_ptr() as usize - text.as_ptr() as usize;
    start..start + raw.len()
}

/// The fields that matter. Unknown ones are skipped; of repeated ones the last counts, as in the engines.
#[derive(Default)]
struct Fields<'a> {
    model: Option<Cow<'a, str>>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<u32>,
    max_completion_tokens: Option<u64>,
    max_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    sampling_params: Option<Sampling>,
    cache_salt: Option<Cow<'a, str>>,
    messages: Option<&'a str>,
    prompt: Option<&'a str>,
    text: Option<&'a str>,
    input: Option<&'a str>,
    ids: Option<&'a str>,
    media: bool,
    prompt_embeds: bool,
    system: Option<&'a str>,
    tools: Option<&'a str>,
    tool_choice: Option<&'a str>,
    documents: Option<&'a str>,
    stop: Option<&'a str>,
    return_token_ids: bool,
    include_stop: bool,
    has_seed: bool,
    greedy: bool,
    chat_template: Option<&'a str>,
    chat_template_kwargs: Option<&'a str>,
    reasoning_effort: Option<&'a str>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    add_special_tokens: Option<bool>,
    truncate: bool,
    previous: Option<Cow<'a, str>>,
    request_id: bool,
    kv_transfer_params: bool,
    one_engine: bool,
}

impl<'a> Fields<'a> {
    fn raw_prompt(&self, api: Api) -> Option<&'a str> {
        let raw = match api {
            Api::Chat | Api::Messages => self.messages,
            Api::Completions => self.prompt,
            Api::Responses => self.input,
            Api::Generate => self.ids.or(self.text),
            Api::Render | Api::Tokenize => self.messages.or(self.prompt),
            Api::Embeddings | Api::Models | Api::StoredResponse | Api::Other => None,
        };
        raw.filter(|raw| *raw != "null")
    }

    fn max_tokens(&self) -> Option<u64> {
        let sampling = self.sampling_params.as_ref();
        self.max_completion_tokens
            .or(self.max_tokens)
            .or(self.max_output_tokens)
            .or(sampling.and_then(|sampling| sampling.max_tokens.or(sampling.max_new_tokens)))
    }

    fn media(&self, api: Api) -> bool {
        let parts = match api {
            Api::Chat | Api::Messages => self.messages,
            Api::Responses => self.input,
            _ => None,
        };
        self.media || self.prompt_embeds || parts.is_some_and(has_media)
    }

    fn opaque(&self) -> bool {
        self.truncate || self.previous.is_some() || self.kv_transfer_params
    }
}

#[derive(Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
}

#[derive(Default, Deserialize)]
struct Sampling {
    #[serde(default)]
    max_tokens: Option<u64>,
    #[serde(default)]
    max_new_tokens: Option<u64>,
}

/// A value of the expected type, or nothing: a wrong type is the engine's to complain about.
fn lenient<'a, T: Deserialize<'a>>(raw: &'a str) -> Option<T> {
    serde_json::from_str(raw).ok()
}

fn is_set(raw: &str) -> bool {
    !matches!(raw, "null" | "[]" | "{}" | "false")
}

/// A text, borrowed where it has no escapes (serde would copy a plain `Cow`).
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Fields<'a> {
    fn set(&mut self, key: &str, raw: &'a str) {
        match key {
            "model" => self.model = lenient::<Text<'a>>(raw).map(|text| text.0),
            "stream" => self.stream = lenient(raw),
            "stream_options" => self.stream_options = lenient(raw),
            "n" => self.n = lenient(raw),
            "max_completion_tokens" => self.max_completion_tokens = lenient(raw),
            "max_tokens" => self.max_tokens = lenient(raw),
            "max_output_tokens" => self.max_output_tokens = lenient(raw),
            "sampling_params" => self.sampling_params = lenient(raw),
            "cache_salt" => self.cache_salt = lenient::<Text<'a>>(raw).map(|text| text.0),
            "stop" => self.stop = Some(raw),
            "return_token_ids" => self.return_token_ids = raw == "true",
            "include_stop_str_in_output" => self.include_stop = raw == "true",
            "seed" => self.has_seed = raw != "null",
            "temperature" => self.greedy = lenient(raw) == Some(0.0),
            "messages" => self.messages = Some(raw),
            "prompt" => self.prompt = Some(raw),
            "text" => self.text = Some(raw),
            "input" => self.input = Some(raw),
            "input_ids" | "token_ids" => self.ids = Some(raw),
            "image_data" | "audio_data" | "video_data" | "features" | "content_parts" => {
                self.media |= is_set(raw)
            }
            "prompt_embeds" | "input_embeds" => self.prompt_embeds |= is_set(raw),
            _ => self.set_template(key, raw),
        }
    }

    /// What changes how a prompt becomes tokens.
    fn set_template(&mut self, key: &str, raw: &'a str) {
        match key {
            "system" => self.system = Some(raw),
            "tools" => self.tools = Some(raw),
            "tool_choice" => self.tool_choice = Some(raw),
            "documents" => self.documents = Some(raw),
            "chat_template" => self.chat_template = Some(raw),
            "chat_template_kwargs" => self.chat_template_kwargs = Some(raw),
            "reasoning_effort" => self.reasoning_effort = Some(raw),
            "add_generation_prompt" => self.add_generation_prompt = lenient(raw),
            "continue_final_message" => self.continue_final_message = lenient(raw),
            "add_special_tokens" => self.add_special_tokens = lenient(raw),
            "truncate_prompt_tokens" => self.truncate |= is_set(raw),
            "previous_response_id" => self.previous = lenient::<Text<'a>>(raw).map(|text| text.0),
            "request_id" => self.request_id = true,
            "kv_transfer_params" => {
                self.kv_transfer_params |= raw.contains("prompt_token_ids");
                self.one_engine |= is_set(raw);
            }
            "best_of" => self.one_engine |= is_set(raw) && raw != "1",
            "echo"
            | "suffix"
            | "prompt_logprobs"
            | "use_beam_search"
            | "ec_transfer_params"
            | "bootstrap_room"
            | "disaggregated_params" => self.one_engine |= is_set(raw),
            _ => {}
        }
    }
}

/// What kind of prompt a raw JSON value is.
fn kind(raw: &str) -> Prompt {
    match raw.as_bytes() {
        [b'"', ..] => Prompt::Text,
        [b'[', rest @ ..] => match rest.trim_ascii_start().first() {
            Some(b'{') => Prompt::Messages,
            Some(b'0'..=b'9') => Prompt::TokenIds,
            Some(b'"' | b'[') => single(raw),
            _ => Prompt::None,
        },
        _ => Prompt::None,
    }
}

/// A list of prompts; a list of one is still exact, and engines treat it as that one.
fn single(raw: &str) -> Prompt {
    struct Count;
    impl<'de> Visitor<'de> for Count {
        type Value = usize;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<usize, A::Error> {
            let mut count = 0;
            while seq.next_element::<IgnoredAny>()?.is_some() {
                count += 1;
            }
            Ok(count)
        }
    }
    let count = serde_json::Deserializer::from_str(raw).deserialize_seq(Count);
    match count {
        Ok(1) => kind(raw[1..raw.len() - 1].trim()),
        _ => Prompt::Batch,
    }
}

/// Whether any content part of these messages is something else than text. Inside longer strings quotes are escaped,
/// so a false alarm takes a message that is exactly one of these words; it costs exactness, nothing else.
fn has_media(raw: &str) -> bool {
    const KEYS: [&str; 9] = [
        "\"image_url\"",
        "\"input_image\"",
        "\"image\"",
        "\"input_audio\"",
        "\"audio_url\"",
        "\"video_url\"",
        "\"image_embeds\"",
        "\"input_file\"",
        "\"document\"",
    ];
    memchr::memmem::find(raw.as_bytes(), b"\"type\"").is_some()
        && KEYS
            .iter()
            .any(|key| memchr::memmem::find(raw.as_bytes(), key.as_bytes()).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(api: Api, body: &str) -> Option<OpenAiRequest> {
        request(
            api,
            &Bytes::copy_from_slice(body.as_bytes()),
            StreamLimits::default(),
        )
    }

    #[test]
    fn paths_name_their_api() {
        let cases = [
            ("/v1/chat/completions", Api::Chat),
            ("/v1/chat/completions/", Api::Chat),
            ("/v1/completions", Api::Completions),
            ("/v1/messages", Api::Messages),
            ("/v1/messages/count_tokens", Api::Tokenize),
            ("/v1/responses", Api::Responses),
            ("/v1/responses/resp_1", Api::StoredResponse),
            ("/v1/responses/resp_1/cancel", Api::StoredResponse),
            ("/v1/responses/render", Api::Render),
            ("/v1/responses/input_tokens", Api::Other),
            ("/inference/v1/generate", Api::Generate),
            ("/generate", Api::Generate),
            ("/v1/chat/completions/render", Api::Render),
            ("/v1/completions/render", Api::Render),
            ("/tokenize", Api::Tokenize),
            ("/v1/models", Api::Models),
            ("/v1/models/a/b", Api::Models),
            ("/v1/modelsx", Api::Other),
            ("/v1/embeddings", Api::Embeddings),
            ("/health", Api::Other),
        ];
        for (path, expected) in cases {
            assert_eq!(api(path), expected, "{path}");
        }
    }

    #[test]
    fn a_chat_request_is_read_without_a_tree() {
        let body = r#" {"messages" : [{"role":"user","content":"say \"type\": \"image_url\"!"}], "model":"smol\u006cm2",
            "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "n": 2,
            "max_tokens": 24, "cache_salt": "s", "new_field": {"deep": [1, 2, {}]}, "tools": null,
            "chat_template_kwargs": {"enable_thinking": false}} "#;
        let request = read(Api::Chat, body).unwrap();
        assert_eq!(request.model.as_deref(), Some("smollm2"));
        assert!(request.stream && request.include_usage);
        assert_eq!((request.n, request.max_tokens), (2, Some(24)));
        assert_eq!(request.cache_salt.as_deref(), Some("s"));
        assert_eq!(
            request.prompt,
            Prompt::Messages,
            "text about media is no media"
        );
        let messages = request.raw(request.spans.prompt.as_ref()).unwrap();
        assert!(messages.starts_with("[{\"role\"") && messages.ends_with("}]"));
        assert_eq!(
            request.raw(request.spans.chat_template_kwargs.as_ref()),
            Some(r#"{"enable_thinking": false}"#)
        );
        assert_eq!(request.spans.tools, None, "null is absent");
        assert_eq!(request.body.as_deref(), Some(body.as_bytes()));
    }

    #[test]
    fn prompts_are_told_apart() {
        let cases = [
            (Api::Completions, r#"{"prompt":"a"}"#, Prompt::Text),
            (Api::Completions, r#"{"prompt":[1,2]}"#, Prompt::TokenIds),
            (Api::Completions, r#"{"prompt":["a","b"]}"#, Prompt::Batch),
            (Api::Completions, r#"{"prompt":["a"]}"#, Prompt::Text),
            (
                Api::Completions,
                r#"{"prompt":[ [1, 2] ]}"#,
                Prompt::TokenIds,
            ),
            (Api::Completions, r#"{"prompt":[[1],[2]]}"#, Prompt::Batch),
            (Api::Completions, r#"{"prompt":[]}"#, Prompt::None),
            (
                Api::Completions,
                r#"{"prompt":"a","prompt_embeds":"AAA"}"#,
                Prompt::Media,
            ),
            (Api::Generate, r#"{"token_ids":[1,2]}"#, Prompt::TokenIds),
            (
                Api::Generate,
                r#"{"input_ids":[1,2],"image_data":["x"]}"#,
                Prompt::Media,
            ),
            (Api::Generate, r#"{"text":"a"}"#, Prompt::Text),
            (
                Api::Chat,
                r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}]}"#,
                Prompt::Messages,
            ),
            (
                Api::Chat,
                r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#,
                Prompt::Media,
            ),
            (Api::Chat, r#"{"messages":null}"#, Prompt::None),
            (Api::Responses, r#"{"input":"a"}"#, Prompt::Text),
        ];
        for (api, body, expected) in cases {
            assert_eq!(read(api, body).unwrap().prompt, expected, "{body}");
        }
    }

    #[test]
    fn wrong_types_are_left_to_the_engine() {
        let request = read(
            Api::Chat,
            r#"{"model":"m","stream":"yes","n":-1,"max_tokens":"many","messages":7}"#,
        )
        .unwrap();
        assert_eq!(request.model.as_deref(), Some("m"));
        assert_eq!(
            (request.stream, request.n, request.max_tokens),
            (false, 1, None)
        );
        assert_eq!(request.prompt, Prompt::None);
        for broken in ["", "[]", "{\"model\":", "{\"model\":\"m\"} x", "\u{1}"] {
            assert!(read(Api::Chat, broken).is_none(), "{broken}");
        }
        let latin = Bytes::from_static(b"{\"model\":\"\xe9\"}");
        assert!(super::request(Api::Chat, &latin, StreamLimits::default()).is_none());
    }
}
