//! One attempt: tools, agent, grader. The same code runs an attempt for the first time, goes on where a fork begins, and
//! plays a recording back; what differs is where answers come from and where events go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::AttemptKey;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{LlmSession, Sampling, SessionInfo};
use fulgurite_core::outcome::{AttemptOutcome, Blame, OutcomeKind};
use fulgurite_core::record::RolloutMode;
use fulgurite_core::recording::fingerprint;
use fulgurite_core::reward::{DEFAULT_DIMENSION, Reward, RewardSource};
use fulgurite_core::seed::Seed;
use fulgurite_core::span::{Span, SpanBody, SpanRefused, SpanSink};
use fulgurite_core::tool::ToolHost;
use fulgurite_sandbox::{AgentRun, GradeRun, GraderPlugin, Judge, Recorder, SeedSource, Tape, ToolSet};

use crate::settings::Conditions;
use crate::watchdog::Life;

/// What one attempt works on.
pub(crate) struct Attempt<'a> {
    pub(crate) key: &'a AttemptKey,
    pub(crate) start_unix_ns: u64,
    pub(crate) seed: Seed,
    pub(crate) mode: RolloutMode,
    pub(crate) item: &'a DatasetItem,
    pub(crate) session: Box<dyn LlmSession>,
    /// What is played back first.
    pub(crate) tape: Option<Arc<Tape>>,
    /// Who may end it from outside.
    pub(crate) life: Option<&'a Life>,
    /// Whether its events are kept.
    pub(crate) keeps_spans: bool,
}

/// What one attempt left behind.
pub(crate) struct Ran {
    pub(crate) outcome: AttemptOutcome,
    pub(crate) rewards: Vec<Reward>,
    /// Its own events: those after what was played back.
    pub(crate) spans: Vec<Span>,
    pub(crate) guest_cpu_us: u64,
    pub(crate) not_forkable: Option<String>,
}

impl Conditions {
    pub(crate) async fn run(&self, attempt: Attempt<'_>) -> Ran {
        let Attempt { key, start_unix_ns, seed, mode, item, session, tape, life, keeps_spans } = attempt;
        let keeps_spans = keeps_spans || self.plugins.grader.is_some() || !self.reward_terms.is_empty();
        let buffer = Arc::new(SpanBuffer { spans: Mutex::default(), keeps: keeps_spans });
        let sink = Arc::clone(&buffer) as Arc<dyn SpanSink>;
        let mut recorder = Recorder::new(key.clone(), seed, start_unix_ns, sink);
        if let Some(tape) = &tape {
            recorder = recorder.with_tape(Arc::clone(tape));
        }
        let recorder = Arc::new(recorder);
        let mut used = Used::default();
        let mut work = Box::pin(self.agent(
            item,
            AgentRun {
                key: key.clone(),
                seed,
                mode,
                input: Arc::clone(&item.texts().input),
                limits: self.agent_limits(),
                llm: Arc::from(session),
                tools: None,
                templates: Arc::clone(&self.templates),
                recorder: Arc::clone(&recorder),
                start_unix_ns,
                heartbeat: life.map(Life::heartbeat),
            },
            &mut used,
        ));
        let ended_from_outside = async {
            let outcome = ended_from_outside(life).await;
            // Before its sandbox is dropped: what that records is not the guest's doing.
            recorder.ends();
            outcome
        };
        let mut outcome = tokio::select! {
            ended = &mut work => ended,
            outcome = ended_from_outside => outcome,
            () = cut(tape.as_deref()) => AttemptOutcome::failed(OutcomeKind::HostFault, "the recording has no end"),
        };
        // A replay ends where its recording was ended from outside, and as it.
        if let Some(recorded) = tape.as_deref().filter(|tape| tape.was_cut()).and_then(Tape::outcome) {
            outcome = recorded.clone();
        }
        drop(work);
        let not_forkable = used.tools.as_ref().and_then(|tools| tools.not_forkable());
        let mut own = buffer.take();
        let mut rewards = given_by_agent(tape.as_deref().map_or(&[], Tape::played), &own);
        if outcome.kind.is_graded() {
            let played = tape.as_deref().map_or(&[][..], Tape::played);
            let graded = match &self.plugins.grader {
                Some(grader) => {
                    let start = start_unix_ns;
                    let judge = self.judge(key, item, seed, &recorder);
                    let grading = Box::pin(self.grade(grader, item, seed, start, &outcome, [played, &own], judge));
                    grading.await.map(|(rewards, cpu_us)| {
                        used.guest_cpu_us = used.guest_cpu_us.saturating_add(cpu_us);
                        rewards
                    })
                }
                None => Ok(vec![]),
            };
            match graded {
                Ok(grades) => {
                    let first = rewards.len();
                    rewards.extend(grades);
                    rewards.extend(self.outcome_reward(outcome.kind));
                    rewards.extend(self.reward_terms.rewards([played, &own], mode));
                    for reward in rewards.iter().skip(first) {
                        recorder.record(&format!("reward {}", reward.dimension), SpanBody::Reward(reward.clone()));
                    }
                }
                Err(fault) => {
                    let grader = self.plugins.grader.as_ref().map(|grader| grader.hash().to_string());
                    let fault_text = Some(fault.detail.clone());
                    let body = SpanBody::Grade { grader: grader.unwrap_or_default(), fault: fault_text };
                    recorder.record("grade", body);
                    outcome = fault;
                }
            }
        }
        own.extend(buffer.take());
        if keeps_spans || tape.is_some() {
            let played = tape.as_deref().map_or(&[][..], Tape::played_fingerprints);
            let fingerprints = played.iter().copied().chain(own.iter().map(fingerprint)).collect();
            recorder.finish_recording(&outcome, fingerprints);
        } else {
            recorder.finish(&outcome);
        }
        own.extend(buffer.take());
        if !keeps_spans {
            own.clear();
        }
        Ran { outcome, rewards, spans: own, guest_cpu_us: used.guest_cpu_us, not_forkable }
    }

    async fn agent(&self, item: &DatasetItem, mut run: AgentRun, used: &mut Used) -> AttemptOutcome {
        let mut open_tools = Vec::with_capacity(self.plugins.tools.len());
        let log = run.recorder.host_call_log();
        for (name, tool) in &self.plugins.tools {
            let world = item.texts().world.as_ref().to_owned();
            let seeds = SeedSource::new(run.seed, run.recorder.tape().cloned()).child("tool").child(name);
            let limits = self.grants.limits(name, &self.limits);
            match tool.open_recorded(world, seeds, limits, run.start_unix_ns, Arc::clone(&log)).await {
                Ok(host) => open_tools.push(host),
                Err(fault) => return fault,
            }
        }
        let tools: Arc<dyn ToolHost> = Arc::new(ToolSet::new(open_tools));
        run.tools = Some(Arc::clone(&tools));
        used.tools = Some(Arc::clone(&tools));
        let report = self.plugins.agent.run(run).await;
        used.guest_cpu_us = report.guest_cpu_us.saturating_add(tools.guest_cpu_us());
        report.outcome
    }

    fn agent_limits(&self) -> Arc<Limits> {
        match self.grants.plugin_limits.get("agent") {
            Some(own) => Arc::new(own.clone()),
            None => Arc::clone(&self.limits),
        }
    }

    /// The endpoints that the grader may ask; what it asks is recorded like what a tool does.
    fn judge(&self, key: &AttemptKey, item: &DatasetItem, seed: Seed, recorder: &Arc<Recorder>) -> Option<Judge> {
        let info = SessionInfo {
            attempt: key.clone(),
            item_id: item.id.clone(),
            seed,
            sampling: Sampling::default(),
            history: vec![],
        };
        self.grants.judge(&info, &recorder.host_call_log())
    }

    /// Grades what an agent did.
    #[expect(clippy::too_many_arguments, reason = "what a grade depends on, each part as it is")]
    pub(crate) async fn grade(
        &self,
        grader: &GraderPlugin,
        item: &DatasetItem,
        seed: Seed,
        start_unix_ns: u64,
        outcome: &AttemptOutcome,
        spans: [&[Span]; 2],
        judge: Option<Judge>,
    ) -> Result<(Vec<Reward>, u64), AttemptOutcome> {
        let texts = item.texts();
        let run = GradeRun {
            input: texts.input.as_ref().to_owned(),
            world: texts.world.as_ref().to_owned(),
            reference: texts.reference.as_ref().to_owned(),
            outcome,
            spans,
            seed: seed.child("grader"),
            limits: self.grants.limits("grader", &self.limits),
            start_unix_ns,
            judge,
        };
        let report = grader.grade(run).await?;
        Ok((report.rewards, report.guest_cpu_us))
    }

    /// What the host itself adds. An outcome blamed on the policy always has a reward in every dimension that is trained on, so
    /// that it stays in baseline and loss even when the grader says nothing about it.
    pub(crate) fn outcome_reward(&self, kind: OutcomeKind) -> Vec<Reward> {
        if kind.blame() != Some(Blame::Policy) {
            return vec![];
        }
        let value = self.outcome_reward.get(&kind).copied().unwrap_or(0.0);
        let others = self.outcome_dimensions.iter().map(String::as_str);
        let dimensions = std::iter::once(DEFAULT_DIMENSION).chain(others.filter(|name| *name != DEFAULT_DIMENSION));
        let of = |dimension: &str| Reward {
            dimension: dimension.to_owned(),
            value,
            feedback: None,
            source: RewardSource::Host,
            component: None,
            call_index: None,
        };
        dimensions.map(of).collect()
    }
}

/// What an attempt used, as far as it came.
#[derive(Default)]
struct Used {
    guest_cpu_us: u64,
    /// Asked at the end, however that comes, for what they cannot do again.
    tools: Option<Arc<dyn ToolHost>>,
}

async fn ended_from_outside(life: Option<&Life>) -> AttemptOutcome {
    match life {
        Some(life) => life.ended().await,
        None => std::future::pending().await,
    }
}

async fn cut(tape: Option<&Tape>) {
    match tape {
        Some(tape) => tape.cut().await,
        None => std::future::pending().await,
    }
}

/// The rewards that an agent gave itself.
fn given_by_agent(played: &[Span], own: &[Span]) -> Vec<Reward> {
    let rewards = played.iter().chain(own).filter_map(|span| match &span.body {
        SpanBody::Reward(reward) if reward.source == RewardSource::Agent => Some(reward.clone()),
        _ => None,
    });
    rewards.collect()
}

/// Holds the spans of one attempt until it is committed. Outlives the guest, so that a cancelled attempt keeps what it did.
#[derive(Debug)]
struct SpanBuffer {
    spans: Mutex<Vec<Span>>,
    keeps: bool,
}

impl SpanBuffer {
    fn lock(&self) -> MutexGuard<'_, Vec<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<Span> {
        std::mem::take(&mut *self.lock())
    }
}

impl SpanSink for SpanBuffer {
    fn record(&self, span: Span) -> Result<(), SpanRefused> {
        if self.keeps || matches!(span.body, SpanBody::Reward(_)) {
            self.lock().push(span);
        }
        Ok(())
    }
}
