//! Where lines go: one queue in bytes and one writer thread per destination, shared by every listener that logs there.
//!
//! A request thread only copies its line into a buffer. The buffers are several so that threads seldom meet; lines of
//! different threads may therefore swap places within one [`FLUSH_INTERVAL`]. A destination that cannot be written
//! (disk full, reader gone) is tried again every [`RETRY_INTERVAL`]; meanwhile the queue fills, and past
//! [`QUEUE_BYTES_MAX`] lines are dropped and counted. Nothing here ever fails a request.

use outrigger_xds::resource::listener::AccessLogSink;
use std::{
    cell::Cell,
    fs::File,
    io::{self, ErrorKind, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

/// Bytes that may wait for one destination, the ones being written included.
pub const QUEUE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Longest a line waits before it is handed to the system, while the destination takes it.
pub const FLUSH_INTERVAL: Duration = Duration::from_millis(50);
/// Between two attempts to write to a destination that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Between two attempts at a full pipe that does not block.
const FULL_PIPE_INTERVAL: Duration = Duration::from_millis(5);
/// How long a writer whose logs are gone tries to get rid of what is queued.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// A writer's buffers are given back to the system above this size.
const BUFFER_BYTES_MAX: usize = 1024 * 1024;
const SHARDS: usize = 8;

/// All open destinations of a process, so that two listeners that log to one file share its writer.
#[derive(Default)]
pub struct Sinks {
    open: Mutex<Vec<(AccessLogSink, Weak<Sink>)>>,
}

impl Sinks {
    /// The sink of a destination, opened if it is not open yet.
    pub(super) fn open(&self, destination: &AccessLogSink) -> Result<Arc<Sink>, String> {
        let mut open = lock(&self.open);
        open.retain(|(_, sink)| sink.strong_count() > 0);
        let known = open.iter().find(|(known, _)| known == destination);
        if let Some(sink) = known.and_then(|(_, sink)| sink.upgrade()) {
            return Ok(sink);
        }
        let sink = Arc::new(Sink::start(destination.clone())?);
        open.push((destination.clone(), Arc::downgrade(&sink)));
        Ok(sink)
    }

    /// Opens every file anew at its path, after a log rotation. Lines queued before go to the new file.
    pub fn reopen(&self) {
        for sink in self.live() {
            sink.shared.reopen.store(true, SeqCst);
            sink.shared.wake();
        }
    }

    /// Waits until what was logged before is written, at most `timeout`. Blocks: for the end of the process. Gives
    /// whether all was written.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let live = self.live();
        for sink in &live {
            sink.shared.hurry.store(true, SeqCst);
            sink.shared.wake();
        }
        let is_empty = |sink: &Arc<Sink>| sink.shared.queued_bytes.load(SeqCst) == 0;
        while !live.iter().all(is_empty) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        live.iter()
            .for_each(|sink| sink.shared.hurry.store(false, SeqCst));
        live.iter().all(is_empty)
    }

    fn live(&self) -> Vec<Arc<Sink>> {
        lock(&self.open)
            .iter()
            .filter_map(|(_, sink)| sink.upgrade())
            .collect()
    }
}

/// One destination. Dropping the last handle ends its writer, after what is queued was written.
pub(super) struct Sink {
    shared: Arc<Shared>,
}

struct Shared {
    shards: [Mutex<Vec<u8>>; SHARDS],
    queued_bytes: AtomicUsize,
    /// The writer sleeps until woken.
    idle: AtomicBool,
    hurry: AtomicBool,
    reopen: AtomicBool,
    closing: AtomicBool,
    writer: OnceLock<Thread>,
    dropped: metrics::Counter,
    errors: metrics::Counter,
}

impl Sink {
    fn start(destination: AccessLogSink) -> Result<Self, String> {
        crate::metrics::install();
        let label = label(&destination);
        let file = open(&destination).map_err(|error| format!("{label}: {error}"))?;
        let shared = Arc::new(Shared {
            shards: Default::default(),
            queued_bytes: AtomicUsize::new(0),
            idle: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            writer: OnceLock::new(),
            dropped: metrics::counter!("outrigger_access_log_dropped_total", "sink" => label.clone()),
            errors: metrics::counter!("outrigger_access_log_write_errors_total", "sink" => label.clone()),
        });
        let writer = Writer {
            shared: shared.clone(),
            destination,
            label,
            file,
            batch: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| format!("no thread for the access log: {error}"))?;
        // Only this function sets it.
        let _ = shared.writer.set(thread.thread().clone());
        Ok(Self { shared })
    }

    /// Queues one line, or drops and counts it.
    pub(super) fn push(&self, line: &[u8]) {
        let shared = &*self.shared;
        let before = shared.queued_bytes.fetch_add(line.len(), SeqCst);
        if before + line.len() > QUEUE_BYTES_MAX {
            shared.queued_bytes.fetch_sub(line.len(), SeqCst);
            shared.dropped.increment(1);
            return;
        }
        shared.shard().extend_from_slice(line);
        if shared.idle.load(SeqCst) {
            shared.wake();
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.closing.store(true, SeqCst);
        self.shared.wake();
    }
}

impl Shared {
    /// A buffer for this thread: its own, or one that nobody holds, or else its own after a short wait.
    fn shard(&self) -> MutexGuard<'_, Vec<u8>> {
        let home = home_shard();
        (0..SHARDS)
            .find_map(|step| self.shards[(home + step) % SHARDS].try_lock().ok())
            .unwrap_or_else(|| lock(&self.shards[home]))
    }

    fn wake(&self) {
        // Only the first to see it idle pays for the system call.
        if (self.idle.swap(false, SeqCst) || self.is_urgent())
            && let Some(writer) = self.writer.get()
        {
            writer.unpark();
        }
    }

    fn is_urgent(&self) -> bool {
        self.hurry.load(SeqCst) || self.closing.load(SeqCst) || self.reopen.load(SeqCst)
    }
}

/// The thread that writes.
struct Writer {
    shared: Arc<Shared>,
    destination: AccessLogSink,
    label: String,
    file: File,
    batch: Vec<u8>,
}

impl Writer {
    fn run(mut self) {
        loop {
            self.wait_for_lines();
            self.reopen_if_asked();
            self.collect();
            self.write_batch();
            if self.shared.queued_bytes.load(SeqCst) == 0 {
                self.shared.hurry.store(false, SeqCst);
                if self.shared.closing.load(SeqCst) {
                    return;
                }
            } else if self.shared.closing.load(SeqCst) && !self.batch.is_empty() {
                return self.give_up();
            }
        }
    }

    /// Sleeps until there is something to write, then a little more so that lines leave together.
    fn wait_for_lines(&self) {
        let shared = &*self.shared;
        shared.idle.store(true, SeqCst);
        while shared.queued_bytes.load(SeqCst) == 0 && !shared.is_urgent() {
            thread::park();
            shared.idle.store(true, SeqCst);
        }
        shared.idle.store(false, SeqCst);
        if !shared.is_urgent() {
            thread::park_timeout(FLUSH_INTERVAL);
        }
    }

    fn reopen_if_asked(&mut self) {
        if !self.shared.reopen.swap(false, SeqCst) {
            return;
        }
        match open(&self.destination) {
            Ok(file) => self.file = file,
            Err(error) => {
                self.shared.errors.increment(1);
                tracing::warn!(sink = self.label, %error, "access log: cannot be reopened, the old file stays");
            }
        }
    }

    fn collect(&mut self) {
        for shard in &self.shared.shards {
            let mut lines = lock(shard);
            self.batch.append(&mut lines);
            if lines.capacity() > BUFFER_BYTES_MAX {
                *lines = Vec::new();
            }
        }
    }

    /// Writes all of the batch; on errors it stays and is tried again, until the sink closes.
    fn write_batch(&mut self) {
        let mut written = 0;
        let mut failures = 0_u32;
        let mut closing_since = None;
        while written < self.batch.len() {
            let error = match self.file.write(&self.batch[written..]) {
                Ok(bytes) if bytes > 0 => {
                    written += bytes;
                    self.shared.queued_bytes.fetch_sub(bytes, SeqCst);
                    failures = 0;
                    continue;
                }
                Ok(_) => ErrorKind::WriteZero.into(),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            let is_full_pipe = error.kind() == ErrorKind::WouldBlock;
            if !is_full_pipe {
                self.note(&error, failures);
                failures += 1;
            }
            if self.shared.closing.load(SeqCst)
                && closing_since.get_or_insert_with(Instant::now).elapsed() > CLOSE_TIMEOUT
            {
                break;
            }
            let is_hurried = is_full_pipe || self.shared.is_urgent();
            thread::park_timeout(if is_hurried {
                FULL_PIPE_INTERVAL
            } else {
                RETRY_INTERVAL
            });
            self.reopen_if_asked();
        }
        self.batch.drain(..written);
        if self.batch.capacity() > BUFFER_BYTES_MAX && self.batch.is_empty() {
            self.batch = Vec::new();
        }
    }

    fn note(&self, error: &io::Error, failures: u32) {
        self.shared.errors.increment(1);
        if failures == 0 {
            tracing::warn!(sink = self.label, %error, "access log: cannot be written, will be tried again");
        }
    }

    fn give_up(&mut self) {
        self.collect();
        let lines = memchr::memchr_iter(b'\n', &self.batch).count();
        self.shared.dropped.increment(lines as u64);
        tracing::warn!(
            sink = self.label,
            lines,
            "access log: closed with lines that could not be written"
        );
    }
}

fn home_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static HOME: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed) % SHARDS);
    }
    HOME.get()
}

fn open(destination: &AccessLogSink) -> io::Result<File> {
    match destination {
        // Not `io::stdout()` itself: its lock and its line buffer are for other people.
        AccessLogSink::Stdout => Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
        AccessLogSink::Stderr => Ok(File::from(io::stderr().as_fd().try_clone_to_owned()?)),
        AccessLogSink::File(path) => File::options().append(true).create(true).open(path),
    }
}

fn label(destination: &AccessLogSink) -> String {
    match destination {
        AccessLogSink::Stdout => "stdout".to_owned(),
        AccessLogSink::Stderr => "stderr".to_owned(),
        AccessLogSink::File(path) => path.clone(),
    }
}

/// A poisoned lock holds bytes all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "sink_tests.rs"]
mod tests;
