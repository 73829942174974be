//! A new version goes to some nodes first, step by step: who gets it, and whether it goes on. Without IO, and with the time given in.
//!
//! Nodes are ordered by a hash of their ids, and a step takes the first so many per cent of those that are connected and that it concerns, one at least. So who has it keeps it while it
//! spreads. What speaks against it: a node that has it refuses something that it did not refuse before, or requests fail that did not, and do not elsewhere,
//! or streams wait longer for their first token, of all of a step.
//! Silence does not speak for it: it waits for nodes that have it and have answered. Who was sent it and is gone may be so because of it, and has not answered either.

pub mod seen;

use crate::{clients::STREAMS_MAX, store::Trial};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};
use xxhash_rust::xxh3::xxh3_64;

/// How long nodes may take to answer, after the time of a step; then it goes back.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Finished requests, of the nodes that are looked at and of those that they are compared with, below which their failures prove nothing.
const REQUESTS_MIN: u64 = 20;
/// More than so much higher the share of failures may be.
const FAILURES_MORE: f64 = 0.05;
/// First tokens of streams, on each of both sides, below which the time to them proves nothing: one slow stream in a few moves their mean far.
const FIRST_TOKENS_MIN: u64 = 200;
/// So many times as long the mean time to the first token may be.
const TTFT_TIMES: f64 = 1.5;
/// And so many milliseconds longer whatever it was.
const TTFT_MORE_MS: f64 = 50.0;
/// Refusals that are told of one version.
const REFUSALS_TOLD_MAX: usize = 10;
/// All per cent of the nodes.
const ALL: u8 = 100;

/// How versions spread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    steps: Vec<u8>,
    step: Duration,
}

impl Plan {
    /// Steps in per cent of the nodes, each for this time.
    ///
    /// # Errors
    /// They do not go up, or not to 100; or there are several, and they take no time.
    pub fn new(steps: &[u8], step: Duration) -> Result<Self, String> {
        let goes_up = steps.windows(2).all(|pair| pair[0] < pair[1]);
        if !goes_up || steps.first().is_none_or(|first| *first == 0) || steps.last() != Some(&ALL) {
            return Err("steps must go up, from 1 at least, to 100".to_owned());
        }
        if steps.len() > 1 && step.is_zero() {
            return Err("several steps must take some time each".to_owned());
        }
        Ok(Self {
            steps: steps.to_owned(),
            step,
        })
    }

    /// To all at once.
    #[must_use]
    pub fn at_once() -> Self {
        Self {
            steps: vec![ALL],
            step: Duration::ZERO,
        }
    }

    /// Whether anything is tried before it is live.
    #[must_use]
    pub fn is_staged(&self) -> bool {
        self.steps.len() > 1
    }

    /// Between two looks.
    #[must_use]
    pub fn look_interval(&self) -> Duration {
        (self.step / 4).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }
}

/// Requests that are over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// All of them.
    pub finished: u64,
    /// Those that failed.
    pub failed: u64,
    /// Streams whose first token came.
    pub first_tokens: u64,
    /// Microseconds until then, of all of them together.
    pub first_token_us: u64,
}

impl Requests {
    fn since(self, before: Self) -> Self {
        Self {
            finished: self.finished.saturating_sub(before.finished),
            failed: self.failed.saturating_sub(before.failed),
            first_tokens: self.first_tokens.saturating_sub(before.first_tokens),
            first_token_us: self.first_token_us.saturating_sub(before.first_token_us),
        }
    }

    /// Together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            finished: self.finished.saturating_add(other.finished),
            failed: self.failed.saturating_add(other.failed),
            first_tokens: self.first_tokens.saturating_add(other.first_tokens),
            first_token_us: self.first_token_us.saturating_add(other.first_token_us),
        }
    }

    /// The share of failures, if there is enough to tell.
    #[expect(clippy::cast_precision_loss, reason = "a share needs no more")]
    fn failures(self) -> Option<f64> {
        (self.finished >= REQUESTS_MIN).then(|| self.failed as f64 / self.finished as f64)
    }

    /// The mean time to the first token, in milliseconds; none if no stream told it.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a mean needs no more")]
    pub fn ttft_ms(self) -> Option<f64> {
        let streams = self.first_tokens;
        (streams > 0).then(|| self.first_token_us as f64 / streams as f64 / 1000.0)
    }

    /// The same, if there is enough to tell.
    fn ttft_told(self) -> Option<f64> {
        self.ttft_ms()
            .filter(|_| self.first_tokens >= FIRST_TOKENS_MIN)
    }
}

/// What is seen of a node that is connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// What is tried is something else for it than what is live. Others are sent nothing of it, and are compared with.
    pub is_concerned: bool,
    /// Of what is tried, it was not told all yet, or has not answered all: to refuse is to answer.
    pub is_pending: bool,
}

/// Of all nodes that are connected.
pub type Nodes = BTreeMap<String, Seen>;

/// Requests by node, of all that told of them: each since some time, so that only differences mean anything.
pub type Told = BTreeMap<String, Requests>;

/// A refusal: which node, which type, why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// Who refuses.
    pub node: String,
    /// Something of this type.
    pub type_url: String,
    /// Why.
    pub error: String,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet.
    Wait,
    /// To this step, where nodes up to this place have it.
    GoOn {
        /// The next one, or the same with other nodes.
        step: usize,
        /// Never less than before.
        threshold: u64,
    },
    /// All have it, and nothing speaks against it.
    Done,
    /// Something does.
    GoBack(String),
}

/// For those who look: what a version's trial found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Nodes that have it, of those that are connected.
    pub nodes: usize,
    /// Nodes that were sent something of it and are gone.
    pub gone: usize,
    /// Of both, those that have not answered: who is gone has not.
    pub pending: usize,
    /// What it waits for; empty if it is over.
    pub waits_for: String,
    /// New refusals of it.
    pub refusals: Vec<Refusal>,
    /// Requests of those nodes since the step began.
    pub chosen: Requests,
    /// Of the other nodes since then.
    pub others: Requests,
    /// Of the nodes that have it, before the version came, as far as that was told.
    pub before: Requests,
}

/// A version on its way.
#[derive(Debug)]
pub struct Rollout {
    /// Which.
    pub version: u64,
    plan: Plan,
    step: usize,
    since: Instant,
    /// Nodes have it whose hash is not above this.
    threshold: u64,
    /// Nodes that were sent something of it.
    sent: BTreeSet<String>,
    /// When the version came, and when the step began.
    before: Told,
    at_step: Told,
    evidence: Evidence,
}

impl Rollout {
    /// As far as it got.
    #[must_use]
    pub fn new(trial: &Trial, plan: Plan, nodes: &Nodes, told: Told, now: Instant) -> Self {
        // The plan may be another one by now: no step is left out for that.
        let mut steps = plan.steps.iter();
        let step = steps.rposition(|step| *step <= trial.percent);
        let step = step.unwrap_or_default();
        let percent = plan.steps[step];
        let threshold = trial.threshold.filter(|_| percent < ALL);
        Self {
            version: trial.version,
            step,
            plan,
            since: now,
            threshold: threshold.unwrap_or_else(|| self::threshold(percent, nodes)),
            sent: BTreeSet::new(),
            before: told.clone(),
            at_step: told,
            evidence: Evidence::default(),
        }
    }

    /// As [`Self::look`] said.
    pub fn go_on(&mut self, (step, threshold): (usize, u64), told: Told, now: Instant) {
        (self.step, self.threshold) = (step, threshold);
        (self.since, self.at_step) = (now, told);
    }

    fn to(&self, step: usize, nodes: &Nodes) -> Verdict {
        let threshold = threshold(self.plan.steps[step], nodes).max(self.threshold);
        Verdict::GoOn { step, threshold }
    }

    /// So many per cent of the nodes have it.
    #[must_use]
    pub fn percent(&self) -> u8 {
        self.plan.steps[self.step]
    }

    /// The same, of this step.
    #[must_use]
    pub fn percent_of(&self, step: usize) -> u8 {
        self.plan.steps[step]
    }

    /// All its steps.
    #[must_use]
    pub fn steps(&self) -> &[u8] {
        &self.plan.steps
    }

    /// How long the step goes on.
    #[must_use]
    pub fn elapsed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// Nodes whose [`place`] is not above this have it.
    #[must_use]
    pub fn threshold(&self) -> u64 {
        self.threshold
    }

    /// What was found.
    #[must_use]
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    /// A node is sent something of this version.
    pub fn sent(&mut self, node: &str) {
        if self.sent.len() < STREAMS_MAX && !self.sent.contains(node) {
            self.sent.insert(node.to_owned());
        }
    }

    /// A node refuses something that is new in this version.
    pub fn refused(&mut self, refusal: Refusal) {
        let refusals = &mut self.evidence.refusals;
        if refusals.len() < REFUSALS_TOLD_MAX {
            refusals.push(refusal);
        }
    }

    /// Looks at what is seen now.
    pub fn look(&mut self, nodes: &Nodes, told: &Told, now: Instant) -> Verdict {
        let chosen = nodes.iter().filter(|(id, seen)| self.is_chosen(id, seen));
        let chosen: Vec<&Seen> = chosen.map(|(_, seen)| seen).collect();
        let sent = self.sent.iter();
        let gone = sent.filter(|id| !nodes.contains_key(*id)).count();
        let pending = chosen.iter().filter(|seen| seen.is_pending).count();
        (self.evidence.nodes, self.evidence.gone) = (chosen.len(), gone);
        self.evidence.pending = pending + gone;
        self.count(nodes, told);
        let elapsed = self.elapsed(now);
        let why_not = self.why_not();
        // Early on, a mean is of few streams, and crosses any limit for a moment.
        let is_over = elapsed >= self.plan.step;
        let slower = || is_over.then(|| self.makes_wait()).flatten();
        if let Some(why) = why_not.or_else(slower) {
            self.evidence.waits_for.clear();
            return Verdict::GoBack(why);
        }
        let (verdict, waits_for) = match () {
            () if elapsed < self.plan.step => (Verdict::Wait, "the time of the step"),
            () if gone == 0 && !nodes.values().any(|seen| seen.is_concerned) => {
                (Verdict::Wait, "a node that it concerns")
            }
            // Those that were to have it never came, and had the time of the step to do so. Who left with it is not replaced: the next might do so, too.
            () if self.evidence.nodes + gone == 0 => (self.to(self.step, nodes), "other nodes"),
            () if self.evidence.pending > 0 && elapsed < self.plan.step + ANSWER_TIMEOUT => {
                (Verdict::Wait, "answers")
            }
            () if self.evidence.pending > 0 => {
                let why = format!("{} nodes did not answer", self.evidence.pending);
                (Verdict::GoBack(why), "")
            }
            () if self.percent() == ALL => (Verdict::Done, ""),
            () => (self.to(self.step + 1, nodes), ""),
        };
        waits_for.clone_into(&mut self.evidence.waits_for);
        verdict
    }

    fn is_chosen(&self, id: &str, seen: &Seen) -> bool {
        seen.is_concerned && place(id) <= self.threshold
    }

    fn count(&mut self, nodes: &Nodes, told: &Told) {
        let [mut chosen, mut others, mut before] = [Requests::default(); 3];
        let of = |told: &Told, id: &String| told.get(id).copied().unwrap_or_default();
        for (id, seen) in nodes {
            let now = of(told, id).since(of(&self.at_step, id));
            if self.is_chosen(id, seen) {
                chosen = chosen.and(now);
                before = before.and(of(&self.before, id));
            } else {
                others = others.and(now);
            }
        }
        let evidence = &mut self.evidence;
        (evidence.chosen, evidence.others, evidence.before) = (chosen, others, before);
    }

    /// What speaks against it at any time.
    fn why_not(&self) -> Option<String> {
        let refused = self.evidence.refusals.first().map(|refusal| {
            let Refusal {
                node,
                type_url,
                error,
            } = refusal;
            format!("node {node} refuses {type_url}: {error}")
        });
        refused.or_else(|| self.fails())
    }

    fn fails(&self) -> Option<String> {
        let (now, usual) = self.compared(Requests::failures)?;
        (now > usual + FAILURES_MORE).then(|| {
            format!(
                "{:.1} % of the requests fail, {:.1} % do elsewhere or did before",
                now * 100.0,
                usual * 100.0
            )
        })
    }

    fn makes_wait(&self) -> Option<String> {
        let (now, usual) = self.compared(Requests::ttft_told)?;
        (now > (usual * TTFT_TIMES).max(usual + TTFT_MORE_MS)).then(|| {
            format!(
                "the first token takes {now:.0} ms on average, {usual:.0} ms elsewhere or before"
            )
        })
    }

    /// Something of the nodes that have it, and the worse of what it is elsewhere and was before. With nothing to compare with, it may be as usual.
    fn compared(&self, of: impl Fn(Requests) -> Option<f64>) -> Option<(f64, f64)> {
        let Evidence {
            chosen,
            others,
            before,
            ..
        } = &self.evidence;
        let now = of(*chosen)?;
        let usual = [*others, *before].into_iter().filter_map(of);
        usual.reduce(f64::max).map(|usual| (now, usual))
    }
}

/// The place of a node among all: by its id alone.
#[must_use]
pub fn place(node: &str) -> u64 {
    xxh3_64(node.as_bytes())
}

/// Up to where so many per cent of these nodes are, one at least; of no nodes, where so many would be of many.
fn threshold(percent: u8, nodes: &Nodes) -> u64 {
    if percent >= ALL {
        return u64::MAX;
    }
    let concerned = nodes.iter().filter(|(_, seen)| seen.is_concerned);
    let mut places: Vec<u64> = concerned.map(|(id, _)| place(id)).collect();
    places.sort_unstable();
    let count = (places.len() * usize::from(percent)).div_ceil(usize::from(ALL));
    let last = count.max(1).min(places.len()).checked_sub(1);
    last.map_or(u64::MAX / u64::from(ALL) * u64::from(percent), |last| {
        places[last]
    })
}

#[cfg(test)]
mod tests;
