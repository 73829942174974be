//! How long an answer may take, by what the engine was seen to need. No IO.

use outrigger_xds::{
    report::Load,
    resource::{canary::Canary as Config, health_check::HealthCheck},
};
use std::time::Duration;

/// Longest time that is allowed for prompts that wait.
const PREFILL_WAIT_MAX: Duration = Duration::from_secs(120);
/// An answer may take so many times what answers usually take.
const TIMES_USUAL: u32 = 10;
/// The last answer's share of what is usual: one in so many.
const WEIGHT: u32 = 4;

/// What is known of one process.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// It was asked before: what is compiled at the first question is compiled.
    is_warm: bool,
    /// How long a probe that goes well takes.
    usual: Option<Duration>,
}

impl Patience {
    /// Another process.
    pub(super) fn restart(&mut self) {
        *self = Self::default();
    }

    /// It was asked, and answered or not.
    pub(super) fn asked(&mut self) {
        self.is_warm = true;
    }

    /// A probe that went well took so long. The first tells of compilation, not of what is usual.
    pub(super) fn learn(&mut self, took: Duration) {
        if self.is_warm {
            let usual = self.usual.unwrap_or(took);
            self.usual = Some((usual * (WEIGHT - 1) + took) / WEIGHT);
        }
    }

    /// How long an answer of so many tokens may take: longer while prompts are computed.
    pub(super) fn deadline(
        &self,
        check: &HealthCheck,
        config: &Config,
        load: &Load,
        tokens: u32,
    ) -> Duration {
        let longest = Duration::from_millis(config.first_timeout_ms);
        let usual = self.usual.unwrap_or_default() * TIMES_USUAL;
        let own = if self.is_warm {
            usual.min(longest)
        } else {
            longest
        };
        let first = own.max(check.timeout);
        // No token takes longer than an answer of one.
        let later = first / TIMES_USUAL * tokens.saturating_sub(1);
        first + later + prefill_wait(config, load)
    }
}

fn prefill_wait(config: &Config, load: &Load) -> Duration {
    let wait = load.active_prefill_tokens as f64 / f64::from(config.prefill_tokens_per_s);
    let wait = Duration::try_from_secs_f64(wait).unwrap_or(PREFILL_WAIT_MAX);
    wait.min(PREFILL_WAIT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(patience: &Patience, load: &Load, tokens: u32) -> f64 {
        let check = HealthCheck {
            timeout: Duration::from_secs(3),
            ..HealthCheck::default()
        };
        let deadline = patience.deadline(&check, &Config::default(), load, tokens);
        deadline.as_secs_f64()
    }

    #[test]
    fn the_first_answer_of_a_process_may_take_longest() {
        let mut patience = Patience::default();
        let load = Load::default();
        assert_eq!(seconds(&patience, &load, 1), 30.0);
        patience.learn(Duration::from_secs(20));
        patience.asked();
        assert_eq!(seconds(&patience, &load, 1), 3.0, "that is not usual");
        patience.restart();
        assert_eq!(seconds(&patience, &load, 1), 30.0);
    }

    #[test]
    fn an_engine_that_is_always_slow_gets_longer_within_bounds() {
        let mut patience = Patience::default();
        let load = Load::default();
        patience.asked();
        patience.learn(Duration::from_millis(200));
        assert_eq!(seconds(&patience, &load, 1), 3.0, "never less");
        for _ in 0..100 {
            patience.learn(Duration::from_secs(1));
        }
        let usual = seconds(&patience, &load, 1);
        assert!((9.9..=10.0).contains(&usual), "{usual}");
        for _ in 0..100 {
            patience.learn(Duration::from_secs(9));
        }
        assert_eq!(seconds(&patience, &load, 1), 30.0, "never for ever");
    }

    #[test]
    fn each_token_and_prompts_in_prefill_take_their_time() {
        let mut patience = Patience::default();
        patience.asked();
        let load = |active_prefill_tokens| Load {
            active_prefill_tokens,
            ..Load::default()
        };
        assert_eq!(seconds(&patience, &load(0), 11), 6.0);
        assert_eq!(seconds(&patience, &load(5_000), 1), 13.0);
        assert_eq!(seconds(&patience, &load(u64::MAX), 1), 123.0);
    }
}
