//! What there is to be served at one moment: resources by type and name, each with its version. It never changes; another one takes its place.

use outrigger_xds::{
    load::written::{self, Meaning, Written},
    resource::config_source::Origin,
    subscription::Kind,
};
use prost_types::Any;
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, OnceLock},
};
use xxhash_rust::xxh3::Xxh3;

/// Resources of one type, by name.
pub type ByName = BTreeMap<String, Arc<Resource>>;

static NONE: LazyLock<Arc<ByName>> = LazyLock::new(Arc::default);

/// A resource as it is sent.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// Of its bytes.
    pub version: String,
    /// Itself.
    pub any: Any,
    /// Of a cluster whose endpoints come over the same stream: their name.
    pub endpoints: Option<String>,
    /// As clients of gRPC are told of it; once one has asked.
    pub(crate) grpc: OnceLock<ForGrpc>,
}

/// What clients of gRPC are told of a resource.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ForGrpc {
    /// It, as it is.
    AsItIs,
    /// This in its place.
    Other(Arc<Resource>),
    /// Nothing.
    Nothing,
}

impl Resource {
    /// What clients of gRPC are told of it; made once, however long it is served.
    pub(crate) fn for_grpc(&self, make: impl FnOnce() -> ForGrpc) -> &ForGrpc {
        self.grpc.get_or_init(make)
    }
}

impl From<&Written> for Resource {
    fn from(written: &Written) -> Self {
        Self {
            name: written.name.clone(),
            version: written::version(&written.any),
            any: written.any.clone(),
            endpoints: endpoints(&written.meaning),
            ..Self::default()
        }
    }
}

fn endpoints(meaning: &Meaning) -> Option<String> {
    let Meaning::Cluster(cluster) = meaning else {
        return None;
    };
    let eds = cluster.eds.as_ref()?;
    (eds.source.origin == Origin::Ads).then_some(())?;
    Some(cluster.eds_service_name().to_owned())
}

/// All resources of a moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Snapshot {
    kinds: BTreeMap<Kind, Arc<ByName>>,
}

impl Snapshot {
    /// Of one type.
    #[must_use]
    pub fn of(&self, kind: Kind) -> &Arc<ByName> {
        self.kinds.get(&kind).unwrap_or(&NONE)
    }

    /// Has this from now on, in place of what had its name.
    pub fn insert(&mut self, kind: Kind, resource: Arc<Resource>) {
        let of_kind = Arc::make_mut(self.kinds.entry(kind).or_default());
        of_kind.insert(resource.name.clone(), resource);
    }

    /// Has of this type what another one has.
    pub(crate) fn adopt(&mut self, kind: Kind, other: &Self) {
        self.kinds.insert(kind, other.of(kind).clone());
    }

    /// Has of this type only those.
    pub fn keep(&mut self, kind: Kind, is_kept: impl Fn(&str) -> bool) {
        if let Some(of_kind) = self.kinds.get_mut(&kind) {
            Arc::make_mut(of_kind).retain(|name, _| is_kept(name));
        }
    }

    /// Types that are as they were in another one become the same, so that it shows at a glance that nothing of them changed.
    pub fn share(&mut self, last: &Self) {
        for (kind, of_kind) in &mut self.kinds {
            let before = last.of(*kind);
            if is_same(of_kind, before) {
                of_kind.clone_from(before);
            }
        }
    }

    /// Whether this is known to be as another one, without a look at each resource: what is the same and not shared counts as another.
    #[must_use]
    pub fn shares_all(&self, other: &Self) -> bool {
        let mut kinds = Kind::ALL.into_iter();
        kinds.all(|kind| Arc::ptr_eq(self.of(kind), other.of(kind)))
    }

    /// Whether they are the same, resource by resource.
    #[must_use]
    pub fn is_as(&self, other: &Self) -> bool {
        let mut kinds = Kind::ALL.into_iter();
        kinds.all(|kind| is_same(self.of(kind), other.of(kind)))
    }

    /// Of all that it has.
    #[must_use]
    pub fn version(&self) -> String {
        let all = Kind::ALL
            .into_iter()
            .flat_map(|kind| self.of(kind).values());
        version_of(all.map(|resource| (resource.name.as_str(), resource.version.as_str())))
    }
}

fn is_same(one: &ByName, other: &ByName) -> bool {
    let mut pairs = one.values().zip(other.values());
    one.len() == other.len()
        && pairs.all(|(one, other)| (&one.name, &one.version) == (&other.name, &other.version))
}

/// The version of a set: of the names and versions in it, in order.
pub fn version_of<'a>(set: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut hash = Xxh3::new();
    for (name, version) in set {
        // Lengths keep names and versions apart.
        hash.update(&(name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update(&(version.len() as u64).to_le_bytes());
        hash.update(version.as_bytes());
    }
    format!("{:032x}", hash.digest128())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(name: &str, version: &str) -> Arc<Resource> {
        Arc::new(Resource {
            name: name.into(),
            version: version.into(),
            ..Resource::default()
        })
    }

    #[test]
    fn versions_tell_sets_apart() {
        let sets: [&[(&str, &str)]; 6] = [
            &[],
            &[("a", "1")],
            &[("a", "2")],
            &[("a", "1"), ("b", "1")],
            &[("a1", "")],
            &[("", "a1")],
        ];
        let versions: Vec<String> = sets
            .iter()
            .map(|set| version_of(set.iter().copied()))
            .collect();
        for (index, version) in versions.iter().enumerate() {
            assert!(!versions[..index].contains(version), "{:?}", sets[index]);
            assert_eq!(*version, version_of(sets[index].iter().copied()));
        }
    }

    #[test]
    fn the_version_does_not_depend_on_the_way_there() {
        let mut one = Snapshot::default();
        one.insert(Kind::Clusters, resource("a", "0"));
        let before = one.version();
        one.insert(Kind::Clusters, resource("a", "1"));
        one.insert(Kind::Routes, resource("r", "1"));
        assert_ne!(one.version(), before);
        let mut other = Snapshot::default();
        other.insert(Kind::Clusters, resource("a", "1"));
        other.insert(Kind::Routes, resource("r", "2"));
        other.share(&one);
        let is_shared = |kind| Arc::ptr_eq(one.of(kind), other.of(kind));
        assert!(is_shared(Kind::Clusters) && is_shared(Kind::Secrets));
        assert!(!is_shared(Kind::Routes));
        other.insert(Kind::Routes, resource("r", "1"));
        assert_eq!(other.version(), one.version());
    }
}
