//! Sinks on real files, pipes and full disks.

use super::*;
use std::{io::Read, path::PathBuf, sync::atomic::AtomicU32};

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "outrigger-sink-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> AccessLogSink {
        AccessLogSink::File(self.path(name))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The figure of a counter of this sink.
fn counted(name: &str, label: &str) -> u64 {
    let wanted = format!("{name}{{sink=\"{label}\"}} ");
    crate::metrics::render()
        .lines()
        .find_map(|line| line.strip_prefix(&wanted)?.parse().ok())
        .unwrap_or(0)
}

#[test]
fn a_line_arrives_without_being_asked_for() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("log"), "before\n").unwrap();
    let sinks = Sinks::default();
    let sink = sinks.open(&scratch.file("log")).unwrap();
    // Once as the first line ever, once after the writer went idle.
    for expect in ["before\none\n", "before\none\none\n"] {
        let begun = Instant::now();
        sink.push(b"one\n");
        eventually("the line is written", || scratch.read("log") == expect);
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "took {:?}",
            begun.elapsed()
        );
    }
}

#[test]
fn lines_of_many_threads_stay_whole_and_none_is_lost() {
    let scratch = Scratch::new();
    let sinks = Sinks::default();
    let sink = sinks.open(&scratch.file("log")).unwrap();
    assert!(
        Arc::ptr_eq(&sink, &sinks.open(&scratch.file("log")).unwrap()),
        "one writer for one file"
    );
    thread::scope(|scope| {
        for thread in 0..12 {
            let sink = &sink;
            scope.spawn(move || {
                for line in 0..2_000 {
                    sink.push(format!("{thread}:{line}:{}\n", "x".repeat(line % 200)).as_bytes());
                }
            });
        }
    });
    assert!(sinks.flush(Duration::from_secs(10)));
    let text = scratch.read("log");
    let mut lines: Vec<&str> = text.lines().collect();
    for line in &lines {
        let mut parts = line.split(':');
        let number: usize = parts.nth(1).unwrap().parse().unwrap();
        assert_eq!(parts.next().unwrap(), "x".repeat(number % 200));
    }
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 24_000);
}

#[test]
fn what_is_queued_is_written_when_the_last_user_goes() {
    let scratch = Scratch::new();
    let sinks = Sinks::default();
    sinks.open(&scratch.file("log")).unwrap().push(b"last\n");
    eventually("the line is written", || scratch.read("log") == "last\n");
    assert!(sinks.live().is_empty());
}

#[test]
fn reopen_follows_a_rotation() {
    let scratch = Scratch::new();
    let sinks = Sinks::default();
    let sink = sinks.open(&scratch.file("log")).unwrap();
    sink.push(b"old\n");
    assert!(sinks.flush(Duration::from_secs(5)));
    std::fs::rename(scratch.path("log"), scratch.path("log.1")).unwrap();
    sinks.reopen();
    eventually("the file is opened anew", || {
        std::fs::exists(scratch.path("log")).unwrap()
    });
    sink.push(b"new\n");
    assert!(sinks.flush(Duration::from_secs(5)));
    assert_eq!(
        (scratch.read("log.1").as_str(), scratch.read("log").as_str()),
        ("old\n", "new\n")
    );

    // Where the path is gone, the old file stays in use, and the failure is counted.
    std::fs::rename(
        &scratch.0,
        scratch.path("").trim_end_matches('/').to_owned() + ".moved",
    )
    .unwrap();
    let moved = Scratch(PathBuf::from(
        scratch.path("").trim_end_matches('/').to_owned() + ".moved",
    ));
    sinks.reopen();
    eventually("the failure is counted", || {
        counted(
            "outrigger_access_log_write_errors_total",
            &scratch.path("log"),
        ) > 0
    });
    sink.push(b"still\n");
    assert!(sinks.flush(Duration::from_secs(5)));
    assert_eq!(moved.read("log"), "new\nstill\n");
}

#[test]
fn a_file_that_cannot_be_opened_is_an_error_that_names_it() {
    let error = Sinks::default()
        .open(&AccessLogSink::File("/nonexistent/log".into()))
        .err()
        .unwrap();
    assert!(error.starts_with("/nonexistent/log: "), "{error}");
}

#[test]
fn a_full_disk_drops_and_counts_and_never_blocks() {
    let sinks = Sinks::default();
    let sink = sinks
        .open(&AccessLogSink::File("/dev/full".into()))
        .unwrap();
    let line = vec![b'x'; 1024 * 1024];
    let begun = Instant::now();
    for _ in 0..20 {
        sink.push(&line);
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(
        counted("outrigger_access_log_dropped_total", "/dev/full"),
        4,
        "16 MiB fit"
    );
    eventually("the failures are counted", || {
        counted("outrigger_access_log_write_errors_total", "/dev/full") > 0
    });
    assert!(!sinks.flush(Duration::from_millis(50)));
}

#[test]
fn a_stuck_pipe_holds_up_nobody_and_gets_everything_later() {
    let scratch = Scratch::new();
    let made = std::process::Command::new("mkfifo")
        .arg(scratch.path("fifo"))
        .status()
        .unwrap();
    assert!(made.success());
    // A reader that does not read; opened first, else the writer's open would wait.
    let path = scratch.path("fifo");
    let reader = thread::spawn(move || File::open(path).unwrap());
    let sinks = Sinks::default();
    let sink = sinks.open(&scratch.file("fifo")).unwrap();
    let mut reader = reader.join().unwrap();
    let line = [[b'x'; 1023].as_slice(), b"\n"].concat();
    let begun = Instant::now();
    for _ in 0..1024 {
        sink.push(&line);
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(
        !sinks.flush(Duration::from_millis(100)),
        "a pipe holds no megabyte"
    );
    let mut got = vec![0; 1024 * 1024];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(got.iter().filter(|byte| **byte == b'\n').count(), 1024);
    assert!(sinks.flush(Duration::from_secs(5)));
}
