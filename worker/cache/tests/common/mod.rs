//! What the tests of the store share.

#![allow(dead_code, reason = "each test crate uses a part")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use thaw_cache::{Config, Key, Put, Store, Tensor, Tier};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) struct Folders {
    pub(crate) memory: tempfile::TempDir,
    pub(crate) disk: tempfile::TempDir,
}

impl Folders {
    pub(crate) fn new() -> Folders {
        Folders { memory: tempfile::tempdir_in("/dev/shm").unwrap(), disk: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn config(&self, memory: u64, disk: u64) -> Config {
        config(self.memory.path(), memory, self.disk.path(), disk)
    }
}

pub(crate) fn config(memory: &Path, memory_bytes: u64, disk: &Path, disk_bytes: u64) -> Config {
    let tier = |folder: &Path, max_bytes| Tier { folder: folder.to_owned(), max_bytes };
    Config { memory: tier(memory, memory_bytes), disk: tier(disk, disk_bytes) }
}

pub(crate) fn key(name: &str) -> Key {
    Key::of(&[("prefix", name.as_bytes())])
}

pub(crate) fn content(sample: u32, view: u16, bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|i| (i * 7 + sample * 31 + u32::from(view) * 101 + (i >> 8)) as u8).collect()
}

pub(crate) fn plain(bytes: usize) -> Vec<Tensor> {
    vec![Tensor { dtype: 6, dims: vec![bytes as u32 / 4], bytes: bytes as u32 }]
}

pub(crate) fn put(store: &Store, sample: u32, view: u16, bytes: usize) -> Put {
    store.put(sample, view, &plain(bytes), &[&content(sample, view, bytes)]).unwrap()
}

/// Whether the record is there; what is read must be what [`put`] put.
pub(crate) fn has(store: &Store, sample: u32, view: u16) -> bool {
    let mut found = Vec::new();
    let record = store.get(sample, view, &mut found);
    assert!(record.is_none() || found == content(sample, view, found.len()), "CACHE-1: sample {sample}, view {view}");
    record.is_some()
}

/// Bytes of all the store's files in a tier's folder, while nobody can change them.
pub(crate) fn bytes_in(folder: &Path) -> u64 {
    let lock = File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    segment_files(folder).iter().filter_map(|file| fs::metadata(file).ok()).map(|file| file.len()).sum()
}

/// All segment files under a tier's folder, sorted.
pub(crate) fn segment_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for key in fs::read_dir(folder).unwrap().map(|found| found.unwrap().path()).filter(|path| path.is_dir()) {
        // A key may be evicted between the two listings.
        let Ok(found) = fs::read_dir(key) else { continue };
        files.extend(found.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some()));
    }
    files.sort();
    files
}
