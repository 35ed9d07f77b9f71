//! Choosing items by how well they went last.

use std::collections::{BTreeMap, BTreeSet};

use fulgurite_sdk::algorithm::HostError;
use fulgurite_sdk::algorithm::rollouts::{self, Item, Split};

use crate::config::Curriculum;
use crate::draw::Draw;
use crate::rollout::{self, Rollout};

/// Items whose latest reward is kept. 100,000: some 3 MB of the 16 MiB that a plugin's state may have. Items beyond that stay
/// unseen.
const ITEMS_MAX: usize = 100_000;
/// Times that so many items as are wanted are drawn; then places that are left are filled with what was passed over. 10: with all
/// items in the pools that weigh least, a fifth each, nine tenths of the places are filled by then.
const ROUNDS_MAX: u32 = 10;

/// Latest mean reward of each item's group.
pub(crate) type Latest = BTreeMap<String, f64>;

/// Draws so many items of the training split, each taken with the probability of its pool.
pub(crate) fn items(curriculum: &Curriculum, latest: &Latest, count: u32, step: u64) -> Result<Vec<Item>, HostError> {
    let pools = curriculum.pools();
    let mut taken: Vec<(Item, String)> = vec![];
    let mut passed: Vec<(Item, Passed)> = vec![];
    for _ in 0..ROUNDS_MAX {
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
            let is_new = taken.iter().all(|(_, other)| *other != id);
            if draw.unit() < chance && is_new {
                taken.push((item, id));
            } else {
                passed.push((item, Passed { id, has_weight: chance > 0.0 }));
            }
        }
    }
    let known: Vec<&str> = taken.iter().map(|(_, id)| id.as_str()).collect();
    let (items, passed): (Vec<Item>, Vec<Passed>) = passed.into_iter().unzip();
    let chosen = fill(&known, &passed, (count as usize).saturating_sub(taken.len()));
    let mut items: Vec<Option<Item>> = items.into_iter().map(Some).collect();
    let filling = chosen.into_iter().filter_map(|place| items.get_mut(place)?.take());
    Ok(taken.into_iter().map(|(item, _)| item).chain(filling).collect())
}

/// An item that was drawn and not taken.
#[derive(Debug, Clone, PartialEq)]
struct Passed {
    id: String,
    /// Whether its pool has a weight above 0.
    has_weight: bool,
}

/// Which of those that were passed over, by their places, fill so many places beside those that were taken: others before
/// the same ones again, and what weighs nothing only where nothing else was drawn, because a step must have its groups.
fn fill(taken: &[&str], passed: &[Passed], count: usize) -> Vec<usize> {
    let mut known: BTreeSet<&str> = taken.iter().copied().collect();
    let mut chosen: Vec<usize> = vec![];
    for (has_weight, is_new) in [(true, true), (true, false), (false, true), (false, false)] {
        for (place, one) in passed.iter().enumerate().filter(|(_, one)| one.has_weight == has_weight) {
            if chosen.len() < count && known.contains(one.id.as_str()) != is_new && !chosen.contains(&place) {
                known.insert(&one.id);
                chosen.push(place);
            }
        }
    }
    chosen
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
    fn places_that_are_left_go_to_others_first_and_to_what_weighs_nothing_last() {
        let passed = |ids: &[(&str, bool)]| -> Vec<Passed> {
            ids.iter().map(|(id, has_weight)| Passed { id: (*id).to_owned(), has_weight: *has_weight }).collect()
        };
        let seen = passed(&[("easy", false), ("a", true), ("b", true), ("b", true), ("c", true), ("easy", false)]);
        assert_eq!(fill(&["a"], &seen, 2), [2, 4], "neither twice nor what weighs nothing");
        assert_eq!(fill(&["a"], &seen, 4), [2, 4, 1, 3], "rather twice than what weighs nothing");
        assert_eq!(fill(&["a"], &seen, 9), [2, 4, 1, 3, 0, 5], "no more than there is");
        assert_eq!(fill(&["a"], &seen, 0), [0; 0]);
        assert_eq!(fill(&[], &passed(&[("easy", false)]), 1), [0], "a step has its groups");
    }

    #[test]
    fn the_latest_mean_counts_and_faults_change_nothing() {
        let mut latest = Latest::new();
        note(&mut latest, &[example(0, Some(1.0), &[1]), example(0, Some(0.0), &[2]), example(1, None, &[3])]);
        assert_eq!(latest.iter().map(|(id, mean)| (id.as_str(), *mean)).collect::<Vec<_>>(), [("item-0", 0.5)]);
        note(&mut latest, &[example(0, Some(0.25), &[1]), example(0, None, &[2])]);
        assert_eq!(latest["item-0"].to_bits(), 0.25_f64.to_bits());
    }
}
