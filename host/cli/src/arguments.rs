//! The command line as it is typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Which policy answers is said by the config: [policy.local] with its random weights or those of --policy, or
[policy.scripted] with replies that are written down.

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
}

#[derive(Debug, Args)]
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
    /// Rollouts to leave out at the start.
    #[arg(long, default_value_t = 0)]
    pub(crate) offset: usize,
    /// Most rollouts to list.
    #[arg(long, default_value_t = 50)]
    pub(crate) limit: usize,
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
pub(crate) struct DoctorArguments {
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}
