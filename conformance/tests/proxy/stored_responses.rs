//! Stored responses: whichever proxy is asked, the engine that holds one answers, and never another.

use http::Method;
use outrigger_conformance::{
    harness::{Client, ProxyBuilder, Reply, TestProxy, Version, eventually, free_address, request},
    sim::{Config, SimEngine},
};
use serde_json::{Value, json};
use std::net::SocketAddr;

const RESPONSES: &str = "/v1/responses";
const ENDPOINT: &str = "x-outrigger-endpoint";
const COUNTER: &str = "outrigger_stored_responses_total";

fn engine(port: u16, seed: u64) -> SimEngine {
    SimEngine::start(Config {
        port,
        seed,
        responses_store: true,
        ..Config::default()
    })
    .unwrap()
}

/// A proxy beside each of two engines, and one that has none: it never sees a create unless a case sends it one.
struct Fleet {
    engines: [SimEngine; 2],
    beside: [TestProxy; 2],
    gateway: TestProxy,
    inbound: [SocketAddr; 2],
}

impl Fleet {
    async fn start() -> Self {
        let engines = [engine(0, 1), engine(0, 2)];
        let inbound = [free_address(), free_address()];
        let beside = [0, 1].map(|at| {
            ProxyBuilder::new()
                .engine(engines[at].http_addr)
                .flag("--inbound", &inbound[at].to_string())
                .peer(inbound[1 - at])
                .start()
        });
        let gateway = gateway(&inbound);
        for proxy in beside.iter().chain([&gateway]) {
            proxy.wait_alive(2).await;
        }
        Self {
            engines,
            beside,
            gateway,
            inbound,
        }
    }

    /// Which engine an answer came from.
    fn place(&self, reply: &Reply) -> usize {
        let ends = |engine: &SimEngine| {
            let port = format!(":{}", engine.http_addr.port());
            reply.header(ENDPOINT).ends_with(&port)
        };
        let place = self.engines.iter().position(ends);
        place.unwrap_or_else(|| panic!("{} {}", reply.status, reply.text()))
    }

    /// Creates one at each engine through the first proxy; gives their ids.
    async fn create(&self, extra: &Value) -> [String; 2] {
        let mut client = self.beside[0].client(Version::H1).await;
        let mut ids = [None, None];
        while ids.iter().any(Option::is_none) {
            let reply = client.post(RESPONSES, body(extra)).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            ids[self.place(&reply)] = Some(id(&reply.json()));
        }
        ids.map(Option::unwrap)
    }
}

fn gateway(inbound: &[SocketAddr]) -> TestProxy {
    let peers = inbound.iter();
    peers
        .fold(ProxyBuilder::new(), |built, peer| built.peer(*peer))
        .start()
}

fn body(extra: &Value) -> String {
    let mut body =
        json!({"model": "sim", "input": "hello", "max_output_tokens": 4, "temperature": 0});
    let fields = body.as_object_mut().unwrap();
    fields.extend(extra.as_object().unwrap().clone());
    body.to_string()
}

fn id(response: &Value) -> String {
    response["id"].as_str().unwrap().to_owned()
}

async fn get(proxy: &TestProxy, path: &str, version: Version) -> Reply {
    let mut client = proxy.client(version).await;
    client.send(request(Method::GET, path, "")).await
}

async fn fetch(proxy: &TestProxy, id: &str) -> Reply {
    get(proxy, &format!("{RESPONSES}/{id}"), Version::H1).await
}

async fn cancel(proxy: &TestProxy, id: &str) -> Reply {
    let mut client = proxy.client(Version::H1).await;
    client.post(&format!("{RESPONSES}/{id}/cancel"), "").await
}

#[tokio::test]
async fn a_stored_response_is_fetched_through_any_proxy() {
    let fleet = Fleet::start().await;
    for (owner, id) in fleet.create(&json!({})).await.iter().enumerate() {
        for proxy in fleet.beside.iter().chain([&fleet.gateway]) {
            for version in Version::BOTH {
                let path = format!("{RESPONSES}/{id}");
                let reply = get(proxy, &path, version).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                assert_eq!(fleet.place(&reply), owner);
                assert_eq!(reply.json()["id"], **id);
                assert_eq!(reply.json()["status"], "incomplete");
            }
            // The engine's own words for what is over.
            let refused = cancel(proxy, id).await;
            assert_eq!(refused.status, 400, "{}", refused.text());
            assert_eq!(refused.json()["error"]["param"], "response_id");
            assert_eq!(fleet.place(&refused), owner);
        }
    }
    let owned = fleet.gateway.metric(COUNTER, r#"outcome="owner""#).await;
    assert!(owned >= 18.0, "{owned}");
}

#[tokio::test]
async fn a_restart_of_every_proxy_forgets_no_owner() {
    let fleet = Fleet::start().await;
    let ids = fleet.create(&json!({})).await;
    let Fleet {
        engines,
        beside,
        gateway: entry,
        inbound,
    } = fleet;
    let nodes = beside
        .each_ref()
        .map(|proxy| proxy.bootstrap.node.id.clone());
    drop((beside, entry));
    let beside = [0, 1].map(|at| {
        ProxyBuilder::new()
            .engine(engines[at].http_addr)
            .flag("--node-id", &nodes[at])
            .flag("--inbound", &inbound[at].to_string())
            .peer(inbound[1 - at])
            .start()
    });
    let fleet = Fleet {
        gateway: gateway(&inbound),
        engines,
        beside,
        inbound,
    };
    for proxy in fleet.beside.iter().chain([&fleet.gateway]) {
        proxy.wait_alive(2).await;
        for (owner, id) in ids.iter().enumerate() {
            let reply = fetch(proxy, id).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert_eq!(fleet.place(&reply), owner);
        }
    }
}

#[tokio::test]
async fn a_conversation_goes_on_at_the_engine_that_has_its_beginning() {
    let fleet = Fleet::start().await;
    for (owner, first) in fleet.create(&json!({})).await.iter().enumerate() {
        let mut previous = first.clone();
        let mut tokens = 0;
        for proxy in fleet.beside.iter().chain([&fleet.gateway]) {
            let mut client = proxy.client(Version::H1).await;
            let next = body(&json!({"previous_response_id": previous}));
            let reply = client.post(RESPONSES, next).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert_eq!(fleet.place(&reply), owner);
            let told = reply.json();
            assert_eq!(told["previous_response_id"], *previous);
            let longer = told["usage"]["input_tokens"].as_u64().unwrap();
            assert!(longer > tokens, "the engine knew what was said before");
            (tokens, previous) = (longer, id(&told));
        }
    }
}

#[tokio::test]
async fn a_stream_tells_the_id_by_which_it_is_fetched() {
    let fleet = Fleet::start().await;
    let mut client = fleet.beside[1].client(Version::H2).await;
    for _ in 0..4 {
        let stream = client.post(RESPONSES, body(&json!({"stream": true}))).await;
        let owner = fleet.place(&stream);
        let text = stream.text();
        let ids: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str::<Value>(data).unwrap())
            .filter(|event| event["response"].is_object())
            .map(|event| id(&event["response"]))
            .collect();
        assert_eq!(ids.len(), 3, "{text}");
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let reply = fetch(&fleet.gateway, &ids[0]).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(fleet.place(&reply), owner);
    }
}

#[tokio::test]
async fn what_runs_in_the_background_is_followed_and_cancelled_from_elsewhere() {
    let fleet = Fleet::start().await;
    let long = json!({"background": true, "max_output_tokens": 4_000, "ignore_eos": true});
    for (owner, id) in fleet.create(&long).await.iter().enumerate() {
        let queued = fetch(&fleet.gateway, id).await;
        assert_eq!(queued.json()["status"], "queued");
        let cancelled = cancel(&fleet.gateway, id).await;
        assert_eq!(cancelled.status, 200, "{}", cancelled.text());
        assert_eq!(cancelled.json()["status"], "cancelled");
        assert_eq!(fleet.place(&cancelled), owner);
        let engine = &fleet.engines[owner];
        eventually("the engine is idle", || async {
            (engine.load().0 + engine.load().1 == 0).then_some(())
        })
        .await;
        let later = fetch(&fleet.beside[1], id).await;
        assert_eq!(later.json()["status"], "cancelled");
    }
}

#[tokio::test]
async fn a_stream_in_the_background_is_told_again_from_elsewhere() {
    let fleet = Fleet::start().await;
    let mut client = fleet.beside[0].client(Version::H1).await;
    for _ in 0..2 {
        let stream = json!({"background": true, "stream": true});
        let first = client.post(RESPONSES, body(&stream)).await;
        let text = first.text();
        let begun = text.lines().nth(1).unwrap();
        let begun: Value = serde_json::from_str(begun.strip_prefix("data: ").unwrap()).unwrap();
        let path = format!("{RESPONSES}/{}", id(&begun["response"]));
        let again = get(&fleet.gateway, &format!("{path}?stream=true"), Version::H2).await;
        assert_eq!(again.text(), text);
        assert_eq!(fleet.place(&again), fleet.place(&first));
        let rest = format!("{path}?stream=true&starting_after=1");
        let rest = get(&fleet.gateway, &rest, Version::H1).await.text();
        assert!(text.ends_with(&rest), "{rest}");
        assert!(rest.starts_with("event: response.output_item.added"));
    }
}

#[tokio::test]
async fn an_id_that_tells_no_owner_is_looked_for() {
    let fleet = Fleet::start().await;
    // The client's own choice stays, in whichever place it is made.
    for (at, port) in fleet.engines.iter().map(|e| e.http_addr).enumerate() {
        let own = format!("mine-{at}");
        let created = Client::connect(port, Version::H1)
            .await
            .post(RESPONSES, body(&json!({"request_id": own})))
            .await;
        assert_eq!(created.json()["id"], own);
        for proxy in fleet.beside.iter().chain([&fleet.gateway]) {
            let reply = fetch(proxy, &own).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert_eq!(fleet.place(&reply), at);
            let mut client = proxy.client(Version::H1).await;
            let next = body(&json!({"previous_response_id": own}));
            let reply = client.post(RESPONSES, next).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert_eq!(fleet.place(&reply), at);
        }
    }
    let mut client = fleet.gateway.client(Version::H1).await;
    let kept = client
        .post(RESPONSES, body(&json!({"request_id": "kept"})))
        .await;
    assert_eq!(kept.json()["id"], "kept");
    // Nobody has it: an engine says so, in its own words.
    let unknown = fetch(&fleet.gateway, "resp_8eb7edc987fd1251").await;
    assert_eq!(unknown.status, 404);
    assert_eq!(unknown.header("x-outrigger-error"), "");
    let error = &unknown.json()["error"];
    assert_eq!(
        error["message"],
        "Response with id 'resp_8eb7edc987fd1251' not found."
    );
    let lines = fleet.gateway.log(6).await;
    assert_eq!(lines.last().unwrap()["response_code"], 404);
}

#[tokio::test]
async fn an_owner_that_is_dead_or_gone_is_named_and_nobody_stands_in() {
    let mut fleet = Fleet::start().await;
    let ids = fleet.create(&json!({})).await;
    let gone = format!("resp_{}_{}", "0".repeat(16), "1".repeat(32));
    for proxy in fleet.beside.iter().chain([&fleet.gateway]) {
        let reply = fetch(proxy, &gone).await;
        assert_eq!(reply.status, 404, "{}", reply.text());
        let error = &reply.json()["error"];
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .contains("left the fleet")
        );
        assert_eq!(error["code"], 404);
        assert_eq!(reply.header(ENDPOINT), "", "no engine's own words");
    }
    let port = fleet.engines[0].http_addr.port();
    fleet.engines[0].stop();
    fleet.gateway.wait_alive(1).await;
    let next = body(&json!({"previous_response_id": ids[0]}));
    let mut client = fleet.gateway.client(Version::H1).await;
    for reply in [
        fetch(&fleet.gateway, &ids[0]).await,
        cancel(&fleet.gateway, &ids[0]).await,
        client.post(RESPONSES, next).await,
    ] {
        assert_eq!(reply.status, 503, "{}", reply.text());
        assert_eq!(reply.header("retry-after"), "1");
        let message = reply.json()["error"]["message"].clone();
        assert!(message.as_str().unwrap().contains(&ids[0]), "{message}");
    }
    assert_eq!(fetch(&fleet.gateway, &ids[1]).await.status, 200);
    // Back without its memory: its own words.
    fleet.engines[0] = engine(port, 3);
    fleet.gateway.wait_alive(2).await;
    let reply = fetch(&fleet.gateway, &ids[0]).await;
    assert_eq!(reply.status, 404);
    assert_eq!(fleet.place(&reply), 0);
    assert_eq!(reply.json()["error"]["param"], "response_id");
}

#[tokio::test]
async fn a_peer_that_was_never_heard_may_hold_it() {
    let fleet = Fleet::start().await;
    let ids = fleet.create(&json!({})).await;
    let silent = gateway(&[fleet.inbound[0], free_address()]);
    silent.wait_alive(1).await;
    assert_eq!(fetch(&silent, &ids[0]).await.status, 200);
    let reply = fetch(&silent, &ids[1]).await;
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert_eq!(reply.header("retry-after"), "1");
}
