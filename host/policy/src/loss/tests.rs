//! Properties of losses (ALGORITHMS.md section 17). The vectors of section 16 are in `tests/vectors/`.

#![expect(clippy::float_cmp, reason = "bits are what is tested")]

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::KeptTokens;
use fulgurite_core::training::{
    Aggregation, Correction, CorrectionRule, KlEstimator, KlTerm, PolicyLoss, RatioLevel, SequenceScope,
};

use super::kl::kl;
use super::*;

fn ppo(clip_low: f32, clip_high: f32, dual_clip: Option<f32>) -> LossSpec {
    LossSpec { policy_loss: PolicyLoss::Ppo { clip_low, clip_high, dual_clip }, ..LossSpec::default() }
}

/// A row of so many trained tokens after one that cannot be, even when it is marked.
fn row(sequence: u32, tokens: usize, stream: Stream) -> TrainingRow {
    TrainingRow {
        sequence,
        ids: vec![0; tokens + 1],
        mask: vec![true; tokens + 1],
        weights: vec![1.0; tokens + 1],
        behaviour_log_probs: vec![0.0; tokens + 1],
        old_log_probs: vec![],
        calls: vec![],
        group: None,
        stream,
        temperature: 1.0,
        policy_version: PolicyVersion(0),
        kept: KeptTokens::default(),
    }
}

/// One row of tokens from their advantages, log-probs of μ and π_old.
fn tokens(sequence: u32, advantage: f32, behaviour: &[f32], old: &[f32]) -> TrainingRow {
    let mut row = row(sequence, old.len(), Stream::Rl);
    row.weights.fill(advantage);
    row.behaviour_log_probs = [&[0.0], behaviour].concat();
    row.old_log_probs = [&[0.0], old].concat();
    row
}

fn known(rows: &[Vec<f32>]) -> Vec<RowLogProbs> {
    let row = |row: &Vec<f32>| RowLogProbs { log_probs: row.clone(), entropies: vec![0.0; row.len()] };
    rows.iter().map(row).collect()
}

/// Loss and derivatives of a batch under these log-probs.
fn evaluate(
    spec: &LossSpec,
    rows: &[TrainingRow],
    log_probs: &[Vec<f32>],
    reference: Option<f64>,
) -> (f64, Vec<Vec<f64>>) {
    let loss = BatchLoss::new(spec.clone(), rows, || Ok(known(log_probs))).unwrap();
    let mut sums = Sums::default();
    let slopes = rows.iter().zip(log_probs).map(|(row, log_probs)| {
        let mut slopes = vec![0.0; row.ids.len()];
        for at in trained(row) {
            let seen = Seen { log_prob: f64::from(log_probs[at]), entropy: 0.0, reference };
            slopes[at] = loss.token(row, at, seen, &mut sums).log_prob;
        }
        slopes
    });
    let slopes = slopes.collect();
    (sums.loss, slopes)
}

/// Every smooth loss, at every level, with everything around it: the derivative is the slope of the batch's loss. In token form
/// that holds for sequences whose tokens have one advantage. CISPO holds its ratio constant and has no such slope.
#[test]
fn derivatives_are_the_slopes_of_the_batch() {
    let rows = [
        tokens(0, 0.75, &[-1.0, -2.0, -0.5], &[-1.125, -1.75, -0.5]),
        tokens(1, -0.5, &[-0.25, -3.0], &[-0.5, -2.75]),
        tokens(0, 0.75, &[-0.75], &[-0.875]),
    ];
    let log_probs = [vec![0.0, -1.25, -1.5, -0.75], vec![0.0, -0.375, -2.875], vec![0.0, -0.625]];
    let sapo = PolicyLoss::Sapo { temperature_positive: 1.0, temperature_negative: 1.05 };
    let correction = |level, rule| Some(Correction { level, rule, batch_normalise: true });
    for policy_loss in [ppo(0.9, 9.0, None).policy_loss, sapo, PolicyLoss::ImportanceSampling, PolicyLoss::Reinforce] {
        for level in [RatioLevel::Token, RatioLevel::SequenceMean, RatioLevel::SequenceSum] {
            for (aggregation, correction) in [
                (Aggregation::TokenMean, None),
                (Aggregation::SequenceMeanTokenMean, correction(level, CorrectionRule::Truncate { max: 1.1 })),
                (Aggregation::SequenceMeanTokenSum, correction(level, CorrectionRule::Mask { min: 0.8, max: 1.2 })),
            ] {
                let kl = Some(KlTerm { estimator: KlEstimator::UnbiasedK3, coefficient: 0.25 });
                let spec = LossSpec {
                    policy_loss: policy_loss.clone(),
                    ratio_level: level,
                    aggregation,
                    correction,
                    kl,
                    ..LossSpec::default()
                };
                let (_, slopes) = evaluate(&spec, &rows, &log_probs, Some(-1.0));
                // Exact in f32, so that a difference of losses is one of the numbers meant.
                let step = 2.0_f32.powi(-10);
                for (row, at) in [(0, 1), (0, 3), (1, 2), (2, 1)] {
                    let moved = |by: f32| {
                        let mut log_probs = log_probs.clone();
                        log_probs[row][at] += by;
                        evaluate(&spec, &rows, &log_probs, Some(-1.0)).0
                    };
                    let numeric = (moved(step) - moved(-step)) / f64::from(2.0 * step);
                    let slope = slopes[row][at];
                    assert!((slope - numeric).abs() < 1e-5 * numeric.abs().max(1.0), "{spec:?}: {slope} {numeric}");
                }
            }
        }
    }
}

#[test]
fn a_sequence_cut_into_rows_keeps_its_loss_and_masked_rows_do_not_count() {
    let whole =
        [tokens(0, 0.75, &[-1.0, -2.0, -0.5], &[-1.125, -1.75, -0.5]), tokens(1, -0.5, &[-0.25, -3.0], &[-0.5, -2.75])];
    let mut empty = tokens(7, 4.0, &[-1.0; 5], &[-2.0; 5]);
    empty.mask.fill(false);
    let cut =
        [tokens(0, 0.75, &[-0.5], &[-0.5]), empty, whole[1].clone(), tokens(0, 0.75, &[-1.0, -2.0], &[-1.125, -1.75])];
    let log_probs = [vec![0.0, -1.25, -1.5, -0.75], vec![0.0, -0.375, -2.875]];
    let cut_log_probs = [vec![0.0, -0.75], vec![0.0; 6], log_probs[1].clone(), vec![0.0, -1.25, -1.5]];
    for aggregation in [
        Aggregation::TokenMean,
        Aggregation::SequenceMeanTokenMean,
        Aggregation::SequenceMeanTokenSum,
        Aggregation::Constant { length: 9 },
        Aggregation::SumConstant { length: 9 },
        Aggregation::PromptMean,
    ] {
        for level in [RatioLevel::Token, RatioLevel::SequenceMean, RatioLevel::SequenceSum] {
            let rule = CorrectionRule::Truncate { max: 1.1 };
            let spec = LossSpec {
                aggregation: aggregation.clone(),
                ratio_level: level,
                correction: Some(Correction { level, rule, batch_normalise: true }),
                off_policy_mask: Some(0.05),
                ..LossSpec::default()
            };
            let grouped = |rows: &[TrainingRow]| -> Vec<TrainingRow> {
                rows.iter().map(|row| TrainingRow { group: Some(row.sequence.into()), ..row.clone() }).collect()
            };
            let (a, slopes) = evaluate(&spec, &grouped(&whole), &log_probs, None);
            let (b, cut_slopes) = evaluate(&spec, &grouped(&cut), &cut_log_probs, None);
            assert!((a - b).abs() < 1e-12, "{spec:?}: {a} {b}");
            let again = [[cut_slopes[3].clone(), cut_slopes[0][1..].to_vec()].concat(), cut_slopes[2].clone()];
            for (slope, again) in slopes.iter().flatten().zip(again.iter().flatten()) {
                assert!((slope - again).abs() < 1e-12, "{spec:?}: {slopes:?} {again:?}");
            }
            assert_eq!(cut_slopes[1], [0.0; 6]);
        }
    }
    let mut nothing = row(0, 3, Stream::Rl);
    nothing.mask.fill(false);
    assert_eq!(evaluate(&LossSpec::default(), &[nothing], &[vec![0.0; 4]], None), (0.0, vec![vec![0.0; 4]]));
}

#[test]
fn calls_are_sequences_when_the_loss_says_so() {
    let mut merged = tokens(0, 1.0, &[-1.0, -1.0, -1.0], &[-1.0, -1.0, -1.0]);
    merged.calls = vec![0, 0, 1, 1];
    let log_probs = [vec![0.0, -0.5, -1.25, -0.75]];
    let spec = |sequence_scope| LossSpec {
        policy_loss: PolicyLoss::ImportanceSampling,
        ratio_level: RatioLevel::SequenceSum,
        aggregation: Aggregation::SequenceMeanTokenSum,
        sequence_scope,
        ..LossSpec::default()
    };
    let (rollout, _) = evaluate(&spec(SequenceScope::Rollout), std::slice::from_ref(&merged), &log_probs, None);
    let (call, _) = evaluate(&spec(SequenceScope::Call), &[merged], &log_probs, None);
    assert!((rollout + 0.5_f64.exp()).abs() < 1e-12, "{rollout}");
    assert!((call + f64::midpoint(0.5_f64.exp(), 1.0)).abs() < 1e-12, "{call}");
}

#[test]
fn streams_have_normalisers_of_their_own() {
    let rows = [row(0, 4, Stream::Rl), row(1, 2, Stream::Ce)];
    let of = |aggregation| Normalisers::new(&aggregation, SequenceScope::Rollout, &rows);
    let normalisers = of(Aggregation::TokenMean).unwrap();
    assert_eq!((normalisers.coefficient(&rows[0], 1), normalisers.coefficient(&rows[1], 1)), (0.25, 0.5));
    assert_eq!(normalisers.entropy_coefficient(), 0.25);
    for (aggregation, says) in [
        (Aggregation::Constant { length: 0 }, "length is 0"),
        (Aggregation::SumConstant { length: 0 }, "length is 0"),
        (Aggregation::PromptMean, "no group"),
    ] {
        assert!(of(aggregation).unwrap_err().to_string().contains(says));
    }
}

#[test]
fn equal_policies_have_ratio_1_and_the_gradient_of_reinforce() {
    let rows = [tokens(0, -2.0, &[-1.3, -0.7], &[-1.3, -0.7]), tokens(1, 0.5, &[-2.1], &[-2.1])];
    let log_probs = [vec![0.0, -1.3, -0.7], vec![0.0, -2.1]];
    let reinforce = LossSpec { policy_loss: PolicyLoss::Reinforce, ..LossSpec::default() };
    let (_, want) = evaluate(&reinforce, &rows, &log_probs, None);
    let sapo = PolicyLoss::Sapo { temperature_positive: 1.0, temperature_negative: 1.05 };
    let cispo = PolicyLoss::Cispo { clip_low: None, clip_high: 4.0 };
    for policy_loss in [ppo(0.2, 0.28, Some(3.0)).policy_loss, sapo, cispo, PolicyLoss::ImportanceSampling] {
        for level in [RatioLevel::Token, RatioLevel::SequenceMean, RatioLevel::SequenceSum] {
            for rule in [CorrectionRule::Truncate { max: 2.0 }, CorrectionRule::Mask { min: 0.999, max: 1.001 }] {
                let spec = LossSpec {
                    policy_loss: policy_loss.clone(),
                    ratio_level: level,
                    correction: Some(Correction { level, rule, batch_normalise: true }),
                    off_policy_mask: Some(0.0),
                    ..LossSpec::default()
                };
                let (_, slopes) = evaluate(&spec, &rows, &log_probs, None);
                for (slope, want) in slopes.iter().flatten().zip(want.iter().flatten()) {
                    assert!((slope - want).abs() < 1e-12, "{spec:?}: {slope} {want}");
                }
                let loss = BatchLoss::new(spec, &rows, || Ok(known(&log_probs))).unwrap();
                let seen = Seen { log_prob: f64::from(-1.3_f32), entropy: 0.0, reference: None };
                let token = loss.policy_token(&rows[0], 1, &Given::of(&rows[0], 1), seen);
                assert_eq!((token.ratio, token.correction, token.clipped, token.dropped), (1.0, 1.0, false, false));
            }
        }
    }
    assert_eq!(approximate_kl(-1.3, -1.3), 0.0);
}

/// ALGORITHMS.md section 17, property 6: whoever thinks a token impossible, the trained policy included.
#[test]
fn impossible_tokens_never_make_a_loss_that_is_not_a_number() {
    let infinity = f32::NEG_INFINITY;
    let sapo = PolicyLoss::Sapo { temperature_positive: 1.0, temperature_negative: 1.05 };
    let cispo = PolicyLoss::Cispo { clip_low: None, clip_high: 4.0 };
    let ppo = ppo(0.2, 0.28, Some(3.0)).policy_loss;
    let mut cases = vec![];
    for policy_loss in [ppo, sapo, cispo, PolicyLoss::ImportanceSampling, PolicyLoss::Reinforce] {
        for level in [RatioLevel::Token, RatioLevel::SequenceMean, RatioLevel::SequenceSum] {
            for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3, KlEstimator::UnbiasedK3] {
                for rule in [CorrectionRule::Truncate { max: 2.0 }, CorrectionRule::Mask { min: 0.5, max: 2.0 }] {
                    cases.push(LossSpec {
                        policy_loss: policy_loss.clone(),
                        ratio_level: level,
                        correction: Some(Correction { level, rule, batch_normalise: true }),
                        kl: Some(KlTerm { estimator, coefficient: 0.1 }),
                        ..LossSpec::default()
                    });
                }
            }
        }
    }
    let policies = [infinity, -1.0];
    for spec in &cases {
        for (old, behaviour) in policies.iter().flat_map(|old| policies.map(|behaviour| (*old, behaviour))) {
            for (new, reference) in policies.iter().flat_map(|new| policies.map(|reference| (*new, reference))) {
                for weight in [1.0, -1.0, 0.0] {
                    let rows = [tokens(0, weight, &[behaviour, -1.0], &[old, -1.0])];
                    let log_probs = [vec![0.0, new, -1.0]];
                    let (loss, slopes) = evaluate(spec, &rows, &log_probs, Some(f64::from(reference)));
                    assert!(loss.is_finite(), "{spec:?} {rows:?} {new} {reference}");
                    assert!(slopes[0].iter().all(|slope| slope.is_finite()), "{spec:?} {rows:?} {new} {slopes:?}");
                }
            }
        }
    }
    let demonstrated = TrainingRow { stream: Stream::Ce, ..tokens(0, 1.0, &[0.0, 0.0], &[0.0, 0.0]) };
    let (loss, slopes) = evaluate(&LossSpec::default(), &[demonstrated], &[vec![0.0, infinity, -1.0]], None);
    assert_eq!((loss, slopes[0].clone()), (52.5, vec![0.0, 0.0, -0.5]), "the impossible token counts and is not moved");
}

#[test]
fn a_mismatch_is_a_number_where_both_policies_think_a_token_impossible() {
    let rows = [tokens(0, 1.0, &[f32::NEG_INFINITY, -1.0], &[f32::NEG_INFINITY, -1.0])];
    let loss = BatchLoss::new(LossSpec::default(), &rows, || Ok(vec![])).unwrap();
    let mut sums = Sums::default();
    for (at, log_prob) in [(1, f64::NEG_INFINITY), (2, -0.5)] {
        loss.token(&rows[0], at, Seen { log_prob, entropy: 0.0, reference: None }, &mut sums);
    }
    let report = sums.report(2);
    let k3 = (0.5_f64.exp() - 1.5) / 2.0;
    assert_eq!((report.mismatch_mean, report.mismatch_max), (0.25, 0.5));
    assert!((report.mismatch_k3 - k3).abs() < 1e-12, "{report:?}");
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let sapo = |temperature| PolicyLoss::Sapo { temperature_positive: temperature, temperature_negative: 1.0 };
    let correction = |rule| Some(Correction { level: RatioLevel::Token, rule, batch_normalise: false });
    let default = LossSpec::default;
    for (spec, names) in [
        (ppo(f32::NAN, 0.2, None), "clip_low"),
        (ppo(0.2, 0.2, Some(0.5)), "dual_clip"),
        (LossSpec { policy_loss: sapo(0.0), ..default() }, "temperature_positive"),
        (LossSpec { policy_loss: PolicyLoss::Cispo { clip_low: Some(-1.0), clip_high: 1.0 }, ..default() }, "clip_low"),
        (LossSpec { ratio_max: Some(0.5), ..default() }, "ratio_max"),
        (LossSpec { ratio_max: Some(4.0), policy_loss: sapo(1.0), ..default() }, "ratio_max"),
        (LossSpec { correction: correction(CorrectionRule::Truncate { max: 0.0 }), ..default() }, "truncate"),
        (LossSpec { correction: correction(CorrectionRule::Mask { min: 2.0, max: 1.0 }), ..default() }, "mask.1"),
        (LossSpec { off_policy_mask: Some(f32::INFINITY), ..default() }, "off_policy_mask"),
        (LossSpec { entropy_coefficient: f32::NAN, ..default() }, "entropy_coefficient"),
    ] {
        let refused = BatchLoss::new(spec, &[], || Ok(vec![])).unwrap_err().to_string();
        assert!(refused.contains(names), "{refused}");
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
                    let ratio = Ratio::of_token(p[y].ln(), old[y].ln());
                    let (_, derivative) = kl(estimator, p[y].ln(), reference[y].ln(), &ratio);
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

/// The gradient of the exact KL is what unbiased k3 has in expectation over tokens of an older policy μ, when the correction
/// weights the KL as well; k2 has it too while π_θ is π_old. Without that weight both are biased.
#[test]
fn a_correction_makes_the_gradient_of_the_kl_unbiased_under_stale_tokens() {
    let softmax = |z: [f64; 3]| {
        let sum: f64 = z.iter().map(|z| z.exp()).sum();
        z.map(|z| z.exp() / sum)
    };
    let narrow = |log_prob: f64| {
        #[expect(clippy::cast_possible_truncation, reason = "rows hold f32")]
        let narrow = log_prob as f32;
        narrow
    };
    let z = [0.3, -0.7, 1.1];
    let (policy, reference, behaviour) = (softmax(z), softmax([0.9, 0.1, -0.4]), softmax([1.0, 0.4, -0.2]));
    let kl = |p: [f64; 3]| -> f64 { p.iter().zip(&reference).map(|(p, q)| p * (p / q).ln()).sum() };
    let want: [f64; 3] = std::array::from_fn(|j| {
        let moved = |by: f64| kl(softmax(std::array::from_fn(|i| if i == j { z[i] + by } else { z[i] })));
        (moved(1e-5) - moved(-1e-5)) / 2e-5
    });
    let gradient = |estimator, old: [f64; 3], is_corrected: bool| -> [f64; 3] {
        let rule = CorrectionRule::Truncate { max: 1e6 };
        let correction = Correction { level: RatioLevel::Token, rule, batch_normalise: false };
        let spec = LossSpec {
            kl: Some(KlTerm { estimator, coefficient: 1.0 }),
            correction: is_corrected.then_some(correction),
            ..LossSpec::default()
        };
        let slopes: [f64; 3] = std::array::from_fn(|y| {
            let rows = [tokens(0, 0.0, &[narrow(behaviour[y].ln())], &[narrow(old[y].ln())])];
            let log_probs = [vec![0.0, narrow(policy[y].ln())]];
            evaluate(&spec, &rows, &log_probs, Some(reference[y].ln())).1[0][1]
        });
        std::array::from_fn(|j| {
            (0..3).map(|y| behaviour[y] * slopes[y] * (f64::from(u8::from(y == j)) - policy[j])).sum()
        })
    };
    let differs = |got: [f64; 3]| got.iter().zip(&want).any(|(got, want)| (got - want).abs() > 1e-5);
    let (same, other) = (policy, softmax([0.0, 0.2, 0.5]));
    for (estimator, old) in [(KlEstimator::UnbiasedK3, same), (KlEstimator::UnbiasedK3, other), (KlEstimator::K2, same)]
    {
        assert!(
            !differs(gradient(estimator, old, true)),
            "{estimator:?} {:?} {want:?}",
            gradient(estimator, old, true)
        );
        assert!(differs(gradient(estimator, old, false)), "{estimator:?}");
    }
}

#[test]
fn the_shares_of_calls_are_what_the_loss_goes_by() {
    let mut two_calls = tokens(0, 1.0, &[-1.0, -1.0, -3.0], &[-1.0, -1.5, -1.0]);
    two_calls.calls = vec![0, 0, 0, 1];
    let rows = [two_calls, tokens(1, 1.0, &[-1.0], &[-1.0]), row(2, 5, Stream::Ce)];
    let rule = CorrectionRule::Mask { min: 0.5, max: 2.0 };
    let spec = LossSpec {
        aggregation: Aggregation::SequenceMeanTokenMean,
        correction: Some(Correction { level: RatioLevel::Token, rule, batch_normalise: false }),
        ..LossSpec::default()
    };
    let shares = call_shares(&spec, &rows).unwrap();
    let share = |sequence, is_given, call| shares[&(sequence, is_given, call)];
    assert_eq!(shares.len(), 4);
    let first = share(0, false, 0);
    assert_eq!((first.tokens, first.coefficient, first.dropped), (2, 1.0 / 6.0, 0));
    assert!((first.correction.unwrap() - f64::midpoint(1.0, (-0.5_f64).exp())).abs() < 1e-12);
    let dropped = CallShare { tokens: 1, coefficient: 1.0 / 6.0, correction: Some(0.0), dropped: 1 };
    assert_eq!(share(0, false, 1), dropped);
    assert_eq!(share(1, false, 0), CallShare { coefficient: 0.5, correction: Some(1.0), dropped: 0, ..dropped });
    let given = share(2, true, 0);
    assert!((given.coefficient - 0.2).abs() < 1e-12 && given.correction.is_none(), "{given:?}");
}
