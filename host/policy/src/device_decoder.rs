//! Generation on a device: rows of which each is the next token of some sequence, as for the kernels' [decoder]
//! (crate::decoder), with keys and values in a [pool](crate::block_pool) that stays there.
//!
//! Attention is computed by tiles: the rows of one sequence that stand in one of its blocks. A tile sees the blocks up to its
//! own, filled up with zeros to a power of two, so that how much it reads follows from its position alone. Tiles that read
//! equally much are computed together. Rows, tiles and draws are filled up to powers of two as well: a GPU compiles and
//! tunes for every new size.
//!
//! On burn's CPU backend a tile always has room for a whole block, even for one row, and rows come by whole tiles: every
//! product then has the same sizes whoever else is in the batch, and a token's bits depend on its own sequence alone. A GPU
//! computes single rows as such, for speed; which of its kernels runs depends on the sizes of a batch and on which was the
//! fastest when it was tried, and so may last bits: what holds there are the tolerances of the numeric suite.
//!
//! (Rejected: padded tensors per session. A group would hold its prompt once for each member, and a session that grows is
//! copied. Rejected for now: a kernel that reads blocks where they are; here they are gathered for every step.)

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::prelude::*;
use burn::tensor::{DType, TensorData};
use fulgurite_core::id::PolicyVersion;

use crate::block_pool::{BlockPool, Layers};
use crate::decoder::Row;
use crate::device::is_host;
use crate::kv_cache::{BLOCK_TOKENS, KvCache, Slots};
use crate::model::{MASKED, Model, both_halves, floats, index, indices, rotate, scale, softmax};
use crate::rotary::RotaryTable;

/// One published version of the weights on a device. Copies share the weights.
#[derive(Debug, Clone)]
pub(crate) struct DeviceDecoder {
    pub(crate) version: PolicyVersion,
    pub(crate) model: Arc<Model>,
    pub(crate) pool: Arc<BlockPool>,
    pub(crate) rotary: Arc<RotaryTable>,
}

/// How batches are filled up.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Least rows of a batch.
    rows_min: usize,
    /// Rows of the tile of a sequence that feeds one row.
    single: usize,
}

impl Sizes {
    /// Every product has sizes that follow from the row's own position.
    const REPRODUCIBLE: Self = Self { rows_min: BLOCK_TOKENS, single: BLOCK_TOKENS };
    const FAST: Self = Self { rows_min: 8, single: 1 };
}

/// Rows of one sequence that stand in one block.
struct Tile {
    /// (place in the tile, row of the batch, position).
    rows: Vec<(usize, usize, usize)>,
    /// Slots of the blocks that it sees.
    slots: Vec<usize>,
}

/// Tiles of equal sizes, on the device.
struct Group {
    tiles: usize,
    /// Rows of a tile.
    rows: usize,
    /// Positions that a tile reads.
    length: usize,
    /// Row of the batch for each row of the tiles.
    queries: Tensor<1, Int>,
    /// Blocks of the tiles.
    slots: Tensor<1, Int>,
    /// Added to scores, `[tiles, 1, heads of a key * rows, length]`.
    masked: Tensor<4>,
}

/// A batch on the device.
struct Batch {
    rows: usize,
    /// Angles of each row's position, `[rows, 1, head_dim]`.
    cosines: Tensor<3>,
    sines: Tensor<3>,
    /// Where each row's keys and values go in the pool.
    places: Tensor<1, Int>,
    groups: Vec<Group>,
    /// Where each row of the batch stands among the rows of all tiles.
    order: Tensor<1, Int>,
}

impl DeviceDecoder {
    fn sizes(&self) -> Sizes {
        if is_host(&self.model.device) { Sizes::REPRODUCIBLE } else { Sizes::FAST }
    }

    /// Feeds rows and returns the logits after some of them, `[draws, vocabulary]`. Several rows of one sequence stand in its
    /// order. Ids must be below the vocabulary's size and caches shorter than the context; the scheduler sees to both.
    pub(crate) fn predict(&self, rows: &[Row], caches: &mut [&mut KvCache], draws: &[usize]) -> Vec<f32> {
        let append = |row: &Row| caches.get_mut(row.cache).map_or(0, |cache| cache.append(row.token, self.pool.layout));
        let positions: Vec<usize> = rows.iter().map(append).collect();
        let batch = self.batch(rows, &positions, caches);
        let ids = rows.iter().map(|row| index(row.token as usize)).chain(std::iter::repeat(0));
        let mut x = self.model.embed(ids.take(batch.rows).collect());
        // Held for the whole pass: it is the one that writes.
        let mut layers = self.pool.ready();
        for (at, layer) in self.model.layers.iter().enumerate() {
            let [query, key, value] = layer.project(x.clone(), &self.model);
            layers.write(at, 0, &batch.places, batch.rotated(key, &self.model));
            layers.write(at, 1, &batch.places, value.cast(self.model.dtype));
            let query = batch.rotated(query.mul_scalar(scale(self.model.shape.head_dim)), &self.model);
            let mixed = batch.groups.iter().filter_map(|group| group.attend(&query, &layers, at, &self.model));
            let mixed = Tensor::cat(mixed.collect(), 0).select(0, batch.order.clone());
            x = x + layer.project_out(mixed, &self.model);
            x = x.clone() + layer.feed_forward(x, &self.model);
        }
        drop(layers);
        self.logits(x, draws)
    }

    fn logits(&self, x: Tensor<2>, draws: &[usize]) -> Vec<f32> {
        if draws.is_empty() {
            return vec![];
        }
        let least = self.sizes().rows_min;
        let count = draws.len().max(least).next_power_of_two();
        let rows = draws.iter().map(|row| index(*row)).chain(std::iter::repeat(0)).take(count).collect();
        let x = x.select(0, indices(rows, [count], &self.model.device));
        let logits: TensorData = self.model.logits(self.model.last_norm(x)).slice_dim(0, 0..draws.len()).into_data();
        // They are f32 by construction; a caller that gets none reports logits that are not finite.
        logits.try_into_vec().unwrap_or_default()
    }

    fn batch(&self, rows: &[Row], positions: &[usize], caches: &[&mut KvCache]) -> Batch {
        let (sizes, device, shape) = (self.sizes(), &self.model.device, &self.model.shape);
        let count = rows.len().max(sizes.rows_min).next_power_of_two();
        let angles = positions.iter().copied().chain(std::iter::repeat(0)).take(count);
        let (cosines, sines): (Vec<_>, Vec<_>) = angles.map(|position| self.rotary.at(position)).unzip();
        let table = |values: Vec<&[f32]>| {
            floats(both_halves(&values.concat(), shape.head_dim), [count, 1, shape.head_dim], device)
        };
        let slot = |row: &Row, position: usize| {
            let block = caches.get(row.cache).and_then(|cache| cache.blocks().get(position / BLOCK_TOKENS));
            block.map_or(Slots::WASTE, |block| block.slot())
        };
        let place = |(row, position): (&Row, &usize)| slot(row, *position) * BLOCK_TOKENS + *position % BLOCK_TOKENS;
        let waste = Slots::WASTE * BLOCK_TOKENS;
        let places = rows.iter().zip(positions).map(place).chain(std::iter::repeat(waste)).take(count);
        let places = indices(places.map(index).collect(), [count], device);

        let mut order = vec![0; count];
        let mut groups = Vec::new();
        let mut before = 0;
        for ((tile_rows, blocks), tiles) in grouped(rows, positions, caches, sizes) {
            for (at, tile) in tiles.iter().enumerate() {
                for (place, row, _) in &tile.rows {
                    if let Some(slot) = order.get_mut(*row) {
                        *slot = index(before + at * tile_rows + place);
                    }
                }
            }
            let group = self.group(tile_rows, blocks, &tiles);
            before += group.tiles * group.rows;
            groups.push(group);
        }
        Batch {
            rows: count,
            cosines: table(cosines),
            sines: table(sines),
            places,
            groups,
            order: indices(order, [count], device),
        }
    }

    /// Puts tiles of `rows` rows that read `blocks` blocks on the device.
    fn group(&self, rows: usize, blocks: usize, tiles: &[Tile]) -> Group {
        let (device, shape) = (&self.model.device, &self.model.shape);
        let (count, length) = (tiles.len().next_power_of_two(), blocks * BLOCK_TOKENS);
        let mut queries = vec![0; count * rows];
        // A row that nobody asked for sees the first position, so that its softmax is defined.
        let mut positions = vec![0; count * rows];
        let mut slots = vec![index(Slots::ZEROS); count * blocks];
        for (at, tile) in tiles.iter().enumerate() {
            for (place, row, position) in &tile.rows {
                let place = at * rows + place;
                if let (Some(query), Some(at)) = (queries.get_mut(place), positions.get_mut(place)) {
                    (*query, *at) = (index(*row), *position);
                }
            }
            for (slot, of) in slots.iter_mut().skip(at * blocks).zip(&tile.slots) {
                *slot = index(*of);
            }
        }
        // Heads of one key stand together, each with all rows of the tile.
        let heads = shape.heads / shape.kv_heads;
        let each_head = |of: &dyn Fn(usize) -> usize| {
            let values = positions.chunks_exact(rows).flat_map(|tile| std::iter::repeat_n(tile, heads).flatten());
            let values: Vec<i32> = values.map(|position| index(of(*position))).collect();
            indices(values, [count, 1, heads * rows, 1], device)
        };
        let keys = indices((0..index(length)).collect(), [1, 1, 1, length], device);
        let all = [count, 1, heads * rows, length];
        let keys = keys.expand(all);
        let mut masked = keys.clone().greater(each_head(&|position| position).expand(all));
        if shape.sliding_window.is_some() {
            let first = each_head(&|position| shape.window_start(position + 1)).expand(all);
            masked = masked.bool_or(keys.lower(first));
        }
        Group {
            tiles: count,
            rows,
            length,
            queries: indices(queries, [count * rows], device),
            slots: indices(slots, [count * blocks], device),
            masked: masked.float().cast(DType::F32).mul_scalar(MASKED),
        }
    }
}

/// Tiles by the rows that they have room for and the blocks that they read.
fn grouped(
    rows: &[Row],
    positions: &[usize],
    caches: &[&mut KvCache],
    sizes: Sizes,
) -> BTreeMap<(usize, usize), Vec<Tile>> {
    let mut fed = BTreeMap::<usize, usize>::new();
    let mut tiles = BTreeMap::<(usize, usize), Vec<(usize, usize)>>::new();
    for (at, (row, position)) in rows.iter().zip(positions).enumerate() {
        *fed.entry(row.cache).or_default() += 1;
        tiles.entry((row.cache, position / BLOCK_TOKENS)).or_default().push((at, *position));
    }
    let mut groups = BTreeMap::<(usize, usize), Vec<Tile>>::new();
    for ((cache, block), members) in tiles {
        let room = if fed.get(&cache) == Some(&1) { sizes.single } else { BLOCK_TOKENS };
        let blocks = caches.get(cache).map_or(&[][..], |cache| cache.blocks());
        let tile = Tile {
            rows: members.into_iter().map(|(row, position)| (position % room, row, position)).collect(),
            slots: blocks.iter().take(block + 1).map(|block| block.slot()).collect(),
        };
        groups.entry((room, (block + 1).next_power_of_two())).or_default().push(tile);
    }
    groups
}

impl Batch {
    /// Heads turned by the angles of their row, in the numbers of products.
    fn rotated(&self, x: Tensor<2>, model: &Model) -> Tensor<2> {
        let ([rows, width], dim) = (x.dims(), model.shape.head_dim);
        let heads = x.reshape([rows, width / dim, dim]);
        rotate(heads, self.cosines.clone(), self.sines.clone()).reshape([rows, width]).cast(model.dtype)
    }
}

impl Group {
    /// Attention of all rows of the tiles, `[tiles * rows, heads * head_dim]`, f32.
    fn attend(&self, query: &Tensor<2>, layers: &Layers, layer: usize, model: &Model) -> Option<Tensor<2>> {
        let (kv_heads, dim) = (model.shape.kv_heads, model.shape.head_dim);
        let heads = model.shape.heads / kv_heads;
        let (tiles, rows, length) = (self.tiles, self.rows, self.length);
        let read = |part| {
            let blocks = layers.read(layer, part, &self.slots)?;
            Some(blocks.reshape([tiles, length, kv_heads, dim]))
        };
        let (keys, values) = (read(0)?.permute([0, 2, 3, 1]), read(1)?.swap_dims(1, 2));
        let query = query.clone().select(0, self.queries.clone());
        let query = query.reshape([tiles, rows, kv_heads, heads, dim]).permute([0, 2, 3, 1, 4]);
        let query = query.reshape([tiles, kv_heads, heads * rows, dim]);
        let scores = query.matmul(keys).cast(DType::F32) + self.masked.clone();
        let mixed = softmax(scores).cast(model.dtype).matmul(values).cast(DType::F32);
        let mixed = mixed.reshape([tiles, kv_heads, heads, rows, dim]).permute([0, 3, 1, 2, 4]);
        Some(mixed.reshape([tiles * rows, kv_heads * heads * dim]))
    }
}
