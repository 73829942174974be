//! Do resources fit together: is each there once, and is there what they name?
//!
//! A route table that says `validate_clusters: false` may name clusters that a proxy has from its bootstrap; so may what takes its resources from files of the proxy.

use crate::source::{Placed, Problem};
use outrigger_xds::{
    load::written::Meaning,
    resource::{
        cluster::Cluster,
        config_source::{ConfigSource, Origin},
        extension::ExtensionConfigSource,
        filter_chain::Network,
        listener::Listener,
        mirror_policy::MirrorPolicy,
        route::{Action, RouteConfiguration},
        tls::CommonTls,
    },
    subscription::Kind,
};
use std::collections::{BTreeSet, HashMap};

/// What does not fit; `issued` are secrets that each node is issued, and that nobody else may have the names of.
#[must_use]
pub fn problems(resources: &[&Placed], issued: &BTreeSet<String>) -> Vec<Problem> {
    let mut there = HashMap::new();
    let mut problems = Vec::new();
    for &placed in resources {
        let key = (placed.written.meaning.kind(), placed.written.name.as_str());
        if let Some(first) = there.insert(key, placed) {
            let at = format!("{} {}", first.origin, first.place);
            let message = format!("is also in {}", at.trim_end());
            problems.push(problem(placed, &message));
        }
        if key.0 == Kind::Secrets && issued.contains(key.1) {
            problems.push(problem(placed, "is issued to each node by the CA"));
        }
    }
    for &placed in resources {
        for (kind, name) in named(&placed.written.meaning) {
            let is_issued = kind == Kind::Secrets && issued.contains(name);
            if !is_issued && !there.contains_key(&(kind, name)) {
                let message = format!("names the {} '{name}', which does not exist", noun(kind));
                problems.push(problem(placed, &message));
            }
        }
    }
    problems
}

/// The secrets and the configurations of filters that these name, whether they have a default or not.
pub fn kept_of<'a>(resources: impl Iterator<Item = &'a Placed>) -> BTreeSet<(Kind, &'a str)> {
    let mut kept = BTreeSet::new();
    for placed in resources {
        kept.extend(named(&placed.written.meaning));
        if let Meaning::Listener(listener) = &placed.written.meaning {
            kept.extend(discovered(listener).map(|(name, _)| (Kind::Extensions, name)));
        }
    }
    kept
}

/// The filters of a listener whose configurations come from the control plane.
fn discovered(listener: &Listener) -> impl Iterator<Item = (&str, &ExtensionConfigSource)> {
    let filters = listener.http_managers().flat_map(|http| &http.http_filters);
    filters.filter_map(|filter| {
        let from = filter.discovery.as_deref()?;
        is_ours(&from.source).then_some((filter.name.as_str(), from))
    })
}

fn problem(placed: &Placed, message: &str) -> Problem {
    let Placed {
        origin,
        place,
        written,
    } = placed;
    let separator = if place.is_empty() { "" } else { ": " };
    let noun = noun(written.meaning.kind());
    let name = &written.name;
    Problem {
        origin: origin.clone(),
        message: format!("{place}{separator}{noun} '{name}' {message}"),
    }
}

fn noun(kind: Kind) -> &'static str {
    match kind {
        Kind::Runtimes => "runtime",
        Kind::Clusters => "cluster",
        Kind::Endpoints => "cluster_load_assignment",
        Kind::Listeners => "listener",
        Kind::Routes => "route_configuration",
        Kind::Secrets => "secret",
        Kind::Extensions => "typed_extension_config",
    }
}

/// What a resource needs that must come from the control plane, too.
fn named(meaning: &Meaning) -> Vec<(Kind, &str)> {
    match meaning {
        Meaning::Cluster(cluster) => of_cluster(cluster),
        Meaning::Listener(listener) => of_listener(listener),
        Meaning::Routes(table) => of_routes(table),
        Meaning::Endpoints(_)
        | Meaning::Secret(_)
        | Meaning::Extension(_)
        | Meaning::Runtime(_) => Vec::new(),
    }
}

fn of_cluster(cluster: &Cluster) -> Vec<(Kind, &str)> {
    let mut named = Vec::new();
    if cluster.eds.as_ref().is_some_and(|eds| is_ours(&eds.source)) {
        named.push((Kind::Endpoints, cluster.eds_service_name()));
    }
    let matches = cluster.socket_matches.iter().map(|it| &it.tls);
    for tls in matches.chain([&cluster.tls]).flatten() {
        named.extend(secrets(&tls.common));
    }
    named
}

fn of_listener(listener: &Listener) -> Vec<(Kind, &str)> {
    // Without it a default counts, or nothing goes through.
    let needed = discovered(listener).filter(|(_, from)| from.default_config.is_none());
    let mut named: Vec<_> = needed.map(|(name, _)| (Kind::Extensions, name)).collect();
    for (_, chain) in listener.chains() {
        if let Some(tls) = &chain.tls {
            named.extend(secrets(&tls.common));
        }
        match &chain.network {
            Network::Tcp(tcp) => {
                let clusters = tcp.clusters.iter();
                named.extend(clusters.map(|(name, _)| (Kind::Clusters, name.as_str())));
            }
            Network::Http(manager) => match &manager.rds {
                Some(rds) if is_ours(&rds.source) => named.push((Kind::Routes, rds.name.as_str())),
                Some(_) => {}
                None => named.extend(of_routes(&manager.route_config)),
            },
        }
    }
    named
}

fn of_routes(table: &RouteConfiguration) -> Vec<(Kind, &str)> {
    if !table.validate_clusters {
        return Vec::new();
    }
    let mut clusters = mirrors(&table.mirrors);
    for host in &table.virtual_hosts {
        clusters.extend(mirrors(&host.mirrors));
        for route in &host.routes {
            if let Action::Route(action) = &route.action {
                clusters.extend(action.cluster.named().into_iter().map(|(_, name)| name));
                clusters.extend(mirrors(&action.mirrors));
            }
        }
    }
    clusters
        .into_iter()
        .map(|name| (Kind::Clusters, name))
        .collect()
}

fn mirrors(policies: &[MirrorPolicy]) -> Vec<&str> {
    let clusters = policies.iter().map(|policy| policy.cluster.as_str());
    clusters.filter(|name| !name.is_empty()).collect()
}

fn secrets(tls: &CommonTls) -> impl Iterator<Item = (Kind, &str)> {
    let ours = tls
        .secrets()
        .filter(|secret| secret.source.as_ref().is_some_and(is_ours));
    ours.map(|secret| (Kind::Secrets, secret.name.as_str()))
}

fn is_ours(source: &ConfigSource) -> bool {
    source.origin == Origin::Ads
}
