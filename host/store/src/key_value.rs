//! The little that the rules need of a database: ordered bytes, atomic batches, and a point after which they are safe.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{PoisonError, RwLock};

use crate::error::Result;

/// Keys with the value to write, or `None` to remove them; all or none. Later entries win.
pub(crate) type Batch = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// Sees a key and its value; decides whether to go on.
pub(crate) type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>;

/// Keys from `start` (included) to `end` (excluded; `None`: the last).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyRange {
    pub(crate) start: Vec<u8>,
    pub(crate) end: Option<Vec<u8>>,
    pub(crate) descending: bool,
}

impl KeyRange {
    /// Everything.
    pub(crate) const fn all() -> Self {
        Self { start: vec![], end: None, descending: false }
    }

    /// All keys with a prefix.
    pub(crate) fn prefix(prefix: &[u8]) -> Self {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if let Some(next) = last.checked_add(1) {
                end.push(next);
                break;
            }
        }
        Self { start: prefix.to_vec(), end: (!end.is_empty()).then_some(end), descending: false }
    }

    /// The part behind a key, in the order of the range.
    pub(crate) fn after(mut self, key: &[u8]) -> Self {
        if self.descending {
            self.end = Some(key.to_vec());
        } else {
            self.start = [key, &[0]].concat();
        }
        self
    }

    /// The same keys from the last to the first.
    pub(crate) const fn descending(mut self, descending: bool) -> Self {
        self.descending = descending;
        self
    }

    fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (Bound::Included(&self.start), self.end.as_deref().map_or(Bound::Unbounded, Bound::Excluded))
    }

    /// Whether there is nothing in it; ordered maps refuse such bounds.
    pub(crate) fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }
}

/// An ordered key-value database.
pub(crate) trait KeyValue: Send + Sync {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Visits all keys of a range, in its order.
    fn scan(&self, range: &KeyRange, visit: Visit<'_>) -> Result<()>;

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

    fn scan(&self, range: &KeyRange, visit: Visit<'_>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let mut forward = map.range::<[u8], _>(range.bounds());
        while let Some((key, value)) = if range.descending { forward.next_back() } else { forward.next() } {
            if visit(key, value)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: Batch) -> Result<()> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in batch {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
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
