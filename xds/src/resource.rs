//! Configuration resources as plain validated types, one file per resource.
//!
//! These are what the configuration means, after all field checks; how it was written (YAML, JSON, protobuf) is
//! behind us. Names are Envoy's. Cross checks (does a route's cluster exist) are the snapshot builder's.

pub mod access_log;
pub mod ads;
pub mod bootstrap;
pub mod canary;
pub mod cidr;
mod circuit_breakers;
pub mod client_cert;
pub mod cluster;
pub mod config_source;
mod connection;
mod discovery;
pub mod edge;
pub mod endpoint;
pub mod extension;
pub mod filter_chain;
pub mod hash_policy;
pub mod header_mutation;
pub mod health_check;
pub mod http_filter;
pub mod latency_monitor;
mod lb_policy;
mod lb_shown;
pub mod listener;
pub mod listener_filter;
pub mod local_reply;
pub mod log_filter;
pub mod matching;
pub mod mirror_policy;
mod name_match;
pub mod outlier_detection;
pub mod retry_policy;
pub mod route;
pub mod route_action;
pub mod runtime;
pub mod secret;
pub mod server_header;
pub mod socket_match;
pub mod tcp_proxy;
pub mod tls;
pub mod tracing;
pub mod upgrade;

/// The number of an `envoy.type.v3.StatusCode`.
#[must_use]
pub fn http_status(name: &str) -> Option<u16> {
    let code = crate::wire::envoy::r#type::v3::StatusCode::from_str_name(name)?;
    u16::try_from(code as i32).ok()
}
