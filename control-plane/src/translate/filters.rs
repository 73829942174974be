//! Policies as configurations of filters, routes and health checks.

use super::rules::Rules;
use crate::short::{
    fleet::Fleet,
    gateway::Gateway,
    policy::{
        Canary as CanaryRule, Golden as GoldenRule, Retries, RoutingPolicy, SplitMode, Topology,
    },
    text::Span,
};
use outrigger_xds::resource::{
    canary::{Canary, Enforcing, Golden},
    header_mutation::HeaderMutations,
    health_check::{Checker, HealthCheck},
    listener::HttpFilter,
    retry_policy::RetryPolicy,
    route::{Action, FilterConfigs, Route, RouteAction, RouteMatch, TypedConfig},
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, time::Duration};

/// Envoy's wrapper, which switches a filter off for a route.
const FILTER_CONFIG: &str = "type.googleapis.com/envoy.config.route.v3.FilterConfig";
/// Envoy's router.
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
/// The longest wait between retries, in times of the base, as Envoy has it where nobody says.
const BACK_OFF_TIMES: u32 = 10;

/// A filter as some requests want it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    name: &'static str,
    is_on: bool,
    value: Value,
}

/// All filters of a gateway's chain but the router, in order, as requests to a fleet want them under these rules.
pub(super) fn wanted(rules: &Rules<'_>, fleet: &Fleet, gateway: &Gateway) -> Vec<Wanted> {
    let on = |name, value| Wanted {
        name,
        is_on: true,
        value,
    };
    let limits = rules.rate_limits();
    let migration = rules.migration();
    let routing = rules.routing();
    vec![
        on("engine_api", json!({"fleet_answers": true})),
        on("openai", openai(rules, gateway)),
        Wanted {
            name: "token_ratelimit",
            is_on: limits.is_some(),
            value: token_ratelimit(rules),
        },
        on("stored_responses", json!({})),
        Wanted {
            name: "migration",
            is_on: migration.enabled,
            value: migration_value(rules),
        },
        Wanted {
            name: "kv_routing",
            is_on: routing.policy == RoutingPolicy::Kv,
            value: kv_routing(rules, fleet),
        },
        on("disaggregation", disaggregation(rules)),
    ]
}

/// The chain of a gateway: what `first` wants, which is one of `all`. What no route wants is left out; what only others want
/// is off there.
pub(super) fn chain<'a>(
    first: &[Wanted],
    all: impl Iterator<Item = &'a [Wanted]>,
) -> Vec<HttpFilter> {
    let all: Vec<_> = all.collect();
    let filters = first.iter().enumerate().filter_map(|(index, wanted)| {
        let is_used = all.iter().any(|route| route[index].is_on);
        is_used.then(|| HttpFilter {
            disabled: !wanted.is_on,
            ..ours(wanted.name, wanted.value.clone())
        })
    });
    filters.chain([router()]).collect()
}

/// What a route says of the filters of its chain: where it wants them otherwise.
pub(super) fn own(first: &[Wanted], route: &[Wanted]) -> FilterConfigs {
    let differ = first.iter().zip(route).filter(|(first, own)| {
        let both_off = !first.is_on && !own.is_on;
        first != own && !both_off
    });
    let configs = differ.map(|(_, own)| {
        let config = if own.is_on {
            ours(own.name, own.value.clone()).config
        } else {
            TypedConfig {
                type_url: FILTER_CONFIG.into(),
                value: json!({"disabled": true}),
            }
        };
        (own.name.to_owned(), config)
    });
    configs.collect()
}

/// A filter of ours.
pub(super) fn ours(name: &str, value: Value) -> HttpFilter {
    let type_url = format!("type.googleapis.com/outrigger.filters.http.{name}.v1.Config");
    filter(name, type_url, value)
}

/// The end of every chain.
pub(super) fn router() -> HttpFilter {
    filter("router", ROUTER.into(), json!({}))
}

fn filter(name: &str, type_url: String, value: Value) -> HttpFilter {
    HttpFilter {
        name: name.into(),
        config: TypedConfig { type_url, value },
        discovery: None,
        is_optional: false,
        disabled: false,
    }
}

/// Puts in what is said.
fn put(fields: &mut Map<String, Value>, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        fields.insert(name.into(), value.into());
    }
}

fn openai(rules: &Rules<'_>, gateway: &Gateway) -> Value {
    let timeouts = rules.timeouts();
    let mut fields = Map::new();
    put(&mut fields, "body_bytes_max", Some(gateway.body_bytes_max));
    put(&mut fields, "tenant_header", gateway.tenant_header.clone());
    put(
        &mut fields,
        "headers_timeout_ms",
        timeouts.headers.map(Span::millis),
    );
    put(
        &mut fields,
        "first_token_timeout_ms",
        timeouts.first_token.map(Span::millis),
    );
    put(
        &mut fields,
        "inter_token_timeout_ms",
        timeouts.between_tokens.map(Span::millis),
    );
    put(
        &mut fields,
        "total_timeout_ms",
        timeouts.total.map(Span::millis),
    );
    fields.into()
}

fn token_ratelimit(rules: &Rules<'_>) -> Value {
    let Some(rule) = rules.rate_limits() else {
        return json!({});
    };
    let limits = rule.limits.iter().map(|limit| {
        json!({
            "name": limit.name,
            "key": limit.per,
            "requests_per_minute": limit.requests_per_minute,
            "tokens_per_minute": limit.tokens_per_minute,
        })
    });
    let mut fields = Map::new();
    put(&mut fields, "limits", Some(limits.collect::<Vec<_>>()));
    put(&mut fields, "default_max_tokens", rule.default_max_tokens);
    fields.into()
}

fn migration_value(rules: &Rules<'_>) -> Value {
    let rule = rules.migration();
    let mut fields = Map::new();
    put(&mut fields, "stall_ms", rule.stall.map(Span::millis));
    put(
        &mut fields,
        "resume_timeout_ms",
        rule.resume_timeout.map(Span::millis),
    );
    put(&mut fields, "attempts_max", rule.attempts);
    put(
        &mut fields,
        "same_distribution",
        rule.same_distribution.then_some(true),
    );
    fields.into()
}

fn kv_routing(rules: &Rules<'_>, fleet: &Fleet) -> Value {
    let weights = json!(rules.routing().weights);
    let mut value = json!({"block_tokens": fleet.block_tokens, "decision_header": true});
    if weights.as_object().is_some_and(|said| !said.is_empty()) {
        value["weights"] = weights;
    }
    value
}

fn disaggregation(rules: &Rules<'_>) -> Value {
    let rule = rules.split();
    let mut fields = Map::new();
    put(&mut fields, "decision_header", Some(true));
    let mode = (rule.mode != SplitMode::default()).then(|| json!(rule.mode));
    put(&mut fields, "mode", mode);
    put(&mut fields, "uncached_tokens_min", rule.uncached_tokens);
    put(
        &mut fields,
        "uncached_ms_min",
        rule.uncached_time.map(Span::millis),
    );
    put(
        &mut fields,
        "prefill_timeout_ms",
        rule.prefill_timeout.map(Span::millis),
    );
    let topology = (rule.topology != Topology::default()).then(|| json!(rule.topology));
    put(&mut fields, "locality", topology);
    fields.into()
}

/// How engines are asked: the figures of `--canary on`.
pub(super) fn health_check(rule: CanaryRule) -> HealthCheck {
    let seconds = Duration::from_secs;
    let golden = Golden {
        enforcing: match rule.golden {
            GoldenRule::Eject => Enforcing::Eject,
            GoldenRule::Report => Enforcing::Report,
            GoldenRule::None => Enforcing::Off,
        },
        ..Golden::default()
    };
    HealthCheck {
        timeout: seconds(3),
        interval: seconds(5),
        unhealthy_threshold: 3,
        healthy_threshold: 2,
        unhealthy_interval: seconds(1),
        checker: Checker::Canary(Canary {
            golden,
            ..Canary::default()
        }),
        ..HealthCheck::default()
    }
}

fn retry_policy(rule: &Retries) -> RetryPolicy {
    RetryPolicy {
        retry_on: rule.retry_on.clone(),
        num_retries: rule.attempts,
        per_try_timeout: rule.per_try_timeout.0,
        base_interval: rule.back_off.0,
        max_interval: rule.back_off.0 * BACK_OFF_TIMES,
        ..RetryPolicy::default()
    }
}

/// A route for everything, without a policy.
pub(super) fn plain_route(cluster: &str) -> Route {
    Route {
        name: cluster.to_owned(),
        r#match: RouteMatch::default(),
        action: Action::Route(RouteAction {
            cluster: cluster.to_owned().into(),
            timeout: Some(Duration::ZERO),
            ..RouteAction::default()
        }),
        typed_per_filter_config: BTreeMap::new(),
        headers: HeaderMutations::default(),
    }
}

/// A route for everything, under these rules.
pub(super) fn route(name: String, fleet: &str, rules: &Rules<'_>) -> Route {
    Route {
        name,
        action: Action::Route(RouteAction {
            cluster: fleet.to_owned().into(),
            timeout: Some(rules.timeouts().request.0),
            retry_policy: rules.retries().map(retry_policy),
            ..RouteAction::default()
        }),
        ..plain_route(fleet)
    }
}
