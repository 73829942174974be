//! A simple control plane of both protocols, and a client over [`Subscriptions`], for property tests: whatever happens, the
//! client ends with what the server has.

use super::{Answer, Ask, Kind, Protocol, RateLimit, Request, Sent, Subscriptions, WILDCARD};
use crate::load::binary::Packed;
use prost_types::Any;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

type Versions = BTreeMap<String, u32>;

const KINDS: [Kind; 3] = [Kind::Clusters, Kind::Endpoints, Kind::Routes];
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// A version that the client does not accept.
fn is_bad(version: u32) -> bool {
    version % 5 == 3
}

fn body() -> Option<Packed> {
    Some(Packed(Any::default()))
}

/// What a server knows of a stream, of one type.
#[derive(Default)]
struct Watched {
    begun: bool,
    names: BTreeSet<String>,
    sent: Versions,
    nonces: BTreeSet<String>,
    /// With the state of the world: of the last answer.
    version: String,
}

struct Server {
    protocol: Protocol,
    world: BTreeMap<Kind, Versions>,
    streams: BTreeMap<Kind, Watched>,
    introduced: bool,
    answers: VecDeque<Answer>,
    nonce: u32,
}

impl Server {
    fn wanted(&self, kind: Kind) -> Versions {
        let names = &self.streams[&kind].names;
        let all = names.contains(WILDCARD);
        let world = self.world.get(&kind).into_iter().flatten();
        let wanted = world.filter(|(name, _)| all || names.contains(*name));
        wanted
            .map(|(name, version)| (name.clone(), *version))
            .collect()
    }

    fn answer(&mut self, kind: Kind, resources: Versions, removed: Vec<String>) {
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        let version = format!("{:?}", self.world.get(&kind));
        let watched = self.streams.entry(kind).or_default();
        watched.nonces.insert(nonce.clone());
        watched.version.clone_from(&version);
        let wrapped = |(name, version): (String, u32)| Sent {
            name,
            version: version.to_string(),
            ttl: None,
            error: None,
            body: body(),
        };
        self.answers.push_back(Answer {
            type_url: kind.type_url().to_owned(),
            version,
            nonce,
            resources: resources.into_iter().map(wrapped).collect(),
            removed,
            errors: Vec::new(),
        });
    }

    fn hear(&mut self, request: Request) {
        assert_eq!(request.first, !self.introduced, "the first says who");
        self.introduced = true;
        let kind = request.kind;
        let watched = self.streams.entry(kind).or_default();
        let known = request.nonce.is_empty() || watched.nonces.contains(&request.nonce);
        assert!(known, "{request:?} names an answer of another stream");
        let first = !std::mem::replace(&mut watched.begun, true);
        match request.ask {
            Ask::State { version, names } => {
                let mut names: BTreeSet<String> = names.into_iter().collect();
                if names.is_empty() && kind.is_whole() {
                    names.insert(WILDCARD.to_owned());
                }
                let other = names != watched.names;
                assert!(
                    !other || request.error.is_none(),
                    "a change rides on an answer"
                );
                watched.names = names;
                let current = format!("{:?}", self.world.get(&kind));
                if (first && version != current) || (!first && other) {
                    let resources = self.wanted(kind);
                    self.answer(kind, resources, Vec::new());
                }
            }
            Ask::Delta {
                subscribe,
                unsubscribe,
                initial_versions,
            } => {
                let changes = !subscribe.is_empty() || !unsubscribe.is_empty();
                assert!(
                    request.nonce.is_empty() || !changes,
                    "a change rides on an answer"
                );
                assert!(initial_versions.is_empty() || first);
                self.delta(kind, first, (subscribe, unsubscribe), initial_versions);
            }
        }
    }

    fn delta(
        &mut self,
        kind: Kind,
        first: bool,
        (subscribe, unsubscribe): (Vec<String>, Vec<String>),
        initial: BTreeMap<String, String>,
    ) {
        let watched = self.streams.entry(kind).or_default();
        for name in &unsubscribe {
            watched.names.remove(name);
            watched.sent.remove(name);
        }
        watched.names.extend(subscribe.iter().cloned());
        if first {
            if subscribe.is_empty() && kind.is_whole() {
                watched.names.insert(WILDCARD.to_owned());
            }
            let versions = initial.into_iter();
            watched.sent = versions
                .map(|(name, version)| (name, version.parse().unwrap()))
                .collect();
        } else {
            // Who asks anew gets it, whatever was sent before.
            watched.sent.retain(|name, _| !subscribe.contains(name));
        }
        self.tell(kind, &subscribe);
    }

    /// What is new for the client; `asked` is answered in any case.
    fn tell(&mut self, kind: Kind, asked: &[String]) {
        let wanted = self.wanted(kind);
        let watched = self.streams.entry(kind).or_default();
        if !watched.begun {
            return;
        }
        if self.protocol == Protocol::State {
            let is_news = watched.version != format!("{:?}", self.world.get(&kind));
            if is_news && (kind.is_whole() || !wanted.is_empty()) {
                self.answer(kind, wanted, Vec::new());
            }
            return;
        }
        let sent = std::mem::replace(&mut watched.sent, wanted.clone());
        let gone = sent.keys().filter(|name| !wanted.contains_key(*name));
        let unknown = asked
            .iter()
            .filter(|name| !wanted.contains_key(*name) && *name != WILDCARD);
        let removed: BTreeSet<String> = gone.chain(unknown).cloned().collect();
        let new = wanted
            .into_iter()
            .filter(|(name, version)| sent.get(name) != Some(version));
        let new: Versions = new.collect();
        if !new.is_empty() || !removed.is_empty() {
            self.answer(kind, new, removed.into_iter().collect());
        }
    }
}

/// What a random run consists of.
struct Run {
    dice: StdRng,
    now: Instant,
    server: Server,
    client: Subscriptions,
    /// What the client took.
    held: BTreeMap<Kind, Versions>,
    wanted: BTreeMap<Kind, BTreeSet<String>>,
    open: bool,
}

impl Run {
    fn step(&mut self) {
        let kind = KINDS[self.dice.random_range(0..KINDS.len())];
        match self.dice.random_range(0..12) {
            0 => {
                let name = NAMES[self.dice.random_range(0..NAMES.len())].to_owned();
                let version = self.dice.random_range(1..100);
                self.server
                    .world
                    .entry(kind)
                    .or_default()
                    .insert(name, version);
                self.tell(kind);
            }
            1 => {
                let name = NAMES[self.dice.random_range(0..NAMES.len())];
                self.server.world.entry(kind).or_default().remove(name);
                self.tell(kind);
            }
            2 | 3 if kind != Kind::Clusters => {
                let chosen = NAMES.iter().filter(|_| self.dice.random_bool(0.5));
                let chosen: BTreeSet<String> = chosen.map(|name| (*name).to_owned()).collect();
                self.want(kind, chosen);
            }
            4 if self.dice.random_bool(0.2) => {
                self.open = false;
                self.client.broken();
            }
            5 if !self.open => self.connect(),
            6..=8 => drop(self.send()),
            _ => drop(self.receive()),
        }
    }

    fn tell(&mut self, kind: Kind) {
        if self.open && self.server.streams.contains_key(&kind) {
            self.server.tell(kind, &[]);
        }
    }

    fn want(&mut self, kind: Kind, names: BTreeSet<String>) {
        let held = self.held.entry(kind).or_default();
        if !names.contains(WILDCARD) {
            held.retain(|name, _| names.contains(name));
        }
        self.wanted.insert(kind, names.clone());
        self.client.want(kind, names);
    }

    fn connect(&mut self) {
        self.open = true;
        self.server.streams.clear();
        self.server.answers.clear();
        self.server.introduced = false;
        self.client.opened();
    }

    fn send(&mut self) -> bool {
        let Some(request) = self.client.next_request(self.now) else {
            return false;
        };
        self.server.hear(request);
        true
    }

    fn receive(&mut self) -> bool {
        if !self.open {
            return false;
        }
        let Some(answer) = self.server.answers.pop_front() else {
            return false;
        };
        let Some(received) = self.client.received(answer, self.now) else {
            return true;
        };
        let held = self.held.entry(received.kind).or_default();
        if let Some(whole) = &received.whole {
            held.retain(|name, _| whole.contains(name));
        }
        for name in &received.removed {
            held.remove(name);
        }
        let mut rejected = Vec::new();
        for sent in &received.resources {
            let version = sent.version.parse().unwrap();
            if is_bad(version) {
                rejected.push((sent.name.clone(), "bad".to_owned()));
            } else {
                held.insert(sent.name.clone(), version);
            }
        }
        self.client.judged(received.receipt, &rejected, self.now);
        true
    }

    /// From now on all is well: what is said is heard, and nothing is bad.
    fn settle(&mut self) {
        for kind in KINDS {
            for version in self.server.world.entry(kind).or_default().values_mut() {
                *version = *version * 10 + 1;
            }
            self.tell(kind);
        }
        if !self.open {
            self.connect();
        }
        for round in 0.. {
            assert!(round < 1000, "they do not come to rest");
            if !self.send() && !self.receive() {
                return;
            }
        }
    }

    fn check(&self, seed: u64) {
        for kind in KINDS {
            let wanted = &self.wanted[&kind];
            let all = wanted.contains(WILDCARD);
            let world = &self.server.world[&kind];
            let mut expected = world.clone();
            expected.retain(|name, _| all || wanted.contains(name));
            let mut held = self.held.get(&kind).cloned().unwrap_or_default();
            // That somebody has it no more is no news of those that are named, in the state of the world.
            if !all && self.server.protocol == Protocol::State {
                held.retain(|name, _| world.contains_key(name));
            }
            let protocol = self.server.protocol;
            assert_eq!(held, expected, "seed {seed}, {protocol:?}, {kind:?}");
        }
    }
}

fn run(seed: u64, protocol: Protocol) {
    let now = Instant::now();
    let limit = RateLimit {
        max_tokens: u32::MAX,
        fill_rate: 1.0,
    };
    let mut run = Run {
        dice: StdRng::seed_from_u64(seed),
        now,
        server: Server {
            protocol,
            world: BTreeMap::new(),
            streams: BTreeMap::new(),
            introduced: false,
            answers: VecDeque::new(),
            nonce: 0,
        },
        client: Subscriptions::new(protocol, limit, now),
        held: BTreeMap::new(),
        wanted: BTreeMap::new(),
        open: false,
    };
    for kind in KINDS {
        let names = if kind == Kind::Clusters {
            BTreeSet::from([WILDCARD.to_owned()])
        } else {
            BTreeSet::new()
        };
        run.want(kind, names);
    }
    let steps = run.dice.random_range(1..300);
    for _ in 0..steps {
        run.step();
    }
    run.settle();
    run.check(seed);
}

#[test]
fn whatever_happens_the_client_ends_with_what_the_server_has() {
    for seed in 0..300 {
        run(seed, Protocol::State);
        run(seed, Protocol::Delta);
    }
}
