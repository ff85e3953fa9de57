//! The scheduler alone, in virtual time: 15,000 runs of 30 tenants in 5 groups of equal weight and quota, and of 3 classes, on 2,000 slots.
//!
//! `cargo run -p thaw-core --example scheduler` prints how many runs are given their slots in a second of the scheduler's own time, and how
//! often its laws were broken. It ends with 1 where one was. `RUNS=N` makes it smaller.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use thaw_core::gang::FreeSlot;
use thaw_core::scheduler::{Claim, Policy, Share, Verdict, Waiting, schedule};
use thaw_proto::ids::{RunId, Slot, WorkerName};
use thaw_proto::spec::Priority;

const RUNS: u32 = 15_000;
const TENANTS: u32 = 30;
const GROUPS: u32 = 5;
const SLOTS: u32 = 2_000;
const SLOTS_A_WORKER: u32 = 8;
/// Virtual milliseconds between rounds, as the coordinator's.
const TICK_MS: u64 = 200;
/// Virtual milliseconds in which all runs arrive.
const ARRIVALS_MS: u64 = 150_000;

/// Slots, milliseconds, and how many of ten runs are such, as in Kueue's own benchmark: many small ones beside few large.
const CLASSES: [(Priority, u32, u64, u32); 3] =
    [(Priority::Low, 1, 4_000, 7), (Priority::Normal, 5, 6_000, 2), (Priority::High, 20, 10_000, 1)];

struct Holder {
    tenant: String,
    slots: Vec<FreeSlot>,
    until_ms: u64,
}

#[derive(Default)]
struct Found {
    granted: u32,
    rounds: u32,
    time: Duration,
    longest: Duration,
    /// Virtual milliseconds waited, by class.
    waited: [Vec<u64>; 3],
    quota_breaches: u32,
    partly_held: u32,
    slots_given_twice: u32,
}

fn main() -> ExitCode {
    let runs = std::env::var("RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(RUNS);
    let shares: BTreeMap<String, Share> = (0..TENANTS).map(|index| (tenant(index), share(index))).collect();
    let found = simulate(&shares, arrivals(runs));
    report(&found);
    let broken = found.quota_breaches + found.partly_held + found.slots_given_twice;
    if broken > 0 || found.granted < runs { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn tenant(index: u32) -> String {
    format!("group-{}-queue-{index}", index % GROUPS)
}

fn share(index: u32) -> Share {
    Share { quota: Some(SLOTS / TENANTS * 2), weight: 1 + index % GROUPS }
}

/// By the time they come, first last.
fn arrivals(runs: u32) -> Vec<Waiting> {
    let class = |index: u32| match index % 10 {
        0..7 => CLASSES[0],
        7..9 => CLASSES[1],
        _ => CLASSES[2],
    };
    let run = |index: u32| {
        let (priority, slots, ..) = class(index);
        Waiting {
            run: RunId(format!("run-{index:08x}")),
            tenant: tenant(index / 10 % TENANTS),
            priority,
            since_ms: u64::from(index) * ARRIVALS_MS / u64::from(runs),
            min: slots,
            max: slots,
            claim: Claim::Start,
            avoid: BTreeSet::new(),
        }
    };
    (0..runs).rev().map(run).collect()
}

fn simulate(shares: &BTreeMap<String, Share>, mut to_come: Vec<Waiting>) -> Found {
    let (mut found, mut now_ms) = (Found::default(), 0);
    let mut free: BTreeSet<FreeSlot> = (0..SLOTS).map(place).collect();
    let (mut waiting, mut holders): (Vec<Waiting>, Vec<Holder>) = (Vec::new(), Vec::new());
    while !(to_come.is_empty() && waiting.is_empty()) {
        while to_come.last().is_some_and(|next| next.since_ms <= now_ms) {
            waiting.extend(to_come.pop());
        }
        for done in holders.extract_if(.., |holder| holder.until_ms <= now_ms) {
            free.extend(done.slots);
        }
        let mut held: BTreeMap<String, u32> = BTreeMap::new();
        for holder in &holders {
            *held.entry(holder.tenant.clone()).or_default() += count(holder.slots.len());
        }
        let places: Vec<FreeSlot> = free.iter().cloned().collect();
        let began = Instant::now();
        let mut verdicts = schedule(&Policy::default(), now_ms, shares, &held, &waiting, &places);
        let took = began.elapsed();
        found.time += took;
        found.longest = found.longest.max(took);
        found.rounds += 1;
        waiting.retain(|run| match verdicts.remove(&run.run) {
            Some(Verdict::Granted(slots)) => {
                found.check(shares, &mut held, &mut free, run, &slots);
                holders.push(found.hold(run, slots, now_ms));
                false
            }
            Some(Verdict::Waits { .. }) | None => true,
        });
        now_ms += TICK_MS;
    }
    found
}

fn place(slot: u32) -> FreeSlot {
    let worker = WorkerName(format!("worker-{:04}", slot / SLOTS_A_WORKER));
    FreeSlot { worker, slot: Slot(slot % SLOTS_A_WORKER) }
}

impl Found {
    /// SCHED-1, SCHED-2, and that no slot is given twice.
    fn check(
        &mut self,
        shares: &BTreeMap<String, Share>,
        held: &mut BTreeMap<String, u32>,
        free: &mut BTreeSet<FreeSlot>,
        run: &Waiting,
        slots: &[FreeSlot],
    ) {
        let has = held.entry(run.tenant.clone()).or_default();
        *has += count(slots.len());
        self.quota_breaches += u32::from(shares[&run.tenant].quota.is_some_and(|quota| *has > quota));
        self.partly_held += u32::from(count(slots.len()) < run.min);
        self.slots_given_twice += count(slots.iter().filter(|slot| !free.remove(slot)).count());
    }

    fn hold(&mut self, run: &Waiting, slots: Vec<FreeSlot>, now_ms: u64) -> Holder {
        self.granted += 1;
        let class = CLASSES.iter().position(|(priority, ..)| *priority == run.priority).unwrap_or(0);
        self.waited[class].push(now_ms - run.since_ms);
        Holder { tenant: run.tenant.clone(), slots, until_ms: now_ms + CLASSES[class].2 }
    }
}

fn count(things: usize) -> u32 {
    u32::try_from(things).unwrap_or(u32::MAX)
}

#[expect(clippy::print_stdout, reason = "a measurement is its output")]
fn report(found: &Found) {
    let rate = f64::from(found.granted) / found.time.as_secs_f64();
    let mean = |waits: &[u64]| waits.iter().sum::<u64>() / (waits.len() as u64).max(1);
    println!(
        "chaos scheduler p50={rate:.0} p99={rate:.0} n={} goal=>=1000 met={} unit=decisions/s rounds={} longest_round_ms={} \
         quota_breaches={} partly_held={} slots_given_twice={} mean_wait_ms_low={} mean_wait_ms_normal={} mean_wait_ms_high={}",
        found.granted,
        if rate >= 1000.0 { "yes" } else { "no" },
        found.rounds,
        found.longest.as_millis(),
        found.quota_breaches,
        found.partly_held,
        found.slots_given_twice,
        mean(&found.waited[0]),
        mean(&found.waited[1]),
        mean(&found.waited[2]),
    );
}
