//! `fulgurite:algorithm/policy`: the training verbs.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::sync::Arc;

use fulgurite_core::algorithm::{BatchEntry, ModelReference, Scope, TransitionForward, TransitionGradient, Weights};
use fulgurite_core::id::TransitionId;
use fulgurite_core::training::{
    Aggregation, Correction, CorrectionRule, ForwardBackwardReport, KlEstimator, KlTerm, LossSpec, OptimiserReport,
    OptimiserStep, PolicyLoss, RatioLevel, SequenceScope, Stream,
};
use wasmtime::component::Resource;

use crate::algorithm_host::{AlgorithmState, Answer, SamplingDraft, TransitionHandle, messages_from_wit, unsupported};
use crate::bindings::algorithm::fulgurite::algorithm::{common, policy, trajectories};

/// A loss in the making.
pub struct LossDraft(LossSpec);
/// An optimiser step in the making.
pub struct OptimiserDraft(OptimiserStep);

fn model_from_wit(model: common::Model) -> ModelReference {
    match model {
        common::Model::Policy => ModelReference::Policy,
        common::Model::Snapshot(name) => ModelReference::Snapshot(name),
        common::Model::Named(name) => ModelReference::Named(name),
    }
}

fn entry_from_wit(entry: policy::Entry) -> BatchEntry {
    BatchEntry {
        transition: TransitionId(entry.transition_id),
        stream: match entry.stream {
            policy::Stream::Rl => Stream::Rl,
            policy::Stream::Ce => Stream::Ce,
            policy::Stream::RefKl => Stream::RefKl,
        },
        scope: match entry.scope {
            policy::Scope::Sampled => Scope::Sampled,
            policy::Scope::Observed => Scope::Observed,
        },
        weights: match entry.weights {
            policy::Weights::Scalar(weight) => Weights::Scalar(weight),
            policy::Weights::PerToken(weights) => Weights::PerToken(weights),
        },
        group: entry.group,
    }
}

const fn level_from_wit(level: policy::RatioLevel) -> RatioLevel {
    match level {
        policy::RatioLevel::Token => RatioLevel::Token,
        policy::RatioLevel::SequenceMean => RatioLevel::SequenceMean,
        policy::RatioLevel::SequenceSum => RatioLevel::SequenceSum,
    }
}

const fn aggregation_from_wit(aggregation: policy::Aggregation) -> Aggregation {
    match aggregation {
        policy::Aggregation::TokenMean => Aggregation::TokenMean,
        policy::Aggregation::SequenceMeanTokenMean => Aggregation::SequenceMeanTokenMean,
        policy::Aggregation::SequenceMeanTokenSum => Aggregation::SequenceMeanTokenSum,
        policy::Aggregation::Constant(length) => Aggregation::Constant { length },
        policy::Aggregation::SumConstant(length) => Aggregation::SumConstant { length },
        policy::Aggregation::PromptMean => Aggregation::PromptMean,
    }
}

fn training_numbers(report: &ForwardBackwardReport) -> policy::Numbers {
    let numbers = [
        ("loss", report.loss),
        ("trained-tokens", report.trained_tokens as f64),
        ("total-tokens", report.total_tokens as f64),
        ("entropy", report.entropy),
        ("clip-fraction", report.clip_fraction),
        ("approximate-kl", report.approximate_kl),
        ("reference-kl", report.reference_kl),
        ("ratio-mean", report.ratio_mean),
        ("ratio-max", report.ratio_max),
        ("mismatch-mean", report.mismatch_mean),
        ("mismatch-max", report.mismatch_max),
        ("mismatch-k3", report.mismatch_k3),
        ("effective-sample-size", report.effective_sample_size),
        ("cross-entropy", report.cross_entropy),
        ("correction-mean", report.correction_mean),
        ("correction-max", report.correction_max),
        ("masked-share", report.masked_share),
        ("advantage-mean", report.advantage_mean),
        ("advantage-deviation", report.advantage_deviation),
    ];
    numbers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn step_numbers(report: &OptimiserReport) -> policy::Numbers {
    let numbers = [
        ("gradient-norm", report.gradient_norm),
        ("skipped", f64::from(u8::from(report.skipped))),
        ("policy-version", report.policy_version.0 as f64),
    ];
    numbers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

impl policy::HostLoss for AlgorithmState {
    fn new(&mut self) -> wasmtime::Result<Resource<LossDraft>> {
        Ok(self.table.push(LossDraft(LossSpec::default()))?)
    }

    fn set_reinforce(&mut self, loss: Resource<LossDraft>) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.policy_loss = PolicyLoss::Reinforce;
        Ok(())
    }

    fn set_ppo(
        &mut self,
        loss: Resource<LossDraft>,
        clip_low: f32,
        clip_high: f32,
        dual_clip: Option<f32>,
    ) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.policy_loss = PolicyLoss::Ppo { clip_low, clip_high, dual_clip };
        Ok(())
    }

    fn set_importance_sampling(&mut self, loss: Resource<LossDraft>) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.policy_loss = PolicyLoss::ImportanceSampling;
        Ok(())
    }

    fn set_cispo(&mut self, loss: Resource<LossDraft>, clip_low: Option<f32>, clip_high: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.policy_loss = PolicyLoss::Cispo { clip_low, clip_high };
        Ok(())
    }

    fn set_sapo(
        &mut self,
        loss: Resource<LossDraft>,
        temperature_positive: f32,
        temperature_negative: f32,
    ) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.policy_loss = PolicyLoss::Sapo { temperature_positive, temperature_negative };
        Ok(())
    }

    fn set_ratio_max(&mut self, loss: Resource<LossDraft>, delta: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.ratio_max = Some(delta);
        Ok(())
    }

    fn set_ratio_level(&mut self, loss: Resource<LossDraft>, level: policy::RatioLevel) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.ratio_level = level_from_wit(level);
        Ok(())
    }

    fn set_sequence_scope(&mut self, loss: Resource<LossDraft>, scope: policy::SequenceScope) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.sequence_scope = match scope {
            policy::SequenceScope::Rollout => SequenceScope::Rollout,
            policy::SequenceScope::Call => SequenceScope::Call,
        };
        Ok(())
    }

    fn set_aggregation(&mut self, loss: Resource<LossDraft>, aggregation: policy::Aggregation) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.aggregation = aggregation_from_wit(aggregation);
        Ok(())
    }

    fn set_kl(
        &mut self,
        loss: Resource<LossDraft>,
        estimator: policy::KlEstimator,
        coefficient: f32,
    ) -> wasmtime::Result<()> {
        let estimator = match estimator {
            policy::KlEstimator::K1 => KlEstimator::K1,
            policy::KlEstimator::K2 => KlEstimator::K2,
            policy::KlEstimator::K3 => KlEstimator::K3,
            policy::KlEstimator::UnbiasedK3 => KlEstimator::UnbiasedK3,
        };
        self.table.get_mut(&loss)?.0.kl = Some(KlTerm { estimator, coefficient });
        Ok(())
    }

    fn set_entropy_coefficient(&mut self, loss: Resource<LossDraft>, value: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.entropy_coefficient = value;
        Ok(())
    }

    fn set_correction(&mut self, loss: Resource<LossDraft>, correction: policy::Correction) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.correction = Some(Correction {
            level: level_from_wit(correction.level),
            rule: match correction.rule {
                policy::CorrectionRule::Truncate(max) => CorrectionRule::Truncate { max },
                policy::CorrectionRule::Mask((min, max)) => CorrectionRule::Mask { min, max },
            },
            batch_normalise: correction.batch_normalise,
        });
        Ok(())
    }

    fn set_off_policy_mask(&mut self, loss: Resource<LossDraft>, delta: f32) -> wasmtime::Result<()> {
        self.table.get_mut(&loss)?.0.off_policy_mask = Some(delta);
        Ok(())
    }

    fn drop(&mut self, loss: Resource<LossDraft>) -> wasmtime::Result<()> {
        self.table.delete(loss)?;
        Ok(())
    }
}

impl policy::HostOptimiserStep for AlgorithmState {
    fn new(&mut self, learning_rate: f64) -> wasmtime::Result<Resource<OptimiserDraft>> {
        let step = OptimiserStep { learning_rate, weight_decay: 0.0, gradient_norm_max: Some(1.0) };
        Ok(self.table.push(OptimiserDraft(step))?)
    }

    fn set_weight_decay(&mut self, step: Resource<OptimiserDraft>, value: f64) -> wasmtime::Result<()> {
        self.table.get_mut(&step)?.0.weight_decay = value;
        Ok(())
    }

    fn set_gradient_norm_max(&mut self, step: Resource<OptimiserDraft>, value: Option<f64>) -> wasmtime::Result<()> {
        self.table.get_mut(&step)?.0.gradient_norm_max = value;
        Ok(())
    }

    fn drop(&mut self, step: Resource<OptimiserDraft>) -> wasmtime::Result<()> {
        self.table.delete(step)?;
        Ok(())
    }
}

impl policy::Host for AlgorithmState {
    async fn anchor(&mut self, model: common::Model, ids: Vec<String>) -> Answer<()> {
        let (model, ids) = (model_from_wit(model), ids.into_iter().map(TransitionId).collect());
        Ok(self.verb(|host| async move { host.anchor(model, ids).await }).await)
    }

    async fn forward_backward(
        &mut self,
        model: common::Model,
        batch: Vec<policy::Entry>,
        loss: Resource<LossDraft>,
    ) -> Answer<policy::Numbers> {
        let (model, loss) = (model_from_wit(model), self.table.get(&loss)?.0.clone());
        let batch = batch.into_iter().map(entry_from_wit).collect();
        let report = self.verb(|host| async move { host.forward_backward(model, batch, loss).await }).await;
        Ok(report.map(|report| training_numbers(&report)))
    }

    async fn forward(&mut self, model: common::Model, ids: Vec<String>) -> Answer<Vec<policy::ForwardResult>> {
        let (model, ids) = (model_from_wit(model), ids.into_iter().map(TransitionId).collect());
        let results = self.verb(|host| async move { host.forward(model, ids).await }).await;
        let to_wit = |result: TransitionForward| policy::ForwardResult {
            transition_id: result.transition.0,
            log_probs: result.log_probs,
            entropies: result.entropies,
            values: result.values,
        };
        Ok(results.map(|results| results.into_iter().map(to_wit).collect()))
    }

    async fn backward(&mut self, model: common::Model, gradients: Vec<policy::Gradient>) -> Answer<()> {
        let model = model_from_wit(model);
        let from_wit = |gradient: policy::Gradient| TransitionGradient {
            transition: TransitionId(gradient.transition_id),
            d_log_probs: gradient.d_log_probs,
            d_entropies: gradient.d_entropies,
            d_values: gradient.d_values,
        };
        let gradients = gradients.into_iter().map(from_wit).collect();
        Ok(self.verb(|host| async move { host.backward(model, gradients).await }).await)
    }

    async fn optim_step(&mut self, model: common::Model, step: Resource<OptimiserDraft>) -> Answer<policy::Numbers> {
        let (model, step) = (model_from_wit(model), self.table.get(&step)?.0.clone());
        let report = self.verb(|host| async move { host.optimiser_step(model, step).await }).await;
        Ok(report.map(|report| step_numbers(&report)))
    }

    async fn snapshot(&mut self, model: common::Model) -> Answer<String> {
        let model = model_from_wit(model);
        Ok(self.verb(|host| async move { host.snapshot(model).await }).await)
    }

    async fn freeze_reference(&mut self) -> Answer<()> {
        Ok(self.verb(|host| async move { host.freeze_reference().await }).await)
    }

    async fn sample(
        &mut self,
        model: common::Model,
        messages: Vec<trajectories::Message>,
        sampling: Resource<SamplingDraft>,
    ) -> Answer<Resource<TransitionHandle>> {
        let model = model_from_wit(model);
        let arguments =
            self.table.get(&sampling)?.checked().and_then(|sampling| Ok((messages_from_wit(messages)?, sampling)));
        let (messages, sampling) = match arguments {
            Ok(arguments) => arguments,
            Err(error) => return Ok(Err(error)),
        };
        match self.verb(|host| async move { host.sample(model, messages, sampling).await }).await {
            Ok(view) => Ok(Ok(self.push_transition(Arc::new(view))?)),
            Err(error) => Ok(Err(error)),
        }
    }

    async fn save(&mut self, _model: common::Model, _name: String) -> Answer<()> {
        Ok(Err(unsupported("policy.save: checkpoints are the host's")))
    }

    async fn load(&mut self, _model: common::Model, _name: String) -> Answer<()> {
        Ok(Err(unsupported("policy.load: checkpoints are the host's")))
    }
}
