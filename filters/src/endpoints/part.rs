//! Which part of a request an endpoint is meant for, and which it can do at all.

use super::Endpoint;
use outrigger_xds::report::{EngineKind, Role};
use std::sync::Arc;

/// Which part of a request's work an endpoint is asked for, where engines have roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Part {
    /// Nobody looked at roles: any endpoint will do.
    #[default]
    Any,
    /// All of it. Engines for prefill alone do it where there is nobody else, unless they are halves of SGLang.
    Whole,
    /// Prefill.
    Prefill,
    /// All tokens, from blocks that were computed elsewhere.
    Decode,
}

impl Part {
    /// Whether an engine is meant for it. Of what kind it is has to be known for all that two engines do.
    #[must_use]
    pub fn suits(self, endpoint: &Endpoint) -> bool {
        let live = endpoint.live.load();
        let (role, kind) = (live.state.role, live.state.kind);
        match self {
            Self::Any => true,
            Self::Whole => match role {
                Role::Both => true,
                Role::Prefill => false,
                Role::Decode => !matches!(kind, EngineKind::Sglang | EngineKind::Unknown),
            },
            Self::Prefill => role == Role::Prefill && kind != EngineKind::Unknown,
            Self::Decode => role == Role::Decode && kind != EngineKind::Unknown,
        }
    }

    /// Takes out the endpoints that are not meant for it.
    pub fn keep_suited(self, endpoints: &mut Vec<Arc<Endpoint>>) {
        let suits = |endpoint: &Arc<Endpoint>| self.suits(endpoint);
        match self {
            Self::Any => {}
            Self::Whole if !endpoints.iter().any(suits) => keep_able(endpoints),
            Self::Whole | Self::Prefill | Self::Decode => endpoints.retain(suits),
        }
    }
}

/// Takes out those that cannot serve a request whole, and of the others those that do not decode, if some do.
fn keep_able(endpoints: &mut Vec<Arc<Endpoint>>) {
    let has_halves = has_halves(endpoints);
    endpoints.retain(|endpoint| endpoint.can_be_whole(has_halves));
    let decodes = |endpoint: &Arc<Endpoint>| endpoint.role() == Role::Decode;
    if endpoints.iter().any(decodes) {
        endpoints.retain(decodes);
    }
}

/// Whether there are halves of SGLang, alive or not.
#[must_use]
pub fn has_halves(endpoints: &[Arc<Endpoint>]) -> bool {
    endpoints.iter().any(|endpoint| {
        let live = endpoint.live.load();
        live.state.kind == EngineKind::Sglang && live.state.role != Role::Both
    })
}

impl Endpoint {
    /// Whether it can serve a request whole. Half of an SGLang refuses whatever comes without its other half, and one with a
    /// role whose kind is not known is taken for such a half where there are some.
    #[must_use]
    pub fn can_be_whole(&self, has_halves: bool) -> bool {
        let live = self.live.load();
        match live.state.kind {
            _ if live.state.role == Role::Both => true,
            EngineKind::Sglang => false,
            EngineKind::Unknown => !has_halves,
            EngineKind::Vllm | EngineKind::TrtLlm => true,
        }
    }
}
