//! The training side's forward pass in burn: a pure function of weights and ids, on whatever device the weights are on.
//!
//! Weights are plain tensors rather than a burn module. Each worker thread makes its own from the master weights: autodiff
//! graphs that share a leaf are merged and run one after the other, so sharing leaves would serialise the workers.

use burn::prelude::*;
use burn::tensor::TensorData;
use burn::tensor::activation::{silu, softmax};

use crate::parameters::{Parameters, Values};
use crate::rotary::RotaryTable;
use crate::shape::ModelShape;

/// Stands for minus infinity in masked scores: `exp` of it is 0 and no difference of two is undefined.
const MASKED: f32 = -1e9;

/// Weights of one worker on its device.
pub(crate) struct Model {
    shape: ModelShape,
    embedding: Tensor<2>,
    layers: Vec<Layer>,
    norm: Tensor<1>,
    head: Option<Tensor<2>>,
}

struct Layer {
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
}

/// What a micro-batch of one length shares: rotary tables and the causal mask.
struct Positions {
    cosines: Tensor<4>,
    sines: Tensor<4>,
    masked: Tensor<4>,
}

/// Reads the master weights in their order.
struct Reader<'a> {
    parameters: &'a Parameters,
    at: usize,
    device: &'a Device,
    tracked: bool,
}

impl Reader<'_> {
    fn next<const D: usize>(&mut self) -> Tensor<D> {
        let at = self.at;
        self.at += 1;
        let values = self.parameters.values.get(at).cloned().unwrap_or_default();
        let dims = self.parameters.specs.get(at).map(|spec| spec.dims.clone()).unwrap_or_default();
        let tensor = Tensor::from_data(TensorData::new(values, dims), self.device);
        if self.tracked { tensor.require_grad() } else { tensor }
    }
}

impl Model {
    /// Copies the master weights to a device. `tracked` weights gather gradients.
    pub(crate) fn new(parameters: &Parameters, device: &Device, tracked: bool) -> Self {
        let mut reader = Reader { parameters, at: 0, device, tracked };
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
            })
            .collect();
        let norm = reader.next();
        let head = (!parameters.shape.tie_embeddings).then(|| reader.next());
        Self { shape: parameters.shape.clone(), embedding, layers, norm, head }
    }

    /// Logits after the selected positions.
    ///
    /// # Shapes
    /// - `ids`: `[rows * length]`, rows one after the other, each padded at its end
    /// - `selected`: indices into that list
    /// - output: `[selected, vocabulary]`
    pub(crate) fn logits(&self, ids: Vec<i32>, length: usize, selected: Vec<i32>, rotary: &RotaryTable) -> Tensor<2> {
        let device = self.embedding.device();
        let rows = ids.len() / length.max(1);
        let positions = Positions::new(&self.shape, length, rotary, &device);
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [rows * length]), &device);
        // Everything stays `[rows * length, width]`: burn multiplies that in one piece, `[rows, length, width]` row by row.
        let mut x = self.embedding.clone().select(0, ids);
        for layer in &self.layers {
            let normed = rms_norm(x.clone(), &layer.attention_norm, self.shape.rms_norm_epsilon);
            x = x + layer.attend(&normed, &self.shape, rows, length, &positions);
            let normed = rms_norm(x.clone(), &layer.mlp_norm, self.shape.rms_norm_epsilon);
            let gate = silu(normed.clone().matmul(layer.gate.clone()));
            x = x + (gate * normed.matmul(layer.up.clone())).matmul(layer.down.clone());
        }
        let count = selected.len();
        let selected = Tensor::<1, Int>::from_data(TensorData::new(selected, [count]), &device);
        let x = rms_norm(x.select(0, selected), &self.norm, self.shape.rms_norm_epsilon);
        match &self.head {
            Some(head) => x.matmul(head.clone()),
            None => x.matmul(self.embedding.clone().transpose()),
        }
    }

    /// Runs backward from `d loss / d logits` and adds the gradient of every weight to `sums`.
    pub(crate) fn backward(
        &self,
        logits: Tensor<2>,
        d_logits: Vec<f32>,
        sums: &mut Values,
    ) -> Result<(), burn::tensor::DataError> {
        let [rows, vocabulary] = logits.dims();
        let seed = Tensor::<2>::from_data(TensorData::new(d_logits, [rows, vocabulary]), &logits.device());
        // The gradient of this sum with respect to the logits is the seed: the loss itself is computed outside of burn.
        let mut gradients = (logits * seed).sum().backward();
        let mut sums = sums.iter_mut();
        let mut add = |gradient: Option<TensorData>| -> Result<(), burn::tensor::DataError> {
            if let (Some(sums), Some(gradient)) = (sums.next(), gradient) {
                for (sum, gradient) in sums.iter_mut().zip(gradient.try_into_vec::<f32>()?) {
                    *sum += gradient;
                }
            }
            Ok(())
        };
        add(self.embedding.grad_remove(&mut gradients).map(Tensor::into_data))?;
        for layer in &self.layers {
            add(layer.attention_norm.grad_remove(&mut gradients).map(Tensor::into_data))?;
            for weight in [&layer.query, &layer.key, &layer.value, &layer.attention_out] {
                add(weight.grad_remove(&mut gradients).map(Tensor::into_data))?;
            }
            add(layer.mlp_norm.grad_remove(&mut gradients).map(Tensor::into_data))?;
            for weight in [&layer.gate, &layer.up, &layer.down] {
                add(weight.grad_remove(&mut gradients).map(Tensor::into_data))?;
            }
            let biases = layer.biases.iter().flatten().chain(&layer.out_bias);
            for weight in biases.chain(layer.head_norms.iter().flatten()) {
                add(weight.grad_remove(&mut gradients).map(Tensor::into_data))?;
            }
        }
        add(self.norm.grad_remove(&mut gradients).map(Tensor::into_data))?;
        if let Some(head) = &self.head {
            add(head.grad_remove(&mut gradients).map(Tensor::into_data))?;
        }
        Ok(())
    }
}

impl Layer {
    fn attend(
        &self,
        x: &Tensor<2>,
        shape: &ModelShape,
        rows: usize,
        length: usize,
        positions: &Positions,
    ) -> Tensor<2> {
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        let split = |x: Tensor<2>, heads| x.reshape([rows, length, heads, dim]).swap_dims(1, 2);
        let project = |weight: &Tensor<2>, part: usize| {
            let y = x.clone().matmul(weight.clone());
            match self.biases.as_ref().and_then(|biases| biases.get(part)) {
                Some(bias) => y + bias.clone().unsqueeze(),
                None => y,
            }
        };
        let normalise = |x: Tensor<2>, heads: usize, part: usize| {
            match self.head_norms.as_ref().and_then(|norms| norms.get(part)) {
                // As rows of one head each, which is how they lie in memory.
                Some(norm) => rms_norm(x.reshape([rows * length * heads, dim]), norm, shape.rms_norm_epsilon)
                    .reshape([rows * length, heads * dim]),
                None => x,
            }
        };
        let query = positions.rotate(split(normalise(project(&self.query, 0), heads, 0), heads));
        let key = positions.rotate(split(normalise(project(&self.key, 1), kv_heads, 1), kv_heads));
        let key = repeat(key, heads / kv_heads);
        let value = repeat(split(project(&self.value, 2), kv_heads), heads / kv_heads);
        let query = query.mul_scalar(1.0 / (dim as f32).sqrt());
        let scores = query.matmul(key.swap_dims(2, 3)) + positions.masked.clone();
        let mixed = softmax(scores, 3).matmul(value);
        let out = mixed.swap_dims(1, 2).reshape([rows * length, heads * dim]).matmul(self.attention_out.clone());
        match &self.out_bias {
            Some(bias) => out + bias.clone().unsqueeze(),
            None => out,
        }
    }
}

impl Positions {
    fn new(shape: &ModelShape, length: usize, rotary: &RotaryTable, device: &Device) -> Self {
        let (cosines, sines) = rotary.first(length);
        // Both halves of a head turn by the same angles.
        let table = |values: &[f32]| -> Tensor<4> {
            let half = shape.head_dim / 2;
            let doubled: Vec<f32> = values.chunks_exact(half).flat_map(|row| [row, row].concat()).collect();
            Tensor::from_data(TensorData::new(doubled, [1, 1, length, shape.head_dim]), device)
        };
        let is_seen = |q: usize, k: usize| (shape.window_start(q + 1)..=q).contains(&k);
        let masked: Vec<f32> =
            (0..length).flat_map(|q| (0..length).map(move |k| if is_seen(q, k) { 0.0 } else { MASKED })).collect();
        let masked = Tensor::from_data(TensorData::new(masked, [1, 1, length, length]), device);
        Self { cosines: table(cosines), sines: table(sines), masked }
    }

    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, _, dim] = x.dims();
        let low = x.clone().slice_dim(3, 0..dim / 2);
        let high = x.clone().slice_dim(3, dim / 2..dim);
        x * self.cosines.clone() + Tensor::cat(vec![high.neg(), low], 3) * self.sines.clone()
    }
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
