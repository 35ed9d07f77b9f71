//! A new database beside the current one: written, made durable, closed, opened again, compared, and only then pointed at.

use std::ops::ControlFlow;
use std::sync::Arc;

use fulgurite_core::id::ContentHash;

use super::database::SledKeyValue;
use super::files::StoreFiles;
use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyRange, KeyValue};

/// Hears how many records are done. Long work calls it now and then.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// Keys in one batch.
const KEYS_PER_BATCH: usize = 512;
/// Keys between two calls of [`Progress`].
pub(crate) const KEYS_PER_PROGRESS: u64 = 4_096;

/// What was written, whatever its order: the number of entries and the sum of their hashes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Digest {
    entries: u64,
    sum: u128,
}

impl Digest {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        let length = (key.len() as u64).to_be_bytes();
        let hash = ContentHash::of(&[&length, key, value].concat());
        let half = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        self.entries += 1;
        self.sum = self.sum.wrapping_add(u128::from_be_bytes(half));
    }
}

/// Takes the entries of a new database. Each key may come once.
pub(crate) struct Writer<'a> {
    database: SledKeyValue,
    batch: Batch,
    digest: Digest,
    progress: Progress<'a>,
}

impl Writer<'_> {
    /// Adds an entry.
    pub(crate) fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<()> {
        self.digest.add(&key, &value);
        self.batch.push((key, Some(value)));
        if self.digest.entries.is_multiple_of(KEYS_PER_PROGRESS) {
            (self.progress)(self.digest.entries);
        }
        if self.batch.len() >= KEYS_PER_BATCH { self.apply() } else { Ok(()) }
    }

    /// Adds what a codec has made.
    pub(crate) fn put_all(&mut self, batch: Batch) -> Result<()> {
        for (key, value) in batch {
            if let Some(value) = value {
                self.put(key, value)?;
            }
        }
        Ok(())
    }

    /// Whether there is such a key. What was added before is written for that.
    pub(crate) fn contains(&mut self, key: &[u8]) -> Result<bool> {
        self.apply()?;
        Ok(self.database.get(key)?.is_some())
    }

    /// What was written before the last call of [`contains`](Self::contains).
    pub(crate) const fn database(&self) -> &SledKeyValue {
        &self.database
    }

    fn apply(&mut self) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.database.apply(std::mem::take(&mut self.batch))
    }
}

/// Writes a new database, lets `verify` look at it, and makes it the current one. On an error, or a crash, the old one stays.
pub(crate) fn replace(
    files: &Arc<StoreFiles>,
    number: u64,
    progress: Progress<'_>,
    fill: impl FnOnce(&mut Writer<'_>) -> Result<()>,
    verify: impl FnOnce(&SledKeyValue) -> Result<()>,
) -> Result<SledKeyValue> {
    let folder = files.generation(number);
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(files.fail("clear")(error)),
        _ => {}
    }
    let digest = {
        let database = SledKeyValue::open(Arc::clone(files), &folder)?;
        let mut writer = Writer { database, batch: vec![], digest: Digest::default(), progress };
        fill(&mut writer)?;
        writer.apply()?;
        writer.database.flush()?;
        writer.digest
    };
    // Opened again: what is compared is what a later start will find.
    let database = SledKeyValue::open(Arc::clone(files), &folder)?;
    let mut found = Digest::default();
    database.scan(&KeyRange::all(), &mut |key, value| {
        found.add(key, value);
        Ok(ControlFlow::Continue(()))
    })?;
    if found != digest {
        return Err(StoreError::Damaged {
            dir: files.dir.clone(),
            detail: format!(
                "a new database was written, and {} of {} entries came back",
                found.entries, digest.entries
            ),
        });
    }
    verify(&database)?;
    database.flush()?;
    files.sync_generation(number)?;
    files.make_current(number)?;
    files.remove_leftovers(number);
    Ok(database)
}
