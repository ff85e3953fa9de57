//! One suite: what `store` promises (STORE-1 to STORE-5), over the embedded file, over a real etcd, and over the model of
//! etcd that the simulation of `tests/sim` stands on, so that the model is held against the real one.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "../../tests/sim/src/etcd.rs"]
#[allow(dead_code, unreachable_pub, reason = "the simulation uses the rest")]
mod etcd_model;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use thaw_coordinator::store::{
    self, Compare, Error, Followed, LeaseId, Op, Revision, Store, TxnOutcome, WatchEvent, WatchStream,
};
use thaw_proto::status::ErrorClass;

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
    reads_and_revisions(store).await;
    compares(store).await;
    values(store).await;
    all_or_nothing(store).await;
    refusals(store).await;
    listing(store).await;
    listing_while_written(&shared).await;
    watching(store).await;
    watching_the_past(store).await;
    watching_over_compaction(store, &compact).await;
    following(&shared, &compact).await;
    leases(store).await;
    lease_is_kept_alive(store).await;
    leases_and_their_keys(store).await;
    one_winner(store).await;
    counting(&shared).await;
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

async fn values(store: &dyn Store) {
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

/// Pages of one listing are of one revision: a transaction is in it whole or not at all.
async fn listing_while_written(store: &Arc<dyn Store>) {
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

/// A watch from the past sees every change in order, whether it was made before or after it began.
async fn watching_the_past(store: &dyn Store) {
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
async fn watching_over_compaction(store: &dyn Store, compact: &Compact) {
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
async fn following(store: &Arc<dyn Store>, compact: &Compact) {
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

async fn lease_is_kept_alive(store: &dyn Store) {
    // etcd's shortest is two seconds: alive well beyond it by renewals, and gone without.
    let lease = store.grant_lease(Duration::from_secs(1)).await.unwrap();
    let op = Op::Put { key: "l/kept".to_owned(), value: b"x".to_vec(), lease: Some(lease) };
    let start = applied(store.txn(vec![], vec![op]).await.unwrap());
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        store.keep_alive(lease).await.unwrap();
        assert!(store.get("l/kept").await.unwrap().value.is_some(), "STORE-5");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut watch = store.watch("l/", start).await.unwrap();
    let renewed = std::time::Instant::now();
    assert!(matches!(next(&mut watch).await, Some(WatchEvent::Delete { key, .. }) if key == "l/kept"));
    assert!(renewed.elapsed() >= Duration::from_millis(700), "STORE-5: not before its time");
}

async fn leases_and_their_keys(store: &dyn Store) {
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

/// Compare-and-set from many hands loses no update.
async fn counting(store: &Arc<dyn Store>) {
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
