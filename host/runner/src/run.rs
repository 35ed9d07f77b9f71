//! The rollout loop: claim, run, record, try again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fulgurite_core::id::{AttemptKey, AttemptNumber, ContentHash, RolloutId};
use fulgurite_core::llm::{LlmBackend, LlmSession, SessionInfo};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, RolloutSpec, WorkerRecord};
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_sandbox::{Admission, Gatekeeper, Tape};
use fulgurite_store::{AttemptFinish, Enqueued, RolloutStore, StoreError};
use tokio::sync::{mpsc, oneshot, watch};

use crate::attempt::{Attempt, Ran};
use crate::batch::{Batch, Order, told};
use crate::commit::Committer;
use crate::control;
use crate::fork;
use crate::gate::{Gate, Pass, Priority};
use crate::settings::{Conditions, Job, Plugins, Recording, RolloutResult, RunnerError, RunnerSettings};
use crate::watchdog::Watchdog;

/// Runs rollouts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Runner {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) store: Arc<dyn RolloutStore>,
    conditions: Conditions,
    execution: ContentHash,
    settings: RunnerSettings,
    gate: Arc<Gate>,
    gatekeeper: Gatekeeper,
    committer: Committer,
    watchdog: Arc<Watchdog>,
    draining: watch::Sender<bool>,
    /// What the store has already been given to keep.
    kept: Mutex<BTreeSet<ContentHash>>,
    /// Attempts begun.
    begun: AtomicU64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("conditions", &self.conditions)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Runner {
    /// Starts a runner. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When not even one attempt fits on this machine.
    pub fn new(store: Arc<dyn RolloutStore>, plugins: Plugins, settings: RunnerSettings) -> Result<Self, RunnerError> {
        let gatekeeper = Gatekeeper::new(&plugins.agent, plugins.tools.values().map(AsRef::as_ref))
            .map_err(|fault| RunnerError::TooLarge(fault.detail))?;
        let gate = Gate::new(settings.live_max.min(gatekeeper.attempts_max()));
        let committer = Committer::start(&store);
        let conditions = Conditions::new(plugins, &settings);
        let execution = ContentHash::of(&conditions.record().to_bytes());
        let watchdog = Watchdog::start();
        let (draining, _) = watch::channel(false);
        let shared = Shared {
            store,
            conditions,
            execution,
            settings,
            gate,
            gatekeeper,
            committer,
            watchdog,
            draining,
            kept: Mutex::default(),
            begun: AtomicU64::new(0),
        };
        let runner = Self { shared: Arc::new(shared) };
        tokio::spawn(keep_house(Arc::downgrade(&runner.shared)));
        Ok(runner)
    }

    /// The store that the runner writes to.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn RolloutStore> {
        &self.shared.store
    }

    /// The components that the runner runs.
    #[must_use]
    pub fn plugins(&self) -> &Plugins {
        &self.shared.conditions.plugins
    }

    /// Content hash of the conditions under which this runner runs: what a rollout pins.
    #[must_use]
    pub fn execution_hash(&self) -> ContentHash {
        self.shared.execution
    }

    /// Attempts that may be alive at once: what the settings say, or what the machine bears if that is less.
    #[must_use]
    pub fn live_max(&self) -> usize {
        self.shared.settings.live_max.min(self.shared.gatekeeper.attempts_max())
    }

    /// Attempts that are alive.
    #[must_use]
    pub fn live(&self) -> usize {
        self.shared.watchdog.live()
    }

    /// A rollout that has ended, as [`Batch::next`] returned it; `None` when there is none of that id, or it has not.
    ///
    /// # Errors
    /// When the store fails.
    pub fn finished(&self, rollout: &RolloutId) -> Result<Option<RolloutResult>, RunnerError> {
        match self.shared.store.rollout(rollout)? {
            Some(record) if record.state.is_terminal() => self.shared.recorded(&record.spec).map(Some),
            _ => Ok(None),
        }
    }

    /// Cancels one rollout, live or queued. Says whether there was anything to cancel.
    ///
    /// # Errors
    /// When the store fails.
    pub fn cancel(&self, rollout: &RolloutId) -> Result<bool, RunnerError> {
        self.shared.cancel(rollout)
    }

    /// Cancels all live rollouts and begins no others. Says how many lived.
    #[must_use]
    pub fn cancel_all(&self) -> usize {
        self.shared.draining.send_replace(true);
        self.shared.watchdog.cancel_all()
    }

    /// Begins no more rollouts; those that live go on to their end and are recorded. What had not begun stays queued.
    pub fn drain(&self) {
        self.shared.draining.send_replace(true);
    }

    /// Enqueues jobs durably and starts them in order, as live slots get free; evaluations come before training. A job
    /// whose rollout the store knows as finished is answered from the store.
    ///
    /// The queue is the list of jobs itself: nothing of a job but its spec is held before it starts.
    ///
    /// # Errors
    /// When the store refuses: it fails, or knows a rollout of that id with another spec.
    pub async fn submit(&self, jobs: Vec<Job>, backend: Arc<dyn LlmBackend>) -> Result<Batch, RunnerError> {
        let enqueued = self.enqueue(&jobs).await?;
        let expected = jobs.len();
        // As large as the batch, so that no worker ever waits for a slow reader.
        let (send, results) = mpsc::channel(expected.max(1));
        let (order, orders) = watch::channel(Order::Go);
        let shared = Arc::clone(&self.shared);
        let backend = shared.conditions.grants.route(backend);
        let draining = self.shared.draining.subscribe();
        let batch = Batch { results, order, expected, draining: draining.clone() };
        tokio::spawn(async move {
            let mut ready: Vec<Worker> = vec![];
            let mut enqueued = enqueued.into_iter();
            for (place, job) in jobs.into_iter().enumerate() {
                let existing = enqueued.next().and_then(|enqueued| match enqueued {
                    Enqueued::Existing(record) => Some(record.state),
                    Enqueued::New(_) => None,
                });
                // Sessions are opened before any attempt of the same wave starts: a deterministic engine waits for all
                // open sessions, so the first round then holds the whole wave instead of whoever came first.
                let Some(live) = shared.enter(&job, &mut ready, draining.clone(), orders.clone()).await else { break };
                let begun = if existing.is_some_and(RolloutState::is_terminal) {
                    Begun::Recorded
                } else {
                    shared.begin(&*backend, &job)
                };
                let (backend, orders, results) = (Arc::clone(&backend), orders.clone(), send.clone());
                ready.push(Worker { shared: Arc::clone(&shared), backend, job, place, live, begun, orders, results });
            }
            Worker::spawn_all(&mut ready);
        });
        Ok(batch)
    }

    async fn enqueue(&self, jobs: &[Job]) -> Result<Vec<Enqueued>, RunnerError> {
        if self.shared.settings.recording == Recording::Nothing {
            return Ok(vec![]);
        }
        let store = Arc::clone(&self.shared.store);
        let specs: Vec<_> = jobs.iter().map(|job| Arc::clone(&job.spec)).collect();
        // What a rollout pins is kept beside it, once, so that it can be run again from the store alone.
        let items: BTreeMap<_, _> = jobs.iter().map(|job| job.item.texts()).map(|texts| (texts.hash, texts)).collect();
        let mut blobs: Vec<Vec<u8>> = vec![];
        {
            let kept = self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner);
            blobs.extend(
                items.iter().filter(|(hash, _)| !kept.contains(*hash)).map(|(_, t)| t.whole.as_bytes().to_vec()),
            );
            if !kept.contains(&self.shared.execution) {
                blobs.push(self.shared.conditions.record().to_bytes());
            }
        }
        let enqueued = tokio::task::spawn_blocking(move || -> Result<_, StoreError> {
            let hashes = if blobs.is_empty() { vec![] } else { store.put_blobs(blobs)? };
            Ok((hashes, store.enqueue(specs)?))
        });
        let (hashes, enqueued) = enqueued.await.map_err(|_| RunnerError::WorkerLost)??;
        self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(hashes);
        Ok(enqueued)
    }
}

/// The right to be alive, and the sandbox's slots.
struct Live {
    _pass: Pass,
    _slots: Admission,
}

/// How a worker starts.
enum Begun {
    /// The store has the result.
    Recorded,
    /// A first attempt has begun and its session is open.
    Live { started: AttemptRecord, session: Box<dyn LlmSession>, tape: Option<Arc<Tape>> },
    /// The store refused, or the rollout cannot be what it is asked to be.
    Failed(RunnerError),
}

type Results = mpsc::Sender<(usize, Result<RolloutResult, RunnerError>)>;

struct Worker {
    shared: Arc<Shared>,
    backend: Arc<dyn LlmBackend>,
    job: Job,
    place: usize,
    live: Live,
    begun: Begun,
    orders: watch::Receiver<Order>,
    results: Results,
}

impl Worker {
    fn spawn_all(ready: &mut Vec<Self>) {
        for worker in ready.drain(..) {
            let (place, results, mut orders) = (worker.place, worker.results.clone(), worker.orders.clone());
            // Boxed here, because a future that is moved into another one takes its place twice.
            let mut work = Box::pin(worker.run());
            tokio::spawn(async move {
                let result = tokio::select! {
                    result = &mut work => result,
                    () = told(&mut orders, Order::Abandon) => return,
                };
                drop(work);
                if let Some(result) = result.transpose() {
                    tell(&results, place, result);
                }
            });
        }
    }

    /// Returns nothing when a writer will tell the batch.
    async fn run(self) -> Result<Option<RolloutResult>, RunnerError> {
        let Self { shared, backend, job, place, live, begun, mut orders, results } = self;
        let (mut started, mut session, mut tape) = match begun {
            Begun::Recorded => return shared.recorded(&job.spec).map(Some),
            Begun::Failed(error) => return Err(error),
            Begun::Live { started, session, tape } => (started, session, tape),
        };
        loop {
            shared.mark_running(&started.key)?;
            let attempts = started.key.attempt.0;
            let ran = shared.attempt(&job, &started, session, tape, &mut orders).await;
            let again = shared.settings.retry.tries_again(ran.outcome.kind, attempts);
            let (result, finish) = shared.finish(&job, started, ran, again);
            if !again {
                let Some(finish) = finish else { return Ok(Some(result)) };
                // The disk is waited for without a sandbox and without a task: the writer tells the batch.
                let acknowledge = move |durable: Result<(), StoreError>| {
                    tell(&results, place, durable.map(|()| result).map_err(RunnerError::from));
                };
                shared.committer.commit(finish, Box::new(acknowledge)).await?;
                drop(live);
                return Ok(None);
            }
            if let Some(finish) = finish {
                let (acknowledge, acknowledged) = oneshot::channel();
                let acknowledge = move |durable| drop(acknowledge.send(durable));
                shared.committer.commit(finish, Box::new(acknowledge)).await?;
                acknowledged.await.unwrap_or(Err(StoreError::Closed))?;
            }
            tracing::warn!(rollout = %job.spec.id, outcome = result.outcome.kind.as_str(), "attempt failed, trying again");
            (started, session, tape) = match shared.begin_after(&*backend, &job, attempts) {
                Begun::Live { started, session, tape } => (started, session, tape),
                Begun::Recorded => return shared.recorded(&job.spec).map(Some),
                Begun::Failed(error) => return Err(error),
            };
        }
    }
}

/// Hands a result to the batch. It may be gone; what is recorded is durable all the same.
fn tell(results: &Results, place: usize, result: Result<RolloutResult, RunnerError>) {
    // There is room for every result of the batch.
    let _ = results.try_send((place, result));
}

impl Shared {
    /// Waits for the right to be alive; `None` when nothing more is to begin.
    async fn enter(
        &self,
        job: &Job,
        ready: &mut Vec<Worker>,
        mut draining: watch::Receiver<bool>,
        mut orders: watch::Receiver<Order>,
    ) -> Option<Live> {
        if *draining.borrow() || *orders.borrow() == Order::Abandon {
            return None;
        }
        if let Some(pass) = self.gate.try_enter()
            && let Some(slots) = self.gatekeeper.try_admit()
        {
            return Some(Live { _pass: pass, _slots: slots });
        }
        // Whoever waits here must not hold back those that are ready: their ends are what it waits for.
        Worker::spawn_all(ready);
        let entered = async {
            let pass = self.gate.enter(Priority::of(job.spec.mode)).await;
            self.gatekeeper.admit().await.ok().map(|slots| Live { _pass: pass, _slots: slots })
        };
        tokio::select! {
            live = entered => live,
            _ = draining.wait_for(|draining| *draining) => None,
            () = told(&mut orders, Order::Abandon) => None,
        }
    }

    /// Begins the first attempt of a rollout.
    fn begin(&self, backend: &dyn LlmBackend, job: &Job) -> Begun {
        self.begin_after(backend, job, 0)
    }

    /// Begins the next attempt. `attempts` is how many there were, for when nobody else counts them.
    fn begin_after(&self, backend: &dyn LlmBackend, job: &Job, attempts: u32) -> Begun {
        // Before anything is begun: a fork that cannot be is not left behind as a live attempt.
        let prefix = match &job.spec.fork_of {
            Some(fork_of) => match fork::prefix(&*self.store, fork_of, &job.spec) {
                Ok(prefix) => Some(prefix),
                Err(problem) => {
                    return Begun::Failed(RunnerError::Fork { rollout: fork_of.rollout.clone(), problem });
                }
            },
            None => None,
        };
        self.begun.fetch_add(1, Ordering::Relaxed);
        let started = match self.settings.recording {
            Recording::Durable => self.store.begin_attempt(&job.spec.id, unix_now_ns(), &self.settings.worker),
            Recording::Nothing => Ok(unrecorded(&job.spec.id, AttemptNumber(attempts + 1))),
        };
        let mut started = match started {
            Ok(started) => started,
            // It was cancelled while it waited.
            Err(StoreError::RolloutEnded { .. }) => return Begun::Recorded,
            Err(error) => return Begun::Failed(error.into()),
        };
        // A fork's clock goes on where its ancestor's stood.
        if let Some(prefix) = &prefix {
            started.start_unix_ns = prefix.start_unix_ns;
        }
        // All attempts of a rollout have its seed: one that a crash cut off must end, run again, as it would have ended.
        let session = backend.open(SessionInfo {
            attempt: started.key.clone(),
            item_id: job.item.id.clone(),
            seed: job.spec.seed,
            sampling: job.spec.sampling.clone(),
            history: prefix.as_ref().map(|prefix| prefix.completions.clone()).unwrap_or_default(),
        });
        Begun::Live { started, session, tape: prefix.map(|prefix| prefix.tape) }
    }

    fn give_sign_of_life(&self, start_unix_ns: u64) {
        let record = WorkerRecord {
            id: self.settings.worker.clone(),
            process_id: std::process::id(),
            start_unix_ns,
            heartbeat_unix_ns: unix_now_ns(),
            attempts: self.begun.load(Ordering::Relaxed),
        };
        if let Err(error) = self.store.put_worker(record) {
            tracing::warn!(worker = self.settings.worker, error = %error, "the worker's record is not kept");
        }
    }

    fn take_requests(&self) {
        let Some(folder) = &self.settings.control else { return };
        for request in control::requests(folder) {
            match &request {
                control::Request::CancelAll => {
                    self.draining.send_replace(true);
                    self.watchdog.cancel_all();
                }
                control::Request::Cancel(rollout) => {
                    if let Err(error) = self.cancel(rollout) {
                        tracing::warn!(rollout = %rollout, error = %error, "cannot cancel");
                    }
                }
            }
            request.remove(folder);
        }
    }

    fn cancel(&self, rollout: &RolloutId) -> Result<bool, RunnerError> {
        if self.watchdog.cancel(rollout) {
            return Ok(true);
        }
        match self.store.cancel(rollout, unix_now_ns()) {
            Ok(_) => Ok(true),
            Err(StoreError::RolloutEnded { .. } | StoreError::UnknownRollout(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn mark_running(&self, key: &AttemptKey) -> Result<(), RunnerError> {
        match self.settings.recording {
            Recording::Durable => Ok(self.store.mark_running(key)?),
            Recording::Nothing => Ok(()),
        }
    }

    fn recorded(&self, spec: &Arc<RolloutSpec>) -> Result<RolloutResult, RunnerError> {
        let Some(attempt) = self.store.attempts(&spec.id)?.pop() else {
            // Cancelled before it began.
            let outcome = AttemptOutcome::failed(OutcomeKind::Cancelled, "the rollout was cancelled before it began");
            let attempt = AttemptRecord {
                state: AttemptState::Failed,
                outcome: Some(outcome.clone()),
                ..unrecorded(&spec.id, AttemptNumber::FIRST)
            };
            return Ok(RolloutResult { spec: Arc::clone(spec), attempt, outcome, spans: Arc::default() });
        };
        let outcome = attempt.outcome.clone().ok_or(RunnerError::WorkerLost)?;
        let spans = Arc::new(self.store.spans(&attempt.key)?);
        Ok(RolloutResult { spec: Arc::clone(spec), attempt, outcome, spans })
    }

    async fn attempt(
        &self,
        job: &Job,
        started: &AttemptRecord,
        session: Box<dyn LlmSession>,
        tape: Option<Arc<Tape>>,
        orders: &mut watch::Receiver<Order>,
    ) -> Ran {
        let watched = self.watchdog.watch(&job.spec.id, self.settings.limits.heartbeat_ms_max);
        let mut run = Box::pin(self.conditions.run(Attempt {
            key: &started.key,
            start_unix_ns: started.start_unix_ns,
            seed: job.spec.seed,
            mode: job.spec.mode,
            item: &job.item,
            session,
            tape: tape.clone(),
            life: Some(&watched.life),
            keeps_spans: self.settings.recording == Recording::Durable,
        }));
        let ran = tokio::select! {
            ran = &mut run => ran,
            () = told(orders, Order::Cancel) => {
                watched.life.end(crate::watchdog::Verdict::Cancelled);
                run.await
            }
        };
        match tape.and_then(|tape| tape.divergence()) {
            // The ancestor cannot be repeated: that is a fault of the machine, or of who changed a component.
            Some(divergence) => Ran {
                outcome: AttemptOutcome::failed(
                    OutcomeKind::HostFault,
                    format!("the fork's prefix is not what was recorded: {}", divergence.detail),
                ),
                rewards: vec![],
                spans: vec![],
                ..ran
            },
            None => ran,
        }
    }

    /// What an attempt came to, and what of it is to be recorded.
    fn finish(
        &self,
        job: &Job,
        started: AttemptRecord,
        ran: Ran,
        again: bool,
    ) -> (RolloutResult, Option<AttemptFinish>) {
        let kind = ran.outcome.kind;
        let state = match kind {
            OutcomeKind::WallTimeout => AttemptState::Timeout,
            OutcomeKind::Unresponsive => AttemptState::Unresponsive,
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
            not_forkable: ran.not_forkable.clone(),
            ..started
        };
        let spans = Arc::new(ran.spans);
        let finish = (self.settings.recording == Recording::Durable).then(|| AttemptFinish {
            key: attempt.key.clone(),
            state,
            outcome: ran.outcome.clone(),
            rewards: attempt.rewards.clone(),
            end_unix_ns: attempt.end_unix_ns,
            guest_cpu_us: attempt.guest_cpu_us,
            spans: Arc::clone(&spans),
            not_forkable: ran.not_forkable,
            rollout_state,
        });
        (RolloutResult { spec: Arc::clone(&job.spec), attempt, outcome: ran.outcome, spans }, finish)
    }
}

/// How often requests of other processes are looked for, and every how many looks the worker gives a sign of life.
const HOUSEKEEPING: Duration = Duration::from_millis(500);
const LOOKS_PER_HEARTBEAT: u64 = 10;

/// Does what other processes ask for and keeps the worker's record fresh, for as long as the runner is there.
async fn keep_house(runner: Weak<Shared>) {
    let start_unix_ns = unix_now_ns();
    for look in 0_u64.. {
        let Some(shared) = runner.upgrade() else { return };
        // Both wait for the disk. The handle on the store goes with the closure, so nothing outlives the runner for long.
        let done = tokio::task::spawn_blocking(move || {
            if shared.settings.recording == Recording::Durable && look.is_multiple_of(LOOKS_PER_HEARTBEAT) {
                shared.give_sign_of_life(start_unix_ns);
            }
            shared.take_requests();
        });
        if done.await.is_err() {
            return;
        }
        tokio::time::sleep(HOUSEKEEPING).await;
    }
}

/// The record of an attempt that no store knows.
fn unrecorded(rollout: &RolloutId, attempt: AttemptNumber) -> AttemptRecord {
    AttemptRecord {
        key: AttemptKey { rollout: rollout.clone(), attempt },
        state: AttemptState::Preparing,
        start_unix_ns: unix_now_ns(),
        end_unix_ns: 0,
        outcome: None,
        rewards: vec![],
        spans: 0,
        guest_cpu_us: 0,
        worker: String::new(),
        not_forkable: None,
    }
}

pub(crate) fn unix_now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
