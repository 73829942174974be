//! What is written as text and means more: addresses, durations, names. Formats of the schema and types of the values
//! are read by the same functions.

use outrigger_xds::resource::endpoint;
use serde::{Deserialize, Deserializer, de::Error};
use std::{fmt, time::Duration};

/// `HOST:PORT`, of somebody to be reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub endpoint::Address);

/// `HOST:PORT` to listen on; `:PORT` is all interfaces, and port 0 any.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listen(pub endpoint::Address);

/// A number with its unit: `30s`, `250ms`, `5m`, `1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Span(pub Duration);

impl Span {
    /// Whole milliseconds, as filters have them.
    #[must_use]
    pub fn millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! from_text {
    ($type:ident, $read:ident) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $read(&text).map(Self).map_err(D::Error::custom)
            }
        }
    };
}

from_text!(Address, address);
from_text!(Listen, listen);
from_text!(Span, duration);

/// Longest time that can be said: longer ones are mistakes.
const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Whether a text has a format of the schema, or what is wrong with it.
pub(super) fn check(format: &str, text: &str) -> Result<(), String> {
    match format {
        "address" => address(text).map(drop),
        "listen" => listen(text).map(drop),
        "duration" => duration(text).map(drop),
        "name" => name(text),
        "node" => node(text),
        "host" => host(text),
        "header" => header(text),
        "part" => part(text),
        _ => Err(format!(
            "the schema has a format that nobody knows: {format}"
        )),
    }
}

fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    // No sign, no space: what `parse` would forgive.
    let port = port
        .parse()
        .ok()
        .filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))?;
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let plain = bare.is_none() && !host.contains([':', '[', ']']);
    let host = bare.unwrap_or(host);
    let fits = (bare.is_some() || plain) && !host.contains(['/', '@', ' ']);
    fits.then_some((host, port))
}

fn address(text: &str) -> Result<endpoint::Address, String> {
    let found = host_and_port(text).filter(|(host, port)| !host.is_empty() && *port > 0);
    let (host, port) = found.ok_or_else(|| format!("expected HOST:PORT, got '{text}'"))?;
    Ok(endpoint::Address {
        host: host.to_owned(),
        port,
    })
}

fn listen(text: &str) -> Result<endpoint::Address, String> {
    let wrong = || format!("expected IP:PORT or :PORT, got '{text}'");
    let (host, port) = host_and_port(text).ok_or_else(wrong)?;
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    let address = endpoint::Address {
        host: host.to_owned(),
        port,
    };
    if address.is_name() {
        return Err(wrong());
    }
    Ok(address)
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("expected a time such as 30s, 250ms, 5m or 1h, got '{text}'");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let of_unit = match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => return Err(wrong()),
    };
    of_unit
        .filter(|duration| *duration <= DURATION_MAX)
        .ok_or_else(|| format!("at most a year, got '{text}'"))
}

/// Names become names of resources, where `/` divides, and labels of metrics.
fn name(text: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = text.bytes().next().is_some_and(plain) && text.bytes().last().is_some_and(plain);
    if ends
        && text
            .bytes()
            .all(|byte| plain(byte) || matches!(byte, b'-' | b'.'))
    {
        return Ok(());
    }
    Err(format!(
        "expected lower-case letters, digits, '-' and '.' between them, got '{text}'"
    ))
}

/// An id as `--node-id` takes it; `/` divides it from an engine's address.
fn node(text: &str) -> Result<(), String> {
    if !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/')
    {
        return Ok(());
    }
    Err(format!(
        "expected a node id without '/' and spaces, got '{text}'"
    ))
}

/// As a virtual host takes it.
fn host(text: &str) -> Result<(), String> {
    let suffix = text
        .strip_prefix('*')
        .filter(|rest| rest.is_empty() || rest.starts_with('.'));
    let prefix = text.strip_suffix('*').filter(|rest| rest.ends_with('.'));
    let rest = suffix.or(prefix).unwrap_or(text);
    let plain =
        |byte: u8| byte.is_ascii_graphic() && !byte.is_ascii_uppercase() && !b"*/".contains(&byte);
    if !text.is_empty() && rest.bytes().all(plain) {
        return Ok(());
    }
    Err(format!(
        "expected a lower-case host name, *.SUFFIX, PREFIX.* or *, got '{text}'"
    ))
}

fn header(text: &str) -> Result<(), String> {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if !text.is_empty() && text.bytes().all(token) {
        return Ok(());
    }
    Err(format!("expected the name of a header, got '{text}'"))
}

/// What a limit may be `per`.
fn part(text: &str) -> Result<(), String> {
    let is_header = text
        .strip_prefix("header:")
        .is_some_and(|name| header(name).is_ok());
    if is_header || matches!(text, "tenant" | "model") {
        return Ok(());
    }
    Err(format!(
        "expected tenant, model or header:NAME, got '{text}'"
    ))
}
