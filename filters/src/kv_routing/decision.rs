//! One decision: blocks of the prompt, overlap and load of each candidate, their costs, the ranking, and its record.

use super::{
    BYTES_PER_TOKEN, Config,
    cost::{self, Inputs},
    sent::{Amount, Sent},
};
use crate::{
    endpoints::{Endpoint, Live, Via},
    filter::{Context, PromptFacts, Ranked},
    kv_index::{Flight, Overlap, Overlaps, Shared},
    openai::OpenAiRequest,
    services::Services,
};
use outrigger_xds::block_hash::{self, BlockHash, Namespace};
use serde::Serialize;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Prompts of more tokens are hashed off the request's thread (some 60 ns a block).
const INLINE_HASH_TOKENS_MAX: usize = 32 << 10;
/// An engine's own figures older than this correct nothing: it is polled every half second.
const FIGURES_AGE_MAX: Duration = Duration::from_secs(5);
/// Costs are compared in units of this many blocks, so that rounding errors make no difference.
const COST_GRAIN: f64 = 1e-6;

/// What a prompt is cut into.
pub(super) enum Blocks {
    /// Its tokens: exact.
    Tokens(Arc<[u32]>),
    /// The bytes of its JSON: good for remembering where it went, for nothing else.
    Bytes(Arc<OpenAiRequest>),
}

impl Blocks {
    pub(super) fn tokens(ids: Arc<[u32]>) -> Self {
        Self::Tokens(ids)
    }

    pub(super) fn bytes(request: Arc<OpenAiRequest>) -> Self {
        Self::Bytes(request)
    }

    fn is_exact(&self) -> bool {
        matches!(self, Self::Tokens(_))
    }

    fn ids(&self) -> Option<Arc<[u32]>> {
        match self {
            Self::Tokens(ids) => Some(ids.clone()),
            Self::Bytes(_) => None,
        }
    }

    fn prompt_tokens(&self) -> u64 {
        match self {
            Self::Tokens(ids) => ids.len() as u64,
            Self::Bytes(request) => request.estimated_prompt_tokens(),
        }
    }

    /// Hashes of all full blocks under `seed`.
    async fn chain(
        &self,
        seed: BlockHash,
        block_tokens: usize,
        services: &Services,
    ) -> Arc<[BlockHash]> {
        match self {
            Self::Tokens(ids) if ids.len() <= INLINE_HASH_TOKENS_MAX => {
                block_hash::chain(seed, ids, block_tokens).into()
            }
            Self::Tokens(ids) => {
                let ids = ids.clone();
                let job = services
                    .compute
                    .spawn_blocking(move || block_hash::chain(seed, &ids, block_tokens));
                job.await.unwrap_or_default().into()
            }
            Self::Bytes(request) => byte_chain(seed, request, block_tokens * BYTES_PER_TOKEN),
        }
    }
}

/// As [`block_hash::chain`], over the bytes of what makes the prompt. A conversation that grows keeps its beginning.
fn byte_chain(seed: BlockHash, request: &OpenAiRequest, block_bytes: usize) -> Arc<[BlockHash]> {
    let hash = xxhash_rust::xxh3::xxh3_64_with_seed;
    let mut parent = seed;
    for span in [&request.spans.system, &request.spans.tools] {
        parent = hash(
            request.raw(span.as_ref()).unwrap_or_default().as_bytes(),
            parent,
        );
    }
    let prompt = request
        .raw(request.spans.prompt.as_ref())
        .unwrap_or_default();
    let blocks = prompt.as_bytes().chunks_exact(block_bytes.max(1));
    blocks
        .map(|block| {
            parent = hash(block, parent);
            parent
        })
        .collect()
}

pub(super) struct Decider<'a> {
    pub(super) config: &'a Config,
    pub(super) sent: &'a Sent,
    /// The data-parallel rank that the client asks for.
    pub(super) rank: Option<u32>,
    pub(super) services: &'a Services,
}

/// One candidate while it is weighed.
struct Candidate {
    endpoint: Arc<Endpoint>,
    live: Arc<Live>,
    namespace: Namespace,
    overlap: Overlap,
    shared: Shared,
    rank: Option<u32>,
    /// Where its cache is known.
    hit_tokens: Option<u64>,
    inputs: Inputs,
    cost: f64,
    inhibited: bool,
    active: u64,
    dice: u32,
}

/// A chain and the name space it belongs to.
type Chains = Vec<(Namespace, Arc<[BlockHash]>)>;

impl Decider<'_> {
    /// Weighs the candidates and leaves ranking, prompt facts and record in the context. The answer keeps the prompt's
    /// blocks in flight at the best one.
    #[expect(
        clippy::too_many_arguments,
        reason = "the inputs of one decision, used once"
    )]
    pub(super) async fn decide(
        &self,
        endpoints: &[Arc<Endpoint>],
        model: &str,
        salt: Option<&str>,
        blocks: Blocks,
        context: &mut Context,
        how: &'static str,
        started: Instant,
    ) -> Option<Flight> {
        let mut candidates: Vec<Candidate> = endpoints
            .iter()
            .map(|endpoint| Candidate::new(endpoint, model, salt))
            .collect();
        let mut chains = Chains::new();
        for candidate in &candidates {
            if !chains
                .iter()
                .any(|(namespace, _)| *namespace == candidate.namespace)
            {
                let seed = candidate.namespace.seed();
                let chain = blocks
                    .chain(seed, self.config.block_tokens, self.services)
                    .await;
                chains.push((candidate.namespace.clone(), chain));
            }
        }
        self.overlap(&mut candidates, &chains, blocks.is_exact());
        self.weigh(&mut candidates, blocks.prompt_tokens(), blocks.is_exact());
        self.rank(&mut candidates);
        self.conclude(&candidates, &chains, &blocks, context, how, started)
    }

    /// Looks up what each candidate holds (what engines told, or else what was sent to them), and what of it this proxy has
    /// in flight there.
    fn overlap(&self, candidates: &mut [Candidate], chains: &Chains, exact: bool) {
        let mut found = Overlaps::default();
        for (namespace, chain) in chains {
            let same = || {
                candidates
                    .iter()
                    .filter(|candidate| candidate.namespace == *namespace)
            };
            let told = exact && same().any(|candidate| candidate.live.state.kv_events);
            let untold = !exact || same().any(|candidate| !candidate.live.state.kv_events);
            if told {
                self.services.kv_index.overlaps(chain, &mut found);
            }
            let guessed = if untold {
                self.services.kv_index.guessed(chain)
            } else {
                Vec::new()
            };
            for candidate in candidates
                .iter_mut()
                .filter(|candidate| candidate.namespace == *namespace)
            {
                let slot = candidate.endpoint.slot;
                candidate.shared = self.services.kv_index.in_flight(slot, chain);
                if exact && candidate.live.state.kv_events {
                    candidate.take_best_rank(found.of(slot), &self.config.weights, self.rank);
                } else if let Some((_, run)) = guessed.iter().find(|(other, _)| *other == slot) {
                    candidate.overlap = Overlap {
                        slot,
                        device: *run,
                        ..Overlap::default()
                    };
                }
            }
        }
    }

    fn weigh(&self, candidates: &mut [Candidate], prompt_tokens: u64, exact: bool) {
        let block_tokens = self.config.block_tokens as f64;
        for candidate in &mut *candidates {
            candidate.inputs = self.inputs(candidate, prompt_tokens);
            if exact && candidate.live.state.kv_events {
                let blocks = u64::from(candidate.overlap.blocks());
                candidate.hit_tokens = Some(hit_tokens(
                    blocks * self.config.block_tokens as u64,
                    prompt_tokens,
                    candidate.live.state.block_tokens,
                    self.config.block_tokens as u64,
                ));
            }
        }
        let min = candidates
            .iter()
            .map(|candidate| candidate.inputs.prefill_tokens)
            .fold(f64::INFINITY, f64::min);
        for candidate in candidates {
            candidate.cost = cost::cost(&self.config.weights, block_tokens, &candidate.inputs, min);
        }
    }

    /// Load as told, and what this router sent since. Of an endpoint nothing is told of, only the latter is known.
    ///
    /// Nothing is taken as less than what this router itself has in flight there: that covers what was on its way while
    /// the report was. Requests are also never fewer than the engine itself counted when it was last polled: it knows of
    /// those that were sent to it past all proxies. The engine's share of used blocks corrects nothing: it counts
    /// generated blocks, and half a second after a conversation's turn it would still drive the next turn away.
    fn inputs(&self, candidate: &mut Candidate, prompt_tokens: u64) -> Inputs {
        let Candidate {
            endpoint,
            live,
            overlap,
            shared,
            ..
        } = candidate;
        let stats = &endpoint.stats;
        let own_prefill = stats.prefill_tokens.load(Relaxed);
        let own_active = stats.active.load(Relaxed);
        let since = self.sent.since(endpoint.slot, live.load_at);
        let (prefill, blocks, requests) = if live.heard {
            let load = &live.load;
            let known = load.active_requests.max(counted_by_engine(live));
            (
                (load.active_prefill_tokens + since.prefill_tokens).max(own_prefill),
                (load.active_blocks + since.blocks).max(shared.distinct),
                (known + since.requests).max(own_active),
            )
        } else {
            (own_prefill, shared.distinct, own_active)
        };
        candidate.active = requests;
        // Load is told per engine; its ranks share it evenly as far as we can know.
        let share = 1.0 / f64::from(live.state.dp_size.max(1));
        Inputs {
            prompt_tokens: prompt_tokens as f64,
            device: f64::from(overlap.device),
            host: f64::from(overlap.host_extra),
            disk: f64::from(overlap.disk_extra),
            remote: f64::from(overlap.remote_extra),
            prefill_tokens: prefill as f64 * share,
            active_blocks: blocks as f64 * share,
            shared_blocks: f64::from(shared.prefix),
            active_requests: requests as f64 * share,
        }
    }

    /// Best first. Those that failed a moment ago come last; ties go to the engine beside us, then to the least
    /// active, then by chance.
    fn rank(&self, candidates: &mut Vec<Candidate>) {
        candidates.sort_by(|a, b| {
            let cost = |candidate: &Candidate| (candidate.cost / COST_GRAIN).round();
            let away = |candidate: &Candidate| candidate.endpoint.via != Via::Local;
            a.inhibited
                .cmp(&b.inhibited)
                .then(cost(a).total_cmp(&cost(b)))
                .then(away(a).cmp(&away(b)))
                .then(a.active.cmp(&b.active))
                .then(a.dice.cmp(&b.dice))
        });
        let temperature = self.config.weights.temperature;
        if temperature > 0.0 {
            let fresh: Vec<f64> = candidates
                .iter()
                .filter(|candidate| !candidate.inhibited)
                .map(|candidate| candidate.cost)
                .collect();
            let dice = f64::from(dice()) / f64::from(u32::MAX);
            if let Some(index) = cost::sample(&fresh, temperature, dice) {
                let chosen = candidates.remove(index);
                candidates.insert(0, chosen);
            }
        }
    }

    fn conclude(
        &self,
        candidates: &[Candidate],
        chains: &Chains,
        blocks: &Blocks,
        context: &mut Context,
        how: &'static str,
        started: Instant,
    ) -> Option<Flight> {
        let winner = candidates.first()?;
        let chain = chains
            .iter()
            .find(|(namespace, _)| *namespace == winner.namespace);
        let chain = chain.map(|(_, chain)| chain.clone()).unwrap_or_default();
        let prompt_tokens = blocks.prompt_tokens();
        if !blocks.is_exact() || !winner.live.state.kv_events {
            self.services.kv_index.guess(&chain, winner.endpoint.slot);
        }
        let amount = Amount {
            prefill_tokens: prompt_tokens.saturating_sub(winner.hit_tokens.unwrap_or(0)),
            blocks: prompt_tokens
                .div_ceil(self.config.block_tokens as u64)
                .saturating_sub(winner.shared.prefix.into()),
            requests: 1,
        };
        self.sent
            .note(winner.endpoint.slot, winner.live.load_at, amount);
        let told = chain.len().min(self.config.tell_blocks_max);
        // As many as the proxy beside the engine learns of: then both count alike.
        let chain: Arc<[BlockHash]> = if told == chain.len() {
            chain
        } else {
            chain[..told].into()
        };
        let flight =
            (told > 0).then(|| (self.services.kv_index).enter(winner.endpoint.slot, chain.clone()));
        context.prompt = PromptFacts {
            tokens: prompt_tokens,
            blocks: if blocks.is_exact() {
                chain
            } else {
                Arc::default()
            },
            ids: context.keeps_prompt_ids.then(|| blocks.ids()).flatten(),
        };
        context.log.hit_tokens_predicted = winner.hit_tokens;
        context.ranked = candidates.iter().map(Candidate::ranked).collect();
        let record = Record {
            policy: "kv",
            how,
            exact: blocks.is_exact(),
            prompt_tokens,
            candidates: candidates.len(),
            winner: winner.entry(),
            runner_up: candidates.get(1).map(Candidate::entry),
            decision_us: started.elapsed().as_micros() as u64,
        };
        context.log.routing_decision = serde_json::to_string(&record).ok().map(Into::into);
        flight
    }
}

/// Requests running and waiting, as the engine itself said last; 0 if that is not known or too long ago.
fn counted_by_engine(live: &Live) -> u64 {
    match live.load.engine_age {
        Some(age) if age + live.load_at.elapsed() <= FIGURES_AGE_MAX => {
            live.load.running.saturating_add(live.load.waiting)
        }
        _ => 0,
    }
}

/// Prompt tokens an engine will take from its cache if it holds `held` of them: at least one token is always computed,
/// and an engine reuses whole blocks of its own size only.
fn hit_tokens(held: u64, prompt_tokens: u64, engine_block_tokens: u32, block_tokens: u64) -> u64 {
    let unit = match engine_block_tokens {
        0 => block_tokens,
        tokens => u64::from(tokens),
    };
    let reusable = prompt_tokens.saturating_sub(1) / unit * unit;
    let held = if unit > block_tokens {
        held / unit * unit
    } else {
        held
    };
    held.min(reusable)
}

impl Candidate {
    fn new(endpoint: &Arc<Endpoint>, model: &str, salt: Option<&str>) -> Self {
        let live = endpoint.live.load_full();
        let namespace = namespace(&live, model, salt);
        Self {
            endpoint: endpoint.clone(),
            live,
            namespace,
            overlap: Overlap {
                slot: endpoint.slot,
                ..Overlap::default()
            },
            shared: Shared::default(),
            rank: None,
            hit_tokens: None,
            inputs: Inputs::default(),
            cost: 0.0,
            inhibited: endpoint.is_inhibited(),
            active: 0,
            dice: dice(),
        }
    }

    /// Of an engine's ranks the one that the client named, or that saves most; where none holds anything, the engine
    /// chooses.
    fn take_best_rank(&mut self, ranks: &[Overlap], weights: &cost::Weights, named: Option<u32>) {
        let worth = |overlap: &Overlap| {
            weights.overlap_credit * f64::from(overlap.device)
                + weights.host_weight * f64::from(overlap.host_extra)
                + weights.disk_weight * f64::from(overlap.disk_extra)
                + weights.remote_weight * f64::from(overlap.remote_extra)
        };
        let best = ranks
            .iter()
            .filter(|overlap| named.is_none_or(|rank| overlap.rank == rank))
            .max_by(|a, b| worth(a).total_cmp(&worth(b)));
        if let Some(best) = best {
            self.overlap = *best;
            self.rank = (self.live.state.dp_size > 1).then_some(best.rank);
        }
    }

    fn ranked(&self) -> Ranked {
        Ranked {
            endpoint: self.endpoint.clone(),
            rank: self.rank,
            cost: self.cost,
            hit_tokens: self.hit_tokens,
        }
    }

    fn entry(&self) -> Entry<'_> {
        let inputs = &self.inputs;
        Entry {
            endpoint: &self.endpoint.id.0,
            rank: self.rank,
            cost: (self.cost * 1000.0).round() / 1000.0,
            hit_tokens: self.hit_tokens.unwrap_or(0),
            blocks: [
                self.overlap.device,
                self.overlap.host_extra,
                self.overlap.disk_extra,
                self.overlap.remote_extra,
            ],
            prefill_tokens: inputs.prefill_tokens as u64,
            active_blocks: inputs.active_blocks as u64,
            shared_blocks: inputs.shared_blocks as u64,
            active_requests: inputs.active_requests as u64,
            inhibited: self.inhibited,
        }
    }
}

/// The KV name space of a request at one engine: its first base model, the adapter if the request names one.
fn namespace(live: &Live, model: &str, salt: Option<&str>) -> Namespace {
    let models = &live.state.models;
    let base = models.iter().find(|known| known.parent.is_none());
    let adapter = models
        .iter()
        .any(|known| known.id == model && known.parent.is_some());
    Namespace {
        model: base.map_or(model, |base| base.id.as_str()).to_owned(),
        lora: adapter.then(|| model.to_owned()),
        salt: salt.map(ToOwned::to_owned),
    }
}

/// A random number, for ties.
fn dice() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    thread_local! {
        static STATE: std::cell::Cell<u64> = std::cell::Cell::new(RandomState::new().hash_one(0u8) | 1);
    }
    STATE.with(|state| {
        let mut x = state.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state.set(x);
        (x >> 32) as u32
    })
}

/// The decision as the access log and the debug header show it.
#[derive(Serialize)]
struct Record<'a> {
    policy: &'static str,
    how: &'static str,
    exact: bool,
    prompt_tokens: u64,
    candidates: usize,
    winner: Entry<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runner_up: Option<Entry<'a>>,
    decision_us: u64,
}

#[derive(Serialize)]
struct Entry<'a> {
    endpoint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<u32>,
    cost: f64,
    hit_tokens: u64,
    /// Held on device, and what host, disk and elsewhere add.
    blocks: [u32; 4],
    prefill_tokens: u64,
    active_blocks: u64,
    /// Of these, blocks of the prompt.
    shared_blocks: u64,
    active_requests: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    inhibited: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_token_is_always_computed_and_engines_reuse_their_own_blocks() {
        // held, prompt, the engine's block, ours → hit
        let cases = [
            (0, 100, 32, 32, 0),
            (64, 100, 32, 32, 64),
            (96, 96, 32, 32, 64),
            (96, 97, 32, 32, 96),
            (64, 64, 16, 32, 48),
            (64, 64, 1, 32, 63),
            (96, 300, 64, 32, 64),
            (96, 300, 128, 32, 0),
            (32, 0, 32, 32, 0),
            (64, 100, 0, 32, 64),
        ];
        for (held, prompt, engine, ours, expected) in cases {
            assert_eq!(
                hit_tokens(held, prompt, engine, ours),
                expected,
                "{held} of {prompt}, blocks of {engine}"
            );
        }
    }
}
