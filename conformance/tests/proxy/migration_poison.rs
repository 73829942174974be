//! Requests that break engines, and requests that were only there: who is refused, after how many engines, and who is not.

use super::support::story;
use outrigger_conformance::{
    harness::{
        Client, Conn, Exchange, ProxyBuilder, Reply, TestProxy, Upstream, Version, eventually,
    },
    sim::{Config, SimEngine},
};
use serde_json::json;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{sync::watch, task::JoinSet};

const CHAT: &str = "/v1/chat/completions";
const OPENING: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
const TOKEN: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#;
const LAST: &str = r#"{"id":"c","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}"#;
/// Breaks whatever engine takes it.
const POISON: &str = "poison";
/// Runs until its engine breaks.
const ENDLESS: &str = "endless";
/// Is there when engines break, as often as the case says.
const UNLUCKY: &str = "unlucky";
/// The same, behind its opening chunk.
const OPENED: &str = "opened";
/// Most engines that a poison may take along while others break (`STORM_DEATHS_MAX`).
const IN_A_STORM: usize = 8;

/// What the engines of a case have in common.
#[derive(Default)]
struct Luck {
    /// So many engines will yet break under who is unlucky.
    bad: AtomicUsize,
    /// Engines that broke of poison.
    poisoned: AtomicUsize,
}

/// An engine whose streams all break with it, and that is back at once.
struct Frail {
    server: Upstream,
    /// It breaks whenever this changes.
    life: watch::Sender<()>,
    running: Arc<AtomicUsize>,
}

impl Frail {
    async fn start(luck: Arc<Luck>) -> Self {
        let life = watch::Sender::new(());
        let running = Arc::<AtomicUsize>::default();
        let (breaks, runs) = (life.clone(), running.clone());
        let server = Upstream::engine(move |conn, got| {
            serve(conn, got, breaks.clone(), luck.clone(), runs.clone())
        })
        .await;
        Self {
            server,
            life,
            running,
        }
    }
}

async fn serve(
    mut conn: Conn,
    got: Exchange,
    life: watch::Sender<()>,
    luck: Arc<Luck>,
    running: Arc<AtomicUsize>,
) -> Option<Conn> {
    if got.path() != CHAT {
        return conn.json("200 OK", "{}").await.then_some(conn);
    }
    let asks = |what: &str| memchr::memmem::find(&got.body, what.as_bytes()).is_some();
    if asks(ENDLESS) {
        running.fetch_add(1, SeqCst);
        tokens(&mut conn, life.subscribe()).await;
        running.fetch_sub(1, SeqCst);
        return None;
    }
    if asks(OPENED) {
        conn.begin_events().await;
        conn.event(OPENING).await;
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let less = |left: usize| left.checked_sub(1);
    let unlucky = !asks(POISON) && luck.bad.fetch_update(SeqCst, SeqCst, less).is_ok();
    if unlucky || asks(POISON) {
        luck.poisoned.fetch_add(usize::from(!unlucky), SeqCst);
        life.send_replace(());
        return None;
    }
    if !asks(OPENED) {
        conn.begin_events().await;
        conn.event(OPENING).await;
    }
    conn.event(LAST).await;
    conn.event("[DONE]").await;
    conn.end().await.then_some(conn)
}

/// Until the engine breaks, or nobody reads.
async fn tokens(conn: &mut Conn, mut life: watch::Receiver<()>) {
    let told = conn.begin_events().await && conn.event(OPENING).await;
    while told && conn.event(TOKEN).await {
        let broken = tokio::time::timeout(Duration::from_millis(5), life.changed());
        if broken.await.is_ok() {
            return;
        }
    }
}

struct Fleet {
    engines: Vec<Frail>,
    luck: Arc<Luck>,
    proxy: TestProxy,
    /// Clients whose streams never end by themselves, and what else runs until the case is over.
    others: JoinSet<()>,
}

impl Fleet {
    /// Engines with streams on each.
    async fn of(count: usize) -> Self {
        let mut fleet = Self::idle(count, &[]).await;
        for _ in 0..3 * count {
            let address = fleet.proxy.outbound();
            fleet.others.spawn(async move {
                loop {
                    let mut client = Client::connect(address, Version::H1).await;
                    client.post(CHAT, body(ENDLESS)).await;
                }
            });
        }
        let busy = |engine: &Frail| engine.running.load(SeqCst) > 0;
        let look = || async { fleet.engines.iter().all(busy).then_some(()) };
        eventually("every engine has streams", look).await;
        fleet
    }

    /// Engines without streams, and others that are simulated.
    async fn idle(count: usize, others: &[SimEngine]) -> Self {
        let luck = Arc::<Luck>::default();
        let mut engines = Vec::new();
        for _ in 0..count {
            engines.push(Frail::start(luck.clone()).await);
        }
        let builder = engines.iter().fold(ProxyBuilder::new(), |builder, engine| {
            builder.server(engine.server.address)
        });
        let builder = others
            .iter()
            .fold(builder, |builder, engine| builder.engine(engine.http_addr));
        let proxy = builder.start();
        proxy.wait_alive(count + others.len()).await;
        Self {
            engines,
            luck,
            proxy,
            others: JoinSet::new(),
        }
    }

    /// Engines break by themselves, in turn, one every 100 ms. Each did before this returns.
    async fn storm(&mut self) {
        let lives: Vec<_> = self
            .engines
            .iter()
            .map(|engine| engine.life.clone())
            .collect();
        self.others.spawn(async move {
            for life in lives.iter().cycle() {
                tokio::time::sleep(Duration::from_millis(100)).await;
                life.send_replace(());
            }
        });
        tokio::time::sleep(Duration::from_millis(1000)).await;
    }

    async fn ask(&self, what: &str) -> Reply {
        let mut client = self.proxy.client(Version::H1).await;
        client.post(CHAT, body(what)).await
    }

    /// Poison is refused, after so many engines.
    async fn poison(&self) -> usize {
        let before = self.luck.poisoned.load(SeqCst);
        let reply = self.ask(POISON).await;
        assert_eq!(reply.status, 422, "{}", reply.text());
        let killed = self.luck.poisoned.load(SeqCst) - before;
        let message = &reply.json()["error"]["message"];
        let told = format!("poison: {killed} engines died");
        assert!(message.as_str().unwrap().starts_with(&told), "{message}");
        killed
    }
}

fn body(what: &str) -> String {
    json!({"model": "sim", "stream": true, "messages": [{"role": "user", "content": what}]})
        .to_string()
}

#[tokio::test]
async fn in_calm_poison_breaks_three_engines_each_time() {
    let fleet = Fleet::of(4).await;
    assert_eq!(fleet.poison().await, 3);
    // What broke of the first is no excuse for the second.
    assert_eq!(fleet.poison().await, 3);
}

#[tokio::test]
async fn in_a_storm_poison_breaks_a_few_engines_more_and_no_more() {
    let mut fleet = Fleet::of(5).await;
    fleet.storm().await;
    let killed = fleet.poison().await;
    assert!((4..=IN_A_STORM).contains(&killed), "{killed}");
}

#[tokio::test]
async fn who_was_only_there_when_engines_broke_is_served() {
    let mut fleet = Fleet::of(5).await;
    fleet.storm().await;
    for what in [UNLUCKY, OPENED] {
        fleet.luck.bad.store(5, SeqCst);
        let got = story(&fleet.ask(what).await.text());
        assert_eq!(got.problem(), None, "{what}");
        assert_eq!(got.text, "b", "{what}");
        assert_eq!(fleet.luck.bad.load(SeqCst), 0, "{what}: five engines broke");
    }
    let runs = fleet
        .proxy
        .metric("outrigger_migration_storm_runs_total", "")
        .await;
    assert!(runs >= 1.0, "{runs}");
}

/// A proxy that has no other streams, and was told by its feed.
#[tokio::test]
async fn engines_that_are_said_to_be_dead_speak_for_a_request_too() {
    let dies = SimEngine::start(Config::default()).unwrap();
    let dead = [dies];
    let fleet = Fleet::idle(4, &dead).await;
    drop(dead);
    fleet.proxy.wait_alive(4).await;
    fleet.luck.bad.store(5, SeqCst);
    let got = story(&fleet.ask(UNLUCKY).await.text());
    assert_eq!((got.problem(), got.text.as_str()), (None, "b"));
    assert_eq!(fleet.luck.bad.load(SeqCst), 0, "five engines broke");
}

/// Before it is refused some time passes: the first three engines of a storm may be those that it was on.
#[tokio::test]
async fn a_storm_that_shows_late_speaks_for_a_request_too() {
    let fleet = Fleet::of(5).await;
    fleet.luck.bad.store(3, SeqCst);
    let breaks = async {
        let all = || async { (fleet.luck.bad.load(SeqCst) == 0).then_some(()) };
        eventually("three engines broke", all).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        for engine in &fleet.engines {
            engine.life.send_replace(());
        }
    };
    let (reply, ()) = tokio::join!(fleet.ask(UNLUCKY), breaks);
    let got = story(&reply.text());
    assert_eq!((got.problem(), got.text.as_str()), (None, "b"));
}

#[tokio::test]
async fn in_calm_the_same_is_poison() {
    let fleet = Fleet::of(5).await;
    fleet.luck.bad.store(5, SeqCst);
    let reply = fleet.ask(UNLUCKY).await;
    assert_eq!(reply.status, 422, "{}", reply.text());
    assert_eq!(fleet.luck.bad.load(SeqCst), 2, "three engines broke");
    fleet.luck.bad.store(5, SeqCst);
    let got = story(&fleet.ask(OPENED).await.text());
    let told = got.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(told.ends_with("elsewhere: poison"), "{told}");
    assert_eq!(fleet.luck.bad.load(SeqCst), 2, "three engines broke");
}
