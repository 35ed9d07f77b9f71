//! The store on one machine's disk, in sled.
//!
//! sled's recovery ends at the first damaged byte of its log and takes that for the end: a flipped bit would silently
//! cost everything that was acknowledged after it. Therefore the number of durable commits is also noted in a file of
//! its own, after each sync, and a database that comes back with fewer is refused. Whoever wants to go on with what is
//! left deletes that file. [`files`] says what else is in the directory.

mod compact;
mod database;
mod files;
mod rewrite;
#[cfg(test)]
mod simulated_disk;
#[cfg(test)]
mod tests;

use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::database::SledKeyValue;
pub(crate) use self::database::sled_error;
use self::files::{Disk, Layout, RealDisk, StoreFiles};
pub use self::rewrite::Progress;
pub(crate) use self::rewrite::{KEYS_PER_PROGRESS, Writer};
use crate::check;
use crate::codec;
use crate::delegate::delegate_to_ledger;
use crate::error::{Result, StoreError};
use crate::jsonl::Importer;
use crate::key_value::KeyValue;
use crate::keys;
use crate::ledger::{Counters, Ledger, first_records};
use crate::migrate;
use crate::records::{CompactReport, Finding, TransferReport};

/// Version of everything below a store's directory. A store of an older version is migrated when it is opened, one of a
/// newer version is refused.
pub const SCHEMA_VERSION: u32 = 5;
/// The oldest schema whose records this one reads as they are: later ones only added cases behind others, which older
/// programs cannot read. 3 added sampling with penalty, bias and stop tokens, and completions with several versions; 4 completions
/// that were left while they were drawn, and kept tokens; 5 which of several models drew a completion.
pub(crate) const SCHEMA_READABLE: u32 = 2;

/// A [`RolloutStore`](crate::RolloutStore) in a directory of its own, which one process opens at a time.
pub struct SledStore {
    ledger: Ledger<SledKeyValue>,
    dir: PathBuf,
}

impl SledStore {
    /// Opens the store in `dir`, or makes one there. What was durable is there again, whatever happened since. A store
    /// that an older Fulgurite wrote is first brought to this version; a crash meanwhile leaves the old or the new one.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it open; [`StoreError::Schema`] when a newer version wrote it;
    /// [`StoreError::NotAStore`] when the directory holds another sled database; [`StoreError::Damaged`] and
    /// [`StoreError::Corrupt`]; errors of the file system.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_on(dir, Arc::new(RealDisk))
    }

    fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        let database = open_database(&Arc::new(StoreFiles::lock(dir, disk)?))?;
        Ok(Self { ledger: Ledger::open(database)?, dir: dir.to_owned() })
    }

    /// Rewrites the store in `dir` into as little space as sled allows; `progress` hears how many records are done. A crash
    /// meanwhile leaves the old or the new one. For the time of it, both are there.
    ///
    /// # Errors
    /// As [`open`](Self::open): nobody else may have it open, and everything in it must be readable. The old one stays
    /// then.
    pub fn compact(dir: &Path, progress: Progress<'_>) -> Result<CompactReport> {
        compact::run(&Arc::new(StoreFiles::lock(dir, Arc::new(RealDisk))?), progress)
    }

    /// Makes a store in `dir` out of lines that [`export`](crate::RolloutStore::export) has written; `name` is what errors
    /// call the file, and `progress` hears how many records are done. Every line is checked, and the whole is checked
    /// before it becomes the store: on an error, or a crash, the directory is as it was.
    ///
    /// # Errors
    /// [`StoreError::Import`] names the line that is wrong; [`StoreError::NotEmpty`] when the store there is not empty; as
    /// [`open`](Self::open).
    pub fn import(dir: &Path, from: &mut dyn BufRead, name: &str, progress: Progress<'_>) -> Result<TransferReport> {
        let files = Arc::new(StoreFiles::lock(dir, Arc::new(RealDisk))?);
        let (number, commits) = match files.layout()? {
            Layout::Empty => {
                files.check_acknowledged(0)?;
                (1, 0)
            }
            Layout::InPlace | Layout::Generation(_) => {
                let old = open_database(&files)?;
                let Layout::Generation(number) = files.layout()? else {
                    return Err(files.damaged("it has no current database"));
                };
                let counters: Counters = codec::get(&old, &keys::counters_key())?.unwrap_or_default();
                if counters != (Counters { commits: counters.commits, ..Counters::default() }) {
                    return Err(StoreError::NotEmpty { dir: dir.to_owned() });
                }
                files.check_acknowledged(counters.commits)?;
                (number + 1, counters.commits)
            }
        };
        let mut report = TransferReport::default();
        let fill = |writer: &mut Writer<'_>| {
            report = Importer::new(commits).run(from, name, writer)?;
            Ok(())
        };
        let verify = |database: &SledKeyValue| match check::run(database, &mut |_| {})?.findings.first() {
            // Each line was right, so this would be our own mistake.
            Some(Finding { record, problem }) => Err(files.damaged(format!("after the import, {record}: {problem}"))),
            None => Ok(()),
        };
        let database = rewrite::replace(&files, number, progress, fill, verify)?;
        database.sync(commits + 1)?;
        Ok(report)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

delegate_to_ledger!(SledStore);

/// Opens the current database of a directory, after making or migrating it where that is needed.
fn open_database(files: &Arc<StoreFiles>) -> Result<SledKeyValue> {
    match files.layout()? {
        Layout::Generation(number) => {
            files.remove_leftovers(number);
            let folder = files.generation(number);
            if !folder.is_dir() {
                return Err(files.damaged(format!("its database `{}` is gone", folder.display())));
            }
            let database = SledKeyValue::open(Arc::clone(files), &folder)?;
            match schema(&database)? {
                Some(SCHEMA_VERSION) => Ok(database),
                Some(SCHEMA_READABLE..SCHEMA_VERSION) => {
                    // Before anything is written that an older program could not read.
                    database.apply(vec![(keys::schema_key(), Some(SCHEMA_VERSION.to_be_bytes().to_vec()))])?;
                    database.flush()?;
                    Ok(database)
                }
                Some(found) => Err(other_schema(files, found)),
                None => {
                    files.check_acknowledged(0)?;
                    Err(files.damaged("its database is empty"))
                }
            }
        }
        Layout::InPlace => {
            let old = SledKeyValue::open(Arc::clone(files), &files.dir)?;
            match schema(&old)? {
                Some(1) => migrate_from_1(files, old),
                Some(found) => Err(other_schema(files, found)),
                None if old.is_empty() => {
                    // Empty because it is new, and not because it lost everything.
                    files.check_acknowledged(0)?;
                    drop(old);
                    make_new(files)
                }
                None => Err(StoreError::NotAStore { dir: files.dir.clone() }),
            }
        }
        Layout::Empty => {
            files.check_acknowledged(0)?;
            make_new(files)
        }
    }
}

fn other_schema(files: &StoreFiles, found: u32) -> StoreError {
    StoreError::Schema { dir: files.dir.clone(), found, supported: SCHEMA_VERSION }
}

/// The schema that a database was written with.
fn schema(database: &SledKeyValue) -> Result<Option<u32>> {
    let key = keys::schema_key();
    match database.get(&key)?.as_deref() {
        Some(&[a, b, c, d]) => Ok(Some(u32::from_be_bytes([a, b, c, d]))),
        Some(_) => Err(codec::corrupt(&key, "it is not a version number")),
        None => Ok(None),
    }
}

/// Starts the first database of a directory. It has one commit, so that its note is never 0.
fn make_new(files: &Arc<StoreFiles>) -> Result<SledKeyValue> {
    let counters = Counters::first();
    let first = first_records(&counters)?;
    let database = rewrite::replace(files, 1, &mut |_| {}, |writer| writer.put_all(first), |_| Ok(()))?;
    files.note_acknowledged(counters.commits)?;
    Ok(database)
}

fn migrate_from_1(files: &Arc<StoreFiles>, old: SledKeyValue) -> Result<SledKeyValue> {
    files.check_acknowledged(migrate::v1::commits(&old)?)?;
    let new = rewrite::replace(files, 1, &mut |_| {}, |writer| migrate::v1::convert(&old, writer), |_| Ok(()))?;
    // The old files have gone from the directory; this closes what is left of them.
    drop(old);
    Ok(new)
}

fn io_error(action: &'static str, dir: &Path, error: io::Error) -> StoreError {
    StoreError::Io { action, dir: dir.to_owned(), source: Arc::new(error) }
}
