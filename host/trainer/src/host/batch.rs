//! A batch: rollouts that an algorithm has enqueued, until it has been given them; and the groups that it carries over to a
//! later step.
//!
//! A group is carried over whole, those of its rollouts included that its step has been given: whoever compares the rollouts of
//! a group needs all of them at once, and a step's transitions are forgotten with it. What had ended is read from the store
//! again; what had not goes on running. A checkpoint keeps no more than the ids, because the store has the rest: a resumed
//! stage enqueues them as they were, is given what is finished, and runs again what is not.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_core::id::RolloutId;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_runner::{Batch, RolloutResult, RunnerError};
use serde::{Deserialize, Serialize};

/// Faults of a batch that are not the policy's, by kind: how many, and the detail of the last one.
pub(crate) type Faults = BTreeMap<OutcomeKind, (u64, String)>;

/// A batch with groups that were carried over, as a checkpoint keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CarriedBatch {
    /// The step that enqueued it.
    pub(crate) step: u64,
    /// Rollouts of the whole batch: what its faults are a share of.
    pub(crate) size: u64,
    /// Its faults so far.
    pub(crate) faults: Faults,
    /// The rollouts of the carried groups.
    pub(crate) rollouts: Vec<CarriedRollout>,
}

/// A rollout that was carried over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CarriedRollout {
    /// Which one.
    pub(crate) id: RolloutId,
    /// Whether it is in the stage's totals and the batch's faults already: it is counted once, however often it is returned.
    pub(crate) counted: bool,
}

/// What has become of a rollout of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given {
    /// It is still to be returned.
    NotYet,
    /// It has been returned in this step.
    Now,
    /// Its group was not carried over when the batch was: nobody waits for it any more.
    Never,
}

#[derive(Debug)]
struct Member {
    id: RolloutId,
    group: u64,
    counted: bool,
    given: Given,
}

/// A batch in the step that enqueued it, or in one that it was carried over to.
#[derive(Debug)]
pub(super) struct OpenBatch {
    step: u64,
    size: u64,
    pub(super) faults: Faults,
    running: Batch,
    /// By their places in `running`.
    members: Vec<Member>,
    /// What has ended, by place, and is still to be returned.
    ended: Vec<(usize, RolloutResult)>,
    /// Groups that the current step carries over.
    carried: BTreeSet<u64>,
}

impl OpenBatch {
    /// What a step has enqueued: ids and groups in the order of the jobs.
    pub(super) fn new(step: u64, running: Batch, rollouts: Vec<(RolloutId, u64)>) -> Self {
        let member = |(id, group)| Member { id, group, counted: false, given: Given::NotYet };
        let members: Vec<Member> = rollouts.into_iter().map(member).collect();
        let size = members.len() as u64;
        Self { step, size, faults: Faults::new(), running, members, ended: vec![], carried: BTreeSet::new() }
    }

    /// What a checkpoint has kept, enqueued again in its order. `groups` are those of its rollouts.
    pub(super) fn resumed(record: CarriedBatch, running: Batch, groups: Vec<u64>) -> Self {
        let member = |(rollout, group): (CarriedRollout, u64)| Member {
            id: rollout.id,
            group,
            counted: rollout.counted,
            given: Given::NotYet,
        };
        let members = record.rollouts.into_iter().zip(groups).map(member).collect();
        let CarriedBatch { step, size, faults, .. } = record;
        Self { step, size, faults, running, members, ended: vec![], carried: BTreeSet::new() }
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// Rollouts of the whole batch, of which only some may have been carried over.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn is_wanted(&self, member: &Member) -> bool {
        member.given == Given::NotYet && !self.carried.contains(&member.group)
    }

    /// Rollouts that the step can still be given.
    pub(super) fn outstanding(&self) -> usize {
        self.members.iter().filter(|member| self.is_wanted(member)).count()
    }

    /// Rollouts that the step carries over.
    pub(super) fn carried(&self) -> usize {
        self.members.iter().filter(|member| self.carried.contains(&member.group)).count()
    }

    /// The group of a place.
    pub(super) fn group(&self, place: usize) -> u64 {
        self.members.get(place).map_or(0, |member| member.group)
    }

    /// Marks a rollout as counted and says whether it had not been.
    pub(super) fn counts(&mut self, place: usize) -> bool {
        self.members.get_mut(place).is_some_and(|member| !std::mem::replace(&mut member.counted, true))
    }

    /// Waits for the next rollout to end; `None` when there is none to wait for. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, RolloutResult), RunnerError>> {
        let known =
            self.ended.iter().position(|(place, _)| self.members.get(*place).is_some_and(|m| self.is_wanted(m)));
        if let Some(known) = known {
            let (place, result) = self.ended.swap_remove(known);
            self.give(place);
            return Some(Ok((place, result)));
        }
        loop {
            let (place, result) = match self.running.next().await? {
                Ok(ended) => ended,
                Err(error) => return Some(Err(error)),
            };
            let Some(member) = self.members.get(place).filter(|member| member.given == Given::NotYet) else { continue };
            if self.carried.contains(&member.group) {
                self.ended.push((place, result));
                continue;
            }
            self.give(place);
            return Some(Ok((place, result)));
        }
    }

    fn give(&mut self, place: usize) {
        if let Some(member) = self.members.get_mut(place) {
            member.given = Given::Now;
        }
    }

    /// Carries groups over and returns the rollouts of the carried ones.
    ///
    /// # Errors
    /// The first group that the batch does not have.
    pub(super) fn carry(&mut self, groups: &[u64]) -> Result<BTreeSet<RolloutId>, u64> {
        let own = |group: u64| self.members.iter().any(|m| m.group == group && m.given != Given::Never);
        if let Some(unknown) = groups.iter().find(|group| !own(**group)) {
            return Err(*unknown);
        }
        self.carried.extend(groups);
        let carried = self.members.iter().filter(|member| self.carried.contains(&member.group));
        Ok(carried.map(|member| member.id.clone()).collect())
    }

    pub(super) fn cancel(&self) {
        self.running.cancel();
    }

    /// What is left when the step has ended: nothing, when it carries nothing over.
    pub(super) fn into_carried(mut self) -> Option<Self> {
        for member in self.members.iter_mut().filter(|member| !self.carried.contains(&member.group)) {
            member.given = Given::Never;
        }
        (!self.carried.is_empty()).then_some(self)
    }

    /// As a checkpoint keeps it.
    pub(super) fn record(&self) -> CarriedBatch {
        let carried = self.members.iter().filter(|member| self.carried.contains(&member.group));
        let rollouts = carried.map(|member| CarriedRollout { id: member.id.clone(), counted: member.counted });
        CarriedBatch { step: self.step, size: self.size, faults: self.faults.clone(), rollouts: rollouts.collect() }
    }

    /// Opens it in a later step. `finished` reads a rollout again that an earlier step has been given.
    ///
    /// # Errors
    /// Whatever `finished` fails with.
    pub(super) fn reopen<E>(&mut self, finished: impl Fn(&RolloutId) -> Result<RolloutResult, E>) -> Result<(), E> {
        for (place, member) in self.members.iter_mut().enumerate().filter(|(_, member)| member.given == Given::Now) {
            self.ended.push((place, finished(&member.id)?));
            member.given = Given::NotYet;
        }
        self.carried.clear();
        Ok(())
    }
}

/// A batch between two steps.
#[derive(Debug)]
pub(super) enum Carried {
    /// Its step was made by this process.
    Running(Box<OpenBatch>),
    /// From a checkpoint.
    Recorded(CarriedBatch),
}

impl Carried {
    pub(super) fn record(&self) -> CarriedBatch {
        match self {
            Self::Running(open) => open.record(),
            Self::Recorded(record) => record.clone(),
        }
    }

    pub(super) fn step(&self) -> u64 {
        match self {
            Self::Running(open) => open.step(),
            Self::Recorded(record) => record.step,
        }
    }

    pub(super) fn rollouts(&self) -> usize {
        match self {
            Self::Running(open) => open.carried(),
            Self::Recorded(record) => record.rollouts.len(),
        }
    }

    /// Whether a step has been given all of it before: then nothing of it depends on when something ends.
    pub(super) fn has_been_given(&self) -> bool {
        self.record().rollouts.iter().all(|rollout| rollout.counted)
    }
}
