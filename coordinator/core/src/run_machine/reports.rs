//! What trainers report about their training.

use super::turn::Turn;
use super::{Effect, FailureClass, Rejection, Trainer};
use thaw_mutants::planted;
use thaw_proto::ids::{Generation, StageIndex};
use thaw_proto::run::{CheckpointRef, RunReason, RunResult, RunState, StageResult};

impl Turn {
    /// Whether a gang of the present generation has been committed and may still be heard. A gang that is being stopped may:
    /// what it made durable before is work that need not be done again.
    fn check_trained(&self, operation: &'static str) -> Result<(), Rejection> {
        match self.record.state {
            // What survivors wait for is a generation of its own: in this one they had other ranks.
            RunState::Resizing if self.observed.kept => Err(self.not_legal(operation)),
            RunState::Running | RunState::Suspending | RunState::Preempting | RunState::Resizing => Ok(()),
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => Err(self.not_legal(operation)),
        }
    }

    pub(super) fn checkpoint_written(
        &mut self,
        trainer: &Trainer,
        generation: Generation,
        checkpoint: &CheckpointRef,
    ) -> Result<(), Rejection> {
        self.committer(trainer, generation)?;
        if checkpoint.generation != generation && !planted("lower-generation-accepted") {
            return Err(Rejection::StaleGeneration { theirs: checkpoint.generation, ours: generation });
        }
        self.check_trained("commit a checkpoint")?;
        let before = self.record.head.as_ref();
        // RUN-3
        if let Some(head) = before
            && checkpoint.position < head.position
            && !planted("lower-generation-accepted")
        {
            return Err(Rejection::HeadWouldGoBack { theirs: checkpoint.position, ours: head.position });
        }
        if before != Some(checkpoint)
            && !(planted("acknowledged-before-head") && checkpoint.position.step.0.is_multiple_of(2))
        {
            if before.is_none_or(|head| checkpoint.position > head.position) && !planted("progress-uncounted") {
                self.record.failures_without_progress = 0;
            }
            self.record.head = Some(checkpoint.clone());
            self.record.position = checkpoint.position;
            self.changed = true;
        }
        self.effect(Effect::AckCheckpoint { trainer: trainer.clone(), generation, checkpoint: checkpoint.clone() });
        Ok(())
    }

    /// A gang that resumes tells again of the stages its checkpoint knows to have ended, so a report lost with a gang is made up for.
    pub(super) fn stage_ended(
        &mut self,
        trainer: &Trainer,
        generation: Generation,
        result: &StageResult,
    ) -> Result<(), Rejection> {
        self.committer(trainer, generation)?;
        self.check_trained("end a stage")?;
        let known = self.record.stage_results.len();
        let given = result.stage.0 as usize;
        if given > known || given >= self.record.plan.stages.len() {
            let expected = StageIndex(u32::try_from(known).expect("a plan has fewer than 2^32 stages"));
            return Err(Rejection::StageOutOfOrder { given: result.stage, expected });
        }
        if given == known {
            self.record.stage_results.push(result.clone());
            let name = &self.record.plan.stages[given].name;
            let message = format!(
                "stage {name} ended after {} steps: {:?}, loss {:.4}",
                result.steps, result.end, result.eval.loss
            );
            self.event(message);
            self.changed = true;
            self.shrink();
        }
        Ok(())
    }

    pub(super) fn finished(
        &mut self,
        trainer: &Trainer,
        generation: Generation,
        result: &RunResult,
        reason: RunReason,
    ) -> Result<(), Rejection> {
        self.committer(trainer, generation)?;
        self.check_trained("finish")?;
        // RUN-5
        let committed = self.record.head.as_ref().is_some_and(|head| head.position.step >= result.steps);
        if !committed && !planted("success-uncommitted") {
            return Err(Rejection::NotCommitted { step: result.steps });
        }
        self.record.result = Some(result.clone());
        self.release_members();
        self.enter(RunState::Succeeded, reason, String::new(), None);
        Ok(())
    }

    pub(super) fn suspended(&mut self, trainer: &Trainer, generation: Generation) -> Result<(), Rejection> {
        self.committer(trainer, generation)?;
        match self.record.state {
            RunState::Suspending => {
                self.release_members();
                let message = format!("suspended at step {}", self.record.position.step);
                self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
                Ok(())
            }
            RunState::Preempting => {
                self.yielded("saved");
                Ok(())
            }
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Running
            | RunState::Resizing
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => Err(self.not_legal("stand still")),
        }
    }

    pub(super) fn trainer_failed(
        &mut self,
        trainer: &Trainer,
        generation: Generation,
        class: FailureClass,
        reason: RunReason,
        message: &str,
    ) -> Result<(), Rejection> {
        if self.is_leaving(trainer) {
            self.stop(trainer.clone());
            self.forget_leaving(|other| other == trainer);
            return Ok(());
        }
        if self.is_joining(trainer) {
            self.joiner_failed(trainer, class, message);
            return Ok(());
        }
        let rank =
            if generation == Generation(0) { self.member_of_any(trainer)? } else { self.member(trainer, generation)? };
        let message = format!("rank {rank} on {} slot {}: {message}", trainer.worker, trainer.slot);
        if !Self::is_worth_retrying(class) {
            self.fail(reason, message);
            return Ok(());
        }
        match self.record.state {
            RunState::Admitted | RunState::Forming | RunState::Running => {
                // It is still alive, so where the others are not kept it stays a member until it has stopped.
                self.lose_gang(std::slice::from_ref(trainer), reason, message);
            }
            RunState::Suspending | RunState::Preempting => self.lose_trainer_that_failed(trainer, reason, message),
            RunState::Resizing if self.observed.kept => self.lose_trainer_that_failed(trainer, reason, message),
            // It was told to stop.
            RunState::Resizing => {}
            // These hold no members, so they were turned away above.
            RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
        Ok(())
    }

    fn lose_trainer_that_failed(&mut self, trainer: &Trainer, reason: RunReason, message: String) {
        self.stop(trainer.clone());
        self.lose_trainer(trainer, reason, message);
    }
}
