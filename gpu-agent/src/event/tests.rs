//! Are recorded and made-up messages read as what they say?

use super::*;
use rmpv::Value;

fn batch(event: Value) -> Event {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(
        &mut bytes,
        &Value::Array(vec![1.0.into(), Value::Array(vec![event])]),
    )
    .unwrap();
    decode(&bytes).unwrap().events.remove(0)
}

fn map(pairs: Vec<(&str, Value)>) -> Value {
    Value::Map(
        pairs
            .into_iter()
            .map(|(key, value)| (key.into(), value))
            .collect(),
    )
}

fn list(items: Vec<Value>) -> Value {
    Value::Array(items)
}

fn stored_with(mut more: Vec<(&str, Value)>) -> BlockStored {
    let mut pairs = vec![
        ("type", "BlockStored".into()),
        ("block_hashes", list(vec![7.into(), 8.into()])),
        (
            "token_ids",
            list(vec![1.into(), 2.into(), 3.into(), 4.into()]),
        ),
        ("block_size", 2.into()),
    ];
    pairs.append(&mut more);
    match batch(map(pairs)) {
        Event::Stored(stored) => stored,
        other => panic!("{other:?}"),
    }
}

#[test]
fn salt_lora_and_media_are_told_apart() {
    let keys = list(vec![
        list(vec![
            "adapter".into(),
            list(vec!["img".into(), 1.into()]),
            "tenant".into(),
        ]),
        list(vec![
            "adapter".into(),
            list(vec!["img".into(), (-1).into()]),
        ]),
    ]);
    let stored = stored_with(vec![("lora_name", "adapter".into()), ("extra_keys", keys)]);
    assert_eq!(stored.lora.as_deref(), Some("adapter"));
    assert_eq!(stored.salt.as_deref(), Some("tenant"));
    let media = |offset| {
        vec![Extra::Media {
            offset,
            id: "img".into(),
        }]
    };
    assert_eq!(stored.extra, [media(1), media(-1)]);

    let tagged = list(vec![
        list(vec![
            list(vec!["lora".into(), "adapter".into(), "/path".into()]),
            list(vec!["mm".into(), "img".into(), 1.into()]),
            list(vec!["cache_salt".into(), "tenant".into()]),
        ]),
        list(vec![list(vec!["mm".into(), "img".into(), (-1).into()])]),
    ]);
    assert_eq!(
        stored_with(vec![
            ("lora_name", "adapter".into()),
            ("extra_keys", tagged)
        ]),
        stored
    );
}

#[test]
fn a_bare_string_in_mid_chain_is_no_salt() {
    let stored = stored_with(vec![
        ("parent_block_hash", 5.into()),
        (
            "extra_keys",
            list(vec![list(vec!["what".into()]), Value::Nil]),
        ),
    ]);
    assert_eq!(stored.salt, None);
    assert_eq!(
        stored.extra[0].len(),
        1,
        "it must still keep the block apart from the plain one"
    );
}

#[test]
fn hashes_of_all_widths() {
    let digest = [[9u8; 24].as_slice(), &u64::MAX.to_be_bytes()].concat();
    let stored = stored_with(vec![]);
    assert_eq!(stored.hashes, [EngineHash(7), EngineHash(8)]);
    let Event::Removed(removed) = batch(map(vec![
        ("type", "BlockRemoved".into()),
        (
            "block_hashes",
            list(vec![
                (-1).into(),
                Value::Binary(digest),
                Value::Binary(vec![1, 2]),
            ]),
        ),
        ("medium", "CPU_PINNED".into()),
    ])) else {
        panic!("not a removal")
    };
    assert_eq!(
        removed.hashes,
        [
            EngineHash(u64::MAX),
            EngineHash(u64::MAX),
            EngineHash(0x0102)
        ]
    );
    assert_eq!(removed.tier, Some(Tier::Host));
}

#[test]
fn eagle_pairs_give_their_first_tokens() {
    let pairs = list(vec![
        list(vec![1.into(), 2.into()]),
        list(vec![2.into(), 3.into()]),
    ]);
    let Event::Stored(stored) = batch(list(vec![
        "BlockStored".into(),
        list(vec![1.into()]),
        Value::Nil,
        pairs,
        2.into(),
    ])) else {
        panic!("not stored")
    };
    assert_eq!(stored.tokens, [1, 2]);
    assert_eq!(stored.tier, Tier::Device, "no medium: the device");
}

#[test]
fn only_groups_that_see_the_whole_prefix_count() {
    for (kind, expected) in [
        ("full_attention", true),
        ("mla_attention", true),
        ("sliding_window", false),
        ("mamba", false),
    ] {
        assert_eq!(
            stored_with(vec![("kv_cache_spec_kind", kind.into())]).full_attention,
            expected,
            "{kind}"
        );
    }
    assert!(stored_with(vec![]).full_attention);
}

#[test]
fn fields_of_tomorrow_are_counted_in_either_form() {
    let count = |batch: Vec<Value>| {
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &Value::Array(batch)).unwrap();
        let batch = decode(&bytes).unwrap();
        (batch.unknown_fields, batch.events.len())
    };
    let of = |events: Vec<Value>| count(vec![1.0.into(), list(events), 0.into()]);
    let stored = |more: Vec<(&str, Value)>| {
        let mut pairs = vec![
            ("type", "BlockStored".into()),
            ("block_hashes", list(vec![])),
        ];
        pairs.extend(STORED_FIELDS[1..].iter().map(|name| (*name, Value::Nil)));
        pairs.push(("cache_salt", "s".into()));
        pairs.extend(more);
        map(pairs)
    };
    assert_eq!(of(vec![stored(vec![])]), (0, 1), "all that is known");
    let tomorrow = vec![("field_of_tomorrow", 7.into()), ("another", Value::Nil)];
    assert_eq!(of(vec![stored(tomorrow)]), (2, 1));
    let removed = |items: usize| {
        let mut event = vec!["BlockRemoved".into(), list(vec![7.into()])];
        event.resize(items, Value::Nil);
        list(event)
    };
    assert_eq!(of(vec![removed(6)]), (0, 1));
    assert_eq!(of(vec![removed(8), removed(7)]), (3, 2));
    let cleared = map(vec![("type", "AllBlocksCleared".into()), ("why", 1.into())]);
    assert_eq!(of(vec![cleared]), (1, 1));
    let unknown = map(vec![("type", "Offloaded".into()), ("why", 1.into())]);
    assert_eq!(of(vec![unknown]), (0, 1), "counted as a type");
    let numbered = Value::Map(vec![
        ("type".into(), "AllBlocksCleared".into()),
        (7.into(), 7.into()),
    ]);
    assert_eq!(of(vec![numbered]), (1, 1), "a key that is no name");
    assert_eq!(
        count(vec![1.0.into(), list(vec![]), 0.into(), "more".into()]),
        (1, 0)
    );
}

#[test]
fn unknown_and_malformed_events_do_not_fail_the_batch() {
    assert_eq!(
        batch(list(vec!["OffloadedState".into()])),
        Event::Unknown("OffloadedState".into())
    );
    assert_eq!(
        batch(map(vec![("type", "BlockStored".into())])),
        Event::Malformed("block_hashes")
    );
    assert_eq!(batch(3.into()), Event::Malformed("no type"));
    assert!(decode(b"\xc1 garbage").is_err());
    assert!(decode(b"").is_err());
    assert_eq!(decode(b"\x01"), Err(DecodeError::NotABatch("not an array")));
    let huge_length = [0xdd, 0xff, 0xff, 0xff, 0xff, 0x01];
    assert!(
        decode(&huge_length).is_err(),
        "a length that lies must not allocate"
    );
}
