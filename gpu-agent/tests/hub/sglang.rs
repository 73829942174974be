//! SGLang, live: a fake engine that answers as a recorded SGLang 0.5.23 did, and publishes pages of one token.

use crate::engine::{ID, config, watch};
use crate::listener::Listener;
use crate::support::{FakeEngine, prompt, stored};
use outrigger_gpu_agent::Hub;
use outrigger_xds::block_hash::{Namespace, chain};
use outrigger_xds::feed::FeedSource;
use outrigger_xds::report::{EngineKind, Health};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

fn recording(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../conformance/fixtures/http-sglang-0.5.23")
        .join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The recorded answers; `/version` and `/metrics` are 404 there, without `--enable-metrics`. Its sockets are ours.
async fn start(change: impl FnOnce(&mut serde_json::Value)) -> FakeEngine {
    let engine = FakeEngine::start().await;
    let mut info: serde_json::Value =
        serde_json::from_str(&recording("get_server_info.body")).unwrap();
    let events = &mut info["kv_events"];
    assert_eq!(events["endpoint_port_base"], 5587, "as recorded");
    events["endpoint_port_base"] = engine.publisher.port().into();
    events["replay_endpoint_port_base"] = engine.replay.port().into();
    change(&mut info);
    let bodies = HashMap::from([
        ("/server_info", info.to_string()),
        ("/v1/loads", recording("get_v1_loads.body")),
        ("/v1/models", recording("get_v1_models.body")),
    ]);
    engine.inner.lock().unwrap().bodies = Some(bodies);
    engine
}

fn answer(engine: &FakeEngine, path: &'static str, body: String) {
    let mut inner = engine.inner.lock().unwrap();
    inner.bodies.as_mut().unwrap().insert(path, body);
}

fn canonical(prompt: &[u32]) -> HashSet<u64> {
    let namespace = Namespace {
        model: "smollm2".into(),
        ..Namespace::default()
    };
    chain(namespace.seed(), prompt, 32).into_iter().collect()
}

#[tokio::test]
async fn sglang_is_detected_and_its_events_followed() {
    let engine = start(|_| {}).await;
    let a = prompt(1, 2);
    engine.lose(vec![stored(&a[..40], 1, 0)]);
    let (_hub, mut listener) = watch(&engine);
    let picture = listener
        .until(ID, "the past", |picture| {
            picture.complete && picture.device() == canonical(&a[..32])
        })
        .await;
    let state = listener
        .until(ID, "its events", |picture| picture.state.kv_events)
        .await
        .state;
    assert_eq!(
        (state.kind, state.version.as_str(), state.health),
        (EngineKind::Sglang, "0.5.23", Health::Healthy)
    );
    assert_eq!(
        (state.block_tokens, state.dp_size, state.reason.as_str()),
        (1, 1, "")
    );
    assert_eq!(state.models[0].id, "smollm2");
    // 24 pages more are the second block.
    engine.publish(vec![stored(&a, 1, 40)]);
    let after = listener
        .until(ID, "pages gathered live", |picture| {
            picture.device() == canonical(&a)
        })
        .await;
    assert_eq!(after.epoch, picture.epoch);
}

#[tokio::test]
async fn load_comes_from_v1_loads_where_there_are_no_metrics() {
    let engine = start(|_| {}).await;
    let (_hub, mut listener) = watch(&engine);
    let idle = listener
        .until(ID, "load", |picture| picture.load.engine_age.is_some())
        .await;
    assert_eq!((idle.load.running, idle.load.waiting), (0, 0));
    let mut loads: serde_json::Value =
        serde_json::from_str(&recording("get_v1_loads.body")).unwrap();
    let rank = &mut loads["loads"][0];
    (rank["num_running_reqs"], rank["num_waiting_reqs"]) = (3.into(), 2.into());
    rank["token_usage"] = 0.5.into();
    let mut second = rank.clone();
    (second["dp_rank"], second["token_usage"]) = (1.into(), 0.25.into());
    loads["loads"].as_array_mut().unwrap().push(second);
    answer(&engine, "/v1/loads", loads.to_string());
    let busy = listener
        .until(ID, "more load", |picture| picture.load.running > 0)
        .await
        .load;
    assert_eq!(
        (busy.running, busy.waiting),
        (6, 4),
        "summed over its ranks"
    );
    assert!((busy.kv_usage - 0.375).abs() < 1e-9, "{}", busy.kv_usage);
    assert_eq!(engine.requests("/health"), 0, "that one generates a token");
}

#[tokio::test]
async fn sglang_without_events_is_an_engine_all_the_same() {
    let engine = start(|info| info["kv_events"] = serde_json::Value::Null).await;
    let hub = Hub::new();
    hub.watch(config(&engine));
    let mut listener = Listener::new(hub.subscribe());
    let picture = listener
        .until(ID, "load", |picture| picture.load.engine_age.is_some())
        .await;
    assert_eq!(
        (picture.state.kind, picture.state.block_tokens),
        (EngineKind::Sglang, 1),
        "page_size stands in"
    );
    assert!(!picture.state.kv_events);
    assert_eq!(engine.subscribers(), 0);
}
