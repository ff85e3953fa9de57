//! The scheduler alone, in virtual time: 15,000 runs of 30 tenants in 5 groups of equal quota and rising weight, of 3
//! classes, on 2,000 slots. Who is asked for slots has given them up after [`GIVES_AFTER_MS`].
//!
//! `cargo run -p thaw-core --example scheduler` prints how many decisions the scheduler makes in a second of its own
//! time, and how often a law was broken. It ends with 1 where one was. `RUNS=N` takes another number of runs.
//! `scheduler_over_etcd`, beside the coordinator, does the same through the driver and a real etcd.

mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use thaw_core::gang::{self, FreeSlot};
use thaw_core::scheduler::{Claim, Decided, Give, Holder, Running, Verdict, Waiting, decide};
use thaw_proto::ids::RunId;
use workload::{Book, Job, TICK_MS, count};

const GIVES_AFTER_MS: u64 = 2 * TICK_MS;

/// The scheduler's own time.
#[derive(Default)]
struct Took {
    rounds: u32,
    all: Duration,
    longest: Duration,
}

/// Runs that were asked for slots, when they give them, and what.
type Giving = BTreeMap<RunId, (u64, Give)>;

fn main() -> ExitCode {
    let mut book = Book::new();
    let (mut took, mut giving, mut now_ms) = (Took::default(), Giving::new(), 0);
    while !book.is_over() {
        book.arrive(now_ms);
        for run in book.work() {
            giving.remove(&run);
            give(&mut book, &run, 0, now_ms);
        }
        let due: Vec<RunId> =
            giving.iter().filter(|(_, (at_ms, _))| *at_ms <= now_ms).map(|(run, _)| run.clone()).collect();
        for run in due {
            match giving.remove(&run) {
                Some((_, Give::Yield)) => give(&mut book, &run, 0, now_ms),
                Some((_, Give::Shrink { to })) => give(&mut book, &run, to as usize, now_ms),
                None => {}
            }
        }
        let decided = round(&book, &giving, now_ms, &mut took);
        for (run, verdict) in decided.verdicts {
            match verdict {
                Verdict::Granted(slots) => book.take(&run, slots, now_ms),
                Verdict::Waits { .. } => {}
            }
        }
        if let Some(reclaim) = &decided.reclaim {
            book.reclaimed(reclaim, now_ms);
            giving.extend(reclaim.from.iter().map(|(run, give)| (run.clone(), (now_ms + GIVES_AFTER_MS, *give))));
        }
        book.check(now_ms);
        now_ms += TICK_MS;
    }
    report(&book, &took);
    if book.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A run keeps `keeps` of its slots.
fn give(book: &mut Book, run: &RunId, keeps: usize, now_ms: u64) {
    let slots: Vec<FreeSlot> = book.jobs[run].slots.iter().cloned().collect();
    let kept = gang::keep(&slots, keeps);
    for slot in slots.iter().filter(|slot| !kept.contains(slot)) {
        book.give(run, slot, now_ms);
    }
}

/// One round, as the coordinator asks for it.
fn round(book: &Book, giving: &Giving, now_ms: u64, took: &mut Took) -> Decided {
    let waiting: Vec<Waiting> =
        book.jobs.values().filter(|job| !giving.contains_key(&job.run)).filter_map(|job| wants(job, now_ms)).collect();
    let holders = book.jobs.values().filter(|job| !job.waits() && !giving.contains_key(&job.run)).map(holds).collect();
    let coming = giving.iter().map(|(run, (_, give))| {
        let held = count(book.jobs[run].slots.len());
        match give {
            Give::Yield => held,
            Give::Shrink { to } => held.saturating_sub(*to),
        }
    });
    let (running, free, held) = (Running { holders, coming: coming.sum() }, book.free(), book.held());
    let began = Instant::now();
    let decided = decide(&book.policy, now_ms, &book.shares, &held, &waiting, &free, &running);
    let elapsed = began.elapsed();
    took.rounds += 1;
    took.all += elapsed;
    took.longest = took.longest.max(elapsed);
    decided
}

/// What a run asks for: to start, or to have more.
fn wants(job: &Job, now_ms: u64) -> Option<Waiting> {
    let held = count(job.slots.len());
    let (claim, since_ms, min) = match held {
        0 => (Claim::Start, job.since_ms, job.class.min),
        _ => (Claim::Growth, now_ms, 1),
    };
    (held < job.class.max).then(|| Waiting {
        run: job.run.clone(),
        tenant: job.tenant.clone(),
        priority: job.class.priority,
        since_ms,
        min,
        max: job.class.max - held,
        claim,
        avoid: BTreeSet::new(),
    })
}

fn holds(job: &Job) -> Holder {
    Holder {
        run: job.run.clone(),
        priority: job.class.priority,
        size: count(job.slots.len()),
        min: job.class.min,
        shrinks: true,
        queued_ms: job.since_ms,
        placed_ms: job.placed_ms,
    }
}

#[expect(clippy::print_stdout, reason = "a measurement is its output")]
fn report(book: &Book, took: &Took) {
    let rate = f64::from(book.decisions()) / took.all.as_secs_f64();
    println!(
        "chaos scheduler p50={rate:.0} p99={rate:.0} n={} goal=>=1000 met={} unit=decisions/s rounds={} longest_round_ms={} {}",
        book.decisions(),
        if rate >= 1000.0 { "yes" } else { "no" },
        took.rounds,
        took.longest.as_millis(),
        book.row(),
    );
}
