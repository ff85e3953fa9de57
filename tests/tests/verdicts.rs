//! Runs whose trainers fail by their own doing, and how that ends.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::path::Path;
use thaw_tests::fixtures;
use thaw_tests::process::{self, Process};
use thaw_tests::sandbox::{DEADLINE, Sandbox, copy_folder, events};

/// RUN-7: a file goes away while a gang of four trains. Whoever comes to its step fails, the others go on without, and come to it too: the third time
/// is the last. A trainer that somebody has killed before is not counted.
#[test]
fn a_sample_that_cannot_be_read_ends_the_run_by_its_step() {
    let sandbox = Sandbox::new();
    let images = sandbox.path().join("images");
    copy_folder(&fixtures::folder().join("images"), &images);
    let source = |path: &str| format!("{{path: {path}, format: image_folder}}");
    let spec = sandbox.spec(&format!(
        "name: small-image
backbone: {{graph: $FIXTURES/image.pt2}}
data:
  train: {}
  eval: {}
  test: {}
  image: {{size: 16, mean: [0.5], std: [0.25]}}
global_batch_size: 16
workers: {{min: 1, max: 4}}
strategy: full_fine_tuning
until: {{max_steps: 1000000}}
eval_steps: 1000000
logging_steps: 1
",
        source(&images.display().to_string()),
        source("$FIXTURES/images"),
        source("$FIXTURES/images"),
    ));
    let training = Process::start(sandbox.train_command(&spec, 4, &[]).arg("-ojson"));
    let trains = |run: &Path, gangs: usize| {
        let committed = events(run).iter().filter(|event| event["reason"] == "TRAINING").count();
        (committed >= gangs).then_some(())
    };
    let run = process::eventually("a gang that trains", DEADLINE, || {
        let run = fs::read_dir(sandbox.data_dir().join("runs")).ok()?.next()?.ok()?.path();
        trains(&run, 1).map(|()| run)
    });
    process::kill_by_id(process::trainers_below(training.id())[0]);
    process::eventually("a gang that is whole again", DEADLINE, || trains(&run, 3));
    fs::remove_file(images.join("apple/0000.png")).unwrap();

    let ended = training.wait(DEADLINE);
    assert_eq!(ended.status.code(), Some(3), "{}", ended.stderr);
    for word in ["STEP_FAILED", "3 times in a row", "0000.png"] {
        assert!(ended.stderr.contains(word), "`{word}` is missing:\n{}", ended.stderr);
    }
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&summary["state"], &summary["reason"]), (&"FAILED".into(), &"STEP_FAILED".into()));
    let failed: Vec<Value> = events(&run).into_iter().filter(|event| event["reason"] == "TRAINER_ERROR").collect();
    // The third is the run's end. There is one more where the step before was not yet known to be applied.
    assert!(failed.len() >= 2, "{failed:?}");
    assert!(failed.iter().all(|event| event["state"] == "FORMING"), "survivors go on: {failed:?}");
}
