//! `HttpConnectionManager.Tracing`: which requests are traced, what their spans say, and who takes them.

use super::header_mutation::HeaderToAdd;
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, pack, to_duration, unpack},
    wire::envoy::{
        config::{core::v3 as core, trace::v3 as trace},
        extensions::filters::network::http_connection_manager::v3::http_connection_manager as hcm,
        r#type::{tracing::v3 as tag, v3::Percent},
    },
};
use core::{grpc_service::TargetSpecifier, http_uri::HttpUpstreamType};
use std::time::Duration;
use trace::tracing::http::ConfigType;

/// `max_path_tag_length` unless given, as in Envoy.
pub const MAX_PATH_TAG_LENGTH_DEFAULT: u32 = 256;
/// Of one export, unless given: what OpenTelemetry's own exporters have.
pub const EXPORT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// `Tracing`, the part we honour.
#[derive(Debug, Clone, PartialEq)]
pub struct Tracing {
    /// Who takes spans; without one nothing is traced.
    pub provider: Option<OpenTelemetry>,
    /// Per cent of the requests whose client asks for it. Default 100.
    pub client_sampling: f64,
    /// Per cent of the requests that nobody asked for. Default 100.
    pub random_sampling: f64,
    /// Per cent of all that would be traced. Default 100.
    pub overall_sampling: f64,
    /// Bytes of a path that a span tells.
    pub max_path_tag_length: u32,
    /// Attributes of all spans.
    pub custom_tags: Vec<CustomTag>,
    /// Each attempt has a span of its own.
    pub spawn_upstream_span: bool,
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            provider: None,
            client_sampling: 100.0,
            random_sampling: 100.0,
            overall_sampling: 100.0,
            max_path_tag_length: MAX_PATH_TAG_LENGTH_DEFAULT,
            custom_tags: Vec::new(),
            spawn_upstream_span: false,
        }
    }
}

/// `OpenTelemetryConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenTelemetry {
    /// `service.name`; may be empty.
    pub service_name: String,
    /// Where it is sent.
    pub cluster: String,
    /// Most that one export may take.
    pub timeout: Duration,
    /// Headers of each export.
    pub headers: Vec<HeaderToAdd>,
    /// How.
    pub transport: Transport,
}

/// The two ways of OTLP that we speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// gRPC.
    Grpc {
        /// `:authority`; empty is the cluster's name.
        authority: String,
    },
    /// Protobuf in a POST to this URI.
    Http {
        /// With scheme, host and path.
        uri: String,
    },
}

/// `envoy.type.tracing.v3.CustomTag`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomTag {
    /// Name of the attribute.
    pub tag: String,
    /// Its value.
    pub value: TagValue,
}

/// Where the value of a [`CustomTag`] comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagValue {
    /// Written here.
    Literal(String),
    /// A variable of our environment, and what is told without it (nothing, if that is empty).
    Environment(String, String),
    /// A header of the request (lower case), and what is told without it (nothing, if that is empty).
    RequestHeader(String, String),
}

impl TryFrom<hcm::Tracing> for Tracing {
    type Error = ConfigErrors;

    fn try_from(wire: hcm::Tracing) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let mut percent = |place: &str, given: Option<Percent>| match given {
            None => 100.0,
            Some(Percent { value }) => {
                if !(0.0..=100.0).contains(&value) {
                    problems.add(place, "must be between 0 and 100");
                }
                value
            }
        };
        let client_sampling = percent("client_sampling", wire.client_sampling);
        let random_sampling = percent("random_sampling", wire.random_sampling);
        let overall_sampling = percent("overall_sampling", wire.overall_sampling);
        let provider = wire
            .provider
            .and_then(|provider| problems.take("provider", provider.try_into()));
        let mut custom_tags = Vec::new();
        for (index, tag) in wire.custom_tags.into_iter().enumerate() {
            let tag = problems.take(&format!("custom_tags[{index}]"), custom_tag(tag));
            custom_tags.extend(tag.flatten());
        }
        problems.finish(Some(Self {
            provider,
            client_sampling,
            random_sampling,
            overall_sampling,
            max_path_tag_length: wire
                .max_path_tag_length
                .unwrap_or(MAX_PATH_TAG_LENGTH_DEFAULT),
            custom_tags,
            spawn_upstream_span: wire.spawn_upstream_span.unwrap_or(false),
        }))
    }
}

impl TryFrom<trace::tracing::Http> for OpenTelemetry {
    type Error = ConfigErrors;

    fn try_from(wire: trace::tracing::Http) -> Result<Self, ConfigErrors> {
        let Some(ConfigType::TypedConfig(any)) = wire.config_type else {
            return Err(ConfigErrors::one("", "required: typed_config"));
        };
        let mut problems = ConfigErrors::default();
        let Some(config) = unpack::<trace::OpenTelemetryConfig>(&any)? else {
            let message = format!("not supported yet: {} as a tracer", any.type_url);
            return Err(ConfigErrors::one("typed_config", message));
        };
        let read = problems.take("typed_config", Self::try_from(config));
        problems.finish(read)
    }
}

impl TryFrom<trace::OpenTelemetryConfig> for OpenTelemetry {
    type Error = ConfigErrors;

    fn try_from(wire: trace::OpenTelemetryConfig) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let exporter = match (wire.grpc_service, wire.http_service) {
            (Some(service), None) => problems.take("grpc_service", grpc(service)),
            (None, Some(service)) => problems.take("http_service", http(service)),
            _ => {
                problems.add("", "required: one of grpc_service and http_service");
                None
            }
        };
        problems.finish(exporter.map(|exporter| Self {
            service_name: wire.service_name,
            ..exporter
        }))
    }
}

fn limit(problems: &mut ConfigErrors, given: Option<prost_types::Duration>) -> Duration {
    given
        .and_then(|given| problems.take("timeout", duration(given)))
        .filter(|given| !given.is_zero())
        .unwrap_or(EXPORT_TIMEOUT_DEFAULT)
}

fn grpc(wire: core::GrpcService) -> Result<OpenTelemetry, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let target = match wire.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(target)) => target,
        Some(TargetSpecifier::GoogleGrpc(_)) => {
            return Err(ConfigErrors::one("", "not supported yet: google_grpc"));
        }
        None => return Err(ConfigErrors::one("", "required: envoy_grpc")),
    };
    if target.max_receive_message_length.is_some() {
        let message = "not supported yet: max_receive_message_length";
        problems.add("envoy_grpc", message);
    }
    let cluster = problems.not_empty("envoy_grpc.cluster_name", target.cluster_name);
    let timeout = limit(&mut problems, wire.timeout);
    let metadata = wire.initial_metadata.into_iter();
    let metadata = metadata.map(|header| core::HeaderValueOption {
        header: Some(header),
        ..core::HeaderValueOption::default()
    });
    let headers = headers(&mut problems, "initial_metadata", metadata.collect());
    problems.finish(Some(OpenTelemetry {
        service_name: String::new(),
        cluster,
        timeout,
        headers,
        transport: Transport::Grpc {
            authority: target.authority,
        },
    }))
}

fn http(wire: core::HttpService) -> Result<OpenTelemetry, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let Some(target) = wire.http_uri else {
        return Err(ConfigErrors::one("http_uri", "required"));
    };
    let cluster = match target.http_upstream_type {
        Some(HttpUpstreamType::Cluster(cluster)) => cluster,
        None => String::new(),
    };
    let cluster = problems.not_empty("http_uri.cluster", cluster);
    let is_whole = target
        .uri
        .parse::<::http::Uri>()
        .is_ok_and(|uri| uri.authority().is_some());
    if !is_whole {
        problems.add("http_uri.uri", "must have a scheme and a host");
    }
    let timeout = limit(&mut problems, target.timeout);
    let headers = headers(
        &mut problems,
        "request_headers_to_add",
        wire.request_headers_to_add,
    );
    problems.finish(Some(OpenTelemetry {
        service_name: String::new(),
        cluster,
        timeout,
        headers,
        transport: Transport::Http { uri: target.uri },
    }))
}

/// Headers of our own requests: there is nothing that a format could tell.
fn headers(
    problems: &mut ConfigErrors,
    place: &str,
    wire: Vec<core::HeaderValueOption>,
) -> Vec<HeaderToAdd> {
    let headers: Vec<HeaderToAdd> = problems.take_all(place, wire);
    for (index, header) in headers.iter().enumerate() {
        let place = format!("{place}[{index}]");
        if header.value.contains('%') {
            problems.add(place, "not supported yet: a format");
        } else if ::http::HeaderValue::from_str(&header.value).is_err() {
            problems.add(place, "no header value");
        }
    }
    headers
}

/// Nothing of one that could never have a value.
fn custom_tag(wire: tag::CustomTag) -> Result<Option<CustomTag>, ConfigErrors> {
    use tag::custom_tag::Type;
    let mut problems = ConfigErrors::default();
    let tag = problems.not_empty("tag", wire.tag);
    let value = match wire.r#type {
        // There are none, so it is always the default.
        Some(Type::Metadata(metadata)) if metadata.default_value.is_empty() => {
            return problems.finish(Some(None));
        }
        Some(Type::Metadata(metadata)) => TagValue::Literal(metadata.default_value),
        Some(Type::Literal(literal)) => {
            TagValue::Literal(problems.not_empty("literal.value", literal.value))
        }
        Some(Type::Environment(variable)) => TagValue::Environment(
            problems.not_empty("environment.name", variable.name),
            variable.default_value,
        ),
        Some(Type::RequestHeader(header)) => {
            let name = header.name.to_ascii_lowercase();
            if ::http::HeaderName::try_from(&name).is_err() {
                problems.add("request_header.name", format!("'{name}' is no header name"));
            }
            TagValue::RequestHeader(name, header.default_value)
        }
        None => {
            problems.add("", "required: literal, environment or request_header");
            return problems.finish(None);
        }
    };
    problems.finish(Some(Some(CustomTag { tag, value })))
}

impl From<&Tracing> for hcm::Tracing {
    fn from(plain: &Tracing) -> Self {
        let percent = |value: f64| (value < 100.0).then_some(Percent { value });
        let length = plain.max_path_tag_length;
        Self {
            client_sampling: percent(plain.client_sampling),
            random_sampling: percent(plain.random_sampling),
            overall_sampling: percent(plain.overall_sampling),
            max_path_tag_length: (length != MAX_PATH_TAG_LENGTH_DEFAULT).then_some(length),
            custom_tags: plain.custom_tags.iter().map(Into::into).collect(),
            provider: plain.provider.as_ref().map(Into::into),
            spawn_upstream_span: plain.spawn_upstream_span.then_some(true),
        }
    }
}

impl From<&OpenTelemetry> for trace::tracing::Http {
    fn from(plain: &OpenTelemetry) -> Self {
        let timeout = Some(to_duration(plain.timeout));
        let mut config = trace::OpenTelemetryConfig {
            service_name: plain.service_name.clone(),
            ..trace::OpenTelemetryConfig::default()
        };
        let headers = plain.headers.iter().map(core::HeaderValueOption::from);
        match &plain.transport {
            Transport::Grpc { authority } => {
                let target = core::grpc_service::EnvoyGrpc {
                    cluster_name: plain.cluster.clone(),
                    authority: authority.clone(),
                    max_receive_message_length: None,
                };
                config.grpc_service = Some(core::GrpcService {
                    target_specifier: Some(TargetSpecifier::EnvoyGrpc(target)),
                    timeout,
                    initial_metadata: headers.filter_map(|option| option.header).collect(),
                });
            }
            Transport::Http { uri } => {
                config.http_service = Some(core::HttpService {
                    http_uri: Some(core::HttpUri {
                        uri: uri.clone(),
                        http_upstream_type: Some(HttpUpstreamType::Cluster(plain.cluster.clone())),
                        timeout,
                    }),
                    request_headers_to_add: headers.collect(),
                });
            }
        }
        Self {
            name: "envoy.tracers.opentelemetry".into(),
            config_type: Some(ConfigType::TypedConfig(pack(&config))),
        }
    }
}

impl From<&CustomTag> for tag::CustomTag {
    fn from(plain: &CustomTag) -> Self {
        use tag::custom_tag::{Environment, Header, Literal, Type};
        let value = match plain.value.clone() {
            TagValue::Literal(value) => Type::Literal(Literal { value }),
            TagValue::Environment(name, default_value) => Type::Environment(Environment {
                name,
                default_value,
            }),
            TagValue::RequestHeader(name, default_value) => Type::RequestHeader(Header {
                name,
                default_value,
            }),
        };
        Self {
            tag: plain.tag.clone(),
            r#type: Some(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protobuf::{plain, to_json};
    use serde_json::{Value, json};

    fn read(value: &Value) -> Result<Tracing, ConfigErrors> {
        plain::<hcm::Tracing, Tracing>(value)
    }

    fn provider(config: Value) -> Value {
        let mut config = config;
        config["@type"] = "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig".into();
        json!({"name": "envoy.tracers.opentelemetry", "typed_config": config})
    }

    #[test]
    fn what_is_read_is_shown_and_read_again() {
        let by_grpc = provider(json!({
            "service_name": "s",
            "grpc_service": {
                "envoy_grpc": {"cluster_name": "c", "authority": "a"},
                "timeout": "0.500s",
                "initial_metadata": [{"key": "k", "value": "v"}],
            },
        }));
        let by_http = provider(json!({
            "http_service": {
                "http_uri": {"uri": "http://otel:4318/v1/traces", "cluster": "c", "timeout": "1s"},
                "request_headers_to_add": [{"header": {"key": "k", "value": "v"}}],
            },
        }));
        for provider in [by_grpc, by_http] {
            let tracing = read(&json!({
                "provider": provider,
                "client_sampling": {"value": 1.0},
                "random_sampling": {"value": 0.25},
                "overall_sampling": {"value": 50.0},
                "max_path_tag_length": 64,
                "custom_tags": [
                    {"tag": "a", "literal": {"value": "x"}},
                    {"tag": "b", "environment": {"name": "E", "default_value": "d"}},
                    {"tag": "c", "request_header": {"name": "X-A"}},
                ],
                "spawn_upstream_span": true,
            }))
            .unwrap();
            assert_eq!(tracing.random_sampling, 0.25);
            let header = TagValue::RequestHeader("x-a".into(), String::new());
            assert_eq!(tracing.custom_tags[2].value, header);
            let shown = to_json(&hcm::Tracing::from(&tracing));
            assert_eq!(read(&shown).unwrap(), tracing);
        }
        assert_eq!(read(&json!({})).unwrap(), Tracing::default());
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let cases = [
            (
                json!({"random_sampling": {"value": 101}}),
                "random_sampling: must be between",
            ),
            (
                json!({"custom_tags": [{"tag": "a"}]}),
                "custom_tags[0]: required",
            ),
            (
                json!({"provider": {"name": "x"}}),
                "provider: required: typed_config",
            ),
            (
                json!({"provider": provider(json!({}))}),
                "provider.typed_config: required: one of",
            ),
            (
                json!({"provider": provider(json!({"grpc_service": {"envoy_grpc": {}}}))}),
                "provider.typed_config.grpc_service.envoy_grpc.cluster_name: must not be empty",
            ),
            (
                json!({"provider": provider(json!({"grpc_service": {"google_grpc": {}}}))}),
                "provider.typed_config.grpc_service: not supported yet: google_grpc",
            ),
            (
                json!({"provider": provider(json!({"grpc_service": {"envoy_grpc": {"cluster_name": "c", "max_receive_message_length": 1}}}))}),
                "grpc_service.envoy_grpc: not supported yet: max_receive_message_length",
            ),
            (
                json!({"provider": provider(json!({"http_service": {"http_uri": {"uri": "/v1", "cluster": "c"}}}))}),
                "http_uri.uri: must have a scheme and a host",
            ),
        ];
        for (value, expected) in cases {
            let error = read(&value).unwrap_err().to_string();
            assert!(error.contains(expected), "{value}: {error}");
        }
    }
}
