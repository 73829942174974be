//! Tells a control plane of the engines beside us, again and again, so that others find them: what we say counts for a lease.
//!
//! Only engines that are written (in flags, or in the bootstrap) are told: those that a control plane puts beside us it knows.

use super::{
    Shared,
    control_plane::{at, in_cluster},
};
use crate::{engines, feed::LocalFeed};
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::{
    ads::Server,
    registry::{
        Node, Registrant,
        holder::{self, Beside, Tells, is_for_others},
    },
    report::Role,
    resource::{bootstrap::Bootstrap, endpoint::Address, listener::TrafficDirection},
};
use std::{collections::BTreeMap, sync::Arc};

/// Where we register, and what of that configuration does not say.
#[derive(Debug, Clone)]
pub struct Registrar {
    /// The control plane.
    pub server: Registry,
    /// Where others reach us; none is where our inbound listener is.
    pub advertise: Option<Address>,
    /// To be chosen by.
    pub labels: BTreeMap<String, String>,
}

/// A control plane where engines are registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registry {
    /// In plain text.
    Address(Address),
    /// An endpoint of a cluster of the bootstrap, secured as that says.
    Cluster {
        /// Its name.
        name: String,
        /// `:authority`; empty is the cluster's name.
        authority: String,
    },
}

impl Registry {
    /// Where it is, or the first of it.
    fn address<'a>(&'a self, written: &'a Bootstrap) -> Result<&'a Address, String> {
        match self {
            Self::Address(address) => Ok(address),
            Self::Cluster { name, .. } => {
                let mut clusters = written.clusters.iter();
                let cluster = clusters.find(|cluster| cluster.name == *name);
                let endpoint = cluster.and_then(|it| it.load_assignment.endpoints.first());
                endpoint.map(|endpoint| &endpoint.address).ok_or_else(|| {
                    format!("registering: no endpoint is written of a cluster '{name}'")
                })
            }
        }
    }

    /// All of it, in order.
    fn servers(&self, shared: &Shared) -> Vec<Server> {
        match self {
            Self::Address(address) => vec![at(address)],
            Self::Cluster { name, authority } => in_cluster(shared, name, authority),
        }
    }
}

/// This proxy, as it tells of itself.
struct Told {
    shared: Arc<Shared>,
    registry: Registry,
}

impl Tells for Told {
    fn servers(&self) -> Vec<Server> {
        self.registry.servers(&self.shared)
    }

    fn engines(&self) -> Vec<Beside> {
        let (configured, _) = engines::configured(&self.shared.bootstrap.load().clusters);
        let each = configured.into_iter().map(|(id, written)| Beside {
            is_left: self.shared.local.is_left(&id),
            id,
            address: written.address,
            role: match written.role.as_str() {
                "prefill" => Some(Role::Prefill),
                "decode" => Some(Role::Decode),
                _ => None,
            },
        });
        each.collect()
    }
}

/// Begins to register; nothing happens if no engine is written. Dropping `done` says that it is over.
///
/// # Errors
/// Nobody could reach us at the address that would be told.
pub(super) fn start(
    shared: &Arc<Shared>,
    registrar: Option<Registrar>,
    done: std::sync::mpsc::Sender<()>,
) -> Result<(), String> {
    let Some(registrar) = registrar else {
        return Ok(());
    };
    if engines::configured(&shared.bootstrap.load().clusters)
        .0
        .is_empty()
    {
        tracing::info!("no engine stands beside this proxy: it does not register");
        return Ok(());
    }
    let node = node(shared, &registrar)?;
    let local: Arc<LocalFeed> = shared.local.clone();
    let drain = shared.drain.clone();
    let told = Told {
        shared: shared.clone(),
        registry: registrar.server,
    };
    let holding = holder::hold(
        Arc::new(told),
        (node, Registrant::Proxy),
        local,
        Box::pin(async move { drain.begun().await }),
    );
    shared.runtime.spawn(async move {
        holding.await;
        drop(done);
    });
    Ok(())
}

fn node(shared: &Shared, registrar: &Registrar) -> Result<Node, String> {
    let written = shared.bootstrap.load();
    registrar.server.address(&written)?;
    let address = match &registrar.advertise {
        Some(address) => address.clone(),
        None => inbound(shared, registrar.server.address(&written)?)?,
    };
    let [region, zone, _] = written.node.locality.clone();
    Ok(Node {
        id: written.node.id.clone(),
        cluster: written.node.cluster.clone(),
        region,
        zone,
        address,
        labels: registrar.labels.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

/// Where the first inbound listener really is.
fn inbound(shared: &Shared, server: &Address) -> Result<Address, String> {
    let written = shared.bootstrap.load();
    let mut listeners = written.listeners.iter();
    let is_inbound = |direction: TrafficDirection| direction == TrafficDirection::Inbound;
    let listener = listeners.find(|it| is_inbound(it.traffic_direction));
    let listener = listener.ok_or("registering: there is no inbound listener, give --advertise")?;
    let bound = shared.listeners.addresses().remove(&listener.name);
    match bound {
        Some(EndAddress::Ip(at)) if is_for_others(at.ip(), server) => Ok(Address {
            host: at.ip().to_string(),
            port: at.port(),
        }),
        _ => Err(format!(
            "registering: others cannot reach the listener '{}' at the address that it binds, give --advertise",
            listener.name
        )),
    }
}
