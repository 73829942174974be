//! What came of it: how streams ended, how often each moved, and how long its client waited for that.

use crate::{
    Args,
    client::{Ended, Outcome},
    fire::Fire,
};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// Failures whose words are reported.
const WORDS_MAX: usize = 8;
/// Why streams fail where engines die faster than first tokens come.
const REASONS: [&str; 4] = ["poison", "attempts", "budget", "timeout"];
/// Streams that moved at least so often, in one row.
const MOVES: [u64; 8] = [0, 1, 2, 3, 4, 6, 8, 12];

/// What the access log says of a stream.
pub(crate) struct Logged {
    moves: u64,
    /// Whether its first leg was split, and why; empty where engines have no roles.
    decision: String,
}

/// Lines of the access logs by request. Those in the queue of a proxy that is killed are lost with it.
pub(crate) fn logged(logs: &Path) -> HashMap<String, Logged> {
    let files = std::fs::read_dir(logs).into_iter().flatten().flatten();
    let texts = files.filter_map(|file| std::fs::read_to_string(file.path()).ok());
    let mut all = HashMap::new();
    for text in texts {
        for line in text.lines() {
            // The last line of a proxy that was killed may be half a line.
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let split = &line["disaggregation"];
            let word = |name: &str| split[name].as_str().unwrap_or_default().to_owned();
            let decision = match split.is_object() {
                true => format!("{}, {}", word("decision"), word("reason")),
                false => String::new(),
            };
            let moves = line["migrations"].as_u64().unwrap_or(0);
            let id = line["request_id"].as_str().unwrap_or_default().to_owned();
            all.insert(id, Logged { moves, decision });
        }
    }
    all
}

/// The least value that so much of `sorted` does not exceed.
fn quantile(sorted: &[f32], share: f64) -> Option<f32> {
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).map(|value| value.round())
}

/// What a stream's moves cost its client, each: the longest of its silences, less its usual one.
fn delays(ended: &Ended, moves: u64) -> impl Iterator<Item = f32> {
    let mut gaps = ended.gaps.clone();
    gaps.sort_by(f32::total_cmp);
    let usual = gaps.get(gaps.len() / 2).copied().unwrap_or(0.0);
    let longest = gaps.into_iter().rev().take(moves as usize);
    longest.map(move |gap| (gap - usual).max(0.0))
}

/// The verdict and its figures.
pub(crate) struct Report {
    words: Vec<String>,
    figures: Value,
    kept: bool,
}

impl Report {
    pub(crate) fn of(
        ended: &[Ended],
        args: &Args,
        fire: &Fire,
        logged: &HashMap<String, Logged>,
    ) -> Self {
        let count = |is: fn(&Outcome) -> bool| ended.iter().filter(|one| is(&one.outcome)).count();
        let failed = count(|outcome| matches!(outcome, Outcome::Failed(_)));
        let failed_by = reasons(ended);
        let wrong = count(|outcome| matches!(outcome, Outcome::Wrong));
        let lost = count(|outcome| matches!(outcome, Outcome::LostWithEntry));
        let whole = ended
            .iter()
            .filter(|one| matches!(one.outcome, Outcome::Whole));
        let whole: Vec<_> = whole.map(|one| (one, logged.get(&one.id))).collect();
        let moves = Moves::of(&whole);
        let moved_percent = 100.0 * moves.moved as f64 / whole.len().max(1) as f64;
        let splits = decisions(&whole);
        let mut open = fire.open.clone();
        open.sort_unstable();
        let promised = failed == 0 && wrong == 0 && moved_percent >= args.moved_min;
        let figures = json!({
            "stage": "resilience", "engines_of": args.engines_of.to_possible_value().map(|value| value.get_name().to_owned()),
            "split": args.split, "migration": !args.without, "engines": args.engines, "streams_at_once": open.get(open.len() / 2),
            "streams_at_once_min": open.first(), "seconds": args.seconds, "tokens": args.tokens, "itl_ms": args.itl_ms,
            "faults": fire.faults, "pods_killed": fire.pods, "streams": ended.len(), "failed": failed, "failed_by": failed_by, "wrong_text": wrong,
            "lost_with_their_entry": lost, "whole": whole.len(), "moved_percent": (moved_percent * 10.0).round() / 10.0,
            "moves": moves.distribution, "unlogged": moves.unlogged, "added_ms": spread(moves.delays), "gap_ms": spread(moves.gaps),
            "decisions": splits, "counters": fire.figures.0,
        });
        let words = ended.iter().filter_map(|one| match &one.outcome {
            Outcome::Failed(words) => Some(format!("{}: {words}", one.id)),
            Outcome::Wrong => Some(format!("{}: another text", one.id)),
            Outcome::Whole | Outcome::LostWithEntry => None,
        });
        Self {
            words: words.take(WORDS_MAX).collect(),
            figures,
            kept: promised || args.without,
        }
    }

    pub(crate) fn print(&self) {
        for words in &self.words {
            eprintln!("failed: {words}");
        }
        println!("{}", self.figures);
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.kept
    }
}

/// How often streams moved that came to their end.
#[derive(Default)]
struct Moves {
    moved: usize,
    /// Nothing is known of them; they count as not moved.
    unlogged: usize,
    distribution: Map<String, Value>,
    delays: Vec<f32>,
    gaps: Vec<f32>,
}

impl Moves {
    fn of(whole: &[(&Ended, Option<&Logged>)]) -> Self {
        let mut moves = Self::default();
        let mut rows = [0_u64; MOVES.len()];
        for (ended, logged) in whole {
            moves.gaps.extend(&ended.gaps);
            let Some(logged) = logged else {
                moves.unlogged += 1;
                continue;
            };
            moves.moved += usize::from(logged.moves > 0);
            moves.delays.extend(delays(ended, logged.moves));
            let row = MOVES.iter().rposition(|least| logged.moves >= *least);
            rows[row.unwrap_or(0)] += 1;
        }
        for (at, count) in rows.into_iter().enumerate() {
            let name = match MOVES.get(at + 1) {
                Some(next) if *next == MOVES[at] + 1 => MOVES[at].to_string(),
                Some(next) => format!("{}-{}", MOVES[at], next - 1),
                None => format!("{}-", MOVES[at]),
            };
            moves.distribution.insert(name, count.into());
        }
        moves
    }
}

/// Streams that failed by what they were told.
fn reasons(ended: &[Ended]) -> BTreeMap<&str, usize> {
    let mut all = BTreeMap::new();
    for one in ended {
        if let Outcome::Failed(words) = &one.outcome {
            let known = REASONS.iter().find(|reason| words.contains(**reason));
            *all.entry(known.copied().unwrap_or("other")).or_default() += 1;
        }
    }
    all
}

fn spread(mut values: Vec<f32>) -> Value {
    values.sort_by(f32::total_cmp);
    let at = |share| quantile(&values, share);
    json!({"p50": at(0.5), "p99": at(0.99), "max": at(1.0)})
}

fn decisions(whole: &[(&Ended, Option<&Logged>)]) -> Map<String, Value> {
    let mut all = Map::new();
    let known = whole.iter().filter_map(|(_, logged)| *logged);
    for logged in known.filter(|logged| !logged.decision.is_empty()) {
        let count = all
            .get(&logged.decision)
            .and_then(Value::as_u64)
            .unwrap_or(0);
        all.insert(logged.decision.clone(), (count + 1).into());
    }
    all
}
