//! The loss of a pair of which one is better: direct preference optimisation (arXiv 2305.18290).

/// Log-probs of a completion, summed over its tokens (nats).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogProbs {
    /// Under the policy.
    pub policy: f64,
    /// Under the frozen reference.
    pub reference: f64,
}

/// What a pair costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// `−log σ(β·[(log π − log π_ref)(better) − (log π − log π_ref)(worse)])`; ln 2 where policy and reference are equal.
    pub loss: f64,
    /// d loss / d log π of the better one. Of the worse one it is the same with the other sign.
    pub derivative: f64,
}

/// The loss of one pair; `beta` is per nat. Numbers that are not finite count as no difference.
#[must_use]
pub fn pair(better: LogProbs, worse: LogProbs, beta: f64) -> PairLoss {
    let margin = crate::finite(beta * ((better.policy - better.reference) - (worse.policy - worse.reference)));
    // ln(1 + e^−m), whichever sign m has, without an exponential that overflows.
    let loss = (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
    PairLoss { loss, derivative: -beta / (1.0 + margin.exp()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::near;

    const fn log_probs(policy: f64, reference: f64) -> LogProbs {
        LogProbs { policy, reference }
    }

    #[test]
    fn golden_vector_33_dpo() {
        let found = pair(log_probs(-1.0, -1.5), log_probs(-2.0, -1.8), 0.1);
        near(&[found.loss], &[0.658_760], 1e-6);
        near(&[pair(log_probs(-3.0, -3.0), log_probs(-1.0, -1.0), 0.1).loss], &[std::f64::consts::LN_2], 1e-12);
    }

    #[test]
    fn the_derivative_is_the_slope_and_nothing_overflows() {
        let at = |policy: f64| pair(log_probs(policy, -1.5), log_probs(-2.0, -1.8), 0.4);
        let slope = (at(-1.0 + 1e-6).loss - at(-1.0 - 1e-6).loss) / 2e-6;
        near(&[at(-1.0).derivative], &[slope], 1e-6);
        for policy in [-1e6, 1e6, f64::NEG_INFINITY] {
            let found = at(policy);
            assert!(found.loss.is_finite() && found.derivative.is_finite(), "{policy}: {found:?}");
        }
    }
}
