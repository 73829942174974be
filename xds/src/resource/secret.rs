//! `envoy.extensions.transport_sockets.tls.v3.Secret`, and how a TLS context names one.

use super::{
    config_source::ConfigSource,
    tls::{self, CommonTls, DataSource, NameMatch, TlsCertificate, Validation},
};
use crate::{problems::ConfigErrors, wire::envoy::extensions::transport_sockets::tls::v3 as wire};
use std::sync::Arc;
use wire::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};

/// A certificate with its key, or whom to believe, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Unique where it comes from.
    pub name: String,
    /// What it is.
    pub content: SecretContent,
}

/// `Secret.type`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretContent {
    /// Who we are.
    Certificate(TlsCertificate),
    /// Whom we believe.
    Validation(Validation),
}

/// `SdsSecretConfig`: which secret, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretConfig {
    /// Its name.
    pub name: String,
    /// None means the static ones.
    pub source: Option<ConfigSource>,
}

/// Whom we believe is a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidationSecret {
    /// Which.
    pub secret: SecretConfig,
    /// Of the default context of a combined one: added to the names that the secret has.
    pub names: Vec<NameMatch>,
}

impl CommonTls {
    /// All secrets that it names.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretConfig> {
        let validation = self
            .validation_secret
            .iter()
            .map(|combined| &combined.secret);
        self.certificate_secrets.iter().chain(validation)
    }

    /// This context with its secrets in place; `Ok(None)` while one is not there.
    ///
    /// # Errors
    /// A secret is of the wrong type.
    pub fn resolve(
        &self,
        find: &dyn Fn(&SecretConfig) -> Option<Arc<Secret>>,
    ) -> Result<Option<Self>, String> {
        let mut resolved = self.clone();
        for config in resolved.certificate_secrets.drain(..) {
            match find(&config).as_deref() {
                None => return Ok(None),
                Some(Secret {
                    content: SecretContent::Certificate(certificate),
                    ..
                }) => resolved.certificates.push(certificate.clone()),
                Some(_) => return Err(format!("secret '{}' is no tls_certificate", config.name)),
            }
        }
        if let Some(combined) = resolved.validation_secret.take() {
            let name = &combined.secret.name;
            match find(&combined.secret).as_deref() {
                None => return Ok(None),
                Some(Secret {
                    content: SecretContent::Validation(validation),
                    ..
                }) => {
                    let mut validation = validation.clone();
                    validation.names.splice(0..0, combined.names);
                    resolved.validation = Some(validation);
                }
                Some(_) => return Err(format!("secret '{name}' is no validation_context")),
            }
        }
        Ok(Some(resolved))
    }

    /// Files that it names, once its secrets are in place.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let pairs = self.certificates.iter();
        let of_pairs = pairs.flat_map(|pair| [&pair.chain, &pair.key]);
        let validation = self.validation.iter().map(|whom| &whom.trusted_ca);
        of_pairs
            .chain(validation)
            .filter_map(|source| match source {
                DataSource::File(path) => Some(path.as_str()),
                DataSource::Inline(_) => None,
            })
    }
}

/// What a context says of whom to believe: itself, or by a secret.
pub(super) fn validation(
    problems: &mut ConfigErrors,
    wire: Option<ValidationContextType>,
) -> (Option<Validation>, Option<ValidationSecret>) {
    match wire {
        None => (None, None),
        Some(ValidationContextType::ValidationContext(context)) => (
            problems.take("validation_context", context.try_into()),
            None,
        ),
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
            let secret = problems.take("validation_context_sds_secret_config", config.try_into());
            let names = Vec::new();
            (
                None,
                secret.map(|secret| ValidationSecret { secret, names }),
            )
        }
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            let combined = problems.take("combined_validation_context", combined.try_into());
            (None, combined)
        }
    }
}

/// The other way round.
pub(super) fn validation_to_wire(plain: &CommonTls) -> Option<ValidationContextType> {
    if let Some(validation) = &plain.validation {
        return Some(ValidationContextType::ValidationContext(validation.into()));
    }
    let combined = plain.validation_secret.as_ref()?;
    let secret: wire::SdsSecretConfig = (&combined.secret).into();
    if combined.names.is_empty() {
        return Some(ValidationContextType::ValidationContextSdsSecretConfig(
            secret,
        ));
    }
    let default = wire::CertificateValidationContext {
        match_typed_subject_alt_names: combined.names.iter().map(Into::into).collect(),
        ..Default::default()
    };
    Some(ValidationContextType::CombinedValidationContext(
        CombinedCertificateValidationContext {
            default_validation_context: Some(default),
            validation_context_sds_secret_config: Some(secret),
        },
    ))
}

impl TryFrom<CombinedCertificateValidationContext> for ValidationSecret {
    type Error = ConfigErrors;

    fn try_from(wire: CombinedCertificateValidationContext) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let default = wire.default_validation_context;
        if default.is_none() {
            problems.add("default_validation_context", "required");
        }
        // The secret has a `trusted_ca` of its own, which takes the place of one that is here.
        let default = default.unwrap_or_default();
        let names = tls::names(
            &mut problems,
            "default_validation_context",
            default.match_typed_subject_alt_names,
            default.match_subject_alt_names,
        );
        let secret = problems.required(
            "validation_context_sds_secret_config",
            wire.validation_context_sds_secret_config,
        );
        problems.finish(secret.map(|secret| Self { secret, names }))
    }
}

impl TryFrom<wire::SdsSecretConfig> for SecretConfig {
    type Error = ConfigErrors;

    fn try_from(wire: wire::SdsSecretConfig) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let source = wire
            .sds_config
            .and_then(|source| problems.take("sds_config", source.try_into()));
        problems.finish(Some(Self { name, source }))
    }
}

impl From<&SecretConfig> for wire::SdsSecretConfig {
    fn from(plain: &SecretConfig) -> Self {
        Self {
            name: plain.name.clone(),
            sds_config: plain.source.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<wire::Secret> for Secret {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Secret) -> Result<Self, ConfigErrors> {
        use wire::secret::Type;
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let content = match wire.r#type {
            Some(Type::TlsCertificate(certificate)) => problems
                .take("tls_certificate", certificate.try_into())
                .map(SecretContent::Certificate),
            Some(Type::ValidationContext(context)) => problems
                .take("validation_context", context.try_into())
                .map(SecretContent::Validation),
            None => {
                problems.add("", "required: tls_certificate or validation_context");
                None
            }
        };
        problems.finish(content.map(|content| Self { name, content }))
    }
}

impl From<&Secret> for wire::Secret {
    fn from(plain: &Secret) -> Self {
        use wire::secret::Type;
        let content = match &plain.content {
            SecretContent::Certificate(certificate) => Type::TlsCertificate(certificate.into()),
            SecretContent::Validation(validation) => Type::ValidationContext(validation.into()),
        };
        Self {
            name: plain.name.clone(),
            r#type: Some(content),
        }
    }
}
