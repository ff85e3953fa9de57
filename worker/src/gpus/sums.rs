//! [`DeviceSums`]: sums of flat buffers over the GPUs of a generation, while their trainers compute.
//!
//! ```text
//! submit ─▶ queue ─▶ owner: start, start, ... ─▶ oldest: mark reached, then status clean, then nobody aborted ─▶ wait
//!                      └─ deadline │ error │ lost peer │ abort ─▶ waiters told ─▶ host's collective aborted ─▶ driver aborted
//! ```
//!
//! Law:
//! - `DEV-1`: one thread owns the driver and alone calls it. It is aborted exactly once, and nothing is called after that.
//! - `DEV-2`: a sum is given back only after its mark was reached, then the status was found clean, then nobody had aborted. An aborted sum
//!   looks finished, with garbage in the buffer (`COLL-2`).
//! - `DEV-3`: who waits hears of an error before the driver is aborted, since that may hang; then the thread and the memory it uses are
//!   left to the end of the process, which is the abort that always works.
//! - `DEV-4`: NCCL does not say that a peer has died; the host's collective does, and what it lost ends sums here. An error here ends that
//!   collective, so that all ranks abort together.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thaw_node::collective::{Collective, Entry, Error};
use thaw_proto::status::ErrorClass;
use thaw_proto::worker::CollectiveKind;
use thaw_torch::nccl::{self, Driver};

pub(super) const JOIN: &str = "joining the GPUs' communicator";
pub(super) const SUM: &str = "GPU sum";
/// Looks at an unfinished sum: soon at first, and never rarer than the second.
const PAUSE: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(500));
/// Between two looks at an idle communicator's status.
const IDLE: Duration = Duration::from_secs(1);
/// Between two looks at whether a peer is gone.
const LOSS: Duration = Duration::from_millis(10);
/// What a sum may still take once a peer is gone: it may have done its part before it went.
const GRACE: Duration = Duration::from_millis(250);

/// How long what may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Until all ranks have joined.
    pub join: Duration,
    /// A sum, from when it is the oldest.
    pub operation: Duration,
    /// The driver's abort; after that it is left alone.
    pub abort: Duration,
}

/// See the module. `B` is a buffer of the driver's.
#[derive(Debug)]
pub struct DeviceSums<B> {
    shared: Arc<Shared<B>>,
    limits: Limits,
    thread: Option<JoinHandle<()>>,
    next: u64,
}

/// A sum's claim check, for [`DeviceSums::wait`].
#[must_use = "the buffer comes back through wait"]
#[derive(Debug)]
pub struct DeviceTicket(u64);

#[derive(Debug)]
struct Shared<B> {
    state: Mutex<State<B>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<B> {
    waiting: VecDeque<(u64, B)>,
    done: BTreeMap<u64, B>,
    /// The first error; whoever waits now or later gets it.
    failed: Option<Error>,
    joined: bool,
    closed: bool,
    /// The driver is gone.
    ended: bool,
    /// When the owner was last seen outside the driver.
    seen: Instant,
}

impl<B> Shared<B> {
    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().expect("no code that holds the lock panics")
    }

    fn pause<'a>(&self, state: MutexGuard<'a, State<B>>, most: Duration) -> MutexGuard<'a, State<B>> {
        self.changed.wait_timeout(state, most).expect("no code that holds the lock panics").0
    }

    fn fail(&self, error: Error) {
        self.state().failed.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Waits until `done` gives something, an error comes, or the owner is stuck in the driver.
    fn wait<R>(
        &self,
        operation: &'static str,
        sequence: u64,
        limit: Duration,
        mut done: impl FnMut(&mut State<B>) -> Option<R>,
    ) -> Result<R, Error> {
        let begun = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(failed) = &state.failed {
                return Err(failed.clone());
            }
            if let Some(result) = done(&mut state) {
                return Ok(result);
            }
            // The owner keeps the deadlines, unless the driver keeps the owner.
            let stuck = limit.saturating_add(GRACE);
            let Some(left) = stuck.checked_sub(state.seen.max(begun).elapsed()) else {
                let error = Error::Deadline { operation, sequence, deadline: limit, missing: Vec::new() };
                state.failed = Some(error.clone());
                drop(state);
                self.changed.notify_all();
                return Err(error);
            };
            state = self.pause(state, left);
        }
    }
}

impl<B: Send + 'static> DeviceSums<B> {
    /// Joins the other ranks with a driver of this rank's, on a thread of its own named `nccl`, and waits until all have joined. `host` is
    /// the same gang's collective between processes.
    ///
    /// # Errors
    /// [`Error::Deadline`] where a rank does not come; [`Error::PeerLost`], [`Error::Device`].
    ///
    /// # Panics
    /// The operating system has no thread left.
    pub fn join<D: Driver<Buffer = B>>(driver: D, host: Arc<dyn Collective>, limits: Limits) -> Result<Self, Error> {
        let state = State {
            waiting: VecDeque::new(),
            done: BTreeMap::new(),
            failed: None,
            joined: false,
            closed: false,
            ended: false,
            seen: Instant::now(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let owner =
            Owner { driver, shared: Arc::clone(&shared), host, limits, in_flight: VecDeque::new(), loss: Loss::new() };
        let thread = std::thread::Builder::new()
            .name("nccl".to_owned())
            .spawn(move || owner.run())
            .expect("a trainer can start one more thread");
        let sums = Self { shared, limits, thread: Some(thread), next: 0 };
        sums.shared.wait(JOIN, 0, limits.join, |state| state.joined.then_some(()))?;
        Ok(sums)
    }

    /// Begins the sum of a buffer over all ranks, in place. Never blocks. Ranks submit the same sums in the same order.
    pub fn submit(&mut self, buffer: B) -> DeviceTicket {
        let ticket = self.next;
        self.next += 1;
        self.shared.state().waiting.push_back((ticket, buffer));
        self.shared.changed.notify_all();
        DeviceTicket(ticket)
    }

    /// Waits for a sum and returns its buffer.
    ///
    /// # Errors
    /// The first error of any sum: the step that it belongs to is lost.
    pub fn wait(&self, ticket: DeviceTicket) -> Result<B, Error> {
        self.shared.wait(SUM, ticket.0, self.limits.operation, |state| state.done.remove(&ticket.0))
    }
}

impl<B> DeviceSums<B> {
    /// Ends the sums in flight and every later one. Callable from any thread, more than once; does not wait for the driver.
    pub fn abort(&self) {
        self.shared.fail(Error::Aborted);
    }
}

impl<B> Drop for DeviceSums<B> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        self.shared.changed.notify_all();
        let begun = Instant::now();
        while !state.ended {
            let Some(left) = self.limits.abort.checked_sub(begun.elapsed()) else {
                tracing::warn!("NCCL does not let go of an aborted communicator; it is left to the end of the process");
                return;
            };
            state = self.shared.pause(state, left);
        }
        drop(state);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// The thread that owns the driver.
struct Owner<D: Driver> {
    driver: D,
    shared: Arc<Shared<D::Buffer>>,
    host: Arc<dyn Collective>,
    limits: Limits,
    /// Started, oldest first.
    in_flight: VecDeque<InFlight<D>>,
    loss: Loss,
}

struct InFlight<D: Driver> {
    ticket: u64,
    buffer: D::Buffer,
    /// Absent while the driver still works at its start.
    mark: Option<D::Mark>,
    /// When it became the oldest, or was started.
    since: Instant,
    entry: Entry,
}

/// What is known of peers that are gone.
struct Loss {
    looked: Instant,
    /// The first one, and since when.
    found: Option<(u32, Instant)>,
}

enum Next<B> {
    Sum(u64, B),
    Nothing,
    Closed,
}

impl<D: Driver> Owner<D> {
    fn run(mut self) {
        /// A driver that panics must not leave anybody waiting.
        struct Poison<B>(Arc<Shared<B>>);
        impl<B> Drop for Poison<B> {
            fn drop(&mut self) {
                let mut state = self.0.state();
                state.failed.get_or_insert(Error::Aborted);
                state.ended = true;
                drop(state);
                self.0.changed.notify_all();
            }
        }

        let _poison = Poison(Arc::clone(&self.shared));
        let outcome = self.serve();
        let Self { driver, shared, host, in_flight, .. } = self;
        in_flight.iter().for_each(|sum| host.record().end(sum.entry, false));
        // DEV-3, DEV-4
        if let Err(error) = outcome {
            tracing::warn!(error = thaw_runtime::chain(&error), in_flight = in_flight.len(), "sums over GPUs end");
            shared.fail(error);
            host.abort();
        }
        if let Err(error) = driver.abort() {
            tracing::warn!(error = thaw_runtime::chain(&error), "NCCL's communicator did not end cleanly");
        }
        // Not before the driver has let go of their memory.
        drop(in_flight);
    }

    /// Until it is closed with nothing in flight.
    fn serve(&mut self) -> Result<(), Error> {
        self.driver.join().map_err(device_error(JOIN, 0))?;
        self.settle(JOIN, 0, self.limits.join)?;
        self.shared.state().joined = true;
        self.shared.changed.notify_all();
        let mut pause = PAUSE.0;
        loop {
            match self.next()? {
                Next::Sum(ticket, buffer) => self.start(ticket, buffer)?,
                Next::Closed if self.in_flight.is_empty() => return Ok(()),
                Next::Closed => return Err(Error::Aborted),
                Next::Nothing if self.finish_oldest()? => {}
                Next::Nothing => {
                    self.sleep(if self.in_flight.is_empty() { IDLE } else { pause });
                    pause = (pause * 2).min(PAUSE.1);
                    continue;
                }
            }
            pause = PAUSE.0;
        }
    }

    /// What is to be done; an error where somebody has ended it all.
    fn next(&self) -> Result<Next<D::Buffer>, Error> {
        let mut state = self.shared.state();
        state.seen = Instant::now();
        match (&state.failed, state.closed) {
            (Some(failed), _) => Err(failed.clone()),
            (None, true) => Ok(Next::Closed),
            (None, false) => {
                Ok(state.waiting.pop_front().map_or(Next::Nothing, |(ticket, buffer)| Next::Sum(ticket, buffer)))
            }
        }
    }

    fn sleep(&self, most: Duration) {
        let state = self.shared.state();
        if state.waiting.is_empty() && state.failed.is_none() && !state.closed {
            drop(self.shared.pause(state, most));
        }
    }

    fn start(&mut self, ticket: u64, buffer: D::Buffer) -> Result<(), Error> {
        let entry = self.host.record().begin(CollectiveKind::GpuSum, ticket, D::bytes(&buffer));
        self.in_flight.push_back(InFlight { ticket, buffer, mark: None, since: Instant::now(), entry });
        let started = self.in_flight.back().expect("it was pushed");
        self.driver.start(&started.buffer).map_err(device_error(SUM, ticket))?;
        self.settle(SUM, ticket, self.limits.operation)?;
        let mark = self.driver.mark().map_err(device_error(SUM, ticket))?;
        self.in_flight.back_mut().expect("it was pushed").mark = Some(mark);
        Ok(())
    }

    /// Waits until the driver's last call has done its part on the host.
    fn settle(&mut self, operation: &'static str, sequence: u64, limit: Duration) -> Result<(), Error> {
        let (begun, mut pause) = (Instant::now(), PAUSE.0);
        while self.driver.state().map_err(device_error(operation, sequence))? == nccl::State::Busy {
            self.check_time(operation, sequence, begun, limit)?;
            self.sleep(pause);
            pause = (pause * 2).min(PAUSE.1);
            let mut state = self.shared.state();
            state.seen = Instant::now();
            if let Some(failed) = &state.failed {
                return Err(failed.clone());
            }
            if state.closed {
                return Err(Error::Aborted);
            }
        }
        Ok(())
    }

    /// Gives back the oldest sum where it is over; whether it was (DEV-2).
    fn finish_oldest(&mut self) -> Result<bool, Error> {
        let Some(oldest) = self.in_flight.front() else {
            self.driver.state().map_err(device_error(SUM, 0))?;
            return Ok(false);
        };
        let (ticket, since) = (oldest.ticket, oldest.since);
        let mark = oldest.mark.as_ref().expect("a start that failed ended it all");
        let reached = self.driver.reached(mark).map_err(device_error(SUM, ticket))?;
        let clean = self.driver.state().map_err(device_error(SUM, ticket))? == nccl::State::Ready;
        if !reached || !clean {
            self.check_time(SUM, ticket, since, self.limits.operation)?;
            return Ok(false);
        }
        let mut state = self.shared.state();
        if let Some(failed) = &state.failed {
            return Err(failed.clone());
        }
        let InFlight { buffer, entry, .. } = self.in_flight.pop_front().expect("it was looked at");
        self.host.record().end(entry, true);
        state.done.insert(ticket, buffer);
        drop(state);
        self.shared.changed.notify_all();
        if let Some(next) = self.in_flight.front_mut() {
            next.since = Instant::now();
        }
        Ok(true)
    }

    /// An error where waiting has no sense any more.
    fn check_time(
        &mut self,
        operation: &'static str,
        sequence: u64,
        since: Instant,
        limit: Duration,
    ) -> Result<(), Error> {
        if let Some(rank) = self.loss.over(&*self.host) {
            return Err(Error::PeerLost { operation, sequence, rank, source: None });
        }
        if since.elapsed() < limit {
            return Ok(());
        }
        Err(Error::Deadline { operation, sequence, deadline: limit, missing: Vec::new() })
    }
}

impl Loss {
    fn new() -> Self {
        Self { looked: Instant::now(), found: None }
    }

    /// The rank that is gone, once the others' part of a sum must have come.
    fn over(&mut self, host: &dyn Collective) -> Option<u32> {
        if self.found.is_none() && self.looked.elapsed() >= LOSS {
            self.looked = Instant::now();
            self.found = host.lost_peer().map(|rank| (rank.0, Instant::now()));
        }
        self.found.filter(|(_, since)| since.elapsed() >= GRACE).map(|(rank, _)| rank)
    }
}

/// What a call to NCCL or CUDA means to the gang.
pub(super) fn device_error(operation: &'static str, sequence: u64) -> impl Fn(nccl::Error) -> Error {
    move |error| {
        let class = match error {
            nccl::Error::NotAvailable { what } => return Error::NotAvailable { what },
            nccl::Error::Call { misuse: true, .. } => ErrorClass::Fatal,
            // A GPU that failed, or a peer: a new generation has new processes.
            nccl::Error::Call { misuse: false, .. } => ErrorClass::Retry,
        };
        Error::Device { operation, sequence, class, source: Arc::new(error) }
    }
}
