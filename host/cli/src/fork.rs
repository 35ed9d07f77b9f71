//! `fulgurite fork`: runs a recorded rollout again up to a model call and lets it go on from there.

use std::sync::Arc;

use fulgurite_core::id::{AttemptNumber, RolloutId};
use fulgurite_core::reward::DEFAULT_DIMENSION;
use fulgurite_trainer::ForkOptions;

use crate::arguments::{ForkArguments, Output};
use crate::failure::Failure;
use crate::progress::TerminalProgress;
use crate::{paths, terminal, train};

pub(crate) async fn fork(arguments: ForkArguments) -> Result<(), Failure> {
    let run = paths::existing_run(arguments.run.as_deref())?;
    let options = ForkOptions {
        run,
        rollout: RolloutId::new(arguments.rollout).map_err(Failure::usage)?,
        attempt: arguments.attempt.map(AttemptNumber),
        call: arguments.at,
        count: arguments.count,
        policy: arguments.policy,
        cache: paths::cache(),
    };
    let forks = Box::pin(fulgurite_trainer::fork(options, Arc::new(TerminalProgress::new()))).await?;
    if arguments.output == Output::Text {
        terminal::print(&format!("{:<40} {:<16} {:>7} {:>6} {:>8}", "fork", "outcome", "reward", "events", "policy"));
    }
    for fork in forks {
        let rewards = fork.attempt.rewards.iter().filter(|reward| reward.dimension == DEFAULT_DIMENSION);
        let reward: f64 = rewards.map(|reward| reward.value).sum();
        if arguments.output == Output::Json {
            train::print_json(&serde_json::json!({
                "rollout": fork.spec.id,
                "fork_of": fork.spec.fork_of,
                "policy_version": fork.spec.policy_version,
                "outcome": fork.outcome,
                "rewards": fork.attempt.rewards,
                "events": fork.spans.len(),
            }))?;
        } else {
            let (id, kind) = (fork.spec.id.as_str(), fork.outcome.kind.as_str());
            let (events, policy) = (fork.spans.len(), fork.spec.policy_version.to_string());
            terminal::print(&format!("{id:<40} {kind:<16} {reward:>7.3} {events:>6} {policy:>8}"));
        }
    }
    Ok(())
}
