//! Several coordinators over one etcd: who follows, who leads next, and what nobody notices of the change.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::agent::{Act, Agent};
use common::cluster::{Coordinator, WAIT, channel, create, until_ended, until_state, watch, watch_until};
use common::proxy::{Fault, Proxy};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_coordinator::leader::{self, Fenced, Identity, Timing};
use thaw_coordinator::store::{self, Op, Store};
use thaw_proto::ids::Incarnation;
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::watch_run_response::Update;
use thaw_proto::status;
use tonic::Code;

/// Several coordinators, the first of which leads.
async fn coordinators(etcd: &common::EtcdProcess, data_dir: &Path, count: usize) -> Vec<Coordinator> {
    let mut all = Vec::new();
    for index in 0..count {
        let coordinator = Coordinator::start_to_be_killed(&etcd.address, "lab", data_dir, &format!("c{index}")).await;
        if index == 0 {
            coordinator.client().await;
        }
        all.push(coordinator);
    }
    all
}

/// Until this coordinator says that another than `old` leads: its address.
async fn next_leader(asked: &Coordinator, old: &str) -> String {
    let mut cluster = ClusterServiceClient::new(channel(asked.address).await);
    let led = async {
        loop {
            if let Ok(leader) = cluster.get_leader(pb::GetLeaderRequest {}).await {
                let leader = leader.into_inner();
                if leader.address != old {
                    return leader.address;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(WAIT, led).await.expect("another leads")
}

/// Which of them leads: after a stall of this machine it need not be the one that was started first.
async fn leading(all: &[Coordinator]) -> usize {
    let leader = next_leader(&all[0], "").await;
    all.iter().position(|coordinator| coordinator.address.to_string() == leader).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_answer_reads_and_name_the_leader() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let all = coordinators(&etcd, folder.path(), 2).await;
    let at = leading(&all).await;
    let (leading, following) = (&all[at], &all[1 - at]);
    let mut leader = leading.client().await;
    let mut follower = following.any_client().await;
    let _agent = Agent::start(leading.address, "one", 1, Act::HoldAtStepOne).await;
    let run = leader.create_run(create("shared", 1)).await.unwrap().into_inner();
    // GRPC-2: at once what the leader has acknowledged.
    let name = pb::GetRunRequest { name: run.name.clone() };
    let read = follower.get_run(name.clone()).await.unwrap().into_inner();
    assert!(read.revision >= run.revision);
    let (seen, _) = watch_until(&mut follower, watch(&run), |run| run.head.is_some()).await;
    assert_eq!(seen.state(), pb::RunState::Running);
    let request = pb::ListCheckpointsRequest { name: run.name.clone() };
    // Only those whose manifests are there; these trainers write none.
    assert_eq!(follower.list_checkpoints(request).await.unwrap().into_inner().checkpoints, vec![]);
    let folder_of_run = folder.path().join(&run.name).join("manifests");
    std::fs::create_dir_all(&folder_of_run).unwrap();
    std::fs::write(folder.path().join(&run.name).join(&seen.head.as_ref().unwrap().manifest), "").unwrap();
    let request = pb::ListCheckpointsRequest { name: run.name.clone() };
    assert_eq!(follower.list_checkpoints(request).await.unwrap().into_inner().checkpoints, [seen.head.unwrap()]);
    let listed = follower.list_runs(pb::ListRunsRequest::default()).await.unwrap().into_inner().runs;
    assert_eq!(listed.iter().map(|run| run.name.as_str()).collect::<Vec<_>>(), [run.name.as_str()]);
    let unknown = follower.get_run(pb::GetRunRequest { name: "runs/none-00000000".to_owned() }).await.unwrap_err();
    assert_eq!((unknown.code(), status::reason(&unknown).as_deref()), (Code::NotFound, Some("RUN_NOT_FOUND")));
    // What only the leader can do names the leader.
    let refusals = [
        follower.create_run(create("other", 1)).await.map(drop).unwrap_err(),
        follower.cancel_run(pb::CancelRunRequest { name: run.name.clone() }).await.map(drop).unwrap_err(),
        follower.suspend_run(pb::SuspendRunRequest { name: run.name.clone() }).await.map(drop).unwrap_err(),
        follower.resume_run(pb::ResumeRunRequest { name: run.name.clone() }).await.map(drop).unwrap_err(),
        follower.watch_run(pb::WatchRunRequest { include_progress: true, ..watch(&run) }).await.map(drop).unwrap_err(),
        ClusterServiceClient::new(channel(following.address).await)
            .list_workers(pb::ListWorkersRequest {})
            .await
            .map(drop)
            .unwrap_err(),
    ];
    for refused in refusals {
        assert_eq!((refused.code(), status::reason(&refused).as_deref()), (Code::Unavailable, Some("NOT_LEADING")));
        assert_eq!(status::metadata(&refused, "leader"), Some(leading.address.to_string()));
        assert_eq!(status::metadata(&refused, "leader_name"), Some(format!("c{at}")));
    }
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel(following.address).await);
    for (service, serves) in [("", true), ("thaw.v1.RunService", true), ("thaw.v1.WorkerService", false)] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        let status = health.check(request).await.unwrap().into_inner().status();
        let serving = status == tonic_health::pb::health_check_response::ServingStatus::Serving;
        assert_eq!(serving, serves, "{service}");
    }
    for coordinator in all {
        coordinator.stop().await.unwrap();
    }
}

/// A graceful hand-over and a kill, in turn: the gang trains on, nobody is started again, and the run ends well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gang_outlives_its_coordinators() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut all = coordinators(&etcd, folder.path(), 3).await;
    let addresses: Vec<_> = all.iter().map(|coordinator| coordinator.address).collect();
    let one = Agent::start_among(addresses.clone(), "one", 1, Act::HoldAtStepOne).await;
    let two = Agent::start_among(addresses, "two", 1, Act::HoldAtStepOne).await;
    let first = leading(&all).await;
    let run = all[first].client().await.create_run(create("long", 2)).await.unwrap().into_inner();
    watch_until(&mut all[first].any_client().await, watch(&run), |run| run.head.is_some()).await;

    // Given back: the key is gone before the process is.
    let first = all.remove(first);
    let old = first.address.to_string();
    first.stop().await.unwrap();
    let second = next_leader(&all[0], &old).await;
    // Killed: its lease has to end.
    let at = all.iter().position(|coordinator| coordinator.address.to_string() == second).unwrap();
    let doomed = all.remove(at);
    workers_are_back(&doomed, 2).await;
    doomed.kill();
    let third = next_leader(&all[0], &second).await;
    assert_eq!(third, all[0].address.to_string());
    workers_are_back(&all[0], 2).await;

    let mut client = all[0].client().await;
    let held = until_state(&mut client, &run, pb::RunState::Running).await;
    assert_eq!((held.generation, held.attempt), (1, 1), "the same gang");
    assert_eq!((one.started(), two.started()), (1, 1), "RUN-9: nobody was started again");
    // The new leader commands it.
    let suspended = client.suspend_run(pb::SuspendRunRequest { name: run.name.clone() }).await.unwrap().into_inner();
    assert_eq!(suspended.state(), pb::RunState::Suspending);
    until_state(&mut client, &run, pb::RunState::Suspended).await;
    one.act(Act::Finish);
    two.act(Act::Finish);
    client.resume_run(pb::ResumeRunRequest { name: run.name.clone() }).await.unwrap();
    let ended = until_ended(&mut client, &run).await;
    assert_eq!((ended.state(), ended.attempt), (pb::RunState::Succeeded, 2), "{}", ended.message);
    all.remove(0).stop().await.unwrap();
}

async fn workers_are_back(leader: &Coordinator, count: usize) {
    let mut cluster = ClusterServiceClient::new(channel(leader.address).await);
    let back = async {
        loop {
            match cluster.list_workers(pb::ListWorkersRequest {}).await {
                Ok(listed) if listed.get_ref().workers.len() == count => return,
                Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(WAIT, back).await.expect("the workers come back");
}

/// GRPC-1: a caller waits where it would only be sent to the dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_takes_no_connection_is_not_named_at_once() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut all = coordinators(&etcd, folder.path(), 2).await;
    let leader = all.remove(leading(&all).await);
    let mut cluster = ClusterServiceClient::new(channel(all[0].address).await);
    // It knows who leads.
    let refused = cluster.list_workers(pb::ListWorkersRequest {}).await.unwrap_err();
    assert_eq!(status::metadata(&refused, "leader"), Some(leader.address.to_string()));
    let dead = leader.address;
    leader.kill();
    // Its threads do not all end at one instant.
    let gone = async { while tokio::net::TcpStream::connect(dead).await.is_ok() {} };
    tokio::time::timeout(WAIT, gone).await.expect("it takes no connection");
    let (began, mut refusals) = (Instant::now(), 0_u32);
    let led = async {
        while cluster.list_workers(pb::ListWorkersRequest {}).await.is_err() {
            refusals += 1;
        }
    };
    tokio::time::timeout(WAIT, led).await.expect("it leads");
    // Each has waited for a leader as long as calls do.
    let waited = Duration::from_secs(3) * refusals;
    assert!(began.elapsed() >= waited, "{refusals} refusals in {:?}", began.elapsed());
    all.remove(0).stop().await.unwrap();
}

/// One reader, moved from coordinator to coordinator by what it saw last, while leaders die and etcd forgets its history:
/// every event of the run once, and in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_is_resumed_by_revision_and_misses_and_repeats_nothing() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut all = coordinators(&etcd, folder.path(), 3).await;
    let run = all[leading(&all).await].client().await.create_run(create("told", 1)).await.unwrap().into_inner();
    let (mut events, mut seen) = (Vec::new(), 1);
    // Each suspension and resumption is an event; half of them happen while nobody watches.
    for round in 0..6_usize {
        let reader = (leading(&all).await + 1) % all.len();
        let mut stream = watching(&all[reader], &run, seen).await;
        for _ in 0..2 {
            make(&all, &run, pb::RunState::Suspended).await;
            make(&all, &run, pb::RunState::Pending).await;
        }
        // As much as this round asks for, then the connection is gone.
        for _ in 0..=round % 3 {
            let message = tokio::time::timeout(WAIT, stream.message()).await.unwrap().unwrap().unwrap();
            take(message, &mut events, &mut seen);
        }
        drop(stream);
        common::compact(etcd.address.clone()).await;
        match round {
            1 | 3 => {
                let leader = all.remove(leading(&all).await);
                let old = leader.address.to_string();
                if round == 1 {
                    leader.kill()
                } else {
                    leader.stop().await.unwrap()
                }
                next_leader(&all[0], &old).await;
            }
            _ => {}
        }
    }
    let mut client = all[leading(&all).await].client().await;
    client.cancel_run(pb::CancelRunRequest { name: run.name.clone() }).await.unwrap();
    let mut stream = watching(&all[0], &run, seen).await;
    while let Some(message) = tokio::time::timeout(WAIT, stream.message()).await.unwrap().unwrap() {
        take(message, &mut events, &mut seen);
    }
    let (_, told) = watch_until(&mut client, pb::WatchRunRequest { after_revision: 1, ..watch(&run) }, |_| false).await;
    // The first event came with the run's creation, before revision 1 could be named.
    let wanted: Vec<pb::Event> = told.into_iter().flat_map(|message| message.events).collect();
    assert_eq!(events, wanted);
    let suspensions = wanted.iter().filter(|event| event.state() == pb::RunState::Suspended).count();
    assert_eq!((suspensions, wanted.last().unwrap().state()), (12, pb::RunState::Cancelled));
    for coordinator in all {
        coordinator.stop().await.unwrap();
    }
}

/// Suspends or resumes the run by whoever leads, until it is so: an error may be no more than a lost answer.
async fn make(all: &[Coordinator], run: &pb::Run, wanted: pb::RunState) {
    let name = run.name.clone();
    let made = async {
        loop {
            let mut client = all[leading(all).await].any_client().await;
            let _ = match wanted {
                pb::RunState::Suspended => client.suspend_run(pb::SuspendRunRequest { name: name.clone() }).await,
                _ => client.resume_run(pb::ResumeRunRequest { name: name.clone() }).await,
            };
            let read = client.get_run(pb::GetRunRequest { name: name.clone() }).await;
            if read.is_ok_and(|read| read.get_ref().state() == wanted) {
                return;
            }
        }
    };
    tokio::time::timeout(WAIT, made).await.expect("the wanted state in time");
}

async fn watching(
    coordinator: &Coordinator,
    run: &pb::Run,
    after_revision: u64,
) -> tonic::Streaming<pb::WatchRunResponse> {
    let mut client = coordinator.any_client().await;
    let request = pb::WatchRunRequest { after_revision, ..watch(run) };
    client.watch_run(request).await.unwrap().into_inner()
}

fn take(message: pb::WatchRunResponse, events: &mut Vec<pb::Event>, seen: &mut u64) {
    let Some(Update::Run(run)) = message.update else { panic!("progress was not asked for") };
    assert!(run.revision >= *seen, "a run never goes back");
    *seen = run.revision;
    events.extend(message.events);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_id_sent_a_hundred_times_makes_one_run() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut all = coordinators(&etcd, folder.path(), 3).await;
    let request = pb::CreateRunRequest { request_id: uuid::Uuid::new_v4().to_string(), ..create("once", 1) };
    let addresses: Vec<_> = all.iter().map(|coordinator| coordinator.address).collect();
    let doomed = all.remove(leading(&all).await);
    let old = doomed.address.to_string();
    // Sixty at once, to whoever leads, while the leader is killed; each is sent until it is answered.
    let senders: Vec<_> = (0..60)
        .map(|index| {
            let (request, addresses) = (request.clone(), addresses.clone());
            tokio::spawn(async move { send_until_answered(request, &addresses, index).await })
        })
        .collect();
    tokio::task::yield_now().await;
    doomed.kill();
    let mut names = BTreeSet::new();
    for sender in senders {
        names.insert(tokio::time::timeout(WAIT, sender).await.expect("answered").unwrap());
    }
    next_leader(&all[0], &old).await;
    // Forty more, one after another.
    for index in 0..40 {
        names.insert(send_until_answered(request.clone(), &addresses, index).await);
    }
    assert_eq!(names.len(), 1, "{names:?}");
    let listed = all[0].any_client().await.list_runs(pb::ListRunsRequest::default()).await.unwrap().into_inner().runs;
    assert_eq!(listed.len(), 1);
    for coordinator in all {
        coordinator.stop().await.unwrap();
    }
}

async fn send_until_answered(
    request: pb::CreateRunRequest,
    addresses: &[std::net::SocketAddr],
    first: usize,
) -> String {
    for at in first.. {
        let address = addresses[at % addresses.len()];
        let connected = pb::run_service_client::RunServiceClient::connect(format!("http://{address}")).await;
        if let Ok(mut client) = connected
            && let Ok(run) = client.create_run(request.clone()).await
        {
            return run.into_inner().name;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    unreachable!("it goes on for ever")
}

/// LEAD-2: a leader whose store does not answer has stopped by its own clock before anybody else can lead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_from_its_store_stops_before_another_leads() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    for fault in [Fault::BlackHole, Fault::DropAnswers, Fault::Cut] {
        let proxy = Proxy::start(&etcd.address).await;
        let prefix = format!("{fault:?}");
        let cut_off = store::open(&format!("etcd://{}/{prefix}", proxy.address).parse().unwrap()).await.unwrap();
        let healthy = store::open(&format!("etcd://{}/{prefix}", etcd.address).parse().unwrap()).await.unwrap();
        let (fenced, keeping) = kept_leadership(&cut_off).await;
        proxy.set(fault);
        let other = identity("new");
        let new = leader::campaign(Arc::clone(&healthy), &other, Timing::default(), |_| ());
        let new = tokio::time::timeout(WAIT, new).await.expect("another leads").unwrap().fenced();
        assert!(fenced.check().is_err(), "LEAD-2: {fault:?}");
        fenced.over().await;
        assert!(new.epoch() > fenced.epoch());
        // LEAD-1: and should it act all the same once the way is free, nothing comes of it.
        proxy.set(Fault::None);
        assert!(fenced.txn(vec![], vec![Op::put("x", "old")]).await.is_err());
        assert_eq!(healthy.get("x").await.unwrap().value, None);
        tokio::time::timeout(WAIT, keeping).await.expect("ends").unwrap();
    }
}

/// One that has lived on renewals for twice its lease. A machine that stands still for a while ends it rightly, but not every time.
async fn kept_leadership(store: &Arc<dyn Store>) -> (Fenced, tokio::task::JoinHandle<()>) {
    for _ in 0..5 {
        let leadership =
            leader::campaign(Arc::clone(store), &identity("old"), Timing::default(), |_| ()).await.unwrap();
        let fenced = leadership.fenced();
        let keeping = tokio::spawn(leadership.keep());
        tokio::time::sleep(2 * Timing::default().ttl).await;
        if fenced.check().is_ok() {
            return (fenced, keeping);
        }
    }
    panic!("LEAD-2: it is not renewed");
}

/// The same of a whole coordinator: it follows, and leads again when the store is back (SERVER-2).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_lost_its_store_follows_and_leads_again() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let proxy = Proxy::start(&etcd.address).await;
    let folder = tempfile::tempdir().unwrap();
    let only = Coordinator::start(&format!("etcd://{}/lab", proxy.address), folder.path()).await;
    let mut client = only.client().await;
    let addresses = vec![only.address, only.address];
    let agent = Agent::start_among(addresses, "one", 1, Act::HoldAtStepOne).await;
    let run = client.create_run(create("held", 1)).await.unwrap().into_inner();
    watch_until(&mut client, watch(&run), |run| run.head.is_some()).await;
    let mut cluster = ClusterServiceClient::new(channel(only.address).await);
    let epoch = cluster.get_leader(pb::GetLeaderRequest {}).await.unwrap().into_inner().epoch;
    proxy.set(Fault::BlackHole);
    let lost = async {
        while cluster.list_workers(pb::ListWorkersRequest {}).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(WAIT, lost).await.expect("steps down");
    proxy.set(Fault::None);
    workers_are_back(&only, 1).await;
    let leader = cluster.get_leader(pb::GetLeaderRequest {}).await.unwrap().into_inner();
    assert!(leader.epoch > epoch, "LEAD-3");
    let held = until_state(&mut only.client().await, &run, pb::RunState::Running).await;
    assert_eq!((held.generation, agent.started()), (1, 1), "RUN-9");
    only.stop().await.unwrap();
}

/// GRPC-2: a change that followers show already, while the leader still waits for the store's word on it, is not taken back
/// by the leader's answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_shows_nothing_older_than_its_followers() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut all = coordinators(&etcd, folder.path(), 2).await;
    let leader = all.remove(leading(&all).await);
    let follower = all.remove(0);
    let mut client = leader.client().await;
    let mut reader = follower.any_client().await;
    let run = client.create_run(create("shown", 1)).await.unwrap().into_inner();
    // What it waits for is written after it: the change without an answer shall be the suspension.
    let (run, _) = watch_until(&mut reader, watch(&run), |seen| !seen.message.is_empty()).await;
    leader.link().set(Fault::DropAnswers);
    let mut other = client.clone();
    let suspend = pb::SuspendRunRequest { name: run.name.clone() };
    let suspending = tokio::spawn(async move { other.suspend_run(suspend).await });
    let (shown, _) = watch_until(&mut reader, watch(&run), |seen| seen.revision > run.revision).await;
    match client.get_run(pb::GetRunRequest { name: run.name.clone() }).await {
        Ok(read) => assert!(read.get_ref().revision >= shown.revision, "{read:?}"),
        Err(refused) => assert_eq!(refused.code(), Code::Unavailable, "{refused:?}"),
    }
    leader.link().set(Fault::None);
    // Whether it was answered is the store's to say; it was done.
    drop(tokio::time::timeout(WAIT, suspending).await.expect("answered").unwrap());
    assert_eq!(until_state(&mut reader, &run, pb::RunState::Suspended).await.name, run.name);
    follower.stop().await.unwrap();
    leader.kill();
}

fn identity(name: &str) -> Identity {
    Identity { name: name.to_owned(), address: "127.0.0.1:1".to_owned(), incarnation: Incarnation(format!("{name}-1")) }
}
