//! What a run leaves in storage: each state once, written in shares, and enough to go on from.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thaw_tests::process::{self, Ended, Process};
use thaw_tests::sandbox::{Sandbox, text_spec};

/// The head, then a stage that never pays: its best weights stay the head's.
const HARMED: &str = "strategy: custom\nstop_when_no_gain: false\nuntil: {max_epochs: 2}\nlearning_rate: 5e-3\nlr_scheduler: {type: constant}\neval_steps: 50\n\
stages:\n  - {name: head, thaw: [head]}\n  - {name: top, thaw: [head, '/2$/'], learning_rate: 300, until: {max_steps: 200}}\n";

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Every manifest of a run, oldest first.
fn manifests(run: &Path) -> Vec<Value> {
    let mut paths = files(&run.join("manifests"));
    paths.sort();
    paths.iter().map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap()).collect()
}

/// The blobs that a list of groups names.
fn blobs(groups: &Value) -> Vec<(String, u64)> {
    let groups = groups.as_array().into_iter().flatten();
    let named = groups.flat_map(|group| [&group["weights"], &group["optimizer"]]).filter(|blob| blob.is_object());
    named.map(|blob| (blob["blake3"].as_str().unwrap().to_owned(), blob["bytes"].as_u64().unwrap())).collect()
}

fn bytes(groups: &Value) -> u64 {
    blobs(groups).iter().map(|(_, bytes)| bytes).sum()
}

#[test]
fn each_state_is_stored_once_and_groups_that_never_trained_not_at_all() {
    let sandbox = Sandbox::new();
    let spec = "until: {max_epochs: 10}\nthaw_units: 2\nstop_when_no_gain: false\ncheckpoint: {save_steps: 3}\n";
    let summary = sandbox.train_summary(&sandbox.spec(&text_spec(spec)), 3, &[]);
    assert_eq!(summary["state"], "SUCCEEDED");
    let run = sandbox.run_folder();
    let manifests = manifests(&run);
    // 270 updates and three stage ends; a save may be skipped while the last is written.
    assert!(manifests.len() > 5, "{}", manifests.len());
    let mut named = BTreeSet::new();
    for manifest in &manifests {
        for groups in [&manifest["groups"], &manifest["best_groups"]] {
            for (hash, bytes) in blobs(groups) {
                let blob = run.join("blobs").join(&hash[..2]).join(&hash);
                assert_eq!(fs::metadata(&blob).unwrap().len(), bytes, "{}", blob.display());
                named.insert(blob);
            }
        }
    }
    // None is old enough to be swept, so whatever was written is named.
    assert_eq!(files(&run.join("blobs")).into_iter().collect::<BTreeSet<_>>(), named);
    assert_eq!(files(&run.join("parts")), Vec::<PathBuf>::new());

    let of_stage = |stage: u64| manifests.iter().rfind(|manifest| manifest["position"]["stage"] == stage).unwrap();
    let (head, last) = (of_stage(0), of_stage(2));
    assert_eq!(blobs(&head["groups"]).len(), 2, "the head's weights and its optimizer state");
    assert!(20 * bytes(&head["groups"]) < bytes(&last["groups"]));
    assert_eq!(last["world_size"], 3);
    // No stage goes on from the last one's best weights, so they are kept without their optimizer state, unlike an earlier one's.
    let moments = |manifest: &Value, part: &str| {
        let groups = manifest[part].as_array().unwrap().iter();
        groups.filter(|group| group["optimizer"].is_object()).count()
    };
    assert_eq!((moments(head, "best_groups"), moments(last, "best_groups")), (1, 0));
    assert!(moments(last, "groups") > 1);
}

/// The best weights of a group that has thawed since they were taken are those the run began with, also after a restart.
#[test]
fn a_run_that_resumes_in_a_harmful_stage_still_ends_with_the_best_weights() {
    let undisturbed = Sandbox::new();
    let spec = text_spec(&format!("{HARMED}checkpoint: {{save_steps: 2, host_snapshot_steps: 0}}\n"));
    let expected = undisturbed.train_summary(&undisturbed.spec(&spec), 1, &[]);
    let stages = expected["stages"].as_array().unwrap();
    let first = stages[0]["steps"].as_u64().unwrap();
    let last = manifests(&undisturbed.run_folder()).pop().unwrap();
    assert_eq!(last["tracker"]["best"]["position"]["stage"], 0, "the second stage does harm");

    // A trainer that is alone leaves nobody who holds its state.
    let disturbed = Sandbox::new();
    let reached = disturbed.path().join("reached");
    // Late enough that a save has found the last one written.
    let hold = format!("forward@{}={}", first + 150, reached.display());
    let training = Process::start(disturbed.train_command(&disturbed.spec(&spec), 1, &["--hold", &hold]).arg("-ojson"));
    process::file(&reached, Duration::from_secs(60));
    let of_second =
        |manifest: &Value| manifest["position"]["stage_step"].as_u64() > Some(0) && manifest["position"]["stage"] == 1;
    process::eventually("a checkpoint of the second stage", Duration::from_secs(60), || {
        manifests(&disturbed.run_folder()).iter().any(of_second).then_some(())
    });
    process::kill_by_id(fs::read_to_string(&reached).unwrap().trim().parse().unwrap());
    let ended = training.wait(Duration::from_secs(120));
    assert!(ended.status.success(), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(summary["world_sizes"], serde_json::json!([1, 1]), "the gang was not formed anew exactly once");
    assert_eq!(summary["weights_blake3"], expected["weights_blake3"]);
}

fn verify(sandbox: &Sandbox, output: &str) -> Ended {
    let run = sandbox.run_folder();
    let mut command = sandbox.thaw();
    command
        .arg("verify")
        .arg(run.file_name().unwrap())
        .args(["--output", output, "--data-dir"])
        .arg(sandbox.data_dir());
    Process::start(&mut command).wait(Duration::from_secs(60))
}

/// `thaw verify` of the only run: exit code, document, stderr.
fn verified(sandbox: &Sandbox) -> (Option<i32>, Value, String) {
    let ended = verify(sandbox, "json");
    (ended.status.code(), serde_json::from_str(&ended.stdout).unwrap_or_default(), ended.stderr)
}

#[test]
fn a_runs_record_is_checked_again_beside_its_plan() {
    let sandbox = Sandbox::new();
    // Long enough that some save of each stage finds the last one written.
    let spec = "until: {max_epochs: 10}\nthaw_units: 2\nstop_when_no_gain: false\ncheckpoint: {save_steps: 3}\n\
                logging_steps: 1\nverification: {trace: true}\n";
    let summary = sandbox.train_summary(&sandbox.spec(&text_spec(spec)), 2, &[]);
    assert_eq!(summary["state"], "SUCCEEDED");
    let (code, found, errors) = verified(&sandbox);
    assert_eq!(code, Some(0), "{errors}");
    let details: Vec<&str> =
        found["checks"].as_array().unwrap().iter().map(|check| check["detail"].as_str().unwrap()).collect();
    assert!(
        details.contains(&"30 whole epochs of the trace") && details.contains(&"3 stages have ended"),
        "{details:?}"
    );
    for stage in found["stages"].as_array().unwrap() {
        for what in ["gradient_bytes", "optimizer_bytes", "checkpoint_bytes", "memory_bytes", "step_seconds"] {
            let [planned, actual] = ["planned", "actual"].map(|key| stage[what][key].as_f64());
            assert!(planned > Some(0.0) && actual > Some(0.0), "{what} of {stage}");
        }
    }
    // The first two tell how fast the machine is; the third is a prediction.
    let calibrate: Vec<&Value> = found["stages"].as_array().unwrap().iter().map(|stage| &stage["calibrates"]).collect();
    assert_eq!(calibrate, [true, true, false]);
    let table = verify(&sandbox, "table").stdout;
    assert!(table.contains("planned") && table.contains("measured"), "{table}");
    for (what, rows) in [("memory ", 3), ("checkpoint ", 3), ("step (calibrates) ", 2), ("step ", 3)] {
        assert_eq!(table.matches(what).count(), rows, "{what} in {table}");
    }

    // A frozen group that changed, a sample used twice, a blob that is another.
    let run = sandbox.run_folder();
    let steps = run.join("trace/steps.jsonl");
    let mut lines: Vec<Value> =
        fs::read_to_string(&steps).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines[0]["shards"][0]["samples"] = lines[1]["shards"][0]["samples"].clone();
    fs::write(&steps, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let (code, _, errors) = verified(&sandbox);
    assert!(code == Some(1) && errors.contains("stage 0, epoch 0 used 4 samples twice"), "{errors}");

    let mut paths = files(&run.join("manifests"));
    paths.sort();
    let mut first: Value = serde_json::from_slice(&fs::read(&paths[0]).unwrap()).unwrap();
    let head =
        first["groups"].as_array().unwrap().iter().find(|group| group["weights"].is_object()).unwrap()["weights"]
            .clone();
    first["groups"][0]["weights"] = head.clone();
    fs::write(&paths[0], first.to_string()).unwrap();
    let (code, _, errors) = verified(&sandbox);
    assert!(code == Some(1) && errors.contains("and no stage in between trains it"), "{errors}");

    let hash = head["blake3"].as_str().unwrap();
    let blob = run.join("blobs").join(&hash[..2]).join(hash);
    fs::write(&blob, b"other").unwrap();
    let (code, _, errors) = verified(&sandbox);
    assert!(code == Some(1) && errors.contains(&format!("{hash} has 5 bytes that hash to")), "{errors}");
    fs::remove_file(run.join("plan.json")).unwrap();
    let (code, _, errors) = verified(&sandbox);
    assert!(code == Some(2) && errors.contains("plan.json cannot be read"), "{errors}");
}

#[test]
fn a_rate_suggests_itself_where_the_loss_falls() {
    let sandbox = Sandbox::new();
    let spec = sandbox.spec(&text_spec("until: {max_epochs: 2}"));
    let mut command = sandbox.thaw();
    command.arg("lr-find").arg(&spec).args(["--workers", "2", "-ojson", "--data-dir"]).arg(sandbox.data_dir());
    let ended = Process::start(&mut command).wait(Duration::from_secs(120));
    assert!(ended.status.success(), "{}", ended.stderr);
    let found: Value = serde_json::from_str(&ended.stdout).unwrap();
    let points = found["points"].as_array().unwrap();
    let rate = found["learning_rate"].as_f64().unwrap();
    assert!(rate > 1e-6 && rate < 10.0, "{rate}");
    assert!(points.len() > 50 && points.iter().any(|point| point["learning_rate"] == rate));
    let ratio = points[1]["learning_rate"].as_f64().unwrap() / points[0]["learning_rate"].as_f64().unwrap();
    assert!((ratio - 10_f64.powf(8.0 / 99.0)).abs() < 1e-9, "{ratio}");

    let mut command = sandbox.thaw();
    command.arg("lr-find").arg(&spec).args(["--stage", "none", "--data-dir"]).arg(sandbox.data_dir());
    let refused = Process::start(&mut command).wait(Duration::from_secs(60));
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.contains("--stage none: no such stage; the plan has head"), "{}", refused.stderr);
}
