//! Reads, compares and transactions: STORE-1 to STORE-3.

use super::{applied, put};
use std::sync::Arc;
use thaw_coordinator::store::{Compare, Error, LeaseId, Op, Revision, Store, TxnOutcome};

pub(super) async fn reads_and_revisions(store: &dyn Store) {
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

pub(super) async fn compares(store: &dyn Store) {
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

pub(super) async fn values(store: &dyn Store) {
    put(store, "v/key", "1").await;
    let holds = [Compare::value_is("v/key", "1"), Compare::value_is("v/key", b"1".to_vec())];
    for compare in holds {
        applied(store.txn(vec![compare], vec![Op::put("v/key", "1")]).await.unwrap());
    }
    // Also of a key that is not there, whose value is not the empty one.
    for compare in [Compare::value_is("v/key", "2"), Compare::value_is("v/key", ""), Compare::value_is("v/none", "")] {
        let outcome = store.txn(vec![compare.clone()], vec![Op::put("v/other", "x")]).await.unwrap();
        assert_eq!(outcome, TxnOutcome::NotApplied, "{compare:?}");
    }
    put(store, "v/empty", "").await;
    applied(store.txn(vec![Compare::value_is("v/empty", "")], vec![]).await.unwrap());
    // Compares see what was there before, whatever the operations do.
    let swap = vec![Op::put("v/key", "2"), Op::put("v/made", "2"), Op::delete("v/empty")];
    let compares = vec![Compare::value_is("v/key", "1"), Compare::absent("v/made"), Compare::value_is("v/empty", "")];
    let revision = applied(store.txn(compares, swap).await.unwrap());
    let listed = store.list("v/").await.unwrap().value;
    let seen: Vec<_> =
        listed.iter().map(|entry| (entry.key.as_str(), entry.value.as_slice(), entry.mod_revision)).collect();
    assert_eq!(seen, [("v/key", b"2".as_slice(), revision), ("v/made", b"2".as_slice(), revision)]);
    assert_eq!(listed[1].create_revision, revision, "STORE-2");
}

pub(super) async fn all_or_nothing(store: &dyn Store) {
    put(store, "c/old", "1").await;
    let ops = vec![Op::put("c/one", "1"), Op::put("c/two", "2"), Op::delete("c/old")];
    let revision = applied(store.txn(vec![Compare::absent("c/one")], ops.clone()).await.unwrap());
    let listed = store.list("c/").await.unwrap();
    assert_eq!(listed.revision, revision);
    let seen: Vec<_> = listed.value.iter().map(|entry| (entry.key.as_str(), entry.mod_revision)).collect();
    assert_eq!(seen, [("c/one", revision), ("c/two", revision)], "STORE-1, STORE-3");
    assert_eq!(store.txn(vec![Compare::absent("c/one")], ops).await.unwrap(), TxnOutcome::NotApplied);
}

pub(super) async fn refusals(store: &dyn Store) {
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

pub(super) async fn listing(store: &dyn Store) {
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

/// Pages of one listing are of one revision: a transaction is in it whole or not at all.
pub(super) async fn listing_while_written(store: &Arc<dyn Store>) {
    let write = |round: u32| (0..50).map(move |index| Op::put(format!("w/{index:02}"), round.to_string())).collect();
    applied(store.txn(vec![], write(0)).await.unwrap());
    let writer = tokio::spawn({
        let store = Arc::clone(store);
        async move {
            for round in 1..=40 {
                applied(store.txn(vec![], write(round)).await.unwrap());
            }
        }
    });
    let mut rounds = 0;
    while rounds < 20 || !writer.is_finished() {
        rounds += 1;
        let listed = store.list("w/").await.unwrap();
        let first = &listed.value[0];
        assert_eq!(listed.value.len(), 50);
        for entry in &listed.value {
            assert_eq!((&entry.value, entry.mod_revision), (&first.value, first.mod_revision), "STORE-1");
        }
        assert!(first.mod_revision <= listed.revision);
    }
    writer.await.unwrap();
}

pub(super) async fn one_winner(store: &dyn Store) {
    let attempts = (0..8).map(|index| async move {
        let won =
            store.txn(vec![Compare::absent("h/leader")], vec![Op::put("h/leader", index.to_string())]).await.unwrap();
        matches!(won, TxnOutcome::Applied { .. })
    });
    let won = futures::future::join_all(attempts).await;
    assert_eq!(won.into_iter().filter(|won| *won).count(), 1);
}

/// Compare-and-set from many hands loses no update.
pub(super) async fn counting(store: &Arc<dyn Store>) {
    put(store.as_ref(), "n/count", "0").await;
    let add = || {
        let store = Arc::clone(store);
        async move {
            for _ in 0..10 {
                loop {
                    let entry = store.get("n/count").await.unwrap().value.unwrap();
                    let count: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                    let compare = Compare::modified_at("n/count", entry.mod_revision);
                    let op = Op::put("n/count", (count + 1).to_string());
                    if let TxnOutcome::Applied { .. } = store.txn(vec![compare], vec![op]).await.unwrap() {
                        break;
                    }
                }
            }
        }
    };
    futures::future::join_all((0..4).map(|_| add())).await;
    assert_eq!(store.get("n/count").await.unwrap().value.unwrap().value, b"40");
}
