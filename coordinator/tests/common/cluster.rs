//! A coordinator in this process, on an ephemeral port, with plans that need no files.

pub(crate) use super::one_stage::OneStage;
use super::proxy::{Fault, Proxy};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use thaw_coordinator::driver::Tenants;
use thaw_coordinator::server::{self, ServeConfig, Server};
use thaw_coordinator::store::EtcdAccess;
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::run_service_client::RunServiceClient;
use thaw_proto::pb::watch_run_response::Update;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub(crate) const WAIT: Duration = Duration::from_secs(30);

/// A coordinator on threads of its own, so that it can be killed.
pub(crate) struct Coordinator {
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), server::Error>>,
    runtime: tokio::runtime::Runtime,
    /// Between it and its store, where it may be killed.
    link: Option<Proxy>,
}

pub(crate) fn config(store: &str, data_dir: &Path) -> ServeConfig {
    ServeConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        store: store.parse().unwrap(),
        etcd: EtcdAccess::default(),
        data_dir: data_dir.to_owned(),
        name: "test".to_owned(),
        advertise: None,
        tenants: Tenants::new(),
    }
}

pub(crate) fn embedded(folder: &Path) -> String {
    format!("embedded:{}", folder.join("store.redb").display())
}

impl Coordinator {
    pub(crate) async fn start(store: &str, data_dir: &Path) -> Self {
        Self::start_as(config(store, data_dir)).await
    }

    pub(crate) async fn start_as(config: ServeConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let stop = CancellationToken::new();
        let until = stop.clone();
        let bound = runtime.spawn(async move { Server::bind(config).await.unwrap().with_planner(Arc::new(OneStage)) });
        let bound = bound.await.unwrap();
        let address = bound.address();
        let running = runtime.spawn(bound.run(until));
        Self { address, stop, running, runtime, link: None }
    }

    /// Returns once this coordinator leads.
    pub(crate) async fn client(&self) -> RunServiceClient<Channel> {
        let channel = channel(self.address).await;
        let mut cluster = ClusterServiceClient::new(channel.clone());
        let leads = async { while cluster.list_workers(pb::ListWorkersRequest {}).await.is_err() {} };
        tokio::time::timeout(WAIT, leads).await.expect("leads in time");
        RunServiceClient::new(channel)
    }

    /// Whether it leads or not.
    pub(crate) async fn any_client(&self) -> RunServiceClient<Channel> {
        RunServiceClient::new(channel(self.address).await)
    }

    /// Talks to its etcd over a link that can be cut.
    pub(crate) async fn start_to_be_killed(etcd: &str, prefix: &str, data_dir: &Path, name: &str) -> Self {
        let link = Proxy::start(etcd).await;
        let config = config(&format!("etcd://{}/{prefix}", link.address), data_dir);
        let mut this = Self::start_as(ServeConfig { name: name.to_owned(), ..config }).await;
        this.link = Some(link);
        this
    }

    /// Ends as by SIGKILL: nothing is given back. Its threads do not all end at one instant, so what some of them still make
    /// of the end of others must not reach the store.
    pub(crate) fn kill(self) {
        self.link().set(Fault::BlackHole);
        self.runtime.shutdown_background();
    }

    pub(crate) fn link(&self) -> &Proxy {
        self.link.as_ref().expect("started to be killed")
    }

    pub(crate) async fn stop(self) -> Result<(), server::Error> {
        self.stop.cancel();
        let ended = tokio::time::timeout(WAIT, self.running).await.expect("stops in time").unwrap();
        self.runtime.shutdown_background();
        ended
    }
}

pub(crate) async fn channel(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

pub(crate) fn spec(name: &str, workers: u32) -> pb::RunSpec {
    let text = format!(
        "name: {name}\nbackbone: {{graph: file:///m.pt2}}\nglobal_batch_size: 4\nworkers: {{min: {workers}, max: {workers}}}\n\
         data: {{train: {{path: file:///d.csv, format: csv, text: t, label: l}}}}\n"
    );
    thaw_proto::text::parse_spec(&text).unwrap()
}

pub(crate) fn create(name: &str, workers: u32) -> pb::CreateRunRequest {
    pb::CreateRunRequest { spec: Some(spec(name, workers)), request_id: String::new(), validate_only: false }
}

/// Everything a watch says until the run is as wanted, or has ended.
pub(crate) async fn watch_until(
    client: &mut RunServiceClient<Channel>,
    request: pb::WatchRunRequest,
    wanted: impl Fn(&pb::Run) -> bool,
) -> (pb::Run, Vec<pb::WatchRunResponse>) {
    let watching = async {
        let mut stream = client.watch_run(request).await.unwrap().into_inner();
        let mut seen = Vec::new();
        let mut last = None;
        while let Some(message) = stream.message().await.unwrap() {
            let run = if let Some(Update::Run(run)) = &message.update { Some(run.clone()) } else { None };
            seen.push(message);
            if run.is_some() {
                last = run;
                if wanted(last.as_ref().unwrap()) {
                    break;
                }
            }
        }
        (last.unwrap(), seen)
    };
    tokio::time::timeout(WAIT, watching).await.expect("the wanted state in time")
}

pub(crate) fn watch(run: &pb::Run) -> pb::WatchRunRequest {
    pb::WatchRunRequest { name: run.name.clone(), after_revision: 0, include_progress: false }
}

pub(crate) async fn until_ended(client: &mut RunServiceClient<Channel>, run: &pb::Run) -> pb::Run {
    watch_until(client, watch(run), |_| false).await.0
}

pub(crate) async fn until_state(client: &mut RunServiceClient<Channel>, run: &pb::Run, state: pb::RunState) -> pb::Run {
    let found = watch_until(client, watch(run), |run| run.state() == state).await.0;
    assert_eq!(found.state(), state, "{}", found.message);
    found
}
