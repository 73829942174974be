//! The hash of a request, by its route's `hash_policy`, computed as Envoy does.

use crate::{body::RequestBody, end_address::EndAddress};
use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use outrigger_xds::resource::hash_policy::{HashCookie, HashPolicy, HashSource};
use std::borrow::Cow;
use xxhash_rust::xxh64::xxh64;

/// A route's policies, prepared once.
#[derive(Debug, Clone, Default)]
pub struct Hashes(Vec<Prepared>);

#[derive(Debug, Clone)]
struct Prepared {
    source: Source,
    terminal: bool,
}

#[derive(Debug, Clone)]
enum Source {
    Header(HeaderName, Option<(regex::Regex, String)>),
    Cookie(HashCookie),
    ClientIp,
    QueryParameter(String),
}

/// A request's hash, if it has one, and the cookies that its client is to be given.
#[derive(Debug, Default)]
pub(super) struct Hash {
    pub(super) value: Option<u64>,
    pub(super) cookies: Vec<HeaderValue>,
}

impl Hashes {
    /// Prepares them.
    ///
    /// # Errors
    /// A name or an expression is not valid, which the checks of the configuration rule out.
    pub fn new(policies: &[HashPolicy]) -> Result<Self, String> {
        let prepared = policies.iter().map(|policy| {
            let source = match &policy.source {
                HashSource::Header { name, rewrite } => {
                    let name = HeaderName::try_from(name.as_str())
                        .map_err(|_| format!("'{name}' is no header name"))?;
                    let rewrite = rewrite.as_ref().map(|rewrite| rewrite.prepare());
                    Source::Header(name, rewrite.transpose()?)
                }
                HashSource::Cookie(cookie) => Source::Cookie(cookie.clone()),
                HashSource::SourceIp => Source::ClientIp,
                HashSource::QueryParameter(name) => Source::QueryParameter(name.clone()),
            };
            Ok(Prepared {
                source,
                terminal: policy.terminal,
            })
        });
        prepared.collect::<Result<_, String>>().map(Self)
    }

    /// Of one request, which came on this connection.
    pub(super) fn of(
        &self,
        request: &Request<RequestBody>,
        connection: Option<&(EndAddress, EndAddress)>,
    ) -> Hash {
        let mut hash = Hash::default();
        for policy in &self.0 {
            let headers = request.headers();
            let found = match &policy.source {
                Source::Header(name, rewrite) => of_header(headers, name, rewrite.as_ref()),
                Source::Cookie(cookie) => of_cookie(headers, cookie, connection, &mut hash.cookies),
                Source::ClientIp => connection
                    .and_then(|(client, _)| client.ip())
                    .map(|ip| digest(ip.to_string().as_bytes())),
                Source::QueryParameter(name) => {
                    query(request.uri().query(), name).map(|value| digest(value.as_bytes()))
                }
            };
            if let Some(found) = found {
                // Turned, so that two equal hashes do not cancel each other out.
                let before = hash.value.map_or(0, |before| before.rotate_left(1));
                hash.value = Some(before ^ found);
            }
            if policy.terminal && hash.value.is_some() {
                break;
            }
        }
        hash
    }
}

fn digest(bytes: &[u8]) -> u64 {
    xxh64(bytes, 0)
}

fn of_header(
    headers: &HeaderMap,
    name: &HeaderName,
    rewrite: Option<&(regex::Regex, String)>,
) -> Option<u64> {
    let mut values = headers
        .get_all(name)
        .iter()
        .map(|value| rewritten(value.as_bytes(), rewrite));
    let first = values.next()?;
    let Some(second) = values.next() else {
        return Some(digest(&first));
    };
    let mut all: Vec<_> = [first, second].into_iter().chain(values).collect();
    all.sort_unstable();
    Some(digest(&all.concat()))
}

fn rewritten<'a>(value: &'a [u8], rewrite: Option<&(regex::Regex, String)>) -> Cow<'a, [u8]> {
    match (rewrite, std::str::from_utf8(value)) {
        (Some((regex, substitution)), Ok(text)) => match regex.replace_all(text, substitution) {
            Cow::Borrowed(_) => Cow::Borrowed(value),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        },
        _ => Cow::Borrowed(value),
    }
}

fn of_cookie(
    headers: &HeaderMap,
    cookie: &HashCookie,
    connection: Option<&(EndAddress, EndAddress)>,
    given: &mut Vec<HeaderValue>,
) -> Option<u64> {
    if let Some(value) = cookie_value(headers, &cookie.name) {
        return Some(digest(value.as_bytes()));
    }
    cookie.ttl?;
    // The same for all requests of a connection, so that those on their way at once agree.
    let (client, here) = connection?;
    let value = format!("{:016x}", digest(format!("{client}{here}").as_bytes()));
    given.extend(HeaderValue::try_from(set_cookie(cookie, &value)).ok());
    Some(digest(value.as_bytes()))
}

/// The value of a cookie, without quotes around it; one that is empty counts as none.
fn cookie_value<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(header::COOKIE).iter();
    let pairs = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(';'));
    let mut values = pairs.filter_map(|pair| {
        let (known, value) = pair.trim().split_once('=')?;
        (known == name).then_some(value)
    });
    let value = values.next()?;
    let inner = value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'));
    Some(inner.unwrap_or(value)).filter(|value| !value.is_empty())
}

fn set_cookie(cookie: &HashCookie, value: &str) -> String {
    let mut text = format!("{}=\"{value}\"", cookie.name);
    let seconds = cookie.ttl.map_or(0, |ttl| ttl.as_secs());
    if seconds > 0 {
        text.push_str(&format!("; Max-Age={seconds}"));
    }
    if !cookie.path.is_empty() {
        text.push_str("; Path=");
        text.push_str(&cookie.path);
    }
    for (name, value) in &cookie.attributes {
        text.push_str("; ");
        text.push_str(name);
        if !value.is_empty() {
            text.push('=');
            text.push_str(value);
        }
    }
    text.push_str("; HttpOnly");
    text
}

fn query<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    query?.split('&').find_map(|pair| {
        let (known, value) = pair.split_once('=').unwrap_or((pair, ""));
        (known == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn request(builder: http::request::Builder) -> Request<RequestBody> {
        builder.body(RequestBody::empty()).unwrap()
    }

    fn hash(sources: Vec<(HashSource, bool)>, builder: http::request::Builder) -> Hash {
        let policies: Vec<HashPolicy> = sources
            .into_iter()
            .map(|(source, terminal)| HashPolicy { source, terminal })
            .collect();
        let connection = (
            EndAddress::Ip("10.0.0.1:7000".parse().unwrap()),
            EndAddress::Ip("10.0.0.2:80".parse().unwrap()),
        );
        Hashes::new(&policies)
            .unwrap()
            .of(&request(builder), Some(&connection))
    }

    fn of_header(name: &str) -> HashSource {
        HashSource::Header {
            name: name.into(),
            rewrite: None,
        }
    }

    fn cookie(ttl: Option<u64>) -> HashSource {
        HashSource::Cookie(HashCookie {
            name: "who".into(),
            ttl: ttl.map(Duration::from_secs),
            path: "/p".into(),
            attributes: vec![
                ("SameSite".into(), "Strict".into()),
                ("Secure".into(), String::new()),
            ],
        })
    }

    #[test]
    fn each_source_hashes_what_it_names() {
        let x = |value: &str| Request::get("/a?k=v&k=w").header("x", value);
        assert_eq!(
            hash(vec![(of_header("x"), false)], x("v")).value,
            Some(digest(b"v"))
        );
        assert_eq!(hash(vec![(of_header("y"), false)], x("v")).value, None);
        let several = Request::get("/").header("x", "b").header("x", "a");
        assert_eq!(
            hash(vec![(of_header("x"), false)], several).value,
            Some(digest(b"ab"))
        );
        let query = HashSource::QueryParameter("k".into());
        assert_eq!(hash(vec![(query, false)], x("v")).value, Some(digest(b"v")));
        let ip = hash(vec![(HashSource::SourceIp, false)], x("v")).value;
        assert_eq!(ip, Some(digest(b"10.0.0.1")));
    }

    #[test]
    fn sources_are_mixed_and_a_terminal_one_ends_the_list() {
        let get = || Request::get("/").header("x", "v");
        let both = hash(
            vec![(of_header("x"), false), (of_header("x"), false)],
            get(),
        );
        let one = digest(b"v");
        assert_eq!(both.value, Some(one.rotate_left(1) ^ one));
        let first = hash(vec![(of_header("x"), true), (of_header("x"), false)], get());
        assert_eq!(first.value, Some(one));
        let second = hash(vec![(of_header("y"), true), (of_header("x"), false)], get());
        assert_eq!(second.value, Some(one), "nothing was hashed by the first");
    }

    #[test]
    fn a_cookie_is_made_where_there_is_none_and_a_ttl() {
        let with = Request::get("/").header("cookie", "a=b; who=\"me\"");
        let found = hash(vec![(cookie(Some(60)), false)], with);
        assert_eq!((found.value, found.cookies.len()), (Some(digest(b"me")), 0));
        assert_eq!(
            hash(vec![(cookie(None), false)], Request::get("/")).value,
            None
        );
        let made = hash(vec![(cookie(Some(60)), false)], Request::get("/"));
        let text = made.cookies[0].to_str().unwrap();
        let value = &text[5..21];
        assert_eq!(made.value, Some(digest(value.as_bytes())));
        assert_eq!(
            text,
            format!("who=\"{value}\"; Max-Age=60; Path=/p; SameSite=Strict; Secure; HttpOnly")
        );
        let session = hash(vec![(cookie(Some(0)), false)], Request::get("/"));
        assert!(!session.cookies[0].to_str().unwrap().contains("Max-Age"));
    }

    #[test]
    fn a_value_is_rewritten_before() {
        let source = HashSource::Header {
            name: "x".into(),
            rewrite: Some(outrigger_xds::resource::matching::RegexRewrite {
                regex: "^([a-z]+)-.*".into(),
                substitution: r"\1".into(),
            }),
        };
        let found = hash(
            vec![(source, false)],
            Request::get("/").header("x", "abc-1"),
        );
        assert_eq!(found.value, Some(digest(b"abc")));
    }
}
