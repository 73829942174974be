//! The control plane: sources of configuration, checked as a whole, and served to proxies as Envoy v3 resources over xDS.
//!
//! `source` reads, `catalog` judges and keeps the last good state, `session` knows what a client has and lacks, `ads` carries it over gRPC;
//! `status` and `admin` tell who has what. Engines register at `registry`, which is a source, too. What [`short`] resources become ([`translate`]) depends on the proxy that asks: `views` has what each is sent.
//! Who asks is looked at in `tls` and `identity`; `ca` vouches for nodes, and `issued` is what each is sent of it.
//! It never knows a proxy of ours from inside: all that passes is Envoy's API.

pub mod admin;
pub mod ads;
pub mod ca;
pub mod catalog;
pub mod clients;
pub mod diff;
pub mod figures;
pub mod foreign;
mod grpc;
pub mod identity;
pub mod issued;
pub mod lrs;
pub mod operate;
pub mod references;
pub mod registered;
pub mod registry;
pub mod rollout;
pub mod serve;
pub mod session;
pub mod short;
pub mod snapshot;
pub mod source;
pub mod status;
pub mod store;
pub mod tls;
pub mod translate;
pub mod validate;
pub mod versions;
pub mod views;

use anyhow::Context;
use clap::{Parser, Subcommand};
use std::{collections::BTreeSet, ffi::OsString, path::PathBuf, process::ExitCode};
use translate::{input, output};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "outrigger-control-plane",
    version,
    about = "Checks configuration for proxies, makes it of short resources, and serves it"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the short resources and the Envoy resources in a directory over xDS, and follows what changes there.
    Serve(Box<serve::Options>),
    /// Reads bootstrap files, short resources and directories of Envoy resources (YAML, or JSON if the name ends in .json) and prints everything that is wrong
    /// with them.
    Validate {
        /// Files, and directories of them.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Prints the Envoy resources that short resources become.
    Translate(Translate),
    /// Prints the versions that a control plane has, the newest first.
    Versions(operate::Running),
    /// Prints what is different between two versions of a control plane, or what a directory would change there, and for how many nodes.
    Diff(operate::Diff),
    /// Makes a control plane serve a version again, to all, until what is in its directory changes.
    Rollback(operate::Rollback),
    /// Ends a rollback: a control plane serves what is in its directory again.
    Resume(operate::Running),
    /// Prints the JSON schema of short resources.
    Schema,
    /// The built-in CA: makes one, and issues certificates from it.
    #[command(subcommand)]
    Ca(ca::Command),
}

/// `translate`.
#[derive(Debug, clap::Args)]
struct Translate {
    /// Files with short resources and the secrets that they name, and directories of them.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The proxy that they are for; without it, one that no engine stands beside
    #[arg(long, value_name = "ID")]
    node: Option<String>,
    /// How they are written
    #[arg(long, value_enum, default_value_t = output::Format::Yaml)]
    format: output::Format,
    /// Directory to write them to, a file for each type, as a proxy reads them
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Translate {
    /// What is to be printed.
    fn run(&self) -> Result<String, anyhow::Error> {
        let files = input::expand(&self.files)?;
        let input = input::read(&files);
        for path in &input.others {
            eprintln!("{}: no short resource, passed over", path.display());
        }
        if !input.problems.0.is_empty() {
            return Err(input.problems.into());
        }
        let secrets = input.secrets.keys().cloned();
        let secrets: BTreeSet<String> = secrets.chain(issued::names()).collect();
        let resources = translate::translate(&input.documents, &secrets)?;
        let chosen = translate::for_node(&resources, self.node.as_deref());
        let Some(directory) = &self.out else {
            return Ok(output::print(&chosen, self.format));
        };
        let written = output::write(&chosen, &input.secrets, directory, self.format)
            .with_context(|| format!("{}: cannot be written", directory.display()))?;
        let lines = written.iter().map(|path| format!("{}\n", path.display()));
        Ok(lines.collect())
    }
}

/// What is to be printed, and whether all is well.
fn printed(text: anyhow::Result<String>) -> (String, bool) {
    match text {
        Ok(text) => (text, true),
        Err(error) => {
            eprintln!("{error:#}");
            (String::new(), false)
        }
    }
}

/// Does what the command line asks for: exit code 0 if all is well, 1 if a file is not good or it cannot serve, 2 if the command line is wrong.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let (printed, is_good) = match cli.command {
        Command::Serve(options) => match serve::run(&options) {
            Ok(()) => (String::new(), true),
            Err(error) => {
                eprintln!("outrigger-control-plane: {error:#}");
                (String::new(), false)
            }
        },
        Command::Validate { files } => {
            let report = validate::validate(&files);
            (report.to_string(), report.is_good())
        }
        Command::Translate(translate) => printed(translate.run()),
        Command::Versions(running) => printed(running.versions()),
        Command::Diff(diff) => printed(diff.run()),
        Command::Rollback(rollback) => printed(rollback.run()),
        Command::Resume(running) => printed(running.resume()),
        Command::Schema => (short::SCHEMA.to_owned(), true),
        Command::Ca(command) => match command.run() {
            Ok(text) => (text, true),
            Err(error) => {
                eprintln!("outrigger-control-plane: {error:#}");
                (String::new(), false)
            }
        },
    };
    print!("{printed}");
    if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
