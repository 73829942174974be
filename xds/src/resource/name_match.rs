//! Names in certificates: `envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher`.

use super::matching;
use crate::{
    problems::ConfigErrors,
    wire::envoy::{
        extensions::transport_sockets::tls::v3 as wire,
        r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
    },
};
use regex::bytes::Regex;
use wire::subject_alt_name_matcher::SanType;

/// `SubjectAltNameMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameMatch {
    /// Which names are looked at.
    pub kind: NameKind,
    /// What one of them must be.
    pub pattern: NamePattern,
}

/// Kinds of names in a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    /// `DNS`.
    Dns,
    /// `URI`.
    Uri,
}

/// A condition on a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// Equals.
    Exact(String),
    /// Begins with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Contains.
    Contains(String),
    /// All of it fits.
    Regex(WholeRegex),
}

/// A regular expression that all of a name must fit; built once, for handshakes.
#[derive(Debug, Clone)]
pub struct WholeRegex {
    text: String,
    built: Regex,
}

impl PartialEq for WholeRegex {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for WholeRegex {}

impl WholeRegex {
    /// # Errors
    /// It is none; the text says where.
    pub fn new(text: &str) -> Result<Self, String> {
        let built = matching::whole(text)?;
        Ok(Self {
            text: text.to_owned(),
            built,
        })
    }
}

impl NamePattern {
    /// Whether `name` fulfils it.
    #[must_use]
    pub fn holds(&self, name: &str) -> bool {
        match self {
            Self::Exact(text) => name == text,
            Self::Prefix(text) => name.starts_with(text.as_str()),
            Self::Suffix(text) => name.ends_with(text.as_str()),
            Self::Contains(text) => name.contains(text.as_str()),
            Self::Regex(regex) => regex.built.is_match(name.as_bytes()),
        }
    }
}

impl TryFrom<wire::SubjectAltNameMatcher> for NameMatch {
    type Error = ConfigErrors;

    fn try_from(wire: wire::SubjectAltNameMatcher) -> Result<Self, ConfigErrors> {
        let kind = match wire.san_type() {
            SanType::Dns => NameKind::Dns,
            SanType::Uri => NameKind::Uri,
            SanType::Unspecified => {
                return Err(ConfigErrors::one("san_type", "required: DNS or URI"));
            }
            other @ (SanType::Email | SanType::IpAddress | SanType::OtherName) => {
                let message = format!("not supported yet: {}", other.as_str_name());
                return Err(ConfigErrors::one("san_type", message));
            }
        };
        let mut problems = ConfigErrors::default();
        let pattern = wire.matcher.unwrap_or_default().try_into();
        let pattern = problems.take("matcher", pattern);
        problems.finish(pattern.map(|pattern| Self { kind, pattern }))
    }
}

impl TryFrom<StringMatcher> for NamePattern {
    type Error = ConfigErrors;

    fn try_from(wire: StringMatcher) -> Result<Self, ConfigErrors> {
        let refused = |message: &str| Err(ConfigErrors::one("", message));
        if wire.ignore_case {
            return refused("not supported yet: ignore_case");
        }
        match wire.match_pattern {
            Some(MatchPattern::Exact(text)) => Ok(Self::Exact(text)),
            Some(MatchPattern::Prefix(text)) => Ok(Self::Prefix(text)),
            Some(MatchPattern::Suffix(text)) => Ok(Self::Suffix(text)),
            Some(MatchPattern::Contains(text)) => Ok(Self::Contains(text)),
            Some(MatchPattern::SafeRegex(matcher)) => {
                let mut problems = ConfigErrors::default();
                let regex = problems.take("safe_regex", matching::regex(matcher));
                let built = regex.and_then(|text| {
                    let built = WholeRegex::new(&text);
                    problems.take(
                        "safe_regex",
                        built.map_err(|error| ConfigErrors::one("regex", error)),
                    )
                });
                problems.finish(built.map(Self::Regex))
            }
            None => refused("required"),
        }
    }
}

impl From<&NameMatch> for wire::SubjectAltNameMatcher {
    fn from(plain: &NameMatch) -> Self {
        let san_type = match plain.kind {
            NameKind::Dns => SanType::Dns,
            NameKind::Uri => SanType::Uri,
        };
        let pattern = match plain.pattern.clone() {
            NamePattern::Exact(text) => MatchPattern::Exact(text),
            NamePattern::Prefix(text) => MatchPattern::Prefix(text),
            NamePattern::Suffix(text) => MatchPattern::Suffix(text),
            NamePattern::Contains(text) => MatchPattern::Contains(text),
            NamePattern::Regex(regex) => MatchPattern::SafeRegex(matching::to_regex(&regex.text)),
        };
        Self {
            san_type: san_type.into(),
            matcher: Some(StringMatcher {
                match_pattern: Some(pattern),
                ignore_case: false,
            }),
        }
    }
}
