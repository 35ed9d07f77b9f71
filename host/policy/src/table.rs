//! A policy without a model, for tests: the log-prob of a token is the parameter at its id. Where every sampled token of a batch
//! has an id of its own, each is a parameter of its own, and the gradient of a loss is its derivative with respect to every
//! token's log-prob.
//!
//! Checks of rows, losses, normalisers, the split into micro-batches and the report are those of the trainer; what is left out
//! is the way from logits to log-probs.

use fulgurite_core::training::{ForwardBackwardReport, LossSpec, RowDerivatives, RowLogProbs, TrainingRow};

use crate::error::PolicyError;
use crate::loss::{self, BatchLoss, Seen, Slopes};
use crate::split::plan;
use crate::sums::Sums;
use crate::train::{check_derivatives, check_rows_within};

/// One number per id.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// Log-prob (nats) of each id.
    pub log_probs: Vec<f32>,
    /// Entropy (nats) of the distribution that the id was drawn from; 0 where the list ends.
    pub entropies: Vec<f32>,
}

/// How a batch is cut, as a policy's config says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// As `gradient_shards`.
    pub shards: usize,
    /// As `micro_batch_tokens_max`.
    pub micro_batch_tokens_max: usize,
    /// Whether rows are padded to the longest of their micro-batch, as on a GPU, or packed.
    pub pads: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self { shards: 4, micro_batch_tokens_max: 64, pads: false }
    }
}

/// Derivatives of the gathered losses with respect to every parameter, by id.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TableGradient {
    /// d loss / d log-prob.
    pub log_probs: Vec<f64>,
    /// d loss / d entropy.
    pub entropies: Vec<f64>,
}

/// The policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TablePolicy {
    /// Its parameters.
    pub table: Table,
    /// Those of the KL term's reference.
    pub reference: Option<Table>,
    /// How batches are cut.
    pub layout: Layout,
    gradient: Option<TableGradient>,
}

impl Table {
    fn at(list: &[f32], id: u32) -> f32 {
        list.get(id as usize).copied().unwrap_or(0.0)
    }

    fn seen(&self, id: u32, reference: Option<&Self>) -> Seen {
        Seen {
            log_prob: f64::from(Self::at(&self.log_probs, id)),
            entropy: f64::from(Self::at(&self.entropies, id)),
            reference: reference.map(|reference| f64::from(Self::at(&reference.log_probs, id))),
        }
    }
}

impl TablePolicy {
    /// A policy with these parameters.
    #[must_use]
    pub fn new(table: Table) -> Self {
        Self { table, ..Self::default() }
    }

    fn check(&self, rows: &[TrainingRow]) -> Result<(), PolicyError> {
        check_rows_within(usize::MAX, self.table.log_probs.len(), rows)
    }

    /// As [`PolicyEngine::forward`](crate::PolicyEngine::forward).
    ///
    /// # Errors
    /// When a row does not fit.
    pub fn forward(&self, rows: &[TrainingRow]) -> Result<Vec<RowLogProbs>, PolicyError> {
        self.check(rows)?;
        let of_row = |row: &TrainingRow| {
            let list = |values: &[f32]| -> Vec<f32> {
                let value =
                    |(at, id): (usize, &u32)| if loss::is_trained(row, at) { Table::at(values, *id) } else { 0.0 };
                row.ids.iter().enumerate().map(value).collect()
            };
            RowLogProbs { log_probs: list(&self.table.log_probs), entropies: list(&self.table.entropies) }
        };
        Ok(rows.iter().map(of_row).collect())
    }

    /// As [`PolicyEngine::forward_backward`](crate::PolicyEngine::forward_backward).
    ///
    /// # Errors
    /// When a row or the loss does not fit, or the KL term has no reference.
    pub fn forward_backward(
        &mut self,
        rows: &[TrainingRow],
        spec: LossSpec,
    ) -> Result<ForwardBackwardReport, PolicyError> {
        self.check(rows)?;
        if spec.kl.is_some() && self.reference.is_none() {
            return Err(PolicyError::UnknownSnapshot("reference".to_owned()));
        }
        let reference = if spec.kl.is_some() { self.reference.clone() } else { None };
        let loss = BatchLoss::new(spec, rows, || self.forward(rows))?;
        let Layout { shards, micro_batch_tokens_max, pads } = self.layout;
        let mut total = Sums::default();
        for shard in plan(rows, shards, micro_batch_tokens_max, pads) {
            let mut sums = Sums::default();
            for row in shard.iter().flat_map(|batch| &batch.rows).filter_map(|row| rows.get(*row)) {
                for at in loss::trained(row) {
                    let id = row.ids.get(at).copied().unwrap_or_default();
                    let seen = self.table.seen(id, reference.as_ref());
                    sums.token(&seen);
                    let slopes = loss.token(row, at, seen, &mut sums);
                    self.add(id, slopes);
                }
            }
            total.add(&sums);
        }
        self.gradient.get_or_insert_default();
        Ok(total.report(rows.iter().map(|row| row.ids.len() as u64).sum()))
    }

    /// As [`PolicyEngine::backward`](crate::PolicyEngine::backward).
    ///
    /// # Errors
    /// When a row does not fit, or a derivative is not finite.
    pub fn backward(&mut self, rows: &[TrainingRow], derivatives: &[RowDerivatives]) -> Result<(), PolicyError> {
        self.check(rows)?;
        check_derivatives(rows, derivatives.iter().map(|row| [row.log_probs.as_slice(), row.entropies.as_slice()]))?;
        for (row, given) in rows.iter().zip(derivatives) {
            for at in loss::trained(row) {
                let of = |list: &[f32]| list.get(at).copied().map_or(0.0, f64::from);
                let slopes = Slopes { log_prob: of(&given.log_probs), entropy: of(&given.entropies) };
                self.add(row.ids.get(at).copied().unwrap_or_default(), slopes);
            }
        }
        self.gradient.get_or_insert_default();
        Ok(())
    }

    /// Takes what has been gathered since it was taken last.
    ///
    /// # Errors
    /// When nothing was gathered.
    pub fn take_gradient(&mut self) -> Result<TableGradient, PolicyError> {
        self.gradient.take().ok_or(PolicyError::NoGradient)
    }

    fn add(&mut self, id: u32, slopes: Slopes) {
        let ids = self.table.log_probs.len();
        let gradient = self.gradient.get_or_insert_default();
        gradient.log_probs.resize(ids, 0.0);
        gradient.entropies.resize(ids, 0.0);
        if let Some(slot) = gradient.log_probs.get_mut(id as usize) {
            *slot += slopes.log_prob;
        }
        if let Some(slot) = gradient.entropies.get_mut(id as usize) {
            *slot += slopes.entropy;
        }
    }
}
