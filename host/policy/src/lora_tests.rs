//! Tests of adapters and the critic against the plain model, finite differences and each other.

#![expect(clippy::float_cmp, reason = "bits are what is tested")]

use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::seed::Seed;
use fulgurite_core::training::{KlEstimator, KlTerm, LossSpec, RowDerivatives, TrainingRow};

use crate::config::PolicyConfig;
use crate::decoder::{Decoder, Row, Scratch};
use crate::device::PolicyDevice;
use crate::kv_cache::KvCache;
use crate::lora::{AdapterLayout, LoraConfig, LoraTarget};
use crate::optimiser::AdamW;
use crate::parameters::Parameters;
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;
use crate::train::{BatchRunner, Objective};
use crate::train_tests::{
    VOCABULARY, config, full_spec, largest, largest_difference, objective, parameters, rows, runner,
};
use crate::weights::{Base, ModelWeights};

/// Every kind of projection: grouped heads, biases and norms of heads.
fn shapes() -> Vec<ModelShape> {
    let plain = config(PolicyDevice::Cpu, 2, true).shape(VOCABULARY).unwrap();
    vec![
        ModelShape { attention_bias: true, ..plain.clone() },
        ModelShape { qk_norm: true, head_dim: 24, ..plain.clone() },
        plain,
    ]
}

fn base(shape: &ModelShape) -> Arc<Base> {
    let rotary = Arc::new(RotaryTable::new(shape));
    Arc::new(Base::new(Arc::new(Parameters::initial(shape, 0.2, Seed::new(1))), rotary))
}

fn runner_of(shape: &ModelShape, config: &PolicyConfig) -> BatchRunner {
    BatchRunner::new(config, Arc::new(RotaryTable::new(shape))).unwrap()
}

/// An adapter whose `B` is not zero.
fn adapted(base: &Arc<Base>, config: &LoraConfig, seed: u64) -> ModelWeights {
    let layout = Arc::new(AdapterLayout::new(config));
    let shape = &base.parameters.shape;
    let mut adapter = layout.initial(shape, Seed::new(seed));
    let noise = Parameters::initial(shape, 0.1, Seed::new(seed + 100));
    let mut noise = noise.values.iter().flatten().copied().cycle();
    for values in &mut adapter.values {
        for value in values {
            *value += noise.next().unwrap();
        }
    }
    ModelWeights::Adapted { base: base.clone(), layout, adapter: Some(Arc::new(adapter)) }
}

fn fresh(base: &Arc<Base>, config: &LoraConfig) -> ModelWeights {
    let layout = Arc::new(AdapterLayout::new(config));
    let adapter = layout.initial(&base.parameters.shape, Seed::new(7));
    ModelWeights::Adapted { base: base.clone(), layout, adapter: Some(Arc::new(adapter)) }
}

fn log_probs(runner: &BatchRunner, weights: &ModelWeights, rows: &[TrainingRow]) -> Vec<Vec<f32>> {
    let outcome = runner.run(weights.clone(), rows.to_vec(), Objective::Forward).unwrap();
    outcome.log_probs.into_iter().map(|row| row.log_probs).collect()
}

#[test]
fn a_fresh_adapter_changes_no_bit_and_the_base_is_the_reference() {
    for (shape, device) in
        shapes().into_iter().flat_map(|shape| PolicyDevice::tested().into_iter().map(move |d| (shape.clone(), d)))
    {
        let base = base(&shape);
        let runner = runner_of(&shape, &config(device, 2, true));
        let rows = rows(&runner, &base.parameters, 12);
        let plain = log_probs(&runner, &ModelWeights::Full(base.parameters.clone()), &rows);
        let weights = fresh(&base, &LoraConfig { rank: 4, ..LoraConfig::default() });
        assert_eq!(log_probs(&runner, &weights, &rows), plain);
        assert_eq!(log_probs(&runner, &weights.base().unwrap(), &rows), plain);
        let kl = Some(KlTerm { estimator: KlEstimator::K3, coefficient: 0.1 });
        let spec = LossSpec { kl, ..full_spec() };
        let report = runner
            .run(weights.clone(), rows.clone(), objective(&runner, &weights, &rows, &spec, weights.base()))
            .unwrap()
            .report;
        assert_eq!(report.reference_kl, 0.0);
        let moved = adapted(&base, &LoraConfig { rank: 4, ..LoraConfig::default() }, 1);
        assert_ne!(log_probs(&runner, &moved, &rows), plain);
        let report = runner
            .run(moved.clone(), rows.clone(), objective(&runner, &moved, &rows, &spec, moved.base()))
            .unwrap()
            .report;
        assert!(report.reference_kl > 0.0);
    }
}

/// Runs ids through the sampler's forward pass in parts.
fn sampled(decoder: &Decoder, ids: &[u32], part: usize) -> Vec<f32> {
    let (mut cache, mut scratch, mut all) = (KvCache::default(), Scratch::default(), vec![]);
    for ids in ids.chunks(part) {
        let rows: Vec<Row> = ids.iter().map(|token| Row { cache: 0, token: *token }).collect();
        decoder.forward(&rows, &mut [&mut cache], &mut scratch);
        decoder.logits(0..ids.len(), &mut scratch);
        all.extend_from_slice(&scratch.logits);
    }
    all
}

#[test]
fn an_adapter_samples_and_trains_with_the_same_bits_and_merges_into_a_plain_model() {
    for shape in shapes() {
        let (base, rotary) = (base(&shape), Arc::new(RotaryTable::new(&shape)));
        let weights = adapted(&base, &LoraConfig { rank: 5, alpha: 7.0, ..LoraConfig::default() }, 3);
        let ids: Vec<u32> = (0..30).map(|at| (at * 17 + 3) % 61).collect();
        let decoder = weights.decoder(PolicyVersion(0), &rotary, 2);
        let packed = crate::compute::PackedModels::new(&weights, None, false, &rotary, 1);
        let sources: Vec<(usize, usize)> = (0..ids.len()).map(|at| (0, at)).collect();
        let bounds = crate::compute::Bounds { recompute: false, logits_tokens_max: 7 };
        let mut compute = crate::compute::Compute::kernels(&packed, Box::default(), bounds);
        let mut trained = vec![];
        let rows = [ids.as_slice()];
        let sources = crate::compute::Sources { rows: &rows, at: &sources, length: ids.len() };
        compute.logits(sources, &rotary, &mut |logits| trained.extend_from_slice(logits)).unwrap();
        for part in [1, 11, 30] {
            assert!(sampled(&decoder, &ids, part) == trained, "parts of {part}");
        }
        let merged = Decoder::new(&weights.merged(), PolicyVersion(0), rotary.clone(), 1);
        let plain = sampled(&merged, &ids, 30);
        let difference = plain.iter().zip(&trained).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let scale = trained.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
        assert!(difference < 1e-5 * scale, "{difference} of {scale}");
    }
}

#[test]
fn adapters_on_devices_agree_with_the_kernels() {
    let config_of = |device| PolicyConfig { device, ..config(PolicyDevice::Cpu, 2, true) };
    for (shape, device) in shapes()
        .into_iter()
        .flat_map(|shape| PolicyDevice::tested().into_iter().skip(1).map(move |d| (shape.clone(), d)))
    {
        let base = base(&shape);
        let [kernels, burn] = [PolicyDevice::Cpu, device].map(|device| runner_of(&shape, &config_of(device)));
        let weights = adapted(&base, &LoraConfig { rank: 4, ..LoraConfig::default() }, 1);
        let rows = rows(&kernels, &base.parameters, 12);
        let [want, got] = [&kernels, &burn].map(|runner| {
            let objective = objective(runner, &weights, &rows, &full_spec(), None);
            (log_probs(runner, &weights, &rows), runner.run(weights.clone(), rows.clone(), objective).unwrap())
        });
        let pairs = want.0.iter().flatten().zip(got.0.iter().flatten());
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 5e-5, "{device}: {difference}");
        let (want, got) = (want.1.gradient.unwrap(), got.1.gradient.unwrap());
        let difference = largest_difference(&want, &got);
        assert!(difference < 1e-4 * largest(&want), "{device}: {difference} of {}", largest(&want));
    }
}

/// The slope of the loss along each tensor's gradient is that gradient's norm.
#[test]
fn the_gradient_of_every_matrix_is_the_slope_of_the_loss() {
    let targets =
        [LoraTarget::ALL.to_vec(), LoraTarget::ALL.to_vec(), vec![LoraTarget::Down, LoraTarget::V, LoraTarget::Gate]];
    let all = shapes().into_iter().zip(targets);
    for ((shape, targets), device) in
        all.flat_map(|one| PolicyDevice::tested().into_iter().map(move |d| (one.clone(), d)))
    {
        let base = base(&shape);
        let runner = runner_of(&shape, &config(device, 2, true));
        let weights = adapted(&base, &LoraConfig { rank: 3, alpha: 5.0, targets, ..LoraConfig::default() }, 2);
        let rows = rows(&runner, &base.parameters, 9);
        let spec = LossSpec {
            policy_loss: fulgurite_core::training::PolicyLoss::Reinforce,
            kl: Some(KlTerm { estimator: KlEstimator::K2, coefficient: 0.02 }),
            ..full_spec()
        };
        let evaluate = |weights: &ModelWeights| {
            runner
                .run(weights.clone(), rows.clone(), objective(&runner, weights, &rows, &spec, weights.base()))
                .unwrap()
        };
        let gradient = evaluate(&weights).gradient.unwrap();
        let adapter = weights.trained();
        assert_eq!(gradient.len(), adapter.specs.len());
        for (tensor, spec) in adapter.specs.iter().enumerate() {
            let norm = gradient[tensor].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{} has no gradient", spec.name);
            let moved = |by: f64| {
                let mut moved = (**adapter).clone();
                for (weight, g) in moved.values[tensor].iter_mut().zip(&gradient[tensor]) {
                    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                    let change = (by * f64::from(*g) / norm) as f32;
                    *weight += change;
                }
                evaluate(&weights.with_trained(Arc::new(moved))).report.loss
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - norm).abs() < 0.02 * norm + 1e-5, "{}: slope {slope}, gradient {norm}", spec.name);
        }
    }
}

#[test]
fn recomputing_activations_and_counting_threads_change_no_bit() {
    let shape = shapes().remove(1);
    let base = base(&shape);
    let plain = config(PolicyDevice::Cpu, 2, true);
    let rows = rows(&runner_of(&shape, &plain), &base.parameters, 20);
    for weights in [
        ModelWeights::Full(base.parameters.clone()),
        adapted(&base, &LoraConfig::default(), 4),
        ModelWeights::Full(base.parameters.clone()).critic(),
    ] {
        let objective = match &weights {
            ModelWeights::Critic(_) => {
                Objective::ValueDerivatives(rows.iter().map(|row| row.weights.clone()).collect())
            }
            _ => objective(&runner_of(&shape, &plain), &weights, &rows, &full_spec(), None),
        };
        let mut seen = vec![];
        for (gradient_checkpointing, threads) in [(false, 1), (true, 1), (true, 3)] {
            let runner = runner_of(&shape, &PolicyConfig { threads, gradient_checkpointing, ..plain.clone() });
            let outcome = runner.run(weights.clone(), rows.clone(), objective.clone()).unwrap();
            seen.push((outcome.gradient.unwrap(), outcome.report));
        }
        assert!(largest(&seen[0].0) > 0.0);
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn logits_in_pieces_change_the_gradient_by_rounding_only() {
    let plain = config(PolicyDevice::Cpu, 2, false);
    let parameters = parameters(&plain, 1);
    let whole = runner(&plain);
    let rows = rows(&whole, &parameters, 20);
    let reference = Some(ModelWeights::Full(self::parameters(&plain, 2)));
    let kl = Some(KlTerm { estimator: KlEstimator::K3, coefficient: 0.1 });
    let spec = LossSpec { kl, ..full_spec() };
    let weights = ModelWeights::Full(parameters.clone());
    let objective = objective(&whole, &weights, &rows, &spec, reference);
    let want = whole.run(parameters.clone(), rows.clone(), objective.clone()).unwrap();
    let want_gradient = want.gradient.unwrap();
    for logits_bytes_max in [1, 5 * 4 * VOCABULARY] {
        let pieces = runner(&PolicyConfig { logits_bytes_max, ..plain.clone() });
        let got = pieces.run(parameters.clone(), rows.clone(), objective.clone()).unwrap();
        assert_eq!(got.report, want.report, "each token's numbers are its own");
        let difference = largest_difference(&got.gradient.unwrap(), &want_gradient);
        assert!(difference < 1e-5 * largest(&want_gradient), "{difference}");
    }
}

/// A step along the derivatives of entropies changes them as a difference says.
#[test]
fn derivatives_of_entropies_are_those_of_the_reported_entropies() {
    for device in PolicyDevice::tested() {
        let config = config(device, 2, false);
        let (runner, parameters) = (runner(&config), parameters(&config, 1));
        let rows = rows(&runner, &parameters, 6);
        let weighted = |parameters: &Arc<Parameters>| -> f64 {
            let forward = runner.run(parameters.clone(), rows.clone(), Objective::Forward).unwrap().log_probs;
            let row = |(row, got): (&TrainingRow, &fulgurite_core::training::RowLogProbs)| -> f64 {
                row.weights.iter().zip(&got.entropies).map(|(weight, h)| f64::from(*weight) * f64::from(*h)).sum()
            };
            rows.iter().zip(&forward).map(row).sum()
        };
        let of = |row: &TrainingRow| RowDerivatives { log_probs: vec![], entropies: row.weights.clone() };
        let objective = Objective::Derivatives(rows.iter().map(of).collect());
        let gradient = runner.run(parameters.clone(), rows.clone(), objective).unwrap().gradient.unwrap();
        let norm = gradient.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let moved = |by: f64| {
            let mut moved = (*parameters).clone();
            for (weight, g) in moved.values.iter_mut().flatten().zip(gradient.iter().flatten()) {
                #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                let change = (by * f64::from(*g) / norm) as f32;
                *weight += change;
            }
            weighted(&Arc::new(moved))
        };
        let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        assert!((slope - norm).abs() < 0.02 * norm, "{slope} {norm}");
    }
}

#[test]
fn a_critic_starts_at_0_has_the_slopes_of_its_values_and_learns_them() {
    for shape in shapes() {
        let base = base(&shape);
        let runner = runner_of(&shape, &config(PolicyDevice::Cpu, 2, true));
        let rows = rows(&runner, &base.parameters, 9);
        let values =
            |weights: &ModelWeights| runner.run(weights.clone(), rows.clone(), Objective::Values).unwrap().values;
        let mut critic = adapted(&base, &LoraConfig::default(), 5).critic();
        assert!(values(&critic).iter().flatten().all(|value| *value == 0.0));
        // Half the squared distance to the rows' weights, at masked tokens.
        let distance = |values: &[Vec<f32>]| -> f64 {
            let row = |(row, values): (&TrainingRow, &Vec<f32>)| -> f64 {
                let tokens = row.weights.iter().zip(values).zip(&row.mask).skip(1).filter(|(_, on)| **on);
                tokens.map(|((want, got), _)| 0.5 * f64::from(got - want).powi(2)).sum()
            };
            rows.iter().zip(values).map(row).sum()
        };
        let gradient_at = |weights: &ModelWeights| {
            let derivatives = rows
                .iter()
                .zip(values(weights))
                .map(|(row, values)| values.iter().zip(&row.weights).map(|(got, want)| got - want).collect());
            let objective = Objective::ValueDerivatives(derivatives.collect());
            runner.run(weights.clone(), rows.clone(), objective).unwrap().gradient.unwrap()
        };
        let mut optimiser = AdamW::new(critic.trained());
        let step = fulgurite_core::training::OptimiserStep {
            learning_rate: 0.01,
            weight_decay: 0.0,
            gradient_norm_max: Some(1.0),
        };
        let start = distance(&values(&critic));
        for _ in 0..30 {
            let gradient = gradient_at(&critic);
            let norm = crate::optimiser::gradient_norm(&gradient, 1);
            optimiser.step(Arc::make_mut(critic.trained_mut()), &gradient, norm, &step, 1);
        }
        let learned = distance(&values(&critic));
        assert!(learned < 0.2 * start, "{start} -> {learned}");
        let gradient = gradient_at(&critic);
        for (tensor, spec) in critic.trained().specs.iter().enumerate() {
            let norm = gradient[tensor].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{} has no gradient", spec.name);
            let moved = |by: f64| {
                let mut moved = (**critic.trained()).clone();
                for (weight, g) in moved.values[tensor].iter_mut().zip(&gradient[tensor]) {
                    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                    let change = (by * f64::from(*g) / norm) as f32;
                    *weight += change;
                }
                distance(&values(&critic.with_trained(Arc::new(moved))))
            };
            let slope = (moved(3e-3) - moved(-3e-3)) / 6e-3;
            assert!((slope - norm).abs() < 0.03 * norm + 1e-4, "{}: slope {slope}, gradient {norm}", spec.name);
        }
    }
}
