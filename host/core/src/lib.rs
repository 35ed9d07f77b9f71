//! The shared vocabulary of Fulgurite: ids, records, state machines, limits, attribute names and the
//! traits that join the crates of the host.
//!
//! Pure by construction: no files, no clock, no runtime. Everything here can be tested without a machine around it,
//! and every other crate of the host depends on it, never the other way round.

pub mod algorithm;
pub mod attribute;

pub mod dataset;
pub mod grant;
pub mod host_call;
pub mod id;
pub mod kept_tokens;
pub mod limits;
pub mod llm;
pub mod llm_stream;
pub mod outcome;
pub mod record;
pub mod recording;
pub mod reward;
pub mod reward_term;
pub mod sampling;
pub mod seed;
pub mod span;
pub mod state;
pub mod tool;
pub mod training;
