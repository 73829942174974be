//! A new version goes to some nodes first, step by step: who gets it, and whether it goes on. Without IO, and with the time given in.
//!
//! Nodes are ordered by a hash of their ids, and a step takes the first so many per cent of those that are connected and that it concerns, one at least. So who has it keeps it while it
//! spreads. What speaks against it: a node that has it refuses something that it did not refuse before, or requests fail that did not, and do not elsewhere.
//! Silence does not speak for it: it waits for nodes that have it and have answered.

pub mod seen;

use crate::store::Trial;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};
use xxhash_rust::xxh3::xxh3_64;

/// How long nodes may take to answer, after the time of a step; then it goes back.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Finished requests, of the nodes that are looked at and of those that they are compared with, below which their failures prove nothing.
const REQUESTS_MIN: u64 = 20;
/// So much higher the share of failures may be.
const FAILURES_MORE: f64 = 0.05;
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
    /// They do not go up, or not to 100.
    pub fn new(steps: &[u8], step: Duration) -> Result<Self, String> {
        let goes_up = steps.windows(2).all(|pair| pair[0] < pair[1]);
        if !goes_up || steps.first().is_none_or(|first| *first == 0) || steps.last() != Some(&ALL) {
            return Err("steps must go up, from 1 at least, to 100".to_owned());
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
}

impl Requests {
    fn since(self, before: Self) -> Self {
        Self {
            finished: self.finished.saturating_sub(before.finished),
            failed: self.failed.saturating_sub(before.failed),
        }
    }

    /// Together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            finished: self.finished.saturating_add(other.finished),
            failed: self.failed.saturating_add(other.failed),
        }
    }

    /// The share of failures, if there is enough to tell.
    #[expect(clippy::cast_precision_loss, reason = "a share needs no more")]
    fn failures(self) -> Option<f64> {
        (self.finished >= REQUESTS_MIN).then(|| self.failed as f64 / self.finished as f64)
    }
}

/// What is seen of a node that is connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// What is tried is something else for it than what is live. Others are sent nothing of it, and are compared with.
    pub is_concerned: bool,
    /// It was sent something that it has not answered.
    pub is_pending: bool,
    /// As it told of them, since some time.
    pub requests: Requests,
}

/// Of all nodes that are connected.
pub type Nodes = BTreeMap<String, Seen>;

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
    /// Of these, those that have not answered.
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
    /// What was refused before it came.
    known: BTreeSet<Refusal>,
    /// When the version came, and when the step began.
    before: Nodes,
    at_step: Nodes,
    evidence: Evidence,
}

impl Rollout {
    /// At this step of its plan.
    #[must_use]
    pub fn new(
        trial: &Trial,
        plan: Plan,
        nodes: Nodes,
        known: BTreeSet<Refusal>,
        now: Instant,
    ) -> Self {
        let step = trial.step.min(plan.steps.len() - 1);
        let percent = plan.steps[step];
        let threshold = trial.threshold.filter(|_| percent < ALL);
        Self {
            version: trial.version,
            step,
            plan,
            since: now,
            threshold: threshold.unwrap_or_else(|| self::threshold(percent, &nodes)),
            known,
            before: nodes.clone(),
            at_step: nodes,
            evidence: Evidence::default(),
        }
    }

    /// As [`Self::look`] said.
    pub fn go_on(&mut self, (step, threshold): (usize, u64), nodes: Nodes, now: Instant) {
        (self.step, self.threshold) = (step, threshold);
        (self.since, self.at_step) = (now, nodes);
    }

    fn to(&self, step: usize, nodes: &Nodes) -> Verdict {
        let threshold = threshold(self.plan.steps[step], nodes).max(self.threshold);
        Verdict::GoOn { step, threshold }
    }

    /// Which step, counted from 0.
    #[must_use]
    pub fn step(&self) -> usize {
        self.step
    }

    /// So many per cent of the nodes have it.
    #[must_use]
    pub fn percent(&self) -> u8 {
        self.plan.steps[self.step]
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

    /// A node refuses something of this version.
    pub fn refused(&mut self, refusal: Refusal) {
        let refusals = &mut self.evidence.refusals;
        if !self.known.contains(&refusal) && refusals.len() < REFUSALS_TOLD_MAX {
            refusals.push(refusal);
        }
    }

    /// Looks at what is seen now.
    pub fn look(&mut self, nodes: &Nodes, now: Instant) -> Verdict {
        let chosen = nodes.iter().filter(|(id, seen)| self.is_chosen(id, seen));
        let chosen: Vec<&Seen> = chosen.map(|(_, seen)| seen).collect();
        self.evidence.nodes = chosen.len();
        self.evidence.pending = chosen.iter().filter(|seen| seen.is_pending).count();
        self.count(nodes);
        if let Some(why) = self.why_not() {
            self.evidence.waits_for.clear();
            return Verdict::GoBack(why);
        }
        let elapsed = self.elapsed(now);
        let (verdict, waits_for) = match () {
            () if elapsed < self.plan.step => (Verdict::Wait, "the time of the step"),
            () if !nodes.values().any(|seen| seen.is_concerned) => {
                (Verdict::Wait, "a node that it concerns")
            }
            // Those that were to have it are not there, and had the time of the step to come back.
            () if self.evidence.nodes == 0 => (self.to(self.step, nodes), "other nodes"),
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

    fn count(&mut self, nodes: &Nodes) {
        let [mut chosen, mut others, mut before] = [Requests::default(); 3];
        let of = |before: &Nodes, id: &String| before.get(id).copied().unwrap_or_default().requests;
        for (id, seen) in nodes {
            let now = seen.requests.since(of(&self.at_step, id));
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

    /// What speaks against it.
    fn why_not(&self) -> Option<String> {
        let evidence = &self.evidence;
        if let Some(refusal) = evidence.refusals.first() {
            let Refusal {
                node,
                type_url,
                error,
            } = refusal;
            return Some(format!("node {node} refuses {type_url}: {error}"));
        }
        let now = evidence.chosen.failures()?;
        let others = evidence.others.failures();
        let before = evidence.before.failures();
        // With nothing to compare with, failures may be as usual.
        let usual = others.into_iter().chain(before).reduce(f64::max)?;
        (now > usual + FAILURES_MORE).then(|| {
            format!(
                "{:.1} % of the requests fail, {:.1} % do elsewhere or did before",
                now * 100.0,
                usual * 100.0
            )
        })
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
