//! The engines that registered, as a source: they appear, drain and vanish by lease.
//!
//! What is served was written to disk before, as a whole or not at all. So a control plane that starts again knows who held a
//! lease, and gives each a whole one to come back in.

use super::{Content, News, Problem, Source};
use crate::registry::{Registry, table::Table};
use anyhow::Context;
use outrigger_xds::registry::{self, Holder, Registration};
use std::{
    collections::BTreeMap,
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

/// Registrations, and for how long each counts.
type Said = BTreeMap<Holder, (Registration, Duration)>;

/// The leases of a registry.
#[derive(Debug)]
pub struct Leases {
    registry: Arc<Registry>,
    path: PathBuf,
    news: watch::Receiver<u64>,
    /// As far as we know.
    on_disk: Said,
    /// What was told last; nothing was before the first time.
    told: Option<Vec<Registration>>,
    /// Whether it was tried to write at all.
    was_tried: bool,
    /// Why the last write failed.
    failed: Option<String>,
    /// To be told next: what is told after it, as far as it goes, would hide it.
    problem: Option<Problem>,
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
    /// Of this registry, kept in this file; what it has now is what was loaded from there.
    #[must_use]
    pub fn new(registry: Arc<Registry>, path: PathBuf) -> Self {
        Self {
            news: registry.subscribe(),
            on_disk: said(&registry),
            registry,
            path,
            told: None,
            was_tried: false,
            failed: None,
            problem: None,
        }
    }

    /// Until there is something else to serve, or to write again.
    async fn change(&mut self) {
        // A disk that takes nothing is told of before somebody registers.
        if !std::mem::replace(&mut self.was_tried, true) {
            return;
        }
        let again = async {
            match self.failed {
                Some(_) => sleep(RETRY).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // The registry lives as long as we do.
            _ = self.news.changed() => sleep(GATHER).await,
            () = again => {}
        }
    }

    /// Writes what is registered, and gives it, as far as it may be served.
    async fn keep(&mut self) -> Vec<Registration> {
        self.news.borrow_and_update();
        let now = said(&self.registry);
        let leases = now.values().map(|(said, length)| (said, *length));
        let text = registry::kept_to_json(leases).to_string();
        let path = self.path.clone();
        let writing = tokio::task::spawn_blocking(move || write(&path, &text));
        let written = writing.await.map_err(|error| error.to_string());
        match written.and_then(|it| it.map_err(|error| error.to_string())) {
            Ok(()) => {
                self.failed = None;
                self.on_disk = now;
                all(&self.on_disk)
            }
            Err(error) => {
                self.failed = Some(format!("cannot be written: {error}"));
                let nodes = now.into_values();
                nodes
                    .filter_map(|(said, _)| known(said, &self.on_disk))
                    .collect()
            }
        }
    }
}

fn said(registry: &Registry) -> Said {
    let table = registry.table();
    let leases = table.leases().iter();
    leases
        .map(|(id, lease)| (id.clone(), (lease.registration.clone(), lease.length)))
        .collect()
}

fn all(said: &Said) -> Vec<Registration> {
    said.values().map(|(said, _)| said.clone()).collect()
}

/// What a restart would not take away: engines that are on disk, as they are now.
fn known(mut said: Registration, on_disk: &Said) -> Option<Registration> {
    let (before, _) = on_disk.get(&said.holder())?;
    if before.node.address != said.node.address {
        return None;
    }
    said.engines.retain(|engine| {
        let mut known = before.engines.iter();
        known.any(|it| (&it.id, &it.address) == (&engine.id, &engine.address))
    });
    Some(said)
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
        // Whatever becomes of the disk, who held a lease is there.
        if self.told.is_none() {
            return Ok(content(self.told.insert(all(&self.on_disk))));
        }
        loop {
            if let Some(problem) = self.problem.take() {
                return Err(vec![problem]);
            }
            self.change().await;
            let failed = self.failed.take();
            let nodes = self.keep().await;
            let is_news = self.told.as_ref() != Some(&nodes);
            if self.failed.is_some() && (is_news || self.failed != failed) {
                self.problem = self.failed.clone().map(|message| Problem {
                    origin: self.path.display().to_string(),
                    message,
                });
            }
            // What is well again is told, too.
            if is_news || (failed.is_some() && self.failed.is_none()) {
                return Ok(content(self.told.insert(nodes)));
            }
        }
    }
}

fn content(nodes: &[Registration]) -> Content {
    Content {
        nodes: nodes.to_vec(),
        ..Content::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::{
        registry::{Node, address},
        report::{EngineState, Health},
    };

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
        table.leases().keys().map(|it| &*it.id).collect()
    }

    /// With an engine, that drains or not.
    fn with_engine(id: &str, health: Health) -> Registration {
        let engine = registry::Engine {
            id: format!("{id}/e"),
            address: address("127.0.0.1:8000").unwrap(),
            state: EngineState {
                health,
                ..EngineState::default()
            },
        };
        Registration {
            engines: vec![engine],
            ..said(id)
        }
    }

    async fn nodes(source: &mut Leases) -> Vec<Registration> {
        source.next().await.unwrap().nodes
    }

    async fn problem(source: &mut Leases) -> String {
        source.next().await.unwrap_err()[0].message.clone()
    }

    #[tokio::test]
    async fn what_is_served_is_on_disk_and_what_cannot_be_written_is_not_served() {
        let directory = scratch("leases");
        let path = directory.join("sub/leases.json");
        let registry = Registry::new(load(&path, LENGTH).unwrap());
        let mut source = Leases::new(registry.clone(), path.clone());
        registry.hear(said("a"), "").unwrap();
        assert_eq!(nodes(&mut source).await, []);
        // There is no such directory.
        assert!(problem(&mut source).await.contains("cannot be written"));
        fs::create_dir(directory.join("sub")).unwrap();
        assert_eq!(nodes(&mut source).await, [said("a")]);
        assert_eq!(held(&load(&path, LENGTH).unwrap()), ["a"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_holds_up_only_who_comes() {
        let directory = scratch("leases-full");
        let path = directory.join("leases.json");
        let [a, b] = ["a", "b"].map(|id| with_engine(id, Health::Healthy));
        let text = registry::kept_to_json([(&a, LENGTH), (&b, LENGTH)]).to_string();
        write(&path, &text).unwrap();
        // Nobody can write there, not even root.
        let half = directory.join("leases.json.part");
        fs::create_dir(&half).unwrap();
        let registry = Registry::new(load(&path, LENGTH).unwrap());
        let mut source = Leases::new(registry.clone(), path.clone());
        assert_eq!(nodes(&mut source).await, [a.clone(), b.clone()]);
        assert!(problem(&mut source).await.contains("cannot be written"));
        let mut draining = with_engine("a", Health::Draining);
        let mut more = draining.clone();
        more.engines.push(registry::Engine {
            id: "a/more".into(),
            address: address("127.0.0.1:8001").unwrap(),
            ..registry::Engine::default()
        });
        let leaving = Registration { leaving: true, ..b };
        for said in [more.clone(), leaving, said("c")] {
            registry.hear(said, "").unwrap();
        }
        assert_eq!(nodes(&mut source).await, [draining.clone()]);
        assert!(problem(&mut source).await.contains("cannot be written"));
        draining.node.zone = "z".into();
        more.node.zone = "z".into();
        registry.hear(more.clone(), "").unwrap();
        assert_eq!(nodes(&mut source).await, [draining]);
        fs::remove_dir(&half).unwrap();
        assert!(problem(&mut source).await.contains("cannot be written"));
        assert_eq!(nodes(&mut source).await, [more, said("c")]);
        assert_eq!(held(&load(&path, LENGTH).unwrap()), ["a", "c"]);
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
