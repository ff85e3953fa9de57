//! What is scheduled, and the laws that it is held to: the same for the scheduler alone and for a coordinator over a
//! real etcd.
//!
//! - Quota: no tenant's runs hold more slots than its quota (SCHED-2).
//! - Gangs: after each round a run holds no slot, or at least its minimum (SCHED-1); no slot is held twice.
//! - Reclaim cycles: there are none. One is a chain of reclaims in which a run that gave slots up takes some back from
//!   the run that they were given to, itself (A from B, B from A) or over others (A from B, B from C, C from A), all
//!   within one settling. A settling is the time that a run which has waited too long may count on its slots for,
//!   [`Policy::shield_ms`]: what takes longer is sharing by turns.
//! - Waits: every one is bounded (SCHED-7). Up to [`Policy::overdue_after_ms`] others may go before; from then on those
//!   alone that have waited longer, so that the rest of a wait is what they need: their work over all slots but those
//!   that a gang too large for what is free leaves idle, then the longest run, and a shield. No younger run is given
//!   slots while an overdue one waits that its quota allows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use thaw_core::gang::FreeSlot;
use thaw_core::scheduler::{Give, Policy, Reclaim, Share};
use thaw_proto::ids::{RunId, Slot, WorkerName};
use thaw_proto::spec::Priority;

const RUNS: u32 = 15_000;
const TENANTS: u32 = 30;
const GROUPS: u32 = 5;
pub(crate) const SLOTS: u32 = 2_000;
pub(crate) const SLOTS_A_WORKER: u32 = 40;
/// Virtual time between rounds. The policy's times are hours, so a virtual minute is long enough.
pub(crate) const TICK_MS: u64 = 60_000;
/// Virtual time in which all runs arrive: sooner than they can be served.
const ARRIVALS_MS: u64 = 45_000_000;

/// A kind of run. Many small ones beside few large, as in Kueue's own benchmark.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Class {
    pub(crate) priority: Priority,
    pub(crate) min: u32,
    pub(crate) max: u32,
    /// With `max` slots, in virtual time.
    length_ms: u64,
    /// How many of ten runs are such.
    of_ten: u32,
}

/// The middle one can give up slots and go on.
const CLASSES: [Class; 3] = [
    Class { priority: Priority::Low, min: 1, max: 1, length_ms: 1_200_000, of_ten: 7 },
    Class { priority: Priority::Normal, min: 2, max: 5, length_ms: 1_800_000, of_ten: 2 },
    Class { priority: Priority::High, min: 20, max: 20, length_ms: 3_000_000, of_ten: 1 },
];

/// One run as it is now.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) run: RunId,
    pub(crate) tenant: String,
    pub(crate) class: &'static Class,
    /// Since when it waits, or has waited for the slots it has.
    pub(crate) since_ms: u64,
    pub(crate) placed_ms: u64,
    pub(crate) slots: BTreeSet<FreeSlot>,
    /// Work that is left, in slots and milliseconds.
    pub(crate) left: u64,
    /// When its wait is over at the latest; known once it is overdue.
    bound_ms: Option<u64>,
}

impl Job {
    pub(crate) fn waits(&self) -> bool {
        self.slots.is_empty()
    }
}

/// All runs that have arrived and not ended, and what was found out about them.
#[derive(Debug)]
pub(crate) struct Book {
    pub(crate) policy: Policy,
    pub(crate) shares: BTreeMap<String, Share>,
    pub(crate) jobs: BTreeMap<RunId, Job>,
    to_come: VecDeque<Job>,
    holders: BTreeMap<FreeSlot, RunId>,
    /// Who was given slots in this round.
    granted: BTreeSet<RunId>,
    /// Since when those of them that had none had waited.
    placed: Vec<u64>,
    /// When, by whom, from whom; those of the present settling.
    reclaims: VecDeque<(u64, RunId, RunId)>,
    found: Found,
}

#[derive(Debug, Default)]
struct Found {
    runs: u32,
    grants: u32,
    yields: u32,
    shrinks: u32,
    quota_breaches: u32,
    partly_held: u32,
    slots_given_twice: u32,
    reclaim_cycles: u32,
    overdue_passed: u32,
    beyond_bound: u32,
    overdue: u32,
    /// Of all waits.
    longest_ms: u64,
    /// The wait that came nearest to its bound, and that bound.
    tightest: Option<(u64, u64)>,
    /// By class.
    waited: [Vec<u64>; 3],
}

impl Book {
    /// With as many runs as `RUNS` says.
    pub(crate) fn new() -> Self {
        let runs = std::env::var("RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(RUNS);
        Self {
            policy: Policy::default(),
            shares: (0..TENANTS).map(|index| (tenant(index), share(index))).collect(),
            jobs: BTreeMap::new(),
            to_come: (0..runs).map(|index| job(index, runs)).collect(),
            holders: BTreeMap::new(),
            granted: BTreeSet::new(),
            placed: Vec::new(),
            reclaims: VecDeque::new(),
            found: Found { runs, ..Found::default() },
        }
    }

    /// Whether all runs have come and ended.
    pub(crate) fn is_over(&self) -> bool {
        self.to_come.is_empty() && self.jobs.is_empty()
    }

    /// Runs that have come by now.
    pub(crate) fn arrive(&mut self, now_ms: u64) -> Vec<RunId> {
        let mut come = Vec::new();
        while self.to_come.front().is_some_and(|job| job.since_ms <= now_ms) {
            let mut job = self.to_come.pop_front().expect("there is a first");
            job.since_ms = now_ms;
            come.push(job.run.clone());
            self.jobs.insert(job.run.clone(), job);
        }
        come
    }

    /// Every slot there is.
    pub(crate) fn free(&self) -> Vec<FreeSlot> {
        (0..SLOTS).map(place).filter(|slot| !self.holders.contains_key(slot)).collect()
    }

    pub(crate) fn held(&self) -> BTreeMap<String, u32> {
        let mut held = BTreeMap::new();
        for job in self.jobs.values().filter(|job| !job.waits()) {
            *held.entry(job.tenant.clone()).or_default() += count(job.slots.len());
        }
        held
    }

    /// A run is given slots, the first ones or more.
    pub(crate) fn take(&mut self, run: &RunId, slots: impl IntoIterator<Item = FreeSlot>, now_ms: u64) {
        let job = self.jobs.get_mut(run).expect("it has arrived");
        if job.waits() {
            let waited = now_ms - job.since_ms;
            self.found.waited(job, waited);
            self.placed.push(job.since_ms);
            (job.placed_ms, job.bound_ms) = (now_ms, None);
        }
        self.found.grants += u32::from(self.granted.insert(run.clone()));
        for slot in slots {
            self.found.slots_given_twice += u32::from(self.holders.insert(slot.clone(), run.clone()).is_some());
            job.slots.insert(slot);
        }
    }

    /// A run does without a slot. Without any it waits anew, from now on, unless its work is done.
    pub(crate) fn give(&mut self, run: &RunId, slot: &FreeSlot, now_ms: u64) {
        let Some(job) = self.jobs.get_mut(run) else { return };
        if job.slots.remove(slot) {
            self.holders.remove(slot);
        }
        if job.waits() {
            job.since_ms = now_ms;
            if job.left == 0 {
                self.jobs.remove(run);
            }
        }
    }

    /// All runs that have slots work for a tick; those that are done.
    pub(crate) fn work(&mut self) -> Vec<RunId> {
        let mut done = Vec::new();
        for job in self.jobs.values_mut().filter(|job| !job.waits() && job.left > 0) {
            job.left = job.left.saturating_sub(TICK_MS * job.slots.len() as u64);
            if job.left == 0 {
                done.push(job.run.clone());
            }
        }
        done
    }

    /// Others are asked for slots.
    pub(crate) fn reclaimed(&mut self, reclaim: &Reclaim, now_ms: u64) {
        while self.reclaims.front().is_some_and(|(at_ms, ..)| at_ms + self.policy.shield_ms < now_ms) {
            self.reclaims.pop_front();
        }
        for (from, give) in &reclaim.from {
            match give {
                Give::Yield => self.found.yields += 1,
                Give::Shrink { .. } => self.found.shrinks += 1,
            }
            self.found.reclaim_cycles += u32::from(self.has_taken(from, &reclaim.by));
            self.reclaims.push_back((now_ms, reclaim.by.clone(), from.clone()));
        }
    }

    /// Whether `by` took slots from `from` in this settling, itself or over others.
    fn has_taken(&self, by: &RunId, from: &RunId) -> bool {
        let (mut seen, mut open) = (BTreeSet::new(), vec![by]);
        while let Some(next) = open.pop() {
            if next == from {
                return true;
            }
            if seen.insert(next) {
                open.extend(self.reclaims.iter().filter(|(_, taker, _)| taker == next).map(|(.., giver)| giver));
            }
        }
        false
    }

    /// The laws, once a round has settled.
    pub(crate) fn check(&mut self, now_ms: u64) {
        let held = self.held();
        let quota = |tenant: &str| self.shares[tenant].quota.unwrap_or(u32::MAX);
        let over = held.iter().filter(|(tenant, held)| **held > quota(tenant)).count();
        let partly = self.jobs.values().filter(|job| !job.waits() && count(job.slots.len()) < job.class.min).count();
        let overdue = |job: &&Job| job.waits() && now_ms - job.since_ms >= self.policy.overdue_after_ms;
        let allowed = |job: &&Job| held.get(&job.tenant).copied().unwrap_or(0) + job.class.max <= quota(&job.tenant);
        let oldest = self.jobs.values().filter(overdue).filter(allowed).map(|job| job.since_ms).min();
        let passed = self.placed.iter().filter(|since| oldest.is_some_and(|oldest| **since > oldest)).count();
        let newly = self.jobs.values().filter(overdue).filter(|job| job.bound_ms.is_none());
        let newly: Vec<(RunId, u64)> = newly.map(|job| (job.run.clone(), now_ms + self.served_in(job))).collect();
        self.granted.clear();
        self.placed.clear();
        self.found.quota_breaches += count(over);
        self.found.partly_held += count(partly);
        self.found.overdue_passed += count(passed);
        self.found.overdue += count(newly.len());
        for (run, bound_ms) in newly {
            self.jobs.get_mut(&run).expect("it waits").bound_ms = Some(bound_ms);
        }
    }

    /// How long an overdue run waits at most from now on.
    fn served_in(&self, job: &Job) -> u64 {
        let older = self.jobs.values().filter(|other| (other.since_ms, &other.run) < (job.since_ms, &job.run));
        let work: u64 = older.map(|other| other.left).sum();
        let (largest, longest) =
            CLASSES.iter().fold((0, 0), |(size, length), class| (class.max.max(size), class.length_ms.max(length)));
        work / u64::from(SLOTS - largest) + longest + self.policy.shield_ms
    }

    /// Decisions so far: runs that were given slots, and such that were asked for some.
    pub(crate) fn decisions(&self) -> u32 {
        self.found.grants + self.found.yields + self.found.shrinks
    }

    /// Whether every law was kept.
    pub(crate) fn holds(&self) -> bool {
        let found = &self.found;
        let broken = found.quota_breaches
            + found.partly_held
            + found.slots_given_twice
            + found.reclaim_cycles
            + found.overdue_passed
            + found.beyond_bound;
        broken == 0
    }

    /// Runs that have come.
    pub(crate) fn runs(&self) -> u32 {
        self.found.runs
    }

    /// What was found, as the rest of a row of `make chaos`. Times are virtual.
    pub(crate) fn row(&self) -> String {
        let found = &self.found;
        let mean = |waits: &[u64]| waits.iter().sum::<u64>() / (waits.len() as u64).max(1) / 1000;
        let (wait, bound) = found.tightest.unwrap_or_default();
        format!(
            "runs={} grants={} yields={} shrinks={} quota_breaches={} partly_held={} slots_given_twice={} reclaim_cycles={} \
             overdue={} overdue_passed={} waits_beyond_bound={} longest_wait_s={} tightest_wait_s={} its_bound_s={} \
             mean_wait_s_low={} mean_wait_s_normal={} mean_wait_s_high={}",
            self.runs(),
            found.grants,
            found.yields,
            found.shrinks,
            found.quota_breaches,
            found.partly_held,
            found.slots_given_twice,
            found.reclaim_cycles,
            found.overdue,
            found.overdue_passed,
            found.beyond_bound,
            found.longest_ms / 1000,
            wait / 1000,
            bound / 1000,
            mean(&found.waited[0]),
            mean(&found.waited[1]),
            mean(&found.waited[2]),
        )
    }
}

impl Found {
    /// A wait is over.
    fn waited(&mut self, job: &Job, waited_ms: u64) {
        self.longest_ms = self.longest_ms.max(waited_ms);
        let class = CLASSES.iter().position(|class| class.priority == job.class.priority).unwrap_or(0);
        self.waited[class].push(waited_ms);
        if let Some(bound_ms) = job.bound_ms.map(|at_ms| at_ms - job.since_ms) {
            self.beyond_bound += u32::from(waited_ms > bound_ms);
            if self.tightest.is_none_or(|(wait, bound)| bound_ms - waited_ms.min(bound_ms) < bound - wait.min(bound)) {
                self.tightest = Some((waited_ms, bound_ms));
            }
        }
    }
}

fn tenant(index: u32) -> String {
    format!("group-{}-queue-{index}", index % GROUPS)
}

fn share(index: u32) -> Share {
    Share { quota: Some(SLOTS / TENANTS * 2), weight: 1 + index % GROUPS }
}

fn job(index: u32, of: u32) -> Job {
    let (mut class, mut before) = (&CLASSES[0], 0);
    for one in &CLASSES {
        if index % 10 >= before {
            class = one;
        }
        before += one.of_ten;
    }
    Job {
        run: RunId(format!("run-{index:08x}")),
        tenant: tenant(index / 10 % TENANTS),
        class,
        since_ms: u64::from(index) * ARRIVALS_MS / u64::from(of),
        placed_ms: 0,
        slots: BTreeSet::new(),
        left: u64::from(class.max) * class.length_ms,
        bound_ms: None,
    }
}

fn place(slot: u32) -> FreeSlot {
    FreeSlot { worker: worker(slot / SLOTS_A_WORKER), slot: Slot(slot % SLOTS_A_WORKER) }
}

pub(crate) fn worker(index: u32) -> WorkerName {
    WorkerName(format!("worker-{index:04}"))
}

pub(crate) fn count(things: usize) -> u32 {
    u32::try_from(things).unwrap_or(u32::MAX)
}
