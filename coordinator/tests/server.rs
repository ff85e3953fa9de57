//! The whole coordinator over real gRPC on ephemeral ports, with agents that only talk.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::agent::{Act, Agent};
use common::cluster::{Coordinator, config, create, embedded, until_ended, until_state, watch, watch_until};
use thaw_coordinator::server::{self, Server};
use thaw_coordinator::store;
use thaw_proto::pb;
use thaw_proto::pb::watch_run_response::Update;
use thaw_proto::status;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_goes_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let run = client.create_run(create("words", 2)).await.unwrap().into_inner();
    assert!(run.name.starts_with("runs/words-") && run.name.len() == "runs/words-".len() + 8, "{}", run.name);
    let request = pb::WatchRunRequest { include_progress: true, ..watch(&run) };
    let mut watcher = client.clone();
    let watching = tokio::spawn(async move { watch_until(&mut watcher, request, |_| false).await });
    let _one = Agent::start(coordinator.address, "one", 1, Act::Finish).await;
    let _two = Agent::start(coordinator.address, "two", 1, Act::Finish).await;
    let (ended, updates) = watching.await.unwrap();
    assert_eq!(ended.state(), pb::RunState::Succeeded, "{}", ended.message);
    assert_eq!((ended.reason(), ended.attempt, ended.generation), (pb::RunReason::LastStageEnded, 1, 1));
    assert_eq!(ended.world_sizes, [2]);
    let updates: Vec<Update> = updates.into_iter().filter_map(|message| message.update).collect();
    assert!(updates.iter().any(|update| matches!(update, Update::Progress(progress) if progress.loss == 0.5)));
    assert!(
        updates.iter().any(|update| matches!(update, Update::Evaluation(evaluation) if evaluation.accuracy == 0.75))
    );
    let revisions: Vec<u64> = updates
        .iter()
        .filter_map(|update| if let Update::Run(run) = update { Some(run.revision) } else { None })
        .collect();
    assert!(revisions.is_sorted_by(|a, b| a < b), "{revisions:?}");

    // What is left on disk.
    let runs = folder.path().join(&run.name);
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(runs.join("report/summary.json")).unwrap()).unwrap();
    let model = format!("file://{}/model/", runs.canonicalize().unwrap().display());
    let expected = serde_json::json!({
        "run": run.name.strip_prefix("runs/").unwrap(), "state": "SUCCEEDED", "reason": "LAST_STAGE_ENDED", "strategy": "gradual_unfreezing",
        "stages": [{"name": "head", "groups": ["head"], "steps": 2, "epochs": 1.0, "seconds": 2.0, "peak_memory_bytes": 1,
                    "eval": {"loss": 0.25, "accuracy": 0.75, "macro_f1": 0.5}}],
        "test": {"loss": 0.25, "accuracy": 0.75, "macro_f1": 0.5},
        "steps": 2, "seconds": 2.0, "world_sizes": [2], "weights_blake3": "abc", "model": model,
    });
    assert_eq!(summary, expected);
    for name in ["spec.yaml", "plan.json"] {
        assert!(runs.join(name).is_file(), "{name}");
    }
    let spec = thaw_proto::text::parse_spec(&std::fs::read_to_string(runs.join("spec.yaml")).unwrap()).unwrap();
    assert_eq!(spec.name, "words");

    // What a reader who comes later gets.
    let request = pb::TailLogsRequest { name: run.name.clone(), follow: true };
    let mut logs = client.tail_logs(request).await.unwrap().into_inner();
    let mut lines = Vec::new();
    while let Some(line) = logs.message().await.unwrap() {
        lines.push((line.source, line.text));
    }
    assert!(lines.contains(&("rank 1".to_owned(), "trains in generation 1".to_owned())), "{lines:?}");
    assert_eq!(lines.last().unwrap().0, "coordinator");
    let (_, all) = watch_until(&mut client, pb::WatchRunRequest { after_revision: 1, ..watch(&run) }, |_| false).await;
    let events: usize = all.iter().map(|message| message.events.len()).sum();
    assert!(events >= 4, "events of revisions after the first are sent again: {all:?}");
    assert!(std::fs::read_to_string(runs.join("events.jsonl")).unwrap().lines().count() > events);
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_trainer_costs_a_generation_and_no_committed_step() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let agent = Agent::start(coordinator.address, "one", 2, Act::DieAfterStepOne).await;
    let run = client.create_run(create("loss", 2)).await.unwrap().into_inner();
    let wounded = watch_until(&mut client, watch(&run), |run| run.reason() == pb::RunReason::TrainerLost).await.0;
    assert_eq!(wounded.head.unwrap().position.unwrap().step, 1);
    agent.act(Act::Finish);
    let ended = until_ended(&mut client, &run).await;
    assert_eq!(ended.state(), pb::RunState::Succeeded, "{}", ended.message);
    assert!(ended.generation >= 2);
    assert!(ended.result.unwrap().steps >= 2, "went on from step 1");
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_and_an_error_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let agent = Agent::start(coordinator.address, "one", 1, Act::HoldAtStepOne).await;
    let run = client.create_run(create("lost", 1)).await.unwrap().into_inner();
    until_state(&mut client, &run, pb::RunState::Running).await;
    drop(agent);
    watch_until(&mut client, watch(&run), |run| run.reason() == pb::RunReason::TrainerLost).await;
    let _another = Agent::start(coordinator.address, "two", 1, Act::FailForGood).await;
    let ended = until_ended(&mut client, &run).await;
    assert_eq!((ended.state(), ended.reason()), (pb::RunState::Failed, pb::RunReason::TrainerError));
    assert!(ended.message.contains("the weights do not fit the graph"), "{}", ended.message);
    let report = folder.path().join(&run.name).join("report/summary.json");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(
        (summary["state"].as_str(), summary["message"].as_str()),
        (Some("FAILED"), Some(ended.message.as_str()))
    );
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suspend_resume_cancel() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    let agent = Agent::start(coordinator.address, "one", 1, Act::HoldAtStepOne).await;
    let run = client.create_run(create("pause", 1)).await.unwrap().into_inner();
    until_state(&mut client, &run, pb::RunState::Running).await;
    let suspend = pb::SuspendRunRequest { name: run.name.clone() };
    client.suspend_run(suspend).await.unwrap();
    until_state(&mut client, &run, pb::RunState::Suspended).await;
    let resume = pb::ResumeRunRequest { name: run.name.clone() };
    let resumed = client.resume_run(resume.clone()).await.unwrap().into_inner();
    assert_eq!(resumed.attempt, 2);
    until_state(&mut client, &run, pb::RunState::Running).await;
    let refused = client.resume_run(resume).await.unwrap_err();
    assert_eq!(
        (refused.code(), status::reason(&refused).as_deref()),
        (Code::FailedPrecondition, Some("RUN_STATE_FORBIDS"))
    );
    let cancel = pb::CancelRunRequest { name: run.name.clone() };
    let cancelled = client.cancel_run(cancel.clone()).await.unwrap().into_inner();
    assert_eq!(cancelled.state(), pb::RunState::Cancelled);
    assert_eq!(
        client.cancel_run(cancel).await.unwrap().into_inner().state(),
        pb::RunState::Cancelled,
        "twice is no error"
    );
    // Its slot is free again.
    agent.act(Act::Finish);
    let next = client.create_run(create("next", 1)).await.unwrap().into_inner();
    assert_eq!(until_ended(&mut client, &next).await.state(), pb::RunState::Succeeded);
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_coordinator_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = embedded(folder.path());
    let first = Coordinator::start(&store, folder.path()).await;
    let mut client = first.client().await;
    let agent = Agent::start(first.address, "one", 1, Act::HoldAtStepOne).await;
    let run = client.create_run(create("again", 1)).await.unwrap().into_inner();
    let waiting = client.create_run(create("later", 1)).await.unwrap().into_inner();
    watch_until(&mut client, watch(&run), |run| run.head.is_some()).await;
    drop(agent);
    first.stop().await.unwrap();

    let second = Coordinator::start(&store, folder.path()).await;
    let mut client = second.client().await;
    let _agent = Agent::start(second.address, "one", 1, Act::Finish).await;
    let ended = until_ended(&mut client, &run).await;
    assert_eq!(ended.state(), pb::RunState::Succeeded, "{}", ended.message);
    assert!(ended.generation >= 2 && ended.result.unwrap().steps == 2, "went on from step 1 in a new generation");
    assert_eq!(until_ended(&mut client, &waiting).await.state(), pb::RunState::Succeeded);
    let listed =
        client.list_runs(pb::ListRunsRequest { page_size: 1, page_token: String::new() }).await.unwrap().into_inner();
    assert_eq!((listed.runs.len(), listed.runs[0].name.as_str()), (1, waiting.name.as_str()), "newest first");
    let next = pb::ListRunsRequest { page_size: 1, page_token: listed.next_page_token };
    let listed = client.list_runs(next).await.unwrap().into_inner();
    assert_eq!((listed.runs[0].name.as_str(), listed.next_page_token.as_str()), (run.name.as_str(), ""));
    second.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn submissions_are_checked_and_deduplicated() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    let mut client = coordinator.client().await;
    // Only looked at.
    let looked = client
        .create_run(pb::CreateRunRequest { validate_only: true, ..create("look", 1) })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(looked.plan.unwrap().stages.len(), 1);
    assert_eq!(client.list_runs(pb::ListRunsRequest::default()).await.unwrap().into_inner().runs, vec![]);
    assert!(!folder.path().join("runs").exists(), "validate_only keeps nothing");
    // Twice the same.
    let id = uuid::Uuid::new_v4().to_string();
    let request = pb::CreateRunRequest { request_id: id, ..create("once", 1) };
    let first = client.create_run(request.clone()).await.unwrap().into_inner();
    let second = client.create_run(request).await.unwrap().into_inner();
    assert_eq!(first.name, second.name);
    assert_eq!(client.list_runs(pb::ListRunsRequest::default()).await.unwrap().into_inner().runs.len(), 1);
    // Every mistake at once.
    let mut bad = create("Bad Name", 1);
    bad.spec.as_mut().unwrap().global_batch_size = 0;
    let refused = client.create_run(bad).await.unwrap_err();
    assert_eq!((refused.code(), status::reason(&refused).as_deref()), (Code::InvalidArgument, Some("INVALID_SPEC")));
    let paths: Vec<String> = status::violations(&refused).0.into_iter().map(|violation| violation.path).collect();
    assert_eq!(paths, ["name", "global_batch_size"]);
    // Runs that are not there.
    let unknown = client.get_run(pb::GetRunRequest { name: "runs/none-00000000".to_owned() }).await.unwrap_err();
    assert_eq!((unknown.code(), status::reason(&unknown).as_deref()), (Code::NotFound, Some("RUN_NOT_FOUND")));
    let nonsense = client.get_run(pb::GetRunRequest { name: "../etc".to_owned() }).await.unwrap_err();
    assert_eq!(status::reason(&nonsense).as_deref(), Some("INVALID_REQUEST"));
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_leader_health_and_reflection() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&embedded(folder.path()), folder.path()).await;
    coordinator.client().await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", coordinator.address))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut cluster = pb::cluster_service_client::ClusterServiceClient::new(channel.clone());
    let _agent = Agent::start(coordinator.address, "one", 3, Act::Finish).await;
    let workers = cluster.list_workers(pb::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    let seen: Vec<_> = workers.iter().map(|worker| (worker.name.as_str(), worker.slots, worker.free_slots)).collect();
    assert_eq!(seen, [("one", 3, 3)]);
    let leader = cluster.get_leader(pb::GetLeaderRequest {}).await.unwrap().into_inner();
    assert_eq!((leader.name.as_str(), leader.address), ("test", coordinator.address.to_string()));
    assert!(leader.epoch > 0);
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    for service in ["", "thaw.v1.RunService", "thaw.v1.ClusterService", "thaw.v1.WorkerService"] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving, "{service}");
    }
    assert_eq!(
        common::reflected_services(channel).await,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "thaw.v1.ClusterService",
            "thaw.v1.RunService",
            "thaw.v1.WorkerService",
        ]
    );
    coordinator.stop().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_served_fails_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let first = Server::bind(config(&embedded(folder.path()), folder.path())).await.unwrap();
    // A second coordinator on the same store.
    let error = Server::bind(config(&embedded(folder.path()), folder.path())).await.unwrap_err();
    assert!(matches!(&error, server::Error::Store(store::Error::InUse { .. })), "{error}");
    assert!(error.to_string().contains("another coordinator uses the store"), "{error}");
    // A port in use.
    let other = tempfile::tempdir().unwrap();
    let mut taken = config(&embedded(other.path()), other.path());
    taken.listen = first.address();
    let error = Server::bind(taken).await.unwrap_err();
    assert!(matches!(error, server::Error::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains(&format!("port {} is in use", first.address().port())), "{error}");
    // The world, without TLS.
    let mut open = config(&embedded(other.path()), other.path());
    open.listen = "0.0.0.0:0".parse().unwrap();
    assert!(matches!(Server::bind(open).await.unwrap_err(), server::Error::NotLoopback { .. }));
}
