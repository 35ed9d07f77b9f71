//! The folder of a run: what is where, and how it is claimed.
//!
//! ```text
//! runs/rooms-seed0/
//!   config.toml        the config as it was resolved
//!   policy.json        hashes of the weights and the tokenizer that the run began with
//!   components/        every component that ran, by content hash: what replay runs again
//!   control/           requests of other processes: cancel this rollout, cancel all
//!   store/             rollouts, attempts and spans (sled)
//!   checkpoints/N/     state after unit and step N; the newest whole one counts
//!   policies/NAME/     weights at the end of each stage
//!   metrics.jsonl      one line per step, no wall-clock value in it: byte-identical for one config and seed
//!   trail.lz4          what each update used, for `fulgurite explain`
//!   timings.jsonl      wall-clock seconds of the same steps, and those in which the plugin computed
//!   tensorboard/       event files
//!   reward.svg         reward per update
//!   result.json        the final table
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use fulgurite_core::id::ContentHash;

/// Paths inside a run's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDirectory {
    root: PathBuf,
}

impl RunDirectory {
    /// The folder at `root`; nothing is made yet.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved config.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// What the policy began as.
    #[must_use]
    pub fn policy_record(&self) -> PathBuf {
        self.root.join("policy.json")
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Where other processes leave requests for the one that runs.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.root.join("control")
    }

    /// Components.
    #[must_use]
    pub fn components(&self) -> PathBuf {
        self.root.join("components")
    }

    /// Where the component with this content is kept.
    #[must_use]
    pub fn component(&self, hash: &ContentHash) -> PathBuf {
        self.components().join(format!("{hash}.wasm"))
    }

    /// Checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Final weights of a stage.
    #[must_use]
    pub fn policy(&self, name: &str) -> PathBuf {
        self.root.join("policies").join(name)
    }

    /// Metrics.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// What each update used.
    #[must_use]
    pub fn trail(&self) -> PathBuf {
        self.root.join("trail.lz4")
    }

    /// Timings.
    #[must_use]
    pub fn timings(&self) -> PathBuf {
        self.root.join("timings.jsonl")
    }

    /// TensorBoard events.
    #[must_use]
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The plot.
    #[must_use]
    pub fn plot(&self) -> PathBuf {
        self.root.join("reward.svg")
    }

    /// The final table.
    #[must_use]
    pub fn result(&self) -> PathBuf {
        self.root.join("result.json")
    }
}

/// Writes a file so that a crash leaves the old one or the new one, never a part.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_folder(path.parent())
}

/// Makes a folder appear whole under its final name.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn publish_folder(temporary: &Path, path: &Path) -> std::io::Result<()> {
    sync_folder(Some(temporary))?;
    if path.exists() {
        std::fs::remove_dir_all(path)?;
    }
    std::fs::rename(temporary, path)?;
    sync_folder(path.parent())
}

/// A fresh empty folder beside `path`, under a name that is never read.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn temporary_folder(path: &Path) -> std::io::Result<PathBuf> {
    let temporary = path.with_extension("tmp");
    if temporary.exists() {
        std::fs::remove_dir_all(&temporary)?;
    }
    std::fs::create_dir_all(&temporary)?;
    Ok(temporary)
}

fn sync_folder(folder: Option<&Path>) -> std::io::Result<()> {
    match folder.filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => std::fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
