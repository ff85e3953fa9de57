use super::*;
use thaw_proto::run::Position;
use thaw_proto::status::ErrorClass;

fn open(folder: &std::path::Path) -> CheckpointStore {
    CheckpointStore::open(&Url::from_directory_path(folder).unwrap()).unwrap()
}

fn checkpoint(written: &WrittenManifest) -> CheckpointRef {
    CheckpointRef {
        position: Position::default(),
        generation: Generation(1),
        manifest: written.path.clone(),
        manifest_blake3: written.blake3.clone(),
    }
}

fn files(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

#[test]
fn blobs_come_back_checked_and_damage_is_named_and_healed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let blob = store.put_blob(vec!["weigh".into(), "ts".into()]).unwrap();
    assert_eq!(store.put_blob(vec!["weigh".into(), "ts".into()]).unwrap(), blob);
    assert_eq!(files(folder.path()), 1);
    assert_eq!(store.get_blob(&blob).unwrap(), "weights");

    let path = folder.path().join(blob_path(&blob).unwrap().as_ref());
    for damaged in [&b"weighty"[..], b"weight", b""] {
        std::fs::write(&path, damaged).unwrap();
        let error = store.get_blob(&blob).unwrap_err();
        assert!(matches!(&error, Error::Damaged { path, .. } if path.contains(&blob.blake3)), "{error}");
        store.put_blob(vec!["weigh".into(), "ts".into()]).unwrap();
        assert_eq!(store.get_blob(&blob).unwrap(), "weights");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(store.get_blob(&blob), Err(Error::Missing { .. })));
    let escape = BlobRef { blake3: "../../secret".to_owned(), bytes: 1 };
    assert!(matches!(store.get_blob(&escape), Err(Error::Name { .. })));
}

#[test]
fn a_manifest_is_created_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let written = store.put_manifest(Generation(3), Step(200), b"{}".to_vec()).unwrap();
    assert_eq!(written.path, "manifests/00000003-0000000200.json");
    assert_eq!(
        store.put_manifest(Generation(3), Step(200), b"{}".to_vec()).unwrap(),
        written,
        "the same bytes are mine"
    );
    let error = store.put_manifest(Generation(3), Step(200), b"[]".to_vec()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Fenced);
    assert_eq!(store.get_manifest(&checkpoint(&written)).unwrap(), "{}");
    std::fs::write(folder.path().join(&written.path), b"{").unwrap();
    assert!(matches!(store.get_manifest(&checkpoint(&written)), Err(Error::Damaged { .. })));
    let mut elsewhere = checkpoint(&written);
    elsewhere.manifest = "manifests/../../head.json".to_owned();
    assert!(matches!(store.get_manifest(&elsewhere), Err(Error::Name { .. })));
}

fn named(manifests: &[&str]) -> Keep {
    Keep { manifests: manifests.iter().map(|&name| name.to_owned()).collect(), ..Keep::default() }
}

#[test]
fn a_sweep_goes_by_the_storages_clock() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let of_a_save = store.put_blob(vec!["no manifest yet".into()]).unwrap();
    let head = store.put_manifest(Generation(1), Step(1), "{}".into()).unwrap();
    // This host's clock is two hours ahead of it.
    let earlier = std::time::SystemTime::now() - Duration::from_secs(7200);
    for file in [folder.path().join(blob_path(&of_a_save).unwrap().as_ref()), folder.path().join(&head.path)] {
        std::fs::File::options().append(true).open(file).unwrap().set_modified(earlier).unwrap();
    }
    let swept = store.retain(Generation(1), &named(&[&head.path]), Duration::from_secs(600)).unwrap();
    assert_eq!(swept, Swept::default());
    assert!(store.get_blob(&of_a_save).is_ok());
}

#[test]
fn a_sweep_keeps_what_is_named_young_or_newer() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let blobs: Vec<BlobRef> = (0..5_u8).map(|byte| store.put_blob(vec![vec![byte].into()]).unwrap()).collect();
    let manifest = |generation, step, blobs: &[&BlobRef]| {
        let json = serde_json::json!({ "blobs": blobs }).to_string();
        store.put_manifest(Generation(generation), Step(step), json.into()).unwrap().path
    };
    let old = manifest(1, 1, &[&blobs[0], &blobs[1]]);
    let kept = manifest(1, 2, &[&blobs[1], &blobs[2]]);
    let newer = manifest(2, 3, &[&blobs[3]]);

    let swept = store.retain(Generation(1), &named(&[&kept]), Duration::from_secs(3600)).unwrap();
    assert_eq!(swept, Swept::default(), "all is younger than an hour");
    let swept = store.retain(Generation(1), &named(&[&kept]), Duration::ZERO).unwrap();
    assert_eq!(swept, Swept { manifests: 1, blobs: 2, bytes: 2 });
    assert!(!folder.path().join(old).exists());
    assert!(folder.path().join(newer).exists());
    for (blob, stays) in blobs.iter().zip([false, true, true, true, false]) {
        assert_eq!(store.get_blob(blob).is_ok(), stays);
    }
    let end = manifest(1, 4, &[&blobs[1]]);
    let passing = manifest(1, 5, &[&blobs[1]]);
    let keep = Keep { steps: [Step(4)].into(), ..named(&[&kept]) };
    assert_eq!(
        store.retain(Generation(2), &keep, Duration::ZERO).unwrap().manifests,
        2,
        "of step 5, and the newer one"
    );
    assert!(folder.path().join(end).exists(), "a stage's end stays, whatever generation wrote it");
    assert!(!folder.path().join(passing).exists());
    let missing = named(&["manifests/1-9.json"]);
    assert!(matches!(store.retain(Generation(2), &missing, Duration::ZERO), Err(Error::Missing { .. })));
    assert!(folder.path().join(&kept).exists(), "nothing is deleted where a kept one is missing");

    let stray = store.put_blob(vec!["stray".into()]).unwrap();
    std::fs::write(folder.path().join(blob_path(&blobs[2]).unwrap().as_ref()), b"longer").unwrap();
    let swept = store.retain(Generation(1), &named(&[&kept]), Duration::ZERO);
    assert!(matches!(&swept, Err(Error::Damaged { path, .. }) if path.contains(&blobs[2].blake3)), "{swept:?}");
    assert!(store.get_blob(&stray).is_ok(), "nothing is deleted where a kept one is damaged");
}

#[test]
fn only_local_folders_are_taken() {
    let error = CheckpointStore::open(&"s3://lab/runs".parse().unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "checkpoint storage s3://lab/runs cannot be used: \"s3\" storage is not supported; give a file:///folder URL"
    );
    assert!(CheckpointStore::open(&"file://otherhost/runs".parse().unwrap()).is_err());
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing() {
    // The kernel's own full device, where the blob's folder is expected.
    let full = object_store::Error::Generic {
        store: "test",
        source: Box::new(std::io::Error::from_raw_os_error(nix::errno::Errno::ENOSPC as i32)),
    };
    let error = failed("write", "blobs/x".to_owned(), full);
    assert!(error.is_storage());
    assert_eq!(error.class(), ErrorClass::Retry);
    assert!(error.to_string().contains("free space"), "{error}");
}

#[test]
fn a_failed_write_leaves_no_part_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let bytes = vec![7; 100];
    let hash = blake3::hash(&bytes).to_hex();
    // A folder where the file belongs: the last step of the write fails.
    std::fs::create_dir_all(folder.path().join(BLOBS).join(&hash[..2]).join(hash.as_str())).unwrap();
    let error = store.put_blob(vec![bytes.into()]).unwrap_err();
    assert!(error.to_string().contains(hash.as_str()), "{error}");
    assert_eq!(files(folder.path()), 0);
}

#[test]
fn a_part_is_waited_for_and_swept_when_it_is_old() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (generation, step) = (Generation(2), Step(7));
    let late = store.wait_for_part(generation, step, 1, Duration::ZERO, || false).unwrap_err();
    assert!(matches!(&late, Error::Late { path, .. } if path.ends_with("parts/00000002-0000000007-1.json")), "{late}");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| store.wait_for_part(generation, step, 1, Duration::from_secs(60), || false));
        store.put_part(generation, step, 1, b"[]".to_vec()).unwrap();
        assert_eq!(waits.join().unwrap().unwrap(), "[]");
    });
    store.delete_part(generation, step, 1).unwrap();
    store.put_part(generation, step, 2, b"[]".to_vec()).unwrap();
    assert_eq!(files(folder.path()), 1);
    store.retain(generation, &Keep::default(), Duration::ZERO).unwrap();
    assert_eq!(files(folder.path()), 0);
}
