//! A `Fleet` as clusters and their endpoints, and as the inbound listeners of its nodes.
//!
//! To its own node an engine is an engine; to all others the node is a peer that tells of it. An engine without a node is an
//! engine to everybody.

use super::{
    Resource, V3, ads,
    filters::{self, health_check},
    gateways::{connection_manager, listener, table},
    rules::{Named, Whole},
    tls,
};
use crate::short::fleet::{Engine, Fleet, Node, Pool, Role};
use outrigger_xds::resource::{
    cluster::{Cluster, Discovery},
    config_source::Eds,
    endpoint::{
        Address, ClusterLoadAssignment, HealthStatus, LbEndpoint, Locality, METADATA_NAMESPACE,
    },
    listener::{Listener, TrafficDirection},
    route::VirtualHost,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Name of the listener where peers arrive, and of its routes.
pub(super) const INBOUND: &str = "inbound";

/// Name of the cluster of the engines beside a node.
fn local(fleet: &str) -> String {
    format!("{fleet}/local")
}

/// All of a fleet.
pub(super) fn of_fleet(whole: &Whole<'_>, named: &Named<'_, Fleet>, resources: &mut Vec<Resource>) {
    let mut push = |node: Option<&str>, v3| {
        resources.push(Resource {
            origin: named.origin.clone(),
            node: node.map(str::to_owned),
            v3,
        });
    };
    let (name, fleet) = (named.name(), named.spec);
    push(None, V3::Cluster(Box::new(everybody(whole, named))));
    let behind = behind(fleet);
    push(None, V3::Endpoints(assignment(name, fleet, &behind, None)));
    for (node, at) in &fleet.nodes {
        let node = Some(node.as_str());
        push(node, V3::Endpoints(assignment(name, fleet, &behind, node)));
        if at.is_registered {
            continue;
        }
        let cluster = Cluster {
            health_check: whole.base(name).canary().map(health_check),
            ..cluster(whole, named, &local(name))
        };
        push(node, V3::Cluster(Box::new(cluster)));
        push(node, V3::Endpoints(beside(name, fleet, node)));
        push(node, V3::Listener(Box::new(inbound(fleet, at))));
        let host = VirtualHost {
            name: "all".into(),
            domains: vec!["*".into()],
            routes: vec![filters::plain_route(&local(name))],
            ..VirtualHost::default()
        };
        push(node, V3::Routes(table(INBOUND, vec![host])));
    }
}

fn cluster(whole: &Whole<'_>, fleet: &Named<'_, Fleet>, name: &str) -> Cluster {
    Cluster {
        name: name.to_owned(),
        connect_timeout: fleet.spec.connect_timeout.0,
        discovery: Discovery::Eds,
        eds: Some(Eds {
            source: ads(),
            service_name: String::new(),
        }),
        lb_policy: whole.base(fleet.name()).lb_policy(),
        ..Cluster::default()
    }
}

/// The cluster of all engines. Who watches an engine judges it: where every proxy does, every proxy asks.
fn everybody(whole: &Whole<'_>, fleet: &Named<'_, Fleet>) -> Cluster {
    let name = fleet.name();
    let is_watched_by_all = engines(fleet.spec).any(|(_, engine)| engine.node.is_none());
    let canary = whole.base(name).canary().filter(|_| is_watched_by_all);
    Cluster {
        health_check: canary.map(health_check),
        tls: fleet.spec.peer_tls.as_ref().map(tls::upstream),
        ..cluster(whole, fleet, name)
    }
}

fn engines(fleet: &Fleet) -> impl Iterator<Item = (&Pool, &Engine)> {
    let pools = fleet.pools.iter();
    pools.flat_map(|pool| pool.engines.iter().map(move |engine| (pool, engine)))
}

/// What stands behind a node's address.
struct Behind<'a> {
    /// Of its engines: those of one node are alike in weight and zone.
    pool: &'a Pool,
    health: HealthStatus,
}

/// That of all nodes. Made once for all views: each has an endpoint for every node.
fn behind(fleet: &Fleet) -> BTreeMap<&str, Behind<'_>> {
    let mut nodes: BTreeMap<&str, Behind<'_>> = BTreeMap::new();
    for (pool, engine) in engines(fleet) {
        let Some(node) = &engine.node else {
            continue;
        };
        let own = health(engine);
        let known = nodes.entry(node).or_insert(Behind { pool, health: own });
        // It is to be left when all its engines are.
        if own == HealthStatus::Healthy {
            known.health = own;
        }
    }
    nodes
}

/// All endpoints of a fleet as a node sees them, or one that is none of its nodes.
fn assignment(
    name: &str,
    fleet: &Fleet,
    behind: &BTreeMap<&str, Behind<'_>>,
    node: Option<&str>,
) -> ClusterLoadAssignment {
    let zones: BTreeSet<&str> = fleet.pools.iter().map(|pool| pool.zone.as_str()).collect();
    let place = |pool: &Pool| {
        zones
            .iter()
            .position(|zone| *zone == pool.zone)
            .unwrap_or(0)
    };
    let near = engines(fleet)
        .filter(|(_, engine)| engine.node.is_none() || engine.node.as_deref() == node)
        .map(|(pool, engine)| LbEndpoint {
            health_status: health(engine),
            ..endpoint(&engine.address.0, metadata(pool, engine), pool, place(pool))
        });
    let others = fleet
        .nodes
        .iter()
        .filter(|(other, _)| Some(other.as_str()) != node);
    let far = others.filter_map(|(other, at)| {
        let Behind { pool, health } = behind.get(other.as_str())?;
        let peer = json!({"duty": "peer"});
        Some(LbEndpoint {
            health_status: *health,
            ..endpoint(&at.address.0, peer, pool, place(pool))
        })
    });
    let localities = if zones.len() > 1 { zones.len() } else { 0 };
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: near.chain(far).collect(),
        localities: vec![Locality::default(); localities],
        ..ClusterLoadAssignment::default()
    }
}

/// The engines beside a node.
fn beside(name: &str, fleet: &Fleet, node: Option<&str>) -> ClusterLoadAssignment {
    let own = engines(fleet).filter(|(_, engine)| engine.node.as_deref() == node);
    let own =
        own.map(|(pool, engine)| endpoint(&engine.address.0, metadata(pool, engine), pool, 0));
    ClusterLoadAssignment {
        cluster_name: local(name),
        endpoints: own.collect(),
        ..ClusterLoadAssignment::default()
    }
}

/// Whether an engine is to be left. (How it is otherwise is told by feeds.)
fn health(engine: &Engine) -> HealthStatus {
    if engine.lease.as_ref().is_some_and(|it| it.is_draining) {
        HealthStatus::Draining
    } else {
        HealthStatus::Healthy
    }
}

fn metadata(pool: &Pool, engine: &Engine) -> Value {
    if let Some(lease) = &engine.lease {
        if let Some(role) = lease.alone {
            return json!({"duty": "engine", "role": role.as_str(), "id": lease.id});
        }
        // Its node knows the rest better.
        return json!({"duty": "engine", "role": Role::Both.as_str(), "id": lease.id});
    }
    let mut ours = json!({"duty": "engine", "role": pool.role.as_str()});
    if let Some(node) = &engine.node {
        ours["id"] = format!("{node}/{}", engine.address).into();
    }
    if let Some(bootstrap) = &engine.bootstrap {
        ours["bootstrap"] = bootstrap.to_string().into();
    }
    ours
}

fn endpoint(address: &Address, ours: Value, pool: &Pool, locality: usize) -> LbEndpoint {
    LbEndpoint {
        address: address.clone(),
        hostname: String::new(),
        health_status: HealthStatus::Healthy,
        load_balancing_weight: pool.weight,
        locality,
        metadata: BTreeMap::from([(METADATA_NAMESPACE.to_owned(), ours)]),
    }
}

/// What a node binds for its peers.
pub(super) fn bound(node: &Node) -> Address {
    let address = &node.address.0;
    match &node.listen {
        Some(listen) => listen.0.clone(),
        // A name is for those who call; which address it has here is not known.
        None if address.is_name() => Address {
            host: "0.0.0.0".into(),
            port: address.port,
        },
        None => address.clone(),
    }
}

/// Where peers of a node arrive: its chain never chooses.
fn inbound(fleet: &Fleet, node: &Node) -> Listener {
    let filters = vec![
        filters::ours("engine_api", json!({"fleet_answers": false})),
        filters::router(),
    ];
    let manager = connection_manager(INBOUND, INBOUND, filters);
    let tls = fleet.peer_tls.as_ref().map(tls::downstream);
    listener(
        INBOUND,
        bound(node),
        TrafficDirection::Inbound,
        (manager, tls),
    )
}
