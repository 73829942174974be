//! Answers "what does `/metrics` of this engine say": the recorded page of vLLM 0.32.0 with living figures.
//!
//! The recording is the template, so that families, labels, help texts and bucket bounds are the engine's own; every
//! figure of a modelled thing is the simulator's, everything else is zero. Python's own figures stay as recorded.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::nixl::Transfer;
use super::scheduler::Sampling;

const TEMPLATE: &str = include_str!("../../fixtures/http-vllm-0.32.0/get_metrics.body");
/// Bounds of `http_request_duration_seconds`, in seconds.
const HANDLER_BOUNDS: [f64; 3] = [0.1, 0.5, 1.0];

/// A histogram with the bounds of the recorded page.
#[derive(Clone, Default)]
struct Histogram {
    bounds: Vec<f64>,
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn observe(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
        for (bound, count) in self.bounds.iter().zip(&mut self.counts) {
            *count += u64::from(value <= *bound);
        }
    }

    fn bucket(&self, le: &str) -> f64 {
        let at = self
            .bounds
            .iter()
            .position(|bound| le.parse() == Ok(*bound));
        at.map_or(self.count, |at| self.counts[at]) as f64
    }
}

/// What is counted for one handler and method.
#[derive(Default)]
struct Handler {
    by_status: BTreeMap<&'static str, u64>,
    request_bytes: u64,
    response_bytes: u64,
    duration: Histogram,
}

/// The figures behind the page.
pub(crate) struct Metrics {
    started_s: f64,
    histograms: HashMap<String, Histogram>,
    /// Counters and gauges by name and labels, `engine` and `model_name` left out.
    values: HashMap<String, f64>,
    handlers: BTreeMap<(&'static str, String), Handler>,
}

/// What differs between two engines' pages beside figures.
pub(crate) struct PageNames<'a> {
    pub(crate) model: &'a str,
    pub(crate) block_size: usize,
    pub(crate) blocks: usize,
    pub(crate) tokens_per_request_max: usize,
}

impl Metrics {
    pub(crate) fn new(started_s: f64) -> Self {
        let mut histograms: HashMap<String, Histogram> = HashMap::new();
        for line in TEMPLATE.lines() {
            let Some((name, rest)) = line.split_once("_bucket{") else {
                continue;
            };
            let Some(le) = label(rest, "le").and_then(|le| le.parse::<f64>().ok()) else {
                continue;
            };
            let histogram = histograms.entry(name.to_owned()).or_default();
            if le.is_finite() && !histogram.bounds.contains(&le) {
                histogram.bounds.push(le);
                histogram.counts.push(0);
            }
        }
        let values = HashMap::from([(
            r#"vllm:engine_sleep_state{sleep_state="awake"}"#.to_owned(),
            1.0,
        )]);
        Self {
            started_s,
            histograms,
            values,
            handlers: BTreeMap::new(),
        }
    }

    /// A request was admitted: tokens of its prompt and those found in the cache, and how long it had waited.
    pub(crate) fn admitted(
        &mut self,
        sampling: &Sampling,
        (prompt, cached): (f64, f64),
        waited_s: f64,
    ) {
        if !sampling.skip_cache {
            self.add("vllm:prefix_cache_queries_total", prompt);
            self.add("vllm:prefix_cache_hits_total", cached);
        }
        self.add("vllm:prompt_tokens_total", prompt);
        self.add("vllm:prompt_tokens_cached_total", cached);
        self.add(
            r#"vllm:prompt_tokens_by_source_total{source="local_cache_hit"}"#,
            cached,
        );
        let source = match sampling.transfer {
            Transfer::Pulled(_) => "external_kv_transfer",
            Transfer::None | Transfer::Hold => "local_compute",
        };
        self.add(
            &format!(r#"vllm:prompt_tokens_by_source_total{{source="{source}"}}"#),
            prompt - cached,
        );
        self.add(
            r#"vllm:prompt_tokens_cached_by_source_total{source="device"}"#,
            cached,
        );
        self.observe("vllm:request_queue_time_seconds", waited_s);
    }

    /// Adds one observation to a histogram; `family` must be on the recorded page.
    pub(crate) fn observe(&mut self, family: &str, value: f64) {
        self.histograms
            .get_mut(family)
            .expect("invariant: observed families are on the recorded page")
            .observe(value);
    }

    /// Adds to a counter, named with its labels beside `engine` and `model_name`.
    pub(crate) fn add(&mut self, name: &str, value: f64) {
        *self.values.entry(name.to_owned()).or_default() += value;
    }

    /// What was added so far, named as in `add`.
    pub(crate) fn total(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(0.0)
    }

    /// Sets a gauge, named as in `add`.
    pub(crate) fn set(&mut self, name: &str, value: f64) {
        self.values.insert(name.to_owned(), value);
    }

    /// Notes one answered request. `response_bytes` is 0 for a stream, whose length no header says.
    pub(crate) fn http(
        &mut self,
        handler: &'static str,
        method: &str,
        status: u16,
        bytes: (usize, usize),
        secs: f64,
    ) {
        self.observe("http_request_duration_highr_seconds", secs);
        let entry = self
            .handlers
            .entry((handler, method.to_owned()))
            .or_default();
        if entry.duration.bounds.is_empty() {
            entry.duration.bounds = HANDLER_BOUNDS.to_vec();
            entry.duration.counts = vec![0; HANDLER_BOUNDS.len()];
        }
        let class = ["1xx", "2xx", "3xx", "4xx", "5xx"][usize::from(status / 100).clamp(1, 5) - 1];
        *entry.by_status.entry(class).or_default() += 1;
        entry.request_bytes += bytes.0 as u64;
        entry.response_bytes += bytes.1 as u64;
        entry.duration.observe(secs);
    }

    /// The page.
    pub(crate) fn render(&self, names: &PageNames<'_>) -> String {
        let mut out = String::with_capacity(TEMPLATE.len());
        for line in TEMPLATE.lines() {
            if line.starts_with('#') {
                out.push_str(line);
                out.push('\n');
                if let Some(family) = line
                    .strip_prefix("# TYPE http_")
                    .and_then(|rest| rest.split(' ').next())
                {
                    self.http_family(family, &mut out);
                }
            } else if let Some((sample, recorded)) = line.rsplit_once(' ')
                && !line.starts_with("http_")
            {
                let value = self
                    .value(sample)
                    .unwrap_or_else(|| recorded.parse().unwrap_or(0.0));
                out.push_str(&renamed(sample, names));
                let _ = writeln!(out, " {}", number(value));
            }
        }
        out
    }

    /// The figure of a recorded sample; `None` keeps what was recorded.
    fn value(&self, sample: &str) -> Option<f64> {
        let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
        if name == "process_start_time_seconds" || name.ends_with("_created") {
            return Some(self.started_s);
        }
        if name.starts_with("python_")
            || name.starts_with("process_")
            || name == "vllm:cache_config_info"
        {
            return process_value(name);
        }
        for (suffix, figure) in [("_bucket", 0), ("_count", 1), ("_sum", 2)] {
            let Some(histogram) = name
                .strip_suffix(suffix)
                .and_then(|family| self.histograms.get(family))
            else {
                continue;
            };
            return Some(match figure {
                0 => histogram.bucket(label(labels, "le").unwrap_or("+Inf")),
                1 => histogram.count as f64,
                _ => histogram.sum,
            });
        }
        let kept: Vec<&str> = labels
            .trim_end_matches('}')
            .split(',')
            .filter(|label| {
                !label.starts_with("engine=")
                    && !label.starts_with("model_name=")
                    && !label.is_empty()
            })
            .collect();
        let key = if kept.is_empty() {
            name.to_owned()
        } else {
            format!("{name}{{{}}}", kept.join(","))
        };
        Some(self.values.get(&key).copied().unwrap_or(0.0))
    }

    fn http_family(&self, family: &str, out: &mut String) {
        if family == "request_duration_highr_seconds" {
            let histogram = &self.histograms["http_request_duration_highr_seconds"];
            write_histogram(out, "http_request_duration_highr_seconds", "", histogram);
        } else if family == "request_duration_highr_seconds_created" {
            let _ = writeln!(out, "http_{family} {}", number(self.started_s));
        }
        let mut sized_before = "";
        for ((handler, method), entry) in &self.handlers {
            let first = sized_before != *handler;
            sized_before = handler;
            self.http_samples(family, (handler, method, first), entry, out);
        }
    }

    fn http_samples(
        &self,
        family: &str,
        key: (&str, &str, bool),
        entry: &Handler,
        out: &mut String,
    ) {
        let (handler, method, first) = key;
        let labels = format!("handler=\"{handler}\",method=\"{method}\"");
        let started = number(self.started_s);
        match family {
            "requests_total" => entry.by_status.iter().for_each(|(status, count)| {
                let _ = writeln!(
                    out,
                    "http_{family}{{{labels},status=\"{status}\"}} {}",
                    number(*count as f64)
                );
            }),
            "requests_created" => entry.by_status.keys().for_each(|status| {
                let _ = writeln!(
                    out,
                    "http_{family}{{{labels},status=\"{status}\"}} {started}"
                );
            }),
            "request_size_bytes" | "response_size_bytes" if first => {
                let same = self
                    .handlers
                    .iter()
                    .filter(|((other, _), _)| *other == handler);
                let (mut count, mut sum) = (0, 0);
                for (_, entry) in same {
                    count += entry.duration.count;
                    sum += if family == "request_size_bytes" {
                        entry.request_bytes
                    } else {
                        entry.response_bytes
                    };
                }
                let _ = writeln!(
                    out,
                    "http_{family}_count{{handler=\"{handler}\"}} {}",
                    number(count as f64)
                );
                let _ = writeln!(
                    out,
                    "http_{family}_sum{{handler=\"{handler}\"}} {}",
                    number(sum as f64)
                );
            }
            "request_size_bytes_created" | "response_size_bytes_created" if first => {
                let _ = writeln!(out, "http_{family}{{handler=\"{handler}\"}} {started}");
            }
            "request_duration_seconds" => {
                write_histogram(
                    out,
                    "http_request_duration_seconds",
                    &labels,
                    &entry.duration,
                );
            }
            "request_duration_seconds_created" => {
                let _ = writeln!(out, "http_{family}{{{labels}}} {started}");
            }
            _ => {}
        }
    }
}

/// Label order is Prometheus' Python client's: alphabetical, so `le` stands between `handler` and `method`.
fn write_histogram(out: &mut String, name: &str, labels: &str, histogram: &Histogram) {
    let buckets = histogram
        .bounds
        .iter()
        .zip(&histogram.counts)
        .map(|(bound, count)| (number(*bound), *count));
    for (le, count) in buckets.chain([("+Inf".to_owned(), histogram.count)]) {
        let labels = match labels.split_once(",method=") {
            Some((handler, method)) => format!("{handler},le=\"{le}\",method={method}"),
            None => format!("le=\"{le}\""),
        };
        let _ = writeln!(out, "{name}_bucket{{{labels}}} {}", number(count as f64));
    }
    let labels = if labels.is_empty() {
        String::new()
    } else {
        format!("{{{labels}}}")
    };
    let _ = writeln!(
        out,
        "{name}_count{labels} {}",
        number(histogram.count as f64)
    );
    let _ = writeln!(out, "{name}_sum{labels} {}", number(histogram.sum));
}

fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let start = labels.find(&format!("{name}=\""))? + name.len() + 2;
    labels[start..].split('"').next()
}

/// The sample's name and labels with this engine's model and sizes.
fn renamed(sample: &str, names: &PageNames<'_>) -> String {
    let mut out = sample.replace(
        "model_name=\"smollm2\"",
        &format!("model_name=\"{}\"", names.model),
    );
    if sample.starts_with("vllm:cache_config_info") {
        let tokens = names.block_size * names.blocks;
        let concurrency = tokens as f64 / names.tokens_per_request_max as f64;
        for (label, recorded, value) in [
            ("block_size", "32", names.block_size.to_string()),
            (
                "effective_attention_block_size",
                "32",
                names.block_size.to_string(),
            ),
            ("num_gpu_blocks", "1456", names.blocks.to_string()),
            ("kv_cache_size_tokens", "46592", tokens.to_string()),
            (
                "kv_cache_max_concurrency",
                "22.75",
                format!("{concurrency}"),
            ),
        ] {
            out = out.replace(
                &format!(",{label}=\"{recorded}\""),
                &format!(",{label}=\"{value}\""),
            );
        }
    }
    out
}

/// Figures of this process; `None` where only the recording has one.
fn process_value(name: &str) -> Option<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm
        .split(' ')
        .map(|pages| pages.parse::<f64>().unwrap_or(0.0) * 4096.0);
    match name {
        "process_virtual_memory_bytes" => pages.next(),
        "process_resident_memory_bytes" => pages.nth(1),
        "process_open_fds" => Some(std::fs::read_dir("/proc/self/fd").ok()?.count() as f64),
        "process_cpu_seconds_total" => {
            let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
            let fields = stat.rsplit(") ").next()?.split(' ').skip(11).take(2);
            Some(
                fields
                    .map(|ticks| ticks.parse::<f64>().unwrap_or(0.0))
                    .sum::<f64>()
                    / 100.0,
            )
        }
        _ => None,
    }
}

/// A number as Python's Prometheus client writes it: `1.0`, `1.795337e+09`.
fn number(value: f64) -> String {
    let plain = format!("{value:?}");
    match plain.find('.') {
        Some(dot) if value > 0.0 && dot > 6 => {
            let digits = format!("{}{}", &plain[1..dot], &plain[dot + 1..]);
            let mantissa = format!("{}.{digits}", &plain[..1]);
            format!("{}e+{:02}", mantissa.trim_end_matches(['0', '.']), dot - 1)
        }
        _ => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_pythons_client_writes_them() {
        for text in [
            "0.0",
            "41.0",
            "1.7953376559359636e+09",
            "7.75561216e+08",
            "0.03140856999993957",
            "20000.0",
            "1e+09",
        ] {
            assert_eq!(number(text.parse().expect("number")), text);
        }
    }

    #[test]
    fn figures_stand_where_the_recorded_page_has_them() {
        let mut metrics = Metrics::new(1.5e9);
        metrics.set("vllm:num_requests_running", 3.0);
        metrics.add(r#"vllm:request_success_total{finished_reason="stop"}"#, 2.0);
        metrics.observe("vllm:time_to_first_token_seconds", 0.03);
        metrics.http("/v1/models", "GET", 200, (0, 454), 0.004);
        let names = PageNames {
            model: "sim",
            block_size: 16,
            blocks: 70,
            tokens_per_request_max: 560,
        };
        let page = metrics.render(&names);
        for line in [
            r#"vllm:num_requests_running{engine="0",model_name="sim"} 3.0"#,
            r#"vllm:request_success_total{engine="0",finished_reason="stop",model_name="sim"} 2.0"#,
            r#"vllm:time_to_first_token_seconds_bucket{engine="0",le="0.04",model_name="sim"} 1.0"#,
            r#"vllm:time_to_first_token_seconds_bucket{engine="0",le="0.02",model_name="sim"} 0.0"#,
            r#"vllm:time_to_first_token_seconds_count{engine="0",model_name="sim"} 1.0"#,
            r#"http_requests_total{handler="/v1/models",method="GET",status="2xx"} 1.0"#,
            r#"http_request_duration_seconds_bucket{handler="/v1/models",le="0.1",method="GET"} 1.0"#,
            "process_start_time_seconds 1.5e+09",
        ] {
            assert!(page.lines().any(|found| found == line), "missing {line}");
        }
        assert!(page.contains(r#"num_gpu_blocks="70""#) && page.contains(r#",block_size="16""#));
    }
}
