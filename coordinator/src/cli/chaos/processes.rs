//! Processes of this machine: their start, signals to them by id, and who is whose child.

use super::super::Failure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// Between two looks at something that changes by itself.
pub(super) const POLL: Duration = Duration::from_millis(5);
const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// A program that was started here, with its log in a file. Killed when dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    log: PathBuf,
    /// Of the log, when this process was started.
    log_start: u64,
}

impl Process {
    /// Starts `command` in a group of its own, so that an interrupt from the terminal is for this program alone.
    pub(super) fn start(mut command: Command, log: &Path) -> Result<Self, Failure> {
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        let failed = |error: std::io::Error| Failure::failed(format!("cannot start {program}: {error}"));
        let file = OpenOptions::new().create(true).append(true).open(log).map_err(failed)?;
        let log_start = file.metadata().map_err(failed)?.len();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(file).kill_on_drop(true).process_group(0);
        let child = command.spawn().map_err(failed)?;
        Ok(Self { child, log: log.to_owned(), log_start })
    }

    /// `None` once it was waited for.
    pub(super) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// What follows `mark` on a line that this process logs.
    pub(super) async fn says(&mut self, mark: &str) -> Result<String, Failure> {
        let end = Instant::now() + START_DEADLINE;
        loop {
            let text = fs::read(&self.log).unwrap_or_default();
            let text = String::from_utf8_lossy(text.get(self.log_start as usize..).unwrap_or_default()).into_owned();
            let whole = text.rfind('\n').map_or("", |last| &text[..last]);
            if let Some((_, rest)) = whole.split_once(mark) {
                let word: String = rest.chars().take_while(|c| !c.is_whitespace() && *c != ',' && *c != '"').collect();
                return Ok(word);
            }
            let log = self.log.display();
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(Failure::failed(format!(
                    "a process ended with {status} before it served; its log is {log}"
                )));
            }
            if Instant::now() > end {
                return Err(Failure::failed(format!("a process did not serve in time; its log is {log}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        if let Some(id) = self.id() {
            send(id, signal);
        }
    }

    /// SIGKILL, and until it is gone.
    pub(super) async fn kill(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill().await;
    }

    /// Until it is gone after a signal that asks it to end; SIGKILL where it does not heed it. Whether it did.
    pub(super) async fn ended(&mut self) -> bool {
        drop(self.child.stdin.take());
        let heeded = tokio::time::timeout(STOP_DEADLINE, self.child.wait()).await.is_ok();
        if !heeded {
            self.kill().await;
        }
        heeded
    }
}

/// A signal to a process by its id. One that has ended is let be.
pub(super) fn send(id: u32, signal: Signal) {
    let Ok(id) = i32::try_from(id) else { return };
    // An error says that it has ended.
    let _ = kill(Pid::from_raw(id), signal);
}

/// Whether a process of this id is there and is not a zombie.
pub(super) fn is_alive(id: u32) -> bool {
    stat(id).is_some_and(|stat| stat.state != 'Z' && stat.state != 'X')
}

struct Stat {
    state: char,
    parent: u32,
}

fn stat(id: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Stat { state: fields.first()?.chars().next()?, parent: fields.get(1)?.parse().ok()? })
}

/// All processes, by id.
pub(super) fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The trainers that an agent has started and that live.
pub(super) fn trainers_of(agents: &[u32]) -> BTreeSet<u32> {
    let is_trainer = |id: &u32| {
        stat(*id).is_some_and(|stat| agents.contains(&stat.parent) && stat.state != 'Z')
            && arguments(*id).get(1).is_some_and(|role| role == "trainer")
    };
    all().into_iter().filter(is_trainer).collect()
}

/// The process of this machine that was started as `role` under `name`, given as `--name` or by `variable`.
pub(super) fn named(role: &str, variable: &str, name: &str) -> Result<Option<u32>, Failure> {
    let is_it = |id: &u32| {
        let arguments = arguments(*id);
        let program = arguments.first().and_then(|program| Path::new(program).file_name()?.to_str());
        if !program.is_some_and(|program| program.starts_with("thaw")) || !arguments.iter().any(|word| word == role) {
            return false;
        }
        let mut given = arguments.iter().zip(arguments.iter().skip(1));
        let argument = given.find(|(option, _)| *option == "--name").map(|(_, name)| name.clone());
        let joined = arguments.iter().find_map(|word| word.strip_prefix("--name=").map(str::to_owned));
        let set =
            || environment(*id).iter().find_map(|set| set.strip_prefix(&format!("{variable}=")).map(str::to_owned));
        argument.or(joined).or_else(set).is_some_and(|found| found == name)
    };
    let found: Vec<u32> = all().into_iter().filter(is_it).collect();
    match found.as_slice() {
        [] => Ok(None),
        [id] => Ok(Some(*id)),
        several => Err(Failure::failed(format!("several processes are `{role}` under the name {name}: {several:?}"))),
    }
}

/// Program and arguments; empty where they cannot be read.
pub(super) fn arguments(id: u32) -> Vec<String> {
    words(&format!("/proc/{id}/cmdline"))
}

/// `NAME=VALUE` each; empty where they cannot be read.
pub(super) fn environment(id: u32) -> Vec<String> {
    words(&format!("/proc/{id}/environ"))
}

fn words(path: &str) -> Vec<String> {
    let bytes = fs::read(path).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found() {
        let id = std::process::id();
        assert!(is_alive(id) && all().contains(&id));
        assert!(!arguments(id).is_empty());
        assert!(trainers_of(&[id]).is_empty());
        assert!(!is_alive(u32::MAX / 2));
    }
}
