//! A fleet whose proxies know each other by what the control plane issues: strangers, and new certificates under load.

use super::{PROGRAM, any_port, leases::REGISTERED};
use http::Method;
use outrigger_conformance::{
    harness::{
        Client, ControlPlane, Process, ProxyBuilder, Version, alive, eventually, free_address,
        metric, request, scratch, wait_alive,
    },
    sim::{Config, SimEngine},
};
use outrigger_control_plane::ca::{Authority, Pair};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::tls::{
    CommonTls, DataSource, TlsCertificate, UpstreamTls, Validation,
};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

/// A directory with CAs, what nodes come with, and what is served; gone when the case ends.
struct Secured(PathBuf);

impl Drop for Secured {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const TRUST_DOMAIN: &str = "fleet.example";

impl Secured {
    fn new() -> Self {
        let path = scratch("secured");
        fs::create_dir_all(path.join("resources")).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    fn run(words: &[&str]) {
        let mut command = Command::new(PROGRAM);
        let output = command.args(["control-plane", "ca"]).args(words).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    }

    fn init(&self, ca: &str) {
        let dir = self.at(ca);
        Self::run(&["init", "--dir", &dir, "--trust-domain", TRUST_DOMAIN]);
    }

    /// What a node comes with, of this CA.
    fn issue(&self, ca: &str, node: &str) {
        let (dir, out) = (self.at(ca), self.at(node));
        Self::run(&["issue", "--dir", &dir, "--node", node, "--out", &out]);
    }

    async fn serve(&self, ca: &str, listen: SocketAddr) -> ControlPlane {
        let flags = ["--ca", &self.at(ca), "--certificate-ttl-s", "6"];
        ControlPlane::with_flags(PROGRAM, &self.at("resources"), listen, &flags).await
    }

    /// With leases, and with these flags.
    async fn lease(&self, flags: &[&str]) -> ControlPlane {
        let leases = self.at("leases.json");
        let flags = [&["--leases", &leases], flags].concat();
        ControlPlane::with_flags(PROGRAM, &self.at("resources"), any_port(), &flags).await
    }

    /// Beside an engine, by flags alone: says to be `id`, with what `node` comes with.
    async fn beside(
        &self,
        engine: &SimEngine,
        control: &ControlPlane,
        (id, node): (&str, &str),
    ) -> Process {
        let engine = format!("http://{}", engine.http_addr);
        let control = format!("https://{}", control.address);
        let [cert, key, ca] = ["cert", "key", "ca"].map(|it| self.at(&format!("{node}/{it}.pem")));
        let who = [
            "--node-id",
            id,
            "--peer-tls-cert",
            &cert,
            "--peer-tls-key",
            &key,
            "--peer-tls-ca",
            &ca,
        ];
        let what = [
            "--engine",
            &engine,
            "--inbound",
            "127.0.0.1:0",
            "--label",
            "gpu=l4",
        ];
        Process::driven(
            PROGRAM,
            &[&who[..], &what, &["--control-plane", &control]].concat(),
        )
        .await
    }

    /// With the bootstrap of `deploy`.
    async fn proxy(&self, node: &str, control: SocketAddr) -> Process {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap/mtls.yaml");
        let text = fs::read_to_string(path).unwrap();
        let mut bootstrap = text;
        for (there, here) in [
            ("id: a,", format!("id: {node},")),
            ("/etc/outrigger/identity", self.at(node)),
            (
                "address: control-plane",
                format!("address: {}", control.ip()),
            ),
            (
                "port_value: 18000",
                format!("port_value: {}", control.port()),
            ),
            ("port_value: 9901", "port_value: 0".to_owned()),
        ] {
            assert!(bootstrap.contains(there), "{there}");
            bootstrap = bootstrap.replace(there, &here);
        }
        let config = self.at(&format!("{node}.yaml"));
        fs::write(&config, bootstrap).unwrap();
        Process::with_config(PROGRAM, &config, &[]).await
    }
}

/// Two nodes that speak mutual TLS by what the control plane issues, and a gateway on `a`.
fn mutual(engines: [&SimEngine; 2], [a, b]: [SocketAddr; 2], gateway: SocketAddr) -> String {
    let [first, second] = engines.map(|engine| engine.http_addr);
    format!(
        r#"
apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {{name: {FLEET}}}
spec:
  pools: [{{name: all, engines: [{{node: a, address: "{first}"}}, {{node: b, address: "{second}"}}]}}]
  nodes: {{a: "{a}", b: "{b}"}}
  peerTls: {{secret: outrigger_identity, caSecret: outrigger_trust}}
---
apiVersion: outrigger.dev/v1
kind: Policy
metadata: {{name: all}}
spec: {{routing: {{policy: round_robin}}}}
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {{name: front}}
spec: {{listeners: [{{address: "{gateway}"}}], routes: [{{fleet: {FLEET}}}], nodes: [a], accessLog: none}}
"#
    )
}

/// A proxy that wants to hear the feed of this inbound listener, with this certificate, does so or is refused.
async fn listens_in(inbound: SocketAddr, believed: &str, pair: Option<Pair>, is_heard: bool) {
    let pem = |text: String| DataSource::Inline(text.into_bytes());
    let tls = UpstreamTls {
        common: CommonTls {
            certificates: pair
                .into_iter()
                .map(|pair| TlsCertificate {
                    chain: pem(pair.chain),
                    key: pem(pair.key),
                })
                .collect(),
            validation: Some(Validation {
                trusted_ca: pem(believed.to_owned()),
                names: Vec::new(),
            }),
            ..CommonTls::default()
        },
        sni: String::new(),
    };
    let stranger = ProxyBuilder::new()
        .peer(inbound)
        .edit(move |bootstrap| {
            let mut all = bootstrap.clusters.iter_mut();
            all.find(|cluster| cluster.name == FLEET).unwrap().tls = Some(tls);
        })
        .start();
    if is_heard {
        wait_alive(stranger.admin(), 1).await;
        return;
    }
    // Metrics are of all proxies of this process.
    let peer = inbound.to_string();
    let failures = || stranger.metric("outrigger_feed_failures_total", &peer);
    let before = failures().await;
    eventually("it is refused again and again", || async {
        (failures().await >= before + 2.0).then_some(())
    })
    .await;
    assert_eq!(alive(stranger.admin()).await, 0);
}

async fn generated(gateway: SocketAddr) {
    let model = Config::default().model;
    let body = format!(r#"{{"model":"{model}","prompt":"hello","max_tokens":2}}"#);
    let mut client = Client::connect(gateway, Version::H1).await;
    let mut request = request(Method::POST, "/v1/completions", body);
    let headers = request.headers_mut();
    headers.insert("content-type", "application/json".parse().unwrap());
    let reply = client.send(request).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// Who was issued no identity hears nothing of the fleet, though it may come to the control plane; who was, hears it.
async fn strangers_hear_nothing(secured: &Secured, inbound: SocketAddr) {
    let authority = Authority::load(Path::new(&secured.at("ca"))).unwrap();
    secured.init("other");
    let other = Authority::load(Path::new(&secured.at("other"))).unwrap();
    let hour = Duration::from_secs(3600);
    let pair = |of: &Authority, id: &str| {
        let issued = of.issue(&id.parse().unwrap(), hour, SystemTime::now());
        Some(issued.unwrap())
    };
    let own = format!("spiffe://{TRUST_DOMAIN}/peer/c");
    let bootstrap = format!("spiffe://{TRUST_DOMAIN}/node/c");
    for (pair, is_heard) in [
        (None, false),
        (pair(&other, &own), false),
        (pair(&authority, "spiffe://elsewhere/peer/c"), false),
        (pair(&authority, &bootstrap), false),
        (pair(&authority, &own), true),
    ] {
        listens_in(inbound, &authority.bundle, pair, is_heard).await;
    }
}

#[tokio::test]
async fn a_fleet_with_identities_refuses_strangers_and_loses_nothing_by_new_certificates() {
    let secured = Secured::new();
    secured.init("ca");
    for node in ["a", "b"] {
        secured.issue("ca", node);
    }
    let engines = [(); 2].map(|()| SimEngine::start(Config::default()).unwrap());
    let (nodes, gateway) = ([free_address(), free_address()], free_address());
    let text = mutual([&engines[0], &engines[1]], nodes, gateway);
    fs::write(secured.0.join("resources/fleet.yaml"), text).unwrap();
    let mut control = secured.serve("ca", any_port()).await;
    let proxies = [
        secured.proxy("a", control.address).await,
        secured.proxy("b", control.address).await,
    ];
    for proxy in &proxies {
        wait_alive(proxy.admin, 2).await;
    }
    // Each is issued a new one while requests go to both, over connections that are open and new ones.
    let issued = "outrigger_control_plane_certificates_issued_total";
    let before = metric(control.admin, issued, "good").await;
    eventually("each is issued a new one", || async {
        generated(gateway).await;
        (metric(control.admin, issued, "good").await >= before + 4.0).then_some(())
    })
    .await;
    for engine in &engines {
        let page = Client::get(engine.http_addr, "/metrics").await.text();
        let mut counts = page
            .lines()
            .filter(|line| line.starts_with("vllm:request_success_total"));
        assert!(
            counts.any(|line| !line.ends_with(" 0.0") && !line.ends_with(" 0")),
            "{page}"
        );
    }
    strangers_hear_nothing(&secured, nodes[1]).await;
    // What a node comes with is read again: the next control plane knows only the other CA.
    control.kill().await;
    secured.issue("other", "a");
    let control = secured.serve("other", control.address).await;
    eventually("the proxy comes with what is new", || async {
        let page = Client::get(control.admin, "/clients").await.json();
        let clients = page["clients"].as_array().cloned().unwrap_or_default();
        clients
            .iter()
            .any(|client| client["id"] == "a")
            .then_some(())
    })
    .await;
    generated(gateway).await;
}

/// Nodes that hold a lease.
async fn leased(control: &ControlPlane) -> Vec<String> {
    let page = Client::get(control.admin, "/leases").await.json();
    let leases = page["leases"].as_array().cloned().unwrap_or_default();
    let ids = leases
        .iter()
        .map(|lease| lease["node"].as_str().unwrap_or_default().to_owned());
    ids.collect()
}

#[tokio::test]
async fn engines_register_over_tls_as_who_their_node_is() {
    let secured = Secured::new();
    secured.init("ca");
    secured.issue("ca", "a");
    fs::write(secured.0.join("resources/fleet.yaml"), REGISTERED).unwrap();
    let engine = SimEngine::start(Config {
        model: "sim".into(),
        ..Config::default()
    })
    .unwrap();
    let control = secured.lease(&["--ca", &secured.at("ca")]).await;
    let a = secured.beside(&engine, &control, ("a", "a")).await;
    eventually("it holds a lease", || async {
        (leased(&control).await == ["a"]).then_some(())
    })
    .await;
    let connected = "envoy_control_plane_connected_state";
    assert_eq!(metric(a.admin, connected, "").await, 1.0, "and is driven");
    let refused = |proxy: SocketAddr| async move {
        metric(proxy, "outrigger_registrations_total", "refused").await >= 2.0
    };
    let z = secured.beside(&engine, &control, ("z", "a")).await;
    eventually("who says to be another is refused", || async {
        refused(z.admin).await.then_some(())
    })
    .await;
    assert_eq!(leased(&control).await, ["a"]);
}

/// All nodes have certificates of the CA that they believe.
#[tokio::test]
async fn another_node_is_not_believed_to_be_the_control_plane() {
    let secured = Secured::new();
    secured.init("ca");
    for node in ["a", "control-plane"] {
        secured.issue("ca", node);
    }
    let [cert, key, ca] =
        ["cert", "key", "ca"].map(|it| secured.at(&format!("control-plane/{it}.pem")));
    let flags = [
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--tls-client-ca",
        &ca,
        "--trust-domain",
        TRUST_DOMAIN,
    ];
    let impostor = secured.lease(&flags).await;
    let engine = SimEngine::start(Config::default()).unwrap();
    let a = secured.beside(&engine, &impostor, ("a", "a")).await;
    eventually("it does not register there", || async {
        (metric(a.admin, "outrigger_registrations_total", "broken").await >= 2.0).then_some(())
    })
    .await;
    assert!(leased(&impostor).await.is_empty());
}
