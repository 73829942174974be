//! What proxies learn from agents, brokers and each other, and what they must not make of it: engines of other nodes,
//! engines that are gone, blocks of another size.

use futures_util::{StreamExt, stream};
use outrigger_conformance::{
    harness::{
        Agent, Client, Process, ProxyBuilder, TestProxy, Upstream, Version, alive, eventually,
        hosts, metric, scratch, wait_alive,
    },
    sim::{Config, SimEngine},
};
use outrigger_proxy::feed::AgentSource;
use outrigger_xds::{
    feed::{FeedBody, FeedMessage, FeedSource, FeedStream},
    report::{EngineId, EngineState, Health, KvSnapshot, Load, Shelf},
    resource::endpoint::Duty,
};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
/// For something to come about; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);
const COMPLETIONS: &str = "/v1/completions";

/// One subscription: what it tells, and whether it then ends.
struct Story {
    tells: Vec<FeedMessage>,
    ends: bool,
}

/// Each subscription goes as its story says; further ones as the last.
struct Script {
    stories: Vec<Story>,
    subscriptions: Arc<AtomicUsize>,
}

impl Script {
    fn new(stories: Vec<Story>) -> Self {
        Self {
            stories,
            subscriptions: Arc::default(),
        }
    }

    /// One story that never ends.
    fn holds(tells: Vec<FeedMessage>) -> Self {
        Self::new(vec![Story { tells, ends: false }])
    }
}

impl FeedSource for Script {
    fn subscribe(&self) -> FeedStream {
        let number = self.subscriptions.fetch_add(1, SeqCst);
        let story = &self.stories[number.min(self.stories.len() - 1)];
        let told = stream::iter(story.tells.clone());
        if story.ends {
            Box::pin(told)
        } else {
            Box::pin(told.chain(stream::pending()))
        }
    }
}

fn message(engine: &str, body: FeedBody) -> FeedMessage {
    FeedMessage {
        engine: EngineId::from(engine),
        epoch: 1,
        seq: 1,
        body,
    }
}

fn state(engine: &str) -> FeedMessage {
    let state = EngineState {
        health: Health::Healthy,
        dp_size: 1,
        kv_events: true,
        ..EngineState::default()
    };
    message(engine, FeedBody::State(state))
}

fn load(engine: &str) -> FeedMessage {
    message(engine, FeedBody::Load(Load::default()))
}

/// Three blocks of `block_tokens` tokens.
fn blocks(engine: &str, block_tokens: u32) -> FeedMessage {
    let snapshot = KvSnapshot {
        block_tokens,
        shelves: vec![(Shelf::default(), vec![1, 2, 3])],
        complete: true,
    };
    message(engine, FeedBody::Snapshot(snapshot))
}

/// An engine as it is told of at first.
fn whole(engine: &str) -> Vec<FeedMessage> {
    vec![state(engine), load(engine), blocks(engine, 32)]
}

/// Serves `source` as agents and peers do.
async fn serve(source: impl FeedSource) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(outrigger_gpu_agent::server::serve(
        listener,
        Arc::new(source),
        None,
    ));
    address
}

/// Names of the engines in the fleet of a proxy.
async fn fleet(admin: SocketAddr) -> Vec<String> {
    let name = |host: &serde_json::Value| {
        let name = host["outrigger"]["engine_id"].as_str();
        name.unwrap_or_default().to_owned()
    };
    hosts(admin, "fleet").await.iter().map(name).collect()
}

async fn fleet_becomes(proxy: &TestProxy, wanted: &[&str]) {
    eventually(&format!("the fleet is {wanted:?}"), || async {
        (fleet(proxy.admin()).await == wanted).then_some(())
    })
    .await;
}

async fn echo() -> Upstream {
    Upstream::engine(|mut conn, _| async move { conn.json("200 OK", "{}").await.then_some(conn) })
        .await
}

#[tokio::test]
async fn engines_of_other_nodes_are_not_told_on() {
    let own = echo().await;
    let node = format!("b-{}", own.address.port());
    let id = format!("{node}/{}", own.address);
    // As a broker tells all nodes' engines to everybody.
    let source = Script::holds([whole("c/192.0.2.1:8000"), whole(&id)].concat());
    let beside = ProxyBuilder::new()
        .flag("--node-id", &node)
        .engine(own.address)
        .told_by(source)
        .start();
    beside.wait_alive(1).await;
    let entry = ProxyBuilder::new().peer(beside.inbound()).start();
    entry.wait_alive(1).await;
    assert_eq!(fleet(entry.admin()).await, [id]);
}

#[tokio::test]
async fn engines_that_a_peer_no_longer_names_leave_no_ghosts() {
    let (old, new) = ("node-before/192.0.2.1:80", "node-after/192.0.2.1:80");
    let source = Script::new(vec![
        Story {
            tells: [whole(old), whole("stays")].concat(),
            ends: true,
        },
        Story {
            tells: [whole("stays"), whole(new)].concat(),
            ends: false,
        },
    ]);
    let peer = serve(source).await;
    let entry = ProxyBuilder::new().peer(peer).start();
    fleet_becomes(&entry, &[new, "stays"]).await;
    assert_eq!(alive(entry.admin()).await, 2);
}

#[tokio::test]
async fn a_load_after_its_engine_is_gone_makes_no_phantom() {
    let gone = message("phantom", FeedBody::Gone);
    let tells = [whole("phantom"), vec![gone, load("phantom")]].concat();
    let source = Script::new(vec![
        Story { tells, ends: false },
        Story {
            tells: whole("real"),
            ends: false,
        },
    ]);
    let peer = serve(source).await;
    let entry = ProxyBuilder::new().peer(peer).start();
    fleet_becomes(&entry, &["real"]).await;
}

#[tokio::test]
async fn an_engine_that_two_clusters_weigh_differently_is_alive_in_both() {
    let server = echo().await;
    let node = format!("w-{}", server.address.port());
    let id = format!("{node}/{}", server.address);
    let proxy = ProxyBuilder::new()
        .flag("--node-id", &node)
        .engine(server.address)
        .told_by(Script::holds(whole(&id)))
        .edit(|bootstrap| {
            for cluster in &mut bootstrap.clusters {
                for endpoint in &mut cluster.load_assignment.endpoints {
                    endpoint.load_balancing_weight = if cluster.name == "fleet" { 2 } else { 1 };
                }
            }
        })
        .start();
    proxy.wait_alive(1).await;
    // Pushes build both clusters' endpoints anew, in either order.
    for _ in 0..2 {
        for (cluster, weight) in [("fleet", 2), ("local", 1)] {
            let host = hosts(proxy.admin(), cluster).await.remove(0);
            assert_eq!(host["outrigger"]["health"], "healthy", "{cluster}: {host}");
            assert_eq!(host["outrigger"]["heard"], true, "{cluster}: {host}");
            assert_eq!(host["weight"], weight, "{cluster}: {host}");
        }
        for version in Version::BOTH {
            let reply = proxy
                .client(version)
                .await
                .post("/v1/chat/completions", r#"{"model":"m"}"#)
                .await;
            assert_eq!(reply.status, 200, "{}", reply.text());
        }
        proxy.proxy.apply(proxy.bootstrap.clone()).unwrap();
    }
}

#[tokio::test]
async fn one_name_at_two_addresses_is_refused() {
    let (one, two) = (echo().await, echo().await);
    let proxy = ProxyBuilder::new().engine(one.address).start();
    let mut wrong = proxy.bootstrap.clone();
    for cluster in wrong.clusters.iter_mut().take(1) {
        for endpoint in &mut cluster.load_assignment.endpoints {
            assert_eq!(endpoint.duty(), Duty::Engine);
            endpoint.address.port = two.address.port();
        }
    }
    let errors = proxy
        .proxy
        .apply(wrong)
        .expect_err("it is wrong")
        .join("\n");
    for word in [one.address.to_string(), two.address.to_string()] {
        assert!(errors.contains(&word), "{word}: {errors}");
    }
}

#[tokio::test]
async fn blocks_of_another_size_are_not_indexed_and_are_counted() {
    let (fit, unfit) = ("size/fits", "size/fits-not");
    let tells = vec![
        state(unfit),
        blocks(unfit, 32),
        message(unfit, FeedBody::Changes(Vec::new())),
        state(fit),
        blocks(fit, 16),
    ];
    let peer = serve(Script::holds(tells)).await;
    let entry = ProxyBuilder::new()
        .flag("--block-tokens", "16")
        .peer(peer)
        .start();
    let indexed = |engine: &str| {
        let label = format!("engine=\"{engine}\"");
        let entry = &entry;
        async move { entry.metric("outrigger_kv_index_blocks", &label).await }
    };
    eventually("what fits is indexed", || async {
        (indexed(fit).await == 3.0).then_some(())
    })
    .await;
    assert_eq!(indexed(unfit).await, 0.0);
    let label = format!("engine=\"{unfit}\"");
    assert_eq!(
        entry
            .metric("outrigger_feed_unfit_blocks_total", &label)
            .await,
        1.0
    );
}

#[tokio::test]
async fn engines_that_a_restarted_agent_does_not_name_are_gone() {
    let source = Script::new(vec![
        Story {
            tells: [whole("removed"), whole("kept")].concat(),
            ends: true,
        },
        Story {
            tells: whole("kept"),
            ends: false,
        },
    ]);
    let agent = serve(source).await;
    let mut heard = AgentSource(format!("http://{agent}").parse().unwrap()).subscribe();
    let gone = async {
        loop {
            let message = heard.next().await.expect("it reconnects");
            if message.body == FeedBody::Gone {
                return message.engine;
            }
        }
    };
    let gone = tokio::time::timeout(PATIENCE, gone).await;
    assert_eq!(gone.expect("it is told gone").to_string(), "removed");
}

#[tokio::test]
async fn an_agent_that_breaks_off_is_not_called_without_a_pause() {
    let source = Script::new(vec![Story {
        tells: whole("e"),
        ends: true,
    }]);
    let subscriptions = source.subscriptions.clone();
    let agent = serve(source).await;
    let mut heard = AgentSource(format!("http://{agent}").parse().unwrap()).subscribe();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        let _ = tokio::time::timeout(Duration::from_millis(50), heard.next()).await;
    }
    let called = subscriptions.load(SeqCst);
    assert!((2..=12).contains(&called), "{called} calls in a second");
}

/// An engine whose prompts can be tokenised here, since its model's files are at hand.
struct Engine {
    sim: SimEngine,
    files: PathBuf,
}

impl Engine {
    fn start() -> Self {
        let files = scratch("model");
        let sim = SimEngine::start(Config {
            model_path: Some(files.clone()),
            ..Config::default()
        })
        .unwrap();
        Self { sim, files }
    }

    fn url(&self) -> String {
        format!("http://{}", self.sim.http_addr)
    }

    fn id(&self, node: &str) -> String {
        format!("{node}/{}", self.sim.http_addr)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.files);
    }
}

/// A proxy process beside `engine` that `told` (a flag and its value) tells of it.
async fn told_proxy(engine: &Engine, node: &str, told: [&str; 2], more: &[&str]) -> Process {
    let url = engine.url();
    let flags = ["--engine", &url, "--node-id", node, told[0], told[1]];
    Process::proxy(PROGRAM, &[&flags, more].concat()).await
}

/// What a proxy must learn and do when somebody else watches its engine.
async fn a_proxy_lives_by_what_it_is_told(
    engine: &Engine,
    node: &str,
    told: [&str; 2],
    block_tokens: &str,
) {
    let log = scratch("access.log");
    let more = [
        "--policy",
        "kv",
        "--access-log",
        log.to_str().unwrap(),
        "--block-tokens",
        block_tokens,
    ];
    let proxy = told_proxy(engine, node, told, &more).await;
    wait_alive(proxy.admin, 1).await;
    let host = hosts(proxy.admin, "fleet").await.remove(0);
    let ours = &host["outrigger"];
    assert_eq!(ours["engine_id"], engine.id(node), "{host}");
    assert_eq!(ours["health"], "healthy", "{host}");
    assert!(ours["models"].to_string().contains("sim"), "{host}");
    let outbound = proxy.listener("outbound").await;
    let mut client = Client::connect(outbound, Version::H1).await;
    let prompt = "the same words again and again and again ".repeat(40);
    let body = format!(r#"{{"model":"sim","prompt":"{prompt}","max_tokens":2}}"#);
    assert_eq!(client.post(COMPLETIONS, body.clone()).await.status, 200);
    let label = format!("engine=\"{}\"", engine.id(node));
    eventually("its blocks are indexed", || async {
        let indexed = metric(proxy.admin, "outrigger_kv_index_blocks", &label).await;
        (indexed >= 5.0).then_some(())
    })
    .await;
    // Prompts are tokenised here once that was found to agree with the engine.
    let deadline = Instant::now() + PATIENCE;
    let mut asked = 1;
    loop {
        assert_eq!(client.post(COMPLETIONS, body.clone()).await.status, 200);
        asked += 1;
        let predicted = eventually("its log line", || async { hit(&log, asked) }).await;
        if predicted >= 5 * 32 {
            break;
        }
        assert!(Instant::now() < deadline, "predicted {predicted}");
    }
    let _ = std::fs::remove_file(&log);
}

/// The predicted hit in a line of an access log, counted from 1; `None` if there is no such line yet.
fn hit(log: &Path, number: usize) -> Option<u64> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let whole = &text[..text.rfind('\n')?];
    let line: serde_json::Value = serde_json::from_str(whole.lines().nth(number - 1)?).unwrap();
    Some(line["prefix_hit_tokens"].as_u64().unwrap_or(0))
}

#[tokio::test]
async fn a_proxy_lives_by_an_agents_feed() {
    for (node, block_tokens) in [("agent-32", "32"), ("agent-16", "16")] {
        let engine = Engine::start();
        let url = engine.url();
        let mut flags = vec!["--engine", &url, "--node", node];
        flags.extend(["--block-tokens", block_tokens]);
        let agent = Agent::start(PROGRAM, &flags).await;
        let feed = format!("http://{}", agent.address);
        a_proxy_lives_by_what_it_is_told(&engine, node, ["--agent", &feed], block_tokens).await;
    }
}

/// A broker of our own on a free port: `OUTRIGGER_NATS_SERVER`, else `nats-server` in the path.
struct Broker {
    child: Child,
    directory: PathBuf,
    url: String,
}

impl Broker {
    async fn start() -> Self {
        let program =
            std::env::var("OUTRIGGER_NATS_SERVER").unwrap_or_else(|_| "nats-server".into());
        let directory = scratch("nats");
        std::fs::create_dir(&directory).unwrap();
        let child = Command::new(&program)
            .args(["-a", "127.0.0.1", "-p", "-1", "--ports_file_dir"])
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let mut broker = Self {
            child,
            directory,
            url: String::new(),
        };
        broker.url = eventually("the broker listens", || async { broker.told_url() }).await;
        broker
    }

    /// From the file that it writes once it listens.
    fn told_url(&self) -> Option<String> {
        let file = std::fs::read_dir(&self.directory).ok()?.next()?.ok()?;
        let ports = std::fs::read_to_string(file.path()).ok()?;
        let ports: serde_json::Value = serde_json::from_str(&ports).ok()?;
        Some(ports["nats"][0].as_str()?.to_owned())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[tokio::test]
#[ignore = "needs a nats-server (OUTRIGGER_NATS_SERVER or in the path); conformance/nats/run runs it"]
async fn a_proxy_lives_by_a_feed_over_nats() {
    let broker = Broker::start().await;
    let engine = Engine::start();
    let (url, node) = (engine.url(), "agent-nats");
    let flags = ["--engine", &url, "--node", node, "--nats", &broker.url];
    let _agent = Agent::start(PROGRAM, &flags).await;
    a_proxy_lives_by_what_it_is_told(&engine, node, ["--nats", &broker.url], "32").await;
}

#[tokio::test]
#[ignore = "needs a nats-server (OUTRIGGER_NATS_SERVER or in the path); conformance/nats/run runs it"]
async fn each_engine_is_reached_through_its_own_proxy_when_all_listen_over_nats() {
    let broker = Broker::start().await;
    let nodes = ["nats-a", "nats-b", "nats-c"];
    let engines = [Engine::start(), Engine::start(), Engine::start()];
    let mut agents = Vec::new();
    for (engine, node) in engines.iter().zip(nodes) {
        let (url, broker) = (engine.url(), &broker.url);
        let flags = ["--engine", &url, "--node", node, "--nats", broker];
        agents.push(Agent::start(PROGRAM, &flags).await);
    }
    // B hears of all three; it stands beside its own only, and C has no proxy at all.
    let told = ["--nats", broker.url.as_str()];
    let b = told_proxy(&engines[1], nodes[1], told, &[]).await;
    wait_alive(b.admin, 1).await;
    let peer = format!("http://{}", b.listener("inbound").await);
    let a = told_proxy(&engines[0], nodes[0], told, &["--peer", &peer]).await;
    wait_alive(a.admin, 2).await;
    let mut named = fleet(a.admin).await;
    named.sort();
    assert_eq!(named, [engines[0].id(nodes[0]), engines[1].id(nodes[1])]);
    let outbound = a.listener("outbound").await;
    let mut client = Client::connect(outbound, Version::H1).await;
    for _ in 0..6 {
        let body = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;
        let reply = client.post(COMPLETIONS, body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
}
