//! When a client is told that something is gone, case by case. Written as in [`super::tests`].

use super::{
    tests::{BOTH, Talk, WORLD, settled},
    *,
};
use Kind::{Clusters, Endpoints, Listeners, Routes};

#[test]
fn what_is_gone_is_told_last() {
    let after = &[
        (Clusters, "b", "1"),
        (Clusters, "c", "1"),
        (Endpoints, "b", "1"),
        (Endpoints, "c", "1"),
        (Listeners, "l", "2"),
        (Routes, "other", "1"),
    ];
    let mut talk = settled(Protocol::State);
    assert_eq!(talk.told(after), ["Clusters[a@1 b@1 c@1]"]);
    talk.want(Endpoints, &["a", "b", "c"]);
    assert_eq!(talk.told(after), ["Endpoints[c@1]", "Listeners[l@2]"]);
    talk.answer(Endpoints, &["a", "b", "c"], None);
    talk.answer(Listeners, &[], None);
    assert_eq!(talk.told(after), ["Clusters[b@1 c@1]"]);
    assert_eq!(talk.told(after), [""; 0]);
    let mut talk = settled(Protocol::Delta);
    assert_eq!(talk.told(after), ["Clusters[c@1]"]);
    talk.want(Endpoints, &["c"]);
    assert_eq!(talk.told(after), ["Endpoints[c@1]", "Listeners[l@2]"]);
    talk.answer(Listeners, &[], None);
    let expected = [
        "Routes[] -[r]",
        "Clusters[] -[a]",
        "Endpoints[] -[a]",
        "Secrets[] -[s]",
    ];
    assert_eq!(talk.told(after), expected);
    assert_eq!(talk.told(after), [""; 0]);
}

/// They may lead there, and a client asks for endpoints only when it has their cluster.
#[test]
fn listeners_and_routes_wait_for_endpoints_of_what_is_new_and_not_for_ever() {
    let mut after = WORLD.to_vec();
    after.extend([(Clusters, "c", "1"), (Endpoints, "c", "1")]);
    after[5].2 = "2";
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let clusters = match protocol {
            Protocol::State => "Clusters[a@1 b@1 c@1]",
            Protocol::Delta => "Clusters[c@1]",
        };
        assert_eq!(talk.told(&after), [clusters], "{protocol:?}");
        assert_eq!(talk.session.held(), Some(ENDPOINTS_MAX));
        let mut renewed = after.clone();
        renewed[6].2 = "2";
        assert_eq!(
            talk.told(&renewed),
            ["Secrets[s@2]"],
            "these need no endpoints"
        );
        talk.told(&after);
        talk.answer(Clusters, &[], None);
        assert_eq!(talk.told(&after), [""; 0], "{protocol:?}");
        talk.now += ENDPOINTS_MAX;
        assert_eq!(talk.told(&after), ["Routes[r@2]"], "{protocol:?}");
    }
    for protocol in BOTH {
        let mut talk = settled(protocol);
        talk.told(&after);
        // It will not ask for them.
        talk.answer(Clusters, &[], Some("no"));
        assert_eq!(talk.told(&after), ["Routes[r@2]"], "{protocol:?}");
    }
}

#[test]
fn who_never_asks_for_endpoints_is_not_waited_for_anew_with_each_change() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world.extend([(Clusters, "c", "1"), (Endpoints, "c", "1")]);
        talk.told(&world);
        talk.answer(Clusters, &[], None);
        // Another cluster changes more often than that.
        talk.now += ENDPOINTS_MAX / 2;
        world[0].2 = "2";
        world[5].2 = "2";
        let told = talk.told(&world);
        assert!(
            !told.contains(&"Routes[r@2]".to_owned()),
            "{protocol:?}: {told:?}"
        );
        talk.answer(Clusters, &[], None);
        talk.now += ENDPOINTS_MAX / 2;
        world[0].2 = "3";
        let told = talk.told(&world);
        assert!(
            told.contains(&"Routes[r@2]".to_owned()),
            "{protocol:?}: {told:?}"
        );
    }
}

#[test]
fn who_asks_for_clusters_alone_is_told_at_once_what_is_gone() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Clusters, &[]);
    assert_eq!(talk.told(WORLD), ["Clusters[a@1 b@1]"]);
    assert_eq!(talk.session.held(), None);
    talk.answer(Clusters, &[], None);
    assert_eq!(talk.told(&WORLD[1..]), ["Clusters[] -[a]"]);
}

/// The old routes are in effect still, and lead there.
#[test]
fn a_cluster_stays_while_routes_that_lead_elsewhere_are_refused() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world[5].2 = "bad";
        world.remove(0);
        assert_eq!(talk.told(&world), ["Routes[r@bad]"]);
        talk.answer(Routes, &["r"], Some("no"));
        assert_eq!(talk.told(&world), [""; 0], "{protocol:?}");
        world[4].2 = "2";
        assert_eq!(talk.told(&world), ["Routes[r@2]"], "{protocol:?}");
        talk.answer(Routes, &["r"], None);
        let expected = match protocol {
            Protocol::State => "Clusters[b@1]",
            Protocol::Delta => "Clusters[] -[a]",
        };
        assert_eq!(talk.told(&world), [expected]);
    }
}

#[test]
fn who_refuses_for_good_keeps_what_is_gone_for_a_while_only() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world[5].2 = "bad";
        world.remove(0);
        assert_eq!(talk.told(&world), ["Routes[r@bad]"]);
        talk.answer(Routes, &["r"], Some("no"));
        talk.now += HOLD_MAX / 2;
        assert_eq!(talk.told(&world), [""; 0], "{protocol:?}");
        assert_eq!(talk.session.held(), Some(HOLD_MAX / 2));
        // That it is told once more, since another one is there, does not begin the time anew.
        talk.want(Routes, &["r", "t"]);
        world.push((Routes, "t", "1"));
        let expected = ["Routes[t@1]", "Routes[r@bad]"];
        assert_eq!(talk.told(&world), expected, "{protocol:?}");
        talk.answer(Routes, &["r", "t"], Some("no"));
        world.pop();
        assert_eq!(talk.told(&world)[0], "Routes[r@bad]", "{protocol:?}");
        talk.answer(Routes, &["r", "t"], Some("no"));
        assert_eq!(talk.told(&world), [""; 0], "{protocol:?}");
        talk.now += HOLD_MAX / 2;
        let expected: &[&str] = match protocol {
            Protocol::State => &["Clusters[b@1]"],
            Protocol::Delta => &["Routes[] -[t]", "Clusters[] -[a]"],
        };
        assert_eq!(talk.told(&world), expected, "{protocol:?}");
        assert_eq!(talk.session.held(), None);
    }
}

/// Nothing changes of clusters by then, and nothing is said.
#[test]
fn what_is_gone_goes_when_what_was_refused_is_taken_away() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world[5].2 = "bad";
        world.remove(0);
        assert_eq!(talk.told(&world), ["Routes[r@bad]"]);
        talk.answer(Routes, &["r"], Some("no"));
        assert_eq!(talk.told(&world), [""; 0], "{protocol:?}");
        world.retain(|(kind, ..)| *kind != Routes);
        let expected: &[&str] = match protocol {
            Protocol::State => &["Clusters[b@1]"],
            Protocol::Delta => &["Routes[] -[r]", "Clusters[] -[a]"],
        };
        assert_eq!(talk.told(&world), expected, "{protocol:?}");
    }
}

/// What takes the address of another would be refused while that is there.
#[test]
fn a_listener_goes_with_the_response_that_brings_its_successor() {
    for protocol in BOTH {
        let mut talk = settled(protocol);
        let mut world = WORLD.to_vec();
        world[4] = (Listeners, "m", "1");
        let expected = match protocol {
            Protocol::State => "Listeners[m@1]",
            Protocol::Delta => "Listeners[m@1] -[l]",
        };
        assert_eq!(talk.told(&world), [expected]);
    }
}
