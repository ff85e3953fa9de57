//! A folder with a budget: who may take room in it, and what is removed to make some.

use super::{Error, Key};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Where a node keeps rows. A tier of 0 bytes is not used, nor its folder made.
#[derive(Debug, Clone)]
pub struct Config {
    pub memory: Tier,
    pub disk: Tier,
}

/// A folder and the most bytes that all keys in it may take.
#[derive(Debug, Clone)]
pub struct Tier {
    pub folder: PathBuf,
    pub max_bytes: u64,
}

/// One key in one tier; holds the key's shared lock.
#[derive(Debug)]
pub(crate) struct OpenKey {
    tier: Tier,
    pub(crate) folder: PathBuf,
    /// Locked, shared, until this is dropped.
    _lock: File,
}

impl OpenKey {
    pub(crate) fn open(tier: &Tier, key: &Key) -> Result<Self, Error> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Folder { action, path, source }
        };
        fs::create_dir_all(&tier.folder).map_err(failed("make the cache folder", &tier.folder))?;
        let ledger = lock_ledger(&tier.folder)?;
        let folder = tier.folder.join(key.to_string());
        fs::create_dir_all(&folder).map_err(failed("make the cache folder", &folder))?;
        let path = folder.join("lock");
        let lock = open_lock(&path).map_err(failed("open", &path))?;
        lock.lock_shared().map_err(failed("lock", &path))?;
        // When it was opened last (CACHE-3).
        lock.set_modified(SystemTime::now()).map_err(failed("touch", &path))?;
        drop(ledger);
        Ok(Self { tier: tier.clone(), folder, _lock: lock })
    }

    /// Makes `file` longer, to `length` bytes, where the budget has room (CACHE-2). `false`: there is none.
    pub(crate) fn grow(&self, file: &File, length: u64) -> Result<bool, Error> {
        let _ledger = lock_ledger(&self.tier.folder)?;
        let failed = |source| Error::Rows { action: "make a file longer in", path: self.folder.clone(), source };
        let more = length.saturating_sub(file.metadata().map_err(failed)?.len());
        let fits = |used: u64| used.saturating_add(more) <= self.tier.max_bytes;
        if !fits(used(&self.tier.folder)) {
            evict(&self.tier.folder, |used| fits(used));
            if !fits(used(&self.tier.folder)) {
                return Ok(false);
            }
        }
        file.set_len(length).map_err(failed)?;
        Ok(true)
    }

    /// The folder's budget.
    pub(crate) fn max_bytes(&self) -> u64 {
        self.tier.max_bytes
    }
}

/// Removes every key of both tiers that no live process has open. Returns the bytes given back.
///
/// # Errors
/// A ledger that cannot be locked.
pub fn clear(config: &Config) -> Result<u64, Error> {
    let mut freed = 0;
    for folder in [&config.memory.folder, &config.disk.folder] {
        if folder.is_dir() {
            let _ledger = lock_ledger(folder)?;
            freed += evict(folder, |_| false);
        }
    }
    Ok(freed)
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path)
}

/// Held while room is taken, given back, or keys are removed. The holder does a few system calls and no more.
fn lock_ledger(folder: &Path) -> Result<File, Error> {
    let path = folder.join("ledger");
    let locked = open_lock(&path).and_then(|ledger| ledger.lock().map(|()| ledger));
    locked.map_err(|source| Error::Folder { action: "lock", path, source })
}

/// Bytes of all rows files, written to or only taken.
fn used(folder: &Path) -> u64 {
    keys(folder).iter().map(|key| bytes_of(key)).sum()
}

/// The key folders; nothing else in the folder is ours.
fn keys(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_key = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.len() == 2 * blake3::OUT_LEN) && path.join("lock").is_file()
    };
    entries.map(|entry| entry.path()).filter(is_key).collect()
}

/// The rows files of a key.
pub(crate) fn rows_files(key: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(key).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "rows")).collect();
    files.sort();
    files
}

fn bytes_of(key: &Path) -> u64 {
    rows_files(key).iter().filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.len()).sum()
}

/// Removes unused keys, least recently opened first, until `enough` of what is left. The caller holds the ledger. Returns the bytes freed.
fn evict(folder: &Path, enough: impl Fn(u64) -> bool) -> u64 {
    let mut unused: Vec<(SystemTime, PathBuf)> = Vec::new();
    for key in keys(folder) {
        let lock = key.join("lock");
        let opened = fs::metadata(&lock).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        unused.push((opened, key));
    }
    unused.sort();
    let mut freed = 0;
    for (_, key) in unused {
        if enough(used(folder)) {
            break;
        }
        let Ok(lock) = open_lock(&key.join("lock")) else { continue };
        // A live process holds it shared (CACHE-3); a dead one's locks are gone.
        if lock.try_lock().is_err() {
            continue;
        }
        let bytes = bytes_of(&key);
        match fs::remove_dir_all(&key) {
            Ok(()) => {
                freed += bytes;
                tracing::info!(key = %key.display(), bytes, "removed an unused key from the prefix cache");
            }
            Err(error) => {
                tracing::warn!(key = %key.display(), %error, "cannot remove an unused key from the prefix cache")
            }
        }
    }
    freed
}
