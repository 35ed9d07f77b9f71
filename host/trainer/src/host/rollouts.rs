//! Items and rollouts of a stage.

use std::sync::Arc;

use fulgurite_adapter::{Fit, RowTooLong, Trajectory, Transition, fit};
use fulgurite_core::algorithm::{AlgorithmHostError, ForkRequest, GroupSpec, Item, TrajectoryView, WaitFor};
use fulgurite_core::dataset::Split;
use fulgurite_core::id::RolloutId;
use fulgurite_core::llm::Sampling;
use fulgurite_core::record::{ForkPoint, RolloutMode, RolloutSpec};
use fulgurite_core::reward::Reward;
use fulgurite_core::seed::Generator;
use fulgurite_runner::fork::fork_point;
use fulgurite_runner::{Job, RolloutResult};
use futures::FutureExt;

use super::StageHost;
use super::batch::{Carried, Faults, OpenBatch};
use super::monitor::{Given, totals};
use super::views::{runner_error, transition_view};
use crate::config::AlgorithmGrant;
use crate::trail::GivenAs;

/// Rollouts that one step may enqueue. 65,536: a bound against a plugin in a loop, far above any real batch.
const ROLLOUTS_PER_STEP_MAX: u64 = 65_536;
/// Items of one `next-items`. The same bound.
const ITEMS_MAX: u32 = 65_536;
/// Rollouts that may be carried over at once. The same bound: a plugin that carries everything over and never asks for it
/// must not gather live rollouts for ever.
const CARRIED_MAX: usize = 65_536;

impl StageHost {
    pub(super) fn items(&self, split: Split, count: u32) -> Result<Vec<Item>, AlgorithmHostError> {
        self.check_stop()?;
        if split == Split::Test {
            return Err(AlgorithmHostError::Denied("the test split is drawn by the host only".to_owned()));
        }
        if count > ITEMS_MAX {
            return Err(AlgorithmHostError::InvalidArgument(format!("count {count} is above {ITEMS_MAX}")));
        }
        let items = self.dataset.split(split);
        if items.is_empty() {
            let id = format!("{}.{}", self.stage.dataset, split.as_str());
            return Err(AlgorithmHostError::Unknown { kind: "split", id });
        }
        let reads_reference = self.stage.grants.contains(&AlgorithmGrant::ReadReference);
        let seed = self.seed.child("order").child(&self.stage.dataset).child(split.as_str());
        let mut state = self.state();
        let cursor = state.cursors.entry(split.as_str().to_owned()).or_default();
        let drawn = cursor.draw(items.len(), count as usize, seed);
        let view = |(place, epoch): (usize, u64)| {
            items.get(place).map(|item| Item {
                id: item.id.clone(),
                input: item.texts().input.as_ref().to_owned(),
                reference: reads_reference.then(|| item.texts().reference.as_ref().to_owned()),
                epoch,
            })
        };
        Ok(drawn.into_iter().filter_map(view).collect())
    }

    fn jobs(&self, groups: &[GroupSpec]) -> Result<(Vec<Job>, Vec<u64>), AlgorithmHostError> {
        self.check_stop()?;
        let mut state = self.state();
        let (mut jobs, mut places) = (vec![], vec![]);
        for (group, spec) in groups.iter().enumerate() {
            let split = match spec.mode {
                RolloutMode::Train => Split::Train,
                RolloutMode::Val => Split::Val,
                RolloutMode::Test => return Err(AlgorithmHostError::Denied("mode `test` is the host's".to_owned())),
            };
            // An item of the test split must stay unknown to algorithms, so it is refused as if it were not there.
            let unknown = || AlgorithmHostError::Unknown { kind: "item", id: spec.item_id.clone() };
            let fork = spec.fork_of.as_ref().map(|fork| self.fork(fork, spec)).transpose()?;
            let split = fork.as_ref().map_or(split, |(_, split)| *split);
            let item = self.dataset.item(split, &spec.item_id).ok_or_else(unknown)?;
            for _ in 0..spec.count {
                if state.enqueued >= ROLLOUTS_PER_STEP_MAX {
                    let problem = format!("a step may enqueue {ROLLOUTS_PER_STEP_MAX} rollouts");
                    return Err(AlgorithmHostError::InvalidArgument(problem));
                }
                let index = state.enqueued;
                state.enqueued += 1;
                let id = RolloutId::derived(&self.stage.name, state.step, index)
                    .map_err(|error| AlgorithmHostError::InvalidArgument(error.to_string()))?;
                jobs.push(Job {
                    spec: Arc::new(RolloutSpec {
                        id,
                        stage: self.stage.name.clone(),
                        step: state.step,
                        group: group as u64,
                        dataset: self.stage.dataset.clone(),
                        split,
                        item_id: item.id.clone(),
                        mode: spec.mode,
                        seed: self.seed.child("rollout").child_index(state.step).child_index(index),
                        sampling: merge(&self.rollout.sampling, &spec.sampling),
                        policy_version: self.engine.version(),
                        resources_version: self.resources_version,
                        components: self.runner.plugins().hashes(),
                        item: item.texts().hash,
                        execution: self.runner.execution_hash(),
                        fork_of: fork.as_ref().map(|(point, _)| point.clone()),
                    }),
                    item: Arc::clone(item),
                });
                places.push(group as u64);
            }
        }
        Ok((jobs, places))
    }

    /// Where a group's rollouts leave their ancestor, and the split that its item is from.
    fn fork(&self, fork: &ForkRequest, group: &GroupSpec) -> Result<(ForkPoint, Split), AlgorithmHostError> {
        let unknown = || AlgorithmHostError::Unknown { kind: "rollout", id: fork.rollout.to_string() };
        let ancestor = self.runner.store().rollout(&fork.rollout).map_err(runner_error)?.ok_or_else(unknown)?;
        // Evaluations are the host's: an algorithm does not learn that they exist.
        if ancestor.spec.mode == RolloutMode::Test {
            return Err(unknown());
        }
        if ancestor.spec.item_id != group.item_id || ancestor.spec.dataset != self.stage.dataset {
            let problem = format!("fork-of: rollout `{}` is of another item", fork.rollout);
            return Err(AlgorithmHostError::InvalidArgument(problem));
        }
        // Its items are for looking at, whoever the ancestor was made for.
        if group.mode == RolloutMode::Train && ancestor.spec.split != Split::Train {
            let (rollout, split) = (&fork.rollout, ancestor.spec.split.as_str());
            let problem = format!("rollout `{rollout}` is of the split `{split}`, which is not trained on");
            return Err(AlgorithmHostError::Denied(problem));
        }
        let point = fork_point(&**self.runner.store(), &fork.rollout, None, fork.event)
            .map_err(|problem| AlgorithmHostError::InvalidArgument(format!("fork-of: {problem}")))?;
        Ok((point, ancestor.spec.split))
    }

    /// Turns finished rollouts into what a plugin sees and keeps their transitions for training.
    ///
    /// # Errors
    /// When a rollout has a row that is too long, and the config says that the run stops then.
    fn view(
        &self,
        batch: u64,
        open: &mut OpenBatch,
        ended: Vec<(usize, RolloutResult)>,
    ) -> Result<Vec<TrajectoryView>, AlgorithmHostError> {
        let accept = &self.rollout.reward_accept;
        let attached = |result: &RolloutResult| self.attach.attach(&result.spans, &result.attempt.rewards, accept);
        let mut rewards: Vec<Vec<Reward>> = ended.iter().map(|(_, result)| attached(result)).collect();
        if self.experiment.shuffle_rewards {
            self.shuffle(&ended, &mut rewards);
        }
        let mut state = self.state();
        let mut views = vec![];
        for ((place, result), rewards) in ended.into_iter().zip(rewards) {
            let graded = result.is_graded();
            let mut transitions = Trajectory::new(&result.spans, &rewards, &result.spec.sampling).transitions;
            let response_tokens = transitions.iter().map(Transition::sampled_tokens).sum();
            if open.counts(place) {
                state.totals.rollouts += 1;
                state.totals.sampled_tokens += response_tokens as u64;
                if !graded {
                    state.totals.failed += 1;
                    let counted = open.faults.entry(result.outcome.kind).or_default();
                    *counted = (counted.0 + 1, result.outcome.detail.clone());
                }
            }
            let is_trained = result.spec.mode == RolloutMode::Train;
            let too_long = is_trained && graded && self.is_too_long(&mut transitions)?;
            let given = match (graded, too_long) {
                _ if !is_trained => GivenAs::Estimate,
                (false, _) => GivenAs::Fault,
                (true, true) => GivenAs::TooLong,
                (true, false) if self.experiment.shuffle_rewards => GivenAs::Shuffled,
                (true, false) => GivenAs::Graded,
            };
            state.trail.given(&result.spec.id, given);
            let group = open.group(place);
            if is_trained {
                state.monitor.given(Given {
                    group: (batch, group),
                    item: (result.spec.step, result.spec.item_id.clone()),
                    graded,
                    too_long,
                    cut_tokens: transitions.iter().map(|transition| transition.cut_tokens).sum(),
                    response_tokens,
                    totals: totals(&rewards),
                });
            }
            let sequence = result.spec.id.to_string();
            let mut seen = vec![];
            for transition in transitions {
                let transition = Arc::new(transition);
                seen.push(transition_view(&transition));
                // What is run to choose or to estimate is never trained on.
                if !is_trained {
                    state.estimates.insert(transition.id.clone());
                } else if graded && !too_long {
                    state.transitions.insert(Arc::clone(&transition), sequence.clone());
                }
            }
            views.push(TrajectoryView {
                rollout: result.spec.id.clone(),
                group,
                item_id: result.spec.item_id.clone(),
                outcome: result.outcome.kind,
                graded: graded && !too_long,
                rewards,
                transitions: seen,
            });
        }
        Ok(views)
    }

    /// Makes the calls of a rollout fit the longest row that is trained on, and says whether the rollout is left out.
    fn is_too_long(&self, transitions: &mut [Transition]) -> Result<bool, AlgorithmHostError> {
        let Some(tokens_max) = self.rollout.row_tokens_max else { return Ok(false) };
        match (fit(transitions, tokens_max, self.rollout.row_too_long), self.rollout.row_too_long) {
            (Fit::Dropped(row), RowTooLong::Stop) => Err(AlgorithmHostError::Failed(format!(
                "the row that ends with transition `{}` has {} tokens and `rollout.row_tokens_max` is {tokens_max}; raise it, or set \
                 `rollout.row_too_long` to `drop` or `truncate`",
                row.transition, row.tokens
            ))),
            (Fit::Dropped(_), _) => Ok(true),
            (Fit::Whole | Fit::Truncated { .. }, _) => Ok(false),
        }
    }

    fn shuffle(&self, ended: &[(usize, RolloutResult)], rewards: &mut [Vec<Reward>]) {
        let graded: Vec<usize> =
            ended.iter().enumerate().filter(|(_, (_, result))| result.is_graded()).map(|(place, _)| place).collect();
        let mut order = graded.clone();
        Generator::new(self.seed.child("shuffle-rewards").child_index(self.state().step)).shuffle(&mut order);
        let original = rewards.to_vec();
        for (to, from) in graded.into_iter().zip(order) {
            if let (Some(target), Some(source)) = (rewards.get_mut(to), original.get(from)) {
                target.clone_from(source);
            }
        }
    }

    /// Files a batch under the next number.
    async fn open(&self, batch: OpenBatch) -> u64 {
        let number = {
            let mut state = self.state();
            state.batches += 1;
            state.batches
        };
        self.batches.lock().await.insert(number, batch);
        number
    }

    pub(super) async fn enqueue_groups(&self, groups: Vec<GroupSpec>) -> Result<u64, AlgorithmHostError> {
        let (jobs, places) = self.jobs(&groups)?;
        let rollouts = jobs.iter().map(|job| job.spec.id.clone()).zip(places).collect();
        let batch = self.runner.submit(jobs, self.backend().await?).await.map_err(runner_error)?;
        let step = self.state().step;
        Ok(self.open(OpenBatch::new(step, batch, rollouts)).await)
    }

    pub(super) async fn await_rollouts(
        &self,
        batch: u64,
        wait: WaitFor,
        deadline_ms: Option<u64>,
    ) -> Result<Vec<TrajectoryView>, AlgorithmHostError> {
        let mut batches = self.batches.lock().await;
        let open = batches.get_mut(&batch).ok_or_else(|| unknown_batch(batch))?;
        let outstanding = open.outstanding();
        let wanted = match wait {
            WaitFor::All => outstanding,
            WaitFor::Count(count) => (count as usize).min(outstanding),
        };
        let mut stop = self.stop.clone();
        let until = deadline_ms.map(|ms| tokio::time::Instant::now() + std::time::Duration::from_millis(ms));
        let mut ended = vec![];
        while ended.len() < wanted {
            let passed = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                next = open.next() => match next {
                    Some(next) => ended.push(next.map_err(runner_error)?),
                    None => break,
                },
                _ = stop.wait_for(|stop| *stop) => return Err(AlgorithmHostError::Stopping),
                () = passed => break,
            }
        }
        // Whatever else has ended by now.
        while let Some(Some(next)) = open.next().now_or_never() {
            ended.push(next.map_err(runner_error)?);
        }
        if wanted < outstanding || ended.len() < wanted {
            self.state().depends_on_arrival = true;
        }
        ended.sort_by_key(|(place, _)| *place);
        let views = self.view(batch, open, ended)?;
        let faults = batches.values().map(|batch| (batch.size(), &batch.faults));
        check_faults(faults, self.rollout.fault_share_max)?;
        Ok(views)
    }

    pub(super) async fn carry_groups(&self, batch: u64, groups: Vec<u64>) -> Result<(), AlgorithmHostError> {
        let mut batches = self.batches.lock().await;
        let earlier: usize = self.carried.lock().await.iter().map(Carried::rollouts).sum();
        let open = batches.get_mut(&batch).ok_or_else(|| unknown_batch(batch))?;
        let rollouts = open.carry(&groups).map_err(|group| {
            AlgorithmHostError::InvalidArgument(format!("groups: batch `{batch}` has no group {group}"))
        })?;
        if earlier + batches.values().map(OpenBatch::carried).sum::<usize>() > CARRIED_MAX {
            let problem = format!("groups: at most {CARRIED_MAX} rollouts can be carried over at once");
            return Err(AlgorithmHostError::InvalidArgument(problem));
        }
        // They belong to the step that is given them as a group.
        let is_carried = |sequence: &str| RolloutId::new(sequence).is_ok_and(|id| rollouts.contains(&id));
        let mut state = self.state();
        state.transitions.retain_sequences(|sequence| !is_carried(sequence));
        state.monitor.carried(batch, &groups);
        Ok(())
    }

    /// Opens what earlier steps have carried over.
    pub(super) async fn carried_batches(&self) -> Result<Vec<u64>, AlgorithmHostError> {
        self.check_stop()?;
        let mut carried = std::mem::take(&mut *self.carried.lock().await);
        carried.sort_by_key(Carried::step);
        // Who draws the rest of a straggler, and so what is learned from it, depends on how long it takes.
        self.state().depends_on_arrival |= !carried.iter().all(Carried::has_been_given);
        let mut numbers = vec![];
        for batch in carried {
            let open = match batch {
                Carried::Running(mut open) => {
                    open.reopen(|id| self.finished(id))?;
                    *open
                }
                Carried::Recorded(record) => {
                    let jobs = record.rollouts.iter().map(|rollout| self.job_again(&rollout.id));
                    let jobs = jobs.collect::<Result<Vec<Job>, _>>()?;
                    let groups = jobs.iter().map(|job| job.spec.group).collect();
                    let running = self.runner.submit(jobs, self.backend().await?).await.map_err(runner_error)?;
                    OpenBatch::resumed(record, running, groups)
                }
            };
            numbers.push(self.open(open).await);
        }
        Ok(numbers)
    }

    /// A rollout that has ended, from the store.
    fn finished(&self, id: &RolloutId) -> Result<RolloutResult, AlgorithmHostError> {
        let found = self.runner.finished(id).map_err(runner_error)?;
        found
            .ok_or_else(|| AlgorithmHostError::Failed(format!("rollout `{id}` has ended, and the store does not know")))
    }

    /// A rollout of an earlier process, as it was enqueued.
    fn job_again(&self, id: &RolloutId) -> Result<Job, AlgorithmHostError> {
        let unknown = || AlgorithmHostError::Unknown { kind: "carried rollout", id: id.to_string() };
        let spec = self.runner.store().rollout(id).map_err(runner_error)?.ok_or_else(unknown)?.spec;
        let changed = |what: &str| {
            let problem =
                format!("{what} is not what rollout `{id}` was begun with; put it back, or start another run");
            AlgorithmHostError::Failed(problem)
        };
        if spec.components != self.runner.plugins().hashes() {
            return Err(changed("a component"));
        }
        if spec.execution != self.runner.execution_hash() {
            return Err(changed("a setting of the run"));
        }
        let item = self.dataset.item(spec.split, &spec.item_id).filter(|item| item.texts().hash == spec.item);
        let item = item.ok_or_else(|| changed(&format!("item `{}`", spec.item_id)))?;
        Ok(Job { spec, item: Arc::clone(item) })
    }
}

/// Refuses to go on when more than this share of the rollouts of a step's batches, of which each has a size and faults, ended
/// with a fault. All that the step has asked for so far counts together: one that asks in small portions is not stopped by one
/// of them.
fn check_faults<'a>(
    batches: impl Iterator<Item = (u64, &'a Faults)>,
    share_max: f64,
) -> Result<(), AlgorithmHostError> {
    let (mut total, mut faults) = (0, Faults::new());
    for (size, of_batch) in batches {
        total += size;
        for (kind, (count, detail)) in of_batch {
            let known = faults.entry(*kind).or_default();
            *known = (known.0 + count, detail.clone());
        }
    }
    let excluded: u64 = faults.values().map(|(count, _)| count).sum();
    if excluded as f64 <= share_max * total as f64 {
        return Ok(());
    }
    let most = faults.iter().max_by_key(|(_, (count, _))| *count);
    let most_frequent = most.map_or_else(String::new, |(kind, (_, detail))| format!("{}: {detail}", kind.as_str()));
    Err(AlgorithmHostError::TooManyFaults { excluded, total, most_frequent })
}

fn unknown_batch(batch: u64) -> AlgorithmHostError {
    AlgorithmHostError::Unknown { kind: "batch of this step", id: batch.to_string() }
}

/// What a plugin asks for, with what the run's config says where the plugin leaves the default. Temperature and seed are the
/// plugin's: its loss is about the one, and its groups are not to draw the same with the other.
fn merge(config: &Sampling, asked: &Sampling) -> Sampling {
    Sampling { temperature: asked.temperature, seed: asked.seed, ..asked.clone().or(config) }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::outcome::OutcomeKind;

    use super::*;

    #[test]
    fn faults_are_a_share_of_the_step_and_not_of_one_batch() {
        let faults = |kind, count| Faults::from([(kind, (count, "why".to_owned()))]);
        let (roots, forks) = (faults(OutcomeKind::Trap, 1), faults(OutcomeKind::GraderFault, 2));
        let check = |batches: &[(u64, &Faults)]| check_faults(batches.iter().copied(), 0.2);
        // Half of the forks have a fault, and 3 of all 20.
        check(&[(16, &roots), (4, &forks)]).unwrap();
        check(&[]).unwrap();
        let told = check(&[(10, &roots), (4, &forks)]).unwrap_err().to_string();
        assert!(
            told.starts_with("3 of 14 rollouts failed") && told.ends_with("most often: grader-fault: why"),
            "{told}"
        );
        assert!(check(&[(4, &forks)]).is_err(), "a step with that batch alone");
    }
}
