//! What users and a new leader ask for.

use super::gangs::some_of;
use super::turn::Turn;
use super::verdicts::Fault;
use super::{Effect, Member, Rejection};
use crate::gang::FreeSlot;
use thaw_mutants::planted;
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
                if planted("cancel-does-not-win") && self.record.state == RunState::Running {
                    return Ok(());
                }
                if !planted("cancel-leaves-trainers") {
                    self.release_members();
                }
                self.enter(RunState::Cancelled, RunReason::UserRequest, String::new(), None);
                Ok(())
            }
            RunState::Cancelled => Ok(()),
            RunState::Succeeded | RunState::Failed => Err(self.not_legal("be cancelled")),
        }
    }

    pub(super) fn suspend(&mut self) -> Result<(), Rejection> {
        match self.record.state {
            // What survivors hold is saved by a gang alone.
            RunState::Admitted | RunState::Forming if self.record.carries => self.suspend_next(),
            RunState::Running if self.observed.broken.is_some() => self.suspend_next(),
            RunState::Running => {
                self.record.suspends_next = false;
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
            // It saves already; where it goes from there is what changes.
            RunState::Preempting => {
                let message = "saving at the next step";
                self.enter(RunState::Suspending, RunReason::UserRequest, message, Some(self.policy.suspend_timeout_ms));
                Ok(())
            }
            RunState::Suspending | RunState::Suspended => Ok(()),
            RunState::Succeeded | RunState::Failed | RunState::Cancelled => Err(self.not_legal("be suspended")),
        }
    }

    fn suspend_next(&mut self) -> Result<(), Rejection> {
        if !self.record.suspends_next {
            self.record.suspends_next = true;
            self.changed = true;
            self.event("it is suspended once its gang trains again");
        }
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), Rejection> {
        match self.record.state {
            RunState::Suspended => {
                self.record.attempt = self.record.attempt.next();
                self.made_progress();
                self.record.queued_ms = self.now.unix_ms;
                self.record.whole = 0;
                self.record.ceded = None;
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

    /// A gang that trains goes on, and is waited for (RUN-9); so are survivors that were about to, which are proposed another generation, and
    /// those that wait for others.
    /// A gang that was starting, forming or stopping otherwise has done nothing that is worth the wait: its trainers are stopped when they
    /// are seen (RUN-8).
    pub(super) fn coordinator_started(&mut self) {
        match self.record.state {
            RunState::Running if planted("takeover-stops-all") => {
                self.stop_members();
                self.enter(RunState::Resizing, RunReason::CoordinatorRestarted, "started again", None);
            }
            RunState::Running | RunState::Suspending | RunState::Preempting => self.await_members(),
            RunState::Admitted | RunState::Forming if self.record.carries => {
                self.await_members();
                let why = "the coordinator was started again";
                self.waits_for_word(Fault::Other, RunReason::CoordinatorRestarted, why);
            }
            // Survivors that wait for others do that for the new leader too, for as long again.
            RunState::Resizing if self.record.carries => {
                self.await_members();
                self.observed.kept = true;
                self.observed.deadline_ms = Some(self.now.steady_ms + self.policy.keep_timeout_ms);
            }
            RunState::Admitted | RunState::Forming | RunState::Resizing => {
                self.release_members();
                let message = "the coordinator was started again";
                self.enter(RunState::Resizing, RunReason::CoordinatorRestarted, message, None);
            }
            RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
    }

    fn await_members(&mut self) {
        // Nobody knows yet whether who is about to leave could come back.
        let mut others = std::mem::take(&mut self.record.joining);
        others.append(&mut self.record.leaving);
        for trainer in others {
            self.changed = true;
            self.stop(trainer);
        }
        let members = self.record.members.iter();
        self.observed.awaited = members.map(|member| member.trainer.incarnation.clone()).collect();
        self.observed.holders = self.observed.awaited.clone();
        self.observed.reattach_deadline_ms = Some(self.now.steady_ms + self.policy.reattach_timeout_ms);
    }

    /// Takes those for lost who have not come back to a new leader in time; whether there were any.
    pub(super) fn give_up_awaited(&mut self) -> bool {
        if self.observed.awaited.is_empty()
            || self.observed.reattach_deadline_ms.is_none_or(|end| self.now.steady_ms < end)
        {
            return false;
        }
        let awaited = std::mem::take(&mut self.observed.awaited);
        let is_late = |member: &Member| awaited.contains(&member.trainer.incarnation);
        let late: Vec<FreeSlot> =
            self.record.members.iter().filter(|member| is_late(member)).map(|member| member.trainer.place()).collect();
        let message =
            format!("trainer(s) on {} did not come back to the new coordinator in time", some_of(late.iter()));
        self.record.members.retain(|member| !is_late(member));
        self.lose_taken_over(message);
        true
    }

    /// A member of a gang that was taken over is not there any more. It does not count as the run's failure (RUN-7).
    pub(super) fn lose_taken_over(&mut self, message: String) {
        self.changed = true;
        match self.record.state {
            RunState::Preempting => self.yielded(&message),
            RunState::Admitted | RunState::Forming | RunState::Running => {
                if self.waits_for_word(Fault::Other, RunReason::CoordinatorRestarted, &message)
                    || self.keep_members(&[], RunReason::CoordinatorRestarted, &message)
                {
                    return;
                }
                self.stop_members();
                let timeout = Some(self.policy.stop_timeout_ms);
                self.enter(RunState::Resizing, RunReason::CoordinatorRestarted, message, timeout);
            }
            RunState::Suspending => {
                self.release_members();
                let message = format!("suspended from the last checkpoint: {message}");
                self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
            }
            // The others are kept, and wait for more all the same.
            RunState::Resizing => {
                if self.record.members.is_empty() {
                    self.observed.kept = false;
                    self.record.carries = false;
                }
            }
            // Nobody is awaited in these.
            RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
    }
}
