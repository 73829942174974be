//! How a version spreads, and what takes it back, with times and nodes given in.

use super::*;

const STEP: Duration = Duration::from_secs(60);

fn plan() -> Plan {
    Plan::new(&[10, 50, 100], STEP).unwrap()
}

/// It is sent something, and has answered.
const SEEN: Seen = Seen {
    is_concerned: true,
    is_pending: false,
};

/// Nodes without requests, all of which have answered.
fn nodes(count: usize) -> Nodes {
    (0..count)
        .map(|index| (format!("node-{index}"), SEEN))
        .collect()
}

fn rollout(nodes: &Nodes, now: Instant) -> Rollout {
    Rollout::new(&trial(0), plan(), nodes, Told::new(), now)
}

impl Rollout {
    /// With nothing told of requests.
    fn see(&mut self, nodes: &Nodes, now: Instant) -> Verdict {
        self.look(nodes, &Told::new(), now)
    }
}

fn trial(percent: u8) -> Trial {
    Trial {
        version: 7,
        percent,
        threshold: None,
    }
}

/// Where it goes on to.
fn next(verdict: &Verdict) -> Option<(usize, u64)> {
    match *verdict {
        Verdict::GoOn { step, threshold } => Some((step, threshold)),
        _ => None,
    }
}

fn chosen(rollout: &Rollout, nodes: &Nodes) -> Vec<String> {
    let ids = nodes.keys();
    ids.filter(|id| place(id) <= rollout.threshold())
        .cloned()
        .collect()
}

fn refusal(node: &str, error: &str) -> Refusal {
    Refusal {
        node: node.into(),
        type_url: "type".into(),
        error: error.into(),
    }
}

#[test]
fn plans_go_up_to_all() {
    for (steps, is_good) in [
        (&[100][..], true),
        (&[1, 100], true),
        (&[], false),
        (&[50], false),
        (&[0, 100], false),
        (&[50, 50, 100], false),
        (&[50, 20, 100], false),
        (&[100, 101], false),
    ] {
        assert_eq!(Plan::new(steps, STEP).is_ok(), is_good, "{steps:?}");
    }
    assert!(Plan::new(&[10, 100], Duration::ZERO).is_err());
    assert!(plan().is_staged() && !Plan::at_once().is_staged());
}

#[test]
fn it_spreads_and_who_has_it_keeps_it() {
    let nodes = nodes(40);
    let mut now = Instant::now();
    let mut rollout = rollout(&nodes, now);
    let mut before = Vec::new();
    for count in [4, 20, 40] {
        let these = chosen(&rollout, &nodes);
        assert_eq!(these.len(), count);
        assert!(before.iter().all(|id| these.contains(id)));
        before = these;
        assert_eq!(
            rollout.see(&nodes, now + STEP - Duration::from_millis(1)),
            Verdict::Wait
        );
        now += STEP;
        let verdict = rollout.see(&nodes, now);
        assert_eq!(rollout.evidence().nodes, count);
        if count == 40 {
            assert_eq!(verdict, Verdict::Done);
        } else {
            rollout.go_on(next(&verdict).unwrap(), Told::new(), now);
        }
    }
}

#[test]
fn one_node_at_least_has_it_and_without_nodes_it_waits() {
    let mut now = Instant::now();
    let mut rollout = rollout(&Nodes::new(), now);
    now += STEP * 100;
    assert_eq!(rollout.see(&Nodes::new(), now), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "a node that it concerns");
    // Of those that come then, one is the first to try it, wherever it is.
    let mut tries = |nodes: &Nodes| {
        let mut verdict = rollout.see(nodes, now);
        if let Some((0, threshold)) = next(&verdict) {
            rollout.go_on((0, threshold), Told::new(), now);
            verdict = rollout.see(nodes, now);
        }
        assert_eq!(verdict, Verdict::Wait);
        now += STEP;
        assert_eq!(next(&rollout.see(nodes, now)).unwrap().0, 1);
        chosen(&rollout, nodes)
    };
    let far = |id: &&String| place(id) > u64::MAX / 2;
    let some = nodes(100);
    let mut ids: Vec<&String> = some.keys().filter(far).take(3).collect();
    ids.sort_by_key(|id| place(id));
    let mut some: Nodes = ids.iter().map(|id| ((*id).clone(), SEEN)).collect();
    assert_eq!(tries(&some), [ids[0].as_str()]);
    // That one goes, and another one has to.
    some.remove(ids[0]);
    assert_eq!(tries(&some), [ids[1].as_str()]);
}

/// When all come back after they were lost, the first of them are not taken for all.
#[test]
fn who_is_connected_alone_for_a_while_does_not_try_it_for_that() {
    let nodes = nodes(40);
    let now = Instant::now();
    let mut rollout = rollout(&nodes, now);
    let last = nodes.keys().max_by_key(|id| place(id)).unwrap();
    let alone = Nodes::from([(last.clone(), SEEN)]);
    assert_eq!(rollout.see(&alone, now + STEP / 2), Verdict::Wait);
    assert_eq!(chosen(&rollout, &nodes).len(), 4);
    // Nor after a restart.
    let kept = Trial {
        threshold: Some(rollout.threshold()),
        ..trial(0)
    };
    let again = Rollout::new(&kept, plan(), &alone, Told::new(), now);
    assert_eq!(chosen(&again, &nodes).len(), 4);
}

#[test]
fn who_does_not_answer_is_waited_for_and_not_for_ever() {
    let now = Instant::now();
    let mut nodes = nodes(10);
    let mut rollout = rollout(&nodes, now);
    let tried = chosen(&rollout, &nodes);
    // Of no matter: it does not have it.
    let other = nodes.keys().find(|id| !tried.contains(id)).unwrap().clone();
    nodes.get_mut(&other).unwrap().is_pending = true;
    assert_eq!(next(&rollout.see(&nodes, now + STEP)).unwrap().0, 1);
    nodes.get_mut(&tried[0]).unwrap().is_pending = true;
    assert_eq!(rollout.see(&nodes, now + STEP), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "answers");
    let verdict = rollout.see(&nodes, now + STEP + ANSWER_TIMEOUT);
    assert_eq!(verdict, Verdict::GoBack("1 nodes did not answer".into()));
}

/// It may be gone because of it: that others try it in its place would take it through the fleet.
#[test]
fn who_was_sent_it_and_is_gone_is_not_replaced() {
    let mut now = Instant::now();
    let all = nodes(40);
    let mut rollout = rollout(&all, now);
    let tried = chosen(&rollout, &all);
    let mut left = all.clone();
    for id in &tried {
        rollout.sent(id);
        left.remove(id);
    }
    now += STEP;
    assert_eq!(rollout.see(&left, now), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "answers");
    let evidence = rollout.evidence();
    assert_eq!((evidence.nodes, evidence.gone, evidence.pending), (0, 4, 4));
    // Not even with nobody left.
    assert_eq!(rollout.see(&Nodes::new(), now), Verdict::Wait);
    // Back for a moment, and not told all again.
    let mut back = all.clone();
    back.get_mut(&tried[0]).unwrap().is_pending = true;
    assert_eq!(rollout.see(&back, now), Verdict::Wait);
    // Whoever comes back and answers is as good as before.
    assert_eq!(next(&rollout.see(&all, now)).unwrap().0, 1);
    let verdict = rollout.see(&left, now + ANSWER_TIMEOUT);
    assert_eq!(verdict, Verdict::GoBack("4 nodes did not answer".into()));
}

#[test]
fn a_refusal_takes_it_back_at_once() {
    let nodes = nodes(10);
    let now = Instant::now();
    let mut rollout = rollout(&nodes, now);
    assert_eq!(rollout.see(&nodes, now), Verdict::Wait);
    for count in 0..2 * REFUSALS_TOLD_MAX {
        rollout.refused(refusal("node-1", &format!("something new: {count}")));
    }
    assert_eq!(rollout.evidence().refusals.len(), REFUSALS_TOLD_MAX);
    let expected = "node node-1 refuses type: something new: 0";
    assert_eq!(rollout.see(&nodes, now), Verdict::GoBack(expected.into()));
}

/// Requests of nodes that have it and of others: before it came, and since.
#[test]
fn failures_are_compared_with_others_and_with_before() {
    type Of = (u64, u64);
    let cases: [(&str, Of, Of, Of, bool); 8] = [
        ("nothing is told", (0, 0), (0, 0), (0, 0), false),
        ("as elsewhere", (0, 0), (100, 10), (100, 10), false),
        ("worse than elsewhere", (0, 0), (100, 20), (100, 10), true),
        ("worse than before", (100, 0), (100, 10), (0, 0), true),
        ("as before", (100, 30), (100, 30), (100, 0), false),
        ("a little worse", (100, 0), (100, 5), (100, 0), false),
        ("too few to tell", (100, 0), (19, 19), (100, 0), false),
        (
            "nothing to compare with",
            (0, 0),
            (100, 100),
            (19, 0),
            false,
        ),
    ];
    for (case, before, tried, others, is_bad) in cases {
        let now = Instant::now();
        let nodes = nodes(10);
        let probe = rollout(&nodes, now);
        let id = chosen(&probe, &nodes).remove(0);
        let other = nodes.keys().find(|it| **it != id).unwrap().clone();
        let mut told = Told::new();
        let add = |told: &mut Told, id: &str, (finished, failed): Of| {
            let sum = told.entry(id.to_owned()).or_default();
            *sum = sum.and(Requests {
                finished,
                failed,
                ..Requests::default()
            });
        };
        add(&mut told, &id, before);
        // What others did before says nothing, and neither does it of one that is not connected yet.
        add(&mut told, &other, (1000, 1000));
        let mut connected = nodes.clone();
        connected.remove(&other);
        let mut rollout = Rollout::new(&trial(0), plan(), &connected, told.clone(), now);
        add(&mut told, &id, tried);
        add(&mut told, &other, others);
        let verdict = rollout.look(&nodes, &told, now);
        assert_eq!(
            matches!(verdict, Verdict::GoBack(_)),
            is_bad,
            "{case}: {verdict:?}"
        );
        let evidence = rollout.evidence();
        let counted = [evidence.before, evidence.chosen, evidence.others];
        let counted = counted.map(|it| (it.finished, it.failed));
        assert_eq!(counted, [before, tried, others], "{case}");
    }
}

/// First tokens, and the mean time to them in milliseconds.
#[test]
fn times_to_the_first_token_are_compared_with_others_and_with_before() {
    type Of = (u64, u64);
    let cases: [(&str, Of, Of, Of, bool); 9] = [
        ("nothing is told", (0, 0), (0, 0), (0, 0), false),
        ("as elsewhere", (0, 0), (200, 400), (200, 400), false),
        (
            "longer than elsewhere",
            (0, 0),
            (200, 601),
            (200, 400),
            true,
        ),
        ("longer than before", (200, 400), (200, 601), (0, 0), true),
        ("as before", (200, 900), (200, 900), (200, 400), false),
        ("by next to nothing", (200, 10), (200, 59), (200, 10), false),
        (
            "too few to tell",
            (200, 400),
            (199, 9000),
            (200, 400),
            false,
        ),
        (
            "19 quick ones and one of 10 s",
            (200, 400),
            (20, 880),
            (200, 400),
            false,
        ),
        (
            "nothing to compare with",
            (0, 0),
            (200, 9000),
            (199, 1),
            false,
        ),
    ];
    for (case, before, tried, others, is_bad) in cases {
        let now = Instant::now();
        let nodes = nodes(10);
        let id = chosen(&rollout(&nodes, now), &nodes).remove(0);
        let other = nodes.keys().find(|it| **it != id).unwrap().clone();
        let of = |(first_tokens, ms): Of| Requests {
            first_tokens,
            first_token_us: first_tokens * ms * 1000,
            ..Requests::default()
        };
        let mut told = Told::from([(id.clone(), of(before))]);
        let mut rollout = Rollout::new(&trial(0), plan(), &nodes, told.clone(), now);
        told.insert(id, of(before).and(of(tried)));
        told.insert(other, of(others));
        let early = rollout.look(&nodes, &told, now);
        assert_eq!(early, Verdict::Wait, "{case}: the step goes on");
        let verdict = rollout.look(&nodes, &told, now + STEP);
        let is_taken_back = matches!(verdict, Verdict::GoBack(_));
        assert_eq!(is_taken_back, is_bad, "{case}: {verdict:?}");
        assert_eq!(rollout.evidence().chosen, of(tried), "{case}");
    }
}

/// What concerns one node is tried by that one; the others are who it is compared with.
#[test]
fn those_try_it_that_it_concerns() {
    let mut nodes = nodes(40);
    let last = nodes.keys().max_by_key(|id| place(id)).unwrap().clone();
    for (id, seen) in &mut nodes {
        seen.is_concerned = *id == last;
    }
    let now = Instant::now();
    let mut rollout = rollout(&nodes, now);
    let mut told = Told::new();
    for (id, seen) in &mut nodes {
        seen.is_pending = seen.is_concerned;
        let requests = Requests {
            finished: 10,
            ..Requests::default()
        };
        told.insert(id.clone(), requests);
    }
    assert_eq!(rollout.look(&nodes, &told, now + STEP), Verdict::Wait);
    let evidence = rollout.evidence();
    assert_eq!((evidence.nodes, evidence.pending), (1, 1));
    let finished = (evidence.chosen.finished, evidence.others.finished);
    assert_eq!(finished, (10, 390));
    nodes.get_mut(&last).unwrap().is_pending = false;
    assert_eq!(next(&rollout.see(&nodes, now + STEP)).unwrap().0, 1);
    // With none of them there, it waits.
    nodes.remove(&last);
    assert_eq!(rollout.see(&nodes, now + STEP), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "a node that it concerns");
}

#[test]
fn it_goes_on_where_it_was() {
    let nodes = nodes(10);
    let now = Instant::now();
    let again = |percent, steps: &[u8]| {
        let plan = Plan::new(steps, STEP).unwrap();
        Rollout::new(&trial(percent), plan, &nodes, Told::new(), now)
    };
    let same = again(50, &[10, 50, 100]);
    assert_eq!((same.percent(), chosen(&same, &nodes).len()), (50, 5));
    // The plan may be another one by then: who does not have it yet is not sent it without a watch.
    for (percent, steps, expected) in [
        (50, &[10, 100][..], 10),
        (50, &[1, 2, 40, 60, 100], 40),
        (5, &[10, 50, 100], 10),
        (100, &[10, 100], 100),
    ] {
        assert_eq!(again(percent, steps).percent(), expected, "{steps:?}");
    }
}
