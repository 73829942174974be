//! `HttpFilter`: one filter of a connection manager's chain, and where its configuration comes from.

use super::{extension::ExtensionConfigSource, route::TypedConfig};
use crate::{
    problems::ConfigErrors,
    protobuf::type_name,
    wire::envoy::extensions::filters::{
        http::router::v3::Router, network::http_connection_manager::v3 as hcm,
    },
};
use hcm::http_filter::ConfigType;
use prost::Name;

/// One HTTP filter of the chain.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HttpFilter {
    /// The name that per-route configuration refers to, and that of its configuration where it comes from elsewhere.
    pub name: String,
    /// Which filter, and its configuration; with `discovery`, the one that came last, else the default. Without a type URL,
    /// there is none.
    pub config: TypedConfig,
    /// Where that comes from, if it is not inline.
    pub discovery: Option<Box<ExtensionConfigSource>>,
    /// An unknown filter is then left out instead of refused.
    pub is_optional: bool,
    /// In the chain only where a route's configuration brings it in.
    pub disabled: bool,
}

impl HttpFilter {
    /// Whether there is no configuration: it has not come, and has no default.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.discovery.is_some() && self.config.type_url.is_empty()
    }

    /// Which filters it may be.
    fn types(&self) -> Vec<&str> {
        match &self.discovery {
            None => vec![&self.config.type_url],
            Some(discovery) => discovery.type_urls.iter().map(String::as_str).collect(),
        }
    }
}

fn is_router(type_url: &str) -> bool {
    type_name(type_url) == Router::full_name()
}

/// The router forwards, so it is last, alone, and always on.
pub(super) fn check_router(problems: &mut ConfigErrors, filters: &[HttpFilter]) {
    let Some((last, others)) = filters.split_last() else {
        problems.add("http_filters", "required: at least the router");
        return;
    };
    for (index, filter) in others.iter().enumerate() {
        if filter.types().into_iter().any(is_router) {
            let message = format!(
                "terminal filter '{}' must be the last filter of the chain",
                filter.name
            );
            problems.add(format!("http_filters[{index}]"), message);
        }
    }
    let place = format!("http_filters[{}]", others.len());
    if !last.types().into_iter().all(is_router) {
        problems.add(
            place,
            format!(
                "non-terminal filter '{}' is the last filter of the chain; the router must be",
                last.name
            ),
        );
    } else if last.disabled {
        problems.add(place, "the router cannot be disabled");
    }
}

impl TryFrom<hcm::HttpFilter> for HttpFilter {
    type Error = ConfigErrors;

    fn try_from(wire: hcm::HttpFilter) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let mut discovery = None;
        let config = match wire.config_type {
            Some(ConfigType::TypedConfig(any)) => {
                problems.take("typed_config", TypedConfig::try_from(any))
            }
            Some(ConfigType::ConfigDiscovery(source)) => {
                let read = ExtensionConfigSource::try_from(source);
                discovery = problems.take("config_discovery", read).map(Box::new);
                discovery
                    .as_ref()
                    .map(|discovery| discovery.default_config.clone().unwrap_or_default())
            }
            None => {
                problems.add("", "required: typed_config or config_discovery");
                None
            }
        };
        problems.finish(config.map(|config| Self {
            name,
            config,
            discovery,
            is_optional: wire.is_optional,
            disabled: wire.disabled,
        }))
    }
}

impl From<&HttpFilter> for hcm::HttpFilter {
    fn from(plain: &HttpFilter) -> Self {
        let config = match &plain.discovery {
            None => ConfigType::TypedConfig((&plain.config).into()),
            Some(discovery) => ConfigType::ConfigDiscovery(discovery.as_ref().into()),
        };
        Self {
            name: plain.name.clone(),
            config_type: Some(config),
            is_optional: plain.is_optional,
            disabled: plain.disabled,
        }
    }
}
