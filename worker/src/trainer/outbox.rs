//! What the trainer says to its agent, and what it has heard from it meanwhile.

use super::pace::PaceReport;
use super::replica::StepReport;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thaw_node::pipe::ReportSender;
use thaw_proto::ids::{Generation, Step};
use thaw_proto::pb;
use thaw_proto::pb::trainer_report::Event as Payload;
use thaw_proto::run::{CheckpointRef, Evaluation, Position, RunReason, RunResult, StageResult};

pub(crate) use thaw_proto::pb::trainer_report::Event;

/// The names a trainer's reports carry.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) run: String,
    pub(crate) slot: u32,
    pub(crate) incarnation: String,
}

#[derive(Debug, Default)]
struct Heard {
    generation: Generation,
    suspend: bool,
    committed: Option<Step>,
    /// The newest that was proposed.
    proposed: Generation,
}

/// Shared by the training thread, the saving thread and the one that listens to the agent.
pub(crate) struct Outbox {
    identity: Identity,
    reports: ReportSender,
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Outbox {
    pub(crate) fn new(identity: Identity, reports: ReportSender) -> Self {
        Self { identity, reports, heard: Mutex::default(), changed: Condvar::new() }
    }

    pub(crate) fn enter(&self, generation: Generation) {
        let mut heard = self.heard();
        *heard = Heard { generation, suspend: false, committed: None, proposed: heard.proposed.max(generation) };
    }

    /// A gang is proposed. What waits for the coordinator in an older one need not wait any more.
    pub(crate) fn note_proposal(&self, generation: Generation) {
        let mut heard = self.heard();
        heard.proposed = heard.proposed.max(generation);
        self.changed.notify_all();
    }

    /// Whether a newer gang than that of `generation` is proposed.
    pub(crate) fn is_superseded(&self, generation: Generation) -> bool {
        self.heard().proposed > generation
    }

    /// Whether a newer gang is proposed than the one this trainer is in.
    pub(crate) fn is_behind(&self) -> bool {
        let heard = self.heard();
        heard.proposed > heard.generation
    }

    pub(crate) fn send(&self, event: Event) {
        let generation = self.heard().generation.0;
        let Identity { run, slot, incarnation } = self.identity.clone();
        // Without its agent this process is about to end; there is nobody to tell.
        let _ = self.reports.send(pb::TrainerReport { run, slot, incarnation, generation, event: Some(event) });
    }

    pub(crate) fn evaluation(&self, evaluation: &Evaluation) {
        let mut message = pb::Evaluation::from(evaluation);
        message.confusion.clear();
        self.send(Payload::Evaluation(message));
    }

    pub(crate) fn progress(
        &self,
        position: Position,
        pace: &PaceReport,
        report: &StepReport,
        rates: &[f64],
        epoch: f64,
    ) {
        let generation = self.heard().generation.0;
        self.send(Payload::Progress(pb::Progress {
            position: Some(pb::Position::from(&position)),
            generation,
            loss: report.loss,
            learning_rates: rates.to_vec(),
            samples_per_second: pace.samples_per_second,
            step_time: Some(pace.seconds.into()),
            grad_norm: Some(report.grad_norm),
            epoch,
            prefix_computed: pace.prefix.computed,
            prefix_cached: pace.prefix.cached,
            all_reduced_bytes: pace.all_reduced_bytes,
        }));
    }

    pub(crate) fn stage_ended(result: &StageResult) -> Event {
        Payload::StageEnded(result.into())
    }

    pub(crate) fn checkpoint(checkpoint: &CheckpointRef) -> Event {
        Payload::Checkpoint(pb::CheckpointWritten { checkpoint: Some(checkpoint.into()) })
    }

    pub(crate) fn finished(result: &RunResult, reason: RunReason) -> Event {
        Payload::Finished(pb::RunFinished { result: Some(result.into()), reason: pb::RunReason::from(reason).into() })
    }

    pub(crate) fn interrupted(step: Step, message: String) -> Event {
        Payload::Interrupted(pb::TrainerInterrupted { message, step: step.0 })
    }

    pub(crate) fn failed(class: pb::FailureClass, reason: RunReason, message: String) -> Event {
        Payload::Failed(pb::TrainerFailed { class: class.into(), reason: pb::RunReason::from(reason).into(), message })
    }

    /// Whether this generation was asked to save and stand still.
    pub(crate) fn suspension_asked(&self) -> bool {
        self.heard().suspend
    }

    pub(crate) fn ask_suspension(&self, generation: Generation) {
        let mut heard = self.heard();
        heard.suspend |= heard.generation == generation;
    }

    pub(crate) fn note_commit(&self, step: Step) {
        let mut heard = self.heard();
        heard.committed = heard.committed.max(Some(step));
        self.changed.notify_all();
    }

    /// The last step whose checkpoint is known to be the head.
    pub(crate) fn committed(&self) -> Option<Step> {
        self.heard().committed
    }

    /// Waits until the checkpoint of `step` is the head; false at the deadline, or where a newer gang is proposed meanwhile.
    pub(crate) fn wait_for_commit(&self, step: Step, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut heard = self.heard();
        while heard.committed < Some(step) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || heard.proposed > heard.generation {
                return false;
            }
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        // A panic elsewhere leaves plain values behind, which stay true.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
