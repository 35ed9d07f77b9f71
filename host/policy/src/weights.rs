//! What a model is made of: all its weights, an adapter on a frozen base, or the policy's trunk with a value head.

use std::sync::{Arc, OnceLock};

use fulgurite_core::id::{ContentHash, PolicyVersion};

use crate::backprop::Transposed;
use crate::checkpoint::Ground;
use crate::decoder::Decoder;
use crate::lora::{AdapterLayout, PackedAdapter, TransposedAdapter};
use crate::parameters::{self, Kind, ParameterSpec, Parameters};
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;

/// A frozen model under adapters, packed once for all of them.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) parameters: Arc<Parameters>,
    pub(crate) hash: ContentHash,
    rotary: Arc<RotaryTable>,
    /// Made when the kernels first sample.
    decoder: OnceLock<Decoder>,
    /// Made when the first gradient is asked for.
    transposed: OnceLock<Transposed>,
}

impl Base {
    /// Freezes a model.
    pub(crate) fn new(parameters: Arc<Parameters>, rotary: Arc<RotaryTable>) -> Self {
        let hash = parameters.hash();
        Self { parameters, hash, rotary, decoder: OnceLock::new(), transposed: OnceLock::new() }
    }

    fn decoder(&self, threads: usize) -> &Decoder {
        let pack = || Decoder::new(&self.parameters, PolicyVersion::default(), self.rotary.clone(), threads);
        self.decoder.get_or_init(pack)
    }
}

/// One model. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) enum ModelWeights {
    /// Every weight is trained.
    Full(Arc<Parameters>),
    /// An adapter is trained; without one it is the base itself.
    Adapted { base: Arc<Base>, layout: Arc<AdapterLayout>, adapter: Option<Arc<Parameters>> },
    /// A trunk of its own and a value head (see [`critic_specs`]); every weight is trained.
    Critic(Arc<Parameters>),
}

impl From<Arc<Parameters>> for ModelWeights {
    fn from(parameters: Arc<Parameters>) -> Self {
        Self::Full(parameters)
    }
}

impl ModelWeights {
    /// The tensors that a gradient is of.
    pub(crate) fn trained(&self) -> &Arc<Parameters> {
        match self {
            Self::Full(parameters) | Self::Critic(parameters) => parameters,
            Self::Adapted { base, adapter, .. } => adapter.as_ref().unwrap_or(&base.parameters),
        }
    }

    /// The same, to be replaced.
    pub(crate) fn trained_mut(&mut self) -> &mut Arc<Parameters> {
        match self {
            Self::Full(parameters) | Self::Critic(parameters) => parameters,
            Self::Adapted { base, adapter, .. } => adapter.get_or_insert_with(|| base.parameters.clone()),
        }
    }

    /// The same kind of model with other trained tensors.
    pub(crate) fn with_trained(&self, parameters: Arc<Parameters>) -> Self {
        let mut weights = self.clone();
        *weights.trained_mut() = parameters;
        weights
    }

    /// What an adapter stands on.
    pub(crate) fn ground(&self) -> Option<Ground<'_>> {
        match self {
            Self::Adapted { base, layout, .. } => {
                Some(Ground { base: base.hash, layout, shape: &base.parameters.shape })
            }
            Self::Full(_) | Self::Critic(_) => None,
        }
    }

    /// Sizes of the model.
    pub(crate) fn shape(&self) -> &ModelShape {
        &self.trained().shape
    }

    /// Number of weights that are trained.
    pub(crate) fn count(&self) -> usize {
        self.trained().count()
    }

    /// Hash of every bit that the model's answers depend on.
    pub(crate) fn hash(&self) -> ContentHash {
        match self {
            Self::Full(parameters) | Self::Critic(parameters) => parameters.hash(),
            Self::Adapted { base, adapter: None, .. } => base.hash,
            Self::Adapted { base, layout, adapter: Some(adapter) } => {
                let text = format!("{} {} {} {}", base.hash, adapter.hash(), layout.rank, layout.alpha);
                ContentHash::of(text.as_bytes())
            }
        }
    }

    /// The base under an adapter, as a model.
    pub(crate) fn base(&self) -> Option<Self> {
        match self {
            Self::Adapted { base, layout, .. } => {
                Some(Self::Adapted { base: base.clone(), layout: layout.clone(), adapter: None })
            }
            Self::Full(_) | Self::Critic(_) => None,
        }
    }

    /// One plain model that gives the same logits but for rounding.
    pub(crate) fn merged(&self) -> Arc<Parameters> {
        match self {
            Self::Full(parameters) | Self::Critic(parameters) => parameters.clone(),
            Self::Adapted { base, adapter: None, .. } => base.parameters.clone(),
            Self::Adapted { base, layout, adapter: Some(adapter) } => Arc::new(layout.merge(&base.parameters, adapter)),
        }
    }

    /// Packs it for the forward pass; a base is packed already.
    pub(crate) fn decoder(&self, version: PolicyVersion, rotary: &Arc<RotaryTable>, threads: usize) -> Decoder {
        match self {
            Self::Full(parameters) => Decoder::new(parameters, version, rotary.clone(), threads),
            Self::Adapted { base, layout, adapter } => {
                let adapter = adapter.as_ref().map(|adapter| Arc::new(PackedAdapter::new(layout, adapter)));
                Decoder { version, adapter, ..base.decoder(threads).clone() }
            }
            Self::Critic(parameters) => Decoder::critic(parameters, version, rotary.clone(), threads),
        }
    }

    /// Packs it for the backward pass; a base is packed once.
    pub(crate) fn transposed(&self, threads: usize) -> Transposed {
        match self {
            Self::Full(parameters) => Transposed::new(parameters, threads),
            Self::Critic(parameters) => Transposed::trunk(parameters, threads),
            Self::Adapted { base, layout, adapter } => {
                let packed = base.transposed.get_or_init(|| Transposed::new(&base.parameters, threads));
                let adapter = adapter.as_ref().map(|adapter| Arc::new(TransposedAdapter::new(layout, adapter)));
                Transposed { adapter, ..packed.clone() }
            }
        }
    }

    /// A critic with the trunk of this model, which is merged first, and a value head of zeros: every value is 0.
    pub(crate) fn critic(&self) -> Self {
        let mut parameters = (*self.merged()).clone();
        let specs = critic_specs(&parameters.shape);
        parameters.values.truncate(specs.len() - 2);
        parameters.values.extend([vec![0.0; parameters.shape.d_model], vec![0.0]]);
        parameters.specs = specs;
        Self::Critic(Arc::new(parameters))
    }
}

/// The tensors of a critic: those of a model without the output projection, then the weight and bias of its value head.
pub(crate) fn critic_specs(shape: &ModelShape) -> Vec<ParameterSpec> {
    let mut specs = parameters::specs(shape);
    if !shape.tie_embeddings {
        specs.pop();
    }
    let spec = |name: &str, kind, dims: &[usize]| ParameterSpec { name: name.to_owned(), kind, dims: dims.to_vec() };
    specs.push(spec("value_head.weight", Kind::Projection, &[shape.d_model, 1]));
    specs.push(spec("value_head.bias", Kind::Bias, &[1]));
    specs
}
