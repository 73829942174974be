//! What the sources had at one moment, as it is kept: JSON, in which the same is always written the same; and its hash.

use crate::{
    short::{self, Origin},
    source::{Content, Placed, Problem},
};
use outrigger_xds::load::written;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};
use xxhash_rust::xxh3::xxh3_128;

/// What sources have, by their names.
pub type Contents = BTreeMap<String, Arc<Content>>;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    raw: Vec<KeptRaw>,
    short: Vec<KeptShort>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptRaw {
    origin: String,
    place: String,
    resource: Value,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptShort {
    file: String,
    document: usize,
    resource: Value,
}

/// As bytes.
///
/// # Errors
/// A resource cannot be written.
pub fn encode(contents: &Contents) -> Result<Vec<u8>, String> {
    let mut all = BTreeMap::new();
    for (source, content) in contents {
        let mut kept = Kept::default();
        for placed in &content.raw {
            kept.raw.push(KeptRaw {
                origin: placed.origin.clone(),
                place: placed.place.clone(),
                resource: written::to_json(&placed.written.any).map_err(|it| it.to_string())?,
            });
        }
        let short = content.short.iter().map(|document| KeptShort {
            file: document.origin.file.clone(),
            document: document.origin.document,
            resource: Value::clone(&document.written),
        });
        kept.short.extend(short);
        all.insert(source, kept);
    }
    serde_json::to_vec(&all).map_err(|error| error.to_string())
}

/// From bytes; judged as if it came from a file.
///
/// # Errors
/// Everything that is wrong with it.
pub fn decode(bytes: &[u8]) -> Result<Contents, Vec<Problem>> {
    let all: BTreeMap<String, Kept> = serde_json::from_slice(bytes).map_err(|error| {
        vec![Problem {
            origin: "kept".to_owned(),
            message: error.to_string(),
        }]
    })?;
    let (mut contents, mut problems) = (Contents::new(), Vec::new());
    for (source, kept) in all {
        let mut content = Content::default();
        for raw in kept.raw {
            match read_raw(raw) {
                Ok(placed) => content.raw.push(placed),
                Err(problem) => problems.push(problem),
            }
        }
        for short in kept.short {
            match short::read_one(&short.file, short.document, &short.resource) {
                Ok(document) => content.short.push(document),
                Err(found) => problems.extend(found.0.into_iter().map(Problem::from)),
            }
        }
        contents.insert(source, Arc::new(content));
    }
    if problems.is_empty() {
        Ok(contents)
    } else {
        Err(problems)
    }
}

fn read_raw(raw: KeptRaw) -> Result<Placed, Problem> {
    match written::resource(raw.resource, &raw.place) {
        Ok(written) => Ok(Placed {
            origin: raw.origin,
            place: raw.place,
            written,
        }),
        Err(errors) => Err(Problem {
            origin: raw.origin,
            message: errors.to_string(),
        }),
    }
}

/// What a resource is called by people, and what it says.
pub type Named = BTreeMap<String, Value>;

/// All of them, as they are written, whichever source they are from.
#[must_use]
pub fn named(contents: &Contents) -> Named {
    let each = contents.values();
    let raw = each.clone().flat_map(|content| &content.raw);
    let raw = raw.map(|placed| {
        let any = &placed.written.any;
        let (_, kind) = any.type_url.rsplit_once('.').unwrap_or_default();
        let name = format!("{kind} {}", placed.written.name);
        (name, written::to_json(any).unwrap_or_default())
    });
    let short = each.flat_map(|content| &content.short).map(|document| {
        let Origin { kind, name, .. } = &document.origin;
        (format!("{kind} {name}"), Value::clone(&document.written))
    });
    raw.chain(short).collect()
}

/// Of what they say, wherever it stands: files that were renamed, and other words for the same Envoy resource, change nothing.
#[must_use]
pub fn hash(contents: &Contents) -> String {
    let each = contents.values();
    let raw = each.clone().flat_map(|content| &content.raw).map(|placed| {
        let any = &placed.written.any;
        let value = xxh3_128(&any.value);
        format!("{}\n{}\n{value:032x}", any.type_url, placed.written.name)
    });
    let short = each.flat_map(|content| &content.short);
    let short = short.map(|document| {
        let value = xxh3_128(document.written.to_string().as_bytes());
        let Origin { kind, name, .. } = &document.origin;
        format!("{kind}\n{name}\n{value:032x}")
    });
    let mut lines: Vec<String> = raw.chain(short).collect();
    lines.sort_unstable();
    format!("{:032x}", xxh3_128(lines.join("\n\n").as_bytes()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use outrigger_xds::load::{Syntax, documents};

    const CLUSTER: &str = "{'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: raw, type: STATIC, connect_timeout: TIMEOUT, load_assignment: {cluster_name: raw}}";
    const FLEET: &str = "apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec: {pools: [{name: all, engines: ['127.0.0.1:8000']}]}
";

    /// A cluster with this time to connect, and a fleet.
    pub(crate) fn contents(timeout: &str) -> Contents {
        let text = CLUSTER.replace("TIMEOUT", timeout);
        let raw = documents(&text, Syntax::Yaml).unwrap().into_iter();
        let raw = raw.map(|value| Placed {
            origin: "raw.yaml".into(),
            place: "[0]".into(),
            written: written::resource(value, "[0]").unwrap(),
        });
        let content = Content {
            raw: raw.collect(),
            short: short::read("fleet.yaml", FLEET, Syntax::Yaml).unwrap(),
            nodes: Vec::new(),
        };
        Contents::from([("directory".into(), Arc::new(content))])
    }

    #[test]
    fn what_is_kept_is_what_was() {
        let contents = contents("5s");
        let bytes = encode(&contents).unwrap();
        let again = decode(&bytes).unwrap();
        assert_eq!(again, contents);
        assert_eq!(encode(&again).unwrap(), bytes);
        assert_eq!(hash(&again), hash(&contents));
        let names: Vec<String> = named(&contents).into_keys().collect();
        assert_eq!(names, ["Cluster raw", "Fleet chat"]);
    }

    #[test]
    fn the_hash_is_of_what_is_said_and_not_of_where() {
        let contents = contents("5s");
        let mut moved = Content::clone(&contents["directory"]);
        moved.raw[0].origin = "other.yaml".into();
        moved.short[0].origin.document = 2;
        let moved = Contents::from([("elsewhere".into(), Arc::new(moved))]);
        assert_eq!(hash(&moved), hash(&contents));
        assert_ne!(hash(&super::tests::contents("6s")), hash(&contents));
    }

    #[test]
    fn what_cannot_be_understood_is_said() {
        assert!(decode(b"{").is_err());
        let text = encode(&contents("5s")).unwrap();
        let text = String::from_utf8(text).unwrap();
        let problems = decode(text.replace("STATIC", "NO").as_bytes()).unwrap_err();
        assert_eq!(problems[0].origin, "raw.yaml");
        let problems = decode(text.replace("\"pools\"", "\"pols\"").as_bytes()).unwrap_err();
        assert_eq!(problems[0].origin, "fleet.yaml");
    }
}
