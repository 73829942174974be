//! `envoy.config.core.v3.ConfigSource`: where resources come from that are not written in place, and who asks for them.

use super::{ads::Ads, route::RouteConfiguration};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::{
        config::{cluster::v3::cluster::EdsClusterConfig, core::v3 as wire},
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
};
use prost::Message;
use std::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
    time::Duration,
};
use wire::{api_config_source::ApiType, config_source::ConfigSourceSpecifier};

/// How long the first resource is waited for unless said.
pub const INITIAL_FETCH_TIMEOUT_DEFAULT: Duration = Duration::from_secs(15);

/// Where resources come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConfigSource {
    /// Which source.
    pub origin: Origin,
    /// How long the first resource is waited for; zero is for ever.
    pub initial_fetch_timeout: Duration,
}

/// `config_source_specifier`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// A file that holds a `DiscoveryResponse`.
    Path(String),
    /// The control plane of the bootstrap.
    Ads,
    /// A control plane by its service of one type.
    Service(Service),
}

/// `api_config_source`. Two are the same that are written the same.
#[derive(Debug, Clone)]
pub struct Service {
    control_plane: Arc<Ads>,
    /// It has a floating-point number in it, so it is compared by its bytes.
    bytes: Arc<[u8]>,
}

impl Service {
    /// A control plane that is spoken to so.
    #[must_use]
    pub fn new(control_plane: Ads) -> Self {
        let bytes = wire::ApiConfigSource::from(&control_plane).encode_to_vec();
        Self {
            control_plane: Arc::new(control_plane),
            bytes: bytes.into(),
        }
    }

    /// Where it is, and how it is spoken to.
    #[must_use]
    pub fn control_plane(&self) -> &Arc<Ads> {
        &self.control_plane
    }
}

impl PartialEq for Service {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Service {}

impl PartialOrd for Service {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Service {
    fn cmp(&self, other: &Self) -> Ordering {
        self.bytes.cmp(&other.bytes)
    }
}

impl Hash for Service {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bytes.hash(state);
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => f.write_str(path),
            Self::Ads => f.write_str("ads"),
            Self::Service(service) => service.control_plane.fmt(f),
        }
    }
}

/// `Rds`: a route table that comes from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rds {
    /// Where from.
    pub source: ConfigSource,
    /// Its name there.
    pub name: String,
}

/// `EdsClusterConfig`: endpoints that come from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eds {
    /// Where from.
    pub source: ConfigSource,
    /// `service_name`; empty is the cluster's.
    pub service_name: String,
}

impl TryFrom<wire::ConfigSource> for ConfigSource {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ConfigSource) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        if wire.resource_api_version() == wire::ApiVersion::V2 {
            problems.add("resource_api_version", "not supported: V2");
        }
        let timeout = wire
            .initial_fetch_timeout
            .and_then(|timeout| problems.take("initial_fetch_timeout", duration(timeout)));
        let origin = match wire.config_source_specifier {
            Some(ConfigSourceSpecifier::PathConfigSource(file)) => {
                let path = problems.not_empty("path_config_source.path", file.path);
                if let Some(directory) = file.watched_directory {
                    problems.not_empty("path_config_source.watched_directory.path", directory.path);
                }
                Some(Origin::Path(path))
            }
            Some(ConfigSourceSpecifier::Ads(_)) => Some(Origin::Ads),
            Some(ConfigSourceSpecifier::ApiConfigSource(api)) => problems
                .take("api_config_source", Service::try_from(api))
                .map(Origin::Service),
            None => {
                problems.add("", "required: path_config_source, api_config_source or ads");
                None
            }
        };
        problems.finish(origin.map(|origin| Self {
            origin,
            initial_fetch_timeout: timeout.unwrap_or(INITIAL_FETCH_TIMEOUT_DEFAULT),
        }))
    }
}

impl TryFrom<wire::ApiConfigSource> for Service {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ApiConfigSource) -> Result<Self, ConfigErrors> {
        not_aggregated(&wire)?;
        Ads::try_from(wire).map(Self::new)
    }
}

/// Only `ads_config` is of all types.
pub(super) fn not_aggregated(wire: &wire::ApiConfigSource) -> Result<(), ConfigErrors> {
    let api_type = wire.api_type();
    match api_type {
        ApiType::AggregatedGrpc | ApiType::AggregatedDeltaGrpc => {
            let name = api_type.as_str_name();
            let message = format!("not supported: {name}; what is aggregated is named by ads");
            Err(ConfigErrors::one("api_type", message))
        }
        _ => Ok(()),
    }
}

impl From<&ConfigSource> for wire::ConfigSource {
    fn from(plain: &ConfigSource) -> Self {
        let origin = match &plain.origin {
            Origin::Path(path) => ConfigSourceSpecifier::PathConfigSource(wire::PathConfigSource {
                path: path.clone(),
                watched_directory: None,
            }),
            Origin::Ads => ConfigSourceSpecifier::Ads(wire::AggregatedConfigSource {}),
            Origin::Service(service) => {
                ConfigSourceSpecifier::ApiConfigSource((&*service.control_plane).into())
            }
        };
        let timeout = plain.initial_fetch_timeout;
        Self {
            config_source_specifier: Some(origin),
            initial_fetch_timeout: (timeout != INITIAL_FETCH_TIMEOUT_DEFAULT)
                .then(|| to_duration(timeout)),
            resource_api_version: wire::ApiVersion::V3.into(),
        }
    }
}

impl Rds {
    /// What stands in for the table until it is there.
    #[must_use]
    pub fn not_yet(&self) -> RouteConfiguration {
        RouteConfiguration {
            name: self.name.clone(),
            validate_clusters: false,
            ..RouteConfiguration::default()
        }
    }
}

impl TryFrom<hcm::Rds> for Rds {
    type Error = ConfigErrors;

    fn try_from(wire: hcm::Rds) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let source = problems.required("config_source", wire.config_source);
        let name = problems.not_empty("route_config_name", wire.route_config_name);
        problems.finish(source.map(|source| Self { source, name }))
    }
}

impl From<&Rds> for hcm::Rds {
    fn from(plain: &Rds) -> Self {
        Self {
            config_source: Some((&plain.source).into()),
            route_config_name: plain.name.clone(),
        }
    }
}

impl TryFrom<EdsClusterConfig> for Eds {
    type Error = ConfigErrors;

    fn try_from(wire: EdsClusterConfig) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let source = problems.required("eds_config", wire.eds_config);
        problems.finish(source.map(|source| Self {
            source,
            service_name: wire.service_name,
        }))
    }
}

impl From<&Eds> for EdsClusterConfig {
    fn from(plain: &Eds) -> Self {
        Self {
            eds_config: Some((&plain.source).into()),
            service_name: plain.service_name.clone(),
        }
    }
}
