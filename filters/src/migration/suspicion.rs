//! Whether engines die of a request, or it was only there when they did.
//!
//! Every engine that breaks under a stream is noted for all streams of this proxy. Engines that broke before a request's
//! first token there speak against it. Others that broke at the time speak for it: there is a storm, and it may be chance
//! that the request was always there. But if one other request, suspect itself, was on all those others, they speak for
//! nobody, or two poisons at once would excuse each other.

use super::budget::Shared;
use outrigger_xds::report::EngineId;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A request under which so many engines died before its first token is suspect.
pub(super) const SUSPECT_DEATHS: usize = 2;
/// So many and it is refused, storm or not. Where one death in three is chance, so many in a row are in one of 6,000.
pub(super) const STORM_DEATHS_MAX: usize = 8;
/// What broke so long before a request's first death belongs to the same storm.
const STORM: Duration = Duration::from_secs(10);
/// What streams tell of one engine within this time is one break.
const SAME_BREAK: Duration = Duration::from_secs(2);
/// Breaks that are remembered.
const BREAKS_MAX: usize = 64;
/// Requests that are remembered of one break: where more were, none of them is likely to be why.
const SUSPECTS_MAX: usize = 16;
/// Before the next attempt.
const PAUSE: Duration = Duration::from_millis(100);
/// That pause doubles so often.
const DOUBLINGS_MAX: u32 = 5;

/// An engine broke.
#[derive(Debug)]
struct Break {
    number: u64,
    engine: EngineId,
    at: Instant,
    /// Requests that had no token there, and have none elsewhere yet.
    suspects: Vec<u64>,
    /// It died of a request that was refused for it.
    explained: bool,
}

#[derive(Debug, Default)]
struct Log {
    /// Of breaks, and of requests.
    last_number: u64,
    breaks: VecDeque<Break>,
}

impl Log {
    /// The break of an engine of which was told that it happened then, or up to `late` before.
    fn of(&mut self, engine: &EngineId, at: Instant, late: Duration) -> &mut Break {
        let is_same = |known: &Break| {
            known.engine == *engine
                && at.saturating_duration_since(known.at) < late
                && known.at.saturating_duration_since(at) < SAME_BREAK
        };
        let place = self.breaks.iter().rposition(is_same).unwrap_or_else(|| {
            if self.breaks.len() == BREAKS_MAX {
                self.breaks.pop_front();
            }
            let number = self.new_number();
            self.breaks.push_back(Break {
                number,
                engine: engine.clone(),
                at,
                suspects: Vec::new(),
                explained: false,
            });
            self.breaks.len() - 1
        });
        &mut self.breaks[place]
    }

    fn new_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Whether a request was on more than one engine that broke.
    fn is_suspect(&self, request: u64) -> bool {
        let was_there = |known: &&Break| known.suspects.contains(&request);
        self.breaks.iter().filter(was_there).count() >= SUSPECT_DEATHS
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Break> {
        self.breaks.iter_mut().find(|known| known.number == number)
    }
}

/// Engines that broke under streams of this proxy. Only those that lost an engine come here.
#[derive(Debug, Default)]
pub(super) struct Breaks(Mutex<Log>);

impl Breaks {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An engine broke under a stream that had its first token there.
    pub(super) fn note(&self, engine: &EngineId) {
        self.log().of(engine, Instant::now(), SAME_BREAK);
    }

    /// What is known of engines from others than their streams, and later than by these.
    pub(super) fn learn<'a>(&self, fallen: impl Iterator<Item = (&'a EngineId, Instant)>) {
        let mut log = self.log();
        for (engine, at) in fallen.filter(|(_, at)| at.elapsed() < STORM) {
            log.of(engine, at, STORM);
        }
    }
}

/// One engine that broke before a request's first token. Until that comes, elsewhere, the request may be why.
#[derive(Debug)]
struct Death {
    shared: Arc<Shared>,
    request: u64,
    engine: EngineId,
    at: Instant,
    /// The break's.
    number: u64,
}

impl Drop for Death {
    fn drop(&mut self) {
        if let Some(known) = self.shared.breaks.log().numbered(self.number) {
            known.suspects.retain(|request| *request != self.request);
        }
    }
}

/// What speaks against a request: the engines that broke before its first token there.
#[derive(Debug, Clone, Default)]
pub(super) struct Deaths {
    all: Vec<Arc<Death>>,
    /// It ran alone among suspects when it ran last.
    ran_alone: bool,
}

impl Deaths {
    pub(super) fn add(
        &mut self,
        shared: &Arc<Shared>,
        engines: impl IntoIterator<Item = (EngineId, Instant)>,
    ) {
        for (engine, at) in engines {
            let mut log = shared.breaks.log();
            let before = self.all.first().map(|death| death.request);
            let request = before.unwrap_or_else(|| log.new_number());
            let known = log.of(&engine, at, SAME_BREAK);
            if known.suspects.len() < SUSPECTS_MAX && !known.suspects.contains(&request) {
                known.suspects.push(request);
            }
            let number = known.number;
            drop(log);
            self.all.push(Arc::new(Death {
                shared: shared.clone(),
                request,
                engine,
                at,
                number,
            }));
        }
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// It had a token: nothing speaks against it any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// How it runs next.
    pub(super) fn runs(&mut self, alone: bool) {
        self.ran_alone = alone;
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.count() >= SUSPECT_DEATHS
    }

    pub(super) fn ran_alone(&self) -> bool {
        self.ran_alone
    }

    /// The engine to pass over.
    pub(super) fn last(&self) -> Option<&EngineId> {
        self.all.last().map(|death| &death.engine)
    }

    /// So many more engines may die of it in one call.
    pub(super) fn left(&self) -> usize {
        SUSPECT_DEATHS.saturating_sub(self.count()).max(1)
    }

    /// Whether engines broke at the time that this request was not on, and not all of them under one other suspect.
    pub(super) fn in_storm(&self, shared: &Shared) -> bool {
        let first = self.all.first().map_or_else(Instant::now, |death| death.at);
        let was_there = |known: &Break| self.all.iter().any(|death| death.number == known.number);
        let log = shared.breaks.log();
        let mut others = log.breaks.iter().filter(|known| {
            let at_the_time = first.saturating_duration_since(known.at) < STORM;
            at_the_time && !known.explained && !was_there(known)
        });
        let Some(one) = others.next() else {
            return false;
        };
        !one.suspects.iter().any(|request| {
            let mut rest = others.clone();
            log.is_suspect(*request) && rest.all(|known| known.suspects.contains(request))
        })
    }

    /// More would be too many, whatever the reason.
    pub(super) fn are_too_many(&self) -> bool {
        self.count() >= STORM_DEATHS_MAX
    }

    /// Also when it ran alone an engine died.
    pub(super) fn died_alone(&self) -> bool {
        self.ran_alone && self.count() > SUSPECT_DEATHS
    }

    /// It is refused, and why these engines broke is known.
    pub(super) fn convict(&self, shared: &Shared) {
        metrics::counter!("outrigger_migration_poison_total").increment(1);
        let mut log = shared.breaks.log();
        for death in &self.all {
            if let Some(known) = log.numbered(death.number) {
                known.explained = true;
            }
        }
    }

    /// Before the next attempt; each death doubles it.
    pub(super) fn pause(&self) -> Duration {
        let doublings = u32::try_from(self.count().saturating_sub(1)).unwrap_or(u32::MAX);
        PAUSE * (1 << doublings.min(DOUBLINGS_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(name: &str) -> EngineId {
        EngineId(name.into())
    }

    fn is_poison(deaths: &Deaths, shared: &Shared) -> bool {
        deaths.are_too_many() || deaths.died_alone() && !deaths.in_storm(shared)
    }

    fn dead(shared: &Arc<Shared>, engines: &[&str]) -> Deaths {
        let mut deaths = Deaths::default();
        let now = Instant::now();
        deaths.add(shared, engines.iter().map(|name| (engine(name), now)));
        deaths.runs(true);
        deaths
    }

    #[test]
    fn in_calm_a_third_death_convicts() {
        let shared = Arc::<Shared>::default();
        // Streams that were there, too.
        for name in ["a", "b", "c"] {
            shared.breaks.note(&engine(name));
        }
        assert!(!is_poison(&dead(&shared, &["a", "b"]), &shared));
        let mut deaths = dead(&shared, &["a", "b", "c"]);
        assert!(is_poison(&deaths, &shared));
        deaths.runs(false);
        assert!(!is_poison(&deaths, &shared), "it never ran alone");
    }

    #[test]
    fn in_a_storm_it_takes_more() {
        let shared = Arc::<Shared>::default();
        let mut deaths = dead(&shared, &["a", "b", "c"]);
        shared.breaks.note(&engine("d"));
        while deaths.count() < STORM_DEATHS_MAX {
            assert!(deaths.in_storm(&shared) && !is_poison(&deaths, &shared));
            deaths.add(&shared, [(engine("a"), Instant::now())]);
        }
        assert!(deaths.in_storm(&shared) && is_poison(&deaths, &shared));
        deaths.clear();
        assert!(!is_poison(&deaths, &shared));
    }

    #[test]
    fn suspects_do_not_excuse_each_other() {
        let shared = Arc::<Shared>::default();
        let one = dead(&shared, &["a", "b", "c"]);
        let two = dead(&shared, &["d", "e", "f"]);
        assert!(is_poison(&one, &shared) && is_poison(&two, &shared));
        let again = two.clone();
        drop(two);
        assert!(is_poison(&one, &shared), "the other is suspect still");
        drop(again);
        assert!(
            !is_poison(&one, &shared),
            "the other had a token in the end"
        );
        let two = dead(&shared, &["d", "e", "f"]);
        two.convict(&shared);
        drop(two);
        assert!(is_poison(&one, &shared), "they died of the other");
    }

    #[test]
    fn many_suspects_are_a_storm() {
        let shared = Arc::<Shared>::default();
        let one = dead(&shared, &["a", "b", "c"]);
        let two = dead(&shared, &["d", "e"]);
        let three = dead(&shared, &["f"]);
        assert!(
            !is_poison(&one, &shared),
            "no other was on all of d, e and f"
        );
        drop(three);
        shared.breaks.log().breaks.pop_back();
        assert!(is_poison(&one, &shared));
        drop(two);
        let _there_once = dead(&shared, &["e"]);
        assert!(
            !is_poison(&one, &shared),
            "who lost one engine is no suspect"
        );
    }

    #[test]
    fn what_is_told_later_is_the_same_break() {
        let shared = Arc::<Shared>::default();
        let (own, other) = (engine("a"), engine("d"));
        let deaths = dead(&shared, &["a", "b", "c"]);
        let now = Instant::now();
        let later = now + SAME_BREAK;
        shared.breaks.learn([(&own, later)].into_iter());
        assert!(is_poison(&deaths, &shared));
        let long_ago = now.checked_sub(STORM).map(|at| (&other, at));
        shared.breaks.learn(long_ago.into_iter());
        assert!(is_poison(&deaths, &shared));
        shared.breaks.learn([(&other, now)].into_iter());
        assert!(!is_poison(&deaths, &shared));
    }

    #[test]
    fn breaks_are_few_and_their_numbers_safe() {
        let shared = Arc::<Shared>::default();
        let deaths = dead(&shared, &["old", "old"]);
        for at in 0..2 * BREAKS_MAX {
            shared.breaks.note(&engine(&at.to_string()));
            shared.breaks.note(&engine(&at.to_string()));
        }
        assert_eq!(shared.breaks.log().breaks.len(), BREAKS_MAX);
        assert!(deaths.in_storm(&shared));
    }

    #[test]
    fn pauses_double_and_end() {
        let shared = Arc::<Shared>::default();
        let mut deaths = Deaths::default();
        let mut pauses = Vec::new();
        for _ in 0..STORM_DEATHS_MAX {
            pauses.push(deaths.pause().as_millis());
            deaths.add(&shared, [(engine("a"), Instant::now())]);
        }
        assert_eq!(pauses, [100, 100, 200, 400, 800, 1600, 3200, 3200]);
    }
}
