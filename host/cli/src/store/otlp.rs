//! Traces in OpenTelemetry's form, from and to a store.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::anyhow;
use fulgurite_core::dataset::Split;
use fulgurite_core::id::{AttemptKey, PolicyVersion, RolloutId};
use fulgurite_core::llm::Sampling;
use fulgurite_core::outcome::AttemptOutcome;
use fulgurite_core::record::{RolloutMode, RolloutSpec};
use fulgurite_core::seed::Seed;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{AttemptFinish, AttemptQuery, Enqueued, RolloutStore, SledStore, unknown_content};
use fulgurite_telemetry::{Collected, CollectedTrace, Recorder, export_json};

use super::{failure, write_line};
use crate::failure::Failure;

/// Stage of what was imported.
const STAGE: &str = "import";
/// Traces in one commit.
const TRACES_PER_COMMIT: usize = 256;

/// What an import has brought.
#[derive(Debug, Default)]
pub(super) struct Imported {
    pub(super) rollouts: u64,
    pub(super) spans: u64,
    pub(super) existing: u64,
}

/// Writes one line for each attempt that has spans; returns their number.
pub(super) fn export(
    store: &SledStore,
    run: &Path,
    to: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, Failure> {
    let name = run.file_name().map_or_else(|| run.display().to_string(), |name| name.to_string_lossy().into_owned());
    let recorder = Recorder { run: name, version: env!("CARGO_PKG_VERSION").to_owned() };
    let mut lines = 0;
    let mut query = AttemptQuery::default();
    loop {
        let page = store.attempt_page(&query).map_err(failure)?;
        for attempt in page.items.iter().filter(|attempt| attempt.spans > 0) {
            let spans = store.spans(&attempt.key).map_err(failure)?;
            write_line(to, &export_json(&recorder, &spans).map_err(Failure::failed)?)?;
            lines += 1;
            progress(lines);
        }
        match page.next {
            Some(next) => query.after = Some(next),
            None => return to.flush().map(|()| lines).map_err(Failure::failed),
        }
    }
}

/// Takes every trace of a file into a store as a finished rollout.
pub(super) fn import(
    store: &Path,
    from: &mut dyn BufRead,
    name: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<Imported, Failure> {
    let mut collected = Collected::default();
    let mut text = String::new();
    for line in 1_u64.. {
        text.clear();
        let wrong = |problem: String| {
            let hint = "each line is one ExportTraceServiceRequest in JSON; an export of Fulgurite is `--format jsonl`";
            Failure::usage(anyhow!("{name} line {line}: {problem}")).hint(hint)
        };
        if from.read_line(&mut text).map_err(|error| wrong(format!("it cannot be read: {error}")))? == 0 {
            break;
        }
        if !text.trim().is_empty() {
            collected.add_json(&text).map_err(|error| wrong(error.to_string()))?;
        }
        progress(line);
    }
    // All lines are right, so the store is touched only now.
    let store = SledStore::open(store).map_err(failure)?;
    let mut imported = Imported::default();
    for traces in collected.into_traces().chunks(TRACES_PER_COMMIT) {
        take(&store, traces, &mut imported)?;
    }
    Ok(imported)
}

fn take(store: &SledStore, traces: &[CollectedTrace], imported: &mut Imported) -> Result<(), Failure> {
    let specs: Vec<Arc<RolloutSpec>> = traces.iter().map(spec).collect::<Result<_, _>>()?;
    let mut finishes = vec![];
    for (trace, enqueued) in traces.iter().zip(store.enqueue(specs).map_err(failure)?) {
        match enqueued {
            Enqueued::Existing(record) if record.state.is_terminal() => imported.existing += 1,
            Enqueued::Existing(record) | Enqueued::New(record) => {
                let key = store.begin_attempt(&record.spec.id, trace.start_ns(), "").map_err(failure)?.key;
                store.mark_running(&key).map_err(failure)?;
                let finish = finish(key, trace);
                imported.rollouts += 1;
                imported.spans += finish.spans.len() as u64;
                finishes.push(finish);
            }
        }
    }
    store.finish_attempts(finishes).into_iter().collect::<Result<Vec<()>, _>>().map_err(failure)?;
    Ok(())
}

fn spec(trace: &CollectedTrace) -> Result<Arc<RolloutSpec>, Failure> {
    let spec = RolloutSpec {
        id: RolloutId::new(format!("otlp-{}", trace.trace_id)).map_err(Failure::failed)?,
        stage: STAGE.to_owned(),
        step: 0,
        group: 0,
        dataset: STAGE.to_owned(),
        split: Split::Test,
        item_id: trace.trace_id.to_string(),
        // Never trained on: no mode but this one, no LLM calls, no rewards.
        mode: RolloutMode::Test,
        seed: Seed::new(0),
        sampling: Sampling::default(),
        policy_version: PolicyVersion(0),
        resources_version: 0,
        components: vec![],
        item: unknown_content(),
        execution: unknown_content(),
        fork_of: None,
    };
    Ok(Arc::new(spec))
}

fn finish(key: AttemptKey, trace: &CollectedTrace) -> AttemptFinish {
    AttemptFinish {
        spans: trace.spans(&key).into(),
        key,
        state: AttemptState::Succeeded,
        outcome: AttemptOutcome::completed("null".to_owned()),
        rewards: vec![],
        end_unix_ns: trace.end_ns().max(1),
        guest_cpu_us: 0,
        not_forkable: Some("it was not run here".to_owned()),
        rollout_state: RolloutState::Succeeded,
    }
}
