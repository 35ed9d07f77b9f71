//! Spans to transitions: one per LLM call that was answered.

use fulgurite_core::algorithm::ModelReference;
use fulgurite_core::id::{ContentHash, PolicyVersion, ResponseId, TransitionId};
use fulgurite_core::llm::{Completion, KeptTokens, NotTrainable, Sampling, TokenData};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::{LlmCall, Span, SpanBody};

/// One transition: the model's input is the state, its output the action.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// Its id, derived from attempt and call.
    pub id: TransitionId,
    /// Which call of the attempt, from 0.
    pub call_index: u64,
    /// Number of the event that the call is in its attempt; 0 for demonstrations.
    pub event: u64,
    /// Which agent asked.
    pub agent_role: String,
    /// What the model saw and drew; `None` when that is not known. Of a demonstration: what stands before the first
    /// trained token and what follows from there, without log-probs.
    pub tokens: Option<TokenData>,
    /// Which of the completion's tokens count as drawn. Empty means all of them: only demonstrations with several
    /// trained messages have others in between.
    pub mask: Vec<bool>,
    /// Where in the prompt the tokens begin that no earlier call of the rollout covers.
    pub observed_from: usize,
    /// Temperature of the distribution that the log-probs are of; 1 when the call was greedy.
    pub temperature: f32,
    /// Drawn tokens that are left out of `tokens`, because their row would be too long.
    pub cut_tokens: usize,
    /// Why it cannot be trained on; `None` when it can.
    pub not_trainable: Option<NotTrainable>,
    /// The rewards of this call.
    pub rewards: Vec<Reward>,
    /// The completion's text.
    pub text: String,
    /// Set on demonstrations: where it comes from, JSON text.
    pub origin: Option<String>,
}

impl Transition {
    /// A transition that was not drawn but given: token ids, and which of them are trained on. The lists are as long as
    /// each other; where they are not, what has no partner is left out.
    #[must_use]
    pub fn demonstration(
        id: TransitionId,
        mut ids: Vec<u32>,
        mut mask: Vec<bool>,
        text: String,
        origin: String,
    ) -> Self {
        ids.truncate(mask.len());
        mask.truncate(ids.len());
        let first = mask.iter().position(|trained| *trained).unwrap_or(mask.len());
        let completion_ids = ids.split_off(first);
        let mask = mask.split_off(first);
        let tokens = TokenData {
            prompt_ids: ids,
            completion_ids,
            log_probs: vec![],
            processed_log_probs: vec![],
            policy_version: PolicyVersion::default(),
            token_versions: vec![],
            kept: KeptTokens::default(),
            model: None,
        };
        Self {
            id,
            call_index: 0,
            event: 0,
            agent_role: String::new(),
            tokens: Some(tokens),
            mask,
            observed_from: 0,
            temperature: 1.0,
            cut_tokens: 0,
            not_trainable: None,
            rewards: vec![],
            text,
            origin: Some(origin),
        }
    }

    /// Whether it was given rather than drawn.
    #[must_use]
    pub const fn is_demonstration(&self) -> bool {
        self.origin.is_some()
    }

    /// Whether it may be trained on.
    #[must_use]
    pub fn is_trainable(&self) -> bool {
        let is_cut_whole = self.cut_tokens > 0 && self.sampled_tokens() == 0;
        self.not_trainable.is_none() && self.tokens.is_some() && !is_cut_whole
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.tokens.as_ref().map_or(0, |tokens| tokens.prompt_ids.len())
    }

    /// Tokens that the policy drew, or that are trained on in a demonstration: what scope `sampled` has weights for.
    #[must_use]
    pub fn sampled_tokens(&self) -> usize {
        if self.mask.is_empty() {
            self.tokens.as_ref().map_or(0, |tokens| tokens.completion_ids.len())
        } else {
            self.mask.iter().filter(|sampled| **sampled).count()
        }
    }

    /// Tokens of the prompt that no earlier call of the rollout covers: what scope `observed` has weights for.
    #[must_use]
    pub fn observed_tokens(&self) -> usize {
        self.prompt_tokens().saturating_sub(self.observed_from)
    }

    /// Sum of the log-probs (nats) under the weights that drew it; 0 for demonstrations.
    #[must_use]
    pub fn log_prob_sum(&self) -> f64 {
        self.tokens
            .as_ref()
            .map_or(0.0, |tokens| tokens.behaviour_log_probs().iter().map(|log_prob| f64::from(*log_prob)).sum())
    }

    /// Hash of the prompt's tokens; 0 where they are not known. Equal prompts have equal hashes.
    #[must_use]
    pub fn prompt_hash(&self) -> u64 {
        self.tokens.as_ref().map_or(0, |tokens| hash(&tokens.prompt_ids))
    }

    /// Hash of the prompt's tokens that no earlier call of the rollout covers; 0 where there are none, or they are not known.
    /// All calls that saw nothing new would have one hash otherwise, as if they had seen the same.
    #[must_use]
    pub fn observation_hash(&self) -> u64 {
        let observed = self.tokens.as_ref().and_then(|tokens| tokens.prompt_ids.get(self.observed_from..));
        observed.filter(|ids| !ids.is_empty()).map_or(0, hash)
    }

    /// The model that drew it, as verbs name it; the policy for what was given and for what has no tokens.
    #[must_use]
    pub fn model(&self) -> ModelReference {
        let name = self.tokens.as_ref().and_then(|tokens| tokens.model.as_ref());
        name.map_or(ModelReference::Policy, |name| ModelReference::Named(name.to_string()))
    }

    /// The weights that drew it.
    #[must_use]
    pub fn policy_version(&self) -> PolicyVersion {
        self.tokens.as_ref().map(|tokens| tokens.policy_version).unwrap_or_default()
    }

    fn of_call(span: &Span, call: &LlmCall, completion: &Completion, rollout_sampling: &Sampling) -> Self {
        let mut tokens = completion.tokens.clone();
        let mut not_trainable = completion.not_trainable.clone();
        if call.endpoint.is_some() {
            not_trainable.get_or_insert(NotTrainable::OtherEndpoint);
        }
        // An endpoint's numbers are its own affair until they are trained on.
        if tokens.as_ref().is_none_or(|tokens| !is_consistent(tokens)) {
            tokens = None;
            not_trainable.get_or_insert(NotTrainable::NoTokenIds);
        }
        Self {
            id: TransitionId(ResponseId::of_call(&span.attempt, call.call_index).0),
            call_index: call.call_index,
            event: span.sequence,
            agent_role: call.agent_role.clone(),
            tokens,
            mask: vec![],
            observed_from: 0,
            temperature: temperature(&call.sampling, rollout_sampling),
            cut_tokens: 0,
            not_trainable,
            rewards: vec![],
            text: completion.text.clone(),
            origin: None,
        }
    }

    /// All tokens that the call has seen and drawn.
    fn ids(&self) -> impl Iterator<Item = u32> {
        self.tokens.iter().flat_map(|tokens| tokens.prompt_ids.iter().chain(&tokens.completion_ids)).copied()
    }
}

/// The first 8 bytes of a content hash: a run has far fewer different prompts than would make two of them meet.
fn hash(ids: &[u32]) -> u64 {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let hash = ContentHash::of(&bytes);
    hash.as_bytes().iter().take(8).rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// One log-prob per drawn token, each the logarithm of a probability above 0.
fn is_consistent(tokens: &TokenData) -> bool {
    // Rounding may put a certain token slightly above 0.
    const LOG_PROB_MAX: f32 = 1e-3;
    let tokens_count = tokens.completion_ids.len();
    let is_valid = |log_probs: &[f32]| {
        log_probs.len() == tokens_count
            && log_probs.iter().all(|log_prob| log_prob.is_finite() && *log_prob <= LOG_PROB_MAX)
    };
    let drawn = || tokens.completion_ids.iter().enumerate();
    let was_kept = |(place, id): (usize, &u32)| tokens.kept.at(place).is_none_or(|kept| kept.binary_search(id).is_ok());
    is_valid(&tokens.log_probs)
        && is_valid(tokens.behaviour_log_probs())
        && (tokens.kept.is_empty() || tokens.kept.len() == tokens_count)
        && tokens.kept.is_sound()
        && drawn().all(was_kept)
}

/// The temperature at which log-probs were taken: the call's own, or the rollout's where the call left it at its
/// default, as [`SessionInfo`](fulgurite_core::llm::SessionInfo) says.
#[expect(clippy::float_cmp, reason = "the default is a literal, not the result of a computation")]
fn temperature(call: &Sampling, rollout: &Sampling) -> f32 {
    let temperature =
        if call.temperature == Sampling::default().temperature { rollout.temperature } else { call.temperature };
    if temperature > 0.0 { temperature } else { 1.0 }
}

/// What an attempt did, as algorithms see it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trajectory {
    /// Its answered LLM calls, by call index, with the rewards that belong to them.
    pub transitions: Vec<Transition>,
    /// The rewards of the whole rollout: those without a call, or with one that was not answered.
    pub rewards: Vec<Reward>,
}

impl Trajectory {
    /// Takes the spans of one attempt, its accepted rewards, and the sampling of its rollout's spec.
    ///
    /// Rewards come from the attempt's record, not from its spans: the record has those that were accepted.
    #[must_use]
    pub fn new(spans: &[Span], rewards: &[Reward], rollout_sampling: &Sampling) -> Self {
        let mut transitions: Vec<Transition> = Vec::new();
        for span in spans {
            if let SpanBody::Llm(call) = &span.body
                && let Ok(completion) = &call.result
            {
                transitions.push(Transition::of_call(span, call, completion, rollout_sampling));
            }
        }
        // Spans are in the order in which calls ended, which for parallel calls is not that in which they began.
        transitions.sort_by_key(|transition| transition.call_index);
        transitions.dedup_by_key(|transition| transition.call_index);
        find_observed(&mut transitions);
        let mut of_rollout = Vec::new();
        for reward in rewards {
            let place =
                reward.call_index.and_then(|index| transitions.binary_search_by_key(&index, |t| t.call_index).ok());
            match place.and_then(|place| transitions.get_mut(place)) {
                Some(transition) => transition.rewards.push(reward.clone()),
                None => of_rollout.push(reward.clone()),
            }
        }
        Self { transitions, rewards: of_rollout }
    }
}

/// Finds where in each prompt begins what no earlier call covers: behind the longest prefix that it shares with the
/// prompt and completion of any call before it.
fn find_observed(transitions: &mut [Transition]) {
    for place in 1..transitions.len() {
        let Some((transition, earlier)) = transitions.get_mut(..=place).and_then(<[_]>::split_last_mut) else { return };
        let Some(tokens) = &transition.tokens else { continue };
        let shared =
            |other: &Transition| tokens.prompt_ids.iter().zip(other.ids()).take_while(|(a, b)| *a == b).count();
        transition.observed_from = earlier.iter().map(shared).max().unwrap_or(0);
    }
}

/// The transitions of one attempt, with the accepted rewards that belong to single calls; those of the whole rollout stay
/// with the caller. Short for [`Trajectory::new`] with default sampling.
#[must_use]
pub fn transitions(spans: &[Span], rewards: &[Reward]) -> Vec<Transition> {
    Trajectory::new(spans, rewards, &Sampling::default()).transitions
}

/// Selective optimisation: the transitions of these agent roles. What other agents said stays context of later calls and
/// is never trained on.
pub fn of_roles<'a>(transitions: &'a [Transition], roles: &'a [String]) -> impl Iterator<Item = &'a Transition> {
    transitions.iter().filter(|transition| roles.contains(&transition.agent_role))
}
