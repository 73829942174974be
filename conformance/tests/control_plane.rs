//! Our control plane drives our proxy, both as processes: from a cold start over changes to removals, and through kill -9.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

use http::Method;
use outrigger_conformance::{
    harness::{
        Client, ControlPlane, Process, ProxyBuilder, Upstream, Version, alive, eventually, metric,
        request, scratch, wait_alive,
    },
    sim::{Config, SimEngine},
};
use outrigger_control_plane::ca::{Authority, Pair};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::tls::{
    CommonTls, DataSource, TlsCertificate, UpstreamTls, Validation,
};
use serde_json::{Value, json};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const BOTH: [&str; 2] = ["GRPC", "DELTA_GRPC"];

fn typed(message: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/{message}"));
    fields
}

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

fn ads() -> Value {
    json!({ "ads": {}, "resource_api_version": "V3" })
}

fn cluster(name: &str) -> Value {
    typed(
        "envoy.config.cluster.v3.Cluster",
        json!({ "name": name, "type": "EDS", "eds_cluster_config": { "eds_config": ads() } }),
    )
}

fn endpoints(cluster: &str, server: SocketAddr) -> Value {
    typed(
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        json!({
            "cluster_name": cluster,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(server) } }] }],
        }),
    )
}

/// A listener whose connection manager has these fields, on a port of its own.
fn listener(name: &str, filters: &[Value], routes: Value) -> Value {
    let router = typed("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let router = json!({ "name": "router", "typed_config": router });
    let filters = [filters, &[router]].concat();
    let mut manager = json!({ "stat_prefix": name, "http_filters": filters });
    let Value::Object(routes) = routes else {
        panic!("{routes} has no fields");
    };
    for (field, value) in routes {
        manager[field] = value;
    }
    let manager = typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        manager,
    );
    typed(
        "envoy.config.listener.v3.Listener",
        json!({
            "name": name,
            "address": address(any_port()),
            "filter_chains": [{ "filters": [{ "name": "http", "typed_config": manager }] }],
        }),
    )
}

fn table(name: &str, action: Value) -> Value {
    let mut route = action;
    route["match"] = json!({ "prefix": "/" });
    json!({ "name": name, "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [route] }] })
}

fn answers(text: &str) -> Value {
    let answer = json!({ "status": 200, "body": { "inline_string": text } });
    json!({ "route_config": table("inline", json!({ "direct_response": answer })) })
}

fn routes_to(cluster: &str) -> Value {
    let routes = table("table", json!({ "route": { "cluster": cluster } }));
    typed("envoy.config.route.v3.RouteConfiguration", routes)
}

/// What a proxy starts with.
fn bootstrap(api_type: &str, control: SocketAddr) -> Value {
    let http2 = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        json!({ "explicit_http_config": { "http2_protocol_options": {} } }),
    );
    json!({
        "node": { "id": "node", "cluster": "fleet" },
        "admin": { "address": address(any_port()) },
        "dynamic_resources": {
            "ads_config": {
                "api_type": api_type,
                "transport_api_version": "V3",
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds" } }],
            },
            "lds_config": ads(),
            "cds_config": ads(),
        },
        "static_resources": { "clusters": [{
            "name": "xds",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2,
            },
            "load_assignment": {
                "cluster_name": "xds",
                "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(control) } }] }],
            },
        }] },
    })
}

async fn served_by(at: SocketAddr, name: &str) {
    eventually(name, || async {
        let reply = Client::get(at, "/").await;
        (reply.status == 200 && reply.text().contains(name)).then_some(())
    })
    .await;
}

/// A control plane with its directory, and a proxy that it drives.
struct Driven {
    directory: PathBuf,
    control: ControlPlane,
    proxy: Process,
}

impl Drop for Driven {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Driven {
    /// `backend` is at this upstream.
    async fn new(api_type: &str, upstream: &Upstream) -> Self {
        let directory = scratch("resources");
        fs::create_dir_all(&directory).unwrap();
        let rds = json!({ "config_source": ads(), "route_config_name": "table" });
        put(&directory, "clusters.yaml", &[cluster("backend")]);
        put(
            &directory,
            "endpoints.yaml",
            &[endpoints("backend", upstream.address)],
        );
        put(
            &directory,
            "listeners.json",
            &[listener("edge", &[], json!({ "rds": rds }))],
        );
        put(&directory, "routes.yaml", &[routes_to("backend")]);
        let control = ControlPlane::start(PROGRAM, directory.to_str().unwrap(), any_port()).await;
        let config = scratch("bootstrap.json");
        fs::write(&config, bootstrap(api_type, control.address).to_string()).unwrap();
        let proxy = Process::with_config(PROGRAM, config.to_str().unwrap(), &[]).await;
        fs::remove_file(config).unwrap();
        Self {
            directory,
            control,
            proxy,
        }
    }

    fn put(&self, name: &str, resources: &[Value]) {
        put(&self.directory, name, resources);
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.join(name)).unwrap();
    }

    /// Where a listener that came from the control plane is.
    async fn listener(&self, name: &str) -> SocketAddr {
        eventually("the listener is there", || async {
            let page = Client::get(self.proxy.admin, "/listeners").await.text();
            let mut lines = page.lines();
            let at = lines.find_map(|line| line.strip_prefix(&format!("{name}::")));
            at?.parse().ok()
        })
        .await
    }

    /// What the control plane knows of a type that the proxy has.
    async fn of_type(&self, kind: &str) -> Value {
        let page = Client::get(self.control.admin, "/clients").await.json();
        let types = page["clients"][0]["types"].as_array().cloned();
        let mut types = types.unwrap_or_default().into_iter();
        let found = types.find(|it| {
            it["type_url"]
                .as_str()
                .is_some_and(|url| url.ends_with(kind))
        });
        found.unwrap_or_default()
    }

    /// Until the control plane knows this of a type.
    async fn has(&self, kind: &str, status: &str) -> Value {
        eventually("the control plane knows it", || async {
            let of_type = self.of_type(kind).await;
            (of_type["status"] == status).then_some(of_type)
        })
        .await
    }

    /// Resources that the control plane sent since it started, of types whose names end so.
    async fn sent(&self, kinds: &[&str]) -> u64 {
        let page = Client::get(self.control.admin, "/stats/prometheus")
            .await
            .text();
        let lines = page.lines().filter(|line| {
            line.starts_with("outrigger_control_plane_resources_sent_total")
                && kinds
                    .iter()
                    .any(|kind| line.contains(&format!(".{kind}\"")))
        });
        let counts = lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap());
        counts.sum()
    }
}

/// Replaces a file as a whole.
fn put(directory: &std::path::Path, name: &str, resources: &[Value]) {
    let new = directory.join(".new");
    fs::write(&new, json!({ "resources": resources }).to_string()).unwrap();
    fs::rename(new, directory.join(name)).unwrap();
}

#[tokio::test]
async fn files_of_a_control_plane_are_live_in_the_proxy() {
    for api_type in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let driven = Driven::new(api_type, &one).await;
        let edge = driven.listener("edge").await;
        served_by(edge, "one").await;
        for kind in [
            "Cluster",
            "ClusterLoadAssignment",
            "Listener",
            "RouteConfiguration",
        ] {
            driven.has(kind, "SYNCED").await;
        }
        // Endpoints alone; then a cluster more and routes to it; then the first one is gone.
        driven.put("endpoints.yaml", &[endpoints("backend", two.address)]);
        served_by(edge, "two").await;
        driven.put(
            "more.yaml",
            &[cluster("more"), endpoints("more", one.address)],
        );
        driven.put("routes.yaml", &[routes_to("more")]);
        served_by(edge, "one").await;
        driven.remove("clusters.yaml");
        driven.remove("endpoints.yaml");
        eventually("the cluster is gone", || async {
            let page = Client::get(driven.proxy.admin, "/clusters").await.text();
            (!page.contains("backend::")).then_some(())
        })
        .await;
        served_by(edge, "one").await;
    }
}

#[tokio::test]
async fn what_the_proxy_refuses_is_known_and_the_rest_applies() {
    for api_type in BOTH {
        let one = Upstream::named("one").await;
        let driven = Driven::new(api_type, &one).await;
        served_by(driven.listener("edge").await, "one").await;
        // Which filters there are only a proxy knows.
        let nothing = json!({
            "name": "nothing",
            "typed_config": typed("xds.type.v3.TypedStruct", json!({
                "type_url": "type.googleapis.com/outrigger.filters.http.nothing.v1.Config",
                "value": {},
            })),
        });
        let resources = [
            listener("bad", &[nothing], answers("bad")),
            listener("good", &[], answers("good")),
        ];
        driven.put("more.yaml", &resources);
        let good = driven.listener("good").await;
        assert_eq!(Client::get(good, "/").await.text(), "good");
        let refused = driven.has("Listener", "ERROR").await;
        let error = refused["nacked"]["error"].as_str().unwrap();
        assert!(
            error.contains("'bad'") && error.contains("nothing"),
            "{api_type}: {error}"
        );
        driven.put("more.yaml", &resources[1..]);
        driven.has("Listener", "SYNCED").await;
    }
}

#[tokio::test]
async fn traffic_outlives_the_control_plane_and_nothing_is_sent_twice() {
    for api_type in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let mut driven = Driven::new(api_type, &one).await;
        let edge = driven.listener("edge").await;
        served_by(edge, "one").await;
        driven.has("RouteConfiguration", "SYNCED").await;
        assert!(
            driven.sent(&["Cluster", "Listener"]).await >= 2,
            "{api_type}"
        );
        driven.control.kill().await;
        for _ in 0..20 {
            let reply = Client::get(edge, "/").await;
            assert!(reply.status == 200 && reply.text().contains("one"));
        }
        let directory = driven.directory.to_str().unwrap().to_owned();
        let at = driven.control.address;
        driven.control = ControlPlane::start(PROGRAM, &directory, at).await;
        for kind in [
            "Cluster",
            "ClusterLoadAssignment",
            "Listener",
            "RouteConfiguration",
        ] {
            driven.has(kind, "SYNCED").await;
        }
        assert_eq!(driven.sent(&["Cluster", "Listener"]).await, 0, "{api_type}");
        if api_type == "DELTA_GRPC" {
            let named = ["ClusterLoadAssignment", "RouteConfiguration"];
            assert_eq!(driven.sent(&named).await, 0);
        }
        served_by(edge, "one").await;
        driven.put("endpoints.yaml", &[endpoints("backend", two.address)]);
        served_by(edge, "two").await;
    }
}

#[tokio::test]
async fn a_control_plane_that_is_told_to_end_does() {
    let one = Upstream::named("one").await;
    let mut driven = Driven::new("DELTA_GRPC", &one).await;
    served_by(driven.listener("edge").await, "one").await;
    driven.control.signal("TERM");
    let status = driven.control.ended().await;
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    served_by(driven.listener("edge").await, "one").await;
}

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

async fn free() -> SocketAddr {
    let socket = tokio::net::TcpListener::bind(any_port()).await.unwrap();
    socket.local_addr().unwrap()
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
    let (nodes, gateway) = ([free().await, free().await], free().await);
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

/// A fleet of whoever registers, and a door to it.
const REGISTERED: &str = r#"
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
struct Leasing(PathBuf);

impl Drop for Leasing {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Leasing {
    async fn control(&self, at: SocketAddr, lease_s: &str) -> ControlPlane {
        let leases = self.0.join("leases.json");
        let flags = ["--leases", leases.to_str().unwrap(), "--lease-s", lease_s];
        let config = self.0.join("config");
        ControlPlane::with_flags(PROGRAM, config.to_str().unwrap(), at, &flags).await
    }
}

/// A proxy beside an engine, that knows a control plane.
async fn beside(engine: &SimEngine, control: &ControlPlane) -> Process {
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
async fn knows(proxy: &Process, peer: SocketAddr) -> bool {
    let page = Client::get(proxy.admin, "/clusters").await.text();
    page.contains(&format!("chat::{peer}::"))
}

async fn until(proxy: &Process, peer: SocketAddr, is_known: bool) {
    eventually("the endpoint is there, or gone", || async {
        (knows(proxy, peer).await == is_known).then_some(())
    })
    .await;
}

async fn answered(edge: SocketAddr) -> bool {
    let body = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;
    let mut client = Client::connect(edge, Version::H1).await;
    client.post("/v1/completions", body).await.status == 200
}

#[tokio::test]
async fn an_engine_that_registers_is_live_elsewhere_for_as_long_as_its_lease() {
    let leasing = Leasing(scratch("leasing"));
    fs::create_dir_all(leasing.0.join("config")).unwrap();
    fs::write(leasing.0.join("config/fleet.yaml"), REGISTERED).unwrap();
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
    let edge = eventually("the door is there", || async {
        let page = Client::get(gateway.admin, "/listeners").await.text();
        let mut lines = page.lines();
        lines
            .find_map(|line| line.strip_prefix("front::"))?
            .parse()
            .ok()
    })
    .await;
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
