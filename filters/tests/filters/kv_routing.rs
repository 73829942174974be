//! The `kv_routing` filter: which endpoint comes first, and what is written down of it.

use crate::fleet::{Engine, Fleet, KV, OPENAI, Outcome, post, run, vllm};
use http::StatusCode;
use outrigger_filters::{body::RequestBody, endpoints::Via, filter::Chain};
use outrigger_xds::{
    block_hash::{self, BlockHash, Namespace},
    report::{KvChange, Load, Shelf, Tier},
};
use serde_json::json;
use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering::Relaxed},
};

fn silent() -> Engine {
    Arc::new(|_, _| (StatusCode::NOT_FOUND, "{}".into()))
}

fn ids(count: u32) -> Vec<u32> {
    (1000..1000 + count).collect()
}

fn hashes(ids: &[u32], lora: Option<&str>, salt: Option<&str>) -> Vec<BlockHash> {
    let namespace = Namespace {
        model: "m".into(),
        lora: lora.map(Into::into),
        salt: salt.map(Into::into),
    };
    block_hash::chain(namespace.seed(), ids, 32)
}

fn holds(fleet: &Fleet, index: usize, shelf: Shelf, hashes: &[BlockHash]) {
    let change = KvChange::Stored {
        shelf,
        hashes: hashes.to_vec(),
    };
    fleet
        .services
        .kv_index
        .apply(fleet.endpoints[index].slot, &change);
}

fn device(fleet: &Fleet, index: usize, hashes: &[BlockHash]) {
    holds(fleet, index, Shelf::default(), hashes);
}

fn chain(fleet: &Fleet, config: serde_json::Value) -> Chain {
    fleet.chain(&[(OPENAI, json!({})), (KV, config)]).0
}

async fn complete(chain: &Chain, ids: &[u32]) -> Outcome {
    post(
        chain,
        "/v1/completions",
        json!({"model": "m", "prompt": ids}).to_string(),
    )
    .await
}

const THREE: [Via; 3] = [Via::Local, Via::Peer, Via::Peer];

#[tokio::test]
async fn the_longest_prefix_wins_and_the_prediction_obeys_the_last_token_rule() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({"decision_header": true}));
    let ids = ids(320);
    let blocks = hashes(&ids, None, None);
    device(&fleet, 1, &blocks[..4]);
    device(&fleet, 2, &blocks);
    let outcome = complete(&chain, &ids).await;
    assert_eq!(
        outcome.names(),
        ["e2", "e1", "e0"],
        "all candidates, best first"
    );
    let hits: Vec<Option<u64>> = outcome
        .context
        .ranked
        .iter()
        .map(|ranked| ranked.hit_tokens)
        .collect();
    assert_eq!(
        hits,
        [Some(288), Some(128), Some(0)],
        "of 320 tokens held the last block is computed again"
    );
    let costs: Vec<f64> = outcome
        .context
        .ranked
        .iter()
        .map(|ranked| ranked.cost)
        .collect();
    assert_eq!(costs, [10.0, 16.0, 20.0]);
    assert_eq!(outcome.context.prompt.tokens, 320);
    assert!(outcome.context.prompt.ids.is_none(), "nobody keeps them");
    assert_eq!(*outcome.context.prompt.blocks, blocks[..]);
    assert_eq!(outcome.context.log.hit_tokens_predicted, Some(288));
    let decision = outcome.decision();
    assert_eq!(
        (&decision["policy"], &decision["how"], &decision["exact"]),
        (&json!("kv"), &json!("ids"), &json!(true))
    );
    assert_eq!(decision["winner"]["endpoint"], "e2");
    assert_eq!(decision["winner"]["blocks"], json!([10, 0, 0, 0]));
    assert_eq!(
        (
            &decision["runner_up"]["endpoint"],
            &decision["runner_up"]["cost"]
        ),
        (&json!("e1"), &json!(16.0))
    );
    assert_eq!(
        outcome.headers["x-outrigger-decision"],
        outcome.context.log.routing_decision.as_deref().unwrap()
    );
}

#[tokio::test]
async fn adapters_and_salts_are_name_spaces_of_their_own() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    device(&fleet, 0, &hashes(&ids, None, None));
    device(&fleet, 1, &hashes(&ids, Some("m-lora"), None));
    device(&fleet, 2, &hashes(&ids, None, Some("s")));
    for (body, expected) in [
        (json!({"model": "m", "prompt": ids}), "e0"),
        (json!({"model": "m-lora", "prompt": ids}), "e1"),
        (
            json!({"model": "m", "prompt": ids, "cache_salt": "s"}),
            "e2",
        ),
    ] {
        let outcome = post(&chain, "/v1/completions", body.to_string()).await;
        assert_eq!(outcome.names()[0], expected);
        assert_eq!(outcome.context.ranked[1].hit_tokens, Some(0));
    }
}

#[tokio::test]
async fn lower_tiers_count_less() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    let blocks = hashes(&ids, None, None);
    holds(
        &fleet,
        0,
        Shelf {
            rank: 0,
            tier: Tier::Disk,
        },
        &blocks,
    );
    holds(
        &fleet,
        1,
        Shelf {
            rank: 0,
            tier: Tier::Host,
        },
        &blocks,
    );
    device(&fleet, 2, &blocks[..8]);
    let outcome = complete(&chain, &ids).await;
    let costs: Vec<f64> = outcome
        .context
        .ranked
        .iter()
        .map(|ranked| ranked.cost)
        .collect();
    assert_eq!(
        (outcome.names(), costs),
        (
            vec!["e2".into(), "e1".into(), "e0".into()],
            vec![12.0, 12.5, 17.5]
        )
    );
}

#[tokio::test]
async fn told_load_outweighs_a_prefix() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    device(&fleet, 1, &hashes(&ids, None, None));
    fleet.tell(
        1,
        Load {
            active_prefill_tokens: 320,
            active_blocks: 5,
            active_requests: 2,
            ..Load::default()
        },
    );
    let outcome = complete(&chain, &ids).await;
    assert_eq!(
        outcome.names()[0],
        "e0",
        "15 blocks of load against a prefix of 10; the tie goes to the local one"
    );
    let entry = &outcome.decision()["runner_up"];
    assert_eq!(entry["endpoint"], "e2");
    fleet.tell(1, Load::default());
    assert_eq!(complete(&chain, &ids).await.names()[0], "e1");
}

#[tokio::test]
async fn a_burst_between_two_reports_spreads_and_a_report_ends_the_guess() {
    let fleet = Fleet::new(&[Via::Peer; 4], &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    for index in 0..4 {
        fleet.tell(
            index,
            Load {
                active_prefill_tokens: 1000,
                ..Load::default()
            },
        );
    }
    let mut first = HashSet::new();
    for _ in 0..4 {
        first.insert(complete(&chain, &ids(320)).await.names()[0].clone());
    }
    assert_eq!(first.len(), 4, "each of the four got one");
    fleet.tell(
        2,
        Load {
            active_prefill_tokens: 1000,
            ..Load::default()
        },
    );
    assert_eq!(
        complete(&chain, &ids(320)).await.names()[0],
        "e2",
        "its report knows of nothing more"
    );
}

#[tokio::test]
async fn endpoints_that_just_failed_come_last_and_dead_ones_not_at_all() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    device(&fleet, 1, &hashes(&ids, None, None));
    fleet.endpoints[1].inhibit();
    assert_eq!(complete(&chain, &ids).await.names(), ["e0", "e2", "e1"]);
    fleet.change(1, |state| {
        state.health = outrigger_xds::report::Health::Dead
    });
    fleet.tell(0, Load::default());
    assert_eq!(complete(&chain, &ids).await.names(), ["e0", "e2"]);
}

#[tokio::test]
async fn of_an_engine_with_ranks_the_one_that_holds_the_prefix_is_named() {
    let mut state = vllm("");
    state.dp_size = 4;
    let fleet = Fleet::new(&[Via::Local, Via::Peer], &state, silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    let blocks = hashes(&ids, None, None);
    holds(
        &fleet,
        1,
        Shelf {
            rank: 1,
            tier: Tier::Device,
        },
        &blocks[..2],
    );
    holds(
        &fleet,
        1,
        Shelf {
            rank: 3,
            tier: Tier::Device,
        },
        &blocks[..5],
    );
    let outcome = complete(&chain, &ids).await;
    let ranks: Vec<Option<u32>> = outcome
        .context
        .ranked
        .iter()
        .map(|ranked| ranked.rank)
        .collect();
    assert_eq!(
        (outcome.names(), ranks),
        (vec!["e1".into(), "e0".into()], vec![Some(3), None])
    );
}

#[tokio::test]
async fn without_tokens_it_returns_where_the_bytes_went_before() {
    let fleet = Fleet::new(&[Via::Peer; 3], &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let turn = |messages: &[String]| {
        let messages: Vec<_> = messages
            .iter()
            .map(|text| json!({"role": "user", "content": text}))
            .collect();
        json!({"model": "m", "messages": messages}).to_string()
    };
    for conversation in 0..6 {
        let mut messages = vec![format!(
            "conversation {conversation}: {}",
            "tell me more ".repeat(100)
        )];
        let first = post(&chain, "/v1/chat/completions", turn(&messages)).await;
        assert_eq!(first.decision()["how"], "fallback");
        assert_eq!(first.decision()["exact"], false);
        assert_eq!(
            first.context.log.hit_tokens_predicted, None,
            "nothing is predicted of what is only guessed"
        );
        assert!(first.context.prompt.blocks.is_empty() && first.context.prompt.tokens > 300);
        for index in 0..3 {
            fleet.tell(index, Load::default());
        }
        messages.push("and then?".into());
        let second = post(&chain, "/v1/chat/completions", turn(&messages)).await;
        assert_eq!(second.names()[0], first.names()[0]);
    }
}

#[tokio::test]
async fn engines_without_events_are_guessed_by_token_blocks() {
    let mut state = vllm("");
    state.kv_events = false;
    let fleet = Fleet::new(&[Via::Peer; 3], &state, silent());
    let chain = chain(&fleet, json!({}));
    for start in [0u32, 5000, 9000] {
        let ids: Vec<u32> = (start..start + 320).collect();
        let first = complete(&chain, &ids[..160]).await;
        for index in 0..3 {
            fleet.tell(index, Load::default());
        }
        let second = complete(&chain, &ids).await;
        assert_eq!(second.names()[0], first.names()[0]);
        assert_eq!(second.decision()["winner"]["blocks"], json!([5, 0, 0, 0]));
    }
}

#[tokio::test]
async fn what_it_cannot_judge_is_left_to_the_cluster() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    for (path, body) in [
        (
            "/v1/completions",
            json!({"model": "m", "prompt": ["a", "b"]}),
        ),
        (
            "/v1/completions",
            json!({"model": "nobody's", "prompt": [1, 2, 3]}),
        ),
        ("/v1/completions", json!({"prompt": [1, 2, 3]})),
        ("/v1/embeddings", json!({"model": "m", "input": "a"})),
    ] {
        let outcome = post(&chain, path, body.to_string()).await;
        assert!(outcome.context.ranked.is_empty(), "{body}");
        assert_eq!(outcome.context.log.routing_decision, None);
    }
    assert!(fleet.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_single_candidate_is_predicted_without_asking_anybody() {
    let fleet = Fleet::new(&[Via::Local], &vllm(""), silent());
    let chain = chain(&fleet, json!({"tell_blocks_max": 3}));
    let ids = ids(320);
    device(&fleet, 0, &hashes(&ids, None, None)[..6]);
    let outcome = complete(&chain, &ids).await;
    assert_eq!(outcome.context.ranked[0].hit_tokens, Some(192));
    assert_eq!(
        outcome.context.prompt.blocks.len(),
        3,
        "only so many are told along"
    );
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
    let outcome = post(&chain, "/v1/chat/completions", chat.to_string()).await;
    assert!(outcome.context.ranked.is_empty() && fleet.paths().is_empty());
}

#[tokio::test]
async fn configurations_are_checked() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let error = |value| {
        outrigger_filters::kv_routing::factory(&value, &fleet.services)
            .err()
            .unwrap()
    };
    assert!(error(json!({"weights": {"host_weight": -0.5}})).contains("host_weight"));
    assert!(error(json!({"weights": {"hots_weight": 1}})).contains("hots_weight"));
    assert!(error(json!({"block_tokens": 0})).contains("block_tokens"));
}

#[tokio::test]
async fn temperature_lets_others_have_a_turn() {
    let fleet = Fleet::new(&THREE, &vllm(""), silent());
    let chain = chain(&fleet, json!({"weights": {"temperature": 1.0}}));
    let ids = ids(320);
    device(&fleet, 2, &hashes(&ids, None, None)[..5]);
    let mut firsts = HashSet::new();
    for _ in 0..200 {
        for index in 0..3 {
            fleet.tell(index, Load::default());
        }
        firsts.insert(complete(&chain, &ids).await.names()[0].clone());
    }
    assert_eq!(firsts.len(), 3, "{firsts:?}");
}

fn cost_of(outcome: &Outcome, name: &str) -> f64 {
    let mut ranked = outcome.context.ranked.iter();
    ranked
        .find(|ranked| &*ranked.endpoint.id.0 == name)
        .unwrap()
        .cost
}

#[tokio::test]
async fn a_shared_prefix_that_is_active_already_is_not_counted_twice() {
    let fleet = Fleet::new(&[Via::Peer; 2], &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(3200);
    device(&fleet, 0, &hashes(&ids, None, None));
    // In flight as long as its outcome lives.
    let running = complete(&chain, &ids).await;
    assert_eq!(running.names()[0], "e0");
    let told = Load {
        active_blocks: 100,
        active_requests: 1,
        ..Load::default()
    };
    // Until the report, the last block of the first is still being prefilled, as it always is; then nothing is.
    for (told, expected) in [(None, 101.0), (Some(&told), 100.0)] {
        if let Some(told) = told {
            fleet.tell(0, told.clone());
        }
        let second = complete(&chain, &ids).await;
        assert_eq!(
            (cost_of(&second, "e0"), cost_of(&second, "e1")),
            (expected, 200.0),
            "all of its 100 blocks are active at e0"
        );
        assert_eq!(second.decision()["winner"]["shared_blocks"], 100);
    }
    // Of another prompt only the common beginning is.
    let mut other = ids.clone();
    other.truncate(1600);
    other.extend(90_000..91_600);
    fleet.tell(0, told);
    let third = complete(&chain, &other).await;
    assert_eq!(cost_of(&third, "e0"), 50.0 + 150.0);
    drop((running, third));
    fleet.tell(0, Load::default());
    let last = complete(&chain, &ids).await;
    assert_eq!(last.decision()["winner"]["shared_blocks"], 0);
    assert_eq!(cost_of(&last, "e0"), 100.0);
}

#[tokio::test]
async fn a_note_of_what_was_sent_adds_only_blocks_that_were_not_active() {
    let fleet = Fleet::new(&[Via::Peer; 2], &vllm(""), silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    device(&fleet, 0, &hashes(&ids, None, None));
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(complete(&chain, &ids).await);
    }
    let decision = complete(&chain, &ids).await.decision();
    assert_eq!(
        (
            &decision["winner"]["active_blocks"],
            &decision["winner"]["shared_blocks"]
        ),
        (&json!(10), &json!(10)),
        "three requests of the same ten blocks"
    );
}

#[tokio::test]
async fn what_is_in_flight_outlives_a_push_of_configuration() {
    let fleet = Fleet::new(&[Via::Peer; 2], &vllm(""), silent());
    let ids = ids(320);
    device(&fleet, 0, &hashes(&ids, None, None));
    let _running = complete(&chain(&fleet, json!({})), &ids).await;
    let after = complete(&chain(&fleet, json!({})), &ids).await.decision();
    assert_eq!(after["winner"]["active_blocks"], 10);
    assert_eq!(after["winner"]["shared_blocks"], 10);
}

#[tokio::test]
async fn requests_sent_past_all_proxies_are_seen_by_the_engines_own_figures() {
    let fleet = Fleet::new(&[Via::Peer; 2], &vllm(""), silent());
    let weighted = json!({"weights": {"decode_active_request_weight": 2.0}});
    let chain = chain(&fleet, weighted);
    let polled = |age| Load {
        running: 6,
        waiting: 2,
        active_requests: 3,
        engine_age: Some(std::time::Duration::from_millis(age)),
        ..Load::default()
    };
    fleet.tell(0, polled(100));
    let outcome = complete(&chain, &ids(320)).await;
    assert_eq!(outcome.names()[0], "e1");
    assert_eq!(outcome.decision()["runner_up"]["active_requests"], 8);
    assert_eq!(cost_of(&outcome, "e0"), 20.0 + 16.0);
    // Figures of long ago correct nothing, nor do those that are lower.
    for load in [
        polled(60_000),
        Load {
            running: 1,
            waiting: 0,
            ..polled(100)
        },
    ] {
        fleet.tell(0, load);
        fleet.tell(1, Load::default());
        let outcome = complete(&chain, &ids(320)).await;
        assert_eq!(outcome.decision()["runner_up"]["active_requests"], 3);
    }
}

fn with_rank(body: &str, rank: &'static str) -> http::Request<RequestBody> {
    http::Request::post("/v1/completions")
        .header("content-type", "application/json")
        .header("x-data-parallel-rank", rank)
        .body(RequestBody::full(body.to_owned()))
        .unwrap()
}

#[tokio::test]
async fn a_client_s_own_rank_is_not_overwritten() {
    let mut state = vllm("");
    state.dp_size = 4;
    let engine: Engine = Arc::new(|_, _| (StatusCode::OK, "{}".into()));
    let fleet = Fleet::new(&[Via::Peer; 2], &state, engine);
    let chain = fleet.chain_to_engines(&[(OPENAI, json!({})), (KV, json!({}))]);
    let ids = ids(320);
    let shelf = Shelf {
        rank: 3,
        tier: Tier::Device,
    };
    holds(&fleet, 1, shelf, &hashes(&ids, None, None));
    let body = json!({"model": "m", "prompt": ids}).to_string();
    run(&chain, with_rank(&body, "2")).await;
    post(&chain, "/v1/completions", body).await;
    let asked = fleet.asked.lock().unwrap().clone();
    assert_eq!(asked[0].headers["x-data-parallel-rank"], "2");
    let ours = &asked[1];
    assert_eq!(
        (&*ours.endpoint.0, &ours.headers["x-data-parallel-rank"]),
        ("e1", &"3".parse::<http::HeaderValue>().unwrap())
    );
}

#[tokio::test]
async fn where_nothing_was_predicted_the_log_does_not_say_zero() {
    let engine: Engine = Arc::new(|_, _| (StatusCode::OK, "{}".into()));
    let fleet = Fleet::new(&[Via::Peer; 2], &vllm(""), engine);
    let chain = fleet.chain_to_engines(&[(OPENAI, json!({})), (KV, json!({}))]);
    let image = json!({"type": "image_url", "image_url": {"url": "x".repeat(400)}});
    let media = json!({"model": "m", "messages": [{"role": "user", "content": [image]}]});
    let ids = json!({"model": "m", "prompt": ids(320)});
    for (path, body, expected) in [
        ("/v1/chat/completions", media, None),
        ("/v1/completions", ids, Some(0)),
    ] {
        let outcome = post(&chain, path, body.to_string()).await;
        assert!(outcome.context.prompt.tokens > 0, "its length is known");
        assert_eq!(outcome.context.log.hit_tokens_predicted, expected);
        let asked = fleet.asked.lock().unwrap().last().unwrap().headers.clone();
        let told = asked
            .get("x-outrigger-hit-tokens")
            .map(|told| told.to_str().unwrap().parse::<u64>().unwrap());
        assert_eq!(told, expected, "the peer is told the same");
    }
}

#[tokio::test]
async fn what_is_in_flight_moves_to_the_engine_that_answered() {
    let failing = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let engine: Engine = {
        let failing = failing.clone();
        // The first question fails, whoever is asked.
        Arc::new(move |_, _| match failing.swap(false, Relaxed) {
            true => (StatusCode::BAD_GATEWAY, "{}".into()),
            false => (StatusCode::OK, "{}".into()),
        })
    };
    let fleet = Fleet::new(&[Via::Peer; 2], &vllm(""), engine);
    let chain = fleet.chain_to_engines(&[(OPENAI, json!({})), (KV, json!({}))]);
    let ids = ids(320);
    let blocks = hashes(&ids, None, None);
    device(&fleet, 0, &blocks);
    let running = complete(&chain, &ids).await;
    let shared = || {
        let of = |index: usize| {
            let slot = fleet.endpoints[index].slot;
            fleet.services.kv_index.in_flight(slot, &blocks).prefix
        };
        (of(0), of(1))
    };
    let served = running.context.log.upstream_host.clone().unwrap();
    assert_eq!((&*served.0, shared()), ("e1", (0, 10)));
    drop(running);
    assert_eq!(shared(), (0, 0));
}

#[tokio::test]
async fn a_rank_that_the_client_names_is_the_one_predicted_for() {
    let mut state = vllm("");
    state.dp_size = 4;
    let fleet = Fleet::new(&[Via::Peer; 2], &state, silent());
    let chain = chain(&fleet, json!({}));
    let ids = ids(320);
    let blocks = hashes(&ids, None, None);
    for (rank, held) in [(1, 2), (3, 5)] {
        let tier = Tier::Device;
        holds(&fleet, 1, Shelf { rank, tier }, &blocks[..held]);
    }
    let body = json!({"model": "m", "prompt": ids}).to_string();
    for (named, hits) in [("1", 64), ("2", 0)] {
        let outcome = run(&chain, with_rank(&body, named)).await;
        let ranked = outcome.context.ranked.iter();
        let of_holder = ranked
            .clone()
            .find(|ranked| &*ranked.endpoint.id.0 == "e1")
            .unwrap();
        assert_eq!(of_holder.hit_tokens, Some(hits), "rank {named}");
        assert_ne!(of_holder.rank, Some(3), "rank {named}");
    }
}

#[tokio::test]
async fn nothing_is_predicted_of_an_engine_that_tells_no_events() {
    let mut state = vllm("");
    state.kv_events = false;
    let fleet = Fleet::new(&[Via::Peer; 2], &state, silent());
    let outcome = complete(&chain(&fleet, json!({})), &ids(320)).await;
    assert_eq!(outcome.context.log.hit_tokens_predicted, None);
    assert_eq!(outcome.context.ranked[0].hit_tokens, None);
    let known = Fleet::new(&[Via::Peer; 2], &vllm(""), silent());
    let outcome = complete(&chain(&known, json!({})), &ids(320)).await;
    assert_eq!(
        outcome.context.log.hit_tokens_predicted,
        Some(0),
        "its events say that it holds nothing"
    );
}
