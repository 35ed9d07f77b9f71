//! [Adapters](crate::lora) on a device: what is added to the projections of one layer, through the low rank.

use burn::prelude::*;
use burn::tensor::{DType, Gradients, TensorData};

use crate::lora::{AdapterLayout, LoraTarget};
use crate::model::{flat, leaf};
use crate::parameters::Parameters;

/// What an adapter adds to one projection.
#[derive(Debug, Clone)]
struct LowRank {
    /// `[rank, in]`.
    down: Tensor<2>,
    /// `[rank, out]`.
    up: Tensor<2>,
    /// Place of `down` among the adapter's tensors; `up` is the next one.
    place: usize,
}

/// Those of one layer.
#[derive(Debug, Clone, Default)]
pub(crate) struct LowRanks {
    targets: [Option<LowRank>; LoraTarget::ALL.len()],
    scale: f32,
}

impl LowRanks {
    /// Copies an adapter's share of a layer to a device.
    pub(crate) fn new(
        layout: &AdapterLayout,
        adapter: &Parameters,
        layer: usize,
        (device, dtype): (&Device, DType),
    ) -> Self {
        let tensor = |at: usize| {
            let values = adapter.values.get(at).cloned().unwrap_or_default();
            let dims = adapter.specs.get(at).map(|spec| spec.dims.clone()).unwrap_or_default();
            Tensor::from_data(TensorData::new(values, dims), (device, dtype))
        };
        let low_rank = |target| {
            let place = layout.place(layer, target)?;
            Some(LowRank { down: tensor(place), up: tensor(place + 1), place })
        };
        Self { targets: LoraTarget::ALL.map(low_rank), scale: layout.scale() }
    }

    /// The same for one worker's passes.
    pub(crate) fn for_training(&self, tracked: bool) -> Self {
        let tracked =
            |low: &LowRank| LowRank { down: leaf(&low.down, tracked), up: leaf(&low.up, tracked), place: low.place };
        Self { targets: self.targets.each_ref().map(|low| low.as_ref().map(tracked)), scale: self.scale }
    }

    /// Adds the adapter's share, where there is one, to the output `y` of a projection of `x`.
    pub(crate) fn add(&self, target: LoraTarget, x: &Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        match self.targets.get(target as usize) {
            Some(Some(low)) => {
                let low = x.clone().matmul(low.down.clone().transpose()).matmul(low.up.clone());
                y + low.cast(DType::F32).mul_scalar(self.scale)
            }
            _ => y,
        }
    }

    /// Hands over the gradients with their places.
    pub(crate) fn gradients(&self, gradients: &mut Gradients, add: &mut impl FnMut(usize, Option<Tensor<1>>)) {
        for low in self.targets.iter().flatten() {
            add(low.place, low.down.grad_remove(gradients).map(flat));
            add(low.place + 1, low.up.grad_remove(gradients).map(flat));
        }
    }
}
