//! Which version of the configuration is served to whom: what the sources say becomes a version that is kept, goes to some nodes first if that is wanted, and can be taken back.
//!
//! What a version holds is what the sources had that are kept. Others, such as leases, are told beside each version as they are now: to take a version back does not bring back engines that are gone.

use crate::{
    rollout::Plan,
    source::{Content, Problem},
    store::{
        self, Change, Changes, Contents, Situation, Store, StoreError, Trial, VERSIONS_MAX_DEFAULT,
        Version, milliseconds,
    },
    views::{self, Numbered, Published, Served},
};
use std::{sync::Arc, time::SystemTime};

/// Why a version is not served as somebody wants it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// It is not there, or cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It does not fit any more.
    #[error("it is not good any more: {}", first(.0))]
    Bad(Vec<Problem>),
    /// There is nothing that could be resumed.
    #[error("what the sources say is not good: see /sources")]
    NothingSaid,
}

fn first(problems: &[Problem]) -> String {
    let more = problems.len().saturating_sub(1);
    let first = problems.first().map(ToString::to_string);
    let first = first.unwrap_or_default();
    if more == 0 {
        first
    } else {
        format!("{first} (and {more} more)")
    }
}

/// A version that is served.
#[derive(Debug, Clone)]
struct Serving {
    number: u64,
    hash: String,
    contents: Contents,
    published: Arc<Published>,
}

impl Serving {
    fn numbered(&self) -> Numbered {
        Numbered {
            number: self.number,
            published: self.published.clone(),
        }
    }
}

/// All versions, and those that are served.
#[derive(Debug)]
pub struct Versions {
    store: Store,
    plan: Plan,
    live: Option<Serving>,
    trial: Option<Serving>,
    /// What could not be kept yet.
    waiting: Option<Contents>,
    /// Whether there are [secrets that are issued](crate::issued) to each node.
    issues: bool,
    /// Why that never can be, as it is: then it is not tried again.
    too_long: Option<StoreError>,
}

impl Versions {
    /// Nothing is served yet.
    #[must_use]
    pub fn new(store: Store, plan: Plan) -> Self {
        Self {
            store,
            plan,
            live: None,
            trial: None,
            waiting: None,
            issues: false,
            too_long: None,
        }
    }

    /// The same, of versions that are in memory and go to all at once.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::new(Store::in_memory(VERSIONS_MAX_DEFAULT), Plan::at_once())
    }

    /// All that are kept.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How new ones spread.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Resources may name the [secrets that are issued](crate::issued), or may not.
    #[must_use]
    pub fn issuing(self, issues: bool) -> Self {
        Self { issues, ..self }
    }

    /// Whether they may.
    #[must_use]
    pub fn issues(&self) -> bool {
        self.issues
    }

    /// What is served now; nodes of the trial are those up to this place.
    #[must_use]
    pub fn served(&self, threshold: u64) -> Option<Served> {
        Some(Served {
            live: self.live.as_ref()?.numbered(),
            trial: self.trial.as_ref().map(|it| (it.numbered(), threshold)),
        })
    }

    /// The version that is tried.
    #[must_use]
    pub fn trial(&self) -> Option<&Trial> {
        self.store
            .situation()
            .trial
            .as_ref()
            .filter(|_| self.trial.is_some())
    }

    /// Which is served to all, or to all others.
    #[must_use]
    pub fn live_number(&self) -> Option<u64> {
        self.live.as_ref().map(|live| live.number)
    }

    /// What the live one holds.
    #[must_use]
    pub fn live_contents(&self) -> Option<&Contents> {
        self.live.as_ref().map(|live| &live.contents)
    }

    /// Whether that is what the sources say.
    #[must_use]
    pub fn is_live_said(&self) -> bool {
        let said = &self.store.situation().said;
        self.live.as_ref().is_some_and(|live| live.hash == *said)
    }

    /// Why something could not be kept.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let too_long = self.too_long.as_ref().map(ToString::to_string);
        too_long.or_else(|| self.store.problem())
    }

    /// Whether something could not be kept, and is not served for that.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some() || self.store.is_behind() || self.store.is_unread()
    }

    /// What was served before the process ended, beside what passing sources have now. What is not good any more is passed over, and said.
    pub fn restore(&mut self, passing: &[&Content]) {
        if self.live.is_some() {
            return;
        }
        let situation = self.store.situation().clone();
        self.live = situation
            .live
            .and_then(|number| self.restored(number, passing));
        let trial = situation.trial.as_ref().filter(|_| self.live.is_some());
        let Some(number) = trial.map(|trial| trial.version) else {
            return;
        };
        self.trial = self.restored(number, passing);
        if self.trial.is_none() {
            let why = "it could not be served again after a restart".to_owned();
            self.store.force(Change {
                situation: Situation {
                    trial: None,
                    ..situation
                },
                new: None,
                marks: vec![(number, Some(why))],
            });
        }
    }

    fn restored(&mut self, number: u64, passing: &[&Content]) -> Option<Serving> {
        match self.serving(number, passing) {
            Ok(serving) => Some(serving),
            Err(error) => {
                tracing::error!(number, %error, "a version cannot be served again");
                None
            }
        }
    }

    fn serving(&mut self, number: u64, passing: &[&Content]) -> Result<Serving, VersionError> {
        let bytes = self.store.bytes(number)?;
        let contents = store::decode(&bytes).map_err(VersionError::Bad)?;
        let published = self.publish(&contents, passing)?;
        Ok(Serving {
            number,
            hash: store::hash(&contents),
            contents,
            published: Arc::new(published),
        })
    }

    /// What would be served of this. What is as it is served now is shared.
    fn publish(
        &self,
        contents: &Contents,
        passing: &[&Content],
    ) -> Result<Published, VersionError> {
        let last = self.live.as_ref().map(|live| live.published.clone());
        publish(contents, passing, &last.unwrap_or_default(), self.issues)
    }

    /// What passing sources have is new: what is served is made again with it. What is tried is taken back if only that does not fit it; its number is given then.
    ///
    /// # Errors
    /// It does not fit the version that is live.
    pub fn renew(&mut self, passing: &[&Content]) -> Result<Option<u64>, Vec<Problem>> {
        let Some(live) = self.live.clone() else {
            return Ok(None);
        };
        let published = self.publish(&live.contents, passing).map_err(problems)?;
        let published = Arc::new(published);
        self.live = Some(Serving { published, ..live });
        let Some(trial) = self.trial.clone() else {
            return Ok(None);
        };
        // After the live one, so that what is the same in both is shared.
        match self.publish(&trial.contents, passing) {
            Ok(published) => {
                let published = Arc::new(published);
                self.trial = Some(Serving { published, ..trial });
                Ok(None)
            }
            Err(error) => {
                self.go_back(&error.to_string());
                Ok(Some(trial.number))
            }
        }
    }

    /// The sources say this, and it is good. Until it is kept it is not served, unless nothing is.
    ///
    /// # Errors
    /// It cannot be kept; it is tried again.
    pub fn offer(&mut self, contents: Contents, published: Published) -> Result<(), StoreError> {
        (self.waiting, self.too_long) = (None, None);
        let hash = store::hash(&contents);
        let is_said = self.store.situation().said == hash;
        if is_said && self.live.is_some() {
            return Ok(());
        }
        let taken = self.take(&contents, &hash, published);
        if let Err(error) = &taken {
            self.waiting = Some(contents);
            self.too_long = Some(error.clone()).filter(|it| matches!(it, StoreError::TooLong(_)));
        }
        taken
    }

    fn take(
        &mut self,
        contents: &Contents,
        hash: &str,
        published: Published,
    ) -> Result<(), StoreError> {
        let mut marks = Vec::new();
        if let Some(trial) = &self.trial {
            let why = "the sources say something else by now".to_owned();
            marks.push((trial.number, Some(why)));
        }
        let live = self.live.as_ref();
        let is_live =
            live.filter(|live| live.hash == hash && self.store.version(live.number).is_some());
        if let Some(live) = is_live {
            let situation = Situation {
                said: hash.to_owned(),
                live: Some(live.number),
                ..Situation::default()
            };
            self.store.commit(Change {
                situation,
                marks,
                new: None,
            })?;
            self.trial = None;
            return Ok(());
        }
        let serving = Serving {
            number: self.store.next(),
            hash: hash.to_owned(),
            contents: contents.clone(),
            published: Arc::new(published),
        };
        let before = live.filter(|live| self.store.version(live.number).is_some());
        let is_news = before.is_some_and(|it| it.published.version != serving.published.version);
        // Who is sent nothing new need not try it; and where nothing was, there is nothing to go back to.
        let trial = is_news && self.plan.is_staged();
        let situation = Situation {
            said: hash.to_owned(),
            live: if trial {
                live.map(|it| it.number)
            } else {
                Some(serving.number)
            },
            trial: trial.then_some(Trial {
                version: serving.number,
                percent: 0,
                threshold: None,
            }),
            pinned: false,
        };
        let kept = self.keep(&serving, situation, marks);
        if kept.is_err() && self.live.is_some() {
            return kept;
        }
        if trial {
            self.trial = Some(serving);
        } else {
            (self.live, self.trial) = (Some(serving), None);
        }
        kept
    }

    fn keep(
        &mut self,
        serving: &Serving,
        situation: Situation,
        marks: Vec<(u64, Option<String>)>,
    ) -> Result<(), StoreError> {
        let bytes = store::encode(&serving.contents).map_err(StoreError::Failed)?;
        let live = self.live.as_ref();
        let before = live.map(|live| store::named(&live.contents));
        let version = Version {
            number: serving.number,
            at_ms: milliseconds(SystemTime::now()),
            hash: serving.hash.clone(),
            bytes: bytes.len(),
            changes: Changes::between(
                &before.unwrap_or_default(),
                &store::named(&serving.contents),
            ),
            rolled_back: None,
        };
        let (number, changes) = (version.number, version.changes.count);
        self.store.commit(Change {
            situation,
            new: Some((version, Arc::new(bytes))),
            marks,
        })?;
        tracing::info!(number, changes, "a new version");
        Ok(())
    }

    /// What could not be kept is tried again.
    pub fn retry(&mut self, passing: &[&Content]) {
        if self.store.is_unread() && self.store.read().is_ok() {
            // What is served now was never kept: it is as if the sources said it to what was.
            let unkept = self.live.take().map(|live| live.contents);
            self.waiting = self.waiting.take().or(unkept);
            (self.trial, self.too_long) = (None, None);
            self.restore(passing);
        }
        if self.store.is_behind() {
            // It is remembered as the store's problem.
            let _ = self.store.catch_up();
        }
        if self.too_long.is_some() {
            return;
        }
        if let Some(contents) = self.waiting.take() {
            match self.publish(&contents, passing) {
                // The same.
                Ok(published) => drop(self.offer(contents, published)),
                Err(error) => tracing::warn!(%error, "what waited is not good any more"),
            }
        }
    }

    /// So many per cent of the nodes try it: those up to this place.
    ///
    /// # Errors
    /// It cannot be kept, and should not be so.
    pub fn go_on(&mut self, percent: u8, threshold: u64) -> Result<(), StoreError> {
        let mut situation = self.store.situation().clone();
        if let Some(trial) = &mut situation.trial {
            trial.percent = percent;
            trial.threshold = Some(threshold);
        }
        if situation == *self.store.situation() {
            return Ok(());
        }
        self.store.commit(Change {
            situation,
            ..Change::default()
        })
    }

    /// What was tried is live.
    ///
    /// # Errors
    /// It cannot be kept, and goes on being tried.
    pub fn finish(&mut self) -> Result<(), StoreError> {
        let Some(trial) = self.trial.clone() else {
            return Ok(());
        };
        let situation = Situation {
            live: Some(trial.number),
            trial: None,
            ..self.store.situation().clone()
        };
        self.store.commit(Change {
            situation,
            ..Change::default()
        })?;
        (self.live, self.trial) = (Some(trial), None);
        Ok(())
    }

    /// What was tried is taken back. That cannot wait until it can be kept.
    pub fn go_back(&mut self, why: &str) {
        let Some(trial) = self.trial.take() else {
            return;
        };
        let situation = Situation {
            trial: None,
            ..self.store.situation().clone()
        };
        self.store.force(Change {
            situation,
            new: None,
            marks: vec![(trial.number, Some(why.to_owned()))],
        });
    }

    /// This version is live, for all and at once, until the sources say something else.
    ///
    /// # Errors
    /// It is not there, does not fit any more, or that cannot be kept.
    pub fn pin(&mut self, number: u64, passing: &[&Content]) -> Result<(), VersionError> {
        let serving = self.serving(number, passing)?;
        let served = self.live.iter().chain(&self.trial);
        let others = served.map(|it| it.number).filter(|it| *it > number);
        let why = format!("by hand, to version {number}");
        let mut marks: Vec<_> = others.map(|it| (it, Some(why.clone()))).collect();
        marks.push((number, None));
        // What waits to be kept is what they say, and is not forgotten.
        let waiting = self.waiting.as_ref().map(store::hash);
        let said = waiting.unwrap_or_else(|| self.store.situation().said.clone());
        let situation = Situation {
            live: Some(number),
            trial: None,
            // A candidate that is made live by hand is what the sources say.
            pinned: said != serving.hash,
            said,
        };
        self.store.commit(Change {
            situation,
            new: None,
            marks,
        })?;
        (self.live, self.trial) = (Some(serving), None);
        (self.waiting, self.too_long) = (None, None);
        Ok(())
    }

    /// What the sources say counts again, as if it were new.
    ///
    /// # Errors
    /// It does not fit, or cannot be kept.
    pub fn resume(&mut self, said: &Contents, passing: &[&Content]) -> Result<(), VersionError> {
        let published = self.publish(said, passing)?;
        let hash = store::hash(said);
        let is_served = |it: &Option<Serving>| it.as_ref().is_some_and(|it| it.hash == hash);
        if !self.store.situation().pinned && (is_served(&self.live) || is_served(&self.trial)) {
            return Ok(());
        }
        self.take(said, &hash, published)?;
        (self.waiting, self.too_long) = (None, None);
        Ok(())
    }

    /// What a version holds, as it is kept: to decode it takes time.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    pub fn bytes(&mut self, number: u64) -> Result<Arc<Vec<u8>>, StoreError> {
        self.store.bytes(number)
    }
}

/// What would be served of this, beside what passes. What is as it was is shared.
///
/// # Errors
/// It is not good.
pub fn publish(
    contents: &Contents,
    passing: &[&Content],
    last: &Published,
    issues: bool,
) -> Result<Published, VersionError> {
    let kept = contents.values().map(Arc::as_ref);
    let all: Vec<&Content> = kept.chain(passing.iter().copied()).collect();
    views::publish(&all, last, issues).map_err(VersionError::Bad)
}

fn problems(error: VersionError) -> Vec<Problem> {
    match error {
        VersionError::Bad(problems) => problems,
        VersionError::Store(_) | VersionError::NothingSaid => vec![Problem {
            origin: "versions".to_owned(),
            message: error.to_string(),
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::contents_tests::contents;

    fn versions() -> Versions {
        let mut versions = Versions::new(Store::in_memory(9), Plan::at_once());
        let first = contents("5s");
        let published = versions.publish(&first, &[]).unwrap();
        versions.offer(first, published).unwrap();
        versions
    }

    #[test]
    fn what_waits_is_what_the_sources_say() {
        let mut versions = versions();
        versions.waiting = Some(contents("6s"));
        versions.pin(1, &[]).unwrap();
        assert!(versions.store().situation().pinned && !versions.is_live_said());
        versions.resume(&contents("6s"), &[]).unwrap();
        assert_eq!(versions.live_number(), Some(2));
    }

    #[test]
    fn what_is_too_long_is_not_tried_again() {
        let mut versions = versions();
        versions.waiting = Some(contents("6s"));
        versions.too_long = Some(StoreError::TooLong(7));
        versions.retry(&[]);
        assert!(versions.is_waiting() && versions.problem().is_some());
        assert_eq!(versions.live_number(), Some(1));
        // Something else is.
        let other = contents("7s");
        let published = versions.publish(&other, &[]).unwrap();
        versions.offer(other, published).unwrap();
        assert!(!versions.is_waiting() && versions.problem().is_none());
        assert_eq!(versions.live_number(), Some(2));
    }
}
