//! The rollout loop.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{LlmBackend, LlmSession, SessionInfo};
use fulgurite_core::outcome::{AttemptOutcome, Blame, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, RolloutSpec};
use fulgurite_core::reward::{DEFAULT_DIMENSION, Reward, RewardSource};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody, SpanRefused, SpanSink, SpanStatus};
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_core::tool::ToolHost;
use fulgurite_sandbox::{AgentPlugin, AgentRun, GradeRun, GraderPlugin, Recorder, Templates, ToolPlugin, ToolSet};
use fulgurite_store::{AttemptFinish, Enqueued, RolloutStore, StoreError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::commit::Committer;

/// The components of a run.
#[derive(Debug, Clone)]
pub struct Plugins {
    /// The agent.
    pub agent: Arc<AgentPlugin>,
    /// The grader, when there is one.
    pub grader: Option<Arc<GraderPlugin>>,
    /// Tools by name, in the order in which agents see them.
    pub tools: BTreeMap<String, Arc<ToolPlugin>>,
}

impl Plugins {
    /// Content hashes in the order agent, grader, tools: what a rollout pins.
    #[must_use]
    pub fn hashes(&self) -> Vec<ContentHash> {
        let mut hashes = vec![self.agent.hash()];
        hashes.extend(self.grader.iter().map(|grader| grader.hash()));
        hashes.extend(self.tools.values().map(|tool| tool.hash()));
        hashes
    }
}

/// Settings of a runner.
#[derive(Debug, Clone)]
pub struct RunnerSettings {
    /// Attempts alive at once.
    pub live_max: usize,
    /// Attempts of one rollout, the first included.
    pub attempts_max: u32,
    /// Limits of every sandbox.
    pub limits: Limits,
    /// Reward that the host adds for an outcome blamed on the policy; 0 where not named.
    pub outcome_reward: BTreeMap<OutcomeKind, f64>,
    /// Prompt templates.
    pub templates: Arc<Templates>,
}

/// One rollout to run.
#[derive(Debug, Clone)]
pub struct Job {
    /// What is asked for; durable before it starts.
    pub spec: RolloutSpec,
    /// The item.
    pub item: Arc<DatasetItem>,
}

/// A finished rollout.
#[derive(Debug, Clone)]
pub struct RolloutResult {
    /// What was asked for.
    pub spec: RolloutSpec,
    /// The attempt that counts: the last one.
    pub attempt: AttemptRecord,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// Spans of that attempt in the order of their sequence.
    pub spans: Arc<Vec<Span>>,
}

impl RolloutResult {
    /// Whether it counts in baselines and losses.
    #[must_use]
    pub fn is_graded(&self) -> bool {
        self.outcome.kind.is_graded()
    }
}

/// Why the runner gave up on a batch. A failing guest is never an error: it is an outcome.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// The runner's own code failed.
    #[error("a rollout's worker ended without a result")]
    WorkerLost,
}

/// Runs rollouts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Runner {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn RolloutStore>,
    plugins: Plugins,
    settings: RunnerSettings,
    live: Arc<Semaphore>,
    committer: Committer,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("plugins", &self.plugins)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// What the workers of a batch are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Work.
    Go,
    /// End as cancelled, and record that.
    Cancel,
    /// End without a record: the rollout stays live in the store, and whoever asks for it again runs it again. This is
    /// what a stopped run needs: a recorded cancellation would change the result of the resumed one.
    Abandon,
}

/// Rollouts under way. Dropping it abandons what has not ended: it stays live in the store and can be run again.
#[derive(Debug)]
pub struct Batch {
    results: mpsc::Receiver<(usize, Result<RolloutResult, RunnerError>)>,
    order: watch::Sender<Order>,
    expected: usize,
}

impl Batch {
    /// Rollouts of the batch that have not been returned by [`Batch::next`].
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.expected
    }

    /// Waits for the next rollout to end; `None` when all have. The number is the job's place in the submitted list.
    ///
    /// # Errors
    /// When the store failed.
    pub async fn next(&mut self) -> Option<Result<(usize, RolloutResult), RunnerError>> {
        if self.expected == 0 {
            return None;
        }
        self.expected -= 1;
        match self.results.recv().await {
            Some((place, result)) => Some(result.map(|result| (place, result))),
            None => Some(Err(RunnerError::WorkerLost)),
        }
    }

    /// Waits for all; results come in the order of the jobs.
    ///
    /// # Errors
    /// When the store failed.
    pub async fn all(mut self) -> Result<Vec<RolloutResult>, RunnerError> {
        let mut results = BTreeMap::new();
        while let Some(next) = self.next().await {
            let (place, result) = next?;
            results.insert(place, result);
        }
        Ok(results.into_values().collect())
    }

    /// Cancels what has not ended: live attempts lose their sandbox and end as cancelled.
    pub fn cancel(&self) {
        self.order.send_replace(Order::Cancel);
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.order.send_if_modified(|order| {
            let abandons = *order == Order::Go;
            if abandons {
                *order = Order::Abandon;
            }
            abandons
        });
    }
}

impl Runner {
    /// Starts a runner. Must be called inside a tokio runtime.
    #[must_use]
    pub fn new(store: Arc<dyn RolloutStore>, plugins: Plugins, settings: RunnerSettings) -> Self {
        let live = Arc::new(Semaphore::new(settings.live_max));
        let committer = Committer::start(Arc::clone(&store));
        Self { shared: Arc::new(Shared { store, plugins, settings, live, committer }) }
    }

    /// The store that the runner writes to.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn RolloutStore> {
        &self.shared.store
    }

    /// The components that the runner runs.
    #[must_use]
    pub fn plugins(&self) -> &Plugins {
        &self.shared.plugins
    }

    /// Enqueues jobs durably and starts them in order, as live slots get free. A job whose rollout the store knows as
    /// finished is answered from the store.
    ///
    /// # Errors
    /// When the store refuses: it fails, or knows a rollout of that id with another spec.
    pub async fn submit(&self, jobs: Vec<Job>, backend: Arc<dyn LlmBackend>) -> Result<Batch, RunnerError> {
        let store = Arc::clone(&self.shared.store);
        let specs: Vec<_> = jobs.iter().map(|job| job.spec.clone()).collect();
        let enqueued = tokio::task::spawn_blocking(move || store.enqueue(specs)).await;
        let enqueued = enqueued.map_err(|_| RunnerError::WorkerLost)??;
        let expected = jobs.len();
        // As large as the batch, so that no worker ever waits for a slow reader.
        let (send, results) = mpsc::channel(expected.max(1));
        let (order, orders) = watch::channel(Order::Go);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let mut ready: Vec<Worker> = vec![];
            for (place, (job, enqueued)) in jobs.into_iter().zip(enqueued).enumerate() {
                // Sessions are opened before any attempt of the same wave starts: a deterministic engine waits for all
                // open sessions, so the first round then holds the whole wave instead of whoever came first.
                let permit = if let Ok(permit) = Arc::clone(&shared.live).try_acquire_owned() {
                    permit
                } else {
                    Worker::spawn_all(&mut ready);
                    let Ok(permit) = Arc::clone(&shared.live).acquire_owned().await else { break };
                    permit
                };
                let begun = match enqueued {
                    Enqueued::Existing(record) if record.state.is_terminal() => Begun::Recorded,
                    Enqueued::Existing(_) | Enqueued::New(_) => {
                        match shared.store.begin_attempt(&job.spec.id, unix_now_ns()) {
                            Ok(started) => Begun::Live { session: open(&*backend, &job, &started), started },
                            Err(error) => Begun::Failed(error),
                        }
                    }
                };
                ready.push(Worker {
                    shared: Arc::clone(&shared),
                    backend: Arc::clone(&backend),
                    job,
                    place,
                    permit,
                    begun,
                    orders: orders.clone(),
                    results: send.clone(),
                });
            }
            Worker::spawn_all(&mut ready);
        });
        Ok(Batch { results, order, expected })
    }
}

/// All attempts of a rollout have its seed: one that a crash cut off must end, run again, as it would have ended.
fn open(backend: &dyn LlmBackend, job: &Job, started: &AttemptRecord) -> Box<dyn LlmSession> {
    backend.open(SessionInfo {
        attempt: started.key.clone(),
        item_id: job.item.id.clone(),
        seed: job.spec.seed,
        sampling: job.spec.sampling.clone(),
    })
}

/// How a worker starts.
enum Begun {
    /// The store has the result.
    Recorded,
    /// A first attempt has begun and its session is open.
    Live { started: AttemptRecord, session: Box<dyn LlmSession> },
    /// The store refused.
    Failed(StoreError),
}

struct Worker {
    shared: Arc<Shared>,
    backend: Arc<dyn LlmBackend>,
    job: Job,
    place: usize,
    permit: OwnedSemaphorePermit,
    begun: Begun,
    orders: watch::Receiver<Order>,
    results: mpsc::Sender<(usize, Result<RolloutResult, RunnerError>)>,
}

impl Worker {
    fn spawn_all(ready: &mut Vec<Self>) {
        for worker in ready.drain(..) {
            tokio::spawn(async move {
                let (place, results, mut orders) = (worker.place, worker.results.clone(), worker.orders.clone());
                let result = tokio::select! {
                    result = worker.run() => result,
                    () = told(&mut orders, Order::Abandon) => return,
                };
                // The batch may be gone; the record is durable all the same.
                let _ = results.send((place, result)).await;
            });
        }
    }

    async fn run(self) -> Result<RolloutResult, RunnerError> {
        let Self { shared, backend, job, permit, begun, mut orders, .. } = self;
        let (mut started, mut session) = match begun {
            Begun::Recorded => return shared.recorded(&job),
            Begun::Failed(error) => return Err(error.into()),
            Begun::Live { started, session } => (started, session),
        };
        loop {
            shared.store.mark_running(&started.key)?;
            let attempts = started.key.attempt.0;
            let ran = shared.attempt(&job, &started, session, &mut orders).await;
            let again = ran.outcome.kind.is_retryable() && attempts < shared.settings.attempts_max;
            let result = shared.finish(&job, started, ran, again).await?;
            if !again {
                drop(permit);
                return Ok(result);
            }
            tracing::warn!(rollout = %job.spec.id, outcome = result.outcome.kind.as_str(), "attempt failed, trying again");
            started = shared.store.begin_attempt(&job.spec.id, unix_now_ns())?;
            session = open(&*backend, &job, &started);
        }
    }
}

/// Returns when the batch gives this order; never, when it is gone without having given it.
async fn told(orders: &mut watch::Receiver<Order>, awaited: Order) {
    if orders.wait_for(|order| *order == awaited).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What one attempt left behind.
struct Ran {
    outcome: AttemptOutcome,
    rewards: Vec<Reward>,
    spans: Vec<Span>,
    guest_cpu_us: u64,
}

impl Shared {
    fn recorded(&self, job: &Job) -> Result<RolloutResult, RunnerError> {
        let attempt = self.store.attempts(&job.spec.id)?.pop().ok_or(RunnerError::WorkerLost)?;
        let outcome = attempt.outcome.clone().ok_or(RunnerError::WorkerLost)?;
        let spans = Arc::new(self.store.spans(&attempt.key)?);
        Ok(RolloutResult { spec: job.spec.clone(), attempt, outcome, spans })
    }

    async fn attempt(
        &self,
        job: &Job,
        started: &AttemptRecord,
        session: Box<dyn LlmSession>,
        orders: &mut watch::Receiver<Order>,
    ) -> Ran {
        let seed = job.spec.seed;
        let buffer = Arc::new(SpanBuffer::default());
        let recorder = Arc::new(Recorder::new(
            started.key.clone(),
            seed,
            started.start_unix_ns,
            Arc::clone(&buffer) as Arc<dyn SpanSink>,
        ));
        let work = self.agent(job, started, seed, session, Arc::clone(&recorder));
        let (mut outcome, mut guest_cpu_us) = tokio::select! {
            ended = work => ended,
            () = told(orders, Order::Cancel) => {
                (AttemptOutcome::failed(OutcomeKind::Cancelled, "the rollout was cancelled"), 0)
            }
        };
        let mut rewards = agent_rewards(&buffer.snapshot());
        if outcome.kind.is_graded() {
            match self.grade(job, started, seed, &outcome, &buffer.snapshot()).await {
                Ok((grades, cpu_us)) => {
                    guest_cpu_us = guest_cpu_us.saturating_add(cpu_us);
                    rewards.extend(grades);
                    rewards.extend(self.outcome_reward(outcome.kind));
                    for reward in rewards.iter().filter(|reward| reward.source != RewardSource::Agent) {
                        recorder.record(&format!("reward {}", reward.dimension), SpanBody::Reward(reward.clone()));
                    }
                }
                Err(fault) => {
                    let grader = self.plugins.grader.as_ref().map(|grader| grader.hash().to_string());
                    let body =
                        SpanBody::Grade { grader: grader.unwrap_or_default(), fault: Some(fault.detail.clone()) };
                    recorder.record("grade", body);
                    outcome = fault;
                }
            }
        }
        recorder.finish(&outcome);
        Ran { outcome, rewards, spans: buffer.take(), guest_cpu_us }
    }

    async fn agent(
        &self,
        job: &Job,
        started: &AttemptRecord,
        seed: Seed,
        session: Box<dyn LlmSession>,
        recorder: Arc<Recorder>,
    ) -> (AttemptOutcome, u64) {
        let mut open_tools = vec![];
        for (name, tool) in &self.plugins.tools {
            let world = job.item.world.to_string();
            match tool.open(world, seed.child("tool").child(name), &self.settings.limits, started.start_unix_ns).await {
                Ok(host) => open_tools.push(host),
                Err(fault) => return (fault, 0),
            }
        }
        let tools: Arc<dyn ToolHost> = Arc::new(ToolSet::new(open_tools));
        let report = self
            .plugins
            .agent
            .run(AgentRun {
                key: started.key.clone(),
                seed,
                mode: job.spec.mode,
                input: job.item.input.to_string(),
                limits: self.settings.limits.clone(),
                llm: Arc::from(session),
                tools: Some(Arc::clone(&tools)),
                templates: Arc::clone(&self.settings.templates),
                recorder,
                start_unix_ns: started.start_unix_ns,
            })
            .await;
        (report.outcome, report.guest_cpu_us.saturating_add(tools.guest_cpu_us()))
    }

    async fn grade(
        &self,
        job: &Job,
        started: &AttemptRecord,
        seed: Seed,
        outcome: &AttemptOutcome,
        spans: &[Span],
    ) -> Result<(Vec<Reward>, u64), AttemptOutcome> {
        let Some(grader) = &self.plugins.grader else { return Ok((vec![], 0)) };
        let report = grader
            .grade(GradeRun {
                input: job.item.input.to_string(),
                world: job.item.world.to_string(),
                reference: job.item.reference.to_string(),
                outcome,
                spans,
                seed: seed.child("grader"),
                limits: &self.settings.limits,
                start_unix_ns: started.start_unix_ns,
            })
            .await?;
        Ok((report.rewards, report.guest_cpu_us))
    }

    /// What the host itself adds. An outcome blamed on the policy always has a reward, so that it can be trained on even
    /// when the grader says nothing about it.
    fn outcome_reward(&self, kind: OutcomeKind) -> Option<Reward> {
        (kind.blame() == Some(Blame::Policy)).then(|| Reward {
            dimension: DEFAULT_DIMENSION.to_owned(),
            value: self.settings.outcome_reward.get(&kind).copied().unwrap_or(0.0),
            feedback: None,
            source: RewardSource::Host,
            component: None,
            call_index: None,
        })
    }

    async fn finish(
        &self,
        job: &Job,
        started: AttemptRecord,
        ran: Ran,
        again: bool,
    ) -> Result<RolloutResult, RunnerError> {
        let kind = ran.outcome.kind;
        let state = match kind {
            OutcomeKind::WallTimeout => AttemptState::Timeout,
            kind if kind.is_graded() => AttemptState::Succeeded,
            _ => AttemptState::Failed,
        };
        let rollout_state = match kind {
            OutcomeKind::Cancelled => RolloutState::Cancelled,
            kind if kind.is_graded() => RolloutState::Succeeded,
            _ if again => RolloutState::Requeuing,
            _ => RolloutState::Failed,
        };
        let attempt = AttemptRecord {
            state,
            end_unix_ns: unix_now_ns(),
            outcome: Some(ran.outcome.clone()),
            rewards: ran.rewards,
            spans: ran.spans.len() as u64,
            guest_cpu_us: ran.guest_cpu_us,
            ..started
        };
        let finish = AttemptFinish {
            key: attempt.key.clone(),
            state,
            outcome: ran.outcome.clone(),
            rewards: attempt.rewards.clone(),
            end_unix_ns: attempt.end_unix_ns,
            guest_cpu_us: attempt.guest_cpu_us,
            spans: ran.spans.clone(),
            rollout_state,
        };
        self.committer.commit(finish).await?;
        Ok(RolloutResult { spec: job.spec.clone(), attempt, outcome: ran.outcome, spans: Arc::new(ran.spans) })
    }
}

fn agent_rewards(spans: &[Span]) -> Vec<Reward> {
    let rewards = spans.iter().filter_map(|span| match &span.body {
        SpanBody::Reward(reward) if !matches!(span.status, SpanStatus::Error(_)) => Some(reward.clone()),
        _ => None,
    });
    rewards.collect()
}

fn unix_now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Holds the spans of one attempt until it is committed. Outlives the guest, so that a cancelled attempt keeps what it did.
#[derive(Debug, Default)]
struct SpanBuffer {
    spans: Mutex<Vec<Span>>,
}

impl SpanBuffer {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Span>> {
        self.spans.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn snapshot(&self) -> Vec<Span> {
        self.lock().clone()
    }

    fn take(&self) -> Vec<Span> {
        std::mem::take(&mut *self.lock())
    }
}

impl SpanSink for SpanBuffer {
    fn record(&self, span: Span) -> Result<(), SpanRefused> {
        self.lock().push(span);
        Ok(())
    }
}
