//! The program itself: what it prints about good and bad files, and its exit code.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn dir(test: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    fs::create_dir_all(&dir).expect("temp dir");
    dir
}

fn validate(files: &[&Path]) -> (Option<i32>, String) {
    let program = env!("CARGO_BIN_EXE_outrigger-control-plane");
    let Output { status, stdout, .. } = Command::new(program)
        .arg("validate")
        .args(files)
        .output()
        .expect("runs");
    (status.code(), String::from_utf8(stdout).expect("UTF-8"))
}

#[test]
fn good_files_are_good_in_both_syntaxes() {
    let dir = dir("good");
    let (yaml, json) = (dir.join("a.yaml"), dir.join("a.json"));
    fs::write(&yaml, "node: {id: a}\nstatic_resources: {}\n").expect("written");
    fs::write(&json, r#"{"node": {"id": "a"}, "staticResources": {}}"#).expect("written");
    let (code, printed) = validate(&[&yaml, &json]);
    assert_eq!(code, Some(0), "{printed}");
    assert_eq!(
        printed,
        format!("{}: OK\n{}: OK\n", yaml.display(), json.display())
    );
}

#[test]
fn everything_wrong_is_printed_and_the_exit_code_says_so() {
    let dir = dir("bad");
    let (bad, good, missing) = (
        dir.join("bad.yaml"),
        dir.join("good.yaml"),
        dir.join("missing.yaml"),
    );
    let text = "node: {id: 5}\nbogus: 1\nstatic_resources:\n  clusters:\n  - {name: a, lb_policy: CLUSTER_PROVIDED}\n";
    fs::write(&bad, text).expect("written");
    fs::write(&good, "{}").expect("written");
    let (code, printed) = validate(&[&bad, &good, &missing]);
    assert_eq!(code, Some(1), "{printed}");
    let (bad, good, missing) = (bad.display(), good.display(), missing.display());
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 5, "{printed}");
    for want in [
        format!("{bad}: no such field: 'bogus'"),
        format!("{bad}: node.id: expected a string, got 5"),
        format!(
            "{bad}: static_resources.clusters[0].lb_policy: CLUSTER_PROVIDED: only in a cluster of type ORIGINAL_DST"
        ),
        format!("{good}: OK"),
    ] {
        assert!(lines.contains(&want.as_str()), "{want:?} in {printed}");
    }
    assert!(
        lines[4].starts_with(&format!("{missing}: cannot be read: ")),
        "{printed}"
    );
}

#[test]
fn no_file_is_a_usage_error() {
    assert_eq!(validate(&[]).0, Some(2));
}

#[test]
fn a_directory_is_judged_as_a_whole() {
    let dir = dir("resources");
    let cluster = "\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster\nname: a\ntype: EDS\neds_cluster_config: {eds_config: {ads: {}}}\n";
    let endpoints = "- {\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: a}\n";
    fs::write(dir.join("a.yaml"), cluster).expect("written");
    let _ = fs::remove_file(dir.join("b.yaml"));
    let (code, printed) = validate(&[&dir]);
    let expected = format!(
        "{}: cluster 'a' names the cluster_load_assignment 'a', which does not exist\n",
        dir.join("a.yaml").display()
    );
    assert_eq!((code, printed), (Some(1), expected));
    fs::write(dir.join("b.yaml"), endpoints).expect("written");
    let (code, printed) = validate(&[&dir]);
    assert_eq!(
        (code, printed),
        (Some(0), format!("{}: OK\n", dir.display()))
    );
}
