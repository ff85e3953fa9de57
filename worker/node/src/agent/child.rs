//! One trainer process: its start, its three pipes, its end.

use super::Config;
use super::launch::{Launch, Life, Running};
use super::trainer::TrainerId;
use super::trainers::Trainers;
use crate::collective::Ring;
use crate::pipe;
use async_trait::async_trait;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use thaw_proto::pb::CoordinatorMessage;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// How long a trainer may take to read one message.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How long its pipes may stay open behind it: a grandchild could hold them.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
const WAIT_POLICY: &str = "OMP_WAIT_POLICY";
/// Bytes of a log line; longer ones are cut in pieces.
const MAX_LINE_BYTES: usize = 8 << 10;

/// Starts processes from one thread that lives as long as the agent.
///
/// A trainer asks the kernel to be killed when its parent dies, and the kernel means the *thread* that started it: one of the
/// runtime's own could end earlier.
#[derive(Debug)]
pub(super) struct Spawner {
    program: PathBuf,
    arguments: Vec<String>,
    requests: std::sync::mpsc::Sender<(Command, oneshot::Sender<io::Result<Child>>)>,
}

impl Spawner {
    /// Starts the thread. Call inside the runtime that will watch the children.
    pub(super) fn start(config: &Config) -> io::Result<Self> {
        let (requests, received) = std::sync::mpsc::channel::<(Command, oneshot::Sender<io::Result<Child>>)>();
        let runtime = tokio::runtime::Handle::current();
        // Not joined: it ends when the agent drops this handle, and takes what is left of the trainers with it.
        std::thread::Builder::new().name("start-trainers".to_owned()).spawn(move || {
            let _entered = runtime.enter();
            while let Ok((mut command, reply)) = received.recv() {
                // A child that nobody waits for any more is killed when it is dropped.
                let _unclaimed = reply.send(command.spawn());
            }
        })?;
        Ok(Self { program: config.trainer_program.clone(), arguments: config.trainer_arguments.clone(), requests })
    }
}

#[async_trait]
impl Launch for Spawner {
    fn name(&self) -> String {
        self.program.display().to_string()
    }

    async fn launch(&self) -> io::Result<Running> {
        let ring = Ring::create();
        let ring = ring.inspect_err(|error| tracing::warn!(%error, "what a trainer waits for will not be known")).ok();
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(ring) = &ring {
            command.args(["--ring".to_owned(), ring.address().to_string()]);
        }
        // Idle threads of an operator sleep instead of spinning: the cores between operators belong to the other trainers and to the
        // collective. Read by the OpenMP runtime when it is loaded, so the trainer cannot set it itself.
        if std::env::var_os(WAIT_POLICY).is_none() {
            command.env(WAIT_POLICY, "PASSIVE");
        }
        // Its own group: an interrupt from the terminal is for the agent, which then ends its trainers.
        command.process_group(0);
        let (reply, child) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts trainers is gone");
        self.requests.send((command, reply)).map_err(|_| gone())?;
        let mut child = child.await.map_err(|_| gone())??;
        match (child.stdin.take(), child.stdout.take(), child.stderr.take()) {
            (Some(stdin), Some(stdout), Some(stderr)) => Ok(Running {
                child: Box::new(child),
                stdin: Box::new(stdin),
                stdout: Box::new(stdout),
                stderr: Box::new(stderr),
                ring,
            }),
            _ => Err(io::Error::other("it has no pipes")),
        }
    }
}

#[async_trait]
impl Life for Child {
    fn id(&self) -> u32 {
        // Only a child that was waited for has none.
        Self::id(self).unwrap_or_default()
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        Self::wait(self).await
    }

    fn start_kill(&mut self) -> io::Result<()> {
        Self::start_kill(self)
    }
}

/// Follows a trainer to its end, and reports that end.
pub(super) async fn watch(
    mut child: Box<dyn Life>,
    stdout: Box<dyn AsyncRead + Send + Unpin>,
    stderr: Box<dyn AsyncRead + Send + Unpin>,
    id: TrainerId,
    trainers: Trainers,
    kill: CancellationToken,
) -> Result<(), io::Error> {
    let pipes = async {
        tokio::join!(read_reports(stdout, &id, &trainers, &kill), read_lines(stderr, |line| trainers.line(&id, line)));
    };
    tokio::pin!(pipes);
    let (mut open, mut killed) = (true, false);
    let status = loop {
        tokio::select! {
            biased;
            status = child.wait() => break status,
            () = &mut pipes, if open => open = false,
            () = kill.cancelled(), if !killed => {
                killed = true;
                if let Err(error) = child.start_kill() {
                    tracing::warn!(%error, slot = id.slot, "cannot kill a trainer");
                }
            }
        }
    };
    if open {
        let _held_open = tokio::time::timeout(DRAIN_LIMIT, &mut pipes).await;
    }
    // Where even the wait failed the process is not ours any more, so for the coordinator it has ended (AGENT-3).
    trainers.ended(&id, status.as_ref().ok().copied());
    status.map(drop)
}

/// Passes messages down until the trainer has ended, or is found not to read.
pub(super) async fn write_messages(
    mut stdin: Box<dyn AsyncWrite + Send + Unpin>,
    mut messages: mpsc::Receiver<CoordinatorMessage>,
    kill: CancellationToken,
    ended: CancellationToken,
) -> Result<(), pipe::Error> {
    loop {
        let message = tokio::select! {
            biased;
            message = messages.recv() => message,
            () = ended.cancelled() => None,
        };
        let Some(message) = message else { return Ok(()) };
        let writing = pipe::write_frame_async(&mut stdin, &message);
        let failure = match tokio::time::timeout(WRITE_LIMIT, writing).await {
            Ok(Ok(())) => continue,
            // It has closed its stdin, so it is ending; its end is reported by its watcher.
            Ok(Err(pipe::Error::Io(error))) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(());
            }
            Ok(Err(error)) => error,
            Err(_elapsed) => io::Error::from(io::ErrorKind::TimedOut).into(),
        };
        kill.cancel();
        return Err(failure);
    }
}

async fn read_reports(
    mut stdout: impl AsyncRead + Unpin,
    id: &TrainerId,
    trainers: &Trainers,
    kill: &CancellationToken,
) {
    loop {
        match pipe::read_frame_async(&mut stdout).await {
            Ok(Some(report)) => trainers.report(id, report),
            Ok(None) => return,
            Err(error) => {
                tracing::error!(
                    slot = id.slot,
                    error = thaw_runtime::chain(&error),
                    "a trainer's reports are not readable"
                );
                // A trainer that is killed in the middle of a frame has ended anyway; one that lives is broken.
                kill.cancel();
                return;
            }
        }
    }
}

async fn read_lines(mut stderr: impl AsyncRead + Unpin, mut line: impl FnMut(String)) {
    let mut rest: Vec<u8> = Vec::new();
    let mut chunk = [0; 4096];
    // An error ends the log, not the trainer.
    while let Ok(read @ 1..) = stderr.read(&mut chunk).await {
        for byte in &chunk[..read] {
            if *byte != b'\n' {
                rest.push(*byte);
            }
            if *byte == b'\n' || rest.len() == MAX_LINE_BYTES {
                line(text(&rest));
                rest.clear();
            }
        }
    }
    if !rest.is_empty() {
        line(text(&rest));
    }
}

fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end_matches('\r').to_owned()
}

/// The exit code and signal of a process.
pub(super) fn code_and_signal(status: Option<ExitStatus>) -> (Option<i32>, Option<i32>) {
    use std::os::unix::process::ExitStatusExt as _;
    status.map_or((None, None), |status| (status.code(), status.signal()))
}

/// Whether somebody has stopped a process, so that it is no fault of its own that it does nothing. `false` where that cannot be told.
pub(super) fn is_stopped(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state follows the program's name, which is in parentheses and may hold some itself (proc_pid_stat(5)).
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    matches!(state, Some('T' | 't'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_cut_where_they_end_or_grow_too_long() {
        let long = "x".repeat(MAX_LINE_BYTES + 3);
        let input = format!("one\r\n\n{long}\nlast");
        let mut lines = Vec::new();
        read_lines(input.as_bytes(), |line| lines.push(line)).await;
        assert_eq!(lines, ["one", "", &long[..MAX_LINE_BYTES], "xxx", "last"]);
    }
}
