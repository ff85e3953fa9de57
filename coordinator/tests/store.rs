//! One suite, two stores: what `store` promises (STORE-1 to STORE-5), over the embedded file and over a real etcd.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use thaw_coordinator::store::{
    self, Compare, Error, LeaseId, Op, Revision, Store, TxnOutcome, WatchEvent, WatchStream,
};

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

/// Runs every check, each below a prefix of its own.
async fn conformance(store: Arc<dyn Store>) {
    let store = store.as_ref();
    reads_and_revisions(store).await;
    compares(store).await;
    all_or_nothing(store).await;
    refusals(store).await;
    listing(store).await;
    watching(store).await;
    leases(store).await;
    one_winner(store).await;
}

async fn reads_and_revisions(store: &dyn Store) {
    let none = store.get("a/key").await.unwrap();
    assert_eq!(none.value, None);
    let first = put(store, "a/key", "1").await;
    assert_eq!(first.0, none.revision.0 + 1, "STORE-1");
    let second = put(store, "a/key", "2").await;
    let read = store.get("a/key").await.unwrap();
    let entry = read.value.unwrap();
    assert_eq!((entry.key.as_str(), entry.value.as_slice()), ("a/key", b"2".as_slice()));
    assert_eq!((entry.create_revision, entry.mod_revision, read.revision), (first, second, second), "STORE-2");
    // Deleting and making again gives a new creation.
    let deleted = applied(store.txn(vec![], vec![Op::delete("a/key")]).await.unwrap());
    assert_eq!(store.get("a/key").await.unwrap().value, None);
    let third = put(store, "a/key", "3").await;
    assert_eq!(store.get("a/key").await.unwrap().value.unwrap().create_revision, third);
    assert_eq!(third.0, deleted.0 + 1);
    // What changes nothing takes no revision.
    let same = applied(store.txn(vec![], vec![Op::delete("a/none")]).await.unwrap());
    assert_eq!(same, third);
    assert_eq!(store.get("a/none").await.unwrap().revision, third);
}

async fn compares(store: &dyn Store) {
    let made = put(store, "b/key", "1").await;
    let changed = put(store, "b/key", "2").await;
    let held = [Compare::created_at("b/key", made), Compare::modified_at("b/key", changed), Compare::absent("b/none")];
    let broken = [
        Compare::created_at("b/key", changed),
        Compare::modified_at("b/key", made),
        Compare::absent("b/key"),
        Compare::created_at("b/none", made),
        Compare::modified_at("b/none", made),
    ];
    for compare in broken {
        let mut all = held.to_vec();
        all.push(compare.clone());
        let outcome = store.txn(all, vec![Op::put("b/key", "x")]).await.unwrap();
        assert_eq!(outcome, TxnOutcome::NotApplied, "{compare:?}");
    }
    assert_eq!(store.get("b/key").await.unwrap().value.unwrap().value, b"2");
    applied(store.txn(held.to_vec(), vec![Op::put("b/key", "3")]).await.unwrap());
}

async fn all_or_nothing(store: &dyn Store) {
    put(store, "c/old", "1").await;
    let ops = vec![Op::put("c/one", "1"), Op::put("c/two", "2"), Op::delete("c/old")];
    let revision = applied(store.txn(vec![Compare::absent("c/one")], ops.clone()).await.unwrap());
    let listed = store.list("c/").await.unwrap();
    assert_eq!(listed.revision, revision);
    let seen: Vec<_> = listed.value.iter().map(|entry| (entry.key.as_str(), entry.mod_revision)).collect();
    assert_eq!(seen, [("c/one", revision), ("c/two", revision)], "STORE-1, STORE-3");
    assert_eq!(store.txn(vec![Compare::absent("c/one")], ops).await.unwrap(), TxnOutcome::NotApplied);
}

async fn refusals(store: &dyn Store) {
    let twice = store.txn(vec![], vec![Op::put("d/key", "1"), Op::delete("d/key")]).await;
    assert!(matches!(twice, Err(Error::Invalid { .. })), "{twice:?}");
    let empty = store.txn(vec![], vec![Op::put("", "1")]).await;
    assert!(matches!(empty, Err(Error::Invalid { .. })), "{empty:?}");
    let ghost = LeaseId(123_456_789);
    let op = Op::Put { key: "d/leased".to_owned(), value: vec![], lease: Some(ghost) };
    let leased = store.txn(vec![], vec![Op::put("d/other", "1"), op]).await;
    assert!(matches!(leased, Err(Error::LeaseNotFound(_))), "{leased:?}");
    assert_eq!(store.list("d/").await.unwrap().value, vec![], "nothing half-written");
}

async fn listing(store: &dyn Store) {
    // More than one page of the etcd store, and neighbours that must not be seen.
    put(store, "e", "x").await;
    put(store, "e0", "x").await;
    let mut revision = Revision(0);
    for index in 0..40 {
        revision = put(store, &format!("e/{index:02}"), &index.to_string()).await;
    }
    let listed = store.list("e/").await.unwrap();
    assert_eq!(listed.revision, revision);
    let keys: Vec<_> = listed.value.iter().map(|entry| entry.key.clone()).collect();
    assert_eq!(keys, (0..40).map(|index| format!("e/{index:02}")).collect::<Vec<_>>());
}

async fn watching(store: &dyn Store) {
    let first = put(store, "f/a", "1").await;
    put(store, "f/a", "2").await;
    put(store, "other", "x").await;
    let mut watch = store.watch("f/", first).await.unwrap();
    let deleted = applied(store.txn(vec![], vec![Op::delete("f/a"), Op::put("f/b", "3")]).await.unwrap());
    match next(&mut watch).await {
        Some(WatchEvent::Put(entry)) => {
            assert_eq!((entry.value.as_slice(), entry.create_revision), (b"2".as_slice(), first))
        }
        other => panic!("STORE-4: {other:?}"),
    }
    // One revision's changes come in no promised order.
    let mut pair = [next(&mut watch).await.unwrap(), next(&mut watch).await.unwrap()];
    pair.sort_by_key(|event| matches!(event, WatchEvent::Put(_)));
    assert_eq!(pair[0], WatchEvent::Delete { key: "f/a".to_owned(), revision: deleted });
    assert!(
        matches!(&pair[1], WatchEvent::Put(entry) if entry.key == "f/b" && entry.mod_revision == deleted),
        "{pair:?}"
    );
    // From now on only.
    let now = store.get("f/b").await.unwrap().revision;
    let mut later = store.watch("f/", now).await.unwrap();
    put(store, "f/c", "4").await;
    assert!(matches!(next(&mut later).await, Some(WatchEvent::Put(entry)) if entry.key == "f/c"));
}

async fn leases(store: &dyn Store) {
    let leased = |key: &str, lease| Op::Put { key: key.to_owned(), value: b"x".to_vec(), lease: Some(lease) };
    // Ends by itself.
    let short = store.grant_lease(Duration::from_millis(300)).await.unwrap();
    let long = store.grant_lease(Duration::from_secs(600)).await.unwrap();
    let start = applied(store.txn(vec![], vec![leased("g/short", short), leased("g/long", long)]).await.unwrap());
    let mut watch = store.watch("g/", start).await.unwrap();
    assert!(matches!(next(&mut watch).await, Some(WatchEvent::Delete { key, .. }) if key == "g/short"), "STORE-5");
    assert!(matches!(store.keep_alive(short).await, Err(Error::LeaseNotFound(_))));
    // Renewed and alive; ended by revoking.
    store.keep_alive(long).await.unwrap();
    assert!(store.get("g/long").await.unwrap().value.is_some());
    store.revoke(long).await.unwrap();
    assert!(store.get("g/long").await.unwrap().value.is_none());
    store.revoke(long).await.unwrap();
    // A put without the lease takes the key off it.
    let third = store.grant_lease(Duration::from_secs(600)).await.unwrap();
    applied(store.txn(vec![], vec![leased("g/free", third)]).await.unwrap());
    put(store, "g/free", "y").await;
    store.revoke(third).await.unwrap();
    assert!(store.get("g/free").await.unwrap().value.is_some());
}

async fn one_winner(store: &dyn Store) {
    let attempts = (0..8).map(|index| async move {
        let won =
            store.txn(vec![Compare::absent("h/leader")], vec![Op::put("h/leader", index.to_string())]).await.unwrap();
        matches!(won, TxnOutcome::Applied { .. })
    });
    let won = futures::future::join_all(attempts).await;
    assert_eq!(won.into_iter().filter(|won| *won).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("embedded:{}", folder.path().join("deep/store.redb").display()).parse().unwrap();
    conformance(store::open(&url).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conforms() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let url = format!("etcd://{}/test/one", etcd.address).parse().unwrap();
    conformance(store::open(&url).await.unwrap()).await;
    // Another prefix sees nothing of it.
    let other = store::open(&format!("etcd://{}/test/two", etcd.address).parse().unwrap()).await.unwrap();
    assert_eq!(other.list("").await.unwrap().value, vec![]);
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

#[tokio::test]
async fn embedded_keeps_everything_but_leased_keys() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("embedded:{}", folder.path().join("store.redb").display()).parse().unwrap();
    let store = store::open(&url).await.unwrap();
    let kept = put(store.as_ref(), "kept", "1").await;
    let lease = store.grant_lease(Duration::from_secs(600)).await.unwrap();
    let op = Op::Put { key: "leased".to_owned(), value: vec![], lease: Some(lease) };
    let last = applied(store.txn(vec![], vec![op]).await.unwrap());
    drop(store);
    let store = store::open(&url).await.unwrap();
    let entry = store.get("kept").await.unwrap().value.unwrap();
    assert_eq!((entry.value.as_slice(), entry.mod_revision), (b"1".as_slice(), kept));
    let gone = store.get("leased").await.unwrap();
    assert_eq!(gone.value, None, "its holder is gone");
    assert!(gone.revision > last, "STORE-1: revisions never restart");
    // History is not kept over a restart, and a watch from before says so.
    let mut watch = store.watch("", kept).await.unwrap();
    assert_eq!(next(&mut watch).await, Some(WatchEvent::Resync));
    assert_eq!(next(&mut watch).await, None);
}

#[tokio::test]
async fn a_slow_watch_is_told_to_resync() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("embedded:{}", folder.path().join("store.redb").display()).parse().unwrap();
    let store = store::open(&url).await.unwrap();
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    // More changes in few commits than the history holds.
    for round in 0..5 {
        let ops = (0..1000).map(|index| Op::put(format!("{index}"), format!("{round}"))).collect();
        store.txn(vec![], ops).await.unwrap();
    }
    let mut seen = 0;
    while let Some(event) = next(&mut watch).await {
        seen += 1;
        if event == WatchEvent::Resync {
            break;
        }
    }
    assert!(seen < 5000, "STORE-4");
    assert_eq!(next(&mut watch).await, None);
}

#[tokio::test]
async fn one_coordinator_per_embedded_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let url = format!("embedded:{}", path.display()).parse().unwrap();
    let _first = store::open(&url).await.unwrap();
    let error = store::open(&url).await.unwrap_err();
    assert!(matches!(&error, Error::InUse { path: named } if *named == path));
    assert!(error.to_string().contains("another coordinator uses the store"), "{error}");
}
