//! sled as the ledger's database.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::files::StoreFiles;
use super::io_error;
use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyRange, KeyValue, Visit};

/// Page cache in bytes. sled's default is 1 GiB; a run mostly writes, and reads what it has just written.
const CACHE_BYTES: u64 = 64 << 20;
/// sled's data file.
const DATA_FILE: &str = "db";
/// How often and how long to wait for sled to let go of a store that this process has just closed: its threads may hold
/// the file for some milliseconds. Our own lock is held meanwhile, so no other process is waited for.
const REOPEN_TRIES: u32 = 5_000;
const REOPEN_PAUSE: Duration = Duration::from_millis(1);

/// One sled database of a store.
pub(crate) struct SledKeyValue {
    // Declared first, so that it is closed before the lock is let go.
    database: sled::Db,
    /// A second handle of sled's data file, for fdatasync.
    data: File,
    data_path: PathBuf,
    pub(crate) files: Arc<StoreFiles>,
}

impl SledKeyValue {
    /// Opens the database in a folder, or makes one there.
    pub(crate) fn open(files: Arc<StoreFiles>, folder: &Path) -> Result<Self> {
        let database = open_sled(folder).map_err(|error| match error {
            // The directory that people know, and not the folder inside it.
            StoreError::Damaged { detail, .. } => files.damaged(detail),
            other => other,
        })?;
        let data_path = folder.join(DATA_FILE);
        let data = File::open(&data_path).map_err(files.fail("open"))?;
        // sled has replaced its snapshot, and syncs files but no names: an old snapshot must not come back beside a newer
        // log.
        files.disk.sync_all(folder).map_err(files.fail("sync"))?;
        Ok(Self { database, data, data_path, files })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.database.is_empty()
    }

    /// Makes everything that was applied durable.
    pub(crate) fn flush(&self) -> Result<()> {
        // sled's flush hands everything to the kernel and ends in sync_file_range, which neither writes the file's new
        // length nor empties the disk's own cache.
        self.database.flush().map_err(self.fail("write"))?;
        self.files.disk.sync_data(&self.data, &self.data_path).map_err(self.files.fail("sync"))
    }

    fn fail(&self, action: &'static str) -> impl Fn(sled::Error) -> StoreError + '_ {
        move |error| sled_error(action, &self.files.dir, error)
    }
}

impl KeyValue for SledKeyValue {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.database.get(key).map_err(self.fail("read"))?.map(|value| value.to_vec()))
    }

    fn scan(&self, range: &KeyRange, visit: Visit<'_>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut entries = match &range.end {
            Some(end) => self.database.range(range.start.as_slice()..end.as_slice()),
            None => self.database.range(range.start.as_slice()..),
        };
        while let Some(entry) = if range.descending { entries.next_back() } else { entries.next() } {
            let (key, value) = entry.map_err(self.fail("read"))?;
            if visit(&key, &value)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, writes: Batch) -> Result<()> {
        let mut batch = sled::Batch::default();
        for (key, value) in writes {
            match value {
                Some(value) => batch.insert(key, value),
                None => batch.remove(key),
            }
        }
        self.database.apply_batch(batch).map_err(self.fail("write"))
    }

    fn sync(&self, commits: u64) -> Result<()> {
        self.flush()?;
        self.files.note_acknowledged(commits)
    }

    fn check_complete(&self, commits: u64) -> Result<()> {
        self.files.check_acknowledged(commits)
    }

    fn disk_bytes(&self) -> Result<Option<u64>> {
        self.database.size_on_disk().map(Some).map_err(self.fail("measure"))
    }
}

/// Opens sled, whose recovery panics on some kinds of damage. Its own settings were measured against others: segments of 2
/// and 8 MiB in place of 512 KiB make the slowest syncs four to seven times slower, because each write waits for a whole
/// one; without its flusher it is about a tenth faster and never moves what is live out of segments that are mostly dead.
fn open_sled(dir: &Path) -> Result<sled::Db> {
    let open = || sled::Config::default().path(dir).cache_capacity(CACHE_BYTES).open();
    let mut tries = 0;
    loop {
        match catch_unwind(AssertUnwindSafe(open)) {
            Ok(Ok(database)) => return Ok(database),
            Ok(Err(sled::Error::Io(error))) if is_locked(&error) && tries < REOPEN_TRIES => {
                tries += 1;
                std::thread::sleep(REOPEN_PAUSE);
            }
            Ok(Err(sled::Error::Io(error))) if is_locked(&error) => {
                return Err(StoreError::InUse { dir: dir.to_owned() });
            }
            Ok(Err(error)) => return Err(sled_error("open", dir, error)),
            Err(_) => {
                let detail = "its database could not be recovered".to_owned();
                return Err(StoreError::Damaged { dir: dir.to_owned(), detail });
            }
        }
    }
}

/// sled wraps the refusal of its file lock into an error of kind `Other` with this text.
fn is_locked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Other && error.to_string().contains("could not acquire lock")
}

pub(crate) fn sled_error(action: &'static str, dir: &Path, error: sled::Error) -> StoreError {
    match error {
        sled::Error::Io(error) => io_error(action, dir, error),
        other => StoreError::Damaged { dir: dir.to_owned(), detail: other.to_string() },
    }
}
