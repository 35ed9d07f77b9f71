//! Token losses, their derivatives with respect to log-prob and entropy, and how they are added up (ALGORITHMS.md sections
//! 3, 5, 6 and 7).
//!
//! Plain functions in f64. The trainer turns derivatives with respect to log-probs into derivatives with respect to logits
//! analytically, so that no automatic differentiation goes through a softmax and a plugin's own derivatives take the very
//! same way.

use std::collections::BTreeMap;

use fulgurite_core::training::{Aggregation, KlEstimator, LossSpec, PolicyLoss, Stream, TrainingRow};

use crate::error::PolicyError;

/// Bound of log differences before they are exponentiated.
const LOG_DIFFERENCE_MAX: f64 = 20.0;
/// Bound of the k3 estimators' value.
const K3_MAX: f64 = 10.0;

/// What a token's loss is computed from (nats).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct TokenInput {
    /// Under the weights that are trained.
    pub(crate) log_prob: f64,
    /// Under the weights at the start of the update.
    pub(crate) old: f64,
    /// Under the weights that drew it.
    pub(crate) behaviour: f64,
    /// Under the frozen reference, when there is one.
    pub(crate) reference: Option<f64>,
    /// Advantage or token weight.
    pub(crate) weight: f64,
}

/// A token's loss before aggregation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct TokenLoss {
    pub(crate) loss: f64,
    pub(crate) d_log_prob: f64,
    pub(crate) ratio: f64,
    pub(crate) clipped: bool,
    pub(crate) reference_kl: f64,
}

/// `exp` of a bounded log difference, and whether the bound held it: then its derivative is 0.
fn bounded_exp(difference: f64) -> (f64, bool) {
    let bounded = difference.clamp(-LOG_DIFFERENCE_MAX, LOG_DIFFERENCE_MAX);
    // Two infinite log-probs cancel to NaN; they agree, so the ratio is 1.
    if bounded.is_nan() { (1.0, true) } else { (bounded.exp(), difference.abs() > LOG_DIFFERENCE_MAX) }
}

/// π_θ/μ of one token.
pub(crate) fn importance(log_prob: f64, behaviour: f64) -> f64 {
    bounded_exp(log_prob - behaviour).0
}

/// Cross-entropy of one token.
pub(crate) fn cross_entropy(input: &TokenInput) -> TokenLoss {
    TokenLoss { loss: -input.weight * input.log_prob, d_log_prob: -input.weight, ratio: 1.0, ..TokenLoss::default() }
}

/// Policy-gradient loss of one token with its importance weight and KL term.
pub(crate) fn policy_gradient(spec: &LossSpec, input: &TokenInput) -> TokenLoss {
    let advantage = input.weight;
    let (ratio, ratio_bounded) = bounded_exp(input.log_prob - input.old);
    let d_ratio = if ratio_bounded { 0.0 } else { ratio };
    let (mut loss, mut d_log_prob, clipped) = match spec.policy_loss {
        PolicyLoss::Reinforce => (-advantage * input.log_prob, -advantage, false),
        PolicyLoss::Ppo { clip_low, clip_high, dual_clip } => {
            let plain = -advantage * ratio;
            let bounded = -advantage * ratio.clamp(1.0 - f64::from(clip_low), 1.0 + f64::from(clip_high));
            let (loss, derivative, clipped) =
                if bounded > plain { (bounded, 0.0, true) } else { (plain, -advantage * d_ratio, false) };
            match dual_clip {
                Some(bound) if advantage < 0.0 && -advantage * f64::from(bound) < loss => {
                    (-advantage * f64::from(bound), 0.0, true)
                }
                _ => (loss, derivative, clipped),
            }
        }
    };
    if let Some(cap) = spec.importance_cap {
        let (weight, _) = bounded_exp(input.old - input.behaviour);
        let weight = weight.min(f64::from(cap));
        loss *= weight;
        d_log_prob *= weight;
    }
    let mut reference_kl = 0.0;
    if let (Some(term), Some(reference)) = (&spec.kl, input.reference) {
        let (value, derivative) = kl(term.estimator, input.log_prob, reference, ratio, d_ratio);
        let coefficient = f64::from(term.coefficient);
        loss += coefficient * value;
        d_log_prob += coefficient * derivative;
        reference_kl = value;
    }
    TokenLoss { loss, d_log_prob, ratio, clipped, reference_kl }
}

/// A KL estimate and its derivative with respect to `log_prob`.
pub(crate) fn kl(estimator: KlEstimator, log_prob: f64, reference: f64, ratio: f64, d_ratio: f64) -> (f64, f64) {
    let x = reference - log_prob;
    let (exp, exp_bounded) = bounded_exp(x);
    let bounded = x.clamp(-LOG_DIFFERENCE_MAX, LOG_DIFFERENCE_MAX);
    let k3 = exp - bounded - 1.0;
    let d_k3 = if exp_bounded { 0.0 } else { 1.0 - exp };
    match estimator {
        KlEstimator::K1 => (-x, 1.0),
        KlEstimator::K2 => (0.5 * x * x, -x),
        KlEstimator::K3 if k3 > K3_MAX => (K3_MAX, 0.0),
        KlEstimator::K3 => (k3, d_k3),
        KlEstimator::UnbiasedK3 => {
            let value = ratio * k3;
            // The ratio's own derivative goes when the input was bounded, the whole derivative when the output is.
            if value > K3_MAX {
                (K3_MAX, 0.0)
            } else if exp_bounded {
                (value, 0.0)
            } else {
                (value, d_ratio * k3 + ratio * d_k3)
            }
        }
    }
}

/// k3 between the old and the trained policy, of tokens drawn from the old one.
pub(crate) fn approximate_kl(log_prob: f64, old: f64) -> f64 {
    let (ratio, _) = bounded_exp(log_prob - old);
    ratio - 1.0 - ratio.ln()
}

/// Whether a token is trained: something must come before it to predict it.
pub(crate) fn is_trained(row: &TrainingRow, at: usize) -> bool {
    at > 0 && row.mask.get(at).copied().unwrap_or(false)
}

/// Trained tokens of a row.
pub(crate) fn trained_tokens(row: &TrainingRow) -> usize {
    (0..row.ids.len()).filter(|at| is_trained(row, *at)).count()
}

/// Global normalisers of one batch, taken before any split. Each stream has its own, so that mixing demonstrations with
/// rollouts dilutes neither.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Normalisers {
    aggregation: Aggregation,
    policy_gradient: StreamTotals,
    cross_entropy: StreamTotals,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct StreamTotals {
    tokens: usize,
    /// Trained tokens of each sequence over all its rows; sequences without any do not count.
    sequences: BTreeMap<u32, usize>,
}

impl Normalisers {
    /// Counts a batch.
    ///
    /// # Errors
    /// When the aggregation's constant length is 0.
    pub(crate) fn new(aggregation: &Aggregation, rows: &[TrainingRow]) -> Result<Self, PolicyError> {
        if *aggregation == (Aggregation::Constant { length: 0 }) {
            return Err(PolicyError::InvalidBatch("the aggregation's constant length is 0".to_owned()));
        }
        let mut all = Self {
            aggregation: aggregation.clone(),
            policy_gradient: StreamTotals::default(),
            cross_entropy: StreamTotals::default(),
        };
        for row in rows {
            let tokens = trained_tokens(row);
            if tokens > 0 {
                let totals = if row.stream == Stream::Ce { &mut all.cross_entropy } else { &mut all.policy_gradient };
                totals.tokens += tokens;
                *totals.sequences.entry(row.sequence).or_default() += tokens;
            }
        }
        Ok(all)
    }

    fn totals(&self, stream: Stream) -> &StreamTotals {
        if stream == Stream::Ce { &self.cross_entropy } else { &self.policy_gradient }
    }

    /// What a token's loss is multiplied with.
    pub(crate) fn coefficient(&self, stream: Stream, sequence: u32) -> f64 {
        let totals = self.totals(stream);
        let sequences = totals.sequences.len() as f64;
        let divisor = match self.aggregation {
            Aggregation::TokenMean => totals.tokens as f64,
            Aggregation::SequenceMeanTokenMean => {
                sequences * totals.sequences.get(&sequence).copied().unwrap_or(0) as f64
            }
            Aggregation::SequenceMeanTokenSum => sequences,
            Aggregation::Constant { length } => sequences * f64::from(length),
        };
        if divisor > 0.0 { 1.0 / divisor } else { 0.0 }
    }

    /// What a token's entropy is multiplied with in the mean entropy of the policy-gradient stream.
    pub(crate) fn entropy_coefficient(&self, stream: Stream) -> f64 {
        let tokens = self.policy_gradient.tokens;
        if stream == Stream::Ce || tokens == 0 { 0.0 } else { 1.0 / tokens as f64 }
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "bits are what is tested")]
mod tests {
    use fulgurite_core::id::PolicyVersion;
    use fulgurite_core::llm::KeptTokens;
    use fulgurite_core::training::KlTerm;

    use super::*;

    fn ppo(clip_low: f32, clip_high: f32, dual_clip: Option<f32>) -> LossSpec {
        LossSpec { policy_loss: PolicyLoss::Ppo { clip_low, clip_high, dual_clip }, ..LossSpec::default() }
    }

    /// Checks token losses, their mean, and every derivative against a central difference.
    fn check(loss: impl Fn(&TokenInput) -> TokenLoss, inputs: &[TokenInput], want: &[f64], mean: f64) {
        let mut sum = 0.0;
        for (input, want) in inputs.iter().zip(want) {
            let token = loss(input);
            sum += token.loss;
            assert!(
                (token.loss - want).abs() < 1e-4 * want.abs().max(1.0),
                "{input:?}: {} instead of {want}",
                token.loss
            );
            let at = |offset: f64| loss(&TokenInput { log_prob: input.log_prob + offset, ..*input }).loss;
            let numeric = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!(
                (token.d_log_prob - numeric).abs() < 1e-5 * numeric.abs().max(1.0),
                "{input:?}: {token:?} {numeric}"
            );
        }
        assert!((sum / want.len() as f64 - mean).abs() < 1e-4);
    }

    fn inputs(advantages: [f64; 3], old: [f64; 3], new: [f64; 3]) -> [TokenInput; 3] {
        std::array::from_fn(|i| TokenInput {
            log_prob: new[i],
            old: old[i],
            behaviour: old[i],
            reference: None,
            weight: advantages[i],
        })
    }

    /// Inputs of ALGORITHMS.md vector 15.
    fn vector_15() -> [TokenInput; 3] {
        inputs([1.0, -1.0, 2.0], [-1.0; 3], [-1.693_15, -1.0, -0.594_53])
    }

    #[test]
    fn vector_15_ppo() {
        check(|i| policy_gradient(&ppo(0.2, 0.2, None), i), &vector_15(), &[-0.5, 1.0, -2.4], -0.6333);
    }

    #[test]
    fn vector_16_clip_higher() {
        let spec = ppo(0.2, 0.28, None);
        check(|i| policy_gradient(&spec, i), &vector_15(), &[-0.5, 1.0, -2.56], -2.06 / 3.0);
        let clipped: Vec<bool> = vector_15().iter().map(|i| policy_gradient(&spec, i).clipped).collect();
        assert_eq!(clipped, [false, false, true]);
    }

    #[test]
    fn vector_17_dual_clip() {
        let inputs = inputs([1.0, -1.0, -4.0], [-1.0, -1.0, -3.0], [-1.693_15, -1.0, -0.697_41]);
        check(|i| policy_gradient(&ppo(0.2, 0.2, Some(3.0)), i), &inputs, &[-0.5, 1.0, 12.0], 4.1667);
    }

    #[test]
    fn vector_20_reinforce() {
        let spec = LossSpec { policy_loss: PolicyLoss::Reinforce, ..LossSpec::default() };
        let inputs = inputs([1.0, -1.0, 2.0], [0.0; 3], [-0.5, -1.0, -1.5]);
        check(|i| policy_gradient(&spec, i), &inputs, &[0.5, -1.0, 3.0], 0.8333);
    }

    #[test]
    fn vector_22_token_importance_sampling() {
        let mut inputs = vector_15();
        for (input, behaviour) in inputs.iter_mut().zip([-0.5, -1.5, -0.8]) {
            input.behaviour = behaviour;
        }
        let spec = LossSpec { importance_cap: Some(0.8), ..ppo(0.2, 0.2, None) };
        check(|i| policy_gradient(&spec, i), &inputs, &[-0.3033, 0.8, -1.92], -0.4744);
    }

    #[test]
    fn vector_29_kl() {
        for (reference, k1, k2, k3) in [(0.0, -1.0, 0.5, 0.7183), (-15.0, 14.0, 98.0, 10.0), (-30.0, 29.0, 420.5, 10.0)]
        {
            for (estimator, want) in
                [(KlEstimator::K1, k1), (KlEstimator::K2, k2), (KlEstimator::K3, k3), (KlEstimator::UnbiasedK3, k3)]
            {
                let input =
                    TokenInput { log_prob: -1.0, old: -1.0, behaviour: -1.0, reference: Some(reference), weight: 0.0 };
                let kl = Some(KlTerm { estimator, coefficient: 1.0 });
                let spec = LossSpec { kl, ..ppo(0.2, 0.2, None) };
                check(|i| policy_gradient(&spec, i), &[input], &[want], want);
            }
        }
    }

    fn row(sequence: u32, tokens: usize, stream: Stream) -> TrainingRow {
        TrainingRow {
            sequence,
            ids: vec![0; tokens + 1],
            // The first token cannot be trained even when it is marked.
            mask: vec![true; tokens + 1],
            weights: vec![1.0; tokens + 1],
            behaviour_log_probs: vec![0.0; tokens + 1],
            old_log_probs: vec![],
            stream,
            temperature: 1.0,
            policy_version: PolicyVersion(0),
            kept: KeptTokens::default(),
        }
    }

    fn total(aggregation: &Aggregation, rows: &[(TrainingRow, Vec<f64>)]) -> f64 {
        let all: Vec<TrainingRow> = rows.iter().map(|(row, _)| row.clone()).collect();
        let normalisers = Normalisers::new(aggregation, &all).unwrap();
        rows.iter()
            .map(|(row, losses)| normalisers.coefficient(row.stream, row.sequence) * losses.iter().sum::<f64>())
            .sum()
    }

    #[test]
    fn vector_38_aggregation() {
        let rows = [(row(0, 1, Stream::Rl), vec![1.0]), (row(1, 3, Stream::Rl), vec![0.0; 3])];
        for (aggregation, want) in [
            (Aggregation::TokenMean, 0.25),
            (Aggregation::SequenceMeanTokenMean, 0.5),
            (Aggregation::SequenceMeanTokenSum, 0.5),
            (Aggregation::Constant { length: 4 }, 0.125),
        ] {
            assert_eq!(total(&aggregation, &rows), want);
        }
    }

    #[test]
    fn a_sequence_cut_into_rows_keeps_its_mass_and_masked_rows_do_not_count() {
        let whole = [(row(0, 4, Stream::Rl), vec![1.0, 2.0, 3.0, 4.0]), (row(1, 2, Stream::Rl), vec![5.0, 6.0])];
        let mut empty = row(7, 5, Stream::Rl);
        empty.mask = vec![false; 6];
        let cut = [
            (row(0, 1, Stream::Rl), vec![1.0]),
            (row(0, 3, Stream::Rl), vec![2.0, 3.0, 4.0]),
            (row(1, 2, Stream::Rl), vec![5.0, 6.0]),
            (empty, vec![]),
        ];
        for aggregation in [
            Aggregation::TokenMean,
            Aggregation::SequenceMeanTokenMean,
            Aggregation::SequenceMeanTokenSum,
            Aggregation::Constant { length: 9 },
        ] {
            let (a, b) = (total(&aggregation, &whole), total(&aggregation, &cut));
            assert!((a - b).abs() < 1e-12, "{a} {b}");
        }
        let mut nothing = row(0, 3, Stream::Rl);
        nothing.mask = vec![false; 4];
        let normalisers = Normalisers::new(&Aggregation::TokenMean, &[nothing]).unwrap();
        assert_eq!(normalisers.coefficient(Stream::Rl, 0), 0.0);
    }

    #[test]
    fn streams_have_normalisers_of_their_own() {
        let rows = [row(0, 4, Stream::Rl), row(1, 2, Stream::Ce)];
        let normalisers = Normalisers::new(&Aggregation::TokenMean, &rows).unwrap();
        assert_eq!((normalisers.coefficient(Stream::Rl, 0), normalisers.coefficient(Stream::Ce, 1)), (0.25, 0.5));
        assert_eq!(
            (normalisers.entropy_coefficient(Stream::Rl), normalisers.entropy_coefficient(Stream::Ce)),
            (0.25, 0.0)
        );
        assert!(Normalisers::new(&Aggregation::Constant { length: 0 }, &rows).is_err());
    }

    #[test]
    fn vector_45_cross_entropy() {
        let inputs = [-0.1, -0.2].map(|log_prob| TokenInput { log_prob, weight: 1.0, ..TokenInput::default() });
        check(cross_entropy, &inputs, &[0.1, 0.2], 0.15);
    }

    #[test]
    fn equal_policies_have_ratio_1_and_the_gradient_of_reinforce() {
        for advantage in [-2.0, 0.5] {
            let input =
                TokenInput { log_prob: -1.3, old: -1.3, behaviour: -1.3, reference: Some(-1.3), weight: advantage };
            let kl = Some(KlTerm { estimator: KlEstimator::K3, coefficient: 0.1 });
            let spec = LossSpec { importance_cap: Some(2.0), kl, ..ppo(0.2, 0.28, Some(3.0)) };
            let token = policy_gradient(&spec, &input);
            assert_eq!((token.ratio, token.clipped, token.reference_kl), (1.0, false, 0.0));
            assert_eq!(token.d_log_prob, -advantage);
            assert_eq!(approximate_kl(-1.3, -1.3), 0.0);
        }
    }

    #[test]
    fn impossible_tokens_never_make_a_loss_that_is_not_a_number() {
        let infinity = f64::NEG_INFINITY;
        for (old, behaviour) in [(infinity, infinity), (-1.0, infinity), (infinity, -1.0)] {
            for weight in [1.0, -1.0, 0.0] {
                for estimator in [KlEstimator::K3, KlEstimator::UnbiasedK3] {
                    let kl = Some(KlTerm { estimator, coefficient: 0.1 });
                    let spec = LossSpec { importance_cap: Some(2.0), kl, ..ppo(0.2, 0.28, Some(3.0)) };
                    let input = TokenInput { log_prob: -2.0, old, behaviour, reference: Some(infinity), weight };
                    let token = policy_gradient(&spec, &input);
                    assert!(token.loss.is_finite() && token.d_log_prob.is_finite(), "{input:?} {token:?}");
                }
            }
        }
    }

    /// ALGORITHMS.md section 17, property 7: which estimators give the gradient of the exact KL in expectation over
    /// tokens of the old policy: k2 where old and new are equal, unbiased k3 everywhere, k1 and k3 nowhere.
    #[test]
    fn k2_and_unbiased_k3_have_the_gradient_of_the_exact_kl() {
        let softmax = |z: &[f64; 3]| {
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            z.map(|z| z.exp() / sum)
        };
        let z = [0.3, -0.7, 1.1];
        let reference = softmax(&[0.9, 0.1, -0.4]);
        let exact = |z: &[f64; 3]| -> f64 { softmax(z).iter().zip(&reference).map(|(p, q)| p * (p / q).ln()).sum() };
        let gradient = |estimator, old: &[f64; 3]| -> [f64; 3] {
            let p = softmax(&z);
            std::array::from_fn(|j| {
                (0..3)
                    .map(|y| {
                        let ratio = p[y] / old[y];
                        let (_, derivative) = kl(estimator, p[y].ln(), reference[y].ln(), ratio, ratio);
                        old[y] * derivative * (f64::from(u8::from(y == j)) - p[j])
                    })
                    .sum()
            })
        };
        let want: [f64; 3] = std::array::from_fn(|j| {
            let shifted = |by: f64| std::array::from_fn(|i| if i == j { z[i] + by } else { z[i] });
            (exact(&shifted(1e-6)) - exact(&shifted(-1e-6))) / 2e-6
        });
        let differs = |got: [f64; 3]| got.iter().zip(&want).any(|(got, want)| (got - want).abs() > 1e-6);
        let (same, other) = (softmax(&z), softmax(&[0.0, 0.2, 0.5]));
        assert!(!differs(gradient(KlEstimator::K2, &same)));
        assert!(!differs(gradient(KlEstimator::UnbiasedK3, &same)));
        assert!(!differs(gradient(KlEstimator::UnbiasedK3, &other)));
        assert!(differs(gradient(KlEstimator::K1, &same)) && differs(gradient(KlEstimator::K3, &same)));
    }
}
