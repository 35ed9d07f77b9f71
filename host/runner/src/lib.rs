//! Runs rollouts: claim, run, grade, record.
//!
//! The only place that spawns rollouts. A [`Runner`] takes jobs in order, keeps at most a set number of attempts alive,
//! retries what can recover, and commits finished attempts to the store in groups, so that one disk flush serves many. A
//! rollout that the store knows as finished is answered from the store and not run again: that is what makes a repeated
//! step of a training run cheap and safe.

mod attempt;
mod batch;
mod commit;
pub mod control;
pub mod fork;
mod gate;
mod grants;
pub mod replay;
pub mod run;
pub mod scripted;
mod settings;
mod templates;
mod watchdog;

pub use batch::Batch;
pub use fulgurite_adapter::RewardTerms;
pub use grants::{Endpoints, RunnerGrants};
pub use run::Runner;
pub use settings::{Job, Plugins, Recording, RetryPolicy, RolloutResult, RunnerError, RunnerSettings};
pub use templates::JinjaRenderer;
