//! The little that the rules need of a database: ordered bytes, atomic batches, and a point after which they are safe.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{PoisonError, RwLock};

use crate::error::Result;

/// Keys and values to write, all or none. Later entries win.
pub(crate) type Batch = Vec<(Vec<u8>, Vec<u8>)>;

/// Sees a key and its value; decides whether to go on.
pub(crate) type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>;

/// An ordered key-value database. Nothing is ever removed: retention deletes whole directories.
pub(crate) trait KeyValue: Send + Sync {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Visits all keys with a prefix, in order.
    fn scan(&self, prefix: &[u8], visit: Visit<'_>) -> Result<()>;

    /// Writes a batch atomically. Visible on return, safe after the next [`sync`](Self::sync).
    fn apply(&self, batch: Batch) -> Result<()>;

    /// Makes everything that was applied before the call survive the machine's death, and notes outside the database
    /// that these are `commits` commits.
    fn sync(&self, commits: u64) -> Result<()>;

    /// Checks that a database that holds `commits` commits has lost none of those noted.
    fn check_complete(&self, commits: u64) -> Result<()>;

    /// Size on disk in bytes, where there is a disk.
    fn disk_bytes(&self) -> Result<Option<u64>>;
}

/// A map in memory.
#[derive(Debug, Default)]
pub(crate) struct MemoryKeyValue {
    map: RwLock<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl KeyValue for MemoryKeyValue {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.map.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned())
    }

    fn scan(&self, prefix: &[u8], visit: Visit<'_>) -> Result<()> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let from_prefix = (Bound::Included(prefix), Bound::Unbounded);
        for (key, value) in map.range::<[u8], _>(from_prefix).take_while(|(key, _)| key.starts_with(prefix)) {
            if visit(key, value)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: Batch) -> Result<()> {
        self.map.write().unwrap_or_else(PoisonError::into_inner).extend(batch);
        Ok(())
    }

    fn sync(&self, _commits: u64) -> Result<()> {
        Ok(())
    }

    fn check_complete(&self, _commits: u64) -> Result<()> {
        Ok(())
    }

    fn disk_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}
