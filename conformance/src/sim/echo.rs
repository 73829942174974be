//! Answers "what does the model think of this prompt": the figures of its tokens, for `echo` with `logprobs`.
//!
//! A token the model would have chosen itself has rank 1; any other a rank behind those that are told.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use super::engine::Engine;
use super::model::{History, mix};
use super::tokenizer::Tokenizer;

/// Ranks of unlikely tokens lie within so many behind the first ones.
const RANKS: u64 = 1000;

/// One token of a prompt, and what the model would rather have seen.
#[derive(Debug, Serialize)]
struct Figure {
    logprob: f64,
    rank: usize,
    decoded_token: String,
}

/// The figures at one place of a prompt: of the token that stands there, then of the likeliest, by token.
#[derive(Debug)]
pub(crate) struct Place(Vec<(u32, Figure)>);

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, figure) in &self.0 {
            map.serialize_entry(&token.to_string(), figure)?;
        }
        map.end()
    }
}

impl Place {
    /// The logarithm of the probability of the token that stands there.
    pub(crate) fn logprob(&self) -> Option<f64> {
        self.0.first().map(|(_, figure)| figure.logprob)
    }

    /// Texts and logarithms, as `logprobs` of `/v1/completions` tells them.
    pub(crate) fn by_text(&self) -> Vec<(String, f64)> {
        let by_text = |(_, figure): &(u32, Figure)| (figure.decoded_token.clone(), figure.logprob);
        self.0.iter().map(by_text).collect()
    }
}

/// Figures of every token of `prompt` with `top` likelier ones; none for the first, which nothing precedes.
pub(crate) fn prompt_places(engine: &Engine, prompt: &[u32], top: usize) -> Vec<Option<Place>> {
    let mut history = History::of(&[]);
    let mut places = Vec::with_capacity(prompt.len());
    for (at, &token) in prompt.iter().enumerate() {
        places.push((at > 0).then(|| place(engine, &history, token, top)));
        history.push(token);
    }
    places
}

fn place(engine: &Engine, history: &History, token: u32, top: usize) -> Place {
    let choice = engine.model.next(history, 0, true, top.saturating_sub(1));
    let mut likely = vec![(choice.token, choice.logprob)];
    likely.extend(choice.runners_up);
    let last = likely.last().map_or(0.0, |(_, logprob)| *logprob);
    let rank = likely.iter().position(|(other, _)| *other == token);
    let bits = mix(history.hash() ^ u64::from(token));
    let (rank, logprob) = rank.map_or_else(
        || {
            let behind = 1 + bits % RANKS;
            (likely.len() + behind as usize, last - behind as f64 / 64.0)
        },
        |rank| (rank + 1, likely[rank].1),
    );
    let figure = |tokenizer: &Tokenizer, token, logprob, rank| {
        let decoded_token = tokenizer.decode(&[token]);
        let figure = Figure {
            logprob,
            rank,
            decoded_token,
        };
        (token, figure)
    };
    let tokenizer = &engine.tokenizer;
    let mut place = vec![figure(tokenizer, token, logprob, rank)];
    for (at, (other, logprob)) in likely.into_iter().take(top).enumerate() {
        // Runners-up may repeat a token; a map cannot.
        if place.iter().all(|(known, _)| *known != other) {
            place.push(figure(tokenizer, other, logprob, at + 1));
        }
    }
    Place(place)
}
