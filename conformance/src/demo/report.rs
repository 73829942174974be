//! What was expected and what was seen. The last line of standard output is one JSON object.

use serde_json::{Map, Value, json};
use std::{fmt::Display, time::Instant};

/// Expectations and figures of one check.
pub(super) struct Report {
    begun: Instant,
    expectations: Vec<Value>,
    failed: Vec<String>,
    figures: Map<String, Value>,
}

impl Report {
    pub(super) fn new(seed: u64) -> Self {
        let figures = Map::from_iter([("seed".to_owned(), json!(seed))]);
        Self {
            begun: Instant::now(),
            expectations: Vec::new(),
            failed: Vec::new(),
            figures,
        }
    }

    /// Notes whether an expectation holds, and what was seen.
    pub(super) fn expect(&mut self, name: &str, holds: bool, seen: impl Display) {
        let seen = seen.to_string();
        println!("{} {name}: {seen}", if holds { "ok    " } else { "FAILED" });
        if !holds {
            self.failed.push(name.to_owned());
        }
        self.expectations
            .push(json!({"name": name, "ok": holds, "seen": seen}));
    }

    /// Notes a figure.
    pub(super) fn figure(&mut self, name: &str, value: Value) {
        self.figures.insert(name.to_owned(), value);
    }

    /// Prints the report; true if every expectation held, and there were any.
    pub(super) fn conclude(mut self) -> bool {
        let ok = self.failed.is_empty() && !self.expectations.is_empty();
        self.figure("ok", json!(ok));
        self.figure("failed", json!(self.failed));
        self.figure("expectations", json!(self.expectations));
        self.figure(
            "seconds",
            json!((self.begun.elapsed().as_secs_f64() * 100.0).round() / 100.0),
        );
        if !ok {
            eprintln!("outrigger-demo --check: failed: {}", self.failed.join("; "));
        }
        println!("{}", Value::Object(self.figures));
        ok
    }
}

/// A quantile of durations, in milliseconds with one decimal; null if there are none.
pub(super) fn quantile_ms(seconds: &mut [f64], quantile: f64) -> Value {
    seconds.sort_by(f64::total_cmp);
    let at = ((seconds.len() as f64 - 1.0) * quantile).round() as usize;
    seconds.get(at).map_or(Value::Null, |value| {
        json!((value * 10_000.0).round() / 10.0)
    })
}
