//! Agents that register: their engines are there without a proxy beside them, once where there is one, and for as long as the lease.

use super::{
    PROGRAM, any_port,
    leases::{Leasing, answered, beside, door, knows, until},
};
use outrigger_conformance::{
    harness::{Agent, Client, ControlPlane, Process, eventually},
    sim::{Config, SimEngine},
};
use serde_json::Value;
use std::{
    borrow::Cow,
    process::Command,
    time::{Duration, Instant},
};

const A_WHILE: Duration = Duration::from_secs(30);

fn engine() -> SimEngine {
    let config = Config {
        model: "sim".into(),
        ..Config::default()
    };
    SimEngine::start(config).unwrap()
}

/// An agent of node `a` that registers an engine.
async fn agent(engine: &SimEngine, url: &str, flags: &[&str]) -> Agent {
    let engine = format!("http://{}", engine.http_addr);
    let own = ["--engine", &engine, "--node", "a", "--register", url];
    let labelled = ["--label", "gpu=l4"];
    Agent::start(PROGRAM, &[&own[..], &labelled, flags].concat()).await
}

async fn gateway(control: &ControlPlane) -> Process {
    let url = format!("http://{}", control.address);
    Process::driven(PROGRAM, &["--node-id", "g", "--control-plane", &url]).await
}

/// The leases, as soon as they are so.
async fn leases(control: &ControlPlane, are_so: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    eventually("the leases are so", || async {
        let page = Client::get(control.admin, "/leases").await.json();
        let leases = page["leases"].as_array()?.clone();
        are_so(&leases).then_some(leases)
    })
    .await
}

#[tokio::test]
async fn an_engine_that_its_agent_registers_is_there_for_as_long_as_the_lease() {
    let leasing = Leasing::new();
    let mut control = leasing.control(any_port(), "3600").await;
    let engine = engine();
    let at = engine.http_addr;
    let url = format!("http://{}", control.address);
    let mut watching = agent(&engine, &url, &[]).await;
    let gateway = gateway(&control).await;
    until(&gateway, at, true).await;
    let edge = door(&gateway).await;
    eventually("a request is answered", || async {
        answered(edge).await.then_some(())
    })
    .await;
    // All that it knows of it is told.
    let known = |leases: &[Value]| leases.iter().any(|it| it["engines"][0]["kv_blocks"] != 0);
    let lease = leases(&control, known).await.remove(0);
    let told = &lease["engines"][0];
    assert_eq!(lease["registrant"], "agent", "{lease}");
    assert_eq!(lease["address"], watching.address.to_string(), "{lease}");
    assert_eq!(lease["labels"]["gpu"], "l4", "{lease}");
    assert!(!lease["version"].as_str().unwrap().is_empty(), "{lease}");
    assert_eq!(told["address"], at.to_string(), "{lease}");
    assert_eq!(told["models"][0], "sim", "{lease}");
    assert_eq!(
        (&told["role"], &told["health"]),
        (&"both".into(), &"healthy".into())
    );
    assert!(!told["version"].as_str().unwrap().is_empty(), "{lease}");
    assert!(told["block_tokens"].as_u64().unwrap() > 0, "{lease}");
    assert_eq!(
        (&told["pool"], &told["through"]),
        (&"chat/all".into(), &Value::Null)
    );
    // The control plane is killed and comes back: nothing is taken away meanwhile, and the agent is there again.
    control.kill().await;
    assert!(answered(edge).await);
    let listen = control.address;
    control = leasing.control(listen, "3600").await;
    leases(&control, |all| {
        all.iter()
            .any(|it| it["from"].as_str().is_some_and(|from| !from.is_empty()))
    })
    .await;
    assert!(knows(&gateway, at).await && answered(edge).await);
    // Told to end, its engine goes at once.
    watching.signal("TERM");
    until(&gateway, at, false).await;
    assert!(watching.ended(A_WHILE).await.unwrap().success());
    // Killed, it stays for the lease.
    control.kill().await;
    control = leasing.control(listen, "3").await;
    watching = agent(&engine, &url, &[]).await;
    until(&gateway, at, true).await;
    let renewed = Instant::now();
    watching.signal("KILL");
    until(&gateway, at, false).await;
    let held = renewed.elapsed();
    assert!(held >= Duration::from_secs(1), "{held:?}");
    drop(control);
}

#[tokio::test]
async fn an_engine_with_a_proxy_and_an_agent_is_one_endpoint() {
    let leasing = Leasing::new();
    let control = leasing.control(any_port(), "3600").await;
    let engine = engine();
    let at = engine.http_addr;
    let url = format!("http://{}", control.address);
    let watching = agent(&engine, &url, &[]).await;
    let gateway = gateway(&control).await;
    until(&gateway, at, true).await;
    let edge = door(&gateway).await;
    // Its proxy comes: requests go through that, and only once.
    let a = beside(&engine, &control).await;
    let peer = a.listener("inbound").await;
    until(&gateway, peer, true).await;
    until(&gateway, at, false).await;
    eventually("a request is answered", || async {
        answered(edge).await.then_some(())
    })
    .await;
    let both = leases(&control, |all| {
        all.len() == 2 && all.iter().all(|it| it["engines"][0]["pool"] == "chat/all")
    })
    .await;
    let through = |registrant: &str| {
        let own = both.iter().find(|it| it["registrant"] == registrant);
        own.unwrap()["engines"][0]["through"].clone()
    };
    assert_eq!(
        (through("proxy"), through("agent")),
        (Value::Null, "a".into())
    );
    // The proxy goes: the engine is there by its agent, until that goes, too.
    a.signal("TERM");
    until(&gateway, peer, false).await;
    until(&gateway, at, true).await;
    eventually("a request is answered", || async {
        answered(edge).await.then_some(())
    })
    .await;
    watching.signal("TERM");
    until(&gateway, at, false).await;
}

/// A directory with a CA and what it issued.
struct Issued(Leasing);

impl Issued {
    fn to(nodes: &[&str]) -> Self {
        let issued = Self(Leasing::new());
        let dir = issued.at("ca");
        issued.ca(&["init", "--dir", &dir, "--trust-domain", "fleet.example"]);
        for node in nodes {
            let out = issued.at(node);
            issued.ca(&["issue", "--dir", &dir, "--node", node, "--out", &out]);
        }
        issued
    }

    fn at(&self, name: &str) -> String {
        self.0.0.join(name).to_str().unwrap().to_owned()
    }

    fn ca(&self, words: &[&str]) {
        let words = [&["control-plane", "ca"], words].concat();
        let output = Command::new(PROGRAM).args(words).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Flags, each with one of the files of a node: its certificate, key and CA.
    fn flags<'a>(&self, node: &str, names: [&'a str; 3]) -> Vec<Cow<'a, str>> {
        let files = ["cert", "key", "ca"].map(|it| self.at(&format!("{node}/{it}.pem")));
        let pairs = names.into_iter().zip(files);
        pairs
            .flat_map(|(name, file)| [name.into(), file.into()])
            .collect()
    }

    /// A control plane that gives leases.
    async fn control(&self, tls: &[&str]) -> ControlPlane {
        let (leases, config) = (self.at("leases.json"), self.at("config"));
        let flags = [&["--leases", &leases], tls].concat();
        ControlPlane::with_flags(PROGRAM, &config, any_port(), &flags).await
    }

    /// An agent of node `a` that comes with what was issued to another, or to it.
    async fn agent(&self, engine: &SimEngine, control: &ControlPlane, node: &str) -> Agent {
        let names = ["--peer-tls-cert", "--peer-tls-key", "--peer-tls-ca"];
        let flags = self.flags(node, names);
        let flags: Vec<&str> = flags.iter().map(AsRef::as_ref).collect();
        agent(engine, &format!("https://{}", control.address), &flags).await
    }
}

/// Waits until an agent was told this.
async fn told(agent: &Agent, result: &str) {
    eventually(result, || async {
        let page = Client::get(agent.address, "/metrics").await.text();
        let series = format!("outrigger_registrations_total{{result=\"{result}\"}}");
        page.contains(&series).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_agent_registers_as_one_that_its_certificate_may_be() {
    let issued = Issued::to(&["a", "b"]);
    let control = issued.control(&["--ca", &issued.at("ca")]).await;
    let engine = engine();
    let stranger = issued.agent(&engine, &control, "b").await;
    told(&stranger, "refused").await;
    drop(stranger);
    let own = issued.agent(&engine, &control, "a").await;
    told(&own, "taken").await;
    let all = leases(&control, |all| all.len() == 1).await;
    assert_eq!(
        (&all[0]["node"], &all[0]["registrant"]),
        (&"a".into(), &"agent".into())
    );
}

/// All nodes have certificates of the CA that they believe.
#[tokio::test]
async fn an_agent_does_not_believe_another_node_to_be_the_control_plane() {
    let issued = Issued::to(&["a", "control-plane"]);
    let flags = issued.flags(
        "control-plane",
        ["--tls-cert", "--tls-key", "--tls-client-ca"],
    );
    let flags: Vec<&str> = flags.iter().map(AsRef::as_ref).collect();
    let domain = ["--trust-domain", "fleet.example"];
    let impostor = issued.control(&[&flags[..], &domain].concat()).await;
    let engine = engine();
    let a = issued.agent(&engine, &impostor, "a").await;
    told(&a, "broken").await;
    let log = a.log();
    let said = "the server is no control plane: its certificate is of [\"spiffe://fleet.example/node/control-plane\"]";
    assert!(log.contains(said), "{log}");
    assert!(leases(&impostor, |_| true).await.is_empty());
}
