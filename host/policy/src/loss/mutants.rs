//! Planted mistakes: a second, plain writing of the whole loss in which one thing at a time can be wrong. Without a mistake it
//! is the vectors' loss and the host's; with any of them it fails at least one vector, so the vectors would have caught it.

#![expect(clippy::float_cmp, reason = "a mask makes exact zeros")]

use std::collections::BTreeSet;

use fulgurite_core::training::{
    Aggregation, CorrectionRule, KlEstimator, LossSpec, PolicyLoss, RatioLevel, RowLogProbs, SequenceScope, Stream,
};

use super::vectors::{Vector, all, close};
use super::{BatchLoss, Seen, trained};
use crate::sums::Sums;

/// The mistakes: a type of them, and the list of all.
macro_rules! mistakes {
    ($($(#[$what:meta])* $mistake:ident,)+) => {
        /// What is wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Mistake {
            None,
            $($(#[$what])* $mistake,)+
        }

        const MISTAKES: &[Mistake] = &[$(Mistake::$mistake),+];
    };
}

mistakes! {
    /// A for -A.
    Sign,
    /// The smaller of plain and clipped instead of the larger.
    ClipSide,
    /// The lower bound above and the upper one below.
    ClipBoundsSwapped,
    /// The clipped term keeps its gradient.
    ClipKeepsGradient,
    DualClipLeftOut,
    /// On positive advantages too.
    DualClipEverywhere,
    RatioMaxLeftOut,
    /// π_old/π_θ.
    RatioInverted,
    /// μ in place of π_old.
    RatioOfBehaviour,
    /// Token for whatever was asked.
    LevelOfTokens,
    /// Sum and mean.
    LevelsSwapped,
    /// A rollout's where a call's was asked.
    ScopeIgnored,
    /// The ratio of CISPO is derived as well.
    RatioNotHeld,
    TemperaturesSwapped,
    /// μ/π_old.
    CorrectionInverted,
    CorrectionNotTruncated,
    /// Outside in.
    MaskInverted,
    /// Weights of tokens for whatever was asked.
    CorrectionOfTokens,
    CorrectionNotNormalised,
    OffPolicyMaskOfPositive,
    OffPolicyMaskInverted,
    /// Reference and policy.
    KlInverted,
    KlNotBounded,
    /// The unbiased k3 forgets its ratio.
    KlWithoutRatio,
    /// The KL of tokens of μ is taken for one of tokens of π_old.
    KlNotCorrected,
    EntropyPunished,
    /// Means over tokens for whatever was asked.
    NormaliserOfTokens,
    /// Rows for sequences: the divisor of Agent Lightning 1.0 (ALGORITHMS.md section 9.3).
    NormaliserOfRows,
    /// A constant length without the number of sequences, and one with it.
    ConstantsSwapped,
    /// One normaliser for demonstrations and rollouts.
    StreamsMixed,
}

use Mistake::*;

/// A token of a vector.
#[derive(Debug, Clone, Copy, Default)]
struct Token {
    row: u32,
    sequence: (u32, u32),
    group: u64,
    is_demonstrated: bool,
    advantage: f64,
    new: f64,
    old: f64,
    behaviour: f64,
    reference: f64,
    entropy: f64,
}

fn tokens(vector: &Vector, mistake: Mistake) -> Vec<Token> {
    let mut all = vec![];
    for (number, row) in vector.rows.iter().enumerate() {
        for at in trained(row) {
            let scope = if mistake == ScopeIgnored { SequenceScope::Rollout } else { vector.spec.sequence_scope };
            let behaviour = f64::from(row.behaviour_log_probs[at]);
            let old = row.old_log_probs.get(at).copied().map_or(behaviour, f64::from);
            all.push(Token {
                row: u32::try_from(number).unwrap(),
                sequence: (row.sequence, if scope == SequenceScope::Call { row.calls[at] } else { 0 }),
                group: row.group.unwrap_or(0),
                is_demonstrated: row.stream == Stream::Ce,
                advantage: f64::from(row.weights[at]),
                new: f64::from(vector.log_probs[number][at]),
                old: if mistake == RatioOfBehaviour { behaviour } else { old },
                behaviour,
                reference: vector.references.as_ref().map_or(0.0, |rows| f64::from(rows[number][at])),
                entropy: f64::from(vector.entropies[number][at]),
            });
        }
    }
    all
}

/// The tokens of the same stream and sequence.
fn mates<'a>(all: &'a [Token], token: &Token) -> Vec<&'a Token> {
    let same = |mate: &&Token| mate.sequence == token.sequence && mate.is_demonstrated == token.is_demonstrated;
    all.iter().filter(same).collect()
}

/// A log difference at a level.
fn at_level(level: RatioLevel, all: &[Token], token: &Token, of: impl Fn(&Token) -> f64) -> f64 {
    let sum: f64 = mates(all, token).into_iter().map(&of).sum();
    match level {
        RatioLevel::Token => of(token),
        RatioLevel::SequenceMean => sum / mates(all, token).len() as f64,
        RatioLevel::SequenceSum => sum,
    }
    .clamp(-20.0, 20.0)
}

fn correction(spec: &LossSpec, all: &[Token], token: &Token, mistake: Mistake) -> f64 {
    let Some(correction) = spec.correction else { return 1.0 };
    let level = if mistake == CorrectionOfTokens { RatioLevel::Token } else { correction.level };
    let sign = if mistake == CorrectionInverted { -1.0 } else { 1.0 };
    let weight = |token: &Token| {
        let weight = at_level(level, all, token, |token| sign * (token.old - token.behaviour)).exp();
        match correction.rule {
            CorrectionRule::Truncate { .. } if mistake == CorrectionNotTruncated => weight,
            CorrectionRule::Truncate { max } => weight.min(f64::from(max)),
            CorrectionRule::Mask { min, max } => {
                let inside = (f64::from(min)..=f64::from(max)).contains(&weight);
                if inside == (mistake == MaskInverted) { 0.0 } else { weight }
            }
        }
    };
    let drawn: Vec<&Token> = all.iter().filter(|token| !token.is_demonstrated).collect();
    let weights: Vec<f64> = if level == RatioLevel::Token {
        drawn.iter().map(|token| weight(token)).collect()
    } else {
        let mut seen = BTreeSet::new();
        drawn.iter().filter(|token| seen.insert(token.sequence)).map(|token| weight(token)).collect()
    };
    let mean = weights.iter().sum::<f64>() / weights.len() as f64;
    let normalises = correction.batch_normalise && mistake != CorrectionNotNormalised && mean > 0.0;
    weight(token) / if normalises { mean } else { 1.0 }
}

/// Loss of a policy-gradient token and its derivative.
fn policy_token(spec: &LossSpec, all: &[Token], token: &Token, mistake: Mistake) -> (f64, f64) {
    let level = match (mistake, spec.ratio_level) {
        (LevelOfTokens, _) => RatioLevel::Token,
        (LevelsSwapped, RatioLevel::SequenceMean) => RatioLevel::SequenceSum,
        (LevelsSwapped, RatioLevel::SequenceSum) => RatioLevel::SequenceMean,
        (_, level) => level,
    };
    let sign = if mistake == RatioInverted { -1.0 } else { 1.0 };
    let r = at_level(level, all, token, |token| sign * (token.new - token.old)).exp();
    let count = mates(all, token).len() as f64;
    // d r / d log π, and the token's share of a loss of the whole sequence.
    let (slope, share) =
        if level == RatioLevel::SequenceSum { (sign * r * count, 1.0 / count) } else { (sign * r, 1.0) };
    let a = if mistake == Sign { -token.advantage } else { token.advantage };
    let delta = spec.ratio_max.filter(|_| mistake != RatioMaxLeftOut).map_or(f64::INFINITY, f64::from);
    let plain = (-a * r.min(delta), if r > delta { 0.0 } else { -a });
    let of_ratio = |(loss, d_ratio): (f64, f64)| (share * loss, share * d_ratio * slope);
    let (mut loss, mut d) = match spec.policy_loss {
        PolicyLoss::Reinforce => (-a * token.new, -a),
        PolicyLoss::ImportanceSampling => of_ratio(plain),
        PolicyLoss::Ppo { clip_low, clip_high, dual_clip } => {
            let (low, high) = if mistake == ClipBoundsSwapped { (clip_high, clip_low) } else { (clip_low, clip_high) };
            let bounded = -a * r.clamp(1.0 - f64::from(low), 1.0 + f64::from(high));
            let takes_bounded = if mistake == ClipSide { bounded < plain.0 } else { bounded > plain.0 };
            let kept = if mistake == ClipKeepsGradient { -a } else { 0.0 };
            let mut found = if takes_bounded { (bounded, kept) } else { plain };
            let most = dual_clip.filter(|_| mistake != DualClipLeftOut).map(|c| -a * f64::from(c));
            if let Some(most) = most.filter(|most| (a < 0.0 || mistake == DualClipEverywhere) && *most < found.0) {
                found = (most, 0.0);
            }
            of_ratio(found)
        }
        PolicyLoss::Cispo { clip_low, clip_high } => {
            let low = clip_low.map_or(f64::NEG_INFINITY, |low| 1.0 - f64::from(low));
            let held = r.clamp(low, 1.0 + f64::from(clip_high));
            let extra = if mistake == RatioNotHeld && held == r { -a * token.new * slope } else { 0.0 };
            (-held * a * token.new, -held * a + extra)
        }
        PolicyLoss::Sapo { temperature_positive, temperature_negative } => {
            let positive = (a > 0.0) != (mistake == TemperaturesSwapped);
            let tau = f64::from(if positive { temperature_positive } else { temperature_negative });
            let gate = 1.0 / (1.0 + (-tau * (r - 1.0)).exp());
            of_ratio((-a * 4.0 / tau * gate, -a * 4.0 * gate * (1.0 - gate)))
        }
    };
    let mut weight = correction(spec, all, token, mistake);
    let kl_weight = if mistake == KlNotCorrected { 1.0 } else { weight };
    if let Some(delta) = spec.off_policy_mask {
        let sign = if mistake == OffPolicyMaskInverted { -1.0 } else { 1.0 };
        let drift = at_level(RatioLevel::SequenceMean, all, token, |token| sign * (token.behaviour - token.new));
        let counts = if mistake == OffPolicyMaskOfPositive { token.advantage > 0.0 } else { token.advantage < 0.0 };
        if counts && drift > f64::from(delta) {
            weight = 0.0;
        }
    }
    (loss, d) = (weight * loss, weight * d);
    if let Some(kl) = &spec.kl {
        let (value, slope) = kl_of(kl.estimator, token, mistake);
        loss += kl_weight * f64::from(kl.coefficient) * value;
        d += kl_weight * f64::from(kl.coefficient) * slope;
    }
    (loss, d)
}

fn kl_of(estimator: KlEstimator, token: &Token, mistake: Mistake) -> (f64, f64) {
    let sign = if mistake == KlInverted { -1.0 } else { 1.0 };
    let x = sign * (token.reference - token.new);
    let held = x.clamp(-20.0, 20.0);
    let k3 = held.exp() - held - 1.0;
    let d_k3 = if held == x { sign * (1.0 - x.exp()) } else { 0.0 };
    let r = if mistake == KlWithoutRatio { 1.0 } else { (token.new - token.old).exp() };
    let (value, slope) = match estimator {
        KlEstimator::K1 => return (-x, sign),
        KlEstimator::K2 => return (0.5 * x * x, -sign * x),
        KlEstimator::K3 => (k3, d_k3),
        KlEstimator::UnbiasedK3 => {
            let of_ratio = if mistake == KlWithoutRatio || held != x { 0.0 } else { r * k3 };
            (r * k3, of_ratio + r * d_k3)
        }
    };
    if value > 10.0 && mistake != KlNotBounded { (10.0, 0.0) } else { (value, slope) }
}

fn coefficient(spec: &LossSpec, all: &[Token], token: &Token, mistake: Mistake) -> f64 {
    let is_mixed = mistake == StreamsMixed;
    let stream: Vec<&Token> =
        all.iter().filter(|other| is_mixed || other.is_demonstrated == token.is_demonstrated).collect();
    let unit = |token: &Token| if mistake == NormaliserOfRows { (u32::MAX, token.row) } else { token.sequence };
    let sequences = stream.iter().map(|token| unit(token)).collect::<BTreeSet<_>>().len() as f64;
    let length = stream.iter().filter(|other| unit(other) == unit(token)).count() as f64;
    let groups = stream.iter().map(|token| token.group).collect::<BTreeSet<_>>().len() as f64;
    let of_group = stream.iter().filter(|other| other.group == token.group).count() as f64;
    let aggregation = if mistake == NormaliserOfTokens { &Aggregation::TokenMean } else { &spec.aggregation };
    1.0 / match aggregation {
        Aggregation::TokenMean => stream.len() as f64,
        Aggregation::SequenceMeanTokenMean => sequences * length,
        Aggregation::SequenceMeanTokenSum => sequences,
        Aggregation::Constant { length } if mistake == ConstantsSwapped => f64::from(*length),
        Aggregation::SumConstant { length } if mistake == ConstantsSwapped => sequences * f64::from(*length),
        Aggregation::Constant { length } => sequences * f64::from(*length),
        Aggregation::SumConstant { length } => f64::from(*length),
        Aggregation::PromptMean => groups * of_group,
    }
}

/// Loss and derivatives of a vector, with a mistake.
fn evaluate(vector: &Vector, mistake: Mistake) -> (f64, Vec<f64>) {
    let all = tokens(vector, mistake);
    let drawn = all.iter().filter(|token| !token.is_demonstrated).count() as f64;
    let (mut total, mut slopes) = (0.0, vec![]);
    for token in &all {
        let (loss, d) = if token.is_demonstrated {
            (-token.advantage * token.new, -token.advantage)
        } else {
            let sign = if mistake == EntropyPunished { -1.0 } else { 1.0 };
            total -= sign * f64::from(vector.spec.entropy_coefficient) * token.entropy / drawn;
            policy_token(&vector.spec, &all, token, mistake)
        };
        let coefficient = coefficient(&vector.spec, &all, token, mistake);
        total += coefficient * loss;
        slopes.push(coefficient * d);
    }
    (total, slopes)
}

fn agrees(vector: &Vector, (loss, slopes): &(f64, Vec<f64>)) -> bool {
    close(*loss, vector.loss) && slopes.iter().zip(&vector.d_log_probs).all(|(a, b)| close(*a, *b))
}

/// The host's own.
fn of_the_host(vector: &Vector) -> (f64, Vec<f64>) {
    let known: Vec<RowLogProbs> = vector
        .log_probs
        .iter()
        .map(|row| RowLogProbs { log_probs: row.clone(), entropies: vec![0.0; row.len()] })
        .collect();
    let loss = BatchLoss::new(vector.spec.clone(), &vector.rows, || Ok(known)).unwrap();
    let (mut sums, mut slopes) = (Sums::default(), vec![]);
    for (number, row) in vector.rows.iter().enumerate() {
        for at in trained(row) {
            let reference = vector.references.as_ref().map(|rows| f64::from(rows[number][at]));
            let (log_prob, entropy) = (vector.log_probs[number][at], vector.entropies[number][at]);
            let seen = Seen { log_prob: f64::from(log_prob), entropy: f64::from(entropy), reference };
            slopes.push(loss.token(row, at, seen, &mut sums).log_prob);
        }
    }
    (sums.loss, slopes)
}

#[test]
fn both_writings_of_the_loss_agree_with_the_vectors() {
    for vector in all() {
        for found in [of_the_host(&vector), evaluate(&vector, None)] {
            assert!(agrees(&vector, &found), "{}: {found:?} instead of {vector:?}", vector.name);
        }
    }
}

#[test]
fn every_mistake_fails_a_vector() {
    let vectors = all();
    for &mistake in MISTAKES {
        let failed = vectors.iter().filter(|vector| !agrees(vector, &evaluate(vector, mistake))).count();
        assert!(failed > 0, "no vector catches {mistake:?}");
    }
}
