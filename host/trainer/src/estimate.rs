//! How long a run will take and how much memory, measured by rehearsing it.
//!
//! A rehearsal is the run itself in a folder of its own, which is removed afterwards: the same plugins, datasets, store and
//! policy, but few steps of each stage and few rollouts of each evaluation. What they took is scaled up. So it holds for
//! any algorithm, whatever a step of it does; it needs only to know how many steps there are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::{RunConfig, StageConfig};
use crate::error::TrainError;
use crate::progress::{ProgressEvent, ProgressSink};
use crate::train::{TrainOptions, train};

/// Fewest steps of a stage that are rehearsed. The first is slower than the others (buffers are made) and not counted.
const STEPS: u64 = 5;
/// Part of a stage's steps that is rehearsed, as its divisor: a stage must learn enough for the next one to have something to
/// do. A policy that is never rewarded is never trained, and such steps are short.
const STEPS_DIVISOR: u64 = 10;
/// Most steps of a stage that are rehearsed.
const STEPS_MAX: u64 = 100;
/// A stage of fewer steps than this for each rehearsed one is not worth a rehearsal.
const STEPS_FOR_EACH_MIN: u64 = 8;
/// Rollouts of each evaluation that are rehearsed.
const EVALUATION_ROLLOUTS: usize = 128;
/// Config key of a stage's steps, by which all algorithms of this project go.
const STEPS_KEY: &str = "steps";

/// What a run will take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Wall-clock seconds from start to end.
    pub seconds: f64,
    /// Most memory at a time, in bytes of resident set; 0 where the system does not tell.
    pub memory_bytes: u64,
    /// Seconds that the rehearsal took.
    pub rehearsal_seconds: f64,
}

/// Why there is no estimate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoEstimate {
    /// The run is about as short as its rehearsal.
    Short,
    /// A stage does not say its number of steps.
    StepsUnknown {
        /// Which stage.
        stage: String,
    },
    /// Something outside would notice: a server that tools are granted, or a model endpoint.
    Noticed,
    /// Nothing is trained.
    NothingTrained,
}

impl std::fmt::Display for NoEstimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Short => f.write_str("the run is about as short as a rehearsal of it"),
            Self::StepsUnknown { stage } => write!(f, "stage `{stage}` does not say its `{STEPS_KEY}`"),
            Self::Noticed => f.write_str("a rehearsal would ask the servers that this config grants"),
            Self::NothingTrained => f.write_str("nothing is trained"),
        }
    }
}

/// Rehearses a run in a folder beside `run` and scales up what it took.
///
/// # Errors
/// Whatever stops the rehearsal would stop the run: see [`TrainError`].
pub async fn estimate(
    config: &RunConfig,
    run: &Path,
    cache: Option<PathBuf>,
    stop: watch::Receiver<bool>,
) -> Result<Result<Estimate, NoEstimate>, TrainError> {
    if let Err(reason) = rehearsable(config) {
        return Ok(Err(reason));
    }
    let parent = run.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(TrainError::io(parent))?;
    let folder = tempfile::Builder::new().prefix(".rehearsal-").tempdir_in(parent).map_err(TrainError::io(parent))?;
    let options = TrainOptions { run: folder.path().join("run"), resume: false, cache };
    let clock = Arc::new(Clock::default());
    let started = Instant::now();
    forget_peak_memory();
    // Boxed: the future of a run is large, and this one is inside the caller's.
    let result = Box::pin(train(rehearsal(config), options, clock.clone(), stop)).await?;
    let elapsed = started.elapsed().as_secs_f64();
    let tokens_per_step = |name: &str| {
        let report = result.stages.iter().chain(&result.controls).find(|report| report.name == name)?;
        Some(report.tokens as f64 / report.steps.max(1) as f64)
    };
    let measured = clock.measured();
    // What is done once whatever the length: plugins, datasets, tokenizer.
    let mut seconds = (elapsed - measured.counted_seconds).max(0.0);
    for stage in config.stage.iter().chain(&config.control) {
        let Some(step_seconds) = measured.step_seconds(&stage.name) else { continue };
        let own = steps_of(stage);
        let allowed = stage.tokens_of.as_ref().and_then(|of| {
            let of = config.stage.iter().find(|stage| stage.name == *of)?;
            let tokens = steps_of(of)? as f64 * tokens_per_step(&of.name)?;
            Some(tokens / tokens_per_step(&stage.name)?.max(1.0))
        });
        let steps = own.map_or(f64::INFINITY, |steps| steps as f64).min(allowed.unwrap_or(f64::INFINITY));
        seconds += steps * step_seconds;
    }
    for (kind, rollouts) in
        [("sampled", config.evaluation.sampled_rollouts), ("greedy", config.evaluation.greedy_rollouts)]
    {
        seconds += measured.evaluation_seconds(kind, rollouts);
    }
    Ok(Ok(Estimate { seconds, memory_bytes: peak_memory_bytes(), rehearsal_seconds: elapsed }))
}

fn steps_of(stage: &StageConfig) -> Option<u64> {
    stage.config.get(STEPS_KEY).and_then(toml::Value::as_integer).and_then(|steps| u64::try_from(steps).ok())
}

fn rehearsable(config: &RunConfig) -> Result<(), NoEstimate> {
    if config.policy.local.is_none() || config.stage.is_empty() {
        return Err(NoEstimate::NothingTrained);
    }
    if !config.endpoint.is_empty() || config.tools.values().any(|tool| !tool.grants.http.is_empty()) {
        return Err(NoEstimate::Noticed);
    }
    let unknown = config.stage.iter().chain(&config.control).find(|stage| steps_of(stage).is_none());
    if let Some(stage) = unknown {
        return Err(NoEstimate::StepsUnknown { stage: stage.name.clone() });
    }
    let longest = config.stage.iter().filter_map(steps_of).max().unwrap_or(0);
    if longest < STEPS * STEPS_FOR_EACH_MIN { Err(NoEstimate::Short) } else { Ok(()) }
}

/// The same run, shorter.
fn rehearsal(config: &RunConfig) -> RunConfig {
    let mut config = config.clone();
    let controls = config.control.iter_mut().map(|control| (control, STEPS));
    for (stage, steps_max) in config.stage.iter_mut().map(|stage| (stage, STEPS_MAX)).chain(controls) {
        let own = steps_of(stage).unwrap_or(STEPS);
        let steps = (own / STEPS_DIVISOR).clamp(STEPS, steps_max).min(own);
        stage.config.insert(STEPS_KEY.to_owned(), toml::Value::Integer(i64::try_from(steps).unwrap_or(i64::MAX)));
        stage.tokens_of = None;
    }
    let evaluation = &mut config.evaluation;
    evaluation.sampled_rollouts = evaluation.sampled_rollouts.min(EVALUATION_ROLLOUTS);
    evaluation.greedy_rollouts = evaluation.greedy_rollouts.min(EVALUATION_ROLLOUTS);
    config
}

/// Notes when things happen in the rehearsal.
#[derive(Debug, Default)]
struct Clock(Mutex<Measured>);

#[derive(Debug, Clone, Default)]
struct Measured {
    /// Seconds of each step of a stage.
    steps: BTreeMap<String, Vec<f64>>,
    /// Kind, rollouts and seconds of each evaluation.
    evaluations: Vec<(&'static str, u64, f64)>,
    open: Option<(u64, Instant)>,
    /// Seconds of steps and evaluations.
    counted_seconds: f64,
}

impl Clock {
    fn measured(&self) -> Measured {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ProgressSink for Clock {
    fn event(&self, event: ProgressEvent) {
        let mut measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            ProgressEvent::StepEnded { stage, seconds, .. } => {
                measured.counted_seconds += seconds;
                measured.steps.entry(stage).or_default().push(seconds);
            }
            ProgressEvent::EvaluationStarted { rollouts, .. } => measured.open = Some((rollouts, Instant::now())),
            ProgressEvent::EvaluationEnded { kind, .. } => {
                if let Some((rollouts, started)) = measured.open.take() {
                    let seconds = started.elapsed().as_secs_f64();
                    measured.counted_seconds += seconds;
                    measured.evaluations.push((kind, rollouts, seconds));
                }
            }
            _ => {}
        }
    }
}

impl Measured {
    /// Mean seconds of a step of a stage, its first left out.
    fn step_seconds(&self, stage: &str) -> Option<f64> {
        let all = self.steps.get(stage)?;
        let counted = if all.len() > 1 { all.get(1..)? } else { all };
        Some(counted.iter().sum::<f64>() / counted.len().max(1) as f64)
    }

    /// Seconds of all evaluations of a kind, with as many rollouts as the run has.
    fn evaluation_seconds(&self, kind: &str, rollouts: usize) -> f64 {
        let of_kind = self.evaluations.iter().filter(|(of, rehearsed, _)| *of == kind && *rehearsed > 0);
        of_kind.map(|(_, rehearsed, seconds)| seconds * rollouts as f64 / *rehearsed as f64).sum()
    }
}

/// Most memory of this process so far, in bytes of resident set; 0 where the system does not tell.
#[must_use]
pub fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0).saturating_mul(1_024)
}

/// Begins a new measurement of [`peak_memory_bytes`], where the system can (Linux: proc(5), `clear_refs`).
pub fn forget_peak_memory() {
    if let Err(error) = std::fs::write("/proc/self/clear_refs", "5") {
        tracing::debug!(%error, "the peak of memory cannot be reset; it counts from the start of the process");
    }
}

/// A time as people say it: `40 s`, `7 min 30 s`, `3 h 05 min`.
#[must_use]
pub fn shown_duration(seconds: f64) -> String {
    let whole = Duration::from_secs_f64(seconds.clamp(0.0, 1e9)).as_secs();
    match whole {
        0..60 => format!("{whole} s"),
        60..3_600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3_600, whole % 3_600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_said_in_two_units_at_most() {
        let shown: Vec<String> = [0.4, 59.9, 60.0, 450.0, 3_599.0, 11_100.0, f64::MAX].map(shown_duration).into();
        assert_eq!(shown[..6], ["0 s", "59 s", "1 min 00 s", "7 min 30 s", "59 min 59 s", "3 h 05 min"]);
    }

    #[test]
    fn the_first_step_is_left_out_and_evaluations_are_scaled() {
        let step = |seconds| ProgressEvent::StepEnded { stage: "a".into(), step: 0, scalars: BTreeMap::new(), seconds };
        let clock = Clock::default();
        for seconds in [9.0, 1.0, 3.0] {
            clock.event(step(seconds));
        }
        let mut measured = clock.measured();
        assert_eq!((measured.step_seconds("a"), measured.step_seconds("b")), (Some(2.0), None));
        measured.evaluations = vec![("sampled", 10, 2.0), ("greedy", 10, 5.0), ("sampled", 20, 1.0)];
        assert!((measured.evaluation_seconds("sampled", 40) - 10.0).abs() < 1e-9);
    }

    #[test]
    fn the_peak_of_memory_is_measured_anew() {
        forget_peak_memory();
        let before = peak_memory_bytes();
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let during = peak_memory_bytes();
        assert!(during >= before + (60 << 20), "{before} {during}");
        drop(block);
    }
}
