//! Watches, and keys followed: STORE-4, FOLLOW-1, FOLLOW-2.

use super::{Compact, WAIT, applied, next, put};
use futures::StreamExt as _;
use std::collections::BTreeMap;
use std::sync::Arc;
use thaw_coordinator::store::{self, Followed, Op, Revision, Store, WatchEvent};

pub(super) async fn watching(store: &dyn Store) {
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

/// A watch from the past sees every change in order, whether it was made before or after it began.
pub(super) async fn watching_the_past(store: &dyn Store) {
    let start = put(store, "p/0", "0").await;
    let mut expected = Vec::new();
    for index in 1..=30 {
        expected.push(put(store, &format!("p/{}", index % 3), &index.to_string()).await);
    }
    let mut watch = store.watch("p/", start).await.unwrap();
    for index in 31..=40 {
        expected.push(put(store, &format!("p/{}", index % 3), &index.to_string()).await);
    }
    for revision in expected {
        match next(&mut watch).await {
            Some(WatchEvent::Put(entry)) => assert_eq!(entry.mod_revision, revision, "STORE-4"),
            other => panic!("STORE-4: {other:?}"),
        }
    }
}

/// History that is gone is said to be gone; a watch that was there before goes on.
pub(super) async fn watching_over_compaction(store: &dyn Store, compact: &Compact) {
    let past = put(store, "k/a", "1").await;
    put(store, "k/a", "1").await;
    // etcd keeps the very revision it compacts at.
    put(store, "k/a", "2").await;
    compact().await;
    let mut late = store.watch("k/", past).await.unwrap();
    assert_eq!(next(&mut late).await, Some(WatchEvent::Resync), "STORE-4");
    assert_eq!(next(&mut late).await, None);
    // From what is read now it works again.
    let listed = store.list("k/").await.unwrap();
    assert_eq!(listed.value[0].value, b"2");
    let mut watch = store.watch("k/", listed.revision).await.unwrap();
    let third = put(store, "k/a", "3").await;
    assert!(matches!(next(&mut watch).await, Some(WatchEvent::Put(entry)) if entry.mod_revision == third));
}

/// FOLLOW-1, FOLLOW-2: a slow reader, over whose head history is compacted, ends with what there is, and sees nothing twice.
pub(super) async fn following(store: &Arc<dyn Store>, compact: &Compact) {
    for index in 0..20 {
        put(store.as_ref(), &format!("y/{index:02}"), "0").await;
    }
    let mut follow = store::follow(Arc::clone(store), "y/");
    let mut seen = BTreeMap::new();
    let see = |followed: Followed, seen: &mut BTreeMap<String, (Revision, Vec<u8>)>| match followed {
        Followed::Put(entry) => {
            let newer = seen.get(&entry.key).is_none_or(|(revision, _)| *revision < entry.mod_revision);
            assert!(newer, "FOLLOW-1: {} twice or backwards", entry.key);
            seen.insert(entry.key, (entry.mod_revision, entry.value));
        }
        Followed::Deleted { key } => assert!(seen.remove(&key).is_some(), "FOLLOW-2: {key} was not there"),
        Followed::Synced(_) | Followed::Trouble(_) => {}
    };
    while seen.len() < 20 {
        see(follow.next().await.unwrap(), &mut seen);
    }
    for round in 1..4 {
        for index in 0..20 {
            put(store.as_ref(), &format!("y/{index:02}"), &round.to_string()).await;
        }
        let gone = vec![Op::delete(format!("y/{round:02}")), Op::put(format!("y/new-{round}"), "x")];
        applied(store.txn(vec![], gone).await.unwrap());
        compact().await;
    }
    let wanted = |store: Arc<dyn Store>| async move {
        let listed = store.list("y/").await.unwrap().value;
        listed.into_iter().map(|entry| (entry.key, (entry.mod_revision, entry.value))).collect::<BTreeMap<_, _>>()
    };
    let wanted = wanted(Arc::clone(store)).await;
    let catch_up = async {
        while seen != wanted {
            see(follow.next().await.unwrap(), &mut seen);
        }
    };
    tokio::time::timeout(WAIT, catch_up).await.expect("catches up");
}
