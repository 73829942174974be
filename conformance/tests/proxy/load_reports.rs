//! Load reports (LRS): what a server is told is what clients saw, each request once, whatever happens to the stream, to the
//! endpoint or to the cluster meanwhile.

use super::load_server::{INTERVAL, LoadServer, Sum, everything, of};
use http::Method;
use outrigger_conformance::harness::{
    Client, ProxyBuilder, Reply, TestProxy, Upstream, Version, add_server, eventually, request,
};
use outrigger_proxy::bootstrap::{FLEET, LOCAL};
use outrigger_xds::{
    resource::{
        cluster::Cluster,
        endpoint::{Address, Locality},
    },
    wire::envoy::{config::core::v3 as core, service::load_stats::v3::LoadStatsResponse},
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Semaphore, task::JoinHandle};

/// Answers by path: `/bad` is a 500, `/held` waits until it is let go, a completion streams after a pause, and all else is well.
async fn server() -> (Upstream, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let at = gate.clone();
    let server = Upstream::start(move |mut conn, exchange| {
        let at = at.clone();
        async move {
            match exchange.path() {
                "/bad" => conn.json("500 Internal Server Error", "{}").await,
                "/v1/completions" => {
                    tokio::time::sleep(FIRST_TOKEN).await;
                    let begun = conn.begin_events().await;
                    begun
                        && conn.event(TOKEN).await
                        && conn.event("[DONE]").await
                        && conn.end().await
                }
                "/held" => {
                    at.acquire().await.unwrap().forget();
                    conn.json("200 OK", "{}").await
                }
                _ => conn.json("200 OK", "{}").await,
            }
            .then_some(conn)
        }
    })
    .await;
    (server, gate)
}

const FIRST_TOKEN: Duration = Duration::from_millis(80);
const TOKEN: &str = r#"{"id":"a","object":"text_completion","choices":[{"index":0,"text":"a"}]}"#;

fn reporting(to: &LoadServer, servers: &[&Upstream]) -> TestProxy {
    let builder = servers.iter().fold(ProxyBuilder::new(), |builder, server| {
        builder.server(server.address)
    });
    builder.edit(to.edit()).start()
}

fn fleet(clusters: &mut [Cluster]) -> &mut Cluster {
    let mut clusters = clusters.iter_mut();
    clusters.find(|cluster| cluster.name == FLEET).unwrap()
}

/// A request on a connection of its own.
fn ask(proxy: &TestProxy, path: &'static str) -> JoinHandle<Reply> {
    let address = proxy.outbound();
    tokio::spawn(async move { Client::get(address, path).await })
}

async fn asks(proxy: &TestProxy, path: &'static str, count: usize, status: u16) {
    for _ in 0..count {
        assert_eq!(ask(proxy, path).await.unwrap().status, status, "{path}");
    }
}

async fn until_held(server: &Upstream) {
    eventually("one is held", || async {
        let mut all = server.exchanges().into_iter();
        all.any(|exchange| exchange.path() == "/held").then_some(())
    })
    .await;
}

/// Traffic before the first report is asked for is not counted.
pub(super) async fn until_asked(load: &LoadServer) {
    eventually("a report", || async {
        (!load.reports(FLEET).is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_told_is_what_clients_saw() {
    let (server, gate) = server().await;
    let load = LoadServer::start(everything());
    let edit = load.edit();
    let builder = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            edit(bootstrap);
            let fleet = fleet(&mut bootstrap.clusters);
            fleet.circuit_breakers.default.max_requests = 1;
        });
    let proxy = builder.start();
    until_asked(&load).await;
    asks(&proxy, "/good", 5, 200).await;
    asks(&proxy, "/bad", 3, 500).await;
    let held = ask(&proxy, "/held");
    until_held(&server).await;
    asks(&proxy, "/dropped", 2, 503).await;
    let told = Sum {
        issued: 9,
        succeeded: 5,
        failed: 3,
        in_progress: 1,
        dropped: 2,
    };
    load.hears(FLEET, told).await;
    gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    let told = Sum {
        succeeded: 6,
        in_progress: 0,
        ..told
    };
    load.hears(FLEET, told).await;
    // A client that leaves has neither succeeded nor failed.
    let left = ask(&proxy, "/held");
    load.hears(
        FLEET,
        Sum {
            issued: 10,
            in_progress: 1,
            ..told
        },
    )
    .await;
    left.abort();
    load.hears(FLEET, Sum { issued: 10, ..told }).await;
}

/// A proxy whose fleet is at a place.
fn at_place(load: &LoadServer, server: &Upstream) -> TestProxy {
    let edit = load.edit();
    let builder = ProxyBuilder::new()
        .server(server.address)
        .edit(|bootstrap| {
            edit(bootstrap);
            let place = ["r", "z", "s"].map(str::to_owned);
            let fleet = fleet(&mut bootstrap.clusters);
            fleet.load_assignment.localities = vec![Locality {
                place: Arc::new(place),
                ..Locality::default()
            }];
        });
    builder.start()
}

#[tokio::test]
async fn who_reports_says_so_once_and_of_what_in_each_report() {
    let (server, _gate) = server().await;
    let load = LoadServer::start(everything());
    let proxy = at_place(&load, &server);
    until_asked(&load).await;
    asks(&proxy, "/good", 2, 200).await;
    let told = Sum {
        issued: 2,
        succeeded: 2,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
    let first = &load.heard()[0];
    let node = first.node.as_ref().unwrap();
    assert_eq!(node.id, proxy.bootstrap.node.id);
    let features = &node.client_features;
    assert!(features.contains(&"envoy.lrs.supports_send_all_clusters".to_owned()));
    assert!(first.cluster_stats.is_empty());
    let later = &load.heard()[1..];
    assert!(later.iter().all(|request| request.node.is_none()));
    let localities = load.localities(FLEET);
    let place = core::Locality {
        region: "r".into(),
        zone: "z".into(),
        sub_zone: "s".into(),
    };
    assert!(
        localities
            .iter()
            .all(|told| told.locality.as_ref() == Some(&place))
    );
    assert!(
        localities
            .iter()
            .all(|told| told.upstream_endpoint_stats.is_empty())
    );
    // Of all clusters, be they idle; and of each all the time.
    let idle = load.reports(LOCAL);
    assert!(
        !idle.is_empty()
            && idle
                .iter()
                .all(|stats| stats.upstream_locality_stats.is_empty())
    );
    for stats in load.reports(FLEET) {
        let interval = Duration::try_from(stats.load_report_interval.unwrap()).unwrap();
        assert!(interval >= INTERVAL / 2, "{interval:?}");
    }
}

#[tokio::test]
async fn endpoints_and_the_time_to_the_first_token_are_told() {
    let (one, _gate) = server().await;
    let (two, _other_gate) = server().await;
    let load = LoadServer::start(LoadStatsResponse {
        report_endpoint_granularity: true,
        ..everything()
    });
    let proxy = reporting(&load, &[&one, &two]);
    until_asked(&load).await;
    asks(&proxy, "/good", 3, 200).await;
    let body = r#"{"model":"m","prompt":"p","stream":true}"#;
    for _ in 0..3 {
        let mut client = proxy.client(Version::H1).await;
        let stream = request(Method::POST, "/v1/completions", body);
        assert_eq!(client.send(stream).await.status, 200);
    }
    let told = Sum {
        issued: 6,
        succeeded: 6,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
    let localities = load.localities(FLEET);
    for server in [&one, &two] {
        let at = core::Address::from(&Address {
            host: server.address.ip().to_string(),
            port: server.address.port(),
        });
        let endpoints = localities
            .iter()
            .flat_map(|told| &told.upstream_endpoint_stats);
        let own = endpoints.filter(|told| told.address.as_ref() == Some(&at));
        let succeeded: u64 = own.map(|told| told.total_successful_requests).sum();
        assert_eq!(succeeded, server.exchanges().len() as u64);
    }
    let metrics: Vec<_> = localities
        .iter()
        .flat_map(|told| &told.load_metric_stats)
        .collect();
    assert!(metrics.iter().all(|metric| metric.metric_name == "ttft_ms"));
    let streams = metrics
        .iter()
        .map(|metric| metric.num_requests_finished_with_metric);
    assert_eq!(streams.sum::<u64>(), 3);
    let total: f64 = metrics.iter().map(|metric| metric.total_metric_value).sum();
    let least = 3.0 * FIRST_TOKEN.as_secs_f64() * 1000.0;
    assert!((least..least * 20.0).contains(&total), "{total} ms");
}

#[tokio::test]
async fn what_is_wanted_changes_while_it_is_told() {
    let (server, _gate) = server().await;
    let load = LoadServer::start(everything());
    let proxy = reporting(&load, &[&server]);
    until_asked(&load).await;
    // Nobody is told for an hour; what happens meanwhile is told later.
    load.want(of(&[FLEET], Duration::from_secs(3600)));
    let quiet = || async {
        let before = load.heard().len();
        tokio::time::sleep(INTERVAL * 5).await;
        (load.heard().len() == before).then_some(())
    };
    eventually("it is quiet", quiet).await;
    asks(&proxy, "/good", 4, 200).await;
    let before = load.heard().len();
    load.want(of(&[FLEET, "nobody"], INTERVAL));
    let told = Sum {
        issued: 4,
        succeeded: 4,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
    let since = load.heard().split_off(before);
    let clusters = since.iter().flat_map(|request| &request.cluster_stats);
    for stats in clusters {
        assert_eq!(stats.cluster_name, FLEET, "what nobody asked for");
    }
    // What is not asked for is not counted for later.
    load.want(of(&[LOCAL], INTERVAL));
    load.hears_again(LOCAL).await;
    asks(&proxy, "/good", 2, 200).await;
    load.want(everything());
    load.hears_again(FLEET).await;
    assert_eq!(load.sum(FLEET), told);
    asks(&proxy, "/good", 1, 200).await;
    let told = Sum {
        issued: 5,
        succeeded: 5,
        ..told
    };
    load.hears(FLEET, told).await;
}

#[tokio::test]
async fn a_stream_that_is_cut_loses_nothing_and_tells_nothing_twice() {
    let (server, gate) = server().await;
    let mut load = LoadServer::start(everything());
    let proxy = reporting(&load, &[&server]);
    until_asked(&load).await;
    asks(&proxy, "/good", 3, 200).await;
    let held = ask(&proxy, "/held");
    let told = Sum {
        issued: 4,
        succeeded: 3,
        in_progress: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
    let errors = proxy.metric("envoy_load_reporter_errors", "").await;
    load.kill();
    eventually("the proxy has noticed", || async {
        (proxy.metric("envoy_load_reporter_errors", "").await > errors).then_some(())
    })
    .await;
    asks(&proxy, "/good", 4, 200).await;
    asks(&proxy, "/bad", 1, 500).await;
    gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    load.revive().await;
    let told = Sum {
        issued: 9,
        succeeded: 8,
        failed: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
    let named = load
        .heard()
        .into_iter()
        .filter(|request| request.node.is_some());
    assert!(named.count() >= 2, "each stream says who reports");
    for name in ["requests", "responses", "retries"] {
        let count = proxy
            .metric(&format!("envoy_load_reporter_{name}"), "")
            .await;
        assert!(count >= 1.0, "{name}");
    }
}

#[tokio::test]
async fn requests_to_what_is_gone_are_told_when_they_end() {
    let ((one, gate), (two, _gate)) = (server().await, server().await);
    let load = LoadServer::start(everything());
    let proxy = reporting(&load, &[&one]);
    until_asked(&load).await;
    let held = ask(&proxy, "/held");
    until_held(&one).await;
    // Another endpoint in its place.
    let mut next = proxy.bootstrap.clone();
    fleet(&mut next.clusters).load_assignment.endpoints.clear();
    add_server(&mut next, two.address);
    proxy.proxy.apply(next.clone()).unwrap();
    asks(&proxy, "/good", 2, 200).await;
    let told = Sum {
        issued: 3,
        succeeded: 2,
        in_progress: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
    gate.add_permits(1);
    assert_eq!(held.await.unwrap().status, 200);
    let told = Sum {
        succeeded: 3,
        in_progress: 0,
        ..told
    };
    load.hears(FLEET, told).await;
    // The first comes back, and what was told of it is not told again.
    add_server(&mut next, one.address);
    proxy.proxy.apply(next).unwrap();
    load.hears(FLEET, told).await;
}

#[tokio::test]
async fn nobody_is_told_where_nobody_is_to_be_told() {
    let (server, _gate) = server().await;
    let load = LoadServer::start(everything());
    let proxy = reporting(&load, &[&server]);
    until_asked(&load).await;
    let mut silent = proxy.bootstrap.clone();
    silent.load_stats = None;
    proxy.proxy.apply(silent).unwrap();
    eventually("it is quiet", || async {
        let before = load.heard().len();
        tokio::time::sleep(INTERVAL * 5).await;
        (load.heard().len() == before).then_some(())
    })
    .await;
    asks(&proxy, "/good", 2, 200).await;
    proxy.proxy.apply(proxy.bootstrap.clone()).unwrap();
    load.hears_again(FLEET).await;
    asks(&proxy, "/good", 1, 200).await;
    let told = Sum {
        issued: 1,
        succeeded: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
}

#[tokio::test]
async fn a_server_that_takes_no_reports_is_asked_again_and_traffic_goes_on() {
    let (server, _gate) = server().await;
    let load = LoadServer::start(everything());
    load.refuse(true);
    let proxy = reporting(&load, &[&server]);
    eventually("it is asked again", || async {
        (load.refused() >= 2).then_some(())
    })
    .await;
    asks(&proxy, "/good", 2, 200).await;
    load.refuse(false);
    until_asked(&load).await;
    asks(&proxy, "/good", 1, 200).await;
    let told = Sum {
        issued: 1,
        succeeded: 1,
        ..Sum::default()
    };
    load.hears(FLEET, told).await;
}
