//! The model in burn, on whatever device: its weights there, the layers that training and generation share, and training's
//! forward and backward pass over whole rows.
//!
//! Weights are plain tensors rather than a burn module. They are copied to the device once per version and shared; a pass
//! that is differentiated makes autodiff leaves of its own from them, because graphs that share a leaf are merged and run one
//! after the other. Embedding and output projection are never leaves: the gradient of the first is that of its rows, which
//! are gathered before the graph begins, and that of the second follows from the loss by hand ([`crate::device_loss`]), so
//! that neither is there as a whole for every token.
//!
//! The residual stream, norms and softmaxes are f32; products are in the numbers of the weights.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use burn::prelude::*;
use burn::tensor::activation::silu;
use burn::tensor::{DType, DataError, Gradients, IndexingUpdateOp, TensorData};

use crate::device::DevicePrecision;
use crate::lora::{AdapterLayout, LoraTarget};
use crate::low_rank::LowRanks;
use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;
use crate::weights::ModelWeights;

/// Stands for minus infinity in masked scores: `exp` of it is 0 and no difference of two is undefined.
pub(crate) const MASKED: f32 = -1e9;

/// Weights on a device.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) shape: ModelShape,
    pub(crate) device: Device,
    /// Of products.
    pub(crate) dtype: DType,
    /// `[vocabulary, d_model]`.
    embedding: Tensor<2>,
    pub(crate) layers: Vec<Layer>,
    norm: Tensor<1>,
    /// `[d_model, vocabulary]`; the embedding's transpose where it has no weights of its own.
    head: Option<Tensor<2>>,
    /// What an adapter stands on; then the adapter alone is trained.
    base: Option<Arc<Model>>,
}

/// One layer's weights.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    attention_norm: Tensor<1>,
    query: Tensor<2>,
    key: Tensor<2>,
    value: Tensor<2>,
    attention_out: Tensor<2>,
    mlp_norm: Tensor<1>,
    gate: Tensor<2>,
    up: Tensor<2>,
    down: Tensor<2>,
    /// Of query, key and value.
    biases: Option<[Tensor<1>; 3]>,
    out_bias: Option<Tensor<1>>,
    /// Of each head's query and key.
    head_norms: Option<[Tensor<1>; 2]>,
    adapter: LowRanks,
}

/// The models that are on a device, each of them once however many use it.
#[derive(Debug)]
pub(crate) struct DeviceModels {
    device: Device,
    precision: DevicePrecision,
    known: Mutex<Vec<(Weak<Parameters>, Weak<Model>)>>,
}

impl DeviceModels {
    pub(crate) fn new(device: Device, precision: DevicePrecision) -> Self {
        Self { device, precision, known: Mutex::default() }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn precision(&self) -> DevicePrecision {
        self.precision
    }

    /// The device's copy of some weights, which is made when there is none.
    pub(crate) fn get(&self, weights: &ModelWeights) -> Arc<Model> {
        let plain = |parameters| self.known(parameters, || Model::new(parameters, &self.device, self.precision));
        match weights {
            ModelWeights::Full(parameters) | ModelWeights::Critic(parameters) => plain(parameters),
            ModelWeights::Adapted { base, adapter: None, .. } => plain(&base.parameters),
            ModelWeights::Adapted { base, layout, adapter: Some(adapter) } => {
                let base = plain(&base.parameters);
                self.known(adapter, || Model::adapted(base, layout, adapter))
            }
        }
    }

    /// Weights that are changed are others: whoever changes them while they are shared works on a copy.
    fn known(&self, parameters: &Arc<Parameters>, make: impl FnOnce() -> Model) -> Arc<Model> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(parameters, model)| parameters.strong_count() > 0 && model.strong_count() > 0);
        let found = known.iter().find(|(of, _)| std::ptr::eq(of.as_ptr(), Arc::as_ptr(parameters)));
        if let Some(model) = found.and_then(|(_, model)| model.upgrade()) {
            return model;
        }
        let model = Arc::new(make());
        known.push((Arc::downgrade(parameters), Arc::downgrade(&model)));
        model
    }
}

/// Reads the master weights in their order.
struct Reader<'a> {
    parameters: &'a Parameters,
    at: usize,
    device: &'a Device,
    dtype: DType,
}

impl Reader<'_> {
    /// Matrices are in the numbers of products; norms and biases stay f32.
    fn next<const D: usize>(&mut self) -> Tensor<D> {
        let at = self.at;
        self.at += 1;
        let values = self.parameters.values.get(at).cloned().unwrap_or_default();
        let dims = self.parameters.specs.get(at).map(|spec| spec.dims.clone()).unwrap_or_default();
        let dtype = if D == 1 { DType::F32 } else { self.dtype };
        Tensor::from_data(TensorData::new(values, dims), (self.device, dtype))
    }
}

/// A number as an index of burn's.
pub(crate) fn index(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// A tensor of indices on a device.
pub(crate) fn indices<const D: usize>(values: Vec<i32>, dims: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, dims), device)
}

/// A tensor of f32 on a device.
pub(crate) fn floats<const D: usize>(values: Vec<f32>, dims: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, dims), (device, DType::F32))
}

/// One pass over rows, up to the hidden states that logits are made of.
pub(crate) struct Pass {
    /// Rows of the embedding, `[tokens, d_model]`: where the graph begins.
    embedded: Tensor<2>,
    ids: Vec<i32>,
    /// `[selected, d_model]`, f32.
    pub(crate) normed: Tensor<2>,
}

impl Model {
    /// Copies the master weights to a device.
    fn new(parameters: &Parameters, device: &Device, precision: DevicePrecision) -> Self {
        let dtype = precision.dtype();
        let mut reader = Reader { parameters, at: 0, device, dtype };
        let shape = &parameters.shape;
        let embedding = reader.next();
        let layers = (0..shape.layers)
            .map(|_| Layer {
                attention_norm: reader.next(),
                query: reader.next(),
                key: reader.next(),
                value: reader.next(),
                attention_out: reader.next(),
                mlp_norm: reader.next(),
                gate: reader.next(),
                up: reader.next(),
                down: reader.next(),
                biases: shape.attention_bias.then(|| [reader.next(), reader.next(), reader.next()]),
                out_bias: shape.attention_out_bias.then(|| reader.next()),
                head_norms: shape.qk_norm.then(|| [reader.next(), reader.next()]),
                adapter: LowRanks::default(),
            })
            .collect();
        let norm = reader.next();
        let head = (!shape.tie_embeddings).then(|| reader.next());
        Self { shape: shape.clone(), device: device.clone(), dtype, embedding, layers, norm, head, base: None }
    }

    /// A model under an adapter. It shares the base's memory.
    fn adapted(base: Arc<Self>, layout: &AdapterLayout, adapter: &Parameters) -> Self {
        let to = (&base.device, base.dtype);
        let layers = base.layers.iter().enumerate();
        let layers =
            layers.map(|(at, layer)| Layer { adapter: LowRanks::new(layout, adapter, at, to), ..layer.clone() });
        Self {
            shape: base.shape.clone(),
            device: base.device.clone(),
            dtype: base.dtype,
            embedding: base.embedding.clone(),
            layers: layers.collect(),
            norm: base.norm.clone(),
            head: base.head.clone(),
            base: Some(base),
        }
    }

    /// The same weights, and the same memory, for one worker's passes. `tracked` ones gather gradients. Those without use
    /// autodiff's operations too: log-probs with and without a gradient are then equal bit by bit.
    pub(crate) fn for_training(&self, tracked: bool) -> Self {
        let of_layers = [tracked && self.trains_all(), tracked];
        Self {
            shape: self.shape.clone(),
            device: self.device.clone(),
            dtype: self.dtype,
            embedding: self.embedding.clone(),
            layers: self.layers.iter().map(|layer| layer.for_training(of_layers)).collect(),
            norm: leaf(&self.norm, tracked && self.trains_all()),
            head: self.head.clone(),
            base: self.base.clone(),
        }
    }

    /// Whether all weights are trained, and not an adapter alone.
    pub(crate) fn trains_all(&self) -> bool {
        self.base.is_none()
    }

    /// Rows of the embedding, f32.
    pub(crate) fn embed(&self, ids: Vec<i32>) -> Tensor<2> {
        let count = ids.len();
        self.embedding.clone().select(0, indices(ids, [count], &self.device)).cast(DType::F32)
    }

    /// The norm before the output projection.
    pub(crate) fn last_norm(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, &self.norm, self.shape.rms_norm_epsilon)
    }

    /// The output projection as it is multiplied with, `[d_model, vocabulary]`.
    pub(crate) fn head(&self) -> Tensor<2> {
        self.head.clone().unwrap_or_else(|| self.embedding.clone().transpose())
    }

    /// Logits, f32, of normed hidden states without a graph.
    pub(crate) fn logits(&self, normed: Tensor<2>) -> Tensor<2> {
        normed.cast(self.dtype).matmul(self.head()).cast(DType::F32)
    }

    /// Hidden states at the selected positions.
    ///
    /// # Shapes
    /// - `ids`: `[rows * length]`, rows one after the other, each padded at its end
    /// - `selected`: indices into that list
    pub(crate) fn forward(&self, ids: Vec<i32>, length: usize, selected: Vec<i32>, rotary: &RotaryTable) -> Pass {
        let rows = ids.len() / length.max(1);
        let positions = Positions::new(&self.shape, length, rotary, &self.device);
        let mut embedded = self.embed(ids.clone()).autodiff();
        if self.norm.is_require_grad() {
            embedded = embedded.require_grad();
        }
        // Everything stays `[rows * length, width]`: burn multiplies that in one piece, `[rows, length, width]` row by row.
        let mut x = embedded.clone();
        for layer in &self.layers {
            x = x.clone() + layer.attend_rows(x, self, rows, length, &positions);
            x = x.clone() + layer.feed_forward(x, self);
        }
        let count = selected.len();
        let normed = self.last_norm(x.select(0, indices(selected, [count], &self.device)));
        Pass { embedded, ids, normed }
    }

    /// Runs backward from `d loss / d normed`, `[selected, d_model]`, and adds the gradient of every weight to `sums`.
    /// `d_head` is that of the output projection, in its layout in memory.
    pub(crate) fn backward(&self, pass: Pass, d_normed: Tensor<2>, d_head: Option<Tensor<2>>, sums: &mut Gradient) {
        // The gradient of this sum with respect to the hidden states is the seed.
        let mut gradients = (pass.normed * d_normed).sum().backward();
        if !self.trains_all() {
            for layer in &self.layers {
                layer.adapter.gradients(&mut gradients, &mut |at, gradient| sums.add(at, gradient));
            }
            return;
        }
        let mut at = 0;
        let mut next = |gradient| {
            at += 1;
            sums.add(at, gradient);
        };
        for layer in &self.layers {
            layer.gradients(&mut gradients, &mut next);
        }
        next(taken(&self.norm, &mut gradients));
        let d_head = d_head.map(flat);
        if self.head.is_some() {
            next(d_head);
        } else {
            sums.add(0, d_head);
        }
        if let Some(d_rows) = pass.embedded.grad_remove(&mut gradients) {
            sums.add_rows(pass.ids, d_rows, self.shape.vocabulary);
        }
    }
}

/// Sums of gradients on a device, f32, each as one list, in the order of the master weights.
#[derive(Debug, Default)]
pub(crate) struct Gradient(Vec<Option<Tensor<1>>>);

impl Gradient {
    fn slot(&mut self, at: usize) -> Option<&mut Option<Tensor<1>>> {
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        self.0.get_mut(at)
    }

    fn add(&mut self, at: usize, gradient: Option<Tensor<1>>) {
        if let (Some(slot), Some(gradient)) = (self.slot(at), gradient) {
            *slot = Some(match slot.take() {
                Some(sum) => sum + gradient,
                None => gradient,
            });
        }
    }

    /// Adds the gradient of each token's row to that of the embedding.
    fn add_rows(&mut self, ids: Vec<i32>, rows: Tensor<2>, vocabulary: usize) {
        let ([count, width], device) = (rows.dims(), rows.device());
        let Some(slot) = self.slot(0) else { return };
        let sum = match slot.take() {
            Some(sum) => sum.reshape([vocabulary, width]),
            None => Tensor::zeros([vocabulary, width], (&device, DType::F32)),
        };
        let sum = sum.select_assign(0, indices(ids, [count], &device), rows, IndexingUpdateOp::Add);
        *slot = Some(flat(sum));
    }

    /// Takes the sums off the device and adds them to the host's.
    pub(crate) fn take(&mut self, sums: &mut Values) -> Result<(), DataError> {
        for (sums, gradient) in sums.iter_mut().zip(std::mem::take(&mut self.0)) {
            let Some(gradient) = gradient else { continue };
            for (sum, gradient) in sums.iter_mut().zip(gradient.into_data().try_into_vec::<f32>()?) {
                *sum += gradient;
            }
        }
        Ok(())
    }
}

pub(crate) fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    tensor.cast(DType::F32).reshape([len])
}

fn taken<const D: usize>(weight: &Tensor<D>, gradients: &mut Gradients) -> Option<Tensor<1>> {
    weight.grad_remove(gradients).map(flat)
}

pub(crate) fn leaf<const D: usize>(weight: &Tensor<D>, tracked: bool) -> Tensor<D> {
    let weight = weight.clone().autodiff();
    if tracked { weight.require_grad() } else { weight }
}

impl Layer {
    /// Whether its weights and those of its adapter are tracked.
    fn for_training(&self, [tracked, adapter]: [bool; 2]) -> Self {
        Self {
            attention_norm: leaf(&self.attention_norm, tracked),
            query: leaf(&self.query, tracked),
            key: leaf(&self.key, tracked),
            value: leaf(&self.value, tracked),
            attention_out: leaf(&self.attention_out, tracked),
            mlp_norm: leaf(&self.mlp_norm, tracked),
            gate: leaf(&self.gate, tracked),
            up: leaf(&self.up, tracked),
            down: leaf(&self.down, tracked),
            biases: self.biases.as_ref().map(|biases| biases.each_ref().map(|bias| leaf(bias, tracked))),
            out_bias: self.out_bias.as_ref().map(|bias| leaf(bias, tracked)),
            head_norms: self.head_norms.as_ref().map(|norms| norms.each_ref().map(|norm| leaf(norm, tracked))),
            adapter: self.adapter.for_training(adapter),
        }
    }

    /// Hands over the gradients in the order of the master weights.
    fn gradients(&self, gradients: &mut Gradients, next: &mut impl FnMut(Option<Tensor<1>>)) {
        next(taken(&self.attention_norm, gradients));
        for weight in [&self.query, &self.key, &self.value, &self.attention_out] {
            next(taken(weight, gradients));
        }
        next(taken(&self.mlp_norm, gradients));
        for weight in [&self.gate, &self.up, &self.down] {
            next(taken(weight, gradients));
        }
        let biases = self.biases.iter().flatten().chain(&self.out_bias);
        for weight in biases.chain(self.head_norms.iter().flatten()) {
            next(taken(weight, gradients));
        }
    }

    /// A projection of `x`, which is in the numbers of products, f32.
    fn multiply(&self, x: &Tensor<2>, weight: &Tensor<2>, target: LoraTarget) -> Tensor<2> {
        self.adapter.add(target, x, x.clone().matmul(weight.clone()).cast(DType::F32))
    }

    /// Queries, keys and values of the residual stream, f32, heads normalised in a model that does, not yet rotated.
    pub(crate) fn project(&self, x: Tensor<2>, model: &Model) -> [Tensor<2>; 3] {
        let shape = &model.shape;
        let normed = rms_norm(x, &self.attention_norm, shape.rms_norm_epsilon).cast(model.dtype);
        let project = |weight: &Tensor<2>, target: LoraTarget, part: usize| {
            let y = self.multiply(&normed, weight, target);
            match self.biases.as_ref().and_then(|biases| biases.get(part)) {
                Some(bias) => y + bias.clone().unsqueeze(),
                None => y,
            }
        };
        let normalise = |x: Tensor<2>, part: usize| {
            let [tokens, width] = x.dims();
            match self.head_norms.as_ref().and_then(|norms| norms.get(part)) {
                // As rows of one head each, which is how they lie in memory.
                Some(norm) => {
                    rms_norm(x.reshape([tokens * width / shape.head_dim, shape.head_dim]), norm, shape.rms_norm_epsilon)
                        .reshape([tokens, width])
                }
                None => x,
            }
        };
        [
            normalise(project(&self.query, LoraTarget::Q, 0), 0),
            normalise(project(&self.key, LoraTarget::K, 1), 1),
            project(&self.value, LoraTarget::V, 2),
        ]
    }

    /// What attention adds to the residual stream.
    pub(crate) fn project_out(&self, mixed: Tensor<2>, model: &Model) -> Tensor<2> {
        let out = self.multiply(&mixed.cast(model.dtype), &self.attention_out, LoraTarget::O);
        match &self.out_bias {
            Some(bias) => out + bias.clone().unsqueeze(),
            None => out,
        }
    }

    /// What the feed-forward part adds to the residual stream.
    pub(crate) fn feed_forward(&self, x: Tensor<2>, model: &Model) -> Tensor<2> {
        let normed = rms_norm(x, &self.mlp_norm, model.shape.rms_norm_epsilon).cast(model.dtype);
        let gate = silu(self.multiply(&normed, &self.gate, LoraTarget::Gate));
        let up = self.multiply(&normed, &self.up, LoraTarget::Up);
        self.multiply(&(gate * up).cast(model.dtype), &self.down, LoraTarget::Down)
    }

    /// Attention of whole rows over themselves.
    fn attend_rows(&self, x: Tensor<2>, model: &Model, rows: usize, length: usize, positions: &Positions) -> Tensor<2> {
        let shape = &model.shape;
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        let split = |x: Tensor<2>, heads| x.reshape([rows, length, heads, dim]).swap_dims(1, 2);
        let [query, key, value] = self.project(x, model);
        let query = positions.rotate(split(query, heads)).mul_scalar(scale(dim)).cast(model.dtype);
        let key = repeat(positions.rotate(split(key, kv_heads)).cast(model.dtype), heads / kv_heads);
        let value = repeat(split(value, kv_heads).cast(model.dtype), heads / kv_heads);
        let scores = query.matmul(key.swap_dims(2, 3)).cast(DType::F32) + positions.masked.clone();
        let mixed = softmax(scores).cast(model.dtype).matmul(value).cast(DType::F32);
        self.project_out(mixed.swap_dims(1, 2).reshape([rows * length, heads * dim]), model)
    }
}

/// What scores are multiplied with.
pub(crate) fn scale(dim: usize) -> f32 {
    1.0 / (dim as f32).sqrt()
}

/// Over the last dimension, of f32.
pub(crate) fn softmax(scores: Tensor<4>) -> Tensor<4> {
    let max = scores.clone().detach().max_dim(3);
    let powers = (scores - max).exp();
    powers.clone() / powers.sum_dim(3)
}

/// What a micro-batch of one length shares: rotary tables and the causal mask.
struct Positions {
    cosines: Tensor<4>,
    sines: Tensor<4>,
    masked: Tensor<4>,
}

impl Positions {
    fn new(shape: &ModelShape, length: usize, rotary: &RotaryTable, device: &Device) -> Self {
        let (cosines, sines) = rotary.first(length);
        let table =
            |values: &[f32]| floats(both_halves(values, shape.head_dim), [1, 1, length, shape.head_dim], device);
        let is_seen = |q: usize, k: usize| (shape.window_start(q + 1)..=q).contains(&k);
        let masked: Vec<f32> =
            (0..length).flat_map(|q| (0..length).map(move |k| if is_seen(q, k) { 0.0 } else { MASKED })).collect();
        let masked = floats(masked, [1, 1, length, length], device);
        Self { cosines: table(cosines), sines: table(sines), masked }
    }

    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        rotate(x, self.cosines.clone(), self.sines.clone())
    }
}

/// Angles' values of each position, once for either half of a head: both turn by the same angles.
pub(crate) fn both_halves(values: &[f32], dim: usize) -> Vec<f32> {
    values.chunks_exact((dim / 2).max(1)).flat_map(|row| [row, row].concat()).collect()
}

/// Turns the halves of heads, the last dimension, against each other.
pub(crate) fn rotate<const D: usize>(x: Tensor<D>, cosines: Tensor<D>, sines: Tensor<D>) -> Tensor<D> {
    let dim = x.dims().last().copied().unwrap_or(0);
    let low = x.clone().slice_dim(D - 1, 0..dim / 2);
    let high = x.clone().slice_dim(D - 1, dim / 2..dim);
    x * cosines + Tensor::cat(vec![high.neg(), low], D - 1) * sines
}

fn repeat(x: Tensor<4>, times: usize) -> Tensor<4> {
    if times == 1 {
        return x;
    }
    let [rows, heads, length, dim] = x.dims();
    x.reshape([rows, heads, 1, length, dim]).expand([rows, heads, times, length, dim]).reshape([
        rows,
        heads * times,
        length,
        dim,
    ])
}

fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, epsilon: f64) -> Tensor<2> {
    let rms = (x.clone().square().mean_dim(1) + epsilon).sqrt();
    (x / rms) * weight.clone().unsqueeze()
}
