//! Running an agent: a fresh store per attempt.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use fulgurite_core::id::{AttemptKey, ContentHash};
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{LlmError, LlmSession};
use fulgurite_core::outcome::{AttemptOutcome, LimitReached, OutcomeKind};
use fulgurite_core::record::RolloutMode;
use fulgurite_core::seed::Seed;
use fulgurite_core::tool::ToolHost;
use wasmtime::Store;
use wasmtime::component::{Resource, ResourceTable};

use crate::agent_call::PendingLlm;
use crate::agent_llm::is_json;
use crate::agent_tools::ToolCallFuture;
use crate::bindings::agent::{AgentError, AgentPre};
use crate::engine::{Sandbox, World};
use crate::fault::{Bounds, During};
use crate::guest::{self, GuestSetup, GuestState};
use crate::meter::{Heartbeat, Meter};
use crate::output::{GuestOutput, LineSink};
use crate::plugin::{PluginError, PluginWorld, incompatible};
use crate::recorder::{GuestLog, Recorder};
use crate::seeds::SeedSource;
use crate::tape::Tape;
use crate::templates::Templates;

/// An agent's component, compiled.
pub struct AgentPlugin {
    world: Arc<World>,
    pre: AgentPre<AgentState>,
    hash: ContentHash,
}

impl std::fmt::Debug for AgentPlugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentPlugin").field("hash", &self.hash).finish_non_exhaustive()
    }
}

/// One attempt of an agent.
pub struct AgentRun {
    /// Which one.
    pub key: AttemptKey,
    /// The attempt's seed: the guest's random numbers follow from it.
    pub seed: Seed,
    /// What the rollout is for.
    pub mode: RolloutMode,
    /// The item's input, JSON text. All that an agent ever sees of an item.
    pub input: Arc<str>,
    /// Limits of the attempt.
    pub limits: Arc<Limits>,
    /// The attempt's session with the model; dropped when the attempt ends.
    pub llm: Arc<dyn LlmSession>,
    /// The attempt's tools.
    pub tools: Option<Arc<dyn ToolHost>>,
    /// Prompt templates, pinned.
    pub templates: Arc<Templates>,
    /// Where spans go; its clock is the guest's.
    pub recorder: Arc<Recorder>,
    /// Start of the guest's clock, nanoseconds since the Unix epoch: the same as the recorder's.
    pub start_unix_ns: u64,
    /// Who is told whenever the guest runs.
    pub heartbeat: Option<Arc<Heartbeat>>,
}

/// How an attempt of an agent ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentReport {
    /// What happened.
    pub outcome: AttemptOutcome,
    /// Guest time outside host calls, in microseconds; tools not included.
    pub guest_cpu_us: u64,
}

/// The data of an agent's store.
pub(crate) type AgentState = GuestState<AgentHost>;

/// What the host functions of an agent work on. It holds nothing of the item but what the agent itself was given.
pub(crate) struct AgentHost {
    pub(crate) mode: RolloutMode,
    pub(crate) limits: Arc<Limits>,
    pub(crate) llm: Arc<dyn LlmSession>,
    pub(crate) tools: Option<Arc<dyn ToolHost>>,
    pub(crate) templates: Arc<Templates>,
    pub(crate) log: Arc<GuestLog>,
    pub(crate) llm_calls: u64,
    pub(crate) tool_calls: u64,
    pub(crate) completion_tokens: u64,
    /// Bytes of all requests in the making and of those of calls under way.
    pub(crate) request_bytes: u64,
    pub(crate) last_failure: Option<LastFailure>,
    /// Table entries of calls under way.
    pub(crate) pending_llm: BTreeSet<u32>,
    pub(crate) pending_tools: BTreeSet<u32>,
    /// Calls of tools that were dropped before their end.
    pub(crate) dropped_tools: Vec<ToolCallFuture>,
}

/// The last call that failed: what an agent that gives up is judged by.
#[derive(Debug, Clone)]
pub(crate) enum LastFailure {
    Llm(LlmError),
    ToolCalls(LimitReached),
}

impl AgentState {
    /// Waits outside the guest: costs it no CPU time and moves its clock. All calls under way go on meanwhile, whichever
    /// of them the guest waits for.
    pub(crate) async fn wait<T>(
        &mut self,
        mut ready: impl FnMut(&mut ResourceTable, &mut Context<'_>) -> Poll<T>,
    ) -> T {
        let began = Instant::now();
        let Self { table, host, meter, clock, .. } = self;
        let mut found = None;
        let result = meter
            .host(poll_fn(|context| {
                if host.tape().is_some_and(|tape| !tape.waits()) {
                    return Poll::Pending;
                }
                if found.is_none() {
                    found = match ready(table, context) {
                        Poll::Ready(found) => Some(found),
                        Poll::Pending => None,
                    };
                }
                if found.is_none() {
                    for call in &host.pending_llm {
                        if let Ok(pending) = table.get_mut(&Resource::<PendingLlm>::new_borrow(*call)) {
                            let _ = pending.poll(context);
                        }
                    }
                }
                if found.is_none() {
                    host.poll_tools(table, context);
                    // What is waited for may have ended a moment ago, while the others were polled.
                    if let Poll::Ready(ended) = ready(table, context) {
                        found = Some(ended);
                    } else {
                        host.log.recorder.check_waits();
                    }
                }
                if found.is_some() && host.let_tools_get_on(table, context).is_pending() {
                    return Poll::Pending;
                }
                found.take().map_or(Poll::Pending, Poll::Ready)
            }))
            .await;
        // In a replay this wait ends when the recorded one did.
        match host.tape().and_then(Tape::clock_ns) {
            Some(unix_ns) => clock.set_unix_ns(unix_ns),
            None => clock.advance(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)),
        }
        result
    }

    /// What a wait that is the next event of the recording found, at the time at which it did.
    pub(crate) async fn recorded_wait<T: serde::de::DeserializeOwned>(&mut self, function: &str) -> Option<T> {
        let Self { table, host, meter, .. } = self;
        let tools_first = poll_fn(|context| host.let_tools_get_on(table, context));
        meter.host(tools_first).await;
        let found = self.host.recorded_result(function)?;
        if let Some(unix_ns) = self.host.tape().and_then(Tape::clock_ns) {
            self.clock.set_unix_ns(unix_ns);
        }
        Some(found)
    }

    /// Waits until one of several calls has ended, and returns its place. The first in the list wins when several have, so
    /// that the answer depends on the calls alone. `in_vain` ends the wait when none has ended and none ever will.
    pub(crate) async fn wait_for_any<T: 'static>(
        &mut self,
        calls: &[Resource<T>],
        poll: fn(&mut T, &mut Context<'_>) -> Poll<()>,
        in_vain: impl Fn() -> Option<wasmtime::Error>,
    ) -> wasmtime::Result<usize> {
        let place = self.wait(|table, context| {
            for (place, call) in calls.iter().enumerate() {
                match table.get_mut(call).map(|pending| poll(pending, context)) {
                    Ok(Poll::Ready(())) => return Poll::Ready(Ok(place)),
                    Ok(Poll::Pending) => {}
                    Err(error) => return Poll::Ready(Err(error.into())),
                }
            }
            in_vain().map_or(Poll::Pending, |vain| Poll::Ready(Err(vain)))
        });
        place.await
    }
}

impl AgentHost {
    /// The recording that is played back.
    pub(crate) fn tape(&self) -> Option<&Tape> {
        self.log.recorder.tape().map(AsRef::as_ref)
    }

    /// What the next event of the recording returned, when it is this host call.
    pub(crate) fn recorded_result<T: serde::de::DeserializeOwned>(&self, function: &str) -> Option<T> {
        serde_json::from_str(self.tape()?.host_call(function)?).ok()
    }
}

impl Sandbox {
    /// Loads an agent.
    ///
    /// # Errors
    /// When the file is missing, is not a component, implements another world, was built against another version of our
    /// interfaces, or asks for what is not offered.
    pub fn load_agent(&self, path: &Path) -> Result<Arc<AgentPlugin>, PluginError> {
        let artifact = self.load(path, PluginWorld::Agent)?;
        let pre = artifact.world.agents.instantiate_pre(&artifact.component).and_then(AgentPre::new);
        let pre = pre.map_err(|error| incompatible(path, PluginWorld::Agent, &error))?;
        Ok(Arc::new(AgentPlugin { world: artifact.world, pre, hash: artifact.hash }))
    }
}

impl AgentPlugin {
    pub(crate) fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Content hash of the component.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// Name and version of the engine that runs it, with every setting that a guest could notice.
    #[must_use]
    pub fn engine(&self) -> String {
        self.world.name()
    }

    /// Runs one attempt. Must be called inside a tokio runtime with its timer on.
    ///
    /// Dropping the future drops the guest's store: that is how an attempt is cancelled. A guest in a loop is stopped at
    /// its next yield, at most a few milliseconds later.
    pub async fn run(&self, run: AgentRun) -> AgentReport {
        let wall_ms = run.limits.attempt_wall_ms_max;
        let recorder = Arc::clone(&run.recorder);
        let tape = recorder.tape().filter(|tape| tape.is_whole()).cloned();
        // Thousands of these wait at once. What is only needed to begin is used up in a plain function: in an async one it
        // would take its place in every waiting attempt.
        let (meter, started) = self.start(run, tape.clone());
        let mut guest = match started {
            Ok(started) => started,
            Err(outcome) => return AgentReport { outcome, guest_cpu_us: 0 },
        };
        let mut running = Box::pin(guest.run(&self.pre, &meter));
        let ended = if tape.is_some() {
            // Time that was recorded does not pass again; whatever a replay can wait for comes to an end by itself.
            Some((&mut running).await)
        } else {
            tokio::time::timeout(Duration::from_millis(wall_ms), &mut running).await.ok()
        };
        // Before the calls under way are dropped: that they were cancelled was not the guest's doing.
        recorder.ends();
        drop(running);
        let outcome = match ended {
            Some(ended) => guest.end(ended),
            None => AttemptOutcome::limited(OutcomeKind::WallTimeout, "attempt_wall_ms_max", wall_ms),
        };
        AgentReport { outcome, guest_cpu_us: meter.used_us() }
    }

    fn start(&self, run: AgentRun, tape: Option<Arc<Tape>>) -> (Arc<Meter>, Result<LiveAgent, AttemptOutcome>) {
        let meter = Meter::new("guest_cpu_ms_max", run.limits.guest_cpu_ms_max);
        let meter = Arc::new(meter.with_heartbeat(run.heartbeat.clone()).with_tape(tape));
        if run.key != *run.recorder.key() || run.start_unix_ns != run.recorder.clock().start_unix_ns() {
            let detail = format!("the recorder of {} was given to {}", run.recorder.key(), run.key);
            return (meter, Err(AttemptOutcome::failed(OutcomeKind::HostFault, detail)));
        }
        let log = Arc::new(GuestLog::new(Arc::clone(&run.recorder), &run.limits));
        let output = GuestOutput::new(run.limits.output_bytes_max, Some(Arc::clone(&log) as Arc<dyn LineSink>));
        let bounds = guest::attempt_bounds(&run.limits);
        let setup = GuestSetup {
            limits: &run.limits,
            seeds: SeedSource::new(run.seed, run.recorder.tape().cloned()),
            clock: Arc::clone(run.recorder.clock()),
            meter: Arc::clone(&meter),
            output: Arc::clone(&output),
            bounds,
        };
        let host = AgentHost {
            mode: run.mode,
            limits: Arc::clone(&run.limits),
            llm: run.llm,
            tools: run.tools,
            templates: run.templates,
            log,
            llm_calls: 0,
            tool_calls: 0,
            completion_tokens: 0,
            request_bytes: 0,
            last_failure: None,
            pending_llm: BTreeSet::new(),
            pending_tools: BTreeSet::new(),
            dropped_tools: vec![],
        };
        let live = guest::store(&self.world, setup, host).map(|store| LiveAgent {
            store: Some(store),
            input: run.input,
            output,
            bounds: Box::new(bounds),
        });
        (meter, live)
    }
}

/// An agent in its store.
struct LiveAgent {
    /// Taken when it ends.
    store: Option<Store<AgentState>>,
    input: Arc<str>,
    output: Arc<GuestOutput>,
    bounds: Box<Bounds>,
}

type Ended = Result<Result<String, AgentError>, (During, wasmtime::Error)>;

impl LiveAgent {
    async fn run(&mut self, pre: &AgentPre<AgentState>, meter: &Meter) -> Ended {
        let Some(store) = &mut self.store else {
            return Err((During::Instantiation, wasmtime::Error::msg("the agent has ended")));
        };
        let input = &self.input;
        meter
            .guest(async {
                let agent = pre.instantiate_async(&mut *store).await.map_err(|error| (During::Instantiation, error))?;
                agent.call_run(store, input).await.map_err(|error| (During::Call, error))
            })
            .await
    }

    fn end(&mut self, ended: Ended) -> AttemptOutcome {
        let store = self.store.take();
        match ended {
            Ok(result) => {
                let last_failure = store.as_ref().and_then(|store| store.data().host.last_failure.clone());
                // Also closes what the guest left open, before the caller records anything more.
                drop(store);
                let outcome = match result {
                    Ok(text) if is_json(&text) => AttemptOutcome::completed(text),
                    Ok(_) => AttemptOutcome::failed(OutcomeKind::AgentError, "the agent's outcome is not JSON text"),
                    Err(error) => blame(error, last_failure.as_ref()),
                };
                match self.output.flush() {
                    Ok(()) => outcome,
                    Err(stop) => stop.0,
                }
            }
            Err((during, error)) => {
                drop(store);
                guest::fault(&error, during, *self.bounds, &self.output)
            }
        }
    }
}

/// The outcome of an agent that gave up.
fn blame(error: AgentError, last_failure: Option<&LastFailure>) -> AttemptOutcome {
    let failed = AttemptOutcome::failed;
    match (error, last_failure) {
        (AgentError::MalformedAnswer(text), _) => failed(OutcomeKind::MalformedAnswer, text),
        (AgentError::InvalidInput(text), _) => failed(OutcomeKind::AgentError, format!("invalid input: {text}")),
        (AgentError::Llm(text), Some(LastFailure::Llm(failure))) => {
            let detail = if text.is_empty() { failure.to_string() } else { format!("{text}: {failure}") };
            match failure {
                LlmError::ContextLengthExceeded { .. } => failed(OutcomeKind::ContextLimit, detail),
                LlmError::LimitReached { name, value } => {
                    let tokens = name == "completion_tokens_max";
                    let kind = if tokens { OutcomeKind::TokenLimit } else { OutcomeKind::TurnLimit };
                    let limit = LimitReached { name: name.clone(), value: *value };
                    AttemptOutcome { limit: Some(limit), ..failed(kind, detail) }
                }
                LlmError::Unavailable(_) => failed(OutcomeKind::LlmUnavailable, detail),
                LlmError::InvalidRequest(_) | LlmError::UnknownEndpoint(_) | LlmError::Unsupported(_) => {
                    failed(OutcomeKind::AgentError, detail)
                }
            }
        }
        // The policy asked for one tool call too many: turns that it used up, like those of the model.
        (AgentError::Llm(text) | AgentError::Other(text), Some(LastFailure::ToolCalls(limit))) => {
            AttemptOutcome { limit: Some(limit.clone()), ..failed(OutcomeKind::TurnLimit, text) }
        }
        (AgentError::Llm(text) | AgentError::Other(text), _) => failed(OutcomeKind::AgentError, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn giving_up_is_blamed_by_the_call_that_failed() {
        let kind = |failure: Option<LlmError>| {
            blame(AgentError::Llm("gave up".to_owned()), failure.map(LastFailure::Llm).as_ref()).kind
        };
        let limit = |name: &str| Some(LlmError::LimitReached { name: name.to_owned(), value: 1 });
        assert_eq!(kind(None), OutcomeKind::AgentError);
        assert_eq!(kind(limit("llm_calls_max")), OutcomeKind::TurnLimit);
        assert_eq!(kind(limit("completion_tokens_max")), OutcomeKind::TokenLimit);
        assert_eq!(kind(Some(LlmError::Unavailable(String::new()))), OutcomeKind::LlmUnavailable);
        assert_eq!(kind(Some(LlmError::InvalidRequest(String::new()))), OutcomeKind::AgentError);
        let full = LlmError::ContextLengthExceeded { prompt_tokens: 9, context_tokens_max: 8 };
        assert_eq!(kind(Some(full)), OutcomeKind::ContextLimit);
    }
}
