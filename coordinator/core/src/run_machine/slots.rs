//! What a run says to the scheduler: what it asks for, and what it could give up.

use super::{Member, Now, Observed, RunRecord, gangs};
use crate::quarantine::Resting;
use crate::scheduler::{Claim, Holder, Verdict, Waiting};
use thaw_proto::run::RunState;

/// What the run asks the scheduler for; `None` where it has its slots, needs none, or has yet to give up those it had.
#[must_use]
pub fn wants_slots(record: &RunRecord, observed: &Observed, now: Now) -> Option<Waiting> {
    let members = u32::try_from(record.members.len()).unwrap_or(u32::MAX);
    let (least, wanted) = (record.spec.workers.min, record.wanted_size());
    let (claim, since_ms, min, max) = match record.state {
        RunState::Pending => (Claim::Start, record.queued_ms, least, wanted),
        // Survivors first: nobody is started for a gang that may have nobody left.
        RunState::Resizing if now.steady_ms < observed.restart_ms || !observed.awaited.is_empty() => return None,
        RunState::Resizing if observed.kept => {
            (Claim::Repair, record.queued_ms, least.saturating_sub(members), wanted.saturating_sub(members))
        }
        RunState::Resizing => {
            let gone = thaw_mutants::planted("members-not-awaited")
                || record.members.is_empty()
                || observed.deadline_ms.is_some_and(|deadline| now.steady_ms >= deadline);
            if !gone {
                return None;
            }
            (Claim::Repair, record.queued_ms, least, wanted)
        }
        RunState::Running => {
            let whole = record.whole.min(wanted);
            let (claim, missing) = match whole.saturating_sub(members) {
                0 => (Claim::Growth, wanted.saturating_sub(members)),
                lost => (Claim::Repair, lost),
            };
            if missing == 0 || !record.joining.is_empty() || now.steady_ms < observed.join_ms {
                return None;
            }
            if !record.members.iter().all(|member| observed.keepers.contains(&member.trainer.incarnation)) {
                return None;
            }
            // It trains, so it can wait: nothing is kept free for it.
            (claim, now.unix_ms, 1, missing)
        }
        RunState::Admitted
        | RunState::Forming
        | RunState::Suspending
        | RunState::Suspended
        | RunState::Preempting
        | RunState::Succeeded
        | RunState::Failed
        | RunState::Cancelled => return None,
    };
    Some(Waiting {
        run: record.id.clone(),
        tenant: record.spec.scheduling.tenant.clone(),
        priority: record.spec.scheduling.priority,
        since_ms,
        min,
        max,
        claim,
        avoid: observed.avoid.clone(),
    })
}

/// Whether the run waits, and for what its record says already: then a tick with this verdict changes nothing.
#[must_use]
pub fn waits_as_before(record: &RunRecord, observed: &Observed, verdict: &Verdict, resting: Option<Resting>) -> bool {
    let Verdict::Waits { reason, .. } = verdict else { return false };
    let is_at_rest = record.state == RunState::Pending
        && observed.gathering_since_ms.is_none()
        && observed.awaited.is_empty()
        && observed.broken.is_none();
    is_at_rest && gangs::waits_for(record, reason, resting) == (record.reason, record.message.clone())
}

/// The run as one whose slots another may take; `None` where it does not train, or is about to give some up.
#[must_use]
pub fn holds_slots(record: &RunRecord, observed: &Observed) -> Option<Holder> {
    if record.state != RunState::Running || record.ceded.is_some() || observed.broken.is_some() {
        return None;
    }
    let workers = &record.spec.workers;
    let size = u32::try_from(record.members.len()).unwrap_or(u32::MAX);
    let keeps = |member: &Member| observed.keepers.contains(&member.trainer.incarnation);
    Some(Holder {
        run: record.id.clone(),
        priority: record.spec.scheduling.priority,
        size,
        min: workers.min,
        shrinks: observed.awaited.is_empty() && record.members.iter().all(keeps),
        queued_ms: record.queued_ms,
        placed_ms: record.placed_ms,
    })
}

/// Slots that the run holds and is about to give up.
#[must_use]
pub fn gives_up(record: &RunRecord) -> u32 {
    let ceded = record.ceded.map_or(0, |most| record.members.len().saturating_sub(most as usize));
    let slots = match record.state {
        RunState::Preempting | RunState::Suspending => record.trainers().count(),
        RunState::Forming | RunState::Running => record.leaving.len() + ceded,
        RunState::Pending
        | RunState::Admitted
        | RunState::Resizing
        | RunState::Suspended
        | RunState::Succeeded
        | RunState::Failed
        | RunState::Cancelled => 0,
    };
    u32::try_from(slots).unwrap_or(u32::MAX)
}
