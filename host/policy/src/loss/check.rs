//! Checks of what a plugin asks for.

use fulgurite_core::training::{CorrectionRule, LossSpec, PolicyLoss};

use crate::error::PolicyError;

fn invalid(text: impl Into<String>) -> PolicyError {
    PolicyError::InvalidBatch(text.into())
}

/// A number that must be finite and at least `least`.
fn at_least(name: &str, value: f32, least: f32) -> Result<(), PolicyError> {
    let fits = value.is_finite() && value >= least;
    if fits { Ok(()) } else { Err(invalid(format!("`{name}` is {value}, it must be finite and at least {least}"))) }
}

fn above_zero(name: &str, value: f32) -> Result<(), PolicyError> {
    let fits = value.is_finite() && value > 0.0;
    if fits { Ok(()) } else { Err(invalid(format!("`{name}` is {value}, it must be finite and above 0"))) }
}

/// Names the first setting that makes no sense.
pub(super) fn loss(spec: &LossSpec) -> Result<(), PolicyError> {
    match spec.policy_loss {
        PolicyLoss::Reinforce | PolicyLoss::ImportanceSampling => {}
        PolicyLoss::Ppo { clip_low, clip_high, dual_clip } => {
            at_least("clip_low", clip_low, 0.0)?;
            at_least("clip_high", clip_high, 0.0)?;
            dual_clip.map_or(Ok(()), |bound| at_least("dual_clip", bound, 1.0))?;
        }
        PolicyLoss::Cispo { clip_low, clip_high } => {
            clip_low.map_or(Ok(()), |low| at_least("clip_low", low, 0.0))?;
            at_least("clip_high", clip_high, 0.0)?;
        }
        PolicyLoss::Sapo { temperature_positive, temperature_negative } => {
            above_zero("temperature_positive", temperature_positive)?;
            above_zero("temperature_negative", temperature_negative)?;
        }
    }
    if let Some(delta) = spec.ratio_max {
        at_least("ratio_max", delta, 1.0)?;
        if !matches!(spec.policy_loss, PolicyLoss::Ppo { .. } | PolicyLoss::ImportanceSampling) {
            return Err(invalid(
                "`ratio_max` bounds the ratio of PPO and importance sampling: leave it out of other losses",
            ));
        }
    }
    if let Some(term) = &spec.kl {
        at_least("kl.coefficient", term.coefficient, 0.0)?;
    }
    match spec.correction.map(|correction| correction.rule) {
        None => {}
        Some(CorrectionRule::Truncate { max }) => above_zero("correction.truncate", max)?,
        Some(CorrectionRule::Mask { min, max }) => {
            at_least("correction.mask.0", min, 0.0)?;
            at_least("correction.mask.1", max, min)?;
        }
    }
    spec.off_policy_mask.map_or(Ok(()), |delta| at_least("off_policy_mask", delta, 0.0))?;
    // A negative coefficient punishes entropy, which is unusual and legitimate.
    at_least("entropy_coefficient", spec.entropy_coefficient, f32::MIN)
}
