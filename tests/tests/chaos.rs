//! `thaw chaos`: it inflicts what its seed says, measures it, finds the same weights and samples, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::time::Duration;
use thaw_tests::process::{Ended, Process};
use thaw_tests::sandbox::{Sandbox, text_spec};

/// A cluster starts twelve processes here, and a run is made twice.
const DEADLINE: Duration = Duration::from_secs(480);

fn chaos(sandbox: &Sandbox, spec: &str, arguments: &[&str]) -> Ended {
    let spec = sandbox.spec(&text_spec(spec));
    let folder = sandbox.path().join("cluster");
    let mut command = sandbox.thaw();
    command.arg("chaos").arg(spec).args(["--workers", "2", "-o", "json", "--folder"]).arg(folder).args(arguments);
    Process::start(&mut command).wait(DEADLINE)
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
    let arguments = ["--faults", faults, "--count", "3", "--every", "0", "--outage", "1", "--seed", "1"];
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
    // CHAOS-1
    assert!(!sandbox.path().join("cluster").exists(), "the cluster's folder is left");
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
