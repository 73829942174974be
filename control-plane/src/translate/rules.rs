//! All documents together, and which policies count for which requests.

use crate::short::{
    Document, Origin, Spec,
    fleet::Fleet,
    gateway::Gateway,
    policy::{
        Canary, Migration, Policy, RateLimits, Retries, Routing, RoutingPolicy, Split, Timeouts,
    },
};
use outrigger_xds::resource::cluster::LbPolicy;
use std::collections::{BTreeMap, BTreeSet};

/// What a document says, and where it stands.
#[derive(Debug)]
pub(super) struct Named<'a, T> {
    pub(super) origin: &'a Origin,
    pub(super) spec: &'a T,
}

impl<'a, T> Named<'a, T> {
    pub(super) fn name(&self) -> &'a str {
        &self.origin.name
    }
}

/// All documents, each kind by name: nothing depends on the order in which they came.
#[derive(Debug)]
pub(super) struct Whole<'a> {
    pub(super) fleets: BTreeMap<&'a str, Named<'a, Fleet>>,
    pub(super) policies: Vec<Named<'a, Policy>>,
    pub(super) gateways: Vec<Named<'a, Gateway>>,
    /// Documents whose kind and name another one has, which is the second here.
    pub(super) twins: Vec<(&'a Origin, &'a Origin)>,
    /// Names of secrets that exist.
    pub(super) secrets: &'a BTreeSet<String>,
}

impl<'a> Whole<'a> {
    pub(super) fn new(documents: &'a [Document], secrets: &'a BTreeSet<String>) -> Self {
        let mut whole = Self {
            fleets: BTreeMap::new(),
            policies: Vec::new(),
            gateways: Vec::new(),
            twins: Vec::new(),
            secrets,
        };
        let mut sorted: Vec<_> = documents.iter().collect();
        sorted.sort_by_key(|document| &document.origin);
        let mut before: Option<&Origin> = None;
        for document in sorted {
            let origin = &document.origin;
            let first =
                before.filter(|first| (&first.kind, &first.name) == (&origin.kind, &origin.name));
            if let Some(first) = first {
                whole.twins.push((origin, first));
                continue;
            }
            before = Some(origin);
            match &document.spec {
                Spec::Fleet(spec) => {
                    whole.fleets.insert(&origin.name, Named { origin, spec });
                }
                Spec::Policy(spec) => whole.policies.push(Named { origin, spec }),
                Spec::Gateway(spec) => whole.gateways.push(Named { origin, spec }),
            }
        }
        whole
    }

    /// What counts for requests to a fleet whose tenant no policy names.
    pub(super) fn base(&self, fleet: &str) -> Rules<'a> {
        let of_all = self
            .policies
            .iter()
            .filter(|policy| policy.spec.tenants.is_empty());
        let (mut named, mut general) = (Vec::new(), Vec::new());
        for policy in of_all.filter(|policy| concerns(policy.spec, fleet)) {
            let level = if policy.spec.fleets.is_empty() {
                &mut general
            } else {
                &mut named
            };
            level.push(policy.spec);
        }
        named.extend(general);
        Rules(named)
    }

    /// Tenants of a fleet that have a policy, by policy: its name, the tenant, and what counts for their requests.
    pub(super) fn tenants(&self, fleet: &str) -> Vec<(&'a str, &'a str, Rules<'a>)> {
        let mut found = Vec::new();
        for policy in self
            .policies
            .iter()
            .filter(|policy| concerns(policy.spec, fleet))
        {
            let rules = self.base(fleet).under(policy.spec);
            let tenants = policy.spec.tenants.iter();
            found.extend(tenants.map(|tenant| (policy.name(), tenant.as_str(), rules.clone())));
        }
        found.sort_by_key(|(policy, tenant, _)| (*policy, *tenant));
        found
    }
}

/// Whether a policy says something of requests to a fleet.
pub(super) fn concerns(policy: &Policy, fleet: &str) -> bool {
    policy.fleets.is_empty() || policy.fleets.iter().any(|name| name == fleet)
}

/// Policies that count for some requests, the most specific first: of each section the first that says it.
#[derive(Debug, Clone)]
pub(super) struct Rules<'a>(Vec<&'a Policy>);

impl<'a> Rules<'a> {
    /// The same below a policy that is more specific.
    pub(super) fn under(&self, policy: &'a Policy) -> Self {
        let below = self.0.iter().copied();
        Self([policy].into_iter().chain(below).collect())
    }

    pub(super) fn routing(&self) -> Routing {
        let said = self.0.iter().find_map(|policy| policy.routing.clone());
        said.unwrap_or_default()
    }

    pub(super) fn split(&self) -> Split {
        let said = self.0.iter().find_map(|policy| policy.split.clone());
        said.unwrap_or_default()
    }

    pub(super) fn canary(&self) -> Option<Canary> {
        let said = self.0.iter().find_map(|policy| policy.canary);
        said.filter(|canary| canary.enabled)
    }

    pub(super) fn migration(&self) -> Migration {
        let said = self.0.iter().find_map(|policy| policy.migration.clone());
        said.unwrap_or_default()
    }

    pub(super) fn retries(&self) -> Option<&Retries> {
        self.0.iter().find_map(|policy| policy.retries.as_ref())
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        let said = self.0.iter().find_map(|policy| policy.timeouts.clone());
        said.unwrap_or_default()
    }

    pub(super) fn rate_limits(&self) -> Option<&RateLimits> {
        self.0.iter().find_map(|policy| policy.rate_limits.as_ref())
    }

    /// Of the cluster, which all requests to the fleet share. With `kv` for what the filter leaves unranked.
    pub(super) fn lb_policy(&self) -> LbPolicy {
        match self.routing().policy {
            RoutingPolicy::Kv | RoutingPolicy::LeastRequest => LbPolicy::LeastRequest,
            RoutingPolicy::RoundRobin => LbPolicy::RoundRobin,
            RoutingPolicy::Random => LbPolicy::Random,
        }
    }
}
