//! Secrets that the built-in CA issues to each node, beside what is published for it: who it is, and whom it believes. They are renewed while its stream goes on.

use crate::{
    ca::Authority,
    identity::TrustDomain,
    session::Client,
    snapshot::{Resource, Snapshot},
    tls::{Access, Peer},
    views::Published,
};
use anyhow::anyhow;
use outrigger_xds::{load::written, subscription::Kind};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// A certificate with its key, whose SPIFFE id is `spiffe://TRUST_DOMAIN/node/ID`.
pub const IDENTITY: &str = "outrigger_identity";
/// The CAs of the trust domain, and that an id must be one of its nodes.
pub const TRUST: &str = "outrigger_trust";
/// Streams are spread over so many moments before half of a certificate's time is over.
const RENEWAL_STEPS: u32 = 64;

/// The names of the secrets.
pub fn names() -> impl Iterator<Item = String> {
    [IDENTITY, TRUST].into_iter().map(str::to_owned)
}

/// What was issued on a stream last.
#[derive(Debug)]
struct Issued {
    /// By whom.
    authority: Arc<Authority>,
    secrets: Vec<Arc<Resource>>,
    at: SystemTime,
    renew_at: SystemTime,
}

impl Issued {
    fn is_due(&self, access: &Access, now: SystemTime) -> bool {
        let is_same = access
            .authority()
            .is_some_and(|authority| Arc::ptr_eq(&authority, &self.authority));
        // Of a clock that was set back nobody knows how long it is right: what is new holds by it.
        !is_same || now >= self.renew_at || now < self.at
    }
}

/// What one stream is sent: what is published for its node, and what is issued to it.
#[derive(Debug)]
pub struct Seen {
    peer: Peer,
    /// Spreads renewals.
    stream: u64,
    issued: Option<Issued>,
    /// Of what it was made.
    last: Option<(Arc<Published>, Snapshot)>,
}

impl Seen {
    /// Of the stream of this number.
    #[must_use]
    pub fn new(peer: Peer, stream: u64) -> Self {
        Self {
            peer,
            stream,
            issued: None,
            last: None,
        }
    }

    /// Whether something is to be renewed.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        match (&self.issued, self.peer.access()) {
            (Some(issued), Some(access)) => issued.is_due(access, now),
            _ => false,
        }
    }

    /// What the client is to have now. Types of which nothing changed stay the same.
    pub fn snapshot(
        &mut self,
        published: &Arc<Published>,
        client: &Client,
        now: SystemTime,
    ) -> &Snapshot {
        let is_new = self.renew(&client.node.id, now);
        let last = self.last.take();
        let last = last.filter(|(of, _)| !is_new && Arc::ptr_eq(of, published));
        let (_, snapshot) = self.last.insert(
            last.unwrap_or_else(|| (published.clone(), self.issued_over(published, client))),
        );
        snapshot
    }

    fn issued_over(&self, published: &Published, client: &Client) -> Snapshot {
        let mut snapshot = published.snapshot(client).clone();
        for secret in self.issued.iter().flat_map(|issued| &issued.secrets) {
            snapshot.insert(Kind::Secrets, secret.clone());
        }
        snapshot
    }

    /// Issues what is due; gives whether it did.
    fn renew(&mut self, node: &str, now: SystemTime) -> bool {
        let Some(access) = self.peer.access() else {
            return false;
        };
        let Some(authority) = access.authority() else {
            return false;
        };
        let is_good = |issued: &Issued| !issued.is_due(access, now);
        if self.issued.as_ref().is_some_and(is_good) {
            return false;
        }
        let ttl = access.ttl();
        let secrets = issue(&authority, node, ttl, now);
        let result = if secrets.is_ok() { "good" } else { "bad" };
        metrics::counter!("outrigger_control_plane_certificates_issued_total", "result" => result)
            .increment(1);
        let secrets = secrets.unwrap_or_else(|error| {
            tracing::warn!(node, "no certificate is issued to this node: {error:#}");
            Vec::new()
        });
        let step = u32::try_from(self.stream % u64::from(RENEWAL_STEPS)).unwrap_or_default();
        let early = ttl / 16 * step / RENEWAL_STEPS;
        self.issued = Some(Issued {
            authority,
            secrets,
            at: now,
            renew_at: now + ttl / 2 - early,
        });
        true
    }
}

fn issue(
    authority: &Authority,
    node: &str,
    ttl: Duration,
    now: SystemTime,
) -> anyhow::Result<Vec<Arc<Resource>>> {
    let pair = authority.issue(&authority.trust_domain.node(node)?, ttl, now)?;
    let identity = json!({ "tls_certificate": {
        "certificate_chain": { "inline_string": pair.chain },
        "private_key": { "inline_string": pair.key },
    } });
    let trust = trust(&authority.bundle, &authority.trust_domain);
    [(IDENTITY, identity), (TRUST, trust)]
        .into_iter()
        .map(|(name, content)| secret(name, content))
        .collect()
}

/// Whom a node believes: other nodes.
fn trust(bundle: &str, domain: &TrustDomain) -> Value {
    json!({ "validation_context": {
        "trusted_ca": { "inline_string": bundle },
        "match_typed_subject_alt_names": [
            { "san_type": "URI", "matcher": { "prefix": domain.nodes() } },
        ],
    } })
}

fn secret(name: &str, mut content: Value) -> anyhow::Result<Arc<Resource>> {
    content["@type"] = Kind::Secrets.type_url().into();
    content["name"] = name.into();
    let written = written::resource(content, "").map_err(|errors| anyhow!("{name}: {errors}"))?;
    Ok(Arc::new(Resource::from(&written)))
}
