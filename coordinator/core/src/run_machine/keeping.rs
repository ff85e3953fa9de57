//! Gangs that break and go on: survivors are kept, and what was lost joins them later (RUN-10).

use super::record::Broken;
use super::turn::Turn;
use super::verdicts::{Fault, fault_of};
use super::{Effect, FailureClass, Member, Rejection, Trainer};
use crate::culprit::Judgement;
use crate::gang::FreeSlot;
use std::collections::BTreeSet;
use thaw_proto::ids::{Generation, Incarnation, Rank, Step};
use thaw_proto::run::{RunReason, RunState};

impl Turn {
    /// What is left of a gang without `gone` becomes the next one, or waits for what it needs; false where it cannot be kept.
    pub(super) fn keep_members(&mut self, gone: &[Trainer], reason: RunReason, message: &str) -> bool {
        let starting = match self.record.state {
            RunState::Admitted => true,
            RunState::Forming | RunState::Running => false,
            RunState::Pending
            | RunState::Resizing
            | RunState::Suspending
            | RunState::Suspended
            | RunState::Preempting
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => return false,
        };
        let observed = &self.observed;
        // One that is starting is in no gang that it could fail to survive.
        let is_starting = |one: &Incarnation| starting && !observed.addresses.contains_key(one);
        let survives = |one: &Incarnation| observed.keepers.contains(one) || is_starting(one);
        let members = self.record.members.iter().map(|member| &member.trainer);
        let mut left = members.chain(&self.record.leaving).filter(|one| !gone.contains(one));
        if left.clone().next().is_none()
            || thaw_mutants::planted("survivors-stopped")
            || !left.all(|trainer| survives(&trainer.incarnation))
        {
            return false;
        }
        for trainer in gone {
            self.stop(trainer.clone());
        }
        self.record.carries = true;
        self.changed = true;
        self.record.members.retain(|member| !gone.contains(&member.trainer));
        self.take_leaving();
        self.take_joiners(true);
        if !self.is_enough() {
            // Who is starting may be what is missing: as a member it is waited for.
            self.take_joiners(false);
        }
        if self.is_enough() {
            self.next_generation(reason, message.to_owned());
            return true;
        }
        self.rank_members();
        self.observed.built.clear();
        self.observed.awaited.clear();
        self.enter(RunState::Resizing, reason, message, Some(self.policy.keep_timeout_ms));
        self.observed.kept = true;
        true
    }

    pub(super) fn is_enough(&self) -> bool {
        self.record.members.len() >= self.record.spec.workers.min as usize
    }

    /// Takes the next generation (RUN-1) with the present members: at once where all listen.
    pub(super) fn next_generation(&mut self, reason: RunReason, message: String) {
        self.changed = true;
        if self.record.generation.0 == 0 || !thaw_mutants::planted("generation-reused") {
            self.record.generation = self.record.generation.next();
        }
        if self.record.joining.is_empty() {
            self.observed.join_ms = self.observed.restart_ms.max(self.now.steady_ms);
        }
        // What they were to copy they may not have.
        for one in std::mem::take(&mut self.observed.copying) {
            self.observed.holders.remove(&one);
        }
        self.leave_out_surplus();
        self.rank_members();
        self.observed.built.clear();
        self.observed.awaited.clear();
        if !self.propose_if_ready(reason, &message) {
            self.enter(RunState::Admitted, reason, message, Some(self.policy.start_timeout_ms));
        }
    }

    /// Ranks by place, so that those of a worker are neighbours (GANG-3).
    fn rank_members(&mut self) {
        self.record.members.sort_by(|one, other| one.trainer.cmp(&other.trainer));
        for (rank, member) in (0..).zip(&mut self.record.members) {
            member.rank = Rank(rank);
        }
    }

    /// Those that are to join become members: all of them, or only those that listen.
    fn take_joiners(&mut self, only_ready: bool) {
        for trainer in std::mem::take(&mut self.record.joining) {
            if only_ready && !self.observed.addresses.contains_key(&trainer.incarnation) {
                self.record.joining.push(trainer);
            } else {
                self.record.members.push(Member { rank: Rank(0), trainer });
            }
        }
    }

    /// Starts trainers that will join the gang that trains.
    pub(super) fn start_joiners(&mut self, places: &[FreeSlot], fresh: &[Incarnation]) -> Result<(), Rejection> {
        if fresh.len() < places.len() {
            return Err(Rejection::TooFewIncarnations { needed: places.len(), given: fresh.len() });
        }
        let generation = self.record.generation;
        for (place, incarnation) in places.iter().zip(fresh) {
            let trainer = Trainer { worker: place.worker.clone(), slot: place.slot, incarnation: incarnation.clone() };
            self.record.joining.push(trainer.clone());
            self.effect(Effect::StartTrainer { trainer, generation });
        }
        self.changed = true;
        self.observed.join_ms = self.now.steady_ms + self.policy.start_timeout_ms;
        self.event(format!("starting {} trainer(s) to join", places.len()));
        Ok(())
    }

    pub(super) fn is_joining(&self, trainer: &Trainer) -> bool {
        self.record.joining.contains(trainer)
    }

    /// Once all that are to join listen, or their time is over, a generation begins that has those that do.
    pub(super) fn join_if_ready(&mut self) {
        let listens = |trainer: &Trainer| self.observed.addresses.contains_key(&trainer.incarnation);
        let ready = self.record.joining.iter().filter(|trainer| listens(trainer)).count();
        let late = self.now.steady_ms >= self.observed.join_ms;
        if self.record.joining.is_empty() || (ready < self.record.joining.len() && !late) {
            return;
        }
        self.take_joiners(true);
        for trainer in std::mem::take(&mut self.record.joining) {
            self.changed = true;
            self.observed.avoid.insert(trainer.place());
            self.stop(trainer);
        }
        if ready > 0 {
            let grows = self.record.members.len() > self.record.whole as usize;
            let reason = if grows { RunReason::Scaled } else { RunReason::Starting };
            self.record.carries = true;
            self.next_generation(reason, format!("{ready} trainer(s) join"));
        } else {
            self.join_later();
        }
    }

    /// Others are started in place of those that did not join, once a while has passed (RUN-13).
    fn join_later(&mut self) {
        self.observed.joiners_lost += 1;
        self.observed.join_ms =
            self.now.steady_ms + self.backoff_ms(self.policy.rejoin_wait_ms, self.observed.joiners_lost);
    }

    /// A trainer that was to join is gone; the gang trains on without it.
    pub(super) fn lose_joiner(&mut self, trainer: &Trainer, message: &str) {
        self.forget_joiners(std::slice::from_ref(trainer), message);
        self.join_without();
    }

    /// Trainers that were to join are gone. What that means to the others is for the caller, who may know of members that are gone too.
    pub(super) fn forget_joiners(&mut self, gone: &[Trainer], message: &str) {
        if gone.is_empty() {
            return;
        }
        self.changed = true;
        self.record.joining.retain(|trainer| !gone.contains(trainer));
        for _ in gone {
            self.event(format!("a trainer that was to join is lost: {message}"));
        }
        if self.record.joining.is_empty() {
            self.join_later();
        }
    }

    /// Those that are left of the joiners may be all that were waited for.
    pub(super) fn join_without(&mut self) {
        if self.record.state == RunState::Running {
            self.join_if_ready();
        }
    }

    pub(super) fn trainer_interrupted(
        &mut self,
        trainer: &Trainer,
        generation: Generation,
        message: &str,
    ) -> Result<(), Rejection> {
        let rank = self.member(trainer, generation)?;
        match self.record.state {
            RunState::Forming | RunState::Running => {
                if self.observed.broken.is_none() {
                    let message = format!("rank {rank} on {} slot {}: {message}", trainer.worker, trainer.slot);
                    let at_ms = self.now.steady_ms + self.policy.broken_timeout_ms;
                    let (fault, reason) = (Fault::Other, RunReason::TrainerLost);
                    self.observed.broken = Some(Broken { at_ms, fault, reason, message });
                }
                Ok(())
            }
            RunState::Suspending => {
                self.release_members();
                let message = format!("suspended from the last checkpoint: {message}");
                self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
                Ok(())
            }
            RunState::Preempting => {
                self.yielded(message);
                Ok(())
            }
            // It has yet to be proposed another gang, or is being stopped.
            RunState::Admitted | RunState::Resizing => Ok(()),
            RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {
                Err(self.not_legal("be interrupted"))
            }
        }
    }

    /// A leader that has just taken a gang over does not know who of it survives: it goes on once all have said that they listen, or their
    /// time is over.
    pub(super) fn waits_for_word(&mut self, fault: Fault, reason: RunReason, message: &str) -> bool {
        let Some(at_ms) = self.observed.reattach_deadline_ms.filter(|at_ms| self.now.steady_ms < *at_ms) else {
            return false;
        };
        if self.record.members.is_empty() || self.all_listen() {
            return false;
        }
        let told = || Broken { at_ms, fault, reason, message: message.to_owned() };
        self.observed.broken.get_or_insert_with(told).at_ms = at_ms;
        true
    }

    fn all_listen(&self) -> bool {
        self.observed.addresses.len() >= self.record.members.len()
            && self
                .record
                .members
                .iter()
                .all(|member| self.observed.addresses.contains_key(&member.trainer.incarnation))
    }

    /// Goes on with what [`Turn::waits_for_word`] has put off, where nothing is missing any more.
    pub(super) fn heard_from_all(&mut self) {
        if self.observed.awaited.is_empty() && self.observed.reattach_deadline_ms.is_some() && self.all_listen() {
            if let Some(broken) = &mut self.observed.broken {
                broken.at_ms = self.now.steady_ms;
            }
            self.mend_broken();
        }
    }

    /// Forms a gang again that says it is broken, where nobody was lost; whether it did.
    pub(super) fn mend_broken(&mut self) -> bool {
        let Some(broken) = self.observed.broken.take_if(|broken| self.now.steady_ms >= broken.at_ms) else {
            return false;
        };
        match broken.reason {
            RunReason::CoordinatorRestarted => self.lose_taken_over(broken.message),
            reason => {
                self.ask_for_culprit();
                let slow = self.copiers();
                self.observed.avoid.extend(slow.iter().map(Trainer::place));
                self.lose_gang(&slow, broken.fault, reason, broken.message);
                if !slow.is_empty() && self.record.joining.is_empty() {
                    self.join_later();
                }
            }
        }
        true
    }

    /// All members of a gang that is committed hold a state, as soon as those that are new in it have copied it.
    pub(super) fn note_holders(&mut self) {
        let members = self.record.members.iter().map(|member| member.trainer.incarnation.clone());
        let (holding, new): (BTreeSet<_>, BTreeSet<_>) =
            members.clone().partition(|one| self.observed.holders.contains(one));
        // Where nobody holds one all of them load the head.
        let copying = if self.record.carries && !holding.is_empty() { new } else { BTreeSet::new() };
        self.observed.holders = members.collect();
        self.observed.copying = copying;
    }

    /// Members that copy a state from others, where the others are enough without them.
    fn copiers(&self) -> Vec<Trainer> {
        let members = self.record.members.iter().map(|member| &member.trainer);
        let copiers: Vec<Trainer> = members.filter(|one| self.is_copying(one)).cloned().collect();
        let others = self.record.members.len() - copiers.len();
        if others >= self.record.spec.workers.min.max(1) as usize { copiers } else { Vec::new() }
    }

    pub(super) fn is_copying(&self, trainer: &Trainer) -> bool {
        self.record.state.is_training() && self.observed.copying.contains(&trainer.incarnation)
    }

    /// The gang has made a step, so who was new in it has what the others have.
    pub(super) fn settle(&mut self) {
        if !std::mem::take(&mut self.observed.copying).is_empty() {
            self.observed.joiners_lost = 0;
        }
    }

    /// The present generation is about to be lost, and none of its trainers has ended.
    pub(super) fn ask_for_culprit(&mut self) {
        self.observed.unexplained = Some(self.record.generation);
    }

    /// Tells whom a lost generation waited for, and goes on without one that is stuck for certain (CULPRIT-4).
    pub(super) fn culprit_found(&mut self, judgement: &Judgement) {
        if self.observed.unexplained.take_if(|lost| *lost == judgement.generation).is_none()
            || self.record.state.has_ended()
        {
            return;
        }
        self.event(judgement.to_string());
        if let Some(stuck) = judgement.stuck() {
            let (trainer, seconds) = (stuck.trainer.clone(), stuck.still.as_secs());
            let place = format!("{} slot {}", trainer.worker, trainer.slot);
            self.leave_out_stuck(
                &trainer,
                format!("the trainer on {place} is stuck: it had not moved for {seconds} s"),
            );
        }
    }

    /// The loss it has caused is counted already.
    fn leave_out_stuck(&mut self, trainer: &Trainer, message: String) {
        // One that has built the next gang, or trains in it, moves again.
        let waits = match self.record.state {
            RunState::Admitted | RunState::Forming | RunState::Resizing => true,
            RunState::Pending
            | RunState::Running
            | RunState::Suspending
            | RunState::Suspended
            | RunState::Preempting
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => false,
        };
        if !waits || self.record.member(trainer).is_none() || self.observed.built.contains(&trainer.incarnation) {
            return;
        }
        self.judge(trainer, Fault::Place);
        if self.record.state != RunState::Resizing {
            self.end_gang(std::slice::from_ref(trainer), RunReason::TrainerHung, message);
        } else if self.observed.kept {
            self.stop(trainer.clone());
            self.lose_trainer(trainer, Fault::Place, RunReason::TrainerHung, message);
        }
    }

    /// RUN-7: a step beyond where the last gang was lost is progress.
    pub(super) fn progressed(&mut self, generation: Generation, step: Step) {
        if generation != self.record.generation || self.record.state != RunState::Running {
            return;
        }
        self.settle();
        self.observed.step = self.observed.step.max(step);
        if step > self.record.lost_at {
            self.made_progress();
        }
    }

    /// A trainer that was to join says that it cannot.
    pub(super) fn joiner_failed(&mut self, trainer: &Trainer, class: FailureClass, reason: RunReason, message: &str) {
        self.judge(trainer, fault_of(class, reason));
        match class {
            FailureClass::Retry | FailureClass::Fenced => {}
            // The others train with the same spec and data, so it is this place that is at fault.
            FailureClass::Invalid | FailureClass::Fatal => drop(self.observed.avoid.insert(trainer.place())),
        }
        self.stop(trainer.clone());
        self.lose_joiner(trainer, message);
    }
}
