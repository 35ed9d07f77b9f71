//! A disk that keeps after a power cut exactly what was synced: of a file the content at its last sync, of a folder the
//! names at its last sync. It can also stop at a chosen operation, as a machine does.
//!
//! What this shows: that our own order of syncs, renames and acknowledgements is right, and that none is missing. What it
//! cannot show: that a real disk keeps its word, and what sled's recovery makes of pages that reached the disk without a
//! sync, or in part. sled writes its file by itself, so the copy is taken where we sync it: of what sled had written by
//! then, everything is kept.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use super::files::Disk;

/// A file, whatever it is called. Numbers of deleted files come back, times of birth do not.
type Node = (u64, SystemTime);

#[derive(Debug, Clone, Copy)]
enum Named {
    File(Node),
    Folder,
}

#[derive(Debug, Default)]
struct Durable {
    content: BTreeMap<Node, Vec<u8>>,
    names: BTreeMap<PathBuf, BTreeMap<String, Named>>,
    operations: u64,
    data_syncs: u64,
    stop_before: Option<u64>,
}

#[derive(Debug, Default)]
pub(super) struct SimulatedDisk(Mutex<Durable>);

fn node(path: &Path) -> io::Result<Node> {
    let metadata = path.metadata()?;
    Ok((metadata.ino(), metadata.created()?))
}

impl Durable {
    fn operate(&mut self) -> io::Result<()> {
        if self.stop_before.is_some_and(|stop| self.operations >= stop) {
            return Err(io::Error::other("the machine has stopped"));
        }
        self.operations += 1;
        Ok(())
    }

    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        self.content.insert(node(path)?, std::fs::read(path)?);
        Ok(())
    }

    fn sync_folder(&mut self, path: &Path) -> io::Result<()> {
        let mut names = BTreeMap::new();
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            let named = if entry.file_type()?.is_dir() { Named::Folder } else { Named::File(node(&entry.path())?) };
            let name = entry.file_name().into_string().unwrap();
            if name.starts_with("snap.") {
                // sled syncs its snapshots by itself before it gives them this name.
                self.sync_file(&entry.path())?;
            }
            names.insert(name, named);
        }
        self.names.insert(path.to_owned(), names);
        Ok(())
    }

    fn adopt(&mut self, path: &Path) {
        if path.is_dir() {
            self.sync_folder(path).unwrap();
            for entry in std::fs::read_dir(path).unwrap() {
                self.adopt(&entry.unwrap().path());
            }
        } else {
            self.sync_file(path).unwrap();
        }
    }

    fn restore(&self, from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for (name, named) in self.names.get(from).into_iter().flatten() {
            match named {
                Named::Folder => self.restore(&from.join(name), &to.join(name)),
                Named::File(node) => {
                    std::fs::write(to.join(name), self.content.get(node).map_or(&[][..], Vec::as_slice)).unwrap();
                }
            }
        }
    }
}

impl SimulatedDisk {
    /// A disk on which everything in a folder is durable.
    pub(super) fn holding(folder: &Path) -> Self {
        let disk = Self::default();
        disk.0.lock().unwrap().adopt(folder);
        disk
    }

    /// The machine stops before this operation, counted from 0.
    pub(super) fn stop_before(&self, operation: u64) {
        self.0.lock().unwrap().stop_before = Some(operation);
    }

    /// Operations so far.
    pub(super) fn operations(&self) -> u64 {
        self.0.lock().unwrap().operations
    }

    /// Syncs of data files so far.
    pub(super) fn data_syncs(&self) -> u64 {
        self.0.lock().unwrap().data_syncs
    }

    /// What is left of a folder after a power cut.
    pub(super) fn after_power_cut(&self, folder: &Path, to: &Path) {
        self.0.lock().unwrap().restore(folder, to);
    }
}

impl Disk for SimulatedDisk {
    fn sync_data(&self, _file: &File, path: &Path) -> io::Result<()> {
        let mut durable = self.0.lock().unwrap();
        durable.operate()?;
        durable.data_syncs += 1;
        durable.sync_file(path)
    }

    fn sync_all(&self, path: &Path) -> io::Result<()> {
        let mut durable = self.0.lock().unwrap();
        durable.operate()?;
        if path.is_dir() { durable.sync_folder(path) } else { durable.sync_file(path) }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.lock().unwrap().operate()?;
        std::fs::rename(from, to)
    }
}
