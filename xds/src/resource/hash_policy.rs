//! `RouteAction.HashPolicy`: what of a request is hashed, for policies that choose endpoints by hash.

use super::matching::RegexRewrite;
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, to_duration},
    wire::envoy::config::route::v3 as wire,
};
use std::time::Duration;
use wire::route_action::hash_policy::{self, PolicySpecifier};

/// One source of a hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashPolicy {
    /// What is hashed.
    pub source: HashSource,
    /// If there is a hash by now, those after it are left out.
    pub terminal: bool,
}

/// What is hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashSource {
    /// All values of a request header, sorted.
    Header {
        /// Which.
        name: String,
        /// Done to each value before.
        rewrite: Option<RegexRewrite>,
    },
    /// A cookie.
    Cookie(HashCookie),
    /// The client's address.
    SourceIp,
    /// The first value of a query parameter.
    QueryParameter(String),
}

/// A cookie that is hashed, and made where a client has none and there is a `ttl`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashCookie {
    /// Which.
    pub name: String,
    /// Zero makes a session cookie; none makes none.
    pub ttl: Option<Duration>,
    /// May be empty.
    pub path: String,
    /// More of its attributes, values may be empty.
    pub attributes: Vec<(String, String)>,
}

impl TryFrom<wire::route_action::HashPolicy> for HashPolicy {
    type Error = ConfigErrors;

    fn try_from(wire: wire::route_action::HashPolicy) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let source = match wire.policy_specifier {
            Some(PolicySpecifier::Header(header)) => {
                let name = problems.not_empty("header.header_name", header.header_name);
                let name = name.to_ascii_lowercase();
                if http::HeaderName::try_from(&name).is_err() {
                    problems.add("header.header_name", format!("'{name}' is no header name"));
                }
                let rewrite = header.regex_rewrite.and_then(|rewrite| {
                    problems.take("header.regex_rewrite", RegexRewrite::try_from(rewrite))
                });
                Some(HashSource::Header { name, rewrite })
            }
            Some(PolicySpecifier::Cookie(cookie)) => problems
                .take("cookie", HashCookie::try_from(cookie))
                .map(HashSource::Cookie),
            Some(PolicySpecifier::ConnectionProperties(properties)) => {
                if !properties.source_ip {
                    problems.add("connection_properties", "required: source_ip");
                }
                Some(HashSource::SourceIp)
            }
            Some(PolicySpecifier::QueryParameter(parameter)) => Some(HashSource::QueryParameter(
                problems.not_empty("query_parameter.name", parameter.name),
            )),
            None => {
                let message = "required: header, cookie, connection_properties or query_parameter";
                problems.add("", message);
                None
            }
        };
        problems.finish(source.map(|source| Self {
            source,
            terminal: wire.terminal,
        }))
    }
}

impl TryFrom<hash_policy::Cookie> for HashCookie {
    type Error = ConfigErrors;

    fn try_from(wire: hash_policy::Cookie) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let ttl = wire.ttl.and_then(|ttl| problems.take("ttl", duration(ttl)));
        let attributes: Vec<(String, String)> = wire
            .attributes
            .into_iter()
            .map(|attribute| (attribute.name, attribute.value))
            .collect();
        let texts = attributes
            .iter()
            .flat_map(|(name, value)| [name, value])
            .chain([&name, &wire.path]);
        for text in texts {
            if text.contains(|letter: char| letter == ';' || letter.is_control()) {
                problems.add("", format!("{text:?} cannot stand in a cookie"));
            }
        }
        problems.finish(Some(Self {
            name,
            ttl,
            path: wire.path,
            attributes,
        }))
    }
}

impl From<&HashPolicy> for wire::route_action::HashPolicy {
    fn from(plain: &HashPolicy) -> Self {
        let source = match &plain.source {
            HashSource::Header { name, rewrite } => PolicySpecifier::Header(hash_policy::Header {
                header_name: name.clone(),
                regex_rewrite: rewrite.as_ref().map(Into::into),
            }),
            HashSource::Cookie(cookie) => PolicySpecifier::Cookie(hash_policy::Cookie {
                name: cookie.name.clone(),
                ttl: cookie.ttl.map(to_duration),
                path: cookie.path.clone(),
                attributes: cookie
                    .attributes
                    .iter()
                    .cloned()
                    .map(|(name, value)| hash_policy::CookieAttribute { name, value })
                    .collect(),
            }),
            HashSource::SourceIp => {
                PolicySpecifier::ConnectionProperties(hash_policy::ConnectionProperties {
                    source_ip: true,
                })
            }
            HashSource::QueryParameter(name) => {
                PolicySpecifier::QueryParameter(hash_policy::QueryParameter { name: name.clone() })
            }
        };
        Self {
            policy_specifier: Some(source),
            terminal: plain.terminal,
        }
    }
}
