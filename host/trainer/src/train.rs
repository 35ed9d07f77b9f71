//! One training run: initial evaluation, stages, controls, baselines; a checkpoint after each of them and inside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fulgurite_core::algorithm::StepResult;
use fulgurite_core::id::PolicyVersion;
use fulgurite_policy::PolicyEngine;
use fulgurite_sandbox::AlgorithmPlugin;
use tokio::sync::watch;

use crate::alarm::{self, Alarms};
use crate::checkpoint::{Checkpoint, Checkpoints, Progress, Totals};
use crate::config::{RunConfig, StageConfig};
use crate::error::TrainError;
use crate::evaluate::Evaluation;
use crate::host::{EndedStep, StageHost, StageState};
use crate::metrics::{self, MetricRow, MetricWriter};
use crate::pinned_policy::PinnedPolicy;
use crate::plot;
use crate::progress::{ProgressEvent, ProgressSink};
use crate::report::{RunResult, StageReport};
use crate::run_directory::{RunDirectory, publish_folder, temporary_folder, write_atomically};
use crate::setup::{Setup, scripted};
use crate::trail::TrailWriter;

/// How to run.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// The run's folder.
    pub run: PathBuf,
    /// Go on with what is there instead of starting.
    pub resume: bool,
    /// Folder of compiled components; `None` compiles anew. Must be private: its content is trusted.
    pub cache: Option<PathBuf>,
}

/// The name under which the weights are kept that a run begins with.
pub const INITIAL: &str = "initial";

/// A piece of the plan.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Initial,
    Stage(usize),
    Control(usize),
    Baseline(usize),
}

/// Trains: runs the plan of a config to its end, from the start or from the newest checkpoint.
///
/// # Errors
/// See [`TrainError`]. Whatever was committed stays on disk.
pub async fn train(
    config: RunConfig,
    options: TrainOptions,
    progress: Arc<dyn ProgressSink>,
    stop: watch::Receiver<bool>,
) -> Result<RunResult, TrainError> {
    let run = RunDirectory::new(&options.run);
    let text = resolved(&config);
    check(&run, &text, options.resume)?;
    let setup = Setup::new(config, run, options.cache, None).await?;
    // The last thing before work begins: a start that failed leaves nothing that would have to be resumed.
    let path = setup.run.config();
    write_atomically(&path, text.as_bytes()).map_err(TrainError::io(&path))?;
    if let Some(engine) = setup.model.engine() {
        PinnedPolicy::of(engine).keep(&setup.run)?;
    }
    let checkpoints = Checkpoints::new(setup.run.checkpoints(), setup.config.checkpoint.keep);
    let checkpoint = if options.resume { checkpoints.newest()? } else { None };
    let mut state = Progress::default();
    let mut plugin_state = None;
    if let Some(Checkpoint { path, progress: saved, plugin_state: saved_plugin }) = checkpoint {
        if let Some(engine) = setup.model.engine() {
            engine.restore(&path).await?;
        }
        progress.event(ProgressEvent::Resumed { units_done: saved.units_done, step: saved.step });
        state = saved;
        plugin_state = saved_plugin;
    }
    let metrics_path = setup.run.metrics();
    let writer = MetricWriter::open(&setup.run, state.metrics_bytes).map_err(TrainError::io(&metrics_path))?;
    let trail_path = setup.run.trail();
    let trail = TrailWriter::open(&trail_path, state.trail_bytes).map_err(TrainError::io(&trail_path))?;
    let mut training = Training { setup, checkpoints, writer, trail, state, progress, stop };
    for unit in training.plan().into_iter().skip(training.state.units_done) {
        training.unit(unit, plugin_state.take()).await?;
    }
    training.result()
}

/// Checks that the folder is free, or holds the run to go on with.
fn check(run: &RunDirectory, text: &str, resume: bool) -> Result<(), TrainError> {
    let path = run.config();
    match (path.exists(), resume) {
        (true, false) => Err(TrainError::RunExists { path: run.root().to_path_buf() }),
        (false, true) => Err(TrainError::NothingToResume { path: run.root().to_path_buf() }),
        (false, false) => Ok(()),
        (true, true) => {
            let stored = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
            if stored == text { Ok(()) } else { Err(TrainError::ConfigChanged { path }) }
        }
    }
}

/// The config as it was resolved, in a stable form.
fn resolved(config: &RunConfig) -> String {
    toml::to_string(config).unwrap_or_else(|error| format!("# {error}\n"))
}

struct Training {
    setup: Setup,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    trail: TrailWriter,
    state: Progress,
    progress: Arc<dyn ProgressSink>,
    stop: watch::Receiver<bool>,
}

impl Training {
    fn plan(&self) -> Vec<Unit> {
        let config = &self.setup.config;
        let mut plan = vec![Unit::Initial];
        plan.extend((0..config.stage.len()).map(Unit::Stage));
        plan.extend((0..config.control.len()).map(Unit::Control));
        plan.extend((0..config.baseline.len()).map(Unit::Baseline));
        plan
    }

    async fn unit(&mut self, unit: Unit, plugin_state: Option<Vec<u8>>) -> Result<(), TrainError> {
        let config = self.setup.config.clone();
        let report = match unit {
            Unit::Initial => {
                self.save_policy(INITIAL).await?;
                self.evaluated("initial", INITIAL, String::new(), 0).await?
            }
            Unit::Stage(index) => match config.stage.get(index) {
                Some(stage) => self.stage("stage", stage, plugin_state).await?,
                None => return Ok(()),
            },
            Unit::Control(index) => match config.control.get(index) {
                Some(control) => self.stage("control", control, plugin_state).await?,
                None => return Ok(()),
            },
            Unit::Baseline(index) => match config.baseline.get(index) {
                Some(baseline) => {
                    let backend = scripted(&baseline.name, &baseline.script, &self.setup.test_items)?;
                    let evaluator = self.setup.evaluator(&*self.progress);
                    let sampling = &config.rollout.sampling;
                    let found =
                        evaluator.evaluate(&baseline.name, sampling, &backend, PolicyVersion::default()).await?;
                    report("baseline", &baseline.name, String::new(), 0, Totals::default(), found, None)
                }
                None => return Ok(()),
            },
        };
        let report = StageReport { alarms: std::mem::take(&mut self.state.alarms).raised, ..report };
        self.state.reports.push(report);
        self.state.units_done += 1;
        self.state.step = 0;
        self.state.cursors.clear();
        self.state.snapshots = 0;
        self.state.carried.clear();
        self.state.totals = Totals::default();
        self.checkpoint(None).await
    }

    async fn evaluated(
        &self,
        kind: &str,
        name: &str,
        algorithm: String,
        steps: u64,
    ) -> Result<StageReport, TrainError> {
        let evaluator = self.setup.evaluator(&*self.progress);
        let engine = self.setup.model.engine();
        let version = engine.map(PolicyEngine::version).unwrap_or_default();
        let sampling = &self.setup.config.rollout.sampling;
        let found = evaluator.evaluate(name, sampling, &self.setup.model.backend().await?, version).await?;
        let weights = engine.map(|engine| engine.weights_hash().to_string());
        let beside = engine.into_iter().flat_map(PolicyEngine::all);
        let model_weights =
            beside.filter_map(|model| Some((model.name()?.to_owned(), model.weights_hash().to_string())));
        let report = report(kind, name, algorithm, steps, self.state.totals, found, weights);
        Ok(StageReport { model_weights: model_weights.collect(), ..report })
    }

    /// Runs one algorithm until it says that it is done.
    async fn stage(
        &mut self,
        kind: &'static str,
        stage: &StageConfig,
        plugin_state: Option<Vec<u8>>,
    ) -> Result<StageReport, TrainError> {
        let Some(engine) = self.setup.model.engine().cloned() else {
            return Ok(report(kind, &stage.name, String::new(), 0, Totals::default(), Evaluation::default(), None));
        };
        if plugin_state.is_none() {
            // A fresh start, or a crash before the first checkpoint of the unit.
            if let Some(name) = &stage.start_from {
                engine.restore(&self.setup.run.policy(name)).await?;
            }
            engine.reset_optimiser().await?;
        }
        let missing = || TrainError::MissingSplit { dataset: stage.dataset.clone(), split: "train" };
        let dataset = Arc::clone(self.setup.datasets.get(&stage.dataset).ok_or_else(missing)?);
        let Some(plugin) = self.setup.algorithms.get(&stage.algorithm).cloned() else {
            return Err(missing());
        };
        let state = StageState::resumed(&self.state, &self.setup.config);
        let config = &self.setup.config;
        let host = Arc::new(StageHost::new(
            self.setup.runner.clone(),
            engine,
            self.setup.model.clone(),
            dataset,
            stage.clone(),
            config,
            self.setup.resources_version,
            self.setup.seed.child("stage").child(&stage.name),
            self.stop.clone(),
            state,
            self.state.carried.clone(),
        ));
        let steps = stage.config.get("steps").and_then(toml::Value::as_integer).and_then(|n| u64::try_from(n).ok());
        self.progress.event(ProgressEvent::StageStarted {
            kind,
            name: stage.name.clone(),
            step: self.state.step,
            steps,
        });
        let (algorithm, plugin_share) = self.steps(stage, &plugin, &host, plugin_state).await?;
        self.progress.event(ProgressEvent::StageEnded {
            name: stage.name.clone(),
            steps: self.state.step,
            seconds: self.state.totals.seconds,
            plugin_share,
        });
        self.save_policy(&stage.name).await?;
        self.plot()?;
        let steps = self.state.step;
        self.evaluated(kind, &stage.name, algorithm, steps).await
    }

    /// Calls `step` until the plugin is done or a token budget is used up. Returns the plugin's name, and how much of the
    /// steps' time was its own.
    async fn steps(
        &mut self,
        stage: &StageConfig,
        plugin: &AlgorithmPlugin,
        host: &Arc<StageHost>,
        plugin_state: Option<Vec<u8>>,
    ) -> Result<(String, f64), TrainError> {
        let failed = |step: u64| {
            let stage = stage.name.clone();
            move |source| TrainError::Algorithm { stage, step, source }
        };
        let started = Instant::now();
        let described = plugin.describe().await.map_err(failed(self.state.step))?;
        let limits = &self.setup.config.limits;
        let host_side = Arc::clone(host) as Arc<dyn fulgurite_core::algorithm::AlgorithmHost>;
        let mut instance =
            plugin.start(stage.settings(), plugin_state, host_side, limits).await.map_err(failed(self.state.step))?;
        let alarms = Alarms::of_stage(&self.setup.config.alarm, &stage.name);
        let budget = stage.tokens_of.as_ref().and_then(|name| {
            self.state.reports.iter().find(|report| report.kind == "stage" && report.name == *name).map(|r| r.tokens)
        });
        self.state.totals.seconds += started.elapsed().as_secs_f64();
        let (mut steps_seconds, mut plugin_seconds) = (0.0, 0.0);
        let is_spent = |totals: &Totals| {
            budget.is_some_and(|tokens| totals.tokens >= tokens)
                || stage.sampled_tokens_max.is_some_and(|most| totals.sampled_tokens >= most)
        };
        while !is_spent(&self.state.totals) {
            let (started, used_before_us) = (Instant::now(), instance.guest_cpu_us());
            let result = instance.step().await;
            if *self.stop.borrow() {
                // Whatever the plugin made of it: the step is not committed, and will be repeated.
                return Err(TrainError::Stopped);
            }
            if let Some(error) = host.take_failure() {
                // Whatever the plugin made of it.
                return Err(error);
            }
            let result = result.map_err(failed(self.state.step))?;
            let EndedStep { mut scalars, mut notes, carried, repeats, trail } = host.end_step().await;
            self.state.carried = carried;
            let step = self.state.step;
            {
                let state = host.state();
                self.state.cursors.clone_from(&state.cursors);
                self.state.snapshots = state.snapshots;
                let seconds = self.state.totals.seconds;
                self.state.totals = Totals { seconds, ..state.totals };
            }
            scalars.insert("tokens_total".to_owned(), self.state.totals.tokens as f64);
            scalars.insert("sampled_tokens_total".to_owned(), self.state.totals.sampled_tokens as f64);
            scalars.insert("rollouts_total".to_owned(), self.state.totals.rollouts as f64);
            let raised = alarms.check(&mut self.state.alarms, step, &scalars);
            notes.extend(raised.iter().map(|alarm| format!("alarm: {}", alarm.text)));
            let row = MetricRow { stage: stage.name.clone(), step, scalars, notes };
            let seconds = started.elapsed().as_secs_f64();
            let plugin = instance.guest_cpu_us().saturating_sub(used_before_us) as f64 / 1e6;
            let timings = BTreeMap::from([("step", seconds), ("plugin", plugin)]);
            steps_seconds += seconds;
            plugin_seconds += plugin;
            self.writer.write(&row, &timings).map_err(TrainError::io(self.setup.run.metrics()))?;
            if let Some(mut trail) = trail {
                (trail.stage, trail.step) = (stage.name.clone(), step);
                (trail.algorithm, trail.version) = (described.name.clone(), described.version.clone());
                self.trail.write(&trail).map_err(TrainError::io(self.setup.run.trail()))?;
            }
            self.state.step += 1;
            self.progress.event(ProgressEvent::StepEnded {
                stage: stage.name.clone(),
                step,
                scalars: row.scalars,
                seconds,
            });
            for alarm in &raised {
                let (stage, text) = (&stage.name, &alarm.text);
                self.progress.event(ProgressEvent::Note(format!("alarm: {stage} step {step}: {text}")));
            }
            let stops = raised.into_iter().find(|alarm| alarm.stops);
            let is_due =
                !repeats || stops.is_some() || self.state.step.is_multiple_of(self.setup.config.checkpoint.every_steps);
            if result == StepResult::Continue && is_due {
                let saved = instance.save().await.map_err(failed(self.state.step))?;
                self.state.totals.seconds += started.elapsed().as_secs_f64();
                self.checkpoint(Some(&saved)).await?;
            } else {
                self.state.totals.seconds += started.elapsed().as_secs_f64();
            }
            // Behind a stage's last step there is nothing left to stop.
            if let Some(alarm) = stops.filter(|_| result == StepResult::Continue) {
                return Err(TrainError::Alarm { stage: stage.name.clone(), step, text: alarm.text });
            }
            if result == StepResult::Done {
                break;
            }
        }
        Ok((described.name, if steps_seconds > 0.0 { plugin_seconds / steps_seconds } else { 0.0 }))
    }

    /// Commits where the run stands.
    async fn checkpoint(&mut self, plugin_state: Option<&[u8]>) -> Result<(), TrainError> {
        self.state.trail_bytes = self.trail.sync().map_err(TrainError::io(self.setup.run.trail()))?;
        self.state.metrics_bytes = self.writer.sync().map_err(TrainError::io(self.setup.run.metrics()))?;
        let temporary = self.checkpoints.prepare()?;
        if let Some(engine) = self.setup.model.engine() {
            engine.save(&temporary).await?;
        }
        self.checkpoints.commit(&temporary, &self.state, plugin_state)?;
        Ok(())
    }

    async fn save_policy(&self, name: &str) -> Result<(), TrainError> {
        let Some(engine) = self.setup.model.engine() else { return Ok(()) };
        let path = self.setup.run.policy(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(TrainError::io(parent))?;
        }
        let temporary = temporary_folder(&path).map_err(TrainError::io(&path))?;
        engine.save(&temporary).await?;
        publish_folder(&temporary, &path).map_err(TrainError::io(&path))
    }

    fn plot(&self) -> Result<(), TrainError> {
        let path = self.setup.run.metrics();
        let rows = metrics::read(&path).map_err(TrainError::io(&path))?;
        let title = format!("{}, seed {}", self.setup.config.name, self.setup.config.seed);
        plot::draw(&self.setup.run.plot(), &title, &rows)?;
        Ok(())
    }

    /// Says which of the config's alarms had nothing to watch.
    fn tell_unseen_alarms(&self) -> Result<(), TrainError> {
        if self.setup.config.alarm.is_empty() {
            return Ok(());
        }
        let path = self.setup.run.metrics();
        let rows = metrics::read(&path).map_err(TrainError::io(&path))?;
        let unseen = alarm::never_seen(&self.setup.config.alarm, |alarm| {
            let of_stage = |row: &&MetricRow| alarm.stage.as_ref().is_none_or(|stage| *stage == row.stage);
            rows.iter().filter(of_stage).any(|row| row.scalars.contains_key(&alarm.metric))
        });
        for text in unseen {
            self.progress.event(ProgressEvent::Note(text));
        }
        Ok(())
    }

    fn result(self) -> Result<RunResult, TrainError> {
        self.tell_unseen_alarms()?;
        let shown = shown(self.setup.run.root());
        let result = RunResult::new(shown, self.setup.config.seed, &self.state.reports);
        let path = self.setup.run.result();
        let text = serde_json::to_vec_pretty(&result).unwrap_or_default();
        write_atomically(&path, &text).map_err(TrainError::io(&path))?;
        Ok(result)
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn report(
    kind: &str,
    name: &str,
    algorithm: String,
    steps: u64,
    totals: Totals,
    evaluation: Evaluation,
    weights: Option<String>,
) -> StageReport {
    StageReport {
        kind: kind.to_owned(),
        name: name.to_owned(),
        algorithm,
        steps,
        held_out_greedy: evaluation.greedy.mean,
        held_out_sampled: evaluation.sampled.mean,
        malformed: evaluation.sampled.policy_fault_share,
        seconds: totals.seconds,
        rollouts: totals.rollouts,
        tokens: totals.tokens,
        sampled_tokens: totals.sampled_tokens,
        failed: totals.failed,
        weights,
        model_weights: BTreeMap::new(),
        alarms: vec![],
        evaluation,
    }
}
