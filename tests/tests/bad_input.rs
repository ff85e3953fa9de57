//! Bad input: each mistake gives one clear error and a non-zero exit, and leaves nothing half-written.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;
use thaw_tests::fixtures;
use thaw_tests::process::{Ended, Process};
use thaw_tests::sandbox::{DEADLINE, Sandbox, copy_folder, text_spec};

/// Every line of the error, without its prefix.
fn errors(ended: &Ended) -> Vec<&str> {
    assert!(!ended.status.success(), "bad input was accepted:\n{}", ended.stdout);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "", "an error belongs on stderr");
    ended.stderr.lines().filter_map(|line| line.strip_prefix("error: ")).collect()
}

/// Trains `spec` and expects one error that holds all of `words`, and no run left behind.
fn refused(sandbox: &Sandbox, spec: &str, words: &[&str]) {
    let ended = sandbox.train(&sandbox.spec(spec), 1, &[]);
    let found = errors(&ended);
    assert_eq!(found.len(), 1, "expected one error:\n{}", ended.stderr);
    for word in words {
        assert!(found[0].contains(word), "`{word}` is missing from: {}", found[0]);
    }
    let runs = sandbox.data_dir().join("runs");
    let left = fs::read_dir(&runs).map(|entries| entries.count()).unwrap_or(0);
    assert_eq!(left, 0, "a refused run left files in {}", runs.display());
}

fn with(from: &str, to: &str) -> String {
    let text = text_spec("");
    assert!(text.contains(from));
    text.replace(from, to)
}

#[test]
fn an_unknown_key_names_the_nearest_known_one() {
    refused(
        &Sandbox::new(),
        &with("global_batch_size", "global_batchsize"),
        &["global_batchsize", "global_batch_size"],
    );
}

#[test]
fn a_wrong_type_names_the_field() {
    refused(&Sandbox::new(), &with("global_batch_size: 16", "global_batch_size: many"), &["global_batch_size", "many"]);
}

#[test]
fn several_mistakes_are_told_at_once() {
    let sandbox = Sandbox::new();
    let text = text_spec("learning_rate: -1\nuntil: {max_epochs: 0}\nstrategy: thawing");
    let ended = sandbox.train(&sandbox.spec(&text), 1, &[]);
    let found = errors(&ended);
    for field in ["strategy", "learning_rate", "until.max_epochs"] {
        assert!(found.iter().any(|line| line.contains(field)), "{field} is missing:\n{}", ended.stderr);
    }
}

#[test]
fn a_stage_that_names_no_group_is_told_the_nearest() {
    let stages = "strategy: custom\nstages: [{name: one, thaw: [hed]}]";
    refused(&Sandbox::new(), &text_spec(stages), &["stages[0].thaw[0]", "hed", "head"]);
}

#[test]
fn a_batch_smaller_than_the_shards() {
    refused(&Sandbox::new(), &with("global_batch_size: 16", "global_batch_size: 3"), &["global_batch_size", "4"]);
}

#[test]
fn a_missing_file_is_named() {
    refused(&Sandbox::new(), &with("$FIXTURES/texts.csv", "$FIXTURES/nothing.csv"), &["nothing.csv"]);
    refused(&Sandbox::new(), &with("$FIXTURES/text.pt2", "$FIXTURES/nothing.pt2"), &["nothing.pt2"]);
}

#[test]
fn a_csv_without_the_column_lists_its_columns() {
    refused(&Sandbox::new(), &with("text: text", "text: body"), &["body", "text", "label"]);
}

#[test]
fn an_empty_class() {
    let sandbox = Sandbox::new();
    copy_folder(&fixtures::folder().join("images"), &sandbox.path().join("images"));
    fs::create_dir(sandbox.path().join("images/empty")).unwrap();
    refused(&sandbox, &image_spec(sandbox.path()), &["empty"]);
}

#[test]
fn an_image_that_does_not_decode_is_named() {
    let sandbox = Sandbox::new();
    copy_folder(&fixtures::folder().join("images"), &sandbox.path().join("images"));
    fs::write(sandbox.path().join("images/apple/0000.png"), b"this is not a png").unwrap();
    refused(&sandbox, &image_spec(sandbox.path()), &["0000.png"]);
}

#[test]
fn a_label_in_evaluation_that_training_never_sees() {
    let sandbox = Sandbox::new();
    let _ = sandbox.file("eval.csv", "text,label\nw1 w2,apple\nw3 w4,zebra\n");
    let _ = sandbox.file("test.csv", "text,label\nw1 w2,apple\n");
    let text = with(
        "  split: {train: 0.6, eval: 0.2, test: 0.2}\n",
        &format!(
            "  eval: {{path: {0}/eval.csv, format: csv, text: text, label: label}}\n  test: {{path: {0}/test.csv, format: csv, text: text, label: label}}\n",
            sandbox.path().display()
        ),
    );
    refused(&sandbox, &text, &["zebra", "eval.csv"]);
}

#[test]
fn a_truncated_archive() {
    let sandbox = Sandbox::new();
    let whole = fs::read(fixtures::folder().join("text.pt2")).unwrap();
    fs::write(sandbox.path().join("cut.pt2"), &whole[..whole.len() / 2]).unwrap();
    let text = with("$FIXTURES/text.pt2", &format!("{}/cut.pt2", sandbox.path().display()));
    refused(&sandbox, &text, &["cut.pt2"]);
}

#[test]
fn a_pickle_renamed_to_pt2() {
    let sandbox = Sandbox::new();
    let path = sandbox.path().join("pickle.pt2");
    let script = "import sys, torch; torch.save({'weight': torch.zeros(3)}, sys.argv[1])";
    let ended =
        Process::start(std::process::Command::new(fixtures::python()).args(["-c", script]).arg(&path)).wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    let text = with("$FIXTURES/text.pt2", &path.display().to_string());
    refused(&sandbox, &text, &["pickle.pt2", "pickle"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let sandbox = Sandbox::new();
    let ended = sandbox.train(&sandbox.spec(&text_spec("")), 1, &["--listen", &address]);
    let found = errors(&ended);
    assert_eq!(found.len(), 1, "{}", ended.stderr);
    assert!(found[0].contains(&address), "{}", found[0]);
}

#[test]
fn a_second_coordinator_on_the_same_store_is_refused() {
    let sandbox = Sandbox::new();
    let first = Process::start(sandbox.thaw().args(["up", "--workers", "1", "--listen", "127.0.0.1:0"]));
    thaw_tests::process::eventually("the first coordinator", DEADLINE, || {
        first.stderr().contains("coordinator at").then_some(())
    });
    let second =
        Process::start(sandbox.thaw().args(["up", "--workers", "1", "--listen", "127.0.0.1:0"])).wait(DEADLINE);
    let found = errors(&second);
    assert_eq!(found.len(), 1, "{}", second.stderr);
    assert!(found[0].contains("store.redb"), "{}", found[0]);
}

#[test]
fn a_full_disk_at_a_checkpoint_fails_the_run_by_name() {
    // A file system of 4 MiB holds the run's files but not its checkpoints.
    let sandbox = Sandbox::new();
    let small = sandbox.path().join("small");
    fs::create_dir(&small).unwrap();
    let mounted =
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=96k", "tmpfs"]).arg(&small).status();
    if !mounted.is_ok_and(|status| status.success()) {
        assert!(!thaw_tests::in_ci() || !nix::unistd::geteuid().is_root(), "root in CI can mount a tmpfs");
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let text = text_spec(&format!(
        "strategy: full_fine_tuning\nuntil: {{max_steps: 8}}\ncheckpoint: {{url: \"file://{}\", save_steps: 4}}",
        small.display()
    ));
    let ended = sandbox.train(&sandbox.spec(&text), 1, &[]);
    let leftovers: Vec<_> =
        walk(&small.join("runs")).into_iter().filter(|name| name.contains("tmp") || name.contains('#')).collect();
    let unmounted = std::process::Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success());
    assert!(!ended.status.success(), "{}", ended.stdout);
    assert!(ended.stderr.contains("STORAGE_ERROR"), "{}", ended.stderr);
    assert_eq!(leftovers, Vec::<String>::new(), "half-written files were left");
}

fn walk(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    found
}

fn image_spec(folder: &Path) -> String {
    format!(
        "name: small-image
backbone: {{graph: $FIXTURES/image.pt2}}
data:
  train: {{path: {}/images, format: image_folder}}
  split: {{train: 0.6, eval: 0.2, test: 0.2}}
  image: {{size: 16, mean: [0.5], std: [0.25]}}
global_batch_size: 16
until: {{max_steps: 2}}
",
        folder.display()
    )
}
