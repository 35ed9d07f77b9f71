//! What policy gradient plugins share, so that each of them is its formula and little else: config sections, rolling out,
//! dynamic sampling, curriculum, mini-batches, the update loop and the numbers that show a collapse.
//!
//! A plugin's step is four lines:
//!
//! ```no_run
//! # use fulgurite_credit::group::Estimator;
//! # use fulgurite_policy_gradient::{Learner, rollout, sample};
//! # use fulgurite_sdk::algorithm::{AlgorithmError, Progress};
//! fn step(learner: &mut Learner) -> Result<Progress, AlgorithmError> {
//!     let Some(rollouts) = learner.begin()? else { return Ok(Progress::Done) };
//!     let advantages = rollout::advantages(&rollouts, Estimator::Centred, |rollout| rollout.shaped_reward());
//!     learner.learn(sample::identical(&rollouts, &advantages))?;
//!     Ok(learner.end())
//! }
//! ```

pub mod config;
mod curriculum;
mod draw;
mod flat;
mod gather;
mod learner;
mod reference;
pub mod rollout;
pub mod sample;
mod update;

pub use draw::Draw;
pub use flat::Flat;
pub use learner::{Learner, State};
pub use reference::Divergence;
pub use rollout::Rollout;
pub use sample::{Credit, Sample};
pub use update::Extra;
