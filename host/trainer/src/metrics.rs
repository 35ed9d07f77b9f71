//! Metrics of a run: one JSON line per step, the same as TensorBoard events, and wall-clock times apart from both.
//!
//! `metrics.jsonl` holds nothing that depends on the machine's speed, so one config and seed give the same bytes.
//!
//! A plugin names its metrics as it likes. The host adds `tokens_total`, `sampled_tokens_total` and `rollouts_total` (trained
//! tokens, tokens that rollouts drew, and rollouts of the stage so far), and of every step:
//!
//! | name | of | what |
//! |---|---|---|
//! | `host/excluded_share` | training rollouts that it was given | share with faults that are not the policy's |
//! | `host/too_long_share` | the same | share left out because a row is longer than `rollout.row_tokens_max` |
//! | `host/cut_tokens` | the same | drawn tokens that are not trained on because their rows are too long |
//! | `host/response_tokens_mean` | those without a fault | drawn tokens of a rollout, all calls together |
//! | `host/zero_variance_share` | items of a step with several rollouts that count, forks included | share whose totals of the stage's `dimension` (`reward`) are all equal |
//! | `host/reward/DIMENSION` | those that count and have it | mean total of the dimension, accepted sources only |
//! | `host/entropy`, `host/clip_fraction`, `host/kl`, `host/reference_kl` | updates by policy gradient | means over trained tokens: entropy and KLs in nats, `kl` is k3 between π_old and π_θ |
//! | `host/sequence_clip_fraction` | those of them whose ratios are of sequences | the same as `host/clip_fraction`, which leaves them out: their bounds are tight, and whole sequences clip |
//! | `host/gradient_norm_max`, `host/skipped_updates` | optimiser steps | largest norm before clipping; steps skipped because a gradient was not finite |
//! | `host/staleness_mean`, `host/staleness_max` | trained tokens of policy gradient | optimiser steps between the weights that drew a token and those that the step began with |
//!
//! how far sampler (μ) and trainer (π_old, its weights as the step found them) disagree, and how far updates by policy gradient go:
//!
//! | name | what |
//! |---|---|
//! | `host/mismatch_mean` | mean of abs(log π_old − log μ) in nats, over the tokens that a verb looked at before their model's weights moved |
//! | `host/mismatch_k3` | mean k3 of the two over the same tokens, in nats |
//! | `host/mismatch_max` | the largest abs(log π_old − log μ) of them |
//! | `host/ratio_mean` | mean of the ratio π_θ/π_old of the loss; weighted likewise |
//! | `host/ratio_max` | the largest |
//! | `host/effective_sample_size` | `(Σ w)² / (N Σ w²)` with w = π_θ/μ, 0 to 1; the smallest of the step's updates |
//!
//! Numbers of updates and optimiser steps are over all models that are trained. Those of a model beside the policy stand by
//! themselves as well, as `host/MODEL/entropy`, `host/MODEL/ratio_max` and so on.
//!
//! A token is compared once, by `anchor`, `forward` or `forward-backward`. Mini-batches behind a step's first optimiser step say
//! nothing of it, unless they were anchored: what they find is the update. On the device `cpu`, whose sampler and trainer have the
//! same kernels, mismatches are 0 but for rollouts of older weights; ratio and size are 1 in a step's first update, and further
//! updates and rollouts of older weights move them. Definitions: [`fulgurite_core::training::ForwardBackwardReport`].

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::run_directory::RunDirectory;
use crate::tensorboard::EventWriter;

/// How the host's own names begin.
const HOST_PREFIX: &str = "host/";
/// Longest name of a metric in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// What the host writes of a step, without its prefix. Rewards have a name for each dimension beside these.
const HOST_NAMES: [&str; 20] = [
    "clip_fraction",
    "cut_tokens",
    "effective_sample_size",
    "entropy",
    "excluded_share",
    "gradient_norm_max",
    "kl",
    "mismatch_k3",
    "mismatch_max",
    "mismatch_mean",
    "ratio_max",
    "ratio_mean",
    "reference_kl",
    "response_tokens_mean",
    "sequence_clip_fraction",
    "skipped_updates",
    "staleness_max",
    "staleness_mean",
    "too_long_share",
    "zero_variance_share",
];

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricRow {
    /// Name of the stage or control.
    pub stage: String,
    /// Step, from 0.
    pub step: u64,
    /// Scalars by name.
    pub scalars: BTreeMap<String, f64>,
    /// Lines of text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Checks a metric that a plugin hands over.
///
/// # Errors
/// What is wrong with it.
pub fn check(name: &str, value: f64) -> Result<(), String> {
    check_letters(name)?;
    if name.starts_with(HOST_PREFIX) {
        return Err(format!("metric name `{name}`: names that begin with `{HOST_PREFIX}` are the host's"));
    }
    if !value.is_finite() {
        return Err(format!("metric `{name}` is {value}, which is not a finite number"));
    }
    Ok(())
}

fn check_letters(name: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'/' | b'-');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
        let shown: String = name.chars().take(NAME_BYTES_MAX).filter(|c| !c.is_control()).collect();
        return Err(format!("metric name `{shown}`: use 1 to {NAME_BYTES_MAX} of a-z, 0-9, `_`, `/`, `-`"));
    }
    Ok(())
}

/// Checks the name of a metric that is to be watched: whether anybody could write it.
///
/// # Errors
/// What is wrong with it.
pub fn check_watched(name: &str) -> Result<(), String> {
    check_letters(name)?;
    let Some(own) = name.strip_prefix(HOST_PREFIX) else { return Ok(()) };
    let of_model = own.split_once('/').map(|(_, of_model)| of_model);
    if HOST_NAMES.contains(&own)
        || own.starts_with("reward/")
        || of_model.is_some_and(|name| HOST_NAMES.contains(&name))
    {
        return Ok(());
    }
    let names = HOST_NAMES.join(", ");
    Err(format!(
        "the host writes no metric `{name}`; it writes reward/DIMENSION, MODEL/NAME of a model beside the policy, {names}"
    ))
}

/// Writes metrics.
#[derive(Debug)]
pub struct MetricWriter {
    metrics: File,
    timings: File,
    events: EventWriter,
    bytes: u64,
}

impl MetricWriter {
    /// Opens the files of a run, and cuts `metrics.jsonl` back to `bytes`: what a crash left behind the last checkpoint is
    /// written again.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open(run: &RunDirectory, bytes: u64) -> std::io::Result<Self> {
        let mut metrics = OpenOptions::new().create(true).truncate(false).write(true).open(run.metrics())?;
        metrics.set_len(bytes)?;
        metrics.seek(SeekFrom::End(0))?;
        let timings = OpenOptions::new().create(true).append(true).open(run.timings())?;
        Ok(Self { metrics, timings, events: EventWriter::create(&run.tensorboard())?, bytes })
    }

    /// Writes one step.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&mut self, row: &MetricRow, seconds: &BTreeMap<&'static str, f64>) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(row)?;
        line.push(b'\n');
        self.metrics.write_all(&line)?;
        self.bytes += line.len() as u64;
        let mut line =
            serde_json::to_vec(&serde_json::json!({"stage": row.stage, "step": row.step, "seconds": seconds}))?;
        line.push(b'\n');
        self.timings.write_all(&line)?;
        let tagged = row.scalars.iter().map(|(name, value)| (format!("{}/{name}", row.stage), *value));
        self.events.write(row.step, tagged)
    }

    /// Makes everything written durable and returns the length of `metrics.jsonl`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&mut self) -> std::io::Result<u64> {
        self.metrics.sync_data()?;
        Ok(self.bytes)
    }
}

/// Reads the metrics of a run.
///
/// # Errors
/// When the file cannot be read or a line is not a row.
pub fn read(path: &Path) -> std::io::Result<Vec<MetricRow>> {
    let mut rows = vec![];
    for line in BufReader::new(File::open(path)?).lines() {
        rows.push(serde_json::from_str(&line?)?);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reopening_cuts_what_a_crash_left_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDirectory::new(folder.path());
        let row = |step| MetricRow {
            stage: "grpo".to_owned(),
            step,
            scalars: BTreeMap::from([("reward".to_owned(), 0.5)]),
            notes: vec![],
        };
        let mut writer = MetricWriter::open(&run, 0).unwrap();
        writer.write(&row(0), &BTreeMap::new()).unwrap();
        let committed = writer.sync().unwrap();
        writer.write(&row(1), &BTreeMap::new()).unwrap();
        drop(writer);
        let mut writer = MetricWriter::open(&run, committed).unwrap();
        writer.write(&row(1), &BTreeMap::new()).unwrap();
        writer.sync().unwrap();
        assert_eq!(read(&run.metrics()).unwrap(), [row(0), row(1)]);
    }

    #[test]
    fn what_nobody_can_write_cannot_be_watched() {
        for name in ["loss", "host/entropy", "host/reward/style", "tokens_total"] {
            check_watched(name).unwrap();
        }
        for name in ["host/entropies", "host/", "Loss", ""] {
            assert!(check_watched(name).is_err(), "{name}");
        }
    }

    #[test]
    fn names_and_values_of_plugins_are_checked() {
        assert!(check("reward/mean", 1.0).is_ok());
        for (name, value) in
            [("", 0.0), ("Bad name", 0.0), ("host/x", 0.0), ("x\u{1b}[2J", 0.0), ("x", f64::NAN), ("x", f64::INFINITY)]
        {
            assert!(check(name, value).is_err(), "{name:?} {value}");
        }
    }
}
