//! Which filters there are, by type URL. One line a filter.

use crate::{engine_api, filter::HttpFilter, kv_routing, openai, router, services::Services};
use outrigger_xds::resource::route::TypedConfig;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// Makes a filter from its configuration; the error names the field.
pub type Factory = fn(&serde_json::Value, &Services) -> Result<Arc<dyn HttpFilter>, String>;

/// A filter that ships.
pub struct Registration {
    /// Canonical short name, as in `outrigger.filters.http.NAME`.
    pub name: &'static str,
    /// Its type URLs; the first is ours or Envoy's canonical one.
    pub type_urls: &'static [&'static str],
    /// Whether it ends the chain.
    pub terminal: bool,
    /// Its constructor.
    pub factory: Factory,
}

/// Every filter.
pub const FILTERS: &[Registration] = &[
    Registration {
        name: "engine_api",
        type_urls: &[engine_api::TYPE_URL],
        terminal: false,
        factory: engine_api::factory,
    },
    Registration {
        name: "openai",
        type_urls: &[openai::TYPE_URL],
        terminal: false,
        factory: openai::factory,
    },
    Registration {
        name: "kv_routing",
        type_urls: &[kv_routing::TYPE_URL],
        terminal: false,
        factory: kv_routing::factory,
    },
    Registration {
        name: "router",
        type_urls: &[router::TYPE_URL],
        terminal: true,
        factory: router::factory,
    },
];

/// Looks a filter up by type URL.
#[must_use]
pub fn find(type_url: &str) -> Option<&'static Registration> {
    FILTERS
        .iter()
        .find(|filter| filter.type_urls.contains(&type_url))
}

/// Builds a filter.
///
/// # Errors
/// No such filter, or its configuration is wrong.
pub fn build(config: &TypedConfig, services: &Services) -> Result<Arc<dyn HttpFilter>, String> {
    let registration = find(&config.type_url).ok_or_else(|| {
        format!(
            "Didn't find a registered implementation for type URL: '{}'",
            config.type_url
        )
    })?;
    (registration.factory)(&config.value, services)
}

/// Reads a filter's configuration; `null` means all defaults, `@type` is not ours to judge.
///
/// # Errors
/// Unknown field, wrong type.
pub fn parse<T: DeserializeOwned + Default>(value: &serde_json::Value) -> Result<T, String> {
    let mut value = value.clone();
    if let Some(object) = value.as_object_mut() {
        object.remove("@type");
    }
    if value.is_null() {
        return Ok(T::default());
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}
