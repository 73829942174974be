//! What is wrong with files: bootstraps, each by itself; short resources, and directories of Envoy's resources, as a whole.

use crate::{
    catalog::Catalog,
    issued,
    rollout::seen::Observed,
    short::Problems,
    source::files,
    translate::{self, input},
    versions::Versions,
};
use anyhow::Context;
use outrigger_xds::load;
use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

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
/// whole, others each by itself, as bootstraps; a directory in which Envoy's resources stand is looked at as if it were to be served.
#[must_use]
pub fn validate(paths: &[PathBuf]) -> Report {
    let is_served = |path: &&PathBuf| path.is_dir() && files::holds_resources(path);
    let (served, others): (Vec<&PathBuf>, Vec<&PathBuf>) = paths.iter().partition(is_served);
    let others: Vec<PathBuf> = others.into_iter().cloned().collect();
    let mut report = apart_or_short(&others);
    report
        .files
        .extend(served.into_iter().flat_map(|path| of_directory(path)));
    report
}

/// As if it were to be served: problems by where they are.
fn of_directory(path: &Path) -> Vec<FileReport> {
    const SOURCE: &str = "directory";
    let versions = Versions::in_memory().issuing(true);
    let catalog = Catalog::with([SOURCE], versions, Observed::default());
    catalog.take(SOURCE, files::load(path));
    let status = catalog.status().remove(SOURCE).unwrap_or_default();
    let report = |path: &Path, problems: Vec<String>| FileReport {
        path: path.to_owned(),
        problems,
    };
    if status.problems.is_empty() {
        return vec![report(path, Vec::new())];
    }
    let problems = status.problems.into_iter();
    problems
        .map(|problem| report(Path::new(&problem.origin), vec![problem.message]))
        .collect()
}

fn apart_or_short(paths: &[PathBuf]) -> Report {
    let files = match input::expand(paths) {
        Ok(files) => files,
        Err(problems) => {
            return Report {
                files: by_file(&problems, &[]),
            };
        }
    };
    let input = input::read(&files);
    let secrets = input.secrets.keys().cloned();
    let secrets = secrets.chain(issued::names()).collect();
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
