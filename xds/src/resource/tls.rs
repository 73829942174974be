//! `envoy.extensions.transport_sockets.tls.v3`: what is spoken, who we are, and whom we believe.
//!
//! Only what was written: files are read, and certificates judged, by whoever builds a context of it.

pub use super::name_match::{NameKind, NameMatch, NamePattern, WholeRegex};

use super::secret::{self, SecretConfig, ValidationSecret};
use crate::{
    problems::{ConfigErrors, join},
    protobuf::{pack, unpack},
    wire::envoy::{
        config::core::v3 as core,
        extensions::transport_sockets::{raw_buffer::v3::RawBuffer, tls::v3 as wire},
        r#type::matcher::v3::StringMatcher,
    },
};
use core::data_source::Specifier;
use std::fmt;

/// Names of the transport sockets, as Envoy's examples write them.
const TLS: &str = "envoy.transport_sockets.tls";
/// With whom an Istio proxy agrees on this, it exchanges its metadata ahead of the stream. We do not, so we never agree on it.
const METADATA_AHEAD: &str = "istio-peer-exchange";
/// What `/config_dump` shows in place of a key.
const REDACTED: &str = "[redacted]";

/// Whether a resource in JSON lacks a key that it had inline.
#[must_use]
pub fn is_redacted(resource: &serde_json::Value) -> bool {
    use serde_json::Value;
    match resource {
        Value::String(text) => text == REDACTED,
        Value::Array(all) => all.iter().any(is_redacted),
        Value::Object(all) => all.values().any(is_redacted),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Where bytes come from.
#[derive(Clone, PartialEq, Eq)]
pub enum DataSource {
    /// A file, read when a context is built of it, and again when it changes.
    File(String),
    /// Given in the configuration.
    Inline(Vec<u8>),
}

impl fmt::Debug for DataSource {
    // What is inline may be a key, and logs are no place for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "File({path:?})"),
            Self::Inline(bytes) => write!(f, "Inline({} bytes)", bytes.len()),
        }
    }
}

/// `DownstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownstreamTls {
    /// What both directions share; at least one certificate, or secret with one.
    pub common: CommonTls,
    /// Clients without a certificate are refused; then there is a validation.
    pub require_client_certificate: bool,
}

/// `UpstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UpstreamTls {
    /// What both directions share; at most one certificate.
    pub common: CommonTls,
    /// Server name to ask for; empty asks for none.
    pub sni: String,
}

/// `CommonTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommonTls {
    /// Versions and algorithms.
    pub params: TlsParams,
    /// Ours.
    pub certificates: Vec<TlsCertificate>,
    /// Ours, in secrets; then there are no others.
    pub certificate_secrets: Vec<SecretConfig>,
    /// Whom we believe.
    pub validation: Option<Validation>,
    /// Whom we believe is a secret; then there is no other. Neither means that nobody is looked at.
    pub validation_secret: Option<ValidationSecret>,
    /// Protocols offered, best first.
    pub alpn: Vec<String>,
}

/// `TlsParameters`; empty lists mean our defaults.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsParams {
    /// Whether TLS 1.2 is not spoken.
    pub only_1_3: bool,
    /// Whether TLS 1.3 is not spoken.
    pub only_1_2: bool,
    /// Names of BoringSSL, best first.
    pub cipher_suites: Vec<String>,
    /// Names of BoringSSL, best first.
    pub ecdh_curves: Vec<String>,
}

/// A certificate with its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsCertificate {
    /// PEM, leaf first.
    pub chain: DataSource,
    /// PEM.
    pub key: DataSource,
}

/// `CertificateValidationContext`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// PEM.
    pub trusted_ca: DataSource,
    /// One of these must hold; none means any name.
    pub names: Vec<NameMatch>,
}

/// For sources that can only be a text in the configuration itself.
pub(super) fn not_inline(source: &Specifier) -> &'static str {
    match source {
        Specifier::Filename(_) => "not supported yet: filename",
        Specifier::InlineBytes(_) => "not supported yet: inline_bytes",
        Specifier::InlineString(_) => "must be inline_string",
    }
}

/// The transport socket of a filter chain.
pub(crate) fn downstream(socket: core::TransportSocket) -> Result<DownstreamTls, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let context = problems.take(
        "typed_config",
        typed::<wire::DownstreamTlsContext>(socket).and_then(DownstreamTls::try_from),
    );
    problems.finish(context)
}

/// Plain text.
pub(super) fn plain() -> core::TransportSocket {
    core::TransportSocket {
        name: "envoy.transport_sockets.raw_buffer".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(pack(
            &RawBuffer {},
        ))),
    }
}

/// The transport socket of a cluster; none is plain text.
pub(crate) fn upstream(socket: core::TransportSocket) -> Result<Option<UpstreamTls>, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    if let Some(core::transport_socket::ConfigType::TypedConfig(any)) = &socket.config_type
        && problems
            .take("typed_config", unpack::<RawBuffer>(any))
            .flatten()
            .is_some()
    {
        return Ok(None);
    }
    let context = problems.take(
        "typed_config",
        typed::<wire::UpstreamTlsContext>(socket).and_then(UpstreamTls::try_from),
    );
    problems.finish(context.map(Some))
}

fn typed<M: prost::Message + prost::Name + Default>(
    socket: core::TransportSocket,
) -> Result<M, ConfigErrors> {
    let Some(core::transport_socket::ConfigType::TypedConfig(any)) = socket.config_type else {
        return Err(ConfigErrors::one("", "required"));
    };
    unpack::<M>(&any)?.ok_or_else(|| {
        let message = format!("not supported yet: {} as a transport socket", any.type_url);
        ConfigErrors::one("", message)
    })
}

impl TryFrom<wire::DownstreamTlsContext> for DownstreamTls {
    type Error = ConfigErrors;

    fn try_from(wire: wire::DownstreamTlsContext) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let common = problems.required("common_tls_context", wire.common_tls_context);
        let require_client_certificate = wire.require_client_certificate.unwrap_or_default();
        if let Some(common) = &common {
            let common: &CommonTls = common;
            if common.certificates.is_empty() && common.certificate_secrets.is_empty() {
                problems.add(
                    "common_tls_context.tls_certificates",
                    "required: at least one",
                );
            }
            let believes = common.validation.is_some() || common.validation_secret.is_some();
            if require_client_certificate && !believes {
                problems.add(
                    "require_client_certificate",
                    "needs common_tls_context.validation_context: whom to believe",
                );
            }
        }
        problems.finish(common.map(|common| Self {
            common,
            require_client_certificate,
        }))
    }
}

impl TryFrom<wire::UpstreamTlsContext> for UpstreamTls {
    type Error = ConfigErrors;

    fn try_from(wire: wire::UpstreamTlsContext) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let common: CommonTls = problems
            .take(
                "common_tls_context",
                wire.common_tls_context.unwrap_or_default().try_into(),
            )
            .unwrap_or_default();
        if common.certificates.len() + common.certificate_secrets.len() > 1 {
            problems.add(
                "common_tls_context.tls_certificates",
                "not supported yet: more than one",
            );
        }
        problems.finish(Some(Self {
            common,
            sni: wire.sni,
        }))
    }
}

impl From<&UpstreamTls> for core::TransportSocket {
    fn from(plain: &UpstreamTls) -> Self {
        let context = wire::UpstreamTlsContext {
            common_tls_context: Some((&plain.common).into()),
            sni: plain.sni.clone(),
        };
        Self {
            name: TLS.into(),
            config_type: Some(core::transport_socket::ConfigType::TypedConfig(pack(
                &context,
            ))),
        }
    }
}

impl TryFrom<wire::CommonTlsContext> for CommonTls {
    type Error = ConfigErrors;

    fn try_from(wire: wire::CommonTlsContext) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let params = problems
            .take("tls_params", wire.tls_params.unwrap_or_default().try_into())
            .unwrap_or_default();
        let certificates = problems.take_all("tls_certificates", wire.tls_certificates);
        let certificate_secrets: Vec<SecretConfig> = problems.take_all(
            "tls_certificate_sds_secret_configs",
            wire.tls_certificate_sds_secret_configs,
        );
        if !certificates.is_empty() && !certificate_secrets.is_empty() {
            problems.add(
                "",
                "only one of 'tls_certificates' and 'tls_certificate_sds_secret_configs' may be set",
            );
        }
        let (validation, validation_secret) =
            secret::validation(&mut problems, wire.validation_context_type);
        for (index, protocol) in wire.alpn_protocols.iter().enumerate() {
            if !(1..=255).contains(&protocol.len()) {
                problems.add(
                    format!("alpn_protocols[{index}]"),
                    "must have 1 to 255 bytes",
                );
            }
        }
        let mut alpn = wire.alpn_protocols;
        alpn.retain(|protocol| protocol != METADATA_AHEAD);
        problems.finish(Some(Self {
            params,
            certificates,
            certificate_secrets,
            validation,
            validation_secret,
            alpn,
        }))
    }
}

impl TryFrom<wire::TlsParameters> for TlsParams {
    type Error = ConfigErrors;

    fn try_from(wire: wire::TlsParameters) -> Result<Self, ConfigErrors> {
        use wire::tls_parameters::TlsProtocol;
        let mut problems = ConfigErrors::default();
        let (oldest, newest) = (
            wire.tls_minimum_protocol_version(),
            wire.tls_maximum_protocol_version(),
        );
        for (place, version) in [
            ("tls_minimum_protocol_version", oldest),
            ("tls_maximum_protocol_version", newest),
        ] {
            if matches!(version, TlsProtocol::TlSv10 | TlsProtocol::TlSv11) {
                problems.add(
                    place,
                    "not supported: TLS before 1.2, which RFC 8996 forbids",
                );
            }
        }
        if oldest == TlsProtocol::TlSv13 && newest == TlsProtocol::TlSv12 {
            problems.add(
                "tls_maximum_protocol_version",
                "must not be below tls_minimum_protocol_version",
            );
        }
        // `[A|B]` means that the client may choose between them; we always take what we like best.
        let suites = wire.cipher_suites.iter().flat_map(|suite| {
            let suite = suite.trim_start_matches('[').trim_end_matches(']');
            suite.split('|').map(str::to_owned)
        });
        problems.finish(Some(Self {
            only_1_3: oldest == TlsProtocol::TlSv13,
            only_1_2: newest == TlsProtocol::TlSv12,
            cipher_suites: suites.collect(),
            ecdh_curves: wire.ecdh_curves,
        }))
    }
}

impl TryFrom<wire::TlsCertificate> for TlsCertificate {
    type Error = ConfigErrors;

    fn try_from(wire: wire::TlsCertificate) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let chain = problems.required("certificate_chain", wire.certificate_chain);
        let key = problems.required("private_key", wire.private_key);
        problems.finish(chain.zip(key).map(|(chain, key)| Self { chain, key }))
    }
}

impl TryFrom<core::DataSource> for DataSource {
    type Error = ConfigErrors;

    fn try_from(wire: core::DataSource) -> Result<Self, ConfigErrors> {
        let source = match wire.specifier {
            Some(Specifier::Filename(path)) if !path.is_empty() => Self::File(path),
            Some(Specifier::InlineBytes(bytes)) if !bytes.is_empty() => Self::Inline(bytes),
            Some(Specifier::InlineString(text)) if !text.is_empty() => Self::Inline(text.into()),
            Some(_) => return Err(ConfigErrors::one("", "must not be empty")),
            None => {
                return Err(ConfigErrors::one(
                    "",
                    "required: filename, inline_bytes or inline_string",
                ));
            }
        };
        Ok(source)
    }
}

impl TryFrom<wire::CertificateValidationContext> for Validation {
    type Error = ConfigErrors;

    fn try_from(wire: wire::CertificateValidationContext) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let trusted_ca = problems.required("trusted_ca", wire.trusted_ca);
        let typed = wire.match_typed_subject_alt_names;
        let names = names(&mut problems, "", typed, wire.match_subject_alt_names);
        problems.finish(trusted_ca.map(|trusted_ca| Self { trusted_ca, names }))
    }
}

/// Whom a context at `place` believes by name. As in Envoy, those of any kind do not count where others are.
pub(super) fn names(
    problems: &mut ConfigErrors,
    place: &str,
    typed: Vec<wire::SubjectAltNameMatcher>,
    of_any_kind: Vec<StringMatcher>,
) -> Vec<NameMatch> {
    if !typed.is_empty() {
        return problems.take_all(&join(place, "match_typed_subject_alt_names"), typed);
    }
    let place = join(place, "match_subject_alt_names");
    let patterns: Vec<NamePattern> = problems.take_all(&place, of_any_kind);
    let both = |pattern: NamePattern| {
        [NameKind::Dns, NameKind::Uri].map(|kind| NameMatch {
            kind,
            pattern: pattern.clone(),
        })
    };
    patterns.into_iter().flat_map(both).collect()
}

impl From<&DownstreamTls> for core::TransportSocket {
    fn from(plain: &DownstreamTls) -> Self {
        let context = wire::DownstreamTlsContext {
            common_tls_context: Some((&plain.common).into()),
            require_client_certificate: Some(plain.require_client_certificate),
        };
        Self {
            name: TLS.into(),
            config_type: Some(core::transport_socket::ConfigType::TypedConfig(pack(
                &context,
            ))),
        }
    }
}

impl From<&CommonTls> for wire::CommonTlsContext {
    fn from(plain: &CommonTls) -> Self {
        Self {
            tls_params: (plain.params != TlsParams::default()).then(|| (&plain.params).into()),
            tls_certificates: plain.certificates.iter().map(Into::into).collect(),
            validation_context_type: secret::validation_to_wire(plain),
            alpn_protocols: plain.alpn.clone(),
            tls_certificate_sds_secret_configs: plain
                .certificate_secrets
                .iter()
                .map(Into::into)
                .collect(),
        }
    }
}

impl From<&TlsParams> for wire::TlsParameters {
    fn from(plain: &TlsParams) -> Self {
        use wire::tls_parameters::TlsProtocol;
        let version = |given: bool, version: TlsProtocol| {
            if given { version } else { TlsProtocol::TlsAuto }.into()
        };
        Self {
            tls_minimum_protocol_version: version(plain.only_1_3, TlsProtocol::TlSv13),
            tls_maximum_protocol_version: version(plain.only_1_2, TlsProtocol::TlSv12),
            cipher_suites: plain.cipher_suites.clone(),
            ecdh_curves: plain.ecdh_curves.clone(),
        }
    }
}

impl From<&TlsCertificate> for wire::TlsCertificate {
    fn from(plain: &TlsCertificate) -> Self {
        let key = match &plain.key {
            DataSource::File(path) => Specifier::Filename(path.clone()),
            DataSource::Inline(_) => Specifier::InlineString(REDACTED.into()),
        };
        Self {
            certificate_chain: Some((&plain.chain).into()),
            private_key: Some(core::DataSource {
                specifier: Some(key),
                watched_directory: None,
            }),
            watched_directory: None,
        }
    }
}

impl From<&DataSource> for core::DataSource {
    fn from(plain: &DataSource) -> Self {
        let specifier = match plain {
            DataSource::File(path) => Specifier::Filename(path.clone()),
            DataSource::Inline(bytes) => match String::from_utf8(bytes.clone()) {
                Ok(text) => Specifier::InlineString(text),
                Err(error) => Specifier::InlineBytes(error.into_bytes()),
            },
        };
        Self {
            specifier: Some(specifier),
            watched_directory: None,
        }
    }
}

impl From<&Validation> for wire::CertificateValidationContext {
    fn from(plain: &Validation) -> Self {
        Self {
            trusted_ca: Some((&plain.trusted_ca).into()),
            watched_directory: None,
            match_typed_subject_alt_names: plain.names.iter().map(Into::into).collect(),
            match_subject_alt_names: Vec::new(),
        }
    }
}
