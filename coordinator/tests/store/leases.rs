//! Leases and their keys: STORE-5.

use super::{applied, next, put};
use std::collections::BTreeMap;
use std::time::Duration;
use thaw_coordinator::store::{Compare, Error, Op, Store, WatchEvent};
use thaw_proto::status::ErrorClass;

pub(super) async fn leases(store: &dyn Store) {
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

pub(super) async fn lease_is_kept_alive(store: &dyn Store) {
    // Alive well beyond its time by renewals, and gone without; long enough for a machine that stands still for a while.
    let time = Duration::from_secs(4);
    let lease = store.grant_lease(time).await.unwrap();
    let op = Op::Put { key: "l/kept".to_owned(), value: b"x".to_vec(), lease: Some(lease) };
    let start = applied(store.txn(vec![], vec![op]).await.unwrap());
    let began = std::time::Instant::now();
    let mut renewed = began;
    while began.elapsed() < time * 3 / 2 {
        renewed = std::time::Instant::now();
        store.keep_alive(lease).await.unwrap();
        assert!(store.get("l/kept").await.unwrap().value.is_some(), "STORE-5");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut watch = store.watch("l/", start).await.unwrap();
    assert!(matches!(next(&mut watch).await, Some(WatchEvent::Delete { key, .. }) if key == "l/kept"));
    assert!(renewed.elapsed() >= time, "STORE-5: not before its time");
}

pub(super) async fn leases_and_their_keys(store: &dyn Store) {
    let leased =
        |key: &str, value: &str, lease| Op::Put { key: key.to_owned(), value: value.into(), lease: Some(lease) };
    let one = store.grant_lease(Duration::from_secs(600)).await.unwrap();
    let two = store.grant_lease(Duration::from_secs(600)).await.unwrap();
    let ops = vec![leased("m/a", "1", one), leased("m/b", "1", one), leased("m/c", "1", two)];
    let start = applied(store.txn(vec![], ops).await.unwrap());
    // Another lease takes the key over.
    applied(store.txn(vec![], vec![leased("m/b", "2", two)]).await.unwrap());
    store.revoke(one).await.unwrap();
    let left: Vec<_> = store.list("m/").await.unwrap().value.into_iter().map(|entry| entry.key).collect();
    assert_eq!(left, ["m/b", "m/c"], "STORE-5");
    // A key of a lease that ended is gone for compares, and may be made again.
    applied(store.txn(vec![Compare::absent("m/a")], vec![Op::put("m/a", "3")]).await.unwrap());
    // All keys of one lease go at once.
    let mut watch = store.watch("m/", start).await.unwrap();
    store.revoke(two).await.unwrap();
    let mut gone = BTreeMap::new();
    while gone.len() < 3 {
        if let Some(WatchEvent::Delete { key, revision }) = next(&mut watch).await {
            gone.insert(key, revision);
        }
    }
    assert_eq!(gone["m/b"], gone["m/c"], "STORE-1");
    assert!(gone["m/a"] < gone["m/b"]);
    let after = store.txn(vec![], vec![leased("m/d", "1", two)]).await;
    assert!(matches!(after, Err(Error::LeaseNotFound(lease)) if lease == two), "{after:?}");
    assert_eq!(after.unwrap_err().class(), ErrorClass::Fenced);
}
