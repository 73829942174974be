//! The `kv_routing` filter: which endpoint comes first, and what is written down of it.

use crate::fleet::{Engine, Fleet, KV, OPENAI, Outcome, post, vllm};
use http::StatusCode;
use outrigger_filters::{endpoints::Via, filter::Chain};
use outrigger_xds::{
    block_hash::{self, BlockHash, Namespace},
    report::{KvChange, Load, Shelf, Tier},
};
use serde_json::json;
use std::{collections::HashSet, sync::Arc};

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
    let hits: Vec<u64> = outcome
        .context
        .ranked
        .iter()
        .map(|ranked| ranked.hit_tokens)
        .collect();
    assert_eq!(
        hits,
        [288, 128, 0],
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
        assert_eq!(outcome.context.ranked[1].hit_tokens, 0);
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
    assert_eq!(outcome.context.ranked[0].hit_tokens, 192);
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
