//! Tracing as a connection manager does it: which requests are traced, and what all their spans say.
//!
//! The span of a request is `http::span`'s; how spans get to a collector is [`exporter`]'s. Nothing here waits.

mod collector;
mod context;
mod exporter;
mod sampling;

pub(crate) use context::{Parent, TRACESTATE, parent, state};
pub use exporter::Exporters;
pub(crate) use sampling::{CLIENT_TRACE_ID, Reason, mark};

use exporter::Exporter;
use http::{HeaderMap, HeaderName};
use metrics::{Counter, counter};
use outrigger_filters::{services::Services, trace::Sink};
use outrigger_xds::{
    otlp::Attribute,
    resource::{
        listener::{HttpConnectionManager, TrafficDirection},
        tracing::{CustomTag, TagValue},
    },
};
use sampling::Sampling;
use std::sync::Arc;

/// The tracing of one connection manager.
pub(crate) struct Tracer {
    exporter: Arc<Exporter>,
    sampling: Sampling,
    tags: Vec<Tag>,
    decided: [Counter; 4],
    /// Bytes of a path that a span tells.
    pub(crate) path_bytes_max: usize,
    /// Each attempt has a span of its own.
    pub(crate) per_attempt: bool,
    /// Who arrives here.
    pub(crate) direction: TrafficDirection,
}

/// An attribute of all spans of a request.
enum Tag {
    Fixed(Attribute),
    OfHeader {
        tag: String,
        header: HeaderName,
        otherwise: String,
    },
}

impl Tracer {
    /// Of a connection manager that traces at all.
    pub(crate) fn new(
        manager: &HttpConnectionManager,
        direction: TrafficDirection,
        services: &Services,
        exporters: &Exporters,
    ) -> Option<Self> {
        let tracing = manager.tracing.as_ref()?;
        let provider = tracing.provider.as_ref()?;
        let prefix = || manager.stat_prefix.clone();
        crate::metrics::install();
        Some(Self {
            exporter: exporters.open(provider, services),
            sampling: Sampling::new(tracing),
            tags: tracing.custom_tags.iter().filter_map(prepare).collect(),
            decided: [
                counter!("envoy_http_tracing_not_traceable", "envoy_http_conn_manager_prefix" => prefix()),
                counter!("envoy_http_tracing_random_sampling", "envoy_http_conn_manager_prefix" => prefix()),
                counter!("envoy_http_tracing_service_forced", "envoy_http_conn_manager_prefix" => prefix()),
                counter!("envoy_http_tracing_client_enabled", "envoy_http_conn_manager_prefix" => prefix()),
            ],
            path_bytes_max: tracing.max_path_tag_length as usize,
            per_attempt: tracing.spawn_upstream_span,
            direction,
        })
    }

    /// Whether to trace a request that does not belong to a trace already, and why.
    pub(crate) fn decide(&self, headers: &HeaderMap, request_id: &str) -> Reason {
        let reason = self.sampling.decide(headers, request_id);
        self.decided[reason as usize].increment(1);
        reason
    }

    /// Attributes of all spans of a request.
    pub(crate) fn tags(&self, headers: &HeaderMap) -> Arc<[Attribute]> {
        let value = |tag: &Tag| match tag {
            Tag::Fixed(attribute) => Some(attribute.clone()),
            Tag::OfHeader {
                tag,
                header,
                otherwise,
            } => {
                let told = headers.get(header).and_then(|value| value.to_str().ok());
                let text = told.unwrap_or(otherwise);
                (!text.is_empty()).then(|| (tag.clone().into(), text.to_owned().into()))
            }
        };
        self.tags.iter().filter_map(value).collect()
    }

    /// Who takes spans that are over.
    pub(crate) fn sink(&self) -> Arc<dyn Sink> {
        self.exporter.clone()
    }
}

/// A tag with what of it is known beforehand; `None` if it never tells anything.
fn prepare(custom: &CustomTag) -> Option<Tag> {
    let fixed = |text: String| Tag::Fixed((custom.tag.clone().into(), text.into()));
    match &custom.value {
        TagValue::Literal(text) => Some(fixed(text.clone())),
        TagValue::Environment(name, otherwise) => {
            let text = std::env::var(name).unwrap_or_else(|_| otherwise.clone());
            (!text.is_empty()).then(|| fixed(text))
        }
        TagValue::RequestHeader(name, otherwise) => Some(Tag::OfHeader {
            tag: custom.tag.clone(),
            header: HeaderName::try_from(name).ok()?,
            otherwise: otherwise.clone(),
        }),
    }
}
