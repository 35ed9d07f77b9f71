//! The narrow place between generation and what computes it: feed these rows of these sequences, give the logits after those.
//!
//! Everything above it is one code for all devices: queue, batches, shared and evicted blocks, versions, draws. Below it are
//! the sampler's kernels and burn.

use std::sync::Arc;

use fulgurite_core::id::PolicyVersion;

use crate::block_pool::BlockPool;
use crate::decoder::{Decoder, Row, Scratch};
use crate::device_decoder::DeviceDecoder;
use crate::kv_cache::{BlockLayout, KvCache, Meter};
use crate::model::DeviceModels;
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;
use crate::weights::ModelWeights;

/// One published version of the weights, ready for generation. Copies share the weights.
#[derive(Debug, Clone)]
pub(crate) enum Predictor {
    /// The kernels of this crate.
    Kernels(Decoder),
    /// burn, on one of its devices.
    Device(DeviceDecoder),
}

impl From<Decoder> for Predictor {
    fn from(decoder: Decoder) -> Self {
        Self::Kernels(decoder)
    }
}

impl Predictor {
    /// Version of the weights.
    pub(crate) fn version(&self) -> PolicyVersion {
        match self {
            Self::Kernels(decoder) => decoder.version,
            Self::Device(decoder) => decoder.version,
        }
    }

    /// Sizes of the model.
    pub(crate) fn shape(&self) -> &ModelShape {
        match self {
            Self::Kernels(decoder) => &decoder.shape,
            Self::Device(decoder) => &decoder.model.shape,
        }
    }

    /// How its blocks of keys and values are divided.
    pub(crate) fn layout(&self) -> BlockLayout {
        match self {
            Self::Kernels(decoder) => BlockLayout::new(&decoder.shape),
            Self::Device(decoder) => decoder.pool.layout,
        }
    }

    /// What counts its blocks. Predictors of one engine share those of a device.
    pub(crate) fn meter(&self) -> Arc<Meter> {
        match self {
            Self::Kernels(_) => Arc::default(),
            Self::Device(decoder) => decoder.pool.meter.clone(),
        }
    }

    /// Feeds rows: several of one sequence stand in its order. Afterwards their keys and values are in the caches, and the
    /// logits after the rows `draws`, `[draws, vocabulary]`, in `scratch.logits`. Ids must be below the vocabulary's size
    /// and caches shorter than the context.
    pub(crate) fn predict(&self, rows: &[Row], caches: &mut [&mut KvCache], draws: &[usize], scratch: &mut Scratch) {
        match self {
            Self::Kernels(decoder) => {
                decoder.forward(rows, caches, scratch);
                decoder.logits(draws.iter().copied(), scratch);
            }
            Self::Device(decoder) => scratch.logits = decoder.predict(rows, caches, draws),
        }
    }
}

/// Makes weights ready for the generation of one engine.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    rotary: Arc<RotaryTable>,
    /// Threads that pack weights for the kernels.
    threads: usize,
    device: Option<(Arc<DeviceModels>, Arc<BlockPool>)>,
}

impl Publisher {
    /// For models of a shape; without a device for the kernels.
    pub(crate) fn new(
        shape: &ModelShape,
        rotary: Arc<RotaryTable>,
        threads: usize,
        device: Option<&Arc<DeviceModels>>,
    ) -> Self {
        let device = device.map(|models| (models.clone(), Arc::new(BlockPool::new(models, shape))));
        Self { rotary, threads, device }
    }

    /// Packs the weights, or copies them to the device.
    pub(crate) fn ready(&self, weights: &ModelWeights, version: PolicyVersion) -> Predictor {
        match &self.device {
            None => Predictor::Kernels(weights.decoder(version, &self.rotary, self.threads)),
            Some((models, pool)) => Predictor::Device(DeviceDecoder {
                version,
                model: models.get(weights),
                pool: pool.clone(),
                rotary: self.rotary.clone(),
            }),
        }
    }
}
