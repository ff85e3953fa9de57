//! The index: parts, shards, seeks, its file, and what it notices.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use support::{Folder, checked, csv, images};
use thaw_data::index::{Error, FILE_NAME};
use thaw_data::{Index, Part, build};

const CLASSES: [&str; 3] = ["math", "admin", "mail"];

fn indexed(folder: &Folder, seed: u64, shards: u32) -> Index {
    build(&checked(&folder.spec("x.csv", "csv")), seed, shards).unwrap()
}

#[test]
fn classes_are_sorted_and_counted() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&CLASSES, 10) + "mail,one more\n");
    let index = indexed(&folder, 7, 4);
    assert_eq!(index.classes(), ["admin", "mail", "math"]);
    assert_eq!(index.class_counts(), [10, 11, 10]);
    let summary = index.summary();
    assert_eq!((summary.train_samples, summary.eval_samples, summary.test_samples), (19, 6, 6));
    assert_eq!(summary.class_counts.iter().sum::<u64>(), 31);
    assert_eq!(index.shard_sizes(), [5, 5, 5, 4]);
    assert_eq!(index.label(Part::Train, 19), None);
}

#[test]
fn own_sources_stand_beside_the_split() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&CLASSES, 10));
    folder.write("eval.jsonl", "{\"text\":\"a\",\"label\":\"mail\"}\n\n{\"text\":\"b\",\"label\":\"math\"}");
    let mut spec = folder.spec("x.csv", "csv");
    spec["eval"] = folder.source("eval.jsonl", "jsonl");
    spec["split"] = json!({"train": 0.8, "eval": 0.0, "test": 0.2, "stratified": true});
    let index = build(&checked(&spec), 1, 2).unwrap();
    assert_eq!(Part::ALL.map(|part| index.size(part)), [24, 2, 6]);
    assert_eq!((index.label(Part::Eval, 0), index.label(Part::Eval, 1)), (Some(1), Some(2)));
    spec["split"] = json!({"train": 1.0, "eval": 0.0, "test": 0.0, "stratified": true});
    let index = build(&checked(&spec), 1, 2).unwrap();
    assert_eq!(Part::ALL.map(|part| index.size(part)), [30, 2, 0]);
}

#[test]
fn labels_of_jsonl_may_be_numbers() {
    let folder = Folder::new();
    let lines: String =
        (0..20).map(|n| format!("{{\"label\":{},\"text\":\"t{n}\",\"more\":[{n}]}}\n", n % 2)).collect();
    folder.write("x.jsonl", lines);
    let index = build(&checked(&folder.spec("x.jsonl", "jsonl")), 1, 1).unwrap();
    assert_eq!(index.classes(), ["0", "1"]);
    assert_eq!(index.class_counts(), [10, 10]);
}

#[test]
fn the_fingerprint_follows_contents_and_split_alone() {
    let (folder, other) = (Folder::new(), Folder::new());
    folder.write("x.csv", csv(&CLASSES, 10));
    other.write("x.csv", csv(&CLASSES, 10));
    let index = indexed(&folder, 7, 4);
    assert_eq!(index.fingerprint().len(), 64);
    assert_eq!(index.fingerprint(), indexed(&other, 7, 2).fingerprint());
    assert_ne!(index.fingerprint(), indexed(&folder, 8, 4).fingerprint());
    other.write("x.csv", csv(&CLASSES, 10).replace("mail 3", "mail three"));
    assert_ne!(index.fingerprint(), indexed(&other, 7, 4).fingerprint());
    images(&folder, &["cat", "dog"], 5);
    images(&other, &["cat", "dog"], 5);
    let of = |folder: &Folder| {
        build(&checked(&folder.spec("images", "image_folder")), 1, 1).unwrap().fingerprint().to_owned()
    };
    assert_eq!(of(&folder), of(&other));
    fs::rename(other.path().join("images/cat/000.png"), other.path().join("images/cat/0.png")).unwrap();
    assert_ne!(of(&folder), of(&other));
}

#[test]
fn the_file_round_trips_and_is_checked() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&CLASSES, 10));
    images(&folder, &["cat", "dog"], 5);
    let run = folder.path().join("run/data");
    for spec in [folder.spec("x.csv", "csv"), folder.spec("images", "image_folder")] {
        let index = build(&checked(&spec), 7, 2).unwrap();
        index.save(&run).unwrap();
        index.save(&run).unwrap();
        assert_eq!(fs::read_dir(&run).unwrap().count(), 1, "no temporary file stays");
        let loaded = Index::load(&run).unwrap();
        assert_eq!(loaded, index);
        loaded.verify().unwrap();
    }
    let path = run.join(FILE_NAME);
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut newer = good.clone();
    newer["version"] = json!(99);
    let mut moved = good.clone();
    moved["parts"][0]["records"][0] = moved["parts"][1]["records"][0].clone();
    let mut beyond = good.clone();
    beyond["parts"][0]["records"][0] = json!(1000);
    let mut unlabelled = good;
    unlabelled["sources"][0]["labels"][0] = json!(2);
    for bad in [newer, moved, beyond, unlabelled] {
        fs::write(&path, serde_json::to_vec(&bad).unwrap()).unwrap();
        assert!(matches!(Index::load(&run), Err(Error::Corrupt { .. })));
    }
    fs::write(&path, "{").unwrap();
    assert!(matches!(Index::load(&run), Err(Error::NotAnIndex { .. })));
    assert!(matches!(Index::load(&folder.path().join("nowhere")), Err(Error::Missing { .. })));
}

#[test]
fn changed_sources_are_named() {
    let folder = Folder::new();
    let path = folder.write("x.csv", csv(&CLASSES, 10));
    let index = indexed(&folder, 1, 1);
    let later = |name: &str| {
        let file = fs::File::options().append(true).open(folder.path().join(name)).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    };
    later("x.csv");
    index.verify().expect("a copy with another time is the same file");
    folder.write("x.csv", csv(&CLASSES, 10).replace("mail 3", "mail 4"));
    later("x.csv");
    assert!(matches!(index.verify(), Err(Error::Changed { what: "contents", path: ref named }) if *named == path));
    folder.write("x.csv", csv(&CLASSES, 11));
    assert!(matches!(index.verify(), Err(Error::Changed { what: "size", .. })));
    fs::remove_file(&path).unwrap();
    assert!(matches!(index.verify(), Err(Error::Missing { .. })));

    images(&folder, &["cat", "dog"], 5);
    let index = build(&checked(&folder.spec("images", "image_folder")), 1, 1).unwrap();
    let mut bytes = fs::read(folder.path().join("images/dog/003.png")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let changed = folder.write("images/dog/003.png", bytes);
    later("images/dog/003.png");
    assert!(matches!(index.verify(), Err(Error::Changed { path, .. }) if path == changed));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_sample_is_in_one_part_and_one_shard(each in 5_usize..40, seed: u64, shards in 1_u32..9) {
        let folder = Folder::new();
        folder.write("x.csv", csv(&CLASSES, each));
        let index = indexed(&folder, seed, shards);
        let mut records: Vec<u32> = Part::ALL.iter().flat_map(|part| index.records(*part).to_vec()).collect();
        records.sort_unstable();
        prop_assert_eq!(records, (0..3 * each as u32).collect::<Vec<_>>());
        let positions: BTreeSet<u32> = (0..shards)
            .flat_map(|shard| (0..index.shard_sizes()[shard as usize] as u32).map(move |i| (shard, i)))
            .map(|(shard, i)| index.shard_position(shard, i))
            .collect();
        prop_assert_eq!(positions, (0..index.size(Part::Train)).collect());
        prop_assert_eq!(index.shard_sizes().iter().sum::<u64>(), u64::from(index.size(Part::Train)));
        index.save(folder.path()).unwrap();
        prop_assert_eq!(Index::load(folder.path()).unwrap(), index);
    }
}
