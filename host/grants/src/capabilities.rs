//! All that a tool is granted, opened when a run starts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_core::grant::{Capability, ToolGrants};
use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;

use crate::folder::{FolderError, PinnedFolder};
use crate::http_client::{HttpClient, HttpSetupError};
use crate::overlap::{Guarded, Overlap, check_overlap};
use crate::record::GrantRecord;
use crate::sqlite::{Snapshot, SnapshotError};

/// Why a grant cannot be given. `field` is its place in the config.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// A folder cannot be pinned.
    #[error("`{field}`")]
    Folder {
        /// The field.
        field: String,
        /// Why.
        #[source]
        source: FolderError,
    },
    /// A database cannot be read.
    #[error("`{field}`")]
    Sqlite {
        /// The field.
        field: String,
        /// Why.
        #[source]
        source: SnapshotError,
    },
    /// A server cannot be spoken to.
    #[error("`{field}`")]
    Http {
        /// The field.
        field: String,
        /// Why.
        #[source]
        source: HttpSetupError,
    },
    /// It touches what no plugin may touch.
    #[error("`{field}`")]
    Overlap {
        /// The field.
        field: String,
        /// With what.
        #[source]
        source: Overlap,
    },
    /// A record that cannot be read.
    #[error("the record of what `{plugin}` was granted cannot be read")]
    Record {
        /// The plugin.
        plugin: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Nobody says any more where it is.
    #[error(
        "`{field}`: it was granted when the rollout was recorded, and the run's config does not say any more where it is; put \
         the line back into the run's config.toml"
    )]
    Gone {
        /// The field.
        field: String,
    },
    /// It is not what the recorded rollout had.
    #[error(
        "`{field}`: `{path}` has changed since the rollout was recorded: the hash of its content was {recorded}, and is {found}; \
         put back what it held then"
    )]
    Changed {
        /// The field.
        field: String,
        /// The folder or the database.
        path: PathBuf,
        /// Its hash when the rollout was recorded.
        recorded: ContentHash,
        /// Its hash now.
        found: ContentHash,
    },
}

/// What a tool is granted. One for the whole run, shared by all its rollouts.
#[derive(Debug)]
pub struct ToolCapabilities {
    plugin: String,
    granted: BTreeSet<(Capability, String)>,
    folders: BTreeMap<String, Arc<PinnedFolder>>,
    http: HttpClient,
    sqlite: BTreeMap<String, Arc<Snapshot>>,
    record: String,
}

impl ToolCapabilities {
    /// Nothing, for the plugin at this place of the config (`tools.NAME`).
    #[must_use]
    pub fn none(plugin: &str) -> Self {
        Self {
            plugin: plugin.to_owned(),
            granted: BTreeSet::new(),
            folders: BTreeMap::new(),
            http: HttpClient::none(plugin),
            sqlite: BTreeMap::new(),
            record: "{}".to_owned(),
        }
    }

    /// Opens what a config grants: pins folders, reads databases, looks up secrets by `environment`. Paths are absolute;
    /// those in `guarded` may not be touched. Blocks.
    ///
    /// # Errors
    /// See [`CapabilityError`].
    pub fn open(
        plugin: &str,
        grants: &ToolGrants,
        limits: &Limits,
        guarded: &[Guarded],
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, CapabilityError> {
        let checked = |field: String, path: &PathBuf| match check_overlap(path, guarded) {
            Ok(()) => Ok(field),
            Err(source) => Err(CapabilityError::Overlap { field, source }),
        };
        let mut folders = BTreeMap::new();
        for (name, path) in &grants.folders {
            let field = checked(format!("{plugin}.grants.folders.{name}"), path)?;
            let pinned = PinnedFolder::pin(path, limits).map_err(|source| CapabilityError::Folder { field, source })?;
            folders.insert(name.clone(), Arc::new(pinned));
        }
        let mut sqlite = BTreeMap::new();
        for (name, path) in &grants.sqlite {
            let field = checked(format!("{plugin}.grants.sqlite.{name}"), path)?;
            let snapshot = Snapshot::load(path, limits).map_err(|source| CapabilityError::Sqlite { field, source })?;
            sqlite.insert(name.clone(), Arc::new(snapshot));
        }
        let http = HttpClient::new(plugin, &grants.http, environment)
            .map_err(|source| CapabilityError::Http { field: format!("{plugin}.grants.http"), source })?;
        let hashes = folders.iter().map(|(name, folder)| (name.clone(), folder.tree_hash())).collect();
        let snapshots = sqlite.iter().map(|(name, snapshot)| (name.clone(), snapshot.hash())).collect();
        let record = serde_json::to_string(&GrantRecord::new(grants, hashes, snapshots)).unwrap_or_default();
        Ok(Self { plugin: plugin.to_owned(), granted: grants.granted(), folders, http, sqlite, record })
    }

    /// Opens again what a recorded rollout had: `record` is [`ToolCapabilities::record`] of then, `grants` says where things
    /// are now. Folders and databases must hold what they held. No request is ever sent: what servers answered is in the
    /// recording, and their secrets are not needed. Blocks.
    ///
    /// Places that no plugin may touch need no second look: what has the hash of then was allowed then.
    ///
    /// # Errors
    /// See [`CapabilityError`].
    pub fn recorded(plugin: &str, record: &str, grants: &ToolGrants, limits: &Limits) -> Result<Self, CapabilityError> {
        let read = |source| CapabilityError::Record { plugin: plugin.to_owned(), source };
        let recorded: GrantRecord = serde_json::from_str(record).map_err(read)?;
        let mut folders = BTreeMap::new();
        for (name, hash) in &recorded.folders {
            let field = format!("{plugin}.grants.folders.{name}");
            let Some(path) = grants.folders.get(name) else { return Err(CapabilityError::Gone { field }) };
            let pinned = PinnedFolder::pin(path, limits)
                .map_err(|source| CapabilityError::Folder { field: field.clone(), source })?;
            unchanged(field, path, *hash, pinned.tree_hash())?;
            folders.insert(name.clone(), Arc::new(pinned));
        }
        let mut sqlite = BTreeMap::new();
        for (name, hash) in &recorded.sqlite {
            let field = format!("{plugin}.grants.sqlite.{name}");
            let Some(path) = grants.sqlite.get(name) else { return Err(CapabilityError::Gone { field }) };
            let snapshot = Snapshot::load(path, limits)
                .map_err(|source| CapabilityError::Sqlite { field: field.clone(), source })?;
            unchanged(field, path, *hash, snapshot.hash())?;
            sqlite.insert(name.clone(), Arc::new(snapshot));
        }
        Ok(Self {
            plugin: plugin.to_owned(),
            granted: recorded.granted(),
            folders,
            http: HttpClient::none(plugin),
            sqlite,
            record: record.to_owned(),
        })
    }

    /// The plugin's place in the config.
    #[must_use]
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// What is granted, as a manifest is compared with it.
    #[must_use]
    pub fn granted(&self) -> &BTreeSet<(Capability, String)> {
        &self.granted
    }

    /// Folders by name, in order.
    #[must_use]
    pub fn folders(&self) -> &BTreeMap<String, Arc<PinnedFolder>> {
        &self.folders
    }

    /// The client for its servers.
    #[must_use]
    pub fn http(&self) -> &HttpClient {
        &self.http
    }

    /// A database.
    #[must_use]
    pub fn snapshot(&self, name: &str) -> Option<&Arc<Snapshot>> {
        self.sqlite.get(name)
    }

    /// What is granted, for the record of a run: JSON text with the hashes of folders and databases, and names of headers
    /// without their values.
    #[must_use]
    pub fn record(&self) -> &str {
        &self.record
    }
}

fn unchanged(
    field: String,
    path: &std::path::Path,
    recorded: ContentHash,
    found: ContentHash,
) -> Result<(), CapabilityError> {
    if recorded == found {
        return Ok(());
    }
    Err(CapabilityError::Changed { field, path: path.to_owned(), recorded, found })
}

/// Whether the record of a tool's grants needs a config that says where folders and databases are.
#[must_use]
pub fn needs_places(record: &str) -> bool {
    serde_json::from_str::<GrantRecord>(record)
        .is_ok_and(|record| !record.folders.is_empty() || !record.sqlite.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(toml: serde_json::Value) -> ToolGrants {
        serde_json::from_value(toml).unwrap()
    }

    #[test]
    fn the_record_has_hashes_and_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("docs")).unwrap();
        std::fs::write(folder.path().join("db"), "").unwrap();
        let grants = grants(serde_json::json!({
            "folders": {"docs": folder.path().join("docs")},
            "sqlite": {"shop": folder.path().join("db")},
            "http": [{"origin": "https://a.example", "headers": {"x-key": {"env": "KEY"}}, "allow_private": ["10.0.0.0/8"]}],
        }));
        let open = |guarded: &[Guarded]| {
            ToolCapabilities::open("tools.t", &grants, &Limits::default(), guarded, &|_| {
                Some("s3cr3t-key-value".into())
            })
        };
        let open_one = open(&[]).unwrap();
        assert_eq!(open_one.granted().len(), 3);
        let record = open_one.record();
        assert!(!record.contains("s3cr3t"), "{record}");
        for text in [&open_one.folders()["docs"].tree_hash().to_string(), "x-key", "10.0.0.0/8", "https://a.example"] {
            assert!(record.contains(text), "no {text} in {record}");
        }
        let guarded = [Guarded { what: "the cache folder", path: folder.path().join("docs/cache") }];
        match open(&guarded) {
            Err(CapabilityError::Overlap { field, .. }) => assert_eq!(field, "tools.t.grants.folders.docs"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_granted_is_opened_again_as_long_as_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("docs")).unwrap();
        std::fs::write(at("docs/a"), "1").unwrap();
        std::fs::write(at("db"), "").unwrap();
        let granted = grants(serde_json::json!({
            "folders": {"docs": at("docs")},
            "sqlite": {"shop": at("db")},
            "http": [{"origin": "https://a.example", "headers": {"x-key": {"env": "KEY"}}}],
        }));
        let environment = |_: &str| Some("s3cr3t-key-value".to_owned());
        let opened = ToolCapabilities::open("tools.t", &granted, &Limits::default(), &[], &environment).unwrap();
        let again =
            |grants: &ToolGrants| ToolCapabilities::recorded("tools.t", opened.record(), grants, &Limits::default());
        let same = again(&granted).unwrap();
        assert_eq!((same.granted(), same.record()), (opened.granted(), opened.record()));
        assert!(same.snapshot("shop").is_some() && same.folders().contains_key("docs"));
        assert_eq!(same.http().granted_origin("https://a.example/"), None, "nothing can be sent");
        assert!(needs_places(opened.record()) && !needs_places("{}"));

        let text = |error: CapabilityError| error.to_string();
        let nowhere = text(again(&ToolGrants::default()).unwrap_err());
        assert!(nowhere.contains("tools.t.grants.folders.docs") && nowhere.contains("config.toml"), "{nowhere}");
        let path = at("docs").display().to_string();
        std::fs::write(at("docs/a"), "2").unwrap();
        let changed = text(again(&granted).unwrap_err());
        for part in ["tools.t.grants.folders.docs", &path, &opened.folders()["docs"].tree_hash().to_string()] {
            assert!(changed.contains(part), "no {part:?} in {changed}");
        }
        std::fs::write(at("docs/a"), "1").unwrap();
        rusqlite::Connection::open(at("db")).unwrap().execute_batch("CREATE TABLE t (a)").unwrap();
        let changed = text(again(&granted).unwrap_err());
        assert!(changed.contains("tools.t.grants.sqlite.shop") && changed.contains("has changed"), "{changed}");
        assert!(ToolCapabilities::recorded("tools.t", "[", &granted, &Limits::default()).is_err());
    }
}
