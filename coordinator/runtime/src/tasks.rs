//! The one place that spawns tasks.
//!
//! Law: a task has a name, a span, a token and a policy for its error; a panic is an error; no task outlives [`Tasks::join`].

use crate::standstill::{self, Process};
use crate::{BoxError, chain};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// What a task's error does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Cancels every task, so that the process ends; [`Tasks::join`] returns the error.
    StopProcess,
    /// Logs it and counts it.
    LogAndCount,
}

/// Why [`Tasks::join`] was not clean.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A task with [`OnError::StopProcess`] failed; the first one that did.
    #[error("task {name} failed")]
    Failed {
        /// The task's name.
        name: String,
        /// What it returned.
        source: BoxError,
    },
    /// These tasks had to be aborted.
    #[error("tasks still ran after {deadline:?} and were aborted: {}", .names.join(", "))]
    StillRunning {
        /// How long `join` waited.
        deadline: Duration,
        /// The tasks, in the order in which they were spawned.
        names: Vec<String>,
    },
}

/// A set of tasks. A cheap handle: clones share the set.
#[derive(Debug, Clone)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    token: CancellationToken,
    tracker: TaskTracker,
    /// Whose tasks they are, where that is simulated.
    process: Option<Process>,
    failed: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    running: BTreeMap<u64, (String, AbortHandle)>,
    fatal: Option<(String, BoxError)>,
}

impl Tasks {
    /// An empty set whose tasks are told to end when `token` is cancelled.
    #[must_use]
    pub fn new(token: CancellationToken) -> Self {
        Self {
            inner: Arc::new(Inner {
                token,
                tracker: TaskTracker::new(),
                process: standstill::present(),
                failed: AtomicU64::new(0),
                state: Mutex::default(),
            }),
        }
    }

    /// The token that ends them all.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.inner.token
    }

    /// How many tasks have failed under [`OnError::LogAndCount`].
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.inner.failed.load(Ordering::Relaxed)
    }

    /// Runs `task`, made with a child of the set's token, in a span `task{name}`. It should end soon after its token is
    /// cancelled. Call inside a runtime.
    pub fn spawn<Make, Run, Failure>(&self, name: impl Into<String>, on_error: OnError, task: Make)
    where
        Make: FnOnce(CancellationToken) -> Run,
        Run: Future<Output = Result<(), Failure>> + Send + 'static,
        Failure: Into<BoxError> + Send + 'static,
    {
        let name = name.into();
        let span = tracing::info_span!("task", name);
        let run = task(self.inner.token.child_token()).instrument(span.clone());
        // Two tasks: the outer one survives a panic or an abort of the inner one, and applies the policy.
        let work = tokio::spawn(standstill::within(self.inner.process.clone(), run));
        let id = {
            let mut state = self.state();
            let id = state.next;
            state.next += 1;
            state.running.insert(id, (name.clone(), work.abort_handle()));
            id
        };
        let tasks = self.clone();
        let watch = async move {
            let outcome = match work.await {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(failure.into()),
                Err(join) if join.is_cancelled() => None,
                Err(join) => Some(BoxError::from(join)),
            };
            tasks.ended(id, name, on_error, outcome);
        };
        self.inner.tracker.spawn(watch.instrument(span));
    }

    /// Waits until every task has ended; after `deadline`, aborts the rest. Does not cancel the token: do that first to
    /// end them, or let them end by themselves.
    ///
    /// # Errors
    /// A task with [`OnError::StopProcess`] failed, or tasks had to be aborted.
    pub async fn join(&self, deadline: Duration) -> Result<(), Error> {
        self.inner.tracker.close();
        let in_time = tokio::time::timeout(deadline, self.inner.tracker.wait()).await.is_ok();
        let mut late = Vec::new();
        if !in_time {
            for (name, work) in self.state().running.values() {
                late.push(name.clone());
                work.abort();
            }
        }
        if let Some((name, source)) = self.state().fatal.take() {
            return Err(Error::Failed { name, source });
        }
        if late.is_empty() { Ok(()) } else { Err(Error::StillRunning { deadline, names: late }) }
    }

    fn ended(&self, id: u64, name: String, on_error: OnError, failure: Option<BoxError>) {
        let mut state = self.state();
        state.running.remove(&id);
        let Some(failure) = failure else { return };
        match on_error {
            OnError::StopProcess => {
                tracing::error!(error = chain(&*failure), "task failed; stopping the process");
                state.fatal.get_or_insert((name, failure));
                self.inner.token.cancel();
            }
            OnError::LogAndCount => {
                tracing::error!(error = chain(&*failure), "task failed");
                self.inner.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.inner.state.lock().expect("no code that holds the lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks() -> Tasks {
        Tasks::new(CancellationToken::new())
    }

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_failure_stops_the_process_and_is_returned() {
        let tasks = tasks();
        tasks.spawn("waits", OnError::LogAndCount, |token| async move {
            token.cancelled().await;
            Ok::<_, BoxError>(())
        });
        tasks.spawn("fails", OnError::StopProcess, |_| async { Err::<(), _>("broken") });
        let error = tasks.join(SOON).await.unwrap_err();
        assert_eq!(chain(&error), "task fails failed: broken");
    }

    #[tokio::test]
    async fn a_panic_is_counted_and_leaves_the_others_alone() {
        let tasks = tasks();
        tasks.spawn("panics", OnError::LogAndCount, |_| async {
            assert!(std::hint::black_box(false), "meant to panic");
            Ok::<_, BoxError>(())
        });
        tasks.join(SOON).await.unwrap();
        assert_eq!(tasks.failures(), 1);
        assert!(!tasks.token().is_cancelled());
    }

    #[tokio::test]
    async fn a_task_that_does_not_end_is_named_and_aborted() {
        let tasks = tasks();
        tasks.spawn("stuck", OnError::LogAndCount, |_| std::future::pending::<Result<(), BoxError>>());
        let error = tasks.join(Duration::from_millis(1)).await.unwrap_err();
        assert!(matches!(error, Error::StillRunning { names, .. } if names == ["stuck"]));
        tasks.join(SOON).await.unwrap();
    }
}
