//! How vectors are written down: `losses.json` for settings of the host's loss, `plugins/*.json` for whole algorithms.

use std::collections::BTreeMap;

use fulgurite_policy::table::Layout;
use serde::Deserialize;
use serde_json::{Value, json};

/// One algorithm over given rollouts. Lists of tokens hold one number per sampled token of the case: rollout by rollout, call
/// by call.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// A component of `target/plugins`, without its ending.
    pub(crate) component: String,
    /// The plugin's config.
    pub(crate) config: Value,
    pub(crate) rollouts: Vec<Rollout>,
    /// Log-probs (nats) under the policy at the start and after each of its optimiser steps; the last stay.
    pub(crate) tables: Vec<Vec<f32>>,
    /// Entropies (nats).
    #[serde(default)]
    pub(crate) entropies: Vec<f32>,
    /// The critic's values at the start and after each of its optimiser steps; the last stay.
    #[serde(default)]
    pub(crate) values: Vec<Vec<f32>>,
    /// What the policy's optimiser steps must find; the last ones where there are fewer than steps.
    #[serde(default)]
    pub(crate) expected: Vec<Expected>,
    /// The same of the critic's.
    #[serde(default)]
    pub(crate) expected_values: Vec<Vec<f64>>,
    /// Scalars that the plugin must record.
    #[serde(default)]
    pub(crate) metrics: BTreeMap<String, f64>,
}

/// A finished rollout.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rollout {
    #[serde(default)]
    pub(crate) group: u64,
    /// Where it was forked: it is there only for a plugin that asks for this fork.
    #[serde(default)]
    pub(crate) fork: Option<Fork>,
    /// False: it failed for a reason that is not the policy's.
    #[serde(default = "yes")]
    pub(crate) graded: bool,
    /// Rewards of the whole rollout, by dimension.
    #[serde(default)]
    pub(crate) rewards: Vec<(String, f64)>,
    pub(crate) calls: Vec<Call>,
}

/// What a fork has in common with another rollout: the calls before this one, which are the ancestor's and not repeated in
/// the fork's own list.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fork {
    /// The ancestor, as its place in the case.
    pub(crate) of: usize,
    /// The call of the ancestor's own list that is made anew.
    pub(crate) at: usize,
}

/// One call of a rollout.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Call {
    #[serde(default = "agent")]
    pub(crate) role: String,
    /// Log-probs (nats) of the tokens under the policy that drew them.
    pub(crate) log_probs: Vec<f32>,
    /// Rewards of the call, by dimension.
    #[serde(default)]
    pub(crate) rewards: Vec<(String, f64)>,
    /// Whether its prompt repeats all that the call before saw and drew.
    #[serde(default)]
    pub(crate) continues: bool,
    /// Tokens of its prompt beyond that.
    #[serde(default)]
    pub(crate) prompt_tokens: Option<usize>,
}

fn agent() -> String {
    "agent".to_owned()
}

const fn yes() -> bool {
    true
}

/// What an optimiser step of the policy must find.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expected {
    /// The loss; none where the plugin has a formula of its own.
    #[serde(default)]
    pub(crate) loss: Option<f64>,
    pub(crate) d_log_probs: Vec<f64>,
    #[serde(default)]
    pub(crate) d_entropies: Vec<f64>,
}

/// What must not change any number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variation {
    pub(crate) layout: Layout,
    /// Every call's prompt repeats all before it: one row per rollout.
    pub(crate) merges: bool,
    /// Rollouts have names in the opposite order: so have their rows.
    pub(crate) reverses: bool,
    /// Prompt tokens that each later call and rollout has more than the one before.
    pub(crate) padding: usize,
    /// Log-prob of what was not drawn.
    pub(crate) context_log_prob: f32,
}

impl Default for Variation {
    fn default() -> Self {
        Self { layout: Layout::default(), merges: false, reverses: false, padding: 0, context_log_prob: -9.0 }
    }
}

/// A setting of the host's loss with its weights, as `losses.json` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LossVector {
    name: String,
    /// Tokens of each call of each rollout; one rollout of one call when left out.
    #[serde(default)]
    sequences: Vec<Vec<usize>>,
    /// Group of each rollout.
    #[serde(default)]
    groups: Vec<u64>,
    /// Weight of each token.
    advantages: Vec<f32>,
    /// Log-probs under the policy that drew.
    mu: Vec<f32>,
    /// Under the weights at the start of the update, which are anchored then; those of `mu` when left out.
    #[serde(default)]
    old: Option<Vec<f32>>,
    /// Under the weights that are trained.
    new: Vec<f32>,
    /// Under the reference.
    #[serde(default)]
    reference: Option<Vec<f32>>,
    #[serde(default)]
    entropies: Vec<f32>,
    /// Whether a token's call is trained by cross-entropy.
    #[serde(default)]
    demonstrated: Vec<bool>,
    /// Settings, as `loss-probe` reads them.
    loss: Value,
    expected: ExpectedLoss,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectedLoss {
    loss: f64,
    d_log_probs: Vec<f64>,
    numbers: BTreeMap<String, f64>,
}

impl LossVector {
    /// The case that reaches it through a component: one update per set of weights that matters, the last one with the loss.
    pub(crate) fn case(self) -> Case {
        let sequences = if self.sequences.is_empty() { vec![vec![self.advantages.len()]] } else { self.sequences };
        let (mut rollouts, mut entries) = (vec![], vec![]);
        let mut at = 0;
        for (number, calls) in sequences.iter().enumerate() {
            let group = self.groups.get(number).copied();
            let mut rollout = Rollout { group: 0, fork: None, graded: true, rewards: vec![], calls: vec![] };
            for (index, count) in calls.iter().enumerate() {
                let tokens = at..at + count;
                at += count;
                entries.push(json!({
                    "transition": format!("{number}/{index}"),
                    "weights": self.advantages[tokens.clone()],
                    "is_demonstrated": self.demonstrated.get(tokens.start).copied().unwrap_or(false),
                    "group": group,
                }));
                rollout.calls.push(Call {
                    role: agent(),
                    log_probs: self.mu[tokens].to_vec(),
                    rewards: vec![],
                    continues: false,
                    prompt_tokens: None,
                });
            }
            rollouts.push(rollout);
        }
        let update = |freezes_reference, anchors, loss: Value| json!({"freezes_reference": freezes_reference, "anchors": anchors, "loss": loss, "entries": entries});
        let (mut updates, mut tables) = (vec![], vec![]);
        if let Some(reference) = self.reference {
            updates.push(update(true, false, json!({})));
            tables.push(reference);
        }
        if let Some(old) = self.old {
            updates.push(update(false, true, json!({})));
            tables.push(old);
        }
        let place = updates.len();
        updates.push(update(false, false, self.loss));
        tables.push(self.new);
        let metric = |(name, value): (String, f64)| (format!("{place}/{name}"), value);
        Case {
            name: self.name,
            component: "loss_probe".to_owned(),
            config: json!({"updates": updates}),
            rollouts,
            tables,
            entropies: self.entropies,
            values: vec![],
            expected: vec![Expected {
                loss: Some(self.expected.loss),
                d_log_probs: self.expected.d_log_probs,
                d_entropies: vec![],
            }],
            expected_values: vec![],
            metrics: self.expected.numbers.into_iter().map(metric).collect(),
        }
    }
}
