//! Engines that registered, put into the pools that choose them: afterwards a fleet is as if they had been written there.
//!
//! Whatever registers, it never makes a configuration bad: what does not fit is left out, and why is told at `/leases`.

mod agents;

use crate::short::{
    Document, Spec,
    fleet::{Engine, Fleet, Leased, Node, Pool, Role},
    text::Address,
};
use outrigger_xds::{
    registry::{self, Holder, Registrant, Registration},
    report::Health,
};
use std::collections::{BTreeMap, BTreeSet};

/// Where an engine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The fleet and the pool.
    pub pool: String,
    /// The node whose proxy requests go through, if it is not the one that registered it.
    pub through: Option<String>,
}

/// What became of an engine: where it is, or why it is in no pool.
pub type Place = Result<Placed, String>;

/// That of all engines, by who registered them and by engine.
pub type Places = BTreeMap<Holder, BTreeMap<String, Place>>;

/// Puts what registered into fleets. A node is in the first fleet by name that has a pool for one of its engines, and an engine in
/// the first pool there that chooses it. What agents say of engines that a proxy registers completes what that says; other engines
/// of theirs are there for everybody.
pub fn place(documents: &mut [Document], nodes: &[&Registration]) -> Places {
    let mut written = BTreeMap::new();
    let mut fleets: Vec<(&str, &mut Fleet)> = Vec::new();
    for document in documents {
        if let Spec::Fleet(fleet) = &mut document.spec {
            let names = fleet.nodes.keys().cloned();
            written.extend(names.map(|node| (node, document.origin.name.clone())));
            fleets.push((&document.origin.name, fleet));
        }
    }
    fleets.sort_by_key(|(name, _)| *name);
    let of = |registrant: Registrant| {
        let own = nodes.iter().filter(move |it| it.registrant == registrant);
        own.copied()
    };
    let watching: Vec<&Registration> = of(Registrant::Agent).collect();
    // Before fleets have what registered: only what is written counts.
    let named = agents::written(&fleets, &watching);
    let proxies: Vec<Registration> = of(Registrant::Proxy)
        .map(|said| agents::completed(said, &watching))
        .collect();
    let each = proxies.iter().map(|said| {
        let places = match written.get(&said.node.id) {
            Some(fleet) => all(said, &format!("Fleet {fleet} has a node of this id")),
            None => of_node(&mut fleets, said),
        };
        (said.holder(), places)
    });
    let mut places: Places = each.collect();
    agents::place(&mut fleets, (&watching, &proxies), &named, &mut places);
    places
}

/// The same of all engines.
fn all(said: &Registration, why: &str) -> BTreeMap<String, Place> {
    let ids = said.engines.iter().map(|engine| engine.id.clone());
    ids.map(|id| (id, Err(why.to_owned()))).collect()
}

fn of_node(fleets: &mut [(&str, &mut Fleet)], said: &Registration) -> BTreeMap<String, Place> {
    let wants = |fleet: &Fleet| {
        let mut engines = said.engines.iter();
        engines.any(|engine| chosen_by(fleet, said, engine).is_some())
    };
    let Some((name, fleet)) = fleets.iter_mut().find(|(_, fleet)| wants(fleet)) else {
        return all(said, NOT_CHOSEN);
    };
    let mut others = fleet.nodes.values();
    if others.any(|other| other.address.0 == said.node.address) {
        return all(
            said,
            &format!("another node of Fleet {name} is at this address"),
        );
    }
    let mut places = BTreeMap::new();
    // A peer stands in a cluster once, with one weight and in one zone.
    let mut kind = None;
    for engine in &said.engines {
        let place = into_pool(fleet, said, engine, &mut kind);
        let place = place.map(|pool| Placed {
            pool: format!("{name}/{pool}"),
            through: None,
        });
        places.insert(engine.id.clone(), place);
    }
    if kind.is_some() {
        let node = Node {
            address: Address(said.node.address.clone()),
            listen: None,
            is_registered: true,
        };
        fleet.nodes.insert(said.node.id.clone(), node);
    }
    places
}

const NOT_CHOSEN: &str = "no pool chooses it";
const NOT_LOOPBACK: &str = "with peerTls, engines have to be at loopback addresses";

/// Which pool of a fleet chooses an engine.
fn chosen_by(fleet: &Fleet, said: &Registration, engine: &registry::Engine) -> Option<usize> {
    let mut pools = fleet.pools.iter();
    pools.position(|pool| chooses(pool, said, engine))
}

fn chooses(pool: &Pool, said: &Registration, engine: &registry::Engine) -> bool {
    let Some(wanted) = &pool.registered else {
        return false;
    };
    let models: BTreeSet<&str> = engine.state.models.iter().map(|it| &*it.id).collect();
    let serves = |model: &String| models.contains(model.as_str());
    let node = &said.node;
    let has = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
    (wanted.models.is_empty() || wanted.models.iter().any(serves))
        && wanted.labels.iter().all(has)
        && wanted.cluster.as_ref().is_none_or(|it| *it == node.cluster)
        && (pool.role == Role::Both || pool.role.as_str() == engine.state.role.as_str())
}

/// Puts an engine where it belongs; `kind` is what the node is by the engines before.
fn into_pool(
    fleet: &mut Fleet,
    said: &Registration,
    engine: &registry::Engine,
    kind: &mut Option<(String, u32)>,
) -> Result<String, String> {
    let index = chosen_by(fleet, said, engine).ok_or(NOT_CHOSEN)?;
    let pool = &fleet.pools[index];
    let zone = if pool.zone.is_empty() {
        &said.node.zone
    } else {
        &pool.zone
    };
    let own = (zone.clone(), pool.weight);
    let name = pool.name.clone();
    let written = Engine {
        address: Address(engine.address.clone()),
        node: Some(said.node.id.clone()),
        bootstrap: None,
        lease: Some(Leased {
            id: engine.id.clone(),
            is_draining: engine.state.health == Health::Draining,
            alone: None,
        }),
    };
    if fleet.peer_tls.is_some() && !written.is_loopback() {
        return Err(NOT_LOOPBACK.into());
    }
    if kind.get_or_insert_with(|| own.clone()) != &own {
        let why = "engines of one node have to be in pools of one zone and weight";
        return Err(format!("{why}: {name} is another"));
    }
    pool_in_zone(fleet, index, own.0).engines.push(written);
    Ok(name)
}

/// The pool, or the part of it that is in this zone.
fn pool_in_zone(fleet: &mut Fleet, index: usize, zone: String) -> &mut Pool {
    if fleet.pools[index].zone == zone {
        return &mut fleet.pools[index];
    }
    // No pool that is written has such a name.
    let name = format!("{}/{zone}", fleet.pools[index].name);
    let known = fleet.pools.iter().position(|pool| pool.name == name);
    let part = known.unwrap_or(fleet.pools.len());
    if known.is_none() {
        let whole = fleet.pools[index].clone();
        fleet.pools.push(Pool {
            name,
            zone,
            engines: Vec::new(),
            ..whole
        });
    }
    &mut fleet.pools[part]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        short,
        translate::{V3, for_node, translate},
    };
    use outrigger_xds::{
        load::Syntax,
        registry::address,
        report::{EngineState, Model, Role as Told},
        resource::endpoint::HealthStatus,
    };

    const FLEET: &str = "apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec:
  pools:
  - {name: small, weight: 2, registered: {models: [small], labels: {gpu: l4}}}
  - {name: prefill, role: prefill, zone: z9, registered: {cluster: big}}
  - {name: decode, role: decode, zone: z9, registered: {cluster: big}}
  - {name: fixed, engines: [{node: f, address: '127.0.0.1:8000'}]}
  - {name: rest, registered: {}}
  nodes: {f: 'f:8081'}
---
apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: later}
spec: {pools: [{name: all, registered: {}}]}
";

    fn node(id: &str, engines: &[(&str, Told)]) -> Registration {
        let engines = engines.iter().enumerate().map(|(index, (model, role))| {
            let at = format!("127.0.0.1:{}", 8000 + index);
            registry::Engine {
                id: format!("{id}/{at}"),
                address: address(&at).unwrap(),
                state: EngineState {
                    models: vec![Model {
                        id: (*model).to_owned(),
                        ..Model::default()
                    }],
                    role: *role,
                    ..EngineState::default()
                },
            }
        });
        Registration {
            node: registry::Node {
                id: id.into(),
                address: address(&format!("{id}:8081")).unwrap(),
                ..registry::Node::default()
            },
            engines: engines.collect(),
            ..Registration::default()
        }
    }

    /// The same as an agent says it, from another port.
    fn watched(mut said: Registration) -> Registration {
        said.registrant = Registrant::Agent;
        said.node.address.port = 15021;
        said
    }

    /// Where engines are, and what becomes of the whole.
    fn placed(
        text: &str,
        nodes: &[&Registration],
    ) -> (Vec<String>, Vec<crate::translate::Resource>) {
        let mut documents = short::read("f", text, Syntax::Yaml).unwrap();
        let places = place(&mut documents, nodes);
        let places = places.values().flat_map(BTreeMap::values);
        let places = places.map(|place| match place {
            Ok(place) => match &place.through {
                Some(node) => format!("{} through {node}", place.pool),
                None => place.pool.clone(),
            },
            Err(why) => why.clone(),
        });
        let made = translate(&documents, &BTreeSet::new());
        (places.collect(), made.unwrap_or_else(|it| panic!("{it}")))
    }

    fn endpoints(
        made: &[crate::translate::Resource],
        node: &str,
    ) -> Vec<(String, HealthStatus, u32)> {
        let all = for_node(made, Some(node)).into_iter();
        let mut found = all.filter_map(|resource| match &resource.v3 {
            V3::Endpoints(it) if it.cluster_name == "chat" => Some(it.endpoints.iter()),
            _ => None,
        });
        let found = found.next().unwrap();
        let shown = |it: &outrigger_xds::resource::endpoint::LbEndpoint| {
            let (at, weight) = (it.address.to_string(), it.load_balancing_weight);
            (at, it.health_status, weight)
        };
        found.map(shown).collect()
    }

    #[test]
    fn engines_are_in_the_first_pool_that_chooses_them() {
        let mut small = node("a", &[("small", Told::Both)]);
        small.node.labels.insert("gpu".into(), "l4".into());
        let unlabelled = node("b", &[("small", Told::Both)]);
        let mut decode = node("c", &[("big", Told::Decode)]);
        decode.node.cluster = "big".into();
        let mut mixed = node("d", &[("small", Told::Both), ("other", Told::Both)]);
        mixed.node.labels.insert("gpu".into(), "l4".into());
        let (places, made) = placed(FLEET, &[&small, &unlabelled, &decode, &mixed]);
        let another =
            "engines of one node have to be in pools of one zone and weight: rest is another";
        let expected = [
            "chat/small",
            "chat/rest",
            "chat/decode",
            "chat/small",
            another,
        ];
        assert_eq!(places, expected);
        let expected: Vec<_> = [
            ("127.0.0.1:8000", 2),
            ("b:8081", 1),
            ("c:8081", 1),
            ("d:8081", 2),
            ("f:8081", 1),
        ]
        .map(|(at, weight)| (at.to_owned(), HealthStatus::Healthy, weight))
        .into();
        let mut found = endpoints(&made, "a");
        found.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(found, expected);
        // Its node has an inbound listener and a cluster behind it by itself.
        let names: Vec<&str> = for_node(&made, Some("a"))
            .iter()
            .map(|it| it.v3.name())
            .collect();
        assert!(
            !names.contains(&"inbound") && !names.contains(&"chat/local"),
            "{names:?}"
        );
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_makes_nothing_bad() {
        let twin = node("f", &[("m", Told::Both)]);
        let mut same = node("g", &[("m", Told::Both)]);
        same.node.address = address("f:8081").unwrap();
        let nothing = node("h", &[]);
        let (places, made) = placed(FLEET, &[&twin, &same, &nothing]);
        let expected = [
            "Fleet chat has a node of this id",
            "another node of Fleet chat is at this address",
        ];
        assert_eq!(places, expected);
        assert_eq!(endpoints(&made, "").len(), 1);
        // Its own listener may be at the port of a gateway elsewhere.
        let gateway = "---\napiVersion: outrigger.dev/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {listeners: [{address: ':8081'}], routes: [{fleet: chat}]}\n";
        let text = FLEET.replace("f:8081", "f:8082") + gateway;
        let mut fits = node("i", &[("m", Told::Both)]);
        fits.node.address = address("10.0.0.1:8081").unwrap();
        assert_eq!(placed(&text, &[&fits]).0, ["chat/rest"]);
        let tls = FLEET.replace(
            "  nodes: {f",
            "  peerTls: {certificate: c, key: k, ca: a}\n  nodes: {f",
        );
        fits.engines[0].address = address("10.0.0.1:8000").unwrap();
        let why = "with peerTls, engines have to be at loopback addresses";
        assert_eq!(placed(&tls, &[&fits]).0, [why]);
    }

    #[test]
    fn what_an_agent_watches_is_there_for_everybody_unless_a_proxy_has_it() {
        let mut agent = watched(node("a", &[("m", Told::Both), ("m", Told::Prefill)]));
        agent.engines[0].address = address("10.0.0.1:8000").unwrap();
        let local = "it is at a loopback address, and no proxy beside it is registered";
        let (places, made) = placed(FLEET, &[&agent]);
        assert_eq!(places, ["chat/rest", local]);
        for node in ["", "a", "f"] {
            let found = endpoints(&made, node);
            assert!(found.iter().any(|it| it.0 == "10.0.0.1:8000"), "{found:?}");
        }
        let metadata = made.iter().find_map(|resource| match &resource.v3 {
            V3::Endpoints(it) if it.cluster_name == "chat" => {
                let mut all = it.endpoints.iter();
                let own = all.find(|it| it.address.host == "10.0.0.1")?;
                Some(own.metadata.values().next()?.clone())
            }
            _ => None,
        });
        let expected =
            serde_json::json!({"duty": "engine", "role": "both", "id": "a/127.0.0.1:8000"});
        assert_eq!(metadata, Some(expected));
        // Its proxy comes: requests go through that, and only once.
        let proxy = node("a", &[("m", Told::Both), ("m", Told::Both)]);
        let (places, made) = placed(FLEET, &[&proxy, &agent]);
        let through = "chat/rest through a";
        assert_eq!(places, ["chat/rest", "chat/rest", through, through]);
        let found: Vec<String> = endpoints(&made, "").into_iter().map(|it| it.0).collect();
        assert_eq!(found, ["a:8081", "f:8081"]);
        // What no pool chooses of the proxy's is in none by its agent either.
        let none = FLEET.replace("registered: {}", "registered: {models: [z]}");
        let places = placed(&none, &[&proxy, &agent]).0;
        assert_eq!(places, [NOT_CHOSEN; 4]);
    }

    #[test]
    fn what_two_say_of_engines_makes_nothing_bad() {
        let at = |mut said: Registration, at: &str| {
            said.engines[0].address = address(at).unwrap();
            said
        };
        let one = at(watched(node("a", &[("m", Told::Both)])), "10.0.0.1:8000");
        let two = at(watched(node("b", &[("m", Told::Both)])), "10.0.0.1:8000");
        let mut third = at(watched(node("c", &[("m", Told::Both)])), "10.0.0.3:8000");
        third.engines[0].id = one.engines[0].id.clone();
        let named = at(watched(node("f", &[("m", Told::Both)])), "10.0.0.4:8000");
        let (places, made) = placed(FLEET, &[&one, &two, &third, &named]);
        let expected = [
            "chat/rest",
            "the agent of node 'a' registered it",
            "its id does not begin with c/",
            "Fleet chat has a node of this id",
        ];
        assert_eq!(places, expected);
        assert_eq!(endpoints(&made, "").len(), 2);
        let tls = FLEET.replace(
            "  nodes: {f",
            "  peerTls: {certificate: c, key: k, ca: a}\n  nodes: {f",
        );
        assert_eq!(placed(&tls, &[&one]).0, [NOT_LOOPBACK]);
        // An engine that is written, by its address or at a node of the machine.
        for written in ["10.0.0.1:8000", "{node: f, address: '127.0.0.1:8000'}"] {
            let text = FLEET
                .replace("{node: f, address: '127.0.0.1:8000'}", written)
                .replace("f:8081", "10.0.0.1:8081");
            let text = match written.starts_with('{') {
                true => text,
                false => text.replace("nodes: {f: '10.0.0.1:8081'}", "nodes: {}"),
            };
            assert_eq!(
                placed(&text, &[&one]).0,
                ["Fleet chat names it"],
                "{written}"
            );
        }
    }

    #[test]
    fn what_an_agent_knows_completes_what_its_proxy_says() {
        let mut proxy = node("a", &[("m", Told::Both)]);
        proxy.node.address = address("10.0.0.1:8081").unwrap();
        proxy.engines[0].state = EngineState::default();
        let mut agent = watched(node("h", &[("small", Told::Both)]));
        agent.node.address.host = "10.0.0.1".into();
        agent.node.labels.insert("gpu".into(), "l4".into());
        agent.engines[0].address = address("10.0.0.1:8000").unwrap();
        agent.engines[0].state.kv_blocks = 7;
        let full = agents::completed(&proxy, &[&agent]);
        assert_eq!(full.engines[0].state.kv_blocks, 7);
        let places = placed(FLEET, &[&proxy, &agent]).0;
        assert_eq!(places, ["chat/small", "chat/small through a"]);
        // Either may say that it is to be left.
        agent.engines[0].state.health = Health::Draining;
        let made = placed(FLEET, &[&proxy, &agent]).1;
        let found = endpoints(&made, "");
        let own = found.iter().find(|it| it.0 == "10.0.0.1:8081").unwrap();
        assert_eq!(own.1, HealthStatus::Draining);
    }

    #[test]
    fn a_pool_is_written_or_chosen_and_not_both() {
        let both = "{name: a, registered: {}, engines: ['e:1']}";
        for pool in ["{name: a}", both] {
            let text = format!(
                "apiVersion: outrigger.dev/v1\nkind: Fleet\nmetadata: {{name: f}}\nspec: {{pools: [{pool}]}}\n"
            );
            let documents = short::read("f", &text, Syntax::Yaml).unwrap();
            let problems = translate(&documents, &BTreeSet::new())
                .unwrap_err()
                .to_string();
            let expected = "spec.pools[0]: expected either engines or registered";
            assert!(problems.contains(expected), "{pool}: {problems}");
        }
    }

    #[test]
    fn zones_are_the_nodes_where_a_pool_has_none_and_what_drains_is_left() {
        let mut one = node("a", &[("m", Told::Both), ("m", Told::Both)]);
        one.node.zone = "z1".into();
        one.engines[0].state.health = Health::Draining;
        let (places, made) = placed(FLEET, &[&one]);
        assert_eq!(places, ["chat/rest", "chat/rest"]);
        let of = |made: &[crate::translate::Resource], node: &str, at: &str| {
            let found = endpoints(made, node).into_iter();
            let mut found = found.filter(|it| it.0 == at);
            found.next().unwrap().1
        };
        assert_eq!(of(&made, "a", "127.0.0.1:8000"), HealthStatus::Draining);
        assert_eq!(of(&made, "a", "127.0.0.1:8001"), HealthStatus::Healthy);
        assert_eq!(
            of(&made, "b", "a:8081"),
            HealthStatus::Healthy,
            "one is left"
        );
        one.engines[1].state.health = Health::Draining;
        let made = placed(FLEET, &[&one]).1;
        assert_eq!(of(&made, "b", "a:8081"), HealthStatus::Draining);
    }
}
