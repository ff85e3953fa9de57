//! [`Writer`]: saving on a thread of its own, so that training never waits for storage.
//!
//! Law: one save at a time, in the order they come. Whoever need not save asks [`Writer::is_idle`] first; a save that must be made waits behind
//! the one that runs, and so does the caller where another waits already. Every save has one result.

use super::{CheckpointStore, Error};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

type Save<R> = Box<dyn FnOnce(&CheckpointStore) -> R + Send>;

/// Saves checkpoints; `R` is what a save returns.
#[derive(Debug)]
pub struct Writer<R> {
    /// Absent once the writer is being dropped.
    saves: Option<SyncSender<Save<R>>>,
    results: Receiver<R>,
    /// Saves that have not ended.
    unfinished: Arc<AtomicU64>,
    /// Results that nobody has taken.
    owed: u64,
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
        let unfinished = Arc::<AtomicU64>::default();
        let left = Arc::clone(&unfinished);
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || run(&store, &work, &done, &left))
            .map_err(Error::Thread)?;
        Ok(Self { saves: Some(saves), results, unfinished, owed: 0, thread: Some(thread) })
    }

    /// Hands over a save.
    ///
    /// # Errors
    /// [`Error::Panicked`]: a save panicked before.
    pub fn submit(&mut self, save: impl FnOnce(&CheckpointStore) -> R + Send + 'static) -> Result<(), Error> {
        let saves = self.saves.as_ref().ok_or(Error::Panicked)?;
        self.unfinished.fetch_add(1, Ordering::Relaxed);
        saves.send(Box::new(save)).map_err(|_| Error::Panicked)?;
        self.owed += 1;
        Ok(())
    }

    /// The next finished save's result, if there is one. Ask at each step.
    ///
    /// # Errors
    /// [`Error::Panicked`].
    pub fn poll(&mut self) -> Result<Option<R>, Error> {
        match self.results.try_recv() {
            Ok(result) => {
                self.owed -= 1;
                Ok(Some(result))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Error::Panicked),
        }
    }

    /// Waits for the next finished save; `None` where no result is owed. As long as the storage takes.
    ///
    /// # Errors
    /// [`Error::Panicked`].
    pub fn wait(&mut self) -> Result<Option<R>, Error> {
        if self.owed == 0 {
            return Ok(None);
        }
        let result = self.results.recv().map_err(|_| Error::Panicked)?;
        self.owed -= 1;
        Ok(Some(result))
    }

    /// Ends without waiting: the save that runs ends by itself, those that wait behind it are made too, and nobody hears of them.
    pub fn abandon(mut self) {
        self.thread = None;
    }

    /// Whether every save has ended.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.unfinished.load(Ordering::Relaxed) == 0
    }
}

fn run<R>(store: &CheckpointStore, work: &Receiver<Save<R>>, done: &Sender<R>, unfinished: &AtomicU64) {
    while let Ok(save) = work.recv() {
        let result = save(store);
        unfinished.fetch_sub(1, Ordering::Relaxed);
        if done.send(result).is_err() {
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
    fn saves_end_in_order_and_are_counted_till_then() {
        let (_folder, mut writer) = writer();
        let (release, held) = channel::<()>();
        assert!(writer.is_idle());
        writer
            .submit(move |_| {
                held.recv().unwrap();
                1
            })
            .unwrap();
        writer.submit(|_| 2).unwrap();
        assert!(!writer.is_idle());
        assert_eq!(writer.poll().unwrap(), None);
        release.send(()).unwrap();
        assert_eq!([writer.wait().unwrap(), writer.wait().unwrap(), writer.wait().unwrap()], [Some(1), Some(2), None]);
        assert!(writer.is_idle());
    }

    #[test]
    fn a_panic_is_no_silence() {
        let (_folder, mut writer) = writer();
        writer.submit(|_| std::panic::resume_unwind(Box::new("meant"))).unwrap();
        assert!(matches!(writer.wait(), Err(Error::Panicked)));
        assert!(writer.submit(|_| 1).is_err());
    }
}
