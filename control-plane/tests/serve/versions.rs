//! Versions that are kept: what is different, going back by hand, and what a restart finds.

use crate::harness::{
    Delta, Served, as_str, ask, cluster, endpoints, eventually, everything, node,
};
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::{core::v3::Node, endpoint::v3::ClusterLoadAssignment},
        service::discovery::v3::DeltaDiscoveryResponse,
    },
};
use prost::Message;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Of a test, empty.
pub(crate) fn state(test: &str) -> PathBuf {
    let state = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("state-{test}"));
    let _ = fs::remove_dir_all(&state);
    state
}

/// With versions that are kept, and steps of a rollout.
pub(crate) async fn served(test: &str, rollout: &[u8], step_s: u64) -> Served {
    let files = everything();
    Served::with(test, &as_str(&files), |options| {
        options.state = Some(state(test));
        options.rollout = rollout.to_vec();
        options.rollout_step_s = step_s;
    })
    .await
}

/// The one port in an answer with the endpoints of a cluster.
pub(crate) fn port(answer: &DeltaDiscoveryResponse) -> u16 {
    assert_eq!(answer.type_url, Kind::Endpoints.type_url());
    let any = answer.resources[0].resource.as_ref().unwrap();
    let text = format!("{:?}", ClusterLoadAssignment::decode(&*any.value).unwrap());
    let (_, rest) = text.split_once("PortValue(").unwrap();
    rest[..rest.find(')').unwrap()].parse().unwrap()
}

/// A client that has the cluster and asked for its endpoints.
pub(crate) async fn client(served: &Served, id: &str) -> Delta {
    let who = Node {
        id: id.into(),
        ..node("outrigger")
    };
    let mut client = served.delta_of(who).await;
    client.want(Kind::Endpoints, &["a"]).await;
    client
}

/// Answered, with this or with an error.
pub(crate) async fn takes(client: &mut Delta, error: Option<&str>) -> u16 {
    let answer = client.next().await;
    client.answer(&answer, error).await;
    port(&answer)
}

/// Number and state of all versions, the oldest first.
pub(crate) async fn states(served: &Served) -> String {
    let page = served.json("/versions").await;
    let versions = page["versions"].as_array().unwrap().iter().rev();
    let texts = versions.map(|it| format!("{} {}", it["version"], it["state"].as_str().unwrap()));
    texts.collect::<Vec<_>>().join(", ")
}

pub(crate) async fn says_states(served: &Served, expected: &str) {
    eventually(expected, async || {
        (states(served).await == expected).then_some(())
    })
    .await;
}

async fn against_sources(served: &Served) -> String {
    let page = served.json("/sources").await;
    page["not_as_sources_say"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[tokio::test]
async fn a_rollback_holds_until_the_directory_changes_or_it_is_resumed() {
    let served = served("rollback", &[100], 60).await;
    let mut client = client(&served, "n").await;
    assert_eq!(takes(&mut client, None).await, 1);
    for port in [2, 3] {
        served.put("endpoints.yaml", &endpoints("a", port));
        assert_eq!(takes(&mut client, None).await, port);
    }
    assert_eq!(states(&served).await, "1 past, 2 past, 3 live");
    assert_eq!(served.post("/rollback?version=1").await.0, 200);
    assert_eq!(takes(&mut client, None).await, 1);
    assert_eq!(states(&served).await, "1 live, 2 past, 3 rolled back");
    assert!(
        against_sources(&served)
            .await
            .contains("version 1 was chosen by hand")
    );
    // A file that says the same does not end it, and neither does a restart.
    served.put(
        "endpoints.yaml",
        &format!("# the same\n{}", endpoints("a", 3)),
    );
    client.is_quiet().await;
    let served = served.restarted(|_| {}).await;
    let mut again = self::client(&served, "n").await;
    assert_eq!(takes(&mut again, None).await, 1);
    assert_eq!(states(&served).await, "1 live, 2 past, 3 rolled back");
    assert!(against_sources(&served).await.contains("chosen by hand"));
    assert_eq!(served.post("/resume").await.0, 200);
    assert_eq!(takes(&mut again, None).await, 3);
    assert_eq!(against_sources(&served).await, "");
    assert_eq!(
        states(&served).await,
        "1 past, 2 past, 3 rolled back, 4 live"
    );
    assert_eq!(served.post("/rollback?version=2").await.0, 200);
    assert_eq!(takes(&mut again, None).await, 2);
    served.put("endpoints.yaml", &endpoints("a", 5));
    assert_eq!(takes(&mut again, None).await, 5);
    assert_eq!(against_sources(&served).await, "");
}

#[tokio::test]
async fn only_this_machine_changes_something_and_only_by_post() {
    let served = served("post", &[100], 60).await;
    let admin = served.running.admin;
    let refused = ask(
        admin,
        http::Request::post("/rollback?version=1").header("origin", "http://x"),
    )
    .await;
    assert_eq!(refused.0, 403, "{}", refused.1);
    assert_eq!(served.get("/rollback?version=1").await.0, 404);
    assert_eq!(served.post("/versions").await.0, 405);
    assert_eq!(served.post("/rollback").await.0, 400);
    let unknown = served.post("/rollback?version=7").await;
    assert_eq!(unknown, (404, "there is no version 7\n".to_owned()));
    assert_eq!(served.post("/rollback?version=1").await.0, 200);
    served.put("clusters.yaml", "[{");
    let what = "what the sources say is not good: see /sources\n";
    eventually("it is not good", async || {
        (served.post("/resume").await == (409, what.to_owned())).then_some(())
    })
    .await;
}

/// After a restart, what was live is served whatever became of the directory.
#[tokio::test]
async fn a_directory_that_is_bad_at_a_restart_takes_nothing_away() {
    let served = served("bad-restart", &[100], 60).await;
    assert_eq!(states(&served).await, "1 live");
    let spoil = |directory: &Path| fs::write(directory.join("endpoints.yaml"), "[{").unwrap();
    let served = served.restarted(spoil).await;
    assert_eq!(served.get("/ready").await.0, 200);
    let mut client = client(&served, "n").await;
    assert_eq!(takes(&mut client, None).await, 1);
    served.put("endpoints.yaml", &endpoints("a", 2));
    assert_eq!(takes(&mut client, None).await, 2);
    assert_eq!(states(&served).await, "1 past, 2 live");
}

#[tokio::test]
async fn without_a_state_versions_are_forgotten() {
    let files = everything();
    let served = Served::with("memory", &as_str(&files), |options| {
        options.versions_max = 2
    })
    .await;
    let mut client = client(&served, "n").await;
    assert_eq!(takes(&mut client, None).await, 1);
    for port in [2, 3] {
        served.put("endpoints.yaml", &endpoints("a", port));
        assert_eq!(takes(&mut client, None).await, port);
    }
    assert_eq!(states(&served).await, "2 past, 3 live");
    assert_eq!(served.json("/sources").await["store"]["kept"], "in memory");
    let served = served.restarted(|_| {}).await;
    assert_eq!(states(&served).await, "1 live");
}

/// The command line, against a control plane that runs.
async fn command(served: &Served, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-control-plane"));
    command.args(arguments);
    command.args(["--admin", &served.running.admin.to_string()]);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.success(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[tokio::test]
async fn the_command_line_shows_differences_and_goes_back() {
    let served = served("command", &[100], 60).await;
    let mut clients = [client(&served, "n1").await, client(&served, "n2").await];
    for client in &mut clients {
        assert_eq!(takes(client, None).await, 1);
    }
    served.put(
        "more.yaml",
        &format!("[{}, {}]", cluster("b"), endpoints("b", 7)),
    );
    served.put("endpoints.yaml", &endpoints("a", 2));
    says_states(&served, "1 past, 2 live").await;
    let difference = "\
~ ClusterLoadAssignment a
    endpoints[0].lb_endpoints[0].endpoint.address.socket_address.port_value: 1 -> 2
+ ClusterLoadAssignment b
+ Cluster b
2 added, 0 removed, 1 changed
";
    let mut lines: Vec<&str> = difference.lines().collect();
    lines.sort_unstable();
    let (is_good, out, error) = command(&served, &["diff", "1", "2"]).await;
    assert!(is_good, "{error}");
    let mut told: Vec<&str> = out.lines().collect();
    told.sort_unstable();
    assert_eq!(told, lines, "{out}");
    let (is_good, _, error) = command(&served, &["diff", "1", "9"]).await;
    assert_eq!(
        (is_good, error.as_str()),
        (false, "there is no version 9\n")
    );
    let (is_good, out, _) = command(&served, &["versions"]).await;
    assert!(is_good);
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(out.contains("+ Cluster b"), "{out}");
    // A dry run: nothing is sent, and no version is made.
    let dry = served.directory.with_extension("dry");
    let _ = fs::remove_dir_all(&dry);
    fs::create_dir_all(&dry).unwrap();
    let files = everything();
    for (name, text) in as_str(&files) {
        fs::write(dry.join(name), text).unwrap();
    }
    let (is_good, out, error) =
        command(&served, &["diff", "--config", dry.to_str().unwrap()]).await;
    assert!(is_good, "{error}");
    assert!(out.contains("0 added, 2 removed, 1 changed"), "{out}");
    let nodes = "2 of 2 connected nodes would be sent something: n1, n2\n";
    assert!(out.ends_with(nodes), "{out}");
    assert_eq!(states(&served).await, "1 past, 2 live");
    let same = served.directory.to_str().unwrap();
    let (_, out, _) = command(&served, &["diff", "--config", same]).await;
    let nothing = "0 added, 0 removed, 0 changed\n0 of 2 connected nodes would be sent something\n";
    assert_eq!(out, nothing);
    fs::remove_file(dry.join("endpoints.yaml")).unwrap();
    let (is_good, _, error) = command(&served, &["diff", "--config", dry.to_str().unwrap()]).await;
    assert!(
        !is_good && error.contains("names the cluster_load_assignment 'a'"),
        "{error}"
    );
    let (is_good, _, error) = command(&served, &["rollback", "1"]).await;
    assert!(is_good, "{error}");
    assert_eq!(takes(&mut clients[0], None).await, 2);
    assert_eq!(takes(&mut clients[0], None).await, 1);
    let (is_good, _, error) = command(&served, &["resume"]).await;
    assert!(is_good, "{error}");
    assert_eq!(takes(&mut clients[0], None).await, 2);
}
