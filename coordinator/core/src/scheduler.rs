//! Which waiting run gets which slots next, and why the others wait.
//!
//! - SCHED-1: a gang gets at least its minimum at once, or nothing.
//! - SCHED-2: no tenant is given more than its quota.
//! - SCHED-3: the order: damaged gangs; then runs that have waited for [`Policy::overdue_after_ms`], oldest first; then by priority; within it the
//!   tenant that has least for its weight; within that the oldest; then, by the same, gangs that could grow. Ties go by tenant and id, so that
//!   equal input gives equal output.
//! - SCHED-4: the first run in that order that only slots keep back, and that has waited for [`Policy::reserve_after_ms`], is given whatever comes
//!   free before anybody behind it: so a large gang is not passed by small ones for ever.
//! - SCHED-5: a gang grows only by what nobody else waits for: nothing, while a run before it is kept back by slots.
//! - SCHED-6: a run that only slots keep back, for [`Policy::preempt_after_ms`], is given those of running runs of lower priority: they shrink to
//!   their minimum; where that is not enough the lowest and youngest save and yield. Nobody gives where all of it would not be enough.
//! - SCHED-7: every wait is bounded: a run that has waited for [`Policy::overdue_after_ms`] counts above every priority, and keeps that for
//!   [`Policy::shield_ms`] once it has its slots.
//!
//! It is asked anew each time; nothing is remembered but what runs hold.

mod reclaim;

pub use reclaim::{Give, Holder, Reclaim};

use crate::gang::{self, Decision, FreeSlot};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use thaw_proto::ids::RunId;
use thaw_proto::spec::Priority;

/// Limits of the scheduler. Times are milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Waited so long, a run may be passed by nobody behind it.
    pub reserve_after_ms: u64,
    /// Waited so long, a run goes before every other that has not.
    pub overdue_after_ms: u64,
    /// Waited so long, a run takes slots of runs of lower priority.
    pub preempt_after_ms: u64,
    /// How long a run that was overdue may train before others take its slots.
    pub shield_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            reserve_after_ms: 60_000,
            overdue_after_ms: 6 * 3_600_000,
            preempt_after_ms: 5_000,
            shield_ms: 30 * 60_000,
        }
    }
}

/// What a tenant may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Slots at most, over all its runs. `None`: as many as there are.
    pub quota: Option<u32>,
    /// What it has counts by this much less than another's, at least 1.
    pub weight: u32,
}

impl Default for Share {
    fn default() -> Self {
        Self { quota: None, weight: 1 }
    }
}

/// What slots are wanted for. In the order in which they are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// To make up for what a gang has lost.
    Repair,
    /// To start a gang.
    Start,
    /// To have more trainers in a gang that trains.
    Growth,
}

/// A run that waits for a gang, or for more of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub run: RunId,
    pub tenant: String,
    pub priority: Priority,
    /// Since when, in Unix milliseconds.
    pub since_ms: u64,
    /// Slots it can do with, at least 1.
    pub min: u32,
    /// Slots it can use, at least `min`.
    pub max: u32,
    pub claim: Claim,
    /// Slots to be used only where there are no others.
    pub avoid: BTreeSet<FreeSlot>,
}

/// What is running, as far as slots can be taken from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Running {
    pub holders: Vec<Holder>,
    /// Slots that are being given up, or whose trainers are ending.
    pub coming: u32,
}

/// What becomes of all that wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    pub verdicts: BTreeMap<RunId, Verdict>,
    /// For the first run that may take slots of others.
    pub reclaim: Option<Reclaim>,
}

/// Why a run waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    TooFewSlots {
        free: u32,
        needed: u32,
    },
    /// As before; runs of lower priority give theirs up.
    Preempts {
        free: u32,
        needed: u32,
    },
    /// Of its tenant. Where `needed` is above `quota` the run can never start.
    QuotaExhausted {
        quota: u32,
        held: u32,
        needed: u32,
    },
    /// What is free is kept for `run`, which has waited longer.
    Reserved {
        run: RunId,
    },
}

/// What becomes of a waiting run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// In rank order.
    Granted(Vec<FreeSlot>),
    Waits {
        reason: Reason,
        /// Among those that wait, from 1; 0 for a gang that could grow.
        place: u32,
    },
}

/// [`decide`], of what waits alone.
#[must_use]
pub fn schedule(
    policy: &Policy,
    now_ms: u64,
    shares: &BTreeMap<String, Share>,
    held: &BTreeMap<String, u32>,
    waiting: &[Waiting],
    free: &[FreeSlot],
) -> BTreeMap<RunId, Verdict> {
    decide(policy, now_ms, shares, held, waiting, free, &Running::default()).verdicts
}

/// Decides for all of `waiting`. `held`: slots that each tenant's runs hold. A tenant that `shares` does not name has the default.
#[must_use]
pub fn decide(
    policy: &Policy,
    now_ms: u64,
    shares: &BTreeMap<String, Share>,
    held: &BTreeMap<String, u32>,
    waiting: &[Waiting],
    free: &[FreeSlot],
    running: &Running,
) -> Decided {
    let mut free = free.to_vec();
    free.sort_unstable();
    let mut round = Round {
        policy,
        now_ms,
        shares,
        held: held.clone(),
        free,
        running,
        reserved: None,
        reclaim: None,
        short: None,
        last: 0,
    };
    let verdicts: Vec<(RunId, Verdict)> =
        round.order(waiting).into_iter().map(|run| (run.run.clone(), round.decide(run))).collect();
    Decided { verdicts: verdicts.into_iter().collect(), reclaim: round.reclaim }
}

struct Round<'a> {
    policy: &'a Policy,
    now_ms: u64,
    shares: &'a BTreeMap<String, Share>,
    held: BTreeMap<String, u32>,
    /// Sorted.
    free: Vec<FreeSlot>,
    running: &'a Running,
    reclaim: Option<Reclaim>,
    /// For whom what is free is kept.
    reserved: Option<RunId>,
    /// The first run that slots keep back.
    short: Option<RunId>,
    /// The last place given in the queue.
    last: u32,
}

impl Round<'_> {
    /// All of `waiting` by SCHED-3. A run counts for its tenant as soon as it has its place, so that tenants take turns.
    fn order<'w>(&self, waiting: &'w [Waiting]) -> Vec<&'w Waiting> {
        type Class = (Claim, Reverse<bool>, Reverse<Priority>);
        let mut classes: BTreeMap<Class, Vec<&Waiting>> = BTreeMap::new();
        for run in waiting {
            let overdue = self.waited(run) >= self.policy.overdue_after_ms;
            let priority = if run.claim == Claim::Repair || overdue { Priority::High } else { run.priority };
            classes.entry((run.claim, Reverse(overdue), Reverse(priority))).or_default().push(run);
        }
        let mut held = self.held.clone();
        let mut ordered = Vec::with_capacity(waiting.len());
        for ((claim, Reverse(overdue), _), mut runs) in classes {
            runs.sort_by_key(|run| (run.since_ms, &run.run));
            if claim == Claim::Repair || overdue {
                ordered.extend(runs);
                continue;
            }
            let mut tenants: BTreeMap<&str, VecDeque<&Waiting>> = BTreeMap::new();
            for run in runs {
                tenants.entry(&run.tenant).or_default().push_back(run);
            }
            // Tenants by what they have for their weight, then by their oldest run.
            let key = |tenant: &str, queue: &VecDeque<&Waiting>, held: &BTreeMap<String, u32>| {
                let share = self.share(tenant);
                // Of one slot for the largest weight: whole numbers, so that equal shares are equal.
                let has = u64::from(held.get(tenant).copied().unwrap_or(0)) * u64::from(u32::MAX);
                (has / u64::from(share.weight.max(1)), queue.front().map(|run| run.since_ms))
            };
            let mut queue: BTreeSet<_> =
                tenants.iter().map(|(tenant, runs)| (key(tenant, runs, &held), *tenant)).collect();
            while let Some((_, tenant)) = queue.pop_first() {
                let runs = tenants.get_mut(tenant).expect("every queued tenant has a queue");
                let run = runs.pop_front().expect("a queued tenant has a run");
                *held.entry(tenant.to_owned()).or_default() += run.min;
                ordered.push(run);
                if !runs.is_empty() {
                    queue.insert((key(tenant, runs, &held), tenant));
                }
            }
        }
        ordered
    }

    fn decide(&mut self, run: &Waiting) -> Verdict {
        let held = self.held.get(&run.tenant).copied().unwrap_or(0);
        let quota = self.share(&run.tenant).quota.filter(|_| !thaw_mutants::planted("quota-ignored"));
        let allowed = quota.map_or(u32::MAX, |quota| quota.saturating_sub(held));
        if let Some(quota) = quota.filter(|_| run.min > allowed) {
            return self.wait(run, Reason::QuotaExhausted { quota, held, needed: run.min });
        }
        let first = match run.claim {
            Claim::Repair | Claim::Start => &self.reserved,
            Claim::Growth => &self.short,
        };
        if let Some(first) = first.clone() {
            return self.wait(run, Reason::Reserved { run: first });
        }
        let Some(places) = self.places(run, run.max.min(allowed)) else {
            if self.waited(run) >= self.policy.reserve_after_ms {
                self.reserved = Some(run.run.clone());
            }
            self.short.get_or_insert_with(|| run.run.clone());
            let free = u32::try_from(self.free.len()).unwrap_or(u32::MAX);
            if run.claim == Claim::Start && self.reclaim.is_none() {
                let (short, running) = (run.min.saturating_sub(free), self.running);
                self.reclaim = reclaim::reclaim(self.policy, self.now_ms, run, short, running.coming, &running.holders);
                if self.reclaim.is_some() {
                    self.reserved = Some(run.run.clone());
                    return self.wait(run, Reason::Preempts { free, needed: run.min });
                }
            }
            return self.wait(run, Reason::TooFewSlots { free, needed: run.min });
        };
        // Both are sorted.
        let mut taken = places.iter().peekable();
        self.free.retain(|slot| taken.next_if_eq(&slot).is_none());
        *self.held.entry(run.tenant.clone()).or_default() += u32::try_from(places.len()).unwrap_or(u32::MAX);
        Verdict::Granted(places)
    }

    fn places(&self, run: &Waiting, max: u32) -> Option<Vec<FreeSlot>> {
        if self.free.len() < run.min as usize {
            return None;
        }
        let choose = |slots: &[FreeSlot]| match gang::choose(slots, run.min, max) {
            Decision::Form(places) => Some(places),
            Decision::Wait(_) => None,
        };
        if run.avoid.is_empty() {
            return choose(&self.free);
        }
        let proven: Vec<FreeSlot> = self.free.iter().filter(|slot| !run.avoid.contains(*slot)).cloned().collect();
        choose(&proven).or_else(|| choose(&self.free))
    }

    fn wait(&mut self, run: &Waiting, reason: Reason) -> Verdict {
        let is_queued = run.claim != Claim::Growth;
        self.last += u32::from(is_queued);
        Verdict::Waits { reason, place: if is_queued { self.last } else { 0 } }
    }

    fn waited(&self, run: &Waiting) -> u64 {
        self.now_ms.saturating_sub(run.since_ms)
    }

    fn share(&self, tenant: &str) -> Share {
        self.shares.get(tenant).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
