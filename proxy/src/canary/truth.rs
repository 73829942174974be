//! Whether what an engine says is right: the golden prompt, asked, and what its answer is worth.

use super::{
    Canary,
    golden::{self, Opinion},
    judge::{Change, Judge, Rules},
    probe::Asked,
    rest, rules,
};
use outrigger_filters::endpoints::Live;
use outrigger_xds::{
    report::{EngineState, GoldenAnswer},
    resource::{
        canary::{Canary as Config, Enforcing},
        health_check::HealthCheck,
    },
};
use serde_json::Value;
use std::time::{Duration, Instant};

impl Canary {
    pub(super) async fn ask_golden(&mut self, check: &HealthCheck, config: &Config, live: &Live) {
        let golden = &config.golden;
        if golden.enforcing == Enforcing::Off {
            (self.told.golden, self.truth) = (None, Judge::new(Instant::now()));
            self.next_golden = Instant::now() + check.interval;
            return self.tell();
        }
        let begun = Instant::now();
        let tokens = golden.max_tokens;
        let patience = self.patience.deadline(check, config, &live.load, tokens);
        let asking = self.prober.ask_golden(&live.state, golden);
        let asked = tokio::time::timeout(patience, asking).await;
        let now = Instant::now();
        self.patience.asked();
        self.next_golden = now + Duration::from_millis(golden.interval_ms);
        self.next_probe = now + rest(check, config, now.duration_since(begun));
        let answer = match asked {
            Ok(Asked::Well(body)) => self.read(&body, &live.state, golden.margin),
            Ok(Asked::Refused(_) | Asked::Busy(_)) => None,
            Ok(Asked::Failed(_) | Asked::Unproven(_)) | Err(_) => {
                // No finding: whether it answers at all is the other question, and is asked next.
                self.accused = true;
                self.next_probe = now + check.unhealthy_interval;
                None
            }
        };
        let Some(answer) = answer else {
            self.count("outrigger_canary_golden_total", "unanswered");
            // What it said may be true no more, and others compare with it.
            self.told.golden = None;
            return self.tell();
        };
        self.proved_at = now;
        let opinion = self.opinion(&answer, &golden.expected);
        self.told.golden = Some(answer);
        self.hear(&opinion, check, config, &live.state);
        if self.truth.is_in_doubt() {
            self.next_golden = self.next_probe;
        }
        self.tell();
    }

    fn read(&self, body: &Value, state: &EngineState, margin: f64) -> Option<GoldenAnswer> {
        golden::read(body, golden::cohort(state), margin)
    }

    fn opinion(&self, answer: &GoldenAnswer, expected: &str) -> Opinion {
        if !expected.is_empty() {
            return golden::check(answer, expected);
        }
        let others = self.fleet.others(&self.id);
        let others = others.iter().map(|state| &**state);
        golden::compare(answer, &golden::voters(&answer.cohort, others))
    }

    /// Takes in what its answer is worth.
    fn hear(
        &mut self,
        opinion: &Opinion,
        check: &HealthCheck,
        config: &Config,
        state: &EngineState,
    ) {
        let now = Instant::now();
        let golden = &config.golden;
        let rules = Rules {
            failures: golden.threshold,
            successes: golden.threshold,
            ..rules(check, config)
        };
        let (outcome, note) = match opinion {
            Opinion::Right => ("right", None),
            Opinion::Alone => ("alone", None),
            Opinion::Unclear(what) => (
                "unclear",
                Some(format!("canary: answers {what}, and there is no majority")),
            ),
            Opinion::Wrong(what) => ("wrong", Some(format!("canary: wrong answer: {what}"))),
        };
        self.count("outrigger_canary_golden_total", outcome);
        match opinion {
            Opinion::Right | Opinion::Alone => {
                self.note(None);
                if self.truth.succeeded(&rules, now) == Some(Change::Healthy) {
                    self.changed("healthy", "recovered", "its answers are right again");
                }
            }
            Opinion::Unclear(_) => self.note(note),
            Opinion::Wrong(_) => {
                self.note(note.clone());
                if golden.enforcing == Enforcing::Eject && self.may_eject(state) {
                    let change = self.truth.failed(&rules, now);
                    if let (Some(_), Some(why)) = (change, note) {
                        self.changed("unhealthy", "wrong_answer", &why);
                    }
                }
            }
        }
    }

    /// Never the last: a wrong answer may be better than none, and that is not ours to say.
    fn may_eject(&self, state: &EngineState) -> bool {
        let others = self.fleet.others(&self.id);
        let others: Vec<&EngineState> = others.iter().map(|state| &**state).collect();
        self.truth.is_unhealthy() || golden::has_stand_in(state, &others)
    }
}
