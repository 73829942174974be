//! Load reports (ORCA): told by the proxy beside an engine, read from headers and trailers, kept from clients that did not ask,
//! and what becomes of them.

use super::balancing;
use http::{HeaderMap, Method};
use outrigger_conformance::{
    harness::{
        Client, Conn, ProxyBuilder, Reply, TestProxy, Upstream, Version, eventually, hosts, request,
    },
    sim::{Config, SimEngine},
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

const REPORT: &str = "endpoint-load-metrics";
const FORMAT: &str = "endpoint-load-metrics-format";
const REFUSED: &str = "outrigger_orca_reports_refused_total";
const COMPLETIONS: &str = "/v1/completions";
const BODY: &str = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;

/// Servers that report what the case says, in headers or, with a word before it, in trailers.
async fn servers(reports: &[&'static str]) -> Vec<Upstream> {
    let mut servers = Vec::new();
    for report in reports {
        let (head, trailer) = match report.strip_prefix("trailers ") {
            Some(report) => ("", report),
            None => (*report, ""),
        };
        let line = |text: &str| match text {
            "" => String::new(),
            text => format!("{text}\r\n"),
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\n{}transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n{}\r\n",
            line(head),
            line(trailer)
        );
        let answers = move |mut conn: Conn, _| {
            let answer = answer.clone();
            async move { conn.write(answer).await.then_some(conn) }
        };
        servers.push(Upstream::start(answers).await);
    }
    servers
}

fn policy(fields: &str) -> String {
    let kind = "type.googleapis.com/envoy.extensions.load_balancing_policies\
        .client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin";
    format!(
        "load_balancing_policy: {{policies: [{{typed_extension_config: {{name: w, typed_config: {{\"@type\": {kind}{fields}}}}}}}]}}"
    )
}

async fn ask(proxy: &TestProxy, headers: &[(&'static str, &str)]) -> Reply {
    let mut asked = request(Method::GET, "/", "");
    for (name, value) in headers {
        asked.headers_mut().insert(*name, value.parse().unwrap());
    }
    proxy.client(Version::H2).await.send(asked).await
}

/// How many of the next `count` requests each server got.
async fn spread(proxy: &TestProxy, servers: &[Upstream], count: usize) -> Vec<usize> {
    let got = || servers.iter().map(|server| server.exchanges().len());
    let before: Vec<_> = got().collect();
    let mut client = proxy.client(Version::H2).await;
    for _ in 0..count {
        let reply = client.send(request(Method::GET, "/", "")).await;
        assert_eq!(reply.status, 200);
    }
    got()
        .zip(before)
        .map(|(now, before)| now - before)
        .collect()
}

#[tokio::test]
async fn weights_are_what_endpoints_report_in_any_form() {
    // 100 a second at half of what it can, then a third of that, and one whose failures make it a fifth of the first.
    let servers = servers(&[
        "endpoint-load-metrics: TEXT application_utilization=0.5, rps_fractional=100",
        "trailers endpoint-load-metrics: JSON {\"rps_fractional\": 100, \"named_metrics\": {\"kv\": 1.5}}",
        "endpoint-load-metrics-bin: MQAAAAAAAFlAOQAAAAAAAElASQAAAAAAAABA",
    ])
    .await;
    let quick = ", blackout_period: 0s, weight_update_period: 0.1s, metric_names_for_computing_utilization: [named_metrics.kv]";
    let proxy = balancing::proxy("", &policy(quick), &servers);
    eventually("weights in use", || async {
        spread(&proxy, &servers, 6).await;
        let next = spread(&proxy, &servers, 23).await;
        (next[0].abs_diff(15) <= 1 && next[1].abs_diff(5) <= 1 && next[2].abs_diff(3) <= 1)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn all_are_alike_while_reports_do_not_count() {
    let servers = servers(&[
        "endpoint-load-metrics: TEXT application_utilization=0.1, rps_fractional=100",
        "endpoint-load-metrics: TEXT application_utilization=1, rps_fractional=100",
        "endpoint-load-metrics: TEXT application_utilization=1, application_utilization=1",
    ])
    .await;
    // The default blackout is longer than this case.
    let proxy = balancing::proxy("", &policy(", weight_update_period: 0.1s"), &servers);
    assert_eq!(spread(&proxy, &servers, 30).await, [10, 10, 10]);
    // What cannot be read is counted (by no other case of this process), and hurts nobody.
    assert_eq!(proxy.metric(REFUSED, "\"c\"").await, 10.0);
}

#[tokio::test]
async fn reports_are_kept_from_clients_that_did_not_ask() {
    let servers = servers(&[
        "endpoint-load-metrics: TEXT eps=1",
        "trailers endpoint-load-metrics: TEXT eps=2",
    ])
    .await;
    let proxy = balancing::proxy("", "lb_policy: ROUND_ROBIN", &servers);
    let of = |headers: &HeaderMap| {
        headers
            .get(REPORT)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let mut seen = Vec::new();
    for asks in [false, false, true, true] {
        let headers: &[_] = if asks { &[(FORMAT, "JSON")] } else { &[] };
        let reply = ask(&proxy, headers).await;
        let trailers = reply.trailers.clone().unwrap_or_default();
        seen.push((asks, of(&reply.headers).or(of(&trailers))));
    }
    seen.sort();
    let told = |text: &str| (true, Some(text.to_owned()));
    assert_eq!(
        seen,
        [
            (false, None),
            (false, None),
            told("TEXT eps=1"),
            told("TEXT eps=2")
        ]
    );
}

#[tokio::test]
async fn the_proxy_beside_an_engine_tells_its_load() {
    let engine = SimEngine::start(Config::default()).unwrap();
    let beside = ProxyBuilder::new().engine(engine.http_addr).start();
    let entry = ProxyBuilder::new().peer(beside.inbound()).start();
    entry.wait_alive(1).await;
    // As a peer sees it.
    let name = hosts(entry.admin(), "fleet").await[0]["outrigger"]["engine_id"].clone();
    let mut peer = Client::connect(beside.inbound(), Version::H2).await;
    let name: http::HeaderValue = name.as_str().unwrap().parse().unwrap();
    let mut report = String::new();
    // Its figures are polled: the first may come after it is known to be there.
    for _ in 0..100 {
        let mut asked = request(Method::POST, COMPLETIONS, BODY);
        let fields = asked.headers_mut();
        fields.insert("x-outrigger-endpoint", name.clone());
        let reply = peer.send(asked).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.header(REPORT).clone_into(&mut report);
        assert!(report.starts_with("TEXT "), "{report}");
        if report.contains("kv_cache_usage_perc") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    for metric in [
        "active_requests",
        "kv_cache_usage_perc",
        "num_requests_waiting",
    ] {
        let metric = format!("named_metrics.{metric}=");
        assert!(report.contains(&metric), "{report}");
    }
    // Through a proxy: for who asks.
    for proxy in [&entry, &beside] {
        for (format, told) in [(None, false), (Some("text"), true)] {
            let mut asked = request(Method::POST, COMPLETIONS, BODY);
            if let Some(format) = format {
                let format = http::HeaderValue::from_static(format);
                asked.headers_mut().insert(FORMAT, format);
            }
            let reply = proxy.client(Version::H1).await.send(asked).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert_eq!(reply.headers.contains_key(REPORT), told, "{format:?}");
        }
    }
}

#[tokio::test]
async fn a_report_is_the_load_of_an_endpoint_that_no_feed_tells_of() {
    let servers = servers(&[
        "endpoint-load-metrics: TEXT named_metrics.num_requests_waiting=7, named_metrics.num_requests_running=3, named_metrics.kv_cache_usage_perc=0.5",
    ])
    .await;
    let proxy = balancing::proxy("", "lb_policy: ROUND_ROBIN", &servers);
    let load = || async { hosts(proxy.admin(), "c").await[0]["outrigger"]["load"].clone() };
    assert_eq!(load().await["waiting"], 0);
    ask(&proxy, &[]).await;
    let told = load().await;
    assert_eq!((&told["waiting"], &told["running"]), (&7.into(), &3.into()));
    assert_eq!(told["kv_usage"], 0.5);
}

#[tokio::test]
async fn a_weight_expires_with_its_last_report() {
    static SILENT: AtomicBool = AtomicBool::new(false);
    let mut servers = Vec::new();
    for share in ["0.2", "1"] {
        servers.push(
            Upstream::start(move |mut conn, _| async move {
                let report = match SILENT.load(SeqCst) {
                    true => String::new(),
                    false => format!(
                        "{REPORT}: TEXT application_utilization={share}, rps_fractional=10\r\n"
                    ),
                };
                let answer = format!("HTTP/1.1 200 OK\r\n{report}content-length: 0\r\n\r\n");
                conn.write(answer).await.then_some(conn)
            })
            .await,
        );
    }
    let quick = ", blackout_period: 0s, weight_update_period: 0.1s, weight_expiration_period: 0.5s";
    let proxy = balancing::proxy("", &policy(quick), &servers);
    eventually("five to one", || async {
        (spread(&proxy, &servers, 12).await == [10, 2]).then_some(())
    })
    .await;
    SILENT.store(true, SeqCst);
    eventually("even again", || async {
        (spread(&proxy, &servers, 12).await == [6, 6]).then_some(())
    })
    .await;
}

#[test]
fn what_reports_cannot_do_yet_is_refused_by_name() {
    let refused = |fields: &str| balancing::read("", &policy(fields), &[]).unwrap_err();
    let error = refused(", enable_oob_load_report: true");
    assert!(error.contains("enable_oob_load_report"), "{error}");
    let error = refused(", error_utilization_penalty: -1");
    assert!(error.contains("error_utilization_penalty"), "{error}");
}
