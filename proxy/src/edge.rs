//! What a request's path, host and client are taken for: as the connection manager's options say, before it is routed.

use crate::headers::{FORWARDED_FOR, Seen};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header,
    request::Parts,
    uri::{Authority, PathAndQuery},
};
use outrigger_filters::error::Error;
use outrigger_xds::resource::edge::{Edge, EscapedSlashes, StripPort, Underscores};
use std::net::IpAddr;

/// Changes path and host; true if something was changed.
///
/// # Errors
/// The path is not to be forwarded.
pub(crate) fn target(
    parts: &mut Parts,
    edge: &Edge,
    listener_port: Option<u16>,
) -> Result<bool, Error> {
    let path = path(parts, edge)?;
    let host = host(parts, edge, listener_port);
    Ok(path | host)
}

fn path(parts: &mut Parts, edge: &Edge) -> Result<bool, Error> {
    if !edge.normalize_path && !edge.merge_slashes && edge.escaped_slashes == EscapedSlashes::Keep {
        return Ok(false);
    }
    let before = parts.uri.path();
    if edge.normalize_path && !is_escaped_well(before) {
        // What is left of it once its neighbours are unescaped may be an escape that nobody judged.
        return Err(refused());
    }
    let mut path = before.to_owned();
    if edge.escaped_slashes != EscapedSlashes::Keep {
        path = unescape_slashes(&path);
        if path != before && edge.escaped_slashes == EscapedSlashes::Reject {
            return Err(refused());
        }
    }
    if edge.normalize_path {
        path = normalize(&path);
    }
    if edge.merge_slashes {
        path = merge_slashes(&path);
    }
    if path == before {
        return Ok(false);
    }
    let query = parts.uri.query();
    let all = query.map_or_else(|| path.clone(), |query| format!("{path}?{query}"));
    let all: PathAndQuery = all.parse().map_err(|_| refused())?;
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.path_and_query = Some(all);
    parts.uri = Uri::from_parts(uri).map_err(|_| refused())?;
    Ok(true)
}

fn refused() -> Error {
    crate::head::unflagged(StatusCode::BAD_REQUEST, "path_normalization_failed")
}

/// Whether two hexadecimal digits follow each percent sign.
fn is_escaped_well(path: &str) -> bool {
    path.split('%').skip(1).all(|rest| {
        let digits = rest.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

fn unescape_slashes(path: &str) -> String {
    let path = path.replace("%2F", "/").replace("%2f", "/");
    path.replace("%5C", "\\").replace("%5c", "\\")
}

/// Unreserved characters are not escaped, backslashes are slashes, and no segment is a dot or two (RFC 3986, 6.2.2).
fn normalize(path: &str) -> String {
    let path = unescape_unreserved(path).replace('\\', "/");
    let mut segments: Vec<&str> = Vec::new();
    let mut parts = path.split('/').skip(1).peekable();
    while let Some(segment) = parts.next() {
        let is_last = parts.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    segments.pop();
                }
                if is_last {
                    segments.push("");
                }
            }
            _ => segments.push(segment),
        }
    }
    format!("/{}", segments.join("/"))
}

fn unescape_unreserved(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 3);
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte.filter(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(byte)) {
            Some(byte) => {
                out.push(byte as char);
                rest = &rest[at + 3..];
            }
            None => {
                out.push('%');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

fn merge_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for letter in path.chars() {
        if letter != '/' || !out.ends_with('/') {
            out.push(letter);
        }
    }
    out
}

fn host(parts: &mut Parts, edge: &Edge, listener_port: Option<u16>) -> bool {
    if edge.strip_port == StripPort::None && !edge.strip_trailing_host_dot {
        return false;
    }
    let keeps_port = parts.method == Method::CONNECT;
    let strip = |host: &str| {
        let mut stripped = host.to_owned();
        if !keeps_port {
            strip_port(&mut stripped, edge.strip_port, listener_port);
        }
        if edge.strip_trailing_host_dot {
            strip_dot(&mut stripped);
        }
        (stripped != host).then_some(stripped)
    };
    let told = parts.headers.get(header::HOST);
    let told = told.and_then(|host| strip(host.to_str().ok()?));
    let told = told.and_then(|host| HeaderValue::try_from(host).ok());
    let authority = parts.uri.authority();
    let authority = authority.and_then(|authority| strip(authority.as_str()));
    let authority = authority.and_then(|text| Authority::try_from(text).ok());
    let changed = told.is_some() || authority.is_some();
    if let Some(host) = told {
        parts.headers.insert(header::HOST, host);
    }
    if let Some(authority) = authority {
        let before = parts.uri.clone();
        let mut uri = std::mem::take(&mut parts.uri).into_parts();
        uri.authority = Some(authority);
        parts.uri = Uri::from_parts(uri).unwrap_or(before);
    }
    changed
}

fn strip_port(host: &mut String, which: StripPort, listener_port: Option<u16>) {
    let Some((name, port)) = host.rsplit_once(':') else {
        return;
    };
    // A colon in an IPv6 address is none before a port.
    let is_port = (!name.contains(':') || name.ends_with(']'))
        && port.bytes().all(|byte| byte.is_ascii_digit());
    let goes = match which {
        StripPort::None => false,
        StripPort::Any => true,
        StripPort::Matching => listener_port.is_some_and(|own| port.parse() == Ok(own)),
    };
    if is_port && goes {
        host.truncate(name.len());
    }
}

fn strip_dot(host: &mut String) {
    let end = host
        .rfind(':')
        .filter(|_| !host.ends_with(']'))
        .unwrap_or(host.len());
    if host[..end].ends_with('.') {
        host.remove(end - 1);
    }
}

/// Refuses headers with an underscore in their name, or takes them off.
///
/// # Errors
/// There is one, and there must be none.
pub(crate) fn underscores(parts: &mut Parts, edge: &Edge) -> Result<(), Error> {
    if edge.underscores == Underscores::Allow {
        return Ok(());
    }
    let names = parts.headers.keys();
    let odd: Vec<HeaderName> = names
        .filter(|name| name.as_str().contains('_'))
        .cloned()
        .collect();
    if odd.is_empty() {
        return Ok(());
    }
    let is_http2 = parts.version == Version::HTTP_2;
    if edge.underscores == Underscores::Reject {
        let (counter, details) = if is_http2 {
            (
                "envoy_http2_requests_rejected_with_underscores_in_headers",
                "http2.unexpected_underscore",
            )
        } else {
            (
                "envoy_http1_requests_rejected_with_underscores_in_headers",
                "http1.unexpected_underscore",
            )
        };
        metrics::counter!(counter).increment(1);
        return Err(crate::head::client_error(
            StatusCode::BAD_REQUEST,
            details,
            "Bad Request",
        ));
    }
    let counter = if is_http2 {
        "envoy_http2_dropped_headers_with_underscores"
    } else {
        "envoy_http1_dropped_headers_with_underscores"
    };
    for name in odd {
        let lines = parts.headers.get_all(&name).iter().count();
        metrics::counter!(counter).increment(lines as u64);
        parts.headers.remove(name);
    }
    Ok(())
}

/// Whether `x-forwarded-for` tells of one address and no more.
pub(crate) fn is_single(headers: &HeaderMap) -> bool {
    let mut lines = headers.get_all(FORWARDED_FOR).iter();
    let first = lines.next();
    first.is_some_and(|line| !line.as_bytes().contains(&b',')) && lines.next().is_none()
}

/// The client as the nearest `hops` proxies before us tell it: so many addresses from the end of `x-forwarded-for`.
pub(crate) fn told_client(headers: &HeaderMap, seen: &Seen, hops: u32) -> Option<IpAddr> {
    let hops = usize::try_from(hops).ok().filter(|&hops| hops > 0)?;
    if !seen.forwarded_for {
        return None;
    }
    // As bytes: what a client wrote before must not take the addresses behind it with it.
    let lines = headers.get_all(FORWARDED_FOR).iter();
    let all: Vec<&[u8]> = lines
        .flat_map(|line| line.as_bytes().split(|&byte| byte == b','))
        .collect();
    let index = all.len().checked_sub(hops)?;
    std::str::from_utf8(all[index]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_what_they_mean() {
        for (path, want) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/a/%2e%2E/b", "/b"),
            ("/../../a", "/a"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/a/", "/a/"),
            ("/%61%2Fb", "/a%2Fb"),
            ("/a\\b", "/a/b"),
            ("//a//b", "//a//b"),
        ] {
            assert_eq!(normalize(path), want, "{path}");
        }
        for (path, well) in [
            ("/a%2Fb%20", true),
            ("/a%%32Fb", false),
            ("/%zz", false),
            ("/a%", false),
            ("/%+f", false),
        ] {
            assert_eq!(is_escaped_well(path), well, "{path}");
        }
        assert_eq!(merge_slashes("//a///b/"), "/a/b/");
        assert_eq!(unescape_slashes("/a%2Fb%2fc%5Cd%25"), "/a/b/c\\d%25");
    }

    #[test]
    fn hosts_lose_ports_and_dots() {
        let strip = |host: &str, which, dot| {
            let mut parts = http::Request::new(()).into_parts().0;
            parts.headers.insert(header::HOST, host.parse().unwrap());
            let edge = Edge {
                strip_port: which,
                strip_trailing_host_dot: dot,
                ..Edge::default()
            };
            super::host(&mut parts, &edge, Some(80));
            parts.headers[header::HOST].to_str().unwrap().to_owned()
        };
        for (host, which, dot, want) in [
            ("a:80", StripPort::Matching, false, "a"),
            ("a:81", StripPort::Matching, false, "a:81"),
            ("a:81", StripPort::Any, false, "a"),
            ("[::1]", StripPort::Any, false, "[::1]"),
            ("[::1]:9", StripPort::Any, false, "[::1]"),
            ("a.:81", StripPort::None, true, "a:81"),
            ("a.", StripPort::Any, true, "a"),
            ("a.:5", StripPort::Any, true, "a"),
        ] {
            assert_eq!(strip(host, which, dot), want, "{host}");
        }
    }

    #[test]
    fn a_client_is_told_by_the_proxies_before_us_and_by_nobody_else() {
        let mut headers = HeaderMap::new();
        let lines: [&[u8]; 2] = [b"\xff, 1.1.1.1", b"\xfe,2.2.2.2 , 3.3.3.3"];
        for line in lines {
            headers.append(FORWARDED_FOR, HeaderValue::from_bytes(line).unwrap());
        }
        let seen = Seen::of(&headers);
        let told = |hops| told_client(&headers, &seen, hops).map(|client| client.to_string());
        assert_eq!(told(0), None);
        assert_eq!(told(1).as_deref(), Some("3.3.3.3"));
        assert_eq!(told(2).as_deref(), Some("2.2.2.2"));
        assert_eq!(told(3), None, "no address");
        assert_eq!(told(4).as_deref(), Some("1.1.1.1"));
        assert_eq!(told(6), None, "there are not so many");
    }
}
