//! Files that are watched: which of them hold something else than when we last looked.
//!
//! Every look asks the system for what stands behind each path, symbolic links followed, so an atomic rename, a
//! ConfigMap's swap of links and a write in place are all seen. What was replaced whole is taken at once; what is written in
//! place only when it was left alone for one look, since half of it may be there.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt,
};

/// What tells one content of a path from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &str) -> Option<Self> {
        let facts = std::fs::metadata(path).ok()?;
        Some(Self {
            file: (facts.dev(), facts.ino()),
            size: facts.size(),
            modified: (facts.mtime(), facts.mtime_nsec()),
            changed: (facts.ctime(), facts.ctime_nsec()),
        })
    }
}

#[derive(Debug)]
struct Seen {
    taken: Option<Stamp>,
    /// Written in place, and perhaps still being written.
    restless: Option<Stamp>,
}

/// The watched files.
#[derive(Debug, Default)]
pub(super) struct Files(BTreeMap<String, Seen>);

impl Files {
    /// Looks at exactly these paths; gives those that are new here or hold something else. One that is gone keeps
    /// what it held.
    pub(super) fn look(&mut self, paths: &BTreeSet<String>) -> Vec<String> {
        self.0.retain(|path, _| paths.contains(path));
        let mut news = Vec::new();
        for path in paths {
            let now = Stamp::of(path);
            let Some(seen) = self.0.get_mut(path) else {
                let seen = Seen {
                    taken: now,
                    restless: None,
                };
                self.0.insert(path.clone(), seen);
                news.push(path.clone());
                continue;
            };
            if now.is_none() || now == seen.taken {
                seen.restless = None;
                continue;
            }
            let replaced = now.map(|now| now.file) != seen.taken.map(|taken| taken.file);
            if replaced || seen.restless == now {
                seen.taken = now;
                seen.restless = None;
                news.push(path.clone());
            } else {
                seen.restless = now;
            }
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink, path::PathBuf};

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("outrigger-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn path(&self, name: &str) -> String {
            self.0.join(name).to_str().unwrap().to_owned()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_new_once_and_a_rename_is_seen_at_once() {
        let scratch = Scratch::new("rename");
        let path = scratch.path("a");
        let watched = BTreeSet::from([path.clone()]);
        let mut files = Files::default();
        fs::write(&path, "1").unwrap();
        assert_eq!(files.look(&watched), std::slice::from_ref(&path));
        assert!(files.look(&watched).is_empty());
        fs::write(scratch.path("b"), "2").unwrap();
        fs::rename(scratch.path("b"), &path).unwrap();
        assert_eq!(files.look(&watched), std::slice::from_ref(&path));
        assert!(files.look(&watched).is_empty());
        fs::remove_file(&path).unwrap();
        assert!(files.look(&watched).is_empty(), "what is gone is no news");
        fs::write(&path, "3").unwrap();
        files.look(&watched);
        assert!(files.look(&BTreeSet::new()).is_empty());
        assert_eq!(files.look(&watched), [path], "new again");
    }

    #[test]
    fn a_write_in_place_is_taken_when_it_was_left_alone() {
        let scratch = Scratch::new("in-place");
        let path = scratch.path("a");
        let watched = BTreeSet::from([path.clone()]);
        let mut files = Files::default();
        fs::write(&path, "1").unwrap();
        files.look(&watched);
        fs::write(&path, "22").unwrap();
        assert!(files.look(&watched).is_empty(), "just written");
        fs::write(&path, "333").unwrap();
        assert!(files.look(&watched).is_empty(), "and again");
        assert_eq!(files.look(&watched), [path]);
        assert!(files.look(&watched).is_empty());
    }

    #[test]
    fn a_swap_of_links_is_seen_at_once() {
        let scratch = Scratch::new("links");
        for version in ["v1", "v2"] {
            fs::create_dir_all(scratch.path(version)).unwrap();
            fs::write(scratch.path(&format!("{version}/a")), version).unwrap();
        }
        symlink("v1", scratch.path("..data")).unwrap();
        symlink("..data/a", scratch.path("a")).unwrap();
        let path = scratch.path("a");
        let watched = BTreeSet::from([path.clone()]);
        let mut files = Files::default();
        files.look(&watched);
        symlink("v2", scratch.path("..tmp")).unwrap();
        fs::rename(scratch.path("..tmp"), scratch.path("..data")).unwrap();
        assert_eq!(files.look(&watched), [path]);
    }
}
