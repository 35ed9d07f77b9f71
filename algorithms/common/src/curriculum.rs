//! Choosing items by how well they went last.

use std::collections::BTreeMap;

use fulgurite_sdk::algorithm::HostError;
use fulgurite_sdk::algorithm::rollouts::{self, Item, Split};

use crate::config::Curriculum;
use crate::draw::Draw;
use crate::rollout::{self, Rollout};

/// Items whose latest reward is kept. 100,000: some 3 MB of the 16 MiB that a plugin's state may have. Items beyond that stay
/// unseen.
const ITEMS_MAX: usize = 100_000;
/// Times that so many items as are wanted are drawn; then the last ones are taken as they come. 10: with all items in the
/// pools that weigh least, a fifth each, nine tenths of the places are filled by then.
const ROUNDS_MAX: u32 = 10;

/// Latest mean reward of each item's group.
pub(crate) type Latest = BTreeMap<String, f64>;

/// Draws so many items of the training split, each taken with the probability of its pool.
pub(crate) fn items(curriculum: &Curriculum, latest: &Latest, count: u32, step: u64) -> Result<Vec<Item>, HostError> {
    let pools = curriculum.pools();
    let mut taken: Vec<Item> = vec![];
    for round in 1..=ROUNDS_MAX {
        let missing = count.saturating_sub(u32::try_from(taken.len()).unwrap_or(u32::MAX));
        if missing == 0 {
            break;
        }
        let offered = rollouts::next_items(Split::Train, missing)?;
        let ids: Vec<String> = offered.iter().map(|item| item.id().0).collect();
        let mut draw = Draw::new("curriculum", step, ids.iter().map(String::as_str));
        for (item, id) in offered.into_iter().zip(ids) {
            let chance = pools.acceptance(latest.get(&id).copied());
            // Where the dataset ends and begins anew, an item could be in a step twice.
            let is_new = taken.iter().all(|other| other.id().0 != id);
            if (draw.unit() < chance && is_new) || round == ROUNDS_MAX {
                taken.push(item);
            }
        }
    }
    Ok(taken)
}

/// Notes how well the groups of a step went.
pub(crate) fn note(latest: &mut Latest, rollouts: &[Rollout]) {
    for places in rollout::groups(rollouts).values() {
        let members = rollout::members(rollouts, places);
        let rewards: Vec<f64> = members.iter().filter_map(|rollout| rollout.reward).collect();
        let (Some(first), false) = (members.first(), rewards.is_empty()) else { continue };
        if latest.len() < ITEMS_MAX || latest.contains_key(&first.item.0) {
            latest.insert(first.item.0.clone(), fulgurite_credit::statistics::mean(&rewards));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::example;

    #[test]
    fn the_latest_mean_counts_and_faults_change_nothing() {
        let mut latest = Latest::new();
        note(&mut latest, &[example(0, Some(1.0), &[1]), example(0, Some(0.0), &[2]), example(1, None, &[3])]);
        assert_eq!(latest.iter().map(|(id, mean)| (id.as_str(), *mean)).collect::<Vec<_>>(), [("item-0", 0.5)]);
        note(&mut latest, &[example(0, Some(0.25), &[1]), example(0, None, &[2])]);
        assert_eq!(latest["item-0"].to_bits(), 0.25_f64.to_bits());
    }
}
