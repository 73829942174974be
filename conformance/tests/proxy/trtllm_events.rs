//! A TensorRT-LLM's KV events reach the index: a prompt goes where its beginning is, and a gap costs what was known. That
//! engine is simulated from its source alone; what goes wrong on the wire has its cases beside the adapter (`gpu-agent`).

use http::Method;
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, TestProxy, Version, eventually, hosts, request},
    sim::{Config, Fault, FaultKind, Profile, SimEngine},
};
use outrigger_proxy::bootstrap::FLEET;
use serde_json::json;
use std::time::{Duration, Instant};

const COMPLETIONS: &str = "/v1/completions";
/// Six blocks and a little more.
const PROMPT_TOKENS: usize = 200;

fn engine() -> SimEngine {
    let config = Config {
        profile: Profile::Trtllm,
        decode_itl_ms: 1.0,
        ..Config::default()
    };
    SimEngine::start(config).unwrap()
}

fn prompt(token: u32) -> String {
    json!({"model": "sim", "prompt": vec![token; PROMPT_TOKENS], "max_tokens": 1}).to_string()
}

/// Asks an engine past its proxy.
async fn compute(engine: &SimEngine, token: u32) {
    let mut client = Client::connect(engine.http_addr, Version::H1).await;
    let reply = client
        .send(request(Method::POST, COMPLETIONS, prompt(token)))
        .await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// Longer than an engine is left alone that once did not answer, as on a busy machine it may not.
const INDEXED_PATIENCE: Duration = Duration::from_secs(80);

async fn indexed(proxy: &TestProxy, engine: &SimEngine, blocks: usize) {
    let label = engine.http_addr.to_string();
    let look = async {
        while proxy.metric("outrigger_kv_index_blocks", &label).await != blocks as f64 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let in_time = tokio::time::timeout(INDEXED_PATIENCE, look).await;
    in_time.expect("its blocks are indexed");
}

#[tokio::test]
async fn a_prompt_goes_to_the_trtllm_that_holds_its_beginning() {
    let engines = [engine(), engine(), engine()];
    let builder = ProxyBuilder::new().flag("--policy", "kv");
    let proxy = engines
        .iter()
        .fold(builder, |builder, engine| builder.engine(engine.http_addr))
        .start();
    proxy.wait_alive(engines.len()).await;
    for (at, engine) in engines.iter().enumerate() {
        compute(engine, 300 + at as u32).await;
        indexed(&proxy, engine, 6).await;
    }
    let mut client = proxy.client(Version::H1).await;
    for (at, engine) in engines.iter().enumerate() {
        let reply = client.post(COMPLETIONS, prompt(300 + at as u32)).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let line = proxy.log(at + 1).await.swap_remove(at);
        assert_eq!(line["prefix_hit_tokens"], 192, "{line}");
        let host = line["upstream_host"].as_str().unwrap();
        assert!(host.ends_with(&engine.http_addr.to_string()), "{line}");
    }
}

#[tokio::test]
async fn what_another_reader_took_is_noticed_and_costs_what_was_known() {
    let engine = engine();
    let proxy = ProxyBuilder::new()
        .flag("--policy", "kv")
        .engine(engine.http_addr)
        .start();
    proxy.wait_alive(1).await;
    compute(&engine, 300).await;
    compute(&engine, 301).await;
    indexed(&proxy, &engine, 12).await;
    engine.fault(Fault::new(FaultKind::LoseEvents));
    compute(&engine, 302).await;
    compute(&engine, 303).await;
    indexed(&proxy, &engine, 6).await;
    let label = engine.http_addr.to_string();
    let gaps = proxy.metric("outrigger_kv_event_gaps_total", &label).await;
    assert_eq!(gaps, 1.0);
}

#[tokio::test]
async fn an_engine_under_steady_load_does_not_answer_and_is_known_again_when_it_is_quiet() {
    let engine = engine();
    compute(&engine, 300).await;
    let proxy = ProxyBuilder::new()
        .flag("--policy", "kv")
        .engine(engine.http_addr)
        .start();
    proxy.wait_alive(1).await;
    let begun = Instant::now();
    let mut token = 301;
    while begun.elapsed() < Duration::from_secs(9) {
        compute(&engine, token).await;
        token += 1;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let busy = eventually("nobody waits any longer", || async {
        let host = hosts(proxy.admin(), FLEET).await.into_iter().next()?;
        let reason = host["outrigger"]["health_reason"].as_str()?.to_owned();
        reason.contains("no answer within 8s").then_some(host)
    })
    .await;
    assert_eq!(busy["outrigger"]["kv_events"], false, "{busy}");
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(COMPLETIONS, prompt(300)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    // The first of them may still go to the question that nobody waits for.
    let label = engine.http_addr.to_string();
    while proxy.metric("outrigger_kv_index_blocks", &label).await == 0.0 {
        assert!(begun.elapsed() < Duration::from_secs(40), "it is quiet now");
        compute(&engine, token).await;
        token += 1;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
}
