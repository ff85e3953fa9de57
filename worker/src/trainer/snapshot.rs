//! Copies of a replica's state, made beside training.
//!
//! Weights and optimizer state change in the update alone. So what is to be copied is noted at once, copied on a thread of its own while the
//! next forward and backward run, and waited for before the next write.
//!
//! SNAP-1: a copy holds what its source held when it was asked for: whoever writes to a source first calls [`Copier::settle`].
//! SNAP-2: equal stamps mean equal bits, on every rank: a stamp is drawn for each change, in the same order everywhere.

use super::optimizer::OptimizerState;
use serde::{Deserialize, Serialize};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use thaw_torch::tch::{Tensor, no_grad};

/// Names the bits of a group's weights, buffers and optimizer state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Stamp(u64);

impl Stamp {
    /// What the run begins with: no optimizer state, and weights that need not be saved.
    pub(crate) const INITIAL: Self = Self(0);

    /// Of a copy without its optimizer state.
    const WEIGHTS: u64 = 1 << 63;

    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// Names the same weights and buffers, without optimizer state.
    pub(crate) fn of_weights(self) -> Self {
        Self(self.0 | Self::WEIGHTS)
    }

    /// What names them with their optimizer state, where this does so without.
    pub(crate) fn with_optimizer(self) -> Option<Self> {
        (self.0 & Self::WEIGHTS != 0).then_some(Self(self.0 & !Self::WEIGHTS))
    }
}

/// Weights, buffers and optimizer state of one group at one moment. Nobody writes to it.
#[derive(Debug)]
pub(crate) struct GroupSnapshot {
    pub(crate) stamp: Stamp,
    pub(crate) flat: Tensor,
    pub(crate) buffers: Vec<Tensor>,
    pub(crate) optimizer: Option<OptimizerState>,
    filled: Filled,
}

impl GroupSnapshot {
    /// Of tensors that hold their values already.
    pub(crate) fn of(stamp: Stamp, flat: Tensor, buffers: Vec<Tensor>, optimizer: Option<OptimizerState>) -> Self {
        Self { stamp, flat, buffers, optimizer, filled: Filled::done() }
    }

    /// The same memory.
    pub(crate) fn share(&self) -> Self {
        Self {
            stamp: self.stamp,
            flat: self.flat.shallow_clone(),
            buffers: self.buffers.iter().map(Tensor::shallow_clone).collect(),
            optimizer: self.optimizer.as_ref().map(|state| state.map(Tensor::shallow_clone)),
            filled: self.filled.clone(),
        }
    }

    /// The same memory, but for optimizer state.
    pub(crate) fn without_optimizer(self) -> Self {
        let stamp = if self.optimizer.is_some() { self.stamp.of_weights() } else { self.stamp };
        Self { stamp, optimizer: None, ..self }
    }

    /// Waits until it holds its values; false where the copying thread died.
    pub(crate) fn wait(&self) -> bool {
        self.filled.wait()
    }
}

/// The moment from which a copy holds its values.
#[derive(Debug, Clone)]
struct Filled(Arc<(Mutex<Copied>, Condvar)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copied {
    Pending,
    Done,
    Never,
}

impl Filled {
    fn new(state: Copied) -> Self {
        Self(Arc::new((Mutex::new(state), Condvar::new())))
    }

    fn done() -> Self {
        Self::new(Copied::Done)
    }

    fn set(&self, state: Copied) {
        let (now, changed) = &*self.0;
        *now.lock().unwrap_or_else(PoisonError::into_inner) = state;
        changed.notify_all();
    }

    fn wait(&self) -> bool {
        let (now, changed) = &*self.0;
        let mut state = now.lock().unwrap_or_else(PoisonError::into_inner);
        while *state == Copied::Pending {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        *state == Copied::Done
    }
}

/// What is to be copied into what. Dropped uncopied, its snapshot never fills.
struct Copies {
    pairs: Vec<(Tensor, Tensor)>,
    filled: Filled,
}

impl Copies {
    fn run(self) {
        let fits = no_grad(|| self.pairs.iter().all(|(from, to)| to.shallow_clone().f_copy_(from).is_ok()));
        self.filled.set(if fits { Copied::Done } else { Copied::Never });
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let (state, changed) = &*self.filled.0;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == Copied::Pending {
            *state = Copied::Never;
            changed.notify_all();
        }
    }
}

/// The thread that copies, in the order in which it is asked.
#[derive(Debug)]
pub(crate) struct Copier {
    /// Absent once it is being dropped.
    copies: Option<Sender<Copies>>,
    pending: Vec<Filled>,
    waited: Duration,
    thread: Option<JoinHandle<()>>,
}

impl Copier {
    pub(crate) fn start() -> std::io::Result<Self> {
        let (copies, work) = channel::<Copies>();
        let run = move || work.into_iter().for_each(Copies::run);
        let thread = std::thread::Builder::new().name("snapshot".to_owned()).spawn(run)?;
        Ok(Self { copies: Some(copies), pending: Vec::new(), waited: Duration::ZERO, thread: Some(thread) })
    }

    /// Begins to copy `flat` and `optimizer`; `buffers`, which a forward changes, and counters are copied at once.
    pub(crate) fn copy<'a>(
        &mut self,
        stamp: Stamp,
        flat: &Tensor,
        buffers: impl Iterator<Item = &'a Tensor>,
        optimizer: Option<&OptimizerState>,
    ) -> GroupSnapshot {
        let mut pairs = Vec::new();
        let mut later = |tensor: &Tensor| {
            if tensor.dim() == 0 {
                return tensor.copy();
            }
            let copy = tensor.empty_like();
            pairs.push((tensor.detach(), copy.shallow_clone()));
            copy
        };
        let (flat, optimizer) = (later(flat), optimizer.map(|state| state.map(&mut later)));
        let filled = Filled::new(Copied::Pending);
        let copies = Copies { pairs, filled: filled.clone() };
        if let Some(Err(unsent)) = self.copies.as_ref().map(|thread| thread.send(copies)) {
            unsent.0.run();
        }
        self.pending.push(filled.clone());
        GroupSnapshot { stamp, flat, buffers: buffers.map(Tensor::copy).collect(), optimizer, filled }
    }

    /// Waits until everything asked for is copied.
    pub(crate) fn settle(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let started = std::time::Instant::now();
        for filled in self.pending.drain(..) {
            // A copy that failed is reported by whoever reads it.
            let _ = filled.wait();
        }
        self.waited += started.elapsed();
    }

    /// How long [`Copier::settle`] has waited since this was last asked.
    pub(crate) fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.copies = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_holds_what_was_there_when_it_was_asked_for() {
        let mut copier = Copier::start().unwrap();
        let mut flat = Tensor::from_slice(&[1.0_f32; 1 << 20]);
        let mut buffer = Tensor::from_slice(&[1_i64]);
        let first = copier.copy(Stamp::INITIAL.next(), &flat, [&buffer].into_iter(), None);
        let _ = buffer.fill_(2);
        copier.settle();
        let _ = flat.fill_(2.0);
        assert!(first.wait());
        assert_eq!((first.flat.double_value(&[77]), first.buffers[0].int64_value(&[0])), (1.0, 1));
        let again = first.share();
        assert_eq!((again.stamp, again.flat.data_ptr()), (first.stamp, first.flat.data_ptr()));
        // Without optimizer state nothing is left out, so it is still the same.
        assert_eq!(again.without_optimizer().stamp, first.stamp);
    }

    #[test]
    fn a_copy_that_was_never_made_is_no_hang() {
        let copies = Copies { pairs: Vec::new(), filled: Filled::new(Copied::Pending) };
        let filled = copies.filled.clone();
        drop(copies);
        assert!(!filled.wait());
    }
}
