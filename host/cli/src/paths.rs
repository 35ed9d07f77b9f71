//! Where things are kept.

use std::path::{Path, PathBuf};

use anyhow::anyhow;

use crate::failure::Failure;

/// Folder of compiled components: `$FULGURITE_CACHE_DIR`, else the user's cache folder; `None` when there is no home.
pub(crate) fn cache() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("FULGURITE_CACHE_DIR").filter(|folder| !folder.is_empty()) {
        return Some(PathBuf::from(folder));
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|base| base.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("fulgurite").join("components"))
}

/// Folder of models that were downloaded: `models` of `$FULGURITE_CACHE_DIR`, else of the user's cache folder.
pub(crate) fn models() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("FULGURITE_CACHE_DIR").filter(|folder| !folder.is_empty()) {
        return Some(PathBuf::from(folder).join("models"));
    }
    Some(cache()?.with_file_name("models"))
}

/// The run that is meant: the one given, or the newest under `runs/`.
pub(crate) fn existing_run(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let run = match given {
        Some(run) => run.to_path_buf(),
        None => newest_run().ok_or_else(|| {
            Failure::usage(anyhow!("there is no run under `runs/` here")).hint("name one by `--run DIR`")
        })?,
    };
    if run.join("store").is_dir() {
        Ok(run)
    } else {
        let problem = anyhow!("`{}` is not the folder of a run: it has no `store`", run.display());
        Err(Failure::usage(problem).hint("`fulgurite train` and `fulgurite run` print the folder they write"))
    }
}

fn newest_run() -> Option<PathBuf> {
    let entries = std::fs::read_dir("runs").ok()?;
    let runs = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let modified = path.join("config.toml").metadata().ok()?.modified().ok()?;
        Some((modified, path))
    });
    runs.max().map(|(_, path)| path)
}

/// The first folder of `base`, `base-2`, `base-3`, ... that is not there yet.
pub(crate) fn fresh(base: &Path) -> PathBuf {
    let name = base.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let numbered = |n: u64| if n == 1 { base.to_path_buf() } else { base.with_file_name(format!("{name}-{n}")) };
    (1..u64::MAX).map(numbered).find(|path| !path.exists()).unwrap_or_else(|| base.to_path_buf())
}
