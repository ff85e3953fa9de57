//! Batches ahead of the step: named threads load, the caller takes results in the order of the work.
//!
//! ```text
//! work ──▶ [thread 0..n: claim the next ticket, load] ──▶ ready, by ticket ──▶ next()
//!             at most `depth` tickets beyond the last one taken
//! ```
//!
//! The first error ends the stream, at its own place in the order. Dropping stops and joins the threads: each ends after the batch
//! it is loading. How long `next` waits is the caller's to measure ("data wait").

use crate::augment::View;
use crate::batch::{Batch, Dataset, Error};
use crate::index::Part;
use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// One batch to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    pub part: Part,
    /// Positions within the part; may be empty.
    pub samples: Vec<u32>,
    /// Which view of each; `None`: as they are.
    pub view: Option<View>,
}

/// Batches in order, loaded ahead.
pub struct Prefetch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Something became ready, or there will be nothing more.
    ready: Condvar,
    /// There is room for more, or loading is to stop.
    room: Condvar,
    depth: u64,
}

struct State {
    /// `None` once exhausted, failed or stopped.
    work: Option<Box<dyn Iterator<Item = Work> + Send>>,
    /// Tickets given out, and taken by the caller.
    claimed: u64,
    taken: u64,
    ready: BTreeMap<u64, Result<Batch, Error>>,
    ended: bool,
}

impl Prefetch {
    /// Starts `threads` threads (at least one) that keep up to `depth` batches (at least one) ahead.
    ///
    /// # Errors
    /// Where the system gives no thread; those already started are joined.
    pub fn spawn<W>(dataset: Dataset, work: W, depth: usize, threads: usize) -> io::Result<Self>
    where
        W: Iterator<Item = Work> + Send + 'static,
    {
        Self::spawn_with(move |work| dataset.load(work.part, &work.samples, work.view), work, depth, threads)
    }

    fn spawn_with<L, W>(load: L, work: W, depth: usize, threads: usize) -> io::Result<Self>
    where
        L: Fn(&Work) -> Result<Batch, Error> + Send + Sync + 'static,
        W: Iterator<Item = Work> + Send + 'static,
    {
        let state = State { work: Some(Box::new(work)), claimed: 0, taken: 0, ready: BTreeMap::new(), ended: false };
        let depth = depth.max(1) as u64;
        let shared = Arc::new(Shared { state: Mutex::new(state), ready: Condvar::new(), room: Condvar::new(), depth });
        let load = Arc::new(load);
        let mut prefetch = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for number in 0..threads.max(1) {
            let (shared, load) = (Arc::clone(&shared), Arc::clone(&load));
            let thread = thread::Builder::new().name(format!("data-{number}"));
            prefetch.threads.push(thread.spawn(move || shared.run(load.as_ref()))?);
        }
        Ok(prefetch)
    }
}

impl Iterator for Prefetch {
    type Item = Result<Batch, Error>;

    /// The next batch in order, waiting for it; `None` after the last, or after an error.
    fn next(&mut self) -> Option<Self::Item> {
        let mut state = self.shared.lock();
        loop {
            if state.ended {
                return None;
            }
            let ticket = state.taken;
            if let Some(result) = state.ready.remove(&ticket) {
                state.taken += 1;
                state.ended = result.is_err();
                self.shared.room.notify_all();
                return Some(result);
            }
            if state.work.is_none() && state.taken == state.claimed {
                return None;
            }
            state = self.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.shared.lock().work = None;
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // Loading catches panics, so a thread that ended otherwise has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self, load: &dyn Fn(&Work) -> Result<Batch, Error>) {
        while let Some((ticket, work)) = self.claim() {
            let result = caught(|| load(&work)).unwrap_or_else(Err);
            let mut state = self.lock();
            if result.is_err() {
                state.work = None;
                self.room.notify_all();
            }
            state.ready.insert(ticket, result);
            self.ready.notify_all();
        }
    }

    /// The next piece of work and its place in the order, once there is room for its result.
    fn claim(&self) -> Option<(u64, Work)> {
        let mut state = self.lock();
        while state.work.is_some() && state.claimed >= state.taken + self.depth {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let ticket = state.claimed;
        let work = state.work.as_mut()?;
        match caught(|| work.next()) {
            Ok(Some(work)) => {
                state.claimed += 1;
                return Some((ticket, work));
            }
            Ok(None) => {}
            Err(error) => {
                state.claimed += 1;
                state.ready.insert(ticket, Err(error));
            }
        }
        state.work = None;
        self.ready.notify_all();
        self.room.notify_all();
        None
    }

    /// A panic never leaves the state half-changed: all that can panic runs caught or without the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A panic as an error, so that the caller of `next` hears of it instead of waiting for ever.
fn caught<T>(action: impl FnOnce() -> T) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(action)).map_err(|panic| Error::Panicked { message: message(panic.as_ref()) })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    fn batch(work: &Work) -> Batch {
        Batch { inputs: Vec::new(), labels: Vec::new(), samples: work.samples.clone(), lengths: Vec::new() }
    }

    fn works(count: u32) -> impl Iterator<Item = Work> + Send + 'static {
        (0..count).map(|number| Work { part: Part::Train, samples: vec![number], view: None })
    }

    #[test]
    fn order_is_that_of_the_work_for_any_threads_and_depth() {
        for (depth, threads) in [(1, 1), (1, 4), (3, 2), (16, 4)] {
            let prefetch = Prefetch::spawn_with(|work| Ok(batch(work)), works(50), depth, threads).unwrap();
            let order: Vec<u32> = prefetch.map(|batch| batch.unwrap().samples[0]).collect();
            assert_eq!(order, (0..50).collect::<Vec<_>>());
        }
    }

    #[test]
    fn never_more_than_depth_ahead() {
        let claimed = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&claimed);
        let work = works(100).inspect(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let mut prefetch = Prefetch::spawn_with(|work| Ok(batch(work)), work, 3, 4).unwrap();
        for taken in 1..=20 {
            prefetch.next().unwrap().unwrap();
            assert!(claimed.load(Ordering::SeqCst) <= taken + 3);
        }
    }

    #[test]
    fn an_error_comes_in_its_place_and_ends_the_stream() {
        let load = |work: &Work| match work.samples[0] {
            5 => Err(Error::NoTokenizer),
            _ => Ok(batch(work)),
        };
        let mut prefetch = Prefetch::spawn_with(load, works(50), 8, 4).unwrap();
        for expected in 0..5 {
            assert_eq!(prefetch.next().unwrap().unwrap().samples, [expected]);
        }
        assert!(matches!(prefetch.next(), Some(Err(Error::NoTokenizer))));
        assert!(prefetch.next().is_none());
    }

    #[test]
    fn panics_are_errors() {
        let mut prefetch = Prefetch::spawn_with(|_| panic!("broken loader"), works(3), 2, 2).unwrap();
        let error = prefetch.next().unwrap().unwrap_err();
        assert!(matches!(error, Error::Panicked { ref message } if message == "broken loader"));
        let work = works(3).map(|work| if work.samples[0] == 1 { panic!("broken work") } else { work });
        let mut prefetch = Prefetch::spawn_with(|work| Ok(batch(work)), work, 2, 2).unwrap();
        prefetch.next().unwrap().unwrap();
        assert!(matches!(prefetch.next(), Some(Err(Error::Panicked { .. }))));
    }

    #[test]
    fn dropping_joins_threads_that_wait_for_room() {
        let (ended, ends) = mpsc::channel();
        struct Guard(mpsc::Sender<()>);
        impl Drop for Guard {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let guard = Guard(ended);
        let load = move |work: &Work| {
            let _held = &guard;
            Ok(batch(work))
        };
        let mut prefetch = Prefetch::spawn_with(load, works(u32::MAX), 2, 3).unwrap();
        prefetch.next().unwrap().unwrap();
        drop(prefetch);
        ends.try_recv().expect("the loader was dropped with the last thread");
    }
}
