//! A coordinator in this process, on an ephemeral port, with plans that need no files.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use thaw_coordinator::intake::{Planned, SpecPlanner};
use thaw_coordinator::leader::Timing;
use thaw_coordinator::server::{self, ServeConfig, Server};
use thaw_proto::ids::GroupIndex;
use thaw_proto::pb;
use thaw_proto::pb::run_service_client::RunServiceClient;
use thaw_proto::pb::watch_run_response::Update;
use thaw_proto::plan::{DataSummary, LayerGroup, Plan, PlannedStage, StageCost};
use thaw_proto::spec::{LrSchedulerType, OnEnter, RunSpec};
use thaw_proto::violation::Violations;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub(crate) const WAIT: Duration = Duration::from_secs(30);

pub(crate) struct Coordinator {
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), server::Error>>,
}

pub(crate) fn config(store: &str, data_dir: &Path) -> ServeConfig {
    ServeConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        store: store.parse().unwrap(),
        data_dir: data_dir.to_owned(),
        name: "test".to_owned(),
    }
}

pub(crate) fn embedded(folder: &Path) -> String {
    format!("embedded:{}", folder.join("store.redb").display())
}

impl Coordinator {
    pub(crate) async fn start(store: &str, data_dir: &Path) -> Self {
        let bound = Server::bind(config(store, data_dir)).await.unwrap().with_planner(Arc::new(OneStage));
        // Short, so that a test need not wait for a lease to end.
        let timing = Timing {
            ttl: Duration::from_secs(5),
            renew_every: Duration::from_millis(500),
            step_down_after: Duration::from_secs(4),
        };
        let bound = bound.with_timing(timing);
        let address = bound.address();
        let stop = CancellationToken::new();
        let running = tokio::spawn(bound.run(stop.clone()));
        Self { address, stop, running }
    }

    /// Returns once this coordinator leads.
    pub(crate) async fn client(&self) -> RunServiceClient<Channel> {
        let mut client = RunServiceClient::connect(format!("http://{}", self.address)).await.unwrap();
        let asked = async {
            while client.list_runs(pb::ListRunsRequest::default()).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAIT, asked).await.expect("leads in time");
        client
    }

    pub(crate) async fn stop(self) -> Result<(), server::Error> {
        self.stop.cancel();
        tokio::time::timeout(WAIT, self.running).await.expect("stops in time").unwrap()
    }
}

/// Plans one stage of the head, whatever the spec.
#[derive(Debug)]
pub(crate) struct OneStage;

impl SpecPlanner for OneStage {
    fn plan(&self, spec: &RunSpec) -> Result<Planned, Violations> {
        let group = LayerGroup { name: "head".to_owned(), parameters: 10, forward_flops: 10, embedding: false };
        let stage = PlannedStage {
            name: "head".to_owned(),
            trainable_groups: vec![GroupIndex(0)],
            learning_rates: vec![spec.learning_rate],
            until: spec.until.clone(),
            on_enter: OnEnter::RestoreBest,
            schedule: LrSchedulerType::Linear,
            warmup_steps: 0,
            max_steps: 2,
            trainable_parameters: 10,
            all_reduce_bytes: 40,
            memory_bytes: 160,
            boundary_bytes_per_sample: 0,
            thawed_groups: vec![GroupIndex(0)],
            cost: StageCost::default(),
            plateau: None,
        };
        let plan = Plan {
            groups: vec![group],
            stages: vec![stage],
            classes: vec!["no".to_owned(), "yes".to_owned()],
            data: DataSummary {
                train_samples: 4,
                eval_samples: 4,
                test_samples: 4,
                class_counts: vec![6, 6],
                fingerprint: "ff".to_owned(),
            },
            logical_shards: spec.logical_shards,
            global_batch_size: spec.global_batch_size,
            steps_per_epoch: 1,
            notes: Vec::new(),
            feature_size: 5,
        };
        Ok(Planned { plan, index: None })
    }
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
) -> (pb::Run, Vec<Update>) {
    let watching = async {
        let mut stream = client.watch_run(request).await.unwrap().into_inner();
        let mut seen = Vec::new();
        let mut last = None;
        while let Some(message) = stream.message().await.unwrap() {
            let update = message.update.unwrap();
            if let Update::Run(run) = &update {
                last = Some(run.clone());
                seen.push(update);
                if wanted(last.as_ref().unwrap()) {
                    break;
                }
            } else {
                seen.push(update);
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
