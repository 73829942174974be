//! Who pairs with whom of an SGLang's halves, who is late, and what becomes of those without a partner.

use super::disaggregation::{CHAT, always, chat, disaggregation};
use super::disaggregation_sglang::{Fleet, config, half, start};
use outrigger_conformance::{
    harness::{ProxyBuilder, Version, free_address},
    sim::{Bootstrap, Config, Fault, FaultKind, Side, SimEngine},
};
use serde_json::{Value, json};
use std::time::Duration;

/// Pages of another size.
fn other_pages(side: Side) -> Config {
    Config {
        block_size: 16,
        kv_blocks: 2912,
        ..half(side)
    }
}

/// So many fallbacks had these labels; all proxies of a test run count together.
async fn fallbacks(fleet: &Fleet, labels: &str) -> f64 {
    let name = "outrigger_disaggregation_fallbacks_total";
    fleet.proxy.metric(name, labels).await
}

/// The head of an answer that is no stream comes after its last token: that is no prefill's time.
#[tokio::test]
async fn a_whole_answer_takes_as_long_as_it_takes() {
    let slow = Config {
        decode_itl_ms: 120.0,
        ..half(Side::Decode)
    };
    let fields = always(json!({"prefill_timeout_ms": 3000}));
    let prefill = vec![half(Side::Prefill)];
    let fleet = Fleet::start(prefill, vec![slow], vec![config()], fields).await;
    let body = chat(1, &json!({"max_tokens": 50, "ignore_eos": true}));
    let begun = std::time::Instant::now();
    let record = fleet.same(Version::H1, CHAT, &body).await;
    assert!(begun.elapsed() > Duration::from_secs(5));
    assert_eq!(record["fallback"], Value::Null, "{record}");
    let took = record["prefill_ms"].as_u64().unwrap();
    assert!(took < 3000, "prefill was over long before: {record}");
    assert_eq!(fleet.met(), 1);
}

#[tokio::test]
async fn a_stream_without_a_token_after_prefill_is_given_up() {
    let fields = always(json!({"prefill_timeout_ms": 3000}));
    let (prefill, decode) = (vec![half(Side::Prefill)], vec![half(Side::Decode)]);
    let fleet = Fleet::start(prefill, decode, vec![config()], fields).await;
    fleet.decode[0].fault(Fault::new(FaultKind::Stall));
    let body = chat(1, &json!({"stream": true}));
    let record = fleet.same(Version::H1, CHAT, &body).await;
    assert_eq!(record["fallback"], json!(["decode", "timeout"]));
    assert_eq!(fleet.met(), 1, "prefill was over");
    let labels = r#"leg="decode",outcome="whole",reason="timeout""#;
    assert!(fallbacks(&fleet, labels).await >= 1.0);
    fleet.idle().await;
}

/// What a leg answered holds a place until it is dropped: with room for two legs that would leave room for one.
#[tokio::test]
async fn what_failed_leaves_room_for_the_next_pair() {
    let (prefill, decode) = (vec![half(Side::Prefill)], vec![half(Side::Decode)]);
    let fleet = Fleet::build(prefill, decode, Vec::new(), |builder| {
        builder
            .edit(disaggregation(always(json!({}))))
            .edit(|bootstrap| {
                for cluster in &mut bootstrap.clusters {
                    cluster.circuit_breakers.default.max_requests = 2;
                }
            })
    })
    .await;
    let labels = r#"leg="decode",outcome="pair",reason="refused""#;
    let before = fallbacks(&fleet, labels).await;
    fleet.decode[0].fault(Fault::new(FaultKind::Http500));
    let record = fleet.same(Version::H1, CHAT, &chat(1, &json!({}))).await;
    assert_eq!(record["fallback"], json!(["decode", "refused"]));
    assert!(fallbacks(&fleet, labels).await > before);
    fleet.idle().await;
}

/// A request that enters at any proxy of a fleet of halves.
#[tokio::test]
async fn halves_meet_across_proxies() {
    let (prefill, decode) = (start(half(Side::Prefill)), start(half(Side::Decode)));
    let beside = |engine: &SimEngine, inbound: &str, peer: &str| {
        ProxyBuilder::new()
            .flag("--engine", &engine.url())
            .flag("--inbound", inbound)
            .flag("--peer", peer)
            .edit(disaggregation(always(json!({}))))
            .start()
    };
    // To a proxy both are names of other machines; the rooms are at the first.
    let decode_inbound = format!("127.2:{}", free_address().port());
    let decode_url = format!("http://{decode_inbound}");
    let at_prefill = beside(&prefill, "127.1:0", &decode_url);
    let prefill_url = format!("http://127.1:{}", at_prefill.inbound().port());
    let at_decode = beside(&decode, &decode_inbound, &prefill_url);
    let gateway = ProxyBuilder::new()
        .flag("--peer", &prefill_url)
        .flag("--peer", &decode_url)
        .edit(disaggregation(always(json!({}))))
        .start();
    let mut fleet = Fleet {
        prefill: vec![prefill],
        decode: vec![decode],
        whole: Vec::new(),
        proxy: at_prefill,
    };
    let mut keep = Vec::new();
    for (at, next) in [Some(at_decode), Some(gateway), None]
        .into_iter()
        .enumerate()
    {
        fleet.proxy.wait_alive(2).await;
        for (seed, more) in [json!({}), json!({"stream": true})].iter().enumerate() {
            let record = fleet.same(Version::H1, CHAT, &chat(seed, more)).await;
            assert_eq!(record["fallback"], Value::Null, "{at}: {record}");
        }
        assert_eq!(fleet.met(), 2 * (at + 1));
        if let Some(next) = next {
            keep.push(std::mem::replace(&mut fleet.proxy, next));
        }
    }
    fleet.idle().await;
}

#[tokio::test]
async fn halves_with_pages_of_other_sizes_are_no_pair() {
    let prefill = other_pages(Side::Prefill);
    let decode = vec![half(Side::Decode)];
    let fields = always(json!({}));
    let fleet = Fleet::start(vec![prefill], decode, vec![config()], fields).await;
    let record = fleet.same(Version::H1, CHAT, &chat(1, &json!({}))).await;
    assert_eq!(record["fallback"], json!(["prefill", "page_size"]));
    assert_eq!(fleet.met(), 0);
    fleet.idle().await;
}

/// One of each pairs: whoever the policy likes best, nobody is sent to a partner that does not fit.
#[tokio::test]
async fn of_several_halves_those_that_fit_are_paired() {
    let fields = always(json!({}));
    let prefill = vec![other_pages(Side::Prefill), half(Side::Prefill)];
    let odd = Config {
        block_size: 8,
        kv_blocks: 5824,
        ..half(Side::Decode)
    };
    let decode = vec![odd.clone(), half(Side::Decode), odd];
    let fleet = Fleet::start(prefill, decode, Vec::new(), fields).await;
    for seed in 0..8 {
        let body = chat(seed, &json!({"stream": seed % 2 == 0}));
        let record = fleet.same(Version::H1, CHAT, &body).await;
        assert_eq!(record["fallback"], Value::Null, "{record}");
    }
    assert_eq!(fleet.prefill[1].rooms().1, 8);
    fleet.idle().await;
}

/// The engine for prefill is told wrong where it is met; it says in its stream, with status 200, that nobody came.
#[tokio::test]
async fn a_prefill_that_fails_in_its_stream_ends_the_other_leg() {
    let prefill = start(Config {
        bootstrap: Some(Bootstrap {
            wait: Duration::from_millis(300),
            ..Bootstrap::new(Side::Prefill)
        }),
        ..half(Side::Prefill)
    });
    let (decode, whole) = (start(half(Side::Decode)), start(config()));
    let nowhere = format!(
        "{};bootstrap=127.0.0.2:{}",
        prefill.url(),
        free_address().port()
    );
    let proxy = ProxyBuilder::new()
        .flag("--engine", &nowhere)
        .flag("--engine", &decode.url())
        .flag("--engine", &whole.url())
        .edit(disaggregation(always(json!({}))))
        .start();
    proxy.wait_alive(3).await;
    let fleet = Fleet {
        prefill: vec![prefill],
        decode: vec![decode],
        whole: vec![whole],
        proxy,
    };
    let labels = r#"leg="prefill",outcome="whole",reason="failed""#;
    let before = fallbacks(&fleet, labels).await;
    let body = chat(1, &json!({"stream": true}));
    let record = fleet.same(Version::H1, CHAT, &body).await;
    assert_eq!(record["fallback"], json!(["prefill", "failed"]));
    assert!(fallbacks(&fleet, labels).await > before);
    fleet.idle().await;
}

#[tokio::test]
async fn what_an_engine_says_against_the_request_is_counted_as_its_answer() {
    let (prefill, decode) = (vec![half(Side::Prefill)], vec![half(Side::Decode)]);
    let fleet = Fleet::start(prefill, decode, Vec::new(), always(json!({}))).await;
    let labels = r#"outcome="answered",reason="refused""#;
    let before = fallbacks(&fleet, labels).await;
    let body = chat(1, &json!({"temperature": -1}));
    let (status, text, _) = fleet.ask(Version::H1, CHAT, &body).await;
    assert_eq!(status, 400, "{text}");
    assert!(fallbacks(&fleet, labels).await > before);
}
