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
        let kept = contents.values().map(Arc::as_ref);
        let all: Vec<&Content> = kept.chain(passing.iter().copied()).collect();
        let last = self.live.as_ref().map(|live| live.published.clone());
        let published = views::publish(&all, &last.unwrap_or_default(), self.issues);
        published.map_err(VersionError::Bad)
    }

    /// What passing sources have is new: what is served is made again with it.
    ///
    /// # Errors
    /// It does not fit the version that is served.
    pub fn renew(&mut self, passing: &[&Content]) -> Result<(), Vec<Problem>> {
        let renewed = |serving: &Option<Serving>| -> Result<Option<Serving>, Vec<Problem>> {
            let Some(serving) = serving else {
                return Ok(None);
            };
            let contents = &serving.contents;
            let published = self.publish(contents, passing).map_err(problems)?;
            Ok(Some(Serving {
                published: Arc::new(published),
                ..serving.clone()
            }))
        };
        let (live, trial) = (renewed(&self.live)?, renewed(&self.trial)?);
        (self.live, self.trial) = (live, trial);
        Ok(())
    }

    /// The sources say this, and it is good. Until it is kept it is not served, unless nothing is.
    ///
    /// # Errors
    /// It cannot be kept; it is tried again.
    pub fn offer(&mut self, contents: Contents, published: Published) -> Result<(), StoreError> {
        self.waiting = None;
        let hash = store::hash(&contents);
        let is_said = self.store.situation().said == hash;
        if is_said && self.live.is_some() {
            return Ok(());
        }
        let taken = self.take(&contents, &hash, published);
        if taken.is_err() {
            self.waiting = Some(contents);
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
                step: 0,
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
        tracing::info!(
            number = version.number,
            changes = version.changes.count,
            "a new version"
        );
        self.store.commit(Change {
            situation,
            new: Some((version, Arc::new(bytes))),
            marks,
        })
    }

    /// What could not be kept is tried again.
    pub fn retry(&mut self, passing: &[&Content]) {
        if self.store.is_unread() && self.store.read().is_ok() {
            // What is served now was never kept: it is as if the sources said it to what was.
            let unkept = self.live.take().map(|live| live.contents);
            self.waiting = self.waiting.take().or(unkept);
            self.trial = None;
            self.restore(passing);
        }
        if self.store.is_behind() {
            // It is remembered as the store's problem.
            let _ = self.store.catch_up();
        }
        if let Some(contents) = self.waiting.take() {
            match self.publish(&contents, passing) {
                // The same.
                Ok(published) => drop(self.offer(contents, published)),
                Err(error) => tracing::warn!(%error, "what waited is not good any more"),
            }
        }
    }

    /// What is tried is at this step, and nodes up to this place have it.
    ///
    /// # Errors
    /// It cannot be kept, and should not be so.
    pub fn go_on(&mut self, step: usize, threshold: u64) -> Result<(), StoreError> {
        let mut situation = self.store.situation().clone();
        if let Some(trial) = &mut situation.trial {
            trial.step = step;
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
        let situation = Situation {
            live: Some(number),
            trial: None,
            // A candidate that is made live by hand is what the sources say.
            pinned: self.store.situation().said != serving.hash,
            ..self.store.situation().clone()
        };
        self.store.commit(Change {
            situation,
            new: None,
            marks,
        })?;
        (self.live, self.trial) = (Some(serving), None);
        self.waiting = None;
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
        Ok(())
    }

    /// What a version holds.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    pub fn contents(&mut self, number: u64) -> Result<Contents, VersionError> {
        let bytes = self.store.bytes(number)?;
        store::decode(&bytes).map_err(VersionError::Bad)
    }

    /// What would be served of this.
    ///
    /// # Errors
    /// It is not good.
    pub fn tried(
        &self,
        contents: &Contents,
        passing: &[&Content],
    ) -> Result<Published, VersionError> {
        self.publish(contents, passing)
    }
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
