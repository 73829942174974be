//! Canaries: is the engine beside us able to do its work, and does it do it right?
//!
//! A task for each engine, on the main runtime. What real requests and the engine's own figures show is looked at first; only where
//! they show nothing, or failures, the engine is asked to generate a token. The verdict goes into the engine's [`Ledger`], from
//! where the feed tells it to everybody, this proxy included: nobody else judges an engine that a proxy stands beside.

mod golden;
mod judge;
mod probe;
mod traffic;

use crate::{fleet::Fleet, ledger::Ledger};
use ahash::AHashMap;
use arc_swap::ArcSwap;
use golden::Opinion;
use http::HeaderValue;
use judge::{Change, Judge, Rules};
use outrigger_filters::endpoints::{Endpoint, Host, Live};
use outrigger_xds::{
    report::{EngineId, EngineState, GoldenAnswer, Health, Load},
    resource::{
        canary::{Canary as Config, Enforcing},
        endpoint::Address,
        health_check::{Checker, HealthCheck},
    },
};
pub(crate) use probe::{Asked, Prober};
use serde_json::Value;
use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::AbortHandle;
pub use traffic::Traffic;
use traffic::Watch;

/// How often it is looked whether anything is to be done.
const LOOK: Duration = Duration::from_millis(50);
/// Longest time that is allowed for prompts that wait.
const PREFILL_WAIT_MAX: Duration = Duration::from_secs(120);
/// An engine that refuses probes is asked again after this.
const REFUSED_RETRY: Duration = Duration::from_secs(60);

/// What is told of an engine beside us.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Verdict {
    /// Why it is unhealthy; none is healthy.
    pub unhealthy: Option<String>,
    /// What is odd about it and does not make it so.
    pub note: Option<String>,
    /// What it says to the golden prompt.
    pub golden: Option<GoldenAnswer>,
}

impl Verdict {
    /// Puts it into what is told of the engine's state.
    pub fn color(&self, state: &mut EngineState) {
        state.golden.clone_from(&self.golden);
        if state.health != Health::Healthy {
            return;
        }
        if self.unhealthy.is_some() {
            state.health = Health::Unhealthy;
        }
        let said = self.unhealthy.iter().chain(&self.note);
        for text in said {
            if !state.reason.is_empty() {
                state.reason.push_str("; ");
            }
            state.reason.push_str(text);
        }
    }
}

/// All canaries of this proxy.
#[derive(Debug, Default)]
pub struct Canaries {
    running: Mutex<AHashMap<EngineId, Running>>,
    /// For engines that want a key.
    bearer: OnceLock<HeaderValue>,
}

#[derive(Debug)]
struct Running {
    address: Address,
    settings: Arc<ArcSwap<HealthCheck>>,
    ledger: Arc<Ledger>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        // Nobody will ever say otherwise.
        self.ledger.tell(Verdict::default());
    }
}

/// An engine beside us that is to have a canary.
pub struct Watched<'a> {
    /// How.
    pub check: &'a HealthCheck,
    /// Which.
    pub endpoint: &'a Arc<Endpoint>,
    /// Its account.
    pub ledger: Arc<Ledger>,
}

impl Canaries {
    /// What engines want to see of those who ask them.
    pub fn authorize(&self, bearer: Option<HeaderValue>) {
        if let Some(bearer) = bearer {
            // Said once, at the start.
            let _ = self.bearer.set(bearer);
        }
    }

    /// Watches exactly these; what is known of an engine that stays is kept.
    pub fn configure<'a>(&self, fleet: &Arc<Fleet>, engines: impl Iterator<Item = Watched<'a>>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *running);
        for watched in engines {
            let id = &watched.endpoint.id;
            if running.contains_key(id) {
                continue;
            }
            let known = before
                .remove(id)
                .filter(|known| known.address == watched.endpoint.address);
            if let Some(known) = &known
                && **known.settings.load() != *watched.check
            {
                known.settings.store(Arc::new(watched.check.clone()));
            }
            let canary = known.unwrap_or_else(|| self.start(fleet, &watched));
            running.insert(id.clone(), canary);
        }
    }

    fn start(&self, fleet: &Arc<Fleet>, watched: &Watched<'_>) -> Running {
        let endpoint = watched.endpoint;
        let settings = Arc::new(ArcSwap::from_pointee(watched.check.clone()));
        let (address, connection) = (endpoint.address.clone(), endpoint.connection.clone());
        let now = Instant::now();
        let canary = Canary {
            id: endpoint.id.clone(),
            live: endpoint.live.clone(),
            host: endpoint.host.clone(),
            fleet: fleet.clone(),
            ledger: watched.ledger.clone(),
            settings: settings.clone(),
            prober: Prober::new(address.clone(), connection, None)
                .authorized(self.bearer.get().cloned()),
            watch: Watch::new(&watched.ledger.traffic, now),
            is_up: false,
            proved_at: now,
            next_probe: now,
            next_golden: now,
            accused: false,
            is_refused: false,
            is_outlier: false,
            answers: Judge::new(now),
            truth: Judge::new(now),
            told: Verdict::default(),
        };
        Running {
            address,
            settings,
            ledger: watched.ledger.clone(),
            task: tokio::spawn(canary.run()).abort_handle(),
        }
    }
}

/// One engine's.
struct Canary {
    id: EngineId,
    /// What is told of it.
    live: Arc<ArcSwap<Live>>,
    /// What its cluster knows of it.
    host: Arc<Host>,
    fleet: Arc<Fleet>,
    ledger: Arc<Ledger>,
    settings: Arc<ArcSwap<HealthCheck>>,
    prober: Prober,
    watch: Watch,
    /// Whether its adapter says that there is an engine.
    is_up: bool,
    /// When it was last seen to work.
    proved_at: Instant,
    /// No probe before this: probes may only take a share of its time.
    next_probe: Instant,
    next_golden: Instant,
    /// Requests failed since the last probe.
    accused: bool,
    /// It refuses probes.
    is_refused: bool,
    /// Outlier detection ejected it.
    is_outlier: bool,
    /// Whether it answers.
    answers: Judge,
    /// Whether it answers right.
    truth: Judge,
    told: Verdict,
}

impl Canary {
    async fn run(mut self) {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let check = self.settings.load_full();
            let Checker::Canary(config) = &check.checker else {
                continue;
            };
            let live = self.live.load_full();
            if self.look(&live) {
                self.turn(&check, config, &live).await;
            }
        }
    }

    /// Takes in what is known without asking; false if there is no engine to ask.
    fn look(&mut self, live: &Live) -> bool {
        let now = Instant::now();
        let traffic = &self.ledger.traffic;
        self.watch.look(live, traffic, now);
        let is_outlier = self.host.has(Host::FAILED_OUTLIER_CHECK);
        let was_outlier = std::mem::replace(&mut self.is_outlier, is_outlier);
        self.accused |= self.watch.take_failures(traffic) || is_outlier && !was_outlier;
        self.proved_at = self.proved_at.max(self.watch.moved_at());
        let is_up = live.heard && matches!(live.state.health, Health::Healthy | Health::Unhealthy);
        if is_up && !self.is_up {
            // Another process, perhaps.
            self.answers.restart(now);
            self.truth.restart(now);
            (self.proved_at, self.next_golden) = (now, now);
        }
        // What fails while there is no engine says nothing about the next.
        self.accused &= is_up;
        self.is_up = is_up;
        is_up
    }

    async fn turn(&mut self, check: &HealthCheck, config: &Config, live: &Live) {
        let now = Instant::now();
        if now < self.next_probe {
            return;
        }
        if self.is_due(check, config, &live.load, now) {
            self.probe(check, config, live).await;
        } else if now >= self.next_golden && !self.answers.is_in_doubt() {
            self.ask_golden(check, config, live).await;
        }
    }

    /// Whether it is to be asked for a token now.
    fn is_due(&self, check: &HealthCheck, config: &Config, load: &Load, now: Instant) -> bool {
        let quiet = now.duration_since(self.proved_at);
        let is_stalled = load.active_requests > 0 && quiet >= patience(check, config, load);
        self.accused || self.answers.is_in_doubt() || is_stalled || quiet >= check.interval
    }

    async fn probe(&mut self, check: &HealthCheck, config: &Config, live: &Live) {
        let begun = Instant::now();
        // Others saw it, too: requests that failed, or that wait and get nothing.
        let patience = patience(check, config, &live.load);
        let is_stalled =
            live.load.active_requests > 0 && begun.duration_since(self.proved_at) >= patience;
        let agreed = std::mem::take(&mut self.accused) || is_stalled;
        let asked = tokio::time::timeout(patience, self.prober.ask(&live.state)).await;
        let now = Instant::now();
        self.look(&self.live.load_full());
        let asked = asked.unwrap_or_else(|_| Asked::Busy(format!("no token within {patience:?}")));
        let asked = match asked {
            // Somebody else got something meanwhile: it is busy, not broken.
            Asked::Busy(why) if self.watch.moved_at() <= begun => Asked::Failed(why),
            other => other,
        };
        self.count("outrigger_canary_probes_total", outcome(&asked));
        let rules = rules(check, config);
        let took = now.duration_since(begun);
        self.next_probe = now + check.unhealthy_interval;
        match asked {
            Asked::Well(_) => {
                metrics::histogram!("outrigger_canary_probe_seconds").record(took.as_secs_f64());
                self.proved_at = now;
                if std::mem::take(&mut self.is_refused) {
                    self.note(None);
                }
                if self.answers.succeeded(&rules, now) == Some(Change::Healthy) {
                    self.changed("healthy", "recovered", "it generates again");
                }
                if !self.answers.is_in_doubt() {
                    self.next_probe = now + rest(check, config, took);
                }
            }
            Asked::Failed(why) => {
                let change = self.answers.failed(1 + u32::from(agreed), &rules, now);
                tracing::debug!(engine = %self.id, why, agreed, "a probe failed");
                if change.is_some() {
                    let why = format!(
                        "canary: {why}; {} failures in a row",
                        self.answers.failures()
                    );
                    self.told.unhealthy = Some(why.clone());
                    self.changed("unhealthy", "no_answer", &why);
                }
            }
            Asked::Busy(_) => {}
            Asked::Refused(why) => {
                if self.answers.is_in_doubt() {
                    tracing::debug!(engine = %self.id, why, "refuses probes");
                }
                (self.proved_at, self.is_refused) = (now, true);
                self.next_probe = now + REFUSED_RETRY;
                self.note(Some(format!("canary: cannot be probed: {why}")));
            }
        }
        self.tell();
    }

    async fn ask_golden(&mut self, check: &HealthCheck, config: &Config, live: &Live) {
        let golden = &config.golden;
        if golden.enforcing == Enforcing::Off {
            (self.told.golden, self.truth) = (None, Judge::new(Instant::now()));
            self.next_golden = Instant::now() + check.interval;
            return self.tell();
        }
        let begun = Instant::now();
        let patience = patience(check, config, &live.load);
        let asking = self.prober.ask_golden(&live.state, golden);
        let asked = tokio::time::timeout(patience, asking).await;
        let now = Instant::now();
        self.next_golden = now + Duration::from_millis(golden.interval_ms);
        self.next_probe = now + rest(check, config, now.duration_since(begun));
        let answer = match asked {
            Ok(Asked::Well(body)) => self.read(&body, &live.state, golden.margin),
            Ok(Asked::Refused(_) | Asked::Busy(_)) => None,
            Ok(Asked::Failed(_)) | Err(_) => {
                // Whether it answers at all is the other question, and is asked next.
                self.accused = true;
                self.next_probe = now + check.unhealthy_interval;
                None
            }
        };
        let Some(answer) = answer else {
            self.count("outrigger_canary_golden_total", "unanswered");
            return;
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
                    let change = self.truth.failed(1, &rules, now);
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

    /// What is odd, and is told without a verdict.
    fn note(&mut self, note: Option<String>) {
        if self.told.note != note {
            if let Some(note) = &note {
                tracing::warn!(engine = %self.id, note, "odd");
            }
            self.told.note = note;
        }
    }

    /// A verdict changed.
    fn changed(&self, to: &'static str, reason: &'static str, evidence: &str) {
        let engine = &self.id;
        metrics::counter!("outrigger_canary_verdicts_total", "engine" => engine.to_string(), "reason" => reason, "to" => to)
            .increment(1);
        if to == "healthy" {
            tracing::info!(%engine, reason, evidence, "healthy again");
        } else {
            tracing::warn!(%engine, reason, evidence, "unhealthy");
        }
    }

    /// Tells the verdict as it is now, if it is another.
    fn tell(&mut self) {
        if !self.answers.is_unhealthy() {
            let wrong = self.truth.is_unhealthy();
            self.told.unhealthy = wrong.then(|| "wrong answer".to_owned());
        }
        self.ledger.tell(self.told.clone());
    }

    fn count(&self, name: &'static str, outcome: &'static str) {
        let engine = self.id.to_string();
        metrics::counter!(name, "engine" => engine, "outcome" => outcome).increment(1);
    }
}

fn outcome(asked: &Asked) -> &'static str {
    match asked {
        Asked::Well(_) => "well",
        Asked::Failed(_) => "failed",
        Asked::Busy(_) => "busy",
        Asked::Refused(_) => "refused",
    }
}

fn rules(check: &HealthCheck, config: &Config) -> Rules {
    Rules {
        failures: check.unhealthy_threshold,
        successes: check.healthy_threshold,
        hold: Duration::from_millis(config.readmission_ms),
        hold_max: Duration::from_millis(config.readmission_max_ms),
    }
}

/// How long an answer may take: longer while prompts are computed.
fn patience(check: &HealthCheck, config: &Config, load: &Load) -> Duration {
    let prompts = load.active_prefill_tokens as f64 / f64::from(config.prefill_tokens_per_s);
    let wait = Duration::try_from_secs_f64(prompts).unwrap_or(PREFILL_WAIT_MAX);
    check.timeout + wait.min(PREFILL_WAIT_MAX)
}

/// Until the next probe, so that probes take no more than their share.
fn rest(check: &HealthCheck, config: &Config, took: Duration) -> Duration {
    let rest = took.mul_f64(100.0 / config.share_percent - 1.0);
    rest.max(check.unhealthy_interval)
}
