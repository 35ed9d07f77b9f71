//! What is trained on: calls with the weights of their tokens, and how they are split into mini-batches. Pure.

use std::collections::BTreeMap;

use fulgurite_sdk::algorithm::policy::{Entry, Model, Stream};
use fulgurite_sdk::algorithm::trajectories::TransitionId;

use crate::draw::Draw;
use crate::rollout::Rollout;

/// The advantage of a call's tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Credit {
    /// The same for all of them.
    Call(f64),
    /// One per token that the policy drew.
    Tokens(Vec<f64>),
}

impl Credit {
    fn teaches(&self) -> bool {
        match self {
            Self::Call(advantage) => *advantage != 0.0,
            Self::Tokens(advantages) => advantages.iter().any(|advantage| *advantage != 0.0),
        }
    }
}

/// A call that is trained on.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The call.
    pub id: TransitionId,
    /// The group of its rollout: groups stay together.
    pub group: usize,
    /// The model that drew it, which is trained on it.
    pub model: Model,
    /// The weights of it that drew it.
    pub policy_version: u64,
    /// What its tokens are worth.
    pub credit: Credit,
}

impl Sample {
    /// Its entry in a batch.
    #[must_use]
    pub fn entry(&self) -> Entry {
        let narrow = |advantage: f64| {
            #[expect(clippy::cast_possible_truncation, reason = "the host's weights are f32")]
            let narrow = advantage as f32;
            narrow
        };
        let entry = |weight: f64| Entry::new(self.id.clone(), Stream::Rl, narrow(weight)).group(self.group as u64);
        match &self.credit {
            Credit::Call(advantage) => entry(*advantage),
            Credit::Tokens(advantages) => entry(0.0).weights(advantages.iter().copied().map(narrow).collect()),
        }
    }
}

/// The calls that are trained on, each with the advantage of its rollout (`LightningRL`'s identical assignment).
#[must_use]
pub fn identical(rollouts: &[Rollout], advantages: &[Option<f64>]) -> Vec<Sample> {
    let calls = rollouts.iter().zip(advantages).map(|(rollout, advantage)| {
        advantage.map(|advantage| vec![Credit::Call(advantage); rollout.trained().count()])
    });
    samples(rollouts, calls)
}

/// The calls that are trained on, with one credit for each of them, rollout by rollout; none leaves the rollout out.
#[must_use]
pub fn samples(rollouts: &[Rollout], credits: impl IntoIterator<Item = Option<Vec<Credit>>>) -> Vec<Sample> {
    let mut samples = vec![];
    for (rollout, credits) in rollouts.iter().zip(credits) {
        let credited = rollout.trained().zip(credits.into_iter().flatten());
        samples.extend(credited.map(|(call, credit)| Sample {
            id: call.id.clone(),
            group: rollout.group,
            model: call.model.clone(),
            policy_version: call.policy_version,
            credit,
        }));
    }
    samples
}

/// Gives the calls of a rollout that are trained on their parts of a list with one number per token.
#[must_use]
pub fn per_token(rollout: &Rollout, tokens: &[f64]) -> Vec<Credit> {
    let mut rest = tokens;
    let part = |count: u32| {
        let (part, after) = rest.split_at_checked(count as usize).unwrap_or((rest, &[]));
        rest = after;
        Credit::Tokens(part.to_vec())
    };
    rollout.trained().map(|call| call.completion_tokens).map(part).collect()
}

/// Whether any advantage differs from 0.
#[must_use]
pub fn teaches(samples: &[&Sample]) -> bool {
    samples.iter().any(|sample| sample.credit.teaches())
}

/// The samples of each model, the policy's first. They keep their order.
#[must_use]
pub fn by_model<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> BTreeMap<&'a Model, Vec<&'a Sample>> {
    let mut parts: BTreeMap<&Model, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        parts.entry(&sample.model).or_default().push(sample);
    }
    parts
}

/// Splits samples into parts of whole groups, as even as can be in groups, in random order. Within a part samples keep their
/// order; one part is all of them as they are. There are never more parts than groups, and no empty ones.
#[must_use]
pub fn mini_batches<'a>(samples: &'a [Sample], count: u32, draw: &mut Draw) -> Vec<Vec<&'a Sample>> {
    if samples.is_empty() {
        return vec![];
    }
    if count <= 1 {
        return vec![samples.iter().collect()];
    }
    let mut groups: Vec<usize> = samples.iter().map(|sample| sample.group).collect();
    groups.sort_unstable();
    groups.dedup();
    draw.shuffle(&mut groups);
    let parts = (count as usize).min(groups.len());
    let part_of: BTreeMap<usize, usize> =
        groups.iter().enumerate().map(|(place, group)| (*group, place * parts / groups.len())).collect();
    let mut split = vec![vec![]; parts];
    for sample in samples {
        if let Some(part) = part_of.get(&sample.group).and_then(|part| split.get_mut(*part)) {
            part.push(sample);
        }
    }
    split
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rollout::example;

    fn draw(seed: u64) -> Draw {
        Draw::new("test", seed, [])
    }

    fn ids(samples: &[Sample]) -> Vec<&str> {
        samples.iter().map(|sample| sample.id.0.as_str()).collect()
    }

    /// Golden vector 40 as the plugin sees it: rollout A has two calls and B one; A's advantage goes to both of its calls.
    #[test]
    fn every_call_gets_the_advantage_of_its_rollout() {
        let rollouts = [example(0, Some(3.0), &[1, 2]), example(0, None, &[9]), example(0, Some(-1.0), &[3])];
        let found = identical(&rollouts, &[Some(2.0), None, Some(-1.0)]);
        assert_eq!(ids(&found), ["1", "2", "3"]);
        let credits: Vec<&Credit> = found.iter().map(|sample| &sample.credit).collect();
        assert_eq!(credits, [&Credit::Call(2.0), &Credit::Call(2.0), &Credit::Call(-1.0)]);
    }

    #[test]
    fn calls_of_other_agents_are_in_no_batch() {
        let mut one = example(0, Some(1.0), &[1, 2]);
        one.calls[0].is_trained = false;
        let rollouts = [one, example(0, Some(0.0), &[3])];
        assert_eq!(ids(&identical(&rollouts, &[Some(1.0), Some(-1.0)])), ["2", "3"]);
        let per_token = [Some(vec![Credit::Tokens(vec![0.0, 0.5])]), None];
        let found = samples(&rollouts, per_token);
        assert_eq!((ids(&found), &found[0].credit), (vec!["2"], &Credit::Tokens(vec![0.0, 0.5])));
    }

    #[test]
    fn a_list_of_tokens_is_cut_at_calls() {
        let mut rollout = example(0, Some(1.0), &[1, 2, 3]);
        for (call, count) in rollout.calls.iter_mut().zip([2, 9, 1]) {
            call.completion_tokens = count;
        }
        rollout.calls[1].is_trained = false;
        let found = per_token(&rollout, &[0.1, 0.2, 0.3]);
        assert_eq!(found, [Credit::Tokens(vec![0.1, 0.2]), Credit::Tokens(vec![0.3])]);
    }

    #[test]
    fn only_advantages_teach() {
        let rollouts = [example(0, Some(1.0), &[1])];
        let with = |credit: Credit| samples(&rollouts, [Some(vec![credit])]);
        for (credit, expected) in [
            (Credit::Call(0.0), false),
            (Credit::Call(0.1), true),
            (Credit::Tokens(vec![0.0, 0.0]), false),
            (Credit::Tokens(vec![0.0, 0.1]), true),
        ] {
            assert_eq!(teaches(&with(credit).iter().collect::<Vec<_>>()), expected);
        }
    }

    #[test]
    fn each_model_has_the_samples_that_it_drew() {
        let mut rollouts = [example(0, Some(1.0), &[1, 2, 3]), example(0, Some(0.0), &[4])];
        let other = Model::Named("other".to_owned());
        rollouts[0].calls[0].model = other.clone();
        rollouts[1].calls[0].model = other.clone();
        let samples = identical(&rollouts, &[Some(1.0), Some(-1.0)]);
        let parts = by_model(&samples);
        let found: Vec<(&Model, Vec<&str>)> = parts
            .iter()
            .map(|(model, part)| (*model, part.iter().map(|sample| sample.id.0.as_str()).collect()))
            .collect();
        assert_eq!(found, [(&Model::Policy, vec!["2", "3"]), (&other, vec!["1", "4"])]);
    }

    #[test]
    fn one_part_is_everything_as_it_is() {
        let rollouts: Vec<Rollout> = (0..4).map(|group| example(group, Some(1.0), &[1, 2])).collect();
        let samples = identical(&rollouts, &[Some(1.0); 4]);
        assert_eq!(mini_batches(&samples, 1, &mut draw(0)), [samples.iter().collect::<Vec<_>>()]);
        assert!(mini_batches(&[], 4, &mut draw(0)).is_empty());
    }

    proptest! {
        #[test]
        fn parts_are_of_whole_groups_even_and_lose_nothing(
            sizes in prop::collection::vec(1..4_usize, 1..12),
            count in 2..6_u32,
            seed in any::<u64>(),
        ) {
            let mut next = 0;
            let rollouts: Vec<Rollout> = sizes
                .iter()
                .enumerate()
                .flat_map(|(group, size)| (0..*size).map(move |_| group))
                .map(|group| {
                    next += 1;
                    example(group, Some(1.0), &[next])
                })
                .collect();
            let samples = identical(&rollouts, &vec![Some(1.0); rollouts.len()]);
            let parts = mini_batches(&samples, count, &mut draw(seed));
            prop_assert_eq!(parts.len(), (count as usize).min(sizes.len()));
            let mut seen: Vec<&str> = parts.iter().flatten().map(|sample| sample.id.0.as_str()).collect();
            seen.sort_unstable();
            let mut all = ids(&samples);
            all.sort_unstable();
            prop_assert_eq!(seen, all);
            let groups_of: Vec<usize> = parts
                .iter()
                .map(|part| {
                    let mut groups: Vec<usize> = part.iter().map(|sample| sample.group).collect();
                    groups.dedup();
                    groups.len()
                })
                .collect();
            prop_assert_eq!(groups_of.iter().sum::<usize>(), sizes.len());
            prop_assert!(groups_of.iter().max().unwrap() - groups_of.iter().min().unwrap() <= 1);
        }
    }
}
