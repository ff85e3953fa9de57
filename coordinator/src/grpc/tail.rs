//! TailLogs: the run's log file, followed. The file is the only source, so nothing is lost or doubled between "past"
//! and "live".

use super::runs::has_ended;
use crate::folder::{Lines, RunFolder};
use crate::journal::Journal;
use crate::lines::LogEntry;
use crate::views::{Views, Watch};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::collections::VecDeque;
use std::path::PathBuf;
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::watch;
use tonic::Status;

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

pub(super) struct Tail {
    path: PathBuf,
    /// Bytes of the file handled.
    offset: u64,
    /// The part of a line at the end of what was read.
    partial: Vec<u8>,
    ready: VecDeque<pb::LogLine>,
    follow: bool,
    changes: watch::Receiver<u64>,
    journal: Journal,
    views: Views,
    run: RunId,
}

impl Tail {
    pub(super) fn new(journal: Journal, views: Views, run: RunId, folder: RunFolder, follow: bool) -> Self {
        let changes = journal.log_changes(&run);
        let path = folder.lines_path(Lines::Logs);
        Self { path, offset: 0, partial: Vec::new(), ready: VecDeque::new(), follow, changes, journal, views, run }
    }

    pub(super) fn lines(self) -> BoxStream<'static, Result<pb::LogLine, Status>> {
        futures::stream::unfold(Some(self), |tail| async move {
            let mut tail = tail?;
            match tail.next().await {
                Ok(Some(line)) => Some((Ok(line), Some(tail))),
                Ok(None) => None,
                Err(error) => Some((Err(super::errors::internal(&format!("read the run's log: {error}"))), None)),
            }
        })
        .boxed()
    }

    async fn next(&mut self) -> std::io::Result<Option<pb::LogLine>> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Ok(Some(line));
            }
            self.changes.borrow_and_update();
            let watch = self.views.watch(&self.run).filter(|watch| self.follow && !has_ended(&watch.run));
            if watch.is_none() {
                // The last look: what was said before it must be in the file.
                self.journal.flush().await;
            }
            if self.read().await? {
                continue;
            }
            let Some(watch) = watch else { return Ok(None) };
            self.wait(watch).await;
        }
    }

    /// Until there may be more lines, or the run has changed.
    async fn wait(&mut self, mut watch: Watch) {
        tokio::select! {
            biased;
            _ = self.changes.changed() => {}
            _ = watch.updates.recv() => {}
        }
    }

    /// Whether anything was read.
    async fn read(&mut self) -> std::io::Result<bool> {
        let mut file = match tokio::fs::File::open(&self.path).await {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        file.seek(std::io::SeekFrom::Start(self.offset)).await?;
        let mut chunk = vec![0; CHUNK];
        let length = file.read(&mut chunk).await?;
        self.offset += length as u64;
        self.partial.extend_from_slice(&chunk[..length]);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            match serde_json::from_slice::<LogEntry>(&line) {
                Ok(line) => self.ready.push_back(line.message()),
                Err(error) => tracing::debug!(%error, path = %self.path.display(), "a damaged log line is left out"),
            }
        }
        Ok(length > 0)
    }
}
