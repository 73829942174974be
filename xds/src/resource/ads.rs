//! `envoy.config.core.v3.ApiConfigSource`: a control plane, and how it is spoken to.

use super::endpoint::Address;
use crate::{
    problems::ConfigErrors,
    subscription::{Protocol, RateLimit},
    wire::envoy::config::core::v3 as wire,
};
use std::fmt;
use wire::{api_config_source::ApiType, grpc_service as grpc};

/// Longest message of a server unless said.
pub const MESSAGE_BYTES_MAX_DEFAULT: usize = 256 << 20;

/// The control plane.
#[derive(Debug, Clone, PartialEq)]
pub struct Ads {
    /// `api_type`.
    pub protocol: Protocol,
    /// Its servers; the next is used while those before it cannot be reached. At least one.
    pub servers: Vec<GrpcService>,
    /// `rate_limit_settings`; none is Envoy's numbers.
    pub rate_limit: Option<RateLimit>,
}

/// `GrpcService`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcService {
    /// Where it is.
    pub target: Target,
    /// Headers of its requests.
    pub initial_metadata: Vec<(String, String)>,
}

/// Where a gRPC server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `envoy_grpc`: an endpoint of a cluster.
    Cluster {
        /// Its name.
        name: String,
        /// `:authority`; empty is the cluster's name.
        authority: String,
        /// Longest message that is read.
        message_bytes_max: Option<u32>,
    },
    /// `google_grpc`: an address, in plain text.
    Address {
        /// Parsed.
        address: Address,
        /// As written.
        uri: String,
        /// `stat_prefix`, of no effect.
        stat_prefix: String,
    },
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster { name, .. } => write!(f, "cluster '{name}'"),
            Self::Address { address, .. } => address.fmt(f),
        }
    }
}

impl fmt::Display for Ads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, server) in self.servers.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{}", server.target)?;
        }
        Ok(())
    }
}

impl TryFrom<wire::ApiConfigSource> for Ads {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ApiConfigSource) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let protocol = match wire.api_type() {
            ApiType::Grpc | ApiType::AggregatedGrpc => Protocol::State,
            ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc => Protocol::Delta,
            other => {
                let name = other.as_str_name();
                problems.add("api_type", format!("not supported: {name}"));
                Protocol::State
            }
        };
        if wire.transport_api_version() != wire::ApiVersion::V3 {
            let name = wire.transport_api_version().as_str_name();
            problems.add("transport_api_version", format!("must be V3, is {name}"));
        }
        if wire.grpc_services.is_empty() {
            problems.add("grpc_services", "at least one is required");
        }
        let servers = problems.take_all("grpc_services", wire.grpc_services);
        let rate_limit = wire
            .rate_limit_settings
            .and_then(|settings| problems.take("rate_limit_settings", settings.try_into()));
        problems.finish(Some(Self {
            protocol,
            servers,
            rate_limit,
        }))
    }
}

impl TryFrom<wire::RateLimitSettings> for RateLimit {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RateLimitSettings) -> Result<Self, ConfigErrors> {
        let default = Self::default();
        let limit = Self {
            max_tokens: wire.max_tokens.unwrap_or(default.max_tokens),
            fill_rate: wire.fill_rate.unwrap_or(default.fill_rate),
        };
        if limit.max_tokens == 0 {
            return Err(ConfigErrors::one("max_tokens", "must be greater than 0"));
        }
        if !limit.fill_rate.is_finite() || limit.fill_rate <= 0.0 {
            return Err(ConfigErrors::one("fill_rate", "must be greater than 0"));
        }
        Ok(limit)
    }
}

impl TryFrom<wire::GrpcService> for GrpcService {
    type Error = ConfigErrors;

    fn try_from(wire: wire::GrpcService) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let target = match wire.target_specifier {
            Some(grpc::TargetSpecifier::EnvoyGrpc(cluster)) => Some(Target::Cluster {
                name: problems.not_empty("envoy_grpc.cluster_name", cluster.cluster_name),
                authority: cluster.authority,
                message_bytes_max: cluster.max_receive_message_length.filter(|max| *max > 0),
            }),
            Some(grpc::TargetSpecifier::GoogleGrpc(server)) => {
                problems.not_empty("google_grpc.stat_prefix", server.stat_prefix.clone());
                let parsed = address(&server.target_uri);
                let address = problems.take("google_grpc.target_uri", parsed);
                address.map(|address| Target::Address {
                    address,
                    uri: server.target_uri,
                    stat_prefix: server.stat_prefix,
                })
            }
            None => {
                problems.add("", "required: envoy_grpc or google_grpc");
                None
            }
        };
        let mut initial_metadata = Vec::new();
        for (index, header) in wire.initial_metadata.into_iter().enumerate() {
            let place = format!("initial_metadata[{index}]");
            if http::HeaderName::from_bytes(header.key.as_bytes()).is_err() {
                problems.add(format!("{place}.key"), "not a header name");
            }
            if http::HeaderValue::from_str(&header.value).is_err() {
                problems.add(format!("{place}.value"), "not a header value");
            }
            if header.value.contains('%') {
                problems.add(format!("{place}.value"), "not supported yet: operators");
            }
            initial_metadata.push((header.key, header.value));
        }
        problems.finish(target.map(|target| Self {
            target,
            initial_metadata,
        }))
    }
}

/// gRPC's names of servers, as far as they are one: `host:port`, `dns:host:port`, `dns:///host:port`, `unix:path`.
fn address(uri: &str) -> Result<Address, ConfigErrors> {
    let wrong = || {
        let message = format!("expected host:port or unix:/path, got '{uri}'");
        Err(ConfigErrors::one("", message))
    };
    if let Some(path) = uri.strip_prefix("unix:") {
        let host = path.strip_prefix("//").unwrap_or(path).to_owned();
        let pipe = Address { host, port: 0 };
        return if pipe.is_pipe() { Ok(pipe) } else { wrong() };
    }
    let name = uri
        .strip_prefix("dns:///")
        .or_else(|| uri.strip_prefix("dns:"))
        .unwrap_or(uri);
    let Some((host, port)) = name.rsplit_once(':') else {
        return wrong();
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match port.parse() {
        Ok(port) if !host.is_empty() && !host.contains('/') => Ok(Address {
            host: host.to_owned(),
            port,
        }),
        _ => wrong(),
    }
}

impl From<&Ads> for wire::ApiConfigSource {
    fn from(plain: &Ads) -> Self {
        let api_type = match plain.protocol {
            Protocol::State => ApiType::Grpc,
            Protocol::Delta => ApiType::DeltaGrpc,
        };
        Self {
            api_type: api_type.into(),
            grpc_services: plain.servers.iter().map(Into::into).collect(),
            rate_limit_settings: plain.rate_limit.map(|limit| wire::RateLimitSettings {
                max_tokens: Some(limit.max_tokens),
                fill_rate: Some(limit.fill_rate),
            }),
            set_node_on_first_message_only: true,
            transport_api_version: wire::ApiVersion::V3.into(),
        }
    }
}

impl From<&GrpcService> for wire::GrpcService {
    fn from(plain: &GrpcService) -> Self {
        let target = match plain.target.clone() {
            Target::Cluster {
                name,
                authority,
                message_bytes_max,
            } => grpc::TargetSpecifier::EnvoyGrpc(grpc::EnvoyGrpc {
                cluster_name: name,
                authority,
                max_receive_message_length: message_bytes_max,
            }),
            Target::Address {
                uri, stat_prefix, ..
            } => grpc::TargetSpecifier::GoogleGrpc(grpc::GoogleGrpc {
                target_uri: uri,
                stat_prefix,
            }),
        };
        let headers = plain.initial_metadata.iter();
        Self {
            target_specifier: Some(target),
            timeout: None,
            initial_metadata: headers
                .map(|(key, value)| wire::HeaderValue {
                    key: key.clone(),
                    value: value.clone(),
                })
                .collect(),
        }
    }
}
