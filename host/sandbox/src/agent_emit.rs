//! `fulgurite:agent/emit`: what an agent tells about its work.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::sync::Arc;

use fulgurite_core::llm::Message;
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::{Attribute, SpanBody, SpanStatus};
use wasmtime::component::Resource;

use crate::agent::AgentState;
use crate::agent_llm::is_json;
use crate::bindings::agent::fulgurite::agent::emit;
use crate::bindings::agent::fulgurite::types::types;
use crate::convert;
use crate::fault::Stop;
use crate::recorder::{Begun, GuestLog, refused};
use crate::tape::ABANDONED_SPAN;

/// A span that the guest has opened. It is recorded when it is dropped, by the guest or with its store.
pub struct OpenSpan {
    log: Arc<GuestLog>,
    begun: Begun,
    name: String,
    attributes: Vec<Attribute>,
    bytes: usize,
    recorded: bool,
}

impl OpenSpan {
    fn close(&mut self, status: SpanStatus) -> Result<(), Stop> {
        if std::mem::replace(&mut self.recorded, true) {
            return Ok(());
        }
        let (name, attributes) = (std::mem::take(&mut self.name), std::mem::take(&mut self.attributes));
        let ended = self.log.recorder.end_with(self.begun, &name, attributes, SpanBody::Guest, status);
        ended.map_err(|refusal| refused(&refusal))
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        // Nobody is left to stop when the sink refuses it.
        let _ = self.close(SpanStatus::Error(ABANDONED_SPAN.to_owned()));
    }
}

impl emit::HostSpan for AgentState {
    fn new(&mut self, name: String, attributes: Vec<types::Attribute>) -> wasmtime::Result<Resource<OpenSpan>> {
        let (attributes, bytes) = convert::attributes_from_wit(attributes);
        let bytes = bytes.saturating_add(name.len());
        let log = Arc::clone(&self.host.log);
        log.check_bytes(bytes).map_err(Stop::error)?;
        log.take_span().map_err(Stop::error)?;
        let begun = log.recorder.open();
        Ok(self.table.push(OpenSpan { log, begun, name, attributes, bytes, recorded: false })?)
    }

    fn annotate(&mut self, span: Resource<OpenSpan>, attributes: Vec<types::Attribute>) -> wasmtime::Result<()> {
        self.host.log.recorder.act().map_err(Stop::error)?;
        let (attributes, bytes) = convert::attributes_from_wit(attributes);
        let span = self.table.get_mut(&span)?;
        span.bytes = span.bytes.saturating_add(bytes);
        self.host.log.check_bytes(span.bytes).map_err(Stop::error)?;
        span.attributes.extend(attributes);
        Ok(())
    }

    fn drop(&mut self, span: Resource<OpenSpan>) -> wasmtime::Result<()> {
        self.host.log.recorder.act().map_err(Stop::error)?;
        let mut span = self.table.delete(span)?;
        span.close(SpanStatus::Unset).map_err(Stop::error)
    }
}

impl AgentState {
    fn emit(&self, name: &str, attributes: Vec<Attribute>, body: SpanBody) -> wasmtime::Result<()> {
        self.host.log.emit(name, attributes, body).map_err(Stop::error)
    }
}

impl emit::Host for AgentState {
    fn reward(&mut self, dimension: String, value: f64, llm_call: Option<u64>) -> wasmtime::Result<()> {
        let reward = Reward {
            dimension,
            value,
            feedback: None,
            source: RewardSource::Agent,
            component: None,
            call_index: llm_call,
        };
        reward.check().map_err(|invalid| Stop::trap(format!("emit.reward: {invalid}")).error())?;
        let name = format!("reward {}", reward.dimension);
        self.emit(&name, vec![], SpanBody::Reward(reward))
    }

    fn annotation(&mut self, attributes: Vec<types::Attribute>) -> wasmtime::Result<()> {
        let (attributes, bytes) = convert::attributes_from_wit(attributes);
        self.host.log.check_bytes(bytes).map_err(Stop::error)?;
        self.emit("annotation", attributes, SpanBody::Annotation)
    }

    fn message(&mut self, role: types::Role, content: String) -> wasmtime::Result<()> {
        self.host.log.check_bytes(content.len()).map_err(Stop::error)?;
        let message = Message::text(convert::role_from_wit(role), content);
        self.emit("message", vec![], SpanBody::Message(message))
    }

    fn object(&mut self, name: String, json: String) -> wasmtime::Result<()> {
        self.host.log.check_bytes(name.len().saturating_add(json.len())).map_err(Stop::error)?;
        if !is_json(&json) {
            return Err(Stop::trap(format!("emit.object: the value of `{name}` is not JSON")).error());
        }
        self.emit("object", vec![], SpanBody::Object { name, value: json })
    }

    fn log(&mut self, level: emit::Level, text: String) -> wasmtime::Result<()> {
        self.host.log.check_bytes(text.len()).map_err(Stop::error)?;
        let level = match level {
            emit::Level::Trace => "trace",
            emit::Level::Debug => "debug",
            emit::Level::Info => "info",
            emit::Level::Warn => "warn",
            emit::Level::Error => "error",
        };
        self.emit("log", vec![], SpanBody::Log { level: level.to_owned(), text })
    }
}
