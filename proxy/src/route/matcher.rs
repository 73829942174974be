//! Whether a request is one a route is for. Everything is prepared when the configuration is built.

use http::request::Parts;
use outrigger_filters::{
    matching::{Case, HeaderMatcher, TextMatcher, is_grpc},
    runtime::{Runtime, Share},
};
use outrigger_xds::resource::{
    matching::{QueryMatch, QueryValueMatch, whole},
    route::{PathMatch, RouteMatch},
};
use regex::bytes::Regex;

/// `RouteMatch`, prepared.
#[derive(Debug)]
pub struct Matcher {
    path: PathMatcher,
    headers: Vec<HeaderMatcher>,
    query: Vec<(String, QueryCondition)>,
    share: Option<Share>,
    grpc: bool,
}

#[derive(Debug)]
enum QueryCondition {
    Present(bool),
    Text(TextMatcher),
}

#[derive(Debug)]
enum PathMatcher {
    Prefix(String, Case),
    Path(String, Case),
    PathSeparatedPrefix(String, Case),
    Regex(Regex),
}

impl Matcher {
    /// Prepares it.
    ///
    /// # Errors
    /// A regular expression or a header name is not valid, which the checks of the configuration rule out.
    pub fn new(route: &RouteMatch, runtime: &Runtime) -> Result<Self, String> {
        let case = if route.case_sensitive {
            Case::Heeded
        } else {
            Case::Ignored
        };
        let path = match &route.path {
            PathMatch::Prefix(prefix) => PathMatcher::Prefix(prefix.clone(), case),
            PathMatch::Path(path) => PathMatcher::Path(path.clone(), case),
            PathMatch::PathSeparatedPrefix(prefix) => {
                PathMatcher::PathSeparatedPrefix(prefix.clone(), case)
            }
            PathMatch::Regex(regex) => PathMatcher::Regex(whole(regex)?),
        };
        let query = |wanted: &QueryMatch| {
            let condition = match &wanted.value {
                QueryValueMatch::Present(present) => QueryCondition::Present(*present),
                QueryValueMatch::Text(text) => QueryCondition::Text(TextMatcher::new(text)?),
            };
            Ok::<_, String>((wanted.name.clone(), condition))
        };
        Ok(Self {
            path,
            headers: HeaderMatcher::all(&route.headers)?,
            query: route
                .query_parameters
                .iter()
                .map(query)
                .collect::<Result<_, _>>()?,
            share: route
                .runtime_fraction
                .as_ref()
                .map(|fraction| runtime.share_of(fraction)),
            grpc: route.grpc,
        })
    }

    /// Whether all of it holds.
    #[must_use]
    pub fn matches(&self, parts: &Parts) -> bool {
        self.path.matches(parts.uri.path())
            && self.headers.iter().all(|header| header.matches(parts))
            && (self.query.is_empty() || self.query_matches(parts.uri.query().unwrap_or_default()))
            && (!self.grpc || is_grpc(&parts.headers))
            && self.share.as_ref().is_none_or(Share::draw)
    }

    fn query_matches(&self, query: &str) -> bool {
        self.query.iter().all(|(name, wanted)| {
            // Not decoded, and of several the first counts, as in Envoy.
            let mut pairs = query
                .split('&')
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
            let first = pairs.find(|(key, _)| key == name);
            match (wanted, first) {
                (QueryCondition::Present(present), first) => first.is_some() == *present,
                (QueryCondition::Text(text), Some((_, value))) => text.matches(value.as_bytes()),
                (QueryCondition::Text(_), None) => false,
            }
        })
    }
}

impl PathMatcher {
    fn matches(&self, path: &str) -> bool {
        let path = path.as_bytes();
        match self {
            Self::Prefix(prefix, case) => case.starts(path, prefix.as_bytes()),
            Self::Path(whole, case) => case.equal(path, whole.as_bytes()),
            Self::PathSeparatedPrefix(prefix, case) => {
                case.starts(path, prefix.as_bytes())
                    && path.get(prefix.len()).is_none_or(|next| *next == b'/')
            }
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::resource::matching::{Pattern, StringMatch};

    fn holds(route: &RouteMatch, uri: &str) -> bool {
        let (parts, ()) = http::Request::get(uri).body(()).unwrap().into_parts();
        Matcher::new(route, &Runtime::default())
            .unwrap()
            .matches(&parts)
    }

    #[test]
    fn paths() {
        let path = |path| RouteMatch {
            path,
            ..RouteMatch::default()
        };
        for (wanted, uri, expected) in [
            (PathMatch::Prefix("/v1/".into()), "/v1/chat?x=1", true),
            (PathMatch::Path("/v1".into()), "/v1/", false),
            (PathMatch::Path("/v1".into()), "/v1?x", true),
            (PathMatch::PathSeparatedPrefix("/a".into()), "/a/b", true),
            (PathMatch::PathSeparatedPrefix("/a".into()), "/a", true),
            (PathMatch::PathSeparatedPrefix("/a".into()), "/ab", false),
            (PathMatch::Regex("/v[0-9]".into()), "/v1?x", true),
            (PathMatch::Regex("/v[0-9]".into()), "/v12", false),
            (PathMatch::Regex("/a|/b".into()), "/bc", false),
        ] {
            let route = path(wanted);
            assert_eq!(holds(&route, uri), expected, "{route:?} {uri}");
        }
        let mut route = path(PathMatch::Prefix("/V1".into()));
        assert!(!holds(&route, "/v1/a"));
        route.case_sensitive = false;
        assert!(holds(&route, "/v1/a"));
    }

    #[test]
    fn query_parameters_are_compared_as_they_stand_and_the_first_counts() {
        let query = |name: &str, value: Option<&str>| RouteMatch {
            query_parameters: vec![QueryMatch {
                name: name.into(),
                value: value.map_or(QueryValueMatch::Present(true), |value| {
                    QueryValueMatch::Text(StringMatch {
                        pattern: Pattern::Exact(value.into()),
                        ignore_case: false,
                    })
                }),
            }],
            ..RouteMatch::default()
        };
        for (name, value, uri, expected) in [
            ("a", Some("1"), "/?a=1&a=2", true),
            ("a", Some("2"), "/?a=1&a=2", false),
            ("a", Some("%31"), "/?a=%31", true),
            ("a", Some("1"), "/?a=%31", false),
            ("a", None, "/?b&a", true),
            ("a", None, "/?b=a", false),
            ("a", Some(""), "/?a", true),
            ("a", None, "/", false),
        ] {
            assert_eq!(holds(&query(name, value), uri), expected, "{name} {uri}");
        }
    }
}
