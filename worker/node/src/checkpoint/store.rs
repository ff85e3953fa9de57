//! [`CheckpointStore`]: a run's folder, through `object_store`.

use super::Error;
use bytes::Bytes;
use futures::TryStreamExt as _;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutPayload};
use serde::Deserialize as _;
use std::collections::BTreeSet;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use thaw_core::manifest::BlobRef;
use thaw_proto::ids::{Generation, Step};
use thaw_proto::run::CheckpointRef;
use url::Url;

const BLOBS: &str = "blobs";
const MANIFESTS: &str = "manifests";
const PARTS: &str = "parts";
/// Between two looks for a file that another rank is to write.
const LOOK: Duration = Duration::from_millis(20);
/// Hex digits of a BLAKE3 hash.
const HASH_DIGITS: usize = 64;

/// A manifest that is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenManifest {
    /// Path below the run's folder.
    pub path: String,
    /// Of its bytes, hex.
    pub blake3: String,
}

/// What a sweep leaves, besides what is young.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keep {
    /// Manifests by name, which have to be whole.
    pub manifests: Vec<String>,
    /// Steps whose manifests stay, of whatever generation.
    pub steps: BTreeSet<Step>,
}

/// What [`CheckpointStore::retain`] deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Manifests.
    pub manifests: usize,
    /// Blobs.
    pub blobs: usize,
    /// Bytes of those blobs.
    pub bytes: u64,
}

/// A run's folder. Blocking: made for the trainer's threads, not for async code. Shared between threads by reference.
#[derive(Debug)]
pub struct CheckpointStore {
    store: LocalFileSystem,
    folder: PathBuf,
    /// Drives `object_store`, whose calls are async even on files.
    runtime: tokio::runtime::Runtime,
}

impl CheckpointStore {
    /// Opens the folder `runs/<run>`, making it where it is missing.
    ///
    /// # Errors
    /// [`Error::Url`]: not a `file` URL. [`Error::Storage`]: the folder cannot be made.
    pub fn open(run_url: &Url) -> Result<Self, Error> {
        let refused = |what: String| Error::Url { url: run_url.to_string(), what };
        if run_url.scheme() != "file" {
            return Err(refused(format!("{:?} storage is not supported", run_url.scheme())));
        }
        let folder = run_url.to_file_path().map_err(|()| refused("it is not a path on this machine".to_owned()))?;
        std::fs::create_dir_all(&folder).map_err(|error| refused(error.to_string()))?;
        let store = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|source| failed("open", folder.display().to_string(), source))?
            .with_fsync(true);
        let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(Error::Thread)?;
        Ok(Self { store, folder, runtime })
    }

    /// Writes bytes, given in pieces, under the name of their content. Bytes that are there already are checked, not written again.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Storage`]; then no part of the file is there.
    pub fn put_blob(&self, pieces: Vec<Bytes>) -> Result<BlobRef, Error> {
        let mut hasher = blake3::Hasher::new();
        for piece in &pieces {
            hasher.update(piece);
        }
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        let blob = BlobRef { blake3: hasher.finalize().to_hex().to_string(), bytes };
        match self.get_blob(&blob) {
            Ok(_) => {
                self.touch(&blob_path(&blob)?);
                return Ok(blob);
            }
            // Rewriting what is damaged is what heals it.
            Err(Error::Missing { .. } | Error::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        let path = blob_path(&blob)?;
        self.wait(self.store.put(&path, PutPayload::from_iter(pieces)))
            .map_err(|source| failed("write", self.named(&path), source))?;
        Ok(blob)
    }

    /// Reads a blob and checks it against its name.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`], [`Error::Storage`], each naming the file.
    pub fn get_blob(&self, blob: &BlobRef) -> Result<Bytes, Error> {
        let path = blob_path(blob)?;
        let bytes = self.read(&path)?;
        if bytes.len() as u64 != blob.bytes && !thaw_mutants::planted("hash-unchecked") {
            let what = format!("it has {} bytes instead of {}", bytes.len(), blob.bytes);
            return Err(Error::Damaged { path: self.named(&path), what });
        }
        self.check_hash(&path, &bytes, &blob.blake3)?;
        Ok(bytes)
    }

    /// Creates the manifest of a generation's step. Where it is there with the same bytes, an earlier try had succeeded.
    ///
    /// # Errors
    /// [`Error::Fenced`]: it is there with other bytes. [`Error::Full`], [`Error::Storage`]: it is not there.
    pub fn put_manifest(&self, generation: Generation, step: Step, json: Vec<u8>) -> Result<WrittenManifest, Error> {
        let name = format!("{MANIFESTS}/{:08}-{:010}.json", generation.0, step.0);
        let path = Path::from(name.as_str());
        let written = WrittenManifest { path: name, blake3: blake3::hash(&json).to_hex().to_string() };
        let replaces = thaw_mutants::planted("manifest-overwritten");
        let mode = if replaces { PutMode::Overwrite } else { PutMode::Create };
        let put = self.store.put_opts(&path, PutPayload::from(json.clone()), mode.into());
        let Err(error) = self.wait(put) else {
            return Ok(written);
        };
        // The reply may be wrong about what happened (a retried link on a network file system), so the file decides.
        match self.read(&path) {
            Ok(found) if found == json => Ok(written),
            Ok(_) => Err(Error::Fenced { path: self.named(&path) }),
            Err(_) => Err(failed("write", self.named(&path), error)),
        }
    }

    /// Leaves word for rank 0 of what `rank` wrote of a save.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Storage`].
    pub fn put_part(&self, generation: Generation, step: Step, rank: u32, json: Vec<u8>) -> Result<(), Error> {
        let path = part_path(generation, step, rank);
        self.wait(self.store.put(&path, PutPayload::from(json)))
            .map_err(|source| failed("write", self.named(&path), source))?;
        Ok(())
    }

    /// Waits for what [`CheckpointStore::put_part`] leaves, as long as it is not given up.
    ///
    /// # Errors
    /// [`Error::Late`], [`Error::Storage`].
    pub fn wait_for_part(
        &self,
        generation: Generation,
        step: Step,
        rank: u32,
        limit: Duration,
        given_up: impl Fn() -> bool,
    ) -> Result<Bytes, Error> {
        let path = part_path(generation, step, rank);
        let started = Instant::now();
        loop {
            match self.read(&path) {
                Err(Error::Missing { .. }) if started.elapsed() < limit && !given_up() => std::thread::sleep(LOOK),
                Err(Error::Missing { path }) => return Err(Error::Late { path, seconds: limit.as_secs() }),
                read => return read,
            }
        }
    }

    /// Deletes what [`CheckpointStore::put_part`] left.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn delete_part(&self, generation: Generation, step: Step, rank: u32) -> Result<(), Error> {
        self.delete(&part_path(generation, step, rank))
    }

    /// Reads the manifest that a checkpoint names and checks it against the checkpoint's hash.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`], [`Error::Storage`], [`Error::Name`].
    pub fn get_manifest(&self, checkpoint: &CheckpointRef) -> Result<Bytes, Error> {
        let path = manifest_path(&checkpoint.manifest)?;
        let bytes = self.read(&path)?;
        self.check_hash(&path, &bytes, &checkpoint.manifest_blake3)?;
        Ok(bytes)
    }

    /// Deletes manifests of `generation` and older ones that `keep` does not name, and blobs that no remaining manifest names
    /// (`CKPT-4`), once all blobs of those to keep by name are seen to be there. Files younger than `grace` stay: they may belong to a save that
    /// has no manifest yet. Ages are counted back from the newest file, by the storage's clock: this host's may be ahead. Every run of 64 hex
    /// digits in a manifest counts as the name of a blob, so a newer format cannot lose what it refers to.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`]: a manifest to keep or a blob of it is not there, or not whole; nothing is deleted.
    /// [`Error::Storage`].
    pub fn retain(&self, generation: Generation, keep: &Keep, grace: Duration) -> Result<Swept, Error> {
        let (mut named, mut doomed) = (BTreeSet::new(), Vec::new());
        let blobs = self.list(BLOBS)?;
        for path in &keep.manifests {
            let manifest = self.read(&manifest_path(path)?)?;
            self.check_blobs(&manifest, &blobs)?;
            collect_hashes(&manifest, &mut named);
        }
        // After the blobs: a manifest that is written meanwhile keeps its own.
        let manifests = self.list(MANIFESTS)?;
        let written = |meta: &object_store::ObjectMeta| SystemTime::from(meta.last_modified);
        let newest = blobs.iter().chain(&manifests).map(written).max();
        // A file from the future must not make the others old.
        let now = newest.map_or_else(SystemTime::now, |newest| newest.min(SystemTime::now()));
        let oldest_kept = now.checked_sub(grace).unwrap_or(SystemTime::UNIX_EPOCH);
        let is_young = |meta: &object_store::ObjectMeta| written(meta) > oldest_kept;
        for meta in manifests {
            let name = meta.location.to_string();
            if keep.manifests.contains(&name) {
                continue;
            }
            let of = manifest_of(&name);
            let is_ours = of.is_some_and(|(of, step)| of <= generation && !keep.steps.contains(&step));
            if is_ours && !is_young(&meta) {
                doomed.push(meta.location);
            } else {
                collect_hashes(&self.read(&meta.location)?, &mut named);
            }
        }
        // Manifests first: a crash between the two leaves blobs without a manifest, never the reverse.
        let mut swept = Swept { manifests: doomed.len(), ..Swept::default() };
        doomed.iter().try_for_each(|path| self.delete(path))?;
        for meta in self.list(PARTS)? {
            if !is_young(&meta) {
                self.delete(&meta.location)?;
            }
        }
        for meta in blobs {
            let is_named = meta.location.filename().is_some_and(|hash| named.contains(hash));
            if !is_named && !is_young(&meta) {
                self.delete(&meta.location)?;
                swept.blobs += 1;
                swept.bytes += meta.size;
            }
        }
        Ok(swept)
    }

    /// Whether every blob that a manifest names is listed with its length.
    fn check_blobs(&self, manifest: &[u8], listed: &[object_store::ObjectMeta]) -> Result<(), Error> {
        let mut wanted = Vec::new();
        collect_blobs(&serde_json::from_slice(manifest).unwrap_or_default(), &mut wanted);
        for blob in wanted {
            let path = blob_path(&blob)?;
            let found = listed.iter().find(|meta| meta.location == path).map(|meta| meta.size);
            match found {
                Some(size) if size == blob.bytes => {}
                Some(size) => {
                    let what = format!("it has {size} bytes instead of {}", blob.bytes);
                    return Err(Error::Damaged { path: self.named(&path), what });
                }
                None => return Err(Error::Missing { path: self.named(&path) }),
            }
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> Result<Vec<object_store::ObjectMeta>, Error> {
        let path = Path::from(folder);
        self.wait(self.store.list(Some(&path)).try_collect())
            .map_err(|source| failed("list", self.named(&path), source))
    }

    fn read(&self, path: &Path) -> Result<Bytes, Error> {
        let bytes = self.wait(async { self.store.get(path).await?.bytes().await });
        match bytes {
            Ok(bytes) => Ok(bytes),
            Err(object_store::Error::NotFound { .. }) => Err(Error::Missing { path: self.named(path) }),
            Err(source) => Err(failed("read", self.named(path), source)),
        }
    }

    fn delete(&self, path: &Path) -> Result<(), Error> {
        match self.wait(self.store.delete(path)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("delete", self.named(path), source)),
        }
    }

    /// Makes a blob young again, so that a sweep of an older generation lets it live until its new manifest is there.
    fn touch(&self, path: &Path) {
        let touched = std::fs::File::options()
            .append(true)
            .open(self.folder.join(path.as_ref()))
            // By the storage's clock.
            .and_then(|file| Ok(futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)?));
        if let Err(error) = touched {
            tracing::debug!(%error, %path, "cannot renew a blob's time");
        }
    }

    fn check_hash(&self, path: &Path, bytes: &[u8], expected: &str) -> Result<(), Error> {
        let found = blake3::hash(bytes).to_hex();
        if found.as_str() == expected || thaw_mutants::planted("hash-unchecked") {
            return Ok(());
        }
        Err(Error::Damaged { path: self.named(path), what: format!("its hash is {found} instead of {expected}") })
    }

    fn named(&self, path: &Path) -> String {
        self.folder.join(path.as_ref()).display().to_string()
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}

fn blob_path(blob: &BlobRef) -> Result<Path, Error> {
    if !is_hash(blob.blake3.as_bytes()) {
        return Err(Error::Name { name: blob.blake3.clone(), expected: "blob" });
    }
    Ok(Path::from(format!("{BLOBS}/{}/{}", &blob.blake3[..2], blob.blake3)))
}

fn part_path(generation: Generation, step: Step, rank: u32) -> Path {
    Path::from(format!("{PARTS}/{:08}-{:010}-{rank}.json", generation.0, step.0))
}

fn manifest_path(name: &str) -> Result<Path, Error> {
    match manifest_of(name) {
        Some(_) => Ok(Path::from(name)),
        None => Err(Error::Name { name: name.to_owned(), expected: "manifest" }),
    }
}

/// Generation and step in `manifests/<generation>-<step>.json`.
fn manifest_of(name: &str) -> Option<(Generation, Step)> {
    let stem = name.strip_prefix(MANIFESTS)?.strip_prefix('/')?.strip_suffix(".json")?;
    let (generation, step) = stem.split_once('-')?;
    // Signs would parse.
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    Some((Generation(number(generation)?), Step(number(step)?)))
}

fn is_hash(text: &[u8]) -> bool {
    text.len() == HASH_DIGITS && text.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Every object that reads as a blob, wherever it is.
fn collect_blobs(value: &serde_json::Value, found: &mut Vec<BlobRef>) {
    match value {
        serde_json::Value::Object(fields) => match BlobRef::deserialize(value) {
            Ok(blob) => found.push(blob),
            Err(_) => fields.values().for_each(|field| collect_blobs(field, found)),
        },
        serde_json::Value::Array(items) => items.iter().for_each(|item| collect_blobs(item, found)),
        _ => {}
    }
}

fn collect_hashes(manifest: &[u8], found: &mut BTreeSet<String>) {
    for word in manifest.split(|byte| !byte.is_ascii_alphanumeric()).filter(|word| is_hash(word)) {
        found.insert(String::from_utf8_lossy(word).into_owned());
    }
}

fn failed(operation: &'static str, path: String, source: object_store::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&source);
    while let Some(error) = cause {
        let is_full = error.downcast_ref::<std::io::Error>().is_some_and(|error| {
            matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
        });
        if is_full {
            return Error::Full { operation, path, source };
        }
        cause = error.source();
    }
    Error::Storage { operation, path, source }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
