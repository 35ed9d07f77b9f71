//! Finished rollouts as far as they matter, and the numbers that people look at. Pure, but for [`Rollout::read`], which asks the
//! host.

use std::collections::BTreeMap;

use fulgurite_credit::group::Estimator;
use fulgurite_credit::statistics::{has_variance, mean};
use fulgurite_sdk::algorithm::policy::Model;
use fulgurite_sdk::algorithm::rollouts::{ItemId, RolloutId};
use fulgurite_sdk::algorithm::trajectories::{Trajectory, Transition, TransitionId};

use crate::config::RolloutSection;

/// Characters of a metric's name at most: what the host takes.
const NAME_CHARS_MAX: usize = 64;

/// One LLM call.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// What the host calls it.
    pub id: TransitionId,
    /// Number of its event: where a fork makes it anew.
    pub event: u64,
    /// The role of the agent that made it.
    pub agent_role: String,
    /// Whether it is to be trained on.
    pub is_trained: bool,
    /// Tokens that the policy drew.
    pub completion_tokens: u32,
    /// The model that drew them, which is trained on them.
    pub model: Model,
    /// The weights of it that drew them.
    pub policy_version: u64,
    /// What it earned by itself, in the dimension that is optimised.
    pub reward: f64,
    /// Hash of all that it saw: equal for equal prompts.
    pub prompt_hash: u64,
    /// Hash of what it saw that no earlier call of its rollout had seen: a tool's result, the request of the first call. 0: it
    /// saw nothing new, or nobody knows.
    pub observation_hash: u64,
}

/// A finished rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Its name.
    pub id: RolloutId,
    /// Its item.
    pub item: ItemId,
    /// Its group, a number of its own over all batches of the step.
    pub group: usize,
    /// What it earned; none when it was not graded or has no reward of the dimension: then it is in no baseline and no loss.
    pub reward: Option<f64>,
    /// What is added to that for its length, 0 or below.
    pub shaping: f64,
    /// What it earned in the other dimensions.
    pub other_rewards: BTreeMap<String, f64>,
    /// Whether the policy left no outcome.
    pub is_malformed: bool,
    /// Whether it was cut off by a limit of tokens, turns or context rather than ended.
    pub is_cut_off: bool,
    /// Its calls, in order.
    pub calls: Vec<Call>,
}

impl Rollout {
    /// A rollout that ended by itself and has these calls and nothing else. Its item is named after its group, whose rollouts
    /// are all of one item.
    #[must_use]
    pub fn new(id: impl Into<String>, group: usize, reward: Option<f64>, calls: Vec<Call>) -> Self {
        Self {
            id: RolloutId(id.into()),
            item: ItemId(format!("item-{group}")),
            group,
            reward,
            shaping: 0.0,
            other_rewards: BTreeMap::new(),
            is_malformed: false,
            is_cut_off: false,
            calls,
        }
    }

    /// Reads what matters of what happened.
    #[must_use]
    pub fn read(group: usize, trajectory: &Trajectory, section: &RolloutSection) -> Self {
        let is_graded = trajectory.is_graded();
        let outcome = trajectory.outcome_kind();
        let calls: Vec<Call> =
            trajectory.transitions().into_iter().map(|transition| Call::read(&transition, section)).collect();
        let mut other_rewards = BTreeMap::new();
        if is_graded {
            for reward in trajectory.rewards().into_iter().filter(|reward| reward.dimension != section.dimension) {
                *other_rewards.entry(reward.dimension).or_default() += reward.value;
            }
        }
        let tokens = calls.iter().map(|call| u64::from(call.completion_tokens)).sum();
        Self {
            id: trajectory.rollout_id(),
            item: trajectory.item_id(),
            group,
            reward: if is_graded { trajectory.total(&section.dimension) } else { None },
            shaping: section.overlong(tokens),
            other_rewards,
            is_malformed: is_graded && outcome != "completed",
            is_cut_off: matches!(outcome.as_str(), "token-limit" | "turn-limit" | "context-limit"),
            calls,
        }
    }

    /// Tokens that the policy drew.
    #[must_use]
    pub fn tokens(&self) -> f64 {
        self.calls.iter().map(|call| f64::from(call.completion_tokens)).sum()
    }

    /// What it earned and what its length costs: what advantages are made of.
    #[must_use]
    pub fn shaped_reward(&self) -> Option<f64> {
        // Adding 0 would turn -0 into 0, and nothing else.
        self.reward.map(|reward| if self.shaping < 0.0 { reward + self.shaping } else { reward })
    }

    /// What belongs to the whole rollout: its shaped reward without what single calls earned.
    #[must_use]
    pub fn whole_reward(&self) -> Option<f64> {
        let calls: f64 = self.calls.iter().map(|call| call.reward).sum();
        self.shaped_reward().map(|reward| reward - calls)
    }

    /// The calls that are trained on.
    pub fn trained(&self) -> impl Iterator<Item = &Call> {
        self.calls.iter().filter(|call| call.is_trained)
    }

    /// The rewards of the calls that are trained on and, by itself, that of the whole rollout. What a call earned that is not
    /// trained on belongs to the trained one before it: its answer is what the other one went on from. Where there is none
    /// before, it belongs to the whole.
    #[must_use]
    pub fn step_rewards(&self) -> Option<(Vec<f64>, f64)> {
        let mut whole = self.whole_reward()?;
        let mut steps: Vec<f64> = vec![];
        for call in &self.calls {
            if call.is_trained {
                steps.push(call.reward);
            } else if let Some(before) = steps.last_mut() {
                *before += call.reward;
            } else {
                whole += call.reward;
            }
        }
        Some((steps, whole))
    }
}

impl Call {
    /// A call that is trained on, of the first weights of the policy, which earned nothing by itself.
    #[must_use]
    pub fn new(id: impl Into<String>, completion_tokens: u32) -> Self {
        Self {
            id: TransitionId(id.into()),
            event: 0,
            agent_role: "agent".to_owned(),
            is_trained: true,
            completion_tokens,
            model: Model::Policy,
            policy_version: 0,
            reward: 0.0,
            prompt_hash: 0,
            observation_hash: 0,
        }
    }

    fn read(transition: &Transition, section: &RolloutSection) -> Self {
        let roles = &section.agent_roles;
        let trains = |role: &str| roles.is_empty() || roles.iter().any(|known| known == role);
        let rewards = transition.rewards().into_iter().filter(|reward| reward.dimension == section.dimension);
        let agent_role = transition.agent_role();
        Self {
            id: transition.id(),
            event: transition.event(),
            is_trained: transition.is_trainable() && trains(&agent_role),
            agent_role,
            completion_tokens: transition.completion_tokens(),
            model: transition.model(),
            policy_version: transition.policy_version(),
            reward: rewards.map(|reward| reward.value).sum(),
            prompt_hash: transition.prompt_hash(),
            observation_hash: transition.observation_hash(),
        }
    }
}

/// The places of the rollouts of each group, by group.
#[must_use]
pub fn groups(rollouts: &[Rollout]) -> BTreeMap<usize, Vec<usize>> {
    let mut places: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (place, rollout) in rollouts.iter().enumerate() {
        places.entry(rollout.group).or_default().push(place);
    }
    places
}

/// The rollouts at these places.
#[must_use]
pub fn members<'a>(rollouts: &'a [Rollout], places: &[usize]) -> Vec<&'a Rollout> {
    places.iter().filter_map(|place| rollouts.get(*place)).collect()
}

/// One advantage per rollout, each compared within its group. `reward` tells what a rollout is compared by.
#[must_use]
pub fn advantages(
    rollouts: &[Rollout],
    estimator: Estimator,
    reward: impl Fn(&Rollout) -> Option<f64>,
) -> Vec<Option<f64>> {
    let mut advantages = vec![None; rollouts.len()];
    for places in groups(rollouts).values() {
        let members = members(rollouts, places);
        let rewards: Vec<Option<f64>> = members.iter().map(|rollout| reward(rollout)).collect();
        let lengths: Vec<f64> = members.iter().map(|rollout| rollout.tokens()).collect();
        for (place, advantage) in places.iter().zip(estimator.advantages(&rewards, &lengths)) {
            if let Some(slot) = advantages.get_mut(*place) {
                *slot = advantage;
            }
        }
    }
    advantages
}

/// Whether the rollouts of a group differ in what they earned, before any shaping.
#[must_use]
pub fn teaches(rollouts: &[&Rollout]) -> bool {
    let rewards: Vec<f64> = rollouts.iter().filter_map(|rollout| rollout.reward).collect();
    has_variance(&rewards)
}

/// What a step saw, by name.
#[must_use]
pub fn numbers(rollouts: &[Rollout]) -> Vec<(String, f64)> {
    let (mut scored_groups, mut flat_groups) = (0_u32, 0_u32);
    for places in groups(rollouts).values() {
        let members = members(rollouts, places);
        let is_scored = members.iter().any(|rollout| rollout.reward.is_some());
        scored_groups += u32::from(is_scored);
        flat_groups += u32::from(is_scored && !teaches(&members));
    }
    let graded: Vec<&Rollout> = rollouts.iter().filter(|rollout| rollout.reward.is_some()).collect();
    let over =
        |number: &dyn Fn(&Rollout) -> f64| mean(&graded.iter().map(|rollout| number(rollout)).collect::<Vec<_>>());
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    let (total, scored) = (rollouts.len() as f64, graded.len() as f64);
    let malformed = graded.iter().filter(|rollout| rollout.is_malformed).count() as f64;
    let mut numbers: Vec<(String, f64)> = [
        ("reward_mean", over(&|rollout| rollout.reward.unwrap_or(0.0))),
        ("malformed_share", share(malformed, scored)),
        ("zero_variance_share", share(flat_groups.into(), scored_groups.into())),
        ("excluded_share", share(total - scored, total)),
        ("response_tokens", over(&Rollout::tokens)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    if graded.iter().any(|rollout| rollout.shaping < 0.0) {
        numbers.push(("overlong_mean".to_owned(), over(&|rollout| rollout.shaping)));
    }
    let mut by_dimension: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (dimension, value) in graded.iter().flat_map(|rollout| &rollout.other_rewards) {
        by_dimension.entry(dimension).or_default().push(*value);
    }
    numbers.extend(by_dimension.into_iter().map(|(dimension, values)| (metric("reward/", dimension), mean(&values))));
    numbers
}

/// The name of a metric about something that has a name of its own: what the host does not take becomes `_`.
fn metric(prefix: &str, name: &str) -> String {
    let kept = |character: char| {
        let lower = character.to_ascii_lowercase();
        if lower.is_ascii_lowercase() || lower.is_ascii_digit() || "_/-".contains(lower) { lower } else { '_' }
    };
    prefix.chars().chain(name.chars().map(kept)).take(NAME_CHARS_MAX).collect()
}

/// How many versions lie between drawing and training, over the calls that are trained on: mean and largest. `current` is the
/// version of a model that is trained. Nothing without such calls.
#[must_use]
pub fn staleness(rollouts: &[Rollout], current: impl Fn(&Model) -> u64) -> Option<(f64, f64)> {
    let trained = rollouts.iter().filter(|rollout| rollout.reward.is_some()).flat_map(Rollout::trained);
    let behind: Vec<f64> =
        trained.map(|call| current(&call.model).saturating_sub(call.policy_version) as f64).collect();
    let most = behind.iter().copied().reduce(f64::max)?;
    Some((mean(&behind), most))
}

/// A rollout of calls with these ids, each of 5 tokens that version 3 drew.
#[cfg(test)]
pub(crate) fn example(group: usize, reward: Option<f64>, ids: &[u32]) -> Rollout {
    let call = |id: &u32| Call { policy_version: 3, ..Call::new(id.to_string(), 5) };
    Rollout::new(format!("rollout-{ids:?}"), group, reward, ids.iter().map(call).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRPO: Estimator = Estimator::Grpo { epsilon: 1e-4 };

    fn number(rollouts: &[Rollout], name: &str) -> f64 {
        numbers(rollouts).iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no {name}")).1
    }

    fn of(rollouts: &[Rollout]) -> Vec<Option<f64>> {
        advantages(rollouts, GRPO, Rollout::shaped_reward)
    }

    #[test]
    fn groups_do_not_mix_and_flat_ones_are_counted() {
        let rollouts = [
            example(1, Some(1.0), &[1]),
            example(0, Some(0.3), &[2]),
            example(1, Some(1.0), &[3]),
            example(0, Some(0.0), &[4]),
        ];
        let found: Vec<f64> = of(&rollouts).into_iter().map(Option::unwrap).collect();
        assert!(found[0] == 0.0 && found[2] == 0.0 && found[1] > 0.7 && found[3] < -0.7, "{found:?}");
        assert!((number(&rollouts, "zero_variance_share") - 0.5).abs() < 1e-12);
    }

    /// Property 5 of ALGORITHMS.md, section 17: cutting a rollout into more calls leaves every advantage as it was.
    #[test]
    fn more_calls_change_no_advantage() {
        let with = |ids: &[u32]| {
            of(&[example(0, Some(1.0), ids), example(0, Some(0.0), &[100]), example(0, Some(0.3), &[101])])
        };
        assert_eq!(with(&[1]), with(&[1, 2, 3, 4]));
    }

    #[test]
    fn faults_are_counted_and_in_nothing_else() {
        let mut malformed = example(0, Some(0.0), &[2]);
        malformed.is_malformed = true;
        let rollouts = [example(0, Some(1.0), &[1]), malformed, example(0, None, &[3]), example(0, None, &[])];
        for name in ["reward_mean", "malformed_share", "excluded_share"] {
            assert!((number(&rollouts, name) - 0.5).abs() < 1e-12, "{name}");
        }
        assert_eq!(of(&rollouts).iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false, false]);
        for nothing in [&rollouts[2..], &[]] {
            assert!(numbers(nothing).iter().all(|(_, value)| value.is_finite()));
        }
    }

    #[test]
    fn length_is_punished_in_advantages_and_not_in_what_is_reported() {
        let mut long = example(0, Some(1.0), &[1, 2]);
        long.shaping = -0.5;
        let rollouts = [long, example(0, Some(1.0), &[3])];
        assert_eq!(rollouts[0].shaped_reward(), Some(0.5));
        assert!(of(&rollouts)[0].unwrap() < 0.0);
        assert!((number(&rollouts, "reward_mean") - 1.0).abs() < 1e-12);
        assert!((number(&rollouts, "overlong_mean") + 0.25).abs() < 1e-12);
        // What was earned is equal: DAPO resamples such a group, whatever the shaping says.
        assert!((number(&rollouts, "zero_variance_share") - 1.0).abs() < 1e-12);
    }

    #[test]
    fn other_dimensions_are_reported_under_names_that_the_host_takes() {
        let mut one = example(0, Some(1.0), &[1]);
        one.other_rewards.insert("Format ok?".to_owned(), 0.25);
        let mut two = example(0, Some(1.0), &[2]);
        two.other_rewards.insert("Format ok?".to_owned(), 0.75);
        assert!((number(&[one, two, example(0, Some(0.0), &[3])], "reward/format_ok_") - 0.5).abs() < 1e-12);
        assert_eq!(metric("reward/", &"x".repeat(99)).len(), NAME_CHARS_MAX);
    }

    #[test]
    fn rewards_of_calls_that_are_not_trained_on_are_not_lost() {
        let mut rollout = example(0, Some(2.0), &[1, 2, 3, 4]);
        for (call, reward) in rollout.calls.iter_mut().zip([0.1, 0.2, 0.4, 0.8]) {
            call.reward = reward;
        }
        rollout.calls[0].is_trained = false;
        rollout.calls[2].is_trained = false;
        let (steps, whole) = rollout.step_rewards().unwrap();
        // 0.5 of the 2 belongs to no call.
        assert!((steps[0] - 0.6).abs() < 1e-12 && (steps[1] - 0.8).abs() < 1e-12 && (whole - 0.6).abs() < 1e-12);
        assert_eq!(example(0, None, &[1]).step_rewards(), None);
    }

    #[test]
    fn staleness_is_of_what_is_trained_on() {
        let mut old = example(0, Some(1.0), &[1, 2, 3]);
        old.calls[0].policy_version = 1;
        // Nobody trains on these two: the second call of the one, and all of the other.
        old.calls[1] = Call { is_trained: false, policy_version: 0, ..old.calls[1].clone() };
        let mut fault = example(0, None, &[4]);
        fault.calls[0].policy_version = 0;
        assert_eq!(staleness(&[old.clone(), fault.clone()], |_| 3), Some((1.0, 2.0)));
        assert_eq!(staleness(&[example(1, Some(0.0), &[5]), old.clone()], |_| 4), Some((5.0 / 3.0, 3.0)));
        assert_eq!(staleness(&[fault], |_| 4), None);
        // Each model counts its own versions.
        old.calls[2].model = Model::Named("other".to_owned());
        assert_eq!(staleness(&[old], |model| if *model == Model::Policy { 3 } else { 9 }), Some((4.0, 6.0)));
    }
}
