//! The files of a store's directory.
//!
//! | name | what |
//! |---|---|
//! | `lock` | taken by whoever has the store open; sled's own lock gives no error that can be told from others |
//! | `acknowledged` | the number of durable commits, and its complement |
//! | `current` | the name of the folder with the database |
//! | `data-N` | a database; all but the current one are leftovers |
//!
//! A new database (migration, compaction, import) is written beside the current one, read back, and becomes current by one
//! rename of the pointer. A crash before that leaves the old one and a leftover, a crash after it the new one and a
//! leftover; opening removes leftovers. Renaming whole folders was rejected: exchanging two folders in one step is not
//! portable, and between two renames there is no store.
//!
//! `acknowledged` stays where schema 1 had it, and is never 0 in a store that exists: a Fulgurite that only knows
//! schema 1, and looks for its database right here, then finds that commits are missing and does not take the directory
//! for a new store.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::io_error;
use crate::error::{Result, StoreError};

const LOCK_FILE: &str = "lock";
const ACKNOWLEDGED_FILE: &str = "acknowledged";
const ACKNOWLEDGED_BYTES: usize = 16;
const CURRENT_FILE: &str = "current";
const CURRENT_NEXT_FILE: &str = "current.next";
const DATA_PREFIX: &str = "data-";
/// What sled makes in its folder, and what schema 1 had right in the store's directory.
const SLED_FILES: [&str; 3] = ["db", "conf", "blobs"];
const SLED_SNAPSHOT_PREFIX: &str = "snap.";

/// What reaches the disk, and in which order. A trait, so that a test can count it, stop it at any point, and give back
/// after a power cut only what was synced.
pub(crate) trait Disk: Send + Sync {
    /// Makes the content of an open file durable.
    fn sync_data(&self, file: &File, path: &Path) -> io::Result<()>;
    /// Makes a file, or the names in a folder, durable.
    fn sync_all(&self, path: &Path) -> io::Result<()>;
    /// Renames a file over another one.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
}

/// The machine's disk.
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn sync_data(&self, file: &File, _path: &Path) -> io::Result<()> {
        file.sync_data()
    }

    fn sync_all(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }
}

/// A store's directory, locked.
pub(crate) struct StoreFiles {
    pub(crate) dir: PathBuf,
    pub(crate) disk: Arc<dyn Disk>,
    acknowledged: File,
    _lock: File,
}

/// Which database a directory has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layout {
    /// None yet.
    Empty,
    /// That of schema 1, or of somebody else, right in the directory.
    InPlace,
    /// The folder that `current` names.
    Generation(u64),
}

impl StoreFiles {
    /// Makes the directory where there is none, and locks it.
    pub(crate) fn lock(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        let fail = |action| move |error: io::Error| io_error(action, dir, error);
        std::fs::create_dir_all(dir).map_err(fail("create"))?;
        let open = |name: &str| {
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true).open(dir.join(name)).map_err(fail("open"))
        };
        let lock = open(LOCK_FILE)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(io_error("lock", dir, error)),
        }
        Ok(Self { dir: dir.to_owned(), disk, acknowledged: open(ACKNOWLEDGED_FILE)?, _lock: lock })
    }

    pub(crate) fn fail(&self, action: &'static str) -> impl Fn(io::Error) -> StoreError + '_ {
        move |error| io_error(action, &self.dir, error)
    }

    pub(crate) fn damaged(&self, detail: impl Into<String>) -> StoreError {
        StoreError::Damaged { dir: self.dir.clone(), detail: detail.into() }
    }

    /// Which database is there.
    pub(crate) fn layout(&self) -> Result<Layout> {
        match std::fs::read_to_string(self.dir.join(CURRENT_FILE)) {
            Ok(text) => {
                let number = text.trim_end().strip_prefix(DATA_PREFIX).and_then(|number| number.parse().ok());
                let unreadable = || self.damaged(format!("its file `{CURRENT_FILE}` does not name a database"));
                Ok(Layout::Generation(number.ok_or_else(unreadable)?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let in_place = self.dir.join("db").try_exists().map_err(self.fail("read"))?;
                Ok(if in_place { Layout::InPlace } else { Layout::Empty })
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(self.damaged(format!("its file `{CURRENT_FILE}` does not name a database")))
            }
            Err(error) => Err(io_error("read", &self.dir, error)),
        }
    }

    /// Folder of a database.
    pub(crate) fn generation(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{DATA_PREFIX}{number}"))
    }

    /// Makes everything in a database's folder durable, names included.
    pub(crate) fn sync_generation(&self, number: u64) -> Result<()> {
        let sync_all = |folder: &Path| -> io::Result<()> {
            for entry in std::fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    for inner in std::fs::read_dir(entry.path())? {
                        self.disk.sync_all(&inner?.path())?;
                    }
                }
                self.disk.sync_all(&entry.path())?;
            }
            self.disk.sync_all(folder)
        };
        sync_all(&self.generation(number)).map_err(self.fail("sync"))
    }

    /// Makes a database, all of which is durable, the current one.
    pub(crate) fn make_current(&self, number: u64) -> Result<()> {
        let next = self.dir.join(CURRENT_NEXT_FILE);
        let point = || -> io::Result<()> {
            // The folder's own name must be there before anything points at it.
            self.disk.sync_all(&self.dir)?;
            std::fs::write(&next, format!("{DATA_PREFIX}{number}\n"))?;
            self.disk.sync_all(&next)?;
            self.disk.rename(&next, &self.dir.join(CURRENT_FILE))?;
            self.disk.sync_all(&self.dir)?;
            // A directory's own name is in its parent.
            match self.dir.canonicalize()?.parent() {
                Some(parent) => self.disk.sync_all(parent),
                None => Ok(()),
            }
        };
        point().map_err(self.fail("switch"))
    }

    /// Removes what a crash, or a switch of databases, has left behind. What cannot be removed costs space only, and is
    /// tried again next time.
    pub(crate) fn remove_leftovers(&self, current: u64) {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return };
        for entry in entries.filter_map(std::result::Result::ok) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let old_database = name
                .strip_prefix(DATA_PREFIX)
                .is_some_and(|number| number.parse().is_ok_and(|number: u64| number != current));
            let of_schema_1 = SLED_FILES.contains(&name.as_str()) || name.starts_with(SLED_SNAPSHOT_PREFIX);
            if old_database || of_schema_1 || name == CURRENT_NEXT_FILE {
                let path = entry.path();
                let _stays = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            }
        }
    }

    /// Notes how many commits are durable. The note need not be synced itself: it is only ever behind.
    pub(crate) fn note_acknowledged(&self, commits: u64) -> Result<()> {
        let mut note = [0_u8; ACKNOWLEDGED_BYTES];
        note[..8].copy_from_slice(&commits.to_be_bytes());
        note[8..].copy_from_slice(&(!commits).to_be_bytes());
        // One sync at a time: the ledger holds a lock around it.
        let mut file = &self.acknowledged;
        file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&note)).map_err(self.fail("write"))
    }

    /// Checks that a database that holds `commits` commits has lost none of those noted.
    pub(crate) fn check_acknowledged(&self, commits: u64) -> Result<()> {
        if self.acknowledged.metadata().map_err(self.fail("read"))?.len() == 0 {
            // New: nothing was ever acknowledged.
            return Ok(());
        }
        let mut note = [0_u8; ACKNOWLEDGED_BYTES];
        let mut file = &self.acknowledged;
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut note)).map_err(self.fail("read"))?;
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
}

/// Size of all files below a folder in bytes.
pub(crate) fn folder_bytes(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // sled replaces files while it works.
        let size = if entry.file_type()?.is_dir() {
            folder_bytes(&entry.path())
        } else {
            entry.metadata().map(|metadata| metadata.len())
        };
        match size {
            Ok(size) => bytes += size,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}
