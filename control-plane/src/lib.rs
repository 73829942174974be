//! Sources of configuration, checked.
//!
//! What it answers today: is a bootstrap file good, and if not, what exactly is wrong with it ([`validate`]); the same of
//! [`short`] resources, and what they become ([`translate`]). Serving resources to proxies over ADS, and reading them from
//! Kubernetes, come later; nothing here pretends to.

pub mod short;
pub mod translate;

use anyhow::Context;
use clap::{Parser, Subcommand};
use outrigger_xds::load;
use short::Problems;
use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};
use translate::{input, output};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "outrigger-control-plane",
    version,
    about = "Checks configuration for Outrigger proxies, and makes it of short resources"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reads bootstrap files and short resources (YAML, or JSON if the name ends in .json) and prints everything that is wrong
    /// with them.
    Validate {
        /// Files, and directories of them.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Prints the Envoy resources that short resources become.
    Translate(Translate),
    /// Prints the JSON schema of short resources.
    Schema,
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

/// Reads files and says what is wrong with each; of directories, with all files in them. Short resources are looked at as a
/// whole, others each by itself, as bootstraps.
#[must_use]
pub fn validate(paths: &[PathBuf]) -> Report {
    let files = match input::expand(paths) {
        Ok(files) => files,
        Err(problems) => {
            return Report {
                files: by_file(&problems, &[]),
            };
        }
    };
    let input = input::read(&files);
    let secrets = input.secrets.keys().cloned().collect();
    let mut problems = input.problems;
    // What is wrong as a whole can be said when each document is good.
    if problems.0.is_empty()
        && let Err(found) = translate::translate(&input.documents, &secrets)
    {
        problems = found;
    }
    let mut reports = by_file(&problems, &files);
    for report in &mut reports {
        if input.others.contains(&report.path) {
            report.problems.extend(bootstrap_problems(&report.path));
        }
    }
    Report { files: reports }
}

/// Problems of each file; of those that nobody asked about, too.
fn by_file(problems: &Problems, files: &[PathBuf]) -> Vec<FileReport> {
    let mut reports: Vec<FileReport> = Vec::new();
    let place = |reports: &mut Vec<FileReport>, path: &Path| {
        let known = reports.iter().position(|report| report.path == path);
        known.unwrap_or_else(|| {
            reports.push(FileReport {
                path: path.to_owned(),
                problems: Vec::new(),
            });
            reports.len() - 1
        })
    };
    for path in files {
        place(&mut reports, path);
    }
    for problem in &problems.0 {
        let index = place(&mut reports, Path::new(&problem.origin.file));
        reports[index].problems.push(problem.to_string());
    }
    reports
}

fn bootstrap_problems(path: &Path) -> Vec<String> {
    let text = match fs::read_to_string(path).context("cannot be read") {
        Ok(text) => text,
        Err(error) => return vec![format!("{error:#}")],
    };
    match load::bootstrap(&text, input::syntax(path)) {
        Ok(_) => Vec::new(),
        Err(errors) => errors.problems().iter().map(ToString::to_string).collect(),
    }
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
        let secrets: BTreeSet<String> = input.secrets.keys().cloned().collect();
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

/// Does what the command line asks for: exit code 0 if all is well, 1 if a file is not good.
#[must_use]
pub fn run() -> ExitCode {
    let (printed, is_good) = match Cli::parse().command {
        Command::Validate { files } => {
            let report = validate(&files);
            (report.to_string(), report.is_good())
        }
        Command::Translate(translate) => match translate.run() {
            Ok(text) => (text, true),
            Err(error) => {
                eprintln!("{error:#}");
                (String::new(), false)
            }
        },
        Command::Schema => (short::SCHEMA.to_owned(), true),
    };
    print!("{printed}");
    if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
