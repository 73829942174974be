//! A new version goes to some nodes first, and on, or back by itself.

use crate::{
    harness::{Delta, Served, endpoints, eventually},
    versions::{client, says_states, served, states, takes},
};
use outrigger_control_plane::rollout::place;
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::{
            core::v3::Node,
            endpoint::v3::{ClusterStats, EndpointLoadMetricStats, UpstreamLocalityStats},
        },
        service::load_stats::v3::{
            LoadStatsRequest, LoadStatsResponse,
            load_reporting_service_client::LoadReportingServiceClient,
        },
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Two nodes, of which the first tries what is new.
fn ids() -> [&'static str; 2] {
    let mut ids = ["n1", "n2"];
    ids.sort_by_key(|id| place(id));
    ids
}

/// Both, with what is live at first.
async fn clients(served: &Served) -> [Delta; 2] {
    let [first, second] = ids();
    let mut clients = [client(served, first).await, client(served, second).await];
    for client in &mut clients {
        assert_eq!(takes(client, None).await, 1);
    }
    clients
}

#[tokio::test]
async fn a_version_that_a_node_refuses_is_taken_back_unattended() {
    // It does not wait for the end of the step.
    let served = served("refused", &[10, 100], 3600).await;
    let [mut first, mut second] = clients(&served).await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(takes(&mut first, Some("cannot be")).await, 2);
    assert_eq!(takes(&mut first, None).await, 1);
    second.is_quiet().await;
    says_states(&served, "1 live, 2 rolled back").await;
    let page = served.json("/rollout").await;
    assert_eq!(page["rolled_back"]["version"], 2);
    let why = page["rolled_back"]["why"].to_string();
    assert!(why.contains(ids()[0]) && why.contains("cannot be"), "{why}");
    let says = served.json("/sources").await["not_as_sources_say"].to_string();
    assert!(says.contains("was taken back"), "{says}");
    // It is not tried again: neither by a file that says the same, nor by a restart.
    served.put(
        "endpoints.yaml",
        &format!("# the same\n{}", endpoints("a", 2)),
    );
    first.is_quiet().await;
    let served = served.restarted(|_| {}).await;
    let [mut first, mut second] = clients(&served).await;
    assert_eq!(states(&served).await, "1 live, 2 rolled back");
    // Something else is.
    served.put("endpoints.yaml", &endpoints("a", 3));
    assert_eq!(takes(&mut first, None).await, 3);
    second.is_quiet().await;
    assert_eq!(states(&served).await, "1 live, 2 rolled back, 3 candidate");
    // By hand, too.
    assert_eq!(served.post("/rollback?version=1").await.0, 200);
    assert_eq!(takes(&mut first, None).await, 1);
    second.is_quiet().await;
    assert_eq!(
        states(&served).await,
        "1 live, 2 rolled back, 3 rolled back"
    );
}

#[tokio::test]
async fn a_version_that_is_good_goes_through() {
    let served = served("good", &[10, 100], 1).await;
    let [mut first, mut second] = clients(&served).await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    let answer = first.next().await;
    assert_eq!(crate::versions::port(&answer), 2);
    // Until it is answered, nobody else gets it, however long that takes.
    eventually("it waits", async || {
        let page = served.json("/rollout").await;
        (page["candidate"]["evidence"]["waits_for"] == "answers").then_some(())
    })
    .await;
    second.is_quiet().await;
    assert_eq!(states(&served).await, "1 live, 2 candidate");
    first.answer(&answer, None).await;
    assert_eq!(takes(&mut second, None).await, 2);
    says_states(&served, "1 past, 2 live").await;
    first.is_quiet().await;
    assert!(served.json("/rollout").await["candidate"].is_null());
}

/// What a node refused before, and is sent again as it was, speaks against nothing new.
#[tokio::test]
async fn an_old_refusal_does_not_hold_up_what_is_new() {
    let served = served("old-refusal", &[10, 100], 1).await;
    let both = |port| format!("[{}, {}]", endpoints("a", port), endpoints("b", 7));
    let put = |port| served.put("endpoints.yaml", &both(port));
    put(1);
    says_states(&served, "1 live, 2 candidate").await;
    assert_eq!(served.post("/rollback?version=2").await.0, 200);
    let [first, second] = ids();
    let mut first = client(&served, first).await;
    assert_eq!(takes(&mut first, None).await, 1);
    first.want(Kind::Endpoints, &["b"]).await;
    assert_eq!(takes(&mut first, Some("never")).await, 7);
    let mut second = client(&served, second).await;
    assert_eq!(takes(&mut second, None).await, 1);
    put(2);
    assert_eq!(takes(&mut first, None).await, 2);
    // It is tried again with what is new, and refused as ever.
    assert_eq!(takes(&mut first, Some("never")).await, 7);
    assert_eq!(takes(&mut second, None).await, 2);
    says_states(&served, "1 past, 2 past, 3 live").await;
    // The same words of something that is new are another matter.
    put(3);
    assert_eq!(takes(&mut first, Some("never")).await, 3);
    says_states(&served, "1 past, 2 past, 3 live, 4 rolled back").await;
}

/// One that a version kills, again and again, is waited for: nobody else tries it in its place.
#[tokio::test]
async fn a_node_that_leaves_each_time_that_it_is_sent_it_holds_it_up() {
    let served = served("crashes", &[10, 100], 1).await;
    let [first, mut second] = clients(&served).await;
    let mut first = Some(first);
    served.put("endpoints.yaml", &endpoints("a", 2));
    for _ in 0..4 {
        let mut it = match first.take() {
            Some(it) => it,
            None => client(&served, ids()[0]).await,
        };
        assert_eq!(crate::versions::port(&it.next().await), 2);
        drop(it);
        tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    }
    eventually("it waits for it", async || {
        let page = served.json("/rollout").await;
        let evidence = &page["candidate"]["evidence"];
        let is_waiting = evidence["waits_for"] == "answers" && evidence["gone"] == 1;
        is_waiting.then_some(())
    })
    .await;
    second.is_quiet().await;
    assert_eq!(states(&served).await, "1 live, 2 candidate");
}

#[tokio::test]
async fn a_restart_in_the_middle_goes_on() {
    let served = served("middle", &[10, 100], 3600).await;
    let [mut first, _second] = clients(&served).await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(takes(&mut first, None).await, 2);
    let served = served.restarted(|_| {}).await;
    // Both are what they were, to the same nodes.
    assert_eq!(states(&served).await, "1 live, 2 candidate");
    let [first, second] = ids();
    let mut second = client(&served, second).await;
    assert_eq!(takes(&mut second, None).await, 1);
    let mut first = client(&served, first).await;
    assert_eq!(takes(&mut first, None).await, 2);
    assert_eq!(served.json("/rollout").await["candidate"]["percent"], 10);
}

/// Requests of a cluster that a node reports.
fn report(id: &str, succeeded: u64, failed: u64) -> LoadStatsRequest {
    let stats = UpstreamLocalityStats {
        total_successful_requests: succeeded,
        total_error_requests: failed,
        ..UpstreamLocalityStats::default()
    };
    LoadStatsRequest {
        node: Some(Node {
            id: id.into(),
            ..Node::default()
        }),
        cluster_stats: vec![ClusterStats {
            cluster_name: "a".into(),
            upstream_locality_stats: vec![stats],
            ..ClusterStats::default()
        }],
    }
}

/// A stream of load reports.
async fn loads(
    served: &Served,
) -> (
    mpsc::Sender<LoadStatsRequest>,
    tonic::Streaming<LoadStatsResponse>,
) {
    let (sender, receiver) = mpsc::channel(16);
    let mut loads = LoadReportingServiceClient::new(served.channel().await);
    let answers = loads.stream_load_stats(ReceiverStream::new(receiver));
    (sender, answers.await.unwrap().into_inner())
}

#[tokio::test]
async fn a_version_with_which_requests_fail_is_taken_back_unattended() {
    let served = served("failures", &[10, 100], 3600).await;
    let [mut first, mut second] = clients(&served).await;
    let (sender, answers) = loads(&served).await;
    sender.send(report(ids()[0], 100, 1)).await.unwrap();
    eventually("the report is there", async || {
        let loads = served.json("/clients").await["loads"].to_string();
        loads.contains("\"succeeded\":100").then_some(())
    })
    .await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(takes(&mut first, None).await, 2);
    // Another stream goes on where that ended.
    drop((sender, answers));
    let (sender, _answers) = loads(&served).await;
    sender.send(report(ids()[0], 60, 40)).await.unwrap();
    assert_eq!(takes(&mut first, None).await, 1);
    second.is_quiet().await;
    let page = served.json("/rollout").await;
    let why = page["rolled_back"]["why"].as_str().unwrap().to_owned();
    assert!(why.starts_with("40.0 % of the requests fail"), "{why}");
}

/// The same of streams that wait: their requests end well.
#[tokio::test]
async fn a_version_with_which_first_tokens_take_longer_is_taken_back_unattended() {
    let served = served("slower", &[10, 100], 4).await;
    let [mut first, mut second] = clients(&served).await;
    let slow = |id: &str, ms: f64| {
        let mut report = report(id, 300, 0);
        let stats = &mut report.cluster_stats[0].upstream_locality_stats[0];
        stats.load_metric_stats = vec![EndpointLoadMetricStats {
            metric_name: "ttft_ms".into(),
            num_requests_finished_with_metric: 300,
            total_metric_value: 300.0 * ms,
        }];
        report
    };
    let (sender, _answers) = loads(&served).await;
    sender.send(slow(ids()[0], 200.0)).await.unwrap();
    eventually("the report is there", async || {
        let loads = served.json("/clients").await["loads"].to_string();
        loads.contains("\"first_tokens\":300").then_some(())
    })
    .await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(takes(&mut first, None).await, 2);
    sender.send(slow(ids()[0], 500.0)).await.unwrap();
    assert_eq!(takes(&mut first, None).await, 1);
    second.is_quiet().await;
    let page = served.json("/rollout").await;
    assert_eq!(
        page["rolled_back"]["why"],
        "the first token takes 500 ms on average, 200 ms elsewhere or before"
    );
}

/// What is for one node only is tried by that one, wherever its place is.
#[tokio::test]
async fn nodes_that_it_does_not_concern_do_not_stand_for_one_that_it_does() {
    let served = served("concerned", &[10, 100], 3600).await;
    let document = |kind: &str, spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1\nkind: {kind}\nmetadata: {{name: chat}}\nspec: {spec}\n"
        )
    };
    let pools = r#"{pools: [{name: all, engines: ["127.0.0.1:8000"]}]}"#;
    served.put("fleet.yaml", &document("Fleet", pools));
    // Before anybody is connected it waits; by hand it does not.
    says_states(&served, "1 live, 2 candidate").await;
    assert_eq!(served.post("/rollback?version=2").await.0, 200);
    let page = served.json("/sources").await;
    assert!(page["not_as_sources_say"].is_null(), "{page}");
    let [mut first, mut second] = [ids()[0], ids()[1]].map(|id| (id, None));
    for (id, slot) in [&mut first, &mut second] {
        let mut client = client(&served, id).await;
        assert_eq!(takes(&mut client, None).await, 1);
        client.want(Kind::Listeners, &[]).await;
        assert_eq!(client.take(None).await, "Listeners[edge]");
        *slot = Some(client);
    }
    let gateway = r#"{nodes: [NODE], listeners: [{address: ":8081"}], routes: [{fleet: chat}]}"#;
    let gateway = gateway.replace("NODE", second.0);
    served.put("gateway.yaml", &document("Gateway", &gateway));
    let [mut first, mut second] = [first, second].map(|(_, client)| client.unwrap());
    assert_eq!(second.take(None).await, "Listeners[chat]");
    first.is_quiet().await;
    assert_eq!(states(&served).await, "1 past, 2 live, 3 candidate");
    eventually("one node tries it", async || {
        let page = served.json("/rollout").await;
        (page["candidate"]["evidence"]["nodes"] == 1).then_some(())
    })
    .await;
}
