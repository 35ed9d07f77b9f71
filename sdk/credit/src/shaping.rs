//! Rewards of length and repetition, to be added to a rollout's reward.

use std::collections::BTreeSet;

/// DAPO's overlong punishment (arXiv 2503.14476): 0 up to `tokens_max − cache` tokens, then linearly down to −1 at `tokens_max`,
/// and −1 beyond. Without a cache it is a step.
#[must_use]
pub fn overlong(tokens: u64, tokens_max: u64, cache: u64) -> f64 {
    let free = tokens_max.saturating_sub(cache);
    if tokens <= free {
        0.0
    } else if tokens > tokens_max {
        -1.0
    } else {
        -((tokens - free) as f64 / cache as f64)
    }
}

/// NeMo-RL's form, which goes on falling beyond `tokens_max`: `min(0, −(tokens − (tokens_max − cache)) / cache · penalty)`.
#[must_use]
pub fn overlong_unbounded(tokens: u64, tokens_max: u64, cache: u64, penalty: f64) -> f64 {
    let over = tokens.saturating_sub(tokens_max.saturating_sub(cache));
    if over == 0 { 0.0 } else { crate::finite(-(over as f64 / cache.max(1) as f64) * penalty) }
}

/// `−(1 − different n-grams / all n-grams)`: 0 without repetition, towards −1 the more is repeated (TRL). 0 where there are
/// fewer than `n` words, and for `n` of 0.
#[must_use]
pub fn repetition<T: Ord>(words: &[T], n: usize) -> f64 {
    if n == 0 || words.len() < n {
        return 0.0;
    }
    let different: BTreeSet<&[T]> = words.windows(n).collect();
    -(1.0 - different.len() as f64 / (words.len() - n + 1) as f64)
}

/// prime-rl's length penalty: what is subtracted from the reward of each rollout of a group before it is compared,
/// `mean(R) · (output weight · output / max output + …)`. Each entry of `costs` is a weight and one number per rollout
/// (tokens drawn, tokens read, turns).
#[must_use]
pub fn length_penalties(rewards: &[f64], costs: &[(f64, Vec<f64>)]) -> Vec<f64> {
    let mean = crate::statistics::mean(rewards);
    let share = |place: usize| -> f64 {
        let of = |(weight, amounts): &(f64, Vec<f64>)| {
            let most = amounts.iter().copied().fold(0.0, f64::max);
            if most > 0.0 { weight * amounts.get(place).copied().unwrap_or(0.0) / most } else { 0.0 }
        };
        costs.iter().map(of).sum()
    };
    (0..rewards.len()).map(|place| crate::finite(mean * share(place))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::near;

    #[test]
    fn golden_vector_35_overlong() {
        near(&[50, 90, 110].map(|tokens| overlong(tokens, 100, 20)), &[0.0, -0.5, -1.0], 0.0);
        near(&[80, 81, 100, 101].map(|tokens| overlong(tokens, 100, 20)), &[0.0, -0.05, -1.0, -1.0], 1e-12);
        near(&[100, 101].map(|tokens| overlong(tokens, 100, 0)), &[0.0, -1.0], 0.0);
        near(&[0, 1, 5].map(|tokens| overlong(tokens, 4, 9)), &[0.0, -1.0 / 9.0, -1.0], 1e-12);
        near(&[80, 90, 120].map(|tokens| overlong_unbounded(tokens, 100, 20, 0.5)), &[0.0, -0.25, -1.0], 1e-12);
    }

    #[test]
    fn golden_vector_43_repetition() {
        near(&[repetition(&[5; 5], 2), repetition(&[1, 2, 1, 2, 1, 2], 2)], &[-0.75, -0.6], 1e-12);
        near(&[repetition(&[1, 2, 3], 2), repetition(&[1], 2), repetition(&[1, 1], 0)], &[0.0; 3], 0.0);
        near(&[repetition(&["a", "b", "a", "b"], 2)], &[-1.0 / 3.0], 1e-12);
    }

    #[test]
    fn length_costs_a_share_of_what_the_group_earns() {
        let costs = [(0.5, vec![10.0, 20.0]), (0.0, vec![1.0, 1.0])];
        near(&length_penalties(&[1.0, 0.0], &costs), &[0.125, 0.25], 1e-12);
        near(&length_penalties(&[1.0, 0.0], &[(0.5, vec![0.0, 0.0])]), &[0.0, 0.0], 0.0);
        assert!(length_penalties(&[], &costs).is_empty());
    }
}
