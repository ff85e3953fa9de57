//! The harness of the process tests: real binaries, real files, ephemeral ports; everything ends with the test.

#![allow(clippy::unwrap_used, reason = "the harness is only used by tests, which may panic")]

pub mod cluster;
pub mod fixtures;
pub mod process;
pub mod sandbox;

/// Whether this is CI, where a missing tool is a failure instead of a skip.
#[must_use]
pub fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The path of `tool`, or `None` with a line that says the test is skipped. Panics in CI.
#[must_use]
pub fn tool(tool: &str) -> Option<std::path::PathBuf> {
    let local = fixtures::root().join(".bin").join(tool);
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(local)
        .chain(std::env::split_paths(&paths).map(|folder| folder.join(tool)))
        .find(|path| path.is_file());
    if found.is_none() {
        assert!(!in_ci(), "{tool} is not installed; `make setup` installs it");
        eprintln!("skipped: {tool} is not installed");
    }
    found
}
