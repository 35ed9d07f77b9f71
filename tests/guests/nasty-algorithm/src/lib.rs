//! An algorithm that goes through every verb, and misbehaves on request.
#![allow(clippy::panic, reason = "misbehaviour is the purpose")]

mod critic;
mod forks;
mod numbers;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::hint::black_box;

use fulgurite_sdk::algorithm::policy::{
    self, Aggregation, Correction, CorrectionRule, Entry, KlEstimator, Loss, Model, OptimiserStep, RatioLevel,
    SequenceScope, Stream,
};
use fulgurite_sdk::algorithm::rollouts::{self, Group, Split};
use fulgurite_sdk::algorithm::trajectories::{self, Message};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, HostError, Progress, Sampling, metrics, models, templates};
use fulgurite_sdk::{Role, json};
use serde::{Deserialize, Serialize};

/// What to do in a step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `verbs`, `forks`, `critic`, `loop`, `trap`, `wait`, `draw`, `huge-state`, one of those of `numbers.rs` or nothing.
    pub behaviour: String,
    /// The first step with that behaviour. Earlier ones train on a demonstration.
    pub from_step: u64,
    /// After how many steps it is done.
    pub steps: u64,
}

/// What it keeps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct State {
    /// Steps made.
    pub steps: u64,
    /// Weight of a state that is too large.
    pub ballast: String,
}

struct Nasty {
    config: Config,
    state: State,
}

fulgurite_sdk::algorithm!(Nasty);

impl Algorithm for Nasty {
    const NAME: &'static str = "nasty";
    const VERSION: &'static str = "0.0.1";
    type Config = Config;
    type State = State;

    fn init(config: Config, saved: Option<State>) -> Result<Self, AlgorithmError> {
        if config.behaviour == "refuse-config" {
            return Err(AlgorithmError::InvalidConfig("behaviour: not that one".to_owned()));
        }
        Ok(Self { config, state: saved.unwrap_or_default() })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        match self.config.behaviour.as_str() {
            _ if self.state.steps < self.config.from_step => numbers::train()?,
            "verbs" => verbs()?,
            "forks" => forks::step()?,
            "critic" => critic::step()?,
            "loop" => loop {
                black_box(());
            },
            "trap" => panic!("on purpose"),
            "wait" => {
                rollouts::next_items(Split::Train, 1)?;
            }
            "draw" => {
                let drawn = RandomState::new().build_hasher().finish();
                metrics::note(&format!("drew {drawn}"))?;
            }
            "huge-state" => self.state.ballast = "x".repeat(17 << 20),
            other => numbers::misbehave(other)?,
        }
        self.state.steps += 1;
        Ok(if self.state.steps >= self.config.steps { Progress::Done } else { Progress::Continue })
    }

    fn save(&self) -> State {
        self.state.clone()
    }
}

/// Every setting of a loss that is not the default, in two losses.
fn losses() -> [Loss; 2] {
    let correction = |level, rule, batch_normalise| Correction { level, rule, batch_normalise };
    let all = Loss::new()
        .cispo(None, 4.0)
        .aggregation(Aggregation::PromptMean)
        .kl(KlEstimator::K2, 0.5)
        .entropy_coefficient(0.125)
        .ratio_level(RatioLevel::SequenceMean)
        .sequence_scope(SequenceScope::Call)
        .correction(correction(RatioLevel::SequenceSum, CorrectionRule::Mask(0.5, 5.0), true))
        .off_policy_mask(0.25);
    let bounded = Loss::new()
        .importance_sampling()
        .aggregation(Aggregation::SumConstant(7))
        .ratio_level(RatioLevel::SequenceSum)
        .ratio_max(4.0)
        .correction(correction(RatioLevel::Token, CorrectionRule::Truncate(2.0), false));
    [all, bounded]
}

/// Every verb once, in the order of the interfaces.
fn verbs() -> Result<(), AlgorithmError> {
    let items = rollouts::next_items(Split::Train, 2)?;
    let group = |item: &rollouts::Item| Group::new(item.id(), 2).sampling(Sampling::new().temperature(0.5));
    let groups: Vec<Group> = items.iter().map(group).collect();
    let batch = rollouts::enqueue(&groups)?;
    let mut finished = batch.await_count(1, None)?;
    finished.extend(batch.await_all(None)?);
    batch.carry(&[1, 0])?;
    for carried in rollouts::carried()? {
        metrics::note(&format!("carried {}", carried.await_all(None)?.len()))?;
    }
    batch.cancel()?;
    let mut entries = vec![];
    for trajectory in &finished {
        let total = trajectory.total("reward").unwrap_or(f64::NAN);
        metrics::note(&format!(
            "{} group {} item {} {} graded {} reward {total}",
            trajectory.rollout_id().0,
            trajectory.group(),
            trajectory.item_id().0,
            trajectory.outcome_kind(),
            trajectory.is_graded(),
        ))?;
        for transition in trajectory.transitions() {
            entries.push(Entry::new(transition.id(), Stream::Rl, 1.0));
        }
    }
    let message = Message::text(Role::User, "imported");
    let imported = trajectories::import(std::slice::from_ref(&message), &[Role::User], &json!({"origin": "test"}))?;
    entries.push(Entry::new(imported.id(), Stream::Ce, 1.0).weights(vec![0.5, 0.25]));
    policy::anchor(&Model::Policy, &[imported.id()])?;
    let numbers = policy::forward_backward(&Model::Policy, &entries, &Loss::new())?;
    metrics::scalar("loss", numbers.get("loss").unwrap_or(f64::NAN))?;
    for loss in losses() {
        policy::forward_backward(&Model::Policy, &entries, &loss)?;
    }
    policy::forward(&Model::Policy, &[imported.id()])?;
    policy::backward(&Model::Policy, &[])?;
    let step = policy::optimiser_step(&Model::Policy, &OptimiserStep::new(0.5))?;
    metrics::scalar("version", step.get("policy-version").unwrap_or(f64::NAN))?;
    policy::snapshot(&Model::Policy)?;
    policy::freeze_reference()?;
    policy::sample(&Model::Policy, std::slice::from_ref(&message), &Sampling::new())?;
    templates::text("greeting", None)?;
    templates::publish("greeting", "Hello {{ name }}")?;
    for refused in [
        policy::save(&Model::Policy, "x"),
        policy::load(&Model::Policy, "x"),
        models::chat(None, &[message], &Sampling::new()).map(|_| ()),
    ] {
        match refused {
            Err(HostError::Unsupported(text)) => metrics::note(&text)?,
            other => return Err(AlgorithmError::Other(format!("{other:?}"))),
        }
    }
    Ok(())
}
