//! Shows in a minute what Outrigger does, on simulated engines: two of them, a proxy beside each, and the control
//! plane of the proxies, every one a process of its own (this program again, see [`crate::reexec`]), on free ports.
//!
//! Without flags it prints what to try and a live summary until Ctrl-C; `--check` runs a script against expectations
//! and ends. It judges the product only from outside: HTTP, metrics, admin.

mod check;
mod control_plane;
mod conversation;
mod exchange;
mod fleet;
mod live;
mod outage;
mod policy;
mod process;
mod report;
mod reuse;
mod samples;

use clap::Parser;
use std::{ffi::OsString, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};

/// Two simulated engines, a proxy beside each, and a control plane. What to try is printed; Ctrl-C ends everything.
#[derive(Debug, Parser)]
#[command(name = "outrigger-demo", version)]
struct Flags {
    /// Run a scripted conversation mix, change the policy, kill an engine, print a JSON report as the last line; exit 1 if an expectation fails
    #[arg(long)]
    check: bool,
    /// Send nothing of our own, only show what happens
    #[arg(long, conflicts_with = "check")]
    no_traffic: bool,
    /// Seeds everything that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the demo. `arguments` begin with the program's name. Exit codes: 0 ended well, 1 could not start or an
/// expectation failed, 2 the command line is wrong.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let flags = match Flags::try_parse_from(arguments) {
        Ok(flags) => flags,
        Err(error) => {
            // Help and version come this way too.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // A second subscriber is nobody's business here: the demo is the whole process.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .try_init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run_until_told(&flags)));
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("outrigger-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if all went well.
async fn run_until_told(flags: &Flags) -> anyhow::Result<bool> {
    let (mut interrupt, mut terminate) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    let told = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    if !flags.check {
        return live::run(!flags.no_traffic, flags.seed, told)
            .await
            .map(|()| true);
    }
    tokio::select! {
        passed = check::run(flags.seed) => Ok(passed),
        () = told => anyhow::bail!("told to end before the check was done"),
    }
}
