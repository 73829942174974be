//! The file that versions are kept in.

use super::{Next, Situation, StoreError, Version};
use redb::{DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::OpenOptionsExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

/// Versions without what they hold, as JSON.
const VERSIONS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("versions");
/// What they hold.
const CONTENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("contents");
/// The situation, as JSON.
const SITUATION: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("situation");
const NOW: &str = "now";

const FILE: &str = "versions.redb";
/// Of the file, in memory. Reads are few.
const CACHE_BYTES: usize = 4 << 20;

/// What a file has.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) versions: BTreeMap<u64, Version>,
    pub(super) situation: Situation,
}

/// A file that was opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) kept: Kept,
    /// One was broken, and moved: said for people.
    pub(super) moved: Option<String>,
}

/// The file; closed after a failure, until it is used again.
#[derive(Debug)]
pub(super) struct Database {
    directory: PathBuf,
    open: Option<redb::Database>,
}

impl Database {
    pub(super) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            open: None,
        }
    }

    fn file(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    /// What it has. If that cannot be read, it is moved aside, and another one begun.
    pub(super) fn open(&mut self) -> Result<Opened, StoreError> {
        match self.read() {
            Ok(kept) => Ok(Opened { kept, moved: None }),
            Err(StoreError::Broken(why)) => {
                let moved = self.move_aside()?;
                let moved = format!(
                    "the database was broken and is now {}: {why}; versions begin anew",
                    moved.display()
                );
                tracing::error!("{moved}");
                let kept = self.read()?;
                Ok(Opened {
                    kept,
                    moved: Some(moved),
                })
            }
            Err(error) => Err(error),
        }
    }

    fn read(&mut self) -> Result<Kept, StoreError> {
        self.guarded(|database| {
            let write = database.begin_write()?;
            for table in [VERSIONS, CONTENTS] {
                write.open_table(table)?;
            }
            write.open_table(SITUATION)?;
            write.commit()?;
            kept(database)
        })
    }

    /// Beside all that were moved before; nothing is ever overwritten.
    fn move_aside(&mut self) -> Result<PathBuf, StoreError> {
        self.open = None;
        let places = (1..).map(|count| self.directory.join(format!("{FILE}.broken.{count}")));
        let place = places.into_iter().find(|place| !place.exists());
        let place = place.unwrap_or_else(|| self.directory.join("versions.broken"));
        fs::rename(self.file(), &place).map_err(|error| self.failed(&error))?;
        Ok(place)
    }

    fn failed(&self, error: &std::io::Error) -> StoreError {
        StoreError::Failed(format!("{}: {error}", self.directory.display()))
    }

    pub(super) fn bytes(&mut self, number: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.guarded(|database| {
            let read = database.begin_read()?;
            let found = read.open_table(CONTENTS)?.get(number)?;
            Ok(found.map(|bytes| bytes.value().to_vec()))
        })
    }

    /// As one, and durable.
    pub(super) fn write(&mut self, next: &Next) -> Result<(), StoreError> {
        self.guarded(|database| {
            let write = database.begin_write()?;
            {
                let (mut versions, mut contents) =
                    (write.open_table(VERSIONS)?, write.open_table(CONTENTS)?);
                for number in &next.gone {
                    versions.remove(number)?;
                    contents.remove(number)?;
                }
                let touched = next.touched.iter();
                for version in touched.filter_map(|number| next.versions.get(number)) {
                    versions.insert(version.number, to_json(version)?.as_slice())?;
                }
                if let Some((number, bytes)) = &next.new {
                    contents.insert(number, bytes.as_slice())?;
                }
                let mut situation = write.open_table(SITUATION)?;
                situation.insert(NOW, to_json(&next.situation)?.as_slice())?;
            }
            write.commit()?;
            Ok(())
        })
    }

    /// With the file open. After a failure it is closed: what was written until then counts, and the rest does not.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&redb::Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let database = match self.open.take() {
            Some(database) => database,
            None => self.create()?,
        };
        // Bytes that make no sense may end in a panic: that is one more way to be broken.
        let worked = catch_unwind(AssertUnwindSafe(|| work(&database)));
        match worked {
            Ok(Ok(value)) => {
                self.open = Some(database);
                Ok(value)
            }
            Ok(Err(error)) => Err(told(&error)),
            Err(_) => Err(StoreError::Broken("it cannot be understood".to_owned())),
        }
    }

    fn create(&self) -> Result<redb::Database, StoreError> {
        let failed = |error: std::io::Error| self.failed(&error);
        fs::create_dir_all(&self.directory).map_err(failed)?;
        // It holds secrets.
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.file())
            .map_err(failed)?;
        let mut builder = redb::Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        let created = catch_unwind(AssertUnwindSafe(|| builder.create(self.file())));
        let database = match created {
            Ok(Ok(database)) => database,
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => {
                return Err(StoreError::InUse(self.file().display().to_string()));
            }
            Ok(Err(error)) => return Err(told(&error.into())),
            Err(_) => return Err(StoreError::Broken("it cannot be opened".to_owned())),
        };
        // So that the file itself is there after a loss of power.
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed)?;
        Ok(database)
    }
}

/// What it has of versions; broken if a part of it is missing.
fn kept(database: &redb::Database) -> Result<Kept, redb::Error> {
    let read = database.begin_read()?;
    let (versions, contents) = (read.open_table(VERSIONS)?, read.open_table(CONTENTS)?);
    let mut kept = Kept::default();
    for entry in versions.iter()? {
        let (number, bytes) = entry?;
        let version: Version = from_json(bytes.value())?;
        if contents.get(number.value())?.is_none() {
            let message = format!("nothing is there of version {}", number.value());
            return Err(redb::Error::Corrupted(message));
        }
        kept.versions.insert(number.value(), version);
    }
    if let Some(bytes) = read.open_table(SITUATION)?.get(NOW)? {
        kept.situation = from_json(bytes.value())?;
    }
    Ok(kept)
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Corrupted(error.to_string()))
}

fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    serde_json::from_slice(bytes).map_err(|error| redb::Error::Corrupted(error.to_string()))
}

fn told(error: &redb::Error) -> StoreError {
    match error {
        // A file that is none of these, or of another program.
        redb::Error::Corrupted(_)
        | redb::Error::UpgradeRequired(_)
        | redb::Error::TableTypeMismatch { .. }
        | redb::Error::TableIsMultimap(_) => StoreError::Broken(error.to_string()),
        redb::Error::Io(io) if is_nonsense(io.kind()) => StoreError::Broken(error.to_string()),
        _ => StoreError::Failed(error.to_string()),
    }
}

fn is_nonsense(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
}
