//! The model on one training worker: the sampler's kernels or burn.

use std::ops::Range;
use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;

use crate::backprop::{self, Keep, Tape, Transposed};
use crate::decoder::Decoder;
use crate::device_loss;
use crate::error::PolicyError;
use crate::kernel;
use crate::loss::{Seen, Slopes};
use crate::model::{Gradient, Model};
use crate::parameters::Values;
use crate::rotary::RotaryTable;
use crate::support::Support;
use crate::weights::ModelWeights;

/// ModelWeights as the kernels want them, shared by the workers.
#[derive(Debug)]
pub(crate) struct PackedModels {
    decoder: Decoder,
    /// Only where a gradient is asked for.
    transposed: Option<Transposed>,
    reference: Option<Decoder>,
}

impl PackedModels {
    /// Packs the trained weights, transposed ones too when `tracked`, and the reference's.
    pub(crate) fn new(
        weights: &ModelWeights,
        reference: Option<&ModelWeights>,
        tracked: bool,
        rotary: &Arc<RotaryTable>,
        threads: usize,
    ) -> Self {
        let pack = |weights: &ModelWeights| weights.decoder(PolicyVersion::default(), rotary, threads);
        Self {
            decoder: pack(weights),
            transposed: tracked.then(|| weights.transposed(threads)),
            reference: reference.map(pack),
        }
    }

    /// The trained weights.
    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
    }
}

/// What the workers of a batch make their models from.
pub(crate) enum Models {
    /// The kernels' weights.
    Packed(Box<PackedModels>),
    /// A device's copies of the trained weights and the reference's.
    Device(Arc<Model>, Option<Arc<Model>>),
}

/// What bounds the memory of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Whether only the inputs of layers are kept for the backward pass, on the kernels.
    pub(crate) recompute: bool,
    /// Tokens whose logits are there at once.
    pub(crate) logits_tokens_max: usize,
}

/// Memory of one worker, used again for the next micro-batch.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    tape: Tape,
    logits: Vec<f32>,
    reference_normed: Vec<f32>,
    reference_logits: Vec<f32>,
}

/// Tokens that something is predicted from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sources<'a> {
    /// Ids of each row.
    pub(crate) rows: &'a [&'a [u32]],
    /// A row and a place in it.
    pub(crate) at: &'a [(usize, usize)],
    /// Length of the longest row.
    pub(crate) length: usize,
}

impl Sources<'_> {
    /// Places of the sources when rows stand one after the other.
    fn packed(&self) -> Vec<usize> {
        let next_start = |next: &mut usize, row: &&[u32]| Some(std::mem::replace(next, *next + row.len()));
        let starts: Vec<usize> = self.rows.iter().scan(0, next_start).collect();
        self.at.iter().map(|(row, at)| starts.get(*row).map_or(0, |start| start + at)).collect()
    }
}

/// Looks at the logits of some of the sources, `[sources, vocabulary]`, and at the reference's where there is one. When a
/// gradient is asked for, it replaces the logits by theirs.
type VisitLogits<'a> = &'a mut dyn FnMut(Range<usize>, &mut [f32], Option<&mut [f32]>);

/// A token whose log-prob is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) id: u32,
    /// Above 0.
    pub(crate) temperature: f32,
    /// What its softmax runs over; the token is in it.
    pub(crate) support: Support<'a>,
}

/// Is told what the model says of an asked token, by its place, and answers with the loss's derivatives.
pub(crate) type VisitToken<'a> = &'a mut dyn FnMut(usize, Seen) -> Slopes;

/// The model on one worker.
pub(crate) enum Compute<'a> {
    /// The sampler's kernels.
    Kernels(&'a PackedModels, Box<Workspace>, Bounds),
    /// burn, with the reference behind it.
    Device(Box<OnDevice>),
}

/// The model on a device, with what it gathers.
pub(crate) struct OnDevice {
    model: Model,
    reference: Option<Model>,
    bounds: Bounds,
    /// Stays on the device until it is [collected](Compute::collect).
    gradient: Gradient,
}

fn failed(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Internal(error.to_string())
}

impl<'a> Compute<'a> {
    /// On packed weights.
    pub(crate) fn kernels(packed: &'a PackedModels, workspace: Box<Workspace>, bounds: Bounds) -> Self {
        Self::Kernels(packed, workspace, bounds)
    }

    /// On a device of burn's.
    pub(crate) fn device(model: &Model, reference: Option<&Model>, tracked: bool, bounds: Bounds) -> Self {
        let (model, reference) = (model.for_training(tracked), reference.map(|model| model.for_training(false)));
        Self::Device(Box::new(OnDevice { model, reference, bounds, gradient: Gradient::default() }))
    }

    /// Adds what a device has gathered to the gradient: after the last micro-batch that is to be in it.
    pub(crate) fn collect(&mut self, gradient: Option<&mut Values>) -> Result<(), PolicyError> {
        match (self, gradient) {
            (Self::Device(device), Some(gradient)) => device.gradient.take(gradient).map_err(failed),
            _ => Ok(()),
        }
    }

    /// The memory, for the next worker.
    pub(crate) fn into_workspace(self) -> Option<Box<Workspace>> {
        match self {
            Self::Kernels(_, workspace, _) => Some(workspace),
            Self::Device(_) => None,
        }
    }

    /// Shows the logits after each source to `visit`, in order and some at a time.
    pub(crate) fn logits(
        &mut self,
        sources: Sources<'_>,
        rotary: &RotaryTable,
        visit: &mut dyn FnMut(&[f32]),
    ) -> Result<(), PolicyError> {
        match self {
            Self::Kernels(packed, workspace, bounds) => {
                kernel_logits(packed, workspace, *bounds, sources, None, &mut |_, logits, _| visit(logits));
            }
            Self::Device(device) => {
                let normed = device_loss::pass(&device.model, sources, rotary).normed.inner();
                for tokens in device_loss::parts(sources.at.len(), device.bounds.logits_tokens_max) {
                    let logits = device.model.logits(normed.clone().slice_dim(0, tokens)).into_data();
                    visit(&logits.try_into_vec::<f32>().map_err(failed)?);
                }
            }
        }
        Ok(())
    }

    /// Shows what the model says of the token behind each source to `visit`, in order, and adds the gradient of every trained
    /// weight when there is one to add to: at once, or on a device when it is [collected](Self::collect).
    pub(crate) fn tokens(
        &mut self,
        sources: Sources<'_>,
        asked: &[Asked<'_>],
        rotary: &RotaryTable,
        gradient: Option<&mut Values>,
        visit: VisitToken<'_>,
    ) -> Result<(), PolicyError> {
        match self {
            Self::Kernels(packed, workspace, bounds) => {
                let vocabulary = packed.decoder.shape.vocabulary;
                let mut loss = KernelLoss::new(asked, vocabulary, visit);
                kernel_logits(packed, workspace, *bounds, sources, gradient, &mut |tokens, logits, reference| {
                    loss.tokens(tokens, logits, reference);
                });
                Ok(())
            }
            Self::Device(device) => {
                let models = (&device.model, device.reference.as_ref());
                let limits = (rotary, device.bounds.logits_tokens_max);
                let gradient = gradient.map(|_| &mut device.gradient);
                device_loss::tokens(models, sources, asked, limits, gradient, visit)
            }
        }
    }

    /// Shows a critic's value at each source to `visit`, which replaces them by their gradient when there is one to add to.
    pub(crate) fn values(
        &mut self,
        sources: Sources<'_>,
        gradient: Option<&mut Values>,
        visit: impl FnOnce(&mut [f32]),
    ) -> Result<(), PolicyError> {
        let Self::Kernels(packed, workspace, bounds) = self else {
            return Err(PolicyError::Unsupported("a critic on another device than `cpu`".to_owned()));
        };
        let decoder = &packed.decoder;
        let head = decoder.value_head.as_ref().ok_or_else(|| failed("a critic without a value head"))?;
        let tape = &mut workspace.tape;
        tape.forward(
            decoder,
            sources.rows.iter().copied(),
            sources.packed().into_iter(),
            bounds.keep(gradient.is_some()),
        );
        let mut values = tape.values(head);
        visit(&mut values);
        if let (Some(gradient), Some(transposed)) = (gradient, &packed.transposed) {
            tape.values_backward(head, &values, gradient);
            tape.backward(decoder, transposed, gradient);
        }
        Ok(())
    }
}

impl Bounds {
    fn keep(self, is_tracked: bool) -> Keep {
        match (is_tracked, self.recompute) {
            (false, _) => Keep::Nothing,
            (true, true) => Keep::Inputs,
            (true, false) => Keep::Everything,
        }
    }
}

fn kernel_logits(
    packed: &PackedModels,
    workspace: &mut Workspace,
    bounds: Bounds,
    sources: Sources<'_>,
    mut gradient: Option<&mut Values>,
    visit: VisitLogits<'_>,
) {
    let Workspace { tape, logits, reference_normed, reference_logits } = workspace;
    let (decoder, rows) = (&packed.decoder, sources.rows);
    let selected = sources.packed();
    // The reference first: the tape must hold the trained model's activations afterwards.
    if let Some(reference) = &packed.reference {
        tape.forward(reference, rows.iter().copied(), selected.iter().copied(), Keep::Nothing);
        std::mem::swap(&mut tape.selected_normed, reference_normed);
    }
    tape.forward(decoder, rows.iter().copied(), selected.iter().copied(), bounds.keep(gradient.is_some()));
    for first in (0..selected.len()).step_by(bounds.logits_tokens_max.max(1)) {
        let tokens = first..selected.len().min(first + bounds.logits_tokens_max.max(1));
        backprop::logits(decoder, &tape.selected_normed, tokens.clone(), logits);
        let reference = packed.reference.as_ref().map(|reference| {
            backprop::logits(reference, reference_normed, tokens.clone(), reference_logits);
            reference_logits.as_mut_slice()
        });
        visit(tokens.clone(), logits, reference);
        if let (Some(gradient), Some(transposed)) = (gradient.as_deref_mut(), &packed.transposed) {
            tape.logits_backward(decoder, transposed, tokens, logits, gradient);
        }
    }
    if let (Some(gradient), Some(transposed)) = (gradient, &packed.transposed) {
        tape.backward(decoder, transposed, gradient);
    }
}

/// From logits to their gradient, on the host.
struct KernelLoss<'a> {
    asked: &'a [Asked<'a>],
    vocabulary: usize,
    visit: VisitToken<'a>,
    scaled: Vec<f32>,
    gathered: Vec<f32>,
}

impl<'a> KernelLoss<'a> {
    fn new(asked: &'a [Asked<'a>], vocabulary: usize, visit: VisitToken<'a>) -> Self {
        Self { asked, vocabulary, visit, scaled: Vec::with_capacity(vocabulary), gathered: vec![] }
    }

    /// Turns logits into `d loss / d logits` in place, token by token.
    fn tokens(&mut self, tokens: Range<usize>, logits: &mut [f32], reference: Option<&mut [f32]>) {
        let (scaled, gathered) = (&mut self.scaled, &mut self.gathered);
        let mut reference = reference.map(|logits| logits.chunks_exact_mut(self.vocabulary));
        let asked = self.asked.get(tokens.clone()).unwrap_or_default();
        for ((token, asked), logits) in tokens.zip(asked).zip(logits.chunks_exact_mut(self.vocabulary)) {
            let Asked { id, temperature, support } = *asked;
            let reference = reference.as_mut().and_then(Iterator::next).map(|logits| {
                let (values, place) = support.gather(logits, id, gathered);
                let (_, normaliser) = kernel::log_normaliser(values, temperature);
                values.get(place).map_or(f64::NAN, |logit| f64::from(logit - normaliser))
            });
            let (values, id) = support.gather(logits, id, gathered);
            let (_, normaliser) = kernel::log_normaliser(values, temperature);
            let log_prob = values.get(id).map_or(f32::NAN, |logit| logit - normaliser);
            scaled.clear();
            scaled.extend_from_slice(values);
            let entropy = kernel::probabilities(values, normaliser);
            let seen = Seen { log_prob: f64::from(log_prob), entropy: f64::from(entropy), reference };
            let slopes = (self.visit)(token, seen);
            let (d_log_prob, d_entropy) = narrow(slopes.log_prob, slopes.entropy);
            // With z the scaled logits: d log p(y) / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H).
            for (j, (slot, scaled)) in values.iter_mut().zip(&*scaled).enumerate() {
                let probability = *slot;
                let mut derivative = if j == id { d_log_prob } else { 0.0 } - d_log_prob * probability;
                if d_entropy != 0.0 && probability > 0.0 {
                    derivative -= d_entropy * probability * (scaled - normaliser + entropy);
                }
                *slot = derivative / temperature;
            }
            support.scatter(gathered, logits);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the model computes in f32")]
pub(crate) fn narrow(a: f64, b: f64) -> (f32, f32) {
    (a as f32, b as f32)
}
