//! What becomes of what a client refuses, case by case. Written as in [`super::tests`].

use super::{
    tests::{BOTH, Talk, WORLD, set, settled},
    *,
};
use Kind::{Clusters, Endpoints, Routes};

/// A client that took one version of `a`, and refused the next one, which came last; with the version that it took.
fn refusing() -> (Talk, String) {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Endpoints, &["a"]);
    talk.told(&[(Endpoints, "a", "1")]);
    talk.answer(Endpoints, &["a"], None);
    let good = talk.last[Endpoints.type_url()].version.clone();
    talk.told(&[(Endpoints, "a", "2")]);
    talk.answer(Endpoints, &["a"], Some("no"));
    (talk, good)
}

/// What a client wants is another thing from now on: it repeats the nonce of what it refused, and the version that it has.
fn want_instead(talk: &mut Talk, version: &str, names: &[&str]) {
    let bad = talk.last[Endpoints.type_url()].clone();
    talk.hear(Request {
        type_url: bad.type_url,
        nonce: bad.nonce,
        ask: Ask::State {
            version: version.to_owned(),
            names: set(names),
        },
        ..Request::default()
    });
}

/// Everybody does so who asks for something else after a refusal: Envoy, gRPC, our own proxies.
#[test]
fn who_repeats_the_nonce_of_what_it_refused_has_not_taken_it() {
    let (mut talk, good) = refusing();
    want_instead(&mut talk, &good, &["a", "b"]);
    assert_eq!(talk.state(Endpoints), State::Nacked);
    assert!(talk.status(Endpoints).nacked.is_some());
    talk.told(&[(Endpoints, "a", "3")]);
    talk.answer(Endpoints, &["a", "b"], None);
    assert_eq!(talk.state(Endpoints), State::Acked);
}

/// Nothing is waited for then, and nothing is left to be told.
#[test]
fn who_gives_up_what_it_refused_has_answered() {
    for names in [&[][..], &["b"]] {
        let (mut talk, good) = refusing();
        want_instead(&mut talk, &good, names);
        assert!(!talk.session.is_pending(), "{names:?}");
        assert_eq!(talk.state(Endpoints), State::Acked, "{names:?}");
        assert_eq!(talk.status(Endpoints).nacked, None, "{names:?}");
    }
}

/// A response that only says what is gone has nothing that could be refused by name.
#[test]
fn what_is_refused_of_a_removal_is_a_refusal() {
    let mut talk = settled(Protocol::Delta);
    let world: Vec<_> = WORLD.iter().copied().filter(|of| of.0 != Routes).collect();
    assert_eq!(talk.told(&world), ["Routes[] -[r]"]);
    assert_eq!(talk.state(Routes), State::Pending);
    talk.answer(Routes, &[], Some("no"));
    assert_eq!(talk.state(Routes), State::Nacked);
    assert!(!talk.session.is_pending());
}

#[test]
fn a_refusal_is_remembered_and_not_answered() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world[5].2 = "2";
        assert_eq!(talk.told(&world), ["Routes[r@2]"]);
        talk.answer(Routes, &["r"], Some("no"));
        assert_eq!(talk.told(&world), [""; 0], "{protocol:?}");
        assert_eq!(talk.state(Routes), State::Nacked);
        let nacked = talk.status(Routes).nacked;
        assert_eq!(nacked.unwrap().error, "no");
        world[5].2 = "3";
        assert_eq!(talk.told(&world), ["Routes[r@3]"]);
        talk.answer(Routes, &["r"], None);
        assert_eq!(talk.state(Routes), State::Acked);
    }
}

/// All other types would be looked at anew, and hashed, for each answer of each client.
#[test]
fn an_answer_wakes_its_own_type_alone() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        assert_eq!(talk.told(WORLD), [""; 0]);
        talk.answer(Routes, &["r"], None);
        let rests = |kind: Kind| {
            let watched = &talk.session.types[kind.type_url()];
            watched.is_at_rest(talk.snapshot.of(kind))
        };
        assert_eq!(
            [Clusters, Endpoints, Routes].map(rests),
            [true, true, false]
        );
    }
}

/// Some clients take nothing of a response in which one resource is bad.
#[test]
fn what_came_with_something_bad_is_sent_again_when_that_is_mended() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        (world[2].2, world[3].2) = ("2", "bad");
        assert_eq!(talk.told(&world), ["Endpoints[a@2 b@bad]"]);
        talk.answer(Endpoints, &["a", "b"], Some("b is bad"));
        assert_eq!(talk.told(&world), [""; 0]);
        // With what is new it would be refused, too, if it is bad itself.
        world[3].2 = "3";
        let expected = ["Endpoints[b@3]", "Endpoints[a@2]"];
        assert_eq!(talk.told(&world), expected, "{protocol:?}");
        talk.answer(Endpoints, &["a", "b"], Some("still"));
        assert_eq!(talk.told(&world), [""; 0]);
        world.remove(3);
        assert_eq!(talk.told(&world)[0], "Endpoints[a@2]", "{protocol:?}");
    }
}

/// Who takes nothing of a response in which one resource is bad would take nothing new as long as that is there.
#[test]
fn what_is_new_does_not_go_with_what_was_refused() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world[2].2 = "bad";
        assert_eq!(talk.told(&world), ["Endpoints[a@bad]"]);
        talk.answer(Endpoints, &["a", "b"], Some("a is bad"));
        for version in ["2", "3"] {
            world[3].2 = version;
            let new = format!("Endpoints[b@{version}]");
            let expected = [new.as_str(), "Endpoints[a@bad]"];
            assert_eq!(talk.told(&world), expected, "{protocol:?}");
            talk.answer(Endpoints, &["a", "b"], Some("a is bad"));
            assert_eq!(talk.told(&world), [""; 0], "once, {protocol:?}");
        }
    }
}

/// What it took nothing of was answered with endpoints, which it did not wait for then.
#[test]
fn a_cluster_that_was_refused_gets_its_endpoints_again() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        (world[0].2, world[1].2) = ("2", "bad");
        let expected = ["Clusters[a@2 b@bad]", "Endpoints[a@1 b@1]"];
        assert_eq!(talk.told(&world), expected, "{protocol:?}");
        talk.answer(Clusters, &[], Some("b is bad"));
        talk.answer(Endpoints, &["a", "b"], None);
        world[1].2 = "3";
        let told = talk.told(&world);
        let (clusters, endpoints): (Vec<_>, Vec<_>) = told
            .iter()
            .partition(|response| response.starts_with("Clusters"));
        let sent = |responses: &[&String], resource: &str| {
            responses.iter().any(|response| response.contains(resource))
        };
        for (cluster, endpoint) in [("a@2", "a@1"), ("b@3", "b@1")] {
            assert!(sent(&clusters, cluster), "{protocol:?}: {told:?}");
            assert!(sent(&endpoints, endpoint), "{protocol:?}: {told:?}");
        }
    }
}

#[test]
fn with_the_state_of_the_world_the_last_answer_settles_those_before() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Routes, &["r"]);
    talk.want(Endpoints, &["a"]);
    let mut world = WORLD.to_vec();
    world.push((Routes, "s", "1"));
    assert_eq!(talk.told(&world), ["Endpoints[a@1]", "Routes[r@1]"]);
    let first = talk.last[Routes.type_url()].clone();
    talk.want(Routes, &["r", "s"]);
    assert_eq!(talk.told(&world), ["Routes[s@1]"]);
    // It is refused: nothing is known of what came before.
    talk.answer(Routes, &["r", "s"], Some("no"));
    talk.hear(Request {
        type_url: first.type_url,
        nonce: "1000".into(),
        ask: Ask::State {
            version: first.version,
            names: set(&["r", "s"]),
        },
        ..Request::default()
    });
    let mut sent = talk.session.sent();
    let (.., r) = sent.find(|(_, name, _)| *name == "r").unwrap();
    assert_eq!(r.state, State::Pending, "a nonce of nobody");
    drop(sent);
    world.last_mut().unwrap().2 = "2";
    assert_eq!(talk.told(&world), ["Routes[s@2]"]);
    talk.answer(Routes, &["r", "s"], None);
    assert_eq!(talk.state(Routes), State::Acked);
    assert_eq!(talk.state(Endpoints), State::Pending, "of its type only");
}
