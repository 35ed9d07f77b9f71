//! From the critic's values to advantages and returns of tokens. Pure.

use std::collections::BTreeMap;

use fulgurite_credit::gae;
use fulgurite_credit::statistics::{mean, variance, whiten};
use fulgurite_policy_gradient::{Credit, Divergence, Rollout, sample};
use fulgurite_sdk::algorithm::trajectories::TransitionId;

use crate::config::{Config, Truncation};

/// What the critic said of each token of a call, when the step started.
pub type Values = BTreeMap<TransitionId, Vec<f64>>;

/// What the critic is to learn of a call: a number per token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Lesson {
    /// What it said when the step started.
    pub old: Vec<f64>,
    /// What it should have said.
    pub returns: Vec<f64>,
}

/// What a step teaches policy and critic.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Estimated {
    /// The credit of every call that is trained on, rollout by rollout; none of a rollout that was not graded.
    pub credits: Vec<Option<Vec<Credit>>>,
    /// The critic's lessons, by call.
    pub lessons: BTreeMap<TransitionId, Lesson>,
    /// Mean of the returns, and share of their variance that the critic explains: 1 is all, 0 is what a constant does.
    pub numbers: Vec<(&'static str, f64)>,
}

/// Estimates advantages and returns over each rollout's tokens in order, across its calls.
#[must_use]
pub fn estimate(rollouts: &[Rollout], values: &Values, divergence: &Divergence, config: &Config) -> Estimated {
    let mut estimated = Estimated::default();
    let mut advantages: Vec<Option<Vec<f64>>> = vec![];
    let (mut all_values, mut all_returns) = (vec![], vec![]);
    for rollout in rollouts {
        let Some(rewards) = divergence.token_rewards(rollout) else {
            advantages.push(None);
            continue;
        };
        let old = values_of(rollout, values);
        // What comes after the last token is not known; the nearest that the critic has seen is the state before it.
        let is_cut = rollout.is_cut_off && config.truncation == Truncation::Bootstrap;
        let bootstrap = if is_cut { old.last().copied().unwrap_or(0.0) } else { 0.0 };
        let found = gae::estimate(&rewards, &old, config.discount, config.lambda, bootstrap);
        let mut first = 0;
        for call in rollout.trained() {
            let range = first..first + call.completion_tokens as usize;
            let of = |list: &[f64]| list.get(range.clone()).unwrap_or_default().to_vec();
            estimated.lessons.insert(call.id.clone(), Lesson { old: of(&old), returns: of(&found.returns) });
            first = range.end;
        }
        all_values.extend(old);
        all_returns.extend(found.returns);
        advantages.push(Some(found.advantages));
    }
    if config.whiten {
        whiten_all(&mut advantages);
    }
    estimated.numbers = numbers(&all_values, &all_returns);
    estimated.credits = rollouts
        .iter()
        .zip(advantages)
        .map(|(rollout, tokens)| tokens.map(|tokens| sample::per_token(rollout, &tokens)))
        .collect();
    estimated
}

/// The critic's values of a rollout's tokens in order; 0 where it said nothing.
fn values_of(rollout: &Rollout, values: &Values) -> Vec<f64> {
    let of_call = |call: &fulgurite_policy_gradient::rollout::Call| {
        let known = values.get(&call.id).cloned().unwrap_or_default().into_iter();
        known.chain(std::iter::repeat(0.0)).take(call.completion_tokens as usize).collect::<Vec<f64>>()
    };
    rollout.trained().flat_map(of_call).collect()
}

/// Whitens over all tokens of the step.
fn whiten_all(advantages: &mut [Option<Vec<f64>>]) {
    let all: Vec<f64> = advantages.iter().flatten().flatten().copied().collect();
    let white = whiten(&all);
    let tokens = advantages.iter_mut().flatten().flatten();
    tokens.zip(white).for_each(|(advantage, white)| *advantage = white);
}

fn numbers(values: &[f64], returns: &[f64]) -> Vec<(&'static str, f64)> {
    let errors: Vec<f64> = values.iter().zip(returns).map(|(value, target)| target - value).collect();
    let spread = variance(returns);
    let mut numbers = vec![("value_mean", mean(values)), ("return_mean", mean(returns))];
    if spread > 0.0 {
        numbers.push(("explained_variance", 1.0 - variance(&errors) / spread));
    }
    numbers
}

#[cfg(test)]
mod tests {
    use fulgurite_policy_gradient::rollout::Call;

    use super::*;

    fn rollout(name: &str, reward: Option<f64>, tokens: &[u32]) -> Rollout {
        let call = |(index, count): (usize, &u32)| Call::new(format!("{name}/{index}"), *count);
        Rollout::new(name, 0, reward, tokens.iter().enumerate().map(call).collect())
    }

    fn values(of: &[(&str, &[f64])]) -> Values {
        of.iter().map(|(id, values)| (TransitionId((*id).to_owned()), values.to_vec())).collect()
    }

    fn plain() -> Config {
        Config { discount: 1.0, lambda: 1.0, whiten: false, ..Config::default() }
    }

    fn tokens(credits: Option<&Vec<Credit>>) -> Vec<f64> {
        let of = |credit: &Credit| match credit {
            Credit::Tokens(tokens) => tokens.clone(),
            Credit::Call(_) => panic!("a credit per call"),
        };
        credits.unwrap().iter().flat_map(of).collect()
    }

    /// Golden vector 14 as the plugin sees it: rewards 1 and 3 on the two tokens that were drawn, values ½ and 1½.
    #[test]
    fn credit_runs_over_calls_and_passes_tool_results_by() {
        let mut one = rollout("a", Some(4.0), &[1, 1]);
        one.calls[0].reward = 1.0;
        let found = estimate(&[one], &values(&[("a/0", &[0.5]), ("a/1", &[1.5])]), &Divergence::default(), &plain());
        assert_eq!(tokens(found.credits[0].as_ref()), [3.5, 1.5]);
        let lesson = |id: &str| found.lessons[&TransitionId(id.to_owned())].clone();
        assert_eq!(lesson("a/0"), Lesson { old: vec![0.5], returns: vec![4.0] });
        assert_eq!(lesson("a/1"), Lesson { old: vec![1.5], returns: vec![3.0] });
    }

    #[test]
    fn a_rollout_that_was_cut_off_is_worth_what_the_critic_expects() {
        let mut cut = rollout("a", Some(0.0), &[2]);
        cut.is_cut_off = true;
        let known = values(&[("a/0", &[0.25, 0.75])]);
        let of = |truncation: Truncation| {
            let config = Config { truncation, ..plain() };
            tokens(estimate(std::slice::from_ref(&cut), &known, &Divergence::default(), &config).credits[0].as_ref())
        };
        assert_eq!(of(Truncation::Bootstrap), [0.5, 0.0]);
        assert_eq!(of(Truncation::Terminal), [-0.25, -0.75]);
    }

    #[test]
    fn whitening_is_over_all_tokens_and_faults_are_in_nothing() {
        let rollouts = [rollout("a", Some(1.0), &[1]), rollout("b", None, &[1]), rollout("c", Some(0.0), &[1])];
        let config = Config { whiten: true, ..plain() };
        let found = estimate(&rollouts, &Values::new(), &Divergence::default(), &config);
        let first = tokens(found.credits[0].as_ref())[0];
        assert!((first - std::f64::consts::FRAC_1_SQRT_2).abs() < 1e-6);
        assert!(found.credits[1].is_none() && found.lessons.len() == 2);
        let number = |name: &str| found.numbers.iter().find(|(known, _)| *known == name).unwrap().1;
        assert!((number("return_mean") - 0.5).abs() < 1e-12 && number("explained_variance").abs() < 1e-12);
    }

    #[test]
    fn nothing_makes_no_nan() {
        let found = estimate(&[rollout("a", Some(1.0), &[])], &Values::new(), &Divergence::default(), &plain());
        assert_eq!(found.credits, [Some(vec![])]);
        assert!(found.numbers.iter().all(|(_, value)| value.is_finite()));
    }
}
