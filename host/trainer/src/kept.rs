//! Components that a run keeps under their content hash, so that what ran can run again.

use std::path::{Path, PathBuf};

use fulgurite_core::id::ContentHash;

use crate::run_directory::{RunDirectory, write_atomically};

/// Why a kept component cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// It cannot be read.
    #[error("cannot read the kept component `{path}`; copy the file that ran to there, or `{again}` with it: that keeps it anew", again = AGAIN)]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is another one than the one that ran.
    #[error(
        "`{path}` is not the component that ran: the hash of its content is {found} and must be the one in its name; replace \
         it by the file that ran, or `{again}` with that file: that keeps it anew", again = AGAIN
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// The hash of its content.
        found: ContentHash,
    },
}

const AGAIN: &str = "fulgurite run CONFIG --run DIR";

/// Finds what ran by its hash, and checks that it is that.
///
/// # Errors
/// When it is not there, or is something else.
pub(crate) fn kept_component(run: &RunDirectory, hash: &ContentHash) -> Result<PathBuf, KeptError> {
    let path = run.component(hash);
    let bytes = std::fs::read(&path).map_err(|source| KeptError::Read { path: path.clone(), source })?;
    let found = ContentHash::of(&bytes);
    if found == *hash { Ok(path) } else { Err(KeptError::Changed { path, found }) }
}

/// The same, or the component that a config names when that is the one that ran and nothing is kept.
///
/// # Errors
/// As [`kept_component`].
pub(crate) fn kept_or_named(run: &RunDirectory, hash: &ContentHash, named: &Path) -> Result<PathBuf, KeptError> {
    match kept_component(run, hash) {
        Err(KeptError::Read { .. }) if has_hash(named, hash) => Ok(named.to_owned()),
        kept => kept,
    }
}

fn has_hash(path: &Path, hash: &ContentHash) -> bool {
    std::fs::read(path).is_ok_and(|bytes| ContentHash::of(&bytes) == *hash)
}

/// Keeps a copy of a component under its content hash, with the manifest beside it when there is one. A copy that is
/// damaged is replaced.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn keep_component(run: &RunDirectory, component: &Path, hash: &ContentHash) -> std::io::Result<()> {
    let kept = run.component(hash);
    if component == kept {
        return Ok(());
    }
    std::fs::create_dir_all(run.components())?;
    if !has_hash(&kept, hash) {
        write_atomically(&kept, &std::fs::read(component)?)?;
    }
    let manifest = |component: &Path| component.with_extension("manifest.json");
    match std::fs::read(manifest(component)) {
        Ok(text) => write_atomically(&manifest(&kept), &text),
        Err(_) => Ok(()),
    }
}
