//! What documents become, by example; what is refused; what does not matter.

use super::*;
use crate::{
    registered,
    short::{self, SCHEMA},
};
use outrigger_xds::{
    load::Syntax,
    registry::{self, Registration},
    report::{EngineState, Model},
};
use std::{collections::BTreeMap, fs, path::Path};

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    fs::read_to_string(path.join(name)).expect("an example")
}

fn read(text: &str) -> Vec<Document> {
    short::read("f.yaml", text, Syntax::Yaml).unwrap_or_else(|problems| panic!("{problems}"))
}

fn secrets() -> BTreeSet<String> {
    ["front", "clients"].map(str::to_owned).into()
}

fn good(text: &str) -> Vec<Resource> {
    translate(&read(text), &secrets()).unwrap_or_else(|problems| panic!("{problems}"))
}

fn bad(text: &str) -> Vec<String> {
    let problems = translate(&read(text), &secrets()).expect_err("something is wrong");
    problems.0.iter().map(ToString::to_string).collect()
}

fn document(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: outrigger.dev/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

fn fleet(name: &str) -> String {
    document(
        "Fleet",
        name,
        "{pools: [{name: p, engines: [\"10.0.0.1:1\"]}]}",
    )
}

fn gateway(name: &str, more: &str) -> String {
    let spec = format!(
        "{{listeners: [{{address: \":80\"}}], routes: [{{fleet: a}}], accessLog: none{more}}}"
    );
    document("Gateway", name, &spec)
}

/// As people read it, for one proxy.
fn printed(text: &str, node: Option<&str>) -> String {
    let resources = good(text);
    output::print(&for_node(&resources, node), output::Format::Yaml)
}

/// `OUTRIGGER_GOLDEN=write` writes what is expected anew: look at what changed.
#[test]
fn short_resources_become_these_resources() {
    let simple = example("fleet.yaml").replace(
        "routes: [{fleet: chat}]",
        "routes: [{fleet: chat}]\n  accessLog: none",
    );
    let split = example("split.yaml").replace("tenantHeader", "accessLog: none\n  tenantHeader");
    for (name, text, node) in [
        ("gateway", &simple, None),
        ("sidecar", &simple, Some("a")),
        ("split", &split, None),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.yaml"));
        let printed = printed(text, node);
        if std::env::var_os("OUTRIGGER_GOLDEN").is_some_and(|value| value == "write") {
            fs::write(&path, &printed).expect("written");
        }
        let expected = fs::read_to_string(&path).unwrap_or_default();
        let lines = printed.lines().zip(expected.lines()).enumerate();
        for (number, (printed, expected)) in lines {
            assert_eq!(printed, expected, "{name}, line {}", number + 1);
        }
        assert_eq!(printed.len(), expected.len(), "{name}");
    }
}

#[test]
fn examples_are_good_and_the_common_case_is_short() {
    for name in ["fleet.yaml", "split.yaml", "complete.yaml"] {
        good(&example(name));
    }
    let lines = example("fleet.yaml").lines().count();
    assert!(lines <= 20, "{lines} lines");
}

#[test]
fn the_order_of_documents_and_the_names_of_files_do_not_matter() {
    let mut documents = read(&example("complete.yaml"));
    let first = bytes(&documents).expect("good");
    for turn in 0..2 * documents.len() {
        documents.rotate_left(1);
        if turn % 2 == 0 {
            documents.swap(0, 1);
        }
        for (number, document) in documents.iter_mut().enumerate() {
            document.origin.file = format!("{}.yaml", 9 - number);
            document.origin.document = 1;
        }
        assert!(bytes(&documents) == Ok(first.clone()), "turn {turn}");
    }
}

/// As it is sent, in order.
fn bytes(documents: &[Document]) -> Result<Vec<(Option<String>, Any)>, Problems> {
    let resources = made(documents, &secrets())?.into_iter();
    Ok(resources
        .map(|resource| (resource.node, resource.v3.to_any()))
        .collect())
}

/// Paths of all fields below a value, with `*` for what is in a list, and names of `nodes` left as they are.
fn fields(value: &Value, place: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields_of) => {
            for (name, value) in fields_of {
                let place = format!("{place}/{name}");
                found.insert(place.clone());
                fields(value, &place, found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                fields(item, &format!("{place}/{index}"), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A value without what stands at a pointer.
fn without(value: &Value, pointer: &str) -> Value {
    let mut value = value.clone();
    let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
    let parent = value.pointer_mut(parent).expect("a parent");
    parent.as_object_mut().expect("fields").remove(name);
    value
}

/// Nodes that registered, each with all but one of what the example chooses by.
fn strangers() -> Vec<Registration> {
    let mut said = [("embedder", "l4", "embedders"); 3];
    (said[0].0, said[1].1, said[2].2) = ("other", "other", "other");
    let numbered = said.into_iter().enumerate();
    let each = numbered.map(|(number, (model, gpu, cluster))| Registration {
        node: registry::Node {
            id: format!("n{number}"),
            address: registry::address(&format!("n{number}:1")).expect("an address"),
            cluster: cluster.into(),
            labels: [("gpu".to_owned(), gpu.to_owned())].into(),
            ..registry::Node::default()
        },
        engines: vec![registry::Engine {
            id: "e".into(),
            address: registry::address("e:1").expect("an address"),
            state: EngineState {
                models: vec![Model {
                    id: model.into(),
                    ..Model::default()
                }],
                ..EngineState::default()
            },
        }],
        ..Registration::default()
    });
    each.collect()
}

#[test]
fn every_field_is_in_the_complete_example_and_has_an_effect() {
    let text = example("complete.yaml");
    let values = outrigger_xds::load::documents(&text, Syntax::Yaml).expect("YAML");
    let translated = |values: &[Value]| -> Result<Vec<(Option<String>, Any)>, Problems> {
        let texts: Vec<String> = values.iter().map(Value::to_string).collect();
        let mut documents = short::read("f", &texts.join("\n---\n"), Syntax::Yaml)?;
        let nodes = strangers();
        registered::place(&mut documents, &nodes.iter().collect::<Vec<_>>());
        bytes(&documents)
    };
    let whole = translated(&values).unwrap_or_else(|problems| panic!("{problems}"));
    let mut seen = BTreeSet::new();
    for (index, value) in values.iter().enumerate() {
        let mut found = BTreeSet::new();
        fields(value, "", &mut found);
        for pointer in found {
            seen.extend(pointer.rsplit('/').next().map(str::to_owned));
            // A policy says the default here, so that another may say something else.
            if pointer.ends_with("/routing/policy") && value["metadata"]["name"] == "everything" {
                continue;
            }
            let mut changed = values.clone();
            changed[index] = without(value, &pointer);
            // Whole resources are no help in a message.
            let differs = translated(&changed) != Ok(whole.clone());
            assert!(differs, "document {index}: {pointer} has no effect");
        }
    }
    let schema: Value = serde_json::from_str(SCHEMA).expect("JSON");
    let mut missing = BTreeSet::new();
    properties(&schema, &mut |name| {
        if !seen.contains(name) {
            missing.insert(name.to_owned());
        }
    });
    assert_eq!(
        missing,
        BTreeSet::new(),
        "fields that the complete example lacks"
    );
}

fn properties(rule: &Value, take: &mut dyn FnMut(&str)) {
    match rule {
        Value::Object(words) => {
            for (word, value) in words {
                if word == "properties" {
                    value
                        .as_object()
                        .into_iter()
                        .flatten()
                        .for_each(|(name, _)| take(name));
                }
                properties(value, take);
            }
        }
        Value::Array(rules) => rules.iter().for_each(|rule| properties(rule, take)),
        _ => {}
    }
}

/// These problems and no others, each told by a part of its line.
fn refused(name: &str, text: &str, expected: &[&str]) {
    let found = bad(text);
    let is_expected = |line: &&String| expected.iter().any(|part| line.contains(part));
    let unexpected: Vec<_> = found.iter().filter(|line| !is_expected(line)).collect();
    assert!(unexpected.is_empty(), "{name}: {unexpected:#?}");
    for part in expected {
        assert!(
            found.iter().any(|line| line.contains(part)),
            "{name}: {part:?} in {found:#?}"
        );
    }
    assert_eq!(found.len(), expected.len(), "{name}: {found:#?}");
}

#[test]
fn fleets_that_do_not_fit_are_refused_with_their_places() {
    for (name, text, expected) in [
        (
            "a fleet fits together",
            document(
                "Fleet",
                "a",
                r#"{pools: [{name: p, role: prefill, engines: ["b:1", {address: "b:1"}, {address: "c:1", node: x}]}, {name: p, engines: ["d:1"]}], nodes: {y: "e:1", z: "e:1"}}"#,
            ),
            &[
                "spec.nodes.y: no engine is beside it",
                "spec.nodes.z: another node is at e:1",
                "spec.nodes.z: no engine is beside it",
                "spec.pools: there is a pool for prefill and none for decode",
                "spec.pools[0].engines[1]: b:1 is there twice",
                "spec.pools[0].engines[2].node: there is no 'x' in spec.nodes",
                "spec.pools[1].name: there is another pool p",
            ][..],
        ),
        (
            "a node stands in one zone, with one weight, in one fleet",
            document(
                "Fleet",
                "a",
                r#"{pools: [{name: p, engines: [{address: "b:1", node: x}]}, {name: q, weight: 2, engines: [{address: "b:2", node: x}]}], nodes: {x: "e:1"}}"#,
            ) + &document(
                "Fleet",
                "b",
                r#"{pools: [{name: p, engines: [{address: "b:1", node: x}]}], nodes: {x: "e:1"}, blockTokens: 16}"#,
            ),
            &[
                "document 1 (Fleet a): spec.nodes.x: its engines are in pools of different zones or weights",
                "document 2 (Fleet b): spec.blockTokens: Fleet a has 32, and a proxy knows one size",
                "document 2 (Fleet b): spec.nodes.x: Fleet a has this node, and a node is in one fleet",
            ],
        ),
        (
            "certificates are whole",
            document(
                "Fleet",
                "a",
                r#"{pools: [{name: p, engines: ["10.0.0.1:1"]}], peerTls: {certificate: f, secret: front, caSecret: x}}"#,
            ) + &gateway("g", "").replace(
                "\":80\"",
                "\":80\", tls: {key: k, ca: c, caSecret: clients}",
            ),
            &[
                "document 1 (Fleet a): spec.peerTls: secret stands for certificate and key: not beside them",
                "document 1 (Fleet a): spec.peerTls.caSecret: there is no secret 'x'",
                "document 1 (Fleet a): spec.pools[0].engines[0]: engines are spoken to in plain text: with peerTls only at a loopback address",
                "document 2 (Gateway g): spec.listeners[0].tls: caSecret stands for ca: not beside it",
                "document 2 (Gateway g): spec.listeners[0].tls: required: certificate and key, or secret",
            ],
        ),
        (
            "peers need somebody to believe",
            document(
                "Fleet",
                "a",
                r#"{pools: [{name: p, engines: ["127.0.0.1:1"]}], peerTls: {secret: front}}"#,
            ),
            &["spec.peerTls: required: ca or caSecret"],
        ),
    ] {
        refused(name, &text, expected);
    }
}

#[test]
fn policies_that_do_not_fit_are_refused_with_their_places() {
    for (name, text, expected) in [
        (
            "one policy counts",
            fleet("a")
                + &document("Policy", "p", "{fleets: [a, a]}")
                + &document("Policy", "q", "{fleets: [a]}")
                + &document(
                    "Policy",
                    "r",
                    "{tenants: [t, t], canary: {enabled: true}, rateLimits: {limits: [{name: l, tokensPerMinute: 1}, {name: l}]}}",
                )
                + &document(
                    "Policy",
                    "s",
                    "{tenants: [t], fleets: [a], rateLimits: {limits: [{name: l, requestsPerMinute: 1}]}}",
                )
                + &document("Policy", "t", "{}")
                + &document("Policy", "u", "{}"),
            &[
                "(Policy p): spec.fleets[1]: a is there twice",
                "(Policy q): spec.fleets: Policy p is for everybody's requests to Fleet a, too",
                "(Policy r): spec.canary: is asked of engines, whosever requests they serve: not with tenants",
                "(Policy r): spec.rateLimits.limits[1]: limits nothing",
                "(Policy r): spec.rateLimits.limits[1].name: Policy r has a limit 'l'",
                "(Policy r): spec.tenants[1]: 't' is there twice",
                "(Policy s): spec.rateLimits.limits[0].name: Policy r has a limit 'l'",
                "(Policy s): spec.tenants: Policy r is for tenant 't', too",
                "(Policy u): spec.fleets: Policy t is for everybody's requests to all fleets, too",
            ][..],
        ),
        (
            "a policy asks what a fleet can do",
            fleet("a")
                + &document(
                    "Policy",
                    "p",
                    "{routing: {policy: random}, split: {mode: always, topology: required}}",
                )
                + &document("Policy", "q", "{tenants: [t], routing: {policy: kv}}"),
            &[
                "(Policy p): spec.split.mode: always, and Fleet a has no pools for prefill and decode",
                "(Policy p): spec.split.topology: required needs routing by kv, which requests to Fleet a have not",
                "(Policy q): spec.routing.policy: kv where requests of others to Fleet a go by random: only kv and least_request go together",
                "(Policy q): spec.split.mode: always, and Fleet a has no pools for prefill and decode",
            ],
        ),
        (
            "what is left to Envoy's rules is looked at as well",
            fleet("a")
                + &document("Policy", "p", "{retries: {retryOn: [bogus]}}")
                + &gateway("g", ""),
            &[
                "(Gateway g): becomes envoy.config.route.v3.RouteConfiguration g: virtual_hosts[0].routes[0].route.retry_policy.retry_on: ",
            ],
        ),
    ] {
        refused(name, &text, expected);
    }
}

#[test]
fn gateways_that_do_not_fit_are_refused_with_their_places() {
    for (name, text, expected) in [
        (
            "what is referred to is there",
            document("Policy", "p", "{fleets: [b]}") + &gateway("g", ""),
            &[
                "document 2 (Gateway g): spec.routes[0].fleet: there is no Fleet a",
                "document 1 (Policy p): spec.fleets[0]: there is no Fleet b",
            ][..],
        ),
        (
            "a name is there once",
            fleet("a") + &fleet("a"),
            &[
                "document 2 (Fleet a): metadata.name: there is another Fleet a in f.yaml, document 1",
            ],
        ),
        (
            "a gateway tells apart what it has to",
            fleet("a")
                + &document("Policy", "p", "{tenants: [t]}")
                + &gateway("g", "")
                + &gateway("h", ", tenantHeader: Authorization").replace(":80", ":81"),
            &[
                "(Gateway g): spec.routes[0].fleet: Policy p tells tenants apart, and this gateway has no tenantHeader",
                "(Gateway h): spec.tenantHeader: authorization cannot be: Policy p names tenants",
            ],
        ),
        (
            "a gateway fits together",
            fleet("a")
                + &fleet("b")
                + &document(
                    "Gateway",
                    "inbound",
                    r#"{listeners: [{address: ":80"}, {name: x, address: "10.0.0.1:80"}, {name: x, address: ":81"}], routes: [{fleet: a, hosts: [h]}, {fleet: a}, {fleet: b, hosts: [h]}]}"#,
                )
                + &gateway("g", ", nodes: [n]"),
            &[
                "(Gateway inbound): metadata.name: inbound is the listener where peers arrive: call it otherwise",
                "(Gateway inbound): spec.listeners[0].address: Gateway g is at 0.0.0.0:80 already",
                "(Gateway inbound): spec.listeners[0].name: required where there are several listeners",
                "(Gateway inbound): spec.listeners[1].address: Gateway g is at 0.0.0.0:80 already",
                "(Gateway inbound): spec.listeners[2].name: another listener has this name",
                "(Gateway inbound): spec.routes[1].fleet: a has another route: write its hosts in one",
                "(Gateway inbound): spec.routes[2].hosts[0]: requests for 'h' go to a already",
            ],
        ),
    ] {
        refused(name, &text, expected);
    }
}

#[test]
fn gateways_of_different_nodes_may_share_an_address() {
    let both = fleet("a") + &gateway("g", ", nodes: [n]") + &gateway("h", ", nodes: [m, o]");
    let resources = good(&both);
    let names = |node: Option<&str>| -> Vec<String> {
        let of_node = for_node(&resources, node).into_iter();
        of_node
            .map(|resource| format!("{}:{}", resource.v3.rank(), resource.v3.name()))
            .collect()
    };
    assert_eq!(names(None), ["0:a", "1:a"]);
    assert_eq!(names(Some("n")), ["0:a", "1:a", "2:g", "3:g"]);
    assert_eq!(names(Some("o")), ["0:a", "1:a", "2:h", "3:h"]);
}

#[test]
fn what_is_meant_for_a_node_takes_the_place_of_what_is_for_all() {
    let resources = good(&example("fleet.yaml"));
    let duties = |node: Option<&str>| -> BTreeMap<String, Vec<String>> {
        let of_node = for_node(&resources, node).into_iter();
        let assignments = of_node.filter_map(|resource| match &resource.v3 {
            V3::Endpoints(assignment) => Some(assignment),
            V3::Cluster(_) | V3::Listener(_) | V3::Routes(_) => None,
        });
        let shown = |assignment: &ClusterLoadAssignment| {
            let endpoints = assignment.endpoints.iter();
            let each =
                endpoints.map(|endpoint| format!("{:?} {}", endpoint.duty(), endpoint.address));
            (assignment.cluster_name.clone(), each.collect())
        };
        assignments.map(shown).collect()
    };
    let all: Vec<String> = vec!["Peer 10.0.0.1:8081".into(), "Peer 10.0.0.2:8081".into()];
    assert_eq!(
        duties(None),
        BTreeMap::from([("chat".to_owned(), all.clone())])
    );
    assert_eq!(duties(Some("stranger")), duties(None));
    let own: Vec<String> = vec!["Engine 127.0.0.1:8000".into()];
    let near = vec![own[0].clone(), all[0].clone()];
    assert_eq!(
        duties(Some("b")),
        BTreeMap::from([("chat".to_owned(), near), ("chat/local".to_owned(), own)])
    );
}

#[test]
fn a_filter_that_only_some_requests_want_is_off_for_the_others() {
    let text = fleet("a")
        + &document("Policy", "p", "{migration: {enabled: false}}")
        + &document(
            "Policy",
            "q",
            "{tenants: [t], migration: {stall: 5s}, routing: {policy: least_request}}",
        )
        + &gateway("g", ", tenantHeader: X-Tenant");
    let printed: Vec<String> = printed(&text, None)
        .lines()
        .map(|line| line.trim().to_owned())
        .collect();
    let has = |lines: &[&str]| printed.windows(lines.len()).any(|window| window == lines);
    // In the chain: off, since everybody else's requests do without.
    assert!(has(&["disabled: true"]), "{printed:#?}");
    assert!(
        has(&["stall_ms: 5000.0"]) || has(&["stall_ms: 5000"]),
        "{printed:#?}"
    );
    assert!(
        has(&["- name: x-tenant"]) || has(&["name: x-tenant"]),
        "{printed:#?}"
    );
    let off = "'@type': type.googleapis.com/envoy.config.route.v3.FilterConfig";
    assert_eq!(
        printed.iter().filter(|line| *line == off).count(),
        1,
        "{printed:#?}"
    );
}
