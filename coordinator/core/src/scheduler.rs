//! Which waiting run gets which slots next, and why the others wait.
//!
//! - SCHED-1: a gang gets at least its minimum at once, or nothing.
//! - SCHED-2: no tenant is given more than its quota.
//! - SCHED-3: the order: damaged gangs; then runs that have waited for [`Policy::overdue_after_ms`], oldest first; then by priority; within it the
//!   tenant that has least for its weight; within that the oldest. Ties go by tenant and id, so that equal input gives equal output.
//! - SCHED-4: the first run in that order that only slots keep back, and that has waited for [`Policy::reserve_after_ms`], is given whatever comes
//!   free before anybody behind it: so a large gang is not passed by small ones for ever.
//!
//! It is asked anew each time; nothing is remembered but what runs hold.

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
}

impl Default for Policy {
    fn default() -> Self {
        Self { reserve_after_ms: 60_000, overdue_after_ms: 6 * 3_600_000 }
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

/// A run that waits for a gang.
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
    /// It had a gang and lost a part of it.
    pub is_damaged: bool,
    /// Slots to be used only where there are no others.
    pub avoid: BTreeSet<FreeSlot>,
}

/// Why a run waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    TooFewSlots {
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
        /// Among those that wait, from 1.
        place: u32,
    },
}

/// Decides for all of `waiting`. `held`: slots that each tenant's runs hold. A tenant that `shares` does not name has the default.
#[must_use]
pub fn schedule(
    policy: &Policy,
    now_ms: u64,
    shares: &BTreeMap<String, Share>,
    held: &BTreeMap<String, u32>,
    waiting: &[Waiting],
    free: &[FreeSlot],
) -> BTreeMap<RunId, Verdict> {
    let mut free = free.to_vec();
    free.sort_unstable();
    let mut round = Round { policy, now_ms, shares, held: held.clone(), free, reserved: None, last: 0 };
    let verdicts: Vec<(RunId, Verdict)> =
        round.order(waiting).into_iter().map(|run| (run.run.clone(), round.decide(run))).collect();
    verdicts.into_iter().collect()
}

struct Round<'a> {
    policy: &'a Policy,
    now_ms: u64,
    shares: &'a BTreeMap<String, Share>,
    held: BTreeMap<String, u32>,
    /// Sorted.
    free: Vec<FreeSlot>,
    /// For whom what is free is kept.
    reserved: Option<RunId>,
    /// The last place given in the queue.
    last: u32,
}

impl Round<'_> {
    /// All of `waiting` by SCHED-3. A run counts for its tenant as soon as it has its place, so that tenants take turns.
    fn order<'w>(&self, waiting: &'w [Waiting]) -> Vec<&'w Waiting> {
        type Class = (Reverse<bool>, Reverse<bool>, Reverse<Priority>);
        let mut classes: BTreeMap<Class, Vec<&Waiting>> = BTreeMap::new();
        for run in waiting {
            let overdue = self.waited(run) >= self.policy.overdue_after_ms;
            let priority = if run.is_damaged || overdue { Priority::High } else { run.priority };
            classes.entry((Reverse(run.is_damaged), Reverse(overdue), Reverse(priority))).or_default().push(run);
        }
        let mut held = self.held.clone();
        let mut ordered = Vec::with_capacity(waiting.len());
        for ((Reverse(damaged), Reverse(overdue), _), mut runs) in classes {
            runs.sort_by_key(|run| (run.since_ms, &run.run));
            if damaged || overdue {
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
        let allowed = self.share(&run.tenant).quota.map_or(u32::MAX, |quota| quota.saturating_sub(held));
        if run.min > allowed {
            let quota = self.share(&run.tenant).quota.unwrap_or(u32::MAX);
            return self.wait(Reason::QuotaExhausted { quota, held, needed: run.min });
        }
        if let Some(first) = &self.reserved {
            let run = first.clone();
            return self.wait(Reason::Reserved { run });
        }
        let Some(places) = self.places(run, run.max.min(allowed)) else {
            if self.waited(run) >= self.policy.reserve_after_ms {
                self.reserved = Some(run.run.clone());
            }
            let free = u32::try_from(self.free.len()).unwrap_or(u32::MAX);
            return self.wait(Reason::TooFewSlots { free, needed: run.min });
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

    fn wait(&mut self, reason: Reason) -> Verdict {
        self.last += 1;
        Verdict::Waits { reason, place: self.last }
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
