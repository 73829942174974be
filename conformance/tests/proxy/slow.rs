//! Outlier detection by how late tokens come.

use outrigger_conformance::harness::{
    ProxyBuilder, TestProxy, Upstream, Version, eventually, hosts,
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::load::{self, Syntax};
use serde_json::Value;
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";
const STREAM: &str = r#"{"model":"m","prompt":"hello","stream":true}"#;
const CHUNK: &str = r#"{"id":"c","object":"text_completion","choices":[{"index":0,"text":"a","finish_reason":null}]}"#;
/// Events of a stream after its first.
const EVENTS: usize = 17;

/// Streams whose first event takes `first`, and each later one `later`.
async fn server(first: Duration, later: Duration) -> Upstream {
    Upstream::start(move |mut conn, _| async move {
        conn.begin_events().await;
        tokio::time::sleep(first).await;
        for _ in 0..=EVENTS {
            conn.event(CHUNK).await;
            tokio::time::sleep(later).await;
        }
        conn.event("[DONE]").await;
        conn.end().await.then_some(conn)
    })
    .await
}

fn detection(fields: &str) -> Result<outrigger_xds::resource::bootstrap::Bootstrap, String> {
    let text = format!(
        r#"
static_resources:
  clusters:
  - name: c
    load_assignment: {{cluster_name: c}}
    outlier_detection:
      interval: 2.5s
      base_ejection_time: 600s
      max_ejection_time: 600s
      max_ejection_percent: 100
      monitors:
      - name: latency
        typed_config:
          "@type": type.googleapis.com/xds.type.v3.TypedStruct
          type_url: type.googleapis.com/outrigger.outlier_detection_monitors.latency.v1.Config
          value: {{{fields}}}
"#
    );
    load::bootstrap(&text, Syntax::Yaml).map_err(|errors| errors.to_string())
}

fn proxy(servers: &[Upstream], fields: &str) -> TestProxy {
    let read = detection(fields).unwrap_or_else(|errors| panic!("{errors}"));
    let detection = read.clusters[0].outlier_detection.clone();
    servers
        .iter()
        .fold(ProxyBuilder::new(), |built, server| {
            built.server(server.address)
        })
        .edit(move |bootstrap| {
            for cluster in &mut bootstrap.clusters {
                if cluster.name == FLEET {
                    cluster.outlier_detection = detection.clone();
                }
            }
        })
        .start()
}

async fn streams(proxy: &TestProxy, count: usize) {
    let all = (0..count).map(|_| async {
        let mut client = proxy.client(Version::H2).await;
        let reply = client.post(COMPLETIONS, STREAM).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(reply.text().ends_with("data: [DONE]\n\n"));
    });
    futures_util::future::join_all(all).await;
}

async fn ejected(proxy: &TestProxy) -> Vec<bool> {
    let hosts = hosts(proxy.admin(), FLEET).await;
    let out = |host: &Value| host["health_status"]["failed_outlier_check"] == true;
    hosts.iter().map(out).collect()
}

/// Sends streams until somebody is ejected.
async fn eject(proxy: &TestProxy) -> Vec<bool> {
    eventually("an ejection", || async {
        streams(proxy, 8).await;
        let ejected = ejected(proxy).await;
        ejected.contains(&true).then_some(ejected)
    })
    .await
}

const QUICK: Duration = Duration::from_millis(1);

#[tokio::test]
async fn an_endpoint_whose_first_tokens_are_late_gets_none_for_a_while() {
    let servers = [
        server(QUICK, QUICK).await,
        server(Duration::from_millis(800), QUICK).await,
        server(QUICK, QUICK).await,
    ];
    let fields = "ttft_floor_ms: 300, itl_factor: 0, request_volume: 2";
    let proxy = proxy(&servers, fields);
    assert_eq!(eject(&proxy).await, [false, true, false]);
    for name in ["enforced_ttft", "detected_ttft", "enforced_total"] {
        let name = format!("envoy_cluster_outlier_detection_ejections_{name}");
        assert!(proxy.metric(&name, FLEET).await >= 1.0, "{name}");
    }
    let before = servers[1].exchanges().len();
    streams(&proxy, 6).await;
    assert_eq!(servers[1].exchanges().len(), before, "it gets nothing");
}

#[tokio::test]
async fn an_endpoint_whose_later_tokens_are_late_gets_none_for_a_while() {
    let servers = [
        server(QUICK, Duration::from_millis(120)).await,
        server(QUICK, QUICK).await,
    ];
    let fields = "ttft_factor: 0, itl_floor_ms: 60, request_volume: 1";
    let proxy = proxy(&servers, fields);
    assert_eq!(eject(&proxy).await, [true, false]);
    let name = "envoy_cluster_outlier_detection_ejections_enforced_itl";
    assert!(proxy.metric(name, FLEET).await >= 1.0);
}

#[test]
fn a_monitor_says_what_is_wrong_with_it() {
    for (fields, word) in [
        ("ttft_factor: 0.5", "ttft_factor"),
        ("minimum_hosts: 1", "minimum_hosts"),
        ("enforcing: 101", "enforcing"),
        ("unheard_of: 1", "unheard_of"),
    ] {
        let errors = detection(fields).unwrap_err();
        let place = "outlier_detection.monitors[0].typed_config";
        assert!(errors.contains(place) && errors.contains(word), "{errors}");
    }
    detection("itl_factor: 0").unwrap();
}
