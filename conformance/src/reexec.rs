//! One binary that is also a proxy, an engine, an agent or a control plane: whoever needs real processes (kill -9 must be real) starts
//! itself again with another first argument.

use std::{ffi::OsString, process::ExitCode};

/// In the environment of a part whose starter holds the other end of its standard input: the part ends when that end
/// closes, so it never outlives its starter, however that ended. Opt-in, since many a standard input is at its end.
pub const ENDS_WITH_STDIN: &str = "OUTRIGGER_ENDS_WITH_STDIN";

/// Runs the part that the first argument names: `proxy`, `engine`, `agent` or `control-plane`, with the arguments after it. `None` if
/// it names none of them, and the caller's own work begins.
#[must_use]
pub fn dispatch() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    let program = arguments.next()?;
    let part = arguments.next()?;
    let rest = || -> Vec<OsString> { std::iter::once(program).chain(arguments).collect() };
    let part = part.to_str().unwrap_or_default();
    let is_part = matches!(part, "proxy" | "engine" | "agent" | "control-plane");
    if is_part && std::env::var_os(ENDS_WITH_STDIN).is_some() {
        std::thread::spawn(end_with_stdin);
    }
    match part {
        "proxy" => Some(outrigger_proxy::run(rest())),
        "engine" => Some(crate::sim::run(rest())),
        "agent" => Some(agent(rest())),
        "control-plane" => Some(outrigger_control_plane::run(rest())),
        _ => None,
    }
}

fn end_with_stdin() {
    // Whatever comes is of no interest, and an error is an end too.
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    std::process::exit(0);
}

fn agent(arguments: Vec<OsString>) -> ExitCode {
    use clap::Parser;
    let args = match outrigger_gpu_agent::run::Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(error) => {
            // Help and version come this way too.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    // Best effort: a program that runs this as a part of itself may have its own subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
    let run = || tokio::runtime::Runtime::new()?.block_on(outrigger_gpu_agent::run::run(args));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
