//! A part of the demo as a process of its own: this program again, told to be a proxy, an engine or a control plane. It ends with us,
//! however we end, and never hears our terminal's Ctrl-C.

use super::fleet::LOOK;
use crate::reexec;
use anyhow::{Context, Result, bail};
use std::{
    cell::RefCell,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// For a process to end after it was told to; then it is killed.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How much of a log is shown when its process failed.
const LOG_LINES_SHOWN: usize = 12;

/// A running part.
pub(super) struct Process {
    child: RefCell<Child>,
    /// Closed to tell it to end; closes by itself when we end.
    leash: Option<ChildStdin>,
    out: Option<BufReader<ChildStdout>>,
    log: PathBuf,
    /// Its process id.
    pub(super) pid: u32,
}

impl Process {
    /// Starts `part` (see [`reexec::dispatch`]) with `arguments`; what it logs goes to the file `log`.
    pub(super) fn start<A: AsRef<OsStr>>(part: &str, arguments: &[A], log: &Path) -> Result<Self> {
        let mut program = std::env::current_exe().context("the path of this program")?;
        if !program.exists() {
            // It was built anew while we run. On Linux the old one can still be had.
            program = PathBuf::from("/proc/self/exe");
        }
        let errors = std::fs::File::create(log).with_context(|| log.display().to_string())?;
        let mut child = Command::new(program)
            .arg(part)
            .args(arguments)
            .env(reexec::ENDS_WITH_STDIN, "1")
            // Its log is a file.
            .env("NO_COLOR", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {part}"))?;
        let pid = child.id().context("a process that ended as it began")?;
        let (leash, out) = (child.stdin.take(), child.stdout.take().map(BufReader::new));
        Ok(Self {
            child: RefCell::new(child),
            leash,
            out,
            log: log.to_owned(),
            pid,
        })
    }

    /// The next line of its standard output.
    pub(super) async fn line(&mut self, limit: Duration) -> Result<String> {
        let mut line = String::new();
        let out = self.out.as_mut().context("its standard output is gone")?;
        let read = tokio::time::timeout(limit, out.read_line(&mut line)).await;
        match read {
            Ok(Ok(count)) if count > 0 => Ok(line),
            Ok(_) => bail!("it ended: {}", self.log_tail()),
            Err(_) => bail!("it said nothing within {limit:?}: {}", self.log_tail()),
        }
    }

    /// Waits until there is something to be seen of it.
    pub(super) async fn until<T>(
        &self,
        limit: Duration,
        mut look: impl AsyncFnMut() -> Option<T>,
    ) -> Result<T> {
        let begun = Instant::now();
        loop {
            if let Some(seen) = look().await {
                return Ok(seen);
            }
            if self.has_ended() || begun.elapsed() > limit {
                bail!("{}", self.log_tail());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        // An error means that there is no such child any more.
        !matches!(self.child.borrow_mut().try_wait(), Ok(None))
    }

    /// `kill -9`.
    pub(super) fn kill(&self) -> Result<()> {
        self.child.borrow_mut().start_kill().context("kill -9")
    }

    /// Tells it to end and waits, not for long.
    pub(super) async fn stop(&mut self) {
        drop(self.leash.take());
        let child = self.child.get_mut();
        if tokio::time::timeout(END_LIMIT, child.wait()).await.is_err() {
            // It may have ended just now; there is nothing more to be done either way.
            let _ = child.kill().await;
        }
    }

    /// The end of what it logged.
    pub(super) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }
}
