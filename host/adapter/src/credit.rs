//! Which rewards count, and what they add up to.

use fulgurite_core::reward::{Reward, RewardSource};

/// Sources that train unless the config accepts others: what the agent or a client says of itself is recorded only.
pub const ACCEPTED_BY_DEFAULT: [RewardSource; 2] = [RewardSource::Grader, RewardSource::Host];

/// The rewards that count, in the order recorded.
#[must_use]
pub fn accepted(rewards: &[Reward], sources: &[RewardSource]) -> Vec<Reward> {
    rewards.iter().filter(|reward| sources.contains(&reward.source)).cloned().collect()
}

/// Return of a rollout in one dimension: the sum over all accepted rewards, of single calls and of the whole rollout.
///
/// `None` when there is no such reward, or when the sum is not a finite number: no grade is not a grade of 0.
#[must_use]
pub fn total_reward(rewards: &[Reward], dimension: &str, sources: &[RewardSource]) -> Option<f64> {
    let mut values = rewards
        .iter()
        .filter(|reward| reward.dimension == dimension && sources.contains(&reward.source))
        .map(|reward| reward.value);
    let first = values.next()?;
    Some(values.fold(first, |sum, value| sum + value)).filter(|total| total.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reward(source: RewardSource, dimension: &str, value: f64, call_index: Option<u64>) -> Reward {
        Reward { dimension: dimension.to_owned(), value, feedback: None, source, component: None, call_index }
    }

    #[test]
    fn an_agent_cannot_pay_itself_and_calls_count_too() {
        let rewards = [
            reward(RewardSource::Agent, "reward", 1e9, None),
            reward(RewardSource::Grader, "reward", 0.25, None),
            reward(RewardSource::Grader, "style", 7.0, None),
            reward(RewardSource::Host, "reward", 0.5, Some(1)),
        ];
        assert_eq!(total_reward(&rewards, "reward", &ACCEPTED_BY_DEFAULT), Some(0.75));
        assert_eq!(total_reward(&rewards, "reward", &[RewardSource::Agent]), Some(1e9));
        assert_eq!(accepted(&rewards, &ACCEPTED_BY_DEFAULT).len(), 3);
    }

    #[test]
    fn no_grade_is_not_a_grade_of_zero() {
        let agent_only = [reward(RewardSource::Agent, "reward", 1.0, None)];
        assert_eq!(total_reward(&agent_only, "reward", &ACCEPTED_BY_DEFAULT), None);
        for values in [[f64::NAN, 1.0], [f64::MAX, f64::MAX], [f64::INFINITY, f64::NEG_INFINITY]] {
            let broken = values.map(|value| reward(RewardSource::Grader, "reward", value, None));
            assert_eq!(total_reward(&broken, "reward", &ACCEPTED_BY_DEFAULT), None);
        }
    }
}
