//! The block cache told three ways (usage, metrics, events) agrees with itself and with the recordings.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use outrigger_conformance::sim::{Config, Events, SimEngine};
use serde_json::{Value, json};

use super::client::{Client, PATIENCE, metric, post};
use super::zmtp::{Pack, Peer, batch};

fn engine(config: Config) -> SimEngine {
    SimEngine::start(Config {
        decode_itl_ms: 0.2,
        ..config
    })
    .expect("start")
}

fn subscribe(engine: &SimEngine) -> Peer {
    Peer::subscribe(engine.events_addr.expect("bound"), "kv-events")
}

fn complete(engine: &SimEngine, prompt: &[u32], max_tokens: usize) -> Value {
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true});
    post(engine.http_addr, "/v1/completions", &body).json()
}

fn ids(count: u32, from: u32) -> Vec<u32> {
    (0..count).map(|at| 300 + (at * 7 + from) % 700).collect()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .expect("told")
}

fn kinds(events: &[Pack]) -> Vec<String> {
    let kind = |event: &Pack| match event.get("type") {
        Pack::Text(kind) => kind.clone(),
        other => panic!("{other:?}"),
    };
    events.iter().map(kind).collect()
}

#[test]
fn a_prompt_is_reused_but_for_its_last_token() {
    let engine = engine(Config::recorded());
    for (len, expected) in [(95, 64), (96, 64), (97, 96), (33, 32), (32, 0), (31, 0)] {
        let prompt = ids(len, len);
        assert_eq!(cached(&complete(&engine, &prompt, 1)), 0, "{len} cold");
        assert_eq!(
            cached(&complete(&engine, &prompt, 1)),
            expected,
            "{len} warm"
        );
    }
}

#[test]
fn a_second_turn_finds_the_blocks_of_the_answer_before_it() {
    let engine = engine(Config::recorded());
    let first =
        json!({"role": "user", "content": "Tell me a story about a robot who wanted to paint."});
    let ask = |messages: Value, max: u32| {
        let body =
            json!({"messages": messages, "max_tokens": max, "temperature": 0, "ignore_eos": true});
        post(engine.http_addr, "/v1/chat/completions", &body).json()
    };
    let turn = ask(json!([first]), 60);
    let prompt_tokens = turn["usage"]["prompt_tokens"].as_u64().expect("number");
    let answer = turn["choices"][0]["message"]["content"].clone();
    let messages = json!([first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]);
    let second = ask(messages, 4);
    // The last token of the answer was told but never computed.
    assert_eq!(cached(&second), (prompt_tokens + 60 - 1) / 32 * 32);
    let hits = metric(engine.http_addr, "vllm:prefix_cache_hits_total");
    assert_eq!(hits as u64, cached(&second));
    let queries = metric(engine.http_addr, "vllm:prefix_cache_queries_total");
    assert_eq!(
        queries as u64,
        prompt_tokens + second["usage"]["prompt_tokens"].as_u64().expect("number")
    );
}

#[test]
fn batches_have_the_recorded_bytes_but_for_hashes_tokens_and_time() {
    let engine = engine(Config::recorded());
    let mut subscriber = subscribe(&engine);
    let recording = include_str!("../../fixtures/kv-events/vllm-0.32.0-a.jsonl");
    let recorded: Vec<Vec<Vec<u8>>> = recording
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).expect("json");
            let bytes = |hex: &Value| {
                let hex = hex.as_str().expect("hex");
                (0..hex.len())
                    .step_by(2)
                    .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex"))
                    .collect()
            };
            line["frames_hex"]
                .as_array()
                .expect("frames")
                .iter()
                .map(bytes)
                .collect()
        })
        .collect();
    let payload = |frames: &[Vec<u8>]| Pack::read(&frames[2]).masked();
    // Recorded: a chat of one full block (0), a block behind another (2), a salt (6), a reset before it (7).
    complete(&engine, &ids(34, 0), 1);
    let first = subscriber.message();
    assert_eq!(first[..2], recorded[0][..2]);
    assert_eq!(payload(&first), payload(&recorded[0]));
    complete(&engine, &ids(34, 0), 32);
    assert_eq!(payload(&subscriber.message()), payload(&recorded[2]));
    let salted = |salt: &str| {
        let body = json!({"prompt": ids(70, 9), "max_tokens": 1, "cache_salt": salt});
        post(engine.http_addr, "/v1/completions", &body).json()
    };
    salted("tenant-a");
    assert_eq!(payload(&subscriber.message()), payload(&recorded[6]));
    assert_eq!(
        post(engine.http_addr, "/reset_prefix_cache", &json!({})).json(),
        json!({"success": true})
    );
    assert!(
        subscriber.is_silent(),
        "a reset was told before the next step"
    );
    salted("tenant-a");
    assert_eq!(payload(&subscriber.message()), payload(&recorded[7]));
}

#[test]
fn events_name_what_usage_then_counts() {
    let engine = engine(Config::recorded());
    let mut subscriber = subscribe(&engine);
    let prompt = ids(70, 1);
    let answer = complete(&engine, &prompt, 60);
    let generated = answer["choices"][0]["token_ids"]
        .as_array()
        .expect("ids")
        .iter()
        .map(|id| id.as_u64().expect("id"));
    let all: Vec<u64> = prompt
        .iter()
        .map(|&id| u64::from(id))
        .chain(generated)
        .collect();
    let (mut told, mut parent) = (Vec::new(), Pack::Nil);
    while told.len() < (70 + 60 - 1) / 32 * 32 {
        let (topic, _, events) = batch(&subscriber.message());
        assert_eq!(topic, "kv-events");
        for event in events {
            assert_eq!(event.get("parent_block_hash"), &parent);
            parent = Pack::Uint(*event.get("block_hashes").numbers().last().expect("a hash"));
            told.extend(event.get("token_ids").numbers());
        }
    }
    assert_eq!(told, all[..told.len()]);
    assert!(subscriber.is_silent());
}

#[test]
fn salted_prompts_share_nothing() {
    let engine = engine(Config::recorded());
    let ask = |salt: &str| {
        let body =
            json!({"prompt": ids(64, 2), "max_tokens": 1, "temperature": 0, "cache_salt": salt});
        cached(&post(engine.http_addr, "/v1/completions", &body).json())
    };
    assert_eq!((ask("a"), ask("a"), ask("b")), (0, 32, 0));
}

#[test]
fn a_full_cache_evicts_the_oldest_tail_and_says_so() {
    let engine = engine(Config {
        kv_blocks: 11,
        max_model_len: 256,
        ..Config::recorded()
    });
    let mut subscriber = subscribe(&engine);
    let old = ids(192, 3);
    complete(&engine, &old, 1);
    let (_, _, stored) = batch(&subscriber.message());
    let hashes = stored[0].get("block_hashes").numbers();
    assert_eq!(hashes.len(), 6);
    complete(&engine, &ids(190, 400), 1);
    let (_, seq, events) = batch(&subscriber.message());
    assert_eq!(seq, 1);
    assert_eq!(
        kinds(&events),
        ["BlockRemoved", "BlockRemoved", "BlockStored"]
    );
    let removed: Vec<u64> = events[..2]
        .iter()
        .flat_map(|event| event.get("block_hashes").numbers())
        .collect();
    assert_eq!(removed, [hashes[5], hashes[4]]);
    assert_eq!(cached(&complete(&engine, &old, 1)), 128);
}

#[test]
fn replay_starts_where_it_is_asked_to_and_ends_with_its_marker() {
    let engine = engine(Config::recorded());
    (0..5).for_each(|at| drop(complete(&engine, &ids(40, at * 50), 1)));
    let mut client = Peer::connect(engine.replay_addr.expect("bound"), "DEALER");
    for (start, expected) in [(3, vec![3, 4]), (0, vec![0, 1, 2, 3, 4]), (9, vec![])] {
        let seqs: Vec<u64> = client
            .replay(start)
            .iter()
            .map(|frames| batch(frames).1)
            .collect();
        assert_eq!(seqs, expected, "from {start}");
    }
}

#[test]
fn a_subscriber_gets_only_topics_it_asked_for() {
    let engine = engine(Config::recorded());
    let mut other = Peer::subscribe(engine.events_addr.expect("bound"), "other");
    let mut all = Peer::subscribe(engine.events_addr.expect("bound"), "");
    complete(&engine, &ids(40, 5), 1);
    assert_eq!(batch(&all.message()).1, 0);
    assert!(other.is_silent());
}

#[test]
fn an_engine_can_connect_to_a_subscriber_that_binds() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address").to_string();
    let engine = engine(Config {
        events: Events::Connect(address.clone()),
        ..Config::recorded()
    });
    let (socket, _) = listener.accept().expect("the engine connects");
    let mut subscriber = Peer::over(socket, "SUB");
    subscriber.send(&[b"\x01"]);
    std::thread::sleep(Duration::from_millis(50));
    complete(&engine, &ids(40, 5), 1);
    assert_eq!(batch(&subscriber.message()).1, 0);
    let sources = super::client::ask(engine.http_addr, "GET", "/kv_event_sources", b"").json();
    assert_eq!(sources["0"]["endpoint"], format!("tcp://{address}"));
}

#[test]
fn text_depends_on_every_token_and_on_no_engine() {
    let (one, other) = (
        engine(Config::recorded()),
        engine(Config {
            seed: 9,
            ..Config::recorded()
        }),
    );
    let ids_of = |answer: &Value| answer["choices"][0]["token_ids"].clone();
    let prompt = ids(50, 6);
    let whole = ids_of(&complete(&one, &prompt, 40));
    assert_eq!(whole, ids_of(&complete(&other, &prompt, 40)));
    assert_eq!(
        whole,
        ids_of(&complete(&one, &prompt, 40)),
        "a cached prefix changed the text"
    );
    let tokens: Vec<u32> = whole
        .as_array()
        .expect("ids")
        .iter()
        .map(|id| id.as_u64().expect("id") as u32)
        .collect();
    let resumed = complete(&other, &[&prompt[..], &tokens[..13]].concat(), 27);
    assert_eq!(ids_of(&resumed), json!(tokens[13..]));
    let spliced = complete(&other, &[&prompt[..], &tokens[..12]].concat(), 27);
    assert_ne!(ids_of(&spliced), json!(tokens[13..]));
}

#[test]
fn slots_queue_and_blocks_show_in_the_metrics() {
    let config = Config {
        batch_slots: 2,
        decode_itl_ms: 5.0,
        ..Config::recorded()
    };
    let engine = SimEngine::start(config).expect("start");
    let mut clients: Vec<Client> = (0..5u32).map(|at| {
        let mut client = Client::connect(engine.http_addr);
        let body = json!({"prompt": ids(100, at * 90), "max_tokens": 1500, "ignore_eos": true, "stream": true});
        client.send("POST", "/v1/completions", &[], body.to_string().as_bytes());
        client
    }).collect();
    wait_for(|| engine.load().0 == 3);
    assert_eq!(metric(engine.http_addr, "vllm:num_requests_running"), 2.0);
    assert_eq!(metric(engine.http_addr, "vllm:num_requests_waiting{"), 3.0);
    let usage = metric(engine.http_addr, "vllm:kv_cache_usage_perc");
    assert!((8.0 / 1455.0..0.1).contains(&usage), "{usage}");
    // Clients that leave are forgotten at once, running or waiting.
    clients.truncate(1);
    wait_for(|| engine.load().0 + engine.load().1 == 1);
    drop(clients);
    wait_for(|| engine.load() == (0, 0, 0.0));
    assert_eq!(
        metric(
            engine.http_addr,
            "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\""
        ),
        0.0
    );
}

#[test]
fn prefill_and_decode_take_the_time_they_are_told_to() {
    let config = Config {
        prefill_tokens_per_s: 2000.0,
        decode_itl_ms: 10.0,
        ..Config::recorded()
    };
    let engine = SimEngine::start(config).expect("start");
    let took = |prompt: &[u32], max_tokens| {
        let began = Instant::now();
        complete(&engine, prompt, max_tokens);
        began.elapsed()
    };
    let prompt = ids(1000, 8);
    let (cold, warm) = (took(&prompt, 1), took(&prompt, 1));
    assert!(cold >= Duration::from_millis(500), "{cold:?}");
    assert!(warm < cold / 2, "{warm:?} after {cold:?}");
    let decode = took(&prompt, 21);
    assert!(decode >= Duration::from_millis(200), "{decode:?}");
}

#[test]
fn preempted_requests_end_with_the_same_tokens() {
    let config = Config {
        kv_blocks: 10,
        max_model_len: 280,
        decode_itl_ms: 1.0,
        ..Config::recorded()
    };
    let small = SimEngine::start(config).expect("start");
    let big = engine(Config::recorded());
    let prompts = [ids(60, 1), ids(60, 100), ids(60, 200)];
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let small = &small;
        let running: Vec<_> = prompts
            .iter()
            .map(|prompt| scope.spawn(move || complete(small, prompt, 150)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("answered"))
            .collect()
    });
    assert!(
        metric(small.http_addr, "vllm:num_preemptions_total") > 0.0,
        "nothing was preempted"
    );
    for (prompt, answer) in prompts.iter().zip(answers) {
        assert_eq!(
            answer["choices"][0]["token_ids"],
            complete(&big, prompt, 150)["choices"][0]["token_ids"]
        );
    }
}

/// Waits for `condition`, which must come true.
pub(crate) fn wait_for(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}
