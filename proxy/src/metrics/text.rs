//! How the counted shows on `/stats`: Prometheus' text, Envoy's dotted names, or Envoy's JSON, all from one rendering.

use regex::Regex;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Write};

/// What a reader of `/stats` wants.
#[derive(Debug, Default)]
pub struct Query {
    /// Only what is not zero.
    pub used_only: bool,
    /// Only those whose dotted name it matches, anywhere.
    pub filter: Option<Regex>,
    /// How.
    pub format: Format,
}

/// Shape of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Prometheus' text.
    #[default]
    Prometheus,
    /// `dotted.name: value`.
    Text,
    /// `{"stats": [...]}`.
    Json,
}

/// Quantiles Envoy shows of a histogram, in percent.
const QUANTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

/// Labels that Envoy makes out of parts of a dotted name.
const NAME_LABELS: [&str; 5] = [
    "envoy_cluster_name",
    "envoy_http_conn_manager_prefix",
    "envoy_listener_address",
    "envoy_response_code",
    "envoy_response_code_class",
];

/// Shows what the exporter rendered (`rendered`) as `query` asks.
pub(super) fn show(rendered: &str, query: &Query) -> String {
    let mut series = parse(rendered);
    series.retain(|id, series| {
        let is_used = !query.used_only || series.is_used();
        is_used
            && query
                .filter
                .as_ref()
                .is_none_or(|it| is_meant(it, id, query.format))
    });
    match query.format {
        Format::Prometheus => prometheus(&series),
        Format::Text => dotted_text(&series),
        Format::Json => dotted_json(&series).to_string(),
    }
}

/// As in Envoy a filter is for the names of `/stats`; who reads the other page may also write what stands there.
fn is_meant(filter: &Regex, id: &SeriesId, format: Format) -> bool {
    filter.is_match(&dotted(id)) || format == Format::Prometheus && filter.is_match(&id.family)
}

/// Name and labels.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct SeriesId {
    family: String,
    /// In the order they came in, values unescaped.
    labels: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct Series {
    kind: String,
    help: String,
    /// The value, of a counter or gauge, as rendered.
    value: String,
    /// Upper bound as rendered, and how many samples are at most that.
    buckets: Vec<(String, u64)>,
    sum: String,
    count: u64,
}

impl Series {
    fn is_histogram(&self) -> bool {
        self.kind == "histogram"
    }

    fn is_used(&self) -> bool {
        if self.is_histogram() {
            self.count > 0
        } else {
            self.value != "0"
        }
    }

    /// Interpolates between the bounds of the bucket that holds it, as Prometheus does.
    fn quantile(&self, percent: f64) -> Option<f64> {
        let wanted = self.count as f64 * percent / 100.0;
        let (mut lower, mut below) = (0.0, 0);
        for (bound, up_to) in &self.buckets {
            let Ok(upper) = bound.parse::<f64>() else {
                continue;
            };
            if *up_to > below && *up_to as f64 >= wanted {
                if !upper.is_finite() {
                    return Some(lower);
                }
                let share = ((wanted - below as f64) / (*up_to - below) as f64).clamp(0.0, 1.0);
                return Some(lower + (upper - lower) * share);
            }
            (lower, below) = (upper, *up_to);
        }
        None
    }
}

type AllSeries = BTreeMap<SeriesId, Series>;

/// Reads what the exporter wrote. It writes each family as HELP, TYPE, samples.
fn parse(rendered: &str) -> AllSeries {
    let mut all = AllSeries::new();
    let (mut family, mut kind, mut help) = ("", "", "");
    for line in rendered.lines() {
        if let Some(comment) = line.strip_prefix("# HELP ") {
            help = comment.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some(comment) = line.strip_prefix("# TYPE ") {
            (family, kind) = comment.split_once(' ').unwrap_or((comment, ""));
        } else if let Some((name, mut labels, value)) = parse_sample(line) {
            let le = match labels.last() {
                Some((label, _)) if label == "le" => labels.pop().map(|(_, bound)| bound),
                _ => None,
            };
            let id = SeriesId {
                family: family.to_owned(),
                labels,
            };
            let series = all.entry(id).or_default();
            kind.clone_into(&mut series.kind);
            help.clone_into(&mut series.help);
            match (le, name.strip_prefix(family)) {
                (Some(bound), _) => series
                    .buckets
                    .push((bound, value.parse().unwrap_or_default())),
                (None, Some("_sum")) if kind == "histogram" => value.clone_into(&mut series.sum),
                (None, Some("_count")) if kind == "histogram" => {
                    series.count = value.parse().unwrap_or_default()
                }
                (None, _) => value.clone_into(&mut series.value),
            }
        } else if line.is_empty() {
            help = "";
        }
    }
    all
}

type Labels = Vec<(String, String)>;

fn parse_sample(line: &str) -> Option<(&str, Labels, &str)> {
    let (series, value) = line.rsplit_once(' ')?;
    let Some((name, labels)) = series.split_once('{') else {
        return Some((series, Vec::new(), value));
    };
    let mut rest = labels.strip_suffix('}')?;
    let mut labels = Vec::new();
    while let Some((label, after)) = rest.split_once("=\"") {
        let (text, after) = unquote(after)?;
        labels.push((label.to_owned(), text));
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    Some((name, labels, value))
}

/// Takes a label's value up to its closing quote.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

fn quote(text: &str, out: &mut String) {
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '"' | '\\' => out.extend(['\\', character]),
            other => out.push(other),
        }
    }
}

fn prometheus(all: &AllSeries) -> String {
    let mut out = String::new();
    let mut family = "";
    for (id, series) in all {
        if id.family != family {
            family = &id.family;
            if !series.help.is_empty() {
                line(&mut out, format_args!("# HELP {family} {}", series.help));
            }
            line(&mut out, format_args!("# TYPE {family} {}", series.kind));
        }
        if !series.is_histogram() {
            sample(&mut out, family, "", &id.labels, None, &series.value);
            continue;
        }
        for (bound, count) in &series.buckets {
            sample(&mut out, family, "_bucket", &id.labels, Some(bound), count);
        }
        sample(&mut out, family, "_sum", &id.labels, None, &series.sum);
        sample(&mut out, family, "_count", &id.labels, None, &series.count);
    }
    out
}

fn sample(
    out: &mut String,
    family: &str,
    suffix: &str,
    labels: &[(String, String)],
    le: Option<&String>,
    value: &dyn std::fmt::Display,
) {
    out.push_str(family);
    out.push_str(suffix);
    let le = le.map(|bound| ("le", bound.as_str()));
    let labels = labels
        .iter()
        .map(|(label, value)| (label.as_str(), value.as_str()))
        .chain(le);
    let mut opening = '{';
    for (label, text) in labels {
        out.push(opening);
        out.push_str(label);
        out.push_str("=\"");
        quote(text, out);
        out.push('"');
        opening = ',';
    }
    if opening == ',' {
        out.push('}');
    }
    line(out, format_args!(" {value}"));
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("invariant: a String takes all");
}

/// `envoy_cluster_upstream_rq_xx{envoy_cluster_name="a",envoy_response_code_class="2"}` is `cluster.a.upstream_rq_2xx`.
fn dotted(id: &SeriesId) -> String {
    let label = |wanted: &str| {
        id.labels
            .iter()
            .find(|(label, _)| label == wanted)
            .map(|(_, value)| value.as_str())
    };
    let name = id.family.as_str();
    let scoped = [
        ("envoy_cluster_", "cluster", "envoy_cluster_name"),
        ("envoy_http_", "http", "envoy_http_conn_manager_prefix"),
        ("envoy_listener_", "listener", "envoy_listener_address"),
    ];
    let plain = [
        ("envoy_cluster_manager_", "cluster_manager"),
        ("envoy_listener_manager_", "listener_manager"),
        ("envoy_control_plane_", "control_plane"),
        ("envoy_load_reporter_", "load_reporter"),
        ("envoy_server_", "server"),
        ("outrigger_", "outrigger"),
        ("process_", "process"),
    ];
    let of_scope = scoped.iter().find_map(|(prefix, scope, scope_label)| {
        Some(format!(
            "{scope}.{}.{}",
            label(scope_label)?,
            name.strip_prefix(prefix)?
        ))
    });
    let of_prefix = || {
        plain
            .iter()
            .find_map(|(prefix, scope)| Some(format!("{scope}.{}", name.strip_prefix(prefix)?)))
    };
    let is_scoped = of_scope.is_some();
    let mut out = of_scope
        .or_else(of_prefix)
        .unwrap_or_else(|| name.to_owned());
    if let Some(class) = label("envoy_response_code_class")
        && out.ends_with("_xx")
    {
        out.insert_str(out.len() - "xx".len(), class);
    }
    if let Some(code) = label("envoy_response_code") {
        out.extend(["_", code]);
    }
    let is_shown = |label: &str| !(is_scoped && NAME_LABELS.contains(&label));
    let rest: Vec<_> = id
        .labels
        .iter()
        .filter(|(label, _)| is_shown(label))
        .collect();
    for (index, (label, value)) in rest.iter().enumerate() {
        out.push(if index == 0 { '{' } else { ',' });
        out.push_str(label);
        out.push_str("=\"");
        quote(value, &mut out);
        out.push('"');
    }
    if !rest.is_empty() {
        out.push('}');
    }
    // A name is a line's: what a configuration called a cluster must not begin another.
    out.replace(char::is_control, "_")
}

fn dotted_text(all: &AllSeries) -> String {
    let mut lines: Vec<String> = all
        .iter()
        .map(|(id, series)| {
            let name = dotted(id);
            if !series.is_histogram() {
                return format!("{name}: {}\n", series.value);
            }
            if series.count == 0 {
                return format!("{name}: No recorded values\n");
            }
            // Envoy shows the last interval, then all time; only the latter is kept here.
            let quantiles: Vec<String> = QUANTILES
                .iter()
                .map(|percent| {
                    format!(
                        "P{percent}(nan,{})",
                        series.quantile(*percent).map_or("nan".into(), short)
                    )
                })
                .collect();
            format!("{name}: {}\n", quantiles.join(" "))
        })
        .collect();
    lines.sort_unstable();
    lines.concat()
}

/// At most three decimals.
fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn dotted_json(all: &AllSeries) -> Value {
    let (histograms, plain): (Vec<_>, Vec<_>) =
        all.iter().partition(|(_, series)| series.is_histogram());
    let mut stats: Vec<Value> = plain
        .iter()
        .map(|(id, series)| {
            let value = series.value.parse::<u64>().map(Value::from);
            json!({"name": dotted(id), "value": value.unwrap_or_else(|_| series.value.parse::<f64>().unwrap_or(0.0).into())})
        })
        .collect();
    let computed: Vec<Value> = histograms
        .iter()
        .map(|(id, series)| {
            let values = QUANTILES.iter().map(|percent| {
                let cumulative = series.quantile(*percent).filter(|_| series.count > 0);
                json!({"interval": null, "cumulative": cumulative})
            });
            json!({"name": dotted(id), "values": values.collect::<Vec<_>>()})
        })
        .collect();
    if !computed.is_empty() {
        stats.push(json!({"histograms": {"supported_quantiles": QUANTILES, "computed_quantiles": computed}}));
    }
    json!({ "stats": stats })
}
