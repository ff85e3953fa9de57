//! How gangs come and go: slots, starting, forming, loss.

use super::turn::Turn;
use super::{Effect, Member, Proposal, Rejection, Trainer, gang_key};
use crate::gang::FreeSlot;
use crate::scheduler::{Reason, Verdict};
use std::collections::BTreeSet;
use thaw_proto::ids::{Attempt, Generation, Incarnation, Rank, WorkerName};
use thaw_proto::run::{RunReason, RunState};

impl Turn {
    pub(super) fn tick(&mut self, slots: Option<&Verdict>, fresh: &[Incarnation]) -> Result<(), Rejection> {
        if self.give_up_awaited() {
            return Ok(());
        }
        match self.record.state {
            RunState::Pending => self.try_start_gang(slots, fresh)?,
            RunState::Resizing => {
                if !self.record.members.is_empty() && !self.deadline_passed(self.policy.stop_timeout_ms) {
                    return Ok(());
                }
                // Who has not stopped by now is on a worker that cannot be reached; its generation keeps it out (RUN-2).
                self.changed |= !self.record.members.is_empty();
                self.record.members.clear();
                self.try_start_gang(slots, fresh)?;
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
            RunState::Running
            | RunState::Preempting
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => {}
        }
        Ok(())
    }

    fn try_start_gang(&mut self, slots: Option<&Verdict>, fresh: &[Incarnation]) -> Result<(), Rejection> {
        let places = match slots {
            None => return Ok(()),
            Some(Verdict::Waits { reason, .. }) => {
                self.observed.gathering_since_ms = None;
                self.wait_for_slots(reason);
                return Ok(());
            }
            Some(Verdict::Granted(places)) => places,
        };
        if places.len() < self.record.spec.workers.max as usize {
            let since = *self.observed.gathering_since_ms.get_or_insert(self.now_ms);
            if self.now_ms < since + self.policy.gather_ms {
                return Ok(());
            }
        }
        if fresh.len() < places.len() {
            return Err(Rejection::TooFewIncarnations { needed: places.len(), given: fresh.len() });
        }
        self.start_gang(places.clone(), fresh);
        Ok(())
    }

    /// Records why, and nothing that changes while the reason does not: a long queue must not fill the store.
    fn wait_for_slots(&mut self, reason: &Reason) {
        let (reason, message) = match reason {
            Reason::TooFewSlots { needed, .. } => {
                (RunReason::WaitingForWorkers, format!("needs {needed} free slot(s)"))
            }
            Reason::QuotaExhausted { quota, needed, .. } => {
                let tenant = &self.record.spec.scheduling.tenant;
                let never = if needed > quota { "; it can never start: lower workers.min" } else { "" };
                let message = format!("needs {needed} slot(s) of tenant {tenant}'s quota of {quota}{never}");
                (RunReason::WaitingForQuota, message)
            }
            Reason::Reserved { run } => {
                (RunReason::WaitingInQueue, format!("free slots are kept for {run}, which has waited longer"))
            }
        };
        if self.record.reason != reason || self.record.message != message {
            self.changed = true;
            self.record.reason = reason;
            self.record.message.clone_from(&message);
            self.event(message);
        }
    }

    /// Takes the next generation (RUN-1) and starts its trainers.
    fn start_gang(&mut self, places: Vec<FreeSlot>, fresh: &[Incarnation]) {
        let generation = self.record.generation.next();
        self.record.generation = generation;
        if self.record.attempt == Attempt(0) {
            self.record.attempt = Attempt(1);
        }
        let trainers = places.into_iter().zip(fresh).map(|(place, incarnation)| Trainer {
            worker: place.worker,
            slot: place.slot,
            incarnation: incarnation.clone(),
        });
        self.record.members = (0..).zip(trainers).map(|(rank, trainer)| Member { rank: Rank(rank), trainer }).collect();
        self.observed.addresses.clear();
        self.observed.built.clear();
        for member in self.record.members.clone() {
            self.effect(Effect::StartTrainer { trainer: member.trainer, generation });
        }
        let message = format!("starting {} trainer(s)", self.record.members.len());
        self.enter(RunState::Admitted, RunReason::Starting, message, Some(self.policy.start_timeout_ms));
    }

    pub(super) fn trainer_ready(&mut self, trainer: &Trainer, address: &str) -> Result<(), Rejection> {
        self.member_of_any(trainer)?;
        match self.record.state {
            RunState::Admitted => {}
            // Said twice.
            RunState::Forming | RunState::Running | RunState::Suspending | RunState::Preempting => {
                return Ok(());
            }
            RunState::Pending
            | RunState::Resizing
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => return Err(self.not_legal("take a trainer in")),
        }
        self.observed.addresses.insert(trainer.incarnation.clone(), address.to_owned());
        let addresses: Option<Vec<String>> = self
            .record
            .members
            .iter()
            .map(|member| self.observed.addresses.get(&member.trainer.incarnation).cloned())
            .collect();
        let Some(addresses) = addresses else {
            return Ok(());
        };
        let key = gang_key(&self.record);
        for member in self.record.members.clone() {
            self.effect(Effect::Propose(Box::new(Proposal {
                trainer: member.trainer,
                generation: self.record.generation,
                rank: member.rank,
                addresses: addresses.clone(),
                key,
                resume: self.record.head.clone(),
            })));
        }
        let message = format!("{} trainer(s) build their communicator", addresses.len());
        self.enter(RunState::Forming, RunReason::Starting, message, Some(self.policy.forming_timeout_ms));
        Ok(())
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
        if !self.record.members.iter().all(|member| self.observed.built.contains(&member.trainer.incarnation)) {
            return Ok(());
        }
        for member in self.record.members.clone() {
            self.effect(Effect::Commit { trainer: member.trainer, generation });
        }
        self.observed.avoid.clear();
        self.record.start_ms.get_or_insert(self.now_ms);
        let message = match &self.record.head {
            Some(head) => format!("{} trainer(s) train on from step {}", self.record.members.len(), head.position.step),
            None => format!("{} trainer(s) train from the beginning", self.record.members.len()),
        };
        self.enter(RunState::Running, RunReason::Training, message, None);
        let world_size = self.record.world_size();
        self.record.world_sizes.push(world_size);
        Ok(())
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
        let names: Vec<String> = late.iter().map(|place| format!("{} slot {}", place.worker, place.slot)).collect();
        let message = format!("trainer(s) on {} {what} in time", names.join(", "));
        self.observed.avoid.extend(late);
        self.lose_gang(RunReason::GangTimeout, message);
    }

    pub(super) fn trainer_exited(&mut self, trainer: &Trainer, ending: &str) -> Result<(), Rejection> {
        let rank = self.member_of_any(trainer)?;
        let message = format!("rank {rank} on {} slot {} ended: {ending}", trainer.worker, trainer.slot);
        self.lose_trainer(trainer, RunReason::TrainerLost, message);
        Ok(())
    }

    pub(super) fn worker_lost(&mut self, worker: &WorkerName) {
        let lost: Vec<Trainer> = self
            .record
            .members
            .iter()
            .map(|member| member.trainer.clone())
            .filter(|trainer| trainer.worker == *worker)
            .collect();
        for trainer in lost {
            self.lose_trainer(&trainer, RunReason::TrainerLost, format!("worker {worker} is lost"));
        }
    }

    /// RUN-8: stops who should not be, and misses who should.
    pub(super) fn trainers_seen(&mut self, worker: &WorkerName, alive: &[Trainer]) {
        let stopping = match self.record.state {
            RunState::Resizing => true,
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
            if stopping || !self.record.members.iter().any(|member| member.trainer == *trainer) {
                self.stop(trainer.clone());
            } else if self.observed.awaited.remove(&trainer.incarnation) && self.record.state == RunState::Suspending {
                // The leader before may have gone before it said so.
                let generation = self.record.generation;
                self.effect(Effect::SuspendTrainer { trainer: trainer.clone(), generation });
            }
        }
        let here = self.record.members.iter().map(|member| &member.trainer).filter(|trainer| trainer.worker == *worker);
        // One that has yet to say it is ready may not have been started when the list was made.
        let missing: Vec<Trainer> = here
            .filter(|trainer| !alive.contains(trainer))
            .filter(|trainer| stopping || self.was_heard_from(trainer))
            .cloned()
            .collect();
        for trainer in missing {
            let message = format!("worker {worker} no longer has the trainer in slot {}", trainer.slot);
            if self.observed.awaited.remove(&trainer.incarnation) {
                self.record.members.retain(|member| member.trainer != trainer);
                self.lose_taken_over(message);
            } else {
                self.lose_trainer(&trainer, RunReason::TrainerLost, message);
            }
        }
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
