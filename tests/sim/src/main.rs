//! `make sim`: many seeds, or one.

#![allow(clippy::print_stdout, reason = "its lines are what it is for")]

use std::process::ExitCode;
#[cfg(not(feature = "mutants"))]
use std::sync::atomic::AtomicU64;
#[cfg(feature = "mutants")]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let first: u64 = arguments.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let count: u64 = arguments.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    }
    #[cfg(feature = "mutants")]
    return gate(first, count);
    #[cfg(not(feature = "mutants"))]
    seeds(first, count)
}

/// Plants each bug in turn, and looks for a seed that notices.
#[cfg(feature = "mutants")]
fn gate(first: u64, most: u64) -> ExitCode {
    let (next, caught) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let planted = thaw_mutants::ALL;
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(name) = planted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    thaw_mutants::plant(Some(name));
                    let noticed = (first..first + most).find_map(|seed| {
                        let violation = thaw_sim::simulate(seed).violations.into_iter().next()?;
                        Some((seed, violation))
                    });
                    match noticed {
                        Some((seed, violation)) => {
                            caught.fetch_add(1, Ordering::Relaxed);
                            println!("mutant {name}: caught by seed {seed}: {violation}");
                        }
                        None => println!("mutant {name}: NOT caught by {most} seeds"),
                    }
                }
            });
        }
    });
    let caught = caught.load(Ordering::Relaxed);
    println!("sim mutants={caught}/{}", planted.len());
    ExitCode::from(u8::from(caught < planted.len()))
}

#[cfg(not(feature = "mutants"))]
fn seeds(first: u64, count: u64) -> ExitCode {
    let (next, violations) = (AtomicU64::new(first), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let began = std::time::Instant::now();
                    let outcome = thaw_sim::simulate(seed);
                    if count < 20 {
                        println!(
                            "seed {seed}: {:?} simulated in {:?}, log {} lines {}",
                            outcome.lasted,
                            began.elapsed(),
                            outcome.log.len(),
                            outcome.digest()
                        );
                    }
                    if count == 1 {
                        outcome.log.iter().for_each(|line| println!("{line}"));
                    }
                    for violation in &outcome.violations {
                        violations.fetch_add(1, Ordering::Relaxed);
                        println!("seed {seed}: {violation}");
                    }
                }
            });
        }
    });
    println!("sim seeds={count} violations={}", violations.load(Ordering::Relaxed));
    ExitCode::from(u8::from(violations.load(Ordering::Relaxed) > 0))
}
