//! `Policy`: how requests to fleets are served.

use super::text::Span;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How requests to fleets are served. What it does not say, a less specific policy says, or the default.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Policy {
    /// Which; none is all.
    pub fleets: Vec<String>,
    /// Whose requests; none is everybody's.
    pub tenants: Vec<String>,
    /// Which engine a request goes to.
    pub routing: Option<Routing>,
    /// Prefill and decode at two engines.
    pub split: Option<Split>,
    /// Engines are asked whether they work.
    pub canary: Option<Canary>,
    /// Streams survive their engine.
    pub migration: Option<Migration>,
    /// Envoy's rules instead of ours.
    pub retries: Option<Retries>,
    /// Zero is off.
    pub timeouts: Option<Timeouts>,
    /// Requests and tokens per minute.
    pub rate_limits: Option<RateLimits>,
}

/// Which engine a request goes to.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Routing {
    /// How it is chosen.
    pub policy: RoutingPolicy,
    /// Of the cost with `kv`.
    pub weights: Weights,
}

/// How an engine is chosen: the words of `--policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutingPolicy {
    /// By cached prefix and load; what cannot be routed by prefix as `least_request`.
    #[default]
    Kv,
    /// In turn.
    RoundRobin,
    /// The less loaded of two.
    LeastRequest,
    /// Any.
    Random,
}

impl RoutingPolicy {
    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::RoundRobin => "round_robin",
            Self::LeastRequest => "least_request",
            Self::Random => "random",
        }
    }
}

/// `weights` of `kv_routing`: read as we write fields, told as the filter does; what is not said is its default.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all(deserialize = "camelCase"), default)]
pub struct Weights {
    /// Worth of a block in device memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap_credit: Option<f64>,
    /// How fast that fades where more prefill waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap_credit_decay: Option<f64>,
    /// Weight of prefill against decode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_load_scale: Option<f64>,
    /// Blocks that an active request counts for beside its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_active_request_weight: Option<f64>,
    /// Worth of a block in host memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_weight: Option<f64>,
    /// Worth of a block on disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_weight: Option<f64>,
    /// Worth of a block elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote_weight: Option<f64>,
    /// 0 takes the cheapest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
}

/// Prefill and decode at two engines; what is not said is the filter's default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Split {
    /// Which requests.
    pub mode: SplitMode,
    /// Prompt tokens not cached that are worth it.
    pub uncached_tokens: Option<u64>,
    /// Predicted time of their prefill that is worth it.
    pub uncached_time: Option<Span>,
    /// For the prefill leg.
    pub prefill_timeout: Option<Span>,
    /// Whether both legs are in one zone.
    pub topology: Topology,
}

/// Which requests are split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitMode {
    /// Those worth it.
    #[default]
    Threshold,
    /// Whatever can be.
    Always,
    /// None.
    Never,
}

/// Whether both legs are in one zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// No matter.
    #[default]
    Any,
    /// If there is an engine for prefill.
    Preferred,
    /// Or not split.
    Required,
}

/// Engines are asked for a token when no request proves that they work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// Whether they are.
    pub enabled: bool,
    /// What wrong answers lead to.
    #[serde(default)]
    pub golden: Golden,
}

/// What answers lead to that are wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Golden {
    /// The engine is unhealthy.
    Eject,
    /// A line in the log and a count.
    #[default]
    Report,
    /// Nobody asks.
    None,
}

/// Streams survive their engine; what is not said is the filter's default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Migration {
    /// Whether they do.
    pub enabled: bool,
    /// Streams go on although their rest is another draw.
    pub same_distribution: bool,
    /// Moves in a row that bring no token.
    pub attempts: Option<u32>,
    /// A stream that is silent for so long moves.
    pub stall: Option<Span>,
    /// From a break to the first token elsewhere.
    pub resume_timeout: Option<Span>,
}

impl Default for Migration {
    fn default() -> Self {
        Self {
            enabled: true,
            same_distribution: false,
            attempts: None,
            stall: None,
            resume_timeout: None,
        }
    }
}

/// Envoy's rules instead of ours.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Retries {
    /// Envoy's conditions; at least one.
    pub retry_on: Vec<String>,
    /// Beside the first.
    #[serde(default = "attempts")]
    pub attempts: u32,
    /// To the response's headers; zero is off.
    #[serde(default)]
    pub per_try_timeout: Span,
    /// Base of the wait between them.
    #[serde(default = "back_off")]
    pub back_off: Span,
}

fn attempts() -> u32 {
    1
}

fn back_off() -> Span {
    Span(Duration::from_millis(25))
}

/// What is not said is the filter's default, and for `request` off.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Timeouts {
    /// Of generations, to response headers.
    pub headers: Option<Span>,
    /// From headers to the first event.
    pub first_token: Option<Span>,
    /// Between two reads that bring something.
    pub between_tokens: Option<Span>,
    /// The whole response body of a generation.
    pub total: Option<Span>,
    /// Of what is no generation: the whole exchange.
    pub request: Span,
}

/// Requests and tokens per minute, of each proxy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RateLimits {
    /// At least one.
    pub limits: Vec<Limit>,
    /// Tokens that a request without `max_tokens` is taken to generate.
    #[serde(default)]
    pub default_max_tokens: Option<u64>,
}

/// A limit.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Limit {
    /// Unique; label of metrics.
    pub name: String,
    /// What has a limit of its own: `tenant`, `model`, `header:NAME`.
    #[serde(default)]
    pub per: Vec<String>,
    /// 0 is unlimited.
    #[serde(default)]
    pub requests_per_minute: u32,
    /// 0 is unlimited.
    #[serde(default)]
    pub tokens_per_minute: u32,
}
