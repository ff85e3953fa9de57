//! Runs that lose all their trainers at once: what a host has kept in memory is gone on from, and where that is gone too, the head.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;
use thaw_tests::process::{self, Process};
use thaw_tests::sandbox::{DEADLINE, Sandbox, text_spec};

/// The only checkpoints are those at the ends of stages: after this many updates, and at the end.
const FIRST_STAGE: u64 = 20;
const STEPS: u64 = 60;
/// Updates between copies in memory.
const EVERY: u64 = 4;
/// All trainers stand still here, in the second stage.
const HELD: u64 = 47;

fn spec() -> String {
    let second = STEPS - FIRST_STAGE;
    text_spec(&format!(
        "strategy: custom
stages:
  - {{name: head, thaw: [head], until: {{max_steps: {FIRST_STAGE}}}}}
  - {{name: all, thaw: [head, '/[012]$/'], until: {{max_steps: {second}}}}}
stop_when_no_gain: false
eval_steps: 15
ema: {{decay: 0.9}}
checkpoint: {{save_steps: 1000000, host_snapshot_steps: {EVERY}}}
verification: {{trace: true, digest_steps: 5}}
"
    ))
}

fn weights(summary: &Value) -> String {
    assert_eq!((&summary["state"], &summary["steps"]), (&"SUCCEEDED".into(), &STEPS.into()));
    summary["weights_blake3"].as_str().unwrap().to_owned()
}

fn undisturbed() -> &'static str {
    static WEIGHTS: OnceLock<String> = OnceLock::new();
    WEIGHTS.get_or_init(|| {
        let alone = Sandbox::new();
        weights(&alone.train_summary(&alone.spec(&spec()), 1, &[]))
    })
}

/// The states that the agents below a process hold, with their steps: a snapshot begins with its mark, and its fifth word is the step.
fn memory(id: u32) -> Vec<(PathBuf, u64)> {
    let files = process::agents_below(id).into_iter().flat_map(|agent| fs::read_dir(format!("/proc/{agent}/fd")));
    let state = |path: PathBuf| {
        let is_memory = fs::read_link(&path).ok()?.to_str()?.contains("memfd:thaw");
        let mut head = [0; 40];
        fs::File::open(&path).ok().filter(|_| is_memory)?.read_exact(&mut head).ok()?;
        head.starts_with(b"THAWSNAP").then(|| (path, u64::from_le_bytes(head[32..].try_into().unwrap())))
    };
    files.flatten().filter_map(|entry| state(entry.ok()?.path())).collect()
}

fn held(id: u32) -> Vec<u64> {
    memory(id).into_iter().map(|(_, step)| step).collect()
}

/// Takes away the hash of all that the agents below a process hold; how many that are.
fn damage(id: u32) -> usize {
    let take_hash =
        |path: &Path| fs::File::options().write(true).open(path).unwrap().write_all_at(&[0; 32], 64).unwrap();
    let all = memory(id);
    all.iter().for_each(|(path, _)| take_hash(path));
    all.len()
}

/// Starts a run that stands still in its second stage, with a copy of that stage in some agent's memory: of which step.
fn stand_still(sandbox: &Sandbox, workers: u32) -> (Process, u64) {
    let reached = sandbox.path().join("reached");
    let hold = format!("forward@{HELD}={}", reached.display());
    let spec = sandbox.spec(&spec());
    let training = Process::start(sandbox.train_command(&spec, workers, &["--hold", &hold]).arg("-ojson"));
    process::file(&reached, DEADLINE);
    let kept = process::eventually("a copy of the second stage", DEADLINE, || {
        held(training.id()).into_iter().max().filter(|step| *step > FIRST_STAGE)
    });
    (training, kept)
}

/// The steps of the trace, as they were written.
fn traced(run: &Path) -> Vec<u64> {
    let text = fs::read_to_string(run.join("trace/steps.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap()).collect()
}

/// Where the trace goes back, to which step. Who goes on from where it stands tells its last step twice, which is no way back.
fn went_back_to(steps: &[u64]) -> Vec<u64> {
    steps.windows(2).filter(|pair| pair[1] < pair[0]).map(|pair| pair[1]).collect()
}

/// VERIFY-3: each epoch has used every sample once; and no step is missing.
fn check_ledger(sandbox: &Sandbox) {
    let run = sandbox.run_folder();
    let mut command = sandbox.thaw();
    command.arg("verify").arg(run.file_name().unwrap()).arg("--data-dir").arg(sandbox.data_dir());
    let ended = Process::start(&mut command).wait(DEADLINE);
    assert!(ended.status.success(), "{}{}", ended.stdout, ended.stderr);
    let mut steps = traced(&run);
    steps.sort_unstable();
    steps.dedup();
    assert_eq!(steps, (0..STEPS).collect::<Vec<_>>());
}

/// KEEP-4, KEEP-5
fn survives_the_loss_of_all(workers: u32) {
    let sandbox = Sandbox::new();
    let (training, kept) = stand_still(&sandbox, workers);
    let trainers = process::trainers_below(training.id());
    assert_eq!(trainers.len(), workers as usize);
    trainers.into_iter().for_each(process::kill_by_id);
    let ended = training.wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(weights(&summary), undisturbed());
    // The last step before the copy is told again, and the head is never loaded.
    let back = went_back_to(&traced(&sandbox.run_folder()));
    let told_again = |step: &u64| (step + 1).is_multiple_of(EVERY) && (kept..=HELD).contains(&(step + 1));
    assert!(!back.is_empty() && back.iter().all(told_again), "{back:?}, and {kept} was kept");
    check_ledger(&sandbox);
}

#[test]
fn one_trainer_that_is_killed_goes_on_from_its_hosts_memory() {
    survives_the_loss_of_all(1);
}

#[test]
fn two_trainers_that_are_killed_go_on_from_their_hosts_memory() {
    survives_the_loss_of_all(2);
}

/// HSNAP-2, KEEP-5: nothing of it is used, and the run goes on as if there were none.
#[test]
fn a_damaged_copy_is_as_good_as_none() {
    let sandbox = Sandbox::new();
    let (training, _) = stand_still(&sandbox, 1);
    assert_eq!(damage(training.id()), 1);
    process::trainers_below(training.id()).into_iter().for_each(process::kill_by_id);
    // Where it was just being replaced.
    assert_eq!(damage(training.id()), 1);
    let ended = training.wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    assert_eq!(weights(&serde_json::from_str(&ended.stdout).unwrap()), undisturbed());
    let back = went_back_to(&traced(&sandbox.run_folder()));
    assert!(back.len() == 1 && [0, FIRST_STAGE].contains(&back[0]), "{back:?}");
}

/// HSNAP-3, AGENT-9: without its agent the memory is gone, and a run that has ended leaves none.
#[test]
fn without_the_agent_the_head_is_gone_on_from_and_an_ended_run_leaves_no_memory() {
    let sandbox = Sandbox::new();
    let (mut training, _) = stand_still(&sandbox, 1);
    let run = sandbox.run_folder();
    training.kill();

    let again = Process::start(sandbox.thaw().args(["up", "--workers", "1", "--listen", "127.0.0.1:0"]));
    let summary = run.join("report/summary.json");
    process::file(&summary, DEADLINE);
    let found: Value = serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap();
    assert_eq!(weights(&found), undisturbed());
    let back = went_back_to(&traced(&run));
    assert!(back.len() == 1 && [0, FIRST_STAGE].contains(&back[0]), "{back:?}");
    assert_eq!(process::agents_below(again.id()).len(), 1);
    assert_eq!(held(again.id()), Vec::<u64>::new());
    again.terminate();
    assert!(again.wait(Duration::from_secs(30)).status.success());
    check_ledger(&sandbox);
}
