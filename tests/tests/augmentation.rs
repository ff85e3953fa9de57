//! Runs on images that change at random: the changes follow from seed, sample and view, so nothing else moves a weight.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::path::Path;
use thaw_tests::process;
use thaw_tests::sandbox::{DEADLINE, Sandbox};

/// 144 samples to train on in two shards; batches and chunks of twelve a shard, so shapes are equal with and without a cache.
fn spec(more: &str) -> String {
    format!(
        "name: small-image
backbone: {{graph: $FIXTURES/image.pt2}}
data:
  train: {{path: $FIXTURES/images, format: image_folder}}
  split: {{train: 0.6, eval: 0.2, test: 0.2}}
  image:
    size: 16
    mean: [0.5]
    std: [0.25]
    augmentation:
      random_resized_crop: {{scale: [0.6, 1]}}
      horizontal_flip: 0.5
      color_jitter: {{brightness: 0.3, contrast: 0.3}}
      random_erasing: {{probability: 0.3}}
global_batch_size: 24
logical_shards: 2
workers: {{min: 1, max: 2}}
strategy: custom
stages:
  - {{name: head, thaw: [head], until: {{max_epochs: 5}}}}
  - {{name: upper, thaw: [head, '/2$/'], until: {{max_epochs: 3}}}}
logging_steps: 1
verification: {{digest_steps: 1, trace: true}}
seed: 11
{more}
"
    )
}

const KEPT: &str = "prefix_cache: {mode: required, chunk_size: 12, views: 2}";

struct Run {
    weights: String,
    /// (computed, cached) samples of rank 0, by stage and epoch.
    counts: Vec<Vec<(u64, u64)>>,
    /// Of each step.
    views: Vec<Value>,
    losses: Vec<f64>,
}

fn run(sandbox: &Sandbox, spec: &str, workers: u32) -> Run {
    let before = runs(sandbox);
    let summary = sandbox.train_summary(&sandbox.spec(spec), workers, &[]);
    let folder = runs(sandbox).into_iter().find(|run| !before.contains(run)).unwrap();
    found(&summary, &folder)
}

fn found(summary: &Value, folder: &Path) -> Run {
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(folder.join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let mut counts = vec![vec![(0, 0); 5], vec![(0, 0); 3]];
    for line in lines("metrics.jsonl").iter().filter(|line| line["kind"] == "progress") {
        // Six steps an epoch; evaluations at its end are counted with the next one's first step.
        let epoch = (line["stage_step"].as_u64().unwrap() - 1) / 6;
        let count = &mut counts[line["stage"].as_u64().unwrap() as usize][epoch as usize];
        count.0 += line["prefix_computed"].as_u64().unwrap();
        count.1 += line["prefix_cached"].as_u64().unwrap();
    }
    let steps = lines("trace/steps.jsonl");
    Run {
        weights: summary["weights_blake3"].as_str().unwrap().to_owned(),
        counts,
        views: steps.iter().map(|step| step["view"].clone()).collect(),
        losses: steps.iter().map(|step| step["loss"].as_f64().unwrap()).collect(),
    }
}

fn runs(sandbox: &Sandbox) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(sandbox.data_dir().join("runs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn cached_or_not_and_with_any_number_of_workers_the_weights_are_the_same() {
    let sandbox = Sandbox::new();
    let kept = run(&sandbox, &spec(KEPT), 1);
    let turns = |epochs: std::ops::Range<u64>| epochs.flat_map(|epoch| std::iter::repeat_n(Value::from(epoch % 2), 6));
    assert_eq!(kept.views, turns(0..8).collect::<Vec<_>>());
    // 144 of each view; the 48 of the evaluation before the first step, which are kept too.
    let computed: Vec<u64> = kept.counts[0].iter().map(|(computed, _)| *computed).collect();
    assert_eq!(computed, [48 + 144, 144, 0, 0, 0], "{:?}", kept.counts);
    assert!(kept.counts[0][2..].iter().all(|(_, cached)| *cached == 144 + 48), "{:?}", kept.counts);

    let uncached = run(&sandbox, &spec("prefix_cache: {mode: 'off', views: 2}"), 2);
    assert_eq!((uncached.weights, uncached.losses), (kept.weights.clone(), kept.losses), "no cache, two workers");
    let never_kept = KEPT.replace("views", "memory_mib: 0, disk_mib: 0, views");
    assert_eq!(run(&sandbox, &spec(&never_kept), 2).weights, kept.weights, "no room, two workers");
}

#[test]
fn without_views_every_epoch_has_its_own_and_nothing_of_it_is_kept() {
    let sandbox = Sandbox::new();
    let fresh = KEPT.replace(", views: 2", "");
    let alone = run(&sandbox, &spec(&fresh), 1);
    assert_eq!(
        alone.views.iter().step_by(6).map(|view| view.as_u64().unwrap()).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    let computed: Vec<u64> = alone.counts[0].iter().map(|(computed, _)| *computed).collect();
    assert_eq!(computed, [48 + 144, 144, 144, 144, 144], "{:?}", alone.counts);
    assert_eq!(alone.counts[0][1].1, 48, "evaluations are kept all the same: {:?}", alone.counts);
    let two = run(&sandbox, &spec(&fresh), 2);
    assert_eq!((two.weights, two.losses), (alone.weights, alone.losses.clone()));
    let off = run(&sandbox, &spec("prefix_cache: {mode: 'off'}"), 1);
    assert_eq!(off.losses, alone.losses);
    let plain: String = spec(&fresh)
        .lines()
        .filter(|line| !line.starts_with("      ") && !line.contains("augmentation:"))
        .collect::<Vec<_>>()
        .join("\n");
    let plain = run(&sandbox, &plain, 1);
    assert_eq!(plain.views, vec![Value::Null; 48]);
    assert_ne!(plain.losses[0], alone.losses[0], "augmentation changes what is trained on");
}

#[test]
fn a_killed_trainer_finds_the_views_it_had() {
    let undisturbed = Sandbox::new();
    let more = format!("{KEPT}\ncheckpoint: {{save_steps: 4}}");
    let expected = run(&undisturbed, &spec(&more), 2).weights;

    let disturbed = Sandbox::new();
    let path = disturbed.spec(&spec(&more));
    let reached = disturbed.path().join("reached");
    // In the third epoch, which reads the first view again.
    let hold = format!("forward@15={}", reached.display());
    let running = process::Process::start(disturbed.train_command(&path, 2, &["--hold", &hold]).arg("-ojson"));
    process::file(&reached, DEADLINE);
    let id = process::eventually("the held trainer's id", DEADLINE, || {
        fs::read_to_string(&reached).ok()?.trim().parse().ok()
    });
    process::kill_by_id(id);
    let ended = running.wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(summary["weights_blake3"], expected.as_str());
    let sizes: Vec<u64> = serde_json::from_value(summary["world_sizes"].clone()).unwrap();
    // The survivor went on alone, and with another where that came before the end.
    assert!([&[2, 1][..], &[2, 1, 2]].contains(&sizes.as_slice()), "{sizes:?}");
}
