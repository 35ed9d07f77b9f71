//! Keys and values on a device: of every layer one tensor for keys and one for values, divided into the slots of
//! [blocks](crate::kv_cache).
//!
//! The tensors are taken out while they are changed, so that burn changes them where they are. They grow as blocks are made,
//! to twice their size and never beyond what blocks have needed at once; the engine's memory bounds that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::prelude::*;
use burn::tensor::{DType, IndexingUpdateOp};

use crate::kv_cache::{BLOCK_TOKENS, BlockLayout, Meter, Slots};
use crate::model::{DeviceModels, index, indices};
use crate::shape::ModelShape;

/// Slots that a pool begins with.
const SLOTS_MIN: usize = 64;

/// The blocks of one engine.
#[derive(Debug)]
pub(crate) struct BlockPool {
    pub(crate) layout: BlockLayout,
    pub(crate) meter: Arc<Meter>,
    device: Device,
    dtype: DType,
    layers: Mutex<Layers>,
}

/// The tensors, `[slots * BLOCK_TOKENS, kv_width]`: keys and values of each layer.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    slots: usize,
    tensors: Vec<[Option<Tensor<2>>; 2]>,
}

impl BlockPool {
    /// Without any block, for models of a shape.
    pub(crate) fn new(models: &DeviceModels, shape: &ModelShape) -> Self {
        let precision = models.precision();
        Self {
            layout: BlockLayout::on_device(shape, precision.bytes()),
            meter: Arc::new(Meter::of_slots()),
            device: models.device().clone(),
            dtype: precision.dtype(),
            layers: Mutex::default(),
        }
    }

    /// The tensors for one forward pass, with room for all blocks and with what new blocks begin as.
    pub(crate) fn ready(&self) -> MutexGuard<'_, Layers> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slots) = self.meter.slots() {
            self.grow(&mut layers, slots.count());
            layers.copy(slots.take_copies(), &self.device);
        }
        layers
    }

    fn grow(&self, layers: &mut Layers, needed: usize) {
        if needed <= layers.slots {
            return;
        }
        let slots = needed.max(2 * layers.slots).max(SLOTS_MIN);
        let more = [(slots - layers.slots) * BLOCK_TOKENS, self.layout.kv_width];
        layers.tensors.resize_with(self.layout.layers, Default::default);
        // One after the other: there is never more than one of them twice.
        for tensor in layers.tensors.iter_mut().flatten() {
            let zeros = Tensor::zeros(more, (&self.device, self.dtype));
            *tensor = Some(match tensor.take() {
                Some(before) => Tensor::cat(vec![before, zeros], 0),
                None => zeros,
            });
        }
        layers.slots = slots;
    }
}

impl Layers {
    fn copy(&mut self, mut copies: Vec<(usize, usize)>, device: &Device) {
        if copies.is_empty() {
            return;
        }
        // Few different sizes, because a GPU compiles for each.
        copies.resize(copies.len().next_power_of_two(), (Slots::WASTE, Slots::WASTE));
        let count = copies.len();
        let (from, to): (Vec<i32>, Vec<i32>) = copies.iter().map(|(from, to)| (index(*from), index(*to))).unzip();
        let (from, to) = (indices(from, [count], device), indices(to, [count], device));
        let slots = self.slots;
        for slot in self.tensors.iter_mut().flatten() {
            let Some(tensor) = slot.take() else { continue };
            let [rows, width] = tensor.dims();
            let tensor = tensor.reshape([slots, BLOCK_TOKENS * width]);
            let content = tensor.clone().select(0, from.clone());
            let tensor = tensor.select_assign(0, to.clone(), content, IndexingUpdateOp::Assign);
            *slot = Some(tensor.reshape([rows, width]));
        }
    }

    /// Writes keys (`part` 0) or values (1) of one layer, `[rows, kv_width]`, at places of `[slots * BLOCK_TOKENS]`.
    pub(crate) fn write(&mut self, layer: usize, part: usize, places: &Tensor<1, Int>, rows: Tensor<2>) {
        if let Some(slot) = self.tensors.get_mut(layer).and_then(|parts| parts.get_mut(part))
            && let Some(tensor) = slot.take()
        {
            *slot = Some(tensor.select_assign(0, places.clone(), rows, IndexingUpdateOp::Assign));
        }
    }

    /// Keys or values of some slots, `[slots, BLOCK_TOKENS * kv_width]`. `None` when there is no such layer.
    pub(crate) fn read(&self, layer: usize, part: usize, slots: &Tensor<1, Int>) -> Option<Tensor<2>> {
        let tensor = self.tensors.get(layer)?.get(part)?.clone()?;
        let [_, width] = tensor.dims();
        Some(tensor.reshape([self.slots, BLOCK_TOKENS * width]).select(0, slots.clone()))
    }
}
