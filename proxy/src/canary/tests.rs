//! Cases of verdicts, questions and their patience, without a network.

use super::*;
use crate::ledger::Ledgers;
use outrigger_filters::kv_index::{KvIndex, Limits};
use outrigger_xds::resource::canary::Golden;

const RULES: Rules = Rules {
    failures: 3,
    successes: 2,
    hold: Duration::from_secs(5),
    hold_max: Duration::from_secs(60),
};

fn fleet() -> Arc<Fleet> {
    Fleet::new(Arc::new(KvIndex::new(Limits::default())), 32)
}

fn with_watched<T>(then: impl FnOnce(Watched<'_>) -> T) -> T {
    let (check, endpoint) = (crate::bootstrap::canary(), Arc::<Endpoint>::default());
    then(Watched {
        check: &check,
        endpoint: &endpoint,
        ledger: Ledgers::default().open(&endpoint.id),
    })
}

fn canary() -> Canary {
    with_watched(|watched| {
        let settings = Arc::new(ArcSwap::from_pointee(watched.check.clone()));
        Canary::new(&fleet(), &watched, settings, None)
    })
}

fn condemn(judge: &mut Judge, now: Instant) {
    for _ in 0..RULES.failures {
        judge.failed(&RULES, now);
    }
    assert!(judge.is_unhealthy());
}

#[tokio::test]
async fn requests_count_their_pieces_only_while_a_canary_runs() {
    let canaries = Canaries::default();
    with_watched(|watched| {
        let ledger = watched.ledger.clone();
        assert!(!ledger.traffic.is_watched());
        canaries.configure(&fleet(), std::iter::once(watched));
        assert!(ledger.traffic.is_watched());
        canaries.configure(&fleet(), std::iter::empty());
        assert!(!ledger.traffic.is_watched());
    });
}

#[tokio::test]
async fn probes_that_fail_while_requests_get_something_convict_nobody() {
    let mut canary = canary();
    let mut now = Instant::now();
    for _ in 0..2 * RULES.failures {
        canary.failed("answered 500", &RULES, now, now);
        now += Duration::from_secs(1);
        canary.ledger.traffic.piece();
        let traffic = &canary.ledger.traffic;
        canary.watch.look(&Live::default(), traffic, now);
        now += Duration::from_secs(1);
    }
    assert!(!canary.answers.is_unhealthy());
    for _ in 0..=RULES.failures {
        canary.failed("answered 500", &RULES, now, now);
    }
    assert!(canary.answers.is_unhealthy(), "nothing moves any more");
}

#[tokio::test]
async fn an_engine_that_refuses_to_be_asked_has_no_verdict() {
    let mut canary = canary();
    let now = Instant::now();
    condemn(&mut canary.answers, now);
    for _ in 1..REFUSALS_MAX {
        canary.refused("answered 401", now);
        assert!(canary.answers.is_unhealthy());
    }
    canary.refused("answered 401", now);
    assert!(!canary.answers.is_unhealthy());
    condemn(&mut canary.answers, now);
    (canary.refusals, canary.is_restarted) = (0, true);
    canary.refused("answered 404", now);
    assert!(!canary.answers.is_unhealthy(), "another process, perhaps");
}

#[test]
fn a_probe_that_took_long_does_not_end_all_probing() {
    let (check, config) = (crate::bootstrap::canary(), Config::default());
    let rest = |millis| rest(&check, &config, Duration::from_millis(millis));
    assert_eq!(rest(1), check.unhealthy_interval);
    assert_eq!(rest(100), Duration::from_millis(4_900));
    assert_eq!(rest(20_000), REST_MAX);
}

#[tokio::test]
async fn an_engine_that_nobody_uses_is_left_alone_for_longer() {
    let mut canary = canary();
    let (check, config) = (crate::bootstrap::canary(), Config::default());
    let begun = Instant::now();
    let (free, busy) = (
        Load::default(),
        Load {
            active_requests: 1,
            ..Load::default()
        },
    );
    let due = |canary: &Canary, load: &Load, after: Duration| {
        canary.is_due(&check, &config, load, begun + after)
    };
    (canary.proved_at, canary.free_at) = (begun, begun);
    canary.patience.asked();
    assert!(due(&canary, &free, check.interval), "never asked");
    canary.well_at = Some(begun);
    assert!(!due(&canary, &free, check.no_traffic_interval / 2));
    assert!(due(&canary, &free, check.no_traffic_interval));
    // A request came late, and may take its time.
    canary.free_at = begun + check.no_traffic_interval / 2;
    assert!(!due(&canary, &busy, check.no_traffic_interval / 2));
    assert!(due(
        &canary,
        &busy,
        check.no_traffic_interval / 2 + check.timeout
    ));
    canary.ledger.traffic.piece();
    let later = begun + Duration::from_millis(1);
    canary
        .watch
        .look(&Live::default(), &Traffic::default(), begun);
    canary
        .watch
        .look(&Live::default(), &canary.ledger.traffic, later);
    assert!(due(&canary, &free, check.interval), "it was used");
}

#[tokio::test]
async fn wrong_answers_that_are_only_reported_now_are_no_verdict() {
    let mut canary = canary();
    condemn(&mut canary.truth, Instant::now());
    canary.tell();
    assert!(canary.ledger.verdict().unhealthy.is_some());
    let enforcing = |enforcing| Config {
        golden: Golden {
            enforcing,
            ..Golden::default()
        },
        ..Config::default()
    };
    canary.obey(&enforcing(Enforcing::Eject));
    assert!(canary.ledger.verdict().unhealthy.is_some());
    canary.obey(&enforcing(Enforcing::Report));
    assert_eq!(canary.ledger.verdict().unhealthy, None);
}

#[tokio::test]
async fn another_process_said_nothing_yet() {
    let mut canary = canary();
    canary.told.golden = Some(GoldenAnswer::default());
    let state = EngineState {
        health: Health::Healthy,
        ..EngineState::default()
    };
    let live = Live {
        heard: true,
        state: Arc::new(state),
        ..Live::default()
    };
    assert!(canary.look(&live));
    assert_eq!(canary.ledger.verdict().golden, None);
    assert_eq!(canary.told.golden, None);
}
