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
    requests: Requests {
        finished: 0,
        failed: 0,
    },
};

/// Nodes without requests, all of which have answered.
fn nodes(count: usize) -> Nodes {
    (0..count)
        .map(|index| (format!("node-{index}"), SEEN))
        .collect()
}

fn rollout(nodes: &Nodes, now: Instant) -> Rollout {
    Rollout::new(&trial(0), plan(), nodes.clone(), BTreeSet::new(), now)
}

fn trial(step: usize) -> Trial {
    Trial {
        version: 7,
        step,
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
            rollout.look(&nodes, now + STEP - Duration::from_millis(1)),
            Verdict::Wait
        );
        now += STEP;
        let verdict = rollout.look(&nodes, now);
        assert_eq!(rollout.evidence().nodes, count);
        if count == 40 {
            assert_eq!(verdict, Verdict::Done);
        } else {
            rollout.go_on(next(&verdict).unwrap(), nodes.clone(), now);
        }
    }
}

#[test]
fn one_node_at_least_has_it_and_without_nodes_it_waits() {
    let mut now = Instant::now();
    let mut rollout = rollout(&Nodes::new(), now);
    now += STEP * 100;
    assert_eq!(rollout.look(&Nodes::new(), now), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "a node that it concerns");
    // Of those that come then, one is the first to try it, wherever it is.
    let mut tries = |nodes: &Nodes| {
        let mut verdict = rollout.look(nodes, now);
        if let Some((0, threshold)) = next(&verdict) {
            rollout.go_on((0, threshold), nodes.clone(), now);
            verdict = rollout.look(nodes, now);
        }
        assert_eq!(verdict, Verdict::Wait);
        now += STEP;
        assert_eq!(next(&rollout.look(nodes, now)).unwrap().0, 1);
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
    assert_eq!(rollout.look(&alone, now + STEP / 2), Verdict::Wait);
    assert_eq!(chosen(&rollout, &nodes).len(), 4);
    // Nor after a restart.
    let kept = Trial {
        threshold: Some(rollout.threshold()),
        ..trial(0)
    };
    let again = Rollout::new(&kept, plan(), alone, BTreeSet::new(), now);
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
    assert_eq!(next(&rollout.look(&nodes, now + STEP)).unwrap().0, 1);
    nodes.get_mut(&tried[0]).unwrap().is_pending = true;
    assert_eq!(rollout.look(&nodes, now + STEP), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "answers");
    let verdict = rollout.look(&nodes, now + STEP + ANSWER_TIMEOUT);
    assert_eq!(verdict, Verdict::GoBack("1 nodes did not answer".into()));
}

#[test]
fn a_new_refusal_takes_it_back_at_once_and_an_old_one_does_not() {
    let nodes = nodes(10);
    let now = Instant::now();
    let known = BTreeSet::from([refusal("node-1", "as ever")]);
    let mut rollout = Rollout::new(&trial(0), plan(), nodes.clone(), known, now);
    rollout.refused(refusal("node-1", "as ever"));
    assert_eq!(next(&rollout.look(&nodes, now + STEP)).unwrap().0, 1);
    for count in 0..2 * REFUSALS_TOLD_MAX {
        rollout.refused(refusal("node-1", &format!("something new: {count}")));
    }
    assert_eq!(rollout.evidence().refusals.len(), REFUSALS_TOLD_MAX);
    let expected = "node node-1 refuses type: something new: 0";
    assert_eq!(rollout.look(&nodes, now), Verdict::GoBack(expected.into()));
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
        let mut nodes = nodes(10);
        let probe = rollout(&nodes, now);
        let id = chosen(&probe, &nodes).remove(0);
        let other = nodes.keys().find(|it| **it != id).unwrap().clone();
        let add = |nodes: &mut Nodes, id: &str, (finished, failed): Of| {
            let seen = nodes.get_mut(id).unwrap();
            seen.requests = seen.requests.and(Requests { finished, failed });
        };
        add(&mut nodes, &id, before);
        // What others did before says nothing.
        add(&mut nodes, &other, (1000, 1000));
        let mut rollout = rollout(&nodes, now);
        add(&mut nodes, &id, tried);
        add(&mut nodes, &other, others);
        let verdict = rollout.look(&nodes, now);
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
    for seen in nodes.values_mut() {
        seen.is_pending = seen.is_concerned;
        seen.requests.finished += 10;
    }
    assert_eq!(rollout.look(&nodes, now + STEP), Verdict::Wait);
    let evidence = rollout.evidence();
    assert_eq!((evidence.nodes, evidence.pending), (1, 1));
    let finished = (evidence.chosen.finished, evidence.others.finished);
    assert_eq!(finished, (10, 390));
    nodes.get_mut(&last).unwrap().is_pending = false;
    assert_eq!(next(&rollout.look(&nodes, now + STEP)).unwrap().0, 1);
    // With none of them there, it waits.
    nodes.remove(&last);
    assert_eq!(rollout.look(&nodes, now + STEP), Verdict::Wait);
    assert_eq!(rollout.evidence().waits_for, "a node that it concerns");
}

#[test]
fn it_goes_on_where_it_was() {
    let nodes = nodes(10);
    let now = Instant::now();
    let again = |step| Rollout::new(&trial(step), plan(), nodes.clone(), BTreeSet::new(), now);
    assert_eq!((again(1).percent(), again(1).step()), (50, 1));
    assert_eq!(chosen(&again(1), &nodes).len(), 5);
    // The plan may be another one by then.
    assert_eq!(again(9).percent(), 100);
}
