//! Finding the route of a request: virtual host by domain, then the first route that matches.

use http::{HeaderMap, HeaderName, Method, Uri, request::Parts};
use outrigger_xds::resource::route::{
    HeaderMatch, HeaderValueMatch, PathMatch, RouteConfiguration, RouteMatch,
};

/// Index of the virtual host for an authority, in Envoy's order: exact, longest `*.suffix`, longest `prefix.*`, `*`.
#[must_use]
pub fn virtual_host(config: &RouteConfiguration, authority: &str) -> Option<usize> {
    if let [host] = config.virtual_hosts.as_slice()
        && matches!(host.domains.as_slice(), [any] if any == "*")
    {
        return Some(0);
    }
    let authority = authority.to_ascii_lowercase();
    let mut best: Option<(u8, usize, usize)> = None;
    for (index, host) in config.virtual_hosts.iter().enumerate() {
        for domain in &host.domains {
            let Some((class, length)) = rank(&domain.to_ascii_lowercase(), &authority) else {
                continue;
            };
            if best.is_none_or(|(known, known_length, _)| (class, length) > (known, known_length)) {
                best = Some((class, length, index));
            }
        }
    }
    best.map(|(_, _, index)| index)
}

/// How well a domain fits: class (3 exact, 2 suffix, 1 prefix, 0 any) and length.
fn rank(domain: &str, authority: &str) -> Option<(u8, usize)> {
    if domain == "*" {
        return Some((0, 0));
    }
    if let Some(suffix) = domain.strip_prefix('*') {
        return (authority.len() > suffix.len() && authority.ends_with(suffix))
            .then_some((2, suffix.len()));
    }
    if let Some(prefix) = domain.strip_suffix('*') {
        return (authority.len() > prefix.len() && authority.starts_with(prefix))
            .then_some((1, prefix.len()));
    }
    (domain == authority).then_some((3, domain.len()))
}

/// Whether a request is one a route is for.
#[must_use]
pub fn matches(route: &RouteMatch, parts: &Parts) -> bool {
    path_matches(route, parts.uri.path())
        && route
            .headers
            .iter()
            .all(|header| header_matches(header, parts))
}

fn path_matches(route: &RouteMatch, path: &str) -> bool {
    let starts = |prefix: &str| {
        path.get(..prefix.len()).is_some_and(|head| {
            if route.case_sensitive {
                head == prefix
            } else {
                head.eq_ignore_ascii_case(prefix)
            }
        })
    };
    match &route.path {
        PathMatch::Prefix(prefix) => starts(prefix),
        PathMatch::Path(whole) => path.len() == whole.len() && starts(whole),
        PathMatch::PathSeparatedPrefix(prefix) => {
            starts(prefix) && (path.len() == prefix.len() || path.as_bytes()[prefix.len()] == b'/')
        }
    }
}

fn header_matches(wanted: &HeaderMatch, parts: &Parts) -> bool {
    let value = value_of(&wanted.name, &parts.method, &parts.uri, &parts.headers);
    let holds = match (&wanted.value, value) {
        (HeaderValueMatch::Present(present), value) => value.is_some() == *present,
        (_, None) => return false,
        (HeaderValueMatch::Exact(exact), Some(value)) => value == exact,
        (HeaderValueMatch::Prefix(prefix), Some(value)) => value.starts_with(prefix.as_str()),
        (HeaderValueMatch::Suffix(suffix), Some(value)) => value.ends_with(suffix.as_str()),
        (HeaderValueMatch::Contains(part), Some(value)) => value.contains(part.as_str()),
    };
    holds != wanted.invert
}

fn value_of<'a>(
    name: &str,
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
) -> Option<&'a str> {
    match name {
        ":method" => Some(method.as_str()),
        ":path" => uri.path_and_query().map(http::uri::PathAndQuery::as_str),
        ":authority" => Some(authority(uri, headers)),
        _ => headers
            .get(HeaderName::from_bytes(name.as_bytes()).ok()?)?
            .to_str()
            .ok(),
    }
}

/// `:authority`, or `host`.
#[must_use]
pub fn authority<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> &'a str {
    uri.authority().map_or_else(
        || {
            headers
                .get(http::header::HOST)
                .and_then(|host| host.to_str().ok())
                .unwrap_or_default()
        },
        |authority| authority.as_str(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::resource::route::VirtualHost;

    fn config(hosts: &[&[&str]]) -> RouteConfiguration {
        let host = |domains: &&[&str]| VirtualHost {
            domains: domains.iter().map(ToString::to_string).collect(),
            ..VirtualHost::default()
        };
        RouteConfiguration {
            name: "t".into(),
            virtual_hosts: hosts.iter().map(host).collect(),
            validate_clusters: true,
        }
    }

    #[test]
    fn domains_are_matched_in_envoys_order() {
        let config = config(&[
            &["*"],
            &["foo.*"],
            &["*.bar.com"],
            &["*.foo.bar.com"],
            &["a.foo.bar.com"],
        ]);
        for (authority, index) in [
            ("A.foo.bar.com", 4),
            ("b.foo.bar.com", 3),
            ("x.bar.com", 2),
            ("foo.org", 1),
            ("other", 0),
            (".bar.com", 0),
        ] {
            assert_eq!(virtual_host(&config, authority), Some(index), "{authority}");
        }
    }

    #[test]
    fn paths_and_headers() {
        let check = |path: PathMatch, request: &str| {
            let route = RouteMatch {
                path,
                case_sensitive: true,
                headers: vec![],
            };
            let (parts, ()) = http::Request::get(request).body(()).unwrap().into_parts();
            matches(&route, &parts)
        };
        assert!(check(PathMatch::Prefix("/v1/".into()), "/v1/chat?x=1"));
        assert!(!check(PathMatch::Path("/v1".into()), "/v1/"));
        assert!(check(PathMatch::Path("/v1".into()), "/v1?x"));
        assert!(check(
            PathMatch::PathSeparatedPrefix("/sleep".into()),
            "/sleep/a"
        ));
        assert!(!check(
            PathMatch::PathSeparatedPrefix("/sleep".into()),
            "/sleepy"
        ));
        let header = |value, invert| HeaderMatch {
            name: "x-a".into(),
            value,
            invert,
        };
        let (parts, ()) = http::Request::get("/")
            .header("x-a", "abc")
            .body(())
            .unwrap()
            .into_parts();
        for (value, invert, expected) in [
            (HeaderValueMatch::Exact("abc".into()), false, true),
            (HeaderValueMatch::Exact("abc".into()), true, false),
            (HeaderValueMatch::Contains("b".into()), false, true),
            (HeaderValueMatch::Present(false), false, false),
        ] {
            assert_eq!(header_matches(&header(value, invert), &parts), expected);
        }
    }
}
