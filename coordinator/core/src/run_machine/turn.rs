//! One step in the making: the record as it will be, and what is to be done and told.

use super::verdicts::Fault;
use super::{Effect, Event, FailureClass, Now, Observed, Outcome, Policy, Rejection, RunRecord, Trainer};
use thaw_mutants::planted;
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::run::{RunReason, RunState};

#[derive(Debug)]
pub(super) struct Turn {
    pub(super) policy: Policy,
    pub(super) now: Now,
    pub(super) record: RunRecord,
    pub(super) changed: bool,
    pub(super) observed: Observed,
    effects: Vec<Effect>,
    events: Vec<Event>,
}

impl Turn {
    pub(super) fn new(policy: Policy, record: &RunRecord, observed: Observed, now: Now) -> Self {
        Self { policy, now, record: record.clone(), changed: false, observed, effects: Vec::new(), events: Vec::new() }
    }

    pub(super) fn outcome(self) -> Outcome {
        Outcome {
            record: self.record,
            changed: self.changed,
            observed: self.observed,
            effects: self.effects,
            events: self.events,
        }
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(super) fn event(&mut self, message: impl Into<String>) {
        self.events.push(Event {
            at_ms: self.now.unix_ms,
            generation: self.record.generation,
            state: self.record.state,
            reason: self.record.reason,
            message: message.into(),
        });
    }

    /// Enters a state, with a new wait of `timeout_ms` where there is one.
    pub(super) fn enter(
        &mut self,
        state: RunState,
        reason: RunReason,
        message: impl Into<String>,
        timeout_ms: Option<u64>,
    ) {
        self.changed = true;
        self.record.state = state;
        self.record.reason = reason;
        self.record.message = message.into();
        self.observed.deadline_ms = timeout_ms.map(|timeout| self.now.steady_ms + timeout);
        self.observed.gathering_since_ms = None;
        self.observed.kept = false;
        self.observed.broken = None;
        self.record.suspends_next &= state != RunState::Suspended && !state.has_ended();
        if state.has_ended() {
            self.record.end_ms = Some(self.now.unix_ms);
        }
        self.event(self.record.message.clone());
    }

    /// Whether the present wait is over; arms it where a new leader has yet to.
    pub(super) fn deadline_passed(&mut self, timeout_ms: u64) -> bool {
        let now = self.now.steady_ms;
        now >= *self.observed.deadline_ms.get_or_insert(now + timeout_ms)
    }

    pub(super) fn stop(&mut self, trainer: Trainer) {
        if !planted("abort-forgotten") {
            self.effect(Effect::StopTrainer { trainer, generation: self.record.generation });
        }
    }

    /// Tells every member to stop, and keeps them in the record; those that were to join or leave are told and forgotten.
    pub(super) fn stop_members(&mut self) {
        let trainers: Vec<Trainer> = self.record.trainers().cloned().collect();
        for trainer in trainers {
            self.stop(trainer);
        }
        self.changed |= !self.record.joining.is_empty() || !self.record.leaving.is_empty() || self.record.carries;
        self.record.joining.clear();
        self.record.leaving.clear();
        self.record.carries = false;
        self.observed.addresses.clear();
        self.observed.keepers.clear();
        self.observed.built.clear();
        self.observed.awaited.clear();
    }

    /// Tells every member to stop, and forgets them: who is still seen later is told again (RUN-8).
    pub(super) fn release_members(&mut self) {
        self.stop_members();
        self.changed |= !self.record.members.is_empty();
        self.record.members.clear();
    }

    /// The gang is over, which counts (RUN-7).
    pub(super) fn lose_gang(&mut self, gone: &[Trainer], fault: Fault, reason: RunReason, message: String) {
        if self.waits_for_word(fault, reason, &message) {
            return;
        }
        self.count_failure(fault);
        self.end_gang(gone, reason, message);
    }

    /// Whether survivors that are lost now are so by what was counted a moment ago.
    fn is_of_last_failure(&self) -> bool {
        let until = self.observed.failed_ms.map(|failed| failed + self.policy.broken_timeout_ms);
        self.record.carries && until.is_some_and(|until| self.now.steady_ms < until)
    }

    /// What is left of the gang without `gone` goes on as the next one where it can (RUN-10); else its members stop, and a new one is chosen
    /// once they have (RUN-6), or the run has failed (RUN-7).
    pub(super) fn end_gang(&mut self, gone: &[Trainer], reason: RunReason, message: String) {
        if self.give_up(&message) || self.keep_members(gone, reason, &message) {
            return;
        }
        self.stop_members();
        let wait = self.observed.restart_ms.saturating_sub(self.now.steady_ms);
        let wait = if wait > 0 { format!("; it starts again after {wait} ms") } else { String::new() };
        let message = format!("{message}{wait}");
        self.enter(RunState::Resizing, reason, message, Some(self.policy.stop_timeout_ms));
    }

    /// [`Turn::lose_trainers`] of one.
    pub(super) fn lose_trainer(&mut self, trainer: &Trainer, fault: Fault, reason: RunReason, message: String) {
        self.lose_trainers(std::slice::from_ref(trainer), fault, reason, message);
    }

    /// Trainers are gone at once. What that means depends on what the run was doing.
    pub(super) fn lose_trainers(&mut self, lost: &[Trainer], fault: Fault, reason: RunReason, message: String) {
        if !lost.iter().any(|trainer| self.record.member(trainer).is_some()) {
            return;
        }
        self.record.members.retain(|member| !lost.contains(&member.trainer));
        self.changed = true;
        self.observed.awaited.retain(|awaited| lost.iter().all(|trainer| trainer.incarnation != *awaited));
        match self.record.state {
            // One fault can end several trainers, and each is heard of by itself.
            RunState::Admitted | RunState::Forming if self.is_of_last_failure() => {
                self.amend_failure(fault);
                self.end_gang(&[], reason, message);
            }
            RunState::Admitted | RunState::Forming | RunState::Running => self.lose_gang(&[], fault, reason, message),
            RunState::Preempting => self.yielded(&message),
            RunState::Suspending => {
                self.release_members();
                let message = format!("suspended from the last checkpoint: {message}");
                self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
            }
            // It was told to stop, or others are waited for anyway. Where it has not ended by that it may be what ended the gang.
            RunState::Resizing => {
                if self.amend_failure(fault) && self.give_up(&message) {
                    return;
                }
                if self.record.members.is_empty() {
                    self.observed.kept = false;
                    self.record.carries = false;
                }
            }
            // These hold no members.
            RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
    }

    pub(super) fn fail(&mut self, reason: RunReason, message: String) {
        self.release_members();
        self.enter(RunState::Failed, reason, message, None);
    }

    /// Rank of a trainer of the present generation (RUN-2).
    pub(super) fn member(&self, trainer: &Trainer, generation: Generation) -> Result<Rank, Rejection> {
        let ours = self.record.generation;
        if generation != ours && !planted("lower-generation-accepted") {
            return Err(Rejection::StaleGeneration { theirs: generation, ours });
        }
        self.member_of_any(trainer)
    }

    /// Rank of a trainer that may not have been told its generation yet.
    pub(super) fn member_of_any(&self, trainer: &Trainer) -> Result<Rank, Rejection> {
        if self.record.state.has_ended() {
            return Err(Rejection::AlreadyEnded { state: self.record.state });
        }
        if planted("lower-generation-accepted") {
            return Ok(Rank(0));
        }
        self.record.member(trainer).map(|member| member.rank).ok_or_else(|| Rejection::UnknownTrainer {
            incarnation: trainer.incarnation.clone(),
            generation: self.record.generation,
        })
    }

    /// [`Turn::member`], for what only rank 0 may say.
    pub(super) fn committer(&self, trainer: &Trainer, generation: Generation) -> Result<(), Rejection> {
        match self.member(trainer, generation)? {
            Rank(0) => Ok(()),
            _ if planted("two-ranks-commit") => Ok(()),
            rank => Err(Rejection::NotCommitter { rank }),
        }
    }

    pub(super) fn not_legal(&self, operation: &'static str) -> Rejection {
        let state = self.record.state;
        if state.has_ended() { Rejection::AlreadyEnded { state } } else { Rejection::NotLegal { operation, state } }
    }

    /// Whether trying again may help.
    pub(super) fn is_worth_retrying(class: FailureClass) -> bool {
        match class {
            // A trainer that believes itself fenced while it is of the present generation has heard wrong, and has stopped.
            FailureClass::Retry | FailureClass::Fenced => true,
            FailureClass::Invalid | FailureClass::Fatal => false,
        }
    }
}
