//! Canaries: is the engine beside us able to do its work, and does it do it right?
//!
//! A task for each engine, on the main runtime. What real requests and the engine's own figures show is looked at first; only where
//! they show nothing, or failures, the engine is asked to generate a token. The verdict goes into the engine's [`Ledger`], from
//! where the feed tells it to everybody, this proxy included: nobody else judges an engine that a proxy stands beside.

mod golden;
mod judge;
mod patience;
mod probe;
mod seen;
#[cfg(test)]
mod tests;
mod traffic;
mod truth;

use crate::{fleet::Fleet, ledger::Ledger};
use ahash::AHashMap;
use arc_swap::ArcSwap;
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
use patience::Patience;
pub(crate) use probe::{Asked, Prober};
use seen::Seen;
use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::AbortHandle;
pub use traffic::Traffic;
use traffic::Watch;

/// How often it is looked whether anything is to be done.
const LOOK: Duration = Duration::from_millis(50);
/// An engine that refuses probes is asked again after this.
const REFUSED_RETRY: Duration = Duration::from_secs(60);
/// The longest rest after a probe, whatever its share: an engine that hangs is to be found.
const REST_MAX: Duration = Duration::from_secs(60);
/// So many refusals in a row end a verdict: what it cannot be asked, nobody knows of it.
const REFUSALS_MAX: u32 = 3;

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
        self.ledger.traffic.watch(false);
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
        let settings = Arc::new(ArcSwap::from_pointee(watched.check.clone()));
        watched.ledger.traffic.watch(true);
        let canary = Canary::new(fleet, watched, settings.clone(), self.bearer.get().cloned());
        Running {
            address: watched.endpoint.address.clone(),
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
    patience: Patience,
    /// It was gone, or not seen yet: what answers next may be another process.
    was_gone: bool,
    /// When it was last seen to work.
    proved_at: Instant,
    /// When a probe last went well.
    well_at: Option<Instant>,
    /// When it was last seen without requests.
    free_at: Instant,
    /// No probe before this: probes may only take a share of its time.
    next_probe: Instant,
    next_golden: Instant,
    /// Something speaks against it: a probe is brought forward, whatever it was.
    accused: bool,
    /// Refusals in a row.
    refusals: u32,
    /// It is noted that it cannot be asked.
    is_unasked: bool,
    /// It may be another process than that of which something was found.
    is_restarted: bool,
    /// The last probe failed, at this time.
    failed_at: Option<Instant>,
    /// Outlier detection ejected it.
    is_outlier: bool,
    /// Whether it answers.
    answers: Judge,
    /// Whether it answers right.
    truth: Judge,
    told: Verdict,
}

impl Canary {
    fn new(
        fleet: &Arc<Fleet>,
        watched: &Watched<'_>,
        settings: Arc<ArcSwap<HealthCheck>>,
        bearer: Option<HeaderValue>,
    ) -> Self {
        let endpoint = watched.endpoint;
        let (address, connection) = (endpoint.address.clone(), endpoint.connection.clone());
        let now = Instant::now();
        Self {
            id: endpoint.id.clone(),
            live: endpoint.live.clone(),
            host: endpoint.host.clone(),
            fleet: fleet.clone(),
            ledger: watched.ledger.clone(),
            settings,
            prober: Prober::new(address, connection, None).authorized(bearer),
            watch: Watch::new(&watched.ledger.traffic, now),
            patience: Patience::default(),
            was_gone: true,
            proved_at: now,
            well_at: None,
            free_at: now,
            next_probe: now,
            next_golden: now,
            accused: false,
            refusals: 0,
            is_unasked: false,
            is_restarted: false,
            failed_at: None,
            is_outlier: false,
            answers: Judge::new(now),
            truth: Judge::new(now),
            told: Verdict::default(),
        }
    }

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
            self.obey(config);
            if self.look(&live) {
                self.turn(&check, config, &live).await;
            }
        }
    }

    /// What is not to be enforced any more is no verdict.
    fn obey(&mut self, config: &Config) {
        if config.golden.enforcing != Enforcing::Eject && self.truth.is_in_doubt() {
            if self.truth.is_unhealthy() {
                self.changed("healthy", "void", "wrong answers are only reported now");
            }
            self.truth = Judge::new(Instant::now());
            self.tell();
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
        if live.load.active_requests == 0 {
            self.free_at = now;
        }
        let is_up = live.heard && matches!(live.state.health, Health::Healthy | Health::Unhealthy);
        // What drains is there: it has its verdict when it is back.
        let drains = live.heard && live.state.health == Health::Draining;
        self.was_gone |= !(is_up || drains);
        if is_up && std::mem::take(&mut self.was_gone) {
            self.answers.restart(now);
            self.truth.restart(now);
            self.prober.restart();
            self.patience.restart();
            (self.proved_at, self.next_golden, self.well_at) = (now, now, None);
            (self.is_restarted, self.failed_at, self.refusals) = (true, None, 0);
            // The process before said it.
            self.told.golden = None;
            self.tell();
        }
        // What fails while there is no engine says nothing about the next.
        self.accused &= is_up;
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
        if self.accused || self.answers.is_in_doubt() {
            return true;
        }
        if load.active_requests > 0 {
            // They may have come to an engine that had nothing to do, and could prove nothing.
            let waited = now.duration_since(self.proved_at.max(self.free_at));
            let patience = self.patience.deadline(check, config, load, 1);
            return waited >= check.interval.min(patience);
        }
        // Nobody used it since it last went well: let it rest.
        let is_idle = self.well_at.is_some_and(|at| self.watch.served_at() <= at);
        let wait = if is_idle {
            check.interval.max(check.no_traffic_interval)
        } else {
            check.interval
        };
        now.duration_since(self.proved_at) >= wait
    }

    async fn probe(&mut self, check: &HealthCheck, config: &Config, live: &Live) {
        let begun = Instant::now();
        let patience = self.patience.deadline(check, config, &live.load, 1);
        self.accused = false;
        let asked = tokio::time::timeout(patience, self.prober.ask(&live.state)).await;
        let now = Instant::now();
        let later = self.live.load_full();
        self.look(&later);
        let seen = Seen {
            moved: self.watch.moved_at() > begun,
            serves: live.load.active_requests > 0 || later.load.active_requests > 0,
            blind: !self.watch.tells_figures(),
            quiet: now.duration_since(self.proved_at),
        };
        let asked = seen.weigh(asked.ok(), patience);
        self.count("outrigger_canary_probes_total", outcome(&asked));
        self.next_probe = now + check.unhealthy_interval;
        let rules = rules(check, config);
        match asked {
            Asked::Well(_) => {
                let took = now.duration_since(begun);
                self.worked(&rules, took, now);
                if !self.answers.is_in_doubt() {
                    self.next_probe = now + rest(check, config, took);
                }
            }
            Asked::Failed(why) => self.failed(&why, &rules, begun, now),
            Asked::Busy(_) => self.refusals = 0,
            Asked::Unproven(why) => {
                let note = format!("canary: never answered a probe: {why}");
                self.unasked(note, self.is_restarted, now);
            }
            Asked::Refused(why) => self.refused(&why, now),
        }
        self.patience.asked();
        self.tell();
    }

    /// A probe went well.
    fn worked(&mut self, rules: &Rules, took: Duration, now: Instant) {
        metrics::histogram!("outrigger_canary_probe_seconds").record(took.as_secs_f64());
        self.patience.learn(took);
        (self.proved_at, self.well_at) = (now, Some(now));
        (self.is_restarted, self.failed_at, self.refusals) = (false, None, 0);
        if std::mem::take(&mut self.is_unasked) {
            self.note(None);
        }
        if self.answers.succeeded(rules, now) == Some(Change::Healthy) {
            self.changed("healthy", "recovered", "it generates again");
        }
    }

    /// A probe failed. While requests get something, it is the probe that nobody can judge.
    fn failed(&mut self, why: &str, rules: &Rules, begun: Instant, now: Instant) {
        self.refusals = 0;
        self.is_restarted = false;
        let since = self.failed_at.replace(now).unwrap_or(begun);
        tracing::debug!(engine = %self.id, why, "a probe failed");
        if self.watch.served_at() > since && !self.answers.is_unhealthy() {
            self.answers.forget();
            return;
        }
        if self.answers.failed(rules, now).is_some() {
            let failures = self.answers.failures();
            let why = format!("canary: {why}; {failures} failures in a row");
            self.changed("unhealthy", "no_answer", &why);
            self.told.unhealthy = Some(why);
        }
    }

    /// It does not let us ask.
    fn refused(&mut self, why: &str, now: Instant) {
        self.refusals = self.refusals.saturating_add(1);
        let is_void = self.is_restarted || self.refusals >= REFUSALS_MAX;
        self.unasked(format!("canary: cannot be probed: {why}"), is_void, now);
    }

    /// The question is of no use here: what was found before cannot be found again.
    fn unasked(&mut self, note: String, is_void: bool, now: Instant) {
        self.proved_at = now;
        self.is_unasked = true;
        self.note(Some(note));
        if self.answers.is_in_doubt() && is_void {
            if self.answers.is_unhealthy() {
                self.changed("healthy", "void", "it cannot be probed");
            }
            self.answers = Judge::new(now);
        }
        if !self.answers.is_in_doubt() {
            self.next_probe = now + REFUSED_RETRY;
        }
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
        Asked::Unproven(_) => "unproven",
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

/// Until the next probe, so that probes take no more than their share.
fn rest(check: &HealthCheck, config: &Config, took: Duration) -> Duration {
    let rest =
        Duration::try_from_secs_f64(took.as_secs_f64() * (100.0 / config.share_percent - 1.0));
    let rest = rest.unwrap_or(REST_MAX);
    rest.min(REST_MAX).max(check.unhealthy_interval)
}
