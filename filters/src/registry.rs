//! Which filters there are, by type URL. One line a filter.

use crate::{
    cors, disaggregation, engine_api, fault, filter::HttpFilter, header_mutation, health_check,
    kv_routing, local_ratelimit, migration, openai, router, services::Services, stored_responses,
    token_ratelimit,
};
use outrigger_xds::resource::route::TypedConfig;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// Makes a filter from its configuration; the error names the field.
pub type Factory = fn(&serde_json::Value, &Services) -> Result<Arc<dyn HttpFilter>, String>;

/// Makes a filter for a route from its own configuration and that of the route, most specific first.
pub type OnRoute =
    fn(&serde_json::Value, &[TypedConfig], &Services) -> Result<Arc<dyn HttpFilter>, String>;

/// How a route configures a filter otherwise than the filter itself is configured.
pub struct PerRoute {
    /// Type URL of a route's configuration.
    pub type_url: &'static str,
    /// Its constructor.
    pub factory: OnRoute,
}

/// A filter that ships.
pub struct Registration {
    /// Canonical short name, as in `outrigger.filters.http.NAME`.
    pub name: &'static str,
    /// Its type URLs; the first is ours or Envoy's canonical one.
    pub type_urls: &'static [&'static str],
    /// Whether it ends the chain.
    pub terminal: bool,
    /// It also sees requests that go nowhere: those without a route, and those that their route answers itself.
    pub sees_all: bool,
    /// Its constructor.
    pub factory: Factory,
    /// Type URL of a filter that must stand before it.
    pub after: Option<&'static str>,
    /// `None`: a route's configuration has the filter's own type, and takes its place.
    pub per_route: Option<PerRoute>,
}

impl Registration {
    /// A filter that only sees what may go upstream.
    const fn new(name: &'static str, type_urls: &'static [&'static str], factory: Factory) -> Self {
        Self {
            name,
            type_urls,
            terminal: false,
            sees_all: false,
            factory,
            after: None,
            per_route: None,
        }
    }
}

/// Every filter.
pub const FILTERS: &[Registration] = &[
    Registration::new("engine_api", &[engine_api::TYPE_URL], engine_api::factory),
    Registration::new("openai", &[openai::TYPE_URL], openai::factory),
    Registration::new("kv_routing", &[kv_routing::TYPE_URL], kv_routing::factory),
    Registration {
        after: Some(openai::TYPE_URL),
        ..Registration::new(
            "stored_responses",
            &[stored_responses::TYPE_URL],
            stored_responses::factory,
        )
    },
    Registration {
        after: Some(openai::TYPE_URL),
        ..Registration::new("migration", &[migration::TYPE_URL], migration::factory)
    },
    Registration {
        after: Some(openai::TYPE_URL),
        ..Registration::new(
            "disaggregation",
            &[disaggregation::TYPE_URL],
            disaggregation::factory,
        )
    },
    Registration {
        after: Some(openai::TYPE_URL),
        ..Registration::new(
            "token_ratelimit",
            &[token_ratelimit::TYPE_URL],
            token_ratelimit::factory,
        )
    },
    Registration {
        sees_all: true,
        per_route: Some(PerRoute {
            type_url: header_mutation::ROUTE_TYPE_URL,
            factory: header_mutation::on_route,
        }),
        ..Registration::new(
            "header_mutation",
            &[header_mutation::TYPE_URL],
            header_mutation::factory,
        )
    },
    Registration {
        sees_all: true,
        ..Registration::new(
            "local_ratelimit",
            &[local_ratelimit::TYPE_URL],
            local_ratelimit::factory,
        )
    },
    Registration {
        sees_all: true,
        ..Registration::new(
            "health_check",
            &[health_check::TYPE_URL],
            health_check::factory,
        )
    },
    Registration {
        per_route: Some(PerRoute {
            type_url: cors::ROUTE_TYPE_URL,
            factory: cors::on_route,
        }),
        ..Registration::new("cors", &[cors::TYPE_URL], cors::factory)
    },
    Registration {
        sees_all: true,
        ..Registration::new("fault", &[fault::TYPE_URL], fault::factory)
    },
    Registration {
        terminal: true,
        ..Registration::new("router", &[router::TYPE_URL], router::factory)
    },
];

/// Looks a filter up by type URL.
#[must_use]
pub fn find(type_url: &str) -> Option<&'static Registration> {
    FILTERS
        .iter()
        .find(|filter| filter.type_urls.contains(&type_url))
}

/// Builds a filter. `own` is what a route (first) and what is around it say of it.
///
/// # Errors
/// No such filter, or its configuration is wrong.
pub fn build(
    config: &TypedConfig,
    own: &[TypedConfig],
    services: &Services,
) -> Result<Arc<dyn HttpFilter>, String> {
    let registration = find(&config.type_url).ok_or_else(|| unknown(&config.type_url))?;
    let Some(nearest) = own.first() else {
        return (registration.factory)(&config.value, services);
    };
    match &registration.per_route {
        Some(per_route) => {
            if let Some(wrong) = own.iter().find(|own| own.type_url != per_route.type_url) {
                return Err(format!(
                    "a route configures it by '{}', not by '{}'",
                    per_route.type_url, wrong.type_url
                ));
            }
            (per_route.factory)(&config.value, own, services)
        }
        None => build(nearest, &[], services),
    }
}

fn unknown(type_url: &str) -> String {
    format!("Didn't find a registered implementation for type URL: '{type_url}'")
}

/// Whether `type_url` is one that a route may configure a filter with.
#[must_use]
pub fn is_known(type_url: &str) -> bool {
    let is_per_route = |filter: &Registration| {
        filter
            .per_route
            .as_ref()
            .is_some_and(|per_route| per_route.type_url == type_url)
    };
    find(type_url).is_some() || FILTERS.iter().any(is_per_route)
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
