//! Configuration that comes while we run: takes resources in one by one, waits for what belongs together, and says what
//! is to be in effect.
//!
//! Where resources come from is a matter of [`files`] and [`ads`]; what is known of them, of [`model`]. Nothing here binds
//! a socket or touches a request: a [`Plan`] is carried out by whoever runs the proxy.

mod ads;
mod build;
mod channels;
mod dump;
mod errors;
mod files;
pub mod kept;
mod model;
mod stats;
mod status;
mod take;
#[cfg(test)]
mod tests;

use crate::{access_log::Sinks, listener::Planned, tls::contexts::Contexts, trace::Exporters};
pub use ads::{News, Turn};
use build::Builder;
pub use channels::Channel;
use channels::Lines;
use errors::Errors;
use files::Files;
use model::{Kind, Model, Subscription};
use outrigger_filters::services::Services;
use outrigger_xds::{
    accepted::Outcome,
    load::{
        Syntax,
        discovery::{self, Response},
    },
    resource::{
        bootstrap::Bootstrap,
        cluster::{CircuitBreakers, Cluster},
        config_source::Origin,
        secret::SecretConfig,
    },
};
use stats::Event;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};

/// Larger files are no configuration.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// How long a removed cluster is kept for requests that were routed to it before, at most.
const LINGER_MAX: Duration = Duration::from_secs(60);
/// Rounds of asking for what the last round named: clusters name endpoints and secrets, listeners routes and secrets.
const ROUNDS_MAX: usize = 8;

/// What is to be in effect from now on.
pub struct Plan {
    /// All clusters, with their endpoints.
    pub clusters: Vec<Cluster>,
    /// How their endpoints are secured, by cluster.
    pub contexts: crate::cluster::Contexts,
    /// All listeners, with their routes.
    pub listeners: Vec<Planned>,
    /// How many listeners still wait.
    pub warming: usize,
}

/// All configuration, and how it changes.
pub struct Discovery {
    builder: Builder,
    model: Model,
    files: Files,
    /// What control planes are asked for.
    lines: Lines,
    contexts: Contexts,
    clusters: BTreeMap<String, Cluster>,
    /// Removed, until no request is left that was routed before.
    lingering: Vec<Lingering>,
    listeners: BTreeMap<String, Planned>,
    /// What routes were built with.
    breakers: BTreeMap<String, CircuitBreakers>,
    warming_clusters: BTreeSet<String>,
    warming_listeners: BTreeSet<String>,
    /// Listeners that could not be made to run.
    failed: BTreeMap<String, String>,
    /// What control planes say that they cannot send.
    errors: Errors,
    /// When what was written came into effect.
    since: SystemTime,
    /// Whether the first configuration is complete.
    initialized: bool,
    /// What is asked for may have changed.
    stale: bool,
    /// What TLS contexts are made of may have changed.
    renewable: bool,
    /// What went wrong with resources that came, for those who want to know at once.
    problems: Vec<String>,
}

struct Lingering {
    clusters: Vec<Cluster>,
    routed_by: Vec<Weak<crate::snapshot::HttpConfig>>,
    until: Instant,
}

impl Lingering {
    fn is_needed(&self, now: Instant) -> bool {
        now < self.until
            && self
                .routed_by
                .iter()
                .any(|config| config.strong_count() > 0)
    }
}

impl Discovery {
    /// Nothing is configured.
    #[must_use]
    pub fn new(services: Services, sinks: Arc<Sinks>, exporters: Arc<Exporters>) -> Self {
        Self {
            builder: Builder {
                services,
                sinks,
                exporters,
            },
            model: Model::default(),
            files: Files::default(),
            lines: Lines::default(),
            contexts: Contexts::default(),
            clusters: BTreeMap::new(),
            lingering: Vec::new(),
            listeners: BTreeMap::new(),
            breakers: BTreeMap::new(),
            warming_clusters: BTreeSet::new(),
            warming_listeners: BTreeSet::new(),
            failed: BTreeMap::new(),
            errors: Errors::default(),
            since: SystemTime::now(),
            initialized: false,
            stale: true,
            renewable: false,
            problems: Vec::new(),
        }
    }

    /// Takes what is written, which is right as a whole or not taken.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn write(&mut self, bootstrap: Bootstrap) -> Result<(), Vec<String>> {
        let before = std::mem::replace(&mut self.model.bootstrap, bootstrap);
        let errors = self.builder.check_written(&self.model, &self.contexts);
        if !errors.is_empty() {
            self.model.bootstrap = before;
            return Err(errors);
        }
        if self.model.bootstrap.ads != before.ads {
            self.open_lines();
        }
        self.since = SystemTime::now();
        (self.stale, self.renewable) = (true, true);
        Ok(())
    }

    /// Looks for what is new; whether anything is.
    pub fn look(&mut self, now: Instant) -> bool {
        let mut any = false;
        for _ in 0..ROUNDS_MAX {
            if std::mem::take(&mut self.stale) {
                self.model.subscribe(now);
                self.ask_control_planes();
            }
            let of_contexts = self.contexts.files();
            let mut paths = of_contexts.clone();
            paths.extend(
                self.model
                    .waits
                    .keys()
                    .filter_map(|asked| match &asked.origin {
                        Origin::Path(path) => Some(path.clone()),
                        Origin::Ads | Origin::Service(_) => None,
                    }),
            );
            let news = self.files.look(&paths);
            if news.is_empty() {
                break;
            }
            any = true;
            self.renewable |= news.iter().any(|path| of_contexts.contains(path));
            for (kind, path) in self.asked_of(&news) {
                self.read(kind, path);
            }
        }
        any |= self.lapse(now);
        let late = self.model.expire(now);
        for asked in &late {
            tracing::warn!(kind = ?asked.kind, name = asked.name, origin = %asked.origin, "has not come in time, going on without it");
            if let Some(wait) = self.model.waits.get(asked) {
                stats::count(asked, wait, Event::InitFetchTimeout);
            }
        }
        let lingering = self.lingering.len();
        self.lingering.retain(|removed| removed.is_needed(now));
        any || !late.is_empty() || lingering != self.lingering.len()
    }

    /// What is asked for in these files, clusters first.
    fn asked_of(&self, paths: &[String]) -> BTreeSet<(Kind, String)> {
        let asked = self.model.waits.keys();
        asked
            .filter_map(|asked| match &asked.origin {
                Origin::Path(path) if paths.contains(path) => Some((asked.kind, path.clone())),
                _ => None,
            })
            .collect()
    }

    fn read(&mut self, kind: Kind, path: String) {
        let response = response(&path);
        let origin = Origin::Path(path);
        self.count_all(kind, &origin, Event::Attempt);
        match response {
            Ok(response) => {
                let outcome = self.take(kind, &origin, response);
                self.tell(kind, &origin, &outcome, None);
            }
            Err(error) => {
                tracing::warn!(?kind, %origin, error, "cannot be read, what was good stays");
                self.problems.push(format!("{origin}: {error}"));
                self.count_all(kind, &origin, Event::Failure);
            }
        }
    }

    fn subscriptions(&self, kind: Kind, origin: &Origin) -> Vec<Subscription> {
        let asked = self.model.waits.keys();
        asked
            .filter(|asked| asked.kind == kind && asked.origin == *origin)
            .cloned()
            .collect()
    }

    fn count_all(&self, kind: Kind, origin: &Origin, event: Event) {
        self.count_each(&self.subscriptions(kind, origin), event);
    }

    fn count_each(&self, asked: &[Subscription], event: Event) {
        for asked in asked {
            stats::count(asked, &self.model.waits[asked], event);
        }
    }

    /// Says what came of an update, which says nothing of others than `about` if it is given.
    fn tell(
        &mut self,
        kind: Kind,
        origin: &Origin,
        outcome: &Outcome,
        about: Option<&BTreeSet<String>>,
    ) {
        for (name, details) in &outcome.rejected {
            tracing::warn!(?kind, %origin, name, details, "rejected, what was good stays");
            self.problems.push(format!("{origin}: '{name}': {details}"));
        }
        if !outcome.changed.is_empty() || !outcome.removed.is_empty() {
            let (changed, removed) = (outcome.changed.len(), outcome.removed.len());
            tracing::info!(?kind, %origin, changed, removed, "configuration taken");
        }
        if kind == Kind::Extensions {
            for name in &outcome.changed {
                stats::count_extension(stats::EXTENSION_RELOAD, name);
            }
        }
        let concerns =
            |name: &String| name.is_empty() || about.is_none_or(|about| about.contains(name));
        let mut asked = self.subscriptions(kind, origin);
        asked.retain(|asked| concerns(&asked.name));
        for asked in asked {
            let rejected = outcome
                .rejected
                .iter()
                .any(|(name, _)| asked.name.is_empty() || *name == asked.name);
            let event = if rejected {
                Event::Rejected
            } else if !self.model.is_there(&asked) {
                let name = &asked.name;
                self.problems.push(format!("{origin}: has no '{name}'"));
                Event::Empty
            } else {
                Event::Success
            };
            stats::count(&asked, &self.model.waits[&asked], event);
        }
    }

    /// What went wrong since the last call.
    pub fn problems(&mut self) -> Vec<String> {
        std::mem::take(&mut self.problems)
    }

    /// Whether the first configuration was complete once.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        self.initialized
    }

    /// What is written.
    #[must_use]
    pub fn written(&self) -> Arc<Bootstrap> {
        Arc::new(self.model.bootstrap.clone())
    }

    /// Whether there is nothing to look at.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.model.waits.is_empty() && self.lingering.is_empty() && self.contexts.files().is_empty()
    }

    /// How many listeners and clusters there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (
            self.model.all_listeners().count(),
            self.model.all_clusters().count(),
        )
    }

    /// The body of `/certs`.
    #[must_use]
    pub fn certs(&self) -> serde_json::Value {
        self.contexts.to_json()
    }

    /// Listeners that could not be made to run, with the reasons.
    pub fn failed(&mut self, errors: Vec<(String, String)>) {
        self.failed = errors.into_iter().collect();
    }

    /// What is to be in effect now. What still waits stays as it was.
    pub fn plan(&mut self, now: Instant) -> Plan {
        let runtime = &self.builder.services.runtime;
        runtime.configure(self.model.layers());
        if !self.model.has_runtimes && self.model.are_runtimes_there() {
            self.model.has_runtimes = true;
            self.stale = true;
        }
        let waits = self.plan_clusters(now);
        if !self.model.has_clusters && self.model.has_heard(Kind::Clusters) {
            self.model.has_clusters = !waits;
            self.stale |= self.model.has_clusters;
        }
        self.plan_listeners();
        if std::mem::take(&mut self.renewable) {
            let model = &self.model;
            self.contexts
                .renew(&|config: &SecretConfig| model.secret(config));
        }
        self.initialized |= !waits
            && self.warming_listeners.is_empty()
            && [Kind::Clusters, Kind::Listeners]
                .into_iter()
                .all(|kind| self.model.has_heard(kind));
        let lingering = self.lingering.iter().flat_map(|removed| &removed.clusters);
        let lingering = lingering.filter(|cluster| !self.clusters.contains_key(&cluster.name));
        let mut clusters: Vec<Cluster> = self.clusters.values().cloned().collect();
        let mut seen = BTreeSet::new();
        clusters.extend(
            lingering
                .filter(|cluster| seen.insert(&cluster.name))
                .cloned(),
        );
        let contexts = self.contexts.clients().clone().into_iter().collect();
        Plan {
            clusters,
            contexts,
            listeners: self.listeners.values().cloned().collect(),
            warming: self.warming_listeners.len(),
        }
    }

    /// Whether any waits. One that cannot be built is not waited for.
    fn plan_clusters(&mut self, now: Instant) -> bool {
        let mut waits = false;
        let model = &self.model;
        let find = |config: &SecretConfig| model.secret(config);
        let mut next = BTreeMap::new();
        let mut secured = BTreeMap::new();
        self.warming_clusters.clear();
        for cluster in model.all_clusters() {
            let name = &cluster.name;
            let complete = model.complete_cluster(cluster);
            waits |= complete.is_none();
            let complete = complete.and_then(|complete| {
                let context = self.contexts.client(&complete, &find);
                let context =
                    context.map_err(|error| tracing::error!(error, "cluster stays as it was"));
                Some((complete, context.ok()?))
            });
            let (in_effect, context) = match complete {
                Some((complete, context)) => (Some(complete), context),
                None => {
                    self.warming_clusters.insert(name.clone());
                    let before = self.clusters.get(name).cloned();
                    let sockets = self.contexts.clients().get(name).cloned();
                    (before, sockets.unwrap_or_default())
                }
            };
            if let Some(in_effect) = in_effect {
                next.insert(name.clone(), in_effect);
                secured.insert(name.clone(), context);
            }
        }
        let before = std::mem::replace(&mut self.clusters, next);
        self.count_clusters(&before);
        let gone = before
            .into_iter()
            .filter(|(name, _)| !self.clusters.contains_key(name));
        let gone: Vec<Cluster> = gone.map(|(_, cluster)| cluster).collect();
        let lingering = self.lingering.iter().flat_map(|removed| &removed.clusters);
        for cluster in gone.iter().chain(lingering) {
            if let Some(context) = self.contexts.clients().get(&cluster.name) {
                secured
                    .entry(cluster.name.clone())
                    .or_insert(context.clone());
            }
        }
        self.contexts.keep_clients(secured);
        if !gone.is_empty() {
            let planned = self.listeners.values();
            self.lingering.push(Lingering {
                clusters: gone,
                routed_by: planned
                    .flat_map(Planned::http)
                    .map(Arc::downgrade)
                    .collect(),
                until: now + LINGER_MAX,
            });
        }
        waits
    }

    fn count_clusters(&self, before: &BTreeMap<String, Cluster>) {
        let is_new = |name: &&String| !before.contains_key(*name);
        let added = self.clusters.keys().filter(is_new).count();
        let gone = |name: &&String| !self.clusters.contains_key(*name);
        let removed = before.keys().filter(gone).count();
        // Its endpoints alone are not the cluster.
        let other = |(name, cluster): &(&String, &Cluster)| {
            before.get(*name).is_some_and(|known| {
                let known = Cluster {
                    load_assignment: cluster.load_assignment.clone(),
                    ..known.clone()
                };
                known != **cluster
            })
        };
        let modified = self.clusters.iter().filter(other).count();
        metrics::counter!("envoy_cluster_manager_cluster_added").increment(added as u64);
        metrics::counter!("envoy_cluster_manager_cluster_removed").increment(removed as u64);
        metrics::counter!("envoy_cluster_manager_cluster_modified").increment(modified as u64);
        metrics::gauge!("envoy_cluster_manager_active_clusters").set(self.clusters.len() as f64);
        metrics::gauge!("envoy_cluster_manager_warming_clusters")
            .set(self.warming_clusters.len() as f64);
    }

    fn plan_listeners(&mut self) {
        let shells = build::shells(self.clusters.values());
        let breakers: BTreeMap<String, CircuitBreakers> = shells
            .iter()
            .map(|(name, cluster)| (name.clone(), cluster.circuit_breakers.clone()))
            .collect();
        let same_clusters = breakers == self.breakers;
        let model = &self.model;
        let find = |config: &SecretConfig| model.secret(config);
        let mut next = BTreeMap::new();
        let mut servers = BTreeMap::new();
        self.warming_listeners.clear();
        for listener in model.all_listeners() {
            let name = &listener.name;
            let before = self.listeners.get(name);
            let planned = match model.complete_listener(listener) {
                None => {
                    self.warming_listeners.insert(name.clone());
                    before.cloned()
                }
                Some(complete) => {
                    let known = before.filter(|_| same_clusters);
                    let built = self.builder.plan(&complete, known, &shells, |chain| {
                        self.contexts.server(name, chain, &find)
                    });
                    built
                        .map_err(|error| tracing::error!(listener = name, error, "stays as it was"))
                        .ok()
                        .or_else(|| before.cloned())
                }
            };
            if let Some(planned) = planned {
                servers.insert(name.clone(), planned.servers().cloned().collect());
                next.insert(name.clone(), planned);
            }
        }
        self.listeners = next;
        self.breakers = breakers;
        self.contexts.keep_servers(servers);
        self.contexts.count_days();
    }
}

/// A response as a file holds it.
fn response(path: &str) -> Result<Response, String> {
    let size = std::fs::metadata(path)
        .map_err(|error| error.to_string())?
        .len();
    if size > FILE_BYTES_MAX {
        return Err(format!("has more than {FILE_BYTES_MAX} bytes"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let json = Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "json");
    let syntax = if json { Syntax::Json } else { Syntax::Yaml };
    discovery::response(&text, syntax).map_err(|errors| errors.to_string())
}
