//! Every recording of a real engine decodes to what was recorded beside it, and becomes the right canonical blocks.

#![expect(
    clippy::unwrap_used,
    reason = "what a test does not expect has to end it"
)]

use outrigger_gpu_agent::event::{
    BlockRemoved, BlockStored, EngineHash, Event, EventBatch, decode,
};
use outrigger_gpu_agent::lineage::Lineage;
use outrigger_gpu_agent::load;
use outrigger_xds::block_hash::{Namespace, chain};
use outrigger_xds::report::{EngineKind, Shelf, Tier};
use serde_json::Value;
use std::collections::HashSet;
use std::path::PathBuf;

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../conformance/fixtures")
        .join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

fn hash(value: &Value) -> EngineHash {
    EngineHash(
        value
            .as_u64()
            .unwrap_or_else(|| value.as_i64().expect("a hash").cast_unsigned()),
    )
}

fn hashes(value: &Value) -> Vec<EngineHash> {
    value.as_array().unwrap().iter().map(hash).collect()
}

/// The recorded meaning, in either form, as an event. Written apart from the decoder on purpose.
fn meaning(value: &Value) -> Event {
    let names = [
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
    ];
    let removed_names = ["type", "block_hashes", "medium"];
    let field = |name: &str| -> Value {
        let found = match value {
            Value::Array(items) => {
                let order: &[&str] = if items[0] == "BlockStored" {
                    &names
                } else {
                    &removed_names
                };
                order
                    .iter()
                    .position(|known| *known == name)
                    .and_then(|at| items.get(at))
            }
            other => other.get(name),
        };
        found.cloned().unwrap_or(Value::Null)
    };
    let text = |value: Value| value.as_str().map(str::to_owned);
    assert!(
        matches!(text(field("medium")).as_deref(), None | Some("GPU")),
        "the recordings know the device only"
    );
    match field("type").as_str().unwrap() {
        "AllBlocksCleared" => Event::Cleared,
        "BlockRemoved" => Event::Removed(BlockRemoved {
            hashes: hashes(&field("block_hashes")),
            tier: Some(Tier::Device),
            ..BlockRemoved::default()
        }),
        "BlockStored" => {
            let parent = field("parent_block_hash");
            let first_keys = field("extra_keys").get(0).cloned().unwrap_or(Value::Null);
            Event::Stored(BlockStored {
                hashes: hashes(&field("block_hashes")),
                parent: (!parent.is_null()).then(|| hash(&parent)),
                tokens: serde_json::from_value(field("token_ids")).unwrap(),
                block_tokens: serde_json::from_value(field("block_size")).unwrap(),
                lora: text(field("lora_name")),
                salt: text(field("cache_salt"))
                    .or_else(|| text(first_keys.get(0).cloned().unwrap_or(Value::Null))),
                tier: Tier::Device,
                group: 0,
                full_attention: true,
                extra: Vec::new(),
            })
        }
        other => panic!("{other} is not in the recordings"),
    }
}

fn check(payload: &[u8], decoded: &Value, place: &str) -> EventBatch {
    let batch = decode(payload).unwrap_or_else(|error| panic!("{place}: {error}"));
    // Parsing the JSON number may differ in its last bit.
    assert!(
        (batch.timestamp - decoded[0].as_f64().unwrap()).abs() < 1e-6,
        "{place}"
    );
    assert_eq!(batch.rank.map(u64::from), decoded[2].as_u64(), "{place}");
    assert_eq!(batch.unknown_fields, 0, "{place}: every field is known");
    let expected: Vec<Event> = decoded[1].as_array().unwrap().iter().map(meaning).collect();
    assert_eq!(batch.events, expected, "{place}");
    batch
}

const RECORDINGS: [(&str, usize); 5] = [
    ("sglang-0.5.23", 7),
    ("vllm-0.32.0-a", 28),
    ("vllm-0.32.0-b-then-nixl-decode", 15),
    ("vllm-0.32.0-evict", 19),
    ("vllm-0.32.0-evict-then-nixl-prefill-then-oot", 33),
];

fn recording(name: &str) -> Vec<(u64, EventBatch)> {
    let text = fixture(&format!("kv-events/{name}.jsonl"));
    let line = |(index, line): (usize, &str)| {
        let line: Value = serde_json::from_str(line).unwrap();
        let frames: Vec<Vec<u8>> = line["frames_hex"]
            .as_array()
            .unwrap()
            .iter()
            .map(|hex| bytes(hex.as_str().unwrap()))
            .collect();
        assert_eq!(frames[0], line["topic"].as_str().unwrap().as_bytes());
        assert_eq!(frames[1], line["seq"].as_u64().unwrap().to_be_bytes());
        (
            line["seq"].as_u64().unwrap(),
            check(
                &frames[2],
                &line["decoded"],
                &format!("{name}:{}", index + 1),
            ),
        )
    };
    text.lines().enumerate().map(line).collect()
}

#[test]
fn every_recorded_message_means_what_was_recorded() {
    for (name, events) in RECORDINGS {
        let batches = recording(name);
        assert_eq!(
            batches
                .iter()
                .map(|(_, batch)| batch.events.len())
                .sum::<usize>(),
            events,
            "{name}"
        );
    }
    let salted = recording("vllm-0.32.0-a")
        .into_iter()
        .flat_map(|(_, batch)| batch.events);
    let salted = salted.filter(|event| matches!(event, Event::Stored(stored) if stored.salt.as_deref() == Some("tenant-a")));
    assert_eq!(salted.count(), 2, "the recording has two salted prompts");
}

#[test]
fn every_version_s_encoding_means_the_same() {
    let formats: Value =
        serde_json::from_str(&fixture("kv-events/formats-by-version.json")).unwrap();
    let formats = formats.as_object().unwrap();
    assert_eq!(formats.len(), 6);
    let mut all = Vec::new();
    for (version, format) in formats {
        all.push(check(
            &bytes(format["hex"].as_str().unwrap()),
            &format["decoded"],
            version,
        ));
    }
    assert!(
        all.windows(2).all(|pair| pair[0] == pair[1]),
        "one meaning in {} encodings",
        all.len()
    );
    assert_eq!(all[0].events.len(), 3);
}

#[test]
fn replies_of_the_replay_socket_decode() {
    for (name, from) in [("replay-from-4", 4), ("sglang-replay-from-0", 0)] {
        let replay: Value =
            serde_json::from_str(&fixture(&format!("kv-events/{name}.json"))).unwrap();
        let replies = replay["replies"].as_array().unwrap();
        let (end, batches) = replies.split_last().unwrap();
        assert_eq!(end.as_array().unwrap()[2], "ffffffffffffffff");
        assert!(!batches.is_empty());
        for (index, reply) in batches.iter().enumerate() {
            let frames: Vec<Vec<u8>> = reply
                .as_array()
                .unwrap()
                .iter()
                .map(|hex| bytes(hex.as_str().unwrap()))
                .collect();
            assert_eq!(frames[2], (from + index as u64).to_be_bytes());
            let batch = decode(&frames[3]).unwrap();
            assert!(!batch.events.is_empty());
            assert!(batch.events.iter().all(|event| matches!(
                event,
                Event::Stored(_) | Event::Removed(_) | Event::Cleared
            )));
        }
    }
}

/// A vLLM 0.32 payload in map form with all the fields that vLLM sends, made with the library vLLM uses.
const GOLDEN: &str = "93cb3ff8000000000000938aa474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cf8000000000000005b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797391c0a967726f75705f6964780084a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865739107a66d656469756da3475055a967726f75705f6964780081a474797065b0416c6c426c6f636b73436c656172656400";

#[test]
fn the_golden_payload() {
    let stored = BlockStored {
        hashes: vec![EngineHash((1 << 63) + 5)],
        tokens: vec![1, 2],
        block_tokens: 2,
        full_attention: true,
        ..BlockStored::default()
    };
    let removed = BlockRemoved {
        hashes: vec![EngineHash(7)],
        tier: Some(Tier::Device),
        ..BlockRemoved::default()
    };
    let events = vec![
        Event::Stored(stored),
        Event::Removed(removed),
        Event::Cleared,
    ];
    assert_eq!(
        decode(&bytes(GOLDEN)),
        Ok(EventBatch {
            timestamp: 1.5,
            rank: Some(0),
            events,
            unknown_fields: 0,
        })
    );
}

fn replayed(name: &str, events: impl IntoIterator<Item = Event>) -> (Lineage, HashSet<u64>) {
    let mut lineage = Lineage::new("smollm2", 32, 100_000);
    for event in events {
        lineage.apply(0, &event, &mut Vec::new());
    }
    let counts = lineage.counts();
    assert_eq!(
        (counts.unfit_size, counts.malformed, counts.unknown_type),
        (0, 0, 0),
        "{name}"
    );
    let held = lineage
        .snapshot()
        .into_iter()
        .filter(|(shelf, _)| *shelf == Shelf::default());
    let held = held.flat_map(|(_, hashes)| hashes).collect();
    (lineage, held)
}

#[test]
fn vllm_s_blocks_are_the_prompt_s_chain() {
    let events: Vec<Event> = recording("vllm-0.32.0-evict")
        .into_iter()
        .flat_map(|(_, batch)| batch.events)
        .collect();
    let Event::Stored(first) = &events[0] else {
        panic!("the recording begins with a prompt")
    };
    let seed = Namespace {
        model: "smollm2".into(),
        ..Namespace::default()
    }
    .seed();
    let (_, held) = replayed("first prompt", [events[0].clone()]);
    assert_eq!(held, chain(seed, &first.tokens, 32).into_iter().collect());

    let (lineage, held) = replayed("all", events.clone());
    assert_eq!(lineage.counts().unknown_parent, 0);
    let stored: usize = events
        .iter()
        .map(|event| {
            if let Event::Stored(stored) = event {
                stored.hashes.len()
            } else {
                0
            }
        })
        .sum();
    let removed = events
        .iter()
        .filter(|event| matches!(event, Event::Removed(_)))
        .count();
    assert_eq!(
        (held.len(), removed),
        (stored - removed, 16),
        "each eviction took one block away"
    );
}

#[test]
fn sglang_s_pages_of_one_token_are_gathered() {
    let events: Vec<Event> = recording("sglang-0.5.23")
        .into_iter()
        .flat_map(|(_, batch)| batch.events)
        .collect();
    let Event::Stored(first) = &events[0] else {
        panic!("the recording begins with a prompt")
    };
    assert_eq!((first.block_tokens, first.tokens.len()), (1, 34));
    let seed = Namespace {
        model: "smollm2".into(),
        ..Namespace::default()
    }
    .seed();
    let (_, held) = replayed("first prompt", [events[0].clone()]);
    assert_eq!(
        held,
        chain(seed, &first.tokens, 32).into_iter().collect(),
        "34 tokens are one block of 32"
    );
}

#[test]
fn load_of_recorded_metrics_pages() {
    let figures = load::parse(&fixture("http-vllm-0.32.0/get_metrics.body"));
    assert_eq!(figures.kind, EngineKind::Vllm);
    assert_eq!(
        (figures.running, figures.waiting, figures.kv_usage),
        (Some(0), Some(0), Some(0.0))
    );
    assert_eq!(
        (figures.block_tokens, figures.kv_blocks, figures.ranks),
        (Some(32), Some(1456), 1)
    );
    assert_eq!(figures.process_start, Some(1.795_337_504_78e9));
    let figures = load::parse(&fixture("http-sglang-0.5.23/get_metrics.body"));
    assert_eq!(figures.kind, EngineKind::Sglang);
    assert_eq!(
        (figures.running, figures.waiting, figures.kv_usage),
        (Some(0), Some(0), Some(0.0))
    );
}
