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

/// Whether a version of it came, be it one that was refused.
fn has<R: PartialEq>(accepted: &Accepted<R>, name: &str) -> bool {
    accepted.states().any(|(known, _)| known == name)
}

impl Discovery {
    /// All that came from elsewhere, and what was asked for and is not there.
    #[must_use]
    pub fn client_status(&self, with_contents: bool) -> Client {
        let model = &self.model;
        let mut resources = self.held(
            Kind::Clusters,
            model.origin_of_all(Kind::Clusters),
            &model.clusters,
            with_contents,
        );
        for (origin, accepted) in &model.assignments {
            resources.extend(self.held(Kind::Endpoints, origin, accepted, with_contents));
        }
        resources.extend(self.held(
            Kind::Listeners,
            model.origin_of_all(Kind::Listeners),
            &model.listeners,
            with_contents,
        ));
        for (origin, accepted) in &model.tables {
            resources.extend(self.held(Kind::Routes, origin, accepted, with_contents));
        }
        for (origin, accepted) in &model.runtimes {
            resources.extend(self.held(Kind::Runtimes, origin, accepted, with_contents));
        }
        for (origin, accepted) in &model.extensions {
            resources.extend(self.held(Kind::Extensions, origin, accepted, with_contents));
        }
        // Keys are nobody's business.
        for (origin, accepted) in &model.secrets {
            resources.extend(self.held(Kind::Secrets, origin, accepted, false));
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
        origin: &Origin,
        accepted: &Accepted<R>,
        with_contents: bool,
    ) -> Vec<Held> {
        let each = accepted.states().map(|(name, state)| {
            let good = state.good.as_ref();
            let (status, error) = self.fate((kind, origin), name, state);
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
        (kind, origin): (Kind, &Origin),
        name: &str,
        state: &'a State<R>,
    ) -> (Outcome, Option<&'a Failure>) {
        match (self.errors.of(kind, origin, name), &state.error) {
            (Some(error), _) => (Outcome::ReceivedError, Some(error)),
            (None, Some(refused)) => (Outcome::Nacked, Some(refused)),
            (None, None) => (Outcome::Acked, None),
        }
    }

    /// What of a type was asked for and is not there: by name; or as part of all that there is, as far as a control plane tells.
    pub(super) fn absent(&self, kind: Kind) -> Vec<Absent<'_>> {
        if kind.is_whole() {
            return self.unsent(kind, self.model.origin_of_all(kind));
        }
        let asked = self.model.waits.iter();
        let absent = asked.filter(|(asked, _)| {
            asked.kind == kind && !asked.name.is_empty() && !self.has_come(asked)
        });
        let each = absent.map(|(asked, wait)| {
            let is_missing = match &asked.origin {
                Origin::Ads | Origin::Service(_) => self.is_missing(asked),
                Origin::Path(_) => wait.expired,
            };
            let error = self.errors.of(kind, &asked.origin, &asked.name);
            let outcome = match error {
                Some(_) => Outcome::ReceivedError,
                None if is_missing => Outcome::DoesNotExist,
                None => Outcome::Requested,
            };
            (asked.name.as_str(), outcome, error)
        });
        each.collect()
    }

    /// Clusters or listeners that a control plane cannot send, and never sent.
    fn unsent(&self, kind: Kind, origin: &Origin) -> Vec<Absent<'_>> {
        let errors = self.errors.each(kind, origin);
        let absent = errors.filter(|(name, _)| match kind {
            Kind::Clusters => !has(&self.model.clusters, name),
            _ => !has(&self.model.listeners, name),
        });
        absent
            .map(|(name, error)| (name, Outcome::ReceivedError, Some(error)))
            .collect()
    }

    /// Whether a control plane had its time to send it, or said that there is none.
    fn is_missing(&self, asked: &Subscription) -> bool {
        let subscriptions = self.lines.of(asked);
        subscriptions.is_some_and(|it| it.status(asked.kind, &asked.name) == Status::DoesNotExist)
    }

    /// Whether a version of it came, be it one that was refused.
    fn has_come(&self, asked: &Subscription) -> bool {
        fn named<R: PartialEq>(named: &Named<R>, asked: &Subscription) -> bool {
            let accepted = named.get(&asked.origin);
            accepted.is_some_and(|accepted| has(accepted, &asked.name))
        }
        match asked.kind {
            Kind::Routes => named(&self.model.tables, asked),
            Kind::Endpoints => named(&self.model.assignments, asked),
            Kind::Secrets => named(&self.model.secrets, asked),
            Kind::Runtimes => named(&self.model.runtimes, asked),
            Kind::Extensions => named(&self.model.extensions, asked),
            Kind::Clusters | Kind::Listeners => true,
        }
    }
}
