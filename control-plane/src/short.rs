//! Short resources: `Fleet`, `Policy` and `Gateway`, as an operator writes them, read strictly.
//!
//! A document is checked against the schema first, which finds everything that is wrong with its shape, and becomes a typed
//! value then. Whether documents fit each other, and what they become, is [`translate`](crate::translate)'s.

pub mod fleet;
pub mod gateway;
pub mod policy;
mod shape;
pub mod text;

use outrigger_xds::load::{self, Syntax};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::{fmt, sync::Arc};

/// The one version that there is.
pub const API_VERSION: &str = "outrigger.dev/v1";
/// What documents look like, as JSON Schema (2020-12).
pub const SCHEMA: &str = include_str!("../../deploy/schema.json");

/// A document that could be read.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Where it stands, and what it is called.
    pub origin: Origin,
    /// What it says.
    pub spec: Spec,
    /// As it was written, to be kept.
    pub written: Arc<Value>,
}

/// What a document says, by its kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// Engines and the proxies beside them.
    Fleet(fleet::Fleet),
    /// How requests are served.
    Policy(Box<policy::Policy>),
    /// Where clients arrive.
    Gateway(gateway::Gateway),
}

/// Where a document stands, and what it is called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Origin {
    /// Empty while it is not known.
    pub kind: String,
    /// `metadata.name`; empty while it is not known.
    pub name: String,
    /// As it was named by whoever read it.
    pub file: String,
    /// The first of a file is 1; those that are empty do not count. 0 is the file as a whole.
    pub document: usize,
}

impl fmt::Display for Origin {
    /// All but the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}", self.document)?;
        if !self.name.is_empty() {
            write!(f, " ({} {})", self.kind, self.name)?;
        }
        Ok(())
    }
}

/// Something that is wrong, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// In which document.
    pub origin: Origin,
    /// Path of field names, `spec.pools[0].name`; empty is the document as a whole.
    pub place: String,
    /// What it is.
    pub message: String,
}

impl fmt::Display for Problem {
    /// All but the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.origin.document > 0 {
            write!(f, "{}: ", self.origin)?;
        }
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.message)
    }
}

/// Everything that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// One more.
    pub(crate) fn add(&mut self, origin: &Origin, place: impl Into<String>, message: String) {
        self.0.push(Problem {
            origin: origin.clone(),
            place: place.into(),
            message,
        });
    }

    /// `value`, if nothing is wrong.
    pub(crate) fn finish<T>(mut self, value: T) -> Result<T, Self> {
        if self.0.is_empty() {
            return Ok(value);
        }
        self.0.sort_by(|a, b| key(a).cmp(&key(b)));
        Err(self)
    }
}

/// In the order of the text, as far as that is known.
fn key(problem: &Problem) -> (&str, usize, &str, &str) {
    let origin = &problem.origin;
    (
        &origin.file,
        origin.document,
        &problem.place,
        &problem.message,
    )
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{}: {problem}", problem.origin.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Whether a text is meant to hold short resources: one of its documents says so, be it of a version that we do not know.
#[must_use]
pub fn is_short(text: &str, syntax: Syntax) -> bool {
    load::documents(text, syntax).is_ok_and(|documents| is_any_short(&documents))
}

/// The same of a text that was read already.
pub(crate) fn is_any_short(documents: &[Value]) -> bool {
    let says_so =
        |document: &Value| document.get("apiVersion").is_some() && document.get("kind").is_some();
    documents.iter().any(says_so)
}

/// All documents of a text; `file` is what problems call it.
///
/// # Errors
/// Everything that is wrong with any of them.
pub fn read(file: &str, text: &str, syntax: Syntax) -> Result<Vec<Document>, Problems> {
    let values = load::documents(text, syntax).map_err(|errors| {
        let mut problems = Problems::default();
        problems.add(&of_file(file), "", errors.to_string());
        problems
    })?;
    read_values(file, &values)
}

fn of_file(file: &str) -> Origin {
    Origin {
        file: file.to_owned(),
        ..Origin::default()
    }
}

/// The same of a text that was read already.
pub(crate) fn read_values(file: &str, values: &[Value]) -> Result<Vec<Document>, Problems> {
    let mut problems = Problems::default();
    let mut documents = Vec::new();
    for (index, value) in values.iter().enumerate() {
        match read_one(file, index + 1, value) {
            Ok(document) => documents.push(document),
            Err(found) => problems.0.extend(found.0),
        }
    }
    problems.finish(documents)
}

/// A document of a file.
pub(crate) fn read_one(file: &str, number: usize, value: &Value) -> Result<Document, Problems> {
    let origin = Origin {
        document: number,
        kind: text_at(value, "/kind"),
        name: text_at(value, "/metadata/name"),
        ..of_file(file)
    };
    document(&origin, value)
}

fn text_at(value: &Value, pointer: &str) -> String {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}

fn document(origin: &Origin, value: &Value) -> Result<Document, Problems> {
    let mut problems = Problems::default();
    let version = text_at(value, "/apiVersion");
    if version != API_VERSION {
        let message = format!("expected {API_VERSION}, got '{version}'");
        problems.add(origin, "apiVersion", message);
    }
    let kind = origin.kind.as_str();
    if !["Fleet", "Policy", "Gateway"].contains(&kind) {
        let message = format!("expected Fleet, Policy or Gateway, got '{kind}'");
        problems.add(origin, "kind", message);
    }
    // What the rest should look like is not known.
    problems.finish(())?;
    let mut problems = Problems::default();
    for (place, message) in shape::check(kind, value) {
        problems.add(origin, place, message);
    }
    problems.finish(())?;
    let spec = match kind {
        "Fleet" => Spec::Fleet(typed(origin, value)?),
        "Policy" => Spec::Policy(typed(origin, value)?),
        _ => Spec::Gateway(typed(origin, value)?),
    };
    Ok(Document {
        origin: origin.clone(),
        spec,
        written: Arc::new(value.clone()),
    })
}

/// What fits the schema fits the type: an error here is a mistake of ours, and no reason to go down.
fn typed<T: DeserializeOwned>(origin: &Origin, value: &Value) -> Result<T, Problems> {
    let spec = value.get("spec").cloned().unwrap_or_default();
    serde_json::from_value(spec).map_err(|error| {
        let mut problems = Problems::default();
        problems.add(origin, "spec", error.to_string());
        problems
    })
}

#[cfg(test)]
mod tests;
