//! Tokens by tenant: limits, headers, correction by what the engine says, and metering.

use http::{Method, Request};
use outrigger_conformance::harness::{
    AnyBody, Client, Exchange, OneChain, ProxyBuilder, Reply, TestProxy, Upstream, Version,
    eventually, request,
};
use outrigger_proxy::bootstrap::OUTBOUND;
use outrigger_xds::resource::{bootstrap::Bootstrap, listener::HttpFilter, route::TypedConfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const CHAT: &str = "/v1/chat/completions";
const OURS: &str = "type.googleapis.com/outrigger.filters.http";

/// Says `usage` of 30 and 170 tokens, if asked for a stream without `usage` as four events.
async fn engine() -> Upstream {
    Upstream::start(|mut conn, got: Exchange| async move {
        let body = String::from_utf8_lossy(&got.body).into_owned();
        let usage = r#""usage":{"prompt_tokens":30,"completion_tokens":170,"total_tokens":200}"#;
        let text = r#""choices":[{"index":0,"delta":{"content":"a"}}]"#;
        if body.contains("refuse") {
            return conn.json("400 Bad Request", "{}").await.then_some(conn);
        }
        if !body.contains("stream") {
            let answer = format!(r#"{{"choices":[],{usage}}}"#);
            return conn.json("200 OK", &answer).await.then_some(conn);
        }
        conn.begin_events().await;
        for _ in 0..4 {
            conn.event(&format!("{{{text}}}")).await;
        }
        if body.contains("include_usage") {
            conn.event(&format!(r#"{{"choices":[],{usage}}}"#)).await;
        }
        conn.event("[DONE]").await;
        conn.end().await.then_some(conn)
    })
    .await
}

/// Sets `openai`'s tenant header, and puts `token_ratelimit` with these limits after it.
fn limit(bootstrap: &mut Bootstrap, limits: &Value) {
    for listener in &mut bootstrap.listeners {
        if listener.name != OUTBOUND {
            continue;
        }
        let filters = &mut listener.http().http_filters;
        filters.retain(|filter| filter.name != "limits");
        let openai = filters
            .iter()
            .position(|filter| filter.config.type_url.contains("openai"))
            .unwrap();
        filters[openai].config.value = json!({"tenant_header": "authorization"});
        let config = TypedConfig {
            type_url: format!("{OURS}.token_ratelimit.v1.Config"),
            value: json!({"limits": limits}),
        };
        let limits = HttpFilter {
            name: "limits".into(),
            config,
            discovery: None,
            is_optional: false,
            disabled: false,
        };
        filters.insert(openai + 1, limits);
    }
}

fn proxy(engine: &Upstream, limits: Value) -> TestProxy {
    ProxyBuilder::new()
        .server(engine.address)
        .edit(move |bootstrap| limit(bootstrap, &limits))
        .start()
}

fn chat(tenant: &str, more: &Value) -> Request<AnyBody> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    let mut chat = request(Method::POST, CHAT, body.to_string());
    let headers = chat.headers_mut();
    headers.insert("content-type", "application/json".parse().unwrap());
    if !tenant.is_empty() {
        let key = format!("Bearer {tenant}");
        headers.insert("authorization", key.parse().unwrap());
    }
    chat
}

async fn ask(client: &mut Client, tenant: &str, more: Value) -> Reply {
    client.send(chat(tenant, &more)).await
}

fn remaining(reply: &Reply, kind: &str) -> u64 {
    let name = format!("x-ratelimit-remaining-{kind}");
    let text = reply.header(&name);
    text.parse().unwrap_or_else(|_| panic!("{name}: '{text}'"))
}

#[tokio::test]
async fn requests_over_the_limit_are_refused_as_openai_refuses_them() {
    for version in Version::BOTH {
        let engine = engine().await;
        let limits =
            json!([{"name": "per-tenant", "key": ["tenant", "model"], "requests_per_minute": 2}]);
        let proxy = proxy(&engine, limits);
        let mut client = proxy.client(version).await;
        let key = format!("requests-{version:?}");
        let first = ask(&mut client, &key, json!({})).await;
        assert_eq!(first.status, 200);
        assert_eq!(first.header("x-ratelimit-limit-requests"), "2");
        assert_eq!(remaining(&first, "requests"), 1);
        assert_eq!(first.header("x-ratelimit-limit-tokens"), "", "not limited");
        assert!(first.header("x-ratelimit-reset-requests").ends_with('s'));
        assert_eq!(ask(&mut client, &key, json!({})).await.status, 200);
        let over = ask(&mut client, &key, json!({})).await;
        assert_eq!(
            (over.status.as_u16(), over.header("x-outrigger-error")),
            (429, "RL"),
            "{version:?}"
        );
        let error = &over.json()["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("RateLimitError"), &json!(429))
        );
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .contains("requests per minute (per-tenant): limit 2")
        );
        let after: u64 = over.header("retry-after").parse().unwrap();
        assert!((1..=30).contains(&after), "{after}");
        assert_eq!(remaining(&over, "requests"), 0);
        // Others have their own: another tenant, another model, those that name no tenant.
        assert_eq!(ask(&mut client, "other", json!({})).await.status, 200);
        assert_eq!(
            ask(&mut client, &key, json!({"model": "n"})).await.status,
            200
        );
        assert_eq!(ask(&mut client, "", json!({})).await.status, 200);
        let models = request(Method::GET, "/v1/models", "");
        assert_eq!(
            client
                .send(models)
                .await
                .header("x-ratelimit-limit-requests"),
            "",
            "no generation"
        );
        let log = &proxy.log(3).await[2];
        assert_eq!(
            (&log["response_flags"], &log["response_code_details"]),
            (&json!("RL"), &json!("token_rate_limited"))
        );
        let outcome = "outcome=\"requests\"";
        assert!(
            proxy
                .metric("outrigger_token_ratelimit_total", outcome)
                .await
                >= 1.0
        );
    }
}

#[tokio::test]
async fn estimated_tokens_are_corrected_by_what_was_used() {
    let told =
        json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 900});
    // What a minute's worth of 1,200 has left after it; 20 come back each second.
    let cases = [
        ("json", json!({"max_tokens": 900}), 1000),
        ("default", json!({}), 1000),
        ("stream", told, 1000),
        ("untold", json!({"stream": true, "max_tokens": 900}), 1180),
        ("huge", json!({"max_tokens": 1_000_000}), 1000),
        ("refused", json!({"max_tokens": 900, "refuse": 1}), 1200),
    ];
    for version in Version::BOTH {
        let engine = engine().await;
        let limits = json!([{"name": "t", "key": ["tenant"], "tokens_per_minute": 1200}]);
        let proxy = proxy(&engine, limits);
        let mut client = proxy.client(version).await;
        for (key, more, left) in &cases {
            let key = format!("{key}-{version:?}");
            let first = ask(&mut client, &key, more.clone()).await;
            let asked = more
                .get("max_tokens")
                .map_or(256, |most| most.as_u64().unwrap());
            if first.status == 200 {
                let at_most = 1200_u64.saturating_sub(asked) + 250;
                assert!(
                    remaining(&first, "tokens") < at_most,
                    "{key}: taken at first"
                );
            }
            // Asked for nothing, a request shows what is left.
            let look = ask(&mut client, &key, json!({"max_tokens": 0, "refuse": 1})).await;
            let shown = remaining(&look, "tokens");
            assert!(
                (left - 30..=left + 150).contains(&shown),
                "{key}: {shown}, not {left}"
            );
        }
    }
}

#[tokio::test]
async fn a_tenant_over_its_tokens_waits_and_a_push_changes_nothing() {
    let engine = engine().await;
    let limits = json!([
        {"name": "tokens", "key": ["tenant"], "tokens_per_minute": 300},
        {"name": "all", "requests_per_minute": 1000},
    ]);
    let proxy = proxy(&engine, limits.clone());
    let mut client = proxy.client(Version::H1).await;
    let mut headers = Vec::new();
    for max_tokens in [250, 250] {
        headers.push(ask(&mut client, "greedy", json!({"max_tokens": max_tokens})).await);
    }
    assert_eq!(headers[0].status, 200);
    // 200 of 300 were used; 250 and the prompt are not there for half a minute.
    assert_eq!(headers[1].status, 429);
    let error = headers[1].json();
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("tokens per minute (tokens): limit 300")
    );
    assert!(headers[1].header("retry-after").parse::<u64>().unwrap() > 10);
    assert_eq!(headers[1].header("x-ratelimit-limit-requests"), "1000");
    assert!(
        remaining(&headers[1], "requests") >= 998,
        "what was refused took no request"
    );
    let mut pushed = proxy.bootstrap.clone();
    limit(&mut pushed, &limits);
    proxy.proxy.apply(pushed).unwrap();
    assert_eq!(
        ask(&mut client, "greedy", json!({"max_tokens": 250}))
            .await
            .status,
        429
    );
    assert_eq!(
        ask(&mut client, "modest", json!({"max_tokens": 250}))
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn tokens_are_metered_by_tenant_and_model() {
    let engine = engine().await;
    let proxy = proxy(&engine, json!([]));
    let mut client = proxy.client(Version::H2).await;
    for more in [
        json!({}),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
        json!({"stream": true}),
        json!({"refuse": 1}),
    ] {
        ask(&mut client, "metered", more).await;
    }
    // A hash stands for the tenant: whose counts they are shows in the counts.
    let all = |page: &str| {
        let mut tenants: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        let ours = page
            .lines()
            .filter(|line| line.starts_with("outrigger_tenant_tokens_total"));
        for line in ours {
            let label = |name: &str| {
                line.split(&format!("{name}=\""))
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
            };
            let value = line.rsplit_once(' ').unwrap().1.parse().unwrap();
            let series = format!("{} {}", label("kind"), label("source"));
            tenants
                .entry(label("tenant").to_owned())
                .or_default()
                .insert(series, value);
        }
        tenants
    };
    let expected = |counts: &BTreeMap<String, u64>| {
        let of = |series: &str| counts.get(series).copied().unwrap_or_default();
        of("completion estimate") == 4
            && of("prompt estimate") > 0
            && (of("prompt usage"), of("completion usage")) == (60, 340)
    };
    let seen = || async {
        let page = Client::get(proxy.admin(), "/stats/prometheus").await.text();
        all(&page).values().any(expected).then_some(())
    };
    eventually("three answers are counted for one tenant", seen).await;
    let page = Client::get(proxy.admin(), "/stats/prometheus").await.text();
    assert!(!page.contains("metered"), "keys are not shown");
}

#[test]
fn a_limit_that_cannot_work_is_refused() {
    use clap::Parser as _;
    let options = outrigger_proxy::options::Options::parse_from(["outrigger-proxy"]);
    let base = outrigger_proxy::bootstrap::from_options(&options).unwrap();
    let refusal = |bootstrap: &Bootstrap| {
        outrigger_proxy::process::check(bootstrap)
            .expect_err("refused")
            .join("\n")
    };
    for (limits, expected) in [
        (
            json!([{"requests_per_minute": 1}]),
            "limits[0].name: must not be empty",
        ),
        (
            json!([{"name": "a"}]),
            "limits[0].requests_per_minute: this limit limits nothing",
        ),
        (
            json!([{"name": "a", "key": ["user"], "requests_per_minute": 1}]),
            "limits[0].key: 'user' is none of tenant, model, header:NAME",
        ),
        (json!([{"name": "a", "rpm": 1}]), "unknown field `rpm`"),
    ] {
        let mut bootstrap = base.clone();
        limit(&mut bootstrap, &limits);
        let error = refusal(&bootstrap);
        assert!(error.contains(expected), "{error}");
    }
    let mut alone = base;
    limit(&mut alone, &json!([]));
    for listener in &mut alone.listeners {
        let is_openai = |filter: &HttpFilter| filter.config.type_url.contains(".openai.");
        listener
            .http()
            .http_filters
            .retain(|filter| !is_openai(filter));
    }
    assert!(
        refusal(&alone).contains("http_filters[limits]: needs"),
        "{}",
        refusal(&alone)
    );
}
