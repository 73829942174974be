//! Who depends on whom, and on what of the outside.

use crate::{report, root};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

/// Direct dependencies from outside, all crates and kinds together.
const EXTERNAL_DEPENDENCIES_MAX: usize = 70;
/// Lines of a binary's main file: everything is in the library.
const MAIN_LINES_MAX: usize = 20;

/// Every edge between our crates that may exist, of whatever kind. `conformance` may use all of them.
const EDGES: &[(&str, &[&str])] = &[
    ("outrigger-xds", &[]),
    ("outrigger-filters", &["outrigger-xds"]),
    ("outrigger-gpu-agent", &["outrigger-xds"]),
    ("outrigger-control-plane", &["outrigger-xds"]),
    (
        "outrigger-proxy",
        &["outrigger-filters", "outrigger-gpu-agent", "outrigger-xds"],
    ),
];

/// Features of `gpu-agent` that a proxy may switch on: adapters, and hearing a feed over NATS (ADR 8).
const AGENT_FEATURES_OF_PROXY: &[&str] = &["engine", "nats"];
/// Features that a proxy must not get, also not through another.
const AGENT_FEATURES_NEVER: &[&str] = &["publish"];

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--offline",
            "--locked",
            "--no-deps",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn is_ours(name: &str) -> bool {
    name.starts_with("outrigger-")
}

#[test]
fn crates_depend_only_as_the_architecture_says() {
    let metadata = metadata();
    let allowed: BTreeMap<_, _> = EDGES.iter().copied().collect();
    let mut violations = Vec::new();
    let packages = list(&metadata, "packages");
    assert_eq!(
        packages.len(),
        EDGES.len() + 1,
        "a crate came or went: say in EDGES whom it may know"
    );
    for package in packages {
        let name = text(package, "name");
        let Some(edges) = allowed.get(name) else {
            continue;
        };
        for dependency in list(package, "dependencies") {
            let other = text(dependency, "name");
            if is_ours(other) && !edges.contains(&other) {
                violations.push(format!("{name}: must not depend on {other}"));
            }
        }
    }
    report(violations);
}

#[test]
fn the_proxy_takes_only_the_engine_side_of_the_agent() {
    let metadata = metadata();
    let package = |name: &str| {
        let found = list(&metadata, "packages")
            .iter()
            .find(|package| text(package, "name") == name);
        found.unwrap_or_else(|| panic!("no package {name}"))
    };
    let mut violations = Vec::new();
    let agent = package("outrigger-gpu-agent");
    let proxy = package("outrigger-proxy");
    let uses = list(proxy, "dependencies")
        .iter()
        .filter(|dependency| text(dependency, "name") == "outrigger-gpu-agent");
    for dependency in uses {
        if dependency["optional"] != true || dependency["uses_default_features"] != false {
            violations.push(
                "outrigger-proxy: gpu-agent must be optional and without its default features"
                    .into(),
            );
        }
        let asked: BTreeSet<&str> = list(dependency, "features")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        for feature in &asked {
            if !AGENT_FEATURES_OF_PROXY.contains(feature) {
                violations.push(format!(
                    "outrigger-proxy: switches on gpu-agent's feature '{feature}'"
                ));
            }
        }
        for feature in implied(agent, &asked) {
            if AGENT_FEATURES_NEVER.contains(&feature.as_str()) {
                violations.push(format!(
                    "outrigger-gpu-agent: what the proxy switches on implies '{feature}'"
                ));
            }
        }
    }
    let defaults = list(&proxy["features"], "default");
    if defaults.iter().filter_map(Value::as_str).ne(["standalone"]) {
        violations
            .push("outrigger-proxy: the default features are not exactly 'standalone'".into());
    }
    report(violations);
}

/// All features that `asked` switch on.
fn implied(package: &Value, asked: &BTreeSet<&str>) -> BTreeSet<String> {
    let mut all: BTreeSet<String> = BTreeSet::new();
    let mut waiting: Vec<String> = asked.iter().map(|feature| (*feature).to_owned()).collect();
    while let Some(feature) = waiting.pop() {
        let implied = list(&package["features"], &feature)
            .iter()
            .filter_map(Value::as_str);
        waiting.extend(
            implied
                .filter(|other| !other.contains([':', '/']))
                .map(str::to_owned)
                .filter(|other| !all.contains(other)),
        );
        all.insert(feature);
    }
    all
}

#[test]
fn dependencies_from_outside_are_few_and_from_the_registry() {
    let metadata = metadata();
    let mut external = BTreeSet::new();
    let mut violations = Vec::new();
    for package in list(&metadata, "packages") {
        for dependency in list(package, "dependencies")
            .iter()
            .filter(|dependency| !is_ours(text(dependency, "name")))
        {
            external.insert(text(dependency, "name").to_owned());
            if !text(dependency, "source").starts_with("registry+") {
                let name = text(dependency, "name");
                violations.push(format!(
                    "{}: '{name}' is not from the registry",
                    text(package, "name")
                ));
            }
        }
    }
    println!("direct dependencies from outside: {}", external.len());
    if external.len() > EXTERNAL_DEPENDENCIES_MAX {
        violations.push(format!(
            "{} direct dependencies from outside, at most {EXTERNAL_DEPENDENCIES_MAX}",
            external.len()
        ));
    }
    report(violations);
}

#[test]
fn crates_say_what_they_are_and_binaries_are_thin() {
    let metadata = metadata();
    let mut violations = Vec::new();
    for package in list(&metadata, "packages") {
        let name = text(package, "name");
        if text(package, "description").len() < 20 {
            violations.push(format!(
                "{name}: its Cargo.toml has no description that says which edge it breaks"
            ));
        }
        if ["core", "common", "util", "utils", "helpers"]
            .iter()
            .any(|word| name.ends_with(word))
        {
            violations.push(format!("{name}: a crate is named after what it does"));
        }
        let is_binary = |target: &&Value| list(target, "kind").iter().any(|kind| kind == "bin");
        for target in list(package, "targets").iter().filter(is_binary) {
            let path = text(target, "src_path");
            let lines = std::fs::read_to_string(path)
                .expect("a main file")
                .lines()
                .count();
            if lines > MAIN_LINES_MAX {
                violations.push(format!(
                    "{path}:1: {lines} lines, a main has at most {MAIN_LINES_MAX}"
                ));
            }
        }
    }
    report(violations);
}
