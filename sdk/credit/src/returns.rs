//! Returns of tokens: what is still to come from each of them on (REINFORCE++, arXiv 2501.03262).
//!
//! A list is a rollout's **sampled** tokens in order, over all of its calls. What stands between two calls (tool results) is
//! in no list, so that it neither receives nor discounts credit: the widely copied form that multiplies by the mask
//! everywhere cuts the reward off from every call before a tool result. [`crate::rows`] has the same over rows with context.

/// `G_t = r_t + γ·G_{t+1}` over sampled tokens. Rewards that are not finite count as 0.
#[must_use]
pub fn discounted(rewards: &[f64], discount: f64) -> Vec<f64> {
    let mut running = 0.0;
    let mut returns: Vec<f64> = rewards
        .iter()
        .rev()
        .map(|reward| {
            running = crate::finite(crate::finite(*reward) + discount * running);
            running
        })
        .collect();
    returns.reverse();
    returns
}

/// Puts rewards on tokens: `tokens` of each call, the reward of each call, and that of the whole rollout. A call's reward sits
/// on its last token and the rollout's on the last token of all. The reward of a call without tokens goes to the last token
/// before it, or to the first of all when there is none before.
#[must_use]
pub fn on_tokens(tokens: &[usize], calls: &[f64], whole: f64) -> Vec<f64> {
    let total: usize = tokens.iter().sum();
    let mut rewards = vec![0.0; total];
    let mut end = 0;
    for (count, reward) in tokens.iter().zip(calls) {
        end += count;
        if let Some(token) = rewards.get_mut(end.saturating_sub(1)) {
            *token += reward;
        }
    }
    if let Some(last) = rewards.last_mut() {
        *last += whole;
    }
    rewards
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::near;

    #[test]
    fn golden_vector_9_discounted_returns() {
        near(&discounted(&[1.0, 2.0, 3.0], 0.5), &[2.75, 3.5, 3.0], 0.0);
    }

    #[test]
    fn nothing_makes_no_nan() {
        assert!(discounted(&[], 1.0).is_empty());
        near(&discounted(&[1.0, f64::NAN, 1.0], 1.0), &[2.0, 1.0, 1.0], 0.0);
        assert!(discounted(&[f64::MAX, f64::MAX], 1.0).iter().all(|value| value.is_finite()));
        assert!(on_tokens(&[], &[], 1.0).is_empty());
    }

    #[test]
    fn rewards_sit_on_the_last_tokens() {
        near(&on_tokens(&[2, 3], &[0.5, 0.25], 1.0), &[0.0, 0.5, 0.0, 0.0, 1.25], 0.0);
        near(&on_tokens(&[0, 2, 0], &[0.5, 0.0, 0.25], 1.0), &[0.5, 1.25], 0.0);
    }

    proptest! {
        #[test]
        fn without_discount_a_return_is_what_is_left(rewards in prop::collection::vec(-10.0..10.0_f64, 1..30)) {
            let returns = discounted(&rewards, 1.0);
            for (place, found) in returns.iter().enumerate() {
                prop_assert!((found - rewards[place..].iter().sum::<f64>()).abs() < 1e-9);
            }
        }

        /// However tokens are spread over calls, nothing of a reward is lost.
        #[test]
        fn all_of_a_reward_is_on_tokens(
            calls in prop::collection::vec((0..5_usize, -3.0..3.0_f64), 1..6),
            whole in -3.0..3.0_f64,
        ) {
            let (mut tokens, rewards): (Vec<usize>, Vec<f64>) = calls.into_iter().unzip();
            tokens[0] += 1;
            let placed = on_tokens(&tokens, &rewards, whole);
            prop_assert!((placed.iter().sum::<f64>() - whole - rewards.iter().sum::<f64>()).abs() < 1e-9);
        }
    }
}
