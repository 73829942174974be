//! A directory of files with resources, YAML or JSON, read as a whole and watched.
//!
//! Each file holds documents: short resources, or `DiscoveryResponse`s, lists of resources and single resources. Files are looked at again and again, symbolic links followed,
//! so a rename, a ConfigMap's swap of links and a write in place are all seen; they are read when they were left alone for one look, so that what
//! is written in several files at once is taken at once.

use super::{Content, News, Placed, Problem, Source};
use crate::short;
use outrigger_xds::{
    load::{
        self, Syntax,
        written::{self, Written},
    },
    problems::ConfigErrors,
    subscription::Kind,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Between two looks at the directory.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A directory that is never left alone is read after so many looks all the same.
const RESTLESS_LOOKS_MAX: u32 = 50;
/// Longer files are problems.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// More files are a problem.
pub const FILES_MAX: usize = 10_000;

/// What tells one content of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The files of a directory as they stand, or why they cannot be told.
type Listing = Result<BTreeMap<PathBuf, Stamp>, String>;

/// What a file holds.
#[derive(Debug)]
struct File {
    content: Content,
    /// It has no document at all, so does not even say that there is nothing.
    is_empty: bool,
}

/// What a file holds, or what is wrong with it.
type Held = Result<File, Vec<Problem>>;

/// What files held when they were read, with their stamps of then.
type Known = BTreeMap<PathBuf, (Stamp, Held)>;

/// A watched directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    name: String,
    taken: Option<Listing>,
    /// Of a thousand files mostly one changes: the others need not be read again.
    known: Known,
}

impl Directory {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self {
            name: path.display().to_string(),
            path,
            taken: None,
            known: Known::new(),
        }
    }

    /// A file system may hang: looks are taken beside the runtime.
    async fn look(&self) -> Listing {
        let path = self.path.clone();
        let looking = tokio::task::spawn_blocking(move || list(&path));
        let looked = looking.await;
        looked.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Waits until the files are others than those that were taken, and at rest.
    async fn change(&self) -> Listing {
        let mut last = self.look().await;
        if self.taken.is_none() {
            return last;
        }
        let mut looks = 0;
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let now = self.look().await;
            let is_new = self.taken.as_ref() != Some(&now);
            looks = if is_new { looks + 1 } else { 0 };
            if is_new && (now == last || looks > RESTLESS_LOOKS_MAX) {
                return now;
            }
            last = now;
        }
    }
}

#[tonic::async_trait]
impl Source for Directory {
    fn name(&self) -> &str {
        &self.name
    }

    async fn next(&mut self) -> News {
        loop {
            let listing = self.change().await;
            let path = self.path.clone();
            let files = listing.clone();
            let before = std::mem::take(&mut self.known);
            let reading = tokio::task::spawn_blocking(move || match files {
                Ok(files) => {
                    let known = read(files, before);
                    (whole(&path, &known), known)
                }
                Err(error) => (Err(vec![problem(&path, error)]), before),
            });
            let news = match reading.await {
                Ok((news, known)) => {
                    self.known = known;
                    news
                }
                Err(error) => Err(vec![problem(&self.path, error.to_string())]),
            };
            let is_first = self.taken.is_none();
            self.taken = Some(listing);
            // What was changed while it was read may be half of it; a change is seen by the next look.
            if is_first || news.is_ok() || self.taken == Some(self.look().await) {
                return news;
            }
        }
    }
}

/// All that the files of a directory hold now.
///
/// # Errors
/// Everything that is wrong with them.
pub fn load(directory: &Path) -> News {
    match list(directory) {
        Ok(files) => whole(directory, &read(files, Known::new())),
        Err(error) => Err(vec![problem(directory, error)]),
    }
}

/// Whether a directory holds what only `serve` reads: Envoy's resources, other than the secrets of short ones.
#[must_use]
pub fn holds_resources(directory: &Path) -> bool {
    let files = list(directory).unwrap_or_default();
    let (mut has_short, mut has_secrets) = (false, false);
    for path in files.keys() {
        let values = read_file(path).unwrap_or_default();
        if short::is_any_short(&values) {
            has_short = true;
            continue;
        }
        for mut document in documents(path, values) {
            match within(&mut document) {
                Ok(found) if found.iter().all(is_secret) => has_secrets = true,
                Ok(_) => return true,
                Err(_) => {}
            }
        }
    }
    has_secrets && !has_short
}

fn is_secret(document: &Document) -> bool {
    let type_url = document.value.get("@type").and_then(Value::as_str);
    type_url.is_some_and(|url| url == Kind::Secrets.type_url())
}

fn problem(origin: &Path, message: impl Into<String>) -> Problem {
    Problem {
        origin: origin.display().to_string(),
        message: message.into(),
    }
}

/// How a file is written, if it is one of ours.
fn syntax(path: &Path) -> Option<Syntax> {
    let is_hidden = path.file_name()?.to_str()?.starts_with('.');
    match path.extension()?.to_str()? {
        _ if is_hidden => None,
        "yaml" | "yml" => Some(Syntax::Yaml),
        "json" => Some(Syntax::Json),
        _ => None,
    }
}

fn list(directory: &Path) -> Listing {
    let told = |error: io::Error| format!("cannot be read: {error}");
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(told)? {
        let path = entry.map_err(told)?.path();
        if syntax(&path).is_none() {
            continue;
        }
        // Between the swap of a link and this look its target may be gone: the next look tells.
        let facts = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if facts.is_file() {
            files.insert(path, stamp(&facts));
        }
    }
    if files.len() > FILES_MAX {
        return Err(format!("more than {FILES_MAX} files"));
    }
    Ok(files)
}

fn stamp(facts: &fs::Metadata) -> Stamp {
    Stamp {
        file: (facts.dev(), facts.ino()),
        size: facts.size(),
        modified: (facts.mtime(), facts.mtime_nsec()),
        changed: (facts.ctime(), facts.ctime_nsec()),
    }
}

/// A document of a file.
struct Document {
    origin: String,
    /// Before the places in it.
    place: String,
    value: Value,
}

/// What files hold: those that are as they were are not read again, unless something was wrong with them, which need not be
/// theirs.
fn read(files: BTreeMap<PathBuf, Stamp>, mut before: Known) -> Known {
    let known = files.into_iter().map(|(path, stamp)| {
        let held = match before.remove(&path) {
            Some((of_then, held)) if of_then == stamp && held.is_ok() => held,
            _ => held(&path),
        };
        (path, (stamp, held))
    });
    known.collect()
}

fn held(path: &Path) -> Held {
    let values = read_file(path).map_err(|message| vec![problem(path, message)])?;
    let (mut content, mut problems) = (Content::default(), Vec::new());
    let is_empty = values.is_empty();
    take(path, values, &mut content, &mut problems);
    if problems.is_empty() {
        Ok(File { content, is_empty })
    } else {
        Err(problems)
    }
}

/// All of it together.
fn whole(directory: &Path, known: &Known) -> News {
    let (mut content, mut problems) = (Content::default(), Vec::new());
    let mut is_empty = true;
    for (_, held) in known.values() {
        match held {
            Ok(file) => {
                is_empty &= file.is_empty;
                content.raw.extend(file.content.raw.iter().cloned());
                content.short.extend(file.content.short.iter().cloned());
            }
            Err(found) => problems.extend(found.iter().cloned()),
        }
    }
    if is_empty && problems.is_empty() {
        // A directory that is not mounted looks like that, and to serve nothing is to take everything away.
        let message = "holds no resources (to serve none, write a file with 'resources: []')";
        problems.push(problem(directory, message));
    }
    if problems.is_empty() {
        Ok(content)
    } else {
        Err(problems)
    }
}

/// The documents of a file.
fn read_file(path: &Path) -> Result<Vec<Value>, String> {
    let size = fs::metadata(path).map(|facts| facts.size());
    if size.is_ok_and(|size| size > FILE_BYTES_MAX) {
        return Err(format!("longer than {FILE_BYTES_MAX} bytes"));
    }
    let text = fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    let syntax = syntax(path).unwrap_or(Syntax::Yaml);
    load::documents(&text, syntax).map_err(|errors| errors.to_string())
}

/// A file holds short resources or Envoy's, not both.
fn take(path: &Path, values: Vec<Value>, content: &mut Content, problems: &mut Vec<Problem>) {
    if short::is_any_short(&values) {
        match short::read_values(&path.display().to_string(), &values) {
            Ok(documents) => content.short.extend(documents),
            Err(found) => problems.extend(found.0.into_iter().map(Problem::from)),
        }
        return;
    }
    for mut document in documents(path, values) {
        match within(&mut document) {
            Ok(found) => {
                for document in found {
                    match resource(document) {
                        Ok(placed) => content.raw.push(placed),
                        Err(found) => problems.extend(found),
                    }
                }
            }
            Err(message) => problems.push(Problem {
                message: told(&document.place, message),
                origin: document.origin,
            }),
        }
    }
}

fn documents(path: &Path, values: Vec<Value>) -> impl Iterator<Item = Document> {
    let origin = path.display().to_string();
    let is_alone = values.len() == 1;
    let numbered = values.into_iter().enumerate();
    numbered.map(move |(index, value)| Document {
        origin: origin.clone(),
        place: if is_alone {
            String::new()
        } else {
            format!("document {}", index + 1)
        },
        value,
    })
}

/// What may stand beside `resources`, of a `DiscoveryResponse`.
const BESIDE_RESOURCES: [&str; 4] = ["resources", "version_info", "versionInfo", "type_url"];

/// The resources in a document.
fn within(document: &mut Document) -> Result<Vec<Document>, &'static str> {
    let value = document.value.take();
    let (key, list) = match value {
        Value::Array(list) => ("", list),
        Value::Object(fields) if fields.contains_key("@type") => {
            return Ok(vec![Document {
                origin: document.origin.clone(),
                place: document.place.clone(),
                value: Value::Object(fields),
            }]);
        }
        Value::Object(mut fields) => {
            let is_known = |key: &String| BESIDE_RESOURCES.contains(&key.as_str());
            match fields.remove("resources") {
                Some(Value::Array(list)) if fields.keys().all(is_known) => ("resources", list),
                _ => return Err(NO_RESOURCES),
            }
        }
        _ => return Err(NO_RESOURCES),
    };
    let each = list.into_iter().enumerate().map(|(index, value)| Document {
        origin: document.origin.clone(),
        place: told(&document.place, format!("{key}[{index}]")),
        value,
    });
    Ok(each.collect())
}

const NO_RESOURCES: &str = "neither a resource with '@type', nor a list of them, nor 'resources: [...]', nor a short resource with 'apiVersion' and 'kind'";

/// A message with its place before it.
fn told(place: &str, message: impl Into<String>) -> String {
    let message = message.into();
    match place {
        "" => message,
        place => format!("{place}: {message}"),
    }
}

fn resource(document: Document) -> Result<Placed, Vec<Problem>> {
    let Document {
        origin,
        place,
        value,
    } = document;
    let read: Result<Written, ConfigErrors> = written::resource(value, &place);
    match read {
        Ok(written) => Ok(Placed {
            origin,
            place,
            written,
        }),
        Err(errors) => {
            let problems = errors.problems().iter().map(|error| Problem {
                origin: origin.clone(),
                message: error.to_string(),
            });
            Err(problems.collect())
        }
    }
}
