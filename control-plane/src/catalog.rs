//! What all sources have, judged as a whole, and what of that is served: the last that was good, in the version that is to be served to whom.

use crate::{
    figures::as_gauge,
    registered::Places,
    rollout::{Nodes, Refusal, Rollout, Verdict, seen::Observed},
    source::{Content, News, Problem},
    store::{Contents, Trial},
    versions::{self, VersionError, Versions},
    views::{self, Published, Served},
};
use outrigger_xds::subscription::Kind;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};
use tokio::sync::watch;

/// So many problems of one attempt are logged.
const LOGGED_PROBLEMS_MAX: usize = 20;

/// What is known of a source, for those who look.
#[derive(Debug, Clone, Default)]
pub struct SourceStatus {
    /// What it had when it was good last: of a short resource itself, not what it becomes.
    pub resources: usize,
    /// When that was.
    pub good_at: Option<SystemTime>,
    /// When it had something new last, good or not.
    pub tried_at: Option<SystemTime>,
    /// What is wrong with that; empty if nothing is.
    pub problems: Vec<Problem>,
}

#[derive(Debug, Default)]
struct OfSource {
    good: Arc<Content>,
    status: SourceStatus,
}

/// What is served, in short, for those who look.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// The version that is live.
    pub live: Option<u64>,
    /// One that is tried.
    pub trial: Option<Trial>,
    /// Whether the live one was chosen by hand.
    pub is_pinned: bool,
    /// What the sources say, if it was taken back: its version, and why.
    pub taken_back: Option<(u64, String)>,
    /// Whether versions outlive the process.
    pub is_on_disk: bool,
    /// Why the last version could not be kept.
    pub problem: Option<String>,
    /// Whether something is not served because it could not be kept.
    pub is_waiting: bool,
    /// What was found when versions were read.
    pub notice: Option<String>,
}

/// The last good state of all sources.
#[derive(Debug)]
pub struct Catalog {
    /// Held while something is judged, so that each is judged with what the others have by then.
    judging: Mutex<Versions>,
    sources: Mutex<BTreeMap<String, OfSource>>,
    /// Which pools engines that registered are in. Beside what is served: it may change alone.
    places: Mutex<Arc<Places>>,
    /// Sources whose news are no version: they are told beside each.
    passing: BTreeSet<String>,
    rollout: Mutex<Option<Rollout>>,
    observed: Observed,
    summary: Mutex<Summary>,
    published: watch::Sender<Option<Arc<Served>>>,
}

impl Catalog {
    /// Of sources with these names, with versions that are kept in memory. Until all of them were good once, nothing is served: a part would take the rest away.
    #[must_use]
    pub fn new<'a>(sources: impl IntoIterator<Item = &'a str>) -> Self {
        Self::with(sources, Versions::in_memory(), Observed::default())
    }

    /// The same, with versions and nodes that are watched while one spreads.
    #[must_use]
    pub fn with<'a>(
        sources: impl IntoIterator<Item = &'a str>,
        versions: Versions,
        observed: Observed,
    ) -> Self {
        let sources = sources.into_iter();
        let sources = sources.map(|name| (name.to_owned(), OfSource::default()));
        Self {
            judging: Mutex::new(versions),
            sources: Mutex::new(sources.collect()),
            places: Mutex::default(),
            passing: BTreeSet::new(),
            rollout: Mutex::default(),
            observed,
            summary: Mutex::default(),
            published: watch::Sender::new(None),
        }
    }

    /// What this source has is no part of versions: it is told beside each, as it is now.
    #[must_use]
    pub fn with_passing(mut self, source: &str) -> Self {
        self.lock().entry(source.to_owned()).or_default();
        self.passing.insert(source.to_owned());
        self
    }

    /// What is served, now and later; none while nothing is.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Served>>> {
        self.published.subscribe()
    }

    /// What is served now.
    #[must_use]
    pub fn served(&self) -> Option<Arc<Served>> {
        self.published.borrow().clone()
    }

    /// Which pools engines that registered are in, as the live version has it.
    #[must_use]
    pub fn places(&self) -> Arc<Places> {
        let places = self.places.lock();
        places.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is served now to all, or to all others than those that try something.
    #[must_use]
    pub fn published(&self) -> Option<Arc<Published>> {
        self.served().map(|served| served.live.published.clone())
    }

    /// What is known of each source.
    #[must_use]
    pub fn status(&self) -> BTreeMap<String, SourceStatus> {
        let sources = self.lock();
        let status = sources.iter();
        status
            .map(|(name, source)| (name.clone(), source.status.clone()))
            .collect()
    }

    /// What is served, in short.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let summary = self.summary.lock();
        summary.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nothing in it can be half done: what is written is written as one.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OfSource>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All versions. Whoever judges something has them for as long.
    pub fn versions(&self) -> MutexGuard<'_, Versions> {
        self.judging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is tried, if something is.
    pub fn rollout(&self) -> MutexGuard<'_, Option<Rollout>> {
        self.rollout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who is connected.
    #[must_use]
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Serves what was served before the process ended, as soon as sources that are no part of it are there.
    pub fn restore(&self) {
        let mut versions = self.versions();
        self.restore_with(&mut versions);
        self.settle(&mut versions);
    }

    fn restore_with(&self, versions: &mut Versions) {
        let is_there =
            |of_source: Option<&OfSource>| of_source.is_some_and(|it| it.status.good_at.is_some());
        let is_whole = {
            let sources = self.lock();
            self.passing.iter().all(|name| is_there(sources.get(name)))
        };
        if is_whole {
            versions.restore(&borrowed(&self.passing_contents(None)));
        }
    }

    /// Takes what a source has now, if all is good with it; else remembers why not. Takes time.
    pub fn take(&self, source: &str, news: News) {
        let mut versions = self.versions();
        let now = SystemTime::now();
        let judged = news.and_then(|content| self.judge(source, Arc::new(content), &mut versions));
        let (mut is_whole, mut published) = (false, None);
        let result = {
            let mut sources = self.lock();
            let of_source = sources.entry(source.to_owned()).or_default();
            of_source.status.tried_at = Some(now);
            match judged {
                Ok((content, news)) => {
                    of_source.status.resources =
                        content.raw.len() + content.short.len() + content.nodes.len();
                    of_source.status.good_at = Some(now);
                    of_source.status.problems.clear();
                    of_source.good = content;
                    is_whole = sources.values().all(|it| it.status.good_at.is_some());
                    published = news;
                    "good"
                }
                Err(problems) => {
                    log(source, &problems);
                    of_source.status.problems = problems;
                    "bad"
                }
            }
        };
        if self.passing.contains(source) {
            self.restore_with(&mut versions);
        }
        let is_news = !self.passing.contains(source) || versions.live_contents().is_none();
        if let Some(published) = published.filter(|_| is_whole && is_news) {
            // What cannot be kept is remembered as the store's problem, and tried again.
            let _ = versions.offer(self.said(), published);
        }
        self.settle(&mut versions);
        let sources = self.lock();
        let count: usize = sources.values().map(|it| it.status.problems.len()).sum();
        metrics::counter!("outrigger_control_plane_loads_total", "result" => result).increment(1);
        metrics::gauge!("outrigger_control_plane_problems").set(as_gauge(count));
    }

    /// What all sources would be with this in place of what the source had.
    fn judge(
        &self,
        source: &str,
        content: Arc<Content>,
        versions: &mut Versions,
    ) -> Result<(Arc<Content>, Option<Published>), Vec<Problem>> {
        if self.passing.contains(source) && versions.live_contents().is_some() {
            // It must fit what is served, which may be another version than what the sources say.
            let passing = self.passing_contents(Some((source, &content)));
            if let Some(number) = versions.renew(&borrowed(&passing))? {
                over(number, "rolled_back");
            }
            return Ok((content, None));
        }
        let others: Vec<Arc<Content>> = {
            let sources = self.lock();
            let others = sources.iter().filter(|(name, _)| *name != source);
            others
                .map(|(_, of_source)| of_source.good.clone())
                .collect()
        };
        let all: Vec<&Content> = others.iter().chain([&content]).map(Arc::as_ref).collect();
        let last = self.published().unwrap_or_default();
        let published = views::publish(&all, &last, versions.issues())?;
        Ok((content, Some(published)))
    }

    /// What passing sources have; of one of them, what it has now.
    fn passing_contents(&self, news: Option<(&str, &Arc<Content>)>) -> Vec<Arc<Content>> {
        let sources = self.lock();
        let passing = self.passing.iter().filter_map(|name| match news {
            Some((source, content)) if source == name => Some(content.clone()),
            _ => sources.get(name).map(|it| it.good.clone()),
        });
        passing.collect()
    }

    /// What all other sources had when they were good last.
    fn said(&self) -> Contents {
        let sources = self.lock();
        let kept = sources
            .iter()
            .filter(|(name, _)| !self.passing.contains(*name));
        kept.map(|(name, it)| (name.clone(), it.good.clone()))
            .collect()
    }

    /// What is served now is told, to whom it is to be.
    fn settle(&self, versions: &mut Versions) {
        let tried = self.rollout().as_ref().map(|rollout| rollout.version);
        match versions.trial() {
            None => *self.rollout() = None,
            Some(trial) if tried != Some(trial.version) => {
                // Sessions are not looked at while this is held: they tell it what they send, and of refusals.
                let (nodes, told) = (self.nodes(versions), self.observed.requests());
                let plan = versions.plan().clone();
                let begun = Rollout::new(trial, plan, &nodes, told, Instant::now());
                // So that the same nodes have it after a restart. Without, about as many do.
                let _ = versions.go_on(begun.percent(), begun.threshold());
                *self.rollout() = Some(begun);
            }
            Some(_) => {}
        }
        let shown = self
            .rollout()
            .as_ref()
            .map(|it| (it.percent(), it.threshold()));
        let (percent, threshold) = shown.unwrap_or_default();
        metrics::gauge!("outrigger_control_plane_rollout_percent").set(f64::from(percent));
        self.summarise(versions);
        if let Some(served) = versions.served(threshold) {
            self.publish(served);
        }
    }

    fn nodes(&self, versions: &Versions) -> Nodes {
        let served = versions.served(0);
        let served = served.as_ref();
        let version = versions.trial().map(|trial| trial.version);
        let is_concerned = |client: &_| served.is_some_and(|served| served.concerns(client));
        self.observed
            .nodes(version.unwrap_or_default(), is_concerned)
    }

    fn summarise(&self, versions: &Versions) {
        let store = versions.store();
        let situation = store.situation();
        let mut saying = store.versions().rev();
        let said = saying.find(|it| it.hash == situation.said && !versions.is_live_said());
        let taken_back = said.and_then(|it| Some((it.number, it.rolled_back.clone()?)));
        let summary = Summary {
            live: versions.live_number(),
            trial: versions.trial().cloned(),
            is_pinned: situation.pinned,
            taken_back,
            is_on_disk: store.is_on_disk(),
            problem: versions.problem(),
            is_waiting: versions.is_waiting(),
            notice: store.notice().map(ToOwned::to_owned),
        };
        *self.summary.lock().unwrap_or_else(PoisonError::into_inner) = summary;
    }

    fn publish(&self, served: Served) {
        let published = &served.live.published;
        let places = published.places.clone();
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = places;
        for kind in Kind::ALL {
            let count = published.general.ours.of(kind).len();
            metrics::gauge!("outrigger_control_plane_resources", "type" => kind.type_url())
                .set(as_gauge(count));
        }
        metrics::gauge!("outrigger_control_plane_nodes").set(as_gauge(published.nodes.len()));
        self.published.send_if_modified(|last| {
            let is_news = last.as_ref().is_none_or(|last| !last.is_same(&served));
            if is_news {
                let (number, trial) = (served.live.number, served.trial.as_ref());
                let trial = trial.map(|(trial, _)| trial.number);
                tracing::info!(number, trial, version = %served.live.published.version, "serving");
                *last = Some(Arc::new(served));
            }
            is_news
        });
    }
}

/// What is tried, and what is done by hand.
impl Catalog {
    /// A node is sent something of a version that is not live.
    pub fn sent(&self, version: u64, node: &str) {
        if let Some(rollout) = self.rollout().as_mut().filter(|it| it.version == version) {
            rollout.sent(node);
        }
    }

    /// A node refuses something that is new in a version.
    pub fn refused(&self, version: u64, refusal: Refusal) {
        if let Some(rollout) = self.rollout().as_mut().filter(|it| it.version == version) {
            rollout.refused(refusal);
        }
    }

    /// Looks how what is tried gets on, and does what follows. Takes time.
    pub fn look(&self) {
        if self.rollout().is_none() {
            return;
        }
        let mut versions = self.versions();
        let (nodes, told) = (self.nodes(&versions), self.observed.requests());
        let now = Instant::now();
        let verdict = self.rollout().as_mut().map(|it| {
            let verdict = it.look(&nodes, &told, now);
            let percent = match verdict {
                Verdict::GoOn { step, .. } => it.percent_of(step),
                Verdict::Wait | Verdict::Done | Verdict::GoBack(_) => it.percent(),
            };
            (verdict, percent)
        });
        let Some((verdict, percent)) = verdict else {
            return;
        };
        let Some(number) = versions.trial().map(|trial| trial.version) else {
            return;
        };
        match verdict {
            Verdict::Wait => {}
            Verdict::GoOn { step, threshold } => {
                // What cannot be kept is tried at the next look.
                if versions.go_on(percent, threshold).is_ok()
                    && let Some(rollout) = self.rollout().as_mut()
                {
                    rollout.go_on((step, threshold), told, now);
                    tracing::info!(number, percent, "a version goes on");
                }
            }
            Verdict::Done => {
                if versions.finish().is_ok() {
                    over(number, "done");
                }
            }
            Verdict::GoBack(why) => {
                tracing::warn!(number, why, "a version is taken back");
                versions.go_back(&why);
                over(number, "rolled_back");
            }
        }
        self.settle(&mut versions);
    }

    /// What could not be kept is tried again. Takes time.
    pub fn retry(&self) {
        if !self.summary().is_waiting {
            return;
        }
        let mut versions = self.versions();
        versions.retry(&borrowed(&self.passing_contents(None)));
        self.settle(&mut versions);
    }

    /// This version is live from now on, until the sources say something else. Takes time.
    ///
    /// # Errors
    /// It is not there, does not fit, or that cannot be kept.
    pub fn pin(&self, number: u64) -> Result<(), VersionError> {
        let mut versions = self.versions();
        let pinned = versions.pin(number, &borrowed(&self.passing_contents(None)));
        self.settle(&mut versions);
        pinned
    }

    /// What the sources say counts again. Takes time.
    ///
    /// # Errors
    /// It is not good, or cannot be kept.
    pub fn resume(&self) -> Result<(), VersionError> {
        let mut versions = self.versions();
        let is_good = self.lock().iter().all(|(name, of_source)| {
            let status = &of_source.status;
            self.passing.contains(name) || (status.problems.is_empty() && status.good_at.is_some())
        });
        if !is_good {
            return Err(VersionError::NothingSaid);
        }
        let passing = self.passing_contents(None);
        let resumed = versions.resume(&self.said(), &borrowed(&passing));
        self.settle(&mut versions);
        resumed
    }

    /// What would be served if the sources had this, beside those that pass; and what was served at that moment. Takes time.
    ///
    /// # Errors
    /// It is not good.
    pub fn tried(
        &self,
        contents: &Contents,
    ) -> Result<(Published, Option<Arc<Served>>), VersionError> {
        let (issues, passing, served) = {
            let versions = self.versions();
            (
                versions.issues(),
                self.passing_contents(None),
                self.served(),
            )
        };
        let last = served.as_ref().map(|it| it.live.published.clone());
        let last = last.unwrap_or_default();
        let published = versions::publish(contents, &borrowed(&passing), &last, issues)?;
        Ok((published, served))
    }
}

fn over(number: u64, result: &'static str) {
    tracing::info!(number, result, "a version is tried no longer");
    metrics::counter!("outrigger_control_plane_rollouts_total", "result" => result).increment(1);
}

fn borrowed(contents: &[Arc<Content>]) -> Vec<&Content> {
    contents.iter().map(Arc::as_ref).collect()
}

fn log(source: &str, problems: &[Problem]) {
    for problem in problems.iter().take(LOGGED_PROBLEMS_MAX) {
        tracing::warn!(source, %problem, "not taken");
    }
    if let Some(more) = problems.len().checked_sub(LOGGED_PROBLEMS_MAX + 1) {
        tracing::warn!(source, more = more + 1, "further problems are not logged");
    }
    tracing::warn!(source, "what was good last is served on, if anything was");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rollout::Plan,
        session::Client,
        store::{Store, contents_tests::contents},
    };
    use outrigger_xds::resource::bootstrap::Node;
    use std::time::Duration;

    const PASSING: &str = "leases";

    fn said(timeout: &str) -> News {
        Ok(Content::clone(&contents(timeout)["directory"]))
    }

    /// What leases have: a cluster of this name.
    fn leased(name: &str) -> News {
        let mut content = Content::clone(&contents("5s")["directory"]);
        content.short.clear();
        let written = &mut content.raw[0].written;
        let json = outrigger_xds::load::written::to_json(&written.any).unwrap();
        let text = json.to_string().replace("\"raw\"", &format!("\"{name}\""));
        let value = serde_json::from_str(&text).unwrap();
        *written = outrigger_xds::load::written::resource(value, "").unwrap();
        Ok(content)
    }

    /// Clusters of the version that a node is sent, with its number.
    fn served(catalog: &Catalog) -> (u64, Vec<String>) {
        let served = catalog.served().unwrap();
        let client = Client {
            node: Node::default(),
            ..Client::default()
        };
        let snapshot = served.live.published.snapshot(&client);
        let names = snapshot.of(Kind::Clusters).keys().cloned().collect();
        (served.live.number, names)
    }

    fn all(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn what_passes_is_no_version_and_is_told_beside_each() {
        let catalog = Catalog::new(["directory"]).with_passing(PASSING);
        catalog.take("directory", said("5s"));
        assert!(
            catalog.served().is_none(),
            "a part would take the rest away"
        );
        catalog.take(PASSING, leased("one"));
        assert_eq!(served(&catalog), (1, all(&["chat", "one", "raw"])));
        catalog.take(PASSING, leased("two"));
        assert_eq!(served(&catalog), (1, all(&["chat", "raw", "two"])));
        catalog.take("directory", said("6s"));
        assert_eq!(served(&catalog), (2, all(&["chat", "raw", "two"])));
        // To go back does not bring back what has passed, and what passes does not end it.
        catalog.pin(1).unwrap();
        assert_eq!(served(&catalog), (1, all(&["chat", "raw", "two"])));
        catalog.take(PASSING, leased("three"));
        assert_eq!(served(&catalog), (1, all(&["chat", "raw", "three"])));
        // What does not fit is not taken.
        catalog.take(PASSING, leased("raw"));
        assert_eq!(served(&catalog), (1, all(&["chat", "raw", "three"])));
        assert!(!catalog.status()[PASSING].problems.is_empty());
        catalog.resume().unwrap();
        assert_eq!(served(&catalog), (3, all(&["chat", "raw", "three"])));
        assert_eq!(catalog.versions().store().versions().count(), 3);
    }

    /// With steps, the first version live, and something else tried.
    fn trying(tried: News) -> Catalog {
        let plan = Plan::new(&[10, 100], Duration::from_secs(60)).unwrap();
        let versions = Versions::new(Store::in_memory(9), plan);
        let catalog = Catalog::with(["directory"], versions, Observed::default());
        let catalog = catalog.with_passing(PASSING);
        catalog.take("directory", said("5s"));
        catalog.take(PASSING, leased("one"));
        catalog.take("directory", tried);
        assert_eq!(catalog.summary().trial.unwrap().version, 2);
        catalog
    }

    #[test]
    fn what_passes_concerns_nobody_who_tries_something() {
        let mut tried = said("5s").unwrap();
        let more = serde_json::json!({
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": "more",
        });
        let written = outrigger_xds::load::written::resource(more, "").unwrap();
        let placed = &tried.raw[0];
        tried.raw.push(crate::source::Placed {
            written,
            ..placed.clone()
        });
        let catalog = trying(Ok(tried));
        catalog.take(PASSING, leased("two"));
        let served = catalog.served().unwrap();
        let (trial, _) = served.trial.as_ref().unwrap();
        let client = Client::default();
        let of = |it: &views::Numbered| it.published.snapshot(&client).of(Kind::Clusters).clone();
        assert!(of(trial).contains_key("two"));
        assert!(Arc::ptr_eq(&of(trial), &of(&served.live)));
    }

    #[test]
    fn what_passes_takes_back_what_is_tried_and_does_not_fit() {
        let catalog = trying(leased("two"));
        catalog.take(PASSING, leased("two"));
        assert_eq!(catalog.status()[PASSING].problems, []);
        assert_eq!(served(&catalog), (1, all(&["chat", "raw", "two"])));
        let (number, why) = catalog.summary().taken_back.unwrap();
        assert!(number == 2 && why.contains("two"), "{why}");
    }

    #[test]
    fn nothing_was_taken_back_if_what_is_live_says_the_same() {
        let catalog = trying(said("6s"));
        catalog.versions().finish().unwrap();
        catalog.take("directory", said("5s"));
        catalog.versions().go_back("for a test");
        catalog.pin(1).unwrap();
        let summary = catalog.summary();
        assert_eq!((summary.live, summary.taken_back), (Some(1), None));
        assert!(!summary.is_pinned);
    }

    #[test]
    fn the_same_again_and_what_was_live_are_no_versions() {
        let catalog = Catalog::new(["directory"]);
        for timeout in ["5s", "5s", "6s"] {
            catalog.take("directory", said(timeout));
        }
        assert_eq!(served(&catalog).0, 2);
        // Bad news are none.
        catalog.take("directory", Err(Vec::new()));
        assert_eq!(served(&catalog).0, 2);
        assert_eq!(
            catalog.pin(9).unwrap_err().to_string(),
            "there is no version 9"
        );
        catalog.take("directory", said("6s"));
        catalog.resume().unwrap();
        assert_eq!(served(&catalog).0, 2);
    }
}
