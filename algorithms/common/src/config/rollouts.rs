//! What is rolled out, and which of it is trained on.

use serde::{Deserialize, Serialize};

use super::{Curriculum, at_least_one, not_negative};

/// What happens to groups whose rewards are all equal: they carry no policy gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// They stay in the batch with advantage 0: for KL and entropy terms, and in normalisers.
    #[default]
    Keep,
    /// They leave the batch.
    Drop,
    /// They leave the batch, and other items are rolled out in their place: DAPO's dynamic sampling.
    Resample,
}

/// Most steps that training may lag behind. 64: far beyond what any correction mends, and few enough batches to wait at once.
const LAG_STEPS_MAX: u64 = 64;

/// Keys about rollouts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RolloutSection {
    /// Steps. 200.
    pub steps: u64,
    /// Items per step. 16.
    pub groups_per_step: u32,
    /// Rollouts of each item. 8.
    pub group_size: u32,
    /// Share of a step's rollouts that must have ended before training starts, above 0 and at most 1. 1 waits for all, and
    /// every run of one seed is the same; with less, which groups are trained on first depends on the machine. Groups that
    /// are not whole by then are carried over to the next step.
    pub start_share: f64,
    /// Steps that training lags behind: each trains on what was rolled out so many steps before. 0; more shows what stale
    /// rollouts do and what a correction is worth. The first step rolls out all that the next ones wait for.
    pub lag_steps: u64,
    /// Temperature of the rollouts. 1; anything else is trained at that temperature too.
    pub temperature: f32,
    /// The reward dimension that is optimised. `reward`.
    pub dimension: String,
    /// Agent roles whose calls are trained on. Empty: all.
    pub agent_roles: Vec<String>,
    /// Groups whose rewards are all equal: `keep`, `drop` or `resample`. None: as the variant says.
    pub zero_variance: Option<Filter>,
    /// Rounds of rollouts that a step makes at most with `resample`, the first included. 3.
    pub resample_rounds_max: u32,
    /// Tokens that a rollout may draw before it is punished in full (DAPO's `L_max`). None: length costs nothing.
    pub overlong_tokens_max: Option<u64>,
    /// Tokens before that over which the punishment grows. 0.
    pub overlong_cache_tokens: u64,
    /// The punishment in full, in units of the reward. 1.
    pub overlong_penalty: f64,
    /// Calls that were drawn by weights more than so many versions behind those that are trained are left out of the loss.
    /// None: however old, they are trained on.
    pub staleness_max: Option<u64>,
    /// Which items are rolled out more often. None: all the same.
    pub curriculum: Option<Curriculum>,
}

impl Default for RolloutSection {
    fn default() -> Self {
        Self {
            steps: 200,
            groups_per_step: 16,
            group_size: 8,
            start_share: 1.0,
            lag_steps: 0,
            temperature: 1.0,
            dimension: "reward".to_owned(),
            agent_roles: vec![],
            zero_variance: None,
            resample_rounds_max: 3,
            overlong_tokens_max: None,
            overlong_cache_tokens: 0,
            overlong_penalty: 1.0,
            staleness_max: None,
            curriculum: None,
        }
    }
}

impl RolloutSection {
    /// Names the first field that makes no sense.
    ///
    /// # Errors
    /// The text says what would.
    pub(super) fn check(&self) -> Result<(), String> {
        at_least_one("steps", self.steps)?;
        at_least_one("groups_per_step", self.groups_per_step.into())?;
        at_least_one("group_size", self.group_size.into())?;
        at_least_one("resample_rounds_max", self.resample_rounds_max.into())?;
        not_negative("overlong_penalty", self.overlong_penalty)?;
        if !(self.start_share > 0.0 && self.start_share <= 1.0) {
            return Err(format!("start_share: {} is not above 0 and at most 1", self.start_share));
        }
        if self.lag_steps > LAG_STEPS_MAX {
            return Err(format!("lag_steps: use at most {LAG_STEPS_MAX}, the first step rolls out that many batches"));
        }
        if self.lag_steps > 0 && self.start_share < 1.0 {
            return Err("lag_steps: use start_share = 1 with it, batches wait whole".to_owned());
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err("temperature: use a finite number above 0; greedy rollouts explore nothing".to_owned());
        }
        if self.dimension.is_empty() {
            return Err("dimension: name a reward dimension".to_owned());
        }
        if self.overlong_cache_tokens > self.overlong_tokens_max.unwrap_or(0) {
            return Err("overlong_cache_tokens: use at most overlong_tokens_max, which must be given".to_owned());
        }
        self.curriculum.iter().try_for_each(Curriculum::check)
    }

    /// Groups must have two rollouts at least where they are compared with each other.
    ///
    /// # Errors
    /// Names the field.
    pub fn check_comparable(&self) -> Result<(), String> {
        if self.group_size < 2 {
            return Err("group_size: use at least 2, a rollout alone has nothing to be compared with".to_owned());
        }
        Ok(())
    }

    /// What a rollout of so many tokens is punished with, 0 or below.
    #[must_use]
    pub fn overlong(&self, tokens: u64) -> f64 {
        let shaped = |most: u64| fulgurite_credit::shaping::overlong(tokens, most, self.overlong_cache_tokens);
        self.overlong_tokens_max.map_or(0.0, shaped) * self.overlong_penalty
    }
}
