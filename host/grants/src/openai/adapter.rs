//! New LoRA adapters for a vLLM server while it serves: `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`. The server
//! offers them when it was started with `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
//!
//! Calls ask for the adapter that was pushed last. One that is under way ends on the adapter that it began with.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::LlmError;
use fulgurite_core::seed::Seed;
use serde_json::json;

use super::Shared;

/// An adapter for a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterPush {
    /// Its name: what a request asks for as its model. A new one for every version, so that requests under way end on the
    /// weights that they began with.
    pub name: String,
    /// A PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) as the server's machine sees it.
    pub path: PathBuf,
    /// The adapter that it replaces; unloaded once the new one is there.
    pub replaces: Option<String>,
}

/// What calls ask for in place of the endpoint's model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Served {
    /// The adapter's name.
    pub(super) name: String,
    /// What the weights are in the records of a run.
    pub(super) version: PolicyVersion,
}

impl Shared {
    /// What calls ask for from now on.
    pub(super) fn serve(&self, served: Served) {
        *self.served.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(served));
    }

    pub(super) fn served(&self) -> Option<Arc<Served>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// See [`super::OpenAiEndpoint::push_adapter`].
    pub(super) async fn push_adapter(&self, push: &AdapterPush) -> Result<(), LlmError> {
        let load = json!({"lora_name": push.name, "lora_path": push.path});
        self.adapter("/load_lora_adapter", &load, "already been loaded").await?;
        match &push.replaces {
            Some(old) => self.unload(old).await,
            None => Ok(()),
        }
    }

    /// Takes an adapter away.
    pub(super) async fn unload(&self, name: &str) -> Result<(), LlmError> {
        self.adapter("/unload_lora_adapter", &json!({"lora_name": name}), "cannot be found").await
    }

    /// Sends one of the two, again where that can help. When the answer to a try was lost, the next one is told what is true
    /// already, which is not an error.
    async fn adapter(&self, path: &str, body: &serde_json::Value, already: &str) -> Result<(), LlmError> {
        let body = body.to_string().into_bytes();
        match self.ask(path, &body, 0, Seed::new(0).child(path)).await {
            Err(LlmError::InvalidRequest(text) | LlmError::Unavailable(text)) if text.contains(already) => Ok(()),
            answer => answer.map(|_| ()),
        }
    }
}
