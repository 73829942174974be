//! From short resources to Envoy's: what a `Fleet`, the policies for it and the gateways in front of it become.
//!
//! A pure function: no file, no clock, no order of documents goes in. What it makes is what a stand-alone proxy makes of its
//! flags (`outrigger-proxy --engine … --peer …`), with endpoints and routes in resources of their own, which a control plane
//! sends over ADS. A test in `conformance` compares the two.

mod check;
mod clusters;
mod filters;
mod gateways;
pub mod input;
pub mod output;
mod rules;
mod tls;

use crate::short::{Document, Origin, Problems};
use outrigger_xds::{
    load::{
        discovery::{self, Response, Unread},
        written::{Meaning, Written},
    },
    problems::ConfigErrors,
    resource::{
        cluster::Cluster,
        config_source::{self, ConfigSource, INITIAL_FETCH_TIMEOUT_DEFAULT},
        endpoint::{Address, ClusterLoadAssignment, LbEndpoint, Locality},
        listener::Listener,
        route::RouteConfiguration,
    },
    wire::envoy::config::{
        cluster::v3::Cluster as WireCluster, endpoint::v3::ClusterLoadAssignment as WireAssignment,
        listener::v3::Listener as WireListener, route::v3::RouteConfiguration as WireRoutes,
    },
};
use prost::Message;
use prost_types::Any;
use rules::Whole;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};

/// A resource, for whom it is meant, and which document it was made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Which document.
    pub origin: Origin,
    /// The node id of the one proxy that it is for; it takes the place of the one of its type and name that is for all.
    pub node: Option<String>,
    /// What it is.
    pub v3: V3,
}

/// A resource of one of Envoy's types, in the order in which they have to be known.
#[derive(Debug, Clone, PartialEq)]
pub enum V3 {
    /// CDS.
    Cluster(Box<Cluster>),
    /// EDS.
    Endpoints(ClusterLoadAssignment),
    /// LDS.
    Listener(Box<Listener>),
    /// RDS.
    Routes(RouteConfiguration),
}

impl V3 {
    /// Full name of its message.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Cluster(_) => <Cluster as discovery::Resource>::TYPE,
            Self::Endpoints(_) => <ClusterLoadAssignment as discovery::Resource>::TYPE,
            Self::Listener(_) => <Listener as discovery::Resource>::TYPE,
            Self::Routes(_) => <RouteConfiguration as discovery::Resource>::TYPE,
        }
    }

    /// Its name: of endpoints, their cluster's.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Cluster(cluster) => &cluster.name,
            Self::Endpoints(assignment) => &assignment.cluster_name,
            Self::Listener(listener) => &listener.name,
            Self::Routes(table) => &table.name,
        }
    }

    /// As it is sent; equal resources are equal bytes.
    #[must_use]
    pub fn to_any(&self) -> Any {
        let value = match self {
            Self::Cluster(cluster) => WireCluster::from(&**cluster).encode_to_vec(),
            Self::Endpoints(assignment) => WireAssignment::from(assignment).encode_to_vec(),
            Self::Listener(listener) => WireListener::from(&**listener).encode_to_vec(),
            Self::Routes(table) => WireRoutes::from(table).encode_to_vec(),
        };
        Any {
            type_url: format!("type.googleapis.com/{}", self.type_name()),
            value,
        }
    }

    /// As if it had been written by hand.
    #[must_use]
    pub fn into_written(self) -> Written {
        Written {
            name: self.name().to_owned(),
            any: self.to_any(),
            meaning: match self {
                Self::Cluster(cluster) => Meaning::Cluster(cluster),
                Self::Endpoints(assignment) => Meaning::Endpoints(assignment),
                Self::Listener(listener) => Meaning::Listener(listener),
                Self::Routes(table) => Meaning::Routes(table),
            },
        }
    }

    /// As it is written in a file.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Cluster(cluster) => discovery::Resource::to_json(&**cluster),
            Self::Endpoints(assignment) => discovery::Resource::to_json(assignment),
            Self::Listener(listener) => discovery::Resource::to_json(&**listener),
            Self::Routes(table) => discovery::Resource::to_json(table),
        }
    }

    /// In which order types have to be known.
    fn rank(&self) -> usize {
        match self {
            Self::Cluster(_) => 0,
            Self::Endpoints(_) => 1,
            Self::Listener(_) => 2,
            Self::Routes(_) => 3,
        }
    }

    /// Whether a proxy would take it: what short resources leave to Envoy's rules, such as conditions for retries.
    fn judge(&self) -> Result<(), ConfigErrors> {
        let response = Response {
            resources: vec![Unread {
                name: String::new(),
                version: String::new(),
                any: Ok(self.to_json()),
            }],
            ..Response::default()
        };
        match self {
            Self::Cluster(_) => only::<Cluster>(response),
            Self::Endpoints(_) => only::<ClusterLoadAssignment>(response),
            Self::Listener(_) => only::<Listener>(response),
            Self::Routes(_) => only::<RouteConfiguration>(response),
        }
    }
}

fn only<R: discovery::Resource>(response: Response) -> Result<(), ConfigErrors> {
    let mut read = response.read::<R>().into_iter();
    read.try_for_each(|candidate| candidate.read.map(drop))
}

/// What documents become; `secrets` are the names of those that exist beside them.
///
/// What is meant for all proxies comes first within a type, then what is meant for one, each by name.
///
/// # Errors
/// Everything that is wrong with the documents as a whole.
pub fn translate(
    documents: &[Document],
    secrets: &BTreeSet<String>,
) -> Result<Vec<Resource>, Problems> {
    let resources = made(documents, secrets)?;
    let mut problems = Problems::default();
    let of_all = endpoints_of_all(&resources);
    for resource in &resources {
        let errors = match &resource.v3 {
            // Nearly all of them are those of all: reading these for each node would take longer by the square of the nodes.
            V3::Endpoints(own) if resource.node.is_some() => {
                let new = V3::Endpoints(less(own, &of_all)).judge();
                // Places are those in all of it.
                new.or_else(|_| resource.v3.judge())
            }
            v3 => v3.judge(),
        };
        tell(resource, errors, &mut problems);
    }
    problems.finish(resources)
}

/// By cluster and address: what is judged already.
type Judged<'a> = HashMap<(&'a str, &'a Address), (&'a LbEndpoint, Locality)>;

/// Endpoints that are meant for all nodes.
fn endpoints_of_all(resources: &[Resource]) -> Judged<'_> {
    let assignments = resources.iter().filter_map(|resource| match &resource.v3 {
        V3::Endpoints(assignment) if resource.node.is_none() => Some(assignment),
        _ => None,
    });
    let mut all = Judged::default();
    for assignment in assignments {
        for endpoint in &assignment.endpoints {
            let key = (assignment.cluster_name.as_str(), &endpoint.address);
            all.insert(key, (endpoint, assignment.locality(endpoint)));
        }
    }
    all
}

/// Of endpoints those that are not judged already.
fn less(own: &ClusterLoadAssignment, judged: &Judged<'_>) -> ClusterLoadAssignment {
    let is_new = |endpoint: &&LbEndpoint| {
        let found = judged.get(&(own.cluster_name.as_str(), &endpoint.address));
        found != Some(&(*endpoint, own.locality(endpoint)))
    };
    ClusterLoadAssignment {
        cluster_name: own.cluster_name.clone(),
        endpoints: own.endpoints.iter().filter(is_new).cloned().collect(),
        localities: own.localities.clone(),
        overprovisioning_factor: own.overprovisioning_factor,
    }
}

/// The same, before anybody has looked whether a proxy would take it.
fn made(documents: &[Document], secrets: &BTreeSet<String>) -> Result<Vec<Resource>, Problems> {
    let mut problems = Problems::default();
    let whole = Whole::new(documents, secrets);
    check::all(&whole, &mut problems);
    problems.finish(())?;
    let mut resources = Vec::new();
    for named in whole.fleets.values() {
        clusters::of_fleet(&whole, named, &mut resources);
    }
    for named in &whole.gateways {
        gateways::of_gateway(&whole, named, &mut resources);
    }
    resources.sort_by(|a, b| key(a).cmp(&key(b)));
    Ok(resources)
}

fn key(resource: &Resource) -> (usize, Option<&str>, &str) {
    let v3 = &resource.v3;
    (v3.rank(), resource.node.as_deref(), v3.name())
}

fn tell(resource: &Resource, judged: Result<(), ConfigErrors>, problems: &mut Problems) {
    let Err(errors) = judged else {
        return;
    };
    let v3 = &resource.v3;
    for problem in errors.problems() {
        let place = problem.place.trim_start_matches("resources[0]");
        let (place, message) = (place.trim_start_matches('.'), &problem.message);
        let message = format!(
            "becomes {} {}: {place}: {message}",
            v3.type_name(),
            v3.name()
        );
        problems.add(&resource.origin, "", message);
    }
}

/// What a proxy gets: what is meant for it, and what is meant for all and not replaced by that.
#[must_use]
pub fn for_node<'a>(resources: &'a [Resource], node: Option<&str>) -> Vec<&'a Resource> {
    let is_own = |resource: &&Resource| resource.node.is_some() && resource.node.as_deref() == node;
    let name = |resource: &'a Resource| (resource.v3.rank(), resource.v3.name());
    let own: BTreeSet<_> = resources.iter().filter(is_own).map(name).collect();
    let mut all: Vec<_> = resources
        .iter()
        .filter(|resource| {
            is_own(resource) || resource.node.is_none() && !own.contains(&name(resource))
        })
        .collect();
    all.sort_by_key(|resource| name(resource));
    all
}

/// From the control plane itself.
fn ads() -> ConfigSource {
    ConfigSource {
        origin: config_source::Origin::Ads,
        initial_fetch_timeout: INITIAL_FETCH_TIMEOUT_DEFAULT,
    }
}

#[cfg(test)]
mod tests;
