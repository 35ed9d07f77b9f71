//! Adapters in the layout of PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{read_json, write_json, write_tensors};
use crate::error::PolicyError;
use crate::hugging_face::Weights;
use crate::lora::{AdapterLayout, LoraConfig, LoraTarget};
use crate::parameters::{ParameterSpec, Parameters, check_tensors};
use crate::shape::ModelShape;

/// Settings, as PEFT writes them.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// Tensors, in PEFT's names and layout.
pub(crate) const MODEL: &str = "adapter_model.safetensors";

/// The part of PEFT's settings that says what is computed. What must have one value is checked to have it. What has none is left
/// out: PEFT looks into some of these fields and does not expect a null there.
#[derive(Debug, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own in PEFT's file")]
struct ConfigFile {
    peft_type: String,
    task_type: Option<String>,
    /// PEFT wants the field to be there; a checkpoint leaves it empty, an export names the base.
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    target_modules: BTreeSet<String>,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    bias: Bias,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    modules_to_save: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rank_pattern: Option<serde_json::Map<String, serde_json::Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alpha_pattern: Option<serde_json::Map<String, serde_json::Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers_to_transform: Option<serde_json::Value>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Bias {
    #[default]
    None,
    All,
    LoraOnly,
}

impl ConfigFile {
    fn new(layout: &AdapterLayout, base: Option<&str>) -> Self {
        Self {
            peft_type: "LORA".to_owned(),
            task_type: Some("CAUSAL_LM".to_owned()),
            base_model_name_or_path: base.map(str::to_owned),
            r: layout.rank,
            lora_alpha: layout.alpha,
            target_modules: layout.targets.iter().map(|target| target.module().to_owned()).collect(),
            lora_dropout: 0.0,
            bias: Bias::None,
            fan_in_fan_out: false,
            use_rslora: false,
            use_dora: false,
            inference_mode: true,
            modules_to_save: None,
            rank_pattern: None,
            alpha_pattern: None,
            layers_to_transform: None,
        }
    }

    /// What is computed, or why it cannot be. Dropout is for training elsewhere and does not matter.
    fn layout(self) -> Result<AdapterLayout, String> {
        let is_set = |map: &Option<serde_json::Map<_, _>>| map.as_ref().is_some_and(|map| !map.is_empty());
        let unsupported = [
            ("peft_type", self.peft_type != "LORA"),
            ("bias", self.bias != Bias::None),
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("use_dora", self.use_dora),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty())),
            ("rank_pattern", is_set(&self.rank_pattern)),
            ("alpha_pattern", is_set(&self.alpha_pattern)),
            ("layers_to_transform", self.layers_to_transform.as_ref().is_some_and(|layers| !layers.is_null())),
        ];
        if let Some((field, _)) = unsupported.into_iter().find(|(_, is_unsupported)| *is_unsupported) {
            return Err(format!("`{field}` asks for something that is not supported: only plain LoRA is"));
        }
        let target = |name: &String| {
            let found = LoraTarget::ALL.into_iter().find(|target| target.module() == name);
            found.ok_or_else(|| {
                let known = LoraTarget::ALL.map(LoraTarget::module).join(", ");
                format!("`target_modules` has `{name}`, where {known} are supported")
            })
        };
        let targets = self.target_modules.iter().map(target).collect::<Result<_, _>>()?;
        // rsLoRA divides by the root of the rank (Kalajdzievski 2023): the same as another alpha.
        let alpha = self.lora_alpha * if self.use_rslora { (self.r as f64).sqrt() } else { 1.0 };
        let config = LoraConfig { rank: self.r, alpha, targets, ..LoraConfig::default() };
        config.check().map_err(|error| error.to_string())?;
        Ok(AdapterLayout::new(&config))
    }
}

/// Why an adapter is not of the kind that the config asks for, if it is not.
fn difference(found: &AdapterLayout, wanted: &AdapterLayout) -> Option<String> {
    let modules = |layout: &AdapterLayout| layout.targets.iter().map(|t| t.module()).collect::<Vec<_>>().join(", ");
    if found.rank != wanted.rank {
        Some(format!("`r` is {} and `rank` of the config is {}", found.rank, wanted.rank))
    } else if (found.alpha - wanted.alpha).abs() > f64::EPSILON * wanted.alpha {
        Some(format!("`lora_alpha` is {} and `alpha` of the config is {}", found.alpha, wanted.alpha))
    } else if found.targets != wanted.targets {
        Some(format!("`target_modules` are {} and `targets` of the config are {}", modules(found), modules(wanted)))
    } else {
        None
    }
}

/// Writes an adapter into a folder, synchronised with the disk.
pub(crate) fn save(dir: &Path, layout: &AdapterLayout, adapter: &Parameters) -> Result<(), PolicyError> {
    std::fs::create_dir_all(dir).map_err(PolicyError::io(dir))?;
    save_config(dir, layout, None)?;
    write_tensors(&dir.join(MODEL), &adapter.specs, &[("", &adapter.values)])
}

/// Writes an adapter's settings into a folder; `base` names the model under it.
pub(crate) fn save_config(dir: &Path, layout: &AdapterLayout, base: Option<&str>) -> Result<(), PolicyError> {
    write_json(&dir.join(CONFIG), &ConfigFile::new(layout, base))
}

/// Reads what kind of adapter a folder holds.
///
/// # Errors
/// When its settings cannot be read or ask for more than plain LoRA.
pub(crate) fn read_layout(dir: &Path) -> Result<AdapterLayout, PolicyError> {
    let path = dir.join(CONFIG);
    if !path.is_file() {
        let reason =
            format!("it is missing: an adapter's folder holds it and {MODEL}, as PEFT and `policy export` write them");
        return Err(PolicyError::model_file(&path, reason));
    }
    read_json::<ConfigFile>(&path)?.layout().map_err(|reason| PolicyError::model_file(&path, reason))
}

/// Reads an adapter of this layout for a base of this shape.
///
/// # Errors
/// When a file is missing or damaged, or the adapter is of another kind, rank, scale, or other targets or sizes.
pub(crate) fn load(dir: &Path, layout: &AdapterLayout, shape: &ModelShape) -> Result<Parameters, PolicyError> {
    if let Some(reason) = difference(&read_layout(dir)?, layout) {
        return Err(PolicyError::model_file(dir.join(CONFIG), reason));
    }
    let path = dir.join(MODEL);
    let file = Weights::open_file(path.clone())?;
    let specs = layout.specs(shape);
    check_tensors(shape, &specs, &file.sizes()).map_err(|error| PolicyError::model_file(&path, error.to_string()))?;
    let read = |spec: &ParameterSpec| Ok(spec.values_from_file(file.read(&spec.name)?));
    let values = specs.iter().map(read).collect::<Result<_, PolicyError>>()?;
    Ok(Parameters { shape: shape.clone(), specs, values })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::Value;

    use super::*;
    use crate::config::PolicyConfig;
    use crate::hugging_face::ModelFolder;
    use crate::inference::Inference;

    fn parity() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
    }

    fn adapted(name: &str) -> Inference {
        let folder = ModelFolder::open(&parity().join("fixtures").join(name)).unwrap();
        let plain = folder.inference(&PolicyConfig::default()).unwrap();
        plain.with_adapter(&parity().join("adapters").join(name)).unwrap()
    }

    fn expected(name: &str) -> Value {
        let text = std::fs::read_to_string(parity().join("adapters").join(name).join("expected.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// `tests/parity/make_adapters.py` has written what PEFT computes.
    #[test]
    fn adapters_of_peft_give_its_logits_and_its_gradient() {
        for name in ["qwen2", "qwen3"] {
            let (inference, want) = (adapted(name), expected(name));
            let number = |value: &Value| value.as_f64().unwrap();
            let ids: Vec<u32> = serde_json::from_value(want["ids"].clone()).unwrap();
            let from: usize = serde_json::from_value(want["prompt_tokens"].clone()).unwrap();
            let logits = inference.logits(&ids[..from], from - 1).unwrap();
            let differences = logits.iter().zip(want["last_logits"].as_array().unwrap());
            let difference = differences.map(|(got, want)| (f64::from(*got) - number(want)).abs()).fold(0.0, f64::max);
            assert!(difference < 1e-4, "{name}: {difference}");
            let found = inference.cross_entropy(&ids, from).unwrap();
            for (got, key) in [(found.mean, "cross_entropy"), (found.gradient_norm, "grad_norm")] {
                assert!((got - number(&want[key])).abs() < 1e-4 * number(&want[key]), "{name} {key}: {got}");
            }
        }
    }

    #[test]
    fn an_adapter_comes_back_from_its_files_and_another_kind_is_refused() {
        let from = parity().join("adapters/qwen3");
        let shape = ModelFolder::open(&parity().join("fixtures/qwen3")).unwrap().description().shape.clone();
        let layout = read_layout(&from).unwrap();
        let adapter = load(&from, &layout, &shape).unwrap();
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &layout, &adapter).unwrap();
        assert_eq!(read_layout(dir.path()).unwrap(), layout);
        assert_eq!(load(dir.path(), &layout, &shape).unwrap(), adapter);

        let refused = |layout: &AdapterLayout| load(dir.path(), layout, &shape).unwrap_err().to_string();
        assert!(refused(&AdapterLayout { rank: 8, ..layout.clone() }).contains("`r` is 4 and `rank`"));
        assert!(refused(&AdapterLayout { alpha: 1.0, ..layout.clone() }).contains("`lora_alpha` is 6 and `alpha`"));
        let all = AdapterLayout { targets: LoraTarget::ALL.to_vec(), ..layout.clone() };
        assert!(refused(&all).contains("`target_modules` are q_proj, v_proj"));
        let other = ModelShape { layers: shape.layers + 1, ..shape.clone() };
        let error = load(dir.path(), &layout, &other).unwrap_err().to_string();
        assert!(error.contains("adapter_model.safetensors") && error.contains("layers.2.self_attn"), "{error}");

        let path = dir.path().join(CONFIG);
        let plain = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, plain.replace(r#""use_rslora": false"#, r#""use_rslora": true"#)).unwrap();
        // 6 over the root of 4, where plain LoRA has 6 over 4.
        assert_eq!(read_layout(dir.path()).unwrap(), AdapterLayout { alpha: 12.0, ..layout.clone() });
        std::fs::write(&path, plain).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for (change, field) in [
            (r#""use_dora": true"#, "use_dora"),
            (r#""bias": "all""#, "bias"),
            (r#""rank_pattern": {"q_proj": 2}"#, "rank_pattern"),
            (r#""r": 0"#, "lora.rank"),
        ] {
            let mut value: Value = serde_json::from_str(&text).unwrap();
            let change: Value = serde_json::from_str(&format!("{{{change}}}")).unwrap();
            value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            std::fs::write(&path, value.to_string()).unwrap();
            let error = read_layout(dir.path()).unwrap_err().to_string();
            assert!(error.contains(CONFIG) && error.contains(field), "{error}");
        }
    }
}
