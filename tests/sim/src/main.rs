//! `make sim`: many seeds, or one.

#![allow(clippy::print_stdout, reason = "its lines are what it is for")]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let first: u64 = arguments.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let count: u64 = arguments.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    }
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
                        println!("seed {seed}: {:?} simulated in {:?}, log {} lines {}", outcome.lasted, began.elapsed(), outcome.log.len(), outcome.digest());
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
