//! What is seen of the nodes that are connected: what they took and refused, and how their requests fare.

use super::{Nodes, Refusal};
use crate::{
    clients::Clients,
    lrs::Loads,
    session::{Client, State},
};
use std::{collections::BTreeSet, sync::Arc};

/// Who can be seen.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Those that are served.
    pub clients: Arc<Clients>,
    /// What load they report.
    pub loads: Arc<Loads>,
}

impl Observed {
    /// All that are connected, with what they told of their requests, and whether what is tried concerns them. Who tells of no requests has none.
    #[must_use]
    pub fn nodes(&self, is_concerned: impl Fn(&Client) -> bool) -> Nodes {
        let mut nodes = Nodes::new();
        for stream in self.clients.all() {
            let session = stream.session();
            let Some(client) = session.client() else {
                continue;
            };
            let is_pending = session.status().any(|it| it.state == State::Pending);
            let seen = nodes.entry(client.node.id.clone()).or_default();
            seen.is_pending |= is_pending;
            seen.is_concerned |= is_concerned(client);
        }
        for (node, requests) in self.loads.requests() {
            if let Some(seen) = nodes.get_mut(&node) {
                seen.requests = seen.requests.and(requests);
            }
        }
        nodes
    }

    /// What is refused now.
    #[must_use]
    pub fn refusals(&self) -> BTreeSet<Refusal> {
        let mut refusals = BTreeSet::new();
        for stream in self.clients.all() {
            let session = stream.session();
            let node = session.client().map(|client| client.node.id.clone());
            for status in session.status() {
                if let (Some(node), Some(nack)) = (&node, status.nacked) {
                    refusals.insert(Refusal {
                        node: node.clone(),
                        type_url: status.type_url,
                        error: nack.error,
                    });
                }
            }
        }
        refusals
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
