//! Bootstraps as users write them: what is understood, and what is refused with which words at which place.

mod full;
mod full_routes;

use full::{FULL, full, outlier_detection};
use outrigger_xds::{
    load::{Syntax, bootstrap, bootstrap_from_value, bootstrap_to_json, config_dump},
    resource::{
        bootstrap::Bootstrap,
        cluster::{Balancing, LbPolicy, Reports},
        endpoint::Duty,
        latency_monitor::LatencyMonitor,
        listener::{AccessLog, AccessLogFormat, AccessLogSink, HttpConnectionManager},
        outlier_detection::OutlierDetection,
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::time::Duration;

const TYPED_STRUCT: &str = "type.googleapis.com/xds.type.v3.TypedStruct";
const MANAGER: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

/// The first connection manager.
fn manager(bootstrap: &mut Bootstrap) -> &mut HttpConnectionManager {
    let mut all = bootstrap.listeners.iter_mut();
    all.find_map(|listener| listener.http_managers_mut().next())
        .expect("a connection manager")
}

#[test]
fn a_full_bootstrap_means_what_it_says() {
    let read = bootstrap(FULL, Syntax::Yaml).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(read, full());
    assert_eq!(
        read.clusters[0].load_assignment.endpoints[0].duty(),
        Duty::Engine
    );
}

#[test]
fn what_is_shown_reads_back_equal() {
    for plain in [full(), Bootstrap::default()] {
        let shown = bootstrap_to_json(&plain);
        let text = serde_json::to_string(&shown).expect("JSON");
        assert_eq!(
            bootstrap(&text, Syntax::Json).unwrap_or_else(|errors| panic!("{errors}")),
            plain,
            "{text}"
        );
        // YAML is a superset of what we show.
        assert_eq!(
            bootstrap(&text, Syntax::Yaml).unwrap_or_else(|errors| panic!("{errors}")),
            plain,
            "{text}"
        );
    }
}

#[test]
fn weights_by_reports_and_late_tokens_read_back_equal() {
    let mut plain = full();
    let cluster = &mut plain.clusters[0];
    cluster.lb_policy = LbPolicy::ClientSideWeightedRoundRobin;
    cluster.balancing = Balancing {
        reports: Reports {
            blackout: Duration::from_secs(2),
            expiration: Duration::from_secs(60),
            update: Duration::from_millis(500),
            error_penalty: 2.5,
            metrics: vec!["named_metrics.a".into()],
        },
        ..Balancing::default()
    };
    cluster.outlier_detection = Some(OutlierDetection {
        latency: Some(LatencyMonitor {
            ttft_factor: 2.0,
            itl_factor: 2.5,
            enforcing: 50,
            ..LatencyMonitor::default()
        }),
        ..outlier_detection()
    });
    assert_eq!(
        bootstrap_from_value(bootstrap_to_json(&plain)).unwrap_or_else(|errors| panic!("{errors}")),
        plain
    );
}

#[test]
fn stderr_and_text_formats_read_back_equal() {
    let mut plain = full();
    let text = AccessLogFormat::Text(Some("%REQ(:PATH)%\n".into()));
    manager(&mut plain).access_log = vec![
        AccessLog {
            filter: None,
            sink: AccessLogSink::Stderr,
            format: text.clone(),
        },
        AccessLog {
            filter: None,
            sink: AccessLogSink::File("/tmp/log".into()),
            format: text,
        },
        AccessLog {
            filter: None,
            sink: AccessLogSink::Stdout,
            format: AccessLogFormat::Text(None),
        },
    ];
    assert_eq!(
        bootstrap_from_value(bootstrap_to_json(&plain)).unwrap_or_else(|errors| panic!("{errors}")),
        plain
    );
}

#[test]
fn a_dump_has_envoys_shape() {
    let dump = config_dump(&full(), "v1", "2026-01-02T03:04:05Z");
    let kinds: Vec<&str> = dump["configs"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|c| c["@type"].as_str())
        .collect();
    let prefix = "type.googleapis.com/envoy.admin.v3.";
    let want = [
        "BootstrapConfigDump",
        "ClustersConfigDump",
        "ListenersConfigDump",
        "RoutesConfigDump",
    ];
    assert_eq!(kinds, want.map(|kind| format!("{prefix}{kind}")));
    let cluster = &dump["configs"][1]["static_clusters"][0];
    assert_eq!(cluster["last_updated"], "2026-01-02T03:04:05Z");
    assert_eq!(
        cluster["cluster"]["@type"],
        "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    );
    assert_eq!(cluster["cluster"]["connect_timeout"], "0.500s");
    let manager = &dump["configs"][2]["static_listeners"][0]["listener"]["filter_chains"][0]["filters"]
        [0]["typed_config"];
    assert_eq!(manager["@type"], MANAGER);
    assert_eq!(
        manager["http_filters"][0]["typed_config"]["@type"],
        TYPED_STRUCT
    );
    assert_eq!(
        manager["http_filters"][0]["typed_config"]["value"]["block_tokens"],
        json!(32)
    );
    assert_eq!(
        dump["configs"][3]["static_route_configs"][0]["route_config"]["name"],
        "local"
    );
}

/// `FULL` as JSON with one place changed; `Value::Null` at the end of a pointer removes it.
fn changed(changes: &[(&str, Value)]) -> Value {
    let mut value = bootstrap_to_json(&full());
    for (pointer, new) in changes {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let parent = value
            .pointer_mut(parent)
            .unwrap_or_else(|| panic!("no {parent}"));
        match parent {
            Value::Object(fields) if new.is_null() => {
                assert!(fields.remove(key).is_some(), "{pointer} is there");
            }
            Value::Object(fields) => {
                fields.insert(key.to_owned(), new.clone());
            }
            Value::Array(list) if key == "-" => list.push(new.clone()),
            Value::Array(list) => list[key.parse::<usize>().expect("an index")] = new.clone(),
            other => panic!("{pointer} is in {other}"),
        }
    }
    value
}

fn problems(changes: &[(&str, Value)]) -> Vec<String> {
    let Err(errors) = bootstrap_from_value(changed(changes)) else {
        return vec![format!("taken: {changes:?}")];
    };
    errors.problems().iter().map(ToString::to_string).collect()
}

const L: &str = "/static_resources/listeners/0";
const C: &str = "/static_resources/clusters/0";
const L_PLACE: &str = "static_resources.listeners[0]";
const C_PLACE: &str = "static_resources.clusters[0]";
const H_PLACE: &str = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";
const H: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";

#[test]
fn one_thing_wrong_is_one_problem_at_its_place() {
    let long = |text: &str| {
        let at = |template: &str, short: &str, long: &str| template.replacen(short, long, 1);
        let (host, place) = (
            format!("{H}/route_config/virtual_hosts/0"),
            format!("{H_PLACE}.route_config.virtual_hosts[0]"),
        );
        let text = at(
            &at(&at(&at(text, "{V}", &host), "{H}", H), "{L}", L),
            "{C}",
            C,
        );
        at(
            &at(
                &at(&at(&text, "{v}", &place), "{h}", H_PLACE),
                "{l}",
                L_PLACE,
            ),
            "{c}",
            C_PLACE,
        )
    };
    let (mut rows, mut wrong) = (0, Vec::new());
    for line in include_str!("refusals.tsv")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let [pointer, value, want] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("three columns: {line}")
        };
        let value: Value = serde_json::from_str(value).expect("JSON");
        let found = problems(&[(&long(pointer), value)]);
        if found != [long(want)] {
            wrong.push(format!("{line}\n  found {found:?}"));
        }
        rows += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(rows > 50, "{rows} rows");
}

#[test]
fn a_direct_response_is_short() {
    let pointer =
        format!("{H}/route_config/virtual_hosts/0/routes/0/direct_response/body/inline_string");
    let place = format!(
        "{H_PLACE}.route_config.virtual_hosts[0].routes[0].direct_response.body.inline_string"
    );
    let found = problems(&[(&pointer, json!("x".repeat(5001)))]);
    assert_eq!(found, [format!("{place}: has 5001 bytes, more than 5000")]);
    let longest = changed(&[(&pointer, json!("x".repeat(5000)))]);
    assert!(bootstrap_from_value(longest).is_ok());
}

#[test]
fn a_type_nobody_knows_is_refused_unless_optional() {
    let unknown = json!({"@type": "type.googleapis.com/example.Nothing"});
    let found = problems(&[(&format!("{H}/http_filters/0/typed_config"), unknown.clone())]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains(
        "http_filters[0].typed_config: unknown type: 'type.googleapis.com/example.Nothing'"
    ));
    let optional = changed(&[
        (&format!("{H}/http_filters/0/typed_config"), unknown),
        (&format!("{H}/http_filters/0/is_optional"), json!(true)),
    ]);
    let mut read = bootstrap_from_value(optional).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(
        manager(&mut read).http_filters[0].config.type_url,
        "type.googleapis.com/example.Nothing"
    );
}

#[test]
fn all_problems_come_at_once() {
    let found = problems(&[
        ("/bogus", json!(1)),
        (&format!("{H}/stat_prefix"), json!(1)),
        (&format!("{H}/http_filters/2"), json!(5)),
        (&format!("{H}/route_config/virtual_hosts/0/name"), json!("")),
        (&format!("{C}/lb_policy"), json!("CLUSTER_PROVIDED")),
        (&format!("{C}/load_assignment/bogus"), json!("EDS")),
    ]);
    assert_eq!(found.len(), 6, "{found:#?}");
    for part in [
        "'bogus'",
        "stat_prefix: expected",
        "http_filters[2]: expected",
        "virtual_hosts[0].name",
        ".lb_policy: CLUSTER_PROVIDED: only in a cluster of type ORIGINAL_DST",
        "load_assignment: no such",
    ] {
        assert!(
            found.iter().any(|problem| problem.contains(part)),
            "{part} in {found:#?}"
        );
    }
}

#[test]
fn duplicate_names_are_refused() {
    let both = bootstrap_to_json(&full());
    let listener = both["static_resources"]["listeners"][0].clone();
    let cluster = both["static_resources"]["clusters"][0].clone();
    let found = problems(&[
        ("/static_resources/listeners/-", listener),
        ("/static_resources/clusters/-", cluster),
    ]);
    let want = [
        "static_resources.listeners[1].name: duplicate name 'outbound'",
        "static_resources.clusters[1].name: duplicate name 'engines'",
        "static_resources.listeners[1].address: duplicate address [::1]:8080",
    ];
    assert_eq!(found, want);
}

#[test]
fn a_typed_struct_stands_for_the_type_it_names() {
    let mut manager = bootstrap_to_json(&full())
        .pointer(H)
        .expect("the manager")
        .clone();
    manager.as_object_mut().expect("an object").remove("@type");
    manager["bogus"] = json!(1);
    let wrapped = json!({"@type": TYPED_STRUCT, "type_url": MANAGER, "value": manager});
    let found = problems(&[(H, wrapped.clone())]);
    let place = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.value";
    assert_eq!(found, [format!("{place}: no such field: 'bogus'")]);
    let mut good = wrapped;
    good["value"]
        .as_object_mut()
        .expect("an object")
        .remove("bogus");
    assert_eq!(
        bootstrap_from_value(changed(&[(H, good)])).unwrap_or_else(|errors| panic!("{errors}")),
        full()
    );
}

#[test]
fn nesting_without_end_is_an_error() {
    for depth in [30, 60, 100, 5_000] {
        let text = format!(
            "{}{}",
            "{\"a\":".repeat(depth),
            "1".to_owned() + &"}".repeat(depth)
        );
        let shallow = bootstrap_to_json(&full()).to_string();
        let text = shallow.replacen(
            "{\"duty\":\"engine\"",
            &format!("{{\"deep\":{text},\"duty\":\"engine\""),
            1,
        );
        assert!(text.len() > shallow.len());
        for syntax in [Syntax::Json, Syntax::Yaml] {
            match bootstrap(&text, syntax) {
                Ok(plain) => assert_eq!(bootstrap_from_value(bootstrap_to_json(&plain)), Ok(plain)),
                Err(errors) => assert!(depth > 20 && !errors.problems().is_empty()),
            }
        }
    }
}

#[test]
fn both_key_styles_at_once_are_refused() {
    let found = problems(&[(&format!("{C}/connectTimeout"), json!("1s"))]);
    assert_eq!(
        found,
        ["static_resources.clusters[0].connect_timeout: written twice"]
    );
}

#[test]
fn text_that_cannot_be_read_says_where() {
    let wrong = |text: &str, syntax, part: &str| {
        let errors = bootstrap(text, syntax).expect_err("refused").to_string();
        assert!(errors.contains(part), "{part:?} in {errors:?}");
    };
    wrong("node: {id: a\nadmin: 1", Syntax::Yaml, "line 2");
    wrong(
        "node: {id: a}\nnode: {id: b}",
        Syntax::Yaml,
        "'node' is written twice",
    );
    wrong(
        r#"{"node": {"id": "a", "id": "b"}}"#,
        Syntax::Json,
        "'id' is written twice",
    );
    wrong("{", Syntax::Json, "line 1 column 1");
    wrong("- a", Syntax::Yaml, "expected an object, got a list");
    wrong("", Syntax::Yaml, "expected an object, got null");
}

/// A random JSON value, small.
fn junk(random: &mut StdRng) -> Value {
    match random.random_range(0..9) {
        0 => Value::Null,
        1 => json!(random.random::<bool>()),
        2 => json!(random.random::<i64>()),
        3 => json!(random.random_range(-1.0e300..1.0e300)),
        4 => json!(""),
        5 => json!("\u{0}é-0.5s"),
        6 => json!([1, "a", {}]),
        7 => json!({"@type": "type.googleapis.com/envoy.config.core.v3.Address", "": []}),
        _ => json!({"type_url": 5, "@type": TYPED_STRUCT}),
    }
}

/// Changes a random place somewhere below.
fn spoil(value: &mut Value, random: &mut StdRng) {
    let deeper = random.random_range(0..12) > 0;
    match value {
        Value::Object(fields) if deeper && !fields.is_empty() => {
            let key = fields
                .keys()
                .nth(random.random_range(0..fields.len()))
                .expect("in range")
                .clone();
            match random.random_range(0..20) {
                0 => drop(fields.remove(&key)),
                1 => drop(fields.insert(key.to_uppercase(), junk(random))),
                _ => spoil(&mut fields[&key], random),
            }
        }
        Value::Array(list) if deeper && !list.is_empty() => {
            let index = random.random_range(0..list.len());
            if random.random_range(0..10) == 0 {
                list.push(list[index].clone());
            }
            spoil(&mut list[index], random);
        }
        _ => *value = junk(random),
    }
}

#[test]
fn whatever_is_read_is_refused_with_reasons_or_reads_back_equal() {
    let mut random = StdRng::seed_from_u64(11);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..500 {
        let mut value = bootstrap_to_json(&full());
        for _ in 0..random.random_range(1..4) {
            spoil(&mut value, &mut random);
        }
        match bootstrap_from_value(value.clone()) {
            Ok(plain) => {
                good += 1;
                assert_eq!(
                    bootstrap_from_value(bootstrap_to_json(&plain)),
                    Ok(plain),
                    "{value}"
                );
            }
            Err(errors) => {
                bad += 1;
                assert!(
                    !errors.problems().is_empty()
                        && errors.problems().iter().all(|p| !p.message.is_empty())
                );
            }
        }
    }
    assert!(good > 10 && bad > 100, "{good} good, {bad} bad");
}

#[test]
fn what_is_refused_by_name_is_not_also_missing() {
    let route = format!("{H}/route_config/virtual_hosts/0/routes/2");
    let table = [
        (
            format!("{route}/match"),
            json!({"connect_matcher": {"regex": "a"}}),
            "connect_matcher",
        ),
        (
            format!("{route}/route"),
            json!({"inline_cluster_specifier_plugin": {}}),
            "inline_cluster_specifier_plugin",
        ),
        (
            route,
            json!({"match": {"prefix": "/"}, "non_forwarding_action": {}}),
            "non_forwarding_action",
        ),
        (
            format!("{H}/access_log/0/typed_config/log_format"),
            json!({"text_format_source": {"filename": "a"}}),
            "filename",
        ),
        (
            C.to_owned(),
            json!({"name": "engines", "type": "EDS", "eds_cluster_config": {"eds_config": {"self": {}}}}),
            "self",
        ),
    ];
    for (pointer, value, name) in table {
        let found = problems(&[(&pointer, value)]);
        assert_eq!(found.len(), 1, "{found:?}");
        let refusal = format!("not supported yet: {name}");
        assert!(found[0].ends_with(&refusal), "{found:?}");
    }
}
