//! Write agents, graders, tools and training algorithms for Fulgurite: implement one trait, call one macro, build for
//! `wasm32-wasip2`.
//!
//! | you write | trait | macro | world |
//! |---|---|---|---|
//! | an agent: works on one item with a model and tools | [`agent::Agent`] | [`agent!`] | `fulgurite:agent` |
//! | a grader: judges a finished rollout | [`grader::Grader`] | [`grader!`] | `fulgurite:grader` |
//! | a tool: what agents call | [`tool::Tool`] | [`tool!`] | `fulgurite:tool` |
//! | an algorithm: decides what to roll out and train | [`algorithm::Algorithm`] | [`algorithm!`] | `fulgurite:algorithm` |
//!
//! A crate holds one of them: its macro exports the component's functions. Input, outcome and config are types of yours
//! that serde reads and writes; JSON never shows.
//!
//! # Example
//!
//! A whole agent. With `crate-type = ["cdylib", "rlib"]` in its `Cargo.toml`, this builds to a component:
//!
//! ```
//! use fulgurite_sdk::agent::{Agent, AgentError, Conversation, Llm};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Deserialize)]
//! struct Question {
//!     question: String,
//! }
//!
//! #[derive(Serialize)]
//! struct Answer {
//!     number: i64,
//! }
//!
//! struct Calculator;
//!
//! impl Agent for Calculator {
//!     type Input = Question;
//!     type Outcome = Answer;
//!
//!     fn run(input: Question) -> Result<Answer, AgentError> {
//!         let mut conversation = Conversation::new();
//!         conversation.system("Answer with a number alone.").user(input.question);
//!         let answer = Llm::new().max_tokens(16).chat(&conversation)?;
//!         let number = answer
//!             .text()
//!             .trim()
//!             .parse()
//!             .map_err(|_| AgentError::MalformedAnswer(format!("not a number: {}", answer.text())))?;
//!         Ok(Answer { number })
//!     }
//! }
//!
//! fulgurite_sdk::agent!(Calculator);
//! ```
//!
//! # What this is not
//!
//! No host: everything here ends in an import that only a Fulgurite host provides. The crate compiles natively, so that
//! the pure parts of a plugin can be tested with plain `cargo test`; a host call made there panics.
//!
//! # Rules of the sandbox
//!
//! * No files, no network, no environment. What a plugin needs it asks for by [`manifest!`], and a run's config grants:
//!   tools can have read-only folders, HTTP ([`tool::http`]) and databases ([`tool::sqlite`]), graders a model
//!   ([`grader::judge`]), agents named endpoints.
//! * Standard output and error become log lines of the attempt.
//! * Time is virtual and random numbers follow from the attempt's seed, so a rollout repeats bit for bit.
//! * A panic is a trap: the attempt is recorded as a fault of the plugin and never counts as a reward.
//! * What the policy did wrong is reported as such ([`agent::AgentError::MalformedAnswer`]): only then is it trained on.

pub mod agent;
pub mod algorithm;
pub mod grader;
mod manifest;
pub mod tool;
mod types;
// Reached by the expansion of the export macros alone.
#[doc(hidden)]
pub mod wit;

pub use serde_json::{Value, json};
pub use types::{Attribute, AttributeValue, InvalidArguments, LimitReached, Mode, Role, ToolCall, ToolSpec};
