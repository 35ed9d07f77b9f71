//! Prompts that were computed before, for later ones that begin alike.
//!
//! A tree of [blocks](crate::kv_cache): a node is one block with its tokens, below the block that stands before it. Only
//! a leaf may hold fewer tokens than a block has room for.
//!
//! A block is held by the live sessions that have used it: their next turn begins with it. One that nobody holds is idle. Some
//! idle blocks are kept for sessions that begin alike, and no more: most rollouts that have ended are never come back to, and
//! a long evaluation would fill all memory with them. What goes first are idle leaves, then held ones, of each the least
//! recently used. A block that a call uses is left alone for want of memory, because dropping it here would free nothing.

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
    /// Live sessions that have used it. Whoever holds a node holds those before it.
    holders: usize,
}

impl Node {
    fn place(&self, id: u64) -> Place {
        (self.holders > 0, self.used, id)
    }
}

/// Order in which leaves go: whether it is held, when it was used, which it is.
type Place = (bool, u64, u64);

/// Keys and values of one publication of the weights.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    /// Number of the publication that computed what is here.
    generation: u64,
    nodes: BTreeMap<u64, Node>,
    roots: Children,
    /// Nodes without children.
    leaves: BTreeSet<Place>,
    /// What each live session has used. Some of it may have been dropped.
    sessions: BTreeMap<u64, BTreeSet<u64>>,
    /// Nodes that nobody holds.
    idle: usize,
    /// Most nodes that may be idle.
    idle_max: usize,
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
    let near = before.into_iter().chain(after);
    let found = near.map(|(tokens, id)| (*id, common(tokens, wanted))).max_by_key(|(_, shared)| *shared);
    found.filter(|(_, shared)| *shared > 0)
}

impl PrefixTree {
    /// An empty one that keeps so many blocks which no live session has used.
    pub(crate) fn new(idle_max: usize) -> Self {
        Self { idle_max, ..Self::default() }
    }

    /// A session lives from now on.
    pub(crate) fn open(&mut self, session: u64) {
        self.sessions.entry(session).or_default();
    }

    /// A session has ended: what it alone held is idle.
    pub(crate) fn close(&mut self, session: u64) {
        for id in self.sessions.remove(&session).into_iter().flatten() {
            let Some(node) = self.nodes.get_mut(&id) else { continue };
            let before = node.place(id);
            node.holders -= 1;
            let now = node.place(id);
            self.idle += usize::from(!now.0);
            if self.leaves.remove(&before) {
                self.leaves.insert(now);
            }
        }
        self.drop_idle();
    }

    /// Drops what may not be idle any longer.
    fn drop_idle(&mut self) {
        while self.idle > self.idle_max {
            let Some((false, _, id)) = self.leaves.first().copied() else { return };
            self.remove_leaf(id);
        }
    }

    /// Forgets everything when the weights are newer than what is here. Whether they are not older either.
    pub(crate) fn is_of(&mut self, generation: u64) -> bool {
        if generation > self.generation {
            let mut sessions = std::mem::take(&mut self.sessions);
            sessions.values_mut().for_each(BTreeSet::clear);
            *self = Self { generation, sessions, ..Self::new(self.idle_max) };
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

    /// The blocks of the longest known beginning of `ids`, which a session is about to use, and its tokens' number.
    pub(crate) fn longest(&mut self, session: u64, generation: u64, ids: &[u32]) -> (Vec<Arc<Block>>, usize) {
        let (mut blocks, mut length, mut at) = (vec![], 0, None);
        if !self.is_of(generation) {
            return (blocks, length);
        }
        self.clock += 1;
        while let Some(rest) = ids.get(length..).filter(|rest| !rest.is_empty()) {
            let wanted = rest.get(..BLOCK_TOKENS).unwrap_or(rest);
            let Some((id, shared)) = self.children(at).and_then(|children| closest(children, wanted)) else { break };
            self.touch(id, session);
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

    /// Keeps the blocks of `ids`, which a session has computed. What is here already stays.
    pub(crate) fn insert(&mut self, session: u64, generation: u64, ids: &[u32], blocks: &[Arc<Block>]) {
        if self.is_of(generation) {
            self.clock += 1;
            self.add_path(session, ids, blocks);
            self.drop_idle();
        }
    }

    fn add_path(&mut self, session: u64, ids: &[u32], blocks: &[Arc<Block>]) {
        let mut at = None;
        for (tokens, block) in ids.chunks(BLOCK_TOKENS).zip(blocks) {
            let Some(children) = self.children(at) else { return };
            let known = children.range::<[u32], _>((Included(tokens), Unbounded)).next();
            if let Some(id) = known.filter(|(known, _)| known.starts_with(tokens)).map(|(_, id)| *id) {
                self.touch(id, session);
                at = Some(id);
                continue;
            }
            // A shorter leaf that this one continues has nothing of its own.
            let shorter = children.range::<[u32], _>((Unbounded, Excluded(tokens))).next_back();
            if let Some(id) = shorter.filter(|(shorter, _)| tokens.starts_with(shorter)).map(|(_, id)| *id) {
                self.remove_leaf(id);
            }
            let id = self.add(at, tokens, block.clone());
            self.touch(id, session);
            at = Some(id);
        }
    }

    /// Adds a node that nobody holds yet.
    fn add(&mut self, parent: Option<u64>, tokens: &[u32], block: Arc<Block>) -> u64 {
        self.serial += 1;
        let id = self.serial;
        if let Some(children) = self.children_mut(parent) {
            children.insert(tokens.into(), id);
        }
        if let Some((parent, node)) = parent.and_then(|parent| Some((parent, self.nodes.get(&parent)?))) {
            self.leaves.remove(&node.place(parent));
        }
        let node =
            Node { parent, tokens: tokens.into(), block, children: Children::new(), used: self.clock, holders: 0 };
        self.leaves.insert(node.place(id));
        self.nodes.insert(id, node);
        self.idle += 1;
        id
    }

    /// A session uses a node: it holds it from now on if it is live.
    fn touch(&mut self, id: u64, session: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let before = node.place(id);
        node.used = self.clock;
        if self.sessions.get_mut(&session).is_some_and(|held| held.insert(id)) {
            self.idle -= usize::from(node.holders == 0);
            node.holders += 1;
        }
        let now = node.place(id);
        if self.leaves.remove(&before) {
            self.leaves.insert(now);
        }
    }

    fn remove_leaf(&mut self, id: u64) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.idle -= usize::from(node.holders == 0);
        self.leaves.remove(&node.place(id));
        if let Some(children) = self.children_mut(node.parent) {
            children.remove(&node.tokens);
        }
        if let Some((parent, left)) = node.parent.and_then(|parent| Some((parent, self.nodes.get(&parent)?)))
            && left.children.is_empty()
        {
            self.leaves.insert(left.place(parent));
        }
    }

    /// Frees the first block to go among those that no call uses. Whether there was one.
    pub(crate) fn evict(&mut self) -> bool {
        let is_free = |id: &u64| self.nodes.get(id).is_some_and(|node| Arc::strong_count(&node.block) == 1);
        let found = self.leaves.iter().map(|(_, _, id)| *id).find(is_free);
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

    /// A session that is not live.
    const NOBODY: u64 = 0;

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
        let mut tree = PrefixTree::new(usize::MAX);
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
            let (blocks, length) = tree.longest(NOBODY, 0, &ids);
            assert_eq!((length, blocks.len()), (want, want.div_ceil(BLOCK_TOKENS)), "{round}");
            let cache = sequence(&ids, &meter);
            tree.insert(NOBODY, 0, cache.ids(), cache.blocks());
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
        let mut tree = PrefixTree::new(usize::MAX);
        let sequences: Vec<Vec<u32>> = (0..3).map(|n| vec![n; 40]).collect();
        for ids in &sequences {
            let cache = sequence(ids, &meter);
            tree.insert(NOBODY, 0, cache.ids(), cache.blocks());
        }
        let length = |tree: &mut PrefixTree, n: usize| tree.longest(NOBODY, 0, &sequences[n]).1;
        assert_eq!(length(&mut tree, 0), 40);
        assert!(tree.evict() && tree.evict());
        assert_eq!((length(&mut tree, 1), length(&mut tree, 0)), (0, 40));
        let in_use = tree.longest(NOBODY, 0, &sequences[2]).0;
        while tree.evict() {}
        assert_eq!((length(&mut tree, 0), length(&mut tree, 2)), (0, 40));
        drop(in_use);
        assert!(tree.evict() && tree.evict() && !tree.evict());
    }

    #[test]
    fn other_weights_share_nothing() {
        let meter = Arc::default();
        let mut tree = PrefixTree::new(usize::MAX);
        let ids = vec![5; 50];
        let cache = sequence(&ids, &meter);
        tree.insert(NOBODY, 3, cache.ids(), cache.blocks());
        assert_eq!(tree.longest(NOBODY, 3, &ids).1, 50);
        assert_eq!(tree.longest(NOBODY, 2, &ids).1, 0, "older weights");
        assert_eq!(tree.longest(NOBODY, 4, &ids).1, 0);
        assert_eq!(tree.longest(NOBODY, 3, &ids).1, 0, "forgotten");
        tree.insert(NOBODY, 3, cache.ids(), cache.blocks());
        assert!(tree.nodes.is_empty());
    }

    #[test]
    fn what_no_live_session_has_used_is_kept_up_to_a_bound() {
        let meter = Arc::default();
        let mut tree = PrefixTree::new(3);
        let blocks = |count: usize, last: u32| [vec![7; 64], vec![last; 32 * (count - 2)]].concat();
        let keep = |tree: &mut PrefixTree, session: u64, ids: &[u32]| {
            let cache = sequence(ids, &meter);
            tree.insert(session, 0, cache.ids(), cache.blocks());
        };
        let length = |tree: &mut PrefixTree, ids: &[u32]| tree.longest(NOBODY, 0, ids).1;
        for session in 1..=3 {
            tree.open(session);
            keep(&mut tree, session, &blocks(5, u32::try_from(session).unwrap()));
        }
        assert_eq!(
            (tree.nodes.len(), tree.idle),
            (2 + 3 * 3, 0),
            "what live sessions hold is kept whatever the bound is"
        );
        tree.close(1);
        assert_eq!((tree.nodes.len(), tree.idle, length(&mut tree, &blocks(5, 1))), (2 + 3 * 3, 3, 160));
        // The first one's end was used last, by the line before; its blocks stay and the second one's go.
        tree.close(2);
        assert_eq!((tree.nodes.len(), tree.idle), (2 + 3 + 3, 3));
        assert_eq!((length(&mut tree, &blocks(5, 2)), length(&mut tree, &blocks(5, 1))), (64, 160));
        // A session that comes back to what is idle holds it again.
        tree.open(4);
        assert_eq!(tree.longest(4, 0, &blocks(5, 1)).1, 160);
        assert_eq!(tree.idle, 0);
        tree.close(3);
        tree.close(4);
        assert_eq!((tree.nodes.len(), tree.idle), (3, 3), "the beginning that all share goes last");
        assert_eq!(length(&mut tree, &blocks(2, 0)), 64);
        // One that had ended when its call did holds nothing.
        keep(&mut tree, 4, &blocks(5, 9));
        assert_eq!((tree.nodes.len(), tree.idle), (3, 3));
        tree.open(5);
        keep(&mut tree, 5, &blocks(4, 5));
        assert!(tree.is_of(1) && tree.nodes.is_empty() && tree.idle == 0, "other weights");
        tree.close(5);
        assert_eq!((tree.idle, meter.bytes()), (0, 0));
    }

    #[test]
    fn memory_is_taken_from_idle_blocks_before_held_ones() {
        let meter = Arc::default();
        let mut tree = PrefixTree::new(usize::MAX);
        let ids: Vec<Vec<u32>> = (0..2).map(|n| vec![n; 40]).collect();
        tree.open(1);
        for (session, ids) in [(1, &ids[0]), (NOBODY, &ids[1])] {
            let cache = sequence(ids, &meter);
            tree.insert(session, 0, cache.ids(), cache.blocks());
        }
        assert!(tree.evict() && tree.evict());
        assert_eq!((tree.longest(1, 0, &ids[0]).1, tree.longest(1, 0, &ids[1]).1), (40, 0));
        assert!(tree.evict() && tree.evict() && !tree.evict());
        tree.close(1);
        assert_eq!((tree.idle, tree.leaves.len()), (0, 0));
    }
}
