//! `fulgurite rollouts cancel`.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use fulgurite_core::id::RolloutId;
use fulgurite_runner::control::Request;
use fulgurite_store::{RolloutStore, SledStore, StoreError};
use fulgurite_trainer::RunDirectory;

use crate::arguments::RolloutsCancelArguments;
use crate::failure::Failure;
use crate::{paths, store, terminal};

/// How long the process that runs may take to answer. It looks twice a second.
const ANSWER: Duration = Duration::from_secs(10);
/// How often to look whether it has.
const POLL: Duration = Duration::from_millis(50);

pub(crate) fn cancel(arguments: &RolloutsCancelArguments) -> Result<(), Failure> {
    let run = RunDirectory::new(paths::existing_run(arguments.run.as_deref())?);
    let rollout = arguments.rollout.as_deref().map(RolloutId::new).transpose().map_err(Failure::usage)?;
    match (SledStore::open(&run.store()), rollout) {
        (Ok(store), Some(rollout)) => cancel_queued(&store, &rollout),
        (Ok(_), None) => Err(Failure::usage(anyhow!("no process works on this run, so nothing of it lives"))),
        (Err(StoreError::InUse { .. }), rollout) => {
            let request = rollout.map_or(Request::CancelAll, Request::Cancel);
            ask(&request, &run.control())
        }
        (Err(error), _) => Err(store::failure(error)),
    }
}

fn cancel_queued(store: &SledStore, rollout: &RolloutId) -> Result<(), Failure> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    store.cancel(rollout, now_ns).map_err(store::failure)?;
    terminal::print(&format!("{rollout} is cancelled"));
    Ok(())
}

/// Asks the process that has the store open.
fn ask(request: &Request, control: &Path) -> Result<(), Failure> {
    request.leave(control).map_err(Failure::failed)?;
    let start = Instant::now();
    while request.is_open(control) {
        if start.elapsed() > ANSWER {
            request.remove(control);
            let problem = anyhow!("the process that has the store open does not answer");
            return Err(Failure::failed(problem).hint("only `fulgurite run` and `fulgurite train` take such requests"));
        }
        std::thread::sleep(POLL);
    }
    terminal::print("the run has taken the request");
    Ok(())
}
