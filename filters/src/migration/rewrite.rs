//! Chunks of a later piece in the words of the first: one id, one form, one account, nothing told twice.

use bytes::BytesMut;
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

/// What the client's chunks look like.
pub(super) struct Form<'a> {
    /// JSON up to the choices.
    pub(super) head: &'a [u8],
    /// Chat, or plain completions.
    pub(super) chat: bool,
    /// Token ids are shown.
    pub(super) ids: bool,
}

/// What of a chunk is not for the client, and what came before its piece.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Skip {
    /// Tokens that it has had.
    pub(super) tokens: usize,
    /// Characters that it has had.
    pub(super) chars: usize,
    /// Tokens that the piece's prompt holds beside the client's.
    pub(super) before: usize,
    /// Characters before the piece's text.
    pub(super) offset: usize,
}

impl Skip {
    /// Whether all of a chunk may be told, if it is in the right form and has no figures that count from a beginning.
    pub(super) fn is_nothing(&self) -> bool {
        self.tokens == 0 && self.chars == 0 && self.offset == 0
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
    #[serde(borrow, default)]
    system_fingerprint: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: usize,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    #[serde(default)]
    text: Option<String>,
    #[serde(borrow, default)]
    logprobs: Option<&'a RawValue>,
    #[serde(borrow, default)]
    finish_reason: Option<&'a RawValue>,
    #[serde(borrow, default)]
    stop_reason: Option<&'a RawValue>,
    #[serde(default)]
    token_ids: Option<Vec<u64>>,
}

impl Choice<'_> {
    /// A parser made nothing of it.
    fn is_empty(&self) -> bool {
        self.delta.is_some_and(|delta| delta.get() == "{}")
    }
}

#[derive(Deserialize)]
struct Content {
    #[serde(default)]
    content: Option<String>,
}

/// Writes a chunk as the client may see it; nothing if there is nothing in it for the client. `None`: it cannot be read.
pub(super) fn event(data: &[u8], form: &Form<'_>, skip: &Skip, out: &mut BytesMut) -> Option<()> {
    let chunk: Chunk<'_> = serde_json::from_slice(data).ok()?;
    let mut json = String::with_capacity(data.len());
    json.push_str("\"choices\":[");
    for (at, choice) in chunk.choices.iter().enumerate() {
        let written = write_choice(choice, form, skip)?;
        if written.is_empty() {
            return Some(());
        }
        if at > 0 {
            json.push(',');
        }
        json.push_str(&written);
    }
    json.push(']');
    if let Some(usage) = chunk.usage {
        json.push_str(",\"usage\":");
        json.push_str(&shared_account(usage, skip.before)?);
    }
    if let Some(fingerprint) = chunk.system_fingerprint {
        json.push_str(",\"system_fingerprint\":");
        json.push_str(fingerprint.get());
    }
    json.push('}');
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(form.head);
    out.extend_from_slice(json.as_bytes());
    out.extend_from_slice(b"\n\n");
    Some(())
}

fn write_choice(choice: &Choice<'_>, form: &Form<'_>, skip: &Skip) -> Option<String> {
    let (text, delta) = content(choice, skip)?;
    let ids = choice.token_ids.as_deref().unwrap_or_default();
    let fresh = &ids[skip.tokens.min(ids.len())..];
    // Only a parser's silence is not told where no ids were asked for.
    let silent = form.chat && !form.ids && choice.is_empty() && choice.logprobs.is_none();
    let told = !text.is_empty() || delta.is_some() || !silent && !fresh.is_empty();
    if !told && choice.finish_reason.is_none() {
        return Some(String::new());
    }
    let raw = |value: Option<&RawValue>| value.map_or("null", RawValue::get).to_owned();
    let text = serde_json::to_string(&text).ok()?;
    let body = match (form.chat, delta) {
        (true, Some(delta)) => format!("\"delta\":{delta}"),
        (true, None) if choice.is_empty() => "\"delta\":{}".to_owned(),
        (true, None) => format!("\"delta\":{{\"content\":{text}}}"),
        (false, _) => format!("\"text\":{text}"),
    };
    let logprobs = match choice.logprobs {
        Some(logprobs) => later_logprobs(logprobs, skip)?,
        None => "null".to_owned(),
    };
    let finish = raw(choice.finish_reason);
    let stop = match (form.chat, choice.finish_reason) {
        (true, None) => String::new(),
        _ => format!(",\"stop_reason\":{}", raw(choice.stop_reason)),
    };
    let ids = match form.ids {
        true => serde_json::to_string(fresh).ok()?,
        false => "null".to_owned(),
    };
    let prompt = if form.chat {
        ""
    } else {
        "\"prompt_token_ids\":null,"
    };
    let index = choice.index;
    Some(format!(
        "{{\"index\":{index},{body},\"logprobs\":{logprobs},\"finish_reason\":{finish}{stop},{prompt}\"token_ids\":{ids}}}"
    ))
}

/// The text that the client has not had, and the delta that may go on whole.
fn content<'a>(choice: &Choice<'a>, skip: &Skip) -> Option<(String, Option<&'a str>)> {
    let text = match (choice.delta, &choice.text) {
        (Some(delta), _) if skip.chars == 0 => {
            let empty = matches!(delta.get(), "{}" | "{\"content\":\"\"}");
            return Some((String::new(), (!empty).then(|| delta.get())));
        }
        (Some(delta), _) => serde_json::from_str::<Content>(delta.get()).ok()?.content,
        (None, text) => text.clone(),
    };
    let text = text.unwrap_or_default();
    let from = text.char_indices().nth(skip.chars);
    let rest = from.map_or("", |(at, _)| &text[at..]);
    Some((rest.to_owned(), None))
}

/// `usage` of a piece, as if all had been one.
fn shared_account(usage: &RawValue, before: usize) -> Option<String> {
    let mut usage: serde_json::Map<String, Value> = serde_json::from_str(usage.get()).ok()?;
    let before = before as u64;
    if before > 0 {
        let mut change = |name: &str, change: fn(u64, u64) -> u64| {
            if let Some(value) = usage.get(name).and_then(Value::as_u64) {
                usage.insert(name.to_owned(), change(value, before).into());
            }
        };
        change("prompt_tokens", u64::saturating_sub);
        change("completion_tokens", u64::saturating_add);
        // What the last engine had cached says nothing of the client's prompt.
        usage.remove("prompt_tokens_details");
    }
    serde_json::to_string(&usage).ok()
}

/// Figures of the tokens that the client has not had; places in the text count from its beginning.
fn later_logprobs(logprobs: &RawValue, skip: &Skip) -> Option<String> {
    if skip.tokens == 0 && skip.offset == 0 {
        return Some(logprobs.get().to_owned());
    }
    let mut logprobs: Value = serde_json::from_str(logprobs.get()).ok()?;
    for (name, list) in logprobs.as_object_mut()? {
        let Some(list) = list.as_array_mut() else {
            continue;
        };
        list.drain(..skip.tokens.min(list.len()));
        if name == "text_offset" {
            for place in list {
                *place = (place.as_u64()? + skip.offset as u64).into();
            }
        }
    }
    serde_json::to_string(&logprobs).ok()
}
