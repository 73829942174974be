//! What this process counts: the one recorder, its rows ([`table`]), and the handles of the request path ([`stats`]).
//!
//! Names are Envoy's where Envoy has one. To add a metric, add a row to [`table::ROWS`]; use it through the `metrics`
//! macros where it is rare, through a handle made once where it is not. How `/stats` shows it is [`text`]'s business.

pub mod listener_filter;
mod stats;
pub mod table;
#[cfg(test)]
mod tests;
mod text;

pub use stats::{ClusterStats, HttpStats, ListenerManagerStats, ListenerStats};
pub use text::{Format, Query};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use std::{
    sync::OnceLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use table::{Kind, ROWS};

/// Between two rounds of moving histogram samples from the request threads' buffers into buckets; those buffers
/// grow until then.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(2);

struct Installed {
    handle: PrometheusHandle,
    start: SystemTime,
}

/// Sets up the process's recorder, once; every later call finds the same. Handles made before are deaf, so everything
/// in this crate that makes handles calls it first.
pub fn install() {
    installed();
}

fn installed() -> &'static Installed {
    static INSTALLED: OnceLock<Installed> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let recorder = builder()
            .expect("invariant: no row has an empty list of buckets")
            .build_recorder();
        let handle = recorder.handle();
        if ::metrics::set_global_recorder(recorder).is_err() {
            tracing::error!("another metrics recorder is installed: this one will stay empty");
        }
        for row in ROWS {
            match row.kind {
                Kind::Counter => ::metrics::describe_counter!(row.name, row.help),
                Kind::Gauge => ::metrics::describe_gauge!(row.name, row.help),
                Kind::Histogram(_) => ::metrics::describe_histogram!(row.name, row.help),
            }
        }
        Installed {
            handle,
            start: SystemTime::now(),
        }
    })
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for row in ROWS {
        if let Kind::Histogram(buckets) = row.kind {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(row.name.to_owned()), buckets.bounds())?;
        }
    }
    // Histograms of somebody who forgot the row.
    builder.set_buckets(table::Buckets::Seconds.bounds())
}

/// Moves histogram samples into their buckets, for ever. Run it on the main runtime.
pub async fn upkeep() {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        installed().handle.run_upkeep();
    }
}

/// All metrics in the Prometheus text format, sorted by name and labels.
#[must_use]
pub fn render() -> String {
    render_as(&Query::default())
}

/// The metrics that `query` asks for, as it asks for them.
#[must_use]
pub fn render_as(query: &Query) -> String {
    text::show(&installed().handle.render(), query)
}

/// What the process says of itself, brought up to date before it is shown.
#[derive(Debug, Clone, Copy)]
pub struct ProcessFacts {
    /// Whether it serves.
    pub live: bool,
    /// Envoy's number of the server state: 0 live, 1 draining, 2 pre-initialising, 3 initialising.
    pub state: u8,
    /// When it began.
    pub started: Instant,
}

/// Sets the gauges of the process as a whole.
pub fn refresh_process(facts: ProcessFacts) {
    let start = installed().start;
    ::metrics::gauge!("outrigger_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    ::metrics::gauge!("envoy_server_live").set(f64::from(u8::from(facts.live)));
    ::metrics::gauge!("envoy_server_state").set(f64::from(facts.state));
    ::metrics::gauge!("envoy_server_uptime").set(facts.started.elapsed().as_secs() as f64);
    let start_seconds = start
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64();
    ::metrics::gauge!("process_start_time_seconds").set(start_seconds);
    if let Some(memory) = Memory::read() {
        ::metrics::gauge!("process_resident_memory_bytes").set(memory.resident_bytes as f64);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        ::metrics::gauge!("process_open_fds").set(files.count() as f64);
    }
}

/// Memory of this process, as the kernel counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// In RAM, all of it (`VmRSS`).
    pub resident_bytes: u64,
    /// In RAM, not backed by files (`RssAnon`).
    pub anonymous_bytes: u64,
    /// Mapped for data, in RAM or not (`VmData`).
    pub data_bytes: u64,
}

impl Memory {
    /// `None` where the kernel does not tell.
    #[must_use]
    pub fn read() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            let kib: u64 = line
                .trim_start_matches(':')
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()?;
            Some(kib * 1024)
        };
        Some(Self {
            resident_bytes: bytes("VmRSS")?,
            anonymous_bytes: bytes("RssAnon")?,
            data_bytes: bytes("VmData")?,
        })
    }
}
