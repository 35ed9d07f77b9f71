//! Lets so many attempts live at once, and says who comes next: whatever is evaluated comes before whatever is trained on,
//! because somebody waits for it; among equals, first come, first served.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fulgurite_core::record::RolloutMode;
use tokio::sync::oneshot;

/// How urgent an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Priority {
    Evaluation,
    Training,
}

impl Priority {
    pub(crate) const fn of(mode: RolloutMode) -> Self {
        match mode {
            RolloutMode::Val | RolloutMode::Test => Self::Evaluation,
            RolloutMode::Train => Self::Training,
        }
    }
}

#[derive(Debug)]
struct State {
    free: usize,
    evaluation: VecDeque<oneshot::Sender<Pass>>,
    training: VecDeque<oneshot::Sender<Pass>>,
}

/// The gate.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
}

/// The right to be alive, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Option<Arc<Gate>>,
}

impl Gate {
    pub(crate) fn new(live_max: usize) -> Arc<Self> {
        let state = State { free: live_max.max(1), evaluation: VecDeque::new(), training: VecDeque::new() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass, when one is free and nobody waits for it.
    pub(crate) fn try_enter(self: &Arc<Self>) -> Option<Pass> {
        let mut state = self.lock();
        state.free = state.free.checked_sub(1)?;
        Some(Pass { gate: Some(Arc::clone(self)) })
    }

    /// Waits for a pass.
    pub(crate) async fn enter(self: &Arc<Self>, priority: Priority) -> Pass {
        loop {
            let waits = {
                let mut state = self.lock();
                if let Some(left) = state.free.checked_sub(1) {
                    state.free = left;
                    return Pass { gate: Some(Arc::clone(self)) };
                }
                let (send, waits) = oneshot::channel();
                match priority {
                    Priority::Evaluation => state.evaluation.push_back(send),
                    Priority::Training => state.training.push_back(send),
                }
                waits
            };
            // A pass that is handed over always arrives; a gate does not outlive those who wait at it.
            if let Ok(pass) = waits.await {
                return pass;
            }
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let Some(gate) = self.gate.take() else { return };
        loop {
            let next = {
                let mut state = gate.lock();
                if let Some(next) = state.evaluation.pop_front().or_else(|| state.training.pop_front()) {
                    next
                } else {
                    state.free += 1;
                    return;
                }
            };
            match next.send(Pass { gate: Some(Arc::clone(&gate)) }) {
                Ok(()) => return,
                // Whoever waited has gone away: the next one in line.
                Err(mut unused) => unused.gate = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn evaluation_comes_first_and_nobody_is_forgotten() {
        let gate = Gate::new(1);
        let held = gate.try_enter().unwrap();
        assert!(gate.try_enter().is_none());
        let mut train = Box::pin(gate.enter(Priority::Training));
        let mut gone = Box::pin(gate.enter(Priority::Evaluation));
        let mut val = Box::pin(gate.enter(Priority::Evaluation));
        assert!((&mut train).now_or_never().is_none());
        assert!((&mut gone).now_or_never().is_none());
        assert!((&mut val).now_or_never().is_none());
        drop(gone);
        drop(held);
        assert!((&mut train).now_or_never().is_none());
        let pass = val.now_or_never().expect("evaluation is next");
        drop(pass);
        drop(train.now_or_never().expect("and then training"));
        assert!(gate.try_enter().is_some());
    }
}
