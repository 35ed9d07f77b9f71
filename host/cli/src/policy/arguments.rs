//! The command line of `fulgurite policy`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::arguments::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Say what a Hugging Face folder holds and what it takes in memory, before any of it is taken.
    Info(InfoArguments),
    /// Print what a model makes of a conversation: its token ids, logits, and the likeliest continuation.
    Logits(LogitsArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
The folder is checked as for training: every tensor's name, size and type, tokenizer and chat template. Supported are Llama,
Mistral, Qwen2 and Qwen3 with safetensors in float32, float16 or bfloat16; they are computed in float32.

Example:
  fulgurite policy info models/Qwen3-0.6B --rollouts 64 --context-tokens 4096")]
pub(crate) struct InfoArguments {
    /// Folder with config.json, safetensors and tokenizer.json.
    pub(crate) directory: PathBuf,
    /// Live rollouts to plan for.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rollouts: u64,
    /// Tokens of each rollout to plan for. Default: the model's context.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) context_tokens: Option<u64>,
    /// Tokens of a micro-batch to plan for.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) micro_batch_tokens: u64,
    /// Micro-batches at once to plan for. 0: one per core.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: u64,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
FILE holds a list of messages, or an object with `messages` and `tools`, as OpenAI's and Hugging Face's interfaces have them;
the folder's chat template sees them as they stand and is asked for a generation prompt. Everything is computed in float32.

With --output json: `prompt_ids`; `last_logits`, after the prompt's last token; with --greedy also `tokens`, `logprobs` (nats),
their mean `cross_entropy` and `grad_norm`, the norm of its gradient over all weights.

Example:
  fulgurite policy logits models/Qwen3-0.6B --messages chat.json --greedy 64 --output json")]
pub(crate) struct LogitsArguments {
    /// Folder with config.json, safetensors and tokenizer.json.
    pub(crate) directory: PathBuf,
    /// JSON file of the conversation.
    #[arg(long, value_name = "FILE")]
    pub(crate) messages: PathBuf,
    /// Go on with so many tokens, each the likeliest. End tokens do not stop it.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(crate) greedy: usize,
    /// Threads. 0: one per core.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}
