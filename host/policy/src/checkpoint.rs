//! Checkpoints: a folder that a Hugging Face library can open as a Llama model, plus what training needs to go on from it
//! bit by bit. Every file is synchronised with the disk before `save` returns; making the folder appear at once is the
//! caller's rename.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use fulgurite_core::id::PolicyVersion;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::config::ModelShape;
use crate::error::PolicyError;
use crate::optimiser::AdamW;
use crate::parameters::{self, ParameterSpec, Parameters, Values, transpose};

/// Layout of `state.json`; raised when it changes.
const FORMAT: u32 = 1;

/// Weights, in Hugging Face names and layout.
const MODEL: &str = "model.safetensors";
/// Both moments, names prefixed by `first.` and `second.`.
const OPTIMISER: &str = "optimiser.safetensors";
/// A gradient that no step has applied yet.
const GRADIENT: &str = "gradient.safetensors";
/// Sizes, as Hugging Face writes them.
const CONFIG: &str = "config.json";
/// Counters.
const STATE: &str = "state.json";

/// Everything that training continues from.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) parameters: Parameters,
    pub(crate) optimiser: AdamW,
    pub(crate) gradient: Option<Values>,
    pub(crate) snapshots: BTreeMap<String, Parameters>,
    pub(crate) version: PolicyVersion,
}

/// Borrowed form of [`Checkpoint`] for writing.
pub(crate) struct CheckpointView<'a> {
    pub(crate) parameters: &'a Parameters,
    pub(crate) optimiser: &'a AdamW,
    pub(crate) gradient: Option<&'a Values>,
    pub(crate) snapshots: Vec<(&'a str, &'a Parameters)>,
    pub(crate) version: PolicyVersion,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    format: u32,
    version: PolicyVersion,
    optimiser_steps: u64,
    gradient: bool,
    snapshots: Vec<String>,
}

/// The part of Hugging Face's `config.json` that says how a Llama model is built.
#[derive(Debug, Serialize, Deserialize)]
struct ConfigFile {
    architectures: Vec<String>,
    model_type: String,
    hidden_act: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rope_theta: f64,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    torch_dtype: String,
}

/// Writes a file and synchronises it with the disk.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), PolicyError> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(PolicyError::io(path))
}

fn broken(path: &Path, reason: impl std::fmt::Display) -> PolicyError {
    PolicyError::Checkpoint { path: path.to_owned(), reason: reason.to_string() }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), PolicyError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| broken(path, error))?;
    text.push(b'\n');
    write_file(path, &text)
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, PolicyError> {
    let text = std::fs::read(path).map_err(PolicyError::io(path))?;
    serde_json::from_slice(&text).map_err(|error| broken(path, error))
}

/// Writes lists of values under prefixed names, in Hugging Face layout.
fn write_tensors(path: &Path, specs: &[ParameterSpec], lists: &[(&str, &Values)]) -> Result<(), PolicyError> {
    let mut tensors = Vec::new();
    for (prefix, values) in lists {
        for (spec, values) in specs.iter().zip(*values) {
            let values = match spec.dims.as_slice() {
                [rows, columns] if spec.is_transposed_in_files() => transpose(values, *rows, *columns),
                _ => values.clone(),
            };
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((format!("{prefix}{}", spec.name), spec.file_dims(), bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, dims, bytes)| {
            let view = TensorView::new(Dtype::F32, dims.clone(), bytes).map_err(|error| broken(path, error))?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>, PolicyError>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let bytes = safetensors::serialize(views, metadata).map_err(|error| broken(path, error))?;
    write_file(path, &bytes)
}

/// Reads lists of values by prefix; a missing, surplus or misshapen tensor is an error.
fn read_tensors(path: &Path, specs: &[ParameterSpec], prefixes: &[&str]) -> Result<Vec<Values>, PolicyError> {
    let bytes = std::fs::read(path).map_err(PolicyError::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| broken(path, error))?;
    if file.len() != specs.len() * prefixes.len() {
        return Err(broken(
            path,
            format!("it holds {} tensors instead of {}", file.len(), specs.len() * prefixes.len()),
        ));
    }
    let read = |prefix: &str, spec: &ParameterSpec| {
        let name = format!("{prefix}{}", spec.name);
        let tensor = file.tensor(&name).map_err(|error| broken(path, error))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != spec.file_dims() {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
            return Err(broken(path, format!("`{name}` is {found} instead of F32 {:?}", spec.file_dims())));
        }
        let values: Vec<f32> =
            tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(match spec.dims.as_slice() {
            [rows, columns] if spec.is_transposed_in_files() => transpose(&values, *columns, *rows),
            _ => values,
        })
    };
    prefixes.iter().map(|prefix| specs.iter().map(|spec| read(prefix, spec)).collect()).collect()
}

fn snapshot_file(index: usize) -> String {
    format!("snapshot-{index:03}.safetensors")
}

/// Writes a checkpoint into `dir`, which is made when it does not exist.
pub(crate) fn save(dir: &Path, view: &CheckpointView<'_>, end_token: u32) -> Result<(), PolicyError> {
    std::fs::create_dir_all(dir).map_err(PolicyError::io(dir))?;
    let specs = &view.parameters.specs;
    write_tensors(&dir.join(MODEL), specs, &[("", &view.parameters.values)])?;
    let moments = [("first.", &view.optimiser.first), ("second.", &view.optimiser.second)];
    write_tensors(&dir.join(OPTIMISER), specs, &moments)?;
    if let Some(gradient) = view.gradient {
        write_tensors(&dir.join(GRADIENT), specs, &[("", gradient)])?;
    }
    for (index, (_, snapshot)) in view.snapshots.iter().enumerate() {
        write_tensors(&dir.join(snapshot_file(index)), specs, &[("", &snapshot.values)])?;
    }
    let shape = &view.parameters.shape;
    let config = ConfigFile {
        architectures: vec!["LlamaForCausalLM".to_owned()],
        model_type: "llama".to_owned(),
        hidden_act: "silu".to_owned(),
        hidden_size: shape.d_model,
        intermediate_size: shape.d_ff,
        num_hidden_layers: shape.layers,
        num_attention_heads: shape.heads,
        num_key_value_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        vocab_size: shape.vocabulary,
        max_position_embeddings: shape.context_tokens_max,
        rope_theta: shape.rope_theta,
        rms_norm_eps: shape.rms_norm_epsilon,
        tie_word_embeddings: shape.tie_embeddings,
        attention_bias: false,
        mlp_bias: false,
        bos_token_id: None,
        eos_token_id: Some(end_token),
        torch_dtype: "float32".to_owned(),
    };
    write_json(&dir.join(CONFIG), &config)?;
    let state = StateFile {
        format: FORMAT,
        version: view.version,
        optimiser_steps: view.optimiser.steps,
        gradient: view.gradient.is_some(),
        snapshots: view.snapshots.iter().map(|(name, _)| (*name).to_owned()).collect(),
    };
    write_json(&dir.join(STATE), &state)?;
    // The folder's own entries must be on the disk too.
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(PolicyError::io(dir))
}

/// Reads the sizes that a checkpoint's model has.
pub(crate) fn read_shape(dir: &Path) -> Result<ModelShape, PolicyError> {
    let path = dir.join(CONFIG);
    let config: ConfigFile = read_json(&path)?;
    if config.model_type != "llama" || config.attention_bias || config.mlp_bias || config.hidden_act != "silu" {
        return Err(broken(&path, "only Llama models without biases and with `silu` are supported"));
    }
    let shape = ModelShape {
        d_model: config.hidden_size,
        layers: config.num_hidden_layers,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        d_ff: config.intermediate_size,
        vocabulary: config.vocab_size,
        context_tokens_max: config.max_position_embeddings,
        rope_theta: config.rope_theta,
        rms_norm_epsilon: config.rms_norm_eps,
        tie_embeddings: config.tie_word_embeddings,
    };
    shape.check()?;
    Ok(shape)
}

/// Reads a checkpoint.
pub(crate) fn load(dir: &Path) -> Result<Checkpoint, PolicyError> {
    let shape = read_shape(dir)?;
    let specs = parameters::specs(&shape);
    let path = dir.join(STATE);
    let state: StateFile = read_json(&path)?;
    if state.format != FORMAT {
        return Err(broken(&path, format!("its format is {} and this build reads {FORMAT}", state.format)));
    }
    let one = |name: &str| -> Result<Values, PolicyError> {
        let path = dir.join(name);
        read_tensors(&path, &specs, &[""])?.pop().ok_or_else(|| broken(&path, "it is empty"))
    };
    let parameters = |values| Parameters { shape: shape.clone(), specs: specs.clone(), values };
    let path = dir.join(OPTIMISER);
    let moments = <[Values; 2]>::try_from(read_tensors(&path, &specs, &["first.", "second."])?);
    let [first, second] = moments.map_err(|_| broken(&path, "it must hold two moments"))?;
    let mut snapshots = BTreeMap::new();
    for (index, name) in state.snapshots.into_iter().enumerate() {
        snapshots.insert(name, parameters(one(&snapshot_file(index))?));
    }
    Ok(Checkpoint {
        parameters: parameters(one(MODEL)?),
        optimiser: AdamW { first, second, steps: state.optimiser_steps },
        gradient: if state.gradient { Some(one(GRADIENT)?) } else { None },
        snapshots,
        version: state.version,
    })
}
