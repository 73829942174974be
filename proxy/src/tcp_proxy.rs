//! `tcp_proxy`: a connection's bytes go to an endpoint of a cluster and back.
//!
//! An endpoint that cannot be reached is replaced by another, as often as configured. After that nothing is tried again.

use crate::{
    access_log::{AccessLogs, Captured, Entry},
    http::ConnectionInfo,
    metrics::listener_filter::TcpStats,
    pump::{self, End, Limits, Passed},
    tls::Stream,
    upstream::connect::{OpenConnection, connect_raw},
};
use http::Method;
use outrigger_filters::{
    endpoints::{ClusterView, Ended, Endpoint, Endpoints, Via},
    error::Flag,
    filter::LogFields,
};
use outrigger_xds::resource::tcp_proxy as resource;
use rand::Rng;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

/// One filter.
pub(crate) struct TcpProxy {
    config: resource::TcpProxy,
    logs: AccessLogs,
    stats: Arc<TcpStats>,
    endpoints: Arc<dyn Endpoints>,
}

impl TcpProxy {
    /// As configured.
    #[must_use]
    pub(crate) fn new(
        config: resource::TcpProxy,
        logs: AccessLogs,
        endpoints: Arc<dyn Endpoints>,
    ) -> Self {
        Self {
            stats: TcpStats::new(&config.stat_prefix),
            config,
            logs,
            endpoints,
        }
    }

    /// Whether the connections of one may go on under the other.
    pub(crate) fn says_the_same(&self, other: &Self) -> bool {
        self.config == other.config
    }

    /// How long nothing may come or go; zero is off.
    pub(crate) fn idle_timeout(&self) -> Duration {
        self.config.idle_timeout
    }

    /// Serves one connection to its end, or until `over`.
    pub(crate) async fn serve(
        &self,
        client: Stream,
        info: &ConnectionInfo,
        over: impl Future<Output = ()>,
    ) {
        let (start, started) = (SystemTime::now(), Instant::now());
        self.stats.downstream_cx_total.increment(1);
        let (mut log, passed) = (LogFields::default(), Passed::default());
        if let Some(upstream) = self.open(info, &mut log).await {
            tokio::select! {
                () = self.carry(client, upstream, started, &passed) => {}
                () = over => {}
            }
        }
        let (received, sent) = (passed.received.load(Relaxed), passed.sent.load(Relaxed));
        self.stats.downstream_cx_rx_bytes_total.increment(received);
        self.stats.downstream_cx_tx_bytes_total.increment(sent);
        self.log((start, started), (received, sent), info, &log);
    }

    async fn carry(&self, client: Stream, upstream: Upstream, started: Instant, passed: &Passed) {
        let longest = self.config.max_connection_duration;
        let limits = Limits {
            idle: Some(self.config.idle_timeout).filter(|idle| !idle.is_zero()),
            until: longest.map(|longest| (started + longest).into()),
        };
        let mut counted = upstream.counted;
        let end = pump::run(client, upstream.stream, limits, passed).await;
        // It was open: who ended it, and why, is not the endpoint's fault.
        counted.ended = match end {
            End::Complete | End::Idle | End::Expired => Ended::Succeeded,
            End::Broken => Ended::Cancelled,
        };
        match end {
            End::Idle => self.stats.idle_timeout.increment(1),
            End::Expired => self.stats.max_downstream_connection_duration.increment(1),
            End::Complete | End::Broken => {}
        }
    }

    /// A connection to an endpoint; what became of that is in `log`.
    async fn open(&self, info: &ConnectionInfo, log: &mut LogFields) -> Option<Upstream> {
        let cluster = self.cluster();
        log.upstream_cluster = cluster.into();
        let Some(view) = self.endpoints.view(cluster) else {
            self.stats.downstream_cx_no_route.increment(1);
            log.flags.push(Flag::NoClusterFound);
            return None;
        };
        let mut failed: Vec<Arc<Endpoint>> = Vec::new();
        for attempt in 1..=self.config.max_connect_attempts {
            let Some(endpoint) = self.choose(&view, &failed, info) else {
                if attempt == 1 {
                    log.flags.push(Flag::NoHealthyUpstream);
                }
                break;
            };
            log.attempts = attempt;
            log.upstream_host = Some(endpoint.id.clone());
            let mut counted = Counted::new(endpoint.clone());
            match connect_raw(&endpoint, view.connect_timeout).await {
                Ok((stream, open)) => {
                    log.flags.clear();
                    return Some(Upstream {
                        stream,
                        counted: counted.active(),
                        _open: open,
                    });
                }
                Err(error) if error.flag == Flag::UpstreamOverflow => {
                    counted.ended = Ended::Failed;
                    log.flags = vec![error.flag];
                    log.details = error.details.to_string();
                    return None;
                }
                Err(error) => {
                    counted.ended = Ended::Failed;
                    endpoint.inhibit();
                    log.flags = vec![error.flag];
                    log.details = error.details.to_string();
                    failed.push(endpoint);
                }
            }
        }
        if self.config.max_connect_attempts > 1 && !failed.is_empty() {
            log.flags.push(Flag::UpstreamRetryLimitExceeded);
        }
        None
    }

    /// One that has not failed, if there is one.
    fn choose(
        &self,
        view: &ClusterView,
        failed: &[Arc<Endpoint>],
        info: &ConnectionInfo,
    ) -> Option<Arc<Endpoint>> {
        if let Some(config) = &view.original_dst {
            let meant = config.at(info.original_dst()?);
            let endpoint = self.endpoints.original(view, meant);
            return endpoint.filter(|endpoint| endpoint.is_alive());
        }
        let mut all = view.candidates(None);
        // Behind a peer there is no socket of an engine.
        all.retain(|endpoint| endpoint.via != Via::Peer);
        let is_fresh =
            |endpoint: &Arc<Endpoint>| !failed.iter().any(|one| Arc::ptr_eq(one, endpoint));
        if all.iter().any(is_fresh) {
            all.retain(is_fresh);
        }
        let index = self.endpoints.choose(view, &all, None)?;
        Some(all.swap_remove(index))
    }

    fn cluster(&self) -> &str {
        let clusters = &self.config.clusters;
        if let [(only, _)] = clusters.as_slice() {
            return only;
        }
        let total: u64 = clusters.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let mut drawn = rand::rng().random_range(0..total.max(1));
        for (name, weight) in clusters {
            match drawn.checked_sub((*weight).into()) {
                Some(rest) => drawn = rest,
                None => return name,
            }
        }
        clusters.last().map_or("", |(name, _)| name)
    }

    fn log(
        &self,
        (start, started): (SystemTime, Instant),
        (bytes_received, bytes_sent): (u64, u64),
        info: &ConnectionInfo,
        log: &LogFields,
    ) {
        if self.logs.is_empty() {
            return;
        }
        let no_method = Method::from_bytes(b"-").expect("invariant: a dash is a token");
        let duration: Duration = started.elapsed();
        let entry = Entry {
            start,
            duration,
            request_duration: None,
            response_duration: None,
            method: &no_method,
            path: "",
            authority: "",
            protocol: None,
            code: 0,
            bytes_received,
            bytes_sent,
            downstream_remote: &info.remote,
            downstream_direct_remote: &info.direct_remote,
            downstream_local: &info.local,
            connection_id: info.id,
            tls: info.tls.as_deref(),
            request_id: "",
            trace_id: "",
            route_name: "",
            virtual_host: "",
            ttft: None,
            itl_p99: None,
            log,
            local_reply_body: "",
        };
        self.logs.write(&entry, &Captured::default());
    }
}

struct Upstream {
    stream: Stream,
    counted: Counted,
    _open: OpenConnection,
}

/// Counts a connection as a request, and from when it is open as one in flight there, for those who balance by that.
struct Counted {
    endpoint: Arc<Endpoint>,
    is_active: bool,
    ended: Ended,
}

impl Counted {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        endpoint.host.tally.begin();
        Self {
            endpoint,
            is_active: false,
            ended: Ended::Cancelled,
        }
    }

    fn active(mut self) -> Self {
        self.endpoint.stats.active.fetch_add(1, Relaxed);
        self.is_active = true;
        self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // An endpoint without active connections is forgotten, and its tally with it.
        self.endpoint.host.tally.end(self.ended);
        if self.is_active {
            self.endpoint.stats.active.fetch_sub(1, Relaxed);
        }
    }
}
