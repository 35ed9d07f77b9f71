//! Replay: runs a recorded attempt again without any model and compares every event with the recorded one.
//!
//! What is executed: the agent and its tools and the grader, under the recorded limits, clock and seeds. What comes from
//! the recording: the answers of models, the order in which parallel calls ended, how long everything took.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_adapter::RewardTerms;
use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::grant::EndpointGrants;
use fulgurite_core::host_call::{HostCallLog, NoLog};
use fulgurite_core::id::{AttemptKey, ContentHash};
use fulgurite_core::llm::{ChatRequest, Completion, LlmBackend, LlmError, LlmSession, Sampling, SessionInfo};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, ExecutionSettings, RolloutSpec};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::{Span, SpanBody};
use fulgurite_sandbox::{Divergence, Gatekeeper, GraderPlugin, Tape, TapeObserver, Templates};
use fulgurite_store::{RecordedAttempt, RolloutStore, StoreError};
use futures::future::BoxFuture;

use crate::attempt::{Attempt, Ran};
use crate::fork::{Lineage, agent_events, lineage};
use crate::grants::{Endpoints, RunnerGrants};
use crate::settings::{Conditions, Plugins};
use crate::templates::JinjaRenderer;

/// Why a rollout cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// Something that the rollout pins is not there.
    #[error("cannot replay {attempt}: {problem}")]
    Missing {
        /// Which attempt.
        attempt: AttemptKey,
        /// What is missing.
        problem: String,
    },
    /// The engine has changed.
    #[error("it was recorded by `{recorded}`, and this is `{current}`: what a guest does may differ")]
    Engine {
        /// The engine that recorded.
        recorded: String,
        /// The engine there is.
        current: String,
    },
    /// The conditions cannot be met on this machine.
    #[error("{0}")]
    Conditions(String),
}

/// A recorded attempt with everything that it was run on.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// What was asked for.
    pub spec: Arc<RolloutSpec>,
    /// The attempt.
    pub attempt: AttemptRecord,
    /// Its item.
    pub item: Arc<DatasetItem>,
    /// Its events, its ancestors' included.
    pub lineage: Lineage,
}

impl Recorded {
    /// Reads an attempt with its ancestors' events and its item.
    ///
    /// # Errors
    /// When the store fails, or the attempt, its item or an ancestor is not in it.
    pub fn load(store: &dyn RolloutStore, key: &AttemptKey, items: &Items) -> Result<Self, ReplayError> {
        let missing = |problem: String| ReplayError::Missing { attempt: key.clone(), problem };
        let RecordedAttempt { rollout: record, attempt, spans } = match store.recording(key) {
            Ok(recording) => recording,
            Err(StoreError::UnknownRollout(_)) => return Err(missing("there is no such rollout".to_owned())),
            Err(StoreError::UnknownAttempt(_)) => return Err(missing("there is no such attempt".to_owned())),
            Err(error) => return Err(error.into()),
        };
        if !attempt.state.is_terminal() {
            return Err(missing("it has not ended".to_owned()));
        }
        let item = items.get(store, &record.spec)?.map_err(missing)?;
        let lineage = match &record.spec.fork_of {
            Some(_) => lineage(store, key).map_err(missing)?,
            None => Lineage {
                spans: Arc::new(spans),
                seeds: vec![(0, record.spec.seed)],
                start_unix_ns: attempt.start_unix_ns,
            },
        };
        if !lineage.spans.last().is_some_and(|span| matches!(span.body, SpanBody::Attempt(_))) {
            return Err(missing("its recording has no end".to_owned()));
        }
        Ok(Self { spec: record.spec, attempt, item, lineage })
    }

    /// What the agent did: the events before those of grading.
    #[must_use]
    pub fn agent_events(&self) -> &[Span] {
        let end = agent_events(&self.lineage.spans);
        self.lineage.spans.get(..end).unwrap_or_default()
    }
}

/// Items that have been read from a store: one serves many rollouts.
#[derive(Debug, Default)]
pub struct Items(Mutex<HashMap<ContentHash, Arc<DatasetItem>>>);

/// Items kept at once. 1,024: a few MB.
const ITEMS_MAX: usize = 1_024;

impl Items {
    fn get(
        &self,
        store: &dyn RolloutStore,
        spec: &RolloutSpec,
    ) -> Result<Result<Arc<DatasetItem>, String>, StoreError> {
        if let Some(item) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&spec.item) {
            return Ok(Ok(Arc::clone(item)));
        }
        let Some(bytes) = store.blob(&spec.item)? else {
            return Ok(Err(format!("its item {} was not kept", spec.item_id)));
        };
        let item: Arc<DatasetItem> = match serde_json::from_slice(&bytes) {
            Ok(item) => Arc::new(item),
            Err(error) => return Ok(Err(format!("its item {} cannot be read: {error}", spec.item_id))),
        };
        if item.texts().hash != spec.item {
            return Ok(Err(format!("its item {} is not what it was", spec.item_id)));
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= ITEMS_MAX {
            known.clear();
        }
        known.insert(spec.item, Arc::clone(&item));
        Ok(Ok(item))
    }
}

/// What a replay found.
#[derive(Debug, Clone)]
pub struct ReplayReport {
    /// Which attempt.
    pub attempt: AttemptKey,
    /// How the replay ended.
    pub outcome: AttemptOutcome,
    /// Events of the recording.
    pub events: u64,
    /// Events that were found the same.
    pub same: u64,
    /// Where the replay left the recording; `None` when all of it was the same.
    pub divergence: Option<Divergence>,
}

/// Rewards of a recorded attempt, before and after it was graded anew.
#[derive(Debug, Clone)]
pub struct Regraded {
    /// Which attempt.
    pub attempt: AttemptKey,
    /// The item.
    pub item_id: String,
    /// Recorded rewards of grader and host.
    pub before: Vec<Reward>,
    /// Rewards of the new grader and of the host, or why there are none.
    pub after: Result<Vec<Reward>, AttemptOutcome>,
}

/// Runs recorded attempts again, under the conditions of one record.
pub struct Replayer {
    conditions: Conditions,
    gatekeeper: Gatekeeper,
    judges: Endpoints,
}

impl std::fmt::Debug for Replayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replayer").field("conditions", &self.conditions).finish_non_exhaustive()
    }
}

/// The model endpoints that the recorded run granted to its `agent` or its `grader`.
#[must_use]
pub fn recorded_endpoints(settings: &ExecutionSettings, plugin: &str) -> EndpointGrants {
    settings.grants.get(plugin).and_then(|record| serde_json::from_str(record).ok()).unwrap_or_default()
}

impl Replayer {
    /// Replays under these conditions.
    ///
    /// # Errors
    /// When this engine is not the one that recorded, or one attempt does not fit on this machine.
    pub fn new(plugins: Plugins, settings: &ExecutionSettings, resources_version: u64) -> Result<Self, ReplayError> {
        let current = plugins.agent.engine();
        if current != settings.engine {
            return Err(ReplayError::Engine { recorded: settings.engine.clone(), current });
        }
        let gatekeeper = Gatekeeper::new(&plugins.agent, plugins.tools.values().map(AsRef::as_ref))
            .map_err(|fault| ReplayError::Conditions(fault.detail))?;
        let templates = Templates::new(resources_version, settings.templates.clone(), Arc::new(JinjaRenderer));
        let conditions = Conditions {
            plugins,
            limits: Arc::new(settings.limits.clone()),
            outcome_reward: settings.outcome_reward.clone(),
            outcome_dimensions: settings.outcome_dimensions.clone(),
            reward_terms: RewardTerms::new(&settings.reward_terms)
                .map_err(|error| ReplayError::Conditions(format!("the recorded conditions: {error}")))?,
            templates: Arc::new(templates),
            grants: RunnerGrants {
                plugin_limits: settings.plugin_limits.clone(),
                // What they answered is in the recording.
                judge_endpoints: recorded_endpoints(settings, "grader")
                    .endpoints
                    .into_iter()
                    .map(|name| (name, Arc::new(NoModel) as Arc<dyn LlmBackend>))
                    .collect(),
                ..RunnerGrants::default()
            },
        };
        Ok(Self { conditions, gatekeeper, judges: Endpoints::new() })
    }

    /// Gives endpoints to the grader of [`Replayer::regrade`]: it asks them anew. A replay never does.
    #[must_use]
    pub fn with_judges(self, judges: Endpoints) -> Self {
        Self { judges, ..self }
    }

    /// Replays one attempt. `observer` is called for every event, in the thread and at the moment in which the guest causes
    /// it: the guest waits until it returns.
    pub async fn replay(&self, recorded: &Recorded, observer: Option<TapeObserver>) -> ReplayReport {
        let _slots = self.gatekeeper.admit().await;
        let mut tape = Tape::whole(Arc::clone(&recorded.lineage.spans), recorded.lineage.seeds.clone());
        if let Some(observer) = observer {
            tape = tape.with_observer(observer);
        }
        let tape = Arc::new(tape);
        let events = recorded.lineage.spans.len() as u64;
        let attempt = recorded.attempt.key.clone();
        if !tape.is_unaltered() {
            let outcome = AttemptOutcome::failed(OutcomeKind::HostFault, "the recording is not what was recorded");
            let divergence = tape.divergence();
            let same = divergence.as_ref().map_or(0, |divergence| divergence.sequence);
            return ReplayReport { attempt, outcome, events, same, divergence };
        }
        let ran = self.run(recorded, &tape).await;
        tape.check_end();
        let divergence = tape.divergence().or_else(|| differs_from_record(&recorded.attempt, &ran, events));
        ReplayReport { attempt, outcome: ran.outcome, events, same: tape.position(), divergence }
    }

    async fn run(&self, recorded: &Recorded, tape: &Arc<Tape>) -> Ran {
        self.conditions
            .run(Attempt {
                key: &recorded.attempt.key,
                start_unix_ns: recorded.lineage.start_unix_ns,
                seed: recorded.spec.seed,
                mode: recorded.spec.mode,
                item: &recorded.item,
                session: Box::new(NoModel),
                tape: Some(Arc::clone(tape)),
                life: None,
                keeps_spans: false,
            })
            .await
    }

    /// Grades a recorded attempt with the grader of these conditions. The agent is not run: its record is what is graded.
    /// Only when the record does not hold the agent's outcome, because the recorded grader failed, the agent is replayed.
    ///
    /// # Errors
    /// When there is no grader, or the attempt is not one that is graded.
    pub async fn regrade(&self, recorded: &Recorded) -> Result<Regraded, ReplayError> {
        let missing =
            |problem: &str| ReplayError::Missing { attempt: recorded.attempt.key.clone(), problem: problem.to_owned() };
        let grader = self.conditions.plugins.grader.as_ref().ok_or_else(|| missing("there is no grader"))?;
        let outcome = recorded.attempt.outcome.clone().ok_or_else(|| missing("it has no outcome"))?;
        let outcome = if outcome.kind == OutcomeKind::GraderFault {
            let events = Arc::new(recorded.agent_events().to_vec());
            let tape = Arc::new(Tape::whole(events, recorded.lineage.seeds.clone()));
            let mut ungraded = self.conditions.clone();
            ungraded.plugins.grader = None;
            let gatekeeper = Gatekeeper::clone(&self.gatekeeper);
            let replayer = Self { conditions: ungraded, gatekeeper, judges: Endpoints::new() };
            replayer.run(recorded, &tape).await.outcome
        } else {
            outcome
        };
        if !outcome.kind.is_graded() {
            return Err(missing(&format!("its outcome {} is not graded", outcome.kind.as_str())));
        }
        let after = self.grade(grader, recorded, &outcome).await;
        let before = recorded.attempt.rewards.iter().filter(|reward| reward.source != RewardSource::Agent);
        Ok(Regraded {
            attempt: recorded.attempt.key.clone(),
            item_id: recorded.spec.item_id.clone(),
            before: before.cloned().collect(),
            after,
        })
    }

    async fn grade(
        &self,
        grader: &GraderPlugin,
        recorded: &Recorded,
        outcome: &AttemptOutcome,
    ) -> Result<Vec<Reward>, AttemptOutcome> {
        let seed = recorded.lineage.seeds.last().map_or(recorded.spec.seed, |(_, seed)| *seed);
        let grants = RunnerGrants { judge_endpoints: self.judges.clone(), ..RunnerGrants::default() };
        let info = SessionInfo {
            attempt: recorded.attempt.key.clone(),
            item_id: recorded.item.id.clone(),
            seed,
            sampling: Sampling::default(),
            history: vec![],
        };
        let log: Arc<dyn HostCallLog> = Arc::new(NoLog);
        let graded = self.conditions.grade(
            grader,
            &recorded.item,
            seed,
            recorded.lineage.start_unix_ns,
            outcome,
            [recorded.agent_events(), &[]],
            grants.judge(&info, &log),
        );
        let (mut rewards, _) = graded.await?;
        rewards.extend(self.conditions.outcome_reward(outcome.kind));
        rewards.extend(self.conditions.reward_terms.rewards([recorded.agent_events(), &[]], recorded.spec.mode));
        Ok(rewards)
    }
}

/// The record of an attempt says again how it ended and what it earned: that is what is trained on.
fn differs_from_record(record: &AttemptRecord, ran: &Ran, events: u64) -> Option<Divergence> {
    let same_rewards = serde_json::to_vec(&record.rewards).ok() == serde_json::to_vec(&ran.rewards).ok();
    let (what, said) = match record.outcome.as_ref() == Some(&ran.outcome) {
        false => ("outcome", format!("{:?}, and not {:?}", ran.outcome, record.outcome)),
        true if !same_rewards => ("rewards", format!("{:?}, and not {:?}", ran.rewards, record.rewards)),
        true => return None,
    };
    Some(Divergence {
        sequence: events,
        what,
        recorded: None,
        replayed: None,
        detail: format!("the events are the recorded ones, but the {what} in the attempt's record should be {said}"),
    })
}

/// What a replay asks when its recording has no answer.
struct NoModel;

impl LlmBackend for NoModel {
    fn open(&self, _: SessionInfo) -> Box<dyn LlmSession> {
        Box::new(Self)
    }

    fn name(&self) -> &'static str {
        "none"
    }
}

impl LlmSession for NoModel {
    fn chat(&self, _: u64, _: Arc<ChatRequest>) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let refused = LlmError::Unavailable("a replay has no model".to_owned());
        Box::pin(std::future::ready(Err(refused)))
    }
}
