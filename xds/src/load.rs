//! Reading configuration as written (YAML or JSON, either key style) into plain types, strictly; and showing it again.
//!
//! Every problem of a text is reported at once, with its place. Nothing unknown passes: what Envoy has and we do not is
//! refused by name, or, where it cannot change what happens to a request, ignored, logged and counted.
//! It does not read files, and does not know which filters exist.

pub mod binary;
mod canonical;
pub mod discovery;
mod dump;
mod extensions;
pub mod kept;
mod known;
mod known_cluster;
mod known_discovery;
mod known_listener;
mod known_tls;
mod merge;
mod strict;
mod walk;
pub mod written;

pub use crate::problems::{ConfigErrors, Problem};
pub use dump::{bootstrap_to_json, config_dump};

use crate::{
    protobuf, resource::bootstrap::Bootstrap, wire::envoy::config::bootstrap::v3::Bootstrap as Wire,
};
use prost::Name;
use serde_json::Value;

/// How a text is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// YAML 1.2; one document, unless several are asked for.
    Yaml,
    /// JSON.
    Json,
}

/// What becomes of fields of a bootstrap that nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unknown {
    /// They are problems.
    #[default]
    Refused,
    /// They are logged and counted.
    Counted,
}

/// A bootstrap as written in several texts, each laid over those before, checked and understood.
///
/// # Errors
/// All problems of the texts, each with its place.
pub fn bootstrap_over(
    texts: &[(&str, Syntax)],
    unknown: Unknown,
) -> Result<Bootstrap, ConfigErrors> {
    let mut all = Value::Null;
    for (text, syntax) in texts {
        merge::merge(&message(), &mut all, strict::parse(text, *syntax)?);
    }
    let walk = match unknown {
        Unknown::Refused => walk::Walk::default(),
        Unknown::Counted => walk::Walk::tolerant(),
    };
    understood(walk, all)
}

/// A bootstrap as written, checked and understood.
///
/// # Errors
/// All problems of the text, each with its place.
pub fn bootstrap(text: &str, syntax: Syntax) -> Result<Bootstrap, ConfigErrors> {
    bootstrap_from_value(strict::parse(text, syntax)?)
}

/// A bootstrap that is already a JSON value, in protobuf's JSON mapping.
///
/// # Errors
/// All problems of the value, each with its place.
pub fn bootstrap_from_value(value: Value) -> Result<Bootstrap, ConfigErrors> {
    understood(walk::Walk::default(), value)
}

/// What a text says, document by document, whatever it is about; a key that is written twice is an error.
///
/// # Errors
/// It is not of that syntax; the error names line and column.
pub fn documents(text: &str, syntax: Syntax) -> Result<Vec<Value>, ConfigErrors> {
    strict::documents(text, syntax)
}

fn message() -> prost_reflect::MessageDescriptor {
    protobuf::descriptor(&Wire::full_name()).expect("invariant: Bootstrap is transcribed")
}

fn understood(mut walk: walk::Walk, mut value: Value) -> Result<Bootstrap, ConfigErrors> {
    let descriptor = message();
    if !walk.message(&descriptor, &mut value, "") {
        return Err(walk.errors);
    }
    let meaning = decode(descriptor, &value).and_then(Bootstrap::try_from);
    judge(walk, "", meaning)
}

/// What came of a walk over what stands at `place`, and of the meaning of what it left.
fn judge<T>(
    walk: walk::Walk,
    place: &str,
    meaning: Result<T, ConfigErrors>,
) -> Result<T, ConfigErrors> {
    for place in &walk.ignored {
        tracing::warn!(%place, "a field of the configuration has no effect here");
        metrics::counter!("outrigger_config_fields_ignored").increment(1);
    }
    for place in &walk.unknown {
        tracing::warn!(%place, "a field of the configuration that nobody knows");
        let counter = if walk.dynamic {
            "envoy_server_dynamic_unknown_fields"
        } else {
            "envoy_server_static_unknown_fields"
        };
        metrics::counter!(counter).increment(1);
    }
    let mut errors = walk.errors;
    match meaning {
        Ok(meaning) => errors.finish(Some(meaning)),
        Err(of_meaning) => {
            let mut placed = ConfigErrors::default();
            placed.absorb(place, of_meaning);
            // What had to be taken out is missing now, which is not a problem of its own.
            placed.retain(|place| {
                !walk
                    .removed
                    .iter()
                    .any(|gone| is_below(place, gone) || is_below(gone, place))
            });
            errors.absorb("", placed);
            errors.finish(None)
        }
    }
}

fn decode(
    descriptor: prost_reflect::MessageDescriptor,
    value: &Value,
) -> Result<Wire, ConfigErrors> {
    let message = protobuf::from_json(descriptor, value)?;
    message
        .transcode_to()
        .map_err(|error| ConfigErrors::one("", error.to_string()))
}

/// Whether `place` is `top` or inside it.
fn is_below(place: &str, top: &str) -> bool {
    place
        .strip_prefix(top)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}
