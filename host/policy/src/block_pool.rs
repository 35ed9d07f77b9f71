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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PolicyConfig;
    use crate::device::DevicePrecision;
    use crate::kv_cache::KvCache;

    /// Writes the number of a token over the whole width.
    fn write(layers: &mut Layers, cache: &KvCache, position: usize, number: f32) {
        let place = cache.blocks()[position / BLOCK_TOKENS].slot() * BLOCK_TOKENS + position % BLOCK_TOKENS;
        let device = Device::flex();
        let place = indices(vec![index(place)], [1], &device);
        for (layer, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let sign = if part == 0 { 1.0 } else { -1.0 };
            let row = Tensor::full([1, 16], sign * (number + 1_000.0 * layer as f32), &device);
            layers.write(layer, part, &place, row);
        }
    }

    /// First number of each position of a sequence's blocks, of layer 1's values.
    fn read(layers: &Layers, cache: &KvCache) -> Vec<f32> {
        let slots: Vec<i32> = cache.blocks().iter().map(|block| index(block.slot())).collect();
        let count = slots.len();
        let found = layers.read(1, 1, &indices(slots, [count], &Device::flex())).unwrap();
        let all: Vec<f32> = found.into_data().try_into_vec().unwrap();
        all.chunks_exact(16).map(|row| row[0]).collect()
    }

    #[test]
    fn what_is_written_stays_when_blocks_are_copied_freed_and_the_pool_grows() {
        let config = PolicyConfig { d_model: Some(16), heads: Some(1), layers: Some(2), ..PolicyConfig::default() };
        let models = DeviceModels::new(Device::flex(), DevicePrecision::F32);
        let pool = BlockPool::new(&models, &config.shape(300).unwrap());
        let new = || KvCache::of_blocks(&[], vec![], Some(&pool.meter));
        let feed = |cache: &mut KvCache, count: usize, first: f32| {
            let positions: Vec<usize> = (0..count).map(|_| cache.append(7, pool.layout)).collect();
            let mut layers = pool.ready();
            for position in positions {
                write(&mut layers, cache, position, first + position as f32);
            }
        };
        let want = |numbers: &[f32], blocks: usize| -> Vec<f32> {
            let mut all: Vec<f32> = numbers.iter().map(|number| -(number + 1_000.0)).collect();
            all.resize(blocks * BLOCK_TOKENS, 0.0);
            all
        };
        let counted = |count: usize| (0..count).map(|n| n as f32).collect::<Vec<_>>();
        let mut first = new();
        feed(&mut first, 40, 0.0);
        assert_eq!(read(&pool.ready(), &first), want(&counted(40), 2));
        let mut second = first.prefix(35);
        feed(&mut second, 1, 500.0);
        let mut copied = counted(40);
        copied[35] = 535.0;
        assert_eq!(read(&pool.ready(), &second), want(&copied, 2));
        assert_eq!(read(&pool.ready(), &first), want(&counted(40), 2));
        drop(second);
        // More than the pool began with, and in slots that were used before.
        let mut many: Vec<KvCache> = (0..80).map(|_| new()).collect();
        for (index, cache) in many.iter_mut().enumerate() {
            feed(cache, 1, 2_000.0 + index as f32);
        }
        for (index, cache) in many.iter().enumerate() {
            assert_eq!(read(&pool.ready(), cache), want(&[2_000.0 + index as f32], 1), "{index}");
        }
        assert_eq!(read(&pool.ready(), &first), want(&counted(40), 2));
        assert_eq!(pool.meter.bytes(), 82 * pool.layout.block_bytes());
    }
}
