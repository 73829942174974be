//! Which cluster a request goes to: the route's own, the one that a header names, or one that is drawn.

use super::edits::Edits;
use ahash::AHashMap;
use http::{HeaderMap, HeaderName};
use outrigger_filters::filter::{Chain, RouteFacts};
use rand::Rng;
use std::sync::Arc;

/// How the cluster of a request is found.
pub enum Choice {
    /// Always the same.
    One(Destination),
    /// By the weights of several.
    Weighted {
        /// Each with the sum of the weights up to and with it.
        destinations: Vec<(u64, Destination)>,
        /// The request header whose number is taken instead of chance.
        number: Option<HeaderName>,
    },
}

/// One cluster, or the header that names it, and what is done to heads on the way there.
pub struct Destination {
    /// Which cluster.
    pub cluster: ByName,
    /// What is done to heads.
    pub edits: Option<Arc<Edits>>,
    /// Instead of the route's chain.
    pub filters: Option<Chain>,
}

/// A cluster, named by the route or by the request.
pub enum ByName {
    /// By the route.
    Fixed(Arc<RouteFacts>),
    /// By a header of the request.
    Header(HeaderName, Arc<Known>),
}

/// The facts of a route for each cluster that there is, and for those that there are not.
pub struct Known {
    /// By name.
    pub clusters: AHashMap<String, Arc<RouteFacts>>,
    /// Where the name is none of these.
    pub other: RouteFacts,
}

impl Choice {
    /// Where a request goes.
    #[must_use]
    pub fn destination(&self, headers: &HeaderMap) -> &Destination {
        match self {
            Self::One(destination) => destination,
            Self::Weighted {
                destinations,
                number,
            } => {
                let total = destinations.last().map_or(1, |(upto, _)| (*upto).max(1));
                let given = number.as_ref().and_then(|name| {
                    let text = headers.get(name)?.to_str().ok()?;
                    text.parse::<u64>().ok()
                });
                let drawn = match given {
                    Some(given) => given % total,
                    None => rand::rng().random_range(0..total),
                };
                let at = destinations.partition_point(|(upto, _)| *upto <= drawn);
                &destinations[at.min(destinations.len() - 1)].1
            }
        }
    }
}

impl ByName {
    /// The route's facts for a request.
    #[must_use]
    pub fn facts(&self, headers: &HeaderMap) -> Arc<RouteFacts> {
        match self {
            Self::Fixed(facts) => facts.clone(),
            Self::Header(name, known) => {
                let name = headers
                    .get(name)
                    .and_then(|name| name.to_str().ok())
                    .unwrap_or_default();
                known.clusters.get(name).cloned().unwrap_or_else(|| {
                    Arc::new(RouteFacts {
                        cluster: name.into(),
                        ..known.other.clone()
                    })
                })
            }
        }
    }
}
