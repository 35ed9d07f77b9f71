//! Retention: drops whole rollouts with their spans. What a drop frees is only given back to the file system by
//! compaction, and blobs stay until then, because a value that nothing refers to yet may be about to be enqueued.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use fulgurite_core::id::RolloutId;
use fulgurite_core::record::RolloutRecord;

use super::{Ledger, Stage, StoredRollout, check_stored};
use crate::codec;
use crate::error::Result;
use crate::key_value::{Batch, KeyRange, KeyValue};
use crate::keys::{self, Kind};
use crate::records::{PruneReport, PruneRule};

/// Rollouts that are dropped in one commit.
const ROLLOUTS_PER_COMMIT: usize = 64;

/// A rule with what it needs to know of the store.
struct Plan<'a> {
    rule: &'a PruneRule,
    /// First step of each stage that is among the newest.
    newest: BTreeMap<String, u64>,
    /// Rollouts that a fork which stays refers to, directly or not.
    ancestors: BTreeSet<RolloutId>,
    /// Forks that were enqueued meanwhile begin with this ordinal.
    next_ordinal: u64,
}

impl Plan<'_> {
    /// Whether the rule drops a rollout, forks aside.
    fn fits(&self, rollout: &RolloutRecord) -> bool {
        let (rule, spec) = (self.rule, &rollout.spec);
        rollout.state.is_terminal()
            && rule.stage.as_ref().is_none_or(|stage| *stage == spec.stage)
            && rule.before_step.is_none_or(|step| spec.step < step)
            && (rule.states.is_empty() || rule.states.contains(&rollout.state))
            && (rule.keep_steps.is_none() || self.newest.get(&spec.stage).is_some_and(|first| spec.step < *first))
    }
}

impl<D: KeyValue> Ledger<D> {
    pub(crate) fn prune(&self, rule: &PruneRule) -> Result<PruneReport> {
        let mut report = PruneReport { disk_bytes_before: self.database.disk_bytes()?, ..PruneReport::default() };
        let mut plan = self.plan(rule)?;
        let mut range = KeyRange::prefix(&[Kind::Rollout as u8]);
        let mut commits = 0;
        loop {
            let mut stage = Stage::new(self)?;
            self.protect_new_forks(&mut plan, &mut stage)?;
            let (mut victims, mut seen, mut last) = (vec![], 0, vec![]);
            codec::scan(&self.database, &range, |key, stored: StoredRollout| {
                check_stored(key, &stored.0, &stored.1)?;
                seen += 1;
                last = key.to_vec();
                if plan.fits(&stored.0) {
                    if plan.ancestors.contains(&stored.0.spec.id) {
                        report.kept_for_forks += 1;
                    } else {
                        victims.push(stored);
                    }
                }
                let enough = victims.len() == ROLLOUTS_PER_COMMIT || seen == ROLLOUTS_PER_COMMIT * 16;
                Ok(if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            for (rollout, attempts) in &victims {
                let span_bytes = self.drop_rollout(&mut stage.batch, rollout)?;
                stage.counters.discount(rollout.state, attempts, span_bytes);
                report.rollouts += 1;
                report.attempts += attempts.len() as u64;
                report.spans += attempts.iter().map(|attempt| attempt.spans).sum::<u64>();
                report.span_bytes += span_bytes;
            }
            if rule.dry_run {
                drop(stage);
            } else {
                commits = stage.commit()?;
            }
            if seen == 0 {
                break;
            }
            range = range.after(&last);
        }
        self.sync(commits)?;
        report.disk_bytes_after = self.database.disk_bytes()?;
        Ok(report)
    }

    fn plan<'a>(&self, rule: &'a PruneRule) -> Result<Plan<'a>> {
        let next_ordinal = self.lock().counters.next_ordinal;
        let mut plan = Plan { rule, newest: BTreeMap::new(), ancestors: BTreeSet::new(), next_ordinal };
        if let Some(keep) = rule.keep_steps {
            // The newest steps that there are, which need not follow one another.
            let mut steps: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
            self.each_rollout(|rollout| {
                let of_stage = steps.entry(rollout.spec.stage.clone()).or_default();
                of_stage.insert(rollout.spec.step);
                if of_stage.len() as u64 > keep {
                    of_stage.pop_first();
                }
            })?;
            let first = |(stage, steps): (String, BTreeSet<u64>)| (stage, steps.first().copied().unwrap_or(u64::MAX));
            plan.newest = steps.into_iter().map(first).collect();
        }
        let mut forks: BTreeMap<RolloutId, RolloutId> = BTreeMap::new();
        let mut staying: Vec<RolloutId> = vec![];
        self.each_rollout(|rollout| {
            let stays = !plan.fits(&rollout);
            if let Some(fork) = &rollout.spec.fork_of {
                if stays {
                    staying.push(fork.rollout.clone());
                }
                forks.insert(rollout.spec.id.clone(), fork.rollout.clone());
            }
        })?;
        // What a fork refers to stays, and if that is a fork itself, so does what it refers to.
        while let Some(ancestor) = staying.pop() {
            if let Some(older) = forks.get(&ancestor) {
                staying.push(older.clone());
            }
            plan.ancestors.insert(ancestor);
        }
        Ok(plan)
    }

    fn each_rollout(&self, mut visit: impl FnMut(RolloutRecord)) -> Result<()> {
        self.walk(KeyRange::prefix(&[Kind::Rollout as u8]), usize::MAX, |_, key, stored: StoredRollout| {
            check_stored(key, &stored.0, &stored.1)?;
            visit(stored.0);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(())
    }

    /// Forks that were enqueued since the plan was made keep their ancestors too. The ancestors of these stay anyway: a
    /// fork that is there keeps them, or it would not be there.
    fn protect_new_forks(&self, plan: &mut Plan<'_>, stage: &mut Stage<'_, D>) -> Result<()> {
        let mut range = KeyRange::prefix(&[Kind::Rollout as u8]);
        range.start = keys::rollout_key(plan.next_ordinal);
        let mut next = plan.next_ordinal;
        codec::scan(&self.database, &range, |_, (rollout, _): StoredRollout| {
            next = rollout.ordinal + 1;
            let mut fork = rollout.spec.fork_of.clone();
            while let Some(point) = fork {
                fork = stage.find(&point.rollout)?.and_then(|entry| entry.rollout.spec.fork_of.clone());
                plan.ancestors.insert(point.rollout);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        plan.next_ordinal = next;
        Ok(())
    }

    /// Stages the removal of everything that a rollout has. Returns the size of its encoded spans.
    fn drop_rollout(&self, batch: &mut Batch, rollout: &RolloutRecord) -> Result<u64> {
        batch.push((keys::index_key(&rollout.spec.id), None));
        self.database.scan(&KeyRange::prefix(&keys::rollout_key(rollout.ordinal)), &mut |key, _| {
            batch.push((key.to_vec(), None));
            Ok(ControlFlow::Continue(()))
        })?;
        let (mut span_bytes, mut is_compressed) = (0, false);
        self.database.scan(&KeyRange::prefix(&keys::rollout_spans_prefix(rollout.ordinal)), &mut |key, value| {
            batch.push((key.to_vec(), None));
            // What is compressed says how long it was; of other fragments each has its share.
            span_bytes += match codec::parse(key, value) {
                _ if keys::is_fragment(key) && is_compressed => 0,
                _ if keys::is_fragment(key) => value.len() as u64,
                Ok(head) => {
                    is_compressed = head.raw_bytes.is_some();
                    head.raw_bytes.map_or(head.bytes.len() as u64, u64::from)
                }
                Err(_) => 0,
            };
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(span_bytes)
    }
}
