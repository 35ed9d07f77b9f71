//! Bare wasmtime, as a yardstick: the same component on the same kind of engine, with host functions that do nothing.
//!
//! What it leaves out is what the sandbox is for: no limits but memory's, no metering of time, no recording, no virtual
//! clock, no seeded random, no checks of what a guest hands over. The ratio between the two is what all of that costs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use wasmtime::component::{HasSelf, Linker, Resource, ResourceTable};
use wasmtime::{Engine, Store, StoreLimits, StoreLimitsBuilder};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::engine::Sandbox;
use crate::plugin::{PluginError, PluginWorld, incompatible};

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]
mod bindings {
    wasmtime::component::bindgen!({
        path: ["../../wit/types", "../../wit/agent"],
        world: "fulgurite:agent/agent",
        imports: { "fulgurite:agent/llm.chat": async, default: trappable },
        exports: { default: async },
        require_store_data_send: true,
    });
}

use bindings::AgentPre;
use bindings::fulgurite::agent::{emit, llm, resources, task, tools};
use bindings::fulgurite::types::types;

/// An agent without a sandbox around it but wasmtime's own.
pub struct BareAgent {
    engine: Engine,
    pre: AgentPre<State>,
    answer: Arc<str>,
}

impl std::fmt::Debug for BareAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BareAgent").finish_non_exhaustive()
    }
}

struct State {
    wasi: WasiCtx,
    table: ResourceTable,
    limits: StoreLimits,
    answer: Arc<str>,
    wait: Duration,
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl Sandbox {
    /// Loads an agent whose every model call is answered with `answer`.
    ///
    /// # Errors
    /// As [`Sandbox::load_agent`].
    pub fn load_bare_agent(&self, path: &Path, answer: &str) -> Result<BareAgent, PluginError> {
        let artifact = self.load(path, PluginWorld::Agent)?;
        let engine = artifact.world.engine.clone();
        let failed = |error: wasmtime::Error| incompatible(path, PluginWorld::Agent, &error);
        let mut linker: Linker<State> = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker).map_err(failed)?;
        bindings::Agent::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state).map_err(failed)?;
        let pre = linker.instantiate_pre(&artifact.component).and_then(AgentPre::new).map_err(failed)?;
        Ok(BareAgent { engine, pre, answer: answer.into() })
    }
}

impl BareAgent {
    /// Runs the agent once; every model call takes `wait`. Says whether it returned.
    pub async fn run(&self, input: &str, wait: Duration) -> bool {
        let state = State {
            wasi: WasiCtx::builder().build(),
            table: ResourceTable::new(),
            limits: StoreLimitsBuilder::new().memory_size(64 << 20).build(),
            answer: Arc::clone(&self.answer),
            wait,
        };
        let mut store = Store::new(&self.engine, state);
        store.limiter(|state| &mut state.limits);
        // The ticker of the engine never gets there.
        store.set_epoch_deadline(1 << 40);
        let Ok(agent) = self.pre.instantiate_async(&mut store).await else { return false };
        matches!(agent.call_run(&mut store, input).await, Ok(Ok(_)))
    }
}

/// What a guest may not ask of the yardstick.
fn not_here<T>() -> wasmtime::Result<T> {
    Err(wasmtime::Error::msg("the bare yardstick runs agents that call a model and emit spans, and nothing else"))
}

/// The one handle of each kind.
fn handle<T: 'static>() -> Resource<T> {
    Resource::new_own(0)
}

impl types::Host for State {}

impl llm::HostRequest for State {
    fn new(&mut self) -> wasmtime::Result<Resource<llm::Request>> {
        Ok(handle())
    }
    fn add_system(&mut self, _: Resource<llm::Request>, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn add_user(&mut self, _: Resource<llm::Request>, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn add_assistant(
        &mut self,
        _: Resource<llm::Request>,
        _: String,
        _: Vec<types::ToolCall>,
        _: Option<String>,
    ) -> wasmtime::Result<()> {
        Ok(())
    }
    fn add_tool_result(&mut self, _: Resource<llm::Request>, _: String, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_tools(&mut self, _: Resource<llm::Request>, _: Vec<types::ToolSpec>) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_temperature(&mut self, _: Resource<llm::Request>, _: f32) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_top_p(&mut self, _: Resource<llm::Request>, _: f32) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_top_k(&mut self, _: Resource<llm::Request>, _: u32) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_min_p(&mut self, _: Resource<llm::Request>, _: f32) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_max_tokens(&mut self, _: Resource<llm::Request>, _: u32) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_stop(&mut self, _: Resource<llm::Request>, _: Vec<String>) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_seed(&mut self, _: Resource<llm::Request>, _: u64) -> wasmtime::Result<()> {
        Ok(())
    }
    fn constrain_json(&mut self, _: Resource<llm::Request>, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn constrain_regex(&mut self, _: Resource<llm::Request>, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_agent_role(&mut self, _: Resource<llm::Request>, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn set_endpoint(&mut self, _: Resource<llm::Request>, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn drop(&mut self, _: Resource<llm::Request>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl llm::HostCompletion for State {
    fn text(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<String> {
        Ok(self.answer.as_ref().to_owned())
    }
    fn tool_calls(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<Vec<types::ToolCall>> {
        Ok(vec![])
    }
    fn finish_reason(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<types::FinishReason> {
        Ok(types::FinishReason::Stop)
    }
    fn response_id(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<String> {
        Ok("bare/1/0".to_owned())
    }
    fn prompt_tokens(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<u32> {
        Ok(0)
    }
    fn completion_tokens(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<u32> {
        Ok(0)
    }
    fn prompt_ids(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<Vec<u32>> {
        Ok(vec![])
    }
    fn completion_ids(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<Vec<u32>> {
        Ok(vec![])
    }
    fn log_probs(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<Vec<f32>> {
        Ok(vec![])
    }
    fn policy_version(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<Option<u64>> {
        Ok(None)
    }
    fn not_trainable(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<Option<llm::NotTrainable>> {
        Ok(None)
    }
    fn drop(&mut self, _: Resource<llm::Completion>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl llm::HostPending for State {
    fn next(&mut self, _: Resource<llm::Pending>) -> wasmtime::Result<Result<Option<String>, llm::LlmError>> {
        not_here()
    }
    fn drop(&mut self, _: Resource<llm::Pending>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl llm::Host for State {
    async fn chat(&mut self, _: Resource<llm::Request>) -> Result<Resource<llm::Completion>, llm::LlmError> {
        if !self.wait.is_zero() {
            tokio::time::sleep(self.wait).await;
        }
        Ok(handle())
    }
    fn start(&mut self, _: Resource<llm::Request>) -> wasmtime::Result<Result<Resource<llm::Pending>, llm::LlmError>> {
        not_here()
    }
    fn finish(
        &mut self,
        _: Resource<llm::Pending>,
    ) -> wasmtime::Result<Result<Resource<llm::Completion>, llm::LlmError>> {
        not_here()
    }
    fn wait_any(&mut self, _: Vec<Resource<llm::Pending>>) -> wasmtime::Result<Result<u32, llm::LlmError>> {
        not_here()
    }
}

impl emit::HostSpan for State {
    fn new(&mut self, _: String, _: Vec<types::Attribute>) -> wasmtime::Result<Resource<emit::Span>> {
        Ok(handle())
    }
    fn annotate(&mut self, _: Resource<emit::Span>, _: Vec<types::Attribute>) -> wasmtime::Result<()> {
        Ok(())
    }
    fn drop(&mut self, _: Resource<emit::Span>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl emit::Host for State {
    fn reward(&mut self, _: String, _: f64, _: Option<u64>) -> wasmtime::Result<()> {
        Ok(())
    }
    fn annotation(&mut self, _: Vec<types::Attribute>) -> wasmtime::Result<()> {
        Ok(())
    }
    fn message(&mut self, _: types::Role, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn object(&mut self, _: String, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
    fn log(&mut self, _: emit::Level, _: String) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl tools::HostPending for State {
    fn ready(&mut self, _: Resource<tools::Pending>) -> wasmtime::Result<bool> {
        not_here()
    }
    fn drop(&mut self, _: Resource<tools::Pending>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl tools::Host for State {
    fn list_tools(&mut self) -> wasmtime::Result<Result<Vec<types::ToolSpec>, tools::ToolError>> {
        Ok(Ok(vec![]))
    }
    fn call(&mut self, _: String, _: String) -> wasmtime::Result<Result<String, tools::ToolError>> {
        not_here()
    }
    fn start(&mut self, _: String, _: String) -> wasmtime::Result<Result<Resource<tools::Pending>, tools::ToolError>> {
        not_here()
    }
    fn finish(&mut self, _: Resource<tools::Pending>) -> wasmtime::Result<Result<String, tools::ToolError>> {
        not_here()
    }
    fn wait_any(&mut self, _: Vec<Resource<tools::Pending>>) -> wasmtime::Result<Result<u32, tools::ToolError>> {
        not_here()
    }
}

impl resources::Host for State {
    fn template(&mut self, _: String) -> wasmtime::Result<Result<String, resources::ResourceError>> {
        not_here()
    }
    fn render(&mut self, _: String, _: String) -> wasmtime::Result<Result<String, resources::ResourceError>> {
        not_here()
    }
    fn version(&mut self) -> wasmtime::Result<u64> {
        Ok(0)
    }
}

impl task::Host for State {
    fn mode(&mut self) -> wasmtime::Result<types::Mode> {
        Ok(types::Mode::Train)
    }
    fn seed(&mut self) -> wasmtime::Result<u64> {
        Ok(0)
    }
}
