//! Whole runs against PyTorch itself, across two thaws: plain loops for one trainer, DDP rebuilt at each stage for two.
//!
//! The reference reads the trace that the run leaves (samples, seeds, rates) and computes everything else by itself.
//! `THAW_BLESS=1 cargo test -p thaw-tests --test against_pytorch` writes the golden curves anew.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use thaw_tests::fixtures;
use thaw_tests::process::Process;
use thaw_tests::sandbox::{DEADLINE, Sandbox};

/// Three stages and 100 steps; the second and third begin from the best weights.
const STAGES: &str = "strategy: custom
stages:
  - {name: head, thaw: [head], until: {max_steps: 30}}
  - {name: top, thaw: [head, '/2$/'], until: {max_steps: 35}}
  - {name: all, thaw: [head, '/[12]$/'], until: {max_steps: 35}}
eval_steps: 10
verification: {trace: true, digest_steps: 1}";

/// Each batch runs whole, in its own shape, as in PyTorch.
const OWN_SHAPE: &str = "prefix_cache: {mode: off}";

fn text(more: &str) -> String {
    format!(
        "name: small-text
backbone: {{graph: $FIXTURES/text.pt2}}
data:
  train: {{path: $FIXTURES/texts.csv, format: csv, text: text, label: label}}
  split: {{train: 0.6, eval: 0.2, test: 0.2}}
  max_length: 16
global_batch_size: 16
seed: 11
{STAGES}
{more}
"
    )
}

fn image(more: &str) -> String {
    format!(
        "name: small-image
backbone: {{graph: $FIXTURES/image.pt2}}
data:
  train: {{path: $FIXTURES/images, format: image_folder}}
  split: {{train: 0.6, eval: 0.2, test: 0.2}}
  image: {{size: 16, mean: [0.5], std: [0.25]}}
global_batch_size: 32
memory_format: contiguous
seed: 11
{STAGES}
{more}
"
    )
}

/// A run with its trace.
struct Traced {
    sandbox: Sandbox,
}

impl Traced {
    fn run(spec: &str, workers: u32) -> Self {
        let sandbox = Sandbox::new();
        let summary = sandbox.train_summary(&sandbox.spec(spec), workers, &[]);
        assert_eq!(summary["steps"], 100, "{summary}");
        Self { sandbox }
    }

    /// What `script` finds when it follows the run's trace.
    fn follow(&self, script: &str, more: &[&str]) -> Value {
        let run = self.sandbox.run_folder();
        let output = self.sandbox.path().join("report.json");
        let mut command = Command::new(fixtures::python());
        command.env("PYTHONPATH", fixtures::root().join("deploy/export"));
        command.arg(fixtures::root().join("tests/reference").join(script)).arg(&run);
        command.arg("--weights").arg(run.join("trace/stage-2.safetensors")).arg("--output").arg(&output).args(more);
        let ended = Process::start(&mut command).wait(DEADLINE);
        assert!(ended.status.success(), "{script} {more:?} failed:\n{}", ended.stderr);
        serde_json::from_str(&fs::read_to_string(output).unwrap()).unwrap()
    }

    fn losses(&self) -> Vec<f64> {
        let lines = fs::read_to_string(self.sandbox.run_folder().join("trace/steps.jsonl")).unwrap();
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
    }
}

fn number(report: &Value, field: &str) -> f64 {
    report[field].as_f64().unwrap_or_else(|| panic!("{field} is no number in {report}"))
}

fn assert_within(report: &Value, bound: f64) {
    assert_eq!(report["steps"], 100);
    assert_eq!(report["weights_absent"], serde_json::json!([]));
    for field in ["losses_relative", "weights_relative"] {
        assert!(
            number(report, field) <= bound,
            "{field} is {} and may be {bound}: furthest {}",
            report[field],
            report["weights_furthest"]
        );
    }
}

fn assert_bitwise(report: &Value) {
    assert_eq!(report["steps"], 100);
    assert_eq!(report["losses_bitwise"], true, "losses are apart by {}", report["losses_relative"]);
    assert_eq!(
        report["weights_bitwise"], true,
        "weights are apart by {} at {}",
        report["weights_relative"], report["weights_furthest"]
    );
}

#[test]
fn one_trainer_equals_plain_pytorch_bit_for_bit() {
    let run = Traced::run(&text(OWN_SHAPE), 1);
    assert_bitwise(&run.follow("run_reference.py", &[]));
    // The comparison can fail: moments of another step.
    let wrong = run.follow("run_reference.py", &["--wrong-moments"]);
    assert_eq!(wrong["weights_bitwise"], false);
    assert!(number(&wrong, "losses_relative") > 1e-6, "{}", wrong["losses_relative"]);
}

#[test]
fn a_convolution_net_equals_plain_pytorch_and_its_frozen_batch_norm_stands_still() {
    let run = Traced::run(&image(&format!("optimizer: {{type: sgd}}\n{OWN_SHAPE}")), 1);
    assert_bitwise(&run.follow("run_reference.py", &[]));
    // The comparison can fail: batch norm of a frozen group that trains.
    let wrong = run.follow("run_reference.py", &["--train-frozen-batch-norm"]);
    assert_eq!(wrong["losses_bitwise"], false);
    assert!(number(&wrong, "losses_relative") > 1e-4, "{}", wrong["losses_relative"]);
}

#[test]
fn smoothing_class_weights_and_the_pull_to_the_start_equal_plain_pytorch_bit_for_bit() {
    let more = format!(
        "label_smoothing_factor: 0.1\nclass_weights: {{weights: [0.5, 1, 2, 1.25]}}\nl2_sp: {{}}\nlogical_shards: 2\n{OWN_SHAPE}"
    );
    let run = Traced::run(&text(&more), 1);
    assert_bitwise(&run.follow("run_reference.py", &[]));
}

#[test]
fn accumulated_micro_batches_equal_plain_pytorch_bit_for_bit() {
    let more =
        format!("gradient_accumulation_steps: 4\nclass_weights: [0.5, 1, 2, 1.25]\nlogical_shards: 2\n{OWN_SHAPE}");
    assert_bitwise(&Traced::run(&text(&more), 1).follow("run_reference.py", &[]));
}

/// The gradient of the parts is that of the whole, up to the order of sums.
#[test]
fn accumulation_changes_the_last_bits_only() {
    // Batch statistics would be those of other batches.
    let sgd = format!(
        "optimizer: {{type: sgd}}\nprecision: fp64\nbatch_norm: {{thawed_groups: frozen_statistics}}\n{OWN_SHAPE}"
    );
    let whole = Traced::run(&image(&sgd), 1);
    let parts = Traced::run(&image(&format!("gradient_accumulation_steps: 3\n{sgd}")), 1);
    for (whole, parts) in whole.losses().iter().zip(parts.losses()) {
        assert!((whole / parts - 1.0).abs() < 1e-9, "{whole} is not {parts}");
    }
}

/// Frozen prefixes in shapes of their own change the last bits, as any other batch shape does.
#[test]
fn a_cached_prefix_is_within_the_last_bits_of_plain_pytorch() {
    let run = Traced::run(&text("optimizer: {type: sgd}"), 1);
    let found = run.follow("run_reference.py", &[]);
    assert!(number(&found, "losses_relative") <= 1e-5, "{}", found["losses_relative"]);
    let run = Traced::run(&image("optimizer: {type: sgd}\nprefix_cache: {mode: required, chunk_size: 32}"), 1);
    assert_bitwise(&run.follow("run_reference.py", &[]));
}

#[test]
fn two_trainers_equal_ddp_rebuilt_at_each_stage_in_fp64() {
    let run = Traced::run(&text("workers: {max: 2}\nprecision: fp64"), 2);
    assert_within(&run.follow("ddp_reference.py", &[]), 1e-10);
    golden("text-fp64-adamw", &run.losses());
    // The comparison can fail: one group's all-reduce is skipped.
    let wrong = run.follow("ddp_reference.py", &["--skip-all-reduce", "encoder.layer.2"]);
    assert!(number(&wrong, "weights_relative") > 1e-6, "{}", wrong["weights_relative"]);
}

#[test]
fn two_trainers_equal_ddp_rebuilt_at_each_stage_in_fp32_sgd() {
    let run = Traced::run(&text("workers: {max: 2}\noptimizer: {type: sgd}"), 2);
    assert_within(&run.follow("ddp_reference.py", &[]), 1e-6);
}

#[test]
fn two_trainers_of_a_convolution_net_equal_ddp_in_fp64() {
    let run = Traced::run(&image("workers: {max: 2}\nprecision: fp64"), 2);
    assert_within(&run.follow("ddp_reference.py", &[]), 1e-10);
    golden("image-fp64-adamw", &run.losses());
}

/// Compares a loss curve with the one kept; 1e-8 leaves room for another machine's kernels in fp64.
fn golden(name: &str, losses: &[f64]) {
    let path: PathBuf = fixtures::root().join("tests/goldens").join(format!("{name}.json"));
    if std::env::var_os("THAW_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, serde_json::to_string_pretty(losses).unwrap() + "\n").unwrap();
    }
    let kept: Vec<f64> = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(kept.len(), losses.len());
    for (step, (kept, found)) in kept.iter().zip(losses).enumerate() {
        let apart = (kept - found).abs() / kept.abs();
        assert!(apart <= 1e-8, "{name}: step {step} has loss {found}, the golden curve {kept}");
    }
}
