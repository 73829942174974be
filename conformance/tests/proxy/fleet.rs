//! Several proxies as one system: who is a candidate, what the fleet answers as one, what peers may say, and what a
//! dead, stalled or returning peer changes.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::Method;
use outrigger_conformance::{
    harness::{
        Client, OneChain, Process, ProxyBuilder, Reply, TestProxy, Upstream, Version, alive,
        eventually, free_address, hosts, request, scratch, wait_alive,
    },
    sim::{Config, SimEngine},
};
use outrigger_xds::{
    feed::{FeedBody, FeedMessage, FeedSource, FeedStream},
    report::{EngineId, EngineState, Health, KvSnapshot, Load},
};
use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const ENDPOINT: &str = "x-outrigger-endpoint";

fn engine(model: &str) -> SimEngine {
    SimEngine::start(Config {
        model: model.to_owned(),
        ..Config::default()
    })
    .unwrap()
}

/// Two proxies, each beside an engine and a peer of the other.
async fn pair(first: SocketAddr, second: SocketAddr, policy: &str) -> (TestProxy, TestProxy) {
    let (a, b) = (free_address(), free_address());
    let build = |engine, own: SocketAddr, other| {
        ProxyBuilder::new()
            .engine(engine)
            .flag("--inbound", &own.to_string())
            .peer(other)
            .flag("--policy", policy)
            .start()
    };
    let proxies = (build(first, a, b), build(second, b, a));
    proxies.0.wait_alive(2).await;
    proxies.1.wait_alive(2).await;
    proxies
}

fn generation(model: &str) -> String {
    format!(r#"{{"model":"{model}","prompt":"hello","max_tokens":2}}"#)
}

async fn get(client: &mut Client, path: &str) -> Reply {
    client.send(request(Method::GET, path, "")).await
}

fn models(reply: &Reply) -> BTreeSet<String> {
    let listed = reply.json();
    let entries = listed["data"]
        .as_array()
        .unwrap_or_else(|| panic!("{listed}"));
    entries
        .iter()
        .map(|entry| entry["id"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_model_is_served_where_it_is_and_listed_everywhere() {
    let (one, two) = (engine("one"), engine("two"));
    let (first, second) = pair(one.http_addr, two.http_addr, "round_robin").await;
    for version in Version::BOTH {
        for proxy in [&first, &second] {
            let mut client = proxy.client(version).await;
            for model in ["one", "two", "one", "two"] {
                let reply = client.post(COMPLETIONS, generation(model)).await;
                assert_eq!(reply.status, 200, "{version:?}: {}", reply.text());
                assert_eq!(reply.json()["model"], model);
                let port = if model == "one" {
                    one.http_addr
                } else {
                    two.http_addr
                }
                .port();
                assert!(
                    reply.header(ENDPOINT).ends_with(&format!(":{port}")),
                    "{}",
                    reply.header(ENDPOINT)
                );
            }
            let listed = get(&mut client, "/v1/models").await;
            assert_eq!(
                models(&listed),
                BTreeSet::from(["one".to_owned(), "two".to_owned()])
            );
            let unknown = client.post(COMPLETIONS, generation("three")).await;
            assert_eq!(unknown.status, 404);
            assert_eq!(
                unknown.header("x-outrigger-error"),
                "",
                "the engine's own answer, not ours"
            );
            assert!(
                unknown.text().contains("`three` does not exist"),
                "{}",
                unknown.text()
            );
        }
    }
}

#[tokio::test]
async fn what_administers_engines_is_refused_from_outside() {
    let engine = SimEngine::start(Config {
        dev_mode: true,
        ..Config::default()
    })
    .unwrap();
    let proxy = ProxyBuilder::new().engine(engine.http_addr).start();
    proxy.wait_alive(1).await;
    for version in Version::BOTH {
        for address in [proxy.outbound(), proxy.inbound()] {
            let mut client = Client::connect(address, version).await;
            for path in [
                "/sleep",
                "/sleep/",
                "/sleep?level=2",
                "/%73leep",
                "//sleep",
                "/%2fsleep",
                "/reset_prefix_cache",
                "/server_info",
                "/kv_event_sources",
                "/v1/load_lora_adapter",
                "/v1%2fload_lora_adapter",
                "/collective_rpc",
                "/start_profile",
                "/flush_cache",
            ] {
                for method in [Method::POST, Method::GET] {
                    let reply = client.send(request(method.clone(), path, "{}")).await;
                    assert_eq!(reply.status, 403, "{method} {path} {version:?}");
                }
            }
        }
        let told = proxy.client(version).await.post("/sleep", "{}").await;
        assert_eq!(told.json()["error"]["type"], "PermissionDeniedError");
    }
}

#[tokio::test]
async fn weights_and_corpora_of_engines_are_not_open_to_clients() {
    let server = Upstream::named("engine").await;
    let proxy = ProxyBuilder::new().server(server.address).start();
    let mut client = proxy.client(Version::H1).await;
    for path in [
        // vLLM 0.32
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/update_weight_version",
        "/finish_weight_update",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/weight_checker",
        "/weight_info",
        // SGLang 0.5.23
        "/begin_weight_update",
        "/end_weight_update",
        "/weights_checker",
        "/add_external_corpus",
        "/remove_external_corpus",
        "/list_external_corpora",
        "/remote_instance_transfer_engine_info",
        "/get_remote_instance_transfer_engine_info",
    ] {
        for method in [Method::POST, Method::GET, Method::PUT] {
            let reply = client.send(request(method.clone(), path, "{}")).await;
            assert_eq!(reply.status, 403, "{method} {path}");
        }
    }
    assert!(server.exchanges().is_empty(), "nothing reached the engine");
}

#[tokio::test]
async fn inbound_serves_only_what_it_is_asked_for_by_name_and_has() {
    let engine = engine("sim");
    let proxy = ProxyBuilder::new().engine(engine.http_addr).start();
    proxy.wait_alive(1).await;
    let id = hosts(proxy.admin(), "local").await[0]["outrigger"]["engine_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for version in Version::BOTH {
        let mut client = Client::connect(proxy.inbound(), version).await;
        for (named, status) in [
            (None, 503),
            (Some("elsewhere/1.2.3.4:8000"), 503),
            (Some(id.as_str()), 200),
        ] {
            let mut call = request(Method::POST, COMPLETIONS, generation("sim"));
            if let Some(named) = named {
                call.headers_mut().insert(ENDPOINT, named.parse().unwrap());
            }
            let reply = client.send(call).await;
            assert_eq!(
                reply.status,
                status,
                "{named:?} {version:?}: {}",
                reply.text()
            );
            if status == 503 {
                assert_eq!(
                    reply.header("x-outrigger-retry"),
                    "nothing-sent",
                    "{named:?}"
                );
                assert_eq!(reply.header("x-outrigger-error"), "UH");
            }
        }
    }
}

async fn echo(name: &'static str) -> Upstream {
    Upstream::engine(move |mut conn, _| async move {
        conn.json("200 OK", &format!("{{\"served_by\":\"{name}\"}}"))
            .await
            .then_some(conn)
    })
    .await
}

#[tokio::test]
async fn what_only_proxies_may_say_is_not_believed_of_clients() {
    let (one, two) = (echo("one").await, echo("two").await);
    let (first, second) = pair(one.address, two.address, "round_robin").await;
    let far = hosts(second.admin(), "local").await[0]["outrigger"]["engine_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for version in Version::BOTH {
        // Without a model a request stays here, whatever the client says.
        let mut call = request(Method::POST, "/custom", "{}");
        for (name, value) in [
            (ENDPOINT, far.as_str()),
            ("x-outrigger-prompt-tokens", "1000000"),
            ("x-outrigger-hit-tokens", "5"),
            ("x-outrigger-blocks", "AAAA"),
            ("x-outrigger-retry", "nothing-sent"),
        ] {
            call.headers_mut().insert(name, value.parse().unwrap());
        }
        let reply = first.client(version).await.send(call).await;
        assert_eq!(reply.json()["served_by"], "one");
        let got = one.exchanges().pop().unwrap();
        let told: Vec<_> = got
            .headers
            .iter()
            .filter(|(name, _)| name.starts_with("x-outrigger-") && name != "x-outrigger-via")
            .collect();
        assert!(told.is_empty(), "{told:?}");
    }
    // What peers say to each other is for them, not for the engine.
    for _ in 0..4 {
        assert_eq!(
            first
                .client(Version::H1)
                .await
                .post(CHAT, r#"{"model":"m"}"#)
                .await
                .status,
            200
        );
    }
    for got in two.exchanges() {
        assert_eq!(got.count(ENDPOINT), 0, "{got:?}");
    }
    assert!(!two.exchanges().is_empty());
}

#[tokio::test]
async fn requests_without_a_model_stay_on_their_node() {
    let (one, two) = (echo("one").await, echo("two").await);
    let (first, second) = pair(one.address, two.address, "round_robin").await;
    for version in Version::BOTH {
        for _ in 0..4 {
            for (proxy, name) in [(&first, "one"), (&second, "two")] {
                let reply = proxy.client(version).await.post("/any/path", "{}").await;
                assert_eq!(reply.json()["served_by"], name);
            }
        }
    }
    let own = engine("sim");
    let far = engine("sim");
    let (near, _other) = pair(own.http_addr, far.http_addr, "round_robin").await;
    let mut client = near.client(Version::H1).await;
    for path in ["/health", "/metrics", "/version", "/load", "/ping"] {
        let reply = get(&mut client, path).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        assert_eq!(
            reply.header("server"),
            "uvicorn",
            "{path} is the engine's own"
        );
        let port = own.http_addr.port().to_string();
        assert!(
            reply.header(ENDPOINT).ends_with(&port),
            "{path}: {}",
            reply.header(ENDPOINT)
        );
    }
}

#[tokio::test]
async fn a_gateway_answers_for_itself() {
    let engine = engine("sim");
    let beside = ProxyBuilder::new().engine(engine.http_addr).start();
    let gateway = ProxyBuilder::new().peer(beside.inbound()).start();
    let nobody = ProxyBuilder::new().start();
    gateway.wait_alive(1).await;
    for version in Version::BOTH {
        let mut client = gateway.client(version).await;
        assert_eq!(get(&mut client, "/health").await.status, 200);
        assert!(
            get(&mut client, "/version")
                .await
                .text()
                .contains("outrigger")
        );
        assert_eq!(get(&mut client, "/metrics").await.status, 200);
        assert_eq!(
            models(&get(&mut client, "/v1/models").await),
            BTreeSet::from(["sim".to_owned()])
        );
        assert_eq!(
            client.post(COMPLETIONS, generation("sim")).await.status,
            200
        );
        let mut client = nobody.client(version).await;
        assert_eq!(get(&mut client, "/health").await.status, 503);
        assert_eq!(get(&mut client, "/version").await.status, 200);
    }
}

#[tokio::test]
async fn a_loop_ends_in_508() {
    let own = free_address();
    let looped = ProxyBuilder::new()
        .flag("--listen", &own.to_string())
        .server(own)
        .start();
    for version in Version::BOTH {
        for path in [CHAT, "/other"] {
            let reply = looped.client(version).await.post(path, "{}").await;
            assert_eq!(reply.status, 508, "{path} {version:?}: {}", reply.text());
        }
    }
    // Two that send to each other.
    let (a, b) = (free_address(), free_address());
    let build = |own: SocketAddr, other| {
        ProxyBuilder::new()
            .flag("--listen", &own.to_string())
            .server(other)
            .start()
    };
    let (first, _second) = (build(a, b), build(b, a));
    assert_eq!(
        first
            .client(Version::H1)
            .await
            .post("/other", "{}")
            .await
            .status,
        508
    );
}

async fn served_by(client: &mut Client, model: &str) -> (u16, String) {
    let reply = client.post(COMPLETIONS, generation(model)).await;
    (reply.status.as_u16(), reply.header(ENDPOINT).to_owned())
}

/// Sends generations until told to stop; gives how many were sent and what was not 200.
fn keep_asking(
    address: SocketAddr,
    stop: Arc<AtomicBool>,
) -> tokio::task::JoinHandle<(usize, Vec<String>)> {
    tokio::spawn(async move {
        let (mut sent, mut failed) = (0, Vec::new());
        while !stop.load(SeqCst) {
            let mut client = Client::connect(address, Version::H1).await;
            let body = Bytes::from(generation("sim"));
            let reply = client.post(COMPLETIONS, body).await;
            sent += 1;
            if reply.status != 200 {
                failed.push(format!("{}: {}", reply.status, reply.text()));
            }
        }
        (sent, failed)
    })
}

struct Two {
    _engines: [SimEngine; 2],
    entry: TestProxy,
    beside: Process,
    flags: Vec<String>,
}

/// A proxy in this process, and its peer in one of its own.
async fn two() -> Two {
    let engines = [engine("sim"), engine("sim")];
    let inbound = free_address().to_string();
    let engine = format!("http://{}", engines[1].http_addr);
    let node = format!("far-{inbound}");
    let flags = [
        "--engine",
        &engine,
        "--inbound",
        &inbound,
        "--node-id",
        &node,
    ]
    .map(str::to_owned)
    .to_vec();
    let beside = Process::proxy(
        PROGRAM,
        &flags.iter().map(String::as_str).collect::<Vec<_>>(),
    )
    .await;
    let entry = ProxyBuilder::new()
        .engine(engines[0].http_addr)
        .peer(inbound.parse().unwrap())
        .start();
    entry.wait_alive(2).await;
    Two {
        _engines: engines,
        entry,
        beside,
        flags,
    }
}

impl Two {
    async fn uses_both(&self) {
        let mut client = self.entry.client(Version::H1).await;
        // Ties are broken by what the engines said last, half a second ago at most, and by chance.
        let mut used = BTreeSet::new();
        for _ in 0..500 {
            let (status, by) = served_by(&mut client, "sim").await;
            assert_eq!(status, 200);
            used.insert(by);
            if used.len() == 2 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("only {used:?} is used");
    }
}

#[tokio::test]
async fn a_killed_proxy_costs_no_request_and_is_used_again_when_it_is_back() {
    let mut fleet = two().await;
    fleet.uses_both().await;
    let stop = Arc::new(AtomicBool::new(false));
    let asking: Vec<_> = (0..4)
        .map(|_| keep_asking(fleet.entry.outbound(), stop.clone()))
        .collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    fleet.beside.signal("KILL");
    let killed = Instant::now();
    fleet.entry.wait_alive(1).await;
    assert!(
        killed.elapsed() < Duration::from_secs(5),
        "{:?}",
        killed.elapsed()
    );
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.store(true, SeqCst);
    for task in asking {
        let (sent, failed) = task.await.unwrap();
        assert!(sent > 0 && failed.is_empty(), "of {sent}: {failed:?}");
    }
    let flags: Vec<_> = fleet.flags.iter().map(String::as_str).collect();
    fleet.beside = Process::proxy(PROGRAM, &flags).await;
    fleet.entry.wait_alive(2).await;
    fleet.uses_both().await;
}

#[tokio::test]
async fn a_stalled_proxy_is_left_out_until_it_goes_on() {
    let fleet = two().await;
    fleet.uses_both().await;
    fleet.beside.signal("STOP");
    let stalled = Instant::now();
    fleet.entry.wait_alive(1).await;
    assert!(
        stalled.elapsed() < Duration::from_millis(5500),
        "{:?}",
        stalled.elapsed()
    );
    let mut client = fleet.entry.client(Version::H1).await;
    for _ in 0..4 {
        assert_eq!(served_by(&mut client, "sim").await.0, 200);
    }
    fleet.beside.signal("CONT");
    fleet.entry.wait_alive(2).await;
    fleet.uses_both().await;
}

#[tokio::test]
async fn an_engine_that_dies_leaves_every_proxy_and_comes_back_to_all() {
    let mut mortal = engine("sim");
    let port = mortal.http_addr.port();
    let own = engine("sim");
    let (near, far) = pair(own.http_addr, mortal.http_addr, "round_robin").await;
    mortal.stop();
    near.wait_alive(1).await;
    far.wait_alive(1).await;
    for proxy in [&near, &far] {
        let mut client = proxy.client(Version::H1).await;
        for _ in 0..3 {
            let (status, by) = served_by(&mut client, "sim").await;
            assert_eq!(
                (status, by.ends_with(&own.http_addr.port().to_string())),
                (200, true),
                "{by}"
            );
        }
    }
    let _again = SimEngine::start(Config {
        port,
        ..Config::default()
    })
    .unwrap();
    near.wait_alive(2).await;
    far.wait_alive(2).await;
}

/// Tells of one healthy engine; each subscription but the last of `stories` ends as its story says.
struct Scripted {
    engine: EngineId,
    subscriptions: AtomicUsize,
    stories: &'static [Story],
}

#[derive(Debug, Clone, Copy)]
enum Story {
    /// A message is missing.
    Gap,
    /// The stream ends.
    Ends,
    /// All goes well.
    Holds,
}

impl FeedSource for Scripted {
    fn subscribe(&self) -> FeedStream {
        let number = self.subscriptions.fetch_add(1, SeqCst);
        let story = *self.stories.get(number).unwrap_or(&Story::Holds);
        let message = |seq, body| FeedMessage {
            engine: self.engine.clone(),
            epoch: 7,
            seq,
            body,
        };
        let state = EngineState {
            health: Health::Healthy,
            dp_size: 1,
            ..EngineState::default()
        };
        let begin = [
            message(5, FeedBody::State(state)),
            message(5, FeedBody::Load(Load::default())),
            message(
                5,
                FeedBody::Snapshot(KvSnapshot {
                    block_tokens: 32,
                    ..KvSnapshot::default()
                }),
            ),
        ];
        let later = message(9, FeedBody::Changes(Vec::new()));
        let tail = stream::once(async move {
            match story {
                Story::Holds => std::future::pending::<()>().await,
                Story::Gap | Story::Ends => tokio::time::sleep(Duration::from_millis(150)).await,
            }
            matches!(story, Story::Gap).then_some(later)
        });
        let rest = tail.filter_map(|message| async move { message });
        // After a gap the teller does not end the stream: it is for the listener to ask anew.
        let end = stream::once(async move {
            if matches!(story, Story::Gap) {
                std::future::pending::<()>().await;
            }
        })
        .filter_map(|()| async move { None });
        Box::pin(stream::iter(begin).chain(rest).chain(end))
    }
}

#[tokio::test]
async fn a_gap_in_a_peers_feed_is_repaired_and_costs_no_request() {
    let server = echo("far").await;
    let node = format!("scripted-{}", server.address.port());
    // Both the proxy beside the engine and the gateway listen; the first two subscriptions have a gap.
    let source = Scripted {
        engine: EngineId::from(format!("{node}/{}", server.address).as_str()),
        subscriptions: AtomicUsize::new(0),
        stories: &[Story::Holds, Story::Gap, Story::Gap, Story::Gap],
    };
    let beside = ProxyBuilder::new()
        .flag("--node-id", &node)
        .engine(server.address)
        .told_by(source)
        .start();
    beside.wait_alive(1).await;
    let gateway = ProxyBuilder::new().peer(beside.inbound()).start();
    gateway.wait_alive(1).await;
    let gaps = "outrigger_feed_gaps_total";
    let mut client = gateway.client(Version::H1).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1200) {
        assert_eq!(client.post(CHAT, r#"{"model":"m"}"#).await.status, 200);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(gateway.metric(gaps, "").await >= 3.0, "gaps are counted");
    assert_eq!(alive(gateway.admin()).await, 1);
}

#[tokio::test]
async fn an_engine_told_of_before_it_was_configured_is_used_once_it_is() {
    let server = echo("late").await;
    let node = format!("scripted-{}", server.address.port());
    let source = Scripted {
        engine: EngineId::from(format!("{node}/{}", server.address).as_str()),
        subscriptions: AtomicUsize::new(0),
        stories: &[],
    };
    let proxy = ProxyBuilder::new()
        .flag("--node-id", &node)
        .engine(server.address)
        .told_by(source)
        .edit(|bootstrap| {
            bootstrap
                .clusters
                .iter_mut()
                .for_each(|cluster| cluster.load_assignment.endpoints.clear())
        })
        .start();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(alive(proxy.admin()).await, 0);
    let mut more = proxy.bootstrap.clone();
    let port = server.address.port();
    for cluster in &mut more.clusters {
        let mut endpoint = outrigger_xds::resource::endpoint::LbEndpoint {
            address: outrigger_xds::resource::endpoint::Address {
                host: "127.0.0.1".into(),
                port,
            },
            hostname: String::new(),
            health_status: Default::default(),
            load_balancing_weight: 1,
            locality: 0,
            metadata: Default::default(),
        };
        let ours = serde_json::json!({"duty": "engine", "id": format!("{node}/127.0.0.1:{port}")});
        endpoint.metadata.insert("outrigger".into(), ours);
        cluster.load_assignment.endpoints.push(endpoint);
    }
    proxy.proxy.apply(more).unwrap();
    proxy.wait_alive(1).await;
    assert_eq!(
        proxy
            .client(Version::H1)
            .await
            .post(CHAT, r#"{"model":"m"}"#)
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn a_peers_feed_that_ends_is_asked_for_again() {
    let server = echo("far").await;
    let node = format!("scripted-{}", server.address.port());
    let source = Scripted {
        engine: EngineId::from(format!("{node}/{}", server.address).as_str()),
        subscriptions: AtomicUsize::new(0),
        stories: &[Story::Holds, Story::Ends, Story::Ends],
    };
    let beside = ProxyBuilder::new()
        .flag("--node-id", &node)
        .engine(server.address)
        .told_by(source)
        .start();
    beside.wait_alive(1).await;
    let gateway = ProxyBuilder::new().peer(beside.inbound()).start();
    gateway.wait_alive(1).await;
    let last = format!("peer=\"{}\"", beside.inbound());
    eventually("the feed was cut", || async {
        (gateway.metric("outrigger_feed_connected", &last).await == 0.0).then_some(())
    })
    .await;
    gateway.wait_alive(1).await;
    assert_eq!(
        gateway
            .client(Version::H1)
            .await
            .post(CHAT, r#"{"model":"m"}"#)
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn a_large_body_passes_through_a_peer_as_it_is() {
    let server = Upstream::engine(|mut conn, got| async move {
        let sum: u64 = got
            .body
            .iter()
            .enumerate()
            .map(|(at, byte)| (at as u64 + 1) * u64::from(*byte))
            .sum();
        conn.json("200 OK", &format!("{{\"sum\":{sum}}}"))
            .await
            .then_some(conn)
    })
    .await;
    let beside = ProxyBuilder::new().engine(server.address).start();
    let entry = ProxyBuilder::new().peer(beside.inbound()).start();
    entry.wait_alive(1).await;
    let body = format!(
        "{{\"model\":\"m\",\"prompt\":\"{}\"}}",
        "0123456789".repeat(400_000)
    );
    let sum: u64 = body
        .bytes()
        .enumerate()
        .map(|(at, byte)| (at as u64 + 1) * u64::from(byte))
        .sum();
    for version in Version::BOTH {
        let reply = entry
            .client(version)
            .await
            .post(COMPLETIONS, body.clone())
            .await;
        assert_eq!(reply.json()["sum"], sum, "{version:?}");
    }
}

#[tokio::test]
async fn a_peers_refusal_is_walked_past() {
    let (own, far) = (engine("sim"), engine("sim"));
    let (near, beside) = pair(own.http_addr, far.http_addr, "round_robin").await;
    // The proxy beside the far engine takes one request at a time, so the next is refused with nothing sent.
    let mut limited = beside.bootstrap.clone();
    limited
        .clusters
        .iter_mut()
        .for_each(|cluster| cluster.circuit_breakers.default.max_requests = 1);
    beside.proxy.apply(limited).unwrap();
    let long =
        r#"{"model":"sim","prompt":"go on","max_tokens":400,"ignore_eos":true,"stream":true}"#;
    let mut client = beside.client(Version::H1).await;
    let far_id = hosts(beside.admin(), "local").await[0]["outrigger"]["engine_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut call = request(Method::POST, COMPLETIONS, long);
    call.headers_mut().insert(ENDPOINT, far_id.parse().unwrap());
    let mut inbound = Client::connect(beside.inbound(), Version::H1).await;
    let mut running = inbound.begin(call).await;
    running.until("data: ").await;
    for _ in 0..6 {
        let (status, by) = served_by(&mut near.client(Version::H1).await, "sim").await;
        assert_eq!((status, by == far_id), (200, false), "{by}");
    }
    drop((running, client.post("/none", "").await));
}

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
