//! What makes an outlier, and who is ejected for it.

use super::*;
use outrigger_xds::report::{EngineState, Model};
use outrigger_xds::resource::latency_monitor::LatencyMonitor;

fn config() -> OutlierDetection {
    let rule = |count, enforcing| Rule { count, enforcing };
    OutlierDetection {
        consecutive_5xx: rule(3, 100),
        consecutive_gateway_failure: rule(2, 0),
        consecutive_local_origin_failure: rule(2, 100),
        split_external_local_origin_errors: false,
        interval: Duration::from_secs(10),
        base_ejection_time: Duration::from_secs(3600),
        max_ejection_time: Duration::from_secs(7200),
        max_ejection_percent: 40,
        always_eject_one_host: false,
        enforcing_success_rate: 100,
        success_rate_minimum_hosts: 3,
        success_rate_request_volume: 10,
        success_rate_stdev_factor: 1000,
        enforcing_local_origin_success_rate: 100,
        failure_percentage_threshold: 60,
        enforcing_failure_percentage: 0,
        enforcing_failure_percentage_local_origin: 0,
        failure_percentage_minimum_hosts: 2,
        failure_percentage_request_volume: 20,
        max_ejection_time_jitter: Duration::ZERO,
        uneject_by_health_check: true,
        latency: None,
    }
}

fn endpoints(count: usize) -> Vec<Arc<Endpoint>> {
    (0..count)
        .map(|at| {
            Arc::new(Endpoint {
                id: format!("e{at}").as_str().into(),
                weight: 1,
                cluster: "outliers".into(),
                slot: at,
                ..Endpoint::default()
            })
        })
        .collect()
}

fn case(config: &OutlierDetection, count: usize) -> (Detector, Vec<Arc<Endpoint>>) {
    let detector = Detector::new(config, "outliers", None);
    let endpoints = endpoints(count);
    detector.members(&endpoints);
    (detector, endpoints)
}

fn ejected(endpoints: &[Arc<Endpoint>]) -> Vec<usize> {
    let all = endpoints.iter().enumerate();
    all.filter(|(_, endpoint)| is_ejected(&endpoint.host))
        .map(|(at, _)| at)
        .collect()
}

#[test]
fn failures_in_a_row_eject_and_a_success_between_does_not() {
    let (detector, endpoints) = case(&config(), 5);
    for status in [500, 500, 200, 500, 500] {
        detector.status(&endpoints[0], status);
    }
    assert!(ejected(&endpoints).is_empty());
    detector.broken(&endpoints[0], Flag::DownstreamConnectionTermination);
    assert!(ejected(&endpoints).is_empty(), "the client's fault");
    detector.broken(&endpoints[0], Flag::UpstreamConnectionFailure);
    assert_eq!(ejected(&endpoints), [0], "counts as 503");
}

#[test]
fn no_more_are_ejected_than_the_share_and_rules_that_enforce_nothing_eject_nobody() {
    let (detector, endpoints) = case(&config(), 5);
    for endpoint in &endpoints {
        for _ in 0..2 {
            detector.status(endpoint, 503);
        }
    }
    assert!(ejected(&endpoints).is_empty(), "gateway failures: 0 %");
    for endpoint in &endpoints {
        detector.status(endpoint, 503);
    }
    assert_eq!(ejected(&endpoints), [0, 1]);
    // One of two is more than that.
    let (detector, endpoints) = case(&config(), 2);
    for _ in 0..3 {
        detector.status(&endpoints[0], 500);
    }
    assert!(ejected(&endpoints).is_empty());
    let none = OutlierDetection {
        max_ejection_percent: 0,
        ..config()
    };
    for (always, wanted) in [(false, vec![]), (true, vec![0])] {
        let (detector, endpoints) = case(
            &OutlierDetection {
                always_eject_one_host: always,
                ..none.clone()
            },
            3,
        );
        for endpoint in &endpoints {
            for _ in 0..3 {
                detector.status(endpoint, 500);
            }
        }
        assert_eq!(ejected(&endpoints), wanted);
    }
}

#[test]
fn local_failures_are_counted_apart_if_asked() {
    let split = OutlierDetection {
        split_external_local_origin_errors: true,
        ..config()
    };
    let (detector, endpoints) = case(&split, 3);
    detector.broken(&endpoints[0], Flag::UpstreamConnectionFailure);
    detector.status(&endpoints[0], 500);
    detector.broken(&endpoints[0], Flag::UpstreamConnectionFailure);
    assert!(ejected(&endpoints).is_empty(), "an answer came between");
    detector.broken(&endpoints[0], Flag::UpstreamRequestTimeout);
    assert_eq!(ejected(&endpoints), [0]);
}

#[test]
fn ejections_grow_longer_and_are_forgotten_by_and_by() {
    let (detector, endpoints) = case(&config(), 3);
    let record = &endpoints[0].host.record;
    let eject = || (0..3).for_each(|_| detector.status(&endpoints[0], 500));
    eject();
    detector.look(&endpoints);
    assert_eq!(ejected(&endpoints), [0], "an hour is not over");
    let short = OutlierDetection {
        base_ejection_time: Duration::from_millis(1),
        max_ejection_time: Duration::from_millis(1),
        ..config()
    };
    let quick = Detector::new(&short, "outliers", Some(&detector));
    std::thread::sleep(Duration::from_millis(5));
    quick.look(&endpoints);
    assert!(ejected(&endpoints).is_empty());
    assert_eq!(record.ejections.load(Relaxed), 1);
    eject();
    assert_eq!(record.ejections.load(Relaxed), 2, "twice as long now");
    std::thread::sleep(Duration::from_millis(5));
    for left in [2, 1, 0, 0] {
        quick.look(&endpoints);
        assert_eq!(record.ejections.load(Relaxed), left);
    }
}

fn outcomes(of: &Outcomes, well: u64, bad: u64) {
    (0..well).for_each(|_| of.count(true));
    (0..bad).for_each(|_| of.count(false));
}

#[test]
fn who_fails_too_often_is_ejected_however_the_others_fare() {
    let percentage = OutlierDetection {
        enforcing_success_rate: 0,
        enforcing_failure_percentage: 100,
        max_ejection_percent: 100,
        ..config()
    };
    let (detector, endpoints) = case(&percentage, 4);
    let look = |of: [(u64, u64); 4]| {
        for (endpoint, (well, bad)) in endpoints.iter().zip(of) {
            outcomes(&endpoint.host.record.answered, well, bad);
        }
        detector.look(&endpoints);
    };
    look([(0, 19), (0, 19), (20, 0), (0, 19)]);
    assert!(ejected(&endpoints).is_empty(), "one has the volume");
    look([(41, 59), (40, 60), (0, 100), (0, 19)]);
    assert_eq!(ejected(&endpoints), [1, 2]);
}

#[test]
fn rates_at_which_endpoints_are_reached_count_where_they_are_apart() {
    for (split, wanted) in [(true, vec![1]), (false, vec![])] {
        let config = OutlierDetection {
            split_external_local_origin_errors: split,
            ..config()
        };
        let (detector, endpoints) = case(&config, 4);
        for (at, endpoint) in endpoints.iter().enumerate() {
            let bad = if at == 1 { 50 } else { 0 };
            outcomes(&endpoint.host.record.local, 50, bad);
        }
        detector.look(&endpoints);
        assert_eq!(ejected(&endpoints), wanted, "{split}");
    }
}

#[test]
fn an_ejection_lasts_longer_by_its_jitter() {
    let jittery = OutlierDetection {
        base_ejection_time: Duration::from_millis(1),
        max_ejection_time: Duration::from_millis(1),
        max_ejection_percent: 100,
        max_ejection_time_jitter: Duration::from_secs(3600),
        ..config()
    };
    let (detector, endpoints) = case(&jittery, 1);
    (0..3).for_each(|_| detector.status(&endpoints[0], 500));
    let jitter = &endpoints[0].host.record.jitter_ms;
    assert!(jitter.load(Relaxed) < 3_600_000);
    jitter.store(1_000_000, Relaxed);
    std::thread::sleep(Duration::from_millis(5));
    detector.look(&endpoints);
    assert_eq!(ejected(&endpoints), [0]);
    jitter.store(0, Relaxed);
    detector.look(&endpoints);
    assert!(ejected(&endpoints).is_empty());
}

/// Milliseconds to the first token, uncached tokens of the prompt, milliseconds to later ones: of each endpoint.
type Spec = &'static [(u64, u64, u64)];

/// What it is, samples of each endpoint, what they say, who is ejected.
const SLOW: [(&str, usize, Spec, &[usize]); 8] = [
    (
        "alike",
        10,
        &[(300, 100, 20), (310, 100, 22), (320, 100, 25)],
        &[],
    ),
    (
        "late first tokens",
        10,
        &[(300, 100, 20), (310, 100, 22), (2_000, 100, 25)],
        &[2],
    ),
    (
        "a long prompt is no failure",
        10,
        &[(300, 100, 20), (310, 100, 22), (2_000, 4_096, 25)],
        &[],
    ),
    (
        "a floor for first tokens",
        10,
        &[(10, 100, 20), (10, 100, 22), (150, 100, 25)],
        &[],
    ),
    (
        "late later tokens",
        10,
        &[(300, 100, 20), (310, 100, 80), (310, 100, 22)],
        &[1],
    ),
    (
        "a floor for later tokens",
        10,
        &[(300, 100, 5), (310, 100, 40), (310, 100, 6)],
        &[],
    ),
    (
        "too few samples",
        9,
        &[(300, 100, 20), (310, 100, 22), (9_000, 100, 900)],
        &[],
    ),
    ("one of two", 10, &[(300, 100, 20), (9_000, 100, 900)], &[1]),
];

fn by_latency() -> OutlierDetection {
    OutlierDetection {
        latency: Some(LatencyMonitor {
            request_volume: 10,
            ttft_floor_ms: 200,
            ..LatencyMonitor::default()
        }),
        max_ejection_percent: 100,
        ..config()
    }
}

#[test]
fn an_endpoint_far_slower_than_its_cluster_is_ejected() {
    let millis = Duration::from_millis;
    for (name, count, spec, wanted) in SLOW {
        let (detector, endpoints) = case(&by_latency(), spec.len());
        for (endpoint, (ttft, tokens, itl)) in endpoints.iter().zip(spec) {
            for _ in 0..count {
                detector.first_token(endpoint, millis(*ttft), *tokens);
                detector.later_token(endpoint, millis(*itl));
            }
        }
        detector.look(&endpoints);
        assert_eq!(ejected(&endpoints), wanted, "{name}");
    }
}

#[test]
fn the_last_endpoint_is_not_ejected_for_being_slow() {
    let (detector, endpoints) = case(&by_latency(), 2);
    (0..3).for_each(|_| detector.status(&endpoints[0], 500));
    for _ in 0..10 {
        detector.first_token(&endpoints[0], Duration::from_millis(10), 1);
        detector.first_token(&endpoints[1], Duration::from_millis(9_000), 1);
    }
    detector.look(&endpoints);
    assert_eq!(ejected(&endpoints), [0]);
}

#[test]
fn latencies_are_compared_among_endpoints_that_serve_the_same_models() {
    let config = OutlierDetection {
        latency: Some(LatencyMonitor {
            request_volume: 10,
            ..LatencyMonitor::default()
        }),
        max_ejection_percent: 100,
        ..config()
    };
    // Two small ones, one of them slow, and a large one that is slower than both.
    let spec = [
        ("small", 20, false),
        ("small", 2_000, false),
        ("large", 9_000, false),
    ];
    let alone = [("a", 20, false), ("b", 9_000, false), ("b", 20, true)];
    for (spec, wanted) in [(spec, vec![1]), (alone, vec![2])] {
        let (detector, endpoints) = case(&config, spec.len());
        for (endpoint, (model, waited, out)) in endpoints.iter().zip(spec) {
            let mut live = (**endpoint.live.load()).clone();
            let model = Model {
                id: model.into(),
                ..Model::default()
            };
            live.state = Arc::new(EngineState {
                models: vec![model],
                ..EngineState::default()
            });
            endpoint.live.store(Arc::new(live));
            for _ in 0..10 {
                detector.later_token(endpoint, Duration::from_millis(waited));
            }
            (0..if out { 3 } else { 0 }).for_each(|_| detector.status(endpoint, 500));
        }
        detector.look(&endpoints);
        assert_eq!(ejected(&endpoints), wanted);
    }
}

#[test]
fn a_success_rate_far_below_the_others_ejects() {
    let (detector, endpoints) = case(&config(), 4);
    let send = |volume: u64, bad: u64| {
        for (at, endpoint) in endpoints.iter().enumerate() {
            let well = if at == 2 { volume - bad } else { volume };
            outcomes(&endpoint.host.record.answered, well, volume - well);
        }
        detector.look(&endpoints);
    };
    send(9, 9);
    assert!(ejected(&endpoints).is_empty(), "too few requests to tell");
    send(100, 0);
    assert!(ejected(&endpoints).is_empty(), "all alike");
    send(100, 50);
    assert_eq!(ejected(&endpoints), [2]);
}
