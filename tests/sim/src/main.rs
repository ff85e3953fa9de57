//! Simulates many seeds, each in a process of its own, so that nothing of one is left for the next and each can be played again
//! alone.
//!
//! ```text
//! thaw-sim FIRST COUNT [MOST]   many seeds, some of them twice; with MOST, then the mutation gate, at most so many seeds a bug
//! thaw-sim --seed N [MUTANT]    one seed, with its log, and with a bug where the build can plant any
//! ```

#![allow(clippy::print_stdout, reason = "its lines are what it is for")]

use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One seed in so many is simulated twice, and has to have one log.
const TWICE: u64 = 20;
/// Progress is said after so many seeds.
const SAY: u64 = 500;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|word| word.parse::<u64>().ok());
    if arguments.first().is_some_and(|word| word == "--seed") {
        return match number(1) {
            Some(seed) => one(seed, arguments.get(2).map(String::as_str)),
            None => usage(),
        };
    }
    let (Some(first), Some(count)) = (number(0), number(1)) else { return usage() };
    let violations = many(first, count);
    let (caught, planted) = number(2).map_or((0, 0), |most| gate(first, most));
    println!("sim seeds={count} violations={violations} mutants={caught}/{planted}");
    ExitCode::from(u8::from(violations > 0 || caught < planted))
}

fn usage() -> ExitCode {
    println!("usage: thaw-sim FIRST COUNT [MOST] | thaw-sim --seed N [MUTANT]");
    ExitCode::from(2)
}

/// In this process.
fn one(seed: u64, mutant: Option<&str>) -> ExitCode {
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().init();
    }
    if let Some(name) = mutant
        && !plant(name)
    {
        println!("{name} is no bug that this build can plant");
        return ExitCode::from(2);
    }
    let outcome = thaw_sim::simulate(seed);
    outcome.log.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: {:?} simulated, log {}", outcome.lasted, outcome.digest());
    outcome.violations.iter().for_each(|violation| println!("seed {seed}: {violation}"));
    ExitCode::from(u8::from(!outcome.violations.is_empty()))
}

#[cfg(feature = "mutants")]
fn plant(name: &str) -> bool {
    let known = thaw_mutants::ALL.iter().find(|known| **known == name).copied();
    thaw_mutants::plant(known);
    known.is_some()
}

#[cfg(not(feature = "mutants"))]
fn plant(_: &str) -> bool {
    false
}

/// What a process of its own says of a seed: the lines about the seed itself, and whether all was well.
fn apart(seed: u64, mutant: Option<&str>) -> (Vec<String>, bool) {
    let words = ["--seed".to_owned(), seed.to_string()].into_iter().chain(mutant.map(str::to_owned));
    let said = std::env::current_exe().and_then(|program| Command::new(program).args(words).output());
    match said {
        Ok(said) => {
            let text = String::from_utf8_lossy(&said.stdout).into_owned();
            let mut lines: Vec<String> =
                text.lines().filter(|line| line.starts_with("seed ")).map(str::to_owned).collect();
            if lines.is_empty() {
                lines.push(format!("seed {seed}: VIOLATION SIM: {}", String::from_utf8_lossy(&said.stderr)));
            }
            (lines, said.status.success())
        }
        Err(error) => (vec![format!("seed {seed}: VIOLATION SIM: {error}")], false),
    }
}

/// Works on all cores.
fn on_all_cores(work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(&work);
        }
    });
}

/// Simulates seeds; how many were violated.
fn many(first: u64, count: u64) -> u64 {
    let (next, violated, done) = (AtomicU64::new(first), AtomicU64::new(0), AtomicU64::new(0));
    on_all_cores(|| {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return;
            }
            let (lines, is_well) = apart(seed, None);
            let again = seed.is_multiple_of(TWICE).then(|| apart(seed, None).0);
            let differs = again.as_ref().is_some_and(|again| *again != lines);
            if differs {
                println!("seed {seed}: VIOLATION SIM-1: {lines:?}, and again: {again:?}");
            }
            if !is_well {
                lines.iter().for_each(|line| println!("{line}"));
                println!("seed {seed}: play it again with `make sim SEED={seed}`");
            }
            violated.fetch_add(u64::from(differs || !is_well), Ordering::Relaxed);
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(SAY) {
                eprintln!("sim: {done} of {count} seeds, {} violated", violated.load(Ordering::Relaxed));
            }
        }
    });
    violated.into_inner()
}

/// Plants each bug, and looks for a seed that notices it; how many were caught, of how many.
fn gate(first: u64, most: u64) -> (usize, usize) {
    if !thaw_mutants::AVAILABLE {
        return (0, 0);
    }
    let (next, caught) = (AtomicUsize::new(0), AtomicUsize::new(0));
    on_all_cores(|| {
        while let Some(name) = thaw_mutants::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
            let noticed = (first..first + most).find_map(|seed| {
                let (lines, is_well) = apart(seed, Some(name));
                (!is_well).then(|| lines.into_iter().find(|line| line.contains("VIOLATION")).unwrap_or_default())
            });
            match noticed {
                Some(line) => {
                    caught.fetch_add(1, Ordering::Relaxed);
                    println!("mutant {name}: {line}");
                }
                None => println!("mutant {name}: not caught by {most} seeds"),
            }
        }
    });
    (caught.into_inner(), thaw_mutants::ALL.len())
}
