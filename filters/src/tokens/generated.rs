//! Text that a model generated, back to its token ids: proven by decoding them, or not at all.
//!
//! What it does not do: ask an engine. Engines tell the ids of a text, but nobody here could tell whether they are right.

use super::{
    Source, Tokenizers,
    local::{Kind, LocalModel},
    root,
    verify::{Trust, Verified},
};
use crate::openai::OpenAiRequest;
use fastokens::AddedTokenPolicy;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// A character has four bytes, and a token may be any of them.
const TOKENS_OF_A_CHARACTER_MAX: usize = 4;
/// How far behind its end a prompt may close the reasoning that its template opened: the mark and blank lines.
const CLOSED_TOKENS_MAX: usize = 4;
/// Marks of what models say before, or beside, their answer. Engines take it out of the text, the marks with it, and say
/// nothing of it where it is empty. What ends it, if anything.
const MARKS: [(&str, &str); 7] = [
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>", ""),
    ("<|channel>", ""),
];
/// Between two looks at a tokenizer that is being loaded or verified.
const LOOK: Duration = Duration::from_millis(10);

impl Tokenizers {
    /// Whether a tokenizer on this machine knows the model, or may know it in a moment: who asks first sets it loading.
    pub(crate) fn may_know(&self, request: &OpenAiRequest, source: Source<'_>) -> bool {
        if self.loaded(request, source).is_some() {
            return true;
        }
        let live = source.endpoint.live.load();
        let model = request.model.as_deref();
        let root = model.and_then(|model| root(&live.state, model));
        root.is_some_and(|root| {
            let loading = self.local.load().get(&root).cloned();
            loading.is_some_and(|loading| loading.get().is_none())
        })
    }

    /// The ids of text that the request's model generated behind a prompt, given as the inside of a JSON string. `None`:
    /// nothing proves any, or not those of the prompt.
    pub(crate) async fn generated(
        &self,
        request: &OpenAiRequest,
        prompt: Arc<[u32]>,
        escaped: Vec<u8>,
        source: Source<'_>,
    ) -> Option<Vec<u32>> {
        let model = self.trusted(request, source).await?;
        let kind = Kind::of(request);
        if kind.is_some_and(|kind| model.trust(kind) == Trust::Assumed) {
            return None;
        }
        if escaped.len() <= self.config.inline_bytes_max {
            return ids(&model.local, &prompt, &escaped);
        }
        let job = move || ids(&model.local, &prompt, &escaped);
        source.services.compute.spawn_blocking(job).await.ok()?
    }
}

impl Tokenizers {
    /// The local tokenizer, if it is trusted with text. Whoever moves a stream may wait for that, and for others who wait.
    async fn trusted(&self, request: &OpenAiRequest, source: Source<'_>) -> Option<Arc<Verified>> {
        let until = Instant::now() + self.config.engine_timeout;
        loop {
            let model = self.loaded(request, source);
            match model.as_ref().map(|model| model.trust(Kind::Text)) {
                Some(Trust::Trusted) => return model,
                Some(Trust::Unknown) if self.config.engines => {
                    let model = model?;
                    let again_after = self.config.verify_again_after;
                    model
                        .verify(Kind::Text, request, source, &self.asker, again_after)
                        .await;
                    if model.trust(Kind::Text) == Trust::Unknown {
                        return None;
                    }
                }
                Some(Trust::Asking) => tokio::time::sleep(LOOK).await,
                Some(Trust::Unknown | Trust::Distrusted | Trust::Assumed) => return None,
                None if self.may_know(request, source) => tokio::time::sleep(LOOK).await,
                None => return None,
            }
            if Instant::now() >= until {
                return None;
            }
        }
    }
}

fn ids(model: &LocalModel, prompt: &[u32], escaped: &[u8]) -> Option<Vec<u32>> {
    if model.may_hide(prompt) {
        return None;
    }
    let quoted = [b"\"", escaped, b"\""].concat();
    let text: String = serde_json::from_slice(&quoted).ok()?;
    let ids = model.encode_generated(&text);
    ids.inspect_err(|error| tracing::debug!(error, "generated text has no ids that are proven"))
        .ok()
}

impl LocalModel {
    /// Whether a model may have said something behind the prompt that is not in its text. Where an engine parses
    /// reasoning is not known here: so wherever the model knows marks of it, unless the prompt itself has closed it.
    fn may_hide(&self, prompt: &[u32]) -> bool {
        let end = &prompt[prompt.len().saturating_sub(CLOSED_TOKENS_MAX)..];
        let Ok(end) = self.tokenizer.decode(end, false) else {
            return true;
        };
        MARKS.iter().any(|(open, close)| {
            let closed = Some(*close).filter(|close| !close.is_empty());
            match (end.rfind(open), closed.and_then(|close| end.rfind(close))) {
                (Some(open), closed) => closed.is_none_or(|closed| closed < open),
                (None, Some(_)) => false,
                (None, None) => self.tokenizer.token_to_id(open).is_some(),
            }
        })
    }

    /// The ids of text that the model generated. Names of control tokens are text there, since engines leave the tokens out.
    fn encode_generated(&self, text: &str) -> Result<Vec<u32>, String> {
        let encode = |text: &str| {
            let ids = self
                .tokenizer
                .encode_with_policy(text, false, AddedTokenPolicy::SkipSpecial);
            ids.map_err(|error| error.to_string())
        };
        let decode = |ids: &[u32]| {
            let text = self.tokenizer.decode(ids, false);
            text.map_err(|error| error.to_string())
        };
        let ids = encode(text)?;
        if decode(&ids)? != text {
            return Err("they are the ids of another text".into());
        }
        // What came first, tokenised alone, has the same ids: so nothing that follows changed them, nor will.
        let shorter = ids.len().saturating_sub(TOKENS_OF_A_CHARACTER_MAX)..ids.len();
        for length in shorter.rev() {
            let first = decode(&ids[..length])?;
            if text.starts_with(&first) {
                let stable = encode(&first)? == ids[..length];
                return stable
                    .then_some(ids)
                    .ok_or_else(|| "what follows changes them".into());
            }
        }
        Err("no token ends where a character does".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> LocalModel {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/assets");
        let directory = std::path::Path::new(path);
        LocalModel::load(directory, 0).unwrap()
    }

    #[test]
    fn ids_decode_to_the_text() {
        let model = model();
        for text in [
            "The sky",
            "one, two.\n\n",
            "a 🎨 b",
            "🎨",
            "\"\\ 12345",
            "x",
        ] {
            let ids = model.encode_generated(text).unwrap();
            assert_eq!(model.tokenizer.decode(&ids, false).unwrap(), text);
        }
    }

    #[test]
    fn the_name_of_a_control_token_is_text() {
        let model = model();
        let ids = model.encode_generated("<|im_end|>").unwrap();
        assert!(ids.len() > 1, "{ids:?}");
    }

    #[test]
    fn text_behind_an_open_mark_is_not_all() {
        let model = model();
        for (prompt, hides) in [
            ("Hi.\n", false),
            ("Hi.<think>", true),
            ("<think></think>", false),
            ("</think><think>", true),
            ("<|channel|>", true),
        ] {
            // The model has no such tokens: each stands for itself here.
            let ids = model.tokenizer.encode(prompt).unwrap();
            let end = &prompt[prompt.len().saturating_sub(7)..];
            let told = model.may_hide(&ids);
            // Of a mark in pieces only the last four are looked at.
            assert!(
                told == hides || ids.len() > CLOSED_TOKENS_MAX,
                "{end}: {ids:?}"
            );
        }
    }

    #[test]
    fn text_that_is_no_json_has_no_ids() {
        assert_eq!(ids(&model(), &[], b"a\\"), None);
        assert_eq!(
            ids(&model(), &[], br#"\ud83c\udfa8"#),
            model().encode_generated("🎨").ok()
        );
    }
}
