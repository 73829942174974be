//! Answers "what would this request become": the body of the `/render` endpoints, which is one of `/inference/v1/generate`.
//!
//! Defaults are written as recorded; fields the recording does not show are left out while they have their default.

use serde::Serialize;
use serde_json::Value;

use super::api::{self, Fields};
use super::engine::Engine;
use super::http::Request;
use super::scheduler::Sampling;

/// `/v1/chat/completions/render` and one element of `/v1/completions/render`.
#[derive(Serialize)]
pub(crate) struct Rendered<'a> {
    request_id: String,
    token_ids: &'a [u32],
    token_offsets: Option<()>,
    features: Option<()>,
    content_parts: Option<()>,
    sampling_params: RenderedSampling<'a>,
    model: &'a str,
    reasoning_ended: Option<()>,
    reasoning_parser_kwargs: Option<()>,
    return_token_ids: Option<bool>,
    output_mode: &'static str,
    stream: bool,
    stream_options: Option<&'a Value>,
    cache_salt: Option<&'a str>,
    priority: i64,
    kv_transfer_params: Option<()>,
    ec_transfer_params: Option<()>,
}

#[derive(Serialize)]
struct RenderedSampling<'a> {
    presence_penalty: f64,
    frequency_penalty: f64,
    repetition_penalty: f64,
    temperature: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    stop: &'a [String],
    stop_token_ids: &'a [u32],
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    max_tokens: usize,
    #[serde(skip_serializing_if = "is_zero")]
    min_tokens: usize,
    output_kind: u8,
    skip_clone: bool,
    bad_words: [(); 0],
    skip_reading_prefix_cache: bool,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// What render says of one prompt.
pub(crate) fn rendered<'a>(
    engine: &'a Engine,
    fields: &'a Fields,
    request_id: String,
    prompt: &'a [u32],
    sampling: &'a Sampling,
) -> Rendered<'a> {
    let number =
        |name: &str, default: f64| fields.get(name).and_then(Value::as_f64).unwrap_or(default);
    let stream = api::flag(fields, "stream");
    Rendered {
        request_id,
        token_ids: prompt,
        token_offsets: None,
        features: None,
        content_parts: None,
        sampling_params: RenderedSampling {
            presence_penalty: number("presence_penalty", 0.0),
            frequency_penalty: number("frequency_penalty", 0.0),
            repetition_penalty: number("repetition_penalty", 1.0),
            temperature: sampling.temperature,
            seed: sampling.seed.map(u64::cast_signed),
            stop: &sampling.stop,
            stop_token_ids: &sampling.stop_token_ids,
            ignore_eos: sampling.ignore_eos,
            max_tokens: sampling.max_tokens,
            min_tokens: sampling.min_tokens,
            output_kind: if stream { 1 } else { 2 },
            skip_clone: true,
            bad_words: [],
            skip_reading_prefix_cache: false,
        },
        model: &engine.config.model,
        reasoning_ended: None,
        reasoning_parser_kwargs: None,
        return_token_ids: api::flag(fields, "return_token_ids").then_some(true),
        output_mode: "tokens",
        stream,
        stream_options: fields
            .get("stream_options")
            .filter(|options| !options.is_null()),
        cache_salt: api::text(fields, "cache_salt"),
        priority: fields.get("priority").and_then(Value::as_i64).unwrap_or(0),
        kv_transfer_params: None,
        ec_transfer_params: None,
    }
}

/// The id that render shows for a request.
pub(crate) fn render_id(
    engine: &Engine,
    request: &Request,
    fields: &Fields,
    prefix: &str,
) -> String {
    let own = request
        .header("x-request-id")
        .or_else(|| api::text(fields, "request_id"));
    format!(
        "{prefix}-{}",
        own.map_or_else(|| engine.made_up_id(), str::to_owned)
    )
}
