//! The bootstraps under `deploy/` are valid, as the proxy itself judges them, and what they say they are.

use clap::Parser;
use outrigger_proxy::{bootstrap::from_options, options::Options};
use outrigger_xds::load::{self, Syntax};
use std::path::Path;

#[test]
fn every_bootstrap_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap");
    let mut checked = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let bootstrap = load::bootstrap(&text, Syntax::Yaml)
            .unwrap_or_else(|errors| panic!("{path:?}: {errors}"));
        outrigger_proxy::process::check(&bootstrap)
            .unwrap_or_else(|errors| panic!("{path:?}: {errors:?}"));
        checked += 1;
    }
    assert_eq!(checked, 2);
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
    // Line by line, so that a difference is one that a reader can find.
    let lines = |bootstrap| -> Vec<String> {
        serde_json::to_string_pretty(&load::bootstrap_to_json(bootstrap))
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    };
    let (written, flags) = (lines(&written), lines(&flags));
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

#[test]
fn a_route_to_nowhere_is_refused_with_its_place() {
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
