//! A proxy that a control plane drives, in both protocols: from a cold start over changes to removals.

use super::{
    ads_server::{AdsServer, from_ads},
    dynamic::{any_port, at, dump, endpoints, listener, routes_to, served_by, typed},
};
use outrigger_conformance::harness::{Client, ProxyBuilder, TestProxy, Upstream, eventually};
use outrigger_xds::{resource::ads::Ads, subscription::Protocol};
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Duration};

pub(super) const BOTH: [Protocol; 2] = [Protocol::State, Protocol::Delta];

pub(super) fn ads_source() -> Value {
    json!({ "ads": {}, "resource_api_version": "V3" })
}

pub(super) fn cluster(name: &str) -> Value {
    typed(
        "envoy.config.cluster.v3.Cluster",
        json!({
            "name": name,
            "type": "EDS",
            "eds_cluster_config": { "eds_config": ads_source() },
        }),
    )
}

/// A listener whose routes come over RDS.
pub(super) fn edge() -> Value {
    let rds = json!({ "config_source": ads_source(), "route_config_name": "table" });
    listener("edge", any_port(), json!({ "rds": rds }))
}

/// A server that has all types, with `backend` at `server`.
pub(super) fn everything(server: SocketAddr) -> AdsServer {
    let control = AdsServer::start();
    control.put(&[
        cluster("backend"),
        endpoints("backend", &[server]),
        edge(),
        routes_to("table", "backend"),
    ]);
    control
}

pub(super) fn driven(ads: Ads) -> TestProxy {
    ProxyBuilder::new()
        .edit(|bootstrap| {
            bootstrap.ads = Some(ads);
            bootstrap.lds = Some(from_ads());
            bootstrap.cds = Some(from_ads());
        })
        .start()
}

async fn is_ready(proxy: &TestProxy) {
    eventually("it is live", || async {
        (Client::get(proxy.admin(), "/ready").await.status == 200).then_some(())
    })
    .await;
}

fn is_change(heard: &Value, kind: &str) -> bool {
    heard["type"] == kind && heard["error"].is_null()
}

#[tokio::test]
async fn all_types_come_from_a_control_plane_in_the_order_in_which_they_need_each_other() {
    for protocol in BOTH {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let proxy = driven(control.as_configured(protocol));
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        is_ready(&proxy).await;
        let heard = control.heard();
        let mut first = Vec::new();
        for request in &heard {
            let kind = request["type"].as_str().unwrap().to_owned();
            if !first.contains(&kind) {
                first.push(kind);
            }
        }
        let order = [
            "Cluster",
            "ClusterLoadAssignment",
            "Listener",
            "RouteConfiguration",
        ];
        assert_eq!(first, order, "{protocol:?}: {heard:#?}");
        let node = json!([proxy.bootstrap.node.id, "outrigger"]);
        let nodes: Vec<&Value> = heard.iter().map(|request| &request["node"]).collect();
        assert_eq!(*nodes[0], node);
        assert!(nodes[1..].iter().all(|node| node.is_null()), "{heard:#?}");
        // Changes never ride on answers: with names come no answers in what changed, and all are acknowledged.
        for request in &heard {
            assert!(request["error"].is_null(), "{request}");
            let is_answer = request["nonce"] != "";
            let has_names = !request["names"].as_array().unwrap().is_empty();
            assert!(protocol == Protocol::State || !(is_answer && has_names));
        }
        let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
        let backend = &clusters["dynamic_active_clusters"][0];
        assert_eq!(backend["cluster"]["name"], "backend");
        assert_eq!(backend["version_info"], "1");
        assert_eq!(backend["client_status"], "ACKED");
        let routes = dump(proxy.admin(), "RoutesConfigDump").await;
        assert_eq!(routes["dynamic_route_configs"][0]["version_info"], "1");
    }
}

#[tokio::test]
async fn changes_take_effect_and_endpoints_outlive_a_change_of_their_cluster() {
    for protocol in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let control = everything(one.address);
        let proxy = driven(control.as_configured(protocol));
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        control.put(&[endpoints("backend", &[two.address])]);
        served_by(edge, "two").await;
        // The server does not send endpoints again that did not change.
        control.forget();
        let mut other = cluster("backend");
        other["connect_timeout"] = json!("1.5s");
        control.put(&[other]);
        let changed = || async {
            let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
            let active = &clusters["dynamic_active_clusters"][0];
            (active["cluster"]["connect_timeout"] == "1.500s").then_some(())
        };
        eventually("the cluster changed and is no longer warming", changed).await;
        served_by(edge, "two").await;
        // A cluster more, and its name is asked for beside the other.
        control.put(&[
            cluster("second"),
            endpoints("second", &[one.address]),
            routes_to("table", "second"),
        ]);
        served_by(edge, "one").await;
        let asked = |request: &Value| {
            let names = request["names"].as_array().unwrap();
            is_change(request, "ClusterLoadAssignment") && names.contains(&json!("second"))
        };
        control.hears("the new name", asked).await;
        // And one less: nobody asks for its endpoints any more.
        control.remove("envoy.config.cluster.v3.Cluster", "backend");
        let given_up = |request: &Value| match protocol {
            Protocol::State => request["names"] == json!(["second"]),
            Protocol::Delta => request["gone"] == json!(["backend"]),
        };
        control
            .hears("the old name is given up", |request| {
                is_change(request, "ClusterLoadAssignment") && given_up(request)
            })
            .await;
        served_by(edge, "one").await;
        control.remove("envoy.config.listener.v3.Listener", "edge");
        eventually("the listener is gone", || async {
            proxy.proxy.address("edge").is_none().then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn endpoints_that_do_not_exist_are_not_waited_for() {
    let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
    let control = everything(one.address);
    control.put(&[cluster("hollow")]);
    let proxy = driven(control.as_configured(Protocol::Delta));
    // Listeners wait for all clusters, and this one would wait 15 s.
    let edge = at(&proxy, "edge").await;
    served_by(edge, "one").await;
    let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
    let active = clusters["dynamic_active_clusters"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(active, 2, "{clusters:#}");
    // It comes after all. Who serves must tell whether it has come, or it might be removed before it was ever sent.
    control.put(&[
        endpoints("hollow", &[two.address]),
        routes_to("table", "hollow"),
    ]);
    served_by(edge, "two").await;
    // As in Envoy, removing what is in use is not heeded.
    control.remove("envoy.config.endpoint.v3.ClusterLoadAssignment", "hollow");
    control.forget();
    control.put(&[routes_to("table", "hollow")]);
    control
        .hears("both are confirmed", |request| {
            request["type"] == "RouteConfiguration"
        })
        .await;
    served_by(edge, "two").await;
}

#[tokio::test]
async fn a_resource_lives_as_long_as_it_is_said_to() {
    for protocol in BOTH {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let proxy = driven(control.as_configured(protocol));
        at(&proxy, "edge").await;
        control.put_for(
            &listener("brief", any_port(), super::dynamic::answers("brief")),
            Duration::from_millis(900),
        );
        at(&proxy, "brief").await;
        eventually("its life is over", || async {
            proxy.proxy.address("brief").is_none().then_some(())
        })
        .await;
        assert!(proxy.proxy.address("edge").is_some());
    }
}
