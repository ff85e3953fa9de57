//! Runs that wait for slots, over real gRPC: whose turn it is, and what they are told.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::agent::{Act, Agent};
use common::cluster::{Coordinator, config, embedded, spec, until_ended, until_state, watch, watch_until};
use thaw_coordinator::driver::Tenants;
use thaw_coordinator::server;
use thaw_core::scheduler::Share;
use thaw_proto::pb;
use thaw_proto::pb::run_service_client::RunServiceClient;
use tonic::transport::Channel;

type Client = RunServiceClient<Channel>;

async fn submit(client: &mut Client, name: &str, tenant: &str, priority: pb::Priority) -> pb::Run {
    let scheduling = pb::Scheduling { tenant: tenant.to_owned(), priority: priority.into() };
    let spec = pb::RunSpec { scheduling: Some(scheduling), ..spec(name, 1) };
    let request = pb::CreateRunRequest { spec: Some(spec), ..Default::default() };
    client.create_run(request).await.unwrap().into_inner()
}

async fn explain(client: &mut Client, run: &pb::Run) -> pb::ExplainRunResponse {
    client.explain_run(pb::ExplainRunRequest { name: run.name.clone() }).await.unwrap().into_inner()
}

async fn until_reason(client: &mut Client, run: &pb::Run, reason: pb::RunReason) {
    let found = watch_until(client, watch(run), |run| run.reason() == reason).await.0;
    assert_eq!(found.reason(), reason, "{}", found.message);
}

async fn cancel(client: &mut Client, run: &pb::Run) {
    client.cancel_run(pb::CancelRunRequest { name: run.name.clone() }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_waits_for_its_quota_while_another_starts() {
    let folder = tempfile::tempdir().unwrap();
    let tenants = Tenants::from([("a".to_owned(), Share { quota: Some(1), weight: 1 })]);
    let settings = server::ServeConfig { tenants, ..config(&embedded(folder.path()), folder.path()) };
    let coordinator = Coordinator::start_as(settings).await;
    let mut client = coordinator.client().await;
    let _agent = Agent::start(coordinator.address, "one", 3, Act::HoldAtStepOne).await;
    let first = submit(&mut client, "first", "a", pb::Priority::Normal).await;
    until_state(&mut client, &first, pb::RunState::Running).await;
    let second = submit(&mut client, "second", "a", pb::Priority::High).await;
    until_reason(&mut client, &second, pb::RunReason::WaitingForQuota).await;
    let other = submit(&mut client, "other", "b", pb::Priority::Low).await;
    until_state(&mut client, &other, pb::RunState::Running).await;

    let told = explain(&mut client, &second).await;
    assert_eq!((told.state(), told.reason()), (pb::RunState::Pending, pb::RunReason::WaitingForQuota));
    assert_eq!((told.queue_place, told.queue_length, told.slots_needed, told.slots_free), (1, 1, 1, 1));
    assert_eq!((told.tenant.as_str(), told.tenant_slots, told.tenant_quota), ("a", 1, Some(1)));
    assert_eq!(told.message, "needs 1 slot(s) of tenant a's quota of 1");
    let told = explain(&mut client, &other).await;
    assert_eq!((told.queue_place, told.tenant.as_str(), told.tenant_slots, told.tenant_quota), (0, "b", 1, None));

    cancel(&mut client, &first).await;
    until_state(&mut client, &second, pb::RunState::Running).await;
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_higher_priority_starts_before_an_older_run() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let agent = Agent::start(coordinator.address, "one", 1, Act::HoldAtStepOne).await;
    // As high, so that it gives nothing up.
    let holder = submit(&mut client, "holder", "", pb::Priority::High).await;
    until_state(&mut client, &holder, pb::RunState::Running).await;
    let low = submit(&mut client, "low", "", pb::Priority::Low).await;
    until_reason(&mut client, &low, pb::RunReason::WaitingForWorkers).await;
    let high = submit(&mut client, "high", "", pb::Priority::High).await;
    assert_eq!(explain(&mut client, &high).await.queue_place, 1);
    let told = explain(&mut client, &low).await;
    assert_eq!((told.queue_place, told.queue_length, told.slots_free), (2, 2, 0));
    agent.act(Act::Finish);
    cancel(&mut client, &holder).await;
    let [high, low] = [until_ended(&mut client, &high).await, until_ended(&mut client, &low).await];
    let started = |run: &pb::Run| run.start_time.map(|time| (time.seconds, time.nanos)).unwrap();
    assert!(started(&high) < started(&low), "{high:?} {low:?}");
    coordinator.stop().await.unwrap();
}
