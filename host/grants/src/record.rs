//! What a tool was granted, as the record of a run has it: enough to tell whether what is there now is the same.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_core::grant::{Capability, Origin, ToolGrants};
use fulgurite_core::id::ContentHash;
use serde::{Deserialize, Serialize};

/// Hashes of folders and databases, servers, and names of headers without their values.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct GrantRecord {
    /// Tree hashes by the folder's name.
    pub(crate) folders: BTreeMap<String, ContentHash>,
    pub(crate) http: Vec<HttpRecord>,
    /// Content hashes by the database's name.
    pub(crate) sqlite: BTreeMap<String, ContentHash>,
}

/// A server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HttpRecord {
    origin: Origin,
    #[serde(default)]
    headers: Vec<String>,
    #[serde(default)]
    allow_private: Vec<String>,
}

impl GrantRecord {
    pub(crate) fn new(
        grants: &ToolGrants,
        folders: BTreeMap<String, ContentHash>,
        sqlite: BTreeMap<String, ContentHash>,
    ) -> Self {
        let http = grants.http.iter().map(|grant| HttpRecord {
            origin: grant.origin.clone(),
            headers: grant.headers.keys().cloned().collect(),
            allow_private: grant.allow_private.iter().map(ToString::to_string).collect(),
        });
        Self { folders, http: http.collect(), sqlite }
    }

    /// As a manifest is compared with it.
    pub(crate) fn granted(&self) -> BTreeSet<(Capability, String)> {
        let folders = self.folders.keys().map(|name| (Capability::Folder, name.clone()));
        let http = self.http.iter().map(|server| (Capability::Http, server.origin.to_string()));
        let sqlite = self.sqlite.keys().map(|name| (Capability::Sqlite, name.clone()));
        folders.chain(http).chain(sqlite).collect()
    }
}
