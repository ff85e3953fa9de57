//! [`ReduceQueue`]: collective operations on a thread of their own, so that they overlap with computing.
//!
//! Law: jobs run one by one in the order of submission; after the first error no job runs, and every ticket that is still
//! open gets that error (`COLL-2`). While tickets are open nobody else calls the collective, else ranks could disagree about
//! the order.

use super::{Collective, Error};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

type Job<T> = Box<dyn FnOnce(&dyn Collective, &mut T) -> Result<(), Error> + Send>;

/// Runs jobs over payloads of type `T` (buffers, usually).
pub struct ReduceQueue<T> {
    collective: Arc<dyn Collective>,
    shared: Arc<Shared<T>>,
    thread: Option<JoinHandle<()>>,
    next: u64,
}

/// A job's claim check, for [`ReduceQueue::wait`].
#[must_use = "the payload comes back through wait"]
#[derive(Debug)]
pub struct Ticket(u64);

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    jobs: VecDeque<(u64, T, Job<T>)>,
    running: bool,
    done: BTreeMap<u64, T>,
    failed: Option<Error>,
    closed: bool,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().expect("no code that holds the lock panics")
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).expect("no code that holds the lock panics")
    }
}

impl<T: Send + 'static> ReduceQueue<T> {
    /// Starts the thread, named `reduce`.
    ///
    /// # Panics
    /// The operating system has no thread left.
    #[must_use]
    pub fn new(collective: Arc<dyn Collective>) -> Self {
        let state = State { jobs: VecDeque::new(), running: false, done: BTreeMap::new(), failed: None, closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (of_thread, calls) = (shared.clone(), collective.clone());
        let thread = std::thread::Builder::new()
            .name("reduce".to_owned())
            .spawn(move || run(&of_thread, &*calls))
            .expect("a trainer can start one more thread");
        Self { collective, shared, thread: Some(thread), next: 0 }
    }

    /// The collective behind the queue; call its operations only while no ticket is open.
    #[must_use]
    pub fn collective(&self) -> &dyn Collective {
        &*self.collective
    }

    /// Queues a job over `payload`. Never blocks.
    pub fn submit(
        &mut self,
        payload: T,
        job: impl FnOnce(&dyn Collective, &mut T) -> Result<(), Error> + Send + 'static,
    ) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        self.shared.state().jobs.push_back((ticket, payload, Box::new(job)));
        self.shared.changed.notify_all();
        Ticket(ticket)
    }

    /// Waits for a job and returns its payload. It ends as soon as the job does, so within the deadlines of the
    /// operations before it and its own.
    ///
    /// # Errors
    /// The first error of any job of this queue, even where this job had ended well: the step that it belongs to is lost.
    pub fn wait(&self, ticket: Ticket) -> Result<T, Error> {
        let mut state = self.shared.state();
        loop {
            if let Some(failed) = &state.failed {
                return Err(failed.clone());
            }
            if let Some(payload) = state.done.remove(&ticket.0) {
                return Ok(payload);
            }
            state = self.shared.wait(state);
        }
    }
}

fn run<T>(shared: &Shared<T>, collective: &dyn Collective) {
    /// A job that panics must not leave its waiter waiting.
    struct Poison<'a, T>(&'a Shared<T>);
    impl<T> Drop for Poison<'_, T> {
        fn drop(&mut self) {
            self.0.state().failed.get_or_insert(Error::Aborted);
            self.0.changed.notify_all();
        }
    }

    let _poison = Poison(shared);
    loop {
        let mut state = shared.state();
        let (ticket, mut payload, job) = loop {
            if state.closed || state.failed.is_some() {
                state.jobs.clear();
                return;
            }
            match state.jobs.pop_front() {
                Some(next) => break next,
                None => state = shared.wait(state),
            }
        };
        state.running = true;
        drop(state);
        let result = job(collective, &mut payload);
        let mut state = shared.state();
        state.running = false;
        match result {
            Ok(()) => {
                state.done.insert(ticket, payload);
            }
            Err(error) => state.failed = Some(error),
        }
        drop(state);
        shared.changed.notify_all();
    }
}

impl<T> Drop for ReduceQueue<T> {
    fn drop(&mut self) {
        let unfinished = {
            let mut state = self.shared.state();
            state.closed = true;
            state.running || !state.jobs.is_empty()
        };
        self.shared.changed.notify_all();
        if unfinished {
            self.collective.abort();
        }
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
