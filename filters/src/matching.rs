//! Conditions on messages, prepared when the configuration is built: texts, headers, chance.
//!
//! What they mean is said in `outrigger_xds::resource::matching`, which Envoy's `StringMatcher` and `HeaderMatcher` became.

use http::{
    HeaderMap, HeaderName, Method, Request, Response, StatusCode, Uri, header, request, uri,
};
use outrigger_xds::resource::matching::{
    HeaderMatch, HeaderValueMatch, Pattern, StringMatch, whole,
};
use rand::Rng;
use regex::bytes::Regex;
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;
use std::borrow::Cow;

/// Whether the case of letters counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// `a` is not `A`.
    Heeded,
    /// `a` is `A`.
    Ignored,
}

impl Case {
    /// Whether two texts are the same.
    #[must_use]
    pub fn equal(self, a: &[u8], b: &[u8]) -> bool {
        match self {
            Self::Heeded => a == b,
            Self::Ignored => a.eq_ignore_ascii_case(b),
        }
    }

    /// Whether `text` begins with `prefix`.
    #[must_use]
    pub fn starts(self, text: &[u8], prefix: &[u8]) -> bool {
        text.get(..prefix.len())
            .is_some_and(|head| self.equal(head, prefix))
    }
}

/// `StringMatch`, prepared.
#[derive(Debug, Clone)]
pub struct TextMatcher(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Exact(String, Case),
    Prefix(String, Case),
    Suffix(String, Case),
    Contains(String, Case),
    Regex(Regex),
}

impl TextMatcher {
    /// Prepares it.
    ///
    /// # Errors
    /// A regular expression is not valid, which the checks of the configuration rule out.
    pub fn new(wanted: &StringMatch) -> Result<Self, String> {
        let case = if wanted.ignore_case {
            Case::Ignored
        } else {
            Case::Heeded
        };
        Ok(Self(match &wanted.pattern {
            Pattern::Exact(text) => Kind::Exact(text.clone(), case),
            Pattern::Prefix(text) => Kind::Prefix(text.clone(), case),
            Pattern::Suffix(text) => Kind::Suffix(text.clone(), case),
            Pattern::Contains(text) => Kind::Contains(text.clone(), case),
            Pattern::Regex(text) => Kind::Regex(whole(text)?),
        }))
    }

    /// Whether `text` is what it must be.
    #[must_use]
    pub fn matches(&self, text: &[u8]) -> bool {
        match &self.0 {
            Kind::Exact(wanted, case) => case.equal(text, wanted.as_bytes()),
            Kind::Prefix(prefix, case) => case.starts(text, prefix.as_bytes()),
            Kind::Suffix(suffix, case) => text
                .len()
                .checked_sub(suffix.len())
                .is_some_and(|at| case.equal(&text[at..], suffix.as_bytes())),
            Kind::Contains(part, case) => text
                .windows(part.len().max(1))
                .any(|window| case.equal(window, part.as_bytes())),
            Kind::Regex(regex) => regex.is_match(text),
        }
    }
}

/// What a header condition may look at.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    method: Option<&'a Method>,
    uri: Option<&'a Uri>,
    status: Option<StatusCode>,
    headers: &'a HeaderMap,
}

impl<'a> From<&'a request::Parts> for Head<'a> {
    fn from(parts: &'a request::Parts) -> Self {
        Self {
            method: Some(&parts.method),
            uri: Some(&parts.uri),
            status: None,
            headers: &parts.headers,
        }
    }
}

impl<'a, B> From<&'a Request<B>> for Head<'a> {
    fn from(request: &'a Request<B>) -> Self {
        Self {
            method: Some(request.method()),
            uri: Some(request.uri()),
            status: None,
            headers: request.headers(),
        }
    }
}

impl<'a> Head<'a> {
    /// The head of a response.
    #[must_use]
    pub fn response(status: StatusCode, headers: &'a HeaderMap) -> Self {
        Self {
            method: None,
            uri: None,
            status: Some(status),
            headers,
        }
    }
}

impl<'a, B> From<&'a Response<B>> for Head<'a> {
    fn from(response: &'a Response<B>) -> Self {
        Self::response(response.status(), response.headers())
    }
}

/// `HeaderMatch`, prepared.
#[derive(Debug, Clone)]
pub struct HeaderMatcher {
    subject: Subject,
    condition: Condition,
    invert: bool,
    missing_is_empty: bool,
}

#[derive(Debug, Clone)]
enum Subject {
    Method,
    Path,
    Scheme,
    Authority,
    Status,
    Header(HeaderName),
}

#[derive(Debug, Clone)]
enum Condition {
    Present(bool),
    Text(TextMatcher),
    Range(i64, i64),
}

impl HeaderMatcher {
    /// Prepares it.
    ///
    /// # Errors
    /// A regular expression or the name is not valid, which the checks of the configuration rule out.
    pub fn new(wanted: &HeaderMatch) -> Result<Self, String> {
        let subject = match wanted.name.as_str() {
            ":method" => Subject::Method,
            ":path" => Subject::Path,
            ":scheme" => Subject::Scheme,
            ":authority" | "host" => Subject::Authority,
            ":status" => Subject::Status,
            name => Subject::Header(
                HeaderName::try_from(name).map_err(|_| format!("'{name}' is no header name"))?,
            ),
        };
        let condition = match &wanted.value {
            HeaderValueMatch::Present(present) => Condition::Present(*present),
            HeaderValueMatch::Text(text) => Condition::Text(TextMatcher::new(text)?),
            HeaderValueMatch::Range(start, end) => Condition::Range(*start, *end),
        };
        Ok(Self {
            subject,
            condition,
            invert: wanted.invert,
            missing_is_empty: wanted.missing_is_empty,
        })
    }

    /// Prepares several.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn all(wanted: &[HeaderMatch]) -> Result<Vec<Self>, String> {
        wanted.iter().map(Self::new).collect()
    }

    /// Whether it holds. A header that is missing fails every condition but that of its presence, inverted or not.
    #[must_use]
    pub fn matches<'a>(&self, head: impl Into<Head<'a>>) -> bool {
        let found = self.subject.of(&head.into());
        let found = found.or(self.missing_is_empty.then_some(Cow::Borrowed(&[])));
        let holds = match (&self.condition, found) {
            (Condition::Present(present), found) => found.is_some() == *present,
            (_, None) => return false,
            (Condition::Text(text), Some(found)) => text.matches(&found),
            (Condition::Range(start, end), Some(found)) => std::str::from_utf8(&found)
                .ok()
                .and_then(|text| text.trim().parse::<i64>().ok())
                .is_some_and(|number| (*start..*end).contains(&number)),
        };
        holds != self.invert
    }
}

impl<'de> Deserialize<'de> for TextMatcher {
    /// From a `StringMatcher` in a filter's configuration.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let wanted = StringMatch::from_json(&value).map_err(D::Error::custom)?;
        Self::new(&wanted).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for HeaderMatcher {
    /// From a `HeaderMatcher` in a filter's configuration.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let wanted = HeaderMatch::from_json(&value).map_err(D::Error::custom)?;
        Self::new(&wanted).map_err(D::Error::custom)
    }
}

impl Subject {
    fn of<'a>(&self, head: &Head<'a>) -> Option<Cow<'a, [u8]>> {
        Some(match self {
            Self::Method => Cow::Borrowed(head.method?.as_str().as_bytes()),
            Self::Path => Cow::Borrowed(head.uri?.path_and_query()?.as_str().as_bytes()),
            Self::Scheme => Cow::Borrowed(head.uri?.scheme_str().unwrap_or("http").as_bytes()),
            Self::Authority => Cow::Borrowed(authority(head.uri?, head.headers).as_bytes()),
            Self::Status => Cow::Owned(head.status?.as_str().as_bytes().to_vec()),
            Self::Header(name) => return joined(head.headers, name),
        })
    }
}

/// The value of a header; several lines are one list.
fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut lines = headers.get_all(name).iter();
    let first = lines.next()?;
    let mut all = Cow::Borrowed(first.as_bytes());
    for line in lines {
        let all = all.to_mut();
        all.push(b',');
        all.extend_from_slice(line.as_bytes());
    }
    Some(all)
}

/// `:authority`, or `host`.
#[must_use]
pub fn authority<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> &'a str {
    uri.authority().map_or_else(
        || {
            headers
                .get(header::HOST)
                .and_then(|host| host.to_str().ok())
                .unwrap_or_default()
        },
        uri::Authority::as_str,
    )
}

/// Whether it is gRPC: its content type, with or without a message format.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| rest.is_empty() || rest[0] == b'+')
}

/// Whether this is one of `numerator` in `denominator`; all and none are certain.
pub(crate) fn chance(numerator: u32, denominator: u32) -> bool {
    numerator >= denominator || rand::rng().random_range(0..denominator.max(1)) < numerator
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(pattern: Pattern, ignore_case: bool) -> HeaderValueMatch {
        HeaderValueMatch::Text(StringMatch {
            pattern,
            ignore_case,
        })
    }

    #[test]
    fn headers_match_as_in_envoy() {
        let request = Request::get("/p?q=1")
            .header("x-a", "abc")
            .header("x-a", "D")
            .header("x-n", "-7")
            .header("x-empty", "")
            .header("host", "here:80")
            .body(())
            .unwrap();
        let exact = |value: &str, case| text(Pattern::Exact(value.into()), case);
        let regex = |regex: &str| text(Pattern::Regex(regex.into()), false);
        let part = |kind: fn(String) -> Pattern, value: &str, case| text(kind(value.into()), case);
        let (present, range) = (HeaderValueMatch::Present, HeaderValueMatch::Range);
        // Name, condition, "!" if inverted and "0" if what is missing counts as empty, and whether it holds.
        for (name, value, how, holds) in [
            ("x-a", exact("abc,D", false), "", true),
            ("x-a", exact("abc,D", false), "!", false),
            ("x-a", exact("ABC,d", true), "", true),
            ("x-a", part(Pattern::Prefix, "AB", false), "", false),
            ("x-a", part(Pattern::Prefix, "AB", true), "", true),
            ("x-a", part(Pattern::Suffix, ",d", true), "", true),
            ("x-a", part(Pattern::Contains, "C,d", true), "", true),
            ("x-a", part(Pattern::Contains, "cd", true), "", false),
            ("x-a", regex("abc"), "", false),
            ("x-a", regex("abc|abc,."), "", true),
            ("x-n", range(-7, 0), "", true),
            ("x-n", range(-6, 0), "", false),
            ("x-a", range(-6, 0), "!", true),
            ("x-none", exact("a", false), "!", false),
            ("x-none", exact("a", false), "!0", true),
            ("x-none", regex("^$"), "0", true),
            ("x-none", present(true), "", false),
            ("x-none", present(true), "!", true),
            ("x-none", present(false), "", true),
            ("x-none", present(true), "0", true),
            ("x-empty", present(true), "", true),
            (":method", exact("GET", false), "", true),
            (":path", exact("/p?q=1", false), "", true),
            (":scheme", exact("http", false), "", true),
            ("host", exact("here:80", false), "", true),
            (":status", present(true), "", false),
        ] {
            let wanted = HeaderMatch {
                name: name.into(),
                value,
                invert: how.contains('!'),
                missing_is_empty: how.contains('0'),
            };
            let matcher = HeaderMatcher::new(&wanted).unwrap();
            assert_eq!(matcher.matches(&request), holds, "{wanted:?}");
        }
    }

    #[test]
    fn filters_conditions_mean_what_routes_conditions_do() {
        let read = |json: Value| serde_json::from_value::<HeaderMatcher>(json);
        let request = Request::get("/").header("x-a", "B,c").body(()).unwrap();
        for (json, holds) in [
            (json!({"name": "x-a", "exact_match": "B,c"}), true),
            (
                json!({"name": "x-a", "string_match": {"exact": "b,C", "ignore_case": true}}),
                true,
            ),
            (
                json!({"name": "x-a", "string_match": {"safe_regex": {"regex": "B.*"}}}),
                true,
            ),
            (
                json!({"name": "x-b", "exact_match": "B", "invert_match": true}),
                false,
            ),
        ] {
            assert_eq!(
                read(json.clone()).unwrap().matches(&request),
                holds,
                "{json}"
            );
        }
        let error = read(json!({"name": "x-a", "string_match": {"prefix": ""}})).unwrap_err();
        assert!(error.to_string().contains("prefix"), "{error}");
    }

    #[test]
    fn chance_keeps_to_its_share() {
        assert!((0..1000).all(|_| chance(100, 100)));
        assert!((0..1000).all(|_| chance(200, 100)));
        assert!(!(0..1000).any(|_| chance(0, 100)));
        let half = (0..10_000).filter(|_| chance(5000, 10_000)).count();
        assert!((4000..6000).contains(&half), "{half}");
    }
}
