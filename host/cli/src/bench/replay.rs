//! `fulgurite bench replay`: how many recorded rollouts a second are run again and found identical.

use std::sync::Arc;
use std::time::Instant;

use fulgurite_core::id::{AttemptKey, AttemptNumber};
use fulgurite_core::record::ExecutionSettings;
use fulgurite_runner::Recording;
use fulgurite_runner::replay::Replayer;
use fulgurite_store::{RolloutStore, SledStore};

use crate::arguments::{BenchReplayArguments, Output};
use crate::bench::load::{Components, Load, LoadSettings, Scratch};
use crate::bench::setup;
use crate::failure::Failure;
use crate::replay::{each, threads};
use crate::{terminal, train};

pub(crate) fn bench(arguments: &BenchReplayArguments) -> Result<(), Failure> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(arguments.load.threads).enable_all().build();
    runtime.map_err(Failure::failed)?.block_on(run(arguments))
}

async fn run(arguments: &BenchReplayArguments) -> Result<(), Failure> {
    let scratch = Scratch::new(arguments.load.scratch.as_deref().unwrap_or(&std::env::temp_dir()))?;
    let store: Arc<dyn RolloutStore> =
        Arc::new(SledStore::open(&scratch.path().join("store")).map_err(Failure::failed)?);
    let settings = LoadSettings { live_max: 256, latency_ms: 0, graded: true, recording: Recording::Durable };
    let components = Components::of(&arguments.load);
    let load = Load::new(&components, Arc::clone(&store), &settings)?;
    eprintln!("recording {} rollouts", arguments.rollouts);
    let jobs = load.jobs(0..arguments.rollouts)?;
    let keys: Vec<AttemptKey> =
        jobs.iter().map(|job| AttemptKey { rollout: job.spec.id.clone(), attempt: AttemptNumber::FIRST }).collect();
    let batch = load.runner.submit(jobs, Arc::clone(&load.backend)).await.map_err(Failure::failed)?;
    let recorded = batch.all().await.map_err(Failure::failed)?.len();

    let bytes = store.blob(&load.runner.execution_hash()).map_err(Failure::failed)?.unwrap_or_default();
    let execution: ExecutionSettings = serde_json::from_slice(&bytes).map_err(Failure::failed)?;
    let replayer = Replayer::new(load.runner.plugins().clone(), &execution, 0).map_err(Failure::failed)?;
    let replayer = Arc::new(replayer);
    eprintln!("replaying {recorded} rollouts");
    let work = keys.into_iter().map(|key| (key, Arc::clone(&replayer))).collect();
    let started = Instant::now();
    // Reading the recording from the store is a part of it.
    let replay = |replayer: Arc<Replayer>, recorded| async move { replayer.replay(&recorded, None).await };
    let reports = each(&store, work, threads(), replay).await;
    let identical =
        reports.iter().filter(|(_, report)| report.as_ref().is_ok_and(|report| report.divergence.is_none()));
    let identical = identical.count();
    let rate = recorded as f64 / started.elapsed().as_secs_f64();
    if arguments.load.output == Output::Json {
        return train::print_json(&serde_json::json!({
            "setup": setup(arguments.load.threads),
            "replays_per_second": rate,
            "replayed": recorded,
            "identical": identical,
        }));
    }
    terminal::print(&format!("{}", setup(arguments.load.threads)));
    terminal::print(&format!("{identical} of {recorded} identical, {rate:.0} replays a second"));
    Ok(())
}
