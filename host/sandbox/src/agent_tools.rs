//! `fulgurite:agent/tools`: the tools that a run gives to its agent.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use fulgurite_core::outcome::{AttemptOutcome, LimitReached, OutcomeKind};
use fulgurite_core::span::SpanBody;
use fulgurite_core::tool::ToolError;
use futures::future::BoxFuture;
use wasmtime::component::{Resource, ResourceTable};

use crate::agent::{AgentHost, AgentState, LastFailure};
use crate::bindings::agent::fulgurite::agent::tools;
use crate::bindings::agent::fulgurite::types::types;
use crate::convert;
use crate::fault::Stop;
use crate::recorder::{Begun, GuestLog, refused};
use crate::tape::CANCELLED_CALL;

const INTERFACE: &str = "fulgurite:agent/tools@0.1.0";

/// What must be written down about a call whatever becomes of it.
struct Ticket {
    log: Arc<GuestLog>,
    begun: Begun,
    call_index: u64,
    /// Name and arguments; taken when the call is recorded.
    call: Option<(String, String)>,
}

impl Ticket {
    fn close(&mut self, result: Result<String, ToolError>) -> Result<(), Stop> {
        let Some((name, arguments)) = self.call.take() else { return Ok(()) };
        let title = format!("tool {name}");
        let body = SpanBody::Tool { name, arguments, result };
        self.log.recorder.end(self.begun, &title, vec![], body).map_err(|refusal| refused(&refusal))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // The attempt may be over; then there is nobody to tell.
        let _ = self.close(Err(ToolError::Failed(CANCELLED_CALL.to_owned())));
    }
}

/// A call under way.
pub struct PendingTool {
    ticket: Ticket,
    progress: Progress,
}

/// What makes a call.
pub(crate) type ToolCallFuture = BoxFuture<'static, Result<String, ToolError>>;

enum Progress {
    Running(ToolCallFuture),
    Done(Result<String, ToolError>),
}

impl PendingTool {
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Progress::Running(future) = &mut self.progress else { return Poll::Ready(()) };
        let Poll::Ready(result) = future.as_mut().poll(context) else { return Poll::Pending };
        self.progress = Progress::Done(result);
        Poll::Ready(())
    }
}

/// The outcome of an attempt whose tool has a fault.
fn fault(detail: &str, limit: Option<LimitReached>) -> Stop {
    Stop(AttemptOutcome { limit, ..AttemptOutcome::failed(OutcomeKind::ToolFault, detail) })
}

impl AgentHost {
    /// Lets all calls of tools get on, those that were dropped first.
    pub(crate) fn poll_tools(&mut self, table: &mut ResourceTable, context: &mut Context<'_>) {
        self.dropped_tools.retain_mut(|dropped| dropped.as_mut().poll(context).is_pending());
        for call in &self.pending_tools {
            if let Ok(pending) = table.get_mut(&Resource::<PendingTool>::new_borrow(*call)) {
                let _ = pending.poll(context);
            }
        }
    }
}

impl AgentHost {
    /// In a replay: ready when the next event of the recording is none of a tool.
    pub(crate) fn let_tools_get_on(&mut self, table: &mut ResourceTable, context: &mut Context<'_>) -> Poll<()> {
        if self.awaits_tools(table) {
            self.poll_tools(table, context);
        }
        if self.awaits_tools(table) { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Whether the next event of the recording is one of a tool, and there is a tool that may cause it.
    fn awaits_tools(&self, table: &ResourceTable) -> bool {
        let runs = |call: &u32| {
            let pending = table.get(&Resource::<PendingTool>::new_borrow(*call));
            pending.is_ok_and(|pending| matches!(pending.progress, Progress::Running(_)))
        };
        self.log.recorder.awaits_tools() && (!self.dropped_tools.is_empty() || self.pending_tools.iter().any(runs))
    }
}

impl AgentState {
    /// Makes a call that has begun. Nothing happens before it is polled. `Err` is for the guest.
    fn open_tool_call(
        &mut self,
        name: String,
        arguments: String,
    ) -> wasmtime::Result<Result<PendingTool, LimitReached>> {
        self.host.log.take_span().map_err(Stop::error)?;
        let call_index = self.host.tool_calls;
        let limit = self.host.limits.tool_calls_max;
        let begun = self.host.log.recorder.begin();
        let call = Some((name.clone(), arguments.clone()));
        let mut ticket = Ticket { log: Arc::clone(&self.host.log), begun, call_index, call };
        if call_index >= limit {
            let reached = LimitReached { name: "tool_calls_max".to_owned(), value: limit };
            let text = format!("limit {} of {limit} is reached", reached.name);
            ticket.close(Err(ToolError::Failed(text))).map_err(Stop::error)?;
            self.host.last_failure = Some(LastFailure::ToolCalls(reached.clone()));
            return Ok(Err(reached));
        }
        self.host.tool_calls += 1;
        let host = self.host.tools.clone();
        let future: ToolCallFuture = Box::pin(async move {
            match host {
                Some(host) => host.call(name, arguments).await,
                None => Err(ToolError::UnknownTool(name)),
            }
        });
        Ok(Ok(PendingTool { ticket, progress: Progress::Running(future) }))
    }

    /// Records the end of a call and hands its result to the guest.
    fn close_tool_call(pending: PendingTool) -> wasmtime::Result<Result<String, tools::ToolError>> {
        let PendingTool { mut ticket, progress } = pending;
        let Progress::Done(result) = progress else {
            return Err(wasmtime::Error::msg("a call that was waited for is still under way"));
        };
        ticket.close(result.clone()).map_err(Stop::error)?;
        match result {
            Ok(text) => Ok(Ok(text)),
            Err(ToolError::Fault { detail, limit }) => Err(fault(&detail, limit).error()),
            Err(error) => Ok(Err(convert::tool_error_to_wit(error))),
        }
    }

    fn limit_error(reached: LimitReached) -> tools::ToolError {
        tools::ToolError::LimitReached(types::LimitReached { name: reached.name, value: reached.value })
    }

    fn record_tools_call(
        &self,
        begun: Begun,
        function: &str,
        arguments: &serde_json::Value,
        result: &serde_json::Value,
    ) -> wasmtime::Result<()> {
        let body = SpanBody::HostCall {
            interface: INTERFACE.to_owned(),
            function: function.to_owned(),
            arguments: arguments.to_string(),
            result: result.to_string(),
        };
        let ended = self.host.log.recorder.end(begun, function, vec![], body);
        ended.map_err(|refusal| refused(&refusal).error())
    }
}

impl tools::HostPending for AgentState {
    async fn ready(&mut self, call: Resource<PendingTool>) -> wasmtime::Result<bool> {
        self.host.log.take_span().map_err(Stop::error)?;
        let begun = self.host.log.recorder.begin();
        let meter = Arc::clone(&self.meter);
        let Self { table, host, .. } = self;
        let mut ready = meter
            .host(poll_fn(|context| {
                // A tool makes one call after the other: those before this one have to get on, too.
                host.poll_tools(table, context);
                let ready = table.get_mut(&call).map(|pending| pending.poll(context).is_ready());
                if host.awaits_tools(table) { Poll::Pending } else { Poll::Ready(ready) }
            }))
            .await?;
        if let Some(recorded) = self.host.recorded_result("[method]pending.ready") {
            ready = recorded;
        }
        let pending = self.table.get(&call)?;
        let arguments = serde_json::json!({ "call_index": pending.ticket.call_index });
        self.record_tools_call(begun, "[method]pending.ready", &arguments, &serde_json::json!(ready))?;
        Ok(ready)
    }

    fn drop(&mut self, call: Resource<PendingTool>) -> wasmtime::Result<()> {
        self.host.log.recorder.act().map_err(Stop::error)?;
        self.host.pending_tools.remove(&call.rep());
        let PendingTool { ticket, progress } = self.table.delete(call)?;
        // Whether a tool had begun with a call when it was dropped depends on the machine; what the tool knows afterwards
        // must not. So it makes every call that was started, in the order in which they were.
        if let Progress::Running(future) = progress {
            self.host.dropped_tools.push(future);
        }
        drop(ticket);
        Ok(())
    }
}

impl tools::Host for AgentState {
    async fn list_tools(&mut self) -> wasmtime::Result<Result<Vec<types::ToolSpec>, tools::ToolError>> {
        self.host.log.take_span().map_err(Stop::error)?;
        let begun = self.host.log.recorder.begin();
        let result = match self.host.tools.clone() {
            Some(host) => {
                let mut list = host.list();
                self.wait(|_, context| list.as_mut().poll(context)).await
            }
            None => Ok(vec![]),
        };
        let body = SpanBody::ToolList(result.clone());
        let ended = self.host.log.recorder.end(begun, "tools", vec![], body);
        ended.map_err(|refusal| refused(&refusal).error())?;
        match result {
            Ok(specs) => Ok(Ok(specs.into_iter().map(convert::tool_spec_to_wit).collect())),
            Err(ToolError::Fault { detail, limit }) => Err(fault(&detail, limit).error()),
            Err(error) => Ok(Err(convert::tool_error_to_wit(error))),
        }
    }

    async fn call(&mut self, name: String, arguments: String) -> wasmtime::Result<Result<String, tools::ToolError>> {
        let mut pending = match self.open_tool_call(name, arguments)? {
            Ok(pending) => pending,
            Err(reached) => return Ok(Err(Self::limit_error(reached))),
        };
        self.wait(|_, context| pending.poll(context)).await;
        Self::close_tool_call(pending)
    }

    async fn start(
        &mut self,
        name: String,
        arguments: String,
    ) -> wasmtime::Result<Result<Resource<PendingTool>, tools::ToolError>> {
        let mut pending = match self.open_tool_call(name, arguments)? {
            Ok(pending) => pending,
            Err(reached) => return Ok(Err(Self::limit_error(reached))),
        };
        let Self { table, host, meter, .. } = self;
        let first = poll_fn(|context| {
            let running = pending.poll(context).is_pending();
            let others = host.let_tools_get_on(table, context);
            if running && host.log.recorder.awaits_tools() { Poll::Pending } else { others }
        });
        meter.host(first).await;
        let pending = self.table.push(pending)?;
        self.host.pending_tools.insert(pending.rep());
        Ok(Ok(pending))
    }

    async fn finish(&mut self, call: Resource<PendingTool>) -> wasmtime::Result<Result<String, tools::ToolError>> {
        self.host.log.recorder.act().map_err(Stop::error)?;
        self.wait(|table, context| match table.get_mut(&call) {
            Ok(pending) => pending.poll(context).map(Ok),
            Err(error) => Poll::Ready(Err(error)),
        })
        .await?;
        self.host.pending_tools.remove(&call.rep());
        let pending = self.table.delete(call)?;
        Self::close_tool_call(pending)
    }

    async fn wait_any(&mut self, calls: Vec<Resource<PendingTool>>) -> wasmtime::Result<Result<u32, tools::ToolError>> {
        if calls.is_empty() {
            return Ok(Err(tools::ToolError::InvalidArguments("calls: the list is empty".to_owned())));
        }
        self.host.log.take_span().map_err(Stop::error)?;
        let begun = self.host.log.recorder.begin();
        let ready = if let Some(recorded) = self.recorded_wait("wait-any").await {
            recorded
        } else {
            self.wait_for_any(&calls, PendingTool::poll, || None).await?
        };
        let mut indices = Vec::with_capacity(calls.len());
        for call in &calls {
            indices.push(self.table.get(call)?.ticket.call_index);
        }
        let arguments = serde_json::json!({ "call_indices": indices });
        self.record_tools_call(begun, "wait-any", &arguments, &serde_json::json!(ready))?;
        Ok(Ok(u32::try_from(ready).unwrap_or(u32::MAX)))
    }
}
