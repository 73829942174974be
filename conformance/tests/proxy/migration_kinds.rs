//! A stream goes on at an engine of another kind that serves the same model: by token ids, which mean the same to both.

use super::{
    disaggregation::{COMPLETIONS, completion},
    migration::migration,
    support::{Story, arm, disarm, story},
};
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, TestProxy, Version, scratch},
    sim::{Config, Fault, FaultKind, Profile, SimEngine, TOKENIZER_JSON},
};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

const CHAT: &str = "/v1/chat/completions";

fn engine(profile: Profile) -> SimEngine {
    let config = Config {
        profile,
        decode_itl_ms: 1.0,
        ..Config::default()
    };
    SimEngine::start(config).unwrap()
}

#[tokio::test]
async fn a_stream_goes_from_vllm_to_sglang_and_back() {
    let engines = [engine(Profile::Vllm), engine(Profile::Sglang)];
    let builder = ProxyBuilder::new().flag("--engine", &engines[0].url());
    let proxy = builder.flag("--engine", &engines[1].url()).start();
    proxy.wait_alive(2).await;
    for (seed, kind) in [
        FaultKind::Reset,
        FaultKind::InBandError,
        FaultKind::Truncate,
    ]
    .into_iter()
    .enumerate()
    {
        // Whoever begins hands it to the other, and gets it back.
        for engine in &engines {
            engine.fault(Fault {
                after_tokens: 9,
                ..Fault::new(kind)
            });
        }
        let body = completion(seed, &json!({"stream": true, "max_tokens": 60})).to_string();
        let mut client = proxy.client(Version::H1).await;
        let got = client.post(COMPLETIONS, body.clone()).await.text();
        let alone = self::engine(Profile::Vllm);
        let mut client = Client::connect(alone.http_addr, Version::H1).await;
        let expected = client.post(COMPLETIONS, body).await.text();
        let (got, expected) = (story(&got), story(&expected));
        assert_eq!(got.problem(), None, "{kind:?}");
        assert_eq!(
            (got.text, got.finish),
            (expected.text, expected.finish),
            "{kind:?}"
        );
        // Whoever failed is passed over for a second.
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
    assert!(proxy.metric("outrigger_migrations_total", "").await >= 6.0);
}

/// Engines whose model's files are on this machine.
fn engines_with(files: &Path, profiles: &[Profile]) -> Vec<SimEngine> {
    let start = |profile: &Profile| {
        let config = Config {
            profile: *profile,
            decode_itl_ms: 1.0,
            model_path: Some(files.to_owned()),
            ..Config::default()
        };
        SimEngine::start(config).unwrap()
    };
    profiles.iter().map(start).collect()
}

async fn proxy_of(engines: &[SimEngine], policy: &str, fields: Value) -> TestProxy {
    let builder = ProxyBuilder::new()
        .flag("--policy", policy)
        .edit(migration(fields));
    let add = |builder: ProxyBuilder, engine: &SimEngine| builder.flag("--engine", &engine.url());
    let proxy = engines.iter().fold(builder, add).start();
    proxy.wait_alive(engines.len()).await;
    proxy
}

fn chat(more: &Value) -> String {
    let mut body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": 80, "ignore_eos": true,
        "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": "Paint the sky with words."}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string()
}

async fn ask(proxy: &TestProxy, more: &Value) -> Story {
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, chat(more)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    story(&reply.text())
}

/// What is the same whoever tells it: each kind has more to say of `usage`, and of why a text ended.
fn facts(story: &Story) -> (&str, &str, [&Value; 3], usize) {
    let usage = |name: &str| &story.usage[name];
    let counts = ["prompt_tokens", "completion_tokens", "total_tokens"].map(usage);
    (&story.text, &story.finish, counts, story.roles)
}

/// A chat whose engines break under it is the undisturbed one, whatever and wherever they break.
async fn survives(profiles: &[Profile], policy: &str) {
    let files = scratch("migration-kinds");
    let engines = engines_with(&files, profiles);
    let proxy = proxy_of(&engines, policy, json!({})).await;
    let whole = ask(&proxy, &json!({})).await;
    assert_eq!(whole.problem(), None);
    assert!(
        whole.text.contains('🎨'),
        "characters of several tokens: {}",
        whole.text
    );
    let breaks = [
        FaultKind::Reset,
        FaultKind::InBandError,
        FaultKind::Truncate,
        FaultKind::Garbage,
    ];
    for (at, cut) in [1, 9, 23, 37, 46, 60].into_iter().enumerate() {
        let kind = breaks[at % breaks.len()];
        arm(&engines, kind, cut);
        let got = ask(&proxy, &json!({})).await;
        disarm(&engines);
        assert_eq!(got.problem(), None, "{profiles:?} {kind:?} after {cut}");
        assert_eq!(
            facts(&got),
            facts(&whole),
            "{profiles:?} {kind:?} after {cut}"
        );
        // Whoever failed is passed over for a second.
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
    for line in &proxy.log(7).await[1..] {
        assert!(line["migrations"].as_u64() >= Some(1), "{line}");
    }
}

#[tokio::test]
async fn a_chat_goes_from_sglang_to_sglang_by_ids_of_our_own_tokenizer() {
    survives(&[Profile::Sglang, Profile::Sglang], "kv").await;
}

#[tokio::test]
async fn a_chat_goes_from_sglang_to_vllm_and_back() {
    survives(&[Profile::Sglang, Profile::Vllm], "least_request").await;
}

#[tokio::test]
async fn a_chat_that_is_too_long_for_a_worker_to_tokenise_moves_too() {
    let files = scratch("migration-kinds-long");
    let engines = engines_with(&files, &[Profile::Sglang, Profile::Sglang]);
    let proxy = proxy_of(&engines, "kv", json!({})).await;
    let more = json!({"max_tokens": 1300});
    let whole = ask(&proxy, &more).await;
    assert!(whole.text.len() > 6 << 10, "{}", whole.text.len());
    arm(&engines, FaultKind::Reset, 1200);
    let got = ask(&proxy, &more).await;
    disarm(&engines);
    assert_eq!(got.problem(), None);
    assert_eq!(facts(&got), facts(&whole));
    let moved = proxy.log(2).await[1]["migrations"].as_u64();
    assert!(moved >= Some(1), "{moved:?}");
}

#[tokio::test]
async fn a_chat_of_sglang_that_cannot_move_says_why() {
    let files = scratch("migration-kinds-refused");
    let engines = engines_with(&files, &[Profile::Sglang, Profile::Sglang]);
    let proxy = proxy_of(&engines, "kv", json!({})).await;
    for (more, reason) in [
        (json!({"stop": "never to be seen"}), "stop"),
        (json!({"temperature": 1, "seed": 3}), "seed"),
        (json!({"n": 2}), "n"),
        (json!({"separate_reasoning": false}), "not_verified"),
        (json!({"stream_reasoning": false}), "not_verified"),
        (json!({"include_reasoning": false}), "not_verified"),
        (json!({"skip_special_tokens": false}), "not_verified"),
    ] {
        arm(&engines, FaultKind::Reset, 14);
        let got = ask(&proxy, &more).await;
        disarm(&engines);
        let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
        assert!(told.ends_with(&format!("elsewhere: {reason}")), "{told}");
    }
    arm(&engines, FaultKind::Reset, 14);
    let drawn = ask(&proxy, &json!({"temperature": 1})).await;
    assert_eq!(
        drawn.problem(),
        None,
        "what is drawn without a seed goes on"
    );
}

#[tokio::test]
async fn a_tokenizer_that_is_not_the_engines_proves_nothing() {
    let files = scratch("migration-kinds-other");
    std::fs::create_dir_all(&files).unwrap();
    // Two words have each other's ids.
    let mut other: Value = serde_json::from_str(TOKENIZER_JSON).unwrap();
    let vocabulary = &mut other["model"]["vocab"];
    let (one, two) = (
        vocabulary["\u{120}the"].take(),
        vocabulary["\u{120}and"].take(),
    );
    assert!(one.is_u64() && two.is_u64());
    (vocabulary["\u{120}the"], vocabulary["\u{120}and"]) = (two, one);
    std::fs::write(files.join("tokenizer.json"), other.to_string()).unwrap();
    let engines = engines_with(&files, &[Profile::Sglang, Profile::Sglang]);
    let proxy = proxy_of(&engines, "least_request", json!({})).await;
    ask(&proxy, &json!({})).await;
    arm(&engines, FaultKind::Reset, 14);
    let got = ask(&proxy, &json!({})).await;
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(told.ends_with("elsewhere: not_verified"), "{told}");
    assert!(
        told.contains("broke after 1"),
        "it says how far it got: {told}"
    );
}

#[tokio::test]
async fn text_of_a_model_that_may_have_reasoned_unseen_is_not_all() {
    let files = scratch("migration-kinds-thinks");
    std::fs::create_dir_all(&files).unwrap();
    let mut thinks: Value = serde_json::from_str(TOKENIZER_JSON).unwrap();
    let added = thinks["added_tokens"].as_array_mut().unwrap();
    let mut mark = added.last().unwrap().clone();
    (mark["id"], mark["content"], mark["special"]) =
        (json!(900_000), json!("<think>"), json!(false));
    added.push(mark);
    std::fs::write(files.join("tokenizer.json"), thinks.to_string()).unwrap();
    let engines = engines_with(&files, &[Profile::Sglang, Profile::Sglang]);
    let proxy = proxy_of(&engines, "least_request", json!({})).await;
    arm(&engines, FaultKind::Reset, 14);
    let got = ask(&proxy, &json!({})).await;
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(told.ends_with("elsewhere: not_verified"), "{told}");
}

#[tokio::test]
async fn where_the_model_is_not_on_this_machine_chats_of_sglang_end() {
    let engines = [engine(Profile::Sglang), engine(Profile::Sglang)];
    let proxy = proxy_of(&engines, "kv", json!({})).await;
    arm(&engines, FaultKind::Reset, 14);
    let got = ask(&proxy, &json!({})).await;
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(told.ends_with("elsewhere: no_token_ids"), "{told}");
}
