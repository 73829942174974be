//! TensorRT-LLM, live: a fake engine whose events are gone once they are read.

use crate::engine::{ID, config};
use crate::listener::{Listener, Picture};
use crate::support::{FakeEngine, MODEL, canonical, prompt};
use outrigger_gpu_agent::{EngineConfig, Hub};
use outrigger_xds::feed::FeedSource;
use outrigger_xds::report::{EngineKind, Shelf, Tier};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

async fn start() -> FakeEngine {
    let models = format!(
        r#"{{"object":"list","data":[{{"id":"{MODEL}","object":"model","created":1,"owned_by":"tensorrt_llm"}}]}}"#
    );
    let bodies = HashMap::from([
        ("/version", r#"{"version":"1.2.1"}"#.to_owned()),
        ("/v1/models", models),
        ("/metrics", "[]".to_owned()),
    ]);
    FakeEngine::start_with(|inner| inner.bodies = Some(bodies)).await
}

fn watch(engine: &FakeEngine) -> (Arc<Hub>, Listener) {
    let hub = Hub::new();
    hub.watch(EngineConfig {
        kv_events_timeout: Duration::from_millis(500),
        ..config(engine)
    });
    let listener = Listener::new(hub.subscribe());
    (hub, listener)
}

/// An engine that told of this prompt, and is watched.
async fn known(prompt: &[u32]) -> (FakeEngine, Arc<Hub>, Listener) {
    let engine = start().await;
    tell(&engine, &[created(0), event(1, &stored(prompt, 0))]);
    let (hub, mut listener) = watch(&engine);
    holds(&mut listener, "first events", &[prompt]).await;
    (engine, hub, listener)
}

fn answer(engine: &FakeEngine, status: Option<u16>, body: impl Into<String>) {
    let mut inner = engine.inner.lock().unwrap();
    inner.drained.push_back((status, body.into()));
}

fn tell(engine: &FakeEngine, elements: &[String]) {
    answer(engine, Some(200), format!("[{}]", elements.join(",")));
}

fn event(id: u64, data: &str) -> String {
    format!(r#"{{"event_id":{id},"data":{data},"window_size":2048}}"#)
}

fn created(id: u64) -> String {
    event(
        id,
        r#"{"type":"created","num_blocks_per_cache_level":[100,10]}"#,
    )
}

/// The engine's own name of the block that ends `prompt`.
fn name(prompt: &[u32]) -> u64 {
    u64::from(prompt[0]) * 1_000_003 + prompt.len() as u64
}

/// Blocks of 32 tokens, from block `from` on.
fn stored(prompt: &[u32], from: usize) -> String {
    let block = |end: usize| {
        let end = end.min(prompt.len());
        let tokens: Vec<String> = prompt[(end - 1) / 32 * 32..end]
            .iter()
            .map(|id| format!(r#"{{"type":"unique_token","token_id":{id},"token_extra_id":0}}"#))
            .collect();
        format!(
            r#"{{"type":"stored_block","block_hash":{},"tokens":[{}],"cache_level":0,"priority":35}}"#,
            name(&prompt[..end]),
            tokens.join(",")
        )
    };
    let ends = (from + 1..=prompt.len().div_ceil(32)).map(|index| block(index * 32));
    let blocks = ends.collect::<Vec<_>>().join(",");
    let parent = match from {
        0 => "null".to_owned(),
        from => name(&prompt[..from * 32]).to_string(),
    };
    format!(r#"{{"type":"stored","parent_hash":{parent},"blocks":[{blocks}]}}"#)
}

fn removed(prompt: &[u32]) -> String {
    format!(r#"{{"type":"removed","block_hashes":[{}]}}"#, name(prompt))
}

fn moved(prompt: &[u32], from: u32, to: u32) -> String {
    format!(
        r#"{{"type":"updated","block_hash":{},"cache_level":{{"type":"event_diff","new_value":{to},"old_value":{from}}},"priority":null}}"#,
        name(prompt)
    )
}

async fn holds(listener: &mut Listener, what: &str, prompts: &[&[u32]]) -> Picture {
    let expected = canonical(prompts);
    listener
        .until(ID, what, |picture| picture.device() == expected)
        .await
}

#[tokio::test]
async fn what_the_engine_tells_is_known_wherever_its_blocks_are() {
    let engine = start().await;
    let (a, b) = (prompt(1, 3), prompt(2, 1));
    // The end of `b`'s prompt is a block that is not full.
    let longer = [&b[..], &[9, 9, 9]].concat();
    tell(
        &engine,
        &[
            created(0),
            event(1, &stored(&a, 0)),
            event(2, &stored(&longer, 0)),
        ],
    );
    let (_hub, mut listener) = watch(&engine);
    holds(&mut listener, "first events", &[&a, &b]).await;
    let picture = listener
        .until(ID, "all of its history", |picture| {
            picture.complete && picture.state.kv_events
        })
        .await;
    let state = &picture.state;
    assert_eq!(
        (state.kind, state.version.as_str(), state.reason.as_str()),
        (EngineKind::TrtLlm, "1.2.1", "")
    );
    assert_eq!((state.block_tokens, state.dp_size), (32, 1));
    tell(
        &engine,
        &[event(3, &removed(&a)), event(4, &moved(&b, 0, 1))],
    );
    holds(&mut listener, "one block less, one on its way", &[&a[..64]]).await;
    let host = Shelf {
        rank: 0,
        tier: Tier::Host,
    };
    let on_host = listener
        .until(ID, "a block in host memory", |picture| {
            picture.blocks.get(&host) == Some(&canonical(&[&b]))
        })
        .await;
    assert_eq!(on_host.epoch, picture.epoch, "one history");
    tell(
        &engine,
        &[event(5, &moved(&b, 1, 0)), event(6, &removed(&a[..64]))],
    );
    holds(&mut listener, "it is back", &[&a[..32], &b]).await;
}

#[tokio::test]
async fn a_gap_voids_what_was_known() {
    let engine = start().await;
    let (a, b) = (prompt(1, 2), prompt(2, 2));
    tell(&engine, &[created(0), event(1, &stored(&a, 0))]);
    let (_hub, mut listener) = watch(&engine);
    let before = holds(&mut listener, "first events", &[&a]).await;
    // Event 2 went to somebody else. Block 1 of `a` follows one that is not known any more.
    tell(
        &engine,
        &[event(3, &stored(&b, 0)), event(4, &stored(&a, 1))],
    );
    let after = holds(&mut listener, "what came after the gap", &[&b]).await;
    assert!(after.epoch != before.epoch && !after.complete);
    // Between two events of one answer as well.
    tell(
        &engine,
        &[event(5, &stored(&a, 0)), event(9, &stored(&a[..32], 0))],
    );
    holds(&mut listener, "what came after the second", &[&a[..32]]).await;
}

#[tokio::test]
async fn an_engine_that_begins_anew_has_forgotten_everything() {
    let mut engine = start().await;
    let (a, b) = (prompt(1, 2), prompt(2, 2));
    tell(&engine, &[created(7), event(8, &stored(&a, 0))]);
    let (_hub, mut listener) = watch(&engine);
    let late = holds(&mut listener, "what is told now", &[&a]).await;
    assert!(!late.complete, "what was before event 7 is not known");
    // So quickly that no poll sees it gone.
    let narrower = |event: String| event.replace("2048", "512");
    let new = [created(0), event(1, &stored(&b, 0))].map(narrower);
    tell(&engine, &new);
    holds(
        &mut listener,
        "the new one's, whose window is its own",
        &[&b],
    )
    .await;
    listener
        .until(ID, "all of it", |picture| picture.complete)
        .await;
    engine.die().await;
    holds(&mut listener, "nothing of a dead one", &[]).await;
    engine.rise();
    tell(&engine, &[created(0), event(1, &stored(&a, 0))]);
    holds(&mut listener, "the third one's", &[&a]).await;
}

#[tokio::test]
async fn what_cannot_be_read_voids_what_was_known_and_is_survived() {
    let (a, b) = (prompt(1, 2), prompt(2, 2));
    let (engine, _hub, mut listener) = known(&a).await;
    answer(&engine, Some(200), "<html>");
    holds(&mut listener, "nothing, as blocks may be gone", &[]).await;
    tell(&engine, &[event(2, &stored(&b, 0))]);
    let after = holds(&mut listener, "what came after", &[&b]).await;
    assert!(!after.complete);
}

#[tokio::test]
async fn an_answer_that_is_lost_shows_as_a_gap() {
    let (a, b) = (prompt(1, 2), prompt(2, 2));
    let (engine, _hub, mut listener) = known(&a).await;
    let asked = Instant::now();
    // Event 2 is in an answer that takes longer than anybody waits.
    answer(&engine, None, "");
    let slow = listener
        .until(
            ID,
            "silence, and nothing known as blocks may be gone",
            |picture| !picture.state.kv_events && picture.device().is_empty(),
        )
        .await;
    assert!(
        slow.state.reason.contains("no answer within"),
        "{}",
        slow.state.reason
    );
    tell(&engine, &[event(3, &stored(&b, 0))]);
    holds(&mut listener, "what came after", &[&b]).await;
    let pause = asked.elapsed();
    assert!(
        pause > Duration::from_secs(3),
        "it reads for who does not listen any more: {pause:?}"
    );
}

#[tokio::test]
async fn an_engine_that_is_never_quiet_is_left_alone() {
    let engine = start().await;
    for _ in 0..3 {
        answer(&engine, None, "");
    }
    let (_hub, mut listener) = watch(&engine);
    let busy = listener
        .until(ID, "it is left alone", |picture| {
            picture
                .state
                .reason
                .contains("answers only when it is quiet")
        })
        .await;
    assert!(!busy.state.kv_events, "routing goes by what was sent");
    listener.listen(Duration::from_secs(4)).await;
    assert_eq!(engine.requests("/kv_cache_events"), 3);
}

#[tokio::test]
async fn an_answer_that_is_too_long_voids_what_was_known() {
    let (a, b) = (prompt(1, 2), prompt(2, 2));
    let (engine, _hub, mut listener) = known(&a).await;
    answer(&engine, Some(200), " ".repeat((64 << 20) + 1));
    holds(&mut listener, "nothing, as blocks may be gone", &[]).await;
    tell(&engine, &[event(3, &stored(&b, 0))]);
    let after = holds(&mut listener, "what came after", &[&b]).await;
    assert!(!after.complete);
}

#[tokio::test]
async fn an_engine_that_tells_nothing_is_an_engine_all_the_same() {
    for (status, reason) in [
        (200, "event_buffer_max_size"),
        (404, "POST /kv_cache_events answered 404"),
    ] {
        let engine = start().await;
        if status != 200 {
            answer(&engine, Some(status), "");
        }
        let (_hub, mut listener) = watch(&engine);
        let picture = listener
            .until(ID, reason, |picture| picture.state.reason.contains(reason))
            .await;
        assert!(!picture.state.kv_events, "{:?}", picture.state);
        assert_eq!(picture.state.kind, EngineKind::TrtLlm);
        if status == 404 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(
                engine.requests("/kv_cache_events"),
                1,
                "it is not asked again soon"
            );
        }
    }
}
