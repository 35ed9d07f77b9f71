//! The command line of `fulgurite policy`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use fulgurite_policy::{ExportOptions, FileType, LoraTarget};

use crate::arguments::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Say what a Hugging Face folder holds and what it takes in memory, before any of it is taken.
    Info(InfoArguments),
    /// Print what a model makes of a conversation: its token ids, logits, and the likeliest continuation.
    Logits(LogitsArguments),
    /// Download a model from the Hugging Face hub.
    Pull(PullArguments),
    /// Check a Hugging Face folder and write what a run needs of it into another.
    Import(ImportArguments),
    /// Make a model with random weights, as a Hugging Face folder.
    Init(InitArguments),
    /// Write a trained policy as a folder that transformers loads; trained adapters as one that PEFT loads.
    Export(ExportArguments),
    /// Merge an adapter into its model, as a Hugging Face folder.
    Merge(MergeArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
The folder is checked as for training: every tensor's name, size and type, tokenizer and chat template. Supported are Llama,
Mistral, Qwen2 and Qwen3 with safetensors in float32, float16 or bfloat16; they are computed in float32.

The plan is of device `cpu`: sandboxes, the store and a snapshot of a reference come on top of it. Of --config its
[policy.local] counts, and the other options go before it.

Example:
  fulgurite policy info models/Qwen3-0.6B --rollouts 64 --context-tokens 4096
  fulgurite policy info models/Qwen3-0.6B --config run.toml
  fulgurite policy info models/Qwen3-0.6B --lora-rank 16 --lora-targets q,v --gradient-checkpointing")]
pub(crate) struct InfoArguments {
    /// Folder with config.json, safetensors and tokenizer.json.
    pub(crate) directory: PathBuf,
    /// Plan for the run of this config.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Live rollouts to plan for. Default: the config's `rollout.live_max`, or 32.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rollouts: Option<u64>,
    /// Tokens of each rollout to plan for. Default: the config's `context_tokens_max`, or the model's.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) context_tokens: Option<u64>,
    /// Tokens of a micro-batch to plan for. Default: the config's `micro_batch_tokens_max`, or 512.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) micro_batch_tokens: Option<u32>,
    /// Threads to plan for, each with a micro-batch. 0: one per core. Default: the config's.
    #[arg(long, value_parser = clap::value_parser!(u16).range(0..=1_024))]
    pub(crate) threads: Option<u16>,
    /// Plan for adapters of this rank over frozen weights. Default: the config's.
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(u16).range(1..=1_024))]
    pub(crate) lora_rank: Option<u16>,
    /// Which projections have adapters: q, k, v, o, gate, up, down. Default: the config's, or all.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = lora_target)]
    pub(crate) lora_targets: Vec<LoraTarget>,
    /// Plan for keeping the inputs of layers only.
    #[arg(long)]
    pub(crate) gradient_checkpointing: bool,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

/// The name of a projection.
fn lora_target(name: &str) -> Result<LoraTarget, String> {
    let known = || LoraTarget::ALL.map(LoraTarget::name).join(", ");
    let found = LoraTarget::ALL.into_iter().find(|target| target.name() == name);
    found.ok_or_else(|| format!("there are {}", known()))
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
    /// Folder of an adapter over the model, as PEFT writes it; or a run with [policy.local.lora]. `grad_norm` is then of the
    /// adapter's weights, and `--greedy` goes by it too.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
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

/// How a model is written.
#[derive(Debug, Args)]
pub(crate) struct WriteArguments {
    /// Folder to make. It must not be there yet.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Type of the weights. Default: that of the source; f32 for what was trained or made here.
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<Dtype>,
    /// Bytes of one safetensors file; more are spread over several.
    #[arg(long, value_name = "BYTES", default_value_t = ExportOptions::default().shard_bytes_max,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) shard_bytes_max: u64,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

/// The type of the numbers in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    /// As they are computed.
    F32,
    /// The upper half of it.
    Bf16,
    /// IEEE's half precision.
    F16,
}

impl WriteArguments {
    pub(crate) fn options(&self) -> ExportOptions {
        let file_type = self.dtype.map(|dtype| match dtype {
            Dtype::F32 => FileType::F32,
            Dtype::Bf16 => FileType::Bf16,
            Dtype::F16 => FileType::F16,
        });
        ExportOptions { file_type, shard_bytes_max: self.shard_bytes_max }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
The folder is checked as for training, tensor by tensor, and what a run needs of it is written anew: config.json,
model.safetensors, tokenizer, chat template and end tokens. A config names it as [policy.local.model] directory = \"DIR\".

Example:
  fulgurite policy import downloads/Qwen3-0.6B --to models/qwen3 --dtype bf16")]
pub(crate) struct ImportArguments {
    /// Folder with config.json, safetensors and tokenizer.json.
    pub(crate) directory: PathBuf,
    #[command(flatten)]
    pub(crate) write: WriteArguments,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The weights are a function of the seed and the sizes. The tokenizer is trained on the lines of --tokenizer-corpus; without it
every byte is a token. transformers loads the folder, and a config names it as [policy.local.model] directory = \"DIR\".

Example:
  fulgurite policy init --preset small --to models/small --tokenizer-corpus texts.txt --vocab-size 2048")]
pub(crate) struct InitArguments {
    /// Sizes of the model.
    #[arg(long, value_enum)]
    pub(crate) preset: PresetName,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// File of texts, one a line, that the tokenizer is trained on.
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer_corpus: Option<PathBuf>,
    /// Most tokens, control tokens and bytes included. Default: 512 with a corpus.
    #[arg(long, value_name = "TOKENS", requires = "tokenizer_corpus")]
    pub(crate) vocab_size: Option<usize>,
    /// Regular expression of texts that must each be one token (numbers, ids).
    #[arg(long, value_name = "REGEX", requires = "tokenizer_corpus")]
    pub(crate) atoms_pattern: Option<String>,
    /// Tokens of prompt and completion together. Default: the preset's.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) write: WriteArguments,
}

/// Sizes of a new model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PresetName {
    /// Some 0.9 million parameters.
    Tiny,
    /// Some 12 million parameters.
    Small,
    /// Some 100 million parameters.
    Base,
}

#[derive(Debug, Args)]
#[command(after_help = "\
DIR is a folder under policies/ or checkpoints/ of a run, or the run itself: then its last stage counts, or its newest
checkpoint while no stage has ended. transformers and every server that reads its folders load what is written, also with
this program's own tokenizer; optimiser and snapshots stay behind.

Of a run with [policy.local.lora] the adapter is written, in float32, as PEFT and vLLM load it; `fulgurite policy merge` makes
a whole model of it, and a config goes on from it by [policy.local.lora] adapter_directory = \"DIR\".

Example:
  fulgurite policy export runs/rooms-seed0 --to models/rooms --dtype bf16")]
pub(crate) struct ExportArguments {
    /// The run, or the checkpoint.
    pub(crate) directory: PathBuf,
    /// A further adapter, or a further whole model, by its name in the config. Default: the policy's own.
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    #[command(flatten)]
    pub(crate) write: WriteArguments,
}

#[derive(Debug, Args)]
#[command(after_help = "\
What is written is a plain model: `W + alpha / rank * A B` for every projection that the adapter changes, computed in float32
and rounded to the type of the file, which is the base's unless --dtype says otherwise. A base in bfloat16 loses what is
smaller than its last digit; take --dtype f32 to keep it.

Example:
  fulgurite policy merge models/Qwen3-0.6B runs/rooms-seed0 --to models/rooms
  fulgurite policy merge models/Qwen3-0.6B runs/rooms-seed0 --name writing --to models/writing")]
pub(crate) struct MergeArguments {
    /// Folder of the model that the adapter was trained over.
    pub(crate) base: PathBuf,
    /// Folder of the adapter, as PEFT writes it; or a run with [policy.local.lora], or a checkpoint of one.
    pub(crate) adapter: PathBuf,
    /// Of a run or a checkpoint, a further adapter by its name in the config. Default: the policy's own.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) write: WriteArguments,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Only what a policy needs is fetched: config, tokenizer, chat template and safetensors. Sizes and SHA-256 are checked. A
download that was cut goes on where it stood, and a model that has come once is there without a network.

HF_ENDPOINT names another hub, HF_TOKEN is sent to it for models that are not public. Models are kept in the cache folder of
the user, or in FULGURITE_CACHE_DIR; with --to the files appear there as well.

Example:
  fulgurite policy pull Qwen/Qwen3-0.6B --to models/Qwen3-0.6B")]
pub(crate) struct PullArguments {
    /// The model's name on the hub.
    pub(crate) repo: String,
    /// Branch, tag or commit.
    #[arg(long, default_value = "main")]
    pub(crate) revision: String,
    /// Folder to put the model into. Default: it is used where it is kept.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}
