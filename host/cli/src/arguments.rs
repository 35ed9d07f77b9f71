//! The command line as it is typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::RolloutMode;
use fulgurite_core::state::RolloutState;
use fulgurite_policy::PolicyDevice;
use fulgurite_store::{Cursor, RolloutSort};

use crate::policy::arguments::PolicyCommand;
use crate::store::arguments::{StoreCommand, outcome_kind, rollout_mode, rollout_state};

/// Train AI agents inside a sandbox.
///
/// Agents, graders, tools and training algorithms are WebAssembly components. One TOML file says what is trained on what;
/// `fulgurite train` does it and keeps every rollout, so that `fulgurite rollouts show` can tell what happened and why.
#[derive(Debug, Parser)]
#[command(
    name = "fulgurite",
    version,
    max_term_width = 100,
    after_help = "\
Start here:
  fulgurite doctor                       what this machine has and lacks
  fulgurite plugin new --kind agent foo  a new agent that compiles as it is
  fulgurite build foo                    compile it to a component
  fulgurite run CONFIG                   roll it out and grade it, without training
  fulgurite train CONFIG                 train it

Exit codes: 0 done, 1 failed, 2 the command line or a file it names is wrong, 130 stopped by Ctrl-C."
)]
pub(crate) struct Arguments {
    /// Say more on standard error; twice for debugging. RUST_LOG is honoured.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the stages of a config: roll out, grade, train, evaluate on held-out items.
    Train(TrainArguments),
    /// Roll out and grade the held-out items without training.
    Run(RunArguments),
    /// Compile a plugin crate to a component and print its path.
    Build(BuildArguments),
    /// Make and inspect plugins.
    Plugin {
        #[command(subcommand)]
        command: PluginCommand,
    },
    /// Look at recorded rollouts.
    Rollouts {
        #[command(subcommand)]
        command: RolloutsCommand,
    },
    /// Say what a rollout was trained on, call by call, and why anything was not.
    Explain(ExplainArguments),
    /// Run recorded rollouts again without any model and compare every event.
    Replay(ReplayArguments),
    /// Run a recorded rollout again up to a model call, and let it go on from there with new seeds.
    Fork(ForkArguments),
    /// Measure what this machine does: sandboxes, store, replay.
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Check, count, export, import, compact and prune what a run has recorded.
    Store {
        #[command(subcommand)]
        command: StoreCommand,
    },
    /// Look at models and make them: Hugging Face folders with Llama, Mistral, Qwen2 or Qwen3.
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Check toolchain, target and folders, and say what to do about each.
    Doctor(DoctorArguments),
}

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs: JSON on standard output.
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C stops after cleaning up; `--resume` goes on from the last checkpoint, also after `kill -9`.
The folder of the run holds metrics.jsonl, timings.jsonl, tensorboard/, reward.svg, policies/ and result.json.

Example:
  fulgurite train examples/rooms/rooms.toml --seed 1")]
pub(crate) struct TrainArguments {
    /// The run's TOML file.
    pub(crate) config: PathBuf,
    /// Seed, in place of the config's.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Folder of the run. Default: runs/NAME-seedN.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Go on with the run in that folder.
    #[arg(long)]
    pub(crate) resume: bool,
    /// What the policy trains and answers on, in place of the config's: auto, cpu, cuda, cuda:N, wgpu or wgpu:N. `fulgurite doctor` says
    /// what there is.
    #[arg(long)]
    pub(crate) device: Option<PolicyDevice>,
    /// Begin at once, without the rehearsal that tells how long the run will take and how much memory.
    #[arg(long)]
    pub(crate) no_estimate: bool,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Which policy answers is said by the config: [policy.local] with its first weights or those of --policy,
[policy.endpoint] with the model of a server, or [policy.scripted] with replies that are written down.

Example:
  fulgurite run examples/rooms/rooms.toml --policy runs/rooms-seed0/policies/grpo")]
pub(crate) struct RunArguments {
    /// The run's TOML file.
    pub(crate) config: PathBuf,
    /// Seed, in place of the config's.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Folder of the run. Default: runs/NAME-seedN-run-M, the first that is free.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Weights to use: a folder under policies/ of a training run.
    #[arg(long, value_name = "DIR")]
    pub(crate) policy: Option<PathBuf>,
    /// Rollouts of each kind, in place of the config's.
    #[arg(long)]
    pub(crate) rollouts: Option<usize>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct BuildArguments {
    /// Folder of the plugin's crate.
    pub(crate) directory: PathBuf,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Write a new plugin crate that compiles and runs as it is.
    New(PluginNewArguments),
    /// Say which world a component implements, what it asks for and which limits apply.
    Check(PluginCheckArguments),
}

/// What a plugin is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PluginKind {
    /// Works on items with the help of the policy and of tools.
    Agent,
    /// Judges finished rollouts.
    Grader,
    /// Offers tools to agents.
    Tool,
    /// Decides what to roll out and what to train.
    Algorithm,
}

#[derive(Debug, Args)]
pub(crate) struct PluginNewArguments {
    /// What it is.
    #[arg(long, value_enum)]
    pub(crate) kind: PluginKind,
    /// Its name: a crate name in lower case, such as my-agent.
    pub(crate) name: String,
    /// Where to write it. Default: a folder of its name, here.
    #[arg(long, value_name = "DIR")]
    pub(crate) path: Option<PathBuf>,
    /// Folder of the fulgurite-sdk crate. Default: that of the source tree which this binary was built from.
    #[arg(long, value_name = "DIR", env = "FULGURITE_SDK")]
    pub(crate) sdk: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PluginCheckArguments {
    /// The component.
    pub(crate) file: PathBuf,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum RolloutsCommand {
    /// List rollouts of a run.
    List(RolloutsListArguments),
    /// Show one rollout as a tree of spans: prompts, answers, tool calls, rewards.
    Show(RolloutsShowArguments),
    /// Cancel a rollout, or all of a run, also while the run is going in another process.
    Cancel(RolloutsCancelArguments),
}

#[derive(Debug, Args)]
#[command(after_help = "\
A live rollout loses its sandbox and is recorded as cancelled; it is not tried again. --all cancels the live ones and begins
no others: the run then stops, and `--resume` runs what had not begun.

Example:
  fulgurite rollouts cancel grpo-00010-0003")]
pub(crate) struct RolloutsCancelArguments {
    /// The rollout's id.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) rollout: Option<String>,
    /// All live rollouts of a run that is going on.
    #[arg(long)]
    pub(crate) all: bool,
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
}

/// What rollouts are sorted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// When they were enqueued.
    #[default]
    Ordinal,
    /// Their id.
    Id,
    /// Reward of the last attempt; those without come first.
    Reward,
    /// Spans of the last attempt.
    Spans,
    /// Wall-clock time of the last attempt.
    Duration,
}

impl From<Sort> for RolloutSort {
    fn from(sort: Sort) -> Self {
        match sort {
            Sort::Ordinal => Self::Ordinal,
            Sort::Id => Self::Id,
            Sort::Reward => Self::Reward,
            Sort::Spans => Self::Spans,
            Sort::Duration => Self::Duration,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fulgurite rollouts list --stage grpo --sort reward --descending --limit 10    the best ones
  fulgurite rollouts list --outcome malformed-answer                            what the policy could not write
  fulgurite rollouts list --item room-17 --reward-max 0.5")]
pub(crate) struct RolloutsListArguments {
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Only rollouts of this stage (`eval-NAME-sampled` and `eval-NAME-greedy` are evaluations).
    #[arg(long)]
    pub(crate) stage: Option<String>,
    /// Only rollouts of this step.
    #[arg(long)]
    pub(crate) step: Option<u64>,
    /// Only rollouts in this state.
    #[arg(long, value_parser = rollout_state())]
    pub(crate) state: Option<RolloutState>,
    /// Only rollouts of this mode.
    #[arg(long, value_parser = rollout_mode())]
    pub(crate) mode: Option<RolloutMode>,
    /// Only rollouts of this dataset item.
    #[arg(long)]
    pub(crate) item: Option<String>,
    /// Only rollouts whose last attempt ended like this.
    #[arg(long, value_parser = outcome_kind())]
    pub(crate) outcome: Option<OutcomeKind>,
    /// Only rollouts with at least this reward.
    #[arg(long, value_name = "REWARD", allow_negative_numbers = true)]
    pub(crate) reward_min: Option<f64>,
    /// Only rollouts with at most this reward.
    #[arg(long, value_name = "REWARD", allow_negative_numbers = true)]
    pub(crate) reward_max: Option<f64>,
    /// Only forks of this rollout.
    #[arg(long, value_name = "ROLLOUT")]
    pub(crate) fork_of: Option<String>,
    /// What to sort by.
    #[arg(long, value_enum, default_value = "ordinal")]
    pub(crate) sort: Sort,
    /// Turn the order round.
    #[arg(long)]
    pub(crate) descending: bool,
    /// Go on where a list has ended: what `more:` said. With the same filters and order.
    #[arg(long, value_name = "CURSOR")]
    pub(crate) after: Option<Cursor>,
    /// Rollouts to leave out at the start.
    #[arg(long, default_value_t = 0, conflicts_with = "after")]
    pub(crate) offset: usize,
    /// Most rollouts to list.
    #[arg(long, default_value_t = 50)]
    pub(crate) limit: usize,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
For every call: the advantage or weight that it was trained with, in which step and update, by which algorithm and with which
loss; its tokens in the training row, and where a new row began and why. For whatever was not trained: why not. Rewards are
shown with the calls that they belong to.

Example:
  fulgurite explain grpo-00010-0003 --run runs/rooms-seed0")]
pub(crate) struct ExplainArguments {
    /// The rollout's id.
    pub(crate) rollout: String,
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct RolloutsShowArguments {
    /// The rollout's id.
    pub(crate) rollout: String,
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Which attempt. Default: the last.
    #[arg(long)]
    pub(crate) attempt: Option<u32>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The agent, its tools and its grader are executed; the answers of models come from the recording. The first event that
differs is shown, and the exit code is 1 then.

Examples:
  fulgurite replay grpo-00010-0003                        is it still what was recorded?
  fulgurite replay --all --stage grpo                     the same for a whole stage
  fulgurite replay --all --grader target/plugins/new.wasm what would the new grader have said?
  fulgurite replay grpo-00010-0003 --agent changed.wasm   where does changed code leave the recording?
  fulgurite replay grpo-00010-0003 --step                 event by event")]
pub(crate) struct ReplayArguments {
    /// The rollout's id.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) rollout: Option<String>,
    /// All finished rollouts of the run.
    #[arg(long)]
    pub(crate) all: bool,
    /// With --all: only rollouts of this stage.
    #[arg(long, requires = "all")]
    pub(crate) stage: Option<String>,
    /// With --all: only rollouts of this step of their stage.
    #[arg(long, requires = "all", value_name = "STEP")]
    pub(crate) training_step: Option<u64>,
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Which attempt. Default: the last.
    #[arg(long)]
    pub(crate) attempt: Option<u32>,
    /// Grade the recordings with this grader instead, and print what changes. Agents are not run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["agent", "step"])]
    pub(crate) grader: Option<PathBuf>,
    /// With --grader: the reward dimension that is compared.
    #[arg(long, default_value = fulgurite_core::reward::DEFAULT_DIMENSION)]
    pub(crate) dimension: String,
    /// Run this agent against the recording until it diverges.
    #[arg(long, value_name = "FILE")]
    pub(crate) agent: Option<PathBuf>,
    /// Stop at every event and show it.
    #[arg(long, conflicts_with = "all")]
    pub(crate) step: bool,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The prefix is played back and compared, not copied; tools are run again, so that they have their state. A rollout that did
what cannot be done twice (an HTTP call) cannot be forked. Forks are rollouts of the same run: `rollouts show` shows them.

Example:
  fulgurite fork grpo-00010-0003 --at 1 --count 8")]
pub(crate) struct ForkArguments {
    /// The rollout's id.
    pub(crate) rollout: String,
    /// The first model call (counted from 0) that is made anew.
    #[arg(long, value_name = "CALL")]
    pub(crate) at: u64,
    /// How many forks.
    #[arg(long, default_value_t = 1)]
    pub(crate) count: u64,
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Which attempt. Default: the last.
    #[arg(long)]
    pub(crate) attempt: Option<u32>,
    /// Weights that make the new calls: a folder under policies/ of a training run. Default: those of the rollout's stage at
    /// its end, or of the last stage that has ended.
    #[arg(long, value_name = "DIR")]
    pub(crate) policy: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Rollouts a second with a scripted model, beside the same component on bare wasmtime.
    Sandbox(BenchSandboxArguments),
    /// Recorded rollouts that are run again and compared, a second.
    Replay(BenchReplayArguments),
    /// Durable spans a second, beside the same spans in bare sled.
    Store(BenchStoreArguments),
    /// Tokens a second that the policy trains and draws, beside PyTorch.
    Policy(BenchPolicyArguments),
}

/// What `bench policy` measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchPolicyPart {
    /// Gradient and optimiser step.
    Train,
    /// New tokens with seeds and log-probs, from ragged prompts.
    Decode,
    /// A group of 16 with one prompt beside the prompt alone.
    Group,
    /// Log-probs of sampling against those of training.
    Mismatch,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Models have random weights: d128 is the preset tiny (0.9 million), d384 has 6 layers (9.8 million). Both sides work in f32.
With --baseline each measurement runs in turns with PyTorch as one process of two threads and as two of one; the faster
counts, and the ratio is of the medians. The baseline's packages stand in tests/baselines/requirements.txt.

Examples:
  fulgurite bench policy --only train --shapes d384
  fulgurite bench policy --baseline venv/bin/python --output json")]
pub(crate) struct BenchPolicyArguments {
    /// Models, several values separated by commas: d128, d384.
    #[arg(long, value_delimiter = ',', default_values = ["d128", "d384"])]
    pub(crate) shapes: Vec<String>,
    /// What is measured, several values separated by commas. Default: everything.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) only: Vec<BenchPolicyPart>,
    /// Length of one measurement in seconds.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) seconds: f64,
    /// Measurements of each figure, in turns with the baseline's.
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: u32,
    /// Threads of the policy. 0 takes one per core; the baseline always has two.
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// A Python with the baseline's packages. Default: no baseline.
    #[arg(long, value_name = "PYTHON")]
    pub(crate) baseline: Option<PathBuf>,
    /// The baseline's script.
    #[arg(long, value_name = "FILE", default_value = "tests/baselines/torch_policy.py")]
    pub(crate) script: PathBuf,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Spans are interleaved over 64 rollouts and acknowledged after flush and fdatasync; bare sled only flushes.

Example:
  fulgurite bench store --span-bytes 320,1500 --output json")]
pub(crate) struct BenchStoreArguments {
    /// Encoded size of a span in bytes, several values separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [320, 1_500])]
    pub(crate) span_bytes: Vec<usize>,
    /// Where the store of the measurement is put. Default: the system's folder for temporary files.
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchMode {
    /// The component on wasmtime with host functions that do nothing.
    Bare,
    /// Sandboxed; neither stored nor graded.
    Unrecorded,
    /// Sandboxed, graded, and durable in the store.
    Recorded,
}

impl BenchMode {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Unrecorded => "unrecorded",
            Self::Recorded => "recorded",
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
The workload: three model calls an attempt with prompts of 1.2 KB, 32 completion tokens with ids and log-probs, four spans
of the agent's own. Ratios mean more than figures: the baseline runs beside each of them.

Example:
  fulgurite bench sandbox --live 1,100 --latency-ms 0 --output json")]
pub(crate) struct BenchSandboxArguments {
    /// Attempts alive at once, several values separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000, 10_000])]
    pub(crate) live: Vec<usize>,
    /// What each call of the model takes in milliseconds, several values separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 200])]
    pub(crate) latency_ms: Vec<u64>,
    /// Rollouts of each measurement. Default: enough for some seconds.
    #[arg(long)]
    pub(crate) rollouts: Option<u64>,
    /// Make one measurement in this process.
    #[arg(long, value_enum, hide = true)]
    pub(crate) measure: Option<BenchMode>,
    #[command(flatten)]
    pub(crate) load: BenchLoadArguments,
}

/// What the benchmarks that run rollouts share.
#[derive(Debug, Args)]
pub(crate) struct BenchLoadArguments {
    /// Threads that run guests.
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// The agent that is measured.
    #[arg(long, value_name = "FILE", default_value = "target/plugins/bench_agent.wasm")]
    pub(crate) agent: PathBuf,
    /// The grader that is measured.
    #[arg(long, value_name = "FILE", default_value = "target/plugins/bench_grader.wasm")]
    pub(crate) grader: PathBuf,
    /// Where the store of the measurement is put. Default: the system's folder for temporary files.
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct BenchReplayArguments {
    /// Rollouts that are recorded and then replayed.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) rollouts: u64,
    #[command(flatten)]
    pub(crate) load: BenchLoadArguments,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArguments {
    /// A run's TOML file: its model endpoints are asked as well.
    #[arg(long, value_name = "CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}
