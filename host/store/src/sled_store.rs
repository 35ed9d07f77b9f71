//! The store on one machine's disk, in sled.
//!
//! sled's recovery ends at the first damaged byte of its log and takes that for the end: a flipped bit would silently
//! cost everything that was acknowledged after it. Therefore the number of durable commits is also noted in a file of
//! its own, after each sync, and a database that comes back with fewer is refused. The note need not be synced itself:
//! it is only ever behind. Whoever wants to go on with what is left deletes that file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::codec;
use crate::delegate::delegate_to_ledger;
use crate::error::{Result, StoreError};
use crate::key_value::{Batch, KeyValue, Visit};
use crate::ledger::Ledger;

/// Version of everything below a store's directory. A store of another version is refused.
pub const SCHEMA_VERSION: u32 = 1;

/// Page cache in bytes. sled's default is 1 GiB; a run mostly writes, and reads what it has just written.
const CACHE_BYTES: u64 = 64 << 20;
/// Taken by whoever has the store open; sled's own lock gives no error that can be told from others.
const LOCK_FILE: &str = "lock";
/// The number of durable commits, and its complement.
const ACKNOWLEDGED_FILE: &str = "acknowledged";
const ACKNOWLEDGED_BYTES: usize = 16;
/// sled's data file.
const DATA_FILE: &str = "db";
/// How often and how long to wait for sled to let go of a store that this process has just closed: its threads may hold
/// the file for some milliseconds. Our own lock is held meanwhile, so no other process is waited for.
const REOPEN_TRIES: u32 = 1_000;
const REOPEN_PAUSE: Duration = Duration::from_millis(5);

/// A [`RolloutStore`](crate::RolloutStore) in a directory of its own, which one process opens at a time.
pub struct SledStore {
    ledger: Ledger<SledKeyValue>,
    dir: PathBuf,
}

impl SledStore {
    /// Opens the store in `dir`, or makes one there. What was durable is there again, whatever happened since.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it open; [`StoreError::Schema`] when another version wrote it;
    /// [`StoreError::NotAStore`] when the directory holds another sled database; [`StoreError::Damaged`] and
    /// [`StoreError::Corrupt`]; errors of the file system.
    pub fn open(dir: &Path) -> Result<Self> {
        let ledger = Ledger::open(SledKeyValue::open(dir)?)?;
        Ok(Self { ledger, dir: dir.to_owned() })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

delegate_to_ledger!(SledStore);

struct SledKeyValue {
    // Declared first, so that it is closed before the lock is let go.
    database: sled::Db,
    /// A second handle of sled's data file, for fdatasync.
    data: File,
    acknowledged: File,
    dir: PathBuf,
    _lock: File,
}

impl SledKeyValue {
    fn open(dir: &Path) -> Result<Self> {
        let fail = |action| move |error: io::Error| io_error(action, dir, error);
        std::fs::create_dir_all(dir).map_err(fail("create"))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join(LOCK_FILE))
            .map_err(fail("open"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(io_error("lock", dir, error)),
        }
        let acknowledged = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(dir.join(ACKNOWLEDGED_FILE))
            .map_err(fail("open"))?;
        let database = open_sled(dir)?;
        let data = File::open(dir.join(DATA_FILE)).map_err(fail("open"))?;
        let store = Self { database, data, acknowledged, dir: dir.to_owned(), _lock: lock };
        store.check_schema()?;
        Ok(store)
    }

    /// Refuses what another version wrote; marks a new store.
    fn check_schema(&self) -> Result<()> {
        let key = codec::schema_key();
        match KeyValue::get(self, &key)?.as_deref() {
            Some(&[a, b, c, d]) => {
                let found = u32::from_be_bytes([a, b, c, d]);
                if found == SCHEMA_VERSION {
                    Ok(())
                } else {
                    Err(StoreError::Schema { dir: self.dir.clone(), found, supported: SCHEMA_VERSION })
                }
            }
            Some(_) => Err(codec::corrupt(&key, "it is not a version number")),
            None if self.database.is_empty() => {
                // Empty because it is new, and not because it lost everything.
                self.check_complete(0)?;
                self.apply(vec![(key, SCHEMA_VERSION.to_be_bytes().to_vec())])?;
                self.sync(0)?;
                self.sync_new_files()
            }
            None => Err(StoreError::NotAStore { dir: self.dir.clone() }),
        }
    }

    /// Makes the names of a new store's files durable, and sled's small settings file, which it never syncs.
    fn sync_new_files(&self) -> Result<()> {
        let sync_all = || -> io::Result<()> {
            for entry in std::fs::read_dir(&self.dir)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&self.dir)?.sync_all()?;
            // A directory's own name is in its parent.
            match self.dir.canonicalize()?.parent() {
                Some(parent) => File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        sync_all().map_err(|error| io_error("sync", &self.dir, error))
    }

    fn damaged(&self, detail: String) -> StoreError {
        StoreError::Damaged { dir: self.dir.clone(), detail }
    }

    fn fail(&self, action: &'static str) -> impl Fn(sled::Error) -> StoreError + '_ {
        move |error| sled_error(action, &self.dir, error)
    }
}

impl KeyValue for SledKeyValue {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.database.get(key).map_err(self.fail("read"))?.map(|value| value.to_vec()))
    }

    fn scan(&self, prefix: &[u8], visit: Visit<'_>) -> Result<()> {
        for entry in self.database.scan_prefix(prefix) {
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
            batch.insert(key, value);
        }
        self.database.apply_batch(batch).map_err(self.fail("write"))
    }

    fn sync(&self, commits: u64) -> Result<()> {
        // sled's flush hands everything to the kernel and ends in sync_file_range, which neither writes the file's new
        // length nor empties the disk's own cache.
        self.database.flush().map_err(self.fail("write"))?;
        self.data.sync_data().map_err(|error| io_error("sync", &self.dir, error))?;
        let mut note = [0_u8; ACKNOWLEDGED_BYTES];
        note[..8].copy_from_slice(&commits.to_be_bytes());
        note[8..].copy_from_slice(&(!commits).to_be_bytes());
        // One sync at a time: the ledger holds a lock around it.
        let mut file = &self.acknowledged;
        let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&note));
        written.map_err(|error| io_error("write", &self.dir, error))
    }

    fn check_complete(&self, commits: u64) -> Result<()> {
        let length = self.acknowledged.metadata().map_err(|error| io_error("read", &self.dir, error))?.len();
        if length == 0 {
            // New: nothing was ever acknowledged.
            return Ok(());
        }
        let mut note = [0_u8; ACKNOWLEDGED_BYTES];
        let mut file = &self.acknowledged;
        let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut note));
        read.map_err(|error| io_error("read", &self.dir, error))?;
        let (number, complement) = note.split_at(8);
        let number = number.try_into().map_or(0, u64::from_be_bytes);
        let complement = complement.try_into().map_or(0, u64::from_be_bytes);
        if number != !complement {
            return Err(self.damaged(format!("its file `{ACKNOWLEDGED_FILE}` is unreadable")));
        }
        if number > commits {
            return Err(self.damaged(format!("only {commits} of {number} acknowledged commits are left")));
        }
        Ok(())
    }

    fn disk_bytes(&self) -> Result<Option<u64>> {
        self.database.size_on_disk().map(Some).map_err(self.fail("measure"))
    }
}

/// Opens sled, whose recovery panics on some kinds of damage.
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

fn io_error(action: &'static str, dir: &Path, error: io::Error) -> StoreError {
    StoreError::Io { action, dir: dir.to_owned(), source: Arc::new(error) }
}

fn sled_error(action: &'static str, dir: &Path, error: sled::Error) -> StoreError {
    match error {
        sled::Error::Io(error) => io_error(action, dir, error),
        other => StoreError::Damaged { dir: dir.to_owned(), detail: other.to_string() },
    }
}
