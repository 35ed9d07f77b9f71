//! Checkpoints: a folder that a Hugging Face library can open, plus what training needs to go on from it
//! bit by bit. Every file is synchronised with the disk before `save` returns; making the folder appear at once is the
//! caller's rename.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use fulgurite_core::id::{ContentHash, PolicyVersion};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::error::PolicyError;
use crate::lora::{self, AdapterLayout};
use crate::optimiser::AdamW;
use crate::parameters::{self, ParameterSpec, Parameters, Values};
use crate::peft;
use crate::shape::{Architecture, ModelShape, RopeScaling};
use crate::tokenizer::PolicyTokenizer;
use crate::weights;

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
/// Folder of the critic.
const CRITIC: &str = "critic";
/// Folder of the adapters beside the default one.
pub(crate) const ADAPTERS: &str = "adapters";
/// Folder of the whole models beside the policy.
pub(crate) const MODELS: &str = "models";

/// One trained model.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) parameters: Arc<Parameters>,
    pub(crate) optimiser: AdamW,
    pub(crate) gradient: Option<Values>,
    /// Of the weights that were last published; a critic has none.
    pub(crate) version: PolicyVersion,
}

impl Part {
    /// A model that no step has changed.
    pub(crate) fn new(parameters: Arc<Parameters>) -> Self {
        let optimiser = AdamW::new(&parameters);
        Self { parameters, optimiser, gradient: None, version: PolicyVersion::default() }
    }
}

/// Everything that training continues from. With adapters the policy is the default one, and the base is not held: it has
/// not changed.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) policy: Part,
    /// Further adapters, or further whole models, by name.
    pub(crate) named: BTreeMap<String, Part>,
    pub(crate) critic: Option<Part>,
    /// Of the policy, or of those beside it.
    pub(crate) snapshots: BTreeMap<String, Arc<Parameters>>,
}

/// Borrowed form of [`Part`] for writing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartView<'a> {
    pub(crate) parameters: &'a Parameters,
    pub(crate) optimiser: &'a AdamW,
    pub(crate) gradient: Option<&'a Values>,
    pub(crate) version: PolicyVersion,
}

/// Borrowed form of [`Checkpoint`] for writing.
pub(crate) struct CheckpointView<'a> {
    pub(crate) policy: PartView<'a>,
    pub(crate) named: Vec<(&'a str, PartView<'a>)>,
    pub(crate) critic: Option<PartView<'a>>,
    pub(crate) snapshots: Vec<(&'a str, &'a Parameters)>,
}

/// What adapters stand on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ground<'a> {
    /// Hash of the base.
    pub(crate) base: ContentHash,
    pub(crate) layout: &'a AdapterLayout,
    pub(crate) shape: &'a ModelShape,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    format: u32,
    version: PolicyVersion,
    optimiser_steps: u64,
    gradient: bool,
    snapshots: Vec<String>,
    /// Only of adapters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lora: Option<LoraState>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    critic: Option<PartState>,
    /// Whole models beside the policy.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    models: BTreeMap<String, PartState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoraState {
    base: ContentHash,
    policy_version: PolicyVersion,
    adapters: BTreeMap<String, PartState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartState {
    version: PolicyVersion,
    optimiser_steps: u64,
    gradient: bool,
}

impl PartState {
    fn of(part: PartView<'_>) -> Self {
        Self { version: part.version, optimiser_steps: part.optimiser.steps, gradient: part.gradient.is_some() }
    }
}

/// The part of Hugging Face's `config.json` that says how a model is built. What only some models have is left out of the
/// others' files.
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
    eos_token_id: Ends,
    torch_dtype: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<RopeScaling>,
    /// Ours alone, other programs always round: `ModelShape::rope_f32`. Absent in a checkpoint of a preset, as it always was;
    /// a folder says it, because there absent means transformers' way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_f32: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sliding_window: Option<usize>,
    /// Qwen's switch for the window, and the first layer that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    use_sliding_window: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_window_layers: Option<usize>,
}

/// `eos_token_id`: one id, or a list of them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Ends {
    One(Option<u32>),
    Several(Vec<u32>),
}

impl Ends {
    fn new(ids: &[u32]) -> Self {
        match ids {
            [] => Self::One(None),
            [id] => Self::One(Some(*id)),
            several => Self::Several(several.to_vec()),
        }
    }
}

impl ConfigFile {
    fn new(shape: &ModelShape, end_tokens: &[u32], torch_dtype: &str) -> Result<Self, PolicyError> {
        let architecture = shape.architecture()?;
        let windowed_qwen =
            matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3).then_some(shape.sliding_window).flatten();
        Ok(Self {
            architectures: vec![architecture.class_name().to_owned()],
            model_type: architecture.model_type().to_owned(),
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
            attention_bias: shape.attention_bias,
            mlp_bias: false,
            bos_token_id: None,
            eos_token_id: Ends::new(end_tokens),
            torch_dtype: torch_dtype.to_owned(),
            rope_scaling: (shape.rope_scaling != RopeScaling::None).then_some(shape.rope_scaling),
            rope_f32: shape.rope_f32.then_some(true),
            sliding_window: shape.sliding_window,
            use_sliding_window: windowed_qwen.map(|_| true),
            max_window_layers: windowed_qwen.map(|_| 0),
        })
    }

    /// The shape that [`new`](Self::new) wrote. Not a reader of Hugging Face's folders: those leave out what has a default.
    fn shape(self) -> Result<ModelShape, String> {
        let all = [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];
        let Some(architecture) = all.into_iter().find(|known| known.model_type() == self.model_type) else {
            return Err(format!("`model_type` is `{}`, which this engine does not write", self.model_type));
        };
        if self.mlp_bias || self.hidden_act != "silu" {
            return Err("only feed-forward parts without biases and with `silu` are supported".to_owned());
        }
        let shape = ModelShape {
            d_model: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            d_ff: self.intermediate_size,
            vocabulary: self.vocab_size,
            context_tokens_max: self.max_position_embeddings,
            rope_theta: self.rope_theta,
            rms_norm_epsilon: self.rms_norm_eps,
            tie_embeddings: self.tie_word_embeddings,
            attention_bias: self.attention_bias,
            // Qwen2 has no switch: its three biases are always there and the fourth never.
            attention_out_bias: self.attention_bias && architecture != Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            rope_scaling: self.rope_scaling.unwrap_or_default(),
            rope_f32: self.rope_f32.unwrap_or(false),
            sliding_window: self.sliding_window,
        };
        match shape.check().and_then(|()| shape.architecture()) {
            Ok(found) if found == architecture => Ok(shape),
            Ok(found) => Err(format!("its switches are those of `{}`", found.model_type())),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Writes a model's `config.json`, for a folder.
pub(crate) fn write_config(dir: &Path, shape: &ModelShape, ends: &[u32], dtype: &str) -> Result<(), PolicyError> {
    let config = ConfigFile { rope_f32: (!shape.rope_f32).then_some(false), ..ConfigFile::new(shape, ends, dtype)? };
    write_json(&dir.join(CONFIG), &config)
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

/// Writes JSON for people.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), PolicyError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| broken(path, error))?;
    text.push(b'\n');
    write_file(path, &text)
}

/// Reads JSON.
pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, PolicyError> {
    let text = std::fs::read(path).map_err(PolicyError::io(path))?;
    serde_json::from_slice(&text).map_err(|error| broken(path, error))
}

/// Writes lists of values under prefixed names, in Hugging Face layout.
pub(crate) fn write_tensors(
    path: &Path,
    specs: &[ParameterSpec],
    lists: &[(&str, &Values)],
) -> Result<(), PolicyError> {
    let mut tensors = Vec::new();
    for (prefix, values) in lists {
        for (spec, values) in specs.iter().zip(*values) {
            let bytes: Vec<u8> = spec.values_for_file(values).iter().flat_map(|value| value.to_le_bytes()).collect();
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
        Ok(spec.values_from_file(values))
    };
    prefixes.iter().map(|prefix| specs.iter().map(|spec| read(prefix, spec)).collect()).collect()
}

fn snapshot_file(index: usize) -> String {
    format!("snapshot-{index:03}.safetensors")
}

/// Writes moments and gradient, the part of a model that only training needs.
fn save_training(dir: &Path, part: PartView<'_>) -> Result<(), PolicyError> {
    let specs = &part.parameters.specs;
    let moments = [("first.", &part.optimiser.first), ("second.", &part.optimiser.second)];
    write_tensors(&dir.join(OPTIMISER), specs, &moments)?;
    match part.gradient {
        Some(gradient) => write_tensors(&dir.join(GRADIENT), specs, &[("", gradient)]),
        None => Ok(()),
    }
}

/// Makes the entries of a folder durable.
fn synchronise(dir: &Path) -> Result<(), PolicyError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(PolicyError::io(dir))
}

/// Writes a plain model into `dir`, which is made when it does not exist.
pub(crate) fn save_model(dir: &Path, model: &Parameters, end_tokens: &[u32]) -> Result<(), PolicyError> {
    std::fs::create_dir_all(dir).map_err(PolicyError::io(dir))?;
    write_tensors(&dir.join(MODEL), &model.specs, &[("", &model.values)])?;
    write_json(&dir.join(CONFIG), &ConfigFile::new(&model.shape, end_tokens, "float32")?)
}

/// Writes a checkpoint into `dir`, which is made when it does not exist: plain models, or adapters on a ground that is not
/// written. A further whole model is a folder that can be opened by itself.
pub(crate) fn save(
    dir: &Path,
    checkpoint: &CheckpointView<'_>,
    ground: Option<Ground<'_>>,
    tokenizer: &PolicyTokenizer,
) -> Result<(), PolicyError> {
    let policy = checkpoint.policy;
    let states = checkpoint.named.iter().map(|(name, part)| ((*name).to_owned(), PartState::of(*part))).collect();
    let Some(ground) = ground else {
        save_model(dir, policy.parameters, tokenizer.ends())?;
        for (name, part) in &checkpoint.named {
            let dir = dir.join(MODELS).join(name);
            save_model(&dir, part.parameters, tokenizer.ends())?;
            tokenizer.save(&dir)?;
            save_training(&dir, *part)?;
            synchronise(&dir)?;
        }
        return save_rest(dir, checkpoint, None, states);
    };
    peft::save(dir, ground.layout, policy.parameters)?;
    for (name, part) in &checkpoint.named {
        let dir = dir.join(ADAPTERS).join(name);
        peft::save(&dir, ground.layout, part.parameters)?;
        save_training(&dir, *part)?;
        synchronise(&dir)?;
    }
    let lora = LoraState { base: ground.base, policy_version: policy.version, adapters: states };
    save_rest(dir, checkpoint, Some(lora), BTreeMap::new())
}

/// Writes everything but the models' own files.
fn save_rest(
    dir: &Path,
    checkpoint: &CheckpointView<'_>,
    lora: Option<LoraState>,
    models: BTreeMap<String, PartState>,
) -> Result<(), PolicyError> {
    let policy = checkpoint.policy;
    save_training(dir, policy)?;
    for (index, (_, snapshot)) in checkpoint.snapshots.iter().enumerate() {
        write_tensors(&dir.join(snapshot_file(index)), &snapshot.specs, &[("", &snapshot.values)])?;
    }
    if let Some(critic) = checkpoint.critic {
        let dir = dir.join(CRITIC);
        std::fs::create_dir_all(&dir).map_err(PolicyError::io(&dir))?;
        write_tensors(&dir.join(MODEL), &critic.parameters.specs, &[("", &critic.parameters.values)])?;
        save_training(&dir, critic)?;
        synchronise(&dir)?;
    }
    let state = StateFile {
        format: FORMAT,
        version: policy.version,
        optimiser_steps: policy.optimiser.steps,
        gradient: policy.gradient.is_some(),
        snapshots: checkpoint.snapshots.iter().map(|(name, _)| (*name).to_owned()).collect(),
        lora,
        critic: checkpoint.critic.map(PartState::of),
        models,
    };
    write_json(&dir.join(STATE), &state)?;
    synchronise(dir)
}

/// Reads the sizes that a checkpoint's model has.
pub(crate) fn read_shape(dir: &Path) -> Result<ModelShape, PolicyError> {
    let path = dir.join(CONFIG);
    read_json::<ConfigFile>(&path)?.shape().map_err(|reason| broken(&path, reason))
}

/// Values of one file.
fn read_values(path: &Path, specs: &[ParameterSpec]) -> Result<Values, PolicyError> {
    read_tensors(path, specs, &[""])?.pop().ok_or_else(|| broken(path, "it is empty"))
}

/// Reads what [`save_training`] wrote beside a model.
fn load_training(dir: &Path, parameters: Parameters, state: &PartState) -> Result<Part, PolicyError> {
    let specs = &parameters.specs;
    let path = dir.join(OPTIMISER);
    let moments = <[Values; 2]>::try_from(read_tensors(&path, specs, &["first.", "second."])?);
    let [first, second] = moments.map_err(|_| broken(&path, "it must hold two moments"))?;
    let gradient = if state.gradient { Some(read_values(&dir.join(GRADIENT), specs)?) } else { None };
    let optimiser = AdamW { first, second, steps: state.optimiser_steps };
    Ok(Part { parameters: Arc::new(parameters), optimiser, gradient, version: state.version })
}

/// Reads a checkpoint: of a plain model, or of adapters on the given ground.
pub(crate) fn load(dir: &Path, ground: Option<Ground<'_>>) -> Result<Checkpoint, PolicyError> {
    let path = dir.join(STATE);
    let state: StateFile = read_json(&path)?;
    if state.format != FORMAT {
        return Err(broken(&path, format!("its format is {} and this build reads {FORMAT}", state.format)));
    }
    let (shape, specs) = match (&ground, &state.lora) {
        (None, None) => {
            let shape = read_shape(dir)?;
            let specs = parameters::specs(&shape);
            (shape, specs)
        }
        (Some(ground), Some(lora)) if lora.base == ground.base => {
            (ground.shape.clone(), ground.layout.specs(ground.shape))
        }
        (Some(_), Some(_)) => return Err(broken(&path, "its adapters are of another base model")),
        (Some(_), None) => {
            return Err(broken(&path, "it holds all weights, where the config asks for adapters (lora)"));
        }
        (None, Some(_)) => return Err(broken(&path, "it holds adapters only: open their base and restore them there")),
    };
    let mut policy_state =
        PartState { version: state.version, optimiser_steps: state.optimiser_steps, gradient: state.gradient };
    let mut named = BTreeMap::new();
    let of_name = |folder: &str, name: &str| match lora::name_problem(name) {
        // The name becomes a path.
        Some(_) => Err(broken(&path, format!("`{name}` is not a model's name"))),
        None => Ok(dir.join(folder).join(name)),
    };
    let parameters = if let (Some(ground), Some(lora)) = (&ground, state.lora) {
        policy_state.version = lora.policy_version;
        for (name, part) in lora.adapters {
            let dir = of_name(ADAPTERS, &name)?;
            let adapter = peft::load(&dir, ground.layout, ground.shape)?;
            named.insert(name, load_training(&dir, adapter, &part)?);
        }
        peft::load(dir, ground.layout, ground.shape)?
    } else {
        let read = |dir: &Path| -> Result<Parameters, PolicyError> {
            let values = read_values(&dir.join(MODEL), &specs)?;
            Ok(Parameters { shape: shape.clone(), specs: specs.clone(), values })
        };
        for (name, part) in state.models {
            let dir = of_name(MODELS, &name)?;
            let model = read(&dir)?;
            named.insert(name, load_training(&dir, model, &part)?);
        }
        read(dir)?
    };
    let policy = load_training(dir, parameters, &policy_state)?;
    let mut snapshots = BTreeMap::new();
    for (index, name) in state.snapshots.into_iter().enumerate() {
        let values = read_values(&dir.join(snapshot_file(index)), &specs)?;
        snapshots.insert(name, Arc::new(Parameters { shape: shape.clone(), specs: specs.clone(), values }));
    }
    let critic = match state.critic {
        Some(part) => {
            let (dir, specs) = (dir.join(CRITIC), weights::critic_specs(&shape));
            let values = read_values(&dir.join(MODEL), &specs)?;
            Some(load_training(&dir, Parameters { shape, specs, values }, &part)?)
        }
        None => None,
    };
    Ok(Checkpoint { policy, named, critic, snapshots })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PolicyConfig;

    #[test]
    fn every_architecture_comes_back_and_a_plain_one_has_no_new_fields() {
        let plain = PolicyConfig::default().shape(300).unwrap();
        let text = serde_json::to_string(&ConfigFile::new(&plain, &[1], "float32").unwrap()).unwrap();
        assert!(text.ends_with(r#""torch_dtype":"float32"}"#), "what was written before is written still: {text}");
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8_192 };
        let shapes = [
            ModelShape { attention_bias: true, attention_out_bias: true, rope_scaling: scaling, ..plain.clone() },
            ModelShape { sliding_window: Some(7), rope_scaling: RopeScaling::Linear { factor: 2.0 }, ..plain.clone() },
            ModelShape { attention_bias: true, sliding_window: Some(7), ..plain.clone() },
            ModelShape { qk_norm: true, head_dim: 48, sliding_window: Some(9), ..plain.clone() },
            plain,
        ];
        for shape in shapes {
            let text = serde_json::to_string(&ConfigFile::new(&shape, &[1], "float32").unwrap()).unwrap();
            assert_eq!(serde_json::from_str::<ConfigFile>(&text).unwrap().shape().unwrap(), shape, "{text}");
        }
    }

    #[test]
    fn rope_scaling_is_written_as_hugging_face_reads_it() {
        let text = r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}"#;
        let scaling: RopeScaling = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&scaling).unwrap(), text);
        assert_eq!(serde_json::from_str::<RopeScaling>(r#"{"rope_type":"default"}"#).unwrap(), RopeScaling::None);
    }
}
