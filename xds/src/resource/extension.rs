//! `TypedExtensionConfig` and `ExtensionConfigSource`: configurations of filters that come from elsewhere (ECDS).

use super::{config_source::ConfigSource, route::TypedConfig};
use crate::{problems::ConfigErrors, protobuf::type_name, wire::envoy::config::core::v3 as wire};

/// `TypedExtensionConfig`: a configuration that came.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtensionConfig {
    /// The name of the filter that asked for it.
    pub name: String,
    /// Which filter, and its configuration.
    pub config: TypedConfig,
}

/// `ExtensionConfigSource`: where a filter's configuration comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtensionConfigSource {
    /// Where from.
    pub source: ConfigSource,
    /// In effect as long as none is there.
    pub default_config: Option<TypedConfig>,
    /// Whether that is in effect before the first one came.
    pub apply_default_config_without_warming: bool,
    /// What it may be; not empty.
    pub type_urls: Vec<String>,
}

impl ExtensionConfigSource {
    /// Whether a configuration is of a type that is listed.
    ///
    /// # Errors
    /// It is not, in Envoy's words.
    pub fn check(&self, config: &TypedConfig) -> Result<(), String> {
        let found = type_name(&config.type_url);
        let mut listed = self.type_urls.iter().map(|url| type_name(url));
        if listed.any(|known| known == found) {
            return Ok(());
        }
        let listed: Vec<&str> = self.type_urls.iter().map(|url| type_name(url)).collect();
        let listed = listed.join(" or ");
        Err(format!(
            "filter config has type URL {found} but expect {listed}"
        ))
    }
}

impl TryFrom<wire::TypedExtensionConfig> for ExtensionConfig {
    type Error = ConfigErrors;

    fn try_from(wire: wire::TypedExtensionConfig) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let config = problems.required("typed_config", wire.typed_config);
        problems.finish(config.map(|config| Self { name, config }))
    }
}

impl From<&ExtensionConfig> for wire::TypedExtensionConfig {
    fn from(plain: &ExtensionConfig) -> Self {
        Self {
            name: plain.name.clone(),
            typed_config: Some((&plain.config).into()),
        }
    }
}

impl TryFrom<wire::ExtensionConfigSource> for ExtensionConfigSource {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ExtensionConfigSource) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        if wire.type_urls.is_empty() {
            problems.add("type_urls", "required: at least one");
        }
        let default_config = wire
            .default_config
            .and_then(|any| problems.take("default_config", TypedConfig::try_from(any)));
        if wire.apply_default_config_without_warming && default_config.is_none() {
            let message = "needs a default_config to apply";
            problems.add("apply_default_config_without_warming", message);
        }
        let source = problems.required("config_source", wire.config_source);
        let read = source.map(|source| Self {
            source,
            default_config,
            apply_default_config_without_warming: wire.apply_default_config_without_warming,
            type_urls: wire.type_urls,
        });
        if let Some((read, default)) = read
            .as_ref()
            .and_then(|read| Some((read, read.default_config.as_ref()?)))
            && let Err(error) = read.check(default)
        {
            problems.add("default_config", error);
        }
        problems.finish(read)
    }
}

impl From<&ExtensionConfigSource> for wire::ExtensionConfigSource {
    fn from(plain: &ExtensionConfigSource) -> Self {
        Self {
            config_source: Some((&plain.source).into()),
            default_config: plain.default_config.as_ref().map(Into::into),
            apply_default_config_without_warming: plain.apply_default_config_without_warming,
            type_urls: plain.type_urls.clone(),
        }
    }
}
