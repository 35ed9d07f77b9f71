//! Writes models as Hugging Face folders: a checkpoint, another folder, a new model with random weights, or a folder with an
//! adapter merged into it; and adapters as PEFT's folders.
//!
//! A folder appears whole or not at all: it is written beside its place under another name, read back, and renamed. Weights
//! go from file to file a tensor at a time, so that the memory taken is that of the largest one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgurite_core::seed::Seed;
use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::weights::Weights;
use super::{ModelFolder, own};
use crate::checkpoint::{self, write_config, write_file, write_json};
use crate::config::PolicyConfig;
use crate::error::PolicyError;
use crate::lora::AdapterLayout;
use crate::parameters::{self, ParameterSpec, Parameters};
use crate::peft;
use crate::shape::ModelShape;
use crate::tokenizer::PolicyTokenizer;

/// The type of the numbers in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// As they are computed: nothing is lost.
    F32,
    /// The upper half of an f32: half the size, three digits.
    Bf16,
    /// Half the size, four digits, and nothing above 65,504.
    F16,
}

impl FileType {
    /// The name that `config.json` has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    fn value_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        }
    }
}

/// How a folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportOptions {
    /// The type of the weights; `None` keeps that of the source, and takes f32 where it has several.
    pub file_type: Option<FileType>,
    /// Bytes of tensors in one file; more are spread over shards. 5 GB, as transformers does it.
    pub shard_bytes_max: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { file_type: None, shard_bytes_max: 5_000_000_000 }
    }
}

/// A folder that has been written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// Where.
    pub directory: PathBuf,
    /// Number of weights.
    pub parameters: usize,
    /// The type of the weights.
    pub file_type: FileType,
    /// Safetensors files.
    pub files: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Told how many bytes of tensors of how many are written.
pub type Written<'a> = &'a mut dyn FnMut(u64, u64);

/// Where weights come from, in the layout of files.
enum Source<'a> {
    Files(&'a Weights),
    Memory(&'a Parameters),
    /// A base's files, and an adapter that is added to what is read.
    Merged(&'a Weights, &'a AdapterLayout, &'a Parameters),
}

impl Source<'_> {
    fn read(&self, spec: &ParameterSpec) -> Result<Vec<f32>, PolicyError> {
        match self {
            Self::Files(weights) => weights.read(&spec.name),
            Self::Merged(weights, layout, adapter) => {
                let mut values = spec.values_from_file(weights.read(&spec.name)?);
                layout.add_to(&spec.name, &mut values, adapter);
                Ok(spec.values_for_file(&values))
            }
            Self::Memory(parameters) => {
                let found = parameters.specs.iter().zip(&parameters.values).find(|(known, _)| known.name == spec.name);
                let lacks = || PolicyError::Internal(format!("the weights lack `{}`", spec.name));
                found.map(|(spec, values)| spec.values_for_file(values)).ok_or_else(lacks)
            }
        }
    }

    /// Whether every value is one that f16 can hold.
    fn is_f16(&self) -> bool {
        matches!(self, Self::Files(_)) && self.file_type() == FileType::F16
    }

    /// The type of all values, where there is one.
    fn file_type(&self) -> FileType {
        let types = match self {
            Self::Files(weights) | Self::Merged(weights, ..) => weights.types(),
            Self::Memory(_) => BTreeMap::new(),
        };
        match types.keys().copied().collect::<Vec<_>>().as_slice() {
            ["bfloat16"] => FileType::Bf16,
            ["float16"] => FileType::F16,
            _ => FileType::F32,
        }
    }
}

/// A tensor that is read when it is written.
struct Tensor<'a> {
    spec: &'a ParameterSpec,
    dims: Vec<usize>,
    file_type: FileType,
    source: &'a Source<'a>,
}

impl Tensor<'_> {
    fn len(&self) -> usize {
        self.spec.len() * self.file_type.value_bytes()
    }
}

impl View for &Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.file_type.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.dims
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // Names, sizes and types were checked, and what is written is read back: an empty tensor would be found there.
        self.source.read(self.spec).map(|values| Cow::Owned(self.file_type.bytes(&values))).unwrap_or_default()
    }

    fn data_len(&self) -> usize {
        self.len()
    }
}

/// Writes the policy of a checkpoint (a folder under `policies/` or `checkpoints/` of a run) as a Hugging Face folder: this
/// crate's own tokenizer too.
///
/// # Errors
/// When the checkpoint cannot be read, there is something at `to` already, or the disk refuses.
pub fn export_checkpoint(
    checkpoint: &Path,
    to: &Path,
    options: &ExportOptions,
    written: Written<'_>,
) -> Result<Exported, PolicyError> {
    let shape = checkpoint::read_shape(checkpoint)?;
    let weights = Weights::open(checkpoint)?;
    weights.check(&shape)?;
    let tokenizer = PolicyTokenizer::load(checkpoint)?;
    publish(to, &shape, |dir| {
        write_tokenizer(&tokenizer, dir, &shape)?;
        let found = write_model(dir, &shape, &Source::Files(&weights), options, written)?;
        write_config(dir, &shape, tokenizer.ends(), found.file_type.name())?;
        Ok(found)
    })
}

/// Checks a Hugging Face folder and writes it anew: what is needed and nothing else, weights in one type.
///
/// # Errors
/// When the folder cannot be used as a policy, there is something at `to` already, or the disk refuses.
pub fn import_folder(
    from: &Path,
    to: &Path,
    options: &ExportOptions,
    written: Written<'_>,
) -> Result<Exported, PolicyError> {
    let folder = ModelFolder::open(from)?;
    let tokenizer = PolicyTokenizer::of_folder(from)?;
    let shape = folder.description().shape.clone();
    publish(to, &shape, |dir| {
        tokenizer.save(dir)?;
        let found = write_model(dir, &shape, &Source::Files(&folder.weights), options, written)?;
        write_config(dir, &shape, tokenizer.ends(), found.file_type.name())?;
        Ok(found)
    })
}

/// Writes a model with random weights, which are a function of the seed and the sizes.
///
/// # Errors
/// When the config does not fit itself, there is something at `to` already, or the disk refuses.
pub fn new_folder(
    config: &PolicyConfig,
    tokenizer: &PolicyTokenizer,
    seed: Seed,
    to: &Path,
    options: &ExportOptions,
    written: Written<'_>,
) -> Result<Exported, PolicyError> {
    let shape = config.shape(tokenizer.vocabulary())?;
    publish(to, &shape, |dir| {
        let parameters = Parameters::initial(&shape, config.initial_std, seed);
        write_tokenizer(tokenizer, dir, &shape)?;
        let found = write_model(dir, &shape, &Source::Memory(&parameters), options, written)?;
        write_config(dir, &shape, tokenizer.ends(), found.file_type.name())?;
        Ok(found)
    })
}

/// The folder of a whole model beside the policy, inside of a checkpoint; `None` where it has none of that name.
#[must_use]
pub fn named_model(checkpoint: &Path, name: &str) -> Option<PathBuf> {
    let path = checkpoint.join(checkpoint::MODELS).join(name);
    (crate::lora::name_problem(name).is_none() && path.is_dir()).then_some(path)
}

/// Writes a folder's model with an adapter of PEFT's merged into it: a plain model that needs the adapter no more.
///
/// # Errors
/// When the folder cannot be used as a policy, the adapter is not plain LoRA or does not fit it, there is something at `to`
/// already, or the disk refuses.
pub fn merge_adapter(
    base: &Path,
    adapter: &Path,
    to: &Path,
    options: &ExportOptions,
    written: Written<'_>,
) -> Result<Exported, PolicyError> {
    let folder = ModelFolder::open(base)?;
    let tokenizer = PolicyTokenizer::of_folder(base)?;
    let shape = folder.description().shape.clone();
    let layout = peft::read_layout(adapter)?;
    let adapter = peft::load(adapter, &layout, &shape)?;
    publish(to, &shape, |dir| {
        tokenizer.save(dir)?;
        let source = Source::Merged(&folder.weights, &layout, &adapter);
        let found = write_model(dir, &shape, &source, options, written)?;
        write_config(dir, &shape, tokenizer.ends(), found.file_type.name())?;
        Ok(found)
    })
}

/// Whether a checkpoint holds adapters only.
#[must_use]
pub fn holds_adapter(checkpoint: &Path) -> bool {
    checkpoint.join(peft::CONFIG).is_file()
}

/// The folder of an adapter inside of a checkpoint: the policy's own, or a further one by its name.
///
/// # Errors
/// When the checkpoint has no such adapter.
pub fn adapter_folder(checkpoint: &Path, name: Option<&str>) -> Result<PathBuf, PolicyError> {
    let from = name.map_or_else(|| checkpoint.to_owned(), |name| checkpoint.join(checkpoint::ADAPTERS).join(name));
    if holds_adapter(&from) {
        return Ok(from);
    }
    let reason = match name {
        Some(name) => {
            format!("there is no adapter `{name}`: see [policy.local.lora], or `models`, of the run's config")
        }
        None => "all weights were trained, so that there is no adapter: see [policy.local.lora]".to_owned(),
    };
    Err(PolicyError::model_file(checkpoint, reason))
}

/// Writes an adapter of a checkpoint as a folder that PEFT loads, and servers too: the policy's own, or a further one by its
/// name. `base` is what the folder says of the model under it.
///
/// # Errors
/// When the checkpoint has no such adapter, another type than f32 is asked for, there is something at `to` already, or the
/// disk refuses.
pub fn export_adapter(
    checkpoint: &Path,
    name: Option<&str>,
    base: Option<&str>,
    to: &Path,
    options: &ExportOptions,
) -> Result<Exported, PolicyError> {
    if options.file_type.is_some_and(|file_type| file_type != FileType::F32) {
        let reason =
            "an adapter in another type than float32: its values are small, and its base says what is computed in";
        return Err(PolicyError::Unsupported(reason.to_owned()));
    }
    let from = adapter_folder(checkpoint, name)?;
    let layout = peft::read_layout(&from)?;
    let path = from.join(peft::MODEL);
    let bytes = std::fs::read(&path).map_err(PolicyError::io(&path))?;
    let parameters =
        Weights::open_file(path)?.sizes().values().map(|dims| dims.iter().product::<usize>()).sum::<usize>();
    let write = |dir: &Path| {
        peft::save_config(dir, &layout, base)?;
        write_file(&dir.join(peft::MODEL), &bytes)
    };
    let check = |dir: &Path| {
        let copy = dir.join(peft::MODEL);
        let is_same =
            std::fs::read(&copy).map_err(PolicyError::io(&copy))? == bytes && peft::read_layout(dir)? == layout;
        if is_same { Ok(()) } else { Err(PolicyError::Internal("the adapter was not written as it is".to_owned())) }
    };
    appear(to, write, check)?;
    let bytes = 4 * parameters as u64;
    Ok(Exported { directory: to.to_owned(), parameters, file_type: FileType::F32, files: 1, bytes })
}

fn write_tokenizer(tokenizer: &PolicyTokenizer, dir: &Path, shape: &ModelShape) -> Result<(), PolicyError> {
    if tokenizer.is_of_folder() { tokenizer.save(dir) } else { own::write(tokenizer, dir, shape.context_tokens_max) }
}

/// Makes the folder of a model appear.
fn publish(
    to: &Path,
    shape: &ModelShape,
    write: impl FnOnce(&Path) -> Result<Exported, PolicyError>,
) -> Result<Exported, PolicyError> {
    let found = appear(to, write, |dir| {
        if ModelFolder::open(dir)?.description().shape == *shape {
            return Ok(());
        }
        Err(PolicyError::Internal("the written config.json says something else than it should".to_owned()))
    })?;
    Ok(Exported { directory: to.to_owned(), ..found })
}

/// Lets a folder be written under another name, reads it back and renames it.
fn appear<T>(
    to: &Path,
    write: impl FnOnce(&Path) -> Result<T, PolicyError>,
    check: impl FnOnce(&Path) -> Result<(), PolicyError>,
) -> Result<T, PolicyError> {
    let taken = || PolicyError::model_file(to, "there is something already: remove it or choose another place");
    // An empty folder is no loss.
    let is_free = match std::fs::read_dir(to) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    if !is_free {
        return Err(taken());
    }
    let Some(name) = to.file_name() else {
        return Err(PolicyError::model_file(to, "it is no name of a folder that could be made"));
    };
    let temporary = to.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    std::fs::create_dir_all(&temporary).map_err(PolicyError::io(&temporary))?;
    let done = write(&temporary).and_then(|found| {
        check(&temporary)?;
        let synced = std::fs::File::open(&temporary).and_then(|dir| dir.sync_all());
        synced.map_err(PolicyError::io(&temporary))?;
        std::fs::rename(&temporary, to).map_err(PolicyError::io(to))?;
        Ok(found)
    });
    if done.is_err() {
        // What went wrong is worth more than that nothing could be tidied up.
        drop(std::fs::remove_dir_all(&temporary));
    }
    done
}

/// A weight that f16 cannot hold would become infinite.
fn check_range(specs: &[ParameterSpec], source: &Source<'_>) -> Result<(), PolicyError> {
    for spec in specs {
        let too_large = |value: &&f32| value.is_finite() && f16::from_f32(**value).is_infinite();
        if let Some(value) = source.read(spec)?.iter().find(too_large) {
            let reason = format!("`{}` has {value}, which float16 cannot hold: take bf16 or f32", spec.name);
            return Err(PolicyError::Unsupported(reason));
        }
    }
    Ok(())
}

/// Writes the tensors: into one file, or into shards with an index.
fn write_model(
    dir: &Path,
    shape: &ModelShape,
    source: &Source<'_>,
    options: &ExportOptions,
    written: Written<'_>,
) -> Result<Exported, PolicyError> {
    let file_type = options.file_type.unwrap_or_else(|| source.file_type());
    let specs = parameters::specs(shape);
    if file_type == FileType::F16 && !source.is_f16() {
        check_range(&specs, source)?;
    }
    let tensor = |spec| Tensor { spec, dims: ParameterSpec::file_dims(spec), file_type, source };
    let mut shards: Vec<Vec<Tensor<'_>>> = vec![];
    let mut room = 0;
    for tensor in specs.iter().map(tensor) {
        let bytes = tensor.len() as u64;
        if let Some(shard) = shards.last_mut().filter(|_| bytes <= room) {
            shard.push(tensor);
        } else {
            shards.push(vec![tensor]);
            room = options.shard_bytes_max;
        }
        room = room.saturating_sub(bytes);
    }
    let total: u64 = shards.iter().flatten().map(|tensor| tensor.len() as u64).sum();
    let mut places = BTreeMap::new();
    let mut done = 0;
    written(done, total);
    for (at, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        let path = dir.join(&name);
        let views = shard.iter().map(|tensor| (tensor.spec.name.as_str(), tensor));
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize_to_file(views, metadata, &path)
            .map_err(|error| PolicyError::model_file(&path, error.to_string()))?;
        std::fs::File::open(&path).and_then(|file| file.sync_all()).map_err(PolicyError::io(&path))?;
        places.extend(shard.iter().map(|tensor| (tensor.spec.name.clone(), name.clone())));
        done += shard.iter().map(|tensor| tensor.len() as u64).sum::<u64>();
        written(done, total);
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": places});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    let parameters = shape.parameter_count();
    Ok(Exported { directory: dir.to_owned(), parameters, file_type, files: shards.len(), bytes: total })
}

#[cfg(test)]
#[path = "export_tests.rs"]
mod tests;
