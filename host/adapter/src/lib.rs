//! From what an attempt recorded to what the policy is trained on: spans -> transitions -> training rows, and from
//! recorded rewards to one number.
//!
//! Everything here is a pure function: the same spans give the same rows, byte for byte. A [`Transition`] is one LLM
//! call (DESIGN.md 5.4, ALGORITHMS.md section 9); a [`TrainingRow`](fulgurite_core::training::TrainingRow) is how the
//! policy engine sees one or several of them. Rows are a host optimisation: algorithms speak of transitions and
//! rollouts, and whether calls were merged into one row changes neither loss nor gradient.
//!
//! What it is not: it computes no advantages and no loss.
//!
//! ```
//! use std::sync::Arc;
//!
//! use fulgurite_adapter::{Sequence, Transition, rows};
//! use fulgurite_core::algorithm::{BatchEntry, Scope, Weights};
//! use fulgurite_core::id::TransitionId;
//! use fulgurite_core::training::Stream;
//!
//! let id = TransitionId("demonstration/0".to_owned());
//! // Token 3 answers tokens 1 and 2.
//! let transition = Transition::demonstration(
//!     id.clone(),
//!     vec![1, 2, 3],
//!     vec![false, false, true],
//!     "R07".to_owned(),
//!     "{}".to_owned(),
//! );
//! let entry = BatchEntry {
//!     transition: id,
//!     stream: Stream::Ce,
//!     scope: Scope::Sampled,
//!     weights: Weights::Scalar(1.0),
//!     group: None,
//! };
//! let entries = vec![(Arc::new(transition), entry)];
//! let rows = rows(&[Sequence { entries, ..Sequence::default() }], 128)?;
//! assert_eq!(rows[0].weights, [0.0, 0.0, 1.0]);
//! # Ok::<(), fulgurite_adapter::AdapterError>(())
//! ```

mod attach;
mod credit;
mod error;
mod fit;
mod pool;
mod rows;
pub mod terms;
mod transition;

pub use attach::{Attachment, MissingCall, RewardAttachment};
pub use credit::{ACCEPTED_BY_DEFAULT, accepted, total_reward};
pub use error::AdapterError;
pub use fit::{Fit, LongRow, RowTooLong, fit};
pub use pool::Pool;
pub use rows::{DroppedSequence, Placement, RowStart, Rows, Sequence, placements, rows, rows_that_fit};
pub use terms::{InvalidTerm, RewardTerms};
pub use transition::{Trajectory, Transition, of_roles, transitions};
