//! What a client is told, and what is known of it.

use crate::harness::{PATIENCE, Served, as_str, endpoints, eventually, everything, node};
use outrigger_control_plane::ads::REQUEST_BYTES_MAX;
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::{
            endpoint::v3::{ClusterLoadAssignment, ClusterStats, UpstreamLocalityStats},
            listener::v3::Listener,
        },
        service::{
            cluster::v3::cluster_discovery_service_client::ClusterDiscoveryServiceClient,
            discovery::v3::{DiscoveryRequest, DiscoveryResponse},
            endpoint::v3::endpoint_discovery_service_client::EndpointDiscoveryServiceClient,
            load_stats::v3::{
                LoadStatsRequest, load_reporting_service_client::LoadReportingServiceClient,
            },
            status::v3::{
                ClientStatusRequest, ConfigStatus,
                client_status_discovery_service_client::ClientStatusDiscoveryServiceClient,
            },
        },
        r#type::matcher::v3::{NodeMatcher, StringMatcher, string_matcher::MatchPattern},
    },
};
use prost::Message;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Channel};

fn ask(kind: Kind, names: &[&str]) -> DiscoveryRequest {
    DiscoveryRequest {
        node: Some(node("envoy")),
        type_url: kind.type_url().into(),
        resource_names: names.iter().map(|name| (*name).into()).collect(),
        ..DiscoveryRequest::default()
    }
}

#[tokio::test]
async fn the_state_of_the_world_over_ads() {
    let files = everything();
    let served = Served::new("state", &as_str(&files)).await;
    let mut client = served.state().await.unwrap();
    client.sender.send(ask(Kind::Clusters, &[])).await.unwrap();
    let answer = client.next().await.unwrap().unwrap();
    assert_eq!(answer.resources.len(), 1);
    let taken = DiscoveryRequest {
        version_info: answer.version_info.clone(),
        response_nonce: answer.nonce,
        ..ask(Kind::Clusters, &[])
    };
    client.sender.send(taken).await.unwrap();
    // A stream that begins with this version has it all.
    let mut again = served.state().await.unwrap();
    let known = DiscoveryRequest {
        version_info: answer.version_info,
        ..ask(Kind::Clusters, &[])
    };
    again.sender.send(known).await.unwrap();
    again
        .sender
        .send(ask(Kind::Endpoints, &["a"]))
        .await
        .unwrap();
    let first = again.next().await.unwrap().unwrap();
    assert_eq!(first.type_url, Kind::Endpoints.type_url(), "no clusters");
}

#[tokio::test]
async fn who_does_not_say_who_it_is_is_refused() {
    let files = everything();
    let served = Served::new("anonymous", &as_str(&files)).await;
    let mut client = served.state().await.unwrap();
    let request = DiscoveryRequest {
        node: None,
        ..ask(Kind::Clusters, &[])
    };
    client.sender.send(request).await.unwrap();
    let status = client.next().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}

#[tokio::test]
async fn a_request_that_is_too_long_ends_its_stream_and_counts() {
    let files = everything();
    let served = Served::new("long", &as_str(&files)).await;
    let mut client = served.state().await.unwrap();
    let name = "x".repeat(REQUEST_BYTES_MAX);
    client
        .sender
        .send(ask(Kind::Endpoints, &[&name]))
        .await
        .unwrap();
    let status = client.next().await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    let (_, stats) = served.get("/stats/prometheus").await;
    assert!(
        stats.contains("outrigger_control_plane_streams_refused_total{reason=\"limit\"}"),
        "{stats}"
    );
}

#[tokio::test]
async fn one_admin_connection_too_many_is_told_so() {
    let files = everything();
    let served = Served::new("admin-full", &as_str(&files)).await;
    let connect = async || TcpStream::connect(served.running.admin).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(connect().await);
    }
    let mut answer = String::new();
    let mut refused = connect().await;
    let read = refused.read_to_string(&mut answer);
    timeout(PATIENCE, read).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.ends_with("\r\n\r\ntoo many admin connections\n"),
        "{answer}"
    );
    drop(open);
    eventually("there is room again", async || {
        let mut stream = connect().await;
        let request = "GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        answer.starts_with("HTTP/1.1 200 ").then_some(())
    })
    .await;
}

#[tokio::test]
async fn so_many_streams_of_status_discovery_and_no_more() {
    let files = everything();
    let served = Served::new("csds", &as_str(&files)).await;
    let mut csds = ClientStatusDiscoveryServiceClient::new(served.channel().await);
    let mut open = Vec::new();
    let refused = loop {
        match csds.stream_client_status(tokio_stream::pending()).await {
            Ok(stream) => open.push(stream),
            Err(status) => break status,
        }
        assert!(open.len() <= 8, "no limit");
    };
    assert_eq!(open.len(), 8);
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(
        refused.message().contains("more than 8 streams"),
        "{refused}"
    );
}

#[tokio::test]
async fn nobody_is_told_that_there_is_nothing_before_the_files_were_good_once() {
    let served = Served::new("not-yet", &[("a.yaml", "[{")]).await;
    assert_eq!(served.get("/ready").await.0, 503);
    let status = served.state().await.err().expect("not yet");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    served.put("a.yaml", &endpoints("a", 1));
    eventually("ready", async || {
        (served.get("/ready").await.0 == 200).then_some(())
    })
    .await;
    let mut client = served.state().await.unwrap();
    client
        .sender
        .send(ask(Kind::Endpoints, &["a"]))
        .await
        .unwrap();
    assert_eq!(client.next().await.unwrap().unwrap().resources.len(), 1);
}

#[tokio::test]
async fn filters_of_ours_go_to_proxies_of_ours() {
    let files = everything();
    let served = Served::new("foreign", &as_str(&files)).await;
    for (user_agent, has_ours) in [("outrigger", true), ("envoy", false), ("", false)] {
        let mut client = served.delta(user_agent).await;
        client.want(Kind::Listeners, &[]).await;
        let answer = client.next().await;
        let any = answer.resources[0].resource.as_ref().unwrap();
        let listener = Listener::decode(&*any.value).unwrap();
        assert_eq!(listener.name, "edge");
        let text = String::from_utf8_lossy(&any.value).into_owned();
        assert_eq!(
            text.contains("outrigger.filters"),
            has_ours,
            "'{user_agent}'"
        );
        assert!(text.contains("Router"), "'{user_agent}'");
    }
}

/// Of a client that has taken its clusters and refused its endpoints.
async fn told_over_csds(served: &Served) {
    let mut csds = ClientStatusDiscoveryServiceClient::new(served.channel().await);
    let named = |id: &str| ClientStatusRequest {
        node_matchers: vec![NodeMatcher {
            node_id: Some(StringMatcher {
                match_pattern: Some(MatchPattern::Exact(id.into())),
                ignore_case: false,
            }),
            node_metadatas: Vec::new(),
        }],
        ..ClientStatusRequest::default()
    };
    let nobody = csds.fetch_client_status(named("nobody")).await.unwrap();
    assert!(nobody.into_inner().config.is_empty());
    let found = csds
        .fetch_client_status(named("test"))
        .await
        .unwrap()
        .into_inner();
    let configs = &found.config[0].generic_xds_configs;
    let refused = configs
        .iter()
        .find(|it| it.type_url == Kind::Endpoints.type_url())
        .unwrap();
    assert_eq!(refused.config_status(), ConfigStatus::Error);
    assert_eq!(
        refused.error_state.as_ref().unwrap().details,
        "no such port"
    );
    assert!(refused.xds_config.is_some());
    let taken = configs
        .iter()
        .find(|it| it.type_url == Kind::Clusters.type_url())
        .unwrap();
    assert_eq!(taken.config_status(), ConfigStatus::Synced);
}

#[tokio::test]
async fn a_refusal_is_shown_wherever_one_looks() {
    let files = everything();
    let served = Served::new("nack", &as_str(&files)).await;
    let mut client = served.delta("outrigger").await;
    client.want(Kind::Clusters, &[]).await;
    assert_eq!(client.take(None).await, "Clusters[a]");
    client.want(Kind::Endpoints, &["a"]).await;
    assert_eq!(client.take(Some("no such port")).await, "Endpoints[a]");
    client.is_quiet().await;
    let clients = served.json("/clients").await;
    let client_of = &clients["clients"][0];
    assert_eq!(client_of["id"], "test", "{clients}");
    assert_eq!(client_of["outrigger"], true);
    let types = client_of["types"].as_array().unwrap();
    let of = |kind: Kind| {
        types
            .iter()
            .find(|it| it["type_url"] == kind.type_url())
            .unwrap()
    };
    assert_eq!(of(Kind::Clusters)["status"], "SYNCED", "{clients}");
    assert_eq!(of(Kind::Endpoints)["status"], "ERROR", "{clients}");
    assert_eq!(of(Kind::Endpoints)["nacked"]["error"], "no such port");
    let (_, stats) = served.get("/stats/prometheus").await;
    assert!(
        stats.contains("outrigger_control_plane_nacks_total"),
        "{stats}"
    );
    told_over_csds(&served).await;
    drop(client);
    let gone = async || {
        served.json("/clients").await["clients"]
            .as_array()
            .unwrap()
            .is_empty()
            .then_some(())
    };
    eventually("it is gone", gone).await;
}

#[tokio::test]
async fn types_have_services_of_their_own() {
    let files = everything();
    let served = Served::new("services", &as_str(&files)).await;
    let mut eds = EndpointDiscoveryServiceClient::new(served.channel().await);
    let request = DiscoveryRequest {
        type_url: String::new(),
        ..ask(Kind::Endpoints, &["a", "nowhere"])
    };
    let answer = eds
        .fetch_endpoints(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.type_url, Kind::Endpoints.type_url());
    assert_eq!(answer.resources.len(), 1);
    let nothing = eds
        .fetch_endpoints(ask(Kind::Endpoints, &["nowhere"]))
        .await;
    let nothing = nothing.unwrap().into_inner();
    assert!(nothing.resources.is_empty() && !nothing.version_info.is_empty());
    let wrong = eds
        .fetch_endpoints(ask(Kind::Clusters, &[]))
        .await
        .unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    let mut cds = ClusterDiscoveryServiceClient::new(served.channel().await);
    let first = cds.fetch_clusters(ask(Kind::Clusters, &[])).await.unwrap();
    let first = first.into_inner();
    assert_eq!(first.resources.len(), 1);
    // Who has it is told it all the same.
    let known = DiscoveryRequest {
        version_info: first.version_info.clone(),
        ..ask(Kind::Clusters, &[])
    };
    let again = cds.fetch_clusters(known).await.unwrap().into_inner();
    assert_eq!(again.version_info, first.version_info);
    assert_eq!(again.resources, first.resources);
    let requests = tokio_stream::iter([ask(Kind::Clusters, &[])]);
    let forever = tokio_stream::StreamExt::chain(requests, tokio_stream::pending());
    let mut answers = cds.stream_clusters(forever).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().resources.len(), 1);
}

/// Reads nothing while much changes, and then only what is true by then.
#[tokio::test]
async fn a_slow_client_gets_changes_merged() {
    // A response is about 800 KB, more than what lies between the two: few resources with long names.
    const RESOURCES: usize = 200;
    let name = |index: usize| format!("{index:0>4000}");
    let lines = |port: u16| {
        let one = |index: usize| {
            json!({
                "@type": Kind::Endpoints.type_url(),
                "cluster_name": name(index),
                "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": {
                    "socket_address": { "address": "127.0.0.1", "port_value": port },
                } } }] }],
            })
        };
        let all: Vec<Value> = (0..RESOURCES).map(one).collect();
        Value::from(all).to_string()
    };
    let served = Served::new("slow", &[("a.json", &lines(1))]).await;
    let names: Vec<String> = (0..RESOURCES).map(name).collect();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    const WINDOW_BYTES: u32 = 65_535;
    let channel = Channel::from_shared(format!("http://{}", served.running.address))
        .unwrap()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    let mut eds = EndpointDiscoveryServiceClient::new(channel.connect().await.unwrap());
    let request = DiscoveryRequest {
        node: Some(node("envoy")),
        resource_names: names,
        ..DiscoveryRequest::default()
    };
    sender.send(request).await.unwrap();
    let mut answers = eds
        .stream_endpoints(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    const CHANGES: u16 = 6;
    for change in 2..2 + CHANGES {
        let version = served.json("/sources").await["version"].clone();
        served.put("a.json", &lines(change));
        let taken = async || (served.json("/sources").await["version"] != version).then_some(());
        eventually("the change is taken", taken).await;
    }
    let mut is_last = async || {
        let answer: DiscoveryResponse = answers.message().await.unwrap().unwrap();
        let any = answer.resources.first().unwrap();
        let first = ClusterLoadAssignment::decode(&*any.value).unwrap();
        let text = format!("{first:?}");
        text.contains(&format!("PortValue({})", 1 + CHANGES))
    };
    let mut count = 1;
    while !timeout(PATIENCE, is_last()).await.unwrap() {
        count += 1;
    }
    assert!(count <= 4, "{count} responses for {CHANGES} changes");
}

#[tokio::test]
async fn streams_end_when_the_control_plane_does() {
    let files = everything();
    let served = Served::new("end", &as_str(&files)).await;
    let mut client = served.state().await.unwrap();
    client.sender.send(ask(Kind::Clusters, &[])).await.unwrap();
    assert!(client.next().await.unwrap().is_some());
    let ended = tokio::spawn(served.running.end(Duration::from_millis(10)));
    let status = client.next().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn load_reports_are_asked_for_and_the_last_is_shown() {
    let files = everything();
    let served = Served::new("load", &as_str(&files)).await;
    let mut client = LoadReportingServiceClient::new(served.channel().await);
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let answers = client.stream_load_stats(ReceiverStream::new(receiver));
    let first = LoadStatsRequest {
        node: Some(node("envoy")),
        cluster_stats: Vec::new(),
    };
    sender.send(first).await.unwrap();
    let mut answers = answers.await.unwrap().into_inner();
    let asked = timeout(PATIENCE, answers.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(asked.send_all_clusters && asked.load_reporting_interval.is_some());
    let locality = |count| UpstreamLocalityStats {
        total_issued_requests: count,
        ..UpstreamLocalityStats::default()
    };
    let stats = ClusterStats {
        cluster_name: "a".into(),
        upstream_locality_stats: vec![locality(3), locality(u64::MAX)],
        ..ClusterStats::default()
    };
    let report = LoadStatsRequest {
        node: None,
        cluster_stats: vec![stats],
    };
    sender.send(report).await.unwrap();
    let shown = async || {
        let loads = served.json("/clients").await["loads"][0].clone();
        (loads["clusters"]["a"]["issued"] == u64::MAX).then_some(loads)
    };
    assert_eq!(eventually("the report is shown", shown).await["id"], "test");
    let anonymous = tokio_stream::iter([LoadStatsRequest::default()]);
    let mut refused = client
        .stream_load_stats(anonymous)
        .await
        .unwrap()
        .into_inner();
    let status = timeout(PATIENCE, refused.message())
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}
