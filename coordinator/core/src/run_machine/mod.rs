//! What happens to one run: from (record, observed, now, input) to (record, observed, effects, events), or a typed rejection.
//!
//! ```text
//!            slots          all ready         all built
//! PENDING ─────────► ADMITTED ───────► FORMING ───────► RUNNING ── Finished ──► SUCCEEDED
//!    ▲                ▲    │              │              │   │
//!    │ Resume   slots │    └──── loss, deadline, restart ┘   │ Suspend
//!    │                │              ▼                       ▼
//! SUSPENDED ◄──┐      └───────── RESIZING               SUSPENDING ── Suspended, loss, deadline ──► SUSPENDED
//!              └── Suspend, from PENDING, ADMITTED, FORMING and RESIZING
//!
//! any state that has not ended ── Cancel ──► CANCELLED
//! RUNNING ── a run of higher priority ──► PREEMPTING ── Suspended, loss, deadline ──► PENDING; Suspend makes it SUSPENDING
//! RUNNING ── fewer trainers wanted, or others ready to join ──► FORMING, with those that stay
//! RUNNING, FORMING, ADMITTED ── loss that the others survive ──► FORMING, ADMITTED or RESIZING, with them
//! any state with trainers ── an error that trying again cannot mend, or no progress ──► FAILED
//! ```
//!
//! The driver saves the record if `changed`, then performs the effects, then feeds back what comes of them. `Observed` is
//! never stored: a new leader starts from an empty one and the input [`Input::CoordinatorStarted`].
//!
//! - RUN-1: the generation never falls, rises with every new gang, and is saved before any trainer hears of it.
//! - RUN-2: only rank 0 of the present generation moves the head; anything older is refused, naming both numbers.
//! - RUN-3: the head's position never goes back.
//! - RUN-4: cancel is legal in every state that has not ended, and wins: nothing leads out of an ended state.
//! - RUN-5: success is a committed last step and rank 0's word; never an exit code.
//! - RUN-6: before the next generation is chosen each trainer of the present one has stopped, or has had [`Policy::stop_timeout_ms`] for
//!   it, or was given up with its worker, or is kept: it survives its gang and is a member of the next. A slot never has two.
//! - RUN-7: a run without a fault ends: every wait of the machine has a deadline, and [`Policy::most_failures`] generations in a
//!   row without a new step end it: a committed one, or one that a gang applied beyond where the last was lost. Coordinator restarts do
//!   not count. [`Policy::most_step_failures`] that trainers ended by their own doing, by an error or a crash, end it before, with a reason of
//!   its own; what workers, stores, peers, signals from outside and leaders do is not counted there.
//! - RUN-8: what is wanted is derived again from what workers report ([`Input::TrainersSeen`]): a lost effect delays, never wedges.
//! - RUN-9: a new leader stops no trainer of a gang that trains, nor survivors that are about to or wait for others: it waits
//!   [`Policy::reattach_timeout_ms`] for each to be seen, and to say whether it survives the others.
//! - RUN-10: where a gang breaks and its other trainers survive that, they are the next generation at once if they are `workers.min`, and
//!   else wait up to [`Policy::keep_timeout_ms`] for others. What was lost is started meanwhile and joins at a generation of its own. Where the
//!   gang breaks by no loss while one that has joined copies the others' state, they go on without it.
//! - RUN-11: a generation has `workers.min` to [`RunRecord::wanted_size`] members when it is proposed. A gang that keeps its state and has too many,
//!   or fewer than slots are granted for, changes while it trains. Who leaves keeps slot and state until the smaller generation is committed,
//!   and is a member again if that one breaks. The wish is stored, so that a new leader begins anew with what is not committed.
//!
//! - RUN-12: a run that yields is PREEMPTING until rank 0 has said that it saved, or [`Policy::suspend_timeout_ms`], or a loss; then PENDING, with
//!   the head it has. No committed step is lost, and it comes back by itself.
//! - RUN-13: from the second gang in a row on that is lost without a new step, trainers in place of lost ones are started after a wait between
//!   nothing and a bound that doubles; so are those that are to join, where the ones before did not come so far. Survivors do not wait.
//! - RUN-14: a trainer that crashes or hangs is held against its slot, once; one that ends because another did is not. A run that ends
//!   because of a step takes back what it held against slots at that step. One that its gang waited for in vain, and that is stuck for certain
//!   (CULPRIT-4), hangs: the next generation, where it has not built that yet, goes on without it.
//! - RUN-15: no wait follows the wall clock: whoever sets it neither ends one nor makes it longer.
//!
//! The machine never reads a clock, draws a random number or talks to anyone.

mod gangs;
mod keeping;
mod now;
mod record;
mod rejection;
mod reports;
mod requests;
mod sizes;
mod slots;
mod turn;
mod verdicts;
mod yielding;

#[cfg(test)]
mod culprit_tests;
#[cfg(test)]
mod keeping_tests;
#[cfg(test)]
mod script;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod sizes_tests;
#[cfg(test)]
mod table;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod verdicts_tests;

pub use now::Now;
pub use record::{Member, Observed, RunRecord, Trainer};
pub use rejection::{Refused, Rejection};
pub use slots::{gives_up, holds_slots, waits_as_before, wants_slots};
pub use verdicts::Ending;

use crate::culprit::Judgement;
use crate::quarantine::Resting;
use crate::scheduler::Verdict;
use std::collections::BTreeMap;
use thaw_proto::ids::{Generation, Incarnation, Rank, RunId, Step, WorkerName};
use thaw_proto::peers::Peers;
use thaw_proto::run::{CheckpointRef, RunReason, RunResult, RunState, StageResult};
use turn::Turn;

/// Limits of the machine. Times are milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// From StartTrainer to TrainerReady of every member: data and weights are loaded in this time.
    pub start_timeout_ms: u64,
    /// From Propose to GangBuilt of every member.
    pub forming_timeout_ms: u64,
    /// From StopTrainer until a member that nobody reports is taken for gone.
    pub stop_timeout_ms: u64,
    /// From SuspendTrainer to Suspended.
    pub suspend_timeout_ms: u64,
    /// From a new leader's start until a trainer of a gang that it has taken over is taken for lost: a full limit of silence
    /// for the worker, after the time it needs to find the leader.
    pub reattach_timeout_ms: u64,
    /// From the loss of so many members that the others cannot train until those are stopped too.
    pub keep_timeout_ms: u64,
    /// From a trainer's word that its gang is broken until it is formed again, where no loss is heard of.
    pub broken_timeout_ms: u64,
    /// The most that passes from the end of a trainer that was to join until another is started; doubled with each in a row (RUN-13).
    pub rejoin_wait_ms: u64,
    /// How long a run that could start or grow waits for more of what it wants.
    pub gather_ms: u64,
    /// Generations in a row without a newly committed step that end the run.
    pub most_failures: u32,
    /// Those of them that trainers ended by their own doing, at which it ends before.
    pub most_step_failures: u32,
    /// The most that the second start in a row without a new step waits; each later one waits up to twice as long as the one before (RUN-13).
    pub backoff_ms: u64,
    /// The most that any start waits for that.
    pub backoff_cap_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            start_timeout_ms: 600_000,
            forming_timeout_ms: 60_000,
            stop_timeout_ms: 10_000,
            suspend_timeout_ms: 300_000,
            reattach_timeout_ms: 10_000,
            keep_timeout_ms: 60_000,
            broken_timeout_ms: 1_000,
            rejoin_wait_ms: 5_000,
            gather_ms: 2_000,
            most_failures: 5,
            most_step_failures: 3,
            backoff_ms: 1_000,
            backoff_cap_ms: 120_000,
        }
    }
}

/// What the machine is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Time has passed. `slots`: what the scheduler says to a run that [`wants_slots`]; `fresh`: new incarnations, at least one for each slot
    /// granted; `resting`: slots that it was not given since they are quarantined.
    Tick {
        slots: Option<Verdict>,
        fresh: Vec<Incarnation>,
        resting: Option<Resting>,
    },
    /// A worker's hello or heartbeat: every trainer of this run that is alive on it.
    TrainersSeen {
        worker: WorkerName,
        trainers: Vec<Trainer>,
    },
    /// A trainer has loaded and listens on `host:port`.
    TrainerReady {
        trainer: Trainer,
        address: String,
        /// Whether it survives the loss of a peer, with its state.
        keeps: bool,
    },
    /// A trainer's gang is broken; it keeps its state and waits for the next proposal.
    TrainerInterrupted {
        trainer: Trainer,
        generation: Generation,
        message: String,
    },
    /// A gang has applied a step. Of use only after a loss (RUN-7).
    Progressed {
        generation: Generation,
        step: Step,
    },
    GangBuilt {
        trainer: Trainer,
        generation: Generation,
    },
    TrainerExited {
        trainer: Trainer,
        ending: Ending,
    },
    /// Those that are found lost together are lost at once: each loss is a new generation.
    WorkersLost {
        workers: Vec<WorkerName>,
    },
    /// `generation` is 0 for a trainer that was never proposed a gang.
    TrainerFailed {
        trainer: Trainer,
        generation: Generation,
        class: FailureClass,
        reason: RunReason,
        message: String,
    },
    /// A checkpoint is durable and asks to become the head.
    CheckpointWritten {
        trainer: Trainer,
        generation: Generation,
        checkpoint: CheckpointRef,
    },
    StageEnded {
        trainer: Trainer,
        generation: Generation,
        result: Box<StageResult>,
    },
    Finished {
        trainer: Trainer,
        generation: Generation,
        result: Box<RunResult>,
        reason: RunReason,
    },
    Suspended {
        trainer: Trainer,
        generation: Generation,
    },
    Cancel,
    Suspend,
    Resume,
    /// A user wants so many trainers (RUN-11).
    Scale {
        workers: u32,
    },
    /// The scheduler wants this run to become as small as `workers`, so that `to` can start (RUN-12).
    Cede {
        workers: u32,
        to: RunId,
    },
    /// The scheduler wants all its slots.
    Yield {
        to: RunId,
    },
    /// Whom a generation waited for that was lost for no known reason ([`Observed::unexplained`]).
    CulpritFound {
        judgement: Box<Judgement>,
    },
    /// First input after a coordinator has taken the run over. Its gang trains on; who of it does not come back is lost.
    CoordinatorStarted,
}

/// What a trainer's failure means for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureClass {
    Retry,
    Fenced,
    Invalid,
    Fatal,
}

/// What the driver is to do, once the record is saved. It adds its leader epoch; the receiver refuses older ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// With the record's spec, plan and run URL.
    StartTrainer {
        trainer: Trainer,
        generation: Generation,
    },
    Propose(Box<Proposal>),
    Commit {
        trainer: Trainer,
        generation: Generation,
    },
    StopTrainer {
        trainer: Trainer,
        generation: Generation,
    },
    SuspendTrainer {
        trainer: Trainer,
        generation: Generation,
    },
    /// The checkpoint is the head.
    AckCheckpoint {
        trainer: Trainer,
        generation: Generation,
        checkpoint: CheckpointRef,
    },
}

/// One member's invitation to a gang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    pub trainer: Trainer,
    pub generation: Generation,
    pub rank: Rank,
    /// Of each rank, in rank order.
    pub addresses: Peers,
    /// What the peers of this generation show each other.
    pub key: [u8; 32],
    /// `None`: from the beginning.
    pub resume: Option<CheckpointRef>,
}

/// Something worth telling people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Unix milliseconds.
    pub at_ms: u64,
    pub generation: Generation,
    pub state: RunState,
    pub reason: RunReason,
    pub message: String,
}

/// What a step of the machine came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub record: RunRecord,
    /// Whether the record differs from the one given, so that it must be saved before anything else is done.
    pub changed: bool,
    pub observed: Observed,
    pub effects: Vec<Effect>,
    pub events: Vec<Event>,
}

/// Whether [`Input::TrainersSeen`] changes nothing where `alive` are all trainers that the record has on their worker, so that it need not be
/// fed: of every heartbeat of a fleet hardly one is news.
#[must_use]
pub fn is_no_news(record: &RunRecord, observed: &Observed, alive: &[Trainer]) -> bool {
    let stopping = record.state == RunState::Resizing && !observed.kept;
    !stopping && !alive.iter().any(|trainer| observed.awaited.contains(&trainer.incarnation))
}

/// Takes one step.
///
/// # Errors
/// When the input is stale or not legal in the run's state; nothing has changed then.
pub fn step(
    policy: &Policy,
    record: &RunRecord,
    observed: &Observed,
    now: Now,
    input: &Input,
) -> Result<Outcome, Rejection> {
    take_step(policy, record, observed.clone(), now, input).map_err(|refused| {
        debug_assert_eq!(refused.observed, *observed, "a rejection changes nothing");
        refused.rejection
    })
}

/// [`step`] for whoever owns what was observed: nothing of the size of a gang is copied.
///
/// # Errors
/// As [`step`].
pub fn take_step(
    policy: &Policy,
    record: &RunRecord,
    observed: Observed,
    now: Now,
    input: &Input,
) -> Result<Outcome, Box<Refused>> {
    let mut turn = Turn::new(*policy, record, observed, now);
    match apply(&mut turn, input) {
        Ok(()) => Ok(turn.outcome()),
        Err(rejection) => Err(Box::new(Refused { rejection, observed: turn.observed })),
    }
}

fn apply(turn: &mut Turn, input: &Input) -> Result<(), Rejection> {
    match input {
        Input::Tick { slots, fresh, resting } => turn.tick(slots.as_ref(), fresh, *resting)?,
        Input::TrainersSeen { worker, trainers } => turn.trainers_seen(worker, trainers),
        Input::TrainerReady { trainer, address, keeps } => turn.trainer_ready(trainer, address, *keeps)?,
        Input::TrainerInterrupted { trainer, generation, message } => {
            turn.trainer_interrupted(trainer, *generation, message)?;
        }
        Input::Progressed { generation, step } => turn.progressed(*generation, *step),
        Input::GangBuilt { trainer, generation } => turn.gang_built(trainer, *generation)?,
        Input::TrainerExited { trainer, ending } => turn.trainer_exited(trainer, *ending)?,
        Input::WorkersLost { workers } => turn.workers_lost(workers),
        Input::TrainerFailed { trainer, generation, class, reason, message } => {
            turn.trainer_failed(trainer, *generation, *class, *reason, message)?;
        }
        Input::CheckpointWritten { trainer, generation, checkpoint } => {
            turn.checkpoint_written(trainer, *generation, checkpoint)?;
        }
        Input::StageEnded { trainer, generation, result } => turn.stage_ended(trainer, *generation, result)?,
        Input::Finished { trainer, generation, result, reason } => {
            turn.finished(trainer, *generation, result, *reason)?
        }
        Input::Suspended { trainer, generation } => turn.suspended(trainer, *generation)?,
        Input::Cancel => turn.cancel()?,
        Input::Suspend => turn.suspend()?,
        Input::Resume => turn.resume()?,
        Input::Scale { workers } => turn.scale(*workers)?,
        Input::Cede { workers, to } => turn.cede(*workers, to)?,
        Input::Yield { to } => turn.yield_to(to)?,
        Input::CulpritFound { judgement } => turn.culprit_found(judgement),
        Input::CoordinatorStarted => turn.coordinator_started(),
    }
    Ok(())
}

/// The key that peers of a generation show each other: it follows from their incarnations, which nobody else is told.
fn gang_key(record: &RunRecord) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("thaw.v1 key of a gang");
    hasher.update(record.id.as_str().as_bytes());
    if thaw_mutants::planted("gang-key-reused") {
        return *hasher.finalize().as_bytes();
    }
    hasher.update(&record.generation.0.to_le_bytes());
    for member in &record.members {
        hasher.update(member.trainer.incarnation.as_str().as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Addresses by incarnation.
type Addresses = BTreeMap<Incarnation, String>;
