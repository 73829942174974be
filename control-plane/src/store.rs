//! Versions of the configuration, and which of them is served: kept in an embedded database, so that none is lost that was accepted.
//!
//! A change is one transaction, durable when it is over; who serves a version does so after that. A database that cannot be written keeps
//! what it has, and is opened again with the next change. One that cannot be read is moved aside, whole, and another one begun.

mod contents;
mod database;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use contents::tests as contents_tests;
pub use contents::{Contents, Named, decode, encode, hash, named};

use database::{Database, Opened};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Versions that are kept, unless it is said otherwise.
pub const VERSIONS_MAX_DEFAULT: usize = 50;
/// Of what all versions hold; the oldest go when it is more. A version that is longer alone is not kept, and so not taken.
pub const VERSIONS_BYTES_MAX: usize = 256 << 20;
/// Resources that changed, of a version, that are named in a list of versions.
const CHANGES_NAMED_MAX: usize = 20;

/// Something that cannot be kept, or had again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("{0}: another process uses it")]
    InUse(String),
    /// The file is not what it should be.
    #[error("the database is broken: {0}")]
    Broken(String),
    /// Such as a disk that is full.
    #[error("cannot be written or read: {0}")]
    Failed(String),
    /// [`VERSIONS_BYTES_MAX`].
    #[error("a version of {0} bytes, at most {VERSIONS_BYTES_MAX} are kept")]
    TooLong(usize),
    /// Never there, or too old.
    #[error("there is no version {0}")]
    NoVersion(u64),
}

/// A version, without what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Counts up.
    pub number: u64,
    /// When it was accepted: milliseconds since 1970.
    pub at_ms: u64,
    /// Of what it holds.
    pub hash: String,
    /// How long that is.
    pub bytes: usize,
    /// What is different from what was live then.
    pub changes: Changes,
    /// Why it is not served any more, if it was taken back.
    pub rolled_back: Option<String>,
}

/// What is different between two versions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// How many resources.
    pub count: usize,
    /// The first of them, with `+`, `-` or `~` before their names.
    pub named: Vec<String>,
}

impl Changes {
    /// Between two.
    #[must_use]
    pub fn between(old: &Named, new: &Named) -> Self {
        let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        let mut changes = Self::default();
        for name in names {
            let sign = match (old.get(name), new.get(name)) {
                (None, _) => '+',
                (_, None) => '-',
                (Some(old), Some(new)) if old != new => '~',
                _ => continue,
            };
            changes.count += 1;
            if changes.count <= CHANGES_NAMED_MAX {
                changes.named.push(format!("{sign} {name}"));
            }
        }
        changes
    }
}

/// Which version is served to whom.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Situation {
    /// The hash of what the sources said last.
    pub said: String,
    /// Served to all, or to all that are not in the trial.
    pub live: Option<u64>,
    /// Served to some.
    pub trial: Option<Trial>,
    /// Whether the live one was chosen by hand, against what the sources say.
    pub pinned: bool,
}

/// A version that is tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Which.
    pub version: u64,
    /// How far it got.
    pub step: usize,
    /// Up to which place nodes have it, once that is known.
    pub threshold: Option<u64>,
}

/// What is written as one.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// From now on.
    pub situation: Situation,
    /// One more version, and what it holds.
    pub new: Option<(Version, Arc<Vec<u8>>)>,
    /// What becomes of others: why they were taken back, or that they no longer are.
    pub marks: Vec<(u64, Option<String>)>,
}

/// All versions.
#[derive(Debug)]
pub struct Store {
    shelf: Shelf,
    versions_max: usize,
    versions: BTreeMap<u64, Version>,
    situation: Situation,
    next: u64,
    /// Versions that were changed and not written.
    unwritten: BTreeSet<u64>,
    /// Why the last change could not be written.
    problem: Option<StoreError>,
    /// What was found when it was opened, and is worth knowing.
    notice: Option<String>,
    /// Whether it is not known yet what is there: then nothing is written over it.
    unread: bool,
}

/// Where what versions hold is kept.
#[derive(Debug)]
enum Shelf {
    Memory(BTreeMap<u64, Arc<Vec<u8>>>),
    Disk(Database),
}

impl Store {
    /// Kept until the process ends.
    #[must_use]
    pub fn in_memory(versions_max: usize) -> Self {
        Self {
            shelf: Shelf::Memory(BTreeMap::new()),
            versions_max: versions_max.max(1),
            versions: BTreeMap::new(),
            situation: Situation::default(),
            next: 1,
            unwritten: BTreeSet::new(),
            problem: None,
            notice: None,
            unread: false,
        }
    }

    /// Kept in this directory. What is broken there is moved aside; where nothing can be written, that is remembered as the problem.
    ///
    /// # Errors
    /// Another process uses it.
    pub fn open(directory: &Path, versions_max: usize) -> Result<Self, StoreError> {
        let mut store = Self::in_memory(versions_max);
        store.shelf = Shelf::Disk(Database::new(directory));
        store.unread = true;
        match store.read() {
            Err(error @ StoreError::InUse(_)) => Err(error),
            // It is remembered.
            Ok(()) | Err(_) => Ok(store),
        }
    }

    /// Whether it could not be read yet. Until it is, nothing can be kept.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        self.unread
    }

    /// Reads what is there, if that was not possible before.
    ///
    /// # Errors
    /// It still is not.
    pub fn read(&mut self) -> Result<(), StoreError> {
        let Shelf::Disk(database) = &mut self.shelf else {
            return Ok(());
        };
        let read = database.open().map(|Opened { kept, moved }| {
            let last = kept.versions.keys().next_back();
            self.next = last.map_or(1, |last| last + 1);
            (self.versions, self.situation) = (kept.versions, kept.situation);
            self.notice = moved;
            self.unread = false;
        });
        self.told(read)
    }

    /// Oldest first.
    pub fn versions(&self) -> impl DoubleEndedIterator<Item = &Version> {
        self.versions.values()
    }

    /// One of them.
    #[must_use]
    pub fn version(&self, number: u64) -> Option<&Version> {
        self.versions.get(&number)
    }

    /// Which is served to whom.
    #[must_use]
    pub fn situation(&self) -> &Situation {
        &self.situation
    }

    /// The number of the next version.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether it outlives the process.
    #[must_use]
    pub fn is_on_disk(&self) -> bool {
        matches!(self.shelf, Shelf::Disk(_))
    }

    /// What is wrong with it, if anything is.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.as_ref().map(ToString::to_string)
    }

    /// What was found when it was opened.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// Whether something is to be written yet.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.unwritten.is_empty()
    }

    /// What a version holds.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    pub fn bytes(&mut self, number: u64) -> Result<Arc<Vec<u8>>, StoreError> {
        if !self.versions.contains_key(&number) {
            return Err(StoreError::NoVersion(number));
        }
        match &mut self.shelf {
            Shelf::Memory(held) => held.get(&number).cloned(),
            Shelf::Disk(database) => database.bytes(number)?.map(Arc::new),
        }
        .ok_or(StoreError::NoVersion(number))
    }

    /// Makes a change, if it can be kept; else nothing changes.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn commit(&mut self, change: Change) -> Result<(), StoreError> {
        let next = self.changed(change);
        let written = self.write(&next);
        if written.is_ok() {
            self.adopt(next, BTreeSet::new());
        }
        self.told(written)
    }

    /// Makes a change that cannot wait, without a new version. If it cannot be written, it is with the next that can.
    pub fn force(&mut self, change: Change) {
        let next = self.changed(Change {
            new: None,
            ..change
        });
        let written = self.write(&next);
        let unwritten = match &written {
            Ok(()) => BTreeSet::new(),
            Err(_) => next.touched.clone(),
        };
        self.adopt(next, unwritten);
        // It is remembered.
        let _ = self.told(written);
    }

    /// Writes what could not be written before.
    ///
    /// # Errors
    /// It still cannot.
    pub fn catch_up(&mut self) -> Result<(), StoreError> {
        self.commit(Change {
            situation: self.situation.clone(),
            ..Change::default()
        })
    }

    fn told(&mut self, written: Result<(), StoreError>) -> Result<(), StoreError> {
        if let Err(error) = &written {
            metrics::counter!("outrigger_control_plane_store_failures_total").increment(1);
            tracing::error!(%error, "a change of the configuration cannot be kept");
        }
        self.problem = written.as_ref().err().cloned();
        self.show();
        written
    }

    fn show(&self) {
        let bytes: usize = self.versions.values().map(|it| it.bytes).sum();
        metrics::gauge!("outrigger_control_plane_store_ok")
            .set(f64::from(u8::from(self.problem.is_none())));
        metrics::gauge!("outrigger_control_plane_versions").set(as_gauge(self.versions.len()));
        metrics::gauge!("outrigger_control_plane_versions_bytes").set(as_gauge(bytes));
    }

    fn changed(&self, change: Change) -> Next {
        let mut next = Next {
            versions: self.versions.clone(),
            situation: change.situation,
            touched: self.unwritten.clone(),
            new: None,
            gone: Vec::new(),
        };
        for (number, why) in change.marks {
            if let Some(version) = next.versions.get_mut(&number) {
                version.rolled_back = why;
                next.touched.insert(number);
            }
        }
        if let Some((version, bytes)) = change.new {
            next.touched.insert(version.number);
            next.new = Some((version.number, bytes));
            next.versions.insert(version.number, version);
        }
        next.make_room(self.versions_max);
        next
    }

    fn write(&mut self, next: &Next) -> Result<(), StoreError> {
        if let Some((_, bytes)) = &next.new
            && bytes.len() > VERSIONS_BYTES_MAX
        {
            return Err(StoreError::TooLong(bytes.len()));
        }
        if self.unread {
            let unread = StoreError::Failed("it could not be read yet".to_owned());
            return Err(self.problem.clone().unwrap_or(unread));
        }
        match &mut self.shelf {
            Shelf::Memory(held) => {
                held.extend(next.new.clone());
                held.retain(|number, _| next.versions.contains_key(number));
                Ok(())
            }
            Shelf::Disk(database) => database.write(next),
        }
    }

    fn adopt(&mut self, next: Next, unwritten: BTreeSet<u64>) {
        if let Some((number, _)) = next.new {
            self.next = number + 1;
        }
        (self.versions, self.situation) = (next.versions, next.situation);
        self.unwritten = unwritten;
    }
}

/// What is to be, and what of it is to be written.
#[derive(Debug)]
struct Next {
    versions: BTreeMap<u64, Version>,
    situation: Situation,
    touched: BTreeSet<u64>,
    new: Option<(u64, Arc<Vec<u8>>)>,
    gone: Vec<u64>,
}

impl Next {
    /// The oldest go that nobody is served.
    fn make_room(&mut self, versions_max: usize) {
        let trial = self.situation.trial.as_ref().map(|trial| trial.version);
        let new = self.new.as_ref().map(|(number, _)| *number);
        let needed = [self.situation.live, trial, new];
        loop {
            let bytes: usize = self.versions.values().map(|it| it.bytes).sum();
            let is_full = self.versions.len() > versions_max || bytes > VERSIONS_BYTES_MAX;
            let mut numbers = self.versions.keys().copied();
            let oldest = numbers.find(|number| !needed.contains(&Some(*number)));
            let Some(oldest) = oldest.filter(|_| is_full) else {
                return;
            };
            self.versions.remove(&oldest);
            self.gone.push(oldest);
        }
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn milliseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "counts are small")]
fn as_gauge(count: usize) -> f64 {
    count as f64
}
