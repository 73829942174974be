//! Whether engines die of a request, or it was only there when they did.
//!
//! Every engine that breaks under a stream is noted for all streams of this proxy. Engines that broke before a request's
//! first token there speak against it. Others that broke at the time speak for it: there is a storm, and it may be chance
//! that the request was always there. But if one other request, suspect itself, was on all those others, they speak for
//! nobody, or two poisons at once would excuse each other.

use super::budget::Shared;
use crate::filter::Loss;
use outrigger_xds::report::EngineId;
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A request under which so many engines died before its first token is suspect.
pub(super) const SUSPECT_DEATHS: usize = 2;
/// So many and it is refused, storm or not. Where one death in three is chance, so many in a row are in one of 6,000.
pub(super) const STORM_DEATHS_MAX: usize = 8;
/// What broke so long before a request's first death belongs to the same storm. Feeds tell of a break so much sooner or later
/// than streams.
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
    /// No stream broke with it so far: feeds told of it.
    told: bool,
    /// Requests that had no token there, and none elsewhere since.
    suspects: Vec<u64>,
    /// It died of a request that was refused for it.
    explained: bool,
}

impl Break {
    /// What happens to its engine so much sooner or later is due to it.
    fn span(&self) -> Duration {
        if self.told { STORM } else { SAME_BREAK }
    }
}

#[derive(Debug, Default)]
struct Log {
    /// Of breaks, and of requests.
    last_number: u64,
    breaks: VecDeque<Break>,
}

impl Log {
    /// The break of an engine with which a stream broke then.
    fn seen(&mut self, engine: &EngineId, at: Instant) -> &mut Break {
        let is_same = |known: &Break| known.engine == *engine && apart(known.at, at) < known.span();
        let place = self.breaks.iter().rposition(is_same);
        let place = place.unwrap_or_else(|| self.add(engine, at));
        let known = &mut self.breaks[place];
        if known.told {
            known.told = false;
            known.at = at;
        }
        known
    }

    /// A feed told that an engine broke then. If a stream broke with it about that time, that is known already.
    fn hear(&mut self, engine: &EngineId, at: Instant) {
        let is_same = |known: &Break| known.engine == *engine && apart(known.at, at) < STORM;
        if !self.breaks.iter().any(is_same) {
            let place = self.add(engine, at);
            self.breaks[place].told = true;
        }
    }

    fn add(&mut self, engine: &EngineId, at: Instant) -> usize {
        if self.breaks.len() == BREAKS_MAX {
            self.breaks.pop_front();
        }
        let number = self.new_number();
        self.breaks.push_back(Break {
            number,
            engine: engine.clone(),
            at,
            told: false,
            suspects: Vec::new(),
            explained: false,
        });
        self.breaks.len() - 1
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

fn apart(one: Instant, other: Instant) -> Duration {
    one.max(other) - one.min(other)
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
        self.log().seen(engine, Instant::now());
    }

    /// Of these, those that died.
    pub(super) fn note_all(&self, losses: impl Iterator<Item = Loss>) {
        losses
            .filter(|loss| loss.died)
            .for_each(|loss| self.note(&loss.engine));
    }

    /// What is known of engines from others than their streams.
    pub(super) fn learn<'a>(&self, fallen: impl Iterator<Item = (&'a EngineId, Instant)>) {
        let lately: Vec<_> = fallen.filter(|(_, at)| at.elapsed() < STORM).collect();
        if lately.is_empty() {
            return;
        }
        let mut log = self.log();
        for (engine, at) in lately {
            log.hear(engine, at);
        }
    }
}

/// One engine that broke before a request's first token. Until that comes, elsewhere, the request may be why.
#[derive(Debug, Clone)]
struct Death {
    engine: EngineId,
    at: Instant,
    /// The break's.
    number: u64,
}

/// What speaks against a request: the engines that broke before its first token there.
#[derive(Debug, Clone, Default)]
pub(super) struct Deaths {
    all: Vec<Death>,
    /// Engines that failed it in other ways. If they break, too, it may be why.
    failed: Vec<(EngineId, Instant)>,
    /// The request's number, once an engine died.
    request: Option<u64>,
    /// It ran alone among suspects when it ran last.
    ran_alone: bool,
}

impl Deaths {
    pub(super) fn add(&mut self, shared: &Shared, losses: impl IntoIterator<Item = Loss>) {
        for Loss { engine, at, died } in losses {
            if !died {
                self.failed.push((engine, at));
                continue;
            }
            let mut log = shared.breaks.log();
            let request = *self.request.get_or_insert_with(|| log.new_number());
            let known = log.seen(&engine, at);
            if known.suspects.len() < SUSPECTS_MAX && !known.suspects.contains(&request) {
                known.suspects.push(request);
            }
            let number = known.number;
            self.all.push(Death { engine, at, number });
        }
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// It had a token: nothing speaks against it any more. Of one that ended without it stays known where it was, for it may be
    /// sent again.
    pub(super) fn clear(&mut self, shared: &Shared) {
        let cleared = std::mem::take(self);
        let Some(request) = cleared.request else {
            return;
        };
        let mut log = shared.breaks.log();
        for death in &cleared.all {
            if let Some(known) = log.numbered(death.number) {
                known.suspects.retain(|suspect| *suspect != request);
            }
        }
    }

    /// Whether there is nothing to clear.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.failed.is_empty()
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
        let was_there = |known: &Break| {
            let failed_then = |(engine, at): &(EngineId, Instant)| {
                *engine == known.engine && apart(known.at, *at) < known.span()
            };
            self.all.iter().any(|death| death.number == known.number)
                || self.failed.iter().any(failed_then)
        };
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

    /// Whether the request is refused for them.
    pub(super) fn is_poison(&self, shared: &Shared) -> bool {
        self.are_too_many() || self.died_alone() && !self.in_storm(shared)
    }

    /// More would be too many, whatever the reason.
    pub(super) fn are_too_many(&self) -> bool {
        self.count() >= STORM_DEATHS_MAX
    }

    /// Also when it ran alone an engine died.
    fn died_alone(&self) -> bool {
        self.ran_alone && self.count() > SUSPECT_DEATHS
    }

    /// It is refused, and why these engines broke is known.
    pub(super) fn convict(&self, shared: &Shared, request_id: &str) {
        metrics::counter!("outrigger_migration_poison_total").increment(1);
        let engines: Vec<_> = self.all.iter().map(|death| &death.engine).collect();
        tracing::warn!(
            request_id,
            ?engines,
            ran_alone = self.ran_alone,
            "a request is refused: these engines died before its first token there, and no others that would explain it"
        );
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
    use std::sync::Arc;

    fn engine(name: &str) -> EngineId {
        EngineId(name.into())
    }

    fn loss(name: &str, died: bool) -> Loss {
        Loss {
            engine: engine(name),
            at: Instant::now(),
            died,
        }
    }

    fn dead(shared: &Shared, engines: &[&str]) -> Deaths {
        let mut deaths = Deaths::default();
        deaths.add(shared, engines.iter().map(|name| loss(name, true)));
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
        assert!(!dead(&shared, &["a", "b"]).is_poison(&shared));
        let mut deaths = dead(&shared, &["a", "b", "c"]);
        assert!(deaths.is_poison(&shared));
        deaths.runs(false);
        assert!(!deaths.is_poison(&shared), "it never ran alone");
    }

    #[test]
    fn in_a_storm_it_takes_more() {
        let shared = Arc::<Shared>::default();
        let mut deaths = dead(&shared, &["a", "b", "c"]);
        shared.breaks.note(&engine("d"));
        while deaths.count() < STORM_DEATHS_MAX {
            assert!(deaths.in_storm(&shared) && !deaths.is_poison(&shared));
            deaths.add(&shared, [loss("a", true)]);
        }
        assert!(deaths.in_storm(&shared) && deaths.is_poison(&shared));
        deaths.clear(&shared);
        assert!(!deaths.is_poison(&shared));
    }

    #[test]
    fn suspects_do_not_excuse_each_other() {
        let shared = Arc::<Shared>::default();
        let one = dead(&shared, &["a", "b", "c"]);
        let mut two = dead(&shared, &["d", "e", "f"]);
        assert!(one.is_poison(&shared) && two.is_poison(&shared));
        drop(two.clone());
        assert!(
            one.is_poison(&shared),
            "its client left, and may send it again"
        );
        two.clear(&shared);
        assert!(!one.is_poison(&shared), "the other had a token in the end");
        let two = dead(&shared, &["d", "e", "f"]);
        two.convict(&shared, "two");
        assert!(one.is_poison(&shared), "they died of the other");
    }

    #[test]
    fn many_suspects_are_a_storm() {
        let shared = Arc::<Shared>::default();
        let one = dead(&shared, &["a", "b", "c"]);
        let mut two = dead(&shared, &["d", "e"]);
        let mut three = dead(&shared, &["f"]);
        assert!(!one.is_poison(&shared), "no other was on all of d, e and f");
        three.clear(&shared);
        shared.breaks.log().breaks.pop_back();
        assert!(one.is_poison(&shared));
        two.clear(&shared);
        let _there_once = dead(&shared, &["e"]);
        assert!(!one.is_poison(&shared), "who lost one engine is no suspect");
    }

    #[test]
    fn what_is_told_sooner_or_later_is_the_same_break() {
        let shared = Shared::default();
        let now = Instant::now();
        let tell = |name: &str, at: Option<Instant>| {
            let engine = engine(name);
            let told = at.map(|at| (&engine, at));
            shared.breaks.learn(told.into_iter());
        };
        let hung = now.checked_sub(STORM / 2);
        tell("a", hung);
        let deaths = dead(&shared, &["a", "b", "c"]);
        // Its other streams, and the feed once more, which also says a little late what became of another.
        shared.breaks.note(&engine("a"));
        tell("a", hung);
        tell("b", Some(now + STORM / 2));
        assert_eq!(shared.breaks.log().breaks.len(), 3);
        assert!(deaths.is_poison(&shared));
        tell("d", now.checked_sub(STORM));
        assert!(deaths.is_poison(&shared), "long ago");
        tell("d", Some(now));
        assert!(!deaths.is_poison(&shared));
    }

    #[test]
    fn engines_that_failed_the_request_otherwise_do_not_speak_for_it() {
        let shared = Shared::default();
        let mut deaths = dead(&shared, &["a", "b", "c"]);
        deaths.add(&shared, [loss("d", false)]);
        assert_eq!(deaths.count(), 3);
        shared.breaks.note(&engine("d"));
        assert!(deaths.is_poison(&shared));
        shared.breaks.note(&engine("e"));
        assert!(!deaths.is_poison(&shared));
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
            deaths.add(&shared, [loss("a", true)]);
        }
        assert_eq!(pauses, [100, 100, 200, 400, 800, 1600, 3200, 3200]);
    }
}
