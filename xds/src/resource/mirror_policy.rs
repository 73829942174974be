//! `RequestMirrorPolicy`: clusters that get a copy of a request.

use super::matching::Fraction;
use crate::{problems::ConfigErrors, wire::envoy::config::route::v3::route_action as wire};

/// `RequestMirrorPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorPolicy {
    /// Cluster name.
    pub cluster: String,
    /// Only this share of the requests, by chance.
    pub runtime_fraction: Option<Fraction>,
    /// The copy's host gets `-shadow`.
    pub append_suffix: bool,
}

impl TryFrom<wire::RequestMirrorPolicy> for MirrorPolicy {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RequestMirrorPolicy) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let cluster = problems.not_empty("cluster", wire.cluster);
        let runtime_fraction = wire
            .runtime_fraction
            .and_then(|share| problems.take("runtime_fraction", share.try_into()));
        problems.finish(Some(Self {
            cluster,
            runtime_fraction,
            append_suffix: !wire.disable_shadow_host_suffix_append,
        }))
    }
}

impl From<&MirrorPolicy> for wire::RequestMirrorPolicy {
    fn from(plain: &MirrorPolicy) -> Self {
        Self {
            cluster: plain.cluster.clone(),
            runtime_fraction: plain.runtime_fraction.as_ref().map(Into::into),
            disable_shadow_host_suffix_append: !plain.append_suffix,
        }
    }
}
