//! `fulgurite:agent/resources` and `fulgurite:agent/task`: what an agent may read.

use std::sync::Arc;

use fulgurite_core::span::SpanBody;

use crate::agent::AgentState;
use crate::bindings::agent::fulgurite::agent::{resources, task};
use crate::bindings::agent::fulgurite::types::types;
use crate::convert;
use crate::fault::Stop;
use fulgurite_core::outcome::OutcomeKind;

impl AgentState {
    fn unknown_template(&self) -> resources::ResourceError {
        let names: Vec<&str> = self.host.templates.names().collect();
        resources::ResourceError::UnknownTemplate(if names.is_empty() {
            "there are no templates".to_owned()
        } else {
            format!("there are: {}", names.join(", "))
        })
    }

    fn record_template(
        &self,
        name: String,
        variables: Option<String>,
        result: &Result<String, resources::ResourceError>,
    ) -> wasmtime::Result<()> {
        let limit = self.host.limits.payload_bytes_max;
        if result.as_ref().is_ok_and(|text| text.len() as u64 > limit) {
            return Err(Stop::limit(OutcomeKind::OutputLimit, "payload_bytes_max", limit).error());
        }
        let recorded = match result {
            Ok(text) => Ok(text.clone()),
            Err(
                resources::ResourceError::UnknownTemplate(text)
                | resources::ResourceError::InvalidVariables(text)
                | resources::ResourceError::Other(text),
            ) => Err(text.clone()),
        };
        let version = self.host.templates.version();
        let body = SpanBody::Template { name, version, variables, result: recorded };
        self.host.log.emit("template", vec![], body).map_err(Stop::error)
    }
}

impl resources::Host for AgentState {
    fn template(&mut self, name: String) -> wasmtime::Result<Result<String, resources::ResourceError>> {
        let result = match self.host.templates.text(&name) {
            Some(text) => Ok(text.to_owned()),
            None => Err(self.unknown_template()),
        };
        self.record_template(name, None, &result)?;
        Ok(result)
    }

    fn render(
        &mut self,
        name: String,
        variables: String,
    ) -> wasmtime::Result<Result<String, resources::ResourceError>> {
        let templates = Arc::clone(&self.host.templates);
        let result = match serde_json::from_str(&variables) {
            Ok(parsed) => match templates.render(&name, &parsed) {
                Some(rendered) => rendered.map_err(resources::ResourceError::InvalidVariables),
                None => Err(self.unknown_template()),
            },
            Err(error) => {
                let text = format!("the variables are not a JSON object: {error}");
                Err(resources::ResourceError::InvalidVariables(text))
            }
        };
        self.record_template(name, Some(variables), &result)?;
        Ok(result)
    }

    fn version(&mut self) -> wasmtime::Result<u64> {
        Ok(self.host.templates.version())
    }
}

impl task::Host for AgentState {
    fn mode(&mut self) -> wasmtime::Result<types::Mode> {
        Ok(convert::mode_to_wit(self.host.mode))
    }

    fn seed(&mut self) -> wasmtime::Result<u64> {
        Ok(self.host.log.recorder.seed().value())
    }
}
