//! The model on one training worker: the sampler's kernels or burn.

use std::ops::Range;
use std::sync::Arc;

use burn::prelude::Device;
use fulgurite_core::id::PolicyVersion;

use crate::backprop::{self, Keep, Tape, Transposed};
use crate::decoder::Decoder;
use crate::error::PolicyError;
use crate::model::Model;
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
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
    /// A device to which each worker copies the master weights.
    Burn(Device),
}

/// What bounds the memory of one micro-batch on the kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Whether only the inputs of layers are kept for the backward pass.
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
pub(crate) type VisitLogits<'a> = &'a mut dyn FnMut(Range<usize>, &mut [f32], Option<&mut [f32]>);

/// The model on one worker.
pub(crate) enum Compute<'a> {
    /// The sampler's kernels.
    Kernels(&'a PackedModels, Box<Workspace>, Bounds),
    /// burn, with the reference behind it.
    Burn(Box<Model>, Option<Box<Model>>),
}

fn burn_failed(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Internal(error.to_string())
}

impl<'a> Compute<'a> {
    /// On packed weights.
    pub(crate) fn kernels(packed: &'a PackedModels, workspace: Box<Workspace>, bounds: Bounds) -> Self {
        Self::Kernels(packed, workspace, bounds)
    }

    /// On a device of burn's. The forward pass without gradients uses the autodiff device too: it then runs the very same
    /// operations, and log-probs of the two are equal bit by bit.
    pub(crate) fn burn(
        device: &Device,
        parameters: &Parameters,
        reference: Option<&Parameters>,
        tracked: bool,
    ) -> Self {
        let device = device.clone().autodiff();
        let model = Box::new(Model::new(parameters, &device, tracked));
        Self::Burn(model, reference.map(|reference| Box::new(Model::new(reference, &device, false))))
    }

    /// The memory, for the next worker.
    pub(crate) fn into_workspace(self) -> Option<Box<Workspace>> {
        match self {
            Self::Kernels(_, workspace, _) => Some(workspace),
            Self::Burn(..) => None,
        }
    }

    /// Shows the logits after each source to `visit`, in order and some at a time, and adds the gradient of every trained
    /// weight when there is one to add to.
    pub(crate) fn logits(
        &mut self,
        sources: Sources<'_>,
        rotary: &RotaryTable,
        gradient: Option<&mut Values>,
        visit: VisitLogits<'_>,
    ) -> Result<(), PolicyError> {
        match self {
            Self::Kernels(packed, workspace, bounds) => {
                kernel_logits(packed, workspace, *bounds, sources, gradient, visit);
                Ok(())
            }
            Self::Burn(model, reference) => burn_logits(model, reference.as_deref(), sources, rotary, gradient, visit),
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
            return Err(PolicyError::Unsupported("a critic on device `flex`".to_owned()));
        };
        let decoder = &packed.decoder;
        let head = decoder.value_head.as_ref().ok_or_else(|| burn_failed("a critic without a value head"))?;
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

fn burn_logits(
    model: &Model,
    reference: Option<&Model>,
    sources: Sources<'_>,
    rotary: &RotaryTable,
    gradient: Option<&mut Values>,
    visit: VisitLogits<'_>,
) -> Result<(), PolicyError> {
    let Sources { rows, at, length } = sources;
    let number = |value: usize| i32::try_from(value).map_err(burn_failed);
    // Padding stands behind the row, where causal attention never looks.
    let padded = rows.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(0)).take(length));
    let ids = padded.map(|id| number(id as usize)).collect::<Result<Vec<_>, _>>()?;
    let selected = at.iter().map(|(row, at)| number(row * length + at)).collect::<Result<Vec<_>, _>>()?;
    let mut reference: Option<Vec<f32>> = reference
        .map(|model| model.logits(ids.clone(), length, selected.clone(), rotary).into_data().try_into_vec())
        .transpose()
        .map_err(burn_failed)?;
    let graph = model.logits(ids, length, selected, rotary);
    let mut logits: Vec<f32> = graph.clone().into_data().try_into_vec().map_err(burn_failed)?;
    visit(0..at.len(), &mut logits, reference.as_deref_mut());
    match gradient {
        Some(gradient) => model.backward(graph, logits, gradient).map_err(burn_failed),
        None => Ok(()),
    }
}
