//! What a control plane brought last, as the bytes of a file, so that a proxy can begin with it.
//!
//! A file begins with a line that says its format and a checksum of the rest. What is torn, of another format or of somebody
//! else is no configuration. Secrets are never in it. It does no IO.

use crate::subscription::Kind;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

/// Larger files are not written, and not read.
pub const KEPT_BYTES_MAX: usize = 256 << 20;
/// What a file begins with.
const FORMAT: &str = "outrigger-config 1";
/// What is kept, in the order in which it is needed.
const KINDS: [(Kind, &str); 6] = [
    (Kind::Runtimes, "runtimes"),
    (Kind::Clusters, "clusters"),
    (Kind::Endpoints, "endpoints"),
    (Kind::Listeners, "listeners"),
    (Kind::Routes, "routes"),
    (Kind::Extensions, "extensions"),
];

/// Resources of one type.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct KeptResources {
    /// Of the last update.
    pub version: String,
    /// Name, version, and the JSON of an `Any`.
    pub resources: Vec<(String, String, Value)>,
}

/// All that is kept.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Kept {
    /// Id of the node that it was meant for.
    pub node: String,
    /// By type, in the order in which they need each other.
    pub kinds: Vec<(Kind, KeptResources)>,
}

impl Kept {
    /// What is kept at all.
    pub fn kinds() -> impl Iterator<Item = Kind> {
        KINDS.into_iter().map(|(kind, _)| kind)
    }

    /// How many resources there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.kinds.iter().map(|(_, of)| of.resources.len()).sum()
    }
}

/// As bytes.
#[must_use]
pub fn encode(kept: &Kept) -> Vec<u8> {
    let mut body = Map::new();
    body.insert("node".to_owned(), json!(kept.node));
    for (kind, name) in KINDS {
        if let Some((_, of_kind)) = kept.kinds.iter().find(|(known, _)| *known == kind) {
            let each = of_kind.resources.iter().map(|(name, version, resource)| {
                json!({ "name": name, "version": version, "resource": resource })
            });
            let resources: Vec<Value> = each.collect();
            let section = json!({ "version": of_kind.version, "resources": resources });
            body.insert(name.to_owned(), section);
        }
    }
    let body = Value::Object(body).to_string();
    let sum = xxh3_64(body.as_bytes());
    format!("{FORMAT} {sum:016x}\n{body}").into_bytes()
}

/// What bytes hold.
///
/// # Errors
/// Why they are nothing that was kept.
pub fn decode(bytes: &[u8]) -> Result<Kept, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not a text".to_owned())?;
    let (head, body) = text.split_once('\n').ok_or("has no first line")?;
    let sum = head
        .strip_prefix(FORMAT)
        .ok_or_else(|| format!("does not begin with '{FORMAT}'"))?;
    if sum.trim() != format!("{:016x}", xxh3_64(body.as_bytes())) {
        return Err("its checksum is wrong".to_owned());
    }
    let mut body: Value = serde_json::from_str(body).map_err(|error| error.to_string())?;
    let node = body["node"].as_str().unwrap_or_default().to_owned();
    let kinds = KINDS.into_iter().filter_map(|(kind, name)| {
        let section = body.get_mut(name)?;
        Some((kind, section_of(section)))
    });
    let kinds = kinds.collect();
    Ok(Kept { node, kinds })
}

fn section_of(section: &mut Value) -> KeptResources {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = text(&section["version"]);
    let resources = section["resources"].as_array_mut().into_iter().flatten();
    let each = resources.map(|entry| {
        let (name, version) = (text(&entry["name"]), text(&entry["version"]));
        (name, version, entry["resource"].take())
    });
    KeptResources {
        version,
        resources: each.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        let clusters = KeptResources {
            version: "7".into(),
            resources: vec![("a".into(), "3".into(), json!({ "@type": "t", "name": "a" }))],
        };
        Kept {
            node: "n".into(),
            kinds: vec![
                (Kind::Clusters, clusters),
                (Kind::Routes, KeptResources::default()),
            ],
        }
    }

    #[test]
    fn what_was_kept_is_read_back() {
        assert_eq!(decode(&encode(&kept())), Ok(kept()));
        assert_eq!(decode(&encode(&Kept::default())), Ok(Kept::default()));
    }

    #[test]
    fn whatever_is_torn_or_changed_is_nothing() {
        let whole = encode(&kept());
        for end in 0..whole.len() {
            assert!(decode(&whole[..end]).is_err(), "the first {end} bytes");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            assert!(decode(&changed).is_err(), "byte {at} changed");
        }
        assert!(decode(&[0xff; 100]).is_err());
    }
}
