//! Runs whose frozen prefix is kept: it changes what is computed, never the weights.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::path::Path;
use thaw_tests::sandbox::{Sandbox, text_spec};

/// Three epochs in each of three stages: the head, and two thaws.
const STAGES: &str = "until: {max_epochs: 3}\nthaw_units: 2\nstop_when_no_gain: false\nlogging_steps: 1\n";

fn weights(summary: &Value) -> &str {
    summary["weights_blake3"].as_str().unwrap()
}

/// (computed, cached) samples of rank 0, by stage.
fn counts(run: &Path) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut stages: Vec<(u64, u64)> = Vec::new();
    for line in text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        if line["kind"] == "progress" {
            let stage = usize::try_from(line["stage"].as_u64().unwrap()).unwrap();
            stages.resize(stages.len().max(stage + 1), (0, 0));
            stages[stage].0 += line["prefix_computed"].as_u64().unwrap();
            stages[stage].1 += line["prefix_cached"].as_u64().unwrap();
        }
    }
    stages
}

/// The weights of a run, and what it computed and found.
fn run(sandbox: &Sandbox, workers: u32, more: &str) -> (String, Vec<(u64, u64)>) {
    let before = runs(sandbox);
    let summary = sandbox.train_summary(&sandbox.spec(&text_spec(&format!("{STAGES}{more}"))), workers, &[]);
    let new = runs(sandbox).into_iter().find(|run| !before.contains(run)).unwrap();
    (weights(&summary).to_owned(), counts(&new))
}

fn runs(sandbox: &Sandbox) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(sandbox.data_dir().join("runs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Every payload file of the disk tier.
fn payload_files(sandbox: &Sandbox) -> Vec<std::path::PathBuf> {
    let keys = fs::read_dir(sandbox.path().join("prefix-cache/disk")).into_iter().flatten().flatten();
    let files = keys.flat_map(|key| fs::read_dir(key.path()).into_iter().flatten().flatten().map(|file| file.path()));
    files.filter(|path| path.extension().is_some_and(|extension| extension == "data")).collect()
}

const ON_DISK: &str = "prefix_cache: {mode: required, memory_mib: 0}";

#[test]
fn every_sample_is_computed_once_for_all_stages_and_epochs() {
    let sandbox = Sandbox::new();
    let (_, stages) = run(&sandbox, 1, "prefix_cache: {mode: required}");
    // 240 samples: 144 to train on, 48 to evaluate; the head stage's test is its last one.
    let computed: u64 = stages.iter().map(|(computed, _)| computed).sum();
    assert!(stages[0].0 >= 192 && computed <= 240, "computed more than once: {stages:?}");
    assert_eq!(stages[1].0 + stages[2].0, computed - stages[0].0);
    assert!(stages[1].0 <= 48 && stages[2].0 == 0, "later stages start warm, but for the test: {stages:?}");
    assert!(stages.iter().all(|(_, cached)| *cached >= 2 * 144), "{stages:?}");
    assert!(memory_is_empty(&sandbox));
}

fn memory_is_empty(sandbox: &Sandbox) -> bool {
    let entries = fs::read_dir(sandbox.memory_tier()).unwrap();
    entries.flatten().all(|entry| entry.file_name() == "lock")
}

#[test]
fn kept_evicted_damaged_or_shared_the_weights_are_the_same() {
    let sandbox = Sandbox::new();
    let (kept, _) = run(&sandbox, 1, "");
    let (never_kept, counts) = run(&sandbox, 2, "prefix_cache: {memory_mib: 0, disk_mib: 0}");
    assert_eq!(never_kept, kept, "nothing is kept, and two trainers");
    assert!(counts.iter().all(|(computed, cached)| *computed > 0 && *cached == 0), "{counts:?}");
    let (on_disk, counts) = run(&sandbox, 4, ON_DISK);
    assert_eq!(on_disk, kept, "four trainers, on disk");
    assert!(counts.iter().any(|(_, cached)| *cached > 0));
    for path in payload_files(&sandbox) {
        let mut bytes = fs::read(&path).unwrap();
        (0..bytes.len()).step_by(5000).for_each(|at| bytes[at] ^= 1);
        fs::write(&path, bytes).unwrap();
    }
    let (damaged, counts) = run(&sandbox, 2, ON_DISK);
    assert_eq!(damaged, kept, "some rows were damaged");
    assert!(counts[0].0 > 0 && counts[0].1 > 0, "{counts:?}");
}

#[test]
fn another_run_on_the_same_backbone_and_data_computes_no_prefix() {
    let sandbox = Sandbox::new();
    let (first, _) = run(&sandbox, 2, ON_DISK);
    let head = "backbone: {graph: $FIXTURES/text.pt2, head: {hidden_sizes: [8]}}";
    let spec = text_spec(&format!("{STAGES}{ON_DISK}\nlearning_rate: 2e-3"))
        .replace("seed: 11", "seed: 12")
        .replace("backbone: {graph: $FIXTURES/text.pt2}", head);
    let before = runs(&sandbox);
    let summary = sandbox.train_summary(&sandbox.spec(&spec), 1, &[]);
    assert_ne!(weights(&summary), first);
    let new = runs(&sandbox).into_iter().find(|run| !before.contains(run)).unwrap();
    let stages = counts(&new);
    assert!(stages.iter().all(|(computed, cached)| *computed == 0 && *cached > 0), "{stages:?}");
}
