//! Tests of the batch runner on every device: gradients against finite differences and each other.

#![expect(clippy::float_cmp, reason = "bits are what is tested")]
#![expect(clippy::cast_possible_truncation, reason = "test weights are f32")]

use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::KeptTokens;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::training::{
    Aggregation, Correction, CorrectionRule, KlEstimator, KlTerm, LossSpec, PolicyLoss, RatioLevel, RowDerivatives,
    SequenceScope, Stream, TrainingRow,
};

use crate::config::PolicyConfig;
use crate::device::PolicyDevice;
use crate::loss::BatchLoss;
use crate::optimiser::gradient_norm;
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
use crate::train::{BatchRunner, Objective, Outcome};
use crate::weights::ModelWeights;

pub(crate) const VOCABULARY: usize = 61;

pub(crate) fn config(device: PolicyDevice, kv_heads: usize, tied: bool) -> PolicyConfig {
    PolicyConfig {
        device,
        d_model: Some(64),
        layers: Some(2),
        heads: Some(4),
        kv_heads: Some(kv_heads),
        d_ff: Some(48),
        context_tokens_max: Some(32),
        tie_embeddings: Some(tied),
        initial_std: 0.2,
        ..PolicyConfig::default()
    }
}

pub(crate) fn parameters(config: &PolicyConfig, seed: u64) -> Arc<Parameters> {
    Arc::new(Parameters::initial(&config.shape(VOCABULARY).unwrap(), config.initial_std, Seed::new(seed)))
}

pub(crate) fn runner(config: &PolicyConfig) -> BatchRunner {
    BatchRunner::new(config, Arc::new(RotaryTable::new(&config.shape(VOCABULARY).unwrap()))).unwrap()
}

/// Sets of four tokens for every second token of a row.
fn some_kept(ids: &[u32]) -> KeptTokens {
    let mut kept = KeptTokens::default();
    for (at, id) in ids.iter().enumerate() {
        let mut set: Vec<u32> = [0, 1, 7, 12].map(|offset| (id + offset) % u32::try_from(VOCABULARY).unwrap()).to_vec();
        set.sort_unstable();
        kept.push(if at % 2 == 0 { &set } else { &[] });
    }
    kept
}

/// Ragged rows of both streams and several temperatures, some with tokens drawn from few; log-probs are near those of `parameters`.
pub(crate) fn rows(runner: &BatchRunner, parameters: &Arc<Parameters>, count: usize) -> Vec<TrainingRow> {
    let mut generator = Generator::new(Seed::new(9));
    let mut unit = || generator.below(2_001) as f32 / 1_000.0 - 1.0;
    let mut rows: Vec<TrainingRow> = (0..count)
        .map(|index| {
            let len = 5 + (index * 7) % 24;
            let ids: Vec<u32> =
                (0..len).map(|at| u32::try_from((at * 13 + index * 29 + at * at) % VOCABULARY).unwrap()).collect();
            let mask: Vec<bool> = (0..len).map(|at| at >= 3 && at % 5 != 0).collect();
            let kept = if index % 3 == 1 { some_kept(&ids) } else { KeptTokens::default() };
            TrainingRow {
                sequence: u32::try_from(index / 2).unwrap(),
                ids,
                weights: mask.iter().map(|on| if *on { unit() } else { 0.0 }).collect(),
                mask,
                behaviour_log_probs: vec![0.0; len],
                old_log_probs: vec![],
                calls: vec![],
                group: None,
                stream: if index % 3 == 2 { Stream::Ce } else { Stream::Rl },
                temperature: if index % 4 == 1 { 0.7 } else { 1.0 },
                policy_version: PolicyVersion(0),
                kept,
            }
        })
        .collect();
    let log_probs = runner.run(parameters.clone(), rows.clone(), Objective::Forward).unwrap().log_probs;
    for (row, known) in rows.iter_mut().zip(log_probs) {
        row.behaviour_log_probs = known.log_probs.iter().map(|value| value + 0.15 * unit()).collect();
        row.old_log_probs = known.log_probs.iter().map(|value| value + 0.15 * unit()).collect();
    }
    rows
}

/// A loss as the trainer makes it: under the weights that it is computed for.
pub(crate) fn objective(
    runner: &BatchRunner,
    weights: &ModelWeights,
    rows: &[TrainingRow],
    spec: &LossSpec,
    reference: Option<ModelWeights>,
) -> Objective {
    let forward = || Ok(runner.run(weights.clone(), rows.to_vec(), Objective::Forward)?.log_probs);
    Objective::Loss { loss: Box::new(BatchLoss::new(spec.clone(), rows, forward).unwrap()), reference }
}

fn run(runner: &BatchRunner, parameters: &Arc<Parameters>, rows: &[TrainingRow], spec: &LossSpec) -> Outcome {
    run_with(runner, parameters, rows, spec, None)
}

fn run_with(
    runner: &BatchRunner,
    parameters: &Arc<Parameters>,
    rows: &[TrainingRow],
    spec: &LossSpec,
    reference: Option<&Arc<Parameters>>,
) -> Outcome {
    let weights = ModelWeights::from(parameters.clone());
    let reference = reference.map(|reference| reference.clone().into());
    let objective = objective(runner, &weights, rows, spec, reference);
    runner.run(weights, rows.to_vec(), objective).unwrap()
}

pub(crate) fn largest_difference(a: &Values, b: &Values) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Euclidean distance.
fn distance(a: &Values, b: &Values) -> f64 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

pub(crate) fn largest(values: &Values) -> f32 {
    values.iter().flatten().map(|v| v.abs()).fold(0.0, f32::max)
}

pub(crate) fn full_spec() -> LossSpec {
    LossSpec {
        policy_loss: PolicyLoss::Ppo { clip_low: 0.2, clip_high: 0.28, dual_clip: Some(3.0) },
        aggregation: Aggregation::SequenceMeanTokenMean,
        entropy_coefficient: 0.05,
        correction: Some(Correction {
            level: RatioLevel::Token,
            rule: CorrectionRule::Truncate { max: 2.0 },
            batch_normalise: false,
        }),
        ..LossSpec::default()
    }
}

/// The slope of the reported loss along a direction equals gradient times direction, for every kind of tensor.
#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for device in PolicyDevice::tested() {
        let unclipped = PolicyLoss::Ppo { clip_low: 0.9, clip_high: 9.0, dual_clip: None };
        let sapo = PolicyLoss::Sapo { temperature_positive: 1.0, temperature_negative: 1.05 };
        for (kv_heads, tied, policy_loss, ratio_level) in [
            (4, false, unclipped.clone(), RatioLevel::Token),
            (2, true, PolicyLoss::Reinforce, RatioLevel::Token),
            (4, false, PolicyLoss::ImportanceSampling, RatioLevel::SequenceMean),
            (2, true, unclipped, RatioLevel::SequenceSum),
            (4, true, sapo, RatioLevel::Token),
        ] {
            let config = config(device, kv_heads, tied);
            let (runner, parameters) = (runner(&config), parameters(&config, 1));
            let reference = self::parameters(&config, 2);
            let kl = Some(KlTerm { estimator: KlEstimator::K2, coefficient: 0.02 });
            let correction = full_spec().correction.map(|correction| Correction { level: ratio_level, ..correction });
            let spec = LossSpec { policy_loss, ratio_level, kl, correction, ..full_spec() };
            let mut rows = rows(&runner, &parameters, 11);
            if ratio_level != RatioLevel::Token {
                // In token form a sequence's slope is exact where its tokens have one advantage and one correction.
                for row in &mut rows {
                    row.weights.fill(if row.sequence % 2 == 0 { 0.8 } else { -0.6 });
                }
            }
            let evaluate = |parameters: Arc<Parameters>| run_with(&runner, &parameters, &rows, &spec, Some(&reference));
            let base = evaluate(parameters.clone());
            let gradient = base.gradient.unwrap();
            for (tensor, spec) in parameters.specs.iter().enumerate() {
                // Along the gradient itself, so that the slope is as far from rounding as it can be.
                let norm = gradient[tensor].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                assert!(norm > 0.0, "{} has no gradient", spec.name);
                let moved = |by: f64| {
                    let mut moved = (*parameters).clone();
                    for (weight, g) in moved.values[tensor].iter_mut().zip(&gradient[tensor]) {
                        *weight += (by * f64::from(*g) / norm) as f32;
                    }
                    evaluate(Arc::new(moved)).report.loss
                };
                // The product of a sequence's ratios bends more than each of them.
                let step = if ratio_level == RatioLevel::Token { 2e-2 } else { 5e-3 };
                let slope = (moved(step) - moved(-step)) / (2.0 * step);
                assert!((slope - norm).abs() < 0.02 * norm + 1e-5, "{}: slope {slope}, gradient {norm}", spec.name);
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for device in PolicyDevice::tested() {
        let base = config(device, 2, false);
        let parameters = parameters(&base, 1);
        let mut seen = vec![];
        for threads in [1, 2, 3, 8] {
            let runner = runner(&PolicyConfig { threads, ..base.clone() });
            let rows = rows(&runner, &parameters, 40);
            let outcome = run(&runner, &parameters, &rows, &full_spec());
            seen.push((outcome.gradient.unwrap(), outcome.report));
        }
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn two_forwards_are_equal_and_equal_to_the_forward_of_training() {
    for device in PolicyDevice::tested() {
        let config = config(device, 4, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let mut rows = rows(&runner, &parameters, 20);
        let forward = || runner.run(parameters.clone(), rows.clone(), Objective::Forward).unwrap().log_probs;
        let (first, second) = (forward(), forward());
        assert_eq!(first, second);
        for (row, known) in rows.iter_mut().zip(&first) {
            row.stream = Stream::Rl;
            row.old_log_probs.clone_from(&known.log_probs);
            row.behaviour_log_probs.clone_from(&known.log_probs);
            for (at, on) in row.mask.iter().enumerate() {
                assert_eq!(*on, known.log_probs[at] != 0.0, "values stand exactly where the mask is set");
            }
        }
        let report = run(&runner, &parameters, &rows, &LossSpec::default()).report;
        assert_eq!((report.mismatch_max, report.ratio_mean, report.ratio_max), (0.0, 1.0, 1.0));
        assert_eq!((report.clip_fraction, report.approximate_kl), (0.0, 0.0));
        assert_eq!(report.effective_sample_size, 1.0);
    }
}

/// Kish's formula by hand: weights 1 and 3 over n tokens give (2 n)² / (n · 5 n) = 0.8, one factor everywhere gives 1, and one
/// token that outweighs the rest gives 1/n.
#[test]
fn the_effective_sample_size_is_that_of_the_importance_weights() {
    for device in PolicyDevice::tested() {
        let config = config(device, 4, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let mut rows = rows(&runner, &parameters, 4);
        for row in &mut rows {
            row.stream = Stream::Rl;
            row.old_log_probs.clear();
            // A weight of 0 is trained on by no stream.
            for (weight, on) in row.weights.iter_mut().zip(&row.mask) {
                *weight = if *on { 1.0 } else { 0.0 };
            }
        }
        let known = runner.run(parameters.clone(), rows.clone(), Objective::Forward).unwrap().log_probs;
        let size = |weight: &dyn Fn(usize) -> f32| {
            let mut rows = rows.clone();
            let mut tokens = 0;
            for (row, known) in rows.iter_mut().zip(&known) {
                for at in (0..row.ids.len()).filter(|at| row.mask[*at]) {
                    row.behaviour_log_probs[at] = known.log_probs[at] - weight(tokens).ln();
                    tokens += 1;
                }
            }
            let report = run(&runner, &parameters, &rows, &LossSpec::default()).report;
            assert_eq!(report.trained_tokens, tokens as u64);
            (report.effective_sample_size, tokens as f64)
        };
        let (uniform, tokens) = size(&|_| 2.5);
        assert!((uniform - 1.0).abs() < 1e-6, "{uniform}");
        let (mixed, _) = size(&|token| if token % 2 == 0 { 1.0 } else { 3.0 });
        // The number of tokens may be odd, and then one of the weights counts once more.
        let (ones, threes) = ((tokens / 2.0).ceil(), (tokens / 2.0).floor());
        let expected = (ones + 3.0 * threes).powi(2) / (tokens * (ones + 9.0 * threes));
        assert!((mixed - expected).abs() < 1e-5 && (expected - 0.8).abs() < 0.02, "{mixed} {expected}");
        let (single, tokens) = size(&|token| if token == 0 { 1e7 } else { 1.0 });
        assert!((single * tokens - 1.0).abs() < 1e-4, "{single} of {tokens}");
    }
}

#[test]
fn split_order_and_padding_do_not_change_loss_or_gradient() {
    for device in PolicyDevice::tested() {
        let base = config(device, 4, false);
        let parameters = parameters(&base, 1);
        let whole = runner(&base);
        let mut rows = rows(&whole, &parameters, 24);
        for row in &mut rows {
            row.group = Some(u64::from(row.sequence % 3));
            row.calls = (0..row.ids.len()).map(|at| u32::from(at > 5)).collect();
        }
        for (aggregation, ratio_level, sequence_scope) in [
            (Aggregation::TokenMean, RatioLevel::Token, SequenceScope::Rollout),
            (Aggregation::SequenceMeanTokenMean, RatioLevel::SequenceMean, SequenceScope::Rollout),
            (Aggregation::SequenceMeanTokenSum, RatioLevel::SequenceSum, SequenceScope::Call),
            (Aggregation::Constant { length: 16 }, RatioLevel::SequenceMean, SequenceScope::Call),
            (Aggregation::PromptMean, RatioLevel::Token, SequenceScope::Rollout),
        ] {
            let correction = Some(Correction {
                level: ratio_level,
                rule: CorrectionRule::Mask { min: 0.9, max: 1.1 },
                batch_normalise: true,
            });
            let off_policy_mask = Some(0.01);
            let spec =
                LossSpec { aggregation, ratio_level, sequence_scope, correction, off_policy_mask, ..full_spec() };
            let want = run(&whole, &parameters, &rows, &spec);
            let want_gradient = want.gradient.unwrap();
            let mut shuffled = rows.clone();
            Generator::new(Seed::new(4)).shuffle(&mut shuffled);
            for (shards, tokens, rows) in [(1, 100_000, &rows), (8, 7, &rows), (3, 64, &shuffled)] {
                let runner =
                    runner(&PolicyConfig { gradient_shards: shards, micro_batch_tokens_max: tokens, ..base.clone() });
                let got = run(&runner, &parameters, rows, &spec);
                let got_gradient = got.gradient.unwrap();
                let difference = largest_difference(&want_gradient, &got_gradient);
                assert!(difference < 2e-5 * largest(&want_gradient), "{difference}");
                let relative = distance(&want_gradient, &got_gradient) / gradient_norm(&want_gradient, 1);
                assert!(relative < 1e-5, "{relative}");
                assert!((got.report.loss - want.report.loss).abs() < 1e-6);
                assert_eq!(got.report.trained_tokens, want.report.trained_tokens);
            }
        }
    }
}

/// Rows of `rows` have tokens drawn from few, several temperatures, both streams; the loss has an entropy and a KL term.
#[test]
fn any_number_of_logits_at_once_gives_the_same() {
    for device in PolicyDevice::tested() {
        for tied in [false, true] {
            let base = PolicyConfig { gradient_shards: 1, ..config(device, 2, tied) };
            let (parameters, reference) = (parameters(&base, 1), parameters(&base, 2));
            let kl = Some(KlTerm { estimator: KlEstimator::K3, coefficient: 0.1 });
            let spec = LossSpec { kl, ..full_spec() };
            let rows = rows(&runner(&base), &parameters, 20);
            let at_once = |tokens: usize| {
                let logits_bytes_max = tokens * VOCABULARY * size_of::<f32>();
                let runner = runner(&PolicyConfig { logits_bytes_max, ..base.clone() });
                run_with(&runner, &parameters, &rows, &spec, Some(&reference))
            };
            let want = at_once(100_000);
            let gradient = want.gradient.unwrap();
            for tokens in [1, 7, 64] {
                let got = at_once(tokens);
                let difference = largest_difference(&gradient, &got.gradient.unwrap());
                assert!(difference < 1e-5 * largest(&gradient), "{device}, {tokens} at once: {difference}");
                let reports = [(got.report.loss, want.report.loss), (got.report.entropy, want.report.entropy)];
                assert!(reports.iter().all(|(a, b)| (a - b).abs() < 1e-6), "{device}: {reports:?}");
            }
        }
    }
}

/// Every weight of bf16 is off by up to 1/512 of itself, and so is what is multiplied with it: some hundredths of a gradient, in
/// directions that have nothing to do with it.
#[test]
fn the_gradient_of_bf16_weights_is_near_that_of_their_masters() {
    for (kv_heads, tied) in [(4, false), (2, true)] {
        let exact = config(PolicyDevice::Cpu, kv_heads, tied);
        let rough = PolicyConfig {
            device: PolicyDevice::Flex,
            device_precision: crate::device::DevicePrecision::Bf16,
            ..exact.clone()
        };
        let parameters = parameters(&exact, 1);
        let rows = rows(&runner(&exact), &parameters, 20);
        let gradient = |config| run(&runner(config), &parameters, &rows, &full_spec()).gradient.unwrap();
        let (want, got) = (gradient(&exact), gradient(&rough));
        for (tensor, spec) in parameters.specs.iter().enumerate() {
            let of = |gradient: &Values| vec![gradient[tensor].clone()];
            let relative = distance(&of(&want), &of(&got)) / gradient_norm(&of(&want), 1);
            println!("{}: {relative:.1e}", spec.name);
            assert!((1e-3..1e-1).contains(&relative), "{}: {relative}", spec.name);
        }
    }
}

/// Against the loss by hand: logits of the kernels, in f64, over the kept tokens only.
#[test]
fn tokens_that_were_drawn_from_few_have_their_log_probs_over_these() {
    for device in PolicyDevice::tested() {
        let config = config(device, 4, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let rows = rows(&runner, &parameters, 16);
        let cpu = PolicyConfig { device: PolicyDevice::Cpu, ..config.clone() };
        let model = crate::inference::Inference::new(&cpu, parameters.clone()).unwrap();
        let told = runner.run(parameters, rows.clone(), Objective::Forward).unwrap().log_probs;
        let mut few = 0;
        for (row, told) in rows.iter().zip(&told) {
            let logits = model.logits(&row.ids, 0).unwrap();
            for at in crate::loss::trained(row) {
                let logits = &logits[(at - 1) * VOCABULARY..at * VOCABULARY];
                let all: Vec<u32> = (0..u32::try_from(VOCABULARY).unwrap()).collect();
                let support = row.kept.at(at).unwrap_or(&all);
                few += usize::from(support.len() < VOCABULARY);
                let scaled = |id: u32| f64::from(logits[id as usize]) / f64::from(row.temperature);
                let normaliser = support.iter().map(|id| scaled(*id).exp()).sum::<f64>().ln();
                let want = scaled(row.ids[at]) - normaliser;
                let entropy: f64 =
                    support.iter().map(|id| scaled(*id) - normaliser).map(|log_prob| -log_prob * log_prob.exp()).sum();
                assert!((f64::from(told.log_probs[at]) - want).abs() < 2e-5, "{device}: {want}");
                assert!((f64::from(told.entropies[at]) - entropy).abs() < 2e-5, "{device}: {entropy}");
            }
        }
        assert!(few > 10, "{few}");
    }
}

#[test]
fn what_is_masked_changes_nothing() {
    for device in PolicyDevice::tested() {
        let config = config(device, 4, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let rows = rows(&runner, &parameters, 8);
        let mut other = rows.clone();
        for row in &mut other {
            for at in 0..row.ids.len() {
                if !row.mask[at] {
                    (row.weights[at], row.behaviour_log_probs[at], row.old_log_probs[at]) = (7.0, f32::NAN, -50.0);
                }
            }
            // Nothing is predicted from the last token.
            if !row.mask.last().unwrap() {
                *row.ids.last_mut().unwrap() = 3;
            }
        }
        crate::train::check_rows(&parameters.shape, &other).unwrap();
        let (a, b) = (run(&runner, &parameters, &rows, &full_spec()), run(&runner, &parameters, &other, &full_spec()));
        assert_eq!((a.gradient, a.report), (b.gradient, b.report));
    }
}

#[test]
fn given_derivatives_take_the_same_way_as_a_loss() {
    for device in PolicyDevice::tested() {
        let config = config(device, 4, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let mut rows = rows(&runner, &parameters, 8);
        for row in &mut rows {
            row.stream = Stream::Ce;
        }
        let trained: usize = rows.iter().map(crate::loss::trained_tokens).sum();
        let of = |row: &TrainingRow| row.weights.iter().map(|weight| -weight / trained as f32).collect();
        let derivatives = rows.iter().map(|row| RowDerivatives { log_probs: of(row), entropies: vec![] }).collect();
        let want = run(&runner, &parameters, &rows, &LossSpec::default()).gradient.unwrap();
        let got = runner.run(parameters, rows, Objective::Derivatives(derivatives)).unwrap().gradient.unwrap();
        assert!(largest_difference(&want, &got) < 1e-5 * largest(&want));
    }
}

#[test]
fn rows_without_trained_tokens_give_zeros() {
    for device in PolicyDevice::tested() {
        let config = config(device, 4, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let mut rows = rows(&runner, &parameters, 4);
        for row in &mut rows {
            row.mask.fill(false);
        }
        for rows in [rows, vec![]] {
            let outcome = run(&runner, &parameters, &rows, &full_spec());
            assert_eq!(largest(&outcome.gradient.unwrap()), 0.0);
            assert_eq!((outcome.report.loss, outcome.report.trained_tokens), (0.0, 0));
        }
    }
}

#[test]
fn rows_and_losses_that_do_not_fit_are_refused() {
    let config = config(PolicyDevice::Cpu, 4, false);
    let (runner, parameters) = (runner(&config), parameters(&config, 1));
    let good = rows(&runner, &parameters, 1).remove(0);
    let refused = |change: &dyn Fn(&mut TrainingRow)| {
        let mut row = good.clone();
        change(&mut row);
        crate::train::check_rows(&parameters.shape, &[row]).unwrap_err().to_string()
    };
    assert!(crate::train::check_rows(&parameters.shape, std::slice::from_ref(&good)).is_ok());
    assert!(refused(&|row| row.ids[0] = 9_999).contains("vocabulary"));
    assert!(refused(&|row| row.weights[4] = f32::NAN).contains("weight"));
    assert!(refused(&|row| row.behaviour_log_probs[4] = f32::NAN).contains("log-prob"));
    assert!(refused(&|row| row.old_log_probs.truncate(2)).contains("one entry per id"));
    assert!(refused(&|row| row.temperature = -1.0).contains("temperature"));
    assert!(refused(&|row| row.ids = vec![1; 33]).contains("context"));
    assert!(refused(&|row| row.stream = Stream::RefKl).contains("ref_kl"));
    let ppo = |clip_low, clip_high| LossSpec {
        policy_loss: PolicyLoss::Ppo { clip_low, clip_high, dual_clip: None },
        ..LossSpec::default()
    };
    assert!(refused(&|row| row.calls = vec![0]).contains("calls"));
    let forward = || panic!("no forward pass is needed");
    let check = |spec: LossSpec| BatchLoss::new(spec, std::slice::from_ref(&good), forward);
    assert!(check(ppo(f32::NAN, 0.2)).is_err());
    assert!(check(ppo(0.2, -0.1)).is_err());
    assert!(check(ppo(0.2, 0.28)).is_ok());
}

#[test]
fn the_devices_agree_on_log_probs_gradients_and_reports() {
    let devices = PolicyDevice::tested();
    let shapes = [(4, false), (2, true), (1, false)];
    for ((kv_heads, tied), device) in
        shapes.into_iter().flat_map(|shape| devices.iter().skip(1).map(move |d| (shape, *d)))
    {
        let [kernels, burn] = [PolicyDevice::Cpu, device].map(|device| runner(&config(device, kv_heads, tied)));
        let parameters = self::parameters(&config(PolicyDevice::Cpu, kv_heads, tied), 1);
        let reference = self::parameters(&config(PolicyDevice::Cpu, kv_heads, tied), 2);
        let rows = rows(&kernels, &parameters, 30);
        let kl = Some(KlTerm { estimator: KlEstimator::UnbiasedK3, coefficient: 0.1 });
        let spec = LossSpec { kl, ..full_spec() };
        let [a, b] = [&kernels, &burn].map(|runner| {
            let log_probs = runner.run(parameters.clone(), rows.clone(), Objective::Forward).unwrap().log_probs;
            (log_probs, run_with(runner, &parameters, &rows, &spec, Some(&reference)))
        });
        let flat = |outcome: &[fulgurite_core::training::RowLogProbs]| -> Vec<f32> {
            outcome.iter().flat_map(|row| [row.log_probs.clone(), row.entropies.clone()].concat()).collect()
        };
        let difference = flat(&a.0).iter().zip(flat(&b.0)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 2e-5, "log-probs: {difference}");
        let (gradient, other) = (a.1.gradient.unwrap(), b.1.gradient.unwrap());
        let difference = largest_difference(&gradient, &other);
        assert!(difference < 1e-4 * largest(&gradient), "gradient: {difference} of {}", largest(&gradient));
        for (a, b) in [
            (a.1.report.loss, b.1.report.loss),
            (a.1.report.entropy, b.1.report.entropy),
            (a.1.report.reference_kl, b.1.report.reference_kl),
            (a.1.report.ratio_mean, b.1.report.ratio_mean),
        ] {
            assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{a} {b}");
        }
    }
}
