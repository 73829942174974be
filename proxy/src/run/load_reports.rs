//! The stream of load reports (LRS): opened where the bootstrap says whom to tell, opened again when it breaks.
//!
//! What was counted while nobody could be told is in the first report of the next stream. A report that was on its way when
//! a stream broke is not said again: the server may have it.

use super::{
    Shared,
    control_plane::{LOOK_INTERVAL, servers},
};
use crate::cluster::Clusters;
use metrics::Counter;
use outrigger_xds::{
    ads::{AdsError, Server},
    backoff::Backoff,
    lrs::{self, Asked, LoadStream},
    resource::ads::Ads,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// `envoy_load_reporter_*`.
struct Stats {
    requests: Counter,
    responses: Counter,
    errors: Counter,
    retries: Counter,
}

impl Stats {
    fn new() -> Self {
        Self {
            requests: metrics::counter!("envoy_load_reporter_requests"),
            responses: metrics::counter!("envoy_load_reporter_responses"),
            errors: metrics::counter!("envoy_load_reporter_errors"),
            retries: metrics::counter!("envoy_load_reporter_retries"),
        }
    }
}

/// Reports to whoever is to be told, if anybody is, for as long as the process lives.
pub(super) async fn follow(shared: Arc<Shared>) {
    let (stats, mut backoff) = (Stats::new(), Backoff::default());
    let mut last_error = String::new();
    loop {
        let config = shared.bootstrap.load().load_stats.clone();
        let Some(config) = config else {
            shared.clusters.report(None);
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        };
        let mut telling = Telling {
            shared: &shared,
            config: &config,
            stats: &stats,
            asked: None,
        };
        let Err(error) = telling.any_server().await else {
            continue;
        };
        if telling.asked.is_some() {
            backoff = Backoff::default();
            last_error.clear();
        }
        stats.errors.increment(1);
        let error = error.to_string();
        if error == last_error {
            tracing::debug!(error, "no stream of load reports");
        } else {
            tracing::warn!(
                error,
                "no stream of load reports; what is counted meanwhile is told later"
            );
        }
        last_error = error;
        tokio::time::sleep(backoff.pause()).await;
        stats.retries.increment(1);
    }
}

/// One attempt to tell somebody.
struct Telling<'a> {
    shared: &'a Shared,
    config: &'a Ads,
    stats: &'a Stats,
    /// What the server wants, once it has said so.
    asked: Option<Asked>,
}

impl Telling<'_> {
    /// Tells the first server that answers. Ends well only where somebody else is to be told, or nobody any more.
    async fn any_server(&mut self) -> Result<(), AdsError> {
        let none = "a cluster of its servers is not there, waits for something, or has no endpoint";
        let mut ended = Err(AdsError::Connect(none.to_owned()));
        for server in servers(self.shared, self.config) {
            ended = self.tell(&server).await;
            if ended.is_ok() || self.asked.is_some() {
                break;
            }
        }
        ended
    }

    async fn tell(&mut self, server: &Server) -> Result<(), AdsError> {
        let node = self.shared.bootstrap.load().node.clone();
        let mut stream = lrs::open(server, &node).await?;
        self.stats.requests.increment(1);
        let mut due: Option<Instant> = None;
        while self.shared.bootstrap.load().load_stats.as_ref() == Some(self.config) {
            let look = Instant::now() + LOOK_INTERVAL;
            let until = due.map_or(look, |due| due.min(look));
            tokio::select! {
                asked = stream.next() => {
                    let interval = self.ask(asked?).await;
                    due = interval.map(|interval| Instant::now() + interval).or(due);
                }
                () = tokio::time::sleep_until(until.into()) => {
                    if due.is_some_and(|due| due <= Instant::now()) {
                        due = Some(self.report(&mut stream).await?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes in what the server wants; gives how often, if that is another than before.
    async fn ask(&mut self, asked: Asked) -> Option<Duration> {
        self.stats.responses.increment(1);
        let interval = asked.interval;
        let before = self.asked.replace(asked.clone());
        self.walk(move |clusters| clusters.report(Some(&asked)))
            .await;
        let same = before.is_some_and(|before| before.interval == interval);
        (!same).then_some(interval)
    }

    /// Off this thread, which others share: there may be very many endpoints. None if it failed.
    async fn walk<T: Send + 'static>(
        &self,
        walk: impl FnOnce(&Clusters) -> T + Send + 'static,
    ) -> Option<T> {
        let clusters = self.shared.clusters.clone();
        let walked = tokio::task::spawn_blocking(move || walk(&clusters)).await;
        let told = |error| tracing::error!(%error, "load could not be counted");
        walked.map_err(told).ok()
    }

    /// One report; gives when the next is due.
    async fn report(&self, stream: &mut LoadStream) -> Result<Instant, AdsError> {
        let room = stream.room().await?;
        let load = self.walk(Clusters::take_load).await;
        room.report(&load.unwrap_or_default());
        self.stats.requests.increment(1);
        let interval = self.asked.as_ref().map(|asked| asked.interval);
        Ok(Instant::now() + interval.unwrap_or(lrs::INTERVAL_MAX))
    }
}
