//! Figures, not judgements: `cargo test -p outrigger-filters --release -- --ignored --nocapture`.

use crate::fleet::{Fleet, KV, OPENAI, post, small_model, vllm};
use http::StatusCode;
use outrigger_filters::{
    endpoints::Via,
    filter::{Edit, End, LogFields},
    openai::{Api, OpenAiRequest, StreamLimits},
    sse::Event,
};
use outrigger_xds::report::{KvChange, Shelf};
use serde_json::json;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// A conversation of `messages` messages with some `bytes` of text in all.
fn conversation(messages: usize, bytes: usize, tail: usize) -> String {
    let words = "the outrigger steadies a narrow hull when waves come from the side; ";
    let text = words.repeat(bytes / messages / words.len() + 1);
    let text = &text[..bytes / messages];
    let messages: Vec<_> = (0..messages)
        .map(|index| {
            let last = if index + 1 == messages { format!(" {tail}") } else { String::new() };
            json!({"role": if index % 2 == 0 { "user" } else { "assistant" }, "content": format!("{index} {text}{last}")})
        })
        .collect();
    json!({"model": "m", "messages": messages, "stream": true}).to_string()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "prints figures"]
async fn the_cost_of_a_decision() {
    let root =
        std::env::var("OUTRIGGER_MEASURE_MODEL").unwrap_or(small_model().to_str().unwrap().into());
    // It cannot be verified here, and is trusted.
    let fleet = Fleet::new(
        &[Via::Local, Via::Peer, Via::Peer, Via::Peer],
        &vllm(&root),
        Arc::new(|_, _| (StatusCode::NOT_FOUND, String::new())),
    );
    let (chain, _) = fleet.chain(&[(OPENAI, json!({})), (KV, json!({}))]);
    for (messages, bytes) in [(4, 1_500), (20, 40_000), (20, 400_000)] {
        for _ in 0..300 {
            let outcome = post(
                &chain,
                "/v1/chat/completions",
                conversation(messages, bytes, 0),
            )
            .await;
            if outcome.decision()["how"] == "local" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let outcome = post(
            &chain,
            "/v1/chat/completions",
            conversation(messages, bytes, 0),
        )
        .await;
        let held = &outcome.context.prompt.blocks;
        let change = KvChange::Stored {
            shelf: Shelf::default(),
            hashes: held[..held.len() * 9 / 10].to_vec(),
        };
        fleet
            .services
            .kv_index
            .apply(fleet.endpoints[1].slot, &change);
        let mut times = Vec::new();
        let mut inner = Vec::new();
        for round in 1..200 {
            let body = conversation(messages, bytes, round);
            let started = Instant::now();
            let outcome = post(&chain, "/v1/chat/completions", body).await;
            times.push(started.elapsed());
            inner.push(Duration::from_micros(
                outcome.decision()["decision_us"].as_u64().unwrap(),
            ));
        }
        let how = outcome.decision()["how"].clone();
        let tokens = outcome.context.prompt.tokens;
        println!(
            "{bytes} bytes, {tokens} tokens, {how}: whole chain {:?}, decision alone {:?} (medians, next turns)",
            median(times),
            median(inner)
        );
    }
}

#[test]
#[ignore = "prints figures"]
fn the_cost_of_parsing() {
    for bytes in [1_500, 8_000, 40_000, 400_000] {
        let body = bytes::Bytes::from(conversation(20, bytes, 1));
        let started = Instant::now();
        for _ in 0..500 {
            std::hint::black_box(OpenAiRequest::parse(
                Api::Chat,
                &body,
                StreamLimits::default(),
            ))
            .unwrap();
        }
        println!("parse {bytes} bytes: {:?}", started.elapsed() / 500);
    }
}

#[tokio::test]
#[ignore = "prints figures"]
async fn the_cost_of_an_event() {
    let fleet = Fleet::new(
        &[Via::Local],
        &vllm(""),
        Arc::new(|_, _| (StatusCode::NOT_FOUND, String::new())),
    );
    let (chain, _) = fleet.chain(&[(OPENAI, json!({}))]);
    let mut outcome = post(&chain, "/v1/chat/completions", conversation(2, 100, 0)).await;
    let mut observer = outcome.observer();
    let raw = b"data: {\"id\":\"chatcmpl-96e84f8bedc071b9\",\"object\":\"chat.completion.chunk\",\"created\":1795337681,\"model\":\"smollm2\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" obvious\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n";
    let at = Instant::now();
    let started = Instant::now();
    for _ in 0..1_000_000 {
        assert_eq!(
            std::hint::black_box(&mut observer).on_event(&Event { raw }, at),
            Edit::Keep
        );
    }
    println!(
        "one event of {} bytes: {:?} (no metrics recorder)",
        raw.len(),
        started.elapsed() / 1_000_000
    );
    observer.on_end(End::Complete, &mut LogFields::default());
}

#[test]
#[ignore = "prints figures"]
fn the_cost_of_the_index() {
    use outrigger_filters::kv_index::{KvIndex, Overlaps};
    let index = KvIndex::default();
    let slots: Vec<usize> = (0..64)
        .map(|i| index.slot(&format!("e{i}").as_str().into()))
        .collect();
    let chain: Vec<u64> = (0..1_000_000u64)
        .map(|i| xxhash_rust::xxh3::xxh3_64(&i.to_le_bytes()))
        .collect();
    let started = Instant::now();
    for (part, hashes) in chain.chunks(chain.len() / slots.len()).enumerate() {
        let change = KvChange::Stored {
            shelf: Shelf::default(),
            hashes: hashes.to_vec(),
        };
        index.apply(slots[part % slots.len()], &change);
    }
    println!(
        "store: {:?} a block",
        started.elapsed() / chain.len() as u32
    );
    let mut out = Overlaps::default();
    for depth in [1, 32, 320, 3200] {
        let started = Instant::now();
        for round in 0..1000 {
            let from = (round * 97) % (chain.len() - depth);
            index.overlaps(&chain[from..from + depth], &mut out);
        }
        println!("lookup of {depth} blocks: {:?}", started.elapsed() / 1000);
    }
    let started = Instant::now();
    index.clear(slots[0]);
    println!("clear one of 64 engines: {:?}", started.elapsed());
}
