//! Who may be alive at once. A full pool refuses instead of waiting, so nobody goes there without a slot.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use tokio::sync::OwnedSemaphorePermit;

use crate::agent::AgentPlugin;
use crate::engine::World;
use crate::profile::EngineProfile;
use crate::tool::ToolPlugin;

/// The slots of one live attempt, given back when it is dropped.
#[derive(Debug)]
#[must_use = "the slots are given back when this is dropped"]
pub struct Admission {
    _slots: Vec<OwnedSemaphorePermit>,
}

/// Lets attempts of one make in: the agent's slot and the slots of all its tools are taken together, because two attempts
/// that each had a part of what they need would wait for each other for ever.
#[derive(Clone)]
pub struct Gatekeeper {
    /// How many slots of each engine an attempt takes, always in the same order.
    needs: BTreeMap<EngineProfile, (Arc<World>, u32)>,
}

impl std::fmt::Debug for Gatekeeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let needs: Vec<_> = self.needs.iter().map(|(profile, (_, count))| (profile, count)).collect();
        f.debug_struct("Gatekeeper").field("needs", &needs).finish()
    }
}

impl Gatekeeper {
    /// For attempts with this agent and these tools.
    ///
    /// # Errors
    /// A host fault when one attempt alone takes more slots than this machine has.
    pub fn new<'a>(
        agent: &'a AgentPlugin,
        tools: impl IntoIterator<Item = &'a ToolPlugin>,
    ) -> Result<Self, AttemptOutcome> {
        let mut needs: BTreeMap<EngineProfile, (Arc<World>, u32)> = BTreeMap::new();
        for world in std::iter::once(agent.world()).chain(tools.into_iter().map(ToolPlugin::world)) {
            needs.entry(world.profile).or_insert_with(|| (Arc::clone(world), 0)).1 += 1;
        }
        if let Some((profile, (world, count))) =
            needs.iter().find(|(_, (world, count))| *count > world.attempt_slots_max)
        {
            let slots = world.attempt_slots_max;
            let detail = format!("an attempt takes {count} {profile} slots, and this machine has {slots}");
            return Err(AttemptOutcome::failed(OutcomeKind::HostFault, detail));
        }
        Ok(Self { needs })
    }

    /// Attempts that fit at once.
    #[must_use]
    pub fn attempts_max(&self) -> usize {
        let fits = self.needs.values().map(|(world, count)| world.attempt_slots_max / (*count).max(1));
        fits.min().map_or(usize::MAX, |fits| fits as usize)
    }

    /// Takes the slots if they are free.
    #[must_use]
    pub fn try_admit(&self) -> Option<Admission> {
        let mut slots = Vec::with_capacity(self.needs.len());
        for (world, count) in self.needs.values() {
            slots.push(Arc::clone(&world.attempt_slots).try_acquire_many_owned(*count).ok()?);
        }
        Some(Admission { _slots: slots })
    }

    /// Waits for the slots, first come, first served.
    ///
    /// # Errors
    /// A host fault when the sandbox is being closed.
    pub async fn admit(&self) -> Result<Admission, AttemptOutcome> {
        let mut slots = Vec::with_capacity(self.needs.len());
        for (world, count) in self.needs.values() {
            let permit = Arc::clone(&world.attempt_slots).acquire_many_owned(*count).await;
            slots.push(permit.map_err(|_| AttemptOutcome::failed(OutcomeKind::HostFault, "the sandbox is closed"))?);
        }
        Ok(Admission { _slots: slots })
    }
}
