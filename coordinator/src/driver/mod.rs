//! The driver: one loop that owns every run.
//!
//! ```text
//!  calls, worker messages, ticks ──▶ step (thaw-core, pure) ──▶ save (compare-and-set, fenced) ──▶ publish, then
//!  effects to workers
//!         ▲                                                                                                    │
//!         └────────────────────────────────── what comes of them ◀──────────────────────────────────────────────┘
//! ```
//!
//! DRIVE-1: save, then speak: no effect, answer or view of a change before the store has it.
//! DRIVE-2: after a write of unknown outcome nothing is done with its run until a read has told what became of it.
//! DRIVE-3: a run is stored under the compare that nobody else has changed it, and under the leader's fence.
//! DRIVE-4: worker liveness is by the monotonic clock, stamped where the message arrives, so that a slow store makes
//!          nobody dead.
//! DRIVE-5: a store that does not answer ends no process: reads are tried again until the term is over.
//! DRIVE-6: what a heartbeat costs does not grow with the fleet or the gang: it is fed to the machine only where it is news.
//! DRIVE-7: changes of several runs that one tick decides are saved side by side; of one run there is never more than
//!          one on its way, and its effects follow its own save.
//!
//! Never in here: a decision about a run. Those are the machine's.

mod attention;
mod inbound;
mod main_loop;
mod mirror;
mod outbound;
mod queue;
mod rebuild;
mod requests;
mod roster;
mod save;
mod sessions;
mod steps;
mod stored;
mod workers;

pub use main_loop::{Ended, MainLoop};
pub use mirror::{mirror, stored_revision, stored_run};
pub use queue::Tenants;
pub(crate) use rebuild::rebuild;
pub use rebuild::{Error as RebuildError, Rebuilt};
pub use stored::Unreadable;
pub use workers::{Outbox, SessionId};

use crate::folder::{self, RunFolder};
use crate::leader::{self, Fenced};
use crate::{clock, journal, views};
use std::path::PathBuf;
use std::sync::Arc;
use thaw_core::run_machine::{Rejection, RunRecord};
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use thaw_proto::plan::Plan;
use thaw_proto::spec::RunSpec;
use thaw_proto::violation::Violations;
use thaw_proto::worker::Hello;
use tokio::sync::{mpsc, oneshot};

/// Commands waiting at once; senders wait beyond.
const QUEUE: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no run {0}")]
    NotFound(RunId),
    #[error("run {run} cannot do that now")]
    Rejected {
        run: RunId,
        /// Name of the run's state, as the API has it.
        state: String,
        #[source]
        source: Rejection,
    },
    #[error("the worker's hello is not valid")]
    Hello(Violations),
    #[error("worker name {0} is taken by an agent that is alive; give each agent a name of its own")]
    NameTaken(String),
    #[error("the coordinator no longer leads, or is stopping")]
    Stopped,
    #[error("the store does not take the change")]
    Leader(#[source] leader::Error),
    #[error("run {run} in the store cannot be read; it was written by another version, or is damaged")]
    Stored {
        run: String,
        #[source]
        source: Unreadable,
    },
    #[error("run {run} in the store names a folder that this coordinator cannot use")]
    Folder {
        run: RunId,
        #[source]
        source: folder::Error,
    },
}

impl Error {
    /// Whether it is certain that nothing was kept.
    #[must_use]
    pub fn is_definite(&self) -> bool {
        match self {
            Self::NotFound(_) | Self::Rejected { .. } | Self::Hello(_) | Self::NameTaken(_) => true,
            Self::Stopped | Self::Leader(_) | Self::Stored { .. } | Self::Folder { .. } => false,
        }
    }
}

/// A run to be kept, planned and with its folder written.
#[derive(Debug, Clone)]
pub struct NewRun {
    pub id: RunId,
    pub spec: RunSpec,
    pub plan: Plan,
    pub folder: RunFolder,
    /// Names the submission, so that sending it again gives the same run.
    pub request_id: Option<String>,
}

impl NewRun {
    fn record(&self, now_ms: i64) -> RunRecord {
        let url = self.folder.url().to_string();
        RunRecord::new(self.id.clone(), self.spec.clone(), self.plan.clone(), url, now_ms.unsigned_abs())
    }
}

/// The run as it would be, kept nowhere.
#[must_use]
pub fn preview(new: &NewRun) -> pb::Run {
    stored::message(&new.record(clock::now_ms()), 0)
}

/// What a user can do to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserAction {
    Cancel,
    Suspend,
    Resume,
    Scale { workers: u32 },
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Command {
    Create { new: Box<NewRun>, reply: Reply<Arc<pb::Run>> },
    Requested { request_id: String, reply: Reply<Option<Arc<pb::Run>>> },
    Act { run: RunId, action: UserAction, reply: Reply<Arc<pb::Run>> },
    Folder { run: RunId, reply: Reply<RunFolder> },
    Explain { run: RunId, reply: Reply<pb::ExplainRunResponse> },
    Workers { reply: Reply<Vec<pb::Worker>> },
    OpenSession { hello: Box<Hello>, outbox: Outbox, reply: Reply<SessionId> },
    FromWorker { session: SessionId, message: Box<pb::worker_message::Message> },
    CloseSession { session: SessionId },
}

/// A handle on the loop. A cheap clone.
#[derive(Debug, Clone)]
pub struct Driver {
    commands: mpsc::Sender<Command>,
}

/// Loads every run from the store, and makes the loop that will drive them.
pub async fn load(
    fenced: Fenced,
    views: views::Views,
    journal: journal::Journal,
    data_dir: PathBuf,
    tenants: Tenants,
) -> Result<(Driver, MainLoop), Error> {
    let (commands, queue) = mpsc::channel(QUEUE);
    let main_loop = MainLoop::load(fenced, views, journal, data_dir, tenants, queue).await?;
    Ok((Driver { commands }, main_loop))
}

impl Driver {
    /// Keeps a new run. Answers with an older one where its request id is known.
    pub async fn create(&self, new: NewRun) -> Result<Arc<pb::Run>, Error> {
        self.ask(|reply| Command::Create { new: Box::new(new), reply }).await
    }

    /// The run that a request id made within a day.
    pub async fn requested(&self, request_id: &str) -> Result<Option<Arc<pb::Run>>, Error> {
        self.ask(|reply| Command::Requested { request_id: request_id.to_owned(), reply }).await
    }

    /// Does what a user asks, and answers with the run after it.
    pub async fn act(&self, run: &RunId, action: UserAction) -> Result<Arc<pb::Run>, Error> {
        self.ask(|reply| Command::Act { run: run.clone(), action, reply }).await
    }

    /// The run's folder.
    pub async fn folder(&self, run: &RunId) -> Result<RunFolder, Error> {
        self.ask(|reply| Command::Folder { run: run.clone(), reply }).await
    }

    /// Why the run is not training, and what has to happen first.
    pub async fn explain(&self, run: &RunId) -> Result<pb::ExplainRunResponse, Error> {
        self.ask(|reply| Command::Explain { run: run.clone(), reply }).await
    }

    /// Workers with a session, by name.
    pub async fn workers(&self) -> Result<Vec<pb::Worker>, Error> {
        self.ask(|reply| Command::Workers { reply }).await
    }

    /// Takes a worker in; commands to it go to `outbox`, the welcome first.
    pub async fn open_session(&self, hello: pb::Hello, outbox: Outbox) -> Result<SessionId, Error> {
        let hello = Box::new(Hello::try_from(&hello).map_err(Error::Hello)?);
        self.ask(|reply| Command::OpenSession { hello, outbox, reply }).await
    }

    /// Passes on what a worker says. Waits while the loop is behind, so that the worker's stream does.
    pub async fn from_worker(&self, session: &SessionId, message: pb::worker_message::Message) {
        // DRIVE-4.
        session.hold();
        let command = Command::FromWorker { session: session.clone(), message: Box::new(message) };
        let sent = self.commands.send(command).await;
        session.stamp();
        if sent.is_err() {
            tracing::debug!(worker = %session.worker, "the driver has stopped; a message is lost");
        }
    }

    /// The worker's stream has ended.
    pub async fn close_session(&self, session: SessionId) {
        if self.commands.send(Command::CloseSession { session }).await.is_err() {
            tracing::debug!("the driver has stopped before a session");
        }
    }

    async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(make(reply)).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }
}
