//! Does a part that this program starts of itself end with whoever started it, and only if it was told to?

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

use outrigger_conformance::reexec::ENDS_WITH_STDIN;
use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// For a process to end; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends it, however the test ends.
struct Engine(Child);

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An engine that serves, its standard input a pipe whose other end is with the child.
fn engine(leashed: bool) -> Engine {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-demo"));
    if leashed {
        command.env(ENDS_WITH_STDIN, "1");
    }
    command
        .args(["engine", "--port", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut engine = Engine(command.spawn().unwrap());
    let mut first = String::new();
    BufReader::new(engine.0.stdout.take().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert!(first.contains("\"http\""), "{first}");
    engine
}

#[test]
fn a_part_ends_when_its_starter_lets_go() {
    let mut engine = engine(true);
    assert!(
        engine.0.try_wait().unwrap().is_none(),
        "it serves while the pipe is open"
    );
    drop(engine.0.stdin.take());
    let deadline = Instant::now() + PATIENCE;
    while engine.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it outlives its starter");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_part_that_was_not_told_so_serves_on() {
    let mut engine = engine(false);
    drop(engine.0.stdin.take());
    std::thread::sleep(Duration::from_millis(300));
    assert!(engine.0.try_wait().unwrap().is_none());
}
