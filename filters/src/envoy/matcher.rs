//! `StringMatcher` and `HeaderMatcher`: does a text, or a request's header, have a given form?

use http::{HeaderMap, HeaderName, Method, Uri, uri::PathAndQuery};
use serde::Deserialize;

/// `envoy.type.matcher.v3.StringMatcher`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StringMatcher {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Contains(String),
}

impl StringMatcher {
    pub(crate) fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => text.ends_with(suffix.as_str()),
            Self::Contains(part) => text.contains(part.as_str()),
        }
    }
}

/// `envoy.config.route.v3.HeaderMatcher`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HeaderMatcher {
    name: String,
    exact_match: Option<String>,
    present_match: Option<bool>,
    prefix_match: Option<String>,
    suffix_match: Option<String>,
    contains_match: Option<String>,
    string_match: Option<StringMatcher>,
    invert_match: bool,
}

impl HeaderMatcher {
    /// A name that a request can have.
    pub(crate) fn check(&self) -> Result<(), String> {
        let known = matches!(self.name.as_str(), ":method" | ":path" | ":authority");
        if known || HeaderName::from_bytes(self.name.as_bytes()).is_ok() {
            return Ok(());
        }
        Err(format!("headers: '{}' is not a header name", self.name))
    }

    pub(crate) fn matches(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> bool {
        let value = value_of(&self.name, method, uri, headers);
        if let Some(present) = self.present_match {
            return (value.is_some() == present) != self.invert_match;
        }
        let Some(value) = value else {
            // A header that is not there has no form; Envoy inverts only what was compared.
            return self.compares_nothing() && self.invert_match;
        };
        self.holds(value) != self.invert_match
    }

    fn compares_nothing(&self) -> bool {
        self.exact_match.is_none()
            && self.prefix_match.is_none()
            && self.suffix_match.is_none()
            && self.contains_match.is_none()
            && self.string_match.is_none()
    }

    fn holds(&self, value: &str) -> bool {
        let all = |condition: &Option<String>, holds: fn(&str, &str) -> bool| {
            condition.as_deref().is_none_or(|text| holds(value, text))
        };
        all(&self.exact_match, |value, text| value == text)
            && all(&self.prefix_match, |value, text| value.starts_with(text))
            && all(&self.suffix_match, |value, text| value.ends_with(text))
            && all(&self.contains_match, |value, text| value.contains(text))
            && self
                .string_match
                .as_ref()
                .is_none_or(|matcher| matcher.matches(value))
    }
}

/// A request's header, or one of its pseudo-headers.
pub(crate) fn value_of<'a>(
    name: &str,
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
) -> Option<&'a str> {
    match name {
        ":method" => Some(method.as_str()),
        ":path" => uri.path_and_query().map(PathAndQuery::as_str),
        ":authority" => uri.authority().map_or_else(
            || headers.get(http::header::HOST)?.to_str().ok(),
            |authority| Some(authority.as_str()),
        ),
        ":scheme" => Some(uri.scheme_str().unwrap_or("http")),
        name => headers.get(name)?.to_str().ok(),
    }
}
