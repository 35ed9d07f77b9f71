//! Group commit: one writer takes what has finished since its last flush and hands it to the store at once.

use std::sync::Arc;

use fulgurite_store::{AttemptFinish, RolloutStore, StoreError};
use tokio::sync::{mpsc, oneshot};

/// Finished attempts that may wait for the writer. When the queue is full, finishing attempts wait: they keep their live
/// slot, so a slow disk slows the runner down instead of filling memory.
const QUEUE_MAX: usize = 1_024;
/// Attempts in one commit. Bounds the memory of a commit and the wait of the first attempt in it.
const GROUP_MAX: usize = 512;

type Acknowledgement = oneshot::Sender<Result<(), StoreError>>;

/// Hands finished attempts to the writer.
#[derive(Debug, Clone)]
pub(crate) struct Committer {
    queue: mpsc::Sender<(AttemptFinish, Acknowledgement)>,
}

impl Committer {
    /// Starts the writer. It ends when the last clone of the handle is gone.
    pub(crate) fn start(store: Arc<dyn RolloutStore>) -> Self {
        let (queue, mut finished) = mpsc::channel(QUEUE_MAX);
        tokio::task::spawn_blocking(move || {
            while let Some(first) = finished.blocking_recv() {
                let mut group: Vec<(AttemptFinish, Acknowledgement)> = vec![first];
                while group.len() < GROUP_MAX
                    && let Ok(next) = finished.try_recv()
                {
                    group.push(next);
                }
                let (records, acknowledgements): (Vec<_>, Vec<_>) = group.into_iter().unzip();
                let results = store.finish_attempts(records);
                for (acknowledgement, result) in acknowledgements.into_iter().zip(results) {
                    // A receiver that is gone was cancelled; the record is durable all the same.
                    let _ = acknowledgement.send(result);
                }
            }
        });
        Self { queue }
    }

    /// Returns when the attempt is durable.
    pub(crate) async fn commit(&self, finish: AttemptFinish) -> Result<(), StoreError> {
        let (acknowledge, acknowledged) = oneshot::channel();
        if self.queue.send((finish, acknowledge)).await.is_err() {
            return Err(StoreError::Closed);
        }
        acknowledged.await.unwrap_or(Err(StoreError::Closed))
    }
}
