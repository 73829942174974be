//! The files under `deploy/` are valid, as the proxy itself judges them, and what they say they are.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

use clap::Parser;
use outrigger_control_plane::{
    short,
    translate::{Resource, V3, for_node, translate},
};
use outrigger_proxy::{bootstrap::from_options, options::Options};
use outrigger_xds::{
    load::{self, Syntax},
    resource::{
        bootstrap::{Bootstrap, Node},
        cluster::Discovery,
    },
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// What `outrigger-control-plane ca` issues to a node.
fn identity() -> PathBuf {
    let at = Path::new(env!("CARGO_TARGET_TMPDIR")).join("deploy-identity");
    let _ = std::fs::remove_dir_all(&at);
    let (ca, out) = (at.join("ca"), at.join("a"));
    let (ca, out_text) = (ca.to_str().unwrap(), out.to_str().unwrap());
    for words in [
        ["init", "--dir", ca, "--trust-domain", "fleet.example"].as_slice(),
        &["issue", "--dir", ca, "--node", "a", "--out", out_text],
    ] {
        let command = ["outrigger-control-plane", "ca"].iter().chain(words);
        let code = outrigger_control_plane::run(command.map(|word| (*word).into()));
        assert_eq!(code, std::process::ExitCode::SUCCESS, "{words:?}");
    }
    out
}

#[test]
fn every_bootstrap_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap");
    let identity = identity();
    let mut checked = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replace("/etc/outrigger/identity", identity.to_str().unwrap());
        let bootstrap = load::bootstrap(&text, Syntax::Yaml)
            .unwrap_or_else(|errors| panic!("{path:?}: {errors}"));
        outrigger_proxy::process::check(&bootstrap)
            .unwrap_or_else(|errors| panic!("{path:?}: {errors:?}"));
        checked += 1;
    }
    assert_eq!(checked, 3);
}

/// The command line that a file says it stands for: the comment line that names the program, and what continues it.
fn command(text: &str) -> Vec<String> {
    let comments: Vec<_> = text
        .lines()
        .map_while(|line| line.strip_prefix('#'))
        .collect();
    let first = comments
        .iter()
        .position(|line| line.trim_start().starts_with("outrigger-proxy "))
        .expect("a command line in the comment");
    let mut words = Vec::new();
    for line in &comments[first..] {
        let (line, goes_on) = match line.strip_suffix('\\') {
            Some(line) => (line, true),
            None => (*line, false),
        };
        words.extend(line.split_whitespace().map(str::to_owned));
        if !goes_on {
            break;
        }
    }
    words
}

#[test]
fn the_sidecar_is_what_its_flags_turn_into() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap/sidecar.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let written = load::bootstrap(&text, Syntax::Yaml).unwrap();
    let options = Options::try_parse_from(command(&text)).unwrap();
    let flags = from_options(&options).unwrap();
    assert_same(&written, &flags);
}

/// Line by line, so that a difference is one that a reader can find.
fn assert_same(written: &Bootstrap, flags: &Bootstrap) {
    let lines = |bootstrap| -> Vec<String> {
        serde_json::to_string_pretty(&load::bootstrap_to_json(bootstrap))
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    };
    let (written, flags) = (lines(written), lines(flags));
    let differs = written
        .iter()
        .zip(&flags)
        .position(|(written, flag)| written != flag);
    if let Some(at) = differs {
        let near = at.saturating_sub(8)..=at;
        panic!(
            "the file has {:#?}, the flags give {:#?}",
            &written[near.clone()],
            &flags[near]
        );
    }
    assert_eq!(written.len(), flags.len());
}

/// What short resources become for a node, as one bootstrap in which nothing comes from elsewhere.
fn assembled(resources: &[Resource], node: &str) -> Bootstrap {
    let (mut tables, mut assignments) = (BTreeMap::new(), BTreeMap::new());
    let mut bootstrap = Bootstrap {
        node: Node {
            id: node.into(),
            cluster: "outrigger".into(),
            ..Node::default()
        },
        ..Bootstrap::default()
    };
    for resource in for_node(resources, Some(node)) {
        match resource.v3.clone() {
            V3::Cluster(cluster) => bootstrap.clusters.push(*cluster),
            V3::Listener(listener) => bootstrap.listeners.push(*listener),
            V3::Endpoints(assignment) => {
                assignments.insert(assignment.cluster_name.clone(), assignment);
            }
            V3::Routes(table) => drop(tables.insert(table.name.clone(), table)),
        }
    }
    for cluster in &mut bootstrap.clusters {
        cluster.discovery = Discovery::Static;
        cluster.eds = None;
        cluster.load_assignment = assignments[&cluster.name].clone();
    }
    let listeners = bootstrap.listeners.iter_mut();
    for manager in listeners.flat_map(|listener| listener.http_managers_mut()) {
        let rds = manager.rds.take().unwrap();
        manager.route_config = tables[&rds.name].clone();
        manager.route_config.validate_clusters = true;
    }
    bootstrap
}

/// Other names for the same: a stand-alone proxy has one fleet and one gateway.
fn renamed(bootstrap: &Bootstrap) -> Bootstrap {
    let mut json = load::bootstrap_to_json(bootstrap).to_string();
    for (ours, flag) in [
        ("\"chat/local\"", "\"local\""),
        ("\"chat\"", "\"fleet\""),
        ("\"front\"", "\"outbound\""),
    ] {
        json = json.replace(ours, flag);
    }
    let mut renamed = load::bootstrap(&json, Syntax::Json).unwrap();
    for listener in &mut renamed.listeners {
        let is_inbound = listener.name == "inbound";
        for manager in listener.http_managers_mut() {
            manager.route_config.name = if is_inbound { "local" } else { "fleet" }.into();
            manager.route_config.virtual_hosts[0].name = "all".into();
        }
    }
    renamed
        .listeners
        .sort_by_key(|listener| listener.name == "inbound");
    renamed
}

fn example(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn translated(text: &str) -> Vec<Resource> {
    let documents =
        short::read("f.yaml", text, Syntax::Yaml).unwrap_or_else(|problems| panic!("{problems}"));
    let secrets = ["front", "clients"].map(str::to_owned).into();
    translate(&documents, &secrets).unwrap_or_else(|problems| panic!("{problems}"))
}

#[test]
fn a_fleet_of_short_resources_is_what_flags_turn_into() {
    let beside = "outrigger-proxy --engine http://127.0.0.1:8000 --inbound 10.0.0.1:8081 --peer http://10.0.0.2:8081 --node-id a";
    for (flags, policy) in [
        ("", ""),
        ("--canary on", "canary: {enabled: true}"),
        ("--policy round_robin", "routing: {policy: round_robin}"),
        ("--policy least_request", "routing: {policy: least_request}"),
        ("--policy random", "routing: {policy: random}"),
    ] {
        let words = beside.split(' ').chain(flags.split_terminator(' '));
        let flags = from_options(&Options::try_parse_from(words).unwrap()).unwrap();
        let mut text = example("fleet.yaml");
        if !policy.is_empty() {
            text += &format!(
                "---\napiVersion: outrigger.dev/v1\nkind: Policy\nmetadata: {{name: p}}\nspec: {{{policy}}}\n"
            );
        }
        let written = renamed(&assembled(&translated(&text), "a"));
        // The admin belongs to the bootstrap of a proxy, whoever tells it the rest.
        let flags = Bootstrap {
            admin: None,
            ..flags
        };
        assert_same(&written, &flags);
    }
}

#[test]
fn every_example_of_short_resources_is_what_a_proxy_takes() {
    for name in ["fleet.yaml", "split.yaml", "complete.yaml"] {
        let mut bootstrap = assembled(&translated(&example(name)), "a");
        // Certificates are on other machines.
        for listener in &mut bootstrap.listeners {
            listener.filter_chains[0].tls = None;
        }
        for cluster in &mut bootstrap.clusters {
            cluster.tls = None;
        }
        assert!(!bootstrap.listeners.is_empty(), "{name}");
        outrigger_proxy::process::check(&bootstrap)
            .unwrap_or_else(|errors| panic!("{name}: {errors:?}"));
    }
}

#[test]
fn an_unknown_field_of_a_filter_is_refused_by_name() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap");
    let text = std::fs::read_to_string(folder.join("sidecar.yaml")).unwrap();
    let broken = text.replace("decision_header: true", "no_such_weight: 1");
    let bootstrap = load::bootstrap(&broken, Syntax::Yaml).unwrap();
    let errors = outrigger_proxy::process::check(&bootstrap)
        .unwrap_err()
        .join("\n");
    assert!(
        errors.contains("kv_routing") && errors.contains("no_such_weight"),
        "{errors}"
    );
}
