//! Checkpoints: everything that the next step needs, committed by one rename.
//!
//! A checkpoint is a folder `checkpoints/N` with the policy's own files, the plugin's state and `progress.json`. It is
//! written under a temporary name, flushed, and renamed; so the highest number that exists is whole. What a crash leaves
//! of later steps (rollouts in the store, lines of metrics) is found again or cut off when the run resumes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::alarm::AlarmState;
use crate::dataset::Cursor;
use crate::host::CarriedBatch;
use crate::report::StageReport;
use crate::run_directory::{publish_folder, temporary_folder};

/// Where a run stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Units of the plan that are done.
    pub(crate) units_done: usize,
    /// Steps done of the unit under way.
    pub(crate) step: u64,
    /// Cursors of the unit's dataset, by split name.
    pub(crate) cursors: BTreeMap<String, Cursor>,
    /// Names of the unit's snapshots.
    pub(crate) snapshots: u64,
    /// Groups that the last steps of the unit have carried over to the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) carried: Vec<CarriedBatch>,
    /// Length of `metrics.jsonl` in bytes.
    pub(crate) metrics_bytes: u64,
    /// Length of `trail.lz4` in bytes.
    #[serde(default)]
    pub(crate) trail_bytes: u64,
    /// Alarms of the unit under way.
    #[serde(default, skip_serializing_if = "AlarmState::is_empty")]
    pub(crate) alarms: AlarmState,
    /// What the unit has used so far.
    pub(crate) totals: Totals,
    /// Reports of the units that are done.
    pub(crate) reports: Vec<StageReport>,
}

/// What a unit has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Rollouts.
    pub rollouts: u64,
    /// Rollouts that failed for reasons that are not the policy's.
    pub failed: u64,
    /// Tokens that went through a training step.
    pub tokens: u64,
    /// Tokens that its rollouts have drawn: those of a fork's ancestor are not the fork's.
    #[serde(default)]
    pub sampled_tokens: u64,
    /// Wall-clock seconds, over all processes that worked on it.
    pub seconds: f64,
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The disk refused.
    #[error("checkpoint `{path}`")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The content is not what this version writes.
    #[error("checkpoint `{path}` is damaged or of another version; remove that folder to go on from the one before it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A checkpoint that has been found.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoint {
    /// Its folder: the policy reads its own files there.
    pub(crate) path: PathBuf,
    /// Where the run stood.
    pub(crate) progress: Progress,
    /// The plugin's state; `None` between two units.
    pub(crate) plugin_state: Option<Vec<u8>>,
}

/// The checkpoints of a run.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

const PROGRESS: &str = "progress.json";
const PLUGIN_STATE: &str = "plugin.state";

impl Checkpoints {
    /// Those in `folder`, of which the newest `keep` stay.
    #[must_use]
    pub(crate) fn new(folder: PathBuf, keep: usize) -> Self {
        Self { folder, keep }
    }

    /// A folder to write the next checkpoint into.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn prepare(&self) -> Result<PathBuf, CheckpointError> {
        temporary_folder(&self.folder.join("next")).map_err(io(&self.folder))
    }

    /// Commits what has been written into the folder of [`Self::prepare`].
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn commit(
        &self,
        temporary: &Path,
        progress: &Progress,
        state: Option<&[u8]>,
    ) -> Result<(), CheckpointError> {
        let write = |name: &str, bytes: &[u8]| {
            let path = temporary.join(name);
            let written = std::fs::write(&path, bytes).and_then(|()| std::fs::File::open(&path)?.sync_all());
            written.map_err(io(&path))
        };
        let text = serde_json::to_vec_pretty(progress)
            .map_err(|source| CheckpointError::Damaged { path: temporary.join(PROGRESS), source })?;
        write(PROGRESS, &text)?;
        if let Some(state) = state {
            write(PLUGIN_STATE, state)?;
        }
        let numbers = self.numbers()?;
        let next = numbers.last().map_or(0, |last| last + 1);
        let path = self.folder.join(format!("{next:08}"));
        publish_folder(temporary, &path).map_err(io(&path))?;
        for old in numbers.iter().rev().skip(self.keep.saturating_sub(1)) {
            let path = self.folder.join(format!("{old:08}"));
            std::fs::remove_dir_all(&path).map_err(io(&path))?;
        }
        Ok(())
    }

    /// The newest checkpoint.
    ///
    /// # Errors
    /// When the disk refuses, or the newest checkpoint is not one of ours.
    pub(crate) fn newest(&self) -> Result<Option<Checkpoint>, CheckpointError> {
        let Some(path) = self.newest_folder()? else { return Ok(None) };
        let file = path.join(PROGRESS);
        let text = std::fs::read(&file).map_err(io(&file))?;
        let progress =
            serde_json::from_slice(&text).map_err(|source| CheckpointError::Damaged { path: file, source })?;
        let state = path.join(PLUGIN_STATE);
        let plugin_state = if state.exists() { Some(std::fs::read(&state).map_err(io(&state))?) } else { None };
        Ok(Some(Checkpoint { path, progress, plugin_state }))
    }

    /// The folder of the newest checkpoint.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn newest_folder(&self) -> Result<Option<PathBuf>, CheckpointError> {
        Ok(self.numbers()?.pop().map(|newest| self.folder.join(format!("{newest:08}"))))
    }

    fn numbers(&self) -> Result<Vec<u64>, CheckpointError> {
        if !self.folder.exists() {
            return Ok(vec![]);
        }
        let entries = std::fs::read_dir(&self.folder).map_err(io(&self.folder))?;
        let mut numbers = vec![];
        for entry in entries {
            let name = entry.map_err(io(&self.folder))?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_checkpoint_counts_and_old_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path().join("checkpoints"), 2);
        assert!(checkpoints.newest().unwrap().is_none());
        for step in 1..=4 {
            let temporary = checkpoints.prepare().unwrap();
            std::fs::write(temporary.join("weights"), [7]).unwrap();
            let progress = Progress { step, ..Progress::default() };
            checkpoints.commit(&temporary, &progress, Some(&[u8::try_from(step).unwrap()])).unwrap();
        }
        // A crash in the middle of the fifth:
        std::fs::write(checkpoints.prepare().unwrap().join("weights"), [9]).unwrap();
        let newest = checkpoints.newest().unwrap().unwrap();
        assert_eq!((newest.progress.step, newest.plugin_state), (4, Some(vec![4])));
        assert_eq!(std::fs::read(newest.path.join("weights")).unwrap(), [7]);
        assert_eq!(checkpoints.numbers().unwrap(), [2, 3]);
    }

    #[test]
    fn a_damaged_checkpoint_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path().to_path_buf(), 2);
        let temporary = checkpoints.prepare().unwrap();
        checkpoints.commit(&temporary, &Progress::default(), None).unwrap();
        std::fs::write(folder.path().join("00000000/progress.json"), "{").unwrap();
        assert!(checkpoints.newest().unwrap_err().to_string().contains("00000000/progress.json"));
    }
}
