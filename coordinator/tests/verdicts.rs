//! Trainers that end by their own doing, over real gRPC: what becomes of the run and of the slot.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::agent::{Act, Agent};
use common::cluster::{Coordinator, channel, create, embedded, until_ended, watch, watch_until};
use std::net::SocketAddr;
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::run_service_client::RunServiceClient;
use tonic::transport::Channel;

async fn workers(address: SocketAddr) -> Vec<pb::Worker> {
    let mut cluster = ClusterServiceClient::new(channel(address).await);
    cluster.list_workers(pb::ListWorkersRequest {}).await.unwrap().into_inner().workers
}

/// Waits until the run says that slots are quarantined, and what is shown of that is the same everywhere.
async fn until_quarantined(coordinator: &Coordinator, client: &mut RunServiceClient<Channel>, run: &pb::Run) {
    let says = |run: &pb::Run| run.message.starts_with("needs 1 free slot(s); 1 slot(s) are quarantined");
    let waits = watch_until(client, watch(run), says).await.0;
    assert!(says(&waits), "{}", waits.message);
    assert_eq!((waits.state(), waits.reason()), (pb::RunState::Resizing, pb::RunReason::WaitingForWorkers));
    let listed = workers(coordinator.address).await;
    let [worker] = &listed[..] else { panic!("{listed:?}") };
    let [resting] = &worker.quarantined[..] else { panic!("{worker:?}") };
    assert_eq!((worker.free_slots, resting.slot, resting.faults), (0, 0, 2));
    let request = pb::ExplainRunRequest { name: run.name.clone() };
    let told = client.explain_run(request).await.unwrap().into_inner();
    assert_eq!((told.slots_free, told.slots_quarantined, told.queue_place), (0, 1, 1));
    assert_eq!(told.quarantined_until, resting.until);
    assert_eq!(told.message, waits.message);
}

/// RUN-7, RUN-14, QUAR-1, QUAR-3: the slot rests after two crashes, for the next leader too; the third elsewhere shows that it was the step.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_rests_after_two_crashes_and_a_third_elsewhere_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let one = Agent::start(coordinator.address, "one", 1, Act::CrashAfterStepOne).await;
    let run = client.create_run(create("crashes", 1)).await.unwrap().into_inner();
    until_quarantined(&coordinator, &mut client, &run).await;
    drop(one);
    coordinator.stop().await.unwrap();

    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let one = Agent::start(coordinator.address, "one", 1, Act::CrashAfterStepOne).await;
    until_quarantined(&coordinator, &mut client, &run).await;
    let two = Agent::start(coordinator.address, "two", 1, Act::CrashAfterStepOne).await;
    let ended = until_ended(&mut client, &run).await;
    assert_eq!((ended.state(), ended.reason()), (pb::RunState::Failed, pb::RunReason::StepFailed));
    let said = "trainers failed by their own doing 3 times in a row with no step after 1; the last: rank 0 on two slot 0 ended: exit code 101";
    assert_eq!(ended.message, said);
    assert_eq!((one.started(), two.started()), (0, 1));
    let resting: usize = workers(coordinator.address).await.iter().map(|worker| worker.quarantined.len()).sum();
    assert_eq!(resting, 0, "it was not the slots");
    coordinator.stop().await.unwrap();
}
