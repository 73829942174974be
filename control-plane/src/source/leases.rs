//! The engines that registered, as a source: they appear, drain and vanish by lease.
//!
//! What is served was written to disk before, as a whole or not at all. So a control plane that starts again knows who held a
//! lease, and gives each a whole one to come back in.

use super::{Content, News, Problem, Source};
use crate::registry::{Registry, table::Table};
use anyhow::Context;
use outrigger_xds::registry;
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, time::sleep};

/// What changes within that time is taken as one.
const GATHER: Duration = Duration::from_millis(50);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Its name among the sources.
pub const NAME: &str = "leases";

/// The leases of a registry.
#[derive(Debug)]
pub struct Leases {
    registry: Arc<Registry>,
    path: PathBuf,
    news: watch::Receiver<u64>,
    is_first: bool,
    /// Why the last write failed: what is not on disk is not served.
    failed: Option<String>,
}

/// The leases in a file; of none if it does not exist, as at the first start.
///
/// # Errors
/// It cannot be read. To go on without would take away what is in it.
pub fn load(path: &Path, length: Duration) -> anyhow::Result<Table> {
    let told = || format!("--leases {}", path.display());
    let kept = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(told),
        Ok(text) => {
            let value = serde_json::from_str(&text).with_context(told)?;
            registry::kept_from_json(&value).with_context(told)?
        }
    };
    Ok(Table::new(length, kept, Instant::now()))
}

impl Leases {
    /// Of this registry, kept in this file.
    #[must_use]
    pub fn new(registry: Arc<Registry>, path: PathBuf) -> Self {
        Self {
            news: registry.subscribe(),
            registry,
            path,
            is_first: true,
            failed: None,
        }
    }

    /// Until there is something else to serve, or to write again.
    async fn change(&mut self) {
        if std::mem::take(&mut self.is_first) {
            return;
        }
        if self.failed.is_some() {
            return sleep(RETRY).await;
        }
        // The registry lives as long as we do.
        let _ = self.news.changed().await;
        sleep(GATHER).await;
    }

    /// What is registered, when it is on disk.
    async fn taken(&mut self) -> Result<Content, String> {
        let content = {
            let table = self.registry.table();
            self.news.borrow_and_update();
            let leases = table.leases().values();
            let nodes = leases.map(|lease| (lease.registration.clone(), lease.length));
            nodes.collect::<Vec<_>>()
        };
        let path = self.path.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let leases = content.iter().map(|(said, length)| (said, *length));
            let text = registry::kept_to_json(leases).to_string();
            let nodes = content.into_iter().map(|(said, _)| said).collect();
            write(&path, &text).map(|()| nodes)
        });
        let written = writing.await.map_err(|error| error.to_string())?;
        let nodes = written.map_err(|error| format!("cannot be written: {error}"))?;
        Ok(Content {
            nodes,
            ..Content::default()
        })
    }
}

/// As a whole or not at all, and there after a crash.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let half = PathBuf::from(name);
    let mut file = File::create(&half)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&half, path)?;
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[tonic::async_trait]
impl Source for Leases {
    fn name(&self) -> &str {
        NAME
    }

    async fn next(&mut self) -> News {
        loop {
            self.change().await;
            match self.taken().await {
                Ok(content) => {
                    self.failed = None;
                    return Ok(content);
                }
                Err(message) if self.failed.as_ref() == Some(&message) => {}
                Err(message) => {
                    self.failed = Some(message.clone());
                    let origin = self.path.display().to_string();
                    return Err(vec![Problem { origin, message }]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::registry::{Node, Registration, address};

    const LENGTH: Duration = Duration::from_secs(30);

    fn said(id: &str) -> Registration {
        Registration {
            node: Node {
                id: id.into(),
                address: address(&format!("{id}:1")).unwrap(),
                ..Node::default()
            },
            ..Registration::default()
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let directory =
            std::env::temp_dir().join(format!("outrigger-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn held(table: &Table) -> Vec<&str> {
        table.leases().keys().map(String::as_str).collect()
    }

    #[tokio::test]
    async fn what_is_served_is_on_disk_and_what_cannot_be_written_is_not_served() {
        let directory = scratch("leases");
        let path = directory.join("sub/leases.json");
        let registry = Registry::new(load(&path, LENGTH).unwrap());
        let mut source = Leases::new(registry.clone(), path.clone());
        registry
            .table()
            .hear(said("a"), "", Instant::now())
            .unwrap();
        // There is no such directory.
        let problems = source.next().await.unwrap_err();
        assert!(problems[0].message.contains("cannot be written"));
        fs::create_dir(directory.join("sub")).unwrap();
        let content = source.next().await.unwrap();
        assert_eq!(content.nodes, [said("a")]);
        assert_eq!(held(&load(&path, LENGTH).unwrap()), ["a"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_read_is_no_first_start() {
        let directory = scratch("leases-bad");
        let path = directory.join("leases.json");
        assert!(held(&load(&path, LENGTH).unwrap()).is_empty());
        for bad in ["", "{", "[]", r#"{"leases": [{"length": "30s"}]}"#] {
            fs::write(&path, bad).unwrap();
            let error = format!("{:#}", load(&path, LENGTH).unwrap_err());
            assert!(error.contains("leases.json"), "{error}");
        }
        fs::remove_dir_all(directory).unwrap();
    }
}
