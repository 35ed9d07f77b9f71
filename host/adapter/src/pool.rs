//! Transitions by their ids, as verbs name them, and the rows of a batch of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::algorithm::{AlgorithmHostError, BatchEntry, ModelReference, Scope, Weights};
use fulgurite_core::id::TransitionId;
use fulgurite_core::training::{Stream, TrainingRow};

use crate::rows::{Sequence, rows};
use crate::transition::Transition;

/// Transitions that may be trained on.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    held: BTreeMap<TransitionId, Held>,
}

#[derive(Debug, Clone)]
struct Held {
    transition: Arc<Transition>,
    sequence: String,
    /// Log-probs of its sampled tokens under a model that is trained, at the start of the update.
    anchors: Vec<(ModelReference, Arc<[f32]>)>,
}

impl Pool {
    /// Takes a transition of a sequence: a rollout's id, or the transition's own for a demonstration.
    pub fn insert(&mut self, transition: Arc<Transition>, sequence: String) {
        self.held.insert(transition.id.clone(), Held { transition, sequence, anchors: vec![] });
    }

    /// Forgets the transitions of every sequence that is not to be kept.
    pub fn retain_sequences(&mut self, mut keeps: impl FnMut(&str) -> bool) {
        self.held.retain(|_, held| keeps(&held.sequence));
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.held.clear();
    }

    fn get(&self, id: &TransitionId) -> Result<&Held, AlgorithmHostError> {
        let unknown = || AlgorithmHostError::Unknown { kind: "transition of this step", id: id.to_string() };
        self.held.get(id).ok_or_else(unknown)
    }

    /// Refuses a transition that another model drew than the one that it is to train: its log-probs are of that one.
    /// Demonstrations are anybody's.
    ///
    /// # Errors
    /// When there is no such transition, or it is another model's.
    pub fn check_model(&self, model: &ModelReference, id: &TransitionId) -> Result<(), AlgorithmHostError> {
        let transition = &self.get(id)?.transition;
        let drew = transition.model();
        if transition.is_demonstration() || drew == *model {
            return Ok(());
        }
        let shown = |model: &ModelReference| match model {
            ModelReference::Policy => "the policy".to_owned(),
            ModelReference::Snapshot(name) => format!("snapshot `{name}`"),
            ModelReference::Named(name) => format!("model `{name}`"),
        };
        let (role, own, other) = (&transition.agent_role, shown(&drew), shown(model));
        let problem = format!(
            "transition `{id}` was drawn by {own} for the agent role `{role}` and cannot train {other}; split the batch by the \
             transitions' `model`, or leave the role out"
        );
        Err(AlgorithmHostError::InvalidArgument(problem))
    }

    /// Keeps the log-probs (nats) of a transition's sampled tokens under a model as its π_old, in place of earlier ones.
    ///
    /// # Errors
    /// When there is no such transition.
    pub fn anchor(
        &mut self,
        model: &ModelReference,
        id: &TransitionId,
        log_probs: Vec<f32>,
    ) -> Result<(), AlgorithmHostError> {
        self.get(id)?;
        if let Some(held) = self.held.get_mut(id) {
            held.anchors.retain(|(known, _)| known != model);
            held.anchors.push((model.clone(), log_probs.into()));
        }
        Ok(())
    }

    /// Joins the entries of a batch by sequence and makes training rows of them, for a loss of this model.
    ///
    /// # Errors
    /// When a transition is unknown or cannot be trained on, and as [`rows`].
    pub fn rows(
        &self,
        model: &ModelReference,
        batch: &[BatchEntry],
        row_tokens_max: usize,
    ) -> Result<Vec<TrainingRow>, AlgorithmHostError> {
        let mut sequences: BTreeMap<&str, Sequence> = BTreeMap::new();
        for entry in batch {
            let held = self.get(&entry.transition)?;
            if !held.transition.is_trainable() {
                let reason = held.transition.not_trainable.as_ref();
                let reason = reason
                    .map_or_else(|| "all of it is beyond `rollout.row_tokens_max`".to_owned(), |r| format!("{r:?}"));
                let problem = format!("transition `{}` cannot be trained on: {reason}", entry.transition);
                return Err(AlgorithmHostError::InvalidArgument(problem));
            }
            let sequence = sequences.entry(&held.sequence).or_default();
            if let Some((_, anchor)) = held.anchors.iter().find(|(known, _)| known == model) {
                sequence.anchors.insert(entry.transition.clone(), Arc::clone(anchor));
            }
            sequence.entries.push((Arc::clone(&held.transition), entry.clone()));
        }
        let sequences: Vec<Sequence> = sequences.into_values().collect();
        rows(&sequences, row_tokens_max).map_err(|error| AlgorithmHostError::InvalidArgument(error.to_string()))
    }

    /// The row of one transition, whole, with unit weights, and how many of its tokens are trained: for verbs that speak of
    /// transitions, not of losses.
    ///
    /// # Errors
    /// As [`Self::rows`].
    pub fn row_of(&self, id: &TransitionId, row_tokens_max: usize) -> Result<(TrainingRow, usize), AlgorithmHostError> {
        let tokens = self.get(id)?.transition.tokens.as_ref();
        // A demonstration has no log-probs of a sampler; these verbs need none.
        let is_demonstration = tokens.is_some_and(|tokens| tokens.log_probs.is_empty());
        let entry = BatchEntry {
            transition: id.clone(),
            stream: if is_demonstration { Stream::Ce } else { Stream::Rl },
            scope: Scope::Sampled,
            weights: Weights::Scalar(1.0),
            group: None,
        };
        let mut rows = self.rows(&ModelReference::Policy, std::slice::from_ref(&entry), row_tokens_max)?;
        let row = rows.pop().ok_or_else(|| AlgorithmHostError::Failed("a transition gave no row".to_owned()))?;
        let sampled = row.mask.iter().filter(|sampled| **sampled).count();
        Ok((row, sampled))
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::id::PolicyVersion;
    use fulgurite_core::llm::{KeptTokens, TokenData};

    use super::*;

    fn drawn(id: &str, model: Option<&str>) -> Transition {
        let given = Transition::demonstration(
            TransitionId(id.to_owned()),
            vec![1, 2],
            vec![false, true],
            String::new(),
            String::new(),
        );
        let tokens = TokenData {
            prompt_ids: vec![1],
            completion_ids: vec![2],
            log_probs: vec![-0.5],
            processed_log_probs: vec![],
            policy_version: PolicyVersion(0),
            token_versions: vec![],
            kept: KeptTokens::default(),
            model: model.map(Arc::from),
        };
        Transition { tokens: Some(tokens), origin: None, agent_role: "writer".to_owned(), ..given }
    }

    #[test]
    fn a_transition_trains_the_model_that_drew_it_and_a_demonstration_any() {
        let mut pool = Pool::default();
        let given = Transition { origin: Some("{}".to_owned()), ..drawn("given", None) };
        for transition in [drawn("own", None), drawn("named", Some("writing")), given] {
            pool.insert(Arc::new(transition), "sequence".to_owned());
        }
        let (policy, writing) = (ModelReference::Policy, ModelReference::Named("writing".to_owned()));
        let check = |model: &ModelReference, id: &str| pool.check_model(model, &TransitionId(id.to_owned()));
        for (model, id) in [(&policy, "own"), (&writing, "named"), (&policy, "given"), (&writing, "given")] {
            assert_eq!(check(model, id), Ok(()), "{id}");
        }
        let text = check(&policy, "named").unwrap_err().to_string();
        assert!(text.contains("`named` was drawn by model `writing` for the agent role `writer`"), "{text}");
        assert!(text.contains("cannot train the policy"), "{text}");
        assert!(check(&writing, "own").unwrap_err().to_string().contains("drawn by the policy"));
        assert!(check(&writing, "nobody").unwrap_err().to_string().contains("nobody"));
    }
}
