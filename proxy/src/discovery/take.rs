//! Taking resources in, type by type: each is judged beside all others, what is good takes effect with the next plan.

use super::{Discovery, build::Check, model::Kind};
use outrigger_xds::{
    accepted::{Accepted, Outcome, Scope, Update},
    load::discovery::{Resource, Response},
    resource::{config_source::Origin, runtime::Runtime, secret::Secret},
};
use std::time::SystemTime;

/// An update that comes now.
fn update<R: Resource>(response: Response, scope: Scope) -> Update<R> {
    Update {
        version: response.version.clone(),
        at: SystemTime::now(),
        removed: response.removed.clone(),
        resources: response.read(),
        scope,
    }
}

/// What is judged is out of the model meanwhile.
fn judge<R: PartialEq>(
    mut set: Accepted<R>,
    update: Update<R>,
    mut check: Check<'_, R>,
) -> (Accepted<R>, Outcome) {
    let outcome = set.take(update, &mut check);
    (set, outcome)
}

impl Discovery {
    /// Takes the resources of one type from one source, whatever brought them: the good ones take effect with the next
    /// plan, a bad one keeps its last good version.
    pub(super) fn take(&mut self, kind: Kind, origin: &Origin, response: Response) -> Outcome {
        // A control plane says what is gone.
        let all = match origin {
            Origin::Path(_) => Scope::Whole,
            Origin::Ads | Origin::Service(_) => Scope::Named,
        };
        let outcome = match kind {
            Kind::Clusters => self.take_clusters(response, all),
            Kind::Listeners => self.take_listeners(response, all),
            Kind::Routes => self.take_routes(origin, response),
            Kind::Extensions => self.take_extensions(origin, response),
            Kind::Endpoints => self.take_endpoints(origin, response),
            Kind::Runtimes => {
                let set = self.model.runtimes.entry(origin.clone()).or_default();
                set.take(update(response, Scope::Named), &mut |_: &Runtime| Ok(()))
            }
            Kind::Secrets => {
                let set = self.model.secrets.entry(origin.clone()).or_default();
                set.take(update(response, Scope::Named), &mut |secret: &Secret| {
                    crate::tls::check_secret(&secret.content)
                })
            }
        };
        self.stale = true;
        self.renewable |= kind == Kind::Secrets;
        outcome
    }

    fn take_clusters(&mut self, response: Response, scope: Scope) -> Outcome {
        let update = update(response, scope);
        let set = self.model.clusters.take_out(&update);
        let check = self
            .builder
            .cluster_check(&self.model, &self.contexts, &update);
        let (set, outcome) = judge(set, update, check);
        self.model.clusters.put_back(set);
        outcome
    }

    fn take_listeners(&mut self, response: Response, scope: Scope) -> Outcome {
        let update = update(response, scope);
        let set = self.model.listeners.take_out(&update);
        let check = self.builder.listener_check(&self.model, &self.contexts);
        let (set, outcome) = judge(set, update, check);
        self.model.listeners.put_back(set);
        outcome
    }

    fn take_routes(&mut self, origin: &Origin, response: Response) -> Outcome {
        let update = update(response, Scope::Named);
        let tables = self.model.tables.entry(origin.clone()).or_default();
        let set = tables.take_out(&update);
        let check = self.builder.route_check(&self.model, origin);
        let (set, outcome) = judge(set, update, check);
        let tables = self.model.tables.entry(origin.clone()).or_default();
        tables.put_back(set);
        outcome
    }

    fn take_extensions(&mut self, origin: &Origin, response: Response) -> Outcome {
        let update = update(response, Scope::Named);
        let known = self.model.extensions.entry(origin.clone()).or_default();
        let set = known.take_out(&update);
        let check = self.builder.extension_check(&self.model, origin);
        let (set, outcome) = judge(set, update, check);
        let known = self.model.extensions.entry(origin.clone()).or_default();
        known.put_back(set);
        outcome
    }

    fn take_endpoints(&mut self, origin: &Origin, response: Response) -> Outcome {
        let update = update(response, Scope::Named);
        let known = self.model.assignments.entry(origin.clone()).or_default();
        let set = known.take_out(&update);
        let check = self.builder.endpoint_check(&self.model, origin, &update);
        let (set, outcome) = judge(set, update, check);
        let known = self.model.assignments.entry(origin.clone()).or_default();
        known.put_back(set);
        outcome
    }
}
