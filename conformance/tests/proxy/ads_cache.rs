//! The last good configuration on disk: a proxy that starts serves by it before any server answers.

use super::{
    ads::{BOTH, ads_source, everything},
    ads_server::AdsServer,
    api_sources::{by, leads_to, secured, shows},
    dynamic::{any_port, endpoints, listener, served_by},
    dynamic_tls::{certificate, secret},
    tls::{Ca, TlsClient},
};
use outrigger_conformance::harness::{
    Client, Process, Upstream, driven_bootstrap, eventually, scratch,
};
use outrigger_xds::subscription::Protocol;
use serde_json::{Value, json};
use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const KEPT: &str = "control-plane.config";

struct Cache(PathBuf);

impl Cache {
    fn new() -> Self {
        Self(scratch("config-cache"))
    }

    fn file(&self) -> PathBuf {
        self.0.join(KEPT)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that a control plane at `control` drives.
async fn driven(control: SocketAddr, cache: &Cache, node: &str) -> Process {
    driven_by("DELTA_GRPC", control, cache, node).await
}

async fn driven_by(api_type: &str, control: SocketAddr, cache: &Cache, node: &str) -> Process {
    driven_beside(&[], (api_type, control), cache, node).await
}

/// With these clusters in its bootstrap.
async fn driven_beside(
    clusters: &[Value],
    (api_type, control): (&str, SocketAddr),
    cache: &Cache,
    node: &str,
) -> Process {
    let mut config = driven_bootstrap(control, node);
    let ads = &mut config["dynamic_resources"]["ads_config"];
    ads["api_type"] = json!(api_type);
    ads["grpc_services"][0]["initial_metadata"] = json!([{ "key": "x-token", "value": "secret" }]);
    let written = config["static_resources"]["clusters"].as_array_mut();
    written.unwrap().extend_from_slice(clusters);
    let path = scratch("driven.json");
    fs::write(&path, config.to_string()).unwrap();
    let directory = cache.0.to_str().unwrap();
    let flags = ["--config-cache", directory];
    Process::with_config(PROGRAM, path.to_str().unwrap(), &flags).await
}

/// Where the listener is that came from the control plane, or from the disk.
async fn edge_of(process: &Process) -> SocketAddr {
    eventually("the listener is there", || async {
        let page = Client::get(process.admin, "/listeners").await.text();
        let line = page.lines().find_map(|line| line.strip_prefix("edge::"));
        line?.parse().ok()
    })
    .await
}

async fn kept(cache: &Cache, what: &str) {
    eventually("it is kept", || async {
        let text = fs::read_to_string(cache.file()).ok()?;
        text.contains(what).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_proxy_starts_without_its_control_plane_and_follows_it_when_it_is_back() {
    let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
    let cache = Cache::new();
    let mut control = everything(one.address);
    let process = driven(control.address, &cache, "n").await;
    served_by(edge_of(&process).await, "one").await;
    kept(&cache, "RouteConfiguration").await;
    process.signal("KILL");
    control.kill();
    let process = driven(control.address, &cache, "n").await;
    let edge = edge_of(&process).await;
    served_by(edge, "one").await;
    assert_eq!(Client::get(process.admin, "/ready").await.status, 200);
    // What changed meanwhile, and what is gone, is told.
    control.put(&[endpoints("backend", &[two.address])]);
    control.put(&[
        super::ads::cluster("extra"),
        endpoints("extra", &[two.address]),
    ]);
    control.revive().await;
    served_by(edge, "two").await;
    kept(&cache, "extra").await;
    process.signal("KILL");
    control.kill();
    control.remove("envoy.config.cluster.v3.Cluster", "extra");
    let process = driven(control.address, &cache, "n").await;
    served_by(edge_of(&process).await, "two").await;
    control.revive().await;
    eventually("what is gone is gone", || async {
        let clusters = Client::get(process.admin, "/clusters").await.text();
        (!clusters.contains("extra::")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_complete_only_since_nobody_waits_any_longer_is_kept() {
    let one = Upstream::named("one").await;
    let cache = Cache::new();
    let control = AdsServer::start();
    // Long enough for all else to have been looked at meanwhile.
    let mut source = ads_source();
    source["initial_fetch_timeout"] = json!("2.5s");
    let rds = json!({ "config_source": source, "route_config_name": "nowhere" });
    control.put(&[
        super::ads::cluster("backend"),
        endpoints("backend", &[one.address]),
        listener("edge", any_port(), json!({ "rds": rds })),
    ]);
    let process = driven_by("GRPC", control.address, &cache, "n").await;
    edge_of(&process).await;
    kept(&cache, "Listener").await;
}

/// So it is in a mesh: listeners come by ADS, and certificates from a socket beside the proxy.
#[tokio::test]
async fn secrets_of_a_socket_are_never_kept_and_come_anew_without_the_control_plane() {
    for protocol in BOTH {
        let (ca, path, cache) = (Ca::new(), scratch("mesh.sock"), Cache::new());
        let (own, next) = (ca.pair(&["proxy.test"]), ca.pair(&["proxy.test"]));
        let secrets = AdsServer::also_at(Some(path.clone()));
        secrets.put(&[secret("own", certificate(&own))]);
        let one = Upstream::named("one").await;
        let mut control = everything(one.address);
        control.put(&[secured("edge", "own", &by(protocol, "sds-grpc"))]);
        let sds = leads_to("sds-grpc", &json!({ "pipe": { "path": path } }));
        let api_type = match protocol {
            Protocol::State => "GRPC",
            Protocol::Delta => "DELTA_GRPC",
        };
        let start = async |control: SocketAddr| {
            driven_beside(std::slice::from_ref(&sds), (api_type, control), &cache, "n").await
        };
        let process = start(control.address).await;
        let client = TlsClient::new(&ca, None);
        shows(&client, edge_of(&process).await, &own).await;
        kept(&cache, "sds-grpc").await;
        assert!(
            control
                .heard()
                .iter()
                .all(|request| request["type"] != "Secret")
        );
        process.signal("KILL");
        control.kill();
        let text = fs::read_to_string(cache.file()).unwrap();
        assert!(!text.contains("PRIVATE KEY") && !text.contains("CERTIFICATE"));
        secrets.put(&[secret("own", certificate(&next))]);
        let process = start(control.address).await;
        shows(&client, edge_of(&process).await, &next).await;
        process.signal("KILL");
        fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn what_came_last_is_kept_at_the_end() {
    let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
    let cache = Cache::new();
    let control = everything(one.address);
    let mut process = driven(control.address, &cache, "n").await;
    let edge = edge_of(&process).await;
    served_by(edge, "one").await;
    kept(&cache, "RouteConfiguration").await;
    control.put(&[endpoints("backend", &[two.address])]);
    served_by(edge, "two").await;
    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(10)).await.is_some());
    let text = fs::read_to_string(cache.file()).unwrap();
    assert!(text.contains(&two.address.port().to_string()));
}

#[tokio::test]
async fn a_file_that_is_torn_or_of_somebody_else_is_ignored() {
    let one = Upstream::named("one").await;
    let cache = Cache::new();
    let mut control = everything(one.address);
    let process = driven(control.address, &cache, "n").await;
    served_by(edge_of(&process).await, "one").await;
    kept(&cache, "RouteConfiguration").await;
    process.signal("KILL");
    control.kill();
    let whole = fs::read(cache.file()).unwrap();
    let torn = whole[..whole.len() / 2].to_vec();
    let garbage = b"\xff\x00garbage".to_vec();
    for (bytes, node) in [(torn, "n"), (garbage, "n"), (whole, "other")] {
        fs::write(cache.file(), bytes).unwrap();
        let process = driven(control.address, &cache, node).await;
        assert_eq!(Client::get(process.admin, "/ready").await.status, 503);
        let page = Client::get(process.admin, "/stats/prometheus").await.text();
        assert!(page.contains("outrigger_config_cache_total{event=\"ignored\"} 1"));
        assert!(!page.contains("event=\"restored\""));
        process.signal("KILL");
    }
}

#[tokio::test]
async fn a_directory_that_cannot_be_written_costs_nothing_else() {
    let one = Upstream::named("one").await;
    let cache = Cache::new();
    fs::write(&cache.0, "a file").unwrap();
    let control: AdsServer = everything(one.address);
    let process = driven(control.address, &cache, "n").await;
    served_by(edge_of(&process).await, "one").await;
    eventually("it is counted", || async {
        let page = Client::get(process.admin, "/stats/prometheus").await.text();
        page.contains("outrigger_config_cache_total{event=\"failed\"}")
            .then_some(())
    })
    .await;
    let connected = Client::get(process.admin, "/stats/prometheus").await.text();
    assert!(connected.contains("envoy_control_plane_connected_state 1"));
    fs::remove_file(&cache.0).unwrap();
}
