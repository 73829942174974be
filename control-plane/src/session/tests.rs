//! What is said to whom, case by case. Responses are written `Kind[a@1 b@2] -[c]`: what they bring and what is gone.

use super::*;
use prost_types::Any;

type World<'a> = &'a [(Kind, &'a str, &'a str)];

const NOW: SystemTime = SystemTime::UNIX_EPOCH;
pub(super) const BOTH: [Protocol; 2] = [Protocol::State, Protocol::Delta];

/// A cluster's endpoints have its name.
fn snapshot(world: World<'_>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (kind, name, version) in world {
        let resource = Resource {
            name: (*name).into(),
            version: (*version).into(),
            any: Any::default(),
            endpoints: (*kind == Kind::Clusters).then(|| (*name).into()),
            ..Resource::default()
        };
        snapshot.insert(*kind, Arc::new(resource));
    }
    snapshot
}

pub(super) fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub(super) struct Talk {
    pub(super) session: Session,
    pub(super) user_agent: &'static str,
    pub(super) now: SystemTime,
    /// Types that did not change are the same in the next one, as they are in what is served.
    pub(super) snapshot: Snapshot,
    pub(super) last: BTreeMap<String, Response>,
}

impl Talk {
    pub(super) fn new(protocol: Protocol) -> Self {
        Self {
            session: Session::new(protocol),
            user_agent: "envoy",
            now: NOW,
            snapshot: Snapshot::default(),
            last: BTreeMap::new(),
        }
    }

    pub(super) fn hear(&mut self, request: Request) {
        self.try_hear(request).unwrap();
    }

    pub(super) fn try_hear(&mut self, request: Request) -> Result<(), Refusal> {
        let node = Node {
            id: "n".into(),
            ..Node::default()
        };
        let client = Client {
            node,
            user_agent: self.user_agent.into(),
            ..Client::default()
        };
        let request = Request {
            node: Some(client),
            ..request
        };
        self.session.hear(request, self.now)
    }

    /// Wants all of these; in delta, beside what it wants already.
    pub(super) fn want(&mut self, kind: Kind, names: &[&str]) {
        self.want_with(kind, names, &[]);
    }

    /// The same, of a client that has something.
    pub(super) fn want_with(&mut self, kind: Kind, names: &[&str], has: &[(&str, &str)]) {
        let ask = match self.session.protocol() {
            Protocol::State => Ask::State {
                version: match has {
                    [] => String::new(),
                    has => crate::snapshot::version_of(has.iter().copied()),
                },
                names: set(names),
            },
            Protocol::Delta => Ask::Delta {
                subscribe: set(names),
                unsubscribe: BTreeSet::new(),
                initial_versions: has
                    .iter()
                    .map(|(name, version)| ((*name).into(), (*version).into()))
                    .collect(),
            },
        };
        self.hear(Request {
            type_url: kind.type_url().into(),
            ask,
            ..Request::default()
        });
    }

    pub(super) fn give_up(&mut self, kind: Kind, names: &[&str]) {
        self.hear(Request {
            type_url: kind.type_url().into(),
            ask: Ask::Delta {
                subscribe: BTreeSet::new(),
                unsubscribe: set(names),
                initial_versions: BTreeMap::new(),
            },
            ..Request::default()
        });
    }

    /// Answers the last response of a type, with all that it wants.
    pub(super) fn answer(&mut self, kind: Kind, names: &[&str], error: Option<&str>) {
        let last = self.last[kind.type_url()].clone();
        let ask = match self.session.protocol() {
            Protocol::State => Ask::State {
                version: last.version,
                names: set(names),
            },
            Protocol::Delta => Ask::Delta {
                subscribe: BTreeSet::new(),
                unsubscribe: BTreeSet::new(),
                initial_versions: BTreeMap::new(),
            },
        };
        self.hear(Request {
            type_url: last.type_url,
            nonce: last.nonce,
            error: error.map(str::to_owned),
            ask,
            ..Request::default()
        });
    }

    /// All that is said now.
    pub(super) fn told(&mut self, world: World<'_>) -> Vec<String> {
        let mut snapshot = snapshot(world);
        snapshot.share(&self.snapshot);
        self.snapshot = snapshot;
        let mut told = Vec::new();
        while let Some(response) = self.session.next(&self.snapshot, self.now) {
            told.push(written(&response));
            self.last.insert(response.type_url.clone(), response);
            assert!(told.len() < 100, "without end: {told:?}");
        }
        told
    }

    pub(super) fn status(&self, kind: Kind) -> TypeStatus {
        let mut status = self.session.status();
        let found = status.find(|status| status.type_url == kind.type_url());
        found.unwrap()
    }

    pub(super) fn state(&self, kind: Kind) -> State {
        self.status(kind).state
    }
}

fn written(response: &Response) -> String {
    let resources = response.resources.iter();
    let resources: Vec<String> = resources
        .map(|resource| format!("{}@{}", resource.name, resource.version))
        .collect();
    let kind = Kind::of(&response.type_url);
    let kind = kind.map_or_else(|| response.type_url.clone(), |kind| format!("{kind:?}"));
    let mut text = format!("{kind}[{}]", resources.join(" "));
    if !response.removed.is_empty() {
        text.push_str(&format!(" -[{}]", response.removed.join(" ")));
    }
    text
}

use Kind::{Clusters, Endpoints, Listeners, Routes, Secrets};

pub(super) const WORLD: World<'static> = &[
    (Clusters, "a", "1"),
    (Clusters, "b", "1"),
    (Endpoints, "a", "1"),
    (Endpoints, "b", "1"),
    (Listeners, "l", "1"),
    (Routes, "r", "1"),
    (Secrets, "s", "1"),
];

/// A client that has all of `WORLD`.
pub(super) fn settled(protocol: Protocol) -> Talk {
    let mut talk = Talk::new(protocol);
    for (kind, names) in SETTLED {
        talk.want(*kind, names);
    }
    talk.told(WORLD);
    for (kind, names) in SETTLED {
        talk.answer(*kind, names, None);
    }
    assert_eq!(talk.told(WORLD), [""; 0], "an answer is not answered");
    talk
}

const SETTLED: &[(Kind, &[&str])] = &[
    (Routes, &["r"]),
    (Endpoints, &["a", "b"]),
    (Clusters, &[]),
    (Secrets, &["s"]),
    (Listeners, &[]),
];

#[test]
fn the_first_request_says_who_asks_and_each_for_what() {
    let asks = |node: Option<Client>, type_url: &str| Request {
        node,
        type_url: type_url.into(),
        ..Request::default()
    };
    let mut session = Session::new(Protocol::State);
    let type_url = Clusters.type_url();
    let nobody = session.hear(asks(None, type_url), NOW);
    assert_eq!(nobody, Err(Refusal::Anonymous));
    let nameless = session.hear(asks(Some(Client::default()), type_url), NOW);
    assert_eq!(nameless, Err(Refusal::Anonymous));
    let node = Node {
        id: "n".into(),
        ..Node::default()
    };
    let client = Client {
        node,
        ..Client::default()
    };
    assert_eq!(session.hear(asks(Some(client), type_url), NOW), Ok(()));
    assert_eq!(session.hear(asks(None, type_url), NOW), Ok(()), "said once");
    assert_eq!(session.hear(asks(None, ""), NOW), Err(Refusal::NoType));
    for index in 1..TYPES_MAX {
        assert_eq!(session.hear(asks(None, &index.to_string()), NOW), Ok(()));
    }
    let more = session.hear(asks(None, "one more"), NOW);
    assert_eq!(more, Err(Refusal::TooManyTypes));
}

/// What becomes of these names on the first request of a stream.
fn heard(protocol: Protocol, names: BTreeSet<String>) -> Result<(), Refusal> {
    let mut talk = Talk::new(protocol);
    talk.try_hear(Request {
        type_url: Endpoints.type_url().into(),
        ask: match protocol {
            Protocol::State => Ask::State {
                version: String::new(),
                names,
            },
            Protocol::Delta => Ask::Delta {
                subscribe: names,
                unsubscribe: BTreeSet::new(),
                initial_versions: BTreeMap::new(),
            },
        },
        ..Request::default()
    })
}

fn claimed(versions: BTreeMap<String, String>) -> Result<(), Refusal> {
    Talk::new(Protocol::Delta).try_hear(Request {
        type_url: Clusters.type_url().into(),
        ask: Ask::Delta {
            subscribe: BTreeSet::new(),
            unsubscribe: BTreeSet::new(),
            initial_versions: versions,
        },
        ..Request::default()
    })
}

#[test]
fn a_client_names_so_much_and_no_more() {
    let numbers = |count: usize| (0..count).map(|name| name.to_string());
    let too_many = |kind: Kind| Err(Refusal::TooManyNames(kind.type_url().into()));
    for protocol in BOTH {
        let heard = |count| heard(protocol, numbers(count).collect());
        assert_eq!(heard(NAMES_MAX), Ok(()), "{protocol:?}");
        assert_eq!(heard(NAMES_MAX + 1), too_many(Endpoints), "{protocol:?}");
    }
    let versions = |count| numbers(count).map(|name| (name.clone(), name)).collect();
    assert_eq!(claimed(versions(NAMES_MAX)), Ok(()));
    assert_eq!(claimed(versions(NAMES_MAX + 1)), too_many(Clusters));
    // One after the other.
    let mut talk = Talk::new(Protocol::Delta);
    let subscribe = |names: BTreeSet<String>| Request {
        type_url: Endpoints.type_url().into(),
        ask: Ask::Delta {
            subscribe: names,
            unsubscribe: BTreeSet::new(),
            initial_versions: BTreeMap::new(),
        },
        ..Request::default()
    };
    assert_eq!(
        talk.try_hear(subscribe(numbers(NAMES_MAX).collect())),
        Ok(())
    );
    assert_eq!(talk.try_hear(subscribe(set(&["1"]))), Ok(()), "known");
    assert_eq!(
        talk.try_hear(subscribe(set(&["one more"]))),
        too_many(Endpoints)
    );
}

#[test]
fn names_versions_and_types_are_so_long_and_no_longer() {
    let long = |bytes: usize| "x".repeat(bytes);
    for (bytes, expected) in [
        (NAME_BYTES_MAX, Ok(())),
        (NAME_BYTES_MAX + 1, Err(Refusal::TooLong)),
    ] {
        for protocol in BOTH {
            assert_eq!(heard(protocol, BTreeSet::from([long(bytes)])), expected);
        }
        assert_eq!(
            claimed(BTreeMap::from([("a".into(), long(bytes))])),
            expected
        );
        assert_eq!(
            claimed(BTreeMap::from([(long(bytes), "1".into())])),
            expected
        );
        let of_type = Request {
            type_url: long(bytes),
            ..Request::default()
        };
        assert_eq!(Talk::new(Protocol::State).try_hear(of_type), expected);
    }
}

#[test]
fn types_come_in_the_order_in_which_they_need_each_other() {
    for protocol in BOTH {
        let mut talk = Talk::new(protocol);
        for (kind, names) in SETTLED {
            talk.want(*kind, names);
        }
        let expected = [
            "Clusters[a@1 b@1]",
            "Endpoints[a@1 b@1]",
            "Listeners[l@1]",
            "Routes[r@1]",
            "Secrets[s@1]",
        ];
        assert_eq!(talk.told(WORLD), expected, "{protocol:?}");
        assert_eq!(talk.state(Clusters), State::Pending);
        talk.answer(Clusters, &[], None);
        assert_eq!(talk.state(Clusters), State::Acked);
    }
}

#[test]
fn one_type_does_not_wait_for_another() {
    for protocol in BOTH {
        let mut talk = Talk::new(protocol);
        talk.want(Endpoints, &["b"]);
        assert_eq!(talk.told(WORLD), ["Endpoints[b@1]"], "{protocol:?}");
        talk.want(Clusters, &[]);
        // Its cluster is new to the client: some would wait for it again.
        let expected = ["Clusters[a@1 b@1]", "Endpoints[b@1]"];
        assert_eq!(talk.told(WORLD), expected, "{protocol:?}");
    }
}

#[test]
fn all_of_nothing_is_an_answer() {
    for protocol in BOTH {
        let mut talk = Talk::new(protocol);
        talk.want(Clusters, &[]);
        talk.want(Endpoints, &["a"]);
        let expected: &[&str] = match protocol {
            Protocol::State => &["Clusters[]"],
            Protocol::Delta => &["Clusters[]", "Endpoints[] -[a]"],
        };
        assert_eq!(talk.told(&[]), expected);
        assert_eq!(talk.state(Clusters), State::Pending);
        talk.answer(Clusters, &[], None);
        assert_eq!(talk.state(Clusters), State::Acked);
        assert_eq!(talk.told(&[]), [""; 0]);
        assert_eq!(talk.told(&[(Endpoints, "a", "1")]), ["Endpoints[a@1]"]);
    }
}

#[test]
fn what_changed_is_told_and_nothing_else() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        assert_eq!(talk.told(&world), [""; 0]);
        world[3].2 = "2";
        assert_eq!(talk.told(&world), ["Endpoints[b@2]"], "{protocol:?}");
        world[0].2 = "2";
        let clusters = match protocol {
            Protocol::State => "Clusters[a@2 b@1]",
            Protocol::Delta => "Clusters[a@2]",
        };
        assert_eq!(
            talk.told(&world),
            [clusters, "Endpoints[a@1]"],
            "{protocol:?}"
        );
    }
}

#[test]
fn names_count_even_beside_an_old_nonce() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Endpoints, &["a"]);
    assert_eq!(talk.told(WORLD), ["Endpoints[a@1]"]);
    let old = talk.last[Endpoints.type_url()].clone();
    let mut world = WORLD.to_vec();
    world[2].2 = "2";
    assert_eq!(talk.told(&world), ["Endpoints[a@2]"]);
    talk.hear(Request {
        type_url: old.type_url,
        nonce: old.nonce,
        ask: Ask::State {
            version: old.version,
            names: set(&["a", "b"]),
        },
        ..Request::default()
    });
    assert_eq!(
        talk.state(Endpoints),
        State::Pending,
        "only the old one is answered"
    );
    assert_eq!(talk.told(&world), ["Endpoints[b@1]"]);
}

#[test]
fn who_asks_again_is_answered() {
    let mut talk = settled(Protocol::Delta);
    talk.want(Endpoints, &["a"]);
    assert_eq!(talk.told(WORLD), ["Endpoints[a@1]"]);
    talk.give_up(Endpoints, &["a"]);
    talk.give_up(Endpoints, &["never asked for"]);
    assert_eq!(talk.told(WORLD), [""; 0]);
    talk.want(Endpoints, &["a", "nowhere"]);
    assert_eq!(talk.told(WORLD), ["Endpoints[a@1] -[nowhere]"]);
    let mut talk = settled(Protocol::State);
    talk.want(Endpoints, &["b"]);
    assert_eq!(talk.told(WORLD), [""; 0]);
    talk.want(Endpoints, &["a", "b"]);
    assert_eq!(talk.told(WORLD), ["Endpoints[a@1]"]);
}

#[test]
fn after_a_reconnect_only_what_is_lacking_is_sent() {
    let has = [("a", "1"), ("b", "1")];
    // Envoy may wait for endpoints that it has; our proxies do not.
    let others: &[&str] = &["Endpoints[a@1 b@1] -[c]"];
    let ours: &[&str] = &["Endpoints[b@1]", "Endpoints[] -[c]"];
    for (user_agent, expected) in [("envoy", others), (OURS, ours)] {
        let mut talk = Talk::new(Protocol::Delta);
        talk.user_agent = user_agent;
        talk.want_with(Clusters, &[], &has);
        talk.want_with(
            Endpoints,
            &["a", "b", "c"],
            &[("a", "1"), ("b", "0"), ("c", "1")],
        );
        assert_eq!(talk.told(WORLD), expected);
        assert_eq!(talk.state(Clusters), State::Acked);
    }
    let mut talk = Talk::new(Protocol::State);
    talk.want_with(Clusters, &[], &has);
    assert_eq!(talk.told(WORLD), [""; 0]);
    assert_eq!(talk.state(Clusters), State::Acked);
    let mut world = WORLD.to_vec();
    world.remove(0);
    assert_eq!(talk.told(&world), ["Clusters[b@1]"]);
    // A version says nothing of single names: a client may have dropped one since.
    talk.want_with(Endpoints, &["a", "b"], &has);
    assert_eq!(talk.told(&world), ["Endpoints[a@1 b@1]"]);
}

#[test]
fn all_is_asked_for_by_nothing_or_by_a_star() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Clusters, &["*"]);
    assert_eq!(talk.told(WORLD), ["Clusters[a@1 b@1]"]);
    talk.want(Clusters, &["a"]);
    assert_eq!(talk.told(WORLD), ["Clusters[a@1]"]);
    talk.want(Clusters, &[]);
    let mut world = WORLD.to_vec();
    world[0].2 = "2";
    assert_eq!(
        talk.told(&world),
        [""; 0],
        "nothing is nobody, once names were said"
    );
    talk.want(Clusters, &["*", "a"]);
    assert_eq!(talk.told(&world), ["Clusters[a@2 b@1]"]);
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Clusters, &["a"]);
    assert_eq!(talk.told(WORLD), ["Clusters[a@1]"]);
    talk.want(Clusters, &["*"]);
    assert_eq!(talk.told(WORLD), ["Clusters[b@1]"]);
    talk.give_up(Clusters, &["a"]);
    assert_eq!(
        talk.told(WORLD),
        ["Clusters[a@1]"],
        "it is there as one of all"
    );
    talk.give_up(Clusters, &["*"]);
    assert_eq!(talk.told(&world), [""; 0]);
}

/// As gRPC's clients ask for listeners.
#[test]
fn whole_types_can_be_asked_for_by_name() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Listeners, &["l", "nowhere"]);
    assert_eq!(talk.told(WORLD), ["Listeners[l@1]"]);
    talk.want(Listeners, &["nowhere"]);
    assert_eq!(talk.told(WORLD), [""; 0]);
    talk.want(Listeners, &["also nowhere"]);
    assert_eq!(
        talk.told(WORLD),
        ["Listeners[]"],
        "so it is known not to exist"
    );
}

#[test]
fn of_types_that_are_not_served_nothing_exists() {
    for protocol in BOTH {
        let mut talk = Talk::new(protocol);
        let (names, type_url) = (set(&["x"]), "type.googleapis.com/a.Type");
        let ask = match protocol {
            Protocol::State => Ask::State {
                version: String::new(),
                names,
            },
            Protocol::Delta => Ask::Delta {
                subscribe: names,
                unsubscribe: BTreeSet::new(),
                initial_versions: BTreeMap::new(),
            },
        };
        talk.hear(Request {
            type_url: type_url.into(),
            ask,
            ..Request::default()
        });
        talk.want(Clusters, &[]);
        let told = talk.told(&[(Clusters, "a", "1")]);
        let expected: &[String] = match protocol {
            Protocol::State => &["Clusters[a@1]".into()],
            Protocol::Delta => &["Clusters[a@1]".into(), format!("{type_url}[] -[x]")],
        };
        assert_eq!(told, expected);
    }
}

#[test]
fn what_is_long_comes_in_pieces() {
    let mut all = Snapshot::default();
    for index in 0..5 {
        let any = Any {
            type_url: String::new(),
            value: vec![0; RESPONSE_BYTES_MAX / 2 - 100],
        };
        let resource = Resource {
            name: index.to_string(),
            version: "1".into(),
            any,
            endpoints: None,
            ..Resource::default()
        };
        all.insert(Endpoints, Arc::new(resource));
    }
    for protocol in BOTH {
        let mut talk = Talk::new(protocol);
        talk.want(Endpoints, &["0", "1", "2", "3", "4", "nowhere"]);
        let mut counts = Vec::new();
        while let Some(response) = talk.session.next(&all, NOW) {
            counts.push(response.resources.len());
        }
        assert_eq!(counts, [2, 2, 1], "{protocol:?}");
    }
}
