//! What a stream told its client, read as a client would, and what is wrong with it.

use outrigger_conformance::sim::{Fault, FaultKind, SimEngine};
use serde_json::Value;
use std::collections::BTreeSet;

/// One stream. Ids and times are not compared: they differ from request to request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Story {
    pub(crate) text: String,
    pub(crate) reasoning: String,
    /// Names and arguments of its tool calls, one behind the other.
    pub(crate) calls: String,
    call_ids: usize,
    /// Why it ended.
    pub(crate) finish: String,
    stop: Value,
    token_ids: Vec<u64>,
    logprobs: Vec<Value>,
    text_offsets: Vec<u64>,
    pub(crate) usage: Value,
    /// Chunks that brought something.
    pub(crate) tokens: usize,
    /// The engine's or the proxy's error.
    pub(crate) error: Option<Value>,
    ids: BTreeSet<String>,
    objects: BTreeSet<String>,
    pub(crate) roles: usize,
    finishes: usize,
    dones: usize,
    after_done: usize,
    prompts: usize,
}

impl PartialEq for Story {
    fn eq(&self, other: &Self) -> bool {
        let facts = |story: &Self| {
            (
                (story.text.clone(), story.reasoning.clone()),
                (story.calls.clone(), story.call_ids),
                story.finish.clone(),
                story.stop.clone(),
                story.token_ids.clone(),
                story.logprobs.clone(),
                story.text_offsets.clone(),
                story.usage.clone(),
                story.roles,
                story.prompts,
            )
        };
        facts(self) == facts(other)
    }
}

impl Story {
    /// What no whole stream has.
    pub(crate) fn problem(&self) -> Option<String> {
        let one = self.ids.len() == 1 && self.objects.len() == 1;
        let ends = self.finishes == 1 && self.dones == 1 && self.after_done == 0;
        (!one || !ends || self.roles > 1 || self.error.is_some()).then(|| format!("{self:?}"))
    }

    fn take(&mut self, chunk: &Value) {
        if let Some(error) = chunk.get("error") {
            self.error = Some(error.clone());
            return;
        }
        let text = |name: &str| chunk[name].as_str().unwrap_or_default().to_owned();
        self.ids.insert(text("id"));
        self.objects.insert(text("object"));
        if chunk["usage"].is_object() {
            let mut usage = chunk["usage"].clone();
            usage
                .as_object_mut()
                .unwrap()
                .remove("prompt_tokens_details");
            self.usage = usage;
        }
        self.prompts += usize::from(chunk["prompt_token_ids"].is_array());
        for choice in chunk["choices"].as_array().into_iter().flatten() {
            self.choice(choice);
        }
    }

    fn choice(&mut self, choice: &Value) {
        let delta = &choice["delta"];
        self.roles += usize::from(delta["role"].is_string());
        self.tokens += usize::from(!delta["role"].is_string());
        self.prompts += usize::from(choice["prompt_token_ids"].is_array());
        let text = delta["content"].as_str().or(choice["text"].as_str());
        self.text += text.unwrap_or_default();
        self.reasoning += delta["reasoning"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.call_ids += usize::from(call["id"].is_string());
            for name in ["name", "arguments"] {
                self.calls += call["function"][name].as_str().unwrap_or_default();
            }
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish = reason.to_owned();
            self.finishes += 1;
            self.stop = choice["stop_reason"].clone();
        }
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        self.token_ids.extend(ids.filter_map(Value::as_u64));
        let logprobs = &choice["logprobs"];
        for list in [
            &logprobs["content"],
            &logprobs["token_logprobs"],
            &logprobs["tokens"],
        ] {
            self.logprobs
                .extend(list.as_array().into_iter().flatten().cloned());
        }
        let offsets = logprobs["text_offset"].as_array().into_iter().flatten();
        self.text_offsets.extend(offsets.filter_map(Value::as_u64));
    }
}

/// Reads a whole stream.
pub(crate) fn story(text: &str) -> Story {
    let mut story = Story::default();
    for event in text.split("\n\n").filter(|event| !event.is_empty()) {
        let data = event
            .strip_prefix("data: ")
            .unwrap_or_else(|| panic!("{event:?}"));
        story.after_done += usize::from(story.dones > 0);
        if data == "[DONE]" {
            story.dones += 1;
            continue;
        }
        let chunk = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data:?}"));
        story.take(&chunk);
    }
    story
}

/// The next stream of each of these engines breaks behind so many tokens.
pub(crate) fn arm(engines: &[SimEngine], kind: FaultKind, after_tokens: u64) {
    for engine in engines {
        engine.fault(Fault {
            after_tokens,
            ..Fault::new(kind)
        });
    }
}

/// Those that did not break yet will not.
pub(crate) fn disarm(engines: &[SimEngine]) {
    engines.iter().for_each(SimEngine::disarm);
}
