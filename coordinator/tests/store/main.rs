//! One suite: what `store` promises (STORE-1 to STORE-5), over the embedded file, over a real etcd, and over the model of
//! etcd that the simulation of `tests/sim` stands on, so that the model is held against the real one.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod embedded;
#[path = "../../../tests/sim/src/etcd.rs"]
#[allow(dead_code, unreachable_pub, reason = "the simulation uses the rest")]
mod etcd_model;
mod keys;
mod leases;
mod watches;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use thaw_coordinator::store::{self, Error, Op, Revision, Store, TxnOutcome, WatchEvent, WatchStream};

const WAIT: Duration = Duration::from_secs(20);

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    applied(store.txn(vec![], vec![Op::put(key, value)]).await.unwrap())
}

fn applied(outcome: TxnOutcome) -> Revision {
    match outcome {
        TxnOutcome::Applied { revision } => revision,
        TxnOutcome::NotApplied => panic!("the transaction was not applied"),
    }
}

async fn next(stream: &mut WatchStream) -> Option<WatchEvent> {
    tokio::time::timeout(WAIT, stream.next()).await.expect("an event in time")
}

/// Forgets the history so far, so that a watch from the past cannot be served.
type Compact = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// Runs every check, each below a prefix of its own.
async fn conformance(store: Arc<dyn Store>, compact: Compact) {
    let shared = Arc::clone(&store);
    let store = store.as_ref();
    keys::reads_and_revisions(store).await;
    keys::compares(store).await;
    keys::values(store).await;
    keys::all_or_nothing(store).await;
    keys::refusals(store).await;
    keys::listing(store).await;
    keys::listing_while_written(&shared).await;
    watches::watching(store).await;
    watches::watching_the_past(store).await;
    watches::watching_over_compaction(store, &compact).await;
    watches::following(&shared, &compact).await;
    leases::leases(store).await;
    leases::lease_is_kept_alive(store).await;
    leases::leases_and_their_keys(store).await;
    keys::one_winner(store).await;
    keys::counting(&shared).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("embedded:{}", folder.path().join("deep/store.redb").display()).parse().unwrap();
    let store = store::open(&url).await.unwrap();
    let filled = Arc::clone(&store);
    let compact = move || {
        let store = Arc::clone(&filled);
        async move {
            // More changes than the history holds.
            for round in 0..5 {
                let ops = (0..1000).map(|index| Op::put(format!("z/{index}"), format!("{round}"))).collect();
                applied(store.txn(vec![], ops).await.unwrap());
            }
        }
        .boxed()
    };
    conformance(store, Box::new(compact)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conforms() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let url = format!("etcd://{}/test/one", etcd.address).parse().unwrap();
    let address = etcd.address.clone();
    conformance(store::open(&url).await.unwrap(), Box::new(move || common::compact(address.clone()).boxed())).await;
    // Another prefix sees nothing of it.
    let other = store::open(&format!("etcd://{}/test/two", etcd.address).parse().unwrap()).await.unwrap();
    assert_eq!(other.list("").await.unwrap().value, vec![]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_simulations_etcd_conforms() {
    let began = std::time::Instant::now();
    let model = Arc::new(etcd_model::Model::new(move || began.elapsed()));
    let of_sweeper = Arc::clone(&model);
    let sweeper = tokio::spawn(async move {
        loop {
            of_sweeper.advance();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let compacted = Arc::clone(&model);
    let compact = move || {
        let model = Arc::clone(&compacted);
        async move { model.compact() }.boxed()
    };
    conformance(Arc::new(etcd_model::Client::near(model)), Box::new(compact)).await;
    sweeper.abort();
}

#[tokio::test]
async fn a_dead_etcd_is_an_error_in_time() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let store = store::open(&format!("etcd://{}", etcd.address).parse().unwrap()).await.unwrap();
    drop(etcd);
    let read = tokio::time::timeout(WAIT, store.get("key")).await.expect("within its deadline");
    assert!(matches!(read, Err(Error::Unavailable { .. })), "{read:?}");
    let write =
        tokio::time::timeout(WAIT, store.txn(vec![], vec![Op::put("key", "1")])).await.expect("within its deadline");
    assert!(matches!(write, Err(Error::Unknown { .. })), "STORE-3: {write:?}");
}
