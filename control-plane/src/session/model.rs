//! Sessions against the proxy's own client: whatever happens to either and between them, the client ends with what there is.

use super::{Ask, Client, OURS, Request, Response, Session, State};
use crate::snapshot::{Resource, Snapshot};
use outrigger_xds::{
    load::binary::Packed,
    resource::bootstrap::Node,
    subscription::{
        self as client, Answer, Kind, Protocol, RateLimit, Sent, Subscriptions, WILDCARD,
    },
};
use prost_types::Any;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Instant, SystemTime},
};

type Versions = BTreeMap<String, u32>;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
/// Responses on their way.
const ON_THE_WAY: usize = 2;

/// A version that the client does not take.
fn is_bad(version: u32) -> bool {
    version % 5 == 3
}

fn snapshot(world: &BTreeMap<Kind, Versions>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (kind, versions) in world {
        for (name, version) in versions {
            let resource = Resource {
                name: name.clone(),
                version: version.to_string(),
                any: Any::default(),
                endpoints: (*kind == Kind::Clusters).then(|| name.clone()),
                ..Resource::default()
            };
            snapshot.insert(*kind, Arc::new(resource));
        }
    }
    snapshot
}

fn heard(user_agent: &str, request: client::Request) -> Request {
    let node = Node {
        id: "n".into(),
        ..Node::default()
    };
    let client = request.first.then(|| Client {
        node,
        user_agent: user_agent.to_owned(),
        ..Client::default()
    });
    Request {
        node: client,
        type_url: request.kind.type_url().into(),
        nonce: request.nonce,
        error: request.error,
        ask: match request.ask {
            client::Ask::State { version, names } => Ask::State {
                version,
                names: names.into_iter().collect(),
            },
            client::Ask::Delta {
                subscribe,
                unsubscribe,
                initial_versions,
            } => Ask::Delta {
                subscribe: subscribe.into_iter().collect(),
                unsubscribe: unsubscribe.into_iter().collect(),
                initial_versions,
            },
        },
    }
}

fn answer(response: Response) -> Answer {
    let sent = |resource: &Arc<Resource>| Sent {
        name: resource.name.clone(),
        version: resource.version.clone(),
        ttl: None,
        error: None,
        body: Some(Packed::from(resource.any.clone())),
    };
    Answer {
        type_url: response.type_url,
        version: response.version,
        nonce: response.nonce,
        resources: response.resources.iter().map(sent).collect(),
        removed: response.removed,
        errors: Vec::new(),
    }
}

struct Run {
    dice: StdRng,
    now: Instant,
    /// The server's.
    clock: SystemTime,
    protocol: Protocol,
    world: BTreeMap<Kind, Versions>,
    /// As whom the client speaks.
    user_agent: &'static str,
    /// What was served last.
    snapshot: Snapshot,
    /// The server's side of the stream that is open.
    session: Option<Session>,
    on_the_way: VecDeque<Answer>,
    client: Subscriptions,
    /// What the client took.
    held: BTreeMap<Kind, Versions>,
    wanted: BTreeMap<Kind, BTreeSet<String>>,
}

impl Run {
    fn new(seed: u64, protocol: Protocol) -> Self {
        let now = Instant::now();
        let limit = RateLimit {
            max_tokens: u32::MAX,
            fill_rate: 1.0,
        };
        let mut run = Self {
            dice: StdRng::seed_from_u64(seed),
            now,
            clock: SystemTime::UNIX_EPOCH,
            protocol,
            world: Kind::ALL.map(|kind| (kind, Versions::new())).into(),
            user_agent: if seed.is_multiple_of(2) {
                OURS
            } else {
                "envoy"
            },
            snapshot: Snapshot::default(),
            session: None,
            on_the_way: VecDeque::new(),
            client: Subscriptions::new(protocol, limit, now),
            held: BTreeMap::new(),
            wanted: BTreeMap::new(),
        };
        for kind in Kind::ALL {
            let all = kind.is_whole().then(|| WILDCARD.to_owned());
            run.want(kind, all.into_iter().collect());
        }
        run
    }

    fn step(&mut self) {
        let kind = Kind::ALL[self.dice.random_range(0..Kind::ALL.len())];
        let name = NAMES[self.dice.random_range(0..NAMES.len())];
        match self.dice.random_range(0..12) {
            0 => {
                let version = self.dice.random_range(1..100);
                let of_kind = self.world.entry(kind).or_default();
                of_kind.insert(name.to_owned(), version);
            }
            1 => drop(self.world.entry(kind).or_default().remove(name)),
            2 | 3 if !kind.is_whole() => {
                let chosen = NAMES.iter().filter(|_| self.dice.random_bool(0.5));
                let chosen = chosen.map(|name| (*name).to_owned()).collect();
                self.want(kind, chosen);
            }
            4 if self.dice.random_bool(0.2) => {
                self.session = None;
                self.client.broken();
            }
            5 if self.session.is_none() => self.connect(),
            6 | 7 => drop(self.ask()),
            8 | 9 => drop(self.serve()),
            _ => drop(self.receive()),
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
        self.session = Some(Session::new(self.protocol));
        self.on_the_way.clear();
        self.client.opened();
    }

    fn ask(&mut self) -> bool {
        let Some(request) = self.client.next_request(self.now) else {
            return false;
        };
        let session = self.session.as_mut().expect("only then it asks");
        session
            .hear(heard(self.user_agent, request), self.clock)
            .expect("a client of ours does nothing wrong");
        true
    }

    /// Only if there is room for it.
    fn serve(&mut self) -> bool {
        let Some(session) = &mut self.session else {
            return false;
        };
        if self.on_the_way.len() >= ON_THE_WAY {
            return false;
        }
        let mut snapshot = snapshot(&self.world);
        snapshot.share(&self.snapshot);
        self.snapshot = snapshot;
        let next = session.next(&self.snapshot, self.clock);
        let is_some = next.is_some();
        self.on_the_way.extend(next.map(answer));
        is_some
    }

    fn receive(&mut self) -> bool {
        if self.session.is_none() {
            return false;
        }
        let Some(answer) = self.on_the_way.pop_front() else {
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
    fn settle(&mut self, seed: u64) {
        for version in self.world.values_mut().flat_map(BTreeMap::values_mut) {
            if is_bad(*version) {
                *version = *version * 10 + 1;
            }
        }
        if self.session.is_none() {
            self.connect();
        }
        for round in 0.. {
            assert!(round < 1000, "seed {seed}: they do not come to rest");
            // Not one after the other: whoever has something to do does it.
            let moved = [self.ask(), self.serve(), self.receive()];
            if moved == [false; 3] {
                let held = self.session.as_ref().and_then(Session::held);
                let Some(held) = held else { return };
                self.clock += held;
            }
        }
    }

    fn check(&self, seed: u64) {
        let protocol = self.protocol;
        for kind in Kind::ALL {
            let wanted = &self.wanted[&kind];
            let all = wanted.contains(WILDCARD);
            let world = &self.world[&kind];
            let mut expected = world.clone();
            expected.retain(|name, _| all || wanted.contains(name));
            let mut held = self.held.get(&kind).cloned().unwrap_or_default();
            // That one of those that are named is gone cannot be said in the state of the world.
            if !all && protocol == Protocol::State {
                held.retain(|name, _| world.contains_key(name));
            }
            assert_eq!(held, expected, "seed {seed}, {protocol:?}, {kind:?}");
        }
        let session = self.session.as_ref().expect("it is open");
        for status in session.status() {
            let good = matches!(status.state, State::Acked | State::NotSent);
            assert!(good, "seed {seed}, {protocol:?}: {status:?}");
        }
    }
}

#[test]
fn whatever_happens_the_proxys_client_ends_with_what_there_is() {
    for seed in 0..400 {
        for protocol in [Protocol::State, Protocol::Delta] {
            let mut run = Run::new(seed, protocol);
            let steps = run.dice.random_range(1..300);
            for _ in 0..steps {
                run.step();
            }
            run.settle(seed);
            run.check(seed);
        }
    }
}
