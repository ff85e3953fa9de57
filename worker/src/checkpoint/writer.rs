//! [`Writer`]: saving on a thread of its own, so that training never waits for storage.
//!
//! Law: one save at a time. A save that is offered while one runs is refused and counted, unless it must be made: then it
//! waits behind that one, and so does the caller where another waits already. Every save that is taken has one result.

use super::{CheckpointStore, Error};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

type Save<R> = Box<dyn FnOnce(&CheckpointStore) -> Result<R, Error> + Send>;

/// Whether a save was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Submitted {
    /// Its result will come from [`Writer::poll`] or [`Writer::wait`].
    Accepted,
    /// One is in flight; this one is not made.
    Refused,
}

/// Saves checkpoints; `R` is what a save returns.
#[derive(Debug)]
pub struct Writer<R> {
    /// Absent once the writer is being dropped.
    saves: Option<SyncSender<Save<R>>>,
    results: Receiver<Result<R, Error>>,
    in_flight: u64,
    refused: u64,
    thread: Option<JoinHandle<()>>,
}

impl<R: Send + 'static> Writer<R> {
    /// Starts the thread, named `checkpoint`.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn start(store: Arc<CheckpointStore>) -> Result<Self, Error> {
        // Room for the one save that must be made although another runs; a second such waits.
        let (saves, work) = sync_channel::<Save<R>>(1);
        let (done, results) = channel();
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || run(&store, &work, &done))
            .map_err(Error::Thread)?;
        Ok(Self { saves: Some(saves), results, in_flight: 0, refused: 0, thread: Some(thread) })
    }

    /// Offers a save. With `must` it is always taken.
    ///
    /// # Errors
    /// [`Error::Panicked`]: a save panicked before.
    pub fn submit(
        &mut self,
        must: bool,
        save: impl FnOnce(&CheckpointStore) -> Result<R, Error> + Send + 'static,
    ) -> Result<Submitted, Error> {
        if self.in_flight > 0 && !must {
            self.refused += 1;
            return Ok(Submitted::Refused);
        }
        let saves = self.saves.as_ref().ok_or(Error::Panicked)?;
        saves.send(Box::new(save)).map_err(|_| Error::Panicked)?;
        self.in_flight += 1;
        Ok(Submitted::Accepted)
    }

    /// The next finished save, if there is one. Ask at each step.
    ///
    /// # Errors
    /// That of the save; [`Error::Panicked`].
    pub fn poll(&mut self) -> Result<Option<R>, Error> {
        match self.results.try_recv() {
            Ok(result) => {
                self.in_flight -= 1;
                result.map(Some)
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Error::Panicked),
        }
    }

    /// Waits for the next finished save; `None` where none is in flight. As long as the storage takes.
    ///
    /// # Errors
    /// That of the save; [`Error::Panicked`].
    pub fn wait(&mut self) -> Result<Option<R>, Error> {
        if self.in_flight == 0 {
            return Ok(None);
        }
        let result = self.results.recv().map_err(|_| Error::Panicked)?;
        self.in_flight -= 1;
        result.map(Some)
    }

    /// Saves taken whose result was not yet asked for.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// How many saves were refused because storage was slow.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

fn run<R>(store: &CheckpointStore, work: &Receiver<Save<R>>, done: &Sender<Result<R, Error>>) {
    while let Ok(save) = work.recv() {
        if done.send(save(store)).is_err() {
            return;
        }
    }
}

impl<R> Drop for Writer<R> {
    fn drop(&mut self) {
        self.saves = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use url::Url;

    fn writer() -> (tempfile::TempDir, Writer<u32>) {
        let folder = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(&Url::from_directory_path(folder.path()).unwrap()).unwrap();
        (folder, Writer::start(Arc::new(store)).unwrap())
    }

    #[test]
    fn one_save_at_a_time_and_the_rest_is_counted() {
        let (_folder, mut writer) = writer();
        let (release, held) = channel::<()>();
        let taken = writer.submit(false, move |_| {
            held.recv().unwrap();
            Ok(1)
        });
        assert_eq!(taken.unwrap(), Submitted::Accepted);
        assert_eq!(writer.submit(false, |_| Ok(2)).unwrap(), Submitted::Refused);
        assert_eq!(writer.refused(), 1);
        assert_eq!(writer.poll().unwrap(), None);
        assert_eq!(writer.submit(true, |_| Ok(3)).unwrap(), Submitted::Accepted);
        release.send(()).unwrap();
        assert_eq!(writer.wait().unwrap(), Some(1));
        assert_eq!(writer.wait().unwrap(), Some(3));
        assert_eq!(writer.wait().unwrap(), None);
        assert_eq!(writer.submit(false, |_| Ok(4)).unwrap(), Submitted::Accepted);
        assert_eq!(writer.wait().unwrap(), Some(4));
    }

    #[test]
    fn errors_come_back_and_a_panic_is_no_silence() {
        let (_folder, mut writer) = writer();
        let _ = writer.submit(false, |_| Err(Error::Panicked)).unwrap();
        assert!(matches!(writer.wait(), Err(Error::Panicked)));
        let _ =
            writer.submit(false, |_| -> Result<u32, Error> { std::panic::resume_unwind(Box::new("meant")) }).unwrap();
        assert!(matches!(writer.wait(), Err(Error::Panicked)));
        assert!(writer.submit(true, |_| Ok(1)).is_err());
    }
}
