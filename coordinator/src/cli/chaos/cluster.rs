//! The processes that faults are done to: of a cluster that is started here, or of one that runs already.
//!
//! CHAOS-1: whatever was started here is ended by its id and waited for, and its folders are removed.

use super::super::Failure;
use super::super::args::ChaosOptions;
use super::super::client::Coordinators;
use super::super::embedded::worker_program;
use super::faults::Fault;
use super::network::{self, Network};
use super::processes::{self, POLL, Process};
use futures::FutureExt as _;
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use tokio::process::Command;
use tonic::transport::{Channel, Endpoint};

/// Whatever is waited for here comes by itself, on a machine that is loaded too.
pub(super) const DEADLINE: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(2);
/// Settings of other clusters, which those of this one must not read.
const FOREIGN: [&str; 11] = [
    "THAW_TLS_CA",
    "THAW_TLS_CERT",
    "THAW_TLS_KEY",
    "THAW_TLS_NAME",
    "THAW_STORE",
    "THAW_NAME",
    "THAW_ADVERTISE",
    "THAW_ETCD_CA",
    "THAW_ETCD_USER",
    "THAW_ETCD_PASSWORD",
    "THAW_ETCD_PASSWORD_FILE",
];

/// One coordinator.
#[derive(Debug)]
struct Member {
    /// `host:port`.
    address: String,
    /// Empty where it is not ours.
    name: String,
    /// `None` while it is down, and where it is not ours.
    process: Option<Process>,
}

#[derive(Debug)]
struct Agent {
    name: String,
    /// `None` while it is down, and where it is not ours.
    process: Option<Process>,
    /// Where it is not ours, but on this machine.
    found: Option<u32>,
}

impl Agent {
    /// `None` while it is down, and where it is on another machine.
    fn id(&self) -> Option<u32> {
        self.process.as_ref().map_or(self.found, Process::id)
    }
}

/// A cluster of its own: etcd, coordinators, agents, all on this machine and on ports that were free. Or one that runs already, of which the
/// processes on this machine are found by the names that they were started with, and started again by whoever started them.
#[derive(Debug)]
pub(super) struct Cluster {
    folder: PathBuf,
    /// Of a cluster that runs already.
    attached: Option<PathBuf>,
    memory: PathBuf,
    etcd: Option<Process>,
    etcd_address: String,
    members: Vec<Member>,
    agents: Vec<Agent>,
    worker_program: PathBuf,
    hold: Option<String>,
    /// Where links can be cut.
    network: Option<Network>,
}

impl Cluster {
    /// Starts all of it and waits until every worker has a session.
    pub(super) async fn start(options: &ChaosOptions, folder: &Path) -> Result<Self, Failure> {
        let unique = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut cluster = Self {
            folder: folder.to_owned(),
            attached: None,
            memory: Path::new("/dev/shm").join(unique),
            etcd: None,
            etcd_address: "127.0.0.1:0".to_owned(),
            members: Vec::new(),
            agents: Vec::new(),
            worker_program: worker_program(options.worker_program.as_deref())?,
            hold: options.hold.clone(),
            network: None,
        };
        if options.in_namespaces {
            cluster.network = Some(Network::make(folder, options.workers as usize).await?);
        }
        cluster.start_etcd().await?;
        for index in 0..options.coordinators {
            cluster.members.push(Member {
                address: format!("{}:0", if cluster.network.is_some() { network::HUB } else { "127.0.0.1" }),
                name: format!("c{index}"),
                process: None,
            });
            cluster.start_member(index as usize).await?;
        }
        for index in 0..options.workers {
            cluster.agents.push(Agent { name: format!("worker-{index}"), process: None, found: None });
            cluster.start_agent(index as usize)?;
        }
        cluster.wait_for_workers().await?;
        Ok(cluster)
    }

    /// One that runs already, with coordinators at `servers`.
    pub(super) async fn attach(options: &ChaosOptions, servers: &str) -> Result<Self, Failure> {
        let own = [Fault::Outage, Fault::Partition];
        if options.requests || options.watchers > 0 || options.faults.iter().any(|fault| own.contains(fault)) {
            return Err(Failure::invalid(
                "--requests, --watchers and the faults outage and partition need a cluster of their own: leave --attach out",
            ));
        }
        let address = |server: &str| match server.trim().strip_prefix("http://") {
            Some(address) => Ok(Member { address: address.to_owned(), name: String::new(), process: None }),
            None => Err(Failure::invalid(format!("--server {server:?}: --attach takes http:// addresses alone"))),
        };
        let members = servers.split(',').map(address).collect::<Result<Vec<_>, _>>()?;
        let data_dir = std::path::absolute(&options.data_dir)
            .map_err(|error| Failure::invalid(format!("--data-dir {}: {error}", options.data_dir.display())))?;
        let mut cluster = Self {
            folder: data_dir.clone(),
            attached: Some(data_dir),
            memory: PathBuf::new(),
            etcd: None,
            etcd_address: String::new(),
            members,
            agents: Vec::new(),
            worker_program: PathBuf::new(),
            hold: None,
            network: None,
        };
        let (_, workers) = leading(&voices(&cluster.addresses())?)
            .await
            .ok_or_else(|| Failure::failed(format!("no coordinator leads at {servers}")))?;
        for worker in workers {
            let found = processes::named("agent", "THAW_WORKER_NAME", &worker.name)?;
            cluster.agents.push(Agent { name: worker.name, process: None, found });
        }
        if cluster.agent_ids().is_empty() {
            return Err(Failure::invalid("no worker of this cluster runs on this machine, so there is none to harm"));
        }
        Ok(cluster)
    }

    async fn start_etcd(&mut self) -> Result<(), Failure> {
        let (etcd, address) = start_etcd(&self.folder, &self.etcd_address).await?;
        (self.etcd, self.etcd_address) = (Some(etcd), address);
        Ok(())
    }

    /// At the address it had before, if it had one.
    async fn start_member(&mut self, index: usize) -> Result<(), Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::failed(format!("cannot find this program's own path: {error}")))?;
        let member = &self.members[index];
        let mut command = Command::new(&program);
        without_foreign(&mut command);
        command.args(["serve", "--store", &format!("etcd://{}/thaw", self.etcd_address), "--data-dir"]);
        command.arg(self.data_dir()).args(["--listen", &member.address, "--name", &member.name]);
        let mut process = Process::start(command, &self.folder.join(format!("{}.log", member.name)))?;
        let address = process.says("coordinator at http://").await?;
        self.members[index].address = address;
        self.members[index].process = Some(process);
        Ok(())
    }

    fn start_agent(&mut self, index: usize) -> Result<(), Failure> {
        let name = self.agents[index].name.clone();
        let addresses: Vec<String> = self.members.iter().map(|member| format!("http://{}", member.address)).collect();
        let mut command = match &self.network {
            Some(network) => network.command(index, &self.worker_program),
            None => Command::new(&self.worker_program),
        };
        without_foreign(&mut command);
        command.args(["agent", "--coordinator", &addresses.join(","), "--name", &name, "--exit-with-stdin"]);
        command.arg("--prefix-cache-memory").arg(&self.memory);
        command.arg("--prefix-cache-disk").arg(self.folder.join("prefix-cache"));
        if self.network.is_some() {
            command.args(["--host", &network::host(index)]);
        }
        if let Some(hold) = &self.hold {
            command.args(["--hold", hold]);
        }
        self.agents[index].process = Some(Process::start(command, &self.folder.join(format!("{name}.log")))?);
        Ok(())
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        self.attached.clone().unwrap_or_else(|| self.folder.join("data"))
    }

    /// Where links can be cut.
    pub(super) fn network(&self) -> Result<&Network, Failure> {
        self.network.as_ref().ok_or_else(|| Failure::invalid("this cluster has no links to cut"))
    }

    pub(super) fn etcd_address(&self) -> &str {
        &self.etcd_address
    }

    pub(super) fn addresses(&self) -> Vec<String> {
        self.members.iter().map(|member| member.address.clone()).collect()
    }

    /// A client of all coordinators.
    pub(super) fn client(&self) -> Result<Coordinators, Failure> {
        let all: Vec<String> = self.addresses().iter().map(|address| format!("http://{address}")).collect();
        Coordinators::at(&all.join(","), None)
    }

    pub(super) fn workers(&self) -> usize {
        self.agents.len()
    }

    /// Until the leader has a session of every worker.
    pub(super) async fn wait_for_workers(&self) -> Result<usize, Failure> {
        let voices = voices(&self.addresses())?;
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some((leader, workers)) = leading(&voices).await
                && workers.len() >= self.agents.len()
            {
                return Ok(leader);
            }
            if Instant::now() > end {
                let count = self.agents.len();
                let logs = self.folder.display();
                return Err(Failure::failed(format!(
                    "not all of {count} workers have a session in time; logs in {logs}"
                )));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn agent_ids(&self) -> Vec<u32> {
        self.agents.iter().filter_map(Agent::id).collect()
    }

    /// Trainers that live.
    pub(super) fn trainers(&self) -> BTreeSet<u32> {
        processes::trainers_of(&self.agent_ids())
    }

    /// Those of one agent.
    pub(super) fn trainers_of(&self, index: usize) -> BTreeSet<u32> {
        self.agents[index].id().map_or_else(BTreeSet::new, |id| processes::trainers_of(&[id]))
    }

    /// Whether all trainers of a gang of `world_size` are there; of another's cluster, some.
    pub(super) fn is_whole(&self, world_size: u32) -> bool {
        let trainers = self.trainers().len();
        if self.attached.is_some() { trainers > 0 } else { trainers >= world_size.max(1) as usize }
    }

    /// SIGKILL of an agent. `false` where it is not on this machine.
    pub(super) async fn kill_agent(&mut self, index: usize) -> bool {
        let agent = &mut self.agents[index];
        match (&mut agent.process, agent.found) {
            (Some(process), _) => process.kill().await,
            (None, Some(id)) => processes::send(id, Signal::SIGKILL),
            (None, None) => return false,
        }
        true
    }

    /// `false` where it is not on this machine.
    pub(super) fn signal_agent(&self, index: usize, signal: Signal) -> bool {
        self.agents[index].id().map(|id| processes::send(id, signal)).is_some()
    }

    pub(super) async fn restart_agent(&mut self, index: usize) -> Result<(), Failure> {
        if self.attached.is_none() {
            return self.start_agent(index);
        }
        let agent = &mut self.agents[index];
        let (before, end) = (agent.found, Instant::now() + DEADLINE);
        loop {
            let found = processes::named("agent", "THAW_WORKER_NAME", &agent.name)?;
            if found.is_some() && found != before {
                agent.found = found;
                return Ok(());
            }
            if Instant::now() > end {
                return Err(Failure::failed(format!("nobody has started the agent {} again", agent.name)));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// SIGKILL or SIGTERM to the coordinator that leads; returns at once.
    pub(super) async fn signal_leader(&self, index: usize, signal: Signal) -> Result<(), Failure> {
        if let Some(process) = &self.members[index].process {
            process.signal(signal);
            return Ok(());
        }
        let mut voice = voices(&self.addresses())?.swap_remove(index);
        let name = voice.get_leader(pb::GetLeaderRequest {}).await?.into_inner().name;
        let id = processes::named("serve", "THAW_NAME", &name)?;
        let id = id.ok_or_else(|| Failure::failed(format!("the coordinator {name} does not run on this machine")))?;
        processes::send(id, signal);
        Ok(())
    }

    /// Once it has ended: again, where it was. Of another's cluster, whoever started it does so.
    pub(super) async fn restart_member(&mut self, index: usize) -> Result<(), Failure> {
        if self.attached.is_some() {
            return Ok(());
        }
        if let Some(mut process) = self.members[index].process.take() {
            process.ended().await;
        }
        self.start_member(index).await
    }

    /// SIGKILL of all coordinators and of etcd.
    pub(super) async fn kill_control_plane(&mut self) {
        for member in &mut self.members {
            if let Some(mut process) = member.process.take() {
                process.kill().await;
            }
        }
        if let Some(mut etcd) = self.etcd.take() {
            etcd.kill().await;
        }
    }

    pub(super) async fn restart_control_plane(&mut self) -> Result<(), Failure> {
        self.start_etcd().await?;
        for index in 0..self.members.len() {
            self.start_member(index).await?;
        }
        Ok(())
    }

    /// Ends everything, and says what did not end when asked, or was left (CHAOS-1).
    pub(super) async fn stop(mut self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.attached.is_some() {
            return problems;
        }
        let trainers = self.trainers();
        for agent in &self.agents {
            // Also one that stands still.
            if let Some(process) = &agent.process {
                process.signal(Signal::SIGCONT);
                process.signal(Signal::SIGTERM);
            }
        }
        let agents = self.agents.iter_mut().filter_map(|agent| Some((agent.name.clone(), agent.process.take()?)));
        for (name, mut process) in agents.collect::<Vec<_>>() {
            if !process.ended().await {
                problems.push(format!("the agent {name} did not end when asked"));
            }
        }
        for process in self.members.iter().filter_map(|member| member.process.as_ref()) {
            process.signal(Signal::SIGTERM);
        }
        for member in &mut self.members {
            if let Some(mut process) = member.process.take()
                && !process.ended().await
            {
                problems.push(format!("the coordinator {} did not end when asked", member.name));
            }
        }
        if let Some(mut etcd) = self.etcd.take() {
            etcd.signal(Signal::SIGTERM);
            if !etcd.ended().await {
                problems.push("etcd did not end when asked".to_owned());
            }
        }
        let end = Instant::now() + Duration::from_secs(5);
        while trainers.iter().any(|id| processes::is_alive(*id)) && Instant::now() < end {
            tokio::time::sleep(POLL).await;
        }
        for id in trainers.into_iter().filter(|id| processes::is_alive(*id)) {
            problems.push(format!("the trainer {id} outlived its agent"));
            processes::send(id, Signal::SIGKILL);
        }
        if let Some(network) = self.network.take() {
            problems.extend(network.remove().await);
        }
        // It is there only if prefixes were kept.
        let _ = std::fs::remove_dir_all(&self.memory);
        problems
    }
}

/// Takes off what the environment says of other clusters.
fn without_foreign(command: &mut Command) {
    for variable in FOREIGN {
        command.env_remove(variable);
    }
}

/// A client of each coordinator alone, to ask whether it leads.
pub(super) fn voices(addresses: &[String]) -> Result<Vec<ClusterServiceClient<Channel>>, Failure> {
    let voice = |address: &String| {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Failure::invalid(format!("{address} is no address: {error}")))?;
        Ok(ClusterServiceClient::new(endpoint.connect_timeout(ANSWER).timeout(ANSWER).connect_lazy()))
    };
    addresses.iter().map(voice).collect()
}

/// Who leads now, by its place, and its workers. Asks all at once: one that knows of no leader waits before it says so.
pub(super) async fn leading(voices: &[ClusterServiceClient<Channel>]) -> Option<(usize, Vec<pb::Worker>)> {
    let ask = |(index, voice): (usize, &ClusterServiceClient<Channel>)| {
        let mut voice = voice.clone();
        async move {
            // Only the leader answers.
            let listed = voice.list_workers(pb::ListWorkersRequest {}).await?;
            Ok::<_, tonic::Status>((index, listed.into_inner().workers))
        }
        .boxed()
    };
    let asked: Vec<_> = voices.iter().enumerate().map(ask).collect();
    if asked.is_empty() { None } else { futures::future::select_ok(asked).await.ok().map(|(found, _)| found) }
}

/// An etcd that keeps its data below `folder`, and where it serves: at `address`, whose port may be 0.
pub(super) async fn start_etcd(folder: &Path, address: &str) -> Result<(Process, String), Failure> {
    let (client, any) = (format!("http://{address}"), "http://127.0.0.1:0");
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(folder.join("etcd"));
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", any, "--initial-advertise-peer-urls", any]);
    command.args(["--initial-cluster", &format!("default={any}")]);
    let mut etcd = Process::start(command, &folder.join("etcd.log"))?;
    // "serving insecure client requests on 127.0.0.1:34863, this is strongly discouraged!"
    let address = etcd.says("client requests on ").await?;
    Ok((etcd, address))
}
