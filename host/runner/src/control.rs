//! Requests from other processes: a run's store is open in one process at a time, so whoever wants a rollout cancelled leaves
//! a file in the run's `control` folder, and the process that runs takes it away when it has done what it says.
//!
//! A file `cancel-ID` cancels one rollout, live or queued; `cancel-all` cancels the live ones and begins no others.

use std::path::Path;

use fulgurite_core::id::RolloutId;

/// Prefix of the name of a request to cancel.
const CANCEL: &str = "cancel-";
/// What stands for all rollouts.
const ALL: &str = "all";

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Cancel one rollout.
    Cancel(RolloutId),
    /// Cancel all live rollouts and begin no others.
    CancelAll,
}

impl Request {
    fn file(&self) -> String {
        match self {
            // A rollout that is called `all` is reached by `id-all`.
            Self::Cancel(rollout) => format!("{CANCEL}id-{rollout}"),
            Self::CancelAll => format!("{CANCEL}{ALL}"),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        let what = name.strip_prefix(CANCEL)?;
        match what.strip_prefix("id-") {
            Some(rollout) => RolloutId::new(rollout).ok().map(Self::Cancel),
            None => (what == ALL).then_some(Self::CancelAll),
        }
    }

    /// Leaves the request for the process that runs.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn leave(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join(self.file()), [])
    }

    /// Whether nobody has taken it yet.
    #[must_use]
    pub fn is_open(&self, folder: &Path) -> bool {
        folder.join(self.file()).exists()
    }

    /// Takes the request back, or takes it away when it is done.
    pub fn remove(&self, folder: &Path) {
        // Somebody else may have been faster.
        let _ = std::fs::remove_file(folder.join(self.file()));
    }
}

/// The requests that are there, in order of their names. A folder that is not there has none.
#[must_use]
pub fn requests(folder: &Path) -> Vec<Request> {
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names.iter().filter_map(|name| Request::parse(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_left_found_and_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("control");
        assert!(requests(&folder).is_empty());
        let one = Request::Cancel(RolloutId::new("all").unwrap());
        one.leave(&folder).unwrap();
        Request::CancelAll.leave(&folder).unwrap();
        std::fs::write(folder.join("cancel-id-no such id"), []).unwrap();
        std::fs::write(folder.join("something else"), []).unwrap();
        assert_eq!(requests(&folder), [Request::CancelAll, one.clone()]);
        assert!(one.is_open(&folder));
        one.remove(&folder);
        assert_eq!(requests(&folder), [Request::CancelAll]);
    }
}
