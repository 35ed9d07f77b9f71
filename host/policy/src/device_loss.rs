//! From hidden states to derivatives on a device: the output projection, softmaxes, and the way back.
//!
//! Logits never come to the host, and there are those of a bounded number of tokens at a time. Of each token the host is told
//! its log-prob, its entropy and the reference's log-prob, and answers with the loss's derivatives with respect to the first
//! two; the gradient of the logits follows on the device:
//! with z the scaled logits, `d log p(y) / dz_j = [j = y] - p_j` and `dH / dz_j = -p_j (log p_j + H)`.
//! It goes through the output projection by hand, so that the graph of a pass ends at its hidden states.

use std::ops::Range;

use burn::prelude::*;
use burn::tensor::{DType, IndexingUpdateOp};

use crate::compute::{Asked, Sources, VisitToken};
use crate::device::is_host;
use crate::error::PolicyError;
use crate::loss::{Seen, Slopes};
use crate::model::{Gradient, MASKED, Model, Pass, floats, index, indices};
use crate::rotary::RotaryTable;
use crate::support::Support;

/// Lengths of rows on a GPU are multiples of this.
const LENGTH_STEP: usize = 32;

fn failed(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Internal(error.to_string())
}

/// The pass of a model over rows.
pub(crate) fn pass(model: &Model, sources: Sources<'_>, rotary: &RotaryTable) -> Pass {
    let Sources { rows, at, length } = sources;
    // A GPU compiles and tunes for every new length: there are few.
    let length = if is_host(&model.device) {
        length
    } else {
        length.next_multiple_of(LENGTH_STEP).min(model.shape.context_tokens_max.max(length))
    };
    // Padding stands behind the row, where causal attention never looks.
    let padded = rows.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(0)).take(length));
    let ids = padded.map(|id| index(id as usize)).collect();
    let selected = at.iter().map(|(row, at)| index(row * length + at)).collect();
    model.forward(ids, length, selected, rotary)
}

/// Parts of `count` tokens, of at most `most` each.
pub(crate) fn parts(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let most = most.max(1);
    (0..count).step_by(most).map(move |first| first..count.min(first + most))
}

/// Shows every asked token to `visit`, and adds to the gradient of every weight where one is gathered.
pub(crate) fn tokens(
    (model, reference): (&Model, Option<&Model>),
    sources: Sources<'_>,
    asked: &[Asked<'_>],
    (rotary, tokens_max): (&RotaryTable, usize),
    gradient: Option<&mut Gradient>,
    visit: VisitToken<'_>,
) -> Result<(), PolicyError> {
    let reference = reference.map(|model| (model, pass(model, sources, rotary).normed.inner()));
    let pass = pass(model, sources, rotary);
    let normed = pass.normed.clone().inner();
    let mut d_normed = Vec::new();
    let mut d_head: Option<Tensor<2>> = None;
    for tokens in parts(asked.len(), tokens_max) {
        let part = asked.get(tokens.clone()).unwrap_or_default();
        let scope = Scope::new(part, model);
        let hidden = normed.clone().slice_dim(0, tokens.clone());
        let mut softmax = Softmax::new(model.logits(hidden.clone()), &scope);
        let mut columns = vec![softmax.log_probs(&scope), softmax.entropies()];
        if let Some((model, normed)) = &reference {
            let softmax = Softmax::new(model.logits(normed.clone().slice_dim(0, tokens.clone())), &scope);
            columns.push(softmax.log_probs(&scope));
        }
        let width = columns.len();
        let told: Vec<f32> = Tensor::cat(columns, 1).into_data().try_into_vec().map_err(failed)?;
        let slopes: Vec<Slopes> = told
            .chunks_exact(width)
            .zip(tokens)
            .map(|(told, token)| {
                let value = |at: usize| told.get(at).copied().map_or(f64::NAN, f64::from);
                let reference = reference.is_some().then(|| value(2));
                visit(token, Seen { log_prob: value(0), entropy: value(1), reference })
            })
            .collect();
        if gradient.is_some() {
            let d_logits = softmax.backward(&slopes, &scope).cast(model.dtype);
            d_normed.push(d_logits.clone().matmul(model.head().transpose()).cast(DType::F32));
            if model.trains_all() {
                let part = d_head_of(model, hidden, d_logits);
                d_head = Some(match d_head.take() {
                    Some(sum) => sum + part,
                    None => part,
                });
            }
        }
    }
    if let (Some(gradient), false) = (gradient, d_normed.is_empty()) {
        model.backward(pass, Tensor::cat(d_normed, 0), d_head, gradient);
    }
    Ok(())
}

/// The gradient of the output projection, f32, in its layout in memory.
fn d_head_of(model: &Model, hidden: Tensor<2>, d_logits: Tensor<2>) -> Tensor<2> {
    let hidden = hidden.cast(model.dtype);
    let product = if model.shape.tie_embeddings {
        d_logits.transpose().matmul(hidden)
    } else {
        hidden.transpose().matmul(d_logits)
    };
    product.cast(DType::F32)
}

/// What some tokens' softmaxes run over.
struct Scope {
    /// `[tokens, 1]`.
    ids: Tensor<2, Int>,
    /// `[tokens, 1]`.
    temperatures: Tensor<2>,
    /// Added to logits, `[tokens, vocabulary]`: 0 for what was kept. `None` where all of them run over everything.
    dropped: Option<Tensor<2>>,
}

impl Scope {
    fn new(asked: &[Asked<'_>], model: &Model) -> Self {
        let (count, device) = (asked.len(), &model.device);
        let ids = asked.iter().map(|asked| index(asked.id as usize)).collect();
        let temperatures = asked.iter().map(|asked| asked.temperature).collect();
        Self {
            ids: indices(ids, [count, 1], device),
            temperatures: floats(temperatures, [count, 1], device),
            dropped: Self::dropped(asked, model),
        }
    }

    fn dropped(asked: &[Asked<'_>], model: &Model) -> Option<Tensor<2>> {
        let kept = |asked: &Asked<'_>| match asked.support {
            Support::All => None,
            Support::Kept(kept) => Some(kept.len()),
        };
        let widest = asked.iter().filter_map(kept).max()?.max(1);
        let mut base = Vec::with_capacity(asked.len());
        let (mut places, mut values) = (Vec::new(), Vec::new());
        for asked in asked {
            let kept = if let Support::Kept(kept) = asked.support { kept } else { &[] };
            base.push(if matches!(asked.support, Support::All) { 0.0 } else { MASKED });
            places.extend(kept.iter().map(|id| index(*id as usize)));
            values.extend(kept.iter().map(|_| -MASKED));
            // Nothing is added to the first one.
            let rest = widest - kept.len();
            places.extend(std::iter::repeat_n(0, rest));
            values.extend(std::iter::repeat_n(0.0, rest));
        }
        let (count, device) = (asked.len(), &model.device);
        let base = floats(base, [count, 1], device).expand([count, model.shape.vocabulary]);
        let places = indices(places, [count, widest], device);
        Some(base.scatter(1, places, floats(values, [count, widest], device), IndexingUpdateOp::Add))
    }
}

/// Softmaxes of some tokens, f32.
struct Softmax {
    /// Scaled logits less the largest of their row, `[tokens, vocabulary]`.
    shifted: Tensor<2>,
    /// The same size.
    probabilities: Tensor<2>,
    /// Logarithm of the sum of their powers, `[tokens, 1]`.
    normalisers: Tensor<2>,
    entropies: Option<Tensor<2>>,
}

impl Softmax {
    fn new(logits: Tensor<2>, scope: &Scope) -> Self {
        let scaled = logits / scope.temperatures.clone();
        let scaled = match &scope.dropped {
            Some(dropped) => scaled + dropped.clone(),
            None => scaled,
        };
        let shifted = scaled.clone() - scaled.max_dim(1);
        let powers = shifted.clone().exp();
        let sums = powers.clone().sum_dim(1);
        Self { shifted, probabilities: powers / sums.clone(), normalisers: sums.log(), entropies: None }
    }

    /// Of the asked ids, `[tokens, 1]`.
    fn log_probs(&self, scope: &Scope) -> Tensor<2> {
        self.shifted.clone().gather(1, scope.ids.clone()) - self.normalisers.clone()
    }

    /// `[tokens, 1]`.
    fn entropies(&mut self) -> Tensor<2> {
        let mean = (self.probabilities.clone() * self.shifted.clone()).sum_dim(1);
        self.entropies.insert(self.normalisers.clone() - mean).clone()
    }

    /// The gradient of logits, `[tokens, vocabulary]`.
    fn backward(self, slopes: &[Slopes], scope: &Scope) -> Tensor<2> {
        let device = scope.temperatures.device();
        let column = |of: fn(&Slopes) -> f64| {
            #[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
            let values = slopes.iter().map(|slopes| of(slopes) as f32).collect();
            floats(values, [slopes.len(), 1], &device)
        };
        let d_log_probs = column(|slopes| slopes.log_prob);
        let mut factors = d_log_probs.clone().neg();
        // Most losses have no entropy term.
        if let Some(entropies) = self.entropies.filter(|_| slopes.iter().any(|slopes| slopes.entropy != 0.0)) {
            let d_entropies = column(|slopes| slopes.entropy);
            let log_probs = self.shifted - self.normalisers;
            factors = (log_probs + entropies).neg() * d_entropies - d_log_probs.clone();
        }
        let derivatives = self.probabilities * factors;
        let derivatives = derivatives.scatter(1, scope.ids.clone(), d_log_probs, IndexingUpdateOp::Add);
        derivatives / scope.temperatures.clone()
    }
}
