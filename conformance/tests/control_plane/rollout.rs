//! A version that is bad for traffic, tried by one of two proxies: the proxies report it, and nobody has to look.

use super::{
    PROGRAM, any_port,
    driven::{ads, cluster, endpoints, listener, put, routes_to, typed},
};
use futures_util::future::join_all;
use http::Method;
use outrigger_conformance::harness::{
    Client, ControlPlane, Process, Upstream, Version, driven_bootstrap, eventually, request,
    scratch,
};
use outrigger_control_plane::rollout::place;
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

const COMPLETIONS: &str = "/v1/completions";
const STREAM: &str = r#"{"model":"m","prompt":"p","stream":true}"#;
const TOKEN: &str = r#"{"id":"a","object":"text_completion","choices":[{"index":0,"text":"a"}]}"#;
/// Clients at once, and requests of each: together more than is needed to be judged.
const CLIENTS: usize = 10;
const REQUESTS: usize = 25;
/// Reports come every 10 s; times are judged when a step is over.
const STEP_S: &str = "25";
const JUDGED_WITHIN: Duration = Duration::from_secs(90);

/// Streams a token after a pause, or fails.
async fn engine(pause: Duration, is_well: bool) -> Upstream {
    Upstream::start(move |mut conn, _| async move {
        tokio::time::sleep(pause).await;
        let answered = if is_well {
            conn.begin_events().await
                && conn.event(TOKEN).await
                && conn.event("[DONE]").await
                && conn.end().await
        } else {
            conn.json("500 Internal Server Error", "{}").await
        };
        answered.then_some(conn)
    })
    .await
}

/// Two proxies, of which the first tries what is new.
struct Fleet {
    directory: PathBuf,
    control: ControlPlane,
    proxies: Vec<Process>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Fleet {
    async fn new(engine: &Upstream) -> Self {
        let directory = scratch("resources");
        fs::create_dir_all(&directory).unwrap();
        let rds = json!({ "config_source": ads(), "route_config_name": "table" });
        let openai = typed(
            "xds.type.v3.TypedStruct",
            json!({
                "type_url": "type.googleapis.com/outrigger.filters.http.openai.v1.Config",
                "value": {},
            }),
        );
        let openai = json!({ "name": "openai", "typed_config": openai });
        let edge = listener("edge", &[openai], json!({ "rds": rds }));
        put(&directory, "clusters.yaml", &[cluster("backend")]);
        put(&directory, "listeners.json", &[edge]);
        put(&directory, "routes.yaml", &[routes_to("backend")]);
        let here = endpoints("backend", engine.address);
        put(&directory, "endpoints.yaml", &[here]);
        let flags = ["--rollout", "50,100", "--rollout-step-s", STEP_S];
        let of = directory.to_str().unwrap();
        let control = ControlPlane::with_flags(PROGRAM, of, any_port(), &flags).await;
        let mut ids = ["n1", "n2"];
        ids.sort_by_key(|id| place(id));
        let mut proxies = Vec::new();
        for id in ids {
            let config = scratch("bootstrap.json");
            fs::write(&config, driven_bootstrap(control.address, id).to_string()).unwrap();
            proxies.push(Process::with_config(PROGRAM, config.to_str().unwrap(), &[]).await);
            fs::remove_file(config).unwrap();
        }
        Self {
            directory,
            control,
            proxies,
        }
    }

    async fn traffic(&self, proxy: usize) {
        let at = self.proxies[proxy].listener("edge").await;
        let clients = (0..CLIENTS).map(|_| async {
            let mut client = Client::connect(at, Version::H2).await;
            for _ in 0..REQUESTS {
                client
                    .send(request(Method::POST, COMPLETIONS, STREAM))
                    .await;
            }
        });
        join_all(clients).await;
    }

    async fn rollout(&self) -> Value {
        Client::get(self.control.admin, "/rollout").await.json()
    }

    /// Moves to another engine; why that was taken back.
    async fn try_another(&self, engine: &Upstream) -> String {
        for proxy in [0, 1] {
            self.traffic(proxy).await;
        }
        let there = endpoints("backend", engine.address);
        put(&self.directory, "endpoints.yaml", &[there]);
        let deadline = Instant::now() + JUDGED_WITHIN;
        let mut page = Value::Null;
        while Instant::now() < deadline {
            page = self.rollout().await;
            if let Some(why) = page["rolled_back"]["why"].as_str() {
                return why.to_owned();
            }
            // What came before one has it is not its doing.
            let evidence = &page["candidate"]["evidence"];
            if evidence["nodes"] == 1 && evidence["not_answered"] == 0 {
                self.traffic(0).await;
                self.traffic(1).await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        panic!("not taken back: {page}");
    }

    /// The first is at the engine that it had.
    async fn is_back(&self, engine: &Upstream) {
        eventually("it is back", || async {
            let before = engine.exchanges().len();
            self.traffic(0).await;
            (engine.exchanges().len() == before + CLIENTS * REQUESTS).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_version_with_which_requests_fail_at_our_proxies_is_taken_back_unattended() {
    let (good, bad) = (
        engine(Duration::ZERO, true).await,
        engine(Duration::ZERO, false).await,
    );
    let fleet = Fleet::new(&good).await;
    let why = fleet.try_another(&bad).await;
    assert!(why.contains("% of the requests fail, 0.0 % do"), "{why}");
    fleet.is_back(&good).await;
}

#[tokio::test]
async fn a_version_with_which_streams_wait_at_our_proxies_is_taken_back_unattended() {
    let (quick, slow) = (
        engine(Duration::ZERO, true).await,
        engine(Duration::from_millis(300), true).await,
    );
    let fleet = Fleet::new(&quick).await;
    let why = fleet.try_another(&slow).await;
    assert!(why.starts_with("the first token takes"), "{why}");
    fleet.is_back(&quick).await;
}
