//! A network in which links can be cut: each agent, with its trainers, in a network namespace of its own.
//!
//! ```text
//!   this program, etcd, coordinators              worker 0               worker 1
//!       127.77.0.1, a bridge ---- link0 ---- 127.77.1.1     link1 ---- 127.77.1.2
//! ```
//!
//! Coordinators without TLS serve addresses of 127.0.0.0/8 alone, so these are such, and may leave a machine's loopback device here. A worker
//! also takes itself for a machine of its own, so that trainers speak over their links and not through memory.
//!
//! CHAOS-4: all of it lies in namespaces that only processes started here hold. It is gone with them, also where this program is killed: its
//! processes are of one process namespace, which ends with its first.

use super::super::Failure;
use super::super::train::interruption;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

/// Where the coordinators are.
pub(super) const HUB: &str = "127.77.0.1";
/// Said to the program that is run again.
const INSIDE: &str = "--in-namespaces";
/// Until everything has ended after an interruption.
const END_DEADLINE: Duration = Duration::from_secs(120);

/// The network of the coordinators. Its loopback device has less than it has by itself, so that the other addresses are elsewhere.
const MAKE_HUB: &str = "set -e
ip link set lo up
ip addr del 127.0.0.1/8 dev lo
ip addr add 127.0.0.1/16 dev lo
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
ip link add hub type bridge
ip addr add 127.77.0.1/16 dev hub
ip link set hub up";

/// A worker's: $1 is the file that the namespace is bound to, $2 its number, $3 its address.
const MAKE_LINK: &str = "set -e
: > \"$1\"
unshare --net=\"$1\" true
ip link add \"link$2\" type veth peer name hub netns \"$1\"
ip link set \"link$2\" master hub up
exec nsenter --net=\"$1\" sh -c 'set -e
ip link set lo up
ip addr del 127.0.0.1/8 dev lo
ip addr add 127.0.0.1/32 dev lo
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
ip addr add \"$1\"/16 dev hub
ip link set hub up' sh \"$3\"";

/// Makes a process another machine's, as far as it looks: $1 is its name.
const OTHER_MACHINE: &str = "mount --bind \"$1\" /proc/sys/kernel/random/boot_id || exit 125; shift; exec \"$@\"";

/// Runs this program again, with the same arguments, where it may make networks.
pub(super) async fn enter() -> Result<ExitCode, Failure> {
    let interrupted = interruption()?;
    let namespaces = namespaces();
    let mut probe = Command::new("unshare");
    probe.args(&namespaces).args(["sh", "-c", "nsenter --version >&2 && ip link add hub type bridge"]);
    run(probe).await.map_err(|why| {
        Failure::invalid(format!(
            "--faults partition: no network namespaces can be made here; it needs root, or user namespaces, and ip, unshare and nsenter \
             (Debian: iproute2, util-linux): {why}"
        ))
    })?;
    let program = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot find this program's own path: {error}")))?;
    let mut command = Command::new("unshare");
    command.args(&namespaces).arg(program).args(std::env::args_os().skip(1)).arg(INSIDE);
    command.stdin(Stdio::piped()).kill_on_drop(true);
    let mut inside = command.spawn().map_err(|error| Failure::failed(format!("cannot start unshare: {error}")))?;
    // Its end says that this program is gone. Waiting would close it.
    let outside = inside.stdin.take();
    let status = tokio::select! {
        ended = inside.wait() => ended,
        () = interrupted.cancelled() => {
            drop(outside);
            let ended = tokio::time::timeout(END_DEADLINE, inside.wait()).await;
            ended.map_err(|_elapsed| Failure::failed("what was interrupted did not end in time"))?
        }
    };
    let code = status.map_err(|error| Failure::failed(format!("cannot wait for unshare: {error}")))?.code();
    Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Ends the program that was run again once the one that ran it is gone.
pub(super) fn end_with_outside(interrupted: &CancellationToken) -> Result<(), Failure> {
    let ended = interrupted.clone();
    let watch = move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        ended.cancel();
    };
    let started = std::thread::Builder::new().name("outside".to_owned()).spawn(watch);
    started.map(drop).map_err(|error| Failure::failed(format!("cannot start a thread: {error}")))
}

/// Arguments of unshare. A user who is not root is root in a user namespace.
fn namespaces() -> Vec<&'static str> {
    let of_user: &[&str] = if nix::unistd::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let others = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"];
    of_user.iter().chain(&others).copied().collect()
}

/// The links of all workers.
#[derive(Debug)]
pub(super) struct Network {
    folder: PathBuf,
    links: usize,
}

impl Network {
    /// One with as many links, in namespaces that this program was run again in.
    pub(super) async fn make(folder: &Path, links: usize) -> Result<Self, Failure> {
        let failed = |why| Failure::failed(format!("cannot make a network: {why}"));
        shell(MAKE_HUB, &[]).await.map_err(failed)?;
        let network = Self { folder: folder.to_owned(), links };
        for index in 0..links {
            let number = index.to_string();
            let file = network.file(index).display().to_string();
            shell(MAKE_LINK, &[&file, &number, &host(index)]).await.map_err(failed)?;
            let machine = std::fs::write(network.machine(index), uuid::Uuid::new_v4().to_string());
            machine.map_err(|error| Failure::failed(format!("cannot name a machine: {error}")))?;
        }
        Ok(network)
    }

    /// The file that a worker's namespace is bound to.
    fn file(&self, index: usize) -> PathBuf {
        self.folder.join(format!("network-{index}"))
    }

    fn machine(&self, index: usize) -> PathBuf {
        self.folder.join(format!("machine-{index}"))
    }

    /// `program` at the other end of a link. Its process is the one that is started.
    pub(super) fn command(&self, index: usize, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.file(index).display()));
        command.args(["unshare", "--mount", "sh", "-c", OTHER_MACHINE, "sh"]).arg(self.machine(index)).arg(program);
        command
    }

    /// Nothing passes any more, either way; whoever sends is told nothing.
    pub(super) async fn cut(&self, index: usize) -> Result<(), Failure> {
        self.set(index, "down").await
    }

    pub(super) async fn mend(&self, index: usize) -> Result<(), Failure> {
        self.set(index, "up").await
    }

    async fn set(&self, index: usize, state: &str) -> Result<(), Failure> {
        let mut command = Command::new("ip");
        command.args(["link", "set", &format!("link{index}"), state]);
        run(command).await.map_err(|why| Failure::failed(format!("cannot set link {index} {state}: {why}")))
    }

    /// Lets go of the files (CHAOS-4), once nothing uses them.
    pub(super) async fn remove(self) -> Vec<String> {
        let mut problems = Vec::new();
        for index in 0..self.links {
            let mut command = Command::new("umount");
            command.arg(self.file(index));
            problems
                .extend(run(command).await.err().map(|why| format!("the network of worker {index} is left: {why}")));
        }
        problems
    }
}

/// A worker's address.
pub(super) fn host(index: usize) -> String {
    format!("127.77.1.{}", index + 1)
}

async fn shell(script: &str, arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).args(arguments);
    run(command).await
}

/// To its end, which takes no time worth a word. What it says where that is not well.
async fn run(mut command: Command) -> Result<(), String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let ended = tokio::time::timeout(END_DEADLINE, command.output()).await.map_err(|_| format!("{program} hangs"))?;
    let output = ended.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(format!("{program} ended with {}: {said}", output.status))
}
