//! Spans of attempts for tests, in the order in which they were recorded.

#![allow(dead_code, reason = "each test binary uses a part of this")]

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, ResponseId, RolloutId, SpanId, TraceId};
use fulgurite_core::llm::{
    Completion, FinishReason, KeptTokens, LlmError, Sampling, TokenData, ToolCall, ToolSpec, Usage,
};
use fulgurite_core::reward::{Reward, RewardSource};
use fulgurite_core::span::{LlmCall, Span, SpanBody, SpanKind, SpanStatus};
use fulgurite_core::tool::ToolError;

/// An attempt in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attempt {
    pub(crate) spans: Vec<Span>,
    calls: u64,
}

/// An answer in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    pub(crate) text: &'static str,
    pub(crate) drawn: Vec<u32>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) tools: Vec<(&'static str, &'static str)>,
    pub(crate) offered: Option<Vec<(&'static str, &'static str)>>,
    pub(crate) endpoint: Option<&'static str>,
    pub(crate) without_ids: bool,
}

impl Attempt {
    fn push(&mut self, body: SpanBody) {
        let sequence = self.spans.len() as u64;
        self.spans.push(Span {
            attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber(1) },
            sequence,
            trace_id: TraceId(1),
            span_id: SpanId(sequence + 1),
            parent: None,
            name: String::new(),
            kind: SpanKind::Internal,
            start_ns: 0,
            end_ns: 0,
            status: SpanStatus::Ok,
            guest_attributes: vec![],
            links: vec![],
            body,
        });
    }

    /// Adds a call.
    #[expect(clippy::needless_pass_by_value, reason = "made where it is added")]
    pub(crate) fn call(mut self, answer: Answer) -> Self {
        let index = self.calls;
        self.calls += 1;
        let tool_call = |(name, arguments): &(&str, &str)| ToolCall {
            id: String::new(),
            name: (*name).to_owned(),
            arguments: (*arguments).to_owned(),
        };
        let tokens = TokenData {
            log_probs: vec![-0.5; answer.drawn.len()],
            prompt_ids: answer.prompt.clone(),
            completion_ids: answer.drawn.clone(),
            processed_log_probs: vec![],
            policy_version: PolicyVersion(1),
            token_versions: vec![],
            kept: KeptTokens::default(),
            model: None,
        };
        let completion_tokens = u32::try_from(answer.drawn.len()).unwrap();
        let completion = Completion {
            text: answer.text.to_owned(),
            tool_calls: answer.tools.iter().map(tool_call).collect(),
            finish_reason: FinishReason::Stop,
            usage: Usage { prompt_tokens: 0, completion_tokens },
            response_id: ResponseId(format!("r/1/{index}")),
            tokens: (!answer.without_ids).then_some(tokens),
            not_trainable: None,
        };
        self.push(llm(index, &answer, Ok(completion)));
        self
    }

    /// Adds a call that was not answered.
    pub(crate) fn unanswered(mut self) -> Self {
        let index = self.calls;
        self.calls += 1;
        self.push(llm(index, &Answer::default(), Err(LlmError::Unavailable("down".to_owned()))));
        self
    }

    /// Adds a tool call that ended.
    pub(crate) fn tool(mut self, name: &str, arguments: &str, result: Result<&str, ToolError>) -> Self {
        self.push(SpanBody::Tool {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
            result: result.map(str::to_owned),
        });
        self
    }

    /// Adds a reward.
    pub(crate) fn reward(mut self, reward: &Reward) -> Self {
        self.push(SpanBody::Reward(reward.clone()));
        self
    }

    /// The rewards, as the attempt's record has them.
    pub(crate) fn rewards(&self) -> Vec<Reward> {
        let reward = |span: &Span| match &span.body {
            SpanBody::Reward(reward) => Some(reward.clone()),
            _ => None,
        };
        self.spans.iter().filter_map(reward).collect()
    }
}

fn llm(call_index: u64, answer: &Answer, result: Result<Completion, LlmError>) -> SpanBody {
    let spec = |(name, parameters): &(&str, &str)| ToolSpec {
        name: (*name).to_owned(),
        description: String::new(),
        parameters: (*parameters).to_owned(),
    };
    SpanBody::Llm(Box::new(LlmCall {
        call_index,
        messages: vec![],
        new_messages: vec![],
        tools: answer.offered.as_ref().map(|offered| offered.iter().map(spec).collect()),
        sampling: Sampling::default(),
        agent_role: String::new(),
        endpoint: answer.endpoint.map(str::to_owned),
        result: result.map(std::sync::Arc::new),
    }))
}

/// A reward without feedback.
pub(crate) fn reward(source: RewardSource, dimension: &str, value: f64, call_index: Option<u64>) -> Reward {
    Reward { dimension: dimension.to_owned(), value, feedback: None, source, component: None, call_index }
}
