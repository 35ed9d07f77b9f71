//! Memory for keys and values: what calls use now and what is kept for later ones, under one bound.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::kv_cache::{BLOCK_TOKENS, BlockLayout, KvCache, Meter};
use crate::prefix_tree::PrefixTree;

/// The engine's blocks.
#[derive(Debug)]
pub(crate) struct KvMemory {
    meter: Arc<Meter>,
    tree: Mutex<PrefixTree>,
    layout: BlockLayout,
    bytes_max: usize,
    pub(crate) blocks_evicted: AtomicU64,
}

/// Bytes set aside for blocks that a forward pass is about to make, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reserved<'a> {
    meter: &'a Meter,
    bytes: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.meter.subtract(self.bytes);
    }
}

impl KvMemory {
    /// `meter` counts the blocks; `idle_bytes_max` is of what is kept that no live session has used.
    pub(crate) fn new(layout: BlockLayout, meter: Arc<Meter>, bytes_max: usize, idle_bytes_max: usize) -> Self {
        Self {
            meter,
            tree: Mutex::new(PrefixTree::new(idle_bytes_max / layout.block_bytes())),
            layout,
            bytes_max,
            blocks_evicted: AtomicU64::new(0),
        }
    }

    fn tree(&self) -> MutexGuard<'_, PrefixTree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all blocks that are alive.
    pub(crate) fn bytes(&self) -> usize {
        self.meter.bytes()
    }

    /// A session lives: what it uses is kept for its next turn, as far as there is room.
    pub(crate) fn open(&self, session: u64) {
        self.tree().open(session);
    }

    /// A session has ended.
    pub(crate) fn close(&self, session: u64) {
        self.tree().close(session);
    }

    /// Frees what older weights have computed.
    pub(crate) fn forget_before(&self, generation: u64) {
        self.tree().is_of(generation);
    }

    /// The longest known beginning of `ids`, in blocks that are shared.
    pub(crate) fn longest(&self, session: u64, generation: u64, ids: &[u32]) -> KvCache {
        let (blocks, length) = self.tree().longest(session, generation, ids);
        KvCache::of_blocks(ids.get(..length).unwrap_or_default(), blocks, Some(&self.meter))
    }

    /// Keeps what a call has computed, as far as there is room; only whole blocks when it goes on writing.
    pub(crate) fn keep(&self, session: u64, generation: u64, cache: &KvCache, whole_blocks: bool) {
        let length = if whole_blocks { cache.len() - cache.len() % BLOCK_TOKENS } else { cache.len() };
        if self.bytes_max > 0 && length > 0 {
            self.tree().insert(session, generation, cache.ids().get(..length).unwrap_or_default(), cache.blocks());
        }
    }

    /// Drops what is kept until `blocks` more fit. Whether they do.
    pub(crate) fn make_room(&self, blocks: usize) -> bool {
        let bytes = blocks * self.layout.block_bytes();
        self.evict_for(&mut None, bytes)
    }

    /// Sets memory for `blocks` aside, dropping what is kept where needed. `None` when they do not fit.
    pub(crate) fn reserve(&self, blocks: usize) -> Option<Reserved<'_>> {
        let bytes = blocks * self.layout.block_bytes();
        // Under the lock, so that two threads do not take the same room.
        let mut tree = Some(self.tree());
        self.evict_for(&mut tree, bytes).then(|| self.set_aside(bytes))
    }

    /// Sets memory aside whether it fits or not: for the one call that every thread may carry.
    pub(crate) fn reserve_in_any_case(&self, blocks: usize) -> Reserved<'_> {
        self.set_aside(blocks * self.layout.block_bytes())
    }

    fn set_aside(&self, bytes: usize) -> Reserved<'_> {
        self.meter.add(bytes);
        Reserved { meter: &self.meter, bytes }
    }

    fn evict_for<'a>(&'a self, tree: &mut Option<MutexGuard<'a, PrefixTree>>, bytes: usize) -> bool {
        while self.meter.bytes() + bytes > self.bytes_max {
            if !tree.get_or_insert_with(|| self.tree()).evict() {
                return false;
            }
            self.blocks_evicted.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}
