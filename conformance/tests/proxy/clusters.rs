//! Clusters as Envoy's users configure them: which endpoint gets a request, and when one gets none.

use http::Method;
use outrigger_conformance::harness::{
    ProxyBuilder, TestProxy, Upstream, Version, eventually, hosts, request,
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::{
    bootstrap::Bootstrap,
    cluster::Cluster,
    endpoint::{HealthStatus, Locality},
    health_check::{Checker, HealthCheck},
    outlier_detection::{OutlierDetection, Rule},
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering::SeqCst},
    },
    time::Duration,
};

fn cluster(edit: impl Fn(&mut Cluster)) -> impl FnOnce(&mut Bootstrap) {
    move |bootstrap| {
        for cluster in &mut bootstrap.clusters {
            if cluster.name == FLEET {
                edit(cluster);
            }
        }
    }
}

async fn servers<const N: usize>(names: [&'static str; N]) -> Vec<Upstream> {
    let mut servers = Vec::new();
    for name in names {
        servers.push(Upstream::named(name).await);
    }
    servers
}

fn proxy(policy: &str, servers: &[Upstream], edit: impl Fn(&mut Cluster) + 'static) -> TestProxy {
    let builder = ProxyBuilder::new()
        .flag("--policy", policy)
        .edit(cluster(edit));
    servers
        .iter()
        .fold(builder, |builder, server| builder.server(server.address))
        .start()
}

/// How many of `count` requests were served by whom; failures are under their status.
async fn spread(proxy: &TestProxy, count: usize) -> BTreeMap<String, usize> {
    let mut client = proxy.client(Version::H1).await;
    let mut spread = BTreeMap::new();
    for _ in 0..count {
        let reply = client.send(request(Method::GET, "/x", "")).await;
        let name = if reply.status == 200 {
            reply.json()["served_by"].as_str().unwrap().to_owned()
        } else {
            reply.status.as_u16().to_string()
        };
        *spread.entry(name).or_default() += 1;
    }
    spread
}

fn wanted<const N: usize>(spread: [(&str, usize); N]) -> BTreeMap<String, usize> {
    spread
        .into_iter()
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}

async fn flags(proxy: &TestProxy, at: usize, key: &str) -> serde_json::Value {
    hosts(proxy.admin(), FLEET).await[at]["health_status"][key].clone()
}

#[tokio::test]
async fn requests_are_spread_by_weight() {
    let servers = servers(["a", "b", "c"]).await;
    let proxy = proxy("round_robin", &servers, |cluster| {
        for (at, weight) in [5, 1, 2].into_iter().enumerate() {
            cluster.load_assignment.endpoints[at].load_balancing_weight = weight;
        }
    });
    assert_eq!(
        spread(&proxy, 40).await,
        wanted([("a", 25), ("b", 5), ("c", 10)])
    );
}

#[tokio::test]
async fn what_the_source_says_of_health_is_heeded() {
    let servers = servers(["well", "drains", "sick"]).await;
    let edit = |cluster: &mut Cluster| {
        let endpoints = &mut cluster.load_assignment.endpoints;
        endpoints[1].health_status = HealthStatus::Draining;
        endpoints[2].health_status = HealthStatus::Unhealthy;
        cluster.balancing.healthy_panic_threshold = 30.0;
    };
    let proxy = proxy("round_robin", &servers, edit);
    assert_eq!(spread(&proxy, 10).await, wanted([("well", 10)]));
    assert_eq!(flags(&proxy, 1, "eds_health_status").await, "DRAINING");
    assert_eq!(flags(&proxy, 2, "eds_health_status").await, "UNHEALTHY");
    // A push changes it while it runs.
    let mut next = proxy.bootstrap.clone();
    cluster(|cluster| {
        cluster.load_assignment.endpoints[0].health_status = HealthStatus::Draining;
        cluster.load_assignment.endpoints[1].health_status = HealthStatus::Healthy;
    })(&mut next);
    proxy.proxy.apply(next).unwrap();
    assert_eq!(spread(&proxy, 10).await, wanted([("drains", 10)]));
}

#[tokio::test]
async fn too_few_healthy_endpoints_are_a_panic_and_none_at_all_a_503_without() {
    let servers = servers(["a", "b"]).await;
    let sick = |cluster: &mut Cluster| {
        for endpoint in &mut cluster.load_assignment.endpoints {
            endpoint.health_status = HealthStatus::Unhealthy;
        }
    };
    let proxy = proxy("round_robin", &servers, sick);
    assert_eq!(spread(&proxy, 10).await, wanted([("a", 5), ("b", 5)]));
    let panics = eventually("panics are counted", || async {
        let panics = proxy.metric("envoy_cluster_lb_healthy_panic", FLEET).await;
        (panics > 0.0).then_some(panics)
    })
    .await;
    assert!(panics >= 10.0, "{panics}");
    let mut next = proxy.bootstrap.clone();
    cluster(|cluster| cluster.balancing.healthy_panic_threshold = 0.0)(&mut next);
    proxy.proxy.apply(next).unwrap();
    let mut client = proxy.client(Version::H1).await;
    let reply = client.send(request(Method::GET, "/x", "")).await;
    assert_eq!(
        (reply.status.as_u16(), reply.header("x-outrigger-error")),
        (503, "UH")
    );
    assert!(
        reply.text().contains("no healthy upstream"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn degraded_endpoints_and_later_priorities_are_used_where_too_few_are_healthy() {
    let servers = servers(["first", "second"]).await;
    let proxy = proxy("round_robin", &servers, |cluster| {
        cluster.load_assignment.localities = vec![
            Locality::default(),
            Locality {
                priority: 1,
                ..Locality::default()
            },
        ];
        cluster.load_assignment.endpoints[1].locality = 1;
    });
    assert_eq!(spread(&proxy, 10).await, wanted([("first", 10)]));
    for (first, second, used) in [
        (HealthStatus::Unhealthy, HealthStatus::Healthy, "second"),
        (HealthStatus::Degraded, HealthStatus::Healthy, "second"),
        (HealthStatus::Degraded, HealthStatus::Unhealthy, "first"),
    ] {
        let mut next = proxy.bootstrap.clone();
        cluster(|cluster| {
            cluster.load_assignment.endpoints[0].health_status = first;
            cluster.load_assignment.endpoints[1].health_status = second;
        })(&mut next);
        proxy.proxy.apply(next).unwrap();
        assert_eq!(
            spread(&proxy, 10).await,
            wanted([(used, 10)]),
            "{first:?} {second:?}"
        );
    }
}

const TICK: Duration = Duration::from_millis(20);

/// Often, so that a case need not wait long.
pub(super) fn health_check(checker: Checker) -> HealthCheck {
    HealthCheck {
        timeout: Duration::from_secs(2),
        interval: TICK,
        interval_jitter: Duration::ZERO,
        interval_jitter_percent: 0,
        initial_jitter: Duration::ZERO,
        unhealthy_threshold: 2,
        healthy_threshold: 2,
        reuse_connection: true,
        no_traffic_interval: TICK,
        no_traffic_healthy_interval: TICK,
        unhealthy_interval: TICK,
        unhealthy_edge_interval: TICK,
        healthy_edge_interval: TICK,
        checker,
    }
}

/// A server whose `/health` has this status.
async fn checked(name: &'static str, status: Arc<AtomicU16>) -> Upstream {
    Upstream::start(move |mut conn, exchange| {
        let status = status.load(SeqCst);
        async move {
            let body = format!("{{\"served_by\":\"{name}\"}}");
            let status = if exchange.path() == "/health" {
                format!("{status} Told")
            } else {
                "200 OK".to_owned()
            };
            conn.json(&status, &body).await.then_some(conn)
        }
    })
    .await
}

pub(super) async fn wait_failed(proxy: &TestProxy, at: usize, failed: bool) {
    eventually("a health check has found out", || async {
        let flag = flags(proxy, at, "failed_active_health_check").await;
        ((flag == true) == failed).then_some(())
    })
    .await;
}

#[tokio::test]
async fn endpoints_that_fail_their_http_checks_get_nothing_until_they_pass_again() {
    let status = Arc::new(AtomicU16::new(204));
    let servers = vec![
        checked("a", status.clone()).await,
        checked("b", Arc::new(AtomicU16::new(204))).await,
    ];
    let proxy = proxy("round_robin", &servers, |cluster| {
        cluster.health_check = Some(health_check(Checker::Http {
            host: "health.example".into(),
            path: "/health".into(),
            method: Method::GET,
            expected: std::iter::once(200..205).collect(),
            retriable: Vec::new(),
            http2: false,
        }));
    });
    for at in 0..2 {
        wait_failed(&proxy, at, false).await;
    }
    assert_eq!(spread(&proxy, 10).await, wanted([("a", 5), ("b", 5)]));
    let asked = servers[0].exchanges();
    let asked = asked
        .iter()
        .find(|asked| asked.path() == "/health")
        .unwrap();
    assert_eq!(
        (asked.header("host"), asked.header("user-agent")),
        ("health.example", "Envoy/HC")
    );
    status.store(503, SeqCst);
    wait_failed(&proxy, 0, true).await;
    assert_eq!(spread(&proxy, 10).await, wanted([("b", 10)]));
    status.store(200, SeqCst);
    wait_failed(&proxy, 0, false).await;
    let served = spread(&proxy, 10).await;
    assert!(served["a"] >= 4, "{served:?}");
    assert!(servers[0].connections() <= 8, "checks share a connection");
    assert!(
        proxy
            .metric("envoy_cluster_health_check_failure", FLEET)
            .await
            >= 1.0
    );
    let attempts = proxy
        .metric("envoy_cluster_health_check_attempt", FLEET)
        .await;
    let successes = proxy
        .metric("envoy_cluster_health_check_success", FLEET)
        .await;
    assert!(attempts >= 4.0 && successes >= 4.0);
    // A push that takes the checks away takes away what they found.
    status.store(503, SeqCst);
    wait_failed(&proxy, 0, true).await;
    let mut next = proxy.bootstrap.clone();
    cluster(|cluster| cluster.health_check = None)(&mut next);
    proxy.proxy.apply(next).unwrap();
    wait_failed(&proxy, 0, false).await;
    assert_eq!(spread(&proxy, 10).await, wanted([("a", 5), ("b", 5)]));
}

#[tokio::test]
async fn an_endpoint_that_nobody_listens_at_fails_its_tcp_check() {
    let mut servers = servers(["a", "gone"]).await;
    let edit = |cluster: &mut Cluster| cluster.health_check = Some(health_check(Checker::Tcp));
    let proxy = proxy("round_robin", &servers, edit);
    for at in 0..2 {
        wait_failed(&proxy, at, false).await;
    }
    servers.pop();
    wait_failed(&proxy, 1, true).await;
    assert_eq!(spread(&proxy, 10).await, wanted([("a", 10)]));
    let failures = proxy
        .metric("envoy_cluster_health_check_network_failure", FLEET)
        .await;
    assert!(failures >= 1.0);
}

#[tokio::test]
async fn an_endpoint_whose_requests_fail_gets_none_for_a_while() {
    let server = |name: &'static str, status: Arc<AtomicU16>| {
        Upstream::start(move |mut conn, _| {
            let status = format!("{} Told", status.load(SeqCst));
            async move {
                let body = format!("{{\"served_by\":\"{name}\"}}");
                conn.json(&status, &body).await.then_some(conn)
            }
        })
    };
    let status = Arc::new(AtomicU16::new(500));
    let servers = vec![
        server("bad", status.clone()).await,
        server("good", Arc::new(AtomicU16::new(200))).await,
    ];
    let rule = |count, enforcing| Rule { count, enforcing };
    let detection = OutlierDetection {
        consecutive_5xx: rule(3, 100),
        consecutive_gateway_failure: rule(5, 0),
        consecutive_local_origin_failure: rule(5, 100),
        split_external_local_origin_errors: false,
        interval: TICK,
        base_ejection_time: Duration::from_secs(600),
        max_ejection_time: Duration::from_secs(600),
        max_ejection_percent: 50,
        always_eject_one_host: false,
        enforcing_success_rate: 0,
        success_rate_minimum_hosts: 5,
        success_rate_request_volume: 100,
        success_rate_stdev_factor: 1900,
        enforcing_local_origin_success_rate: 100,
        failure_percentage_threshold: 85,
        enforcing_failure_percentage: 0,
        enforcing_failure_percentage_local_origin: 0,
        failure_percentage_minimum_hosts: 5,
        failure_percentage_request_volume: 50,
        max_ejection_time_jitter: Duration::ZERO,
        uneject_by_health_check: true,
        latency: None,
    };
    let mut quick = detection.clone();
    quick.base_ejection_time = TICK;
    quick.max_ejection_time = TICK;
    let proxy = proxy("round_robin", &servers, move |cluster| {
        cluster.outlier_detection = Some(detection.clone());
    });
    let first = spread(&proxy, 20).await;
    assert_eq!(first, wanted([("500", 3), ("good", 17)]));
    assert_eq!(flags(&proxy, 0, "failed_outlier_check").await, true);
    for name in [
        "enforced_total",
        "enforced_consecutive_5xx",
        "detected_consecutive_5xx",
    ] {
        let name = format!("envoy_cluster_outlier_detection_ejections_{name}");
        assert!(proxy.metric(&name, FLEET).await >= 1.0, "{name}");
    }
    // A push keeps it out, until its time (which the push makes short) is over.
    status.store(200, SeqCst);
    let mut next = proxy.bootstrap.clone();
    cluster(|cluster| cluster.outlier_detection = Some(quick.clone()))(&mut next);
    proxy.proxy.apply(next).unwrap();
    eventually("it is back", || async {
        let flag = flags(&proxy, 0, "failed_outlier_check").await;
        (flag != true).then_some(())
    })
    .await;
    let served = spread(&proxy, 10).await;
    assert!(served["bad"] >= 4, "{served:?}");
}
