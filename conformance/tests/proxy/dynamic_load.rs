//! No request fails and no stream breaks while everything changes under load.

use super::dynamic::{Files, address, listener, table, typed};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_conformance::harness::{ProxyBuilder, TestProxy, Upstream, eventually};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{net::TcpStream, task::JoinHandle};

/// Changes of everything, one after the other.
const ROUNDS: usize = 12;

/// What clients saw.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) good: AtomicUsize,
    bad: Mutex<Vec<String>>,
    pub(super) over: AtomicBool,
}

impl Seen {
    pub(super) fn bad(&self, what: String) {
        self.bad.lock().unwrap().push(what);
    }

    /// Panics if anything failed, or too little was asked.
    pub(super) fn conclude(&self, servers: &[Upstream]) {
        let bad = self.bad.lock().unwrap();
        assert!(
            bad.is_empty(),
            "{} failures, first {:?}",
            bad.len(),
            &bad[..bad.len().min(5)]
        );
        let good = self.good.load(SeqCst);
        assert!(good > 200, "{good} requests");
        let served: usize = servers.iter().map(|server| server.exchanges().len()).sum();
        assert_eq!(served, good, "what was served is what was answered");
    }

    async fn judge(&self, answer: hyper::Result<Response<Incoming>>, who: &str) {
        let response = match answer {
            Ok(response) => response,
            Err(error) => return self.bad(format!("{who}: {error:?}")),
        };
        let status = response.status();
        match response.into_body().collect().await {
            Ok(_) if status == 200 => drop(self.good.fetch_add(1, SeqCst)),
            Ok(body) => self.bad(format!("{who}: {status} {:?}", body.to_bytes())),
            Err(error) => self.bad(format!("{who}: body: {error:?}")),
        }
    }
}

fn ask(place: SocketAddr, path: &str) -> Request<Empty<Bytes>> {
    let request = Request::builder().uri(format!("http://{place}{path}"));
    request.header("host", "a").body(Empty::new()).unwrap()
}

/// Asks on one connection for as long as it is not told to end.
pub(super) async fn http1(place: SocketAddr, path: &'static str, seen: Arc<Seen>) {
    while !seen.over.load(SeqCst) {
        let socket = match TcpStream::connect(place).await {
            Ok(socket) => socket,
            Err(error) => {
                seen.bad(format!("connect: {error}"));
                continue;
            }
        };
        let (mut sender, driver) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        tokio::spawn(driver);
        loop {
            let answer = sender.send_request(ask(place, path)).await;
            let told = answer
                .as_ref()
                .map_or(true, |answer| answer.headers().contains_key("connection"));
            seen.judge(answer, "http1").await;
            if told || seen.over.load(SeqCst) {
                break;
            }
            if let Err(error) = sender.ready().await {
                seen.bad(format!("closed without a word: {error:?}"));
                break;
            }
        }
    }
}

/// Several at once on one connection for as long as it is not told to end.
pub(super) async fn http2(place: SocketAddr, seen: Arc<Seen>) {
    while !seen.over.load(SeqCst) {
        let socket = TcpStream::connect(place).await.unwrap();
        let (mut sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
            .await
            .unwrap();
        tokio::spawn(driver);
        while sender.ready().await.is_ok() && !seen.over.load(SeqCst) {
            let answers = (0..4).map(|_| {
                let mut sender = sender.clone();
                let seen = seen.clone();
                async move {
                    match sender.send_request(ask(place, "/fast")).await {
                        Err(error) if was_not_taken(&error) => {}
                        answer => seen.judge(answer, "http2").await,
                    }
                }
            });
            futures_util::future::join_all(answers).await;
        }
    }
}

/// If a request was never sent, or crossed with the word that it would not be taken (RFC 9113 §6.8): h2 answers the
/// ping between the two words before it sends what already waits. That nothing came of it, the servers' count tells.
fn was_not_taken(error: &hyper::Error) -> bool {
    let cause =
        std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    let told =
        |cause: &h2::Error| cause.is_go_away() && cause.reason() == Some(h2::Reason::NO_ERROR);
    error.is_canceled() || cause.is_some_and(told)
}

pub(super) async fn server() -> Upstream {
    Upstream::start(|mut conn, asked| async move {
        if asked.path() == "/slow" {
            conn.begin_events().await;
            for _ in 0..20 {
                conn.event("{}").await;
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
            return conn.end().await.then_some(conn);
        }
        conn.json("200 OK", "{}").await.then_some(conn)
    })
    .await
}

/// What is configured in a round.
struct Stage<'a> {
    files: &'a Files,
    place: SocketAddr,
    servers: [SocketAddr; 2],
}

impl Stage<'_> {
    fn put(&self, round: usize) {
        let (version, files) = (round.to_string(), self.files);
        let eds = format!("eds{}.yaml", round % 3);
        // The endpoints are others, in another file, of a cluster of another name.
        let cluster = format!("backend{}", round / 2 % 2);
        let here = |server: &SocketAddr| json!({ "endpoint": { "address": address(*server) } });
        let chosen: Vec<Value> = match round % 3 {
            0 => self.servers.iter().map(here).collect(),
            one => vec![here(&self.servers[one - 1])],
        };
        let assignment =
            json!({ "cluster_name": cluster, "endpoints": [{ "lb_endpoints": chosen }] });
        let assignment = typed("envoy.config.endpoint.v3.ClusterLoadAssignment", assignment);
        files.respond(&eds, &version, &[assignment]);
        let backend = typed(
            "envoy.config.cluster.v3.Cluster",
            json!({ "name": cluster, "type": "EDS", "eds_cluster_config": { "eds_config": files.config_source(&eds) } }),
        );
        let action = json!({ "route": { "cluster": cluster, "timeout": "0s" } });
        let mut routes = table("table", action);
        routes["virtual_hosts"][0]["name"] = json!(version);
        let routes = typed("envoy.config.route.v3.RouteConfiguration", routes);
        // As a control plane does: a route to a cluster that nobody told of yet is answered 503.
        files.respond("cds.yaml", &version, &[backend]);
        files.respond("rds.yaml", &version, &[routes]);
        // At the same place: in place, by a new manager, under another name.
        let rds = json!({ "config_source": files.config_source("rds.yaml"), "route_config_name": "table" });
        let name = format!("edge{}", round / 4);
        let mut manager = json!({ "rds": rds, "stat_prefix": format!("prefix{}", round / 2) });
        manager["server_name"] = json!(version);
        files.respond(
            "lds.yaml",
            &version,
            &[listener(&name, self.place, manager)],
        );
    }
}

async fn start(stage: &Stage<'_>) -> TestProxy {
    stage.put(0);
    let files = stage.files;
    let (lds, cds) = (files.source("lds.yaml"), files.source("cds.yaml"));
    ProxyBuilder::new()
        .concurrency(2)
        .edit(|bootstrap| {
            bootstrap.lds = Some(lds);
            bootstrap.cds = Some(cds);
        })
        .start()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_and_no_stream_breaks_while_everything_changes() {
    let files = Files::new();
    let servers = [server().await, server().await];
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.set_reuseaddr(true).unwrap();
    held.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let stage = Stage {
        files: &files,
        place: held.local_addr().unwrap(),
        servers: [servers[0].address, servers[1].address],
    };
    let proxy = start(&stage).await;
    let seen = Arc::new(Seen::default());
    let mut clients: Vec<JoinHandle<()>> = Vec::new();
    for _ in 0..3 {
        clients.push(tokio::spawn(http1(stage.place, "/fast", seen.clone())));
        clients.push(tokio::spawn(http1(stage.place, "/slow", seen.clone())));
        clients.push(tokio::spawn(http2(stage.place, seen.clone())));
    }
    for round in 1..=ROUNDS {
        stage.put(round);
        let wanted = round.to_string();
        eventually("the change is live", || async {
            let dump =
                outrigger_conformance::harness::Client::get(proxy.admin(), "/config_dump").await;
            let text = dump.json();
            let sections = text["configs"].as_array().unwrap();
            let of = |key: &str| sections.iter().find(|section| section.get(key).is_some());
            let live = of("dynamic_listeners")?["version_info"] == *wanted
                && of("dynamic_active_clusters")?["version_info"] == *wanted
                && of("dynamic_route_configs")?["dynamic_route_configs"][0]["version_info"]
                    == *wanted;
            live.then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    seen.over.store(true, SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    seen.conclude(&servers);
}
