//! The seeds that every `make test` simulates, each in a process of its own; and that a seed has one log (SIM-1).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output};

fn simulate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thaw-sim")).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// SIM-2, and of some of them SIM-1.
#[test]
fn three_hundred_and_twenty_seeds_keep_every_invariant() {
    let output = simulate(&["0", "320"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(text(&output), "sim seeds=320 violations=0 mutants=0/0\n");
}

/// The storm is one: what can happen does, and runs end every way there is.
#[test]
fn faults_bite_and_runs_end_every_way() {
    let logs: String = (0..60).map(|seed: u64| text(&simulate(&["--seed", &seed.to_string()]))).collect();
    let wanted = [
        "fault Crash",
        "fault Partition",
        "fault OneWay",
        "fault Hold",
        "fault Stop",
        "fault CutStore",
        "fault EndLeases",
        "dies with a torn blob",
        "nobody leads",
        "c0#2 leads",
        "c1#1 leads",
        "Succeeded LastStageEnded",
        "Cancelled UserRequest",
        "Failed NoProgress",
        "Suspended UserRequest",
        "Resizing TrainerLost",
        "takes over step",
        "is garbled",
        "Forming Scaled",
        "Preempting Preempted",
        "Pending Preempted",
    ];
    for wanted in wanted {
        assert!(logs.contains(wanted), "{wanted} happens in no seed");
    }
}

/// SIM-1, to the last line.
#[test]
fn a_seed_has_one_log() {
    for seed in ["1", "4", "20", "25", "102", "126"] {
        let (first, second) = (text(&simulate(&["--seed", seed])), text(&simulate(&["--seed", seed])));
        assert!(first.lines().count() > 5, "seed {seed} does something");
        assert_eq!(first, second, "seed {seed}");
    }
}

/// A bug counts as noticed only where a seed says so: a process that ends otherwise has noticed nothing.
#[test]
fn what_is_no_verdict_is_no_violation() {
    let output = simulate(&["--seed", "1", "no-such-bug"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(text(&output), "no-such-bug is no bug that this build can plant\n");
}

/// The feature that plants bugs is nobody's default, so no ordinary build has it.
#[test]
fn ordinary_builds_plant_nothing() {
    for manifest in ["Cargo.toml", "coordinator/Cargo.toml", "coordinator/core/Cargo.toml", "worker/Cargo.toml"] {
        let path = format!("{}/../../{manifest}", env!("CARGO_MANIFEST_DIR"));
        assert!(!std::fs::read_to_string(path).unwrap().contains("\"mutants\""), "{manifest} turns the feature on");
    }
    if !thaw_mutants::AVAILABLE {
        assert!(thaw_mutants::ALL.len() >= 20 && thaw_mutants::ALL.iter().all(|name| !thaw_mutants::planted(name)));
    }
}
