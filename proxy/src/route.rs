//! Finding the route of a request, and what it makes of it: virtual host by domain, then the first route that matches,
//! then the cluster and the changes to heads and path.

mod build;
mod choice;
mod domains;
mod edits;
pub mod grpc;
mod matcher;
mod rewrite;

pub use build::{BuiltRoute, Scope, Target, build};
pub use choice::{ByName, Choice, Destination, Known};
pub use domains::Domains;
pub(crate) use edits::Level;
pub use edits::{Applied, Edits, Facts};
pub use matcher::Matcher;
pub use outrigger_filters::matching::authority;
pub use rewrite::{PathRewrite, Redirector};
