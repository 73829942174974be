//! What all sources have, judged as a whole, and what of that is served: the last that was good.

use crate::{
    registered::Places,
    source::{Content, News, Problem},
    views::{self, Published},
};
use outrigger_xds::subscription::Kind;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
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

/// The last good state of all sources.
#[derive(Debug)]
pub struct Catalog {
    /// Held while something is judged, so that each is judged with what the others have by then.
    judging: Mutex<()>,
    sources: Mutex<BTreeMap<String, OfSource>>,
    /// Which pools engines that registered are in. Beside what is served: it may change alone.
    places: Mutex<Arc<Places>>,
    published: watch::Sender<Option<Arc<Published>>>,
}

impl Catalog {
    /// Of sources with these names. Until all of them were good once, nothing is served: a part would take the rest away.
    #[must_use]
    pub fn new<'a>(sources: impl IntoIterator<Item = &'a str>) -> Self {
        let sources = sources.into_iter();
        let sources = sources.map(|name| (name.to_owned(), OfSource::default()));
        Self {
            judging: Mutex::default(),
            sources: Mutex::new(sources.collect()),
            places: Mutex::default(),
            published: watch::Sender::new(None),
        }
    }

    /// What is served, now and later; none while nothing is.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Published>>> {
        self.published.subscribe()
    }

    /// What is served now.
    #[must_use]
    pub fn published(&self) -> Option<Arc<Published>> {
        self.published.borrow().clone()
    }

    /// Which pools engines that registered are in.
    #[must_use]
    pub fn places(&self) -> Arc<Places> {
        let places = self.places.lock();
        places.unwrap_or_else(PoisonError::into_inner).clone()
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

    /// Nothing in it can be half done: what is written is written as one.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OfSource>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a source has now, if all is good with it; else remembers why not. Takes time.
    pub fn take(&self, source: &str, news: News) {
        let _one = self.judging.lock().unwrap_or_else(PoisonError::into_inner);
        let now = SystemTime::now();
        let judged = news.and_then(|content| self.judge(source, content));
        let mut sources = self.lock();
        let of_source = sources.entry(source.to_owned()).or_default();
        of_source.status.tried_at = Some(now);
        let result = match judged {
            Ok((content, published)) => {
                of_source.status.resources =
                    content.raw.len() + content.short.len() + content.nodes.len();
                of_source.status.good_at = Some(now);
                of_source.status.problems.clear();
                of_source.good = Arc::new(content);
                let is_whole = sources.values().all(|it| it.status.good_at.is_some());
                if is_whole {
                    self.publish(published);
                }
                "good"
            }
            Err(problems) => {
                log(source, &problems);
                of_source.status.problems = problems;
                "bad"
            }
        };
        let count: usize = sources.values().map(|it| it.status.problems.len()).sum();
        metrics::counter!("outrigger_control_plane_loads_total", "result" => result).increment(1);
        metrics::gauge!("outrigger_control_plane_problems").set(as_gauge(count));
    }

    /// What would be served with this in place of what the source had.
    fn judge(&self, source: &str, content: Content) -> Result<(Content, Published), Vec<Problem>> {
        let others: Vec<Arc<Content>> = {
            let sources = self.lock();
            let others = sources.iter().filter(|(name, _)| *name != source);
            others
                .map(|(_, of_source)| of_source.good.clone())
                .collect()
        };
        let all: Vec<&Content> = others.iter().map(Arc::as_ref).chain([&content]).collect();
        let last = self.published().unwrap_or_default();
        let published = views::publish(&all, &last)?;
        Ok((content, published))
    }

    fn publish(&self, mut published: Published) {
        let places = Arc::new(std::mem::take(&mut published.places));
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = places;
        for kind in Kind::ALL {
            let count = published.general.ours.of(kind).len();
            metrics::gauge!("outrigger_control_plane_resources", "type" => kind.type_url())
                .set(as_gauge(count));
        }
        metrics::gauge!("outrigger_control_plane_nodes").set(as_gauge(published.nodes.len()));
        self.published.send_if_modified(|last| {
            let is_news = last
                .as_ref()
                .is_none_or(|last| last.version != published.version);
            if is_news {
                tracing::info!(version = %published.version, "serving");
                *last = Some(Arc::new(published));
            }
            is_news
        });
    }
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

#[expect(clippy::cast_precision_loss, reason = "counts are small")]
fn as_gauge(count: usize) -> f64 {
    count as f64
}
