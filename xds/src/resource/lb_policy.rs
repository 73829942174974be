//! How a cluster chooses an endpoint: `lb_policy` with its configuration, or `load_balancing_policy`.

use crate::{
    problems::ConfigErrors,
    protobuf::{duration, unpack},
    wire::envoy::{
        config::{cluster::v3 as wire, core::v3 as core},
        extensions::load_balancing_policies as policies,
    },
};
use policies::{
    client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin, common::v3 as common,
    least_request::v3 as least_request, maglev::v3 as maglev, override_host::v3 as override_host,
    random::v3 as random, ring_hash::v3 as ring_hash, round_robin::v3 as round_robin,
    wrr_locality::v3 as wrr_locality,
};
use prost::{Message, Name};
use prost_types::Any;
use std::time::Duration;
use wire::cluster::{CommonLbConfig, LbConfig};

/// Most points that a ring may have, as in Envoy.
const RING_SIZE_MAX: u64 = 8 << 20;
/// Entries of a Maglev table unless configured.
const TABLE_SIZE: u64 = 65_537;
/// Most entries of a Maglev table, as in Envoy.
const TABLE_SIZE_MAX: u64 = 5_000_011;
/// Weights by load reports change no oftener, as in Envoy.
const WEIGHT_UPDATE_MIN: Duration = Duration::from_millis(100);
/// Policies within policies, at most.
const DEPTH_MAX: usize = 8;

/// Which policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LbPolicy {
    /// In turn.
    #[default]
    RoundRobin,
    /// The least loaded of two random ones.
    LeastRequest,
    /// Any.
    Random,
    /// By hash, on a ring.
    RingHash,
    /// By hash, in a table.
    Maglev,
    /// By weights that endpoints earn with their load reports.
    ClientSideWeightedRoundRobin,
    /// There is but one: where the request was meant to go.
    ClusterProvided,
}

impl LbPolicy {
    /// The enum's name in Envoy.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.to_wire().as_str_name()
    }

    /// Whether it chooses by a hash of the request.
    #[must_use]
    pub fn hashes(self) -> bool {
        matches!(self, Self::RingHash | Self::Maglev)
    }

    pub(super) fn to_wire(self) -> wire::cluster::LbPolicy {
        match self {
            Self::RoundRobin => wire::cluster::LbPolicy::RoundRobin,
            Self::LeastRequest => wire::cluster::LbPolicy::LeastRequest,
            Self::Random => wire::cluster::LbPolicy::Random,
            Self::RingHash => wire::cluster::LbPolicy::RingHash,
            Self::Maglev => wire::cluster::LbPolicy::Maglev,
            Self::ClusterProvided => wire::cluster::LbPolicy::ClusterProvided,
            Self::ClientSideWeightedRoundRobin => {
                wire::cluster::LbPolicy::LoadBalancingPolicyConfig
            }
        }
    }
}

/// What bends a policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Balancing {
    /// `healthy_panic_threshold`, in percent: with less than this available, health is ignored. 0 is never.
    pub healthy_panic_threshold: f64,
    /// `locality_weighted_lb_config` is there.
    pub locality_weighted: bool,
    /// Endpoints that least request compares.
    pub choice_count: u32,
    /// Least request compares all.
    pub full_scan: bool,
    /// How much active requests lower a weight.
    pub active_request_bias: f64,
    /// New endpoints get fewer requests at first.
    pub slow_start: Option<SlowStart>,
    /// Points on a ring, at least and at most.
    pub ring_size: (u64, u64),
    /// Entries of a Maglev table; a prime.
    pub table_size: u64,
    /// Endpoints are placed by their name instead of their address.
    pub use_hostname_for_hashing: bool,
    /// Request headers that may name endpoints, before the policy is asked.
    pub override_host: Vec<String>,
    /// How load reports become weights.
    pub reports: Reports,
}

impl Default for Balancing {
    fn default() -> Self {
        Self {
            healthy_panic_threshold: 50.0,
            locality_weighted: false,
            choice_count: 2,
            full_scan: false,
            active_request_bias: 1.0,
            slow_start: None,
            ring_size: (1024, RING_SIZE_MAX),
            table_size: TABLE_SIZE,
            use_hostname_for_hashing: false,
            override_host: Vec::new(),
            reports: Reports::default(),
        }
    }
}

/// How the load reports of an endpoint become its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Reports {
    /// They must come for so long before they count.
    pub blackout: Duration,
    /// They no longer count when none came for so long.
    pub expiration: Duration,
    /// How often weights change.
    pub update: Duration,
    /// How much a share of failures adds to the utilization.
    pub error_penalty: f64,
    /// Looked at where no utilization of the application is reported.
    pub metrics: Vec<String>,
}

impl Default for Reports {
    fn default() -> Self {
        Self {
            blackout: Duration::from_secs(10),
            expiration: Duration::from_secs(180),
            update: Duration::from_secs(1),
            error_penalty: 1.0,
            metrics: Vec::new(),
        }
    }
}

/// `SlowStartConfig`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// For how long.
    pub window: Duration,
    /// 1 is linear, more is faster at first.
    pub aggression: f64,
    /// At least this share of the weight, in percent.
    pub min_weight_percent: f64,
}

/// What a cluster says of balancing.
pub(super) struct Given {
    pub(super) policy: wire::cluster::LbPolicy,
    pub(super) common: Option<CommonLbConfig>,
    pub(super) of_policy: Option<LbConfig>,
    pub(super) typed: Option<wire::LoadBalancingPolicy>,
}

/// Reads all of it.
pub(super) fn read(problems: &mut ConfigErrors, given: Given) -> (LbPolicy, Balancing) {
    let mut read = Reader {
        problems,
        balancing: Balancing::default(),
    };
    if let Some(config) = given.common {
        read.common(config);
    }
    let policy = match given.typed {
        Some(typed) => read.typed("load_balancing_policy", typed, DEPTH_MAX),
        None => {
            if let Some(config) = given.of_policy {
                read.of_policy(config);
            }
            read.named(given.policy)
        }
    };
    (policy.unwrap_or_default(), read.balancing)
}

struct Reader<'a> {
    problems: &'a mut ConfigErrors,
    balancing: Balancing,
}

impl Reader<'_> {
    fn named(&mut self, policy: wire::cluster::LbPolicy) -> Option<LbPolicy> {
        use wire::cluster::LbPolicy as Wire;
        match policy {
            Wire::RoundRobin => Some(LbPolicy::RoundRobin),
            Wire::LeastRequest => Some(LbPolicy::LeastRequest),
            Wire::Random => Some(LbPolicy::Random),
            Wire::RingHash => Some(LbPolicy::RingHash),
            Wire::Maglev => Some(LbPolicy::Maglev),
            Wire::LoadBalancingPolicyConfig => {
                self.problems.add("load_balancing_policy", "required");
                None
            }
            Wire::ClusterProvided => Some(LbPolicy::ClusterProvided),
        }
    }

    fn common(&mut self, config: CommonLbConfig) {
        if let Some(percent) = config.healthy_panic_threshold {
            self.balancing.healthy_panic_threshold = percent.value;
            if !(0.0..=100.0).contains(&percent.value) {
                self.problems.add(
                    "common_lb_config.healthy_panic_threshold.value",
                    format!("must be between 0 and 100, is {}", percent.value),
                );
            }
        }
        self.balancing.locality_weighted = config.locality_config_specifier.is_some();
        self.balancing.use_hostname_for_hashing = config
            .consistent_hashing_lb_config
            .is_some_and(|config| config.use_hostname_for_hashing);
    }

    fn of_policy(&mut self, config: LbConfig) {
        match config {
            LbConfig::LeastRequestLbConfig(config) => {
                let place = "least_request_lb_config";
                self.least_request(place, config.choice_count, config.active_request_bias);
                self.slow_start(place, config.slow_start_config);
            }
            LbConfig::RoundRobinLbConfig(config) => {
                self.slow_start("round_robin_lb_config", config.slow_start_config);
            }
            LbConfig::RingHashLbConfig(config) => {
                let place = "ring_hash_lb_config";
                use wire::cluster::ring_hash_lb_config::HashFunction;
                self.hash_function(place, config.hash_function() == HashFunction::XxHash);
                self.ring(place, config.minimum_ring_size, config.maximum_ring_size);
            }
            LbConfig::MaglevLbConfig(config) => self.table("maglev_lb_config", config.table_size),
            // Read with the cluster's type.
            LbConfig::OriginalDstLbConfig(_) => {}
        }
    }

    fn least_request(
        &mut self,
        place: &str,
        choices: Option<u32>,
        bias: Option<core::RuntimeDouble>,
    ) {
        let balancing = &mut self.balancing;
        balancing.choice_count = choices.unwrap_or(balancing.choice_count);
        if balancing.choice_count < 2 {
            let message = format!("must be at least 2, is {}", balancing.choice_count);
            self.problems.add(format!("{place}.choice_count"), message);
        }
        if let Some(bias) = bias {
            balancing.active_request_bias = bias.default_value;
            if !bias.default_value.is_finite() || bias.default_value < 0.0 {
                self.problems.add(
                    format!("{place}.active_request_bias.default_value"),
                    format!("must be at least 0, is {}", bias.default_value),
                );
            }
        }
    }

    fn slow_start(&mut self, place: &str, config: Option<wire::cluster::SlowStartConfig>) {
        let Some(config) = config else { return };
        let place = format!("{place}.slow_start_config");
        let Some(window) = config.slow_start_window else {
            self.problems
                .add(format!("{place}.slow_start_window"), "required");
            return;
        };
        let window = self
            .problems
            .take(&format!("{place}.slow_start_window"), duration(window))
            .unwrap_or_default();
        let aggression = config.aggression.map_or(1.0, |value| value.default_value);
        if !aggression.is_finite() || aggression <= 0.0 {
            self.problems.add(
                format!("{place}.aggression.default_value"),
                format!("must be greater than 0, is {aggression}"),
            );
        }
        let min_weight_percent = config.min_weight_percent.map_or(10.0, |share| share.value);
        if !(0.0..=100.0).contains(&min_weight_percent) {
            self.problems.add(
                format!("{place}.min_weight_percent.value"),
                format!("must be between 0 and 100, is {min_weight_percent}"),
            );
        }
        self.balancing.slow_start = (!window.is_zero()).then_some(SlowStart {
            window,
            aggression,
            min_weight_percent,
        });
    }

    fn hash_function(&mut self, place: &str, is_xx: bool) {
        if !is_xx {
            let place = format!("{place}.hash_function");
            self.problems.add(place, "not supported yet: MURMUR_HASH_2");
        }
    }

    fn ring(&mut self, place: &str, min: Option<u64>, max: Option<u64>) {
        let (default_min, default_max) = self.balancing.ring_size;
        let (min, max) = (min.unwrap_or(default_min), max.unwrap_or(default_max));
        for (field, size) in [("minimum_ring_size", min), ("maximum_ring_size", max)] {
            if size > RING_SIZE_MAX {
                let message = format!("must be at most {RING_SIZE_MAX}, is {size}");
                self.problems.add(format!("{place}.{field}"), message);
            }
        }
        if min > max {
            let message = format!("minimum_ring_size ({min}) > maximum_ring_size ({max})");
            self.problems.add(place, message);
        }
        self.balancing.ring_size = (min, max);
    }

    fn table(&mut self, place: &str, size: Option<u64>) {
        let size = size.unwrap_or(TABLE_SIZE);
        let is_prime = size >= 2
            && (2..)
                .take_while(|n| n * n <= size)
                .all(|n| !size.is_multiple_of(n));
        if size > TABLE_SIZE_MAX || !is_prime {
            let message = format!("must be a prime of at most {TABLE_SIZE_MAX}, is {size}");
            self.problems.add(format!("{place}.table_size"), message);
        }
        self.balancing.table_size = size;
    }

    /// The first policy of the list that is known here.
    fn typed(
        &mut self,
        place: &str,
        list: wire::LoadBalancingPolicy,
        depth: usize,
    ) -> Option<LbPolicy> {
        let mut unknown = Vec::new();
        for (index, policy) in list.policies.into_iter().enumerate() {
            let place = format!("{place}.policies[{index}].typed_extension_config.typed_config");
            let Some(any) = policy
                .typed_extension_config
                .and_then(|extension| extension.typed_config)
            else {
                self.problems.add(place, "required");
                return None;
            };
            match self.one(&place, &any, depth) {
                Ok(policy) => return policy,
                Err(type_url) => unknown.push(type_url),
            }
        }
        let message = match unknown.as_slice() {
            [] => "must have at least one policy".to_owned(),
            _ => format!("not supported yet: {}", unknown.join(", ")),
        };
        self.problems.add(place, message);
        None
    }

    /// One policy; its type if that is not known here.
    fn one(&mut self, place: &str, any: &Any, depth: usize) -> Result<Option<LbPolicy>, String> {
        if let Some(config) = self.unpacked::<round_robin::RoundRobin>(place, any) {
            self.locality(config.locality_lb_config);
            self.slow_start(place, config.slow_start_config.map(same_slow_start));
            return Ok(Some(LbPolicy::RoundRobin));
        }
        if let Some(config) = self.unpacked::<least_request::LeastRequest>(place, any) {
            use least_request::least_request::SelectionMethod;
            self.balancing.full_scan = config.selection_method() == SelectionMethod::FullScan
                || config.enable_full_scan == Some(true);
            self.least_request(place, config.choice_count, config.active_request_bias);
            self.locality(config.locality_lb_config);
            self.slow_start(place, config.slow_start_config.map(same_slow_start));
            return Ok(Some(LbPolicy::LeastRequest));
        }
        if let Some(config) = self.unpacked::<random::Random>(place, any) {
            self.locality(config.locality_lb_config);
            return Ok(Some(LbPolicy::Random));
        }
        if let Some(config) = self.unpacked::<ring_hash::RingHash>(place, any) {
            use ring_hash::ring_hash::HashFunction;
            self.hash_function(place, config.hash_function() != HashFunction::MurmurHash2);
            self.ring(place, config.minimum_ring_size, config.maximum_ring_size);
            self.hashing(config.consistent_hashing_lb_config);
            self.balancing.use_hostname_for_hashing |= config.use_hostname_for_hashing;
            self.balancing.locality_weighted |= config.locality_weighted_lb_config.is_some();
            return Ok(Some(LbPolicy::RingHash));
        }
        if let Some(config) = self.unpacked::<maglev::Maglev>(place, any) {
            self.table(place, config.table_size);
            self.hashing(config.consistent_hashing_lb_config);
            self.balancing.locality_weighted |= config.locality_weighted_lb_config.is_some();
            return Ok(Some(LbPolicy::Maglev));
        }
        if let Some(config) = self.unpacked::<ClientSideWeightedRoundRobin>(place, any) {
            self.reports(place, config);
            return Ok(Some(LbPolicy::ClientSideWeightedRoundRobin));
        }
        self.around(place, any, depth)
    }

    fn reports(&mut self, place: &str, config: ClientSideWeightedRoundRobin) {
        if config.enable_oob_load_report == Some(true) {
            let place = format!("{place}.enable_oob_load_report");
            self.problems
                .add(place, "not supported yet: reports on a stream of their own");
        }
        let defaults = Reports::default();
        let mut time = |field: &str, given: Option<prost_types::Duration>, default| {
            let place = format!("{place}.{field}");
            given
                .and_then(|given| self.problems.take(&place, duration(given)))
                .unwrap_or(default)
        };
        let update = time(
            "weight_update_period",
            config.weight_update_period,
            defaults.update,
        );
        let penalty = config.error_utilization_penalty;
        let reports = Reports {
            blackout: time("blackout_period", config.blackout_period, defaults.blackout),
            expiration: time(
                "weight_expiration_period",
                config.weight_expiration_period,
                defaults.expiration,
            ),
            update: update.max(WEIGHT_UPDATE_MIN),
            error_penalty: penalty.map_or(defaults.error_penalty, f64::from),
            metrics: config.metric_names_for_computing_utilization,
        };
        if !reports.error_penalty.is_finite() || reports.error_penalty < 0.0 {
            self.problems.add(
                format!("{place}.error_utilization_penalty"),
                format!("must be at least 0, is {}", reports.error_penalty),
            );
        }
        self.balancing.reports = reports;
        self.slow_start(place, config.slow_start_config.map(same_slow_start));
    }

    /// A policy that has another inside.
    fn around(&mut self, place: &str, any: &Any, depth: usize) -> Result<Option<LbPolicy>, String> {
        let (field, inner) =
            if let Some(config) = self.unpacked::<wrr_locality::WrrLocality>(place, any) {
                self.balancing.locality_weighted = true;
                ("endpoint_picking_policy", config.endpoint_picking_policy)
            } else if let Some(config) = self.unpacked::<override_host::OverrideHost>(place, any) {
                self.override_host(place, config.override_host_sources);
                ("fallback_policy", config.fallback_policy)
            } else {
                return Err(any.type_url.clone());
            };
        let place = format!("{place}.{field}");
        let Some(inner) = inner else {
            self.problems.add(place, "required");
            return Ok(None);
        };
        if depth == 0 {
            self.problems.add(place, "too many policies in policies");
            return Ok(None);
        }
        Ok(self.typed(&place, inner, depth - 1))
    }

    fn unpacked<M: Message + Name + Default>(&mut self, place: &str, any: &Any) -> Option<M> {
        self.problems.take(place, unpack::<M>(any)).flatten()
    }

    fn locality(&mut self, config: Option<common::LocalityLbConfig>) {
        self.balancing.locality_weighted |=
            config.is_some_and(|config| config.locality_config_specifier.is_some());
    }

    fn hashing(&mut self, config: Option<common::ConsistentHashingLbConfig>) {
        self.balancing.use_hostname_for_hashing |=
            config.is_some_and(|config| config.use_hostname_for_hashing);
    }

    fn override_host(
        &mut self,
        place: &str,
        sources: Vec<override_host::override_host::OverrideHostSource>,
    ) {
        let place = format!("{place}.override_host_sources");
        if sources.is_empty() {
            self.problems
                .add(place.as_str(), "must have at least one source");
        }
        for (index, source) in sources.into_iter().enumerate() {
            let name = source.header.to_ascii_lowercase();
            if http::HeaderName::try_from(&name).is_err() {
                let place = format!("{place}[{index}].header");
                self.problems
                    .add(place, format!("'{name}' is no header name"));
            }
            self.balancing.override_host.push(name);
        }
    }
}

fn same_slow_start(config: common::SlowStartConfig) -> wire::cluster::SlowStartConfig {
    wire::cluster::SlowStartConfig {
        slow_start_window: config.slow_start_window,
        aggression: config.aggression,
        min_weight_percent: config.min_weight_percent,
    }
}
