//! What is seen of the nodes that are connected: what they took and refused, and how their requests fare.

use super::{Nodes, Told};
use crate::{clients::Clients, lrs::Loads, session::Client};
use std::sync::Arc;

/// Who can be seen.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Those that are served.
    pub clients: Arc<Clients>,
    /// What load they report.
    pub loads: Arc<Loads>,
}

impl Observed {
    /// All that are connected, whether this version, which is tried, concerns them, and whether they have answered all of it.
    #[must_use]
    pub fn nodes(&self, version: u64, is_concerned: impl Fn(&Client) -> bool) -> Nodes {
        let mut nodes = Nodes::new();
        for stream in self.clients.all() {
            let session = stream.session();
            let Some(client) = session.client() else {
                continue;
            };
            let is_pending = stream.knows() != version || session.is_pending();
            let seen = nodes.entry(client.node.id.clone()).or_default();
            seen.is_pending |= is_pending;
            seen.is_concerned |= is_concerned(client);
        }
        nodes
    }

    /// Requests that are over, as nodes reported them since they do.
    #[must_use]
    pub fn requests(&self) -> Told {
        self.loads.requests()
    }

    /// Everybody who is connected, once.
    #[must_use]
    pub fn clients(&self) -> Vec<Client> {
        let streams = self.clients.all();
        let clients = streams
            .iter()
            .filter_map(|stream| stream.session().client().cloned());
        let mut clients: Vec<Client> = clients.collect();
        clients.sort_by(|one, other| one.node.id.cmp(&other.node.id));
        clients.dedup_by(|one, other| one.node.id == other.node.id);
        clients
    }
}
