//! The model on one training worker: the sampler's kernels or burn.

use std::sync::Arc;

use burn::prelude::{Device, Tensor};
use fulgurite_core::id::PolicyVersion;

use crate::backprop::{Tape, Transposed};
use crate::decoder::Decoder;
use crate::error::PolicyError;
use crate::model::Model;
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;

/// Weights as the kernels want them, shared by the workers.
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
        parameters: &Parameters,
        reference: Option<&Parameters>,
        tracked: bool,
        rotary: &Arc<RotaryTable>,
        threads: usize,
    ) -> Self {
        let pack =
            |parameters: &Parameters| Decoder::new(parameters, PolicyVersion::default(), rotary.clone(), threads);
        Self {
            decoder: pack(parameters),
            transposed: tracked.then(|| Transposed::new(parameters, threads)),
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

/// The model on one worker.
pub(crate) enum Compute<'a> {
    /// The sampler's kernels with activations of the micro-batch at hand.
    Kernels(&'a PackedModels, Box<Tape>),
    /// burn, with the reference behind it.
    Burn(Box<Model>, Option<Box<Model>>),
}

/// Logits of a micro-batch, `[sources, vocabulary]`.
pub(crate) struct Pass {
    /// Of the trained model; to be replaced by their gradient before the backward pass.
    pub(crate) logits: Vec<f32>,
    /// Of the reference, when there is one.
    pub(crate) reference: Option<Vec<f32>>,
    /// What burn needs for its backward pass.
    graph: Option<Box<Tensor<2>>>,
}

fn burn_failed(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Internal(error.to_string())
}

impl<'a> Compute<'a> {
    /// On packed weights.
    pub(crate) fn kernels(packed: &'a PackedModels, tape: Box<Tape>) -> Self {
        Self::Kernels(packed, tape)
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

    /// The tape, for its memory.
    pub(crate) fn into_tape(self) -> Option<Box<Tape>> {
        match self {
            Self::Kernels(_, tape) => Some(tape),
            Self::Burn(..) => None,
        }
    }

    /// Logits after each source, which is a row and a place in it. `length` is the longest row's.
    pub(crate) fn forward(
        &mut self,
        rows: &[&[u32]],
        sources: &[(usize, usize)],
        length: usize,
        rotary: &RotaryTable,
    ) -> Result<Pass, PolicyError> {
        match self {
            Self::Kernels(packed, tape) => {
                let next_start = |next: &mut usize, row: &&[u32]| Some(std::mem::replace(next, *next + row.len()));
                let starts: Vec<usize> = rows.iter().scan(0, next_start).collect();
                let selected = || sources.iter().map(|(row, at)| starts.get(*row).map_or(0, |start| start + at));
                let mut run = |decoder: &Decoder| {
                    tape.forward(decoder, rows.iter().copied(), selected());
                    std::mem::take(&mut tape.logits)
                };
                // The reference first: the tape must hold the trained model's activations afterwards.
                let reference = packed.reference.as_ref().map(&mut run);
                Ok(Pass { logits: run(&packed.decoder), reference, graph: None })
            }
            Self::Burn(model, reference) => {
                let number = |value: usize| i32::try_from(value).map_err(burn_failed);
                // Padding stands behind the row, where causal attention never looks.
                let padded = rows.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(0)).take(length));
                let ids = padded.map(|id| number(id as usize)).collect::<Result<Vec<_>, _>>()?;
                let selected =
                    sources.iter().map(|(row, at)| number(row * length + at)).collect::<Result<Vec<_>, _>>()?;
                let reference = reference
                    .as_ref()
                    .map(|model| model.logits(ids.clone(), length, selected.clone(), rotary).into_data().try_into_vec())
                    .transpose()
                    .map_err(burn_failed)?;
                let graph = Box::new(model.logits(ids, length, selected, rotary));
                let logits = (*graph).clone().into_data().try_into_vec().map_err(burn_failed)?;
                Ok(Pass { logits, reference, graph: Some(graph) })
            }
        }
    }

    /// Adds the gradient of every weight, given that of the logits in the last forward pass.
    pub(crate) fn backward(&mut self, pass: Pass, gradient: &mut Values) -> Result<(), PolicyError> {
        match (self, pass.graph) {
            (Self::Kernels(packed, tape), _) => {
                tape.logits = pass.logits;
                if let Some(transposed) = &packed.transposed {
                    tape.backward(&packed.decoder, transposed, gradient);
                }
                Ok(())
            }
            (Self::Burn(model, _), Some(graph)) => model.backward(*graph, pass.logits, gradient).map_err(burn_failed),
            (Self::Burn(..), None) => Err(PolicyError::Internal("a forward pass without a graph".to_owned())),
        }
    }
}
