//! All that a tool is granted, opened when a run starts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use fulgurite_core::grant::{Capability, ToolGrants};
use fulgurite_core::limits::Limits;

use crate::folder::{FolderError, PinnedFolder};
use crate::http_client::{HttpClient, HttpSetupError};
use crate::overlap::{Guarded, Overlap, check_overlap};
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
        let record = record(grants, &folders, &sqlite);
        Ok(Self { plugin: plugin.to_owned(), granted: grants.granted(), folders, http, sqlite, record })
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

fn record(
    grants: &ToolGrants,
    folders: &BTreeMap<String, Arc<PinnedFolder>>,
    sqlite: &BTreeMap<String, Arc<Snapshot>>,
) -> String {
    let folders: BTreeMap<_, _> = folders.iter().map(|(name, folder)| (name, folder.tree_hash().to_string())).collect();
    let sqlite: BTreeMap<_, _> = sqlite.iter().map(|(name, snapshot)| (name, snapshot.hash().to_string())).collect();
    let http = grants.http.iter().map(|grant| {
        let private: Vec<_> = grant.allow_private.iter().map(ToString::to_string).collect();
        let headers: Vec<_> = grant.headers.keys().collect();
        serde_json::json!({"origin": grant.origin.to_string(), "headers": headers, "allow_private": private})
    });
    let http: Vec<_> = http.collect();
    serde_json::json!({"folders": folders, "http": http, "sqlite": sqlite}).to_string()
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
}
