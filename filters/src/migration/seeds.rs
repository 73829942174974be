//! Seeds for streams whose client gave none, so that what was drawn can be drawn again: who is given one, and engines that
//! refuse them.

use super::{
    Policy,
    recipe::{self, Recipe, Way},
    resume::{Call, ERROR_BYTES_MAX, ERROR_WAIT},
    whole::Gathered,
};
use crate::{
    body::{ResponseBody, is_over},
    error::Error,
    filter::{Context, Next},
    openai::{OpenAiRequest, Prompt},
    sse,
};
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use outrigger_xds::report::EngineKind;
use serde::Deserialize;
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

/// For so long a model's engines are given no seeds after one of them refused one.
const REFUSED_FOR: Duration = Duration::from_secs(600);
/// Models that are remembered so.
const REFUSALS_MAX: usize = 64;

/// Which drawn streams are given a seed where their client gave none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Seeds {
    /// None.
    Never,
    /// Those that could not go on elsewhere otherwise.
    #[default]
    WhereNeeded,
    /// All.
    Always,
}

impl Policy {
    /// The seed of a stream that has none, where that is wanted, and engines keep to it.
    pub(super) fn seed(&self, openai: &OpenAiRequest, cluster: &str) -> Option<u32> {
        let wanted = match self.config.seeds {
            Seeds::Never => false,
            Seeds::WhereNeeded => is_needed(openai, self.config.same_distribution),
            Seeds::Always => true,
        };
        if !wanted || !is_of_use(openai) {
            return None;
        }
        let keeps = |kind| kind == EngineKind::Vllm;
        let refused = &self.services.migration.seed_refusals;
        let given = self.all_are(openai, cluster, keeps) && !refused.has(openai, cluster);
        given.then(|| rand::random::<u32>() >> 1)
    }
}

/// Whether a stream that is drawn by chance may come to where it could only be drawn again.
fn is_needed(openai: &OpenAiRequest, same_distribution: bool) -> bool {
    let sampling = &openai.sampling;
    // What is shown of tokens, or held back of text, binds those behind the last place to cut at.
    let shown = sampling.logprobs || openai.return_token_ids;
    let held_back = recipe::asked(openai).margin > 0;
    sampling.stateful
        || sampling.may_call
        || sampling.penalties && !same_distribution
        || shown
        || held_back
}

/// Whether a seed helps: nothing else makes its tokens certain, or forbids that it goes on.
fn is_of_use(openai: &OpenAiRequest) -> bool {
    let one = matches!(
        openai.prompt,
        Prompt::Messages | Prompt::Text | Prompt::TokenIds
    );
    one && openai.n == 1 && !openai.has_seed && !openai.sampling.greedy && !openai.one_engine
}

/// A model of a cluster, one of whose engines refused a seed.
#[derive(Debug, Clone)]
struct Refusal {
    cluster: Box<str>,
    model: Option<Arc<str>>,
    until: Instant,
}

impl Refusal {
    fn is_of(&self, openai: &OpenAiRequest, cluster: &str) -> bool {
        *self.cluster == *cluster && self.model == openai.model
    }
}

/// Whose engines refuse seeds, as far as is known. Read by every stream that may be given one.
#[derive(Debug, Default)]
pub(super) struct Refusals(ArcSwap<Vec<Refusal>>);

impl Refusals {
    fn has(&self, openai: &OpenAiRequest, cluster: &str) -> bool {
        let known = self.0.load();
        known
            .iter()
            .any(|known| known.is_of(openai, cluster) && Instant::now() < known.until)
    }

    /// An engine refused a seed.
    pub(super) fn note(&self, openai: &OpenAiRequest, cluster: &str) {
        metrics::counter!("outrigger_migration_seeds_refused_total").increment(1);
        tracing::info!(cluster, model = ?openai.model, "an engine takes no seeds: none are given for a while");
        let now = Instant::now();
        self.0.rcu(|known| {
            let others = known.iter().filter(|known| !known.is_of(openai, cluster));
            let mut known: Vec<_> = others.filter(|known| now < known.until).cloned().collect();
            if known.len() >= REFUSALS_MAX {
                known.remove(0);
            }
            known.push(Refusal {
                cluster: cluster.into(),
                model: openai.model.clone(),
                until: now + REFUSED_FOR,
            });
            known
        });
    }
}

/// Whether an answer says that the request is wrong. It may be for the seed.
pub(super) fn may_refuse(response: &Response<ResponseBody>) -> bool {
    is_blame(response.status())
}

fn is_blame(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY
    )
}

/// Whether an event is that answer of an engine that had begun a stream before it looked (vLLM does so).
pub(super) fn is_refusal(event: &sse::Event<'_>) -> bool {
    event.is_error() && event.blames_request() && names_seed(event.data())
}

fn names_seed(words: &[u8]) -> bool {
    words
        .windows(4)
        .any(|word| word.eq_ignore_ascii_case(b"seed"))
}

/// The answer to the request without our seed, where that may be what was wrong with it; else the one that came.
pub(super) async fn ask_without(
    call: &Arc<Call>,
    openai: &OpenAiRequest,
    context: &mut Context,
    response: Response<ResponseBody>,
) -> Result<Response<ResponseBody>, Error> {
    let (response, words) = read_words(call, response).await;
    if !names_seed(&words) {
        return Ok(response);
    }
    call.drop_seed();
    let (request, mut attempt) = call.first_unseeded();
    let answer = Next::new(call.chain()).run(request, &mut attempt).await;
    // Engines may quote the whole request: only where it is well without the seed was it the seed.
    if matches!(&answer, Ok(response) if response.status().is_success()) {
        let refusals = &call.policy.services.migration.seed_refusals;
        refusals.note(openai, call.cluster());
    }
    // Of the call that came to nothing.
    context.observers.clear();
    context.adopt(attempt);
    answer
}

/// Whether an engine refused our seed when a stream was to begin anew there. What has not begun goes on without it.
pub(super) async fn is_refused(
    call: &Call,
    recipe: &Recipe,
    response: Response<ResponseBody>,
) -> bool {
    let status = response.status();
    if !call.has_our_seed() || recipe.way != Way::Restart || !is_blame(status) {
        return false;
    }
    let (_, words) = read_words(call, response).await;
    if !names_seed(&words) {
        return false;
    }
    note(call, &recipe.openai, recipe.compared);
    true
}

/// A model's engines get no more seeds for a while; nor does this request, if nothing that it told was drawn by one.
pub(super) fn note(call: &Call, openai: &OpenAiRequest, began: bool) {
    let refusals = &call.policy.services.migration.seed_refusals;
    refusals.note(openai, call.cluster());
    if !began {
        call.drop_seed();
    }
}

/// An answer as it came, and what it says, as far as that is short and comes at once.
async fn read_words(
    call: &Call,
    response: Response<ResponseBody>,
) -> (Response<ResponseBody>, Bytes) {
    let (parts, mut rest) = response.into_parts();
    let mut pieces = VecDeque::new();
    let mut trailers = None;
    let mut bytes = 0;
    let reading = async {
        while !is_over(&rest) && bytes < ERROR_BYTES_MAX {
            match rest.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        bytes += data.len();
                        pieces.push_back(data);
                    }
                    Err(last) => trailers = Some(last),
                },
                Some(Err(error)) => return Some(error),
                None => return None,
            }
        }
        None
    };
    let broke = tokio::time::timeout(ERROR_WAIT, reading).await;
    let words = pieces.iter().map(Bytes::as_ref).collect::<Vec<_>>();
    let words = words.concat().into();
    if let Ok(Some(error)) = broke {
        // As it would have reached the client.
        let broken = StreamBody::new(futures_util::stream::iter([Err(error)]));
        rest = broken.boxed_unsync();
    }
    let body = Gathered::unheld(call, pieces, trailers, rest);
    (Response::from_parts(parts, body.boxed_unsync()), words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(model: &str) -> OpenAiRequest {
        OpenAiRequest {
            model: Some(model.into()),
            ..OpenAiRequest::default()
        }
    }

    #[test]
    fn refusals_are_of_a_model_in_a_cluster_and_few() {
        let refusals = Refusals::default();
        refusals.note(&of("first"), "fleet");
        refusals.note(&of("first"), "fleet");
        assert!(refusals.has(&of("first"), "fleet"));
        assert!(!refusals.has(&of("first"), "other") && !refusals.has(&of("second"), "fleet"));
        for at in 0..REFUSALS_MAX {
            refusals.note(&of(&at.to_string()), "fleet");
        }
        assert_eq!(refusals.0.load().len(), REFUSALS_MAX);
        assert!(
            !refusals.has(&of("first"), "fleet"),
            "the oldest is forgotten"
        );
    }

    #[test]
    fn a_refusal_names_the_seed() {
        let said = |words: &str| {
            format!("data: {{\"error\":{{\"message\":\"{words}\",\"code\":400}}}}\n\n")
        };
        for (words, refused) in [("no per-request Seed", true), ("no", false), ("see", false)] {
            let raw = said(words);
            let event = sse::Event {
                raw: raw.as_bytes(),
            };
            assert_eq!(is_refusal(&event), refused, "{words}");
        }
    }
}
