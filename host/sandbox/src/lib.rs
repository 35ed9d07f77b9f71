//! The sandbox: runs agents, graders, tools and algorithms as WebAssembly components.
//!
//! The only user of wasmtime. Every attempt of an agent has a store of its own, and so has every tool, every grading and
//! every algorithm. Guests have no files, no network and no environment, but for what a tool asks for and is granted; their clocks and random numbers are functions of
//! what is recorded; what they use of memory, time, calls and output is limited, and reaching a limit is an outcome that
//! names it. Every call that crosses the border, with its result, goes to a [`Recorder`].
//!
//! Not in here: who decides what runs (the runner), models (the policy), storage.
//!
//! ```no_run
//! use std::path::Path;
//! use fulgurite_sandbox::{Sandbox, SandboxSettings};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let sandbox = Sandbox::new(SandboxSettings::default())?;
//! let info = sandbox.inspect(Path::new("target/plugins/rooms_agent.wasm"))?;
//! println!("{:?} asks for {:?}", info.worlds, info.imports);
//! # Ok(())
//! # }
//! ```

mod admission;
mod agent;
mod agent_call;
mod agent_emit;
mod agent_facts;
mod agent_llm;
mod agent_tools;
mod algorithm;
mod algorithm_host;
mod algorithm_policy;
mod bare;
mod bindings;
mod clock;
mod convert;
mod engine;
mod fault;
mod grader;
mod grants;
mod guest;
mod limits;
mod manifest;
mod meter;
mod output;
mod plugin;
mod profile;
mod random;
mod recorder;
mod seeds;
mod tape;
mod templates;
mod tool;
mod turns;
mod weight;

pub use admission::{Admission, Gatekeeper};
pub use agent::{AgentPlugin, AgentReport, AgentRun};
pub use algorithm::{AlgorithmFault, AlgorithmInstance, AlgorithmPlugin, STATE_BYTES_MAX};
pub use bare::BareAgent;
pub use engine::{Sandbox, SandboxError, SandboxSettings};
pub use fulgurite_grants::{CapabilityError, Guarded, ToolCapabilities};
pub use grader::{GradeReport, GradeRun, GraderPlugin};
pub use grants::Judge;
pub use meter::Heartbeat;
pub use plugin::{ImportInfo, PluginError, PluginInfo, PluginWorld};
pub use recorder::Recorder;
pub use seeds::SeedSource;
pub use tape::{Divergence, Tape, TapeObserver};
pub use templates::{TemplateRenderer, Templates};
pub use tool::{ToolPlugin, ToolSet};
