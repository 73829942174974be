//! A resource that a client was sent, and what became of it.

use crate::snapshot::Resource;
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

/// What became of something that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It was not sent.
    NotSent,
    /// It was not answered yet.
    Pending,
    /// It was taken.
    Acked,
    /// The response that brought it was refused. Who refuses each resource by itself may have taken it all the same.
    Nacked,
}

/// A resource that a client was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    pub(super) what: What,
    /// The response that brought it.
    pub(super) by: Arc<By>,
    /// Since when it is not taken, in this version.
    pub(super) since: SystemTime,
    /// What became of it.
    pub state: State,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    Sent(Arc<Resource>),
    /// Another stream brought it, in this version.
    Claimed(String),
}

/// A response, as far as it is remembered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct By {
    pub(super) nonce: u64,
    /// Of all of the type.
    pub(super) version: String,
    /// It brought nothing: nothing that is there can be what was refused of it.
    pub(super) is_bare: bool,
    pub(super) at: SystemTime,
}

impl Sent {
    /// Its version.
    #[must_use]
    pub fn version(&self) -> &str {
        match &self.what {
            What::Sent(resource) => &resource.version,
            What::Claimed(version) => version,
        }
    }

    /// Itself; none if another stream brought it.
    #[must_use]
    pub fn resource(&self) -> Option<&Arc<Resource>> {
        match &self.what {
            What::Sent(resource) => Some(resource),
            What::Claimed(_) => None,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Pending | State::Nacked)
    }

    /// Since when this, in this version, is not taken.
    pub(super) fn open_since(&self, resource: &Resource) -> Option<SystemTime> {
        let is_same = self.version() == resource.version;
        (is_same && self.is_open()).then_some(self.since)
    }

    /// Since when it is there.
    #[must_use]
    pub fn at(&self) -> SystemTime {
        self.by.at
    }
}

/// What a client says that it has.
pub(super) fn restored(
    versions: BTreeMap<String, String>,
    now: SystemTime,
) -> BTreeMap<String, Sent> {
    let by = Arc::new(By {
        nonce: 0,
        version: String::new(),
        is_bare: false,
        at: now,
    });
    let sent = versions.into_iter().map(|(name, version)| {
        let sent = Sent {
            what: What::Claimed(version),
            by: by.clone(),
            since: now,
            state: State::Acked,
        };
        (name, sent)
    });
    sent.collect()
}
