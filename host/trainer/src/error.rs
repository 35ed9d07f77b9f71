//! Why a run stopped.

use std::path::PathBuf;

use fulgurite_core::grant::Capability;
use fulgurite_core::id::InvalidId;
use fulgurite_core::llm::LlmError;
use fulgurite_grants::{CapabilityError, EndpointCheckError, HttpSetupError};
use fulgurite_policy::PolicyError;
use fulgurite_runner::RunnerError;
use fulgurite_runner::replay::ReplayError;
use fulgurite_runner::scripted::ScriptError;
use fulgurite_sandbox::{AlgorithmFault, PluginError, SandboxError};
use fulgurite_store::StoreError;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::dataset::DatasetError;
use crate::kept::KeptError;
use crate::plot::PlotError;

/// Why a run stopped. What was committed stays; `--resume` goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The config is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A dataset is wrong.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A component cannot be loaded.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// The sandbox cannot be set up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A script is wrong.
    #[error("the script of `{name}`")]
    Script {
        /// Whose script.
        name: String,
        /// Why.
        #[source]
        source: ScriptError,
    },
    /// A grant cannot be given.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// A model endpoint cannot be set up.
    #[error("`{section}`")]
    Endpoint {
        /// Its place in the config.
        section: String,
        /// Why.
        #[source]
        source: HttpSetupError,
    },
    /// The policy's endpoint is not there, or not what the config says.
    #[error(transparent)]
    EndpointCheck(#[from] EndpointCheckError),
    /// The server that draws rollouts does not take what was trained.
    #[error(
        "the server of `policy.endpoint` was not given the adapter `{name}`: vLLM takes it when it was started with `--enable-lora` \
         and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and sees `{path}`"
    )]
    AdapterPush {
        /// The adapter's name there.
        name: String,
        /// Its folder, as the server should see it.
        path: PathBuf,
        /// What the server said.
        #[source]
        source: LlmError,
    },
    /// The policy engine failed.
    #[error("the policy engine failed")]
    Policy(#[from] PolicyError),
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// Rollouts could not be run.
    #[error("rollouts could not be run")]
    Runner(#[from] RunnerError),
    /// A name cannot be used in ids.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A plot could not be drawn.
    #[error(transparent)]
    Plot(#[from] PlotError),
    /// The algorithm plugin failed.
    #[error("stage `{stage}`, step {step}: the algorithm failed")]
    Algorithm {
        /// Name of the stage.
        stage: String,
        /// The step, from 0.
        step: u64,
        /// Why.
        #[source]
        source: AlgorithmFault,
    },
    /// An alarm stops the run.
    #[error("stage `{stage}`, step {step}: the alarm on a metric stops the run: {text}")]
    Alarm {
        /// Name of the stage.
        stage: String,
        /// The step, from 0.
        step: u64,
        /// The metric and its threshold.
        text: String,
    },
    /// A file of the run could not be written or read.
    #[error("`{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Too many infrastructure faults in an evaluation.
    #[error("the evaluation of `{label}` is void: {:.1} % of its rollouts failed by infrastructure, at most {:.1} % may", share * 100.0, share_max * 100.0)]
    EvaluationVoid {
        /// What was evaluated.
        label: String,
        /// The share.
        share: f64,
        /// `evaluation.infrastructure_share_max`.
        share_max: f64,
    },
    /// The run's folder is there already.
    #[error("the run folder `{path}` has a run already; go on with it by `--resume`, or choose another by `--run DIR`")]
    RunExists {
        /// The folder.
        path: PathBuf,
    },
    /// There is nothing to go on with.
    #[error("the run folder `{path}` has no run to resume; start it without `--resume`")]
    NothingToResume {
        /// The folder.
        path: PathBuf,
    },
    /// The config is not that of the run.
    #[error(
        "`{path}` was written by another config or seed; resume with the config that started the run, or choose another folder by `--run DIR`"
    )]
    ConfigChanged {
        /// The stored config.
        path: PathBuf,
    },
    /// A run has not come as far as to keep weights.
    #[error("the run `{path}` has no weights yet: neither policies/ nor checkpoints/ holds any")]
    NoWeights {
        /// The run's folder.
        path: PathBuf,
    },
    /// The policy's folder is not what it was when the run began.
    #[error(
        "the {what} that the config names are not those that the run began with (`{path}`); put the folder of `policy.local.model.directory` (and that of `policy.local.lora.adapter_directory`) back as it was, or choose another run by `--run DIR`"
    )]
    PolicyChanged {
        /// The record of what it was.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// A dataset has no items of a split that is needed.
    #[error("dataset `{dataset}` has no `{split}` split")]
    MissingSplit {
        /// The dataset.
        dataset: String,
        /// The split.
        split: &'static str,
    },
    /// A config that was not checked has no model.
    #[error("the config has none of [policy.local], [policy.endpoint] and [policy.scripted]")]
    NoPolicy,
    /// Asked to stop, and everything that lived has ended and is recorded.
    #[error("stopped on request; what had begun is recorded in {run}", run = .run.display())]
    Drained {
        /// The run's folder.
        run: std::path::PathBuf,
    },
    /// A rollout cannot be forked.
    #[error("cannot fork `{rollout}`: {problem}")]
    Fork {
        /// The rollout.
        rollout: fulgurite_core::id::RolloutId,
        /// Why not.
        problem: String,
    },
    /// A grader that judges recordings asks a model that the recorded run did not grant.
    #[error(
        "{grader} asks the model endpoint `{endpoint}`{because}, which the recorded run did not grant to its grader, so a replay \
         does not ask it; take a grader that asks nobody else, or record with these lines in the config:\n{lines}",
        grader = .grader.display(),
        because = if .why.is_empty() { String::new() } else { format!(" ({why})") },
        lines = Capability::Endpoint.lines("grader", .endpoint)
    )]
    JudgeNotGranted {
        /// The grader.
        grader: PathBuf,
        /// What it asks for.
        endpoint: String,
        /// What for.
        why: String,
    },
    /// A component that ran is not kept any more.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// A rollout cannot be replayed.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// Asked to stop.
    #[error("stopped on request; go on with `--resume`")]
    Stopped,
}

impl TrainError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
