//! The table against the sources, and the shapes of `/stats` against what Envoy's readers expect.

use super::{table::Row, *};
use regex::Regex;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders: Vec<PathBuf> = ["proxy", "filters", "gpu-agent", "xds"]
        .map(|name| root.join(name).join("src"))
        .into();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((path.clone(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let ours = [
        "metrics/table.rs",
        "metrics/text.rs",
        "metrics/tests.rs",
        "access_log/sink_tests.rs",
        "admin/tests.rs",
    ];
    found.retain(|(path, _)| !ours.iter().any(|name| path.ends_with(name)));
    assert!(found.len() > 50, "the sources are there");
    found
}

fn row(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name)
}

#[test]
fn every_metric_of_the_sources_has_a_row_and_every_row_a_use() {
    let literal = Regex::new(r#""((?:envoy|outrigger|process)_[a-z0-9_]+)""#).unwrap();
    let labels: BTreeSet<_> = ROWS.iter().flat_map(|row| row.labels).copied().collect();
    // Names of crates (targets of logs) and of Envoy's configuration, not of metrics.
    let others = Regex::new(
        "^(outrigger_(proxy|filters|xds|gpu_agent|agent|control_plane)|envoy_grpc|envoy_internal_address)$",
    )
    .unwrap();
    let mut unused: BTreeSet<_> = ROWS.iter().map(|row| row.name).collect();
    let mut missing = BTreeMap::new();
    for (path, text) in sources() {
        for name in literal
            .captures_iter(&text)
            .map(|found| found.extract::<1>().1[0].to_owned())
        {
            unused.remove(name.as_str());
            if !name.starts_with("process_")
                && row(&name).is_none()
                && !labels.contains(name.as_str())
                && !others.is_match(&name)
            {
                missing.insert(name, path.clone());
            }
        }
    }
    assert!(
        missing.is_empty(),
        "add a row to metrics/table.rs for each of {missing:#?}"
    );
    assert!(
        unused.is_empty(),
        "rows of metrics/table.rs that nothing uses: {unused:#?}"
    );
}

/// A handle nobody adds to would be shown as 0 for ever, whatever happens.
#[test]
fn no_handle_is_exported_that_nothing_counts() {
    let (mut stats, mut rest) = (String::new(), String::new());
    for (path, text) in sources() {
        if path.ends_with("metrics/stats.rs") {
            stats = text;
        } else {
            // Tests stand at the end of a file, and count what the product must count itself.
            rest.push_str(text.split("#[cfg(test)]").next().unwrap_or_default());
        }
    }
    let handle =
        Regex::new(r"(?m)^    (pub )?([a-z_0-9]+): (Counter|Gauge|Histogram|ByClass),").unwrap();
    let mut silent = Vec::new();
    let mut checked = 0;
    for found in handle.captures_iter(&stats) {
        let name = &found[2];
        let field = Regex::new(&format!(r"\.{name}\b")).unwrap();
        let metric = Regex::new(&format!(r#""envoy_(listener|http|cluster)_{name}""#)).unwrap();
        let here = Regex::new(&format!(r"self\.{name}\b")).unwrap();
        checked += 1;
        if !field.is_match(&rest) && !metric.is_match(&rest) && !here.is_match(&stats) {
            silent.push(name.to_owned());
        }
    }
    assert!(checked > 30, "{checked} handles found");
    assert!(silent.is_empty(), "nothing counts {silent:?}");
}

/// Up to the parenthesis that closes the call.
fn arguments(text: &str) -> &str {
    let mut depth = 1;
    let end = text.find(|character| {
        depth += i32::from(character == '(') - i32::from(character == ')');
        depth == 0
    });
    &text[..end.unwrap_or(text.len())]
}

#[test]
fn kinds_and_labels_in_the_sources_are_those_of_the_rows() {
    let call = Regex::new(r#"(counter|gauge|histogram)!\(\s*"([a-z0-9_]+)""#).unwrap();
    let label = Regex::new(r#""([a-z_]+)"\s*=>"#).unwrap();
    let mut checked = 0;
    for (path, text) in sources() {
        for found in call.captures_iter(&text) {
            let (_, [kind, name]) = found.extract();
            let rest = arguments(&text[found.get(2).unwrap().end()..]);
            let Some(row) = row(name) else { continue };
            let expect = match row.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram(_) => "histogram",
            };
            assert_eq!(kind, expect, "{name} in {}", path.display());
            let used: BTreeSet<_> = label
                .captures_iter(rest)
                .map(|found| found.extract::<1>().1[0])
                .collect();
            assert_eq!(
                used,
                row.labels.iter().copied().collect(),
                "labels of {name} in {}",
                path.display()
            );
            checked += 1;
        }
    }
    assert!(checked > 30, "{checked} calls found");
}

#[test]
fn rows_are_well_formed() {
    let mut names = BTreeSet::new();
    for row in ROWS {
        assert!(names.insert(row.name), "{} twice", row.name);
        assert!(
            row.help.ends_with('.') && !row.help.contains('\n'),
            "{}",
            row.name
        );
        if let Kind::Histogram(buckets) = row.kind {
            assert!(buckets.bounds().is_sorted(), "{}", row.name);
            let in_seconds = row.name.ends_with("_seconds");
            assert_eq!(
                in_seconds,
                buckets != table::Buckets::Millis,
                "the unit of {}",
                row.name
            );
        }
    }
}

/// Lines of `/stats` in `format` about things whose name matches `filter`.
fn show(filter: &str, format: Format, used_only: bool) -> String {
    render_as(&Query {
        used_only,
        filter: Some(Regex::new(filter).unwrap()),
        format,
    })
}

#[test]
fn handles_count_under_envoys_names_and_survive_a_push() {
    let stats = ClusterStats::new("push");
    stats.upstream_rq_total.increment(2);
    stats.upstream_rq_active.increment(1.0);
    stats.completed(200, Duration::from_millis(7));
    stats.completed(503, Duration::from_millis(40));
    ClusterStats::new("push").completed(200, Duration::from_millis(7));
    stats.completed(0, Duration::ZERO);
    stats.completed(9999, Duration::ZERO);

    let text = show(r"^cluster\.push\.", Format::Prometheus, true);
    for expect in [
        "# TYPE envoy_cluster_upstream_rq_total counter\n",
        "# HELP envoy_cluster_upstream_rq_total Requests sent, each attempt counted.\n",
        "\nenvoy_cluster_upstream_rq_total{envoy_cluster_name=\"push\"} 2\n",
        "\nenvoy_cluster_upstream_rq_active{envoy_cluster_name=\"push\"} 1\n",
        "\nenvoy_cluster_upstream_rq{envoy_response_code=\"200\",envoy_cluster_name=\"push\"} 2\n",
        "\nenvoy_cluster_upstream_rq_xx{envoy_response_code_class=\"5\",envoy_cluster_name=\"push\"} 1\n",
        "\nenvoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"push\",le=\"10\"} 4\n",
        "\nenvoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"push\",le=\"+Inf\"} 5\n",
        "\nenvoy_cluster_upstream_rq_time_count{envoy_cluster_name=\"push\"} 5\n",
        "\nenvoy_cluster_upstream_rq_completed{envoy_cluster_name=\"push\"} 5\n",
    ] {
        assert!(text.contains(expect), "{expect} in\n{text}");
    }
    assert_eq!(
        text.matches("upstream_rq_time_bucket").count(),
        20,
        "Envoy's 19 bounds and the infinite one"
    );
    assert!(!text.contains("upstream_rq_timeout"), "not used");
    assert!(show(r"^cluster\.push\.", Format::Prometheus, false).contains("upstream_rq_timeout"));
}

#[test]
fn dotted_names_are_envoys() {
    let http = HttpStats::new("dotted");
    http.downstream_rq_total.increment(3);
    http.completed(404, Duration::from_millis(3));
    let listener = ListenerStats::new("127.0.0.1:4711");
    listener.downstream_cx_total.increment(1);
    listener.downstream_cx_active.increment(1.0);
    listener.closed(Duration::from_secs(2));
    ClusterStats::new("dotted").completed(201, Duration::from_millis(1));
    ::metrics::counter!("outrigger_tokens_total", "kind" => "prompt", "model" => "dot\"ted\\")
        .increment(5);

    let text = show("dotted|4711|tokens_total.*dot", Format::Text, true);
    for expect in [
        "http.dotted.downstream_rq_total: 3\n",
        "http.dotted.downstream_rq_4xx: 1\n",
        "http.dotted.downstream_rq_time: P0(nan,1) P25(nan,2) P50(nan,3) ",
        "listener.127.0.0.1_4711.downstream_cx_total: 1\n",
        "listener.127.0.0.1_4711.downstream_cx_destroy: 1\n",
        "cluster.dotted.upstream_rq_201: 1\n",
        "cluster.dotted.upstream_rq_2xx: 1\n",
        "outrigger.tokens_total{kind=\"prompt\",model=\"dot\\\"ted\\\\\"}: 5\n",
    ] {
        assert!(text.contains(expect), "{expect} in\n{text}");
    }
    assert!(!text.contains("downstream_cx_active"), "zero again");
    assert!(text.lines().is_sorted());
    let _idle = HttpStats::new("dotted-idle");
    let all = show("dotted", Format::Text, false);
    assert!(all.contains("http.dotted-idle.downstream_rq_time: No recorded values\n"));

    let json: serde_json::Value =
        serde_json::from_str(&show("dotted", Format::Json, true)).unwrap();
    let stats = json["stats"].as_array().unwrap();
    assert!(
        stats.contains(&serde_json::json!({"name": "http.dotted.downstream_rq_total", "value": 3})),
        "{json}"
    );
    let computed = &stats.last().unwrap()["histograms"]["computed_quantiles"];
    assert_eq!(computed[1]["name"], "http.dotted.downstream_rq_time");
    assert_eq!(
        computed[1]["values"][2],
        serde_json::json!({"interval": null, "cumulative": 3.0})
    );
}

#[test]
fn label_values_cannot_break_the_text() {
    let name = "evil\"} 1\nforged_metric 2\\";
    ClusterStats::new(name).upstream_rq_total.increment(1);
    let text = show("forged", Format::Prometheus, true);
    assert!(
        !text.lines().any(|line| line.starts_with("forged_metric")),
        "{text}"
    );
    assert!(
        !show("forged", Format::Text, true)
            .lines()
            .any(|line| line.starts_with("forged_metric"))
    );
}

#[test]
fn the_process_tells_of_itself() {
    refresh_process(ProcessFacts {
        live: true,
        state: 0,
        started: Instant::now(),
    });
    let text = show(
        "^(process|server|outrigger.build_info)",
        Format::Text,
        false,
    );
    let value = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("{name} in {text}"))
            .parse::<f64>()
            .unwrap()
    };
    assert_eq!(value("server.live"), 1.0);
    assert!(value("process.resident_memory_bytes") > 1e6);
    assert!(value("process.open_fds") >= 3.0);
    assert!(value("process.start_time_seconds") > 1.7e9);
    assert!(text.contains("outrigger.build_info{version="));
    let memory = Memory::read().unwrap();
    assert!(memory.anonymous_bytes <= memory.resident_bytes && memory.data_bytes > 0);
}
