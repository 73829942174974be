//! Short resources beside Envoy's: each node is sent what is for it.

use crate::harness::{Delta, Served, cluster, endpoints, eventually, node};
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::config::{core::v3::Node, endpoint::v3::ClusterLoadAssignment},
};
use prost::Message;
use serde_json::{Value, json};

/// Two nodes with an engine each, and a gateway on all proxies; `LB` is how it balances.
const FLEET: &str = r#"
apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec:
  pools: [{name: all, engines: [{node: a, address: "127.0.0.1:8000"}, {node: b, address: "127.0.0.1:8000"}]}]
  nodes: {a: "10.0.0.1:8081", b: "10.0.0.2:8081"}
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {name: front}
spec: {listeners: [{address: ":8080"}], routes: [{fleet: chat}]}
---
apiVersion: outrigger.dev/v1
kind: Policy
metadata: {name: all}
spec: {routing: {policy: LB}}
"#;

fn fleet(policy: &str) -> String {
    FLEET.replace("LB", policy)
}

/// A fleet, and a cluster as Envoy's.
async fn served(test: &str) -> Served {
    let raw = format!("[{}, {}]", cluster("raw"), endpoints("raw", 1));
    let files = [("fleet.yaml", fleet("kv")), ("raw.yaml", raw)];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    Served::new(test, &files).await
}

async fn client(served: &Served, id: &str) -> Delta {
    let who = Node {
        id: id.into(),
        ..node("outrigger")
    };
    served.delta_of(who).await
}

/// Addresses that this client is told of the fleet.
async fn endpoints_of_the_fleet(client: &mut Delta) -> Vec<String> {
    client.want(Kind::Endpoints, &["chat"]).await;
    let answer = client.next().await;
    let any = answer.resources[0].resource.as_ref().unwrap();
    let assignment = ClusterLoadAssignment::decode(&*any.value).unwrap();
    let all = assignment.endpoints.iter().flat_map(|it| &it.lb_endpoints);
    let mut found: Vec<String> = all
        .map(|endpoint| {
            let text = format!("{endpoint:?}");
            let hosts = ["10.0.0.1", "10.0.0.2", "127.0.0.1"];
            let known = hosts.into_iter().find(|host| text.contains(*host));
            known.unwrap().to_owned()
        })
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn each_node_is_sent_what_is_for_it_and_all_that_is_envoys() {
    let served = served("nodes").await;
    let cases = [
        ("a", ["10.0.0.2", "127.0.0.1"]),
        ("b", ["10.0.0.1", "127.0.0.1"]),
        ("stranger", ["10.0.0.1", "10.0.0.2"]),
    ];
    for (id, hosts) in cases {
        let mut client = client(&served, id).await;
        let is_named = id != "stranger";
        client.want(Kind::Clusters, &[]).await;
        let clusters = client.take(None).await;
        let (some, none) = ("Clusters[chat chat/local raw]", "Clusters[chat raw]");
        assert_eq!(clusters, if is_named { some } else { none }, "{id}");
        assert_eq!(endpoints_of_the_fleet(&mut client).await, hosts, "{id}");
        let dump = served.json(&format!("/config_dump?node={id}")).await;
        let shown = if is_named { id.into() } else { Value::Null };
        assert_eq!(dump["node"], shown, "{id}");
        let has_inbound = dump.to_string().contains("\"inbound\"");
        assert_eq!(has_inbound, is_named, "{dump}");
    }
}

#[tokio::test]
async fn the_node_of_a_dump_may_be_written_with_percent_signs() {
    let served = served("percent").await;
    for (asked, node) in [
        ("%61", json!("a")),
        ("%6", Value::Null),
        ("%61%", Value::Null),
    ] {
        let dump = served.json(&format!("/config_dump?node={asked}")).await;
        assert_eq!(dump["node"], node, "{asked}");
    }
}

/// Until this is said of what is wrong.
async fn says(served: &Served, expected: &str) {
    eventually(expected, async || {
        let problems = served.json("/sources").await["sources"][0]["problems"].to_string();
        problems.contains(expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_policy_that_changes_is_sent_and_one_that_is_wrong_is_not() {
    let served = served("policy").await;
    let mut clients = [
        client(&served, "a").await,
        client(&served, "stranger").await,
    ];
    for client in &mut clients {
        client.want(Kind::Clusters, &[]).await;
        client.take(None).await;
    }
    // The same in other words is no news; nor is what cannot be.
    served.put("fleet.yaml", &format!("# the same\n{}", fleet("kv")));
    served.put("fleet.yaml", &fleet("luck"));
    says(&served, "document 3 (Policy all): spec.routing.policy").await;
    let missing = fleet("kv").replace("fleet: chat", "fleet: nowhere");
    served.put("fleet.yaml", &missing);
    says(&served, "there is no Fleet nowhere").await;
    served.put(
        "twice.yaml",
        &format!("[{}, {}]", cluster("chat"), endpoints("chat", 1)),
    );
    served.put("fleet.yaml", &fleet("kv"));
    says(&served, "(Fleet chat): cluster 'chat' is also in").await;
    for client in &mut clients {
        client.is_quiet().await;
    }
    std::fs::remove_file(served.directory.join("twice.yaml")).unwrap();
    served.put("fleet.yaml", &fleet("round_robin"));
    assert_eq!(clients[0].take(None).await, "Clusters[chat chat/local]");
    assert_eq!(clients[1].take(None).await, "Clusters[chat]");
}
