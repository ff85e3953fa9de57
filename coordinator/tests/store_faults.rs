//! The etcd store where the network does not keep its word: what is known, what is unknown, and until when it is tried.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::proxy::{Fault, Proxy};
use futures::StreamExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_coordinator::store::{
    self, Compare, Error, Followed, OPERATION_DEADLINE, Op, Revision, Store, TxnOutcome, WatchEvent,
};
use thaw_proto::status::ErrorClass;

const WAIT: Duration = Duration::from_secs(30);

struct Bench {
    etcd: common::EtcdProcess,
    proxy: Proxy,
    /// Through the proxy.
    store: Arc<dyn Store>,
    /// Beside it.
    witness: Arc<dyn Store>,
}

async fn bench() -> Option<Bench> {
    let etcd = common::EtcdProcess::start()?;
    let proxy = Proxy::start(&etcd.address).await;
    let open = |address: String| async move { store::open(&format!("etcd://{address}/t").parse().unwrap()).await };
    let store = open(proxy.address.clone()).await.unwrap();
    let witness = open(etcd.address.clone()).await.unwrap();
    Some(Bench { etcd, proxy, store, witness })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_unknown_and_a_read_decides() {
    let Some(Bench { etcd: _etcd, proxy, store, witness }) = bench().await else { return };
    // Applied, and nobody heard.
    proxy.set(Fault::DropAnswers);
    let lost = store.txn(vec![Compare::absent("a")], vec![Op::put("a", "mine")]).await.unwrap_err();
    assert!(matches!(lost, Error::Unknown { .. }), "STORE-3: {lost:?}");
    assert_eq!(lost.class(), ErrorClass::Retry);
    proxy.set(Fault::None);
    let read = store.get("a").await.unwrap().value.expect("it was applied");
    assert_eq!(read.value, b"mine");
    // Trying again without reading would be told apart from a first try by the compare alone.
    let again = store.txn(vec![Compare::absent("a")], vec![Op::put("a", "mine")]).await.unwrap();
    assert_eq!(again, TxnOutcome::NotApplied);
    // Never sent: unknown as well, and the read says no.
    proxy.set(Fault::BlackHole);
    let lost = store.txn(vec![Compare::absent("b")], vec![Op::put("b", "mine")]).await.unwrap_err();
    assert!(matches!(lost, Error::Unknown { .. }), "STORE-3: {lost:?}");
    assert_eq!(witness.get("b").await.unwrap().value, None);
    proxy.set(Fault::None);
    assert_eq!(store.get("b").await.unwrap().value, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_try_again_until_their_deadline_and_not_beyond() {
    let Some(Bench { etcd: _etcd, proxy, store, witness }) = bench().await else { return };
    witness.txn(vec![], vec![Op::put("a", "1")]).await.unwrap();
    // Mended within the deadline: the caller sees nothing of it.
    proxy.set(Fault::Cut);
    let reading = tokio::spawn({
        let store = Arc::clone(&store);
        async move { (store.get("a").await, store.list("").await, store.grant_lease(Duration::from_secs(9)).await) }
    });
    tokio::time::sleep(Duration::from_millis(700)).await;
    proxy.set(Fault::None);
    let (got, listed, granted) = reading.await.unwrap();
    assert_eq!(got.unwrap().value.unwrap().value, b"1");
    assert_eq!(listed.unwrap().value.len(), 1);
    granted.unwrap();
    // Not mended: an error by the deadline, which says that nothing was done.
    for fault in [Fault::Cut, Fault::BlackHole] {
        proxy.set(fault);
        let began = Instant::now();
        let read = tokio::time::timeout(WAIT, store.get("a")).await.expect("within its deadline");
        assert!(matches!(read, Err(Error::Unavailable { .. })), "{read:?}");
        assert!(began.elapsed() >= OPERATION_DEADLINE / 2, "it was tried again");
        let list = tokio::time::timeout(WAIT, store.list("")).await.expect("within its deadline");
        assert!(matches!(list, Err(Error::Unavailable { .. })), "{list:?}");
    }
    proxy.set(Fault::None);
    store.get("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_over_a_broken_connection_is_told_to_resync() {
    let Some(Bench { etcd: _etcd, proxy, store, witness }) = bench().await else { return };
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    witness.txn(vec![], vec![Op::put("a", "1")]).await.unwrap();
    assert!(matches!(watch.next().await, Some(WatchEvent::Put(_))));
    proxy.set(Fault::Cut);
    witness.txn(vec![], vec![Op::put("a", "2")]).await.unwrap();
    let next = tokio::time::timeout(WAIT, watch.next()).await.expect("notices");
    assert_eq!(next, Some(WatchEvent::Resync), "STORE-4");
    assert_eq!(watch.next().await, None);
}

/// FOLLOW-1 with everything at once: the link is cut, changes are made, their history is compacted, the link is mended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn following_goes_on_over_cuts_and_compaction() {
    let Some(Bench { etcd, proxy, store, witness }) = bench().await else { return };
    let mut follow = store::follow(store, "runs/");
    let mut last = Revision(0);
    for round in 0..3_u32 {
        for index in 0..5_u32 {
            let value = format!("{round}-{index}");
            witness.txn(vec![], vec![Op::put("runs/a", value)]).await.unwrap();
        }
        let wanted = format!("{round}-4");
        let read = async {
            loop {
                if let Some(Followed::Put(entry)) = follow.next().await
                    && entry.key == "runs/a"
                {
                    assert!(entry.mod_revision > last, "FOLLOW-1");
                    last = entry.mod_revision;
                    if entry.value == wanted.as_bytes() {
                        return;
                    }
                }
            }
        };
        tokio::time::timeout(WAIT, read).await.expect("the last state comes");
        proxy.set(Fault::Cut);
        witness.txn(vec![], vec![Op::put("runs/a", "between"), Op::put("runs/b", "between")]).await.unwrap();
        common::compact(etcd.address.clone()).await;
        proxy.set(Fault::None);
    }
}

#[tokio::test]
async fn a_renewal_without_an_answer_is_no_end_of_the_lease() {
    let Some(Bench { etcd: _etcd, proxy, store, .. }) = bench().await else { return };
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    proxy.set(Fault::Cut);
    let renewed = tokio::time::timeout(WAIT, store.keep_alive(lease)).await.expect("within its deadline");
    assert!(matches!(renewed, Err(Error::Unknown { .. })), "{renewed:?}");
    proxy.set(Fault::None);
    tokio::time::timeout(WAIT, async { while store.keep_alive(lease).await.is_err() {} }).await.expect("renewed again");
    store.revoke(lease).await.unwrap();
    assert!(matches!(store.keep_alive(lease).await, Err(Error::LeaseNotFound(ended)) if ended == lease));
}
