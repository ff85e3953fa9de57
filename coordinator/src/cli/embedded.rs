//! A whole cluster on this machine: the coordinator in this process, each worker a process of its own.
//!
//! EMB-1: the workers die with this process: each holds its standard input open from here and ends at its end.

use super::args::{ClusterOptions, ServeOptions, UpOptions};
use super::client::Coordinators;
use super::train::interruption;
use super::{Failure, client};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;
use thaw_coordinator::driver::Tenants;
use thaw_coordinator::server::{self, Bound, ServeConfig, Server};
use thaw_coordinator::store::{EtcdAccess, StoreUrl};
use thaw_proto::pb;
use thaw_runtime::limits;
use thaw_runtime::tls::Tls;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const START_DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// What the workers write to this process's stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkerLogs {
    Everything,
    Failures,
}

pub(super) struct Cluster {
    address: SocketAddr,
    data_dir: PathBuf,
    workers: Vec<Child>,
    shutdown: CancellationToken,
    /// `None` once it has ended by itself.
    serving: Option<JoinHandle<Result<(), server::Error>>>,
}

impl Cluster {
    /// Binds the coordinator, then starts the workers.
    pub(super) async fn start(options: &ClusterOptions, listen: SocketAddr, logs: WorkerLogs) -> Result<Self, Failure> {
        let program = worker_program(options.worker_program.as_deref())?;
        let data_dir = std::path::absolute(&options.data_dir).map_err(|error| {
            Failure::failed(format!("cannot find the data folder {}: {error}", options.data_dir.display()))
        })?;
        let store = StoreUrl::Embedded(data_dir.join("store.redb"));
        let name = "embedded".to_owned();
        let etcd = EtcdAccess::default();
        let bound = bind(ServeConfig {
            listen,
            tls: None,
            store,
            etcd,
            data_dir: data_dir.clone(),
            name,
            advertise: None,
            tenants: Tenants::new(),
        })
        .await?;
        let address = bound.address();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(bound.run(shutdown.clone()));
        let mut cluster = Self { address, data_dir, workers: Vec::new(), shutdown, serving: Some(serving) };
        for index in 0..options.workers {
            let worker = start_worker(&program, &cluster.url(), index, options.hold.as_deref(), logs);
            cluster.workers.push(worker?);
        }
        Ok(cluster)
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Without TLS, on a loopback address.
    pub(super) fn coordinators(&self) -> Result<Coordinators, Failure> {
        Coordinators::at(&self.url(), None)
    }

    pub(super) fn run_folder(&self, run: &pb::Run) -> PathBuf {
        self.data_dir.join(&run.name)
    }

    /// Until every worker has said hello.
    pub(super) async fn wait_for_workers(&mut self) -> Result<(), Failure> {
        let all = self.workers.len();
        let mut coordinators = self.coordinators()?;
        let wait = async {
            loop {
                // Until the coordinator leads it knows of no workers and says so with an error.
                match client::workers_now(&mut coordinators).await {
                    Ok(list) if list.workers.len() >= all => return Ok(()),
                    Ok(_) | Err(_) => tokio::time::sleep(POLL).await,
                }
            }
        };
        let started = tokio::select! {
            started = tokio::time::timeout(START_DEADLINE, wait) => started,
            failure = ended_by_itself(&mut self.serving) => return Err(failure),
        };
        started.unwrap_or_else(|_| {
            Err(Failure::failed(format!(
                "not all of {all} workers started within {} s; see their messages above",
                START_DEADLINE.as_secs()
            )))
        })
    }

    /// Ends the workers, then the coordinator.
    pub(super) async fn stop(mut self) {
        for worker in &mut self.workers {
            // Its standard input ends, which asks it to end its trainers and itself.
            drop(worker.stdin.take());
        }
        for worker in &mut self.workers {
            if tokio::time::timeout(STOP_DEADLINE, worker.wait()).await.is_err() {
                // It did not hear; its trainers see their parent die and end too.
                let _ = worker.kill().await;
            }
        }
        self.shutdown.cancel();
        let Some(serving) = self.serving else { return };
        match tokio::time::timeout(STOP_DEADLINE, serving).await {
            Ok(Ok(Ok(()))) => {}
            Ok(ended) => tracing::error!(error = serving_failure(ended).to_string(), "the coordinator failed"),
            Err(_) => tracing::error!("the coordinator did not stop in time"),
        }
    }
}

/// `thaw up`: until a signal.
pub(super) async fn up(options: UpOptions) -> Result<ExitCode, Failure> {
    let interrupted = interruption()?;
    let mut cluster = Cluster::start(&options.cluster, options.listen, WorkerLogs::Everything).await?;
    cluster.wait_for_workers().await?;
    eprintln!(
        "coordinator at {} with {} workers; data in {}",
        cluster.url(),
        options.cluster.workers,
        cluster.data_dir.display()
    );
    let failed = tokio::select! {
        () = interrupted.cancelled() => None,
        failure = ended_by_itself(&mut cluster.serving) => Some(failure),
    };
    match failed {
        None => {
            cluster.stop().await;
            Ok(ExitCode::SUCCESS)
        }
        Some(failure) => Err(failure),
    }
}

fn tenants(quotas: &[(String, u32)], weights: &[(String, u32)]) -> Tenants {
    let mut tenants = Tenants::new();
    for (tenant, quota) in quotas {
        tenants.entry(tenant.clone()).or_default().quota = Some(*quota);
    }
    for (tenant, weight) in weights {
        tenants.entry(tenant.clone()).or_default().weight = *weight;
    }
    tenants
}

/// `thaw serve`: until a signal.
pub(super) async fn serve(options: ServeOptions, tls: Option<Tls>) -> Result<ExitCode, Failure> {
    let interrupted = interruption()?;
    // A connection for each worker.
    match limits::raise_open_files() {
        Ok(most) => tracing::debug!(most, "files and connections that may be open"),
        Err(error) => tracing::warn!(%error, "as many connections as the system gives at first: raise `ulimit -n`"),
    }
    let store = options.store.url()?;
    let etcd = options.store.access();
    let data_dir = std::path::absolute(&options.data_dir).map_err(|error| {
        Failure::failed(format!("cannot find the data folder {}: {error}", options.data_dir.display()))
    })?;
    let tenants = tenants(&options.tenant_quota, &options.tenant_weight);
    let ServeOptions { listen, name, advertise, .. } = options;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let bound = bind(ServeConfig { listen, tls, store, etcd, data_dir, name, advertise, tenants }).await?;
    eprintln!("coordinator at {scheme}://{}", bound.address());
    let shutdown = CancellationToken::new();
    let mut serving = tokio::spawn(bound.run(shutdown.clone()));
    tokio::select! {
        () = interrupted.cancelled() => {
            shutdown.cancel();
            let _ = tokio::time::timeout(STOP_DEADLINE, serving).await;
            Ok(ExitCode::SUCCESS)
        }
        ended = &mut serving => Err(serving_failure(ended)),
    }
}

async fn bind(config: ServeConfig) -> Result<Bound, Failure> {
    Server::bind(config).await.map_err(|error| Failure::from_error(&error))
}

/// Waits for the coordinator to end, which it should not do unasked. Never returns where it already has.
async fn ended_by_itself(serving: &mut Option<JoinHandle<Result<(), server::Error>>>) -> Failure {
    let Some(running) = serving else { return std::future::pending().await };
    let ended = running.await;
    *serving = None;
    serving_failure(ended)
}

fn serving_failure(ended: Result<Result<(), server::Error>, tokio::task::JoinError>) -> Failure {
    match ended {
        Ok(Ok(())) => Failure::failed("the coordinator stopped by itself"),
        Ok(Err(error)) => Failure::from_error(&error),
        Err(error) => Failure::from_error(&error),
    }
}

pub(super) fn worker_program(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let program = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .map_err(|error| Failure::failed(format!("cannot find this program's own path: {error}")))?
            .with_file_name("thaw-worker"),
    };
    if program.is_file() {
        Ok(program)
    } else {
        Err(Failure::invalid(format!(
            "no worker program at {}; build it or name it with --worker-program",
            program.display()
        )))
    }
}

fn start_worker(
    program: &Path,
    coordinator: &str,
    index: u32,
    hold: Option<&str>,
    logs: WorkerLogs,
) -> Result<Child, Failure> {
    let mut command = Command::new(program);
    command.args(["agent", "--coordinator", coordinator, "--name", &format!("worker-{index}"), "--exit-with-stdin"]);
    // Where THAW_DEVICE says cuda, each worker's one slot has a GPU of its own.
    command.args(["--first-gpu", &index.to_string()]);
    // The coordinator of this process is on a loopback address and without TLS, whatever the environment says of others.
    for variable in ["THAW_TLS_CA", "THAW_TLS_CERT", "THAW_TLS_KEY", "THAW_TLS_NAME"] {
        command.env_remove(variable);
    }
    if logs == WorkerLogs::Failures {
        command.arg("--quiet");
    }
    if let Some(hold) = hold {
        command.args(["--hold", hold]);
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Failure::failed(format!("cannot start the worker {}: {error}", program.display())))
}
