//! What becomes of files: taken as a whole or not at all.

use crate::harness::{Served, as_str, cluster, endpoints, eventually, everything, routes};
use outrigger_xds::subscription::Kind;
use std::{fs, os::unix::fs::symlink};

async fn problems(served: &Served) -> String {
    served.json("/sources").await["sources"][0]["problems"].to_string()
}

/// Until this is said of what is wrong.
async fn says(served: &Served, expected: &str) {
    let found = eventually(expected, async || {
        let problems = problems(served).await;
        problems.contains(expected).then_some(())
    });
    found.await;
}

#[tokio::test]
async fn what_changes_in_a_file_is_sent_and_nothing_else() {
    let files = everything();
    let served = Served::new("changes", &as_str(&files)).await;
    let mut client = served.delta("outrigger").await;
    client.want(Kind::Clusters, &[]).await;
    assert_eq!(client.take(None).await, "Clusters[a]");
    client.want(Kind::Endpoints, &["a"]).await;
    assert_eq!(client.take(None).await, "Endpoints[a]");
    // Replaced by a rename, the same in other words: no news. A comment changes no byte of a resource.
    served.put("clusters.yaml", &format!("# the same\n- {}", cluster("a")));
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(client.take(None).await, "Endpoints[a]");
    client.is_quiet().await;
    // Written in place.
    fs::write(served.directory.join("endpoints.yaml"), endpoints("a", 3)).unwrap();
    assert_eq!(client.take(None).await, "Endpoints[a]");
    // A second cluster in a file of its own, as JSON, with what it needs; two documents in one file.
    let more = format!("{}\n---\n{}\n", cluster("b"), endpoints("b", 4));
    served.put("more.yml", &more);
    assert_eq!(client.take(None).await, "Clusters[b]");
    fs::remove_file(served.directory.join("more.yml")).unwrap();
    assert_eq!(client.take(None).await, "Clusters[] -[b]");
}

#[tokio::test]
async fn a_bad_file_keeps_the_last_good_state_and_says_why() {
    let files = everything();
    let served = Served::new("bad", &as_str(&files)).await;
    let mut client = served.delta("outrigger").await;
    client.want(Kind::Endpoints, &["a"]).await;
    assert_eq!(client.take(None).await, "Endpoints[a]");
    served.put("endpoints.yaml", "[{");
    says(&served, "not valid YAML").await;
    served.put(
        "endpoints.yaml",
        &endpoints("a", 0).replace("cluster_name", "claster_name"),
    );
    says(&served, "no such field: 'claster_name'").await;
    served.put("endpoints.yaml", "short: resource");
    says(&served, "neither a resource with '@type'").await;
    let (_, stats) = served.get("/stats/prometheus").await;
    assert!(
        stats.contains("outrigger_control_plane_loads_total{result=\"bad\"}"),
        "{stats}"
    );
    assert_eq!(served.get("/ready").await.0, 200);
    client.is_quiet().await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(client.take(None).await, "Endpoints[a]");
    assert_eq!(problems(&served).await, "[]");
}

#[tokio::test]
async fn what_is_named_must_exist_and_only_once() {
    let files = everything();
    let served = Served::new("references", &as_str(&files)).await;
    served.put("routes.yaml", &routes("nowhere"));
    says(
        &served,
        "route_configuration 'table' names the cluster 'nowhere', which does not exist",
    )
    .await;
    let lenient = routes("nowhere").replace("name: table", "name: table, validate_clusters: false");
    served.put("routes.yaml", &lenient);
    eventually("it is taken", async || {
        (problems(&served).await == "[]").then_some(())
    })
    .await;
    served.put(
        "routes.yaml",
        &routes("a").replace("name: table", "name: other"),
    );
    says(
        &served,
        "listener 'edge' names the route_configuration 'table'",
    )
    .await;
    served.put("routes.yaml", &routes("a"));
    served.put("twice.yaml", &cluster("a"));
    says(&served, "is also in").await;
    served.put("twice.yaml", &cluster("b"));
    says(&served, "cluster 'b' names the cluster_load_assignment 'b'").await;
}

#[tokio::test]
async fn a_directory_that_looks_unmounted_takes_nothing_away() {
    let served = Served::new("empty", &[("a.yaml", &endpoints("a", 1))]).await;
    let mut client = served.delta("outrigger").await;
    client.want(Kind::Endpoints, &["a"]).await;
    assert_eq!(client.take(None).await, "Endpoints[a]");
    fs::remove_file(served.directory.join("a.yaml")).unwrap();
    says(&served, "holds no resources").await;
    fs::remove_dir_all(&served.directory).unwrap();
    says(&served, "cannot be read").await;
    client.is_quiet().await;
    fs::create_dir_all(&served.directory).unwrap();
    served.put("none.yaml", "resources: []");
    assert_eq!(client.take(None).await, "Endpoints[] -[a]");
}

/// As Kubernetes swaps what is in a ConfigMap.
#[tokio::test]
async fn a_swap_of_links_is_seen() {
    let served = Served::new("links", &[("first.yaml", "resources: []")]).await;
    let at = |name: &str| served.directory.join(name);
    for (version, port) in [("..v1", 1), ("..v2", 2)] {
        fs::create_dir_all(at(version)).unwrap();
        fs::write(at(version).join("a.yaml"), endpoints("a", port)).unwrap();
    }
    let mut client = served.delta("outrigger").await;
    client.want(Kind::Endpoints, &["a"]).await;
    assert_eq!(client.take(None).await, "Endpoints[] -[a]");
    symlink("..v1", at("..data")).unwrap();
    symlink("..data/a.yaml", at("a.yaml")).unwrap();
    assert_eq!(client.take(None).await, "Endpoints[a]");
    symlink("..v2", at("..next")).unwrap();
    fs::rename(at("..next"), at("..data")).unwrap();
    assert_eq!(client.take(None).await, "Endpoints[a]");
}
