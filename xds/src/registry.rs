//! How engines become known to a control plane: what the proxy or the agent beside them says, as plain validated types.
//!
//! A [`Registration`] is all that a node has. It is said again and again; a control plane answers each time for how long it
//! believes it. Nothing here knows time: leases are the control plane's.

mod client;
pub mod holder;
mod known;

pub use client::{RegistryError, RegistryStream, open};

use crate::{
    problems::ConfigErrors,
    protobuf,
    report::{EngineState, Model},
    resource::endpoint::Address,
    wire::outrigger::{feed::v1 as feed, registry::v1 as wire},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// Engines of a node.
pub const ENGINES_MAX: usize = 64;
/// Models of an engine.
pub const MODELS_MAX: usize = 256;
/// Labels of a node.
pub const LABELS_MAX: usize = 64;
/// Bytes of a name, an address, a label or a reason.
pub const TEXT_BYTES_MAX: usize = 1024;

/// All that a node has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Registration {
    /// Who it is.
    pub node: Node,
    /// The engines beside it.
    pub engines: Vec<Engine>,
    /// It goes, and nothing else counts.
    pub leaving: bool,
    /// Who says it.
    pub registrant: Registrant,
}

impl Registration {
    /// Who holds the lease: of each kind there is one under an id.
    #[must_use]
    pub fn holder(&self) -> Holder {
        Holder {
            id: self.node.id.clone(),
            registrant: self.registrant,
        }
    }
}

/// Which program stands beside the engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Registrant {
    /// Requests to them go through it.
    #[default]
    Proxy,
    /// It only watches them.
    Agent,
}

impl Registrant {
    /// Lower-case name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Agent => "agent",
        }
    }
}

/// Who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// Of its node.
    pub id: String,
    /// Which of those that may be there under it.
    pub registrant: Registrant,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.registrant {
            Registrant::Proxy => write!(f, "node '{}'", self.id),
            Registrant::Agent => write!(f, "the agent of node '{}'", self.id),
        }
    }
}

/// Whom engines stand beside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// Unique in the fleet.
    pub id: String,
    /// The group that it belongs to.
    pub cluster: String,
    /// Where it runs; may be empty.
    pub region: String,
    /// The same, closer.
    pub zone: String,
    /// Where other proxies reach it; its feed is heard there.
    pub address: Address,
    /// To be chosen by.
    pub labels: BTreeMap<String, String>,
    /// Of the program; may be empty.
    pub version: String,
}

/// An engine beside a node. Of its state, models have names only, and what is not here is as by default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Engine {
    /// Its name in the fleet.
    pub id: String,
    /// As its node sees it.
    pub address: Address,
    /// What is known of it.
    pub state: EngineState,
}

/// A registration, and for how long it counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kept {
    /// What was said.
    pub registration: Registration,
    /// For so long from when it was heard.
    pub length: Duration,
}

/// Reads `HOST:PORT` of somebody to be reached.
#[must_use]
pub fn address(text: &str) -> Option<Address> {
    let (host, port) = text.rsplit_once(':')?;
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_plain = bare.is_some() || !host.contains([':', '[', ']']);
    let host = bare.unwrap_or(host);
    let is_host = !host.is_empty() && !host.contains(['/', '@', ' ']) && is_said(host);
    let port = port.parse().ok().filter(|port| *port > 0)?;
    (is_plain && is_host).then(|| Address {
        host: host.to_owned(),
        port,
    })
}

fn is_said(text: &str) -> bool {
    text.len() <= TEXT_BYTES_MAX && !text.contains(char::is_control)
}

/// Notes what no text may be.
fn text(place: &str, text: &str, problems: &mut ConfigErrors) {
    if !is_said(text) {
        let message = format!("longer than {TEXT_BYTES_MAX} bytes, or with control characters");
        problems.add(place, message);
    }
}

fn at_most(place: &str, count: usize, most: usize, problems: &mut ConfigErrors) {
    if count > most {
        problems.add(place, format!("{count}, at most {most}"));
    }
}

impl TryFrom<wire::Registration> for Registration {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Registration) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        at_most("engines", wire.engines.len(), ENGINES_MAX, &mut problems);
        let node = problems.required("node", wire.node);
        let engines: Vec<Engine> = problems.take_all("engines", wire.engines);
        let (mut ids, mut addresses) = (BTreeSet::new(), BTreeSet::new());
        for (index, engine) in engines.iter().enumerate() {
            let is_new = (
                ids.insert(&engine.id),
                addresses.insert(engine.address.to_string()),
            ) == (true, true);
            if !is_new {
                let message = format!("{} ({}) is there twice", engine.id, engine.address);
                problems.add(format!("engines[{index}]"), message);
            }
        }
        let registrant = match wire::Registrant::try_from(wire.registrant) {
            Ok(wire::Registrant::Proxy) => Registrant::Proxy,
            Ok(wire::Registrant::Agent) => Registrant::Agent,
            Err(_) => {
                problems.add("registrant", format!("{} is none", wire.registrant));
                Registrant::default()
            }
        };
        let plain = Self {
            node: node.unwrap_or_default(),
            engines,
            leaving: wire.leaving,
            registrant,
        };
        problems.finish(Some(plain))
    }
}

impl TryFrom<wire::Node> for Node {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Node) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        if wire.id.is_empty() {
            problems.add("id", "required");
        }
        at_most("labels", wire.labels.len(), LABELS_MAX, &mut problems);
        for (place, said) in [
            ("id", &wire.id),
            ("cluster", &wire.cluster),
            ("region", &wire.region),
            ("zone", &wire.zone),
            ("version", &wire.version),
        ] {
            text(place, said, &mut problems);
        }
        for said in wire.labels.iter().flat_map(|(key, value)| [key, value]) {
            text("labels", said, &mut problems);
        }
        let address = address(&wire.address);
        if address.is_none() {
            problems.add("address", "expected HOST:PORT");
        }
        let plain = Self {
            id: wire.id,
            cluster: wire.cluster,
            region: wire.region,
            zone: wire.zone,
            address: address.unwrap_or_default(),
            labels: wire.labels,
            version: wire.version,
        };
        problems.finish(Some(plain))
    }
}

impl TryFrom<wire::Engine> for Engine {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Engine) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        if wire.id.is_empty() {
            problems.add("id", "required");
        }
        at_most("models", wire.models.len(), MODELS_MAX, &mut problems);
        for (place, said) in [
            ("id", &wire.id),
            ("version", &wire.version),
            ("reason", &wire.reason),
        ] {
            text(place, said, &mut problems);
        }
        for model in &wire.models {
            text("models", model, &mut problems);
        }
        let address = address(&wire.address);
        if address.is_none() {
            problems.add("address", "expected HOST:PORT");
        }
        // The feed says the same of the same things.
        let state = EngineState::try_from(feed::EngineState {
            kind: wire.kind,
            version: wire.version,
            role: wire.role,
            health: wire.health,
            reason: wire.reason,
            kv_blocks: wire.kv_blocks,
            block_tokens: wire.block_tokens,
            ..feed::EngineState::default()
        });
        let state = state.map_err(|error| ConfigErrors::one("", error.to_string()));
        let mut state = problems.take("", state).unwrap_or_default();
        state.models = wire.models.into_iter().map(named).collect();
        let plain = Self {
            id: wire.id,
            address: address.unwrap_or_default(),
            state,
        };
        problems.finish(Some(plain))
    }
}

fn named(id: String) -> Model {
    Model {
        id,
        ..Model::default()
    }
}

impl From<&Registration> for wire::Registration {
    fn from(plain: &Registration) -> Self {
        Self {
            node: Some((&plain.node).into()),
            engines: plain.engines.iter().map(Into::into).collect(),
            leaving: plain.leaving,
            registrant: match plain.registrant {
                Registrant::Proxy => wire::Registrant::Proxy.into(),
                Registrant::Agent => wire::Registrant::Agent.into(),
            },
        }
    }
}

impl From<&Node> for wire::Node {
    fn from(plain: &Node) -> Self {
        Self {
            id: plain.id.clone(),
            cluster: plain.cluster.clone(),
            region: plain.region.clone(),
            zone: plain.zone.clone(),
            address: plain.address.to_string(),
            labels: plain.labels.clone(),
            version: plain.version.clone(),
        }
    }
}

impl From<&Engine> for wire::Engine {
    fn from(plain: &Engine) -> Self {
        let state = feed::EngineState::from(&plain.state);
        Self {
            id: plain.id.clone(),
            address: plain.address.to_string(),
            kind: state.kind,
            version: state.version,
            models: state.models.into_iter().map(|model| model.id).collect(),
            role: state.role,
            health: state.health,
            reason: state.reason,
            kv_blocks: state.kv_blocks,
            block_tokens: state.block_tokens,
        }
    }
}

impl TryFrom<wire::KeptLease> for Kept {
    type Error = ConfigErrors;

    fn try_from(wire: wire::KeptLease) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let registration = problems.required("registration", wire.registration);
        let length = protobuf::duration(wire.length.unwrap_or_default());
        let plain = Self {
            registration: registration.unwrap_or_default(),
            length: problems.take("length", length).unwrap_or_default(),
        };
        problems.finish(Some(plain))
    }
}

/// A lease as it is sent.
#[must_use]
pub fn lease(length: Duration) -> wire::Lease {
    wire::Lease {
        length: Some(protobuf::to_duration(length)),
    }
}

/// Leases as they are kept on disk, JSON.
#[must_use]
pub fn kept_to_json<'a>(leases: impl IntoIterator<Item = (&'a Registration, Duration)>) -> Value {
    let leases = leases
        .into_iter()
        .map(|(registration, length)| wire::KeptLease {
            registration: Some(registration.into()),
            length: Some(protobuf::to_duration(length)),
        });
    protobuf::to_json(&wire::Kept {
        leases: leases.collect(),
    })
}

struct AllKept(Vec<Kept>);

impl TryFrom<wire::Kept> for AllKept {
    type Error = ConfigErrors;

    fn try_from(wire: wire::Kept) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let leases = problems.take_all("leases", wire.leases);
        problems.finish(Some(Self(leases)))
    }
}

/// The leases of such a text.
///
/// # Errors
/// Everything that is wrong with it.
pub fn kept_from_json(value: &Value) -> Result<Vec<Kept>, ConfigErrors> {
    protobuf::plain::<wire::Kept, AllKept>(value).map(|all| all.0)
}

#[cfg(test)]
mod tests;
