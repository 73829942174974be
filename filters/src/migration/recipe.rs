//! Whether and how a stream may go on elsewhere: judged when it breaks, by the request as the client wrote it.

use super::splice::{Cut, Parsed, Splice};
use crate::openai::{Api, OpenAiRequest, Prompt, PromptFlags, Spans};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// `max_tokens` of completions that name none, in vLLM and SGLang.
const COMPLETION_TOKENS_DEFAULT: u64 = 16;

/// What only chat knows: none of it may reach `/v1/completions`.
const CHAT_ONLY: [&str; 17] = [
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "documents",
    "reasoning_effort",
    "include_reasoning",
    "max_completion_tokens",
    "top_logprobs",
    "logprobs",
    "functions",
];
/// What must not be said twice, or not of a prompt that is made of tokens.
const ONCE: [&str; 5] = [
    "request_id",
    "kv_transfer_params",
    "truncate_prompt_tokens",
    "echo",
    "prompt",
];
/// Output bound to a grammar, whose state no engine tells.
const GUIDED: [&str; 9] = [
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
];

/// What a client asked of its stream, as far as it matters here.
#[derive(Debug, Clone, Default)]
pub(super) struct Asked {
    /// Chat, or plain completions.
    pub(super) chat: bool,
    /// How many choices, at least 1; the most there are where it is not known.
    pub(super) choices: usize,
    /// It wants to see token ids.
    pub(super) ids: bool,
    /// A chunk with `usage` at the end.
    pub(super) usage: bool,
    /// Characters of text that a stop string may still take back, less one: the longest one's length.
    pub(super) margin: usize,
    /// As many are held back by the engine.
    pub(super) lag: usize,
}

/// How the next piece is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// The same request from its beginning.
    Restart,
    /// `/v1/completions` behind prompt and delivered tokens.
    Completions,
    /// The engine's entrance to chat for prompts of tokens.
    Entrance,
}

impl Way {
    /// As in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Completions => "completions",
            Self::Entrance => "entrance",
        }
    }
}

/// How the rest of a stream is asked for.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) way: Way,
    pub(super) cut: Cut,
    /// The body; `None` is the one that was sent first.
    pub(super) body: Option<Bytes>,
    /// What routing is to know of it.
    pub(super) openai: Arc<OpenAiRequest>,
}

/// What clients want of their streams.
pub(super) fn asked(openai: &OpenAiRequest) -> Asked {
    let stop = openai.raw(openai.spans.stop.as_ref());
    let longest = stop.map_or(0, longest_stop);
    let margin = longest.saturating_sub(1);
    Asked {
        chat: openai.api == Api::Chat,
        // Of each prompt; how many there are is not known.
        choices: match openai.prompt {
            Prompt::Batch => usize::MAX,
            _ => openai.n as usize,
        },
        ids: openai.return_token_ids,
        usage: openai.include_usage,
        margin,
        lag: if openai.include_stop { 0 } else { margin },
    }
}

fn longest_stop(raw: &str) -> usize {
    let length = |value: &Value| value.as_str().map_or(0, |stop| stop.chars().count());
    match serde_json::from_str(raw) {
        Ok(Value::Array(list)) => list.iter().map(length).max().unwrap_or(0),
        Ok(value) => length(&value),
        Err(_) => 0,
    }
}

/// What is known beside the request.
pub(super) struct Rules {
    pub(super) same_distribution: bool,
    /// Of the model's context; 0 if unknown.
    pub(super) context_tokens: u64,
    /// How much text the engine holds back for stop strings is known.
    pub(super) lag_is_known: bool,
    /// It may go on where only its next tokens show whether that was right. A stream that still runs is not risked so.
    pub(super) may_risk: bool,
    /// It was given a seed that its client did not.
    pub(super) has_our_seed: bool,
    /// No ids could be made of its text.
    pub(super) told_none: bool,
}

/// How a stream goes on.
///
/// # Errors
/// Why it cannot, in one word as in metrics.
pub(super) fn recipe(
    openai: &Arc<OpenAiRequest>,
    splice: &Splice,
    rules: &Rules,
) -> Result<Recipe, &'static str> {
    let cut = splice.cut();
    let restart = |cut| Recipe {
        way: Way::Restart,
        cut,
        body: None,
        openai: openai.clone(),
    };
    if !splice.began {
        return Ok(restart(cut));
    }
    let body = openai.body.as_ref().ok_or("no_body")?;
    let fields: Map<String, Value> = serde_json::from_slice(body).map_err(|_| "no_body")?;
    judge_whole(openai, &fields)?;
    let determined = rules.has_our_seed || is_determined(&fields);
    let here = judge_cut(&fields, splice, rules, determined)
        .and_then(|()| judge_sampling(&fields, rules.same_distribution));
    let ids = has_ids(splice);
    if ids.is_err() && rules.may_risk {
        let retold = here.is_ok() && !rules.told_none;
        if let Some(again) = splice.text_again(retold) {
            return Ok(restart(again));
        }
    }
    if here.is_ok() {
        ids?;
    }
    if let Err(reason) = here.and_then(|()| judge_again(&fields, splice, &cut)) {
        // What is generated again is compared, token by token.
        let again = rules.may_risk && determined && ids.is_ok() && !splice.is_retold;
        return again.then(|| restart(splice.all_again())).ok_or(reason);
    }
    // Of reasoning it is not known how much was told behind the cut.
    let told = cut.tokens == 0 || splice.reasoned_since;
    if splice.parsed == Parsed::Reasoning && told {
        return Err("reasoning");
    }
    if cut.tokens == 0 {
        return Ok(restart(cut));
    }
    let context_tokens = rules.context_tokens;
    let may_call = is_set(&fields, "tools") && fields.get("tool_choice") != Some(&json!("none"));
    let parsed = may_call || splice.parsed == Parsed::Reasoning;
    let entrance = splice.asked.chat && (parsed || is_set(&fields, "logprobs"));
    if splice.is_retold {
        check_retold(&fields, entrance, context_tokens)?;
    }
    let sequence = splice.sequence(&cut);
    let fields = if entrance {
        chat_again(fields, cut.tokens)?
    } else {
        completion(fields, splice.asked.chat, &cut, &sequence, context_tokens)?
    };
    let (body, openai) = with_tokens(openai, fields, &sequence, entrance);
    let way = if entrance {
        Way::Entrance
    } else {
        Way::Completions
    };
    Ok(Recipe {
        way,
        cut,
        body: Some(body),
        openai,
    })
}

/// What streams that tell no ids cannot do: nothing there proves that a chat's tokens were taken, and SGLang's completions
/// end after a few tokens where nobody says when.
fn check_retold(
    fields: &Map<String, Value>,
    entrance: bool,
    context_tokens: u64,
) -> Result<(), &'static str> {
    if entrance {
        return Err("entrance");
    }
    let limited = ["max_tokens", "max_completion_tokens"]
        .iter()
        .any(|name| is_set(fields, name));
    match limited || context_tokens > 0 {
        true => Ok(()),
        false => Err("no_context_length"),
    }
}

/// Requests whose continuation no engine can make, nor prove that it is the same from the beginning.
fn judge_whole(openai: &OpenAiRequest, fields: &Map<String, Value>) -> Result<(), &'static str> {
    let above_one = |name: &str| fields.get(name).and_then(Value::as_u64).unwrap_or(1) > 1;
    if openai.n > 1 || above_one("best_of") {
        return Err("n");
    }
    match openai.prompt {
        Prompt::Batch => return Err("batch"),
        Prompt::Media => return Err("media"),
        _ => {}
    }
    for (name, reason) in [
        ("use_beam_search", "beam_search"),
        ("echo", "echo"),
        ("suffix", "suffix"),
        ("prompt_logprobs", "prompt_logprobs"),
    ] {
        if is_set(fields, name) {
            return Err(reason);
        }
    }
    Ok(())
}

/// Whether all tokens are known.
fn has_ids(splice: &Splice) -> Result<(), &'static str> {
    match splice.untold {
        Some(reason) => Err(reason),
        None if splice.prompt_ids.is_empty() || splice.tokens_told() == 0 => Err("no_token_ids"),
        None => Ok(()),
    }
}

/// Engines whose state at the cut nobody knows, or can give to another.
fn judge_cut(
    fields: &Map<String, Value>,
    splice: &Splice,
    rules: &Rules,
    determined: bool,
) -> Result<(), &'static str> {
    if is_guided(fields) {
        return Err("guided");
    }
    match splice.parsed {
        Parsed::Tools => return Err("tool_calls"),
        // What is compared needs no proof of its parser.
        Parsed::Reasoning if determined || !rules.may_risk || !splice.asked.chat => {
            return Err("reasoning");
        }
        Parsed::Reasoning | Parsed::Plain => {}
    }
    for (name, reason) in [
        ("logits_processors", "logit_state"),
        ("vllm_xargs", "logit_state"),
        ("custom_logit_processor", "logit_state"),
        // Words of several tokens are looked for in the output alone.
        ("bad_words", "logit_state"),
        // How much text it holds back is not known.
        ("stop_regex", "stop"),
        ("thinking_token_budget", "thinking_budget"),
    ] {
        if is_set(fields, name) {
            return Err(reason);
        }
    }
    rules.lag_is_known.then_some(()).ok_or("stop")
}

/// Whether another engine generates the same from the beginning: the likeliest tokens, or those that a seed draws.
fn is_determined(fields: &Map<String, Value>) -> bool {
    is_greedy(fields) || is_set(fields, "seed")
}

fn is_greedy(fields: &Map<String, Value>) -> bool {
    fields.get("temperature").and_then(Value::as_f64) == Some(0.0)
}

/// Sampling whose state is lost with its engine.
fn judge_sampling(
    fields: &Map<String, Value>,
    same_distribution: bool,
) -> Result<(), &'static str> {
    if !is_greedy(fields) && is_set(fields, "seed") && !same_distribution {
        return Err("seed");
    }
    // Repetition penalties count the prompt, too, and lose nothing.
    let number = |name: &str| fields.get(name).and_then(Value::as_f64);
    let penalty = |name: &str| number(name).is_some_and(|penalty| penalty != 0.0);
    if (penalty("presence_penalty") || penalty("frequency_penalty")) && !same_distribution {
        return Err("penalties");
    }
    Ok(())
}

/// What is drawn again will be another text.
fn judge_again(
    fields: &Map<String, Value>,
    splice: &Splice,
    cut: &Cut,
) -> Result<(), &'static str> {
    let shown = splice.asked.ids || is_set(fields, "logprobs");
    let seen = cut.again_chars > 0 || shown && cut.again_tokens > 0;
    match seen && !is_greedy(fields) {
        true => Err("held_text"),
        false => Ok(()),
    }
}

fn is_set(fields: &Map<String, Value>, name: &str) -> bool {
    match fields.get(name) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(object)) => !object.is_empty(),
        Some(_) => true,
    }
}

fn is_guided(fields: &Map<String, Value>) -> bool {
    let format = fields.get("response_format");
    let format = format.and_then(|format| format["type"].as_str());
    let forced = match fields.get("tool_choice") {
        Some(Value::String(choice)) => !matches!(choice.as_str(), "auto" | "none"),
        Some(Value::Object(_)) => true,
        _ => false,
    };
    format.is_some_and(|format| format != "text")
        || forced
        || GUIDED.iter().any(|name| is_set(fields, name))
}

/// Limits of tokens, less those that are there.
fn reduce(fields: &mut Map<String, Value>, kept: usize) -> Result<(), &'static str> {
    for name in ["max_tokens", "max_completion_tokens"] {
        if let Some(limit) = fields.get(name).and_then(Value::as_u64) {
            let left = limit.saturating_sub(kept as u64);
            if left == 0 {
                return Err("no_tokens_left");
            }
            fields.insert(name.to_owned(), left.into());
        }
    }
    if let Some(least) = fields.get("min_tokens").and_then(Value::as_u64) {
        let least = least.saturating_sub(kept as u64);
        fields.insert("min_tokens".to_owned(), least.into());
    }
    Ok(())
}

fn chat_again(
    mut fields: Map<String, Value>,
    kept: usize,
) -> Result<Map<String, Value>, &'static str> {
    reduce(&mut fields, kept)?;
    for name in ONCE {
        fields.remove(name);
    }
    fields.insert("return_token_ids".to_owned(), true.into());
    Ok(fields)
}

fn completion(
    mut fields: Map<String, Value>,
    chat: bool,
    cut: &Cut,
    sequence: &[u8],
    context_tokens: u64,
) -> Result<Map<String, Value>, &'static str> {
    if chat {
        if let Some(limit) = fields.remove("max_completion_tokens") {
            fields.insert("max_tokens".to_owned(), limit);
        }
        CHAT_ONLY.iter().for_each(|name| drop(fields.remove(*name)));
    } else {
        let limit = fields.entry("max_tokens").or_insert(Value::Null);
        if limit.is_null() {
            *limit = COMPLETION_TOKENS_DEFAULT.into();
        }
    }
    reduce(&mut fields, cut.tokens)?;
    if chat && fields.get("max_tokens").is_none_or(Value::is_null) {
        // Chat goes on to the end of the context.
        let used = 1 + memchr::memchr_iter(b',', sequence).count() as u64;
        let left = context_tokens.checked_sub(used).filter(|left| *left > 0);
        fields.insert(
            "max_tokens".to_owned(),
            left.map_or(Value::Null, Into::into),
        );
    }
    for name in ONCE {
        fields.remove(name);
    }
    fields.insert("return_token_ids".to_owned(), true.into());
    Ok(fields)
}

/// Puts the tokens into the request as text, where their place is known.
fn with_tokens(
    openai: &OpenAiRequest,
    fields: Map<String, Value>,
    sequence: &[u8],
    entrance: bool,
) -> (Bytes, Arc<OpenAiRequest>) {
    let (before, after) = if entrance {
        ("{\"kv_transfer_params\":{\"prompt_token_ids\":[", "]},")
    } else {
        ("{\"prompt\":[", "],")
    };
    let rest = Value::Object(fields).to_string();
    let mut body = Vec::with_capacity(before.len() + sequence.len() + rest.len() + 4);
    body.extend_from_slice(before.as_bytes());
    let start = body.len() - 1;
    body.extend_from_slice(sequence);
    let end = body.len() + 1;
    body.extend_from_slice(after.as_bytes());
    body.extend_from_slice(&rest.as_bytes()[1..]);
    let body = Bytes::from(body);
    let openai = OpenAiRequest {
        // The tokens are all there is to know, whatever the path.
        api: Api::Completions,
        prompt: Prompt::TokenIds,
        spans: Spans {
            prompt: Some(start..end),
            ..Spans::default()
        },
        flags: PromptFlags::default(),
        body: Some(body.clone()),
        ..openai.clone()
    };
    (body, Arc::new(openai))
}
