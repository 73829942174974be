//! How a cluster shows its balancing: as `lb_policy` where that can say it, else as `load_balancing_policy`.

use super::lb_policy::{Balancing, LbPolicy};
use crate::{
    protobuf::{pack, to_duration},
    wire::envoy::{
        config::{cluster::v3 as wire, core::v3 as core},
        extensions::load_balancing_policies as policies,
        r#type::v3::Percent,
    },
};
use policies::{
    client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin, common::v3 as common,
    least_request::v3 as least_request, maglev::v3 as maglev, override_host::v3 as override_host,
    random::v3 as random, ring_hash::v3 as ring_hash, round_robin::v3 as round_robin,
};
use prost_types::Any;
use wire::cluster::{
    CommonLbConfig, LbConfig,
    common_lb_config::{
        ConsistentHashingLbConfig, LocalityConfigSpecifier, LocalityWeightedLbConfig,
    },
};

/// How a cluster shows its balancing.
pub(super) struct Shown {
    pub(super) policy: wire::cluster::LbPolicy,
    pub(super) common: Option<CommonLbConfig>,
    pub(super) of_policy: Option<LbConfig>,
    pub(super) typed: Option<wire::LoadBalancingPolicy>,
}

/// What is not the default.
pub(super) fn show(policy: LbPolicy, plain: &Balancing) -> Shown {
    let defaults = Balancing::default();
    let common = CommonLbConfig {
        healthy_panic_threshold: Some(Percent {
            value: plain.healthy_panic_threshold,
        }),
        locality_config_specifier: plain.locality_weighted.then_some(
            LocalityConfigSpecifier::LocalityWeightedLbConfig(LocalityWeightedLbConfig {}),
        ),
        consistent_hashing_lb_config: plain.use_hostname_for_hashing.then_some(
            ConsistentHashingLbConfig {
                use_hostname_for_hashing: true,
            },
        ),
    };
    let is_common = plain.locality_weighted
        || plain.use_hostname_for_hashing
        || plain.healthy_panic_threshold != defaults.healthy_panic_threshold;
    let is_typed = plain.full_scan
        || !plain.override_host.is_empty()
        || policy == LbPolicy::ClientSideWeightedRoundRobin;
    Shown {
        policy: if is_typed {
            wire::cluster::LbPolicy::LoadBalancingPolicyConfig
        } else {
            policy.to_wire()
        },
        common: is_common.then_some(common),
        of_policy: if is_typed {
            None
        } else {
            show_of_policy(policy, plain, &defaults)
        },
        typed: is_typed.then(|| show_typed(policy, plain)),
    }
}

fn show_of_policy(policy: LbPolicy, plain: &Balancing, defaults: &Balancing) -> Option<LbConfig> {
    use wire::cluster as of;
    let size = |size: u64, default: u64| (size != default).then_some(size);
    match policy {
        LbPolicy::Random | LbPolicy::ClientSideWeightedRoundRobin | LbPolicy::ClusterProvided => {
            None
        }
        LbPolicy::RoundRobin => {
            let slow_start_config = show_slow_start(plain);
            slow_start_config.as_ref()?;
            Some(LbConfig::RoundRobinLbConfig(of::RoundRobinLbConfig {
                slow_start_config,
            }))
        }
        LbPolicy::LeastRequest => {
            let is_default = (
                plain.choice_count,
                plain.active_request_bias,
                plain.slow_start,
            ) == (
                defaults.choice_count,
                defaults.active_request_bias,
                defaults.slow_start,
            );
            let config = LbConfig::LeastRequestLbConfig(of::LeastRequestLbConfig {
                choice_count: Some(plain.choice_count),
                active_request_bias: Some(bias(plain)),
                slow_start_config: show_slow_start(plain),
            });
            (!is_default).then_some(config)
        }
        LbPolicy::RingHash => (plain.ring_size != defaults.ring_size).then(|| {
            LbConfig::RingHashLbConfig(of::RingHashLbConfig {
                minimum_ring_size: size(plain.ring_size.0, defaults.ring_size.0),
                maximum_ring_size: size(plain.ring_size.1, defaults.ring_size.1),
                hash_function: 0,
            })
        }),
        LbPolicy::Maglev => (plain.table_size != defaults.table_size).then_some(
            LbConfig::MaglevLbConfig(of::MaglevLbConfig {
                table_size: Some(plain.table_size),
            }),
        ),
    }
}

fn bias(plain: &Balancing) -> core::RuntimeDouble {
    core::RuntimeDouble {
        default_value: plain.active_request_bias,
        runtime_key: String::new(),
    }
}

fn show_slow_start(plain: &Balancing) -> Option<wire::cluster::SlowStartConfig> {
    plain.slow_start.map(|slow| wire::cluster::SlowStartConfig {
        slow_start_window: Some(to_duration(slow.window)),
        aggression: Some(core::RuntimeDouble {
            default_value: slow.aggression,
            runtime_key: String::new(),
        }),
        min_weight_percent: Some(Percent {
            value: slow.min_weight_percent,
        }),
    })
}

fn show_typed(policy: LbPolicy, plain: &Balancing) -> wire::LoadBalancingPolicy {
    let slow_start = || {
        show_slow_start(plain).map(|slow| common::SlowStartConfig {
            slow_start_window: slow.slow_start_window,
            aggression: slow.aggression,
            min_weight_percent: slow.min_weight_percent,
        })
    };
    let inner = match policy {
        LbPolicy::RoundRobin => pack(&round_robin::RoundRobin {
            slow_start_config: slow_start(),
            locality_lb_config: None,
        }),
        LbPolicy::LeastRequest => pack(&least_request::LeastRequest {
            choice_count: Some(plain.choice_count),
            active_request_bias: Some(bias(plain)),
            slow_start_config: slow_start(),
            selection_method: i32::from(plain.full_scan),
            ..least_request::LeastRequest::default()
        }),
        LbPolicy::Random => pack(&random::Random::default()),
        // Shown as `lb_policy`: nothing that only a typed policy can say goes with it.
        LbPolicy::ClusterProvided => Any::default(),
        LbPolicy::RingHash => pack(&ring_hash::RingHash {
            minimum_ring_size: Some(plain.ring_size.0),
            maximum_ring_size: Some(plain.ring_size.1),
            ..ring_hash::RingHash::default()
        }),
        LbPolicy::Maglev => pack(&maglev::Maglev {
            table_size: Some(plain.table_size),
            ..maglev::Maglev::default()
        }),
        LbPolicy::ClientSideWeightedRoundRobin => {
            let reports = &plain.reports;
            pack(&ClientSideWeightedRoundRobin {
                blackout_period: Some(to_duration(reports.blackout)),
                weight_expiration_period: Some(to_duration(reports.expiration)),
                weight_update_period: Some(to_duration(reports.update)),
                error_utilization_penalty: Some(reports.error_penalty as f32),
                metric_names_for_computing_utilization: reports.metrics.clone(),
                slow_start_config: slow_start(),
                ..ClientSideWeightedRoundRobin::default()
            })
        }
    };
    let list = one_policy(inner);
    if plain.override_host.is_empty() {
        return list;
    }
    let headers = plain.override_host.iter().cloned();
    one_policy(pack(&override_host::OverrideHost {
        override_host_sources: headers
            .map(|header| override_host::override_host::OverrideHostSource { header })
            .collect(),
        fallback_policy: Some(list),
    }))
}

fn one_policy(config: Any) -> wire::LoadBalancingPolicy {
    let name = config.type_url.rsplit('/').next().unwrap_or_default();
    let extension = core::TypedExtensionConfig {
        name: name.to_owned(),
        typed_config: Some(config),
    };
    wire::LoadBalancingPolicy {
        policies: vec![wire::load_balancing_policy::Policy {
            typed_extension_config: Some(extension),
        }],
    }
}
