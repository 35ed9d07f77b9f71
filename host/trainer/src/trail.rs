//! The trail of a run, `trail.lz4`: for every step which rollouts its algorithm was given and what each of its updates used.
//! `fulgurite explain` reads it.
//!
//! What follows from spans is not in it: token ids, masks and rows are made again from the store, by the code that made them.
//! A step is one block, committed as a line of `metrics.jsonl` is: a checkpoint knows the file's length, and what a crash left
//! behind it is cut off. Nothing in it depends on the machine's speed, so one config and seed give the same bytes.
//!
//! A block is three little-endian `u32` (bytes stored, bytes of the JSON text, CRC-32C of what is stored) and the JSON text of a
//! [`StepTrail`], compressed by LZ4. Entries of one update repeated by the next are kept once. A GRPO step of 128 rollouts with
//! two calls each and two updates takes 4 KB and below 1 ms.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fulgurite_core::algorithm::{BatchEntry, ModelReference, Scope, TransitionGradient, Weights};
use fulgurite_core::id::{PolicyVersion, RolloutId};
use fulgurite_core::training::Stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::ExplainConfig;

/// Bytes that a block's text may have when it is read. 1 GiB: a damaged length must not take all memory.
const TEXT_BYTES_MAX: u32 = 1 << 30;

/// What one step was given and did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepTrail {
    /// Name of the stage or control.
    pub stage: String,
    /// Step, from 0.
    pub step: u64,
    /// Name of the algorithm plugin.
    pub algorithm: String,
    /// Its version.
    pub version: String,
    /// The policy's weights that the step began with; an older run does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_version: Option<PolicyVersion>,
    /// Rollouts that the algorithm was given.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub given: BTreeMap<RolloutId, GivenAs>,
    /// Rollouts that are carried over to a later step.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<RolloutId>,
    /// Calls of `forward-backward` and `backward`, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub updates: Vec<UpdateTrail>,
    /// Optimiser steps, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub optimiser_steps: Vec<OptimiserTrail>,
    /// Entries that are not kept, because the step has more than the config lets it keep.
    #[serde(skip_serializing_if = "is_zero")]
    pub entries_left_out: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes the field")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// As what an algorithm was given a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GivenAs {
    /// It counts.
    Graded,
    /// It counts, and the rewards shown are another rollout's (`experiment.shuffle_rewards`).
    Shuffled,
    /// A fault that is not the policy's: it is in no baseline and no loss.
    Fault,
    /// A row is too long: likewise.
    TooLong,
    /// It was run to choose or to estimate, and is never trained on.
    Estimate,
}

/// One `forward-backward` or `backward`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UpdateTrail {
    /// The verb.
    pub verb: UpdateVerb,
    /// The model whose gradient it was.
    pub model: ModelReference,
    /// Version of the policy's weights at that moment.
    pub policy_version: PolicyVersion,
    /// Loss settings of `forward-backward`.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub loss: Value,
    /// What `forward-backward` found.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub found: Value,
    /// An earlier update of the step with the very same entries, which has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<usize>,
    /// Its entries, those of demonstrations apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entries: Vec<EntryTrail>,
    /// Entries that were demonstrations.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub demonstrations: u64,
}

/// A verb that adds to the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateVerb {
    /// A loss of the host's.
    ForwardBackward,
    /// Derivatives of the plugin's own loss.
    Backward,
}

/// One entry of an update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntryTrail {
    /// The transition.
    pub id: String,
    /// What its weights multiply; of `backward` nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Stream>,
    /// Whether the tokens are those that it saw; else those that the policy drew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub observed: bool,
    /// The plugin's own pairing or grouping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u64>,
    /// Its weights; of `backward` the derivatives with respect to log-probs, or to values of a critic.
    pub weights: WeightTrail,
    /// What the loss made of its tokens beside them; an older run does not say, and `backward` has no loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareTrail>,
}

/// What a loss made of the tokens of an entry, beside their weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ShareTrail {
    /// What their losses were multiplied with when the batch was added up, as a mean over them.
    pub coefficient: f64,
    /// Mean of the correction's weights on them; `None` without a correction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<f64>,
    /// Tokens that the correction's mask dropped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped: u64,
}

/// Weights of an entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightTrail {
    /// The same for every token.
    All(f32),
    /// One for each.
    Each(Vec<f32>),
    /// One for each, of which this is known.
    Summary {
        /// How many.
        count: u64,
        /// Their mean.
        mean: f64,
        /// The smallest.
        min: f32,
        /// The largest.
        max: f32,
    },
}

/// One optimiser step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimiserTrail {
    /// Updates of the step before it.
    pub after_updates: usize,
    /// The model.
    pub model: ModelReference,
    /// Its settings.
    pub settings: Value,
    /// What it found.
    pub found: Value,
}

/// Gathers the trail of a step.
#[derive(Debug)]
pub(crate) struct TrailKeeper {
    config: ExplainConfig,
    step: StepTrail,
    entries: usize,
    token_weights: usize,
}

impl TrailKeeper {
    pub(crate) fn new(config: &ExplainConfig) -> Self {
        Self { config: config.clone(), step: StepTrail::default(), entries: 0, token_weights: 0 }
    }

    pub(crate) fn given(&mut self, rollout: &RolloutId, given: GivenAs) {
        if self.config.record {
            self.step.given.insert(rollout.clone(), given);
        }
    }

    /// Writes down what a `forward-backward` is asked to use; [`Self::keep`] takes it when it has succeeded.
    pub(crate) fn of_batch(
        &mut self,
        model: &ModelReference,
        policy_version: PolicyVersion,
        batch: &[BatchEntry],
        loss: &impl Serialize,
        share: impl Fn(&BatchEntry) -> Option<ShareTrail>,
    ) -> Option<UpdateTrail> {
        let mut update = self.begin(UpdateVerb::ForwardBackward, model, policy_version)?;
        update.loss = json(loss);
        for entry in batch {
            let observed = entry.scope == Scope::Observed;
            let stream = Some(entry.stream);
            self.add(&mut update, &entry.transition.0, |keeper| EntryTrail {
                id: entry.transition.0.clone(),
                stream,
                observed,
                group: entry.group,
                weights: match &entry.weights {
                    Weights::Scalar(weight) => WeightTrail::All(*weight),
                    Weights::PerToken(weights) => keeper.weights(weights),
                },
                share: share(entry),
            });
        }
        Some(update)
    }

    /// The same for `backward`.
    pub(crate) fn of_gradients(
        &mut self,
        model: &ModelReference,
        policy_version: PolicyVersion,
        gradients: &[TransitionGradient],
    ) -> Option<UpdateTrail> {
        let mut update = self.begin(UpdateVerb::Backward, model, policy_version)?;
        for gradient in gradients {
            let derivatives = [&gradient.d_log_probs, &gradient.d_values, &gradient.d_entropies];
            let derivatives = derivatives.into_iter().find(|list| !list.is_empty());
            self.add(&mut update, &gradient.transition.0, |keeper| EntryTrail {
                id: gradient.transition.0.clone(),
                stream: None,
                observed: false,
                group: None,
                weights: derivatives.map_or(WeightTrail::All(0.0), |list| keeper.weights(list)),
                share: None,
            });
        }
        Some(update)
    }

    /// Keeps an update that has been made, with what it found.
    pub(crate) fn keep(&mut self, update: Option<UpdateTrail>, found: &impl Serialize) {
        let Some(mut update) = update else { return };
        update.found = json(found);
        let earlier =
            self.step.updates.iter().position(|earlier| earlier.same_as.is_none() && earlier.entries == update.entries);
        if let Some(earlier) = earlier.filter(|_| !update.entries.is_empty()) {
            update.same_as = Some(earlier);
            update.entries.clear();
        }
        self.step.updates.push(update);
    }

    pub(crate) fn stepped(&mut self, model: &ModelReference, settings: &impl Serialize, found: &impl Serialize) {
        if self.config.record {
            self.step.optimiser_steps.push(OptimiserTrail {
                after_updates: self.step.updates.len(),
                model: model.clone(),
                settings: json(settings),
                found: json(found),
            });
        }
    }

    /// Ends a step that began with these weights; `None` when nothing is kept.
    pub(crate) fn end(&mut self, carried: Vec<RolloutId>, begun_with: PolicyVersion) -> Option<StepTrail> {
        let step = std::mem::take(&mut self.step);
        (self.entries, self.token_weights) = (0, 0);
        self.config.record.then_some(StepTrail { carried, policy_version: Some(begun_with), ..step })
    }

    fn begin(&self, verb: UpdateVerb, model: &ModelReference, policy_version: PolicyVersion) -> Option<UpdateTrail> {
        self.config.record.then(|| UpdateTrail {
            verb,
            model: model.clone(),
            policy_version,
            loss: Value::Null,
            found: Value::Null,
            same_as: None,
            entries: vec![],
            demonstrations: 0,
        })
    }

    fn add(&mut self, update: &mut UpdateTrail, id: &str, entry: impl FnOnce(&mut Self) -> EntryTrail) {
        if id.starts_with(DEMONSTRATION) {
            update.demonstrations += 1;
        } else if self.entries < self.config.entries_per_step_max {
            self.entries += 1;
            let entry = entry(self);
            update.entries.push(entry);
        } else {
            self.step.entries_left_out += 1;
        }
    }

    fn weights(&mut self, weights: &[f32]) -> WeightTrail {
        let is_finite = weights.iter().all(|weight| weight.is_finite());
        if is_finite && self.token_weights + weights.len() <= self.config.token_weights_per_step_max {
            self.token_weights += weights.len();
            return WeightTrail::Each(weights.to_vec());
        }
        let finite = || weights.iter().copied().filter(|weight| weight.is_finite());
        WeightTrail::Summary {
            count: weights.len() as u64,
            mean: finite().map(f64::from).sum::<f64>() / finite().count().max(1) as f64,
            min: finite().reduce(f32::min).unwrap_or(0.0),
            max: finite().reduce(f32::max).unwrap_or(0.0),
        }
    }
}

/// A value as its JSON text has it: 0.2 of an `f32` stays 0.2, and what is no number becomes nothing.
fn json(value: &impl Serialize) -> Value {
    serde_json::to_string(value).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// How the ids of demonstrations begin.
pub(crate) const DEMONSTRATION: &str = "demonstration/";

impl StepTrail {
    /// The entries of an update, wherever they are kept.
    #[must_use]
    pub fn entries<'a>(&'a self, update: &'a UpdateTrail) -> &'a [EntryTrail] {
        match update.same_as {
            Some(earlier) => self.updates.get(earlier).map_or(&[], |earlier| &earlier.entries),
            None => &update.entries,
        }
    }
}

/// Writes the trail.
#[derive(Debug)]
pub(crate) struct TrailWriter {
    file: File,
    bytes: u64,
}

impl TrailWriter {
    /// Opens the file of a run and cuts it back to `bytes`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn open(path: &Path, bytes: u64) -> std::io::Result<Self> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        // A file that is shorter was begun by a version without it.
        let bytes = bytes.min(file.metadata()?.len());
        file.set_len(bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file, bytes })
    }

    /// Writes one step.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn write(&mut self, step: &StepTrail) -> std::io::Result<()> {
        let text = serde_json::to_vec(step)?;
        let stored = lz4_flex::block::compress(&text);
        let size =
            |bytes: usize| u32::try_from(bytes).map_err(|_| std::io::Error::other("a step's trail is over 4 GiB"));
        let head = [size(stored.len())?, size(text.len())?, crc32c::crc32c(&stored)];
        let mut block: Vec<u8> = head.iter().flat_map(|number| number.to_le_bytes()).collect();
        block.extend(&stored);
        self.file.write_all(&block)?;
        self.bytes += block.len() as u64;
        Ok(())
    }

    /// Makes everything written durable and returns the file's length.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn sync(&mut self) -> std::io::Result<u64> {
        self.file.sync_data()?;
        Ok(self.bytes)
    }
}

/// Why a trail cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TrailError {
    /// The disk refused.
    #[error("cannot read `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A block is not what was written.
    #[error("`{path}` is damaged from byte {at} on: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the block begins.
        at: u64,
        /// What is wrong.
        problem: String,
    },
}

/// Reads a trail step by step. A run without one has none; a last block that is cut off, because the run goes on or was
/// killed, is not there yet.
///
/// # Errors
/// When the file cannot be read, or a block in it is not what was written.
pub fn read(path: &Path, mut each: impl FnMut(StepTrail)) -> Result<(), TrailError> {
    let io = |source| TrailError::Io { path: path.to_path_buf(), source };
    let mut file = match File::open(path) {
        Ok(file) => std::io::BufReader::new(file),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    let mut left = file.get_ref().metadata().map_err(io)?.len();
    let mut at = 0;
    loop {
        let mut head = [0_u8; 12];
        if left < head.len() as u64 {
            return Ok(());
        }
        file.read_exact(&mut head).map_err(io)?;
        left -= head.len() as u64;
        let [stored_bytes, text_bytes, check] = numbers(head);
        if left < u64::from(stored_bytes) {
            return Ok(());
        }
        let mut stored = vec![0_u8; stored_bytes as usize];
        file.read_exact(&mut stored).map_err(io)?;
        left -= u64::from(stored_bytes);
        let damaged = |problem: String| TrailError::Damaged { path: path.to_path_buf(), at, problem };
        if crc32c::crc32c(&stored) != check || text_bytes > TEXT_BYTES_MAX {
            return Err(damaged("its checksum is wrong".to_owned()));
        }
        let text =
            lz4_flex::block::decompress(&stored, text_bytes as usize).map_err(|error| damaged(error.to_string()))?;
        each(serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?);
        at += head.len() as u64 + u64::from(stored_bytes);
    }
}

fn numbers(head: [u8; 12]) -> [u32; 3] {
    let (numbers, _) = head.as_chunks::<4>();
    let mut numbers = numbers.iter().map(|bytes| u32::from_le_bytes(*bytes));
    [0; 3].map(|_| numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use fulgurite_core::id::TransitionId;
    use fulgurite_core::training::LossSpec;

    use super::*;

    fn entry(id: &str, weights: Weights) -> BatchEntry {
        let transition = TransitionId(id.to_owned());
        BatchEntry { transition, stream: Stream::Rl, scope: Scope::Sampled, weights, group: None }
    }

    fn step(config: &ExplainConfig, batches: &[Vec<BatchEntry>]) -> Option<StepTrail> {
        let mut keeper = TrailKeeper::new(config);
        keeper.given(&RolloutId::new("r-0").unwrap(), GivenAs::Graded);
        for batch in batches {
            let loss = LossSpec::default();
            let share = |_: &BatchEntry| Some(ShareTrail { coefficient: 0.1, correction: Some(1.5), dropped: 0 });
            let update = keeper.of_batch(&ModelReference::Policy, PolicyVersion(3), batch, &loss, share);
            keeper.keep(update, &serde_json::json!({"loss": 0.5}));
        }
        keeper.end(vec![], PolicyVersion(3))
    }

    fn read_all(path: &Path) -> Vec<StepTrail> {
        let mut steps = vec![];
        read(path, |step| steps.push(step)).unwrap();
        steps
    }

    #[test]
    fn what_is_written_is_read_and_a_crash_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trail.lz4");
        assert!(read_all(&path).is_empty());
        let batch =
            vec![entry("r-0/1/0", Weights::Scalar(0.1)), entry("r-0/1/1", Weights::PerToken(vec![1.0, -2.5e-8]))];
        let first = step(&ExplainConfig::default(), &[batch]).unwrap();
        let second = StepTrail { step: 1, ..first.clone() };
        let mut writer = TrailWriter::open(&path, 0).unwrap();
        writer.write(&first).unwrap();
        let committed = writer.sync().unwrap();
        writer.write(&second).unwrap();
        drop(writer);
        // A crash inside of a block.
        let whole = std::fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(whole - 1).unwrap();
        assert_eq!(read_all(&path), std::slice::from_ref(&first));
        let mut writer = TrailWriter::open(&path, committed).unwrap();
        writer.write(&second).unwrap();
        drop(writer);
        assert_eq!(read_all(&path), [first, second]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), whole);
    }

    #[test]
    fn damage_is_told_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trail.lz4");
        let mut writer = TrailWriter::open(&path, 0).unwrap();
        writer.write(&step(&ExplainConfig::default(), &[]).unwrap()).unwrap();
        let second = writer.sync().unwrap();
        writer.write(&step(&ExplainConfig::default(), &[]).unwrap()).unwrap();
        drop(writer);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = read(&path, |_| {}).unwrap_err().to_string();
        assert!(error.contains(&format!("from byte {second} on: its checksum")), "{error}");
    }

    #[test]
    fn repeated_entries_are_kept_once_and_demonstrations_counted() {
        let batch = vec![entry("r-0/1/0", Weights::Scalar(0.1)), entry("demonstration/0/7", Weights::Scalar(1.0))];
        let other = vec![entry("r-0/1/0", Weights::Scalar(0.2))];
        let step = step(&ExplainConfig::default(), &[batch.clone(), other, batch]).unwrap();
        let kept: Vec<_> = step.updates.iter().map(|update| (update.same_as, update.entries.len())).collect();
        assert_eq!(kept, [(None, 1), (None, 1), (Some(0), 0)]);
        assert_eq!(step.entries(&step.updates[2]), step.entries(&step.updates[0]));
        assert_eq!(step.updates[2].demonstrations, 1);
    }

    #[test]
    fn limits_hold_and_say_what_is_missing() {
        let config = ExplainConfig { record: true, entries_per_step_max: 2, token_weights_per_step_max: 3 };
        let batch = vec![
            entry("a", Weights::PerToken(vec![1.0, 2.0])),
            entry("b", Weights::PerToken(vec![1.0, 3.0])),
            entry("c", Weights::Scalar(1.0)),
        ];
        let kept = step(&config, std::slice::from_ref(&batch)).unwrap();
        assert_eq!(kept.entries_left_out, 1);
        assert_eq!(kept.updates[0].entries[0].weights, WeightTrail::Each(vec![1.0, 2.0]));
        let summary = WeightTrail::Summary { count: 2, mean: 2.0, min: 1.0, max: 3.0 };
        assert_eq!(kept.updates[0].entries[1].weights, summary);
        assert_eq!(step(&ExplainConfig { record: false, ..config }, &[batch]), None);
    }
}
