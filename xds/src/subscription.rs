//! What a client of a control plane asks for, and how it answers: the state of one stream after the other, for both
//! variants of the protocol (the state of the world, and what changed).
//!
//! It does no IO, decodes nothing and judges nothing: [`Subscriptions::received`] says what of an answer is to be applied,
//! [`Subscriptions::judged`] what came of it, and [`Subscriptions::next_request`] what is to be sent. A change of what is asked
//! for never rides on an answer: some servers overlook it there. Answers go first, then types in the order in which
//! they need each other: layers of the runtime, clusters, endpoints, listeners, routes, secrets, configurations of
//! filters.

#[cfg(test)]
mod model_server;
mod of_kind;
mod rate;
#[cfg(test)]
mod tests;

pub use rate::RateLimit;

use crate::load::binary::Packed;
use of_kind::OfKind;
use rate::Rate;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// How long a server has to send a resource that it was asked for (gRFC A57).
pub const DOES_NOT_EXIST_AFTER: Duration = Duration::from_secs(15);
/// Longer lives are cut.
pub const TTL_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Why something was not accepted is told up to this length.
pub const ERROR_BYTES_MAX: usize = 8 << 10;
/// The name of all.
pub const WILDCARD: &str = "*";

/// A type of resources, in the order in which they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// RTDS.
    Runtimes,
    /// CDS.
    Clusters,
    /// EDS.
    Endpoints,
    /// LDS.
    Listeners,
    /// RDS.
    Routes,
    /// SDS.
    Secrets,
    /// ECDS.
    Extensions,
}

impl Kind {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::Runtimes,
        Self::Clusters,
        Self::Endpoints,
        Self::Listeners,
        Self::Routes,
        Self::Secrets,
        Self::Extensions,
    ];

    /// As it is written in requests.
    #[must_use]
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Runtimes => "type.googleapis.com/envoy.service.runtime.v3.Runtime",
            Self::Clusters => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listeners => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Secrets => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Extensions => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
        }
    }

    /// The kind that is written so.
    #[must_use]
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.type_url() == type_url)
    }

    /// Whether one that a server removes is gone although somebody uses it: what is around it goes on without.
    #[must_use]
    pub fn is_revocable(self) -> bool {
        matches!(self, Self::Extensions | Self::Runtimes)
    }

    /// Whether an answer with the state of the world holds all that there are: what it lacks is gone.
    #[must_use]
    pub fn is_whole(self) -> bool {
        matches!(self, Self::Clusters | Self::Listeners)
    }
}

/// A variant of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Protocol {
    /// Every answer is the state of the world.
    #[default]
    State,
    /// Answers say what changed.
    Delta,
}

/// What is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Of which type.
    pub kind: Kind,
    /// Whether it is the first of its stream, which says who we are.
    pub first: bool,
    /// What of it depends on the protocol.
    pub ask: Ask,
    /// Which answer it replies to. With the state of the world, any request after the first answer names the last one.
    pub nonce: String,
    /// Why that was not accepted.
    pub error: Option<String>,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// The state of the world.
    State {
        /// Of the last answer that was accepted.
        version: String,
        /// All that is wanted; none is all there are, where nothing was ever named.
        names: Vec<String>,
    },
    /// What changed.
    Delta {
        /// Wanted from now on.
        subscribe: Vec<String>,
        /// Wanted no longer.
        unsubscribe: Vec<String>,
        /// What is there already, in the first request of a type on a stream.
        initial_versions: BTreeMap<String, String>,
    },
}

/// What came.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// Of which type.
    pub type_url: String,
    /// Of the whole.
    pub version: String,
    /// What replies name it by.
    pub nonce: String,
    /// What it brings.
    pub resources: Vec<Sent>,
    /// Names of resources that are gone, or do not exist.
    pub removed: Vec<String>,
    /// Names of resources that the server cannot send, and why.
    pub errors: Vec<(String, String)>,
}

/// A resource in an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    /// Its name; empty if none can be found.
    pub name: String,
    /// Its own version; empty is the answer's.
    pub version: String,
    /// How long it lives unless it comes again.
    pub ttl: Option<Duration>,
    /// What is wrong with what was said about it, if anything is.
    pub error: Option<String>,
    /// Itself; none in a heartbeat.
    pub body: Option<Packed>,
}

/// What of an answer is to be applied.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// Of which type.
    pub kind: Kind,
    /// Of the whole.
    pub version: String,
    /// What is wanted of that which came.
    pub resources: Vec<Sent>,
    /// What is wanted of that which is gone.
    pub removed: Vec<String>,
    /// What is wanted of that which the server cannot send, and why. What is there of it stays.
    pub errors: Vec<(String, String)>,
    /// Names of all that there are, where the answer says so: whatever else there was is gone.
    pub whole: Option<BTreeSet<String>>,
    /// To be handed back with the verdict.
    pub receipt: Receipt,
}

/// What must be remembered of an answer until it is judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Receipt {
    kind: Kind,
    version: String,
    nonce: String,
    /// Names, versions and lives of what came.
    came: Vec<(String, String, Option<Duration>)>,
    removed: Vec<String>,
}

/// What time has brought about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lapse {
    /// Its life is over: it is gone.
    Expired(Kind, String),
    /// It was asked for and did not come: it does not exist.
    Missing(Kind, String),
}

/// What is known of a resource, for those who look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Asked for.
    Requested,
    /// Asked for, and does not exist.
    DoesNotExist,
    /// There.
    Acked,
}

/// The subscriptions of one client, over all its streams.
#[derive(Debug)]
pub struct Subscriptions {
    protocol: Protocol,
    kinds: BTreeMap<Kind, OfKind>,
    rate: Rate,
    open: bool,
    introduced: bool,
}

impl Subscriptions {
    /// Nothing is asked for, and no stream is open.
    #[must_use]
    pub fn new(protocol: Protocol, limit: RateLimit, now: Instant) -> Self {
        Self {
            protocol,
            kinds: BTreeMap::from(Kind::ALL.map(|kind| (kind, OfKind::default()))),
            rate: Rate::full(limit, now),
            open: false,
            introduced: false,
        }
    }

    fn of(&mut self, kind: Kind) -> &mut OfKind {
        self.kinds.entry(kind).or_default()
    }

    /// These are wanted from now on, and no others; [`WILDCARD`] is all.
    pub fn want(&mut self, kind: Kind, names: BTreeSet<String>) {
        self.of(kind).want(names);
    }

    /// A resource that is there before any server was asked.
    pub fn remember(&mut self, kind: Kind, name: String, version: String) {
        self.of(kind).remember(name, version);
    }

    /// What all resources of a type had in common, before any server was asked.
    pub fn remember_version(&mut self, kind: Kind, version: String) {
        self.of(kind).version = version;
    }

    /// The last version of a type that was accepted as a whole.
    #[must_use]
    pub fn version(&self, kind: Kind) -> &str {
        self.kinds.get(&kind).map_or("", |of_kind| &of_kind.version)
    }

    /// A resource's own version, if it is there.
    #[must_use]
    pub fn version_of(&self, kind: Kind, name: &str) -> Option<&str> {
        self.kinds.get(&kind)?.version_of(name)
    }

    /// Whether a resource lives on only if it comes again.
    #[must_use]
    pub fn is_mortal(&self, kind: Kind, name: &str) -> bool {
        let of_kind = self.kinds.get(&kind);
        of_kind.is_some_and(|of_kind| of_kind.is_mortal(name))
    }

    /// What is known of a resource that is wanted.
    #[must_use]
    pub fn status(&self, kind: Kind, name: &str) -> Status {
        let of_kind = self.kinds.get(&kind);
        of_kind.map_or(Status::Requested, |of_kind| of_kind.status(name))
    }

    /// A stream is open: everything is to be said again.
    pub fn opened(&mut self) {
        (self.open, self.introduced) = (true, false);
        self.kinds.values_mut().for_each(OfKind::begin);
    }

    /// The stream is gone. What was not answered is not waited for.
    pub fn broken(&mut self) {
        self.open = false;
        self.kinds.values_mut().for_each(OfKind::begin);
    }

    /// What of an answer is to be applied; none if nothing is. An answer to what nobody asked for any more is
    /// confirmed; one of a stream that is gone, or of a type that was not asked for on it, is not heeded.
    pub fn received(&mut self, answer: Answer, now: Instant) -> Option<Received> {
        let kind = Kind::of(&answer.type_url).filter(|_| self.open)?;
        let protocol = self.protocol;
        self.of(kind).received(kind, protocol, answer, now)
    }

    /// What became of an answer: names of what was not accepted, and why.
    pub fn judged(&mut self, receipt: Receipt, rejected: &[(String, String)], now: Instant) {
        let protocol = self.protocol;
        self.of(receipt.kind)
            .judged(protocol, receipt, rejected, now);
    }

    /// The next request, if there is one and it may be sent.
    pub fn next_request(&mut self, now: Instant) -> Option<Request> {
        if !self.open || !self.has_request() || !self.rate.take(now) {
            return None;
        }
        let protocol = self.protocol;
        let reply = self
            .kinds
            .iter_mut()
            .find_map(|(kind, of_kind)| of_kind.reply(*kind, protocol));
        let request = reply.or_else(|| {
            self.kinds
                .iter_mut()
                .find_map(|(kind, of_kind)| of_kind.change(*kind, protocol, now))
        });
        request.map(|request| Request {
            first: !std::mem::replace(&mut self.introduced, true),
            ..request
        })
    }

    /// Whether there is something to send, whether it may be sent or not.
    #[must_use]
    pub fn has_request(&self) -> bool {
        self.open && self.kinds.values().any(OfKind::has_request)
    }

    /// What time has brought about.
    pub fn lapse(&mut self, now: Instant) -> Vec<Lapse> {
        self.kinds
            .iter_mut()
            .flat_map(|(kind, of_kind)| of_kind.lapse(*kind, now))
            .collect()
    }

    /// When something is to be done although nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let lapse = self.kinds.values().filter_map(OfKind::deadline).min();
        let token = self.has_request().then(|| self.rate.next());
        lapse.into_iter().chain(token).min()
    }
}
