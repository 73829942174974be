//! From findings to a verdict: hysteresis both ways, and a way back that takes longer each time. No IO.

use std::time::{Duration, Instant};

/// When a verdict changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Failures in a row until it is unhealthy.
    pub(super) failures: u32,
    /// Successes in a row until it is healthy again.
    pub(super) successes: u32,
    /// It is unhealthy for at least so long, the first time.
    pub(super) hold: Duration,
    /// The longest of these.
    pub(super) hold_max: Duration,
}

/// How a verdict changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Healthy,
    Unhealthy,
}

/// One verdict.
#[derive(Debug)]
pub(super) struct Judge {
    failures: u32,
    successes: u32,
    /// Until when it is unhealthy at least; none is healthy.
    held_until: Option<Instant>,
    /// How often it became unhealthy, without a long time of health between.
    times: u32,
    healthy_since: Instant,
}

impl Judge {
    /// Innocent.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            failures: 0,
            successes: 0,
            held_until: None,
            times: 0,
            healthy_since: now,
        }
    }

    pub(super) fn is_unhealthy(&self) -> bool {
        self.held_until.is_some()
    }

    /// Whether the next finding may change it.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.is_unhealthy() || self.failures > 0
    }

    /// Failures in a row so far.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Another process: what was found is void, but one that was unhealthy has to show that it is well.
    pub(super) fn restart(&mut self, now: Instant) {
        (self.failures, self.successes) = (0, 0);
        self.held_until = self.held_until.map(|until| until.min(now));
    }

    /// It is well.
    pub(super) fn succeeded(&mut self, rules: &Rules, now: Instant) -> Option<Change> {
        self.failures = 0;
        let until = self.held_until?;
        self.successes += 1;
        if self.successes < rules.successes || now < until {
            return None;
        }
        self.held_until = None;
        self.healthy_since = now;
        Some(Change::Healthy)
    }

    /// What was found is void: it worked meanwhile. One that is unhealthy stays so until it is seen to be well.
    pub(super) fn forget(&mut self) {
        self.failures = 0;
    }

    /// It is not.
    pub(super) fn failed(&mut self, rules: &Rules, now: Instant) -> Option<Change> {
        self.successes = 0;
        self.failures = self.failures.saturating_add(1);
        if self.is_unhealthy() || self.failures < rules.failures {
            return None;
        }
        // Health that lasted is forgotten guilt.
        if now.duration_since(self.healthy_since) > rules.hold_max * 2 {
            self.times = 0;
        }
        let hold = rules.hold.saturating_mul(1 << self.times.min(16));
        self.times += 1;
        self.held_until = Some(now + hold.min(rules.hold_max));
        Some(Change::Unhealthy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        failures: 3,
        successes: 2,
        hold: Duration::from_secs(5),
        hold_max: Duration::from_secs(15),
    };

    fn condemn(judge: &mut Judge, now: Instant) -> Option<Change> {
        let changes = (0..RULES.failures).map(|_| judge.failed(&RULES, now));
        changes.last().flatten()
    }

    #[test]
    fn a_verdict_changes_after_enough_in_a_row() {
        let now = Instant::now();
        let mut judge = Judge::new(now);
        for _ in 0..2 {
            assert_eq!(judge.failed(&RULES, now), None);
        }
        assert_eq!(judge.succeeded(&RULES, now), None, "failures are in a row");
        for _ in 0..2 {
            assert_eq!(judge.failed(&RULES, now), None);
        }
        judge.forget();
        for _ in 0..2 {
            assert_eq!(judge.failed(&RULES, now), None, "what was forgotten");
        }
        assert_eq!(judge.failed(&RULES, now), Some(Change::Unhealthy));
        let later = now + RULES.hold;
        assert_eq!(judge.succeeded(&RULES, later), None);
        assert_eq!(judge.failed(&RULES, later), None);
        assert_eq!(judge.succeeded(&RULES, later), None, "successes are, too");
        assert_eq!(judge.succeeded(&RULES, later), Some(Change::Healthy));
    }

    #[test]
    fn each_time_the_way_back_is_longer_until_health_lasted() {
        let mut now = Instant::now();
        let mut judge = Judge::new(now);
        let mut held = |judge: &mut Judge, healthy_for: Duration| {
            now += healthy_for;
            assert_eq!(condemn(judge, now), Some(Change::Unhealthy));
            let begun = now;
            while judge.succeeded(&RULES, now).is_none() {
                now += Duration::from_secs(1);
            }
            (now - begun).as_secs()
        };
        let short = Duration::from_secs(1);
        assert_eq!(held(&mut judge, short), 5);
        assert_eq!(held(&mut judge, short), 10);
        assert_eq!(held(&mut judge, short), 15);
        assert_eq!(held(&mut judge, short), 15, "at most");
        assert_eq!(held(&mut judge, Duration::from_secs(60)), 5);
    }

    #[test]
    fn another_process_need_not_wait_but_must_show_that_it_is_well() {
        let now = Instant::now();
        let mut judge = Judge::new(now);
        condemn(&mut judge, now);
        judge.restart(now);
        assert!(judge.is_unhealthy());
        assert_eq!(judge.succeeded(&RULES, now), None);
        assert_eq!(judge.succeeded(&RULES, now), Some(Change::Healthy));
    }
}
