//! A store that is lost in the middle of a run: nobody leads over an empty one, and `thaw recover` rebuilds it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::agent::{Act, Agent};
use common::cluster::{Coordinator, OneStage, config, create, until_ended, watch, watch_until};
use std::path::Path;
use std::sync::Arc;
use thaw_coordinator::origin;
use thaw_coordinator::recover::{self, Recovered};
use thaw_coordinator::server::{self, Server};
use thaw_coordinator::store::{self, Compare, EtcdAccess, Op, Rebased, Revision, Store, TxnOutcome};
use thaw_core::manifest::{Manifest, blob_name};
use thaw_core::stage_end::{Judge, RunTracker};
use thaw_proto::pb;
use thaw_proto::run::RunState;
use thaw_proto::spec::Metric;
use tokio_util::sync::CancellationToken;

async fn recover(store: &str, folder: &Path, replace: bool) -> Result<Recovered, recover::Error> {
    let folders = [folder.canonicalize().unwrap()];
    recover::recover(&store.parse().unwrap(), &EtcdAccess::default(), &folders, replace).await
}

/// What a trainer leaves of a checkpoint: a manifest, and one blob.
fn write_checkpoint(folder: &Path, run: &pb::Run, step: u64, blob: &[u8]) -> std::path::PathBuf {
    let folder = folder.join(&run.name);
    let hash = blake3::hash(blob).to_hex().to_string();
    let path = folder.join(blob_name(&hash));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, blob).unwrap();
    let judge = Judge { metric: Metric::EvalLoss, min_delta: 0.0 };
    let manifest = serde_json::json!({
        "format_version": 1, "run": run.name.strip_prefix("runs/").unwrap(), "generation": 1,
        "position": {"stage": 0, "stage_step": step, "step": step}, "ended_stage_steps": [], "stage_first_epoch": 0,
        "tracker": serde_json::to_value(RunTracker::new(judge)).unwrap(), "stage_results": [], "seconds": 1.0,
        "stage_seconds": 1.0, "world_size": 1, "fingerprints": {"spec": "a", "data": "b", "graph": "c"},
        "groups": [{"name": "head", "weights": {"blake3": hash, "bytes": blob.len()}, "optimizer": null, "optimizer_steps": 0}],
        "best_groups": null,
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    manifest.validate().unwrap();
    let file = folder.join(manifest.file_name());
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, manifest.to_json()).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_store_is_rebuilt_when_somebody_says_so() {
    let Some(first_etcd) = common::EtcdProcess::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let old = format!("etcd://{}/lab", first_etcd.address);
    let coordinator = Coordinator::start(&old, folder.path()).await;
    let mut client = coordinator.client().await;
    let agent = Agent::start(coordinator.address, "one", 1, Act::Finish).await;
    let done = client.create_run(create("done", 1)).await.unwrap().into_inner();
    let done = until_ended(&mut client, &done).await;
    agent.act(Act::HoldAtStepOne);
    let going = client.create_run(create("going", 1)).await.unwrap().into_inner();
    let going = watch_until(&mut client, watch(&going), |run| run.head.is_some()).await.0;
    write_checkpoint(folder.path(), &going, 1, b"of step 1");
    // A newer one that is not whole.
    let torn = write_checkpoint(folder.path(), &going, 2, b"of step 2");
    std::fs::write(torn, "of st").unwrap();
    // A submission that never came so far as to be kept.
    let stray = folder.path().join("runs/stray-00000000");
    std::fs::create_dir_all(&stray).unwrap();

    // RECOVER-1: not while somebody leads, and not over what is there.
    assert!(matches!(recover(&old, folder.path(), true).await, Err(recover::Error::Led { .. })));
    coordinator.stop().await.unwrap();
    drop(agent);
    assert!(matches!(recover(&old, folder.path(), false).await, Err(recover::Error::NotEmpty { runs: 2 })));
    drop(first_etcd);

    // ORIGIN-1: an empty store beside runs is not taken for a new cluster.
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let new = format!("etcd://{}/lab", etcd.address);
    let bound = Server::bind(config(&new, folder.path())).await.unwrap().with_planner(Arc::new(OneStage));
    let refused = bound.run(CancellationToken::new()).await.unwrap_err();
    assert!(matches!(&refused, server::Error::Origin(origin::Error::Lost { .. })), "{refused}");
    assert!(refused.to_string().contains("run `thaw recover`"), "{refused}");

    let recovered = recover(&new, folder.path(), false).await.unwrap();
    let mut told: Vec<_> = recovered.runs.iter().map(|run| (format!("runs/{}", run.id), run.state, run.step)).collect();
    told.sort_by_key(|(_, _, step)| *step);
    assert_eq!(told, [(going.name.clone(), RunState::Pending, 1), (done.name.clone(), RunState::Succeeded, 2)]);
    let lost: Vec<&str> = recovered
        .runs
        .iter()
        .flat_map(|run| &run.lost)
        .map(String::as_str)
        .filter(|lost| lost.contains("damaged"))
        .collect();
    assert_eq!(lost.len(), 1, "{recovered:?}");
    assert_eq!(recovered.left_out.len(), 1);
    assert!(recovered.left_out[0].1.contains("never accepted"), "{recovered:?}");
    // Once is enough; a second time has to be meant.
    assert!(matches!(recover(&new, folder.path(), false).await, Err(recover::Error::NotEmpty { runs: 2 })));

    let coordinator = Coordinator::start(&new, folder.path()).await;
    let mut client = coordinator.client().await;
    // What had ended is as it was, at a later revision.
    let read = client.get_run(pb::GetRunRequest { name: done.name.clone() }).await.unwrap().into_inner();
    assert!(read.revision > done.revision, "RECOVER-3");
    assert_eq!(pb::Run { revision: 0, ..read }, pb::Run { revision: 0, ..done });
    // A reader of the old store is told that it cannot go on.
    let request = pb::WatchRunRequest { after_revision: going.revision, ..watch(&going) };
    let refused = client.watch_run(request).await.map(drop).unwrap_err();
    assert_eq!(thaw_proto::status::reason(&refused).as_deref(), Some("EVENTS_GONE"));
    // What had not goes on from its newest whole checkpoint, in a generation that nobody has had.
    let _agent = Agent::start(coordinator.address, "one", 1, Act::Finish).await;
    let ended = until_ended(&mut client, &going).await;
    assert_eq!(ended.state(), pb::RunState::Succeeded, "{}", ended.message);
    assert!(ended.generation > going.generation + 1, "RECOVER-3");
    assert_eq!(ended.result.unwrap().steps, 2, "from step 1");
    coordinator.stop().await.unwrap();

    // RECOVER-2: half a store is none.
    let plain = store::open(&new.parse().unwrap()).await.unwrap();
    plain.txn(vec![], vec![Op::put("recovering", "somebody")]).await.unwrap();
    let bound = Server::bind(config(&new, folder.path())).await.unwrap().with_planner(Arc::new(OneStage));
    let refused = bound.run(CancellationToken::new()).await.unwrap_err();
    assert!(matches!(&refused, server::Error::Origin(origin::Error::Recovering)), "{refused}");
    wait_until_vacant(plain.as_ref()).await;
    assert_eq!(recover(&new, folder.path(), true).await.unwrap().runs.len(), 2);
}

/// The refused coordinator gave the key back, or its lease ends.
async fn wait_until_vacant(store: &dyn Store) {
    let vacant = async { while store.get("leader").await.unwrap().value.is_some() {} };
    tokio::time::timeout(common::cluster::WAIT, vacant).await.expect("the key is given back");
}

/// REBASE-1
#[tokio::test]
async fn revisions_go_on_above_their_base() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("embedded:{}", folder.path().join("store.redb").display()).parse().unwrap();
    let store = Rebased::new(store::open(&url).await.unwrap(), 1000);
    let TxnOutcome::Applied { revision } = store.txn(vec![], vec![Op::put("a", "1")]).await.unwrap() else {
        panic!("not applied")
    };
    assert!(revision > Revision(1000));
    let entry = store.get("a").await.unwrap().value.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision), (revision, revision));
    let compares = vec![Compare::created_at("a", revision), Compare::modified_at("a", revision)];
    assert!(matches!(store.txn(compares, vec![Op::put("a", "2")]).await.unwrap(), TxnOutcome::Applied { .. }));
    // Nothing of the store that is gone holds, nor is taken for "absent".
    for old in [0, 1, 999, 1000] {
        for compare in [Compare::created_at("a", Revision(old)), Compare::modified_at("none", Revision(old))] {
            let outcome = store.txn(vec![compare], vec![Op::put("b", "x")]).await.unwrap();
            assert_eq!(outcome, TxnOutcome::NotApplied, "{old}");
        }
    }
}
