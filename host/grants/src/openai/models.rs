//! Whether an endpoint is there and has the model: asked before a run, so that a wrong address is told at once and not by a
//! thousand rollouts that fail.

use serde::Deserialize;

use super::{ServerKind, Shared, refusal};

/// Names of models that a message tells.
const NAMES_TOLD_MAX: usize = 8;

/// What a server says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointFacts {
    /// Its models; empty when it does not tell.
    pub models: Vec<String>,
    /// Tokens that the model's context holds, where it tells.
    pub context_tokens_max: Option<u32>,
    /// The kind of server that it seems to be, when that is not the configured one.
    pub seems: Option<ServerKind>,
}

/// Why an endpoint cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointCheckError {
    /// Nobody answers.
    #[error("`{section}`: nobody answers at {url}: {problem}; start the server, or correct `{section}.url`")]
    Unreachable {
        /// Its place in the config.
        section: String,
        /// What was asked for.
        url: String,
        /// Why not.
        problem: String,
    },
    /// It answers with an error.
    #[error("`{section}`: {url} answers: {problem}")]
    Refused {
        /// Its place in the config.
        section: String,
        /// What was asked for.
        url: String,
        /// What it answers.
        problem: String,
    },
    /// It has other models.
    #[error("`{section}.model`: the server has no model `{model}`; it has {}", .known.join(", "))]
    UnknownModel {
        /// Its place in the config.
        section: String,
        /// What was configured.
        model: String,
        /// Some that it has.
        known: Vec<String>,
    },
}

#[derive(Debug, Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
struct Model {
    id: String,
    #[serde(default)]
    owned_by: Option<String>,
    /// vLLM and SGLang.
    #[serde(default)]
    max_model_len: Option<u32>,
}

impl Shared {
    pub(super) async fn check(&self) -> Result<EndpointFacts, EndpointCheckError> {
        let settings = &self.settings;
        let (section, url) = (settings.section.clone(), self.url("/models"));
        let response = self.send("GET", "/models", &[]).await.map_err(|error| EndpointCheckError::Unreachable {
            section: section.clone(),
            url: url.clone(),
            problem: error.to_string(),
        })?;
        let models: Models = match response.status {
            200 => serde_json::from_slice(&response.body).map_err(|error| EndpointCheckError::Refused {
                section: section.clone(),
                url: url.clone(),
                problem: format!("no list of models: {error}"),
            })?,
            // Some servers know chat completions and nothing else.
            404 | 405 | 501 => return Ok(EndpointFacts::default()),
            _ => {
                let problem = match refusal::of_response(settings, &response, 0) {
                    refusal::Refusal::Again { problem, .. } => problem,
                    refusal::Refusal::Final(error) => error.to_string(),
                };
                return Err(EndpointCheckError::Refused { section, url, problem });
            }
        };
        let found = models.data.iter().find(|model| model.id == settings.model);
        // llama.cpp has one model and answers by it, whatever its name.
        if found.is_none() && settings.server != ServerKind::LlamaCpp && !models.data.is_empty() {
            let known = models.data.iter().take(NAMES_TOLD_MAX).map(|model| format!("`{}`", model.id)).collect();
            return Err(EndpointCheckError::UnknownModel { section, model: settings.model.clone(), known });
        }
        let found = found.or(models.data.first());
        let seems = found.and_then(|model| match model.owned_by.as_deref()? {
            "vllm" => Some(ServerKind::Vllm),
            "sglang" => Some(ServerKind::Sglang),
            "llamacpp" => Some(ServerKind::LlamaCpp),
            _ => None,
        });
        Ok(EndpointFacts {
            context_tokens_max: found.and_then(|model| model.max_model_len),
            seems: seems.filter(|kind| *kind != settings.server),
            models: models.data.into_iter().map(|model| model.id).collect(),
        })
    }
}
