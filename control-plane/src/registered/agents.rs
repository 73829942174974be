//! What agents say: of engines that a proxy registers too, it completes what that says; other engines are there for everybody.
//!
//! An engine is one endpoint, however many tell of it: the proxy beside it comes first, for requests go through that.

use super::{NOT_CHOSEN, NOT_LOOPBACK, Place, Placed, Places, chosen_by, pool_in_zone};
use crate::short::{
    fleet::{Engine, Fleet, Leased, Role},
    text::Address,
};
use outrigger_xds::{
    registry::{self, Registration},
    report::{EngineKind, EngineState, Health, Role as Told},
    resource::endpoint,
};
use std::collections::{BTreeMap, BTreeSet};

/// Why engines of agents are not taken, by agent and engine, as far as what is written says so.
pub(super) type Named = BTreeMap<(String, String), String>;

/// An engine as two may tell of it: the id of its node, the host of that, and where it is as that sees it.
struct Seen<'a> {
    node: &'a str,
    host: &'a str,
    at: &'a endpoint::Address,
}

impl<'a> Seen<'a> {
    fn of(said: &'a Registration, engine: &'a registry::Engine) -> Self {
        Self {
            node: &said.node.id,
            host: &said.node.address.host,
            at: &engine.address,
        }
    }

    /// Whether both are one engine. What is at a loopback address, or has a name, is only the same on the same machine.
    fn is(&self, other: &Self) -> bool {
        if self.at == other.at {
            let is_everywhere = !self.at.is_loopback() && !self.at.is_name();
            return is_everywhere || self.node == other.node || self.host == other.host;
        }
        let reached =
            |local: &Self, far: &Self| local.at.is_loopback() && far.at.host == local.host;
        self.at.port == other.at.port && (reached(self, other) || reached(other, self))
    }
}

/// Which engines of agents are written in fleets.
pub(super) fn written(fleets: &[(&str, &mut Fleet)], agents: &[&Registration]) -> Named {
    let mut named = Named::new();
    for (said, engine) in each(agents) {
        let seen = Seen::of(said, engine);
        let why = fleets.iter().find_map(|(name, fleet)| {
            if fleet.nodes.contains_key(&said.node.id) {
                return Some(format!("Fleet {name} has a node of this id"));
            }
            let mut engines = fleet.pools.iter().flat_map(|pool| &pool.engines);
            let is_same = |it: &Engine| {
                let node = it.node.as_deref().unwrap_or_default();
                let at = fleet.nodes.get(node).map(|node| &*node.address.0.host);
                seen.is(&Seen {
                    node,
                    host: at.unwrap_or_default(),
                    at: &it.address.0,
                })
            };
            let is_written = engines.any(is_same);
            is_written.then(|| format!("Fleet {name} names it"))
        });
        let key = (said.node.id.clone(), engine.id.clone());
        named.extend(why.map(|why| (key, why)));
    }
    named
}

fn each<'a>(
    all: &'a [&Registration],
) -> impl Iterator<Item = (&'a Registration, &'a registry::Engine)> {
    let engines = |said: &'a Registration| said.engines.iter().map(move |engine| (said, engine));
    all.iter().copied().flat_map(engines)
}

/// What a proxy says, and what agents know beside that.
pub(super) fn completed(said: &Registration, agents: &[&Registration]) -> Registration {
    let mut full = said.clone();
    for engine in &mut full.engines {
        for (agent, told) in each(agents) {
            if !Seen::of(said, engine).is(&Seen::of(agent, told)) {
                continue;
            }
            complete(&mut engine.state, &told.state);
            for (key, value) in &agent.node.labels {
                let labels = &mut full.node.labels;
                labels.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
    }
    full
}

fn complete(state: &mut EngineState, told: &EngineState) {
    if state.kind == EngineKind::Unknown {
        state.kind = told.kind;
    }
    if state.version.is_empty() {
        state.version.clone_from(&told.version);
    }
    if state.models.is_empty() {
        state.models.clone_from(&told.models);
    }
    if state.role == Told::Both {
        state.role = told.role;
    }
    if state.kv_blocks == 0 {
        state.kv_blocks = told.kv_blocks;
    }
    if state.block_tokens == 0 {
        state.block_tokens = told.block_tokens;
    }
    // It is to be left if either says so.
    if state.health == Health::Unknown || told.health == Health::Draining {
        state.health = told.health;
    }
}

/// Puts the engines of agents into fleets that no proxy has.
pub(super) fn place(
    fleets: &mut [(&str, &mut Fleet)],
    (agents, proxies): (&[&Registration], &[Registration]),
    named: &Named,
    places: &mut Places,
) {
    let (mut ids, mut taken) = (BTreeSet::new(), Vec::new());
    let proxied = proxies.iter().flat_map(|said| &said.engines);
    ids.extend(proxied.map(|engine| &*engine.id));
    for (said, engine) in each(agents) {
        let key = (said.node.id.clone(), engine.id.clone());
        let place = match (of_proxy(proxies, (said, engine), places), named.get(&key)) {
            (Some(place), _) => place,
            (None, Some(why)) => Err(why.clone()),
            (None, None) => {
                let place =
                    fits(said, engine, (&ids, &taken)).and_then(|()| alone(fleets, said, engine));
                if place.is_ok() {
                    ids.insert(&engine.id);
                    taken.push((said, engine));
                }
                place
            }
        };
        let own = places.entry(said.holder()).or_default();
        own.insert(engine.id.clone(), place);
    }
}

/// What became of an engine that a proxy registered, too.
fn of_proxy(
    proxies: &[Registration],
    (said, engine): (&Registration, &registry::Engine),
    places: &Places,
) -> Option<Place> {
    let seen = Seen::of(said, engine);
    let mut all = proxies
        .iter()
        .flat_map(|proxy| proxy.engines.iter().map(move |own| (proxy, own)));
    let is_same = |(proxy, own): &(&Registration, &registry::Engine)| {
        let is_named = proxy.node.id == said.node.id && own.id == engine.id;
        is_named || seen.is(&Seen::of(proxy, own))
    };
    let (proxy, own) = all.find(is_same)?;
    let place = places.get(&proxy.holder())?.get(&own.id)?.clone();
    Some(place.map(|place| Placed {
        through: Some(proxy.node.id.clone()),
        ..place
    }))
}

/// Whether an engine can stand beside all that are there.
fn fits(
    said: &Registration,
    engine: &registry::Engine,
    (ids, taken): (&BTreeSet<&str>, &[(&Registration, &registry::Engine)]),
) -> Result<(), String> {
    let prefix = format!("{}/", said.node.id);
    if !engine.id.starts_with(&prefix) {
        return Err(format!("its id does not begin with {prefix}"));
    }
    if ids.contains(&*engine.id) {
        return Err("another engine has its id".into());
    }
    // Where the feed is on one machine with everybody, engines may be, too.
    if engine.address.is_loopback() && !said.node.address.is_loopback() {
        return Err("it is at a loopback address, and no proxy beside it is registered".into());
    }
    let seen = Seen::of(said, engine);
    let mut others = taken.iter();
    match others
        .find(|(other, own)| other.node.id != said.node.id && seen.is(&Seen::of(other, own)))
    {
        Some((other, _)) => Err(format!("{} registered it", other.holder())),
        None => Ok(()),
    }
}

/// Puts an engine into the first pool of the first fleet that chooses it.
fn alone(
    fleets: &mut [(&str, &mut Fleet)],
    said: &Registration,
    engine: &registry::Engine,
) -> Place {
    let found = fleets.iter_mut().find_map(|(name, fleet)| {
        let index = chosen_by(fleet, said, engine)?;
        Some((*name, &mut **fleet, index))
    });
    let (name, fleet, index) = found.ok_or(NOT_CHOSEN)?;
    let written = Engine {
        address: Address(engine.address.clone()),
        node: None,
        bootstrap: None,
        lease: Some(Leased {
            id: engine.id.clone(),
            is_draining: engine.state.health == Health::Draining,
            alone: Some(match engine.state.role {
                Told::Both => Role::Both,
                Told::Prefill => Role::Prefill,
                Told::Decode => Role::Decode,
            }),
        }),
    };
    if fleet.peer_tls.is_some() && !written.is_loopback() {
        return Err(NOT_LOOPBACK.into());
    }
    let pool = &fleet.pools[index];
    let zone = if pool.zone.is_empty() {
        said.node.zone.clone()
    } else {
        pool.zone.clone()
    };
    let placed = Placed {
        pool: format!("{name}/{}", pool.name),
        through: None,
    };
    pool_in_zone(fleet, index, zone).engines.push(written);
    Ok(placed)
}
