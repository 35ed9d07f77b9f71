//! Versions of the published prompt templates.
//!
//! A version names the one it was published on top of, and holds a table of all templates with the versions that have
//! their texts. So a run that is resumed from an older checkpoint goes on from that checkpoint's version, whatever had
//! been published after it.

use std::collections::BTreeMap;

use fulgurite_core::id::ContentHash;
use serde::{Deserialize, Serialize};

use super::{Counters, Ledger, Stage};
use crate::codec;
use crate::error::{Result, StoreError};
use crate::key_value::KeyValue;
use crate::keys;
use crate::records::Template;

/// One version of the resources: its own template, and where to find the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResourcesRecord {
    pub(crate) after: u64,
    pub(crate) name: String,
    pub(crate) text: String,
    /// Name of every template -> version that published it.
    pub(crate) names: BTreeMap<String, u64>,
}

impl ResourcesRecord {
    /// The template that this version published.
    pub(crate) fn into_template(self, version: u64) -> Template {
        let hash = ContentHash::of(self.text.as_bytes());
        Template { name: self.name, version, text: self.text, hash }
    }
}

impl<D: KeyValue> Ledger<D> {
    pub(crate) fn publish_template(&self, after: u64, name: &str, text: &str) -> Result<u64> {
        let mut stage = Stage::new(self)?;
        let mut names = if after == 0 { BTreeMap::new() } else { self.resources(&stage.counters, after)?.names };
        for version in after + 1..=stage.counters.resources_version {
            let record = self.resources(&stage.counters, version)?;
            if record.after == after && record.name == name && record.text == text {
                self.sync(stage.commit()?)?;
                return Ok(version);
            }
        }
        let version = stage.counters.resources_version + 1;
        names.insert(name.to_owned(), version);
        let record = ResourcesRecord { after, name: name.to_owned(), text: text.to_owned(), names };
        codec::put(&mut stage.batch, keys::resources_key(version), &codec::encode(&record)?)?;
        stage.counters.resources_version = version;
        self.sync(stage.commit()?)?;
        Ok(version)
    }

    fn resources(&self, counters: &Counters, version: u64) -> Result<ResourcesRecord> {
        if version == 0 || version > counters.resources_version {
            return Err(StoreError::UnknownResources(version));
        }
        let key = keys::resources_key(version);
        codec::get(&self.database, &key)?.ok_or_else(|| codec::corrupt(&key, "it is missing"))
    }

    fn published(&self, counters: &Counters, version: u64) -> Result<Template> {
        Ok(self.resources(counters, version)?.into_template(version))
    }

    pub(crate) fn template(&self, name: &str, version: Option<u64>) -> Result<Option<Template>> {
        let counters = self.lock().counters.clone();
        let version = version.unwrap_or(counters.resources_version);
        if version == 0 {
            return Ok(None);
        }
        let names = self.resources(&counters, version)?.names;
        names.get(name).map(|published| self.published(&counters, *published)).transpose()
    }

    pub(crate) fn templates(&self, version: u64) -> Result<Vec<Template>> {
        if version == 0 {
            return Ok(vec![]);
        }
        let counters = self.lock().counters.clone();
        let names = self.resources(&counters, version)?.names;
        names.values().map(|published| self.published(&counters, *published)).collect()
    }

    pub(crate) fn resources_version(&self) -> u64 {
        self.lock().counters.resources_version
    }
}
