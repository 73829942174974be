//! What a probe's outcome is worth beside what else was seen: a busy engine is not broken. No IO.

use super::Asked;
use std::time::Duration;

/// An engine whose figures do not show that it works may let a probe wait for its requests, for so long.
const BLIND_WAIT_MAX: Duration = Duration::from_secs(120);

/// What was seen beside a probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// The engine did something else meanwhile.
    pub(super) moved: bool,
    /// It has requests.
    pub(super) serves: bool,
    /// It has no figures that would show it at work.
    pub(super) blind: bool,
    /// So long nothing proved that it works.
    pub(super) quiet: Duration,
}

impl Seen {
    /// What comes of a probe; none is one that got nothing in time. A busy engine is not broken.
    pub(super) fn weigh(self, asked: Option<Asked>, patience: Duration) -> Asked {
        let late = || format!("no token within {patience:?}");
        match asked {
            Some(Asked::Busy(why)) if !self.moved && !self.serves => Asked::Failed(why),
            Some(asked) => asked,
            None if self.moved || self.hides_work() => Asked::Busy(late()),
            None => Asked::Failed(late()),
        }
    }

    fn hides_work(self) -> bool {
        self.serves && self.blind && self.quiet < BLIND_WAIT_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: Seen = Seen {
        moved: false,
        serves: false,
        blind: false,
        quiet: Duration::from_secs(5),
    };

    fn is_failure(seen: Seen, asked: Option<Asked>) -> bool {
        let weighed = seen.weigh(asked, Duration::from_secs(3));
        matches!(weighed, Asked::Failed(_))
    }

    #[test]
    fn an_engine_that_has_requests_may_be_too_busy_for_a_probe() {
        let busy = || Some(Asked::Busy("answered 429".into()));
        assert!(is_failure(SEEN, busy()));
        let serves = Seen {
            serves: true,
            ..SEEN
        };
        assert!(!is_failure(serves, busy()));
        let moved = Seen {
            moved: true,
            ..SEEN
        };
        assert!(!is_failure(moved, busy()) && !is_failure(moved, None));
    }

    #[test]
    fn an_engine_that_is_not_seen_at_work_gets_longer_for_its_requests() {
        let serves = Seen {
            serves: true,
            ..SEEN
        };
        assert!(is_failure(serves, None), "it would be seen");
        let blind = Seen {
            blind: true,
            ..serves
        };
        assert!(!is_failure(blind, None));
        let long = Seen {
            quiet: BLIND_WAIT_MAX,
            ..blind
        };
        assert!(is_failure(long, None), "not for ever");
        let idle = Seen {
            serves: false,
            ..blind
        };
        assert!(is_failure(idle, None));
    }
}
