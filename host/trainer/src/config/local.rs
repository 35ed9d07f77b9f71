//! `[policy.local]`: the model that a run trains, and where it comes from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fulgurite_policy::{CriticConfig, LoraConfig, PolicyConfig, holds_adapter};
use serde::{Deserialize, Serialize};

const MODEL: &str = "`fulgurite policy init` makes one with random weights, `fulgurite policy pull` downloads one";
const ADAPTER: &str = "`fulgurite policy export` writes one from a run with [policy.local.lora]";

/// A model in this process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalPolicyConfig {
    /// Where it comes from: a preset with random weights, or `directory`, a Hugging Face folder (relative to the config
    /// file); device and threads.
    #[serde(default)]
    pub model: PolicyConfig,
    /// The tokenizer that is trained for random weights. A folder has its own.
    #[serde(default)]
    pub tokenizer: Option<TokenizerSection>,
    /// Train low-rank adapters over frozen weights. None: all weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Names of further whole models beside the policy, each of its own weights: copies of what the policy starts from, with
    /// optimiser and generating threads of their own. Without adapters only; with them `lora.adapters` names further ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Which further model, of `lora.adapters` or `models`, answers the calls of an agent role. Roles that are not named here ask
    /// the policy. A call trains the model that answered it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, String>,
    /// Offer algorithms a value model, `critic`. None: a plugin that asks for it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub critic: Option<CriticConfig>,
}

impl LocalPolicyConfig {
    /// What the policy engine is told.
    #[must_use]
    pub fn engine(&self) -> PolicyConfig {
        PolicyConfig {
            lora: self.lora.clone(),
            models: self.models.clone(),
            roles: self.roles.clone(),
            critic: self.critic.clone(),
            ..self.model.clone()
        }
    }

    /// The folders that it names.
    pub(super) fn directories(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let adapter = self.lora.as_mut().and_then(|lora| lora.adapter_directory.as_mut());
        self.model.directory.as_mut().into_iter().chain(adapter)
    }

    /// A folder that it names and that is not there, as field and problem.
    pub(super) fn lacking(&self) -> Option<(&'static str, String)> {
        let model = self.model.directory.as_ref().filter(|path| !path.is_dir());
        let adapter = self.lora.as_ref().and_then(|lora| lora.adapter_directory.as_ref());
        let adapter = adapter.filter(|path| !holds_adapter(path));
        let model = model.map(|path| ("model.directory", format!("there is no folder `{}`; {MODEL}", path.display())));
        let holds_none = |path: &PathBuf| format!("`{}` holds no adapter; {ADAPTER}", path.display());
        model.or_else(|| adapter.map(|path| ("lora.adapter_directory", holds_none(path))))
    }

    /// What does not go together, as field and problem.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let fail = |field: &str, problem: &str| Err((format!("policy.local.{field}"), problem.to_owned()));
        self.engine().check_models().map_err(|(field, problem)| (format!("policy.local.{field}"), problem))?;
        if self.model.directory.is_none() {
            return match self.tokenizer {
                Some(_) => Ok(()),
                None => fail(
                    "tokenizer",
                    "missing; say what to train it on (`corpus`), or name a folder with a model and its tokenizer as `policy.local.model.directory`",
                ),
            };
        }
        if self.tokenizer.is_some() {
            return fail("tokenizer", "the folder of `policy.local.model.directory` has its own; remove this section");
        }
        match self.model.field_against_directory() {
            Some(field) => fail(
                &format!("model.{field}"),
                "the folder of `policy.local.model.directory` decides that; remove one of the two",
            ),
            None => Ok(()),
        }
    }
}

/// How the tokenizer is trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerSection {
    /// Datasets whose training splits are the corpus: all text of inputs and of messages in references.
    pub corpus: Vec<String>,
    /// Most tokens, special ones included.
    #[serde(default = "default_vocab_size")]
    pub vocab_size: usize,
    /// Regular expression of texts that must each be one token (numbers, ids).
    #[serde(default)]
    pub atoms_pattern: Option<String>,
}

fn default_vocab_size() -> usize {
    512
}
