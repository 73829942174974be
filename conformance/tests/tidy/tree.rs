//! The files of the checkout, and what may never stand in one.

use crate::{report, root};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Directories that are not ours: build output, version control, recordings of engines (they say what they say).
const SKIPPED: &[&str] = &["target", ".git", "fixtures", "node_modules", "book"];

/// All files below `dir`, sorted.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let path = entry.expect("a directory entry").path();
            let name = path
                .file_name()
                .expect("an entry has a name")
                .to_string_lossy()
                .into_owned();
            // In a worktree of git, `.git` is a file that names a place outside.
            let skipped = SKIPPED.contains(&name.as_str());
            match path.is_dir() {
                true if !skipped => waiting.push(path),
                false if name != ".git" => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// As a reader of the list would write it.
pub(crate) fn shown(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned()
}

/// Our own sources: members of the workspace, tests included.
pub(crate) fn rust_files() -> Vec<PathBuf> {
    let members = [
        "proxy",
        "xds",
        "filters",
        "control-plane",
        "gpu-agent",
        "conformance",
    ];
    let files = members
        .iter()
        .flat_map(|member| files_below(&root().join(member)));
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

#[test]
fn nothing_reads_outside_the_tree() {
    // Put together here, so that this file does not hold what it looks for.
    let never = [
        ["..", "/shared"].concat(),
        ["/wo", "rk/"].concat(),
        ["/ho", "me/"].concat(),
        ["/ro", "ot/"].concat(),
        ["/Use", "rs/"].concat(),
    ];
    let mut violations = Vec::new();
    for path in files_below(&root()) {
        // What is no text has no paths in it.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for (index, line) in text.lines().enumerate() {
            for wanted in &never {
                // `framework/` and `x/work/` are no absolute paths.
                let at = line.match_indices(wanted.as_str()).find(|(at, _)| {
                    wanted.starts_with('.')
                        || !line[..*at].ends_with(|before: char| {
                            before.is_alphanumeric() || "_-./}".contains(before)
                        })
                });
                if at.is_some() {
                    violations.push(format!("{}:{}: names {wanted}", shown(&path), index + 1));
                }
            }
        }
    }
    report(violations);
}

#[test]
fn stages_are_executables() {
    use std::os::unix::fs::PermissionsExt;
    let mut violations = Vec::new();
    let mut stages = 0;
    let conformance = root().join("conformance");
    let runs = fs::read_dir(&conformance)
        .expect("conformance")
        .map(|entry| entry.expect("entry").path().join("run"));
    for run in runs
        .filter(|run| run.is_file())
        .chain([root().join(".ci/run")])
    {
        stages += 1;
        let mode = fs::metadata(&run).expect("metadata").permissions().mode();
        if mode & 0o111 == 0 {
            violations.push(format!("{}: is not executable", shown(&run)));
        }
        if !fs::read_to_string(&run)
            .expect("a script")
            .starts_with("#!")
        {
            violations.push(format!("{}:1: says no interpreter", shown(&run)));
        }
    }
    assert!(stages > 1, "no stage was found");
    report(violations);
}
