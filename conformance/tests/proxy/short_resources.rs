//! Proxies that are configured by short resources alone: by files that the control plane makes of them, and by itself.

use http::Method;
use outrigger_conformance::{
    harness::{
        Client, ControlPlane, Process, Reply, Version, driven_bootstrap, eventually, free_address,
        request, scratch, wait_alive,
    },
    sim::{Config, SimEngine},
};
use outrigger_control_plane::{
    short,
    translate::{for_node, output, translate},
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::load::Syntax;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const COMPLETIONS: &str = "/v1/completions";
const GENERATION: &str = r#"{"model":"MODEL","prompt":"hello","max_tokens":2}"#;

/// Directories of files, gone when the case ends.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Directory {
    fn new() -> Self {
        let path = scratch("short");
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn of(&self, node: &str) -> PathBuf {
        self.0.join(node)
    }

    /// What `outrigger-control-plane translate --node NODE --out DIR` writes, for each of these nodes.
    fn translate(&self, text: &str, nodes: &[&str]) {
        let documents = short::read("fleet.yaml", text, Syntax::Yaml)
            .unwrap_or_else(|problems| panic!("{problems}"));
        let resources =
            translate(&documents, &BTreeSet::new()).unwrap_or_else(|problems| panic!("{problems}"));
        for node in nodes {
            let chosen = for_node(&resources, Some(node));
            let format = output::Format::Yaml;
            output::write(&chosen, &BTreeMap::new(), &self.of(node), format).unwrap();
        }
    }

    async fn proxy(&self, node: &str) -> Process {
        let bootstrap = self.of(&format!("{node}.yaml"));
        let files = self.of(node);
        fs::write(&bootstrap, bootstrap_of(node, &files)).unwrap();
        Process::with_config(PROGRAM, bootstrap.to_str().unwrap(), &[]).await
    }
}

/// As docs/src/short-resources.md has it.
fn bootstrap_of(node: &str, files: &Path) -> String {
    let files = files.display();
    format!(
        r#"
node: {{id: {node}}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
dynamic_resources:
  cds_config: {{path_config_source: {{path: {files}/clusters.yaml}}}}
  lds_config: {{path_config_source: {{path: {files}/listeners.yaml}}}}
"#
    )
}

fn generation() -> String {
    GENERATION.replace("MODEL", &Config::default().model)
}

async fn asked(at: SocketAddr, tenant: Option<&str>) -> Reply {
    let mut client = Client::connect(at, Version::H1).await;
    let mut request = request(Method::POST, COMPLETIONS, generation());
    let headers = request.headers_mut();
    headers.insert("content-type", "application/json".parse().unwrap());
    if let Some(tenant) = tenant {
        headers.insert("x-tenant", tenant.parse().unwrap());
    }
    client.send(request).await
}

fn fleet(engines: [&SimEngine; 2], nodes: [SocketAddr; 2], policy: &str) -> String {
    let [first, second] = engines.map(|engine| engine.http_addr);
    let [a, b] = nodes;
    let head = |kind: &str, name: &str| {
        format!("apiVersion: outrigger.dev/v1\nkind: {kind}\nmetadata: {{name: {name}}}\n")
    };
    [
        head("Fleet", FLEET),
        format!(
            r#"spec:
  pools: [{{name: all, engines: [{{node: a, address: "{first}"}}, {{node: b, address: "{second}"}}]}}]
  nodes: {{a: "{a}", b: "{b}"}}
---
"#
        ),
        head("Policy", "all"),
        format!("spec: {{fleets: [{FLEET}]{policy}}}\n---\n"),
        head("Policy", "bulk"),
        "spec: {tenants: [bulk], rateLimits: {limits: [{name: bulk, requestsPerMinute: 1}]}}\n---\n".to_owned(),
        head("Gateway", "front"),
        r#"spec: {listeners: [{address: "127.0.0.1:0"}], routes: [{fleet: fleet}], accessLog: none, tenantHeader: x-tenant}"#.to_owned(),
    ]
    .concat()
}

fn engine() -> SimEngine {
    SimEngine::start(Config::default()).unwrap()
}

async fn front(proxy: &Process) -> SocketAddr {
    eventually("the gateway listens", || async {
        let all = Client::get(proxy.admin, "/listeners?format=json").await;
        let all = all.json();
        let statuses = all["listener_statuses"].as_array()?;
        statuses.iter().find(|status| status["name"] == "front")?;
        Some(())
    })
    .await;
    proxy.listener("front").await
}

async fn lb_policies(proxy: &Process) -> Vec<String> {
    let dump = Client::get(proxy.admin, "/config_dump").await.json();
    let mut found = Vec::new();
    let sections = dump["configs"].as_array().unwrap();
    for section in sections {
        let clusters = section["dynamic_active_clusters"].as_array();
        let names = clusters
            .into_iter()
            .flatten()
            .filter(|cluster| cluster["cluster"]["name"] == FLEET);
        found.extend(names.map(|cluster| match &cluster["cluster"]["lb_policy"] {
            Value::String(policy) => policy.clone(),
            // Envoy's default is not written.
            _ => "ROUND_ROBIN".to_owned(),
        }));
    }
    found
}

/// How the engines of [`fleet`] are called.
fn ids(engines: &[SimEngine; 2]) -> BTreeSet<String> {
    let engines = engines.iter().zip(["a", "b"]);
    engines
        .map(|(engine, node)| format!("{node}/{}", engine.http_addr))
        .collect()
}

/// By turns, requests at this proxy get to all of these.
async fn reaches(proxy: &Process, ids: &BTreeSet<String>) {
    let mut seen = BTreeSet::new();
    for _ in 0..8 {
        let reply = asked(front(proxy).await, None).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        seen.insert(reply.header("x-outrigger-endpoint").to_owned());
    }
    assert_eq!(seen, *ids);
}

#[tokio::test]
async fn sidecars_and_a_gateway_of_short_resources_serve_as_one() {
    let (engines, files) = ([engine(), engine()], Directory::new());
    let nodes = [free_address(), free_address()];
    let text = fleet(
        [&engines[0], &engines[1]],
        nodes,
        ", routing: {policy: round_robin}",
    );
    files.translate(&text, &["a", "b", "edge"]);
    let (a, b) = (files.proxy("a").await, files.proxy("b").await);
    let edge = files.proxy("edge").await;
    for proxy in [&a, &b, &edge] {
        front(proxy).await;
        wait_alive(proxy.admin, 2).await;
    }
    for proxy in [&a, &b, &edge] {
        reaches(proxy, &ids(&engines)).await;
    }
    // One tenant has a limit of its own, the others have none.
    assert_eq!(asked(front(&edge).await, Some("bulk")).await.status, 200);
    assert_eq!(asked(front(&edge).await, Some("bulk")).await.status, 429);
    assert_eq!(asked(front(&edge).await, Some("other")).await.status, 200);
}

#[tokio::test]
async fn a_policy_that_changes_takes_effect_and_loses_no_request() {
    let (engines, files) = ([engine(), engine()], Directory::new());
    let nodes = [free_address(), free_address()];
    let of = |policy: &str| fleet([&engines[0], &engines[1]], nodes, policy);
    files.translate(&of(", routing: {policy: round_robin}"), &["a", "b"]);
    let (a, b) = (files.proxy("a").await, files.proxy("b").await);
    let at = front(&a).await;
    front(&b).await;
    wait_alive(a.admin, 2).await;
    assert_eq!(lb_policies(&a).await, ["ROUND_ROBIN"]);
    let done = AtomicBool::new(false);
    let asking = async {
        let mut count = 0;
        while !done.load(Relaxed) {
            let reply = asked(at, None).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            count += 1;
        }
        count
    };
    let changing = async {
        files.translate(&of(", timeouts: {total: 1h}"), &["a", "b"]);
        eventually("the new policy counts", || async {
            let policies = lb_policies(&a).await;
            (policies == ["LEAST_REQUEST"]).then_some(())
        })
        .await;
        done.store(true, Relaxed);
    };
    let (count, ()) = tokio::join!(asking, changing);
    assert!(count > 0);
}

/// Every type of every proxy was taken as it was sent.
async fn is_taken(control: &ControlPlane, proxies: usize) -> Option<()> {
    let page = Client::get(control.admin, "/clients").await.json();
    let clients = page["clients"].as_array()?;
    let mut types = clients
        .iter()
        .flat_map(|client| client["types"].as_array().into_iter().flatten());
    let all = types.all(|it| ["SYNCED", "NOT_SENT"].contains(&it["status"].as_str().unwrap_or("")));
    (all && clients.len() == proxies).then_some(())
}

#[tokio::test]
async fn a_control_plane_drives_sidecars_and_a_gateway_and_changes_them_without_a_loss() {
    let (engines, files) = ([engine(), engine()], Directory::new());
    let nodes = [free_address(), free_address()];
    let of = |policy: &str| fleet([&engines[0], &engines[1]], nodes, policy);
    let served = files.of("served");
    fs::create_dir_all(&served).unwrap();
    fs::write(
        served.join("fleet.yaml"),
        of(", routing: {policy: round_robin}"),
    )
    .unwrap();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let control = ControlPlane::start(PROGRAM, served.to_str().unwrap(), any_port).await;
    let mut proxies = Vec::new();
    for node in ["a", "b", "edge"] {
        let bootstrap = files.of(&format!("{node}.yaml"));
        let config = driven_bootstrap(control.address, node);
        fs::write(&bootstrap, config.to_string()).unwrap();
        proxies.push(Process::with_config(PROGRAM, bootstrap.to_str().unwrap(), &[]).await);
    }
    for proxy in &proxies {
        front(proxy).await;
        wait_alive(proxy.admin, 2).await;
        assert_eq!(lb_policies(proxy).await, ["ROUND_ROBIN"]);
        reaches(proxy, &ids(&engines)).await;
    }
    let done = AtomicBool::new(false);
    let asking = async {
        let mut rounds = 0;
        while !done.load(Relaxed) {
            for proxy in &proxies {
                let reply = asked(front(proxy).await, None).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
            }
            rounds += 1;
        }
        rounds
    };
    let changing = async {
        let new = served.join(".new");
        fs::write(&new, of(", routing: {policy: kv}")).unwrap();
        fs::rename(new, served.join("fleet.yaml")).unwrap();
        for proxy in &proxies {
            eventually("the new policy counts", || async {
                let policies = lb_policies(proxy).await;
                (policies == ["LEAST_REQUEST"]).then_some(())
            })
            .await;
        }
        eventually("everything is taken", || is_taken(&control, 3)).await;
        done.store(true, Relaxed);
    };
    let (rounds, ()) = tokio::join!(asking, changing);
    assert!(rounds > 0);
}
