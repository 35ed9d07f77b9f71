//! The tensors of a folder, memory-mapped: one `model.safetensors`, or shards joined by an index.
//!
//! Opening reads headers only, so that a model can be described before any memory is taken for it. A tensor becomes f32 when
//! it is read; the pages of the file behind it are the kernel's to drop.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::f16;
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::PolicyError;
use crate::parameters;
use crate::shape::ModelShape;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Names listed in one error; a wrong `config.json` makes hundreds of them.
const NAMES_SHOWN: usize = 4;

/// The weights of a model on disk.
#[derive(Debug)]
pub(crate) struct Weights {
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    place: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors begin in the file.
    start: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, PolicyError> {
        let file = File::open(&path).map_err(PolicyError::io(&path))?;
        // SAFETY: the map is read-only. Nothing but convention keeps another process from changing the file meanwhile; then
        // values are wrong or the process ends with SIGBUS, which every reader of mapped weights accepts: a copy would need
        // the model's size in memory.
        #[expect(unsafe_code, reason = "memory maps are unsafe by their interface; see above")]
        let map = unsafe { Mmap::map(&file) }.map_err(PolicyError::io(&path))?;
        let unreadable = |error| PolicyError::model_file(&path, format!("it is not a whole safetensors file: {error}"));
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(unreadable)?;
        // Eight bytes give the header's length.
        let start = header + 8;
        Ok(Self { path, map, metadata, start })
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (from, to) = info.data_offsets;
        self.map.get(self.start + from..self.start + to).unwrap_or_default()
    }
}

fn shown(names: &[String]) -> String {
    let list = names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMES_SHOWN) {
        0 => list,
        more => format!("{list} and {more} more"),
    }
}

impl Weights {
    /// Opens the safetensors of a folder.
    ///
    /// # Errors
    /// When there are none, one is damaged, or the index names a file or tensor that is not there.
    pub(crate) fn open(dir: &Path) -> Result<Self, PolicyError> {
        let single = dir.join(SINGLE);
        if single.is_file() {
            return Self::open_file(single);
        }
        let path = dir.join(INDEX);
        if path.is_file() {
            return Self::open_shards(dir, &path);
        }
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().any(|f| dir.join(f).is_file());
        let hint =
            if pickled { "; its pytorch_model.bin is not read: save it anew with safe_serialization=True" } else { "" };
        Err(PolicyError::model_file(dir, format!("it has neither {SINGLE} nor {INDEX}{hint}")))
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub(crate) fn open_file(path: PathBuf) -> Result<Self, PolicyError> {
        let shard = Shard::open(path)?;
        let place = shard.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { shards: vec![shard], place })
    }

    fn open_shards(dir: &Path, path: &Path) -> Result<Self, PolicyError> {
        let text = std::fs::read(path).map_err(PolicyError::io(path))?;
        let wrong = |reason: String| PolicyError::model_file(path, reason);
        let index: Index = serde_json::from_slice(&text).map_err(|error| wrong(format!("`weight_map`: {error}")))?;
        if index.weight_map.is_empty() {
            return Err(wrong("`weight_map` is empty: it must name the file of every tensor".to_owned()));
        }
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut shards = Vec::new();
        let mut place = BTreeMap::new();
        for name in names {
            // The index comes from elsewhere: it must not reach outside its folder.
            if Path::new(name).file_name().is_none_or(|file| file != name.as_str()) {
                return Err(wrong(format!("`weight_map` names `{name}`: a shard must be a file of the same folder")));
            }
            let shard = dir.join(name);
            if !shard.is_file() {
                return Err(wrong(format!("the shard `{name}` is missing: copy or download it again")));
            }
            let shard = Shard::open(shard)?;
            let mut surplus = Vec::new();
            for tensor in shard.metadata.offset_keys() {
                if index.weight_map.get(&tensor) == Some(name) {
                    place.insert(tensor, shards.len());
                } else {
                    surplus.push(tensor);
                }
            }
            if !surplus.is_empty() {
                let reason = format!("the shard `{name}` holds {}, which `weight_map` does not say", shown(&surplus));
                return Err(wrong(reason));
            }
            shards.push(shard);
        }
        let missing: Vec<String> = index.weight_map.keys().filter(|name| !place.contains_key(*name)).cloned().collect();
        if missing.is_empty() {
            return Ok(Self { shards, place });
        }
        Err(wrong(format!("the shards lack {}, which `weight_map` promises", shown(&missing))))
    }

    fn find(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let shard = self.shards.get(*self.place.get(name)?)?;
        Some((shard, shard.metadata.info(name)?))
    }

    /// Checks that the tensors of a model are there, in its sizes and in a type that can be read, and no others.
    pub(crate) fn check(&self, shape: &ModelShape) -> Result<(), PolicyError> {
        let specs = parameters::specs(shape);
        parameters::check_tensors(shape, &specs, &self.sizes())
            .map_err(|error| PolicyError::model_file(self.path(), error.to_string()))?;
        for spec in specs {
            let Some((shard, info)) = self.find(&spec.name) else { continue };
            if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                let reason = format!("`{}` is {:?}: supported are F32, F16 and BF16", spec.name, info.dtype);
                return Err(PolicyError::model_file(&shard.path, reason));
            }
        }
        Ok(())
    }

    /// Whether there is an output projection of the right size whose values are not the embedding's.
    pub(crate) fn has_own_head(&self, shape: &ModelShape) -> Result<bool, PolicyError> {
        const TIED: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];
        let [Some(embedding), Some(head)] = TIED.map(|name| self.find(name)) else { return Ok(false) };
        if [embedding.1, head.1].iter().any(|info| info.shape != [shape.vocabulary, shape.d_model]) {
            return Ok(false);
        }
        if embedding.1.dtype == head.1.dtype {
            return Ok(embedding.0.bytes(embedding.1) != head.0.bytes(head.1));
        }
        let [embedding, head] = TIED.map(|name| self.read(name));
        Ok(embedding? != head?)
    }

    /// Name and sizes of every tensor.
    pub(crate) fn sizes(&self) -> BTreeMap<String, Vec<usize>> {
        let sizes = |name: &String| Some((name.clone(), self.find(name)?.1.shape.clone()));
        self.place.keys().filter_map(sizes).collect()
    }

    /// The file that an error about all tensors names: the only one, or the first shard's folder.
    fn path(&self) -> &Path {
        match self.shards.as_slice() {
            [only] => &only.path,
            [first, ..] => first.path.parent().unwrap_or(&first.path),
            [] => Path::new(""),
        }
    }

    /// The file that holds a tensor.
    pub(crate) fn file_of(&self, name: &str) -> &Path {
        self.find(name).map_or_else(|| self.path(), |(shard, _)| &shard.path)
    }

    /// Types found, with the bytes of each.
    pub(crate) fn types(&self) -> BTreeMap<&'static str, u64> {
        let mut all = BTreeMap::new();
        for name in self.place.keys() {
            let Some((shard, info)) = self.find(name) else { continue };
            let kind = match info.dtype {
                Dtype::F32 => "float32",
                Dtype::F16 => "float16",
                Dtype::BF16 => "bfloat16",
                _ => "other",
            };
            *all.entry(kind).or_default() += shard.bytes(info).len() as u64;
        }
        all
    }

    /// Files that hold the tensors.
    pub(crate) fn files(&self) -> usize {
        self.shards.len()
    }

    /// The values of a tensor in the file's order, as f32.
    ///
    /// # Errors
    /// When there is no such tensor, or it has another type.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, PolicyError> {
        let Some((shard, info)) = self.find(name) else {
            return Err(PolicyError::model_file(self.path(), format!("it lacks {name}")));
        };
        let wrong = |reason: String| PolicyError::model_file(&shard.path, reason);
        let bytes = shard.bytes(info);
        Ok(match info.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            // The upper half of an f32.
            Dtype::BF16 => {
                let value = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                bytes.as_chunks::<2>().0.iter().map(value).collect()
            }
            other => return Err(wrong(format!("`{name}` is {other:?}: supported are F32, F16 and BF16"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn every_type_reads_as_the_number_it_means() {
        let dir = tempfile::tempdir().unwrap();
        // 1, -2, the smallest subnormal, infinity.
        let halves: [u16; 4] = [0x3c00, 0xc000, 0x0001, 0x7c00];
        let brains: [u16; 4] = [0x3f80, 0xc000, 0x0001, 0x7f80];
        let bytes = |bits: [u16; 4]| bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
        write(
            &dir.path().join(SINGLE),
            &[
                ("full", Dtype::F32, &[2, 2], f32s(&[1.0, -2.0, 1e-40, f32::INFINITY])),
                ("half", Dtype::F16, &[4], bytes(halves)),
                ("brain", Dtype::BF16, &[2, 2], bytes(brains)),
                ("whole", Dtype::I32, &[1], vec![0; 4]),
            ],
        );
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.read("full").unwrap(), [1.0, -2.0, 1e-40, f32::INFINITY]);
        assert_eq!(weights.read("half").unwrap(), [1.0, -2.0, 2.0_f32.powi(-24), f32::INFINITY]);
        assert_eq!(weights.read("brain").unwrap(), [1.0, -2.0, f32::from_bits(0x0001_0000), f32::INFINITY]);
        let error = weights.read("whole").unwrap_err().to_string();
        assert!(error.contains("I32") && error.contains("BF16") && error.contains(SINGLE), "{error}");
    }

    #[test]
    fn a_head_is_ones_own_when_its_values_are() {
        let shape = crate::PolicyConfig::default().shape(1).unwrap();
        let shape = ModelShape { d_model: 2, ..shape };
        let dir = tempfile::tempdir().unwrap();
        let own = |head: (Dtype, &[usize], Vec<u8>)| {
            let embedding = ("model.embed_tokens.weight", Dtype::F32, [1, 2].as_slice(), f32s(&[1.0, -2.0]));
            write(&dir.path().join(SINGLE), &[embedding, ("lm_head.weight", head.0, head.1, head.2)]);
            Weights::open(dir.path()).unwrap().has_own_head(&shape).unwrap()
        };
        assert!(!own((Dtype::F32, &[1, 2], f32s(&[1.0, -2.0]))));
        assert!(own((Dtype::F32, &[1, 2], f32s(&[1.0, -2.5]))));
        assert!(!own((Dtype::BF16, &[1, 2], vec![0x80, 0x3f, 0x00, 0xc0])), "the same values in another type");
        assert!(own((Dtype::BF16, &[1, 2], vec![0x80, 0x3f, 0x01, 0xc0])));
        assert!(!own((Dtype::F32, &[2, 1], f32s(&[1.0, -2.5]))), "of another size: not this model's");
    }

    #[test]
    fn what_does_not_fit_names_file_and_tensor() {
        let shape = crate::PolicyConfig { d_ff: Some(16), ..crate::PolicyConfig::default() }.shape(300).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let zeros = vec![0; 4 * 300 * 128];
        let write_all = |change: &dyn Fn(&str) -> Option<Dtype>| {
            let specs = parameters::specs(&shape);
            let tensors = specs.iter().filter_map(|spec| {
                let dtype = change(&spec.name)?;
                let bytes = zeros[..spec.len() * dtype.bitsize() / 8].to_vec();
                Some((spec.name.clone(), dtype, spec.file_dims(), bytes))
            });
            let tensors: Vec<_> = tensors.collect();
            let tensors: Vec<_> =
                tensors.iter().map(|(n, t, s, b)| (n.as_str(), *t, s.as_slice(), b.clone())).collect();
            write(&dir.path().join(SINGLE), &tensors);
            Weights::open(dir.path()).unwrap().check(&shape).map_err(|error| error.to_string())
        };
        write_all(&|_| Some(Dtype::BF16)).unwrap();
        let error = write_all(&|name| (name != "model.norm.weight").then_some(Dtype::F32)).unwrap_err();
        assert!(error.contains(SINGLE) && error.contains("missing: `model.norm.weight` [128]"), "{error}");
        let error = write_all(&|name| Some(if name == "lm_head.weight" { Dtype::I8 } else { Dtype::F16 })).unwrap_err();
        assert!(error.contains("`lm_head.weight` is I8") && error.contains("BF16"), "{error}");
    }

    #[test]
    fn shards_must_be_what_the_index_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let one = |name, value| (name, Dtype::F32, [1].as_slice(), f32s(&[value]));
        let index = |map: serde_json::Value| {
            std::fs::write(path(INDEX), serde_json::json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
        };
        let refused = |expected: &[&str]| {
            let error = Weights::open(dir.path()).unwrap_err().to_string();
            for text in expected {
                assert!(error.contains(text), "no {text:?} in {error}");
            }
        };
        refused(&[SINGLE, INDEX]);
        std::fs::write(path("pytorch_model.bin"), "").unwrap();
        refused(&["pytorch_model.bin", "safe_serialization"]);

        write(&path("1.safetensors"), &[one("a", 1.0)]);
        let both = serde_json::json!({"a": "1.safetensors", "b": "2.safetensors"});
        index(both.clone());
        refused(&[INDEX, "`2.safetensors` is missing"]);
        write(&path("2.safetensors"), &[one("b", 2.0)]);
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!((weights.read("b").unwrap(), weights.files()), (vec![2.0], 2));

        write(&path("2.safetensors"), &[one("b", 2.0), one("c", 3.0)]);
        refused(&["`2.safetensors` holds c"]);
        write(&path("2.safetensors"), &[one("a", 2.0)]);
        refused(&["`2.safetensors` holds a"]);
        write(&path("2.safetensors"), &[]);
        refused(&["lack b"]);
        let whole = std::fs::read(path("1.safetensors")).unwrap();
        std::fs::write(path("2.safetensors"), &whole[..whole.len() - 1]).unwrap();
        refused(&["2.safetensors", "not a whole"]);
        std::fs::write(path("2.safetensors"), "").unwrap();
        refused(&["2.safetensors"]);
        for outside in ["../1.safetensors", "/1.safetensors", "x/1.safetensors", ".."] {
            index(serde_json::json!({"a": outside}));
            refused(&[outside, "same folder"]);
        }
        for empty in ["{}", r#"{"weight_map": {}}"#] {
            std::fs::write(path(INDEX), empty).unwrap();
            refused(&[INDEX, "weight_map"]);
        }
    }
}
