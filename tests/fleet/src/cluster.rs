//! The real processes: etcd and coordinators, on ports that were free. Ended by their ids, all of them.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::run_service_client::RunServiceClient;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint, Uri};

/// Whatever is waited for here comes by itself, on a machine that is loaded too.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// A program with its log in a file. Killed when dropped.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
    /// Of the log, when this process was started.
    log_start: usize,
}

impl Process {
    pub(crate) fn start(mut command: Command, log: &Path) -> Result<Self> {
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        let log_start = usize::try_from(file.metadata()?.len())?;
        let errors: File = file.try_clone()?;
        command.stdin(Stdio::null()).stdout(file).stderr(errors).kill_on_drop(true).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        Ok(Self { child, log: log.to_owned(), log_start })
    }

    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// What follows `mark` on a line that this process logs.
    pub(crate) async fn says(&mut self, mark: &str) -> Result<String> {
        let end = Instant::now() + DEADLINE;
        loop {
            let text = fs::read(&self.log).unwrap_or_default();
            let text = String::from_utf8_lossy(text.get(self.log_start..).unwrap_or_default()).into_owned();
            let whole = text.rfind('\n').map_or("", |last| &text[..last]);
            if let Some((_, rest)) = whole.split_once(mark) {
                return Ok(rest.chars().take_while(|c| !c.is_whitespace() && *c != ',' && *c != '"').collect());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("a process ended with {status} before it served: {}", last_lines(&text));
            }
            ensure!(Instant::now() < end, "a process did not serve in time: {}", last_lines(&text));
            sleep(POLL).await;
        }
    }

    pub(crate) async fn kill(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill().await;
    }

    /// Asks it to end, and kills it where it does not heed that.
    pub(crate) async fn stop(&mut self) {
        if let Some(id) = self.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        if timeout(STOP, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }
}

fn last_lines(text: &str) -> &str {
    let start = text.len().saturating_sub(2000);
    let start = (start..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    &text[start..]
}

/// Processor time that a process has used, all its threads, in seconds. Counted in hundredths.
pub(crate) fn processor_seconds(id: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).with_context(|| format!("process {id} is gone"))?;
    // The name in parentheses may hold anything; user and system time are the 14th and 15th fields.
    let fields: Vec<&str> = text.rsplit_once(')').context("no stat")?.1.split_whitespace().collect();
    let ticks =
        fields.get(11).context("no time")?.parse::<u64>()? + fields.get(12).context("no time")?.parse::<u64>()?;
    Ok(ticks as f64 / 100.0)
}

/// Most memory that a process has held, in MiB.
pub(crate) fn peak_memory(id: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
}

struct Coordinator {
    name: String,
    address: String,
    process: Option<Process>,
}

pub(crate) struct Cluster {
    folder: PathBuf,
    thaw: PathBuf,
    etcd: Process,
    etcd_address: String,
    coordinators: Vec<Coordinator>,
}

impl Cluster {
    pub(crate) async fn start(thaw: &Path, etcd: &Path, count: u32, folder: &Path) -> Result<Self> {
        let any = "http://127.0.0.1:0";
        let mut command = Command::new(etcd);
        command.arg("--data-dir").arg(folder.join("etcd"));
        command.args(["--listen-client-urls", any, "--advertise-client-urls", any]);
        command.args(["--listen-peer-urls", any, "--initial-advertise-peer-urls", any]);
        command.args(["--initial-cluster", &format!("default={any}")]);
        let mut etcd = Process::start(command, &folder.join("etcd.log"))?;
        let etcd_address = etcd.says("client requests on ").await?;
        let mut cluster =
            Self { folder: folder.to_owned(), thaw: thaw.to_owned(), etcd, etcd_address, coordinators: Vec::new() };
        for index in 0..count {
            let (name, address) = (format!("c{index}"), "127.0.0.1:0".to_owned());
            cluster.coordinators.push(Coordinator { name, address, process: None });
            cluster.start_coordinator(index as usize).await?;
        }
        Ok(cluster)
    }

    /// At the address it had before, if it had one.
    pub(crate) async fn start_coordinator(&mut self, index: usize) -> Result<()> {
        let one = &mut self.coordinators[index];
        let mut command = Command::new(&self.thaw);
        // Settings of other clusters.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("THAW_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--store", &format!("etcd://{}/thaw", self.etcd_address), "--data-dir"]);
        command.arg(self.folder.join("data")).args(["--listen", &one.address, "--name", &one.name]);
        let mut process = Process::start(command, &self.folder.join(format!("{}.log", one.name)))?;
        one.address = process.says("coordinator at http://").await?;
        one.process = Some(process);
        Ok(())
    }

    pub(crate) fn addresses(&self) -> Vec<Uri> {
        self.coordinators.iter().filter_map(|one| format!("http://{}", one.address).parse().ok()).collect()
    }

    /// Who leads, once somebody does who is alive.
    pub(crate) async fn leader(&self) -> Result<usize> {
        let end = Instant::now() + DEADLINE;
        loop {
            for (index, one) in self.coordinators.iter().enumerate().filter(|(_, one)| one.process.is_some()) {
                let asked = async {
                    let mut client = ClusterServiceClient::new(channel(&one.address).await?);
                    anyhow::Ok(client.get_leader(pb::GetLeaderRequest {}).await?.into_inner())
                };
                if asked.await.is_ok_and(|leader| leader.name == one.name) {
                    return Ok(index);
                }
            }
            ensure!(Instant::now() < end, "nobody leads");
            sleep(POLL).await;
        }
    }

    pub(crate) fn id(&self, index: usize) -> Result<u32> {
        let process = self.coordinators[index].process.as_ref();
        process.and_then(Process::id).context("the coordinator does not run")
    }

    /// A client of one coordinator's runs.
    pub(crate) async fn runs(&self, index: usize) -> Result<RunServiceClient<Channel>> {
        Ok(RunServiceClient::new(channel(&self.coordinators[index].address).await?))
    }

    /// The workers that the leader has.
    pub(crate) async fn workers(&self, index: usize) -> Result<Vec<pb::Worker>> {
        let client = ClusterServiceClient::new(channel(&self.coordinators[index].address).await?);
        let listed = client.max_decoding_message_size(64 << 20).list_workers(pb::ListWorkersRequest {}).await?;
        Ok(listed.into_inner().workers)
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.coordinators[index].process.take() {
            process.kill().await;
        }
    }

    pub(crate) async fn stop(mut self) {
        for one in &mut self.coordinators {
            if let Some(mut process) = one.process.take() {
                process.stop().await;
            }
        }
        self.etcd.stop().await;
    }
}

async fn channel(address: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint.connect_timeout(Duration::from_secs(2)).timeout(ANSWER).connect().await?)
}
