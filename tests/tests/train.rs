//! Runs from one command to their end: what they report, that the number of workers does not matter, and that deaths do not either.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;
use thaw_tests::cluster::Cluster;
use thaw_tests::process::{self, Process};
use thaw_tests::sandbox::{DEADLINE, Sandbox, text_spec};

const STAGES: &str = "until: {max_epochs: 1}\nthaw_units: 2\nstop_when_no_gain: false\nverification: {digest_steps: 1}";

fn weights(summary: &Value) -> String {
    summary["weights_blake3"].as_str().unwrap().to_owned()
}

/// Whether a checkpoint's manifest is there.
fn has_manifest(run: &Path) -> bool {
    fs::read_dir(run.join("manifests")).is_ok_and(|mut entries| entries.next().is_some())
}

#[test]
fn a_run_reports_what_it_did() {
    let sandbox = Sandbox::new();
    let spec = sandbox
        .spec(&text_spec("until: {max_epochs: 3}\nthaw_units: 2\nlearning_rate: 5e-3\nstop_when_no_gain: false"));
    let summary = sandbox.train_summary(&spec, 2, &[]);
    assert_eq!(summary["state"], "SUCCEEDED");
    assert_eq!(summary["strategy"], "gradual_unfreezing");
    assert_eq!(summary["world_sizes"], serde_json::json!([2]));
    let stages = summary["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 3);
    assert_eq!(stages[0]["groups"], serde_json::json!(["head"]));
    // 144 training samples in batches of 16.
    assert_eq!(stages[0]["steps"], 27);
    assert_eq!(summary["steps"], 81);
    for stage in stages {
        assert!(stage["eval"]["loss"].as_f64().unwrap() > 0.0);
    }
    let test = &summary["test"];
    assert!(test["accuracy"].as_f64().unwrap() > 0.5, "four classes were not learnt: {test}");
    let model = summary["model"].as_str().unwrap().trim_start_matches("file://").to_owned();
    for file in ["model.pt2", "model.safetensors", "labels.json"] {
        assert!(Path::new(&model).join(file).is_file(), "{file} is missing from {model}");
    }
    let run = sandbox.run_folder();
    assert_eq!(
        fs::read_to_string(run.join("report/summary.json")).unwrap().trim(),
        serde_json::to_string_pretty(&summary).unwrap().trim()
    );
    for file in ["metrics.jsonl", "events.jsonl", "data/index.json"] {
        assert!(run.join(file).is_file(), "{file} is missing");
    }
}

#[test]
fn the_trained_archive_is_what_pytorch_loads() {
    let sandbox = Sandbox::new();
    let spec = sandbox.spec(&text_spec(STAGES));
    let summary = sandbox.train_summary(&spec, 1, &[]);
    let model = summary["model"].as_str().unwrap().trim_start_matches("file://").to_owned();
    let script = sandbox.file(
        "check.py",
        "import sys, torch, safetensors.torch as st
model = torch.export.load(sys.argv[1] + '/model.pt2')
saved = st.load_file(sys.argv[1] + '/model.safetensors')
state = model.state_dict
assert set(saved) == set(state), set(saved) ^ set(state)
for name in saved:
    assert torch.equal(saved[name], state[name]), name
ids = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])
logits = model.module()(ids, (ids != 0).long())
assert logits.shape == (2, 4), logits.shape
first = torch.export.load(sys.argv[2]).state_dict
assert all(name in saved for name in first), 'an original name is gone'
moved = [name for name in first if not torch.equal(first[name], saved[name])]
assert any('layer.2' in name for name in moved), moved
assert not any('embeddings' in name for name in moved), moved
",
    );
    let original = thaw_tests::fixtures::folder().join("text.pt2");
    let ended =
        Process::start(std::process::Command::new(thaw_tests::fixtures::python()).arg(script).arg(model).arg(original))
            .wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
}

#[test]
fn world_sizes_one_two_and_four_end_with_the_same_weights() {
    let hashes: Vec<String> = [1, 2, 4]
        .map(|workers| {
            let sandbox = Sandbox::new();
            let spec = sandbox.spec(&text_spec(STAGES));
            let summary = sandbox.train_summary(&spec, workers, &[]);
            assert_eq!(summary["world_sizes"], serde_json::json!([workers]));
            weights(&summary)
        })
        .into();
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(hashes[0], hashes[2]);
}

#[test]
fn twenty_steps_are_ten_a_death_and_ten() {
    let spec_text = text_spec(
        "strategy: full_fine_tuning\nuntil: {max_steps: 20}\ncheckpoint: {save_steps: 10}\nverification: {digest_steps: 1}",
    );
    let straight = Sandbox::new();
    let expected = weights(&straight.train_summary(&straight.spec(&spec_text), 1, &[]));

    let broken = Sandbox::new();
    let spec = broken.spec(&spec_text);
    let reached = broken.path().join("reached");
    let hold = format!("forward@13={}", reached.display());
    let mut first = Process::start(&mut broken.train_command(&spec, 1, &["--hold", &hold]));
    process::file(&reached, DEADLINE);
    let run = broken.run_folder();
    process::eventually("the checkpoint of step 10", DEADLINE, || has_manifest(&run).then_some(()));
    first.kill();

    let again = Process::start(broken.thaw().args(["up", "--workers", "1", "--listen", "127.0.0.1:0"]));
    let summary = run.join("report/summary.json");
    process::file(&summary, DEADLINE);
    again.terminate();
    let ended = again.wait(Duration::from_secs(30));
    assert!(ended.status.success(), "{}", ended.stderr);
    let found: Value = serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap();
    assert_eq!(found["state"], "SUCCEEDED");
    assert_eq!(found["steps"], 20);
    assert_eq!(weights(&found), expected);
}

/// A trainer killed at `point`, in the second stage (steps 9 to 17) or in the checkpoint at its end: the run goes on by itself to the same end.
fn survives(point: &str) {
    survives_in(STAGES, point);
}

fn survives_in(stages: &str, point: &str) {
    let text = text_spec(&format!("{stages}\ncheckpoint: {{save_steps: 4}}"));
    let sandbox = Sandbox::new();
    let spec = sandbox.spec(&text);
    let undisturbed = weights(&sandbox.train_summary(&spec, 2, &[]));

    let disturbed = Sandbox::new();
    let spec = disturbed.spec(&text);
    let reached = disturbed.path().join("reached");
    let hold = format!("{point}={}", reached.display());
    let training = Process::start(disturbed.train_command(&spec, 2, &["--hold", &hold]).arg("-ojson"));
    process::file(&reached, DEADLINE);
    let id = process::eventually("the held trainer's id", DEADLINE, || {
        fs::read_to_string(&reached).ok()?.trim().parse().ok()
    });
    process::kill_by_id(id);
    let ended = training.wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(summary["state"], "SUCCEEDED");
    let sizes: Vec<u64> = serde_json::from_value(summary["world_sizes"].clone()).unwrap();
    // The survivor went on alone, and with another where that came before the end.
    assert!(
        [&[2, 1][..], &[2, 1, 2]].contains(&sizes.as_slice()),
        "the gang was not formed anew exactly once: {sizes:?}"
    );
    assert_eq!(weights(&summary), undisturbed);
}

#[test]
fn a_death_in_forward_changes_nothing() {
    survives("forward@13");
}

#[test]
fn a_death_in_all_reduce_changes_nothing() {
    survives("all-reduce@13");
}

#[test]
fn a_death_in_the_update_changes_nothing() {
    survives("update@13");
}

/// Whether a deeper stage pays is decided as it is entered, and not again by those who survive its first step.
#[test]
fn a_death_in_a_stages_first_step_changes_nothing() {
    survives_in(&STAGES.replace("stop_when_no_gain: false", "stop_when_no_gain: true"), "forward@18");
}

#[test]
fn a_death_in_a_checkpoint_write_changes_nothing() {
    survives("checkpoint-write@18");
}

#[test]
fn a_suspended_run_resumes_to_the_same_end_and_a_cancelled_one_gives_its_workers_back() {
    let text = text_spec("strategy: full_fine_tuning\nuntil: {max_steps: 1500}\neval_steps: 500");
    let straight = Sandbox::new();
    let expected = weights(&straight.train_summary(&straight.spec(&text), 2, &[]));

    let cluster = Cluster::start(2);
    let name = cluster.submit("spec.yaml", &text);
    let state = |wanted: &str| {
        process::eventually(wanted, DEADLINE, || {
            let run = cluster.verb(&["get", &name]);
            (run["state"] == wanted).then_some(run)
        })
    };
    let _ = state("RUN_STATE_RUNNING");
    let _ = cluster.verb(&["suspend", &name]);
    let suspended = state("RUN_STATE_SUSPENDED");
    assert!(suspended["head"]["manifest"].is_string(), "a suspended run has no checkpoint: {suspended}");
    let _ = cluster.verb(&["resume", &name]);
    let ended = cluster.verb(&["watch", &name]);
    assert_eq!(ended["state"], "RUN_STATE_SUCCEEDED");
    assert_eq!(ended["attempt"], 2);
    assert_eq!(ended["result"]["weights_blake3"], expected.as_str());

    let second = cluster.submit("spec.yaml", &text);
    let cancelled = cluster.verb(&["cancel", &second]);
    assert_eq!(cancelled["state"], "RUN_STATE_CANCELLED");
    process::eventually("all workers free", DEADLINE, || {
        let workers = cluster.verb(&["workers"]);
        workers["workers"].as_array()?.iter().all(|worker| worker["free_slots"] == 1).then_some(())
    });
    cluster.stop();
}

/// TRAIN-4: a stage that only does harm leaves nothing behind, in any group.
#[test]
fn a_deeper_stage_without_gain_is_undone_to_the_last_bit() {
    let run = |stages: &str| {
        let sandbox = Sandbox::new();
        let spec = format!(
            "strategy: custom\nstop_when_no_gain: true\nuntil: {{max_epochs: 2}}\nlearning_rate: 5e-3\nstages:\n  - {{name: head, thaw: [head]}}\n{stages}"
        );
        let summary = sandbox.train_summary(&sandbox.spec(&text_spec(&spec)), 2, &[]);
        (weights(&summary), summary["reason"].as_str().unwrap().to_owned(), summary["test"].clone())
    };
    let (head, _, test) = run("");
    let harm = "  - {name: top, thaw: [head, '/2$/'], learning_rate: 3}\n";
    assert_eq!(run(harm), (head.clone(), "LAST_STAGE_ENDED".to_owned(), test.clone()));
    let later = "  - {name: all, thaw: [head, '/[12]$/'], learning_rate: 3}\n";
    assert_eq!(run(&format!("{harm}{later}")), (head, "NO_GAIN".to_owned(), test));
}

const SMALL_IMAGE: &str = "name: small-image
backbone: {graph: $FIXTURES/image.pt2}
data:
  train: {path: $FIXTURES/images, format: image_folder}
  split: {train: 0.6, eval: 0.2, test: 0.2}
  image: {size: 16, mean: [0.5], std: [0.25]}
global_batch_size: 32
workers: {min: 1, max: 2}
until: {max_epochs: 2}
stop_when_no_gain: false
verification: {digest_steps: 1}
seed: 11
";

/// The mean of the weights, and statistics recomputed on the target data, are part of what every rank agrees on and a death does not change.
#[test]
fn means_and_recomputed_statistics_do_not_depend_on_the_number_of_workers() {
    let run = |more: &str, workers: u32| {
        let sandbox = Sandbox::new();
        let spec = format!("{SMALL_IMAGE}thaw_units: 2\n{more}");
        weights(&sandbox.train_summary(&sandbox.spec(&spec), workers, &[]))
    };
    let options = "ema: {decay: 0.8}\nbatch_norm: {frozen_groups: recompute}\nclass_weights: {balanced: true}";
    let alone = run(options, 1);
    assert_eq!(run(options, 2), alone);
    let plain = run("", 2);
    for one in ["ema: {decay: 0.8}", "batch_norm: {frozen_groups: recompute}", "ema: {decay: 0.8, evaluate: false}"] {
        let changes = run(one, 2) != plain;
        assert_eq!(changes, !one.contains("evaluate: false"), "{one}");
    }
}

/// Where the mean of the weights is evaluated, a stage goes on from it: what it enters with scores as the best before did.
#[test]
fn a_stage_starts_from_the_mean_that_was_best() {
    let sandbox = Sandbox::new();
    let spec =
        "until: {max_epochs: 2}\nthaw_units: 2\nstop_when_no_gain: false\nema: {decay: 0.9}\nlearning_rate: 3e-3";
    let _ = sandbox.train_summary(&sandbox.spec(&text_spec(spec)), 2, &[]);
    let lines = fs::read_to_string(sandbox.run_folder().join("metrics.jsonl")).unwrap();
    let evaluations = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let (mut found, mut entered) = (Vec::<f64>::new(), 0);
    for evaluation in evaluations.filter(|line| line["kind"] == "evaluation") {
        let loss = evaluation["loss"].as_f64().unwrap();
        if evaluation["stage_step"] == 0 && evaluation["stage"] != 0 {
            // Kernels may choose another way where the graph is cut elsewhere.
            assert!(found.iter().any(|before| (loss / before - 1.0).abs() < 1e-5), "{loss} after {found:?}");
            entered += 1;
        }
        found.push(loss);
    }
    assert_eq!(entered, 2);
}

/// A stage may do so on entering, for the groups trained so far: what it finds is saved, so that a trainer that dies later changes nothing.
#[test]
fn a_stage_recomputes_statistics_of_the_groups_trained_so_far() {
    let spec = |recompute: bool| {
        let option = format!("recompute_batch_norm: {recompute}");
        format!(
            "{SMALL_IMAGE}batch_norm: {{thawed_groups: frozen_statistics}}\nstrategy: custom\ncheckpoint: {{save_steps: 1}}\nstages:\n  \
             - {{name: top, thaw: [head, blocks.2]}}\n  \
             - {{name: deeper, thaw: [head, blocks.2, blocks.1], on_enter: keep, until: {{max_epochs: 40}}, {option}}}\n"
        )
    };
    let run = |recompute: bool, workers: u32| {
        let sandbox = Sandbox::new();
        weights(&sandbox.train_summary(&sandbox.spec(&spec(recompute)), workers, &[]))
    };
    let alone = run(true, 1);
    assert_eq!(run(true, 2), alone);
    assert_ne!(run(false, 2), alone);

    let sandbox = Sandbox::new();
    let reached = sandbox.path().join("reached");
    // Alone, so that nobody else holds its state; late enough that a save has found the last one written.
    let hold = format!("forward@170={}", reached.display());
    let training =
        Process::start(sandbox.train_command(&sandbox.spec(&spec(true)), 1, &["--hold", &hold]).arg("-ojson"));
    process::file(&reached, Duration::from_secs(60));
    process::eventually("a checkpoint of the second stage", Duration::from_secs(60), || {
        let manifests = fs::read_dir(sandbox.run_folder().join("manifests")).ok()?;
        manifests.flatten().find(|entry| {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let manifest: Value = serde_json::from_str(&text).unwrap_or_default();
            manifest["position"]["stage"] == 1 && manifest["position"]["stage_step"].as_u64() > Some(0)
        })
    });
    process::kill_by_id(fs::read_to_string(&reached).unwrap().trim().parse().unwrap());
    let ended = training.wait(Duration::from_secs(120));
    assert!(ended.status.success(), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((weights(&summary), &summary["world_sizes"]), (alone, &serde_json::json!([1, 1])));
}
