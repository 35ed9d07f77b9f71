//! Held-out evaluation. The host draws from the `test` split itself; algorithms never see it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::dataset::{DatasetItem, Split};
use fulgurite_core::id::{PolicyVersion, RolloutId};
use fulgurite_core::llm::{LlmBackend, Sampling};
use fulgurite_core::outcome::Blame;
use fulgurite_core::record::{RolloutMode, RolloutSpec};
use fulgurite_core::reward::RewardSource;
use fulgurite_core::seed::Seed;
use fulgurite_runner::{Batch, Job, RolloutResult, Runner};
use serde::{Deserialize, Serialize};

use crate::config::EvaluationConfig;
use crate::error::TrainError;
use crate::progress::{ProgressEvent, ProgressSink};

/// What one evaluation found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// At temperature 1.
    pub sampled: Score,
    /// Greedy.
    pub greedy: Score,
}

/// A mean over scheduled rollouts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Sum of rewards divided by all scheduled rollouts: a fault counts as nothing gained, never as left out.
    pub mean: f64,
    /// Scheduled rollouts.
    pub rollouts: u64,
    /// Rollouts by outcome kind.
    pub outcomes: BTreeMap<String, u64>,
    /// Share blamed on the policy.
    pub policy_fault_share: f64,
    /// Share blamed on agent code.
    pub agent_fault_share: f64,
    /// Share blamed on infrastructure.
    pub infrastructure_fault_share: f64,
}

/// What all evaluations of a run share.
pub(crate) struct Evaluator<'a> {
    pub(crate) runner: &'a Runner,
    pub(crate) config: &'a EvaluationConfig,
    pub(crate) items: &'a [Arc<DatasetItem>],
    pub(crate) accept: &'a [RewardSource],
    pub(crate) resources_version: u64,
    pub(crate) seed: Seed,
    pub(crate) progress: &'a dyn ProgressSink,
}

impl Evaluator<'_> {
    /// Evaluates one model. `label` names it in rollout ids; the items and seeds are the same for every label, so that
    /// differences between models are not differences between draws.
    ///
    /// # Errors
    /// When the store fails, or more than the allowed share of rollouts failed by infrastructure.
    pub(crate) async fn evaluate(
        &self,
        label: &str,
        sampling: &Sampling,
        backend: &Arc<dyn LlmBackend>,
        version: PolicyVersion,
    ) -> Result<Evaluation, TrainError> {
        let sampled = Sampling { temperature: 1.0, ..sampling.clone() };
        let greedy = Sampling { temperature: 0.0, ..sampling.clone() };
        Ok(Evaluation {
            sampled: self.score(label, "sampled", self.config.sampled_rollouts, sampled, backend, version).await?,
            greedy: self.score(label, "greedy", self.config.greedy_rollouts, greedy, backend, version).await?,
        })
    }

    async fn score(
        &self,
        label: &str,
        kind: &'static str,
        count: usize,
        sampling: Sampling,
        backend: &Arc<dyn LlmBackend>,
        version: PolicyVersion,
    ) -> Result<Score, TrainError> {
        let stage = format!("eval-{label}-{kind}");
        let mut jobs = Vec::with_capacity(count);
        for (index, item) in self.items.iter().cycle().take(count).enumerate() {
            let index = index as u64;
            let spec = RolloutSpec {
                id: RolloutId::derived(&stage, 0, index)?,
                stage: stage.clone(),
                step: 0,
                group: index,
                dataset: self.config.dataset.clone(),
                split: Split::Test,
                item_id: item.id.clone(),
                mode: RolloutMode::Test,
                seed: self.seed.child(kind).child_index(index),
                sampling: sampling.clone(),
                policy_version: version,
                resources_version: self.resources_version,
                components: self.runner.plugins().hashes(),
                item: item.texts().hash,
                execution: self.runner.execution_hash(),
                fork_of: None,
            };
            jobs.push(Job { spec: spec.into(), item: Arc::clone(item) });
        }
        self.progress.event(ProgressEvent::EvaluationStarted { label: label.to_owned(), kind, rollouts: count as u64 });
        let batch = self.runner.submit(jobs, Arc::clone(backend)).await?;
        let results = self.collect(batch).await?;
        let score = self.summarise(&results);
        if score.infrastructure_fault_share > self.config.infrastructure_share_max {
            return Err(TrainError::EvaluationVoid {
                label: label.to_owned(),
                share: score.infrastructure_fault_share,
                share_max: self.config.infrastructure_share_max,
            });
        }
        self.progress.event(ProgressEvent::EvaluationEnded { label: label.to_owned(), kind, mean: score.mean });
        Ok(score)
    }

    async fn collect(&self, mut batch: Batch) -> Result<Vec<RolloutResult>, TrainError> {
        let mut results = vec![];
        while let Some(next) = batch.next().await {
            results.push(next?);
            self.progress.event(ProgressEvent::RolloutEnded);
        }
        results.sort_by_key(|(place, _)| *place);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    }

    fn summarise(&self, results: &[RolloutResult]) -> Score {
        let total = results.len().max(1) as f64;
        let blamed = |blame| results.iter().filter(|r| r.outcome.kind.blame() == Some(blame)).count() as f64 / total;
        let mut outcomes = BTreeMap::new();
        for result in results {
            *outcomes.entry(result.outcome.kind.as_str().to_owned()).or_insert(0) += 1;
        }
        let rewards = results.iter().filter(|result| result.is_graded());
        let sum: f64 = rewards
            .filter_map(|r| fulgurite_adapter::total_reward(&r.attempt.rewards, &self.config.dimension, self.accept))
            .sum();
        Score {
            mean: sum / total,
            rollouts: results.len() as u64,
            outcomes,
            policy_fault_share: blamed(Blame::Policy),
            agent_fault_share: blamed(Blame::AgentCode),
            infrastructure_fault_share: blamed(Blame::Infrastructure),
        }
    }
}
