//! Finds the weights of a run from outside of it.

use std::path::{Path, PathBuf};

use crate::checkpoint::Checkpoints;
use crate::config::RunConfig;
use crate::error::TrainError;
use crate::run_directory::RunDirectory;

/// The newest weights of a run: of its last stage that has ended, else of its newest checkpoint. A folder that is not a run is
/// taken for one with weights, and handed back.
///
/// # Errors
/// When the run's config cannot be read, or it has no weights yet.
pub fn trained_weights(directory: &Path) -> Result<PathBuf, TrainError> {
    let run = RunDirectory::new(directory);
    if !run.config().is_file() {
        return Ok(directory.to_owned());
    }
    let config = RunConfig::of_run(&run)?;
    let ended = config.stage.iter().rev().map(|stage| run.policy(&stage.name)).find(|path| path.is_dir());
    let found = match ended {
        Some(path) => Some(path),
        None => Checkpoints::new(run.checkpoints(), config.checkpoint.keep).newest_folder()?,
    };
    found.ok_or_else(|| TrainError::NoWeights { path: directory.to_owned() })
}

/// The folder of the model that a run trains adapters over, as its config has it; the run may be named by a folder with weights
/// inside of it. `None` where it cannot be told, or there is none.
#[must_use]
pub fn trained_base(directory: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(directory).ok()?;
    // RUN, or RUN/policies/NAME, or RUN/checkpoints/N.
    let runs = [Some(absolute.as_path()), absolute.parent().and_then(Path::parent)];
    let run = runs.into_iter().flatten().map(RunDirectory::new).find(|run| run.config().is_file())?;
    RunConfig::of_run(&run).ok()?.policy.local?.model.directory
}
