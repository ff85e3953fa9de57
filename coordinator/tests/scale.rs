//! Gangs that change their size, over real gRPC and real stores.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::agent::{Act, Agent};
use common::cluster::{Coordinator, WAIT, channel, embedded, spec, watch, watch_until};
use std::net::SocketAddr;
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::run_service_client::RunServiceClient;
use thaw_proto::status;
use tonic::transport::Channel;
use tonic::{Code, Status};

type Client = RunServiceClient<Channel>;

/// For one to four trainers.
async fn submit(client: &mut Client, name: &str) -> pb::Run {
    submit_as(client, name, (1, 4), pb::Priority::Normal).await
}

async fn submit_as(client: &mut Client, name: &str, workers: (u32, u32), priority: pb::Priority) -> pb::Run {
    let workers = pb::Workers { min: Some(workers.0), max: Some(workers.1), ..Default::default() };
    let scheduling = pb::Scheduling { priority: priority.into(), ..Default::default() };
    let spec = pb::RunSpec { workers: Some(workers), scheduling: Some(scheduling), ..spec(name, 1) };
    let request = pb::CreateRunRequest { spec: Some(spec), ..Default::default() };
    client.create_run(request).await.unwrap().into_inner()
}

async fn scale(client: &mut Client, run: &pb::Run, workers: u32) -> Result<pb::Run, Status> {
    let request = pb::ScaleRunRequest { name: run.name.clone(), workers };
    client.scale_run(request).await.map(tonic::Response::into_inner)
}

/// Until the run's gangs have had these sizes, and the last one trains.
async fn until_sizes(client: &mut Client, run: &pb::Run, sizes: &[u32]) -> pb::Run {
    let is_there = |run: &pb::Run| run.world_sizes.len() >= sizes.len() && run.state() == pb::RunState::Running;
    let found = watch_until(client, watch(run), is_there).await.0;
    assert_eq!(found.world_sizes, sizes, "{}", found.message);
    found
}

async fn until_free(address: SocketAddr, slots: u32) {
    let mut cluster = ClusterServiceClient::new(channel(address).await);
    let freed = async {
        loop {
            if let Ok(listed) = cluster.list_workers(pb::ListWorkersRequest {}).await
                && listed.get_ref().workers.iter().map(|worker| worker.free_slots).sum::<u32>() == slots
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(WAIT, freed).await.expect("slots are free in time");
}

async fn explain(client: &mut Client, run: &pb::Run) -> pb::ExplainRunResponse {
    client.explain_run(pb::ExplainRunRequest { name: run.name.clone() }).await.unwrap().into_inner()
}

/// RUN-11
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_scaled_while_it_trains_and_gives_back_what_it_does_not_need() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let run = submit(&mut client, "elastic").await;
    assert_eq!((run.world_size, run.wanted_world_size), (0, 4));
    assert_eq!(scale(&mut client, &run, 2).await.unwrap().wanted_world_size, 2);
    let one = Agent::start_keeping(vec![coordinator.address], "one", 2, Act::HoldAtStepOne).await;
    let two = Agent::start_keeping(vec![coordinator.address], "two", 2, Act::HoldAtStepOne).await;
    let formed = until_sizes(&mut client, &run, &[2]).await;
    assert_eq!((formed.world_size, formed.generation), (2, 1));

    scale(&mut client, &run, 4).await.unwrap();
    until_sizes(&mut client, &run, &[2, 4]).await;
    // Another run waits for what is given back.
    let other = submit(&mut client, "other").await;
    let shrunk = scale(&mut client, &run, 1).await.unwrap();
    assert_eq!((shrunk.state(), shrunk.reason()), (pb::RunState::Forming, pb::RunReason::Scaled));
    let shrunk = until_sizes(&mut client, &run, &[2, 4, 1]).await;
    assert_eq!((shrunk.generation, shrunk.attempt, shrunk.wanted_world_size), (3, 1, 1));
    until_sizes(&mut client, &other, &[3]).await;
    assert_eq!(one.started() + two.started(), 4 + 3, "nobody of the first run was started again");

    // It wants one back that is not free.
    scale(&mut client, &run, 2).await.unwrap();
    let told = explain(&mut client, &run).await;
    assert_eq!((told.state(), told.world_size, told.wanted_world_size), (pb::RunState::Running, 1, 2));
    assert_eq!((told.queue_place, told.queue_length, told.slots_free), (0, 0, 0));
    assert!(told.message.ends_with("; 2 are wanted: no slot is free"), "{}", told.message);
    client.cancel_run(pb::CancelRunRequest { name: other.name.clone() }).await.unwrap();
    until_sizes(&mut client, &run, &[2, 4, 1, 2]).await;
    until_free(coordinator.address, 2).await;

    let refused = scale(&mut client, &run, 5).await.unwrap_err();
    assert_eq!((refused.code(), status::reason(&refused).as_deref()), (Code::InvalidArgument, Some("INVALID_REQUEST")));
    assert!(refused.message().contains("workers: must be in 1-4 (workers.min to workers.max"), "{}", refused.message());
    client.cancel_run(pb::CancelRunRequest { name: run.name.clone() }).await.unwrap();
    let refused = scale(&mut client, &run, 1).await.unwrap_err();
    let suspended = client.suspend_run(pb::SuspendRunRequest { name: run.name.clone() }).await.unwrap_err();
    assert_eq!((refused.code(), status::reason(&refused)), (suspended.code(), status::reason(&suspended)));
    until_free(coordinator.address, 4).await;
    coordinator.stop().await.unwrap();
}

/// RUN-11: what was acknowledged is done by whoever leads then, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_goes_on_with_the_size_that_is_wanted() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let first = Coordinator::start_to_be_killed(&etcd.address, "lab", folder.path(), "c0").await;
    let mut client = first.client().await;
    let second = Coordinator::start_to_be_killed(&etcd.address, "lab", folder.path(), "c1").await;
    let addresses = vec![first.address, second.address];
    let one = Agent::start_keeping(addresses.clone(), "one", 2, Act::HoldAtStepOne).await;
    let run = submit(&mut client, "elastic").await;
    scale(&mut client, &run, 2).await.unwrap();
    until_sizes(&mut client, &run, &[2]).await;
    scale(&mut client, &run, 4).await.unwrap();
    first.kill();
    let mut client = second.client().await;
    let two = Agent::start_keeping(addresses, "two", 2, Act::HoldAtStepOne).await;
    let grown = until_sizes(&mut client, &run, &[2, 4]).await;
    assert_eq!((grown.generation, grown.attempt), (2, 1));
    assert_eq!((one.started(), two.started()), (2, 2), "nobody was started again");
    until_free(second.address, 0).await;
    scale(&mut client, &run, 1).await.unwrap();
    until_sizes(&mut client, &run, &[2, 4, 1]).await;
    until_free(second.address, 3).await;
    second.stop().await.unwrap();
}

/// SCHED-6, RUN-12: a run of higher priority has first what others can do without, then all of the lowest, which comes back by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn higher_priorities_take_slots_and_give_them_back() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let agent = Agent::start_keeping(vec![coordinator.address], "one", 4, Act::HoldAtStepOne).await;
    let low = submit_as(&mut client, "low", (1, 4), pb::Priority::Low).await;
    until_sizes(&mut client, &low, &[4]).await;
    let high = submit_as(&mut client, "high", (3, 3), pb::Priority::High).await;
    let shrunk = until_sizes(&mut client, &low, &[4, 1]).await;
    assert_eq!((shrunk.attempt, shrunk.wanted_world_size), (1, 4));
    until_sizes(&mut client, &high, &[3]).await;
    assert_eq!(agent.started(), 4 + 3);

    let next = submit_as(&mut client, "next", (1, 1), pb::Priority::Normal).await;
    until_sizes(&mut client, &next, &[1]).await;
    let told = explain(&mut client, &low).await;
    assert_eq!((told.state(), told.queue_place, told.slots_free), (pb::RunState::Pending, 1, 0));
    let is_running = |run: &pb::Run| run.attempt == 2 && run.state() == pb::RunState::Running;
    client.cancel_run(pb::CancelRunRequest { name: next.name.clone() }).await.unwrap();
    let back = watch_until(&mut client, watch(&low), is_running).await.0;
    assert_eq!((&back.world_sizes[..], back.position.unwrap().step), (&[4, 1, 1][..], 1), "{}", back.message);
    client.cancel_run(pb::CancelRunRequest { name: high.name.clone() }).await.unwrap();
    until_sizes(&mut client, &low, &[4, 1, 1, 4]).await;
    coordinator.stop().await.unwrap();
}
