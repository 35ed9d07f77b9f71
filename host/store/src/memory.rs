//! The store in memory: for tests, and for runs that need not outlive their process.

use crate::delegate::delegate_to_ledger;
use crate::key_value::MemoryKeyValue;
use crate::ledger::Ledger;

/// A [`RolloutStore`](crate::RolloutStore) in memory. It keeps the same encoded records as [`SledStore`](crate::SledStore), so that what works
/// here works there; nothing survives a drop.
pub struct MemoryStore {
    ledger: Ledger<MemoryKeyValue>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self { ledger: Ledger::empty(MemoryKeyValue::default()) }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

delegate_to_ledger!(MemoryStore);
