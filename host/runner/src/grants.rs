//! What single plugins of a run are given: narrower limits, and model endpoints by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_core::host_call::HostCallLog;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{
    ChatRequest, Completion, LlmBackend, LlmError, LlmSession, LlmStream, SessionInfo, whole_answer,
};
use fulgurite_sandbox::Judge;
use futures::future::BoxFuture;

/// What every call asks that names no endpoint.
const POLICY: &str = "policy";

/// Endpoints by name.
pub type Endpoints = BTreeMap<String, Arc<dyn LlmBackend>>;

/// What the plugins of a run are given beyond the default.
#[derive(Clone, Default)]
pub struct RunnerGrants {
    /// Limits by `agent`, `grader` or a tool's name, where they are narrower than the run's.
    pub plugin_limits: BTreeMap<String, Limits>,
    /// For the record: JSON text of what is granted, by `agent`, `grader` or a tool's name.
    pub records: BTreeMap<String, String>,
    /// Endpoints that the agent may ask beside the policy.
    pub agent_endpoints: Endpoints,
    /// Endpoints that the grader may ask.
    pub judge_endpoints: Endpoints,
}

impl std::fmt::Debug for RunnerGrants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunnerGrants")
            .field("plugin_limits", &self.plugin_limits)
            .field("records", &self.records)
            .field("agent_endpoints", &self.agent_endpoints.keys())
            .field("judge_endpoints", &self.judge_endpoints.keys())
            .finish()
    }
}

impl RunnerGrants {
    /// Limits of one plugin.
    #[must_use]
    pub fn limits<'a>(&'a self, plugin: &str, run: &'a Limits) -> &'a Limits {
        self.plugin_limits.get(plugin).unwrap_or(run)
    }

    /// The policy with the agent's endpoints beside it. A call that names another one is an unknown endpoint, whatever the
    /// policy's own backend would do with it.
    #[must_use]
    pub fn route(&self, policy: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        Arc::new(Routed { policy, endpoints: Arc::new(self.agent_endpoints.clone()) })
    }

    /// The grader's endpoints for one grading; `None` when it has none.
    #[must_use]
    pub fn judge(&self, info: &SessionInfo, log: &Arc<dyn HostCallLog>) -> Option<Judge> {
        if self.judge_endpoints.is_empty() {
            return None;
        }
        let sessions = self.judge_endpoints.iter().map(|(name, backend)| {
            let info = SessionInfo { seed: info.seed.child("judge").child(name), ..info.clone() };
            (name.clone(), Arc::from(backend.open(info)))
        });
        Some(Judge { sessions: sessions.collect(), log: Arc::clone(log) })
    }
}

struct Routed {
    policy: Arc<dyn LlmBackend>,
    endpoints: Arc<Endpoints>,
}

impl LlmBackend for Routed {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        let policy = self.policy.open(info.clone());
        Box::new(RoutedSession { policy, endpoints: Arc::clone(&self.endpoints), info, open: Mutex::default() })
    }

    fn name(&self) -> &str {
        self.policy.name()
    }
}

struct RoutedSession {
    policy: Box<dyn LlmSession>,
    endpoints: Arc<Endpoints>,
    info: SessionInfo,
    /// Sessions with endpoints, opened by the first call.
    open: Mutex<BTreeMap<String, Arc<dyn LlmSession>>>,
}

impl RoutedSession {
    /// The session that a request names, when it is not the policy's.
    fn endpoint(&self, name: &str) -> Option<Arc<dyn LlmSession>> {
        let backend = self.endpoints.get(name)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let session = open.entry(name.to_owned()).or_insert_with(|| {
            let seed = self.info.seed.child("endpoint").child(name);
            Arc::from(backend.open(SessionInfo { seed, ..self.info.clone() }))
        });
        Some(Arc::clone(session))
    }
}

impl LlmSession for RoutedSession {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let Some(name) = request.endpoint.as_deref().filter(|name| *name != POLICY) else {
            return self.policy.chat(call_index, request);
        };
        match self.endpoint(name) {
            Some(session) => session.chat(call_index, request),
            None => Box::pin(std::future::ready(Err(LlmError::UnknownEndpoint(name.to_owned())))),
        }
    }

    fn stream(&self, call_index: u64, request: Arc<ChatRequest>) -> Box<dyn LlmStream> {
        let Some(name) = request.endpoint.as_deref().filter(|name| *name != POLICY) else {
            return self.policy.stream(call_index, request);
        };
        match self.endpoint(name) {
            Some(session) => session.stream(call_index, request),
            None => whole_answer(self.chat(call_index, request)),
        }
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::host_call::NoLog;
    use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
    use fulgurite_core::llm::{Message, Role, Sampling};
    use fulgurite_core::seed::Seed;
    use futures::FutureExt;

    use super::*;
    use crate::scripted::{Reply, Script, ScriptedPolicy};

    fn says(text: &str) -> Arc<dyn LlmBackend> {
        let script = Script { replies: vec![Reply::Text { text: text.to_owned() }], latency_ms: 0, made_up_tokens: 0 };
        Arc::new(ScriptedPolicy::new(&script, []).unwrap())
    }

    fn info() -> SessionInfo {
        SessionInfo {
            attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST },
            item_id: "item".to_owned(),
            seed: Seed::new(1),
            sampling: Sampling::default(),
            history: vec![],
        }
    }

    #[test]
    fn calls_go_where_they_name_and_nowhere_else() {
        let grants = RunnerGrants {
            agent_endpoints: BTreeMap::from([("helper".to_owned(), says("helped"))]),
            ..RunnerGrants::default()
        };
        let session = grants.route(says("policy speaks")).open(info());
        let ask = |endpoint: Option<&str>| {
            let request = ChatRequest {
                messages: vec![Message::text(Role::User, "x")],
                tools: vec![],
                sampling: Sampling::default(),
                agent_role: "agent".to_owned(),
                endpoint: endpoint.map(str::to_owned),
            };
            session.chat(0, Arc::new(request)).now_or_never().unwrap().map(|completion| completion.text.clone())
        };
        assert_eq!(ask(None).unwrap(), "policy speaks");
        assert_eq!(ask(Some("policy")).unwrap(), "policy speaks");
        assert_eq!(ask(Some("helper")).unwrap(), "helped");
        assert_eq!(ask(Some("judge")), Err(LlmError::UnknownEndpoint("judge".to_owned())));
    }

    #[test]
    fn a_grader_without_endpoints_has_no_judge() {
        let log: Arc<dyn HostCallLog> = Arc::new(NoLog);
        assert!(RunnerGrants::default().judge(&info(), &log).is_none());
        let grants = RunnerGrants {
            judge_endpoints: BTreeMap::from([("judge".to_owned(), says("1"))]),
            ..RunnerGrants::default()
        };
        let judge = grants.judge(&info(), &log).unwrap();
        assert_eq!(judge.sessions.keys().collect::<Vec<_>>(), ["judge"]);
    }

    #[test]
    fn limits_are_the_plugins_own_or_the_runs() {
        let (run, own) = (Limits::default(), Limits { guest_cpu_ms_max: 7, ..Limits::default() });
        let grants =
            RunnerGrants { plugin_limits: BTreeMap::from([("agent".to_owned(), own)]), ..RunnerGrants::default() };
        assert_eq!(grants.limits("agent", &run).guest_cpu_ms_max, 7);
        assert_eq!(grants.limits("grader", &run), &run);
    }
}
