//! What became of each resource that came or was asked for, as client status discovery (CSDS) tells it.

use super::{
    Discovery,
    model::{Kind, Named, Subscription},
};
use outrigger_xds::{
    accepted::{Accepted, State},
    csds::{Client, Held, Outcome},
    load::discovery::Resource,
    resource::config_source::Origin,
    subscription::Status,
};

/// Of a resource that came.
pub(super) fn outcome<R>(state: &State<R>) -> Outcome {
    match state.error {
        None => Outcome::Acked,
        Some(_) => Outcome::Nacked,
    }
}

fn held<R: Resource + PartialEq>(
    kind: Kind,
    accepted: &Accepted<R>,
    with_contents: bool,
) -> impl Iterator<Item = Held> {
    // Keys are nobody's business.
    let is_shown = with_contents && kind != Kind::Secrets;
    accepted.states().map(move |(name, state)| {
        let good = state.good.as_ref();
        Held {
            kind,
            name: name.to_owned(),
            version: good.map_or_else(String::new, |good| good.version.clone()),
            resource: good
                .filter(|_| is_shown)
                .map(|good| good.resource.to_json()),
            at: good.map(|good| good.at),
            status: outcome(state),
            error: state.error.clone(),
        }
    })
}

fn all_held<R: Resource + PartialEq>(
    kind: Kind,
    named: &Named<R>,
    with_contents: bool,
) -> impl Iterator<Item = Held> {
    let sets = named.values();
    sets.flat_map(move |accepted| held(kind, accepted, with_contents))
}

impl Discovery {
    /// All that came from elsewhere, and what was asked for and is not there.
    #[must_use]
    pub fn client_status(&self, with_contents: bool) -> Client {
        let model = &self.model;
        let came = held(Kind::Clusters, &model.clusters, with_contents)
            .chain(all_held(Kind::Endpoints, &model.assignments, with_contents))
            .chain(held(Kind::Listeners, &model.listeners, with_contents))
            .chain(all_held(Kind::Routes, &model.tables, with_contents))
            .chain(all_held(Kind::Secrets, &model.secrets, with_contents));
        let absent = Kind::ALL.into_iter().flat_map(|kind| {
            let absent = self.absent(kind).into_iter();
            absent.map(move |(name, status)| Held {
                kind,
                name,
                version: String::new(),
                resource: None,
                at: None,
                status,
                error: None,
            })
        });
        Client {
            node: model.bootstrap.node.clone(),
            resources: came.chain(absent).collect(),
        }
    }

    /// What of a type was asked for by name and never came, in no version.
    pub(super) fn absent(&self, kind: Kind) -> Vec<(String, Outcome)> {
        let named = self.model.waits.iter();
        named
            .filter(|(asked, _)| asked.kind == kind && !asked.name.is_empty())
            .filter(|(asked, _)| !self.has_come(asked))
            .map(|(asked, wait)| {
                let is_missing = match &asked.origin {
                    Origin::Ads => self.is_missing(kind, &asked.name),
                    Origin::Path(_) => wait.expired,
                };
                let outcome = if is_missing {
                    Outcome::DoesNotExist
                } else {
                    Outcome::Requested
                };
                (asked.name.clone(), outcome)
            })
            .collect()
    }

    /// Whether the control plane had its time to send it, or said that there is none.
    fn is_missing(&self, kind: Kind, name: &str) -> bool {
        let ads = self.ads.as_ref();
        ads.is_some_and(|ads| ads.status(kind, name) == Status::DoesNotExist)
    }

    /// Whether a version of it came, be it one that was refused.
    fn has_come(&self, asked: &Subscription) -> bool {
        fn has<R: PartialEq>(named: &Named<R>, asked: &Subscription) -> bool {
            let accepted = named.get(&asked.origin);
            let mut states = accepted.into_iter().flat_map(Accepted::states);
            states.any(|(name, _)| name == asked.name)
        }
        match asked.kind {
            Kind::Routes => has(&self.model.tables, asked),
            Kind::Endpoints => has(&self.model.assignments, asked),
            Kind::Secrets => has(&self.model.secrets, asked),
            Kind::Clusters | Kind::Listeners => true,
        }
    }
}
