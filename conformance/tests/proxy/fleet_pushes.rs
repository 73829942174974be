//! Pushes of configuration to a proxy of a fleet: nothing is lost, nothing breaks, and one that is broken changes nothing.

use super::fleet::{CHAT, COMPLETIONS, engine, served_by};
use http::Method;
use outrigger_conformance::{
    harness::{
        Client, OneChain, ProxyBuilder, Upstream, Version, alive, eventually, hosts, request,
        scratch, wait_alive,
    },
    sim::{Config, SimEngine},
};
use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

/// Requests in flight at the fleet's first endpoint, as `/clusters` prints it.
async fn rq_active(admin: SocketAddr) -> String {
    let host = hosts(admin, "fleet").await.remove(0);
    let stats = host["stats"].as_array().unwrap();
    let active = stats.iter().find(|stat| stat["name"] == "rq_active");
    active.unwrap()["value"].as_str().unwrap().to_owned()
}

/// The request of the round before may not be given back yet.
async fn only_the_stream_is_counted(admin: SocketAddr) {
    eventually(
        "the running stream, and nothing else, is counted",
        || async { (rq_active(admin).await == "1").then_some(()) },
    )
    .await;
}

async fn idle_again(admin: SocketAddr) {
    eventually("the stream's load is given back", || async {
        let host = hosts(admin, "fleet").await.remove(0);
        (host["outrigger"]["load"]["active_requests"] == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_push_of_configuration_loses_nothing_and_breaks_no_stream() {
    // With the model's files at hand prompts are tokenised here, so that a hit is predicted from the second time on.
    let files = scratch("model");
    let engine = SimEngine::start(Config {
        model_path: Some(files.clone()),
        ..Config::default()
    })
    .unwrap();
    let proxy = ProxyBuilder::new()
        .engine(engine.http_addr)
        .flag("--policy", "kv")
        .start();
    proxy.wait_alive(1).await;
    let prompt = "the same words again and again and again ".repeat(40);
    let body = format!(r#"{{"model":"sim","prompt":"{prompt}","max_tokens":2}}"#);
    let mut client = proxy.client(Version::H1).await;
    let mut asked = 0;
    let mut predicted = 0;
    // Until the engine's events have come and are used.
    while predicted == 0 {
        assert_eq!(client.post(COMPLETIONS, body.clone()).await.status, 200);
        asked += 1;
        let line = proxy.log(asked).await.pop().unwrap();
        predicted = line["prefix_hit_tokens"].as_u64().unwrap_or(0);
        assert!(asked < 200, "never predicted a hit: {line}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let long =
        r#"{"model":"sim","prompt":"go on","max_tokens":6000,"ignore_eos":true,"stream":true}"#;
    let mut streaming = proxy.client(Version::H2).await;
    let mut stream = streaming
        .begin(request(Method::POST, COMPLETIONS, long))
        .await;
    stream.until("data: ").await;
    for round in 0..3 {
        let mut pushed = proxy.bootstrap.clone();
        for listener in &mut pushed.listeners {
            listener.http().max_request_headers_kb = 30 + round;
        }
        for cluster in &mut pushed.clusters {
            cluster.circuit_breakers.default.max_requests = 1000 + round;
        }
        proxy.proxy.apply(pushed).unwrap();
        // At once: no look-away until something is heard anew.
        assert_eq!(alive(proxy.admin()).await, 1, "health is kept");
        only_the_stream_is_counted(proxy.admin()).await;
        assert_eq!(client.post(COMPLETIONS, body.clone()).await.status, 200);
    }
    let lines = proxy.log(asked + 3).await;
    for line in &lines[asked..] {
        assert_eq!(
            line["prefix_hit_tokens"].as_u64(),
            Some(predicted),
            "the index is kept: {line}"
        );
    }
    for _ in 0..20 {
        let more = stream.next().await.expect("it goes on");
        assert!(
            !String::from_utf8_lossy(&more).contains("\"error\""),
            "{more:?}"
        );
    }
    drop(stream);
    idle_again(proxy.admin()).await;
    let _ = std::fs::remove_dir_all(files);
}

#[tokio::test]
async fn a_broken_push_changes_nothing_and_says_everything() {
    let server = Upstream::named("a").await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let dump = || async { Client::get(proxy.admin(), "/config_dump").await.text() };
    let before = dump().await;
    let mut broken = proxy.bootstrap.clone();
    // Two mistakes in two listeners, and a good change that must not slip in.
    broken.clusters.retain(|cluster| cluster.name != "local");
    for listener in &mut broken.listeners {
        for filter in &mut listener.http().http_filters {
            if filter.name == "openai" {
                filter.config.value = serde_json::json!({"no_such_field": 1});
            }
        }
        listener.http().max_request_headers_kb = 1;
    }
    let errors = proxy
        .proxy
        .apply(broken)
        .expect_err("it is wrong")
        .join("\n");
    for word in ["no_such_field", "openai", "local", "outbound", "inbound"] {
        assert!(errors.contains(word), "{word}: {errors}");
    }
    assert_eq!(dump().await, before);
    let mut call = request(Method::POST, CHAT, "{}");
    call.headers_mut()
        .insert("x-long", "a".repeat(4096).parse().unwrap());
    assert_eq!(
        proxy.client(Version::H1).await.send(call).await.status,
        200,
        "the old limit still holds"
    );
}

#[tokio::test]
async fn a_push_can_take_an_engine_away_and_bring_it_back() {
    let (one, two) = (engine("sim"), engine("sim"));
    let proxy = ProxyBuilder::new()
        .engine(one.http_addr)
        .engine(two.http_addr)
        .start();
    proxy.wait_alive(2).await;
    let mut less = proxy.bootstrap.clone();
    for cluster in &mut less.clusters {
        cluster
            .load_assignment
            .endpoints
            .retain(|endpoint| endpoint.address.port == one.http_addr.port());
    }
    proxy.proxy.apply(less).unwrap();
    let mut client = proxy.client(Version::H1).await;
    for _ in 0..4 {
        let (status, by) = served_by(&mut client, "sim").await;
        assert_eq!(
            (status, by.ends_with(&one.http_addr.port().to_string())),
            (200, true),
            "{by}"
        );
    }
    proxy.proxy.apply(proxy.bootstrap.clone()).unwrap();
    wait_alive(proxy.admin(), 2).await;
    // Ties are broken by what the engines said last, half a second ago at most, and by chance.
    let mut used = BTreeSet::new();
    let mut asked = 0;
    while used.len() < 2 {
        used.insert(served_by(&mut client, "sim").await.1);
        asked += 1;
        assert!(asked < 500, "only {used:?} is used");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
