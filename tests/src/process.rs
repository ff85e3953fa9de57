//! Child processes that never outlive their test.

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The profile's folder in target, where the binaries are.
#[must_use]
pub fn target_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let deps = program.parent().unwrap();
    deps.parent().unwrap().to_owned()
}

/// The binary `name` of this workspace.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let path = target_folder().join(name);
    assert!(path.is_file(), "{} is not built; run `cargo build --workspace` (make test does)", path.display());
    path
}

/// A running program whose output is kept, and which is killed by its id when dropped.
pub struct Process {
    child: Child,
    stdout: JoinHandle<String>,
    stderr: Arc<Mutex<String>>,
    stderr_reader: JoinHandle<()>,
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = out.read_to_string(&mut text);
            text
        });
        let errors = child.stderr.take().unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let shared = Arc::clone(&stderr);
        let stderr_reader = std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                let mut text = shared.lock().unwrap();
                text.push_str(&line);
                text.push('\n');
            }
        });
        Self { child, stdout, stderr, stderr_reader }
    }

    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        signal(self.id(), Signal::SIGTERM);
    }

    /// Waits for its end; kills it and panics after `deadline`.
    #[must_use]
    pub fn wait(mut self, deadline: Duration) -> Ended {
        let end = Instant::now() + deadline;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                self.kill();
                panic!("the process did not end within {deadline:?}; it wrote:\n{}", self.stderr());
            }
            std::thread::park_timeout(Duration::from_millis(20));
        };
        let stdout = std::mem::replace(&mut self.stdout, std::thread::spawn(String::new)).join().unwrap();
        std::mem::replace(&mut self.stderr_reader, std::thread::spawn(|| ())).join().unwrap();
        let stderr = self.stderr();
        Ended { status, stdout, stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// SIGKILL to a process that is not our child, by its id.
pub fn kill_by_id(id: u32) {
    signal(id, Signal::SIGKILL);
}

/// The trainers below a process, by id, ascending.
#[must_use]
pub fn trainers_below(id: u32) -> Vec<u32> {
    below(id, b"trainer")
}

/// The agents below a process, by id, ascending.
#[must_use]
pub fn agents_below(id: u32) -> Vec<u32> {
    below(id, b"agent")
}

/// The processes below one that have `role` among their arguments.
fn below(id: u32, role: &[u8]) -> Vec<u32> {
    let mut parents = std::collections::BTreeMap::new();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().map_while(Result::ok) {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(status) = std::fs::read_to_string(entry.path().join("status")) else { continue };
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<u32>().ok());
        let zombie = status.lines().any(|line| line.starts_with("State:") && line.contains('Z'));
        parents.insert(process, parent.unwrap_or(0));
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !zombie && arguments.split(|byte| *byte == 0).any(|argument| argument == role) {
            found.push(process);
        }
    }
    let is_below = |one: &u32| {
        let ancestors = std::iter::successors(Some(*one), |process| parents.get(process).copied());
        ancestors.take_while(|process| *process != 0).any(|process| process == id)
    };
    found.retain(is_below);
    found.sort_unstable();
    found
}

/// SIGSTOP to a process, by its id.
pub fn stop_by_id(id: u32) {
    signal(id, Signal::SIGSTOP);
}

/// SIGCONT to a process that was stopped, by its id.
pub fn continue_by_id(id: u32) {
    signal(id, Signal::SIGCONT);
}

/// Lets time pass, where it is the time itself that must not matter: no condition stands for it.
pub fn let_pass(time: Duration) {
    std::thread::sleep(time);
}

fn signal(id: u32, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(i32::try_from(id).unwrap()), signal).unwrap();
}

/// Waits until `value` gives something; panics with `what` after `deadline`.
pub fn eventually<T>(what: &str, deadline: Duration, mut value: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(Instant::now() < end, "{what} did not happen within {deadline:?}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Waits for a file to appear.
pub fn file(path: &Path, deadline: Duration) {
    eventually(&format!("the file {}", path.display()), deadline, || path.exists().then_some(()));
}
