//! Small models and datasets, made once per version of the script that makes them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The Python of the environment that `make setup` makes.
#[must_use]
pub fn python() -> PathBuf {
    let python = root().join(".venv/bin/python");
    assert!(python.exists(), "no Python environment; run `make setup`");
    python
}

/// The folder with text.pt2, image.pt2, texts.csv, texts.jsonl and images/.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(make)
}

fn make() -> PathBuf {
    let script = root().join("tests/fixtures/make.py");
    let version = blake3::hash(&std::fs::read(&script).unwrap()).to_hex();
    let built = super::process::target_folder().join("tmp").join(format!("fixtures-{}", &version[..12]));
    if built.join("complete").exists() {
        return built;
    }
    // Test programs may run at once: each makes its own, and the first to rename wins.
    let parent = built.parent().unwrap();
    std::fs::create_dir_all(parent).unwrap();
    let own = tempfile::tempdir_in(parent).unwrap();
    let made = own.path().join("made");
    let status = Command::new(python()).arg(&script).arg(&made).env("HF_HUB_OFFLINE", "1").status().unwrap();
    assert!(status.success(), "making the fixtures failed");
    std::fs::write(made.join("complete"), "").unwrap();
    if std::fs::rename(&made, &built).is_err() {
        assert!(built.join("complete").exists(), "cannot place the fixtures in {}", built.display());
    }
    built
}
