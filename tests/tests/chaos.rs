//! `thaw chaos`: it inflicts what its seed says, measures it, finds the same weights and samples, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};
use thaw_tests::process::{Ended, Process};
use thaw_tests::sandbox::{Sandbox, text_spec};

/// A cluster starts twelve processes here, and a run is made twice.
const DEADLINE: Duration = Duration::from_secs(480);

fn chaos(sandbox: &Sandbox, spec: &str, arguments: &[&str]) -> Ended {
    started(sandbox, spec, arguments).wait(DEADLINE)
}

fn started(sandbox: &Sandbox, spec: &str, arguments: &[&str]) -> Process {
    let spec = sandbox.spec(&text_spec(spec));
    let folder = sandbox.path().join("cluster");
    let mut command = sandbox.thaw();
    command.arg("chaos").arg(spec).args(["--workers", "2", "-o", "json", "--folder"]).arg(folder).args(arguments);
    Process::start(&mut command)
}

/// Values of the row, with what belongs to it.
fn row<'a>(report: &'a Value, name: &str) -> (&'a Vec<Value>, String) {
    let rows = report["rows"].as_array().unwrap();
    let found = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}: {report:#}"));
    (found["values"].as_array().unwrap(), found["more"].to_string())
}

#[test]
fn faults_are_measured_and_change_neither_weights_nor_samples() {
    if thaw_tests::tool("etcd").is_none() {
        return;
    }
    let sandbox = Sandbox::new();
    let long = "strategy: full_fine_tuning\nuntil: {max_steps: 800}\neval_steps: 400\ncheckpoint: {save_steps: 10}";
    // The seed's order, of which a run that is faster than its faults sees the beginning.
    let faults = "kill-trainer,kill-leader,outage";
    let arguments = ["--faults", faults, "--count", "3", "--every", "0", "--outage", "1", "--reference-workers", "1"];
    let ended = chaos(&sandbox, long, &arguments);
    assert!(ended.status.success(), "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["problems"], serde_json::json!([]));
    assert_eq!(row(&report, "weights_equal").0, &[1.0]);
    let (ledger, more) = row(&report, "ledger");
    assert_eq!(ledger, &[0.0], "{more}");
    assert!(more.contains("\"800\""), "{more}");
    let (killed, more) = row(&report, "kill_trainer");
    assert!(killed.len() == 1 && more.contains("0/1") || more.contains("1/1"), "{killed:?} {more}");
    assert!(killed[0].as_f64().unwrap() >= row(&report, "kill_trainer.detected").0[0].as_f64().unwrap());
    let (kept, _) = row(&report, "kill_trainer.survivors");
    assert!(kept.iter().all(|share| *share == 1.0), "{kept:?}");
    // CHAOS-1
    assert!(!sandbox.path().join("cluster").exists(), "the cluster's folder is left");
}

#[test]
fn stages_change_under_a_kill_and_watches_that_are_resumed_see_each_event_once() {
    if thaw_tests::tool("etcd").is_none() {
        return;
    }
    let sandbox = Sandbox::new();
    let staged = "strategy: custom\nstop_when_no_gain: false\nstages:\n  - {name: head, thaw: [head], until: {max_steps: 150}}\n  \
                  - {name: top, thaw: [head, '/2$/'], until: {max_steps: 150}}\n  - {name: all, thaw: [head, '/.*/'], until: {max_steps: 150}}\n\
                  checkpoint: {save_steps: 10}";
    let faults = ["--faults", "kill-trainer,kill-leader", "--count", "2", "--every", "0", "--at", "stage-change"];
    let ended = chaos(&sandbox, staged, &[&faults[..], &["--watchers", "3"]].concat());
    assert!(ended.status.success(), "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let (pauses, more) = row(&report, "stage_change");
    assert!(pauses.len() == 2 && more.contains("3/3"), "{pauses:?} {more}");
    assert_eq!(row(&report, "weights_equal").0, &[1.0]);
    assert!(row(&report, "goodput").0[0].as_f64().unwrap() > 0.0);
    for name in ["watch.missed", "watch.repeated"] {
        let (values, more) = row(&report, name);
        assert_eq!(values, &[0.0, 0.0, 0.0], "{name}");
        assert!(!more.contains("[\"events\",\"0\"]"), "{more}");
    }
}

#[test]
fn a_link_is_cut_where_networks_can_be_made_and_nothing_is_left_of_them() {
    if thaw_tests::tool("etcd").is_none() {
        return;
    }
    let sandbox = Sandbox::new();
    let spec = "strategy: full_fine_tuning\nuntil: {max_steps: 800}\neval_steps: 400\ncheckpoint: {save_steps: 10}";
    let cut = ["--faults", "partition", "--count", "1", "--every", "0", "--no-reference"];
    let who = if nix::unistd::geteuid().is_root() { "root" } else { "a user" };
    let ended = chaos(&sandbox, spec, &cut);
    if ended.status.code() == Some(2) && ended.stderr.contains("no network namespaces") {
        eprintln!("skipped: as {who}: {}", ended.stderr);
        return;
    }
    eprintln!("networks were made as {who}");
    assert!(ended.status.success(), "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(row(&report, "partition.detected").0.len(), 1, "{report:#}");
    assert_eq!(row(&report, "ledger").0, &[0.0]);
    assert!(row(&report, "partition.survivors").0.iter().all(|share| *share == 1.0), "{report:#}");
    assert!(!sandbox.path().join("cluster").exists(), "the cluster's folder is left");
    // CHAOS-4: also where it is killed.
    let mut killed = started(&sandbox, spec, &cut);
    let end = Instant::now() + DEADLINE;
    until(end, || sandbox.path().join("cluster/worker-1.log").exists());
    killed.kill();
    until(end, || processes_in(sandbox.path()).is_empty());
}

fn until(end: Instant, mut condition: impl FnMut() -> bool) {
    while !condition() {
        assert!(Instant::now() < end, "it does not come");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Ids of those that were told of the folder when they were started.
fn processes_in(folder: &Path) -> Vec<String> {
    let folder = folder.to_str().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let arguments = |id: &str| std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
    ids.filter(|id| String::from_utf8_lossy(&arguments(id)).contains(folder)).collect()
}

#[test]
fn what_cannot_begin_is_said_at_once() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.path().join("cluster")).unwrap();
    let there = chaos(&sandbox, "until: {max_epochs: 1}", &[]);
    assert_eq!(there.status.code(), Some(2), "{}", there.stderr);
    assert!(there.stderr.contains("--folder") && there.stderr.contains("not there"), "{}", there.stderr);
    let unknown = chaos(&sandbox, "until: {max_epochs: 1}", &["--faults", "kill-everybody"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("kill-trainer"), "{}", unknown.stderr);
    let wrong = chaos(&sandbox, "until: {max_epoch: 1}", &[]);
    assert_eq!(wrong.status.code(), Some(2), "{}", wrong.stderr);
    assert!(wrong.stderr.contains("max_epochs"), "{}", wrong.stderr);
}
