//! The thread that owns a driver, against a driver that does what a test says: hangs, fails, lies, or refuses to end.

use super::*;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use thaw_node::collective::{Abort, Error, Listener, Membership, Options, Tree};
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::status::ErrorClass;
use thaw_torch::nccl::{self, Driver, State};

/// Far above what any of this takes; a test that needs it has failed.
const SOON: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(50);
const PATIENT: Limits = Limits { join: SOON, operation: SOON, abort: SOON };
const HURRIED: Limits = Limits { join: SOON, operation: SHORT, abort: SOON };

#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Join,
    Start(u32),
    Aborted,
    /// A buffer was dropped before its sum was over.
    Lost(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A wrong call, or the GPU's or a peer's failure.
    Call {
        misuse: bool,
    },
    /// The call never comes back, until it is released.
    Block,
    Panic,
}

/// What the driver is to do, and what it did.
#[derive(Debug, Default)]
struct World {
    /// Sums that have done all they ever do.
    finished: u32,
    never_joins: bool,
    on_start: Option<Fault>,
    status: Option<Fault>,
    on_abort: Option<Fault>,
    released: bool,
    aborted: bool,
    events: Vec<Event>,
    /// Looks at a mark that was not reached.
    looks: u32,
    /// Answers of the status before it is ready after a start.
    busy: u32,
}

/// A shared world, and a way to wait for something in it.
#[derive(Debug, Clone, Default)]
struct Stage(Arc<(Mutex<World>, Condvar)>);

impl Stage {
    fn with<R>(&self, change: impl FnOnce(&mut World) -> R) -> R {
        let result = change(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
        result
    }

    /// Waits for a value, as long as it may take.
    fn until(&self, reached: impl Fn(&World) -> bool) {
        let world = self.0.0.lock().unwrap();
        let (_world, timeout) = self.0.1.wait_timeout_while(world, SOON, |world| !reached(world)).unwrap();
        assert!(!timeout.timed_out(), "it never came to that");
    }

    fn act(&self, fault: Option<Fault>) -> Result<(), nccl::Error> {
        match fault {
            None => Ok(()),
            Some(Fault::Call { misuse }) => Err(nccl::Error::Call { call: "fake", text: "as told".to_owned(), misuse }),
            Some(Fault::Block) => {
                self.until(|world| world.released);
                Ok(())
            }
            Some(Fault::Panic) => std::panic::resume_unwind(Box::new("meant")),
        }
    }

    fn events(&self) -> Vec<Event> {
        self.with(|world| world.events.clone())
    }

    fn sums(&self, limits: Limits) -> Result<DeviceSums<Buffer>, Error> {
        self.sums_beside(Arc::new(Tree::alone(1)), limits)
    }

    fn sums_beside(&self, host: Arc<dyn Collective>, limits: Limits) -> Result<DeviceSums<Buffer>, Error> {
        DeviceSums::join(Fake { stage: self.clone(), started: 0 }, host, limits)
    }

    fn buffer(&self, number: u32) -> Buffer {
        Buffer { number, stage: self.clone(), returned: false }
    }
}

#[derive(Debug)]
struct Buffer {
    number: u32,
    stage: Stage,
    returned: bool,
}

impl Buffer {
    fn returned(mut self) -> u32 {
        self.returned = true;
        self.number
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.returned {
            self.stage.with(|world| world.events.push(Event::Lost(self.number)));
        }
    }
}

struct Fake {
    stage: Stage,
    started: u32,
}

impl Fake {
    fn check_alive(&self) {
        assert!(!self.stage.with(|world| world.aborted), "called after the abort");
    }
}

impl Driver for Fake {
    type Buffer = Buffer;
    type Mark = u32;

    fn bytes(_buffer: &Buffer) -> u64 {
        4
    }

    fn join(&mut self) -> Result<(), nccl::Error> {
        self.check_alive();
        self.stage.with(|world| world.events.push(Event::Join));
        Ok(())
    }

    fn state(&mut self) -> Result<State, nccl::Error> {
        self.check_alive();
        let (status, is_busy) = self.stage.with(|world| {
            let is_busy = world.never_joins || world.busy > 0;
            world.busy = world.busy.saturating_sub(1);
            (world.status, is_busy)
        });
        self.stage.act(status)?;
        Ok(if is_busy { State::Busy } else { State::Ready })
    }

    fn start(&mut self, buffer: &Buffer) -> Result<(), nccl::Error> {
        self.check_alive();
        let fault = self.stage.with(|world| {
            world.events.push(Event::Start(buffer.number));
            world.busy = 2;
            world.on_start
        });
        self.started += 1;
        self.stage.act(fault)
    }

    fn mark(&mut self) -> Result<u32, nccl::Error> {
        self.check_alive();
        assert_eq!(self.stage.with(|world| world.busy), 0, "marked before the start was done");
        Ok(self.started)
    }

    fn reached(&mut self, mark: &u32) -> Result<bool, nccl::Error> {
        self.check_alive();
        Ok(self.stage.with(|world| {
            let reached = world.finished >= *mark;
            world.looks += u32::from(!reached);
            reached
        }))
    }

    fn abort(self) -> Result<(), nccl::Error> {
        self.check_alive();
        // As NCCL does it: kernels leave early and the stream looks finished.
        let fault = self.stage.with(|world| {
            world.aborted = true;
            world.finished = u32::MAX;
            world.on_abort
        });
        self.stage.act(fault)?;
        self.stage.with(|world| world.events.push(Event::Aborted));
        Ok(())
    }
}

#[test]
fn sums_come_back_in_order_and_the_end_is_one_abort() {
    let stage = Stage::default();
    let mut sums = stage.sums(PATIENT).unwrap();
    let mut tickets: VecDeque<_> = (0..3).map(|number| sums.submit(stage.buffer(number))).collect();
    // The third is started although the first is not over.
    stage.until(|world| world.events.contains(&Event::Start(2)));
    for number in 0..3 {
        stage.with(|world| world.finished = number + 1);
        assert_eq!(sums.wait(tickets.pop_front().unwrap()).unwrap().returned(), number);
    }
    drop(sums);
    let started = [Event::Join, Event::Start(0), Event::Start(1), Event::Start(2), Event::Aborted];
    assert_eq!(stage.events(), started);
}

#[test]
fn a_hung_sum_ends_at_its_deadline_and_takes_the_host_along() {
    let stage = Stage::default();
    let host: Arc<dyn Collective> = Arc::new(Tree::alone(1));
    let mut sums = stage.sums_beside(Arc::clone(&host), HURRIED).unwrap();
    let (hung, later) = (sums.submit(stage.buffer(0)), sums.submit(stage.buffer(1)));
    let error = sums.wait(hung).unwrap_err();
    assert!(matches!(error, Error::Deadline { operation: "GPU sum", sequence: 0, .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Retry);
    assert!(error.to_string().ends_with("it is not known for whom"), "{error}");
    assert!(matches!(sums.wait(later), Err(Error::Deadline { sequence: 0, .. })), "the first error is everyone's");
    let after = sums.submit(stage.buffer(2));
    assert!(matches!(sums.wait(after), Err(Error::Deadline { .. })));
    drop(sums);
    assert!(matches!(host.all_gather(&[]), Err(Error::Aborted)));
    // Memory in use is kept until the abort is through; what was never started is not in use.
    let events = stage.events();
    let place = |event| events.iter().position(|found| *found == event).unwrap();
    assert!(place(Event::Aborted) < place(Event::Lost(0)), "{events:?}");
    assert_eq!(events.iter().filter(|event| **event == Event::Aborted).count(), 1);
}

#[test]
fn an_abort_wakes_a_waiter_and_what_looks_finished_is_not_given_back() {
    let stage = Stage::default();
    let mut sums = stage.sums(PATIENT).unwrap();
    let begun = Instant::now();
    let ticket = sums.submit(stage.buffer(0));
    stage.until(|world| world.looks > 0);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| sums.wait(ticket).map(Buffer::returned));
        sums.abort();
        sums.abort();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Aborted)));
    });
    stage.until(|world| world.events.contains(&Event::Lost(0)));
    drop(sums);
    assert!(begun.elapsed() < SOON);
    assert_eq!(stage.events(), [Event::Join, Event::Start(0), Event::Aborted, Event::Lost(0)]);
}

#[test]
fn an_error_that_comes_with_the_end_of_a_sum_counts() {
    for (misuse, class) in [(false, ErrorClass::Retry), (true, ErrorClass::Fatal)] {
        let stage = Stage::default();
        let mut sums = stage.sums(PATIENT).unwrap();
        let ticket = sums.submit(stage.buffer(0));
        stage.until(|world| world.looks > 0);
        stage.with(|world| {
            world.status = Some(Fault::Call { misuse });
            world.finished = 1;
        });
        let error = sums.wait(ticket).unwrap_err();
        assert!(matches!(error, Error::Device { operation: "GPU sum", sequence: 0, .. }), "{error}");
        assert_eq!(error.class(), class);
        drop(sums);
        assert_eq!(stage.events().last(), Some(&Event::Lost(0)));
    }
}

#[test]
fn an_error_while_idle_ends_it_too() {
    let stage = Stage::default();
    let mut sums = stage.sums(PATIENT).unwrap();
    stage.with(|world| world.status = Some(Fault::Call { misuse: false }));
    let ticket = sums.submit(stage.buffer(0));
    assert!(matches!(sums.wait(ticket), Err(Error::Device { .. })));
}

#[test]
fn a_start_that_fails_keeps_its_memory_until_the_abort() {
    let stage = Stage::default();
    let mut sums = stage.sums(PATIENT).unwrap();
    stage.with(|world| world.on_start = Some(Fault::Call { misuse: true }));
    let ticket = sums.submit(stage.buffer(0));
    assert_eq!(sums.wait(ticket).unwrap_err().class(), ErrorClass::Fatal);
    drop(sums);
    assert_eq!(stage.events(), [Event::Join, Event::Start(0), Event::Aborted, Event::Lost(0)]);
}

#[test]
fn a_rank_that_does_not_join_runs_into_the_deadline() {
    let stage = Stage::default();
    stage.with(|world| world.never_joins = true);
    let error = stage.sums(Limits { join: SHORT, ..PATIENT }).unwrap_err();
    assert!(matches!(error, Error::Deadline { operation: "joining the GPUs' communicator", .. }), "{error}");
    assert_eq!(stage.events(), [Event::Join, Event::Aborted]);
}

/// The host's collectives of two ranks.
fn gang_of_two() -> [Tree; 2] {
    let listeners = [0, 1].map(|_| Listener::bind("127.0.0.1").unwrap());
    let addresses = listeners.each_ref().map(|(_, address)| address.clone()).to_vec();
    let options = Options { shards: 2, connect_deadline: SOON, operation_deadline: SOON, host: None };
    std::thread::scope(|scope| {
        let joining = [0, 1].map(|rank| {
            let membership = Membership {
                run: "demo-0badcafe".to_owned(),
                generation: Generation(3),
                rank: Rank(rank),
                addresses: addresses.clone(),
                key: b"0123456789abcdef".to_vec(),
            };
            let (listener, _) = &listeners[rank as usize];
            scope.spawn(move || listener.connect(&membership, options, &Abort::default()).unwrap())
        });
        joining.map(|thread| thread.join().unwrap())
    })
}

#[test]
fn a_dead_peer_ends_a_sum_that_nccl_would_wait_for() {
    let [host, peer] = gang_of_two();
    let stage = Stage::default();
    let mut sums = stage.sums_beside(Arc::new(host), PATIENT).unwrap();
    let begun = Instant::now();
    let ticket = sums.submit(stage.buffer(0));
    stage.until(|world| world.looks > 0);
    drop(peer);
    let error = sums.wait(ticket).unwrap_err();
    assert!(matches!(error, Error::PeerLost { rank: 1, operation: "GPU sum", .. }), "{error}");
    assert!(begun.elapsed() < SOON);
}

#[test]
fn an_error_here_is_heard_by_the_peers() {
    let [host, peer] = gang_of_two();
    let stage = Stage::default();
    let sums = stage.sums_beside(Arc::new(host), PATIENT).unwrap();
    sums.abort();
    assert!(matches!(peer.all_gather(&[]), Err(Error::PeerLost { rank: 0, .. })));
    assert_eq!(peer.lost_peer(), Some(Rank(0)));
}

#[test]
fn a_driver_that_does_not_end_holds_nobody_up() {
    let stage = Stage::default();
    stage.with(|world| world.on_abort = Some(Fault::Block));
    let mut sums = stage.sums(Limits { abort: SHORT, ..HURRIED }).unwrap();
    let ticket = sums.submit(stage.buffer(0));
    assert!(matches!(sums.wait(ticket), Err(Error::Deadline { .. })));
    drop(sums);
    // What the GPU may still write to has not been freed.
    assert!(!stage.events().contains(&Event::Lost(0)));
    stage.with(|world| world.released = true);
    stage.until(|world| world.events.contains(&Event::Lost(0)));
}

#[test]
fn a_driver_that_does_not_come_back_from_a_call_holds_nobody_up() {
    let stage = Stage::default();
    stage.with(|world| world.on_start = Some(Fault::Block));
    let mut sums = stage.sums(Limits { abort: SHORT, ..HURRIED }).unwrap();
    let ticket = sums.submit(stage.buffer(0));
    assert!(matches!(sums.wait(ticket), Err(Error::Deadline { .. })));
    drop(sums);
    stage.with(|world| world.released = true);
    stage.until(|world| world.events.contains(&Event::Lost(0)));
    assert_eq!(stage.events(), [Event::Join, Event::Start(0), Event::Aborted, Event::Lost(0)]);
}

#[test]
fn a_driver_that_panics_leaves_nobody_waiting() {
    let stage = Stage::default();
    stage.with(|world| world.on_start = Some(Fault::Panic));
    let mut sums = stage.sums(PATIENT).unwrap();
    let ticket = sums.submit(stage.buffer(0));
    assert!(matches!(sums.wait(ticket), Err(Error::Aborted)));
}
