//! Building the filter chain of each route: the connection manager's filters, with the route's own configuration.

use outrigger_filters::{filter::Chain, openai, registry, router, services::Services};
use outrigger_xds::resource::{
    listener::HttpFilter,
    route::{Route, TypedConfig},
};
use std::sync::Arc;

/// Envoy's wrapper that switches a filter off (or on) for a route.
const FILTER_CONFIG_URL: &str = "type.googleapis.com/envoy.config.route.v3.FilterConfig";

/// A route's chain, and what the connection manager must know of it.
#[derive(Clone)]
pub struct BuiltChain {
    /// The filters.
    pub filters: Chain,
    /// Whether `openai` is among them: then errors take OpenAI's form.
    pub openai: bool,
    /// Whether the router leaves out `x-envoy-*` headers.
    pub suppress_envoy_headers: bool,
}

/// Builds the chain for `route`.
///
/// # Errors
/// A filter is unknown (and not optional) or refuses its configuration; the text names it.
pub fn build(
    filters: &[HttpFilter],
    route: &Route,
    services: &Services,
) -> Result<BuiltChain, String> {
    let mut built = Vec::with_capacity(filters.len());
    let mut openai = false;
    let mut suppress_envoy_headers = false;
    for filter in filters {
        let Some(config) = effective(filter, route) else {
            continue;
        };
        if filter.is_optional && registry::find(&config.type_url).is_none() {
            tracing::info!(
                filter = filter.name,
                type_url = config.type_url,
                "optional filter is unknown, left out"
            );
            continue;
        }
        let instance = registry::build(&config, services)
            .map_err(|error| format!("http_filters[{}]: {error}", filter.name))?;
        openai |= config.type_url == openai::TYPE_URL;
        if config.type_url == router::TYPE_URL {
            let config = registry::parse::<router::Config>(&config.value)?;
            suppress_envoy_headers = config.suppress_envoy_headers;
        }
        built.push(instance);
    }
    for name in route.typed_per_filter_config.keys() {
        if !filters.iter().any(|filter| filter.name == *name) {
            return Err(format!(
                "typed_per_filter_config[{name}]: no such filter in the chain"
            ));
        }
    }
    Ok(BuiltChain {
        filters: Arc::from(built),
        openai,
        suppress_envoy_headers,
    })
}

/// The configuration a filter has on a route; `None` if it is not in that route's chain.
fn effective(filter: &HttpFilter, route: &Route) -> Option<TypedConfig> {
    let Some(own) = route.typed_per_filter_config.get(&filter.name) else {
        return (!filter.disabled).then(|| filter.config.clone());
    };
    if own.type_url != FILTER_CONFIG_URL {
        return Some(own.clone());
    }
    let disabled = own
        .value
        .get("disabled")
        .and_then(serde_json::Value::as_bool)
        .unwrap_or(false);
    if disabled {
        return None;
    }
    let inner = own.value.get("config");
    let type_url = inner
        .and_then(|inner| inner.get("@type"))
        .and_then(serde_json::Value::as_str);
    match (type_url, inner) {
        (Some(type_url), Some(inner)) => Some(TypedConfig {
            type_url: type_url.to_owned(),
            value: inner.clone(),
        }),
        _ => Some(filter.config.clone()),
    }
}
