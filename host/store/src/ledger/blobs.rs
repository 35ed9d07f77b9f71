//! Values kept once per run by their content hash, and the workers of the run.
//!
//! Neither is synced by itself: what they belong to, an enqueued rollout or an attempt, is, and a sync covers everything
//! that was applied before it.

use std::ops::ControlFlow;

use fulgurite_core::id::ContentHash;
use fulgurite_core::record::WorkerRecord;

use super::{Ledger, Stage};
use crate::codec;
use crate::error::{Result, StoreError};
use crate::key_value::{KeyRange, KeyValue};
use crate::keys::{self, Kind};
use crate::records::WORKER_ID_BYTES_MAX;

/// Checks a worker's id: it becomes a key and appears in terminals.
pub(crate) fn check_worker_id(id: &str) -> Result<()> {
    if id.is_empty() || id.len() > WORKER_ID_BYTES_MAX || id.chars().any(char::is_control) {
        let shown = id.chars().take(WORKER_ID_BYTES_MAX).filter(|c| !c.is_control()).collect();
        return Err(StoreError::InvalidWorkerId { id: shown });
    }
    Ok(())
}

impl<D: KeyValue> Ledger<D> {
    pub(crate) fn put_blobs(&self, blobs: &[Vec<u8>]) -> Result<Vec<ContentHash>> {
        let hashes: Vec<ContentHash> = blobs.iter().map(|bytes| ContentHash::of(bytes)).collect();
        let mut stage = Stage::new(self)?;
        let mut staged = std::collections::BTreeSet::new();
        for (hash, bytes) in hashes.iter().zip(blobs) {
            let key = keys::blob_key(hash);
            if staged.insert(*hash) && self.database.get(&key)?.is_none() {
                codec::put_packed(&mut stage.batch, key, &codec::pack(bytes.into()))?;
                stage.counters.blobs += 1;
                stage.counters.blob_bytes += bytes.len() as u64;
            }
        }
        stage.commit()?;
        Ok(hashes)
    }

    pub(crate) fn blob(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>> {
        let key = keys::blob_key(hash);
        let Some(bytes) = codec::get_payload(&self.database, &key)? else { return Ok(None) };
        if ContentHash::of(&bytes) == *hash {
            Ok(Some(bytes))
        } else {
            Err(codec::corrupt(&key, "its content has another hash"))
        }
    }

    pub(crate) fn put_worker(&self, worker: &WorkerRecord) -> Result<()> {
        check_worker_id(&worker.id)?;
        let mut stage = Stage::new(self)?;
        let key = keys::worker_key(&worker.id);
        if self.database.get(&key)?.is_none() {
            stage.counters.workers += 1;
        }
        codec::put(&mut stage.batch, key, &codec::encode(worker)?)?;
        stage.commit()?;
        Ok(())
    }

    pub(crate) fn workers(&self) -> Result<Vec<WorkerRecord>> {
        let mut workers = vec![];
        codec::scan(&self.database, &KeyRange::prefix(&[Kind::Worker as u8]), |_, worker: WorkerRecord| {
            workers.push(worker);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(workers)
    }
}
