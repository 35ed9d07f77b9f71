//! Items and rollouts.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::trajectories::Trajectory;
use super::{HostError, Sampling};
use crate::types::Mode;
use crate::wit::algorithm::fulgurite::algorithm::rollouts as wit;

/// Names an item of the dataset.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ItemId(pub String);

/// Names a rollout.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RolloutId(pub String);

/// A split that algorithms may see. `test` belongs to the host alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is looked at to choose.
    Val,
}

/// An item of the stage's dataset. Every method asks the host.
#[derive(Debug)]
pub struct Item(wit::Item);

impl Item {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> ItemId {
        ItemId(self.0.id())
    }

    /// Its input as a type.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn input<T: DeserializeOwned>(&self) -> Result<T, HostError> {
        read("input", &self.id(), &self.0.input())
    }

    /// Its reference as a type: what the agent never sees.
    ///
    /// # Errors
    /// Denied without the grant `read-reference`; or when it does not fit.
    pub fn reference<T: DeserializeOwned>(&self) -> Result<T, HostError> {
        read("reference", &self.id(), &self.0.reference()?)
    }

    /// How often the split had been gone through when the item was drawn, from 0.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.epoch()
    }
}

fn read<T: DeserializeOwned>(field: &str, id: &ItemId, json: &str) -> Result<T, HostError> {
    serde_json::from_str(json).map_err(|error| HostError::Other(format!("{field} of item `{}`: {error}", id.0)))
}

/// The next items, in the shuffled order of the stage's cursor. The cursor is a part of the checkpoint.
///
/// # Errors
/// When the dataset has no such split.
pub fn next_items(split: Split, count: u32) -> Result<Vec<Item>, HostError> {
    let split = match split {
        Split::Train => wit::Split::Train,
        Split::Val => wit::Split::Val,
    };
    Ok(wit::next_items(split, count)?.into_iter().map(Item).collect())
}

/// Rollouts of one item that share everything but their seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    item: ItemId,
    count: u32,
    mode: Mode,
    sampling: Option<Sampling>,
    fork_of: Option<(RolloutId, u64)>,
}

impl Group {
    /// `count` rollouts of an item, for training.
    #[must_use]
    pub const fn new(item: ItemId, count: u32) -> Self {
        Self { item, count, mode: Mode::Train, sampling: None, fork_of: None }
    }

    /// What they are for. The host denies [`Mode::Test`].
    #[must_use]
    pub const fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// How the policy draws. Default: as the run's config says.
    #[must_use]
    pub const fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = Some(sampling);
        self
    }

    /// Forks every rollout of the group from this finished one: it begins as that did up to the event, and goes on by
    /// itself. With [`Mode::Val`] it is never trained on.
    #[must_use]
    pub fn fork_of(mut self, rollout: RolloutId, event: u64) -> Self {
        self.fork_of = Some((rollout, event));
        self
    }

    fn lower(&self) -> wit::Group {
        let group = wit::Group::new(&self.item.0, self.count);
        group.set_mode(self.mode.into());
        self.sampling.iter().for_each(|sampling| group.set_sampling(&sampling.lower()));
        self.fork_of.iter().for_each(|(rollout, event)| group.set_fork_of(&rollout.0, *event));
        group
    }
}

/// Enqueued groups. A batch ends with its step: what has been neither returned nor carried over by then is given up.
#[derive(Debug)]
pub struct Batch(wit::Batch);

impl Batch {
    /// Waits for all and returns those that have ended, ordered as they were enqueued.
    ///
    /// # Errors
    /// When too many failed for reasons that are not the policy's, or the run is being stopped.
    pub fn await_all(&self, deadline: Option<Duration>) -> Result<Vec<Trajectory>, HostError> {
        let ended = self.0.await_all(deadline.map(milliseconds))?;
        Ok(ended.into_iter().map(Trajectory::new).collect())
    }

    /// Waits until `count` more have ended; returns all that have ended and were not returned before, ordered as they were
    /// enqueued. With 0 it waits for nothing. Which ones these are depends on the machine: what the rest of the step
    /// enqueues must not follow from it.
    ///
    /// # Errors
    /// As [`Self::await_all`].
    pub fn await_count(&self, count: u32, deadline: Option<Duration>) -> Result<Vec<Trajectory>, HostError> {
        let ended = self.0.await_count(count, deadline.map(milliseconds))?;
        Ok(ended.into_iter().map(Trajectory::new).collect())
    }

    /// Carries groups over to a later step, by the places that [`Trajectory::group`] tells: whole, with those of their
    /// rollouts that have been returned already. They go on meanwhile; [`carried`] gives them back.
    ///
    /// # Errors
    /// When the batch has no such group.
    pub fn carry(&self, groups: &[usize]) -> Result<(), HostError> {
        let groups: Vec<u64> = groups.iter().map(|group| *group as u64).collect();
        Ok(self.0.carry(&groups)?)
    }

    /// Cancels what has not ended.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn cancel(&self) -> Result<(), HostError> {
        Ok(self.0.cancel()?)
    }
}

/// Enqueues groups. Rollout ids follow from stage, step and index, so a repeated step finds what has been done.
///
/// # Errors
/// When an item, a mode or a fork is refused.
pub fn enqueue(groups: &[Group]) -> Result<Batch, HostError> {
    let groups: Vec<_> = groups.iter().map(Group::lower).collect();
    let borrowed: Vec<&wit::Group> = groups.iter().collect();
    Ok(Batch(wit::enqueue(&borrowed)?))
}

/// What earlier steps carried over and no step has asked for since: for every batch that had such groups one of them alone,
/// oldest first. Groups keep their places. After a crash too: what had ended is as it was, what had not is run again.
///
/// # Errors
/// When the store, the dataset or a component is not what it was.
pub fn carried() -> Result<Vec<Batch>, HostError> {
    Ok(wit::carried()?.into_iter().map(Batch).collect())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
