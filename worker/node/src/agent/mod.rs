//! The agent of a node: keeps one session with the coordinator and the trainer processes of its slots.
//!
//! ```text
//! coordinator <== session ==> agent <== stdin, stdout (frames), stderr (lines) ==> trainer, one per slot
//! ```
//!
//! Law:
//! - `AGENT-1`: a message of a lower leader epoch than one seen is refused, naming both.
//! - `AGENT-2`: losing the session stops no trainer; the next Hello says who is alive, and what a trainer reported that the
//!   coordinator must know is sent again, so each such report arrives at least once.
//! - `AGENT-3`: a trainer's end is always reported; asked about a trainer it does not have, the agent says that it ended.
//! - `AGENT-4`: no trainer outlives the agent.
//! - `AGENT-5`: of several coordinators it looks for the one that leads: it goes where it is sent, and else asks in turn.
//! - `AGENT-6`: a trainer that is ready and whose process does not run any more is reported and killed: it is pinged, and its answers do
//!   not depend on how its training gets on.
//! - `AGENT-7`: where a trainer stood in a generation is reported once, before the trainer hears that it is over: also of one that is stopped,
//!   hangs, or is gone.
//! - `AGENT-8`: a trainer that answers, and whose training stands still (RING-4) for the spec's `workers.stall_timeout_seconds`, is reported
//!   and killed too. Time counts while the agent runs and the trainer has answered its last ping: a machine that is paused or too busy is no
//!   standstill.
//! - `AGENT-9`: of each run it holds the last state that a trainer of this host has put into shared memory, and no other: until the run needs none,
//!   no trainer of it has lived here for long, or the agent ends.
//!
//! It decides nothing about runs, and every wait in it has a deadline.

mod child;
pub mod launch;
mod outbox;
mod session;
mod snapshots;
mod still;
#[cfg(test)]
mod tests;
mod trainer;
mod trainers;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::ids::Incarnation;
use thaw_proto::status::ErrorClass;
use thaw_runtime::backoff::Backoff;
use thaw_runtime::dial::Dial;
use thaw_runtime::surroundings;
use thaw_runtime::tasks::{OnError, Tasks};
use thaw_runtime::tls::{self, Tls};
use tokio_util::sync::CancellationToken;
use tonic::transport::Uri;

/// Most slots that the protocol allows.
const MAX_SLOTS: u32 = 64;
/// How long killed trainers may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Waits before a new session, with jitter.
const RECONNECT_BASE: Duration = Duration::from_millis(100);
const RECONNECT_CAP: Duration = Duration::from_secs(2);
/// Redirections followed without a wait between.
const REDIRECTIONS: u32 = 2;

/// What an agent needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// The coordinators, e.g. `http://127.0.0.1:7070`; at least one. Whichever leads is found.
    pub coordinators: Vec<Uri>,
    /// For coordinators with TLS.
    pub tls: Option<Tls>,
    /// Unique among the workers.
    pub name: String,
    /// Trainers at once, 1-64.
    pub slots: u32,
    /// Host under which other trainers reach this node's.
    pub host: String,
    /// Program of a trainer.
    pub trainer_program: PathBuf,
    /// Its arguments.
    pub trainer_arguments: Vec<String>,
}

/// Why an agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is out of range.
    #[error("a worker has 1 to {MAX_SLOTS} slots, not {0}")]
    Slots(u32),
    /// Nobody to serve.
    #[error("no coordinator is given; name one with --coordinator http://HOST:PORT")]
    NoCoordinator,
    /// A coordinator's address and the TLS options contradict each other.
    #[error("a coordinator's address does not fit")]
    Tls(#[from] thaw_runtime::tls::Error),
    /// The coordinator says that this worker's Hello is wrong.
    #[error("coordinator {coordinator} refuses worker {worker}: {}", .source.message())]
    Refused {
        /// Its address.
        coordinator: Uri,
        /// This worker.
        worker: String,
        /// What it said.
        source: Box<tonic::Status>,
    },
    /// The operating system refuses a signal handler.
    #[error("cannot listen to signals")]
    Signals(#[source] std::io::Error),
    /// No thread can be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// A trainer survived its kill.
    #[error("trainers did not end")]
    Trainers(#[source] thaw_runtime::tasks::Error),
}

/// [`run`] until the first SIGINT or SIGTERM, or with `exit_with_stdin` until standard input ends: whoever holds its other
/// end is then gone.
///
/// # Errors
/// As [`run`]; [`Error::Signals`].
pub async fn serve(config: Config, exit_with_stdin: bool) -> Result<(), Error> {
    let shutdown = thaw_runtime::shutdown::signal().map_err(Error::Signals)?;
    if exit_with_stdin {
        let shutdown = shutdown.clone();
        // A thread, not a task: a read of stdin cannot be cancelled, and would hold the runtime's end up.
        std::thread::Builder::new()
            .name("watch-stdin".to_owned())
            .spawn(move || {
                let _unread = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                tracing::info!("standard input ended; shutting down");
                shutdown.cancel();
            })
            .map_err(Error::Thread)?;
    }
    run(config, shutdown).await
}

/// Runs the agent until `shutdown` is cancelled; then kills its trainers and returns. Needs a tokio runtime with time and
/// I/O; it and its tasks may run on any of its threads.
///
/// # Errors
/// A setting is wrong, the coordinator refuses the very first Hello for good, or a trainer survives its kill.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    let spawner = child::Spawner::start(&config).map_err(Error::Thread)?;
    run_among(config, Surroundings { dial: Dial::tcp(), launch: Arc::new(spawner) }, shutdown).await
}

/// What an agent has to do with besides its coordinators.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// How it reaches them.
    pub dial: Dial,
    /// What its trainers are.
    pub launch: Arc<dyn launch::Launch>,
}

/// As [`run`], with other trainers than processes, and over another network.
///
/// # Errors
/// As [`run`].
pub async fn run_among(config: Config, surroundings: Surroundings, shutdown: CancellationToken) -> Result<(), Error> {
    if config.slots == 0 || config.slots > MAX_SLOTS {
        return Err(Error::Slots(config.slots));
    }
    let Some(first) = config.coordinators.first().cloned() else { return Err(Error::NoCoordinator) };
    for coordinator in &config.coordinators {
        tls::endpoint(coordinator.clone().into(), config.tls.as_ref())?;
    }
    // Not a child of `shutdown`: the tasks that watch the trainers end when those have ended.
    let tasks = Tasks::new(CancellationToken::new());
    let trainers = trainers::Trainers::new(&config, surroundings.launch, tasks.clone());
    let outcome = tokio::select! {
        biased;
        outcome = keep_session(&config, &surroundings.dial, first, &trainers, &shutdown) => outcome,
        never = trainers.let_go_of_old_states() => match never {},
    };
    trainers.kill_all();
    let joined = tasks.join(KILL_LIMIT).await.map_err(Error::Trainers);
    outcome.and(joined)
}

async fn keep_session(
    config: &Config,
    dial: &Dial,
    first: Uri,
    trainers: &trainers::Trainers,
    shutdown: &CancellationToken,
) -> Result<(), Error> {
    let mut backoff = Backoff::new(RECONNECT_BASE, RECONNECT_CAP);
    let mut session = session::Session::new(config, dial, Incarnation(surroundings::uuid().to_string()), trainers);
    let (mut coordinator, mut redirections) = (first, 0);
    loop {
        let ended = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            ended = session.run(&coordinator, &mut backoff) => ended,
        };
        trainers.outbox().set_connected(false);
        if let session::End::Status(status) = &ended
            && !session.was_welcomed()
            && ErrorClass::of(status) == ErrorClass::Invalid
        {
            let source = Box::new(status.clone());
            return Err(Error::Refused { coordinator, worker: config.name.clone(), source });
        }
        match ended.leader(config.tls.as_ref()) {
            Some(leader) if redirections < REDIRECTIONS => {
                tracing::info!(%coordinator, %leader, "another coordinator leads");
                coordinator = leader;
                redirections += 1;
                continue;
            }
            Some(_) | None => redirections = 0,
        }
        let wait = backoff.next_wait().unwrap_or(RECONNECT_CAP);
        tracing::warn!(%coordinator, reason = %ended, ?wait, "no session; trainers go on");
        coordinator = next_in_turn(&config.coordinators, &coordinator);
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// The one after `last` of those given; the first after one that was not.
fn next_in_turn(given: &[Uri], last: &Uri) -> Uri {
    let at = given.iter().position(|uri| uri == last).map_or(0, |at| (at + 1) % given.len());
    given[at].clone()
}

/// Every task of the agent logs and counts its error: what matters about a trainer is in its reports.
const POLICY: OnError = OnError::LogAndCount;
