//! A load reporting service of the tests' own: it says what it wants, and adds up what it is told.

use super::ads_server::ads;
use futures_util::{Stream, StreamExt, stream};
use outrigger_conformance::harness::eventually;
use outrigger_xds::{
    resource::{ads::Ads, bootstrap::Bootstrap},
    subscription::Protocol,
    wire::envoy::{
        config::endpoint::v3::{ClusterStats, UpstreamLocalityStats},
        service::load_stats::v3::{
            LoadStatsRequest, LoadStatsResponse,
            load_reporting_service_server::{LoadReportingService, LoadReportingServiceServer},
        },
    },
};
use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status, Streaming};

/// How often it is told, unless a case says otherwise.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

/// Of all clusters, at [`INTERVAL`].
pub(super) fn everything() -> LoadStatsResponse {
    LoadStatsResponse {
        send_all_clusters: true,
        load_reporting_interval: INTERVAL.try_into().ok(),
        ..LoadStatsResponse::default()
    }
}

/// Of these clusters only.
pub(super) fn of(clusters: &[&str], interval: Duration) -> LoadStatsResponse {
    LoadStatsResponse {
        clusters: clusters.iter().map(|&name| name.to_owned()).collect(),
        load_reporting_interval: interval.try_into().ok(),
        ..LoadStatsResponse::default()
    }
}

/// What reports come to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sum {
    pub(super) issued: u64,
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    /// In the last report.
    pub(super) in_progress: u64,
    pub(super) dropped: u64,
}

impl Sum {
    fn add(&mut self, stats: &ClusterStats) {
        self.in_progress = 0;
        self.dropped += stats.total_dropped_requests;
        for locality in &stats.upstream_locality_stats {
            self.issued += locality.total_issued_requests;
            self.succeeded += locality.total_successful_requests;
            self.failed += locality.total_error_requests;
            self.in_progress += locality.total_requests_in_progress;
        }
    }
}

type Heard = Arc<Mutex<Vec<LoadStatsRequest>>>;

/// The server. It ends, with all its connections, when it is dropped.
pub(super) struct LoadServer {
    pub(super) address: SocketAddr,
    heard: Heard,
    wanted: watch::Sender<LoadStatsResponse>,
    /// Streams that were refused, while they are.
    refused: Arc<Mutex<Option<usize>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl LoadServer {
    pub(super) fn start(wanted: LoadStatsResponse) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut server = Self {
            address: listener.local_addr().unwrap(),
            heard: Heard::default(),
            wanted: watch::Sender::new(wanted),
            refused: Arc::default(),
            runtime: None,
        };
        server.serve(listener);
        server
    }

    fn serve(&mut self, listener: std::net::TcpListener) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let service = Service {
            heard: self.heard.clone(),
            wanted: self.wanted.clone(),
            refused: self.refused.clone(),
        };
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let accepted = stream::unfold(listener, |listener| async move {
                let accepted = listener.accept().await.map(|(socket, _)| socket);
                Some((accepted, listener))
            });
            tonic::transport::Server::builder()
                .add_service(LoadReportingServiceServer::new(service))
                .serve_with_incoming(accepted)
                .await
        });
        self.runtime = Some(runtime);
    }

    /// It is gone, and its connections with it; what it heard stays.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// It is there again, at the same address.
    pub(super) async fn revive(&mut self) {
        let listener = eventually("its port is free", || async {
            std::net::TcpListener::bind(self.address).ok()
        });
        let listener = listener.await;
        self.serve(listener);
    }

    /// Whether it refuses streams, as a server without the service does.
    pub(super) fn refuse(&self, refuse: bool) {
        *self.refused.lock().unwrap() = refuse.then_some(0);
    }

    /// How many it has refused since.
    pub(super) fn refused(&self) -> usize {
        self.refused.lock().unwrap().unwrap_or_default()
    }

    /// It wants something else from now on.
    pub(super) fn want(&self, wanted: LoadStatsResponse) {
        self.wanted.send_replace(wanted);
    }

    /// All that was said.
    pub(super) fn heard(&self) -> Vec<LoadStatsRequest> {
        self.heard.lock().unwrap().clone()
    }

    /// All that was said of a cluster.
    pub(super) fn reports(&self, cluster: &str) -> Vec<ClusterStats> {
        let all = self.heard().into_iter();
        all.flat_map(|request| request.cluster_stats)
            .filter(|stats| stats.cluster_name == cluster)
            .collect()
    }

    /// What its localities were said to be, report by report.
    pub(super) fn localities(&self, cluster: &str) -> Vec<UpstreamLocalityStats> {
        let reports = self.reports(cluster).into_iter();
        reports
            .flat_map(|stats| stats.upstream_locality_stats)
            .collect()
    }

    /// What that comes to.
    pub(super) fn sum(&self, cluster: &str) -> Sum {
        let mut sum = Sum::default();
        self.reports(cluster)
            .iter()
            .for_each(|stats| sum.add(stats));
        sum
    }

    /// Waits until that comes to this, and sees that it stays so for some reports.
    pub(super) async fn hears(&self, cluster: &str, wanted: Sum) {
        let what = format!("{wanted:?}");
        let is_it = || async { (self.sum(cluster) == wanted).then_some(()) };
        let found = tokio::time::timeout(Duration::from_secs(20), eventually(&what, is_it)).await;
        assert!(found.is_ok(), "{wanted:?}, but {:?}", self.sum(cluster));
        self.hears_again(cluster).await;
        assert_eq!(self.sum(cluster), wanted, "it stays so");
    }

    /// Waits for further reports of a cluster.
    pub(super) async fn hears_again(&self, cluster: &str) {
        let before = self.reports(cluster).len();
        eventually("more reports", || async {
            (self.reports(cluster).len() >= before + 2).then_some(())
        })
        .await;
    }

    /// As a proxy is told of it.
    pub(super) fn as_configured(&self) -> Ads {
        ads(Protocol::State, &[self.address])
    }

    /// Makes a proxy report to it.
    pub(super) fn edit(&self) -> impl FnOnce(&mut Bootstrap) + 'static {
        let config = self.as_configured();
        move |bootstrap| bootstrap.load_stats = Some(config)
    }
}

impl Drop for LoadServer {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Service {
    heard: Heard,
    wanted: watch::Sender<LoadStatsResponse>,
    refused: Arc<Mutex<Option<usize>>>,
}

#[tonic::async_trait]
impl LoadReportingService for Service {
    type StreamLoadStatsStream =
        Pin<Box<dyn Stream<Item = Result<LoadStatsResponse, Status>> + Send>>;

    async fn stream_load_stats(
        &self,
        request: Request<Streaming<LoadStatsRequest>>,
    ) -> Result<Response<Self::StreamLoadStatsStream>, Status> {
        if let Some(refused) = &mut *self.refused.lock().unwrap() {
            *refused += 1;
            return Err(Status::unimplemented("no load reports here"));
        }
        let heard = self.heard.clone();
        let mut wanted = self.wanted.subscribe();
        wanted.mark_unchanged();
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            let Ok(Some(first)) = requests.message().await else {
                return;
            };
            heard.lock().unwrap().push(first);
            loop {
                let answer = wanted.borrow_and_update().clone();
                if sender.send(Ok(answer)).await.is_err() {
                    return;
                }
                loop {
                    tokio::select! {
                        request = requests.message() => {
                            let Ok(Some(request)) = request else { return };
                            heard.lock().unwrap().push(request);
                        }
                        changed = wanted.changed() => match changed {
                            Ok(()) => break,
                            Err(_) => return,
                        },
                    }
                }
            }
        });
        let answers = stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        Ok(Response::new(answers.boxed()))
    }
}
