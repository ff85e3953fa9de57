//! What a cache promises, with real files and real processes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use thaw_cache::{Config, Kept, Key, Store, Tier, clear};

struct Node {
    folder: tempfile::TempDir,
    memory: u64,
    disk: u64,
}

impl Node {
    fn new(memory: u64, disk: u64) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), memory, disk }
    }

    fn config(&self) -> Config {
        config(self.folder.path(), self.memory, self.disk)
    }

    fn open(&self, name: &str) -> Store {
        Store::open(&self.config(), key(name)).unwrap()
    }

    /// Every rows file of a tier.
    fn files(&self, tier: &str) -> Vec<PathBuf> {
        let keys = fs::read_dir(self.folder.path().join(tier)).into_iter().flatten().flatten();
        let files = keys.flat_map(|key| fs::read_dir(key.path()).into_iter().flatten().flatten());
        files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|end| end == "rows")).collect()
    }

    fn bytes(&self, tier: &str) -> u64 {
        self.files(tier).iter().map(|path| fs::metadata(path).unwrap().len()).sum()
    }
}

fn config(folder: &Path, memory: u64, disk: u64) -> Config {
    let tier = |name: &str, max_bytes| Tier { folder: folder.join(name), max_bytes };
    Config { memory: tier("memory", memory), disk: tier("disk", disk) }
}

fn key(name: &str) -> Key {
    Key::of(&[("test", name.as_bytes())])
}

/// Bytes that follow from the sample, so that a reader can tell right from wrong.
fn data(sample: u32, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (sample as usize * 31 + at * 7) as u8).collect()
}

fn read(store: &Store, sample: u32) -> Option<Vec<u8>> {
    let mut bytes = vec![9];
    let meta = store.get(sample, 0, &mut bytes).unwrap();
    match meta {
        Some(meta) => {
            assert_eq!(meta, sample.to_le_bytes());
            assert_eq!(bytes[0], 9, "what was there stays");
            Some(bytes.split_off(1))
        }
        None => {
            assert_eq!(bytes, [9], "a miss leaves the buffer as it was");
            None
        }
    }
}

fn put(store: &Store, sample: u32, bytes: usize) -> Kept {
    store.put(sample, 0, &sample.to_le_bytes(), &data(sample, bytes)).unwrap()
}

#[test]
fn rows_are_found_again_by_this_process_and_the_next() {
    let node = Node::new(1 << 20, 0);
    let store = node.open("a");
    assert!(!store.contains(3, 0) && read(&store, 3).is_none());
    for sample in 0..50 {
        assert_eq!(put(&store, sample, 100 + sample as usize), Kept::Stored);
    }
    let other = node.open("a");
    drop(store);
    for store in [other, node.open("a")] {
        for sample in 0..50 {
            assert!(store.contains(sample, 0) && !store.contains(sample, 1));
            assert_eq!(read(&store, sample).unwrap(), data(sample, 100 + sample as usize));
        }
        assert_eq!((store.stats().rows, store.stats().hits, store.stats().damaged), (50, 50, 0));
    }
    assert!(read(&node.open("b"), 3).is_none(), "another key has rows of its own");
    assert!(node.bytes("memory") < 50 * 200, "what was taken and not used is given back");
    assert!(!node.folder.path().join("disk").exists(), "a tier of no bytes is not made");
}

#[test]
fn several_processes_write_one_key() {
    let node = Node::new(1 << 20, 0);
    let (one, two) = (node.open("a"), node.open("a"));
    for sample in 0..20 {
        put(if sample % 2 == 0 { &one } else { &two }, sample, 64);
    }
    let reader = node.open("a");
    assert!((0..20).all(|sample| read(&reader, sample).unwrap() == data(sample, 64)));
}

/// CACHE-1
#[test]
fn any_flipped_bit_is_a_miss_never_wrong_bytes() {
    let node = Node::new(1 << 20, 0);
    let store = node.open("a");
    (0..4).for_each(|sample| assert_eq!(put(&store, sample, 40), Kept::Stored));
    drop(store);
    let path = node.files("memory").remove(0);
    let length = fs::metadata(&path).unwrap().len();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    for at in 0..length {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let store = node.open("a");
        let found = (0..4).filter_map(|sample| read(&store, sample).map(|bytes| (sample, bytes)));
        let found: Vec<_> = found.collect();
        assert!(found.len() < 4, "the row around byte {at} is gone");
        assert!(found.iter().all(|(sample, bytes)| *bytes == data(*sample, 40)), "byte {at}");
        file.write_all_at(&byte, at).unwrap();
    }
    for cut in [length - 1, length - 41, 5, 0] {
        file.set_len(cut).unwrap();
        let store = node.open("a");
        let kept = (0..4).filter_map(|sample| read(&store, sample)).count();
        assert_eq!(kept as u64, cut * 4 / length, "a file cut at {cut}");
    }
}

#[test]
fn a_damaged_row_is_written_again() {
    let node = Node::new(1 << 20, 0);
    let store = node.open("a");
    put(&store, 1, 40);
    let file = OpenOptions::new().write(true).open(&node.files("memory")[0]).unwrap();
    file.write_all_at(&[0xff], 50).unwrap();
    assert!(read(&store, 1).is_none() && !store.contains(1, 0));
    assert_eq!(store.stats().damaged, 1);
    put(&store, 1, 40);
    assert_eq!(read(&store, 1).unwrap(), data(1, 40));
    drop(store);
    assert_eq!(read(&node.open("a"), 1).unwrap(), data(1, 40), "the later row counts");
}

/// CACHE-2
#[test]
fn memory_first_then_disk_then_full() {
    let node = Node::new(64 << 10, 128 << 10);
    let store = node.open("a");
    let mut stored = 0;
    while put(&store, stored, 1000) == Kept::Stored {
        stored += 1;
        assert!(node.bytes("memory") <= 64 << 10 && node.bytes("disk") <= 128 << 10);
    }
    assert!(node.bytes("memory") > 60 << 10 && node.bytes("disk") > 120 << 10);
    assert!((180..=192).contains(&stored), "{stored} rows of about 1 KiB in 192 KiB");
    assert!((0..stored).all(|sample| read(&store, sample).unwrap() == data(sample, 1000)));
    assert_eq!(put(&store, stored, 1000), Kept::Full, "and it stays full");
}

/// CACHE-3
#[test]
fn the_longest_unused_key_makes_room_and_an_open_one_stays() {
    let node = Node::new(64 << 10, 0);
    let fill = |name: &str, rows: u32| {
        let store = node.open(name);
        (0..rows).for_each(|sample| assert_eq!(put(&store, sample, 1000), Kept::Stored, "{name} {sample}"));
        store
    };
    drop(fill("old", 20));
    let open = fill("open", 20);
    drop(fill("young", 10));
    let new = fill("new", 25);
    assert!(read(&node.open("old"), 0).is_none());
    assert!((0..20).all(|sample| read(&open, sample).is_some()));
    assert!(read(&node.open("young"), 0).is_some(), "one was enough");
    assert!(node.bytes("memory") <= 64 << 10);
    drop(open);
    drop(new);
    assert!(clear(&node.config()).unwrap() > 0);
    assert_eq!(node.bytes("memory"), 0);
}

#[test]
fn foreign_files_are_left_alone() {
    let node = Node::new(16 << 10, 0);
    drop(node.open("a"));
    let folder = node.folder.path().join("memory");
    fs::create_dir(folder.join("mine")).unwrap();
    fs::write(folder.join("mine/notes.rows"), [1; 4096]).unwrap();
    fs::write(folder.join("mine.txt"), "mine").unwrap();
    let store = node.open("b");
    (0..15).for_each(|sample| assert_eq!(put(&store, sample, 1000), Kept::Stored));
    drop(store);
    clear(&node.config()).unwrap();
    assert!(folder.join("mine/notes.rows").exists() && folder.join("mine.txt").exists());
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let node = Node::new(1 << 20, 0);
    fs::write(node.folder.path().join("memory"), "a file").unwrap();
    let error = Store::open(&node.config(), key("a")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("memory") && text.contains("may write to"), "{text}");
    assert!(matches!(node_with_row().put(0, 0, &[0; 70_000], &[]), Err(thaw_cache::Error::Size { .. })));
}

fn node_with_row() -> Store {
    let node = Node::new(1 << 20, 0);
    node.open("a")
}

/// The child of [`a_killed_writer_leaves_only_whole_rows`].
#[test]
fn child() {
    let Some(folder) = std::env::var_os("THAW_CACHE_TEST_FOLDER") else { return };
    let store = Store::open(&config(Path::new(&folder), 8 << 20, 0), key("a")).unwrap();
    println!("writing");
    for sample in 0.. {
        if put(&store, sample % 4000, 700 + sample as usize % 900) == Kept::Full {
            break;
        }
    }
}

/// CACHE-1, CACHE-3: a dead process's rows are whole or not there, and its locks are gone.
#[test]
fn a_killed_writer_leaves_only_whole_rows() {
    let node = Node::new(8 << 20, 0);
    let mut rows = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("THAW_CACHE_TEST_FOLDER", node.folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        while lines.next().is_some_and(|line| !line.unwrap().contains("writing")) {}
        // Anywhere between its first row and the end of the budget.
        while node.bytes("memory") == 0 {}
        std::thread::sleep(std::time::Duration::from_micros(300 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = node.open("a");
        assert!(node.bytes("memory") <= 8 << 20);
        for sample in 0..4000 {
            let mut bytes = Vec::new();
            if store.contains(sample, 0) && store.get(sample, 0, &mut bytes).unwrap().is_some() {
                assert_eq!(bytes, data_of(sample, bytes.len()));
                rows += 1;
            }
        }
        drop(store);
        assert!(clear(&node.config()).unwrap() > 0, "nobody has the key open");
    }
    assert!(rows > 0, "some rows were written before each kill");
}

fn data_of(sample: u32, bytes: usize) -> Vec<u8> {
    data(sample, bytes)
}
