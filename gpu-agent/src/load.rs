//! What an engine's Prometheus text says of its load and its cache.
//!
//! Answers: how busy, how full, how cut, since when running? A line scan for the few names of interest; no model of
//! the rest. It fetches nothing.

use outrigger_xds::report::EngineKind;
use std::collections::BTreeMap;

/// The figures found. Absent ones stay `None`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Figures {
    /// By the prefix of the names.
    pub kind: EngineKind,
    /// Requests running, all ranks.
    pub running: Option<u64>,
    /// Requests waiting, all ranks.
    pub waiting: Option<u64>,
    /// Share of KV blocks in use, 0 to 1, mean of the ranks.
    pub kv_usage: Option<f64>,
    /// Tokens in an engine block.
    pub block_tokens: Option<u32>,
    /// Type of what is in the KV cache.
    pub cache_dtype: Option<String>,
    /// KV blocks of all ranks.
    pub kv_blocks: Option<u64>,
    /// KV cache size in tokens, where the engine gives that instead of blocks.
    pub kv_tokens: Option<u64>,
    /// Data-parallel ranks that report.
    pub ranks: u32,
    /// Tokens of prompts and of generations so far, all ranks.
    pub tokens: Option<u64>,
    /// When the process began, seconds since the epoch: another value is another process.
    pub process_start: Option<f64>,
    /// It gave up its weights or its cache until it is woken.
    pub is_asleep: bool,
}

#[derive(Clone, Copy)]
enum Figure {
    Running,
    Waiting,
    KvUsage,
    KvTokens,
    PromptTokens,
    GeneratedTokens,
}

/// Metric names, by engine (vLLM up to 0.9 said `gpu_cache_usage_perc`).
const NAMES: [(&str, EngineKind, Figure); 14] = [
    (
        "vllm:num_requests_running",
        EngineKind::Vllm,
        Figure::Running,
    ),
    (
        "vllm:num_requests_waiting",
        EngineKind::Vllm,
        Figure::Waiting,
    ),
    (
        "vllm:kv_cache_usage_perc",
        EngineKind::Vllm,
        Figure::KvUsage,
    ),
    (
        "vllm:gpu_cache_usage_perc",
        EngineKind::Vllm,
        Figure::KvUsage,
    ),
    (
        "vllm:prompt_tokens_total",
        EngineKind::Vllm,
        Figure::PromptTokens,
    ),
    (
        "vllm:generation_tokens_total",
        EngineKind::Vllm,
        Figure::GeneratedTokens,
    ),
    (
        "sglang:num_running_reqs",
        EngineKind::Sglang,
        Figure::Running,
    ),
    ("sglang:num_queue_reqs", EngineKind::Sglang, Figure::Waiting),
    ("sglang:token_usage", EngineKind::Sglang, Figure::KvUsage),
    (
        "sglang:max_total_num_tokens",
        EngineKind::Sglang,
        Figure::KvTokens,
    ),
    (
        "sglang:prompt_tokens_total",
        EngineKind::Sglang,
        Figure::PromptTokens,
    ),
    (
        "sglang:generation_tokens_total",
        EngineKind::Sglang,
        Figure::GeneratedTokens,
    ),
    (
        "trtllm_num_requests_running",
        EngineKind::TrtLlm,
        Figure::Running,
    ),
    (
        "trtllm_num_requests_waiting",
        EngineKind::TrtLlm,
        Figure::Waiting,
    ),
];

/// One figure of each data-parallel rank. Several lines of one rank (tensor-parallel ones) say the same thing, so the
/// highest counts.
type PerRank = BTreeMap<String, f64>;

/// Scans a Prometheus text page.
#[must_use]
pub fn parse(page: &str) -> Figures {
    let mut figures = Figures::default();
    let mut found: [PerRank; 6] = Default::default();
    let mut blocks = PerRank::new();
    for line in page.lines() {
        let Some((name, labels, value)) = sample(line) else {
            continue;
        };
        if name == "process_start_time_seconds" {
            figures.process_start = Some(value);
        } else if name == "vllm:engine_sleep_state" {
            // One line for each state, 1 for that which holds.
            let is_other = label(labels, "sleep_state").is_some_and(|state| state != "awake");
            figures.is_asleep |= is_other && value > 0.0;
        } else if name == "vllm:cache_config_info" {
            figures.cache_dtype = label(labels, "cache_dtype").map(str::to_owned);
            figures.block_tokens = label(labels, "block_size").and_then(|size| size.parse().ok());
            if let Some(count) =
                label(labels, "num_gpu_blocks").and_then(|count| count.parse().ok())
            {
                blocks.insert(rank(labels), count);
            }
        } else if let Some((_, kind, figure)) = NAMES.iter().find(|(known, ..)| *known == name) {
            figures.kind = *kind;
            let highest = found[*figure as usize].entry(rank(labels)).or_insert(value);
            *highest = highest.max(value);
        }
    }
    let sum = |per_rank: &PerRank| (!per_rank.is_empty()).then(|| whole(per_rank.values().sum()));
    figures.running = sum(&found[Figure::Running as usize]);
    figures.waiting = sum(&found[Figure::Waiting as usize]);
    figures.kv_tokens = sum(&found[Figure::KvTokens as usize]);
    figures.kv_blocks = sum(&blocks);
    let (prompt, generated) = (
        sum(&found[Figure::PromptTokens as usize]),
        sum(&found[Figure::GeneratedTokens as usize]),
    );
    figures.tokens = prompt
        .zip(generated)
        .map(|(prompt, generated)| prompt + generated);
    let usage = &found[Figure::KvUsage as usize];
    #[expect(clippy::cast_precision_loss, reason = "a handful of ranks")]
    let mean = usage.values().sum::<f64>() / usage.len().max(1) as f64;
    figures.kv_usage = (!usage.is_empty()).then_some(mean.clamp(0.0, 1.0));
    figures.ranks = u32::try_from(found[0].len()).unwrap_or(u32::MAX);
    figures
}

/// Splits `name{labels} value [timestamp]`; `None` for comments and what is of no interest.
fn sample(line: &str) -> Option<(&str, &str, f64)> {
    if !line.starts_with("vllm:")
        && !line.starts_with("sglang:")
        && !line.starts_with("trtllm_")
        && !line.starts_with("process_start")
    {
        return None;
    }
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    // Label values may hold braces and spaces; numbers do not.
    let (labels, value) = match rest.rfind('}') {
        Some(end) => (&rest[1..end], &rest[end + 1..]),
        None => ("", rest),
    };
    let value: f64 = value.split_ascii_whitespace().next()?.parse().ok()?;
    value.is_finite().then_some((name, labels, value))
}

fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = labels;
    loop {
        let at = rest.find(name)?;
        let begins = at == 0 || rest.as_bytes()[at - 1] == b',';
        let after = &rest[at + name.len()..];
        if let Some(value) = after.strip_prefix("=\"").filter(|_| begins) {
            return value.split('"').next();
        }
        rest = after;
    }
}

/// vLLM labels data-parallel ranks `engine`, SGLang `dp_rank`.
fn rank(labels: &str) -> String {
    label(labels, "engine")
        .or_else(|| label(labels, "dp_rank"))
        .unwrap_or("0")
        .to_owned()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, counts are whole"
)]
fn whole(value: f64) -> u64 {
    value.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_summed_and_their_copies_are_not() {
        let figures = parse(
            "# HELP vllm:num_requests_running x\n\
             vllm:num_requests_running{engine=\"0\",model_name=\"a b}\"} 3.0\n\
             vllm:num_requests_running{engine=\"1\",model_name=\"a b}\"} 4.0 1700000000\n\
             vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n\
             vllm:kv_cache_usage_perc{engine=\"1\"} 1.0\n\
             vllm:cache_config_info{hash_block_size=\"None\",block_size=\"16\",engine=\"0\",num_gpu_blocks=\"10\"} 1.0\n\
             vllm:cache_config_info{hash_block_size=\"None\",block_size=\"16\",engine=\"1\",num_gpu_blocks=\"10\"} 1.0\n",
        );
        assert_eq!(
            (figures.running, figures.waiting, figures.ranks),
            (Some(7), None, 2)
        );
        assert_eq!(figures.kv_usage, Some(0.75));
        assert_eq!(
            (figures.block_tokens, figures.kv_blocks),
            (Some(16), Some(20))
        );
        let figures = parse(
            "sglang:num_running_reqs{tp_rank=\"0\"} 2.0\nsglang:num_running_reqs{tp_rank=\"1\"} 2.0\n",
        );
        assert_eq!(
            (figures.kind, figures.running),
            (EngineKind::Sglang, Some(2))
        );
    }

    #[test]
    fn an_engine_sleeps_in_any_state_but_awake() {
        let page = |awake: u8, offloaded: u8| {
            format!(
                "vllm:engine_sleep_state{{engine=\"0\",sleep_state=\"awake\"}} {awake}.0\n\
                 vllm:engine_sleep_state{{engine=\"0\",sleep_state=\"weights_offloaded\"}} {offloaded}.0\n"
            )
        };
        assert!(parse(&page(0, 1)).is_asleep);
        assert!(!parse(&page(1, 0)).is_asleep);
        assert!(!parse("").is_asleep);
    }

    #[test]
    fn nonsense_is_skipped() {
        assert_eq!(
            parse(
                "vllm:num_requests_running\nvllm:num_requests_running{ NaN\nvllm:num_requests_running NaN\n\u{0}"
            ),
            Figures::default()
        );
    }
}
