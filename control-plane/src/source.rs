//! Where resources come from. A source gives all that it has, as a whole, each time something of it changes.

pub mod files;
pub mod leases;

use crate::short::{self, Document};
use outrigger_xds::{load::written::Written, registry::Registration};
use std::fmt;

/// A resource, and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// For people: a file, an object of a cluster, a lease.
    pub origin: String,
    /// Where in it; may be empty.
    pub place: String,
    /// Itself.
    pub written: Written,
}

/// Something wrong with what a source has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// For people: a file, an object of a cluster, a lease.
    pub origin: String,
    /// What, with its place.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

impl From<short::Problem> for Problem {
    fn from(problem: short::Problem) -> Self {
        Self {
            message: problem.to_string(),
            origin: problem.origin.file,
        }
    }
}

/// All that a source has.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Content {
    /// Envoy's resources, as they are written.
    pub raw: Vec<Placed>,
    /// Short resources: what they become is decided with those of all sources at hand.
    pub short: Vec<Document>,
    /// Nodes that registered, with the engines beside them: pools of short resources choose among them.
    pub nodes: Vec<Registration>,
}

/// All that a source has, or everything that is wrong with it.
pub type News = Result<Content, Vec<Problem>>;

/// Somewhere resources come from.
#[tonic::async_trait]
pub trait Source: Send {
    /// Unique among the sources of a process.
    fn name(&self) -> &str;

    /// Waits until there is something new; at first gives what there is. What stays as it is gives nothing, good or bad.
    async fn next(&mut self) -> News;
}
