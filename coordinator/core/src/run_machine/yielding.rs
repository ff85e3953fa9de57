//! Slots given up to a run of higher priority (RUN-12).

use super::turn::Turn;
use super::{Effect, Rejection};
use thaw_proto::ids::RunId;
use thaw_proto::run::{RunReason, RunState};

impl Turn {
    /// Becomes as small as `workers`, for `to`; what is free later may make it larger again.
    pub(super) fn cede(&mut self, workers: u32, to: &RunId) -> Result<(), Rejection> {
        self.trains("give up trainers")?;
        let most = workers.max(self.record.spec.workers.min);
        if self.record.members.len() <= most as usize || self.record.ceded.is_some_and(|held| held <= most) {
            return Ok(());
        }
        self.changed = true;
        self.record.ceded = Some(most);
        self.event(format!("gives up all but {most} trainer(s) to {to}"));
        self.shrink();
        Ok(())
    }

    /// Saves, then gives up all trainers to `to` and waits for others.
    pub(super) fn yield_to(&mut self, to: &RunId) -> Result<(), Rejection> {
        self.trains("yield")?;
        for trainer in std::mem::take(&mut self.record.joining) {
            self.stop(trainer);
        }
        let generation = self.record.generation;
        for member in self.record.members.clone() {
            self.effect(Effect::SuspendTrainer { trainer: member.trainer, generation });
        }
        let message = format!("saves at the next step, then yields to {to}");
        self.enter(RunState::Preempting, RunReason::Preempted, message, Some(self.policy.suspend_timeout_ms));
        Ok(())
    }

    /// PREEMPTING is over, one way or another: the run goes on from its head once its turn has come.
    pub(super) fn yielded(&mut self, how: &str) {
        self.release_members();
        self.record.attempt = self.record.attempt.next();
        self.record.queued_ms = self.now.unix_ms;
        self.record.whole = 0;
        self.record.ceded = None;
        let message = format!("yielded at step {}: {how}", self.record.position.step);
        if self.record.suspends_next || thaw_mutants::planted("yield-for-good") {
            self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
        } else {
            self.enter(RunState::Pending, RunReason::Preempted, message, None);
        }
    }

    fn trains(&self, operation: &'static str) -> Result<(), Rejection> {
        if self.record.state.is_training() { Ok(()) } else { Err(self.not_legal(operation)) }
    }
}
