//! A hub against an engine with real sockets, through everything that goes wrong between them.

use crate::listener::{Listener, Picture};
use crate::support::{FakeEngine, canonical, prompt, removed, stored};
use outrigger_gpu_agent::{ApiKey, EngineConfig, Hub, KvEndpoints};
use outrigger_xds::feed::FeedSource;
use outrigger_xds::report::{EngineKind, Health, Role};
use rmpv::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const ID: &str = "node/e";

pub(crate) fn config(engine: &FakeEngine) -> EngineConfig {
    EngineConfig {
        poll_interval: Duration::from_millis(100),
        ..EngineConfig::new(ID.into(), engine.url())
    }
}

pub(crate) fn watch(engine: &FakeEngine) -> (Arc<Hub>, Listener) {
    let hub = Hub::new();
    hub.watch(config(engine));
    let listener = Listener::new(hub.subscribe());
    (hub, listener)
}

/// Watches and waits until events flow.
pub(crate) async fn following(engine: &FakeEngine) -> (Arc<Hub>, Listener) {
    let (hub, mut listener) = watch(engine);
    listener
        .until(ID, "a settled history", |picture| {
            picture.state.kv_events && picture.complete
        })
        .await;
    (hub, listener)
}

#[tokio::test]
async fn an_engine_that_is_slow_to_tell_of_itself_is_alive() {
    let engine = FakeEngine::start_with(|inner| inner.silent = Some("/server_info")).await;
    let (_hub, mut listener) = watch(&engine);
    let picture = listener
        .until(ID, "it is watched all the same", |picture| {
            picture.state.health == Health::Healthy && picture.state.kv_events
        })
        .await;
    assert_eq!(picture.state.numerics, "server_info=untold");
    assert_eq!(engine.requests("/server_info"), 1);
}

#[tokio::test]
async fn an_engine_is_detected_and_its_events_followed() {
    let engine = FakeEngine::start_with(|inner| inner.running = 3).await;
    let (_hub, mut listener) = following(&engine).await;
    let picture = listener
        .until(ID, "load", |picture| picture.load.engine_age.is_some())
        .await;
    let state = picture.state;
    assert_eq!(
        (state.kind, state.version.as_str(), state.health, state.role),
        (EngineKind::Vllm, "0.32.0", Health::Healthy, Role::Both)
    );
    assert_eq!(
        (
            state.block_tokens,
            state.kv_blocks,
            state.dp_size,
            state.reason.as_str()
        ),
        (32, 100, 1, "")
    );
    assert_eq!(
        (state.models[0].id.as_str(), state.models[0].context_tokens),
        ("tiny", 2048)
    );
    assert!(state.models[0].card.starts_with(r#"{"id":"tiny""#));
    assert_eq!((picture.load.running, picture.load.waiting), (3, 0));
    assert!((picture.load.kv_usage - 0.25).abs() < 1e-9);

    let (a, b) = (prompt(1, 3), prompt(2, 2));
    engine.publish(vec![stored(&a, 32, 0)]);
    engine.publish(vec![stored(&b, 32, 0), removed(&a)]);
    listener
        .until(ID, "both prompts", |picture| {
            picture.device() == canonical(&[&a[..64], &b])
        })
        .await;
    engine.publish(vec![Value::Map(vec![(
        "type".into(),
        "AllBlocksCleared".into(),
    )])]);
    listener
        .until(ID, "nothing", |picture| picture.blocks.is_empty())
        .await;
}

#[tokio::test]
async fn fields_of_tomorrow_are_counted_by_engine() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let counted = recorder.handle();
    // The runtime of a test is one thread: this one.
    let _guard = metrics::set_default_local_recorder(&recorder);
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let a = prompt(1, 1);
    // Each has one, as all stores of this engine.
    engine.publish(vec![stored(&a, 32, 0), stored(&a, 32, 0)]);
    engine.publish(vec![removed(&a), removed(&a)]);
    engine.publish(vec![stored(&prompt(2, 1), 32, 0)]);
    listener
        .until(ID, "the last", |picture| {
            picture.device() == canonical(&[&prompt(2, 1)])
        })
        .await;
    let line = "outrigger_kv_blocks_ignored_total{engine=\"node/e\",reason=\"unknown_field\"} 3";
    let page = counted.render();
    assert!(page.contains(line), "{page}");
}

#[tokio::test]
async fn a_lost_batch_is_repaired_by_the_replay() {
    for replay_topic in [true, false] {
        let engine = FakeEngine::start_with(|inner| inner.replay_topic = replay_topic).await;
        let (_hub, mut listener) = following(&engine).await;
        let a = prompt(1, 4);
        engine.publish(vec![stored(&a[..32], 32, 0)]);
        let before = listener
            .until(ID, "one block", |picture| picture.device().len() == 1)
            .await;
        engine.lose(vec![stored(&a[..64], 32, 1)]);
        engine.lose(vec![stored(&a[..96], 32, 2)]);
        engine.publish(vec![stored(&a, 32, 3)]);
        let after = listener
            .until(ID, "all four", |picture| {
                picture.device() == canonical(&[&a])
            })
            .await;
        assert_eq!(
            (after.epoch, after.complete),
            (before.epoch, true),
            "a repaired gap is no new history"
        );
    }
}

#[tokio::test]
async fn a_late_listener_learns_the_past_and_a_partial_one_says_so() {
    let engine = FakeEngine::start().await;
    let (a, b) = (prompt(1, 3), prompt(2, 2));
    engine.publish(vec![stored(&a, 32, 0)]);
    engine.publish(vec![stored(&b, 32, 0)]);
    let (hub, mut listener) = following(&engine).await;
    listener
        .until(ID, "the past", |picture| {
            picture.device() == canonical(&[&a, &b])
        })
        .await;
    drop((hub, listener));

    engine.inner.lock().unwrap().buffered_from = 1;
    let (_hub, mut listener) = watch(&engine);
    let picture = listener
        .until(ID, "what is left of it", |picture| {
            picture.device() == canonical(&[&b])
        })
        .await;
    assert!(!picture.complete, "a history that begins past 0 is partial");
}

#[tokio::test]
async fn a_gap_older_than_the_buffer_clears_and_relearns() {
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let prompts: Vec<Vec<u32>> = (0..5).map(|id| prompt(id, 1)).collect();
    engine.publish(vec![stored(&prompts[0], 32, 0)]);
    let before = listener
        .until(ID, "the first", |picture| picture.device().len() == 1)
        .await;
    for lost in &prompts[1..4] {
        engine.lose(vec![stored(lost, 32, 0)]);
    }
    engine.inner.lock().unwrap().buffered_from = 3;
    engine.publish(vec![stored(&prompts[4], 32, 0)]);
    let after = listener
        .until(ID, "what can be known", |picture| {
            picture.device() == canonical(&[&prompts[3], &prompts[4]])
        })
        .await;
    assert!(!after.complete && after.epoch != before.epoch);
}

#[tokio::test]
async fn a_cut_connection_is_made_again_and_the_gap_replayed() {
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let (a, b) = (prompt(1, 1), prompt(2, 1));
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "the first", |picture| picture.device().len() == 1)
        .await;
    engine.cut();
    listener
        .until(ID, "the loss", |picture| {
            !picture.state.kv_events && picture.state.reason.contains("closed")
        })
        .await;
    engine.lose(vec![stored(&b, 32, 0)]);
    let after = listener
        .until(ID, "both", |picture| {
            picture.device() == canonical(&[&a, &b])
        })
        .await;
    assert_eq!(after.epoch, before.epoch, "the same process goes on");
    let settled = listener
        .until(ID, "a good state", |picture| picture.state.kv_events)
        .await;
    assert_eq!(settled.state.reason, "");
}

#[tokio::test]
async fn a_restart_is_noticed_by_what_the_new_process_publishes() {
    // The start time does not betray it: this is the event socket's own doing.
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let (a, b) = (prompt(1, 3), prompt(2, 1));
    engine.publish(vec![stored(&a, 32, 0)]);
    engine.publish(vec![]);
    let before = listener
        .until(ID, "the first process", |picture| {
            picture.device().len() == 3
        })
        .await;
    {
        let mut inner = engine.inner.lock().unwrap();
        inner.batches.clear();
        inner.next = 0;
    }
    engine.publish(vec![
        Value::Array(vec!["NotTheSame".into()]),
        stored(&b, 32, 0),
    ]);
    let after = listener
        .until(ID, "the second process", |picture| {
            picture.device() == canonical(&[&b])
        })
        .await;
    assert!(after.complete && after.epoch != before.epoch);
}

#[tokio::test]
async fn a_restart_during_a_cut_is_noticed_even_if_it_is_further_already() {
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let a = prompt(1, 3);
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "the first process", |picture| {
            picture.device().len() == 3
        })
        .await;
    engine.cut();
    {
        let mut inner = engine.inner.lock().unwrap();
        inner.batches.clear();
        inner.next = 0;
    }
    let others: Vec<Vec<u32>> = (10..15).map(|id| prompt(id, 1)).collect();
    for other in &others {
        engine.lose(vec![stored(other, 32, 0)]);
    }
    let expected = canonical(&others.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let after = listener
        .until(ID, "the second process", |picture| {
            picture.device() == expected
        })
        .await;
    assert!(after.complete && after.epoch != before.epoch);
}

#[tokio::test]
async fn another_start_time_means_detecting_anew() {
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    engine.publish(vec![stored(&prompt(1, 3), 32, 0)]);
    let before = listener
        .until(ID, "the first process", |picture| {
            picture.device().len() == 3
        })
        .await;
    engine.forget();
    let after = listener
        .until(ID, "an empty one", |picture| {
            picture.epoch != before.epoch && picture.complete
        })
        .await;
    assert!(after.blocks.is_empty());
}

#[tokio::test]
async fn a_dead_engine_loses_its_blocks_fast_and_comes_back() {
    let mut engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let (a, b) = (prompt(1, 3), prompt(2, 1));
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "its blocks", |picture| picture.device().len() == 3)
        .await;
    engine.die().await;
    let died = Instant::now();
    let dead = listener
        .until(ID, "its death", |picture| {
            picture.state.health == Health::Dead
        })
        .await;
    assert!(
        died.elapsed() < Duration::from_secs(1),
        "{:?}",
        died.elapsed()
    );
    assert!(dead.blocks.is_empty(), "the dead hold nothing");
    assert!(
        !dead.state.kv_events && dead.state.reason.contains("refused"),
        "{}",
        dead.state.reason
    );
    engine.forget();
    engine.lose(vec![stored(&b, 32, 0)]);
    engine.rise();
    let risen = Instant::now();
    let back = listener
        .until(ID, "its return", |picture| {
            picture.device() == canonical(&[&b])
        })
        .await;
    assert!(
        risen.elapsed() < Duration::from_secs(3),
        "{:?}",
        risen.elapsed()
    );
    assert_eq!(back.state.health, Health::Healthy);
    assert_ne!(back.epoch, before.epoch);
}

#[tokio::test]
async fn garbage_and_duplicates_do_no_harm() {
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let a = prompt(1, 1);
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "the first", |picture| picture.device().len() == 1)
        .await;
    engine.repeat(0);
    engine.send(vec![b"kv-events".to_vec()]);
    engine.send(vec![b"kv-events".to_vec(), vec![1, 2, 3], vec![]]);
    engine.publish(vec![removed(&a)]);
    let after = listener
        .until(ID, "the removal", |picture| picture.device().is_empty())
        .await;
    assert_eq!(after.epoch, before.epoch);
    assert!(after.state.kv_events);
}

#[tokio::test]
async fn a_batch_of_the_last_number_there_is_does_not_end_the_listening() {
    let engine = FakeEngine::start().await;
    let (_hub, mut listener) = following(&engine).await;
    let (a, b, c) = (prompt(1, 1), prompt(2, 2), prompt(3, 3));
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "the first", |picture| picture.device().len() == 1)
        .await;
    let (_, payload) = engine.inner.lock().unwrap().batches[0].clone();
    engine.send(vec![b"kv-events".to_vec(), vec![0xff; 8], payload]);
    engine.publish(vec![stored(&b, 32, 0)]);
    listener
        .until(ID, "the next", |picture| {
            picture.device() == canonical(&[&a, &b])
        })
        .await;
    engine.publish(vec![stored(&c, 32, 0)]);
    let after = listener
        .until(ID, "the one after", |picture| {
            picture.device() == canonical(&[&a, &b, &c])
        })
        .await;
    assert_eq!(after.epoch, before.epoch);
}

#[tokio::test]
async fn what_an_unreadable_batch_removed_does_not_stay_indexed() {
    let engine = FakeEngine::start().await;
    let (hub, mut listener) = following(&engine).await;
    let (a, b) = (prompt(1, 1), prompt(2, 2));
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "the first", |picture| picture.device().len() == 1)
        .await;
    // Had it been readable, it would have said that `a` is gone.
    let garbage = b"\xc1garbage".to_vec();
    engine.send(vec![
        b"kv-events".to_vec(),
        1u64.to_be_bytes().to_vec(),
        garbage.clone(),
    ]);
    let after = listener
        .until(ID, "a new history", |picture| {
            picture.device().is_empty() && picture.epoch != before.epoch
        })
        .await;
    assert!(!after.complete && after.state.kv_events);
    {
        let mut inner = engine.inner.lock().unwrap();
        inner.batches.push((1, garbage));
        inner.next = 2;
    }
    engine.publish(vec![stored(&b, 32, 0)]);
    let known = |picture: &Picture| picture.device() == canonical(&[&b]);
    let next = listener.until(ID, "what follows", known).await;
    assert_eq!(next.epoch, after.epoch);
    // Who comes later and finds it in the replay begins after it too.
    drop(hub);
    let (_hub, mut late) = watch(&engine);
    let settled = |picture: &Picture| known(picture) && picture.state.kv_events;
    let picture = late.until(ID, "the past", settled).await;
    assert!(!picture.complete);
}

#[tokio::test]
async fn an_engine_that_connects_finds_us_bound() {
    let mut engine = FakeEngine::start_with(|inner| inner.connect_mode = true).await;
    let (_hub, mut listener) = following(&engine).await;
    let (a, b) = (prompt(1, 2), prompt(2, 1));
    engine.publish(vec![stored(&a, 32, 0)]);
    let before = listener
        .until(ID, "its blocks", |picture| {
            picture.device() == canonical(&[&a])
        })
        .await;
    engine.cut();
    engine.lose(vec![stored(&b, 32, 0)]);
    let after = listener
        .until(ID, "the gap", |picture| {
            picture.device() == canonical(&[&a, &b])
        })
        .await;
    assert_eq!(after.epoch, before.epoch);
    engine.die().await;
    listener
        .until(ID, "its death", |picture| {
            picture.state.health == Health::Dead
        })
        .await;
    engine.forget();
    engine.rise();
    listener
        .until(ID, "its return", |picture| {
            picture.state.kv_events && picture.complete
        })
        .await;
}

#[tokio::test]
async fn without_a_replay_the_first_batch_decides() {
    let engine = FakeEngine::start_with(|inner| inner.no_replay = true).await;
    let (a, b) = (prompt(1, 1), prompt(2, 1));
    engine.publish(vec![stored(&a, 32, 0)]);
    let (_hub, mut listener) = watch(&engine);
    listener
        .until(ID, "a connection", |picture| picture.state.kv_events)
        .await;
    // The subscription may still be on its way.
    while engine.subscribers() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    engine.publish(vec![stored(&b, 32, 0)]);
    let picture = listener
        .until(ID, "the second", |picture| {
            picture.device() == canonical(&[&b])
        })
        .await;
    assert!(!picture.complete);
    engine.lose(vec![]);
    engine.publish(vec![stored(&a, 32, 0)]);
    let after = listener
        .until(ID, "a fresh start", |picture| {
            picture.device() == canonical(&[&a])
        })
        .await;
    assert_ne!(
        after.epoch, picture.epoch,
        "a gap that can't be filled voids what was known"
    );
}

#[tokio::test]
async fn a_refused_key_is_said_and_not_tried_hot() {
    let engine = FakeEngine::start_with(|inner| inner.key = Some("right".into())).await;
    let (_hub, mut listener) = watch(&engine);
    let picture = listener
        .until(ID, "the complaint", |picture| {
            picture.state.reason.contains("401")
        })
        .await;
    assert_eq!(
        (picture.state.health, picture.state.models.len()),
        (Health::Healthy, 0)
    );
    listener.listen(Duration::from_secs(2)).await;
    assert_eq!(engine.requests("/v1/models"), 1, "not again within 30 s");
    assert!(
        engine.requests("/metrics") > 5,
        "what is allowed is polled on"
    );

    let hub = Hub::new();
    hub.watch(EngineConfig {
        api_key: Some(ApiKey::new("right\n")),
        ..config(&engine)
    });
    let mut listener = Listener::new(hub.subscribe());
    let picture = listener
        .until(ID, "the models", |picture| !picture.state.models.is_empty())
        .await;
    assert_eq!(picture.state.reason, "");
}

#[tokio::test]
async fn endpoints_can_be_told_where_an_engine_does_not() {
    let engine = FakeEngine::start_with(|inner| inner.block_tokens = 16).await;
    let hub = Hub::new();
    let kv_endpoints = KvEndpoints {
        endpoint: format!("tcp://*:{}", engine.publisher.port()),
        replay_endpoint: Some(format!("tcp://*:{}", engine.replay.port())),
        topic: String::new(),
    };
    hub.watch(EngineConfig {
        kv_endpoints: Some(kv_endpoints),
        ..config(&engine)
    });
    let mut listener = Listener::new(hub.subscribe());
    listener
        .until(ID, "a settled history", |picture| picture.complete)
        .await;
    let a = prompt(1, 2);
    engine.publish(vec![stored(&a, 16, 0)]);
    listener
        .until(ID, "gathered blocks", |picture| {
            picture.device() == canonical(&[&a])
        })
        .await;
    engine.publish(vec![stored(&prompt(2, 3), 24, 0)]);
    let picture = listener
        .until(ID, "the complaint", |picture| {
            !picture.state.reason.is_empty()
        })
        .await;
    assert!(
        picture.state.reason.contains("[24]"),
        "{}",
        picture.state.reason
    );
}

#[tokio::test]
async fn anything_that_speaks_http_is_an_engine_of_unknown_kind() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut bytes = [0u8; 4096];
                while let Ok(1..) = tokio::io::AsyncReadExt::read(&mut stream, &mut bytes).await {
                    let answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
                    tokio::io::AsyncWriteExt::write_all(&mut stream, answer)
                        .await
                        .unwrap();
                }
            });
        }
    });
    let hub = Hub::new();
    hub.watch(EngineConfig {
        poll_interval: Duration::from_millis(100),
        ..EngineConfig::new(ID.into(), url)
    });
    let mut feed = Listener::new(hub.subscribe());
    let picture = feed
        .until(ID, "health", |picture| {
            picture.state.health == Health::Healthy
        })
        .await;
    assert_eq!(
        (picture.state.kind, picture.state.kv_events),
        (EngineKind::Unknown, false)
    );
    server.abort();
    let _ = server.await;
    feed.until(ID, "death", |picture| picture.state.health == Health::Dead)
        .await;
}
