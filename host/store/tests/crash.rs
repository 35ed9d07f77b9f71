//! Durability: a child process writes and says what was acknowledged, dies by SIGKILL at a random moment, and everything
//! it had said is there. The same directory goes through all the kills, so recovery from recovery is covered too.
//!
//! The parent alone judges, and from what it was told alone: the child has no say in what must be there.
//!
//! This cannot show the difference between a flush to the kernel and one to the disk: that would take a power cut.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/samples.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod samples;

use std::sync::Arc;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fulgurite_core::id::{AttemptKey, RolloutId};
use fulgurite_core::record::RolloutSpec;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{AttemptFinish, RolloutQuery, RolloutStore, SledStore, StoreError};
use samples::{key, outcome, reward, spans, spec};

const DIR: &str = "FULGURITE_STORE_CRASH_DIR";
const GENERATION: &str = "FULGURITE_STORE_CRASH_GENERATION";
/// How many kills; `cargo xtask soak` asks for 1,000.
const KILLS: &str = "FULGURITE_STORE_KILLS";
/// Kills of one directory. Everything in it is verified after each, so a long soak takes several.
const KILLS_PER_DIR: u64 = 20;
const THREADS: u64 = 4;
/// A child whose parent is gone ends by itself.
const ROUNDS_MAX: u64 = 2_000;

/// Says that something is durable. One write per line, so that lines of threads do not mix.
fn acknowledge(line: &str) {
    let written = std::io::stdout().lock().write_all(format!("ack {line}\n").as_bytes());
    let flushed = std::io::stdout().flush();
    if written.and(flushed).is_err() {
        std::process::exit(0);
    }
}

fn finish(key: &AttemptKey, from: u64, count: u64, rollout_state: RolloutState) -> AttemptFinish {
    AttemptFinish {
        key: key.clone(),
        state: if rollout_state == RolloutState::Succeeded { AttemptState::Succeeded } else { AttemptState::Failed },
        outcome: outcome(),
        rewards: vec![reward(0.5)],
        end_unix_ns: 2,
        guest_cpu_us: 3,
        not_forkable: None,
        spans: std::sync::Arc::new(spans(key, from, count)),
        rollout_state,
    }
}

/// Begins rollouts, records some spans of them and ends them; some are tried again, some are left live.
fn run_rollouts(store: &SledStore, ids: &[RolloutId], generator: &mut Generator) {
    let mut finishes = vec![];
    let mut lines = vec![];
    for id in ids {
        let attempt = store.begin_attempt(id, 1, "").unwrap();
        store.mark_running(&attempt.key).unwrap();
        let mut recorded = 0;
        for _ in 0..generator.below(3) {
            let count = 1 + generator.below(20) as u64;
            store.append_spans(&attempt.key, &spans(&attempt.key, recorded, count)).unwrap();
            recorded += count;
            acknowledge(&format!("spans {id} {} {recorded}", attempt.key.attempt));
        }
        let state = match generator.below(8) {
            0 => continue,
            1 => RolloutState::Requeuing,
            2 => RolloutState::Failed,
            _ => RolloutState::Succeeded,
        };
        let last = generator.below(10) as u64;
        finishes.push(finish(&attempt.key, recorded, last, state));
        lines.push(format!("finish {id} {} {} {}", attempt.key.attempt, recorded + last, state.as_str()));
    }
    for (result, line) in store.finish_attempts(finishes).into_iter().zip(lines) {
        result.unwrap();
        acknowledge(&line);
    }
}

/// The child. As a test of its own it does nothing.
#[test]
fn crash_child() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let generation: u64 = std::env::var(GENERATION).unwrap().parse().unwrap();
    let store = SledStore::open(Path::new(&dir)).unwrap();
    let seed = Seed::new(7).child_index(generation);
    // What the last child left behind is run again.
    for state in [RolloutState::Running, RolloutState::Preparing, RolloutState::Requeuing] {
        let query = RolloutQuery { state: Some(state), ..RolloutQuery::default() };
        let left: Vec<RolloutId> =
            store.rollouts(&query).unwrap().into_iter().map(|record| record.spec.id.clone()).collect();
        run_rollouts(&store, &left, &mut Generator::new(seed.child(state.as_str())));
    }
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let store = &store;
            scope.spawn(move || {
                let mut generator = Generator::new(seed.child("thread").child_index(thread));
                for round in 0..ROUNDS_MAX {
                    // Not synced by itself: the enqueueing that follows covers it.
                    let blob = format!("item {generation} {thread} {round}").repeat(1 + generator.below(400));
                    let item = store.put_blobs(vec![blob.into_bytes()]).unwrap()[0];
                    let specs: Vec<_> = (0..=generator.below(4))
                        .map(|index| RolloutSpec {
                            id: RolloutId::new(format!("g{generation}-t{thread}-{round}-{index}")).unwrap(),
                            item,
                            ..(*spec(round)).clone()
                        })
                        .map(Arc::new)
                        .collect();
                    let ids: Vec<RolloutId> = specs.iter().map(|spec| spec.id.clone()).collect();
                    store.enqueue(specs).unwrap();
                    for id in &ids {
                        acknowledge(&format!("enqueue {id}"));
                    }
                    run_rollouts(store, &ids, &mut generator);
                    if thread == 0 {
                        let after = store.resources_version().unwrap();
                        let version =
                            store.publish_template(after, "prompt", &format!("{generation} {round}")).unwrap();
                        acknowledge(&format!("template {version} {generation} {round}"));
                    }
                }
            });
        }
    });
}

/// What the children have said.
#[derive(Default)]
struct Said {
    enqueued: Vec<RolloutId>,
    /// Spans that must be there, by attempt.
    spans: BTreeMap<AttemptKey, u64>,
    /// Spans at the end and the rollout's state, by attempt.
    finished: BTreeMap<AttemptKey, (u64, RolloutState)>,
    /// The attempt that each rollout got its reward for.
    rewarded: BTreeMap<RolloutId, AttemptKey>,
    templates: BTreeMap<u64, String>,
    lines: u64,
}

impl Said {
    fn take(&mut self, line: &str) {
        // The test harness prints on the same line before the first acknowledgement.
        let Some((_, line)) = line.split_once("ack ") else { return };
        self.lines += 1;
        let words: Vec<&str> = line.split(' ').collect();
        let id = || RolloutId::new(words[1]).unwrap();
        match words[0] {
            "enqueue" => self.enqueued.push(id()),
            "spans" => {
                self.spans.insert(key(&id(), words[2].parse().unwrap()), words[3].parse().unwrap());
            }
            "finish" => {
                let state = RolloutState::ALL.into_iter().find(|state| state.as_str() == words[4]).unwrap();
                let key = key(&id(), words[2].parse().unwrap());
                if state == RolloutState::Succeeded {
                    let before = self.rewarded.insert(key.rollout.clone(), key.clone());
                    assert!(before.is_none(), "{key} was rewarded, and {before:?} had been");
                }
                let before = self.finished.insert(key.clone(), (words[3].parse().unwrap(), state));
                assert!(before.is_none(), "{key} was acknowledged twice");
            }
            "template" => {
                self.templates.insert(words[1].parse().unwrap(), words[2..].join(" "));
            }
            other => panic!("{other}"),
        }
    }

    /// Everything said is there, and everything there is legal.
    fn verify(&self, store: &SledStore) {
        for id in &self.enqueued {
            let rollout = store.rollout(id).unwrap().unwrap_or_else(|| panic!("{id} was acknowledged and is gone"));
            assert!(store.blob(&rollout.spec.item).unwrap().is_some(), "the item of {id} is gone");
        }
        for (key, count) in &self.spans {
            let recorded = store.attempts(&key.rollout).unwrap();
            let attempt = &recorded[key.attempt.0 as usize - 1];
            assert!(attempt.spans >= *count, "{key}: {} of {count} acknowledged spans", attempt.spans);
        }
        for (key, (count, state)) in &self.finished {
            let rollout = store.rollout(&key.rollout).unwrap().unwrap();
            let attempt = &store.attempts(&key.rollout).unwrap()[key.attempt.0 as usize - 1];
            assert_eq!(attempt.spans, *count, "{key}");
            assert!(attempt.state.is_terminal() && attempt.state != AttemptState::Unresponsive, "{key}");
            assert_eq!((attempt.rewards.len(), attempt.outcome.as_ref()), (1, Some(&outcome())), "{key}");
            assert!(*state == RolloutState::Requeuing || rollout.state == *state, "{key}");
            // What was acknowledged as ended was never begun again.
            assert!(*state == RolloutState::Requeuing || rollout.attempt == Some(key.attempt), "{key}");
        }
        for (version, text) in &self.templates {
            assert_eq!(&store.template("prompt", Some(*version)).unwrap().unwrap().text, text);
        }
        let report = store.check(&mut |_| {}).unwrap();
        assert!(report.is_sound(), "{:?}", report.findings);
        let mut counted = fulgurite_store::StoreStatistics::default();
        for (ordinal, rollout) in store.rollouts(&RolloutQuery::default()).unwrap().into_iter().enumerate() {
            let id = &rollout.spec.id;
            assert_eq!(rollout.ordinal, ordinal as u64);
            let attempts = store.attempts(id).unwrap();
            assert_eq!(rollout.attempt.map_or(0, |newest| newest.0 as usize), attempts.len(), "{id}");
            let rewarded = attempts.iter().filter(|attempt| attempt.state == AttemptState::Succeeded).count();
            assert_eq!(rewarded, usize::from(rollout.state == RolloutState::Succeeded), "{id}");
            for (number, attempt) in (1..).zip(&attempts) {
                let key = key(id, number);
                assert_eq!(attempt.key, key);
                assert!(store.spans(&key).unwrap() == spans(&key, 0, attempt.spans), "{key}");
                let live = number as usize == attempts.len()
                    && matches!(rollout.state, RolloutState::Preparing | RolloutState::Running);
                assert_eq!(!attempt.state.is_terminal(), live, "{key}");
                counted.spans += attempt.spans;
                if let Some(end) = &attempt.outcome {
                    *counted.outcomes.entry(end.kind).or_default() += 1;
                }
            }
            counted.attempts += attempts.len() as u64;
            *counted.rollouts.entry(rollout.state).or_default() += 1;
        }
        let statistics = store.statistics().unwrap();
        counted.span_bytes = statistics.span_bytes;
        counted.syncs = statistics.syncs;
        counted.disk_bytes = statistics.disk_bytes;
        (counted.blobs, counted.blob_bytes) = (statistics.blobs, statistics.blob_bytes);
        counted.resources_version = statistics.resources_version;
        assert_eq!(statistics, counted);
    }
}

struct Writer {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Writer {
    fn start(dir: &Path, generation: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_child", "--nocapture", "--test-threads=1"])
            .env(DIR, dir)
            .env(GENERATION, generation.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// Reads one whole line; `None` at the end, also when the last line was cut off.
    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.strip_suffix('\n').map(str::to_owned)
    }

    /// Kills it and hears what it had still said.
    fn kill(mut self, said: &mut Said) {
        self.child.kill().unwrap();
        while let Some(line) = self.line() {
            said.take(&line);
        }
        self.child.wait().unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let kills: u64 = std::env::var(KILLS).map_or(40, |kills| kills.parse().unwrap());
    let mut dir = tempfile::tempdir().unwrap();
    let mut said = Said::default();
    let (mut lines, mut rewarded) = (0, 0);
    let mut generator = Generator::new(Seed::new(11));
    for generation in 0..kills {
        if generation % KILLS_PER_DIR == 0 {
            dir = tempfile::tempdir().unwrap();
            (lines, rewarded) = (lines + said.lines, rewarded + said.rewarded.len());
            said = Said::default();
        }
        let mut writer = Writer::start(dir.path(), generation);
        let until = said.lines + 1 + generator.below(300) as u64;
        while said.lines < until {
            let line = writer.line().unwrap_or_else(|| panic!("child {generation} died by itself"));
            said.take(&line);
        }
        // Away from the moment right after a line.
        for _ in 0..generator.below(100_000) {
            std::hint::spin_loop();
        }
        writer.kill(&mut said);
        let store = SledStore::open(dir.path()).unwrap();
        said.verify(&store);
    }
    (lines, rewarded) = (lines + said.lines, rewarded + said.rewarded.len());
    println!("{kills} kills, {lines} acknowledgements, {rewarded} rollouts with a reward");
    assert!(lines >= kills && rewarded > 0 && !said.templates.is_empty());
}

#[test]
fn another_process_cannot_open_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let mut said = Said::default();
    let mut writer = Writer::start(dir.path(), 0);
    while said.lines == 0 {
        said.take(&writer.line().unwrap());
    }
    let error = SledStore::open(dir.path()).err().unwrap();
    assert!(matches!(&error, StoreError::InUse { dir: named } if named == dir.path()), "{error}");
    writer.kill(&mut said);
    said.verify(&SledStore::open(dir.path()).unwrap());
}
