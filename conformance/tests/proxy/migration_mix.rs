//! The book's mix of agents' traffic, each request cut at a random place: how many do not survive it, and why.

use super::{
    migration::migration,
    support::{Story, disarm, story},
};
use outrigger_conformance::{
    harness::{ProxyBuilder, TestProxy, Version},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const CHAT: &str = "/v1/chat/completions";
/// As many of each kind as the book says are asked, so often.
const ROUNDS: usize = 2;
const BREAKS: [FaultKind; 4] = [
    FaultKind::Reset,
    FaultKind::Truncate,
    FaultKind::Garbage,
    FaultKind::InBandError,
];

fn object() -> Value {
    json!({"type": "object", "required": ["path", "text"],
        "properties": {"path": {"type": "string"}, "text": {"type": "string"}}})
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "edit", "parameters": object()}}])
}

/// How many of a hundred requests are of a kind, and what they ask for. The table in `docs/src/filters.md`.
fn mix() -> Vec<(usize, &'static str, Value)> {
    let call = |more: Value| with(json!({"tools": tools(), "tool_choice": "required"}), &more);
    let offered = |more: Value| with(json!({"tools": tools()}), &more);
    let schema = |more: Value| {
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "s", "schema": object()}});
        with(json!({"response_format": format}), &more)
    };
    let (greedy, drawn) = (json!({"temperature": 0}), json!({"temperature": 0.7}));
    let reasons = |more: Value| with(json!({"tools": tools(), "reasons": true}), &more);
    vec![
        (20, "a tool call, greedy", call(greedy.clone())),
        (7, "a tool call, drawn", call(drawn.clone())),
        (12, "tools, content sent, greedy", offered(greedy.clone())),
        (10, "tools, content sent, drawn", offered(drawn.clone())),
        (4, "tools, reasoning, greedy", reasons(greedy.clone())),
        (8, "tools, reasoning, drawn", reasons(drawn.clone())),
        (5, "plain, greedy", greedy.clone()),
        (7, "plain, drawn", drawn.clone()),
        (6, "a JSON schema, greedy", schema(greedy)),
        (2, "a JSON schema, drawn", schema(drawn.clone())),
        (
            3,
            "logprobs, drawn",
            with(json!({"logprobs": true, "top_logprobs": 2}), &drawn),
        ),
        (3, "a seed", with(json!({"seed": 7}), &drawn)),
        (
            1,
            "a presence penalty, drawn",
            with(json!({"presence_penalty": 0.5}), &drawn),
        ),
        (1, "two choices, drawn", with(json!({"n": 2}), &drawn)),
        (
            11,
            "no stream, a call, drawn",
            call(with(json!({"stream": false}), &drawn)),
        ),
    ]
}

fn with(mut body: Value, more: &Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// Why a stream ended early; `None` if it did not.
fn refusal(got: &Story) -> Option<String> {
    let Some(error) = &got.error else {
        assert_eq!(got.problem(), None);
        return None;
    };
    let told = error["message"].as_str().unwrap();
    let reason = told.split_once("could not go on elsewhere: ");
    // An engine's own error event is passed on as it is.
    Some(
        reason
            .map_or("its own error", |(_, reason)| reason)
            .to_owned(),
    )
}

/// Asks, cut or not; how many tokens came, and why it ended early.
async fn ask(proxy: &TestProxy, more: &Value) -> (usize, Option<String>) {
    let body = json!({"model": "sim", "stream": true, "max_tokens": 60,
        "messages": [{"role": "user", "content": "Edit the file, then say what you did."}]});
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, with(body, more).to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    if more["stream"] == false {
        let whole = reply.json();
        assert!(
            !reply.broken && whole["choices"][0]["finish_reason"].is_string(),
            "{whole}"
        );
        let tokens = whole["usage"]["completion_tokens"].as_u64();
        return (tokens.unwrap() as usize, None);
    }
    let got = story(&reply.text());
    if more["n"] == 2 {
        // Two roles and two reasons.
        let reason = got.error.is_some().then(|| "n".to_owned());
        return (got.tokens / 2, reason);
    }
    let tokens = got.usage["completion_tokens"].as_u64();
    (
        tokens.map_or(got.tokens, |tokens| tokens as usize),
        refusal(&got),
    )
}

/// Engines, some of which have a reasoning parser, and a proxy.
async fn fleet(fields: &Value, reasoning_tokens: usize) -> (Vec<SimEngine>, TestProxy) {
    let start = |number: u64| {
        let config = Config {
            decode_itl_ms: 0.5,
            reasoning_tokens,
            // Nothing that two of them draw without a seed is the same.
            seed: (number + 1) << 32,
            ..Config::default()
        };
        SimEngine::start(config).unwrap()
    };
    let engines: Vec<_> = (0..3).map(start).collect();
    let builder = ProxyBuilder::new().edit(migration(fields.clone()));
    let add = |builder: ProxyBuilder, engine: &SimEngine| builder.engine(engine.http_addr);
    let proxy = engines.iter().fold(builder, add).start();
    proxy.wait_alive(3).await;
    (engines, proxy)
}

/// Cuts every request of the mix somewhere; gives the refused ones by reason, and how many were asked.
async fn run(fields: &Value, seed: u64) -> (BTreeMap<String, usize>, usize) {
    let fleets = [fleet(fields, 0).await, fleet(fields, 30).await];
    let mut random = StdRng::seed_from_u64(seed);
    let mut refused = BTreeMap::new();
    let mut asked = 0;
    for (count, kind, mut more) in mix() {
        let reasons = more.as_object_mut().unwrap().remove("reasons").is_some();
        let (engines, proxy) = &fleets[usize::from(reasons)];
        let is_whole = more["stream"] == false;
        if !is_whole {
            more["stream_options"] = json!({"include_usage": true});
        }
        let (tokens, none) = ask(proxy, &more).await;
        assert_eq!(none, None, "{kind}: undisturbed");
        for _ in 0..count * ROUNDS {
            asked += 1;
            let cut = random.random_range(1..tokens.max(2) as u64);
            let how = BREAKS[random.random_range(0..BREAKS.len())];
            // Nothing is left of an answer in one piece that every engine broke: one of them is well.
            for engine in &engines[usize::from(is_whole)..] {
                engine.fault(Fault {
                    after_tokens: cut,
                    ..Fault::new(how)
                });
            }
            let (_, reason) = ask(proxy, &more).await;
            disarm(engines);
            if let Some(reason) = reason {
                *refused.entry(format!("{reason} ({kind})")).or_default() += 1;
            }
        }
    }
    (refused, asked)
}

#[tokio::test]
async fn refusals_are_few_of_a_mix_of_agents_traffic() {
    let seed = 20_261_127;
    // By default less than 5 %, as with seeds for all; without any there are more.
    for (fields, most) in [
        (json!({}), 5),
        (json!({"seeds": "ALWAYS"}), 5),
        (json!({"seeds": "NEVER"}), 12),
    ] {
        let (refused, asked) = run(&fields, seed).await;
        let all: usize = refused.values().sum();
        println!("random seed {seed}, {fields}: {all} of {asked} refused: {refused:?}");
        assert!(asked == 100 * ROUNDS, "{asked}");
        assert!(all * 100 < most * asked, "{fields}: {refused:?}");
    }
}
