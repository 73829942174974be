//! Resources as text: what a proxy takes as files (`path_config_source`), and what people read.

use super::{Resource, V3};
use clap::ValueEnum;
use outrigger_xds::resource::{
    config_source::{ConfigSource, Origin},
    secret::SecretConfig,
    tls::CommonTls,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// How resources are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// With the origin of each resource as a comment.
    Yaml,
    /// Without.
    Json,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Self::Yaml => "yaml",
            Self::Json => "json",
        }
    }
}

/// A type of resource: its name in a type URL, and of its file.
const TYPES: [(&str, &str); 4] = [
    ("envoy.config.cluster.v3.Cluster", "clusters"),
    (
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        "endpoints",
    ),
    ("envoy.config.listener.v3.Listener", "listeners"),
    ("envoy.config.route.v3.RouteConfiguration", "routes"),
];
/// The same of those that are not made here.
const SECRETS: (&str, &str) = (
    "envoy.extensions.transport_sockets.tls.v3.Secret",
    "secrets",
);

/// All resources for people: a `DiscoveryResponse` for each type that there is.
#[must_use]
pub fn print(resources: &[&Resource], format: Format) -> String {
    let present = TYPES.iter().filter_map(|(name, _)| {
        let own: Vec<_> = of_type(resources, name).collect();
        (!own.is_empty()).then_some((*name, own))
    });
    match format {
        Format::Yaml => {
            let responses = present.map(|(name, own)| yaml(name, own.into_iter()));
            responses.collect::<Vec<_>>().join("---\n")
        }
        Format::Json => {
            let responses =
                present.map(|(name, own)| response(name, own.into_iter().map(|(_, json)| json)));
            pretty(&Value::Array(responses.collect()))
        }
    }
}

/// A file for each type in `directory`, by which the resources find each other; `secrets` as they are written. Files that
/// differ are replaced whole.
///
/// # Errors
/// A file cannot be written.
pub fn write(
    resources: &[&Resource],
    secrets: &BTreeMap<String, Value>,
    directory: &Path,
    format: Format,
) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(directory)?;
    let directory = directory.canonicalize()?;
    let path = |kind: &str| directory.join(format!("{kind}.{}", format.extension()));
    let linked: Vec<_> = resources
        .iter()
        .map(|resource| linked(resource, &path))
        .collect();
    let linked: Vec<_> = linked.iter().collect();
    let mut written = Vec::new();
    for (name, kind) in TYPES {
        let own = of_type(&linked, name);
        put(&path(kind), &one(name, own, format), EVERYBODY)?;
        written.push(path(kind));
    }
    if !secrets.is_empty() {
        let (name, kind) = SECRETS;
        let own = secrets
            .iter()
            .map(|(name, secret)| (format!("Secret {name}"), secret.clone()));
        put(&path(kind), &one(name, own, format), OWNER)?;
        written.push(path(kind));
    }
    Ok(written)
}

fn one(name: &str, own: impl Iterator<Item = (String, Value)>, format: Format) -> String {
    match format {
        Format::Yaml => yaml(name, own),
        Format::Json => pretty(&response(name, own.map(|(_, json)| json))),
    }
}

/// Where each resource of a type comes from, and itself.
fn of_type<'a>(
    resources: &'a [&'a Resource],
    name: &'a str,
) -> impl Iterator<Item = (String, Value)> + 'a {
    let own = resources
        .iter()
        .filter(move |resource| resource.v3.type_name() == name);
    own.map(|Resource { origin, v3, .. }| {
        (
            format!("{} {}, {}", origin.kind, origin.name, origin.file),
            v3.to_json(),
        )
    })
}

fn response(name: &str, resources: impl Iterator<Item = Value>) -> Value {
    let type_url = format!("type.googleapis.com/{name}");
    json!({"type_url": type_url, "resources": resources.collect::<Vec<_>>()})
}

fn pretty(value: &Value) -> String {
    // The alternate form of a value is indented JSON.
    format!("{value:#}\n")
}

fn yaml(name: &str, resources: impl Iterator<Item = (String, Value)>) -> String {
    let mut text = format!("type_url: type.googleapis.com/{name}\nresources:");
    let empty = text.len();
    for (origin, resource) in resources {
        let comment = origin.replace(['\n', '\r'], " ");
        let listed = serde_yaml_ng::to_string(&[resource]).unwrap_or_default();
        let _ = write!(text, "\n# {comment}\n{}", listed.trim_end());
    }
    if text.len() == empty {
        text.push_str(" []");
    }
    text.push('\n');
    text
}

/// Who may read a file.
const EVERYBODY: u32 = 0o644;
/// Where private keys may be.
const OWNER: u32 = 0o600;

/// Replaces a file whole, so that nobody reads half of it.
fn put(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    let half = path.with_extension("part");
    // What is left of an attempt that was interrupted may be open to others.
    match fs::remove_file(&half) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&half)?;
    file.write_all(text.as_bytes())?;
    fs::rename(half, path)
}

/// The same with files where it says that something comes from the control plane.
fn linked(resource: &Resource, path: &dyn Fn(&str) -> PathBuf) -> Resource {
    let mut resource = resource.clone();
    let link = |source: &mut ConfigSource, kind: &str| {
        source.origin = Origin::Path(path(kind).to_string_lossy().into_owned());
    };
    let link_tls = |tls: &mut CommonTls| {
        let validation = tls
            .validation_secret
            .as_mut()
            .map(|validation| &mut validation.secret);
        let all = tls.certificate_secrets.iter_mut().chain(validation);
        let sources = all.filter_map(|SecretConfig { source, .. }| source.as_mut());
        sources.for_each(|source| link(source, "secrets"));
    };
    match &mut resource.v3 {
        V3::Cluster(cluster) => {
            let eds = cluster.eds.iter_mut();
            eds.for_each(|eds| link(&mut eds.source, "endpoints"));
            let tls = cluster.tls.iter_mut();
            tls.for_each(|tls| link_tls(&mut tls.common));
        }
        V3::Listener(listener) => {
            for manager in listener.http_managers_mut() {
                let rds = manager.rds.iter_mut();
                rds.for_each(|rds| link(&mut rds.source, "routes"));
            }
            let tls = listener
                .filter_chains
                .iter_mut()
                .filter_map(|chain| chain.tls.as_mut());
            tls.for_each(|tls| link_tls(&mut tls.common));
        }
        V3::Endpoints(_) | V3::Routes(_) => {}
    }
    resource
}
