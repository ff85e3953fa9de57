//! Gangs that lose trainers and go on: whoever survives keeps its process and state, whoever comes copies it, and the end is the same.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use thaw_tests::process::{self, Process};
use thaw_tests::sandbox::{DEADLINE, Sandbox, text_spec};

/// Two stages, a mean of the weights, and evaluations in between; every tenth step all ranks compare all they hold.
const STAGES: &str = "strategy: custom
stages:
  - {name: head, thaw: [head], until: {max_steps: 100}}
  - {name: all, thaw: [head, '/[012]$/'], until: {max_steps: 900}}
stop_when_no_gain: false
eval_steps: 90
ema: {decay: 0.9}
verification: {digest_steps: 10}
";

/// The sizes of the gangs that have trained so far: one for each event that says so.
fn gangs(run: &Path) -> usize {
    let Ok(events) = fs::read_to_string(run.join("events.jsonl")) else { return 0 };
    let events = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let trains = |event: &Value| event["state"] == "RUNNING" && event["reason"] == "TRAINING";
    let generations: BTreeSet<u64> = events.filter(trains).filter_map(|event| event["generation"].as_u64()).collect();
    generations.len()
}

fn weights(summary: &Value) -> String {
    summary["weights_blake3"].as_str().unwrap().to_owned()
}

/// Kills the same run's trainers by `end` again and again: the others' ids stay, gangs grow again, and the weights are those of a run alone.
fn survives(end: impl Fn(u32)) {
    let alone = Sandbox::new();
    let undisturbed = weights(&alone.train_summary(&alone.spec(&text_spec(STAGES)), 1, &[]));

    let sandbox = Sandbox::new();
    let spec = sandbox.spec(&text_spec(STAGES));
    let reached = sandbox.path().join("reached");
    let hold = format!("forward@40={}", reached.display());
    let training = Process::start(sandbox.train_command(&spec, 4, &["--hold", &hold]).arg("-ojson"));
    let id = process::eventually("the held trainer's id", DEADLINE, || {
        fs::read_to_string(&reached).ok()?.trim().parse::<u32>().ok()
    });
    let run = sandbox.run_folder();
    let mut present: BTreeSet<u32> = process::trainers_below(training.id()).into_iter().collect();
    assert_eq!(present.len(), 4);
    for (loss, victim) in [Some(id), None].into_iter().enumerate() {
        let victim = victim.unwrap_or_else(|| *present.first().unwrap());
        assert!(present.remove(&victim));
        end(victim);
        // The survivors' gang, then that with another in the lost one's place.
        process::eventually("a gang of survivors and one that is whole", DEADLINE, || {
            (gangs(&run) > 2 * (loss + 1)).then_some(())
        });
        let now: BTreeSet<u32> = process::trainers_below(training.id()).into_iter().collect();
        assert!(now.is_superset(&present) && !now.contains(&victim), "{present:?} became {now:?}");
        assert_eq!(now.len(), 4);
        present = now;
    }
    let ended = training.wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(summary["state"], "SUCCEEDED");
    assert_eq!(summary["world_sizes"], serde_json::json!([4, 3, 4, 3, 4]));
    assert_eq!(weights(&summary), undisturbed);
}

#[test]
fn killed_trainers_leave_the_others_and_the_weights_as_they_were() {
    survives(process::kill_by_id);
}

/// What follows `after` in the message of an event of the run, up to the next `before`.
fn told(run: &Path, after: &str, before: &str) -> Option<String> {
    let events = fs::read_to_string(run.join("events.jsonl")).ok()?;
    let events = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let part = |event: Value| Some(event["message"].as_str()?.split_once(after)?.1.split_once(before)?.0.to_owned());
    events.filter_map(part).next()
}

/// AGENT-7, CULPRIT-1: which rank the others waited for, in which operation of which step.
#[test]
fn the_rank_that_a_gang_waited_for_is_named() {
    let sandbox = Sandbox::new();
    let spec = sandbox.spec(&text_spec(STAGES));
    let reached = sandbox.path().join("reached");
    let hold = format!("forward@40={}", reached.display());
    let training = Process::start(&mut sandbox.train_command(&spec, 4, &["--hold", &hold]));
    let id = process::eventually("the held trainer's id", DEADLINE, || {
        fs::read_to_string(&reached).ok()?.trim().parse::<u32>().ok()
    });
    process::stop_by_id(id);
    let run = sandbox.run_folder();
    let named = process::eventually("a name", DEADLINE, || told(&run, "generation 1 waited for ", ": "));
    // Its agent has found it out by itself.
    let silent = format!("{named}: the process has not answered its agent for ");
    let events = fs::read_to_string(run.join("events.jsonl")).unwrap();
    assert!(events.contains(&silent), "{silent:?} is not in {events}");
    let operation = told(&run, "3 other(s) came to reduce_shards_", ";").unwrap_or_else(|| panic!("{events}"));
    assert!(operation.ends_with(" of step 40 in stage 0"), "{operation}");
    let last = told(&run, "; its last was ", " (").unwrap_or_else(|| panic!("{events}"));
    let number = |text: &str| text.split(' ').find_map(|word| word.parse::<u64>().ok());
    assert_eq!(number(&last).map(|last| last + 1), number(&operation), "{last} {operation}");
    let logs = fs::read_to_string(run.join("logs.jsonl")).unwrap();
    assert_eq!(logs.matches("last operations: ").count(), 4, "{logs}");
    drop(training);
}

/// AGENT-6: a process that is stopped is as good as gone.
#[test]
fn a_stopped_trainer_is_declared_lost_and_the_others_go_on() {
    survives(process::stop_by_id);
}
