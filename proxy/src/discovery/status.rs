//! What became of each resource that came or was asked for, as client status discovery (CSDS) and `/config_dump` tell it.

use super::{
    Discovery,
    model::{Kind, Named, Subscription},
};
use outrigger_xds::{
    accepted::{Accepted, Failure, State},
    csds::{Client, Held, Outcome},
    load::discovery::Resource,
    resource::config_source::Origin,
    subscription::Status,
};

/// What was asked for and never came, in no version: its name, and why.
pub(super) type Absent<'a> = (&'a str, Outcome, Option<&'a Failure>);

impl Discovery {
    /// All that came from elsewhere, and what was asked for and is not there.
    #[must_use]
    pub fn client_status(&self, with_contents: bool) -> Client {
        let model = &self.model;
        let mut resources = self.held(Kind::Clusters, &model.clusters, with_contents);
        for accepted in model.assignments.values() {
            resources.extend(self.held(Kind::Endpoints, accepted, with_contents));
        }
        resources.extend(self.held(Kind::Listeners, &model.listeners, with_contents));
        for accepted in model.tables.values() {
            resources.extend(self.held(Kind::Routes, accepted, with_contents));
        }
        // Keys are nobody's business.
        for accepted in model.secrets.values() {
            resources.extend(self.held(Kind::Secrets, accepted, false));
        }
        for kind in Kind::ALL {
            let absent = self.absent(kind).into_iter();
            resources.extend(absent.map(|(name, status, error)| Held {
                kind,
                name: name.to_owned(),
                version: String::new(),
                resource: None,
                at: None,
                status,
                error: error.cloned(),
            }));
        }
        Client {
            node: model.bootstrap.node.clone(),
            resources,
        }
    }

    fn held<R: Resource + PartialEq>(
        &self,
        kind: Kind,
        accepted: &Accepted<R>,
        with_contents: bool,
    ) -> Vec<Held> {
        let each = accepted.states().map(|(name, state)| {
            let good = state.good.as_ref();
            let (status, error) = self.fate(kind, name, state);
            Held {
                kind,
                name: name.to_owned(),
                version: good.map_or_else(String::new, |good| good.version.clone()),
                resource: good
                    .filter(|_| with_contents)
                    .map(|good| good.resource.to_json()),
                at: good.map(|good| good.at),
                status,
                error: error.cloned(),
            }
        });
        each.collect()
    }

    /// What became of the newest version of a resource that came, and what is wrong with it.
    pub(super) fn fate<'a, R>(
        &'a self,
        kind: Kind,
        name: &str,
        state: &'a State<R>,
    ) -> (Outcome, Option<&'a Failure>) {
        match (self.error_of(kind, name), &state.error) {
            (Some(error), _) => (Outcome::ReceivedError, Some(error)),
            (None, Some(refused)) => (Outcome::Nacked, Some(refused)),
            (None, None) => (Outcome::Acked, None),
        }
    }

    /// Why the control plane cannot send it.
    fn error_of(&self, kind: Kind, name: &str) -> Option<&Failure> {
        self.errors.get(&(kind, name.to_owned()))
    }

    /// What of a type was asked for by name and is not there.
    pub(super) fn absent(&self, kind: Kind) -> Vec<Absent<'_>> {
        let asked = self.model.waits.iter();
        let absent = asked.filter(|(asked, _)| {
            asked.kind == kind && !asked.name.is_empty() && !self.has_come(asked)
        });
        let each = absent.map(|(asked, wait)| {
            let is_missing = match &asked.origin {
                Origin::Ads => self.is_missing(kind, &asked.name),
                Origin::Path(_) => wait.expired,
            };
            let error = self.error_of(kind, &asked.name);
            let outcome = match error {
                Some(_) => Outcome::ReceivedError,
                None if is_missing => Outcome::DoesNotExist,
                None => Outcome::Requested,
            };
            (asked.name.as_str(), outcome, error)
        });
        each.collect()
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
