//! Who may be which node: SPIFFE ids, and the rules between them and the `id` of a node.
//!
//! `spiffe://TRUST_DOMAIN/node/ID` is the node `ID` and no other. For ids that look otherwise, such as Istio's `/ns/NAMESPACE/sa/ACCOUNT`, rules say it.
//! What an id is worth is not decided here: that a certificate has it, and that somebody vouches for that, is looked at when hands are shaken.

use std::{fmt, str::FromStr};

/// Of an id: SPIFFE, 2.3.
const ID_BYTES_MAX: usize = 2048;
/// What ids of nodes begin with, behind the trust domain.
const NODE: &str = "/node/";

/// An id as the SPIFFE standard has it: `spiffe://TRUST_DOMAIN/PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    /// Begins with a slash; empty is the trust domain itself.
    path: String,
}

/// Whose ids they are: lower-case letters, digits, `.`, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustDomain(String);

/// What is no SPIFFE id, no trust domain or no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}: {what}")]
pub struct Malformed {
    text: String,
    what: &'static str,
}

fn malformed(text: &str, what: &'static str) -> Malformed {
    Malformed {
        text: text.to_owned(),
        what,
    }
}

fn is_segment(text: &str) -> bool {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    !["", ".", ".."].contains(&text) && text.bytes().all(is_known)
}

fn is_path(text: &str) -> bool {
    text.is_empty()
        || text
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(is_segment))
}

impl FromStr for TrustDomain {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let is_known =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(is_known) {
            let what = "not a trust domain: at most 255 of a-z, 0-9, '.', '-' and '_'";
            return Err(malformed(text, what));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SpiffeId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let rest = text.strip_prefix("spiffe://");
        let rest = rest.ok_or_else(|| malformed(text, "does not begin with spiffe://"))?;
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if text.len() > ID_BYTES_MAX || !is_path(path) {
            return Err(malformed(text, "not the path of a SPIFFE id"));
        }
        Ok(Self {
            trust_domain: domain.parse()?,
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl TrustDomain {
    /// The id of the domain itself, which its CAs have.
    #[must_use]
    pub fn id(&self) -> SpiffeId {
        SpiffeId {
            trust_domain: self.clone(),
            path: String::new(),
        }
    }

    /// The id of a node.
    ///
    /// # Errors
    /// SPIFFE allows fewer characters than ids of nodes may have.
    pub fn node(&self, id: &str) -> Result<SpiffeId, Malformed> {
        if !is_segment(id) {
            let what =
                "not the id of a node that a SPIFFE id can hold: a-z, A-Z, 0-9, '.', '-' and '_'";
            return Err(malformed(id, what));
        }
        format!("spiffe://{self}{NODE}{id}").parse()
    }

    /// The id of this control plane.
    #[must_use]
    pub fn control_plane(&self) -> SpiffeId {
        SpiffeId {
            trust_domain: self.clone(),
            path: "/control-plane".into(),
        }
    }

    /// What the ids of all nodes begin with.
    #[must_use]
    pub fn nodes(&self) -> String {
        format!("spiffe://{self}{NODE}")
    }
}

impl SpiffeId {
    /// Whose it is.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
}

/// `PATH=ID`: ids with this path may be this node; `ID` may end in `*`, and then is all that begins so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    path: String,
    node: String,
    is_prefix: bool,
}

impl FromStr for Rule {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (path, node) = text
            .split_once('=')
            .ok_or_else(|| malformed(text, "not PATH=ID"))?;
        if path.is_empty() || !is_path(path) {
            return Err(malformed(path, "not the path of a SPIFFE id"));
        }
        if path.starts_with(NODE) {
            return Err(malformed(path, "who has this path is known without a rule"));
        }
        let prefix = node.strip_suffix('*');
        if node.is_empty() || prefix.unwrap_or(node).contains('*') {
            let what = "not the id of a node, or the beginning of one with a '*' behind it";
            return Err(malformed(node, what));
        }
        Ok(Self {
            path: path.to_owned(),
            node: prefix.unwrap_or(node).to_owned(),
            is_prefix: prefix.is_some(),
        })
    }
}

impl Rule {
    fn allows(&self, path: &str, node: &str) -> bool {
        let is_named = if self.is_prefix {
            node.starts_with(&self.node)
        } else {
            node == self.node
        };
        self.path == path && is_named
    }
}

/// Whether who has this id may be this node. Whose trust domain it is was looked at before.
#[must_use]
pub fn may_be(id: &SpiffeId, node: &str, rules: &[Rule]) -> bool {
    let is_own = id
        .path
        .strip_prefix(NODE)
        .is_some_and(|own| own == node && is_segment(own));
    is_own || rules.iter().any(|rule| rule.allows(&id.path, node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_spiffe_writes_them() {
        for good in [
            "spiffe://a",
            "spiffe://fleet.example/node/gpu-1",
            "spiffe://cluster.local/ns/prod/sa/Proxy_1",
        ] {
            assert_eq!(good.parse::<SpiffeId>().unwrap().to_string(), good);
        }
        let long = format!("spiffe://a/{}", "x".repeat(ID_BYTES_MAX));
        for bad in [
            "",
            "spiffe://",
            "spiffe:///node/a",
            "https://a/node/a",
            "spiffe://A/node/a",
            "spiffe://a/",
            "spiffe://a/node/",
            "spiffe://a//node",
            "spiffe://a/node/../b",
            "spiffe://a/node/%61",
            "spiffe://a:1/node/a",
            "spiffe://u@a/node/a",
            "spiffe://a/node/a?x",
            &long,
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
        let domain: TrustDomain = "fleet".parse().unwrap();
        assert_eq!(
            domain.node("a").unwrap().to_string(),
            "spiffe://fleet/node/a"
        );
        for bad in ["", "..", "a/b", "sidecar~1"] {
            assert!(domain.node(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_node_is_who_its_id_or_a_rule_says() {
        let rules: Vec<Rule> = ["/ns/prod/sa/proxy=prod-*", "/ns/prod/sa/edge=edge"]
            .iter()
            .map(|rule| rule.parse().unwrap())
            .collect();
        let cases = [
            ("/node/a", "a", true),
            ("/node/a", "b", false),
            ("/node/a", "", false),
            ("/node/a/b", "a/b", false),
            ("/node", "", false),
            ("/ns/prod/sa/proxy", "prod-1", true),
            ("/ns/prod/sa/proxy", "prod", false),
            ("/ns/prod/sa/edge", "edge", true),
            ("/ns/prod/sa/edge", "edge-1", false),
            ("/ns/test/sa/proxy", "prod-1", false),
            ("", "a", false),
        ];
        for (path, node, expected) in cases {
            let id: SpiffeId = format!("spiffe://d{path}").parse().unwrap();
            assert_eq!(may_be(&id, node, &rules), expected, "{path} {node}");
        }
        for bad in ["", "/a", "a=b", "/a=", "/a=*b", "/a=b**", "/node/a=b", "=b"] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
        let any: Rule = "/operator=*".parse().unwrap();
        assert!(any.allows("/operator", "whoever"));
    }
}
