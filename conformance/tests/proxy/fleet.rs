//! Several proxies as one system: who is a candidate, what the fleet answers as one, what peers may say, and what a
//! dead, stalled or returning peer changes.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::Method;
use outrigger_conformance::{
    harness::{
        Client, Process, ProxyBuilder, Reply, TestProxy, Upstream, Version, alive, eventually,
        free_address, hosts, request,
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
pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const COMPLETIONS: &str = "/v1/completions";
pub(super) const ENDPOINT: &str = "x-outrigger-endpoint";

pub(super) fn engine(model: &str) -> SimEngine {
    SimEngine::start(Config {
        model: model.to_owned(),
        ..Config::default()
    })
    .unwrap()
}

/// Two proxies, each beside an engine and a peer of the other.
pub(super) async fn pair(
    first: SocketAddr,
    second: SocketAddr,
    policy: &str,
) -> (TestProxy, TestProxy) {
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

pub(super) fn generation(model: &str) -> String {
    format!(r#"{{"model":"{model}","prompt":"hello","max_tokens":2}}"#)
}

pub(super) async fn get(client: &mut Client, path: &str) -> Reply {
    client.send(request(Method::GET, path, "")).await
}

pub(super) fn models(reply: &Reply) -> BTreeSet<String> {
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

pub(super) async fn echo(name: &'static str) -> Upstream {
    Upstream::engine(move |mut conn, _| async move {
        conn.json("200 OK", &format!("{{\"served_by\":\"{name}\"}}"))
            .await
            .then_some(conn)
    })
    .await
}

pub(super) async fn served_by(client: &mut Client, model: &str) -> (u16, String) {
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
