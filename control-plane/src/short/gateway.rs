//! `Gateway`: where clients arrive, and which fleet they get to.

use super::{fleet::Tls, text::Listen};
use serde::Deserialize;

/// Where clients arrive, and which fleet they get to.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Gateway {
    /// At least one.
    pub listeners: Vec<Listener>,
    /// At least one.
    pub routes: Vec<Route>,
    /// Ids of the proxies that have it; none named is all.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// `-` is standard output, `none` is nowhere, else a file.
    #[serde(default = "access_log")]
    pub access_log: String,
    /// Header that says whose a request is.
    #[serde(default)]
    pub tenant_header: Option<String>,
    /// A longer body streams on unread.
    #[serde(default = "body_bytes_max")]
    pub body_bytes_max: u64,
}

fn access_log() -> String {
    "-".to_owned()
}

fn body_bytes_max() -> u64 {
    32 << 20
}

/// A socket.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// Needed where there are several.
    #[serde(default)]
    pub name: Option<String>,
    /// Where.
    pub address: Listen,
    /// Then clients speak TLS.
    #[serde(default)]
    pub tls: Option<Tls>,
}

/// Which fleet requests get to, by their host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Its name.
    pub fleet: String,
    /// At least one: a whole name, `*.suffix`, `prefix.*` or `*`.
    #[serde(default = "hosts")]
    pub hosts: Vec<String>,
}

fn hosts() -> Vec<String> {
    vec!["*".to_owned()]
}
