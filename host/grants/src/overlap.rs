//! Places that no grant may touch: the cache of compiled code, which is trusted; stores and run folders, which hold what
//! plugins must not see and what must not change.

use std::path::{Path, PathBuf};

/// A place that no grant may touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarded {
    /// For people: `the cache folder`.
    pub what: &'static str,
    /// Where. It need not be there yet.
    pub path: PathBuf,
}

/// A grant that touches one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{granted}` overlaps {what} `{guarded}`; grant another place, or move what is there")]
pub struct Overlap {
    /// What was granted.
    pub granted: PathBuf,
    /// What it touches, for people.
    pub what: &'static str,
    /// Where that is.
    pub guarded: PathBuf,
}

/// Checks that neither of the two contains the other.
///
/// # Errors
/// When one does.
pub fn check_overlap(granted: &Path, guarded: &[Guarded]) -> Result<(), Overlap> {
    let place = real(granted);
    for guard in guarded {
        let guarded = real(&guard.path);
        if place.starts_with(&guarded) || guarded.starts_with(&place) {
            return Err(Overlap { granted: granted.to_owned(), what: guard.what, guarded: guard.path.clone() });
        }
    }
    match place.ancestors().find(|folder| is_run_folder(folder)) {
        Some(run) => {
            Err(Overlap { granted: granted.to_owned(), what: "the folder of a run,", guarded: run.to_owned() })
        }
        None => Ok(()),
    }
}

/// The path without links, as far as it is there.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut rest = vec![];
    for folder in path.ancestors() {
        if let Ok(mut found) = folder.canonicalize() {
            found.extend(rest.iter().rev());
            return found;
        }
        rest.extend(folder.file_name());
    }
    path
}

/// Whether a folder looks like that of a run: a config and a store.
pub(crate) fn is_run_folder(path: &Path) -> bool {
    path.join("config.toml").is_file() && path.join("store").is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_may_contain_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["data/docs", "run/store", "docs"] {
            std::fs::create_dir_all(at(name)).unwrap();
        }
        std::fs::write(at("data/db.sqlite"), "").unwrap();
        let guarded = [Guarded { what: "the cache folder", path: at("data/cache") }];
        let check = |name: &str| check_overlap(&at(name), &guarded);
        assert_eq!(check("data/docs"), Ok(()));
        assert_eq!(check("data/db.sqlite"), Ok(()));
        for name in ["data", "", "data/cache", "data/cache/deep/er", "data/docs/../cache"] {
            let text = check(name).unwrap_err().to_string();
            assert!(text.contains("the cache folder"), "{name}: {text}");
        }
        assert_eq!(check("docs"), Ok(()));
        std::fs::write(at("run/config.toml"), "").unwrap();
        assert!(check("run/store").unwrap_err().to_string().contains("of a run"));
    }

    #[cfg(unix)]
    #[test]
    fn links_hide_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("cache/code")).unwrap();
        std::os::unix::fs::symlink(at("cache/code"), at("docs")).unwrap();
        let guarded = [Guarded { what: "the cache folder", path: at("cache") }];
        assert!(check_overlap(&at("docs"), &guarded).is_err());
    }
}
