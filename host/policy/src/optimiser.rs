//! `AdamW` on plain memory, with one global gradient norm.
//!
//! Not burn's: its clipping works tensor by tensor, and its state is keyed by ids that change between processes. Here the
//! state is two lists in the order of the weights, which a checkpoint can hold bit by bit.
//!
//! Norms and biases never decay; projections, embeddings, adapters and the weight of a value head do. That is the rule of
//! Hugging Face's `Trainer` and of nanoGPT (what has two dimensions decays); torchtitan decays everything.

use fulgurite_core::training::OptimiserStep;

use crate::parallel::{self, JOB_VALUES};
use crate::parameters::{Kind, Parameters, Values};

/// Decay of the first moment.
const BETA_1: f64 = 0.9;
/// Decay of the second moment.
const BETA_2: f64 = 0.95;
/// Added to the root of the second moment.
const EPSILON: f32 = 1e-8;

/// Moments of every weight and how many steps they have seen.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdamW {
    pub(crate) first: Values,
    pub(crate) second: Values,
    pub(crate) steps: u64,
}

/// Euclidean norm over all tensors.
pub(crate) fn gradient_norm(gradient: &Values, threads: usize) -> f64 {
    parallel::sum_of_squares(threads, gradient).sqrt()
}

/// Some weights of one tensor with all that belongs to them.
struct Stretch<'a> {
    weights: &'a mut [f32],
    gradient: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    /// What the weights are multiplied by before the step.
    decay: f32,
}

impl AdamW {
    /// Zero moments.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        Self { first: parameters.zeros(), second: parameters.zeros(), steps: 0 }
    }

    /// One step. The gradient's norm must be finite. The number of threads changes no bit.
    pub(crate) fn step(
        &mut self,
        parameters: &mut Parameters,
        gradient: &Values,
        norm: f64,
        step: &OptimiserStep,
        threads: usize,
    ) {
        self.steps += 1;
        let scale = match step.gradient_norm_max {
            Some(max) if norm > max => max / (norm + 1e-6),
            _ => 1.0,
        };
        let exponent = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let first_correction = 1.0 - BETA_1.powi(exponent);
        let second_correction = 1.0 - BETA_2.powi(exponent);
        let size = step.learning_rate / first_correction;
        let (scale, size, root) = narrow(scale, size, 1.0 / second_correction.sqrt());
        let (beta_1, beta_2, decay) = narrow(BETA_1, BETA_2, 1.0 - step.learning_rate * step.weight_decay);
        let tensors = parameters.specs.iter().zip(&mut parameters.values).zip(gradient);
        let mut jobs = Vec::new();
        for (((spec, weights), gradient), (first, second)) in tensors.zip(self.first.iter_mut().zip(&mut self.second)) {
            let decay = if matches!(spec.kind, Kind::Norm | Kind::Bias) { 1.0 } else { decay };
            let moments = first.chunks_mut(JOB_VALUES).zip(second.chunks_mut(JOB_VALUES));
            let stretches = weights.chunks_mut(JOB_VALUES).zip(gradient.chunks(JOB_VALUES)).zip(moments);
            jobs.extend(stretches.map(|((weights, gradient), (first, second))| Stretch {
                weights,
                gradient,
                first,
                second,
                decay,
            }));
        }
        parallel::each(threads, jobs, |Stretch { weights, gradient, first, second, decay }| {
            for (((weight, gradient), first), second) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
                let gradient = gradient * scale;
                *first = beta_1 * *first + (1.0 - beta_1) * gradient;
                *second = beta_2 * *second + (1.0 - beta_2) * gradient * gradient;
                *weight = *weight * decay - size * *first / (second.sqrt() * root + EPSILON);
            }
        });
    }
}

#[expect(clippy::cast_possible_truncation, reason = "weights are f32; the factors are computed in f64 once per step")]
fn narrow(a: f64, b: f64, c: f64) -> (f32, f32, f32) {
    (a as f32, b as f32, c as f32)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "bits are what is tested")]
#[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
mod tests {
    use fulgurite_core::seed::Seed;

    use super::*;
    use crate::config::PolicyConfig;

    fn parameters() -> Parameters {
        Parameters::initial(&PolicyConfig::default().shape(300).unwrap(), 0.02, Seed::new(0))
    }

    fn step(learning_rate: f64, weight_decay: f64, gradient_norm_max: Option<f64>) -> OptimiserStep {
        OptimiserStep { learning_rate, weight_decay, gradient_norm_max }
    }

    #[test]
    fn follows_the_textbook_in_f64() {
        let mut parameters = parameters();
        let mut adam = AdamW::new(&parameters);
        let start = f64::from(parameters.values[2][5]);
        let (mut w, mut m, mut v) = (start, 0.0, 0.0);
        for t in 1..=5 {
            let g = 0.3 / f64::from(t) - 0.1;
            let mut gradient = parameters.zeros();
            gradient[2][5] = g as f32;
            adam.step(&mut parameters, &gradient, gradient_norm(&gradient, 1), &step(0.01, 0.1, None), 1);
            m = 0.9 * m + 0.1 * g;
            v = 0.95 * v + 0.05 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9_f64.powi(t)), v / (1.0 - 0.95_f64.powi(t)));
            w = w * (1.0 - 0.01 * 0.1) - 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
        }
        assert!((f64::from(parameters.values[2][5]) - w).abs() < 1e-6);
    }

    #[test]
    fn norms_do_not_decay_and_clipping_is_global() {
        let mut clipped = parameters();
        let mut adam = AdamW::new(&clipped);
        let mut gradient = clipped.zeros();
        gradient[2][0] = 3.0;
        gradient[3][0] = 4.0;
        let norm = gradient_norm(&gradient, 1);
        assert!((norm - 5.0).abs() < 1e-9);
        adam.step(&mut clipped, &gradient, norm, &step(0.1, 0.5, Some(1.0)), 2);
        assert!((adam.first[2][0] - 0.06).abs() < 1e-6 && (adam.first[3][0] - 0.08).abs() < 1e-6);
        assert!(clipped.values[1].iter().all(|w| *w == 1.0), "a norm's weights");
        assert!(clipped.values[0][0] != parameters().values[0][0], "an embedding decays");
    }

    #[test]
    fn learning_rate_0_changes_no_bit() {
        let mut parameters = parameters();
        let before = parameters.hash();
        let mut adam = AdamW::new(&parameters);
        let gradient: Values = parameters.values.iter().map(|t| t.iter().map(|w| w * 3.0 + 0.1).collect()).collect();
        adam.step(&mut parameters, &gradient, gradient_norm(&gradient, 1), &step(0.0, 0.1, Some(1.0)), 3);
        assert_eq!(parameters.hash(), before);
    }

    #[test]
    fn threads_change_no_bit() {
        let run = |threads| {
            let mut parameters = parameters();
            let mut adam = AdamW::new(&parameters);
            for _ in 0..2 {
                let gradient: Values =
                    parameters.values.iter().map(|t| t.iter().map(|w| w * 3.0 + 0.1).collect()).collect();
                let norm = gradient_norm(&gradient, threads);
                adam.step(&mut parameters, &gradient, norm, &step(0.01, 0.1, Some(1.0)), threads);
            }
            (parameters.hash(), adam)
        };
        assert_eq!(run(1), run(3));
    }
}
