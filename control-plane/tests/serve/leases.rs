//! Engines that register: they appear, drain and vanish by lease, whatever becomes of streams and of the control plane.

use crate::{
    harness::{Served, eventually, leases_of, node},
    secure::{Ca, channel, client},
};
use outrigger_xds::{
    subscription::Kind,
    wire::outrigger::{
        feed::v1::{Health, Role},
        registry::v1::{Engine, Lease, Node, Registration, registry_client::RegistryClient},
    },
};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

/// Short for who waits for its end, and long for who must not see it.
const SHORT_S: u64 = 5;
const LONG_S: u64 = 3600;

const FLEET: &str = "
apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec: {pools: [{name: all, registered: {models: [m]}}]}
";

fn said(id: &str) -> Registration {
    Registration {
        node: Some(Node {
            id: id.into(),
            address: format!("{id}.test:8081"),
            ..Node::default()
        }),
        engines: vec![Engine {
            id: format!("{id}/127.0.0.1:8000"),
            address: "127.0.0.1:8000".into(),
            models: vec!["m".into()],
            role: Role::Both.into(),
            health: Health::Healthy.into(),
            ..Engine::default()
        }],
        ..Registration::default()
    }
}

/// A stream of a node.
struct Speaker {
    sender: mpsc::Sender<Registration>,
    leases: Streaming<Lease>,
}

impl Speaker {
    async fn new(channel: Channel) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let mut client = RegistryClient::new(channel);
        let leases = client.register(ReceiverStream::new(receiver)).await?;
        let leases = leases.into_inner();
        Ok(Self { sender, leases })
    }

    /// Seconds of the lease that it is given.
    async fn say(&mut self, said: Registration) -> Result<i64, Status> {
        // If nobody listens any more, the answers say why.
        let _ = self.sender.send(said).await;
        let lease = self.leases.message().await?;
        let lease = lease.ok_or_else(|| Status::unknown("closed"))?;
        Ok(lease.length.unwrap().seconds)
    }
}

async fn speaker(served: &Served) -> Speaker {
    Speaker::new(served.channel().await).await.unwrap()
}

/// Endpoints that a node is sent of the fleet: where, and how.
async fn endpoints(served: &Served, node: &str) -> Vec<String> {
    let dump = served.json(&format!("/config_dump?node={node}")).await;
    let mut configs = dump["configs"].as_array().unwrap().iter();
    let is_fleet = |it: &&serde_json::Value| {
        it["name"] == "chat" && it["type_url"].as_str().unwrap().ends_with("LoadAssignment")
    };
    let fleet = &configs.find(is_fleet).unwrap()["resource"];
    let localities = fleet["endpoints"].as_array().cloned().unwrap_or_default();
    let endpoints = localities
        .iter()
        .flat_map(|it| it["lb_endpoints"].as_array().unwrap());
    endpoints
        .map(|it| {
            let at = &it["endpoint"]["address"]["socket_address"];
            let health = it["health_status"].as_str().unwrap_or("HEALTHY");
            format!(
                "{}:{} {health}",
                at["address"].as_str().unwrap(),
                at["port_value"]
            )
        })
        .collect()
}

async fn has(served: &Served, node: &str, expected: &[&str]) {
    eventually(&format!("{expected:?}"), async || {
        (endpoints(served, node).await == expected).then_some(())
    })
    .await;
}

/// Renews until it is served, however slow the machine is; since when its lease runs at the earliest.
async fn until_served(served: &Served) -> Instant {
    let mut speaker = speaker(served).await;
    eventually("it is served", async || {
        let since = Instant::now();
        speaker.say(said("a")).await.unwrap();
        let is_served = endpoints(served, "b").await == ["a.test:8081 HEALTHY"];
        is_served.then_some(since)
    })
    .await
}

#[tokio::test]
async fn an_engine_appears_drains_and_vanishes() {
    let served = Served::leasing("leases-life", &[("fleet.yaml", FLEET)], LONG_S).await;
    let mut client = served.delta_of(node("outrigger")).await;
    client.want(Kind::Endpoints, &["chat"]).await;
    client.take(None).await;
    let mut speaker = speaker(&served).await;
    assert_eq!(speaker.say(said("a")).await.unwrap(), 3600);
    assert_eq!(client.take(None).await, "Endpoints[chat]");
    has(&served, "b", &["a.test:8081 HEALTHY"]).await;
    has(&served, "a", &["127.0.0.1:8000 HEALTHY"]).await;
    // The same again is no news.
    speaker.say(said("a")).await.unwrap();
    client.is_quiet().await;
    let mut draining = said("a");
    draining.engines[0].health = Health::Draining.into();
    speaker.say(draining).await.unwrap();
    has(&served, "b", &["a.test:8081 DRAINING"]).await;
    has(&served, "a", &["127.0.0.1:8000 DRAINING"]).await;
    let page = served.json("/leases").await;
    let lease = &page["leases"][0];
    assert_eq!(lease["node"], "a", "{page}");
    assert_eq!(lease["engines"][0]["pool"], "chat/all", "{page}");
    assert_eq!(lease["engines"][0]["health"], "draining", "{page}");
    assert!(lease["seconds_left"].as_f64().unwrap() > 3000.0, "{page}");
    // No pool chooses it any more, then it goes.
    let mut other = said("a");
    other.engines[0].models = vec!["n".into()];
    speaker.say(other).await.unwrap();
    has(&served, "b", &[]).await;
    let place = served.json("/leases").await["leases"][0]["engines"][0]["pool"].clone();
    assert_eq!(place["none"], "no pool chooses it");
    speaker.say(said("a")).await.unwrap();
    has(&served, "b", &["a.test:8081 HEALTHY"]).await;
    let leaving = Registration {
        leaving: true,
        ..said("a")
    };
    assert_eq!(speaker.say(leaving).await.unwrap(), 0);
    has(&served, "b", &[]).await;
}

#[tokio::test]
async fn a_lease_outlives_its_stream_and_not_its_time() {
    let served = Served::leasing("leases-time", &[("fleet.yaml", FLEET)], SHORT_S).await;
    // Its stream ends there.
    let since = until_served(&served).await;
    has(&served, "b", &[]).await;
    assert!(since.elapsed() >= Duration::from_secs(SHORT_S));
    let page = served.json("/sources").await;
    let source = page["sources"].as_array().unwrap().iter();
    let found = source.clone().find(|it| it["name"] == "leases").unwrap();
    assert_eq!(found["resources"], 0, "{page}");
}

#[tokio::test]
async fn after_a_restart_nothing_is_removed_before_a_whole_lease() {
    let served = Served::leasing("leases-restart", &[("fleet.yaml", FLEET)], SHORT_S).await;
    until_served(&served).await;
    let mut since = Instant::now();
    let restarting = served.restarted(|_| {
        // Longer than its lease was: nobody could renew it.
        std::thread::sleep(Duration::from_secs(SHORT_S));
        since = Instant::now();
    });
    let served = restarting.await;
    assert_eq!(endpoints(&served, "b").await, ["a.test:8081 HEALTHY"]);
    has(&served, "b", &[]).await;
    assert!(since.elapsed() >= Duration::from_secs(SHORT_S));
}

/// With certificates, a node registers itself and no other; what was issued to it over a stream is not enough.
#[tokio::test]
async fn a_node_registers_as_one_that_its_certificate_may_be() {
    let ca = Ca::new("leases-identity", "fleet");
    let served = Served::with("leases-identity", &[("fleet.yaml", FLEET)], |options| {
        options.leases = Some(leases_of(&options.config));
        options.tls = ca.options();
    })
    .await;
    for (id, expected) in [
        ("spiffe://fleet/node/b", Some(Code::PermissionDenied)),
        ("spiffe://fleet/peer/a", Some(Code::PermissionDenied)),
        ("spiffe://fleet/node/a", None),
    ] {
        let config = client(&ca, Some(&ca.good(id)), &rustls::version::TLS13);
        let channel = channel(served.running.address, config);
        let result = match Speaker::new(channel).await {
            Ok(mut speaker) => speaker.say(said("a")).await,
            Err(status) => Err(status),
        };
        assert_eq!(result.err().map(|status| status.code()), expected, "{id}");
        let leases = served.json("/leases").await;
        let is_there = leases["leases"].to_string().contains("a.test:8081");
        assert_eq!(is_there, expected.is_none(), "{id}: {leases}");
    }
}

/// Nobody can renew while it takes leave, so nobody is taken away.
#[tokio::test]
async fn who_takes_leave_ends_no_lease() {
    let served = Served::leasing("leases-leave", &[("fleet.yaml", FLEET)], SHORT_S).await;
    // Streams end one after the other, a 64th of the time apart: the last of these late.
    let mut streams = Vec::new();
    for _ in 0..60 {
        streams.push(speaker(&served).await);
    }
    let since = until_served(&served).await;
    let leave = Duration::from_secs(2 * SHORT_S);
    let served = served.restarted_after(leave, |_| {}).await;
    assert!(
        since.elapsed() > Duration::from_secs(SHORT_S),
        "its lease would be over"
    );
    assert_eq!(endpoints(&served, "b").await, ["a.test:8081 HEALTHY"]);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_why_and_nothing_changes() {
    let served = Served::leasing("leases-refused", &[("fleet.yaml", FLEET)], LONG_S).await;
    speaker(&served).await.say(said("a")).await.unwrap();
    has(&served, "x", &["a.test:8081 HEALTHY"]).await;
    let edited = |edit: fn(&mut Registration)| {
        let mut said = said("a");
        edit(&mut said);
        said
    };
    let elsewhere = |it: &mut Registration| it.node.as_mut().unwrap().address = "e.test:1".into();
    let long = |it: &mut Registration| it.engines[0].version = "v".repeat(2 << 20);
    let cases = [
        (
            edited(|it| it.node = None),
            Code::InvalidArgument,
            "node: required",
        ),
        (
            edited(|it| it.engines[0].role = 9),
            Code::InvalidArgument,
            "engines[0]",
        ),
        (
            edited(elsewhere),
            Code::AlreadyExists,
            "'a' is registered at a.test:8081",
        ),
        (
            edited(|it| it.node.as_mut().unwrap().id = "b".into()),
            Code::AlreadyExists,
            "where node 'a'",
        ),
        (edited(long), Code::OutOfRange, "too large"),
    ];
    for (said, code, message) in cases {
        let status = speaker(&served).await.say(said).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(message), "{status:?}");
    }
    // A stream is one node.
    let mut two = speaker(&served).await;
    two.say(said("b")).await.unwrap();
    let status = two.say(said("c")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    has(
        &served,
        "x",
        &["a.test:8081 HEALTHY", "b.test:8081 HEALTHY"],
    )
    .await;
}

#[tokio::test]
async fn without_a_place_for_leases_nobody_may_register() {
    let served = Served::new("leases-none", &[("fleet.yaml", FLEET)]).await;
    let Err(status) = Speaker::new(served.channel().await).await else {
        panic!("taken");
    };
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("--leases"), "{status:?}");
}
