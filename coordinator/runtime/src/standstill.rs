//! Standing still: a simulated process none of whose tasks runs while time goes on, as one that is stopped, or whose machine is.
//!
//! Law: a task belongs to the process that spawned it, through [`crate::tasks::Tasks`] or [`within`]. Where none is simulated a task is what it
//! would be without this.

use std::cell::RefCell;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

thread_local! {
    /// Whose task runs on this thread now.
    static PRESENT: RefCell<Option<Process>> = const { RefCell::new(None) };
}

/// A process that can be stopped. A cheap handle: clones are the same process.
#[derive(Debug, Clone, Default)]
pub struct Process {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    is_stopped: bool,
    /// Tasks that would have run since.
    held: Vec<Waker>,
}

impl Process {
    /// From now on none of its tasks runs.
    pub fn stop(&self) {
        self.state().is_stopped = true;
    }

    /// What was to run meanwhile runs now, in that order.
    pub fn go_on(&self) {
        let held = {
            let mut state = self.state();
            state.is_stopped = false;
            std::mem::take(&mut state.held)
        };
        held.into_iter().for_each(Waker::wake);
    }

    fn holds(&self, waker: &Waker) -> bool {
        let mut state = self.state();
        if state.is_stopped && !state.held.iter().any(|held| held.will_wake(waker)) {
            state.held.push(waker.clone());
        }
        state.is_stopped
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The process whose task this is, where one is simulated.
#[must_use]
pub fn present() -> Option<Process> {
    PRESENT.with_borrow(Clone::clone)
}

/// `task`, as one of `process`.
pub async fn within<Task: Future>(process: Option<Process>, task: Task) -> Task::Output {
    let Some(process) = process else { return task.await };
    let mut task = pin!(task);
    poll_fn(|context| {
        if process.holds(context.waker()) {
            return Poll::Pending;
        }
        let _entered = Entered::new(&process);
        task.as_mut().poll(context)
    })
    .await
}

/// While a task is polled; one may be polled by another.
struct Entered {
    before: Option<Process>,
    /// Stays on its thread.
    here: PhantomData<*const ()>,
}

impl Entered {
    fn new(process: &Process) -> Self {
        Self { before: PRESENT.replace(Some(process.clone())), here: PhantomData }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        PRESENT.set(self.before.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BoxError;
    use crate::tasks::{OnError, Tasks};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;
    use tokio::time::{sleep, timeout};
    use tokio_util::sync::CancellationToken;

    const SECOND: Duration = Duration::from_secs(1);

    async fn count(seconds: Arc<[AtomicU32; 2]>, at: usize) -> Result<(), BoxError> {
        loop {
            sleep(SECOND).await;
            seconds[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts in a task, and in one that this spawns.
    async fn live(seconds: Arc<[AtomicU32; 2]>) -> Result<(), BoxError> {
        let tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("counts", OnError::LogAndCount, |_| count(Arc::clone(&seconds), 1));
        count(seconds, 0).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_stopped_process_runs_none_of_its_tasks_until_it_goes_on() {
        let (stopped, other) = (Process::default(), Process::default());
        let counts: [Arc<[AtomicU32; 2]>; 2] = Default::default();
        for (process, counts) in [&stopped, &other].into_iter().zip(&counts) {
            tokio::spawn(within(Some(process.clone()), live(Arc::clone(counts))));
        }
        let seen = || counts.each_ref().map(|counts| counts.each_ref().map(|count| count.load(Ordering::Relaxed)));
        sleep(SECOND * 5 / 2).await;
        assert_eq!(seen(), [[2, 2], [2, 2]]);
        stopped.stop();
        sleep(SECOND * 10).await;
        assert_eq!(seen(), [[2, 2], [12, 12]], "the other one's time goes on");
        stopped.go_on();
        sleep(SECOND * 2 + SECOND / 4).await;
        assert_eq!(seen(), [[5, 5], [14, 14]], "the sleep that had ended, and those since");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_of_no_process_or_of_one_that_runs_is_not_held() {
        assert!(present().is_none());
        assert_eq!(timeout(SECOND, within(None, async { 7 })).await, Ok(7));
        let process = Process::default();
        let inside = within(Some(process), async { present().is_some() });
        assert_eq!(timeout(SECOND, inside).await, Ok(true));
        assert!(present().is_none());
    }
}
