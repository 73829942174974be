//! Is the work tree as ARCHITECTURE.md and CONTRIBUTING.md say? Crate edges and features by `cargo metadata`, modules,
//! sizes and attributes by a scan of the sources, documents against what they describe.
//!
//! Every rule lists all its violations at once, each with its file and line. What a reviewer allowed stands in a table
//! beside the rule with its reason; an exception that is no longer needed is a violation too. It does not judge style
//! that rustfmt or clippy judge.

mod crates;
mod docs;
mod module_paths;
mod sizes;
mod sources;
mod tree;

use std::path::{Path, PathBuf};

/// The root of the checkout.
fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest
        .parent()
        .expect("the crate lies in the workspace")
        .to_owned()
}

/// Fails with all of them, one a line.
#[track_caller]
fn report(mut violations: Vec<String>) {
    violations.sort();
    violations.dedup();
    assert!(
        violations.is_empty(),
        "\n{}\n{} violations\n",
        violations.join("\n"),
        violations.len()
    );
}

/// A reviewed exception to a rule.
struct Exception {
    /// What is excepted, as the rule names it.
    what: &'static str,
    /// Why it may stay.
    reason: &'static str,
}

/// Takes the excepted ones out of `found` (name, violation); an exception that excepts nothing is a violation.
fn without(exceptions: &[Exception], found: Vec<(String, String)>) -> Vec<String> {
    let mut violations: Vec<String> = exceptions
        .iter()
        .filter(|exception| !found.iter().any(|(name, _)| name == exception.what))
        .map(|unused| {
            format!(
                "{}: the exception is not needed any more ({})",
                unused.what, unused.reason
            )
        })
        .collect();
    violations.extend(
        found
            .into_iter()
            .filter(|(name, _)| !exceptions.iter().any(|exception| exception.what == *name))
            .map(|(_, text)| text),
    );
    violations
}
