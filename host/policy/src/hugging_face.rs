//! Models as Hugging Face folders hold them: `config.json`, safetensors, tokenizer and chat template.
//!
//! [`ModelFolder::open`] reads and checks everything but the weights' values, so that a folder is refused, and its memory
//! planned, before any of it is taken. What transformers computes of a folder is the measure; `tests/parity` holds small
//! folders with what it says.

mod calls;
mod chat;
mod config;
pub(crate) mod dialect;
mod export;
mod guard;
mod jinja;
mod methods;
mod own;
mod plan;
mod python;
mod tokenizer;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgurite_core::llm::{Message, ToolSpec};
use fulgurite_core::seed::Seed;
use jiff::Zoned;
use serde_json::{Map, Value};

use crate::config::{PolicyConfig, invalid};
use crate::engine::PolicyEngine;
use crate::error::PolicyError;
use crate::inference::Inference;
use crate::parameters;
use crate::shape::ModelShape;
use crate::tokenizer::PolicyTokenizer;

use self::chat::FolderTemplate;
pub use self::config::ModelDescription;
pub use self::export::{
    ExportOptions, Exported, FileType, Written, adapter_folder, export_adapter, export_checkpoint, holds_adapter,
    import_folder, merge_adapter, named_model, new_folder,
};
pub use self::plan::{MemoryPlan, PlanOptions};
use self::tokenizer::FolderTokenizer;
pub(crate) use self::weights::Weights;

/// A folder whose parts fit one another.
#[derive(Debug)]
pub struct ModelFolder {
    path: PathBuf,
    description: ModelDescription,
    weights: Weights,
    tokenizer: FolderTokenizer,
    template: Option<FolderTemplate>,
}

/// A conversation in the form that chat templates see, with the tools offered in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Objects with `role`, `content` and what else the template knows.
    pub messages: Vec<Value>,
    /// Objects with `type` and `function`; `None` when no tools are offered.
    pub tools: Option<Vec<Value>>,
}

impl Conversation {
    /// The conversation of a call.
    ///
    /// # Errors
    /// When arguments of a tool call or parameters of a tool are not JSON.
    pub fn of_core(messages: &[Message], tools: &[ToolSpec]) -> Result<Self, PolicyError> {
        let tools = tools.iter().map(chat::tool_value).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            messages: messages.iter().map(chat::message_value).collect::<Result<_, _>>()?,
            tools: Some(tools).filter(|tools| !tools.is_empty()),
        })
    }

    /// Reads a list of messages, or an object with `messages` and `tools`, as OpenAI's and Hugging Face's interfaces have
    /// them. Messages and tools are passed to the template as they stand.
    ///
    /// # Errors
    /// Says which field is missing or wrong.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        let no_fields = Map::new();
        let fields = match value {
            Value::Array(_) => &no_fields,
            Value::Object(fields) => fields,
            _ => return Err("it must hold a list of messages, or an object with `messages` and `tools`".to_owned()),
        };
        let list = |value: &Value, field: &str| match value {
            Value::Array(entries) if entries.iter().all(Value::is_object) => Ok(entries.clone()),
            _ => Err(format!("`{field}` must be a list of objects")),
        };
        let messages = if value.is_array() { Some(value) } else { fields.get("messages") };
        let messages = list(messages.ok_or("it has no `messages`: give it a list of them")?, "messages")?;
        if messages.is_empty() {
            return Err("`messages` is empty: give it at least one".to_owned());
        }
        for (at, message) in messages.iter().enumerate() {
            let fix = "give it system, user, assistant or tool";
            match chat::field(message, "role") {
                Value::String(_) => {}
                Value::Null => return Err(format!("`messages[{at}]` has no `role`: {fix}")),
                role => return Err(format!("`messages[{at}].role` is {role}: {fix}")),
            }
        }
        let tools = fields.get("tools").filter(|tools| !tools.is_null());
        if tools.is_none() && fields.contains_key("tool") {
            return Err("it has `tool`: name it `tools`, a list of objects".to_owned());
        }
        Ok(Self { messages, tools: tools.map(|tools| list(tools, "tools")).transpose()? })
    }
}

impl ModelFolder {
    /// Opens a folder and checks it.
    ///
    /// # Errors
    /// Names the file, the field or tensor, and what would be right, when something is missing, damaged, contradictory or not
    /// supported.
    pub fn open(path: &Path) -> Result<Self, PolicyError> {
        if !path.is_dir() {
            return Err(PolicyError::model_file(path, "it is not a folder: name one that holds a config.json"));
        }
        if !path.join("config.json").is_file() {
            let reason = "it has no config.json: name the folder that `save_pretrained` has written";
            return Err(PolicyError::model_file(path, reason));
        }
        let mut description = ModelDescription::read(path)?;
        let weights = Weights::open(path)?;
        // As transformers: a head that is there and says something else is not tied, whatever config.json says.
        if description.shape.tie_embeddings && weights.has_own_head(&description.shape)? {
            description.shape.tie_embeddings = false;
            let reason = "`tie_word_embeddings` is true and `lm_head.weight` is not the embedding: they are not tied";
            description.warnings.push(format!("{}: {reason}", path.join("config.json").display()));
        }
        weights.check(&description.shape)?;
        let tokenizer = FolderTokenizer::read(path)?;
        let (ids, rows) = (tokenizer.vocabulary(), description.shape.vocabulary);
        if ids > rows {
            let reason = format!("it has {ids} token ids and `vocab_size` of config.json is {rows}");
            return Err(PolicyError::model_file(path.join("tokenizer.json"), reason));
        }
        let template = FolderTemplate::read(path)?;
        Ok(Self { path: path.to_owned(), description, weights, tokenizer, template })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model is.
    #[must_use]
    pub fn description(&self) -> &ModelDescription {
        &self.description
    }

    /// Token ids that the tokenizer can make; the embedding may have more rows.
    #[must_use]
    pub fn token_ids(&self) -> usize {
        self.tokenizer.vocabulary()
    }

    /// Whether conversations can be rendered.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Types of the values in the files (`float32`, `float16`, `bfloat16`), with the bytes of each.
    #[must_use]
    pub fn types(&self) -> BTreeMap<&'static str, u64> {
        self.weights.types()
    }

    /// Safetensors files that the weights are spread over.
    #[must_use]
    pub fn files(&self) -> usize {
        self.weights.files()
    }

    /// Reads the weights, for questions about given ids. Of `config` the device and the limits count.
    ///
    /// # Errors
    /// When a file has become unreadable, a limit does not fit, or a thread cannot be started.
    pub fn inference(&self, config: &PolicyConfig) -> Result<Inference, PolicyError> {
        self.inference_of(config, self.description.shape.context_tokens_max)
    }

    /// The same for that many tokens, prompt and completion together, where the model's context is shorter: positions go on,
    /// as in transformers, and the model has not been trained on them.
    ///
    /// # Errors
    /// As of [`inference`](Self::inference), and when there are more tokens than any context may have.
    pub fn inference_of(&self, config: &PolicyConfig, tokens: usize) -> Result<Inference, PolicyError> {
        let shape = &self.description.shape;
        let shape = ModelShape { context_tokens_max: tokens.max(shape.context_tokens_max), ..shape.clone() };
        Inference::from_tensors(config, &shape, &self.weights.sizes(), |name| self.weights.read(name))
    }

    /// The first tensor with a value that is no finite number; reads all of them.
    ///
    /// # Errors
    /// When a file has become unreadable.
    pub fn first_not_finite(&self) -> Result<Option<PolicyError>, PolicyError> {
        for spec in parameters::specs(&self.description.shape) {
            if self.weights.read(&spec.name)?.iter().any(|value| !value.is_finite()) {
                let reason = format!("`{}` has values that are no numbers: train or copy it again", spec.name);
                return Ok(Some(PolicyError::model_file(self.weights.file_of(&spec.name), reason)));
            }
        }
        Ok(None)
    }

    /// A policy that starts from these weights and speaks this folder's dialect. Of `config` the device and the limits count, and
    /// `context_tokens_max`, which makes the context shorter than the model's.
    ///
    /// # Errors
    /// When the folder cannot hold conversations, a file has become unreadable, a limit does not fit, or a thread cannot be
    /// started.
    pub fn engine(&self, config: &PolicyConfig, seed: Seed) -> Result<PolicyEngine, PolicyError> {
        let mut shape = self.description.shape.clone();
        if let Some(tokens) = config.context_tokens_max {
            if tokens > shape.context_tokens_max {
                let reason =
                    format!("the context of the model in `{}` holds {}", self.path.display(), shape.context_tokens_max);
                return Err(invalid("context_tokens_max", tokens, &reason));
            }
            shape.context_tokens_max = tokens;
        }
        let tokenizer = PolicyTokenizer::of_folder(&self.path)?;
        let sizes = self.weights.sizes();
        PolicyEngine::from_tensors(config, tokenizer, &shape, &sizes, seed, |name| self.weights.read(name))
    }

    /// The text of a conversation as `apply_chat_template` renders it. A template that asks for the date gets today's.
    ///
    /// # Errors
    /// When the folder has no chat template, or the template refuses the conversation.
    pub fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String, PolicyError> {
        let Some(template) = &self.template else {
            let reason = "it has no chat template: put one into chat_template.jinja";
            return Err(PolicyError::model_file(&self.path, reason));
        };
        let tools = conversation.tools.as_deref();
        let rendered = template.render(&conversation.messages, tools, add_generation_prompt, &Zoned::now());
        let rendered = rendered.map_err(|error| match error {
            PolicyError::Template(text) => {
                let file = template.file(tools.is_some()).display();
                PolicyError::Template(format!("{text}; it is that of {file}: mend it, or change the conversation"))
            }
            other => other,
        })?;
        if rendered.is_empty() {
            let reason = "the chat template writes nothing for this conversation: mend it";
            return Err(PolicyError::model_file(template.file(tools.is_some()), reason));
        }
        Ok(rendered)
    }

    /// Token ids of a rendered conversation. Whatever spells an added token becomes it, wherever in the text it stands, as in
    /// transformers; nothing is put in front, so that the template's own `bos_token` stays the only one.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, rendered: &str) -> Result<Vec<u32>, PolicyError> {
        self.tokenizer.encode_rendered(rendered)
    }

    /// Text of token ids, added tokens spelled out. Ids that the tokenizer does not know are left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids)
    }
}

#[cfg(test)]
mod tests;
