//! `config.json` and `generation_config.json`: what the model of a Hugging Face folder is.
//!
//! Fields are taken out by name rather than derived: a wrong one is reported with its name, its value and what would be
//! right, which serde's own errors do not have. Where a field is absent its default is that of the architecture's config
//! class in transformers, because `save_pretrained` of older versions left defaults out.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::PolicyError;
use crate::shape::{Architecture, ModelShape, RopeScaling};

/// What the model of a folder is, with every default filled in.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelDescription {
    /// Which decoder.
    pub architecture: Architecture,
    /// Sizes and switches. The vocabulary is the embedding's rows; the tokenizer may have fewer ids.
    pub shape: ModelShape,
    /// Ids that end a completion, ascending.
    pub end_tokens: Vec<u32>,
    /// What the files say and is not followed, as transformers does not follow it. For people.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

const ARCHITECTURES: [Architecture; 4] =
    [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

impl ModelDescription {
    /// Reads `config.json` and, where it is there, `generation_config.json` of a folder.
    ///
    /// # Errors
    /// When a file cannot be read, a field is missing or has a value that no model can have, or the model is of a kind that
    /// is not supported; the error names file, field, value and what is supported.
    pub fn read(dir: &Path) -> Result<Self, PolicyError> {
        let fields = Fields::read(dir.join("config.json"))?;
        let generation = dir.join("generation_config.json");
        let generation = if generation.is_file() { Some(Fields::read(generation)?) } else { None };
        let description = describe(&fields, generation.as_ref())?;
        check(&fields, &description)?;
        Ok(description)
    }
}

/// Ids that end a completion, ascending: those of `generation_config.json` where it names some, else those of `config.json`.
pub(crate) fn end_tokens(dir: &Path) -> Result<Vec<u32>, PolicyError> {
    let read = |name: &str| {
        let path = dir.join(name);
        if path.is_file() { Fields::read(path)?.token_ids("eos_token_id") } else { Ok(None) }
    };
    let mut ids = match read("generation_config.json")? {
        Some(ids) => ids,
        None => read("config.json")?.unwrap_or_default(),
    };
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Sizes that do not fit one another, by the names that the file has for them.
fn check(fields: &Fields, description: &ModelDescription) -> Result<(), PolicyError> {
    let shape = &description.shape;
    if !shape.heads.is_multiple_of(shape.kv_heads.max(1)) {
        let (heads, kv_heads) = (shape.heads, shape.kv_heads);
        let reason = "it must divide `num_attention_heads`";
        return Err(fields.wrong(format!("`num_key_value_heads` is {kv_heads}: {reason} ({heads})")));
    }
    for (field, value, least) in [("rope_theta", shape.rope_theta, 1.0), ("rms_norm_eps", shape.rms_norm_epsilon, 0.0)]
    {
        if !(value.is_finite() && value > least) {
            return Err(fields.wrong(format!("`{field}` is {value}: it must be a number above {least}")));
        }
    }
    shape.check().map_err(|error| match error {
        PolicyError::InvalidConfig { field, value, reason } => {
            fields.wrong(format!("`{}` is {value}: {reason}", name_in_file(field)))
        }
        other => other,
    })?;
    Ok(())
}

/// What `config.json` calls a field of a shape.
fn name_in_file(field: &str) -> &str {
    match field {
        "d_model" => "hidden_size",
        "layers" => "num_hidden_layers",
        "heads" => "num_attention_heads",
        "kv_heads" => "num_key_value_heads",
        "d_ff" => "intermediate_size",
        "vocabulary" => "vocab_size",
        "context_tokens_max" => "max_position_embeddings",
        other => other,
    }
}

/// An object of a JSON file, for errors that name both.
struct Fields {
    path: PathBuf,
    /// Where in the file, with a dot at its end; empty at the top.
    within: &'static str,
    map: Map<String, Value>,
}

impl Fields {
    fn read(path: PathBuf) -> Result<Self, PolicyError> {
        let text = std::fs::read(&path).map_err(PolicyError::io(&path))?;
        match serde_json::from_slice(&text) {
            Ok(Value::Object(map)) => Ok(Self { path, within: "", map }),
            Ok(_) => Err(PolicyError::model_file(path, "it must hold a JSON object")),
            Err(error) => Err(PolicyError::model_file(path, format!("it is not JSON: {error}"))),
        }
    }

    fn wrong(&self, reason: impl Into<String>) -> PolicyError {
        PolicyError::model_file(&self.path, reason)
    }

    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, field: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, PolicyError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let within = self.within;
        let wrong = || self.wrong(format!("`{within}{field}` is {value}: it must be {kind}"));
        read(value).map(Some).ok_or_else(wrong)
    }

    fn size(&self, field: &str) -> Result<Option<usize>, PolicyError> {
        self.typed(field, "a whole number", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    fn required_size(&self, field: &str) -> Result<usize, PolicyError> {
        let within = self.within;
        self.size(field)?.ok_or_else(|| self.wrong(format!("it has no `{within}{field}`: give it a whole number")))
    }

    fn number(&self, field: &str) -> Result<Option<f64>, PolicyError> {
        self.typed(field, "a number", Value::as_f64)
    }

    fn required_number(&self, field: &str) -> Result<f64, PolicyError> {
        let within = self.within;
        self.number(field)?.ok_or_else(|| self.wrong(format!("it has no `{within}{field}`: give it a number")))
    }

    fn flag(&self, field: &str) -> Result<bool, PolicyError> {
        Ok(self.typed(field, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn text(&self, field: &str) -> Result<Option<String>, PolicyError> {
        self.typed(field, "a text", |value| value.as_str().map(str::to_owned))
    }

    fn object(&self, field: &'static str, within: &'static str) -> Result<Option<Self>, PolicyError> {
        let map = self.typed(field, "an object", |value| value.as_object().cloned())?;
        // Old files have `rope_scaling: {}` where there is none.
        Ok(map.filter(|map| !map.is_empty()).map(|map| Self { path: self.path.clone(), within, map }))
    }

    /// One id or a list of them.
    fn ids<T>(&self, field: &str, id: impl Fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>, PolicyError> {
        self.typed(field, "a token id or a list of them", |value| match value.as_array() {
            Some(list) => list.iter().map(&id).collect(),
            None => Some(vec![id(value)?]),
        })
    }

    /// Ids that a token can have.
    fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>, PolicyError> {
        self.ids(field, |value| value.as_u64().and_then(|id| u32::try_from(id).ok()))
    }
}

fn architecture(fields: &Fields) -> Result<Architecture, PolicyError> {
    let listed = |names: Vec<&str>| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let supported = || listed(ARCHITECTURES.map(Architecture::model_type).to_vec());
    let Some(found) = fields.text("model_type")? else {
        return Err(fields.wrong(format!("it has no `model_type`: supported are {}", supported())));
    };
    let known = ARCHITECTURES.into_iter().find(|known| known.model_type() == found);
    let unsupported = || fields.wrong(format!("`model_type` is `{found}`: supported are {}", supported()));
    let architecture = known.ok_or_else(unsupported)?;
    let classes = fields.typed("architectures", "a list of class names", |value| value.as_array().cloned())?;
    for class in classes.iter().flatten() {
        if class.as_str() != Some(architecture.class_name()) {
            let supported = listed(ARCHITECTURES.map(Architecture::class_name).to_vec());
            return Err(fields.wrong(format!("`architectures` names {class}: supported are {supported}")));
        }
    }
    if let Some(quantised) = fields.object("quantization_config", "quantization_config.")? {
        let method = quantised.text("quant_method")?.unwrap_or_else(|| "unknown".to_owned());
        let reason = "supported are weights in float32, float16 and bfloat16";
        return Err(fields.wrong(format!("`quantization_config` has the method `{method}`: {reason}")));
    }
    let activation = fields.text("hidden_act")?.unwrap_or_else(|| "silu".to_owned());
    // Two names for one function.
    if !matches!(activation.as_str(), "silu" | "swish") {
        return Err(fields.wrong(format!("`hidden_act` is `{activation}`: supported is `silu`")));
    }
    Ok(architecture)
}

/// Base and scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields, context_tokens_max: usize) -> Result<(f64, RopeScaling), PolicyError> {
    // In this order, as transformers does it.
    let given = match fields.object("rope_scaling", "rope_scaling.")? {
        Some(old) => Some(old),
        None => fields.object("rope_parameters", "rope_parameters.")?,
    };
    let outer_theta = fields.number("rope_theta")?;
    let Some(rope) = given else { return Ok((outer_theta.unwrap_or(10_000.0), RopeScaling::None)) };
    let within = rope.within;
    if let Some(nested) = rope.map.iter().find(|(_, value)| value.is_object()) {
        let reason = "one set for all layers is supported";
        return Err(fields.wrong(format!("`{within}{}` is for some layers alone: {reason}", nested.0)));
    }
    for place in [&rope, fields] {
        if let Some(share) = place.number("partial_rotary_factor")?
            && share.to_bits() != 1.0_f64.to_bits()
        {
            return Err(fields.wrong(format!("`partial_rotary_factor` is {share}: supported is 1")));
        }
    }
    let theta = rope.number("rope_theta")?.or(outer_theta).unwrap_or(10_000.0);
    let kind = rope.text("rope_type")?.or(rope.text("type")?).unwrap_or_else(|| "default".to_owned());
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: rope.required_number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: rope.required_number("factor")?,
            low_freq_factor: rope.required_number("low_freq_factor")?,
            high_freq_factor: rope.required_number("high_freq_factor")?,
            // The outer one wins, as in transformers.
            original_context: match fields.size("original_max_position_embeddings")? {
                Some(outer) => outer,
                None => rope.size("original_max_position_embeddings")?.unwrap_or(context_tokens_max),
            },
        },
        other => {
            let supported = "supported are `default`, `linear` and `llama3`";
            return Err(fields.wrong(format!("`{within}rope_type` is `{other}`: {supported}")));
        }
    };
    Ok((theta, scaling))
}

/// Tokens that a token attends to, the same in all layers.
fn sliding_window(fields: &Fields, architecture: Architecture, layers: usize) -> Result<Option<usize>, PolicyError> {
    // An explicit null is not the same as a field that is absent.
    let window = if fields.map.contains_key("sliding_window") { fields.size("sliding_window")? } else { Some(4_096) };
    match architecture {
        Architecture::Llama => return Ok(None),
        Architecture::Mistral => return one_window(fields, window).map(|()| window),
        Architecture::Qwen2 | Architecture::Qwen3 => {}
    }
    let window = if fields.flag("use_sliding_window")? { window } else { None };
    let kinds = fields.typed("layer_types", "a list", |value| value.as_array().cloned())?;
    let full = fields.size("max_window_layers")?.unwrap_or(28);
    let kind = |layer| if window.is_some() && layer >= full { "sliding_attention" } else { "full_attention" };
    let kinds = kinds.unwrap_or_else(|| (0..layers).map(|layer| kind(layer).into()).collect());
    if kinds.len() != layers {
        let found = kinds.len();
        return Err(fields.wrong(format!("`layer_types` has {found} entries: `num_hidden_layers` is {layers}")));
    }
    let mut windows = Vec::new();
    for kind in kinds {
        windows.push(match (kind.as_str(), window) {
            (Some("full_attention"), _) => None,
            (Some("sliding_attention"), Some(window)) => Some(window),
            (Some("sliding_attention"), None) => {
                let reason = "it needs `use_sliding_window` and `sliding_window`";
                return Err(fields.wrong(format!("`layer_types` has `sliding_attention`: {reason}")));
            }
            _ => {
                let supported = "supported are `full_attention` and `sliding_attention`";
                return Err(fields.wrong(format!("`layer_types` has {kind}: {supported}")));
            }
        });
    }
    let first = windows.first().copied().flatten();
    if windows.iter().any(|window| *window != first) {
        let reason =
            "`layer_types` or `max_window_layers` limit it to some layers: supported is one window for all, or none";
        return Err(fields.wrong(format!("`sliding_window` is {}: {reason}", window.unwrap_or_default())));
    }
    Ok(first)
}

/// A Mistral has one window for all layers, or none. A list of kinds that says something else is of another model.
fn one_window(fields: &Fields, window: Option<usize>) -> Result<(), PolicyError> {
    let kinds = fields.typed("layer_types", "a list", |value| value.as_array().cloned())?;
    let all = if window.is_some() { "sliding_attention" } else { "full_attention" };
    match kinds.iter().flatten().find(|kind| kind.as_str() != Some(all)) {
        Some(kind) => {
            let window = window.map_or_else(|| "null".to_owned(), |window| window.to_string());
            let supported = "supported is one window for all layers, or none";
            Err(fields.wrong(format!("`layer_types` has {kind} and `sliding_window` is {window}: {supported}")))
        }
        None => Ok(()),
    }
}

fn describe(fields: &Fields, generation: Option<&Fields>) -> Result<ModelDescription, PolicyError> {
    let architecture = architecture(fields)?;
    let qwen3 = architecture == Architecture::Qwen3;
    let heads = fields.required_size("num_attention_heads")?;
    let kv_heads = match (fields.size("num_key_value_heads")?, architecture) {
        (Some(kv_heads), _) => kv_heads,
        (None, _) if fields.map.contains_key("num_key_value_heads") => heads,
        (None, Architecture::Llama) => heads,
        (None, Architecture::Mistral) => 8,
        (None, Architecture::Qwen2 | Architecture::Qwen3) => 32,
    };
    let d_model = fields.required_size("hidden_size")?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if qwen3 => 128,
        None if heads > 0 && d_model.is_multiple_of(heads) => d_model / heads,
        None => {
            let reason = format!("it must be a multiple of `num_attention_heads` ({heads}), or `head_dim` be given");
            return Err(fields.wrong(format!("`hidden_size` is {d_model}: {reason}")));
        }
    };
    let layers = fields.required_size("num_hidden_layers")?;
    if layers > 1_024 {
        return Err(fields.wrong(format!("`num_hidden_layers` is {layers}: it must be 1 to 1024")));
    }
    let context_tokens_max = match (fields.size("max_position_embeddings")?, architecture) {
        (Some(tokens), _) => tokens,
        (None, Architecture::Llama) => 2_048,
        (None, Architecture::Mistral) => 131_072,
        (None, Architecture::Qwen2 | Architecture::Qwen3) => 32_768,
    };
    let (rope_theta, rope_scaling) = rope(fields, context_tokens_max)?;
    let vocabulary = fields.required_size("vocab_size")?;
    let (end_tokens, warnings) = usable_ends(fields, generation, vocabulary)?;
    let attention_bias =
        matches!(architecture, Architecture::Llama | Architecture::Qwen3) && fields.flag("attention_bias")?;
    if architecture == Architecture::Llama && fields.flag("mlp_bias")? {
        return Err(fields.wrong("`mlp_bias` is true: supported are feed-forward parts without biases"));
    }
    let shape = ModelShape {
        d_model,
        layers,
        heads,
        kv_heads,
        head_dim,
        d_ff: fields.required_size("intermediate_size")?,
        vocabulary,
        context_tokens_max,
        rope_theta,
        rms_norm_epsilon: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        tie_embeddings: fields.flag("tie_word_embeddings")?,
        attention_bias: attention_bias || architecture == Architecture::Qwen2,
        attention_out_bias: attention_bias,
        qk_norm: qwen3,
        rope_scaling,
        // Folders that this program writes of its own presets say false.
        rope_f32: fields.typed("rope_f32", "true or false", Value::as_bool)?.unwrap_or(true),
        sliding_window: sliding_window(fields, architecture, layers)?,
    };
    Ok(ModelDescription { architecture, shape, end_tokens, warnings })
}

/// The end tokens that the model can write, ascending, and a warning for each other: -1 and ids beyond the vocabulary say
/// that there is none, and transformers loads them.
fn usable_ends(
    fields: &Fields,
    generation: Option<&Fields>,
    vocabulary: usize,
) -> Result<(Vec<u32>, Vec<String>), PolicyError> {
    let (mut ends, mut warnings) = (Vec::new(), Vec::new());
    for file in generation.into_iter().chain([fields]) {
        let Some(ids) = file.ids("eos_token_id", Value::as_i64)? else { continue };
        for id in ids {
            match u32::try_from(id) {
                Ok(id) if (id as usize) < vocabulary => ends.push(id),
                _ => {
                    let path = file.path.display();
                    let reason = format!("it is not one of the {vocabulary} ids and is left out");
                    warnings.push(format!("{path}: `eos_token_id` {id}: {reason}"));
                }
            }
        }
        break;
    }
    ends.sort_unstable();
    ends.dedup();
    Ok((ends, warnings))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
            "max_position_embeddings": 256, "eos_token_id": 7,
        })
    }

    fn read(change: &Value, generation: Option<&Value>) -> Result<ModelDescription, PolicyError> {
        let mut config = base();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        if let Some(generation) = generation {
            std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        ModelDescription::read(dir.path())
    }

    #[test]
    fn both_spellings_of_rope_are_the_same() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32});
        let mut newer = scaling.clone();
        newer["rope_type"] = "llama3".into();
        let mut oldest = newer.clone();
        newer["rope_theta"] = 5e5.into();
        let old = read(&json!({"rope_theta": 5e5, "rope_scaling": oldest}), None).unwrap();
        oldest.as_object_mut().unwrap().remove("rope_type");
        oldest["type"] = "llama3".into();
        let very_old = read(&json!({"rope_theta": 5e5, "rope_scaling": oldest}), None).unwrap();
        let new = read(&json!({"rope_parameters": newer}), None).unwrap();
        assert_eq!((&old, &very_old), (&new, &new));
        assert!(matches!(new.shape.rope_scaling, RopeScaling::Llama3 { original_context: 32, .. }));
        let outer = json!({"rope_theta": 5e5, "rope_scaling": oldest, "original_max_position_embeddings": 64});
        let outer = read(&outer, None).unwrap().shape.rope_scaling;
        assert!(matches!(outer, RopeScaling::Llama3 { original_context: 64, .. }));
        let plain = read(&json!({"rope_theta": 5e5, "rope_scaling": null}), None).unwrap();
        assert_eq!((plain.shape.rope_theta, plain.shape.rope_scaling), (5e5, RopeScaling::None));
    }

    #[test]
    fn end_tokens_of_generation_config_win() {
        let ends = |generation: Option<Value>| read(&json!({}), generation.as_ref()).unwrap().end_tokens;
        assert_eq!(ends(None), [7]);
        assert_eq!(ends(Some(json!({"temperature": 0.6}))), [7]);
        assert_eq!(ends(Some(json!({"eos_token_id": [9, 3, 9]}))), [3, 9]);
        assert_eq!(ends(Some(json!({"eos_token_id": 8}))), [8]);
        let beyond = read(&json!({}), Some(&json!({"eos_token_id": [-1, 320, 3]}))).unwrap();
        assert_eq!((beyond.end_tokens, beyond.warnings.len()), (vec![3], 2));
        assert!(beyond.warnings[0].contains("generation_config.json: `eos_token_id` -1"), "{:?}", beyond.warnings);
        assert!(
            read(&json!({"eos_token_id": 320}), None).unwrap().warnings[0].contains("config.json: `eos_token_id` 320")
        );
    }

    #[test]
    fn a_window_is_that_of_all_layers_or_refused() {
        let with = |base: &Value, change: Value| {
            let mut base = base.clone();
            base.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            base
        };
        let window = |change: &Value| read(change, None).map(|description| description.shape.sliding_window);
        assert_eq!(window(&json!({"sliding_window": 5})).unwrap(), None, "Llama has none");
        let mistral = json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"]});
        assert_eq!(window(&mistral).unwrap(), Some(4_096), "the default of its class");
        assert_eq!(window(&with(&mistral, json!({"sliding_window": null}))).unwrap(), None);
        assert_eq!(window(&with(&mistral, json!({"sliding_window": 5}))).unwrap(), Some(5));
        let kinds = |kinds: &[&str]| json!({"sliding_window": 5, "layer_types": kinds});
        let (sliding, full) = ("sliding_attention", "full_attention");
        assert_eq!(window(&with(&mistral, kinds(&[sliding, sliding, sliding]))).unwrap(), Some(5));
        for mixed in [[full, sliding, full], [full, full, full]] {
            let error = window(&with(&mistral, kinds(&mixed))).unwrap_err().to_string();
            for text in ["`layer_types`", full, "`sliding_window` is 5", "one window for all layers"] {
                assert!(error.contains(text), "{mixed:?}: no {text:?} in {error}");
            }
        }
        let qwen = json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 5});
        assert_eq!(window(&qwen).unwrap(), None, "given and not in use");
        let used = with(&qwen, json!({"use_sliding_window": true}));
        assert_eq!(window(&used).unwrap(), None, "28 layers have none by default");
        assert_eq!(window(&with(&used, json!({"max_window_layers": 0}))).unwrap(), Some(5));
        let some = window(&with(&used, json!({"max_window_layers": 2}))).unwrap_err().to_string();
        assert!(some.contains("`sliding_window` is 5") && some.contains("some layers"), "{some}");
        let types = json!({"layer_types": vec!["sliding_attention"; 3]});
        assert_eq!(window(&with(&used, types.clone())).unwrap(), Some(5));
        assert!(window(&with(&qwen, types)).unwrap_err().to_string().contains("use_sliding_window"));
    }

    #[test]
    fn what_is_not_supported_is_named_with_what_is() {
        let cases = [
            (json!({"model_type": "gemma2"}), ["`gemma2`", "`qwen3`"]),
            (
                json!({"architectures": ["LlamaForSequenceClassification"]}),
                ["SequenceClassification", "LlamaForCausalLM"],
            ),
            (json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), ["`yarn`", "`llama3`"]),
            (
                json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                       "rope_parameters": {"rope_type": "yarn", "factor": 16.0}}),
                ["`rope_parameters.rope_type` is `yarn`", "`llama3`"],
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
                ["full_attention", "all layers"],
            ),
            (
                json!({"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4}}),
                ["partial_rotary_factor", "0.5"],
            ),
            (json!({"hidden_act": "gelu"}), ["`gelu`", "`silu`"]),
            (json!({"quantization_config": {"quant_method": "gptq"}}), ["`gptq`", "bfloat16"]),
            (json!({"num_key_value_heads": 3}), ["num_key_value_heads", "divide"]),
            (json!({"hidden_size": "64"}), ["`hidden_size` is \"64\"", "whole number"]),
            (json!({"vocab_size": null}), ["no `vocab_size`", "whole number"]),
            (json!({"hidden_size": 65}), ["`hidden_size` is 65", "head_dim"]),
            (json!({"num_attention_heads": 0}), ["`hidden_size`", "multiple"]),
            (json!({"head_dim": 15}), ["`head_dim` is 15", "even"]),
            (json!({"mlp_bias": true}), ["`mlp_bias`", "without biases"]),
            (json!({"vocab_size": 0, "eos_token_id": null}), ["`vocab_size` is 0", "use 1 to"]),
            (json!({"eos_token_id": [1, "a"]}), ["`eos_token_id`", "token id"]),
            (json!({"rms_norm_eps": 0}), ["rms_norm_eps", "above 0"]),
            (json!({"num_hidden_layers": 1_u64 << 60}), ["num_hidden_layers", "1024"]),
            (json!({"rope_scaling": {"rope_type": "linear"}}), ["rope_scaling.factor", "number"]),
        ];
        for (change, expected) in cases {
            let error = read(&change, None).unwrap_err().to_string();
            for text in expected.iter().chain(&["config.json"]) {
                assert!(error.contains(text), "{change}: no {text:?} in {error}");
            }
        }
    }
}
