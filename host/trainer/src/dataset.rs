//! Datasets on disk and the order in which a stage goes through them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fulgurite_core::dataset::{DatasetItem, Split};
use fulgurite_core::seed::{Generator, Seed};
use serde::{Deserialize, Serialize};

use crate::config::DatasetConfig;

/// Longest line of a dataset file in bytes. 4 MiB: a long document; more is a file that is not JSONL.
pub(crate) const LINE_BYTES_MAX: usize = 4 << 20;

/// Why a dataset was refused.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("cannot read dataset file `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A line is not an item.
    #[error(
        "`{path}` line {line}: {problem}; an item is {{\"id\": ..., \"input\": ..., \"world\": ..., \"reference\": ...}}"
    )]
    Item {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// No item at all.
    #[error("`{path}` has no items")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// A dataset in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dataset {
    splits: BTreeMap<Split, Vec<Arc<DatasetItem>>>,
    by_id: BTreeMap<String, (Split, Arc<DatasetItem>)>,
}

impl Dataset {
    /// Reads the files of a dataset.
    ///
    /// # Errors
    /// When a file cannot be read or a line is not an item with an id that is new in the whole dataset: an item in two
    /// splits would be trained on and then counted as held out.
    pub(crate) fn load(config: &DatasetConfig) -> Result<Self, DatasetError> {
        let mut dataset = Self::default();
        let files = [(Split::Train, &config.train), (Split::Val, &config.val), (Split::Test, &config.test)];
        for (split, path) in files.into_iter().filter_map(|(split, path)| path.as_ref().map(|path| (split, path))) {
            let items = read(path, split, &mut dataset.by_id)?;
            dataset.splits.insert(split, items);
        }
        Ok(dataset)
    }

    /// Items of a split in the order of the file; empty when the dataset has no such split.
    #[must_use]
    pub(crate) fn split(&self, split: Split) -> &[Arc<DatasetItem>] {
        self.splits.get(&split).map_or(&[], Vec::as_slice)
    }

    /// The item with this id, when it belongs to that split.
    #[must_use]
    pub(crate) fn item(&self, split: Split, id: &str) -> Option<&Arc<DatasetItem>> {
        self.by_id.get(id).filter(|(own, _)| *own == split).map(|(_, item)| item)
    }
}

fn read(
    path: &Path,
    split: Split,
    seen: &mut BTreeMap<String, (Split, Arc<DatasetItem>)>,
) -> Result<Vec<Arc<DatasetItem>>, DatasetError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| DatasetError::Read { path: path.to_path_buf(), source })?;
    let mut items = vec![];
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fail = |problem: String| DatasetError::Item { path: path.to_path_buf(), line: index + 1, problem };
        if line.len() > LINE_BYTES_MAX {
            return Err(fail(format!("the line has {} bytes, at most {LINE_BYTES_MAX} are read", line.len())));
        }
        let item: DatasetItem = serde_json::from_str(line).map_err(|error| fail(error.to_string()))?;
        let item = Arc::new(item);
        if seen.insert(item.id.clone(), (split, Arc::clone(&item))).is_some() {
            return Err(fail(format!("the id `{}` is used twice in this dataset", item.id)));
        }
        items.push(item);
    }
    if items.is_empty() { Err(DatasetError::Empty { path: path.to_path_buf() }) } else { Ok(items) }
}

/// Where a stage stands in a split. A part of the checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cursor {
    /// Items drawn so far, over all epochs.
    pub(crate) drawn: u64,
}

impl Cursor {
    /// Draws the next `count` of `length` items: places in the split and the epoch of each. Every epoch is a fresh shuffle
    /// that follows from `seed`, so a resumed stage draws what an uninterrupted one would have.
    pub(crate) fn draw(&mut self, length: usize, count: usize, seed: Seed) -> Vec<(usize, u64)> {
        let mut drawn = Vec::with_capacity(count);
        let mut order: Option<(u64, Vec<usize>)> = None;
        while drawn.len() < count && length > 0 {
            let epoch = self.drawn / length as u64;
            let offset = usize::try_from(self.drawn % length as u64).unwrap_or(0);
            let current = match order.take() {
                Some((known, places)) if known == epoch => places,
                _ => {
                    let mut places: Vec<usize> = (0..length).collect();
                    Generator::new(seed.child_index(epoch)).shuffle(&mut places);
                    places
                }
            };
            let wanted = (count - drawn.len()).min(length - offset);
            drawn.extend(current.iter().skip(offset).take(wanted).map(|place| (*place, epoch)));
            self.drawn += wanted as u64;
            order = Some((epoch, current));
        }
        drawn
    }
}

/// All text of an item that a policy may ever read or write: the corpus of its tokenizer.
pub(crate) fn corpus_of(item: &DatasetItem) -> Vec<String> {
    let mut texts = vec![];
    collect(&item.input, &mut texts);
    if let Some(messages) = item.reference.get("messages") {
        collect(messages, &mut texts);
    }
    texts
}

fn collect(value: &serde_json::Value, texts: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => texts.push(text.clone()),
        serde_json::Value::Array(values) => values.iter().for_each(|value| collect(value, texts)),
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                match value {
                    // A policy writes a tool call as JSON, so that is the text to learn from, not its parts.
                    serde_json::Value::Array(calls) if key == "tool_calls" => {
                        texts.extend(calls.iter().map(serde_json::Value::to_string));
                    }
                    other => collect(other, texts),
                }
            }
        }
        serde_json::Value::Null | serde_json::Value::Bool(_) | serde_json::Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_goes_through_every_item_once_per_epoch_however_it_is_cut() {
        let seed = Seed::new(3);
        let whole = Cursor::default().draw(10, 35, seed);
        let mut cursor = Cursor::default();
        let mut cut = vec![];
        for count in [1, 9, 4, 13, 8] {
            cut.extend(cursor.draw(10, count, seed));
        }
        assert_eq!(cut, whole);
        assert_eq!(cursor.drawn, 35);
        for epoch in 0..3 {
            let mut places: Vec<_> = whole.iter().filter(|(_, e)| *e == epoch).map(|(place, _)| *place).collect();
            places.sort_unstable();
            assert_eq!(places, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(whole[0..10], whole[10..20]);
        assert!(Cursor::default().draw(0, 5, seed).is_empty());
    }

    #[test]
    fn errors_name_file_line_and_fix() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Dataset::load(&DatasetConfig { train: Some(path.clone()), val: None, test: None })
        };
        let message = |text: &str| load(text).unwrap_err().to_string();
        assert!(message("{\"id\":\"a\",\"input\":1}\n{\"id\":\"b\"}").contains("line 2: missing field `input`"));
        assert!(message("{\"id\":\"a\",\"input\":1,\"inputs\":2}").contains("unknown field `inputs`"));
        assert!(message("{\"id\":\"a\",\"input\":1}\n\n{\"id\":\"a\",\"input\":1}").contains("line 3: the id `a`"));
        assert!(message("\n").contains("no items"));
        assert_eq!(load("{\"id\":\"a\",\"input\":1}").unwrap().split(Split::Train).len(), 1);
    }
}
