//! The command line of `fulgurite store`.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::record::RolloutMode;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{BodyKind, Cursor};

use crate::arguments::Output;

/// One of a closed set, by its name.
fn named<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    name: fn(&T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(name)).try_map(move |text| {
        all.iter().copied().find(|one| name(one) == text).ok_or_else(|| format!("there is no `{text}`"))
    })
}

pub(crate) fn rollout_state() -> impl TypedValueParser<Value = RolloutState> {
    named(&RolloutState::ALL, |state| state.as_str())
}

pub(crate) fn attempt_state() -> impl TypedValueParser<Value = AttemptState> {
    named(&AttemptState::ALL, |state| state.as_str())
}

pub(crate) fn outcome_kind() -> impl TypedValueParser<Value = OutcomeKind> {
    named(&OutcomeKind::ALL, |kind| kind.as_str())
}

pub(crate) fn rollout_mode() -> impl TypedValueParser<Value = RolloutMode> {
    named(&[RolloutMode::Train, RolloutMode::Val, RolloutMode::Test], |mode| mode.as_str())
}

fn body_kind() -> impl TypedValueParser<Value = BodyKind> {
    named(&BodyKind::ALL, |kind| kind.as_str())
}

/// Which run.
#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Read everything and say what is wrong. Exit code 1 when something is.
    Check(RunArguments),
    /// Count rollouts, outcomes, spans and bytes.
    Stats(RunArguments),
    /// List attempts, spans, workers or published prompt templates. Rollouts: `fulgurite rollouts list`.
    List {
        #[command(subcommand)]
        what: ListCommand,
    },
    /// Write everything as lines of JSON, for backups, other programs, or collectors.
    Export(ExportArguments),
    /// Make a run out of an export, or take traces of others into a run.
    Import(ImportArguments),
    /// Give the file system back what the database does not need any more.
    Compact(RunArguments),
    /// Drop rollouts that have ended, with their spans.
    Prune(PruneArguments),
}

/// What an export consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Everything, one record on each line; nothing is lost.
    Jsonl,
    /// OpenTelemetry traces, one request on each line; what collectors read.
    Otlp,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fulgurite store export --run runs/rooms-seed0 --to rooms.jsonl      a backup; `store import` makes an equal run of it
  fulgurite store export --format otlp --to rooms.otlp.jsonl          for the file receiver of an OpenTelemetry collector
  fulgurite store export | gzip > rooms.jsonl.gz")]
pub(crate) struct ExportArguments {
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// What is written.
    #[arg(long, value_enum, default_value = "jsonl")]
    pub(crate) format: Format,
    /// File to write, which must not be there yet. Default: standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) to: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
An export goes into a run that is not there yet. Traces go into any run: each becomes a finished rollout `otlp-TRACEID` of
stage `import`, which is never trained on; what is there already is left out.

Examples:
  fulgurite store import rooms.jsonl --run runs/rooms-again
  fulgurite store import --format otlp traces.jsonl --run runs/traces")]
pub(crate) struct ImportArguments {
    /// The file.
    pub(crate) file: PathBuf,
    /// Folder of the run to make or to add to. Default: runs/ and the file's name.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// What the file holds.
    #[arg(long, value_enum, default_value = "jsonl")]
    pub(crate) format: Format,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Dropped is what fits all that is given. What has not ended, and what a fork that stays refers to, is never dropped. A run
that goes on from an older checkpoint runs dropped rollouts again.

Examples:
  fulgurite store prune --keep-steps 20 --dry-run       what would go, of all steps but the newest 20 of each stage
  fulgurite store prune --stage grpo --before-step 100 --compact
  fulgurite store prune --state failed --state cancelled")]
pub(crate) struct PruneArguments {
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Only rollouts of this stage.
    #[arg(long)]
    pub(crate) stage: Option<String>,
    /// Only rollouts of steps before this one.
    #[arg(long, value_name = "STEP")]
    pub(crate) before_step: Option<u64>,
    /// Only rollouts outside the newest so many steps of their stage.
    #[arg(long, value_name = "STEPS")]
    pub(crate) keep_steps: Option<u64>,
    /// Only rollouts in this state; may be given more than once.
    #[arg(long, value_parser = rollout_state())]
    pub(crate) state: Vec<RolloutState>,
    /// Say what would be dropped, and drop nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Compact afterwards, so that the space is given back.
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) compact: bool,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ListCommand {
    /// Attempts, in the order of their rollouts.
    Attempts(AttemptsArguments),
    /// Spans of one attempt, by sequence.
    Spans(SpansArguments),
    /// Workers, by id.
    Workers(WorkersArguments),
    /// Published prompt templates, by version.
    Resources(ResourcesArguments),
}

/// A page of a list.
#[derive(Debug, Args)]
pub(crate) struct PageArguments {
    /// Folder of the run. Default: the newest under runs/.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Go on where a page has ended: what `more:` said.
    #[arg(long, value_name = "CURSOR")]
    pub(crate) after: Option<Cursor>,
    /// Most to list.
    #[arg(long, default_value_t = 50)]
    pub(crate) limit: usize,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct AttemptsArguments {
    /// Only those of this rollout.
    #[arg(long)]
    pub(crate) rollout: Option<String>,
    /// Only those in this state.
    #[arg(long, value_parser = attempt_state())]
    pub(crate) state: Option<AttemptState>,
    /// Only those that ended like this.
    #[arg(long, value_parser = outcome_kind())]
    pub(crate) outcome: Option<OutcomeKind>,
    /// Only those that this worker ran.
    #[arg(long)]
    pub(crate) worker: Option<String>,
    /// The last ones first.
    #[arg(long)]
    pub(crate) descending: bool,
    #[command(flatten)]
    pub(crate) page: PageArguments,
}

#[derive(Debug, Args)]
pub(crate) struct SpansArguments {
    /// The rollout.
    pub(crate) rollout: String,
    /// Which attempt. Default: the last.
    #[arg(long)]
    pub(crate) attempt: Option<u32>,
    /// Only those about this.
    #[arg(long, value_parser = body_kind())]
    pub(crate) kind: Option<BodyKind>,
    /// Only those of this name.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Only those with this text somewhere.
    #[arg(long, value_name = "TEXT")]
    pub(crate) contains: Option<String>,
    #[command(flatten)]
    pub(crate) page: PageArguments,
}

#[derive(Debug, Args)]
pub(crate) struct WorkersArguments {
    #[command(flatten)]
    pub(crate) page: PageArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ResourcesArguments {
    /// Only versions that published this template.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The newest first.
    #[arg(long)]
    pub(crate) descending: bool,
    #[command(flatten)]
    pub(crate) page: PageArguments,
}
