//! The store within one process: what is put, read, kept, evicted, cleared and refused.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{Folders, MIB, bytes_in, content, has, key, plain, put, segment_files};
use proptest::prelude::*;
use thaw_cache::{
    Cleared, Config, Error, Fit, Put, Stats, Store, Tensor, TierName, TierStats, Which, clear, held_bytes, would_fit,
};

#[test]
fn what_is_put_is_read_also_by_others() {
    let folders = Folders::new();
    let config = folders.config(MIB, MIB);
    let store = Store::open(&config, key("a"), "first").unwrap();
    assert!(store.find(3, 0).is_none());
    let tensors = [
        Tensor { dtype: 6, dims: vec![5, 100], bytes: 2000 },
        Tensor { dtype: 11, dims: vec![], bytes: 2 },
        Tensor { dtype: 4, dims: vec![0, 7], bytes: 0 },
    ];
    let bytes = content(3, 1, 2002);
    let pieces = [&bytes[..2000], &bytes[2000..], &[]];
    assert_eq!(store.put(3, 1, &tensors, &pieces).unwrap(), Put::Stored(TierName::Memory));
    assert_eq!(store.put(3, 1, &tensors, &pieces).unwrap(), Put::Present);

    let other = Store::open(&config, key("a"), "second").unwrap();
    for store in [&store, &other] {
        let record = store.find(3, 1).unwrap();
        assert_eq!(record.tensors(), tensors);
        let (mut a, mut b) = (vec![0; 2000], vec![0; 2]);
        assert!(store.read(&record, &mut [&mut a, &mut b, &mut []]).unwrap());
        assert_eq!((a.as_slice(), b.as_slice()), (pieces[0], pieces[1]));
        let mut whole = vec![9];
        assert!(store.get(3, 1, &mut whole).is_some());
        assert_eq!((whole[0], &whole[1..]), (9, bytes.as_slice()));
        assert!(store.read(&record, &mut [&mut a, &mut b]).is_err());
        assert!(!store.contains(3, 0));
    }
    assert_eq!(put(&store, 4, 0, 400), Put::Stored(TierName::Memory));
    assert!(!other.contains(4, 0));
    other.refresh().unwrap();
    assert_eq!(other.get(4, 0, &mut Vec::new()).unwrap().bytes(), 400);
    let memory = TierStats { entries: 2, bytes: 2402 };
    assert_eq!(other.stats(), Stats { memory, hits: 3, ..Stats::default() });
    assert_eq!(store.stats(), Stats { memory, hits: 2, misses: 1, ..Stats::default() });
}

#[test]
fn memory_then_disk_then_full_within_the_budgets() {
    let folders = Folders::new();
    let config = folders.config(MIB, 2 * MIB);
    let store = Store::open(&config, key("a"), "w").unwrap();
    let mut put_where = [0; 3];
    for sample in 0..1000 {
        match put(&store, sample, 0, 5000) {
            Put::Stored(TierName::Memory) => put_where[0] += 1,
            Put::Stored(TierName::Disk) => put_where[1] += 1,
            Put::Full => put_where[2] += 1,
            Put::Present => panic!("nothing was put twice"),
        }
        assert!(bytes_in(folders.memory.path()) <= MIB && bytes_in(folders.disk.path()) <= 2 * MIB, "CACHE-3");
    }
    // At least 95 % of each budget holds payloads.
    assert!(put_where[0] >= 199 && put_where[1] >= 398 && put_where[2] > 0, "{put_where:?}");
    let kept = (0..1000).filter(|sample| has(&store, *sample, 0)).count();
    assert_eq!(kept, put_where[0] + put_where[1]);
    drop(store);
    let again = Store::open(&config, key("a"), "w").unwrap();
    let stats = again.stats();
    assert_eq!((stats.memory.entries as usize, stats.disk.entries as usize), (put_where[0], put_where[1]));
    assert!((0..1000).filter(|sample| has(&again, *sample, 0)).count() == kept);
}

#[test]
fn closing_gives_back_what_was_reserved() {
    let folders = Folders::new();
    let config = folders.config(64 * MIB, 0);
    let store = fill(&config, "a", 3);
    let (open, payloads) = (bytes_in(folders.memory.path()), store.stats().memory.bytes);
    drop(store);
    let closed = bytes_in(folders.memory.path());
    assert!(open > payloads + MIB / 2 && closed < payloads + 3 * (64 + 128), "{open} bytes open, {closed} closed");
}

#[test]
fn a_tier_of_no_bytes_is_off() {
    let folders = Folders::new();
    let absent = folders.disk.path().join("absent");
    let mut config = folders.config(0, 0);
    config.memory.folder = absent.clone();
    let store = Store::open(&config, key("a"), "w").unwrap();
    assert_eq!(put(&store, 0, 0, 8), Put::Full);
    assert!(!has(&store, 0, 0));
    assert!(!absent.exists());
    config.disk.max_bytes = MIB;
    let store = Store::open(&config, key("a"), "w").unwrap();
    assert_eq!(put(&store, 0, 0, 8), Put::Stored(TierName::Disk));
}

/// Says when a closed key was used last.
fn used(folder: &Path, name: &str, at: SystemTime) {
    let open = folder.join(key(name).to_string()).join("open");
    File::options().write(true).open(open).unwrap().set_modified(at).unwrap();
}

fn names_kept(folder: &Path) -> Vec<&'static str> {
    ["a", "b", "c", "d"].into_iter().filter(|name| folder.join(key(name).to_string()).exists()).collect()
}

/// A key with `count` records of 50 kB in it.
fn fill(config: &Config, name: &str, count: u32) -> Store {
    let store = Store::open(config, key(name), "w").unwrap();
    for sample in 0..count {
        assert!(matches!(put(&store, sample, 0, 50_000), Put::Stored(_)));
    }
    store
}

#[test]
fn the_key_unused_for_longest_goes_and_none_that_is_open() {
    let folders = Folders::new();
    let (config, disk) = (folders.config(0, MIB), folders.disk.path());
    let a = fill(&config, "a", 5);
    for name in ["b", "c"] {
        fill(&config, name, 5);
    }
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    used(disk, "a", long_ago);
    used(disk, "c", long_ago + Duration::from_secs(1));
    used(disk, "b", long_ago + Duration::from_secs(2));
    // 250 kB are free; the eighth record needs c's room, the eleventh b's; a is open.
    let d = Store::open(&config, key("d"), "w").unwrap();
    let mut kept = Vec::new();
    for sample in 0..20 {
        put(&d, sample, 0, 50_000);
        kept.push(names_kept(disk));
        assert!(bytes_in(disk) <= MIB, "CACHE-3");
    }
    kept.dedup();
    assert_eq!(kept, [vec!["a", "b", "c", "d"], vec!["a", "b", "d"], vec!["a", "d"]], "CACHE-4");
    assert_eq!(d.stats().evicted, 2);
    assert!((0..5).all(|sample| has(&a, sample, 0)));
    assert_eq!(put(&d, 99, 0, 50_000), Put::Full);
    // It is not asked again before a refresh.
    drop(a);
    assert_eq!(put(&d, 99, 0, 50_000), Put::Full);
    d.refresh().unwrap();
    assert_eq!(put(&d, 99, 0, 50_000), Put::Stored(TierName::Disk));
    assert_eq!(names_kept(disk), ["d"]);
}

#[test]
fn disk_is_evicted_before_memory() {
    let folders = Folders::new();
    let config = folders.config(MIB, MIB);
    fill(&config, "a", 30);
    let store = Store::open(&config, key("b"), "w").unwrap();
    let stored: Vec<Put> = (0..60).map(|sample| put(&store, sample, 0, 50_000)).collect();
    let mut order = stored.clone();
    order.dedup();
    assert_eq!(order, [Put::Stored(TierName::Disk), Put::Stored(TierName::Memory), Put::Full]);
    assert_eq!(store.stats().evicted, 2);
}

#[test]
fn a_record_that_is_held_outlives_its_eviction() {
    let folders = Folders::new();
    let config = folders.config(MIB, 0);
    let store = fill(&config, "a", 3);
    let record = store.find(1, 0).unwrap();
    drop(store);
    assert_eq!(clear(&config, Which::Unused).unwrap().keys, 1);
    let other = fill(&config, "b", 15);
    let mut read = vec![0; 50_000];
    assert!(other.read(&record, &mut [&mut read]).unwrap());
    assert_eq!(read, content(1, 0, 50_000));
}

#[test]
fn foreign_files_are_left_alone() {
    let folders = Folders::new();
    let (config, disk) = (folders.config(0, MIB), folders.disk.path());
    let inside = disk.join(key("a").to_string());
    fill(&config, "a", 2);
    let foreign = [
        disk.join("notes.txt"),
        disk.join("ABCD"),
        inside.join("notes.data"),
        inside.join("a b-0.index"),
        inside.join("w-0.data.bak"),
        inside.join("w-x.index"),
    ];
    for path in &foreign {
        fs::write(path, vec![7; 3_000_000]).unwrap();
    }
    fs::create_dir(inside.join("w-9.index")).unwrap();
    fs::create_dir(disk.join("photos")).unwrap();
    std::os::unix::fs::symlink(disk.join("notes.txt"), inside.join("w-7.index")).unwrap();

    let store = Store::open(&config, key("a"), "w").unwrap();
    assert!(has(&store, 0, 0) && has(&store, 1, 0));
    assert_eq!(put(&store, 2, 0, 50_000), Put::Stored(TierName::Disk));
    assert_eq!(store.stats().damaged, 0);
    drop(store);
    let store = fill(&config, "b", 18);
    assert_eq!(store.stats().evicted, 1);
    drop(store);
    clear(&config, Which::Unused).unwrap();
    assert!(foreign.iter().all(|path| fs::read(path).unwrap() == vec![7; 3_000_000]), "CACHE-5");
    assert!(inside.join("w-9.index").is_dir() && disk.join("photos").is_dir() && inside.join("w-7.index").is_symlink());
    assert!(!inside.join("w-0.data").exists() && !inside.join("open").exists());
}

#[test]
fn clear_takes_what_is_asked_for_and_not_in_use() {
    let folders = Folders::new();
    let config = folders.config(150_000, MIB);
    let open = fill(&config, "a", 4);
    for name in ["b", "c", "d"] {
        fill(&config, name, 1);
    }
    assert_eq!(clear(&config, Which::Key(key("a"))).unwrap(), Cleared { keys: 0, bytes: 0, in_use: 2 });
    let disk = folders.disk.path();
    used(disk, "c", SystemTime::now() - Duration::from_secs(7200));
    let cleared = clear(&config, Which::UnusedFor(Duration::from_secs(3600))).unwrap();
    assert_eq!((cleared.keys, cleared.in_use, names_kept(disk)), (1, 0, vec!["a", "b", "d"]));
    let cleared = clear(&config, Which::Key(key("b"))).unwrap();
    assert!(cleared.bytes >= 50_000);
    assert_eq!(names_kept(disk), ["a", "d"]);
    clear(&config, Which::Unused).unwrap();
    assert_eq!((names_kept(disk), names_kept(folders.memory.path())), (vec!["a"], vec!["a"]));
    assert!((0..4).all(|sample| has(&open, sample, 0)), "CACHE-4");
}

#[test]
fn would_fit_says_where() {
    let folders = Folders::new();
    let config = folders.config(MIB, 2 * MIB);
    let asked = |name, bytes| would_fit(&config, &key(name), bytes).unwrap();
    assert_eq!(asked("a", 1000), Fit { memory: 1000, disk: 0, no: 0 });
    assert_eq!(asked("a", 4 * MIB), Fit { memory: MIB, disk: 2 * MIB, no: MIB });
    let open = fill(&config, "a", 50);
    let held = bytes_in(folders.disk.path());
    assert!(held > 0);
    assert_eq!(held_bytes(TierName::Disk, folders.disk.path()).unwrap(), held);
    // What the key holds counts as room for it, and is none for others while it is open.
    assert_eq!(asked("a", 4 * MIB), Fit { memory: MIB, disk: 2 * MIB, no: MIB });
    let other = asked("b", 4 * MIB);
    assert_eq!(other.disk, 2 * MIB - held);
    assert!(other.memory < 100_000 && other.no == 4 * MIB - other.disk - other.memory);
    drop(open);
    assert_eq!(asked("b", 4 * MIB), Fit { memory: MIB, disk: 2 * MIB, no: MIB });
    let absent = Config {
        memory: config.memory.clone(),
        disk: thaw_cache::Tier { folder: "/dev/shm/absent/x".into(), max_bytes: 5 },
    };
    assert_eq!(would_fit(&absent, &key("b"), 2 * MIB).unwrap(), Fit { memory: MIB, disk: 5, no: MIB - 5 });
}

#[test]
fn bad_folders_names_and_shapes_are_named() {
    let folders = Folders::new();
    let mut config = folders.config(0, MIB);
    let file = folders.disk.path().join("file");
    fs::write(&file, "").unwrap();
    config.disk.folder = file.join("cache");
    let error = Store::open(&config, key("a"), "w").unwrap_err();
    let Error::Folder { folder, .. } = &error else { panic!("{error}") };
    assert_eq!(*folder, config.disk.folder);
    assert!(error.to_string().contains(&format!("give {} to this user", folder.display())), "{error}");

    // An ordinary disk is no memory. Where even the build's folder is on tmpfs, /proc is none.
    config.memory = thaw_cache::Tier { folder: "/proc/self".into(), max_bytes: MIB };
    assert!(
        matches!(Store::open(&config, key("a"), "w").unwrap_err(), Error::NotMemory { folder } if folder == Path::new("/proc/self"))
    );
    assert!(matches!(Store::open(&folders.config(MIB, 0), key("a"), "a/../b").unwrap_err(), Error::Writer { .. }));

    // What another user made under /dev/shm is not trusted. Only root can make such a folder here; others see /dev/shm itself.
    let foreign = folders.memory.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let root = std::os::unix::fs::chown(&foreign, Some(12_345), None).is_ok();
    config.memory.folder = if root { foreign } else { "/dev/shm".into() };
    let Error::Foreign { owner, .. } = Store::open(&config, key("a"), "w").unwrap_err() else { panic!("CACHE-1") };
    assert_eq!(owner, if root { 12_345 } else { 0 });

    let store = Store::open(&folders.config(MIB, 0), key("a"), "w").unwrap();
    let refused = |tensors: &[Tensor], pieces: &[&[u8]]| store.put(0, 0, tensors, pieces).unwrap_err();
    assert!(matches!(refused(&plain(8), &[&[0; 7]]), Error::Size { .. }));
    assert!(matches!(refused(&plain(8), &[]), Error::Size { .. }));
    assert!(matches!(refused(&[], &[]), Error::Shape { tensors: 0, .. }));
    assert!(matches!(refused(&vec![plain(0).remove(0); 17], &[[].as_slice(); 17]), Error::Shape { tensors: 17, .. }));
    assert!(matches!(
        refused(&[Tensor { dtype: 0, dims: vec![1; 13], bytes: 0 }], &[&[]]),
        Error::Shape { dims: 13, .. }
    ));
}

#[test]
fn a_lock_that_is_not_given_back_stops_nobody_for_long() {
    let folders = Folders::new();
    let config = folders.config(MIB, 0);
    let store = fill(&config, "a", 1);
    let lock = File::open(folders.memory.path().join("lock")).unwrap();
    lock.lock().unwrap();
    assert_eq!(put(&store, 7, 0, 500_000), Put::Full, "CACHE-6");
    assert!(has(&store, 0, 0));
    assert!(matches!(Store::open(&config, key("a"), "w").unwrap_err(), Error::Busy { .. }));
    lock.unlock().unwrap();
    store.refresh().unwrap();
    assert_eq!(put(&store, 7, 0, 500_000), Put::Stored(TierName::Memory));
}

#[test]
fn threads_may_share_a_store() {
    let folders = Folders::new();
    let store = Store::open(&folders.config(MIB, 4 * MIB), key("a"), "w").unwrap();
    std::thread::scope(|threads| {
        for thread in 0..4 {
            let store = &store;
            threads.spawn(move || {
                for sample in 0..200 {
                    put(store, sample * 4 + thread, 0, 1000 + sample as usize * 5);
                    assert!(has(store, sample * 4 + thread, 0));
                    has(store, (sample * 7) % 800, 0);
                }
            });
        }
    });
    let other = Store::open(&folders.config(MIB, 4 * MIB), key("a"), "x").unwrap();
    assert!((0..800).all(|sample| has(&other, sample, 0)));
    assert_eq!(other.stats().damaged, 0);
}

#[derive(Debug, Clone)]
enum Action {
    Put { who: usize, sample: u32, view: u16, bytes: usize },
    Get { who: usize, sample: u32, view: u16 },
    Refresh { who: usize },
    Reopen { who: usize },
}

fn action() -> impl Strategy<Value = Action> {
    let (who, sample, view) = (0..3_usize, 0..40_u32, 0..2_u16);
    prop_oneof![
        4 => (who.clone(), sample.clone(), view.clone(), prop_oneof![0..300_usize, 1000..40_000_usize])
            .prop_map(|(who, sample, view, bytes)| Action::Put { who, sample, view, bytes }),
        4 => (who.clone(), sample, view).prop_map(|(who, sample, view)| Action::Get { who, sample, view }),
        1 => who.clone().prop_map(|who| Action::Refresh { who }),
        1 => who.prop_map(|who| Action::Reopen { who }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// CACHE-1 to CACHE-3 over any order of calls by three openers of one key.
    #[test]
    fn any_order_of_calls(actions in proptest::collection::vec(action(), 1..120)) {
        let folders = Folders::new();
        let config = folders.config(300_000, 300_000);
        let open = |who: usize| Store::open(&config, key("a"), &format!("w{who}")).unwrap();
        let mut stores: Vec<Store> = (0..3).map(open).collect();
        let mut stored: HashMap<(u32, u16), usize> = HashMap::new();
        for action in actions {
            match action {
                Action::Put { who, sample, view, bytes } => {
                    // The prefix is a function: whoever computes a record gets the same bytes.
                    let bytes = *stored.get(&(sample, view)).unwrap_or(&bytes);
                    match put(&stores[who], sample, view, bytes) {
                        Put::Stored(_) => { stored.insert((sample, view), bytes); }
                        Put::Present => prop_assert!(stored.contains_key(&(sample, view))),
                        Put::Full => {}
                    }
                }
                Action::Get { who, sample, view } => {
                    let known = stores[who].contains(sample, view);
                    prop_assert_eq!(has(&stores[who], sample, view), known);
                }
                Action::Refresh { who } => stores[who].refresh().unwrap(),
                Action::Reopen { who } => stores[who] = open(who),
            }
            prop_assert!(bytes_in(folders.memory.path()) <= 300_000 && bytes_in(folders.disk.path()) <= 300_000);
        }
        let last = open(0);
        for sample in 0..40 {
            for view in 0..2 {
                prop_assert_eq!(has(&last, sample, view), stored.contains_key(&(sample, view)));
            }
        }
        drop(stores);
        drop(last);
        let payloads: usize = stored.values().sum();
        let files: u64 = [&folders.memory, &folders.disk].iter().map(|folder| bytes_in(folder.path())).sum();
        prop_assert!(files >= payloads as u64 && segment_files(folders.memory.path()).len().is_multiple_of(2));
    }
}
