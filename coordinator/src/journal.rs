//! The journal: lines about a run (events, metrics, logs) appended to files in its folder, in order, off the driver's
//! path.
//!
//! JOURNAL-1: a full disk costs lines, never the run: what cannot be written is counted and said once per run.
//! JOURNAL-2: readers are told when the log has grown; a line is one write, and a reader keeps half a line until the
//!            rest comes.

use crate::folder::{Lines, RunFolder};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};
use thaw_proto::ids::RunId;
use tokio::sync::{mpsc, oneshot, watch};

/// Lines waiting at once; beyond, lines are dropped and counted.
const QUEUE: usize = 8192;

/// A handle to append with. A cheap clone; the files belong to [`Writer::run`].
#[derive(Debug, Clone)]
pub struct Journal {
    queue: mpsc::Sender<Command>,
    logs: Arc<Mutex<BTreeMap<RunId, watch::Sender<u64>>>>,
}

#[derive(Debug)]
enum Command {
    Append { run: RunId, folder: RunFolder, lines: Lines, json: String },
    Close { run: RunId },
    Flush { done: oneshot::Sender<()> },
}

/// The other half: owns the files.
#[derive(Debug)]
pub struct Writer {
    queue: mpsc::Receiver<Command>,
    files: Files,
}

#[derive(Debug)]
struct Files {
    open: BTreeMap<(RunId, Lines), File>,
    lost: BTreeMap<RunId, u64>,
    logs: Arc<Mutex<BTreeMap<RunId, watch::Sender<u64>>>>,
}

/// A journal and its writer.
#[must_use]
pub fn journal() -> (Journal, Writer) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let logs = Arc::default();
    let files = Files { open: BTreeMap::new(), lost: BTreeMap::new(), logs: Arc::clone(&logs) };
    (Journal { queue: sender, logs }, Writer { queue, files })
}

impl Journal {
    /// Appends one line; never waits.
    pub fn append(&self, run: &RunId, folder: &RunFolder, lines: Lines, json: String) {
        let command = Command::Append { run: run.clone(), folder: folder.clone(), lines, json };
        if self.queue.try_send(command).is_err() {
            tracing::warn!(%run, ?lines, "the journal's queue is full; a line is lost");
        }
    }

    /// Closes the run's files once what waits is written.
    pub fn close(&self, run: &RunId) {
        if self.queue.try_send(Command::Close { run: run.clone() }).is_err() {
            tracing::debug!(%run, "the journal's queue is full; files stay open until the end");
        }
    }

    /// Returns once everything appended before is written, or lost.
    pub async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.send(Command::Flush { done }).await.is_ok() {
            // An error means that the writer has ended: nothing more will be written.
            let _ = written.await;
        }
    }

    /// Rises as lines are added to the run's log. The value is a count of bytes since this process began; only its
    /// changes matter.
    #[must_use]
    pub fn log_changes(&self, run: &RunId) -> watch::Receiver<u64> {
        let mut logs = self.logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        logs.entry(run.clone()).or_insert_with(|| watch::channel(0).0).subscribe()
    }
}

impl Writer {
    /// Writes until every [`Journal`] is gone.
    pub async fn run(mut self) {
        let mut batch = Vec::new();
        while self.queue.recv_many(&mut batch, 256).await > 0 {
            let commands = std::mem::take(&mut batch);
            let mut files = self.files;
            let written = thaw_runtime::surroundings::blocking(move || {
                for command in commands {
                    files.perform(command);
                }
                files
            });
            self.files = match written.await {
                Ok(files) => files,
                Err(join) => match join.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // The runtime ends.
                    Err(_) => return,
                },
            };
        }
    }
}

impl Files {
    fn perform(&mut self, command: Command) {
        match command {
            Command::Append { run, folder, lines, json } => {
                if let Err(error) = self.append(&run, &folder, lines, &json) {
                    let lost = self.lost.entry(run.clone()).or_default();
                    *lost += 1;
                    if *lost == 1 {
                        tracing::warn!(%run, error = &*error, "lines about the run cannot be written");
                    }
                    self.open.remove(&(run, lines));
                }
            }
            Command::Close { run } => {
                for lines in [Lines::Events, Lines::Metrics, Lines::Logs] {
                    self.open.remove(&(run.clone(), lines));
                }
                self.lost.remove(&run);
            }
            // Whoever asked may have gone.
            Command::Flush { done } => drop(done.send(())),
        }
    }

    fn append(
        &mut self,
        run: &RunId,
        folder: &RunFolder,
        lines: Lines,
        json: &str,
    ) -> Result<(), thaw_runtime::BoxError> {
        let file = match self.open.entry((run.clone(), lines)) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(vacant) => vacant.insert(folder.open_lines(lines)?),
        };
        let mut line = String::with_capacity(json.len() + 1);
        line.push_str(json);
        line.push('\n');
        file.write_all(line.as_bytes())?;
        if lines == Lines::Logs {
            let logs = self.logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(changes) = logs.get(run) {
                changes.send_modify(|written| *written += line.len() as u64);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_arrive_in_order_and_readers_are_told() {
        let root = tempfile::tempdir().unwrap();
        let run = RunId("a-1".to_owned());
        let folder = RunFolder::of(&run, None, root.path()).unwrap();
        let (journal, writer) = journal();
        let mut changes = journal.log_changes(&run);
        let writing = tokio::spawn(writer.run());
        for index in 0..100 {
            journal.append(&run, &folder, Lines::Logs, format!("{{\"n\":{index}}}"));
        }
        journal.append(&run, &folder, Lines::Events, "{}".to_owned());
        changes.wait_for(|written| *written == 890).await.unwrap();
        journal.close(&run);
        drop((journal, changes));
        writing.await.unwrap();
        let logs = std::fs::read_to_string(folder.lines_path(Lines::Logs)).unwrap();
        assert_eq!(logs.lines().count(), 100);
        assert_eq!(logs.lines().last(), Some("{\"n\":99}"));
        assert_eq!(std::fs::read_to_string(folder.lines_path(Lines::Events)).unwrap(), "{}\n");
    }
}
