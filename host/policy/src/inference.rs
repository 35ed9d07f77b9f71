//! What a model says about given ids, without sessions, versions or an optimiser: to compare it with other programs, and
//! to look at weights that are not trained.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::KeptTokens;
use fulgurite_core::training::{Aggregation, LossSpec, Stream, TrainingRow};

use crate::block_pool::BlockPool;
use crate::compute::{Bounds, Compute, PackedModels, Sources};
use crate::config::PolicyConfig;
use crate::decoder::{Row, Scratch};
use crate::device_decoder::DeviceDecoder;
use crate::error::PolicyError;
use crate::kernel;
use crate::kv_cache::KvCache;
use crate::loss::BatchLoss;
use crate::model::{DeviceModels, Model};
use crate::optimiser::gradient_norm;
use crate::parameters::Parameters;
use crate::peft;
use crate::predictor::Predictor;
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;
use crate::train::{BatchRunner, Objective, check_rows};
use crate::weights::{Base, ModelWeights};

/// Cross-entropy of given tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossEntropy {
    /// Mean of the negated log-probs (nats).
    pub mean: f64,
    /// Of each given token at temperature 1 (nats).
    pub log_probs: Vec<f32>,
    /// Euclidean norm, over all weights together, of the mean's gradient.
    pub gradient_norm: f64,
}

/// The likeliest continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct Greedy {
    /// Ids; an end token, if one came, is the last.
    pub tokens: Vec<u32>,
    /// Of each token at temperature 1 (nats).
    pub log_probs: Vec<f32>,
}

/// Weights ready for questions about given ids. Every answer is a function of weights, device and ids alone.
#[derive(Debug)]
pub struct Inference {
    weights: ModelWeights,
    models: Ready,
    rotary: Arc<RotaryTable>,
    runner: BatchRunner,
}

/// Weights as what computes wants them.
#[derive(Debug)]
enum Ready {
    Kernels(Box<PackedModels>),
    Device(Arc<DeviceModels>, Arc<Model>),
}

impl Ready {
    fn new(weights: &ModelWeights, rotary: &Arc<RotaryTable>, runner: &BatchRunner) -> Self {
        match runner.device() {
            None => Self::Kernels(Box::new(PackedModels::new(weights, None, false, rotary, 1))),
            Some(models) => Self::Device(models.clone(), models.get(weights)),
        }
    }
}

impl Inference {
    /// From a model's tensors; see [`PolicyEngine::from_tensors`](crate::PolicyEngine::from_tensors). Of `config` only the
    /// device and the limits count.
    ///
    /// # Errors
    /// When the shape, the tensors or a limit do not fit, or a thread cannot be started.
    pub fn from_tensors(
        config: &PolicyConfig,
        shape: &ModelShape,
        found: &BTreeMap<String, Vec<usize>>,
        read: impl FnMut(&str) -> Result<Vec<f32>, PolicyError>,
    ) -> Result<Self, PolicyError> {
        config.shape(shape.vocabulary)?;
        Self::new(config, Arc::new(Parameters::from_tensors(shape, found, read)?))
    }

    /// On checked weights.
    pub(crate) fn new(config: &PolicyConfig, parameters: Arc<Parameters>) -> Result<Self, PolicyError> {
        let rotary = Arc::new(RotaryTable::new(&parameters.shape));
        let weights = ModelWeights::Full(parameters);
        let runner = BatchRunner::new(config, rotary.clone())?;
        let models = Ready::new(&weights, &rotary, &runner);
        Ok(Self { weights, models, rotary, runner })
    }

    /// The same model under an adapter in PEFT's layout. Gradients are then the adapter's.
    ///
    /// # Errors
    /// When the folder holds no plain LoRA adapter for this model.
    pub fn with_adapter(self, dir: &Path) -> Result<Self, PolicyError> {
        let layout = Arc::new(peft::read_layout(dir)?);
        let adapter = Some(Arc::new(peft::load(dir, &layout, self.shape())?));
        let base = Arc::new(Base::new(self.weights.merged(), self.rotary.clone()));
        let weights = ModelWeights::Adapted { base, layout, adapter };
        let models = Ready::new(&weights, &self.rotary, &self.runner);
        Ok(Self { weights, models, ..self })
    }

    /// Sizes of the model.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        self.weights.shape()
    }

    /// Logits after each token from `from` on, as training's forward pass has them.
    ///
    /// # Shapes
    /// - `ids`: 1 to `context_tokens_max`
    /// - output: `[ids - from, vocabulary]`, rows one after the other; `from = ids.len() - 1` gives the last token's only
    ///
    /// # Errors
    /// When an id is not of the vocabulary, there are too many, or `from` is not below their number.
    pub fn logits(&self, ids: &[u32], from: usize) -> Result<Vec<f32>, PolicyError> {
        self.check(ids, from, 0)?;
        let sources: Vec<(usize, usize)> = (from..ids.len()).map(|at| (0, at)).collect();
        let bounds = Bounds { recompute: false, logits_tokens_max: sources.len() };
        let mut compute = match &self.models {
            Ready::Kernels(packed) => Compute::kernels(packed, Box::default(), bounds),
            Ready::Device(_, model) => Compute::device(model, None, false, bounds),
        };
        let mut all = Vec::new();
        let sources = Sources { rows: &[ids], at: &sources, length: ids.len() };
        compute.logits(sources, &self.rotary, &mut |logits| all.extend_from_slice(logits))?;
        Ok(all)
    }

    /// Cross-entropy of the tokens from `from` on, each given those before it.
    ///
    /// # Errors
    /// As of [`logits`](Self::logits), and when `from` is 0: nothing stands before the first token.
    pub fn cross_entropy(&self, ids: &[u32], from: usize) -> Result<CrossEntropy, PolicyError> {
        self.check(ids, from, 1)?;
        let len = ids.len();
        let row = TrainingRow {
            sequence: 0,
            ids: ids.to_vec(),
            mask: (0..len).map(|at| at >= from).collect(),
            weights: vec![1.0; len],
            behaviour_log_probs: vec![0.0; len],
            old_log_probs: vec![],
            calls: vec![],
            group: None,
            stream: Stream::Ce,
            temperature: 1.0,
            policy_version: PolicyVersion::default(),
            kept: KeptTokens::default(),
        };
        let rows = vec![row];
        check_rows(self.shape(), &rows)?;
        let spec = LossSpec { aggregation: Aggregation::TokenMean, ..LossSpec::default() };
        let log_probs = self.runner.run(self.weights.clone(), rows.clone(), Objective::Forward)?.log_probs;
        let loss = Box::new(BatchLoss::new(spec, &rows, || Ok(log_probs.clone()))?);
        let objective = Objective::Loss { loss, reference: None };
        let outcome = self.runner.run(self.weights.clone(), rows, objective)?;
        Ok(CrossEntropy {
            mean: outcome.report.cross_entropy,
            log_probs: log_probs.iter().flat_map(|row| row.log_probs.iter().skip(from).copied()).collect(),
            gradient_norm: outcome
                .gradient
                .as_ref()
                .map_or(0.0, |gradient| gradient_norm(gradient, self.runner.threads())),
        })
    }

    /// The likeliest continuation of at most `count` tokens, which ends early after one of `ends` or when the context is
    /// full. Of equally likely tokens the first is taken. Computed as generation is, with kept keys and values.
    ///
    /// # Errors
    /// As of [`logits`](Self::logits), and when logits are not numbers.
    pub fn greedy(&self, ids: &[u32], count: usize, ends: &[u32]) -> Result<Greedy, PolicyError> {
        self.check(ids, 0, 0)?;
        let predictor = match &self.models {
            Ready::Kernels(packed) => Predictor::Kernels(packed.decoder().clone()),
            Ready::Device(models, model) => Predictor::Device(DeviceDecoder {
                version: PolicyVersion::default(),
                model: model.clone(),
                pool: Arc::new(BlockPool::new(models, self.shape())),
                rotary: self.rotary.clone(),
            }),
        };
        let meter = predictor.meter();
        let mut cache = KvCache::of_blocks(&[], vec![], Some(&meter));
        let mut scratch = Scratch::default();
        let mut answer = Greedy { tokens: vec![], log_probs: vec![] };
        let mut fed = ids.to_vec();
        while answer.tokens.len() < count && ids.len() + answer.tokens.len() < self.shape().context_tokens_max {
            let rows: Vec<Row> = fed.iter().map(|token| Row { cache: 0, token: *token }).collect();
            predictor.predict(&rows, &mut [&mut cache], &[rows.len() - 1], &mut scratch);
            let (max, normaliser) = kernel::log_normaliser(&mut scratch.logits, 1.0);
            let best = (0_u32..).zip(&scratch.logits).find(|(_, logit)| **logit >= max);
            let Some((token, logit)) = best.filter(|_| normaliser.is_finite()) else {
                return Err(PolicyError::Internal("the model's logits are not numbers".to_owned()));
            };
            answer.tokens.push(token);
            answer.log_probs.push(logit - normaliser);
            if ends.contains(&token) {
                break;
            }
            fed.clear();
            fed.push(token);
        }
        Ok(answer)
    }

    fn check(&self, ids: &[u32], from: usize, least: usize) -> Result<(), PolicyError> {
        let shape = self.shape();
        if ids.is_empty() || ids.len() > shape.context_tokens_max {
            let (tokens, max) = (ids.len(), shape.context_tokens_max);
            return Err(PolicyError::InvalidBatch(format!("{tokens} tokens, where 1 to {max} fit the context")));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= shape.vocabulary) {
            return Err(PolicyError::InvalidBatch(format!("id {id}, where the vocabulary has {}", shape.vocabulary)));
        }
        if !(least..ids.len()).contains(&from) {
            let text = format!("`from` is {from}, where {least} to {} is a token", ids.len().saturating_sub(1));
            return Err(PolicyError::InvalidBatch(text));
        }
        Ok(())
    }
}
