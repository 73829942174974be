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
use tokio::sync::{Notify, mpsc};

/// Spans that wait for one collector; one is about 1 KiB.
const QUEUE_SPANS_MAX: usize = 8192;
/// Bytes of the spans that wait or are being told.
const QUEUE_BYTES_MAX: usize = 8 << 20;
/// Of these, those that go in one export.
const BATCH_SPANS_MAX: usize = 512;
/// An export that has as many bytes gets no more spans.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// How long the first span of a batch waits for others.
const GATHER: Duration = Duration::from_millis(200);
/// After an export that failed.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// `service.name` where none is configured, as OpenTelemetry wants it.
const SERVICE_DEFAULT: &str = "unknown_service:outrigger";

/// All collectors of a process: connection managers with the same one share its queue.
#[derive(Default)]
pub struct Exporters {
    open: Mutex<Vec<Open>>,
}

struct Open {
    config: OpenTelemetry,
    /// Nobody may hold it any more, while its task still tells the last spans.
    exporter: Weak<Exporter>,
    /// There as long as the task.
    shared: Weak<Shared>,
}

impl Exporters {
    /// The way to a collector, begun if it is not there yet.
    pub(super) fn open(&self, config: &OpenTelemetry, services: &Services) -> Arc<Exporter> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|open| open.shared.strong_count() > 0);
        let mut known = open.iter().filter(|open| open.config == *config);
        if let Some(exporter) = known.find_map(|open| open.exporter.upgrade()) {
            return exporter;
        }
        let exporter = Exporter::start(config, services);
        open.push(Open {
            config: config.clone(),
            exporter: Arc::downgrade(&exporter),
            shared: Arc::downgrade(&exporter.shared),
        });
        exporter
    }

    /// Waits until what is over is told, at most `timeout`. Blocks: for the end of the process.
    pub fn flush(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let live: Vec<_> = open
            .iter()
            .filter_map(|open| open.shared.upgrade())
            .collect();
        drop(open);
        for shared in &live {
            shared.hurry.store(true, SeqCst);
            shared.wake.notify_one();
        }
        let left = || -> usize { live.iter().map(|shared| shared.pending.load(SeqCst)).sum() };
        while left() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let left = left();
        if left > 0 {
            counter!("outrigger_spans_dropped_total", "reason" => "shutdown")
                .increment(left as u64);
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

#[derive(Default)]
struct Shared {
    /// Spans that wait or are being told.
    pending: AtomicUsize,
    /// What they take.
    bytes: AtomicUsize,
    hurry: AtomicBool,
    wake: Notify,
}

impl Exporter {
    fn start(config: &OpenTelemetry, services: &Services) -> Arc<Self> {
        let (queue, spans) = mpsc::channel(QUEUE_SPANS_MAX);
        let shared = Arc::new(Shared::default());
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
        let bytes = span.bytes();
        let fits = self.shared.add(bytes) <= QUEUE_BYTES_MAX;
        if !fits || self.queue.try_send(span).is_err() {
            self.shared.remove(1, bytes);
            self.full.increment(1);
        }
    }
}

impl Shared {
    /// One more span; gives what all take.
    fn add(&self, bytes: usize) -> usize {
        self.pending.fetch_add(1, SeqCst);
        self.bytes.fetch_add(bytes, SeqCst) + bytes
    }

    fn remove(&self, spans: usize, bytes: usize) {
        self.bytes.fetch_sub(bytes, SeqCst);
        self.pending.fetch_sub(spans, SeqCst);
    }

    /// There is enough for an export.
    fn has_batch(&self) -> bool {
        self.pending.load(SeqCst) >= BATCH_SPANS_MAX || self.bytes.load(SeqCst) >= BATCH_BYTES_MAX
    }
}

/// Some spans, and what they take.
#[derive(Default)]
struct Batch {
    spans: Vec<Span>,
    bytes: usize,
}

impl Batch {
    fn push(&mut self, span: Span) {
        self.bytes += span.bytes();
        self.spans.push(span);
    }

    fn is_full(&self) -> bool {
        self.spans.len() >= BATCH_SPANS_MAX || self.bytes >= BATCH_BYTES_MAX
    }

    /// Takes what waits, as far as there is room.
    fn fill(&mut self, queue: &mut mpsc::Receiver<Span>) {
        while !self.is_full()
            && let Ok(span) = queue.try_recv()
        {
            self.push(span);
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
        while let Some(first) = self.spans.recv().await {
            let mut batch = Batch::default();
            batch.push(first);
            if !self.shared.has_batch() {
                self.pause(GATHER).await;
            }
            batch.fill(&mut self.spans);
            self.export(batch).await;
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

    async fn export(&mut self, batch: Batch) {
        let (count, bytes) = (batch.spans.len(), batch.bytes);
        let message = Bytes::from(otlp::request(&self.resource, batch.spans));
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
        self.shared.remove(count, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::{otlp::Kind, resource::tracing::Transport};
    use std::time::SystemTime;

    fn span(bytes: usize) -> Span {
        Span {
            trace_id: [1; 16],
            id: [2; 8],
            parent: None,
            state: "".into(),
            name: "x".repeat(bytes).into(),
            kind: Kind::Internal,
            start: SystemTime::UNIX_EPOCH,
            end: SystemTime::UNIX_EPOCH,
            attributes: Vec::new(),
            failed: false,
        }
    }

    #[test]
    fn a_queue_and_a_batch_have_only_so_many_bytes() {
        let (queue, mut spans) = mpsc::channel(QUEUE_SPANS_MAX);
        let exporter = Exporter {
            queue,
            shared: Arc::default(),
            full: Counter::noop(),
        };
        let each = 100 << 10;
        for _ in 0..100 {
            exporter.take(span(each));
        }
        let fit = QUEUE_BYTES_MAX / span(each).bytes();
        assert_eq!(exporter.shared.pending.load(SeqCst), fit);
        let mut batch = Batch::default();
        batch.fill(&mut spans);
        assert_eq!(batch.spans.len(), BATCH_BYTES_MAX / each + 1);
        exporter.shared.remove(batch.spans.len(), batch.bytes);
        // There is room again, for a small one and not for one that is too big.
        exporter.take(span(each));
        exporter.take(span(QUEUE_BYTES_MAX));
        let waits = fit - batch.spans.len() + 1;
        assert_eq!(exporter.shared.pending.load(SeqCst), waits);
        let mut taken = 0;
        while spans.try_recv().is_ok() {
            taken += 1;
        }
        assert_eq!(taken, waits);
    }

    #[test]
    fn a_batch_has_only_so_many_spans() {
        let (queue, mut spans) = mpsc::channel(QUEUE_SPANS_MAX);
        for _ in 0..=BATCH_SPANS_MAX {
            queue.try_send(span(1)).unwrap();
        }
        let mut batch = Batch::default();
        batch.fill(&mut spans);
        assert_eq!(batch.spans.len(), BATCH_SPANS_MAX);
    }

    #[test]
    fn what_is_left_of_an_exporter_that_nobody_holds_is_waited_for() {
        let exporters = Exporters::default();
        let shared = Arc::new(Shared::default());
        exporters.open.lock().unwrap().push(Open {
            config: OpenTelemetry {
                service_name: String::new(),
                cluster: "c".into(),
                timeout: Duration::ZERO,
                headers: Vec::new(),
                transport: Transport::Http { uri: String::new() },
            },
            exporter: Weak::new(),
            shared: Arc::downgrade(&shared),
        });
        shared.add(1);
        let task = shared.clone();
        let telling = thread::spawn(move || {
            while !task.hurry.load(SeqCst) {
                thread::yield_now();
            }
            task.remove(1, 1);
        });
        exporters.flush(Duration::from_secs(60));
        assert_eq!(shared.pending.load(SeqCst), 0);
        telling.join().unwrap();
    }
}
