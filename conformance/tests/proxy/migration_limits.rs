//! Where moving ends: attempts, memory, the budget, poison, and streams whose rest no engine can make.

use super::{
    migration::migration,
    support::{arm, disarm, story},
};
use outrigger_conformance::{
    harness::{Conn, Exchange, ProxyBuilder, TestProxy, Upstream, Version},
    sim::{Config, Fault, FaultKind, SimEngine},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

const CHAT: &str = "/v1/chat/completions";
const OPENING: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;

async fn sims(
    count: usize,
    config: impl Fn() -> Config,
    fields: Value,
) -> (Vec<SimEngine>, TestProxy) {
    let engines: Vec<_> = (0..count)
        .map(|_| SimEngine::start(config()).unwrap())
        .collect();
    let builder = ProxyBuilder::new().edit(migration(fields));
    let builder = engines
        .iter()
        .fold(builder, |builder, engine| builder.engine(engine.http_addr));
    let proxy = builder.start();
    proxy.wait_alive(count).await;
    (engines, proxy)
}

fn fast() -> Config {
    Config {
        decode_itl_ms: 1.0,
        ..Config::default()
    }
}

fn body(more: &Value) -> String {
    let mut body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": 60, "ignore_eos": true,
        "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string()
}

/// What a stream that breaks after a few tokens is told.
async fn broken(engines: &[SimEngine], proxy: &TestProxy, more: &Value) -> String {
    // A call's name is told behind some twenty tokens.
    let cut = if more.get("tool_choice").is_some() {
        32
    } else {
        14
    };
    arm(engines, FaultKind::Reset, cut);
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, body(more)).await;
    let got = story(&reply.text());
    disarm(engines);
    let error = got
        .error
        .unwrap_or_else(|| panic!("{more}: {}", reply.text()));
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
    error["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_stream_whose_rest_cannot_be_made_says_why_and_how_far_it_got() {
    let (engines, proxy) = sims(2, fast, json!({"seeds": "NEVER"})).await;
    let schema = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a", "b"]}}});
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a", "b"]}}}]);
    for (more, reason) in [
        (json!({"n": 2}), "n"),
        (
            json!({"response_format": schema, "temperature": 1}),
            "guided",
        ),
        (
            json!({"tools": tool, "tool_choice": "required", "temperature": 1}),
            "guided",
        ),
        (
            json!({"presence_penalty": 0.5, "temperature": 1}),
            "penalties",
        ),
        (
            json!({"temperature": 1, "stop": "never to be seen"}),
            "held_text",
        ),
        (
            json!({"thinking_token_budget": 5, "temperature": 1}),
            "thinking_budget",
        ),
    ] {
        let told = broken(&engines, &proxy, &more).await;
        assert!(
            told.ends_with(&format!("go on elsewhere: {reason}")),
            "{more}: {told}"
        );
        assert!(told.contains("broke after "), "{told}");
        let label = format!("reason=\"{reason}\"");
        let counted = proxy
            .metric("outrigger_migration_refusals_total", &label)
            .await;
        assert!(counted >= 1.0, "{reason}");
    }
}

#[tokio::test]
async fn what_is_drawn_by_chance_goes_on_where_nothing_is_lost() {
    let (engines, proxy) = sims(2, fast, json!({"same_distribution": true})).await;
    for more in [
        json!({"temperature": 1}),
        json!({"temperature": 1, "seed": 3}),
        json!({"temperature": 1, "presence_penalty": 1, "repetition_penalty": 1.2}),
        json!({"temperature": 1, "stop": "\u{1}"}),
        json!({"temperature": 1, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}),
    ] {
        arm(&engines, FaultKind::Reset, 9);
        let mut client = proxy.client(Version::H1).await;
        let got = story(&client.post(CHAT, body(&more)).await.text());
        assert_eq!(got.problem(), None, "{more}");
        assert!(got.finish == "length" && got.text.len() > 60, "{got:?}");
    }
}

#[tokio::test]
async fn tools_need_an_engine_that_takes_chat_as_tokens() {
    let old = || Config {
        chat_token_prompts: false,
        ..fast()
    };
    let (engines, proxy) = sims(2, old, json!({"seeds": "NEVER"})).await;
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let drawn = json!({"tools": tools, "temperature": 1});
    let told = broken(&engines, &proxy, &drawn).await;
    assert!(told.ends_with("elsewhere: entrance"), "{told}");
    // What is certain is generated from the beginning then, and compared.
    arm(&engines, FaultKind::Reset, 14);
    let mut client = proxy.client(Version::H1).await;
    let got = client.post(CHAT, body(&json!({"tools": tools}))).await;
    assert_eq!(story(&got.text()).problem(), None);
    arm(&engines, FaultKind::Reset, 6);
    let mut client = proxy.client(Version::H1).await;
    let got = story(&client.post(CHAT, body(&json!({}))).await.text());
    assert_eq!(got.problem(), None, "plain chat needs no entrance");
}

#[tokio::test]
async fn more_than_the_memory_allows_is_not_held() {
    let (engines, proxy) = sims(2, fast, json!({"held_bytes_max": 100})).await;
    let told = broken(&engines, &proxy, &json!({})).await;
    assert!(told.ends_with("elsewhere: memory"), "{told}");
    let counted = proxy
        .metric("outrigger_migration_memory_overflow_total", "")
        .await;
    assert!(counted >= 1.0);
}

#[tokio::test]
async fn streams_wait_for_a_place_to_resume_and_not_for_ever() {
    // One place, and a prefill that takes its time.
    let slow = || Config {
        prefill_tokens_per_s: 250.0,
        ..fast()
    };
    let (engines, proxy) = sims(
        3,
        slow,
        json!({"budget_percent": 0, "min_resume_concurrency": 1}),
    )
    .await;
    let waits = || proxy.metric("outrigger_migration_budget_waits_total", "");
    let before = waits().await;
    engines[0].fault(Fault {
        after_tokens: 30,
        ..Fault::new(FaultKind::Die)
    });
    let ask = || async {
        let mut client = proxy.client(Version::H1).await;
        story(&client.post(CHAT, body(&json!({}))).await.text())
    };
    let all: Vec<_> = futures_util::future::join_all((0..9).map(|_| ask())).await;
    for got in &all {
        assert_eq!((got.problem(), got), (None, &all[0]));
    }
    assert!(waits().await > before, "three streams moved at once");
    let none = json!({"budget_percent": 0, "min_resume_concurrency": 0, "stall_ms": 100});
    let (engines, proxy) = sims(2, fast, none).await;
    let told = broken(&engines, &proxy, &json!({})).await;
    assert!(told.ends_with("elsewhere: budget"), "{told}");
}

/// An engine that says what it is, and does as the case says with generations.
async fn vllm<F>(answer: impl Fn(Conn, Exchange) -> F + Clone + Send + Sync + 'static) -> Upstream
where
    F: Future<Output = Option<Conn>> + Send + 'static,
{
    Upstream::engine(answer).await
}

#[tokio::test]
async fn attempts_that_bring_no_token_end() {
    let mut servers = Vec::new();
    for _ in 0..5 {
        servers.push(
            vllm(|mut conn, _| async move {
                conn.begin_events().await;
                conn.event(OPENING).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
                None
            })
            .await,
        );
    }
    let builder = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    let proxy = builder.start();
    let reply = proxy
        .client(Version::H1)
        .await
        .post(CHAT, body(&json!({})))
        .await;
    let got = story(&reply.text());
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(
        told.contains("0 tokens") && (told.ends_with("attempts") || told.ends_with("poison")),
        "{told}"
    );
    let exchanges: Vec<_> = servers.iter().flat_map(Upstream::exchanges).collect();
    assert!((3..=4).contains(&exchanges.len()), "{}", exchanges.len());
    let ids: BTreeSet<_> = exchanges
        .iter()
        .map(|got| got.header("x-request-id").to_owned())
        .collect();
    assert_eq!(ids.len(), exchanges.len(), "each call has an id of its own");
    assert_eq!(
        reply.text().matches("assistant").count(),
        1,
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn a_request_that_engines_die_of_is_tried_once_alone_and_then_refused() {
    let running = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let mut servers = Vec::new();
    for _ in 0..6 {
        let (running, most) = (running.clone(), most.clone());
        servers.push(
            vllm(move |mut conn, got| {
                let (running, most) = (running.clone(), most.clone());
                async move {
                    if got.path() != CHAT {
                        return conn.json("200 OK", "{}").await.then_some(conn);
                    }
                    // Those that run alone have an id that says so.
                    let alone = got.header("x-request-id").ends_with("-a");
                    let now = running.fetch_add(usize::from(alone), SeqCst) + usize::from(alone);
                    most.fetch_max(now, SeqCst);
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    running.fetch_sub(usize::from(alone), SeqCst);
                    None
                }
            })
            .await,
        );
    }
    let builder = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    let proxy = builder.start();
    let ask = || async {
        let mut client = proxy.client(Version::H1).await;
        client.post(CHAT, body(&json!({}))).await
    };
    let replies = tokio::join!(ask(), ask());
    for reply in [replies.0, replies.1] {
        assert_eq!(reply.status, 422, "{}", reply.text());
        let told = reply.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(told.starts_with("poison: 3 engines died"), "{told}");
    }
    let tried: usize = servers.iter().map(|server| server.exchanges().len()).sum();
    assert_eq!(tried, 6, "three engines for each, and no more");
    assert_eq!(most.load(SeqCst), 1, "alone among suspects");
    for line in proxy.log(2).await {
        assert_eq!(line["response_code_details"], "poison_request", "{line}");
    }
}

#[tokio::test]
async fn an_error_event_that_blames_the_request_is_its_answer_and_no_death() {
    const REFUSED: &str = r#"{"error":{"message":"too long","type":"BadRequestError","code":400}}"#;
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(
            vllm(|mut conn, _| async move {
                conn.begin_events().await;
                conn.event(REFUSED).await;
                conn.event("[DONE]").await;
                conn.end().await.then_some(conn)
            })
            .await,
        );
    }
    let builder = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    let proxy = builder.start();
    let mut client = proxy.client(Version::H1).await;
    let reply = client.post(CHAT, body(&json!({}))).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let told = format!("data: {REFUSED}\n\ndata: [DONE]\n\n");
    assert_eq!(reply.text(), told);
    let tried: usize = servers.iter().map(|server| server.exchanges().len()).sum();
    assert_eq!(tried, 1, "another engine would say the same");
}

#[tokio::test]
async fn streams_of_unknown_form_end_as_they_did() {
    let server = vllm(|mut conn, _| async move {
        conn.begin_events().await;
        for event in ["{\"delta\":1}", "{\"delta\":2}"] {
            conn.event(event).await;
        }
        conn.end().await.then_some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let reply = proxy
        .client(Version::H1)
        .await
        .post(CHAT, body(&json!({})))
        .await;
    assert_eq!(
        reply.text(),
        "data: {\"delta\":1}\n\ndata: {\"delta\":2}\n\n"
    );
    assert_eq!(server.exchanges().len(), 1);
}

#[tokio::test]
async fn what_began_with_nothing_begins_anew_whatever_its_form() {
    let calls = Arc::new(AtomicUsize::new(0));
    let mut servers = Vec::new();
    for _ in 0..2 {
        let calls = calls.clone();
        servers.push(
            vllm(move |mut conn, _| {
                let first = calls.fetch_add(1, SeqCst) == 0;
                async move {
                    conn.begin_events().await;
                    conn.event(OPENING).await;
                    if first {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        return None;
                    }
                    let last = r#"{"id":"d","object":"o","created":2,"model":"m","choices":[{"index":0,"delta":{"content":"{}"},"finish_reason":"stop"}]}"#;
                    conn.event(last).await;
                    conn.event("[DONE]").await;
                    conn.end().await.then_some(conn)
                }
            })
            .await,
        );
    }
    let builder = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    let proxy = builder.start();
    let guided = json!({"response_format": {"type": "json_object"}});
    let reply = proxy
        .client(Version::H1)
        .await
        .post(CHAT, body(&guided))
        .await;
    let got = story(&reply.text());
    assert_eq!(got.problem(), None);
    assert_eq!((got.text.as_str(), got.finish.as_str()), ("{}", "stop"));
    assert_eq!(proxy.only_log().await["migrations"], 1);
}
