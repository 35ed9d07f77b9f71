//! `fulgurite replay`: runs recorded rollouts again, without any model.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::anyhow;
use fulgurite_core::id::{AttemptKey, AttemptNumber, ContentHash, RolloutId};
use fulgurite_core::record::{RolloutRecord, RolloutSpec};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::Span;
use fulgurite_runner::replay::{Items, Recorded, Regraded, ReplayError, ReplayReport, Replayer};
use fulgurite_sandbox::TapeObserver;
use fulgurite_store::{RolloutQuery, RolloutStore, SledStore};
use fulgurite_trainer::{Exchanged, NewGrader, RunDirectory, open_replayer};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::arguments::{Output, ReplayArguments};
use crate::failure::{Failure, printable};
use crate::rollouts::event_lines;
use crate::terminal::{Style, paint};
use crate::{paths, terminal, train};

/// Gradings at once: graders may wait for their judges.
const REGRADED_AT_ONCE: usize = 64;
/// Rollouts whose records are looked up at once.
const PAGE: usize = 1_000;

/// Loaded conditions by what decides them: rollouts of one run nearly always share them.
type Replayers = BTreeMap<String, Arc<Replayer>>;

pub(crate) async fn replay(arguments: ReplayArguments) -> Result<(), Failure> {
    let run = RunDirectory::new(paths::existing_run(arguments.run.as_deref())?);
    let store: Arc<dyn RolloutStore> = Arc::new(SledStore::open(&run.store()).map_err(Failure::failed)?);
    let keys = keys(&*store, &arguments)?;
    if keys.is_empty() {
        let problem = anyhow!("there is nothing to replay: no finished rollout fits");
        return Err(Failure::usage(problem).hint("`fulgurite rollouts list` lists what there is"));
    }
    if arguments.step {
        return step(&*store, &run, &arguments, keys.first().map(|(key, _)| key)).await;
    }
    let items: BTreeSet<ContentHash> = keys.iter().map(|(_, spec)| spec.item).collect();
    let exchanged = Exchanged {
        agent: arguments.agent.as_deref(),
        grader: arguments.grader.as_deref().map(|file| NewGrader { file, items: &items }),
    };
    let mut replayers = Replayers::new();
    let mut work = vec![];
    for (key, spec) in keys {
        let replayer = replayer(&*store, &run, exchanged, &spec, &mut replayers)?;
        work.push((key, replayer));
    }
    if arguments.grader.is_some() {
        regrade(&store, work, &arguments).await
    } else {
        verify(&store, work, &arguments).await
    }
}

/// The attempts that are meant, with what was asked for.
fn keys(store: &dyn RolloutStore, arguments: &ReplayArguments) -> Result<Vec<(AttemptKey, Arc<RolloutSpec>)>, Failure> {
    let newest = |record: RolloutRecord| {
        let attempt = arguments.attempt.map(AttemptNumber).or(record.attempt)?;
        Some((AttemptKey { rollout: record.spec.id.clone(), attempt }, record.spec))
    };
    if let Some(rollout) = &arguments.rollout {
        let id = RolloutId::new(rollout.as_str()).map_err(Failure::usage)?;
        let record = store.rollout(&id).map_err(Failure::failed)?.ok_or_else(|| {
            Failure::usage(anyhow!("there is no rollout `{id}` in this run"))
                .hint("`fulgurite rollouts list` lists them")
        })?;
        return Ok(newest(record).into_iter().collect());
    }
    let mut keys = vec![];
    let mut offset = 0;
    loop {
        let query = RolloutQuery {
            stage: arguments.stage.clone(),
            step: arguments.training_step,
            offset,
            limit: Some(PAGE),
            ..RolloutQuery::default()
        };
        let page = store.rollouts(&query).map_err(Failure::failed)?;
        let full = page.len() == PAGE;
        keys.extend(page.into_iter().filter(|record| record.state.is_terminal()).filter_map(newest));
        if !full {
            return Ok(keys);
        }
        offset += PAGE;
    }
}

fn replayer(
    store: &dyn RolloutStore,
    run: &RunDirectory,
    exchanged: Exchanged<'_>,
    spec: &RolloutSpec,
    known: &mut Replayers,
) -> Result<Arc<Replayer>, Failure> {
    let key = format!("{:?}/{}/{}", spec.components, spec.execution, spec.resources_version);
    if let Some(replayer) = known.get(&key) {
        return Ok(Arc::clone(replayer));
    }
    let opened = open_replayer(store, run, spec, paths::cache(), exchanged);
    let replayer = Arc::new(opened?);
    known.insert(key, Arc::clone(&replayer));
    Ok(replayer)
}

async fn verify(
    store: &Arc<dyn RolloutStore>,
    work: Vec<(AttemptKey, Arc<Replayer>)>,
    arguments: &ReplayArguments,
) -> Result<(), Failure> {
    let total = work.len();
    let replay = |replayer: Arc<Replayer>, recorded| async move { replayer.replay(&recorded, None).await };
    let reports = each(store, work, threads(), replay).await;
    let (mut identical, mut problems) = (0, 0);
    for (key, report) in reports {
        match report {
            Ok(report) if report.divergence.is_none() => {
                identical += 1;
                if total == 1 || arguments.output == Output::Json {
                    print_report(&report, arguments.output)?;
                }
            }
            Ok(report) => {
                problems += 1;
                print_report(&report, arguments.output)?;
            }
            Err(error) => {
                problems += 1;
                print_error(&key, &error, arguments.output)?;
            }
        }
    }
    if total > 1 {
        eprintln!("{identical} of {total} rollouts are identical");
    }
    if problems == 0 {
        Ok(())
    } else {
        Err(Failure::failed(anyhow!("{problems} of {total} rollouts are not identical")))
    }
}

/// Replays at once: as many as there are threads. A replay never waits, so more would only push each other out of the caches.
pub(crate) fn threads() -> usize {
    tokio::runtime::Handle::current().metrics().num_workers()
}

/// Does something with each recording, several at once; results come in the order of the list.
pub(crate) async fn each<T, F>(
    store: &Arc<dyn RolloutStore>,
    work: Vec<(AttemptKey, Arc<Replayer>)>,
    at_once: usize,
    what: impl Fn(Arc<Replayer>, Recorded) -> F + Clone + Send + 'static,
) -> Vec<(AttemptKey, Result<T, ReplayError>)>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (work, next, items) = (Arc::new(work), Arc::new(AtomicUsize::new(0)), Arc::new(Items::default()));
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {per_sec}, {eta} left");
    let bar = ProgressBar::with_draw_target(Some(work.len() as u64), ProgressDrawTarget::stderr());
    let bar = style.map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style));
    let workers = (0..at_once.clamp(1, work.len().max(1))).map(|_| {
        let bar = bar.clone();
        let (store, work, next) = (Arc::clone(store), Arc::clone(&work), Arc::clone(&next));
        let (items, what) = (Arc::clone(&items), what.clone());
        tokio::spawn(async move {
            let mut done = vec![];
            loop {
                let place = next.fetch_add(1, Ordering::Relaxed);
                let Some((key, replayer)) = work.get(place) else { return done };
                let result = match Recorded::load(&*store, key, &items) {
                    Ok(recorded) => Ok(what(Arc::clone(replayer), recorded).await),
                    Err(error) => Err(error),
                };
                done.push((place, result));
                bar.inc(1);
                tokio::task::yield_now().await;
            }
        })
    });
    let mut done: BTreeMap<usize, Result<T, ReplayError>> = BTreeMap::new();
    for worker in workers.collect::<Vec<_>>() {
        done.extend(worker.await.unwrap_or_default());
    }
    bar.finish_and_clear();
    let lost = || Err(ReplayError::Conditions("the replay's worker was lost".to_owned()));
    let keys = work.iter().map(|(key, _)| key.clone()).enumerate();
    keys.map(|(place, key)| (key, done.remove(&place).unwrap_or_else(lost))).collect()
}

fn print_report(report: &ReplayReport, output: Output) -> Result<(), Failure> {
    let divergence = report.divergence.as_ref();
    if output == Output::Json {
        return train::print_json(&serde_json::json!({
            "rollout": report.attempt.rollout,
            "attempt": report.attempt.attempt,
            "identical": divergence.is_none(),
            "events": report.events,
            "same": report.same,
            "outcome": report.outcome,
            "divergence": divergence.map(|found| serde_json::json!({
                "event": found.sequence,
                "what": found.what,
                "detail": found.detail,
                "recorded": found.recorded,
                "replayed": found.replayed,
            })),
        }));
    }
    let colours = terminal::colours();
    let Some(found) = divergence else {
        let line = format!("{}: all {} events are identical", report.attempt, report.events);
        terminal::print(&paint(&line, Style::Green, colours));
        return Ok(());
    };
    let line =
        format!("{}: diverges at event {} of {}: {}", report.attempt, found.sequence, report.events, found.detail);
    terminal::print(&paint(&printable(&line), Style::Red, colours));
    for (title, span) in [("recorded", &found.recorded), ("replayed", &found.replayed)] {
        terminal::print(&format!("  {title}:"));
        match span {
            Some(span) => print_event(span, "    ", colours),
            None => terminal::print("    nothing"),
        }
    }
    Ok(())
}

fn print_event(span: &Span, indent: &str, colours: bool) {
    for line in event_lines(span, colours) {
        terminal::print(&format!("{indent}{line}"));
    }
}

fn print_error(key: &AttemptKey, error: &ReplayError, output: Output) -> Result<(), Failure> {
    if output == Output::Json {
        return train::print_json(&serde_json::json!({
            "rollout": key.rollout, "attempt": key.attempt, "identical": false, "error": error.to_string(),
        }));
    }
    terminal::print(&format!("{key}: {}", printable(&error.to_string())));
    Ok(())
}

/// Walks through one recording: the guest waits at every event until somebody presses Enter.
async fn step(
    store: &dyn RolloutStore,
    run: &RunDirectory,
    arguments: &ReplayArguments,
    key: Option<&AttemptKey>,
) -> Result<(), Failure> {
    let key = key.ok_or_else(|| Failure::usage(anyhow!("--step needs a rollout")))?;
    let recorded = Recorded::load(store, key, &Items::default()).map_err(Failure::failed)?;
    let exchanged = Exchanged { agent: arguments.agent.as_deref(), grader: None };
    let replayer = replayer(store, run, exchanged, &recorded.spec, &mut Replayers::new())?;
    let colours = terminal::colours();
    let asks = std::io::stdin().is_terminal();
    let observer: TapeObserver = Arc::new(move |span: &Span| {
        terminal::print(&paint(&format!("event {}", span.sequence), Style::Dim, colours));
        print_event(span, "  ", colours);
        if asks {
            eprint!("Enter for the next event ");
            let mut line = String::new();
            // At the end of the input the rest runs through.
            let _ = std::io::stdin().lock().read_line(&mut line);
        }
    });
    let report = replayer.replay(&recorded, Some(observer)).await;
    print_report(&report, Output::Text)?;
    match report.divergence {
        None => Ok(()),
        Some(found) => Err(Failure::failed(anyhow!("the replay diverges at event {}", found.sequence))),
    }
}

async fn regrade(
    store: &Arc<dyn RolloutStore>,
    work: Vec<(AttemptKey, Arc<Replayer>)>,
    arguments: &ReplayArguments,
) -> Result<(), Failure> {
    let total = work.len();
    let regrade = |replayer: Arc<Replayer>, recorded| async move { replayer.regrade(&recorded).await };
    let regraded = each(store, work, REGRADED_AT_ONCE, regrade).await;
    let (mut changed, mut skipped, mut faults) = (0, 0, 0);
    let (mut before_sum, mut after_sum, mut graded) = (0.0, 0.0, 0_u64);
    if arguments.output == Output::Text {
        terminal::print(&format!(
            "{:<32} {:<16} {:>9} {:>9} {:>9}  note",
            "rollout", "item", "before", "after", "change"
        ));
    }
    for (key, result) in regraded {
        let regraded = match result.and_then(|inner| inner) {
            Ok(regraded) => regraded,
            Err(error) => {
                skipped += 1;
                if total == 1 {
                    return Err(Failure::failed(error));
                }
                tracing::debug!(rollout = %key, error = %error, "not graded anew");
                continue;
            }
        };
        let before = total_of(&regraded.before, &arguments.dimension);
        let after = regraded.after.as_ref().ok().map(|rewards| total_of(rewards, &arguments.dimension));
        if let Some(after) = after {
            before_sum += before;
            after_sum += after;
            graded += 1;
        } else {
            faults += 1;
        }
        let differs = after.is_none_or(|after| after.to_bits() != before.to_bits());
        changed += usize::from(differs);
        if differs || total == 1 || arguments.output == Output::Json {
            print_regraded(&regraded, before, after, arguments.output)?;
        }
    }
    let mean = |sum: f64| if graded == 0 { 0.0 } else { sum / graded as f64 };
    eprintln!(
        "{changed} of {} rewards change; mean {:.4} before, {:.4} after; {faults} faults of the new grader; \
         {skipped} rollouts are not graded",
        total - skipped,
        mean(before_sum),
        mean(after_sum)
    );
    Ok(())
}

fn total_of(rewards: &[Reward], dimension: &str) -> f64 {
    rewards.iter().filter(|reward| reward.dimension == dimension).map(|reward| reward.value).sum()
}

fn print_regraded(regraded: &Regraded, before: f64, after: Option<f64>, output: Output) -> Result<(), Failure> {
    if output == Output::Json {
        return train::print_json(&serde_json::json!({
            "rollout": regraded.attempt.rollout,
            "attempt": regraded.attempt.attempt,
            "item": regraded.item_id,
            "before": regraded.before,
            "after": regraded.after.as_ref().ok(),
            "fault": regraded.after.as_ref().err(),
        }));
    }
    let note = match &regraded.after {
        Ok(rewards) => rewards.iter().find_map(|reward| reward.feedback.clone()).unwrap_or_default(),
        Err(fault) => format!("{}: {}", fault.kind.as_str(), fault.detail),
    };
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
    terminal::print(&format!(
        "{:<32} {:<16} {:>9} {:>9} {:>9}  {}",
        regraded.attempt.rollout.as_str(),
        printable(&regraded.item_id),
        number(Some(before)),
        number(after),
        number(after.map(|after| after - before)),
        printable(&note),
    ));
    Ok(())
}
