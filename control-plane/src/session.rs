//! What a server of xDS knows of one client on one stream, and what it tells it next: both protocols, without IO.
//!
//! [`Session::hear`] takes in a request, [`Session::next`] gives the next response against the newest snapshot, if there is one to give.
//! Whoever calls does so when there is room for it, so that a slow client gets what is true then, and never a queue of what was; and once more
//! after [`Session::held`].
//! Layers of the runtime go first, then clusters, endpoints, listeners, routes, secrets and configurations of filters; what is gone goes last, in the order in which nobody needs it any more.

mod sent;
mod watched;

#[cfg(test)]
mod model;
#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod removal_tests;
#[cfg(test)]
mod tests;

pub use sent::{Sent, State};
pub use watched::{Nack, Told, TypeStatus};

use crate::snapshot::{Resource, Snapshot};
use outrigger_xds::{
    resource::bootstrap::Node,
    subscription::{Kind, Protocol},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};
use watched::Watched;

/// Types that one client may ask for on one stream.
pub const TYPES_MAX: usize = 32;
/// Names that one client may ask for, of one type; and those that it may say it has.
pub const NAMES_MAX: usize = 100_000;
/// Of a name, a version and a type that a client says.
pub const NAME_BYTES_MAX: usize = 4096;
/// What is gone stays so long for listeners and routes that are not taken. Who refuses them for good must not keep everything for ever.
pub const HOLD_MAX: Duration = Duration::from_secs(60);
/// Listeners and routes wait so long for the client to ask for the endpoints of clusters that it was just sent. Who never asks must not wait for ever.
pub const ENDPOINTS_MAX: Duration = Duration::from_secs(5);
/// A response is cut when it is longer, where the protocol lets it be: many clients take no more than 4 MiB.
pub const RESPONSE_BYTES_MAX: usize = 2 << 20;

/// What is gone is told in this order, when listeners and routes were taken: those that are there still may need it. Listeners are not here: what takes the address of one that is gone can only come together with that.
const REMOVALS: [Kind; 6] = [
    Kind::Runtimes,
    Kind::Routes,
    Kind::Clusters,
    Kind::Endpoints,
    Kind::Secrets,
    Kind::Extensions,
];

/// What a client says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// Who it is, on the first request of a stream.
    pub node: Option<Client>,
    /// Of which type.
    pub type_url: String,
    /// Which response it answers; empty is none.
    pub nonce: String,
    /// Why that was refused.
    pub error: Option<String>,
    /// What it asks for.
    pub ask: Ask,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// With the state of the world.
    State {
        /// Of the last response that it took.
        version: String,
        /// All that it wants.
        names: BTreeSet<String>,
    },
    /// With what changed.
    Delta {
        /// From now on.
        subscribe: BTreeSet<String>,
        /// No longer.
        unsubscribe: BTreeSet<String>,
        /// What it has, on the first request of a type.
        initial_versions: BTreeMap<String, String>,
    },
}

impl Ask {
    /// Whether it says more than anybody keeps.
    fn is_too_much(&self) -> bool {
        match self {
            Self::State { names, .. } => names.len() > NAMES_MAX,
            Self::Delta {
                subscribe,
                unsubscribe,
                initial_versions,
            } => [subscribe.len(), unsubscribe.len(), initial_versions.len()]
                .into_iter()
                .any(|count| count > NAMES_MAX),
        }
    }

    fn has_too_long(&self) -> bool {
        let is_long = |text: &String| text.len() > NAME_BYTES_MAX;
        match self {
            Self::State { version, names } => is_long(version) || names.iter().any(is_long),
            // What nobody subscribed to is not kept when it is unsubscribed.
            Self::Delta {
                subscribe,
                unsubscribe: _,
                initial_versions,
            } => {
                let mut versions = initial_versions.iter();
                subscribe.iter().any(is_long)
                    || versions.any(|(name, version)| is_long(name) || is_long(version))
            }
        }
    }

    /// What it has of endpoints that it asks for counts for nothing: after a reconnect, Envoy may have forgotten them, or wait for them all the
    /// same (envoy#22418).
    fn forgets_what_it_asks_for(&mut self) {
        if let Self::Delta {
            subscribe,
            initial_versions,
            ..
        } = self
        {
            initial_versions.retain(|name, _| !subscribe.contains(name));
        }
    }
}

impl Default for Ask {
    fn default() -> Self {
        Self::State {
            version: String::new(),
            names: BTreeSet::new(),
        }
    }
}

/// Who a client is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Client {
    /// As it says.
    pub node: Node,
    /// Which program it is.
    pub user_agent: String,
    /// And which version of it.
    pub user_agent_version: String,
}

/// What our own proxies call themselves.
const OURS: &str = "outrigger";
/// Begins what gRPC's own clients call themselves, in whatever language: "gRPC C-core …", "gRPC Go".
const GRPC: &str = "gRPC";

impl Client {
    /// Whether it knows our filters.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.user_agent == OURS
    }

    /// Whether it is a client of gRPC, which is configured without a proxy.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        self.user_agent.starts_with(GRPC)
    }
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Response {
    /// Of which type.
    pub type_url: String,
    /// Of all that the client has of it then.
    pub version: String,
    /// By which it is answered.
    pub nonce: String,
    /// What it brings.
    pub resources: Vec<Arc<Resource>>,
    /// What is gone, or does not exist; only where responses say what changed.
    pub removed: Vec<String>,
}

/// Why a stream is ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The first request must say who asks.
    #[error("the first request of a stream needs a node with an id")]
    Anonymous,
    /// A request that does not say of which type.
    #[error("a request needs a type_url")]
    NoType,
    /// [`TYPES_MAX`].
    #[error("more than {TYPES_MAX} types on one stream")]
    TooManyTypes,
    /// [`NAMES_MAX`].
    #[error("more than {NAMES_MAX} names of {0}")]
    TooManyNames(String),
    /// [`NAME_BYTES_MAX`].
    #[error("a name, a version or a type of more than {NAME_BYTES_MAX} bytes")]
    TooLong,
}

/// Why endpoints are owed.
#[derive(Debug)]
struct Owed {
    /// The cluster that was sent.
    cluster: String,
    /// When it was sent first. If it is sent again, the client is not waited for anew.
    since: SystemTime,
}

/// One client on one stream.
#[derive(Debug)]
pub struct Session {
    protocol: Protocol,
    client: Option<Client>,
    types: BTreeMap<String, Watched>,
    nonces: u64,
    /// Endpoints whose cluster was sent: they are sent again, or some clients wait for them for ever.
    owed: BTreeMap<String, Owed>,
    /// How long something is held back yet.
    held: Option<Duration>,
}

impl Session {
    /// A stream on which nothing was said.
    #[must_use]
    pub fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            client: None,
            types: BTreeMap::new(),
            nonces: 0,
            owed: BTreeMap::new(),
            held: None,
        }
    }

    /// Which variant is spoken.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Who it is; none before its first request.
    #[must_use]
    pub fn client(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    /// Whether it asked for resources of this type.
    #[must_use]
    pub fn has_asked(&self, kind: Kind) -> bool {
        self.types.contains_key(kind.type_url())
    }

    /// What is known of each type that it asks for.
    pub fn status(&self) -> impl Iterator<Item = TypeStatus> {
        let types = self.types.iter();
        types.map(|(type_url, watched)| watched.status(type_url))
    }

    /// Whether something that was sent was neither taken nor refused yet.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.types.values().any(Watched::is_pending)
    }

    /// What was sent of each type, with what became of it.
    pub fn sent(&self) -> impl Iterator<Item = (&str, &str, &Sent)> {
        let types = self.types.iter();
        types.flat_map(|(type_url, watched)| {
            let sent = watched.sent();
            sent.map(move |(name, sent)| (type_url.as_str(), name, sent))
        })
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// It is such that the stream must end.
    pub fn hear(&mut self, mut request: Request, now: SystemTime) -> Result<(), Refusal> {
        if self.client.is_none() {
            let known = request
                .node
                .take()
                .filter(|client| !client.node.id.is_empty());
            self.client = Some(known.ok_or(Refusal::Anonymous)?);
        }
        self.check(&request)?;
        let kind = Kind::of(&request.type_url);
        let is_ours = self.client.as_ref().is_some_and(Client::is_ours);
        if kind == Some(Kind::Endpoints) && !is_ours {
            request.ask.forgets_what_it_asks_for();
        }
        // Other types that may have something to say by now are awake: those with something that is gone do not rest.
        let watched = self.types.entry(request.type_url.clone()).or_default();
        watched.wake();
        if let Ok(nonce) = request.nonce.parse() {
            let version = match &request.ask {
                Ask::State { version, .. } => Some(version.as_str()),
                Ask::Delta { .. } => None,
            };
            watched.answered(self.protocol, (nonce, version), request.error, now);
        }
        match request.ask {
            Ask::State { version, names } => watched.want(kind, version, names),
            Ask::Delta {
                subscribe,
                unsubscribe,
                initial_versions,
            } => watched.change(kind, (subscribe, unsubscribe), initial_versions, now),
        }
        if watched.names_count() > NAMES_MAX {
            return Err(Refusal::TooManyNames(request.type_url));
        }
        Ok(())
    }

    /// Before anything of it is taken in.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let type_url = &request.type_url;
        if type_url.is_empty() {
            return Err(Refusal::NoType);
        }
        if type_url.len() > NAME_BYTES_MAX || request.ask.has_too_long() {
            return Err(Refusal::TooLong);
        }
        if !self.types.contains_key(type_url) && self.types.len() >= TYPES_MAX {
            return Err(Refusal::TooManyTypes);
        }
        if request.ask.is_too_much() {
            return Err(Refusal::TooManyNames(type_url.clone()));
        }
        Ok(())
    }

    /// After which time [`Self::next`] may have something to say though nothing happened: what was held back.
    #[must_use]
    pub fn held(&self) -> Option<Duration> {
        self.held
    }

    /// The next response, if there is something to say.
    pub fn next(&mut self, snapshot: &Snapshot, now: SystemTime) -> Option<Response> {
        let first = [Kind::Runtimes, Kind::Clusters, Kind::Endpoints];
        let mut first = first.into_iter();
        let news = first.find_map(|kind| self.news(kind, snapshot, now));
        if news.is_some() {
            return news;
        }
        self.held = self.awaits(snapshot, now);
        let is_held = self.held.is_some();
        let held = [Kind::Listeners, Kind::Routes].into_iter();
        let free = [Kind::Secrets, Kind::Extensions];
        let mut then = held.filter(|_| !is_held).chain(free);
        let news = then.find_map(|kind| self.news(kind, snapshot, now));
        let next = news.or_else(|| self.unknown(now));
        if next.is_some() || is_held {
            return next;
        }
        let next = self.removal(snapshot, now);
        if next.is_none() {
            self.rest(snapshot);
        }
        next
    }

    /// How long listeners and routes wait for endpoints of clusters that are new to the client: a request that they lead to such a cluster
    /// finds nobody there, and the client asks for its endpoints only when it has it.
    fn awaits(&self, snapshot: &Snapshot, now: SystemTime) -> Option<Duration> {
        if !self.has_asked(Kind::Listeners) && !self.has_asked(Kind::Routes) {
            return None;
        }
        let endpoints = snapshot.of(Kind::Endpoints);
        let awaited = self.owed.iter().filter(|(name, owed)| {
            endpoints.contains_key(*name) && self.may_ask(snapshot, &owed.cluster)
        });
        let newest = awaited.map(|(_, owed)| owed.since).max()?;
        // A clock that was set back says nothing.
        let age = now.duration_since(newest).unwrap_or_default();
        ENDPOINTS_MAX
            .checked_sub(age)
            .filter(|left| !left.is_zero())
    }

    /// Whether a client may have a cluster that it was sent. Of a response with a bad one, ours take the others.
    fn may_ask(&self, snapshot: &Snapshot, cluster: &str) -> bool {
        let watched = self.types.get(Kind::Clusters.type_url());
        let is_refused = watched.is_some_and(|watched| watched.is_refused(cluster));
        let is_ours = self.client.as_ref().is_some_and(Client::is_ours);
        snapshot.of(Kind::Clusters).contains_key(cluster) && (is_ours || !is_refused)
    }

    /// Until it says something, types of which nothing changes need not be looked at.
    fn rest(&mut self, snapshot: &Snapshot) {
        for kind in Kind::ALL {
            if let Some(watched) = self.types.get_mut(kind.type_url()) {
                watched.rest(snapshot.of(kind));
            }
        }
    }

    fn news(&mut self, kind: Kind, snapshot: &Snapshot, now: SystemTime) -> Option<Response> {
        let all = snapshot.of(kind);
        let watched = self.types.get_mut(kind.type_url());
        let watched = watched.filter(|watched| !watched.is_at_rest(all))?;
        let content = match self.protocol {
            Protocol::State if kind.is_whole() => watched.whole(kind, all, now)?,
            Protocol::State => {
                let owed = owed_of(kind, &self.owed);
                watched.part(all, owed)?
            }
            Protocol::Delta => {
                let owed = owed_of(kind, &self.owed);
                watched.delta(kind, all, owed)?
            }
        };
        for resource in &content.resources {
            match kind {
                // A cluster that the client took as it is waits for nothing; one that it refused before does, now that it may take it.
                Kind::Clusters if watched.is_content_with(resource) => {}
                Kind::Clusters => {
                    let owed = || Owed {
                        cluster: resource.name.clone(),
                        since: now,
                    };
                    if let Some(name) = &resource.endpoints {
                        self.owed.entry(name.clone()).or_insert_with(owed);
                    }
                }
                Kind::Endpoints => {
                    self.owed.remove(&resource.name);
                }
                Kind::Runtimes
                | Kind::Listeners
                | Kind::Routes
                | Kind::Secrets
                | Kind::Extensions => {}
            }
        }
        if let Some(endpoints) = self.types.get_mut(Kind::Endpoints.type_url()) {
            endpoints.wake();
        }
        Some(self.say(kind.type_url(), content, now))
    }

    /// Of types that we do not have, nothing exists.
    fn unknown(&mut self, now: SystemTime) -> Option<Response> {
        let mut types = self.types.iter_mut();
        let (type_url, names) = types.find_map(|(type_url, watched)| {
            let is_ours = Kind::of(type_url).is_some();
            let asked = (!is_ours).then(|| watched.take_asked())?;
            (!asked.is_empty()).then(|| (type_url.clone(), asked))
        })?;
        let content = watched::Content {
            removed: names.into_iter().collect(),
            ..watched::Content::default()
        };
        // The state of the world has no words for it.
        (self.protocol == Protocol::Delta).then(|| self.say(&type_url, content, now))
    }

    /// How long what is gone stays for listeners or routes that are not taken yet, or were refused.
    fn hold(&self, snapshot: &Snapshot, now: SystemTime) -> Option<Duration> {
        let kinds = [Kind::Listeners, Kind::Routes].into_iter();
        let open = kinds.filter_map(|kind| {
            let watched = self.types.get(kind.type_url())?;
            watched.open_since(snapshot.of(kind))
        });
        // A clock that was set back says nothing.
        let age = now.duration_since(open.max()?).unwrap_or_default();
        HOLD_MAX.checked_sub(age).filter(|left| !left.is_zero())
    }

    fn removal(&mut self, snapshot: &Snapshot, now: SystemTime) -> Option<Response> {
        self.held = self.hold(snapshot, now);
        if self.held.is_some() {
            return None;
        }
        let mut kinds = REMOVALS.into_iter();
        kinds.find_map(|kind| self.removals(kind, snapshot, now))
    }

    fn removals(&mut self, kind: Kind, snapshot: &Snapshot, now: SystemTime) -> Option<Response> {
        let all = snapshot.of(kind);
        let watched = self.types.get_mut(kind.type_url());
        let watched = watched.filter(|watched| !watched.is_at_rest(all))?;
        let content = match self.protocol {
            Protocol::State if kind.is_whole() => watched.without_the_gone(all)?,
            Protocol::State => {
                watched.forget_the_gone(all);
                return None;
            }
            Protocol::Delta => watched.gone(all)?,
        };
        Some(self.say(kind.type_url(), content, now))
    }

    /// Remembers that it is sent.
    fn say(&mut self, type_url: &str, content: watched::Content, now: SystemTime) -> Response {
        self.nonces += 1;
        let nonce = self.nonces;
        if let Some(watched) = self.types.get_mut(type_url) {
            let which = (self.protocol, Kind::of(type_url));
            watched.say(which, nonce, &content, now);
        }
        Response {
            type_url: type_url.to_owned(),
            version: content.version,
            nonce: nonce.to_string(),
            resources: content.resources,
            removed: content.removed,
        }
    }
}

fn owed_of(kind: Kind, owed: &BTreeMap<String, Owed>) -> &BTreeMap<String, Owed> {
    static NOBODY: BTreeMap<String, Owed> = BTreeMap::new();
    if kind == Kind::Endpoints {
        owed
    } else {
        &NOBODY
    }
}
