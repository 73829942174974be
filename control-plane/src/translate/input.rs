//! Files and directories with short resources, and with the secrets that they name.

use crate::short::{self, Document, Origin, Problems};
use outrigger_xds::{
    load::{
        self, Syntax,
        discovery::{Resource, Response, Unread},
    },
    resource::secret::Secret,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// What files hold.
#[derive(Debug, Default)]
pub struct Input {
    /// Short resources.
    pub documents: Vec<Document>,
    /// Envoy's secrets, as they are written, by name.
    pub secrets: BTreeMap<String, Value>,
    /// Files that hold something else.
    pub others: Vec<PathBuf>,
    /// What is wrong with files and documents, each by itself.
    pub problems: Problems,
}

/// How a file is written, by its name.
#[must_use]
pub fn syntax(path: &Path) -> Syntax {
    let is_json = |extension: &std::ffi::OsStr| extension.eq_ignore_ascii_case("json");
    if path.extension().is_some_and(is_json) {
        Syntax::Json
    } else {
        Syntax::Yaml
    }
}

/// Files as they are; of directories the files in them that end in `.yaml`, `.yml` or `.json`, by name.
///
/// # Errors
/// A directory that cannot be read.
pub fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Problems> {
    let mut problems = Problems::default();
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        match within(path) {
            Ok(found) => files.extend(found),
            Err(error) => unreadable(path, &error, &mut problems),
        }
    }
    problems.finish(files)
}

fn within(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    let is_ours = |path: &PathBuf| {
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = path.extension().and_then(|extension| extension.to_str());
        !hidden
            && path.is_file()
            && extension.is_some_and(|end| ["yaml", "yml", "json"].contains(&end))
    };
    let mut files: Vec<_> = entries
        .iter()
        .map(fs::DirEntry::path)
        .filter(is_ours)
        .collect();
    files.sort();
    Ok(files)
}

fn origin(path: &Path) -> Origin {
    Origin {
        file: path.display().to_string(),
        ..Origin::default()
    }
}

fn unreadable(path: &Path, error: &std::io::Error, problems: &mut Problems) {
    problems.add(&origin(path), "", format!("cannot be read: {error}"));
}

/// What these files hold.
#[must_use]
pub fn read(files: &[PathBuf]) -> Input {
    let mut input = Input::default();
    for path in files {
        match fs::read_to_string(path) {
            Ok(text) => input.take(path, &text),
            Err(error) => unreadable(path, &error, &mut input.problems),
        }
    }
    input
}

impl Input {
    fn take(&mut self, path: &Path, text: &str) {
        let syntax = syntax(path);
        if short::is_short(text, syntax) {
            match short::read(&path.display().to_string(), text, syntax) {
                Ok(documents) => self.documents.extend(documents),
                Err(found) => self.problems.0.extend(found.0),
            }
            return;
        }
        let documents = match load::documents(text, syntax) {
            Ok(documents) => documents,
            Err(errors) => return self.problems.add(&origin(path), "", errors.to_string()),
        };
        let resources: Vec<&Value> = documents.iter().flat_map(resources).collect();
        if resources.is_empty() || !resources.iter().all(|resource| is_secret(resource)) {
            return self.others.push(path.to_owned());
        }
        for secret in resources {
            self.secret(path, secret);
        }
    }

    fn secret(&mut self, path: &Path, secret: &Value) {
        let unread = Unread {
            name: String::new(),
            version: String::new(),
            any: Ok(secret.clone()),
        };
        let response = Response {
            resources: vec![unread],
            ..Response::default()
        };
        for candidate in response.read::<Secret>() {
            match candidate.read {
                Ok(read) => drop(self.secrets.insert(read.name, secret.clone())),
                Err(errors) => self.problems.add(&origin(path), "", errors.to_string()),
            }
        }
    }
}

/// The resources of a response of a control plane, or a resource that stands alone.
fn resources(document: &Value) -> &[Value] {
    match document.get("resources") {
        Some(Value::Array(resources)) => resources,
        _ => std::slice::from_ref(document),
    }
}

fn is_secret(resource: &Value) -> bool {
    let type_url = resource.get("@type").and_then(Value::as_str);
    type_url.is_some_and(|url| url.ends_with(<Secret as Resource>::TYPE))
}
