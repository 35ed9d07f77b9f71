//! Prompts that were computed before, for later ones that begin alike.
//!
//! A tree of [blocks](crate::kv_cache): a node is one block with its tokens, below the block that stands before it. Only
//! a leaf may hold fewer tokens than a block has room for. The least recently used leaf goes first; a block that a call
//! uses is left alone, because dropping it here would free nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Included, Unbounded};
use std::sync::Arc;

use crate::kv_cache::{BLOCK_TOKENS, Block};

type Children = BTreeMap<Box<[u32]>, u64>;

#[derive(Debug)]
struct Node {
    parent: Option<u64>,
    tokens: Box<[u32]>,
    block: Arc<Block>,
    children: Children,
    /// Time of the tree's clock.
    used: u64,
}

/// Keys and values of one publication of the weights.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    /// Number of the publication that computed what is here.
    generation: u64,
    nodes: BTreeMap<u64, Node>,
    roots: Children,
    /// Nodes without children, least recently used first.
    leaves: BTreeSet<(u64, u64)>,
    clock: u64,
    serial: u64,
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The child that shares most tokens with `wanted`, and how many. It is a neighbour in the order of tokens.
fn closest(children: &Children, wanted: &[u32]) -> Option<(u64, usize)> {
    let before = children.range::<[u32], _>((Unbounded, Included(wanted))).next_back();
    let after = children.range::<[u32], _>((Excluded(wanted), Unbounded)).next();
    let neighbours = before.into_iter().chain(after);
    let found = neighbours.map(|(tokens, id)| (*id, common(tokens, wanted))).max_by_key(|(_, shared)| *shared);
    found.filter(|(_, shared)| *shared > 0)
}

impl PrefixTree {
    /// Forgets everything when the weights are newer than what is here. Whether they are not older either.
    fn is_of(&mut self, generation: u64) -> bool {
        if generation > self.generation {
            *self = Self { generation, ..Self::default() };
        }
        generation == self.generation
    }

    fn children(&self, of: Option<u64>) -> Option<&Children> {
        match of {
            Some(id) => self.nodes.get(&id).map(|node| &node.children),
            None => Some(&self.roots),
        }
    }

    fn children_mut(&mut self, of: Option<u64>) -> Option<&mut Children> {
        match of {
            Some(id) => self.nodes.get_mut(&id).map(|node| &mut node.children),
            None => Some(&mut self.roots),
        }
    }

    /// The blocks of the longest known beginning of `ids`, and its tokens' number.
    pub(crate) fn longest(&mut self, generation: u64, ids: &[u32]) -> (Vec<Arc<Block>>, usize) {
        let (mut blocks, mut length, mut at) = (vec![], 0, None);
        if !self.is_of(generation) {
            return (blocks, length);
        }
        self.clock += 1;
        while let Some(rest) = ids.get(length..).filter(|rest| !rest.is_empty()) {
            let wanted = rest.get(..BLOCK_TOKENS).unwrap_or(rest);
            let Some((id, shared)) = self.children(at).and_then(|children| closest(children, wanted)) else { break };
            self.touch(id);
            let Some(node) = self.nodes.get(&id) else { break };
            blocks.push(node.block.clone());
            length += shared;
            at = Some(id);
            if shared < BLOCK_TOKENS {
                break;
            }
        }
        (blocks, length)
    }

    /// Keeps the blocks of `ids`. What is here already stays.
    pub(crate) fn insert(&mut self, generation: u64, ids: &[u32], blocks: &[Arc<Block>]) {
        if !self.is_of(generation) {
            return;
        }
        self.clock += 1;
        let mut at = None;
        for (tokens, block) in ids.chunks(BLOCK_TOKENS).zip(blocks) {
            let Some(children) = self.children(at) else { return };
            let known = children.range::<[u32], _>((Included(tokens), Unbounded)).next();
            if let Some(id) = known.filter(|(known, _)| known.starts_with(tokens)).map(|(_, id)| *id) {
                self.touch(id);
                at = Some(id);
                continue;
            }
            // A shorter leaf that this one continues has nothing of its own.
            let shorter = children.range::<[u32], _>((Unbounded, Excluded(tokens))).next_back();
            if let Some(id) = shorter.filter(|(shorter, _)| tokens.starts_with(shorter)).map(|(_, id)| *id) {
                self.remove_leaf(id);
            }
            at = Some(self.add(at, tokens, block.clone()));
        }
    }

    fn add(&mut self, parent: Option<u64>, tokens: &[u32], block: Arc<Block>) -> u64 {
        self.serial += 1;
        let (id, used) = (self.serial, self.clock);
        if let Some(children) = self.children_mut(parent) {
            children.insert(tokens.into(), id);
        }
        if let Some((parent, node)) = parent.and_then(|parent| Some((parent, self.nodes.get(&parent)?))) {
            self.leaves.remove(&(node.used, parent));
        }
        self.leaves.insert((used, id));
        self.nodes.insert(id, Node { parent, tokens: tokens.into(), block, children: Children::new(), used });
        id
    }

    fn touch(&mut self, id: u64) {
        let now = self.clock;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let before = std::mem::replace(&mut node.used, now);
        if self.leaves.remove(&(before, id)) {
            self.leaves.insert((now, id));
        }
    }

    fn remove_leaf(&mut self, id: u64) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.leaves.remove(&(node.used, id));
        if let Some(children) = self.children_mut(node.parent) {
            children.remove(&node.tokens);
        }
        if let Some((parent, left)) = node.parent.and_then(|parent| Some((parent, self.nodes.get(&parent)?)))
            && left.children.is_empty()
        {
            self.leaves.insert((left.used, parent));
        }
    }

    /// Frees the block that was used least recently among those that no call uses. Whether there was one.
    pub(crate) fn evict(&mut self) -> bool {
        let is_free = |id: &u64| self.nodes.get(id).is_some_and(|node| Arc::strong_count(&node.block) == 1);
        let found = self.leaves.iter().map(|(_, id)| *id).find(is_free);
        if let Some(id) = found {
            self.remove_leaf(id);
        }
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::seed::{Generator, Seed};

    use super::*;
    use crate::config::PolicyConfig;
    use crate::kv_cache::{BlockLayout, KvCache, Meter};

    fn sequence(ids: &[u32], meter: &Arc<Meter>) -> KvCache {
        let config = PolicyConfig { d_model: Some(16), heads: Some(1), layers: Some(1), ..PolicyConfig::default() };
        let layout = BlockLayout::new(&config.shape(300).unwrap());
        let mut cache = KvCache::of_blocks(&[], vec![], Some(meter));
        for id in ids {
            cache.append(*id, layout);
        }
        cache
    }

    #[test]
    fn the_longest_known_beginning_is_that_of_a_search_through_all() {
        let meter = Arc::default();
        let mut generator = Generator::new(Seed::new(4));
        let mut tree = PrefixTree::default();
        let mut known: Vec<Vec<u32>> = vec![];
        for round in 0..400 {
            // Few different tokens and lengths around the block size, so that beginnings are shared in every way.
            let mut ids: Vec<u32> = match known.len() {
                0 => vec![],
                n if round % 3 > 0 => {
                    let other = &known[generator.below(n)];
                    other[..generator.below(other.len() + 1)].to_vec()
                }
                _ => vec![],
            };
            let more = generator.below(70) + 1;
            ids.extend((0..more).map(|_| u32::from(generator.below(2) == 1)));
            let want = known.iter().map(|other| common(other, &ids)).max().unwrap_or(0);
            let (blocks, length) = tree.longest(0, &ids);
            assert_eq!((length, blocks.len()), (want, want.div_ceil(BLOCK_TOKENS)), "{round}");
            let cache = sequence(&ids, &meter);
            tree.insert(0, cache.ids(), cache.blocks());
            known.push(ids);
        }
        let mut evicted = 0;
        while tree.evict() {
            evicted += 1;
        }
        assert!(evicted > 100 && tree.nodes.is_empty() && tree.roots.is_empty() && tree.leaves.is_empty());
        assert_eq!(meter.bytes(), 0);
    }

    #[test]
    fn the_least_recently_used_goes_first_and_what_is_in_use_stays() {
        let meter = Arc::default();
        let mut tree = PrefixTree::default();
        let sequences: Vec<Vec<u32>> = (0..3).map(|n| vec![n; 40]).collect();
        for ids in &sequences {
            let cache = sequence(ids, &meter);
            tree.insert(0, cache.ids(), cache.blocks());
        }
        let length = |tree: &mut PrefixTree, n: usize| tree.longest(0, &sequences[n]).1;
        assert_eq!(length(&mut tree, 0), 40);
        assert!(tree.evict() && tree.evict());
        assert_eq!((length(&mut tree, 1), length(&mut tree, 0)), (0, 40));
        let in_use = tree.longest(0, &sequences[2]).0;
        while tree.evict() {}
        assert_eq!((length(&mut tree, 0), length(&mut tree, 2)), (0, 40));
        drop(in_use);
        assert!(tree.evict() && tree.evict() && !tree.evict());
    }

    #[test]
    fn other_weights_share_nothing() {
        let meter = Arc::default();
        let mut tree = PrefixTree::default();
        let ids = vec![5; 50];
        let cache = sequence(&ids, &meter);
        tree.insert(3, cache.ids(), cache.blocks());
        assert_eq!(tree.longest(3, &ids).1, 50);
        assert_eq!(tree.longest(2, &ids).1, 0, "older weights");
        assert_eq!(tree.longest(4, &ids).1, 0);
        assert_eq!(tree.longest(3, &ids).1, 0, "forgotten");
        tree.insert(3, cache.ids(), cache.blocks());
        assert!(tree.nodes.is_empty());
    }
}
