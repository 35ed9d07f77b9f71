//! What stands in for the expected reward: a token's loss as a function of ratio, advantage and log-prob (ALGORITHMS.md
//! section 3).

use fulgurite_core::training::{LossSpec, PolicyLoss};

use super::ratio::{Ratio, possible};

/// A token's loss before corrections and other terms.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Surrogate {
    pub(super) loss: f64,
    pub(super) d_log_prob: f64,
    /// Whether a bound of the ratio holds it.
    pub(super) clipped: bool,
}

impl Surrogate {
    /// `-weight log π`, whose weight is constant.
    fn of_log_prob(log_prob: f64, weight: f64, clipped: bool) -> Self {
        let (log_prob, is_held) = possible(log_prob);
        Self { loss: -weight * log_prob, d_log_prob: if is_held { 0.0 } else { -weight }, clipped }
    }

    /// From a function of the ratio and its derivative.
    fn of_ratio(ratio: &Ratio, loss: f64, d_ratio: f64, clipped: bool) -> Self {
        Self { loss: ratio.share * loss, d_log_prob: ratio.share * d_ratio * ratio.slope, clipped }
    }
}

/// The loss of a token and its derivative.
pub(super) fn surrogate(spec: &LossSpec, advantage: f64, log_prob: f64, ratio: &Ratio) -> Surrogate {
    let r = ratio.value;
    match spec.policy_loss {
        PolicyLoss::Reinforce => Surrogate::of_log_prob(log_prob, advantage, false),
        PolicyLoss::ImportanceSampling => {
            let (loss, d_ratio, clipped) = unclipped(spec, advantage, r);
            Surrogate::of_ratio(ratio, loss, d_ratio, clipped)
        }
        PolicyLoss::Ppo { clip_low, clip_high, dual_clip } => {
            let plain = unclipped(spec, advantage, r);
            let bounded = -advantage * r.clamp(1.0 - f64::from(clip_low), 1.0 + f64::from(clip_high));
            let (mut loss, mut d_ratio, mut clipped) = if bounded > plain.0 { (bounded, 0.0, true) } else { plain };
            if let Some(bound) = dual_clip {
                let most = -advantage * f64::from(bound);
                if advantage < 0.0 && most < loss {
                    (loss, d_ratio, clipped) = (most, 0.0, true);
                }
            }
            Surrogate::of_ratio(ratio, loss, d_ratio, clipped)
        }
        PolicyLoss::Cispo { clip_low, clip_high } => {
            let least = clip_low.map_or(0.0, |low| 1.0 - f64::from(low));
            let held = r.clamp(least, 1.0 + f64::from(clip_high));
            // r is held within [e^-20, e^20], so without a lower bound 0 never clips.
            let clipped = r < least || r > 1.0 + f64::from(clip_high);
            Surrogate::of_log_prob(log_prob, held * advantage, clipped)
        }
        PolicyLoss::Sapo { temperature_positive, temperature_negative } => {
            let tau = f64::from(if advantage > 0.0 { temperature_positive } else { temperature_negative });
            let gate = 1.0 / (1.0 + (-tau * (r - 1.0)).exp());
            let (loss, d_ratio) = (-advantage * 4.0 / tau * gate, -advantage * 4.0 * gate * (1.0 - gate));
            Surrogate::of_ratio(ratio, loss, d_ratio, false)
        }
    }
}

/// `-A min(r, δ)`: loss, derivative with respect to r, whether δ holds.
fn unclipped(spec: &LossSpec, advantage: f64, r: f64) -> (f64, f64, bool) {
    match spec.ratio_max.map(f64::from) {
        Some(delta) if r > delta => (-advantage * delta, 0.0, true),
        _ => (-advantage * r, -advantage, false),
    }
}
