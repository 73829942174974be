//! Configurations of filters that come from elsewhere (`config_discovery`): over ADS and services of their own, from files;
//! refused, missing, removed, late.

use super::{
    ads::{BOTH, driven},
    ads_server::AdsServer,
    api_sources::{by, leads_to, written},
    dynamic::{Files, address, any_port, at, dump, listener, routes_to, table, typed},
};
use outrigger_conformance::harness::{
    Client, ProxyBuilder, Reply, TestProxy, Upstream, Version, eventually, request,
};
use outrigger_xds::subscription::Protocol;
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Instant};
use tokio::sync::watch;

const EXTENSION: &str = "envoy.config.core.v3.TypedExtensionConfig";
const MUTATION: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";
const CORS: &str = "envoy.extensions.filters.http.cors.v3.Cors";

/// The configuration of a filter that marks responses.
fn marking(mark: &str) -> Value {
    let header = json!({ "header": { "key": "x-mark", "value": mark } });
    typed(
        MUTATION,
        json!({ "mutations": { "response_mutations": [{ "append": header }] } }),
    )
}

fn extension(name: &str, config: &Value) -> Value {
    typed(EXTENSION, json!({ "name": name, "typed_config": config }))
}

/// A filter whose configuration comes from `source`, which has these further fields.
fn discovered(name: &str, source: &Value, more: Value) -> Value {
    let mut discovery = json!({
        "config_source": source,
        "type_urls": [format!("type.googleapis.com/{MUTATION}")],
    });
    let Value::Object(more) = more else {
        panic!("{more} has no fields");
    };
    for (field, value) in more {
        discovery[field] = value;
    }
    json!({ "name": name, "config_discovery": discovery })
}

fn router() -> Value {
    let config = typed("envoy.extensions.filters.http.router.v3.Router", json!({}));
    json!({ "name": "router", "typed_config": config })
}

/// A listener with this filter, whose requests go to `backend`.
fn edge(filter: &Value) -> Value {
    let mut table = routes_to("inline", "backend");
    table.as_object_mut().unwrap().remove("@type");
    let manager = json!({ "route_config": table, "http_filters": [filter, router()] });
    listener("edge", any_port(), manager)
}

fn ads() -> Value {
    json!({ "ads": {}, "resource_api_version": "V3" })
}

/// A proxy with this listener, `backend` at `server`, and `control` for ADS.
fn start(
    listener: &Value,
    server: SocketAddr,
    control: Option<(&AdsServer, Protocol)>,
) -> TestProxy {
    let mut clusters = vec![leads_to("backend", &address(server))];
    clusters.extend(control.map(|(control, _)| leads_to("control", &address(control.address))));
    let read = written(std::slice::from_ref(listener), &clusters, &json!({}));
    let ads = control.map(|(control, protocol)| control.as_configured(protocol));
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            bootstrap.listeners.extend(read.listeners);
            bootstrap.clusters.extend(read.clusters);
            bootstrap.ads = ads;
        })
        .start()
}

async fn marked(place: SocketAddr, mark: &str) {
    eventually(mark, || async {
        let reply = Client::get(place, "/x").await;
        (reply.status == 200 && reply.header("x-mark") == mark).then_some(())
    })
    .await;
}

async fn missing(place: SocketAddr) -> Reply {
    eventually("the filter is missing", || async {
        let reply = Client::get(place, "/x").await;
        (reply.status == 500).then_some(reply)
    })
    .await
}

/// What `/config_dump` has of a filter's configuration.
async fn dumped(proxy: &TestProxy, name: &str) -> Value {
    let section = dump(proxy.admin(), "EcdsConfigDump").await;
    let filters = section["ecds_filters"].as_array().unwrap().clone();
    let found = filters
        .into_iter()
        .find(|it| it["name"] == *name || it["ecds_filter"]["name"] == *name);
    found.unwrap_or_else(|| panic!("{section:#}"))
}

fn refusal(request: &Value) -> bool {
    request["type"] == "TypedExtensionConfig" && !request["error"].is_null()
}

/// An upstream whose stream goes on until it is told to end.
async fn streaming(end: watch::Receiver<bool>) -> Upstream {
    Upstream::start(move |mut conn, request| {
        let mut end = end.clone();
        async move {
            if request.path() != "/stream" {
                let answered = conn.json("200 OK", "{}").await;
                return answered.then_some(conn);
            }
            conn.begin_events().await;
            conn.event("first").await;
            let _ = end.wait_for(|end| *end).await;
            conn.event("last").await;
            conn.end().await.then_some(conn)
        }
    })
    .await
}

/// What is no configuration of such a filter, and what is one of another, is refused by field, and shown.
async fn refused(control: &AdsServer, proxy: &TestProxy, name: &str) {
    let wrong = typed(
        MUTATION,
        json!({ "mutations": { "request_mutations": [{ "append": {} }] } }),
    );
    let cases = [
        (wrong, "header"),
        (
            typed(CORS, json!({})),
            "typed_config: filter config has type URL",
        ),
    ];
    for (bad, field) in cases {
        control.forget();
        control.put(&[extension(name, &bad)]);
        let heard = control.hears("it is refused", refusal).await;
        let why = heard["error"].as_str().unwrap();
        assert!(why.contains(name) && why.contains(field), "{why}");
        let shown = dumped(proxy, name).await;
        assert_eq!(shown["client_status"], "NACKED", "{shown:#}");
        let details = shown["error_state"]["details"].as_str().unwrap();
        assert!(details.contains(field), "{details}");
    }
}

#[tokio::test]
async fn it_comes_changes_under_a_stream_is_refused_and_goes() {
    for protocol in BOTH {
        let name = format!("mark-{protocol:?}");
        let (end, ends) = watch::channel(false);
        let backend = streaming(ends).await;
        let control = AdsServer::start();
        control.mute(true);
        let edge = edge(&discovered(&name, &ads(), json!({})));
        let proxy = start(&edge, backend.address, Some((&control, protocol)));
        // The listener waits for it.
        control
            .hears("it is asked for", |request| {
                request["names"] == json!([name])
            })
            .await;
        assert_eq!(proxy.proxy.address("edge"), None);
        assert_eq!(dumped(&proxy, &name).await["client_status"], "REQUESTED");
        control.mute(false);
        control.put(&[extension(&name, &marking("one"))]);
        let place = at(&proxy, "edge").await;
        marked(place, "one").await;
        let mut client = Client::connect(place, Version::H1).await;
        let get = request(http::Method::GET, "/stream", "");
        let mut stream = client.begin(get).await;
        stream.until("first").await;
        control.put(&[extension(&name, &marking("two"))]);
        marked(place, "two").await;
        assert!(control.heard().iter().all(|heard| heard["error"].is_null()));

        refused(&control, &proxy, &name).await;
        assert_eq!(Client::get(place, "/x").await.header("x-mark"), "two");
        control.put(&[extension(&name, &marking("three"))]);
        marked(place, "three").await;
        assert_eq!(dumped(&proxy, &name).await["client_status"], "ACKED");
        let metric = async |of: &str| {
            let metric = format!("envoy_extension_config_discovery_http_filter_{of}");
            proxy.metric(&metric, &name).await
        };
        assert!(metric("config_reload").await >= 3.0);
        assert!(metric("config_fail").await >= 2.0 && metric("update_rejected").await >= 2.0);

        // The state of the world has no words for it.
        if protocol == Protocol::Delta {
            control.remove(EXTENSION, &name);
            let reply = missing(place).await;
            assert_eq!(reply.text(), "");
            control.put(&[extension(&name, &marking("four"))]);
            marked(place, "four").await;
        }
        end.send_replace(true);
        let whole = stream.whole().await;
        assert!(whole.text().contains("last"), "the stream went on");
        assert!(!client.is_closed(), "its connection, too");
    }
}

#[tokio::test]
async fn a_server_that_is_silent_is_waited_for_as_long_as_is_said() {
    for protocol in BOTH {
        let backend = Upstream::named("backend").await;
        let control = AdsServer::start();
        control.mute(true);
        let mut patient = ads();
        patient["initial_fetch_timeout"] = json!("0.4s");
        let default = json!({ "default_config": marking("default") });
        let mut at_once = default.clone();
        at_once["apply_default_config_without_warming"] = json!(true);
        let cases = [
            (json!({}), None, true),
            (default, Some("default"), true),
            (at_once, Some("default"), false),
        ];
        for (index, (more, expected, waits)) in cases.into_iter().enumerate() {
            let name = format!("silent-{protocol:?}-{index}");
            let edge = edge(&discovered(&name, &patient, more));
            let begun = Instant::now();
            let proxy = start(&edge, backend.address, Some((&control, protocol)));
            assert_eq!(proxy.proxy.address("edge").is_none(), waits, "{index}");
            let place = at(&proxy, "edge").await;
            assert!(!waits || begun.elapsed().as_millis() >= 400, "{index}");
            match expected {
                Some(mark) => marked(place, mark).await,
                None => drop(missing(place).await),
            }
            if waits {
                let late = "envoy_extension_config_discovery_http_filter_init_fetch_timeout";
                assert!(proxy.metric(late, &name).await >= 1.0);
            }
            // Late is not never.
            control.mute(false);
            control.put(&[extension(&name, &marking("late"))]);
            marked(place, "late").await;
            if expected.is_some() && protocol == Protocol::Delta {
                control.remove(EXTENSION, &name);
                marked(place, "default").await;
            }
            control.mute(true);
        }
    }
}

#[tokio::test]
async fn a_first_one_that_is_refused_is_not_waited_for() {
    for protocol in BOTH {
        let backend = Upstream::named("backend").await;
        let control = AdsServer::start();
        let name = format!("refused-{protocol:?}");
        control.put(&[extension(&name, &typed(CORS, json!({})))]);
        let edge = edge(&discovered(&name, &ads(), json!({})));
        let proxy = start(&edge, backend.address, Some((&control, protocol)));
        let heard = control.hears("it is refused", refusal).await;
        let why = heard["error"].as_str().unwrap();
        assert!(why.contains(&format!("but expect {MUTATION}")), "{why}");
        let place = at(&proxy, "edge").await;
        let reply = missing(place).await;
        assert_eq!(
            (reply.status, reply.text()),
            (http::StatusCode::INTERNAL_SERVER_ERROR, String::new())
        );
        assert!(backend.exchanges().is_empty());
        control.put(&[extension(&name, &marking("good"))]);
        marked(place, "good").await;
    }
}

#[tokio::test]
async fn it_outlives_its_server_and_follows_it_when_it_is_back() {
    for protocol in BOTH {
        let backend = Upstream::named("backend").await;
        let mut control = AdsServer::start();
        let name = format!("outliving-{protocol:?}");
        control.put(&[extension(&name, &marking("one"))]);
        let source = by(protocol, "control");
        let edge = edge(&discovered(&name, &source, json!({})));
        let proxy = start(&edge, backend.address, Some((&control, protocol)));
        let place = at(&proxy, "edge").await;
        marked(place, "one").await;
        let heard = control
            .hears("by its service", |it| it["service"] == "ecds")
            .await;
        assert_eq!(heard["names"], json!([name]));
        control.kill();
        let connected =
            "envoy_extension_config_discovery_http_filter_control_plane_connected_state";
        eventually("it is told that the server is gone", || async {
            (proxy.metric(connected, &name).await < 0.5).then_some(())
        })
        .await;
        marked(place, "one").await;
        control.put(&[extension(&name, &marking("two"))]);
        control.revive().await;
        marked(place, "two").await;
    }
}

/// Filters of our own alike, and from a file.
#[tokio::test]
async fn a_file_may_hold_configurations_of_our_own_filters() {
    let (files, backend) = (Files::new(), Upstream::named("backend").await);
    let api = "type.googleapis.com/outrigger.filters.http.engine_api.v1.Config";
    let ours = |value: Value| {
        let config = typed(
            "xds.type.v3.TypedStruct",
            json!({ "type_url": api, "value": value }),
        );
        extension("api", &config)
    };
    files.respond("ecds.yaml", "1", &[ours(json!({ "fleet_answers": true }))]);
    let source = files.config_source("ecds.yaml");
    let filter = discovered("api", &source, json!({ "type_urls": [api] }));
    let proxy = start(&edge(&filter), backend.address, None);
    let place = at(&proxy, "edge").await;
    let status = async |path: &str| Client::get(place, path).await.status;
    assert_eq!(status("/flush_cache").await, 403, "closed by it");
    let shown = dumped(&proxy, "api").await;
    assert_eq!(shown["ecds_filter"]["typed_config"]["type_url"], api);
    assert_eq!(shown["version_info"], "1");
    files.respond("ecds.yaml", "2", &[ours(json!({ "bogus": 1 }))]);
    eventually("it is refused", || async {
        let shown = dumped(&proxy, "api").await;
        let details = shown["error_state"]["details"].as_str()?.to_owned();
        details.contains("bogus").then_some(())
    })
    .await;
    assert_eq!(status("/flush_cache").await, 403, "what was good stays");
}

#[tokio::test]
async fn a_request_without_a_route_does_not_get_past_it_either() {
    let backend = Upstream::named("backend").await;
    let control = AdsServer::start();
    let mut source = ads();
    source["initial_fetch_timeout"] = json!("0.1s");
    let mut table = table("inline", json!({ "route": { "cluster": "backend" } }));
    table["virtual_hosts"][0]["domains"] = json!(["elsewhere"]);
    let filters = json!([discovered("none", &source, json!({})), router()]);
    let manager = json!({ "route_config": table, "http_filters": filters });
    let edge = listener("edge", any_port(), manager);
    let proxy = start(&edge, backend.address, Some((&control, Protocol::State)));
    missing(at(&proxy, "edge").await).await;
}

#[test]
fn what_can_never_be_is_refused_at_once() {
    let file = json!({ "path_config_source": { "path": "/dev/null" } });
    let at = std::net::SocketAddr::from(([127, 0, 0, 1], 9));
    let errors = |filters: Value| {
        let mut listener = edge(&router());
        let http = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
        http["http_filters"] = filters;
        listener.as_object_mut().unwrap().remove("@type");
        let mut backend = leads_to("backend", &address(at));
        backend.as_object_mut().unwrap().remove("@type");
        let all = json!({ "static_resources": { "listeners": [listener], "clusters": [backend] } });
        outrigger_xds::load::bootstrap(&all.to_string(), outrigger_xds::load::Syntax::Json)
            .map_err(|errors| errors.to_string())
    };
    let router_url = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let wrong = [
        (
            json!([discovered("a", &file, json!({ "type_urls": [] })), router()]),
            "type_urls",
        ),
        (
            json!([
                discovered(
                    "a",
                    &file,
                    json!({ "default_config": typed(CORS, json!({})) })
                ),
                router()
            ]),
            "but expect envoy.extensions.filters.http.header_mutation",
        ),
        (
            json!([
                discovered(
                    "a",
                    &file,
                    json!({ "apply_default_config_without_warming": true })
                ),
                router()
            ]),
            "apply_default_config_without_warming",
        ),
        (
            json!([
                discovered("a", &file, json!({ "type_urls": [router_url] })),
                router()
            ]),
            "must be the last",
        ),
        (
            json!([router(), discovered("a", &file, json!({}))]),
            "is the last filter of the chain",
        ),
    ];
    for (filters, expected) in wrong {
        let error = errors(filters).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    // The router itself may come so.
    let last = discovered("a", &file, json!({ "type_urls": [router_url] }));
    errors(json!([last])).unwrap();
}

/// A listener that comes by LDS and names what nobody has.
#[tokio::test]
async fn a_type_that_nobody_has_is_refused_with_its_listener() {
    for protocol in BOTH {
        let control = AdsServer::start();
        let at = SocketAddr::from(([127, 0, 0, 1], 9));
        let backend = leads_to("backend", &address(at));
        control.put(&[typed("envoy.config.cluster.v3.Cluster", backend)]);
        let unknown = json!({ "type_urls": ["type.googleapis.com/x.Y"] });
        control.put(&[edge(&discovered("a", &ads(), unknown))]);
        let _proxy = driven(control.as_configured(protocol));
        let refused = control.hears("it is refused", |request| {
            request["type"] == "Listener" && !request["error"].is_null()
        });
        let why = refused.await["error"].as_str().unwrap().to_owned();
        let expected =
            "http_filters[a].config_discovery.type_urls: no factory found for a required type URL";
        assert!(why.contains("'edge': ") && why.contains(expected), "{why}");
    }
}
