//! A folder of its own for each test, and `thaw` run in it.

use crate::fixtures;
use crate::process::{Ended, Process, binary};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// No test run takes this long.
pub const DEADLINE: Duration = Duration::from_secs(240);

pub struct Sandbox {
    folder: tempfile::TempDir,
    memory: tempfile::TempDir,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    #[must_use]
    pub fn new() -> Self {
        // The prefix cache keeps in memory only what lies on a memory file system.
        Self { folder: tempfile::tempdir().unwrap(), memory: tempfile::tempdir_in("/dev/shm").unwrap() }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.path().join("data")
    }

    /// Writes `spec.yaml` and gives its path. `$FIXTURES` in the text becomes the fixtures' folder.
    #[must_use]
    pub fn spec(&self, text: &str) -> PathBuf {
        self.file("spec.yaml", text)
    }

    /// Writes a file, with `$FIXTURES` replaced.
    #[must_use]
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, text.replace("$FIXTURES", &fixtures::folder().display().to_string())).unwrap();
        path
    }

    /// `thaw` with this sandbox's data folder; no argument is given yet.
    #[must_use]
    pub fn thaw(&self) -> Command {
        let mut command = Command::new(binary("thaw"));
        command.current_dir(self.path()).env("THAW_DATA_DIR", self.data_dir()).env_remove("THAW_SERVER");
        command.env("THAW_PREFIX_CACHE_MEMORY", self.memory_tier());
        command.env("THAW_PREFIX_CACHE_DISK", self.path().join("prefix-cache/disk"));
        command
    }

    /// Where its workers keep frozen prefixes in memory.
    #[must_use]
    pub fn memory_tier(&self) -> &Path {
        self.memory.path()
    }

    /// `thaw train SPEC --workers N -o json` to its end.
    #[must_use]
    pub fn train(&self, spec: &Path, workers: u32, more: &[&str]) -> Ended {
        Process::start(self.train_command(spec, workers, more).arg("-ojson")).wait(DEADLINE)
    }

    #[must_use]
    pub fn train_command(&self, spec: &Path, workers: u32, more: &[&str]) -> Command {
        let mut command = self.thaw();
        command.arg("train").arg(spec).args(["--workers", &workers.to_string()]).args(more);
        command
    }

    /// The summary of a run that must succeed.
    #[must_use]
    pub fn train_summary(&self, spec: &Path, workers: u32, more: &[&str]) -> Value {
        let ended = self.train(spec, workers, more);
        assert!(ended.status.success(), "thaw train failed:\n{}\n{}", ended.stderr, ended.stdout);
        serde_json::from_str(&ended.stdout)
            .unwrap_or_else(|error| panic!("not one JSON document ({error}): {}", ended.stdout))
    }

    /// The folder of the only run.
    #[must_use]
    pub fn run_folder(&self) -> PathBuf {
        let runs: Vec<_> =
            std::fs::read_dir(self.data_dir().join("runs")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(runs.len(), 1, "expected one run, found {runs:?}");
        runs[0].clone()
    }
}

/// What a run's events say, oldest first; those that are whole.
#[must_use]
pub fn events(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Copies a folder and all below it to a new one.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A spec over the small BERT: four shards, a batch of 16, two thaws; `more` is appended.
#[must_use]
pub fn text_spec(more: &str) -> String {
    format!(
        "name: small-text
backbone: {{graph: $FIXTURES/text.pt2}}
data:
  train: {{path: $FIXTURES/texts.csv, format: csv, text: text, label: label}}
  split: {{train: 0.6, eval: 0.2, test: 0.2}}
  max_length: 16
global_batch_size: 16
workers: {{min: 1, max: 4}}
seed: 11
{more}
"
    )
}
