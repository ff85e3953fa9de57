//! Tiny archives, exported once by the project's Python and kept in the target folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The folder with the exported models. `None`: there is no Python here, and the test is skipped (never in CI).
pub(crate) fn fixtures() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(export).as_deref()
}

/// Runs the Python script with these arguments.
pub(crate) fn python(arguments: &[&str]) {
    let output = Command::new(interpreter().expect("checked by fixtures()"))
        .arg(script())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn export() -> Option<PathBuf> {
    let Some(python_path) = interpreter() else {
        assert!(std::env::var_os("CI").is_none(), "the tests of thaw-graph need .venv: run make setup");
        eprintln!("skipped: no .venv with PyTorch");
        return None;
    };
    let mut key = blake3::Hasher::new();
    key.update(&std::fs::read(script()).unwrap());
    key.update(python_path.canonicalize().unwrap().to_string_lossy().as_bytes());
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = base.join(format!("graph-{}", &key.finalize().to_hex()[..16]));
    if !folder.exists() {
        let fresh = tempfile::tempdir_in(base).unwrap();
        python(&["export", fresh.path().to_str().unwrap()]);
        // Another test binary may have been faster; its folder is as good.
        if std::fs::rename(fresh.path(), &folder).is_ok() {
            let _ = fresh.keep();
        }
    }
    Some(folder)
}

fn interpreter() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    path.exists().then_some(path)
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures.py")
}
