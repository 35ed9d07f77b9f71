//! An algorithm whose config is a list of losses with the weights of every entry: any setting of the host's loss, reached
//! through a compiled component.

use fulgurite_sdk::algorithm::policy::{
    self, Aggregation, Correction, Entry, KlEstimator, Loss, Model, OptimiserStep, RatioLevel, Scope, SequenceScope,
    Stream,
};
use fulgurite_sdk::algorithm::rollouts::{self, Group, Split};
use fulgurite_sdk::algorithm::trajectories::TransitionId;
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, metrics};
use serde::{Deserialize, Serialize};

/// What to do in the one step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// One optimiser step each.
    pub updates: Vec<Update>,
}

/// One optimiser step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Update {
    /// Whether the policy becomes the reference before.
    pub freezes_reference: bool,
    /// Whether all entries are anchored before.
    pub anchors: bool,
    /// The loss.
    pub loss: Settings,
    /// The batch.
    pub entries: Vec<Item>,
}

/// One entry of a batch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// Which transition.
    pub transition: String,
    /// One weight for all tokens, or one per token.
    pub weights: Vec<f32>,
    /// Whether it is trained by cross-entropy instead of policy gradient.
    #[serde(default)]
    pub is_demonstrated: bool,
    /// Its group.
    #[serde(default)]
    pub group: Option<u64>,
}

/// What to set of a loss.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// None: the host's default.
    pub objective: Option<Objective>,
    /// See [`Loss::ratio_max`].
    pub ratio_max: Option<f32>,
    /// See [`Loss::ratio_level`].
    pub ratio_level: Option<RatioLevel>,
    /// See [`Loss::sequence_scope`].
    pub sequence_scope: Option<SequenceScope>,
    /// See [`Loss::aggregation`].
    pub aggregation: Option<Aggregation>,
    /// See [`Loss::kl`].
    pub kl: Option<(KlEstimator, f32)>,
    /// See [`Loss::entropy_coefficient`].
    pub entropy_coefficient: Option<f32>,
    /// See [`Loss::correction`].
    pub correction: Option<Correction>,
    /// See [`Loss::off_policy_mask`].
    pub off_policy_mask: Option<f32>,
}

/// The objectives by name.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Objective {
    /// See [`Loss::reinforce`].
    Reinforce,
    /// See [`Loss::importance_sampling`].
    ImportanceSampling,
    /// See [`Loss::ppo`].
    Ppo {
        /// Below 1.
        clip_low: f32,
        /// Above 1.
        clip_high: f32,
        /// Above 1.
        #[serde(default)]
        dual_clip: Option<f32>,
    },
    /// See [`Loss::cispo`].
    Cispo {
        /// Below 1.
        #[serde(default)]
        clip_low: Option<f32>,
        /// Above 1.
        clip_high: f32,
    },
    /// See [`Loss::sapo`].
    Sapo {
        /// Of positive advantages.
        temperature_positive: f32,
        /// Of the others.
        temperature_negative: f32,
    },
}

impl Settings {
    fn loss(&self) -> Loss {
        let mut loss = match self.objective {
            None => Loss::new(),
            Some(Objective::Reinforce) => Loss::new().reinforce(),
            Some(Objective::ImportanceSampling) => Loss::new().importance_sampling(),
            Some(Objective::Ppo { clip_low, clip_high, dual_clip }) => Loss::new().ppo(clip_low, clip_high, dual_clip),
            Some(Objective::Cispo { clip_low, clip_high }) => Loss::new().cispo(clip_low, clip_high),
            Some(Objective::Sapo { temperature_positive, temperature_negative }) => {
                Loss::new().sapo(temperature_positive, temperature_negative)
            }
        };
        if let Some(delta) = self.ratio_max {
            loss = loss.ratio_max(delta);
        }
        if let Some(level) = self.ratio_level {
            loss = loss.ratio_level(level);
        }
        if let Some(scope) = self.sequence_scope {
            loss = loss.sequence_scope(scope);
        }
        if let Some(aggregation) = self.aggregation {
            loss = loss.aggregation(aggregation);
        }
        if let Some((estimator, coefficient)) = self.kl {
            loss = loss.kl(estimator, coefficient);
        }
        if let Some(coefficient) = self.entropy_coefficient {
            loss = loss.entropy_coefficient(coefficient);
        }
        if let Some(correction) = self.correction {
            loss = loss.correction(correction);
        }
        if let Some(delta) = self.off_policy_mask {
            loss = loss.off_policy_mask(delta);
        }
        loss
    }
}

impl Item {
    fn entry(&self) -> Entry {
        let stream = if self.is_demonstrated { Stream::Ce } else { Stream::Rl };
        let first = self.weights.first().copied().unwrap_or(0.0);
        let mut entry = Entry::new(TransitionId(self.transition.clone()), stream, first).scope(Scope::Sampled);
        if self.weights.len() > 1 {
            entry = entry.weights(self.weights.clone());
        }
        match self.group {
            Some(group) => entry.group(group),
            None => entry,
        }
    }
}

struct Probe(Config);

fulgurite_sdk::algorithm!(Probe);

impl Algorithm for Probe {
    const NAME: &'static str = "loss-probe";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Config;
    type State = ();

    fn init(config: Config, _: Option<()>) -> Result<Self, AlgorithmError> {
        Ok(Self(config))
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        let items = rollouts::next_items(Split::Train, 1)?;
        let groups: Vec<Group> = items.iter().map(|item| Group::new(item.id(), 1)).collect();
        rollouts::enqueue(&groups)?.await_all(None)?;
        for (place, update) in self.0.updates.iter().enumerate() {
            if update.freezes_reference {
                policy::freeze_reference()?;
            }
            let entries: Vec<Entry> = update.entries.iter().map(Item::entry).collect();
            if update.anchors {
                let ids: Vec<TransitionId> = entries.iter().map(|entry| entry.transition().clone()).collect();
                policy::anchor(&Model::Policy, &ids)?;
            }
            let numbers = policy::forward_backward(&Model::Policy, &entries, &update.loss.loss())?;
            for (name, value) in numbers.iter() {
                metrics::scalar(&format!("{place}/{name}"), value)?;
            }
            policy::optimiser_step(&Model::Policy, &OptimiserStep::new(1e-3))?;
        }
        Ok(Progress::Done)
    }

    fn save(&self) {}
}
