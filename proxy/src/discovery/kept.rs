//! What the control plane brought last, kept in a file: a proxy that starts serves by it before any server answers.
//!
//! What begins so is checked like everything that comes. The control plane is told the names and no versions, so it
//! sends all of it anew, and says what is gone. What lives only for a time, secrets, what has a private key inline, and
//! what came by a service of one type, are not kept.

use super::{Discovery, model::Kind};
use outrigger_xds::{
    accepted::Accepted,
    load::{
        discovery::{Resource, Response, Unread},
        kept::{self, KEPT_BYTES_MAX, Kept, KeptResources},
    },
    resource::{
        config_source::{ConfigSource, Origin},
        tls::is_redacted,
    },
    subscription::Subscriptions,
};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// The file's name in its directory.
const NAME: &str = "control-plane.config";

/// Counts what became of the file.
fn count(event: &'static str) {
    metrics::counter!("outrigger_config_cache_total", "event" => event).increment(1);
}

/// What is kept in a directory for a node, if anything is. What cannot be used is told and left alone.
#[must_use]
pub fn load(directory: &Path, node: &str) -> Option<Kept> {
    let path = directory.join(NAME);
    let read = read(&path).and_then(|bytes| match bytes {
        None => Ok(None),
        Some(bytes) => kept::decode(&bytes).map(Some),
    });
    let path = path.display();
    match read {
        Ok(None) => None,
        Ok(Some(kept)) if kept.node == node => Some(kept),
        Ok(Some(kept)) => {
            tracing::warn!(%path, node = kept.node, "kept configuration is of another node, ignored");
            count("ignored");
            None
        }
        Err(error) => {
            tracing::warn!(%path, error, "kept configuration cannot be used, ignored");
            count("ignored");
            None
        }
    }
}

/// The file's bytes; none if there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut bytes = Vec::new();
    let mut bounded = file.take(KEPT_BYTES_MAX as u64 + 1);
    bounded
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    if bytes.len() > KEPT_BYTES_MAX {
        return Err(format!("has more than {KEPT_BYTES_MAX} bytes"));
    }
    Ok(Some(bytes))
}

/// Keeps it: whole or not at all, whatever happens meanwhile. Whether it is.
pub fn store(directory: &Path, kept: &Kept) -> bool {
    match write(directory, &kept::encode(kept)) {
        Ok(()) => {
            count("written");
            true
        }
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "configuration cannot be kept");
            count("failed");
            false
        }
    }
}

fn write(directory: &Path, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() > KEPT_BYTES_MAX {
        return Err(io::Error::other(format!(
            "it has more than {KEPT_BYTES_MAX} bytes"
        )));
    }
    fs::create_dir_all(directory)?;
    let half = directory.join(format!("{NAME}.part"));
    // Whatever is there by that name is not written to: a link may lead anywhere, a file be open to others.
    match fs::remove_file(&half) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&half)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&half, directory.join(NAME))?;
    // The name must survive as well.
    File::open(directory)?.sync_all()
}

/// What is good of one type, as far as it lives for ever.
fn good<R: Resource + PartialEq>(
    accepted: &Accepted<R>,
    kind: Kind,
    ads: &Subscriptions,
) -> KeptResources {
    let lasting = accepted
        .states()
        .filter(|(name, _)| !ads.is_mortal(kind, name));
    let each = lasting.filter_map(|(name, state)| {
        let good = state.good.as_ref()?;
        let resource = good.resource.to_json();
        if is_redacted(&resource) {
            tracing::warn!(?kind, name, "has a private key inline, is not kept");
            count("left_out");
            return None;
        }
        Some((name.to_owned(), good.version.clone(), resource))
    });
    KeptResources {
        version: accepted.version().to_owned(),
        resources: each.collect(),
    }
}

impl Discovery {
    /// What is to be kept; none while there is no control plane, or its first configuration is not complete.
    #[must_use]
    pub fn keep(&self) -> Option<Kept> {
        let ads = self.lines.ads().filter(|_| self.initialized)?;
        let model = &self.model;
        let by_ads = |source: &Option<ConfigSource>| {
            let origin = source.as_ref().map(|source| &source.origin);
            origin == Some(&Origin::Ads)
        };
        let of_kind = |kind| match kind {
            Kind::Clusters => {
                by_ads(&model.bootstrap.cds).then(|| good(&model.clusters, kind, ads))
            }
            Kind::Listeners => {
                by_ads(&model.bootstrap.lds).then(|| good(&model.listeners, kind, ads))
            }
            Kind::Endpoints => {
                let known = model.assignments.get(&Origin::Ads);
                known.map(|known| good(known, kind, ads))
            }
            Kind::Routes => {
                let known = model.tables.get(&Origin::Ads);
                known.map(|known| good(known, kind, ads))
            }
            Kind::Runtimes => {
                let known = model.runtimes.get(&Origin::Ads);
                known.map(|known| good(known, kind, ads))
            }
            Kind::Extensions => {
                let known = model.extensions.get(&Origin::Ads);
                known.map(|known| good(known, kind, ads))
            }
            Kind::Secrets => None,
        };
        let kinds = Kept::kinds().filter_map(|kind| Some((kind, of_kind(kind)?)));
        Some(Kept {
            node: model.bootstrap.node.id.clone(),
            kinds: kinds.collect(),
        })
    }

    /// Begins with what was kept.
    pub fn restore(&mut self, kept: Kept) {
        if self.lines.ads().is_none() || kept.count() == 0 {
            return;
        }
        tracing::info!(
            resources = kept.count(),
            "beginning with the configuration that was kept"
        );
        count("restored");
        self.model.has_clusters = true;
        for (kind, of_kind) in kept.kinds {
            let names = of_kind.resources.iter().map(|(name, ..)| name.clone());
            let names: Vec<String> = names.collect();
            let each = of_kind.resources.into_iter();
            let response = Response {
                version: of_kind.version,
                resources: each
                    .map(|(name, version, resource)| Unread {
                        name,
                        version,
                        any: Ok(resource),
                    })
                    .collect(),
                removed: Vec::new(),
            };
            let outcome = self.take(kind, &Origin::Ads, response);
            for (name, details) in &outcome.rejected {
                tracing::warn!(?kind, name, details, "was kept, and is refused");
            }
            let is_good = |name: &String| outcome.rejected.iter().all(|(bad, _)| bad != name);
            let good: Vec<String> = names.into_iter().filter(is_good).collect();
            if let Some(ads) = self.lines.ads_mut() {
                for name in good {
                    ads.remember(kind, name, String::new());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_link_in_the_way_is_not_followed() {
        let directory = std::env::temp_dir().join(format!("kept-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let elsewhere = directory.join("elsewhere");
        fs::write(&elsewhere, "precious").unwrap();
        symlink(&elsewhere, directory.join(format!("{NAME}.part"))).unwrap();
        write(&directory, b"kept").unwrap();
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "precious");
        let file = directory.join(NAME);
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        let metadata = fs::symlink_metadata(&file).unwrap();
        assert!(metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        fs::remove_dir_all(&directory).unwrap();
    }
}
