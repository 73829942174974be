//! A proxy that our control plane drives from a directory: from a cold start over changes to removals, and through kill -9.

use super::{PROGRAM, any_port};
use outrigger_conformance::harness::{
    Client, ControlPlane, Process, Upstream, driven_bootstrap, eventually, scratch,
};
use serde_json::{Value, json};
use std::{fs, net::SocketAddr, path::PathBuf};

const BOTH: [&str; 2] = ["GRPC", "DELTA_GRPC"];

pub(super) fn typed(message: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("type.googleapis.com/{message}"));
    fields
}

fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

pub(super) fn ads() -> Value {
    json!({ "ads": {}, "resource_api_version": "V3" })
}

/// A stream of its own for each type.
fn service(api_type: &str) -> Value {
    json!({
        "api_config_source": {
            "api_type": api_type,
            "transport_api_version": "V3",
            "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds" } }],
        },
        "resource_api_version": "V3",
    })
}

pub(super) fn cluster(name: &str) -> Value {
    cluster_by(&ads(), name)
}

fn cluster_by(source: &Value, name: &str) -> Value {
    typed(
        "envoy.config.cluster.v3.Cluster",
        json!({ "name": name, "type": "EDS", "eds_cluster_config": { "eds_config": source } }),
    )
}

pub(super) fn endpoints(cluster: &str, server: SocketAddr) -> Value {
    typed(
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        json!({
            "cluster_name": cluster,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(server) } }] }],
        }),
    )
}

/// A listener whose connection manager has these fields, on a port of its own.
pub(super) fn listener(name: &str, filters: &[Value], routes: Value) -> Value {
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

pub(super) fn routes_to(cluster: &str) -> Value {
    let routes = table("table", json!({ "route": { "cluster": cluster } }));
    typed("envoy.config.route.v3.RouteConfiguration", routes)
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
        Self::by(&ads(), api_type, upstream).await
    }

    /// All comes from this source.
    async fn by(source: &Value, api_type: &str, upstream: &Upstream) -> Self {
        Self::with(source, api_type, upstream, (&[], &json!([]))).await
    }

    /// The same, with further resources, and these layers of the runtime in the bootstrap.
    async fn with(
        source: &Value,
        api_type: &str,
        upstream: &Upstream,
        (more, layers): (&[Value], &Value),
    ) -> Self {
        let directory = scratch("resources");
        fs::create_dir_all(&directory).unwrap();
        let rds = json!({ "config_source": source, "route_config_name": "table" });
        put(
            &directory,
            "clusters.yaml",
            &[cluster_by(source, "backend")],
        );
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
        put(&directory, "more.yaml", more);
        let control = ControlPlane::start(PROGRAM, directory.to_str().unwrap(), any_port()).await;
        let config = scratch("bootstrap.json");
        let mut bootstrap = driven_bootstrap(control.address, "node");
        bootstrap["layered_runtime"] = json!({ "layers": layers });
        let dynamic = &mut bootstrap["dynamic_resources"];
        dynamic["ads_config"]["api_type"] = json!(api_type);
        if *source != ads() {
            *dynamic = json!({ "lds_config": source, "cds_config": source });
        }
        fs::write(&config, bootstrap.to_string()).unwrap();
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

    /// Everything was taken as it was sent.
    async fn has_all(&self) {
        for kind in [
            "Cluster",
            "ClusterLoadAssignment",
            "Listener",
            "RouteConfiguration",
        ] {
            self.has(kind, "SYNCED").await;
        }
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
pub(super) fn put(directory: &std::path::Path, name: &str, resources: &[Value]) {
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
        driven.has_all().await;
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

/// A filter that marks responses, and a share of requests that are answered at once.
fn further(mark: &str, share: u32) -> Vec<Value> {
    const MUTATION: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";
    let append = json!({ "append": { "header": { "key": "x-mark", "value": mark } } });
    let config = typed(
        MUTATION,
        json!({ "mutations": { "response_mutations": [append] } }),
    );
    let extension = typed(
        "envoy.config.core.v3.TypedExtensionConfig",
        json!({ "name": "mark", "typed_config": config }),
    );
    let layer = typed(
        "envoy.service.runtime.v3.Runtime",
        json!({ "name": "rt", "layer": { "early": share } }),
    );
    let discovery = json!({
        "config_source": ads(),
        "type_urls": [format!("type.googleapis.com/{MUTATION}")],
    });
    let mark = json!({ "name": "mark", "config_discovery": discovery });
    let early = json!({ "default_value": { "numerator": 0 }, "runtime_key": "early" });
    let early = json!({
        "match": { "prefix": "/", "runtime_fraction": early },
        "direct_response": { "status": 200, "body": { "inline_string": "early" } },
    });
    let mut marked = table("t", json!({ "route": { "cluster": "backend" } }));
    let routes = marked["virtual_hosts"][0]["routes"].as_array_mut().unwrap();
    routes.insert(0, early);
    let listener = listener("marked", &[mark], json!({ "route_config": marked }));
    vec![extension, layer, listener]
}

#[tokio::test]
async fn configurations_of_filters_and_layers_of_the_runtime_are_served() {
    for api_type in BOTH {
        let one = Upstream::named("one").await;
        let layer = json!({ "name": "rt", "rtds_config": ads() });
        let layers = json!([{ "name": "layer", "rtds_layer": layer }]);
        let more = further("first", 0);
        let driven = Driven::with(&ads(), api_type, &one, (&more, &layers)).await;
        let at = driven.listener("marked").await;
        let answered = async |mark: &str, text: &str| {
            eventually(mark, || async {
                let reply = Client::get(at, "/").await;
                (reply.header("x-mark") == mark && reply.text().contains(text)).then_some(())
            })
            .await;
        };
        answered("first", "one").await;
        for kind in ["TypedExtensionConfig", "Runtime"] {
            driven.has(kind, "SYNCED").await;
        }
        driven.put("more.yaml", &further("second", 0));
        answered("second", "one").await;
        driven.put("more.yaml", &further("second", 100));
        answered("", "early").await;
        // A listener that needs what is not there is nothing to serve.
        driven.put("more.yaml", &further("third", 0)[1..]);
        eventually("it is said", || async {
            let page = Client::get(driven.control.admin, "/sources").await.text();
            let expected = "names the typed_extension_config 'mark', which does not exist";
            page.contains(expected).then_some(())
        })
        .await;
        answered("", "early").await;
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
        driven.has_all().await;
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
async fn each_type_comes_by_a_service_of_its_own() {
    for api_type in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let mut driven = Driven::by(&service(api_type), api_type, &one).await;
        let edge = driven.listener("edge").await;
        served_by(edge, "one").await;
        let page = Client::get(driven.control.admin, "/clients").await.json();
        let clients = page["clients"].as_array().unwrap();
        let mut services: Vec<_> = clients
            .iter()
            .map(|client| client["service"].as_str().unwrap())
            .collect();
        services.sort_unstable();
        assert_eq!(services, ["cds", "eds", "lds", "rds"], "{page:#}");
        driven.put("endpoints.yaml", &[endpoints("backend", two.address)]);
        served_by(edge, "two").await;
        driven.control.kill().await;
        served_by(edge, "two").await;
        let directory = driven.directory.to_str().unwrap().to_owned();
        let at = driven.control.address;
        driven.control = ControlPlane::start(PROGRAM, &directory, at).await;
        driven.put("endpoints.yaml", &[endpoints("backend", one.address)]);
        served_by(edge, "one").await;
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
