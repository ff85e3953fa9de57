//! How many trainers a gang has: what is wanted, and how a gang that trains becomes smaller (RUN-11). Growing is joining.

use super::turn::Turn;
use super::{Member, Rejection, Trainer};
use crate::gang::{self, FreeSlot};
use std::collections::BTreeSet;
use thaw_mutants::planted;
use thaw_proto::ids::Rank;
use thaw_proto::run::RunReason;

impl Turn {
    pub(super) fn scale(&mut self, workers: u32) -> Result<(), Rejection> {
        if self.record.state.has_ended() {
            return Err(self.not_legal("be scaled"));
        }
        let (min, max) = (self.record.spec.workers.min, self.record.spec.workers.max);
        if !(min..=max).contains(&workers) && !planted("scale-unbounded") {
            return Err(Rejection::SizeOutOfRange { given: workers, min, max });
        }
        if self.record.scale == Some(workers) {
            return Ok(());
        }
        self.changed = true;
        self.record.scale = Some(workers);
        let wanted = self.record.wanted_size();
        let of_stage = if wanted < workers { format!("; this stage uses {wanted}") } else { String::new() };
        self.event(format!("scaled to {workers} trainer(s){of_stage}"));
        self.shrink();
        Ok(())
    }

    /// Whether slots are waited for still, since there are fewer than could be used. A loss is made up for at once.
    pub(super) fn gathers(&mut self, granted: usize) -> bool {
        let (members, wanted) = (self.record.members.len(), self.record.wanted_size() as usize);
        let is_repair = members > 0 && members < (self.record.whole as usize).min(wanted);
        if is_repair || members + granted >= wanted {
            return false;
        }
        let since = *self.observed.gathering_since_ms.get_or_insert(self.now.steady_ms);
        self.now.steady_ms < since + self.policy.gather_ms
    }

    /// Stops trainers that were to join and are not wanted any more, and begins a smaller generation where the present one is too large; whether it
    /// did that. Where not all of it keep their state it is left as it is until the next gang.
    pub(super) fn shrink(&mut self) -> bool {
        let wanted = self.record.wanted_size() as usize;
        while self.record.members.len() + self.record.joining.len() > wanted
            && let Some(trainer) = self.record.joining.pop()
        {
            self.changed = true;
            self.stop(trainer);
            if self.record.joining.is_empty() {
                self.observed.join_ms = self.now.steady_ms;
            }
        }
        let members = self.record.members.len();
        let keep = |member: &Member| self.observed.keepers.contains(&member.trainer.incarnation);
        let can = || self.observed.awaited.is_empty() && self.record.members.iter().all(keep);
        if !self.record.state.is_training() || members <= wanted || !can() {
            return false;
        }
        self.record.carries = true;
        self.next_generation(RunReason::Scaled, format!("{} of {members} trainer(s) leave", members - wanted));
        true
    }

    /// Of more members than are wanted those that go on, holders of a state before all others, stay; the others are about to leave.
    pub(super) fn leave_out_surplus(&mut self) {
        let wanted = self.record.wanted_size() as usize;
        if self.record.members.len() <= wanted {
            return;
        }
        // Who leaves is no loss.
        self.record.whole = self.record.whole.min(self.record.wanted_size());
        let holds = |member: &Member| self.observed.holders.contains(&member.trainer.incarnation);
        let place = |member: &Member| member.trainer.place();
        let (holding, others): (Vec<&Member>, Vec<&Member>) =
            self.record.members.iter().partition(|member| holds(member));
        let places = |members: &[&Member]| members.iter().map(|member| place(member)).collect::<Vec<FreeSlot>>();
        let mut stay: BTreeSet<FreeSlot> = gang::keep(&places(&holding), wanted).into_iter().collect();
        stay.extend(gang::keep(&places(&others), wanted - stay.len()));
        let (members, leaving): (Vec<Member>, Vec<Member>) =
            std::mem::take(&mut self.record.members).into_iter().partition(|member| stay.contains(&place(member)));
        self.record.members = members.into();
        if planted("leavers-let-go-early") {
            return leaving.into_iter().for_each(|member| self.stop(member.trainer));
        }
        self.record.leaving.extend(leaving.into_iter().map(|member| member.trainer));
    }

    /// Those that were about to leave are members again.
    pub(super) fn take_leaving(&mut self) {
        let back = std::mem::take(&mut self.record.leaving);
        self.record.members.extend(back.into_iter().map(|trainer| Member { rank: Rank(0), trainer }));
    }

    pub(super) fn is_leaving(&self, trainer: &Trainer) -> bool {
        self.record.leaving.contains(trainer)
    }

    /// Trainers that were about to leave are gone.
    pub(super) fn forget_leaving(&mut self, gone: impl Fn(&Trainer) -> bool) {
        if self.record.leaving.iter().any(&gone) {
            self.record.leaving.retain(|trainer| !gone(trainer));
            self.changed = true;
        }
    }
}
