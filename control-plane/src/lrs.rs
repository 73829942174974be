//! Load reports (LRS): clients tell how many requests they gave to which cluster. The last report of each stream is kept, and shown;
//! how many requests failed says how a version gets on that is tried.

use crate::{
    ads::{refused, unread},
    rollout::Requests,
    tls::Peer,
};
use outrigger_xds::{
    lrs::FIRST_TOKEN_METRIC,
    wire::envoy::{
        config::endpoint::v3::{ClusterStats, EndpointLoadMetricStats},
        service::load_stats::v3::{
            LoadStatsRequest, LoadStatsResponse,
            load_reporting_service_server::LoadReportingService,
        },
    },
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// As metrics name it.
const SERVICE: &str = "lrs";
/// How often clients report.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Streams of reports that may be open at once.
const LOAD_STREAMS_MAX: usize = 20_000;
/// Clusters of a report that are kept.
const CLUSTERS_REPORTED_MAX: usize = 10_000;
/// What a node told is forgotten when it told nothing for so long, and others come.
const TOTAL_AGE_MAX: Duration = Duration::from_secs(3600);

/// What a client reported last.
#[derive(Debug, Default)]
struct Report {
    node: String,
    at: Option<SystemTime>,
    clusters: BTreeMap<String, Load>,
}

/// Requests of a cluster, in the interval of the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Load {
    issued: u64,
    succeeded: u64,
    failed: u64,
    dropped: u64,
    in_progress: u64,
    first_tokens: u64,
    first_token_us: u64,
}

impl From<&ClusterStats> for Load {
    fn from(stats: &ClusterStats) -> Self {
        let start = Self {
            dropped: stats.total_dropped_requests,
            ..Self::default()
        };
        let localities = stats.upstream_locality_stats.iter();
        // Clients say what they like: a sum that is too large is as large as can be.
        localities.fold(start, |sum, locality| Self {
            issued: sum.issued.saturating_add(locality.total_issued_requests),
            succeeded: sum
                .succeeded
                .saturating_add(locality.total_successful_requests),
            failed: sum.failed.saturating_add(locality.total_error_requests),
            in_progress: sum
                .in_progress
                .saturating_add(locality.total_requests_in_progress),
            ..sum.with_metrics(&locality.load_metric_stats)
        })
    }
}

impl Load {
    /// And what streams told of their first tokens.
    fn with_metrics(self, metrics: &[EndpointLoadMetricStats]) -> Self {
        let ours = metrics
            .iter()
            .filter(|it| it.metric_name == FIRST_TOKEN_METRIC);
        ours.fold(self, |sum, metric| {
            let count = metric.num_requests_finished_with_metric;
            // What is no time is none.
            let us = (metric.total_metric_value * 1000.0) as u64;
            Self {
                first_tokens: sum.first_tokens.saturating_add(count),
                first_token_us: sum.first_token_us.saturating_add(us),
                ..sum
            }
        })
    }
}

/// The reports of streams that are open, and what nodes told on all of theirs.
#[derive(Debug, Default)]
pub struct Loads {
    last: AtomicU64,
    reports: Mutex<Reports>,
}

#[derive(Debug, Default)]
struct Reports {
    open: BTreeMap<u64, Report>,
    totals: BTreeMap<String, Total>,
}

/// Requests of a node that are over. It only grows, over its streams, so that a difference says what came since.
#[derive(Debug)]
struct Total {
    requests: Requests,
    at: Instant,
}

impl Reports {
    fn add(&mut self, node: &str, requests: Requests, now: Instant) {
        if !self.totals.contains_key(node) {
            let is_young = |total: &Total| now.duration_since(total.at) < TOTAL_AGE_MAX;
            self.totals.retain(|_, total| is_young(total));
            if self.totals.len() >= LOAD_STREAMS_MAX {
                return;
            }
        }
        let total = self.totals.entry(node.to_owned()).or_insert(Total {
            requests: Requests::default(),
            at: now,
        });
        *total = Total {
            requests: total.requests.and(requests),
            at: now,
        };
    }
}

impl Loads {
    fn lock(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let open = &self.lock().open;
        let reports: Vec<Value> = open.values().map(Report::to_json).collect();
        reports.into()
    }

    /// Requests that are over, by node, over all its streams.
    #[must_use]
    pub fn requests(&self) -> BTreeMap<String, Requests> {
        let reports = self.lock();
        let totals = reports.totals.iter();
        totals
            .map(|(node, total)| (node.clone(), total.requests))
            .collect()
    }

    fn enter(self: &Arc<Self>) -> Option<Stream> {
        let open = &mut self.lock().open;
        if open.len() >= LOAD_STREAMS_MAX {
            return None;
        }
        let id = self.last.fetch_add(1, Relaxed);
        open.insert(id, Report::default());
        metrics::gauge!("outrigger_control_plane_streams", "service" => SERVICE).increment(1.0);
        Some(Stream {
            loads: self.clone(),
            id,
        })
    }
}

impl Report {
    fn to_json(&self) -> Value {
        let clusters = self.clusters.iter().map(|(name, load)| {
            let load = json!({
                "issued": load.issued,
                "succeeded": load.succeeded,
                "failed": load.failed,
                "dropped": load.dropped,
                "in_progress": load.in_progress,
                "first_tokens": load.first_tokens,
            });
            (name.clone(), load)
        });
        let age = self.at.and_then(|at| at.elapsed().ok());
        json!({
            "id": self.node,
            "seconds_ago": age.map(|age| age.as_secs_f64()),
            "clusters": clusters.collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// A stream of reports that is open.
#[derive(Debug)]
struct Stream {
    loads: Arc<Loads>,
    id: u64,
}

impl Stream {
    /// Takes a report in. The first says only who it is.
    fn hear(&self, request: LoadStatsRequest) -> Result<(), Status> {
        let mut reports = self.loads.lock();
        let report = reports.open.entry(self.id).or_default();
        if report.node.is_empty() {
            report.node = request.node.map(|node| node.id).unwrap_or_default();
        }
        if report.node.is_empty() {
            refused("request");
            let message = "the first request of a stream needs a node with an id";
            return Err(Status::invalid_argument(message));
        }
        let clusters = request.cluster_stats.iter().take(CLUSTERS_REPORTED_MAX);
        report.clusters = clusters
            .map(|stats| (stats.cluster_name.clone(), Load::from(stats)))
            .collect();
        report.at = Some(SystemTime::now());
        let loads = report.clusters.values();
        let requests = loads.fold(Requests::default(), |sum, load| {
            sum.and(Requests {
                finished: load.succeeded.saturating_add(load.failed),
                failed: load.failed,
                first_tokens: load.first_tokens,
                first_token_us: load.first_token_us,
            })
        });
        let node = report.node.clone();
        reports.add(&node, requests, Instant::now());
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.loads.lock().open.remove(&self.id);
        metrics::gauge!("outrigger_control_plane_streams", "service" => SERVICE).decrement(1.0);
    }
}

/// The service.
#[derive(Debug, Clone)]
pub struct LoadReporting(pub Arc<Loads>);

/// What is asked for: everything.
fn asked() -> LoadStatsResponse {
    LoadStatsResponse {
        send_all_clusters: true,
        load_reporting_interval: REPORT_INTERVAL.try_into().ok(),
        ..LoadStatsResponse::default()
    }
}

/// Whether it may be who it says it is, and still is who it was.
fn admitted(peer: &Peer, request: &LoadStatsRequest) -> Result<(), Status> {
    match &request.node {
        Some(node) => peer.admit(&node.id),
        None => peer.check(),
    }
}

#[tonic::async_trait]
impl LoadReportingService for LoadReporting {
    type StreamLoadStatsStream = ReceiverStream<Result<LoadStatsResponse, Status>>;

    async fn stream_load_stats(
        &self,
        request: Request<Streaming<LoadStatsRequest>>,
    ) -> Result<Response<Self::StreamLoadStatsStream>, Status> {
        let stream = self.0.enter();
        let stream = stream.ok_or_else(|| {
            refused("limit");
            let message = format!(
                "more than {LOAD_STREAMS_MAX} streams of load reports at this control plane"
            );
            Status::resource_exhausted(message)
        })?;
        let peer = Peer::of(&request);
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut answer = Some(asked());
            loop {
                let heard = match requests.message().await {
                    Ok(Some(request)) => {
                        admitted(&peer, &request).and_then(|()| stream.hear(request))
                    }
                    Ok(None) => return,
                    Err(status) => match unread(status) {
                        Ok(()) => return,
                        Err(status) => Err(status),
                    },
                };
                let said = match heard {
                    Ok(()) => answer.take().map(Ok),
                    Err(status) => Some(Err(status)),
                };
                let Some(said) = said else { continue };
                let is_over = said.is_err();
                if sender.send(said).await.is_err() || is_over {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
