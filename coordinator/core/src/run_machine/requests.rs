//! What users and a new leader ask for.

use super::turn::Turn;
use super::{Effect, Rejection};
use thaw_proto::run::{RunReason, RunState};

impl Turn {
    /// RUN-4
    pub(super) fn cancel(&mut self) -> Result<(), Rejection> {
        match self.record.state {
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Running
            | RunState::Resizing
            | RunState::Suspending
            | RunState::Suspended
            | RunState::Preempting => {
                self.release_members();
                self.enter(RunState::Cancelled, RunReason::UserRequest, String::new(), None);
                Ok(())
            }
            RunState::Cancelled => Ok(()),
            RunState::Succeeded | RunState::Failed => Err(self.not_legal("be cancelled")),
        }
    }

    pub(super) fn suspend(&mut self) -> Result<(), Rejection> {
        match self.record.state {
            RunState::Running => {
                let generation = self.record.generation;
                for member in self.record.members.clone() {
                    self.effect(Effect::SuspendTrainer { trainer: member.trainer, generation });
                }
                let message = "saving at the next step";
                self.enter(RunState::Suspending, RunReason::UserRequest, message, Some(self.policy.suspend_timeout_ms));
                Ok(())
            }
            // Nothing has been trained since the head.
            RunState::Pending | RunState::Admitted | RunState::Forming | RunState::Resizing => {
                self.release_members();
                let message = format!("suspended at step {}", self.record.position.step);
                self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
                Ok(())
            }
            RunState::Suspending | RunState::Suspended => Ok(()),
            RunState::Preempting | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {
                Err(self.not_legal("be suspended"))
            }
        }
    }

    pub(super) fn resume(&mut self) -> Result<(), Rejection> {
        match self.record.state {
            RunState::Suspended => {
                self.record.attempt = self.record.attempt.next();
                self.record.failures_without_progress = 0;
                self.enter(RunState::Pending, RunReason::WaitingForWorkers, String::new(), None);
                Ok(())
            }
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Running
            | RunState::Resizing
            | RunState::Suspending
            | RunState::Preempting
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => Err(self.not_legal("be resumed")),
        }
    }

    /// The trainers died with the coordinator, or belong to workers that have yet to come back: they are stopped when seen
    /// (RUN-8), and hold no slot of a worker that reports them gone.
    pub(super) fn coordinator_started(&mut self) {
        match self.record.state {
            RunState::Admitted | RunState::Forming | RunState::Running | RunState::Resizing | RunState::Preempting => {
                self.release_members();
                let message = "the coordinator was started again";
                self.enter(RunState::Resizing, RunReason::CoordinatorRestarted, message, None);
            }
            RunState::Suspending => {
                self.release_members();
                let message = "suspended from the last checkpoint: the coordinator was started again";
                self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
            }
            RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
    }
}
