//! Distributions and levels, without sockets.

use super::*;
use outrigger_filters::endpoints::Host;
use std::sync::atomic::Ordering::Relaxed;

struct Spec {
    weight: u32,
    health: HealthStatus,
    locality: usize,
}

fn spec(weight: u32) -> Spec {
    Spec {
        weight,
        health: HealthStatus::Healthy,
        locality: 0,
    }
}

fn sick(health: HealthStatus) -> Spec {
    Spec { health, ..spec(1) }
}

struct Case {
    balancer: Balancer,
    view: ClusterView,
}

impl Case {
    fn new(specs: impl IntoIterator<Item = Spec>, edit: impl FnOnce(&mut Cluster)) -> Self {
        let mut cluster = Cluster::default();
        edit(&mut cluster);
        let localities = cluster.load_assignment.localities.clone();
        let priority = |locality: usize| localities.get(locality).map_or(0, |known| known.priority);
        let endpoints: Vec<_> = specs
            .into_iter()
            .enumerate()
            .map(|(at, spec)| {
                Arc::new(Endpoint {
                    id: format!("e{at}").as_str().into(),
                    hash_key: format!("e{at}").into(),
                    weight: spec.weight,
                    health_status: spec.health,
                    priority: priority(spec.locality),
                    locality: spec.locality,
                    cluster: "c".into(),
                    slot: at,
                    ..Endpoint::default()
                })
            })
            .collect();
        let balancer = Balancer::new(&cluster, None);
        balancer.rebuild(&endpoints);
        let view = ClusterView {
            name: "c".into(),
            lb_policy: cluster.lb_policy,
            connect_timeout: cluster.connect_timeout,
            silent_peer: false,
            original_dst: None,
            plain: true,
            even: balancer.is_even(&endpoints),
            override_host: Arc::default(),
            breakers: Arc::default(),
            endpoints,
        };
        Self { balancer, view }
    }

    fn choose(&self) -> Option<Chosen> {
        self.balancer.choose(&self.view, &self.view.endpoints, None)
    }

    fn sequence(&self, count: usize) -> String {
        let letter = |_| char::from(b'a' + self.choose().unwrap().index as u8);
        (0..count).map(letter).collect()
    }

    fn spread(&self, count: usize) -> Vec<usize> {
        let mut spread = vec![0; self.view.endpoints.len()];
        for _ in 0..count {
            spread[self.choose().unwrap().index] += 1;
        }
        spread
    }
}

fn near(found: usize, wanted: usize) -> bool {
    found.abs_diff(wanted) <= wanted / 5 + 30
}

#[test]
fn weighted_round_robin_is_exact_and_smooth() {
    let case = Case::new([spec(5), spec(1), spec(2)], |_| {});
    assert!(!case.view.even);
    assert_eq!(case.spread(80), [50, 10, 20]);
    let long = case.sequence(80);
    assert!(!long.contains("aaaaa"), "no burst: {long}");
}

#[test]
fn an_endpoint_that_was_away_gets_no_burst() {
    let case = Case::new([spec(1), spec(2)], |_| {});
    let only = vec![case.view.endpoints[1].clone()];
    for _ in 0..1000 {
        case.balancer.choose(&case.view, &only, None).unwrap();
    }
    let spread = case.spread(30);
    assert!(spread[0].abs_diff(10) <= 1, "{spread:?}");
}

#[test]
fn a_new_balancer_goes_on_where_the_old_one_stopped() {
    let case = Case::new([spec(1), spec(2)], |_| {});
    case.spread(1000);
    let next = Balancer::new(&Cluster::default(), Some(&case.balancer));
    case.view.endpoints[0].host.turn.store(0, Relaxed);
    let mut spread = [0, 0];
    for _ in 0..30 {
        let all = &case.view.endpoints;
        spread[next.choose(&case.view, all, None).unwrap().index] += 1;
    }
    assert!(spread[0] <= 11, "a new endpoint has no burst: {spread:?}");
}

#[test]
fn threads_at_once_keep_the_weights() {
    let case = Case::new([spec(3), spec(1)], |_| {});
    let mut spread = [0, 0];
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| case.spread(1000))).collect();
        for thread in threads {
            for (sum, more) in spread.iter_mut().zip(thread.join().unwrap()) {
                *sum += more;
            }
        }
    });
    assert!(near(spread[0], 3000) && near(spread[1], 1000), "{spread:?}");
}

#[test]
fn random_heeds_weights() {
    let case = Case::new([spec(3), spec(1)], |cluster| {
        cluster.lb_policy = LbPolicy::Random;
    });
    let spread = case.spread(4000);
    assert!(near(spread[0], 3000), "{spread:?}");
}

#[test]
fn least_request_prefers_the_idle_and_lowers_weights_by_load() {
    let least = |cluster: &mut Cluster| cluster.lb_policy = LbPolicy::LeastRequest;
    let case = Case::new([spec(1), spec(1)], least);
    case.view.endpoints[0].stats.active.store(1, Relaxed);
    assert_eq!(case.spread(50), [0, 50]);
    let case = Case::new([spec(4), spec(1)], least);
    assert_eq!(case.spread(50), [40, 10]);
    case.view.endpoints[0].stats.active.store(3, Relaxed);
    let spread = case.spread(100);
    assert!(near(spread[0], 50), "4 / (3 + 1) is 1: {spread:?}");
    let blind = Case::new([spec(4), spec(1)], |cluster| {
        cluster.lb_policy = LbPolicy::LeastRequest;
        cluster.balancing.active_request_bias = 0.0;
    });
    blind.view.endpoints[0].stats.active.store(99, Relaxed);
    assert_eq!(blind.spread(50), [40, 10]);
    let many = Case::new([spec(1), spec(1), spec(1)], |cluster| {
        cluster.lb_policy = LbPolicy::LeastRequest;
        cluster.balancing.choice_count = 60;
    });
    many.view.endpoints[0].stats.active.store(1, Relaxed);
    many.view.endpoints[2].stats.active.store(1, Relaxed);
    assert_eq!(many.spread(50), [0, 50, 0], "all are compared");
}

#[test]
fn health_decides_before_the_policy() {
    let case = Case::new(
        [
            spec(1),
            sick(HealthStatus::Degraded),
            spec(1),
            sick(HealthStatus::Draining),
            spec(1),
        ],
        |_| {},
    );
    let spread = case.spread(300);
    assert_eq!(spread[3], 0);
    assert!(near(spread[1], 48), "3 of 5 healthy take 84 %: {spread:?}");
    let case = Case::new([spec(1), sick(HealthStatus::Unhealthy), spec(1)], |_| {});
    assert_eq!(case.spread(100), [50, 0, 50]);
    case.view.endpoints[0]
        .host
        .set(Host::FAILED_OUTLIER_CHECK, true);
    let chosen = case.choose().unwrap();
    assert!(chosen.panic, "a third is below half");
    let spread = case.spread(90);
    assert!(
        spread.iter().all(|count| count.abs_diff(30) <= 2),
        "{spread:?}"
    );
}

#[test]
fn without_panic_nobody_is_chosen_where_nobody_is_healthy() {
    let case = Case::new([sick(HealthStatus::Unhealthy)], |cluster| {
        cluster.balancing.healthy_panic_threshold = 0.0;
    });
    assert_eq!(case.choose(), None);
    let case = Case::new([sick(HealthStatus::Draining)], |_| {});
    assert_eq!(
        case.choose(),
        None,
        "one that drains gets nothing, panic or not"
    );
}

fn two_localities(second: Locality) -> impl FnOnce(&mut Cluster) {
    move |cluster| {
        cluster.load_assignment.localities = vec![
            Locality {
                weight: Some(1),
                ..Locality::default()
            },
            second,
        ];
    }
}

fn far(health: HealthStatus) -> Spec {
    Spec {
        locality: 1,
        ..sick(health)
    }
}

#[test]
fn the_next_priority_takes_what_the_first_cannot() {
    let second = Locality {
        priority: 1,
        ..Locality::default()
    };
    let healthy = far(HealthStatus::Healthy);
    let case = Case::new([spec(1), spec(1), healthy], two_localities(second));
    assert_eq!(case.spread(100), [50, 50, 0]);
    case.view.endpoints[0]
        .host
        .set(Host::FAILED_ACTIVE_HC, true);
    let spread = case.spread(1000);
    assert_eq!(spread[0], 0);
    assert!(near(spread[1], 700) && near(spread[2], 300), "{spread:?}");
    let first = case
        .balancer
        .choose(&case.view, &case.view.endpoints[2..], None);
    assert_eq!(
        first.unwrap().index,
        0,
        "a retry goes where somebody is left"
    );
}

#[test]
fn localities_are_chosen_by_weight_if_configured() {
    let second = Locality {
        weight: Some(3),
        ..Locality::default()
    };
    let specs = || {
        [
            spec(1),
            far(HealthStatus::Healthy),
            far(HealthStatus::Unhealthy),
        ]
    };
    let case = Case::new(specs(), |cluster| {
        two_localities(second.clone())(cluster);
        cluster.balancing.locality_weighted = true;
    });
    let spread = case.spread(3100);
    // 3 * 0.7 = 2.1 to 1.
    assert!(near(spread[0], 1000) && near(spread[1], 2100), "{spread:?}");
    let case = Case::new(specs(), two_localities(second));
    assert_eq!(case.spread(100), [50, 50, 0]);
}

fn hashing(policy: LbPolicy, weights: &[u32]) -> Case {
    let specs: Vec<_> = weights.iter().map(|weight| spec(*weight)).collect();
    Case::new(specs, |cluster| cluster.lb_policy = policy)
}

fn by_hash(case: &Case, hash: u64) -> usize {
    let all = &case.view.endpoints;
    case.balancer
        .choose(&case.view, all, Some(hash))
        .unwrap()
        .index
}

/// Spread well over all numbers.
fn hashes(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(|at| xxhash_rust::xxh64::xxh64(&at.to_le_bytes(), 7))
}

#[test]
fn hashes_are_spread_by_weight() {
    for policy in [LbPolicy::RingHash, LbPolicy::Maglev] {
        let case = hashing(policy, &[3, 1, 2]);
        let mut spread = [0; 3];
        hashes(6000).for_each(|hash| spread[by_hash(&case, hash)] += 1);
        for (found, wanted) in spread.into_iter().zip([3000, 1000, 2000]) {
            assert!(near(found, wanted), "{policy:?} {spread:?}");
        }
    }
}

#[test]
fn a_hash_keeps_its_endpoint_while_that_is_well_and_others_come_and_go() {
    for policy in [LbPolicy::RingHash, LbPolicy::Maglev] {
        let case = hashing(policy, &[1, 1, 1, 1]);
        let before: Vec<_> = hashes(500)
            .map(|hash| (hash, by_hash(&case, hash)))
            .collect();
        let sick = &case.view.endpoints[2].host;
        sick.set(Host::FAILED_ACTIVE_HC, true);
        for (hash, at) in &before {
            let now = by_hash(&case, *hash);
            assert!(now != 2 && (*at == 2 || now == *at), "{policy:?}");
        }
        sick.set(Host::FAILED_ACTIVE_HC, false);
        assert!(before.iter().all(|(hash, at)| by_hash(&case, *hash) == *at));
        let three = hashing(policy, &[1, 1, 1]);
        let moved = before
            .iter()
            .filter(|(hash, at)| *at != 3 && by_hash(&three, *hash) != *at)
            .count();
        assert!(moved < 60, "{policy:?}: {moved} of those that could stay");
    }
}

#[test]
fn a_healthy_endpoint_without_a_place_in_the_table_is_better_than_none() {
    let case = Case::new([spec(1), spec(1), spec(1)], |cluster| {
        cluster.lb_policy = LbPolicy::RingHash;
        cluster.balancing.ring_size = (1, 1);
    });
    let only = by_hash(&case, 7);
    assert!(hashes(50).all(|hash| by_hash(&case, hash) == only));
    case.view.endpoints[only]
        .host
        .set(Host::FAILED_ACTIVE_HC, true);
    let used: std::collections::BTreeSet<_> =
        hashes(100).map(|hash| by_hash(&case, hash)).collect();
    assert!(
        used.len() == 2 && !used.contains(&only),
        "the others: {used:?}"
    );
}

#[test]
fn a_view_from_before_a_push_finds_its_endpoints_in_the_table_after_it() {
    for policy in [LbPolicy::RingHash, LbPolicy::Maglev] {
        let old = hashing(policy, &[1, 1, 1]);
        let new = hashing(policy, &[1, 1, 1]);
        for hash in hashes(200) {
            let all = &old.view.endpoints;
            let found = new.balancer.choose(&old.view, all, Some(hash));
            assert_eq!(found.unwrap().index, by_hash(&old, hash), "{policy:?}");
        }
        let unknown = hashing(policy, &[1, 1, 1, 1]);
        let all = &unknown.view.endpoints;
        let found = new.balancer.choose(&unknown.view, &all[3..], Some(7));
        assert_eq!(found.unwrap().index, 0, "{policy:?}: no table has it yet");
    }
}

/// What Envoy puts there: point 0 of an endpoint is the hash of its key and `_0`, and a hash goes to the next point.
#[test]
fn a_ring_is_envoys() {
    let case = Case::new([spec(1), spec(1)], |cluster| {
        cluster.lb_policy = LbPolicy::RingHash;
        cluster.balancing.ring_size = (2, 2);
    });
    let mut points = [b"e0_0", b"e1_0"].map(|key| xxhash_rust::xxh64::xxh64(key, 0));
    let first = usize::from(points[1] < points[0]);
    points.sort_unstable();
    assert_eq!(by_hash(&case, points[0]), first);
    assert_eq!(by_hash(&case, points[0] + 1), 1 - first);
    assert_eq!(by_hash(&case, points[1] + 1), first, "and round");
}

#[test]
fn a_new_endpoint_gets_little_at_first() {
    for policy in [LbPolicy::RoundRobin, LbPolicy::LeastRequest] {
        let case = Case::new([spec(1), spec(1)], |cluster| {
            cluster.lb_policy = policy;
            cluster.balancing.slow_start = Some(outrigger_xds::resource::cluster::SlowStart {
                window: std::time::Duration::from_millis(100),
                aggression: 1.0,
                min_weight_percent: 25.0,
            });
        });
        // One that always has just come, and one that came with the process.
        case.view.endpoints[0]
            .host
            .since_ms
            .store(u64::MAX, Relaxed);
        while outrigger_filters::endpoints::clock_ms() < 100 {
            std::thread::yield_now();
        }
        assert_eq!(case.spread(50), [10, 40], "{policy:?}: a quarter to one");
    }
}
