//! Do documents fit each other? What the schema cannot say: names that refer to something, and what must not be there twice.

use super::{
    clusters::{INBOUND, bound},
    gateways::listener_names,
    rules::{Named, Rules, Whole, concerns},
};
use crate::short::{
    Origin, Problems,
    fleet::{Fleet, Pool, Role, Tls},
    gateway::Gateway,
    policy::{Policy, RoutingPolicy, SplitMode, Topology},
};
use outrigger_xds::resource::endpoint::Address;
use std::collections::{BTreeMap, BTreeSet};

/// Everything that is wrong.
pub(super) fn all(whole: &Whole<'_>, problems: &mut Problems) {
    for (twin, first) in &whole.twins {
        let message = format!(
            "there is another {} {} in {}, {}",
            first.kind,
            first.name,
            first.file,
            place(first)
        );
        problems.add(twin, "metadata.name", message);
    }
    for fleet in whole.fleets.values() {
        pools(fleet, problems);
        nodes(fleet, problems);
        if let Some(tls) = &fleet.spec.peer_tls {
            peer_tls(whole, fleet, tls, problems);
        }
    }
    nodes_of_all(whole, problems);
    block_tokens(whole, problems);
    for policy in &whole.policies {
        alone(whole, policy, problems);
    }
    pairs(whole, problems);
    limits(whole, problems);
    for fleet in whole.fleets.values() {
        policies_of(whole, fleet, problems);
    }
    for gateway in &whole.gateways {
        routes(whole, gateway, problems);
        listeners(whole, gateway, problems);
    }
    addresses(whole, problems);
}

fn place(origin: &Origin) -> String {
    format!("document {}", origin.document)
}

/// Where something stands that was there before, or nothing if it is new.
fn twice<K: Ord>(seen: &mut BTreeSet<K>, key: K) -> bool {
    !seen.insert(key)
}

fn pools(named: &Named<'_, Fleet>, problems: &mut Problems) {
    let fleet = named.spec;
    let (mut names, mut engines) = (BTreeSet::new(), BTreeSet::new());
    for (index, pool) in fleet.pools.iter().enumerate() {
        let at = format!("spec.pools[{index}]");
        if twice(&mut names, &pool.name) {
            let message = format!("there is another pool {}", pool.name);
            problems.add(named.origin, format!("{at}.name"), message);
        }
        if pool.registered.is_some() == pool.is_written() {
            let message = "expected either engines or registered";
            problems.add(named.origin, &*at, message.into());
        }
        for (index, engine) in pool.engines.iter().enumerate() {
            let at = format!("{at}.engines[{index}]");
            if twice(&mut engines, (&engine.node, &engine.address)) {
                let message = format!("{} is there twice", engine.address);
                problems.add(named.origin, &*at, message);
            }
            if let Some(node) = engine
                .node
                .as_ref()
                .filter(|node| !fleet.nodes.contains_key(*node))
            {
                let message = format!("there is no '{node}' in spec.nodes");
                problems.add(named.origin, format!("{at}.node"), message);
            }
        }
    }
    let has = |role| fleet.pools.iter().any(|pool| pool.role == role);
    for (one, other) in [(Role::Prefill, Role::Decode), (Role::Decode, Role::Prefill)] {
        if has(one) && !has(other) {
            let message = format!(
                "there is a pool for {} and none for {}",
                one.as_str(),
                other.as_str()
            );
            problems.add(named.origin, "spec.pools", message);
        }
    }
}

/// A peer stands in a cluster once, with one weight and in one zone.
fn nodes(named: &Named<'_, Fleet>, problems: &mut Problems) {
    let fleet = named.spec;
    let mut addresses = BTreeSet::new();
    for (node, at) in &fleet.nodes {
        let place = format!("spec.nodes.{node}");
        if twice(&mut addresses, &at.address) {
            let message = format!("another node is at {}", at.address);
            problems.add(named.origin, &*place, message);
        }
        let of_node = |pool: &&Pool| {
            pool.engines
                .iter()
                .any(|engine| engine.node.as_ref() == Some(node))
        };
        let kinds: BTreeSet<_> = fleet
            .pools
            .iter()
            .filter(of_node)
            .map(|pool| (&pool.zone, pool.weight))
            .collect();
        match kinds.len() {
            0 => problems.add(named.origin, place, "no engine is beside it".into()),
            1 => {}
            _ => problems.add(
                named.origin,
                place,
                "its engines are in pools of different zones or weights".into(),
            ),
        }
    }
}

/// A proxy has one inbound listener and one cluster behind it.
fn nodes_of_all(whole: &Whole<'_>, problems: &mut Problems) {
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    for fleet in whole.fleets.values() {
        for node in fleet.spec.nodes.keys() {
            if let Some(owner) = owners.insert(node, fleet.name()) {
                let message = format!("Fleet {owner} has this node, and a node is in one fleet");
                problems.add(fleet.origin, format!("spec.nodes.{node}"), message);
            }
        }
    }
}

fn peer_tls(whole: &Whole<'_>, named: &Named<'_, Fleet>, tls: &Tls, problems: &mut Problems) {
    certificates(whole, named.origin, "spec.peerTls", tls, problems);
    if tls.ca.is_none() && tls.ca_secret.is_none() {
        problems.add(
            named.origin,
            "spec.peerTls",
            "required: ca or caSecret".into(),
        );
    }
    for (index, pool) in named.spec.pools.iter().enumerate() {
        for (number, engine) in pool.engines.iter().enumerate() {
            if !engine.is_loopback() {
                let place = format!("spec.pools[{index}].engines[{number}]");
                let message =
                    "engines are spoken to in plain text: with peerTls only at a loopback address"
                        .into();
                problems.add(named.origin, place, message);
            }
        }
    }
}

fn certificates(
    whole: &Whole<'_>,
    origin: &Origin,
    place: &str,
    tls: &Tls,
    problems: &mut Problems,
) {
    let files = (tls.certificate.is_some(), tls.key.is_some());
    match (files, tls.secret.is_some()) {
        ((true, true), false) | ((false, false), true) => {}
        (_, false) => problems.add(
            origin,
            place,
            "required: certificate and key, or secret".into(),
        ),
        (_, true) => problems.add(
            origin,
            place,
            "secret stands for certificate and key: not beside them".into(),
        ),
    }
    if tls.ca.is_some() && tls.ca_secret.is_some() {
        problems.add(
            origin,
            place,
            "caSecret stands for ca: not beside it".into(),
        );
    }
    for (field, name) in [("secret", &tls.secret), ("caSecret", &tls.ca_secret)] {
        let is_known = |name: &String| whole.secrets.contains(name);
        if let Some(name) = name.as_ref().filter(|name| !is_known(name)) {
            problems.add(
                origin,
                format!("{place}.{field}"),
                format!("there is no secret '{name}'"),
            );
        }
    }
}

/// It is a flag of the proxy, for whatever it indexes.
fn block_tokens(whole: &Whole<'_>, problems: &mut Problems) {
    let mut fleets = whole.fleets.values();
    let Some(first) = fleets.next() else { return };
    for fleet in fleets.filter(|fleet| fleet.spec.block_tokens != first.spec.block_tokens) {
        let message = format!(
            "Fleet {} has {}, and a proxy knows one size",
            first.name(),
            first.spec.block_tokens
        );
        problems.add(fleet.origin, "spec.blockTokens", message);
    }
}

/// What is wrong with a policy whatever the others say.
fn alone(whole: &Whole<'_>, named: &Named<'_, Policy>, problems: &mut Problems) {
    let policy = named.spec;
    let mut seen = BTreeSet::new();
    for (index, name) in policy.fleets.iter().enumerate() {
        let place = format!("spec.fleets[{index}]");
        if !whole.fleets.contains_key(name.as_str()) {
            problems.add(named.origin, &*place, format!("there is no Fleet {name}"));
        }
        if twice(&mut seen, name) {
            problems.add(named.origin, place, format!("{name} is there twice"));
        }
    }
    let mut seen = BTreeSet::new();
    for (index, tenant) in policy.tenants.iter().enumerate() {
        if twice(&mut seen, tenant) {
            problems.add(
                named.origin,
                format!("spec.tenants[{index}]"),
                format!("'{tenant}' is there twice"),
            );
        }
    }
    if !policy.tenants.is_empty() && policy.canary.is_some() {
        let message = "is asked of engines, whosever requests they serve: not with tenants".into();
        problems.add(named.origin, "spec.canary", message);
    }
}

/// Of two policies one has to be more specific, or they must not meet.
fn pairs(whole: &Whole<'_>, problems: &mut Problems) {
    for (index, one) in whole.policies.iter().enumerate() {
        for other in &whole.policies[..index] {
            let (mine, theirs) = (one.spec, other.spec);
            let shared = mine.fleets.iter().find(|name| theirs.fleets.contains(name));
            let all = mine.fleets.is_empty() && theirs.fleets.is_empty();
            if mine.tenants.is_empty() && theirs.tenants.is_empty() && (all || shared.is_some()) {
                let whom = shared.map_or("all fleets".to_owned(), |name| format!("Fleet {name}"));
                let message = format!(
                    "Policy {} is for everybody's requests to {whom}, too",
                    other.name()
                );
                problems.add(one.origin, "spec.fleets", message);
            }
            let tenant = mine
                .tenants
                .iter()
                .find(|name| theirs.tenants.contains(name));
            let meet = shared.is_some() || mine.fleets.is_empty() || theirs.fleets.is_empty();
            if let Some(tenant) = tenant.filter(|_| meet) {
                let message = format!("Policy {} is for tenant '{tenant}', too", other.name());
                problems.add(one.origin, "spec.tenants", message);
            }
        }
    }
}

/// A proxy keeps the buckets of a limit under its name.
fn limits(whole: &Whole<'_>, problems: &mut Problems) {
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    for policy in &whole.policies {
        let limits = policy.spec.rate_limits.iter().flat_map(|rule| &rule.limits);
        for (index, limit) in limits.enumerate() {
            let place = format!("spec.rateLimits.limits[{index}]");
            if let Some(owner) = names.insert(&limit.name, policy.name()) {
                let message = format!("Policy {owner} has a limit '{}'", limit.name);
                problems.add(policy.origin, format!("{place}.name"), message);
            }
            if limit.requests_per_minute == 0 && limit.tokens_per_minute == 0 {
                problems.add(policy.origin, place, "limits nothing".into());
            }
        }
    }
}

/// What policies ask of a fleet that it cannot do.
fn policies_of(whole: &Whole<'_>, fleet: &Named<'_, Fleet>, problems: &mut Problems) {
    let base = whole.base(fleet.name());
    let tenants = whole
        .policies
        .iter()
        .filter(|policy| !policy.spec.tenants.is_empty() && concerns(policy.spec, fleet.name()));
    for policy in tenants {
        let rules = base.under(policy.spec);
        let (own, all) = (rules.routing().policy, base.routing().policy);
        if rules.lb_policy() != base.lb_policy() {
            let message = format!(
                "{} where requests of others to Fleet {} go by {}: only kv and least_request go together",
                own.as_str(),
                fleet.name(),
                all.as_str()
            );
            problems.add(policy.origin, "spec.routing.policy", message);
        }
        split(fleet, policy.origin, &rules, problems);
    }
    // The policy that says it, or the fleet where none does.
    let said = whole
        .policies
        .iter()
        .filter(|policy| policy.spec.tenants.is_empty() && concerns(policy.spec, fleet.name()));
    let said = said.filter(|policy| policy.spec.split.is_some());
    let origin = said.max_by_key(|policy| !policy.spec.fleets.is_empty());
    split(
        fleet,
        origin.map_or(fleet.origin, |policy| policy.origin),
        &base,
        problems,
    );
}

fn split(fleet: &Named<'_, Fleet>, origin: &Origin, rules: &Rules<'_>, problems: &mut Problems) {
    let split = rules.split();
    let mut pools = fleet.spec.pools.iter();
    if split.mode == SplitMode::Always && !pools.any(|pool| pool.role == Role::Decode) {
        let message = format!(
            "always, and Fleet {} has no pools for prefill and decode",
            fleet.name()
        );
        problems.add(origin, "spec.split.mode", message);
    }
    if split.topology == Topology::Required && rules.routing().policy != RoutingPolicy::Kv {
        let message = format!(
            "required needs routing by kv, which requests to Fleet {} have not",
            fleet.name()
        );
        problems.add(origin, "spec.split.topology", message);
    }
}

fn routes(whole: &Whole<'_>, named: &Named<'_, Gateway>, problems: &mut Problems) {
    let (mut fleets, mut hosts) = (BTreeSet::new(), BTreeMap::new());
    for (index, route) in named.spec.routes.iter().enumerate() {
        let at = format!("spec.routes[{index}]");
        let place = format!("{at}.fleet");
        let Some(fleet) = whole.fleets.get(route.fleet.as_str()) else {
            problems.add(
                named.origin,
                place,
                format!("there is no Fleet {}", route.fleet),
            );
            continue;
        };
        if twice(&mut fleets, &route.fleet) {
            let message = format!("{} has another route: write its hosts in one", route.fleet);
            problems.add(named.origin, &*place, message);
        }
        for (number, host) in route.hosts.iter().enumerate() {
            if let Some(other) = hosts.insert(host, &route.fleet) {
                let message = format!("requests for '{host}' go to {other} already");
                problems.add(named.origin, format!("{at}.hosts[{number}]"), message);
            }
        }
        tenant_header(whole, named, (fleet, &place), problems);
    }
}

/// Whoever tells tenants apart needs to know how.
fn tenant_header(
    whole: &Whole<'_>,
    gateway: &Named<'_, Gateway>,
    (fleet, place): (&Named<'_, Fleet>, &str),
    problems: &mut Problems,
) {
    let header = gateway.spec.tenant_header.as_deref();
    for policy in whole
        .policies
        .iter()
        .filter(|policy| concerns(policy.spec, fleet.name()))
    {
        let limits = policy.spec.rate_limits.iter().flat_map(|rule| &rule.limits);
        let by_limit = limits
            .into_iter()
            .any(|limit| limit.per.iter().any(|part| part == "tenant"));
        let by_match = !policy.spec.tenants.is_empty();
        if header.is_none() && (by_limit || by_match) {
            let message = format!(
                "Policy {} tells tenants apart, and this gateway has no tenantHeader",
                policy.name()
            );
            problems.add(gateway.origin, place, message);
        }
        // Else keys of clients would stand in the configuration.
        if by_match && header.is_some_and(|header| header.eq_ignore_ascii_case("authorization")) {
            let message = format!(
                "authorization cannot be: Policy {} names tenants",
                policy.name()
            );
            problems.add(gateway.origin, "spec.tenantHeader", message);
        }
    }
}

fn listeners(whole: &Whole<'_>, named: &Named<'_, Gateway>, problems: &mut Problems) {
    if named.name() == INBOUND {
        let message = "inbound is the listener where peers arrive: call it otherwise".into();
        problems.add(named.origin, "metadata.name", message);
    }
    let several = named.spec.listeners.len() > 1;
    let mut names = BTreeSet::new();
    let all = named.spec.listeners.iter().zip(listener_names(named));
    for (index, (listener, name)) in all.enumerate() {
        let place = format!("spec.listeners[{index}]");
        if several && listener.name.is_none() {
            let message = "required where there are several listeners".into();
            problems.add(named.origin, format!("{place}.name"), message);
        } else if twice(&mut names, name) {
            problems.add(
                named.origin,
                format!("{place}.name"),
                "another listener has this name".into(),
            );
        }
        if let Some(tls) = &listener.tls {
            certificates(whole, named.origin, &format!("{place}.tls"), tls, problems);
        }
    }
}

/// A socket of a proxy; `None` are all proxies.
struct Socket<'a> {
    node: Option<&'a str>,
    address: Address,
    owner: &'a Origin,
}

/// Two sockets of one proxy must not be at one address.
fn addresses(whole: &Whole<'_>, problems: &mut Problems) {
    let mut sockets: Vec<Socket<'_>> = Vec::new();
    for fleet in whole.fleets.values() {
        let nodes = fleet.spec.nodes.iter();
        let made = nodes.filter(|(_, at)| !at.is_registered);
        sockets.extend(made.map(|(node, at)| Socket {
            node: Some(node),
            address: bound(at),
            owner: fleet.origin,
        }));
    }
    for gateway in &whole.gateways {
        for (index, listener) in gateway.spec.listeners.iter().enumerate() {
            let nodes = gateway.spec.nodes.iter().map(|node| Some(node.as_str()));
            let nodes: BTreeSet<_> = nodes.collect();
            let nodes = if nodes.is_empty() {
                [None].into()
            } else {
                nodes
            };
            let own: Vec<_> = nodes
                .into_iter()
                .map(|node| Socket {
                    node,
                    address: listener.address.0.clone(),
                    owner: gateway.origin,
                })
                .collect();
            let met = sockets
                .iter()
                .find(|socket| own.iter().any(|own| meet(own, socket)));
            if let Some(met) = met {
                let message = format!(
                    "{} {} is at {} already",
                    met.owner.kind, met.owner.name, met.address
                );
                problems.add(
                    gateway.origin,
                    format!("spec.listeners[{index}].address"),
                    message,
                );
            }
            sockets.extend(own);
        }
    }
}

fn meet(one: &Socket<'_>, other: &Socket<'_>) -> bool {
    let proxy = one.node.is_none() || other.node.is_none() || one.node == other.node;
    let any = |address: &Address| matches!(&*address.host, "0.0.0.0" | "::");
    let (one, other) = (&one.address, &other.address);
    let host = one.host == other.host || any(one) || any(other);
    proxy && host && one.port == other.port && one.port != 0
}
