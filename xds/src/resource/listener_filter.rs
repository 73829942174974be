//! `envoy.config.listener.v3.ListenerFilter`: what looks at a connection before its filter chain is found.

use crate::{
    problems::ConfigErrors,
    protobuf::{pack, unpack},
    wire::envoy::{
        config::{core::v3::proxy_protocol_config as header, listener::v3 as wire},
        extensions::filters::listener::{
            http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst,
            proxy_protocol::v3 as proxy_protocol, tls_inspector::v3::TlsInspector,
        },
        r#type::v3::Int32Range,
    },
};
use prost_types::Any;
use std::ops::Range;
use wire::listener_filter_chain_match_predicate::{MatchSet, Rule};

/// Largest first message of a TLS handshake that is read unless said otherwise, and the most that may be said; in bytes.
pub const CLIENT_HELLO_BYTES_MAX: usize = 16 * 1024;
/// The least that may be said, as in Envoy; in bytes.
const CLIENT_HELLO_BYTES_MIN: usize = 256;

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub struct ListenerFilter {
    /// Free.
    pub name: String,
    /// Which, and its configuration.
    pub kind: Kind,
    /// Connections it does not look at.
    pub disabled: Option<Predicate>,
}

/// Which filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Reads server name and protocols from a TLS handshake.
    TlsInspector {
        /// Bytes.
        client_hello_bytes_max: usize,
    },
    /// Tells HTTP/1.0, HTTP/1.1 and HTTP/2 from what is no HTTP.
    HttpInspector,
    /// Asks the system where a redirected connection was sent.
    OriginalDst,
    /// Reads who the client is from what a proxy before us wrote.
    ProxyProtocol(ProxyProtocol),
}

/// `ProxyProtocol`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProxyProtocol {
    /// Connections without a header are let in as they are.
    pub allow_without: bool,
    /// The text form is refused.
    pub v1_disallowed: bool,
    /// The binary form is refused.
    pub v2_disallowed: bool,
    /// Label of its metrics; may be empty.
    pub stat_prefix: String,
}

/// `ListenerFilterChainMatchPredicate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Predicate {
    /// One of them holds.
    Or(Vec<Self>),
    /// All of them hold.
    And(Vec<Self>),
    /// It does not hold.
    Not(Box<Self>),
    /// Always.
    Any,
    /// The connection was sent to one of these ports.
    DestinationPort(Range<u32>),
}

impl Predicate {
    /// Whether it holds of a connection sent to `port`; one to a pipe has none.
    #[must_use]
    pub fn holds(&self, port: Option<u16>) -> bool {
        match self {
            Self::Or(rules) => rules.iter().any(|rule| rule.holds(port)),
            Self::And(rules) => rules.iter().all(|rule| rule.holds(port)),
            Self::Not(rule) => !rule.holds(port),
            Self::Any => true,
            Self::DestinationPort(ports) => port.is_some_and(|port| ports.contains(&port.into())),
        }
    }
}

impl ListenerFilter {
    /// As Envoy puts it in where a filter chain asks for what only it can tell.
    #[must_use]
    pub fn tls_inspector() -> Self {
        Self {
            name: "envoy.filters.listener.tls_inspector".into(),
            kind: Kind::TlsInspector {
                client_hello_bytes_max: CLIENT_HELLO_BYTES_MAX,
            },
            disabled: None,
        }
    }
}

impl TryFrom<wire::ListenerFilter> for ListenerFilter {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ListenerFilter) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let kind = match wire.config_type {
            Some(wire::listener_filter::ConfigType::TypedConfig(any)) => {
                problems.take("typed_config", kind(&any))
            }
            None => {
                problems.add("", "required: typed_config");
                None
            }
        };
        let disabled = problems.take(
            "filter_disabled",
            wire.filter_disabled.map(predicate).transpose(),
        );
        problems.finish(kind.map(|kind| Self {
            name,
            kind,
            disabled: disabled.flatten(),
        }))
    }
}

fn kind(any: &Any) -> Result<Kind, ConfigErrors> {
    if let Some(inspector) = unpack::<TlsInspector>(any)? {
        let most = inspector.max_client_hello_size;
        let most = most.map_or(CLIENT_HELLO_BYTES_MAX, |most| most as usize);
        if !(CLIENT_HELLO_BYTES_MIN..=CLIENT_HELLO_BYTES_MAX).contains(&most) {
            let message = format!(
                "must be between {CLIENT_HELLO_BYTES_MIN} and {CLIENT_HELLO_BYTES_MAX}, is {most}"
            );
            return Err(ConfigErrors::one("max_client_hello_size", message));
        }
        return Ok(Kind::TlsInspector {
            client_hello_bytes_max: most,
        });
    }
    if unpack::<HttpInspector>(any)?.is_some() {
        return Ok(Kind::HttpInspector);
    }
    if unpack::<OriginalDst>(any)?.is_some() {
        return Ok(Kind::OriginalDst);
    }
    if let Some(protocol) = unpack::<proxy_protocol::ProxyProtocol>(any)? {
        let refused = |version| protocol.disallowed_versions().any(|given| given == version);
        return Ok(Kind::ProxyProtocol(ProxyProtocol {
            allow_without: protocol.allow_requests_without_proxy_protocol,
            v1_disallowed: refused(header::Version::V1),
            v2_disallowed: refused(header::Version::V2),
            stat_prefix: protocol.stat_prefix,
        }));
    }
    let message = format!("not supported yet: {} as a listener filter", any.type_url);
    Err(ConfigErrors::one("", message))
}

fn predicate(wire: wire::ListenerFilterChainMatchPredicate) -> Result<Predicate, ConfigErrors> {
    match wire.rule {
        None => Err(ConfigErrors::one("", "required: a rule")),
        Some(Rule::OrMatch(set)) => Ok(Predicate::Or(rules("or_match", set)?)),
        Some(Rule::AndMatch(set)) => Ok(Predicate::And(rules("and_match", set)?)),
        Some(Rule::NotMatch(inner)) => {
            let mut problems = ConfigErrors::default();
            let inner = problems.take("not_match", predicate(*inner));
            problems.finish(inner.map(|inner| Predicate::Not(Box::new(inner))))
        }
        Some(Rule::AnyMatch(true)) => Ok(Predicate::Any),
        Some(Rule::AnyMatch(false)) => Err(ConfigErrors::one("any_match", "must be true")),
        Some(Rule::DestinationPortRange(Int32Range { start, end })) => {
            let port = |number| u32::try_from(number).ok();
            match (port(start), port(end)) {
                (Some(start), Some(end)) if start < end && end <= 65_536 => {
                    Ok(Predicate::DestinationPort(start..end))
                }
                _ => Err(ConfigErrors::one(
                    "destination_port_range",
                    "must be from one port to before a higher one",
                )),
            }
        }
    }
}

fn rules(place: &str, set: MatchSet) -> Result<Vec<Predicate>, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    if set.rules.len() < 2 {
        problems.add(format!("{place}.rules"), "must have at least 2 entries");
    }
    let mut read = Vec::new();
    for (index, rule) in set.rules.into_iter().enumerate() {
        read.extend(problems.take(&format!("{place}.rules[{index}]"), predicate(rule)));
    }
    problems.finish(Some(read))
}

impl From<&ListenerFilter> for wire::ListenerFilter {
    fn from(plain: &ListenerFilter) -> Self {
        let any = match &plain.kind {
            Kind::TlsInspector {
                client_hello_bytes_max,
            } => pack(&TlsInspector {
                initial_read_buffer_size: None,
                max_client_hello_size: u32::try_from(*client_hello_bytes_max).ok(),
            }),
            Kind::HttpInspector => pack(&HttpInspector {}),
            Kind::OriginalDst => pack(&OriginalDst {}),
            Kind::ProxyProtocol(protocol) => {
                let refused = [
                    (protocol.v1_disallowed, header::Version::V1),
                    (protocol.v2_disallowed, header::Version::V2),
                ];
                let refused = refused.into_iter().filter(|(refused, _)| *refused);
                pack(&proxy_protocol::ProxyProtocol {
                    allow_requests_without_proxy_protocol: protocol.allow_without,
                    disallowed_versions: refused.map(|(_, version)| version.into()).collect(),
                    stat_prefix: protocol.stat_prefix.clone(),
                })
            }
        };
        Self {
            name: plain.name.clone(),
            filter_disabled: plain.disabled.as_ref().map(Into::into),
            config_type: Some(wire::listener_filter::ConfigType::TypedConfig(any)),
        }
    }
}

impl From<&Predicate> for wire::ListenerFilterChainMatchPredicate {
    fn from(plain: &Predicate) -> Self {
        let set = |rules: &[Predicate]| MatchSet {
            rules: rules.iter().map(Into::into).collect(),
        };
        let rule = match plain {
            Predicate::Or(rules) => Rule::OrMatch(set(rules)),
            Predicate::And(rules) => Rule::AndMatch(set(rules)),
            Predicate::Not(rule) => Rule::NotMatch(Box::new(Self::from(rule.as_ref()))),
            Predicate::Any => Rule::AnyMatch(true),
            Predicate::DestinationPort(ports) => Rule::DestinationPortRange(Int32Range {
                start: ports.start.cast_signed(),
                end: ports.end.cast_signed(),
            }),
        };
        Self { rule: Some(rule) }
    }
}
