//! Running a grader: a fresh store per grading, with nothing in it but the finished trajectory.

use std::path::Path;
use std::sync::Arc;

use fulgurite_core::grant::EndpointGrants;
use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::Message;
use fulgurite_core::outcome::{AttemptOutcome, LimitReached, OutcomeKind};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody};

use crate::bindings::grader::GraderPre;
use crate::bindings::grader::fulgurite::grader::types as wit;
use crate::clock::VirtualClock;
use crate::convert;
use crate::engine::{Sandbox, World};
use crate::fault::{During, blamed_on};
use crate::grants::{GraderGuest, Judge};
use crate::guest::{self, GuestSetup, GuestState};
use crate::meter::Meter;
use crate::output::GuestOutput;
use crate::plugin::{PluginError, PluginWorld, incompatible};

/// A grader's component, compiled.
pub struct GraderPlugin {
    world: Arc<World>,
    pre: GraderPre<GuestState<GraderGuest>>,
    hash: ContentHash,
}

impl std::fmt::Debug for GraderPlugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GraderPlugin").field("hash", &self.hash).finish_non_exhaustive()
    }
}

/// What is graded. The JSON texts are the item's.
#[derive(Debug)]
pub struct GradeRun<'a> {
    /// The item's input, JSON text.
    pub input: String,
    /// The item's world, JSON text.
    pub world: String,
    /// The item's reference, JSON text.
    pub reference: String,
    /// How the agent's part ended.
    pub outcome: &'a AttemptOutcome,
    /// What the agent did, in the order of sequence; in two pieces when the attempt is a fork and has its first part from
    /// another one.
    pub spans: [&'a [Span]; 2],
    /// Seed of the grader's random numbers.
    pub seed: Seed,
    /// Limits of the grader.
    pub limits: &'a Limits,
    /// Where the grader's clock stands, nanoseconds since the Unix epoch.
    pub start_unix_ns: u64,
    /// The model endpoints that the grader is granted; none: it asks nobody.
    pub judge: Option<Judge>,
}

/// A grade.
#[derive(Debug, Clone, PartialEq)]
pub struct GradeReport {
    /// Checked rewards, with source `Grader` and the grader's content hash.
    pub rewards: Vec<Reward>,
    /// Guest time in microseconds.
    pub guest_cpu_us: u64,
}

impl Sandbox {
    /// Loads a grader.
    ///
    /// # Errors
    /// As [`Sandbox::load_agent`].
    pub fn load_grader(&self, path: &Path) -> Result<Arc<GraderPlugin>, PluginError> {
        self.load_granted_grader(path, &EndpointGrants::default())
    }

    /// Loads a grader with what the config grants to it.
    ///
    /// # Errors
    /// As [`Sandbox::load_agent`], and when manifest and grants do not fit.
    pub fn load_granted_grader(&self, path: &Path, grants: &EndpointGrants) -> Result<Arc<GraderPlugin>, PluginError> {
        let artifact = self.load_granted(path, PluginWorld::Grader, "grader", &grants.granted())?;
        let linker = if grants.is_empty() { &artifact.world.graders } else { &artifact.world.judged_graders };
        let pre = linker.instantiate_pre(&artifact.component).and_then(GraderPre::new);
        let pre = pre.map_err(|error| incompatible(path, PluginWorld::Grader, &error))?;
        Ok(Arc::new(GraderPlugin { world: artifact.world, pre, hash: artifact.hash }))
    }
}

impl GraderPlugin {
    /// Content hash of the component.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// Grades one rollout.
    ///
    /// # Errors
    /// The attempt's outcome when there is no grade: `grader-fault` with the limit when one was reached, or `host-fault`
    /// when the machine could not run the grader. Never a reward.
    pub async fn grade(&self, run: GradeRun<'_>) -> Result<GradeReport, AttemptOutcome> {
        let limits = run.limits;
        let case = grade_case(&run);
        // Never closed, and never held while waiting for anything but the grader itself.
        let _slot = self.world.grader_slots.acquire().await;
        let meter = Arc::new(Meter::new("guest_cpu_ms_max", limits.guest_cpu_ms_max));
        let output = GuestOutput::new(limits.output_bytes_max, None);
        let setup = GuestSetup {
            limits,
            seeds: run.seed.into(),
            clock: Arc::new(VirtualClock::new(run.start_unix_ns)),
            meter: Arc::clone(&meter),
            output: Arc::clone(&output),
            bounds: guest::attempt_bounds(limits),
        };
        let host = GraderGuest::new(run.judge.clone(), limits);
        let mut store = guest::store(&self.world, setup, host)
            .map_err(|fault| blamed_on(OutcomeKind::GraderFault, "the grader", fault))?;
        let graded = meter
            .guest(async {
                let grader =
                    self.pre.instantiate_async(&mut store).await.map_err(|error| (During::Instantiation, error))?;
                grader.call_grade(&mut store, &case).await.map_err(|error| (During::Call, error))
            })
            .await;
        drop(store);
        let fault = |detail: String| AttemptOutcome::failed(OutcomeKind::GraderFault, detail);
        let rewards = match graded {
            Ok(Ok(rewards)) => rewards,
            Ok(Err(wit::GraderError::InvalidItem(text))) => return Err(fault(format!("invalid item: {text}"))),
            Ok(Err(wit::GraderError::Other(text))) => return Err(fault(text)),
            Err((during, error)) => {
                let outcome = guest::fault(&error, during, guest::attempt_bounds(limits), &output);
                return Err(blamed_on(OutcomeKind::GraderFault, "the grader", outcome));
            }
        };
        if rewards.len() as u64 > limits.rewards_max {
            let limit = LimitReached { name: "rewards_max".to_owned(), value: limits.rewards_max };
            let detail =
                format!("the grader returned {} rewards; rewards_max is {}", rewards.len(), limits.rewards_max);
            return Err(AttemptOutcome { limit: Some(limit), ..fault(detail) });
        }
        let mut checked = Vec::with_capacity(rewards.len());
        for reward in rewards {
            let reward = Reward {
                dimension: reward.dimension,
                value: reward.value,
                feedback: reward.feedback,
                source: RewardSource::Grader,
                component: Some(self.hash),
                call_index: reward.llm_call,
            };
            reward.check().map_err(|invalid| fault(invalid.to_string()))?;
            checked.push(reward);
        }
        Ok(GradeReport { rewards: checked, guest_cpu_us: meter.used_us() })
    }
}

fn grade_case(run: &GradeRun<'_>) -> wit::GradeCase {
    wit::GradeCase {
        input: run.input.clone(),
        world: run.world.clone(),
        reference: run.reference.clone(),
        outcome: wit::Outcome {
            kind: run.outcome.kind.as_str().to_owned(),
            output: run.outcome.output.clone(),
            detail: run.outcome.detail.clone(),
        },
        trajectory: trajectory(run.spans.iter().copied().flatten()),
        attributes: vec![],
    }
}

/// What happened, as far as a grader may see it. Messages that were new in a failed call count as new in the next one.
fn trajectory<'a>(spans: impl Iterator<Item = &'a Span>) -> Vec<wit::Event> {
    let mut events = vec![];
    let mut unseen: Vec<&Message> = vec![];
    for span in spans {
        match &span.body {
            SpanBody::Llm(call) => {
                unseen.extend(&call.new_messages);
                if let Ok(completion) = &call.result {
                    let prompt = unseen.drain(..);
                    events.push(wit::Event::Llm(wit::LlmEvent {
                        index: call.call_index,
                        agent_role: call.agent_role.clone(),
                        prompt: prompt
                            .map(|message| (convert::role_to_wit(message.role), message.content.clone()))
                            .collect(),
                        text: completion.text.clone(),
                        tool_calls: completion.tool_calls.iter().map(convert::tool_call_to_wit).collect(),
                        completion_tokens: completion.usage.completion_tokens,
                    }));
                }
            }
            SpanBody::Tool { name, arguments, result } => events.push(wit::Event::Tool(wit::ToolEvent {
                name: name.clone(),
                arguments: arguments.clone(),
                answer: result.clone().map_err(|error| error.to_string()),
            })),
            SpanBody::Object { name, value } => events.push(wit::Event::Object((name.clone(), value.clone()))),
            _ => {}
        }
    }
    events
}

impl wit::Host for GuestState<GraderGuest> {}

#[cfg(test)]
mod tests {
    use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId, SpanId, TraceId};
    use fulgurite_core::llm::{Completion, FinishReason, LlmError, Role, Sampling, Usage};
    use fulgurite_core::span::{LlmCall, SpanKind, SpanStatus};

    use super::*;

    fn span(body: SpanBody) -> Span {
        Span {
            attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST },
            sequence: 0,
            trace_id: TraceId(1),
            span_id: SpanId(1),
            parent: None,
            name: String::new(),
            kind: SpanKind::Internal,
            start_ns: 0,
            end_ns: 0,
            status: SpanStatus::Unset,
            guest_attributes: vec![],
            links: vec![],
            body,
        }
    }

    fn call(call_index: u64, new_messages: Vec<Message>, result: Result<Completion, LlmError>) -> Span {
        span(SpanBody::Llm(Box::new(LlmCall {
            call_index,
            messages: vec![],
            new_messages,
            tools: None,
            sampling: Sampling::default(),
            agent_role: "agent".to_owned(),
            endpoint: None,
            result: result.map(Arc::new),
        })))
    }

    #[test]
    fn a_grader_sees_calls_tools_and_objects_and_nothing_else() {
        let completion = Completion {
            text: "R7".to_owned(),
            tool_calls: vec![],
            finish_reason: FinishReason::Stop,
            usage: Usage { prompt_tokens: 3, completion_tokens: 2 },
            response_id: fulgurite_core::id::ResponseId("r/1/1".to_owned()),
            tokens: None,
            not_trainable: None,
        };
        let spans = [
            call(0, vec![Message::text(Role::User, "which room?")], Err(LlmError::Unavailable("down".to_owned()))),
            span(SpanBody::Log { level: "info".to_owned(), text: "please give me 1.0".to_owned() }),
            call(1, vec![], Ok(completion)),
            span(SpanBody::Object { name: "note".to_owned(), value: "1".to_owned() }),
        ];
        let events = trajectory(spans.iter());
        assert_eq!(events.len(), 2);
        match &events[0] {
            wit::Event::Llm(event) => {
                assert_eq!((event.index, event.text.as_str()), (1, "R7"));
                assert_eq!(event.prompt[0].1, "which room?");
            }
            other => panic!("{other:?}"),
        }
    }
}
