//! The host's side of an algorithm over a table policy: given trajectories, given log-probs, real rows, real losses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use fulgurite_adapter::{Pool, Transition};
use fulgurite_core::algorithm::{
    AlgorithmHost, AlgorithmHostError, BatchEntry, GroupSpec, Item, ModelReference, TrajectoryView, TransitionForward,
    TransitionGradient, TransitionView, Verb, WaitFor,
};
use fulgurite_core::dataset::Split;
use fulgurite_core::id::{PolicyVersion, RolloutId, TransitionId};
use fulgurite_core::llm::{KeptTokens, Message, Sampling, TokenData};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::training::{
    ForwardBackwardReport, LossSpec, OptimiserReport, OptimiserStep, RowDerivatives, TrainingRow,
};
use fulgurite_policy::PolicyError;
use fulgurite_policy::table::{Table, TablePolicy};

use super::case::{Case, Fork, Variation};

/// Log-prob of whatever was not drawn: nothing may depend on it.
const CONTEXT: u32 = 0;

/// What one optimiser step found.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Step {
    /// Sum of the losses that were gathered; of the host's own only.
    pub(crate) loss: f64,
    /// d loss / d log-prob of each sampled token of the case, in order.
    pub(crate) d_log_probs: Vec<f64>,
    /// d loss / d entropy.
    pub(crate) d_entropies: Vec<f64>,
    /// d loss / d value, of a step of the critic.
    pub(crate) d_values: Vec<f64>,
}

#[derive(Default)]
struct State {
    policy: TablePolicy,
    critic: Vec<f32>,
    critic_gradient: Option<Vec<f64>>,
    pool: Pool,
    /// All rollouts of the case, in its order.
    views: Vec<TrajectoryView>,
    /// Those that are forks, by their places in the case.
    forks: BTreeMap<usize, Fork>,
    /// What was enqueued.
    batches: Vec<Vec<GroupSpec>>,
    /// Version of the policy that those from the start were last told to: each step is told once.
    served: Option<u64>,
    /// Version of the policy, and the forks that were told to it.
    served_forks: (u64, BTreeSet<usize>),
    loss: f64,
    version: u64,
    critic_steps: usize,
    policy_steps: Vec<Step>,
    value_steps: Vec<Step>,
    scalars: BTreeMap<String, f64>,
    snapshots: BTreeMap<String, Table>,
}

/// The host.
pub(crate) struct TableHost {
    /// Parameters at the start and after each optimiser step; the last stay.
    tables: Vec<Table>,
    values: Vec<Vec<f32>>,
    items: u32,
    state: Mutex<State>,
}

impl TableHost {
    pub(crate) fn new(case: &Case, variation: &Variation) -> Self {
        let with_context = |list: &[f32]| [&[variation.context_log_prob], list].concat();
        let table = |log_probs: &Vec<f32>| Table {
            log_probs: with_context(log_probs),
            entropies: with_context(&case.entropies),
        };
        let tables: Vec<Table> = case.tables.iter().map(table).collect();
        let values: Vec<Vec<f32>> = case.values.iter().map(|values| with_context(values)).collect();
        let mut state = State { policy: TablePolicy::new(tables[0].clone()), ..State::default() };
        state.policy.layout = variation.layout;
        state.critic = values.first().cloned().unwrap_or_default();
        build(case, variation, &mut state);
        let items = case.rollouts.iter().map(|rollout| rollout.group + 1).max().unwrap_or(0);
        Self { tables, values, items: u32::try_from(items).unwrap(), state: Mutex::new(state) }
    }

    /// Optimiser steps of the policy.
    pub(crate) fn policy_steps(&self) -> Vec<Step> {
        self.state.lock().unwrap().policy_steps.clone()
    }

    /// Optimiser steps of the critic.
    pub(crate) fn value_steps(&self) -> Vec<Step> {
        self.state.lock().unwrap().value_steps.clone()
    }

    pub(crate) fn scalars(&self) -> BTreeMap<String, f64> {
        self.state.lock().unwrap().scalars.clone()
    }

    fn with<T: Send + 'static>(&self, answer: impl FnOnce(&mut State) -> Result<T, AlgorithmHostError>) -> Verb<'_, T> {
        let answer = answer(&mut self.state.lock().unwrap());
        Box::pin(std::future::ready(answer))
    }

    fn step_policy(&self, state: &mut State) -> Result<(), AlgorithmHostError> {
        let gradient = state.policy.take_gradient().map_err(refused)?;
        let sampled = |list: &[f64]| list.get(1..).unwrap_or_default().to_vec();
        for list in [&gradient.log_probs, &gradient.entropies] {
            assert!(list.first().is_none_or(|context| *context == 0.0), "what was not drawn has a gradient");
        }
        state.policy_steps.push(Step {
            loss: std::mem::take(&mut state.loss),
            d_log_probs: sampled(&gradient.log_probs),
            d_entropies: sampled(&gradient.entropies),
            d_values: vec![],
        });
        state.version += 1;
        let next = state.policy_steps.len().min(self.tables.len() - 1);
        state.policy.table = self.tables[next].clone();
        Ok(())
    }

    fn step_critic(&self, state: &mut State) -> Result<(), AlgorithmHostError> {
        let gradient = state.critic_gradient.take().ok_or_else(|| refused(PolicyError::NoGradient))?;
        state.value_steps.push(Step { d_values: gradient.get(1..).unwrap_or_default().to_vec(), ..Step::default() });
        state.critic_steps += 1;
        if let Some(next) = self.values.get(state.critic_steps.min(self.values.len().saturating_sub(1))) {
            state.critic.clone_from(next);
        }
        Ok(())
    }
}

impl State {
    /// The rollouts from the start, once per version of the policy.
    fn roots(&mut self) -> Vec<TrajectoryView> {
        if self.served.replace(self.version) == Some(self.version) {
            return vec![];
        }
        let is_root = |place: &usize| !self.forks.contains_key(place);
        (0..self.views.len()).filter(is_root).map(|place| self.views[place].clone()).collect()
    }

    /// The rollouts of a group that was enqueued as the given place of its list: as many forks of this kind as it asks for.
    fn forked(&mut self, group: u64, spec: &GroupSpec) -> Result<Vec<TrajectoryView>, AlgorithmHostError> {
        let Some(asked) = &spec.fork_of else {
            return Err(AlgorithmHostError::Unsupported("no vector rolls out and forks in one batch".to_owned()));
        };
        if self.served_forks.0 != self.version {
            self.served_forks = (self.version, BTreeSet::new());
        }
        let is_asked = |fork: &Fork| {
            let ancestor = &self.views[fork.of];
            ancestor.rollout == asked.rollout && ancestor.transitions[fork.at].event == asked.event
        };
        let free = self.forks.iter().filter(|(place, fork)| is_asked(fork) && !self.served_forks.1.contains(place));
        let places: Vec<usize> = free.map(|(place, _)| *place).take(spec.count as usize).collect();
        if places.len() < spec.count as usize {
            let text = format!("the case has too few forks of {} at event {}", asked.rollout, asked.event);
            return Err(AlgorithmHostError::InvalidArgument(text));
        }
        self.served_forks.1.extend(&places);
        Ok(places.into_iter().map(|place| TrajectoryView { group, ..self.views[place].clone() }).collect())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn refused(error: PolicyError) -> AlgorithmHostError {
    AlgorithmHostError::InvalidArgument(error.to_string())
}

/// Makes transitions of a case. Every sampled token has an id of its own, in the order of the case.
fn build(case: &Case, variation: &Variation, state: &mut State) {
    let mut next_id = CONTEXT + 1;
    for (number, rollout) in case.rollouts.iter().enumerate() {
        let place = if variation.reverses { case.rollouts.len() - 1 - number } else { number };
        let id = RolloutId::new(format!("rollout-{place:04}")).unwrap();
        let mut seen: Vec<u32> = vec![];
        let mut transitions = vec![];
        // A fork's own calls are counted behind those of its prefix.
        let first = rollout.fork.map_or(0, |fork| state.views[fork.of].transitions[fork.at].call_index);
        for (index, call) in rollout.calls.iter().enumerate() {
            let continues = call.continues || variation.merges;
            let observed_from = if continues { seen.len() } else { 0 };
            let mut prompt_ids = if continues { seen.clone() } else { vec![] };
            let prompt_tokens = call.prompt_tokens.unwrap_or(1 + variation.padding * (number + index));
            prompt_ids.extend(std::iter::repeat_n(CONTEXT, prompt_tokens));
            let count = u32::try_from(call.log_probs.len()).unwrap();
            let completion_ids: Vec<u32> = (next_id..next_id + count).collect();
            next_id += count;
            seen = [prompt_ids.clone(), completion_ids.clone()].concat();
            let tokens = TokenData {
                prompt_ids,
                completion_ids,
                log_probs: call.log_probs.clone(),
                processed_log_probs: vec![],
                policy_version: PolicyVersion(0),
                token_versions: vec![],
                kept: KeptTokens::default(),
                model: None,
            };
            let is_demonstration = call.log_probs.is_empty();
            assert!(!is_demonstration, "a call has at least one token");
            transitions.push(Transition {
                // As the runner makes them: rollout, attempt, call.
                id: TransitionId(format!("{number}/{index}")),
                call_index: first + index as u64,
                event: first + index as u64 + 1,
                agent_role: call.role.clone(),
                tokens: Some(tokens),
                cut_tokens: 0,
                mask: vec![],
                observed_from,
                temperature: 1.0,
                not_trainable: None,
                rewards: call
                    .rewards
                    .iter()
                    .map(|(dimension, value)| reward(dimension, *value, Some(first + index as u64)))
                    .collect(),
                text: String::new(),
                origin: None,
            });
        }
        state.forks.extend(rollout.fork.map(|fork| (number, fork)));
        state.views.push(TrajectoryView {
            rollout: id.clone(),
            group: rollout.group,
            item_id: format!("item-{}", rollout.group),
            outcome: OutcomeKind::Completed,
            graded: rollout.graded,
            // All of them, those of calls included, as the real host tells.
            rewards: (rollout.rewards.iter().map(|(dimension, value)| reward(dimension, *value, None)))
                .chain(transitions.iter().flat_map(|transition| transition.rewards.clone()))
                .collect(),
            transitions: transitions.iter().map(view).collect(),
        });
        for transition in transitions {
            state.pool.insert(Arc::new(transition), id.to_string());
        }
    }
}

fn reward(dimension: &str, value: f64, call: Option<u64>) -> Reward {
    Reward {
        dimension: dimension.to_owned(),
        value,
        feedback: None,
        source: RewardSource::Grader,
        component: None,
        call_index: call,
    }
}

fn view(transition: &Transition) -> TransitionView {
    TransitionView {
        id: transition.id.clone(),
        call_index: transition.call_index,
        event: transition.event,
        agent_role: transition.agent_role.clone(),
        model: ModelReference::Policy,
        prompt_tokens: u32::try_from(transition.prompt_tokens()).unwrap(),
        completion_tokens: u32::try_from(transition.sampled_tokens()).unwrap(),
        trainable: true,
        log_prob_sum: transition.log_prob_sum(),
        policy_version: transition.policy_version(),
        prompt_hash: transition.prompt_hash(),
        observation_hash: transition.observation_hash(),
        rewards: transition.rewards.clone(),
        text: transition.text.clone(),
    }
}

fn sampled<T: Copy>(values: &[T], row: &TrainingRow) -> Vec<T> {
    values.iter().zip(&row.mask).filter(|(_, sampled)| **sampled).map(|(value, _)| *value).collect()
}

fn spread(given: &[f32], row: &TrainingRow) -> Vec<f32> {
    if given.is_empty() {
        return vec![];
    }
    let mut given = given.iter().copied();
    row.mask.iter().map(|sampled| if *sampled { given.next().unwrap() } else { 0.0 }).collect()
}

fn is_critic(model: &ModelReference) -> bool {
    *model == ModelReference::Named("critic".to_owned())
}

fn unsupported<T: Send + 'static>(verb: &str) -> Verb<'static, T> {
    let refusal = AlgorithmHostError::Unsupported(format!("{verb}: no vector needs it"));
    Box::pin(std::future::ready(Err(refusal)))
}

impl AlgorithmHost for TableHost {
    fn next_items(&self, _: Split, count: u32) -> Verb<'_, Vec<Item>> {
        let count = count.min(self.items);
        let item = |index| Item { id: format!("item-{index}"), input: "{}".to_owned(), reference: None, epoch: 0 };
        Box::pin(std::future::ready(Ok((0..count).map(item).collect())))
    }

    fn enqueue(&self, groups: Vec<GroupSpec>) -> Verb<'_, u64> {
        self.with(|state| {
            state.batches.push(groups);
            Ok(state.batches.len() as u64 - 1)
        })
    }

    /// Rollouts from the start are those of the case, whatever was enqueued; forks are those that were asked for.
    fn await_batch(&self, batch: u64, _: WaitFor, _: Option<u64>) -> Verb<'_, Vec<TrajectoryView>> {
        self.with(|state| {
            let groups = state.batches[usize::try_from(batch).unwrap()].clone();
            if groups.iter().all(|group| group.fork_of.is_none()) {
                return Ok(state.roots());
            }
            let forked = (0_u64..).zip(&groups).map(|(place, group)| state.forked(place, group));
            Ok(forked.collect::<Result<Vec<_>, _>>()?.concat())
        })
    }

    fn carry(&self, _: u64, _: Vec<u64>) -> Verb<'_, ()> {
        unsupported("carry")
    }

    fn carried(&self) -> Verb<'_, Vec<u64>> {
        Box::pin(std::future::ready(Ok(vec![])))
    }

    fn cancel_batch(&self, _: u64) -> Verb<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn import(&self, _: Vec<Message>, _: Vec<String>, _: String) -> Verb<'_, TransitionView> {
        unsupported("import")
    }

    fn anchor(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, ()> {
        self.with(|state| {
            for id in &transitions {
                let (row, _) = state.pool.row_of(id, usize::MAX)?;
                let known = state.policy.forward(std::slice::from_ref(&row)).map_err(refused)?;
                state.pool.anchor(&model, id, sampled(&known[0].log_probs, &row))?;
            }
            Ok(())
        })
    }

    fn forward_backward(
        &self,
        model: ModelReference,
        batch: Vec<BatchEntry>,
        loss: LossSpec,
    ) -> Verb<'_, ForwardBackwardReport> {
        self.with(|state| {
            let rows = state.pool.rows(&model, &batch, usize::MAX)?;
            let report = state.policy.forward_backward(&rows, loss).map_err(refused)?;
            state.loss += report.loss;
            Ok(report)
        })
    }

    fn forward(&self, model: ModelReference, transitions: Vec<TransitionId>) -> Verb<'_, Vec<TransitionForward>> {
        self.with(|state| {
            let of_one = |id: &TransitionId| {
                let (row, _) = state.pool.row_of(id, usize::MAX)?;
                let mut found =
                    TransitionForward { transition: id.clone(), log_probs: vec![], entropies: vec![], values: vec![] };
                if is_critic(&model) {
                    let values: Vec<f32> = row.ids.iter().map(|token| state.critic[*token as usize]).collect();
                    found.values = sampled(&values, &row);
                    return Ok(found);
                }
                let of_model = match &model {
                    ModelReference::Snapshot(name) => TablePolicy::new(state.snapshots[name].clone()),
                    _ => state.policy.clone(),
                };
                let known = of_model.forward(std::slice::from_ref(&row)).map_err(refused)?;
                found.log_probs = sampled(&known[0].log_probs, &row);
                found.entropies = sampled(&known[0].entropies, &row);
                Ok(found)
            };
            transitions.iter().map(of_one).collect()
        })
    }

    fn backward(&self, model: ModelReference, gradients: Vec<TransitionGradient>) -> Verb<'_, ()> {
        self.with(|state| {
            for given in &gradients {
                let (row, count) = state.pool.row_of(&given.transition, usize::MAX)?;
                for list in [&given.d_log_probs, &given.d_entropies, &given.d_values] {
                    assert!(list.is_empty() || list.len() == count, "a list of derivatives has a wrong length");
                }
                if is_critic(&model) {
                    let ids = state.critic.len();
                    let gradient = state.critic_gradient.get_or_insert_with(|| vec![0.0; ids]);
                    for (id, slope) in row.ids.iter().zip(spread(&given.d_values, &row)) {
                        gradient[*id as usize] += f64::from(slope);
                    }
                } else {
                    let derivatives = RowDerivatives {
                        log_probs: spread(&given.d_log_probs, &row),
                        entropies: spread(&given.d_entropies, &row),
                    };
                    state.policy.backward(std::slice::from_ref(&row), &[derivatives]).map_err(refused)?;
                }
            }
            Ok(())
        })
    }

    fn optimiser_step(&self, model: ModelReference, _: OptimiserStep) -> Verb<'_, OptimiserReport> {
        self.with(|state| {
            if is_critic(&model) {
                self.step_critic(state)?;
            } else {
                self.step_policy(state)?;
            }
            Ok(OptimiserReport { gradient_norm: 1.0, skipped: false, policy_version: PolicyVersion(state.version) })
        })
    }

    fn snapshot(&self, _: ModelReference) -> Verb<'_, String> {
        self.with(|state| {
            let name = format!("snapshot-{}", state.snapshots.len());
            state.snapshots.insert(name.clone(), state.policy.table.clone());
            Ok(name)
        })
    }

    fn freeze_reference(&self) -> Verb<'_, ()> {
        self.with(|state| {
            state.policy.reference = Some(state.policy.table.clone());
            // Plugins that put the KL into rewards ask for its log-probs by the host's name.
            state.snapshots.insert("reference".to_owned(), state.policy.table.clone());
            Ok(())
        })
    }

    fn sample(&self, _: ModelReference, _: Vec<Message>, _: Sampling) -> Verb<'_, TransitionView> {
        unsupported("sample")
    }

    fn template(&self, _: String, _: Option<u64>) -> Verb<'_, (u64, String)> {
        unsupported("template")
    }

    fn publish_template(&self, _: String, _: String) -> Verb<'_, u64> {
        unsupported("publish")
    }

    fn scalar(&self, name: String, value: f64) -> Verb<'_, ()> {
        self.with(|state| {
            state.scalars.insert(name, value);
            Ok(())
        })
    }

    fn note(&self, _: String) -> Verb<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}
