//! How gangs come and go: slots, starting, forming, loss.

use super::turn::Turn;
use super::verdicts::{Ending, Fault};
use super::{Effect, Member, Proposal, Rejection, RunRecord, Trainer, gang_key};
use crate::gang::FreeSlot;
use crate::quarantine::Resting;
use crate::scheduler::{Reason, Verdict};
use std::collections::BTreeSet;
use thaw_mutants::planted;
use thaw_proto::ids::{Attempt, Generation, Incarnation, Rank, WorkerName};
use thaw_proto::peers::Peers;
use thaw_proto::run::{RunReason, RunState};

impl Turn {
    pub(super) fn tick(
        &mut self,
        slots: Option<&Verdict>,
        fresh: &[Incarnation],
        resting: Option<Resting>,
    ) -> Result<(), Rejection> {
        if self.give_up_awaited() || self.mend_broken() {
            return Ok(());
        }
        match self.record.state {
            RunState::Pending => self.try_start_gang(slots, fresh, resting)?,
            RunState::Resizing if self.observed.kept => {
                if self.deadline_passed(self.policy.keep_timeout_ms) {
                    self.observed.kept = false;
                    self.stop_members();
                    let message = "the trainers that were left are stopped: too few others have come";
                    self.enter(
                        RunState::Resizing,
                        RunReason::WaitingForWorkers,
                        message,
                        Some(self.policy.stop_timeout_ms),
                    );
                } else {
                    self.try_start_gang(slots, fresh, resting)?;
                }
            }
            RunState::Resizing => {
                let live = !self.record.members.is_empty() && !planted("members-not-awaited");
                if live && !self.deadline_passed(self.policy.stop_timeout_ms) {
                    return Ok(());
                }
                // Who has not stopped by now is on a worker that cannot be reached; its generation keeps it out (RUN-2).
                self.changed |= !self.record.members.is_empty();
                self.record.members.clear();
                self.try_start_gang(slots, fresh, resting)?;
            }
            RunState::Admitted => {
                if self.deadline_passed(self.policy.start_timeout_ms) {
                    self.time_out("did not start");
                }
            }
            RunState::Forming => {
                if self.deadline_passed(self.policy.forming_timeout_ms) {
                    self.time_out("did not join the gang");
                }
            }
            RunState::Suspending => {
                if self.deadline_passed(self.policy.suspend_timeout_ms) {
                    self.release_members();
                    let message = "suspended from the last checkpoint: the gang did not save in time";
                    self.enter(RunState::Suspended, RunReason::UserRequest, message, None);
                }
            }
            RunState::Running => {
                if self.shrink() {
                    return Ok(());
                }
                match slots {
                    Some(Verdict::Granted(places)) if self.record.joining.is_empty() => {
                        if !self.gathers(places.len()) {
                            self.start_joiners(places, fresh)?;
                        }
                    }
                    Some(_) | None => self.observed.gathering_since_ms = None,
                }
                self.join_if_ready();
            }
            RunState::Preempting => {
                if self.deadline_passed(self.policy.suspend_timeout_ms) {
                    self.yielded("the gang did not save in time");
                }
            }
            RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
        Ok(())
    }

    fn try_start_gang(
        &mut self,
        slots: Option<&Verdict>,
        fresh: &[Incarnation],
        resting: Option<Resting>,
    ) -> Result<(), Rejection> {
        let places = match slots {
            None => return Ok(()),
            Some(Verdict::Waits { reason, .. }) => {
                self.observed.gathering_since_ms = None;
                self.wait_for_slots(reason, resting);
                return Ok(());
            }
            Some(Verdict::Granted(places)) => places,
        };
        if !self.observed.kept && self.gathers(places.len()) {
            return Ok(());
        }
        if fresh.len() < places.len() {
            return Err(Rejection::TooFewIncarnations { needed: places.len(), given: fresh.len() });
        }
        self.start_gang(places.clone(), fresh);
        Ok(())
    }

    /// Records why, and nothing that changes while the reason does not: a long queue must not fill the store.
    fn wait_for_slots(&mut self, reason: &Reason, resting: Option<Resting>) {
        let (reason, message) = waits_for(&self.record, reason, resting);
        if self.record.reason != reason || self.record.message != message {
            self.changed = true;
            self.record.reason = reason;
            self.record.message.clone_from(&message);
            self.event(message);
        }
    }

    /// Takes the next generation (RUN-1) and starts its trainers, beside those that are kept.
    fn start_gang(&mut self, places: Vec<FreeSlot>, fresh: &[Incarnation]) {
        if self.record.attempt == Attempt(0) {
            self.record.attempt = Attempt(1);
        }
        if self.record.state == RunState::Pending {
            self.record.placed_ms = self.now.unix_ms;
        }
        let trainers = places.into_iter().zip(fresh).map(|(place, incarnation)| Trainer {
            worker: place.worker,
            slot: place.slot,
            incarnation: incarnation.clone(),
        });
        let started: Vec<Trainer> = trainers.collect();
        if !self.observed.kept {
            self.record.members.clear();
            self.observed.addresses.clear();
            self.observed.keepers.clear();
            self.record.carries = false;
        }
        let members = started.iter().map(|trainer| Member { rank: Rank(0), trainer: trainer.clone() });
        self.record.members.extend(members);
        let message = format!("starting {} trainer(s)", started.len());
        self.next_generation(RunReason::Starting, message);
        let generation = self.record.generation;
        for trainer in started {
            self.effect(Effect::StartTrainer { trainer, generation });
        }
    }

    pub(super) fn trainer_ready(&mut self, trainer: &Trainer, address: &str, keeps: bool) -> Result<(), Rejection> {
        if !self.is_joining(trainer) {
            self.member_of_any(trainer)?;
        }
        let note = |turn: &mut Self| {
            turn.observed.addresses.insert(trainer.incarnation.clone(), address.to_owned());
            if keeps {
                turn.observed.keepers.insert(trainer.incarnation.clone());
            }
        };
        match self.record.state {
            RunState::Admitted => {
                note(self);
                // A loss that was put off until all that are left listen may end this gang.
                self.heard_from_all();
                if self.record.state != RunState::Admitted {
                    return Ok(());
                }
            }
            RunState::Resizing if self.observed.kept => {
                note(self);
                return Ok(());
            }
            RunState::Running if self.is_joining(trainer) => {
                note(self);
                self.join_if_ready();
                return Ok(());
            }
            // Said twice, or to the leader before; or by one that joins later.
            RunState::Forming | RunState::Running => {
                note(self);
                self.heard_from_all();
                return Ok(());
            }
            RunState::Suspending | RunState::Preempting => {
                note(self);
                return Ok(());
            }
            RunState::Pending
            | RunState::Resizing
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => return Err(self.not_legal("take a trainer in")),
        }
        self.propose_if_ready(RunReason::Starting, "");
        Ok(())
    }

    /// Proposes the present generation's gang, once all its members listen. `why`: what has led to it, or nothing.
    pub(super) fn propose_if_ready(&mut self, reason: RunReason, why: &str) -> bool {
        // Of a large gang it is asked each time that one more listens. Too few may be left where a loss is put off (RUN-11).
        if self.observed.addresses.len() < self.record.members.len() || !self.is_enough() {
            return false;
        }
        let address = |member: &Member| self.observed.addresses.get(&member.trainer.incarnation);
        let Some(addresses) = self.record.members.iter().map(address).collect::<Option<Peers>>() else {
            return false;
        };
        let key = gang_key(&self.record);
        for member in self.record.members.clone() {
            self.effect(Effect::Propose(Box::new(Proposal {
                trainer: member.trainer,
                generation: self.record.generation,
                rank: member.rank,
                addresses: addresses.clone(),
                key,
                resume: self.record.head.clone().filter(|_| !planted("resume-from-nothing")),
            })));
        }
        let separator = if why.is_empty() { "" } else { "; " };
        let message = format!("{why}{separator}{} trainer(s) build their communicator", addresses.len());
        self.enter(RunState::Forming, reason, message, Some(self.policy.forming_timeout_ms));
        true
    }

    pub(super) fn gang_built(&mut self, trainer: &Trainer, generation: Generation) -> Result<(), Rejection> {
        self.member(trainer, generation)?;
        match self.record.state {
            RunState::Forming => {}
            // Said twice: perhaps it has not heard the answer.
            RunState::Running | RunState::Suspending | RunState::Preempting => {
                self.effect(Effect::Commit { trainer: trainer.clone(), generation });
                return Ok(());
            }
            RunState::Pending
            | RunState::Admitted
            | RunState::Resizing
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => return Err(self.not_legal("commit a gang")),
        }
        self.observed.built.insert(trainer.incarnation.clone());
        let has_built = |member: &Member| self.observed.built.contains(&member.trainer.incarnation);
        let count = self.observed.built.len();
        let all = count >= self.record.members.len() && self.record.members.iter().all(has_built);
        if !all && !planted("commit-before-all-built") {
            return Ok(());
        }
        for member in self.record.members.clone() {
            self.effect(Effect::Commit { trainer: member.trainer, generation });
        }
        for trainer in std::mem::take(&mut self.record.leaving) {
            self.stop(trainer);
        }
        self.observed.avoid.clear();
        self.observed.judged.clear();
        self.note_holders();
        self.record.start_ms.get_or_insert(self.now.unix_ms);
        self.observed.broken = None;
        let message = match &self.record.head {
            _ if self.record.carries => {
                format!("{} trainer(s) train on from where they were", self.record.members.len())
            }
            Some(head) => format!("{} trainer(s) train on from step {}", self.record.members.len(), head.position.step),
            None => format!("{} trainer(s) train from the beginning", self.record.members.len()),
        };
        self.enter(RunState::Running, RunReason::Training, message, None);
        let world_size = self.record.world_size();
        self.record.world_sizes.push(world_size);
        self.record.whole = self.record.whole.min(self.record.wanted_size()).max(world_size);
        self.record.ceded = self.record.ceded.filter(|most| world_size > *most);
        if self.record.suspends_next { self.suspend() } else { Ok(()) }
    }

    /// A deadline of starting or forming has passed: the next gang is chosen without those that were late, where it can be.
    fn time_out(&mut self, what: &str) {
        let late: BTreeSet<FreeSlot> = self
            .record
            .members
            .iter()
            .filter(|member| match self.record.state {
                RunState::Admitted => !self.observed.addresses.contains_key(&member.trainer.incarnation),
                RunState::Forming => !self.observed.built.contains(&member.trainer.incarnation),
                RunState::Pending
                | RunState::Running
                | RunState::Resizing
                | RunState::Suspending
                | RunState::Suspended
                | RunState::Preempting
                | RunState::Succeeded
                | RunState::Failed
                | RunState::Cancelled => false,
            })
            .map(|member| member.trainer.place())
            .collect();
        let message = format!("trainer(s) on {} {what} in time", some_of(late.iter()));
        let members = self.record.members.iter().map(|member| member.trainer.clone());
        let gone: Vec<Trainer> = members.filter(|trainer| late.contains(&trainer.place())).collect();
        self.observed.avoid.extend(late);
        self.lose_gang(&gone, Fault::Other, RunReason::GangTimeout, message);
    }

    pub(super) fn trainer_exited(&mut self, trainer: &Trainer, ending: Ending) -> Result<(), Rejection> {
        if self.is_joining(trainer) {
            self.judge(trainer, ending.fault());
            self.lose_joiner(trainer, &format!("{} slot {} ended: {ending}", trainer.worker, trainer.slot));
            return Ok(());
        }
        if self.is_leaving(trainer) {
            self.forget_leaving(|other| other == trainer);
            return Ok(());
        }
        let rank = self.member_of_any(trainer)?;
        let message = format!("rank {rank} on {} slot {} ended: {ending}", trainer.worker, trainer.slot);
        let fault = self.judge(trainer, ending.fault());
        self.lose_trainer(trainer, fault, RunReason::TrainerLost, message);
        Ok(())
    }

    pub(super) fn workers_lost(&mut self, workers: &[WorkerName]) {
        let message = match workers {
            [worker] => format!("worker {worker} is lost"),
            [first, others @ ..] => format!("worker {first} and {} others are lost", others.len()),
            [] => return,
        };
        let workers: BTreeSet<&WorkerName> = workers.iter().collect();
        let is_here = |trainer: &&Trainer| workers.contains(&trainer.worker);
        self.forget_leaving(|trainer| is_here(&trainer));
        let joining: Vec<Trainer> = self.record.joining.iter().filter(is_here).cloned().collect();
        self.forget_joiners(&joining, &message);
        let members = self.record.members.iter().map(|member| &member.trainer);
        let lost: Vec<Trainer> = members.filter(is_here).cloned().collect();
        // One generation for all of it.
        if !lost.is_empty() {
            self.lose_trainers(&lost, Fault::Other, RunReason::TrainerLost, message);
        } else if !joining.is_empty() {
            self.join_without();
        }
    }

    /// RUN-8: stops who should not be, and misses who should.
    pub(super) fn trainers_seen(&mut self, worker: &WorkerName, alive: &[Trainer]) {
        if planted("strays-not-stopped") {
            return;
        }
        let stopping = match self.record.state {
            RunState::Resizing => !self.observed.kept,
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Running
            | RunState::Suspending
            | RunState::Suspended
            | RunState::Preempting
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => false,
        };
        for trainer in alive {
            if stopping || !self.record.trainers().any(|known| known == trainer) {
                self.stop(trainer.clone());
            } else if self.observed.awaited.remove(&trainer.incarnation) && self.record.state.is_saving() {
                // The leader before may have gone before it said so.
                let generation = self.record.generation;
                self.effect(Effect::SuspendTrainer { trainer: trainer.clone(), generation });
            }
        }
        // One that has yet to say it is ready may not have been started when the list was made.
        let joining =
            self.record.joining.iter().filter(|trainer| trainer.worker == *worker && !alive.contains(trainer));
        let gone = joining.filter(|trainer| self.observed.addresses.contains_key(&trainer.incarnation));
        let gone: Vec<Trainer> = gone.cloned().collect();
        self.forget_joiners(&gone, &format!("worker {worker} no longer has it"));
        self.forget_leaving(|trainer| trainer.worker == *worker && !alive.contains(trainer));
        let here = self.record.members.iter().map(|member| &member.trainer).filter(|trainer| trainer.worker == *worker);
        let missing = here
            .filter(|trainer| !alive.contains(trainer))
            .filter(|trainer| stopping || self.was_heard_from(trainer) || self.is_awaited(trainer))
            .cloned();
        // One generation for all of it.
        let (awaited, lost): (Vec<Trainer>, Vec<Trainer>) = missing.partition(|trainer| self.is_awaited(trainer));
        let message = |trainers: &[Trainer]| {
            let slots: Vec<String> = trainers.iter().map(|trainer| trainer.slot.to_string()).collect();
            format!("worker {worker} no longer has the trainer in slot {}", slots.join(", "))
        };
        self.record.members.retain(|member| !awaited.contains(&member.trainer));
        for trainer in &awaited {
            self.observed.awaited.remove(&trainer.incarnation);
        }
        if !lost.is_empty() {
            self.lose_trainers(&lost, Fault::Other, RunReason::TrainerLost, message(&lost));
        } else if !awaited.is_empty() {
            self.lose_taken_over(message(&awaited));
        } else if !gone.is_empty() {
            self.join_without();
        }
    }

    fn is_awaited(&self, trainer: &Trainer) -> bool {
        self.observed.awaited.contains(&trainer.incarnation)
    }

    fn was_heard_from(&self, trainer: &Trainer) -> bool {
        match self.record.state {
            // By this leader or by the one before, else it would have built no gang.
            RunState::Running | RunState::Suspending | RunState::Preempting => true,
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Resizing
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => self.observed.addresses.contains_key(&trainer.incarnation),
        }
    }
}

/// Places for people: the first few, and how many more.
pub(super) fn some_of<'a>(places: impl ExactSizeIterator<Item = &'a FreeSlot>) -> String {
    const MOST: usize = 8;
    let more = places.len().saturating_sub(MOST);
    let names: Vec<String> = places.take(MOST).map(|place| format!("{} slot {}", place.worker, place.slot)).collect();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", names.join(", "))
}

/// Why a run waits, as its record says it. Not for whom slots are kept: that changes too often to be stored.
pub(super) fn waits_for(record: &RunRecord, reason: &Reason, resting: Option<Resting>) -> (RunReason, String) {
    match reason {
        Reason::TooFewSlots { needed, .. } => {
            let resting = resting.map_or_else(String::new, |resting| format!("; {resting}"));
            (RunReason::WaitingForWorkers, format!("needs {needed} free slot(s){resting}"))
        }
        Reason::Preempts { needed, .. } => {
            let message = format!("needs {needed} free slot(s), which runs of lower priority give up");
            (RunReason::WaitingForWorkers, message)
        }
        Reason::QuotaExhausted { quota, needed, .. } => {
            let tenant = &record.spec.scheduling.tenant;
            let never = if needed > quota { "; it can never start: lower workers.min" } else { "" };
            let message = format!("needs {needed} slot(s) of tenant {tenant}'s quota of {quota}{never}");
            (RunReason::WaitingForQuota, message)
        }
        Reason::Reserved { .. } => {
            (RunReason::WaitingInQueue, "free slots are kept for a run that has waited longer".to_owned())
        }
    }
}
