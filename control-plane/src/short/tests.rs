//! What is read, and what is refused, with its place.

use super::*;
use std::collections::BTreeSet;

fn problems(text: &str) -> Vec<String> {
    match read("f.yaml", text, Syntax::Yaml) {
        Ok(documents) => panic!("{documents:?}"),
        Err(problems) => problems.0.iter().map(ToString::to_string).collect(),
    }
}

/// A document of this kind with this `spec`, in YAML's flow style.
fn of(kind: &str, spec: &str) -> String {
    format!("apiVersion: outrigger.dev/v1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {spec}\n")
}

#[test]
fn documents_are_read_in_both_syntaxes() {
    let spec = r#"{"pools": [{"name": "p", "engines": ["[::1]:1", {"address": "b:2", "node": "n"}]}], "nodes": {"n": "c:3"}}"#;
    let json = format!(
        r#"{{"apiVersion": "outrigger.dev/v1", "kind": "Fleet", "metadata": {{"name": "a"}}, "spec": {spec}}}"#
    );
    let mut read_json = read("f", &json, Syntax::Json).unwrap();
    let yaml = format!("---\n---\n{}", of("Fleet", spec));
    let read_yaml = read("f", &yaml, Syntax::Yaml).unwrap();
    assert_eq!(read_json, read_yaml);
    let document = read_json.remove(0);
    assert_eq!(document.origin.to_string(), "document 1 (Fleet a)");
    let Spec::Fleet(fleet) = document.spec else {
        panic!("{document:?}");
    };
    assert_eq!(fleet.block_tokens, 32);
    let [short, long] = &fleet.pools[0].engines[..] else {
        panic!("{fleet:?}");
    };
    assert_eq!((&*short.address.0.host, short.address.0.port), ("::1", 1));
    assert_eq!(long.node.as_deref(), Some("n"));
    assert_eq!(fleet.nodes["n"].address.to_string(), "c:3");
}

#[test]
fn everything_wrong_is_told_at_once_with_file_document_and_place() {
    let bad = "{pools: [{name: Up, role: encode, weight: 0, engines: [a, {address: 5, bogus: 1}, [x]]}, {engines: []}], blockTokens: 1.5}";
    let text = format!(
        "{}---\n{}",
        of("Fleet", bad),
        of("Policy", "{timeouts: {total: 5 minutes}}")
    );
    let found = read("f.yaml", &text, Syntax::Yaml).unwrap_err();
    let lines = found.to_string();
    let lines: Vec<_> = lines.lines().collect();
    for want in [
        "f.yaml: document 1 (Fleet a): spec.pools[0].name: expected lower-case letters, digits, '-' and '.' between them, got 'Up'",
        "f.yaml: document 1 (Fleet a): spec.pools[0].role: expected one of both, prefill, decode, got \"encode\"",
        "f.yaml: document 1 (Fleet a): spec.pools[0].weight: must be at least 1, got 0",
        "f.yaml: document 1 (Fleet a): spec.pools[0].engines[0]: expected HOST:PORT, got 'a'",
        "f.yaml: document 1 (Fleet a): spec.pools[0].engines[1].address: expected a text, got 5",
        "f.yaml: document 1 (Fleet a): spec.pools[0].engines[1]: no such field: 'bogus'",
        "f.yaml: document 1 (Fleet a): spec.pools[0].engines[2]: expected a text or fields, got a list",
        "f.yaml: document 1 (Fleet a): spec.pools[1].name: required",
        "f.yaml: document 1 (Fleet a): spec.pools[1].engines: must not be empty",
        "f.yaml: document 1 (Fleet a): spec.blockTokens: expected a whole number, got 1.5",
        "f.yaml: document 2 (Policy a): spec.timeouts.total: expected a time such as 30s, 250ms, 5m or 1h, got '5 minutes'",
    ] {
        assert!(lines.contains(&want), "{want:?} in {lines:#?}");
    }
    assert_eq!(lines.len(), 11, "{lines:#?}");
}

#[test]
fn what_is_no_short_resource_is_told_from_one_that_is_wrong() {
    assert!(!is_short("node: {id: a}", Syntax::Yaml));
    assert!(!is_short("{", Syntax::Yaml));
    assert!(is_short(
        "apiVersion: outrigger.dev/v2\nkind: Fleet",
        Syntax::Yaml
    ));
    assert_eq!(
        problems("apiVersion: outrigger.dev/v2\nkind: Fleet"),
        ["document 1: apiVersion: expected outrigger.dev/v1, got 'outrigger.dev/v2'"]
    );
    assert_eq!(
        problems("apiVersion: outrigger.dev/v1\nkind: Pod"),
        ["document 1: kind: expected Fleet, Policy or Gateway, got 'Pod'"]
    );
    let twice = problems("a: 1\na: 2");
    assert!(twice[0].contains("'a' is written twice"), "{twice:?}");
}

#[test]
fn texts_that_mean_more_are_read_or_refused() {
    for (format, good, bad) in [
        (
            "address",
            &["a:1", "10.0.0.1:8000", "[::1]:1", "a.svc:65535"][..],
            &[
                "a",
                "a:0",
                "a:65536",
                "a:+1",
                ":1",
                "::1:1",
                "http://a:1",
                "a b:1",
                "",
            ][..],
        ),
        (
            "listen",
            &[":80", "0.0.0.0:0", "[::]:1", "127.0.0.1:1"],
            &["a:1", "80", "[a]:1", "[::1:1"],
        ),
        (
            "duration",
            &["0s", "250ms", "5m", "1h", "8760h"],
            &[
                "",
                "5",
                "s",
                "-1s",
                "1.5s",
                "1 s",
                "8761h",
                "99999999999999999999s",
                "1d",
            ],
        ),
        (
            "name",
            &["a", "a-1.b"],
            &["", "A", "a_b", "-a", "a.", "a/b"],
        ),
        ("node", &["a", "Host:8081"], &["", "a b", "a/b"]),
        (
            "host",
            &["*", "a.example", "*.example", "a.*", "a:8080"],
            &["", "A", "a*", "*a", "a*b", "**", "a b", "a/b"],
        ),
        ("header", &["x-tenant"], &["", "a b", "a:"]),
        (
            "part",
            &["tenant", "model", "header:x-a"],
            &["header:", "headers", "user"],
        ),
    ] {
        for text in good {
            assert_eq!(text::check(format, text), Ok(()), "{format} {text}");
        }
        for text in bad {
            let message = text::check(format, text).unwrap_err();
            assert!(message.ends_with(&format!("got '{text}'")), "{message}");
        }
    }
    assert!(text::check("bogus", "").is_err());
}

#[test]
fn what_a_node_binds_has_its_place_when_it_is_wrong() {
    let fleet = |listen: &str| {
        let spec = format!(
            "{{pools: [{{name: p, engines: ['127.0.0.1:1']}}], nodes: {{n: {{address: 'h:1', listen: '{listen}'}}}}}}"
        );
        read("f.yaml", &of("Fleet", &spec), Syntax::Yaml)
    };
    for good in [":8081", "0.0.0.0:8081", "[::]:8081"] {
        assert!(fleet(good).is_ok(), "{good}");
    }
    let problems = fleet("localhost:8081").unwrap_err().to_string();
    assert!(
        problems.contains("spec.nodes.n.listen: expected IP:PORT or :PORT"),
        "{problems}"
    );
}

/// What is a keyword, and what is a name that somebody chose.
fn keywords(rule: &Value, found: &mut BTreeSet<String>) {
    for (word, value) in rule.as_object().into_iter().flatten() {
        found.insert(word.clone());
        match word.as_str() {
            "properties" | "$defs" => {
                let rules = value.as_object().into_iter().flatten();
                rules.for_each(|(_, rule)| keywords(rule, found));
            }
            "oneOf" => value
                .as_array()
                .unwrap()
                .iter()
                .for_each(|rule| keywords(rule, found)),
            "items" | "additionalProperties" => keywords(value, found),
            _ => {}
        }
    }
}

#[test]
fn the_schema_says_nothing_that_is_not_checked() {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let mut found = BTreeSet::new();
    keywords(&schema, &mut found);
    let checked = [
        "$ref",
        "additionalProperties",
        "const",
        "enum",
        "format",
        "items",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "oneOf",
        "properties",
        "required",
        "type",
    ];
    let for_people = ["$defs", "$id", "$schema", "default", "description", "title"];
    let known: BTreeSet<String> = checked
        .iter()
        .chain(&for_people)
        .map(|word| (*word).to_owned())
        .collect();
    assert_eq!(found, known);
}
