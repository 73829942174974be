//! What is kept of a stream whose engine tells no ids: its text, until it is to move. Then it is told again and compared,
//! or ids are looked for: of the prompt as routing knows them, of the text by the model's own tokenizer.

use super::{
    Policy,
    piece::{Again, read},
    resume::Call,
};
use crate::{
    endpoints::{Endpoint, Level},
    openai::{Api, OpenAiRequest, Prompt},
    tokens::Source,
};
use http::HeaderMap;
use outrigger_xds::report::{EngineId, EngineKind};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Fields that, where they are false, have something left out of the text, or put into it.
const HIDING: [&str; 4] = [
    "include_reasoning",
    "separate_reasoning",
    "stream_reasoning",
    "skip_special_tokens",
];

/// What ids can be made of, should they be needed.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    /// Those of the prompt, if routing needed them.
    prompt: Option<Arc<[u32]>>,
    /// What was delivered, as it stands within strings of JSON.
    text: Vec<u8>,
    /// Ids may be made of it.
    pub(super) retells: bool,
    /// It comes again if the request is sent again.
    pub(super) compares: bool,
}

impl Kept {
    pub(super) fn new(prompt: Option<Arc<[u32]>>, retells: bool, compares: bool) -> Self {
        Self {
            prompt,
            text: Vec::new(),
            retells,
            compares,
        }
    }

    /// The text of one more event, with its quotes, less so many characters that are here.
    pub(super) fn take_in(&mut self, quoted: &[u8], known: usize) {
        let rest = (known > 0).then(|| rest(quoted, known).unwrap_or_default());
        let news = rest.as_deref().map_or(quoted, str::as_bytes);
        let inner = news.get(1..news.len().saturating_sub(1));
        self.text.extend_from_slice(inner.unwrap_or_default());
    }

    /// What another engine is to tell again.
    pub(super) fn again(&self) -> Option<Again> {
        Again::of(&self.text)
    }

    /// The same, with the prompt's ids, which need not be looked for again.
    pub(super) fn with(self, prompt: Arc<[u32]>) -> Self {
        Self {
            prompt: Some(prompt),
            ..self
        }
    }

    /// What it holds.
    pub(super) fn bytes(&self) -> usize {
        let prompt = self.prompt.as_deref().map_or(0, size_of_val);
        self.text.len() + prompt
    }

    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
}

/// A string of JSON less so many characters, if that leaves some.
fn rest(quoted: &[u8], known: usize) -> Option<String> {
    let text = read(quoted)?;
    let (at, _) = text.char_indices().nth(known)?;
    serde_json::to_string(&text[at..]).ok()
}

/// Ids as they stand in a list, each with a comma behind it.
pub(super) fn list(ids: &[u32]) -> Vec<u8> {
    let mut text = Vec::with_capacity(ids.len() * 6);
    let mut digits = itoa::Buffer::new();
    for id in ids {
        text.extend_from_slice(digits.format(*id).as_bytes());
        text.push(b',');
    }
    text
}

/// All that the stream's engine had of it.
pub(super) struct Told {
    pub(super) prompt: Arc<[u32]>,
    pub(super) ids: Vec<u32>,
}

impl Policy {
    /// Whether a stream whose engine tells no ids comes again if it is asked for again: one text, and its tokens are
    /// determined.
    pub(super) fn may_compare(openai: &OpenAiRequest) -> bool {
        let one = matches!(
            openai.prompt,
            Prompt::Messages | Prompt::Text | Prompt::TokenIds
        );
        let determined = openai.greedy || openai.has_seed;
        one && openai.n == 1 && determined && !openai.return_token_ids
    }

    /// Whether a chat whose engine tells no ids may go on by those of a tokenizer of our own: it is one text, engines
    /// that may get it go on from ids, and a tokenizer is here, or will be.
    pub(super) fn may_tell(
        &self,
        openai: &OpenAiRequest,
        cluster: &str,
        headers: &HeaderMap,
    ) -> bool {
        let one = openai.api == Api::Chat && openai.n == 1 && openai.prompt == Prompt::Messages;
        let resumes = |kind| matches!(kind, EngineKind::Vllm | EngineKind::Sglang);
        if !one || openai.return_token_ids || !self.all_are(openai, cluster, resumes) {
            return false;
        }
        let Some(endpoint) = whom_to_ask(self, openai, cluster, None) else {
            return false;
        };
        let source = self.source(&endpoint, headers);
        self.services.tokenizers.may_know(openai, source)
    }

    fn source<'a>(&'a self, endpoint: &'a Arc<Endpoint>, headers: &'a HeaderMap) -> Source<'a> {
        Source {
            endpoint,
            headers,
            ask: true,
            services: &self.services,
        }
    }
}

/// The ids of prompt and text.
///
/// # Errors
/// Why there are none, in one word as in metrics.
pub(super) async fn tell(
    call: Arc<Call>,
    openai: Arc<OpenAiRequest>,
    kept: Kept,
    lost_by: Option<EngineId>,
) -> Result<Told, &'static str> {
    if !shows_all(&openai) {
        return Err("not_verified");
    }
    let policy = &call.policy;
    let tokenizers = &policy.services.tokenizers;
    let endpoint = whom_to_ask(policy, &openai, call.cluster(), lost_by.as_ref());
    let endpoint = endpoint.ok_or("not_verified")?;
    let source = policy.source(&endpoint, call.headers());
    let prompt = match kept.prompt {
        Some(prompt) => prompt,
        None => {
            let known = tokenizers.tokens(&openai, source).await;
            known.map_err(|_| "no_token_ids")?.ids
        }
    };
    let ids = tokenizers
        .generated(&openai, prompt.clone(), kept.text, source)
        .await;
    match ids.filter(|ids| !ids.is_empty()) {
        Some(ids) => Ok(Told { prompt, ids }),
        None if !tokenizers.may_know(&openai, source) => Err("no_token_ids"),
        None => Err("not_verified"),
    }
}

/// Whether the client asked to have all that is generated told, and as text alone.
fn shows_all(openai: &OpenAiRequest) -> bool {
    let body = openai.body.as_deref().unwrap_or_default();
    let Ok(fields) = serde_json::from_slice::<Map<String, Value>>(body) else {
        return false;
    };
    let off = |name: &&str| fields.get(*name) == Some(&Value::Bool(false));
    !HIDING.iter().any(off)
}

/// An engine that serves the model, and is well; not the one that lost the stream, where there is another.
fn whom_to_ask(
    policy: &Policy,
    openai: &OpenAiRequest,
    cluster: &str,
    lost_by: Option<&EngineId>,
) -> Option<Arc<Endpoint>> {
    let view = policy.services.endpoints.view(cluster)?;
    let model = openai.model.as_deref();
    let serving = view
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.fits(model));
    serving
        .min_by_key(|endpoint| {
            let well = matches!(endpoint.level(), Level::Healthy | Level::Degraded);
            (!well, Some(&endpoint.id) == lost_by)
        })
        .cloned()
}
