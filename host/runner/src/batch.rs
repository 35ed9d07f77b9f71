//! Rollouts that were submitted together, and what their workers are told.

use std::collections::BTreeMap;

use tokio::sync::{mpsc, watch};

use crate::settings::{RolloutResult, RunnerError};

/// What the workers of a batch are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
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
    pub(crate) results: mpsc::Receiver<(usize, Result<RolloutResult, RunnerError>)>,
    pub(crate) order: watch::Sender<Order>,
    pub(crate) expected: usize,
    pub(crate) draining: watch::Receiver<bool>,
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
    /// When the store failed, or the runner was drained before all rollouts had begun.
    pub async fn next(&mut self) -> Option<Result<(usize, RolloutResult), RunnerError>> {
        if self.expected == 0 {
            return None;
        }
        let Some((place, result)) = self.results.recv().await else {
            self.expected = 0;
            let drained = *self.draining.borrow();
            return Some(Err(if drained { RunnerError::Draining } else { RunnerError::WorkerLost }));
        };
        self.expected -= 1;
        Some(result.map(|result| (place, result)))
    }

    /// Waits for all; results come in the order of the jobs.
    ///
    /// # Errors
    /// As [`Batch::next`].
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

/// Returns when the batch gives this order; never, when it is gone without having given it.
pub(crate) async fn told(orders: &mut watch::Receiver<Order>, awaited: Order) {
    if orders.wait_for(|order| *order == awaited).await.is_err() {
        std::future::pending::<()>().await;
    }
}
