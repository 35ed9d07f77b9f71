//! The policy: a language model of the Llama family (Llama, Mistral, Qwen2, Qwen3) that is sampled from and trained in one place.
//!
//! [`PolicyEngine`] is a cheap handle to it. Its [`backend`](PolicyEngine::backend) answers the LLM calls of live
//! rollouts, its training verbs take [rows](fulgurite_core::training::TrainingRow), and both use the same weights. All
//! work runs on the engine's own threads; the handle's methods only send and wait, so they may be called from any
//! runtime. This crate is the only user of burn.
//!
//! It is not a server: it knows no HTTP, no store and no sandbox.
//!
//! ```
//! use fulgurite_core::llm::{Message, Role};
//! use fulgurite_core::seed::Seed;
//! use fulgurite_policy::{PolicyConfig, PolicyEngine, PolicyTokenizer, TokenizerConfig};
//!
//! # fn main() -> Result<(), fulgurite_policy::PolicyError> {
//! let corpus = ["book a room for 4 people", "R07 holds 12 people"].map(String::from);
//! let tokenizer = PolicyTokenizer::train(corpus.into_iter(), &TokenizerConfig::default())?;
//! let engine = PolicyEngine::create(&PolicyConfig::default(), tokenizer, Seed::new(0))?;
//! let demonstration = [Message::text(Role::User, "book a room"), Message::text(Role::Assistant, "R07")];
//! let encoded = engine.encode_demonstration(&demonstration, &[Role::Assistant])?;
//! assert!(encoded.mask.iter().any(|trained| *trained));
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
mod architecture_tests;
mod attention_kernel;
mod backprop;
mod block_pool;
mod call;
mod checkpoint;
mod compute;
mod config;
mod constraint;
mod decoder;
mod device;
mod device_decoder;
mod device_loss;
mod engine;
mod error;
mod gradient_kernel;
mod hugging_face;
mod inference;
mod kernel;
mod kv_cache;
mod kv_memory;
mod lora;
#[cfg(test)]
mod lora_tests;
mod loss;
mod low_rank;
mod model;
mod optimiser;
mod parallel;
mod parameters;
mod peft;
mod predictor;
mod prefix_tree;
mod rotary;
mod row_attention;
mod sampler;
mod scheduler;
mod session;
mod settled_text;
mod shape;
mod split;
mod stream;
mod sums;
mod support;
#[doc(hidden)]
pub mod table;
mod template;
mod text_cache;
mod tokenizer;
mod train;
#[cfg(test)]
mod train_tests;
mod trainer;
mod weights;
mod worker;

pub use config::{CriticConfig, PolicyConfig, Preset};
pub use device::{DeviceFinding, DevicePrecision, PolicyDevice};
pub use engine::{EncodedDemonstration, EngineStatistics, PolicyEngine};
pub use error::PolicyError;
pub use hugging_face::{
    Conversation, ExportOptions, Exported, FileType, MemoryPlan, ModelDescription, ModelFolder, PlanOptions, Written,
    adapter_folder, export_adapter, export_checkpoint, holds_adapter, import_folder, merge_adapter, named_model,
    new_folder,
};
pub use inference::{CrossEntropy, Greedy, Inference};
pub use lora::{LoraConfig, LoraTarget};
pub use loss::{CallKey, CallShare, call_shares};
pub use shape::{Architecture, ModelShape, RopeScaling};
pub use tokenizer::{PolicyTokenizer, TokenizerConfig};
