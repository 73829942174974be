//! One stream of a load reporting service (LRS): reports out, what is to be reported in.
//!
//! It ends at its first error. When to report, when to come again, and what was counted since is the caller's.

use crate::{
    ads::{AdsError, SEND_TIMEOUT, Server, broken, connect, introduced, outgoing},
    protobuf,
    resource::{bootstrap::Node, endpoint::Address},
    wire::envoy::{
        config::{core::v3 as core, endpoint::v3 as endpoint},
        service::load_stats::v3::{
            self as wire, load_reporting_service_client::LoadReportingServiceClient,
        },
    },
};
use futures_util::{Stream, StreamExt, TryFutureExt};
use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tonic::Status;

/// The metric of [`Load::first_tokens`], in `load_metric_stats`.
pub const FIRST_TOKEN_METRIC: &str = "ttft_ms";
/// Between reports where a server does not say.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(10);
/// Reports come no more often, whatever is asked for.
pub const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// And no less often.
pub const INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Reports that wait for the connection: more than one would tell of what is long over.
const REPORTS_MAX: usize = 1;
/// That `send_all_clusters` is understood.
const SEND_ALL_CLUSTERS: &str = "envoy.lrs.supports_send_all_clusters";

/// What a server wants to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Of which clusters; none is all.
    pub clusters: Option<BTreeSet<String>>,
    /// How often.
    pub interval: Duration,
    /// Of each endpoint, too.
    pub by_endpoint: bool,
}

impl Asked {
    /// Whether it is to be told of this cluster.
    #[must_use]
    pub fn wants(&self, cluster: &str) -> bool {
        let named = self.clusters.as_ref();
        named.is_none_or(|named| named.contains(cluster))
    }
}

impl From<wire::LoadStatsResponse> for Asked {
    fn from(wire: wire::LoadStatsResponse) -> Self {
        let interval = wire.load_reporting_interval.map(protobuf::duration);
        let said = interval.and_then(Result::ok).filter(|it| !it.is_zero());
        let interval = said.unwrap_or(INTERVAL_DEFAULT);
        Self {
            clusters: (!wire.send_all_clusters).then(|| wire.clusters.into_iter().collect()),
            interval: interval.clamp(INTERVAL_MIN, INTERVAL_MAX),
            by_endpoint: wire.report_endpoint_granularity,
        }
    }
}

/// Load of a cluster since it was last told.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterLoad {
    /// Its name.
    pub name: String,
    /// Its name where its endpoints come from; empty if that is the same.
    pub service_name: String,
    /// By priority and place.
    pub localities: Vec<LocalityLoad>,
    /// Requests that circuit breakers refused.
    pub dropped: u64,
    /// Since when.
    pub interval: Duration,
}

/// Load of one locality.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LocalityLoad {
    /// Region, zone, sub-zone; empty if not said.
    pub place: Arc<[String; 3]>,
    /// As configured.
    pub priority: u32,
    /// Of all its endpoints together.
    pub load: Load,
    /// Of each, if that is asked for.
    pub endpoints: Vec<(Address, Load)>,
}

/// Requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Begun.
    pub issued: u64,
    /// Ended, and well.
    pub succeeded: u64,
    /// Ended otherwise.
    pub failed: u64,
    /// Not ended now.
    pub in_progress: u64,
    /// Streams whose first token came.
    pub first_tokens: u64,
    /// Microseconds until then, of all of them together.
    pub first_token_us: u64,
}

impl Load {
    /// Together with another.
    pub fn add(&mut self, other: Self) {
        self.issued += other.issued;
        self.succeeded += other.succeeded;
        self.failed += other.failed;
        self.in_progress += other.in_progress;
        self.first_tokens += other.first_tokens;
        self.first_token_us += other.first_token_us;
    }

    /// Whether there is nothing to tell.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    fn metrics(&self) -> Vec<endpoint::EndpointLoadMetricStats> {
        let some = (self.first_tokens > 0).then(|| endpoint::EndpointLoadMetricStats {
            metric_name: FIRST_TOKEN_METRIC.to_owned(),
            num_requests_finished_with_metric: self.first_tokens,
            total_metric_value: self.first_token_us as f64 / 1000.0,
        });
        some.into_iter().collect()
    }
}

impl From<&ClusterLoad> for endpoint::ClusterStats {
    fn from(plain: &ClusterLoad) -> Self {
        Self {
            cluster_name: plain.name.clone(),
            cluster_service_name: plain.service_name.clone(),
            upstream_locality_stats: plain.localities.iter().map(Into::into).collect(),
            total_dropped_requests: plain.dropped,
            load_report_interval: plain.interval.try_into().ok(),
        }
    }
}

impl From<&LocalityLoad> for endpoint::UpstreamLocalityStats {
    fn from(plain: &LocalityLoad) -> Self {
        let [region, zone, sub_zone] = (*plain.place).clone();
        let load = &plain.load;
        Self {
            locality: Some(core::Locality {
                region,
                zone,
                sub_zone,
            }),
            total_successful_requests: load.succeeded,
            total_requests_in_progress: load.in_progress,
            total_error_requests: load.failed,
            load_metric_stats: load.metrics(),
            priority: plain.priority,
            upstream_endpoint_stats: plain.endpoints.iter().map(of_endpoint).collect(),
            total_issued_requests: load.issued,
        }
    }
}

fn of_endpoint((address, load): &(Address, Load)) -> endpoint::UpstreamEndpointStats {
    endpoint::UpstreamEndpointStats {
        address: Some(address.into()),
        total_successful_requests: load.succeeded,
        total_requests_in_progress: load.in_progress,
        total_error_requests: load.failed,
        load_metric_stats: load.metrics(),
        total_issued_requests: load.issued,
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<wire::LoadStatsResponse, Status>> + Send>>;

/// An open stream.
pub struct LoadStream {
    reports: mpsc::Sender<wire::LoadStatsRequest>,
    answers: Answers,
}

/// Connects, and says who is there.
///
/// # Errors
/// [`AdsError::Connect`].
pub async fn open(server: &Server, node: &Node) -> Result<LoadStream, AdsError> {
    let channel = connect(server).await?;
    let (reports, request) = outgoing(server, REPORTS_MAX);
    let mut node = introduced(node);
    node.client_features.push(SEND_ALL_CLUSTERS.to_owned());
    let first = wire::LoadStatsRequest {
        node: Some(node),
        cluster_stats: Vec::new(),
    };
    // Before the call: some servers answer only when they have heard something.
    let full = |_| AdsError::Broken("who is there is not taken".to_owned());
    reports.try_send(first).map_err(full)?;
    let mut client = LoadReportingServiceClient::new(channel)
        .max_decoding_message_size(ANSWER_BYTES_MAX)
        .max_encoding_message_size(usize::MAX);
    let answers = async move {
        let answers = client.stream_load_stats(request).await?;
        Ok(answers.into_inner())
    };
    Ok(LoadStream {
        reports,
        answers: Box::pin(answers.try_flatten_stream()),
    })
}

impl LoadStream {
    /// What is to be told from now on. May be dropped and called again.
    ///
    /// # Errors
    /// [`AdsError::Broken`], as soon as the server or the connection ends it.
    pub async fn next(&mut self) -> Result<Asked, AdsError> {
        let answer = self.answers.next().await;
        answer.map_or_else(
            || Err(AdsError::Broken("the server closed it".to_owned())),
            |answer| answer.map(Asked::from).map_err(|status| broken(&status)),
        )
    }

    /// Room for a report: those before it are on their way. To be had before anything is counted for it.
    ///
    /// # Errors
    /// [`AdsError::Broken`].
    pub async fn room(&mut self) -> Result<Room<'_>, AdsError> {
        if self.reports.is_closed() {
            // The answers say why.
            self.next().await?;
        }
        match tokio::time::timeout(SEND_TIMEOUT, self.reports.reserve()).await {
            Ok(Ok(permit)) => Ok(Room(permit)),
            Ok(Err(_)) => Err(AdsError::Broken("reports are not taken".to_owned())),
            Err(_) => {
                let error = format!("no report was taken within {SEND_TIMEOUT:?}");
                Err(AdsError::Broken(error))
            }
        }
    }
}

/// Room for one report.
pub struct Room<'a>(mpsc::Permit<'a, wire::LoadStatsRequest>);

impl Room<'_> {
    /// Fills it.
    pub fn report(self, clusters: &[ClusterLoad]) {
        self.0.send(wire::LoadStatsRequest {
            node: None,
            cluster_stats: clusters.iter().map(Into::into).collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_kept_within_limits() {
        let asked = |seconds, nanos| {
            Asked::from(wire::LoadStatsResponse {
                clusters: vec!["a".to_owned()],
                load_reporting_interval: Some(prost_types::Duration { seconds, nanos }),
                ..Default::default()
            })
        };
        for (seconds, nanos, interval) in [
            (10, 0, Duration::from_secs(10)),
            (0, 1, INTERVAL_MIN),
            (-5, 0, INTERVAL_DEFAULT),
            (0, 0, INTERVAL_DEFAULT),
            (i64::MAX, 0, INTERVAL_MAX),
            (100_000, 0, INTERVAL_MAX),
        ] {
            assert_eq!(asked(seconds, nanos).interval, interval, "{seconds} s");
        }
        assert!(asked(1, 0).wants("a") && !asked(1, 0).wants("b"));
        let none = Asked::from(wire::LoadStatsResponse::default());
        assert!(!none.wants("a"), "nothing is asked for");
        assert_eq!(none.interval, INTERVAL_DEFAULT);
        let all = Asked::from(wire::LoadStatsResponse {
            send_all_clusters: true,
            ..Default::default()
        });
        assert!(all.wants("a"));
    }
}
