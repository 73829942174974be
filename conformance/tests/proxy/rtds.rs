//! The runtime: layers that are written, set by the admin, and come from elsewhere (RTDS), and what they change under requests.

use super::{
    ads::{BOTH, cluster, edge},
    ads_server::AdsServer,
    api_sources::{by, leads_to, written},
    dynamic::{Files, address, any_port, at, endpoints, listener, routes_to, served_by, typed},
};
use http::Method;
use outrigger_conformance::harness::{
    Client, ProxyBuilder, TestProxy, Upstream, Version, eventually, request,
};
use outrigger_xds::{
    load::{self, Syntax},
    resource::runtime::RuntimeLayer,
    subscription::Protocol,
};
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Instant};

const RUNTIME: &str = "envoy.service.runtime.v3.Runtime";

fn runtime(name: &str, layer: &Value) -> Value {
    typed(RUNTIME, json!({ "name": name, "layer": layer }))
}

fn ads() -> Value {
    json!({ "ads": {}, "resource_api_version": "V3" })
}

fn rtds(name: &str, source: &Value) -> Value {
    json!({ "name": format!("layer of {name}"), "rtds_layer": { "name": name, "rtds_config": source } })
}

fn layers(layers: &[Value]) -> Vec<RuntimeLayer> {
    let all = json!({ "layered_runtime": { "layers": layers } });
    load::bootstrap(&all.to_string(), Syntax::Json)
        .unwrap()
        .runtime
}

/// A listener that answers `new` to the share of `split`, by default none, and else `old`.
fn split() -> Value {
    let answer = |text: &str| json!({ "status": 200, "body": { "inline_string": text } });
    let share = json!({ "default_value": { "numerator": 0 }, "runtime_key": "split" });
    let routes = json!([
        { "match": { "prefix": "/", "runtime_fraction": share }, "direct_response": answer("new") },
        { "match": { "prefix": "/" }, "direct_response": answer("old") },
    ]);
    let table = json!({ "name": "t", "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": routes }] });
    listener("split", any_port(), json!({ "route_config": table }))
}

/// A proxy with these static listeners and layers, and `control` for ADS.
fn start(
    listeners: &[Value],
    runtime: &[Value],
    control: Option<(&AdsServer, Protocol)>,
) -> TestProxy {
    let clusters = control.map(|(control, _)| leads_to("control", &address(control.address)));
    let clusters: Vec<Value> = clusters.into_iter().collect();
    let read = written(listeners, &clusters, &json!({}));
    let ads = control.map(|(control, protocol)| control.as_configured(protocol));
    let runtime = layers(runtime);
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            bootstrap.listeners.extend(read.listeners);
            bootstrap.clusters.extend(read.clusters);
            bootstrap.ads = ads;
            bootstrap.runtime = runtime;
        })
        .start()
}

async fn answered(place: SocketAddr, text: &str) {
    eventually(text, || async {
        (Client::get(place, "/x").await.text() == text).then_some(())
    })
    .await;
}

async fn modify(proxy: &TestProxy, query: &str) -> (u16, String) {
    let mut client = Client::connect(proxy.admin(), Version::H1).await;
    let path = format!("/runtime_modify{query}");
    let reply = client.send(request(Method::POST, &path, "")).await;
    (reply.status.as_u16(), reply.text())
}

/// What `/runtime` says of a key: all layers, and what counts.
async fn shown(proxy: &TestProxy, key: &str) -> Value {
    let shown = Client::get(proxy.admin(), "/runtime").await.json();
    shown["entries"][key].clone()
}

fn refusal(request: &Value) -> bool {
    request["type"] == "Runtime" && !request["error"].is_null()
}

#[tokio::test]
async fn a_layer_comes_changes_is_refused_and_goes() {
    for protocol in BOTH {
        let control = AdsServer::start();
        control.mute(true);
        let name = format!("rt-{protocol:?}");
        let layers = [
            json!({ "name": "base", "static_layer": { "split": 0, "kept": "1" } }),
            rtds(&name, &ads()),
        ];
        let proxy = start(&[split()], &layers, Some((&control, protocol)));
        control
            .hears("it is asked for", |request| {
                request["names"] == json!([name])
            })
            .await;
        // Nothing is decided before its shares are known.
        assert_eq!(proxy.proxy.address("split"), None);
        let ready = Client::get(proxy.admin(), "/ready").await.text();
        assert_eq!(ready, "INITIALIZING\n");
        control.mute(false);
        control.put(&[runtime(&name, &json!({ "split": 100 }))]);
        let place = at(&proxy, "split").await;
        answered(place, "new").await;
        let mut client = Client::connect(place, Version::H1).await;
        let get = || request(Method::GET, "/x", "");
        assert_eq!(client.send(get()).await.text(), "new");
        control.put(&[runtime(&name, &json!({ "split": { "numerator": 0 } }))]);
        answered(place, "old").await;
        assert_eq!(
            client.send(get()).await.text(),
            "old",
            "on the connection that is open"
        );

        control.forget();
        let bad = json!({ "split": 100, "a": { "b": [1] } });
        control.put(&[runtime(&name, &bad)]);
        let heard = control.hears("it is refused", refusal).await;
        let why = heard["error"].as_str().unwrap();
        let expected = "layer: Invalid runtime entry value for a.b";
        assert!(why.contains(&name) && why.contains(expected), "{why}");
        assert_eq!(
            client.send(get()).await.text(),
            "old",
            "what was good stays"
        );

        control.put(&[runtime(
            &name,
            &json!({ "split": "100", "more": { "deep": true } }),
        )]);
        answered(place, "new").await;
        let deep = json!({ "layer_values": ["", "true"], "final_value": "true" });
        assert_eq!(shown(&proxy, "more.deep").await, deep);
        // The state of the world has no words for it.
        if protocol == Protocol::Delta {
            control.remove(RUNTIME, &name);
            answered(place, "old").await;
            assert_eq!(shown(&proxy, "more.deep").await, Value::Null);
            let kept = json!({ "layer_values": ["1", ""], "final_value": "1" });
            assert_eq!(shown(&proxy, "kept").await, kept);
        }
        assert!(proxy.metric("envoy_runtime_update_success", "").await >= 2.0);
        assert!(proxy.metric("envoy_runtime_update_rejected", "").await >= 1.0);
    }
}

#[tokio::test]
async fn clusters_are_asked_for_when_the_runtime_is_there_or_given_up() {
    for protocol in BOTH {
        for answers in [true, false] {
            let backend = Upstream::named("backend").await;
            let control = AdsServer::start();
            control.mute(true);
            control.put(&[
                cluster("backend"),
                endpoints("backend", &[backend.address]),
                edge(),
                routes_to("table", "backend"),
            ]);
            let mut source = ads();
            source["initial_fetch_timeout"] = json!(if answers { "0s" } else { "0.4s" });
            let layers = layers(&[rtds("order", &source)]);
            let ads = control.as_configured(protocol);
            let begun = Instant::now();
            let proxy = driven_with(ads, layers);
            control
                .hears("the runtime is asked for", |request| {
                    request["type"] == "Runtime"
                })
                .await;
            let only = control
                .heard()
                .iter()
                .all(|request| request["type"] == "Runtime");
            assert!(only, "and nothing else: {:#?}", control.heard());
            if answers {
                control.mute(false);
                control.put(&[runtime("order", &json!({}))]);
            } else {
                control
                    .hears("it goes on without", |request| request["type"] == "Cluster")
                    .await;
                assert!(begun.elapsed().as_millis() >= 400);
                control.mute(false);
                control.put(&[cluster("backend")]);
            }
            served_by(at(&proxy, "edge").await, "backend").await;
        }
    }
}

fn driven_with(ads: outrigger_xds::resource::ads::Ads, layers: Vec<RuntimeLayer>) -> TestProxy {
    ProxyBuilder::new()
        .edit(move |bootstrap| {
            bootstrap.ads = Some(ads);
            bootstrap.lds = Some(super::ads_server::from_ads());
            bootstrap.cds = Some(super::ads_server::from_ads());
            bootstrap.runtime = layers;
        })
        .start()
}

#[tokio::test]
async fn it_outlives_its_server_and_follows_it_when_it_is_back() {
    for protocol in BOTH {
        let mut control = AdsServer::start();
        let name = format!("outliving-{protocol:?}");
        control.put(&[runtime(&name, &json!({ "split": 100 }))]);
        let layers = [rtds(&name, &by(protocol, "control"))];
        let proxy = start(&[split()], &layers, Some((&control, protocol)));
        let place = at(&proxy, "split").await;
        answered(place, "new").await;
        control
            .hears("by its service", |it| it["service"] == "rtds")
            .await;
        control.kill();
        answered(place, "new").await;
        control.put(&[runtime(&name, &json!({ "split": 0 }))]);
        control.revive().await;
        answered(place, "old").await;
    }
}

#[tokio::test]
async fn a_file_may_hold_a_layer() {
    let files = Files::new();
    files.respond(
        "rtds.yaml",
        "1",
        &[runtime("file", &json!({ "split": 100 }))],
    );
    let layers = [rtds("file", &files.config_source("rtds.yaml"))];
    let proxy = start(&[split()], &layers, None);
    let place = at(&proxy, "split").await;
    answered(place, "new").await;
    files.respond(
        "rtds.yaml",
        "2",
        &[runtime("file", &json!({ "split": [] }))],
    );
    eventually("it is refused", || async {
        let rejected = proxy.metric("envoy_runtime_update_rejected", "").await;
        (rejected >= 1.0).then_some(())
    })
    .await;
    assert_eq!(Client::get(place, "/x").await.text(), "new");
    files.respond("rtds.yaml", "3", &[runtime("file", &json!({ "split": 0 }))]);
    answered(place, "old").await;
}

#[tokio::test]
async fn the_admin_overrides_and_a_push_keeps_that() {
    let layers = [
        json!({ "name": "base", "static_layer": { "split": 100 } }),
        json!({ "name": "adm", "admin_layer": {} }),
    ];
    let proxy = start(&[split()], &layers, None);
    let place = at(&proxy, "split").await;
    answered(place, "new").await;
    assert_eq!(
        modify(&proxy, "?split=0&x=%20y").await,
        (200, "OK\n".into())
    );
    answered(place, "old").await;
    let expected = json!({ "layer_values": ["100", "0"], "final_value": "0" });
    assert_eq!(shown(&proxy, "split").await, expected);
    assert_eq!(shown(&proxy, "x").await["final_value"], " y");
    let mut pushed = proxy.bootstrap.clone();
    pushed.runtime = self::layers(&[
        json!({ "name": "base", "static_layer": { "split": 50 } }),
        json!({ "name": "adm", "admin_layer": {} }),
    ]);
    proxy.proxy.apply(pushed).unwrap();
    assert_eq!(Client::get(place, "/x").await.text(), "old");
    let expected = json!({ "layer_values": ["50", "0"], "final_value": "0" });
    assert_eq!(shown(&proxy, "split").await, expected);
    assert_eq!(modify(&proxy, "?split=").await.0, 200);
    assert_eq!(shown(&proxy, "split").await["final_value"], "50");
    let (status, usage) = modify(&proxy, "").await;
    assert!(
        status == 400 && usage.starts_with("usage: /runtime_modify?"),
        "{usage}"
    );
    let get = Client::get(proxy.admin(), "/runtime_modify?split=1").await;
    assert_eq!(get.status, 405);

    // Without its layer there is nothing to set.
    let fixed = [json!({ "name": "base", "static_layer": {} })];
    let proxy = start(&[split()], &fixed, None);
    let refused = (503, "No admin layer specified".to_owned());
    assert_eq!(modify(&proxy, "?a=1").await, refused);
    // Where nothing is written, it is there.
    let proxy = start(&[split()], &[], None);
    let place = at(&proxy, "split").await;
    assert_eq!(modify(&proxy, "?split=100").await.0, 200);
    answered(place, "new").await;
}

/// Filters, copies and logs read keys, too.
#[tokio::test]
async fn filters_copies_and_logs_follow_their_keys() {
    let (one, copies) = (
        Upstream::named("one").await,
        Upstream::named("copies").await,
    );
    let limit = typed(
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        json!({
            "stat_prefix": "runtime",
            "token_bucket": { "max_tokens": 1, "fill_interval": "3600s" },
            "filter_enabled": { "default_value": { "numerator": 100 }, "runtime_key": "limit.on" },
            "filter_enforced": { "default_value": { "numerator": 0 }, "runtime_key": "limit.for_sure" },
        }),
    );
    let router = typed("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let log = super::dynamic::Files::new();
    let path = log.path("log");
    let file = typed(
        "envoy.extensions.access_loggers.file.v3.FileAccessLog",
        json!({ "path": path, "log_format": { "text_format_source": { "inline_string": "%REQ(:PATH)%\n" } } }),
    );
    let from = json!({ "default_value": 600, "runtime_key": "log.from" });
    let filter = json!({ "status_code_filter": { "comparison": { "op": "GE", "value": from } } });
    let share = json!({ "default_value": { "numerator": 0 }, "runtime_key": "copies" });
    let mirror = json!([{ "cluster": "copies", "runtime_fraction": share }]);
    let mut table = routes_to("t", "one");
    table.as_object_mut().unwrap().remove("@type");
    table["virtual_hosts"][0]["routes"][0]["route"]["request_mirror_policies"] = mirror;
    let manager = json!({
        "route_config": table,
        "http_filters": [
            { "name": "limit", "typed_config": limit },
            { "name": "router", "typed_config": router },
        ],
        "access_log": [{ "name": "log", "filter": filter, "typed_config": file }],
    });
    let clusters = [
        leads_to("one", &address(one.address)),
        leads_to("copies", &address(copies.address)),
    ];
    let read = written(
        &[listener("edge", any_port(), manager)],
        &clusters,
        &json!({}),
    );
    let proxy = ProxyBuilder::new()
        .edit(move |bootstrap| {
            bootstrap.listeners.extend(read.listeners);
            bootstrap.clusters.extend(read.clusters);
        })
        .start();
    let place = at(&proxy, "edge").await;
    let status = async |path: &'static str| Client::get(place, path).await.status.as_u16();
    assert_eq!([status("/a").await, status("/b").await], [200, 200]);
    assert!(copies.exchanges().is_empty());
    let changes = "?limit.for_sure=100&copies=100&log.from=200";
    assert_eq!(modify(&proxy, changes).await.0, 200);
    assert_eq!(status("/c").await, 429);
    assert_eq!(modify(&proxy, "?limit.on=0").await.0, 200);
    assert_eq!(status("/d").await, 200);
    eventually("a copy has come", || async {
        (copies.exchanges().len() == 1).then_some(())
    })
    .await;
    eventually("what is wanted is logged", || async {
        let logged = std::fs::read_to_string(&path).unwrap_or_default();
        (logged == "/c\n/d\n").then_some(())
    })
    .await;
}
