//! What a driven proxy tells of its resources: over client status discovery (CSDS), and the same in `/config_dump`.

use super::{
    ads::{cluster, driven, edge, everything},
    dynamic::{at, dump, endpoints, served_by},
};
use futures_util::stream;
use outrigger_conformance::harness::{Client, TestProxy, Upstream, eventually};
use outrigger_xds::{
    subscription::Protocol,
    wire::envoy::{
        admin::v3::ClientResourceStatus,
        config::cluster::v3::Cluster,
        service::status::v3::{
            ClientConfig, ClientStatusRequest, client_config::GenericXdsConfig,
            client_status_discovery_service_client::ClientStatusDiscoveryServiceClient,
        },
        r#type::matcher::v3::NodeMatcher,
    },
};
use prost::Message;
use serde_json::json;
use tonic::{Code, transport::Channel};

async fn asker(proxy: &TestProxy) -> ClientStatusDiscoveryServiceClient<Channel> {
    let uri = format!("http://{}", proxy.admin());
    let channel = Channel::from_shared(uri).unwrap().connect().await.unwrap();
    ClientStatusDiscoveryServiceClient::new(channel)
}

async fn status(proxy: &TestProxy, request: ClientStatusRequest) -> ClientConfig {
    let answer = asker(proxy).await.fetch_client_status(request).await;
    let mut configs = answer.unwrap().into_inner().config;
    assert_eq!(configs.len(), 1);
    configs.remove(0)
}

fn of<'a>(config: &'a ClientConfig, message: &str, name: &str) -> Option<&'a GenericXdsConfig> {
    let mut all = config.generic_xds_configs.iter();
    all.find(|it| it.name == name && it.type_url.ends_with(message))
}

#[tokio::test]
async fn each_resource_is_told_with_what_became_of_it() {
    let one = Upstream::named("one").await;
    let control = everything(one.address);
    let mut bad = cluster("bad");
    bad["lb_policy"] = json!("CLUSTER_PROVIDED");
    // Nobody has the endpoints of this one.
    control.put(&[bad, cluster("lonely")]);
    let proxy = driven(control.as_configured(Protocol::Delta));
    let config = eventually("all is known", || async {
        let config = status(&proxy, ClientStatusRequest::default()).await;
        let lonely = of(&config, ".ClusterLoadAssignment", "lonely")?;
        let is_missing = lonely.client_status() == ClientResourceStatus::DoesNotExist;
        (is_missing && of(&config, ".Listener", "edge").is_some()).then_some(config)
    })
    .await;
    let node = config.node.as_ref().unwrap();
    assert_eq!(node.id, proxy.bootstrap.node.id);
    assert_eq!(node.user_agent_name, "outrigger");
    let backend = of(&config, ".Cluster", "backend").unwrap();
    assert_eq!(backend.client_status(), ClientResourceStatus::Acked);
    assert!(!backend.version_info.is_empty() && backend.last_updated.is_some());
    let body = backend.xds_config.as_ref().unwrap();
    let cluster = Cluster::decode(&*body.value).unwrap();
    assert_eq!(
        (body.type_url.as_str(), cluster.name.as_str()),
        (backend.type_url.as_str(), "backend")
    );
    let bad = of(&config, ".Cluster", "bad").unwrap();
    assert_eq!(bad.client_status(), ClientResourceStatus::Nacked);
    let error = bad.error_state.as_ref().unwrap();
    assert!(error.details.contains("lb_policy"), "{error:?}");
    assert!(bad.xds_config.is_none(), "no version of it was good");
    let missing = dump(proxy.admin(), "EndpointsConfigDump").await;
    let missing = missing["dynamic_endpoint_configs"].as_array().unwrap();
    let shown = json!({ "name": "lonely", "client_status": "DOES_NOT_EXIST" });
    assert!(missing.contains(&shown), "{missing:#?}");
    // When it comes, it is there.
    control.put(&[endpoints("lonely", &[one.address])]);
    eventually("it is taken", || async {
        let config = status(&proxy, ClientStatusRequest::default()).await;
        let lonely = of(&config, ".ClusterLoadAssignment", "lonely")?;
        (lonely.client_status() == ClientResourceStatus::Acked).then_some(())
    })
    .await;
}

#[tokio::test]
async fn who_asks_says_how_and_pages_are_served_beside() {
    let one = Upstream::named("one").await;
    let control = everything(one.address);
    let proxy = driven(control.as_configured(Protocol::State));
    served_by(at(&proxy, "edge").await, "one").await;
    let short = ClientStatusRequest {
        exclude_resource_contents: true,
        ..ClientStatusRequest::default()
    };
    let config = status(&proxy, short.clone()).await;
    let mut all = config.generic_xds_configs.iter();
    assert!(all.all(|it| it.xds_config.is_none()));
    assert!(of(&config, ".RouteConfiguration", "table").is_some());
    let matching = ClientStatusRequest {
        node_matchers: vec![NodeMatcher::default()],
        ..ClientStatusRequest::default()
    };
    let refused = asker(&proxy).await.fetch_client_status(matching).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    // A stream answers each question, with what is so then.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let questions = stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    let mut asker = asker(&proxy).await;
    sender.send(short.clone()).await.unwrap();
    let answers = asker.stream_client_status(questions).await.unwrap();
    let mut answers = answers.into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert!(of(&first.config[0], ".Cluster", "later").is_none());
    control.put(&[cluster("later"), edge()]);
    eventually("the answer is another", || async {
        let config = status(&proxy, short.clone()).await;
        of(&config, ".Cluster", "later").map(|_| ())
    })
    .await;
    sender.send(short).await.unwrap();
    let second = answers.message().await.unwrap().unwrap();
    assert!(of(&second.config[0], ".Cluster", "later").is_some());
    assert_eq!(Client::get(proxy.admin(), "/ready").await.status, 200);
}

/// Why the server cannot send it, if it said so.
fn received(config: &ClientConfig, message: &str, name: &str) -> Option<String> {
    let told = of(config, message, name)?;
    let is_error = told.client_status() == ClientResourceStatus::ReceivedError;
    is_error.then(|| told.error_state.clone().unwrap().details)
}

/// A cluster and a listener `never`, of which nobody asks by name.
async fn shows_what_never_came(proxy: &TestProxy, config: &ClientConfig) {
    for (message, section, list) in [
        (".Cluster", "ClustersConfigDump", "dynamic_warming_clusters"),
        (".Listener", "ListenersConfigDump", "dynamic_listeners"),
    ] {
        assert!(received(config, message, "never").is_some(), "{message}");
        let shown = dump(proxy.admin(), section).await;
        let mut shown = shown[list].as_array().unwrap().iter();
        let never = shown.find(|it| it["name"] == "never").unwrap();
        assert_eq!(never["client_status"], "RECEIVED_ERROR", "{message}");
        assert!(never["error_state"]["details"].is_string(), "{message}");
    }
}

#[tokio::test]
async fn what_the_server_cannot_send_is_told_and_not_waited_for() {
    for protocol in [Protocol::State, Protocol::Delta] {
        let one = Upstream::named("one").await;
        let control = everything(one.address);
        let assignments = "envoy.config.endpoint.v3.ClusterLoadAssignment";
        let clusters = "envoy.config.cluster.v3.Cluster";
        control.breaks(assignments, "lonely", "its source is away");
        control.put(&[cluster("lonely")]);
        let proxy = driven(control.as_configured(protocol));
        // Nor can it send these, of which nobody asks by name.
        control.breaks(clusters, "never", "it cannot be made");
        control.breaks(
            "envoy.config.listener.v3.Listener",
            "never",
            "neither can it",
        );
        // It would be waited for 15 s.
        let asked = std::time::Instant::now();
        served_by(at(&proxy, "edge").await, "one").await;
        eventually("it goes on without it", || async {
            (Client::get(proxy.admin(), "/ready").await.status == 200).then_some(())
        })
        .await;
        assert!(asked.elapsed().as_secs() < 9, "{protocol:?}");
        let config = status(&proxy, ClientStatusRequest::default()).await;
        let why = received(&config, ".ClusterLoadAssignment", "lonely").unwrap();
        assert!(why.ends_with("its source is away"), "{why}");
        shows_what_never_came(&proxy, &config).await;
        // What is there stays.
        control.breaks(clusters, "backend", "the same");
        control.remove(clusters, "backend");
        eventually("it is told", || async {
            let config = status(&proxy, ClientStatusRequest::default()).await;
            received(&config, ".Cluster", "backend")
        })
        .await;
        let shown = dump(proxy.admin(), "ClustersConfigDump").await;
        let mut active = shown["dynamic_active_clusters"].as_array().unwrap().iter();
        let backend = active
            .find(|it| it["cluster"]["name"] == "backend")
            .unwrap();
        assert_eq!(backend["client_status"], "RECEIVED_ERROR");
        served_by(at(&proxy, "edge").await, "one").await;
        // It comes after all.
        control.mends();
        control.put(&[cluster("backend"), endpoints("lonely", &[one.address])]);
        control.put(&[cluster("never"), endpoints("never", &[one.address])]);
        eventually("all is well", || async {
            let config = status(&proxy, ClientStatusRequest::default()).await;
            let mut all = config.generic_xds_configs.iter();
            let is_well = |it: &GenericXdsConfig| it.client_status() == ClientResourceStatus::Acked;
            // Of this listener nothing more is said, unless all of them are sent anew.
            let is_silent =
                |it: &GenericXdsConfig| it.name == "never" && it.type_url.ends_with(".Listener");
            all.all(|it| is_well(it) || is_silent(it)).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn what_a_server_could_not_send_is_forgotten_with_its_stream_and_with_who_asked() {
    let one = Upstream::named("one").await;
    let mut control = everything(one.address);
    control.breaks(
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        "lonely",
        "its source is away",
    );
    control.put(&[cluster("lonely")]);
    let proxy = driven(control.as_configured(Protocol::Delta));
    let becomes = |what: &'static str, wanted: Option<ClientResourceStatus>| {
        let proxy = &proxy;
        eventually(what, move || async move {
            let config = status(proxy, ClientStatusRequest::default()).await;
            let lonely = of(&config, ".ClusterLoadAssignment", "lonely");
            (lonely.map(GenericXdsConfig::client_status) == wanted).then_some(())
        })
    };
    becomes("it is told", Some(ClientResourceStatus::ReceivedError)).await;
    // A new stream, on which nothing was said of it.
    control.kill();
    control.mends();
    control.mute(true);
    control.revive().await;
    becomes("it is asked for", Some(ClientResourceStatus::Requested)).await;
    control.mute(false);
    control.remove("envoy.config.cluster.v3.Cluster", "lonely");
    becomes("nobody asks for it", None).await;
}
