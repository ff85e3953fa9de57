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
/// This program as it was started, also where a build has replaced its file since.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// How a process ends that has seen a violation. Every other end but 0 says nothing of the seed.
const VIOLATED: u8 = 1;

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
    let Ok(outcome) = std::panic::catch_unwind(|| thaw_sim::simulate(seed)) else {
        println!("seed {seed}: VIOLATION SIM: it panicked");
        return ExitCode::from(VIOLATED);
    };
    outcome.log.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: {:?} simulated, log {}", outcome.lasted, outcome.digest());
    outcome.violations.iter().for_each(|violation| println!("seed {seed}: {violation}"));
    ExitCode::from(if outcome.violations.is_empty() { 0 } else { VIOLATED })
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

/// What a process of its own says of a seed.
#[derive(PartialEq, Eq)]
struct Said {
    /// Those about the seed itself.
    lines: Vec<String>,
    violated: bool,
}

/// Simulates a seed in a process of its own.
///
/// # Errors
/// Where that process did not get to a verdict.
fn apart(seed: u64, mutant: Option<&str>) -> Result<Said, String> {
    let words = ["--seed".to_owned(), seed.to_string()].into_iter().chain(mutant.map(str::to_owned));
    let said = Command::new(THIS_PROGRAM).args(words).output();
    let said = said.map_err(|error| format!("seed {seed} could not be simulated: {error}"))?;
    let text = String::from_utf8_lossy(&said.stdout);
    let lines = text.lines().filter(|line| line.starts_with("seed ")).map(str::to_owned).collect();
    match said.status.code() {
        Some(0) => Ok(Said { lines, violated: false }),
        Some(code) if code == i32::from(VIOLATED) => Ok(Said { lines, violated: true }),
        _ => Err(format!(
            "seed {seed} was not simulated to its end: {}; {text}{}",
            said.status,
            String::from_utf8_lossy(&said.stderr)
        )),
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
            let is_well = match simulate_checked(seed) {
                Ok(()) => true,
                Err(lines) => {
                    println!("{}\nseed {seed}: play it again with `make sim SEED={seed}`", lines.join("\n"));
                    false
                }
            };
            violated.fetch_add(u64::from(!is_well), Ordering::Relaxed);
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(SAY) {
                eprintln!("sim: {done} of {count} seeds, {} violated", violated.load(Ordering::Relaxed));
            }
        }
    });
    violated.into_inner()
}

/// Simulates a seed, and some of them twice; what is wrong, where something is.
fn simulate_checked(seed: u64) -> Result<(), Vec<String>> {
    let first = apart(seed, None).map_err(|broken| vec![broken])?;
    if seed.is_multiple_of(TWICE) {
        let again = apart(seed, None).map_err(|broken| vec![broken])?;
        if again != first {
            return Err(vec![format!("seed {seed}: VIOLATION SIM-1: {:?}, and again: {:?}", first.lines, again.lines)]);
        }
    }
    if first.violated { Err(first.lines) } else { Ok(()) }
}

/// Plants each bug, and looks for a seed that notices it; how many were caught, of how many.
fn gate(first: u64, most: u64) -> (usize, usize) {
    if !thaw_mutants::AVAILABLE {
        return (0, 0);
    }
    let (next, caught) = (AtomicUsize::new(0), AtomicUsize::new(0));
    on_all_cores(|| {
        while let Some(name) = thaw_mutants::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut broken = None;
            let noticed = (first..first + most).find_map(|seed| match apart(seed, Some(name)) {
                Ok(said) => said.violated.then_some(said.lines),
                Err(why) => {
                    broken = Some(why);
                    None
                }
            });
            match (noticed, broken) {
                (Some(lines), _) => {
                    caught.fetch_add(1, Ordering::Relaxed);
                    let line = lines.into_iter().find(|line| line.contains("VIOLATION"));
                    println!("mutant {name}: {}", line.unwrap_or_default());
                }
                (None, Some(why)) => println!("mutant {name}: not caught; {why}"),
                (None, None) => println!("mutant {name}: not caught by {most} seeds"),
            }
        }
    });
    (caught.into_inner(), thaw_mutants::ALL.len())
}
