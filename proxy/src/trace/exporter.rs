//! Spans on their way to a collector: one bounded queue and one task a collector, on the main runtime.
//!
//! A worker only puts a span into the queue; where there is no room it is lost, and counted. A collector that is dead,
//! slow or answers nonsense costs spans, never a request.

use super::collector::Collector;
use bytes::Bytes;
use metrics::{Counter, counter};
use outrigger_filters::{services::Services, trace::Sink};
use outrigger_xds::{
    otlp::{self, Attribute, Span},
    resource::tracing::OpenTelemetry,
};
use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::sync::{
    Notify,
    mpsc::{self, error::TrySendError},
};

/// Spans that wait for one collector; one is about 1 KiB.
const QUEUE_SPANS_MAX: usize = 8192;
/// Of these, those that go in one export.
const BATCH_SPANS_MAX: usize = 512;
/// How long the first span of a batch waits for others.
const GATHER: Duration = Duration::from_millis(200);
/// After an export that failed.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// `service.name` where none is configured, as OpenTelemetry wants it.
const SERVICE_DEFAULT: &str = "unknown_service:outrigger";

/// All collectors of a process: connection managers with the same one share its queue.
#[derive(Default)]
pub struct Exporters {
    open: Mutex<Vec<(OpenTelemetry, Weak<Exporter>)>>,
}

impl Exporters {
    /// The way to a collector, begun if it is not there yet.
    pub(super) fn open(&self, config: &OpenTelemetry, services: &Services) -> Arc<Exporter> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, exporter)| exporter.strong_count() > 0);
        let known = open.iter().find(|(known, _)| known == config);
        if let Some(exporter) = known.and_then(|(_, exporter)| exporter.upgrade()) {
            return exporter;
        }
        let exporter = Exporter::start(config, services);
        open.push((config.clone(), Arc::downgrade(&exporter)));
        exporter
    }

    /// Waits until what is over is told, at most `timeout`. Blocks: for the end of the process.
    pub fn flush(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let live: Vec<_> = open
            .iter()
            .filter_map(|(_, known)| known.upgrade())
            .collect();
        drop(open);
        for exporter in &live {
            exporter.shared.hurry.store(true, SeqCst);
            exporter.shared.wake.notify_one();
        }
        let waits = |exporter: &Arc<Exporter>| exporter.shared.pending.load(SeqCst) > 0;
        while live.iter().any(waits) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let left = |exporter: &Arc<Exporter>| exporter.shared.pending.load(SeqCst);
        let left: usize = live.iter().map(left).sum();
        if left > 0 {
            tracing::warn!(spans = left, "the collector did not take them in time");
        }
    }
}

/// The way to one collector. Dropping the last handle ends its task, after what waits was told.
pub(crate) struct Exporter {
    queue: mpsc::Sender<Span>,
    shared: Arc<Shared>,
    full: Counter,
}

struct Shared {
    /// Spans that wait or are being told.
    pending: AtomicUsize,
    hurry: AtomicBool,
    wake: Notify,
}

impl Exporter {
    fn start(config: &OpenTelemetry, services: &Services) -> Arc<Self> {
        let (queue, spans) = mpsc::channel(QUEUE_SPANS_MAX);
        let shared = Arc::new(Shared {
            pending: AtomicUsize::new(0),
            hurry: AtomicBool::new(false),
            wake: Notify::new(),
        });
        let task = Task {
            spans,
            shared: shared.clone(),
            resource: resource(config),
            timeout: config.timeout,
            collector: Collector::new(config.clone(), services.endpoints.clone()),
            sent: counter!("envoy_tracing_opentelemetry_spans_sent"),
            failed: counter!("outrigger_spans_dropped_total", "reason" => "export_failed"),
            rejected: counter!("outrigger_spans_dropped_total", "reason" => "rejected"),
            fails: false,
        };
        services.compute.spawn(task.run());
        Arc::new(Self {
            queue,
            shared,
            full: counter!("outrigger_spans_dropped_total", "reason" => "queue_full"),
        })
    }
}

impl Sink for Exporter {
    fn take(&self, span: Span) {
        self.shared.pending.fetch_add(1, SeqCst);
        if let Err(TrySendError::Full(_) | TrySendError::Closed(_)) = self.queue.try_send(span) {
            self.shared.pending.fetch_sub(1, SeqCst);
            self.full.increment(1);
        }
    }
}

/// Who we are.
fn resource(config: &OpenTelemetry) -> Vec<Attribute> {
    let service = match config.service_name.as_str() {
        "" => SERVICE_DEFAULT,
        name => name,
    };
    vec![
        ("service.name".into(), service.to_owned().into()),
        ("telemetry.sdk.language".into(), "rust".into()),
        ("telemetry.sdk.name".into(), "outrigger".into()),
        (
            "telemetry.sdk.version".into(),
            env!("CARGO_PKG_VERSION").into(),
        ),
    ]
}

struct Task {
    spans: mpsc::Receiver<Span>,
    shared: Arc<Shared>,
    resource: Vec<Attribute>,
    timeout: Duration,
    collector: Collector,
    sent: Counter,
    failed: Counter,
    rejected: Counter,
    /// The last export failed: said once in the log.
    fails: bool,
}

impl Task {
    async fn run(mut self) {
        let mut batch = Vec::new();
        while self.spans.recv_many(&mut batch, BATCH_SPANS_MAX).await > 0 {
            if batch.len() < BATCH_SPANS_MAX {
                self.pause(GATHER).await;
            }
            while batch.len() < BATCH_SPANS_MAX
                && let Ok(span) = self.spans.try_recv()
            {
                batch.push(span);
            }
            self.export(std::mem::take(&mut batch)).await;
            if self.fails {
                self.pause(FAILURE_PAUSE).await;
            }
        }
    }

    /// Nobody waits at the end of the process.
    async fn pause(&self, time: Duration) {
        if !self.shared.hurry.load(SeqCst) && !self.spans.is_closed() {
            // Whichever comes first.
            let _ = tokio::time::timeout(time, self.shared.wake.notified()).await;
        }
    }

    async fn export(&mut self, batch: Vec<Span>) {
        let count = batch.len();
        let message = Bytes::from(otlp::request(&self.resource, batch));
        let sending = self.collector.send(message);
        let told = tokio::time::timeout(self.timeout, sending).await;
        let told = told.unwrap_or_else(|_| {
            self.collector.forget();
            Err("no answer in time".into())
        });
        match told {
            Ok(rejected) => {
                let rejected = rejected.min(count as u64);
                self.sent.increment(count as u64 - rejected);
                self.rejected.increment(rejected);
                self.fails = false;
            }
            Err(error) => {
                self.failed.increment(count as u64);
                if !std::mem::replace(&mut self.fails, true) {
                    tracing::warn!(%error, spans = count, "the collector took no spans");
                }
            }
        }
        self.shared.pending.fetch_sub(count, SeqCst);
    }
}
