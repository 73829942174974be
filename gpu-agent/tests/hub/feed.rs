//! One test body for every way a feed travels: embedded, gRPC, NATS; and what each way adds.

use crate::listener::Listener;
use crate::support::{FakeEngine, canonical, prompt, removed, stored};
use futures_util::StreamExt;
use outrigger_gpu_agent::publish::{nats_publish, nats_subscribe};
use outrigger_gpu_agent::server::serve;
use outrigger_gpu_agent::{EngineConfig, Hub};
use outrigger_xds::feed::{FeedBody, FeedSource, FeedStream, FeedTimeouts, connect};
use outrigger_xds::report::Health;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

const ID: &str = "node/e";

fn hub_of(engine: &FakeEngine) -> Arc<Hub> {
    let hub = Hub::new();
    hub.watch(EngineConfig {
        poll_interval: Duration::from_millis(100),
        ..EngineConfig::new(ID.into(), engine.url())
    });
    hub
}

async fn grpc(hub: Arc<Hub>) -> FeedStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    tokio::spawn(serve(listener, hub, None));
    let feed = connect(uri, FeedTimeouts::default()).await.unwrap();
    Box::pin(feed.map(|message| message.expect("an unbroken feed")))
}

/// What every way of a feed must bring, from before the engine answers to after it died.
async fn a_feed_brings_everything(mut engine: FakeEngine, stream: FeedStream) {
    let mut listener = Listener::new(stream);
    let (a, b) = (prompt(1, 3), prompt(2, 40));
    let early = listener
        .until(ID, "events", |picture| {
            picture.state.kv_events && picture.complete
        })
        .await;
    assert_eq!(
        (early.state.health, early.state.models[0].id.as_str()),
        (Health::Healthy, "tiny")
    );
    engine.publish(vec![stored(&a, 32, 0)]);
    engine.publish(vec![stored(&b, 32, 0), removed(&a)]);
    listener
        .until(ID, "blocks", |picture| {
            picture.device() == canonical(&[&a[..64], &b])
        })
        .await;
    engine.inner.lock().unwrap().running = 5;
    listener
        .until(ID, "load", |picture| picture.load.running == 5)
        .await;
    engine.die().await;
    let dead = listener
        .until(ID, "death", |picture| picture.state.health == Health::Dead)
        .await;
    assert!(dead.blocks.is_empty());
    engine.forget();
    engine.lose(vec![stored(&a, 32, 0)]);
    engine.rise();
    let back = listener
        .until(ID, "return", |picture| {
            picture.device() == canonical(&[&a]) && picture.complete
        })
        .await;
    assert_ne!(back.epoch, early.epoch);
}

#[tokio::test]
async fn embedded() {
    let engine = FakeEngine::start().await;
    let hub = hub_of(&engine);
    let stream = hub.subscribe();
    a_feed_brings_everything(engine, stream).await;
}

#[tokio::test]
async fn over_grpc() {
    let engine = FakeEngine::start().await;
    let stream = grpc(hub_of(&engine)).await;
    a_feed_brings_everything(engine, stream).await;
}

/// A broker of our own: `OUTRIGGER_NATS_SERVER`, else `nats-server` in the path.
struct Broker {
    child: Child,
    address: SocketAddr,
}

impl Broker {
    async fn start(address: Option<SocketAddr>) -> Self {
        let address = match address {
            Some(address) => address,
            None => TcpListener::bind("127.0.0.1:0")
                .await
                .unwrap()
                .local_addr()
                .unwrap(),
        };
        let program =
            std::env::var("OUTRIGGER_NATS_SERVER").unwrap_or_else(|_| "nats-server".into());
        let child = Command::new(&program)
            .args(["-a", "127.0.0.1", "-p", &address.port().to_string()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let broker = Self { child, address };
        while TcpStream::connect(broker.address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        broker
    }

    fn url(&self) -> String {
        format!("nats://{}", self.address)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tell(source: &Arc<impl FeedSource>, broker: &Broker) -> tokio::task::JoinHandle<()> {
    let (source, url) = (Arc::clone(source), broker.url());
    tokio::spawn(async move {
        let ended = nats_publish(&url, source).await;
        panic!("{ended:?}");
    })
}

#[tokio::test]
#[ignore = "needs a nats-server (OUTRIGGER_NATS_SERVER or in the path); conformance/nats/run runs it"]
async fn over_nats() {
    let broker = Broker::start(None).await;
    let engine = FakeEngine::start().await;
    let _teller = tell(&hub_of(&engine), &broker);
    a_feed_brings_everything(engine, nats_subscribe(&broker.url())).await;
}

#[tokio::test]
#[ignore = "needs a nats-server (OUTRIGGER_NATS_SERVER or in the path); conformance/nats/run runs it"]
async fn over_nats_a_late_listener_and_one_that_missed_something_get_snapshots() {
    let broker = Broker::start(None).await;
    let engine = FakeEngine::start().await;
    let hub = hub_of(&engine);
    let _teller = tell(&hub, &broker);
    // More than one frame can hold: 100,000 blocks.
    let mut local = Listener::new(hub.subscribe());
    local
        .until(ID, "events", |picture| {
            picture.state.kv_events && picture.complete
        })
        .await;
    let long = prompt(1, 100_000);
    engine.publish(vec![stored(&long, 32, 0)]);
    local
        .until(ID, "blocks", |picture| picture.device().len() == 100_000)
        .await;

    let mut late = Listener::new(nats_subscribe(&broker.url()));
    let picture = late
        .until(ID, "the past", |picture| picture.device().len() == 100_000)
        .await;
    assert_eq!(picture.device(), canonical(&[&long]));

    // Messages lost on the way: while the broker is away the teller's own buffer overflows or its publications vanish.
    let address = broker.address;
    drop(broker);
    let others: Vec<Vec<u32>> = (2..12).map(|id| prompt(id, 1)).collect();
    for other in &others {
        engine.publish(vec![stored(other, 32, 0)]);
    }
    local
        .until(ID, "more blocks", |picture| {
            picture.device().len() == 100_010
        })
        .await;
    let _broker = Broker::start(Some(address)).await;
    let picture = late
        .until(ID, "what happened meanwhile", |picture| {
            picture.device().len() == 100_010
        })
        .await;
    let all: Vec<&[u32]> = others
        .iter()
        .map(Vec::as_slice)
        .chain([long.as_slice()])
        .collect();
    assert_eq!(picture.device(), canonical(&all));
}

#[tokio::test]
#[ignore = "needs a nats-server (OUTRIGGER_NATS_SERVER or in the path); conformance/nats/run runs it"]
async fn over_nats_a_silent_agent_s_engines_are_gone_and_come_back() {
    let broker = Broker::start(None).await;
    let engine = FakeEngine::start().await;
    let hub = hub_of(&engine);
    let teller = tell(&hub, &broker);
    let mut listener = Listener::new(nats_subscribe(&broker.url()));
    listener
        .until(ID, "the engine", |picture| {
            picture.state.kv_events && picture.complete
        })
        .await;
    teller.abort();
    for _ in 0..30 {
        listener.listen(Duration::from_millis(500)).await;
        if listener.engines.is_empty() {
            break;
        }
    }
    assert!(listener.engines.is_empty(), "nobody tells of it for 10 s");
    engine.publish(vec![stored(&prompt(1, 2), 32, 0)]);
    let _teller = tell(&hub, &broker);
    listener
        .until(ID, "its return", |picture| {
            picture.device() == canonical(&[&prompt(1, 2)])
        })
        .await;
}

/// A hub whose first subscription loses every snapshot that has blocks; later ones lose nothing.
struct Lossy {
    hub: Arc<Hub>,
    subscribed: AtomicBool,
}

impl FeedSource for Lossy {
    fn subscribe(&self) -> FeedStream {
        let messages = self.hub.subscribe();
        if self.subscribed.swap(true, Ordering::Relaxed) {
            return messages;
        }
        Box::pin(messages.filter(|message| {
            let lost = matches!(&message.body, FeedBody::Snapshot(snapshot) if !snapshot.shelves.is_empty());
            std::future::ready(!lost)
        }))
    }
}

#[tokio::test]
#[ignore = "needs a nats-server (OUTRIGGER_NATS_SERVER or in the path); conformance/nats/run runs it"]
async fn over_nats_a_lost_snapshot_is_asked_for() {
    let broker = Broker::start(None).await;
    let mut engine = FakeEngine::start().await;
    engine.die().await;
    let source = Arc::new(Lossy {
        hub: hub_of(&engine),
        subscribed: AtomicBool::new(false),
    });
    let _teller = tell(&source, &broker);
    let mut listener = Listener::new(nats_subscribe(&broker.url()));
    listener
        .until(ID, "death", |picture| picture.state.health == Health::Dead)
        .await;
    // Its past comes in the snapshot that follows the replay.
    engine.lose(vec![stored(&prompt(1, 3), 32, 0)]);
    engine.rise();
    listener
        .until(ID, "its past", |picture| {
            picture.device() == canonical(&[&prompt(1, 3)])
        })
        .await;
}
