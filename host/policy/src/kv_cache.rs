//! Keys and values of sequences, in blocks that sequences share.
//!
//! A block holds the same [`BLOCK_TOKENS`] positions of every layer. Sequences that begin alike hold the same blocks; what a
//! sequence appends to is its own, a shared block is copied before it is written to. (Rejected: one piece of memory per
//! sequence, copied where prompts are equal. Sixteen copies of a prompt of 512 tokens take as long as computing it once
//! more, and sixteen times the memory.)
//!
//! On a device a block is a slot of its [pool](crate::block_pool): who shares and frees what is the same code.

#![expect(
    clippy::inline_always,
    reason = "code is compiled for wide vectors only where it is inlined into the dispatch"
)]
#![expect(
    clippy::indexing_slicing,
    reason = "sizes are checked at each kernel's entry; the inner loops must not branch"
)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pulp::{Simd, WithSimd};

use crate::attention_kernel::{block_products, exponentiate, seen_blocks};
use crate::kernel::{PANEL, dispatch};
use crate::shape::ModelShape;

/// Positions of one block: those whose scores are computed together.
pub(crate) const BLOCK_TOKENS: usize = PANEL;

/// Memory of all blocks that are alive, in bytes, and what is set aside for blocks about to be made.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    bytes: AtomicUsize,
    /// Where blocks are on a device.
    slots: Option<Slots>,
}

impl Meter {
    /// Of blocks whose keys and values are on a device.
    pub(crate) fn of_slots() -> Self {
        Self { bytes: AtomicUsize::new(0), slots: Some(Slots::default()) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    pub(crate) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(crate) fn subtract(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
    }

    pub(crate) fn slots(&self) -> Option<&Slots> {
        self.slots.as_ref()
    }
}

/// A device's blocks by their number: which are free, and what must be copied before the next forward pass.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<SlotState>);

#[derive(Debug, Default)]
struct SlotState {
    free: Vec<usize>,
    /// Numbers that were ever given out.
    made: usize,
    copies: Vec<(usize, usize)>,
}

impl Slots {
    /// What is written and never read: keys and values of padding.
    pub(crate) const WASTE: usize = 0;
    /// Always zeros: what a new block begins as, and what stands behind the last block of a sequence.
    pub(crate) const ZEROS: usize = 1;
    const RESERVED: usize = 2;

    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot with what another one has, from the next forward pass on.
    fn take(&self, content: usize) -> usize {
        let mut state = self.lock();
        let slot = state.free.pop().unwrap_or_else(|| {
            state.made += 1;
            Self::RESERVED + state.made - 1
        });
        state.copies.push((content, slot));
        slot
    }

    fn give_back(&self, slot: usize) {
        self.lock().free.push(slot);
    }

    /// Slots that there must be room for.
    pub(crate) fn count(&self) -> usize {
        Self::RESERVED + self.lock().made
    }

    /// What must be copied, as (from, to). All is read before anything is written.
    pub(crate) fn take_copies(&self) -> Vec<(usize, usize)> {
        std::mem::take(&mut self.lock().copies)
    }
}

/// How a block is divided: for each layer its keys, `[head][dimension][position]`, and its values, `[position][head]
/// [dimension]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockLayout {
    pub(crate) layers: usize,
    pub(crate) kv_width: usize,
    /// Of one number.
    pub(crate) value_bytes: usize,
}

impl BlockLayout {
    /// Of the kernels' blocks.
    pub(crate) fn new(shape: &ModelShape) -> Self {
        Self::on_device(shape, size_of::<f32>())
    }

    /// Of blocks on a device, in numbers of so many bytes.
    pub(crate) fn on_device(shape: &ModelShape, value_bytes: usize) -> Self {
        Self { layers: shape.layers, kv_width: shape.kv_width(), value_bytes }
    }

    fn floats(self) -> usize {
        self.layers * 2 * BLOCK_TOKENS * self.kv_width
    }

    /// Memory of one block in bytes.
    pub(crate) fn block_bytes(self) -> usize {
        self.value_bytes * self.floats()
    }

    fn keys(self, layer: usize) -> Range<usize> {
        let size = BLOCK_TOKENS * self.kv_width;
        2 * layer * size..(2 * layer + 1) * size
    }

    fn values(self, layer: usize) -> Range<usize> {
        let size = BLOCK_TOKENS * self.kv_width;
        (2 * layer + 1) * size..(2 * layer + 2) * size
    }
}

/// Keys and values of some positions in all layers: here, or in a slot of a device.
#[derive(Debug)]
pub(crate) struct Block {
    /// Empty on a device.
    floats: Vec<f32>,
    /// On a device.
    slot: usize,
    bytes: usize,
    meter: Option<Arc<Meter>>,
}

impl Block {
    fn new(layout: BlockLayout, meter: Option<&Arc<Meter>>) -> Self {
        let slots = meter.and_then(|meter| meter.slots());
        let floats = if slots.is_some() { vec![] } else { vec![0.0; layout.floats()] };
        let slot = slots.map_or(0, |slots| slots.take(Slots::ZEROS));
        Self::counted(floats, slot, layout.block_bytes(), meter)
    }

    fn counted(floats: Vec<f32>, slot: usize, bytes: usize, meter: Option<&Arc<Meter>>) -> Self {
        if let Some(meter) = meter {
            meter.add(bytes);
        }
        Self { floats, slot, bytes, meter: meter.cloned() }
    }

    fn slots(&self) -> Option<&Slots> {
        self.meter.as_ref().and_then(|meter| meter.slots())
    }

    /// Its number on a device.
    pub(crate) fn slot(&self) -> usize {
        self.slot
    }
}

impl Clone for Block {
    fn clone(&self) -> Self {
        let slot = self.slots().map_or(0, |slots| slots.take(self.slot));
        Self::counted(self.floats.clone(), slot, self.bytes, self.meter.as_ref())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(slots) = self.slots() {
            slots.give_back(self.slot);
        }
        if let Some(meter) = &self.meter {
            meter.subtract(self.bytes);
        }
    }
}

/// Keys and values of one sequence. A clone shares its blocks.
#[derive(Debug, Clone, Default)]
pub(crate) struct KvCache {
    /// Tokens whose keys and values are there.
    ids: Vec<u32>,
    /// As many as the tokens need.
    blocks: Vec<Arc<Block>>,
    /// Counts its blocks.
    meter: Option<Arc<Meter>>,
}

impl KvCache {
    /// One that begins with blocks of others. There are as many blocks as the tokens need.
    pub(crate) fn of_blocks(ids: &[u32], blocks: Vec<Arc<Block>>, meter: Option<&Arc<Meter>>) -> Self {
        debug_assert_eq!(blocks.len(), ids.len().div_ceil(BLOCK_TOKENS));
        Self { ids: ids.to_vec(), blocks, meter: meter.cloned() }
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// The first `length` tokens, in the same blocks. Keys and values depend on nothing that comes later.
    pub(crate) fn prefix(&self, length: usize) -> Self {
        let length = length.min(self.ids.len());
        let blocks = self.blocks.iter().take(length.div_ceil(BLOCK_TOKENS)).cloned().collect();
        Self::of_blocks(&self.ids[..length], blocks, self.meter.as_ref())
    }

    /// Blocks that appending `count` tokens makes or copies.
    pub(crate) fn blocks_to_make(&self, count: usize) -> usize {
        if count == 0 {
            return 0;
        }
        let length = self.ids.len();
        let shared = self.blocks.last().is_some_and(|last| Arc::strong_count(last) > 1);
        let copied = usize::from(shared && !length.is_multiple_of(BLOCK_TOKENS));
        (length + count).div_ceil(BLOCK_TOKENS) - self.blocks.len() + copied
    }

    /// Takes the next token in and returns its position, for which [`write`](Self::write) then has room.
    pub(crate) fn append(&mut self, token: u32, layout: BlockLayout) -> usize {
        let position = self.ids.len();
        match self.blocks.get_mut(position / BLOCK_TOKENS) {
            // Copied when another sequence has it too.
            Some(block) => drop(Arc::make_mut(block)),
            None => self.blocks.push(Arc::new(Block::new(layout, self.meter.as_ref()))),
        }
        self.ids.push(token);
        position
    }

    /// Writes the keys and values (each `kv_width` long) of an appended position in one layer.
    pub(crate) fn write(&mut self, position: usize, layer: usize, layout: BlockLayout, keys: &[f32], values: &[f32]) {
        let Some(block) = self.blocks.get_mut(position / BLOCK_TOKENS).and_then(Arc::get_mut) else { return };
        let at = position % BLOCK_TOKENS;
        let slots = &mut block.floats[layout.keys(layer)];
        for (slot, key) in slots[at..].iter_mut().step_by(BLOCK_TOKENS).zip(keys) {
            *slot = *key;
        }
        let width = layout.kv_width;
        block.floats[layout.values(layer)][at * width..(at + 1) * width].copy_from_slice(values);
    }
}

/// Attention of one position over itself and everything before it. Training's
/// [`RowAttention`](crate::row_attention::RowAttention) has the very same sums.
pub(crate) struct BlockAttention<'a> {
    /// `[heads * dim]`, rotated.
    pub(crate) query: &'a [f32],
    pub(crate) cache: &'a KvCache,
    pub(crate) layer: usize,
    pub(crate) layout: BlockLayout,
    /// First position to attend to: above 0 where a window has left it behind.
    pub(crate) first: usize,
    /// Position after the last one to attend to; above `first`.
    pub(crate) length: usize,
    pub(crate) dim: usize,
    /// Room for one head's scores; grown when needed.
    pub(crate) scores: &'a mut Vec<f32>,
    /// `[heads * dim]`.
    pub(crate) out: &'a mut [f32],
}

impl BlockAttention<'_> {
    /// Computes it.
    pub(crate) fn run(self) {
        let blocks = self.length.div_ceil(BLOCK_TOKENS);
        assert!(self.length > self.first && self.cache.blocks.len() >= blocks);
        assert!(self.query.len() == self.out.len() && self.dim > 0);
        if self.scores.len() < blocks * BLOCK_TOKENS {
            self.scores.resize(blocks * BLOCK_TOKENS, 0.0);
        }
        dispatch(self);
    }
}

impl WithSimd for BlockAttention<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => attend::<S, 2, 1>(simd, self),
            8 => attend::<S, 4, 2>(simd, self),
            4 => attend::<S, 8, 4>(simd, self),
            _ => attend::<S, 32, 16>(simd, self),
        }
    }
}

/// `V` vectors make a block of positions, `D` vectors make 16 dimensions.
#[inline(always)]
fn attend<S: Simd, const V: usize, const D: usize>(simd: S, task: BlockAttention<'_>) {
    let BlockAttention { query, cache, layer, layout, first, length, dim, scores, out } = task;
    let kv_width = layout.kv_width;
    let group = query.len() / kv_width;
    let scale = 1.0 / (dim as f32).sqrt();
    let (block, count, seen) = seen_blocks(first, length);
    let blocks = &cache.blocks[block..block + count / BLOCK_TOKENS];
    let scores = &mut scores[..count];
    for (head, (query, out)) in query.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        let head_first = head / group * dim;
        for (block, scores) in blocks.iter().zip(scores.chunks_exact_mut(BLOCK_TOKENS)) {
            let keys = &block.floats[layout.keys(layer)];
            block_products::<S, V>(simd, query, scale, keys, head_first, kv_width, scores);
        }
        let inverse = exponentiate(scores, seen.clone());
        let values = Values { blocks, layer, layout, seen: seen.clone() };
        values.mix::<S, D>(simd, scores, head_first, out);
        for out in out {
            *out *= inverse;
        }
    }
}

/// Values of the positions `seen`, counted from the first of `blocks`.
struct Values<'a> {
    blocks: &'a [Arc<Block>],
    layer: usize,
    layout: BlockLayout,
    seen: Range<usize>,
}

impl<'a> Values<'a> {
    /// Each block's scores and values of seen positions.
    #[inline(always)]
    fn parts(&self, scores: &'a [f32]) -> impl Iterator<Item = (&'a [f32], &'a [f32])> {
        let (layer, layout, seen, width) = (self.layer, self.layout, self.seen.clone(), self.layout.kv_width);
        self.blocks.iter().zip(scores.chunks_exact(BLOCK_TOKENS)).enumerate().map(move |(index, (block, scores))| {
            let before = index * BLOCK_TOKENS;
            let from = seen.start.saturating_sub(before);
            let to = (seen.end - before).min(BLOCK_TOKENS);
            let values = &block.floats[layout.values(layer)];
            (&scores[from..to], &values[from * width..to * width])
        })
    }

    /// `out[i] = Σ_s scores[s] values[s][column + i]`, in the order of positions whatever block they are in.
    #[inline(always)]
    fn mix<S: Simd, const D: usize>(&self, simd: S, scores: &'a [f32], column: usize, out: &mut [f32]) {
        let width = self.layout.kv_width;
        let (chunks, rest) = out.as_chunks_mut::<16>();
        let whole = column + chunks.len() * 16;
        for (part, out) in chunks.iter_mut().enumerate() {
            let first = column + part * 16;
            let mut sums = [simd.splat_f32s(0.0); D];
            for (scores, values) in self.parts(scores) {
                for (score, row) in scores.iter().zip(values.chunks_exact(width)) {
                    let score = simd.splat_f32s(*score);
                    let (row, _) = S::as_simd_f32s(&row[first..first + 16]);
                    for d in 0..D {
                        sums[d] = simd.mul_add_f32s(score, row[d], sums[d]);
                    }
                }
            }
            S::as_mut_simd_f32s(out).0.copy_from_slice(&sums);
        }
        for (offset, out) in rest.iter_mut().enumerate() {
            *out = 0.0;
            for (scores, values) in self.parts(scores) {
                for (score, row) in scores.iter().zip(values.chunks_exact(width)) {
                    *out = score.mul_add(row[whole + offset], *out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::draws;

    #[test]
    fn attention_is_softmax_over_keys() {
        for (heads, kv_heads, dim, length, first) in
            [(4, 2, 32, 71, 0), (4, 2, 32, 71, 40), (2, 1, 8, 33, 32), (6, 3, 20, 64, 63), (2, 2, 48, 1, 0)]
        {
            attention_is_right(heads, kv_heads, dim, length, first);
        }
    }

    fn attention_is_right(heads: usize, kv_heads: usize, dim: usize, length: usize, first: usize) {
        let mut cache = KvCache::default();
        let (keys, values) = (draws(length * kv_heads * dim, 3), draws(length * kv_heads * dim, 4));
        let width = kv_heads * dim;
        let (layout, layer) = (BlockLayout { layers: 2, kv_width: width, value_bytes: 4 }, 1);
        for position in 0..length {
            let at = position * width..(position + 1) * width;
            assert_eq!(cache.append(7, layout), position);
            cache.write(position, layer, layout, &keys[at.clone()], &values[at]);
        }
        let query = draws(heads * dim, 5);
        let mut out = vec![0.0; heads * dim];
        let (scores, slots) = (&mut vec![], &mut out[..]);
        let task =
            BlockAttention { query: &query, cache: &cache, layer, layout, first, length, dim, scores, out: slots };
        task.run();
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let key = |p: usize, d: usize| f64::from(keys[p * width + kv * dim + d]);
            let score = |p: usize| {
                (0..dim).map(|d| f64::from(query[head * dim + d]) * key(p, d)).sum::<f64>() / (dim as f64).sqrt()
            };
            let weights: Vec<f64> = (0..length).map(|p| if p < first { 0.0 } else { score(p).exp() }).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..dim {
                let want: f64 =
                    (0..length).map(|p| weights[p] / total * f64::from(values[p * width + kv * dim + d])).sum();
                assert!((f64::from(out[head * dim + d]) - want).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn blocks_on_a_device_are_slots_that_are_copied_when_written_to_and_used_again() {
        let layout = BlockLayout { layers: 3, kv_width: 2, value_bytes: 2 };
        let meter = Arc::new(Meter::of_slots());
        let slots = meter.slots().unwrap();
        let fed = |cache: &mut KvCache, tokens: u32| {
            for token in 0..tokens {
                cache.append(token, layout);
            }
        };
        let of = |cache: &KvCache| cache.blocks().iter().map(|block| block.slot()).collect::<Vec<_>>();
        let mut first = KvCache::of_blocks(&[], vec![], Some(&meter));
        fed(&mut first, 40);
        assert_eq!((of(&first), slots.count()), (vec![2, 3], 4));
        assert_eq!(slots.take_copies(), [(Slots::ZEROS, 2), (Slots::ZEROS, 3)]);
        assert_eq!(meter.bytes(), 2 * (3 * 2 * 32 * 2 * 2));
        let mut second = first.prefix(35);
        assert!(slots.take_copies().is_empty() && of(&second) == [2, 3]);
        fed(&mut second, 1);
        assert_eq!((of(&first), of(&second), slots.take_copies()), (vec![2, 3], vec![2, 4], vec![(3, 4)]));
        fed(&mut first, 1);
        assert!(slots.take_copies().is_empty(), "nobody else has its last block any more");
        drop(second);
        let mut third = KvCache::of_blocks(&[], vec![], Some(&meter));
        fed(&mut third, 33);
        assert_eq!((of(&third), slots.count()), (vec![4, 5], 6));
        assert_eq!(slots.take_copies(), [(Slots::ZEROS, 4), (Slots::ZEROS, 5)]);
        drop((first, third));
        assert_eq!(meter.bytes(), 0);
    }

    #[test]
    fn blocks_are_shared_until_they_are_written_to_and_all_are_counted() {
        let layout = BlockLayout { layers: 1, kv_width: 2, value_bytes: 4 };
        let meter = Arc::new(Meter::default());
        let mut first = KvCache::of_blocks(&[], vec![], Some(&meter));
        assert_eq!(first.blocks_to_make(40), 2);
        for token in 0..40 {
            let position = first.append(token, layout);
            first.write(position, 0, layout, &[token as f32, 0.0], &[0.0, token as f32]);
        }
        assert_eq!(
            (meter.bytes(), first.blocks_to_make(24), first.blocks_to_make(25)),
            (2 * layout.block_bytes(), 0, 1)
        );
        let mut second = first.prefix(35);
        assert_eq!((meter.bytes(), second.len(), second.ids()), (2 * layout.block_bytes(), 35, &first.ids()[..35]));
        assert_eq!((first.blocks_to_make(1), second.blocks_to_make(1), second.prefix(32).blocks_to_make(1)), (1, 1, 1));
        let position = second.append(99, layout);
        second.write(position, 0, layout, &[-1.0, -1.0], &[-1.0, -1.0]);
        assert_eq!(meter.bytes(), 3 * layout.block_bytes(), "the second block was copied, the first was not");
        let value = |cache: &KvCache, at: usize| cache.blocks[1].floats[layout.values(0)][2 * at + 1];
        assert_eq!(
            (value(&first, 3), value(&second, 3), value(&second, 2), value(&first, 2)),
            (35.0, -1.0, 34.0, 34.0)
        );
        drop(first);
        assert_eq!(meter.bytes(), 2 * layout.block_bytes());
        second = second.prefix(32);
        assert_eq!(meter.bytes(), layout.block_bytes());
        drop(second);
        assert_eq!(meter.bytes(), 0);
    }
}
