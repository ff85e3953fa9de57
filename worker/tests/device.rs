//! Asking for GPUs where there are none: one clear line, at once.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

fn lines(output: &Output) -> Vec<String> {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8(text).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn an_agent_without_a_gpu_refuses_cuda_before_it_serves() {
    if thaw_torch::cuda::devices().is_ok() {
        eprintln!("skipped: this machine has a GPU");
        return;
    }
    let arguments = ["agent", "--coordinator", "http://127.0.0.1:1", "--name", "w"];
    let agent = || Command::new(env!("CARGO_BIN_EXE_thaw-worker"));
    let output = agent().args(arguments).args(["--device", "cuda"]).output().unwrap();
    let by_environment = agent().args(arguments).env("THAW_DEVICE", "cuda").output().unwrap();
    for output in [output, by_environment] {
        let lines = lines(&output);
        assert_eq!((output.status.code(), lines.len()), (Some(1), 1), "{lines:?}");
        assert!(lines[0].starts_with("error: cannot train on --device cuda: not available here: "), "{lines:?}");
    }
    let output = agent().args(arguments).args(["--device", "tpu"]).output().unwrap();
    assert!(lines(&output)[0].contains("invalid value 'tpu' for '--device"), "{:?}", lines(&output));
}

#[test]
fn the_gpu_check_ends_with_one_line_where_there_is_no_gpu() {
    let folder = tempfile::tempdir().unwrap();
    // A driver that answers, and shows no GPU.
    let tool = folder.path().join("nvidia-smi");
    fs::write(&tool, "#!/bin/sh\necho 'No devices were found'\nexit 6\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/gpu/run.sh");
    let output = Command::new(script).env("PATH", path).output().unwrap();
    let lines = lines(&output);
    assert_eq!(output.status.code(), Some(2), "{lines:?}");
    assert_eq!(lines, ["gpu: no GPU here (nvidia-smi lists none), so nothing was checked"]);
}
