//! Sources of configuration, checked.
//!
//! What it answers today: is a bootstrap file good, and if not, what exactly is wrong with it ([`validate`]). Serving
//! resources to proxies over ADS, and reading them from Kubernetes, come later; nothing here pretends to.

use anyhow::Context;
use clap::{Parser, Subcommand};
use outrigger_xds::load::{self, Syntax};
use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "outrigger-control-plane",
    version,
    about = "Checks configuration for Outrigger proxies"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reads bootstrap files (YAML, or JSON if the name ends in .json) and prints everything that is wrong with them.
    Validate {
        /// Bootstrap files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

/// What was found in some files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// One entry per file, in the order given.
    pub files: Vec<FileReport>,
}

/// What was found in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReport {
    /// Which file.
    pub path: PathBuf,
    /// Everything that is wrong with it, each with its place; empty if it is good.
    pub problems: Vec<String>,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.files.iter().all(|file| file.problems.is_empty())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for FileReport { path, problems } in &self.files {
            if problems.is_empty() {
                writeln!(f, "{}: OK", path.display())?;
            }
            for problem in problems {
                writeln!(f, "{}: {problem}", path.display())?;
            }
        }
        Ok(())
    }
}

/// Reads bootstrap files and says what is wrong with each.
#[must_use]
pub fn validate(paths: &[PathBuf]) -> Report {
    let file = |path: &PathBuf| FileReport {
        path: path.clone(),
        problems: problems(path),
    };
    Report {
        files: paths.iter().map(file).collect(),
    }
}

fn problems(path: &Path) -> Vec<String> {
    let text = match fs::read_to_string(path).context("cannot be read") {
        Ok(text) => text,
        Err(error) => return vec![format!("{error:#}")],
    };
    let json = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    match load::bootstrap(&text, if json { Syntax::Json } else { Syntax::Yaml }) {
        Ok(_) => Vec::new(),
        Err(errors) => errors.problems().iter().map(ToString::to_string).collect(),
    }
}

/// Does what the command line asks for: exit code 0 if all is well, 1 if a file is not good.
#[must_use]
pub fn run() -> ExitCode {
    let Cli {
        command: Command::Validate { files },
    } = Cli::parse();
    let report = validate(&files);
    print!("{report}");
    if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
