//! Which rollouts a step trains on. A group is trained on when all of its rollouts have ended, because advantages compare the
//! rollouts of a group with each other; what is not whole when training starts is carried over to the next step, and that
//! one waits for it. Nothing is lost, and nothing is more than one step late, unless a stage is to lag behind.

use std::collections::BTreeMap;

use fulgurite_sdk::algorithm::AlgorithmError;
use fulgurite_sdk::algorithm::rollouts::{self, Batch, Group};
use fulgurite_sdk::algorithm::trajectories::Trajectory;

/// What a step trains on.
#[derive(Debug)]
pub(crate) struct Gathered {
    /// Rollouts of whole groups, each with the number of its group, which is its own over all batches.
    pub(crate) rollouts: Vec<(usize, Trajectory)>,
    /// How many of them the step before had carried over.
    pub(crate) carried_in: usize,
    /// Rollouts that are carried over to the next step.
    pub(crate) carried_out: usize,
}

/// When training starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// When all rollouts have ended.
    All,
    /// When so many of the new ones have, and a whole group is there.
    Count(u32),
}

impl Start {
    /// A share of so many rollouts. The last step waits for all: there is no later one that could train on the rest.
    pub(crate) fn of(share: f64, rollouts: usize, is_last: bool) -> Self {
        if share >= 1.0 || is_last {
            return Self::All;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
        let count = (share * rollouts as f64).ceil() as u32;
        Self::Count(count.max(1))
    }
}

/// Rolls groups out and waits for what the step before has carried over and for enough of the new ones.
///
/// # Errors
/// When the host refuses a verb.
pub(crate) fn gather(groups: &[Group], size: usize, start: Start) -> Result<Gathered, AlgorithmError> {
    let carried = rollouts::carried()?;
    let fresh = rollouts::enqueue(groups)?;
    let mut ended = match start {
        Start::All => fresh.await_all(None)?,
        Start::Count(count) => fresh.await_count(count, None)?,
    };
    let mut gathered = Gathered { rollouts: vec![], carried_in: 0, carried_out: 0 };
    let mut first = 0;
    for batch in &carried {
        let late = batch.await_all(None)?;
        let groups = late.iter().map(|trajectory| trajectory.group() + 1).max().unwrap_or(0);
        gathered.rollouts.extend(late.into_iter().map(|trajectory| (first + trajectory.group(), trajectory)));
        first += groups;
    }
    gathered.carried_in = gathered.rollouts.len();
    if start != Start::All {
        wait_for_a_group(&fresh, &mut ended, size, gathered.carried_in > 0)?;
        // In the order in which `await_all` would have given them: ids count up, and longer ones are later ones.
        ended.sort_by_cached_key(|trajectory| {
            let id = trajectory.rollout_id().0;
            (id.len(), id)
        });
        let open = open_groups(ended.iter().map(Trajectory::group), groups.len(), size);
        if !open.is_empty() {
            fresh.carry(&open)?;
            ended.retain(|trajectory| !open.contains(&trajectory.group()));
            gathered.carried_out = open.len() * size;
        }
    }
    gathered.rollouts.extend(ended.into_iter().map(|trajectory| (first + trajectory.group(), trajectory)));
    Ok(gathered)
}

/// How many batches of groups a step rolls out when training lags so many steps behind: the first step begins the whole queue,
/// and the last ones roll nothing out that no later step could train on.
pub(crate) const fn batches_ahead(step: u64, steps: u64, lag_steps: u64) -> u64 {
    let ahead = if step == 0 { lag_steps + 1 } else { 1 };
    let left = steps.saturating_sub(if step == 0 { 0 } else { step + lag_steps });
    if ahead < left { ahead } else { left }
}

/// Rolls batches out, each of `size` groups at most, and returns the rollouts of the one that has waited longest. All the others
/// are carried over whole; each of them has ended by then, so that the order of arrival decides nothing.
///
/// # Errors
/// When the host refuses a verb.
pub(crate) fn lagging(batches: &[Vec<Group>], size: usize) -> Result<Vec<(usize, Trajectory)>, AlgorithmError> {
    let mut waiting = rollouts::carried()?.into_iter();
    let mut due = waiting.next().map(|batch| batch.await_all(None)).transpose()?;
    for later in waiting {
        later.carry(&(0..size).collect::<Vec<_>>())?;
    }
    for groups in batches {
        let fresh = rollouts::enqueue(groups)?;
        let ended = fresh.await_all(None)?;
        if due.is_none() {
            due = Some(ended);
        } else {
            fresh.carry(&(0..groups.len()).collect::<Vec<_>>())?;
        }
    }
    Ok(due.unwrap_or_default().into_iter().map(|trajectory| (trajectory.group(), trajectory)).collect())
}

/// Takes what has ended meanwhile and, where there is nothing else to train on, waits until one group is whole.
fn wait_for_a_group(
    fresh: &Batch,
    ended: &mut Vec<Trajectory>,
    size: usize,
    has_other: bool,
) -> Result<(), AlgorithmError> {
    ended.extend(fresh.await_count(0, None)?);
    while !has_other && sizes(ended.iter().map(Trajectory::group)).values().all(|found| *found < size) {
        let more = fresh.await_count(1, None)?;
        if more.is_empty() {
            break;
        }
        ended.extend(more);
    }
    Ok(())
}

fn sizes(groups: impl Iterator<Item = usize>) -> BTreeMap<usize, usize> {
    let mut sizes = BTreeMap::new();
    for group in groups {
        *sizes.entry(group).or_default() += 1;
    }
    sizes
}

/// The groups, of so many, of which fewer than `size` rollouts have ended. `ended` are the groups of those that have.
fn open_groups(ended: impl Iterator<Item = usize>, groups: usize, size: usize) -> Vec<usize> {
    let sizes = sizes(ended);
    (0..groups).filter(|group| sizes.get(group).copied().unwrap_or(0) < size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_starts_when_the_share_is_in_and_the_last_step_waits() {
        assert_eq!(Start::of(1.0, 8, false), Start::All);
        assert_eq!(Start::of(0.5, 8, true), Start::All);
        assert_eq!(Start::of(0.875, 8, false), Start::Count(7));
        assert_eq!(Start::of(0.8, 8, false), Start::Count(7));
        assert_eq!(Start::of(1e-9, 8, false), Start::Count(1));
    }

    #[test]
    fn a_lag_trains_every_step_on_a_batch_and_rolls_no_more_out_than_are_trained_on() {
        for lag in 0..5 {
            let (mut queue, mut rolled) = (0, 0);
            for step in 0..7 {
                let ahead = batches_ahead(step, 7, lag);
                (queue, rolled) = (queue + ahead, rolled + ahead);
                assert!(queue > 0, "step {step} of lag {lag} has nothing to train on");
                queue -= 1;
            }
            assert_eq!((queue, rolled), (0, 7), "lag {lag}");
        }
        assert_eq!([0, 1, 4, 5, 6].map(|step| batches_ahead(step, 7, 2)), [3, 1, 1, 0, 0]);
        assert_eq!(batches_ahead(0, 2, 4), 2);
    }

    #[test]
    fn groups_that_miss_a_rollout_are_open() {
        assert_eq!(open_groups([2, 0, 0, 1, 1, 0].into_iter(), 4, 3), [1, 2, 3]);
        assert_eq!(open_groups([0, 1, 0, 1].into_iter(), 2, 2), [0; 0]);
        assert_eq!(open_groups(std::iter::empty(), 2, 1), [0, 1]);
    }
}
