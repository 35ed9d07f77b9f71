//! How long a run will take and how much memory, measured by rehearsing it.
//!
//! A rehearsal is the run itself in a folder of its own, which is removed afterwards: the same plugins, datasets, store and
//! policy, but few steps of each stage and few rollouts of each evaluation. What they took is scaled up. So it holds for
//! any algorithm, whatever a step of it does; it needs only to know how many steps there are.
//!
//! There are two. The first, of a few steps each, tells what steps cost, and with that how long the second may be. Most of
//! the second goes to stages that others build upon: the rollouts of a policy that has learned too little end early, and
//! steps on them are shorter than the run's will be. (Rejected: one rehearsal of a tenth of each stage's steps. After a
//! tenth of its demonstrations the example's policy got the format wrong in six of seven rollouts, and the estimate was a
//! quarter too low.)

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::{RunConfig, StageConfig};
use crate::error::TrainError;
use crate::progress::{ProgressEvent, ProgressSink};
use crate::report::{RunResult, StageReport};
use crate::train::{TrainOptions, train};

/// Fewest steps of a stage that are rehearsed. The first is slower than the others (buffers are made) and not counted; one of
/// the other five is followed by a checkpoint where these are made as often as by default.
const STEPS: u64 = 6;
/// Largest part of a stage's steps that is rehearsed, as its divisor.
const STEPS_DIVISOR: u64 = 4;
/// A stage of fewer steps than this for each rehearsed one is not worth a rehearsal.
const STEPS_FOR_EACH_MIN: u64 = 8;
/// The second rehearsal may take this part of what the first one says of the run.
const SHARE: f64 = 0.1;
/// The part of that for evaluations.
const EVALUATION_SHARE: f64 = 0.4;
/// Rollouts of each evaluation in the first rehearsal.
const EVALUATION_ROLLOUTS: usize = 32;
/// Config key of a stage's steps, by which all algorithms of this project go.
const STEPS_KEY: &str = "steps";

/// What a run will take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Wall-clock seconds from start to end.
    pub seconds: f64,
    /// Most memory at a time, in bytes of resident set; 0 where the system does not tell.
    pub memory_bytes: u64,
    /// Seconds that the rehearsals took.
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
    let started = Instant::now();
    let first = rehearse(config, &Length::shortest(config), parent, cache.clone(), stop.clone()).await?;
    let rehearsed = match first.length_of_second(config) {
        Some(length) => rehearse(config, &length, parent, cache, stop).await?,
        None => first,
    };
    Ok(Ok(Estimate {
        seconds: rehearsed.run_seconds(config),
        memory_bytes: rehearsed.memory_bytes,
        rehearsal_seconds: started.elapsed().as_secs_f64(),
    }))
}

/// How long a rehearsal is.
#[derive(Debug, Clone, PartialEq)]
struct Length {
    /// Steps by stage.
    steps: BTreeMap<String, u64>,
    /// Rollouts of each evaluation, of each kind.
    rollouts: usize,
}

impl Length {
    fn shortest(config: &RunConfig) -> Self {
        let all = config.stage.iter().chain(&config.control);
        let steps = all.map(|stage| (stage.name.clone(), STEPS.min(steps_of(stage).unwrap_or(STEPS)))).collect();
        Self { steps, rollouts: EVALUATION_ROLLOUTS }
    }

    /// The same run, shorter.
    fn of(&self, config: &RunConfig) -> RunConfig {
        let mut config = config.clone();
        // Nobody is to be alarmed by a rehearsal, least of all to stop the run.
        config.alarm.clear();
        for stage in config.stage.iter_mut().chain(&mut config.control) {
            let steps = self.steps.get(&stage.name).copied().unwrap_or(STEPS);
            stage.config.insert(STEPS_KEY.to_owned(), toml::Value::Integer(i64::try_from(steps).unwrap_or(i64::MAX)));
            stage.tokens_of = None;
            stage.sampled_tokens_max = None;
        }
        let evaluation = &mut config.evaluation;
        evaluation.sampled_rollouts = evaluation.sampled_rollouts.min(self.rollouts);
        evaluation.greedy_rollouts = evaluation.greedy_rollouts.min(self.rollouts);
        config
    }
}

/// What a rehearsal took.
struct Rehearsed {
    seconds: f64,
    memory_bytes: u64,
    measured: Measured,
    result: RunResult,
}

async fn rehearse(
    config: &RunConfig,
    length: &Length,
    parent: &Path,
    cache: Option<PathBuf>,
    stop: watch::Receiver<bool>,
) -> Result<Rehearsed, TrainError> {
    let folder = tempfile::Builder::new().prefix(".rehearsal-").tempdir_in(parent).map_err(TrainError::io(parent))?;
    let options = TrainOptions { run: folder.path().join("run"), resume: false, cache };
    let clock = Arc::new(Clock::default());
    forget_peak_memory();
    let started = Instant::now();
    // Boxed: the future of a run is large, and this one is inside the caller's.
    let result = Box::pin(train(length.of(config), options, clock.clone(), stop)).await?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Rehearsed { seconds, memory_bytes: peak_memory_bytes(), measured: clock.measured(), result })
}

impl Rehearsed {
    /// Tokens, of those that a report counts, of a stage's step.
    fn tokens_per_step(&self, name: &str, tokens: impl Fn(&StageReport) -> u64) -> Option<f64> {
        let mut all = self.result.stages.iter().chain(&self.result.controls);
        let report = all.find(|report| report.name == name)?;
        Some(tokens(report) as f64 / report.steps.max(1) as f64)
    }

    /// Steps of a stage's own plan, as far as the tokens reach that its rollouts may draw.
    fn planned_steps(&self, stage: &StageConfig) -> Option<f64> {
        let own = steps_of(stage).map(|steps| steps as f64);
        let reached = stage.sampled_tokens_max.and_then(|most| {
            let of_step = self.tokens_per_step(&stage.name, |report| report.sampled_tokens)?;
            Some((most as f64 / of_step.max(1.0)).ceil())
        });
        own.into_iter().chain(reached).reduce(f64::min)
    }

    /// The same, as far as the tokens reach of the stage that it is compared with.
    fn steps(&self, config: &RunConfig, stage: &StageConfig) -> f64 {
        let trained = |name: &str| self.tokens_per_step(name, |report| report.tokens);
        let allowed = stage.tokens_of.as_ref().and_then(|of| {
            let of = config.stage.iter().find(|stage| stage.name == *of)?;
            Some(self.planned_steps(of)? * trained(&of.name)? / trained(&stage.name)?.max(1.0))
        });
        self.planned_steps(stage).into_iter().chain(allowed).fold(f64::INFINITY, f64::min)
    }

    /// What the whole run will take.
    fn run_seconds(&self, config: &RunConfig) -> f64 {
        // What is done once whatever the length: plugins, datasets, tokenizer.
        let mut seconds = (self.seconds - self.measured.counted_seconds).max(0.0);
        for stage in config.stage.iter().chain(&config.control) {
            let Some(step_seconds) = self.measured.step_seconds(&stage.name) else { continue };
            seconds += self.steps(config, stage) * step_seconds;
        }
        let evaluation = &config.evaluation;
        let kinds = [("sampled", evaluation.sampled_rollouts), ("greedy", evaluation.greedy_rollouts)];
        seconds + kinds.map(|(kind, rollouts)| self.measured.evaluation_seconds(kind, rollouts)).iter().sum::<f64>()
    }

    /// As long as this one's figures allow; `None` when the run is too short for another one.
    fn length_of_second(&self, config: &RunConfig) -> Option<Length> {
        let mut length = Length::shortest(config);
        let seconds = SHARE * self.run_seconds(config);
        // As many rollouts as live at once: they take the memory.
        let of_one: f64 = ["sampled", "greedy"].iter().map(|kind| self.measured.evaluation_seconds(kind, 1)).sum();
        let affordable = usize::try_from(fitting(EVALUATION_SHARE * seconds, of_one)).unwrap_or(usize::MAX);
        length.rollouts = config.rollout.live_max.min(affordable).max(EVALUATION_ROLLOUTS);
        let step_seconds = |name: &str| self.measured.step_seconds(name).unwrap_or(0.0);
        let shortest: f64 = length.steps.iter().map(|(name, steps)| *steps as f64 * step_seconds(name)).sum();
        let mut left = seconds - of_one * length.rollouts as f64 - shortest;
        if left < 0.0 {
            return None;
        }
        let built_upon = config.stage.split_last().map(|(_, before)| before).unwrap_or_default();
        for stage in built_upon {
            let (Some(steps), Some(own)) = (length.steps.get_mut(&stage.name), steps_of(stage)) else { continue };
            let affordable = fitting(left, step_seconds(&stage.name));
            let more = affordable.min((own / STEPS_DIVISOR).saturating_sub(*steps));
            *steps += more;
            left -= more as f64 * step_seconds(&stage.name);
        }
        Some(length)
    }
}

/// How often something that takes so many seconds fits into others.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "what does not fit the integer is its end")]
fn fitting(seconds: f64, each: f64) -> u64 {
    (seconds / each.max(1e-9)) as u64
}

fn steps_of(stage: &StageConfig) -> Option<u64> {
    stage.config.get(STEPS_KEY).and_then(toml::Value::as_integer).and_then(|steps| u64::try_from(steps).ok())
}

fn rehearsable(config: &RunConfig) -> Result<(), NoEstimate> {
    if config.policy.local.is_none() || config.stage.is_empty() {
        return Err(NoEstimate::NothingTrained);
    }
    if config.policy.endpoint.is_some()
        || !config.endpoint.is_empty()
        || config.tools.values().any(|tool| !tool.grants.http.is_empty())
    {
        return Err(NoEstimate::Noticed);
    }
    let unknown = config.stage.iter().chain(&config.control).find(|stage| steps_of(stage).is_none());
    if let Some(stage) = unknown {
        return Err(NoEstimate::StepsUnknown { stage: stage.name.clone() });
    }
    let longest = config.stage.iter().filter_map(steps_of).max().unwrap_or(0);
    if longest < STEPS * STEPS_FOR_EACH_MIN { Err(NoEstimate::Short) } else { Ok(()) }
}

/// Notes when things happen in the rehearsal.
#[derive(Debug, Default)]
struct Clock(Mutex<Measured>);

#[derive(Debug, Clone, Default)]
struct Measured {
    /// Seconds of each step of a stage, with what follows it (a checkpoint) before the next.
    steps: BTreeMap<String, Vec<f64>>,
    /// Kind, rollouts and seconds of each evaluation.
    evaluations: Vec<(&'static str, u64, f64)>,
    /// When the step or the evaluation under way began.
    since: Option<Instant>,
    /// Rollouts of the evaluation under way.
    rollouts: u64,
    /// Seconds of steps and evaluations.
    counted_seconds: f64,
}

impl Clock {
    fn measured(&self) -> Measured {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn event_at(&self, event: ProgressEvent, now: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).event(event, now);
    }
}

impl ProgressSink for Clock {
    fn event(&self, event: ProgressEvent) {
        self.event_at(event, Instant::now());
    }
}

impl Measured {
    fn event(&mut self, event: ProgressEvent, now: Instant) {
        let passed = |measured: &mut Self| {
            let since = measured.since.replace(now).unwrap_or(now);
            let seconds = now.duration_since(since).as_secs_f64();
            measured.counted_seconds += seconds;
            seconds
        };
        match event {
            ProgressEvent::StageStarted { .. } => self.since = Some(now),
            ProgressEvent::StepEnded { stage, .. } => {
                let seconds = passed(self);
                self.steps.entry(stage).or_default().push(seconds);
            }
            ProgressEvent::EvaluationStarted { rollouts, .. } => (self.since, self.rollouts) = (Some(now), rollouts),
            ProgressEvent::EvaluationEnded { kind, .. } => {
                let seconds = passed(self);
                self.evaluations.push((kind, self.rollouts, seconds));
            }
            _ => {}
        }
    }

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

    fn config() -> RunConfig {
        let text = r#"
            name = "a"
            agent.component = "a.wasm"
            dataset.d = { train = "t", test = "t" }
            policy.local.tokenizer.corpus = ["d"]
            rollout.live_max = 100
            evaluation = { dataset = "d", sampled_rollouts = 400, greedy_rollouts = 200 }
            [[stage]]
            name = "one"
            algorithm = "o.wasm"
            dataset = "d"
            config.steps = 600
            [[stage]]
            name = "two"
            algorithm = "t.wasm"
            dataset = "d"
            config.steps = 200
            [[control]]
            name = "three"
            algorithm = "o.wasm"
            dataset = "d"
            start_from = "one"
            tokens_of = "two"
            config.steps = 1_000_000
        "#;
        RunConfig::parse(Path::new("a.toml"), text).unwrap()
    }

    /// A rehearsal in which a step of each stage and a rollout of each evaluation took so many seconds.
    fn rehearsed(length: &Length, step_seconds: &[(&str, f64, u64)], rollout_seconds: f64) -> Rehearsed {
        let (clock, start) = (Clock::default(), Instant::now());
        let mut now = 0.5;
        let at = |seconds| start + Duration::from_secs_f64(seconds);
        let mut reports = vec![];
        for (name, seconds, tokens) in step_seconds {
            let (kind, name) = ("stage", (*name).to_owned());
            clock.event_at(ProgressEvent::StageStarted { kind, name: name.clone(), step: 0, steps: None }, at(now));
            let steps = length.steps[&name];
            for step in 0..steps {
                // The first is slow.
                now += seconds * if step == 0 { 9.0 } else { 1.0 };
                let (stage, scalars) = (name.clone(), BTreeMap::new());
                clock.event_at(ProgressEvent::StepEnded { stage, step, scalars, seconds: 0.0 }, at(now));
            }
            for kind in ["sampled", "greedy"] {
                let rollouts = length.rollouts as u64;
                clock.event_at(ProgressEvent::EvaluationStarted { label: name.clone(), kind, rollouts }, at(now));
                now += rollouts as f64 * rollout_seconds;
                clock.event_at(ProgressEvent::EvaluationEnded { label: name.clone(), kind, mean: 0.0 }, at(now));
            }
            let (tokens, sampled_tokens) = (tokens * steps, 2 * tokens * steps);
            reports.push(StageReport { name, steps, tokens, sampled_tokens, ..Default::default() });
        }
        let controls = reports.split_off(2);
        let result = RunResult { stages: reports, controls, ..Default::default() };
        Rehearsed { seconds: now + 0.5, memory_bytes: 1, measured: clock.measured(), result }
    }

    #[test]
    fn what_was_rehearsed_is_scaled_up_and_the_first_step_left_out() {
        let config = config();
        let run =
            rehearsed(&Length::shortest(&config), &[("one", 0.05, 10), ("two", 0.2, 40), ("three", 0.05, 10)], 0.01);
        // A second outside of steps; the control may use 200 x 40 tokens; three evaluations.
        let want = 1.0 + 600.0 * 0.05 + 200.0 * 0.2 + 800.0 * 0.05 + 3.0 * (400.0 + 200.0) * 0.01;
        let seconds = run.run_seconds(&config);
        assert!((seconds - want).abs() < 1e-6, "{seconds} {want}");
        // A step of the second stage draws 80 tokens: it ends with its 126th, and the control, with 40 for 10, with its 504th.
        let mut bounded = config;
        bounded.stage[1].sampled_tokens_max = Some(10_001);
        let seconds = run.run_seconds(&bounded);
        let want = want - (200.0 - 126.0) * 0.2 - (800.0 - 504.0) * 0.05;
        assert!((seconds - want).abs() < 1e-6, "{seconds} {want}");
    }

    #[test]
    fn the_second_rehearsal_takes_a_tenth_of_the_run_and_mostly_for_what_is_built_upon() {
        let config = config();
        let figures = [("one", 0.1, 10), ("two", 0.2, 40), ("three", 0.05, 10)];
        let first = rehearsed(&Length::shortest(&config), &figures, 0.002);
        let length = first.length_of_second(&config).unwrap();
        assert_eq!((length.rollouts, length.steps["two"], length.steps["three"]), (100, STEPS, STEPS));
        let steps = length.steps["one"];
        let seconds = 0.1 * steps as f64 + (0.2 + 0.05) * STEPS as f64 + 3.0 * 2.0 * 100.0 * 0.002;
        let allowed = SHARE * first.run_seconds(&config);
        assert!(seconds <= allowed && allowed < seconds + 0.1, "{seconds} {allowed}");
        let shorter = length.of(&config);
        assert_eq!(steps_of(&shorter.stage[0]), Some(steps));
        assert_eq!((shorter.evaluation.sampled_rollouts, shorter.control[0].tokens_of.as_ref()), (100, None));

        let never_more_than_a_quarter =
            rehearsed(&Length::shortest(&config), &[("one", 0.001, 1), figures[1], figures[2]], 0.0);
        assert_eq!(never_more_than_a_quarter.length_of_second(&config).unwrap().steps["one"], 150);
        let dear = rehearsed(&Length::shortest(&config), &figures, 0.3);
        assert_eq!(dear.length_of_second(&config).map(|length| length.rollouts), Some(EVALUATION_ROLLOUTS));
        let mut short = config.clone();
        for stage in &mut short.stage {
            stage.config.insert(STEPS_KEY.to_owned(), toml::Value::Integer(20));
        }
        assert_eq!(first.length_of_second(&short), None);
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
