//! Resources that come by a control plane's services of one type each (`api_config_source`), in both protocols.

use super::{
    ads::BOTH,
    ads_server::AdsServer,
    dynamic::{
        address, answers, any_port, at, dump, eds_cluster, endpoints, listener, routes_to,
        served_by, typed,
    },
    dynamic_load::Seen,
    dynamic_tls::{certificate, secret},
    tls::{Ca, Pair, TlsClient, der},
};
use outrigger_conformance::harness::{
    Client, ProxyBuilder, TestProxy, Upstream, eventually, scratch,
};
use outrigger_xds::{
    load::{self, Syntax},
    resource::bootstrap::Bootstrap,
    subscription::Protocol,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::SeqCst},
};

/// `ConfigSource` of a service that a cluster leads to.
pub(super) fn by(protocol: Protocol, cluster: &str) -> Value {
    let api_type = match protocol {
        Protocol::State => "GRPC",
        Protocol::Delta => "DELTA_GRPC",
    };
    json!({
        "api_config_source": {
            "api_type": api_type,
            "transport_api_version": "V3",
            "set_node_on_first_message_only": true,
            "grpc_services": [{
                "envoy_grpc": { "cluster_name": cluster },
                "initial_metadata": [{ "key": "x-token", "value": "secret" }],
            }],
        },
        "resource_api_version": "V3",
    })
}

/// The cluster of a control plane.
pub(super) fn leads_to(name: &str, address: &Value) -> Value {
    let endpoint = json!({ "endpoint": { "address": address } });
    json!({
        "name": name,
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] },
    })
}

fn edge(source: &Value) -> Value {
    let rds = json!({ "config_source": source, "route_config_name": "table" });
    listener("edge", any_port(), json!({ "rds": rds }))
}

/// A listener that answers by itself, and whose certificate is a secret.
pub(super) fn secured(name: &str, certificate: &str, source: &Value) -> Value {
    let secret = json!({ "name": certificate, "sds_config": source });
    let context = typed(
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        json!({ "common_tls_context": { "tls_certificate_sds_secret_configs": [secret] } }),
    );
    let mut all = listener(name, any_port(), answers(name));
    all["filter_chains"][0]["transport_socket"] = json!({ "name": "tls", "typed_config": context });
    all
}

/// What a file with these would say.
pub(super) fn written(listeners: &[Value], clusters: &[Value], dynamic: &Value) -> Bootstrap {
    let mut all = json!({
        "static_resources": { "listeners": listeners, "clusters": clusters },
        "dynamic_resources": dynamic,
    });
    for resources in all["static_resources"]
        .as_object_mut()
        .unwrap()
        .values_mut()
    {
        for resource in resources.as_array_mut().unwrap() {
            resource.as_object_mut().unwrap().remove("@type");
        }
    }
    load::bootstrap(&all.to_string(), Syntax::Json).unwrap()
}

fn start(listeners: &[Value], clusters: &[Value], dynamic: &Value) -> TestProxy {
    let read = written(listeners, clusters, dynamic);
    let shown = load::bootstrap_to_json(&read);
    assert_eq!(load::bootstrap_from_value(shown).unwrap(), read);
    ProxyBuilder::new()
        .edit(|bootstrap| {
            bootstrap.listeners.extend(read.listeners);
            bootstrap.clusters.extend(read.clusters);
            (bootstrap.lds, bootstrap.cds) = (read.lds, read.cds);
        })
        .start()
}

pub(super) async fn shows(client: &TlsClient, place: SocketAddr, pair: &Pair) {
    eventually("the certificate is shown", || async {
        let answer = client.get(place, "/x").await?;
        (answer.leaf == der(pair)).then_some(())
    })
    .await;
}

fn services(control: &AdsServer) -> BTreeSet<String> {
    let heard = control.heard();
    let services = heard.iter().map(|request| request["service"].as_str());
    services.map(|name| name.unwrap().to_owned()).collect()
}

/// Connects anew for each request until it is over, and counts what was answered.
async fn load(client: Arc<TlsClient>, place: SocketAddr, seen: Arc<Seen>) {
    while !seen.over.load(SeqCst) {
        let answer = client.get(place, "/x").await.expect("an answer");
        assert_eq!(answer.status, 200);
        seen.good.fetch_add(1, SeqCst);
    }
}

async fn many_more(seen: &Seen) {
    let enough = seen.good.load(SeqCst) + 30;
    eventually("requests are answered", || async {
        (seen.good.load(SeqCst) > enough).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_certificate_comes_by_a_socket_and_is_rotated_under_load() {
    for protocol in BOTH {
        let (ca, path) = (Ca::new(), scratch("sds.sock"));
        let name = format!("rotated-{protocol:?}");
        let pairs: Vec<Pair> = (0..5).map(|_| ca.pair(&["proxy.test"])).collect();
        let control = AdsServer::also_at(Some(path.clone()));
        control.put(&[secret(&name, certificate(&pairs[0]))]);
        let source = by(protocol, "sds-grpc");
        let proxy = start(
            &[secured("edge", &name, &source)],
            &[leads_to("sds-grpc", &json!({ "pipe": { "path": path } }))],
            &json!({}),
        );
        let edge = at(&proxy, "edge").await;
        let client = Arc::new(TlsClient::new(&ca, None));
        shows(&client, edge, &pairs[0]).await;
        let seen = Arc::new(Seen::default());
        let loads: Vec<_> = (0..3)
            .map(|_| tokio::spawn(load(client.clone(), edge, seen.clone())))
            .collect();
        for pair in &pairs[1..] {
            many_more(&seen).await;
            control.put(&[secret(&name, certificate(pair))]);
            shows(&client, edge, pair).await;
        }
        many_more(&seen).await;
        seen.over.store(true, SeqCst);
        for load in loads {
            load.await.unwrap();
        }
        let heard = control.heard();
        assert!(
            heard.iter().all(|request| request["error"].is_null()),
            "{heard:#?}"
        );
        assert_eq!(services(&control), ["sds".to_owned()].into());
        let node = json!([proxy.bootstrap.node.id, "outrigger"]);
        assert_eq!(heard[0]["node"], node);
        assert_eq!(heard[0]["names"], json!([name]));
        let state = "envoy_sds_control_plane_connected_state";
        assert!((proxy.metric(state, &name).await - 1.0).abs() < f64::EPSILON);
        let secrets = dump(proxy.admin(), "SecretsConfigDump").await;
        let active = &secrets["dynamic_active_secrets"][0];
        assert_eq!(
            (&active["name"], &active["client_status"]),
            (&json!(name), &json!("ACKED"))
        );
        assert!(!secrets.to_string().contains("PRIVATE KEY"), "{secrets:#}");
        std::fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn endpoints_and_routes_outlive_their_servers_and_follow_them_when_they_are_back() {
    for protocol in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let name = format!("outliving-{protocol:?}");
        let mut control = AdsServer::start();
        control.put(&[endpoints(&name, &[one.address]), routes_to("table", &name)]);
        let source = by(protocol, "control");
        let proxy = start(
            &[edge(&source)],
            &[
                leads_to("control", &address(control.address)),
                eds_cluster(&name, &source),
            ],
            &json!({}),
        );
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        let expected = ["eds", "rds"].map(str::to_owned);
        assert_eq!(services(&control), expected.into());
        let told = control
            .heard()
            .into_iter()
            .filter(|request| !request["node"].is_null());
        assert_eq!(told.count(), 2, "each stream says once who we are");
        let connected = async |expected: f64| {
            for (metric, label) in [
                ("envoy_cluster_control_plane_connected_state", &*name),
                (
                    "envoy_http_rds_control_plane_connected_state",
                    "prefix=\"edge\"",
                ),
            ] {
                eventually("it is told whether the server is there", || async {
                    let told = proxy.metric(metric, label).await;
                    ((told - expected).abs() < f64::EPSILON).then_some(())
                })
                .await;
            }
        };
        // Others of this process may have a listener of this name, but not at this time.
        connected(1.0).await;
        control.kill();
        connected(0.0).await;
        assert_eq!(Client::get(edge, "/x").await.status, 200);
        control.put(&[endpoints(&name, &[two.address])]);
        control.revive().await;
        served_by(edge, "two").await;
        connected(1.0).await;
        let heard = control.heard();
        assert!(
            heard.iter().all(|request| request["error"].is_null()),
            "{heard:#?}"
        );
    }
}

#[tokio::test]
async fn clusters_and_listeners_come_by_services_of_their_own() {
    for protocol in BOTH {
        let (one, two) = (Upstream::named("one").await, Upstream::named("two").await);
        let control = AdsServer::start();
        let source = by(protocol, "control");
        control.put(&[
            eds_cluster("backend", &source),
            endpoints("backend", &[one.address]),
            edge(&source),
            routes_to("table", "backend"),
        ]);
        let proxy = start(
            &[],
            &[leads_to("control", &address(control.address))],
            &json!({ "lds_config": source, "cds_config": source }),
        );
        let edge = at(&proxy, "edge").await;
        served_by(edge, "one").await;
        let heard = control.heard();
        let first = |service: &str| {
            heard
                .iter()
                .position(|request| request["service"] == service)
        };
        assert!(
            first("cds") < first("eds") && first("eds") < first("lds"),
            "{heard:#?}"
        );
        assert!(first("lds") < first("rds"), "{heard:#?}");
        assert_eq!(services(&control).len(), 4);
        control.put(&[
            eds_cluster("second", &source),
            endpoints("second", &[two.address]),
            routes_to("table", "second"),
        ]);
        served_by(edge, "two").await;
        control.remove("envoy.config.cluster.v3.Cluster", "backend");
        let gone = async || {
            let clusters = dump(proxy.admin(), "ClustersConfigDump").await;
            let active = clusters["dynamic_active_clusters"].as_array().unwrap();
            (active.len() == 1).then_some(())
        };
        eventually("the cluster is gone", &gone).await;
        served_by(edge, "two").await;
        control.remove("envoy.config.listener.v3.Listener", "edge");
        eventually("the listener is gone", || async {
            proxy.proxy.address("edge").is_none().then_some(())
        })
        .await;
        // Nobody asks for its routes any more, so nothing is told of them.
        control.forget();
        control.put(&[
            routes_to("table", "backend"),
            endpoints("second", &[one.address]),
        ]);
        control
            .hears("the endpoints are confirmed", |request| {
                request["service"] == "eds"
            })
            .await;
        assert!(!services(&control).contains("rds"));
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_waited_for_as_long_as_is_said() {
    for protocol in BOTH {
        let (ca, path) = (Ca::new(), scratch("late.sock"));
        let mut source = by(protocol, "sds-grpc");
        source["initial_fetch_timeout"] = json!("0.3s");
        let mut patient = source.clone();
        patient["initial_fetch_timeout"] = json!("0s");
        let proxy = start(
            &[
                secured("edge", "late", &source),
                secured("patient", "later", &patient),
            ],
            &[leads_to("sds-grpc", &json!({ "pipe": { "path": path } }))],
            &json!({}),
        );
        let ready = Client::get(proxy.admin(), "/ready").await.text();
        assert_eq!(ready, "INITIALIZING\n");
        let edge = at(&proxy, "edge").await;
        let client = TlsClient::new(&ca, None);
        assert!(client.get(edge, "/x").await.is_none(), "no hand is shaken");
        assert!(proxy.proxy.address("patient").is_none());
        let control = AdsServer::also_at(Some(path.clone()));
        let (own, other) = (ca.pair(&["proxy.test"]), ca.pair(&["proxy.test"]));
        control.put(&[
            secret("late", certificate(&own)),
            secret("later", certificate(&other)),
        ]);
        shows(&client, edge, &own).await;
        shows(&client, at(&proxy, "patient").await, &other).await;
        std::fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn a_refusal_is_told_where_it_came_from_and_nowhere_else() {
    for protocol in BOTH {
        let (ca, one) = (Ca::new(), Upstream::named("one").await);
        let control = AdsServer::start();
        let (own, next) = (ca.pair(&["proxy.test"]), ca.pair(&["proxy.test"]));
        control.put(&[
            secret("judged", certificate(&own)),
            endpoints("backend", &[one.address]),
        ]);
        let source = by(protocol, "control");
        let proxy = start(
            &[secured("edge", "judged", &source)],
            &[
                leads_to("control", &address(control.address)),
                eds_cluster("backend", &source),
            ],
            &json!({}),
        );
        let edge = at(&proxy, "edge").await;
        let client = TlsClient::new(&ca, None);
        shows(&client, edge, &own).await;
        let mut wrong = ca.pair(&["proxy.test"]);
        wrong.key.clone_from(&next.key);
        control.put(&[
            secret("judged", certificate(&wrong)),
            endpoints("backend", &[]),
        ]);
        let refused = control
            .hears("the refusal", |request| !request["error"].is_null())
            .await;
        assert_eq!(refused["service"], "sds");
        let why = refused["error"].as_str().unwrap();
        assert!(
            why.contains("'judged': ") && why.contains("does not fit"),
            "{why}"
        );
        shows(&client, edge, &own).await;
        control.put(&[secret("judged", certificate(&next))]);
        shows(&client, edge, &next).await;
        let heard = control.heard();
        let mut refusals = heard.iter().filter(|request| !request["error"].is_null());
        assert!(
            refusals.all(|request| request["service"] == "sds"),
            "{heard:#?}"
        );
    }
}

/// SPIRE's agent does so.
#[tokio::test]
async fn a_server_that_ends_the_stream_of_one_secret_does_not_take_the_others_away() {
    for protocol in BOTH {
        let ca = Ca::new();
        let control = AdsServer::start();
        let (own, next) = (ca.pair(&["proxy.test"]), ca.pair(&["proxy.test"]));
        control.put(&[secret("given", certificate(&own))]);
        control.deny("denied");
        let mut source = by(protocol, "control");
        source["initial_fetch_timeout"] = json!("0.3s");
        let proxy = start(
            &[
                secured("open", "given", &source),
                secured("shut", "denied", &source),
            ],
            &[leads_to("control", &address(control.address))],
            &json!({}),
        );
        let client = TlsClient::new(&ca, None);
        let open = at(&proxy, "open").await;
        shows(&client, open, &own).await;
        let shut = at(&proxy, "shut").await;
        assert!(client.get(shut, "/x").await.is_none(), "no hand is shaken");
        control.put(&[secret("given", certificate(&next))]);
        shows(&client, open, &next).await;
    }
}

#[tokio::test]
async fn what_leads_nowhere_is_refused_by_name() {
    let here = json!({ "socket_address": { "address": "127.0.0.1", "port_value": 1 } });
    let source = by(Protocol::State, "control");
    let with_secret = |mut cluster: Value| {
        let secret = json!({ "name": "own", "sds_config": source });
        let context = typed(
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            json!({ "common_tls_context": { "tls_certificate_sds_secret_configs": [secret] } }),
        );
        cluster["transport_socket"] = json!({ "name": "tls", "typed_config": context });
        cluster
    };
    let rule = "must name a statically defined non-EDS cluster: 'control'";
    let own = "secret 'own' is to come from a server that this cluster leads to";
    let cases = [
        (vec![], json!({ "lds_config": source }), rule),
        (vec![], json!({ "cds_config": source }), rule),
        (vec![eds_cluster("control", &source)], json!({}), rule),
        (vec![eds_cluster("backend", &source)], json!({}), rule),
        (
            vec![with_secret(leads_to("backend", &here))],
            json!({}),
            rule,
        ),
        (
            vec![with_secret(leads_to("control", &here))],
            json!({}),
            own,
        ),
    ];
    let proxy = ProxyBuilder::new().start();
    for (clusters, dynamic, expected) in cases {
        let read = written(&[], &clusters, &dynamic);
        let mut pushed = proxy.bootstrap.clone();
        pushed.clusters.extend(read.clusters);
        (pushed.lds, pushed.cds) = (read.lds, read.cds);
        let errors = proxy.proxy.apply(pushed).unwrap_err().join("\n");
        assert!(
            errors.contains(expected),
            "{clusters:?} {dynamic}: {errors}"
        );
    }
    for api_type in ["REST", "AGGREGATED_GRPC", "AGGREGATED_DELTA_GRPC"] {
        let mut source = source.clone();
        source["api_config_source"]["api_type"] = json!(api_type);
        let all = json!({ "dynamic_resources": { "cds_config": source } });
        let errors = load::bootstrap(&all.to_string(), Syntax::Json)
            .unwrap_err()
            .to_string();
        let expected = format!(
            "dynamic_resources.cds_config.api_config_source.api_type: not supported: {api_type}"
        );
        assert!(errors.contains(&expected), "{errors}");
    }
}
