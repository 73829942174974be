//! Conditions on requests: of texts, headers, query parameters, and by chance.
//!
//! Says what must hold, and refuses what can never be checked. How it is checked is the proxy's business.

use crate::{
    problems::ConfigErrors,
    protobuf,
    wire::envoy::{
        config::{core::v3 as core, route::v3 as wire},
        r#type::{
            matcher::v3::{
                RegexMatchAndSubstitute, RegexMatcher, StringMatcher, regex_matcher, string_matcher,
            },
            v3::{FractionalPercent, Int64Range, fractional_percent::DenominatorType},
        },
    },
};
use regex::bytes::Regex;
use string_matcher::MatchPattern;
use wire::{
    header_matcher::HeaderMatchSpecifier, query_parameter_matcher::QueryParameterMatchSpecifier,
};

/// `StringMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StringMatch {
    /// What the text must be.
    pub pattern: Pattern,
    /// Letter case does not matter; regular expressions say that themselves.
    pub ignore_case: bool,
}

/// What a text must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// Equal.
    Exact(String),
    /// It starts with.
    Prefix(String),
    /// It ends with.
    Suffix(String),
    /// It contains.
    Contains(String),
    /// It matches as a whole; RE2's syntax, known to be valid.
    Regex(String),
}

/// `HeaderMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    /// Lower-case header name; `:method`, `:path`, `:scheme` and `:authority` are allowed.
    pub name: String,
    /// What must hold.
    pub value: HeaderValueMatch,
    /// `invert_match`.
    pub invert: bool,
    /// A header that is missing counts as empty.
    pub missing_is_empty: bool,
}

/// What a header must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderValueMatch {
    /// Present (or absent).
    Present(bool),
    /// A text.
    Text(StringMatch),
    /// A whole number, from the first up to, but not including, the second.
    Range(i64, i64),
}

/// `QueryParameterMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryMatch {
    /// Name as it stands in the query string.
    pub name: String,
    /// What must hold.
    pub value: QueryValueMatch,
}

/// What a query parameter must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueryValueMatch {
    /// Present (or absent).
    Present(bool),
    /// Its first value, as it stands there.
    Text(StringMatch),
}

/// `RuntimeFractionalPercent`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fraction {
    /// So many…
    pub numerator: u32,
    /// …of 100, 10,000 or 1,000,000.
    pub denominator: u32,
    /// Where the runtime keeps it.
    pub runtime_key: String,
}

/// `RegexMatchAndSubstitute`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegexRewrite {
    /// What is replaced, wherever it is found; known to be valid.
    pub regex: String,
    /// What takes its place, with `\1` for what the first group caught.
    pub substitution: String,
}

impl RegexRewrite {
    /// The expression, and the substitution in the words of the `regex` crate.
    ///
    /// # Errors
    /// One of them is not valid.
    pub fn prepare(&self) -> Result<(regex::Regex, String), String> {
        let regex =
            regex::Regex::new(&self.regex).map_err(|error| format!("'{}': {error}", self.regex))?;
        let wrong = |what: &str| format!("'{}' {what}", self.substitution);
        let mut prepared = String::with_capacity(self.substitution.len());
        let mut letters = self.substitution.chars();
        while let Some(letter) = letters.next() {
            match letter {
                '$' => prepared.push_str("$$"),
                '\\' => match letters.next() {
                    Some('\\') => prepared.push('\\'),
                    Some(group) if group.is_ascii_digit() => {
                        let number = group.to_digit(10).unwrap_or(0) as usize;
                        if number >= regex.captures_len() {
                            return Err(wrong(&format!(
                                "refers to group {number}, which is not there"
                            )));
                        }
                        prepared.push_str(&format!("${{{number}}}"));
                    }
                    _ => {
                        return Err(wrong(
                            "has a backslash before neither a digit nor a backslash",
                        ));
                    }
                },
                other => prepared.push(other),
            }
        }
        Ok((regex, prepared))
    }
}

impl TryFrom<RegexMatchAndSubstitute> for RegexRewrite {
    type Error = ConfigErrors;

    fn try_from(wire: RegexMatchAndSubstitute) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let Some(matcher) = wire.pattern else {
            problems.add("pattern", "required");
            return problems.finish(None);
        };
        let plain = problems.take("pattern", regex(matcher)).map(|regex| Self {
            regex,
            substitution: wire.substitution,
        });
        if let Some(Err(error)) = plain.as_ref().map(Self::prepare) {
            problems.add("substitution", error);
        }
        problems.finish(plain)
    }
}

impl From<&RegexRewrite> for RegexMatchAndSubstitute {
    fn from(plain: &RegexRewrite) -> Self {
        Self {
            pattern: Some(to_regex(&plain.regex)),
            substitution: plain.substitution.clone(),
        }
    }
}

/// A regular expression that a whole text must match.
///
/// # Errors
/// It is not valid; the text says where.
pub fn whole(regex: &str) -> Result<Regex, String> {
    // Checked alone first: what closes our group must not open another.
    Regex::new(regex)
        .and_then(|_| Regex::new(&format!(r"\A(?:{regex})\z")))
        .map_err(|error| {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default();
            format!("'{regex}' is no regular expression: {last}")
        })
}

/// The text of a `RegexMatcher`.
pub(super) fn regex(wire: RegexMatcher) -> Result<String, ConfigErrors> {
    let mut problems = ConfigErrors::default();
    let regex = problems.not_empty("regex", wire.regex);
    if let Err(error) = whole(&regex) {
        problems.add("regex", error);
    }
    problems.finish(Some(regex))
}

/// A `RegexMatcher` of a text.
pub(super) fn to_regex(regex: &str) -> RegexMatcher {
    RegexMatcher {
        regex: regex.to_owned(),
        engine_type: None::<regex_matcher::EngineType>,
    }
}

impl StringMatch {
    /// A `StringMatcher` as it stands in a filter's configuration.
    ///
    /// # Errors
    /// What is wrong with it, with places.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, ConfigErrors> {
        protobuf::plain::<StringMatcher, Self>(value)
    }
}

impl HeaderMatch {
    /// A `HeaderMatcher` as it stands in a filter's configuration.
    ///
    /// # Errors
    /// What is wrong with it, with places.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, ConfigErrors> {
        protobuf::plain::<wire::HeaderMatcher, Self>(value)
    }
}

impl TryFrom<StringMatcher> for StringMatch {
    type Error = ConfigErrors;

    fn try_from(wire: StringMatcher) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let pattern = match wire.match_pattern {
            Some(MatchPattern::Exact(text)) => Some(Pattern::Exact(text)),
            Some(MatchPattern::Prefix(text)) => {
                Some(Pattern::Prefix(problems.not_empty("prefix", text)))
            }
            Some(MatchPattern::Suffix(text)) => {
                Some(Pattern::Suffix(problems.not_empty("suffix", text)))
            }
            Some(MatchPattern::Contains(text)) => {
                Some(Pattern::Contains(problems.not_empty("contains", text)))
            }
            Some(MatchPattern::SafeRegex(matcher)) => problems
                .take("safe_regex", regex(matcher))
                .map(Pattern::Regex),
            None => {
                problems.add(
                    "",
                    "required: exact, prefix, suffix, contains or safe_regex",
                );
                None
            }
        };
        problems.finish(pattern.map(|pattern| Self {
            pattern,
            ignore_case: wire.ignore_case,
        }))
    }
}

impl From<&StringMatch> for StringMatcher {
    fn from(plain: &StringMatch) -> Self {
        let pattern = match plain.pattern.clone() {
            Pattern::Exact(text) => MatchPattern::Exact(text),
            Pattern::Prefix(text) => MatchPattern::Prefix(text),
            Pattern::Suffix(text) => MatchPattern::Suffix(text),
            Pattern::Contains(text) => MatchPattern::Contains(text),
            Pattern::Regex(text) => MatchPattern::SafeRegex(to_regex(&text)),
        };
        Self {
            match_pattern: Some(pattern),
            ignore_case: plain.ignore_case,
        }
    }
}

impl TryFrom<wire::HeaderMatcher> for HeaderMatch {
    type Error = ConfigErrors;

    fn try_from(wire: wire::HeaderMatcher) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name.to_ascii_lowercase());
        let is_pseudo = matches!(
            name.as_str(),
            ":method" | ":path" | ":scheme" | ":authority" | ":status"
        );
        if !name.is_empty() && !is_pseudo && http::HeaderName::try_from(&name).is_err() {
            problems.add("name", format!("'{name}' is no header name"));
        }
        let value = wire
            .header_match_specifier
            .map_or(Some(HeaderValueMatch::Present(true)), |specifier| {
                header_value(specifier, &mut problems)
            });
        problems.finish(value.map(|value| Self {
            name,
            value,
            invert: wire.invert_match,
            missing_is_empty: wire.treat_missing_header_as_empty,
        }))
    }
}

fn header_value(
    specifier: HeaderMatchSpecifier,
    problems: &mut ConfigErrors,
) -> Option<HeaderValueMatch> {
    let mut old = |place: &str, pattern: MatchPattern| {
        let matcher = StringMatcher {
            match_pattern: Some(pattern),
            ignore_case: false,
        };
        problems
            .take(place, StringMatch::try_from(matcher))
            .map(HeaderValueMatch::Text)
    };
    match specifier {
        HeaderMatchSpecifier::PresentMatch(present) => Some(HeaderValueMatch::Present(present)),
        HeaderMatchSpecifier::ExactMatch(text) => old("", MatchPattern::Exact(text)),
        HeaderMatchSpecifier::PrefixMatch(text) => old("", MatchPattern::Prefix(text)),
        HeaderMatchSpecifier::SuffixMatch(text) => old("", MatchPattern::Suffix(text)),
        HeaderMatchSpecifier::ContainsMatch(text) => old("", MatchPattern::Contains(text)),
        HeaderMatchSpecifier::SafeRegexMatch(matcher) => problems
            .take("safe_regex_match", regex(matcher))
            .map(|text| {
                HeaderValueMatch::Text(StringMatch {
                    pattern: Pattern::Regex(text),
                    ignore_case: false,
                })
            }),
        HeaderMatchSpecifier::StringMatch(matcher) => problems
            .take("string_match", StringMatch::try_from(matcher))
            .map(HeaderValueMatch::Text),
        HeaderMatchSpecifier::RangeMatch(Int64Range { start, end }) => {
            Some(HeaderValueMatch::Range(start, end))
        }
    }
}

impl From<&HeaderMatch> for wire::HeaderMatcher {
    fn from(plain: &HeaderMatch) -> Self {
        let value = match &plain.value {
            HeaderValueMatch::Present(present) => HeaderMatchSpecifier::PresentMatch(*present),
            HeaderValueMatch::Text(text) => HeaderMatchSpecifier::StringMatch(text.into()),
            HeaderValueMatch::Range(start, end) => HeaderMatchSpecifier::RangeMatch(Int64Range {
                start: *start,
                end: *end,
            }),
        };
        Self {
            name: plain.name.clone(),
            header_match_specifier: Some(value),
            invert_match: plain.invert,
            treat_missing_header_as_empty: plain.missing_is_empty,
        }
    }
}

impl TryFrom<wire::QueryParameterMatcher> for QueryMatch {
    type Error = ConfigErrors;

    fn try_from(wire: wire::QueryParameterMatcher) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let value = match wire.query_parameter_match_specifier {
            Some(QueryParameterMatchSpecifier::StringMatch(matcher)) => problems
                .take("string_match", matcher.try_into())
                .map(QueryValueMatch::Text),
            Some(QueryParameterMatchSpecifier::PresentMatch(present)) => {
                Some(QueryValueMatch::Present(present))
            }
            None => Some(QueryValueMatch::Present(true)),
        };
        problems.finish(value.map(|value| Self { name, value }))
    }
}

impl From<&QueryMatch> for wire::QueryParameterMatcher {
    fn from(plain: &QueryMatch) -> Self {
        Self {
            name: plain.name.clone(),
            query_parameter_match_specifier: Some(match &plain.value {
                QueryValueMatch::Text(text) => {
                    QueryParameterMatchSpecifier::StringMatch(text.into())
                }
                QueryValueMatch::Present(present) => {
                    QueryParameterMatchSpecifier::PresentMatch(*present)
                }
            }),
        }
    }
}

impl TryFrom<core::RuntimeFractionalPercent> for Fraction {
    type Error = ConfigErrors;

    fn try_from(wire: core::RuntimeFractionalPercent) -> Result<Self, ConfigErrors> {
        let Some(share) = wire.default_value else {
            return Err(ConfigErrors::one("default_value", "required"));
        };
        let denominator = match share.denominator() {
            DenominatorType::Hundred => 100,
            DenominatorType::TenThousand => 10_000,
            DenominatorType::Million => 1_000_000,
        };
        Ok(Self {
            numerator: share.numerator,
            denominator,
            runtime_key: wire.runtime_key,
        })
    }
}

impl From<&Fraction> for core::RuntimeFractionalPercent {
    fn from(plain: &Fraction) -> Self {
        let denominator = match plain.denominator {
            1_000_000 => DenominatorType::Million,
            10_000 => DenominatorType::TenThousand,
            _ => DenominatorType::Hundred,
        };
        Self {
            default_value: Some(FractionalPercent {
                numerator: plain.numerator,
                denominator: denominator.into(),
            }),
            runtime_key: plain.runtime_key.clone(),
        }
    }
}
