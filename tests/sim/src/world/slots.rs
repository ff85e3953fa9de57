//! What is checked of who has how many slots: sizes of gangs, and slots that change hands (SCHED-1, SCHED-2, SCHED-6, RUN-11, RUN-12).

use super::{Broken, Memory};
use thaw_core::run_machine::{RunRecord, Trainer};
use thaw_proto::run::{RunReason, RunState};

/// Over one stored change, `memory` being as before it.
pub(super) fn check_slots(after: &RunRecord, memory: &Memory, broken: &mut Broken) {
    let run = &after.id;
    let Some((min, max)) = memory.workload(run.as_str()).map(|workload| workload.workers) else { return };
    let holds_none = match after.state {
        RunState::Pending | RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => true,
        RunState::Admitted
        | RunState::Forming
        | RunState::Running
        | RunState::Resizing
        | RunState::Suspending
        | RunState::Preempting => false,
    };
    if holds_none && after.trainers().next().is_some() {
        broken.push(("SCHED-1", format!("{run} is {:?} and holds slots", after.state)));
    }
    let tenant = after.spec.scheduling.tenant.as_str();
    if let Some(quota) = memory.quotas.get(tenant) {
        let others = memory.runs.values().map(|seen| &seen.record).filter(|other| other.id != *run);
        let others = others.filter(|other| other.spec.scheduling.tenant == tenant);
        let holds: usize = others.chain([after]).map(|record| record.trainers().count()).sum();
        if holds > *quota as usize {
            broken.push(("SCHED-2", format!("tenant {tenant} holds {holds} slots of a quota of {quota}")));
        }
    }
    if after.scale.is_some_and(|scale| !(min..=max).contains(&scale)) {
        broken.push(("RUN-11", format!("{run} of {min}-{max} trainers is scaled to {:?}", after.scale)));
    }
    let Some(before) = memory.runs.get(run.as_str()).map(|seen| &seen.record) else { return };
    let size = u32::try_from(after.members.len()).unwrap_or(u32::MAX);
    if after.generation > before.generation {
        // Growth, or what a user asked for, is the next generation's.
        let most = after.scale.unwrap_or(max).min(after.ceded.unwrap_or(max)).max(min);
        if !(min..=most).contains(&size) {
            broken.push(("RUN-11", format!("{run}: {size} are the next gang, not {min} to {most}")));
        }
        let left = |trainer: &Trainer| after.trainers().all(|other| other != trainer);
        let gone = before.members.iter().map(|member| &member.trainer).chain(&before.leaving).find(|one| left(one));
        if let Some(gone) = gone.filter(|_| after.reason == RunReason::Scaled) {
            broken.push(("RUN-11", format!("{run}: {gone:?} is let go before the gang of {size} is committed")));
        }
    }
    let committed = after.world_sizes.get(before.world_sizes.len()..).unwrap_or_default();
    if let Some(size) = committed.iter().find(|size| !(min..=max).contains(size)) {
        broken.push(("RUN-11", format!("{run}: a gang of {size} trains, not of {min} to {max}")));
    }
    check_given(before, after, memory, broken);
}

/// What a run gives up to another.
fn check_given(before: &RunRecord, after: &RunRecord, memory: &Memory, broken: &mut Broken) {
    let run = &after.id;
    let yields = before.state == RunState::Running && after.state == RunState::Preempting;
    let cedes = after.ceded.is_some() && after.ceded != before.ceded;
    if yields || cedes {
        // No two runs can be each above the other, so none takes back what it was taken.
        let mine = after.spec.scheduling.priority;
        let mut others = memory.runs.values().map(|seen| &seen.record);
        if !others.any(|other| other.state == RunState::Pending && other.spec.scheduling.priority > mine) {
            broken.push(("SCHED-6", format!("{run} gives up slots, and no run of higher priority waits")));
        }
    }
    let returns = match after.state {
        RunState::Preempting
        | RunState::Pending
        | RunState::Suspending
        | RunState::Succeeded
        | RunState::Failed
        | RunState::Cancelled => true,
        RunState::Suspended => before.suspends_next,
        RunState::Admitted | RunState::Forming | RunState::Running | RunState::Resizing => false,
    };
    if before.state == RunState::Preempting && !returns {
        broken.push(("RUN-12", format!("{run} has yielded and is {:?}", after.state)));
    }
}
