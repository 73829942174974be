//! The cost of serving a request at an endpoint: NVIDIA Dynamo's formula (1.6), in blocks; lower is better.
//!
//! `P` prefill tokens not done yet, `L` prompt tokens, `B` tokens in a block, `R` prompt blocks (at least 1):
//!
//! ```text
//! decay  = 1 / (1 + credit_decay · ((P − min P) / B) / R)
//! credit = overlap_credit · decay · device + host_weight · host + disk_weight · disk + remote_weight · remote
//! cost   = prefill_load_scale · max((P + L) / B − credit, 0) + decode blocks + decode_active_request_weight · requests
//! ```
//!
//! Decode blocks are the distinct blocks of active requests if this one were added: those active already, and of the
//! prompt's what is not among them.

use serde::Deserialize;

/// Weights; defaults are Dynamo's.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Worth of a block held in device memory. Default 1.
    pub overlap_credit: f64,
    /// How fast that worth fades where more prefill is waiting than at the least busy. Default 0.
    pub overlap_credit_decay: f64,
    /// Weight of prefill against decode. Default 1.
    pub prefill_load_scale: f64,
    /// Blocks that one active request counts for beside its own. Default 0.
    pub decode_active_request_weight: f64,
    /// Worth of a block in host memory. Default 0.75.
    pub host_weight: f64,
    /// Worth of a block on disk. Default 0.25.
    pub disk_weight: f64,
    /// Worth of a block elsewhere. Default 0.5, Dynamo's multiplier for a shared cache.
    pub remote_weight: f64,
    /// Randomness of the choice; 0 takes the cheapest. Default 0.
    pub temperature: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            overlap_credit: 1.0,
            overlap_credit_decay: 0.0,
            prefill_load_scale: 1.0,
            decode_active_request_weight: 0.0,
            host_weight: 0.75,
            disk_weight: 0.25,
            remote_weight: 0.5,
            temperature: 0.0,
        }
    }
}

impl Weights {
    /// Names the first weight that makes no sense.
    pub(super) fn check(&self) -> Result<(), String> {
        let all = [
            ("overlap_credit", self.overlap_credit),
            ("overlap_credit_decay", self.overlap_credit_decay),
            ("prefill_load_scale", self.prefill_load_scale),
            (
                "decode_active_request_weight",
                self.decode_active_request_weight,
            ),
            ("host_weight", self.host_weight),
            ("disk_weight", self.disk_weight),
            ("remote_weight", self.remote_weight),
            ("temperature", self.temperature),
        ];
        match all
            .iter()
            .find(|(_, value)| !value.is_finite() || *value < 0.0)
        {
            Some((name, value)) => Err(format!(
                "weights.{name}: {value} is not a number of at least 0"
            )),
            None => Ok(()),
        }
    }
}

/// What the cost is made of, for one endpoint (and rank).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Inputs {
    /// Prompt tokens of the request.
    pub(super) prompt_tokens: f64,
    /// Its blocks held in device memory, and what each lower tier adds.
    pub(super) device: f64,
    pub(super) host: f64,
    pub(super) disk: f64,
    pub(super) remote: f64,
    /// Prefill tokens not done yet.
    pub(super) prefill_tokens: f64,
    /// Distinct blocks of active requests.
    pub(super) active_blocks: f64,
    /// Of its blocks, how many are among these.
    pub(super) shared_blocks: f64,
    /// Active requests.
    pub(super) active_requests: f64,
}

/// The formula.
pub(super) fn cost(
    weights: &Weights,
    block_tokens: f64,
    inputs: &Inputs,
    prefill_tokens_min: f64,
) -> f64 {
    let prompt_blocks = (inputs.prompt_tokens / block_tokens).ceil();
    let ahead = (inputs.prefill_tokens - prefill_tokens_min) / block_tokens;
    let decay = 1.0 / (1.0 + weights.overlap_credit_decay * ahead / prompt_blocks.max(1.0));
    let credit = weights.overlap_credit * decay * inputs.device
        + weights.host_weight * inputs.host
        + weights.disk_weight * inputs.disk
        + weights.remote_weight * inputs.remote;
    let cached = (inputs.device + inputs.host + inputs.disk + inputs.remote) * block_tokens;
    let raw_prefill = (inputs.prefill_tokens + inputs.prompt_tokens.max(cached)) / block_tokens;
    // Never less than the prompt's own: what is shared is active, whatever was told.
    let others = (inputs.active_blocks - inputs.shared_blocks).max(0.0);
    let decode_blocks = others + prompt_blocks;
    weights.prefill_load_scale * (raw_prefill - credit).max(0.0)
        + decode_blocks
        + weights.decode_active_request_weight * inputs.active_requests
}

/// Which one to take at a temperature: probability falls with cost as `exp(−(c − min) / ((max − min) · T))`. `dice` is
/// uniform in 0..1. `None` means the cheapest.
pub(super) fn sample(costs: &[f64], temperature: f64, dice: f64) -> Option<usize> {
    let min = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let max = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scale = (max - min) * temperature;
    if scale.is_nan() || scale <= 0.0 {
        return None;
    }
    let weights: Vec<f64> = costs
        .iter()
        .map(|cost| (-(cost - min) / scale).exp())
        .collect();
    let mut rest = dice * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        rest -= weight;
        if rest < 0.0 {
            return Some(index);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt of ten blocks, with changes.
    fn inputs(change: impl FnOnce(&mut Inputs)) -> Inputs {
        let mut inputs = Inputs {
            prompt_tokens: 320.0,
            ..Inputs::default()
        };
        change(&mut inputs);
        inputs
    }

    fn weights(change: impl FnOnce(&mut Weights)) -> Weights {
        let mut weights = Weights::default();
        change(&mut weights);
        weights
    }

    fn check(weights: Weights, inputs: Inputs, prefill_tokens_min: f64, expected: f64) {
        let got = cost(&weights, 32.0, &inputs, prefill_tokens_min);
        assert!(
            (got - expected).abs() < 1e-9,
            "{inputs:?}: {got} is not {expected}"
        );
    }

    #[test]
    fn caches_are_credited_by_tier() {
        let default = Weights::default();
        // 10 blocks to prefill, 10 to decode.
        check(default, inputs(|_| {}), 0.0, 20.0);
        // Each block held in device memory saves one.
        check(default, inputs(|inputs| inputs.device = 6.0), 0.0, 14.0);
        // 4 device + 0.75·2 host + 0.25·2 disk + 0.5·2 elsewhere = 7.
        let tiers = inputs(|inputs| {
            inputs.device = 4.0;
            (inputs.host, inputs.disk, inputs.remote) = (2.0, 2.0, 2.0);
        });
        check(default, tiers, 0.0, 13.0);
        // Never below the decode part.
        let generous = weights(|weights| weights.overlap_credit = 5.0);
        check(generous, inputs(|inputs| inputs.device = 10.0), 0.0, 10.0);
    }

    #[test]
    fn load_counts_in_blocks() {
        // 160 tokens ahead are 5 blocks; 7 blocks are being decoded already.
        let busy = inputs(|inputs| (inputs.prefill_tokens, inputs.active_blocks) = (160.0, 7.0));
        check(Weights::default(), busy, 160.0, 32.0);
        // Of these 7, the prompt has 4 itself: 3 others.
        let sharing = inputs(|inputs| (inputs.active_blocks, inputs.shared_blocks) = (7.0, 4.0));
        check(Weights::default(), sharing, 0.0, 10.0 + 3.0 + 10.0);
        // More shared than told of: the telling is late, the prompt's own blocks count all the same.
        let late = inputs(|inputs| (inputs.active_blocks, inputs.shared_blocks) = (2.0, 4.0));
        check(Weights::default(), late, 0.0, 20.0);
        // Requests count when asked to.
        let weighted = weights(|weights| weights.decode_active_request_weight = 2.0);
        check(
            weighted,
            inputs(|inputs| inputs.active_requests = 3.0),
            0.0,
            26.0,
        );
        // 160 tokens more than the least busy are 5 blocks over 10 prompt blocks: credit times 1 / (1 + 1·0.5).
        let decaying = weights(|weights| weights.overlap_credit_decay = 1.0);
        let mut busy = inputs(|inputs| (inputs.prefill_tokens, inputs.device) = (320.0, 6.0));
        check(decaying, busy, 160.0, 20.0 - 4.0 + 10.0);
        // An empty prompt divides by one block.
        busy.prompt_tokens = 0.0;
        check(decaying, busy, 160.0, (320.0 + 192.0) / 32.0 - 1.0);
    }

    #[test]
    fn temperature_prefers_the_cheap_and_never_rules_out() {
        assert_eq!(sample(&[3.0, 1.0, 2.0], 0.0, 0.5), None);
        assert_eq!(
            sample(&[2.0, 2.0], 1.0, 0.5),
            None,
            "equal costs are a tie, not a sample"
        );
        let mut counts = [0; 3];
        for step in 0..1000 {
            let index = sample(&[3.0, 1.0, 2.0], 0.5, f64::from(step) / 1000.0).unwrap();
            counts[index] += 1;
        }
        assert!(
            counts[1] > counts[2] && counts[2] > counts[0] && counts[0] > 50,
            "{counts:?}"
        );
    }

    #[test]
    fn senseless_weights_are_named() {
        assert!(Weights::default().check().is_ok());
        let error = Weights {
            host_weight: -1.0,
            ..Weights::default()
        }
        .check()
        .unwrap_err();
        assert!(error.contains("host_weight"), "{error}");
        assert!(
            Weights {
                temperature: f64::NAN,
                ..Weights::default()
            }
            .check()
            .is_err()
        );
    }
}
