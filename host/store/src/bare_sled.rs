//! sled without any rules of ours: the baseline of [`benchmark`](crate::benchmark()).

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::sled_store::sled_error;

/// A database with sled's own settings.
pub(crate) struct BareSled {
    database: sled::Db,
    dir: PathBuf,
}

impl BareSled {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let database = sled::open(dir).map_err(|error| sled_error("open", dir, error))?;
        Ok(Self { database, dir: dir.to_owned() })
    }

    /// Writes a batch and flushes as sled does.
    pub(crate) fn commit(&mut self, entries: Vec<(Vec<u8>, Vec<u8>)>) -> Result<()> {
        let mut batch = sled::Batch::default();
        for (key, value) in entries {
            batch.insert(key, value);
        }
        let written = self.database.apply_batch(batch).and_then(|()| self.database.flush());
        written.map(|_| ()).map_err(|error| sled_error("write", &self.dir, error))
    }

    pub(crate) fn disk_bytes(&self) -> Result<u64> {
        self.database.size_on_disk().map_err(|error| sled_error("measure", &self.dir, error))
    }
}
