//! Group commit: a writer takes what has finished since the last flush and hands it to the store at once.

use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_store::{AttemptFinish, RolloutStore, StoreError};
use tokio::sync::mpsc;

/// Finished attempts that may wait for the writer. When the queue is full, finishing attempts wait: they keep their live
/// slot, so a slow disk slows the runner down instead of filling memory.
const QUEUE_MAX: usize = 1_024;
/// Writers. Two: while one waits for the disk, the other encodes and applies the next group.
const WRITERS: usize = 2;
/// Attempts in one commit. Bounds the memory of a commit and the wait of the first attempt in it.
const GROUP_MAX: usize = 512;

/// Called in the writer's thread when the attempt is durable, or cannot be.
pub(crate) type Acknowledgement = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
type Queue = mpsc::Receiver<(AttemptFinish, Acknowledgement)>;

/// Hands finished attempts to the writers.
#[derive(Clone)]
pub(crate) struct Committer {
    queue: mpsc::Sender<(AttemptFinish, Acknowledgement)>,
}

impl Committer {
    /// Starts the writers. They end when the last clone of the handle is gone.
    pub(crate) fn start(store: &Arc<dyn RolloutStore>) -> Self {
        let (queue, finished) = mpsc::channel(QUEUE_MAX);
        let finished = Arc::new(Mutex::new(finished));
        for _ in 0..WRITERS {
            let (store, finished) = (Arc::clone(store), Arc::clone(&finished));
            tokio::task::spawn_blocking(move || {
                while let Some(group) = next_group(&finished) {
                    let (records, acknowledgements): (Vec<_>, Vec<_>) = group.into_iter().unzip();
                    let results = store.finish_attempts(records);
                    for (acknowledgement, result) in acknowledgements.into_iter().zip(results) {
                        acknowledgement(result);
                    }
                }
            });
        }
        Self { queue }
    }

    /// Returns when a writer is sure to take the attempt.
    pub(crate) async fn commit(&self, finish: AttemptFinish, acknowledge: Acknowledgement) -> Result<(), StoreError> {
        self.queue.send((finish, acknowledge)).await.map_err(|_| StoreError::Closed)
    }
}

/// Waits for an attempt and takes with it what else has finished.
fn next_group(finished: &Mutex<Queue>) -> Option<Vec<(AttemptFinish, Acknowledgement)>> {
    let mut finished = finished.lock().unwrap_or_else(PoisonError::into_inner);
    let mut group = vec![finished.blocking_recv()?];
    while group.len() < GROUP_MAX
        && let Ok(next) = finished.try_recv()
    {
        group.push(next);
    }
    Some(group)
}
