//! The span of one routing decision: what was chosen from how many, at which cost, and what came next.

use crate::{
    filter::{Context, Ranked},
    trace::Step,
};
use outrigger_xds::otlp::Kind;
use std::time::Instant;

/// Names of what is told of a candidate: its endpoint, cost, and what of the prompt it holds.
struct Names {
    endpoint: &'static str,
    cost: &'static str,
    hit_tokens: &'static str,
    hit_blocks: &'static str,
}

const WINNER: Names = Names {
    endpoint: "outrigger.routing.endpoint",
    cost: "outrigger.routing.cost",
    hit_tokens: "outrigger.routing.hit_tokens",
    hit_blocks: "outrigger.routing.hit_blocks",
};
const RUNNER_UP: Names = Names {
    endpoint: "outrigger.routing.runner_up.endpoint",
    cost: "outrigger.routing.runner_up.cost",
    hit_tokens: "outrigger.routing.runner_up.hit_tokens",
    hit_blocks: "outrigger.routing.runner_up.hit_blocks",
};

/// Tells of a decision that has just been made; `how` the prompt was known, or why it was not.
pub(super) fn tell(context: &Context, how: &'static str, block_tokens: usize, began: Instant) {
    let Some(trace) = &context.trace else {
        return;
    };
    let mut step = trace.child("kv_routing", Kind::Internal);
    step.began(began);
    step.tell("component", "proxy");
    step.tell("upstream_cluster", context.route.cluster.clone());
    step.tell("outrigger.routing.how", how);
    step.tell("outrigger.routing.candidates", context.ranked.len() as u64);
    step.tell("outrigger.routing.prompt_tokens", context.prompt.tokens);
    let mut ranked = context.ranked.iter();
    for names in [&WINNER, &RUNNER_UP] {
        if let Some(candidate) = ranked.next() {
            tell_candidate(&mut step, names, candidate, block_tokens as u64);
        }
    }
}

fn tell_candidate(step: &mut Step, names: &Names, candidate: &Ranked, block_tokens: u64) {
    step.tell(names.endpoint, candidate.endpoint.id.0.clone());
    step.tell(names.cost, candidate.cost);
    if let Some(hits) = candidate.hit_tokens {
        step.tell(names.hit_tokens, hits);
        step.tell(names.hit_blocks, hits / block_tokens.max(1));
    }
}
