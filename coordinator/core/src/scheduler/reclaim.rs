//! Slots that runs of lower priority give up for one that cannot be placed.

use super::{Policy, Waiting};
use std::cmp::Reverse;
use thaw_proto::ids::RunId;
use thaw_proto::spec::Priority;

/// A run that trains, and could give up slots. Times are Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub run: RunId,
    pub priority: Priority,
    /// Slots it holds.
    pub size: u32,
    /// Slots it can do with.
    pub min: u32,
    /// Whether it can become smaller without starting again.
    pub shrinks: bool,
    /// Since when it waited for the slots it has.
    pub queued_ms: u64,
    /// When it was given them.
    pub placed_ms: u64,
}

/// What is asked of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Give {
    /// To become as small as this.
    Shrink { to: u32 },
    /// To save, and to wait for slots again.
    Yield,
}

/// Who gives up what, so that `by` has its minimum. Nobody where enough is on its way already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reclaim {
    pub by: RunId,
    pub from: Vec<(RunId, Give)>,
}

/// How runs compare: by priority, and above all of them those that have waited too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Of(Priority),
    Overdue,
}

/// SCHED-6, SCHED-7. `short`: slots that `run` lacks; `coming`: slots that are being given up, or whose trainers are ending.
pub(super) fn reclaim(
    policy: &Policy,
    now_ms: u64,
    run: &Waiting,
    short: u32,
    coming: u32,
    holders: &[Holder],
) -> Option<Reclaim> {
    let waited = now_ms.saturating_sub(run.since_ms);
    if waited < policy.preempt_after_ms {
        return None;
    }
    let none = Reclaim { by: run.run.clone(), from: Vec::new() };
    let Some(mut short) = short.checked_sub(coming).filter(|short| *short > 0) else { return Some(none) };
    let rank = if waited >= policy.overdue_after_ms { Rank::Overdue } else { Rank::Of(run.priority) };
    let is_below = |holder: &&Holder| rank_of(policy, now_ms, holder) < rank || thaw_mutants::planted("preempts-above");
    let mut below: Vec<&Holder> = holders.iter().filter(is_below).collect();
    // The lowest first, then the youngest.
    below.sort_by_key(|holder| (holder.priority, Reverse(holder.placed_ms), &holder.run));
    let spare = |holder: &Holder| if holder.shrinks { holder.size.saturating_sub(holder.min) } else { 0 };
    let all: u32 = below.iter().map(|holder| holder.size).sum();
    if all < short {
        return None;
    }
    // As few yield as have to, once all others are as small as they can be.
    let mut yielding = 0;
    let given = |yielding: usize| -> u32 {
        let whole: u32 = below[..yielding].iter().map(|holder| holder.size).sum();
        whole + below[yielding..].iter().map(|holder| spare(holder)).sum::<u32>()
    };
    while given(yielding) < short {
        yielding += 1;
    }
    let mut from = Vec::new();
    for holder in &below[..yielding] {
        short = short.saturating_sub(holder.size);
        from.push((holder.run.clone(), Give::Yield));
    }
    for holder in &below[yielding..] {
        let gives = spare(holder).min(short);
        short -= gives;
        if gives > 0 {
            from.push((holder.run.clone(), Give::Shrink { to: holder.size - gives }));
        }
    }
    Some(Reclaim { from, ..none })
}

fn rank_of(policy: &Policy, now_ms: u64, holder: &Holder) -> Rank {
    let waited = holder.placed_ms.saturating_sub(holder.queued_ms);
    let is_shielded = waited >= policy.overdue_after_ms && now_ms < holder.placed_ms + policy.shield_ms;
    if is_shielded { Rank::Overdue } else { Rank::Of(holder.priority) }
}
