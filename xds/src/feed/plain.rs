//! Between the plain types of the feed and their protobuf messages; what cannot be meant is refused.

use super::FeedError;
use crate::{
    report::{EngineKind, EngineState, GoldenAnswer, Health, Load, Model, Role, Shelf, Tier},
    wire::outrigger::feed::v1 as wire,
};
use std::time::Duration;

/// Tokens of a golden answer.
const GOLDEN_TOKENS_MAX: usize = 64;

pub(super) fn malformed(reason: impl Into<String>) -> FeedError {
    FeedError::Malformed(reason.into())
}

impl From<&EngineState> for wire::EngineState {
    fn from(plain: &EngineState) -> Self {
        let kind = match plain.kind {
            EngineKind::Unknown => wire::EngineKind::Unspecified,
            EngineKind::Vllm => wire::EngineKind::Vllm,
            EngineKind::Sglang => wire::EngineKind::Sglang,
            EngineKind::TrtLlm => wire::EngineKind::TrtLlm,
        };
        let role = match plain.role {
            Role::Both => wire::Role::Both,
            Role::Prefill => wire::Role::Prefill,
            Role::Decode => wire::Role::Decode,
        };
        let health = match plain.health {
            Health::Unknown => wire::Health::Unspecified,
            Health::Healthy => wire::Health::Healthy,
            Health::Unhealthy => wire::Health::Unhealthy,
            Health::Draining => wire::Health::Draining,
            Health::Dead => wire::Health::Dead,
        };
        Self {
            kind: kind.into(),
            version: plain.version.clone(),
            models: plain.models.iter().map(Into::into).collect(),
            role: role.into(),
            health: health.into(),
            reason: plain.reason.clone(),
            block_tokens: plain.block_tokens,
            kv_blocks: plain.kv_blocks,
            dp_size: plain.dp_size,
            kv_events: plain.kv_events,
            bootstrap: plain.bootstrap.clone(),
            numerics: plain.numerics.clone(),
            golden: plain.golden.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<wire::EngineState> for EngineState {
    type Error = FeedError;

    fn try_from(wire: wire::EngineState) -> Result<Self, FeedError> {
        // A kind or health that this version does not know is unknown; a role must be known to be honoured.
        let kind = match wire.kind() {
            wire::EngineKind::Unspecified => EngineKind::Unknown,
            wire::EngineKind::Vllm => EngineKind::Vllm,
            wire::EngineKind::Sglang => EngineKind::Sglang,
            wire::EngineKind::TrtLlm => EngineKind::TrtLlm,
        };
        let role = match wire::Role::try_from(wire.role) {
            Ok(wire::Role::Both) => Role::Both,
            Ok(wire::Role::Prefill) => Role::Prefill,
            Ok(wire::Role::Decode) => Role::Decode,
            Ok(wire::Role::Unspecified) | Err(_) => {
                return Err(malformed(format!("role {}", wire.role)));
            }
        };
        let health = match wire.health() {
            wire::Health::Unspecified => Health::Unknown,
            wire::Health::Healthy => Health::Healthy,
            wire::Health::Unhealthy => Health::Unhealthy,
            wire::Health::Draining => Health::Draining,
            wire::Health::Dead => Health::Dead,
        };
        Ok(Self {
            kind,
            version: wire.version,
            models: wire.models.into_iter().map(Into::into).collect(),
            role,
            health,
            reason: wire.reason,
            block_tokens: wire.block_tokens,
            kv_blocks: wire.kv_blocks,
            dp_size: wire.dp_size,
            kv_events: wire.kv_events,
            bootstrap: wire.bootstrap,
            numerics: wire.numerics,
            golden: wire.golden.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<&GoldenAnswer> for wire::GoldenAnswer {
    fn from(plain: &GoldenAnswer) -> Self {
        Self {
            cohort: plain.cohort.clone(),
            tokens: plain.tokens.clone(),
            clear: u32::try_from(plain.clear).unwrap_or(u32::MAX),
        }
    }
}

impl TryFrom<wire::GoldenAnswer> for GoldenAnswer {
    type Error = FeedError;

    fn try_from(wire: wire::GoldenAnswer) -> Result<Self, FeedError> {
        let clear = wire.clear as usize;
        if wire.tokens.len() > GOLDEN_TOKENS_MAX || clear > wire.tokens.len() {
            return Err(malformed(format!(
                "a golden answer of {} tokens, {clear} of them clear",
                wire.tokens.len()
            )));
        }
        Ok(Self {
            cohort: wire.cohort,
            tokens: wire.tokens,
            clear,
        })
    }
}

impl From<&Model> for wire::Model {
    fn from(plain: &Model) -> Self {
        Self {
            id: plain.id.clone(),
            parent: plain.parent.clone(),
            context_tokens: plain.context_tokens,
            root: plain.root.clone(),
            card: plain.card.clone(),
        }
    }
}

impl From<wire::Model> for Model {
    fn from(wire: wire::Model) -> Self {
        Self {
            id: wire.id,
            parent: wire.parent,
            context_tokens: wire.context_tokens,
            root: wire.root,
            card: wire.card,
        }
    }
}

impl From<&Load> for wire::Load {
    fn from(plain: &Load) -> Self {
        Self {
            active_requests: plain.active_requests,
            active_prefill_tokens: plain.active_prefill_tokens,
            active_blocks: plain.active_blocks,
            running: plain.running,
            waiting: plain.waiting,
            kv_usage: plain.kv_usage,
            engine_age_ns: plain
                .engine_age
                .map(|age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)),
            engine_tokens: plain.engine_tokens,
        }
    }
}

impl TryFrom<wire::Load> for Load {
    type Error = FeedError;

    fn try_from(wire: wire::Load) -> Result<Self, FeedError> {
        if !wire.kv_usage.is_finite() || wire.kv_usage < 0.0 {
            return Err(malformed(format!("kv_usage {}", wire.kv_usage)));
        }
        Ok(Self {
            active_requests: wire.active_requests,
            active_prefill_tokens: wire.active_prefill_tokens,
            active_blocks: wire.active_blocks,
            running: wire.running,
            waiting: wire.waiting,
            kv_usage: wire.kv_usage,
            engine_age: wire.engine_age_ns.map(Duration::from_nanos),
            engine_tokens: wire.engine_tokens,
        })
    }
}

pub(super) fn to_tier(tier: Tier) -> wire::Tier {
    match tier {
        Tier::Device => wire::Tier::Device,
        Tier::Host => wire::Tier::Host,
        Tier::Disk => wire::Tier::Disk,
        Tier::Remote => wire::Tier::Remote,
    }
}

pub(super) fn shelf(blocks: &wire::Blocks) -> Result<Shelf, FeedError> {
    let tier = match wire::Tier::try_from(blocks.tier) {
        Ok(wire::Tier::Device) => Tier::Device,
        Ok(wire::Tier::Host) => Tier::Host,
        Ok(wire::Tier::Disk) => Tier::Disk,
        Ok(wire::Tier::Remote) => Tier::Remote,
        Ok(wire::Tier::Unspecified) | Err(_) => {
            return Err(malformed(format!("tier {}", blocks.tier)));
        }
    };
    Ok(Shelf {
        rank: blocks.rank,
        tier,
    })
}
