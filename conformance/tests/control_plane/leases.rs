//! Engines that register: live elsewhere for as long as their lease, through kill -9 of the control plane and of the proxy.

use super::{PROGRAM, any_port};
use outrigger_conformance::{
    harness::{Client, ControlPlane, Process, Version, eventually, scratch},
    sim::{Config, SimEngine},
};
use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

/// A fleet of whoever registers, and a door to it.
pub(super) const REGISTERED: &str = r#"
apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec: {pools: [{name: all, registered: {models: [sim], labels: {gpu: l4}}}]}
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {name: front}
spec: {listeners: [{address: "127.0.0.1:0"}], routes: [{fleet: chat}], accessLog: none}
"#;

/// A directory, and a control plane that is started again and again on it.
pub(super) struct Leasing(pub(super) PathBuf);

impl Drop for Leasing {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Leasing {
    /// With that fleet.
    pub(super) fn new() -> Self {
        let leasing = Self(scratch("leasing"));
        fs::create_dir_all(leasing.0.join("config")).unwrap();
        fs::write(leasing.0.join("config/fleet.yaml"), REGISTERED).unwrap();
        leasing
    }

    pub(super) async fn control(&self, at: SocketAddr, lease_s: &str) -> ControlPlane {
        let leases = self.0.join("leases.json");
        let flags = ["--leases", leases.to_str().unwrap(), "--lease-s", lease_s];
        let config = self.0.join("config");
        ControlPlane::with_flags(PROGRAM, config.to_str().unwrap(), at, &flags).await
    }
}

/// Where the door of a gateway is, as soon as it is there.
pub(super) async fn door(gateway: &Process) -> SocketAddr {
    eventually("the door is there", || async {
        let page = Client::get(gateway.admin, "/listeners").await.text();
        let mut lines = page.lines();
        lines
            .find_map(|line| line.strip_prefix("front::"))?
            .parse()
            .ok()
    })
    .await
}

/// A proxy beside an engine, that knows a control plane.
pub(super) async fn beside(engine: &SimEngine, control: &ControlPlane) -> Process {
    let (engine, control) = (
        format!("http://{}", engine.http_addr),
        format!("http://{}", control.address),
    );
    let flags = [
        "--node-id",
        "a",
        "--engine",
        &engine,
        "--inbound",
        "127.0.0.1:0",
    ];
    let registers = ["--control-plane", &control, "--label", "gpu=l4"];
    Process::driven(PROGRAM, &[&flags[..], &registers].concat()).await
}

/// Whether a proxy has an endpoint of the fleet at this address.
pub(super) async fn knows(proxy: &Process, peer: SocketAddr) -> bool {
    let page = Client::get(proxy.admin, "/clusters").await.text();
    page.contains(&format!("chat::{peer}::"))
}

pub(super) async fn until(proxy: &Process, peer: SocketAddr, is_known: bool) {
    eventually("the endpoint is there, or gone", || async {
        (knows(proxy, peer).await == is_known).then_some(())
    })
    .await;
}

pub(super) async fn answered(edge: SocketAddr) -> bool {
    let body = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;
    let mut client = Client::connect(edge, Version::H1).await;
    client.post("/v1/completions", body).await.status == 200
}

#[tokio::test]
async fn an_engine_that_registers_is_live_elsewhere_for_as_long_as_its_lease() {
    let leasing = Leasing::new();
    let mut control = leasing.control(any_port(), "3600").await;
    let engine = SimEngine::start(Config {
        model: "sim".into(),
        ..Config::default()
    })
    .unwrap();
    let a = beside(&engine, &control).await;
    let peer = a.listener("inbound").await;
    let url = format!("http://{}", control.address);
    let gateway = Process::driven(PROGRAM, &["--node-id", "g", "--control-plane", &url]).await;
    until(&gateway, peer, true).await;
    let edge = door(&gateway).await;
    eventually("a request is answered", || async {
        answered(edge).await.then_some(())
    })
    .await;
    // The control plane is killed and comes back: nothing is taken away meanwhile, and the node is there again.
    control.kill().await;
    assert!(answered(edge).await);
    let at = control.address;
    control = leasing.control(at, "3600").await;
    eventually("registered again", || async {
        assert!(knows(&gateway, peer).await && answered(edge).await);
        let page = Client::get(control.admin, "/leases").await.json();
        let from = page["leases"][0]["from"].as_str()?;
        (!from.is_empty()).then_some(())
    })
    .await;
    // Told to end, it goes at once, and not when its lease is over.
    a.signal("TERM");
    until(&gateway, peer, false).await;
    drop(a);
    // Killed, it stays for its lease.
    control.kill().await;
    control = leasing.control(at, "3").await;
    let a = beside(&engine, &control).await;
    let peer = a.listener("inbound").await;
    until(&gateway, peer, true).await;
    let renewed = Instant::now();
    a.signal("KILL");
    until(&gateway, peer, false).await;
    // It renews at a third at the latest.
    let held = renewed.elapsed();
    assert!(held >= Duration::from_secs(1), "{held:?}");
}
