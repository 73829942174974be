//! Configuration that comes while the proxy runs: files that change, resources that are wrong, listeners that come and
//! go.

use outrigger_conformance::harness::{
    Client, Process, ProxyBuilder, TestProxy, Upstream, eventually, metric, scratch,
};
use outrigger_xds::resource::config_source::{ConfigSource, INITIAL_FETCH_TIMEOUT_DEFAULT, Origin};
use serde_json::{Value, json};
use std::{fs, net::SocketAddr, os::unix::fs::symlink, path::PathBuf};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");

/// A directory of configuration files.
pub(super) struct Files(PathBuf);

impl Files {
    pub(super) fn new() -> Self {
        let path = scratch("dynamic");
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// Replaces a file whole.
    pub(super) fn put(&self, name: &str, text: &str) {
        let half = self.path(&format!("{name}.part"));
        fs::write(&half, text).unwrap();
        fs::rename(half, self.path(name)).unwrap();
    }

    /// A response of resources.
    pub(super) fn respond(&self, name: &str, version: &str, resources: &[Value]) {
        let response = json!({ "version_info": version, "resources": resources });
        self.put(name, &response.to_string());
    }

    pub(super) fn source(&self, name: &str) -> ConfigSource {
        ConfigSource {
            origin: Origin::Path(self.path(name)),
            initial_fetch_timeout: INITIAL_FETCH_TIMEOUT_DEFAULT,
        }
    }

    /// The same as a resource says it.
    pub(super) fn config_source(&self, name: &str) -> Value {
        json!({ "path_config_source": { "path": self.path(name) }, "resource_api_version": "V3" })
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn typed(message: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/{message}"));
    fields
}

pub(super) fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

pub(super) fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A listener whose connection manager has these further fields.
pub(super) fn listener(name: &str, at: SocketAddr, manager: Value) -> Value {
    let mut http = typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": name,
            "http_filters": [{
                "name": "router",
                "typed_config": typed("envoy.extensions.filters.http.router.v3.Router", json!({})),
            }],
        }),
    );
    let Value::Object(fields) = manager else {
        panic!("{manager} has no fields");
    };
    for (field, value) in fields {
        http[field] = value;
    }
    typed(
        "envoy.config.listener.v3.Listener",
        json!({
            "name": name,
            "address": address(at),
            "filter_chains": [{ "filters": [{ "name": "http", "typed_config": http }] }],
        }),
    )
}

pub(super) fn answers(text: &str) -> Value {
    json!({ "route_config": table("inline", json!({ "direct_response": { "status": 200, "body": { "inline_string": text } } })) })
}

/// A route table of one route.
pub(super) fn table(name: &str, action: Value) -> Value {
    let mut route = action;
    route["match"] = json!({ "prefix": "/" });
    json!({ "name": name, "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [route] }] })
}

pub(super) fn routes_to(name: &str, cluster: &str) -> Value {
    let table = table(name, json!({ "route": { "cluster": cluster } }));
    typed("envoy.config.route.v3.RouteConfiguration", table)
}

pub(super) fn eds_cluster(name: &str, source: &Value) -> Value {
    typed(
        "envoy.config.cluster.v3.Cluster",
        json!({ "name": name, "type": "EDS", "eds_cluster_config": { "eds_config": source } }),
    )
}

pub(super) fn endpoints(cluster: &str, servers: &[SocketAddr]) -> Value {
    let all = servers
        .iter()
        .map(|server| json!({ "endpoint": { "address": address(*server) } }));
    typed(
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        json!({ "cluster_name": cluster, "endpoints": [{ "lb_endpoints": all.collect::<Vec<_>>() }] }),
    )
}

/// A proxy whose further listeners and clusters come from `lds.yaml` and `cds.yaml`.
pub(super) fn start(files: &Files) -> TestProxy {
    let (lds, cds) = (files.source("lds.yaml"), files.source("cds.yaml"));
    ProxyBuilder::new()
        .edit(|bootstrap| {
            bootstrap.lds = Some(lds);
            bootstrap.cds = Some(cds);
        })
        .start()
}

pub(super) async fn at(proxy: &TestProxy, listener: &str) -> SocketAddr {
    eventually("the listener is there", || async {
        proxy.proxy.address(listener)
    })
    .await
}

pub(super) async fn served_by(at: SocketAddr, name: &str) {
    eventually(name, || async {
        let reply = Client::get(at, "/x").await;
        (reply.status == 200 && reply.text().contains(name)).then_some(())
    })
    .await;
}

pub(super) async fn dump(admin: SocketAddr, section: &str) -> Value {
    let all = Client::get(admin, "/config_dump?include_eds").await.json();
    let sections = all["configs"].as_array().unwrap().clone();
    let kind = format!("type.googleapis.com/envoy.admin.v3.{section}");
    sections
        .into_iter()
        .find(|found| found["@type"] == *kind)
        .unwrap()
}

/// All types from files, the route table and the endpoints in files of their own.
pub(super) async fn everything(files: &Files, server: SocketAddr) -> TestProxy {
    let (rds, eds) = (
        files.config_source("rds.yaml"),
        files.config_source("eds.yaml"),
    );
    let manager = json!({ "rds": { "config_source": rds, "route_config_name": "table" } });
    files.respond("lds.yaml", "l1", &[listener("edge", any_port(), manager)]);
    files.respond("cds.yaml", "c1", &[eds_cluster("backend", &eds)]);
    files.respond("rds.yaml", "r1", &[routes_to("table", "backend")]);
    files.respond("eds.yaml", "e1", &[endpoints("backend", &[server])]);
    start(files)
}

#[tokio::test]
async fn all_types_come_from_files_and_are_shown() {
    let (files, one) = (Files::new(), Upstream::named("one").await);
    let proxy = everything(&files, one.address).await;
    served_by(at(&proxy, "edge").await, "one").await;
    assert_eq!(Client::get(proxy.admin(), "/ready").await.status, 200);
    let listeners = dump(proxy.admin(), "ListenersConfigDump").await;
    let edge = &listeners["dynamic_listeners"][0];
    assert_eq!(
        (
            &listeners["version_info"],
            &edge["name"],
            &edge["active_state"]["version_info"]
        ),
        (&json!("l1"), &json!("edge"), &json!("l1"))
    );
    assert_eq!(listeners["static_listeners"].as_array().unwrap().len(), 2);
    assert!(
        edge["active_state"]["last_updated"]
            .as_str()
            .unwrap()
            .ends_with('Z')
    );
    let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
    let backend = &clusters["dynamic_active_clusters"][0];
    assert_eq!(backend["cluster"]["name"], "backend");
    assert_eq!(backend["cluster"]["type"], "EDS");
    let routes = dump(proxy.admin(), "RoutesConfigDump").await;
    let table = &routes["dynamic_route_configs"][0];
    assert_eq!(
        (&table["version_info"], &table["route_config"]["name"]),
        (&json!("r1"), &json!("table"))
    );
    let shown = dump(proxy.admin(), "EndpointsConfigDump").await;
    let shown = &shown["dynamic_endpoint_configs"][0]["endpoint_config"];
    let port = &shown["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"];
    assert_eq!(*port, one.address.port());
}

#[tokio::test]
async fn a_change_is_seen_by_rename_swap_of_links_and_write_in_place() {
    let files = Files::new();
    let servers = [Upstream::named("one").await, Upstream::named("two").await];
    let [one, two] = [&servers[0], &servers[1]].map(|server| server.address);
    let eds =
        json!({ "version_info": "2", "resources": [endpoints("backend", &[two])] }).to_string();
    // By rename.
    let proxy = everything(&files, one).await;
    let edge = at(&proxy, "edge").await;
    served_by(edge, "one").await;
    files.put("eds.yaml", &eds);
    served_by(edge, "two").await;
    // In place.
    let back = eds.replace(&two.port().to_string(), &one.port().to_string());
    fs::write(files.path("eds.yaml"), back).unwrap();
    served_by(edge, "one").await;
    drop(proxy);
    // As a ConfigMap is mounted.
    let mounted = Files::new();
    let content = |version: &str, server| {
        fs::create_dir_all(mounted.path(version)).unwrap();
        mounted.respond(
            &format!("{version}/eds.yaml"),
            version,
            &[endpoints("backend", &[server])],
        );
    };
    let link = |target: &str, name: &str| symlink(target, mounted.path(name)).unwrap();
    content("..v1", one);
    link("..v1", "..data");
    link("..data/eds.yaml", "eds.yaml");
    let source = json!({ "path_config_source": {
        "path": mounted.path("eds.yaml"), "watched_directory": { "path": mounted.path("") },
    } });
    files.respond("cds.yaml", "c2", &[eds_cluster("backend", &source)]);
    let proxy = start(&files);
    let edge = at(&proxy, "edge").await;
    served_by(edge, "one").await;
    content("..v2", two);
    link("..v2", "..tmp");
    fs::rename(mounted.path("..tmp"), mounted.path("..data")).unwrap();
    served_by(edge, "two").await;
}

#[tokio::test]
async fn a_bad_resource_keeps_its_last_good_version_and_the_others_apply() {
    let files = Files::new();
    files.respond("cds.yaml", "c1", &[]);
    let edges = |a: Value, b: Value| [listener("a", any_port(), a), listener("b", any_port(), b)];
    files.respond("lds.yaml", "1", &edges(answers("a1"), answers("b1")));
    let config = format!(
        "node: {{id: n, cluster: c}}\nadmin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}\n\
         dynamic_resources:\n  lds_config: {}\n  cds_config: {}\n",
        files.config_source("lds.yaml"),
        files.config_source("cds.yaml")
    );
    files.put("bootstrap.yaml", &config);
    let process = Process::with_config(PROGRAM, &files.path("bootstrap.yaml"), &[]).await;
    let (a, b) = (process.listener("a").await, process.listener("b").await);
    let count = |name: &'static str| async move {
        metric(process.admin, &format!("envoy_listener_manager_{name}"), "").await
    };
    served_by(a, "a1").await;
    // One is changed, one has a field that is not supported, a third is new and has one that nobody knows.
    let mut bad = edges(answers("a2"), answers("b2")).to_vec();
    bad[1]["udp_listener_config"] = json!({});
    let mut unknown = listener("c", any_port(), answers("c1"));
    unknown["of_tomorrow"] = json!(1);
    bad.push(unknown);
    files.respond("lds.yaml", "2", &bad);
    served_by(a, "a2").await;
    served_by(b, "b1").await;
    served_by(process.listener("c").await, "c1").await;
    assert_eq!(count("lds_update_rejected").await, 1.0);
    let failed = dump(process.admin, "ListenersConfigDump").await["dynamic_listeners"][1].clone();
    assert_eq!(failed["active_state"]["version_info"], "1");
    let details = failed["error_state"]["details"].as_str().unwrap();
    assert!(
        details.contains("not supported yet: udp_listener_config"),
        "{details}"
    );
    assert_eq!(failed["error_state"]["version_info"], "2");
    let unknown = metric(process.admin, "envoy_server_dynamic_unknown_fields", "").await;
    assert!(unknown >= 1.0);
    // What is no configuration at all changes nothing.
    files.put("lds.yaml", "{resources: [");
    eventually("the failure is counted", || async {
        (count("lds_update_failure").await >= 1.0).then_some(())
    })
    .await;
    served_by(a, "a2").await;
    // Well again, and gone.
    files.respond("lds.yaml", "3", &edges(answers("a3"), answers("b3"))[..1]);
    served_by(a, "a3").await;
    eventually("b is closed", || async {
        tokio::net::TcpStream::connect(b)
            .await
            .is_err()
            .then_some(())
    })
    .await;
    assert_eq!(count("listener_removed").await, 2.0);
    assert_eq!(count("total_listeners_active").await, 1.0);
}

#[tokio::test]
async fn a_route_table_that_a_listener_cannot_use_is_refused() {
    let (files, one) = (Files::new(), Upstream::named("one").await);
    let proxy = everything(&files, one.address).await;
    let edge = at(&proxy, "edge").await;
    served_by(edge, "one").await;
    let mut bad = routes_to("table", "backend");
    bad["virtual_hosts"][0]["routes"][0]["typed_per_filter_config"] = json!({
        "nobody": typed("envoy.extensions.filters.http.cors.v3.CorsPolicy", json!({})),
    });
    files.respond("rds.yaml", "r2", &[bad]);
    eventually("it is refused", || async {
        let routes = dump(proxy.admin(), "RoutesConfigDump").await;
        let error = routes["dynamic_route_configs"][0]["error_state"]["details"].clone();
        error.as_str()?.contains("no such filter").then_some(())
    })
    .await;
    served_by(edge, "one").await;
    // A cluster that is not there is one of requests, as with Envoy.
    files.respond("rds.yaml", "r3", &[routes_to("table", "nowhere")]);
    eventually("no cluster", || async {
        let reply = Client::get(edge, "/").await;
        (reply.status == 503 && reply.header("x-outrigger-error") == "NC").then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_not_complete_waits_and_what_it_replaces_serves_on() {
    let (files, one, two) = (
        Files::new(),
        Upstream::named("one").await,
        Upstream::named("two").await,
    );
    let proxy = everything(&files, one.address).await;
    let edge = at(&proxy, "edge").await;
    served_by(edge, "one").await;
    // Its new endpoints cannot be read yet.
    files.put("eds2.yaml", "not yet");
    let source = files.config_source("eds2.yaml");
    files.respond("cds.yaml", "c2", &[eds_cluster("backend", &source)]);
    eventually("the cluster waits", || async {
        let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
        let waiting = &clusters["dynamic_warming_clusters"][0]["cluster"]["name"];
        (waiting == "backend").then_some(())
    })
    .await;
    served_by(edge, "one").await;
    files.respond("eds2.yaml", "e2", &[endpoints("backend", &[two.address])]);
    served_by(edge, "two").await;
    // A listener waits for its routes.
    files.put("rds2.yaml", "not yet");
    let rds = files.config_source("rds2.yaml");
    let manager = json!({ "rds": { "config_source": rds, "route_config_name": "late" } });
    let mut all = vec![listener("late", any_port(), manager)];
    files.respond("lds.yaml", "l2", &all);
    eventually("the listener waits", || async {
        let listeners = dump(proxy.admin(), "ListenersConfigDump").await;
        listeners["dynamic_listeners"][0]
            .get("warming_state")
            .map(drop)
    })
    .await;
    assert_eq!(proxy.proxy.address("late"), None);
    files.respond("rds2.yaml", "r2", &[routes_to("late", "backend")]);
    served_by(at(&proxy, "late").await, "two").await;
    // What is waited for in vain is gone without.
    all[0]["filter_chains"][0]["filters"][0]["typed_config"]["rds"]["config_source"]["initial_fetch_timeout"] =
        json!("0.1s");
    all[0]["name"] = json!("never");
    all[0]["filter_chains"][0]["filters"][0]["typed_config"]["rds"]["route_config_name"] =
        json!("never");
    files.respond("lds.yaml", "l3", &all);
    let never = at(&proxy, "never").await;
    assert_eq!(Client::get(never, "/").await.status, 404);
}
