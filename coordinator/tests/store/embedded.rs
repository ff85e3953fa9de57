//! What the embedded store promises besides.

use super::{applied, next, put};
use std::time::Duration;
use thaw_coordinator::store::{self, Error, Op, Revision, WatchEvent};

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
