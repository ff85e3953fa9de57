//! Damaged files: a miss, or the right bytes, never others.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Folders, MIB, has, key, put, segment_files};
use thaw_cache::{Config, Put, Store};

const SAMPLES: u32 = 5;

fn bytes_of(sample: u32) -> usize {
    [0, 40, 64, 100, 300][sample as usize]
}

/// A closed key with five small records: its payload file and its index.
fn written(config: &Config, name: &str, folder: &Path) -> [PathBuf; 2] {
    let store = Store::open(config, key(name), "w").unwrap();
    for sample in 0..SAMPLES {
        assert!(matches!(put(&store, sample, 0, bytes_of(sample)), Put::Stored(_)));
    }
    drop(store);
    let files = segment_files(folder);
    files
        .into_iter()
        .filter(|file| file.starts_with(folder.join(key(name).to_string())))
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

/// Opens the key and reads everything: which samples are there. Then puts what is missing, and all must be there, also for others.
fn read_and_mend(config: &Config, name: &str) -> Vec<u32> {
    let store = Store::open(config, key(name), "mender").unwrap();
    let there: Vec<u32> = (0..SAMPLES).filter(|sample| has(&store, *sample, 0)).collect();
    for sample in 0..SAMPLES {
        let put = put(&store, sample, 0, bytes_of(sample));
        assert_eq!(put == Put::Present, there.contains(&sample));
        assert!(has(&store, sample, 0));
    }
    let other = Store::open(config, key(name), "other").unwrap();
    assert!((0..SAMPLES).all(|sample| has(&other, sample, 0)), "a damaged record hides the mended one");
    there
}

/// Takes back what was damaged and what was mended.
fn restore(folder: &Path, files: &[PathBuf; 2], contents: &[Vec<u8>; 2]) {
    for file in segment_files(folder) {
        if !file.file_name().unwrap().to_str().unwrap().starts_with("w-") {
            fs::remove_file(file).unwrap();
        }
    }
    for (file, whole) in files.iter().zip(contents) {
        fs::write(file, whole).unwrap();
    }
}

#[test]
fn every_flipped_bit_is_a_miss_or_harmless() {
    let folders = Folders::new();
    let (config, folder) = (folders.config(MIB, 0), folders.memory.path());
    let files = written(&config, "a", folder);
    let contents = files.each_ref().map(|file| fs::read(file).unwrap());
    for (file, whole) in files.iter().zip(&contents) {
        let mut lost = 0;
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(file, damaged).unwrap();
            let there = read_and_mend(&config, "a");
            // One bit is in at most one record, and damage in an index hides none behind it.
            assert!(there.len() as u32 >= SAMPLES - 1, "byte {at} of {}: {there:?}", file.display());
            lost += SAMPLES as usize - there.len();
            restore(folder, &files, &contents);
        }
        // All payload bytes count, and all index bytes; only the gaps between payloads do not.
        let payload: usize = (0..SAMPLES).map(bytes_of).sum();
        assert_eq!(lost, if file.extension().unwrap() == "data" { payload } else { whole.len() });
    }
}

#[test]
fn a_file_cut_anywhere_keeps_what_is_before_the_cut() {
    let folders = Folders::new();
    let (config, folder) = (folders.config(MIB, 0), folders.memory.path());
    let files = written(&config, "a", folder);
    let contents = files.each_ref().map(|file| fs::read(file).unwrap());
    for (file, whole) in files.iter().zip(&contents) {
        let mut kept = Vec::new();
        for length in 0..=whole.len() {
            fs::write(file, &whole[..length]).unwrap();
            let there = read_and_mend(&config, "a");
            kept.push(there.len());
            restore(folder, &files, &contents);
        }
        assert!(kept.is_sorted() && *kept.last().unwrap() == SAMPLES as usize, "{kept:?}");
    }
}

#[test]
fn files_of_another_key_or_writer_are_not_believed() {
    let folders = Folders::new();
    let (config, folder) = (folders.config(MIB, 0), folders.memory.path());
    let [data, index] = written(&config, "a", folder);
    // Another key's folder with these files in it.
    let elsewhere = folder.join(key("b").to_string());
    fs::create_dir(&elsewhere).unwrap();
    fs::copy(&data, elsewhere.join("w-0.data")).unwrap();
    fs::copy(&index, elsewhere.join("w-0.index")).unwrap();
    assert!(read_and_mend(&config, "b").is_empty());
    // Payloads shifted by one record's place: an index that points at others' bytes.
    let mut shifted = fs::read(&data).unwrap();
    shifted.rotate_left(64);
    fs::write(&data, shifted).unwrap();
    assert_eq!(read_and_mend(&config, "a"), [0], "only the empty record is what it was");
    // Neither is one half of a segment without the other.
    written(&config, "c", folder);
    fs::remove_file(folder.join(key("c").to_string()).join("w-0.data")).unwrap();
    assert!(read_and_mend(&config, "c").is_empty());
}

#[test]
fn damage_is_counted_and_a_copy_takes_its_place() {
    let folders = Folders::new();
    let (config, folder) = (folders.config(MIB, 0), folders.memory.path());
    // Neither knows of the other's.
    let (first, second) = (Store::open(&config, key("a"), "w").unwrap(), Store::open(&config, key("a"), "x").unwrap());
    for store in [&first, &second] {
        assert!(matches!(put(store, 1, 0, 500), Put::Stored(_)));
    }
    drop((first, second));
    let damaged = segment_files(folder).into_iter().find(|file| file.ends_with("w-0.data")).unwrap();
    fs::write(damaged, [0; 500]).unwrap();
    let stores = [Store::open(&config, key("a"), "y").unwrap(), Store::open(&config, key("a"), "z").unwrap()];
    for store in &stores {
        assert!(has(store, 1, 0));
        let stats = store.stats();
        assert!(stats.damaged <= 1 && stats.hits == 1 && stats.misses == 0 && stats.memory.entries == 1);
    }
    // Checked once a process: the second reading hashes nothing, and is right.
    assert!(stores.iter().all(|store| has(store, 1, 0)));

    fs::write(segment_files(folder).into_iter().find(|file| file.ends_with("x-0.data")).unwrap(), [0; 500]).unwrap();
    let store = Store::open(&config, key("a"), "v").unwrap();
    let record = store.find(1, 0).unwrap();
    assert!(!store.read(&record, &mut [&mut [0; 500]]).unwrap());
    assert!(store.find(1, 0).is_none());
    assert_eq!((store.stats().damaged, store.stats().misses, store.stats().hits), (2, 2, 0));
}

#[test]
fn a_long_index_loses_only_what_is_damaged() {
    let folders = Folders::new();
    let (config, folder) = (folders.config(8 * MIB, 0), folders.memory.path());
    let store = Store::open(&config, key("a"), "w").unwrap();
    for sample in 0..40_000 {
        assert!(matches!(put(&store, sample, 0, 0), Put::Stored(_)));
    }
    drop(store);
    let index = segment_files(folder).into_iter().find(|file| file.ends_with("w-0.index")).unwrap();
    let mut bytes = fs::read(&index).unwrap();
    let each = bytes.len() / 40_000;
    assert!(bytes.len() as u64 > 2 * MIB && bytes.len() == each * 40_000);
    // A megabyte is read at a time: damage it where two pieces meet, and over a piece's whole length.
    for stretch in [1_000_000..1_100_000, 1_200_000..2_500_000] {
        bytes[stretch].fill(0x58);
    }
    fs::write(&index, bytes).unwrap();
    let store = Store::open(&config, key("a"), "x").unwrap();
    let lost: Vec<u32> = (0..40_000).filter(|sample| !has(&store, *sample, 0)).collect();
    let touched = |sample: &u32| {
        let entry = *sample as usize * each..(*sample as usize + 1) * each;
        [1_000_000..1_100_000, 1_200_000..2_500_000]
            .iter()
            .any(|stretch| entry.start < stretch.end && stretch.start < entry.end)
    };
    assert_eq!(lost, (0..40_000).filter(touched).collect::<Vec<u32>>());
    assert_eq!(store.stats().damaged, 2);
}
