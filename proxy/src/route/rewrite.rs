//! Paths and places: what a rewrite makes of a path, and where a redirect points.

use super::authority;
use http::{HeaderName, HeaderValue, StatusCode, Uri, request::Parts};
use outrigger_filters::error::{Error, Flag, Origin};
use outrigger_xds::resource::{
    matching::RegexRewrite,
    route::{PathMatch, Redirect, RouteMatch},
    route_action::PathRedirect,
};
use regex::Regex;
use std::fmt::Write as _;

/// Path and query before they were rewritten.
const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// How a path is rewritten; its query stays.
#[derive(Debug)]
pub enum PathRewrite {
    /// So many bytes of it, or all of it, become this.
    Prefix(Option<usize>, String),
    /// Whatever matches becomes this.
    Regex(Regex, String),
}

impl PathRewrite {
    /// Replaces what the route matched.
    #[must_use]
    pub fn prefix(route: &RouteMatch, to: &str) -> Self {
        let length = match &route.path {
            PathMatch::Prefix(path)
            | PathMatch::Path(path)
            | PathMatch::PathSeparatedPrefix(path) => Some(path.len()),
            // The whole path.
            PathMatch::Regex(_) => None,
        };
        Self::Prefix(length, to.to_owned())
    }

    /// Replaces what a regular expression finds.
    ///
    /// # Errors
    /// It is not valid, which the checks of the configuration rule out.
    pub fn regex(rewrite: &RegexRewrite) -> Result<Self, String> {
        let (regex, to) = rewrite.prepare()?;
        Ok(Self::Regex(regex, to))
    }

    /// Rewrites the path of a request.
    ///
    /// # Errors
    /// What comes of it is no path.
    pub fn apply(&self, parts: &mut Parts, tell_original: bool) -> Result<(), Error> {
        let new = self.path_and_query(parts);
        let original = parts.uri.path_and_query().map(|path| path.as_str());
        if tell_original && let Some(Ok(original)) = original.map(HeaderValue::from_str) {
            parts.headers.insert(ORIGINAL_PATH, original);
        }
        let mut uri = parts.uri.clone().into_parts();
        uri.path_and_query = new.parse().ok();
        parts.uri = Uri::from_parts(uri).map_err(|_| {
            Error::new(
                Origin::Downstream,
                Flag::DownstreamProtocolError,
                StatusCode::BAD_REQUEST,
                "path_normalization_failed",
                "Bad Request",
            )
        })?;
        Ok(())
    }

    /// The new path, and the query as it was.
    #[must_use]
    pub fn path_and_query(&self, parts: &Parts) -> String {
        let path = parts.uri.path();
        let mut new = match self {
            Self::Prefix(length, to) => {
                let rest = path.get(length.unwrap_or(path.len())..).unwrap_or_default();
                format!("{to}{rest}")
            }
            Self::Regex(regex, to) => regex.replace_all(path, to.as_str()).into_owned(),
        };
        if let Some(query) = parts.uri.query() {
            new.push('?');
            new.push_str(query);
        }
        new
    }
}

/// A redirect, prepared.
#[derive(Debug)]
pub struct Redirector {
    redirect: Redirect,
    rewrite: Option<PathRewrite>,
    /// Status of the answer.
    pub status: StatusCode,
}

impl Redirector {
    /// Prepares it.
    ///
    /// # Errors
    /// A regular expression is not valid, which the checks of the configuration rule out.
    pub fn new(route: &RouteMatch, redirect: &Redirect) -> Result<Self, String> {
        let rewrite = match &redirect.path {
            Some(PathRedirect::Prefix(to)) => Some(PathRewrite::prefix(route, to)),
            Some(PathRedirect::Regex(rewrite)) => Some(PathRewrite::regex(rewrite)?),
            Some(PathRedirect::Path(_)) | None => None,
        };
        let status = StatusCode::from_u16(redirect.status)
            .map_err(|_| format!("status {} is no HTTP status", redirect.status))?;
        Ok(Self {
            redirect: redirect.clone(),
            rewrite,
            status,
        })
    }

    /// Where the request should go; `None` if that cannot be written in a header.
    #[must_use]
    pub fn location(&self, parts: &Parts) -> Option<HeaderValue> {
        let redirect = &self.redirect;
        let came_by = parts
            .headers
            .get("x-forwarded-proto")
            .and_then(|scheme| scheme.to_str().ok())
            .unwrap_or("http");
        let scheme = redirect.scheme.as_deref().unwrap_or(came_by);
        let asked = authority(&parts.uri, &parts.headers);
        let (name, port) = split_port(asked);
        let host = match (&redirect.host, redirect.port) {
            (Some(host), _) => host.as_str(),
            (None, Some(_)) => name,
            // The port that was the old scheme's own does not go along to a new one.
            (None, None) if scheme != came_by && port == default_port(came_by) => name,
            (None, None) => asked,
        };
        let mut text = format!("{scheme}://{host}");
        if let Some(port) = redirect.port {
            let _ = write!(text, ":{port}");
        }
        text.push_str(&self.path(parts));
        HeaderValue::try_from(text).ok()
    }

    fn path(&self, parts: &Parts) -> String {
        let redirect = &self.redirect;
        let query = parts.uri.query().filter(|_| !redirect.strip_query);
        if let Some(PathRedirect::Path(path)) = &redirect.path {
            return match query {
                Some(query) if !path.contains('?') => format!("{path}?{query}"),
                _ => path.clone(),
            };
        }
        let mut path = match &self.rewrite {
            Some(rewrite) => rewrite.path_and_query(parts),
            None => parts
                .uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
        };
        if redirect.strip_query
            && let Some(at) = path.find('?')
        {
            path.truncate(at);
        }
        path
    }
}

/// A host and its port, if it has one.
pub(super) fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && !port.ends_with(']') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_from_addresses() {
        for (authority, expected) in [
            ("a:80", ("a", Some(80))),
            ("a", ("a", None)),
            ("[::1]", ("[::1]", None)),
            ("[::1]:8080", ("[::1]", Some(8080))),
            ("a:", ("a:", None)),
        ] {
            assert_eq!(split_port(authority), expected);
        }
    }

    #[test]
    fn the_schemes_own_port_does_not_go_along() {
        let redirect = Redirect {
            scheme: Some("https".into()),
            status: 301,
            ..Redirect::default()
        };
        let redirector = Redirector::new(&RouteMatch::default(), &redirect).unwrap();
        for (host, location) in [
            ("a:80", "https://a/p?q"),
            ("a:8080", "https://a:8080/p?q"),
            ("a", "https://a/p?q"),
        ] {
            let request = http::Request::get("/p?q").header("host", host);
            let (parts, ()) = request.body(()).unwrap().into_parts();
            assert_eq!(redirector.location(&parts).unwrap(), location);
        }
    }
}
