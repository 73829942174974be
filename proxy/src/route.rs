//! Finding the route of a request: virtual host by domain, then the first route that matches.

mod domains;
mod matcher;

pub use domains::Domains;
pub use matcher::Matcher;
pub use outrigger_filters::matching::authority;
