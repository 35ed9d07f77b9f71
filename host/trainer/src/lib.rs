//! Joins the pieces for one training run: config, datasets, stages, algorithm plugins, checkpoints, evaluation.

mod checkpoint;
pub mod config;
mod dataset;
mod endpoint;
mod error;
mod estimate;
mod evaluate;
mod fork;
mod grants;
mod host;
mod kept;
pub mod metrics;
mod plot;
pub mod progress;
mod replay;
mod report;
mod run;
mod run_directory;
mod setup;
mod tensorboard;
mod train;

pub use checkpoint::{CheckpointError, Totals};
pub use dataset::DatasetError;
pub use endpoint::{CheckedEndpoint, check_endpoints};
pub use error::TrainError;
pub use estimate::{Estimate, NoEstimate, estimate, forget_peak_memory, peak_memory_bytes, shown_duration};
pub use evaluate::{Evaluation, Score};
pub use fork::{ForkOptions, fork};
pub use fulgurite_grants::EndpointCheckError;
pub use kept::KeptError;
pub use plot::PlotError;
pub use replay::{Exchanged, NewGrader, open_replayer};
pub use report::{RunResult, StageReport};
pub use run::{RunOptions, run};
pub use run_directory::RunDirectory;
pub use train::{INITIAL, TrainOptions, train};
